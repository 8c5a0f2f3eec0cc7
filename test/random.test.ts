import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { Random } from "../runtime/random.ts";

const draws = (random: Random, count: number) => Array.from({ length: count }, () => random.next());

describe("Random", () => {
  it("stream: the same for the same seed, another for another", () => {
    expect(draws(new Random(7), 20)).toEqual(draws(new Random("7"), 20));
    expect(draws(new Random(7), 20)).not.toEqual(draws(new Random(8), 20));
  });

  it("stream: does not change between versions (recorded runs depend on it)", () => {
    const random = new Random("headrace");
    expect(Array.from({ length: 4 }, () => random.int(1000))).toEqual([388, 615, 235, 844]);
    expect(random.split("child").next()).toBe(0.16755568451892222);
  });

  it("split: depends on seed and name, not on draws made before", () => {
    const fresh = new Random(1);
    const used = new Random(1);
    draws(used, 100);
    expect(draws(used.split("a"), 10)).toEqual(draws(fresh.split("a"), 10));
    expect(draws(fresh.split("b"), 10)).not.toEqual(draws(fresh.split("a"), 10));
    expect(draws(fresh.split("a").split("b"), 5)).toEqual(draws(fresh.split("a/b"), 5));
  });

  it("split: takes no draw from its parent", () => {
    const plain = new Random(1);
    const splitting = new Random(1);
    splitting.split("a");
    expect(draws(splitting, 10)).toEqual(draws(plain, 10));
  });

  it("int: stays in range and reaches both ends", () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 12 }), fc.integer(), (n, seed) => {
        const random = new Random(seed);
        const seen = new Set(Array.from({ length: 400 }, () => random.int(n)));
        expect([...seen].toSorted((a, b) => a - b)).toEqual(Array.from({ length: n }, (_, i) => i));
      }),
    );
    expect(new Random(1).int(2 ** 32)).toBeGreaterThanOrEqual(0);
  });

  it.each([0, -1, 1.5, Number.NaN, 2 ** 32 + 1])("int: %d is refused", (n) => {
    expect(() => new Random(1).int(n)).toThrow("whole number from 1 to 2^32");
  });

  it("next: uniform in [0, 1) over seeds as well as along a stream", () => {
    const along = new Random(3);
    for (const sample of [
      Array.from({ length: 20_000 }, () => along.next()),
      Array.from({ length: 20_000 }, (_, seed) => new Random(seed).next()),
    ]) {
      const bins = new Array<number>(20).fill(0);
      for (const draw of sample)
        bins[Math.floor(draw * 20)] = (bins[Math.floor(draw * 20)] ?? 0) + 1;
      const chiSquare =
        bins.reduce((sum, count) => sum + (count - 1000) * (count - 1000), 0) / 1000;
      expect(chiSquare).toBeLessThan(43.8); // 19 degrees of freedom, p = 0.001; seeds are fixed.
      expect(Math.min(...sample)).toBeGreaterThanOrEqual(0);
      expect(Math.max(...sample)).toBeLessThan(1);
    }
  });
});
