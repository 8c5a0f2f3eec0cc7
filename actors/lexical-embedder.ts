/**
 * A built-in embedder that knows words but no meaning: hashed words and pieces of words, projected at random.
 * Deterministic; pure.
 */

const BUCKETS = 65_536;

/** Texts that share words are near each other. Made once; rows of the projection are kept as they are met. */
export class LexicalEmbedder {
  readonly #dimension: number;

  constructor(dimension = 384) {
    this.#dimension = dimension;
  }

  /** A vector of length 1; zeros for a text without words. */
  embed(text: string): Float32Array {
    const vector = new Float32Array(this.#dimension);
    const add = (feature: string): void => {
      let state = (fnv1a(feature) % BUCKETS) + 1;
      for (let index = 0; index < vector.length; index++) {
        state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
        vector[index] = (vector[index] ?? 0) + (state & 0x8000_0000 ? 1 : -1);
      }
    };
    for (const word of text
      .normalize("NFKC")
      .toLowerCase()
      .match(/[a-z0-9']+/g) ?? []) {
      add(`w${word}`);
      for (let from = 0; word.length > 4 && from + 4 <= word.length; from++) {
        add(`p${word.slice(from, from + 4)}`);
      }
    }
    let squares = 0;
    for (const value of vector) squares += value * value;
    const norm = Math.sqrt(squares);
    return norm === 0 ? vector : vector.map((value) => value / norm);
  }
}

function fnv1a(text: string): number {
  let hash = 0x811c_9dc5;
  for (let index = 0; index < text.length; index++) {
    hash = Math.imul(hash ^ text.charCodeAt(index), 0x0100_0193) >>> 0;
  }
  return hash;
}
