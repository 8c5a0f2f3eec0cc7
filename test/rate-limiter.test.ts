import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { OutputQuantile } from "../actors/output-quantile.ts";
import type { Limits } from "../actors/protocol.ts";
import {
  type AdmitReply,
  type LimiterDescription,
  limiterDefaults,
  RateLimiterActor,
  type RateLimiterOptions,
} from "../actors/rate-limiter.ts";
import { testActor } from "./actor-kit.ts";
import { TokenBucket } from "./token-bucket-oracle.ts";

const MINUTE_MS = 60_000;
const DAY_MS = 86_400_000;
const ASSUMED = 1024;

type Admit = {
  requestId: string;
  key?: string;
  owner?: string;
  limits?: Limits;
  model?: string;
  promptTokens?: number;
  maxTokens?: number;
  /** From now. */
  expiresMs?: number;
  takeover?: number;
};

/** The actor with a few words for talking to it. */
class Limiter {
  readonly kit;
  readonly #keys = new Map<string, string>();

  constructor(options: Partial<RateLimiterOptions> = {}) {
    this.kit = testActor(new RateLimiterActor({ ...limiterDefaults, ...options }));
  }

  admit(admit: Admit): AdmitReply {
    const { requestId, key = "k", owner = "requests", limits = {}, model = "m" } = admit;
    this.#keys.set(requestId, key);
    const reply = this.kit.ask<AdmitReply>((replyTo) => ({
      kind: "limiter.admit",
      requestId,
      owner,
      key,
      limits,
      model,
      promptTokens: admit.promptTokens ?? 10,
      ...(admit.maxTokens === undefined ? {} : { maxTokens: admit.maxTokens }),
      expiresAtMs: this.kit.nowMs + (admit.expiresMs ?? 600_000),
      ...(admit.takeover === undefined ? {} : { takeover: admit.takeover }),
      replyTo,
    }));
    if (reply === undefined) throw new Error("admit is answered at once");
    return reply;
  }

  settle(requestId: string, promptTokens = 0, outputTokens = 0, cachedTokens = 0): void {
    const key = this.#keys.get(requestId) ?? "k";
    this.kit.send({
      kind: "limiter.settle",
      requestId,
      key,
      promptTokens,
      cachedTokens,
      outputTokens,
    });
  }

  describe(): LimiterDescription {
    const description = this.kit.ask<LimiterDescription>((replyTo) => ({
      kind: "limiter.describe",
      replyTo,
    }));
    if (description === undefined) throw new Error("describe is answered at once");
    return description;
  }

  key(name = "k"): LimiterDescription["keys"][number] | undefined {
    return this.describe().keys.find(({ key }) => key === name);
  }
}

const granted = (reply: AdmitReply): boolean => reply.kind === "granted";
const codeOf = (reply: AdmitReply): string => (reply.kind === "granted" ? "granted" : reply.code);

describe("rate limiter: in a cluster", () => {
  it("rate limiter: a key taken over starts with half its bursts, once for each takeover", () => {
    const limits = {
      requestsPerMinute: 60,
      requestBurst: 10,
      tokensPerMinute: 600,
      tokenBurst: 600,
    };
    const limiter = new Limiter();
    const remaining = (requestId: string, takeover?: number): (number | undefined)[] => {
      const more = takeover === undefined ? {} : { takeover };
      const { state } = limiter.admit({
        requestId,
        limits,
        promptTokens: 0,
        maxTokens: 1,
        ...more,
      });
      return [state.requests?.remaining, state.tokens?.remaining];
    };
    expect(remaining("a")).toEqual([9, 599]);
    expect(remaining("b", 3)).toEqual([4, 299]);
    expect(remaining("c", 3)).toEqual([3, 298]);
    expect(remaining("d", 2)).toEqual([2, 297]);
    limiter.kit.advance(30_000);
    expect(remaining("e", 4)).toEqual([4, 299]);
    // One that has less than half is left alone.
    expect(remaining("f", 5)).toEqual([3, 298]);
  });

  it("rate limiter: what a lost peer holds is free again, and stays charged", () => {
    const limits = { requestsPerMinute: 60, requestBurst: 10, concurrent: 3 };
    const limiter = new Limiter();
    for (const requestId of ["a", "b"]) limiter.admit({ requestId, limits, owner: "peer-2" });
    limiter.admit({ requestId: "c", limits, owner: "peer-3" });
    limiter.kit.send({ kind: "limiter.owner_lost", owner: "peer-2" });
    expect(limiter.key()).toMatchObject({ inflight: 1, state: { requests: { remaining: 7 } } });
    expect(limiter.describe().lapses).toBe(2);
  });
});

describe("rate limiter: each limit", () => {
  it("rate limiter: requests a minute pass in a burst and then at their rate, with the wait told", () => {
    const limiter = new Limiter();
    const limits = { requestsPerMinute: 60, requestBurst: 2 };
    expect(limiter.admit({ requestId: "a", limits })).toEqual({
      kind: "granted",
      reservedTokens: 0,
      state: { atMs: 0, requests: { limit: 60, remaining: 1, resetMs: 1000 } },
    });
    expect(granted(limiter.admit({ requestId: "b", limits }))).toBe(true);
    limiter.kit.advance(250);
    expect(limiter.admit({ requestId: "c", limits })).toEqual({
      kind: "refused",
      code: "rate_limit_requests",
      retryAfterMs: 750,
      state: { atMs: 250, requests: { limit: 60, remaining: 0, resetMs: 1750 } },
    });
    limiter.kit.advance(750);
    expect(granted(limiter.admit({ requestId: "c", limits }))).toBe(true);
  });

  it("rate limiter: a burst that is not stated is a sixth of the requests a minute, at least one", () => {
    for (const [requestsPerMinute, burst] of [
      [60, 10],
      [11, 1],
      [1, 1],
      [6000, 1000],
    ] as const) {
      const limiter = new Limiter();
      let passed = 0;
      while (granted(limiter.admit({ requestId: `r${passed}`, limits: { requestsPerMinute } })))
        passed++;
      expect(passed).toBe(burst);
    }
  });

  it("rate limiter: tokens a minute are reserved by estimate and corrected by use (less; more; none)", () => {
    const limiter = new Limiter();
    const limits = { tokensPerMinute: 60_000, tokenBurst: 1000 };
    const remaining = () => limiter.key()?.state.tokens?.remaining;
    const reply = limiter.admit({ requestId: "a", limits, promptTokens: 300, maxTokens: 200 });
    expect(reply).toMatchObject({
      reservedTokens: 500,
      state: { tokens: { limit: 60_000, remaining: 500, resetMs: 500 } },
    });
    limiter.settle("a", 290, 110);
    expect(remaining()).toBe(600);
    limiter.admit({ requestId: "b", limits, promptTokens: 100, maxTokens: 100 });
    limiter.settle("b", 100, 1200); // An overrun: 700 more than there was.
    expect(remaining()).toBe(0);
    expect(limiter.admit({ requestId: "c", limits, promptTokens: 1, maxTokens: 0 })).toMatchObject({
      kind: "refused",
      code: "rate_limit_tokens",
      retryAfterMs: 701,
    });
    limiter.kit.advance(701);
    expect(granted(limiter.admit({ requestId: "c", limits, promptTokens: 1, maxTokens: 0 }))).toBe(
      true,
    );
    limiter.settle("c");
    expect(remaining()).toBe(1);
  });

  it("rate limiter: a prompt token that was cached counts a quarter, or as configured", () => {
    for (const [cachedTokenWeight, used] of [
      [0.25, 100 + 225 + 50],
      [1, 1050],
      [0, 150],
    ] as const) {
      const limiter = new Limiter({ cachedTokenWeight });
      const limits = { tokensPerDay: 10_000 };
      limiter.admit({ requestId: "a", limits, promptTokens: 1000 });
      limiter.settle("a", 1000, 50, 900);
      expect(limiter.key()?.tokensToday).toBe(used);
    }
    const limiter = new Limiter();
    limiter.admit({ requestId: "a", limits: { tokensPerDay: 10_000 } });
    limiter.settle("a", 10, 0, 1000); // More cached than there was: all of it was.
    expect(limiter.key()?.tokensToday).toBe(3);
  });

  it("rate limiter: requests in flight are bounded; a slot is back when one is settled, whatever it used", () => {
    const limiter = new Limiter();
    const limits = { concurrent: 2 };
    limiter.admit({ requestId: "a", limits });
    limiter.admit({ requestId: "b", limits });
    expect(codeOf(limiter.admit({ requestId: "c", limits }))).toBe("rate_limit_concurrency");
    limiter.settle("a");
    expect(granted(limiter.admit({ requestId: "c", limits }))).toBe(true);
    limiter.settle("b", 10, 10);
    expect(granted(limiter.admit({ requestId: "d", limits }))).toBe(true);
  });

  it("rate limiter: a refusal for concurrency says when a slot is likely, from how long requests take", () => {
    const limiter = new Limiter();
    const limits = { concurrent: 2 };
    limiter.admit({ requestId: "a", limits });
    limiter.admit({ requestId: "b", limits });
    expect(limiter.admit({ requestId: "c", limits })).toMatchObject({ retryAfterMs: 500 }); // Nothing known: 1 s / 2.
    limiter.kit.advance(8000);
    limiter.settle("a", 1, 1);
    limiter.admit({ requestId: "d", limits });
    expect(limiter.admit({ requestId: "c", limits })).toMatchObject({ retryAfterMs: 4000 });
    const quick = new Limiter();
    for (const requestId of ["a", "b"]) quick.admit({ requestId, limits: { concurrent: 1 } });
    quick.kit.advance(2);
    quick.settle("a");
    quick.admit({ requestId: "b", limits: { concurrent: 1 } });
    expect(quick.admit({ requestId: "c", limits: { concurrent: 1 } })).toMatchObject({
      retryAfterMs: 50,
    });
    const tokens = { concurrentTokens: 1000 };
    limiter.settle("b", 1, 1);
    limiter.settle("d", 1, 1); // At once: the average falls to 8 s · 0.8.
    limiter.admit({ requestId: "e", limits: tokens, promptTokens: 800, maxTokens: 0 });
    expect(
      limiter.admit({ requestId: "f", limits: tokens, promptTokens: 400, maxTokens: 0 }),
    ).toMatchObject({
      code: "rate_limit_concurrent_tokens",
      retryAfterMs: 1600, // A quarter of what is held must come back: a quarter of 6.4 s.
    });
  });

  it("rate limiter: tokens in flight are bounded by what is reserved, and free when settled", () => {
    const limiter = new Limiter();
    const limits = { concurrentTokens: 1000 };
    expect(
      limiter.admit({ requestId: "a", limits, promptTokens: 500, maxTokens: 100 }),
    ).toMatchObject({ reservedTokens: 600 });
    expect(codeOf(limiter.admit({ requestId: "b", limits, promptTokens: 401, maxTokens: 0 }))).toBe(
      "rate_limit_concurrent_tokens",
    );
    expect(
      granted(limiter.admit({ requestId: "b", limits, promptTokens: 400, maxTokens: 0 })),
    ).toBe(true);
    limiter.settle("a", 5000, 5000);
    expect(limiter.key()).toMatchObject({ reservedTokens: 400, inflight: 1 });
    // The next one takes over the record of a; this key has no tokens a minute that it could give back.
    const both = { concurrentTokens: 1000, tokensPerMinute: 60_000 };
    limiter.admit({ requestId: "c", limits: both, promptTokens: 100, maxTokens: 0 });
    limiter.settle("c", 100, 0);
    limiter.admit({ requestId: "d", limits, promptTokens: 100, maxTokens: 0 });
    limiter.settle("d");
    expect(
      limiter.admit({ requestId: "e", limits: both, promptTokens: 0, maxTokens: 0 }),
    ).toMatchObject({
      state: { tokens: { remaining: 59_900 } },
    });
  });

  it("rate limiter: tokens a day end with the day of the key's first use, and begin anew", () => {
    const limiter = new Limiter();
    const limits = { tokensPerDay: 1000 };
    limiter.kit.advance(5000);
    limiter.admit({
      requestId: "a",
      limits,
      promptTokens: 700,
      maxTokens: 0,
      expiresMs: 2 * DAY_MS,
    });
    limiter.kit.advance(1000);
    expect(
      limiter.admit({ requestId: "b", limits, promptTokens: 301, maxTokens: 0 }),
    ).toMatchObject({
      code: "quota_tokens_per_day",
      retryAfterMs: DAY_MS - 1000,
    });
    expect(
      granted(limiter.admit({ requestId: "b", limits, promptTokens: 300, maxTokens: 0 })),
    ).toBe(true);
    limiter.settle("b", 100, 50);
    expect(limiter.key()?.tokensToday).toBe(850);
    limiter.kit.advance(DAY_MS - 1000);
    expect(limiter.key()?.tokensToday).toBe(0);
    limiter.admit({ requestId: "c", limits, promptTokens: 1000, maxTokens: 0 });
    limiter.settle("a", 10, 10); // Reserved yesterday: today is not touched.
    expect(limiter.key()?.tokensToday).toBe(1000);
    expect(codeOf(limiter.admit({ requestId: "d", limits, promptTokens: 1, maxTokens: 0 }))).toBe(
      "quota_tokens_per_day",
    );
  });

  it("rate limiter: what could never pass is told so, first and for good (each token limit)", () => {
    const cases: Limits[] = [
      { tokensPerMinute: 10_000, tokenBurst: 100 },
      { tokensPerMinute: 100 },
      { concurrentTokens: 100 },
      { tokensPerDay: 100 },
    ];
    for (const more of cases) {
      const limiter = new Limiter();
      const limits = { ...more, requestsPerMinute: 6, requestBurst: 1 };
      limiter.admit({ requestId: "a", limits, promptTokens: 10, maxTokens: 0 });
      const reply = limiter.admit({ requestId: "b", limits, promptTokens: 90, maxTokens: 11 });
      expect(reply).toMatchObject({ code: "request_too_large_for_limit", retryAfterMs: 0 });
      expect(
        codeOf(limiter.admit({ requestId: "c", limits, promptTokens: 90, maxTokens: 10 })),
      ).toBe("rate_limit_requests");
    }
  });

  it("rate limiter: names the first limit that fails, and a refusal leaves no trace in any", () => {
    const all: Limits = {
      requestsPerMinute: 60,
      requestBurst: 3,
      tokensPerMinute: 60_000,
      tokenBurst: 3000,
      concurrent: 3,
      concurrentTokens: 3000,
      tokensPerDay: 3000,
    };
    const order: [Limits, string][] = [
      [{ requestBurst: 1 }, "rate_limit_requests"],
      [{ tokenBurst: 1500 }, "rate_limit_tokens"],
      [{ concurrent: 1 }, "rate_limit_concurrency"],
      [{ concurrentTokens: 1500 }, "rate_limit_concurrent_tokens"],
      [{ tokensPerDay: 1500 }, "quota_tokens_per_day"],
    ];
    for (let first = 0; first < order.length; first++) {
      // All later ones fail too.
      const limits = Object.assign({}, all, ...order.slice(first).map(([part]) => part));
      const limiter = new Limiter();
      limiter.admit({ requestId: "a", limits, promptTokens: 1000, maxTokens: 0 });
      const before = limiter.key();
      const reply = limiter.admit({ requestId: "b", limits, promptTokens: 1000, maxTokens: 0 });
      expect(codeOf(reply)).toBe(order[first]?.[1]);
      expect(reply).toMatchObject({ state: before?.state });
      expect(limiter.key()).toEqual({ ...before, refused: 1 });
      expect(limiter.describe().reservations).toBe(1);
    }
  });
});

describe("rate limiter: estimates", () => {
  const limits = { tokensPerDay: 1_000_000_000 };
  const reserved = (reply: AdmitReply) =>
    reply.kind === "granted" ? reply.reservedTokens : Number.NaN;

  it("rate limiter: output is taken as stated, at most as usual for this key and model, once eight are known", () => {
    const limiter = new Limiter();
    const estimate = (requestId: string, maxTokens?: number, model = "m", key = "k") => {
      const more = maxTokens === undefined ? {} : { maxTokens };
      const tokens = reserved(
        limiter.admit({ requestId, limits, key, model, promptTokens: 100, ...more }),
      );
      limiter.settle(requestId);
      return tokens - 100;
    };
    expect(estimate("a")).toBe(ASSUMED);
    expect(estimate("b", 50)).toBe(50);
    expect(estimate("c", 1e9)).toBe(ASSUMED);
    for (let i = 0; i < 10; i++) {
      limiter.admit({ requestId: `r${i}`, limits });
      limiter.settle(`r${i}`, 10, 100 + i);
    }
    expect(estimate("d")).toBe(107); // The largest of the first eight.
    expect(estimate("e", 1e9)).toBe(107);
    expect(estimate("f", 50)).toBe(50);
    expect(estimate("g", 1e9, "other model")).toBe(ASSUMED);
    expect(estimate("h", 1e9, "m", "other key")).toBe(ASSUMED);
    for (let i = 0; i < 64; i++) {
      limiter.admit({ requestId: `s${i}`, limits });
      limiter.settle(`s${i}`, 10, 5000 + i);
    }
    expect(estimate("i")).toBe(ASSUMED);
    expect(estimate("j", 1e9)).toBeGreaterThan(5000);
  });

  it("rate limiter: refunds teach nothing of outputs", () => {
    const limiter = new Limiter();
    for (let i = 0; i < 20; i++) {
      limiter.admit({ requestId: `r${i}`, limits });
      limiter.settle(`r${i}`);
    }
    expect(reserved(limiter.admit({ requestId: "a", limits, promptTokens: 100 }))).toBe(
      100 + ASSUMED,
    );
  });

  it("rate limiter: an output that we only assume never makes a request too large; a stated one may", () => {
    const limiter = new Limiter();
    const small = { tokensPerMinute: 600 };
    expect(reserved(limiter.admit({ requestId: "a", limits: small, promptTokens: 100 }))).toBe(600);
    expect(codeOf(limiter.admit({ requestId: "b", limits: small, promptTokens: 601 }))).toBe(
      "request_too_large_for_limit",
    );
    expect(
      codeOf(limiter.admit({ requestId: "c", limits: small, promptTokens: 100, maxTokens: 501 })),
    ).toBe("request_too_large_for_limit");
  });

  it("rate limiter: counts that are none count nothing (NaN, negative, fractions round up)", () => {
    const limiter = new Limiter();
    expect(
      reserved(limiter.admit({ requestId: "a", limits, promptTokens: Number.NaN, maxTokens: -5 })),
    ).toBe(0);
    expect(
      reserved(limiter.admit({ requestId: "b", limits, promptTokens: 1.2, maxTokens: 0.5 })),
    ).toBe(3);
    limiter.settle("a", Number.NaN, -1);
    limiter.settle("b", 1.2, 0.5);
    expect(limiter.key()).toMatchObject({ inflight: 0, reservedTokens: 0, tokensToday: 3 });
  });

  it("output quantile: is exact over the last 64 at every eighth (any numbers)", () => {
    fc.assert(
      fc.property(fc.array(fc.nat({ max: 5000 }), { maxLength: 200, size: "max" }), (outputs) => {
        const quantile = new OutputQuantile();
        for (const [index, tokens] of outputs.entries()) {
          quantile.record("m", tokens);
          const known = Math.floor((index + 1) / 8) * 8;
          const recent = outputs.slice(Math.max(0, known - 64), known).sort((a, b) => a - b);
          expect(quantile.p90("m")).toBe(recent[Math.ceil(recent.length * 0.9) - 1]);
        }
      }),
    );
  });

  it("output quantile: knows sixteen models; a further one takes the place of the first met", () => {
    const quantile = new OutputQuantile();
    for (let model = 0; model < 17; model++)
      for (let i = 0; i < 8; i++) quantile.record(`m${model}`, model);
    expect(quantile.p90("m0")).toBeUndefined();
    expect(quantile.p90("m1")).toBe(1);
    expect(quantile.p90("m16")).toBe(16);
  });
});

describe("rate limiter: reservations", () => {
  const limits: Limits = {
    requestsPerMinute: 60,
    tokensPerMinute: 60_000,
    concurrent: 5,
    concurrentTokens: 9000,
    tokensPerDay: 50_000,
  };

  it("rate limiter: a key without limits is granted, counted in flight, and shares one answer", () => {
    const limiter = new Limiter();
    const replies = ["a", "b", "c"].map((requestId) => limiter.admit({ requestId }));
    expect(replies[0]).toEqual({ kind: "granted", reservedTokens: 0, state: { atMs: 0 } });
    expect(new Set(replies).size).toBe(1); // No reply is made for it.
    expect(limiter.key()).toMatchObject({ inflight: 3, granted: 3 });
    limiter.settle("a");
    limiter.settle("b", 100, 50);
    limiter.settle("b", 100, 50);
    expect(limiter.key()).toMatchObject({ inflight: 1, tokensToday: 150 });
    expect(limiter.describe()).toMatchObject({ reservations: 1, stale: 1 });
  });

  it("rate limiter: a request that asks twice is charged once", () => {
    const limiter = new Limiter();
    const first = limiter.admit({ requestId: "a", limits, promptTokens: 100 });
    const key = limiter.key();
    expect(limiter.admit({ requestId: "a", limits, promptTokens: 100 })).toEqual(first);
    expect(limiter.key()).toEqual(key);
  });

  it("rate limiter: a settlement of nothing changes nothing (unknown; settled twice)", () => {
    const limiter = new Limiter();
    limiter.admit({ requestId: "a", limits });
    limiter.settle("a", 10, 10);
    const key = limiter.key();
    limiter.settle("a");
    limiter.settle("never", 10, 10);
    expect(limiter.key()).toEqual(key);
    expect(limiter.describe()).toMatchObject({ reservations: 0, stale: 2 });
  });

  it("rate limiter: what nobody settles lapses when it expires: it is in flight no more, but stays charged", () => {
    const limiter = new Limiter();
    const slow = { ...limits, tokensPerMinute: 60, tokenBurst: 9000 };
    limiter.admit({
      requestId: "a",
      limits: slow,
      promptTokens: 1000,
      maxTokens: 0,
      expiresMs: 10_000,
    });
    limiter.admit({
      requestId: "b",
      limits: slow,
      promptTokens: 1000,
      maxTokens: 0,
      expiresMs: 30_000,
    });
    limiter.admit({
      requestId: "c",
      limits: slow,
      promptTokens: 1000,
      maxTokens: 0,
      expiresMs: 5_000,
    });
    expect(limiter.kit.timers()).toEqual(["lapse"]);
    limiter.settle("c", 1000, 0);
    limiter.kit.advance(9999);
    expect(limiter.describe().reservations).toBe(2);
    limiter.kit.advance(1);
    expect(limiter.key()).toMatchObject({ inflight: 1, reservedTokens: 1000, tokensToday: 3000 });
    expect(limiter.key()?.state.tokens?.remaining).toBe(9000 - 3000 + 10);
    expect(limiter.kit.emitted()).toEqual([{ kind: "limiter.reservations_lapsed", count: 1 }]);
    limiter.settle("a", 1, 1); // Too late.
    limiter.kit.advance(20_000);
    expect(limiter.describe()).toMatchObject({ reservations: 0, lapses: 2, stale: 1 });
    expect(limiter.kit.timers()).toEqual([]);
  });

  it("rate limiter: a reservation that has expired already lapses within a second", () => {
    const limiter = new Limiter();
    limiter.admit({ requestId: "a", limits, expiresMs: -5 });
    expect(limiter.describe().reservations).toBe(1);
    limiter.kit.advance(1000);
    expect(limiter.describe()).toMatchObject({ reservations: 0, lapses: 1 });
  });

  it("rate limiter: an owner that restarted is refunded, others are not", () => {
    const limiter = new Limiter();
    limiter.admit({ requestId: "a", limits, owner: "here", promptTokens: 100, maxTokens: 0 });
    const before = limiter.key();
    limiter.admit({ requestId: "b", limits, owner: "there", promptTokens: 100, maxTokens: 0 });
    limiter.admit({ requestId: "c", limits, owner: "there", promptTokens: 100, maxTokens: 0 });
    limiter.kit.send({ kind: "limiter.owner_restarted", owner: "there" });
    expect(limiter.key()).toEqual({ ...before, granted: 3 });
    expect(limiter.describe().reservations).toBe(1);
  });

  it("rate limiter: a reload keeps what is still to wait, in time (a tighter limit; none; the old one again)", () => {
    const limiter = new Limiter();
    const minute = (requestsPerMinute: number, requestBurst: number): Limits => ({
      requestsPerMinute,
      requestBurst,
    });
    for (let i = 0; i < 10; i++) limiter.admit({ requestId: `r${i}`, limits: minute(60, 10) }); // 10 s to pay off.
    const reset = (reply: AdmitReply) => reply.state.requests?.resetMs;
    const refused = limiter.admit({ requestId: "a", limits: minute(600, 10) });
    expect(refused).toMatchObject({ kind: "refused", retryAfterMs: 9100 }); // One second is ten requests now.
    expect(reset(refused)).toBe(10_000);
    limiter.settle("r9", 10, 10); // Leaves its record to the next one.
    expect(granted(limiter.admit({ requestId: "b", limits: {} }))).toBe(true);
    expect(limiter.key()?.state.requests).toBeUndefined();
    limiter.kit.advance(4000);
    expect(reset(limiter.admit({ requestId: "c", limits: minute(60, 1) }))).toBe(6000);
    limiter.settle("r0"); // Gives back the second that it had taken.
    expect(reset(limiter.admit({ requestId: "d", limits: minute(60, 1) }))).toBe(5000);
    limiter.settle("b"); // Was never charged a request, even in a record used before.
    expect(reset(limiter.admit({ requestId: "e", limits: minute(60, 1) }))).toBe(5000);
  });

  it("rate limiter: a refund is exact (before it and after it are one; any limits, prompts and pauses)", () => {
    const cost = fc.integer({ min: 0, max: 2000 });
    fc.assert(
      fc.property(
        fc.array(fc.tuple(cost, fc.integer({ min: 0, max: 3000 })), { maxLength: 6 }),
        cost,
        fc.integer({ min: 1, max: 9000 }),
        (others, prompt, requestsPerMinute) => {
          const touched = new Limiter();
          const untouched = new Limiter();
          const some = { ...limits, requestsPerMinute, requestBurst: 1000, tokenBurst: 3000 };
          for (const [index, [promptTokens, pauseMs]] of others.entries())
            for (const limiter of [touched, untouched]) {
              limiter.kit.advance(pauseMs);
              limiter.admit({ requestId: `r${index}`, limits: some, promptTokens, maxTokens: 0 });
            }
          const reply = touched.admit({
            requestId: "x",
            limits: some,
            promptTokens: prompt,
            maxTokens: 0,
          });
          if (reply.kind === "refused") return;
          touched.settle("x");
          const { granted: _, ...after } = touched.key() ?? { granted: 0 };
          const { granted: __, ...before } = untouched.key() ?? { granted: 0 };
          if (others.length > 0) expect(after).toEqual(before);
        },
      ),
    );
  });
});

describe("rate limiter: bounds", () => {
  it("rate limiter: holds so many reservations and refuses more", () => {
    const limiter = new Limiter({ reservationsMax: 2 });
    limiter.admit({ requestId: "a" });
    limiter.admit({ requestId: "b", key: "q" });
    expect(codeOf(limiter.admit({ requestId: "c" }))).toBe("pool_overloaded");
    limiter.settle("a");
    expect(granted(limiter.admit({ requestId: "c" }))).toBe(true);
    expect(limiter.describe()).toMatchObject({ reservations: 2, overflows: 1 });
  });

  it("rate limiter: a full table forgets the longest unused key that holds nothing, and only such", () => {
    const limiter = new Limiter({ keysMax: 4 });
    const day = { tokensPerDay: 1000 };
    const minute = { requestsPerMinute: 1 };
    limiter.admit({ requestId: "a", key: "inflight" });
    limiter.admit({ requestId: "b", key: "quota", limits: day });
    limiter.settle("b", 10, 10);
    limiter.admit({ requestId: "c", key: "waiting", limits: minute });
    limiter.settle("c", 10, 10);
    limiter.admit({ requestId: "d", key: "free" });
    limiter.settle("d", 10, 10);
    expect(granted(limiter.admit({ requestId: "e", key: "new" }))).toBe(true);
    const names = () =>
      limiter
        .describe()
        .keys.map(({ key }) => key)
        .sort();
    expect(names()).toEqual(["inflight", "new", "quota", "waiting"]);
    expect(codeOf(limiter.admit({ requestId: "f", key: "newer" }))).toBe("pool_overloaded");
    limiter.kit.advance(MINUTE_MS); // The minute's limit is whole again.
    expect(granted(limiter.admit({ requestId: "f", key: "newer" }))).toBe(true);
    expect(names()).toEqual(["inflight", "new", "newer", "quota"]);
    limiter.kit.advance(DAY_MS); // The day is over; the requests without an end have lapsed.
    for (const key of ["w", "x", "y", "z"]) {
      expect(granted(limiter.admit({ requestId: key, key }))).toBe(true);
    }
    expect(names()).toEqual(["w", "x", "y", "z"]);
    expect(limiter.describe()).toMatchObject({ keysKnown: 4, keysForgotten: 6, overflows: 1 });
  });

  it("rate limiter: a key that owes tokens is not forgotten before it has paid", () => {
    const limiter = new Limiter({ keysMax: 1 });
    const limits = { tokensPerMinute: 6000 };
    limiter.admit({ requestId: "a", key: "a", limits, promptTokens: 100, maxTokens: 0 });
    limiter.settle("a", 100, 0);
    limiter.kit.advance(999);
    expect(codeOf(limiter.admit({ requestId: "b", key: "b" }))).toBe("pool_overloaded");
    limiter.kit.advance(1);
    expect(granted(limiter.admit({ requestId: "b", key: "b" }))).toBe(true);
  });

  it("rate limiter: of keys that may be forgotten, the one used last stays", () => {
    const limiter = new Limiter({ keysMax: 2 });
    for (const key of ["a", "b", "a", "c"]) {
      limiter.admit({ requestId: key, key });
      limiter.settle(key, 1, 1);
    }
    expect(limiter.describe().keys.map(({ key, granted }) => [key, granted])).toEqual([
      ["c", 1],
      ["a", 2],
    ]);
  });

  it("rate limiter: idle keys go when others come, though there is room", () => {
    const limiter = new Limiter();
    for (let i = 0; i < 100; i++) {
      limiter.admit({ requestId: `r${i}`, key: `k${i}` });
      limiter.settle(`r${i}`, 1, 1);
    }
    limiter.kit.advance(3_599_999);
    limiter.admit({ requestId: "again", key: "k7" });
    limiter.settle("again", 1, 1);
    limiter.admit({ requestId: "a", key: "a" });
    expect(limiter.describe().keysKnown).toBe(101);
    limiter.kit.advance(1);
    for (let i = 0; i < 4; i++) limiter.admit({ requestId: `n${i}`, key: `n${i}` });
    expect(limiter.describe().keysKnown).toBe(6); // These four, a, and k7.
    expect(limiter.key("k7")?.granted).toBe(2);
  });
});

// ---- any traffic ----------------------------------------------------------------------------------------------

type Held = {
  key: string;
  tokens: number;
  requests: boolean;
  minuteTokens: boolean;
  day: number;
  owner: string;
  expiresAtMs: number;
};

/** The same rules, kept naively: buckets of exact numbers, sums over lists. */
class Model {
  readonly #limits: Readonly<Record<string, Limits>>;
  readonly #requests = new Map<string, TokenBucket>();
  readonly #tokens = new Map<string, TokenBucket>();
  readonly #days = new Map<string, { endsAtMs: number; tokens: number }>();
  readonly #outputs = new Map<string, number[]>();
  readonly held = new Map<string, Held>();

  constructor(limits: Readonly<Record<string, Limits>>) {
    this.#limits = limits;
    for (const [
      key,
      { requestsPerMinute, requestBurst, tokensPerMinute, tokenBurst },
    ] of Object.entries(limits)) {
      if (requestsPerMinute !== undefined)
        this.#requests.set(key, new TokenBucket(requestsPerMinute, MINUTE_MS, requestBurst ?? 1));
      if (tokensPerMinute !== undefined)
        this.#tokens.set(
          key,
          new TokenBucket(tokensPerMinute, MINUTE_MS, tokenBurst ?? tokensPerMinute),
        );
    }
  }

  /** "granted", or the code that is due. */
  admit(
    requestId: string,
    key: string,
    prompt: number,
    max: number,
    owner: string,
    expiresAtMs: number,
    nowMs: number,
  ): string {
    const limits = this.#limits[key] ?? {};
    const { tokensPerMinute, concurrentTokens, tokensPerDay } = limits;
    const counts =
      tokensPerMinute !== undefined || concurrentTokens !== undefined || tokensPerDay !== undefined;
    const known = this.#outputs.get(key) ?? [];
    const recent = known
      .slice(0, Math.floor(known.length / 8) * 8)
      .slice(-64)
      .sort((a, b) => a - b);
    const usual = recent[Math.ceil(recent.length * 0.9) - 1] ?? ASSUMED;
    const tokens = counts ? prompt + Math.min(max, usual) : 0;
    const mine = this.of(key);
    const day = this.day(key, nowMs);
    const never = Number.POSITIVE_INFINITY;
    const burst = tokensPerMinute === undefined ? never : (limits.tokenBurst ?? tokensPerMinute);
    if (tokens > Math.min(burst, concurrentTokens ?? never, tokensPerDay ?? never))
      return "request_too_large_for_limit";
    if (this.#requests.get(key)?.holds(1, nowMs) === false) return "rate_limit_requests";
    if (this.#tokens.get(key)?.holds(tokens, nowMs) === false) return "rate_limit_tokens";
    if (mine.length + 1 > (limits.concurrent ?? Number.POSITIVE_INFINITY))
      return "rate_limit_concurrency";
    const inflight = mine.reduce((sum, held) => sum + held.tokens, 0);
    if (inflight + tokens > (concurrentTokens ?? Number.POSITIVE_INFINITY))
      return "rate_limit_concurrent_tokens";
    if (day.tokens + tokens > (tokensPerDay ?? Number.POSITIVE_INFINITY))
      return "quota_tokens_per_day";
    this.#requests.get(key)?.take(1, nowMs);
    this.#tokens.get(key)?.take(tokens, nowMs);
    const today = nowMs < day.endsAtMs ? day : { endsAtMs: nowMs + DAY_MS, tokens: 0 };
    today.tokens += tokens;
    this.#days.set(key, today);
    this.held.set(requestId, {
      key,
      tokens,
      requests: this.#requests.has(key),
      minuteTokens: this.#tokens.has(key),
      day: today.endsAtMs,
      owner,
      expiresAtMs,
    });
    return "granted";
  }

  settle(requestId: string, used: number, output: number, nowMs: number): void {
    const held = this.held.get(requestId);
    if (held === undefined) return;
    this.held.delete(requestId);
    if (used === 0 && held.requests) this.#requests.get(held.key)?.settle(1, 0, nowMs);
    if (held.minuteTokens) this.#tokens.get(held.key)?.settle(held.tokens, used, nowMs);
    const day = this.#days.get(held.key);
    if (day !== undefined && day.endsAtMs === held.day) day.tokens += used - held.tokens;
    if (used === 0 || held.tokens === 0) return;
    this.#outputs.set(held.key, [...(this.#outputs.get(held.key) ?? []), output]);
  }

  lapse(nowMs: number): void {
    for (const [requestId, held] of this.held)
      if (held.expiresAtMs <= nowMs) this.held.delete(requestId);
  }

  of(key: string): Held[] {
    return [...this.held.values()].filter((held) => held.key === key);
  }

  day(key: string, nowMs: number): { endsAtMs: number; tokens: number } {
    const day = this.#days.get(key);
    return day === undefined || nowMs >= day.endsAtMs
      ? { endsAtMs: Number.NEGATIVE_INFINITY, tokens: 0 }
      : day;
  }

  state(key: string, nowMs: number): { requests: number | undefined; tokens: number | undefined } {
    return {
      requests: remainingOf(this.#requests.get(key), nowMs),
      tokens: remainingOf(this.#tokens.get(key), nowMs),
    };
  }
}

// Rates divide 6·10¹⁰ ns, so that model and limiter round nothing and must agree on every answer.
const someLimits = fc.record(
  {
    requestsPerMinute: fc.constantFrom(6, 60, 600),
    requestBurst: fc.integer({ min: 1, max: 10 }),
    tokensPerMinute: fc.constantFrom(600, 6000, 60_000),
    tokenBurst: fc.integer({ min: 500, max: 3000 }),
    concurrent: fc.integer({ min: 1, max: 8 }),
    concurrentTokens: fc.integer({ min: 500, max: 4000 }),
    tokensPerDay: fc.integer({ min: 500, max: 20_000 }),
  },
  { requiredKeys: ["requestBurst", "tokenBurst"] },
);
const pick = fc.nat({ max: 1000 });
const step = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.record({
      op: fc.constant("admit" as const),
      key: fc.constantFrom("x", "y"),
      prompt: fc.integer({ min: 0, max: 600 }),
      max: fc.integer({ min: 0, max: 600 }),
      owner: fc.constantFrom("here", "there"),
      // Whole seconds, as the steps of time below: lapses are found to the second.
      expiresS: fc.integer({ min: 1, max: 100 }),
    }),
  },
  {
    weight: 5,
    arbitrary: fc.record({
      op: fc.constant("settle" as const),
      pick,
      prompt: fc.integer({ min: 0, max: 600 }),
      output: fc.integer({ min: 0, max: 900 }),
    }),
  },
  { weight: 2, arbitrary: fc.record({ op: fc.constant("refund" as const), pick }) },
  {
    weight: 1,
    arbitrary: fc.record({
      op: fc.constant("restart" as const),
      owner: fc.constantFrom("here", "there"),
    }),
  },
  {
    weight: 4,
    arbitrary: fc.record({
      op: fc.constant("wait" as const),
      seconds: fc.oneof(fc.integer({ min: 1, max: 20 }), fc.constant(86_400)),
    }),
  },
);

describe("rate limiter: any traffic", () => {
  it("rate limiter: answers just as a naive limiter with exact buckets, and ends with all counters at 0", () => {
    fc.assert(
      fc.property(
        someLimits,
        someLimits,
        fc.array(step, { maxLength: 100, size: "max" }),
        (x, y, steps) => {
          const limits: Record<string, Limits> = { x: definedOf(x), y: definedOf(y) };
          const limiter = new Limiter();
          const model = new Model(limits);
          let made = 0;
          // Both keys are known from the start: a key that comes new may have an idle one forgotten, and with it
          // what had been learned of its answers' lengths, which this model remembers for ever.
          for (const key of ["x", "y"]) {
            const requestId = `first ${key}`;
            limiter.admit({
              requestId,
              key,
              limits: limits[key] ?? {},
              promptTokens: 0,
              maxTokens: 0,
            });
            limiter.settle(requestId, 0, 0);
          }
          for (const step of steps) {
            const { nowMs } = limiter.kit;
            switch (step.op) {
              case "admit": {
                const requestId = `r${made++}`;
                const { key, prompt, max, owner, expiresS } = step;
                const expected = model.admit(
                  requestId,
                  key,
                  prompt,
                  max,
                  owner,
                  nowMs + expiresS * 1000,
                  nowMs,
                );
                const reply = limiter.admit({
                  requestId,
                  key,
                  owner,
                  limits: limits[key] ?? {},
                  promptTokens: prompt,
                  maxTokens: max,
                  expiresMs: expiresS * 1000,
                });
                expect(codeOf(reply)).toBe(expected);
                if (reply.kind === "refused" && expected !== "request_too_large_for_limit")
                  expect(reply.retryAfterMs).toBeGreaterThan(0);
                break;
              }
              case "settle":
              case "refund": {
                const ids = [...model.held.keys()];
                const requestId = ids[step.pick % Math.max(1, ids.length)];
                if (requestId === undefined) break;
                const prompt = step.op === "refund" ? 0 : step.prompt;
                const output = step.op === "refund" ? 0 : step.output;
                model.settle(requestId, prompt + output, output, nowMs);
                limiter.settle(requestId, prompt, output);
                break;
              }
              case "restart":
                for (const [requestId, held] of model.held)
                  if (held.owner === step.owner) model.settle(requestId, 0, 0, nowMs);
                limiter.kit.send({ kind: "limiter.owner_restarted", owner: step.owner });
                break;
              case "wait":
                limiter.kit.advance(step.seconds * 1000);
                model.lapse(limiter.kit.nowMs);
                break;
            }
            agree(limiter, model, limits);
          }
          for (const requestId of [...model.held.keys()]) limiter.settle(requestId, 1, 1);
          const { keys, reservations } = limiter.describe();
          expect(reservations).toBe(0);
          for (const { inflight, reservedTokens } of keys)
            expect([inflight, reservedTokens]).toEqual([0, 0]);
        },
      ),
      { numRuns: 200 },
    );
  });
});

/** Books are the same, and within every limit. */
function agree(limiter: Limiter, model: Model, limits: Readonly<Record<string, Limits>>): void {
  const { nowMs } = limiter.kit;
  const description = limiter.describe();
  expect(description.reservations).toBe(model.held.size);
  for (const { key, inflight, reservedTokens, tokensToday, state } of description.keys) {
    const mine = model.of(key);
    const { concurrent, concurrentTokens } = limits[key] ?? {};
    expect(inflight).toBe(mine.length);
    expect(reservedTokens).toBe(mine.reduce((sum, held) => sum + held.tokens, 0));
    expect(tokensToday).toBe(model.day(key, nowMs).tokens);
    expect({ requests: state.requests?.remaining, tokens: state.tokens?.remaining }).toEqual(
      model.state(key, nowMs),
    );
    expect(inflight).toBeLessThanOrEqual(concurrent ?? Number.POSITIVE_INFINITY);
    expect(reservedTokens).toBeLessThanOrEqual(concurrentTokens ?? Number.POSITIVE_INFINITY);
  }
}

function remainingOf(bucket: TokenBucket | undefined, nowMs: number): number | undefined {
  return bucket === undefined ? undefined : Math.max(0, bucket.remaining(nowMs));
}

/** Optional fields that were drawn as absent. */
function definedOf(limits: Record<string, number | undefined>): Limits {
  return Object.fromEntries(Object.entries(limits).filter(([, value]) => value !== undefined));
}
