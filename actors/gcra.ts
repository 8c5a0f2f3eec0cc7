/**
 * A rate limit that lets a burst through: GCRA, the token bucket kept as one instant. Pure.
 *
 * The instant is TAT, the "theoretical arrival time": when everything charged so far has been paid off at the
 * allowed rate. TAT at or before now = the allowance is whole. With T = period / limit, the time of one unit:
 *
 *   reserve(cost)  newTat = max(now, tat) + cost·T; newTat − burst·T > now → refuse until then; else tat = newTat
 *   settle(actual) tat = max(now, tat + actual·T − what was reserved)    a refund, or a debt that delays the next
 *
 * All of it is whole nanoseconds. T itself need not be whole: cost·T is computed as one exact fraction and
 * rounded up, so that no limit is ever exceeded by rounding. Doubles hold whole numbers to 2⁵³ ns, 104 days; so
 * instants count from a base that moves along, and no span (burst, debt) is longer than 30 days.
 *
 * Because TAT is time, not units, a changed limit keeps what it means: a key that has to wait still waits.
 * (A bucket of units would drift in floating point, or need its fractions kept.)
 */
import { assert } from "../runtime/actor.ts";

const NS_PER_MS = 1_000_000;
/** Longest burst and longest debt: a burst is cut to what 30 days allow, a debt to 30 days of waiting. */
export const SPAN_MS_MAX = 30 * 86_400_000;
const SPAN_NS_MAX = SPAN_MS_MAX * NS_PER_MS;
/** How old the base may get. With two spans on top, 70 days: below 2⁵³ ns. */
const BASE_AGE_MS_MAX = 10 * 86_400_000;

export class Gcra {
  #limit = 1;
  /** T = #wholeNs + #restNs / #limit. */
  #wholeNs = 1;
  #restNs = 0;
  /** At most what 30 days allow. */
  #burst = 1;
  #burstNs = 1;
  #baseMs = 0;
  /** From the base. */
  #tatNs = 0;

  /** Starts whole. `limit` units per `periodMs`, `burst` of them at once; limit and burst are whole and ≥ 1. */
  constructor(limit: number, periodMs: number, burst: number) {
    this.configure(limit, periodMs, burst);
  }

  /** New limits; the time still to pay off stays. */
  configure(limit: number, periodMs: number, burst: number): void {
    assert(Number.isInteger(limit) && limit >= 1, "limit must be a whole number of at least 1");
    assert(Number.isInteger(burst) && burst >= 1, "burst must be a whole number of at least 1");
    const periodNs = Math.round(periodMs * NS_PER_MS);
    assert(periodNs >= 1 && periodNs <= SPAN_NS_MAX, "periodMs must lie between 1 ns and 30 days");
    this.#limit = limit;
    this.#restNs = periodNs % limit;
    this.#wholeNs = (periodNs - this.#restNs) / limit;
    this.#burst = Math.min(burst, Math.floor(SPAN_NS_MAX / this.#nsPerUnit()));
    this.#burstNs = this.spanNs(this.#burst);
  }

  /** The largest cost that ever passes. */
  get burst(): number {
    return this.#burst;
  }

  /** Time in which `cost` units (whole, ≥ 0) are allowed again: what `reserve` charges, rounded up; in ns. */
  spanNs(cost: number): number {
    const wholeNs = cost * this.#wholeNs;
    const rest = cost * this.#restNs;
    // Below 2⁵³ the quotient's rounding never crosses a whole number; above, one more ns is on the safe side.
    const restNs = Math.ceil(rest / this.#limit) + (rest <= Number.MAX_SAFE_INTEGER ? 0 : 1);
    return Math.min(SPAN_NS_MAX, wholeNs + restNs);
  }

  /** How long until `cost` units (whole, ≥ 0) would pass, in ms: 0 = now, Infinity = never: more than the burst. */
  waitMs(cost: number, nowMs: number): number {
    if (cost > this.#burst) return Number.POSITIVE_INFINITY;
    const nowNs = this.#sinceBaseNs(nowMs);
    const newTatNs = Math.max(nowNs, this.#tatNs) + this.spanNs(cost);
    const waitNs = newTatNs - this.#burstNs - nowNs;
    // Up to the next µs, which is as fine as time gets: whoever waits so long is not refused for a rounding.
    return waitNs <= 0 ? 0 : Math.ceil(waitNs / 1000) / 1000;
  }

  /** Charges `cost` if it passes now. Returns what `waitMs` does: 0 = charged, otherwise nothing has changed. */
  reserve(cost: number, nowMs: number): number {
    const waitMs = this.waitMs(cost, nowMs);
    if (waitMs > 0) return waitMs;
    const nowNs = this.#sinceBaseNs(nowMs);
    this.#tatNs = Math.max(nowNs, this.#tatNs) + this.spanNs(cost);
    return 0;
  }

  /**
   * Replaces a reservation by what was used in the end (whole, ≥ 0), as if that had been known when it was
   * made: an overrun is first paid from what has flowed in since. `reservedNs` is the `spanNs` of the cost at
   * the time it was reserved, so that a limit changed meanwhile gives back just what was taken.
   */
  settle(reservedNs: number, actual: number, nowMs: number): void {
    const nowNs = this.#sinceBaseNs(nowMs);
    const tatNs = this.#tatNs + this.spanNs(actual) - reservedNs;
    this.#tatNs = Math.min(Math.max(nowNs, tatNs), nowNs + SPAN_NS_MAX);
  }

  /** Leaves at most that share (0..1) of the burst: of what was charged elsewhere meanwhile nothing is known. */
  cut(share: number, nowMs: number): void {
    const nowNs = this.#sinceBaseNs(nowMs);
    this.#tatNs = Math.max(this.#tatNs, nowNs + Math.ceil(this.#burstNs * (1 - share)));
  }

  /**
   * What is still to pay off is at most a whole burst from now on. For after `configure`: a time that was paid off at a
   * share of the rate would else be several bursts at the whole one.
   */
  capDebt(nowMs: number): void {
    this.#tatNs = Math.min(this.#tatNs, this.#sinceBaseNs(nowMs) + this.#burstNs);
  }

  /** Units that would pass at once, 0…burst. */
  remaining(nowMs: number): number {
    const nowNs = this.#sinceBaseNs(nowMs);
    const freeNs = this.#burstNs - Math.max(0, this.#tatNs - nowNs);
    if (freeNs <= 0) return 0;
    let units = Math.min(this.#burst, Math.floor(freeNs / this.#nsPerUnit()));
    // The quotient is rounded; `spanNs` is exact, and what `waitMs` goes by.
    while (units > 0 && this.spanNs(units) > freeNs) units--;
    while (units < this.#burst && this.spanNs(units + 1) <= freeNs) units++;
    return units;
  }

  /** How long until the allowance is whole, in ms. */
  resetMs(nowMs: number): number {
    const nowNs = this.#sinceBaseNs(nowMs);
    return Math.max(0, this.#tatNs - nowNs) / NS_PER_MS;
  }

  #nsPerUnit(): number {
    return this.#wholeNs + this.#restNs / this.#limit;
  }

  /** May move the base, and TAT with it: to be called before TAT is read. */
  #sinceBaseNs(nowMs: number): number {
    if (nowMs - this.#baseMs > BASE_AGE_MS_MAX) {
      const baseMs = Math.floor(nowMs);
      this.#tatNs -= (baseMs - this.#baseMs) * NS_PER_MS; // Far below 0 for one long idle: as good as now.
      this.#baseMs = baseMs;
    }
    return Math.round((nowMs - this.#baseMs) * NS_PER_MS);
  }
}
