/**
 * The inner loops of vector search, in WebAssembly SIMD, and the two things that live in its memory: `Matrix`, whose
 * products with a vector are projections and scores of centroids, and `RowBlock`, the rows of an index.
 *
 * A WebAssembly memory never shrinks, so each matrix and each block has one of its own, and giving memory back is
 * dropping the object. 1 MiB of addresses is used and about 10 GiB are reserved for each (that is how engines check
 * bounds): Node 20 has room for some 13,000 of them in a process.
 */
import { assert } from "../runtime/actor.ts";
import {
  type Code,
  f32,
  f32x4,
  get,
  i16x8,
  i32,
  i32x4,
  moduleOf,
  repeat,
  set,
  v128,
  type WasmFunction,
  when,
} from "./wasm-assembler.ts";

// What we use of the engine's WebAssembly; the compiler's library declares it for browsers only.
declare const WebAssembly: {
  Module: new (bytes: Uint8Array<ArrayBuffer>) => object;
  Instance: new (module: object, imports: object) => { exports: unknown };
  Memory: new (size: { initial: number; maximum: number }) => { buffer: ArrayBuffer };
};

/** Dimensions are padded to a multiple of this many, with zeros. */
export const DIMENSION_STEP = 16;
/** The rows of a matrix, a multiple of this. */
export const MATRIX_STEP = 4;
/** Rows that lie together, one in each place of two vectors of four. */
const GROUP_ROWS = 8;
/** Of a page of WebAssembly memory. */
const PAGE_BYTES = 65_536;
/** What the engine keeps for an instance and its memory beside the pages; measured on Node 20. */
const INSTANCE_BYTES = 4096;

// ---- the kernels ------------------------------------------------------------------------------------------

/** `local += bytes` */
const advance = (local: number, bytes: Code): Code => set(local, i32.add(get(local), bytes));
const sumOf = (vector: Code): Code =>
  f32.add(
    f32.add(f32x4.lane(vector, 0), f32x4.lane(vector, 1)),
    f32.add(f32x4.lane(vector, 2), f32x4.lane(vector, 3)),
  );

/**
 * products(vector, matrix, matrixEnd, out, rowBytes): out[i] = dot(matrix[i], vector), four rows at a time so that
 * each part of the vector is loaded once for four.
 */
const products: WasmFunction = (() => {
  const [vector, matrix, matrixEnd, out, rowBytes, at, atEnd, row] = [0, 1, 2, 3, 4, 5, 6, 7];
  const [part, ...sums] = [8, 9, 10, 11, 12];
  return {
    name: "products",
    parameters: ["i32", "i32", "i32", "i32", "i32"],
    locals: ["i32", "i32", "i32", "v128", "v128", "v128", "v128", "v128"],
    body: repeat(
      [
        ...sums.map((sum) => set(sum, v128.zero)),
        set(at, get(vector)),
        set(atEnd, i32.add(get(vector), get(rowBytes))),
        repeat(
          [
            set(part, v128.load(get(at))),
            set(row, get(matrix)),
            ...sums.flatMap((sum) => [
              set(sum, f32x4.add(get(sum), f32x4.mul(v128.load(get(row)), get(part)))),
              advance(row, get(rowBytes)),
            ]),
            advance(matrix, i32.const(16)),
            advance(at, i32.const(16)),
          ],
          i32.lessThan(get(at), get(atEnd)),
        ),
        ...sums.map((sum, index) => f32.store(get(out), sumOf(get(sum)), index * 4)),
        advance(out, i32.const(16)),
        advance(matrix, i32.mul(get(rowBytes), i32.const(3))), // One row was walked over.
      ],
      i32.lessThan(get(matrix), get(matrixEnd)),
    ),
  };
})();

/** accumulate(vector, factors, sums, sumsEnd, rowBytes): sums[i] += factors[i] · vector. */
const accumulate: WasmFunction = (() => {
  const [vector, factors, sums, sumsEnd, rowBytes, at, atEnd, factor] = [0, 1, 2, 3, 4, 5, 6, 7];
  return {
    name: "accumulate",
    parameters: ["i32", "i32", "i32", "i32", "i32"],
    locals: ["i32", "i32", "v128"],
    body: [
      ...set(atEnd, i32.add(get(vector), get(rowBytes))),
      ...repeat(
        [
          set(factor, v128.load32Splat(get(factors))),
          advance(factors, i32.const(4)),
          set(at, get(vector)),
          repeat(
            [
              v128.store(
                get(sums),
                f32x4.add(v128.load(get(sums)), f32x4.mul(v128.load(get(at)), get(factor))),
              ),
              advance(sums, i32.const(16)),
              advance(at, i32.const(16)),
            ],
            i32.lessThan(get(at), get(atEnd)),
          ),
        ],
        i32.lessThan(get(sums), get(sumsEnd)),
      ),
    ],
  };
})();

/**
 * scan(groups, groupsEnd, pairBytes, query, out, queryScale, queryHalfNorm, queryRest, limit) → survivors.
 *
 * A group is 8 rows: for each pair of dimensions 16 bytes, two of each row; then 8 scales and 8 rests as floats. The
 * query's pair, two whole numbers of 16 bits, is the same for all rows, so one dot instruction serves four rows and
 * nothing is added up across. A row survives when
 *   scale · (queryScale · dot + queryHalfNorm) + rest · queryRest ≥ limit,
 * and then its number goes to `out`, as 4 bytes.
 */
const scan: WasmFunction = (() => {
  const [group, groupsEnd, pairBytes, query, out, queryScale, queryHalfNorm, queryRest, limit] = [
    0, 1, 2, 3, 4, 5, 6, 7, 8,
  ];
  const [pairsEnd, queryAt, firstRow, mask, outStart] = [9, 10, 11, 12, 13];
  const [low, high, bytes, pair] = [14, 15, 16, 17];
  const unrolled = 4; // Pairs a step; the number of dimensions is a multiple of 8.
  /** Bits of the four rows whose dots are in `dots`, with scales and rests this far behind the pairs. */
  const survivors = (dots: number, scales: number, rests: number): Code =>
    i32x4.bitmask(
      f32x4.atLeast(
        f32x4.add(
          f32x4.mul(
            v128.load(get(group), scales),
            f32x4.add(
              f32x4.mul(f32x4.fromI32x4(get(dots)), f32x4.splat(get(queryScale))),
              f32x4.splat(get(queryHalfNorm)),
            ),
          ),
          f32x4.mul(v128.load(get(group), rests), f32x4.splat(get(queryRest))),
        ),
        f32x4.splat(get(limit)),
      ),
    );
  const step = Array.from({ length: unrolled }, (_, index) => [
    set(bytes, v128.load(get(group), index * 16)),
    set(pair, v128.load32Splat(get(queryAt), index * 4)),
    set(low, i32x4.add(get(low), i32x4.dot(i16x8.extendLow(get(bytes)), get(pair)))),
    set(high, i32x4.add(get(high), i32x4.dot(i16x8.extendHigh(get(bytes)), get(pair)))),
  ]).flat();
  return {
    name: "scan",
    parameters: ["i32", "i32", "i32", "i32", "i32", "f32", "f32", "f32", "f32"],
    locals: ["i32", "i32", "i32", "i32", "i32", "v128", "v128", "v128", "v128"],
    result: "i32",
    body: [
      ...set(outStart, get(out)),
      ...repeat(
        [
          set(low, v128.zero),
          set(high, v128.zero),
          set(queryAt, get(query)),
          set(pairsEnd, i32.add(get(group), get(pairBytes))),
          repeat(
            [
              ...step,
              advance(queryAt, i32.const(unrolled * 4)),
              advance(group, i32.const(unrolled * 16)),
            ],
            i32.lessThan(get(group), get(pairsEnd)),
          ),
          set(
            mask,
            i32.or(survivors(low, 0, 32), i32.shiftLeft(survivors(high, 16, 48), i32.const(4))),
          ),
          when(get(mask), [
            repeat(
              [
                i32.store(get(out), i32.add(get(firstRow), i32.countTrailingZeros(get(mask)))),
                advance(out, i32.const(4)),
                set(mask, i32.and(get(mask), i32.sub(get(mask), i32.const(1)))),
              ],
              get(mask),
            ),
          ]),
          advance(group, i32.const(64)),
          advance(firstRow, i32.const(GROUP_ROWS)),
        ],
        i32.lessThan(get(group), get(groupsEnd)),
      ),
      ...i32.shiftRight(i32.sub(get(out), get(outStart)), i32.const(2)),
    ],
  };
})();

/**
 * rerank(list, listEnd, rows, rowBytes, query, out, limit) → kept: of the rows in `list`, those whose dot product
 * with the query, in floats, is ≥ limit go to `out`, as row number and product, 8 bytes.
 */
const rerank: WasmFunction = (() => {
  const [list, listEnd, rows, rowBytes, query, out, limit] = [0, 1, 2, 3, 4, 5, 6];
  const [at, atEnd, queryAt, outStart] = [7, 8, 9, 10];
  const sums = [11, 12, 13, 14];
  const sum = i32.load(get(list));
  return {
    name: "rerank",
    parameters: ["i32", "i32", "i32", "i32", "i32", "i32", "f32"],
    locals: ["i32", "i32", "i32", "i32", "v128", "v128", "v128", "v128"],
    result: "i32",
    body: [
      ...set(outStart, get(out)),
      ...repeat(
        [
          set(at, i32.add(get(rows), i32.mul(sum, get(rowBytes)))),
          set(atEnd, i32.add(get(at), get(rowBytes))),
          set(queryAt, get(query)),
          ...sums.map((each) => set(each, v128.zero)),
          repeat(
            [
              ...sums.map((each, index) => {
                const product = f32x4.mul(
                  v128.load(get(at), index * 16),
                  v128.load(get(queryAt), index * 16),
                );
                return set(each, f32x4.add(get(each), product));
              }),
              advance(at, i32.const(64)),
              advance(queryAt, i32.const(64)),
            ],
            i32.lessThan(get(at), get(atEnd)),
          ),
          set(11, f32x4.add(f32x4.add(get(11), get(12)), f32x4.add(get(13), get(14)))),
          i32.store(get(out), sum),
          f32.store(get(out), sumOf(get(11)), 4),
          when(f32.atLeast(sumOf(get(11)), get(limit)), [advance(out, i32.const(8))]),
          advance(list, i32.const(4)),
        ],
        i32.lessThan(get(list), get(listEnd)),
      ),
      ...i32.shiftRight(i32.sub(get(out), get(outStart)), i32.const(3)),
    ],
  };
})();

type Kernels = {
  products(vector: number, matrix: number, matrixEnd: number, out: number, rowBytes: number): void;
  accumulate(
    vector: number,
    factors: number,
    sums: number,
    sumsEnd: number,
    rowBytes: number,
  ): void;
  scan(
    groups: number,
    groupsEnd: number,
    pairBytes: number,
    query: number,
    out: number,
    queryScale: number,
    queryHalfNorm: number,
    queryRest: number,
    limit: number,
  ): number;
  rerank(
    list: number,
    listEnd: number,
    rows: number,
    rowBytes: number,
    query: number,
    out: number,
    limit: number,
  ): number;
};

let compiled: object | undefined;

/** The module's bytes, for whoever wants to look at them. */
export function kernelBytes(): Uint8Array<ArrayBuffer> {
  return moduleOf([products, accumulate, scan, rerank]);
}

/** Kernels over a fresh memory of at least `bytes`, all zero. Throws RangeError when the engine has none left. */
function kernelsOver(bytes: number): { kernels: Kernels; buffer: ArrayBuffer; bytes: number } {
  compiled ??= new WebAssembly.Module(kernelBytes());
  const pages = Math.ceil(bytes / PAGE_BYTES);
  const memory = new WebAssembly.Memory({ initial: pages, maximum: pages });
  const { exports } = new WebAssembly.Instance(compiled, { env: { memory } });
  return {
    kernels: exports as Kernels,
    buffer: memory.buffer,
    bytes: pages * PAGE_BYTES + INSTANCE_BYTES,
  };
}

// ---- a matrix ---------------------------------------------------------------------------------------------

/** Rows of floats, and their products with whatever is written into `vector`. */
export class Matrix {
  readonly rows: number;
  readonly dimension: number;
  /** Of memory, with the engine's own. */
  readonly bytes: number;
  /** Write here, then `multiply`. */
  readonly vector: Float32Array;
  /** Of `multiply`: one for each row. */
  readonly products: Float32Array;
  /** The rows, one behind the other. */
  readonly values: Float32Array;
  /** Of `accumulate`: as large as `values`, or empty. */
  readonly sums: Float32Array;
  readonly #kernels: Kernels;

  /** All zero. `rows` is a multiple of MATRIX_STEP, `dimension` of DIMENSION_STEP. Throws RangeError without memory. */
  constructor(rows: number, dimension: number, withSums: boolean) {
    assert(rows > 0 && rows % MATRIX_STEP === 0, "rows come in steps of 4");
    assert(dimension > 0 && dimension % DIMENSION_STEP === 0, "dimensions come in steps of 16");
    this.rows = rows;
    this.dimension = dimension;
    const numbers = dimension + rows + rows * dimension * (withSums ? 2 : 1);
    const { kernels, buffer, bytes } = kernelsOver(numbers * 4);
    this.#kernels = kernels;
    this.bytes = bytes;
    let offset = 0;
    const next = (length: number): Float32Array => {
      const view = new Float32Array(buffer, offset, length);
      offset += view.byteLength;
      return view;
    };
    this.vector = next(dimension);
    this.products = next(rows);
    this.values = next(rows * dimension);
    this.sums = next(withSums ? rows * dimension : 0);
  }

  /** A row, as a view. */
  row(index: number): Float32Array {
    return this.values.subarray(index * this.dimension, (index + 1) * this.dimension);
  }

  /** products[i] = dot(row i, vector), in single floats. */
  multiply(): void {
    const { vector, values, products, dimension } = this;
    const end = values.byteOffset + values.byteLength;
    const out = products.byteOffset;
    this.#kernels.products(vector.byteOffset, values.byteOffset, end, out, dimension * 4);
  }

  /** sums[i] += products[i] · vector. Needs `withSums`. */
  accumulate(): void {
    const { vector, products, sums, dimension } = this;
    assert(sums.length > 0, "the matrix was made without sums");
    const end = sums.byteOffset + sums.byteLength;
    const factors = products.byteOffset;
    this.#kernels.accumulate(vector.byteOffset, factors, sums.byteOffset, end, dimension * 4);
  }
}

// ---- the rows of an index ---------------------------------------------------------------------------------

/** A query in the form that blocks scan for: its projection in whole numbers, and what bounds its error. */
export type PackedQuery = {
  /** Of norm 1. */
  vector: Float32Array;
  /** Two dimensions of the projection in each, 16 bits. */
  pairs: Int32Array;
  /** What one whole number stands for. */
  scale: number;
  /** Half the sum of the projection's absolute values: what a row's rounding may add, per unit of its scale. */
  halfNorm: number;
  /** Upper bound of the norm of what the projection leaves out. */
  rest: number;
};

/** Rows in one block. Projecting all of them anew takes 2 to 4 ms. */
export const BLOCK_ROWS = 512;
/**
 * Added to squared rests, and taken from limits: more than single floats can be off in any of the sums here (384
 * terms of at most 1, and a basis that is orthonormal to 1e-6). What rounding to int8 may be off is bounded exactly.
 */
const FLOAT_SLACK = 1e-5;
/** A place without a row: times any query's rest (≥ 0.003) far under every limit. */
const NO_REST = -1e30;

/** Upper bound of the norm of what a projection leaves out of a vector of norm 1. */
function restOf(projection: Float32Array): number {
  let squares = 0;
  for (const value of projection) squares += value * value;
  return Math.sqrt(Math.max(0, 1 - squares) + FLOAT_SLACK);
}

function largestOf(values: Float32Array): number {
  let largest = 0;
  for (const value of values) largest = Math.max(largest, Math.abs(value));
  return largest;
}

/** Packs a query of norm 1 with its projection onto a basis; both are copied. */
export function packQuery(vector: Float32Array, projection: Float32Array): PackedQuery {
  const scale = largestOf(projection) / 127;
  const pairs = new Int32Array(projection.length / 2);
  const halves = new Int16Array(pairs.buffer);
  let halfNorm = 0;
  for (const [index, value] of projection.entries()) {
    halves[index] = scale === 0 ? 0 : Math.round(value / scale);
    halfNorm += Math.abs(value) / 2;
  }
  return { vector: vector.slice(), pairs, scale, halfNorm, rest: restOf(projection) };
}

/** Up to BLOCK_ROWS vectors of norm 1, each with its projection onto a basis as int8. */
export class RowBlock {
  readonly bytes: number;
  /** Of the last `search`: pairs of row number (read as a whole number) and similarity (as a float). */
  readonly foundRows: Int32Array;
  readonly foundSimilarities: Float32Array;
  readonly #dimension: number;
  readonly #kernels: Kernels;
  readonly #pairs: Int32Array;
  readonly #query: Float32Array;
  readonly #list: Int32Array;
  readonly #groups: Float32Array;
  readonly #groupBytes: Int8Array;
  readonly #vectors: Float32Array;
  /** Dimensions of the basis, a multiple of 8. */
  #basisRows: number;
  /** Running maximum of the sum of absolute values of an encoded projection; 0 again when reset. */
  #normMax = 0;

  /**
   * For a basis of at most `basisRowsMax` rows (a multiple of 8). Throws RangeError when the engine has no memory.
   */
  constructor(dimension: number, basisRowsMax: number) {
    assert(dimension % DIMENSION_STEP === 0, "dimensions come in steps of 16");
    assert(basisRowsMax % 8 === 0, "a basis has rows in steps of 8");
    this.#dimension = dimension;
    this.#basisRows = basisRowsMax;
    const floatsOfGroups = (BLOCK_ROWS / GROUP_ROWS) * (basisRowsMax * 2 + 16);
    const foundPlaces = (BLOCK_ROWS + 1) * 2; // The kernel writes before it decides.
    const numbers =
      basisRowsMax / 2 +
      dimension +
      BLOCK_ROWS +
      foundPlaces +
      floatsOfGroups +
      BLOCK_ROWS * dimension;
    const { kernels, buffer, bytes } = kernelsOver(numbers * 4);
    this.#kernels = kernels;
    this.bytes = bytes;
    let offset = 0;
    const take = (length: number): number => {
      const start = offset;
      offset += length * 4;
      return start;
    };
    this.#pairs = new Int32Array(buffer, take(basisRowsMax / 2), basisRowsMax / 2);
    this.#query = new Float32Array(buffer, take(dimension), dimension);
    this.#list = new Int32Array(buffer, take(BLOCK_ROWS), BLOCK_ROWS);
    this.foundRows = new Int32Array(buffer, take(foundPlaces), foundPlaces);
    this.foundSimilarities = new Float32Array(buffer, this.foundRows.byteOffset, foundPlaces);
    this.#groups = new Float32Array(buffer, take(floatsOfGroups), floatsOfGroups);
    this.#groupBytes = new Int8Array(buffer, this.#groups.byteOffset, floatsOfGroups * 4);
    this.#vectors = new Float32Array(buffer, take(BLOCK_ROWS * dimension), BLOCK_ROWS * dimension);
    this.reset(basisRowsMax);
  }

  /** Forgets all projections, for a basis with so many rows; vectors stay, but are found only once encoded. */
  reset(basisRows: number): void {
    this.#basisRows = basisRows;
    this.#normMax = 0;
    for (let row = 0; row < BLOCK_ROWS; row++) this.clear(row);
  }

  /** The vector of a row, as a view. */
  vector(row: number): Float32Array {
    return this.#vectors.subarray(row * this.#dimension, (row + 1) * this.#dimension);
  }

  /** `projection` of the vector that the row has now, onto the basis of this block. */
  encode(row: number, projection: Float32Array): void {
    const rows = this.#basisRows;
    assert(projection.length === rows, "the projection is onto the block's basis");
    const scale = largestOf(projection) / 127;
    const bytes = this.#groupBytes;
    const lane = (row % GROUP_ROWS) * 2;
    let at = this.#groupAt(row) * 4 + lane;
    let norm = 0;
    for (let index = 0; index < rows; index += 2) {
      const even = scale === 0 ? 0 : Math.round((projection[index] ?? 0) / scale);
      const odd = scale === 0 ? 0 : Math.round((projection[index + 1] ?? 0) / scale);
      bytes[at] = even;
      bytes[at + 1] = odd;
      norm += Math.abs(even) + Math.abs(odd);
      at += GROUP_ROWS * 2;
    }
    this.#normMax = Math.max(this.#normMax, norm * scale);
    this.#setBounds(row, scale, restOf(projection));
  }

  /** The row is found no more. */
  clear(row: number): void {
    this.#setBounds(row, 0, NO_REST);
  }

  /**
   * Rows before `rowsEnd` that may have a similarity ≥ `limit` are counted as `survivors`; those that have it, in
   * single floats, are the first `found` in `foundRows` and `foundSimilarities`. Complete, whatever the basis.
   */
  search(query: PackedQuery, rowsEnd: number, limit: number): { survivors: number; found: number } {
    this.#pairs.set(query.pairs);
    const groups = this.#groups.byteOffset;
    const groupBytes = this.#basisRows * GROUP_ROWS + GROUP_ROWS * 8;
    const list = this.#list.byteOffset;
    const survivors = this.#kernels.scan(
      groups,
      groups + Math.ceil(rowsEnd / GROUP_ROWS) * groupBytes,
      this.#basisRows * GROUP_ROWS,
      this.#pairs.byteOffset,
      list,
      query.scale,
      query.halfNorm,
      query.rest,
      limit - (query.scale / 2) * this.#normMax - FLOAT_SLACK,
    );
    if (survivors === 0) return { survivors, found: 0 };
    this.#query.set(query.vector);
    const found = this.#kernels.rerank(
      list,
      list + survivors * 4,
      this.#vectors.byteOffset,
      this.#dimension * 4,
      this.#query.byteOffset,
      this.foundRows.byteOffset,
      limit,
    );
    return { survivors, found };
  }

  /** Where the row's group begins in `#groups`. */
  #groupAt(row: number): number {
    return Math.floor(row / GROUP_ROWS) * (this.#basisRows * 2 + GROUP_ROWS * 2);
  }

  #setBounds(row: number, scale: number, rest: number): void {
    const at = this.#groupAt(row) + this.#basisRows * 2 + (row % GROUP_ROWS);
    this.#groups[at] = scale;
    this.#groups[at + GROUP_ROWS] = rest;
  }
}
