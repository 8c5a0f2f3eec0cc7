/**
 * The vectors of one shard, and the nearest of them to a query: exact, without native code.
 *
 * Every vector is kept as floats and, projected onto an orthonormal basis of 64 or 96 rows, as int8 with the norm of
 * what the projection leaves out. By Cauchy-Schwarz x·q ≤ (projections' product) + (rests' product), for any
 * orthonormal basis; a search scans these bounds, and only rows whose bound reaches the threshold are compared as
 * floats. So every vector at or above the threshold is found, by proof, and the basis decides only how fast: a random
 * one at first, then one trained on the vectors (`maintain`), which is wider when too many rows survive the scan.
 *
 *   few ──more than 256──▶ blocks, random basis ──2,048──▶ trained basis ──1 % survive──▶ wide trained basis
 *    ▲                        │                              │  four times as many: trained again
 *    └────── at most 128 ─────┴──────────────────────────────┘
 *
 * Few vectors are compared one by one, in plain arrays: a shard of ten vectors costs ten vectors. Rows lie in blocks,
 * each with memory of its own and with the basis it was encoded with, so that a new basis is taken over block by
 * block, and a block that is empty is given back. Removing moves the last row into the gap.
 *
 * It knows nothing of answers, times and tenants; who owns it decides what is dropped when `bytes` grows too large.
 */
import { assert } from "../runtime/actor.ts";
import { BasisTraining, randomBasis } from "./principal-basis.ts";
import type { PackedQuery } from "./vector-kernels.ts";
import { BLOCK_ROWS, DIMENSION_STEP, type Matrix, packQuery, RowBlock } from "./vector-kernels.ts";

/** One vector that was found: its id and its cosine with the query, to six decimals. */
export type Found = { id: number; similarity: number };

/** What a shard asks of its index, exact or not. Ids are whole numbers that the owner chooses. */
export type VectorIndex = {
  /** Vectors in it. */
  readonly size: number;
  /** Memory, all of it: at most what is promised per vector, plus a constant. */
  readonly bytes: number;
  /** Takes a copy, scaled to norm 1; the reason when it is refused, and then nothing has changed. */
  insert(id: number, vector: Float32Array): string | undefined;
  /** False when there was none. */
  remove(id: number): boolean;
  /**
   * The best `count` vectors with a cosine of at least `threshold`, best first, equal ones by id; none for a query
   * that `insert` would refuse.
   */
  search(query: Float32Array, threshold: number, count: number): Found[];
  /** A copy, of norm 1. */
  vectorOf(id: number): Float32Array | undefined;
  /** One slice of background work, of a few ms; true while there is more. Call it when idle, again while true. */
  maintain(): boolean;
};

/** What the scans did since the start; `survivors` ÷ `scanned` is how well the basis prunes. */
export type PruningCounts = {
  searches: number;
  /** Rows whose bound was computed. */
  scanned: number;
  /** Rows compared as floats. */
  survivors: number;
  /** Survivors at or above the threshold. */
  reached: number;
};

/** More than this many go into blocks… */
const FEW_MAX = 256;
/** …and at most this many come back: far enough below that a size around the bound moves nothing to and fro. */
const FEW_AGAIN = 128;
/** Empty places at the end before the last block is given back. */
const SPARE_ROWS = BLOCK_ROWS + BLOCK_ROWS / 2;
/** Rows of a trained basis, where there are as many dimensions. */
const BASIS_ROWS = 64;
/** Rows of the random basis, and of the trained one where the narrow one prunes badly. */
const BASIS_ROWS_WIDE = 96;
/** A basis is trained on so many vectors or more… */
const TRAIN_FROM = 2048;
/** …and again when there are so many times as many, because the first were not like the later ones… */
const TRAIN_AGAIN_FACTOR = 4;
/** …but not once it was trained on so many: the sample is no larger. */
const TRAINED_ENOUGH = 20_000;
/** Above this share of rows that survive the scan in vain, the basis becomes wide. */
const WIDEN_SHARE = 0.01;
/** Searches that the share is taken over. */
const WIDEN_SEARCHES = 128;
/** Similarities are rounded to this, so that a vector's cosine with itself is 1 and not 0.99999994. */
const DECIMALS = 1e6;
/** Bytes per vector beside its floats and projection: a place in a Map and one in an array. Measured on Node 20. */
const ID_BYTES = 60;
/** The object itself, scratch vectors, empty tables. */
const BASE_BYTES = 4096;

type Block = { rows: RowBlock; basis: Matrix };

/** The exact index. */
export class ExactIndex implements VectorIndex {
  readonly #dimension: number;
  /** With zeros, up to a multiple of DIMENSION_STEP. */
  readonly #padded: number;
  readonly #entriesMax: number;
  readonly #random: () => number;
  /** Row → id; rows are numbered 0 to size − 1. */
  readonly #ids: number[] = [];
  readonly #rows = new Map<number, number>();
  /** Present while there are few: rows of `#padded` floats, with room for more. */
  #few: Float32Array | undefined;
  /** Empty while there are few; else row r is row r mod BLOCK_ROWS of block ⌊r ÷ BLOCK_ROWS⌋. */
  #blocks: Block[] = [];
  /** What new rows are encoded with, and all blocks when `maintain` is done. */
  #basis: Matrix | undefined;
  #training: BasisTraining | undefined;
  /** Size when the basis was trained; 0: it is random. */
  #trainedOn = 0;
  /** The vector of the call in progress. */
  readonly #scratch: Float32Array;
  readonly #counts: PruningCounts = { searches: 0, scanned: 0, survivors: 0, reached: 0 };
  /** `#counts` when the basis was last judged. */
  #judged: PruningCounts = { ...this.#counts };

  /**
   * `dimension` of all vectors, at least 1; `random`, uniform in [0, 1), for the first basis; at most `entriesMax`
   * vectors, by default 1,000,000, which are 1.7 GB at 384 dimensions.
   */
  constructor(options: { dimension: number; random: () => number; entriesMax?: number }) {
    const { dimension, random, entriesMax = 1_000_000 } = options;
    assert(Number.isInteger(dimension) && dimension > 0, "a dimension is a whole number from 1");
    assert(entriesMax > 0, "an index has room for at least one vector");
    this.#dimension = dimension;
    this.#padded = Math.ceil(dimension / DIMENSION_STEP) * DIMENSION_STEP;
    this.#entriesMax = entriesMax;
    this.#random = random;
    this.#scratch = new Float32Array(this.#padded);
  }

  get size(): number {
    return this.#ids.length;
  }

  get bytes(): number {
    const blocks = this.#blocks.reduce((sum, { rows }) => sum + rows.bytes, 0);
    const bases = new Set(this.#blocks.map(({ basis }) => basis));
    if (this.#basis !== undefined) bases.add(this.#basis);
    let ofBases = this.#training?.bytes ?? 0;
    for (const { bytes } of bases) ofBases += bytes;
    const few = this.#few?.byteLength ?? 0;
    return BASE_BYTES + few + blocks + ofBases + this.size * ID_BYTES;
  }

  /** Since the start; nothing is counted while there are few. */
  get pruning(): Readonly<PruningCounts> {
    return { ...this.#counts };
  }

  /** Rows of the basis, 0 while there are few, and whether it is trained: for those who watch. */
  get basis(): { rows: number; trained: boolean } {
    return { rows: this.#basis?.rows ?? 0, trained: this.#trainedOn > 0 };
  }

  insert(id: number, vector: Float32Array): string | undefined {
    assert(Number.isSafeInteger(id), "an id is a whole number");
    if (this.#rows.has(id)) return `id ${id} is in the index already`;
    if (this.size >= this.#entriesMax) return `the index is full: ${this.#entriesMax} vectors`;
    const refusal = normalise(vector, this.#dimension, this.#scratch);
    if (refusal !== undefined) return refusal;
    const row = this.size;
    if (!this.#makeRoom(row)) return "the engine has no memory for more vectors";
    this.#put(row, this.#scratch);
    this.#ids.push(id);
    this.#rows.set(id, row);
    return undefined;
  }

  remove(id: number): boolean {
    const row = this.#rows.get(id);
    if (row === undefined) return false;
    const last = this.size - 1;
    const lastId = this.#ids[last];
    assert(lastId !== undefined, "rows and ids are equally many");
    if (row !== last) {
      this.#put(row, this.#vectorAt(last));
      this.#ids[row] = lastId;
      this.#rows.set(lastId, row);
    }
    this.#blocks[Math.floor(last / BLOCK_ROWS)]?.rows.clear(last % BLOCK_ROWS);
    this.#ids.pop();
    this.#rows.delete(id);
    this.#giveBack();
    return true;
  }

  search(query: Float32Array, threshold: number, count: number): Found[] {
    const best = new BestFound(threshold, count);
    if (count < 1 || normalise(query, this.#dimension, this.#scratch) !== undefined) return [];
    if (this.#blocks.length === 0) {
      for (const [row, id] of this.#ids.entries()) {
        best.offer(id, dot(this.#vectorAt(row), this.#scratch));
      }
      return best.found;
    }
    const packed = new Map<Matrix, PackedQuery>();
    let left = this.size;
    this.#counts.searches++;
    this.#counts.scanned += left;
    for (const [index, { rows, basis }] of this.#blocks.entries()) {
      let forBasis = packed.get(basis);
      if (forBasis === undefined) {
        basis.vector.set(this.#scratch);
        basis.multiply();
        forBasis = packQuery(this.#scratch, basis.products);
        packed.set(basis, forBasis);
      }
      const { survivors, found } = rows.search(forBasis, Math.min(left, BLOCK_ROWS), best.limit);
      this.#counts.survivors += survivors;
      this.#counts.reached += found;
      for (let at = 0; at < found; at++) {
        const row = index * BLOCK_ROWS + (rows.foundRows[at * 2] ?? 0);
        const id = this.#ids[row];
        assert(id !== undefined, "a scan finds rows that are there");
        best.offer(id, rows.foundSimilarities[at * 2 + 1] ?? 0);
      }
      left -= BLOCK_ROWS;
      if (left <= 0) break;
    }
    return best.found;
  }

  vectorOf(id: number): Float32Array | undefined {
    const row = this.#rows.get(id);
    return row === undefined ? undefined : this.#vectorAt(row).slice(0, this.#dimension);
  }

  maintain(): boolean {
    if (this.#basis === undefined) return false;
    if (this.#training !== undefined) {
      this.#training.step(this.size, (row) => this.#vectorAt(row));
      const { trained } = this.#training;
      if (trained === undefined) return true;
      this.#training = undefined;
      this.#trainedOn = this.size;
      this.#basis = trained;
      this.#judged = { ...this.#counts };
      return true;
    }
    const stale = this.#blocks.findIndex(({ basis }) => basis !== this.#basis);
    if (stale >= 0) {
      this.#encodeAnew(stale);
      return true;
    }
    const rows = this.#rowsToTrain();
    if (rows === undefined) return false;
    this.#training = new BasisTraining(rows, this.#padded, this.#random);
    return true;
  }

  /** How many rows the basis should be trained to now; undefined: it is good enough. */
  #rowsToTrain(): number | undefined {
    const rows = this.#basis?.rows ?? 0;
    // All dimensions are in the basis: the bound is the product itself, and no training betters it.
    if (rows === this.#padded || this.size < TRAIN_FROM) return undefined;
    if (this.#trainedOn === 0) return Math.min(BASIS_ROWS, this.#padded);
    const searches = this.#counts.searches - this.#judged.searches;
    if (searches >= WIDEN_SEARCHES) {
      const { scanned, survivors, reached } = this.#judged;
      const inVain = this.#counts.survivors - survivors - (this.#counts.reached - reached);
      const isBad = inVain > WIDEN_SHARE * (this.#counts.scanned - scanned);
      this.#judged = { ...this.#counts };
      const wide = Math.min(BASIS_ROWS_WIDE, this.#padded);
      if (isBad && rows < wide) return wide;
    }
    const hasGrown =
      this.#trainedOn < TRAINED_ENOUGH && this.size >= TRAIN_AGAIN_FACTOR * this.#trainedOn;
    return hasGrown ? rows : undefined;
  }

  /** Takes the new basis over in one block. */
  #encodeAnew(index: number): void {
    const block = this.#blocks[index];
    const basis = this.#basis;
    assert(block !== undefined && basis !== undefined, "a stale block is there");
    block.rows.reset(basis.rows);
    block.basis = basis;
    const rows = Math.min(BLOCK_ROWS, this.size - index * BLOCK_ROWS);
    for (let row = 0; row < rows; row++) encode(block, row, block.rows.vector(row));
  }

  /** Room for a row at the end; false when the engine has no memory. */
  #makeRoom(row: number): boolean {
    if (this.#blocks.length === 0 && row < FEW_MAX) {
      const rows = this.#few === undefined ? 0 : this.#few.length / this.#padded;
      if (row >= rows) this.#resizeFew(Math.max(4, rows * 2));
      return true;
    }
    const index = Math.floor(row / BLOCK_ROWS);
    if (index < this.#blocks.length) return true;
    try {
      const widest = Math.min(BASIS_ROWS_WIDE, this.#padded);
      const basis = this.#basis ?? randomBasis(widest, this.#padded, this.#random);
      const rows = new RowBlock(this.#padded, widest);
      rows.reset(basis.rows);
      this.#basis = basis;
      this.#blocks.push({ rows, basis });
    } catch (error) {
      if (error instanceof RangeError) return false; // No memory, or no addresses for it.
      throw error;
    }
    if (this.#few !== undefined) {
      const few = this.#few;
      this.#few = undefined;
      for (let each = 0; each < row; each++) {
        this.#put(each, few.subarray(each * this.#padded, (each + 1) * this.#padded));
      }
    }
    return true;
  }

  /** After a removal: memory that is needed no more. */
  #giveBack(): void {
    if (this.#blocks.length === 0) {
      const rows = this.#few === undefined ? 0 : this.#few.length / this.#padded;
      if (this.size * 4 <= rows) this.#resizeFew(this.size * 2);
      return;
    }
    if (this.size <= FEW_AGAIN) {
      const few = new Float32Array(FEW_AGAIN * 2 * this.#padded);
      for (let row = 0; row < this.size; row++) few.set(this.#vectorAt(row), row * this.#padded);
      this.#few = few;
      this.#blocks = [];
      this.#basis = undefined;
      this.#training = undefined;
      this.#trainedOn = 0;
      return;
    }
    if (this.#blocks.length * BLOCK_ROWS - this.size >= SPARE_ROWS) this.#blocks.pop();
  }

  #resizeFew(rows: number): void {
    const few = new Float32Array(rows * this.#padded);
    if (this.#few !== undefined) few.set(this.#few.subarray(0, few.length));
    this.#few = few;
  }

  /** A view. */
  #vectorAt(row: number): Float32Array {
    const block = this.#blocks[Math.floor(row / BLOCK_ROWS)];
    if (block !== undefined) return block.rows.vector(row % BLOCK_ROWS);
    assert(this.#few !== undefined, "rows lie somewhere");
    return this.#few.subarray(row * this.#padded, (row + 1) * this.#padded);
  }

  /** `vector` is of norm 1 and padded, and may lie in another row. */
  #put(row: number, vector: Float32Array): void {
    this.#vectorAt(row).set(vector);
    const block = this.#blocks[Math.floor(row / BLOCK_ROWS)];
    if (block !== undefined) encode(block, row % BLOCK_ROWS, vector);
  }
}

function encode({ rows, basis }: Block, row: number, vector: Float32Array): void {
  basis.vector.set(vector);
  basis.multiply();
  rows.encode(row, basis.products);
}

/** The best `count`, kept in order; `limit` rises as they come, so that what cannot get in is not even looked at. */
class BestFound {
  readonly found: Found[] = [];
  readonly #threshold: number;
  readonly #count: number;

  constructor(threshold: number, count: number) {
    this.#threshold = threshold;
    this.#count = count;
  }

  /** What is below this, before rounding, cannot get in. */
  get limit(): number {
    const worst = this.found.length < this.#count ? undefined : this.found.at(-1);
    return Math.max(this.#threshold, worst?.similarity ?? -1) - 1 / DECIMALS;
  }

  offer(id: number, product: number): void {
    const similarity = Math.max(-1, Math.min(1, Math.round(product * DECIMALS) / DECIMALS));
    if (similarity < this.#threshold) return;
    let at = this.found.length;
    while (at > 0 && isBefore(id, similarity, this.found[at - 1])) at--;
    if (at >= this.#count) return;
    this.found.splice(at, 0, { id, similarity });
    if (this.found.length > this.#count) this.found.pop();
  }
}

function isBefore(id: number, similarity: number, other: Found | undefined): boolean {
  if (other === undefined) return false;
  return similarity > other.similarity || (similarity === other.similarity && id < other.id);
}

/** Why a vector cannot be compared by cosine; undefined, and `out` is the vector at norm 1, when it can. */
function normalise(vector: Float32Array, dimension: number, out: Float32Array): string | undefined {
  if (vector.length !== dimension) {
    return `the vector has ${vector.length} dimensions, not ${dimension}`;
  }
  let squares = 0;
  for (const value of vector) squares += value * value;
  if (!Number.isFinite(squares)) return "the vector has a number that is not finite";
  if (squares === 0) return "the vector is zero: it has no direction";
  const factor = 1 / Math.sqrt(squares);
  for (let at = 0; at < dimension; at++) out[at] = (vector[at] ?? 0) * factor;
  return undefined;
}

function dot(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let at = 0; at < a.length; at++) sum += (a[at] ?? 0) * (b[at] ?? 0);
  return sum;
}
