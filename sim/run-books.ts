/**
 * The books of one simulated run: what became of every request, and what the system looked like over time.
 *
 * Memory does not grow with the run: latencies are histograms, and time is at most 200 windows, which double in
 * length when the run outgrows them. Requests that arrive outside the measured part (warm-up, end) are carried like
 * all others and count in the windows, but in no latency, outcome or share.
 *
 * It sees requests from outside the gateways: their records, and what the load knew of them.
 */
import type { RequestRecord } from "../actors/protocol.ts";
import { Histogram } from "./histogram.ts";
import type { LatencySummary, RunSeries } from "./plan-report.ts";
import { isMet, type LatencyObjective, type Slo } from "./slo.ts";
import type { HalfRun, RunEvidence } from "./statistics.ts";

/** Requests that arrived in the measured part, by their end; the sum is `arrived`. */
export type OutcomeCounts = {
  arrived: number;
  completed: number;
  /** By a limit or a full queue; failed is everything else that went wrong. */
  refused: number;
  failed: number;
  /** Clients that went away before their answer was whole. */
  left: number;
  /** Still open when the simulation was stopped. */
  unfinished: number;
};

/** What the system looks like at one moment. */
export type Moment = {
  /** Requests in gateways that no node works on, and requests on nodes. */
  queued: number;
  running: number;
  /** Share of the nodes' time since the last moment that had work, and of their KV memory in use: means, 0..1. */
  utilization: number;
  kv: number;
  nodesUp: number;
  circuitsOpen: number;
  circuitsHalfOpen: number;
};

export type SimulationSeries = RunSeries & {
  circuitsOpen: number[];
  circuitsHalfOpen: number[];
};

/** Part of the load that is measured, by arrival, µs since the load began. */
export type Measured = { fromUs: number; toUs: number };

const WINDOWS_MAX = 200;
const WINDOW_US_MIN = 1_000_000;
/** Precision of latencies per window, bits: 6 %. */
const WINDOW_BITS = 4;
const MARKS_MAX = 2000;

/** Refusals by policy; every other end without an answer is a failure. */
const refusalCodes = /^(rate_limit|quota|queue_full|pool_overloaded|request_too_large)/;

class Window {
  arrivals = 0;
  inputTokens = 0;
  outputTokens = 0;
  ended = 0;
  hits = 0;
  ttft = new Histogram(WINDOW_BITS);
  e2e = new Histogram(WINDOW_BITS);
  moments = 0;
  /** Sums over the moments. */
  readonly sums: Moment = {
    queued: 0,
    running: 0,
    utilization: 0,
    kv: 0,
    nodesUp: 0,
    circuitsOpen: 0,
    circuitsHalfOpen: 0,
  };

  absorb(later: Window): void {
    this.arrivals += later.arrivals;
    this.inputTokens += later.inputTokens;
    this.outputTokens += later.outputTokens;
    this.ended += later.ended;
    this.hits += later.hits;
    this.ttft.merge(later.ttft);
    this.e2e.merge(later.e2e);
    this.moments += later.moments;
    this.addMoment(later.sums);
  }

  addMoment(moment: Moment): void {
    const { sums } = this;
    sums.queued += moment.queued;
    sums.running += moment.running;
    sums.utilization += moment.utilization;
    sums.kv += moment.kv;
    sums.nodesUp += moment.nodesUp;
    sums.circuitsOpen += moment.circuitsOpen;
    sums.circuitsHalfOpen += moment.circuitsHalfOpen;
  }

  mean(of: (moment: Moment) => number): number {
    return this.moments === 0 ? 0 : of(this.sums) / this.moments;
  }
}

export class RunBooks {
  readonly ttftUs = new Histogram();
  readonly tpotUs = new Histogram();
  readonly e2eUs = new Histogram();
  readonly queueUs = new Histogram();
  readonly counts: OutcomeCounts = {
    arrived: 0,
    completed: 0,
    refused: 0,
    failed: 0,
    left: 0,
    unfinished: 0,
  };
  /** `ok`, or the code of the end. */
  readonly codes = new Map<string, number>();
  readonly cache = new Map<string, number>();
  readonly marks: { atMs: number; text: string }[] = [];
  attempts = 0;
  retries = 0;
  promptTokens = 0;
  cachedTokens = 0;
  outputTokens = 0;

  readonly #measured: Measured;
  readonly #limits: readonly LatencyObjective[];
  #windows: Window[] = [];
  #windowUs = WINDOW_US_MIN;
  #attained = 0;
  #firstUs = -1;
  #lastUs = 0;
  #utilizationSum = 0;
  #utilizationMoments = 0;
  #kvPeak = 0;

  constructor(measured: Measured, slo: Slo | undefined) {
    this.#measured = measured;
    this.#limits = (slo?.objectives ?? []).filter((objective) => objective.kind === "latency");
  }

  arrived(atUs: number, inputTokens: number, outputTokens: number): void {
    if (this.#firstUs < 0) this.#firstUs = atUs;
    this.#lastUs = atUs;
    const window = this.#windowAt(atUs);
    window.arrivals++;
    window.inputTokens += inputTokens;
    window.outputTokens += outputTokens;
    if (this.#counts(atUs)) this.counts.arrived++;
  }

  /** `atUs`: when the request arrived. */
  ended(atUs: number, record: RequestRecord): void {
    const { code, outcome, cache } = record;
    const window = this.#windowAt(atUs);
    window.ended++;
    if (cache === "hit_exact" || cache === "hit_semantic" || cache === "joined") window.hits++;
    if (this.#counts(atUs)) {
      addTo(this.codes, outcome === "ok" ? "ok" : (code ?? outcome));
      addTo(this.cache, cache);
      this.attempts += record.attempts.length;
      this.retries += Math.max(0, record.attempts.length - 1);
      if (outcome === "left") this.counts.left++;
      else if (outcome === "ok") this.counts.completed++;
      else if (outcome === "refused" && refusalCodes.test(code ?? "")) this.counts.refused++;
      else this.counts.failed++;
    }
    if (outcome === "ok") this.#answered(atUs, record, window);
  }

  /** Ended without a record: its gateway went down with it. */
  lost(atUs: number, code: string): void {
    this.#windowAt(atUs).ended++;
    if (!this.#counts(atUs)) return;
    addTo(this.codes, code);
    this.counts.failed++;
  }

  unfinished(atUs: number): void {
    if (this.#counts(atUs)) this.counts.unfinished++;
  }

  #answered(atUs: number, record: RequestRecord, window: Window): void {
    const e2eMs = record.endedMs;
    const ttftMs = record.ttftMs ?? e2eMs;
    const outputTokens = record.usage?.outputTokens ?? 0;
    const tpotMs = outputTokens > 1 ? (e2eMs - ttftMs) / (outputTokens - 1) : undefined;
    window.ttft.add(Math.round(ttftMs * 1000));
    window.e2e.add(Math.round(e2eMs * 1000));
    if (!this.#counts(atUs)) return;
    this.ttftUs.add(Math.round(ttftMs * 1000));
    this.e2eUs.add(Math.round(e2eMs * 1000));
    this.queueUs.add(Math.round(record.queuedMs * 1000));
    if (tpotMs !== undefined) this.tpotUs.add(Math.round(tpotMs * 1000));
    this.promptTokens += record.usage?.promptTokens ?? 0;
    this.cachedTokens += record.usage?.cachedTokens ?? 0;
    this.outputTokens += outputTokens;
    const values = { ttft: ttftMs, tpot: tpotMs ?? 0, e2e: e2eMs, queue: record.queuedMs };
    if (this.#limits.every((limit) => isMet(limit, values[limit.metric]))) this.#attained++;
  }

  moment(atUs: number, moment: Moment, kvMax: number): void {
    const window = this.#windowAt(Math.max(0, atUs - 1)); // It speaks of the time before it.
    window.moments++;
    window.addMoment(moment);
    if (!this.#counts(atUs)) return;
    this.#kvPeak = Math.max(this.#kvPeak, kvMax);
    this.#utilizationSum += moment.utilization;
    this.#utilizationMoments++;
  }

  mark(atUs: number, text: string): void {
    if (this.marks.length < MARKS_MAX) this.marks.push({ atMs: atUs / 1000, text });
  }

  /** Length of a window now, µs. */
  get windowUs(): number {
    return this.#windowUs;
  }

  isMeasured(atUs: number): boolean {
    return this.#counts(atUs);
  }

  #counts(atUs: number): boolean {
    return atUs >= this.#measured.fromUs && atUs < this.#measured.toUs;
  }

  #windowAt(atUs: number): Window {
    let index = Math.floor(atUs / this.#windowUs);
    while (index >= WINDOWS_MAX) {
      this.#double();
      index = Math.floor(atUs / this.#windowUs);
    }
    while (this.#windows.length <= index) this.#windows.push(new Window());
    return this.#windows[index] ?? new Window(); // The second never happens.
  }

  #double(): void {
    const merged: Window[] = [];
    this.#windows.forEach((window, index) => {
      if (index % 2 === 0) merged.push(window);
      else merged.at(-1)?.absorb(window);
    });
    this.#windows = merged;
    this.#windowUs *= 2;
  }

  // ---- at the end -----------------------------------------------------------------------------------

  get lastArrivalUs(): number {
    return this.#lastUs;
  }

  get utilization(): number {
    return this.#utilizationMoments === 0 ? 0 : this.#utilizationSum / this.#utilizationMoments;
  }

  get kvPeak(): number {
    return this.#kvPeak;
  }

  /** Share of the measured requests that were answered within every latency limit; undefined without a limit. */
  get attainment(): number | undefined {
    if (this.#limits.length === 0) return undefined;
    return this.counts.arrived === 0 ? 0 : this.#attained / this.counts.arrived;
  }

  /** Seconds of the load that are measured. */
  get measuredSeconds(): number {
    const untilUs = Math.min(this.#measured.toUs, this.#lastUs);
    return Math.max(0, untilUs - Math.max(this.#measured.fromUs, this.#firstUs)) / 1e6;
  }

  series(): SimulationSeries {
    const windows = this.#windows;
    const list = (of: (window: Window) => number) => windows.map(of);
    /** A window that nobody looked into is taken for like the one before. */
    const means = (of: (moment: Moment) => number) => {
      let last = 0;
      return windows.map((window) => {
        if (window.moments > 0) last = window.mean(of);
        return last;
      });
    };
    const quantiles = (of: (window: Window) => Histogram, p: number) =>
      windows.map((window) => msOf(of(window).quantile(p)));
    const seconds = this.#windowUs / 1e6;
    return {
      windowMs: this.#windowUs / 1000,
      arrivalsPerSecond: list((window) => window.arrivals / seconds),
      queued: means(({ queued }) => queued),
      running: means(({ running }) => running),
      utilization: means(({ utilization }) => utilization),
      kv: means(({ kv }) => kv),
      nodesUp: means(({ nodesUp }) => nodesUp),
      circuitsOpen: means(({ circuitsOpen }) => circuitsOpen),
      circuitsHalfOpen: means(({ circuitsHalfOpen }) => circuitsHalfOpen),
      hitShare: list((window) => (window.ended === 0 ? 0 : window.hits / window.ended)),
      ttftP50Ms: quantiles((window) => window.ttft, 0.5),
      ttftP99Ms: quantiles((window) => window.ttft, 0.99),
      e2eP99Ms: quantiles((window) => window.e2e, 0.99),
      marks: this.marks,
    };
  }

  /** What statistics.ts must know to judge the run. Windows that lie partly outside the measured part are left out. */
  evidence(): RunEvidence {
    const { arrived, completed, refused, failed, left, unfinished } = this.counts;
    const fromUs = Math.max(this.#measured.fromUs, Math.max(0, this.#firstUs));
    const toUs = Math.min(this.#measured.toUs, this.#lastUs);
    const inside = this.#windows.filter((_, index) => {
      const startUs = index * this.#windowUs;
      return startUs >= fromUs && startUs + this.#windowUs <= toUs;
    });
    const seconds = this.#windowUs / 1e6;
    const middle = Math.ceil(inside.length / 2);
    return {
      durationMs: Math.max(0, this.#lastUs - Math.max(0, this.#firstUs)) / 1000,
      warmUpMs: Math.max(0, fromUs - Math.max(0, this.#firstUs)) / 1000,
      arrived,
      completed,
      refused,
      failed: failed + left,
      unfinished,
      longestE2eMs: this.e2eUs.max / 1000,
      utilization: this.utilization,
      kvPeak: this.#kvPeak,
      halves: [halfOf(inside.slice(0, middle)), halfOf(inside.slice(middle))],
      inSystem: inside.map((window) => window.mean((sums) => sums.queued + sums.running)),
      arrivalsPerSecond: inside.map((window) => window.arrivals / seconds),
    };
  }
}

function halfOf(windows: readonly Window[]): HalfRun {
  let arrived = 0;
  let inputTokens = 0;
  let outputTokens = 0;
  let e2eUs = 0;
  let answered = 0;
  for (const window of windows) {
    arrived += window.arrivals;
    inputTokens += window.inputTokens;
    outputTokens += window.outputTokens;
    e2eUs += window.e2e.sum;
    answered += window.e2e.count;
  }
  return {
    arrived,
    inputTokens,
    outputTokens,
    e2eMeanMs: answered === 0 ? 0 : e2eUs / answered / 1000,
  };
}

/** Of a histogram of µs; null when it is empty. */
export function latencySummary(histogram: Histogram): LatencySummary | null {
  if (histogram.count === 0) return null;
  return {
    mean: histogram.mean / 1000,
    p50: msOf(histogram.quantile(0.5)) ?? 0,
    p90: msOf(histogram.quantile(0.9)) ?? 0,
    p99: msOf(histogram.quantile(0.99)) ?? 0,
    max: histogram.max / 1000,
  };
}

function msOf(us: number | undefined): number | null {
  return us === undefined ? null : us / 1000;
}

function addTo(counts: Map<string, number>, name: string): void {
  counts.set(name, (counts.get(name) ?? 0) + 1);
}
