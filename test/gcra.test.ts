import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { Gcra, SPAN_MS_MAX } from "../actors/gcra.ts";
import { TokenBucket } from "./token-bucket-oracle.ts";

const MINUTE_MS = 60_000;

/** Evenly, in hundredths: `fc.double` hardly ever draws anything but almost nothing. */
const shareTo = (max: number) => fc.integer({ min: 0, max: max * 100 }).map((n) => n / 100);
/** Time moves in µs, as the runtime's does. */
const gapMs = fc.oneof(
  fc.constant(0),
  fc.integer({ min: 0, max: 5_000_000 }).map((us) => us / 1000),
  fc.integer({ min: 0, max: 300_000 }),
);
const step = fc.oneof(
  fc.record({
    op: fc.constant("reserve" as const),
    gapMs,
    share: shareTo(1.2),
  }),
  fc.record({
    op: fc.constant("settle" as const),
    gapMs,
    share: shareTo(3),
  }),
);

describe("gcra", () => {
  it("gcra: grants, refuses and remains just as an exact token bucket (T a whole number of ns)", () => {
    // Divisors of 6·10¹⁰, so that one unit takes a whole number of ns and neither side rounds.
    const limits = fc.constantFrom(1, 3, 10, 60, 100, 600, 6000, 150_000, 600_000, 1_000_000);
    fc.assert(
      fc.property(
        limits,
        fc.integer({ min: 1, max: 500 }),
        fc.array(step, { maxLength: 60, size: "max" }),
        (limit, burst, steps) => {
          const gcra = new Gcra(limit, MINUTE_MS, burst);
          const bucket = new TokenBucket(limit, MINUTE_MS, burst);
          const held: { cost: number; ns: number }[] = [];
          let nowMs = 0;
          for (const { op, gapMs, share } of steps) {
            nowMs = Math.round((nowMs + gapMs) * 1000) / 1000;
            if (op === "reserve") {
              const cost = Math.round(share * burst);
              const waitMs = gcra.reserve(cost, nowMs);
              if (cost > burst) expect(waitMs).toBe(Number.POSITIVE_INFINITY);
              else expect(waitMs === 0).toBe(bucket.take(cost, nowMs));
              if (waitMs === 0) held.push({ cost, ns: gcra.spanNs(cost) });
            } else {
              const one = held.shift();
              if (one === undefined) continue;
              const actual = Math.round(one.cost * share);
              gcra.settle(one.ns, actual, nowMs);
              bucket.settle(one.cost, actual, nowMs);
            }
            expect(gcra.remaining(nowMs)).toBe(Math.max(0, bucket.remaining(nowMs)));
          }
        },
      ),
    );
  });

  it("gcra: charges cost · period / limit, rounded up to whole ns, and never less (any numbers)", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 1_000_000_000 }),
        fc.integer({ min: 0, max: 1_000_000_000 }),
        (limit, cost) => {
          const charged = BigInt(new Gcra(limit, MINUTE_MS, 1).spanNs(cost));
          const product = BigInt(cost) * 60_000_000_000n;
          const exact = (product + BigInt(limit) - 1n) / BigInt(limit);
          const spanMax = BigInt(SPAN_MS_MAX) * 1_000_000n;
          if (exact >= spanMax) expect(charged).toBe(spanMax);
          else if (cost * limit < Number.MAX_SAFE_INTEGER) expect(charged).toBe(exact);
          else expect([0n, 1n, 2n]).toContain(charged - exact);
        },
      ),
      { numRuns: 2000 },
    );
    expect(new Gcra(7, MINUTE_MS, 1).spanNs(1)).toBe(8_571_428_572);
    expect(new Gcra(7, MINUTE_MS, 1).spanNs(7)).toBe(60_000_000_000);
    // One part in 700,000,001 above a whole ns, in numbers too large for a double to show it.
    expect(new Gcra(700_000_001, MINUTE_MS, 1).spanNs(474_833_334)).toBe(40_700_000_000);
  });

  it("gcra: grants over any time span ≤ rate · time + burst, exactly (any limit, burst and cost)", () => {
    const any = fc.oneof(
      fc.integer({ min: 1, max: 100 }),
      fc.integer({ min: 1, max: 1_000_000_000 }),
    );
    fc.assert(
      fc.property(
        any,
        any,
        fc.array(fc.record({ gapMs, share: shareTo(1) }), {
          maxLength: 60,
          size: "max",
        }),
        (limit, burst, calls) => {
          const gcra = new Gcra(limit, MINUTE_MS, burst);
          const granted: { atNs: bigint; cost: bigint }[] = [];
          let nowMs = 0;
          for (const call of calls) {
            nowMs = Math.round((nowMs + call.gapMs) * 1000) / 1000;
            const cost = Math.ceil(call.share * burst);
            if (gcra.reserve(cost, nowMs) === 0)
              granted.push({ atNs: BigInt(Math.round(nowMs * 1e6)), cost: BigInt(cost) });
          }
          const periodNs = BigInt(MINUTE_MS * 1e6);
          for (let from = 0; from < granted.length; from++) {
            let sum = 0n;
            for (const grant of granted.slice(from)) {
              sum += grant.cost;
              const elapsedNs = grant.atNs - (granted[from]?.atNs ?? 0n);
              const allowed = elapsedNs * BigInt(limit) + BigInt(burst) * periodNs;
              expect(sum * periodNs <= allowed).toBe(true);
            }
          }
        },
      ),
    );
  });

  it("gcra: at every grant, what was used and is reserved ≤ rate · time + burst (reservations settled)", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 100_000 }),
        fc.integer({ min: 1, max: 1000 }),
        fc.array(step, { maxLength: 80, size: "max" }),
        (limit, burst, steps) => {
          const gcra = new Gcra(limit, MINUTE_MS, burst);
          const held: { cost: number; ns: number }[] = [];
          let used = 0;
          let reserved = 0;
          let nowMs = 0;
          for (const { op, gapMs, share } of steps) {
            nowMs = Math.round((nowMs + gapMs) * 1000) / 1000;
            if (op === "reserve") {
              const cost = Math.min(burst, Math.round(share * burst));
              if (gcra.reserve(cost, nowMs) !== 0) continue;
              held.push({ cost, ns: gcra.spanNs(cost) });
              reserved += cost;
              // A grant is where the limit binds; a debt made by a settlement only delays the next grant.
              const allowed = (nowMs / MINUTE_MS) * limit + burst;
              expect(used + reserved).toBeLessThanOrEqual(allowed + 1e-6);
            } else {
              const one = held.shift();
              if (one === undefined) continue;
              const actual = Math.round(one.cost * share);
              gcra.settle(one.ns, actual, nowMs);
              reserved -= one.cost;
              used += actual;
            }
          }
        },
      ),
    );
  });

  it("gcra: a refused caller passes after just the wait it was told, and not a µs before", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 1_000_000_000 }),
        fc.integer({ min: 1, max: 1_000_000 }),
        fc.integer({ min: 0, max: 100 * 86_400_000 }),
        fc.integer({ min: 1, max: 100 }),
        (limit, burst, startMs, share) => {
          const gcra = new Gcra(limit, MINUTE_MS, burst);
          const cost = Math.ceil((share / 100) * gcra.remaining(startMs));
          while (gcra.reserve(cost, startMs) === 0);
          const waitMs = gcra.waitMs(cost, startMs);
          expect(waitMs).toBeGreaterThan(0);
          // One µs is the clock's resolution; a double holds it (and no finer) at such uptimes.
          if (waitMs > 0.002)
            expect(gcra.waitMs(cost, startMs + waitMs - 0.002)).toBeGreaterThan(0);
          expect(gcra.reserve(cost, startMs + waitMs + (startMs > 2 ** 31 ? 1e-5 : 0))).toBe(0);
        },
      ),
      { numRuns: 200 },
    );
  });

  it("gcra: remaining is the largest cost that passes (any limit)", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 1_000_000_000 }),
        fc.integer({ min: 1, max: 1_000_000_000 }),
        fc.array(shareTo(1), { maxLength: 8 }),
        (limit, burst, shares) => {
          const gcra = new Gcra(limit, MINUTE_MS, burst);
          let nowMs = 1000;
          for (const share of shares) {
            gcra.reserve(Math.ceil(share * gcra.remaining(nowMs)), nowMs);
            nowMs += 17.003;
            const remaining = gcra.remaining(nowMs);
            expect(gcra.waitMs(remaining, nowMs)).toBe(0);
            expect(gcra.waitMs(remaining + 1, nowMs)).toBeGreaterThan(0);
          }
        },
      ),
    );
  });

  it("gcra: remaining is right where the quotient of two doubles is not", () => {
    expect(new Gcra(41, MINUTE_MS, 123).remaining(0)).toBe(123); // Comes out just below 123.
    const gcra = new Gcra(700_000_003, MINUTE_MS, 700_000_003);
    gcra.reserve(700_000_003, 0);
    gcra.settle(gcra.spanNs(415_722_224) - 1, 0, 0); // One ns too little for as many; comes out as if enough.
    expect(gcra.remaining(0)).toBe(415_722_223);
    expect(gcra.waitMs(415_722_224, 0)).toBeGreaterThan(0);
  });

  it("gcra: a refund leaves it as if nothing had been reserved (all of it, at once or later)", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 1_000_000 }),
        fc.integer({ min: 2, max: 100_000 }),
        fc.array(fc.integer({ min: 0, max: 60_000 }), { maxLength: 5 }),
        fc.integer({ min: 0, max: 100_000 }),
        (limit, burst, otherGapsMs, laterMs) => {
          const touched = new Gcra(limit, MINUTE_MS, burst);
          const untouched = new Gcra(limit, MINUTE_MS, burst);
          let nowMs = 0;
          for (const gapMs of otherGapsMs) {
            nowMs += gapMs;
            const cost = Math.ceil(burst / 3);
            expect(touched.reserve(cost, nowMs)).toBe(untouched.reserve(cost, nowMs));
          }
          const cost = touched.remaining(nowMs);
          const ns = touched.spanNs(cost);
          expect(touched.reserve(cost, nowMs)).toBe(0);
          touched.settle(ns, 0, nowMs + laterMs);
          expect(touched.resetMs(nowMs + laterMs)).toBe(untouched.resetMs(nowMs + laterMs));
          expect(touched.remaining(nowMs + laterMs)).toBe(untouched.remaining(nowMs + laterMs));
        },
      ),
    );
  });

  it("gcra: a debt only delays the next call, and whole is never more than the burst", () => {
    const gcra = new Gcra(60, MINUTE_MS, 10);
    const ns = gcra.spanNs(5);
    expect(gcra.reserve(5, 0)).toBe(0);
    gcra.settle(ns, 25, 0); // 15 more than the bucket holds.
    expect(gcra.remaining(0)).toBe(0);
    expect(gcra.resetMs(0)).toBe(25_000);
    expect(gcra.waitMs(1, 0)).toBe(16_000);
    expect(gcra.reserve(1, 16_000)).toBe(0);
    expect(gcra.remaining(1_000_000)).toBe(10);
    expect(gcra.waitMs(11, 1_000_000)).toBe(Number.POSITIVE_INFINITY);
  });

  it("gcra: a changed limit keeps the time still to wait (60 to 600 a minute and back)", () => {
    const gcra = new Gcra(60, MINUTE_MS, 10);
    for (let i = 0; i < 10; i++) gcra.reserve(1, 0);
    expect(gcra.resetMs(0)).toBe(10_000);
    const reservedNs = gcra.spanNs(1);
    gcra.configure(600, MINUTE_MS, 100);
    expect(gcra.resetMs(0)).toBe(10_000);
    expect(gcra.remaining(0)).toBe(0);
    expect(gcra.remaining(5000)).toBe(50);
    gcra.settle(reservedNs, 0, 0); // Gives back the whole second that it took, not a tenth of it.
    expect(gcra.resetMs(0)).toBe(9000);
    gcra.configure(60, MINUTE_MS, 5); // A burst smaller than what is owed.
    expect(gcra.remaining(0)).toBe(0);
    expect(gcra.waitMs(1, 0)).toBe(5000);
  });

  it("gcra: a debt made at a share of the rate is at most one burst at the whole one", () => {
    const gcra = new Gcra(20, MINUTE_MS, 60); // A third of 60 a minute, the burst whole: 180 s.
    gcra.cut(0.5, 0);
    expect(gcra.resetMs(0)).toBe(90_000);
    gcra.configure(60, MINUTE_MS, 60);
    expect(gcra.waitMs(1, 0)).toBeGreaterThan(30_000);
    gcra.capDebt(0);
    expect(gcra.resetMs(0)).toBe(60_000);
    expect(gcra.waitMs(1, 0)).toBe(1000);
    gcra.capDebt(50_000);
    expect(gcra.resetMs(50_000)).toBe(10_000); // A smaller one stays.
  });

  it("gcra: counts the same after any uptime (base moved along; ten years)", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 10 * 365 * 86_400_000 }),
        fc.array(
          fc.record({
            gapMs: fc.integer({ min: 0, max: 20 * 86_400_000 }),
            cost: fc.integer({ min: 0, max: 50 }),
          }),
          {
            maxLength: 30,
            size: "max",
          },
        ),
        (startMs, calls) => {
          const early = new Gcra(7, 86_400_000, 50);
          const late = new Gcra(7, 86_400_000, 50);
          let elapsedMs = 0;
          for (const { gapMs, cost } of calls) {
            elapsedMs += gapMs;
            if (cost % 2 === 0)
              expect(late.remaining(startMs + elapsedMs)).toBe(early.remaining(elapsedMs));
            if (cost % 3 === 0)
              expect(late.resetMs(startMs + elapsedMs)).toBe(early.resetMs(elapsedMs));
            expect(late.reserve(cost, startMs + elapsedMs)).toBe(early.reserve(cost, elapsedMs));
            expect(late.remaining(startMs + elapsedMs)).toBe(early.remaining(elapsedMs));
            expect(late.resetMs(startMs + elapsedMs)).toBe(early.resetMs(elapsedMs));
          }
        },
      ),
    );
  });

  it("gcra: no span exceeds 30 days (a burst that would take years, a debt without end)", () => {
    const gcra = new Gcra(1, MINUTE_MS, 1_000_000_000);
    const month = SPAN_MS_MAX / MINUTE_MS;
    expect(gcra.remaining(0)).toBe(month);
    expect(gcra.waitMs(month + 1, 0)).toBe(Number.POSITIVE_INFINITY);
    expect(gcra.reserve(month, 0)).toBe(0);
    gcra.settle(0, 1e12, 0);
    expect(gcra.resetMs(0)).toBe(SPAN_MS_MAX);
    expect(gcra.reserve(1, SPAN_MS_MAX)).toBe(0);
  });

  it("gcra: refuses limits that mean nothing (zero, fractions, a period out of range)", () => {
    expect(() => new Gcra(0, MINUTE_MS, 1)).toThrow(/limit/);
    expect(() => new Gcra(1.5, MINUTE_MS, 1)).toThrow(/limit/);
    expect(() => new Gcra(1, MINUTE_MS, 0)).toThrow(/burst/);
    expect(() => new Gcra(1, 0, 1)).toThrow(/periodMs/);
    expect(() => new Gcra(1, 2 * SPAN_MS_MAX, 1)).toThrow(/periodMs/);
  });
});
