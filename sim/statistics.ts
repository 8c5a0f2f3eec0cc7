/**
 * What a simulated run is worth: confidence over seeds, whether the run came to rest, and when no answer may be
 * given from it.
 *
 * Pure. A planner that answers from five seconds of arrivals, or from a queue that still grows, answers wrongly by
 * factors; so every number has a verdict beside it, and `refusalReasons` says in plain words what is missing.
 */

/** Mean of independent runs with its two-sided 95 % interval (Student's t). */
export type Interval = {
  mean: number;
  /** Half of the interval's width; undefined for fewer than two runs, which say nothing about spread. */
  halfWidth: number | undefined;
  low: number;
  high: number;
  runs: number;
};

// Two-sided 95 % quantiles of Student's t for 1, 2, 3 … degrees of freedom; from 31 on the normal law's with the
// first correction term is right to 0.001.
const T95 = [
  12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145,
  2.131, 2.12, 2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048,
  2.045, 2.042,
] as const;

/** Two-sided 95 % quantile of Student's t; `degrees` is whole and ≥ 1. */
export function studentT95(degrees: number): number {
  return T95[degrees - 1] ?? 1.95996 + 2.3722 / degrees + 2.8225 / (degrees * degrees);
}

/** Mean and 95 % interval of one number per run. Throws RangeError without a run (a bug of the caller). */
export function intervalOf(values: readonly number[]): Interval {
  const runs = values.length;
  if (runs === 0) throw new RangeError("an interval needs at least one run");
  let sum = 0;
  for (const value of values) sum += value;
  const mean = sum / runs;
  if (runs === 1) return { mean, halfWidth: undefined, low: mean, high: mean, runs };
  let squares = 0;
  for (const value of values) squares += (value - mean) * (value - mean);
  const deviation = Math.sqrt(squares / (runs - 1));
  const halfWidth = (studentT95(runs - 1) * deviation) / Math.sqrt(runs);
  return { mean, halfWidth, low: mean - halfWidth, high: mean + halfWidth, runs };
}

/** What the rules below must know of a run. Warm-up is left out of everything but the counts of requests. */
export type RunEvidence = {
  /** From the first arrival to the last one. */
  durationMs: number;
  /** Dropped from the start before anything was measured. */
  warmUpMs: number;
  /** arrived = completed + refused + failed + unfinished. */
  arrived: number;
  completed: number;
  refused: number;
  failed: number;
  unfinished: number;
  longestE2eMs: number;
  /** Share of time that nodes spent in steps, 0..1, and the largest share of KV blocks in use. */
  utilization: number;
  kvPeak: number;
  /** The two halves of the time after the warm-up, by arrival. */
  halves: readonly [HalfRun, HalfRun];
  /** Requests in the system and arrivals per second, means of equal windows of the time after the warm-up. */
  inSystem: readonly number[];
  arrivalsPerSecond: readonly number[];
};

export type HalfRun = {
  arrived: number;
  inputTokens: number;
  outputTokens: number;
  /** Of requests that completed; 0 without one. */
  e2eMeanMs: number;
};

/**
 * STABLE: came to rest. BACKLOGGED: what waits grows from one end of the run to the other. OVERLOADED: the nodes
 * are full and leave requests undone, or waiting for a tenth of the run and more. TOO-SHORT: nothing can be said.
 */
export type Verdict = "STABLE" | "BACKLOGGED" | "OVERLOADED" | "TOO-SHORT";

/** Each verdict in a sentence, for a reader of a table. */
export const VERDICT_MEANINGS: Readonly<Record<Verdict, string>> = {
  STABLE: "the run came to rest: its figures hold for a longer one",
  BACKLOGGED: "what waits grows over the run: a longer run would be worse",
  OVERLOADED:
    "the nodes are full, and requests are left undone or wait for a tenth of the run and more",
  "TOO-SHORT": "the run is too short against its longest request, or shorter than five minutes",
};

/** A run shorter than this holds no p99 of a load that drifts by the minute. */
export const RUN_MS_MIN = 300_000;
/** … nor one shorter than so many of its longest requests: ends would weigh too much. */
export const LONGEST_E2E_TIMES = 10;
export const COMPLETED_SHARE_MIN = 0.98;
/** Mean latencies of the halves may differ by this much without a reason in the load. */
export const HALVES_DIFFERENCE_MAX = 0.25;
/** Nodes busier than this, or with KV fuller than this, are taken for full. */
const FULL_UTILIZATION = 0.9;
const FULL_KV = 0.97;
/** A growth of what waits counts from three standard errors, and from five seconds' worth of arrivals. */
const SLOPE_ERRORS_MIN = 3;
const GROWTH_SECONDS_MIN = 5;
const WINDOWS_MIN = 4;
const WINDOWS_MAX = 10;

export function verdictOf(run: RunEvidence): Verdict {
  // A short run of a full cluster is still a short run: it says nothing about a longer one.
  if (run.durationMs < RUN_MS_MIN || run.arrived === 0) return "TOO-SHORT";
  const isLate = run.durationMs < LONGEST_E2E_TIMES * run.longestE2eMs;
  if (isFull(run) && (isLate || completedShare(run) < COMPLETED_SHARE_MIN)) return "OVERLOADED";
  if (backlogGrowth(run) !== undefined) return "BACKLOGGED";
  if (isLate) return "TOO-SHORT";
  return "STABLE";
}

/** Answered requests ÷ requests that came. */
export function completedShare(run: RunEvidence): number {
  return run.arrived === 0 ? 0 : run.completed / run.arrived;
}

function isFull(run: RunEvidence): boolean {
  return run.utilization >= FULL_UTILIZATION || run.kvPeak >= FULL_KV;
}

/**
 * By how many requests what is in the system grows over the run, when a straight line says so beyond chance and
 * arrivals do not explain it; else undefined.
 */
export function backlogGrowth(run: RunEvidence): number | undefined {
  // Neighbouring windows resemble each other; a few long ones are nearly independent, as the errors below assume.
  const inSystem = joined(run.inSystem);
  const arrivalsPerSecond = joined(run.arrivalsPerSecond);
  if (inSystem.length < WINDOWS_MIN) return undefined;
  const system = trendOf(inSystem);
  if (system.growth <= 0 || system.errors < SLOPE_ERRORS_MIN) return undefined;
  const arrivals = trendOf(arrivalsPerSecond);
  if (system.growth < GROWTH_SECONDS_MIN * arrivals.mean) return undefined;
  // What is in the system may follow the load, even twice as steeply; a backlog outruns it.
  const follows = Math.max(0, arrivals.growth / arrivals.mean);
  return system.growth / system.mean > Math.max(1, 2 * follows) ? system.growth : undefined;
}

/** Means of at most `WINDOWS_MAX` equal stretches; what is left over at the start is dropped. */
function joined(values: readonly number[]): number[] {
  const length = Math.ceil(values.length / WINDOWS_MAX);
  const means: number[] = [];
  for (let from = values.length % Math.max(1, length); from < values.length; from += length) {
    let sum = 0;
    for (const value of values.slice(from, from + length)) sum += value;
    means.push(sum / length);
  }
  return means;
}

/** Least-squares line: rise from the first window to the last, and in standard errors. */
function trendOf(values: readonly number[]): { mean: number; growth: number; errors: number } {
  const count = values.length;
  let sum = 0;
  for (const value of values) sum += value;
  const mean = sum / count;
  const middle = (count - 1) / 2;
  let products = 0;
  let spread = 0;
  values.forEach((value, index) => {
    products += (index - middle) * (value - mean);
    spread += (index - middle) * (index - middle);
  });
  const slope = products / spread;
  let squares = 0;
  values.forEach((value, index) => {
    const off = value - mean - slope * (index - middle);
    squares += off * off;
  });
  const error = Math.sqrt(squares / Math.max(1, count - 2) / spread);
  return {
    mean,
    growth: slope * (count - 1),
    errors: error === 0 ? (slope === 0 ? 0 : Number.POSITIVE_INFINITY) : Math.abs(slope) / error,
  };
}

/**
 * Why no answer may be given from this run, one sentence each; empty when one may. `physics`: where the step laws
 * beat physics.
 */
export function refusalReasons(run: RunEvidence, physics: readonly string[] = []): string[] {
  const reasons = physics.map((violation) => `the step law is faster than physics: ${violation}`);
  if (run.arrived === 0) return [...reasons, "no request came"];
  if (run.durationMs < RUN_MS_MIN) {
    reasons.push(
      // Rounded down: 299.97 s must not read as the 300 that it lacks.
      `the run lasts ${seconds(Math.floor(run.durationMs / 1000) * 1000)}; ${seconds(RUN_MS_MIN)} are the least that can show a p99`,
    );
  }
  const atLeastMs = LONGEST_E2E_TIMES * run.longestE2eMs;
  if (run.durationMs >= RUN_MS_MIN && run.durationMs < atLeastMs) {
    reasons.push(
      `the longest request took ${seconds(run.longestE2eMs)}; a run of ${LONGEST_E2E_TIMES} times that, ` +
        `${seconds(atLeastMs)}, is needed, and this one lasts ${seconds(run.durationMs)}`,
    );
  }
  const share = completedShare(run);
  if (share < COMPLETED_SHARE_MIN) reasons.push(undoneReason(run, share));
  const growth = backlogGrowth(run);
  if (growth !== undefined) {
    reasons.push(
      `what waits still grows: by ${Math.round(growth)} requests from the start of the run to its end`,
    );
  }
  const halves = halvesReason(run);
  if (halves !== undefined) reasons.push(halves);
  return reasons;
}

/** A full cluster and a wrong question look alike in the counts; what to do about them differs. */
function undoneReason(run: RunEvidence, share: number): string {
  const undone = `only ${(share * 100).toFixed(1)} % of the requests were answered (${COMPLETED_SHARE_MIN * 100} % needed)`;
  const full = Math.round(run.utilization * 100);
  if (isFull(run)) return `${undone}: the nodes are saturated (${full} % busy)`;
  return (
    `${undone} although the nodes are ${full} % busy: limits, timeouts or requests that fit no node, not capacity; ` +
    "look at the outcomes by reason"
  );
}

function halvesReason(run: RunEvidence): string | undefined {
  const [first, second] = run.halves;
  if (first.e2eMeanMs === 0 || second.e2eMeanMs === 0) {
    return "one half of the run answered no request";
  }
  const change = second.e2eMeanMs / first.e2eMeanMs;
  if (change <= 1 + HALVES_DIFFERENCE_MAX && change >= 1 / (1 + HALVES_DIFFERENCE_MAX)) {
    return undefined;
  }
  // A load that drifts moves latency with it; that is the load's truth, not a run that has not settled.
  const isSlower = change > 1;
  const moved = (tokens: (half: HalfRun) => number) =>
    isSlower ? tokens(second) > tokens(first) * 1.02 : tokens(first) > tokens(second) * 1.02;
  if (moved((half) => half.inputTokens) || moved((half) => half.outputTokens)) return undefined;
  return (
    `the halves disagree: mean E2E ${seconds(first.e2eMeanMs)} and ${seconds(second.e2eMeanMs)}, and the ` +
    `${isSlower ? "second" : "first"} half has no more load: the run has not settled`
  );
}

function seconds(ms: number): string {
  return `${ms < 10_000 ? (ms / 1000).toFixed(2) : Math.round(ms / 1000)} s`;
}
