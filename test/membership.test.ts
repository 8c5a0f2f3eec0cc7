import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  type Member,
  Membership,
  membershipDefaults,
  parseMember,
  type View,
} from "../actors/membership.ts";
import { PhiDetector } from "../actors/phi-detector.ts";
import { Random } from "../runtime/random.ts";
import { ClusterModel } from "./cluster-model.ts";

fc.configureGlobal({ seed: 20_260_114 });

const IDS = ["a", "b", "c", "d", "e"];
/** From a fault's end until whoever it touched must be everyone's member again. */
const BACK_MS = 4000;

/** All of them, met and settled. */
function settled(seed: number | string, table = false, seeds = IDS.slice(0, 2)): ClusterModel {
  const model = new ClusterModel(seed, seeds, { table });
  for (const id of IDS) model.start(id);
  model.run(8000);
  expect(model.disagreement()).toBeUndefined();
  for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
  return model;
}

describe("phi detector", () => {
  const options = { heartbeatMs: 250, pauseMs: 1500, sigmaMsMin: 50 };

  it("phi detector: passes 8 after 2.0 s of silence (250 ms, pause 1.5 s, σ 50 ms)", () => {
    const detector = new PhiDetector(options, 0);
    for (let beat = 1; beat <= 100; beat++) detector.heard(beat * 250);
    const lastMs = 25_000;
    expect(detector.phi(lastMs + 250, 0)).toBeLessThan(0.001);
    expect(detector.phi(lastMs + 1980, 0)).toBeLessThan(8);
    expect(detector.phi(lastMs + 2050, 0)).toBeGreaterThan(8);
    expect(detector.phi(lastMs + 2050, 100)).toBeLessThan(8);
    expect(detector.phi(lastMs + 60_000, 0)).toBe(Number.POSITIVE_INFINITY);
  });

  it("phi detector: the reference's other settings (1000/3000/100: 4.5 s, 500/1000/100: 2.0 s)", () => {
    const silence = (heartbeatMs: number, pauseMs: number, sigmaMsMin: number): number => {
      const detector = new PhiDetector({ heartbeatMs, pauseMs, sigmaMsMin }, 0);
      let ms = 0;
      while (detector.phi(ms, 0) < 8) ms += 10;
      return ms;
    };
    expect(silence(1000, 3000, 100) / 1000).toBeCloseTo(4.5, 1);
    expect(silence(500, 1000, 100) / 1000).toBeCloseTo(2.0, 1);
    expect(silence(250, 750, 50) / 1000).toBeCloseTo(1.26, 1);
  });

  it("phi detector: grows with silence, and is past 8 within 2.6 s whatever came before", () => {
    const gaps = fc.array(fc.integer({ min: 1, max: 5000 }), { maxLength: 60 });
    fc.assert(
      fc.property(gaps, (intervals) => {
        const detector = new PhiDetector(options, 0);
        let nowMs = 0;
        for (const ms of intervals) {
          nowMs += ms;
          detector.heard(nowMs);
        }
        let before = 0;
        for (let ms = 0; ms <= 2600; ms += 50) {
          const phi = detector.phi(nowMs + ms, 0);
          expect(phi).toBeGreaterThanOrEqual(before);
          before = phi;
        }
        expect(before).toBeGreaterThan(8);
      }),
    );
  });
});

describe.each([false, true])("membership (table of leases: %s)", (table) => {
  it("membership: peers that know one seed meet, and agree on epoch and owners", () => {
    const model = settled(1, table);
    expect(new Set(IDS.map((id) => model.view(id).epoch)).size).toBe(1);
    expect(IDS.flatMap((id) => model.view(id).suspects)).toEqual([]);
  });

  it("membership: ownership settles within 3 s of a crash, on all that are left (any moment, reset or silent)", () => {
    const slowest: number[] = [];
    for (let seed = 0; seed < 40; seed++) {
      const model = settled(seed, table);
      const random = new Random(seed);
      model.run(random.next() * 3000);
      const victim = IDS[random.int(IDS.length)] ?? "a";
      const left = IDS.filter((id) => id !== victim);
      const crashedAtMs = model.nowMs;
      model.crash(victim, random.next() < 0.5);
      let settledAtMs = Number.POSITIVE_INFINITY;
      model.onSample = () => {
        const done =
          model.disagreement() === undefined &&
          left.every((id) => model.view(id).owners.join() === left.join());
        settledAtMs = done ? Math.min(settledAtMs, model.nowMs) : Number.POSITIVE_INFINITY;
      };
      model.run(10_000);
      slowest.push(settledAtMs - crashedAtMs);
      // Nobody else was taken for dead.
      const removed = model.events.filter(({ event }) => event.kind === "membership.removed");
      for (const { event } of removed) expect(event).toMatchObject({ id: victim });
    }
    expect(Math.max(...slowest)).toBeLessThan(3000);
    expect(Math.min(...slowest)).toBeGreaterThan(table ? 1000 : 2000);
  });

  it("membership: who leaves in order owns nothing more at once, and is not missed", () => {
    const model = settled(3, table);
    model.leave("c");
    model.run(200);
    for (const id of ["a", "b", "d", "e"]) {
      expect(model.view(id).owners).toEqual(["a", "b", "d", "e"]);
      expect(model.view(id).lost).toEqual([]);
    }
    model.run(30_000);
    expect(model.events.filter(({ event }) => event.kind === "membership.removed")).toEqual([]);
    expect(model.disagreement()).toBeUndefined();
  });

  it("membership: a peer frozen for 10 s is removed, accuses nobody when it thaws, and is back at once", () => {
    const model = settled(4, table);
    model.freeze("d");
    model.run(10_000);
    expect(model.view("a").owners).toEqual(["a", "b", "c", "e"]);
    expect(model.view("a").lost).toEqual(["d"]);
    model.thaw("d");
    model.run(table ? 3000 : 1500);
    for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
    const byD = model.events.filter(
      ({ id, event }) => id === "d" && event.kind === "membership.removed",
    );
    expect(byD).toEqual([]);
    expect(model.disagreement()).toBeUndefined();
  });

  it("membership: a removed peer that starts again comes with a new incarnation and is a member within 2 s", () => {
    const model = settled(5, table);
    model.crash("b", true);
    model.run(5000);
    model.start("b");
    model.run(2000);
    for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
    expect(model.view("a").lost).toEqual([]);
  });

  it("membership: one that starts again before anyone missed it, with its old life's links hanging, replaces it", () => {
    const model = settled(6, table);
    model.crash("b", true);
    model.run(300);
    model.start("b");
    model.run(4000);
    expect(model.disagreement()).toBeUndefined();
    for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
    expect(model.view("a").lost).toEqual([]);
  });

  it("membership: after quiet all that run have the same view, and nobody well connected is out for long (any schedule)", () => {
    fc.assert(
      fc.property(schedule, fc.nat(), (steps, seed) => {
        const model = settled(seed, table, IDS);
        const openly = watchMembers(model, table);
        for (const step of steps) take(model, step);
        for (const id of IDS) mend(model, id);
        for (const id of IDS) model.cutOffTable(id, false);
        model.run(20_000);
        expect(openly).toEqual([]);
        expect(model.disagreement()).toBeUndefined();
        const running = model.running().map(({ id }) => id);
        for (const id of running) expect(model.view(id).owners).toEqual(running.sort());
        for (const id of running) expect(model.view(id).suspects).toEqual([]);
      }),
      { numRuns: 60 },
    );
  }, 60_000);
});

describe("membership without a table", () => {
  it("membership: the sides of a partition go on alone, each without the other, and merge when it heals", () => {
    const model = settled(7);
    split(model, ["a", "b"], 1);
    model.run(30_000);
    for (const id of ["a", "b"]) {
      expect(model.view(id).owners).toEqual(["a", "b"]);
      expect(model.view(id).lost).toEqual(["c", "d", "e"]);
    }
    for (const id of ["c", "d", "e"]) expect(model.view(id).owners).toEqual(["c", "d", "e"]);
    const epochs = IDS.map((id) => model.view(id).epoch);
    split(model, ["a", "b"], -1);
    model.run(2000);
    for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
    for (const id of IDS) expect(model.view(id).epoch).toBeGreaterThan(Math.max(...epochs));
    expect(model.disagreement()).toBeUndefined();
  });

  it("membership: while a third hears it, nobody removes a peer that one cannot reach", () => {
    const model = settled(8);
    model.block("a", "b", 1);
    model.run(60_000);
    expect(model.events.filter(({ event }) => event.kind === "membership.removed")).toEqual([]);
    for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
    expect(model.view("b").suspects).toEqual(["a"]);
    expect(model.view("c").suspects).toEqual([]);
    model.block("a", "b", -1);
    model.run(2000);
    expect(model.view("b").suspects).toEqual([]);
  });

  it("membership: one alone starts as soon as it knows that nobody is to be waited for, else after 2 s", () => {
    const alone = new ClusterModel(1, []);
    alone.start("a");
    alone.run(250);
    expect(alone.view("a").owners).toEqual(["a"]);
    // Its own address is no seed.
    const own = new ClusterModel(1, ["a"]);
    own.start("a");
    own.run(250);
    expect(own.view("a").owners).toEqual(["a"]);
    const waiting = new ClusterModel(1, ["z"]);
    waiting.start("a");
    waiting.run(1900);
    expect(waiting.view("a").owners).toEqual([]);
    waiting.run(500);
    expect(waiting.view("a").owners).toEqual(["a"]);
  });

  it("membership: of two processes with one id the later to join stays, the earlier owns nothing and says so", () => {
    const now = 10_000;
    const self: Member = { id: "a", incarnation: 5, address: "ws://one:1", version: "1" };
    const first = new Membership(self, membershipDefaults, 0);
    first.tick({ loopLagMs: 0, queueDepth: 0 }, 250);
    expect(first.state).toBe("alive");
    // The clock of the second runs behind: it goes above what it hears while it joins.
    const other = { ...self, incarnation: 3, address: "ws://two:1" };
    const second = new Membership(other, membershipDefaults, now);
    second.discovered(["ws://one:1"]);
    second.take();
    second.merge(first.view(), now);
    expect(second.take()).toContainEqual({
      kind: "event",
      event: { kind: "membership.reincarnated", incarnation: 6 },
    });
    expect(second.state).toBe("alive");
    first.merge(second.view(), now);
    expect(first.state).toBe("superseded");
    const effects = first.take();
    expect(effects).toContainEqual({
      kind: "event",
      event: { kind: "membership.superseded", address: "ws://two:1", incarnation: 6 },
    });
    const last = effects.filter(({ kind }) => kind === "view_changed").at(-1);
    expect(last).toMatchObject({ view: { owners: [] } });
    // It says nothing any more, and hears nothing.
    first.tick({ loopLagMs: 0, queueDepth: 0 }, now + 250);
    expect(first.take()).toEqual([]);
    second.merge(first.view(), now);
    expect(second.state).toBe("alive");
  });

  it("membership: two processes with one id and one incarnation do not both stay", () => {
    const make = (address: string): Membership => {
      const peer = new Membership(
        { id: "a", incarnation: 5, address, version: "1" },
        membershipDefaults,
        0,
      );
      peer.tick({ loopLagMs: 0, queueDepth: 0 }, 250);
      return peer;
    };
    const [one, two] = [make("ws://one:1"), make("ws://two:1")];
    one.merge(two.view(), 300);
    two.merge(one.view(), 300);
    expect([one.state, two.state]).toEqual(["superseded", "alive"]);
  });

  it("membership: a lagging process, or a lagging peer, is given up to 2 s more", () => {
    const silence = (ownLagMs: number, peerLagMs: number): number => {
      const peer = new Membership(
        { id: "a", incarnation: 1, address: "ws://a:1", version: "1" },
        membershipDefaults,
        0,
      );
      const b: Member = { id: "b", incarnation: 1, address: "ws://b:1", version: "1" };
      peer.linkUp("b", 0);
      peer.merge({ epoch: 1, entries: [{ ...b, state: "alive", stamp: 1 }] }, 0);
      const heartbeat = { queueDepth: 0, epoch: 1, viewHash: 0, renewsLease: false, heard: [] };
      for (let seq = 1; seq <= 10; seq++) {
        peer.heartbeat("b", 1, { ...heartbeat, seq, loopLagMs: peerLagMs }, seq * 250);
        peer.tick({ loopLagMs: ownLagMs, queueDepth: 0 }, seq * 250);
      }
      for (let ms = 250; ms < 20_000; ms += 50) {
        peer.tick({ loopLagMs: ownLagMs, queueDepth: 0 }, 2500 + ms);
        const view = peer.take().findLast(({ kind }) => kind === "view_changed");
        if (view?.kind === "view_changed" && view.view.owners.join() === "a") return ms;
      }
      return Number.POSITIVE_INFINITY;
    };
    expect(silence(0, 0)).toBe(2550);
    expect(silence(600, 0)).toBe(3150);
    expect(silence(0, 600)).toBe(3150);
    expect(silence(60_000, 60_000)).toBe(4550);
  });

  it("membership: a view made of two has an epoch above both, one that says the same the higher of the two", () => {
    const entry = (
      id: string,
      state: "alive" | "left" = "alive",
      stamp = 1,
    ): View["entries"][number] => ({
      ...{ id, incarnation: 1, address: `ws://${id}:1`, version: "1" },
      state,
      stamp,
    });
    const self: Member = { id: "a", incarnation: 1, address: "ws://a:1", version: "1" };
    const peer = new Membership(self, membershipDefaults, 0);
    peer.merge({ epoch: 6, entries: [entry("b")] }, 0);
    const { epoch, entries } = peer.view();
    peer.merge({ epoch: epoch + 3, entries }, 0);
    expect(peer.epoch).toBe(epoch + 3);
    // Neither view had both c and b.
    peer.merge({ epoch: epoch + 3, entries: [entry("c")] }, 0);
    expect(peer.epoch).toBe(epoch + 4);
    // Theirs says less: it has an epoch below that of what is made of it.
    peer.merge({ epoch: epoch + 9, entries: [entry("c")] }, 0);
    expect(peer.epoch).toBe(epoch + 10);
    // Leaving is final: a removal, stamped later by one who did not know, does not make it a loss.
    const view = peer.view();
    peer.merge({ epoch: 99, entries: [{ ...entry("c"), state: "removed", stamp: 99 }] }, 0);
    peer.merge({ ...view, entries: [...view.entries, entry("c", "left", 20)] }, 0);
    const last = peer.take().findLast(({ kind }) => kind === "view_changed");
    expect(last).toMatchObject({ view: { lost: [] } });
  });

  it("membership: views merge to the same in any order, once or twice (any views)", () => {
    const entry = fc.record({
      id: fc.constantFrom("b", "c", "d"),
      incarnation: fc.integer({ min: 1, max: 3 }),
      address: fc.constantFrom("ws://x:1", "ws://y:1"),
      version: fc.constant("1"),
      state: fc.constantFrom("joining" as const, "alive" as const, "left" as const),
      stamp: fc.integer({ min: 0, max: 4 }),
    });
    const view = fc.record({
      epoch: fc.integer({ min: 4, max: 9 }),
      entries: fc.array(entry, { maxLength: 4 }),
    });
    const live = (views: readonly View[]): unknown => {
      const self: Member = { id: "a", incarnation: 1, address: "ws://a:1", version: "1" };
      const peer = new Membership(self, membershipDefaults, 0);
      for (const one of views) peer.merge(one, 0);
      const { entries } = peer.view();
      // Of one never met that is gone nothing is kept, so it depends on the order whether it is known.
      return entries
        .filter(({ state, id }) => id !== "a" && (state === "alive" || state === "joining"))
        .sort((x, y) => (x.id < y.id ? -1 : 1));
    };
    fc.assert(
      fc.property(fc.array(view, { maxLength: 5 }), (views) => {
        const all = [...views, ...views];
        expect(live([...all, ...all].reverse())).toEqual(live([...all, ...all]));
      }),
    );
  });
});

describe("membership from a table", () => {
  it("membership: what one peer keeps there another can read, and nothing else passes (any value)", () => {
    const member = { id: "a", incarnation: 1, address: "ws://a:1", version: "1" };
    expect(parseMember({ ...member, more: 1 })).toEqual(member);
    fc.assert(fc.property(fc.anything(), (value) => typeof parseMember(value) === "string"));
    const spoilt = [{ id: "" }, { id: "x".repeat(257) }, { incarnation: 0 }, { incarnation: 1.5 }];
    for (const part of [...spoilt, { incarnation: "1" }, { address: 1 }, { version: null }])
      expect(typeof parseMember({ ...member, ...part })).toBe("string");
  });
});

describe("membership with a table", () => {
  it("membership: the table lost for all freezes the view; a crash then removes nobody until it is back", () => {
    const model = settled(9, true);
    if (model.table === undefined) throw new Error("there is a table");
    model.table.isUp = false;
    model.run(20_000);
    for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
    model.crash("e", true);
    model.run(20_000);
    for (const id of ["a", "b", "c", "d"]) {
      expect(model.view(id).owners).toEqual(IDS);
      expect(model.view(id).suspects).toEqual(["e"]);
    }
    const moved = countMoves(model);
    model.table.isUp = true;
    model.run(12_000);
    for (const id of ["a", "b", "c", "d"])
      expect(model.view(id).owners).toEqual(["a", "b", "c", "d"]);
    // One change: without e. Nobody else came or went meanwhile.
    expect(moved()).toEqual(["a,b,c,d"]);
    expect(model.disagreement()).toBeUndefined();
  });

  it("membership: a table that was out of reach for all moves nothing when it is back", () => {
    const model = settled(14, true);
    if (model.table === undefined) throw new Error("there is a table");
    const moved = countMoves(model);
    model.table.isUp = false;
    model.run(20_000);
    model.table.isUp = true;
    model.run(20_000);
    expect(moved()).toEqual([]);
    expect(model.disagreement()).toBeUndefined();
  });

  it("membership: a table that comes back empty moves nothing", () => {
    const model = settled(10, true);
    if (model.table === undefined) throw new Error("there is a table");
    model.table.isUp = false;
    model.table.lose();
    model.run(10_000);
    const moved = countMoves(model);
    model.table.isUp = true;
    model.run(20_000);
    expect(moved()).toEqual([]);
    expect(model.disagreement()).toBeUndefined();
    for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
  });

  it("membership: the table lost for one: it stops owning before its lease ends, and owns again when it is back", () => {
    const model = settled(11, true);
    model.cutOffTable("c", true);
    let ownedAtMs = 0;
    const cutAtMs = model.nowMs;
    let takenAtMs = 0;
    model.onSample = () => {
      if (model.view("c").owners.includes("c")) ownedAtMs = model.nowMs;
      if (takenAtMs === 0 && !model.view("a").owners.includes("c")) takenAtMs = model.nowMs;
    };
    model.run(20_000);
    const others = ["a", "b", "d", "e"];
    for (const id of IDS) expect(model.view(id).owners).toEqual(others);
    // Its last renewal was up to 2 s before; the lease is 6 s, and ends for it at 5 s.
    expect(ownedAtMs - cutAtMs).toBeLessThan(5200);
    expect(takenAtMs - ownedAtMs).toBeGreaterThan(500);
    model.onSample = undefined;
    model.cutOffTable("c", false);
    model.run(4000);
    for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
  });

  it("membership: without a table from the start peers go on after 2 s, and it takes over when it is there", () => {
    const model = new ClusterModel(12, ["a"], { table: true });
    if (model.table === undefined) throw new Error("there is a table");
    model.table.isUp = false;
    for (const id of IDS) model.start(id);
    model.run(5000);
    for (const id of IDS) expect(model.view(id).owners).toEqual(IDS);
    const moved = countMoves(model);
    model.table.isUp = true;
    model.run(20_000);
    expect(moved()).toEqual([]);
    expect(model.disagreement()).toBeUndefined();
    model.crash("a", false);
    model.run(3000);
    expect(model.view("b").owners).toEqual(["b", "c", "d", "e"]);
  });
});

// ---- schedules -------------------------------------------------------------------------------------------------

const who = fc.constantFrom(...IDS);
const schedule = fc.array(
  fc.record({
    waitMs: fc.oneof(fc.integer({ min: 0, max: 500 }), fc.integer({ min: 0, max: 8000 })),
    what: fc.oneof(
      fc.record({ kind: fc.constantFrom("crash", "power_off", "start", "leave"), id: who }),
      fc.record({ kind: fc.constantFrom("freeze", "mend", "cut_off"), id: who }),
      fc.record({ kind: fc.constantFrom("block", "unblock"), id: who, to: who }),
    ),
  }),
  { minLength: 1, maxLength: 14, size: "max" },
);
type Step = typeof schedule extends fc.Arbitrary<(infer S)[]> ? S : never;

function take(model: ClusterModel, { waitMs, what }: Step): void {
  model.run(waitMs);
  const proc = model.procs.get(what.id);
  if (proc === undefined) return;
  const isThere = proc.isUp && !proc.hasLeft;
  switch (what.kind) {
    case "crash":
    case "power_off":
      if (isThere) model.crash(what.id, what.kind === "power_off");
      return;
    case "start":
      if (!proc.isUp) model.start(what.id);
      return;
    case "leave":
      if (isThere && !proc.isFrozen) model.leave(what.id);
      return;
    case "freeze":
      if (isThere && !proc.isFrozen) model.freeze(what.id);
      return;
    case "mend":
      return mend(model, what.id);
    case "cut_off":
      model.cutOffTable(what.id, true);
      return;
    case "block":
      if ("to" in what) setBlock(model, what.id, what.to, true);
      return;
    case "unblock":
      if ("to" in what) setBlock(model, what.id, what.to, false);
      return;
  }
}

function setBlock(model: ClusterModel, from: string, to: string, isSet: boolean): void {
  if (from === to || model.isBlocked(from, to) === isSet) return;
  model.block(from, to, isSet ? 1 : -1);
}

/** Takes away all that ails it. */
function mend(model: ClusterModel, id: string): void {
  const proc = model.procs.get(id);
  if (proc?.isFrozen === true && proc.isUp) model.thaw(id);
  for (const other of IDS) {
    setBlock(model, id, other, false);
    setBlock(model, other, id, false);
  }
}

function split(model: ClusterModel, side: readonly string[], by: 1 | -1): void {
  for (const one of side) {
    for (const other of IDS) {
      if (side.includes(other)) continue;
      model.block(one, other, by);
      model.block(other, one, by);
    }
  }
}

/** Notes every pair of peers that has long been well, and of which one is no member for the other. */
function watchMembers(model: ClusterModel, table: boolean): string[] {
  const found: string[] = [];
  model.onSample = () => {
    if (table && !model.isTableWhole) return; // Without its lease a peer rightly owns nothing.
    const well = model.running().filter(({ id, faultAtMs }) => {
      const isBlocked = IDS.some((o) => model.isBlocked(id, o) || model.isBlocked(o, id));
      return !isBlocked && model.nowMs - faultAtMs > BACK_MS;
    });
    for (const { id, view } of well)
      for (const other of well)
        if (!view.owners.includes(other.id))
          if (found.length < 5) found.push(`${id} misses ${other.id} at ${model.nowMs}`);
  };
  return found;
}

/** The owners that anybody saw from now on, beyond those of now. */
function countMoves(model: ClusterModel): () => string[] {
  const before = new Set(model.running().map(({ view }) => view.owners.join()));
  const seen = new Set<string>();
  model.onView = (view) => {
    const owners = view.owners.join();
    if (!before.has(owners)) seen.add(owners);
  };
  return () => [...seen];
}
