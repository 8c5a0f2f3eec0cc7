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
import { type SimulatedNode, type SimulationResult, simulate } from "../../sim/simulator.ts";
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

type Case = {
  name: string;
  gateways: number;
  options: OptionsInput;
  metrics: SimulatedNode["metrics"];
};

const GATEWAYS = [1, 4, 16];
const RATE = 28;
/** A tenth above the nodes' 64 seats, and not learned: what is compared is where requests go. */
const fixedCap: OptionsInput = { concurrency: { inflightMin: 70, inflightMax: 70 } };

/** `seconds` of load, of which the first fifth and the last 4 % are left out; means over `seeds` runs. */
export function benchRouters(seconds: number, seeds: number): Row[] {
  // As the article has it: its score, its JSON, every 5 s.
  const article: OptionsInput = {
    ...fixedCap,
    router: { strategy: "article", staleMs: 10_000 },
    scrape: { intervalMs: 5000, timeoutMs: 3000 },
  };
  const behind = (name: string, options: OptionsInput, metrics: Case["metrics"]) =>
    GATEWAYS.map((gateways) => ({ name, gateways, options, metrics }));
  const cases: Case[] = [
    ...behind("headroom", fixedCap, "vllm"),
    ...behind("headroom, learned cap", {}, "vllm"),
    ...behind("article", article, "article"),
    ...(["least_inflight", "power_of_two", "peak_ewma", "prequal", "round_robin"] as const).map(
      (strategy): Case => ({
        name: strategy,
        gateways: 1,
        options: { ...fixedCap, router: { strategy } },
        metrics: "vllm",
      }),
    ),
  ];
  const figures = cases.map((each) => ({ ...each, ...runCase(each, seconds, seeds) }));
  const ofName = (name: string) => figures.filter((figure) => figure.name === name);
  const headroom = ofName("headroom").map(({ ttftP99 }) => ttftP99);
  const [behindOne] = ofName("article");
  const ratio = (behindOne?.ttftP99 ?? Number.NaN) / (headroom[0] ?? Number.NaN);
  const flatness = Math.max(...headroom) / Math.min(...headroom);
  return [
    ...figures.map(({ name, gateways, ttftP50, ttftP99, e2eP99, hits, answered }) => ({
      name: "routers",
      question: `TTFT p99 of ${name} behind ${gateways} gateway${gateways === 1 ? "" : "s"}, ${RATE}/s`,
      figure: `${ttftP99.toFixed(2)} s`,
      value: ttftP99,
      detail:
        `TTFT p50 ${ttftP50.toFixed(3)} s, E2E p99 ${e2eP99.toFixed(1)} s, prefix hits ${(hits * 100).toFixed(0)} %, ` +
        `answered ${(answered * 100).toFixed(2)} %`,
    })),
    {
      name: "routers",
      question: "TTFT p99, article ÷ headroom, one gateway",
      figure: `${ratio.toFixed(1)} ×`,
      value: ratio,
      bar: { atLeast: 10 },
      detail: "",
    },
    {
      name: "routers",
      question: "TTFT p99 of headroom over 1, 4 and 16 gateways, largest ÷ smallest",
      figure: `${flatness.toFixed(2)} ×`,
      value: flatness,
      bar: { atMost: 1.2 },
      detail: `${seeds} runs of ${seconds} s each`,
    },
  ];
}

function runCase({ gateways, options, metrics }: Case, seconds: number, seeds: number) {
  const sums = { ttftP50: 0, ttftP99: 0, e2eP99: 0, hits: 0, answered: 0 };
  for (let seed = 1; seed <= seeds; seed++) {
    const result = simulate({
      nodes: Array.from({ length: NODES }, (_, index) => ({
        law: sessionLaw,
        slowFactor: index < 2 ? 2 : 1,
        prefixCacheTokens: SESSION_PREFIX_CACHE_TOKENS,
        ...(metrics === undefined ? {} : { metrics }),
      })),
      load: [...sessionLoad({ seed, rate: RATE, durationUs: seconds * 1e6 })],
      gateways,
      seed,
      options,
      measured: { fromUs: 0.2 * seconds * 1e6, toUs: 0.96 * seconds * 1e6 },
    });
    sums.ttftP50 += (result.ttftUs.quantile(0.5) ?? 0) / 1e6 / seeds;
    sums.ttftP99 += (result.ttftUs.quantile(0.99) ?? 0) / 1e6 / seeds;
    sums.e2eP99 += (result.e2eUs.quantile(0.99) ?? 0) / 1e6 / seeds;
    sums.hits += result.cachedTokens / Math.max(1, result.promptTokens) / seeds;
    sums.answered += result.counts.completed / Math.max(1, result.counts.arrived) / seeds;
  }
  return sums;
}
