import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { Gcra } from "../actors/gcra.ts";
import { limitStateAt, requestBurstOf, tokenBurstOf } from "../actors/limit-state.ts";

describe("limit state", () => {
  it("bursts default to a sixth of a minute's requests, at least 1, and a minute's tokens", () => {
    expect(requestBurstOf({ requestsPerMinute: 60 })).toBe(10);
    expect(requestBurstOf({ requestsPerMinute: 3 })).toBe(1);
    expect(requestBurstOf({ requestsPerMinute: 60, requestBurst: 7 })).toBe(7);
    expect(requestBurstOf({})).toBeUndefined();
    expect(tokenBurstOf({ tokensPerMinute: 9000 })).toBe(9000);
    expect(tokenBurstOf({ tokenBurst: 5 })).toBeUndefined();
  });

  it("a key of which nothing was stated is whole; one without limits has no state", () => {
    const limits = { requestsPerMinute: 60, tokensPerMinute: 600 };
    expect(limitStateAt(undefined, limits, 5)).toEqual({
      atMs: 5,
      requests: { limit: 60, remaining: 10, resetMs: 0 },
      tokens: { limit: 600, remaining: 600, resetMs: 0 },
    });
    expect(limitStateAt(undefined, { concurrent: 3 }, 5)).toBeUndefined();
  });

  it("what was stated refills as the bucket itself does, to within one unit", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 6000 }),
        fc.integer({ min: 1, max: 50 }),
        fc.integer({ min: 1, max: 50 }),
        fc.integer({ min: 0, max: 120_000 }),
        (requestsPerMinute, requestBurst, used, elapsedMs) => {
          const bucket = new Gcra(requestsPerMinute, 60_000, requestBurst);
          for (let i = 0; i < Math.min(used, requestBurst); i++) bucket.reserve(1, 1000);
          const stated = {
            atMs: 1000,
            requests: {
              limit: requestsPerMinute,
              remaining: bucket.remaining(1000),
              resetMs: bucket.resetMs(1000),
            },
          };
          const nowMs = 1000 + elapsedMs;
          const later = limitStateAt(stated, { requestsPerMinute, requestBurst }, nowMs);
          const exact = bucket.remaining(nowMs);
          expect(Math.abs((later?.requests?.remaining ?? -9) - exact)).toBeLessThanOrEqual(1);
          expect(later?.requests?.resetMs).toBeCloseTo(bucket.resetMs(nowMs), 3);
        },
      ),
    );
  });
});
