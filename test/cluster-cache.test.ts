/**
 * The cache over several peers, in virtual time: whole gateways with modelled edges, links that lose what is on them
 * when they break, and peers that come, go and die. Nobody is left without an answer, nor answered twice, and nothing
 * stays behind.
 */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { peerOf } from "../actors/cache-placement.ts";
import type { RequestFacts } from "../actors/protocol.ts";
import { SimClock } from "../runtime/clock.ts";
import { SimScheduler } from "../runtime/sim-scheduler.ts";
import type { Envelope } from "../runtime/system.ts";
import { type Behaviour, balanced, World } from "./world.ts";

/** From peer to peer, ms. */
const LINK_MS = 1;

type Peer = { id: string; world: World; isDead: boolean };
type Relay = { reader: Peer; requestId: string; leader: Peer; flight: string };

class Peers {
  readonly clock = new SimClock();
  readonly scheduler: SimScheduler;
  readonly peers: Peer[] = [];
  /** Pairs that cannot reach each other, as "a b". */
  readonly #cut = new Set<string>();
  /** Counts how often a link broke: what was sent before does not arrive after. */
  readonly #breaks = new Map<string, number>();
  readonly #relays = new Set<Relay>();
  /** Attaches that came to nothing, by request. */
  readonly lost = new Map<string, number>();
  #epoch = 0;
  #lastId = 0;

  constructor(ids: readonly string[], seed = 1) {
    this.scheduler = new SimScheduler(this.clock, seed);
    for (const id of ids) this.add(id, seed);
    this.setView();
    this.run(20);
  }

  /** A further life of a peer, or a new one. */
  add(id: string, seed = 1): Peer {
    const world = new World(["n1", "n2"], {}, seed + this.peers.length, {
      id,
      clock: this.clock,
      scheduler: this.scheduler,
      nextId: () => ++this.#lastId,
      remote: {
        route: (path) => peerOf(path) !== id,
        send: (envelope) => this.#send(id, envelope),
      },
    });
    const peer: Peer = { id, world, isDead: false };
    world.front.onRelay = (requestId, flightId) => this.#relay(peer, requestId, flightId);
    this.peers.push(peer);
    return peer;
  }

  get alive(): Peer[] {
    return this.peers.filter(({ isDead }) => !isDead);
  }

  at(id: string): Peer {
    const peer = this.alive.find((each) => each.id === id);
    if (peer === undefined) throw new Error(`${id} is dead`);
    return peer;
  }

  #isCut(one: string, other: string): boolean {
    return this.#cut.has(pairOf(one, other));
  }

  #send(from: string, envelope: Envelope): "disconnected" | undefined {
    const to = peerOf(envelope.to);
    const there = this.alive.find(({ id }) => id === to);
    if (there === undefined || this.#isCut(from, to)) return "disconnected";
    const pair = pairOf(from, to);
    const breaks = this.#breaks.get(pair) ?? 0;
    this.clock.schedule(LINK_MS * 1000, () => {
      const isSame = (this.#breaks.get(pair) ?? 0) === breaks && !there.isDead;
      if (isSame) there.world.system.deliver(structuredClone(envelope));
    });
    return undefined;
  }

  /** The link breaks; both sides hear of it. `heals`: it is back at once, and its session goes on. */
  cut(one: string, other: string, heals = false): void {
    if (one === other) return;
    const pair = pairOf(one, other);
    if (!heals) this.#cut.add(pair);
    this.#breaks.set(pair, (this.#breaks.get(pair) ?? 0) + 1);
    for (const [id, gone] of [
      [one, other],
      [other, one],
    ] as const) {
      const here = this.alive.find((each) => each.id === id);
      if (here !== undefined) this.#down(here, gone, heals);
    }
    for (const relay of [...this.#relays]) {
      const ends = [relay.reader.id, relay.leader.id];
      if (ends.includes(one) && ends.includes(other)) this.#loseRelay(relay);
    }
  }

  heal(): void {
    this.#cut.clear();
  }

  /** As transport/cluster.ts does on "peer.down" and "peer.lost". */
  #down({ world }: Peer, gone: string, resumes: boolean): void {
    const { system, refs } = world;
    const isGone = (path: string) => peerOf(path) === gone;
    system.interrupted(isGone);
    for (const shard of refs.cache.own)
      system.tell(shard, { kind: "cache.owner_restarted", owner: `${gone}/requests` });
    system.tell(refs.requests, { kind: "request.peer_down", peer: gone });
    if (!resumes) system.disconnected(isGone);
  }

  /** As kill -9. */
  kill(id: string): void {
    const dead = this.at(id);
    dead.isDead = true;
    dead.world.system.stopAll();
    for (const other of this.alive) this.cut(id, other.id);
    for (const other of this.alive) this.#cut.delete(pairOf(id, other.id));
    for (const relay of [...this.#relays]) if (relay.reader === dead) this.#relays.delete(relay);
  }

  setView(
    owners: readonly string[] = this.alive.map(({ id }) => id),
    suspects: readonly string[] = [],
    to: readonly Peer[] = this.alive,
  ): void {
    this.#epoch++;
    const view = { epoch: this.#epoch, owners: [...owners].sort(), suspects, lost: [] };
    for (const { world } of to)
      world.system.tell(world.refs.requests, { kind: "members.view_changed", view });
  }

  // ---- relays, as transport/flight-relay.ts and front.ts do ----------------------------------------------------

  #relay(reader: Peer, requestId: string, flightId: string): void {
    const leader = this.alive.find(({ id }) => id === peerOf(flightId));
    const flight = flightId.slice(flightId.indexOf("/") + 1);
    if (leader === undefined || this.#isCut(reader.id, leader.id)) {
      this.#tellRelayed(reader, requestId, "lost");
      return;
    }
    this.#relays.add({ reader, requestId, leader, flight });
  }

  #loseRelay(relay: Relay): void {
    this.#relays.delete(relay);
    this.#tellRelayed(relay.reader, relay.requestId, "lost");
  }

  #tellRelayed({ world, id }: Peer, requestId: string, how: "whole" | "broken" | "lost"): void {
    if (how === "lost") {
      const name = `${id}/${requestId}`;
      this.lost.set(name, (this.lost.get(name) ?? 0) + 1);
    }
    world.system.tell(world.refs.requests, { kind: "request.relayed", requestId, how });
  }

  run(ms: number): void {
    for (let left = ms; left > 0; left -= 5) {
      this.scheduler.runFor(Math.min(5, left));
      for (const relay of [...this.#relays]) {
        const { leader, flight, reader, requestId } = relay;
        const ended = leader.world.records.find(({ facts }) => facts.requestId === flight);
        if (ended === undefined) continue;
        this.#relays.delete(relay);
        this.#tellRelayed(reader, requestId, ended.attempts.length > 0 ? "whole" : "broken");
      }
    }
  }

  /** What the client got that counts: an attach to a flight that was lost is taken back. */
  answers(peer: Peer, requestId: string): number {
    return peer.world.got(requestId).length - (this.lost.get(`${peer.id}/${requestId}`) ?? 0);
  }

  get starts(): number {
    return this.peers.reduce((sum, { world }) => sum + world.starts.length, 0);
  }

  async expectBalanced(): Promise<void> {
    expect(this.#relays.size).toBe(0);
    for (const { id, world } of this.alive)
      expect([id, await world.books()]).toEqual([id, balanced]);
  }
}

function pairOf(one: string, other: string): string {
  return one < other ? `${one} ${other}` : `${other} ${one}`;
}

/** A question whose key belongs to that peer. */
function questionOf(peers: Peers, owner: string): string {
  const [first] = peers.alive;
  for (let number = 0; ; number++) {
    const question = String.fromCharCode(48 + (number % 75), 48 + ((number * 7) % 75), 33 + number);
    const key = Buffer.from(question).toString("hex");
    if (first !== undefined && peerOf(first.world.refs.cache.at(key).path) === owner)
      return question;
  }
}

describe("one cache over peers", () => {
  it("60 equal requests at three peers, streams and whole, make one upstream call", async () => {
    const peers = new Peers(["a", "b", "c"]);
    for (const owner of ["a", "b", "c"]) {
      const before = peers.starts;
      const question = questionOf(peers, owner);
      const ids = peers.alive.flatMap((peer) =>
        Array.from({ length: 20 }, (_, n) => ({
          peer,
          id: peer.world.submit(question, { stream: n % 2 === 0 }),
        })),
      );
      peers.run(3000);
      expect(peers.starts - before).toBe(1);
      for (const { peer, id } of ids) expect(peers.answers(peer, id)).toBe(1);
      await peers.expectBalanced();
    }
    const cached = new Set(
      peers.peers.flatMap(({ world }) => world.records.map(({ cache }) => cache)),
    );
    expect([...cached].sort()).toEqual(["joined", "miss"]);
  });

  it("what one peer stored is a hit at every other", async () => {
    const peers = new Peers(["a", "b", "c"]);
    const question = questionOf(peers, "b");
    peers.at("a").world.submit(question);
    peers.run(1000);
    for (const peer of peers.alive) {
      const id = peer.world.submit(question);
      peers.run(20);
      expect(peer.world.outcome(id)).toMatchObject({ kind: "answer", cache: "hit_exact" });
    }
    expect(peers.starts).toBe(1);
  });

  it("clients may choose one request id at two peers: each gets its answer", async () => {
    const peers = new Peers(["a", "b"]);
    const question = questionOf(peers, "b");
    for (const { world } of peers.alive) world.submit(question, { requestId: "same" });
    peers.run(1000);
    for (const peer of peers.alive) expect(peers.answers(peer, "same")).toBe(1);
    expect(peers.starts).toBe(1);
    await peers.expectBalanced();
  });

  it("the upstream is aborted when the last client of all peers has left, not before", async () => {
    const peers = new Peers(["a", "b", "c"]);
    const question = questionOf(peers, "b");
    const ids = peers.alive.map((peer) => ({ peer, id: peer.world.submit(question) }));
    peers.run(80); // The stream has begun.
    const aborts = () => peers.peers.reduce((sum, { world }) => sum + world.aborts.length, 0);
    for (const { peer, id } of ids) {
      expect(aborts()).toBe(0);
      peer.world.leave(id);
      peers.run(20);
    }
    expect(aborts()).toBe(1);
    peers.run(10_000);
    await peers.expectBalanced();
  });

  it.each(["before", "after"] as const)(
    "a leader killed %s its first token: those at other peers get an answer once",
    async (when) => {
      const peers = new Peers(["a", "b", "c"]);
      const question = questionOf(peers, "b");
      peers.at("a").world.submit(question);
      peers.run(10);
      const ids = [peers.at("b"), peers.at("c")].flatMap((peer) =>
        Array.from({ length: 5 }, () => ({ peer, id: peer.world.submit(question) })),
      );
      peers.run(when === "before" ? 10 : 80);
      peers.kill("a");
      peers.run(10_000);
      for (const { peer, id } of ids) {
        expect(peers.answers(peer, id)).toBe(1);
        expect(peer.world.got(id).at(-1)?.kind).not.toBe("refuse");
      }
      expect(peers.starts).toBe(2);
      await peers.expectBalanced();
    },
  );

  it("the owner of a key killed: the leader goes on, who waited asks anew", async () => {
    const peers = new Peers(["a", "b", "c"]);
    const question = questionOf(peers, "b");
    const ids = [peers.at("a"), peers.at("c")].flatMap((peer) =>
      Array.from({ length: 5 }, () => ({ peer, id: peer.world.submit(question) })),
    );
    peers.run(20);
    peers.kill("b");
    peers.setView();
    peers.run(10_000);
    for (const { peer, id } of ids) {
      expect(peers.answers(peer, id)).toBe(1);
      expect(peer.world.got(id).at(-1)?.kind).not.toBe("refuse");
    }
    await peers.expectBalanced();
  });

  it("a key that changes hands: its flight ends where it is, the next one begins at the new owner", async () => {
    const peers = new Peers(["a", "b"]);
    const question = questionOf(peers, "a");
    const before = peers.alive.map((peer) => ({ peer, id: peer.world.submit(question) }));
    peers.run(20);
    peers.add("c");
    peers.setView(["b", "c"]);
    const after = peers.alive.map((peer) => ({ peer, id: peer.world.submit(question) }));
    peers.run(10_000);
    for (const { peer, id } of [...before, ...after]) expect(peers.answers(peer, id)).toBe(1);
    expect(peers.starts).toBe(2);
    await peers.expectBalanced();
  });

  it("a link that breaks for a moment: both its sides count on nothing that was on it", async () => {
    for (const [leader, owner, joiner] of ["abc", "bac", "aab", "abb"]) {
      for (const afterMs of [5, 30, 52, 80]) {
        const peers = new Peers(["a", "b", "c"]);
        const question = questionOf(peers, owner ?? "");
        const ids = [leader, joiner, joiner].map((id) => {
          const peer = peers.at(id ?? "");
          const sent = { peer, id: peer.world.submit(question) };
          peers.run(3);
          return sent;
        });
        peers.run(afterMs);
        peers.cut("a", "b", true);
        peers.run(10_000);
        for (const { peer, id } of ids) expect(peers.answers(peer, id)).toBe(1);
        await peers.expectBalanced();
      }
    }
  });

  it("a lead that comes to one who has just left passes on", async () => {
    for (let leftAtMs = 36; leftAtMs <= 46; leftAtMs++) {
      const peers = new Peers(["a", "b", "c"]);
      const question = questionOf(peers, "b");
      const deadlineAtMs = peers.clock.nowUs() / 1000 + 40; // Before the first token.
      peers.at("a").world.submit(question, { deadlineAtMs });
      peers.run(3);
      const next = peers.at("c").world.submit(question);
      peers.run(3);
      const last = peers.at("a").world.submit(question);
      peers.run(leftAtMs - 6);
      peers.at("c").world.leave(next);
      // Its owner changes meanwhile, which must not hide where the flight is.
      peers.setView(["a", "c"], []);
      peers.run(1000);
      expect(peers.answers(peers.at("a"), last)).toBe(1);
      peers.run(60_000);
      await peers.expectBalanced();
    }
  });

  it("a suspect owner is not waited for", () => {
    const peers = new Peers(["a", "b"]);
    const question = questionOf(peers, "b");
    peers.setView(["a", "b"], ["b"], [peers.at("a")]);
    peers.run(5);
    const id = peers.at("a").world.submit(question);
    peers.run(60);
    expect(peers.at("a").world.outcome(id)).toMatchObject({ kind: "attach", cache: "bypass" });
  });
});

describe("one cache over peers: random faults", () => {
  const step = fc.record({
    what: fc.constantFrom(
      ...(["submit", "submit", "submit", "submit", "leave", "fault"] as const),
      ...(["blip", "cut", "heal", "view", "kill", "start", "crash"] as const),
    ),
    n: fc.nat(10_000),
    waitMs: fc.nat(120),
  });
  const behaviours: readonly (Behaviour | null)[] = [
    null,
    { kind: "fails", afterMs: 5, failure: "unavailable" },
    { kind: "breaks", ttftMs: 30, afterTokens: 3, itlMs: 10 },
  ];

  it("each request of a living peer is answered once, and the books balance", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(step, { minLength: 5, maxLength: 60 }),
        fc.nat(1_000_000),
        async (steps, seed) => {
          const peers = new Peers(["a", "b", "c"], seed);
          const sent: { peer: Peer; id: string; left: boolean }[] = [];
          for (const { what, n, waitMs } of steps) {
            const { alive } = peers;
            const peer = alive[n % alive.length];
            const other = alive[(n >> 4) % alive.length];
            if (peer === undefined || other === undefined) throw new Error("all are dead");
            if (what === "submit") {
              const more: Partial<RequestFacts> = {
                stream: n % 3 > 0,
                cacheRead: n % 7 > 0,
                cacheWrite: n % 11 > 0,
                deadlineAtMs: peers.clock.nowUs() / 1000 + 100 + (n % 10) * 1000,
              };
              const id = peer.world.submit(`q${n % 4}`, more);
              sent.push({ peer, id, left: false });
            } else if (what === "leave") {
              const one = sent[n % Math.max(1, sent.length)];
              if (one !== undefined && !one.peer.isDead) {
                one.left = true;
                one.peer.world.leave(one.id);
              }
            } else if (what === "fault") {
              peer.world.setBehaviour("n1", behaviours[n % behaviours.length] ?? null);
            } else if (what === "blip") peers.cut(peer.id, other.id, true);
            else if (what === "cut") peers.cut(peer.id, other.id);
            else if (what === "heal") peers.heal();
            else if (what === "view") {
              const owners = n % 5 === 0 ? [peer.id, other.id] : alive.map(({ id }) => id);
              peers.setView(owners, n % 3 === 0 ? [other.id] : [], n % 2 === 0 ? alive : [peer]);
            } else if (what === "kill" && alive.length > 2) {
              peers.kill(peer.id);
              if (n % 2 === 0) peers.setView();
            } else if (what === "start") {
              const id = ["a", "b", "c", "d"].find((each) => alive.every((p) => p.id !== each));
              if (id !== undefined) {
                peers.add(id, seed);
                peers.setView();
              }
            } else if (what === "crash") {
              const shard = peer.world.refs.cache.own[n % 8];
              if (shard !== undefined) peer.world.crash(shard);
            }
            peers.run(1 + (waitMs % 40));
          }
          peers.heal();
          for (const { world } of peers.alive) world.setBehaviour("n1", null);
          peers.setView();
          peers.run(90_000);
          for (const { peer, id, left } of sent) {
            if (peer.isDead) continue;
            const count = peers.answers(peer, id);
            if (left) expect(count).toBeLessThanOrEqual(1);
            else expect([id, count]).toEqual([id, 1]);
          }
          for (const { world } of peers.alive) expect(world.front.lateAttaches).toEqual([]);
          await peers.expectBalanced();
        },
      ),
      { numRuns: Number(process.env.RUNS ?? 100) },
    );
  });
});
