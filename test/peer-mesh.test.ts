/** Peers over real sockets, in this process and in others: who is let in, bad bytes, and peers that stop or die. */
import { randomBytes } from "node:crypto";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { afterAll, afterEach, describe, expect, it } from "vitest";
import { WebSocket } from "ws";
import type { Envelope } from "../runtime/system.ts";
import { Handshake, type HandshakeOptions } from "../transport/peer-handshake.ts";
import type { PeerEvent } from "../transport/peer-links.ts";
import { encodeFrame, type Frame } from "../transport/wire.ts";
import { makeCertificates, opensslAvailable } from "./bench/certificates.ts";
import { BenchPeer, type PeerConfig } from "./bench/remote-system.ts";
import { isPeerBuilt, killAllPeers, makeNamespaces, PeerProcess, until } from "./peer-process.ts";

const SECRET = "a secret that all peers of the test share";
/** Everything about six times as fast. */
const quick = { heartbeatMs: 50, silenceMs: 500, stallMs: 600, sessionMs: 1500 };
const isBuilt = isPeerBuilt();

type Told = { peer: BenchPeer; events: PeerEvent[]; address: string };
const open: BenchPeer[] = [];

async function start(more: Partial<PeerConfig> = {}): Promise<Told> {
  const events: PeerEvent[] = [];
  const config = { id: "a", incarnation: 1, secret: SECRET, link: quick, ...more };
  const peer = new BenchPeer(config, (event) => {
    if (event.kind !== "peer.heartbeat") events.push(event);
  });
  open.push(peer);
  const port = await peer.mesh.listen("127.0.0.1", 0);
  const scheme = more.tls === undefined ? "ws" : "wss";
  return { peer, events, address: `${scheme}://127.0.0.1:${port}` };
}

async function pair(
  ofA: Partial<PeerConfig> = {},
  ofB: Partial<PeerConfig> = {},
): Promise<{ a: Told; b: Told }> {
  const a = await start({ id: "a", ...ofA });
  const b = await start({ id: "b", ...ofB });
  a.peer.mesh.dial(b.address);
  await until("both are up", () => a.peer.mesh.isUp("b") && b.peer.mesh.isUp("a"));
  return { a, b };
}

function kinds({ events }: { events: readonly PeerEvent[] }): string[] {
  return events.map(({ kind }) => kind);
}

function refusals({ events }: { events: readonly PeerEvent[] }): string[] {
  return events.flatMap((event) => (event.kind === "peer.refused" ? [event.reason] : []));
}

afterEach(async () => {
  await Promise.all(open.splice(0).map((peer) => peer.close(false)));
  await killAllPeers();
});

/** A client whose every byte is the test's own; with the secret it can prove itself. */
class Stranger {
  readonly ws: WebSocket;
  readonly heard: Buffer[] = [];
  closed: number | undefined;

  constructor(address: string) {
    this.ws = new WebSocket(`${address}/peer`, { perMessageDeflate: false });
    this.ws.on("message", (data) => void this.heard.push(data as Buffer));
    this.ws.on("close", (code) => {
      this.closed = code;
    });
    this.ws.on("error", () => {});
  }

  async opened(): Promise<this> {
    await until("the stranger is connected", () => this.ws.readyState === WebSocket.OPEN);
    return this;
  }

  async gone(): Promise<void> {
    await until("the stranger is thrown out", () => this.closed !== undefined);
  }

  /** Becomes a peer like any other; what it says then is up to the test. */
  async authenticate(id: string): Promise<void> {
    const options: HandshakeOptions = {
      cluster: "bench",
      self: { node: id, incarnation: 1 },
      settings: "none",
      keys: [{ id: "k1", secret: new TextEncoder().encode(SECRET) }],
      randomBytes,
    };
    const handshake = new Handshake("client", options, "", () => ({ previous: "", received: -1 }));
    await this.opened();
    this.ws.send(handshake.hello());
    for (let step = 0; step < 2; step++) {
      await until("the other side answers", () => this.heard.length > 0);
      const { send, refused } = handshake.receive(this.heard.shift() ?? new Uint8Array());
      if (refused !== undefined) throw new Error(refused.detail);
      if (send !== undefined) this.ws.send(send);
    }
  }

  say(envelopes: readonly Envelope[], more: Partial<Frame> = {}): void {
    const frame = { ack: 0, seq: 1, isLeaving: false, envelopes, ...more };
    const bytes = encodeFrame(frame, "structures", performance.now());
    if (!("invalid" in bytes)) this.ws.send(bytes);
  }
}

function told(from: string, message: unknown): Envelope {
  const place = { to: "a/nodes/echo", uid: 0, from: `${from}/requests`, askId: 0, timeoutUs: 0 };
  return { kind: "message", ...place, message };
}

const progress = { kind: "gpu_node.progress", leaseId: "l", outputTokens: 1 };

describe("two peers in this process", () => {
  it("tell, ask and watch reach an actor of the other; a crash there is heard of", async () => {
    const { a, b } = await pair();
    await a.peer.ask("b", 200, 10);
    await b.peer.ask("a", 200, 10, "lease");
    expect([a.peer.outcomes, a.peer.failures, b.peer.outcomes, b.peer.failures]).toEqual([
      200,
      [],
      200,
      [],
    ]);
    a.peer.watch("b");
    a.peer.system.tell(a.peer.echo("b"), { kind: "gpu_node.drain" });
    await until("the message has come", () => b.peer.told.length === 1);
    b.peer.system.stop(b.peer.echo("b"));
    await until("its end is heard of", () => a.peer.ended.length === 1);
    expect(a.peer.ended).toMatchObject([{ path: "b/nodes/echo", reason: "stopped" }]);
  });

  it("an ask to nobody, and one to a peer that is not there, fail at once", async () => {
    const { a } = await pair();
    await a.peer.ask("c", 1, 1);
    a.peer.system.stop(a.peer.limiter("a"));
    expect(a.peer.failures).toEqual(["disconnected"]);
  });

  it("a connection that breaks: asks fail at once, each once; watches last, and tell later", async () => {
    const { a, b, cut } = await throughProxy();
    a.peer.watch("b");
    const waiting = a.peer.ask("b", 5, 5, "keep waiting");
    await until(
      "the questions have come",
      () => (b.peer.mesh.metrics().links[0]?.envelopesIn ?? 0) >= 6,
    );
    cut();
    await waiting;
    expect(a.peer.failures).toEqual(Array(5).fill("disconnected"));
    await until("it is up again", () => kinds(a).filter((kind) => kind === "peer.up").length === 2);
    expect(a.events.at(-1)).toMatchObject({ kind: "peer.up", isResumed: true });
    expect(a.peer.ended).toEqual([]);
    b.peer.system.stop(b.peer.echo("b"));
    await until("the end is heard of", () => a.peer.ended.length === 1);
    expect(a.peer.ended).toMatchObject([{ reason: "stopped" }]);
    expect(a.peer.outcomes).toBe(5);
  });

  it("one that leaves: asks and watches end, its last words have come, nobody accuses it", async () => {
    const { a, b } = await pair();
    a.peer.watch("b");
    await until("the watch has come", () => b.peer.mesh.metrics().links[0]?.envelopesIn === 1);
    for (let index = 0; index < 300; index++) {
      b.peer.system.tell(b.peer.echo("a"), {
        kind: "gpu_node.first_token",
        leaseId: "l",
        ttftMs: index,
      });
    }
    await b.peer.mesh.close(true);
    await until("it is lost", () => kinds(a).includes("peer.lost"));
    expect(a.peer.toldCount).toBe(300);
    expect(a.events.at(-1)).toMatchObject({ kind: "peer.lost", reason: "left" });
    expect(a.peer.ended).toMatchObject([{ reason: "noconnection" }]);
  });
});

/** b behind a TCP proxy of the test, which can cut what passes. */
async function throughProxy(): Promise<{ a: Told; b: Told; cut: () => void }> {
  const a = await start({ id: "a" });
  const b = await start({ id: "b" });
  const sockets = new Set<Socket>();
  const proxy = createServer((near) => {
    const far = connect(Number(new URL(b.address).port), "127.0.0.1");
    near.pipe(far).pipe(near);
    for (const socket of [near, far]) {
      sockets.add(socket);
      socket.on("error", () => socket.destroy());
      socket.on("close", () => {
        sockets.delete(socket);
        near.destroy();
        far.destroy();
      });
    }
  });
  await new Promise<void>((resolve) => proxy.listen(0, "127.0.0.1", resolve));
  cleanups.push(() => proxy.close());
  a.peer.mesh.dial(`ws://127.0.0.1:${(proxy.address() as AddressInfo).port}`);
  await until("both are up", () => a.peer.mesh.isUp("b") && b.peer.mesh.isUp("a"));
  const cut = () => {
    for (const socket of sockets) socket.destroy();
  };
  cleanups.push(cut);
  return { a, b, cut };
}

const cleanups: (() => void)[] = [];
afterAll(() => {
  for (const cleanup of cleanups) cleanup();
});

describe("who is let in", () => {
  it.each([
    ["another secret", { secret: "not the secret of the others" }, "secret"],
    ["another major version", { versions: { min: 7, max: 8 } }, "version"],
  ])("refused, both sides saying so: %s", async (_, more, reason) => {
    const a = await start();
    const b = await start({ id: "b", ...more });
    b.peer.mesh.dial(a.address);
    await until("both say so", () => refusals(a).length > 0 && refusals(b).length > 0);
    expect(new Set([...refusals(a), ...refusals(b)])).toEqual(new Set([reason]));
    expect(a.peer.mesh.isUp("b")).toBe(false);
  });

  it("a peer with another list of structures is understood, in maps", async () => {
    const { a } = await pair({}, { structures: "of another build" });
    await a.peer.ask("b", 50, 5);
    await a.peer.ask("b", 50, 5, "lease");
    expect(a.peer.failures).toEqual([]);
    expect(a.peer.mesh.metrics().links).toMatchObject([{ encoding: "maps" }]);
  });

  it("two peers with one id: the later is linked, the earlier is told", async () => {
    const hub = await start({ id: "hub" });
    const earlier = await start({ id: "twin", incarnation: 1 });
    earlier.peer.mesh.dial(hub.address);
    await until("the earlier is up", () => hub.peer.mesh.isUp("twin"));
    const later = await start({ id: "twin", incarnation: 2 });
    later.peer.mesh.dial(hub.address);
    await until("the earlier is refused", () => refusals(earlier).includes("stale"));
    expect(later.peer.mesh.isUp("hub")).toBe(true);
    later.peer.mesh.dial(earlier.address);
    await until("the two notice", () => refusals(later).includes("same_id"));
  });

  it("with mutual TLS: peers of one authority understand each other; a stranger does not get in", async () => {
    if (!opensslAvailable) return console.log("skipped: openssl is not installed");
    const ours = makeCertificates("a", "b");
    const theirs = makeCertificates("x");
    const [tlsA, tlsB, tlsX] = [ours.get("a"), ours.get("b"), theirs.get("x")];
    if (tlsA === undefined || tlsB === undefined || tlsX === undefined)
      throw new Error("no certificates");
    const { a } = await pair({ tls: tlsA }, { tls: tlsB });
    await a.peer.ask("b", 50, 5);
    expect(a.peer.failures).toEqual([]);
    // It knows the secret and trusts our authority; but its own certificate is of another.
    const x = await start({ id: "x", tls: { ...tlsX, ca: tlsA.ca ?? "" } });
    x.peer.mesh.dial(a.address);
    const bare = await start({ id: "y" });
    bare.peer.mesh.dial(a.address.replace("wss", "ws"));
    await until("they have tried", () =>
      [x, bare].every((each) => each.peer.mesh.metrics().dialsFailed > 2),
    );
    expect(kinds(a)).toEqual(["peer.up"]);
    expect(kinds(x)).toEqual([]);
  });

  it("options that make no sense are refused, saying what is accepted", () => {
    const make = (more: Partial<PeerConfig>) => () =>
      new BenchPeer({ id: "a", incarnation: 1, secret: SECRET, ...more }, () => {});
    expect(make({ secret: "short" })).toThrow(/"k1": .*at least 16 bytes/);
    expect(make({ id: "a/b" })).toThrow(/letters, digits/);
    expect(make({ id: "" })).toThrow(/1 to 63/);
    expect(make({ incarnation: -1 })).toThrow(/whole number/);
  });

  it.each(["http://x:1", "peer-b:7000", "ws://user:pw@x:1", "ws://x:1/path", "wss://x:1?q"])(
    "an address that is none is refused, without quoting a password: %s",
    async (address) => {
      const { peer } = await start();
      expect(() => peer.mesh.dial(address)).toThrow(/accepted is ws:\/\/host:port/);
      expect(() => peer.mesh.dial(address)).not.toThrow(/pw/);
    },
  );
});

describe("bad bytes before the peer is known", () => {
  it("a handshake recorded from another is worth nothing", async () => {
    const { a, b } = await pair();
    const said: Buffer[] = [];
    // What b's next handshake says, seen by a server that knows nothing.
    const spy = createServer((near) => {
      const far = connect(Number(new URL(a.address).port), "127.0.0.1");
      near.on("data", (data) => void said.push(data));
      near.pipe(far).pipe(near);
      for (const socket of [near, far]) socket.on("error", () => socket.destroy());
    });
    await new Promise<void>((resolve) => spy.listen(0, "127.0.0.1", resolve));
    cleanups.push(() => spy.close());
    const c = await start({ id: "c" });
    c.peer.mesh.dial(`ws://127.0.0.1:${(spy.address() as AddressInfo).port}`);
    await until("c is up", () => a.peer.mesh.isUp("c"));
    await c.peer.close(false);
    await until("c is down", () => !a.peer.mesh.isUp("c"));
    const ups = kinds(a).filter((kind) => kind === "peer.up").length;
    const replay = connect(Number(new URL(a.address).port), "127.0.0.1");
    replay.on("error", () => {});
    for (const data of said.slice(0, 3)) {
      replay.write(data);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    await until("it is refused", () => refusals(a).includes("secret"));
    replay.destroy();
    expect(kinds(a).filter((kind) => kind === "peer.up").length).toBe(ups);
    expect(b.peer.mesh.isUp("a")).toBe(true);
  });

  it.each([
    ["random bytes", () => randomBytes(300)],
    ["a text", () => "hello"],
    [
      "a frame with a message",
      () =>
        Buffer.from(
          encodeFrame(
            { ack: 0, seq: 1, isLeaving: false, envelopes: [told("b", progress)] },
            "structures",
            0,
          ) as Uint8Array,
        ),
    ],
    ["2 KiB", () => Buffer.alloc(2048, 0x81)],
    ["1 MiB", () => Buffer.alloc(1 << 20, 0x81)],
  ])("%s: thrown out, and nothing reaches an actor", async (_, bytes) => {
    const { a } = await pair({ failuresPerMinuteMax: 100 });
    const stranger = await new Stranger(a.address).opened();
    stranger.ws.send(bytes());
    await stranger.gone();
    expect(a.peer.toldCount).toBe(0);
    await a.peer.ask("b", 10, 2);
    expect(a.peer.failures).toEqual([]);
  });

  it("what is no WebSocket, or another path, is not answered as one", async () => {
    const a = await start();
    const port = Number(new URL(a.address).port);
    const answer = await fetch(`http://127.0.0.1:${port}/`);
    expect(answer.status).toBe(426);
    const elsewhere = new WebSocket(`${a.address}/other`);
    elsewhere.on("error", () => {});
    await until("it is closed", () => elsewhere.readyState === WebSocket.CLOSED);
    const garbage = connect(port, "127.0.0.1", () => garbage.end(randomBytes(5000)));
    garbage.on("error", () => {}).resume();
    await until("it is closed", () => garbage.destroyed);
    expect(kinds(a)).toEqual([]);
  });

  it("three false proofs within a minute, and the host is not answered any more", async () => {
    const a = await start();
    for (let round = 0; round < 3; round++) {
      const stranger = await new Stranger(a.address).opened();
      stranger.ws.send(randomBytes(50));
      await stranger.gone();
    }
    const fourth = new Stranger(a.address);
    await fourth.gone();
    expect(fourth.heard).toEqual([]);
    expect(a.peer.mesh.metrics().refusals).toMatchObject({ malformed: 3, too_many: 1 });
  });
});

describe("bad bytes of a peer that is known", () => {
  async function known(): Promise<{ a: Told; stranger: Stranger }> {
    const a = await start({
      link: { ...quick, silenceMs: 5000, frameBytesMax: 128 * 1024, batchBytes: 32 * 1024 },
    });
    const stranger = new Stranger(a.address);
    await stranger.authenticate("b");
    await until("it is up", () => a.peer.mesh.isUp("b"));
    return { a, stranger };
  }

  it.each([
    ["random bytes", (stranger: Stranger) => stranger.ws.send(randomBytes(300))],
    [
      "a truncated frame",
      (stranger: Stranger) => {
        const frame = { ack: 0, seq: 1, isLeaving: false, envelopes: [told("b", progress)] };
        stranger.ws.send(
          Buffer.from(encodeFrame(frame, "structures", 0) as Uint8Array).subarray(0, 40),
        );
      },
    ],
    [
      "a frame over the limit",
      (stranger: Stranger) => stranger.ws.send(Buffer.alloc(129 * 1024, 0x91)),
    ],
    [
      "an acknowledgement of what was not sent",
      (stranger: Stranger) => stranger.say([], { ack: 9 }),
    ],
    [
      "a gap in the numbers",
      (stranger: Stranger) =>
        stranger.say([{ kind: "watch", to: "a/nodes/echo", uid: 0, from: "b/x", watchId: 1 }], {
          seq: 5,
        }),
    ],
  ])("%s: its connection ends, the process goes on", async (_, send) => {
    const { a, stranger } = await known();
    send(stranger);
    await stranger.gone();
    await until("it is down", () => kinds(a).includes("peer.down"));
    expect(a.peer.toldCount).toBe(0);
    const b = await start({ id: "c" });
    b.peer.mesh.dial(a.address);
    await until("others come in", () => a.peer.mesh.isUp("c"));
  });

  it.each([
    ["of an unknown kind", { kind: "gpu_node.melt" }],
    ["of our own timers", { kind: "gpu_node.sweep_due" }],
    ["with a wrong field", { ...progress, outputTokens: "many" }],
    ["for another actor", { kind: "limiter.owner_restarted", owner: "b/requests" }],
  ])(
    "a good frame with a message %s: set aside and counted; the next is delivered",
    async (_, message) => {
      const { a, stranger } = await known();
      stranger.say([told("b", message), told("b", progress)]);
      await until("the good one has come", () => a.peer.toldCount === 1);
      expect(a.peer.told).toEqual([progress]);
      expect(kinds(a)).toContain("peer.rejected");
      expect(a.peer.mesh.isUp("b")).toBe(true);
      expect(a.peer.system.stats().restarts).toBe(0);
      const kind = (message as { kind: string }).kind;
      expect(a.peer.system.stats().deadLetters).toContainEqual({
        reason: "undecodable",
        messageKind: kind,
        count: 1,
      });
    },
  );

  it("a peer that does not read: what waits for it stays bounded, and it is given up", async () => {
    const { a, stranger } = await known();
    stranger.ws.pause();
    const heartbeat = { seq: 1, loopLagMs: 0, queueDepth: 0, epoch: 0 };
    const beats = setInterval(() => stranger.say([], { heartbeat }), 40); // It goes on speaking.
    cleanups.push(() => clearInterval(beats));
    let full = 0;
    let most = 0;
    for (let round = 0; round < 500 && a.peer.mesh.isUp("b"); round++) {
      for (let index = 0; index < 1000; index++) {
        const message = {
          kind: "gpu_node.first_token",
          leaseId: "x".repeat(200),
          ttftMs: index,
        } as const;
        if (!a.peer.system.tell(a.peer.echo("b"), message)) full++;
      }
      const [link] = a.peer.mesh.metrics().links;
      most = Math.max(most, link?.bufferedBytes ?? 0);
      expect(link?.outboxDepth ?? 0).toBeLessThanOrEqual(4096);
      await new Promise((resolve) => setImmediate(resolve));
    }
    expect(full).toBeGreaterThan(100_000);
    expect(most).toBeLessThan(1024 * 1024 + 64 * 1024 * 2);
    await until("it is given up", () => !a.peer.mesh.isUp("b"));
    clearInterval(beats);
    expect(a.events).toContainEqual(
      expect.objectContaining({ kind: "peer.down", reason: "stalled" }),
    );
  });
});

describe.skipIf(!isBuilt)("peers in processes of their own", () => {
  async function other(more: Partial<PeerConfig> = {}): Promise<{ a: Told; b: PeerProcess }> {
    const a = await start();
    const b = await PeerProcess.start({
      id: "b",
      incarnation: 1,
      secret: SECRET,
      link: quick,
      ...more,
    });
    a.peer.mesh.dial(`ws://127.0.0.1:${b.port}`);
    await until("it is up", () => a.peer.mesh.isUp("b"));
    return { a, b };
  }

  it("kill −9: asks fail at once, watches end once as noconnection; its next life is another", async () => {
    const { a, b } = await other();
    await a.peer.ask("b", 100, 10);
    a.peer.watch("b");
    const waiting = a.peer.ask("b", 3, 3, "keep waiting");
    await until("all has been sent", () => (a.peer.mesh.metrics().links[0]?.unacked ?? 1) === 0);
    b.child.kill("SIGKILL");
    await waiting;
    expect(a.peer.failures).toEqual(["disconnected", "disconnected", "disconnected"]);
    expect(a.peer.ended).toEqual([]); // It might still come back.
    const next = await PeerProcess.start({ id: "b", incarnation: 2, secret: SECRET, link: quick });
    a.peer.mesh.dial(`ws://127.0.0.1:${next.port}`);
    await until("the next life is up", () => a.peer.mesh.isUp("b"));
    expect(a.peer.ended).toMatchObject([{ path: "b/nodes/echo", reason: "noconnection" }]);
    await a.peer.ask("b", 50, 5);
    expect(a.peer.failures.length).toBe(3);
  });

  it("a frozen process is down when it has been silent; when it goes on, it is up again, in the same session", async () => {
    const { a, b } = await other({ link: { ...quick, sessionMs: 60_000 } });
    const patient = await start({ id: "c", link: { ...quick, sessionMs: 60_000 } });
    patient.peer.mesh.dial(`ws://127.0.0.1:${b.port}`);
    await until("both are up", () => patient.peer.mesh.isUp("b"));
    patient.peer.watch("b");
    await patient.peer.ask("b", 10, 2);
    b.child.kill("SIGSTOP");
    const waiting = patient.peer.ask("b", 2, 2, "keep waiting");
    await until("it is down", () => kinds(patient).includes("peer.down"));
    await waiting;
    expect(patient.peer.failures).toEqual(["disconnected", "disconnected"]);
    expect(patient.events.at(-1)).toMatchObject({ reason: "silent" });
    // The other has less patience: to it, that session is over.
    await until("it is lost to the other", () => kinds(a).includes("peer.lost"));
    b.child.kill("SIGCONT");
    await until("it is up again", () => patient.peer.mesh.isUp("b") && a.peer.mesh.isUp("b"));
    const lastUp = (told: Told) => told.events.filter(({ kind }) => kind === "peer.up").at(-1);
    expect(lastUp(patient)).toMatchObject({ isResumed: true });
    expect(lastUp(a)).toMatchObject({ isResumed: false });
    b.tell({ do: "stop echo" });
    await until("the watch has lasted", () => patient.peer.ended.length === 1);
    expect(patient.peer.ended).toMatchObject([{ reason: "stopped" }]);
  });

  it("a flood to a frozen process: memory stays bounded on the side that sends", async () => {
    const { a, b } = await other();
    const sender = await PeerProcess.start({
      id: "s",
      incarnation: 1,
      secret: SECRET,
      link: { ...quick, silenceMs: 5000, stallMs: 5000 },
    });
    sender.tell({ do: "dial", address: `ws://127.0.0.1:${b.port}` });
    await sender.told("peer.up");
    const before = await sender.stats();
    b.child.kill("SIGSTOP");
    for (let round = 0; round < 10; round++)
      sender.tell({ do: "flood", peer: "b", count: 100_000 });
    const after = await sender.stats();
    const [link] = after.metrics.links;
    expect(link?.outboxDepth).toBeLessThanOrEqual(4096);
    expect(link?.bufferedBytes).toBeLessThan(1024 * 1024 + 256 * 1024);
    expect(after.rssMiB - before.rssMiB).toBeLessThan(150); // A million messages would be 600 and more.
    b.child.kill("SIGCONT");
    expect(a.peer.mesh.metrics().links.length).toBeLessThanOrEqual(1);
  });

  it("a snapshot made by another process is as old here as it was there, whenever each began", async () => {
    const { a, b } = await other();
    const seen: Envelope[] = [];
    const deliver = a.peer.system.deliver.bind(a.peer.system);
    a.peer.system.deliver = (envelope) => {
      seen.push(envelope);
      deliver(envelope);
    };
    const beforeMs = performance.now();
    b.tell({ do: "snapshot", peer: "a" });
    await until("it has come", () => seen.some(({ kind }) => kind === "message"));
    const [envelope] = seen.filter(({ kind }) => kind === "message");
    const { snapshot } = (envelope as { message: { snapshot: { atMs: number } } }).message;
    expect(snapshot.atMs).toBeGreaterThan(beforeMs - 1);
    expect(snapshot.atMs).toBeLessThanOrEqual(performance.now());
  });

  it("processes in separate network namespaces understand each other; a cut wire is noticed, and mended", async () => {
    const network = makeNamespaces();
    if (network === undefined) return;
    try {
      const config = (id: string, host: string) => ({
        id,
        incarnation: 1,
        secret: SECRET,
        link: quick,
        host,
      });
      const [nameA, nameB] = network.names;
      const [hostA, hostB] = network.hosts;
      const a = await PeerProcess.start(config("a", hostA), nameA);
      const b = await PeerProcess.start(config("b", hostB), nameB);
      a.tell({ do: "dial", address: `ws://${hostB}:${b.port}` });
      await Promise.all([a.told("peer.up"), b.told("peer.up")]);
      b.tell({ do: "flood", peer: "a", count: 1000 });
      let toldA = 0;
      for (let tries = 0; tries < 500 && toldA === 0; tries++) toldA = (await a.stats()).told;
      expect(toldA).toBeGreaterThan(0);
      network.setWire(false);
      await Promise.all([a.told("peer.down"), b.told("peer.down")]);
      network.setWire(true);
      await Promise.all([a.told("peer.up", 2), b.told("peer.up", 2)]);
    } finally {
      await killAllPeers();
      network.remove();
    }
  });
});
