/** The router alone: what it asks of nodes, what it answers, and what it never does. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { AcquireReply, GpuNodeMessage } from "../actors/gpu-node.ts";
import type { NodeId, NodeSnapshot, RequestFacts } from "../actors/protocol.ts";
import {
  type ChooseReply,
  RouterActor,
  type RouterDescription,
  type RouterMessage,
  type RouterSettings,
} from "../actors/router.ts";
import { refTo, testActor } from "./actor-kit.ts";

describe("placing", () => {
  it("asks the best node for a lease and answers with it", () => {
    const world = worldOf({ a: { inflight: 5 }, b: { inflight: 1 } });
    const askId = world.choose("r1", { promptTokens: 700 });
    const [ask] = world.asks();
    expect(ask).toMatchObject({
      to: "nodes/b",
      message: { leaseId: "r1#1", owner: "requests", uncachedTokens: 700 },
    });
    world.grant();
    const reply = world.placed(askId);
    expect(reply).toMatchObject({ node: "b", leaseId: "r1#1", queuedMs: 0 });
    expect(reply.decision).toMatchObject({ strategy: "headroom", chosen: "b", candidatesTotal: 2 });
    expect(reply.decision.candidates.map(({ node }) => node)).toEqual(["b", "a"]);
    expect(reply.decision.why).toMatch(/^score/);
    world.choose("r2");
    world.grant(); // What was placed makes the mean prompt.
    const again = world.placed(world.choose("r3"), { granting: true });
    expect(again.decision.candidates[0]?.terms).toMatchObject({ promptTokensMean: 670 });
  });

  it("spreads a burst that no node has answered yet", () => {
    const world = worldOf({ a: {}, b: {}, c: {}, d: {} });
    for (let i = 0; i < 12; i++) world.choose(`r${i}`);
    const asked = world.asks().map(({ to }) => to);
    for (const node of "abcd") expect(asked.filter((to) => to === `nodes/${node}`)).toHaveLength(3);
  });

  it("goes down its order as nodes deny, and waits after three denials", () => {
    const world = worldOf({
      a: { inflight: 1 },
      b: { inflight: 2 },
      c: { inflight: 3 },
      d: { inflight: 4 },
    });
    const askId = world.choose("r1");
    const asked: string[] = [];
    for (let i = 0; i < 3; i++) {
      asked.push(world.asks()[0]?.to ?? "");
      world.deny("full");
    }
    expect(asked).toEqual(["nodes/a", "nodes/b", "nodes/c"]);
    expect(world.asks()).toEqual([]);
    expect(world.replies(askId)).toEqual([]);
    world.change("b", { inflight: 0 });
    expect(world.asks()).toMatchObject([{ to: "nodes/b" }]);
    world.grant();
    const reply = world.placed(askId);
    expect(reply.decision.denials.map(({ node, reason }) => `${node}: ${reason}`)).toEqual([
      "a: full",
      "b: full",
      "c: full",
    ]);
  });

  it("waits after three denials even if those went down, while others are left", () => {
    const world = worldOf({ a: {}, b: {}, c: {}, d: {} });
    const askId = world.choose("r1");
    const asked = [0, 1, 2].map(() => world.down());
    expect(world.replies(askId)).toEqual([]);
    world.kit.advance(100);
    expect(asked).not.toContain(world.asks()[0]?.to.slice(6));
    world.grant();
    expect(world.placed(askId).decision.denials).toHaveLength(3);
  });

  it("retries on a different node, by name and by address", () => {
    const world = worldOf({ a: { address: "gpu:1" }, b: { address: "gpu:1" }, c: { inflight: 9 } });
    world.choose("r1", {}, { attempt: 2, tried: ["a"] });
    expect(world.asks()).toMatchObject([{ to: "nodes/c", message: { leaseId: "r1#2" } }]);
  });

  it("refuses a retry when every node was tried: there is nothing to wait for", () => {
    const world = worldOf({ a: {}, b: {} });
    const askId = world.choose("r1", {}, { attempt: 3, tried: ["a", "b"] });
    expect(world.refused(askId)).toMatchObject({ code: "no_node" });
  });

  it("keeps a session on its node, and does not count what that node has seen", () => {
    const world = worldOf({ a: {}, b: {}, c: {}, d: {} }, { exploreRatio: 0 });
    const facts = { affinityKey: 12345, session: "s", promptTokens: 1000 };
    world.choose("r1", facts);
    const home = world.asks()[0]?.to;
    world.grant();
    world.choose("r2", { ...facts, promptTokens: 1400 });
    expect(world.asks()).toMatchObject([{ to: home, message: { uncachedTokens: 400 } }]);
    world.grant();
    world.kit.advance(600_001); // Idle for longer than an engine keeps a prefix.
    world.choose("r3", { ...facts, promptTokens: 1500 });
    expect(world.asks()).toMatchObject([{ message: { uncachedTokens: 1500 } }]);
  });

  it("counts only the head as seen where a key is made of a prompt's head", () => {
    const world = worldOf({ a: {}, b: {} }, { exploreRatio: 0 });
    world.choose("r1", { affinityKey: 7, promptTokens: 5000 });
    world.grant();
    world.choose("r2", { affinityKey: 7, promptTokens: 5000 });
    expect(world.asks()).toMatchObject([{ message: { uncachedTokens: 5000 - 256 } }]);
  });

  it("asks another node when one does not answer, and gives back what it may have granted", () => {
    const world = worldOf({ a: {}, b: { inflight: 5 } });
    const askId = world.choose("r1");
    world.kit.advance(1000);
    expect(world.released("a")).toEqual(["r1#1"]);
    expect(world.asks()).toMatchObject([{ to: "nodes/b" }]);
    world.choose("r2"); // a is left alone for a while, though it looks idle …
    expect(world.asks()).toMatchObject([{ to: "nodes/b" }, { to: "nodes/b" }]);
    world.change("a", {}); // … unless it speaks.
    world.choose("r3");
    expect(world.asks()[2]).toMatchObject({ to: "nodes/a" });
    world.grant();
    expect(world.placed(askId).decision.denials).toEqual([{ node: "a", reason: "timeout" }]);
  });

  it("answers one that asks again for the same attempt once, to the last asker", () => {
    const world = worldOf({ a: {} });
    const first = world.choose("r1");
    const second = world.choose("r1");
    expect(world.asks()).toHaveLength(1);
    world.grant();
    expect(world.replies(first)).toEqual([]);
    expect(world.placed(second).leaseId).toBe("r1#1");
  });
});

describe("pools", () => {
  it("are the nodes that serve the model or hold the adapter", () => {
    const world = worldOf({
      a: { models: ["llama"] },
      b: { models: ["llama"], adapters: ["sql"] },
      c: { models: ["qwen"] },
      d: { models: undefined },
    });
    world.choose("r1", { model: "sql" });
    expect(world.asks()).toMatchObject([{ to: "nodes/b" }]);
    world.choose("r2", { model: "qwen" });
    expect(world.asks()[1]).toMatchObject({ to: "nodes/c" });
    const refused = world.refused(world.choose("r3", { model: "gpt-5" }));
    expect(refused.code).toBe("no_node");
    expect(refused.decision.candidates.map(({ excluded }) => excluded)).toEqual([
      "does not serve the model",
      "does not hold that model or adapter",
      "does not serve the model",
      "has not told its models yet",
    ]);
  });

  it("of a route without a model are all nodes", () => {
    const world = worldOf({ a: { models: ["x"], inflight: 3 }, b: { models: undefined } });
    world.choose("r1", { model: undefined });
    expect(world.asks()).toMatchObject([{ to: "nodes/b" }]);
    world.join("c", { models: ["y"] });
    expect(world.describe().pools.find(({ model }) => model === "")?.nodes).toEqual([
      "a",
      "b",
      "c",
    ]);
  });

  it("follow what the nodes serve", () => {
    const world = worldOf({ a: { models: ["x"] } });
    world.change("a", { models: ["y"] });
    expect(world.describe().pools.map(({ model, nodes }) => [model, nodes])).toEqual([
      ["y", ["a"]],
    ]);
    expect(world.refused(world.choose("r1", { model: "x" })).code).toBe("no_node");
  });

  it("that share a node take turns at its free places", () => {
    const world = worldOf({ a: { models: ["x", "y"], inflight: 2, inflightMax: 2 } });
    for (let i = 0; i < 4; i++) {
      world.choose(`x${i}`, { model: "x" });
      world.choose(`y${i}`, { model: "y" });
    }
    const served: string[] = [];
    for (let i = 0; i < 8; i++) {
      world.change("a", { inflight: 1 });
      served.push(world.asks()[0]?.message.leaseId.slice(0, 1) ?? "");
      world.grant();
    }
    expect(served.slice(0, 6).filter((model) => model === "x")).toHaveLength(3);
  });
});

describe("waiting", () => {
  const full = { inflight: 2, inflightMax: 2 };

  it("dispatches as many as there are places, and no more", () => {
    const world = worldOf({ a: full, b: full });
    const askIds = Array.from({ length: 5 }, (_, i) => world.choose(`r${i}`));
    expect(world.asks()).toEqual([]);
    world.kit.advance(50);
    world.change("a", { inflight: 0 });
    world.change("a", { inflight: 0 }); // News again, before the first two were answered.
    expect(world.asks().map(({ message }) => message.leaseId)).toEqual(["r0#1", "r1#1"]);
    world.grant();
    world.grant();
    expect(world.placed(askIds[1] ?? 0)).toMatchObject({ node: "a", queuedMs: 50 });
    expect(world.describe().pools[0]?.queued).toEqual([
      { priority: "standard", tenant: "t", waiting: 3 },
    ]);
  });

  it("lets nobody overtake those who wait", () => {
    const world = worldOf({ a: full });
    world.choose("old");
    world.change("a", { inflight: 1 });
    world.deny("full"); // It has to wait again; its place was taken by another router.
    world.choose("young");
    world.change("a", { inflight: 1 });
    expect(world.asks().map(({ message }) => message.leaseId)).toEqual(["old#1"]);
  });

  it("nor at the moment when a place comes free without news", () => {
    const world = worldOf({ a: { restUntilMs: 1010, inflightMax: 1 }, b: full, c: full });
    world.choose("old");
    world.kit.advance(1050);
    world.choose("young");
    expect(world.asks().map(({ message }) => message.leaseId)).toEqual(["old#1"]);
  });

  it("charges a tenant for what it used, not for retries or for what got no node", () => {
    const world = worldOf({ a: full, b: { circuit: "open" } });
    const served = (count: number) =>
      Array.from({ length: count }, () => {
        world.change("a", { inflight: 1 });
        const [ask] = world.asks();
        world.grant();
        return ask?.message.leaseId.split("#")[0];
      });
    const request = (id: string, tenant: string, arrivedAtMs: number, promptTokens = 100) =>
      [id, { tenant, arrivedAtMs, promptTokens }] as const;
    world.choose(...request("retry", "x", 0, 5000), { attempt: 2, tried: ["b"] });
    world.choose(...request("x1", "x", 1));
    world.choose(...request("y1", "y", 2));
    expect(served(3)).toEqual(["retry", "x1", "y1"]);

    world.choose(...request("left", "x", 3, 5000));
    world.choose(...request("x2", "x", 4));
    world.choose(...request("y2", "y", 5));
    world.change("a", { inflight: 1 });
    world.kit.send({ kind: "router.cancel", requestId: "left" });
    world.grant(); // To nobody.
    expect(served(2)).toEqual(["x2", "y2"]);

    world.choose(...request("x3", "x", 6));
    world.choose(...request("y3", "y", 7));
    world.kit.send({
      kind: "router.used",
      model: "m",
      tenant: "x",
      promptTokens: 9,
      outputTokens: 900,
    });
    expect(served(2)).toEqual(["y3", "x3"]);
  });

  it("holds nothing against a tenant that used much while nobody had to wait", () => {
    const world = worldOf({ a: { inflightMax: 100 } });
    const direct = (id: string, tenant: string) => {
      world.choose(id, { tenant });
      world.grant();
      world.kit.send({
        kind: "router.used",
        model: "m",
        tenant,
        promptTokens: 1,
        outputTokens: 9000,
      });
    };
    world.change("a", { inflight: 100 }); // Both have waited before, y last.
    world.choose("x", { tenant: "x", arrivedAtMs: 0 });
    world.choose("y", { tenant: "y", arrivedAtMs: 1 });
    world.change("a", { inflight: 0 });
    world.grant();
    world.grant();
    direct("yy", "y");
    for (let i = 0; i < 20; i++) direct(`xx${i}`, "x");
    world.change("a", { inflight: 100 });
    for (let i = 0; i < 6; i++) world.choose(`Y${i}`, { tenant: "y", arrivedAtMs: i });
    for (let i = 0; i < 6; i++) world.choose(`X${i}`, { tenant: "x", arrivedAtMs: 10 + i });
    const served: string[] = [];
    for (let i = 0; i < 6; i++) {
      world.change("a", { inflight: 99 });
      served.push(world.asks()[0]?.message.leaseId.slice(0, 1) ?? "");
      world.grant();
    }
    expect(served.filter((tenant) => tenant === "X")).toHaveLength(3);
  });

  it("serves interactive before standard before batch, and a retry by its first arrival", () => {
    const world = worldOf({ a: full, b: { circuit: "open" } });
    world.choose("batch", { priority: "batch", ...roomy });
    world.choose("young", { arrivedAtMs: 20 });
    world.choose("retry", { arrivedAtMs: 10 }, { attempt: 2, tried: ["b"] });
    world.choose("urgent", { priority: "interactive", arrivedAtMs: 30 });
    const order: string[] = [];
    for (let i = 0; i < 4; i++) {
      world.change("a", { inflight: 1 });
      order.push(world.asks()[0]?.message.leaseId ?? "none");
      if (world.asks().length > 0) world.grant();
    }
    expect(order).toEqual(["urgent#1", "retry#2", "young#1", "none"]); // Batch was shed: the pool is full.
  });

  it("is not blocked by a retry that has tried the only free node", () => {
    const world = worldOf({ a: full, b: full });
    world.choose("retry", {}, { attempt: 2, tried: ["a"] });
    world.choose("first");
    world.change("a", { inflight: 1 });
    expect(world.asks()).toMatchObject([{ to: "nodes/a", message: { leaseId: "first#1" } }]);
    world.grant();
    world.change("b", { inflight: 1 });
    expect(world.asks()).toMatchObject([{ to: "nodes/b", message: { leaseId: "retry#2" } }]);
  });

  it("ends at the deadline, and at the queue's own bound", () => {
    const world = worldOf({ a: full });
    const soon = world.choose("soon", { deadlineAtMs: 2000 });
    const late = world.choose("late", { deadlineAtMs: 900_000 });
    world.kit.advance(2100);
    expect(world.refused(soon)).toMatchObject({ code: "deadline_exceeded" });
    world.kit.advance(28_000);
    expect(world.refused(late)).toMatchObject({ code: "deadline_exceeded" });
    expect(world.kit.timers()).toEqual([]); // Nobody waits: nothing ticks.
    expect(world.refused(world.choose("past", { deadlineAtMs: 5 })).code).toBe("deadline_exceeded");
  });

  it("refuses with 429 beyond a key's share and 503 beyond the pool's", () => {
    const world = worldOf({ a: full }, {}, { perKeyMax: 2, poolMax: 3 });
    world.choose("r1", { limitKey: "k1" });
    world.choose("r2", { limitKey: "k1" });
    expect(world.refused(world.choose("r3", { limitKey: "k1" })).code).toBe("queue_full");
    world.choose("r4", { limitKey: "k2" });
    expect(world.refused(world.choose("r5", { limitKey: "k3" })).code).toBe("pool_overloaded");
  });

  it("refuses at once who would wait past the deadline, and says how long it would be", () => {
    const world = worldOf({ a: full });
    // One place a second comes free while others wait.
    for (let i = 0; i < 12; i++) world.choose(`r${i}`);
    for (let i = 0; i < 8; i++) {
      world.kit.advance(1000);
      world.change("a", { inflight: 1 });
      world.grant();
    }
    const refused = world.refused(world.choose("hasty", { deadlineAtMs: world.kit.nowMs + 4000 }));
    expect(refused.code).toBe("queue_full");
    expect(refused.retryAfterMs).toBeGreaterThan(4500); // Four ahead and itself, at about one a second.
    expect(refused.retryAfterMs).toBeLessThan(6500);
    world.choose("patient", { deadlineAtMs: world.kit.nowMs + 20_000 });
    expect(world.describe().pools[0]?.queued[0]?.waiting).toBe(5);
  });

  it("looks again when a rest or a scrape has run out, without any news", () => {
    const world = worldOf({ a: full, b: { restUntilMs: 1000 }, c: full });
    const askId = world.choose("r1");
    expect(world.asks()).toEqual([]);
    world.kit.advance(1100);
    expect(world.asks()).toMatchObject([{ to: "nodes/b" }]);
    world.grant();
    expect(world.placed(askId).queuedMs).toBeGreaterThanOrEqual(1000);
  });
});

describe("leaving", () => {
  it("takes a waiting request out of the queue", () => {
    const world = worldOf({ a: { inflight: 1, inflightMax: 1 } });
    const askId = world.choose("r1");
    world.choose("r2");
    world.kit.send({ kind: "router.cancel", requestId: "r1" });
    expect(world.refused(askId)).toMatchObject({ code: "client_closed" });
    expect(world.describe().pools[0]?.queued[0]?.waiting).toBe(1);
    world.change("a", { inflight: 0 });
    expect(world.asks()).toMatchObject([{ message: { leaseId: "r2#1" } }]);
    world.kit.send({ kind: "router.cancel", requestId: "r1" }); // Twice does nothing.
  });

  it("gives back a lease that is granted after the client left", () => {
    const world = worldOf({ a: { inflightMax: 1 } });
    const askId = world.choose("r1");
    world.kit.send({ kind: "router.cancel", requestId: "r1" });
    expect(world.refused(askId)).toMatchObject({ code: "client_closed" });
    world.grant();
    expect(world.released("a")).toEqual(["r1#1"]);
    expect(world.replies(askId)).toEqual([]);
    world.change("a", { inflight: 0 });
    world.choose("r2");
    expect(world.asks()).toMatchObject([{ to: "nodes/a" }]); // Its place is free again.
  });
});

describe("failing nodes", () => {
  it("retries within the pool's budget only: 10 % of requests and 20 in 10 s", () => {
    const world = worldOf({ a: {}, b: {} });
    for (let i = 0; i < 100; i++) world.choose(`r${i}`);
    const codes = Array.from({ length: 40 }, (_, i) => {
      const askId = world.choose(`retry${i}`, {}, { attempt: 2, tried: ["a"] });
      return world.replies(askId).map((reply) => (reply.kind === "refused" ? reply.code : ""))[0];
    });
    expect(codes.filter((code) => code === undefined)).toHaveLength(30);
    expect(codes.filter((code) => code === "retry_budget_exhausted")).toHaveLength(10);
    const budget = world.describe().pools[0]?.retryBudget;
    expect(budget).toEqual({ balance: 0, deposited: 100, withdrawn: 30, refused: 10 });
  });

  it("panics into unhealthy nodes rather than refusing, and says so", () => {
    const world = worldOf({
      a: { healthy: false },
      b: { healthy: false, inflight: 3 },
      c: { circuit: "open" },
    });
    const askId = world.choose("r1");
    expect(world.asks()).toMatchObject([{ to: "nodes/a" }]);
    world.grant();
    expect(world.placed(askId).decision.why).toMatch(/^panic/);
    expect(world.describe().pools[0]).toMatchObject({ panic: true, eligible: 2 });
  });

  it("still asks a pool whose circuits are all open, once per node, then refuses", () => {
    const world = worldOf({ a: { circuit: "open" } });
    const first = world.choose("r1");
    expect(world.asks()).toHaveLength(1);
    expect(world.refused(world.choose("r2")).code).toBe("no_node"); // One at a time.
    world.deny("open");
    expect(world.refused(first).code).toBe("no_node");
    expect(world.refused(world.choose("r3"), { denying: "open" }).code).toBe("no_node");
  });

  it("stops after three nodes whose circuits are open: more would say the same", () => {
    const world = worldOf(
      Object.fromEntries([..."abcde"].map((name) => [name, { circuit: "open" }])),
    );
    const askId = world.choose("r1");
    for (let i = 0; i < 3; i++) world.deny("open");
    expect(world.refused(askId)).toMatchObject({ code: "no_node" });
    expect(world.asks()).toEqual([]);
  });

  it("lets nobody wait behind the probes of a half-open node", () => {
    const world = worldOf({ a: { circuit: "half_open", probePermits: 0 } });
    expect(world.refused(world.choose("r1"))).toMatchObject({
      code: "no_node",
      retryAfterMs: 1000,
    });
  });

  it("refuses those who wait when the last node that they waited for goes down", () => {
    const world = worldOf({ a: { inflight: 1, inflightMax: 1 } });
    const askId = world.choose("r1");
    world.change("a", { circuit: "open" });
    expect(world.refused(askId).code).toBe("no_node");
  });

  it("keeps those who wait while a node's actor is restarted, and subscribes again", () => {
    const world = worldOf({ a: { inflight: 1, inflightMax: 1 } });
    const askId = world.choose("r1");
    world.kit.take();
    world.kit.terminate("nodes/a", "failed");
    world.kit.advance(300);
    expect(world.kit.told("nodes/a")).toMatchObject([{ kind: "gpu_node.subscribe" }]);
    expect(world.replies(askId)).toEqual([]);
    world.change("a", { incarnation: 2, version: 0, inflight: 0 });
    world.grant();
    expect(world.placed(askId).node).toBe("a");
  });

  it("believes a node's actor again that lived on while another process had the node", () => {
    const world = worldOf({ a: { incarnation: 3 } });
    world.kit.terminate("nodes/a", "noconnection"); // Its process is out of reach: another one takes over …
    world.kit.advance(300);
    world.change("a", { incarnation: 9, version: 0, inflight: 1, inflightMax: 1 });
    const askId = world.choose("r1");
    expect(world.asks()).toEqual([]);
    world.kit.terminate("nodes/a", "stopped"); // … and gives it back.
    world.kit.advance(300);
    world.change("a", { incarnation: 3, version: 50, inflight: 0, inflightMax: 1000 });
    world.grant();
    expect(world.placed(askId).node).toBe("a");
  });

  it("sheds batch by the fifth power of saturation", () => {
    const shed = (inflight: number) => {
      const world = worldOf({ a: { inflight, inflightMax: 100 } });
      let count = 0;
      for (let i = 0; i < 400; i++) {
        const askId = world.choose(`r${i}`, { priority: "batch" });
        count += world.replies(askId).length;
        world.kit.send({ kind: "router.cancel", requestId: `r${i}` });
        if (world.asks().length > 0) world.kit.answer(...world.lastAnswer());
      }
      return count;
    };
    expect(shed(10)).toBe(0);
    const half = shed(50); // 3 · 0.5^5 = 9.4 %
    expect(half).toBeGreaterThan(20);
    expect(half).toBeLessThan(60);
  });
});

describe("ejection", () => {
  const consents = (world: World, node: NodeId) =>
    world.kit.ask<{ granted: boolean }>((replyTo) => ({ kind: "router.may_eject", node, replyTo }))
      ?.granted;

  it("is granted to a third of a pool, and to one node at least", () => {
    for (const [nodes, allowed] of [
      [1, 1],
      [2, 1],
      [5, 1],
      [6, 2],
      [9, 3],
    ] as const) {
      const names = Array.from({ length: nodes }, (_, i) => `n${i}`);
      const world = worldOf(Object.fromEntries(names.map((name) => [name, {}])));
      const granted = names.filter((name) => consents(world, name)); // All at once, before any opens.
      expect(granted).toHaveLength(allowed);
      for (const name of granted) world.change(name, { circuit: "open" });
      world.kit.advance(5000);
      expect(names.filter((name) => !granted.includes(name) && consents(world, name))).toEqual([]);
      world.change(granted[0] ?? "", { circuit: "closed" });
      const other = names.find((name) => !granted.includes(name));
      if (other !== undefined) expect(consents(world, other)).toBe(true);
    }
  });

  it("needs room in each pool of the node; a grant that is not used lapses", () => {
    const world = worldOf({
      a: { models: ["x", "y"] },
      b: { models: ["x"], circuit: "half_open" },
      c: { models: ["y"] },
    });
    expect(consents(world, "a")).toBe(false);
    expect(consents(world, "c")).toBe(true);
    expect(consents(world, "stranger")).toBe(true);
    world.change("b", { circuit: "closed" });
    expect(consents(world, "a")).toBe(false); // c has just been granted it.
    world.kit.advance(2001);
    expect(consents(world, "a")).toBe(true);
  });
});

describe("nodes that come and go", () => {
  it("subscribes to every node there is at a start, and watches it", () => {
    const kit = testActor(new RouterActor(optionsOf(["a", "b"])));
    const effects = kit
      .take()
      .map(
        (effect) =>
          `${effect.kind} ${"to" in effect ? effect.to : "path" in effect ? effect.path : ""}`,
      );
    expect(effects).toEqual(["tell nodes/a", "watch nodes/a", "tell nodes/b", "watch nodes/b"]);
  });

  it("refuses those who wait for a removed node, and ignores its late news", () => {
    const world = worldOf({ a: { inflight: 1, inflightMax: 1 } });
    const askId = world.choose("r1");
    world.kit.send({ kind: "router.node_removed", node: "a" });
    expect(world.refused(askId).code).toBe("no_node");
    world.change("a", { inflight: 0 });
    expect(world.describe().pools).toEqual([]);
    world.kit.advance(5001);
    world.change("a", { inflight: 0 });
    expect(world.describe().pools).toHaveLength(1);
  });

  it("places elsewhere what was being asked of a node that is removed", () => {
    const world = worldOf({ a: {}, b: { inflight: 4 } });
    const askId = world.choose("r1");
    world.kit.send({ kind: "router.node_removed", node: "a" });
    world.kit.answer(...world.lastAnswer("stopped"));
    expect(world.asks()).toMatchObject([{ to: "nodes/b" }]);
    world.grant();
    expect(world.placed(askId).node).toBe("b");
  });

  it("follows new settings without losing who waits", () => {
    const world = worldOf({
      a: { inflight: 1, inflightMax: 1 },
      b: { inflight: 1, inflightMax: 1 },
    });
    const askId = world.choose("r1");
    const options = settingsOf({ strategy: "round_robin" });
    world.kit.send({ kind: "router.configure", options });
    expect(world.describe().strategy).toBe("round_robin");
    world.change("b", { inflight: 0 });
    world.grant();
    expect(world.placed(askId).decision.strategy).toBe("round_robin");
  });
});

describe("any course of events", () => {
  it("answers each request once, keeps every cap, and leaks no lease", () => {
    const event = fc.record({
      what: fc.constantFrom(
        "choose",
        "choose",
        "answer",
        "answer",
        "release",
        "cancel",
        "advance",
        "open",
        "close",
        "fail",
      ),
      pick: fc.nat(1000),
      ms: fc.nat(1500),
    });
    fc.assert(
      fc.property(
        fc.array(event, { maxLength: 150 }),
        fc.integer({ min: 1, max: 4 }),
        (events, nodes) => {
          const names = Array.from({ length: nodes }, (_, i) => `n${i}`);
          const world = worldOf(
            Object.fromEntries(names.map((name) => [name, { inflightMax: 2 }])),
          );
          const engine = new Engine(world, names);
          for (const { what, pick, ms } of events) engine.step(what, pick, ms);
          engine.drain();
        },
      ),
      { numRuns: 200 },
    );
  });
});

// ---- worlds ---------------------------------------------------------------------------------------------

/** A deadline far enough for any queue. */
const roomy = { deadlineAtMs: 900_000 };

type Ask = {
  to: string;
  index: number;
  message: Extract<GpuNodeMessage, { kind: "gpu_node.acquire" }>;
};
type World = ReturnType<typeof worldOf>;

function settingsOf(
  ranking: Partial<RouterSettings["ranking"]> = {},
  queue: Partial<RouterSettings["queue"]> = {},
): RouterSettings {
  return {
    ranking: {
      strategy: "headroom",
      articleNormalised: false,
      affinityLoadFactor: 1.5,
      exploreRatio: 0.01,
      prefillWeight: 0.5,
      kvGate: 0.92,
      waitingGate: 16,
      staleMs: 3000,
      staleWeight: 0.7,
      panicRatio: 0.5,
      ...ranking,
    },
    queue: { perKeyMax: 50, poolMax: 2000, poolSecondsMax: 5, waitMsMax: 30_000, ...queue },
    retry: { budgetRatio: 0.1, budgetFloorPerSecond: 2 },
    ejectedRatioMax: 0.34,
  };
}

function optionsOf(nodes: readonly NodeId[], settings = settingsOf()) {
  return {
    ...settings,
    node: (node: NodeId) => refTo<GpuNodeMessage>(`nodes/${node}`),
    nodes: () => nodes,
  };
}

/** A router that knows these nodes; each serves model "m" unless said otherwise. */
function worldOf(
  nodes: Record<NodeId, Partial<NodeSnapshot> | { models: undefined }>,
  ranking: Partial<RouterSettings["ranking"]> = {},
  queue: Partial<RouterSettings["queue"]> = {},
) {
  const names = Object.keys(nodes);
  const kit = testActor<RouterMessage>(
    new RouterActor(optionsOf(names, settingsOf(ranking, queue))),
  );
  const snapshots = new Map<NodeId, NodeSnapshot>();
  const open: Ask[] = [];
  const told: { to: string; message: unknown }[] = [];
  const replied = new Map<number, ChooseReply[]>();

  /** Sorts what has come out since the last look. */
  const look = () => {
    for (const effect of kit.take()) {
      if (effect.kind === "ask") {
        const { to, index } = effect;
        open.push({ to, index, message: effect.message as Ask["message"] });
      }
      if (effect.kind === "tell") {
        told.push(effect);
        // An acquire that went unanswered ends so.
        const { kind, leaseId } = effect.message as { kind: string; leaseId?: string };
        const at = open.findIndex(
          ({ to, message }) => to === effect.to && message.leaseId === leaseId,
        );
        if (kind === "gpu_node.release" && at >= 0) open.splice(at, 1);
      }
      if (effect.kind === "reply") {
        const replies = replied.get(effect.askId) ?? [];
        replied.set(effect.askId, [...replies, effect.value as ChooseReply]);
      }
    }
  };
  const snapshotOf = (node: NodeId): NodeSnapshot => {
    const snapshot = snapshots.get(node);
    if (snapshot === undefined) throw new Error(`no node ${node}`);
    return snapshot;
  };
  const nextOf = (node: NodeId, change: object): NodeSnapshot => {
    const held = snapshotOf(node);
    const next = { ...held, atMs: kit.nowMs, version: held.version + 1, ...change };
    snapshots.set(node, next);
    return next;
  };
  const answer = (reply: (node: NodeId, ask: Ask) => AcquireReply) => {
    look();
    const ask = open.shift();
    if (ask === undefined) throw new Error("nothing is asked");
    kit.answer(ask.index, { ok: true, value: reply(ask.to.slice(6), ask) });
  };
  const world = {
    kit,
    names,
    join(node: NodeId, change: object): void {
      snapshots.set(node, {
        node,
        address: `${node}:8000`,
        incarnation: 1,
        version: 1,
        atMs: kit.nowMs,
        models: ["m"],
        inflight: 0,
        prefillTokens: 0,
        inflightMax: 1000,
        itlSeconds: 0.02,
        circuit: "closed",
        probePermits: 0,
        draining: false,
        ramp: 1,
        healthy: true,
        restUntilMs: 0,
        articleWeight: 1,
        ...change,
      });
      kit.send({ kind: "router.node_changed", snapshot: snapshotOf(node) });
    },
    change(node: NodeId, change: Partial<NodeSnapshot>): void {
      kit.send({ kind: "router.node_changed", snapshot: nextOf(node, change) });
    },
    /** Returns the id under which `replies` finds the answer. */
    choose(
      requestId: string,
      facts: Partial<RequestFacts> | { model: undefined } = {},
      attempt: { attempt: number; tried: NodeId[] } = { attempt: 1, tried: [] },
    ): number {
      const replyTo = kit.replyTo<ChooseReply>();
      kit.send({
        kind: "router.choose",
        facts: factsOf(requestId, kit.nowMs, facts),
        ...attempt,
        owner: "requests",
        replyTo,
      });
      return replyTo.askId;
    },
    /** Acquires that wait for an answer, oldest first. */
    asks(): readonly Ask[] {
      look();
      return open;
    },
    /** Grants the oldest acquire, in the name of the node asked. */
    grant(): void {
      answer((node, ask) => ({
        kind: "granted",
        leaseId: ask.message.leaseId,
        node,
        probe: false,
        snapshot: nextOf(node, { inflight: snapshotOf(node).inflight + 1 }),
      }));
    },
    deny(reason: "full" | "open"): void {
      answer((node) => {
        const change = reason === "full" ? { inflight: snapshotOf(node).inflightMax } : {};
        return { kind: "denied", reason, snapshot: nextOf(node, change) };
      });
    },
    /** The node asked first is down, as it says itself; returns which. */
    down(): NodeId {
      const node = world.asks()[0]?.to.slice(6) ?? "";
      nextOf(node, { circuit: "open" });
      world.deny("open");
      return node;
    },
    /** What to answer to the latest acquire: that it failed, or a denial. */
    lastAnswer(failure?: "stopped"): Parameters<typeof kit.answer> {
      look();
      const ask = open.pop();
      if (ask === undefined) return [-1, { ok: false, failure: "timeout" }];
      if (failure !== undefined) return [ask.index, { ok: false, failure }];
      const snapshot = snapshotOf(ask.to.slice(6));
      return [ask.index, { ok: true, value: { kind: "denied", reason: "full", snapshot } }];
    },
    replies(askId: number): ChooseReply[] {
      look();
      const replies = replied.get(askId) ?? [];
      replied.delete(askId);
      return replies;
    },
    placed(askId: number, asked?: { granting: true }): Extract<ChooseReply, { kind: "placed" }> {
      if (asked !== undefined) world.grant();
      const replies = world.replies(askId);
      const [reply] = replies;
      if (replies.length !== 1 || reply?.kind !== "placed")
        throw new Error(`got ${JSON.stringify(replies)}`);
      return reply;
    },
    refused(askId: number, asked?: { denying: "open" }): Extract<ChooseReply, { kind: "refused" }> {
      if (asked !== undefined) world.deny(asked.denying);
      const replies = world.replies(askId);
      const [reply] = replies;
      if (replies.length !== 1 || reply?.kind !== "refused")
        throw new Error(`got ${JSON.stringify(replies)}`);
      return reply;
    },
    /** Leases given back to a node. */
    released(node: NodeId): string[] {
      look();
      return told.flatMap(({ to, message }) => {
        const each = message as GpuNodeMessage;
        const isMeant = to === `nodes/${node}` && each.kind === "gpu_node.release";
        return isMeant && each.outcome === "cancelled" ? [each.leaseId] : [];
      });
    },
    takeReleased(): { node: NodeId; leaseId: string }[] {
      look();
      return told.splice(0).flatMap(({ to, message }) => {
        const each = message as GpuNodeMessage;
        return each.kind === "gpu_node.release"
          ? [{ node: to.slice(6), leaseId: each.leaseId }]
          : [];
      });
    },
    describe(): RouterDescription {
      const description = kit.ask<RouterDescription>((replyTo) => ({
        kind: "router.describe",
        replyTo,
      }));
      if (description === undefined) throw new Error("no description");
      return description;
    },
  };
  for (const [node, change] of Object.entries(nodes)) world.join(node, change);
  look();
  told.length = 0;
  return world;
}

function factsOf(requestId: string, nowMs: number, change: object): RequestFacts {
  return {
    requestId,
    tenant: "t",
    limitKey: "k",
    limits: {},
    weight: 1,
    priority: "standard",
    route: "chat",
    model: "m",
    stream: true,
    cacheRead: false,
    cacheWrite: false,
    promptTokens: 100,
    arrivedAtMs: nowMs,
    deadlineAtMs: nowMs + 20_000,
    ...change,
  };
}

/** Nodes that keep their caps, requests that come and go, and the books that must balance. */
class Engine {
  readonly #world: World;
  readonly #leases = new Map<NodeId, Set<string>>();
  /** Of requests that are not answered yet. */
  readonly #askIds = new Map<string, number>();
  readonly #held: { node: NodeId; leaseId: string }[] = [];
  readonly #open = new Set<NodeId>();
  #made = 0;

  constructor(world: World, names: readonly NodeId[]) {
    this.#world = world;
    for (const name of names) this.#leases.set(name, new Set());
  }

  step(what: string, pick: number, ms: number): void {
    const world = this.#world;
    const node = world.names[pick % world.names.length] ?? "";
    switch (what) {
      case "choose": {
        const requestId = `r${this.#made++}`;
        const isRetry = pick % 5 === 0;
        const attempt = isRetry ? { attempt: 2, tried: [node] } : { attempt: 1, tried: [] };
        const facts = { affinityKey: pick % 7, deadlineAtMs: world.kit.nowMs + 1 + ms };
        this.#askIds.set(requestId, world.choose(requestId, facts, attempt));
        break;
      }
      case "answer":
        if (world.asks().length > 0) this.#answer();
        break;
      case "fail":
        if (world.asks().length > 0) world.kit.answer(...world.lastAnswer("stopped"));
        break;
      case "release": {
        const lease = this.#held[pick % Math.max(1, this.#held.length)];
        if (lease === undefined) break;
        this.#held.splice(this.#held.indexOf(lease), 1);
        this.#free(lease.node, lease.leaseId);
        break;
      }
      case "cancel": {
        const requestId = [...this.#askIds.keys()][pick % Math.max(1, this.#askIds.size)];
        if (requestId !== undefined) world.kit.send({ kind: "router.cancel", requestId });
        break;
      }
      case "open":
        this.#open.add(node);
        this.#publish(node);
        break;
      case "close":
        this.#open.delete(node);
        this.#publish(node);
        break;
      default:
        this.#advance(ms);
    }
    this.#collect();
  }

  /** Everything is answered, freed and waited out: then nothing may be left anywhere. */
  drain(): void {
    const world = this.#world;
    for (const node of world.names) this.step("close", world.names.indexOf(node), 0);
    for (let i = 0; i < 40; i++) {
      while (world.asks().length > 0) this.step("answer", 0, 0);
      while (this.#held.length > 0) this.step("release", 0, 0);
      this.step("advance", 0, 1000);
    }
    expect([...this.#askIds.keys()]).toEqual([]);
    for (const leases of this.#leases.values()) expect([...leases]).toEqual([]);
    for (const { queued } of world.describe().pools) expect(queued).toEqual([]);
    expect(world.kit.timers()).toEqual([]);
    // Its own count of what it has asked for is back at nothing: a full round fits every node.
    for (const node of world.names) this.#publish(node);
    for (let i = 0; i < 2 * world.names.length; i++) world.choose(`end${i}`, { affinityKey: i });
    expect(world.asks()).toHaveLength(2 * world.names.length);
  }

  /** Acquires time out by themselves here; the node then never saw them. */
  #advance(ms: number): void {
    while (this.#world.asks().length > 0) this.#answer();
    this.#world.kit.advance(ms);
  }

  #answer(): void {
    const ask = this.#world.asks()[0];
    if (ask === undefined) return;
    const node = ask.to.slice(6);
    const leases = this.#leases.get(node) ?? new Set();
    if (this.#open.has(node)) return this.#world.deny("open");
    if (leases.size >= 2) return this.#world.deny("full");
    leases.add(ask.message.leaseId);
    this.#world.grant();
  }

  #free(node: NodeId, leaseId: string): void {
    if (this.#leases.get(node)?.delete(leaseId)) this.#publish(node);
  }

  #publish(node: NodeId): void {
    const circuit = this.#open.has(node) ? "open" : "closed";
    this.#world.change(node, { inflight: this.#leases.get(node)?.size ?? 0, circuit });
  }

  #collect(): void {
    for (const { node, leaseId } of this.#world.takeReleased()) this.#free(node, leaseId);
    for (const [requestId, askId] of this.#askIds) {
      const replies = this.#world.replies(askId);
      if (replies.length === 0) continue;
      expect(replies).toHaveLength(1);
      this.#askIds.delete(requestId);
      const [reply] = replies;
      if (reply?.kind !== "placed") continue;
      expect(this.#leases.get(reply.node)?.has(reply.leaseId)).toBe(true);
      this.#held.push({ node: reply.node, leaseId: reply.leaseId });
    }
    const held = [...this.#leases.values()].reduce((sum, { size }) => sum + size, 0);
    expect(held).toBe(this.#held.length);
    for (const { size } of this.#leases.values()) expect(size).toBeLessThanOrEqual(2);
  }
}
