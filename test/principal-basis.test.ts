import { describe, expect, it } from "vitest";
import { BasisTraining, randomBasis, SAMPLE_MAX } from "../actors/principal-basis.ts";
import { Matrix } from "../actors/vector-kernels.ts";
import { Random } from "../runtime/random.ts";
import { gaussian, randomVector } from "./vector-oracle.ts";

function unit(vector: Float32Array): Float32Array {
  const norm = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  return vector.map((value) => value / norm);
}

/** In a subspace of so many dimensions, but for a little noise. */
function flatVectors(count: number, dimension: number, rank: number): Float32Array[] {
  const random = new Random("flat");
  const axes = Array.from({ length: rank }, () => randomVector(random, dimension));
  return Array.from({ length: count }, () => {
    const vector = randomVector(random, dimension).map((value) => 0.02 * value);
    for (const axis of axes) {
      const weight = gaussian(random);
      for (const [at, value] of axis.entries()) vector[at] = (vector[at] ?? 0) + weight * value;
    }
    return unit(vector);
  });
}

function trained(vectors: readonly Float32Array[], rows: number, seed: number) {
  const random = new Random(seed);
  const dimension = vectors[0]?.length ?? 16;
  const training = new BasisTraining(rows, dimension, () => random.next());
  let slices = 0;
  for (; training.trained === undefined; slices++)
    training.step(vectors.length, (index) => vectors[index] as Float32Array);
  return { basis: training.trained, slices };
}

/** The mean share of a vector's square that lies in the basis. */
function energyIn(basis: Matrix, vectors: readonly Float32Array[]): number {
  let sum = 0;
  for (const vector of vectors) {
    basis.vector.set(vector);
    basis.multiply();
    sum += basis.products.reduce((squares, value) => squares + value * value, 0);
  }
  return sum / vectors.length;
}

function expectOrthonormal(basis: Matrix): void {
  for (let row = 0; row < basis.rows; row++) {
    basis.vector.set(basis.row(row));
    basis.multiply();
    for (const [other, product] of basis.products.entries())
      expect(Math.abs(product - (row === other ? 1 : 0))).toBeLessThan(1e-5);
  }
}

describe("bases", () => {
  it("are orthonormal: random ones of any size, trained ones, and those of one vector only", () => {
    const random = new Random(3);
    for (const [rows, dimension] of [
      [16, 16],
      [64, 64],
      [64, 384],
      [96, 384],
      [96, 112],
    ] as const)
      expectOrthonormal(randomBasis(rows, dimension, () => random.next()));
    expectOrthonormal(trained(flatVectors(300, 128, 8), 64, 1).basis);
    const one = unit(randomVector(random, 64));
    expectOrthonormal(
      trained(
        Array.from({ length: 50 }, () => one),
        32,
        1,
      ).basis,
    );
  });

  it("take up by training what the vectors have in common", () => {
    const vectors = flatVectors(800, 256, 10);
    const random = new Random(4);
    const before = energyIn(
      randomBasis(16, 256, () => random.next()),
      vectors,
    );
    expect(before).toBeLessThan(0.2); // About 16 of 256.
    expect(energyIn(trained(vectors, 16, 4).basis, vectors)).toBeGreaterThan(0.98);
    // A basis half as wide as the subspace takes up its larger half, whichever way it began.
    const energies = [5, 6, 7].map((seed) => energyIn(trained(vectors, 8, seed).basis, vectors));
    expect(Math.min(...energies)).toBeGreaterThan(0.7);
    expect(Math.max(...energies) - Math.min(...energies)).toBeLessThan(0.02);
  });

  it("are the same for the same seed and vectors", () => {
    const vectors = flatVectors(200, 64, 6);
    expect(trained(vectors, 16, 8).basis.values).toEqual(trained(vectors, 16, 8).basis.values);
    expect(trained(vectors, 16, 9).basis.values).not.toEqual(trained(vectors, 16, 8).basis.values);
  });

  it("are trained in slices of bounded work, however many vectors there are", () => {
    let most = 0;
    let read = 0;
    const vector = unit(randomVector(new Random(5), 384));
    const random = new Random(6);
    const training = new BasisTraining(96, 384, () => random.next());
    while (training.trained === undefined) {
      const before = read;
      training.step(1_000_000, () => {
        read++;
        return vector;
      });
      most = Math.max(most, read - before);
    }
    expect(read).toBe(12 * SAMPLE_MAX);
    expect(most * 2 * 96 * 384).toBeLessThanOrEqual(8_000_000);
  });
});

describe("a matrix", () => {
  it("multiplies and adds up as plain loops do", () => {
    const random = new Random(7);
    for (const [rows, dimension] of [
      [4, 16],
      [12, 48],
      [256, 384],
    ] as const) {
      const matrix = new Matrix(rows, dimension, true);
      matrix.values.set(randomVector(random, rows * dimension));
      const sums = new Float64Array(rows * dimension);
      for (let round = 0; round < 3; round++) {
        matrix.vector.set(randomVector(random, dimension));
        matrix.multiply();
        matrix.accumulate();
        for (let row = 0; row < rows; row++) {
          const product = matrix
            .row(row)
            .reduce((sum, value, at) => sum + value * (matrix.vector[at] ?? 0), 0);
          expect(Math.abs((matrix.products[row] ?? 0) - product)).toBeLessThan(1e-3);
          for (const [at, value] of matrix.vector.entries()) {
            const place = row * dimension + at;
            sums[place] = (sums[place] ?? 0) + product * value;
          }
        }
      }
      const off = matrix.sums.map((value, place) => Math.abs(value - (sums[place] ?? 0)));
      expect(off.reduce((a, b) => Math.max(a, b))).toBeLessThan(0.05);
    }
  });
});
