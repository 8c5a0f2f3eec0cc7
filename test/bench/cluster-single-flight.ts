/**
 * `npm run cluster-single-flight`: many clients ask the same at the same time through four peers. One generation serves
 * all of them, whichever peer they ask, however they want it delivered; what it made is a hit at every peer, and the
 * node is rid of it when the clients of all peers have left. Exit status 1 when a bar is missed.
 */
import type { ClusterDescription } from "../../transport/cluster.ts";
import { MODEL } from "./fixed-answers.ts";
import { body, countRow, leavingRows, problemsOf } from "./identical-requests.ts";
import { ChatClient, type ChatOutcome } from "./load.ts";
import { printRows, type Row } from "./report.ts";
import { GATEWAY_KEY, type Running, restOf, Stack } from "./stack.ts";

const PEERS = 4;
const CLIENTS = 500;
/** Each is owned and led by another peer, as it comes. */
const QUESTIONS = 6;
const LEAVERS = 48;
const REST_MS_MAX = 15_000;
const SETTLE_MS_MAX = 20_000;

const stack = new Stack();
const rows: Row[] = [];

function count(...row: Parameters<typeof countRow>): void {
  rows.push(countRow(...row));
}

async function startPeers(url: string): Promise<Running[]> {
  const peers: Running[] = [];
  const keys = [{ id: "bench", secret: "a-secret-of-the-benchmark" }];
  const clusterOf = async (peer: Running): Promise<ClusterDescription> =>
    JSON.parse(await stack.call(peer.port, "GET", "/admin/cluster"));
  for (let number = 1; number <= PEERS; number++) {
    const [first] = peers;
    const members = first === undefined ? [] : (await clusterOf(first)).members;
    const seeds = members.filter(({ isSelf }) => isSelf).map(({ address }) => address);
    const cluster = { id: `peer-${number}`, listen: { port: 0 }, seeds, keys };
    peers.push(await stack.gateway({ nodes: [{ name: "gpu-1", url }], cluster }));
  }
  await stack.until("the peers to know each other", SETTLE_MS_MAX, async () => {
    const views = await Promise.all(peers.map(clusterOf));
    const alive = views.map(({ members }) => members.filter(({ state }) => state === "alive"));
    const isWhole = alive.every((members) => members.length === PEERS);
    return isWhole && new Set(views.map(({ epoch }) => epoch)).size === 1;
  });
  return peers;
}

async function run(): Promise<void> {
  const node = await stack.node("gpu-1", ["--model", MODEL]);
  const peers = await startPeers(`http://127.0.0.1:${node.port}`);
  const clients = peers.map(({ port }) => new ChatClient(port, GATEWAY_KEY));
  const upstream = () => stack.metric(node.port, "headrace_node_requests_total");
  const aborts = () => stack.metric(node.port, "headrace_node_aborts_total");
  const participants = async () => {
    const states = await Promise.all(peers.map((peer) => stack.state(peer)));
    return states.reduce((sum, { cache }) => sum + (cache?.participants ?? 0), 0);
  };
  const chat = (index: number, content: string, signal?: AbortSignal): Promise<ChatOutcome> => {
    const client = clients[index % PEERS];
    if (client === undefined) throw new Error(`there are ${PEERS} peers`);
    return client.chat(body(content, Math.floor(index / PEERS) % 2 === 0), signal);
  };
  // Every router has seen the node, and every client has connections.
  for (let index = 0; index < PEERS; index++) await chat(index, `Warm up ${index}.`);

  const before = await upstream();
  const all: ChatOutcome[] = [];
  let texts = 0;
  const tookMs: number[] = [];
  for (let question = 0; question < QUESTIONS; question++) {
    const startedAtMs = performance.now();
    const outcomes = await Promise.all(
      Array.from({ length: CLIENTS }, (_, index) =>
        chat(index + question, `The same for all, ${question}.`),
      ),
    );
    tookMs.push(performance.now() - startedAtMs);
    texts = Math.max(texts, new Set(outcomes.map(({ text }) => text)).size);
    all.push(...outcomes);
  }
  const made = (await upstream()) - before;
  const rounds = `${tookMs.map((ms) => ms.toFixed(0)).join(", ")} ms a round`;
  count(
    "calls",
    `generations for ${QUESTIONS} × ${CLIENTS} identical requests over ${PEERS} peers, half of them streams`,
    made,
    { atMost: QUESTIONS },
    rounds,
  );
  const complete = all.filter(({ end }) => end === "complete").length;
  count("complete", "answers that came whole", complete, { atLeast: all.length }, problemsOf(all));
  count("texts", "different texts for one question", texts, { atMost: 1 });

  const hits = await Promise.all(
    Array.from({ length: QUESTIONS * PEERS }, (_, index) =>
      chat(index, `The same for all, ${Math.floor(index / PEERS)}.`),
    ),
  );
  const repeated = (await upstream()) - before - made;
  count(
    "hits",
    "generations when every peer is asked again",
    repeated,
    { atMost: 0 },
    problemsOf(hits),
  );

  rows.push(
    ...(await leavingRows({
      who: `${LEAVERS} clients of all peers`,
      clients: LEAVERS,
      send: (round, signal) =>
        Array.from({ length: LEAVERS }, (_, index) =>
          chat(index + round, `All leave, ${round}.`, signal),
        ),
      together: () =>
        stack.until(
          "all to share one flight",
          5000,
          async () => (await participants()) === LEAVERS,
        ),
      aborts,
    })),
  );

  let held = 0;
  const heldTexts: string[] = [];
  for (const peer of peers) {
    const left = Object.entries(await restOf(stack, peer, REST_MS_MAX));
    held += left.length;
    heldTexts.push(...left.map(([what, number]) => `${what} ${number}`));
    const { cluster } = await stack.state(peer);
    held += (cluster?.relays.reading ?? 1) + (cluster?.relays.serving ?? 1);
  }
  count(
    "rest",
    "held afterwards at any peer: requests, leases, queue, reservations, flights, relays",
    held,
    { atMost: 0 },
    heldTexts.join(", "),
  );
  for (const client of clients) client.close();
}

try {
  await run();
} finally {
  await stack.endAll();
}
const passed = printRows(rows);
console.log(passed ? "\nPASS" : "\nFAIL");
process.exitCode = passed ? 0 : 1;
