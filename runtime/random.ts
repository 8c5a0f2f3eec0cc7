/**
 * Seeded randomness: xoshiro128** (Blackman and Vigna, public domain), seeded from the hash of a
 * name.
 *
 * `split` derives a stream from the seed and a name alone, not from the draws made so far: a new
 * actor with its own stream shifts no draw of any other. Not for secrets.
 */

/**
 * FNV-1a over UTF-16 code units, four lanes with different offsets, each finished by murmur3's
 * mixer.
 */
function hashLane(text: string, offset: number): number {
  let hash = (0x811c9dc5 ^ offset) | 0;
  for (let index = 0; index < text.length; index++) {
    hash = Math.imul(hash ^ text.charCodeAt(index), 0x01000193);
  }
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return hash ^ (hash >>> 16);
}

function rotateLeft(value: number, bits: number): number {
  return (value << bits) | (value >>> (32 - bits));
}

export class Random {
  /** Seed and names of the splits, joined: the stream's whole identity. */
  readonly #name: string;
  #a: number;
  #b: number;
  #c: number;
  #d: number;

  /** The same seed gives the same stream; `1` and `"1"` are the same seed. */
  constructor(seed: number | string) {
    this.#name = String(seed);
    this.#a = hashLane(this.#name, 0x9e3779b9);
    this.#b = hashLane(this.#name, 0x7f4a7c15);
    this.#c = hashLane(this.#name, 0xbf58476d);
    this.#d = hashLane(this.#name, 0x94d049bb) | 1; // Never all zero, the one state without a successor.
  }

  /** Uniform in [0, 1), 53 bits. */
  next(): number {
    const high = this.#next32() >>> 5;
    const low = this.#next32() >>> 6;
    return (high * 67108864 + low) / 9007199254740992;
  }

  /**
   * Uniform whole number in 0…n−1, without bias; n from 1 to 2³². Throws RangeError for any other
   * n.
   */
  int(n: number): number {
    if (!Number.isInteger(n) || n < 1 || n > 4294967296) {
      throw new RangeError(`int needs a whole number from 1 to 2^32, got ${n}`);
    }
    const limit = 4294967296 - (4294967296 % n);
    for (;;) {
      const draw = this.#next32() >>> 0;
      if (draw < limit) return draw % n;
    }
  }

  /** An independent stream for `name`; always the same one for the same seed and name. */
  split(name: string): Random {
    return new Random(`${this.#name}/${name}`);
  }

  #next32(): number {
    const result = Math.imul(rotateLeft(Math.imul(this.#b, 5), 7), 9);
    const shifted = this.#b << 9;
    this.#c ^= this.#a;
    this.#d ^= this.#b;
    this.#b ^= this.#c;
    this.#a ^= this.#d;
    this.#c ^= shifted;
    this.#d = rotateLeft(this.#d, 11);
    return result;
  }
}
