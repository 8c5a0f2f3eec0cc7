/**
 * `npm run bench`: what the gateway costs beside the least that must be done, and what its parts cost.
 *
 * Costs are CPU time per request of the server's process, and ratios are taken within one run: each round measures
 * baseline and gateway one after the other (in turns, which goes first), and the figure is the median over the
 * rounds. Absolute times mean nothing on a shared machine. One loopback client with 32 connections, always busy;
 * it is not what is measured, nor is the node behind.
 *
 *   --smoke       short, for CI: the figures are rough
 *   --only NAME   chat | hit | sse | memory | semantic | lookup | actors | strategies | simulator | routers | vectors |
 *                 remote; may be given more than once
 *   --profile DIR the gateway writes a CPU profile there
 *   --out FILE    JSON; else bench-results/<date>.json
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { cpus, loadavg } from "node:os";
import { dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { Random } from "../../runtime/random.ts";
import { benchActors } from "./actors.ts";
import { MODEL } from "./fixed-answers.ts";
import { ClosedLoop } from "./load.ts";
import { benchRemote } from "./remote.ts";
import { medianOf, printRows, type Row } from "./report.ts";
import { benchSemanticLookup } from "./semantic-lookup.ts";
import { benchRouters, benchSimulatorSpeed } from "./simulator.ts";
import { cpuMs, GATEWAY_KEY, type Running, rssMiB, Stack } from "./stack.ts";
import { benchStrategies } from "./strategies.ts";
import { benchVectors, vectorPaces } from "./vectors.ts";

const CONNECTIONS = 32;
const NODES = 3;
/** Full within the first round, so that what is measured includes dropping old answers. */
const CACHE_BYTES_MAX = 16 * 1024 * 1024;
/** One scope is in one of eight shards: some thousand questions. */
const SEMANTIC_BYTES_MAX = 8 * 32 * 1024 * 1024;
const CACHE_MIB = CACHE_BYTES_MAX / 1024 / 1024;

const names = [
  "chat",
  "hit",
  "sse",
  "memory",
  "semantic",
  "lookup",
  "actors",
  "strategies",
  "simulator",
  "routers",
  "vectors",
  "remote",
] as const;
type Name = (typeof names)[number];

type Pace = { rounds: number; settleMs: number; warmMs: number; windowMs: number };
const full: Pace = { rounds: 7, settleMs: 3000, warmMs: 500, windowMs: 2000 };
const smoke: Pace = { rounds: 3, settleMs: 1000, warmMs: 300, windowMs: 600 };
/** A stream takes 105 ms, so 32 connections carry few of them: longer windows for as many. */
const STREAM_WINDOW_FACTOR = 2;

type Window = { cpuUs: number; perSecond: number; p50Ms: number; p99Ms: number };
type Pair = { bare: Window; gateway: Window };
type Subject = { running: Running; requestOf: () => Buffer };

// ---- one window, and pairs of them ------------------------------------------------------------------------

async function measure(
  { running, requestOf }: Subject,
  warmMs: number,
  windowMs: number,
): Promise<Window> {
  const loop = new ClosedLoop(running.port, CONNECTIONS, requestOf);
  await sleep(warmMs);
  const before = { cpuMs: cpuMs(running), completed: loop.completed, atMs: performance.now() };
  await sleep(windowMs);
  const usedMs = cpuMs(running) - before.cpuMs;
  const elapsedMs = performance.now() - before.atMs;
  const completed = loop.completed - before.completed;
  await loop.stop();
  if (loop.failed > 0) {
    throw new Error(
      `${running.name}: ${loop.failed} requests failed, the first with: ${loop.firstFailure}`,
    );
  }
  if (completed === 0) throw new Error(`${running.name} answered nothing in ${windowMs} ms`);
  return {
    cpuUs: (usedMs * 1000) / completed,
    perSecond: (completed * 1000) / elapsedMs,
    p50Ms: loop.latencyMs(0.5),
    p99Ms: loop.latencyMs(0.99),
  };
}

/** The rounds; before them one of each that does not count, for the compiler's sake. */
async function pairs(bare: Subject, gateway: Subject, pace: Pace): Promise<Pair[]> {
  const { rounds, warmMs, windowMs } = pace;
  await measure(bare, warmMs, windowMs);
  await measure(gateway, warmMs, windowMs * 2);
  const done: Pair[] = [];
  for (let round = 0; round < rounds; round++) {
    const measured: Window[] = [];
    const order = round % 2 === 0 ? [bare, gateway] : [gateway, bare];
    for (const subject of order) measured.push(await measure(subject, warmMs, windowMs));
    const [first, second] = measured;
    if (first === undefined || second === undefined) continue;
    done.push(
      round % 2 === 0 ? { bare: first, gateway: second } : { bare: second, gateway: first },
    );
  }
  return done;
}

/** @param names of what stands above and below the line; @param atMost absent: reported only */
function rowOf(
  name: string,
  question: string,
  measured: readonly Pair[],
  atMost?: number,
  names: readonly [gateway: string, bare: string] = ["gateway", "bare"],
): Row {
  const ratios = measured.map(({ bare, gateway }) => gateway.cpuUs / bare.cpuUs);
  const value = medianOf(ratios);
  const median = (of: (pair: Pair) => number) => medianOf(measured.map(of));
  const side = (which: "bare" | "gateway") =>
    `${names[which === "gateway" ? 0 : 1]} ${median((pair) => pair[which].cpuUs).toFixed(0)} µs ` +
    `(${median((pair) => pair[which].perSecond).toFixed(0)}/s, p50 ${median((pair) => pair[which].p50Ms).toFixed(1)}, ` +
    `p99 ${median((pair) => pair[which].p99Ms).toFixed(1)} ms)`;
  const spread = `rounds ${Math.min(...ratios).toFixed(2)} to ${Math.max(...ratios).toFixed(2)}`;
  const detail = `${side("gateway")}; ${side("bare")}; ${spread}`;
  const bar = atMost === undefined ? {} : { bar: { atMost } };
  return { name, question, figure: `${value.toFixed(2)} ×`, value, ...bar, detail };
}

// ---- requests ---------------------------------------------------------------------------------------------

let prompts = 0;

/** About 170 bytes of body. Every call asks something new, unless `prompt` is fixed. */
function requests(stream: boolean, prompt?: string): () => Buffer {
  const fields = { temperature: 0.7, max_tokens: 128, ...(stream && { stream }) };
  return () => {
    const content =
      prompt ?? `Question ${String(++prompts).padStart(9, "0")}: why is the evening sky red?`;
    return requestOf(content, fields);
  };
}

function requestOf(content: string, fields: object): Buffer {
  const messages = [{ role: "user", content }];
  const body = JSON.stringify({ model: MODEL, messages, ...fields });
  return Buffer.from(
    `POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer ${GATEWAY_KEY}\r\n` +
      `content-type: application/json\r\ncontent-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
  );
}

/** The same for questions that are looked up by meaning, and are all unlike each other. */
function unlikeRequests(): () => Buffer {
  const random = new Random("questions");
  const letters = "abcdefghijklmnoprstuvw";
  const letter = (): string => letters[random.int(letters.length)] ?? "a";
  const word = (): string => Array.from({ length: 3 + random.int(6) }, letter).join("");
  const words = Array.from({ length: 5000 }, word);
  return () => {
    const some = Array.from({ length: 8 }, () => words[random.int(words.length)] ?? "");
    return requestOf(`Question ${++prompts}: how do I ${some.join(" ")}?`, { temperature: 0 });
  };
}

// ---- the rows ---------------------------------------------------------------------------------------------

async function benchGateway(
  wanted: ReadonlySet<Name>,
  pace: Pace,
  execArgv: readonly string[],
): Promise<{ rows: Row[]; measured: Record<string, Pair[]> }> {
  const stack = new Stack();
  const rows: Row[] = [];
  const measured: Record<string, Pair[]> = {};
  try {
    const node = await stack.script("fixed-node", [String(NODES)]);
    const nodes = node.ports.map((port, index) => ({
      name: `node-${index + 1}`,
      url: `http://127.0.0.1:${port}`,
    }));
    const bare = await stack.script("pass-through-server", [`http://127.0.0.1:${node.port}`]);
    const constant = await stack.script("constant-server");
    const gateway = await stack.gateway({ nodes, cache: { bytesMax: CACHE_BYTES_MAX } }, execArgv);
    await sleep(pace.settleMs);
    const idle = { gateway: rssMiB(gateway), bare: rssMiB(bare) };
    const run = async (
      name: Name,
      question: string,
      atMost: number,
      base: Running,
      requestOf: () => Buffer,
      factor = 1,
    ) => {
      if (!wanted.has(name)) return;
      const stretched = { ...pace, windowMs: pace.windowMs * factor };
      measured[name] = await pairs(
        { running: base, requestOf },
        { running: gateway, requestOf },
        stretched,
      );
      rows.push(rowOf(name, question, measured[name], atMost));
    };
    await run(
      "chat",
      "CPU, chat request through the whole chain ÷ bare pass-through",
      1.8,
      bare,
      requests(false),
    );
    const repeated = requests(false, "What is a headrace, in one sentence, please?");
    await run(
      "hit",
      "CPU, exact cache hit ÷ bare constant of the same size",
      1.6,
      constant,
      repeated,
    );
    await run(
      "sse",
      "CPU, stream of 21 events at 5 ms ÷ bare pass-through",
      1.3,
      bare,
      requests(true),
      STREAM_WINDOW_FACTOR,
    );
    if (wanted.has("semantic")) {
      const semantic = { embedder: { type: "lexical" }, bytesMax: SEMANTIC_BYTES_MAX };
      const cache = { bytesMax: CACHE_BYTES_MAX, semantic };
      const matching = await stack.gateway({ nodes, cache }, execArgv);
      const requestOf = unlikeRequests();
      measured.semantic = await pairs(
        { running: gateway, requestOf },
        { running: matching, requestOf },
        pace,
      );
      const question = "CPU, chat request looked up by meaning and missing ÷ with that off";
      rows.push(rowOf("semantic", question, measured.semantic, undefined, ["on", "off"]));
      const { semanticMisses, questions } = (await stack.state(matching)).cache ?? {};
      if (!((semanticMisses ?? 0) > 0)) throw new Error("nothing was looked up by meaning");
      console.log(
        `looked up by meaning: ${semanticMisses} misses, ${questions} questions at the end`,
      );
      await stack.end(matching);
    }
    if (wanted.has("memory")) {
      rows.push(
        memoryRow(
          "memory",
          "Memory (RSS), idle gateway with 3 nodes ÷ bare pass-through",
          idle,
          1.6,
        ),
      );
      const loaded = { gateway: rssMiB(gateway), bare: rssMiB(bare) };
      const after = `Memory (RSS), the same after load (with ${CACHE_MIB} MiB of cached answers)`;
      if (rows.length > 1) rows.push(memoryRow("memory after load", after, loaded));
    }
  } finally {
    await stack.endAll();
  }
  return { rows, measured };
}

function memoryRow(
  name: string,
  question: string,
  rss: { gateway: number; bare: number },
  atMost?: number,
): Row {
  const value = rss.gateway / rss.bare;
  const detail = `gateway ${rss.gateway.toFixed(0)} MiB; bare ${rss.bare.toFixed(0)} MiB`;
  const bar = atMost === undefined ? {} : { bar: { atMost } };
  return { name, question, figure: `${value.toFixed(2)} ×`, value, ...bar, detail };
}

async function actorRows(): Promise<Row[]> {
  const measured = await benchActors();
  const queued = ["cell dispatcher: tell 8→1 in turns", "cell dispatcher: tell host→1, queued"];
  const base = measured.find(({ name }) => name === "plain call");
  const nact = measured.find(({ name }) => name === "nact N→1, queued");
  return measured
    .filter(({ name }) => queued.includes(name))
    .map(({ name, nsPerMessage, nactRatio = Number.NaN, callRatio }) => ({
      name,
      question: `Messages per CPU second, ${name.replace("cell dispatcher: ", "")} ÷ raw nact`,
      figure: `${nactRatio.toFixed(1)} ×`,
      value: nactRatio,
      bar: { atLeast: 3 },
      detail:
        `${nsPerMessage.toFixed(0)} ns; raw nact ${nact?.nsPerMessage.toFixed(0)} ns; ` +
        `plain call ${base?.nsPerMessage.toFixed(1)} ns (${callRatio.toFixed(0)} of them)`,
    }));
}

function strategyRows(): Row[] {
  const measured = benchStrategies();
  const strategies = [...new Set(measured.map(({ strategy }) => strategy))];
  return strategies.map((strategy) => {
    const sizes = measured.filter((row) => row.strategy === strategy);
    const us = (ns: number) => (ns / 1000).toFixed(1);
    return {
      name: strategy,
      question: `One decision of ${strategy} over ${sizes.map(({ nodes }) => nodes).join(" / ")} nodes`,
      figure: `${sizes.map(({ decisionNs }) => us(decisionNs)).join(" / ")} µs`,
      value: (sizes[0]?.decisionNs ?? Number.NaN) / 1000,
      detail: `with its explanation ${sizes.map(({ explainedNs }) => us(explainedNs)).join(" / ")} µs`,
    };
  });
}

// ---- the command ------------------------------------------------------------------------------------------

const { values: flags } = parseArgs({
  options: {
    smoke: { type: "boolean", default: false },
    only: { type: "string", multiple: true, default: [] },
    profile: { type: "string" },
    out: { type: "string" },
  },
});
const unknown = flags.only.find((name) => !names.some((each) => each === name));
if (unknown !== undefined) {
  console.error(`--only ${unknown}: there is no such benchmark; accepted: ${names.join(", ")}`);
  process.exit(2);
}
const wanted = new Set(
  names.filter((name) => flags.only.length === 0 || flags.only.includes(name)),
);
const pace = flags.smoke ? smoke : full;
const profileArgs =
  flags.profile === undefined ? [] : ["--cpu-prof", `--cpu-prof-dir=${flags.profile}`];

const startedAt = new Date();
const loadBefore = loadavg()[0] ?? 0;
const rows: Row[] = [];
let measured: Record<string, Pair[]> = {};
if (wanted.has("actors")) rows.push(...(await actorRows()));
if (wanted.has("lookup")) rows.push(...(await benchSemanticLookup()));
if (wanted.has("strategies")) rows.push(...strategyRows());
if (wanted.has("simulator")) rows.push(...(await benchSimulatorSpeed()));
if (wanted.has("routers"))
  rows.push(...(flags.smoke ? benchRouters(150, 1) : benchRouters(500, 3)));
if (wanted.has("vectors"))
  rows.push(...benchVectors(flags.smoke ? vectorPaces.smoke : vectorPaces.full));
if (wanted.has("remote")) {
  rows.push(
    ...(await benchRemote(
      flags.smoke
        ? { rounds: 3, batchedAsks: 20_000, singleAsks: 1000 }
        : { rounds: 7, batchedAsks: 200_000, singleAsks: 10_000 },
    )),
  );
}
const needsGateway = (["chat", "hit", "sse", "memory", "semantic"] as const).some((name) =>
  wanted.has(name),
);
if (needsGateway) {
  const gateway = await benchGateway(wanted, pace, profileArgs);
  rows.unshift(...gateway.rows);
  measured = gateway.measured;
}

const [cpu] = cpus();
console.log(
  `${cpus().length} × ${cpu?.model.trim()}, Node ${process.version}, load ${loadBefore.toFixed(1)} before; ` +
    `${pace.rounds} paired rounds of ${pace.windowMs} ms (streams: ${pace.windowMs * STREAM_WINDOW_FACTOR}), ${CONNECTIONS} connections`,
);
console.log(
  "bare pass-through: node:http, body buffered and parsed as JSON, undici Pool.dispatch with keep-alive, aborts passed on\n",
);
printRows(rows);

const out =
  flags.out ?? join("bench-results", `${startedAt.toISOString().replaceAll(":", "-")}.json`);
mkdirSync(dirname(out), { recursive: true });
const machine = { cpus: cpus().length, model: cpu?.model, node: process.version, loadBefore };
const result = {
  startedAt: startedAt.toISOString(),
  smoke: flags.smoke,
  machine,
  pace,
  rows,
  measured,
};
writeFileSync(out, `${JSON.stringify(result, null, 2)}\n`);
console.log(`\nwritten to ${out}`);
