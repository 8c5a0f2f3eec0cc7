import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { Random } from "../runtime/random.ts";
import { ApproximateIndex, loadUsearch, type Usearch } from "../transport/approximate-index.ts";
import { bruteForce, clusteredVectors, cosine, near, randomVector } from "./vector-oracle.ts";

const usearch = loadUsearch();
if (usearch === undefined) {
  console.log("skipped: the optional package usearch is not installed, or has no binary here");
}

const FROM = 200;

function indexWith(module: Usearch, dimension = 64): ApproximateIndex {
  const random = new Random(1);
  return new ApproximateIndex({
    usearch: module,
    dimension,
    random: () => random.next(),
    from: FROM,
  });
}

function settle(index: ApproximateIndex): void {
  while (index.maintain());
}

/** usearch without a graph behind it: refuses from the `failsAt`-th call on. */
function failing(failsAt: number): Usearch {
  let calls = 0;
  const call = () => {
    if (++calls >= failsAt) throw new Error("out of memory");
  };
  return {
    Index: class {
      constructor() {
        call();
      }
      add(): void {
        call();
      }
      search(): { keys: BigUint64Array } {
        call();
        return { keys: new BigUint64Array(0) };
      }
      remove(): void {
        call();
      }
      contains(): boolean {
        return false;
      }
    },
  };
}

describe("the approximate index, whatever usearch does", () => {
  it("stays exact up to its bound", () => {
    const random = new Random(2);
    const index = indexWith(failing(1));
    const map = new Map<number, Float32Array>();
    for (let id = 0; id < FROM; id++) {
      const vector = randomVector(random, 64);
      map.set(id, vector);
      expect(index.insert(id, vector)).toBeUndefined();
    }
    settle(index);
    expect(index.state).toEqual({ kind: "exact" });
    const query = randomVector(random, 64);
    expect(index.search(query, 0, 5).map(({ id }) => id)).toEqual(
      bruteForce(map, query)
        .filter(({ similarity }) => similarity >= 0)
        .slice(0, 5)
        .map(({ id }) => id),
    );
  });

  it("is exact again, for good, once usearch has failed anywhere", () => {
    for (const failsAt of [1, 2, 100, FROM + 2, FROM + 3, FROM + 4]) {
      const random = new Random(failsAt);
      const index = indexWith(failing(failsAt));
      for (let id = 0; id <= FROM; id++) index.insert(id, randomVector(random, 64));
      settle(index);
      const extra = randomVector(random, 64);
      const [first] = index.search(index.vectorOf(7) ?? extra, 0.99, 3);
      // Also the search in which it fails.
      if (index.state.kind === "failed") expect(first).toEqual({ id: 7, similarity: 1 });
      expect(index.insert(1000, extra)).toBeUndefined();
      index.remove(3);
      settle(index);
      expect(index.state).toEqual({ kind: "failed", reason: "out of memory" });
      expect(index.search(extra, 0.99, 3)).toEqual([{ id: 1000, similarity: 1 }]);
      expect(index.size).toBe(FROM + 1);
    }
  });
});

describe.skipIf(usearch === undefined)("the approximate index, with usearch", () => {
  const module = usearch as Usearch;

  it("finds nearly all that an exact search finds, with exact similarities, best first", () => {
    const random = new Random(3);
    const vectors = clusteredVectors(random, 1500, 64, 60);
    const index = indexWith(module);
    const map = new Map(vectors.entries());
    for (const [id, vector] of map) index.insert(id, vector);
    settle(index);
    expect(index.state).toEqual({ kind: "approximate" });
    let [hits, found] = [0, 0];
    for (let draw = 0; draw < 300; draw++) {
      const query = near(random, vectors[random.int(1500)] as Float32Array, 0.94);
      const best = index.search(query, 0.9, 3);
      for (const [place, { id, similarity }] of best.entries()) {
        expect(similarity).toBeGreaterThanOrEqual(0.9);
        expect(similarity).toBeCloseTo(cosine(map.get(id) as Float32Array, query), 5);
        expect(similarity).toBeLessThanOrEqual(best[place - 1]?.similarity ?? 1);
      }
      const [wanted] = bruteForce(map, query);
      if (wanted === undefined || wanted.similarity < 0.901) continue;
      hits++;
      if (best.length > 0) found++;
    }
    expect(hits).toBeGreaterThan(100);
    expect(found / hits).toBeGreaterThan(0.97);
  });

  it("reads a query or a vector right wherever in a buffer it lies", () => {
    const random = new Random(4);
    const index = indexWith(module);
    const buffer = new Float32Array(64 * 302);
    for (let id = 0; id <= 300; id++) {
      const view = buffer.subarray(id * 64, id * 64 + 64);
      view.set(randomVector(random, 64));
      index.insert(id, view);
    }
    settle(index);
    expect(index.state).toEqual({ kind: "approximate" });
    for (let id = 0; id <= 300; id++) {
      const view = buffer.subarray(id * 64, id * 64 + 64);
      expect(index.search(view, 0.99, 1)).toEqual([{ id, similarity: 1 }]);
    }
  });

  it("agrees with a map on what is in it, through insertion, removal and building, in any order", () => {
    const id = fc.integer({ min: 0, max: 500 });
    const operation = fc.record({
      op: fc.constantFrom(
        "insert" as const,
        "insert" as const,
        "remove" as const,
        "maintain" as const,
      ),
      from: id,
      many: id,
    });
    fc.assert(
      fc.property(fc.array(operation, { maxLength: 14 }), fc.nat(), (operations, seed) => {
        const random = new Random(seed);
        const index = indexWith(module, 16);
        const map = new Map<number, Float32Array>();
        for (const { op, from, many } of operations) {
          for (let id = from; id < from + many; id++) {
            if (op === "maintain") index.maintain();
            else if (op === "remove") expect(index.remove(id)).toBe(map.delete(id));
            else {
              const vector = randomVector(random, 16);
              const refusal = index.insert(id, vector);
              expect(refusal === undefined).toBe(!map.has(id));
              if (refusal === undefined) map.set(id, vector);
            }
          }
          expect(index.size).toBe(map.size);
          for (const { id, similarity } of index.search(randomVector(random, 16), 0.3, 8)) {
            expect(map.has(id)).toBe(true);
            expect(similarity).toBeGreaterThanOrEqual(0.3);
          }
        }
        settle(index);
        if (map.size > FROM) expect(index.state.kind).toBe("approximate");
        let found = 0;
        for (const [id, vector] of map) {
          if (index.search(vector, 0.999, 1)[0]?.id === id) found++;
        }
        expect(found).toBeGreaterThanOrEqual(map.size * 0.97);
      }),
      { numRuns: 30 },
    );
  });

  it("goes back to exact when the shard shrinks, and is built anew when half of it has gone", () => {
    const random = new Random(5);
    const index = indexWith(module);
    for (let id = 0; id < 1000; id++) index.insert(id, randomVector(random, 64));
    settle(index);
    const withGraph = index.bytes;
    for (let id = 0; id < 340; id++) index.remove(id);
    expect(index.maintain()).toBe(true);
    expect(index.state.kind).toBe("building");
    settle(index);
    expect(index.state.kind).toBe("approximate");
    for (let id = 340; id < 860; id++) index.remove(id);
    settle(index);
    expect(index.state).toEqual({ kind: "exact" });
    expect(index.bytes).toBeLessThan(withGraph / 2);
  });

  it("refuses and finds nothing for what has no direction, as the exact index does", () => {
    const random = new Random(6);
    const index = indexWith(module);
    for (let id = 0; id < 300; id++) index.insert(id, randomVector(random, 64));
    settle(index);
    for (const bad of [
      new Float32Array(64),
      new Float32Array(63).fill(1),
      new Float32Array(64).fill(Number.NaN),
    ]) {
      expect(index.insert(999, bad)).toBeDefined();
      expect(index.search(bad, -1, 3)).toEqual([]);
    }
    expect(index.state.kind).toBe("approximate");
  });
});
