/** Confidence over seeds, verdicts, and the rules by which no answer is given. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  backlogGrowth,
  intervalOf,
  type RunEvidence,
  refusalReasons,
  studentT95,
  verdictOf,
} from "../sim/statistics.ts";

/** Ten minutes of 2 requests/s that nothing is wrong with. */
function evidence(changes: Partial<RunEvidence> = {}): RunEvidence {
  const half = { arrived: 600, inputTokens: 600_000, outputTokens: 120_000, e2eMeanMs: 4000 };
  return {
    durationMs: 600_000,
    warmUpMs: 30_000,
    arrived: 1200,
    completed: 1200,
    refused: 0,
    failed: 0,
    unfinished: 0,
    longestE2eMs: 20_000,
    utilization: 0.6,
    kvPeak: 0.5,
    halves: [half, half],
    inSystem: [8, 9, 7, 8, 8, 9, 8, 7, 8, 9],
    arrivalsPerSecond: [2, 2.1, 1.9, 2, 2, 2.1, 2, 1.9, 2, 2],
    ...changes,
  };
}

describe("statistics: intervals", () => {
  it("is Student's: t of the tables, also beyond the table held", () => {
    expect(studentT95(1)).toBe(12.706);
    expect(studentT95(4)).toBe(2.776);
    expect(studentT95(30)).toBe(2.042);
    expect(studentT95(40)).toBeCloseTo(2.021, 3);
    expect(studentT95(60)).toBeCloseTo(2.0, 3);
    expect(studentT95(120)).toBeCloseTo(1.98, 3);
    expect(studentT95(100_000)).toBeCloseTo(1.96, 3);
  });

  it("gives the interval computed by hand", () => {
    // Mean 3, sd √2.5, n 5: 2.776 · 1.5811 ÷ 2.2361.
    const interval = intervalOf([1, 2, 3, 4, 5]);
    expect(interval.mean).toBe(3);
    expect(interval.halfWidth).toBeCloseTo(1.9629, 3);
    expect(interval.low).toBeCloseTo(1.0371, 3);
    expect(interval.high).toBeCloseTo(4.9629, 3);
  });

  it("claims no spread from one run, none where runs agree, and refuses none at all", () => {
    expect(intervalOf([7])).toEqual({ mean: 7, halfWidth: undefined, low: 7, high: 7, runs: 1 });
    expect(intervalOf([7, 7, 7]).halfWidth).toBe(0);
    expect(() => intervalOf([])).toThrow(RangeError);
  });

  it("holds the true mean in 95 of 100 samples", () => {
    // A small generator of its own: uniform on [0, 1), mean ½.
    let state = 12345;
    const next = () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return state / 4294967296;
    };
    let held = 0;
    for (let trial = 0; trial < 4000; trial++) {
      const { low, high } = intervalOf(Array.from({ length: 5 }, next));
      if (low <= 0.5 && 0.5 <= high) held++;
    }
    expect(held / 4000).toBeGreaterThan(0.92);
    expect(held / 4000).toBeLessThan(0.97);
  });
});

describe("statistics: verdicts", () => {
  it("is STABLE, and refuses nothing, for a run at rest", () => {
    expect(verdictOf(evidence())).toBe("STABLE");
    expect(refusalReasons(evidence())).toEqual([]);
  });

  it("is TOO-SHORT below five minutes, below ten longest requests, and without a request", () => {
    expect(verdictOf(evidence({ durationMs: 299_000, longestE2eMs: 1000 }))).toBe("TOO-SHORT");
    expect(verdictOf(evidence({ longestE2eMs: 60_001 }))).toBe("TOO-SHORT");
    expect(verdictOf(evidence({ longestE2eMs: 60_000 }))).toBe("STABLE");
    expect(verdictOf(evidence({ arrived: 0, completed: 0 }))).toBe("TOO-SHORT");
  });

  it("is OVERLOADED when full nodes leave requests undone, not when idle ones do", () => {
    const undone = { completed: 1170, refused: 30 };
    expect(verdictOf(evidence({ ...undone, utilization: 0.97 }))).toBe("OVERLOADED");
    expect(verdictOf(evidence({ ...undone, kvPeak: 1 }))).toBe("OVERLOADED");
    expect(verdictOf(evidence({ ...undone, utilization: 0.3 }))).toBe("STABLE");
    expect(refusalReasons(evidence({ ...undone, utilization: 0.3 }))[0]).toMatch(
      /only 97.5 % .* 30 % busy: limits, timeouts or requests that fit no node, not capacity/,
    );
    expect(refusalReasons(evidence({ ...undone, utilization: 0.97 }))[0]).toMatch(/saturated/);
  });

  it("is BACKLOGGED when what waits grows beyond chance and beyond the load", () => {
    const growing = [5, 12, 18, 26, 31, 40, 44, 52, 60, 66];
    expect(verdictOf(evidence({ inSystem: growing }))).toBe("BACKLOGGED");
    expect(backlogGrowth(evidence({ inSystem: growing }))).toBeCloseTo(61, 0);
    expect(refusalReasons(evidence({ inSystem: growing }))[0]).toMatch(/grows: by 6\d requests/);
  });

  it("takes no growth for a backlog that the load explains, that is small, or that is chance", () => {
    const growing = [8, 9, 11, 13, 14, 16, 18, 19, 21, 22];
    const rising = [1, 1.2, 1.5, 1.7, 1.9, 2.1, 2.3, 2.6, 2.8, 3];
    expect(verdictOf(evidence({ inSystem: growing }))).toBe("STABLE"); // 14 requests, 7 s: doubled only
    expect(verdictOf(evidence({ inSystem: [2, 3, 3, 4, 5, 5, 6, 7, 7, 8] }))).toBe("STABLE");
    const steep = growing.map((value) => value * value * 0.1);
    expect(verdictOf(evidence({ inSystem: steep }))).toBe("BACKLOGGED");
    expect(verdictOf(evidence({ inSystem: steep, arrivalsPerSecond: rising }))).toBe("STABLE");
    expect(verdictOf(evidence({ inSystem: [5, 90, 2, 60, 1, 80, 3, 95, 4, 99] }))).toBe("STABLE");
    expect(verdictOf(evidence({ inSystem: growing.slice().reverse() }))).toBe("STABLE");
  });

  it("never calls a constant or falling system backlogged", () => {
    fc.assert(
      fc.property(fc.array(fc.nat(1000), { minLength: 4, maxLength: 20 }), (values) => {
        const falling = values.slice().sort((left, right) => right - left);
        const arrivalsPerSecond = falling.map(() => 2);
        expect(backlogGrowth(evidence({ inSystem: falling, arrivalsPerSecond }))).toBeUndefined();
      }),
    );
  });
});

describe("statistics: refusals", () => {
  it("says how long the run is and how long it must be", () => {
    expect(refusalReasons(evidence({ durationMs: 60_000, longestE2eMs: 1000 }))).toEqual([
      "the run lasts 60 s; 300 s are the least that can show a p99",
    ]);
    expect(refusalReasons(evidence({ longestE2eMs: 90_000 }))).toEqual([
      "the longest request took 90 s; a run of 10 times that, 900 s, is needed, and this one lasts 600 s",
    ]);
  });

  it("refuses halves that disagree, unless the load of the slower half is larger", () => {
    const half = { arrived: 600, inputTokens: 600_000, outputTokens: 120_000, e2eMeanMs: 4000 };
    const slower = { ...half, e2eMeanMs: 5200 };
    const [reason] = refusalReasons(evidence({ halves: [half, slower] }));
    expect(reason).toMatch(
      /halves disagree: mean E2E 4.00 s and 5.20 s, and the second half has no more load/,
    );
    expect(refusalReasons(evidence({ halves: [slower, half] }))[0]).toMatch(
      /the first half has no more/,
    );
    const loaded = { ...slower, inputTokens: 700_000 };
    expect(refusalReasons(evidence({ halves: [half, loaded] }))).toEqual([]);
    expect(refusalReasons(evidence({ halves: [half, { ...half, e2eMeanMs: 4900 }] }))).toEqual([]);
    expect(refusalReasons(evidence({ halves: [half, { ...half, e2eMeanMs: 0 }] }))[0]).toMatch(
      /no request/,
    );
  });

  it("refuses a law that beats physics, and a run without requests", () => {
    expect(refusalReasons(evidence(), ["x: decodes too fast"])).toEqual([
      "the step law is faster than physics: x: decodes too fast",
    ]);
    expect(refusalReasons(evidence({ arrived: 0, completed: 0 }))).toEqual(["no request came"]);
  });
});
