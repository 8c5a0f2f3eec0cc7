import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { ScraperCommand, UpstreamCommand } from "../actors/edges.ts";
import {
  type AcquireReply,
  GpuNodeActor,
  type GpuNodeEvent,
  type GpuNodeMessage,
  type GpuNodeOptions,
  type NodeChanged,
  type NodeDescription,
} from "../actors/gpu-node.ts";
import type { LeaseOutcome, NodeSnapshot, ScrapeSample } from "../actors/protocol.ts";
import { type KitEffect, refTo, testActor } from "./actor-kit.ts";

fc.configureGlobal({ seed: 20_261_124 });

const routerPath = "headrace/router";
const upstreamPath = "headrace/edges/upstream";
const scraperPath = "headrace/edges/scraper";
const outcomes: readonly LeaseOutcome[] = [
  "ok",
  "failed_local",
  "failed_gateway",
  "overloaded",
  "slow",
  "stalled",
  "client_error",
  "cancelled",
];

type Release = Extract<GpuNodeMessage, { kind: "gpu_node.release" }>;

/** One node actor, and shorthands for what is said to it and what it says. */
function world(options: Partial<GpuNodeOptions> = {}) {
  const kit = testActor(
    new GpuNodeActor({
      node: "a",
      address: "10.0.0.1:8000",
      upstream: refTo<UpstreamCommand>(upstreamPath),
      scraper: refTo<ScraperCommand>(scraperPath),
      ...options,
    }),
  );
  const events = () => kit.emitted() as GpuNodeEvent[];
  const acquire = (leaseId: string, uncachedTokens = 100, owner = "headrace/requests") => {
    const reply = kit.ask<AcquireReply>((replyTo) => ({
      kind: "gpu_node.acquire",
      leaseId,
      owner,
      uncachedTokens,
      replyTo,
    }));
    if (reply === undefined) throw new Error("an acquire is answered in its own turn");
    return reply;
  };
  const release = (leaseId: string, outcome: LeaseOutcome = "ok", more: Partial<Release> = {}) =>
    kit.send({
      kind: "gpu_node.release",
      leaseId,
      outcome,
      e2eMs: 0,
      decodeMs: 0,
      promptTokens: 0,
      outputTokens: 0,
      ...more,
    });
  let calls = 0;
  return {
    kit,
    acquire,
    release,
    firstToken: (leaseId: string) =>
      kit.send({ kind: "gpu_node.first_token", leaseId, ttftMs: 100 }),
    progress: (leaseId: string, outputTokens = 1) =>
      kit.send({ kind: "gpu_node.progress", leaseId, outputTokens }),
    /** One whole call; returns whether it was let in. */
    call: (outcome: LeaseOutcome, more: Partial<Release> = {}) => {
      const leaseId = `call-${calls++}#1`;
      const isGranted = acquire(leaseId).kind === "granted";
      if (isGranted) release(leaseId, outcome, more);
      return isGranted;
    },
    describe: (): NodeDescription => {
      const description = kit.ask<NodeDescription>((replyTo) => ({
        kind: "gpu_node.describe",
        replyTo,
      }));
      if (description === undefined) throw new Error("a describe is answered in its own turn");
      return description;
    },
    subscribe: () => kit.send({ kind: "gpu_node.subscribe", router: { path: routerPath, uid: 1 } }),
    /** Snapshots told to the router since the last take. */
    published: () => kit.told(routerPath).map((message) => (message as NodeChanged).snapshot),
    asks: () =>
      kit
        .effects()
        .filter((effect): effect is KitEffect & { kind: "ask" } => effect.kind === "ask"),
    events,
    eventsOf: <K extends GpuNodeEvent["kind"]>(kind: K) =>
      events().filter((event): event is Extract<GpuNodeEvent, { kind: K }> => event.kind === kind),
    scrape: (sample: Partial<ScrapeSample> = {}) =>
      kit.send({ kind: "scraper.sampled", sample: { engine: "vllm", missing: [], ...sample } }),
    health: (ok: boolean) =>
      kit.send({ kind: "scraper.health", ok, detail: ok ? "200" : "refused" }),
    /** Grants `count` leases named prefix0, prefix1 … */
    fill: (count: number, prefix = "held") => {
      for (let i = 0; i < count; i++) expect(acquire(`${prefix}${i}#1`).kind).toBe("granted");
    },
  };
}

type World = ReturnType<typeof world>;

/** Trips it without a router, and waits until it is half open, its probe asked and not answered. */
function probing(options: Partial<GpuNodeOptions> = {}): World {
  const w = world(options);
  for (let i = 0; i < 3; i++) w.call("failed_local");
  expect(w.describe().snapshot.circuit).toBe("open");
  w.kit.take();
  w.kit.advance(12_000);
  expect(w.describe().snapshot.circuit).toBe("half_open");
  return w;
}

function answerProbe(w: World, answered: boolean): void {
  const probe = w.asks().at(-1);
  expect(probe).toMatchObject({ to: upstreamPath, message: { kind: "upstream.probe", node: "a" } });
  w.kit.answer(probe?.index ?? -1, { ok: true, value: { answered, detail: "HTTP 503" } });
}

function halfOpen(options: Partial<GpuNodeOptions> = {}): World {
  const w = probing(options);
  answerProbe(w, true);
  return w;
}

describe("gpu node: leases", () => {
  it("asks the scraper for its node when it starts, and takes it away when it stops", () => {
    const { kit } = world();
    expect(kit.told(scraperPath)).toEqual([{ kind: "scraper.add", node: "a", replyTo: kit.self }]);
    kit.take();
    kit.stop();
    expect(kit.told(scraperPath)).toEqual([{ kind: "scraper.remove", node: "a" }]);
  });

  it("grants with the snapshot that counts the new lease", () => {
    const { acquire, kit } = world();
    expect(acquire("r1#1", 700)).toEqual({
      kind: "granted",
      leaseId: "r1#1",
      node: "a",
      probe: false,
      snapshot: {
        node: "a",
        address: "10.0.0.1:8000",
        incarnation: kit.self.uid,
        version: 1,
        atMs: 0,
        inflight: 1,
        prefillTokens: 700,
        inflightMax: 256,
        circuit: "closed",
        probePermits: 0,
        draining: false,
        ramp: 1,
        healthy: true,
        restUntilMs: 0,
        articleWeight: 1,
      },
    });
  });

  it("a second acquire of a held lease is granted again and counted once", () => {
    const { acquire, describe } = world({ inflightMax: 1 });
    acquire("r1#1", 700);
    expect(acquire("r1#1", 700).kind).toBe("granted");
    expect(describe().snapshot).toMatchObject({ inflight: 1, prefillTokens: 700 });
    expect(acquire("r2#1")).toMatchObject({ kind: "denied", reason: "full" });
  });

  it("prompt tokens are outstanding until the first token, once", () => {
    const { acquire, firstToken, release, describe } = world();
    acquire("r1#1", 700);
    acquire("r2#1", 30);
    firstToken("r1#1");
    firstToken("r1#1");
    expect(describe().snapshot).toMatchObject({ inflight: 2, prefillTokens: 30 });
    release("r1#1");
    release("r2#1", "cancelled");
    expect(describe().snapshot).toMatchObject({ inflight: 0, prefillTokens: 0 });
  });

  it("messages about an unknown lease change nothing and are counted", () => {
    const w = world();
    w.acquire("r1#1");
    w.release("r1#1");
    const { version } = w.describe().snapshot;
    w.kit.take();
    w.release("r1#1");
    w.firstToken("r1#1");
    w.progress("r1#1");
    expect(w.eventsOf("gpu_node.ignored").map(({ what, reason }) => [what, reason])).toEqual([
      ["release", "unknown_lease"],
      ["first_token", "unknown_lease"],
      ["progress", "unknown_lease"],
    ]);
    expect(w.describe().snapshot.version).toBe(version);
    expect(w.describe().totals.ok).toBe(1);
  });

  it("a lease lives 30 s from its last sign of life", () => {
    const w = world();
    w.acquire("silent#1", 10);
    w.acquire("first#1", 10);
    w.acquire("streaming#1", 10);
    w.kit.advance(20_000);
    w.firstToken("first#1");
    w.progress("streaming#1", 40);
    w.kit.advance(9_999);
    expect(w.describe().leases.map(({ leaseId }) => leaseId)).toContain("silent#1");
    w.kit.take();
    w.kit.advance(1);
    expect(w.eventsOf("gpu_node.lease_expired")).toEqual([
      {
        kind: "gpu_node.lease_expired",
        node: "a",
        leaseId: "silent#1",
        owner: "headrace/requests",
        ageMs: 30_000,
      },
    ]);
    expect(w.describe().snapshot).toMatchObject({ inflight: 2, prefillTokens: 10 });
    w.kit.advance(19_998);
    expect(w.describe().snapshot.inflight).toBe(2);
    w.kit.advance(2);
    expect(w.describe().snapshot).toMatchObject({ inflight: 0, prefillTokens: 0 });
    w.kit.advance(100_000);
    expect(w.kit.timers()).toEqual([]); // Nothing ticks while nothing is held.
  });

  it("a restarted owner loses its leases, and nobody else's", () => {
    const w = world();
    w.acquire("r1#1", 10, "peer1/requests");
    w.acquire("r2#1", 20, "peer2/requests");
    w.acquire("r3#1", 40, "peer1/requests");
    w.kit.send({ kind: "gpu_node.owner_restarted", owner: "peer1/requests" });
    expect(w.describe().leases.map(({ leaseId }) => leaseId)).toEqual(["r2#1"]);
    expect(w.describe().snapshot.prefillTokens).toBe(20);
    expect(w.eventsOf("gpu_node.owner_freed")).toMatchObject([{ leases: 2 }]);
  });

  it("counts of other processes that are no numbers do no harm", () => {
    const w = world();
    for (const [i, tokens] of [Number.NaN, -5, Number.POSITIVE_INFINITY, 0.4].entries()) {
      w.acquire(`r${i}#1`, tokens);
      expect(Number.isSafeInteger(w.describe().snapshot.prefillTokens)).toBe(true);
    }
    for (let i = 0; i < 4; i++) {
      w.release(`r${i}#1`, "ok", { e2eMs: Number.NaN, decodeMs: Number.NaN, outputTokens: 100 });
    }
    const { snapshot } = w.describe();
    expect(snapshot.prefillTokens).toBe(0);
    expect(snapshot.itlSeconds).toBeUndefined();
    expect(snapshot.latencyMsPeakEwma).toBeUndefined();
  });

  it("begins afresh after a crash, and ignores what comes for leases it has lost", () => {
    const before = world();
    before.acquire("r1#1");
    const after = world();
    after.release("r1#1", "failed_local");
    expect(after.describe()).toMatchObject({ leases: [], window: { calls: 0 } });
    after.scrape({ running: 9, waiting: 1 });
    expect(after.describe().othersInflight).toBe(10); // What still runs, counted at once …
    after.scrape({ running: 7, waiting: 0 });
    expect(after.describe().othersInflight).toBe(7); // … until it has ended.
  });

  it("in flight = live leases, prefill = their sum; none is negative, all is 0 when idle (any order)", () => {
    const id = fc.nat(11).map((n) => `r${n}#1`);
    const step = fc.oneof(
      {
        weight: 4,
        arbitrary: fc.record({ do: fc.constant("acquire" as const), id, tokens: fc.nat(5000) }),
      },
      fc.record({ do: fc.constant("first_token" as const), id }),
      fc.record({ do: fc.constant("progress" as const), id }),
      {
        weight: 3,
        arbitrary: fc.record({
          do: fc.constant("release" as const),
          id,
          outcome: fc.constantFrom<LeaseOutcome>("ok", "ok", "ok", "client_error", ...outcomes),
        }),
      },
      fc.record({ do: fc.constant("wait" as const), ms: fc.constantFrom(1, 900, 8000, 29_999) }),
      fc.record({ do: fc.constant("owner" as const), owner: fc.constantFrom("p0", "p1") }),
    );
    const reasons = new Set<string>();
    let expiries = 0;
    fc.assert(
      fc.property(fc.array(step, { minLength: 30, maxLength: 120 }), (steps) => {
        const w = world({ inflightMax: 8, circuit: { localFailures: 1 } });
        const live = new Map<string, { tokens: number; expiresAtMs: number; owner: string }>();
        for (const one of steps) {
          const lease = "id" in one ? live.get(one.id) : undefined;
          const renewed = { expiresAtMs: w.kit.nowMs + 30_000 };
          if (one.do === "acquire") {
            const owner = `p${one.tokens % 2}`;
            const reply = w.acquire(one.id, one.tokens, owner);
            if (lease !== undefined) {
              expect(reply.kind).toBe("granted");
              live.set(one.id, { ...lease, ...renewed });
            } else if (reply.kind === "granted") {
              expect(live.size).toBeLessThan(8);
              live.set(one.id, { tokens: one.tokens, owner, ...renewed });
            } else {
              reasons.add(reply.reason);
              if (reply.reason === "full") expect(live.size).toBeGreaterThanOrEqual(4);
              else expect(reply.snapshot.circuit).not.toBe("closed");
            }
            expect(reply.snapshot.inflight).toBe(live.size);
          } else if (one.do === "first_token") {
            w.firstToken(one.id);
            if (lease !== undefined) live.set(one.id, { ...lease, ...renewed, tokens: 0 });
          } else if (one.do === "progress") {
            w.progress(one.id);
            if (lease !== undefined) live.set(one.id, { ...lease, ...renewed });
          } else if (one.do === "release") {
            w.release(one.id, one.outcome);
            live.delete(one.id);
          } else if (one.do === "owner") {
            w.kit.send({ kind: "gpu_node.owner_restarted", owner: one.owner });
            for (const [key, { owner }] of live) if (owner === one.owner) live.delete(key);
          } else {
            w.kit.advance(one.ms);
            for (const [key, { expiresAtMs }] of live) {
              if (expiresAtMs <= w.kit.nowMs && live.delete(key)) expiries++;
            }
          }
          const { snapshot, leases } = w.describe();
          expect(leases.map(({ leaseId }) => leaseId).sort()).toEqual([...live.keys()].sort());
          expect(snapshot.inflight).toBe(live.size);
          let tokens = 0;
          for (const held of live.values()) tokens += held.tokens;
          expect(snapshot.prefillTokens).toBe(tokens);
          expect(snapshot.inflightMax).toBeGreaterThanOrEqual(4);
        }
        w.kit.advance(30_001);
        expect(w.describe().snapshot).toMatchObject({ inflight: 0, prefillTokens: 0 });
      }),
      { numRuns: 150 },
    );
    // The steps do reach every corner.
    expect([...reasons].sort()).toEqual(["full", "open", "probe_busy"]);
    expect(expiries).toBeGreaterThan(100);
  });
});

describe("gpu node: concurrency cap", () => {
  const capOf = (w: World) => w.describe().snapshot.inflightMax;

  it("overload of the node shrinks the cap to nine tenths of what was in flight, and is no failure", () => {
    const w = world({ inflightMax: 64 });
    w.fill(20);
    w.release("held0#1", "overloaded");
    expect(capOf(w)).toBe(18);
    expect(w.describe().window.failures).toBe(0);
    expect(w.acquire("next#1")).toMatchObject({ kind: "denied", reason: "full" });
    w.release("held1#1");
    expect(w.acquire("next#1").kind).toBe("denied"); // 18 are left, and 18 is the cap.
    w.release("held2#1");
    expect(w.acquire("next#1").kind).toBe("granted");
  });

  it("never falls below 4, nor below a lower ceiling", () => {
    for (const [inflightMax, least] of [
      [64, 4],
      [2, 2],
    ] as const) {
      const w = world({ inflightMax });
      for (let i = 0; i < 5; i++) w.call("overloaded");
      expect(capOf(w)).toBe(least);
    }
  });

  it("overload never raises it, and a cap that grew is published though the call is still denied", () => {
    const w = world({ inflightMax: 64 });
    w.subscribe();
    w.fill(40);
    w.release("held0#1", "overloaded");
    expect(capOf(w)).toBe(36);
    w.kit.take();
    w.kit.advance(5_000);
    expect(w.acquire("x#1")).toMatchObject({ kind: "denied", snapshot: { inflightMax: 37 } });
    expect(w.published()).toMatchObject([{ inflightMax: 37 }]);
    w.scrape({ running: 200, waiting: 0 }); // Others came.
    w.scrape({ kv: 0.99 });
    expect(w.describe()).toMatchObject({ othersInflight: 161 });
    for (let i = 1; i < 40; i++) w.release(`held${i}#1`);
    w.scrape({ running: 0, waiting: 0 });
    expect(capOf(w)).toBe(37);
  });

  it("grows by one per 5 s without overload, only near the cap, up to the ceiling", () => {
    const w = world({ inflightMax: 6 });
    w.call("overloaded");
    w.fill(4);
    w.kit.advance(4_999);
    w.firstToken("held0#1");
    expect(w.acquire("x#1")).toMatchObject({ kind: "denied", reason: "full" });
    w.kit.advance(1);
    expect(w.acquire("x#1")).toMatchObject({ kind: "granted", snapshot: { inflightMax: 5 } });
    w.kit.advance(5_000);
    w.scrape();
    expect(capOf(w)).toBe(6);
    w.kit.advance(5_000);
    w.scrape();
    expect(capOf(w)).toBe(6);
    const idle = world({ inflightMax: 6 });
    idle.call("overloaded");
    idle.kit.advance(60_000);
    idle.scrape();
    expect(capOf(idle)).toBe(4); // Nobody needed more.
  });

  it("the ceiling is what is configured, else a tenth above what the engine tells", () => {
    const told = world();
    told.scrape({ maxSequences: 64 });
    expect(capOf(told)).toBe(70);
    const configured = world({ inflightMax: 48 });
    configured.scrape({ maxSequences: 64 });
    expect(capOf(configured)).toBe(48);
    const overloaded = world();
    overloaded.fill(10);
    overloaded.release("held0#1", "overloaded");
    overloaded.scrape({ maxSequences: 64 });
    expect(capOf(overloaded)).toBe(9); // What was learned stays.
  });

  it("requests that wait for capacity shrink it at the second scrape in a row, to what runs and a few", () => {
    const w = world();
    w.fill(40);
    const full = { running: 36, waiting: 4, maxSequences: 36, kv: 0.5 };
    w.scrape({ ...full, maxSequences: 256 });
    w.scrape({ ...full, waiting: 0 });
    w.scrape(full);
    w.scrape({ ...full, waiting: 3 }); // A few always wait in a busy engine, from step to step.
    w.scrape(full);
    expect(capOf(w)).toBe(39); // A tenth above its seats.
    w.scrape(full);
    expect(capOf(w)).toBe(39); // 36 run, and three more may come.
    w.scrape({ ...full, running: 30, waiting: 4, kv: 0.93 });
    expect(capOf(w)).toBe(36);
    expect(w.eventsOf("gpu_node.cap_changed")).toContainEqual(
      expect.objectContaining({ from: 39, to: 36, cause: "waiting" }),
    );
  });

  it("requests that wait for something else do not", () => {
    const deferred = world();
    deferred.fill(20);
    for (let i = 0; i < 3; i++) deferred.scrape({ waiting: 9, waitingForCapacity: 0, kv: 0.99 });
    expect(capOf(deferred)).toBe(256); // It says so.
    const prefilling = world();
    prefilling.fill(20);
    for (let i = 0; i < 3; i++) prefilling.scrape({ running: 12, waiting: 8, kv: 0.3 });
    expect(capOf(prefilling)).toBe(256); // Memory is there, and seats are as far as is known.
    for (let i = 0; i < 2; i++) prefilling.scrape({ running: 8, waiting: 12, kv: 0.3 });
    expect(capOf(prefilling)).toBe(18); // More wait than run: it cannot take them.
  });

  it("a preemption shrinks it, not below what runs; full memory alone, an unknown gauge or a restarted counter does not", () => {
    const full = world();
    full.fill(20);
    for (let i = 0; i < 3; i++) full.scrape({ running: 20, waiting: 0, kv: 0.99 });
    expect(capOf(full)).toBe(256);
    const preempted = world();
    preempted.fill(20);
    preempted.scrape({ preemptionsTotal: 500 });
    preempted.scrape({ preemptionsTotal: 3 });
    preempted.scrape({ preemptionsTotal: 3 });
    preempted.scrape({});
    expect(capOf(preempted)).toBe(256);
    preempted.scrape({ preemptionsTotal: 3 });
    preempted.scrape({ preemptionsTotal: 4, running: 19 });
    expect(capOf(preempted)).toBe(19);
    preempted.scrape({ preemptionsTotal: 5, running: 12 });
    expect(capOf(preempted)).toBe(18);
  });
});

describe("gpu node: circuit", () => {
  it("a node that answers 503 in 5 ms gets less than 1 % of the traffic after 3 s", () => {
    const w = world();
    w.subscribe();
    let granted = 0;
    let offered = 0;
    for (let nowMs = 0; nowMs < 60_000; nowMs += 5) {
      if (w.call("failed_gateway")) granted += nowMs >= 3000 ? 1 : 0;
      offered += nowMs >= 3000 ? 1 : 0;
      for (const { index, to } of w.asks()) {
        const value = to === routerPath ? { granted: true } : { answered: false, detail: "503" };
        w.kit.answer(index, { ok: true, value });
      }
      w.kit.take();
      w.kit.advance(5);
    }
    expect(granted).toBe(0);
    expect(offered).toBeGreaterThan(10_000);
    expect(w.describe().totals.failed_gateway).toBe(5);
  });

  it("asks the router before it opens, once, and lets calls in until it is answered", () => {
    const w = world();
    w.subscribe();
    w.kit.take();
    for (let i = 0; i < 4; i++) w.call("failed_gateway");
    expect(w.asks()).toEqual([]);
    for (let i = 0; i < 4; i++) expect(w.call("failed_gateway")).toBe(true);
    expect(w.asks()).toMatchObject([
      { to: routerPath, message: { kind: "router.may_eject", node: "a" } },
    ]);
    expect(w.describe().snapshot).toMatchObject({ circuit: "closed", ramp: 0.1 });
    w.kit.take();
    w.kit.answer(0, { ok: true, value: { granted: true } });
    expect(w.published().at(-1)).toMatchObject({ circuit: "open", ramp: 0.1 });
    expect(w.eventsOf("gpu_node.circuit_changed")).toMatchObject([
      {
        node: "a",
        from: "closed",
        to: "open",
        cause: "consecutive_gateway",
        failures: 8,
        consecutiveGateway: 8,
        ejections: 1,
        openForMs: expect.any(Number),
      },
    ]);
    expect(w.acquire("x#1")).toMatchObject({ kind: "denied", reason: "open" });
  });

  it("stays closed at the least weight when the router refuses, and comes back by slow start", () => {
    const w = world();
    w.subscribe();
    for (let i = 0; i < 5; i++) w.call("failed_gateway");
    w.kit.take();
    w.kit.answer(0, { ok: true, value: { granted: false } });
    expect(w.events().map(({ kind }) => kind)).toEqual(["gpu_node.ejection_refused"]);
    expect(w.published().at(-1)).toMatchObject({ circuit: "closed", ramp: 0.1 });
    expect(w.acquire("x#1").kind).toBe("granted");
    w.kit.take();
    w.kit.advance(71_000);
    const ramps = w.published().map(({ ramp }) => ramp);
    expect(ramps).toEqual([...ramps].sort((a, b) => a - b));
    expect([ramps[0], ramps.at(-1)]).toEqual([0.1, 1]);
    expect(w.kit.timers()).not.toContain("ramp");
  });

  it("opens by its own evidence when no router answers", () => {
    const w = world();
    w.subscribe();
    for (let i = 0; i < 5; i++) w.call("failed_gateway");
    w.kit.advance(499);
    expect(w.describe().snapshot.circuit).toBe("closed");
    w.kit.advance(1);
    expect(w.describe().snapshot.circuit).toBe("open");
  });

  it("a stalled stream is a failure; a first token that never came is slow; overload, 4xx and cancels are nothing", () => {
    const w = world();
    for (let i = 0; i < 5; i++) w.call("overloaded");
    for (let i = 0; i < 5; i++) w.call("client_error");
    for (let i = 0; i < 5; i++) w.call("cancelled");
    expect(w.describe().window).toEqual({ calls: 0, failures: 0, slow: 0 });
    w.call("slow");
    for (let i = 0; i < 4; i++) w.call("stalled");
    expect(w.describe()).toMatchObject({
      window: { calls: 5, failures: 4, slow: 1 },
      totals: { overloaded: 5, client_error: 5, cancelled: 5, slow: 1, stalled: 4 },
    });
    w.call("stalled");
    expect(w.describe().circuit).toMatchObject({ state: "open", cause: "consecutive_gateway" });
  });

  it("a killed node comes back: probe, two calls at once, three first tokens, slow start", () => {
    const w = probing();
    w.subscribe();
    expect(w.acquire("early#1")).toMatchObject({ kind: "denied", reason: "probe_busy" });
    expect(w.published().at(-1)).toMatchObject({ circuit: "half_open", probePermits: 0 });
    answerProbe(w, true);
    expect(w.acquire("t1#1")).toMatchObject({ kind: "granted", probe: true });
    expect(w.acquire("t2#1")).toMatchObject({ snapshot: { probePermits: 0 }, probe: true });
    expect(w.acquire("t3#1")).toMatchObject({ kind: "denied", reason: "probe_busy" });
    w.firstToken("t1#1"); // Counts at once, and makes room for the next.
    expect(w.acquire("t3#1").kind).toBe("granted");
    w.firstToken("t2#1");
    w.release("t1#1"); // Counted already.
    expect(w.describe().snapshot.circuit).toBe("half_open");
    w.kit.take();
    w.firstToken("t3#1");
    expect(w.published().at(-1)).toMatchObject({ circuit: "closed", ramp: 0.1, inflight: 2 });
    expect(w.eventsOf("gpu_node.circuit_changed")).toMatchObject([
      { from: "half_open", to: "closed", cause: "trials_succeeded" },
    ]);
    expect(w.acquire("t4#1")).toMatchObject({ kind: "granted", probe: false });
    w.kit.advance(30_000);
    expect(w.published().at(-1)?.ramp).toBeCloseTo(0.5, 2);
    w.kit.advance(30_000);
    expect(w.published().at(-1)?.ramp).toBe(1);
    expect(w.kit.timers()).toEqual([]);
  });

  it("an unanswered probe, or one that answers wrongly, opens it for longer", () => {
    const wrong = probing();
    answerProbe(wrong, false);
    expect(wrong.describe().circuit).toMatchObject({ state: "open", ejections: 2 });
    expect(wrong.eventsOf("gpu_node.circuit_changed").at(-1)).toMatchObject({ detail: "HTTP 503" });
    const silent = probing();
    silent.kit.take();
    silent.kit.advance(11_001);
    expect(silent.eventsOf("gpu_node.circuit_changed")).toMatchObject([
      { from: "half_open", to: "open", cause: "probe_failed", detail: "timeout", ejections: 2 },
    ]);
    const { openForMs = 0 } = silent.describe().circuit;
    expect(openForMs).toBeGreaterThanOrEqual(16_000);
    expect(openForMs).toBeLessThanOrEqual(24_000);
  });

  it("a failing upstream edge is not held against the node: it is probed again", () => {
    const w = probing();
    const first = w.asks().at(-1);
    w.kit.take();
    w.kit.answer(first?.index ?? -1, { ok: false, failure: "crashed" });
    w.kit.advance(1000);
    expect(w.describe().snapshot.circuit).toBe("half_open");
    answerProbe(w, true);
    expect(w.acquire("t1#1").kind).toBe("granted");
  });

  it("one failed call while half open opens it again without asking anybody", () => {
    for (const outcome of ["failed_local", "failed_gateway", "slow", "stalled"] as const) {
      const w = halfOpen();
      w.subscribe();
      w.acquire("t1#1");
      w.kit.take();
      w.release("t1#1", outcome);
      expect(w.asks()).toEqual([]);
      expect(w.describe().circuit).toMatchObject({ state: "open", cause: "probe_failed" });
    }
  });

  it("calls that end without a result give their permit back", () => {
    const w = halfOpen();
    w.acquire("t1#1", 10, "gone/requests");
    w.acquire("t2#1");
    w.release("t2#1", "cancelled");
    w.kit.send({ kind: "gpu_node.owner_restarted", owner: "gone/requests" });
    expect(w.describe().snapshot).toMatchObject({ circuit: "half_open", probePermits: 2 });
    w.kit.advance(120_000);
    expect(w.describe().snapshot.circuit).toBe("half_open"); // Nobody asked it anything.
  });

  it("half open, 30 s without a result open it again", () => {
    const w = halfOpen({ leaseTtlMs: 100_000 });
    w.acquire("t1#1");
    w.kit.advance(29_999);
    expect(w.describe().snapshot.circuit).toBe("half_open");
    w.kit.advance(1);
    expect(w.describe().circuit).toMatchObject({ state: "open", cause: "probe_silent" });
    const expired = halfOpen({ leaseTtlMs: 5_000 });
    expired.acquire("t1#1");
    expired.kit.advance(5_000);
    expect(expired.describe()).toMatchObject({ leases: [], circuit: { state: "open" } });
  });

  it("leases from before it opened change nothing when they end", () => {
    const w = world();
    w.fill(40);
    for (let i = 0; i < 40; i++) w.release(`held${i}#1`, i < 20 ? "failed_local" : "ok");
    expect(w.describe()).toMatchObject({ circuit: { state: "open", ejections: 1 }, leases: [] });
    const ignored = w.eventsOf("gpu_node.ignored");
    expect(ignored).toHaveLength(37);
    expect(ignored[0]).toMatchObject({ reason: "circuit_moved_on" });
    const late = world();
    late.fill(3);
    late.acquire("late#1");
    for (let i = 0; i < 3; i++) late.release(`held${i}#1`, "failed_local");
    late.kit.advance(12_000);
    answerProbe(late, true);
    late.firstToken("late#1");
    late.release("late#1", "failed_gateway");
    expect(late.describe().snapshot).toMatchObject({ circuit: "half_open", probePermits: 2 });
  });

  it("at most its permits are out without a result while it is half open (any calls)", () => {
    const step = fc.record({
      do: fc.constantFrom("acquire", "acquire", "token", "release", "wait"),
      which: fc.nat(5),
      outcome: fc.constantFrom<LeaseOutcome>("ok", "ok", "ok", "cancelled", "overloaded", "slow"),
    });
    let halfOpenSteps = 0;
    fc.assert(
      fc.property(fc.array(step, { minLength: 10, maxLength: 80 }), (steps) => {
        const w = halfOpen();
        for (const [i, one] of steps.entries()) {
          const trials = w.describe().leases.filter(({ firstToken }) => !firstToken);
          const leaseId = trials[one.which % Math.max(1, trials.length)]?.leaseId ?? "none";
          if (one.do === "acquire") w.acquire(`t${i}#1`);
          else if (one.do === "token") w.firstToken(leaseId);
          else if (one.do === "release") w.release(leaseId, one.outcome);
          else w.kit.advance(700);
          const { snapshot, leases } = w.describe();
          if (snapshot.circuit !== "half_open") return;
          halfOpenSteps++;
          const out = leases.filter(({ firstToken }) => !firstToken).length;
          expect(out).toBeLessThanOrEqual(2);
          expect(snapshot.probePermits).toBe(2 - out);
        }
      }),
    );
    expect(halfOpenSteps).toBeGreaterThan(200);
  });
});

describe("gpu node: health", () => {
  it("two failed checks make it unhealthy, three open it; two passed ones let it try at once", () => {
    const w = world();
    w.health(false);
    expect(w.describe().snapshot.healthy).toBe(true);
    w.health(false);
    expect(w.describe().snapshot).toMatchObject({ healthy: false, circuit: "closed" });
    w.health(false);
    expect(w.describe().circuit).toMatchObject({ state: "open", cause: "health" });
    expect(w.describe().health).toEqual({ ok: false, failuresInRow: 3, detail: "refused" });
    w.kit.advance(200_000);
    w.health(true);
    expect(w.describe().snapshot).toMatchObject({ healthy: false, circuit: "open" });
    w.health(true);
    expect(w.describe().snapshot).toMatchObject({ healthy: true, circuit: "half_open" });
    answerProbe(w, true);
  });

  it("an unhealthy node stays out past its time, unprobed, until the checks pass", () => {
    const w = world();
    for (let i = 0; i < 3; i++) w.call("failed_local");
    w.health(false);
    w.health(false);
    expect(w.describe().snapshot.circuit).toBe("open");
    w.kit.advance(60_000);
    expect(w.asks()).toEqual([]);
    w.health(true);
    w.health(true);
    expect(w.eventsOf("gpu_node.circuit_changed").at(-1)).toMatchObject({ cause: "health_back" });
    answerProbe(w, true);
    expect(w.acquire("t1#1").kind).toBe("granted");
  });

  it("the answer to a probe of an earlier opening proves nothing", () => {
    const w = probing();
    const stale = w.asks().at(-1);
    for (let i = 0; i < 3; i++) w.health(false);
    w.kit.advance(5000);
    for (let i = 0; i < 2; i++) w.health(true);
    expect(w.describe().snapshot.circuit).toBe("half_open");
    w.kit.answer(stale?.index ?? -1, { ok: true, value: { answered: true, detail: "200" } });
    expect(w.acquire("t1#1")).toMatchObject({ kind: "denied", reason: "probe_busy" });
    answerProbe(w, true);
    expect(w.acquire("t1#1").kind).toBe("granted");
  });

  it("checks that pass all the time do not shorten the time out of a node that fails its calls", () => {
    const w = world();
    for (let i = 0; i < 5; i++) w.call("failed_gateway");
    for (let i = 0; i < 7; i++) {
      w.kit.advance(1000);
      w.health(true);
    }
    expect(w.describe().snapshot.circuit).toBe("open");
  });

  it("failing checks keep asking for the ejection that was refused", () => {
    const w = world();
    w.subscribe();
    for (let i = 0; i < 3; i++) w.health(false);
    w.kit.answer(0, { ok: true, value: { granted: false } });
    w.health(false);
    expect(w.asks()).toHaveLength(1);
    w.kit.advance(10_000);
    w.health(false);
    expect(w.asks()).toHaveLength(2);
  });

  it("a wedged engine opens the circuit after 15 s without a token, though its health says ok", () => {
    const w = world();
    w.fill(3);
    const scrapeFor = (seconds: number, tokens: (second: number) => number | undefined) => {
      for (let second = 0; second < seconds; second++) {
        const generatedTokensTotal = tokens(second);
        w.scrape({
          running: 3,
          ...(generatedTokensTotal === undefined ? {} : { generatedTokensTotal }),
        });
        w.health(true);
        for (let i = 0; i < 3; i++) w.progress(`held${i}#1`);
        w.kit.advance(1000);
      }
    };
    scrapeFor(60, (second) => 1000 + second);
    expect(w.describe().snapshot.circuit).toBe("closed");
    scrapeFor(20, () => undefined); // An unknown counter is not one that stands still.
    expect(w.describe().snapshot.circuit).toBe("closed");
    scrapeFor(16, () => 5000); // The first of these is the one to compare with.
    expect(w.describe().snapshot.circuit).toBe("closed");
    scrapeFor(1, () => 5000);
    expect(w.describe().circuit).toMatchObject({ state: "open", cause: "wedged" });
    w.kit.take();
    scrapeFor(13, () => 5000); // While its streams hang and it sits out its time.
    expect(w.describe().snapshot.circuit).toBe("half_open"); // It may answer its probe first.
    answerProbe(w, false);
    expect(w.describe().circuit).toMatchObject({ state: "open", cause: "probe_failed" });
  });

  it("an engine without requests, or without ours, is idle and not wedged", () => {
    const idle = world();
    idle.fill(1);
    const foreign = world();
    for (let second = 0; second < 40; second++) {
      idle.scrape({ running: 0, generatedTokensTotal: 7 });
      idle.progress("held0#1");
      foreign.scrape({ running: 2, generatedTokensTotal: 7 });
      idle.kit.advance(1000);
      foreign.kit.advance(1000);
    }
    expect(idle.describe().snapshot.circuit).toBe("closed");
    expect(foreign.describe().snapshot.circuit).toBe("closed");
  });
});

describe("gpu node: signals", () => {
  it("keeps the last sample with the time it came, and reports missing gauges once", () => {
    const w = world();
    w.kit.advance(1234);
    w.scrape({ running: 2, missing: ["vllm:kv_cache_usage_perc"] });
    w.scrape({ running: 3, missing: ["vllm:kv_cache_usage_perc"] });
    expect(w.describe().snapshot.scrape).toEqual({
      engine: "vllm",
      running: 3,
      missing: ["vllm:kv_cache_usage_perc"],
      atMs: 1234,
    });
    expect(w.eventsOf("gpu_node.signal_missing")).toHaveLength(1);
    w.scrape();
    w.scrape({ missing: ["vllm:kv_cache_usage_perc"] });
    expect(w.eventsOf("gpu_node.signal_missing")).toHaveLength(2);
  });

  it("a failed scrape leaves the last sample to age, and is reported once per episode", () => {
    const w = world();
    w.scrape({ running: 2 });
    for (let i = 0; i < 3; i++) w.kit.send({ kind: "scraper.failed", reason: "timeout" });
    expect(w.describe().snapshot.scrape).toMatchObject({ running: 2, atMs: 0 });
    w.scrape();
    w.kit.send({ kind: "scraper.failed", reason: "timeout" });
    expect(w.eventsOf("gpu_node.scrape_failed")).toHaveLength(2);
  });

  it("models come from the scraper unless they are configured", () => {
    const found = world();
    expect("models" in found.describe().snapshot).toBe(false);
    found.kit.send({ kind: "scraper.models", models: ["llama"], adapters: ["sql"] });
    found.kit.send({ kind: "scraper.models", models: ["llama"], adapters: ["sql"] });
    expect(found.describe().snapshot).toMatchObject({ models: ["llama"], adapters: ["sql"] });
    expect(found.eventsOf("gpu_node.models_changed")).toEqual([
      { kind: "gpu_node.models_changed", node: "a", models: ["llama"], adapters: ["sql"] },
    ]);
    found.kit.send({ kind: "scraper.models", models: ["llama"], adapters: [] });
    expect(found.eventsOf("gpu_node.models_changed")).toHaveLength(2);
    const fixed = world({ models: ["qwen"], adapters: [] });
    fixed.kit.send({ kind: "scraper.models", models: ["llama"], adapters: ["sql"] });
    expect(fixed.describe().snapshot).toMatchObject({ models: ["qwen"], adapters: [] });
    expect(fixed.eventsOf("gpu_node.models_changed")).toEqual([]);
  });

  it("work that is not ours counts once it has lasted 30 s, takes room, and goes as soon as it is gone", () => {
    const w = world({ inflightMax: 20 });
    w.fill(5);
    const keepFor = (seconds: number, running: number) => {
      for (let second = 0; second < seconds; second++) {
        w.scrape({ running, waiting: 0 });
        for (let i = 0; i < 5; i++) w.progress(`held${i}#1`);
        w.kit.advance(1000);
      }
    };
    keepFor(20, 17);
    keepFor(1, 6); // 1 of 6 is not more than a fifth: the count begins anew.
    keepFor(30, 17);
    expect(w.describe()).toMatchObject({ othersInflight: 0, snapshot: { inflight: 5 } });
    keepFor(1, 17);
    expect(w.describe().snapshot).toMatchObject({ inflight: 17, inflightMax: 20 });
    w.fill(3, "more");
    expect(w.acquire("x#1")).toMatchObject({
      reason: "full",
      snapshot: { inflight: 20, inflightMax: 20 },
    });
    for (let i = 0; i < 3; i++) w.release(`more${i}#1`);
    keepFor(1, 200); // They cannot take the last four places, nor those that are held.
    expect(w.acquire("x#1").kind).toBe("denied");
    w.release("held0#1");
    w.release("held1#1");
    expect(w.acquire("x#1").kind).toBe("granted");
    w.scrape({ running: 4, waiting: 0 });
    expect(w.describe()).toMatchObject({ othersInflight: 0, snapshot: { inflight: 4 } });
  });

  it("leases that the engine has not known of for 30 s are reported once", () => {
    const w = world();
    w.fill(10);
    for (let second = 0; second < 60; second++) {
      w.scrape({ running: 4, waiting: 0 });
      for (let i = 0; i < 10; i++) w.progress(`held${i}#1`);
      w.kit.advance(1000);
    }
    expect(w.eventsOf("gpu_node.leases_exceed_engine")).toEqual([
      { kind: "gpu_node.leases_exceed_engine", node: "a", leases: 10, engine: 4 },
    ]);
  });

  it("a Retry-After rests the node, at most 10 s, and never shortens a rest", () => {
    const w = world();
    w.kit.advance(1000);
    w.call("overloaded", { retryAfterMs: 4000 });
    expect(w.describe().snapshot.restUntilMs).toBe(5000);
    w.call("failed_gateway", { retryAfterMs: 60_000 });
    expect(w.describe().snapshot.restUntilMs).toBe(11_000);
    w.call("overloaded", { retryAfterMs: 1000 });
    expect(w.describe().snapshot.restUntilMs).toBe(11_000);
    expect(w.acquire("x#1").kind).toBe("granted"); // A wish of the node, which routers heed.
  });
});

describe("gpu node: speed", () => {
  const stream = (w: World, seconds: number, outputTokens = 101) =>
    w.call("ok", { outputTokens, decodeMs: seconds * 1000 * (outputTokens - 1), e2eMs: 1 });

  it("learns seconds per output token: a plain mean at first, then 5 % per stream", () => {
    const w = world();
    stream(w, 0.02);
    expect(w.describe().snapshot.itlSeconds).toBeCloseTo(0.02, 12);
    stream(w, 0.04);
    expect(w.describe().snapshot.itlSeconds).toBeCloseTo(0.03, 12);
    for (let i = 0; i < 50; i++) stream(w, 0.03);
    const before = w.describe().snapshot.itlSeconds ?? 0;
    stream(w, 0.05);
    expect(w.describe().snapshot.itlSeconds).toBeCloseTo(before * 0.95 + 0.05 * 0.05, 12);
  });

  it("learns nothing from short streams, whole answers or failures", () => {
    const w = world();
    w.call("failed_gateway", { outputTokens: 500, decodeMs: 9000, e2eMs: 9000 });
    w.call("cancelled", { outputTokens: 500, decodeMs: 9000, e2eMs: 9000 });
    const { snapshot } = w.describe();
    expect(snapshot.itlSeconds).toBeUndefined();
    expect(snapshot.latencyMsPeakEwma).toBeUndefined();
    expect(snapshot.latencyMsAtInflight).toBeUndefined();
    stream(w, 0.02, 16);
    w.call("ok", { outputTokens: 500, decodeMs: 0, e2eMs: 9000 });
    expect(w.describe().snapshot.itlSeconds).toBeUndefined();
    stream(w, 0.02, 17);
    expect(w.describe().snapshot.itlSeconds).toBeCloseTo(0.02, 12);
  });

  it("peak latency jumps up at once and decays over 10 s", () => {
    const w = world();
    w.call("ok", { e2eMs: 1000 });
    w.call("ok", { e2eMs: 5000 });
    expect(w.describe().snapshot.latencyMsPeakEwma).toBe(5000);
    w.kit.advance(10_000);
    w.call("ok", { e2eMs: 1000 });
    const share = 1 - Math.exp(-1);
    const decayed = 5000 - 4000 * share;
    expect(w.describe().snapshot.latencyMsPeakEwma).toBeCloseTo(decayed, 6);
    w.call("ok", { e2eMs: 1 }); // No time has passed, so it weighs nothing.
    expect(w.describe().snapshot.latencyMsPeakEwma).toBeCloseTo(decayed, 6);
  });

  it("tells the median latency of requests that began at about the present in-flight count", () => {
    const w = world();
    for (const e2eMs of [900, 100, 300]) w.call("ok", { e2eMs });
    expect(w.describe().snapshot.latencyMsAtInflight).toBe(300);
    w.fill(8);
    expect(w.describe().snapshot.latencyMsAtInflight).toBe(300); // None from there: the nearest.
    for (const e2eMs of [7000, 9000, 8000]) w.call("ok", { e2eMs });
    expect(w.describe().snapshot.latencyMsAtInflight).toBe(8000);
    for (let i = 0; i < 8; i++) w.release(`held${i}#1`, "cancelled");
    expect(w.describe().snapshot.latencyMsAtInflight).toBe(300);
    for (let i = 0; i < 9; i++) w.call("ok", { e2eMs: 50 });
    expect(w.describe().snapshot.latencyMsAtInflight).toBe(50); // Only the last nine.
  });

  it("keeps the median of the last nine (any latencies)", () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: 1, max: 50 }), { minLength: 1, maxLength: 60 }),
        (all) => {
          const w = world();
          for (const e2eMs of all) w.call("ok", { e2eMs });
          const sorted = all.slice(-9).sort((a, b) => a - b);
          expect(w.describe().snapshot.latencyMsAtInflight).toBe(sorted[sorted.length >> 1]);
        },
      ),
    );
  });

  it("halves the article's weight on a timeout, not below a tenth", () => {
    const w = world();
    w.call("failed_gateway");
    expect(w.describe().snapshot.articleWeight).toBe(1);
    w.call("slow");
    w.call("stalled");
    expect(w.describe().snapshot.articleWeight).toBe(0.25);
    for (let i = 0; i < 3; i++) w.call("slow");
    expect(w.describe().snapshot.articleWeight).toBe(0.1);
  });
});

describe("gpu node: draining", () => {
  it("gives no new lease, keeps those it has, and reports when the last is gone", () => {
    const w = world();
    w.fill(2);
    w.kit.send({ kind: "gpu_node.drain" });
    expect(w.acquire("x#1")).toMatchObject({ kind: "denied", reason: "draining" });
    expect(w.acquire("held0#1").kind).toBe("granted");
    w.release("held0#1");
    expect(w.eventsOf("gpu_node.drained")).toEqual([]);
    w.release("held1#1");
    expect(w.eventsOf("gpu_node.drained")).toMatchObject([{ leases: 0 }]);
    w.kit.send({ kind: "gpu_node.undrain" });
    expect(w.acquire("x#1").kind).toBe("granted");
  });

  it("waits 120 s for its leases, and an idle node not at all", () => {
    const w = world();
    w.fill(1);
    w.kit.send({ kind: "gpu_node.drain" });
    for (let second = 0; second < 121; second++) {
      w.progress("held0#1");
      w.kit.advance(1000);
    }
    expect(w.eventsOf("gpu_node.drained")).toMatchObject([{ leases: 1 }]);
    const changedMind = world();
    changedMind.fill(1);
    changedMind.kit.send({ kind: "gpu_node.drain" });
    changedMind.kit.send({ kind: "gpu_node.undrain" });
    changedMind.kit.advance(200_000);
    expect(changedMind.eventsOf("gpu_node.drained")).toEqual([]);
    const idle = world();
    idle.kit.send({ kind: "gpu_node.drain" });
    expect(idle.eventsOf("gpu_node.drained")).toMatchObject([{ leases: 0 }]);
  });
});

describe("gpu node: routers", () => {
  it("sends the present snapshot to a new router, then a newer one at every change", () => {
    const w = world();
    w.subscribe();
    w.acquire("r1#1", 50);
    w.firstToken("r1#1");
    w.firstToken("r1#1");
    w.progress("r1#1", 8); // Nothing a router ranks by.
    w.health(true);
    w.release("r1#1");
    const seen = w.published();
    expect(seen.map(({ inflight, prefillTokens }) => [inflight, prefillTokens])).toEqual([
      [0, 0],
      [1, 50],
      [1, 0],
      [0, 0],
    ]);
    expect(seen.map(({ version }) => version)).toEqual([0, 1, 2, 3]);
  });

  it("never changes a snapshot that it has sent", () => {
    const w = world();
    w.subscribe();
    const copies: [NodeSnapshot, string][] = [];
    for (const outcome of outcomes) {
      w.acquire(`${outcome}#1`);
      w.release(`${outcome}#1`, outcome, { e2eMs: 100, retryAfterMs: 10 });
      w.scrape({ running: 1, kv: 0.5 });
      for (const snapshot of w.published()) copies.push([snapshot, JSON.stringify(snapshot)]);
      w.kit.take();
    }
    expect(copies.length).toBeGreaterThanOrEqual(3 * outcomes.length);
    for (const [snapshot, copy] of copies) expect(JSON.stringify(snapshot)).toBe(copy);
  });

  it("forgets a router that ended, and keeps one that came back before that was known", () => {
    const w = world();
    w.subscribe();
    w.kit.send({ kind: "gpu_node.subscribe", router: { path: routerPath, uid: 9 } });
    w.kit.terminate(routerPath, "failed"); // Of uid 1.
    w.kit.take();
    w.scrape();
    expect(w.published()).toHaveLength(1);
    const gone = world();
    gone.subscribe();
    gone.kit.terminate(routerPath, "stopped");
    gone.kit.take();
    gone.scrape();
    expect(gone.published()).toEqual([]);
    for (let i = 0; i < 3; i++) gone.call("failed_local");
    expect(gone.describe().snapshot.circuit).toBe("open"); // With nobody left to ask.
  });

  it("serves a bounded number of routers, and counts the rest", () => {
    const w = world();
    for (let i = 0; i < 257; i++) {
      w.kit.send({ kind: "gpu_node.subscribe", router: refTo(`peer${i}/router`) });
    }
    expect(w.eventsOf("gpu_node.ignored")).toMatchObject([{ reason: "too_many_routers" }]);
    expect(w.kit.told("peer256/router")).toEqual([]);
  });
});
