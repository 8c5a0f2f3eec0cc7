/**
 * `npm run failover`: what clients see when nodes fail. A gateway and three stand-in nodes at 60 % of their places,
 * half of the requests streamed:
 *
 *   1. each node is killed and started again, in turn
 *   2. one node answers 503 within 5 ms, which makes it look like the quickest
 *   3. the gateway itself is held up again and again, longer than its actors wait for each other
 *   4. all nodes fail
 *
 * Until its stream has begun, no request may fail but in the fourth, whose retries must not become a storm; and the
 * failing node's share of the second must vanish. After each, the gateway must hold nothing. Exit status 1 when a
 * bar is missed.
 */
import { loadavg } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { Random } from "../../runtime/random.ts";
import { MODEL } from "./fixed-answers.ts";
import { ChatClient, OpenLoop, type Tally } from "./load.ts";
import { medianOf, printRows, type Row } from "./report.ts";
import { GATEWAY_KEY, lettersOf, type Running, restOf, Stack } from "./stack.ts";

const NAMES = ["gpu-1", "gpu-2", "gpu-3"] as const;
/** Places of one node; three of them at 60 % hold 43 requests. */
const INFLIGHT_MAX = 24;
/** Enough that the retry budget's floor of 2/s stays below its share: 0.1 + 2/120 = 0.117. */
const PER_SECOND = 120;
/** In flight at 60 %. */
const OPEN_WANTED = 43;
/** Mean length of an answer, to begin with: 0.36 s on a quiet machine. */
const OUTPUT_TOKENS = 36;

/** Far more than come: a bench that hangs must not fill the memory. */
const OPEN_MAX = 2000;

const CALM_MS = 3000;
const DOWN_MS = 4000;
const RECOVERY_MS_MAX = 60_000;
const FAILING_MS = 10_000;
const REACTION_MS = 3000;
const REST_MS_MAX = 10_000;
const HOLD_UPS = 15;
const HOLD_UP_MS = 300;

const failing = { failRate: 1, status: 503, delayMs: 5 };

const stack = new Stack();
const random = new Random("failover");
const rows: Row[] = [];
const nodes = new Map<string, Running>();
let questions = 0;
let outputTokens = OUTPUT_TOKENS;

function arrival() {
  const content = `Question ${++questions}: what is a headrace?`;
  return {
    body: {
      model: MODEL,
      messages: [{ role: "user", content }],
      stream: random.next() < 0.5,
      headrace_output_tokens: Math.max(1, Math.round(outputTokens * (0.75 + 0.5 * random.next()))),
    },
  };
}

function startNode(name: string, port = 0): Promise<Running> {
  return stack.node(name, ["--model", MODEL], port);
}

function nodeOf(name: string): Running {
  const node = nodes.get(name);
  if (node === undefined) throw new Error(`there is no node ${name}`);
  return node;
}

/** Attempts that each node has seen. */
async function attempts(): Promise<number[]> {
  const seen = NAMES.map((name) => stack.metric(nodeOf(name).port, "headrace_node_requests_total"));
  return Promise.all(seen);
}

/** Its circuit is closed and its slow start over. */
async function untilWhole(gateway: Running, name: string): Promise<void> {
  await stack.until(`${name} to take its full share`, RECOVERY_MS_MAX, async () => {
    const node = (await stack.state(gateway)).nodes.find(({ snapshot }) => snapshot.node === name);
    return node !== undefined && node.snapshot.circuit === "closed" && node.snapshot.ramp > 0.99;
  });
}

async function killInTurn(gateway: Running): Promise<string> {
  const recoveries: string[] = [];
  for (const name of NAMES) {
    await sleep(CALM_MS);
    const node = nodeOf(name);
    await stack.kill(node);
    await sleep(DOWN_MS);
    nodes.set(name, await startNode(name, node.port));
    const startedAtMs = performance.now();
    await untilWhole(gateway, name);
    recoveries.push(`${((performance.now() - startedAtMs) / 1000).toFixed(0)} s`);
  }
  return `after its restart a node had its full share within ${recoveries.join(", ")}`;
}

async function failFast(gateway: Running): Promise<string> {
  const name = NAMES[1];
  await sleep(CALM_MS);
  await stack.call(nodeOf(name).port, "POST", "/fault", failing);
  await sleep(REACTION_MS);
  const before = await attempts();
  await sleep(FAILING_MS - REACTION_MS);
  const seen = (await attempts()).map((count, index) => count - (before[index] ?? 0));
  const all = seen.reduce((sum, count) => sum + count, 0);
  const its = seen[NAMES.indexOf(name)] ?? Number.NaN;
  rows.push({
    name: "share",
    question: "2. share of the failing node in all attempts, once 3 s have passed",
    figure: `${((100 * its) / all).toFixed(2)} %`,
    value: its / all,
    bar: { atMost: 0.01 },
    detail: `${its} of ${all} attempts in ${(FAILING_MS - REACTION_MS) / 1000} s`,
  });
  await stack.call(nodeOf(name).port, "DELETE", "/fault");
  await untilWhole(gateway, name);
  return "";
}

/** Runs `act` under load; then the load ends, and the gateway must come to rest. */
async function phase(gateway: Running, name: string, act: () => Promise<string>): Promise<Tally> {
  const client = new ChatClient(gateway.port, GATEWAY_KEY);
  const load = new OpenLoop(client, random, { perSecond: PER_SECOND, openMax: OPEN_MAX }, arrival);
  const open: number[] = [];
  const watch = setInterval(() => open.push(load.open), 100);
  const note = await act().finally(async () => {
    clearInterval(watch);
    await load.stop();
    client.close();
  });
  const held = await restOf(stack, gateway, REST_MS_MAX);
  const heldTexts = Object.entries(held).map(([what, count]) => `${what} ${count}`);
  const { sent, complete, failed, brokenOnceBegun, problems } = load.tally;
  console.log(
    `${name}: ${sent} requests, ${complete} complete, ${failed} failed, ` +
      `${brokenOnceBegun} broken after their first token; open: ${medianOf(open)} in the median, ` +
      `${Math.max(...open)} at most; ${note}`,
  );
  for (const [problem, count] of problems) console.log(`    ${count} × ${problem}`);
  const number = name.slice(0, 2);
  rows.push({
    name: "rest",
    question: `${number} held afterwards: requests, leases, queue, reservations, flights`,
    figure: String(heldTexts.length === 0 ? 0 : heldTexts.join(", ")),
    value: heldTexts.length,
    bar: { atMost: 0 },
    detail: `dead letters since the start: ${lettersOf(await stack.state(gateway))}`,
  });
  return load.tally;
}

function pushFailed(number: string, { failed, sent, brokenOnceBegun }: Tally): void {
  rows.push({
    name: "failed",
    question: `${number} requests that failed before their stream had begun`,
    figure: String(failed),
    value: failed,
    bar: { atMost: 0 },
    detail: `of ${sent}; ${brokenOnceBegun} streams broke after their first token`,
  });
}

async function run(): Promise<void> {
  for (const name of NAMES) nodes.set(name, await startNode(name));
  const gateway = await stack.gateway({
    nodes: NAMES.map((name) => ({
      name,
      url: `http://127.0.0.1:${nodeOf(name).port}`,
      inflightMax: INFLIGHT_MAX,
    })),
    router: { slowStartMs: 5000 }, // A minute by default: too long for a bench.
    queue: { perKeyMax: 1000 }, // One key stands for all clients here.
  });
  await calibrate(gateway);
  pushFailed("1.", await phase(gateway, "1. each node killed in turn", () => killInTurn(gateway)));
  pushFailed("2.", await phase(gateway, "2. one node fails fast", () => failFast(gateway)));

  pushFailed("3.", await phase(gateway, "3. the gateway is held up", () => holdUp(gateway)));

  for (const name of NAMES) await stack.call(nodeOf(name).port, "POST", "/fault", failing);
  const before = await attempts();
  const tally = await phase(gateway, "4. all nodes fail", async () => {
    await sleep(FAILING_MS);
    return "";
  });
  const seen = (await attempts()).reduce(
    (sum, count, index) => sum + count - (before[index] ?? 0),
    0,
  );
  rows.push({
    name: "amplification",
    question: "4. attempts that the nodes saw ÷ requests of clients",
    figure: `${(seen / tally.sent).toFixed(3)} ×`,
    value: seen / tally.sent,
    bar: { atMost: 1.12 },
    detail: `${seen} attempts, ${tally.sent} requests at ${PER_SECOND}/s`,
  });
  rows.push({
    name: "unanswered",
    question: "4. requests that got no answer, not even an error",
    figure: String(tally.unanswered),
    value: tally.unanswered,
    bar: { atMost: 0 },
    detail: "",
  });
  for (const name of NAMES) await stack.call(nodeOf(name).port, "DELETE", "/fault");
  await untilServed(gateway);
}

/** How long a token takes depends on the machine: answers are made so long that the load is what it is meant to be. */
async function calibrate(gateway: Running): Promise<void> {
  const client = new ChatClient(gateway.port, GATEWAY_KEY);
  const load = new OpenLoop(client, random, { perSecond: PER_SECOND, openMax: OPEN_MAX }, arrival);
  const open: number[] = [];
  await sleep(CALM_MS / 2);
  const watch = setInterval(() => open.push(load.open), 20);
  await sleep(CALM_MS);
  clearInterval(watch);
  await load.stop();
  client.close();
  outputTokens = Math.max(8, (outputTokens * OPEN_WANTED) / Math.max(1, medianOf(open)));
  console.log(
    `answers of ${outputTokens.toFixed(0)} tokens in the mean, at ${PER_SECOND} requests/s; ` +
      `load average ${(loadavg()[0] ?? 0).toFixed(1)} (on a machine busy with other work the bars may be missed)`,
  );
}

/** As a long garbage collection or a neighbour on the same cores does it. */
async function holdUp(gateway: Running): Promise<string> {
  for (let i = 0; i < HOLD_UPS; i++) {
    await sleep(HOLD_UP_MS);
    gateway.process.kill("SIGSTOP");
    await sleep(HOLD_UP_MS);
    gateway.process.kill("SIGCONT");
  }
  return `${HOLD_UPS} times for ${HOLD_UP_MS} ms`;
}

/** The pool is well again: how long until a client notices. */
async function untilServed(gateway: Running): Promise<void> {
  const client = new ChatClient(gateway.port, GATEWAY_KEY);
  const startedAtMs = performance.now();
  await stack.until("a request to succeed again", RECOVERY_MS_MAX, async () => {
    return (await client.chat(arrival().body)).end === "complete";
  });
  console.log(
    `healed: the first request succeeded after ${((performance.now() - startedAtMs) / 1000).toFixed(1)} s`,
  );
  client.close();
}

try {
  await run();
} finally {
  await stack.endAll();
}
console.log("");
const passed = printRows(rows);
console.log(passed ? "\nPASS" : "\nFAIL");
process.exitCode = passed ? 0 : 1;
