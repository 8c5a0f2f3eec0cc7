/** Texts embedded ahead: in batches, after all that somebody waits for, and never at its cost. */
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Embedded } from "../actors/edges.ts";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import { Embedder } from "../transport/embedder.ts";
import type { EmbedderBackend, TextVector } from "../transport/embedder-backend.ts";

const lexical = new LexicalEmbedder(64);
const silent = { info: () => undefined, warn: () => undefined };

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

/** Holds every batch, once it is ready, until the test releases it. */
class HeldBackend implements EmbedderBackend {
  readonly batchesMax: number;
  readonly batches: (readonly string[])[] = [];
  holds = false;
  readonly #held: (() => void)[] = [];

  constructor(batchesMax: number) {
    this.batchesMax = batchesMax;
  }

  async open(): Promise<{ id: string; version: string }> {
    return { id: "test", version: "1" };
  }

  embed(texts: readonly string[]): Promise<readonly TextVector[]> {
    const vectors = texts.map((text) => lexical.embed(text));
    if (!this.holds) return Promise.resolve(vectors);
    this.batches.push(texts);
    return new Promise((resolve) => this.#held.push(() => resolve(vectors)));
  }

  /** Releases the oldest batch, and lets what follows happen. */
  async release(): Promise<void> {
    this.#held.shift()?.();
    await vi.advanceTimersByTimeAsync(0);
  }

  async close(): Promise<void> {}
}

async function ready(batchesMax = 1): Promise<{ embedder: Embedder; backend: HeldBackend }> {
  const backend = new HeldBackend(batchesMax);
  const options = { timeoutMs: 50, queueMax: 16, tokensMax: 128 };
  const embedder = new Embedder(backend, options, silent);
  await embedder.settled();
  backend.holds = true;
  return { embedder, backend };
}

const texts = (count: number, name = "ahead"): string[] =>
  Array.from({ length: count }, (_, at) => `${name} ${at}`);

describe("embedding ahead", () => {
  it("goes in batches of 8 at most, one at a time, long texts in smaller ones; all get their vectors", async () => {
    const { embedder, backend } = await ready(4);
    const long = "a longer question ".repeat(16).trim(); // 287 bytes: two of them in one batch.
    const asked = [...texts(18), ...Array.from({ length: 4 }, (_, at) => `${long} ${at}`)];
    const done = embedder.embedAhead(asked);
    const sizes: number[] = [];
    while (backend.batches.length > sizes.length) {
      expect(backend.batches).toHaveLength(sizes.length + 1); // Never two at once.
      sizes.push(backend.batches.at(-1)?.length ?? 0);
      await backend.release();
    }
    expect(sizes).toEqual([8, 8, 4, 2]);
    expect(await done).toEqual(
      asked.map((text) => ({ kind: "vector", vector: lexical.embed(text) })),
    );
  });

  it("what somebody waits for goes first, and waits for one batch at most", async () => {
    const { embedder, backend } = await ready();
    void embedder.embedAhead(texts(40));
    const got: Embedded[] = [];
    embedder.embed("live one", (embedded) => void got.push(embedded));
    embedder.embed("live two", (embedded) => void got.push(embedded));
    expect(backend.batches).toHaveLength(1);
    await backend.release();
    expect(backend.batches.at(-1)).toEqual(["live one", "live two"]);
    embedder.embed("live three", (embedded) => void got.push(embedded));
    await backend.release();
    expect(backend.batches.at(-1)).toEqual(["live three"]);
    await backend.release();
    expect(got.map(({ kind }) => kind)).toEqual(["vector", "vector", "vector"]);
    expect(backend.batches.at(-1)).toEqual(texts(16).slice(8));
  });

  it("with room for more batches, somebody who waits does not wait for it at all", async () => {
    const { embedder, backend } = await ready(2);
    void embedder.embedAhead(texts(8));
    embedder.embed("live", () => {});
    expect(backend.batches).toEqual([texts(8), ["live"]]);
  });

  it("is not late when a question would be, but is not waited for without end", async () => {
    const { embedder, backend } = await ready();
    const done = embedder.embedAhead(texts(10));
    await vi.advanceTimersByTimeAsync(1000);
    await backend.release();
    await vi.advanceTimersByTimeAsync(60_000);
    const kinds = (await done).map((one) => (one.kind === "vector" ? "vector" : one.reason));
    expect(kinds).toEqual([...Array(8).fill("vector"), "late", "late"]);
  });

  it("says at once what gets no vector, and bounds what waits", async () => {
    const { embedder, backend } = await ready();
    const odd = await embedder.embedAhead([" ", "x".repeat(10_000)]);
    expect(odd).toEqual([
      { kind: "unavailable", reason: "empty" },
      { kind: "unavailable", reason: "too_long" },
    ]);
    void embedder.embedAhead(texts(300));
    expect(embedder.describe().unavailable.busy).toBe(300 - 256);
    expect(backend.batches).toHaveLength(1);
  });

  it("an embedder that closes, or has closed, answers all", async () => {
    const { embedder } = await ready();
    const done = embedder.embedAhead(texts(20));
    await embedder.close();
    const off = Array(20).fill({ kind: "unavailable", reason: "off" });
    expect(await done).toEqual(off);
    expect(await embedder.embedAhead(texts(20))).toEqual(off);
  });
});
