/**
 * Orthonormal bases that vectors are projected onto before they are compared: a random one, and one trained on the
 * vectors themselves, so that little of them is left out.
 *
 * Training is orthogonal iteration: the basis is multiplied by the second moments of a sample, E[x xᵀ], and made
 * orthonormal again; it turns towards the directions with the most energy. It goes in slices, because 12 rounds over
 * 5,000 vectors take half a second. What reads a basis relies on nothing but its rows being orthonormal.
 */
import { assert } from "../runtime/actor.ts";
import { Matrix } from "./vector-kernels.ts";

/** Vectors looked at in one round. */
export const SAMPLE_MAX = 5000;
const ROUNDS = 12;
/** About 1.5 to 3 ms. */
const MULTIPLY_ADDS_PER_SLICE = 8_000_000;
/** Under this much of its length left, a direction is a combination of those before it, and noise. */
const INDEPENDENT_MIN = 1e-4;

/**
 * Orthonormal rows, random in direction: the first `rows` of a cosine transform, whose columns change sign at random.
 * `rows` ≤ `dimension`, in the steps of Matrix; `random` is uniform in [0, 1).
 */
export function randomBasis(rows: number, dimension: number, random: () => number): Matrix {
  assert(rows <= dimension, "a basis has no more rows than dimensions");
  const basis = new Matrix(rows, dimension, false);
  // cos(π·(column + ½)·row / dimension) has a period of 4·dimension in (2·column + 1)·row.
  const period = 4 * dimension;
  const cosines = Float64Array.from({ length: period }, (_, step) =>
    Math.cos((2 * Math.PI * step) / period),
  );
  for (let column = 0; column < dimension; column++) {
    const sign = random() < 0.5 ? -1 : 1;
    for (let row = 0; row < rows; row++) {
      const length = Math.sqrt((row === 0 ? 1 : 2) / dimension);
      const cosine = cosines[((2 * column + 1) * row) % period] ?? 0;
      basis.values[row * dimension + column] = sign * length * cosine;
    }
  }
  return basis;
}

/** One training, from a random basis to a trained one, in slices. */
export class BasisTraining {
  readonly #matrix: Matrix;
  readonly #random: () => number;
  #round = 0;
  /** Vectors of this round that were added up. */
  #summed = 0;
  /** Rows of this round that are orthonormal again. */
  #orthonormal = 0;
  /** Of `#matrix`, once trained. */
  #trained: Matrix | undefined;

  constructor(rows: number, dimension: number, random: () => number) {
    this.#matrix = new Matrix(rows, dimension, true);
    this.#matrix.values.set(randomBasis(rows, dimension, random).values);
    this.#random = random;
  }

  /** Of memory while it runs. */
  get bytes(): number {
    return this.#matrix.bytes;
  }

  /** Present when there is nothing left to do. */
  get trained(): Matrix | undefined {
    return this.#trained;
  }

  /**
   * One slice, of at most a few ms. `vectorAt(i)` gives a vector of norm 1 for i from 0 to `size` − 1; which one may
   * change between slices.
   */
  step(size: number, vectorAt: (index: number) => Float32Array): void {
    if (this.#trained !== undefined || size === 0) return;
    const { rows, dimension } = this.#matrix;
    const sample = Math.min(size, SAMPLE_MAX);
    if (this.#summed < sample) {
      const slice = Math.max(1, Math.floor(MULTIPLY_ADDS_PER_SLICE / (2 * rows * dimension)));
      const end = Math.min(sample, this.#summed + slice);
      for (; this.#summed < end; this.#summed++) {
        this.#matrix.vector.set(vectorAt(Math.floor((this.#summed * size) / sample)));
        this.#matrix.multiply();
        this.#matrix.accumulate();
      }
      return;
    }
    const slice = Math.max(1, Math.floor(MULTIPLY_ADDS_PER_SLICE / (16 * rows * dimension)));
    const end = Math.min(rows, this.#orthonormal + slice);
    for (; this.#orthonormal < end; this.#orthonormal++) this.#orthonormalise(this.#orthonormal);
    if (this.#orthonormal < rows) return;
    this.#matrix.sums.fill(0);
    this.#summed = 0;
    this.#orthonormal = 0;
    this.#round++;
    if (this.#round < ROUNDS) return;
    this.#trained = new Matrix(rows, dimension, false);
    this.#trained.values.set(this.#matrix.values);
  }

  /** Gram-Schmidt, twice: once leaves errors that the second removes. A direction that vanishes is drawn anew. */
  #orthonormalise(index: number): void {
    const { dimension, sums } = this.#matrix;
    const vector = Float64Array.from(sums.subarray(index * dimension, (index + 1) * dimension));
    for (;;) {
      const before = Math.sqrt(dot(vector, vector));
      for (let pass = 0; pass < 2 && before > 0; pass++) {
        for (let other = 0; other < index; other++) {
          const row = this.#matrix.row(other);
          const share = dot(vector, row);
          for (let at = 0; at < dimension; at++)
            vector[at] = (vector[at] ?? 0) - share * (row[at] ?? 0);
        }
      }
      const norm = Math.sqrt(dot(vector, vector));
      if (norm > INDEPENDENT_MIN * before) {
        const target = this.#matrix.row(index);
        for (let at = 0; at < dimension; at++) target[at] = (vector[at] ?? 0) / norm;
        return;
      }
      for (let at = 0; at < dimension; at++) vector[at] = this.#random() - 0.5;
    }
  }
}

function dot(a: Float64Array, b: Float64Array | Float32Array): number {
  let sum = 0;
  for (let at = 0; at < a.length; at++) sum += (a[at] ?? 0) * (b[at] ?? 0);
  return sum;
}
