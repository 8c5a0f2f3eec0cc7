/**
 * Matching by meaning in virtual time, through the real front: what it may cost a request, whose policy counts, and what
 * a purge or an id used twice must not do.
 */
import { describe, expect, it } from "vitest";
import type { StoreCommand } from "../actors/edges.ts";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import type { Actor, Context } from "../runtime/actor.ts";
import { FrontWorld, type FrontWorldOptions, LateEmbedder, MODEL } from "./front-world.ts";

const BUDGET_MS = 50;
const QUESTION = "How do I reset the password of my account?";
const REWORDED = "How can I reset the password of my account?";
const never = Number.POSITIVE_INFINITY;

function start(more: Partial<FrontWorldOptions> = {}): FrontWorld {
  return new FrontWorld({ answer: ({ messages }) => `to: ${messages.at(-1)?.content}`, ...more });
}

const asked = (content: string, more: object = {}) => ({
  model: MODEL,
  messages: [{ role: "user", content }],
  ...more,
});

/** A Redis with an index of all questions, which does not answer when it is asked for the nearest. */
class SilentIndex implements Actor<StoreCommand> {
  receive(command: StoreCommand, context: Context<StoreCommand>): void {
    if (command.kind === "store.get") context.reply(command.replyTo, { ttlMs: 0 });
  }
}

describe("matching: its budget", () => {
  const silentIndex = {
    store: () => new SilentIndex(),
    options: {
      cache: {
        redis: { url: "redis://10.0.0.9:6379" },
        storeTimeoutMs: 5000,
        semantic: { index: "redis-vectorset" },
      },
    },
  } as const;

  it.each([
    [
      "an embedder that never answers",
      /^no vector: late$/,
      { embedder: () => new LateEmbedder(never) },
    ],
    [
      "an embedder that answers at its last moment",
      /^nothing is/,
      { embedder: () => new LateEmbedder(49.9) },
    ],
    [
      "an embedder that answers just too late",
      /^no vector: late$/,
      { embedder: () => new LateEmbedder(50.1) },
    ],
    ["a shard that never answers", /^the shard did not answer in time$/, silentIndex],
    [
      "a slow embedder and a shard that never answers",
      /^the shard did not answer in time$/,
      { ...silentIndex, embedder: () => new LateEmbedder(45) },
    ],
  ])(`%s: the request goes on after ${BUDGET_MS} ms, and is answered`, (_, says, more) => {
    const world = start(more);
    const beganAtMs = world.nowMs;
    const replies = Array.from({ length: 20 }, (_, index) =>
      world.chat(asked(`${QUESTION} ${index}`)),
    );
    world.run(1000);
    expect(world.generations).toHaveLength(20);
    for (const { atMs } of world.generations) {
      expect(atMs - beganAtMs).toBeLessThanOrEqual(BUDGET_MS);
    }
    expect(replies.map(({ status, cache }) => [status, cache])).toEqual(
      Array(20).fill([200, "miss"]),
    );
    for (const { semantic } of world.records) expect(semantic?.says).toMatch(says);
    expect([world.front.openCount, world.data.requests.size]).toEqual([0, 0]);
  });

  it("a client's own deadline within the budget holds all the same", () => {
    const world = start({ embedder: () => new LateEmbedder(never) });
    const reply = world.chat(asked(QUESTION), { "x-request-timeout-ms": "20" });
    world.run(1000);
    expect([reply.status, reply.ended]).toEqual([504, true]);
    expect(world.generations).toHaveLength(0);
  });
});

describe("matching: whose policy counts", () => {
  const keys = [
    { key: "key-fixed-1", tenant: "acme", name: "fixed" },
    { key: "key-off-0001", tenant: "acme", name: "off", semantic: { mode: "off" as const } },
    { key: "key-high-001", tenant: "acme", name: "high", semantic: { similarityMin: 0.99 } },
    { key: "key-beta-001", tenant: "beta" },
  ];
  const as = (key: string) => ({ authorization: `Bearer ${key}` });

  function stored(): FrontWorld {
    const world = start({ options: { keys }, embedder: () => new LateEmbedder(20) });
    world.chat(asked(QUESTION), as("key-fixed-1"));
    world.run(500);
    return world;
  }

  it("equal questions that wait together share a hit, and all are told of it", () => {
    const world = stored();
    const replies = Array.from({ length: 5 }, () => world.chat(asked(REWORDED), as("key-fixed-1")));
    world.run(500);
    for (const reply of replies) {
      expect(reply.cache).toMatch(/^hit-semantic; similarity=0\.9/);
      expect(reply.headers["x-headrace-entry"]).toBe(replies[0]?.headers["x-headrace-entry"]);
      expect(reply.content).toBe(`to: ${QUESTION}`);
    }
    expect(world.generations).toHaveLength(1);
  });

  it("who joins with a stricter key, or wish, does not get a hit that it would not have had", () => {
    const world = stored();
    const first = world.chat(asked(REWORDED), as("key-fixed-1"));
    const others = [
      world.chat(asked(REWORDED), as("key-off-0001")),
      world.chat(asked(REWORDED), as("key-high-001")),
      world.chat(asked(REWORDED), { ...as("key-fixed-1"), "x-headrace-similarity": "0.98" }),
    ];
    world.run(500);
    expect(first.cache).toMatch(/^hit-semantic/);
    for (const reply of others) {
      expect([reply.status, reply.cache]).toEqual([200, expect.stringMatching(/^(miss|joined)$/)]);
      expect(reply.content).toBe(`to: ${REWORDED}`);
    }
    expect(world.generations).toHaveLength(2); // One for all of them.
    expect(world.front.openCount).toBe(0);
  });

  it("two tenants with the same question at the same time share nothing", () => {
    const world = start({ options: { keys } });
    const ask = (content: string) => [
      world.chat(asked(content, { user: "acme" }), as("key-fixed-1")),
      world.chat(asked(content, { user: "beta" }), as("key-beta-001")),
    ];
    const first = ask(QUESTION);
    world.run(500);
    const again = ask(REWORDED);
    world.run(500);
    expect(first.map(({ cache }) => cache)).toEqual(["miss", "miss"]);
    expect(again.map(({ cache }) => cache)).toEqual(
      Array(2).fill(expect.stringMatching(/^hit-sem/)),
    );
    const entries = again.map(({ headers }) => headers["x-headrace-entry"]);
    expect(new Set(entries).size).toBe(2);
    expect(world.generations.map(({ asked: { user } }) => user)).toEqual(["acme", "beta"]);
  });
});

describe("matching: what must not come back, or cross", () => {
  it("an answer whose question was asked before a purge is not kept for others", () => {
    const world = start({ answerMs: () => 200 });
    const reply = world.chat(asked(QUESTION));
    world.run(100);
    world.purge("local");
    world.run(500);
    expect(reply.cache).toBe("miss");
    const later = world.chat(asked(REWORDED));
    world.run(500);
    expect(later.cache).toBe("miss");
    const last = world.chat(asked(`${REWORDED}!`));
    world.run(500);
    expect(last.cache).toMatch(/^hit-semantic/); // What was asked after it is.
  });

  it("a purge of another tenant takes nothing", () => {
    const world = start({ answerMs: () => 200 });
    world.chat(asked(QUESTION));
    world.run(100);
    world.purge("other");
    world.run(500);
    const later = world.chat(asked(REWORDED));
    world.run(500);
    expect(later.cache).toMatch(/^hit-semantic/);
  });

  it("the id of a request that goes on without its client is taken", () => {
    const world = start({ answerMs: () => 200 });
    const left = world.chat(asked("one"), { "x-request-id": "same" });
    world.run(10);
    const joined = world.chat(asked("one"));
    world.run(10);
    left.exchange?.left();
    world.run(10);
    const other = world.chat(asked("two"), { "x-request-id": "same" });
    world.run(1000);
    expect(other.headers["x-request-id"]).not.toBe("same");
    expect([joined.content, other.content]).toEqual(["to: one", "to: two"]);
    const later = world.chat(asked("three"), { "x-request-id": "same" });
    world.run(1000);
    expect(later.headers["x-request-id"]).toBe("same");
  });
});

describe("matching: questions embedded ahead", () => {
  const warm = {
    tenant: "local",
    limitKey: "local",
    limits: {},
    weight: 1,
    priority: "batch",
  } as const;
  const vectorOf = (text: string) => new LexicalEmbedder(128).embed(text);

  it("need no embedder, are learnt, and match", () => {
    const embedder = new LateEmbedder(never);
    const world = start({ embedder: () => embedder });
    const ahead = (text: string) =>
      world.chat(asked(text), {}, { as: warm, vector: vectorOf(text) });
    ahead(QUESTION);
    world.run(500);
    const reply = ahead(REWORDED);
    world.run(500);
    expect(reply.cache).toMatch(/^hit-semantic/);
    expect(embedder.asked).toBe(0);
  });

  it("a warm-up's hits are not judged: nodes get no more than it was told to ask", () => {
    const world = start({ options: { cache: { semantic: { judgeRatio: 1 } } } });
    world.chat(asked(QUESTION));
    world.run(500);
    const reply = world.chat(asked(REWORDED), {}, { as: warm, vector: vectorOf(REWORDED) });
    world.run(500);
    expect(reply.cache).toMatch(/^hit-semantic/);
    expect(world.generations).toHaveLength(1);
    world.chat(asked(`${REWORDED}!`));
    world.run(500);
    expect(world.generations).toHaveLength(2); // A client's is.
  });
});
