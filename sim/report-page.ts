/**
 * A report as one HTML page that needs nothing else: no network, no script, no library, no font.
 *
 * The answer stands on top, then the table that proves it, then plots with their limits drawn in, then what would
 * change it, then where every number comes from. Light and dark follow the reader's system.
 *
 * Pure; chart.ts draws, plan-report.ts words.
 */
import { type Chart, chartSvg, escaped, type Line } from "./chart.ts";
import {
  calibrationText,
  costText,
  headline,
  headroomText,
  isAnswer,
  loadText,
  lowerBoundText,
  measuredText,
  mixText,
  modelErrorText,
  money,
  type ObjectiveResult,
  type PlanReport,
  provenanceLines,
  type RunSeries,
  type SizeResult,
  whatIfText,
  whatIfValue,
} from "./plan-report.ts";
import { cacheHits, type SimulationReport } from "./report.ts";
import type { SimulatedNodeResult } from "./simulator.ts";
import { durationText, limitText, percentText } from "./slo.ts";
import { VERDICT_MEANINGS } from "./statistics.ts";

/** The page of a plan, of a simulation, or of several simulations side by side (one or more). */
export function reportPage(
  report: PlanReport | SimulationReport | readonly SimulationReport[],
): string {
  if ("answer" in report) return page(`Headrace plan: ${headline(report)}`, planBody(report));
  const runs = "kind" in report ? [report] : report;
  return page(`Headrace simulation: ${runs.map(runHeadline).join("; ")}`, runsBody(runs));
}

function planBody(report: PlanReport): string {
  const { answer, sizes, mixes, bottleneck, headroom, lowerBound, notes, whatIfs } = report;
  const cost = costText(report);
  const modelError = modelErrorText(report);
  const sentences = [
    ...(answer.kind === "nodes" ? [] : answer.reasons),
    ...(bottleneck === "" ? [] : [`Bottleneck. ${bottleneck}`]),
    ...(modelError === undefined ? [] : [`${modelError}.`]),
    ...(headroom === null ? [] : [`${headroomText(headroom)}.`]),
    ...(cost === undefined ? [] : [`Cost: ${cost}.`]),
    ...lowerBound.map((bound) => `${lowerBoundText(bound)}.`),
  ];
  return [
    `<header class="${answer.kind}"><p class="kicker">Headrace capacity plan</p>`,
    `<h1>${escaped(headline(report))}</h1>`,
    `<p class="slo">SLO: ${escaped(report.slo)}</p>`,
    `<ul>${sentences.map((text) => `<li>${escaped(text)}</li>`).join("")}</ul></header>`,
    sizes.length === 0 ? "" : section("Every size tried", sizeTable(sizes, report)),
    mixes.length === 0 ? "" : section("Mixes tried", sizeTable(mixes, report)),
    charts("How it behaves", [...sizeCharts(report), ...loadCharts(report)]),
    report.timeline === null
      ? ""
      : charts(
          "The recorded load on the planned nodes, over time",
          seriesCharts(report.timeline, latencyLimits(sizes)),
        ),
    whatIfs.length === 0 ? "" : section("What if", whatIfTable(report)),
    section(
      "Where the numbers come from",
      `<p>${escaped(loadText(report.load))}.</p>` +
        `<ul>${[...calibrationText(report.provenance), ...notes].map((text) => `<li>${escaped(text)}</li>`).join("")}</ul>` +
        `<pre>${escaped(provenanceLines(report).join("\n"))}</pre>`,
    ),
  ].join("\n");
}

// ---- simulations --------------------------------------------------------------------------------

function runHeadline({ counts, verdict, ttftMs, e2eMs }: SimulationReport): string {
  const answered = percentText(counts.arrived === 0 ? 0 : counts.completed / counts.arrived);
  const latency =
    ttftMs === null || e2eMs === null
      ? ""
      : `, p99 TTFT ${durationText(ttftMs.p99)}, p99 E2E ${durationText(e2eMs.p99)}`;
  return `${answered} of ${counts.arrived} requests answered${latency} (${verdict})`;
}

/** Names the variant with the shortest tail, where all answered about as many: else there is no such thing. */
function comparedHeadline(runs: readonly SimulationReport[]): string {
  const answered = runs.map(({ counts }) => counts.completed / Math.max(1, counts.arrived));
  const tails = runs.map(({ ttftMs }) => ttftMs?.p99 ?? Number.POSITIVE_INFINITY);
  const least = Math.min(...tails);
  const best = runs[tails.indexOf(least)];
  const isFair = Math.max(...answered) - Math.min(...answered) < 0.002;
  if (!isFair || best === undefined || least === Number.POSITIVE_INFINITY) {
    return `${runs.length} variants of one run`;
  }
  return `Of ${runs.length} variants, ${best.name} has the lowest p99 TTFT: ${durationText(least)}`;
}

function runsBody(runs: readonly SimulationReport[]): string {
  const [first] = runs;
  if (first === undefined) return "<h1>No run</h1>";
  const isOne = runs.length === 1;
  const isSound = runs.every(
    ({ crashes, lateAttaches }) => crashes.length === 0 && lateAttaches === 0,
  );
  const isSettled = runs.every(({ refusals }) => refusals.length === 0);
  const sentences = runs.flatMap((run) => {
    const name = isOne ? "" : `${run.name}: `;
    return [
      ...(isOne ? [] : [`${name}${runHeadline(run)}`]),
      ...(run.slo === null
        ? []
        : [
            `${name}SLO ${run.slo.text} kept for ${percentText(run.slo.attainment)} of the requests`,
          ]),
      ...run.refusals.map((reason) => `${name}not to plan with: ${reason}`),
      ...run.crashes.map((crash) => `${name}an actor crashed: ${crash}`),
      ...(run.lateAttaches > 0 ? [`${name}${run.lateAttaches} answers were read too late`] : []),
      ...(isOne && run.faults.length > 0 ? [`Faults: ${run.faults.join("; ")}`] : []),
    ];
  });
  const title = isOne ? runHeadline(first) : comparedHeadline(runs);
  return [
    `<header class="${isSound ? (isSettled ? "nodes" : "doubtful") : "unsound"}">`,
    `<p class="kicker">Headrace simulation</p><h1>${escaped(title)}</h1>`,
    `<ul>${sentences.map((text) => `<li>${escaped(text)}</li>`).join("")}</ul></header>`,
    section("In numbers", runTable(runs)),
    isOne ? "" : charts("Side by side", comparedCharts(runs)),
    ...runs.map((run) => charts(isOne ? "Over time" : `${run.name}, over time`, runCharts(run))),
    ...runs.map((run) => section(isOne ? "Nodes" : `Nodes, ${run.name}`, nodeTable(run))),
    section("Where the numbers come from", `<pre>${escaped(originLines(runs).join("\n"))}</pre>`),
  ].join("\n");
}

function runTable(runs: readonly SimulationReport[]): string {
  const heads = ["", ...runs.map(({ name }) => (runs.length === 1 ? "value" : name))];
  const rows: { cells: Cell[]; isMarked: boolean }[] = [];
  const add = (name: string, of: (run: SimulationReport) => string) =>
    rows.push({ cells: [name, ...runs.map(of)], isMarked: false });
  add("TTFT p50 / p90 / p99", ({ ttftMs }) => latencies(ttftMs));
  add("TPOT p50 / p90 / p99", ({ tpotMs }) => latencies(tpotMs));
  add("E2E p50 / p90 / p99", ({ e2eMs }) => latencies(e2eMs));
  add("wait in the gateway p50 / p90 / p99", ({ queueMs }) => latencies(queueMs));
  add("answered per second", ({ requestsPerSecond }) => rateText(requestsPerSecond));
  add("output tokens per second", ({ outputTokensPerSecond }) => rateText(outputTokensPerSecond));
  add("refused / failed / left / unfinished", ({ counts }) =>
    [counts.refused, counts.failed, counts.left, counts.unfinished].join(" / "),
  );
  add("ends by code", ({ codes }) =>
    Object.entries(codes)
      .sort(([, left], [, right]) => right - left)
      .map(([code, count]) => `${code} ${count}`)
      .join(", "),
  );
  add("answered by the cache", ({ cache, counts }) =>
    percentText(cacheHits(cache) / Math.max(1, counts.arrived)),
  );
  add("prompt tokens in prefix caches", ({ prefixHitShare }) => percentText(prefixHitShare));
  add("retries by the gateway / by clients", (run) => `${run.retries} / ${run.clientRetries}`);
  add("KV peak / preemptions", (run) => `${percentText(run.kvPeak)} / ${run.preemptions}`);
  add("verdict", ({ verdict }) =>
    runs.length === 1 ? `${verdict}: ${VERDICT_MEANINGS[verdict]}` : verdict,
  );
  return table(heads, rows, true);
}

/** Nodes listed one by one; a page of more is no page. */
const NODES_SHOWN = 64;

function nodeTable({ nodes }: SimulationReport): string {
  const attempts = nodes.reduce((sum, node) => sum + node.attempts, 0);
  const most = Math.max(1, ...nodes.map((node) => node.outputTokens));
  const row = (node: SimulatedNodeResult) => ({
    cells: [
      node.name + (node.slowFactor === 1 ? "" : ` (${node.slowFactor} × slower)`),
      node.law,
      `${node.attempts} (${percentText(attempts === 0 ? 0 : node.attempts / attempts)})`,
      { html: `${bar(node.outputTokens / most)}${node.outputTokens}` },
      { html: `${bar(node.utilization)}${escaped(percentText(node.utilization))}` },
      { html: `${bar(node.kvPeak)}${escaped(percentText(node.kvPeak))}` },
      String(node.preemptions),
      String(node.ejections),
    ],
    isMarked: false,
  });
  const heads = [
    "node",
    "law",
    "attempts",
    "output tokens",
    "busy",
    "KV peak",
    "preempted",
    "ejected",
  ];
  const rest = nodes.length - NODES_SHOWN;
  const more = rest > 0 ? `<p>… and ${rest} more.</p>` : "";
  return table(heads, nodes.slice(0, NODES_SHOWN).map(row)) + more;
}

function bar(share: number): string {
  const percent = Math.round(Math.min(1, Math.max(0, share)) * 100);
  return `<span class="bar"><i style="width:${percent}%"></i></span>`;
}

function runCharts({ series }: SimulationReport): Chart[] {
  const all = seriesCharts(series, []);
  const isTripped = (counts: readonly number[]) => counts.some((count) => count > 0);
  if (!isTripped(series.circuitsOpen) && !isTripped(series.circuitsHalfOpen)) return all;
  const over = (values: readonly number[]): Line["points"] =>
    values.map((value, index) => [(index + 0.5) * series.windowMs, value]);
  all.push({
    title: "Circuits",
    caption: "Nodes out of rotation (open), and nodes being tried again (half open).",
    x: timeAxis(series.windowMs * series.arrivalsPerSecond.length),
    y: { label: "nodes", format: countText, min: 0 },
    lines: [
      { name: "open", points: over(series.circuitsOpen), colour: 4 },
      { name: "half open", points: over(series.circuitsHalfOpen), colour: 5 },
    ],
    marks: faultMarks(series),
  });
  return all;
}

/** The variants over each other; colours are told apart up to this many. */
const VARIANTS_DRAWN = 6;

function comparedCharts(runs: readonly SimulationReport[]): Chart[] {
  const drawn = runs.slice(0, VARIANTS_DRAWN);
  const lengthMs = Math.max(
    ...drawn.map(({ series }) => series.windowMs * series.arrivalsPerSecond.length),
  );
  const [first] = drawn;
  const chart = (
    title: string,
    label: string,
    of: (series: RunSeries) => readonly (number | null)[],
  ): Chart => {
    const lines = drawn.map(
      ({ name, series }, colour): Line => ({
        name,
        points: of(series).map((value, index) => [(index + 0.5) * series.windowMs, value]),
        colour,
      }),
    );
    return {
      title,
      caption: "One line for each variant; the tables have the figures of the whole run.",
      x: timeAxis(lengthMs),
      y: label === "latency" ? axisOf(label, true, lines) : { label, format: countText, min: 0 },
      lines,
      marks: first === undefined ? [] : faultMarks(first.series),
    };
  };
  return [
    chart("TTFT p99", "latency", (series) => series.ttftP99Ms),
    chart("E2E p99", "latency", (series) => series.e2eP99Ms),
    chart("Requests on nodes", "requests", (series) => series.running),
    chart("Requests waiting in the gateway", "requests", (series) => series.queued),
  ];
}

function originLines(runs: readonly SimulationReport[]): string[] {
  return runs.flatMap(({ name, provenance, seed, hash, messages, faults }) => [
    ...(runs.length === 1 ? [] : [`${name}:`]),
    ...provenance.laws.map(
      (law) =>
        `law       ${law.nodes} × ${law.name}: ${law.validated ? "validated" : "NOT VALIDATED"}, ${law.note}`,
    ),
    `load      ${provenance.load} (${provenance.format}), sha256 ${provenance.sha256.slice(0, 16)}`,
    `gateways  ${provenance.gateways}, router ${provenance.router}; options: ${provenance.options}`,
    ...(faults.length === 0 ? [] : [`faults    ${faults.join("; ")}`]),
    `seed      ${seed}; hash ${hash} over ${messages} messages`,
    "TPOT      (E2E − TTFT) ÷ (output tokens − 1)",
    `with      headrace ${provenance.version}, Node ${provenance.nodeVersion}`,
    `again     ${provenance.command}`,
  ]);
}

// ---- tables -------------------------------------------------------------------------------------

function sizeTable(sizes: readonly SizeResult[], report: PlanReport): string {
  const laws = new Set(sizes.flatMap(({ mix }) => mix.map(({ law }) => law)));
  const heads = [
    "nodes",
    "SLO",
    "verdict",
    ...(sizes[0]?.objectives ?? []).map(({ text }) => text),
    "TTFT p50 / p90 / p99",
    "TPOT p50 / p90 / p99",
    "E2E p50 / p90 / p99",
    "attained",
    "goodput",
    "busy",
    "KV peak",
    "preempted",
    "refused",
    "failed",
    "retries",
    "cost / h",
    "runs",
  ];
  const rows = sizes.map((size) => {
    const cells = [
      laws.size === 1 ? String(size.nodes) : mixText(size.mix),
      { html: meetsBadge(size.meets) },
      { html: `<span title="${escaped(VERDICT_MEANINGS[size.verdict])}">${size.verdict}</span>` },
      ...size.objectives.map(objectiveCell),
      latencies(size.ttftMs),
      latencies(size.tpotMs),
      latencies(size.e2eMs),
      percentText(size.attainment),
      `${size.goodputRequestsPerSecond.toFixed(2)}/s`,
      percentText(size.utilization),
      percentText(size.kvPeak),
      String(Math.round(size.preemptions)),
      percentText(size.refusedShare),
      percentText(size.failedShare),
      String(Math.round(size.retries)),
      size.pricePerHour === null ? "–" : money(size.pricePerHour),
      String(size.runs),
    ];
    return { cells, isMarked: isAnswer(size, report.answer) };
  });
  return table(heads, rows);
}

function objectiveCell(result: ObjectiveResult): Cell {
  const sign = { met: "✓", unclear: "?", missed: "✗" }[result.state];
  return { html: `<span class="${result.state}">${sign} ${escaped(measuredText(result))}</span>` };
}

function meetsBadge(meets: SizeResult["meets"]): string {
  const [style, text] = {
    yes: ["met", "✓ meets"],
    unclear: ["unclear", "? unclear"],
    no: ["missed", "✗ misses"],
  }[meets];
  return `<span class="${style}">${text}</span>`;
}

function latencies(summary: SizeResult["ttftMs"]): string {
  if (summary === null) return "none";
  return [summary.p50, summary.p90, summary.p99].map(durationText).join(" / ");
}

function whatIfTable(report: PlanReport): string {
  const { answer, whatIfs, sizes } = report;
  const planned = answer.kind === "nodes" ? answer.nodes : 0;
  const first = sizes[0]?.objectives[0]?.name ?? "";
  const rows = whatIfs.map((one) => ({
    cells: [
      { html: `<b>${escaped(one.name)}</b><br><small>${escaped(one.change)}</small>` },
      one.skipped === null ? whatIfValue(report, one) : "–",
      one.skipped === null ? percentText(one.attainment) : "–",
      {
        html: `<span class="${one.skipped !== null ? "" : one.meets ? "met" : "missed"}">${escaped(whatIfText(one, planned))}</span>`,
      },
    ],
    isMarked: false,
  }));
  return (
    `<p>One change at a time, on the recorded load, one run each; the plan has ${planned} nodes.</p>` +
    table(["change", first, "attained", "what it means"], rows, true)
  );
}

export type Cell = string | { html: string };

/** @param isWrapped on a phone, cells break into lines; else the table is moved sideways */
export function table(
  heads: readonly string[],
  rows: readonly { cells: Cell[]; isMarked: boolean }[],
  isWrapped = false,
): string {
  const head = heads.map((text) => `<th scope="col">${escaped(text)}</th>`).join("");
  const body = rows
    .map(({ cells, isMarked }) => {
      const inner = cells
        .map((cell) => `<td>${typeof cell === "string" ? escaped(cell) : cell.html}</td>`)
        .join("");
      return `<tr${isMarked ? ' class="answer"' : ""}>${inner}</tr>`;
    })
    .join("");
  return `<div class="scroll${isWrapped ? " wrapped" : ""}"><table><thead><tr>${head}</tr></thead><tbody>${body}</tbody></table></div>`;
}

// ---- charts of a plan ---------------------------------------------------------------------------

function sizeCharts(report: PlanReport): Chart[] {
  const { sizes, answer } = report;
  const laws = [...new Set(sizes.map(({ mix }) => mix[0]?.law ?? ""))];
  if (sizes.length < 2) return [];
  const counts = sizes.map(({ nodes }) => nodes);
  const charts: Chart[] = [];
  for (const [index, objective] of (sizes[0]?.objectives ?? []).entries()) {
    const isTime = objective.unit === "ms";
    // A share that every size keeps is a flat line at 0: the table says it in less space.
    if (!isTime && sizes.every((size) => size.objectives[index]?.state === "met")) continue;
    const lines = laws.map((law, colour) => sizeLine(sizes, law, colour, index, laws.length > 1));
    charts.push({
      title: `${objective.name} by number of nodes`,
      caption:
        "Filled dots keep the limit, hollow ones do not; whiskers are the 95 % interval over seeds.",
      x: {
        label: "nodes",
        format: String,
        min: Math.min(...counts) - 0.5,
        max: Math.max(...counts) + 0.5,
        ticks: [...new Set(counts)],
      },
      y: axisOf(isTime ? "latency" : "share of requests", isTime, lines, objective.limit),
      lines,
      limits: [{ y: objective.limit, text: limitOf(objective) }],
      marks:
        answer.kind === "nodes" && answer.mix.length === 1
          ? [{ x: answer.nodes, text: "the plan", kind: "answer" }]
          : [],
    });
  }
  return charts.slice(0, SIZE_CHARTS_MAX);
}

/** The first objectives are those a reader cares for most; the table has all. */
const SIZE_CHARTS_MAX = 4;

/** The name's last part, which tells laws of one model apart in the room that a chart has. */
function cardOf(law: string): string {
  return law.split("/").at(-1) ?? law;
}

function sizeLine(
  sizes: readonly SizeResult[],
  law: string,
  colour: number,
  index: number,
  isNamedByLaw: boolean,
): Line {
  const own = sizes.filter(({ mix }) => mix[0]?.law === law);
  const results = own.map((size) => size.objectives[index]);
  return {
    name: isNamedByLaw ? cardOf(law) : (results[0]?.name ?? ""),
    points: own.map((size, at) => [size.nodes, results[at]?.interval?.mean ?? null]),
    colour,
    dots: true,
    isGood: results.map((result) => result?.state === "met"),
    spread: results.map((result) => {
      const interval = result?.interval;
      return interval ? [Math.max(0, interval.low), interval.high] : null;
    }),
  };
}

function limitOf({ comparison, limit, unit }: ObjectiveResult): string {
  return limitText(comparison, limit, unit);
}

function loadCharts({ curve, headroom, sizes, load }: PlanReport): Chart[] {
  if (curve.length < 2) return [];
  const limits = latencyLimits(sizes);
  const isGood = curve.map(({ meets }) => meets);
  const lines: Line[] = [
    {
      name: "TTFT p99",
      points: curve.map((point) => [point.requestsPerSecond, point.ttftP99Ms]),
      colour: 0,
      dots: true,
      isGood,
    },
    {
      name: "TTFT p50",
      points: curve.map((point) => [point.requestsPerSecond, point.ttftP50Ms]),
      colour: 1,
      isDashed: true,
    },
    {
      name: "E2E p99",
      points: curve.map((point) => [point.requestsPerSecond, point.e2eP99Ms]),
      colour: 2,
    },
  ];
  const marks: Chart["marks"] = [
    { x: load.ratePerSecond ?? 0, text: "this load", kind: "answer" },
    ...(headroom === null || headroom.factorMax === 1
      ? []
      : [{ x: headroom.requestsPerSecondMax, text: "knee", kind: "answer" as const }]),
  ];
  const x = { label: "requests per second (mean of the run)", format: rateText };
  return [
    {
      title: "Latency against load",
      caption: "Filled dots keep the whole SLO. Right of the knee the same nodes no longer do.",
      x: { ...x, min: 0 },
      y: axisOf("latency", true, lines, ...limits.map(({ y }) => y)),
      lines,
      limits,
      marks,
    },
    {
      title: "Attainment against load",
      caption:
        "Share of requests answered within every latency limit; the axis need not begin at 0.",
      x: { ...x, min: 0 },
      y: {
        label: "share of requests",
        format: wholePercent,
        min: floorOf(curve.map(({ attainment }) => attainment)),
        max: 1,
      },
      lines: [
        {
          name: "attained",
          points: curve.map((point) => [point.requestsPerSecond, point.attainment]),
          colour: 0,
          dots: true,
          isGood,
        },
      ],
      marks,
    },
  ];
}

/** Where an axis of shares begins, so that what lies near 1 can be told apart. */
function floorOf(shares: readonly number[]): number {
  const least = Math.min(...shares);
  return [0.99, 0.95, 0.9, 0.8, 0.5].find((floor) => floor <= least) ?? 0;
}

// ---- charts over time ---------------------------------------------------------------------------

/** Limits of the percentiles that the charts draw. */
function latencyLimits(sizes: readonly SizeResult[]): NonNullable<Chart["limits"]> {
  return (sizes[0]?.objectives ?? [])
    .filter(({ name }) => name === "TTFT p99" || name === "E2E p99")
    .map((objective) => ({
      y: objective.limit,
      text: `${objective.name.slice(0, 4).trim()} ${limitOf(objective)}`,
    }));
}

/** Latency, queue and nodes over one run; nodes up and cache hits only where there is something to see. */
export function seriesCharts(series: RunSeries, limits: NonNullable<Chart["limits"]>): Chart[] {
  const { windowMs } = series;
  const lengthMs = windowMs * series.arrivalsPerSecond.length;
  const time = timeAxis(lengthMs);
  const over = (values: readonly (number | null)[]): Line["points"] =>
    values.map((value, index) => [(index + 0.5) * windowMs, value]);
  const faults = faultMarks(series);
  const latency: Line[] = [
    { name: "E2E p99", points: over(series.e2eP99Ms), colour: 2 },
    { name: "TTFT p99", points: over(series.ttftP99Ms), colour: 0 },
    { name: "TTFT p50", points: over(series.ttftP50Ms), colour: 1, isDashed: true },
  ];
  const charts: Chart[] = [
    {
      title: "Latency",
      caption: `Of the requests that arrived in each window of ${durationText(windowMs)}.`,
      x: time,
      y: axisOf("latency", true, latency, ...limits.map(({ y }) => y)),
      lines: latency,
      limits,
      marks: faults,
    },
    {
      title: "Requests in the system",
      caption: "Waiting in the gateway, and on the nodes (waiting or running there).",
      x: time,
      y: { label: "requests", format: countText },
      lines: [
        { name: "on nodes", points: over(series.running), colour: 0 },
        { name: "queued", points: over(series.queued), colour: 4 },
      ],
      marks: faults,
    },
    {
      title: "Arrivals",
      caption: "Requests per second that reach the gateway.",
      x: time,
      y: { label: "requests per second", format: rateText, min: 0 },
      lines: [{ name: "arrivals", points: over(series.arrivalsPerSecond), colour: 3 }],
      marks: faults,
    },
    {
      title: "How full the nodes are",
      caption:
        "Share of time in steps, and share of KV memory in use: means over all nodes, up or not.",
      x: time,
      y: { label: "share", format: wholePercent, min: 0, max: 1.02 },
      lines: [
        { name: "busy", points: over(series.utilization), colour: 3 },
        { name: "KV memory", points: over(series.kv), colour: 5 },
      ],
      marks: faults,
    },
  ];
  if (new Set(series.nodesUp).size > 1) {
    charts.push({
      title: "Nodes up",
      caption: "Nodes that answer.",
      x: time,
      y: { label: "nodes", format: countText, min: 0 },
      lines: [{ name: "up", points: over(series.nodesUp), colour: 0 }],
      marks: faults,
    });
  }
  if (series.hitShare.some((share) => share > 0)) {
    charts.push({
      title: "Cache hits",
      caption: "Share of requests answered from memory or joined to an identical one.",
      x: time,
      y: { label: "share of requests", format: wholePercent, min: 0, max: hitMax(series.hitShare) },
      lines: [{ name: "hits", points: over(series.hitShare), colour: 1 }],
      marks: faults,
    });
  }
  return charts;
}

function faultMarks({ marks }: RunSeries): NonNullable<Chart["marks"]> {
  return marks.map(({ atMs, text }) => ({ x: atMs, text, kind: "fault" }));
}

function hitMax(shares: readonly number[]): number {
  const most = Math.max(0, ...shares);
  return most > 0.5 ? 1.02 : most * 1.2;
}

/** In the unit a reader counts in. */
function timeAxis(lengthMs: number): Chart["x"] {
  const [unit, name] =
    lengthMs > 2 * 86_400_000
      ? [86_400_000, "days"]
      : lengthMs > 3 * 3_600_000
        ? [3_600_000, "hours"]
        : lengthMs > 180_000
          ? [60_000, "minutes"]
          : [1000, "seconds"];
  return {
    label: `time (${name})`,
    format: (ms) => String(Math.round((ms / unit) * 10) / 10),
    min: 0,
    max: lengthMs,
    unit,
  };
}

/** Linear, or logarithmic where the values span so much that a linear axis would hide the small ones. */
function axisOf(
  label: string,
  isTime: boolean,
  lines: readonly Line[],
  ...limits: number[]
): Chart["y"] {
  const values = lines
    .flatMap(({ points }) => points.map(([, y]) => y))
    .filter((value) => value !== null && value > 0);
  let least = Number.POSITIVE_INFINITY;
  let most = 0;
  for (const value of [...values, ...limits]) {
    if (value === null) continue;
    least = Math.min(least, value);
    most = Math.max(most, value);
  }
  const isLog = isTime && most > 20 * least;
  const format = isTime ? durationText : percentText;
  return { label: isLog ? `${label} (log)` : label, format, isLog };
}

function rateText(rate: number): string {
  return String(Number(rate.toPrecision(3)));
}

function countText(count: number): string {
  return count >= 10_000 ? `${count / 1000}k` : rateText(count);
}

function wholePercent(share: number): string {
  return `${Number((share * 100).toFixed(1))} %`;
}

// ---- the page -----------------------------------------------------------------------------------

/** A part of a page; `inner` is markup. */
export function section(title: string, inner: string): string {
  return `<section><h2>${escaped(title)}</h2>${inner}</section>`;
}

/** A part of a page that holds charts; nothing where there is none. */
export function charts(title: string, all: readonly Chart[]): string {
  if (all.length === 0) return "";
  const figures = all.map(
    (chart) =>
      `<figure><figcaption><b>${escaped(chart.title)}</b><br>${escaped(chart.caption)}</figcaption>` +
      `${chartSvg(chart)}</figure>`,
  );
  return section(title, `<div class="charts">${figures.join("\n")}</div>`);
}

/** A whole page; `body` is markup. */
export function page(title: string, body: string): string {
  return [
    "<!doctype html>",
    '<html lang="en"><head><meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    `<title>${escaped(title)}</title><style>${STYLE}</style></head>`,
    `<body><main>${body}</main></body></html>`,
    "",
  ].join("\n");
}

// Colours of the lines are apart in lightness, too: they can be told in grey and by eyes that see fewer colours.
const STYLE = `
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--text:#16202c;--soft:#5a6675;--rule:#d9dee5;--good:#0f7a4a;
--bad:#b3261e;--warn:#8a5a00;--c0:#0b57d0;--c1:#3f8f8a;--c2:#7b3fb5;--c3:#37474f;--c4:#c2410c;--c5:#a16207}
@media(prefers-color-scheme:dark){:root{--bg:#0f141a;--card:#182029;--text:#e6ebf1;--soft:#9aa7b5;--rule:#2c3742;
--good:#5fd39a;--bad:#ff8a80;--warn:#ffc857;--c0:#8ab4f8;--c1:#7fd1cb;--c2:#d0a5ff;--c3:#b0bec5;--c4:#ffab76;--c5:#e6c15a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 48px}
header{border-left:6px solid var(--good);background:var(--card);padding:16px 20px;border-radius:6px}
header.none,header.refused,header.unsound{border-color:var(--bad)}
header.doubtful{border-color:var(--warn)}
h1{text-wrap:balance;font-size:clamp(22px,3.6vw,32px);line-height:1.2;margin:2px 0 8px}
h2{font-size:18px;margin:32px 0 10px}
.kicker,.slo,figcaption,small{color:var(--soft)}
.kicker,.slo{margin:0}
ul{margin:10px 0 0;padding-left:20px}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:left;white-space:nowrap;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:600;background:var(--card)}
td:first-child,th:first-child{position:sticky;left:0;background:var(--card)}
td small{white-space:normal}
tr:last-child td{border-bottom:0}
tr.answer td{font-weight:650;background:color-mix(in srgb,var(--good) 14%,var(--bg))}
.met{color:var(--good)}.missed{color:var(--bad)}.unclear{color:var(--warn)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
figure{margin:0;padding:12px 12px 6px;border:1px solid var(--rule);border-radius:6px;min-width:0}
.bar{display:inline-block;width:60px;height:8px;background:var(--rule);border-radius:4px;overflow:hidden;margin-right:6px}
.bar i{display:block;height:100%;background:var(--c0)}
figcaption{font-size:13px;min-height:40px}figcaption b{color:var(--text);font-size:15px}
svg{display:block;width:100%;height:auto;font:11px system-ui,-apple-system,"Segoe UI",sans-serif}
text{fill:var(--soft)}.axis{font-size:11px}
.grid{stroke:var(--rule);stroke-width:1}.base{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.dashed{stroke-dasharray:5 4}
.limit{stroke:var(--bad);stroke-width:1.4;stroke-dasharray:7 4}text.limit{fill:var(--bad);stroke:none}
line.mark{stroke-width:1.2}line.mark.fault{stroke:var(--c4)}line.mark.answer{stroke:var(--good);stroke-dasharray:2 3}
text.mark{paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
text.mark.fault{fill:var(--c4)}text.mark.answer{fill:var(--good)}
.name{font-weight:600}.hover{fill:transparent}.hover:hover{fill:color-mix(in srgb,var(--soft) 16%,transparent)}
${[0, 1, 2, 3, 4, 5].map((n) => `.c${n}{stroke:var(--c${n})}text.c${n}{fill:var(--c${n});stroke:none}circle.c${n}{fill:var(--c${n})}`).join("")}
circle.hollow{fill:var(--bg);stroke-width:1.8}
@media(max-width:600px){.wrapped td{white-space:normal}.wrapped td:first-child{min-width:40vw}main{padding:12px 10px 32px}}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border-radius:6px;padding:12px;font-size:12.5px}
`;
