/**
 * What a simulated run says: plain data for JSON and pages, and its form for a terminal.
 *
 * Pure. simulator.ts fills it; bin/sim.ts prints it. Latencies are ms over answered requests of the measured part:
 * TTFT and E2E count from arrival at the gateway, TPOT = (E2E − TTFT) ÷ (output tokens − 1). Shares are 0..1.
 */
import type { StepLaw } from "./laws.ts";
import type { LatencySummary } from "./plan-report.ts";
import { latencySummary, type OutcomeCounts, type SimulationSeries } from "./run-books.ts";
import type { SimulatedNodeResult, SimulationResult } from "./simulator.ts";
import { durationText, percentText } from "./slo.ts";
import { refusalReasons, VERDICT_MEANINGS, type Verdict, verdictOf } from "./statistics.ts";

/** Where the numbers come from: enough to make them again. */
export type RunProvenance = {
  /** The trace's file or the generator's text, its format, and the sha256 of the file's bytes or of the text. */
  load: string;
  format: string;
  sha256: string;
  laws: readonly {
    name: string;
    nodes: number;
    source: string;
    validated: boolean;
    note: string;
  }[];
  gateways: number;
  router: string;
  /** Options that differ from the defaults, or "defaults". */
  options: string;
  nodeVersion: string;
  version: string;
  command: string;
};

export type SimulationReport = {
  kind: "simulation";
  /** Of the variant, when several are compared. */
  name: string;
  seed: string;
  /** Of every message handled: equal for equal runs. */
  hash: string;
  messages: number;
  simulatedSeconds: number;
  wallMs: number;
  verdict: Verdict;
  /** Why no planning answer may rest on this run; empty when one may. */
  refusals: string[];
  counts: OutcomeCounts;
  codes: Readonly<Record<string, number>>;
  ttftMs: LatencySummary | null;
  tpotMs: LatencySummary | null;
  e2eMs: LatencySummary | null;
  queueMs: LatencySummary | null;
  /** With the SLO that was given; null without one. */
  slo: { text: string; attainment: number } | null;
  requestsPerSecond: number;
  outputTokensPerSecond: number;
  cache: Readonly<Record<string, number>>;
  /** Prompt tokens that nodes found in their prefix caches ÷ prompt tokens. */
  prefixHitShare: number;
  attempts: number;
  retries: number;
  clientRetries: number;
  utilization: number;
  kvPeak: number;
  preemptions: number;
  nodes: readonly SimulatedNodeResult[];
  gateways: readonly { name: string; requests: number }[];
  faults: readonly string[];
  /** What must not happen; empty lists and 0 in a sound run. */
  crashes: readonly string[];
  lateAttaches: number;
  deadLetters: Readonly<Record<string, number>>;
  series: SimulationSeries;
  provenance: RunProvenance;
};

/** @param physics where the laws beat physics; @param wallMs what the run took */
export function simulationReport(
  result: SimulationResult,
  more: {
    name: string;
    provenance: RunProvenance;
    wallMs: number;
    physics: readonly string[];
    sloText?: string;
  },
): SimulationReport {
  const { evidence, measuredSeconds, counts, nodes } = result;
  const perSecond = (total: number) => (measuredSeconds > 0 ? total / measuredSeconds : 0);
  const { sloText } = more;
  return {
    kind: "simulation",
    name: more.name,
    seed: result.seed,
    hash: result.hash,
    messages: result.messages,
    simulatedSeconds: result.simulatedUs / 1e6,
    wallMs: more.wallMs,
    verdict: verdictOf(evidence),
    refusals: refusalReasons(evidence, more.physics),
    counts,
    codes: result.codes,
    ttftMs: latencySummary(result.ttftUs),
    tpotMs: latencySummary(result.tpotUs),
    e2eMs: latencySummary(result.e2eUs),
    queueMs: latencySummary(result.queueUs),
    slo:
      sloText === undefined || result.attainment === undefined
        ? null
        : { text: sloText, attainment: result.attainment },
    requestsPerSecond: perSecond(counts.completed),
    outputTokensPerSecond: perSecond(result.outputTokens),
    cache: result.cache,
    prefixHitShare: result.promptTokens === 0 ? 0 : result.cachedTokens / result.promptTokens,
    attempts: result.attempts,
    retries: result.retries,
    clientRetries: result.clientRetries,
    utilization: evidence.utilization,
    kvPeak: evidence.kvPeak,
    preemptions: nodes.reduce((sum, node) => sum + node.preemptions, 0),
    nodes,
    gateways: result.gateways,
    faults: result.faults,
    crashes: result.crashes,
    lateAttaches: result.lateAttaches,
    deadLetters: result.deadLetters,
    series: result.series,
    provenance: more.provenance,
  };
}

/** Of the laws of a run's nodes, each once. */
export function lawProvenance(laws: readonly StepLaw[]): RunProvenance["laws"] {
  return [...new Set(laws)].map((law) => ({
    name: law.name,
    nodes: laws.filter((other) => other === law).length,
    source: law.provenance,
    validated: law.validated,
    note: law.note,
  }));
}

// ---- terminal -----------------------------------------------------------------------------------------

/** A run as text, with a line end. */
export function formatSimulation(report: SimulationReport): string {
  return `${[
    ...headLines(report),
    "",
    ...latencyLines(report),
    "",
    ...outcomeLines(report),
    "",
    ...nodeLines(report),
    "",
    ...timelineLines(report.series),
    ...provenanceLines(report),
  ].join("\n")}\n`;
}

function headLines(report: SimulationReport): string[] {
  const { counts, requestsPerSecond, outputTokensPerSecond, simulatedSeconds, wallMs } = report;
  const speed = wallMs > 0 ? simulatedSeconds / (wallMs / 1000) : 0;
  const lines = [
    `${counts.arrived} requests in ${durationText(simulatedSeconds * 1000)} of simulated time, ` +
      `run in ${durationText(wallMs)} (${Math.round(speed)} × real time)`,
    `${report.verdict}: ${VERDICT_MEANINGS[report.verdict]}`,
    ...report.refusals.map((reason) => `  not to plan with: ${reason}`),
    `answered ${requestsPerSecond.toFixed(2)}/s, ${Math.round(outputTokensPerSecond)} output tokens/s`,
  ];
  const { slo } = report;
  if (slo !== null) lines.push(`SLO ${slo.text}: kept for ${percentText(slo.attainment)}`);
  return lines;
}

function latencyLines({ ttftMs, tpotMs, e2eMs, queueMs }: SimulationReport): string[] {
  const row = (name: string, summary: LatencySummary | null) => [
    name,
    ...(summary === null
      ? ["–", "–", "–", "–", "–"]
      : [summary.mean, summary.p50, summary.p90, summary.p99, summary.max].map(durationText)),
  ];
  return textTable([
    ["", "mean", "p50", "p90", "p99", "max"],
    row("TTFT", ttftMs),
    row("TPOT", tpotMs),
    row("E2E", e2eMs),
    row("queue", queueMs),
  ]);
}

function outcomeLines(report: SimulationReport): string[] {
  const { counts, codes, cache, attempts, retries, clientRetries } = report;
  const share = (count: number) =>
    counts.arrived === 0 ? "" : ` (${percentText(count / counts.arrived)})`;
  const bad = Object.entries(codes)
    .filter(([code]) => code !== "ok")
    .sort(([, left], [, right]) => right - left)
    .map(([code, count]) => `${code} ${count}`);
  const hits = cacheHits(cache);
  const lines = [
    `outcomes   ok ${counts.completed}${share(counts.completed)}, refused ${counts.refused}, failed ${counts.failed}, ` +
      `left ${counts.left}, unfinished ${counts.unfinished}`,
  ];
  if (bad.length > 0) lines.push(`  by code  ${bad.join(", ")}`);
  lines.push(
    `cache      ${cache.hit_exact ?? 0} hits, ${cache.joined ?? 0} joined${share(hits)}; ` +
      `prefix caches of the nodes ${percent(report.prefixHitShare)} of prompt tokens`,
    `attempts   ${attempts}, of them ${retries} retries; clients asked again ${clientRetries} times`,
  );
  for (const crash of report.crashes) lines.push(`CRASH      ${crash}`);
  if (report.lateAttaches > 0)
    lines.push(`BROKEN     ${report.lateAttaches} answers were read too late`);
  const lost = Object.entries(report.deadLetters).map(([name, count]) => `${name} ${count}`);
  if (lost.length > 0) lines.push(`dead mail  ${lost.join(", ")}`);
  return lines;
}

/** Requests that took no pass of their own over a node: answered from the cache, or joined to an equal one. */
export function cacheHits(cache: Readonly<Record<string, number>>): number {
  return (cache.hit_exact ?? 0) + (cache.hit_semantic ?? 0) + (cache.joined ?? 0);
}

/** Nodes listed one by one up to here; of more, the ends and the middle. */
const NODES_SHOWN = 32;

function nodeLines({ nodes, gateways }: SimulationReport): string[] {
  const attempts = nodes.reduce((sum, node) => sum + node.attempts, 0);
  const rows = nodes
    .slice(0, NODES_SHOWN)
    .map((node) => [
      node.name + (node.slowFactor === 1 ? "" : ` x${node.slowFactor}`),
      String(node.attempts),
      percent(attempts === 0 ? 0 : node.attempts / attempts),
      percent(node.utilization),
      percent(node.kvPeak),
      String(node.preemptions),
      String(node.ejections),
    ]);
  const more = nodes.length > NODES_SHOWN ? [`… and ${nodes.length - NODES_SHOWN} more`] : [];
  const spread =
    gateways.length < 2
      ? []
      : [`gateways   ${gateways.map(({ name, requests }) => `${name} ${requests}`).join(", ")}`];
  const head = ["node", "attempts", "share", "busy", "KV peak", "preempted", "ejected"];
  return [...textTable([head, ...rows]), ...more, ...spread];
}

const bars = " ▁▂▃▄▅▆▇█";
const COLUMNS = 60;

function timelineLines(series: SimulationSeries): string[] {
  if (series.arrivalsPerSecond.length < 2) return [];
  const seconds = (series.windowMs * series.arrivalsPerSecond.length) / 1000;
  const line = (
    name: string,
    values: readonly (number | null)[],
    show: (max: number) => string,
  ) => {
    const columns = shrunk(values);
    const max = Math.max(...columns);
    const drawn = columns.map((value) => bars[max > 0 ? Math.ceil((value / max) * 8) : 0]).join("");
    return [name, drawn, `max ${show(max)}`];
  };
  const count = (max: number) => max.toFixed(max < 10 ? 1 : 0);
  const rows = [
    line("arrivals/s", series.arrivalsPerSecond, count),
    line("queued", series.queued, count),
    line("running", series.running, count),
    line("KV", series.kv, percent),
    line("nodes up", series.nodesUp, count),
    line("circuits", addLists(series.circuitsOpen, series.circuitsHalfOpen), count),
    line("TTFT p99", series.ttftP99Ms, durationText),
  ];
  const marks = series.marks.slice(0, 20).map(({ atMs, text }) => `${durationText(atMs)} ${text}`);
  return [
    `over time, 0 to ${durationText(seconds * 1000)}`,
    ...textTable(rows),
    ...(marks.length === 0 ? [] : [`marks      ${marks.join("; ")}`]),
    "",
  ];
}

function addLists(left: readonly number[], right: readonly number[]): number[] {
  return left.map((value, index) => value + (right[index] ?? 0));
}

/** At most `COLUMNS` values: the largest of each part, so that no peak is lost. */
function shrunk(values: readonly (number | null)[]): number[] {
  const columns = Math.min(COLUMNS, values.length);
  const maxima = new Array<number>(columns).fill(0);
  values.forEach((value, index) => {
    const column = Math.floor((index * columns) / values.length);
    maxima[column] = Math.max(maxima[column] ?? 0, value ?? 0);
  });
  return maxima;
}

function provenanceLines({ provenance, seed, hash, messages, faults }: SimulationReport): string[] {
  const { load, format, sha256, laws, gateways, router, options } = provenance;
  return [
    ...laws.map(
      ({ name, nodes, validated, note }) =>
        `law        ${nodes} × ${name}: ${validated ? "validated" : "NOT VALIDATED"}, ${note}`,
    ),
    `load       ${load} (${format}, sha256 ${sha256.slice(0, 16)})`,
    `gateways   ${gateways}, router ${router}; options: ${options}`,
    ...(faults.length === 0 ? [] : [`faults     ${faults.join("; ")}`]),
    `seed       ${seed}; hash ${hash} over ${messages} messages; Headrace ${provenance.version}, Node ${provenance.nodeVersion}`,
    `again      ${provenance.command}`,
  ];
}

/** Variants of one run side by side, with a line end; the first is what the others are held against. */
export function formatComparison(reports: readonly SimulationReport[]): string {
  const [base] = reports;
  if (base === undefined) return "";
  const rows: string[][] = [["", ...reports.map(({ name }) => name)]];
  const add = (name: string, of: (report: SimulationReport) => string) =>
    rows.push([name, ...reports.map(of)]);
  const ms = (value: number | undefined) => (value === undefined ? "–" : durationText(value));
  add("TTFT p50", ({ ttftMs }) => ms(ttftMs?.p50));
  add("TTFT p90", ({ ttftMs }) => ms(ttftMs?.p90));
  add("TTFT p99", ({ ttftMs }) => ms(ttftMs?.p99));
  add("TPOT p50", ({ tpotMs }) => ms(tpotMs?.p50));
  add("TPOT p99", ({ tpotMs }) => ms(tpotMs?.p99));
  add("E2E p50", ({ e2eMs }) => ms(e2eMs?.p50));
  add("E2E p99", ({ e2eMs }) => ms(e2eMs?.p99));
  if (base.slo !== null) add("SLO kept", ({ slo }) => percentText(slo?.attainment ?? 0));
  add("answered", ({ counts }) =>
    counts.arrived === 0 ? "–" : percentText(counts.completed / counts.arrived),
  );
  add("refused, failed", ({ counts }) => `${counts.refused}, ${counts.failed}`);
  add("retries", ({ retries }) => String(retries));
  add("prefix cache", ({ prefixHitShare }) => percent(prefixHitShare));
  add("KV peak", ({ kvPeak }) => percent(kvPeak));
  add("preempted", ({ preemptions }) => String(preemptions));
  add("busiest, idlest", ({ nodes }) => {
    const shares = nodes.map(({ utilization }) => utilization);
    return `${percent(Math.max(...shares))}, ${percent(Math.min(...shares))}`;
  });
  add("verdict", ({ verdict }) => verdict);
  add("hash", ({ hash }) => hash);
  return `${textTable(rows).join("\n")}\n`;
}

function percent(share: number): string {
  return `${(share * 100).toFixed(1)} %`;
}

/** Lines of columns, the first to the left, the others to the right. */
export function textTable(rows: readonly (readonly string[])[]): string[] {
  const widths: number[] = [];
  for (const row of rows) {
    row.forEach((cell, index) => {
      widths[index] = Math.max(widths[index] ?? 0, cell.length);
    });
  }
  return rows.map((row) =>
    row
      .map((cell, index) =>
        index === 0 ? cell.padEnd(widths[index] ?? 0) : cell.padStart(widths[index] ?? 0),
      )
      .join("  ")
      .trimEnd(),
  );
}
