/** The whole chain in virtual time: shipping actors, modelled edges (world.ts). */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { type Behaviour, balanced, World } from "./world.ts";

describe("request: the chain", () => {
  it("a miss goes to a node and is stored, an equal request is a hit without a node", async () => {
    const world = new World(["a", "b"]);
    const first = world.submit("q");
    world.run(1000);
    expect(world.outcome(first)).toMatchObject({ kind: "attach", cache: "miss", attempts: 1 });
    const second = world.submit("q");
    world.run(10);
    expect(world.outcome(second)).toMatchObject({ kind: "answer", cache: "hit_exact" });
    expect(world.starts).toHaveLength(1);
    expect(await world.books()).toEqual(balanced);
  });

  it("a request that may not read the cache generates anew, one that may not write leaves nothing", async () => {
    const world = new World(["a"]);
    world.submit("q");
    world.run(1000);
    world.submit("q", { cacheRead: false });
    world.run(1000);
    expect(world.starts).toHaveLength(2);
    world.submit("other", { cacheWrite: false });
    world.run(1000);
    const again = world.submit("other");
    world.run(1000);
    expect(world.outcome(again)).toMatchObject({ kind: "attach", cache: "miss" });
    expect(world.starts).toHaveLength(4);
  });

  it("retries on different nodes until one answers (two of three refuse the connection)", async () => {
    const world = new World(["a", "b", "c"]);
    world.setBehaviour("a", { kind: "fails", afterMs: 1, failure: "connect" });
    world.setBehaviour("b", { kind: "fails", afterMs: 1, failure: "connect" });
    for (let i = 0; i < 20; i++) {
      const id = world.submit(`q${i}`);
      world.run(1000);
      expect(world.outcome(id)).toMatchObject({ kind: "attach", node: "c" });
    }
    for (const record of world.records) {
      const nodes = record.attempts.map((attempt) => attempt.node);
      expect(new Set(nodes).size).toBe(nodes.length);
    }
    expect(await world.books()).toEqual(balanced);
  });

  it("never retries once content is out (the stream breaks)", async () => {
    const world = new World(["a", "b"]);
    const breaks: Behaviour = { kind: "breaks", ttftMs: 20, afterTokens: 5, itlMs: 10 };
    world.setBehaviour("a", breaks);
    world.setBehaviour("b", breaks);
    const id = world.submit("q");
    world.run(5000);
    expect(world.outcome(id)).toMatchObject({ kind: "attach", attempts: 1 });
    expect(world.starts).toHaveLength(1);
    expect(world.records[0]).toMatchObject({ outcome: "failed", code: "stream_broken" });
    const again = world.submit("q");
    world.run(5000);
    expect(world.outcome(again)).toMatchObject({ kind: "attach", cache: "miss" });
    expect(await world.books()).toEqual(balanced);
  });

  it("a client's mistake is answered by the first node and not retried", async () => {
    const world = new World(["a", "b"]);
    const wrong: Behaviour = { kind: "fails", afterMs: 5, failure: "client_error" };
    world.setBehaviour("a", wrong);
    world.setBehaviour("b", wrong);
    const id = world.submit("q");
    world.run(1000);
    expect(world.outcome(id)).toMatchObject({ kind: "attach", attempts: 1 });
    expect(world.starts).toHaveLength(1);
    expect(await world.books()).toEqual(balanced);
  });

  it("past its deadline a request is refused and its attempt ended (the node hangs)", async () => {
    const world = new World(["a"]);
    world.setBehaviour("a", { kind: "hangs" });
    const nowMs = world.clock.nowUs() / 1000;
    const id = world.submit("q", { deadlineAtMs: nowMs + 2000 });
    world.run(2100);
    expect(world.outcome(id)).toMatchObject({ kind: "refuse", code: "deadline_exceeded" });
    expect(await world.books()).toEqual(balanced);
  });
});

describe("request: shared flights", () => {
  it("a thousand equal requests make one upstream call, also when half of them stream", async () => {
    const world = new World(["a", "b", "c"]);
    const ids = Array.from({ length: 1000 }, (_, i) => world.submit("q", { stream: i % 2 === 0 }));
    world.run(2000);
    expect(world.starts).toHaveLength(1);
    const leader = ids.find(
      (id) => world.outcome(id).kind === "attach" && world.records.length > 0,
    );
    expect(leader).toBeDefined();
    for (const id of ids) expect(world.outcome(id)).toMatchObject({ kind: "attach" });
    const flights = new Set(ids.map((id) => (world.outcome(id) as { flightId: string }).flightId));
    expect(flights.size).toBe(1);
    expect(world.front.lateAttaches).toEqual([]);
    expect(await world.books()).toEqual(balanced);
  });

  it("the leader's leaving does not end the others; the last one's leaving aborts at once", async () => {
    const world = new World(["a"]);
    world.setBehaviour("a", { kind: "answers", ttftMs: 100, tokens: 1000, itlMs: 10 });
    const [leader, second, third] = [world.submit("q"), world.submit("q"), world.submit("q")];
    world.run(200);
    world.leave(leader);
    world.run(200);
    expect(world.aborts).toEqual([]);
    world.leave(second);
    world.run(200);
    expect(world.aborts).toEqual([]);
    world.leave(third);
    world.run(1);
    expect(world.aborts).toHaveLength(1);
    expect(await world.books()).toEqual(balanced);
  });

  it("the leader's own refusal passes the lead on: every request is judged by its own limit", async () => {
    const world = new World(["a"]);
    const limits = { requestsPerMinute: 60, requestBurst: 1 };
    world.submit("x", { limits, limitKey: "poor" });
    world.run(1);
    const poor = world.submit("q", { limits, limitKey: "poor" });
    const rich = world.submit("q", { limitKey: "rich" });
    world.run(2000);
    expect(world.outcome(poor)).toMatchObject({ kind: "refuse", code: "rate_limit_requests" });
    expect(world.outcome(rich)).toMatchObject({ kind: "attach" });
    expect(await world.books()).toEqual(balanced);
  });

  it("after the lead has passed on, those who wait follow the new leader", async () => {
    const world = new World(["a"]);
    const limits = { requestsPerMinute: 60, requestBurst: 1 };
    world.submit("x", { limits, limitKey: "poor" });
    world.run(1);
    const ids = [
      world.submit("q", { limits, limitKey: "poor" }),
      ...Array.from({ length: 4 }, () => world.submit("q", { limitKey: "rich" })),
    ];
    world.run(2000);
    const [poor, ...rich] = ids.map((id) => world.outcome(id));
    expect(poor).toMatchObject({ kind: "refuse", code: "rate_limit_requests" });
    const flights = new Set(rich.map((outcome) => (outcome as { flightId: string }).flightId));
    expect(flights.size).toBe(1);
    expect(world.starts).toHaveLength(2);
    expect(await world.books()).toEqual(balanced);
  });

  it("a failure of all nodes is everyone's: one round of attempts, one answer each", async () => {
    const world = new World(["a", "b"]);
    const down: Behaviour = { kind: "fails", afterMs: 1, failure: "connect" };
    world.setBehaviour("a", down);
    world.setBehaviour("b", down);
    const ids = Array.from({ length: 50 }, () => world.submit("q"));
    world.run(3000);
    for (const id of ids) expect(world.outcome(id).kind).toBe("refuse");
    expect(world.starts.length).toBeLessThanOrEqual(2);
    expect(await world.books()).toEqual(balanced);
  });
});

describe("request: actors that crash", () => {
  it("the cache's: those who waited for a flight ask anew, and nobody is left without an answer", async () => {
    const world = new World(["a"]);
    const ids = Array.from({ length: 5 }, () => world.submit("q"));
    world.run(20);
    world.crash(world.refs.cache.at(world.keyOf(ids[0] ?? "")));
    world.run(5000);
    for (const id of ids) expect(world.outcome(id).kind).toBe("attach");
    expect(world.starts).toHaveLength(2);
    const again = world.submit("q");
    world.run(100);
    expect(world.outcome(again)).toMatchObject({ kind: "answer" });
    expect(await world.books()).toEqual(balanced);
  });

  it.each(["limiter", "router"] as const)("the %s's: every request is answered", async (actor) => {
    const world = new World(["a", "b"]);
    const ids: string[] = [];
    for (let i = 0; i < 20; i++) {
      ids.push(world.submit(`q${i}`));
      if (i % 5 === 0) world.crash<never>(world.refs[actor]);
      world.run(10);
    }
    world.run(90_000);
    for (const id of ids) expect(world.outcome(id).kind).toBe("attach");
    expect(await world.books()).toEqual(balanced);
  });

  it("a node's: its leases are void, and every request is answered", async () => {
    const world = new World(["a", "b"]);
    const ids = Array.from({ length: 10 }, (_, i) => world.submit(`q${i}`));
    world.run(5);
    world.crash(world.refs.node("a"));
    world.run(90_000);
    for (const id of ids) expect(world.outcome(id).kind).toBe("attach");
    expect(await world.books()).toEqual(balanced);
  });

  it("its own: everything it held is freed, and the next requests are served", async () => {
    const world = new World(["a", "b"]);
    const limits = { requestsPerMinute: 600, requestBurst: 50, concurrent: 10 };
    for (let i = 0; i < 10; i++) world.submit(`q${i % 4}`, { limits });
    world.run(20);
    world.crash(world.refs.requests);
    world.run(100);
    expect(await world.books()).toEqual(balanced);
    const ids = Array.from({ length: 10 }, (_, i) => world.submit(`q${i}`, { limits }));
    world.run(5000);
    for (const id of ids) expect(world.outcome(id).kind).toBe("attach");
    expect(await world.books()).toEqual(balanced);
  });
});

describe("request: random worlds", () => {
  const behaviours: readonly (Behaviour | null)[] = [
    null,
    { kind: "fails", afterMs: 2, failure: "connect" },
    { kind: "fails", afterMs: 5, failure: "unavailable" },
    { kind: "fails", afterMs: 5, failure: "overloaded" },
    { kind: "fails", afterMs: 5, failure: "bad_answer" },
    { kind: "breaks", ttftMs: 30, afterTokens: 3, itlMs: 10 },
    { kind: "hangs" },
  ];
  const step = fc.record({
    what: fc.constantFrom("submit", "submit", "submit", "leave", "fault", "wait"),
    n: fc.nat(1000),
    waitMs: fc.nat(300),
  });

  it("each request is answered once, attempts are on distinct nodes, and the books balance", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(step, { minLength: 5, maxLength: 60 }),
        fc.nat(1_000_000),
        async (steps, seed) => {
          const nodes = ["a", "b", "c"];
          const world = new World(nodes, { keys: [] }, seed);
          const ids: string[] = [];
          const left = new Set<string>();
          for (const { what, n, waitMs } of steps) {
            if (what === "submit") {
              const limits = n % 5 === 0 ? { requestsPerMinute: 600, requestBurst: 2 } : {};
              ids.push(
                world.submit(`q${n % 4}`, {
                  limits,
                  limitKey: `k${n % 2}`,
                  stream: n % 3 > 0,
                  cacheRead: n % 7 > 0,
                  cacheWrite: n % 11 > 0,
                  deadlineAtMs: world.clock.nowUs() / 1000 + 100 + (n % 10) * 1000,
                }),
              );
            } else if (what === "leave") {
              const id = ids[n % Math.max(1, ids.length)];
              if (id !== undefined) {
                left.add(id);
                world.leave(id);
              }
            } else if (what === "fault") {
              world.setBehaviour(nodes[n % 3] ?? "a", behaviours[n % behaviours.length] ?? null);
            }
            world.run(what === "wait" ? waitMs : waitMs % 7);
          }
          for (const node of nodes) world.setBehaviour(node, null);
          world.run(90_000);
          for (const id of ids) {
            const count = world.got(id).length;
            if (left.has(id)) expect(count).toBeLessThanOrEqual(1);
            else expect([id, count]).toEqual([id, 1]);
          }
          expect(world.records.map((record) => record.facts.requestId).sort()).toEqual(
            [...ids].sort(),
          );
          for (const record of world.records) {
            const tried = record.attempts.map((attempt) => attempt.node);
            expect(new Set(tried).size).toBe(tried.length);
            expect(tried.length).toBeLessThanOrEqual(3);
          }
          expect(world.front.lateAttaches).toEqual([]);
          for (const id of ids) expect(world.front.forgotten.has(id)).toBe(true);
          expect(await world.books()).toEqual(balanced);
        },
      ),
      { numRuns: 150 },
    );
  });

  it("equal seeds run equally, to the message", () => {
    const run = (seed: number) => {
      const world = new World(["a", "b", "c"], {}, seed);
      world.setBehaviour("b", { kind: "fails", afterMs: 5, failure: "unavailable" });
      for (let i = 0; i < 50; i++) {
        world.submit(`q${i % 10}`);
        world.run(20);
      }
      world.run(10_000);
      return world.scheduler.hash;
    };
    expect(run(7)).toBe(run(7));
    expect(run(8)).not.toBe(run(7));
  });
});
