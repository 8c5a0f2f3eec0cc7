/** Made-up loads as text, and the load of chat sessions. */
import { describe, expect, it } from "vitest";
import { LoadTextError, parseLoad } from "../sim/load-text.ts";
import { SESSION_BLOCK_TOKENS, sessionLoad } from "../sim/session-load.ts";
import { LoadMeter } from "../sim/trace-statistics.ts";

function statistics(text: string) {
  const meter = new LoadMeter();
  for (const request of parseLoad(text, 1)()) meter.add(request);
  return meter.summary();
}

describe("load text", () => {
  it("poisson: rate, lengths and end are those stated, and each pass is the same", () => {
    const load = statistics("poisson:20/s in=512 out=100/0.5 for=10m");
    expect(load.ratePerSecond).toBeCloseTo(20, 0);
    expect(load.cv).toBeCloseTo(1, 1);
    expect(load.inputTokens.max).toBe(512);
    expect(load.outputTokens.mean).toBeGreaterThan(95);
    expect(load.outputTokens.mean).toBeLessThan(105);
    const made = parseLoad("poisson:20/s requests=50", 3);
    expect([...made()]).toEqual([...made()]);
    expect([...made()]).toHaveLength(50);
    expect([...made()]).not.toEqual([...parseLoad("poisson:20/s requests=50", 4)()]);
  });

  it("gamma, daily and ramp take their own words", () => {
    expect(statistics("gamma:20/s cv=3 for=10m").cv).toBeGreaterThan(2);
    expect(statistics("daily:10/s swing=0.9 period=10m for=20m").idc60s).toBeGreaterThan(5);
    const ramp = [...parseLoad("ramp:1..20/s, over=5m, for=5m", 1)()];
    const early = ramp.filter(({ atUs }) => atUs < 60e6).length;
    const late = ramp.filter(({ atUs }) => atUs >= 240e6).length;
    expect(late).toBeGreaterThan(4 * early);
  });

  it("says what is wrong and what is accepted", () => {
    const error = (text: string) => {
      try {
        parseLoad(text, 1);
      } catch (thrown) {
        return thrown instanceof LoadTextError ? thrown.message : "another error";
      }
      return "accepted";
    };
    expect(error("poison:28/s for=1m")).toContain("write one of poisson, gamma, daily, ramp");
    expect(error("poisson:fast for=1m")).toContain('"fast" is no rate');
    expect(error("poisson:28/s")).toContain("it has no end");
    expect(error("poisson:28/s for=1m cv=2")).toContain("cv= does not belong");
    expect(error("gamma:28/s for=1m")).toContain("cv= is missing");
    expect(error("poisson:28/s for=1m in=big")).toContain("in=big is no length");
    expect(error("poisson:28/s for=long")).toContain("for=long is no time");
    expect(error("poisson:28/s for=1m for=2m")).toContain("given twice");
    expect(error("poisson:28/s for=1m quick")).toContain("is not name=value");
    expect(error("poisson:0/s for=1m")).toContain("rate is 0");
    expect(error("sessions:28/s")).toContain('"for=" is missing');
  });
});

describe("session load", () => {
  const load = [...sessionLoad({ seed: 1, rate: 28, durationUs: 200e6 })];

  it("is Poisson, 60 % in 400 sessions, with the lengths it was described by", () => {
    const inSessions = load.filter(({ session }) => session !== undefined);
    expect(load.length / 200).toBeCloseTo(28, -1);
    expect(inSessions.length / load.length).toBeCloseTo(0.6, 1);
    expect(new Set(inSessions.map(({ session }) => session)).size).toBe(400);
    const outputs = load.map(({ outputTokens }) => outputTokens).sort((a, b) => a - b);
    expect(outputs[outputs.length >> 1]).toBeGreaterThan(138);
    expect(outputs[outputs.length >> 1]).toBeLessThan(158);
    expect(outputs[0]).toBeGreaterThanOrEqual(8);
    expect(outputs.at(-1)).toBeLessThanOrEqual(1500);
  });

  it("a session's prompt begins with its last one, until it starts anew", () => {
    const before = new Map<string, readonly number[]>();
    let grown = 0;
    for (const { session, prefix = [], inputTokens, blockTokens } of load) {
      if (session === undefined) continue;
      expect(blockTokens).toBe(SESSION_BLOCK_TOKENS);
      expect(prefix.length).toBe(Math.floor(inputTokens / SESSION_BLOCK_TOKENS));
      const last = before.get(session);
      if (last?.every((id, index) => prefix[index] === id)) grown++;
      before.set(session, prefix);
    }
    expect(grown).toBeGreaterThan(0.9 * (load.filter(({ session }) => session).length - 400));
  });
});
