/**
 * The token bucket that a GCRA stands for, in exact whole numbers, for tests to compare with: its level counts
 * units × ns-per-period, so that a nanosecond adds exactly `limit` and a unit costs exactly `periodNs`.
 *
 * It spills when something is taken or settled, not by itself: an overrun is first paid from what has flowed in
 * since the last call, as if it had been used then.
 */
export class TokenBucket {
  readonly #limit: bigint;
  readonly #periodNs: bigint;
  readonly #full: bigint;
  #level: bigint;
  #atNs = 0n;

  constructor(limit: number, periodMs: number, burst: number) {
    this.#limit = BigInt(limit);
    this.#periodNs = BigInt(Math.round(periodMs * 1e6));
    this.#full = BigInt(burst) * this.#periodNs;
    this.#level = this.#full;
  }

  /** True when there was enough; takes nothing otherwise. */
  take(cost: number, nowMs: number): boolean {
    if (!this.holds(cost, nowMs)) return false;
    this.#spill();
    this.#level -= BigInt(cost) * this.#periodNs;
    return true;
  }

  holds(cost: number, nowMs: number): boolean {
    return cost <= this.remaining(nowMs);
  }

  settle(reserved: number, actual: number, nowMs: number): void {
    this.#advance(nowMs);
    this.#level += BigInt(reserved - actual) * this.#periodNs;
    this.#spill();
  }

  /** Below 0 while there is a debt. */
  remaining(nowMs: number): number {
    this.#advance(nowMs);
    if (this.#level < 0n) return -1;
    if (this.#level > this.#full) return Number(this.#full / this.#periodNs);
    return Number(this.#level / this.#periodNs);
  }

  #advance(nowMs: number): void {
    const nowNs = BigInt(Math.round(nowMs * 1e6));
    this.#level += (nowNs - this.#atNs) * this.#limit;
    this.#atNs = nowNs;
  }

  #spill(): void {
    if (this.#level > this.#full) this.#level = this.#full;
  }
}
