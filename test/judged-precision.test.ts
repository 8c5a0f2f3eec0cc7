/** Intervals, shadow statistics and the switch: against known values, and over random truths. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  bandOf,
  OUTCOMES_MAX,
  PrecisionSwitch,
  ShadowStats,
  shareOf,
  wilsonLower,
} from "../actors/judged-precision.ts";
import { Random } from "../runtime/random.ts";

describe("judged precision: intervals", () => {
  it("is Wilson's", () => {
    // 81 of 263, 95 %: Newcombe 1998, method 3 (0.2553 to 0.3662).
    const share = shareOf(81, 263);
    expect(share.low).toBeCloseTo(0.2553, 4);
    expect(share.high).toBeCloseTo(0.3662, 4);
    expect(shareOf(0, 20).low).toBe(0);
    expect(shareOf(0, 20).high).toBeCloseTo(0.1611, 4);
    expect(shareOf(0, 0)).toEqual({ count: 0, total: 0, share: 0, low: 0, high: 1 });
  });

  it("the lower bound is within 0 and the share, and rises with more of the same", () => {
    fc.assert(
      fc.property(fc.nat(500), fc.nat(500), (good, bad) => {
        const total = good + bad;
        const bound = wilsonLower(good, total);
        expect(bound).toBeGreaterThanOrEqual(0);
        expect(bound).toBeLessThanOrEqual(total === 0 ? 0 : good / total);
        if (total > 0) expect(wilsonLower(10 * good, 10 * total)).toBeGreaterThanOrEqual(bound);
        expect(wilsonLower(good + 1, total + 1)).toBeGreaterThan(bound);
      }),
    );
  });

  it("bands begin at their hundredth", () => {
    for (let band = 0; band <= 100; band++) {
      expect(bandOf(band / 100)).toBe(band);
      if (band < 100) expect(bandOf((band + 0.9) / 100)).toBe(band);
    }
    expect(bandOf(1.0000001)).toBe(100);
    expect(bandOf(-0.5)).toBe(0);
  });
});

describe("judged precision: shadow", () => {
  it("counts would-be hits and the false ones of those judged, by band", () => {
    const stats = new ShadowStats();
    for (let count = 0; count < 6; count++) stats.miss();
    stats.wouldHit(0.925, "right");
    stats.wouldHit(0.921, "wrong");
    stats.wouldHit(0.98, "right");
    stats.wouldHit(0.98, "unjudged");
    const summary = stats.summary();
    expect(summary.lookups).toBe(10);
    expect(summary.hits).toMatchObject({ count: 4, total: 10, share: 0.4 });
    expect(summary.falseHits).toMatchObject({ count: 1, total: 3 });
    expect(summary.unjudged).toBe(1);
    expect(
      summary.bands.map(({ from, falseHits }) => [from, falseHits.count, falseHits.total]),
    ).toEqual([
      [0.92, 1, 2],
      [0.98, 0, 1],
    ]);
  });

  it("its interval holds the truth in about 95 of 100 periods", () => {
    let held = 0;
    for (let seed = 0; seed < 400; seed++) {
      const random = new Random(`shadow ${seed}`);
      const stats = new ShadowStats();
      for (let count = 0; count < 300; count++) {
        stats.wouldHit(0.95, random.next() < 0.08 ? "wrong" : "right");
      }
      const { low, high } = stats.summary().falseHits;
      if (low <= 0.08 && 0.08 <= high) held++;
    }
    expect(held).toBeGreaterThan(370);
    expect(held).toBeLessThan(396);
  });

  it("survives a store, and what is none of its data does not", () => {
    const stats = new ShadowStats();
    stats.miss();
    stats.wouldHit(0.95, "wrong");
    const copy = ShadowStats.fromData(JSON.parse(JSON.stringify(stats.toData())));
    expect(copy?.summary()).toEqual(stats.summary());
    for (const bad of [
      null,
      1,
      {},
      { misses: -1, bands: [] },
      { misses: 0, bands: [[95, 1, 1]] },
      { misses: 0, bands: [[101, 1, 1, 1]] },
    ]) {
      expect(ShadowStats.fromData(bad)).toBeUndefined();
    }
  });
});

describe("judged precision: the switch", () => {
  /** States after each of `count` outcomes that are right with probability p. */
  function run(gate: PrecisionSwitch, p: number, count: number, seed: string): string[] {
    const random = new Random(seed);
    const changes: string[] = [];
    for (let at = 1; at <= count; at++) {
      const changed = gate.add(random.next() < p);
      if (changed !== undefined) changes.push(`${changed} after ${at}`);
    }
    return changes;
  }

  it("stays on over a record without an error", () => {
    expect(run(new PrecisionSwitch(0.95), 1, 5000, "a")).toEqual([]);
  });

  it("turns off once hits are clearly worse than the target, from 52 outcomes on for 0.95", () => {
    const gate = new PrecisionSwitch(0.95);
    for (let count = 0; count < 51; count++) expect(gate.add(count % 2 === 0)).toBeUndefined();
    expect(gate.add(false)).toBe("off");
    expect(gate.state).toBe("off");
  });

  it("never comes back while would-be hits stay worse than the target", () => {
    const gate = new PrecisionSwitch(0.95);
    expect(run(gate, 0.9, 20_000, "worse")).toHaveLength(1);
    expect(gate.state).toBe("off");
  });

  it("comes back when they get right, and stays", () => {
    const gate = new PrecisionSwitch(0.95);
    run(gate, 0.5, 200, "bad");
    expect(gate.state).toBe("off");
    const back = run(gate, 0.995, 5000, "good");
    expect(back).toHaveLength(1);
    expect(back[0]).toMatch(/^on after/);
  });

  it("notices a fall after any number of right ones: the newest count", () => {
    const gate = new PrecisionSwitch(0.9);
    for (let count = 0; count < 50_000; count++) gate.add(true);
    const changes = run(gate, 0.5, OUTCOMES_MAX, "fall");
    expect(changes[0]).toMatch(/^off after \d{2,3}$/);
  });

  it("cannot go back and forth faster than the fewest outcomes that may decide", () => {
    fc.assert(
      fc.property(fc.array(fc.boolean(), { minLength: 300, maxLength: 2000 }), (outcomes) => {
        const gate = new PrecisionSwitch(0.9);
        let since = 0;
        for (const outcome of outcomes) {
          since++;
          if (gate.add(outcome) === undefined) continue;
          expect(since).toBeGreaterThanOrEqual(25);
          since = 0;
        }
      }),
    );
  });

  it("survives a store, and what is none of its data does not", () => {
    const gate = new PrecisionSwitch(0.95);
    run(gate, 0.99, 1700, "store");
    const copy = PrecisionSwitch.fromData(0.95, JSON.parse(JSON.stringify(gate.toData())));
    expect(copy?.judged).toEqual(gate.judged);
    expect(copy?.toData()).toEqual(gate.toData());
    for (const bad of [
      null,
      {},
      { state: "maybe", outcomes: "" },
      { state: "on", outcomes: "012" },
      { state: "on", outcomes: "1".repeat(OUTCOMES_MAX + 1) },
    ]) {
      expect(PrecisionSwitch.fromData(0.95, bad)).toBeUndefined();
    }
    expect(() => new PrecisionSwitch(1)).toThrow(RangeError);
  });
});
