/** What an index must find, computed the plain way; and vectors to put in. */
import type { Random } from "../runtime/random.ts";

export function cosine(a: Float32Array, b: Float32Array): number {
  let [product, ofA, ofB] = [0, 0, 0];
  for (const [at, value] of a.entries()) {
    const other = b[at] ?? 0;
    product += value * other;
    ofA += value * value;
    ofB += other * other;
  }
  return product / Math.sqrt(ofA * ofB);
}

/** All ids with their cosines, best first. */
export function bruteForce(
  vectors: ReadonlyMap<number, Float32Array>,
  query: Float32Array,
): { id: number; similarity: number }[] {
  return [...vectors]
    .map(([id, vector]) => ({ id, similarity: cosine(vector, query) }))
    .sort((a, b) => b.similarity - a.similarity || a.id - b.id);
}

export function gaussian(random: Random): number {
  return Math.sqrt(-2 * Math.log(1 - random.next())) * Math.cos(2 * Math.PI * random.next());
}

export function randomVector(random: Random, dimension: number): Float32Array {
  return Float32Array.from({ length: dimension }, () => gaussian(random));
}

/** At about this cosine from `vector`, 0 < cosine ≤ 1. */
export function near(random: Random, vector: Float32Array, similarity: number): Float32Array {
  const length = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  const noise = Math.sqrt((1 / (similarity * similarity) - 1) / vector.length) * length;
  return vector.map((value) => value + noise * gaussian(random));
}

/**
 * Hard vectors: clusters whose members are at 0.5 to 0.95 of one another, as real questions on one subject are, and
 * a mean that all share.
 */
export function clusteredVectors(
  random: Random,
  count: number,
  dimension: number,
  clusters: number,
): Float32Array[] {
  const mean = randomVector(random, dimension);
  const centres = Array.from({ length: clusters }, () =>
    randomVector(random, dimension).map((value, at) => value + 0.5 * (mean[at] ?? 0)),
  );
  return Array.from({ length: count }, (_, index) => {
    const centre = centres[index % clusters] ?? mean;
    return near(random, centre, 0.7 + 0.28 * random.next());
  });
}
