/**
 * The same question in other words, through the whole gateway: what is answered from the cache, what never is, and
 * what judging does. The embedder is the built-in one, which knows words: similarities here are its own.
 */
import { afterEach, describe, expect, it } from "vitest";
import type { OptionsInput } from "../transport/options.ts";
import {
  type LiveWorld,
  type LiveWorldOptions,
  MODEL,
  startLiveWorld,
  until,
} from "./live-world.ts";

const worlds: LiveWorld[] = [];
afterEach(async () => {
  for (const world of worlds.splice(0)) await world.close();
});

type Semantic = NonNullable<NonNullable<OptionsInput["cache"]>["semantic"]>;

async function start(
  semantic: Semantic = {},
  { options = {}, ...more }: LiveWorldOptions = {},
): Promise<LiveWorld> {
  const world = await startLiveWorld({
    ...more,
    options: {
      ...options,
      cache: {
        ...options.cache,
        // What a test waits for must not be late on a busy machine.
        semantic: {
          judgeRatio: 0,
          matchMs: 5000,
          embedder: { type: "lexical", timeoutMs: 5000 },
          ...semantic,
        },
      },
    },
  });
  worlds.push(world);
  await until("the embedder is healthy", async () => {
    const { embedder } = await world.gateway.state();
    return embedder === undefined || embedder.state === "healthy";
  });
  return world;
}

const QUESTION = "How do I reset the password of my account?";
/** Similarity 0.948. */
const REWORDED = "How can I reset the password of my account?";
const upstream = (world: LiveWorld): number =>
  world.counts().reduce((sum, count) => sum + count, 0);

describe("semantic hits", () => {
  it("another wording gets the stored answer, whole or streamed, with its similarity and entry; nodes are spared", async () => {
    const world = await start();
    const first = await world.chat(QUESTION);
    expect(first.cache).toBe("miss");
    const again = await world.chat(REWORDED);
    expect(again.cache).toMatch(/^hit-semantic; similarity=0\.94\d\d$/);
    expect(again.json.choices[0]?.message).toEqual(first.json.choices[0]?.message);
    expect(again.headers.get("x-headrace-entry")).toMatch(/^[0-9a-f]{27}$/);
    const streamed = await world.chat(REWORDED, { stream: true });
    expect(streamed.cache).toMatch(/^hit-semantic/);
    expect(streamed.text).toMatch(/^data: .*\n\ndata: \[DONE\]\n\n$/s);
    expect((await world.chat(QUESTION)).cache).toBe("hit-exact");
    expect(upstream(world)).toBe(1);
    expect((await world.gateway.state()).cache).toMatchObject({ semanticHits: 2, questions: 1 });
    await world.idle();
  });

  it("identical questions that wait together share the semantic hit", async () => {
    const world = await start();
    await world.chat(QUESTION);
    const replies = await Promise.all(Array.from({ length: 20 }, () => world.chat(REWORDED)));
    for (const { status, cache } of replies) {
      expect(status).toBe(200);
      expect(cache).toMatch(/^(hit-semantic|joined)/);
    }
    expect(upstream(world)).toBe(1);
    await world.idle();
  });

  it("a request raises the threshold, and cannot lower it", async () => {
    const world = await start();
    await world.chat(QUESTION);
    const asked = (similarity: string) =>
      world.chat(
        REWORDED,
        {},
        { "x-headrace-similarity": similarity, "cache-control": "no-store" },
      );
    expect((await asked("0.5")).cache).toMatch(/^hit-semantic/);
    expect((await asked("0.99")).cache).toBe("miss");
    const wrong = await asked("2");
    expect(wrong.status).toBe(400);
    expect(wrong.json.error.message).toContain("a cosine above 0, at most 1");
  });

  it.each([
    ["a stated temperature above the bound", { temperature: 0.7 }],
    ["tools", { tools: [{ type: "function", function: { name: "f" } }] }],
    ["several answers", { n: 2 }],
    ["another maximum", { max_tokens: 5 }],
    ["a response format", { response_format: { type: "json_object" } }],
    [
      "earlier turns",
      {
        messages: [
          { role: "user", content: "Hi" },
          { role: "user", content: REWORDED },
        ],
      },
    ],
    [
      "a system prompt",
      {
        messages: [
          { role: "system", content: "Be brief." },
          { role: "user", content: REWORDED },
        ],
      },
    ],
    [
      "an image",
      {
        messages: [
          { role: "user", content: [{ type: "image_url", image_url: { url: "data:," } }] },
        ],
      },
    ],
  ])("never: %s", async (_, fields) => {
    const world = await start();
    await world.chat(QUESTION);
    expect((await world.chat(REWORDED, fields)).cache).not.toMatch(/^hit-semantic/);
  });

  it("never: numbers that differ, though the texts are alike; the explanation says which guard", async () => {
    const world = await start();
    await world.chat("How do I reset the password of my account in 3 days?");
    const other = await world.chat("How do I reset the password of my account in 5 days?");
    expect(other.cache).toBe("miss");
    const told = world.gateway.explain(other.headers.get("x-request-id") ?? "");
    expect(told?.steps.join("\n")).toMatch(/meaning: guard: numbers, at similarity 0\.95\d/);
  });

  it("never: another tenant, another model", async () => {
    const keys = [
      { key: "key-of-acme-1", tenant: "acme" },
      { key: "key-of-beta-1", tenant: "beta" },
    ];
    const world = await start({}, { options: { keys }, models: [MODEL, "small"] });
    const as = (key: string, model = MODEL) =>
      world.chat(
        REWORDED,
        { model },
        { authorization: `Bearer ${key}`, "cache-control": "no-store" },
      );
    await world.chat(QUESTION, {}, { authorization: "Bearer key-of-acme-1" });
    expect((await as("key-of-acme-1")).cache).toMatch(/^hit-semantic/);
    expect((await as("key-of-beta-1")).cache).toBe("miss");
    expect((await as("key-of-acme-1", "small")).cache).toBe("miss");
  });

  it("a tenant may have another mode and threshold than the rest", async () => {
    const keys = [
      { key: "key-of-acme-1", tenant: "acme", semantic: { mode: "off" as const } },
      { key: "key-of-beta-1", tenant: "beta", semantic: { similarityMin: 0.97 } },
      { key: "key-of-gama-1", tenant: "gama" },
    ];
    const world = await start({}, { options: { keys } });
    const verdicts: (string | null)[] = [];
    for (const { key } of keys) {
      const authorization = `Bearer ${key}`;
      await world.chat(QUESTION, {}, { authorization });
      verdicts.push((await world.chat(REWORDED, {}, { authorization })).cache);
    }
    expect(verdicts).toEqual(["miss", "miss", expect.stringMatching(/^hit-semantic/)]);
  });

  it("a purge takes the questions too", async () => {
    const world = await start();
    await world.chat(QUESTION);
    expect(await world.gateway.purge("local")).toBe(2);
    expect((await world.chat(REWORDED)).cache).toBe("miss");
  });
});

describe("semantic hits that may be wrong", () => {
  it("feedback removes an entry for good; unknown ids and other tenants change nothing", async () => {
    const world = await start();
    await world.chat(QUESTION);
    const hit = await world.chat(REWORDED, {}, { "cache-control": "no-store" });
    const entry = hit.headers.get("x-headrace-entry");
    const tell = (body: unknown) => world.send("POST", "/v1/headrace/feedback", body);
    expect((await tell({ entry, ok: true })).json).toEqual({ entry, ok: true, removed: false });
    expect((await tell({ entry, ok: false })).json).toEqual({ entry, ok: false, removed: true });
    const gone = await tell({ entry, ok: false });
    expect([gone.status, gone.json.error.code]).toEqual([404, "not_found"]);
    expect((await world.chat(REWORDED, {}, { "cache-control": "no-store" })).cache).toBe("miss");
  });

  it.each([
    ["no JSON", "{", "invalid_json"],
    ["no entry", { ok: true }, "invalid_request"],
    ["an entry that is none", { entry: "../x", ok: true }, "invalid_request"],
    ["no verdict", { entry: "a".repeat(27) }, "invalid_request"],
    ["null", "null", "invalid_request"],
  ])("feedback that cannot be read is refused: %s", async (_, body, code) => {
    const world = await start();
    const reply = await world.send("POST", "/v1/headrace/feedback", body);
    expect([reply.status, reply.json.error.code]).toEqual([400, code]);
    expect((await world.send("GET", "/v1/headrace/feedback")).status).toBe(405);
  });

  it("shadow mode serves none, and says how many would have been false", async () => {
    const world = await start({ mode: "shadow" });
    await world.chat(QUESTION);
    const reply = await world.chat(REWORDED);
    expect(reply.cache).toBe("miss");
    expect(upstream(world)).toBe(2);
    const { judged } = await world.gateway.inspect("local", 10);
    const shadow = judged.find(({ tenant }) => tenant === "local")?.shadow;
    // The stand-in answers other words with other text: a false hit.
    expect(shadow?.falseHits).toMatchObject({ count: 1, total: 1 });
  });

  it("verified mode asks the node until labels bound the error", async () => {
    const world = await start({ mode: "verified", errorRateMax: 0.05 });
    await world.chat(QUESTION);
    expect((await world.chat(REWORDED)).cache).toBe("miss");
    const { cache } = await world.gateway.state();
    expect(cache).toMatchObject({ explorations: 1, judgedWrong: 1 });
    // It was wrong at that similarity: it is not even tried there again, the new entry is.
    expect((await world.chat(REWORDED, {}, { "cache-control": "no-cache" })).cache).toBe("miss");
  });

  it("a share of hits is judged by asking a node as well; too few right ones switch them off", async () => {
    const world = await start({ judgeRatio: 1, precisionMin: 0.6 });
    await world.chat(QUESTION);
    let asked = 0;
    await until("hits are only judged", async () => {
      await world.chat(REWORDED, {}, { "cache-control": "no-store" });
      await world.chat(`${QUESTION} ${++asked}`); // So that there are entries that were never wrong.
      await world.chat(`How can I reset the password of my account? ${asked}`);
      return (await world.gateway.state()).cache?.switchedOff === 1;
    });
    await world.idle();
    const { cache } = await world.gateway.state();
    expect(cache?.judgedWrong).toBeGreaterThan(0);
    expect((await world.chat(`Please tell: ${QUESTION}`)).cache).toBe("miss");
  });
});

describe("semantic matching that cannot be had", () => {
  it("without an embedder nothing is matched, and one line says how to turn it on", async () => {
    const world = await start({ embedder: { type: "off" } });
    await world.chat(QUESTION);
    expect((await world.chat(REWORDED)).cache).toBe("miss");
    const lines = world.log.filter(({ text }) => text.includes("cache.semantic.embedder.type"));
    expect(lines).toHaveLength(1);
  });

  it.each([
    ["1 MB, which the node refuses", "word ".repeat(200_000), 400],
    ["only spaces", "   \n\t "],
    ["control characters", "\u0000\u0001\u0002"],
    ["unpaired surrogates", "\ud800 \udfff"],
    ["10,000 emoji", "🙂".repeat(10_000)],
  ])("a question of %s goes on without it", async (_, text, status = 200) => {
    const world = await start();
    const reply = await world.chat(text);
    expect([reply.status, reply.cache]).toEqual([status, "miss"]);
    await world.idle();
  });
});

describe("admin: stored questions", () => {
  it("lists those of a tenant, compares them with a text, removes one", async () => {
    const world = await start({}, { options: { admin: { token: "admin-token-of-the-test" } } });
    const admin = (method: string, path: string) =>
      world.send(method, path, undefined, { authorization: "Bearer admin-token-of-the-test" });
    await world.chat(QUESTION);
    await world.chat("Which colours does the flag of France have?");
    const text = encodeURIComponent(REWORDED);
    const { json } = await admin("GET", `/admin/cache?tenant=local&text=${text}`);
    const entries = json.entries as { entryId: string; question: string; similarity: number }[];
    expect(entries.map(({ question }) => question)[0]).toBe(QUESTION);
    expect(entries[0]?.similarity).toBeCloseTo(0.948, 2);
    const gone = await admin("DELETE", `/admin/cache/${entries[0]?.entryId}?tenant=local`);
    expect(gone.json).toEqual({ removed: 1 });
    expect((await admin("DELETE", `/admin/cache/${entries[0]?.entryId}?tenant=local`)).status).toBe(
      404,
    );
    expect((await admin("GET", "/admin/cache")).status).toBe(400);
  });
});
