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
        keys: [{ key: GATEWAY_KEY, tenant: "bench", limits }],
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
    const clients = peers.map(({ port }) => new ChatClient(port, GATEWAY_KEY));
    const rate = { perSecond: OFFERED_PER_SECOND / PEERS.length, openMax: 2000 };
    const startedAtMs = performance.now();
    const loads = clients.map((client) => new OpenLoop(client, random, rate, arrival));
    const admitted = () => loads.reduce((sum, { tally }) => sum + tally.complete, 0);
    const thirds: number[] = [];
    for (const third of [0, 1, 2]) {
      if (cut === true && third === 1) relay.cut((from, to) => isLeft(from) !== isLeft(to));
      if (cut === true && third === 2) relay.cut(() => false);
      await sleep((1000 * SECONDS) / 3);
      thirds.push(admitted());
    }
    const seconds = (performance.now() - startedAtMs) / 1000;
    await Promise.all(loads.map((load) => load.stop()));
    for (const client of clients) client.close();
    const bound =
      LIMIT_PER_SECOND * seconds +
      BURST +
      changes * (LIMIT_PER_SECOND * SETTLE_SECONDS + 1.5 * BURST);
    const problems = new Map<string, number>();
    for (const { tally } of loads)
      for (const [problem, count] of tally.problems)
        problems.set(problem, (problems.get(problem) ?? 0) + count);
    const sent = loads.reduce((sum, { tally }) => sum + tally.sent, 0);
    const told = [...problems].map(([problem, count]) => `${count} × ${problem}`).join(", ");
    const parts = thirds.map((count, index) => count - (thirds[index - 1] ?? 0));
    rows.push(
      {
        name: "admitted",
        question: `${name}: admitted ÷ the bound with ${changes} changes of owner`,
        figure: (admitted() / bound).toFixed(3),
        value: admitted() / bound,
        bar: { atMost: 1 },
        detail:
          `${admitted()} of ${sent} in ${seconds.toFixed(1)} s, bound ${bound.toFixed(0)}; ` +
          `by thirds ${parts.join(", ")}; ${told}`,
      },
      {
        name: "used",
        question: `${name}: admitted ÷ (limit × time)`,
        figure: (admitted() / (LIMIT_PER_SECOND * seconds)).toFixed(3),
        value: admitted() / (LIMIT_PER_SECOND * seconds),
        bar: { atLeast: usedMin },
        detail: "",
      },
    );
  } finally {
    await stack.endAll();
    relay.close();
  }
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
