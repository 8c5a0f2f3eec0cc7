/**
 * `npm run warmup-load`: what a warm-up of 200 prompts, at most 5 in flight, costs the live requests beside it.
 *
 * One gateway before two stand-in nodes at their real speed, and one steady load of streams on it, never the same
 * question twice. Rounds of that load alone and of the same with a warm-up take turns (which goes first, too); all
 * latencies of a kind are one sample, and the figures are ratios of percentiles within the run. Prompts are embedded
 * ahead by the built-in embedder, and live questions are looked up by meaning. Exit status 1 when a bar is missed.
 *
 *   --smoke   two short rounds: rough
 */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { Random } from "../../runtime/random.ts";
import type { WarmupReport } from "../../transport/warmup.ts";
import { MODEL } from "./fixed-answers.ts";
import { ChatClient } from "./load.ts";
import { printRows, type Row } from "./report.ts";
import { GATEWAY_KEY, type Running, Stack } from "./stack.ts";

const PROMPTS = 200;
const INFLIGHT_MAX = 5;
const PER_SECOND = 30;
const LIVE_TOKENS = 40;
/** So that a warm-up lasts some seconds. */
const PROMPT_TOKENS = 40;
const NODES = 2;
const OPEN_MAX = 1000;
const SETTLE_MS = 2000;
const WARM_MS_MAX = 120_000;

const { values: flags } = parseArgs({ options: { smoke: { type: "boolean", default: false } } });
const rounds = flags.smoke ? 2 : 6;
const quietMs = flags.smoke ? 5000 : 12_000;

const stack = new Stack();
const folder = mkdtempSync(join(tmpdir(), "headrace-warmup-load-"));
const prompts = join(folder, "prompts.txt");
const random = new Random("warmup-load");
let asked = 0;

/** Words that make every question unlike all others. */
function question(): string {
  const words = Array.from({ length: 8 }, () => `word${random.int(100_000)}`);
  return `Question ${asked++}: ${words.join(" ")}?`;
}

/** Live requests that begin until `until` ends; ms of each whole stream, and what failed. */
async function live(client: ChatClient, until: Promise<unknown>): Promise<number[]> {
  const latenciesMs: number[] = [];
  const open = new Set<Promise<void>>();
  let isOver = false;
  void until.finally(() => {
    isOver = true;
  });
  let dueAtMs = performance.now();
  while (!isOver) {
    dueAtMs += (-1000 / PER_SECOND) * Math.log(1 - random.next());
    await sleep(Math.max(0, dueAtMs - performance.now()));
    if (open.size >= OPEN_MAX) throw new Error("the load is more than the nodes can do");
    const messages = [{ role: "user", content: question() }];
    const body = { model: MODEL, messages, stream: true, headrace_output_tokens: LIVE_TOKENS };
    const one = client.chat(body).then(({ end, problem, totalMs }) => {
      open.delete(one);
      if (end !== "complete") throw new Error(`a live request failed: ${problem}`);
      latenciesMs.push(totalMs);
    });
    open.add(one);
  }
  await Promise.all(open);
  return latenciesMs;
}

function warm({ process: child }: Running): Promise<WarmupReport> {
  const lines = Array.from({ length: PROMPTS }, () =>
    JSON.stringify({
      messages: [{ role: "user", content: question() }],
      headrace_output_tokens: PROMPT_TOKENS,
    }),
  );
  writeFileSync(prompts, lines.join("\n"));
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error("the warm-up does not end")), WARM_MS_MAX);
    child.once("message", ({ report }: { report: WarmupReport }) => {
      clearTimeout(timer);
      resolve(report);
    });
    child.send("warm");
  });
}

function percentile(latenciesMs: readonly number[], share: number): number {
  const sorted = [...latenciesMs].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? Number.NaN;
}

async function run(): Promise<Row[]> {
  const names = Array.from({ length: NODES }, (_, at) => `gpu-${at + 1}`);
  const nodes = await Promise.all(names.map((name) => stack.node(name, ["--model", MODEL])));
  const config = join(folder, "headrace.json");
  const limits = { requestsPerMinute: 10_000_000, tokensPerMinute: 1_000_000_000 };
  const options = {
    listen: { port: 0 },
    log: { level: "error" },
    keys: [{ key: GATEWAY_KEY, tenant: "bench", limits }],
    nodes: nodes.map(({ name, port }) => ({ name, url: `http://127.0.0.1:${port}` })),
    cache: { semantic: { embedder: { type: "lexical" } } },
    warmup: { file: prompts, tenant: "bench", model: MODEL, inflightMax: INFLIGHT_MAX },
  };
  writeFileSync(config, JSON.stringify(options));
  const gateway = await stack.script("warming-gateway", [config]);
  const client = new ChatClient(gateway.port, GATEWAY_KEY);
  await sleep(SETTLE_MS);
  await live(client, sleep(SETTLE_MS)); // For the compiler's sake; not counted.
  const measured = { quiet: [] as number[], warming: [] as number[] };
  let filled = 0;
  let warmingMs = 0;
  for (let round = 0; round < rounds; round++) {
    const order =
      round % 2 === 0 ? (["quiet", "warming"] as const) : (["warming", "quiet"] as const);
    for (const kind of order) {
      const beganAtMs = performance.now();
      const warming = kind === "warming" ? warm(gateway) : undefined;
      measured[kind].push(...(await live(client, warming ?? sleep(quietMs))));
      if (warming === undefined) continue;
      filled += (await warming).filled;
      warmingMs += performance.now() - beganAtMs;
    }
  }
  client.close();
  const { quiet, warming } = measured;
  const seconds = (warmingMs / rounds / 1000).toFixed(1);
  const rows: Row[] = [0.99, 0.5].map((share) => {
    const [alone, beside] = [percentile(quiet, share), percentile(warming, share)];
    const name = `p${share * 100}`;
    return {
      name,
      question: `${name} of live streams beside a warm-up ÷ alone`,
      figure: `${(beside / alone).toFixed(3)} ×`,
      value: beside / alone,
      ...(share === 0.99 ? { bar: { atMost: 1.05 } } : {}),
      detail:
        `${beside.toFixed(0)} ms of ${warming.length} requests; alone ${alone.toFixed(0)} ms of ${quiet.length}; ` +
        `${rounds} rounds, a warm-up takes ${seconds} s`,
    };
  });
  rows.push({
    name: "filled",
    question: `prompts newly answered, of ${PROMPTS} a round`,
    figure: String(filled / rounds),
    value: filled / rounds,
    bar: { atLeast: PROMPTS },
    detail: "",
  });
  return rows;
}

let rows: Row[] = [];
try {
  rows = await run();
} finally {
  await stack.endAll();
  rmSync(folder, { recursive: true, force: true });
}
console.log(
  `${PER_SECOND} streams of ${LIVE_TOKENS} tokens a second on ${NODES} stand-in nodes; ${INFLIGHT_MAX} prompts in flight\n`,
);
const passed = printRows(rows);
console.log(passed ? "\nPASS" : "\nFAIL");
process.exitCode = passed ? 0 : 1;
