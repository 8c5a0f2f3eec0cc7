/** 100 requests a second per key, asked for 400 times a second through 4 peers. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { ClusterLimiterActor, clusterLimiterDefaults } from "../actors/cluster-limiter.ts";
import type { LimitStoreCommand } from "../actors/edges.ts";
import { bucketOf, OwnerTable } from "../actors/ownership.ts";
import type { Limits } from "../actors/protocol.ts";
import type { ReplyTo } from "../runtime/actor.ts";
import { type KitEffect, refTo, testActor } from "./actor-kit.ts";
import { LimitWorld } from "./limit-world.ts";

fc.configureGlobal({ seed: 20_260_114 });

const RATE = 100;
const BURST = 100;
const SECONDS = 60;
const limits: Limits = { requestsPerMinute: RATE * 60, requestBurst: BURST };
/** As the header states it. */
const SETTLE_S = 3;
const bound = (changes: number, seconds = SECONDS): number =>
  RATE * seconds + BURST + changes * (RATE * SETTLE_S + 1.5 * BURST);

const PEERS = ["peer-1", "peer-2", "peer-3", "peer-4"];
const ownerOf = (key: string): string => new OwnerTable(1, PEERS).owner(bucketOf(key)) ?? "";
/** A key that this peer keeps. */
function keyOf(owner: string): string {
  for (let n = 0; ; n++) if (ownerOf(`key-${n}`) === owner) return `key-${n}`;
}

const figures: [string, number, number][] = [];

function admitted(
  what: string,
  world: LimitWorld,
  changes: number,
  at: (world: LimitWorld) => Record<number, () => void>,
  key = keyOf("peer-1"),
  more: Limits = limits,
): number {
  world.drive(key, more, 4 * RATE, SECONDS, at(world));
  figures.push([what, world.count(key), bound(changes)]);
  expect(world.count(key)).toBeLessThanOrEqual(bound(changes));
  return world.count(key);
}

const half = ["peer-1", "peer-2"];
const parts = (world: LimitWorld) => ({
  20: () => world.partition(half, 1),
  40: () => world.partition(half, -1),
});

describe("cluster limiter: 100/s through 4 peers at 400/s for 60 s", () => {
  it("cluster limiter: without a store exactly the limit (no change of owner)", () => {
    const world = new LimitWorld(1, 4, false);
    const count = admitted("no store", world, 0, () => ({}));
    expect(count).toBeGreaterThan(RATE * SECONDS - BURST);
    expect([...world.outcomes.keys()].sort()).toEqual(["granted", "rate_limit_requests"]);
  });

  it("cluster limiter: with a store exactly the limit", async () => {
    const world = new LimitWorld(2, 4, true);
    const count = admitted("store", world, 0, () => ({}));
    expect(count).toBeGreaterThanOrEqual(RATE * SECONDS + BURST - 1);
    for (const root of PEERS) {
      const { byStore, byOwner, byThisPeer } = await world.limits(root);
      expect([byStore, byOwner, byThisPeer]).toEqual([RATE * SECONDS, 0, 0]);
    }
  });

  it("cluster limiter: with a store exactly the limit, also through a partition of the peers", () => {
    const world = new LimitWorld(3, 4, true);
    const count = admitted("store, partition 2|2", world, 0, parts);
    expect(count).toBeGreaterThanOrEqual(RATE * SECONDS + BURST - 1);
  });

  it("cluster limiter: with a store exactly the limit, also for a peer that does not reach it", async () => {
    const world = new LimitWorld(4, 4, true);
    const key = keyOf("peer-1");
    world.storeAway.add("peer-3");
    world.storeHangs.add("peer-4");
    admitted("store, two peers cut off from it", world, 0, () => ({}), key);
    const { byOwner, byStore, storeFailures } = await world.limits("peer-3");
    expect(byOwner).toBe(RATE * SECONDS);
    expect(byStore).toBe(0);
    // It is tried again once a second, not by every request.
    expect(storeFailures).toBeGreaterThan(50);
    expect(storeFailures).toBeLessThan(70);
  });

  it("cluster limiter: a partition of 20 s without a store stays within the bound, and both sides go on", () => {
    const world = new LimitWorld(5, 4, false);
    const fromMs = world.nowMs;
    const count = admitted("no store, partition 2|2 (2 changes)", world, 2, parts);
    expect(count).toBeGreaterThan(RATE * SECONDS - 3 * BURST);
    // Once it has settled, each side has half.
    const settled = world.perSecond(keyOf("peer-1"), fromMs).slice(25, 39);
    for (const perSecond of settled) expect(perSecond).toBeLessThanOrEqual(RATE + 1);
    for (const perSecond of settled) expect(perSecond).toBeGreaterThan(RATE / 2);
  });

  it("cluster limiter: the owner's crash and return stay within the bound", () => {
    const world = new LimitWorld(6, 4, false);
    const count = admitted("no store, owner crashes and returns (2 changes)", world, 2, (w) => ({
      20: () => w.crash("peer-1"),
      40: () => w.restart("peer-1"),
    }));
    // Meanwhile three quarters of the limit, and the fourth peer's clients are gone.
    expect(count).toBeGreaterThan(RATE * SECONDS * 0.85);
  });

  it("cluster limiter: a store lost for all and found again stays within the bound", () => {
    const world = new LimitWorld(7, 4, true);
    const all = (isAway: boolean) => () => {
      for (const root of PEERS)
        if (isAway) world.storeAway.add(root);
        else world.storeAway.delete(root);
    };
    const count = admitted("store lost for 20 s (2 changes)", world, 2, () => ({
      20: all(true),
      40: all(false),
    }));
    expect(count).toBeGreaterThan(RATE * SECONDS);
  });

  it("cluster limiter: a key that is to be refused without its owner is, until another peer owns it", async () => {
    const strict: Limits = { ...limits, whenUnreachable: "refuse" };
    const world = new LimitWorld(8, 4, false);
    const key = keyOf("peer-1");
    admitted("no store, partition 2|2, refuse (2 changes)", world, 2, parts, key, strict);
    expect(world.outcomes.get("limit_unavailable")).toBeGreaterThan(0);
    const { refusedUnreachable, byShare } = await world.limits("peer-3");
    expect(refusedUnreachable).toBeGreaterThan(50); // 25 a second, for the two seconds and more before it is settled.
    expect(refusedUnreachable).toBeLessThan(SETTLE_S * RATE);
    expect(byShare).toBeGreaterThan(0); // From then on the new owner keeps to its side's share.
  });

  it("cluster limiter: in a lasting partition a side takes the others for dead after a minute, unless told to refuse", () => {
    const strict: Limits = { ...limits, whenUnreachable: "refuse" };
    const rates = [limits, strict].map((of, seed) => {
      const world = new LimitWorld(seed, 4, false);
      world.partition(half, 1);
      world.run(80_000);
      const key = keyOf("peer-1");
      world.drive(key, of, 4 * RATE, 30);
      return world.count(key) / 30;
    });
    expect(rates[0]).toBeGreaterThan(1.9 * RATE);
    expect(rates[1]).toBeLessThan(1.1 * RATE);
  });

  it("cluster limiter: the bound holds (any partitions and crashes)", () => {
    const fault = fc.record({
      atS: fc.integer({ min: 1, max: 20 }),
      lastsS: fc.integer({ min: 1, max: 10 }),
      what: fc.constantFrom("partition", "crash", "store"),
      who: fc.integer({ min: 0, max: 3 }),
    });
    fc.assert(
      fc.property(
        fc.array(fault, { minLength: 1, maxLength: 2 }),
        fc.nat(),
        fc.boolean(),
        (faults, seed, hasStore) => {
          const world = new LimitWorld(seed, 4, hasStore);
          const at: Record<number, () => void> = {};
          const add = (second: number, act: () => void): void => {
            const before = at[second];
            at[second] = () => {
              before?.();
              act();
            };
          };
          const down = new Set<string>();
          for (const { atS, lastsS, what, who } of faults) {
            const root = PEERS[who] ?? "peer-1";
            if (what === "partition") {
              add(atS, () => world.partition([root], 1));
              add(atS + lastsS, () => world.partition([root], -1));
            } else if (what === "store") {
              add(atS, () => world.storeAway.add(root));
              add(atS + lastsS, () => world.storeAway.delete(root));
            } else if (!down.has(root)) {
              down.add(root);
              add(atS, () => world.crash(root));
              add(atS + lastsS, () => world.restart(root));
            }
          }
          const key = keyOf("peer-1");
          world.drive(key, limits, 4 * RATE, 32, at);
          expect(world.count(key)).toBeLessThanOrEqual(bound(2 * faults.length, 32));
        },
      ),
      { numRuns: 12 },
    );
  }, 60_000);

  it("cluster limiter: figures", () => {
    const lines = figures.map(
      ([what, count, most]) => `${what}: ${count} admitted, at most ${most}`,
    );
    console.log(lines.join("\n"));
    expect(figures.length).toBeGreaterThan(0);
  });
});

describe("cluster limiter: books", () => {
  it("cluster limiter: limits in flight hold over all peers, and all places are free at the end", async () => {
    const world = new LimitWorld(9, 4, false);
    const key = keyOf("peer-2");
    // Held for 50 ms each: 3 at a time are 60 a second.
    world.drive(key, { concurrent: 3 }, 400, 10);
    world.run(100);
    expect(world.count(key)).toBeLessThanOrEqual(600 + 3);
    expect(world.count(key)).toBeGreaterThan(500);
    for (const root of PEERS) {
      expect((await world.limits(root)).open).toBe(0);
      expect((await world.limiter(root)).reservations).toBe(0);
    }
    const kept = (await world.limiter("peer-2")).keys.find((one) => one.key === key);
    expect(kept).toMatchObject({ granted: world.count(key), inflight: 0 });
    for (const root of ["peer-1", "peer-3", "peer-4"])
      expect((await world.limiter(root)).keysKnown).toBe(0);
  });

  it("cluster limiter: what a crashed peer held is free again once it is removed; what it was charged stays", async () => {
    const world = new LimitWorld(10, 4, false);
    const key = keyOf("peer-2");
    world.drive(key, { concurrent: 1000, requestsPerMinute: 60, requestBurst: 16 }, 400, 0.03);
    const before = await world.limiter("peer-2");
    expect(before.reservations).toBeGreaterThan(4);
    world.crash("peer-1");
    world.crash("peer-3");
    world.crash("peer-4");
    world.run(4000);
    const after = await world.limiter("peer-2");
    expect(after.reservations).toBe(0);
    expect(after.keys.find((one) => one.key === key)?.inflight).toBe(0);
    // 16 at once, one a second, and half of them to start with: what was charged is not refunded.
    const left = after.keys.find((one) => one.key === key)?.state.requests?.remaining;
    expect(left).toBeLessThanOrEqual(16 - before.reservations + 4);
  });

  it("cluster limiter: the same seed gives the same run", () => {
    const hash = (): string => {
      const world = new LimitWorld(11, 4, false);
      world.drive(keyOf("peer-1"), limits, 400, 5, { 2: () => world.partition(half, 1) });
      return world.scheduler.hash;
    };
    expect(hash()).toBe(hash());
  });
});

// ---- the actor alone -------------------------------------------------------------------------------------------

class Kit {
  readonly kit;
  #requests = 0;

  constructor(hasStore = false) {
    const store = hasStore ? { store: refTo<LimitStoreCommand>("store") } : {};
    this.kit = testActor(
      new ClusterLimiterActor(
        { ...clusterLimiterDefaults, self: "peer-2" },
        { limiter: refTo("limiter"), peer: (id) => refTo(`${id}/limits`), ...store },
      ),
    );
    this.view(1, PEERS);
  }

  view(epoch: number, owners: readonly string[], lost: readonly string[] = []): void {
    const view = { epoch, owners, suspects: [], lost };
    this.kit.send({ kind: "members.view_changed", view });
    this.kit.take();
  }

  answer(index: number, value: unknown): void {
    this.kit.answer(index, { ok: true, value });
  }

  /** What it asked or told for one request. */
  admit(key: string, of: Limits = limits): KitEffect[] {
    this.kit.send({
      kind: "limiter.admit",
      requestId: `q${this.#requests++}`,
      owner: "peer-2/requests",
      key,
      limits: of,
      model: "m",
      promptTokens: 1,
      expiresAtMs: this.kit.nowMs + 1000,
      replyTo: this.kit.replyTo(),
    });
    return this.kit.take();
  }
}

const targets = (effects: readonly KitEffect[]): string[] =>
  effects.flatMap((effect) => (effect.kind === "tell" || effect.kind === "ask" ? [effect.to] : []));
const takeoverIn = ([effect]: readonly KitEffect[]): unknown =>
  effect?.kind === "tell" ? (effect.message as { takeover?: number }).takeover : undefined;

describe("cluster limiter: the actor alone", () => {
  it("cluster limiter: each takeover is told with the key's requests for a minute, and only where it was one", () => {
    const kit = new Kit();
    kit.kit.advance(61_000);
    const [own, others] = [keyOf("peer-2"), keyOf("peer-1")];
    expect(takeoverIn(kit.admit(own))).toBe(0);
    expect(targets(kit.admit(others))).toEqual(["peer-1/limits"]);
    // Peer 1 is gone: some of its keys are this peer's now.
    kit.view(2, ["peer-2", "peer-3", "peer-4"], ["peer-1"]);
    const table = new OwnerTable(2, ["peer-2", "peer-3", "peer-4"]);
    const names = Array.from({ length: 100 }, (_, n) => `key-${n}`);
    const taken = names.find(
      (n) => ownerOf(n) === "peer-1" && table.owner(bucketOf(n)) === "peer-2",
    );
    const first = takeoverIn(kit.admit(taken ?? ""));
    expect(first).toBeGreaterThan(0);
    expect(takeoverIn(kit.admit(taken ?? ""))).toBe(first);
    expect(takeoverIn(kit.admit(own))).toBe(0);
    kit.kit.advance(60_000);
    kit.kit.take();
    expect(takeoverIn(kit.admit(taken ?? ""))).toBe(0);
  });

  it("cluster limiter: an owner that does not answer in time is told to give back, and not asked for a second", () => {
    const kit = new Kit();
    const key = keyOf("peer-1");
    expect(targets(kit.admit(key))).toEqual(["peer-1/limits"]);
    kit.kit.advance(150);
    const effects = kit.kit.take();
    expect(targets(effects)).toEqual(["peer-1/limits", "limiter"]);
    expect(effects[0]).toMatchObject({
      message: { kind: "limits.settle", requestId: "q0", promptTokens: 0, outputTokens: 0 },
    });
    expect(effects[1]).toMatchObject({ message: { limits: { requestsPerMinute: RATE * 15 } } });
    expect(targets(kit.admit(key))).toEqual(["limiter"]);
    kit.kit.advance(1000);
    expect(targets(kit.admit(key))).toEqual(["peer-1/limits"]);
  });

  it("cluster limiter: a peer that names another owner is believed if its view is newer, once", () => {
    const kit = new Kit();
    const key = keyOf("peer-1");
    kit.admit(key);
    kit.answer(0, { kind: "moved", owner: "peer-3", epoch: 2 });
    const resent = kit.kit.take();
    expect(targets(resent)).toEqual(["peer-3/limits"]);
    kit.answer(1, { kind: "moved", owner: "peer-4", epoch: 3 });
    expect(targets(kit.kit.take())).toEqual(["limiter"]); // By its share.
    kit.admit(key);
    kit.answer(2, { kind: "moved", owner: "peer-2", epoch: 2 });
    expect(targets(kit.kit.take())).toEqual(["limiter"]);
    // Whoever asks this peer for a key that it does not keep is told who does.
    const asked = { from: "peer-4", requestId: "x", key, limits, model: "m", promptTokens: 1 };
    const reply = kit.kit.ask((replyTo: ReplyTo<unknown>) => ({
      kind: "limits.admit",
      ...asked,
      expiresInMs: 1000,
      replyTo,
    }));
    expect(reply).toEqual({ kind: "moved", owner: "peer-1", epoch: 1 });
  });

  it("cluster limiter: while the store rests one request alone tries it, and it is asked again once it answers", () => {
    const kit = new Kit(true);
    const key = keyOf("peer-2");
    expect(targets(kit.admit(key))).toEqual(["store"]);
    kit.answer(0, { kind: "away" });
    expect(targets(kit.kit.take())).toEqual(["limiter"]);
    expect(targets(kit.admit(key))).toEqual(["limiter"]);
    kit.kit.advance(1000);
    expect(targets(kit.admit(key))).toEqual(["store"]);
    expect(targets(kit.admit(key))).toEqual(["limiter"]);
    kit.answer(1, { kind: "granted", charge, state: { atMs: 0 } });
    kit.kit.take();
    expect(targets(kit.admit(key))).toEqual(["store"]);
    expect(targets(kit.admit(key))).toEqual(["store"]);
  });

  it("cluster limiter: a key without limits is nobody's business but this peer's", () => {
    const kit = new Kit(true);
    expect(targets(kit.admit(keyOf("peer-1"), {}))).toEqual(["limiter"]);
  });
});

const charge = { tokens: 0, requestNs: 1, tokensNs: -1, day: 0 };
