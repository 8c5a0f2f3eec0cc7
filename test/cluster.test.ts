/**
 * Several `headrace serve` processes as one gateway: they find each other, share nodes and limits, survive the end of one,
 * leave in order, and refuse who does not belong. Nodes run in the test; every wait is for what must come.
 */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type Server } from "node:http";
import { type AddressInfo, createServer as createTcpServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { ClusterDescription } from "../transport/cluster.ts";
import type { StateSnapshot } from "../transport/metrics.ts";
import { HeadraceProcess, isBuilt, killAll } from "./headrace-process.ts";
import { type LiveNodes, MODEL, startNodes } from "./live-world.ts";

const ADMIN_TOKEN = "test-admin-token-0001";
const SECRET = { id: "first", secret: "secret-of-the-cluster" };
const KEYS = { acme: "key-of-acme", burst: "key-of-burst", few: "key-of-few" };
const BURST = 12;
const FEW = 5;
const NODES = 3;
const PATIENCE_MS = 25_000;

const folder = mkdtempSync(join(tmpdir(), "headrace-cluster-"));

let live: LiveNodes;
/** In front of the nodes' metrics: who has looked at which node. */
let watcher: Server;
let watcherPort = 0;
const looks = new Map<string, number>();

beforeAll(async () => {
  live = await startNodes(NODES);
  // "/PEER/NUMBER" stands for the metrics of that node, as that peer is configured.
  watcher = createServer((request, response) => {
    const [, peer = "", number = ""] = (request.url ?? "").split("/");
    const name = `${peer} ${number}`;
    looks.set(name, (looks.get(name) ?? 0) + 1);
    void fetch(`${live.urls[Number(number)]}/metrics`)
      .then((metrics) => metrics.text())
      .then((text) => response.end(text));
  });
  await new Promise<void>((resolve) => watcher.listen(0, "127.0.0.1", resolve));
  watcherPort = (watcher.address() as AddressInfo).port;
});
afterAll(async () => {
  await killAll();
  watcher.closeAllConnections();
  watcher.close();
  await live.close();
  rmSync(folder, { recursive: true, force: true });
});

type Peer = { id: string; process: HeadraceProcess; port: number };

function config(id: string, cluster: object, more: object = {}): string {
  const file = join(folder, `${id}.json`);
  const nodes = live.urls.map((url, index) => ({
    url,
    name: `node-${index}`,
    metricsUrl: `http://127.0.0.1:${watcherPort}/${id}/${index}`,
  }));
  const tenant = "acme";
  const whole = {
    listen: { port: 0 },
    nodes,
    admin: { token: ADMIN_TOKEN },
    keys: [
      { key: KEYS.acme, tenant, name: "acme" },
      {
        key: KEYS.burst,
        tenant,
        name: "burst",
        limits: { requestsPerMinute: 1, requestBurst: BURST },
      },
      { key: KEYS.few, tenant, name: "few", limits: { concurrent: FEW } },
    ],
    cluster: { id, listen: { port: 0 }, keys: [SECRET], ...cluster },
    ...more,
  };
  writeFileSync(file, JSON.stringify(whole));
  return file;
}

function begin(id: string, cluster: object, flags: readonly string[] = []): HeadraceProcess {
  return new HeadraceProcess(["serve", "--config", config(id, cluster), ...flags]);
}

async function startPeer(id: string, cluster: object): Promise<Peer> {
  const process = begin(id, cluster);
  return { id, process, port: await process.listening() };
}

async function admin<T>({ port }: { port: number }, what: string): Promise<T> {
  const response = await fetch(`http://127.0.0.1:${port}/admin/${what}`, {
    headers: { authorization: `Bearer ${ADMIN_TOKEN}` },
  });
  return (await response.json()) as T;
}

async function until(
  what: string,
  isSo: () => Promise<boolean>,
  found: () => string = () => "",
): Promise<void> {
  const untilMs = performance.now() + PATIENCE_MS;
  while (!(await isSo().catch(() => false))) {
    if (performance.now() > untilMs) throw new Error(`waited in vain until ${what}; ${found()}`);
    await delay(5);
  }
}

/** All of these see all of these as alive, agree on the epoch, and know who looks after every node. */
async function settled(peers: readonly Peer[]): Promise<Map<string, string>> {
  const ids = peers.map(({ id }) => id).sort();
  let owners = new Map<string, string>();
  let texts: string[] = [];
  const agree = async () => {
    const views = await Promise.all(
      peers.map((peer) => admin<ClusterDescription>(peer, "cluster")),
    );
    texts = views.map(({ epoch, members, nodes }) => {
      const alive = members.filter(({ state }) => state === "alive").map(({ id }) => id);
      return JSON.stringify({ epoch, alive, nodes });
    });
    const [first] = views;
    if (first === undefined || new Set(texts).size !== 1) return false;
    owners = new Map(first.nodes.map(({ node, peer }) => [node, peer ?? ""]));
    const alive = first.members.filter(({ state }) => state === "alive").map(({ id }) => id);
    return alive.join() === ids.join() && [...owners.values()].every((id) => ids.includes(id));
  };
  await until(`${ids.join(", ")} agree`, agree, () => texts.join("\n"));
  return owners;
}

let questions = 0;

async function chat(
  { port }: { port: number },
  { key = KEYS.acme, ...fields }: { key?: string; [field: string]: unknown } = {},
) {
  const content = `question ${++questions}`;
  const response = await fetch(`http://127.0.0.1:${port}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${key}` },
    body: JSON.stringify({ model: MODEL, messages: [{ role: "user", content }], ...fields }),
  });
  const { status, headers } = response;
  return { status, node: headers.get("x-headrace-node"), text: response.text() };
}

function counts(statuses: readonly number[]): Record<number, number> {
  const by: Record<number, number> = {};
  for (const status of statuses) by[status] = (by[status] ?? 0) + 1;
  return by;
}

/** One after another through all peers, until `isOver`; the statuses that are not 200. */
async function load(peers: readonly Peer[], isOver: () => boolean): Promise<number[]> {
  const bad: number[] = [];
  let sent = 0;
  const client = async (peer: Peer): Promise<void> => {
    while (!isOver()) {
      const { status, text } = await chat(peer, { max_tokens: 4 });
      await text;
      sent++;
      if (status !== 200) bad.push(status);
    }
  };
  await Promise.all(peers.flatMap((peer) => [client(peer), client(peer)]));
  expect(sent).toBeGreaterThan(0);
  return bad;
}

describe.runIf(isBuilt())("three peers", () => {
  let peers: Peer[] = [];
  const all = () => peers;
  const seeds = () => [peers[0]?.process.peerAddress ?? ""];
  const peerOf = (id: string): Peer => {
    const peer = peers.find((one) => one.id === id);
    if (peer === undefined) throw new Error(`no peer ${id}`);
    return peer;
  };

  beforeAll(async () => {
    peers = [await startPeer("a", {})];
    peers.push(...(await Promise.all(["b", "c"].map((id) => startPeer(id, { seeds: seeds() })))));
    await settled(peers);
  });
  afterAll(killAll);

  it("each node is looked after, and its engine scraped, by one of them alone", async () => {
    const owners = await settled(all());
    const states = await Promise.all(all().map((peer) => admin<StateSnapshot>(peer, "state")));
    for (const [node, owner] of owners) {
      const at = all().filter((_, index) =>
        states[index]?.system.cells.some(({ path }) => path.endsWith(`/nodes/${node}`)),
      );
      expect(at.map(({ id }) => id)).toEqual([owner]);
    }
    // From here on only owners look, however often.
    const before = new Map(looks);
    const grown = (peer: string, node: number) =>
      (looks.get(`${peer} ${node}`) ?? 0) - (before.get(`${peer} ${node}`) ?? 0);
    const numbers = Array.from({ length: NODES }, (_, number) => number);
    await until("every engine was scraped twice", async () =>
      numbers.every((number) => grown(owners.get(`node-${number}`) ?? "", number) >= 2),
    );
    for (const { id } of all())
      for (const number of numbers)
        if (owners.get(`node-${number}`) !== id) expect(grown(id, number)).toBe(0);
  });

  it("a request through any of them reaches any node", async () => {
    for (const peer of all()) {
      const reached = new Set<string | null>();
      await until(`all nodes are reached through ${peer.id}`, async () => {
        const { status, node, text } = await chat(peer, { max_tokens: 2 });
        await text;
        expect(status).toBe(200);
        reached.add(node);
        return reached.size === NODES;
      });
    }
  });

  it("each of them tells of all nodes, and is ready when one of them is", async () => {
    const names = Array.from({ length: NODES }, (_, number) => `node-${number}`);
    for (const peer of all()) {
      const { nodes } = await admin<StateSnapshot>(peer, "nodes");
      expect(nodes.map(({ snapshot }) => snapshot.node)).toEqual(names);
      expect((await fetch(`http://127.0.0.1:${peer.port}/ready`)).status).toBe(200);
    }
  });

  it("a limit on requests in flight holds over all of them, exactly", async () => {
    for (const node of live.nodes) node.setFault({ stallAfterTokens: 1 });
    const replies = await Promise.all(
      Array.from({ length: 18 }, (_, index) =>
        chat(all()[index % 3] as Peer, { key: KEYS.few, stream: true }),
      ),
    );
    expect(counts(replies.map(({ status }) => status))).toEqual({ 200: FEW, 429: 18 - FEW });
    for (const node of live.nodes) node.setFault({});
    await Promise.all(replies.map(({ text }) => text));
    // All places are given back, wherever they were kept.
    await until("a place is free again", async () => {
      const { status, text } = await chat(all()[1] as Peer, { key: KEYS.few, max_tokens: 1 });
      await text;
      return status === 200;
    });
  });

  it("so does a limit on requests a minute: whoever has just come to keep a key starts from half a burst", async () => {
    const replies = await Promise.all(
      Array.from({ length: 30 }, (_, index) =>
        chat(all()[index % 3] as Peer, { key: KEYS.burst, max_tokens: 1 }),
      ),
    );
    await Promise.all(replies.map(({ text }) => text));
    const admitted = BURST / 2;
    expect(counts(replies.map(({ status }) => status))).toEqual({
      200: admitted,
      429: 30 - admitted,
    });
  });

  it("the command shows members and nodes as a table; without a token it says what it needs", async () => {
    const { port } = peerOf("b");
    const url = `http://127.0.0.1:${port}`;
    const shown = new HeadraceProcess(["cluster", "--url", url, "--token", ADMIN_TOKEN]);
    expect(await shown.exit).toBe(0);
    expect(shown.out).toContain("3 peers at epoch");
    expect(shown.out).toMatch(/^b \* +alive +ws:\/\/127\.0\.0\.1:\d+/m);
    expect(shown.out).toMatch(/^c +alive +.* up +/m);
    for (const node of ["node-0", "node-1", "node-2"]) expect(shown.out).toContain(node);
    const refused = new HeadraceProcess(["cluster", "--url", url]);
    expect(await refused.exit).toBe(1);
    expect(refused.err).toContain("needs the peer's admin.token");
    const metrics = await (await fetch(`${url}/metrics`)).text();
    expect(metrics).toContain('headrace_cluster_members{state="alive"} 3');
    expect(metrics).toMatch(/headrace_peer_link_up\{peer="c"\} 1/);
  });

  it("one is killed under load: nobody else's request fails, and another looks after its nodes", async () => {
    const owners = await settled(all());
    const victim = peerOf(owners.get("node-0") ?? "");
    const rest = all().filter((peer) => peer !== victim);
    let isOver = false;
    const loading = load(rest, () => isOver);
    victim.process.child.kill("SIGKILL");
    await victim.process.exit;
    const after = await settled(rest);
    expect(after.get("node-0")).not.toBe(victim.id);
    // Started again it gets back what it had.
    const seeds = rest.map(({ process }) => process.peerAddress);
    peers = [...rest, await startPeer(victim.id, { seeds })];
    expect(await settled(peers)).toEqual(owners);
    isOver = true;
    expect(await loading).toEqual([]);
  });

  it("told to stop, one hands over first, ends what it has begun, and is gone in order", async () => {
    const leaver = all()[2] as Peer;
    const rest = all().filter((peer) => peer !== leaver);
    let isOver = false;
    const loading = load(rest, () => isOver);
    for (const node of live.nodes) node.setFault({ stallAfterTokens: 3 });
    const open = await chat(leaver, { stream: true });
    expect(open.status).toBe(200);
    leaver.process.child.kill("SIGTERM");
    await settled(rest); // While its stream is still open.
    for (const node of live.nodes) node.setFault({});
    expect(await open.text).toContain("[DONE]");
    expect(await leaver.process.exit).toBe(0);
    const { members } = await admin<ClusterDescription>(rest[0] as Peer, "cluster");
    expect(members.find(({ id }) => id === leaver.id)?.state).toBe("left");
    expect(leaver.process.log().map(({ msg }) => msg)).toContain("stopped");
    isOver = true;
    expect(await loading).toEqual([]);
    peers = rest;
  });

  it("one that does not know the secret is refused, and both say why", async () => {
    const stranger = begin("stranger", {
      seeds: seeds(),
      keys: [{ ...SECRET, secret: "another-secret-altogether" }],
    });
    expect(await stranger.logged("peer.refused")).toMatchObject({ reason: "secret" });
    const line = await (all()[0] as Peer).process.logged("peer.refused");
    expect(line).toMatchObject({ isDialled: false });
    const { members } = await admin<ClusterDescription>(all()[0] as Peer, "cluster");
    expect(members.map(({ id }) => id)).not.toContain("stranger");
    for (const text of [stranger.err, (all()[0] as Peer).process.err])
      expect(text).not.toMatch(/secret-of-the-cluster|another-secret/);
    stranger.child.kill("SIGKILL");
    await stranger.exit;
  });

  it("one that comes with the id of another ends, and says so", async () => {
    const first = all()[0] as Peer;
    const twin = begin(first.id, { seeds: seeds() });
    expect(await twin.exit).toBe(1);
    expect(twin.err).toContain(`has this one's id ${first.id}`);
    await settled(all());
  });
});

describe.runIf(isBuilt())("workers", () => {
  afterEach(killAll);

  it("share one port as peers of one another; one that is killed comes back; all end together", async () => {
    const process = begin("w", {}, ["--workers", "2"]);
    const port = await process.listening();
    const alive = async (): Promise<string[]> => {
      const { members } = await admin<ClusterDescription>({ port }, "cluster");
      return members.filter(({ state }) => state === "alive").map(({ id }) => id);
    };
    await until("two workers know each other", async () => (await alive()).join() === "w-1,w-2");
    for (let i = 0; i < 6; i++) {
      const { status, text } = await chat({ port }, { max_tokens: 1 });
      await text;
      expect(status).toBe(200);
    }
    const { pid } = await process.logged("a worker listens");
    globalThis.process.kill(Number(pid), "SIGKILL");
    await process.logged("a worker ended: it is started again");
    await process.logged("a worker listens", 3);
    await until("both are there again", async () => (await alive()).join() === "w-1,w-2");
    process.child.kill("SIGTERM");
    expect(await process.exit).toBe(0);
  });
});

describe.runIf(isBuilt())("what cannot be", () => {
  afterEach(killAll);

  it.each([
    [["--workers", "0"], "It must be a whole number from 1 to 64"],
    [["--peer", "http://127.0.0.1:1"], "is not ws://host:port"],
    [["--peer", "dns://peers"], "has no port from 1 to 65535"],
    [["--peer-listen", "nonsense"], '"nonsense" is not a number'],
    [["--peer-listen", "0.0.0.0:7000", "--set", "cluster.keys=[]"], "can be reached from outside"],
    [["--peer-id", "a/b"], '"a/b" is not a valid id'],
    [["--set", 'cluster.keys=[{"id":"k","secret":"short"}]'], "has fewer than 16 characters"],
    [["--set", "cluster.tls.cert=nowhere.pem", "--set", "cluster.tls.key=k"], "cannot be read"],
  ])("%j: is refused with the reason", async (flags, reason) => {
    const process = begin("x", {}, flags);
    expect([1, 2]).toContain(await process.exit);
    expect(process.err).toContain(reason);
    expect(process.err).not.toContain(SECRET.secret);
  });

  it("a port for peers that is taken: it says which", async () => {
    const taken = createTcpServer();
    await new Promise<void>((resolve) => taken.listen(0, "127.0.0.1", resolve));
    const { port } = taken.address() as AddressInfo;
    const process = begin("x", { listen: { port } });
    expect(await process.exit).toBe(1);
    expect(process.err).toContain(`cluster.listen 127.0.0.1:${port} is taken`);
    taken.close();
  });
});
