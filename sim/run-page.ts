/**
 * A simulated run, or several variants of one, as one HTML page that needs nothing else. Pure; report-page.ts has the
 * frame and the charts.
 */
import { type Chart, escaped } from "./chart.ts";
import { formatComparison, formatSimulation, type SimulationReport } from "./report.ts";
import { charts, page, section, seriesCharts } from "./report-page.ts";
import { durationText } from "./slo.ts";
import { VERDICT_MEANINGS } from "./statistics.ts";

/** The page; the first of several variants is the one whose course is drawn. */
export function runPage(reports: readonly SimulationReport[]): string {
  const [first] = reports;
  if (first === undefined) return page("Headrace simulation", "");
  const { verdict, ttftMs, e2eMs, counts, refusals } = first;
  const p99 = (ms: number | undefined) => (ms === undefined ? "none" : durationText(ms));
  const title =
    reports.length > 1
      ? `${reports.map(({ name }) => name).join(" against ")}`
      : `TTFT p99 ${p99(ttftMs?.p99)}, E2E p99 ${p99(e2eMs?.p99)} over ${counts.arrived} requests`;
  const course =
    reports.length > 1 ? `How ${first.name} behaves over time` : "How it behaves over time";
  return page(
    `Headrace simulation: ${title}`,
    [
      `<header class="${verdict === "STABLE" ? "nodes" : "refused"}"><p class="kicker">Headrace simulation</p>`,
      `<h1>${escaped(title)}</h1>`,
      `<p class="slo">${escaped(`${verdict}: ${VERDICT_MEANINGS[verdict]}`)}</p>`,
      `<ul>${refusals.map((reason) => `<li>not to plan with: ${escaped(reason)}</li>`).join("")}</ul></header>`,
      reports.length > 1 ? section("Side by side", pre(formatComparison(reports))) : "",
      charts(course, [...seriesCharts(first.series, []), circuitChart(first)]),
      ...reports.map((report) =>
        section(`Report of ${report.name}`, pre(formatSimulation(report))),
      ),
    ].join("\n"),
  );
}

function pre(text: string): string {
  return `<pre>${escaped(text)}</pre>`;
}

function circuitChart({ series }: SimulationReport): Chart {
  const over = (values: readonly number[]) =>
    values.map((value, index) => [((index + 0.5) * series.windowMs) / 1000, value] as const);
  return {
    title: "Circuits",
    caption: "Nodes whose circuit is open, or half open and being tried.",
    x: { label: "time (seconds)", format: String, min: 0 },
    y: { label: "nodes", format: (nodes) => String(Number(nodes.toFixed(1))), min: 0 },
    lines: [
      { name: "open", points: over(series.circuitsOpen), colour: 4 },
      { name: "half open", points: over(series.circuitsHalfOpen), colour: 1 },
    ],
    marks: series.marks.map(({ atMs, text }) => ({ x: atMs / 1000, text, kind: "fault" as const })),
  };
}
