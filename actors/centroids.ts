/**
 * Buckets of a scope that has outgrown one shard: frozen centroids, and which of their cells a query must look into.
 *
 * A vector belongs to the bucket of its best centroid. A query at the edge of its cell may have its neighbour in the
 * next one, so cells are probed by margin: with 0 the query's own cell and C its centroids, cell j is
 *   g_j = (q·C_0 − q·C_j) / |C_0 − C_j|
 * away, and it is probed when g_j < z·√(1 − τ²)/√D. A neighbour at cosine τ differs from τ·q by a vector of length
 * √(1 − τ²), of which about 1/√D falls into any one direction when it points anywhere; z says how many times that is
 * allowed for. Real text is not spread over all D dimensions, hence z = 7 and not 2.6. No cheap rule is complete
 * (only g_j ≤ √(1 − τ²), in effect every cell, is); what is lost is measured live, by probing-audit.ts.
 *
 * Trained once on vectors of the scope's own embedder, then frozen: moving a centroid would strand what lies in its
 * cell. New centroids are a new `version`, which belongs to the key of everything stored under them.
 */
import { assert } from "../runtime/actor.ts";
import { dotProduct, normaliseInto } from "./unit-vector.ts";
import { DIMENSION_STEP, Matrix } from "./vector-kernels.ts";

/** Cells by default: fewer lose hits, more cost routing time (10 µs a query at 256). */
export const CENTROIDS = 256;
/** Fewer vectors than this do not tell what the scope's text is like. */
export const TRAINING_VECTORS_MIN = 20_000;
/**
 * Cells probed: see above. Measured on 51,000 real questions (English and Chinese, lexical vectors, threshold 0.92),
 * 2,075 hits of questions that are not stored word for word; share of hits kept, and owners asked of 4:
 *   `placement`:  z = 6 0.9966 at 1.87, 7 0.9971 at 2.06, 8 0.9986 at 2.26;
 *   rendezvous:   z = 6 0.9880 at 2.34, 7 0.9918 at 2.57, 8 0.9937 at 2.79.
 * Only where to begin: other embedders differ, and the audit moves it.
 */
export const PROBING_Z = 7;
/** An owner may hold so many times its even share before it gets no more buckets. */
const PLACEMENT_SLACK = 1.15;
/** The likeness of an owner that holds nothing yet: more than that of a stranger, less than that of a neighbour. */
const EMPTY_OWNER_LIKENESS = 0.02;
const ROUNDS = 10;
/** About 1 ms. */
const MULTIPLY_ADDS_PER_SLICE = 8_000_000;
/** Under the squared distance of any two centroids that differ. */
const DISTANCE_SQUARED_MIN = 1e-9;

function padded(dimension: number): number {
  return Math.ceil(dimension / DIMENSION_STEP) * DIMENSION_STEP;
}

/** The index of the largest; of equal ones the first. */
function bestOf(scores: Float32Array): number {
  let best = 0;
  for (let index = 1; index < scores.length; index++) {
    if ((scores[index] ?? 0) > (scores[best] ?? 0)) best = index;
  }
  return best;
}

/** Vectors to train on, as an array or read one by one where they lie; one that is gone meanwhile is left out. */
export type TrainingVectors = {
  readonly length: number;
  at(index: number): Float32Array | undefined;
};

/** Spherical k-means in slices: call `step` until `centroids` is there. The same seed and vectors give the same. */
export class CentroidTraining {
  readonly #vectors: TrainingVectors;
  readonly #dimension: number;
  readonly #random: () => number;
  readonly #matrix: Matrix;
  /** Of the vectors in each cell. */
  readonly #sums: Float64Array;
  readonly #sizes: Int32Array;
  #round = 0;
  #assigned = 0;
  #centroids: Centroids | undefined;

  /**
   * `vectors` of norm 1, one length, at least as many as centroids and better TRAINING_VECTORS_MIN; read until the
   * end. `count` is a multiple of 4. `random` is uniform in [0, 1).
   */
  constructor(options: {
    vectors: TrainingVectors;
    random: () => number;
    count?: number;
  }) {
    const { vectors, random, count = CENTROIDS } = options;
    const first = vectors.at(0);
    assert(first !== undefined && vectors.length >= count, "every centroid begins as a vector");
    this.#vectors = vectors;
    this.#dimension = first.length;
    this.#random = random;
    this.#matrix = new Matrix(count, padded(first.length), false);
    this.#sums = new Float64Array(count * this.#dimension);
    this.#sizes = new Int32Array(count);
    // The first of a shuffle: different vectors, all equally likely.
    const places = new Int32Array(vectors.length);
    for (let place = 0; place < places.length; place++) places[place] = place;
    for (let cell = 0; cell < count; cell++) {
      const drawn = cell + Math.floor(random() * (places.length - cell));
      this.#matrix.row(cell).set(vectors.at(places[drawn] ?? 0) ?? first);
      places[drawn] = places[cell] ?? 0;
    }
  }

  /** Vectors in each cell, as of the last round: about what its bucket will hold. */
  get sizes(): ArrayLike<number> {
    return this.#sizes;
  }

  /** Present when there is nothing left to do. */
  get centroids(): Centroids | undefined {
    return this.#centroids;
  }

  /** One slice of 1 to 3 ms. */
  step(): void {
    if (this.#centroids !== undefined) return;
    if (this.#assigned < this.#vectors.length) {
      const { rows, dimension } = this.#matrix;
      const slice = Math.max(1, Math.floor(MULTIPLY_ADDS_PER_SLICE / (rows * dimension)));
      const end = Math.min(this.#vectors.length, this.#assigned + slice);
      for (; this.#assigned < end; this.#assigned++) this.#assign(this.#assigned);
      return;
    }
    for (let cell = 0; cell < this.#sizes.length; cell++) this.#move(cell);
    this.#round++;
    if (this.#round === ROUNDS) {
      this.#centroids = new Centroids(this.#matrix, this.#dimension);
      return;
    }
    this.#sums.fill(0);
    this.#sizes.fill(0);
    this.#assigned = 0;
  }

  #assign(index: number): void {
    const vector = this.#vectors.at(index);
    if (vector === undefined) return;
    assert(vector.length === this.#dimension, "vectors are of one length");
    this.#matrix.vector.set(vector);
    this.#matrix.multiply();
    const cell = bestOf(this.#matrix.products);
    const start = cell * this.#dimension;
    for (let at = 0; at < vector.length; at++) {
      this.#sums[start + at] = (this.#sums[start + at] ?? 0) + (vector[at] ?? 0);
    }
    this.#sizes[cell] = (this.#sizes[cell] ?? 0) + 1;
  }

  /** To the middle of its cell; a cell without vectors, or whose vectors cancel out, begins again at a random one. */
  #move(cell: number): void {
    const start = cell * this.#dimension;
    const sum = new Float32Array(this.#sums.subarray(start, start + this.#dimension));
    if (normaliseInto(this.#matrix.row(cell), sum, this.#dimension) === undefined) return;
    const drawn = this.#vectors.at(Math.floor(this.#random() * this.#vectors.length));
    if (drawn !== undefined) this.#matrix.row(cell).set(drawn);
  }
}

/** Frozen centroids. */
export class Centroids {
  /** The same in every process that has the same centroids, and only there. */
  readonly version: string;
  readonly #dimension: number;
  readonly #matrix: Matrix;
  /** Of each centroid to all, |C_i − C_j|, once it was needed: all at once would take 10 ms. */
  readonly #distances: (Float32Array | undefined)[];

  /** Takes over `matrix`: rows of norm 1, of which the first `dimension` numbers count. */
  constructor(matrix: Matrix, dimension: number) {
    assert(matrix.dimension === padded(dimension), "the matrix is as wide as the vectors");
    this.#matrix = matrix;
    this.#dimension = dimension;
    this.version = `k${matrix.rows}-d${dimension}-${fingerprint(matrix.values)}`;
    this.#distances = new Array(matrix.rows).fill(undefined);
  }

  get count(): number {
    return this.#matrix.rows;
  }

  /** Memory, all of it, once every distance was needed. */
  get bytes(): number {
    return this.#matrix.bytes + this.count * this.count * 4;
  }

  /** A copy of the centroids, one behind the other: what `restoreCentroids` takes. */
  toFloats(): Float32Array {
    const floats = new Float32Array(this.count * this.#dimension);
    for (let cell = 0; cell < this.count; cell++) {
      floats.set(this.#matrix.row(cell).subarray(0, this.#dimension), cell * this.#dimension);
    }
    return floats;
  }

  /** Where a vector belongs, 0 to count − 1; undefined for one that has no direction or another dimension. */
  bucketOf(vector: Float32Array): number | undefined {
    return this.#score(vector) ? bestOf(this.#matrix.products) : undefined;
  }

  /**
   * The buckets to look into for neighbours at cosine `threshold` (0 to 1) or more, nearest first: the query's own,
   * then those within the margin that `z` ≥ 0 allows. None for a query without direction.
   */
  probed(query: Float32Array, threshold: number, z: number): number[] {
    if (!this.#score(query)) return [];
    const scores = this.#matrix.products.slice();
    const own = bestOf(scores);
    const distances = this.#distancesOf(own);
    const ownScore = scores[own] ?? 0;
    const margin =
      (z * Math.sqrt(Math.max(0, 1 - threshold * threshold))) / Math.sqrt(this.#dimension);
    const near: { bucket: number; away: number }[] = [];
    for (const [bucket, score] of scores.entries()) {
      if (bucket === own) continue;
      const away = (ownScore - score) / (distances[bucket] ?? 1);
      if (away < margin) near.push({ bucket, away });
    }
    near.sort((a, b) => a.away - b.away || a.bucket - b.bucket);
    return [own, ...near.map(({ bucket }) => bucket)];
  }

  /**
   * Who owns a probed bucket, each once, the most likely first. An owner that is asked looks through all it holds of
   * the scope, so what lies in a bucket of its own that was not probed is found, too.
   */
  owners<O>(
    query: Float32Array,
    threshold: number,
    z: number,
    ownerOf: (bucket: number) => O,
  ): O[] {
    return [...new Set(this.probed(query, threshold, z).map(ownerOf))];
  }

  /**
   * An owner for each bucket, as a number from 0 to `owners` − 1, so that neighbouring buckets lie together and every
   * owner has its share: a query then asks a fifth fewer owners than with buckets strewn by hash. `sizes`: entries in
   * each bucket, ≥ 0. The same for the same arguments. A different number of owners moves many buckets, where
   * rendezvous moves the fewest: for owners that seldom change.
   */
  placement(sizes: ArrayLike<number>, owners: number): Int32Array {
    assert(
      owners >= 1 && sizes.length === this.count,
      "every bucket has a size, and somewhere to go",
    );
    const dimension = this.#matrix.dimension;
    // One more than there are: empty buckets are placed, too.
    const sizeOf = (bucket: number): number => (sizes[bucket] ?? 0) + 1;
    const buckets = Array.from({ length: this.count }, (_, bucket) => bucket);
    const total = buckets.reduce((sum, bucket) => sum + sizeOf(bucket), 0);
    const loads = new Float64Array(owners);
    const sums = Array.from({ length: owners }, () => new Float64Array(dimension));
    const placed = new Int32Array(this.count);
    for (const bucket of buckets.sort((a, b) => sizeOf(b) - sizeOf(a) || a - b)) {
      const centroid = this.#matrix.row(bucket);
      let [best, likenessMax] = [-1, Number.NEGATIVE_INFINITY];
      for (const [owner, sum] of sums.entries()) {
        const load = loads[owner] ?? 0;
        if (load > 0 && load + sizeOf(bucket) > (PLACEMENT_SLACK * total) / owners) continue;
        const norm = Math.sqrt(dotProduct(sum, sum));
        const likeness = norm === 0 ? EMPTY_OWNER_LIKENESS : dotProduct(sum, centroid) / norm;
        if (likeness > likenessMax) [best, likenessMax] = [owner, likeness];
      }
      if (best < 0) best = loads.indexOf(Math.min(...loads)); // None has room: the least loaded.
      placed[bucket] = best;
      loads[best] = (loads[best] ?? 0) + sizeOf(bucket);
      const sum = sums[best];
      for (let at = 0; sum !== undefined && at < dimension; at++) {
        sum[at] = (sum[at] ?? 0) + sizeOf(bucket) * (centroid[at] ?? 0);
      }
    }
    return placed;
  }

  /** Overwrites the matrix's products. */
  #distancesOf(bucket: number): Float32Array {
    const known = this.#distances[bucket];
    if (known !== undefined) return known;
    this.#matrix.vector.set(this.#matrix.row(bucket));
    this.#matrix.multiply();
    const distances = this.#matrix.products.map((product) =>
      Math.sqrt(Math.max(DISTANCE_SQUARED_MIN, 2 - 2 * product)),
    );
    this.#distances[bucket] = distances;
    return distances;
  }

  /** Scores of all centroids into the matrix's products; false when the vector has none. */
  #score(vector: Float32Array): boolean {
    const refusal = normaliseInto(this.#matrix.vector, vector, this.#dimension);
    if (refusal !== undefined) return false;
    this.#matrix.multiply();
    return true;
  }
}

/** Centroids from `toFloats`, as a store gives them back; or why these are none. */
export function restoreCentroids(floats: Float32Array, dimension: number): Centroids | string {
  const count = floats.length / dimension;
  if (!Number.isInteger(count) || count === 0 || count % 4 !== 0) {
    return `${floats.length} numbers are not a multiple of 4 centroids of ${dimension} dimensions`;
  }
  const matrix = new Matrix(count, padded(dimension), false);
  for (let cell = 0; cell < count; cell++) {
    const row = floats.subarray(cell * dimension, (cell + 1) * dimension);
    const refusal = normaliseInto(new Float32Array(dimension), row, dimension);
    if (refusal !== undefined) return `centroid ${cell}: ${refusal}`;
    // As stored, to the bit: scaled again, it would have another version.
    matrix.row(cell).set(row);
  }
  return new Centroids(matrix, dimension);
}

/** 64 bits of the numbers, in hexadecimal: FNV-1a over their bits in two lanes. */
function fingerprint(values: Float32Array): string {
  const words = new Uint32Array(values.buffer, values.byteOffset, values.length);
  const lane = (seed: number): string => {
    let hash = seed;
    for (let at = 0; at < words.length; at++) {
      hash = Math.imul(hash ^ (words[at] ?? 0), 0x01000193);
      hash ^= hash >>> 15; // FNV alone carries nothing from high bits to low ones.
    }
    return (hash >>> 0).toString(16).padStart(8, "0");
  };
  return lane(0x811c9dc5) + lane(0x9e3779b9);
}
