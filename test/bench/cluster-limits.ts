/**
 * `npm run cluster-limits [-- --seconds 60]`: one key with 100 requests/s over four peers, asked for at 400/s, 100 through each:
 *
 *   1. without Redis: one peer keeps the key, the others ask it
 *   2. with Redis: one script there decides (left out, with a line, where there is no redis-server)
 *   3. without Redis, two peers cut off from the other two for the middle third
 *
 * Admitted must be at most what actors/cluster-limiter.ts states, R·t + b + c·(R·3 s + 3·b/2) with c changes of owner, and not
 * much less than the limit, which is there to be used. Exit status 1 when a bar is missed.
 */

import type { AddressInfo } from "node:net";
import { createServer } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { Random } from "../../runtime/random.ts";
import type { ClusterDescription } from "../../transport/cluster.ts";
import { redisAvailable, startRedis } from "../redis-server.ts";
import { MODEL } from "./fixed-answers.ts";
import { ChatClient, OpenLoop } from "./load.ts";
import { PeerRelay } from "./peer-relay.ts";
import { printRows, type Row } from "./report.ts";
import { GATEWAY_KEY, type Running, Stack } from "./stack.ts";

const PEERS = ["peer-1", "peer-2", "peer-3", "peer-4"];
const LIMIT_PER_SECOND = 100;
const BURST = 100;
const OFFERED_PER_SECOND = 400;
const WARM_KEY = "bench-key-0002";
const WARM_MS = 4000;
const SETTLE_SECONDS = 3;
const START_MS_MAX = 20_000;
/** Of what the limit lets pass: a limit that is not used up is none. */
const USED_MIN = 0.9;
/** Two sides of equal size keep to a half each, and one of them may have come to its keys lately. */
const USED_CUT_MIN = 0.7;

const secondsAt = process.argv.indexOf("--seconds");
const SECONDS = secondsAt < 0 ? 60 : Number(process.argv[secondsAt + 1]);
if (!(SECONDS >= 6 && SECONDS <= 3600)) throw new Error("--seconds takes a number from 6 to 3600");

const rows: Row[] = [];
const random = new Random("cluster-limits");
let questions = 0;

function arrival() {
  const content = `Question ${++questions}: what is a headrace?`;
  return { body: { model: MODEL, messages: [{ role: "user", content }] } };
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function scenario(
  name: string,
  changes: number,
  usedMin: number,
  { redisUrl, cut }: { redisUrl?: string; cut?: boolean } = {},
): Promise<void> {
  const stack = new Stack();
  const relay = new PeerRelay(PEERS);
  try {
    const node = await stack.script("fixed-node", ["1"]);
    const peers: Running[] = [];
    const relays: number[] = [];
    for (const id of PEERS) {
      const port = await freePort();
      const relayed = await relay.open(id, port);
      const limits = { requestsPerMinute: 60 * LIMIT_PER_SECOND, requestBurst: BURST };
      const peer = await stack.gateway({
        nodes: [{ name: "gpu-1", url: `http://127.0.0.1:${node.port}` }],
        keys: [
          { key: GATEWAY_KEY, tenant: "bench", limits },
          { key: WARM_KEY, tenant: "bench", limits },
        ],
        cache: redisUrl === undefined ? {} : { redis: { url: redisUrl } },
        cluster: {
          id,
          listen: { port },
          advertise: `127.0.0.1:${relayed}`,
          seeds: relays.map((other) => `ws://127.0.0.1:${other}`),
          keys: [{ id: "a", secret: "bench-secret-000001" }],
        },
      });
      relays.push(relayed);
      peers.push(peer);
    }
    await stack.until("four peers to agree", START_MS_MAX, async () => {
      const views = await Promise.all(
        peers.map(async ({ port }): Promise<ClusterDescription> => {
          return JSON.parse(await stack.call(port, "GET", "/admin/cluster"));
        }),
      );
      return views.every(
        ({ members }) => members.filter(({ state }) => state === "alive").length === 4,
      );
    });
    // A process that has just started answers late at first: that is not what is measured.
    await drive(peers, WARM_KEY, () => sleep(WARM_MS));
    const startedAtMs = performance.now();
    const thirds: number[] = [];
    const loads = await drive(peers, GATEWAY_KEY, async (admitted) => {
      for (const third of [0, 1, 2]) {
        if (cut === true && third === 1) relay.cut((from, to) => isLeft(from) !== isLeft(to));
        if (cut === true && third === 2) relay.cut(() => false);
        await sleep((1000 * SECONDS) / 3);
        thirds.push(admitted());
      }
    });
    const seconds = (performance.now() - startedAtMs) / 1000;
    const admitted = sumOf(loads, "complete");
    const late = await lateAnswers(stack, peers);
    const bound =
      LIMIT_PER_SECOND * seconds +
      BURST +
      changes * (LIMIT_PER_SECOND * SETTLE_SECONDS + 1.5 * BURST);
    const problems = new Map<string, number>();
    for (const { tally } of loads)
      for (const [problem, count] of tally.problems)
        problems.set(problem, (problems.get(problem) ?? 0) + count);
    const sent = sumOf(loads, "sent");
    const told = [...problems].map(([problem, count]) => `${count} × ${problem}`).join(", ");
    const parts = thirds.map((count, index) => count - (thirds[index - 1] ?? 0));
    rows.push(
      {
        name: "admitted",
        question: `${name}: admitted ÷ the bound with ${changes} changes of owner`,
        figure: (admitted / bound).toFixed(3),
        value: admitted / bound,
        bar: { atMost: 1 },
        detail:
          `${admitted} of ${sent} in ${seconds.toFixed(1)} s, bound ${bound.toFixed(0)}; ` +
          `by thirds ${parts.join(", ")}; ` +
          `${told}; answers that came late, since the start: ${late}`,
      },
      {
        name: "used",
        question: `${name}: admitted ÷ (limit × time)`,
        figure: (admitted / (LIMIT_PER_SECOND * seconds)).toFixed(3),
        value: admitted / (LIMIT_PER_SECOND * seconds),
        bar: { atLeast: usedMin },
        detail: "",
      },
    );
  } finally {
    await stack.endAll();
    relay.close();
  }
}

/** A load at the whole rate through all peers for as long as `during` takes, and what came of it. */
async function drive(
  peers: readonly Running[],
  key: string,
  during: (admitted: () => number) => Promise<unknown>,
): Promise<OpenLoop[]> {
  const clients = peers.map(({ port }) => new ChatClient(port, key));
  const rate = { perSecond: OFFERED_PER_SECOND / peers.length, openMax: 2000 };
  const loads = clients.map((client) => new OpenLoop(client, random, rate, arrival));
  await during(() => sumOf(loads, "complete"));
  await Promise.all(loads.map((load) => load.stop()));
  for (const client of clients) client.close();
  return loads;
}

function sumOf(loads: readonly OpenLoop[], what: "sent" | "complete"): number {
  return loads.reduce((sum, { tally }) => sum + tally[what], 0);
}

/** Of the store, and of the peer that keeps a key: each lets a peer go by its share, or its own count, for a moment. */
async function lateAnswers(stack: Stack, peers: readonly Running[]): Promise<string> {
  let [store, owner] = [0, 0];
  for (const { port } of peers) {
    const { limits }: ClusterDescription = JSON.parse(
      await stack.call(port, "GET", "/admin/cluster"),
    );
    store += limits?.storeFailures ?? 0;
    owner += limits?.ownerFailures ?? 0;
  }
  return `${store} of the store, ${owner} of the owner`;
}

/** Two of the four. */
function isLeft(peer: string): boolean {
  return PEERS.indexOf(peer) < 2;
}

await scenario("1. without Redis", 0, USED_MIN);
if (redisAvailable) {
  const redis = await startRedis();
  try {
    await scenario("2. with Redis", 0, USED_MIN, { redisUrl: redis.url });
  } finally {
    await redis.stop();
  }
}
await scenario("3. cut in two", 2, USED_CUT_MIN, { cut: true });
const passed = printRows(rows);
console.log(passed ? "\nPASS" : "\nFAIL");
process.exitCode = passed ? 0 : 1;
