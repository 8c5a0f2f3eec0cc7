/** Filter, score and pick: each gate, and each strategy's law against a plain restatement of it. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  type Draw,
  Field,
  hashOf,
  makeStrategy,
  membershipOf,
  NodeView,
  type RankingOptions,
  rendezvousHash,
  type StrategyName,
  strategyNames,
  uncachedTokensOf,
  type Wanted,
} from "../actors/node-score.ts";
import type { NodeSnapshot } from "../actors/protocol.ts";
import { Random } from "../runtime/random.ts";

const NOW_MS = 100_000;

const options: RankingOptions = {
  strategy: "headroom",
  articleNormalised: false,
  affinityLoadFactor: 1.5,
  exploreRatio: 0.01,
  prefillWeight: 0.5,
  kvGate: 0.92,
  waitingGate: 4,
  staleMs: 3000,
  staleWeight: 0.7,
  panicRatio: 0.5,
};

describe("gates", () => {
  const gates: [reason: string, change: Partial<NodeSnapshot>, text: RegExp][] = [
    ["draining", { draining: true }, /^draining$/],
    ["circuit", { circuit: "open" }, /^circuit open$/],
    ["half-open permits", { circuit: "half_open", probePermits: 0 }, /without a free permit/],
    ["capacity", { inflight: 8, inflightMax: 8 }, /^full: 8 of 8/],
    ["health", { healthy: false }, /health checks/],
    ["rest", { restUntilMs: NOW_MS + 1500 }, /left alone for 1500 ms/],
    ["KV", { scrape: scraped({ kv: 0.93 }) }, /^KV cache 0.93 is above 0.92/],
    ["engine queue", { scrape: scraped({ waiting: 5 }) }, /^5 waiting in the engine/],
  ];
  for (const [gate, change, text] of gates) {
    it(`exclude a node by ${gate}, and say so`, () => {
      const pool = poolOf([{}, change, {}, {}]);
      pool.filter(wanted());
      expect(pool.eligible()).toEqual(["n0", "n2", "n3"]);
      const facts = pool.field.explain(pool.strategy, wanted(), undefined);
      expect(facts[1]?.eligible).toBe(false);
      expect(facts[1]?.excluded).toMatch(text);
      expect(facts[0]?.excluded).toBeUndefined();
    });
  }

  it("stand open exactly at their bounds", () => {
    const pool = poolOf([
      { inflight: 7, inflightMax: 8 },
      { circuit: "half_open", probePermits: 1 },
      { restUntilMs: NOW_MS },
      { scrape: scraped({ kv: 0.92, waiting: 4 }) },
      // Waiting for a LoRA slot or a KV transfer is not want of capacity.
      { scrape: scraped({ waiting: 50, waitingForCapacity: 4 }) },
    ]);
    pool.filter(wanted());
    expect(pool.field.count).toBe(5);
  });

  it("count leases that are asked for and not answered yet", () => {
    const pool = poolOf([
      { inflight: 7, inflightMax: 8 },
      { circuit: "half_open", probePermits: 1 },
      {},
      {},
    ]);
    pool.view("n0").expect(100);
    pool.view("n1").expect(100);
    pool.filter(wanted());
    expect(pool.eligible()).toEqual(["n2", "n3"]);
    pool.view("n0").answered(100);
    pool.view("n1").answered(100);
    pool.filter(wanted());
    expect(pool.field.count).toBe(4);
    expect(pool.view("n0")).toMatchObject({ inflight: 7, prefillTokens: 0 });
  });

  it("exclude tried nodes by name and by address, and denying ones", () => {
    const pool = poolOf([{ address: "gpu:1" }, { address: "gpu:2" }, { address: "gpu:1" }, {}, {}]);
    pool.filter(wanted({ tried: ["n0", "n3"], triedAddresses: ["gpu:1"], denied: ["n4"] }));
    expect(pool.eligible()).toEqual(["n1"]); // The same host on another port is another node.
  });

  it("ignore a stale scrape, whose node then weighs 0.7 of itself", () => {
    const atMs = NOW_MS - 3001;
    const pool = poolOf([
      { scrape: { ...scraped({ kv: 0.99 }), atMs } },
      {},
      { scrape: scraped({}) },
    ]);
    pool.filter(wanted());
    expect(pool.field.count).toBe(3);
    expect(pool.field.weightOf(pool.view("n0"))).toBeCloseTo(0.7 * 50, 9);
    expect(pool.field.weightOf(pool.view("n1"))).toBeCloseTo(50, 9); // Without metrics: unknown, not stale.
    expect(pool.field.weightOf(pool.view("n2"))).toBeCloseTo(50, 9);
  });

  it("read another machine's instants as ages", () => {
    const offsetMs = -90_000; // The node's clock is far behind ours.
    const pool = poolOf([
      {
        atMs: NOW_MS + offsetMs,
        restUntilMs: NOW_MS + offsetMs + 400,
        scrape: { ...scraped({ kv: 0.99 }), atMs: NOW_MS + offsetMs - 500 },
      },
    ]);
    expect(pool.view("n0").restUntilMs).toBe(NOW_MS + 400);
    expect(pool.view("n0").scrapedAtMs).toBe(NOW_MS - 500);
  });

  it("know members, other models, other adapters and the yet unknown", () => {
    const base = snapshotOf("a", { models: ["llama"], adapters: ["sql"] });
    expect(membershipOf(base, "llama")).toBe("member");
    expect(membershipOf(base, "sql")).toBe("member");
    expect(membershipOf(base, "law")).toBe("adapter");
    expect(membershipOf(base, undefined)).toBe("member");
    expect(membershipOf(snapshotOf("a", { models: ["llama"] }), "qwen")).toBe("model");
    expect(membershipOf(snapshotOf("a", {}), "llama")).toBe("models_unknown");
  });
});

describe("panic", () => {
  const gated = { scrape: scraped({ kv: 0.99 }) };

  it("opens the soft gates when fewer than half of the candidates pass", () => {
    const pool = poolOf([{}, gated, gated, { circuit: "open" }]);
    pool.filter(wanted());
    expect(pool.field.isPanic).toBe(true);
    expect(pool.eligible()).toEqual(["n0", "n1", "n2"]); // Not the hard-down one.
  });

  it("does not come at exactly half, nor with a ratio of 0", () => {
    const half = poolOf([{}, {}, gated, gated]);
    half.filter(wanted());
    expect(half.field.isPanic).toBe(false);
    const never = poolOf([gated, gated], { panicRatio: 0 });
    never.filter(wanted());
    expect(never.field.count).toBe(0);
    expect(never.field.waitable).toBe(2);
  });

  it("is not caused by full nodes: they work, and waiting for them is right", () => {
    const full = { inflight: 4, inflightMax: 4 };
    const pool = poolOf([full, full, full, gated]);
    pool.filter(wanted());
    expect(pool.field.isPanic).toBe(false);
    expect(pool.field.count).toBe(0);
    expect(pool.field.waitable).toBe(4);
  });

  it("does not count nodes that drain or were tried", () => {
    const pool = poolOf([{}, { draining: true }, { draining: true }, {}]);
    pool.filter(wanted({ tried: ["n3"] }));
    expect(pool.field.isPanic).toBe(false);
  });

  it("asks nodes with open circuits when nothing else is left, one request at a time", () => {
    const pool = poolOf([{ circuit: "open" }, { circuit: "open" }, { draining: true }]);
    pool.filter(wanted());
    expect(pool.eligible()).toEqual(["n0", "n1"]);
    expect(pool.field).toMatchObject({ isLastResort: true, waitable: 0 });
    pool.view("n0").expect(1);
    pool.filter(wanted({ denied: ["n1"] }));
    expect(pool.field.count).toBe(0);
  });
});

describe("headroom", () => {
  it("takes the least (n + 1 + 0.5 · prefill / mean) / weight (no key)", () => {
    const node = fc.record({
      inflight: fc.integer({ min: 0, max: 30 }),
      prefillTokens: fc.integer({ min: 0, max: 50_000 }),
      itl: fc.constantFrom(0.01, 0.02, 0.05),
      ramp: fc.constantFrom(0.1, 0.5, 1),
    });
    fc.assert(
      fc.property(
        fc.array(node, { minLength: 2, maxLength: 16 }),
        fc.nat(4000),
        (nodes, prompt) => {
          const pool = poolOf(nodes.map(({ itl, ...rest }) => ({ ...rest, itlSeconds: itl })));
          pool.field.learnPrompt(800);
          const request = wanted({ promptTokens: prompt, sent: [{ node: "n1", tokens: 500 }] });
          const costs = nodes.map(({ inflight, prefillTokens, itl, ramp }, i) => {
            const uncached = i === 1 ? Math.max(0, prompt - 500) : prompt;
            return (inflight + 1 + (0.5 * (prefillTokens + uncached)) / 800) / (ramp / itl);
          });
          const chosen = pool.pick(request, seeded(1));
          const cost = costs[Number(chosen?.slice(1))] ?? Number.NaN;
          expect(cost).toBeCloseTo(Math.min(...costs), 9);
        },
      ),
    );
  });

  it("draws among equals evenly", () => {
    const pool = poolOf([{}, {}, {}, { inflight: 9 }]);
    const draw = seeded(7);
    const counts = tally(3000, () => pool.pick(wanted(), draw));
    expect(counts.get("n3")).toBeUndefined();
    for (const node of ["n0", "n1", "n2"]) expect(counts.get(node)).toBeGreaterThan(900);
  });

  it("gives an unmeasured node the pool's median speed", () => {
    const pool = poolOf([
      { itlSeconds: 0.01 },
      { itlSeconds: 0.02 },
      { itlSeconds: 0.08 },
      "unmeasured",
    ]);
    pool.filter(wanted());
    expect(pool.field.weightOf(pool.view("n3"))).toBeCloseTo(50, 9);
  });

  it("walks the rendezvous order and takes the first within its load bound", () => {
    const node = fc.record({
      inflight: fc.integer({ min: 0, max: 12 }),
      itl: fc.constantFrom(0.01, 0.02, 0.04),
    });
    const key = fc.integer({ min: 0, max: 0xffffffff });
    let byKey = 0;
    fc.assert(
      fc.property(fc.array(node, { minLength: 2, maxLength: 12 }), key, (nodes, affinityKey) => {
        const pool = poolOf(
          nodes.map(({ inflight, itl }) => ({ inflight, itlSeconds: itl })),
          { exploreRatio: 0 },
        );
        const inflightSum = nodes.reduce((sum, { inflight }) => sum + inflight, 0);
        const weightSum = nodes.reduce((sum, { itl }) => sum + 1 / itl, 0);
        const isWithin = ({ inflight, itl }: { inflight: number; itl: number }) =>
          inflight + 1 <= Math.max(2, ((1.5 * (1 + inflightSum)) / weightSum) * (1 / itl));
        const order = nodes
          .map((node, i) => ({ ...node, i, hash: rendezvousHash(affinityKey, hashOf(`n${i}`)) }))
          .sort((a, b) => b.hash - a.hash);
        const expected = order.find(isWithin);
        const chosen = pool.pick(wanted({ affinityKey }), seeded(1));
        if (expected === undefined) return;
        byKey++;
        expect(pool.field.why).toMatch(/^affinity/);
        expect(chosen).toBe(`n${expected.i}`);
      }),
      { numRuns: 500 },
    );
    expect(byKey).toBeGreaterThan(400);
  });

  it("never exceeds the affinity bound, whatever the keys: one hot key spreads", () => {
    const pool = poolOf(
      Array.from({ length: 8 }, () => ({})),
      { exploreRatio: 0 },
    );
    const draw = seeded(3);
    let placed = 0;
    for (let i = 0; i < 400; i++) {
      const chosen = pool.pick(wanted({ affinityKey: 4711 }), draw);
      if (chosen === undefined) break;
      const view = pool.view(chosen);
      if (/^affinity/.test(pool.field.why))
        expect(view.inflight + 1).toBeLessThanOrEqual(Math.max(2, (1.5 * (1 + placed)) / 8));
      view.expect(0);
      placed++;
    }
    expect(placed).toBe(400);
    for (const view of pool.field.views) expect(view.inflight).toBeLessThanOrEqual((1.5 * 400) / 8);
  });

  it("moves only the keys of a node that leaves, and moves them evenly", () => {
    const names = Array.from({ length: 8 }, (_, i) => `n${i}`);
    const home = (key: number, nodes: readonly string[]) =>
      nodes.reduce((best, node) =>
        rendezvousHash(key, hashOf(node)) > rendezvousHash(key, hashOf(best)) ? node : best,
      );
    const left = names.filter((name) => name !== "n3");
    const pool = poolOf(
      names.map(() => ({})),
      { exploreRatio: 0 },
    );
    const smaller = poolOf(
      names.map(() => ({})),
      { exploreRatio: 0 },
    );
    smaller.field.remove(smaller.view("n3"));
    const moved = new Map<string, number>();
    const random = new Random(5);
    for (let i = 0; i < 4000; i++) {
      const key = Math.floor(random.next() * 2 ** 32);
      const before = pool.pick(wanted({ affinityKey: key }), seeded(1));
      const after = smaller.pick(wanted({ affinityKey: key }), seeded(1));
      expect(before).toBe(home(key, names));
      expect(after).toBe(home(key, left));
      if (before !== "n3") expect(after).toBe(before);
      else moved.set(after ?? "", (moved.get(after ?? "") ?? 0) + 1);
    }
    const total = [...moved.values()].reduce((sum, count) => sum + count, 0);
    expect(total).toBeGreaterThan(400);
    expect(total).toBeLessThan(600);
    for (const node of left) expect(moved.get(node)).toBeGreaterThan(40);
  });

  it("explores with 1 % of keyed requests", () => {
    const pool = poolOf([{}, {}, {}, {}]);
    const draw = seeded(11);
    const counts = tally(20_000, () => {
      pool.pick(wanted({ affinityKey: 99 }), draw);
      return pool.field.why.split(":")[0];
    });
    expect(counts.get("explore")).toBeGreaterThan(140);
    expect(counts.get("explore")).toBeLessThan(260);
    expect(counts.get("affinity")).toBe(20_000 - (counts.get("explore") ?? 0));
  });

  it("samples two of more than 16, and three while news is fresh", () => {
    const nodes = Array.from({ length: 20 }, (_, i) => ({ inflight: 20 - i }));
    const stale = poolOf(nodes, {}, NOW_MS - 150);
    // Of 20: index 4, then index 10 of the other 19, which is the 11th.
    expect(stale.pick(wanted(), scripted([0.2, 0.55]))).toBe("n11");
    const fresh = poolOf(nodes, {}, NOW_MS - 50);
    expect(fresh.pick(wanted(), scripted([0.2, 0.55, 0.2, 0.95]))).toBe("n19");
  });

  it("samples two of few when no node has been heard of for 250 ms", () => {
    const nodes = [{ inflight: 5 }, { inflight: 4 }, { inflight: 0 }];
    expect(poolOf(nodes, {}, NOW_MS - 251).pick(wanted(), scripted([0, 0]))).toBe("n1");
    expect(poolOf(nodes, {}, NOW_MS - 250).pick(wanted(), scripted([]))).toBe("n2");
  });

  it("tries a half-open node with a short first attempt that has no prefix elsewhere", () => {
    const pool = poolOf([{}, { circuit: "half_open", probePermits: 2, ramp: 0.1 }, {}]);
    const why = (request: Wanted) => {
      pool.pick(request, seeded(1));
      return pool.field.why.split(":")[0];
    };
    expect(pool.pick(wanted({ affinityKey: 1 }), seeded(1))).toBe("n1");
    expect(why(wanted({ affinityKey: 1 }))).toBe("trial");
    expect(why(wanted({ promptTokens: 2001 }))).toBe("score");
    expect(why(wanted({ isRetry: true }))).toBe("score");
    expect(why(wanted({ affinityKey: 1, sent: [{ node: "n0", tokens: 9 }] }))).toBe("affinity");
  });

  it("tries a half-open node with any first attempt once it has waited for a short one", () => {
    const long = wanted({ promptTokens: 9000, affinityKey: 1, sent: [{ node: "n0", tokens: 9 }] });
    const halfOpen = { circuit: "half_open", probePermits: 2, ramp: 0.1 } as const;
    const at = (sinceMs: number) => poolOf([{}, halfOpen, {}], {}, NOW_MS - sinceMs);
    expect(at(4999).pick(long, seeded(1))).not.toBe("n1");
    expect(at(5000).pick(long, seeded(1))).toBe("n1");
    expect(at(5000).pick({ ...long, isRetry: true }, seeded(1))).not.toBe("n1");
  });

  it("goes on down its order as nodes deny", () => {
    const pool = poolOf([{ inflight: 3 }, { inflight: 1 }, { inflight: 2 }, { inflight: 0 }]);
    const order: string[] = [];
    for (;;) {
      const next = pool.pick(wanted({ denied: order }), seeded(1));
      if (next === undefined) break;
      order.push(next);
    }
    expect(order).toEqual(["n3", "n1", "n2", "n0"]);
    expect(pool.field.waitable).toBe(4);
  });
});

describe("the other strategies", () => {
  it("each tries a half-open node, however slow it looks: else it would never come back", () => {
    const slow = {
      circuit: "half_open",
      probePermits: 2,
      latencyMsAtInflight: 9000,
      latencyMsPeakEwma: 9000,
      scrape: scraped({ waiting: 3, latencySeconds: 9 }),
    } as const;
    const quick = { latencyMsAtInflight: 10, latencyMsPeakEwma: 10, scrape: scraped({}) };
    for (const strategy of strategyNames) {
      const pool = poolOf([quick, slow, quick], { strategy });
      expect(pool.pick(wanted(), seeded(1))).toBe("n1");
      expect(pool.pick(wanted({ isRetry: true }), scripted([0, 0, 0.9, 0.9]))).not.toBe("n1");
    }
  });

  it("round_robin: each in turn, passing over the ineligible", () => {
    const pool = poolOf([{}, {}, { draining: true }, {}], { strategy: "round_robin" });
    const turns = Array.from({ length: 6 }, () => pool.pick(wanted(), seeded(1)));
    expect(turns).toEqual(["n0", "n1", "n3", "n0", "n1", "n3"]);
    pool.field.remove(pool.view("n0"));
    expect([1, 2].map(() => pool.pick(wanted(), seeded(1)))).toEqual(["n1", "n3"]);
  });

  it("least_inflight: fewest, equals drawn evenly", () => {
    const pool = poolOf([{ inflight: 2 }, { inflight: 1 }, { inflight: 1 }], {
      strategy: "least_inflight",
    });
    const draw = seeded(2);
    const counts = tally(1000, () => pool.pick(wanted(), draw));
    expect(counts.get("n0")).toBeUndefined();
    expect(counts.get("n1")).toBeGreaterThan(400);
    expect(counts.get("n2")).toBeGreaterThan(400);
  });

  it("power_of_two: the lesser of two different ones", () => {
    const pool = poolOf([{ inflight: 5 }, { inflight: 3 }, { inflight: 4 }, { inflight: 9 }], {
      strategy: "power_of_two",
    });
    expect(pool.pick(wanted(), scripted([0, 0.7]))).toBe("n0"); // Of n0 and n3.
    expect(pool.pick(wanted(), scripted([0.3, 0.4]))).toBe("n1"); // Of n1 and n2.
    const draw = seeded(4);
    const counts = tally(2000, () => pool.pick(wanted(), draw));
    expect(counts.get("n3")).toBeUndefined(); // The busiest loses to whomever it meets.
    expect(counts.get("n1")).toBeGreaterThan(900); // The idlest wins whenever drawn: half the time.
  });

  it("peak_ewma: the lesser latency × (n + 1) of two; an unmeasured node gets one request", () => {
    const pool = poolOf(
      [
        { latencyMsPeakEwma: 1000, inflight: 3 },
        { latencyMsPeakEwma: 300, inflight: 9 },
        {},
        { inflight: 1 },
      ],
      { strategy: "peak_ewma" },
    );
    expect(pool.pick(wanted(), scripted([0, 0]))).toBe("n1"); // 4000 against 3000.
    expect(pool.pick(wanted(), scripted([0, 0.4]))).toBe("n2"); // Unmeasured and idle.
    expect(pool.pick(wanted(), scripted([0, 0.7]))).toBe("n0"); // Unmeasured and busy.
  });

  it("prequal: the cold node of least latency; hot ones wait, however fast", () => {
    const nodes = Array.from({ length: 10 }, (_, i) => ({
      inflight: i,
      latencyMsAtInflight: 1000 - 100 * i,
    }));
    const pool = poolOf(nodes, { strategy: "prequal" });
    // The 0.84 quantile of 0…9 is 8: n9 is hot, n8 the fastest of the cold.
    expect(pool.pick(wanted(), seeded(1))).toBe("n8");
    expect(pool.field.why).toMatch(/cold/);
  });

  it("prequal: the least loaded when all are hot by what was seen before", () => {
    const pool = poolOf([{}, {}], { strategy: "prequal" });
    for (let i = 0; i < 60; i++) pool.pick(wanted(), seeded(1)); // 120 probes that saw idle nodes.
    pool.view("n0").expect(0);
    pool.view("n0").expect(0);
    pool.view("n1").expect(0);
    expect(pool.pick(wanted(), seeded(1))).toBe("n1");
    expect(pool.field.why).toMatch(/all hot/);
  });

  it("article: 0.5 · queue + 0.3 · latency + 0.2 · memory of the last scrape, raw", () => {
    const nodes = articleNodes();
    const pool = poolOf(nodes, { strategy: "article" });
    expect(pool.pick(wanted(), seeded(1))).toBe("n2");
    expect(pool.costs()).toEqual([
      ["n0", 2.78], // 0.5 · 4 + 0.3 · 2 + 0.2 · 0.9
      ["n1", 2.82], // 0.5 · 2 + 0.3 · 6 + 0.2 · 0.1
      ["n2", 2.5], // 0.5 · 3 + 0.3 · 3 + 0.2 · 0.5
    ]);
    pool.view("n2").snapshot = { ...pool.view("n2").snapshot, articleWeight: 0.1 };
    expect(pool.pick(wanted(), seeded(1))).toBe("n2"); // Nothing reads the weight.
  });

  it("article, normalised: each term by its greatest, the sum by the weight", () => {
    const pool = poolOf(articleNodes(), { strategy: "article", articleNormalised: true });
    expect(pool.pick(wanted(), seeded(1))).toBe("n1");
    expect(pool.costs()).toEqual([
      ["n0", 0.8], // 0.5 · 4/4 + 0.3 · 2/6 + 0.2 · 0.9/0.9
      ["n1", 0.5722], // 0.5 · 2/4 + 0.3 · 6/6 + 0.2 · 0.1/0.9
      ["n2", 0.6361], // 0.5 · 3/4 + 0.3 · 3/6 + 0.2 · 0.5/0.9
    ]);
    pool.view("n1").snapshot = { ...pool.view("n1").snapshot, articleWeight: 0.5 };
    expect(pool.pick(wanted(), seeded(1))).toBe("n2");
  });

  it("article: sends everything to one node while the scrape lasts, gated by health alone", () => {
    const full = { scrape: scraped({ kv: 0.99, waiting: 0, latencySeconds: 0 }) };
    const pool = poolOf([{ scrape: scraped({ waiting: 3 }) }, full, { healthy: false }], {
      strategy: "article",
    });
    const counts = tally(200, () => {
      const chosen = pool.pick(wanted(), seeded(1));
      pool.view(chosen ?? "").expect(0);
      return chosen;
    });
    expect([...counts]).toEqual([["n1", 200]]);
  });

  it("all of them pick only eligible nodes, and nobody when there is none", () => {
    const strategy = fc.constantFrom<StrategyName>(
      "headroom",
      "round_robin",
      "least_inflight",
      "power_of_two",
      "peak_ewma",
      "prequal",
      "article",
    );
    const node = fc.record({
      draining: fc.boolean(),
      inflight: fc.integer({ min: 0, max: 4 }),
      circuit: fc.constantFrom("closed" as const, "open" as const),
    });
    fc.assert(
      fc.property(strategy, fc.array(node, { maxLength: 40 }), fc.nat(), (name, nodes, seed) => {
        const pool = poolOf(
          nodes.map((each) => ({ ...each, inflightMax: 4 })),
          { strategy: name, panicRatio: 0 },
        );
        const open = nodes.flatMap((each, i) =>
          each.draining || each.inflight >= 4 || each.circuit === "open" ? [] : [`n${i}`],
        );
        const chosen = pool.pick(wanted({ affinityKey: seed }), seeded(seed));
        if (open.length === 0) expect(chosen).toBeUndefined();
        else expect(open).toContain(chosen);
      }),
    );
  });
});

describe("views and explanations", () => {
  it("after a move any other incarnation is the later one, and the former is past", () => {
    const view = new NodeView(snapshotOf("a", { incarnation: 9, version: 5, inflight: 3 }), 0, 10);
    view.moved();
    expect(view.update(snapshotOf("a", { incarnation: 9, version: 6, inflight: 4 }), 20)).toBe(
      true, // The old actor is still all there is.
    );
    expect(view.update(snapshotOf("a", { incarnation: 2, version: 0, inflight: 1 }), 30)).toBe(
      true,
    );
    expect(view.update(snapshotOf("a", { incarnation: 9, version: 7, inflight: 5 }), 40)).toBe(
      false,
    );
    expect(view.update(snapshotOf("a", { incarnation: 1, version: 8, inflight: 6 }), 50)).toBe(
      false,
    );
    expect(view.inflight).toBe(1);
  });

  it("an actor that has just begun does not know the models: what was known stays", () => {
    const known = { models: ["m"], adapters: ["l"] };
    const view = new NodeView(snapshotOf("a", { incarnation: 1, version: 5, ...known }), 0, 10);
    const { models: _, adapters: __, ...begun } = snapshotOf("a", { incarnation: 2, version: 0 });
    expect(view.update(begun, 20)).toBe(true);
    expect(view.snapshot).toMatchObject({ incarnation: 2, ...known });
    expect(view.update({ ...begun, version: 1, models: ["n"] }, 30)).toBe(true);
    expect(view.snapshot.models).toEqual(["n"]);
  });

  it("an older snapshot changes nothing, an equal one is fresh news", () => {
    const view = new NodeView(snapshotOf("a", { incarnation: 2, version: 5, inflight: 3 }), 0, 10);
    expect(view.update(snapshotOf("a", { incarnation: 2, version: 4, inflight: 9 }), 20)).toBe(
      false,
    );
    expect(view.update(snapshotOf("a", { incarnation: 1, version: 9, inflight: 9 }), 20)).toBe(
      false,
    );
    expect(view).toMatchObject({ inflight: 3, receivedAtMs: 10 });
    expect(view.update(snapshotOf("a", { incarnation: 2, version: 5, inflight: 3 }), 30)).toBe(
      true,
    );
    expect(view.update(snapshotOf("a", { incarnation: 3, version: 0, inflight: 0 }), 40)).toBe(
      true,
    );
    expect(view).toMatchObject({ inflight: 0, receivedAtMs: 40 });
  });

  it("after the end of an actor the next one is believed, though it may have begun before", () => {
    const view = new NodeView(snapshotOf("a", { incarnation: 7, version: 5, inflight: 9 }), 0, 10);
    view.actorEnded();
    expect(view.update(snapshotOf("a", { incarnation: 3, version: 4, inflight: 1 }), 20)).toBe(
      true,
    );
    expect(view.inflight).toBe(1);
    expect(view.update(snapshotOf("a", { incarnation: 3, version: 3, inflight: 2 }), 20)).toBe(
      false,
    );
  });

  it("list at most 16 candidates, the chosen one first", () => {
    const pool = poolOf(Array.from({ length: 40 }, (_, i) => ({ inflight: i === 30 ? 0 : 9 })));
    pool.filter(wanted());
    const facts = pool.field.explain(pool.strategy, wanted(), pool.view("n30"));
    expect(facts).toHaveLength(16);
    expect(facts[0]).toMatchObject({ node: "n30", eligible: true });
    expect(facts[0]?.terms).toMatchObject({ inflight: 0, weight: 50 });
    expect(facts.map((fact) => fact.node).slice(1, 3)).toEqual(["n0", "n1"]);
  });

  it("uncached tokens are never negative", () => {
    const view = new NodeView(snapshotOf("a", {}), 0, 0);
    const sent = [{ node: "a", tokens: 900 }];
    expect(uncachedTokensOf(view, wanted({ promptTokens: 1000, sent }))).toBe(100);
    expect(uncachedTokensOf(view, wanted({ promptTokens: 300, sent }))).toBe(0);
  });

  it("saturation is the mean of the fuller of cap and KV; out counts as full, draining not at all", () => {
    const pool = poolOf([
      { inflight: 2, inflightMax: 8, scrape: scraped({ kv: 0.46 }) },
      { circuit: "open" },
      { draining: true, inflight: 8, inflightMax: 8 },
      { inflight: 0 },
    ]);
    expect(pool.field.saturation(NOW_MS)).toBeCloseTo((0.5 + 1 + 0) / 3, 9);
  });
});

// ---- worlds -------------------------------------------------------------------------------------------------

function snapshotOf(node: string, change: Partial<NodeSnapshot>): NodeSnapshot {
  return {
    node,
    address: `${node}:8000`,
    incarnation: 1,
    version: 1,
    atMs: NOW_MS,
    inflight: 0,
    prefillTokens: 0,
    inflightMax: 1000,
    circuit: "closed",
    probePermits: 0,
    draining: false,
    ramp: 1,
    healthy: true,
    restUntilMs: 0,
    articleWeight: 1,
    ...change,
  };
}

function scraped(change: Partial<NonNullable<NodeSnapshot["scrape"]>>) {
  return { engine: "vllm", atMs: NOW_MS - 100, missing: [], ...change };
}

function articleNodes(): Partial<NodeSnapshot>[] {
  return [
    { scrape: scraped({ waiting: 4, latencySeconds: 2, gpuMemory: 0.9 }) },
    { scrape: scraped({ waiting: 2, latencySeconds: 6, gpuMemory: 0.1 }) },
    { scrape: scraped({ waiting: 3, latencySeconds: 3, kv: 0.5 }) },
  ];
}

function wanted(change: Partial<Wanted> = {}): Wanted {
  return {
    promptTokens: 100,
    affinityKey: undefined,
    isRetry: false,
    tried: [],
    triedAddresses: [],
    denied: [],
    sent: [],
    ...change,
  };
}

/** Nodes n0, n1, …, each 20 ms per token unless said otherwise. */
function poolOf(
  nodes: readonly (Partial<NodeSnapshot> | "unmeasured")[],
  change: Partial<RankingOptions> = {},
  receivedAtMs = NOW_MS,
) {
  const ranking = { ...options, ...change };
  const field = new Field(ranking);
  const strategy = makeStrategy(ranking);
  nodes.forEach((node, i) => {
    const measured = node === "unmeasured" ? {} : { itlSeconds: 0.02, ...node };
    const snapshot = snapshotOf(`n${i}`, { atMs: receivedAtMs, ...measured });
    field.add(new NodeView(snapshot, i, receivedAtMs));
  });
  const view = (name: string): NodeView => {
    const found = field.views.find(({ node }) => node === name);
    if (found === undefined) throw new Error(`no node ${name}`);
    return found;
  };
  const filter = (request: Wanted) => field.filter(request, NOW_MS, strategy.loadGates);
  return {
    field,
    strategy,
    view,
    filter,
    eligible: () => field.eligible.slice(0, field.count).map(({ node }) => node),
    pick(request: Wanted, draw: Draw): string | undefined {
      filter(request);
      return strategy.pick(field, request, draw)?.node;
    },
    costs: () =>
      field
        .explain(strategy, wanted(), undefined)
        .map(({ node, cost }) => [node, Math.round((cost ?? 0) * 10_000) / 10_000]),
  };
}

function seeded(seed: number): Draw {
  const random = new Random(seed);
  return { random: () => random.next() };
}

/** These draws and no more. */
function scripted(draws: number[]): Draw {
  const left = [...draws];
  return {
    random() {
      const next = left.shift();
      if (next === undefined) throw new Error("one draw too many");
      return next;
    },
  };
}

function tally<T>(times: number, run: () => T): Map<T, number> {
  const counts = new Map<T, number>();
  for (let i = 0; i < times; i++) {
    const result = run();
    counts.set(result, (counts.get(result) ?? 0) + 1);
  }
  return counts;
}
