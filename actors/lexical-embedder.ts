/**
 * Text to vector without a model: by the words and characters in it. The built-in mode that needs no download, and
 * the embedder of tests and of the simulator.
 *
 * It sees words, not meaning: "dark mode on" and "dark mode off" are at 0.87, while two questions that mean the same
 * in other words are far apart. Rephrasings by punctuation, case, inflection and small words come out near 1. Hence
 * thresholds of 0.95 and more, and guards, which see the order of words that this does not.
 *
 * A text, in NFKC and lower case, is a multiset of features: words of ASCII letters and digits; the 4-grams of words
 * longer than 4; the 1- to 3-grams of runs of other letters, digits and symbols (Chinese and Japanese have no
 * spaces). Each feature is hashed to one of 65,536 rows of ±1, and the vector is the sum of the rows, at norm 1: a
 * random projection of the feature counts, in which cosines are kept to about 1/√dimension. All features weigh the
 * same: weights from the frequency of words would need statistics that all processes share, and would change.
 */
import { assert } from "../runtime/actor.ts";

/** A new name whenever any vector would change: vectors of different embedders never meet. */
const VERSION = "lexical-1";
/** Longer texts, after NFKC, have no vector: two texts that differ only behind a cut would be the same. */
const CHARACTERS_MAX = 2048;
/** NFKC of one character can be 18 long, so what is longer than this is not even normalised. */
const TEXT_LENGTH_MAX = 4 * CHARACTERS_MAX;
const ROWS = 65_536;
const GRAM = 4;
const RUN_GRAM_MAX = 3;
/** FNV-1a starts from these, so that a word and a gram of the same letters are different features. */
const WORD_SEED = 0x811c9dc5;
const GRAM_SEED = 0x9e3779b9;
const RUN_SEED = 0x7f4a7c15;

/** Words of ASCII, and runs of anything else that is not punctuation, a space or a control character. */
const PIECES = /[a-z0-9']+|[^\p{ASCII}\p{P}\p{Z}\p{C}]+/gu;

/** Built-in embedder; see the head of this file. */
export class LexicalEmbedder {
  /** Name, version and dimension, as it belongs into a scope. */
  readonly id: string;
  readonly dimension: number;
  /** Of each place: in how many features it was +1. */
  readonly #ones: Int32Array;

  /** `dimension` from 16 to 4096. */
  constructor(dimension = 384) {
    assert(
      Number.isInteger(dimension) && dimension >= 16 && dimension <= 4096,
      "a lexical embedding has 16 to 4096 dimensions",
    );
    this.dimension = dimension;
    this.id = `${VERSION}-${dimension}`;
    this.#ones = new Int32Array(dimension);
  }

  /**
   * The text's vector, of norm 1. All zero when the text has no words, or more than 2,048 characters: an index
   * refuses that, and there is nothing to compare.
   */
  embed(text: string): Float32Array {
    const vector = new Float32Array(this.dimension);
    if (text.length > TEXT_LENGTH_MAX) return vector;
    const normal = text.normalize("NFKC").toLowerCase();
    if (normal.length > CHARACTERS_MAX) return vector;
    const ones = this.#ones.fill(0);
    let features = 0;
    for (const [piece] of normal.matchAll(PIECES)) features += this.#addPiece(piece);
    let squares = 0;
    for (const [place, count] of ones.entries()) {
      const sum = 2 * count - features;
      vector[place] = sum;
      squares += sum * sum;
    }
    if (squares === 0) return vector;
    const factor = 1 / Math.sqrt(squares);
    for (const [place, sum] of vector.entries()) vector[place] = sum * factor;
    return vector;
  }

  /** Adds the features of one word or run; how many they were. */
  #addPiece(piece: string): number {
    let features = 0;
    if (piece.charCodeAt(0) < 128) {
      this.#addRow(hashOf(piece, 0, piece.length, WORD_SEED));
      features++;
      if (piece.length <= GRAM) return features;
      for (let at = 0; at + GRAM <= piece.length; at++) {
        this.#addRow(hashOf(piece, at, at + GRAM, GRAM_SEED));
        features++;
      }
      return features;
    }
    const characters = [...piece];
    for (let size = 1; size <= RUN_GRAM_MAX; size++) {
      for (let at = 0; at + size <= characters.length; at++) {
        const gram = characters.slice(at, at + size).join("");
        this.#addRow(hashOf(gram, 0, gram.length, RUN_SEED));
        features++;
      }
    }
    return features;
  }

  /** Counts the +1 places of a feature's row; its bits come from the row's number, 32 places at a time. */
  #addRow(hash: number): void {
    const ones = this.#ones;
    const row = hash % ROWS;
    for (let start = 0; start < ones.length; start += 32) {
      const bits = mixed(row * 128 + start / 32 + 1);
      const end = Math.min(32, ones.length - start);
      for (let at = 0; at < end; at++)
        ones[start + at] = (ones[start + at] ?? 0) + ((bits >>> at) & 1);
    }
  }
}

/** FNV-1a over the UTF-16 code units from `start` to `end`, from 0. */
function hashOf(text: string, start: number, end: number, seed: number): number {
  let hash = seed;
  for (let at = start; at < end; at++) hash = Math.imul(hash ^ text.charCodeAt(at), 0x01000193);
  return mixed(hash);
}

/** The finisher of murmur3: every bit of the result depends on every bit of the number. */
function mixed(number: number): number {
  let hash = number | 0;
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}
