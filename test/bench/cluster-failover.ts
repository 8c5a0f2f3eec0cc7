/**
 * `npm run cluster-failover`: three peers and three stand-in nodes at 60 % of their places, the load spread over the peers, half
 * of the requests streamed. The peer that looks after most nodes is killed without a word, and started again 6 s later.
 *
 * No request through the other two may fail; within 3 s all nodes must be looked after again. What its own clients lose is
 * told, and not held against it: their connections are gone. A table says what happened in each second. Exit status 1
 * when a bar is missed.
 */
import { setTimeout as sleep } from "node:timers/promises";
import { Random } from "../../runtime/random.ts";
import type { ClusterDescription } from "../../transport/cluster.ts";
import { MODEL } from "./fixed-answers.ts";
import { ChatClient, OpenLoop, type Tally } from "./load.ts";
import { medianOf, printRows, type Row } from "./report.ts";
import { GATEWAY_KEY, type Running, restOf, Stack } from "./stack.ts";

const NODES = ["gpu-1", "gpu-2", "gpu-3"] as const;
const PEERS = ["peer-1", "peer-2", "peer-3"] as const;
type PeerName = (typeof PEERS)[number];
/** Places of one node; three of them at 60 % hold 43 requests. */
const INFLIGHT_MAX = 24;
const OPEN_WANTED = 43;
/** Through each peer. */
const PER_SECOND = 40;
const OPEN_MAX = 2000;
const CALM_MS = 3000;
const DOWN_MS = 6000;
const AFTER_MS = 5000;
const SETTLED_MS_MAX = 3000;
const START_MS_MAX = 20_000;
const REST_MS_MAX = 10_000;

const stack = new Stack();
const random = new Random("cluster-failover");
const rows: Row[] = [];
const peers = new Map<PeerName, Running>();
const nodePorts = new Map<string, number>();
const notes: { atMs: number; text: string }[] = [];
let questions = 0;
let outputTokens = 36;

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

function peerOf(name: PeerName): Running {
  const peer = peers.get(name);
  if (peer === undefined) throw new Error(`there is no ${name}`);
  return peer;
}

async function startPeer(id: PeerName): Promise<void> {
  const seeds = [...peers.values()].flatMap(({ peerAddress }) => peerAddress ?? []);
  const peer = await stack.gateway({
    nodes: NODES.map((name) => ({
      name,
      url: `http://127.0.0.1:${nodePorts.get(name)}`,
      inflightMax: INFLIGHT_MAX,
    })),
    router: { slowStartMs: 5000 },
    queue: { perKeyMax: 1000 }, // One key stands for all clients here.
    cluster: { id, listen: { port: 0 }, seeds, keys: [{ id: "a", secret: "bench-secret-000001" }] },
  });
  peers.set(id, peer);
}

/** The same owners at all of these, each of them among these; undefined: not so. */
async function ownersAt(names: readonly PeerName[]): Promise<Map<string, string> | undefined> {
  const views = await Promise.all(
    names.map(async (name): Promise<ClusterDescription> => {
      return JSON.parse(await stack.call(peerOf(name).port, "GET", "/admin/cluster"));
    }),
  );
  const texts = views.map(({ epoch, nodes, members }) => {
    const alive = members.filter(({ state }) => state === "alive").map(({ id }) => id);
    return JSON.stringify([epoch, alive, nodes]);
  });
  const [first] = views;
  if (first === undefined || new Set(texts).size !== 1) return undefined;
  const alive = first.members.filter(({ state }) => state === "alive").map(({ id }) => id);
  const owners = new Map(first.nodes.map(({ node, peer }) => [node, peer ?? ""]));
  const isSettled =
    alive.join() === [...names].sort().join() &&
    [...owners.values()].every((peer) => names.some((name) => name === peer));
  return isSettled ? owners : undefined;
}

async function settled(names: readonly PeerName[]): Promise<Map<string, string>> {
  let owners: Map<string, string> | undefined;
  await stack.until(`${names.join(", ")} to agree`, START_MS_MAX, async () => {
    owners = await ownersAt(names);
    return owners !== undefined;
  });
  return owners ?? new Map();
}

function ownersText(owners: Map<string, string>): string {
  return [...owners].map(([node, peer]) => `${node}→${peer}`).join(" ");
}

class Load {
  readonly name: PeerName;
  readonly #client: ChatClient;
  readonly #loop: OpenLoop;

  constructor(name: PeerName) {
    this.name = name;
    this.#client = new ChatClient(peerOf(name).port, GATEWAY_KEY);
    const rate = { perSecond: PER_SECOND, openMax: OPEN_MAX };
    this.#loop = new OpenLoop(this.#client, random, rate, arrival);
  }

  get tally(): Tally {
    return this.#loop.tally;
  }

  get open(): number {
    return this.#loop.open;
  }

  async stop(): Promise<void> {
    await this.#loop.stop();
    this.#client.close();
  }
}

/** Answers are made so long that the load is what it is meant to be on this machine. */
async function calibrate(): Promise<void> {
  const loads = PEERS.map((name) => new Load(name));
  const open: number[] = [];
  await sleep(CALM_MS / 2);
  const watch = setInterval(() => open.push(loads.reduce((sum, load) => sum + load.open, 0)), 20);
  await sleep(CALM_MS);
  clearInterval(watch);
  await Promise.all(loads.map((load) => load.stop()));
  outputTokens = Math.max(8, (outputTokens * OPEN_WANTED) / Math.max(1, medianOf(open)));
  console.log(
    `answers of ${outputTokens.toFixed(0)} tokens in the mean, ${PEERS.length} × ${PER_SECOND} requests/s`,
  );
}

type Second = { sent: number; complete: number; failed: number; broken: number; open: number };

function totalOf(loads: readonly Load[]): Second {
  const total = { sent: 0, complete: 0, failed: 0, broken: 0, open: 0 };
  for (const { tally, open } of loads) {
    total.sent += tally.sent;
    total.complete += tally.complete;
    total.failed += tally.failed;
    total.broken += tally.brokenOnceBegun;
    total.open += open;
  }
  return total;
}

async function run(): Promise<void> {
  for (const name of NODES) nodePorts.set(name, (await stack.node(name, ["--model", MODEL])).port);
  for (const name of PEERS) await startPeer(name);
  let owners = await settled(PEERS);
  await calibrate();

  const owned = (name: PeerName) => [...owners.values()].filter((peer) => peer === name).length;
  const victim = [...PEERS].sort((a, b) => owned(b) - owned(a))[0] ?? PEERS[0];
  const rest = PEERS.filter((name) => name !== victim);
  const others = rest.map((name) => new Load(name));
  const own = [new Load(victim)];
  const seconds: Second[] = [];
  const ownSeconds: Second[] = [];
  const startedAtMs = performance.now();
  const note = (text: string) => notes.push({ atMs: performance.now() - startedAtMs, text });
  note(`settled: ${ownersText(owners)}`);
  const watch = setInterval(() => {
    seconds.push(totalOf(others));
    ownSeconds.push(totalOf(own));
  }, 1000);

  await sleep(CALM_MS);
  const killedAtMs = performance.now();
  await stack.kill(peerOf(victim));
  note(`${victim} killed (it looked after ${owned(victim)} nodes)`);
  const stopping = own[0]?.stop();
  owners = await settled(rest);
  const settledMs = performance.now() - killedAtMs;
  note(`settled: ${ownersText(owners)}`);
  peers.delete(victim);
  await stopping;
  await sleep(Math.max(0, DOWN_MS - (performance.now() - killedAtMs)));
  note(`${victim} started again`);
  await startPeer(victim);
  owners = await settled(PEERS);
  note(`settled: ${ownersText(owners)}`);
  own.push(new Load(victim));
  await sleep(AFTER_MS);
  clearInterval(watch);
  const all = [...others, ...own.slice(1)];
  await Promise.all(all.map((load) => load.stop()));

  print(seconds, ownSeconds);
  const sum = totalOf(all);
  const lost = totalOf(own.slice(0, 1));
  rows.push(
    {
      name: "failed",
      question: "requests through the other peers, and the new one, that failed",
      figure: String(sum.failed + sum.broken),
      value: sum.failed + sum.broken,
      bar: { atMost: 0 },
      detail: `of ${sum.sent}; on the dead one's own connections ${lost.failed + lost.broken} were lost`,
    },
    {
      name: "settled",
      question: "from the kill until all nodes were looked after by agreement",
      figure: `${(settledMs / 1000).toFixed(2)} s`,
      value: settledMs,
      bar: { atMost: SETTLED_MS_MAX },
      detail: "",
    },
  );
  for (const { tally } of all)
    for (const [problem, count] of tally.problems) console.log(`    ${count} × ${problem}`);
  for (const name of PEERS) {
    const held = await restOf(stack, peerOf(name), REST_MS_MAX);
    const texts = Object.entries(held).map(([what, count]) => `${what} ${count}`);
    rows.push({
      name: "rest",
      question: `held by ${name} afterwards`,
      figure: String(texts.length === 0 ? 0 : texts.join(", ")),
      value: texts.length,
      bar: { atMost: 0 },
      detail: "",
    });
  }
}

function print(seconds: readonly Second[], ownSeconds: readonly Second[]): void {
  console.log("\nsecond    sent  complete  failed  open   its own: sent  lost   what happened");
  for (const [index, now] of seconds.entries()) {
    const before = seconds[index - 1];
    const [ownNow, ownBefore] = [ownSeconds[index], ownSeconds[index - 1]];
    const since = (of: keyof Second) => now[of] - (before?.[of] ?? 0);
    const ownSince = (of: keyof Second) => (ownNow?.[of] ?? 0) - (ownBefore?.[of] ?? 0);
    const said = notes.filter(({ atMs }) => Math.floor(atMs / 1000) === index);
    const cells = [
      String(index + 1).padStart(6),
      String(since("sent")).padStart(8),
      String(since("complete")).padStart(10),
      String(since("failed") + since("broken")).padStart(8),
      String(now.open).padStart(6),
      String(ownSince("sent")).padStart(16),
      String(ownSince("failed") + ownSince("broken")).padStart(6),
    ];
    const texts = said.map(({ atMs, text }) => `${(atMs / 1000).toFixed(2)} s ${text}`);
    console.log(`${cells.join("")}   ${texts.join("; ")}`.trimEnd());
  }
  console.log("");
}

try {
  await run();
} finally {
  await stack.endAll();
}
const passed = printRows(rows);
console.log(passed ? "\nPASS" : "\nFAIL");
process.exitCode = passed ? 0 : 1;
