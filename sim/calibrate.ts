/**
 * Calibration: a step law from the log of a real engine.
 *
 *   log → first part ─┬─ with a base law: one scalar, h, by bisection on mean TPOT
 *                     └─ from scratch: scheduler limits read off the log, then both forms of law-forms.ts searched
 *       → replay of the whole log → errors of the part that was fitted, and of the part that the fit never saw
 *
 * From scratch one evaluation is a whole replay through GpuNodeModel; residuals are logarithms of modelled ÷ real:
 * means and percentiles of TTFT, TPOT and E2E, and their means over stretches of time and classes of size, minimised
 * from several starts. Where the log shows engine steps one by one (observed-steps.ts), they must fit as well. A
 * coefficient that the log does not ask for (U, a pause at the start) is dropped.
 *
 * What came after the fitted part is replayed with it, as load: its latencies are not looked at. A log that was cut off
 * does not show what came later; under first-come first-served nothing later matters until its last request is
 * scheduled, so only what ended by then is compared.
 *
 * Not seen: prefix caching. Prompts found in a cache make prompt tokens look cheaper than they are.
 *
 * Pure and seeded: the same log and options give the same law. It reads and writes no file.
 */
import { Random } from "../runtime/random.ts";
import { UNKNOWN_HARDWARE } from "./law-file.ts";
import {
  FIRST_USE,
  type Form,
  fusedForm,
  PAUSE,
  type Scale,
  twoPassForm,
  type Values,
  withoutCoefficient,
} from "./law-forms.ts";
import { KV_BLOCK_TOKENS, physicsViolations, rawStepUs, type StepLaw } from "./laws.ts";
import { leastSquares, type Point, pointAt } from "./least-squares.ts";
import {
  ERROR_METRICS,
  ERROR_STATISTICS,
  type ErrorMetric,
  type ErrorStatistic,
  type ErrorTable,
  errorTable,
  type LogReplay,
  meanOf,
  modelledLatency,
  pairsOf,
  quantileOf,
  replayLog,
  statisticOf,
  worstMean,
} from "./log-replay.ts";
import { type ObservedStep, observedSteps, stepDeviation } from "./observed-steps.ts";
import { CalibrationError, type LoggedRequest, type RequestLog } from "./request-log.ts";
import { type SchedulerLimits, schedulerLimits } from "./scheduler-limits.ts";

export type CalibrationOptions = {
  /** Shipped or earlier law: only its h is fitted. Absent: from scratch. */
  base?: StepLaw;
  /** Of the new law; default `<base>+log` or `calibrated`. */
  name?: string;
  /** The engine's own settings; absent: the base's, or read off the log. */
  sequencesMax?: number;
  batchedTokensMax?: number;
  kvBlocks?: number;
  /** Share of the requests, by arrival, that is fitted; the rest checks. Above 0, at most 1; default 0.5. */
  split?: number;
  seed?: number | string;
  /** Called after each replay with their number so far. */
  onProgress?: (replays: number) => void;
};

export type Calibration = {
  /** `validated` when the means of the requests it was not fitted to are within `VALIDATED_ERROR_MAX`. */
  law: StepLaw;
  method: "one scalar" | "fused" | "two passes";
  /** Of the part that was fitted, and of the rest (absent: too few); both from one replay of the whole log. */
  fitted: ErrorTable;
  holdOut: ErrorTable | undefined;
  replays: number;
  steps: number;
  preemptions: number;
  /** What a reader should know: limits that were assumed, physics broken, parts left out. */
  notes: readonly string[];
};

/** Fewer say nothing about a percentile. */
export const REQUESTS_MIN = 20;
/** Requests that are fitted at most: one evaluation is a replay of all of them. */
export const FITTED_REQUESTS_MAX = 2000;
export const VALIDATED_ERROR_MAX = 0.1;

/** With fewer requests that ended before the log's tail, the tail is compared as well. */
const UNDISTURBED_MIN = 40;

/** Fits a law to a log. Throws CalibrationError for a log or options from which none can be had. */
export function calibrate(log: RequestLog, options: CalibrationOptions = {}): Calibration {
  const { split = 0.5, base } = options;
  checkOptions(options, split);
  const share = Math.ceil(log.requests.length * split);
  const count = Math.min(share, FITTED_REQUESTS_MAX);
  const notes = [...log.warnings];
  if (count < share) notes.push(`only the first ${count} requests were fitted`);
  const load = loadOf(log.requests, count);
  const targets = targetsOf(load, count);
  if (targets.last.length < REQUESTS_MIN) {
    throw new CalibrationError(
      `${log.file}: only ${targets.last.length} of the first ${count} requests have a first and a last token; ` +
        `${REQUESTS_MIN} are needed`,
    );
  }
  const replayer = new Replayer(load, options.onProgress);
  const seen = schedulerLimits(load.slice(0, count));
  const fit =
    base === undefined
      ? fromScratch(log, seen, replayer, targets, options, notes)
      : oneScalar(log, seen, replayer, targets, base, options, notes);
  notes.push(...physicsViolations(fit.law));
  return judged(log, count, fit, replayer.replays, notes);
}

type Fit = Pick<Calibration, "law" | "method">;

function checkOptions(options: CalibrationOptions, split: number): void {
  if (!(split > 0 && split <= 1)) {
    throw new CalibrationError(`split is ${split}; it must be above 0 and at most 1`);
  }
  for (const name of ["sequencesMax", "batchedTokensMax", "kvBlocks"] as const) {
    const value = options[name];
    if (value === undefined || (Number.isSafeInteger(value) && value >= 1)) continue;
    throw new CalibrationError(`${name} is ${value}; it must be a whole number, 1 or more`);
  }
}

/** Replays one load under many laws, and counts. */
class Replayer {
  readonly load: readonly LoggedRequest[];
  replays = 0;
  readonly #onProgress: ((replays: number) => void) | undefined;

  constructor(load: readonly LoggedRequest[], onProgress: ((replays: number) => void) | undefined) {
    this.load = load;
    this.#onProgress = onProgress;
  }

  run(law: StepLaw, mode: "steps" | "leap", pauseUs = 0): LogReplay {
    const replay = replayLog(this.load, law, mode, pauseUs);
    this.replays++;
    this.#onProgress?.(this.replays);
    return replay;
  }
}

/** The first `count` requests, and those that came while any of them was there. */
function loadOf(requests: readonly LoggedRequest[], count: number): LoggedRequest[] {
  let endUs = 0;
  for (const { lastTokenUs, atUs } of requests.slice(0, count)) {
    endUs = Math.max(endUs, lastTokenUs ?? atUs);
  }
  return requests.filter(({ atUs }, index) => index < count || atUs <= endUs);
}

/** Indices of the requests whose first token, and whose last, are compared. */
type Targets = { readonly first: readonly number[]; readonly last: readonly number[] };

function targetsOf(load: readonly LoggedRequest[], count: number): Targets {
  let knownUntilUs = 0;
  for (const { atUs, scheduledUs } of load) {
    knownUntilUs = Math.max(knownUntilUs, scheduledUs ?? atUs);
  }
  const all: number[] = [];
  const first: number[] = [];
  const last: number[] = [];
  load.slice(0, count).forEach(({ scheduledUs, firstTokenUs, lastTokenUs }, index) => {
    if (firstTokenUs === undefined || lastTokenUs === undefined) return;
    all.push(index);
    if ((scheduledUs ?? firstTokenUs) <= knownUntilUs) first.push(index);
    if (lastTokenUs <= knownUntilUs) last.push(index);
  });
  // A log of one burst is all tail: then the tail it is.
  return last.length < UNDISTURBED_MIN ? { first: all, last: all } : { first, last };
}

function judged(
  log: RequestLog,
  count: number,
  { law, method }: Fit,
  replays: number,
  notes: readonly string[],
): Calibration {
  const { requests } = log;
  const whole = replayLog(requests, law);
  const fitted = errorTable(requests, whole, 0, count);
  const rest = errorTable(requests, whole, count, requests.length);
  const holdOut = rest.compared < REQUESTS_MIN ? undefined : rest;
  const within = (table: ErrorTable) => `means within ${(worstMean(table) * 100).toFixed(1)} %`;
  const check =
    holdOut === undefined
      ? "not checked on others"
      : `${holdOut.compared} others: ${within(holdOut)}`;
  return {
    law: {
      ...law,
      validated: holdOut !== undefined && worstMean(holdOut) <= VALIDATED_ERROR_MAX,
      note: `fitted to ${count} requests of a log (${within(fitted)}); ${check}`,
    },
    method,
    fitted,
    holdOut,
    replays,
    steps: whole.steps,
    preemptions: whole.preemptions,
    notes,
  };
}

// ---- one scalar ---------------------------------------------------------------------------------

const BISECTIONS = 24;
const NO_REPLAY: LogReplay = {
  first: new Float64Array(0),
  last: new Float64Array(0),
  steps: 0,
  preemptions: 0,
};

function oneScalar(
  log: RequestLog,
  seen: SchedulerLimits,
  replayer: Replayer,
  targets: Targets,
  base: StepLaw,
  options: CalibrationOptions,
  notes: string[],
): Fit {
  const { kvBlocks } = options;
  const frame: StepLaw = {
    ...base,
    name: options.name ?? `${base.name}+log`,
    sequencesMax: options.sequencesMax ?? base.sequencesMax,
    batchedTokensMax: options.batchedTokensMax ?? base.batchedTokensMax,
    ...(kvBlocks !== undefined && { kvBlocks, kvBlocksFrom: "measured" }),
    provenance: `${base.provenance}; h fitted on the mean TPOT of ${log.file}`,
  };
  requireSeats(frame);
  requireFits(log, frame);
  if (seen.runningMax > frame.sequencesMax) {
    notes.push(
      `the log shows ${seen.runningMax} requests at once, and the law allows ${frame.sequencesMax}: give the engine's ` +
        "own max_num_seqs",
    );
  }
  const { load } = replayer;
  const wantedUs = meanOf(pairsOf("tpot", load, NO_REPLAY, targets.last).real);
  if (Number.isNaN(wantedUs)) {
    throw new CalibrationError(`${log.file}: no answer of two tokens or more, so there is no TPOT`);
  }
  const tpotAt = (h: number) =>
    meanOf(pairsOf("tpot", load, replayer.run({ ...frame, h }, "steps"), targets.last).model);
  // From undoing nearly all of the shortest step to ten times it.
  const aloneUs = rawStepUs(frame, 1, 0, 0, 0, 0) - frame.h;
  let low = -0.9 * aloneUs;
  let high = 10 * aloneUs;
  const [fastest, slowest] = [tpotAt(low), tpotAt(high)];
  if (!(fastest < wantedUs && wantedUs < slowest)) {
    const ms = (us: number) => (us / 1000).toFixed(1);
    throw new CalibrationError(
      `no overhead per step brings ${base.name} to the log's mean TPOT of ${ms(wantedUs)} ms (${ms(fastest)}…` +
        `${ms(slowest)} ms are possible): it is the law of another model or card; choose another base, or none`,
    );
  }
  for (let i = 0; i < BISECTIONS; i++) {
    const middle = (low + high) / 2;
    if (tpotAt(middle) < wantedUs) low = middle;
    else high = middle;
  }
  const h = Math.round((low + high) / 2);
  if (h < 0) notes.push(`h is ${h} µs: the node is faster than the base law says`);
  return { law: { ...frame, h }, method: "one scalar" };
}

function requireSeats({ batchedTokensMax, sequencesMax }: StepLaw): void {
  if (batchedTokensMax >= sequencesMax) return;
  throw new CalibrationError(
    `a step of ${batchedTokensMax} tokens cannot hold ${sequencesMax} sequences; batchedTokensMax must be at least ` +
      "sequencesMax",
  );
}

/** The engine answered every request of the log, so every one must fit. */
function requireFits(log: RequestLog, law: StepLaw): void {
  for (const { id, promptTokens, outputTokens } of log.requests) {
    const blocks = Math.ceil((promptTokens + outputTokens) / KV_BLOCK_TOKENS);
    if (blocks <= law.kvBlocks) continue;
    throw new CalibrationError(
      `request ${JSON.stringify(id)} needs ${blocks} KV blocks of ${KV_BLOCK_TOKENS} tokens, and the law has ` +
        `${law.kvBlocks}; give the engine's own num_gpu_blocks`,
    );
  }
}

// ---- from scratch -------------------------------------------------------------------------------

/** Random starts beside the prior; those searched further; those searched to the end. */
const STARTS = 60;
const STARTS_KEPT = 8;
const FINISHED = 4;
const ITERATIONS_FIRST = 5;
const ITERATIONS_LAST = 30;
/** Weight of the priors: a coefficient one spread off costs as much as a mean 1 % off. */
const RIDGE = 0.02;
/**
 * Left out, a coefficient may make the loss so many times as large, and so much larger, and is still left out. A
 * cost of first uses, where there is one, makes it ten times as large.
 */
const LEFT_OUT = [
  { key: FIRST_USE, factor: 1.5, more: 2e-3 },
  { key: PAUSE, factor: 1.1, more: 1e-3 },
] as const;
/** Another budget must explain the log so much better than the usual one. */
const OTHER_BUDGET_LOSS = 0.4;
const BUDGETS: readonly number[] = [512, 1024, 2048, 4096, 8192, 16384];
const BUDGET_USUAL = 2048;
/** Steps seen singly: fewer are left aside, and so are those that are off by more in the middle (ln). */
const OBSERVED_MIN = 30;
const OBSERVED_DEVIATION_MAX = 0.2;

type Fitted = { readonly form: Form; readonly point: Point };

function fromScratch(
  log: RequestLog,
  seen: SchedulerLimits,
  replayer: Replayer,
  targets: Targets,
  options: CalibrationOptions,
  notes: string[],
): Fit {
  const frame = frameOf(log, seen, options, notes);
  const scale = scaleOf(replayer.load, targets);
  const forms = [fusedForm, twoPassForm].map((form) => form(frame, scale, seen.kvTokens));
  const search = new Search(replayer, targets, new Random(options.seed ?? 1).split("calibrate"));
  const found = forms.map((form) => search.best(form));
  let fit = best(found);
  const part = replayer.load.slice(0, (targets.first.at(-1) ?? 0) + 1);
  const steps = observedSteps(part, frame.batchedTokensMax);
  if (isShownBy(steps, lawOf(fit))) {
    // One step at a time tells apart what a replay only shows in sums.
    search.observe(steps);
    fit = best(found.map(({ form, point }) => search.polish(form, point.theta, ITERATIONS_LAST)));
  }
  for (const { key, factor, more } of LEFT_OUT) {
    const plain = search.without(key, fit);
    if (plain.point.loss <= factor * fit.point.loss + more) fit = plain;
  }
  if (options.batchedTokensMax === undefined) {
    const isSeen = seen.stepTokensMin > frame.batchedTokensMax / 2;
    if (!isSeen) fit = search.withBudget(fit, seen.stepTokensMin);
    const how = isSeen
      ? "was read off the log"
      : `is assumed: no step held more than ${seen.stepTokensMin} prompt tokens for certain`;
    notes.push(`max_num_batched_tokens ${lawOf(fit).batchedTokensMax} ${how}`);
  }
  const law = lawOf(fit);
  requireFits(log, law);
  return { law, method: fit.form.method };
}

function best(fits: readonly Fitted[]): Fitted {
  return fits.reduce((a, b) => (b.point.loss < a.point.loss ? b : a));
}

function lawOf({ form, point }: Fitted): StepLaw {
  return form.law(valuesOf(form, point.theta));
}

function valuesOf({ coefficients }: Form, theta: readonly number[]): Values {
  return (key) => {
    const index = coefficients.findIndex((each) => each.key === key);
    return index < 0 ? 0 : Math.exp(theta[index] ?? 0);
  };
}

/** Whether these steps lasted, in the middle, as the law says: then the log's stamps are step boundaries. */
function isShownBy(steps: readonly ObservedStep[], law: StepLaw): boolean {
  if (steps.length < OBSERVED_MIN) return false;
  const deviations = Float64Array.from(steps, (step) => stepDeviation(law, step)).sort();
  return Math.abs(quantileOf(deviations, 0.5)) < OBSERVED_DEVIATION_MAX;
}

/** Everything of the law that is not searched. */
function frameOf(
  log: RequestLog,
  seen: SchedulerLimits,
  options: CalibrationOptions,
  notes: string[],
): StepLaw {
  let blocksOfLongest = 1;
  for (const { promptTokens, outputTokens } of log.requests) {
    const blocks = Math.ceil((promptTokens + outputTokens) / KV_BLOCK_TOKENS);
    blocksOfLongest = Math.max(blocksOfLongest, blocks);
  }
  const sequencesMax = options.sequencesMax ?? seen.sequencesMax ?? Math.max(256, seen.runningMax);
  if (options.sequencesMax === undefined) {
    notes.push(
      seen.sequencesMax === undefined
        ? `max_num_seqs ${sequencesMax} is assumed: no more than ${seen.runningMax} requests ran at once`
        : `max_num_seqs ${sequencesMax} was read off the log`,
    );
  }
  const least = Math.max(seen.stepTokensMin, sequencesMax, BUDGET_USUAL);
  const law: StepLaw = {
    ...EMPTY_LAW,
    name: options.name ?? "calibrated",
    kvBlocks: options.kvBlocks ?? sequencesMax * blocksOfLongest,
    kvBlocksFrom: options.kvBlocks === undefined ? "log" : "measured",
    batchedTokensMax:
      options.batchedTokensMax ?? BUDGETS.find((budget) => budget >= least) ?? least,
    sequencesMax,
    provenance: `fitted to ${log.file}`,
  };
  if (options.kvBlocks !== undefined) requireFits(log, law);
  else if (seen.kvTokens !== undefined) {
    notes.push("KV memory was short: its size is fitted; give num_gpu_blocks if it is known");
  } else {
    notes.push(
      "KV memory was never short, so its size is unknown: the law has enough for every seat; give num_gpu_blocks",
    );
  }
  requireSeats(law);
  return law;
}

const EMPTY_LAW: StepLaw = {
  name: "calibrated",
  ...{ h: 0, W: 0, d: 0, F: 0, C: 0, s: [], a0: 0, aB: 0, actx: 0, p0: 0, pq: 0, comm: [] },
  kvBlocks: 1,
  kvBlocksFrom: "log",
  batchedTokensMax: BUDGET_USUAL,
  sequencesMax: 1,
  startUpUs: 60_000_000, // An assumption, as for the shipped laws of small models.
  hardware: UNKNOWN_HARDWARE,
  provenance: "",
  validated: false,
  note: "",
};

const LONG_PROMPT = 200;

function scaleOf(load: readonly LoggedRequest[], targets: Targets): Scale {
  const tpot = pairsOf("tpot", load, NO_REPLAY, targets.last).real.sort();
  if (tpot.length < REQUESTS_MIN) {
    throw new CalibrationError(
      `only ${tpot.length} answers have two tokens or more; ${REQUESTS_MIN} are needed`,
    );
  }
  const stepUs = Math.max(100, 0.6 * quantileOf(tpot, 0.1));
  const perToken: number[] = [];
  for (const index of targets.first) {
    const each = load[index];
    if (each?.firstTokenUs === undefined || each.promptTokens < LONG_PROMPT) continue;
    const us = each.firstTokenUs - Math.max(each.atUs, each.scheduledUs ?? each.atUs);
    perToken.push(Math.max(0, us - stepUs) / each.promptTokens);
  }
  const tokenUs = quantileOf(Float64Array.from(perToken).sort(), 0.1);
  return { stepUs, tokenUs: tokenUs > 0 ? Math.min(tokenUs, stepUs / 100) : stepUs / 300 };
}

class Search {
  readonly #replayer: Replayer;
  readonly #residuals: Residuals;
  readonly #random: Random;

  constructor(replayer: Replayer, targets: Targets, random: Random) {
    this.#replayer = replayer;
    this.#residuals = new Residuals(replayer.load, targets);
    this.#random = random;
  }

  /** From now on the law must fit these steps, too. */
  observe(steps: readonly ObservedStep[]): void {
    this.#residuals.observe(steps);
  }

  /** The best law of a form, from its prior and from random starts. */
  best(form: Form): Fitted {
    const random = this.#random.split(form.method);
    const prior = form.coefficients.map((each) => each.prior);
    const starts = [prior];
    for (let i = 0; i < STARTS; i++) {
      starts.push(
        // Twice a sum of three uniforms has variance 1: as good as normal here.
        form.coefficients.map(
          ({ prior: middle, spread }) =>
            middle + 1.4 * spread * (random.next() + random.next() + random.next() - 1.5),
        ),
      );
    }
    const downhill = (thetas: readonly (readonly number[])[], keep: number, iterations: number) =>
      thetas
        .map((theta) => this.polish(form, theta, iterations))
        .sort((a, b) => a.point.loss - b.point.loss)
        .slice(0, keep)
        .map(({ point }) => point.theta);
    const kept = downhill(downhill(starts, STARTS_KEPT, 0), FINISHED, ITERATIONS_FIRST);
    return best(kept.map((theta) => this.polish(form, theta, ITERATIONS_LAST)));
  }

  /** Downhill from `theta`; no iteration: as it is. */
  polish(form: Form, theta: readonly number[], iterations: number): Fitted {
    const residualsOf = (at: readonly number[]) => this.#residualsOf(form, at);
    const point =
      iterations === 0 ? pointAt(residualsOf, theta) : leastSquares(residualsOf, theta, iterations);
    return { form, point };
  }

  /** The fit without one coefficient. */
  without(key: string, fit: Fitted): Fitted {
    const { coefficients } = fit.form;
    const theta = fit.point.theta.filter((_, k) => coefficients[k]?.key !== key);
    return this.polish(withoutCoefficient(fit.form, key), theta, ITERATIONS_LAST);
  }

  /** The same law with another `max_num_batched_tokens`, where that explains the log much better. */
  withBudget(fit: Fitted, stepTokensMin: number): Fitted {
    const { batchedTokensMax, sequencesMax } = lawOf(fit);
    const others: Fitted[] = [];
    for (const budget of BUDGETS) {
      if (budget === batchedTokensMax || budget < Math.max(stepTokensMin, sequencesMax)) continue;
      const form: Form = {
        ...fit.form,
        law: (value) => ({ ...fit.form.law(value), batchedTokensMax: budget }),
      };
      const other = this.polish(form, fit.point.theta, ITERATIONS_FIRST);
      if (other.point.loss < OTHER_BUDGET_LOSS * fit.point.loss) others.push(other);
    }
    return best([fit, ...others]);
  }

  #residualsOf(form: Form, theta: readonly number[]): number[] {
    const value = valuesOf(form, theta);
    const law = form.law(value);
    const residuals = this.#residuals.of(
      this.#replayer.run(law, "leap", Math.round(value(PAUSE))),
      law,
    );
    form.coefficients.forEach(({ prior, spread }, k) => {
      residuals.push((RIDGE * ((theta[k] ?? 0) - prior)) / spread);
    });
    return residuals;
  }
}

const TIME_CLASSES = 8;
const SIZE_CLASSES = 4;
const STEP_CLASSES = 4;
const CLASS_MIN = 5;
const CLASS_WEIGHT = 0.5;
const STATISTIC_WEIGHTS: Readonly<Record<ErrorStatistic, number>> = {
  mean: 2,
  p50: 1,
  p90: 0.7,
  p95: 0.5,
  p99: 0.3,
};
/** A request that the model never ends is off by e⁵. */
const NEVER = 5;
/** A single step counts as off by e½ at most: now and then one pauses for something else. */
const OUTLIER = 0.5;

/** One metric of the compared requests: what the log says of it. */
type Part = {
  readonly metric: ErrorMetric;
  readonly indices: readonly number[];
  readonly statistics: readonly { statistic: ErrorStatistic; real: number }[];
  /** Stretches of time, then classes of size; members are positions in `indices`. */
  readonly classes: readonly { members: readonly number[]; real: number }[];
};

/** Logarithms of modelled ÷ real: many statistics of one replay, and steps one by one. */
class Residuals {
  readonly #load: readonly LoggedRequest[];
  readonly #parts: readonly Part[];
  #steps: readonly (readonly ObservedStep[])[] = [];

  constructor(load: readonly LoggedRequest[], targets: Targets) {
    this.#load = load;
    this.#parts = ERROR_METRICS.map((metric) => this.#partOf(metric, targets));
  }

  #partOf(metric: ErrorMetric, targets: Targets): Part {
    const load = this.#load;
    const indices = (metric === "ttft" ? targets.first : targets.last).filter(
      (index) => metric !== "tpot" || (load[index]?.outputTokens ?? 0) > 1,
    );
    const sizes = indices.map(
      (index) => (metric === "ttft" ? load[index]?.promptTokens : load[index]?.outputTokens) ?? 0,
    );
    const byTime = indices.map((_, position) => position);
    const bySize = [...byTime].sort((a, b) => (sizes[a] ?? 0) - (sizes[b] ?? 0));
    const values = pairsOf(metric, load, NO_REPLAY, indices).real;
    const classes = [...classesOf(byTime, TIME_CLASSES), ...classesOf(bySize, SIZE_CLASSES)];
    const sorted = values.slice().sort();
    return {
      metric,
      indices,
      statistics: ERROR_STATISTICS.map((statistic) => ({
        statistic,
        real: statisticOf(statistic, sorted),
      })),
      classes: classes.map((members) => ({ members, real: meanAt(values, members) })),
    };
  }

  /** Classes of steps by new or not and by prompt length; each counts by its mean. */
  observe(steps: readonly ObservedStep[]): void {
    this.#steps = [true, false].flatMap((isNew) => {
      const some = steps.filter((step) => step.isNew === isNew);
      some.sort((a, b) => a.promptTokens - b.promptTokens);
      return classesOf(some, STEP_CLASSES);
    });
  }

  of(replay: LogReplay, law: StepLaw): number[] {
    const residuals: number[] = [];
    for (const { metric, indices, statistics, classes } of this.#parts) {
      const values = new Float64Array(indices.length);
      indices.forEach((index, position) => {
        const request = this.#load[index];
        if (request !== undefined)
          values[position] = modelledLatency(metric, request, replay, index);
      });
      for (const { members, real } of classes) {
        residuals.push(CLASS_WEIGHT * logOf(meanAt(values, members) / real));
      }
      values.sort(); // NaN goes to the end.
      for (const { statistic, real } of statistics) {
        residuals.push(STATISTIC_WEIGHTS[statistic] * logOf(statisticOf(statistic, values) / real));
      }
    }
    for (const steps of this.#steps) {
      const clipped = steps.map((step) =>
        Math.max(-OUTLIER, Math.min(OUTLIER, stepDeviation(law, step))),
      );
      residuals.push(meanOf(clipped));
    }
    return residuals;
  }
}

function meanAt(values: Float64Array, positions: readonly number[]): number {
  let sum = 0;
  for (const position of positions) sum += values[position] ?? Number.NaN;
  return sum / positions.length;
}

function logOf(ratio: number): number {
  return ratio > 0 ? Math.max(-NEVER, Math.min(NEVER, Math.log(ratio))) : NEVER;
}

/** Stretches of like length, without those too short to count. */
function classesOf<T>(items: readonly T[], count: number): T[][] {
  const classes: T[][] = [];
  for (let i = 0; i < count; i++) {
    const from = Math.round((i * items.length) / count);
    const to = Math.round(((i + 1) * items.length) / count);
    if (to - from >= CLASS_MIN) classes.push(items.slice(from, to));
  }
  return classes;
}
