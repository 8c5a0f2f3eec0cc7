/**
 * The circuit of one node: whether it may be given work, as judged by what became of earlier work.
 * Pure: time and randomness are passed in; it sends nothing and starts no timer.
 *
 *   closed ──── open(): a cause, and the pool's consent ────▶ open
 *     ▲                                                      │  ▲
 *     │ enough successes                    becomeHalfOpen() │  │ open(): one failure,
 *     │ (then ramp 0.1 → 1)                                  ▼  │ or silence
 *     └─────────────────────────────────────────────────── half_open
 *
 * It never opens by itself. `settle`, `condemn` and `overdue` return the cause for which it should. In
 * closed state the caller asks the pool (a pool that ejects all its nodes serves nobody) and then calls
 * `open` or `stayClosed`: refused, it goes on at the least weight, on probation. A half-open circuit is
 * out of the pool already, so there the caller opens at once.
 *
 * Half open begins with a probe of the caller's own; `admitTrials` then lets real calls in, a few at
 * once. Each opening begins a new *era*. A call carries the era in which it was admitted, and one of an
 * earlier era is a straggler that changes nothing: a late success cannot close the circuit, nor a late
 * failure open it again.
 *
 * Trips on exact counts, never on averages: five calls of a quiet night must not weigh like five hundred.
 */
import { assert } from "../runtime/actor.ts";
import type { CircuitState } from "./protocol.ts";

/** Why a circuit opens. */
export type CircuitCause =
  | "consecutive_local"
  | "consecutive_gateway"
  | "failure_rate"
  | "slow_rate"
  | "health" // active health checks failed
  | "wedged" // the engine runs requests and makes no token
  | "probe_failed" // half open: the probe or a real call failed
  | "probe_silent"; // half open: no result in time

/**
 * What one call says of its node. "none": nothing (the client left, a 4xx, overload): it counts nowhere
 * and only gives its permit back.
 */
export type CallResult = "ok" | "failed_local" | "failed_gateway" | "slow" | "none";

export type CircuitOptions = {
  /** Calls in a row that got no connection, 1…; default 3. */
  localFailures: number;
  /** Calls in a row that ended in a 5xx, a broken stream or a bad answer, 1…; default 5. */
  gatewayFailures: number;
  /** Span over which rates are counted, in ten steps, > 0; default 30,000. */
  windowMs: number;
  /** Calls in the window before a rate says anything, 1…; default 20. */
  callsMin: number;
  /** Share of failed calls that trips, 0..1; default 0.5. */
  failureRatio: number;
  /** Share of slow calls that trips, 0..1; default 0.8. */
  slowRatio: number;
  /** First time out, doubled with each ejection that is remembered, > 0; default 10,000. */
  openMs: number;
  /** Bound of the doubling, ≥ openMs; default 300,000. */
  openMsMax: number;
  /** The time out is multiplied by 1 ± this, so that nodes do not come back together, 0..1; default 0.2. */
  openJitterRatio: number;
  /** How long an ejection is remembered; default 900,000. */
  ejectionMemoryMs: number;
  /** One remembered ejection is forgiven for each span this long spent closed; default 300,000. */
  ejectionForgiveMs: number;
  /** After a refused ejection, the time before another is wished for; default 10,000. */
  probationMs: number;
  /** Calls that may be without a result at once while half open, 1…; default 2. */
  halfOpenPermits: number;
  /** Successes that close a half-open circuit, 1…; default 3. */
  halfOpenSuccesses: number;
  /** A half-open circuit whose calls say nothing for this long opens again, > 0; default 30,000. */
  halfOpenMs: number;
  /** Time in which a node that is back grows to its full weight; 0 = at once; default 60,000. */
  slowStartMs: number;
  /** Weight at which that begins, and the weight on probation, in (0, 1]; default 0.1. */
  slowStartWeightMin: number;
};

/** The defaults stated beside each option. */
export const circuitDefaults: Readonly<CircuitOptions> = {
  localFailures: 3,
  gatewayFailures: 5,
  windowMs: 30_000,
  callsMin: 20,
  failureRatio: 0.5,
  slowRatio: 0.8,
  openMs: 10_000,
  openMsMax: 300_000,
  openJitterRatio: 0.2,
  ejectionMemoryMs: 900_000,
  ejectionForgiveMs: 300_000,
  probationMs: 10_000,
  halfOpenPermits: 2,
  halfOpenSuccesses: 3,
  halfOpenMs: 30_000,
  slowStartMs: 60_000,
  slowStartWeightMin: 0.1,
};

/** The evidence a circuit stands on, for events and people. */
export type CircuitNumbers = {
  calls: number;
  failures: number;
  slow: number;
  consecutiveLocal: number;
  consecutiveGateway: number;
  /** Ejections remembered. */
  ejections: number;
};

/** More would change nothing: the doubling has met its bound long before. */
const EJECTIONS_MAX = 32;

export class CircuitBreaker {
  readonly #options: CircuitOptions;
  readonly #window: CallWindow;
  #state: CircuitState = "closed";
  #stateAtMs = 0;
  #era = 0;
  #consecutiveLocal = 0;
  #consecutiveGateway = 0;
  /** A cause was returned, and neither `open` nor `stayClosed` has answered it yet. Only while closed. */
  #isWishing = false;
  #probationUntilMs = Number.NEGATIVE_INFINITY;
  /** Slow start counts from here; it may lie ahead (probation). -∞: this circuit was never in doubt. */
  #rampFromMs = Number.NEGATIVE_INFINITY;
  #cause: CircuitCause | undefined;
  #openForMs = 0;
  /** When it was ejected, oldest first; at most EJECTIONS_MAX. */
  readonly #ejectedAtMs: number[] = [];
  /** Forgiveness is counted from here while closed. */
  #cleanFromMs = 0;
  /** Half open: the probe has been answered, real calls may come. */
  #trialsAdmitted = false;
  /** Half open: permits taken whose calls have no result; 0..halfOpenPermits. */
  #permitsTaken = 0;
  #successes = 0;
  /** Half open: a result is due by then; ∞ while no permit is taken. */
  #resultDueAtMs = Number.POSITIVE_INFINITY;

  /** Throws for options that contradict each other: they come checked from the one table of options. */
  constructor(options: Partial<CircuitOptions> = {}) {
    this.#options = { ...circuitDefaults, ...options };
    const { openMs, openMsMax, slowStartWeightMin, windowMs } = this.#options;
    assert(openMs > 0 && openMs <= openMsMax, "openMs must be in (0, openMsMax]");
    assert(windowMs > 0, "windowMs must be above 0");
    assert(slowStartWeightMin > 0 && slowStartWeightMin <= 1, "slowStartWeightMin is in (0, 1]");
    assert(this.#options.halfOpenPermits >= 1, "half open needs at least one permit to ever end");
    this.#window = new CallWindow(windowMs);
  }

  get state(): CircuitState {
    return this.#state;
  }

  /** When the present state began; 0 before the first transition. */
  get stateAtMs(): number {
    return this.#stateAtMs;
  }

  /** Grows with each opening; goes with every call that is admitted. */
  get era(): number {
    return this.#era;
  }

  /** Why it last opened. */
  get cause(): CircuitCause | undefined {
    return this.#cause;
  }

  /** How long the present (or last) time out is. */
  get openForMs(): number {
    return this.#openForMs;
  }

  /** Half open, and the probe is not answered yet. */
  get isProbing(): boolean {
    return this.#state === "half_open" && !this.#trialsAdmitted;
  }

  /** Calls that may be admitted now; meaningful while half open, 0 otherwise. */
  get permitsLeft(): number {
    return this.#trialsAdmitted ? this.#options.halfOpenPermits - this.#permitsTaken : 0;
  }

  /** Half open: when silence becomes a failure; ∞ while nothing is due. */
  get resultDueAtMs(): number {
    return this.#resultDueAtMs;
  }

  /** Share of its full weight that the node should get. */
  ramp(nowMs: number): number {
    const { slowStartMs, slowStartWeightMin } = this.#options;
    if (this.#state !== "closed" || this.#isWishing) return slowStartWeightMin;
    const elapsedMs = nowMs - this.#rampFromMs;
    if (elapsedMs >= slowStartMs) return 1;
    return Math.max(slowStartWeightMin, elapsedMs / slowStartMs);
  }

  numbers(nowMs: number): CircuitNumbers {
    this.#window.advance(nowMs);
    this.#forget(nowMs);
    return {
      calls: this.#window.calls,
      failures: this.#window.failures,
      slow: this.#window.slow,
      consecutiveLocal: this.#consecutiveLocal,
      consecutiveGateway: this.#consecutiveGateway,
      ejections: this.#ejectedAtMs.length,
    };
  }

  /** Takes a permit for one call while half open; false when none is left. */
  tryPermit(nowMs: number): boolean {
    if (this.permitsLeft <= 0) return false;
    if (this.#permitsTaken === 0) this.#resultDueAtMs = nowMs + this.#options.halfOpenMs;
    this.#permitsTaken++;
    return true;
  }

  /**
   * What became of a call that was admitted in `era`, with or without a permit that it still holds.
   * Half open, only permit holders succeed, so that a call whose first token counted does not count
   * again at its end. Returns the cause for which the circuit should open now, if any.
   */
  settle(
    result: CallResult,
    era: number,
    hasPermit: boolean,
    nowMs: number,
  ): CircuitCause | undefined {
    if (era !== this.#era || this.#state === "open") return undefined; // A straggler.
    if (this.#state === "half_open") return this.#settleTrial(result, hasPermit, nowMs);
    if (result === "none") return undefined;
    if (result === "ok") {
      this.#consecutiveLocal = 0;
      this.#consecutiveGateway = 0;
    } else if (result === "failed_local") this.#consecutiveLocal++;
    else if (result === "failed_gateway") this.#consecutiveGateway++;
    this.#window.record(result, nowMs);
    const cause = this.#causeInCounts();
    return cause === undefined ? undefined : this.#wish(cause, nowMs);
  }

  /** Evidence from beside the calls. Returns the cause if the circuit should open for it now. */
  condemn(cause: "health" | "wedged", nowMs: number): CircuitCause | undefined {
    if (this.#state === "open") return undefined;
    return this.#state === "half_open" ? cause : this.#wish(cause, nowMs);
  }

  /** Half open: the cause, if a result has been due since. */
  overdue(nowMs: number): CircuitCause | undefined {
    return nowMs >= this.#resultDueAtMs ? "probe_silent" : undefined;
  }

  /** Ejects the node. `random` in [0, 1) spreads the time out, which is returned (ms). */
  open(cause: CircuitCause, random: number, nowMs: number): number {
    assert(this.#state !== "open", "an open circuit is not opened again");
    this.#forget(nowMs);
    if (this.#ejectedAtMs.length >= EJECTIONS_MAX) this.#ejectedAtMs.shift();
    this.#ejectedAtMs.push(nowMs);
    const { openMs, openMsMax, openJitterRatio } = this.#options;
    let forMs = openMs;
    for (let k = 1; k < this.#ejectedAtMs.length && forMs < openMsMax; k++) forMs *= 2;
    this.#openForMs = Math.min(forMs, openMsMax) * (1 + (2 * random - 1) * openJitterRatio);
    this.#cause = cause;
    this.#era++;
    this.#become("open", nowMs);
    return this.#openForMs;
  }

  /** The pool refused: goes on at the least weight, and wishes again no sooner than `probationMs`. */
  stayClosed(nowMs: number): void {
    assert(this.#state === "closed" && this.#isWishing, "only a wish can be refused");
    this.#clearEvidence();
    this.#probationUntilMs = nowMs + this.#options.probationMs;
    this.#rampFromMs = this.#probationUntilMs;
  }

  /** The time out is over, or health came back before it was: the probe is next. */
  becomeHalfOpen(nowMs: number): void {
    assert(this.#state === "open", "only an open circuit becomes half open");
    this.#become("half_open", nowMs);
  }

  /** The probe was answered: permits may be taken. */
  admitTrials(): void {
    assert(this.isProbing, "trials follow the probe of a half-open circuit");
    this.#trialsAdmitted = true;
  }

  #settleTrial(result: CallResult, hasPermit: boolean, nowMs: number): CircuitCause | undefined {
    if (hasPermit) {
      assert(this.#permitsTaken > 0, "a permit that is given back was taken");
      this.#permitsTaken--;
      const isAnyTaken = this.#permitsTaken > 0;
      if (!isAnyTaken) this.#resultDueAtMs = Number.POSITIVE_INFINITY;
      else if (result !== "none") this.#resultDueAtMs = nowMs + this.#options.halfOpenMs;
    }
    if (result === "none") return undefined;
    if (result !== "ok") return "probe_failed";
    if (hasPermit && ++this.#successes >= this.#options.halfOpenSuccesses) {
      this.#become("closed", nowMs);
      this.#rampFromMs = nowMs;
      this.#cleanFromMs = nowMs;
    }
    return undefined;
  }

  #causeInCounts(): CircuitCause | undefined {
    const { localFailures, gatewayFailures, callsMin, failureRatio, slowRatio } = this.#options;
    if (this.#consecutiveLocal >= localFailures) return "consecutive_local";
    if (this.#consecutiveGateway >= gatewayFailures) return "consecutive_gateway";
    const { calls, failures, slow } = this.#window;
    if (calls < callsMin) return undefined;
    if (failures >= failureRatio * calls) return "failure_rate";
    return slow >= slowRatio * calls ? "slow_rate" : undefined;
  }

  #wish(cause: CircuitCause, nowMs: number): CircuitCause | undefined {
    if (this.#isWishing || nowMs < this.#probationUntilMs) return undefined;
    this.#isWishing = true;
    return cause;
  }

  #become(state: CircuitState, nowMs: number): void {
    this.#state = state;
    this.#stateAtMs = nowMs;
    this.#trialsAdmitted = false;
    this.#permitsTaken = 0;
    this.#successes = 0;
    this.#resultDueAtMs = Number.POSITIVE_INFINITY;
    this.#clearEvidence();
  }

  #clearEvidence(): void {
    this.#isWishing = false;
    this.#consecutiveLocal = 0;
    this.#consecutiveGateway = 0;
    this.#window.clear();
  }

  /** Drops ejections that are too old, and one for each clean span. */
  #forget(nowMs: number): void {
    const { ejectionForgiveMs, ejectionMemoryMs } = this.#options;
    while (this.#state === "closed" && nowMs - this.#cleanFromMs >= ejectionForgiveMs) {
      if (this.#ejectedAtMs.shift() === undefined) {
        this.#cleanFromMs = nowMs;
        break;
      }
      this.#cleanFromMs += ejectionForgiveMs;
    }
    for (let at = this.#ejectedAtMs[0]; at !== undefined && nowMs - at > ejectionMemoryMs; ) {
      this.#ejectedAtMs.shift();
      at = this.#ejectedAtMs[0];
    }
  }
}

const BUCKETS = 10;

/** Exact counts over the last `windowMs`, forgotten a tenth at a time; a call costs O(1). */
class CallWindow {
  readonly #bucketMs: number;
  readonly #calls = new Int32Array(BUCKETS);
  readonly #failures = new Int32Array(BUCKETS);
  readonly #slow = new Int32Array(BUCKETS);
  /** Number of the newest bucket, counted from time 0. */
  #newest = 0;
  calls = 0;
  failures = 0;
  slow = 0;

  constructor(windowMs: number) {
    this.#bucketMs = windowMs / BUCKETS;
  }

  record(result: Exclude<CallResult, "none">, nowMs: number): void {
    this.advance(nowMs);
    const index = this.#newest % BUCKETS;
    this.#add(this.#calls, index);
    this.calls++;
    if (result === "slow") {
      this.#add(this.#slow, index);
      this.slow++;
    } else if (result !== "ok") {
      this.#add(this.#failures, index);
      this.failures++;
    }
  }

  /** Forgets what has become too old. */
  advance(nowMs: number): void {
    const newest = Math.floor(nowMs / this.#bucketMs);
    while (this.#newest < newest && this.calls > 0) {
      const index = ++this.#newest % BUCKETS;
      this.calls -= this.#calls[index] ?? 0;
      this.failures -= this.#failures[index] ?? 0;
      this.slow -= this.#slow[index] ?? 0;
      this.#calls[index] = 0;
      this.#failures[index] = 0;
      this.#slow[index] = 0;
    }
    if (newest > this.#newest) this.#newest = newest;
  }

  clear(): void {
    this.#calls.fill(0);
    this.#failures.fill(0);
    this.#slow.fill(0);
    this.calls = 0;
    this.failures = 0;
    this.slow = 0;
  }

  #add(counts: Int32Array, index: number): void {
    counts[index] = (counts[index] ?? 0) + 1;
  }
}
