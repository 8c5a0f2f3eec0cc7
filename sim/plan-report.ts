/**
 * What a plan says: plain data, its terminal form, and the sentences that both the terminal and the page print.
 *
 * Pure. The planner fills it, bin/plan.ts prints it, report-page.ts draws it. All times are ms of the simulated
 * clock but for `wallMs`; all shares 0..1.
 */
import { type Comparison, durationText, percentText } from "./slo.ts";
import type { Interval, RunEvidence, Verdict } from "./statistics.ts";
import type { LoadStatistics } from "./trace-statistics.ts";

/** ms, over requests that were answered; null without one. */
export type LatencySummary = { mean: number; p50: number; p90: number; p99: number; max: number };

/** One simulated run, as the planner needs it. */
export type RunSummary = {
  evidence: RunEvidence;
  ttftMs: LatencySummary | null;
  tpotMs: LatencySummary | null;
  e2eMs: LatencySummary | null;
  queueMs: LatencySummary | null;
  /** Measured value of each objective, in the SLO's order; null when no answered request has one. */
  objectives: (number | null)[];
  /** Requests answered within every latency limit ÷ requests that came. */
  attainment: number;
  outcomes: Record<string, number>;
  outputTokensPerSecond: number;
  /** Busy share of the busiest node ÷ the mean over nodes; 1 = even. */
  imbalance: number;
  preemptions: number;
  retries: number;
  cacheHitShare: number;
  /** Only of runs that were asked for it. */
  series: RunSeries | null;
  wallMs: number;
};

/** Means or totals of equal windows; every list has one value per window. */
export type RunSeries = {
  windowMs: number;
  arrivalsPerSecond: number[];
  /** Waiting in the gateway, and on the nodes (waiting and running). */
  queued: number[];
  running: number[];
  utilization: number[];
  kv: number[];
  nodesUp: number[];
  hitShare: number[];
  /** ms, of requests that arrived in the window; null without one. */
  ttftP50Ms: (number | null)[];
  ttftP99Ms: (number | null)[];
  e2eP99Ms: (number | null)[];
  marks: { atMs: number; text: string }[];
};

/** So many nodes of each law. */
export type NodeMix = readonly { law: string; count: number }[];

/** One objective over the runs of one size. `unclear`: the mean keeps it, its confidence interval does not. */
export type ObjectiveResult = {
  /** `TTFT p99`, and `TTFT p99 ≤ 2 s`. */
  name: string;
  text: string;
  comparison: Comparison;
  limit: number;
  unit: "ms" | "share";
  /** Null when a run has no such value: no request was answered. */
  interval: Interval | null;
  state: "met" | "unclear" | "missed";
};

/** What a size was found to do, over all runs made with it. */
export type SizeResult = {
  mix: NodeMix;
  nodes: number;
  runs: number;
  meets: "yes" | "unclear" | "no";
  objectives: ObjectiveResult[];
  /** The worst of the runs. */
  verdict: Verdict;
  ttftMs: LatencySummary | null;
  tpotMs: LatencySummary | null;
  e2eMs: LatencySummary | null;
  attainment: number;
  /** Requests per second that were answered within every latency limit. */
  goodputRequestsPerSecond: number;
  utilization: number;
  kvPeak: number;
  preemptions: number;
  refusedShare: number;
  failedShare: number;
  retries: number;
  pricePerHour: number | null;
};

export type CurvePoint = {
  factor: number;
  requestsPerSecond: number;
  attainment: number;
  ttftP50Ms: number | null;
  ttftP99Ms: number | null;
  e2eP99Ms: number | null;
  utilization: number;
  verdict: Verdict;
  meets: boolean;
};

export type WhatIf = {
  name: string;
  /** What was changed, in words. */
  change: string;
  /** Against the plan: of the first objective, at the plan's size. */
  value: number | null;
  meets: boolean;
  verdict: Verdict;
  attainment: number;
  /** Nodes that the change needs; null when no size tried was enough; `atLeast` when the search stopped there. */
  nodes: number | null;
  atMost: boolean;
  /** Why it was not run. */
  skipped: string | null;
};

export type Headroom = {
  /** The largest load, as a multiple of the trace's, that kept the SLO, and the smallest that did not. */
  factorMax: number;
  factorFails: number | null;
  requestsPerSecondMax: number;
  /** Daily growth that uses the headroom up in so many days. */
  exhausted: { days: number; growthPerDay: number }[];
};

export type Answer =
  | {
      kind: "nodes";
      mix: NodeMix;
      nodes: number;
      pricePerHour: number | null;
      /** One node fewer, and how it failed; null when the answer is one node. */
      smaller: { mix: NodeMix; meets: "no" | "unclear" } | null;
    }
  | { kind: "none"; reasons: string[] }
  | { kind: "refused"; reasons: string[] };

/** Nodes that perfect scaling would need, at the mean rate and in the fullest minute. */
export type LowerBound = {
  law: string;
  nodesMean: number;
  nodesPeakMinute: number;
  /** Nodes kept busy at the mean rate, before rounding up. */
  busyMean: number;
};

export type PlanReport = {
  kind: "plan";
  answer: Answer;
  slo: string;
  sizes: SizeResult[];
  /** Homogeneous answers and mixes tried, cheapest first; empty with one law. */
  mixes: SizeResult[];
  lowerBound: LowerBound[];
  curve: CurvePoint[];
  headroom: Headroom | null;
  bottleneck: string;
  whatIfs: WhatIf[];
  /** Of the recorded load at the answer's size. */
  timeline: RunSeries | null;
  load: LoadStatistics;
  notes: string[];
  provenance: Provenance;
  wallMs: number;
  simulatedMs: number;
  runs: number;
};

export type Provenance = {
  trace: string;
  format: string;
  sha256: string;
  window: string;
  seeds: number[];
  laws: {
    name: string;
    source: string;
    validated: boolean;
    note: string;
    kvBlocks: number;
    kvFrom: string;
  }[];
  /** Settings that differ from the defaults, or "defaults". */
  options: string;
  nodeVersion: string;
  version: string;
  command: string;
};

// ---- sentences ----------------------------------------------------------------------------------

/** The answer in one line. */
export function headline({ answer, sizes, mixes, slo, provenance }: PlanReport): string {
  switch (answer.kind) {
    case "refused":
      return "No answer: the run cannot support one";
    case "none":
      return `No size up to ${Math.max(0, ...sizes.map(({ nodes }) => nodes))} nodes meets the SLO (${slo})`;
    case "nodes": {
      const { nodes, mix, smaller } = answer;
      const what = `${nodes} node${nodes === 1 ? " meets" : "s meet"} the SLO`;
      const below =
        smaller === null
          ? ", and fewer than one there is not"
          : smaller.meets === "no"
            ? `; ${nodes - 1} do${nodes === 2 ? "es" : ""} not`
            : `; with ${nodes - 1} it is not certain`;
      const mixed = provenance.laws.length > 1 ? ` (${mixText(mix)})` : "";
      const failing = [...sizes, ...mixes].find((size) => isSame(size.mix, smaller?.mix));
      return `${what}${mixed}${below}${failing === undefined ? "" : evidenceOf(failing)}`;
    }
  }
}

function isSame(left: NodeMix, right: NodeMix | undefined): boolean {
  return JSON.stringify(left) === JSON.stringify(right);
}

function evidenceOf(size: SizeResult): string {
  const missed = size.objectives.find(({ state }) => state !== "met");
  if (missed === undefined) return ` (${size.verdict})`;
  return ` (${missed.name} = ${measuredText(missed)})`;
}

/** `4 × llama-3.1-8b/h100 + 2 × …`. */
export function mixText(mix: NodeMix): string {
  return mix.map(({ law, count }) => `${count} × ${law}`).join(" + ");
}

/** `1.42 s ± 0.11 s`. */
export function measuredText({ interval, unit }: ObjectiveResult): string {
  if (interval === null) return "none";
  const shown = unit === "ms" ? durationText : percentText;
  const spread = (interval.halfWidth ?? 0) === 0 ? "" : ` ± ${shown(interval.halfWidth ?? 0)}`;
  return `${shown(interval.mean)}${spread}`;
}

/** What stands behind the numbers: is the law compared with a real engine, and how far off is it. */
export function calibrationText({ laws }: Provenance): string[] {
  return laws.map(
    ({ name, validated, note, kvBlocks, kvFrom }) =>
      `${name}: ${validated ? "validated" : "NOT VALIDATED"}, ${note}; ${kvBlocks} KV blocks (${kvFrom})`,
  );
}

/** What the step laws' own error does to the answer; undefined where that was not asked. */
export function modelErrorText({ whatIfs, answer }: PlanReport): string | undefined {
  const slower = whatIfs.find(({ name }) => name.endsWith("% slower"));
  if (slower === undefined || answer.kind !== "nodes") return undefined;
  return `Model error. With ${slower.name} than the law says, the plan ${whatIfText(slower, answer.nodes)}`;
}

/** The cost of the answer; undefined without a price. */
export function costText({ answer, load }: PlanReport): string | undefined {
  if (answer.kind !== "nodes" || answer.pricePerHour === null) return undefined;
  const { pricePerHour } = answer;
  const hours = load.durationUs / 3.6e9;
  const tokens = load.requests * load.outputTokens.mean;
  const perMillion = hours > 0 && tokens > 0 ? (pricePerHour * hours * 1e6) / tokens : undefined;
  return (
    `${money(pricePerHour)} an hour, ${money(pricePerHour * HOURS_PER_MONTH)} a month` +
    (perMillion === undefined ? "" : `, ${money(perMillion)} per million output tokens`)
  );
}

const HOURS_PER_MONTH = 730;

/** Without a currency: the user's own. */
export function money(amount: number): string {
  return amount >= 100 ? String(Math.round(amount)) : amount.toFixed(2);
}

/** What the headroom is and when growth uses it up. */
export function headroomText(headroom: Headroom): string {
  const { factorMax, factorFails, requestsPerSecondMax, exhausted } = headroom;
  const share = `${Math.round((factorMax - 1) * 100)} %`;
  const atLeast = factorFails === null ? "at least " : "";
  const growth = exhausted.map(
    ({ days, growthPerDay }) =>
      `${percentText(growthPerDay)} a day in ${days} day${days === 1 ? "" : "s"}`,
  );
  return (
    `Headroom ${atLeast}${share}: up to ${requestsPerSecondMax.toFixed(2)} requests/s` +
    (factorMax > 1 ? `. Used up by growth of ${growth.join(", ")}` : "")
  );
}

/** The price of burstiness: what perfect scaling would need. */
export function lowerBoundText({ law, nodesMean, nodesPeakMinute }: LowerBound): string {
  return `Perfect scaling of ${law} would need ${nodesMean} for the mean rate and ${nodesPeakMinute} in the fullest minute`;
}

/** What a change does to the answer. */
export function whatIfText(
  { skipped, meets, nodes, atMost, verdict }: WhatIf,
  planned: number,
): string {
  if (skipped !== null) return `not run: ${skipped}`;
  if (nodes === null) return `misses the SLO (${verdict}); needs more than ${planned + 2} nodes`;
  if (atMost) return `${nodes} nodes are enough, or fewer`;
  return meets ? "keeps the SLO" : `needs ${nodes} nodes`;
}

// ---- the terminal -------------------------------------------------------------------------------

/** The report as text of about 100 columns. The first line is the answer. */
export function formatPlan(report: PlanReport): string {
  const { answer, sizes, mixes, whatIfs, headroom, provenance, load } = report;
  const lines = [headline(report), ""];
  if (answer.kind !== "nodes") lines.push(...answer.reasons.map((reason) => `  - ${reason}`), "");
  lines.push(`SLO      ${report.slo}`, `load     ${loadText(load)}`);
  for (const text of calibrationText(provenance)) lines.push(`law      ${text}`);
  const cost = costText(report);
  if (cost !== undefined) lines.push(`cost     ${cost}`);
  lines.push("");
  if (sizes.length > 0) lines.push(...sizeTable(sizes, report), "");
  if (mixes.length > 0) lines.push("mixes", ...sizeTable(mixes, report), "");
  if (report.bottleneck !== "") lines.push(`Bottleneck. ${report.bottleneck}`);
  const modelError = modelErrorText(report);
  if (modelError !== undefined) lines.push(`${modelError}.`);
  if (headroom !== null) lines.push(`${headroomText(headroom)}.`);
  lines.push(...report.lowerBound.map((bound) => `${lowerBoundText(bound)}.`));
  if (whatIfs.length > 0) lines.push("", "what if (the recorded load, one run each)");
  const planned = answer.kind === "nodes" ? answer.nodes : 0;
  const first = sizes[0]?.objectives[0]?.name ?? "";
  for (const one of whatIfs) {
    const value =
      one.value === null
        ? ""
        : `${first} ${whatIfValue(report, one)}, attained ${percentText(one.attainment)}: `;
    lines.push(`  ${one.name.padEnd(18)} ${value}${whatIfText(one, planned)}`);
  }
  lines.push("", ...report.notes.map((note) => `note: ${note}`));
  lines.push(...provenanceLines(report));
  return `${lines.join("\n")}\n`;
}

/** The value of the first objective under a change. */
export function whatIfValue({ sizes, mixes }: PlanReport, { value }: WhatIf): string {
  const unit = [...sizes, ...mixes][0]?.objectives[0]?.unit ?? "ms";
  if (value === null) return "none";
  return unit === "ms" ? durationText(value) : percentText(value);
}

/** Rate, burstiness and lengths in a line. */
export function loadText(load: LoadStatistics): string {
  const idc = [load.idc1s, load.idc60s].map((value) =>
    value === undefined ? "–" : value.toFixed(1),
  );
  return (
    `${load.requests} requests over ${durationText(load.durationUs / 1000)}, ` +
    `${(load.ratePerSecond ?? 0).toFixed(2)}/s (fullest minute ${(load.peakMinutePerSecond ?? 0).toFixed(2)}/s), ` +
    `CV ${(load.cv ?? 0).toFixed(2)}, IDC ${idc[0]} at 1 s and ${idc[1]} at 60 s; tokens in ` +
    `${Math.round(load.inputTokens.mean)}, out ${Math.round(load.outputTokens.mean)} (means)`
  );
}

/** One line per fact about where the numbers come from. */
export function provenanceLines({ provenance, runs, wallMs, simulatedMs }: PlanReport): string[] {
  const { trace, format, sha256, window, seeds, options, nodeVersion, version, command } =
    provenance;
  return [
    `trace    ${trace} (${format}${window === "" ? "" : `, ${window}`}), sha256 ${sha256.slice(0, 16)}`,
    `runs     ${runs}, ${durationText(simulatedMs)} of simulated time in ${durationText(wallMs)} of work; ` +
      `seeds ${seeds.join(", ")}`,
    `options  ${options}`,
    "TPOT     (E2E − TTFT) ÷ (output tokens − 1)",
    `with     headrace ${version}, Node ${nodeVersion}`,
    `again    ${command}`,
  ];
}

function sizeTable(sizes: readonly SizeResult[], { answer }: PlanReport): string[] {
  const one = new Set(sizes.flatMap(({ mix }) => mix.map(({ law }) => law))).size === 1;
  const rows = sizes.map((size) => [
    `${isAnswer(size, answer) ? "→ " : "  "}${one ? size.nodes : mixText(size.mix)}`,
    ...size.objectives.map(
      (objective) => `${measuredText(objective)}${stateMark[objective.state]}`,
    ),
    percentText(size.attainment),
    percentText(size.utilization),
    percentText(size.kvPeak),
    String(Math.round(size.preemptions)),
    percentText(size.refusedShare),
    String(size.runs),
    size.verdict,
    size.meets === "yes" ? "meets" : size.meets === "no" ? "misses" : "unclear",
  ]);
  const heads = (sizes[0]?.objectives ?? []).map(({ text }) => text);
  const header = [
    "  nodes",
    ...heads,
    "attained",
    "busy",
    "KV peak",
    "preempted",
    "refused",
    "runs",
  ];
  return table([[...header, "verdict", "SLO"], ...rows]);
}

const stateMark = { met: "", unclear: " ?", missed: " !" } as const;

/** True for the row of the answer. */
export function isAnswer(size: SizeResult, answer: Answer): boolean {
  return answer.kind === "nodes" && isSame(size.mix, answer.mix);
}

function table(rows: readonly string[][]): string[] {
  const widths: number[] = [];
  for (const row of rows) {
    row.forEach((cell, index) => {
      widths[index] = Math.max(widths[index] ?? 0, cell.length);
    });
  }
  return rows.map((row) =>
    row
      .map((cell, index) => cell.padEnd(widths[index] ?? 0))
      .join("  ")
      .trimEnd(),
  );
}
