/**
 * How fast is the simulator, and what does it say of routers?
 *
 * Speed: the whole actor stack on one core, CPU time of this process, the least of several runs (on a shared machine
 * the others measure the neighbours); the first one, which also pays for compilation, is given beside it.
 *
 * Routers: the load of chat sessions on eight nodes, two of them at half speed (sim/session-load.ts), behind 1, 4 and
 * 16 gateways; the article's rule on its own metrics and interval beside the default.
 */
import { existsSync } from "node:fs";
import { lawByName } from "../../sim/laws.ts";
import { generateLoad } from "../../sim/load-generators.ts";
import { SESSION_PREFIX_CACHE_TOKENS, sessionLaw, sessionLoad } from "../../sim/session-load.ts";
import { type SimulationResult, simulate } from "../../sim/simulator.ts";
import { openTrace } from "../../sim/trace.ts";
import type { TraceRequest } from "../../sim/trace-rows.ts";
import type { OptionsInput } from "../../transport/options.ts";
import type { Row } from "./report.ts";

const NODES = 8;
const RUNS = 8;
const LAW = "llama-3.1-8b/h100";
/** Beside the repository: too large, and not ours, to be in it. */
const MOONCAKE = "../shared/data/traces/mooncake/conversation_trace.jsonl";

export async function benchSimulatorSpeed(): Promise<Row[]> {
  const rows: Row[] = [];
  if (existsSync(MOONCAKE)) {
    const load: TraceRequest[] = [];
    for await (const request of (await openTrace(MOONCAKE)).requests()) load.push(request);
    const { seconds, first, result } = measured(load);
    const simulated = result.lastArrivalUs / 1e6;
    rows.push({
      name: "simulator",
      question: "Simulated ÷ CPU time, whole stack, Mooncake conversations on 8 nodes",
      figure: `${Math.round(simulated / seconds)} ×`,
      value: simulated / seconds,
      bar: { atLeast: 5000 },
      detail: detailOf(load.length, seconds, first, result),
    });
  } else console.log(`skipped: ${MOONCAKE} is not there`);
  const lengths = { mean: 512, cv: 0, max: 512 };
  const load = [
    ...generateLoad({
      seed: 1,
      arrivals: { kind: "poisson", rate: 80 },
      requests: 20_000,
      content: { kind: "plain", input: lengths, output: lengths },
    }),
  ];
  const { seconds, first, result } = measured(load);
  rows.push({
    name: "simulator",
    question: "CPU time of 20,000 requests of 512/512 tokens at 80/s on 8 nodes, whole stack",
    figure: `${seconds.toFixed(2)} s`,
    value: seconds,
    bar: { atMost: 2 },
    detail: detailOf(load.length, seconds, first, result),
  });
  return rows;
}

function measured(load: readonly TraceRequest[]) {
  const law = lawByName(LAW);
  const nodes = Array.from({ length: NODES }, () => ({ law }));
  const once = () => {
    const before = process.cpuUsage();
    const result = simulate({ nodes, load });
    const { user, system } = process.cpuUsage(before);
    return { result, seconds: (user + system) / 1e6 };
  };
  const { result, seconds: first } = once();
  const seconds = Math.min(...Array.from({ length: RUNS }, () => once().seconds));
  return { seconds, first, result };
}

function detailOf(
  requests: number,
  seconds: number,
  first: number,
  { messages }: SimulationResult,
): string {
  return (
    `${((seconds * 1e6) / requests).toFixed(0)} µs and ${(messages / requests).toFixed(0)} messages a request; ` +
    `first run, with compilation, ${first.toFixed(2)} s`
  );
}

// ---- routers ------------------------------------------------------------------------------------------

/** Seconds, and per cent. */
type Figures = { ttftP50: number; ttftP99: number; e2eP99: number; hits: number; answered: number };
type Case = { strategy: (typeof strategies)[number]; rate: number; gateways: number };

const strategies = [
  "headroom",
  "article",
  "round_robin",
  "least_inflight",
  "power_of_two",
  "peak_ewma",
  "prequal",
] as const;
const GATEWAYS = [1, 4, 16];
/** What the nodes can carry with prefix hits, and a fifth more. */
const RATES = [28, 34];
/** As the article has it: its score, its JSON, every 5 s, no cap. Everything else runs with the defaults that ship. */
const article: OptionsInput = {
  concurrency: { inflightMin: 256, inflightMax: 256 },
  router: { strategy: "article", staleMs: 10_000 },
  scrape: { intervalMs: 5000, timeoutMs: 3000 },
};

/**
 * The p99 is that of all requests: where more than one in a hundred is refused or fails, it is none (∞).
 *
 * `seconds` of load, of which the first fifth and the last 4 % are left out; means over `seeds` runs.
 */
export function benchRouters(seconds: number, seeds: number): Row[] {
  return RATES.flatMap((rate) => {
    const figures = strategies.map((strategy) => ({
      strategy,
      behind: GATEWAYS.map((gateways) => {
        // What must be flat is measured on twice the runs: one run's p99 is a few hundred requests.
        const runs = strategy === "headroom" ? 2 * seeds : seeds;
        return runCase({ strategy, rate, gateways }, seconds, runs);
      }),
    }));
    const ttftP99 = (of: string): number[] =>
      figures.flatMap(({ strategy, behind }) =>
        strategy === of ? behind.map((run) => run.ttftP99) : [],
      );
    const headroom = ttftP99("headroom");
    const ratio = Math.min(
      ...ttftP99("article").map((seconds, index) => seconds / (headroom[index] ?? Number.NaN)),
    );
    const flatness = Math.max(...headroom) / Math.min(...headroom);
    return [
      ...figures.map(({ strategy, behind }) => ({
        name: "routers",
        question: `TTFT p99 of ${strategy}, ${rate}/s, behind ${GATEWAYS.join(" / ")} gateways`,
        figure: `${each(behind, "ttftP99", 2)} s`,
        value: behind[0]?.ttftP99 ?? Number.NaN,
        detail: `${each(behind, "ttftP50", 2)} s TTFT p50, ${each(behind, "e2eP99", 0)} s E2E p99, ${each(behind, "hits", 0)} % prefix hits, ${each(behind, "answered", 1)} % answered`,
      })),
      {
        name: "routers",
        question: `TTFT p99, article ÷ headroom, ${rate}/s, the least over the gateways`,
        figure: `${ratio.toFixed(1)} ×`,
        value: ratio,
        bar: { atLeast: 10 },
        detail: "",
      },
      {
        name: "routers",
        question: `TTFT p99 of headroom over the gateways, ${rate}/s, largest ÷ smallest`,
        figure: `${flatness.toFixed(2)} ×`,
        value: flatness,
        bar: { atMost: 1.2 },
        detail: `${seeds} runs of ${seconds} s each, ${2 * seeds} of headroom`,
      },
    ];
  });
}

function each(runs: readonly Figures[], name: keyof Figures, digits: number): string {
  return runs
    .map((run) => (run[name] === Number.POSITIVE_INFINITY ? "∞" : run[name].toFixed(digits)))
    .join(" / ");
}

function runCase({ strategy, rate, gateways }: Case, seconds: number, seeds: number): Figures {
  const sums: Figures = { ttftP50: 0, ttftP99: 0, e2eP99: 0, hits: 0, answered: 0 };
  for (let seed = 1; seed <= seeds; seed++) {
    const result = simulate({
      nodes: Array.from({ length: NODES }, (_, index) => ({
        law: sessionLaw,
        slowFactor: index < 2 ? 2 : 1,
        prefixCacheTokens: SESSION_PREFIX_CACHE_TOKENS,
        metrics: strategy === "article" ? "article" : "vllm",
      })),
      load: [...sessionLoad({ seed, rate, durationUs: seconds * 1e6 })],
      gateways,
      seed,
      options: strategy === "article" ? article : { router: { strategy } },
      measured: { fromUs: 0.2 * seconds * 1e6, toUs: 0.96 * seconds * 1e6 },
    });
    sums.ttftP50 += (result.ttftUs.quantile(0.5) ?? 0) / 1e6 / seeds;
    const { arrived, completed } = result.counts;
    const share = (0.99 * arrived) / Math.max(1, completed);
    const ttftP99 = share > 1 ? Number.POSITIVE_INFINITY : (result.ttftUs.quantile(share) ?? 0);
    sums.ttftP99 += ttftP99 / 1e6 / seeds;
    sums.e2eP99 += (result.e2eUs.quantile(0.99) ?? 0) / 1e6 / seeds;
    sums.hits += (100 * result.cachedTokens) / Math.max(1, result.promptTokens) / seeds;
    sums.answered += (100 * completed) / Math.max(1, arrived) / seeds;
  }
  return sums;
}
