/**
 * How many retries a pool may make: what keeps a failing pool from being hit three times as hard. Pure.
 *
 *   retries in any 10 s  ≤  ratio · requests in those 10 s  +  floor · 10 s
 *
 * With a ratio of 0.1 and a floor of 2/s, a pool that fails altogether sees at most 1.12 times its load at 100
 * requests/s and above. Below 20 requests/s the floor is the larger part, and that is its purpose: up to 20
 * retries in 10 s are granted however few requests there are, so that a small service can retry each of its
 * failures. Amplification is then bounded by the attempts of a request (1 + retries), not by this budget: at
 * 1 request/s every one may be retried twice. 20 requests in 10 s are no storm.
 *
 * Counted in buckets of 250 ms, on the safe side: requests of the present bucket and the 39 before it, retries of
 * the present one and the 40 before it, so that no window of 10 s exceeds the bound.
 */

export type RetryBudgetOptions = {
  /** Retries as a share of requests, 0..1; default 0.1. */
  budgetRatio: number;
  /** Retries per second that are allowed beside that, ≥ 0; default 2. */
  budgetFloorPerSecond: number;
};

const WINDOW_SECONDS = 10;
const BUCKET_MS = 250;
const WINDOW_BUCKETS = 40;
const BUCKETS = WINDOW_BUCKETS + 1;
/** 0.1 · 1000 + 20 − 119 must make 1. */
const ROUNDING = 1e-9;

export class RetryBudget {
  #options: RetryBudgetOptions;
  readonly #requests = new Float64Array(BUCKETS);
  readonly #retries = new Float64Array(BUCKETS);
  /** Sums over their windows. */
  #requestsSum = 0;
  #retriesSum = 0;
  /** Number of the present bucket, from time 0. */
  #bucket: number;
  #deposited = 0;
  #withdrawn = 0;
  #refused = 0;

  constructor(options: RetryBudgetOptions, nowMs: number) {
    this.#options = options;
    this.#bucket = Math.floor(nowMs / BUCKET_MS);
  }

  configure(options: RetryBudgetOptions): void {
    this.#options = options;
  }

  /** Counts a request, at its first attempt. */
  deposit(nowMs: number): void {
    const slot = this.#advance(nowMs);
    this.#requests[slot] = (this.#requests[slot] ?? 0) + 1;
    this.#requestsSum++;
    this.#deposited++;
  }

  /** Takes one retry, or refuses. A retry that finds no node afterwards stays counted. */
  tryWithdraw(nowMs: number): boolean {
    const slot = this.#advance(nowMs);
    if (this.#balance() < 1 - ROUNDING) {
      this.#refused++;
      return false;
    }
    this.#retries[slot] = (this.#retries[slot] ?? 0) + 1;
    this.#retriesSum++;
    this.#withdrawn++;
    return true;
  }

  /** Until the oldest retries leave the window; the whole window where none will. */
  retryAfterMs(nowMs: number): number {
    this.#advance(nowMs);
    for (let age = WINDOW_BUCKETS; age >= 0; age--) {
      const bucket = this.#bucket - age;
      if (bucket >= 0 && (this.#retries[bucket % BUCKETS] ?? 0) > 0)
        return (bucket + BUCKETS) * BUCKET_MS - nowMs;
    }
    return WINDOW_BUCKETS * BUCKET_MS;
  }

  /** `balance`: retries that may be made now, ≥ 0; the others count since the start. */
  snapshot(nowMs: number): {
    balance: number;
    deposited: number;
    withdrawn: number;
    refused: number;
  } {
    this.#advance(nowMs);
    return {
      balance: Math.max(0, Math.floor(this.#balance() + ROUNDING)),
      deposited: this.#deposited,
      withdrawn: this.#withdrawn,
      refused: this.#refused,
    };
  }

  #balance(): number {
    const { budgetRatio, budgetFloorPerSecond } = this.#options;
    return (
      budgetRatio * this.#requestsSum + budgetFloorPerSecond * WINDOW_SECONDS - this.#retriesSum
    );
  }

  /** Moves to the bucket of `nowMs` and returns its slot; time that runs backwards counts as now. */
  #advance(nowMs: number): number {
    const bucket = Math.floor(nowMs / BUCKET_MS);
    if (bucket - this.#bucket >= BUCKETS) {
      this.#requests.fill(0);
      this.#retries.fill(0);
      this.#requestsSum = 0;
      this.#retriesSum = 0;
      this.#bucket = bucket;
    }
    while (this.#bucket < bucket) {
      this.#bucket++;
      // The requests of 40 buckets ago leave the window; retries stay one bucket longer.
      const left = (this.#bucket - WINDOW_BUCKETS + BUCKETS) % BUCKETS;
      this.#requestsSum -= this.#requests[left] ?? 0;
      this.#requests[left] = 0;
      const slot = this.#bucket % BUCKETS;
      this.#retriesSum -= this.#retries[slot] ?? 0;
      this.#retries[slot] = 0;
    }
    return this.#bucket % BUCKETS;
  }
}
