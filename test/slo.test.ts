/** SLOs as text: what is read, what is refused and why, and when a value keeps an objective. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  durationText,
  isMet,
  type Objective,
  parseSlo,
  percentText,
  SloError,
  valueText,
  withUnansweredLimited,
} from "../sim/slo.ts";

function only(text: string): Objective {
  const [objective] = parseSlo(text).objectives;
  if (objective === undefined) throw new Error("no objective");
  return objective;
}

function problem(text: string): string {
  try {
    parseSlo(text);
  } catch (error) {
    if (error instanceof SloError) return error.message;
    throw error;
  }
  return "";
}

describe("slo: what is read", () => {
  it("reads latencies, shares and several of both, in their order", () => {
    const slo = parseSlo("ttft p99 <= 2s, e2e p99 <= 30s, failed <= 0.1%");
    expect(slo.objectives).toEqual([
      {
        kind: "latency",
        metric: "ttft",
        statistic: 0.99,
        comparison: "<=",
        limitMs: 2000,
        name: "TTFT p99",
        text: "TTFT p99 ≤ 2 s",
      },
      {
        kind: "latency",
        metric: "e2e",
        statistic: 0.99,
        comparison: "<=",
        limitMs: 30_000,
        name: "E2E p99",
        text: "E2E p99 ≤ 30 s",
      },
      {
        kind: "share",
        metric: "failed",
        comparison: "<=",
        limit: 0.001,
        name: "failed",
        text: "failed ≤ 0.1%",
      },
    ]);
    expect(slo.text).toBe("TTFT p99 ≤ 2 s, E2E p99 ≤ 30 s, failed ≤ 0.1%");
  });

  it.each([
    ["tpot mean < 50ms", { metric: "tpot", statistic: "mean", comparison: "<", limitMs: 50 }],
    ["TTFT P99.9<=1.5min", { metric: "ttft", statistic: 0.999, limitMs: 90_000 }],
    ["queue p50 ≤ 800 µs", { metric: "queue", statistic: 0.5, comparison: "<=", limitMs: 0.8 }],
    ["queue p50 <= 800us", { limitMs: 0.8 }],
    ["queue p5 <= .5 s", { statistic: 0.05, limitMs: 500 }],
    ["attainment >= 99 %", { metric: "attainment", comparison: ">=", limit: 0.99 }],
    ["attainment ≥ 99%", { comparison: ">=" }],
    ["refused < 1%", { metric: "refused", comparison: "<", limit: 0.01 }],
    ["failed <= 0%", { limit: 0 }],
  ])("reads %s", (text, expected) => {
    expect(only(text)).toMatchObject(expected);
  });

  it("reads its own text again as the same SLO, whatever the numbers", () => {
    const latency = fc.record({
      metric: fc.constantFrom("ttft", "tpot", "e2e", "queue"),
      statistic: fc.constantFrom("mean", "p50", "p90", "p99", "p99.9"),
      sign: fc.constantFrom("<=", "<"),
      limit: fc.constantFrom("1 µs", "250ms", "12.5 s", "3min"),
    });
    fc.assert(
      fc.property(latency, ({ metric, statistic, sign, limit }) => {
        const slo = parseSlo(`${metric} ${statistic} ${sign} ${limit}`);
        expect(parseSlo(slo.text)).toEqual(slo);
      }),
    );
  });

  it("lets a trailing comma and line breaks be", () => {
    expect(parseSlo("ttft p99 <= 2s,\nfailed <= 1%,\n").objectives).toHaveLength(2);
  });
});

describe("slo: what is refused, with the part at fault and what is accepted", () => {
  it.each([
    ["", /is empty; write for example/],
    ["   ", /is empty/],
    ["ttft p99 <= 2s, , failed <= 1%", /part 2 .* is empty/],
    ["fast", /part 1 .*"fast".* no comparison/],
    ["ttft p99 2s", /no comparison/],
    ["latency p99 <= 2s", /unknown metric "latency"; accepted: ttft, tpot, e2e, queue, failed/],
    ["<= 2s", /names no metric/],
    ["ttft <= 2s", /ttft needs a statistic; accepted: mean, or a percentile/],
    ["ttft p100 <= 2s", /unknown statistic "p100"/],
    ["ttft p0 <= 2s", /unknown statistic "p0"/],
    ["ttft max <= 2s", /unknown statistic "max"/],
    ["ttft 99 <= 2s", /unknown statistic "99"/],
    ["ttft p99 total <= 2s", /"total" is too much/],
    ["ttft p99 >= 2s", /a latency has an upper limit; accepted: <= or </],
    ["ttft p99 = 2s", /"=" is no comparison here/],
    ["ttft p99 => 2s", /"=>" is no comparison/],
    ["ttft p99 <= 2", /"2" is no time; .* unit µs, ms, s or min/],
    ["ttft p99 <= 0s", /no time; accepted: a number above 0/],
    ["ttft p99 <= -1s", /no time/],
    ["ttft p99 <= 2h", /no time/],
    ["ttft p99 <= 2%", /no time/],
    ["ttft p99 <= 1e3ms", /no time/],
    ["ttft p99 <= 2toString", /no time/],
    ["failed p99 <= 1%", /failed is a share and takes no statistic/],
    ["failed <= 0.1", /"0.1" is no share; .* with %/],
    ["failed <= 101%", /no share/],
    ["failed >= 1%", /failed has an upper limit/],
    ["attainment <= 99%", /attainment has a lower limit; accepted: >=/],
    ["ttft p99 <= 2s, ttft p99 <= 3s", /part 2 .* limits what "TTFT p99 ≤ 2 s" limits already/],
    [Array.from({ length: 21 }, (_, i) => `ttft p${i + 1} <= 1s`).join(","), /at most 20/],
  ])("%s", (text, says) => {
    expect(problem(text)).toMatch(says);
  });

  it("takes two percentiles of one metric: they are different objectives", () => {
    expect(problem("ttft p50 <= 1s, ttft p99 <= 2s")).toBe("");
  });

  it("answers any text with an SLO or an SloError, never with something else", () => {
    fc.assert(
      fc.property(fc.string(), (text) => {
        try {
          expect(parseSlo(text).objectives.length).toBeGreaterThan(0);
        } catch (error) {
          expect(error).toBeInstanceOf(SloError);
        }
      }),
    );
  });
});

describe("slo: with what is unanswered limited", () => {
  const limited = (text: string) => withUnansweredLimited(parseSlo(text));

  it("takes the limit on failures for refusals, and 1 % where there is none", () => {
    expect(limited("ttft p99 <= 2s, failed <= 0.1%")).toMatchObject({
      text: "TTFT p99 ≤ 2 s, failed ≤ 0.1%, refused ≤ 0.1%",
      added: ["refused ≤ 0.1%"],
    });
    expect(limited("ttft p99 <= 2s").added).toEqual(["failed ≤ 1%", "refused ≤ 1%"]);
    expect(limited("ttft p99 <= 2s, refused <= 5%").added).toEqual(["failed ≤ 1%"]);
  });

  it("leaves an SLO that says it all, or that asks for attainment, as it is", () => {
    for (const text of ["failed <= 1%, refused <= 2%", "ttft p99 <= 1s, attainment >= 99%"]) {
      expect(limited(text)).toEqual(parseSlo(text));
    }
  });
});

describe("slo: values", () => {
  it("keeps an objective up to its limit, the limit itself by the sign", () => {
    expect(isMet(only("ttft p99 <= 2s"), 2000)).toBe(true);
    expect(isMet(only("ttft p99 < 2s"), 2000)).toBe(false);
    expect(isMet(only("ttft p99 <= 2s"), 2000.1)).toBe(false);
    expect(isMet(only("attainment >= 99%"), 0.99)).toBe(true);
    expect(isMet(only("attainment > 99%"), 0.99)).toBe(false);
    expect(isMet(only("failed <= 0.1%"), 0.0011)).toBe(false);
  });

  it("writes values with a unit and the digits that count", () => {
    expect([0.0005, 0.85, 12.34, 2000, 95_000, 600_000, 3_600_000].map(durationText)).toEqual([
      "0.5 µs",
      "850 µs",
      "12.3 ms",
      "2 s",
      "95 s",
      "10 min",
      "60 min",
    ]);
    expect(valueText(only("ttft p99 <= 2s"), undefined)).toBe("none");
    // Not "100 %": a share that is not whole must not look so.
    expect([0.999999, 0.000001].map(percentText)).toEqual(["> 99.999 %", "< 0.001 %"]);
    expect([0, 1, 0.9996, 0.00012, 0.5].map(percentText)).toEqual([
      "0 %",
      "100 %",
      "99.960 %",
      "0.012 %",
      "50.0 %",
    ]);
  });
});
