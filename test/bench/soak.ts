/**
 * `npm run soak`: does the gateway stay as it is? A gateway and three quick stand-in nodes under a mix of whole,
 * streamed and repeated requests, at 70 % of what this machine carries (found first by a short ramp), with every
 * tenth client leaving at some moment. Every 5 s it prints memory and what is in flight; at the end memory must not
 * have grown, and nothing may be left over. Exit status 1 when a bar is missed.
 *
 *   --minutes N   length of the soak; default 10
 */
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { Random } from "../../runtime/random.ts";
import { MODEL } from "./fixed-answers.ts";
import { type Arrival, ChatClient, OpenLoop, type Tally } from "./load.ts";
import { medianOf, printRows, type Row } from "./report.ts";
import {
  cpuMs,
  GATEWAY_KEY,
  heldBy,
  lettersOf,
  type Running,
  restOf,
  rssMiB,
  Stack,
} from "./stack.ts";

const NODES = 3;
const SPEED = 40;
const LOAD_SHARE = 0.7;
const STREAM_SHARE = 0.5;
const REPEAT_SHARE = 0.25;
const REPEATS = 200;
const LEAVE_SHARE = 0.1;
const LEAVE_MS_MAX = 60;
/** Where others take the machine's time, what it carries falls: then no more wait than this. */
const OPEN_MAX = 300;
/** Full long before the first memory figure is taken. */
const CACHE_BYTES_MAX = 8 * 1024 * 1024;

const RAMP_MS = 3000;
const RAMP_CLIENTS = [16, 32, 64, 128, 256];
/** More clients that bring less than this bring nothing. */
const RAMP_GAIN_MIN = 1.05;

const SAMPLE_MS = 5000;
/** Memory is compared over so much time, at this share of the soak and at its end. */
const WINDOW_MS = 30_000;
const BASE_SHARE = 0.2; // Minute 2 of 10.
const REST_MS_MAX = 15_000;

const { values: flags } = parseArgs({ options: { minutes: { type: "string", default: "10" } } });
const minutes = Number(flags.minutes);
if (!(minutes > 0 && minutes <= 1440)) {
  console.error(`--minutes ${flags.minutes}: a number above 0, at most 1440, is accepted`);
  process.exit(2);
}

const stack = new Stack();
const random = new Random("soak");
let questions = 0;

function arrival(): Arrival {
  const isRepeat = random.next() < REPEAT_SHARE;
  const content = isRepeat
    ? `Known question ${random.int(REPEATS)}.`
    : `New question ${++questions}.`;
  const stream = random.next() < STREAM_SHARE;
  const body = { model: MODEL, messages: [{ role: "user", content }], stream };
  if (random.next() >= LEAVE_SHARE) return { body };
  return { body, leaveAfterMs: random.next() * LEAVE_MS_MAX };
}

/** Requests per second with as many clients as bring anything, each asking again as soon as it is answered. */
async function capacity(gateway: Running): Promise<number> {
  let best = 0;
  for (const clients of RAMP_CLIENTS) {
    const client = new ChatClient(gateway.port, GATEWAY_KEY);
    const untilMs = performance.now() + RAMP_MS;
    let answered = 0;
    const cpuBefore = cpuMs(gateway);
    const one = async (): Promise<void> => {
      while (performance.now() < untilMs) {
        const { end, problem } = await client.chat(arrival().body);
        if (end !== "complete") throw new Error(`during the ramp a request failed: ${problem}`);
        answered++;
      }
    };
    await Promise.all(Array.from({ length: clients }, one));
    client.close();
    const perSecond = (answered * 1000) / RAMP_MS;
    const busy = (cpuMs(gateway) - cpuBefore) / RAMP_MS;
    console.log(
      `ramp: ${clients} clients, ${perSecond.toFixed(0)} requests/s, gateway ${(busy * 100).toFixed(0)} % of a core`,
    );
    if (perSecond < best * RAMP_GAIN_MIN) return Math.max(best, perSecond);
    best = perSecond;
  }
  return best;
}

type Sample = { atMs: number; rss: number };

async function soak(
  gateway: Running,
  perSecond: number,
): Promise<{ samples: Sample[]; tally: Tally }> {
  const client = new ChatClient(gateway.port, GATEWAY_KEY);
  const load = new OpenLoop(client, random, { perSecond, openMax: OPEN_MAX }, arrival);
  const startedAtMs = performance.now();
  const samples: Sample[] = [];
  console.log(
    "\n     s  RSS MiB  CPU %  clients  requests  inflight  leases  queued  flights  complete  left  failed  dead letters",
  );
  let cpuBefore = cpuMs(gateway);
  let atMs = 0;
  while (atMs < minutes * 60_000) {
    await sleep(SAMPLE_MS);
    const state = await stack.state(gateway);
    const held = heldBy(state);
    const beforeMs = atMs;
    atMs = performance.now() - startedAtMs;
    const cpu = cpuMs(gateway);
    const rss = rssMiB(gateway);
    samples.push({ atMs, rss });
    const { complete, left, failed, brokenOnceBegun } = load.tally;
    const cells = [
      [(atMs / 1000).toFixed(0), 6],
      [rss.toFixed(1), 7],
      [((100 * (cpu - cpuBefore)) / (atMs - beforeMs)).toFixed(0), 5],
      [load.open, 7],
      [held.requests, 8],
      [held.inflight, 8],
      [held.leases, 6],
      [held.queued, 6],
      [held.flights, 7],
      [complete, 8],
      [left, 4],
      [failed + brokenOnceBegun, 6],
      [lettersOf(state), 0],
    ] as const;
    console.log(cells.map(([cell, width]) => String(cell).padStart(width)).join("  "));
    cpuBefore = cpu;
  }
  await load.stop();
  client.close();
  return { samples, tally: load.tally };
}

/** Letters that tell of a fault; the others are for askers and requests that are gone, which is as it should be. */
const faults: ReadonlySet<string> = new Set([
  "full",
  "crashed",
  "noroute",
  "oversized",
  "undecodable",
  "disconnected",
]);

function rssAt(samples: readonly Sample[], fromMs: number): number {
  return medianOf(
    samples
      .filter(({ atMs }) => atMs >= fromMs && atMs <= fromMs + WINDOW_MS + SAMPLE_MS)
      .map(({ rss }) => rss),
  );
}

function count(name: string, question: string, value: number, atMost: number, detail = ""): Row {
  return { name, question, figure: String(value), value, bar: { atMost }, detail };
}

async function run(): Promise<Row[]> {
  const nodes = await Promise.all(
    Array.from({ length: NODES }, (_, index) =>
      stack.node(`gpu-${index + 1}`, ["--model", MODEL, "--speed", String(SPEED)]),
    ),
  );
  const gateway = await stack.gateway({
    nodes: nodes.map(({ name, port }) => ({ name, url: `http://127.0.0.1:${port}` })),
    cache: { bytesMax: CACHE_BYTES_MAX },
    queue: { perKeyMax: 1000 }, // One key stands for all clients here.
  });
  const most = await capacity(gateway);
  const perSecond = most * LOAD_SHARE;
  console.log(
    `this machine carries ${most.toFixed(0)} requests/s; ${minutes} minutes at ${perSecond.toFixed(0)}/s`,
  );
  const { samples, tally } = await soak(gateway, perSecond);
  const held = await restOf(stack, gateway, REST_MS_MAX);
  const heldTexts = Object.entries(held).map(([what, left]) => `${what} ${left}`);
  const { system } = await stack.state(gateway);
  const endMs = samples.at(-1)?.atMs ?? 0;
  const base = rssAt(samples, BASE_SHARE * endMs);
  const end = rssAt(samples, endMs - WINDOW_MS);
  const faulty = system.deadLetters.filter(({ reason }) => faults.has(reason));
  const problems = [...tally.problems].map(([problem, times]) => `${times} × ${problem}`);
  const failed = tally.failed + tally.brokenOnceBegun;
  return [
    {
      name: "memory",
      question: `memory (RSS) at the end ÷ at minute ${(BASE_SHARE * minutes).toFixed(1)}`,
      figure: `${(end / base).toFixed(2)} ×`,
      value: end / base,
      bar: { atMost: 1.2 },
      detail: `${base.toFixed(0)} MiB, ${end.toFixed(0)} MiB; medians over ${WINDOW_MS / 1000} s`,
    },
    count("unhandled", "unhandled rejections and exceptions", gateway.unhandled(), 0),
    count("restarts", "actors that crashed", system.restarts, 0),
    count(
      "letters",
      "dead letters that tell of a fault (no room, no receiver, a crash)",
      faulty.reduce((sum, letter) => sum + letter.count, 0),
      0,
      `all: ${lettersOf(await stack.state(gateway))}`,
    ),
    count("rest", "counters not back to 0", heldTexts.length, 0, heldTexts.join(", ")),
    count(
      "failed",
      "requests that failed",
      failed,
      0,
      `of ${tally.sent}; ${tally.left} left on purpose; ${tally.skipped} never sent, as ${OPEN_MAX} ` +
        `were open; ${problems.slice(0, 5).join(", ")}`,
    ),
  ];
}

let rows: Row[] = [];
try {
  rows = await run();
} finally {
  await stack.endAll();
}
console.log("");
const passed = printRows(rows);
console.log(passed ? "\nPASS" : "\nFAIL");
process.exitCode = passed ? 0 : 1;
