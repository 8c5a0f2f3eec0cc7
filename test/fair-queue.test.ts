/** Nothing is lost, nobody starves, nothing is unbounded. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { FairQueue, type FairQueueOptions, type QueueEntry } from "../actors/fair-queue.ts";
import type { Priority } from "../actors/protocol.ts";

const options: FairQueueOptions = {
  perKeyMax: 50,
  poolMax: 2000,
  poolSecondsMax: 5,
  waitMsMax: 30_000,
};

describe("order", () => {
  it("bands strictly in order, whatever came first", () => {
    const queue = new FairQueue<QueueEntry>(options);
    offer(queue, ["b", { priority: "batch" }], ["s", { priority: "standard" }]);
    offer(queue, ["i", { priority: "interactive" }], ["s2", { priority: "standard" }]);
    expect(takeAll(queue, 0)).toEqual(["i", "s", "s2", "b"]);
  });

  it("tenants in turn by tokens, entries of one tenant by arrival", () => {
    const queue = new FairQueue<QueueEntry>(options);
    offer(queue, ["a1", { tenant: "a", cost: 300 }], ["a2", { tenant: "a", cost: 300 }]);
    offer(queue, ["a3", { tenant: "a", cost: 300 }]);
    for (let i = 1; i <= 4; i++)
      offer(queue, [`b${i}`, { tenant: "b", cost: 100, arrivedAtMs: 1 }]);
    // a pays 300 a turn, b 100: three of b for each of a.
    expect(takeAll(queue, 1)).toEqual(["a1", "b1", "b2", "b3", "a2", "b4", "a3"]);
  });

  it("a weight of 3 buys three times the turns", () => {
    const queue = new FairQueue<QueueEntry>(options);
    queue.pass(entry("before", { tenant: "a", weight: 1 })); // The latest weight counts.
    for (let i = 0; i < 40; i++) {
      offer(queue, [`a${i}`, { tenant: "a", weight: 3 }], [`b${i}`, { tenant: "b", weight: 1 }]);
    }
    const first = takeSome(queue, 0, 40).filter((id) => id.startsWith("a"));
    expect(first.length).toBeGreaterThanOrEqual(29);
    expect(first.length).toBeLessThanOrEqual(31);
  });

  it("output tokens are paid for twice, at the end", () => {
    const queue = new FairQueue<QueueEntry>(options);
    offer(queue, ["a1", { tenant: "a" }], ["b1", { tenant: "b" }]);
    offer(queue, ["a2", { tenant: "a" }], ["b2", { tenant: "b" }], ["b3", { tenant: "b" }]);
    expect(takeSome(queue, 0, 2)).toEqual(["a1", "b1"]);
    queue.settle("a", 75); // 150 tokens more than b.
    expect(takeAll(queue, 0)).toEqual(["b2", "b3", "a2"]);
  });

  it("a retry goes by its first arrival, and back to its place when no node took it", () => {
    const queue = new FairQueue<QueueEntry>(options);
    offer(
      queue,
      ["x", { arrivedAtMs: 10 }],
      ["y", { arrivedAtMs: 20 }],
      ["z", { arrivedAtMs: 30 }],
    );
    offer(queue, ["retry", { arrivedAtMs: 15, cost: 0 }]);
    const head = queue.take(40);
    expect(head?.id).toBe("x");
    if (head !== undefined) queue.putBack(head, 10, 40);
    expect(takeAll(queue, 40)).toEqual(["x", "retry", "y", "z"]);
  });
});

describe("putting back", () => {
  it("costs its tenant nothing, loses no turn, and is no sign of speed", () => {
    const queue = ratedQueue(40);
    offer(queue, ["a1", { tenant: "a", arrivedAtMs: 9990, cost: 1000 }]);
    offer(queue, ["b1", { tenant: "b", arrivedAtMs: 9991 }]);
    for (let i = 0; i < 100; i++) {
      const taken = queue.take(9995);
      expect(taken?.id).toBe("a1");
      if (taken !== undefined) queue.putBack(taken, 9990, 9995);
    }
    expect(queue.sizeMax).toBe(199); // 40/s, over a few ms more.
    expect(takeAll(queue, 9995)).toEqual(["a1", "b1"]);
  });
});

describe("fairness", () => {
  it("two tenants that keep waiting are never further apart than twice the largest entry", () => {
    const costs = fc.array(fc.integer({ min: 1, max: 1000 }), { minLength: 60, maxLength: 60 });
    fc.assert(
      fc.property(costs, costs, fc.constantFrom(1, 2, 5), (ofA, ofB, weight) => {
        const queue = new FairQueue<QueueEntry>({ ...options, perKeyMax: 1000 });
        ofA.forEach((cost, i) => {
          offer(queue, [`a${i}`, { tenant: "a", key: "a", cost, weight }]);
        });
        ofB.forEach((cost, i) => {
          offer(queue, [`b${i}`, { tenant: "b", key: "b", cost }]);
        });
        const served = { a: 0, b: 0 };
        const left = { a: 60, b: 60 };
        while (left.a > 0 && left.b > 0) {
          const entry = queue.take(0);
          if (entry === undefined) throw new Error("both wait");
          const tenant = entry.tenant as "a" | "b";
          left[tenant]--;
          served[tenant] += entry.cost / entry.weight;
          expect(Math.abs(served.a - served.b)).toBeLessThanOrEqual(2 * 1000);
        }
      }),
    );
  });

  it("a returning tenant has no credit for its absence", () => {
    const queue = new FairQueue<QueueEntry>(options);
    offer(queue, ["b0", { tenant: "b" }]);
    takeAll(queue, 0);
    for (let i = 0; i < 30; i++) offer(queue, [`a${i}`, { tenant: "a" }]);
    takeSome(queue, 0, 20); // a has been served 2000 tokens meanwhile, b none.
    for (let i = 1; i <= 10; i++) offer(queue, [`b${i}`, { tenant: "b" }]);
    const next = takeSome(queue, 0, 10).map((id) => id[0]);
    expect(next.filter((tenant) => tenant === "b").length).toBeGreaterThanOrEqual(4);
    expect(next.filter((tenant) => tenant === "b").length).toBeLessThanOrEqual(6);
  });

  it("nor when nobody waited meanwhile: the last one served sets the mark", () => {
    const queue = new FairQueue<QueueEntry>(options);
    for (let i = 0; i < 100; i++) queue.pass(entry("p", { tenant: "a" })); // 10,000 tokens, no waiting.
    offer(queue, ["b1", { tenant: "b" }], ["b2", { tenant: "b" }], ["b3", { tenant: "b" }]);
    offer(queue, ["a1", { tenant: "a" }], ["a2", { tenant: "a" }], ["a3", { tenant: "a" }]);
    expect(takeAll(queue, 0)).toEqual(["b1", "a1", "b2", "a2", "b3", "a3"]);
  });

  it("an entry that got no node is not paid for", () => {
    const queue = new FairQueue<QueueEntry>(options);
    const passed = entry("p", { tenant: "a", cost: 5000 });
    queue.pass(passed);
    queue.refund(passed);
    offer(queue, ["a1", { tenant: "a" }], ["b1", { tenant: "b", arrivedAtMs: 1 }]);
    expect(takeAll(queue, 1)).toEqual(["a1", "b1"]);
  });

  it("a flood does not make another tenant's wait look long", () => {
    const queue = ratedQueue(10); // 10 entries a second.
    for (let i = 0; i < 40; i++) offer(queue, [`flood${i}`, { tenant: "flood", key: "flood" }]);
    expect(queue.predictedWaitMs(entry("x", { tenant: "flood", key: "flood" }))).toBeCloseTo(
      4100,
      6,
    );
    expect(queue.predictedWaitMs(entry("x", { tenant: "light" }))).toBeCloseTo(200, 6);
    expect(queue.predictedWaitMs(entry("x", { tenant: "light", priority: "batch" }))).toBeCloseTo(
      4100,
      6,
    );
    expect(
      queue.predictedWaitMs(entry("x", { tenant: "light", priority: "interactive" })),
    ).toBeCloseTo(100, 6);
  });

  it("predicts nothing before it has seen a queue empty", () => {
    const queue = new FairQueue<QueueEntry>(options);
    offer(queue, ["a", {}]);
    expect(queue.predictedWaitMs(entry("b", {}))).toBeUndefined();
  });
});

describe("standing delay", () => {
  it("turns a tenant's interactive entries newest first, and back when it is over", () => {
    const queue = new FairQueue<QueueEntry>(options);
    let served: string[] = [];
    // One in and one out every 100 ms behind a backlog of 20: each waits 2 s.
    for (let i = 0; i < 20; i++) offerAt(queue, `x${i}`, i);
    for (let i = 20; i < 80; i++) {
      const atMs = (i - 19) * 100;
      offerAt(queue, `x${i}`, atMs);
      served.push(queue.take(atMs)?.id ?? "");
    }
    expect(served.slice(0, 3)).toEqual(["x0", "x1", "x2"]);
    expect(served[served.length - 1]).toBe("x79"); // Newest first by now.
    served = takeAll(queue, 6000);
    expect(served).toHaveLength(20);
    offerAt(queue, "y0", 6100);
    offerAt(queue, "y1", 6200);
    expect(takeAll(queue, 6300)).toEqual(["y0", "y1"]);
  });

  it("leaves batch, and tenants without delay, first in first out", () => {
    const queue = new FairQueue<QueueEntry>(options);
    for (let i = 0; i < 20; i++)
      offer(queue, [`b${i}`, { priority: "batch", arrivedAtMs: i * 100 }]);
    for (let i = 20; i < 60; i++) {
      offerAt(queue, `b${i}`, i * 100, "batch");
      expect(queue.take(i * 100)?.id).toBe(`b${i - 20}`);
    }
  });
});

describe("bounds and deadlines", () => {
  it("refuses beyond one key's share and beyond the pool's", () => {
    const queue = new FairQueue<QueueEntry>({ ...options, perKeyMax: 3, poolMax: 5 });
    const offers = ["k1", "k1", "k1", "k1", "k2", "k2", "k3"].map((key, i) =>
      queue.offer(entry(`${i}`, { key }), 0),
    );
    expect(offers).toEqual([
      "queued",
      "queued",
      "queued",
      "key_full",
      "queued",
      "queued",
      "pool_full",
    ]);
    expect(queue.snapshot().dropped).toEqual({ expired: 0, key_full: 1, pool_full: 1 });
    queue.remove("0", 0);
    expect(queue.offer(entry("again", { key: "k1" }), 0)).toBe("queued");
  });

  it("holds no more than 5 s of what has been leaving, but always one key's share", () => {
    expect(ratedQueue(40).sizeMax).toBe(200);
    expect(ratedQueue(2).sizeMax).toBe(50);
    expect(ratedQueue(1000).sizeMax).toBe(2000);
    expect(new FairQueue(options).sizeMax).toBe(2000);
  });

  it("measures only while entries wait, and afresh after a minute of none", () => {
    const queue = ratedQueue(40);
    offerAt(queue, "later", 50_000); // A pause of some 40 s.
    expect(queue.sizeMax).toBe(200);
    takeAll(queue, 50_000);
    offerAt(queue, "much later", 120_000);
    expect(queue.sizeMax).toBe(2000);
  });

  it("drops in order of deadline, each once, and never serves an expired entry", () => {
    const queue = new FairQueue<QueueEntry>(options);
    offer(
      queue,
      ["c", { deadlineAtMs: 300 }],
      ["a", { deadlineAtMs: 100 }],
      ["b", { deadlineAtMs: 200 }],
    );
    offer(queue, ["d", { deadlineAtMs: 900_000 }]);
    expect(queue.takeExpired(99)).toEqual([]);
    expect(queue.take(250)?.id).toBe("c");
    expect(queue.takeExpired(250).map(({ id }) => id)).toEqual(["a", "b"]);
    expect(queue.takeExpired(29_999)).toEqual([]);
    expect(queue.takeExpired(30_000).map(({ id }) => id)).toEqual(["d"]); // The queue's own bound.
    expect(queue.snapshot().dropped.expired).toBe(3);
    expect(queue.size).toBe(0);
  });

  it("loses and doubles nothing (any sequence of offers, takes, removals, expiries)", () => {
    const command = fc.record({
      what: fc.constantFrom("offer", "offer", "offer", "take", "take_back", "remove", "expire"),
      tenant: fc.constantFrom("a", "b", "c"),
      priority: fc.constantFrom<Priority>("interactive", "standard", "batch"),
      cost: fc.nat(500),
      lifeMs: fc.nat(4000),
      afterMs: fc.nat(300),
      pick: fc.nat(1000),
    });
    fc.assert(
      fc.property(fc.array(command, { maxLength: 200 }), (commands) => {
        const queue = new FairQueue<QueueEntry>({
          ...options,
          perKeyMax: 8,
          poolMax: 15,
          poolSecondsMax: 1e9,
        });
        const waiting = new Map<string, QueueEntry>();
        let nowMs = 0;
        commands.forEach(({ what, tenant, priority, cost, lifeMs, afterMs, pick }, i) => {
          nowMs += afterMs;
          if (what === "offer") {
            const key = tenant;
            const each = entry(`e${i}`, {
              tenant,
              key,
              priority,
              cost,
              arrivedAtMs: nowMs,
              deadlineAtMs: nowMs + lifeMs,
            });
            const ofKey = [...waiting.values()].filter((other) => other.key === key).length;
            const expected = ofKey >= 8 ? "key_full" : waiting.size >= 15 ? "pool_full" : "queued";
            const offered = queue.offer(each, nowMs);
            expect(offered).toBe(expected);
            if (offered === "queued") waiting.set(each.id, each);
          } else if (what === "remove") {
            const ids = [...waiting.keys()];
            const id = ids[pick % Math.max(1, ids.length)] ?? "nobody";
            expect(queue.remove(id, nowMs)?.id).toBe(waiting.has(id) ? id : undefined);
            waiting.delete(id);
          } else if (what === "expire") {
            let last = 0;
            for (const expired of queue.takeExpired(nowMs)) {
              expect(waiting.delete(expired.id)).toBe(true);
              expect(expired.deadlineAtMs).toBeLessThanOrEqual(nowMs);
              expect(expired.deadlineAtMs).toBeGreaterThanOrEqual(last);
              last = expired.deadlineAtMs;
            }
            for (const each of waiting.values()) expect(each.deadlineAtMs).toBeGreaterThan(nowMs);
          } else {
            const taken = queue.take(nowMs);
            for (const expired of queue.takeExpired(nowMs))
              expect(waiting.delete(expired.id)).toBe(true);
            if (taken === undefined) {
              expect(waiting.size).toBe(0);
            } else {
              expect(waiting.has(taken.id)).toBe(true);
              expect(taken.deadlineAtMs).toBeGreaterThan(nowMs);
              if (what === "take") waiting.delete(taken.id);
              else queue.putBack(taken, nowMs, nowMs);
            }
          }
          expect(queue.size).toBe(waiting.size);
          const counted = queue.snapshot().waiting.reduce((sum, band) => sum + band.waiting, 0);
          expect(counted).toBe(waiting.size);
        });
        const end = takeAll(queue, nowMs);
        for (const expired of queue.takeExpired(nowMs)) end.push(expired.id);
        expect(end.sort()).toEqual([...waiting.keys()].sort());
      }),
      { numRuns: 300 },
    );
  });

  it("still knows who expires first after thousands have come and gone", () => {
    const queue = new FairQueue<QueueEntry>({ ...options, waitMsMax: 1e9, perKeyMax: 1000 });
    const deadlineAtMs = (i: number) => 10_000 + ((i * 7919) % 1000);
    for (let i = 0; i < 3000; i++) {
      queue.offer(entry(`e${i}`, { deadlineAtMs: deadlineAtMs(i) }), 0);
      if (i >= 200) queue.remove(`e${i - 200}`, 0);
    }
    const left = Array.from({ length: 200 }, (_, i) => 2800 + i);
    left.sort((a, b) => deadlineAtMs(a) - deadlineAtMs(b));
    for (const i of left) {
      expect(queue.takeExpired(deadlineAtMs(i) - 0.5)).toEqual([]);
      expect(queue.takeExpired(deadlineAtMs(i)).map(({ id }) => id)).toEqual([`e${i}`]);
    }
  });
});

// ---- worlds ---------------------------------------------------------------------------------------------

type Change = Partial<QueueEntry>;

function entry(id: string, change: Change): QueueEntry {
  const tenant = change.tenant ?? "t";
  return {
    id,
    tenant,
    key: tenant,
    weight: 1,
    priority: "standard",
    cost: 100,
    arrivedAtMs: 0,
    deadlineAtMs: 1_000_000,
    ...change,
  };
}

function offer(queue: FairQueue<QueueEntry>, ...entries: [id: string, change: Change][]): void {
  for (const [id, change] of entries)
    expect(queue.offer(entry(id, change), change.arrivedAtMs ?? 0)).toBe("queued");
}

function offerAt(
  queue: FairQueue<QueueEntry>,
  id: string,
  atMs: number,
  priority: Priority = "interactive",
): void {
  expect(queue.offer(entry(id, { priority, arrivedAtMs: atMs }), atMs)).toBe("queued");
}

function takeSome(queue: FairQueue<QueueEntry>, nowMs: number, count: number): string[] {
  const ids: string[] = [];
  while (ids.length < count) {
    const next = queue.take(nowMs);
    if (next === undefined) break;
    ids.push(next.id);
  }
  return ids;
}

function takeAll(queue: FairQueue<QueueEntry>, nowMs: number): string[] {
  return takeSome(queue, nowMs, Number.POSITIVE_INFINITY);
}

/** An empty queue that was seen to empty at that rate for just under 10 s. */
function ratedQueue(perSecond: number): FairQueue<QueueEntry> {
  const queue = new FairQueue<QueueEntry>(options);
  offer(queue, ["first", { tenant: "setup" }]);
  const last = perSecond * 10 - 1;
  for (let i = 1; i <= last; i++) {
    const atMs = (i * 1000) / perSecond;
    queue.offer(entry(`setup${i}`, { tenant: "setup" }), atMs);
    queue.take(atMs);
  }
  queue.remove(`setup${last}`, (last * 1000) / perSecond);
  return queue;
}
