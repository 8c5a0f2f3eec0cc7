/**
 * The event engine against what queueing theory knows exactly. Each mean must lie within the 95 % interval of its own
 * run, by 20 batch means after a warm-up; the interval's width is checked as well, so that a wide one proves nothing
 * silently. One seed for all, chosen once. Sizes are a tenth of a full proof's, so that this takes seconds; widths
 * grow by the root of that.
 */
import { describe, expect, it } from "vitest";
import { Random } from "../runtime/random.ts";
import { type Interval, intervalOf } from "../sim/statistics.ts";
import {
  constant,
  erlangB,
  erlangC,
  exponential,
  hyperexponential,
  type Law,
  lindley,
  runProcessorSharing,
  runQueue,
  UNIT_US,
} from "./queue-models.ts";

const SEED = "queues";
const BATCHES = 20;
const WARM_UP = 20_000;

/** Mean after the warm-up, in units of service, with its interval. */
function batchMeans(valuesUs: Float64Array, warmUp = WARM_UP): Interval {
  const size = Math.floor((valuesUs.length - warmUp) / BATCHES);
  const means = Array.from({ length: BATCHES }, (_, batch) => {
    let sum = 0;
    for (let i = 0; i < size; i++) sum += valuesUs[warmUp + batch * size + i] ?? Number.NaN;
    return sum / size / UNIT_US;
  });
  return intervalOf(means);
}

/** The exact value lies in the interval, and the interval is no wider than `share` of it on either side. */
function expectExact(interval: Interval, exact: number, share: number): void {
  const { mean, halfWidth = Number.POSITIVE_INFINITY } = interval;
  const shown = `${mean.toFixed(4)} ± ${halfWidth.toFixed(4)}, exactly ${exact.toFixed(4)}`;
  expect(halfWidth / exact, `width: ${shown}`).toBeLessThan(share);
  expect(Math.abs(mean - exact), shown).toBeLessThanOrEqual(halfWidth);
}

const random = (name: string) => new Random(SEED).split(name);

describe("queues: one server", () => {
  it.each<[string, Law, number, number, number, number]>([
    ["M/M/1 at 0.8: ρ ÷ (μ − λ)", exponential, 0.8, 4, 400_000, 0.06],
    ["M/D/1 at 0.8: ρ ÷ (2(1 − ρ))", constant, 0.8, 2, 400_000, 0.05],
    [
      "M/H2/1 at 0.7, cs² 4: ρ ÷ (1 − ρ) · (1 + cs²) ÷ 2",
      hyperexponential(4),
      0.7,
      (0.7 / 0.3) * 2.5,
      400_000,
      0.08,
    ],
  ])("%s", (name, service, load, exact, jobs, share) => {
    const { waits } = runQueue({
      arrivals: exponential,
      service,
      load,
      jobs,
      random: random(name),
    });
    expectExact(batchMeans(waits), exact, share);
  });

  it("G/D/1 at 0.9, ca² 4: never above Kingman's bound, and far above M/D/1", () => {
    const { waits } = runQueue({
      arrivals: hyperexponential(4),
      service: constant,
      load: 0.9,
      jobs: 400_000,
      random: random("G/D/1"),
    });
    const { mean, halfWidth = Number.POSITIVE_INFINITY } = batchMeans(waits);
    const arrivalVariance = 4 / (0.9 * 0.9);
    const bound = (0.9 * arrivalVariance) / (2 * (1 - 0.9));
    expect(bound).toBeCloseTo(22.2, 1);
    expect(mean + halfWidth).toBeLessThan(bound);
    const poisson = 0.9 / (2 * (1 - 0.9));
    expect(mean - halfWidth).toBeGreaterThan(2 * poisson);
  });

  it("every wait is Lindley's, to the µs (same gaps and services, no events)", () => {
    for (const [arrivals, service] of [
      [exponential, exponential],
      [hyperexponential(4), constant],
    ] as const) {
      const run = runQueue({
        arrivals,
        service,
        load: 0.9,
        jobs: 50_000,
        random: random("lindley"),
      });
      expect(run.waits).toEqual(lindley(run));
    }
  });

  it.each<[string, Law, number]>([
    ["exponential", exponential, 0.08],
    ["constant", constant, 0.08],
    ["hyperexponential", hyperexponential(4), 0.08],
  ])(
    "M/G/1 with processor sharing at 0.7: mean sojourn 1 ÷ (1 − ρ), whatever the law (%s)",
    (name, service, share) => {
      const sojourns = runProcessorSharing({
        service,
        load: 0.7,
        jobs: 150_000,
        random: random(`sharing ${name}`),
      });
      expectExact(batchMeans(sojourns), 1 / 0.3, share);
    },
  );
});

describe("queues: several servers", () => {
  it.each<[number, number, number, number]>([
    [2, 0.8, 1.7778, 0.06],
    [8, 0.8, 0.286, 0.08],
    [8, 0.95, 2.1104, 0.25],
    [32, 0.9, 0.1432, 0.2],
  ])("M/M/%i at %f: Erlang C ÷ (cμ − λ)", (servers, load, stated, share) => {
    const exact = erlangC(servers, load) / (servers * (1 - load));
    expect(exact).toBeCloseTo(stated, 4);
    const { waits } = runQueue({
      arrivals: exponential,
      service: exponential,
      servers,
      load,
      jobs: 400_000,
      random: random(`M/M/${servers} ${load}`),
    });
    expectExact(batchMeans(waits), exact, share);
  });

  it.each<[string, Law]>([
    ["exponential", exponential],
    ["constant", constant],
    ["hyperexponential", hyperexponential(4)],
  ])("M/G/20/20 at 16 erlang: Erlang B is lost, whatever the law (%s)", (name, service) => {
    const exact = erlangB(16, 20);
    expect(exact).toBeCloseTo(0.06441, 5);
    const { waits, lost } = runQueue({
      arrivals: exponential,
      service,
      servers: 20,
      placesMax: 0,
      load: 16 / 20,
      jobs: 300_000,
      random: random(`loss ${name}`),
    });
    const isLost = waits.map((wait) => (wait < 0 ? UNIT_US : 0));
    expect(isLost.filter((us) => us > 0)).toHaveLength(lost);
    expectExact(batchMeans(isLost), exact, 0.06);
  });
});

describe("queues: identities", () => {
  it("Little's law: L = λW to the last digit (a run that ends empty)", () => {
    for (const servers of [1, 8]) {
      const { sojourns, areaUs, endUs } = runQueue({
        arrivals: exponential,
        service: hyperexponential(4),
        servers,
        load: 0.8,
        jobs: 50_000,
        random: random("Little"),
      });
      const total = sojourns.reduce((sum, us) => sum + us, 0);
      expect(areaUs).toBe(total); // Both are whole µs below 2^53.
      const inSystem = areaUs / endUs;
      const rate = sojourns.length / endUs;
      expect(inSystem).toBeCloseTo(rate * (total / sojourns.length), 10);
      expect(inSystem).toBeGreaterThan(2);
    }
  });

  it("time in other units changes only the unit (ticks of 1 ms and of 10 ms)", () => {
    const run = (scale: number) =>
      runQueue({
        // Whole ticks from the start: scaled first, and rounded alike.
        arrivals: (each) => Math.round(exponential(each) * 800) * scale * 1e-3,
        service: (each) => Math.round(exponential(each) * 1000) * scale * 1e-3,
        load: 1,
        jobs: 20_000,
        random: random("unit"),
        tickUs: 1000 * scale,
      });
    const [fine, coarse] = [run(1), run(10)];
    expect(coarse.waits).toEqual(fine.waits.map((us) => 10 * us));
    expect(fine.waits.some((us) => us > 0)).toBe(true);
  });

  it("twice the stations and twice the rate, sent at random: the same waits within the intervals", () => {
    const [one, two, four] = [1, 2, 4].map((stations) => {
      const { waits } = runQueue({
        arrivals: exponential,
        service: exponential,
        load: 0.7,
        jobs: 200_000,
        stations,
        random: random(`stations ${stations}`),
      });
      return batchMeans(waits);
    });
    const exact = 0.7 / 0.3;
    for (const interval of [one, two, four]) {
      if (interval === undefined) throw new Error("three runs");
      expectExact(interval, exact, 0.08);
    }
  });

  it("the same seed gives the same run; another seed another", () => {
    const run = (seed: string) =>
      runQueue({
        arrivals: exponential,
        service: exponential,
        load: 0.8,
        jobs: 2000,
        random: new Random(seed),
      }).waits;
    expect(run("a")).toEqual(run("a"));
    expect(run("a")).not.toEqual(run("b"));
  });
});
