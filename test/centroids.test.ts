import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  type Centroids,
  CentroidTraining,
  PROBING_Z,
  restoreCentroids,
} from "../actors/centroids.ts";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import { rendezvousHash } from "../actors/node-score.ts";
import { ExactIndex } from "../actors/vector-index.ts";
import { Random } from "../runtime/random.ts";
import { generatedQuestions, hasRealQuestions, realQuestions } from "./question-texts.ts";
import { clusteredVectors, cosine, near, randomVector } from "./vector-oracle.ts";

function unit(vector: Float32Array): Float32Array {
  const norm = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  return vector.map((value) => value / norm);
}

function trainedOn(vectors: readonly Float32Array[], count: number, seed: number): Centroids {
  const random = new Random(seed);
  const training = new CentroidTraining({ vectors, count, random: () => random.next() });
  while (training.centroids === undefined) training.step();
  return training.centroids;
}

/** The owner of a bucket among so many, by rendezvous. */
function ownerAmong(owners: number, salt = 0): (bucket: number) => number {
  return (bucket) => {
    let best = 0;
    for (let owner = 1; owner < owners; owner++) {
      const key = Math.imul(bucket + 256 * salt, 0x9e3779b1);
      if (rendezvousHash(key, owner * 7919 + 1) > rendezvousHash(key, best * 7919 + 1))
        best = owner;
    }
    return best;
  };
}

function clustered(seed: number, count: number, dimension: number): Float32Array[] {
  return clusteredVectors(new Random(seed), count, dimension, 30).map(unit);
}

describe("centroids", () => {
  const vectors = clustered(1, 1500, 40);
  const centroids = trainedOn(vectors, 32, 1);

  it("are the same for the same seed and vectors, and tell by their version when they are not", () => {
    expect(trainedOn(vectors, 32, 1).version).toBe(centroids.version);
    expect(trainedOn(vectors, 32, 1).toFloats()).toEqual(centroids.toFloats());
    expect(trainedOn(vectors, 32, 2).version).not.toBe(centroids.version);
    expect(trainedOn(vectors.slice(1), 32, 1).version).not.toBe(centroids.version);
    expect(centroids.version).toMatch(/^k32-d40-[0-9a-f]{16}$/);
  });

  it("come back from their numbers to the bit, and what is no centroids is refused with the reason", () => {
    const floats = centroids.toFloats();
    const restored = restoreCentroids(floats, 40);
    if (typeof restored === "string") throw new Error(restored);
    expect(restored.version).toBe(centroids.version);
    for (const vector of vectors)
      expect(restored.bucketOf(vector)).toBe(centroids.bucketOf(vector));
    expect(restoreCentroids(floats.subarray(1), 40)).toMatch(/not a multiple/);
    expect(restoreCentroids(new Float32Array(0), 40)).toMatch(/not a multiple/);
    expect(restoreCentroids(floats.slice().fill(0, 40, 80), 40)).toMatch(/centroid 1: .*zero/);
    expect(restoreCentroids(floats.slice().fill(Number.NaN, 0, 1), 40)).toMatch(/not finite/);
    // The last bit of one number, and the signs of two: what a careless hash does not see.
    for (const flips of [
      [1, 1],
      [777, 1],
      [5, -2147483648, 9, -2147483648],
    ]) {
      const changed = floats.slice();
      const words = new Int32Array(changed.buffer);
      for (let at = 0; at < flips.length; at += 2) {
        const place = flips[at] ?? 0;
        words[place] = (words[place] ?? 0) ^ (flips[at + 1] ?? 0);
      }
      const other = restoreCentroids(changed, 40);
      expect(typeof other === "string" ? other : other.version).not.toBe(centroids.version);
    }
  });

  it("put a vector where the best of them is, and every centroid in its own cell", () => {
    const floats = centroids.toFloats();
    const rows = Array.from({ length: 32 }, (_, cell) => floats.slice(cell * 40, cell * 40 + 40));
    for (const vector of vectors.slice(0, 300)) {
      const scores = rows.map((row) => cosine(row, vector));
      const bucket = centroids.bucketOf(vector) ?? -1;
      expect(scores[bucket]).toBeCloseTo(Math.max(...scores), 6);
    }
    for (const [cell, row] of rows.entries()) expect(centroids.bucketOf(row)).toBe(cell);
  });

  it("describe the vectors better than the random ones they begin as, and no cell stays empty", () => {
    const meanBest = (floats: Float32Array): number => {
      const rows = Array.from({ length: 32 }, (_, cell) => floats.slice(cell * 40, cell * 40 + 40));
      const best = vectors.map((vector) => Math.max(...rows.map((row) => cosine(row, vector))));
      return best.reduce((sum, value) => sum + value, 0) / best.length;
    };
    const drawn = new Float32Array(32 * 40);
    for (const [cell, vector] of vectors.slice(0, 32).entries()) drawn.set(vector, cell * 40);
    expect(meanBest(centroids.toFloats())).toBeGreaterThan(meanBest(drawn) + 0.05);
    const used = new Set(vectors.map((vector) => centroids.bucketOf(vector)));
    expect(used.size).toBeGreaterThan(28);
  });

  it("begin as different vectors, and take up vectors that no seed came near", () => {
    const random = new Random(9);
    const few = Array.from({ length: 16 }, () => unit(randomVector(random, 64)));
    const each = trainedOn(few, 16, 1);
    expect(new Set(few.map((vector) => each.bucketOf(vector))).size).toBe(16);
    // 60 vectors, 20 times each: of 60 seeds only some 38 are different.
    const distinct = Array.from({ length: 60 }, () => unit(randomVector(random, 64)));
    const many = Array.from({ length: 1200 }, (_, at) => distinct[at % 60] as Float32Array);
    const cells = trainedOn(many, 60, 1);
    expect(new Set(distinct.map((vector) => cells.bucketOf(vector))).size).toBeGreaterThan(48);
  });

  it("exist even for vectors that are all the same", () => {
    const one = unit(randomVector(new Random(1), 40));
    const same = trainedOn(
      Array.from({ length: 50 }, () => one),
      8,
      1,
    );
    expect(same.bucketOf(one)).toBe(0);
    expect(same.probed(one, 0.9, 6)).toContain(0);
  });

  it("have no bucket for what has no direction", () => {
    for (const bad of [
      new Float32Array(40),
      new Float32Array(39).fill(1),
      randomVector(new Random(1), 40).fill(Number.NaN, 3, 4),
    ]) {
      expect(centroids.bucketOf(bad)).toBeUndefined();
      expect(centroids.probed(bad, 0.9, 6)).toEqual([]);
      expect(centroids.owners(bad, 0.9, 6, (bucket) => bucket)).toEqual([]);
    }
  });
});

describe("probing", () => {
  const dimension = 40;
  const vectors = clustered(2, 1500, dimension);
  const centroids = trainedOn(vectors, 32, 2);
  const floats = centroids.toFloats();
  const rows = Array.from({ length: 32 }, (_, cell) =>
    floats.slice(cell * dimension, (cell + 1) * dimension),
  );
  const query = fc.record({
    vector: fc.integer({ min: 0, max: 1499 }).map((at) => vectors[at] as Float32Array),
    threshold: fc.constantFrom(0.8, 0.9, 0.92, 0.99),
  });

  it("looks into the cells that the margin rule names, nearest first", () => {
    fc.assert(
      fc.property(
        query,
        fc.double({ min: 0, max: 20, noNaN: true }),
        ({ vector, threshold }, z) => {
          const own = centroids.bucketOf(vector) ?? -1;
          const away = rows.map((row, cell) => {
            const best = rows[own] as Float32Array;
            const between = Math.sqrt(Math.max(1e-9, 2 - 2 * cosine(best, row)));
            return cell === own ? -1 : (cosine(vector, best) - cosine(vector, row)) / between;
          });
          const margin = (z * Math.sqrt(1 - threshold * threshold)) / Math.sqrt(dimension);
          const probed = centroids.probed(vector, threshold, z);
          expect(probed[0]).toBe(own);
          for (const [cell, distance] of away.entries()) {
            if (Math.abs(distance - margin) < 1e-5) continue;
            expect(probed.includes(cell)).toBe(cell === own || distance < margin);
          }
          const order = probed.map((cell) => away[cell] ?? 0);
          for (let at = 1; at < order.length; at++)
            expect(order[at]).toBeGreaterThanOrEqual((order[at - 1] ?? 0) - 1e-5);
        },
      ),
    );
  });

  it("never looks into fewer cells when z grows, and finds every neighbour once z is large enough", () => {
    fc.assert(
      fc.property(query, fc.integer({ min: 0, max: 1e6 }), ({ vector, threshold }, seed) => {
        const neighbour = near(new Random(seed), vector, threshold);
        const bucket = centroids.bucketOf(neighbour);
        let before: number[] = [];
        for (const z of [0, 1, 2.6, 4, 6, 8, 20]) {
          const probed = centroids.probed(vector, threshold, z);
          expect(before.every((cell) => probed.includes(cell))).toBe(true);
          before = probed;
        }
        // A neighbour at cosine c is c·q plus something of length √(1 − c²), so z = √D misses none.
        const cell = centroids.probed(
          vector,
          cosine(vector, neighbour) - 1e-6,
          Math.sqrt(dimension),
        );
        expect(cell).toContain(bucket);
      }),
    );
    expect(centroids.probed(vectors[0] as Float32Array, 0.9, 0).length).toBe(1);
    expect(centroids.probed(vectors[0] as Float32Array, 0.9, 1e6).length).toBe(32);
  });

  it("asks each owner once, the owner of the query's own cell first", () => {
    const ownerOf = ownerAmong(4);
    for (const vector of vectors.slice(0, 50)) {
      const owners = centroids.owners(vector, 0.9, 6, ownerOf);
      expect(owners[0]).toBe(ownerOf(centroids.bucketOf(vector) ?? -1));
      expect(new Set(owners).size).toBe(owners.length);
      const wanted = new Set(centroids.probed(vector, 0.9, 6).map(ownerOf));
      expect(new Set(owners)).toEqual(wanted);
    }
  });

  it("keeps 98 % of the hits of an exhaustive search on question text, asking about half of 4 owners", () => {
    if (!hasRealQuestions) console.log("no paraphrase data beside the repository: generated text");
    const questions = hasRealQuestions ? realQuestions() : generatedQuestions(20_000);
    const embedder = new LexicalEmbedder();
    const random = new Random("index");
    // No text is both stored and asked: an exact cache answers repeats before anyone looks here.
    const texts = questions.texts.filter((_, at) => at % 40 < 20); // Both texts of a pair.
    const asked = texts.filter((_, at) => at % 6 === 0);
    const isAsked = new Set(asked);
    const index = new ExactIndex({ dimension: 384, random: () => random.next() });
    const stored: Float32Array[] = [];
    for (const text of texts) {
      if (isAsked.has(text)) continue;
      const vector = embedder.embed(text);
      if (index.insert(stored.length, vector) === undefined) stored.push(unit(vector));
    }
    const text = trainedOn(
      stored.filter((_, at) => at % 2 === 0),
      256,
      3,
    );
    const bucketOf = stored.map((vector) => text.bucketOf(vector) ?? -1);
    const sizes = new Int32Array(256);
    for (const bucket of bucketOf) sizes[bucket] = (sizes[bucket] ?? 0) + 1;
    const placement = text.placement(sizes, 4);
    let [hits, found, contacted] = [0, 0, 0];
    for (const each of asked) {
      const query = embedder.embed(each);
      const owners = text.owners(query, 0.92, PROBING_Z, (bucket) => placement[bucket]);
      contacted += owners.length;
      const neighbours = index.search(query, 0.92, 64);
      if (neighbours.length === 0) continue;
      hits++;
      // An owner that is asked looks through all that it holds.
      if (neighbours.some(({ id }) => owners.includes(placement[bucketOf[id] ?? -1]))) found++;
    }
    expect(hits).toBeGreaterThan(150);
    // The benchmark holds twice as many texts, over several draws, to 0.995 and 2.2; here are some 200 hits.
    expect(found / hits).toBeGreaterThanOrEqual(0.98);
    expect(contacted / asked.length).toBeLessThanOrEqual(2.4);
  });

  it("is placed so that every owner has its share, and neighbouring buckets lie together", () => {
    const sizes = new Int32Array(32);
    for (const vector of vectors) {
      const bucket = centroids.bucketOf(vector) ?? -1;
      sizes[bucket] = (sizes[bucket] ?? 0) + 1;
    }
    const asked = (ownerOf: (bucket: number) => number): number =>
      vectors.reduce((sum, vector) => sum + centroids.owners(vector, 0.92, 4, ownerOf).length, 0);
    for (const owners of [1, 2, 4, 8]) {
      const placement = centroids.placement(sizes, owners);
      expect(centroids.placement(sizes, owners)).toEqual(placement);
      const loads = new Array<number>(owners).fill(0);
      for (const [bucket, owner] of placement.entries())
        loads[owner] = (loads[owner] ?? 0) + (sizes[bucket] ?? 0);
      const even = vectors.length / owners;
      expect(Math.max(...loads)).toBeLessThanOrEqual(1.15 * even + Math.max(...sizes));
      expect(Math.min(...loads)).toBeGreaterThan(0.4 * even);
      if (owners === 1) continue;
      const strewn = Array.from({ length: 5 }, (_, salt) => asked(ownerAmong(owners, salt)));
      const mean = strewn.reduce((sum, each) => sum + each, 0) / strewn.length;
      expect(asked((bucket) => placement[bucket] ?? -1)).toBeLessThan(0.97 * mean);
    }
    // Without entries buckets still go everywhere.
    expect(new Set(centroids.placement(new Int32Array(32), 4)).size).toBe(4);
  });
});
