/** The page of a report: well formed, needing nothing from outside, and holding everything the report holds. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { type Chart, chartSvg, escaped } from "../sim/chart.ts";
import { parseFaults } from "../sim/faults.ts";
import { lawByName } from "../sim/laws.ts";
import { generateLoad } from "../sim/load-generators.ts";
import type { PlanReport, RunSeries, SizeResult } from "../sim/plan-report.ts";
import { lawProvenance, type SimulationReport, simulationReport } from "../sim/report.ts";
import { reportPage, seriesCharts } from "../sim/report-page.ts";
import { simulate } from "../sim/simulator.ts";
import { parseSlo } from "../sim/slo.ts";
import { intervalOf } from "../sim/statistics.ts";

describe("report page: one file", () => {
  it("is well formed: every element is closed, in order, and every attribute quoted", () => {
    expect(() => elementsOf(reportPage(report()))).not.toThrow();
  });

  it("the check of form can fail", () => {
    expect(() => elementsOf("<p><b>x</p></b>")).toThrow(/<\/p> closes <b>/);
    expect(() => elementsOf("<p>")).toThrow(/never closed/);
    expect(() => elementsOf("<p a=b>x</p>")).toThrow(/attribute/);
    expect(() => elementsOf("a < b")).toThrow(/stray/);
  });

  it("refers to nothing outside, and runs no script", () => {
    const page = reportPage(report());
    expect(page).not.toMatch(
      /https?:|\/\/[a-z]|url\(|@import|<script|<link|<img|<iframe|\ssrc=|\shref=/i,
    );
    expect(page).not.toMatch(/\son[a-z]+=/i);
  });

  it("escapes what comes from outside, so that a file's name is never markup", () => {
    const evil = '<script>alert("x")</script>&amp;';
    const made = report();
    made.provenance.trace = evil;
    made.provenance.command = evil;
    made.notes = [evil];
    made.timeline = series({ marks: [{ atMs: 60_000, text: evil }] });
    const page = reportPage(made);
    expect(page).not.toContain("<script");
    expect(page).toContain("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;amp;");
    expect(() => elementsOf(page)).not.toThrow();
  });

  it("holds no number that is none", () => {
    expect(reportPage(report())).not.toMatch(/NaN|Infinity|undefined|\[object/);
  });

  it("follows the reader's system in light and dark, and a phone's width", () => {
    const page = reportPage(report());
    expect(page).toContain("prefers-color-scheme:dark");
    expect(page).toContain('name="viewport" content="width=device-width, initial-scale=1"');
  });
});

describe("report page: what it holds", () => {
  it("says the answer first", () => {
    const page = reportPage(report());
    const [heading] = /<h1>(.*?)<\/h1>/.exec(page) ?? [];
    expect(heading).toBe("<h1>3 nodes meet the SLO; 2 do not (TTFT p99 = 4 s ± 1.24 s)</h1>");
  });

  it("has a row for each size, the answer's marked, with its verdict and what it misses", () => {
    const page = reportPage(report());
    expect(page.match(/<tr class="answer"><td>3<\/td>/g)).toHaveLength(1);
    expect(page).toMatch(/<td>2<\/td><td><span class="missed">✗ misses<\/span><\/td>/);
    expect(page).toContain(">OVERLOADED</span>");
    expect(page).toContain("✗ 4 s ± 1.24 s");
  });

  it("draws every series, named at its end, with the limit and the fault marks", () => {
    const page = reportPage(report());
    for (const name of [
      "TTFT p99",
      "TTFT p50",
      "E2E p99",
      "attained",
      "on nodes",
      "queued",
      "arrivals",
      "busy",
      "KV memory",
      "up",
      "hits",
    ]) {
      expect(page, name).toMatch(new RegExp(`<text class="name c\\d"[^>]*>${name}</text>`));
    }
    expect(page).toMatch(/<text class="name limit"[^>]*>TTFT ≤ 2 s<\/text>/);
    expect(
      page.match(/<text class="mark fault"[^>]*>node 2 down<\/text>/g)?.length,
    ).toBeGreaterThan(3);
    expect(page).toMatch(/<text class="mark answer"[^>]*>knee<\/text>/);
  });

  it("labels every axis, with its unit", () => {
    const page = reportPage(report());
    const labels = [...page.matchAll(/<text class="axis"[^>]*>(.*?)<\/text>/g)].map(
      (found) => found[1],
    );
    expect(labels.length).toBe(2 * (page.match(/<svg/g)?.length ?? 0));
    for (const label of ["time (minutes)", "requests per second", "share", "nodes"]) {
      expect(labels, label).toContain(label);
    }
    expect(labels.every((label) => label !== "")).toBe(true);
  });

  it("tells every line's value at a position in a tooltip", () => {
    const page = reportPage(report());
    expect(page).toMatch(
      /<title>time \(minutes\): 1\nE2E p99: 9 s\nTTFT p99: 900 ms\nTTFT p50: 200 ms<\/title>/,
    );
  });

  it("shows a refusal and an answer that is none as such, with their reasons and without empty plots", () => {
    const made = report();
    made.answer = { kind: "refused", reasons: ["the load lasts 100 s"] };
    Object.assign(made, { sizes: [], curve: [], timeline: null, headroom: null, whatIfs: [] });
    const page = reportPage(made);
    expect(page).toContain("<h1>No answer: the run cannot support one</h1>");
    expect(page).toContain("<li>the load lasts 100 s</li>");
    expect(page).not.toContain("<svg");
    expect(() => elementsOf(page)).not.toThrow();
  });
});

describe("report page: simulations", () => {
  const load = [
    ...generateLoad({
      seed: 1,
      durationUs: 120_000_000,
      arrivals: { kind: "poisson", rate: 3 },
      content: {
        kind: "questions",
        input: { mean: 300, cv: 1, max: 2000 },
        output: { mean: 60, cv: 1, max: 400 },
        repeatShare: 0.3,
        paraphraseShare: 0,
        closeShare: 0,
        lookalikeShare: 0,
        poolMax: 100,
        zipfExponent: 1,
      },
    }),
  ];
  const run = (name: string, faults: string): SimulationReport => {
    const law = lawByName("llama-3.1-8b/rtx4090");
    const spec = { nodes: [{ law }, { law }], slo: parseSlo("ttft p99 <= 2s"), seed: 1 };
    const result = simulate({ ...spec, faults: parseFaults(faults), load });
    return simulationReport(result, {
      name,
      wallMs: 100,
      physics: [],
      sloText: "ttft p99 <= 2s",
      provenance: {
        load: "poisson",
        format: "made up",
        sha256: "cd".repeat(32),
        laws: lawProvenance([law, law]),
        gateways: 1,
        router: "headroom",
        options: "defaults",
        nodeVersion: "v20",
        version: "0.1.0",
        command: "headrace sim --load 'poisson:3/s'",
      },
    });
  };
  const faulty = run("with a crash", "crash node-2 at 30s for 20s");

  it("of one run is well formed and holds its figures, faults, nodes and series", () => {
    const page = reportPage(faulty);
    expect(() => elementsOf(page)).not.toThrow();
    expect(page).not.toMatch(/NaN|Infinity|undefined|\[object/);
    expect(page).not.toMatch(/https?:|url\(|@import|<script|<link|<img|\ssrc=|\shref=/i);
    expect(page).toMatch(/<h1>[\d.]+ % of \d+ requests answered, p99 TTFT /);
    expect(page).toContain("not to plan with: the run lasts"); // Two minutes only.
    expect(page).toMatch(/<text class="mark fault"[^>]*>crash node-2<\/text>/);
    expect(page).toContain("<td>node-2</td>");
    for (const name of ["TTFT p99", "on nodes", "arrivals", "KV memory", "up", "open", "hits"]) {
      expect(page, name).toMatch(new RegExp(`<text class="name c\\d"[^>]*>${name}</text>`));
    }
    expect(page).toContain("headrace sim --load 'poisson:3/s'");
  });

  it("of several has a column and a line for each variant, and says which tail is shortest", () => {
    const page = reportPage([run("sound", ""), faulty]);
    expect(() => elementsOf(page)).not.toThrow();
    expect(page).toContain('<th scope="col">sound</th><th scope="col">with a crash</th>');
    expect(page).toMatch(/<text class="name c0"[^>]*>sound<\/text>/);
    expect(page).toMatch(/<text class="name c1"[^>]*>with a crash<\/text>/);
    expect(page).toMatch(
      /<h1>(Of 2 variants, sound has the lowest p99 TTFT|2 variants of one run)/,
    );
  });

  it("marks a run in which an actor crashed as unsound", () => {
    const page = reportPage({ ...faulty, crashes: ["gw-1/router: boom"] });
    expect(page).toContain('<header class="unsound">');
    expect(page).toContain("an actor crashed: gw-1/router: boom");
  });
});

describe("chart", () => {
  const axis = { label: "x", format: String };
  const chart = (changes: Partial<Chart> = {}): Chart => ({
    title: "t",
    caption: "c",
    x: axis,
    y: axis,
    lines: [
      {
        name: "l",
        points: [
          [0, 1],
          [1, 2],
        ],
        colour: 0,
      },
    ],
    ...changes,
  });

  it("is well formed and finite for any values, on linear and logarithmic axes", () => {
    const value = fc.option(fc.double({ min: -1e9, max: 1e9, noNaN: true }), { nil: null });
    fc.assert(
      fc.property(
        fc.array(value, { maxLength: 40 }),
        fc.boolean(),
        fc.boolean(),
        (ys, isLog, dots) => {
          const points = ys.map((y, x) => [x, y] as const);
          const svg = chartSvg(
            chart({ y: { ...axis, isLog }, lines: [{ name: "l", points, colour: 1, dots }] }),
          );
          elementsOf(svg);
          expect(svg).not.toMatch(/NaN|Infinity/);
        },
      ),
    );
  });

  it("breaks a line where there is no value", () => {
    const points = [
      [0, 1],
      [1, null],
      [2, 3],
      [3, 4],
    ] as const;
    const svg = chartSvg(chart({ lines: [{ name: "l", points, colour: 0 }] }));
    const [, path = ""] = /<path [^>]*d="(.*?)"/.exec(svg) ?? [];
    expect(path.match(/M/g)).toHaveLength(2);
    expect(path.match(/L/g)).toHaveLength(1);
  });

  it("puts names that would overlap apart, inside the picture", () => {
    const lines = [0, 1, 2, 3, 4, 5].map((colour) => ({
      name: `l${colour}`,
      points: [
        [0, 0],
        [1, colour * 1e-6],
      ] as const,
      colour,
    }));
    const svg = chartSvg(chart({ lines, limits: [{ y: 100, text: "max" }] }));
    const ys = [...svg.matchAll(/<text class="name[^>]* y="([\d.]+)"/g)].map((found) =>
      Number(found[1]),
    );
    ys.sort((left, right) => left - right);
    expect(ys).toHaveLength(7);
    ys.forEach((y, index) => {
      if (index > 0) expect(y - (ys[index - 1] ?? 0)).toBeGreaterThanOrEqual(12.9);
      expect(y).toBeGreaterThan(0);
      expect(y).toBeLessThan(250);
    });
  });

  it("puts names of marks in rows where they would overlap, and keeps all as tooltips", () => {
    const marks = [0.1, 0.11, 0.12, 0.13, 0.14].map((x, index) => ({
      x,
      text: `fault ${index}`,
      kind: "fault" as const,
    }));
    const svg = chartSvg(chart({ marks }));
    const labels = [...svg.matchAll(/<text class="mark fault"[^>]* y="([\d.]+)"/g)].map(
      (found) => found[1],
    );
    expect(new Set(labels).size).toBe(3);
    for (const { text } of marks) expect(svg).toContain(`<title>${text}</title>`);
  });

  it("has whole round ticks that lie inside the axis", () => {
    const points = [
      [0, 0],
      [1, 873],
    ] as const;
    const svg = chartSvg(chart({ lines: [{ name: "l", points, colour: 0 }] }));
    const ticks = [...svg.matchAll(/<text class="tick" x="50"[^>]*>(.*?)<\/text>/g)].map(
      (found) => found[1],
    );
    expect(ticks).toEqual(["0", "200", "400", "600", "800"]);
  });

  it("escapes for text and for attributes", () => {
    expect(escaped(`<a b="c">&`)).toBe("&lt;a b=&quot;c&quot;&gt;&amp;");
  });

  it("shows nodes up only when their number changes", () => {
    const titles = (all: readonly Chart[]) => all.map(({ title }) => title);
    expect(titles(seriesCharts(series(), []))).toContain("Nodes up");
    expect(titles(seriesCharts(series({ nodesUp: [3, 3, 3] }), []))).not.toContain("Nodes up");
  });
});

// ---- worlds ---------------------------------------------------------------------------------------

/** Reads markup strictly; throws at the first thing that is not well formed. */
function elementsOf(html: string): number {
  const empty = new Set(["meta", "br", "!doctype"]);
  const open: string[] = [];
  let count = 0;
  // The style sheet is not markup: it may hold ">" (it holds no "<").
  const markup = html.replace(/<style>[^<]*<\/style>/g, "<style></style>");
  const rest = markup.replace(
    /<(\/?)([!a-zA-Z][a-zA-Z0-9]*)([^<>]*)>/g,
    (_, slash, tag, attributes) => {
      count++;
      const name = String(tag).toLowerCase();
      if (slash === "/") {
        const last = open.pop();
        if (last !== name) throw new Error(`</${name}> closes <${last}>`);
        return "";
      }
      const closed = String(attributes).endsWith("/");
      const left = String(attributes)
        .replace(/\/$/, "")
        .replace(/\s+[a-zA-Z][\w:-]*="[^"<]*"/g, "");
      if (left.trim() !== "" && name !== "!doctype")
        throw new Error(`<${name}> has an attribute ${left}`);
      if (!closed && !empty.has(name)) open.push(name);
      return "";
    },
  );
  if (open.length > 0) throw new Error(`never closed: ${open.join(", ")}`);
  if (/[<>]/.test(rest)) throw new Error(`stray < or > in ${rest.slice(0, 200)}`);
  if (/&(?!(amp|lt|gt|quot);)/.test(rest)) throw new Error("a bare &");
  return count;
}

function series(changes: Partial<RunSeries> = {}): RunSeries {
  return {
    windowMs: 120_000,
    arrivalsPerSecond: [4, 5, 4],
    queued: [0, 2, 0],
    running: [10, 14, 11],
    utilization: [0.6, 0.8, 0.7],
    kv: [0.3, 0.5, 0.4],
    nodesUp: [3, 2, 3],
    hitShare: [0.1, 0.12, 0.11],
    ttftP50Ms: [200, 240, null],
    ttftP99Ms: [900, 1900, 950],
    e2eP99Ms: [9000, 14_000, 9500],
    marks: [{ atMs: 70_000, text: "node 2 down" }],
    ...changes,
  };
}

function size(nodes: number, ttftMs: readonly number[], changes: Partial<SizeResult>): SizeResult {
  const interval = intervalOf(ttftMs);
  const latency = { mean: 300, p50: 200, p90: 500, p99: interval.mean, max: 2 * interval.mean };
  const shared = { comparison: "<=", unit: "ms", limit: 2000 } as const;
  return {
    mix: [{ law: "llama-3.1-8b/rtx4090", count: nodes }],
    nodes,
    runs: ttftMs.length,
    meets: "yes",
    objectives: [
      {
        ...shared,
        name: "TTFT p99",
        text: "TTFT p99 ≤ 2 s",
        interval,
        state: interval.high <= 2000 ? "met" : "missed",
      },
    ],
    verdict: "STABLE",
    ttftMs: latency,
    tpotMs: latency,
    e2eMs: null,
    attainment: 0.999,
    goodputRequestsPerSecond: 3.9,
    utilization: 0.7,
    kvPeak: 0.6,
    preemptions: 0,
    refusedShare: 0,
    failedShare: 0,
    retries: 0,
    pricePerHour: null,
    ...changes,
  };
}

function report(): PlanReport {
  const point = (factor: number, ttftP99Ms: number) => ({
    factor,
    requestsPerSecond: 4 * factor,
    attainment: ttftP99Ms <= 2000 ? 0.999 : 0.8,
    ttftP50Ms: 200,
    ttftP99Ms,
    e2eP99Ms: 10_000,
    utilization: 0.6 * factor,
    verdict: "STABLE" as const,
    meets: ttftP99Ms <= 2000,
  });
  const mix = (count: number) => [{ law: "llama-3.1-8b/rtx4090", count }];
  return {
    kind: "plan",
    answer: {
      kind: "nodes",
      mix: mix(3),
      nodes: 3,
      pricePerHour: null,
      smaller: { mix: mix(2), meets: "no" },
    },
    slo: "TTFT p99 ≤ 2 s",
    sizes: [
      size(2, [3500, 4000, 4500], { meets: "no", verdict: "OVERLOADED" }),
      size(3, [900, 1000, 1100], {}),
      size(4, [700, 720, 740], {}),
    ],
    mixes: [],
    lowerBound: [{ law: "llama-3.1-8b/rtx4090", nodesMean: 2, nodesPeakMinute: 3, busyMean: 1.6 }],
    curve: [point(0.4, 600), point(1, 1000), point(1.2, 1900), point(1.4, 9000)],
    headroom: {
      factorMax: 1.2,
      factorFails: 1.24,
      requestsPerSecondMax: 4.8,
      exhausted: [{ days: 7, growthPerDay: 0.026 }],
    },
    bottleneck: "With 2 nodes: compute gives way first.",
    whatIfs: [
      {
        name: "burst × 3",
        change: "three times the requests",
        value: 8000,
        meets: false,
        verdict: "STABLE",
        attainment: 0.9,
        nodes: 4,
        atMost: false,
        skipped: null,
      },
    ],
    timeline: series(),
    load: {
      requests: 4800,
      durationUs: 1_200_000_000,
      ratePerSecond: 4,
      inputTokens: { mean: 500, p50: 1, p90: 1, p99: 1, max: 1 },
      outputTokens: { mean: 100, p50: 1, p90: 1, p99: 1, max: 1 },
    },
    notes: ["a note"],
    provenance: {
      trace: "made.csv",
      format: "azure2023",
      sha256: "ab".repeat(32),
      window: "",
      options: "defaults",
      nodeVersion: "v20",
      version: "0.1.0",
      command: "headrace plan",
      seeds: [1, 2, 3],
      laws: [
        { name: "l", source: "s", validated: false, note: "n", kvBlocks: 5, kvFrom: "formula" },
      ],
    },
    wallMs: 1000,
    simulatedMs: 1e6,
    runs: 12,
  };
}
