/** What links between peers promise, over pipes that hold back, stall and break. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { LinksOptions } from "../transport/peer-links.ts";
import {
  numbersOf,
  type PipePeer,
  PipeWorld,
  systemEnvelope,
  TICK_MS,
  userEnvelope,
} from "./peer-pipes.ts";

function pair(ofB: Partial<LinksOptions> = {}): { world: PipeWorld; a: PipePeer; b: PipePeer } {
  const world = new PipeWorld();
  const a = world.start("a", 1);
  const b = world.start("b", 1, ofB);
  a.links.dial("b");
  world.run(500);
  expect(a.links.isUp("b") && b.links.isUp("a")).toBe(true);
  return { world, a, b };
}

function kinds(peer: PipePeer): string[] {
  return peer.events.map(({ kind }) => kind).filter((kind) => kind !== "peer.heartbeat");
}

function refusals(peer: PipePeer): string[] {
  return peer.events.flatMap((event) => (event.kind === "peer.refused" ? [event.reason] : []));
}

// ---- random schedules ----------------------------------------------------------------------------------

/** What was sent, with how often the sender's link had gone down and been lost by then. */
type Sent = { number: number; downs: number; losses: number };

class Conversation {
  readonly world = new PipeWorld();
  readonly sent: Record<"user" | "system", Map<string, Sent[]>> = {
    user: new Map(),
    system: new Map(),
  };
  number = 0;

  constructor() {
    const small = { outboxMax: 40, systemMax: 12, outboxBytesMax: 20_000, bufferedBytesMax: 2000 };
    for (const name of ["a", "b"]) {
      this.world.start(name, 1, { link: small });
      this.sent.user.set(name, []);
      this.sent.system.set(name, []);
    }
    this.peer("a").links.dial("b");
    this.peer("b").links.dial("a");
  }

  peer(name: string): PipePeer {
    const peer = this.world.peers.get(name);
    if (peer === undefined) throw new Error(`${name} is gone`);
    return peer;
  }

  send(from: string, sort: "user" | "system"): void {
    const to = from === "a" ? "b" : "a";
    const peer = this.peer(from);
    const number = ++this.number;
    const make = sort === "user" ? userEnvelope : systemEnvelope;
    if (peer.links.send(to, make(from, to, number)) !== undefined) return;
    const count = (kind: string) => peer.events.filter((event) => event.kind === kind).length;
    const sent = { number, downs: count("peer.down"), losses: count("peer.lost") };
    this.sent[sort].get(from)?.push(sent);
    const { links } = peer.links.metrics();
    for (const { outboxDepth, unacked } of links) {
      expect(outboxDepth).toBeLessThanOrEqual(40 + 12);
      expect(unacked).toBeLessThanOrEqual(12);
    }
  }
}

type Step =
  | { do: "send"; from: "a" | "b"; sort: "user" | "system"; times: number }
  | { do: "deliver"; pipe: number; side: 0 | 1; most: number }
  | { do: "flush"; peer: "a" | "b" }
  | { do: "stall"; pipe: number; side: 0 | 1; isStalled: boolean }
  | { do: "reset"; pipe: number }
  | { do: "connect" }
  | { do: "tick"; times: number }
  | { do: "run"; ms: number };

const peers = fc.constantFrom("a" as const, "b" as const);
const side = fc.constantFrom(0 as const, 1 as const);
const pipe = fc.nat(3);
const steps = fc.array<Step>(
  fc.oneof(
    {
      weight: 6,
      arbitrary: fc.record({
        do: fc.constant("send" as const),
        from: peers,
        sort: fc.constantFrom("user" as const, "system" as const),
        times: fc.integer({ min: 1, max: 12 }),
      }),
    },
    {
      weight: 5,
      arbitrary: fc.record({
        do: fc.constant("deliver" as const),
        pipe,
        side,
        most: fc.integer({ min: 1, max: 6 }),
      }),
    },
    { weight: 3, arbitrary: fc.record({ do: fc.constant("flush" as const), peer: peers }) },
    {
      weight: 1,
      arbitrary: fc.record({
        do: fc.constant("stall" as const),
        pipe,
        side,
        isStalled: fc.boolean(),
      }),
    },
    { weight: 2, arbitrary: fc.record({ do: fc.constant("reset" as const), pipe }) },
    { weight: 4, arbitrary: fc.record({ do: fc.constant("connect" as const) }) },
    {
      weight: 3,
      arbitrary: fc.record({
        do: fc.constant("tick" as const),
        times: fc.integer({ min: 1, max: 90 }),
      }),
    },
    {
      weight: 2,
      arbitrary: fc.record({
        do: fc.constant("run" as const),
        ms: fc.constantFrom(100, 1000, 15_000),
      }),
    },
  ),
  { minLength: 5, maxLength: 80 },
);

function take(conversation: Conversation, step: Step): void {
  const { world } = conversation;
  switch (step.do) {
    case "send":
      for (let index = 0; index < step.times; index++) conversation.send(step.from, step.sort);
      return;
    case "deliver": {
      const end = world.pipes[step.pipe]?.[step.side];
      if (end !== undefined) world.deliver(end, step.most);
      return;
    }
    case "flush":
      return conversation.peer(step.peer).flush();
    case "stall": {
      const end = world.pipes[step.pipe]?.[step.side];
      if (end !== undefined) end.isStalled = step.isStalled;
      return;
    }
    case "reset": {
      const broken = world.pipes[step.pipe];
      if (broken !== undefined) world.reset(broken);
      return;
    }
    case "connect":
      return world.connect();
    case "tick":
      for (let index = 0; index < step.times; index++) world.tick();
      return;
    case "run":
      return world.run(step.ms);
  }
}

/** up, then heartbeats and mail, then down; lost only while down; mail only while up. */
function expectGrammar(story: PipePeer["story"]): void {
  let state: "none" | "up" | "down" = "none";
  for (const { kind } of story) {
    switch (kind) {
      case "peer.up":
        expect(state).not.toBe("up");
        state = "up";
        break;
      case "peer.down":
        expect(state).toBe("up");
        state = "down";
        break;
      case "peer.lost":
        expect(state).toBe("down");
        state = "none";
        break;
      case "peer.refused":
        break;
      default:
        expect(state).toBe("up");
    }
  }
}

describe("links between two peers, whatever happens to their connections", () => {
  it("system mail: once, in order, without gaps in a session; user mail: at most once, in order", () => {
    let resumed = 0;
    let gaps = 0;
    fc.assert(
      fc.property(steps, (schedule) => {
        const conversation = new Conversation();
        const { world } = conversation;
        for (const step of schedule) take(conversation, step);
        for (const end of world.pipes.flat()) end.isStalled = false;
        world.run(30_000);
        for (const [from, to] of [
          ["a", "b"],
          ["b", "a"],
        ] as const) {
          const sender = conversation.peer(from);
          const receiver = conversation.peer(to);
          expectGrammar(sender.story);
          expect(sender.links.isUp(to)).toBe(true);
          resumed += sender.events.filter((e) => e.kind === "peer.up" && e.isResumed).length;
          const losses = sender.events.filter(({ kind }) => kind === "peer.lost").length;
          const downs = sender.events.filter(({ kind }) => kind === "peer.down").length;

          for (const sort of ["user", "system"] as const) {
            const got = numbersOf(receiver.envelopes, sort);
            const sent = conversation.sent[sort].get(from) ?? [];
            const arrived = new Set(got);
            // Once, in order, and nothing that was not sent.
            expect(got).toEqual(
              sent.filter(({ number }) => arrived.has(number)).map(({ number }) => number),
            );
            // What is missing was on a connection, or in a session, that broke.
            for (const { number, downs: downsThen, losses: lossesThen } of sent) {
              if (arrived.has(number)) continue;
              gaps++;
              if (sort === "system") expect(lossesThen).toBeLessThan(losses);
              else expect(downsThen).toBeLessThan(downs);
            }
          }
        }
        expect(world.openPipes).toBe(1);
        for (const link of [...conversation.peer("a").links.metrics().links]) {
          expect(link).toMatchObject({ outboxDepth: 0, unacked: 0, badFrames: 0, rejected: 0 });
        }
      }),
      { numRuns: 300 },
    );
    // The schedules do reach what they are for.
    expect(resumed).toBeGreaterThan(50);
    expect(gaps).toBeGreaterThan(50);
  });
});

// ---- one at a time -------------------------------------------------------------------------------------

describe("one link per pair", () => {
  it("both dial at once: one connection is left, and both are up on it", () => {
    for (const [first, second] of [
      ["a", "b"],
      ["b", "a"],
    ] as const) {
      const world = new PipeWorld();
      world.start("a", 1);
      world.start("b", 1);
      world.peers.get(first)?.links.dial(second);
      world.peers.get(second)?.links.dial(first);
      world.run(5000);
      expect(world.openPipes).toBe(1);
      for (const peer of world.peers.values()) {
        expect(kinds(peer).filter((kind) => kind === "peer.up")).toEqual(["peer.up"]);
        expect(kinds(peer)).not.toContain("peer.down");
      }
    }
  });

  it("the larger id loses its link unnoticed and dials: the smaller takes the new one in its place", () => {
    const { world, a, b } = pair();
    b.links.dial("a");
    const [old] = world.pipes;
    const end = old?.find(({ owner }) => owner === b);
    if (end === undefined) throw new Error("no pipe");
    // Only b sees it break.
    end.isOpen = false;
    b.links.closed(end.id, "reset");
    world.pipes.length = 0;
    world.run(1000);
    expect(a.links.isUp("b") && b.links.isUp("a")).toBe(true);
    expect(a.events).toContainEqual(expect.objectContaining({ kind: "peer.up", isResumed: true }));
    expect(kinds(a)).toEqual(["peer.up", "peer.down", "peer.up"]);
  });

  it("a later life replaces the earlier at once", () => {
    const { world, b } = pair();
    b.links.dial("a");
    world.peers.delete("a"); // It stands still: no connection of it closes.
    const later = world.start("a", 2);
    later.links.dial("b");
    world.run(1000);
    expect(b.events).toContainEqual(
      expect.objectContaining({
        kind: "peer.lost",
        incarnation: 1,
        reason: "replaced by a later life",
      }),
    );
    expect(b.events).toContainEqual(
      expect.objectContaining({ kind: "peer.up", incarnation: 2, isResumed: false }),
    );
  });

  it("two processes with one id: the later has the links, the earlier hears why it has none", () => {
    const world = new PipeWorld();
    const hub = world.start("hub", 1);
    const earlier = world.start("twin", 1);
    earlier.links.dial("hub");
    world.run(500);
    // Another process of the same name; both live on.
    world.peers.delete("twin");
    const later = world.start("twin", 2);
    later.links.dial("hub");
    world.peers.set("earlier", earlier);
    world.run(5000);
    expect(hub.links.isUp("twin") && later.links.isUp("hub")).toBe(true);
    expect(earlier.links.isUp("hub")).toBe(false);
    expect(refusals(earlier)).toContain("stale");
    // And when they meet each other.
    later.links.dial("earlier");
    world.run(500);
    expect(refusals(later)).toContain("same_id");
  });

  it("a process that dials itself notices, and does so once", () => {
    const world = new PipeWorld();
    const a = world.start("a", 1);
    a.links.dial("a");
    world.run(20_000);
    expect(refusals(a)).toEqual(["self", "self"]); // As server, and told as client.
    expect(a.links.metrics().dials).toBe(1);
  });
});

describe("who is let in", () => {
  const secret = (text: string) => new TextEncoder().encode(`${text} ${"x".repeat(16)}`);

  it.each([
    ["another cluster", { cluster: "other" }, "cluster"],
    ["other settings", { settings: "1024" }, "settings"],
    ["only later versions", { versions: { min: 2, max: 3 } }, "version"],
    ["no common key", { keys: [{ id: "k9", secret: secret("one") }] }, "key"],
    [
      "another secret under the same name",
      { keys: [{ id: "k1", secret: secret("two") }] },
      "secret",
    ],
  ])("refused, both sides saying why: %s", (_, options, reason) => {
    const world = new PipeWorld();
    const a = world.start("a", 1);
    const b = world.start("b", 1, options);
    b.links.dial("a");
    world.run(5000);
    expect(a.links.isUp("b") || b.links.isUp("a")).toBe(false);
    expect(refusals(a)).toContain(reason);
    expect(refusals(b)).toContain(reason);
    expect(a.envelopes).toEqual([]);
    expect(kinds(a)).not.toContain("peer.up");
  });

  it("peers of neighbouring versions speak the highest that both know", () => {
    const world = new PipeWorld();
    const a = world.start("a", 1, { versions: { min: 1, max: 2 } });
    const b = world.start("b", 1, { versions: { min: 2, max: 3 } });
    a.links.dial("b");
    world.run(500);
    expect(a.links.isUp("b") && b.links.isUp("a")).toBe(true);
  });

  it("peers with other lists of structures understand each other all the same, in maps", () => {
    const world = new PipeWorld();
    const a = world.start("a", 1);
    const b = world.start("b", 1, { structures: "of a later version" });
    a.links.dial("b");
    world.run(500);
    expect(a.events).toContainEqual(expect.objectContaining({ kind: "peer.up", encoding: "maps" }));
    a.links.send("b", userEnvelope("a", "b", 5));
    a.links.send("b", systemEnvelope("a", "b", 6));
    world.run(500);
    expect(b.envelopes).toEqual([userEnvelope("a", "b", 5), systemEnvelope("a", "b", 6)]);
  });

  it("a secret is changed without a moment in which two peers do not understand each other", () => {
    const old = { id: "k1", secret: secret("old") };
    const fresh = { id: "k2", secret: secret("new") };
    const stages = [[old], [old, fresh], [fresh, old], [fresh]];
    for (let stage = 0; stage + 1 < stages.length; stage++) {
      const world = new PipeWorld();
      const a = world.start("a", 1, { keys: stages[stage] ?? [] });
      world.start("b", 1, { keys: stages[stage + 1] ?? [] });
      a.links.dial("b");
      world.run(500);
      expect(a.links.isUp("b")).toBe(true);
    }
  });

  it("a host that fails three times within a minute is not answered until the minute is over", () => {
    const world = new PipeWorld();
    const a = world.start("a", 1);
    const b = world.start("b", 1, { keys: [{ id: "k1", secret: secret("wrong") }] });
    b.links.dial("a");
    world.run(50_000);
    const secrets = () => refusals(a).filter((reason) => reason === "secret").length;
    expect(secrets()).toBe(3);
    expect(a.links.metrics().refusals.too_many).toBeGreaterThan(0);
    world.run(30_000);
    expect(secrets()).toBeGreaterThan(3);
  });
});

/** Both sides of a handshake in the open: what each says, for someone in between. */
function recorded(world: PipeWorld): { client: Uint8Array[]; server: Uint8Array[] } {
  const said = { client: [] as Uint8Array[], server: [] as Uint8Array[] };
  world.connect();
  for (let round = 0; round < 6; round++) {
    for (const [near, far] of world.pipes) {
      const [first] = near.flying;
      if (first !== undefined) said.client.push(first);
      world.deliver(near);
      const [answer] = far.flying;
      if (answer !== undefined) said.server.push(answer);
      world.deliver(far);
    }
  }
  return said;
}

describe("attackers", () => {
  /** A connection to b whose bytes are the test's own. */
  function stranger(
    world: PipeWorld,
    b: PipePeer,
  ): { say: (bytes: Uint8Array) => void; heard: Uint8Array[] } {
    const heard: Uint8Array[] = [];
    let isOpen = true;
    const connection = {
      write: (bytes: Uint8Array) => void heard.push(Uint8Array.from(bytes)),
      bufferedBytes: () => 0,
      destroy: () => {
        isOpen = false;
      },
      end: () => {
        isOpen = false;
      },
      trust: () => {},
    };
    const id = b.links.accepted(connection, "stranger", "");
    return {
      heard,
      say: (bytes) => {
        if (isOpen) b.links.received(id, bytes);
        world.sweep();
      },
    };
  }

  it("a recorded handshake is worth nothing a second time", () => {
    const world = new PipeWorld();
    const a = world.start("a", 1);
    const b = world.start("b", 1);
    a.links.dial("b");
    const { client } = recorded(world);
    expect(client.length).toBeGreaterThanOrEqual(2);
    expect(b.links.isUp("a")).toBe(true);
    world.kill("a");
    const { say } = stranger(world, b);
    for (const bytes of client) say(bytes);
    expect(refusals(b)).toContain("secret");
    expect(b.links.isUp("a")).toBe(false);
  });

  it("what the server says is no answer to the server", () => {
    const world = new PipeWorld();
    const b = world.start("b", 1);
    const a = world.start("a", 1);
    a.links.dial("b");
    const { client } = recorded(world);
    world.kill("a");
    const one = stranger(world, b);
    const [hello] = client;
    if (hello === undefined) throw new Error("no hello");
    one.say(hello);
    const [challenge] = one.heard;
    if (challenge === undefined) throw new Error("no challenge");
    one.say(challenge); // Its own words, back.
    expect(refusals(b)).toContain("malformed");
    expect(b.links.isUp("a")).toBe(false);
  });

  it("a handshake relayed through another channel fails", () => {
    const world = new PipeWorld();
    const b = world.start("b", 1);
    const a = world.start("a", 1);
    const toB = { heard: [] as Uint8Array[], id: 0 };
    const toA: Uint8Array[] = [];
    const connection = (into: Uint8Array[]) => ({
      write: (bytes: Uint8Array) => void into.push(Uint8Array.from(bytes)),
      bufferedBytes: () => 0,
      destroy: () => {},
      end: () => {},
      trust: () => {},
    });
    a.links.dial("relay");
    const [dial] = world.dials.splice(0);
    a.links.opened(dial?.id ?? 0, connection(toA), "session of a and the relay");
    toB.id = b.links.accepted(connection(toB.heard), "relay", "session of the relay and b");
    b.links.received(toB.id, toA[0] ?? new Uint8Array());
    a.links.received(dial?.id ?? 0, toB.heard[0] ?? new Uint8Array());
    expect(refusals(a)).toContain("secret");
    expect(kinds(b)).not.toContain("peer.up");
  });

  it("before a peer is known nothing reaches an actor, whatever it says; 300 strangers harm no link", () => {
    const { world, b } = pair();
    const before = b.envelopes.length;
    fc.assert(
      fc.property(
        fc.array(fc.uint8Array({ maxLength: 2000 }), { minLength: 1, maxLength: 3 }),
        (words) => {
          const { say } = stranger(world, b);
          for (const bytes of words) say(bytes);
        },
      ),
      { numRuns: 300 },
    );
    expect(b.envelopes.length).toBe(before);
    expect(new Set(refusals(b))).toEqual(new Set(["malformed"]));
    expect(b.links.isUp("a")).toBe(true);
  });

  it("at most 64 connections may say nothing, for 5 s", () => {
    const world = new PipeWorld();
    const b = world.start("b", 1);
    let taken = 0;
    for (let index = 0; index < 100; index++) {
      if (!b.links.accepts(`host ${index}`)) continue;
      stranger(world, b);
      taken++;
    }
    expect(taken).toBe(64);
    world.run(5200);
    expect(b.links.accepts("host")).toBe(true);
    expect(refusals(b).filter((reason) => reason === "timeout").length).toBe(64);
  });
});

describe("a link in time", () => {
  it("clocks that began five minutes apart do not matter; heartbeats carry what was put into them", () => {
    const { world, a } = pair();
    world.run(2000);
    const beats = a.events.filter((event) => event.kind === "peer.heartbeat");
    expect(beats.length).toBeGreaterThanOrEqual(7);
    expect(beats.at(-1)).toMatchObject({
      heartbeat: { loopLagMs: 1, queueDepth: 2, epoch: 3 },
      rttMs: 0,
      node: "b",
    });
  });

  it("a peer that says nothing for 3 s is down; the session ends 10 s later, unless it comes back", () => {
    const { world, a, b } = pair();
    world.peers.delete("b"); // It stands still.
    world.run(2600);
    expect(a.links.isUp("b")).toBe(true);
    world.run(500);
    expect(a.events.at(-1)).toMatchObject({ kind: "peer.down", reason: "silent" });
    world.run(5000);
    world.peers.set("b", b);
    world.run(4000);
    expect(a.events).toContainEqual(expect.objectContaining({ kind: "peer.up", isResumed: true }));
    expect(kinds(a)).not.toContain("peer.lost");
    world.peers.delete("b");
    world.run(3000 + 10_200);
    expect(kinds(a).slice(-2)).toEqual(["peer.down", "peer.lost"]);
  });

  it("a process that stood still itself accuses nobody for it", () => {
    const { world, a, b } = pair();
    world.nowMs += 8000; // Neither ticked.
    world.run(1000);
    for (const peer of [a, b]) expect(kinds(peer)).toEqual(["peer.up"]);
  });

  it("a peer that does not read: memory stays bounded, asks are refused, and after 5 s the link is down", () => {
    // It goes on speaking, as if nothing were wrong.
    const { world, a, b } = pair({ link: { silenceMs: 60_000 } });
    const end = world.pipes.flat().find(({ owner }) => owner === a);
    if (end === undefined) throw new Error("no pipe");
    end.isStalled = true;
    let full = 0;
    for (let second = 0; second < 4; second++) {
      for (let index = 0; index < 50_000; index++) {
        if (a.links.send("b", userEnvelope("a", "b", index)) === "full") full++;
        if (index % 100 === 0) a.flush();
      }
      world.run(1000);
      const [link] = a.links.metrics().links;
      expect(link?.outboxDepth).toBeLessThanOrEqual(4096);
      expect(link?.bufferedBytes).toBeLessThan(1024 * 1024 + 128 * 1024);
    }
    expect(full).toBeGreaterThan(100_000);
    expect(a.links.isUp("b")).toBe(true);
    world.run(1500);
    expect(a.events).toContainEqual(
      expect.objectContaining({ kind: "peer.down", reason: "stalled" }),
    );
    expect(a.undeliverable.length).toBeGreaterThan(0);
    expect(a.undeliverable.every(({ reason }) => reason === "disconnected")).toBe(true);
    const got = numbersOf(b.envelopes, "user");
    expect(got.length).toBeLessThan(20_000);
  });

  it("while a link is stalled the latest snapshot of a node replaces the one that waits", () => {
    const { world, a, b } = pair();
    const end = world.pipes.flat().find(({ owner }) => owner === a);
    if (end === undefined) throw new Error("no pipe");
    end.isStalled = true;
    const progress = (lease: number, outputTokens: number) =>
      a.links.send("b", {
        ...{ kind: "message", to: "b/nodes/n", uid: 0, from: "a/requests", askId: 0, timeoutUs: 0 },
        message: { kind: "gpu_node.progress", leaseId: `lease ${lease}`, outputTokens },
      });
    for (let index = 0; a.links.send("b", userEnvelope("a", "b", index)) === undefined; index++) {
      if (index % 100 === 0 && end.bufferedBytes() < 1024 * 1024) a.flush();
      if (index % 2000 === 0) progress(index / 2000, 0);
    }
    const before = a.links.metrics().links[0];
    expect(before?.outboxDepth).toBeGreaterThanOrEqual(4096);
    // Full for what is new, but not for what replaces.
    expect(progress(10_000, 1)).toBe("full");
    const waiting = Array.from({ length: 40 }, (_, lease) => lease).filter(
      (lease) => progress(lease, 77) === undefined,
    );
    expect(waiting.length).toBeGreaterThan(0);
    end.isStalled = false;
    world.run(500);
    const tokens = b.envelopes.flatMap((envelope) => {
      const message =
        envelope.kind === "message" ? (envelope.message as { outputTokens?: number }) : {};
      return message.outputTokens === undefined ? [] : [message.outputTokens];
    });
    expect(tokens.filter((count) => count === 77).length).toBe(waiting.length);
  });

  it("more system mail than may wait ends the session, and says so", () => {
    const { world, a } = pair();
    const end = world.pipes.flat().find(({ owner }) => owner === a);
    if (end === undefined) throw new Error("no pipe");
    end.isStalled = true;
    let sent = 0;
    while (a.links.send("b", systemEnvelope("a", "b", sent)) === undefined) sent++;
    expect(sent).toBe(1024);
    expect(a.events.at(-1)).toMatchObject({
      kind: "peer.lost",
      reason: "overflow of system messages",
    });
    world.run(2000);
    expect(a.links.isUp("b")).toBe(true);
  });

  it("one that leaves is lost at once, and what it had to say has come", () => {
    const { world, a, b } = pair();
    for (let index = 0; index < 600; index++) b.links.send("a", userEnvelope("b", "a", index));
    b.links.close(true);
    world.run(200);
    expect(numbersOf(a.envelopes, "user").length).toBe(600);
    expect(kinds(a)).toEqual(["peer.up", "peer.down", "peer.lost"]);
    expect(a.events.at(-1)).toMatchObject({ reason: "left" });
  });

  it("a peer that is away is dialled at random moments, at first often, at least every 10 s", () => {
    const world = new PipeWorld();
    const a = world.start("a", 1);
    a.links.dial("b");
    const dialled: number[] = [];
    let before = 0;
    for (let gone = 0; gone < 120_000; gone += TICK_MS) {
      world.tick();
      world.connect();
      const { dials } = a.links.metrics();
      if (dials > before) dialled.push(world.nowMs);
      before = dials;
    }
    const pauses = dialled.slice(1).map((atMs, index) => atMs - (dialled[index] ?? 0));
    expect(Math.max(...pauses)).toBeLessThanOrEqual(10_000 + 2 * TICK_MS);
    expect(dialled.filter((atMs) => atMs < 5000).length).toBeGreaterThan(4);
    expect(new Set(pauses).size).toBeGreaterThan(5);
    world.start("b", 1);
    world.run(10_500);
    expect(a.links.isUp("b")).toBe(true);
  });

  it("an address that is not wanted any more is not dialled, a peer that is forgotten is lost", () => {
    const { world, a, b } = pair();
    a.links.undial("b");
    a.links.forget("b");
    expect(kinds(a)).toEqual(["peer.up", "peer.down", "peer.lost"]);
    world.run(5000);
    expect(a.links.isUp("b")).toBe(false);
    expect(b.links.isUp("a")).toBe(false);
  });
});

describe("mail that cannot go", () => {
  it("a message that is too large or cannot be encoded is given back; the others go", () => {
    const world = new PipeWorld();
    const small = { frameBytesMax: 64 * 1024, batchBytes: 64 * 1024 };
    const a = world.start("a", 1, { link: small });
    const b = world.start("b", 1, { link: small });
    a.links.dial("b");
    world.run(500);
    const body = new Uint8Array(100_000);
    const answer = { body, bytes: 1, route: "chat", model: "m", promptTokens: 1, outputTokens: 1 };
    const place = { uid: 0, from: "a/requests", askId: 0, timeoutUs: 0 };
    const odd = { kind: "message", to: "b/cache/1", ...place } as const;
    a.links.send("b", userEnvelope("a", "b", 1));
    a.links.send("b", {
      ...odd,
      message: { kind: "cache.flight_ended", result: { kind: "stored", answer } },
    });
    a.links.send("b", userEnvelope("a", "b", 2));
    a.links.send("b", { ...odd, message: { kind: "cache.leave", key: Symbol("x") } });
    a.links.send("b", systemEnvelope("a", "b", 3));
    a.links.send("b", {
      kind: "reply",
      to: "b/requests",
      askId: 9,
      outcome: { ok: true, value: { kind: "hit", answer } },
    });
    world.run(500);
    expect(a.undeliverable.map(({ reason }) => reason)).toEqual([
      "oversized",
      "undecodable",
      "oversized",
    ]);
    // Who waits for the answer that was too large hears that none comes.
    expect(b.envelopes).toEqual([
      userEnvelope("a", "b", 1),
      userEnvelope("a", "b", 2),
      systemEnvelope("a", "b", 3),
      { kind: "reply", to: "b/requests", askId: 9, outcome: { ok: false, failure: "noroute" } },
    ]);
    expect(a.links.isUp("b")).toBe(true);
  });

  it("an ask that the other side may not deliver is answered at once", () => {
    const { world, a, b } = pair();
    const ask = {
      kind: "message",
      to: "b/nodes/n",
      uid: 0,
      from: "a/router",
      askId: 4,
      timeoutUs: 1e6,
    } as const;
    a.links.send("b", { ...ask, message: { kind: "gpu_node.later" } });
    world.run(200);
    expect(b.events).toContainEqual(
      expect.objectContaining({
        kind: "peer.rejected",
        rejected: expect.objectContaining({ messageKind: "gpu_node.later" }),
      }),
    );
    expect(b.envelopes).toEqual([]);
    expect(a.envelopes).toEqual([
      { kind: "reply", to: "a/router", askId: 4, outcome: { ok: false, failure: "noroute" } },
    ]);
  });

  it("bytes that are no frame end the connection, not the session", () => {
    const { world, a, b } = pair();
    const end = world.pipes.flat().find(({ owner }) => owner === a);
    end?.write(Uint8Array.from([0xc1, 0xff]));
    world.run(3000);
    expect(b.events).toContainEqual(expect.objectContaining({ kind: "peer.down" }));
    expect(kinds(b)).not.toContain("peer.lost");
    expect(a.links.isUp("b") && b.links.isUp("a")).toBe(true);
    expect(b.links.metrics().links[0]?.badFrames).toBe(1);
  });
});
