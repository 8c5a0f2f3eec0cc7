import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  type CallResult,
  CircuitBreaker,
  type CircuitCause,
  type CircuitOptions,
  circuitDefaults,
} from "../actors/circuit-breaker.ts";

fc.configureGlobal({ seed: 20_261_124 });

/** A closed circuit and calls of its present era on it. */
function closed(options: Partial<CircuitOptions> = {}) {
  const breaker = new CircuitBreaker(options);
  const call = (result: CallResult, nowMs: number, permit = false) =>
    breaker.settle(result, breaker.era, permit, nowMs);
  const calls = (results: readonly CallResult[], nowMs: number) =>
    results.map((result) => call(result, nowMs)).find((cause) => cause !== undefined);
  return { breaker, call, calls };
}

/** Opened at `nowMs` with the middle of its jitter, and half open right after its time out. */
function halfOpen(options: Partial<CircuitOptions> = {}, nowMs = 0) {
  const world = closed(options);
  world.breaker.condemn("health", nowMs);
  const atMs = nowMs + world.breaker.open("health", 0.5, nowMs);
  world.breaker.becomeHalfOpen(atMs);
  world.breaker.admitTrials();
  return { ...world, atMs };
}

function close({ breaker, call }: ReturnType<typeof closed>, nowMs: number) {
  for (let i = 0; i < circuitDefaults.halfOpenSuccesses; i++) {
    expect(breaker.tryPermit(nowMs)).toBe(true);
    call("ok", nowMs, true);
  }
  expect(breaker.state).toBe("closed");
}

const times = (count: number, result: CallResult): CallResult[] => new Array(count).fill(result);

describe("circuit breaker: what trips it", () => {
  it("trips on the third connection failure in a row, not on the second", () => {
    const { call } = closed();
    expect(call("failed_local", 0)).toBeUndefined();
    expect(call("failed_local", 1)).toBeUndefined();
    expect(call("failed_local", 2)).toBe("consecutive_local");
  });

  it("trips on the fifth gateway failure in a row, not on the fourth", () => {
    const { call, calls } = closed();
    expect(calls(times(4, "failed_gateway"), 0)).toBeUndefined();
    expect(call("failed_gateway", 1)).toBe("consecutive_gateway");
  });

  it("a success begins the count in a row anew; a slow call or one that says nothing does not", () => {
    const { call, calls } = closed();
    calls([...times(2, "failed_local"), ...times(4, "failed_gateway"), "ok"], 0);
    expect(calls([...times(2, "failed_local"), ...times(4, "failed_gateway")], 1)).toBeUndefined();
    expect(call("slow", 2)).toBeUndefined();
    expect(call("none", 2)).toBeUndefined();
    expect(call("failed_gateway", 3)).toBe("consecutive_gateway");
  });

  it("trips when half of at least twenty calls in the window failed", () => {
    const pairs: CallResult[] = Array.from({ length: 19 }, (_, i) =>
      i % 2 === 0 ? "failed_gateway" : "ok",
    );
    const { call, calls } = closed();
    expect(calls(pairs, 0)).toBeUndefined(); // 10 of 19, more than half: too few calls.
    expect(call("ok", 1)).toBe("failure_rate"); // 10 of 20.
  });

  it("trips when four in five calls were slow", () => {
    const { call, calls } = closed();
    expect(calls([...times(4, "ok"), ...times(15, "slow")], 0)).toBeUndefined();
    expect(call("slow", 1)).toBe("slow_rate"); // 16 of 20.
  });

  it("forgets a call after its window", () => {
    const old = closed();
    old.calls([...times(4, "failed_gateway"), "ok", ...times(4, "failed_gateway"), "ok"], 0);
    expect(old.breaker.numbers(26_999).failures).toBe(8);
    expect(old.breaker.numbers(30_000).failures).toBe(0);
    expect(old.breaker.numbers(1_000_000_000).calls).toBe(0);
  });

  it("without calls nothing trips, however much time passes", () => {
    fc.assert(
      fc.property(fc.array(fc.nat(600_000), { maxLength: 30 }), (steps) => {
        const { breaker, call } = closed();
        let nowMs = 0;
        for (const step of steps) {
          nowMs += step;
          expect(call("none", nowMs)).toBeUndefined();
          expect(breaker.overdue(nowMs)).toBeUndefined();
          expect(breaker.numbers(nowMs)).toMatchObject({ calls: 0, failures: 0, slow: 0 });
          expect(breaker.ramp(nowMs)).toBe(1);
        }
      }),
    );
  });

  it("health and wedging trip it at once; a second wish waits for the answer to the first", () => {
    const { breaker, calls } = closed();
    expect(breaker.condemn("wedged", 0)).toBe("wedged");
    expect(breaker.condemn("health", 0)).toBeUndefined();
    expect(calls(times(10, "failed_local"), 0)).toBeUndefined();
    expect(breaker.state).toBe("closed"); // It never opens by itself.
    expect(breaker.ramp(0)).toBe(0.1);
  });

  it("counts exactly: the same verdicts as a list of all calls (any results and times)", () => {
    const results = fc.constantFrom<CallResult>(
      "ok",
      "ok",
      "ok",
      "failed_local",
      "failed_gateway",
      "slow",
      "slow",
      "none",
    );
    const step = fc.record({
      waitMs: fc.constantFrom(0, 1, 500, 2999, 3000, 9000, 31_000),
      results,
    });
    fc.assert(
      fc.property(
        fc.array(step, { minLength: 20, maxLength: 200 }),
        fc.constantFrom(3, 8, 20),
        (steps, callsMin) => {
          const { breaker, call } = closed({ callsMin });
          let nowMs = 0;
          let log: { bucket: number; result: CallResult }[] = [];
          for (const { waitMs, results: result } of steps) {
            nowMs += waitMs;
            const bucket = Math.floor(nowMs / 3000);
            if (result !== "none") log.push({ bucket, result });
            const expected = result === "none" ? undefined : verdict(log, bucket, callsMin);
            const cause = call(result, nowMs);
            expect(cause).toBe(expected);
            if (cause === undefined) continue;
            breaker.stayClosed(nowMs); // Begins anew …
            log = [];
            nowMs += 10_000; // … and may wish again after its probation.
          }
        },
      ),
    );
  });
});

/** The rules as they read, over all calls. */
function verdict(
  log: readonly { bucket: number; result: CallResult }[],
  bucket: number,
  callsMin: number,
): CircuitCause | undefined {
  const sinceOk = log.slice(log.findLastIndex(({ result }) => result === "ok") + 1);
  const inRow = (wanted: CallResult) => sinceOk.filter(({ result }) => result === wanted).length;
  if (inRow("failed_local") >= 3) return "consecutive_local";
  if (inRow("failed_gateway") >= 5) return "consecutive_gateway";
  const recent = log.filter((entry) => entry.bucket > bucket - 10);
  const share = (test: (result: CallResult) => boolean) =>
    recent.filter(({ result }) => test(result)).length / recent.length;
  if (recent.length < callsMin) return undefined;
  if (share((result) => result.startsWith("failed")) >= 0.5) return "failure_rate";
  return share((result) => result === "slow") >= 0.8 ? "slow_rate" : undefined;
}

describe("circuit breaker: probation", () => {
  it("a refused ejection keeps it closed at the least weight, without another wish for 10 s", () => {
    const { breaker, calls } = closed();
    expect(calls(times(5, "failed_gateway"), 0)).toBe("consecutive_gateway");
    breaker.stayClosed(0);
    expect(breaker.state).toBe("closed");
    expect(calls(times(20, "failed_gateway"), 9_999)).toBeUndefined();
    expect(breaker.ramp(9_999)).toBe(0.1);
    expect(calls(["failed_gateway"], 10_000)).toBe("consecutive_gateway");
  });

  it("ends in a slow start when no new failures come", () => {
    const { breaker } = closed();
    breaker.condemn("health", 0);
    breaker.stayClosed(0);
    expect(breaker.ramp(10_000)).toBe(0.1);
    expect(breaker.ramp(40_000)).toBe(0.5);
    expect(breaker.ramp(70_000)).toBe(1);
  });
});

describe("circuit breaker: time out", () => {
  /** Ejects it `count` times in a row, from half open, and returns the times out. */
  function timesOut(count: number, random: number, options: Partial<CircuitOptions> = {}) {
    const breaker = new CircuitBreaker(options);
    const out: number[] = [];
    let nowMs = 0;
    breaker.condemn("health", nowMs);
    for (let i = 0; i < count; i++) {
      const forMs = breaker.open(i === 0 ? "health" : "probe_failed", random, nowMs);
      out.push(forMs);
      nowMs += forMs;
      breaker.becomeHalfOpen(nowMs);
    }
    return out;
  }

  it("doubles with each ejection up to five minutes", () => {
    expect(timesOut(7, 0.5)).toEqual([10_000, 20_000, 40_000, 80_000, 160_000, 300_000, 300_000]);
  });

  it("is spread by a fifth either way", () => {
    fc.assert(
      fc.property(fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }), (random) => {
        const [first = 0, second = 0] = timesOut(2, random);
        expect(first).toBeGreaterThanOrEqual(8000);
        expect(first).toBeLessThanOrEqual(12_000);
        expect(second).toBeCloseTo(2 * first, 6);
      }),
    );
    expect(timesOut(1, 0)).toEqual([8000]);
  });

  it("forgives one ejection per five minutes closed, and any after fifteen minutes", () => {
    const afterClosedFor = (cleanMs: number) => {
      const world = halfOpen();
      const { breaker } = world;
      let nowMs = world.atMs;
      for (let i = 0; i < 2; i++) {
        nowMs += breaker.open("probe_failed", 0.5, nowMs);
        breaker.becomeHalfOpen(nowMs);
      }
      breaker.admitTrials();
      close(world, nowMs); // After 10 + 20 + 40 s, with three ejections.
      nowMs += cleanMs;
      breaker.condemn("health", nowMs);
      return breaker.open("health", 0.5, nowMs);
    };
    expect(afterClosedFor(299_999)).toBe(80_000);
    expect(afterClosedFor(300_000)).toBe(40_000);
    expect(afterClosedFor(600_000)).toBe(20_000);
    expect(afterClosedFor(900_000)).toBe(10_000);
    // Never closed, so never clean: the first two have become too old all the same.
    expect(timesOut(12, 0.5, { ejectionMemoryMs: 60_000 })[11]).toBeLessThan(80_001);
  });

  it("remembers few ejections, however many there were", () => {
    const { breaker } = halfOpen({ openMs: 1, openMsMax: 64 });
    for (let nowMs = 1; nowMs < 1000; nowMs++) {
      expect(breaker.open("probe_failed", 0.5, nowMs)).toBeLessThanOrEqual(64);
      breaker.becomeHalfOpen(nowMs);
    }
    expect(breaker.openForMs).toBe(64);
    expect(breaker.numbers(1000).ejections).toBe(32);
  });
});

describe("circuit breaker: half open", () => {
  it("lets nothing in before its probe is answered, then two calls at once", () => {
    const { breaker } = closed();
    breaker.condemn("health", 0);
    breaker.open("health", 0.5, 0);
    expect(breaker.tryPermit(1)).toBe(false);
    breaker.becomeHalfOpen(10_000);
    expect([breaker.isProbing, breaker.tryPermit(10_000)]).toEqual([true, false]);
    breaker.admitTrials();
    const tries = [1, 2, 3].map(() => breaker.tryPermit(10_000));
    expect(tries).toEqual([true, true, false]);
  });

  it("closes at the third success of a permit holder, and counts no call twice", () => {
    const { breaker, call, atMs } = halfOpen();
    for (let i = 0; i < 3; i++) {
      expect(breaker.state).toBe("half_open");
      expect(breaker.tryPermit(atMs)).toBe(true);
      call("ok", atMs, true); // Its first token.
      if (i < 2) call("ok", atMs, false); // Its end, later.
    }
    expect(breaker.state).toBe("closed");
    expect(breaker.numbers(atMs)).toMatchObject({ calls: 0, consecutiveGateway: 0, ejections: 1 });
  });

  it("one failure names the cause to open, of a permit holder or of a stream that broke later", () => {
    for (const permit of [true, false]) {
      const { breaker, call, atMs } = halfOpen();
      breaker.tryPermit(atMs);
      expect(call("failed_gateway", atMs, permit)).toBe("probe_failed");
    }
    const { breaker, call, atMs } = halfOpen();
    breaker.tryPermit(atMs);
    expect(call("slow", atMs, true)).toBe("probe_failed");
    expect(breaker.condemn("health", atMs)).toBe("health");
  });

  it("a call that says nothing gives its permit back and proves nothing", () => {
    const { breaker, call, atMs } = halfOpen();
    for (let i = 0; i < 10; i++) {
      expect(breaker.tryPermit(atMs + i)).toBe(true);
      expect(call("none", atMs + i, true)).toBeUndefined();
    }
    expect([breaker.state, breaker.permitsLeft]).toEqual(["half_open", 2]);
    expect(breaker.overdue(atMs + 1_000_000)).toBeUndefined(); // Nobody asked it anything.
  });

  it("silence of a call for 30 s is a failure; a result renews the time", () => {
    const { breaker, call, atMs } = halfOpen();
    breaker.tryPermit(atMs);
    breaker.tryPermit(atMs);
    expect(breaker.overdue(atMs + 29_999)).toBeUndefined();
    call("ok", atMs + 20_000, true);
    expect(breaker.overdue(atMs + 49_999)).toBeUndefined();
    expect(breaker.overdue(atMs + 50_000)).toBe("probe_silent");
    // A further call, or one that ends without a result, does not.
    breaker.tryPermit(atMs + 40_000);
    call("none", atMs + 45_000, true);
    expect(breaker.overdue(atMs + 50_000)).toBe("probe_silent");
  });

  it("slow start never falls, begins at a tenth and ends at one", () => {
    fc.assert(
      fc.property(fc.array(fc.nat(5000), { minLength: 30, maxLength: 60 }), (steps) => {
        const world = halfOpen();
        expect(world.breaker.ramp(world.atMs)).toBe(0.1);
        close(world, world.atMs);
        let [nowMs, last] = [world.atMs, 0.1];
        for (const step of steps) {
          nowMs += step;
          const ramp = world.breaker.ramp(nowMs);
          expect(ramp).toBeGreaterThanOrEqual(last);
          expect(ramp).toBeLessThanOrEqual(1);
          last = ramp;
        }
        expect(world.breaker.ramp(world.atMs + 30_000)).toBe(0.5);
        expect(world.breaker.ramp(world.atMs + 60_000)).toBe(1);
      }),
    );
  });
});

describe("circuit breaker: stragglers", () => {
  it("a call of an earlier era changes nothing, in whatever state it comes back", () => {
    const results = fc.array(
      fc.constantFrom<CallResult>("ok", "failed_local", "failed_gateway", "slow", "none"),
      { maxLength: 40 },
    );
    const states = fc.constantFrom("open", "probing", "half_open", "closed");
    fc.assert(
      fc.property(results, states, fc.boolean(), (late, state, permit) => {
        const world = closed();
        const { breaker } = world;
        const { era } = breaker;
        breaker.condemn("health", 0);
        const atMs = breaker.open("health", 0.5, 0);
        if (state !== "open") breaker.becomeHalfOpen(atMs);
        if (state === "half_open" || state === "closed") breaker.admitTrials();
        if (state === "closed") close(world, atMs);
        const before = [breaker.state, breaker.permitsLeft, breaker.numbers(atMs)];
        for (const result of late) {
          expect(breaker.settle(result, era, permit, atMs)).toBeUndefined();
        }
        expect([breaker.state, breaker.permitsLeft, breaker.numbers(atMs)]).toEqual(before);
      }),
    );
  });
});

describe("circuit breaker: any life", () => {
  type Step =
    | { do: "wait"; ms: number }
    | { do: "admit" }
    | { do: "settle"; which: number; result: CallResult }
    | { do: "condemn" | "decide_yes" | "decide_no" | "half_open" | "trials" | "overdue" };

  const step: fc.Arbitrary<Step> = fc.oneof(
    fc.record({ do: fc.constant("wait" as const), ms: fc.constantFrom(0, 10, 4000, 31_000) }),
    { weight: 4, arbitrary: fc.constant({ do: "admit" as const }) },
    {
      weight: 5,
      arbitrary: fc.record({
        do: fc.constant("settle" as const),
        which: fc.nat(30),
        result: fc.constantFrom<CallResult>(...times(8, "ok"), "failed_local", "slow", "none"),
      }),
    },
    {
      weight: 3,
      arbitrary: fc.record({ do: fc.constantFrom("half_open" as const, "trials" as const) }),
    },
    fc.record({
      do: fc.constantFrom(
        "condemn" as const,
        "decide_yes" as const,
        "decide_no" as const,
        "overdue" as const,
      ),
    }),
  );
  const legal = ["closed open", "open half_open", "half_open open", "half_open closed"];

  it("moves only along the legal transitions, and never exceeds its permits while half open", () => {
    const seen = new Set<string>();
    fc.assert(
      fc.property(fc.array(step, { minLength: 50, maxLength: 300 }), (steps) => {
        const breaker = new CircuitBreaker({ localFailures: 2 });
        let calls: { era: number; permit: boolean }[] = [];
        let wish: CircuitCause | undefined;
        let nowMs = 0;
        let state = breaker.state;
        const follow = (cause: CircuitCause | undefined) => {
          if (cause === undefined) return;
          expect(breaker.state).not.toBe("open");
          expect(wish).toBeUndefined();
          if (breaker.state === "half_open") breaker.open(cause, 0.5, nowMs);
          else wish = cause;
        };
        const observe = () => {
          if (breaker.state === state) return;
          const move = `${state} ${breaker.state}`;
          expect(legal).toContain(move);
          seen.add(move);
          state = breaker.state;
        };
        for (const one of steps) {
          if (one.do === "wait") nowMs += one.ms;
          else if (one.do === "admit") {
            const permit = breaker.tryPermit(nowMs);
            expect(permit && breaker.state !== "half_open").toBe(false);
            if (breaker.state === "closed" || permit) calls.push({ era: breaker.era, permit });
          } else if (one.do === "settle") {
            const call = calls[one.which % Math.max(1, calls.length)];
            if (call === undefined) continue;
            calls = calls.filter((other) => other !== call);
            follow(breaker.settle(one.result, call.era, call.permit, nowMs));
          } else if (one.do === "condemn") follow(breaker.condemn("wedged", nowMs));
          else if (one.do === "overdue") follow(breaker.overdue(nowMs));
          else if (one.do === "half_open" && breaker.state === "open")
            breaker.becomeHalfOpen(nowMs);
          else if (one.do === "trials" && breaker.isProbing) breaker.admitTrials();
          else if (one.do === "decide_yes" && wish !== undefined) {
            breaker.open(wish, 0.5, nowMs);
            wish = undefined;
          } else if (one.do === "decide_no" && wish !== undefined) {
            breaker.stayClosed(nowMs);
            wish = undefined;
          }
          observe();
          const isTrial = (call: (typeof calls)[number]) => call.permit && call.era === breaker.era;
          const trials = breaker.state === "half_open" ? calls.filter(isTrial).length : 0;
          expect(trials).toBeLessThanOrEqual(2);
          if (breaker.state === "half_open" && !breaker.isProbing) {
            expect(breaker.permitsLeft).toBe(2 - trials);
          } else expect(breaker.permitsLeft).toBe(0);
          if (breaker.state !== "closed") expect(breaker.ramp(nowMs)).toBe(0.1);
          const { calls: counted, failures, slow } = breaker.numbers(nowMs);
          expect(failures + slow).toBeLessThanOrEqual(counted);
          expect(Math.min(failures, slow, counted)).toBeGreaterThanOrEqual(0);
        }
      }),
    );
    expect([...seen].sort()).toEqual([...legal].sort()); // The steps do reach all of it.
  });

  it("refuses options that contradict each other", () => {
    expect(() => new CircuitBreaker({ openMs: 500_000 })).toThrow("openMs");
    expect(() => new CircuitBreaker({ slowStartWeightMin: 0 })).toThrow("slowStartWeightMin");
    expect(() => new CircuitBreaker({ halfOpenPermits: 0 })).toThrow("permit");
  });
});
