import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import { randomBasis } from "../actors/principal-basis.ts";
import { ExactIndex } from "../actors/vector-index.ts";
import { BLOCK_ROWS } from "../actors/vector-kernels.ts";
import { Random } from "../runtime/random.ts";
import { generatedQuestions, hasRealQuestions, realQuestions } from "./question-texts.ts";
import { bruteForce, clusteredVectors, cosine, near, randomVector } from "./vector-oracle.ts";

/** Single floats and six decimals: nearer to the threshold than this, an index may go either way. */
const EDGE = 2e-6;

function indexOf(dimension: number, seed: number | string = 1, entriesMax?: number): ExactIndex {
  const random = new Random(seed);
  return new ExactIndex({
    dimension,
    random: () => random.next(),
    ...(entriesMax === undefined ? {} : { entriesMax }),
  });
}

/** Runs background work to its end; how many slices it took. */
function train(index: ExactIndex): number {
  let slices = 1;
  while (index.maintain()) slices++;
  return slices;
}

/** A search found what brute force finds: everything from the threshold on, or the best `count` of that. */
function expectComplete(
  index: ExactIndex,
  vectors: ReadonlyMap<number, Float32Array>,
  query: Float32Array,
  threshold: number,
  count: number,
): void {
  const found = index.search(query, threshold, count);
  const all = bruteForce(vectors, query);
  const must = all.filter(({ similarity }) => similarity >= threshold + EDGE);
  const may = all.filter(({ similarity }) => similarity >= threshold - EDGE);
  expect(found.length).toBeGreaterThanOrEqual(Math.min(count, must.length));
  expect(found.length).toBeLessThanOrEqual(Math.min(count, may.length));
  for (const [place, { id, similarity }] of found.entries()) {
    const vector = vectors.get(id);
    expect(vector, `id ${id} was put in`).toBeDefined();
    expect(similarity).toBeGreaterThanOrEqual(threshold);
    expect(Math.abs(similarity - cosine(vector ?? query, query))).toBeLessThan(EDGE);
    // The similarity at each place is that of brute force; ids of equal similarity may change places.
    expect(Math.abs(similarity - (all[place]?.similarity ?? 0))).toBeLessThan(EDGE);
  }
  expect(new Set(found.map(({ id }) => id)).size).toBe(found.length);
}

function filled(vectors: readonly Float32Array[], seed?: number): ExactIndex {
  const index = indexOf(vectors[0]?.length ?? 1, seed);
  for (const [id, vector] of vectors.entries()) expect(index.insert(id, vector)).toBeUndefined();
  return index;
}

const dimension = fc.constantFrom(3, 16, 20, 64, 112, 384);
const threshold = fc.constantFrom(-1, 0, 0.3, 0.7, 0.9, 0.92, 0.99, 1);
const count = fc.integer({ min: 1, max: 8 });
const seed = fc.integer({ min: 0, max: 1_000_000 });

describe("the exact index", () => {
  it("finds what brute force finds, for every set, dimension, threshold and count", () => {
    fc.assert(
      fc.property(
        fc.record({
          dimension,
          size: fc.constantFrom(0, 1, 7, 256, 257, 600),
          clusters: fc.constantFrom(1, 3, 50),
          threshold,
          count,
          seed,
        }),
        ({ dimension, size, clusters, threshold, count, seed }) => {
          const random = new Random(seed);
          const vectors = clusteredVectors(random, size, dimension, clusters);
          const index = size === 0 ? indexOf(dimension) : filled(vectors, seed);
          const map = new Map(vectors.entries());
          const stored = vectors[random.int(Math.max(1, size))] ?? randomVector(random, dimension);
          for (const query of [stored, near(random, stored, 0.95), randomVector(random, dimension)])
            expectComplete(index, map, query, threshold, count);
        },
      ),
      { numRuns: 60 },
    );
  });

  it("loses nothing to rounding: finds a vector at a threshold right under its own cosine", () => {
    // At 64 dimensions the basis leaves nothing out, and the bound is as tight as int8 allows.
    for (const dimension of [64, 96, 384]) {
      const random = new Random(`tight ${dimension}`);
      const vectors = clusteredVectors(random, 700, dimension, 30);
      const index = filled(vectors);
      for (let draw = 0; draw < 1500; draw++) {
        const vector = vectors[random.int(vectors.length)] as Float32Array;
        const query = draw % 2 === 0 ? near(random, vector, 0.97) : randomVector(random, dimension);
        const similarity = cosine(vector, query);
        const found = index.search(query, similarity - EDGE, vectors.length);
        expect(found.some((each) => Math.abs(each.similarity - similarity) < EDGE)).toBe(true);
      }
    }
  });

  it("loses nothing even where every rounding falls the wrong way", () => {
    // In the index's own basis: a spike sets the scale, and all else is just under half a step, and rounded off.
    const dimension = 16;
    const basisRandom = new Random("adverse");
    const basis = randomBasis(dimension, dimension, () => basisRandom.next());
    const inBasis = (projection: (at: number) => number): Float32Array =>
      Float32Array.from({ length: dimension }, (_, column) => {
        let sum = 0;
        for (let row = 0; row < dimension; row++)
          sum += projection(row) * (basis.row(row)[column] ?? 0);
        return sum;
      });
    const spike = inBasis((at) => (at === 3 ? 1 : 0.49 / 127));
    const flat = inBasis(() => 1);
    for (const [stored, query] of [
      [spike, flat],
      [flat, spike],
    ] as const) {
      const index = indexOf(dimension, "adverse");
      index.insert(-1, stored);
      const random = new Random(1);
      for (let id = 0; id < 300; id++) index.insert(id, randomVector(random, dimension));
      expect(index.basis.rows).toBe(dimension);
      const found = index.search(query, cosine(stored, query) - EDGE, 300);
      expect(found.map(({ id }) => id)).toContain(-1);
    }
  });

  it("is complete with a random basis, while a new one is taken over, and with the trained one", () => {
    const random = new Random("stages");
    const vectors = clusteredVectors(random, 2600, 160, 40);
    const map = new Map(vectors.entries());
    const index = filled(vectors);
    expect(index.basis).toEqual({ rows: 96, trained: false });
    let slices = 0;
    let mixed = 0;
    for (let more = true; more; slices++) {
      more = index.maintain();
      if (slices % 7 !== 0 && !index.basis.trained) continue;
      mixed += index.basis.trained ? 1 : 0;
      const query = near(random, vectors[random.int(vectors.length)] as Float32Array, 0.93);
      expectComplete(index, map, query, 0.9, 5);
      expectComplete(index, map, randomVector(random, 160), 0, 3);
    }
    expect(index.basis).toEqual({ rows: 64, trained: true });
    expect(mixed).toBeGreaterThan(3); // Blocks of both bases were searched together.
    expect(index.pruning.survivors).toBeLessThan(index.pruning.scanned);
  });

  it("agrees with a map through any sequence of inserting, removing, searching and training", () => {
    const id = fc.integer({ min: 0, max: 900 });
    const operation = fc.oneof(
      {
        weight: 3,
        arbitrary: fc.record({ op: fc.constant("insert" as const), from: id, many: id }),
      },
      {
        weight: 3,
        arbitrary: fc.record({ op: fc.constant("remove" as const), from: id, many: id }),
      },
      { weight: 2, arbitrary: fc.record({ op: fc.constant("search" as const), threshold, count }) },
      { weight: 1, arbitrary: fc.record({ op: fc.constant("maintain" as const), many: id }) },
    );
    fc.assert(
      fc.property(fc.array(operation, { maxLength: 25 }), seed, (operations, seed) => {
        const random = new Random(seed);
        const index = indexOf(32, seed);
        const map = new Map<number, Float32Array>();
        for (const step of operations) {
          if (step.op === "insert") {
            for (let id = step.from; id < step.from + step.many; id++) {
              const vector = randomVector(random, 32);
              const refusal = index.insert(id, vector);
              expect(refusal === undefined).toBe(!map.has(id));
              if (refusal === undefined) map.set(id, vector);
            }
          } else if (step.op === "remove") {
            for (let id = step.from; id < step.from + step.many; id++)
              expect(index.remove(id)).toBe(map.delete(id));
          } else if (step.op === "search") {
            const [first] = map.values();
            const query = first === undefined ? randomVector(random, 32) : near(random, first, 0.9);
            expectComplete(index, map, query, step.threshold, step.count);
          } else {
            for (let slice = 0; slice < step.many; slice++) index.maintain();
          }
          expect(index.size).toBe(map.size);
        }
        for (const [id, vector] of map) {
          const kept = index.vectorOf(id);
          expect(kept?.length).toBe(32);
          expect(cosine(kept ?? vector.map(() => 1), vector)).toBeCloseTo(1, 5);
        }
      }),
      { numRuns: 40 },
    );
  });

  it("keeps ids with their vectors when the last row moves into a gap, across blocks and bases", () => {
    const random = new Random("swap");
    const vectors = clusteredVectors(random, 2300, 112, 100);
    const index = filled(vectors);
    while (!index.basis.trained) index.maintain();
    const left = new Map(vectors.entries());
    // Now the blocks have two bases between them, and every removal moves a row between them.
    for (let id = 0; id < 900; id++) {
      expect(index.remove(id)).toBe(true);
      expect(index.remove(id)).toBe(false);
      left.delete(id);
      if (id % 100 === 0) index.maintain();
    }
    for (const [id, vector] of left) {
      expect(index.search(vector, 0.999, 1)).toEqual([{ id, similarity: 1 }]);
    }
    for (let id = 0; id < 900; id++)
      expect(index.search(vectors[id] as Float32Array, 0.9999, 1)).toEqual([]);
  });

  it("refuses what has no direction, with the reason, and finds nothing for it", () => {
    const index = indexOf(20);
    expect(index.insert(1, new Float32Array(20).fill(0.5))).toBeUndefined();
    const bad: [Float32Array, RegExp][] = [
      [new Float32Array(20), /zero/],
      [new Float32Array(19).fill(1), /19 dimensions, not 20/],
      [new Float32Array(32).fill(1), /32 dimensions, not 20/],
      [new Float32Array(0), /0 dimensions/],
      [new Float32Array(20).fill(1, 0, 19).fill(Number.NaN, 19), /not finite/],
      [new Float32Array(20).fill(Number.POSITIVE_INFINITY), /not finite/],
    ];
    for (const [vector, reason] of bad) {
      expect(index.insert(2, vector)).toMatch(reason);
      expect(index.search(vector, -1, 3)).toEqual([]);
    }
    expect(index.insert(1, new Float32Array(20).fill(1))).toMatch(/id 1 is in the index already/);
    expect(index.size).toBe(1);
    expect(index.vectorOf(2)).toBeUndefined();
    expect(index.insert(2, new Float32Array(20).fill(1e-44))).toBeUndefined(); // Tiny, but a direction.
    expect(index.insert(3, new Float32Array(20).fill(-3e38))).toBeUndefined();
    expect(index.search(new Float32Array(20).fill(7), 0.99, 8)).toEqual([
      { id: 1, similarity: 1 },
      { id: 2, similarity: 1 },
    ]);
  });

  it("refuses more vectors than it may hold, and takes one again when one has gone", () => {
    const index = indexOf(16, 1, 3);
    const random = new Random(1);
    for (let id = 0; id < 3; id++)
      expect(index.insert(id, randomVector(random, 16))).toBeUndefined();
    expect(index.insert(3, randomVector(random, 16))).toMatch(/full: 3/);
    index.remove(0);
    expect(index.insert(3, randomVector(random, 16))).toBeUndefined();
  });

  it("takes constant vectors, of which all are equally near, without losing the lowest ids", () => {
    const index = indexOf(64);
    const one = randomVector(new Random(2), 64);
    for (let id = 0; id < 3000; id++) index.insert(id, one);
    train(index);
    expect(index.search(one, 0.9, 3)).toEqual([0, 1, 2].map((id) => ({ id, similarity: 1 })));
    expect(index.search(one, 1, 3).length).toBe(3);
  });

  it("stays within its memory per vector, growing and shrinking, and is small while it holds few", () => {
    const dimension = 384;
    const perVector = dimension * 4 + 96 + 8 + 60;
    const block = BLOCK_ROWS * perVector + 2 * 65_536;
    const bases = 3 * 2 * 96 * dimension * 4;
    const random = new Random("memory");
    const vectors = clusteredVectors(random, 3000, dimension, 20);
    const index = indexOf(dimension);
    const check = () => {
      expect(index.bytes).toBeLessThanOrEqual(index.size * perVector + 2 * block + bases);
      if (index.size < 128)
        expect(index.bytes).toBeLessThan(5000 + 4 * index.size * perVector + 32_000);
    };
    for (let round = 0; round < 2; round++) {
      for (const [id, vector] of vectors.entries()) {
        index.insert(id, vector);
        if (id % 50 === 0) check();
        if (id % 500 === 0) index.maintain();
      }
      train(index);
      check();
      expect(index.bytes).toBeGreaterThan(index.size * dimension * 4);
      for (const id of vectors.keys()) {
        index.remove(id);
        if (id % 50 === 0) check();
      }
      expect(index.size).toBe(0);
      expect(index.bytes).toBeLessThan(8192);
      expect(index.basis).toEqual({ rows: 0, trained: false });
    }
  });

  it("widens the basis when the narrow one prunes badly, and only then", () => {
    const random = new Random("hard");
    // Vectors around one centre: whatever 64 of 384 directions leave out is much the same in all of them.
    const crowd = clusteredVectors(random, 2500, 384, 2);
    const searchAll = (index: ExactIndex, vectors: readonly Float32Array[], threshold: number) => {
      for (let query = 0; query < 200; query++)
        index.search(vectors[query] as Float32Array, threshold, 8);
    };
    const hard = filled(crowd);
    train(hard);
    expect(hard.basis).toEqual({ rows: 64, trained: true });
    searchAll(hard, crowd, 0.96);
    train(hard);
    expect(hard.basis.rows).toBe(96);
    const easy = clusteredVectors(random, 2500, 384, 400);
    const index = filled(easy);
    train(index);
    searchAll(index, easy, 0.92);
    train(index);
    expect(index.basis).toEqual({ rows: 64, trained: true });
  });

  it("is trained again when four times as many have come", () => {
    const random = new Random("again");
    const index = indexOf(112);
    const add = (from: number, to: number) => {
      for (let id = from; id < to; id++) index.insert(id, randomVector(random, 112));
    };
    add(0, 2048);
    expect(train(index)).toBeGreaterThan(1);
    add(2048, 8191);
    expect(train(index)).toBe(1);
    add(8191, 8192);
    expect(train(index)).toBeGreaterThan(1);
    expect(train(index)).toBe(1);
  });

  it("prunes real question text to a handful of rows, and finds every hit", () => {
    const questions = hasRealQuestions ? realQuestions() : generatedQuestions(6000);
    if (!hasRealQuestions) console.log("no paraphrase data beside the repository: generated text");
    const embedder = new LexicalEmbedder();
    const pairs = questions.pairs.filter((_, index) => index % 12 === 0).slice(0, 2600);
    const map = new Map(pairs.map(({ a }, id) => [id, embedder.embed(a)] as const));
    const index = indexOf(embedder.dimension);
    for (const [id, vector] of map) if (index.insert(id, vector) !== undefined) map.delete(id);
    train(index);
    const before = index.pruning;
    for (const { b } of pairs.slice(0, 80)) {
      const query = embedder.embed(b);
      if (query.every((value) => value === 0)) continue;
      expectComplete(index, map, query, 0.92, 8);
    }
    const { survivors, scanned } = index.pruning;
    const share = (survivors - before.survivors) / (scanned - before.scanned);
    expect(share).toBeLessThan(hasRealQuestions ? 0.01 : 0.05); // Made-up text is more alike.
  });
});
