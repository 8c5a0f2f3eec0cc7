/** The bound on retries, in every window and in the long run. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { RetryBudget } from "../actors/retry-budget.ts";

const options = { budgetRatio: 0.1, budgetFloorPerSecond: 2 };

describe("retry budget", () => {
  for (const perSecond of [100, 250, 1000]) {
    it(`keeps amplification within 1.12 at ${perSecond}/s while everything fails`, () => {
      const { requests, retries } = failAll(perSecond, 65);
      for (let from = 0; from + 10 <= 65; from += 0.25) {
        const within = (atMs: number) => atMs >= from * 1000 && atMs < (from + 10) * 1000;
        const load = requests.filter(within).length;
        expect((load + retries.filter(within).length) / load).toBeLessThanOrEqual(1.12);
      }
      expect(retries.length).toBeGreaterThan(0.095 * requests.length); // It does grant what it may.
    });
  }

  it("retries every failure of a small service, twice if it likes (1 request in 2 s)", () => {
    const budget = new RetryBudget(options, 0);
    for (let atMs = 0; atMs < 60_000; atMs += 2000) {
      budget.deposit(atMs);
      expect(budget.tryWithdraw(atMs)).toBe(true);
      expect(budget.tryWithdraw(atMs)).toBe(true);
    }
  });

  it("floors at 20 retries in 10 s without any request, and frees them when they leave the window", () => {
    const budget = new RetryBudget(options, 0);
    const granted = Array.from({ length: 25 }, () => budget.tryWithdraw(5249)).filter(Boolean);
    expect(granted).toHaveLength(20);
    expect(budget.snapshot(5249)).toEqual({ balance: 0, deposited: 0, withdrawn: 20, refused: 5 });
    const againMs = 5249 + budget.retryAfterMs(5249);
    expect(budget.tryWithdraw(againMs - 1)).toBe(false);
    expect(budget.tryWithdraw(againMs)).toBe(true);
    expect(againMs - 5249).toBeGreaterThanOrEqual(10_000);
    expect(againMs - 5249).toBeLessThanOrEqual(10_250);
  });

  it("never exceeds ratio · requests + floor in any 10 s (any sequence of events)", () => {
    const event = fc.record({
      afterMs: fc.oneof(fc.nat(40), fc.nat(3000)),
      isRetry: fc.boolean(),
      count: fc.integer({ min: 1, max: 40 }),
    });
    fc.assert(
      fc.property(
        fc.array(event, { maxLength: 120 }),
        fc.double({ min: 0, max: 0.5, noNaN: true }),
        (events, ratio) => {
          const budget = new RetryBudget({ budgetRatio: ratio, budgetFloorPerSecond: 1 }, 0);
          const requests: number[] = [];
          const retries: number[] = [];
          let nowMs = 0;
          for (const { afterMs, isRetry, count } of events) {
            nowMs += afterMs;
            for (let i = 0; i < count; i++) {
              if (!isRetry) {
                budget.deposit(nowMs);
                requests.push(nowMs);
              } else if (budget.tryWithdraw(nowMs)) {
                retries.push(nowMs);
              }
            }
            const isRecent = (atMs: number) => atMs > nowMs - 10_000;
            const bound = ratio * requests.filter(isRecent).length + 10;
            if (retries[retries.length - 1] === nowMs)
              expect(retries.filter(isRecent).length).toBeLessThanOrEqual(bound + 1e-6);
          }
        },
      ),
    );
  });

  it("forgets requests after 10 s, also after a long silence, and follows new options", () => {
    const budget = new RetryBudget(options, 0);
    for (let i = 0; i < 1000; i++) budget.deposit(0);
    expect(budget.snapshot(9999).balance).toBe(120);
    expect(budget.snapshot(10_000).balance).toBe(20);
    expect(budget.snapshot(60_000).balance).toBe(20);
    budget.configure({ budgetRatio: 0, budgetFloorPerSecond: 0 });
    expect(budget.tryWithdraw(60_000)).toBe(false);
    expect(budget.retryAfterMs(60_000)).toBe(10_000);
  });
});

/** A pool where each request fails and wants two retries at once. */
function failAll(perSecond: number, seconds: number): { requests: number[]; retries: number[] } {
  const budget = new RetryBudget(options, 0);
  const requests: number[] = [];
  const retries: number[] = [];
  for (let i = 0; i < perSecond * seconds; i++) {
    const atMs = (i * 1000) / perSecond;
    budget.deposit(atMs);
    requests.push(atMs);
    for (let retry = 0; retry < 2; retry++) if (budget.tryWithdraw(atMs)) retries.push(atMs);
  }
  return { requests, retries };
}
