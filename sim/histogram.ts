/**
 * Counts of whole numbers ≥ 0 in buckets that grow with the value, so that any number of them takes the same memory.
 *
 * Values below 2^`bits` are kept exactly; above, a bucket is 2^−bits of its value wide, so a quantile is within that
 * share of the truth (8 bits: 0.4 %). Mean, least and largest are exact. Pure.
 */

/** Larger values count as this, 2⁴⁰ − 1: in µs 12 days. */
const VALUE_MAX = 1_099_511_627_775;
const OCTAVES_MAX = 40;
/** 2³² µs are 72 minutes. */
const OCTAVES_USUAL = 32;

export class Histogram {
  readonly #bits: number;
  readonly #size: number;
  /** Grows, rarely: it begins with room for an hour of µs. */
  #counts: Float64Array;
  #count = 0;
  #sum = 0;
  #min = Number.POSITIVE_INFINITY;
  #max = 0;

  /** @param bits of precision, 1…12 */
  constructor(bits = 8) {
    this.#bits = bits;
    this.#size = 1 << bits;
    this.#counts = new Float64Array((OCTAVES_USUAL - bits + 1) * this.#size);
  }

  get count(): number {
    return this.#count;
  }

  get mean(): number {
    return this.#count === 0 ? 0 : this.#sum / this.#count;
  }

  get sum(): number {
    return this.#sum;
  }

  get max(): number {
    return this.#max;
  }

  add(value: number): void {
    const index = this.#indexOf(Math.min(VALUE_MAX, value));
    if (index >= this.#counts.length) this.#grow(index);
    this.#counts[index] = (this.#counts[index] ?? 0) + 1;
    this.#count++;
    this.#sum += value;
    if (value < this.#min) this.#min = value;
    if (value > this.#max) this.#max = value;
  }

  /** The same precision is assumed. */
  merge(other: Histogram): void {
    if (other.#counts.length > this.#counts.length) this.#grow(other.#counts.length - 1);
    other.#counts.forEach((count, index) => {
      if (count > 0) this.#counts[index] = (this.#counts[index] ?? 0) + count;
    });
    this.#count += other.#count;
    this.#sum += other.#sum;
    this.#min = Math.min(this.#min, other.#min);
    this.#max = Math.max(this.#max, other.#max);
  }

  /** At (count − 1) · p, linear inside a bucket; undefined when empty. */
  quantile(p: number): number | undefined {
    if (this.#count === 0) return undefined;
    const rank = (this.#count - 1) * p;
    let below = 0;
    for (let index = 0; index < this.#counts.length; index++) {
      const count = this.#counts[index] ?? 0;
      if (count > 0 && rank < below + count) {
        const low = this.#lowOf(index);
        const width = this.#lowOf(index + 1) - low;
        const share = Math.min(1, (rank - below + 0.5) / count);
        const value = width === 1 ? low : low + share * width;
        return Math.min(this.#max, Math.max(this.#min, value));
      }
      below += count;
    }
    return this.#max;
  }

  #indexOf(value: number): number {
    if (value < this.#size) return value;
    let octave = 0;
    let rest = value;
    while (rest >= 2147483648) {
      rest = Math.floor(rest / 2);
      octave++;
    }
    const shift = 31 - Math.clz32(rest) - this.#bits;
    octave += shift;
    return (octave + 1) * this.#size + ((rest >>> shift) - this.#size);
  }

  #lowOf(index: number): number {
    if (index < this.#size) return index;
    let low = this.#size + (index % this.#size);
    for (let octave = Math.floor(index / this.#size) - 1; octave > 0; octave--) low *= 2;
    return low;
  }

  #grow(index: number): void {
    const octaves = Math.min(OCTAVES_MAX, Math.floor(index / this.#size) + 1);
    const counts = new Float64Array(octaves * this.#size);
    counts.set(this.#counts);
    this.#counts = counts;
  }
}
