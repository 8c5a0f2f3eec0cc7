/**
 * One cache over real peers: gateways with links over loopback, in this process and (where one is killed) as processes
 * of their own. Nodes run in the test, and tell what reached them.
 */

import { setMaxListeners } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, it } from "vitest";
import type { ClusterDescription } from "../transport/cluster.ts";
import { readOptions } from "../transport/config.ts";
import type { Log } from "../transport/log.ts";
import type { StateSnapshot } from "../transport/metrics.ts";
import type { OptionsInput } from "../transport/options.ts";
import { Server } from "../transport/server.ts";
import { HeadraceProcess, isBuilt, killAll } from "./headrace-process.ts";
import { type LiveNodes, MODEL, startNodes, until } from "./live-world.ts";

const IDS = ["a", "b", "c"];
const ADMIN_TOKEN = "test-admin-token-0001";
const folder = mkdtempSync(join(tmpdir(), "headrace-flights-"));

function quiet(): Log {
  const nothing = () => {};
  return { debug: nothing, info: nothing, warn: nothing, error: nothing, setLevel: nothing };
}

type Got = { status: number; cache: string | null; text: string; failed: boolean };

/** Sends one request; an answer that breaks off is `failed`. */
async function ask(
  port: number,
  content: string,
  fields: object = {},
  signal?: AbortSignal,
): Promise<Got> {
  let status = 0;
  let cache: string | null = null;
  let text = "";
  try {
    const response = await fetch(`http://127.0.0.1:${port}/v1/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: MODEL, messages: [{ role: "user", content }], ...fields }),
      ...(signal === undefined ? {} : { signal }),
    });
    status = response.status;
    cache = response.headers.get("x-headrace-cache");
    for await (const chunk of response.body ?? []) text += Buffer.from(chunk).toString();
    const breaksOff = cache !== null && text.startsWith("data:") && !text.includes("[DONE]");
    return { status, cache, text, failed: breaksOff };
  } catch {
    return { status, cache, text, failed: true };
  }
}

/** What was said, from either form. */
function wordsOf({ text }: Got): string {
  if (!text.startsWith("data:")) return JSON.parse(text).choices[0].message.content;
  return text
    .split("\n")
    .filter((line) => line.startsWith("data: {"))
    .map((line) => JSON.parse(line.slice(6)).choices[0]?.delta?.content ?? "")
    .join("");
}

function whatIsLeft(states: readonly StateSnapshot[]): Record<string, number> {
  const sum = (of: (state: StateSnapshot) => number) =>
    states.reduce((total, state) => total + of(state), 0);
  return {
    requests: sum(({ requests }) => requests?.open ?? 1),
    flights: sum(({ cache }) => cache?.flights ?? 1),
    participants: sum(({ cache }) => cache?.participants ?? 1),
    reservations: sum(({ limiter }) => limiter?.reservations ?? 1),
    leases: sum(({ nodes }) => nodes.reduce((count, { leases }) => count + leases.length, 0)),
    relays: sum(({ cluster }) => (cluster?.relays.reading ?? 1) + (cluster?.relays.serving ?? 1)),
  };
}

/** Nothing is open at any of them. */
async function idle(live: LiveNodes, states: () => Promise<StateSnapshot[]>): Promise<void> {
  let left: Record<string, number> = {};
  await until("nothing is open", async () => {
    left = whatIsLeft(await states());
    left.onNodes = live.nodes.reduce((sum, node) => sum + node.stats().open, 0);
    return Object.values(left).every((count) => count === 0);
  }).catch(() => expect(left).toEqual({}));
}

function calls(live: LiveNodes): number {
  return live.nodes.reduce((sum, node) => sum + node.stats().requests, 0);
}

function haveSettled(views: readonly (ClusterDescription | undefined)[], ids: readonly string[]) {
  return views.every((view) => {
    const alive = view?.members.filter(({ state }) => state === "alive").map(({ id }) => id) ?? [];
    const linked = view?.members.filter(({ isLinked, isSelf }) => isLinked || isSelf) ?? [];
    const isPlaced = view?.nodes.every(({ peer }) => peer !== undefined && ids.includes(peer));
    return alive.sort().join() === ids.join() && linked.length >= ids.length && isPlaced;
  });
}

/** Gateways in this process. */
class Cluster {
  readonly live: LiveNodes;
  readonly servers: Server[] = [];

  private constructor(live: LiveNodes) {
    this.live = live;
  }

  static async start(more: Partial<OptionsInput> = {}): Promise<Cluster> {
    const cluster = new Cluster(await startNodes(2));
    open.push(cluster);
    for (const id of IDS) {
      const first = cluster.servers[0]?.gateway.peerAddress;
      const options = readOptions({
        listen: { host: "127.0.0.1", port: 0 },
        nodes: cluster.live.urls.map((url, index) => ({ url, name: `node-${index}` })),
        timeouts: { drainMs: 0 },
        cluster: { id, listen: { port: 0 }, seeds: first === undefined ? [] : [first] },
        ...more,
      });
      cluster.servers.push(await Server.start(options, quiet(), fatal));
    }
    await until("the peers know each other", async () =>
      haveSettled(await Promise.all(cluster.servers.map(({ gateway }) => gateway.cluster())), IDS),
    );
    // By then every router knows every node.
    for (const { port } of cluster.servers) await ask(port, `warm up ${port}`, { max_tokens: 1 });
    await cluster.idle();
    return cluster;
  }

  states(): Promise<StateSnapshot[]> {
    return Promise.all(this.servers.map(({ gateway }) => gateway.state()));
  }

  participants(): Promise<number> {
    return this.states().then((states) => whatIsLeft(states).participants ?? 0);
  }

  idle(): Promise<void> {
    return idle(this.live, () => this.states());
  }

  async close(): Promise<void> {
    await Promise.all(this.servers.map((server) => server.stop()));
    await this.live.close();
  }
}

function fatal(error: unknown): void {
  throw error;
}

const open: Cluster[] = [];
afterEach(async () => {
  await Promise.all(open.splice(0).map((cluster) => cluster.close()));
  await killAll();
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describe("three peers share one cache", () => {
  it("60 equal requests, streams and whole, make one upstream call and get the same answer", async () => {
    const cluster = await Cluster.start();
    const { live, servers } = cluster;
    // Slow enough that all are there before the end; each question has another owner, most likely.
    for (const question of ["one", "two", "three", "four", "five"]) {
      const before = calls(live);
      for (const node of live.nodes) node.setFault({ stallAfterTokens: 5 });
      const asked = Array.from({ length: 60 }, (_, index) =>
        ask(servers[index % 3]?.port ?? 0, question, {
          stream: index % 2 === 0,
          max_tokens: 40,
          headrace_output_tokens: 20,
        }),
      );
      await until("all take part", async () => (await cluster.participants()) === 60);
      for (const node of live.nodes) node.setFault({});
      const got = await Promise.all(asked);
      expect(got.filter(({ status, failed }) => status !== 200 || failed)).toEqual([]);
      expect(calls(live) - before).toBe(1);
      expect(new Set(got.map(wordsOf)).size).toBe(1);
      expect(wordsOf(got[0] ?? fail()).length).toBeGreaterThan(20);
      const streams = got.filter(({ text }) => text.startsWith("data:"));
      expect(streams).toHaveLength(30);
      expect(new Set(streams.map(({ text }) => text)).size).toBe(1);
      await cluster.idle();
    }
  });

  it("what is stored through one is a hit through every other; purged through one it is gone at all", async () => {
    const { servers, live } = await Cluster.start();
    const ports = servers.map(({ port }) => port);
    const fields = { max_tokens: 40, headrace_output_tokens: 5 };
    for (const [index, port] of ports.entries()) {
      await ask(port, `question ${index}`, fields);
      for (const other of ports)
        expect((await ask(other, `question ${index}`, fields)).cache).toBe("hit-exact");
    }
    expect(await servers[1]?.gateway.purge("local")).toBeGreaterThanOrEqual(3);
    const before = calls(live);
    for (const [index, port] of ports.entries())
      expect((await ask(port, `question ${index}`, fields)).cache).toBe("miss");
    expect(calls(live) - before).toBe(3);
  });

  it("matching by meaning: learnt through one, matched through every other, seen and found wrong through any", async () => {
    const { servers, live } = await Cluster.start({
      cache: {
        semantic: {
          mode: "fixed",
          judgeRatio: 0,
          matchMs: 5000,
          embedder: { type: "lexical", timeoutMs: 5000 },
        },
      },
    });
    await until("the embedders are healthy", async () => {
      const states = await Promise.all(servers.map(({ gateway }) => gateway.state()));
      return states.every(({ embedder }) => embedder?.state === "healthy");
    });
    const fields = { max_tokens: 40, headrace_output_tokens: 5 };
    // Each system prompt is a scope of its own: some belong to every peer.
    const scopes = Array.from({ length: 6 }, (_, number) => `You are assistant ${number}.`);
    const asked = (port: number, system: string, question: string) =>
      ask(port, question, {
        ...fields,
        messages: [
          { role: "system", content: system },
          { role: "user", content: question },
        ],
      });
    for (const [index, system] of scopes.entries()) {
      const port = servers[index % 3]?.port ?? 0;
      await asked(port, system, "How do I reset the password of my account?");
    }
    const before = calls(live);
    for (const system of scopes) {
      for (const { port } of servers) {
        const { cache } = await asked(port, system, "How can I reset the password of my account?");
        expect(cache).toMatch(/^hit-semantic/);
      }
    }
    expect(calls(live)).toBe(before);
    for (const { gateway } of servers)
      expect((await gateway.inspect("local", 100)).entries).toHaveLength(scopes.length);
    const [entry] = (await servers[0]?.gateway.inspect("local", 1))?.entries ?? [];
    const known = await servers[1]?.gateway.feedback(entry?.entryId ?? "", "local", false);
    expect(known).toBe(true);
    expect((await servers[2]?.gateway.inspect("local", 100))?.entries).toHaveLength(
      scopes.length - 1,
    );
  });

  it("the node is rid of it when the clients of all peers have left, not before", async () => {
    const cluster = await Cluster.start();
    const { live, servers } = cluster;
    for (const node of live.nodes) node.setFault({ stallAfterTokens: 3 });
    const running = () => live.nodes.reduce((sum, node) => sum + node.stats().open, 0);
    const controllers = servers.map(() => new AbortController());
    for (const { signal } of controllers) setMaxListeners(20, signal);
    const asked = servers.flatMap(({ port }, index) =>
      Array.from({ length: 4 }, (_, number) =>
        ask(port, "nobody waits", { stream: number % 2 === 0 }, controllers[index]?.signal),
      ),
    );
    await until("all take part", async () => (await cluster.participants()) === 12);
    for (const [index, controller] of controllers.entries()) {
      expect(running()).toBe(1);
      controller.abort();
      const left = 12 - 4 * (index + 1);
      await until("they have left", async () => (await cluster.participants()) === left);
    }
    await Promise.all(asked);
    await cluster.idle();
  });
});

function fail(): never {
  throw new Error("nothing was got");
}

// ---- peers that are killed --------------------------------------------------------------------------------------

type Peer = { id: string; process: HeadraceProcess; port: number };

async function startPeer(id: string, live: LiveNodes, seeds: readonly string[]): Promise<Peer> {
  const file = join(folder, `${id}.json`);
  const nodes = live.urls.map((url, index) => ({ url, name: `node-${index}` }));
  const admin = { token: ADMIN_TOKEN };
  const cluster = { id, listen: { port: 0 }, seeds };
  writeFileSync(file, JSON.stringify({ listen: { port: 0 }, nodes, admin, cluster }));
  const process = new HeadraceProcess(["serve", "--config", file]);
  return { id, process, port: await process.listening() };
}

async function admin<T>({ port }: Peer, what: string): Promise<T> {
  const headers = { authorization: `Bearer ${ADMIN_TOKEN}` };
  return (await (await fetch(`http://127.0.0.1:${port}/admin/${what}`, { headers })).json()) as T;
}

describe.runIf(isBuilt())("a peer is killed", () => {
  it.each([
    ["before the first token", { hang: true }],
    ["in the middle of the stream", { stallAfterTokens: 5 }],
  ] as const)(
    "%s: at the others every request is answered once, or breaks off visibly, and nothing stays open",
    async (when, fault) => {
      const live = await startNodes(2);
      try {
        const peers: Peer[] = [];
        for (const id of IDS)
          peers.push(
            await startPeer(id, live, [peers[0]?.process.peerAddress ?? ""].filter(Boolean)),
          );
        const views = (of: readonly Peer[]) =>
          Promise.all(of.map((peer) => admin<ClusterDescription>(peer, "cluster")));
        const states = (of: readonly Peer[]) =>
          Promise.all(of.map((peer) => admin<StateSnapshot>(peer, "state")));
        await until("they know each other", async () => haveSettled(await views(peers), IDS));
        for (const { port } of peers) await ask(port, `warm up ${port}`, { max_tokens: 1 });
        // Several questions, so that the one that is killed leads, owns, and joins.
        for (const node of live.nodes) node.setFault(fault);
        const before = calls(live);
        const asked: { peer: Peer; stream: boolean; got: Promise<Got> }[] = [];
        const questions = 9;
        for (let question = 0; question < questions; question++) {
          for (let index = 0; index < 12; index++) {
            const peer = peers[(index + question) % 3] as Peer;
            const stream = index % 2 === 0;
            const fields = { stream, max_tokens: 40, headrace_output_tokens: 20 };
            asked.push({ peer, stream, got: ask(peer.port, `question ${question}`, fields) });
            // The first one leads: each peer leads three.
            if (index === 0)
              await until("it runs", async () => calls(live) - before === question + 1);
          }
        }
        await until("all take part", async () => {
          const left = whatIsLeft(await states(peers));
          return left.participants === asked.length && calls(live) - before === questions;
        });
        const [victim] = peers as [Peer, Peer, Peer];
        const rest = peers.slice(1);
        victim.process.child.kill("SIGKILL");
        await victim.process.exit;
        const ids = rest.map(({ id }) => id);
        await until("the others have settled", async () => haveSettled(await views(rest), ids));
        for (const node of live.nodes) node.setFault({});
        const rested = asked.filter(({ peer }) => peer !== victim);
        const got = await Promise.all(
          rested.map(async ({ got, stream }) => ({ ...(await got), stream })),
        );
        // Only a stream whose first bytes were out may break, and says so.
        const broken = got.filter(({ failed }) => failed);
        for (const { stream, text } of broken) {
          expect(when).toBe("in the middle of the stream");
          expect(stream).toBe(true);
          expect(text).toContain('"error"');
        }
        for (const one of got.filter(({ failed }) => !failed)) {
          expect(one.status).toBe(200);
          expect(wordsOf(one).length).toBeGreaterThan(20);
        }
        await idle(live, () => states(rest));
      } finally {
        await killAll();
        await live.close();
      }
    },
  );
});
