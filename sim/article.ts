/**
 * The two tables of the article that Headrace began with, run: its figures beside those of this very gateway.
 *
 * One workload for all rows, described here and made from a seed (`articleLoad`, `fleetOf`):
 * - 200 requests a second, Poisson, of a customer-service assistant; prompts of 680 tokens and answers of 200 in the
 *   mean, 512 at most (the article's default), so that one answer alone takes the 2 to 5 s that the article names;
 * - of the requests 8.0 % repeat an earlier question word for word, 38.5 % paraphrase one (61 % of them closely), and
 *   5 % only look like one; which one is by a Zipf law over the latest 20,000 questions;
 * - 20 nodes that serve Llama 3.1 8B, 6 with an RTX 4090 and 14 with an RTX PRO 6000: the cards whose laws are
 *   validated, and whose difference is what a round robin does not see; a request has 30 s.
 *
 * Calibrated are the shares of questions, to the article's hit rates, and the fleet and the lengths, to its row of
 * timeouts before. Everything else is an outcome. The cache looks up by meaning as it does live; vectors are drawn
 * (question-vectors.ts).
 */
import type { OptionsInput } from "../transport/options.ts";
import { lawByName, rawStepUs, type StepLaw } from "./laws.ts";
import { generateLoad } from "./load-generators.ts";
import { cacheHits, textTable } from "./report.ts";
import { type SimulatedNode, Simulation, type SimulationResult } from "./simulator.ts";
import { durationText, percentText } from "./slo.ts";
import type { TraceRequest } from "./trace-rows.ts";

export type ArticleSpec = {
  /** Default 1. */
  seed?: number | string;
  /** Part of the whole, load and fleet alike, 0.1..1; default 1. */
  share?: number;
  /** Simulated seconds, the first quarter of them not measured; 40…3600, default 240. */
  seconds?: number;
  /** Before each run. */
  onRun?: (name: string) => void;
};

/** One system under the workload. Shares are 0..1; latencies are of answered requests, hits among them. */
export type ArticleRun = {
  name: string;
  nodes: number;
  requests: number;
  /** Answered from the cache, joined requests among them. */
  hitShare: number;
  /** Of the hits, by meaning and wrong: an assumption of the workload, seen through the threshold. */
  wrongHitShare: number;
  meanMs: number;
  p99Ms: number;
  /** Not answered within 30 s; and refused before that. */
  timeoutShare: number;
  refusedShare: number;
  /** Seats or KV memory of an engine in use, whichever is more: mean over nodes and time; most less least node. */
  fullShare: number;
  fullSpread: number;
  /** Time with any work at all: what nvidia-smi calls utilisation. */
  busyShare: number;
  hash: string;
};

export type ArticleReport = {
  kind: "article";
  seed: string;
  share: number;
  seconds: number;
  /** What one answer takes alone, s: of mean length, and the longest, on each card. */
  alone: { card: string; meanSeconds: number; longestSeconds: number }[];
  /** Of the requests, those whose answer alone takes longer on the faster card than the article's P99 after. */
  overlongShare: number;
  strategies: { article: StrategyFigures; ours: ArticleRun }[];
  before: ArticleRun;
  after: ArticleRun;
  /** Nodes of the whole fleet, the fewest that keep the article's promise of timeouts, and how they did. */
  cost: { nodes: number; fewest: ArticleRun; change: number };
  /** Where ours differs, and why. */
  notes: { row: string; text: string }[];
};

type StrategyFigures = { name: string; hitShare: number; meanMs: number; utilization: number };

/** As the article has them. */
export const articleFigures = {
  strategies: [
    { name: "no cache", hitShare: 0, meanMs: 4200, utilization: 0.85 },
    { name: "exact", hitShare: 0.08, meanMs: 3900, utilization: 0.79 },
    { name: "semantic 0.95", hitShare: 0.31, meanMs: 1800, utilization: 0.56 },
    { name: "semantic 0.90", hitShare: 0.47, meanMs: 1100, utilization: 0.41 },
  ],
  before: { p99Ms: 28_400, timeoutShare: 0.23, spread: 0.4 },
  after: { p99Ms: 6100, timeoutShare: 0.012, spread: 0.08, costChange: -0.38 },
} as const satisfies { strategies: readonly StrategyFigures[]; [part: string]: unknown };

// ---- the workload ---------------------------------------------------------------------------------------

const RATE = 200;
const NODES = 20;
/** Share of the nodes with the smaller card. */
const SMALL_SHARE = 0.3;
const SMALL = { law: "llama-3.1-8b/rtx4090", card: "RTX 4090" };
const LARGE = { law: "llama-3.1-8b/rtx-pro-6000", card: "RTX PRO 6000" };
const PROMPT = { mean: 680, cv: 0.5, max: 2000 };
const ANSWER = { mean: 200, cv: 0.6, max: 512 };
const DEADLINE_MS = 30_000;
const SECONDS = 240;
const WARM_UP_SHARE = 0.25;
/** Between two looks at how full the engines are. */
const LOOK_US = 500_000;

/** The requests; the same seed, the same load. `share` thins it out. */
export function articleLoad(seed: number | string, share: number, seconds: number): TraceRequest[] {
  return [
    ...generateLoad({
      seed,
      arrivals: { kind: "poisson", rate: RATE * share },
      durationUs: seconds * 1e6,
      content: {
        kind: "questions",
        input: PROMPT,
        output: ANSWER,
        repeatShare: 0.08,
        paraphraseShare: 0.385,
        closeShare: 0.61,
        lookalikeShare: 0.05,
        poolMax: 20_000,
        zipfExponent: 0.8,
      },
    }),
  ];
}

/** `count` nodes, of them the same part with the smaller card, whatever the count. */
function fleetOf(count: number): SimulatedNode[] {
  const small = Math.round(count * SMALL_SHARE);
  return Array.from({ length: count }, (_, index) => ({
    name: `node-${index + 1}`,
    law: lawByName(index < small ? SMALL.law : LARGE.law),
  }));
}

const timeouts = { totalMs: DEADLINE_MS };

/** In turn, and nothing else: no cache, no bounds, no retry, no circuit. */
const beforeOptions: OptionsInput = {
  router: { strategy: "round_robin", kvGate: 1, waitingGate: 10_000 },
  cache: { enabled: false },
  retry: { attemptsMax: 1 },
  concurrency: { inflightMax: 100_000, inflightMin: 10_000 },
  circuit: {
    localFailures: 1000,
    gatewayFailures: 1000,
    callsMin: 100_000,
    failureRatio: 1,
    slowRatio: 1,
    wedgedMs: 600_000,
  },
  timeouts: { ...timeouts, firstTokenMs: DEADLINE_MS },
};

/** The defaults, the deadline, and a limit half above the load. */
const wholeOptions: OptionsInput = {
  timeouts,
  defaultLimits: { requestsPerMinute: RATE * 60 * 1.5 },
};

// ---- the runs -------------------------------------------------------------------------------------------

/** Default of `cache.semantic` in the article. */
const THRESHOLD = 0.92;

/** Runs both tables: about a dozen simulations. Throws RangeError for a spec out of range. */
export function articleReport(spec: ArticleSpec = {}): ArticleReport {
  const { seed = 1, share = 1, seconds = SECONDS, onRun } = spec;
  if (!(share >= 0.1 && share <= 1)) {
    throw new RangeError(`share is ${share}; it must be from 0.1 to 1`);
  }
  if (!(seconds >= 40 && seconds <= 3600)) {
    throw new RangeError(`seconds is ${seconds}; it must be from 40 to 3600`);
  }
  const load = articleLoad(seed, share, seconds);
  const nodes = Math.round(NODES * share);
  const run = (name: string, options: OptionsInput, threshold?: number, count = nodes) => {
    onRun?.(name);
    return runOf({ name, options, threshold, count, load, seed, seconds });
  };
  const [none, exact, close, loose] = articleFigures.strategies;
  const strategies = [
    { article: none, ours: run(none.name, { ...wholeOptions, cache: { enabled: false } }) },
    { article: exact, ours: run(exact.name, wholeOptions) },
    { article: close, ours: run(close.name, wholeOptions, 0.95) },
    { article: loose, ours: run(loose.name, wholeOptions, 0.9) },
  ];
  const before = run("before", beforeOptions);
  const after = run("after", wholeOptions, THRESHOLD);
  const fewest = fewestNodes(after, (count) =>
    run(`after, ${count} nodes`, wholeOptions, THRESHOLD, count),
  );
  const cost = { nodes, fewest, change: fewest.nodes / nodes - 1 };
  const report = {
    kind: "article" as const,
    seed: String(seed),
    share,
    seconds,
    alone: [SMALL, LARGE].map(aloneOf),
    overlongShare: load.filter(isOverlong).length / load.length,
    strategies,
    before,
    after,
    cost,
  };
  return { ...report, notes: notesOf(report) };
}

/** The fewest nodes on which as good as every request is answered in time, if the whole fleet does that. */
function fewestNodes(whole: ArticleRun, run: (count: number) => ArticleRun): ArticleRun {
  const isKept = ({ timeoutShare, refusedShare }: ArticleRun) =>
    timeoutShare + refusedShare <= articleFigures.after.timeoutShare;
  let best = whole;
  let low = 1;
  while (isKept(whole) && low < best.nodes) {
    const tried = run((low + best.nodes) >> 1);
    if (isKept(tried)) best = tried;
    else low = tried.nodes + 1;
  }
  return best;
}

type RunSpec = {
  name: string;
  options: OptionsInput;
  /** Of the lookup by meaning; undefined = none. */
  threshold: number | undefined;
  count: number;
  load: readonly TraceRequest[];
  seed: number | string;
  seconds: number;
};

/** Questions are matched by meaning from that similarity on, as they are live. */
function matching(options: OptionsInput, similarityMin: number): OptionsInput {
  const semantic = { mode: "fixed", similarityMin, embedder: { type: "lexical" } } as const;
  return { ...options, cache: { ...options.cache, semantic } };
}

function runOf({ name, options, threshold, count, load, seed, seconds }: RunSpec): ArticleRun {
  const nodes = fleetOf(count);
  const fromUs = seconds * WARM_UP_SHARE * 1e6;
  const simulation = new Simulation({
    nodes,
    options: threshold === undefined ? options : matching(options, threshold),
    seed,
    measured: { fromUs },
  });
  const sums = nodes.map(() => 0);
  let looks = 0;
  for (const request of load) {
    simulation.offer(request);
    if (request.atUs < fromUs + looks * LOOK_US) continue;
    looks++;
    simulation.nodes.forEach((node, index) => {
      const { running, kv } = node.snapshot();
      const seats = running / (nodes[index]?.law.sequencesMax ?? 1);
      sums[index] = (sums[index] ?? 0) + Math.max(seats, kv);
    });
  }
  const result = simulation.finish();
  if (result.crashes.length > 0) throw new Error(`${name}: ${result.crashes[0]}`);
  const full = sums.map((sum) => sum / Math.max(1, looks));
  return {
    ...figuresOf(result),
    name,
    nodes: count,
    fullShare: full.reduce((sum, each) => sum + each, 0) / count,
    fullSpread: Math.max(...full) - Math.min(...full),
  };
}

function figuresOf(result: SimulationResult) {
  const { counts, cache, e2eUs, wrongHits } = result;
  const shareOf = (part: number) => (counts.arrived === 0 ? 0 : part / counts.arrived);
  const hits = cacheHits(cache);
  return {
    requests: counts.arrived,
    hitShare: shareOf(hits),
    wrongHitShare: hits === 0 ? 0 : wrongHits / hits,
    meanMs: e2eUs.mean / 1000,
    p99Ms: (e2eUs.quantile(0.99) ?? 0) / 1000,
    timeoutShare: shareOf(counts.failed + counts.unfinished),
    refusedShare: shareOf(counts.refused),
    busyShare: result.evidence.utilization,
    hash: result.hash,
  };
}

function aloneOf({ law: name, card }: typeof SMALL): ArticleReport["alone"][number] {
  const law = lawByName(name);
  return {
    card,
    meanSeconds: aloneSeconds(law, PROMPT.mean, ANSWER.mean),
    longestSeconds: aloneSeconds(law, PROMPT.mean, ANSWER.max),
  };
}

function isOverlong({ inputTokens, outputTokens }: TraceRequest): boolean {
  const seconds = aloneSeconds(lawByName(LARGE.law), inputTokens, outputTokens);
  return seconds * 1000 > articleFigures.after.p99Ms;
}

/** One request on an idle node. */
function aloneSeconds(law: StepLaw, prompt: number, outputTokens: number): number {
  const prefillUs = rawStepUs(law, 0, 0, prompt, 1, (prompt * prompt) / 2);
  const decodeUs = rawStepUs(law, 1, prompt + outputTokens / 2, 0, 0, 0);
  return (prefillUs + decodeUs * (outputTokens - 1)) / 1e6;
}

// ---- what it says ---------------------------------------------------------------------------------------

function notesOf(report: Omit<ArticleReport, "notes">): ArticleReport["notes"] {
  const { strategies, before, after, cost, alone, overlongShare } = report;
  const [none] = strategies;
  const loose = strategies.at(-1);
  if (none === undefined || loose === undefined) return [];
  const change = (from: number, to: number) => signed(to / from - 1);
  const figures = articleFigures;
  return [
    {
      row: "mean response",
      text:
        `from no cache to semantic 0.90 the article has ${change(none.article.meanMs, loose.article.meanMs)}, ours ` +
        `${change(none.ours.meanMs, loose.ours.meanMs)}. A hit saves a whole answer, and a miss decodes faster on an ` +
        `emptier GPU, but never faster than alone (${alone.map(meanText).join(", ")} for an answer of mean ` +
        "length). The article's fall beyond its share of hits is time in queues, which the gateway under test " +
        "hardly has at this load even without a cache.",
    },
    {
      row: "GPU utilisation",
      text:
        "the article does not say what it counts. A GPU with continuous batching has work nearly always (busy, what " +
        "nvidia-smi shows), cache or not; so ours is how full the engines are, in seats or KV memory. Requests stay " +
        "the longer the fuller a node is, so fullness falls faster than load: " +
        `${change(none.ours.fullShare, loose.ours.fullShare)}, where the article has ` +
        `${change(none.article.utilization, loose.article.utilization)}.`,
    },
    {
      row: "wrong hits",
      text:
        "the article gives none. Ours follow from the assumed 5 % of lookalikes and the bounds of their similarity, " +
        "and no guard on words is modelled: they show the price of a low threshold, not its size.",
    },
    {
      row: "P99 before",
      text:
        `a deadline of 30 s that ${percentText(before.timeoutShare)} of the requests miss puts the P99 of the answered ` +
        `ones just below it; the article's ${durationText(figures.before.p99Ms)} was measured in some such state.`,
    },
    {
      row: "P99 after",
      text:
        `the longest answers (${ANSWER.max} tokens) take ${alone.map(longestText).join(", ")} alone on an idle node; ` +
        `${percentText(overlongShare)} of all answers take more than ${durationText(figures.after.p99Ms)} alone on ` +
        "the faster card, so that no gateway reaches that P99 here without hits for more than half of them. The " +
        "article's answers must have been shorter.",
    },
    {
      row: "timeouts after",
      text:
        `the same fleet could carry the load all along: without a cache, too, ${percentText(none.ours.timeoutShare)} ` +
        "are late once nodes are chosen by their state. The cache lowers the load, and does not cure timeouts. The " +
        "article's 1.2 % may have causes that this run has none of, such as failing nodes or bursts.",
    },
    {
      row: "spread",
      text:
        "the router evens out what a request waits for, not how full engines are: at an equal speed the RTX 4090, " +
        "with less than a tenth of the KV memory, is the fuller one. Over equal cards a round robin is even by " +
        "itself, so the article's nodes must have differed in some way.",
    },
    {
      row: "GPU cost",
      text:
        `the article does not say how it was saved. Ours is the smallest fleet of the same mix on which at most ` +
        `${percentText(figures.after.timeoutShare)} get no answer in time: ${cost.fewest.nodes} of ${cost.nodes} nodes, ` +
        `with a P99 of ${durationText(cost.fewest.p99Ms)} there, against ${durationText(after.p99Ms)} on all.`,
    },
  ];
}

function longestText({ card, longestSeconds }: ArticleReport["alone"][number]): string {
  return `${longestSeconds.toFixed(1)} s on ${card}`;
}

function meanText({ card, meanSeconds }: ArticleReport["alone"][number]): string {
  return `${meanSeconds.toFixed(1)} s on ${card}`;
}

function signed(change: number): string {
  const percent = Math.round(change * 100);
  return `${percent < 0 ? "−" : "+"}${Math.abs(percent)} %`;
}

/** Both tables and the notes as text, with a line end. */
export function formatArticle(report: ArticleReport): string {
  const { strategies, before, after, cost } = report;
  const figures = articleFigures;
  const pair = (article: string, ours: string) => [article, ours];
  const strategyRows = strategies.map(({ article, ours }) => [
    article.name,
    ...pair(percentText(article.hitShare), percentText(ours.hitShare)),
    ...pair(durationText(article.meanMs), durationText(ours.meanMs)),
    ...pair(percentText(article.utilization), percentText(ours.fullShare)),
    percentText(ours.busyShare),
    percentText(ours.wrongHitShare),
  ]);
  const tableRows = [
    [
      "P99 of answered",
      ...pair(durationText(figures.before.p99Ms), durationText(before.p99Ms)),
      ...pair(durationText(figures.after.p99Ms), durationText(after.p99Ms)),
    ],
    [
      "timeouts",
      ...pair(percentText(figures.before.timeoutShare), percentText(before.timeoutShare)),
      ...pair(percentText(figures.after.timeoutShare), percentText(after.timeoutShare)),
    ],
    [
      "refused",
      ...pair("–", percentText(before.refusedShare)),
      ...pair("–", percentText(after.refusedShare)),
    ],
    [
      "spread of node use",
      ...pair(`> ${percentText(figures.before.spread)}`, percentText(before.fullSpread)),
      ...pair(`< ${percentText(figures.after.spread)}`, percentText(after.fullSpread)),
    ],
    [
      "GPU cost",
      ...pair("base", "base"),
      ...pair(signed(figures.after.costChange), signed(cost.change)),
    ],
  ];
  return `${[
    ...workloadLines(report),
    "",
    "Cache strategies, all behind the whole gateway",
    ...textTable([
      ["", "hits", "ours", "mean", "ours", "GPU use", "ours: full", "busy", "wrong hits"],
      ...strategyRows,
    ]),
    "",
    "Before (round robin, no cache, no limits) and after (the whole gateway, semantic 0.92)",
    ...textTable([["", "before", "ours", "after", "ours"], ...tableRows]),
    "",
    "Calibrated: hits, and the column before. The rest is as it fell. Where ours differs, and why:",
    ...report.notes.flatMap(({ row, text }) => wrapped(`- ${row}: ${text}`)),
  ].join("\n")}\n`;
}

function workloadLines({ seed, share, seconds, before, cost }: ArticleReport): string[] {
  return [
    `${RATE * share} requests a second over ${seconds} s, the last ${Math.round(seconds * (1 - WARM_UP_SHARE))} s measured (${before.requests} requests); seed ${seed}`,
    `prompts of ${PROMPT.mean} tokens, answers of ${ANSWER.mean} (means), at most ${ANSWER.max}; ${DEADLINE_MS / 1000} s to answer`,
    `${cost.nodes} nodes with Llama 3.1 8B: ${fleetOf(cost.nodes).filter(({ law }) => law.name === SMALL.law).length} ${SMALL.card}, the others ${LARGE.card}`,
    "the cache matches by meaning as it does live; the questions' vectors are drawn (sim/question-vectors.ts)",
  ];
}

const COLUMNS = 100;

/** Words in lines, the second and later ones indented. */
function wrapped(text: string): string[] {
  const lines: string[] = [];
  let line = "";
  for (const word of text.split(" ")) {
    if (line !== "" && line.length + 1 + word.length > COLUMNS) {
      lines.push(line);
      line = " ";
    }
    line += line === "" ? word : ` ${word}`;
  }
  return [...lines, line];
}
