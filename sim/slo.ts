/**
 * Service-level objectives: what a load must get, read from one line of text and held against a run.
 *
 *   ttft p99 <= 2s, tpot p90 <= 60ms, e2e mean <= 10s, failed <= 0.1%, attainment >= 99%
 *
 * Pure. It knows no run: what was measured comes as numbers. Latencies count answered requests only, so an SLO
 * that limits neither failures nor refusals is kept by a system that refuses everybody: `withUnansweredLimited`
 * adds those limits for whoever plans by it.
 */

/**
 * Time to the first token, (e2e − ttft) ÷ (output tokens − 1), arrival to last token, and the wait for
 * admission in the gateway.
 */
export const latencyMetrics = ["ttft", "tpot", "e2e", "queue"] as const;
export type LatencyMetric = (typeof latencyMetrics)[number];

/**
 * Shares of all requests that came: refused by a limit or a full queue; failed for any other reason; answered
 * within every latency limit of the same SLO.
 */
export const shareMetrics = ["failed", "refused", "attainment"] as const;
export type ShareMetric = (typeof shareMetrics)[number];

export type Comparison = "<=" | "<" | ">=" | ">";

const signs: Readonly<Record<Comparison, string>> = { "<=": "≤", "<": "<", ">=": "≥", ">": ">" };

/** A limit with its sign, `≤ 2 s`. */
export function limitText(comparison: Comparison, limit: number, unit: "ms" | "share"): string {
  return `${signs[comparison]} ${unit === "ms" ? durationText(limit) : percentText(limit)}`;
}

export type LatencyObjective = {
  kind: "latency";
  metric: LatencyMetric;
  /** `mean`, or the percentile as a share: 0.99. */
  statistic: "mean" | number;
  comparison: Comparison;
  limitMs: number;
  /** What is measured, `TTFT p99`, and the whole as a reader writes it, `TTFT p99 ≤ 2 s`. */
  name: string;
  text: string;
};

export type ShareObjective = {
  kind: "share";
  metric: ShareMetric;
  comparison: Comparison;
  /** 0..1. */
  limit: number;
  name: string;
  text: string;
};

export type Objective = LatencyObjective | ShareObjective;

/** One to `OBJECTIVES_MAX` objectives; all must hold. `added`: texts of those that nobody wrote. */
export type Slo = { objectives: readonly Objective[]; text: string; added: readonly string[] };

const OBJECTIVES_MAX = 20;
const FORM = '"ttft p99 <= 2s, e2e p99 <= 30s, failed <= 0.1%"';

/** An SLO that cannot be read; the message says which part, why, and what is accepted. */
export class SloError extends Error {
  override readonly name = "SloError";
}

/** Reads an SLO. Throws SloError. */
export function parseSlo(text: string): Slo {
  const parts = text.split(/[,;]\s*\n|[,;\n]/).map((part) => part.trim());
  while (parts.at(-1) === "") parts.pop();
  if (parts.length === 0) throw new SloError(`the SLO is empty; write for example ${FORM}`);
  if (parts.length > OBJECTIVES_MAX) {
    throw new SloError(`the SLO has ${parts.length} parts; at most ${OBJECTIVES_MAX} are accepted`);
  }
  const objectives: Objective[] = [];
  for (const [index, part] of parts.entries()) {
    const where = `part ${index + 1} of the SLO (${JSON.stringify(part)})`;
    const objective = parseObjective(part, where);
    const twin = objectives.find((other) => isSameMeasure(other, objective));
    if (twin !== undefined) {
      throw new SloError(`${where} limits what ${JSON.stringify(twin.text)} limits already`);
    }
    objectives.push(objective);
  }
  return sloOf(objectives, []);
}

function sloOf(objectives: readonly Objective[], added: readonly string[]): Slo {
  return { objectives, text: objectives.map(({ text }) => text).join(", "), added };
}

/** Where an SLO says nothing of failures or refusals, and asks for no attainment either. */
const UNANSWERED_MAX = 0.01;

/**
 * The SLO with a limit on failures (1 % unless it has one) and on refusals (as on failures unless it has one); as it
 * is when it asks for attainment, which counts both.
 */
export function withUnansweredLimited(slo: Slo): Slo {
  const shareOf = (metric: ShareMetric) =>
    slo.objectives.find((objective) => objective.metric === metric);
  if (shareOf("attainment") !== undefined) return slo;
  const failed = shareOf("failed");
  const limit = failed?.kind === "share" ? failed.limit : UNANSWERED_MAX;
  const added = (["failed", "refused"] as const)
    .filter((metric) => shareOf(metric) === undefined)
    .map((metric) => objectiveOfShare(metric, "<=", limit * 100));
  return sloOf(
    [...slo.objectives, ...added],
    added.map(({ text }) => text),
  );
}

function isSameMeasure(left: Objective, right: Objective): boolean {
  return (
    left.metric === right.metric &&
    (left.kind === "latency" ? left.statistic : "") ===
      (right.kind === "latency" ? right.statistic : "")
  );
}

function parseObjective(part: string, where: string): Objective {
  if (part === "") throw new SloError(`${where} is empty; write for example ${FORM}`);
  const match = /^([a-z0-9_.\s]*?)\s*(<=|>=|=<|=>|==|=|<|>|≤|≥)\s*(.*)$/i.exec(part);
  const [, left = "", sign = "", right = ""] = match ?? [];
  if (match === null) {
    throw new SloError(`${where} has no comparison; write it like ${FORM}`);
  }
  const [name = "", statistic, ...rest] = left.trim().toLowerCase().split(/\s+/);
  if (rest.length > 0) {
    throw new SloError(
      `${where}: ${JSON.stringify(rest.join(" "))} is too much before the comparison; ` +
        `accepted: a metric and its statistic, like "ttft p99"`,
    );
  }
  const comparison = comparisonOf(sign, where);
  const latency = latencyMetrics.find((metric) => metric === name);
  if (latency !== undefined) return latencyObjective(latency, statistic, comparison, right, where);
  const share = shareMetrics.find((metric) => metric === name);
  if (share !== undefined) return shareObjective(share, statistic, comparison, right, where);
  const known = [...latencyMetrics, ...shareMetrics].join(", ");
  throw new SloError(
    name === ""
      ? `${where} names no metric; accepted: ${known}`
      : `${where}: unknown metric ${JSON.stringify(name)}; accepted: ${known}`,
  );
}

function comparisonOf(sign: string, where: string): Comparison {
  if (sign === "≤") return "<=";
  if (sign === "≥") return ">=";
  if (sign === "<=" || sign === "<" || sign === ">=" || sign === ">") return sign;
  throw new SloError(
    `${where}: ${JSON.stringify(sign)} is no comparison here; accepted: <=, <, >=`,
  );
}

function latencyObjective(
  metric: LatencyMetric,
  statistic: string | undefined,
  comparison: Comparison,
  right: string,
  where: string,
): LatencyObjective {
  if (statistic === undefined) {
    throw new SloError(
      `${where}: ${metric} needs a statistic; accepted: mean, or a percentile like p50, p99 or p99.9`,
    );
  }
  if (comparison === ">=" || comparison === ">") {
    throw new SloError(`${where}: a latency has an upper limit; accepted: <= or <`);
  }
  const kept = statisticOf(statistic, where);
  const limitMs = durationMs(right, where);
  const shown = kept === "mean" ? "mean" : percentileName(kept);
  const name = `${metric === "queue" ? metric : metric.toUpperCase()} ${shown}`;
  const text = `${name} ${signs[comparison]} ${durationText(limitMs)}`;
  return { kind: "latency", metric, statistic: kept, comparison, limitMs, name, text };
}

function statisticOf(text: string, where: string): "mean" | number {
  if (text === "mean") return "mean";
  const [, digits] = /^p(\d{1,2}(?:\.\d{1,3})?)$/.exec(text) ?? [];
  const percentile = Number(digits ?? Number.NaN);
  if (percentile > 0 && percentile < 100) return Math.round(percentile * 1000) / 100_000;
  throw new SloError(
    `${where}: unknown statistic ${JSON.stringify(text)}; accepted: mean, or a percentile above p0 and ` +
      "below p100, like p50, p99 or p99.9",
  );
}

const unitsMs: Readonly<Record<string, number>> = {
  µs: 0.001,
  μs: 0.001, // The Greek letter beside the micro sign: keyboards have either.
  us: 0.001,
  ms: 1,
  s: 1000,
  min: 60_000,
};

function durationMs(text: string, where: string): number {
  const [, digits, unit = ""] = /^(\d+(?:\.\d+)?|\.\d+)\s*([^\d\s]*)$/.exec(text.trim()) ?? [];
  const unitMs = Object.hasOwn(unitsMs, unit) ? unitsMs[unit] : undefined;
  const limitMs = Number(digits ?? Number.NaN) * (unitMs ?? Number.NaN);
  if (limitMs > 0) return limitMs;
  throw new SloError(
    `${where}: ${JSON.stringify(text.trim())} is no time; accepted: a number above 0 with a unit µs, ms, s or ` +
      "min, like 500ms or 2s",
  );
}

function shareObjective(
  metric: ShareMetric,
  statistic: string | undefined,
  comparison: Comparison,
  right: string,
  where: string,
): ShareObjective {
  if (statistic !== undefined) {
    throw new SloError(
      `${where}: ${metric} is a share and takes no statistic; accepted: ${metric} alone, like "failed <= 0.1%"`,
    );
  }
  const isLower = comparison === ">=" || comparison === ">";
  if (metric === "attainment" && !isLower) {
    throw new SloError(`${where}: attainment has a lower limit; accepted: >=`);
  }
  if (metric !== "attainment" && isLower) {
    throw new SloError(`${where}: ${metric} has an upper limit; accepted: <= or <`);
  }
  const [, digits] = /^(\d+(?:\.\d+)?|\.\d+)\s*%$/.exec(right.trim()) ?? [];
  const percent = Number(digits ?? Number.NaN);
  if (!(percent >= 0 && percent <= 100)) {
    throw new SloError(
      `${where}: ${JSON.stringify(right.trim())} is no share; accepted: a number from 0 to 100 with %, like 0.1%`,
    );
  }
  return objectiveOfShare(metric, comparison, percent);
}

function objectiveOfShare(
  metric: ShareMetric,
  comparison: Comparison,
  percent: number,
): ShareObjective {
  const text = `${metric} ${signs[comparison]} ${Number(percent.toPrecision(6))}%`;
  return { kind: "share", metric, comparison, limit: percent / 100, name: metric, text };
}

/** True when the value keeps the objective; ms for a latency, 0..1 for a share. */
export function isMet(objective: Objective, value: number): boolean {
  const limit = limitOf(objective);
  switch (objective.comparison) {
    case "<=":
      return value <= limit;
    case "<":
      return value < limit;
    case ">=":
      return value >= limit;
    case ">":
      return value > limit;
  }
}

/** ms for a latency, 0..1 for a share. */
export function limitOf(objective: Objective): number {
  return objective.kind === "latency" ? objective.limitMs : objective.limit;
}

/** How a value of this objective is written. */
export function valueText(objective: Objective, value: number | undefined): string {
  if (value === undefined) return "none";
  return objective.kind === "latency" ? durationText(value) : percentText(value);
}

/** `p99` of 0.99, `p99.9` of 0.999. */
export function percentileName(share: number): string {
  return `p${Number((share * 100).toFixed(3))}`;
}

/** A duration with three digits that count and its unit: 850 µs, 12.3 ms, 2 s, 15 min. */
export function durationText(ms: number): string {
  const size = Math.abs(ms);
  if (size === 0) return "0 s";
  if (size < 1) return `${digits3(ms * 1000)} µs`;
  if (size < 1000) return `${digits3(ms)} ms`;
  return size < 600_000 ? `${digits3(ms / 1000)} s` : `${digits3(ms / 60_000)} min`;
}

/** A share as percent: 0.12 %, 99.5 %. */
export function percentText(share: number): string {
  const percent = share * 100;
  if (percent === 0 || percent === 100) return `${percent} %`;
  if (percent > 0 && percent < 0.0005) return "< 0.001 %";
  if (percent < 100 && percent > 99.9995) return "> 99.999 %";
  // 99.96 must not read as met when it is not: more digits near either end.
  const edge = Math.min(Math.abs(percent), Math.abs(100 - percent));
  return `${percent.toFixed(edge < 0.1 ? 3 : edge < 1 ? 2 : 1)} %`;
}

function digits3(value: number): string {
  const size = Math.abs(value);
  return String(Number(value.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0)));
}
