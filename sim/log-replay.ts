/**
 * A request log through the node model, and how far the model's latencies are from the log's.
 *
 * TTFT and E2E are first and last token − arrival, TPOT = (E2E − TTFT) ÷ (tokens − 1); quantiles are linear between
 * neighbours, at (count − 1) · p. The model knows the true length of each answer and no more. Pure.
 */
import { GpuNodeModel } from "./gpu-node-model.ts";
import type { StepLaw } from "./laws.ts";
import type { LoggedRequest } from "./request-log.ts";

/** When the model gave each request its first and last token; NaN: never. µs since the first arrival. */
export type LogReplay = {
  readonly first: Float64Array;
  readonly last: Float64Array;
  readonly steps: number;
  readonly preemptions: number;
};

export type ErrorStatistic = "mean" | "p50" | "p90" | "p95" | "p99";
export type ErrorMetric = "ttft" | "tpot" | "e2e";
export const ERROR_STATISTICS: readonly ErrorStatistic[] = ["mean", "p50", "p90", "p95", "p99"];
export const ERROR_METRICS: readonly ErrorMetric[] = ["ttft", "tpot", "e2e"];

/** One number of the real engine, the model's, and model ÷ real − 1. */
export type Deviation = { realMs: number; modelMs: number; error: number };
export type ErrorTable = {
  requests: number;
  /** Those with whole timing. */
  compared: number;
} & Record<ErrorMetric, Record<ErrorStatistic, Deviation>>;

const FOREVER_US = 1_000_000_000_000_000;

/**
 * Replays requests, in order of arrival. `leap` is faster and rounds less often. `pauseUs`: the engine does nothing for
 * so long from the first arrival on.
 */
export function replayLog(
  requests: readonly LoggedRequest[],
  law: StepLaw,
  mode: "steps" | "leap" = "steps",
  pauseUs = 0,
): LogReplay {
  const model = new GpuNodeModel({ law, mode });
  let isPaused = pauseUs > 0;
  if (isPaused) model.hang(0);
  requests.forEach(({ promptTokens, outputTokens, atUs }, index) => {
    if (isPaused && atUs >= pauseUs) {
      model.resume(pauseUs);
      isPaused = false;
    }
    // A caller's max_tokens is not in a log; the true length never refuses what the engine took.
    const request = { id: String(index), promptTokens, maxTokens: outputTokens, outputTokens };
    model.submit(request, atUs);
  });
  if (isPaused) model.resume(Math.max(pauseUs, requests.at(-1)?.atUs ?? 0));
  const first = new Float64Array(requests.length).fill(Number.NaN);
  const last = new Float64Array(requests.length).fill(Number.NaN);
  for (const event of model.advance(FOREVER_US)) {
    if (event.kind === "first_token") first[Number(event.id)] = event.atUs;
    else if (event.kind === "finished") last[Number(event.id)] = event.atUs;
  }
  const { stepsTotal, preemptionsTotal } = model.snapshot();
  return { first, last, steps: stepsTotal, preemptions: preemptionsTotal };
}

/** Values of the log and, in the same order, of the replay; requests without the metric are left out. */
export function pairsOf(
  metric: ErrorMetric,
  requests: readonly LoggedRequest[],
  replay: LogReplay,
  indices: readonly number[],
): { real: Float64Array; model: Float64Array } {
  const real: number[] = [];
  const model: number[] = [];
  for (const index of indices) {
    const request = requests[index];
    if (request?.firstTokenUs === undefined || request.lastTokenUs === undefined) continue;
    if (metric === "tpot" && request.outputTokens < 2) continue;
    real.push(latencyOf(metric, request, request.firstTokenUs, request.lastTokenUs));
    model.push(modelledLatency(metric, request, replay, index));
  }
  return { real: Float64Array.from(real), model: Float64Array.from(model) };
}

/** µs (TPOT: per token, of an answer of two or more); NaN for a request that the model never ended. */
export function modelledLatency(
  metric: ErrorMetric,
  request: LoggedRequest,
  replay: LogReplay,
  index: number,
): number {
  const first = replay.first[index] ?? Number.NaN;
  const last = replay.last[index] ?? Number.NaN;
  return latencyOf(metric, request, first, last);
}

function latencyOf(
  metric: ErrorMetric,
  request: LoggedRequest,
  first: number,
  last: number,
): number {
  if (metric === "ttft") return first - request.atUs;
  if (metric === "e2e") return last - request.atUs;
  return (last - first) / (request.outputTokens - 1);
}

/** Errors over requests [from, to). */
export function errorTable(
  requests: readonly LoggedRequest[],
  replay: LogReplay,
  from: number,
  to: number,
): ErrorTable {
  const indices: number[] = [];
  for (let i = from; i < to; i++) {
    if (requests[i]?.lastTokenUs !== undefined) indices.push(i);
  }
  const deviations = (metric: ErrorMetric): Record<ErrorStatistic, Deviation> => {
    const pairs = pairsOf(metric, requests, replay, indices);
    const real = pairs.real.sort();
    const model = pairs.model.sort();
    const one = (statistic: ErrorStatistic): Deviation => {
      const realMs = statisticOf(statistic, real) / 1000;
      const modelMs = statisticOf(statistic, model) / 1000;
      return { realMs, modelMs, error: modelMs / realMs - 1 };
    };
    return {
      mean: one("mean"),
      p50: one("p50"),
      p90: one("p90"),
      p95: one("p95"),
      p99: one("p99"),
    };
  };
  return {
    requests: to - from,
    compared: indices.length,
    ttft: deviations("ttft"),
    tpot: deviations("tpot"),
    e2e: deviations("e2e"),
  };
}

/** Largest error of a mean, without its sign. */
export function worstMean(table: ErrorTable): number {
  return Math.max(...ERROR_METRICS.map((metric) => Math.abs(table[metric].mean.error)));
}

/** `sorted` ascends. */
export function statisticOf(statistic: ErrorStatistic, sorted: Float64Array): number {
  switch (statistic) {
    case "mean":
      return meanOf(sorted);
    case "p50":
      return quantileOf(sorted, 0.5);
    case "p90":
      return quantileOf(sorted, 0.9);
    case "p95":
      return quantileOf(sorted, 0.95);
    case "p99":
      return quantileOf(sorted, 0.99);
  }
}

/** `sorted` ascends; NaN when it is empty. */
export function quantileOf(sorted: Float64Array, p: number): number {
  const at = (sorted.length - 1) * p;
  const low = sorted[Math.floor(at)] ?? Number.NaN;
  const high = sorted[Math.ceil(at)] ?? Number.NaN;
  return low + (high - low) * (at - Math.floor(at));
}

/** NaN when it is empty. */
export function meanOf(values: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i] ?? Number.NaN;
  return sum / values.length;
}
