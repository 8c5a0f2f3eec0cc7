/** Histograms with a stated error: against sorted values. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { Histogram } from "../sim/histogram.ts";

const values = fc.array(fc.integer({ min: 0, max: 2 ** 39 }), { minLength: 1, maxLength: 300 });

describe("histogram", () => {
  it("quantiles are within the stated share of a value at their rank; mean and largest are exact", () => {
    fc.assert(
      fc.property(values, fc.double({ min: 0, max: 1, noNaN: true }), (numbers, p) => {
        const histogram = new Histogram(8);
        for (const value of numbers) histogram.add(value);
        const sorted = [...numbers].sort((left, right) => left - right);
        const truth = sorted[Math.floor((sorted.length - 1) * p)] ?? 0;
        const found = histogram.quantile(p) ?? Number.NaN;
        expect(Math.abs(found - truth)).toBeLessThanOrEqual((truth / 256) * (1 + 1e-9));
        expect(histogram.max).toBe(sorted.at(-1));
        const sum = numbers.reduce((total, value) => total + value, 0);
        expect(histogram.mean).toBeCloseTo(sum / numbers.length, 3);
      }),
    );
  });

  it("merging is counting both", () => {
    fc.assert(
      fc.property(values, values, (left, right) => {
        const both = new Histogram(4);
        const one = new Histogram(4);
        const other = new Histogram(4);
        for (const value of left) {
          both.add(value);
          one.add(value);
        }
        for (const value of right) {
          both.add(value);
          other.add(value);
        }
        one.merge(other);
        expect(one.count).toBe(both.count);
        for (const p of [0, 0.5, 0.99, 1]) expect(one.quantile(p)).toBe(both.quantile(p));
      }),
    );
  });

  it("an empty one has no quantile; beyond its range values count as its end", () => {
    const histogram = new Histogram();
    expect(histogram.quantile(0.5)).toBeUndefined();
    histogram.add(2 ** 45);
    expect(histogram.count).toBe(1);
    expect(histogram.max).toBe(2 ** 45);
  });
});
