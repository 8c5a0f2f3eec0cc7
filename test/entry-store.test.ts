import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { ENTRY_OVERHEAD_BYTES, EntryStore } from "../actors/entry-store.ts";
import type { StoredAnswer } from "../actors/protocol.ts";

function answer(bytes: number, model = "m"): StoredAnswer {
  return { body: new Uint8Array(0), bytes, route: "chat", model, promptTokens: 1, outputTokens: 1 };
}

const KEYS = ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "k8", "k9", "ka", "kb", "kc", "kd"];
const key = fc.constantFrom(...KEYS);
const tenant = fc.constantFrom("red", "blue");
const bytes = fc.integer({ min: 0, max: 2500 });
const operation = fc.oneof(
  {
    weight: 12,
    arbitrary: fc.record({
      op: fc.constant("put" as const),
      key,
      tenant,
      bytes,
      ttlMs: fc.integer({ min: 1, max: 300 }),
    }),
  },
  { weight: 8, arbitrary: fc.record({ op: fc.constant("lookup" as const), key, tenant }) },
  { weight: 2, arbitrary: fc.record({ op: fc.constant("delete" as const), key }) },
  {
    weight: 1,
    arbitrary: fc.record({
      op: fc.constant("purge" as const),
      tenant: fc.constantFrom("red", "blue", undefined),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      op: fc.constant("sweep" as const),
      entriesMax: fc.integer({ min: 1, max: 5 }),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      op: fc.constant("resize" as const),
      bytesMax: fc.integer({ min: 8000, max: 30_000 }),
    }),
  },
  {
    weight: 3,
    arbitrary: fc.record({ op: fc.constant("wait" as const), ms: fc.integer({ min: 1, max: 20 }) }),
  },
);

type Kept = {
  key: string;
  tenant: string;
  answer: StoredAnswer;
  bytes: number;
  expiresAtMs: number;
};

describe("entry store", () => {
  it("entry store: serves what a list in order of use would, never past its time, never over its bytes", () => {
    fc.assert(
      fc.property(fc.array(operation, { maxLength: 120, size: "max" }), (operations) => {
        let bytesMax = 20_000;
        const store = new EntryStore(bytesMax, 2000);
        let kept: Kept[] = []; // Coldest first; may hold expired ones that the store has swept.
        let nowMs = 0;
        const evictDownTo = (room: number) => {
          while (kept.reduce((sum, entry) => sum + entry.bytes, 0) > room) kept.shift();
        };
        for (const step of operations) {
          switch (step.op) {
            case "put": {
              const made = answer(step.bytes);
              const size = step.bytes + step.key.length + ENTRY_OVERHEAD_BYTES;
              kept = kept.filter((entry) => entry.key !== step.key);
              const expiresAtMs = nowMs + step.ttlMs;
              // The model sweeps everything before a put; the store may not have got so far: compare only hits.
              const isKept = store.put(step.key, step.tenant, made, nowMs, expiresAtMs, nowMs);
              expect(isKept).toBe(step.bytes <= 2000 && size <= bytesMax / 8);
              if (isKept)
                kept.push({
                  key: step.key,
                  tenant: step.tenant,
                  answer: made,
                  bytes: size,
                  expiresAtMs,
                });
              break;
            }
            case "lookup": {
              const found = store.lookup(step.key, step.tenant, nowMs);
              const index = kept.findIndex((entry) => entry.key === step.key);
              const entry = kept[index];
              if (found !== undefined) {
                // Whatever is served was put under this key for this tenant, and its time is not over.
                expect(entry?.answer).toBe(found.answer);
                expect(found.tenant).toBe(step.tenant);
                expect(nowMs).toBeLessThan(found.expiresAtMs);
              }
              if (entry !== undefined && entry.tenant === step.tenant && nowMs < entry.expiresAtMs)
                expect(found).toBeDefined();
              if (found !== undefined && entry !== undefined) {
                kept.splice(index, 1);
                kept.push(entry);
              }
              break;
            }
            case "delete":
              store.delete(step.key);
              kept = kept.filter((entry) => entry.key !== step.key);
              break;
            case "purge":
              store.purge(step.tenant);
              kept = kept.filter(
                (entry) => step.tenant !== undefined && entry.tenant !== step.tenant,
              );
              break;
            case "sweep":
              store.sweep(nowMs, step.entriesMax);
              break;
            case "resize":
              bytesMax = step.bytesMax;
              store.resize(bytesMax);
              break;
            case "wait":
              nowMs += step.ms;
              break;
          }
          expect(store.bytes).toBeLessThanOrEqual(bytesMax);
          // A whole sweep brings both to the same contents, so that evictions can be compared too.
          store.sweep(nowMs, KEYS.length + 1);
          store.sweep(nowMs, KEYS.length + 1);
          kept = kept.filter((entry) => entry.expiresAtMs > nowMs);
          evictDownTo(bytesMax);
          expect(store.size).toBe(kept.length);
          expect(store.bytes).toBe(kept.reduce((sum, entry) => sum + entry.bytes, 0));
        }
        for (const entry of kept.slice())
          expect(store.lookup(entry.key, entry.tenant, nowMs)?.answer).toBe(entry.answer);
      }),
    );
  });

  it("entry store: drops the least recently used first (room for eight)", () => {
    const store = new EntryStore(8 * (ENTRY_OVERHEAD_BYTES + 1002), 2000);
    for (const name of KEYS.slice(0, 8))
      expect(store.put(name, "t", answer(1000), 0, 100, 0)).toBe(true);
    expect(store.lookup("k0", "t", 1)).toBeDefined();
    store.put("kx", "t", answer(1000), 1, 100, 1);
    expect(store.size).toBe(8);
    expect(store.evictions).toBe(1);
    expect(store.lookup("k1", "t", 1)).toBeUndefined();
    expect(store.lookup("k0", "t", 1)).toBeDefined();
  });

  it("entry store: serves until the last instant of a life, not at its end, however often used", () => {
    const store = new EntryStore(100_000, 2000);
    store.put("k", "t", answer(1), 0, 100, 0);
    for (let nowMs = 0; nowMs < 100; nowMs++) expect(store.lookup("k", "t", nowMs)).toBeDefined();
    expect(store.lookup("k", "t", 99.999)).toBeDefined();
    expect(store.lookup("k", "t", 100)).toBeUndefined();
    expect(store.expired).toBe(1);
    expect(store.bytes).toBe(0);
  });

  it("entry store: an answer too large is not kept, counted, and replaces what was there", () => {
    const store = new EntryStore(80_000, 5000);
    expect(store.put("k", "t", answer(5000), 0, 100, 0)).toBe(true);
    expect(store.put("k", "t", answer(5001), 0, 100, 0)).toBe(false);
    expect(store.lookup("k", "t", 0)).toBeUndefined();
    store.resize(8 * 2000);
    expect(store.put("k", "t", answer(2000), 0, 100, 0)).toBe(false); // Over an eighth with its overhead.
    expect(store.tooLarge).toBe(2);
    const body = new Uint8Array(6000);
    expect(store.put("k", "t", { ...answer(1), body }, 0, 100, 0)).toBe(false); // Its real size counts.
  });

  it("entry store: never serves another tenant, even under the same key", () => {
    const store = new EntryStore(100_000, 2000);
    store.put("k", "red", answer(1), 0, 100, 0);
    expect(store.lookup("k", "blue", 0)).toBeUndefined();
    expect(store.lookup("k", "red", 0)).toBeDefined();
  });

  it("entry store: puts alone find what has expired (nothing is ever looked up)", () => {
    const store = new EntryStore(10_000_000, 2000);
    for (let i = 0; i < 1000; i++) store.put(`old${i}`, "t", answer(10), 0, 10, 0);
    for (let i = 0; i < 1100; i++) store.put(`new${i}`, "t", answer(10), 20, 1000, 20);
    expect(store.expired).toBe(1000);
    expect(store.size).toBe(1100);
    expect(store.evictions).toBe(0);
  });

  it("entry store: a purge takes all of one tenant and nothing of another", () => {
    const store = new EntryStore(10_000_000, 2000);
    for (let i = 0; i < 100; i++) store.put(`r${100 + i}`, "red", answer(10), 0, 100, 0);
    for (let i = 0; i < 50; i++) store.put(`b${100 + i}`, "blue", answer(10), 0, 100, 0);
    expect(store.purge("red")).toBe(100);
    expect(store.purge("red")).toBe(0);
    expect(store.size).toBe(50);
    expect(store.bytes).toBe(50 * (ENTRY_OVERHEAD_BYTES + 4 + 10));
    expect(store.purge()).toBe(50);
    expect(store.bytes).toBe(0);
    store.sweep(0, 10);
    expect(store.put("again", "red", answer(10), 0, 100, 0)).toBe(true);
    expect(store.lookup("again", "red", 1)).toBeDefined();
  });
});
