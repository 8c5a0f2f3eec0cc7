/** The stored questions against a real Redis: what a shard gets back, what it never gets, and that Redis can do no harm. */
import { setTimeout as delay } from "node:timers/promises";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { StoredQuestion } from "../actors/protocol.ts";
import type { StoreOptions } from "../transport/redis-store.ts";
import { decodeQuestion, encodeQuestion, questionFields } from "../transport/redis-values.ts";
import { redisSearchUrl } from "./environment.ts";
import {
  type RedisServer,
  redis8,
  redisAvailable,
  redisVersion,
  startRedis,
} from "./redis-server.ts";
import { answer, cleanups, redis, StoreRig, until } from "./store-rig.ts";

fc.configureGlobal({ seed: 20_251_125 });

const DIMENSION = 32;

/** Uniform in [0, 1), the same in every run (mulberry32). */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4_294_967_296;
  };
}

function unit(values: Float32Array): Float32Array {
  const norm = Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
  return values.map((value) => value / norm);
}

function randomVector(next: () => number, dimension = DIMENSION): Float32Array {
  return unit(Float32Array.from({ length: dimension }, () => next() + next() + next() - 1.5));
}

/** At about that cosine from `vector`. */
function near(vector: Float32Array, similarity: number, next: () => number): Float32Array {
  const other = randomVector(next, vector.length);
  const along = cosine(vector, other);
  const across = unit(other.map((value, at) => value - along * (vector[at] ?? 0)));
  const share = Math.sqrt(1 - similarity * similarity);
  return unit(vector.map((value, at) => similarity * value + share * (across[at] ?? 0)));
}

function cosine(one: Float32Array, other: Float32Array): number {
  return one.reduce((sum, value, at) => sum + value * (other[at] ?? 0), 0);
}

/** A scope in a bucket. */
function scopeIn(bucket: number, more = "0"): string {
  return (bucket.toString(16).padStart(3, "0") + more).padEnd(64, "a");
}

const vectors = random(1);

function question(id: number, more: Partial<StoredQuestion> = {}): StoredQuestion {
  const scope = more.scope ?? scopeIn(0x2a7);
  return {
    entryId: `${scope.slice(0, 3)}${id.toString(16).padStart(24, "0")}`,
    scope,
    tenant: "acme",
    model: "m",
    text: `What is ${id} — 今天天气怎么样 🌍?`,
    vector: randomVector(vectors),
    answer,
    ttlMs: 60_000,
    ageMs: 0,
    ...more,
  };
}

const idsOf = (questions: readonly StoredQuestion[]): string[] =>
  questions.map(({ entryId }) => entryId).sort();

/** With both connections up. */
async function ready(
  place: StoreOptions["redis"] | RedisServer,
  options: Partial<StoreOptions> = {},
): Promise<StoreRig> {
  const rig = await StoreRig.ready(place, 5000, options);
  await rig.recall(0xfff);
  return rig;
}

/** Writes that have an outcome: on a machine that is held up, one may come too late. */
function written({ store }: StoreRig): number {
  const { remembered, remembersFailed } = store.stats();
  return remembered + remembersFailed;
}

async function keysOf(server: RedisServer, pattern: string): Promise<string[]> {
  const reply = await server.command("KEYS", pattern);
  return reply.split("\r\n").filter((line) => line.startsWith("headrace:"));
}

/** The only one with that pattern. */
async function keyOf(server: RedisServer, pattern: string): Promise<string> {
  const [key, ...others] = await keysOf(server, pattern);
  if (key === undefined || others.length > 0) throw new Error(`not one key like ${pattern}`);
  return key;
}

describe.skipIf(!redisAvailable)("stored questions", () => {
  it("come back whole, with what is left of their life and their age", async () => {
    const rig = await ready(await redis());
    const stored = question(1, { ageMs: 5000 });
    await rig.remember(stored);
    const { questions } = await rig.recallAll(0x2a7);
    const [back] = questions;
    expect(questions.length).toBe(1);
    expect(back).toEqual({ ...stored, ttlMs: expect.any(Number), ageMs: expect.any(Number) });
    expect(back?.ttlMs).toBeGreaterThan(0);
    expect(back?.ttlMs).toBeLessThanOrEqual(60_000);
    // Redis's count of its life is the clock: what is gone of it has been added to the age.
    expect((back?.ttlMs ?? 0) + (back?.ageMs ?? 0)).toBe(65_000);
    expect(rig.store.stats()).toMatchObject({ remembered: 1, recalled: 1, recallsFailed: 0 });
  });

  it("are asked for by bucket, and come back from that one alone", async () => {
    const rig = await ready(await redis());
    const here = [question(1), question(2, { scope: scopeIn(0x2a7, "1") })];
    const there = [question(3, { scope: scopeIn(0) }), question(4, { scope: scopeIn(4095) })];
    await rig.remember(...here, ...there);
    expect(idsOf((await rig.recallAll(0x2a7)).questions)).toEqual(idsOf(here));
    expect(idsOf((await rig.recallAll(0)).questions)).toEqual(["000000000000000000000000003"]);
    expect(idsOf((await rig.recallAll(4095)).questions)).toEqual(["fff000000000000000000000004"]);
    expect(await rig.recall(1)).toEqual({ questions: [] });
  });

  it("come in pages of at most 64, each once, oldest first, whatever comes and goes meanwhile", async () => {
    const rig = await ready(await redis());
    const stored = Array.from({ length: 500 }, (_, id) => question(id));
    await rig.remember(...stored);
    const seen: StoredQuestion[] = [];
    let cursor: string | undefined = "";
    let pages = 0;
    while (cursor !== undefined) {
      const page: { questions: StoredQuestion[]; cursor?: string } = await rig.recall(
        0x2a7,
        cursor,
      );
      expect(page.questions.length).toBeLessThanOrEqual(64);
      seen.push(...page.questions);
      cursor = page.cursor;
      // One that was read and one that was not leave; a new one comes.
      if (++pages > 3) continue;
      const [read] = page.questions;
      if (read !== undefined) rig.forget(read);
      rig.forget(question(400 + pages));
      await rig.remember(question(1000 + pages));
    }
    expect(new Set(idsOf(seen)).size).toBe(seen.length);
    const wanted = stored.filter((_, id) => id < 401 || id > 403);
    expect(seen.map(({ entryId }) => entryId)).toEqual(
      idsOf([...wanted, question(1001), question(1002), question(1003)]),
    );
    expect(pages).toBe(8);
  });

  it("that expire at one instant are told apart, however they are cut into pages", async () => {
    const server = await redis();
    const rig = await ready(server);
    const stored = Array.from({ length: 300 }, (_, id) => question(id));
    await rig.remember(...stored);
    const bucket = await keyOf(server, "headrace:v1:questions:*");
    const script = `for _, m in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do redis.call('ZADD', KEYS[1], ARGV[1], m) end`;
    await server.command("EVAL", script, "1", bucket, String(Date.now() + 60_000));
    // Some are gone before they are read: the places of the others move.
    for (const key of (await keysOf(server, "headrace:v1:question:*")).slice(0, 100))
      await server.command("DEL", key);
    const { questions, pages } = await rig.recallAll(0x2a7);
    expect(questions.length).toBe(200);
    expect(new Set(idsOf(questions)).size).toBe(200);
    expect(pages.length).toBe(5);
    expect(rig.store.stats().leftOutGone).toBe(100);
    expect(await server.command("ZCARD", bucket)).toContain(":200");
  });

  it("are cut into pages of about a megabyte", async () => {
    const rig = await ready(await redis());
    const large = { ...answer, body: Buffer.alloc(300_000, 7), bytes: 300_000 };
    await rig.remember(...Array.from({ length: 20 }, (_, id) => question(id, { answer: large })));
    const { questions, pages } = await rig.recallAll(0x2a7);
    expect(questions.length).toBe(20);
    expect(Math.max(...pages)).toBe(3);
  });

  it("5,000 of them come back in pages while exact lookups go on", async () => {
    const server = await redis();
    const rig = await ready(server);
    const stored = Array.from({ length: 5000 }, (_, id) =>
      question(id, { scope: scopeIn(0x2a7, String(id % 7)) }),
    );
    await rig.remember(...stored);
    await rig.put("a");
    let isRecalling = true;
    const recall = rig.recallAll(0x2a7).finally(() => {
      isRecalling = false;
    });
    let lookups = 0;
    while (isRecalling) {
      expect((await rig.get("a")).answer).toEqual(answer);
      lookups++;
    }
    const { questions, pages } = await recall;
    expect(idsOf(questions)).toEqual(idsOf(stored));
    expect(Math.max(...pages)).toBe(64);
    expect(lookups).toBeGreaterThan(pages.length / 4); // Between the pages, not after them.
    expect(rig.store.stats()).toMatchObject({ recalled: 5000, missesLate: 0, missesResting: 0 });
  });

  it("leave when their life ends, and so do their places", async () => {
    const server = await redis();
    const rig = await ready(server);
    await rig.remember(...Array.from({ length: 100 }, (_, id) => question(id, { ttlMs: 1500 })));
    await rig.remember(question(200));
    const bucket = await keyOf(server, "headrace:v1:questions:*");
    expect(await server.command("ZCARD", bucket)).toContain(":101");
    await until(async () => (await keysOf(server, "headrace:v1:question:*")).length === 1);
    expect((await rig.recallAll(0x2a7)).questions.map(({ text }) => text)).toEqual([
      question(200).text,
    ]);
    expect(await server.command("ZCARD", bucket)).toContain(":1\r\n");
  });

  it("take the places of expired ones as they are written, without a recall", async () => {
    const server = await redis();
    const rig = await ready(server);
    await rig.remember(question(300)); // It keeps the bucket.
    const bucket = await keyOf(server, "headrace:v1:questions:*");
    await rig.remember(...Array.from({ length: 100 }, (_, id) => question(id, { ttlMs: 30 })));
    // KEYS leaves out what has expired, be it still there.
    await until(async () => (await keysOf(server, "headrace:v1:question:*")).length === 1);
    await delay(2); // A place is dropped from the millisecond on after which its entry is gone.
    await rig.remember(...Array.from({ length: 13 }, (_, id) => question(200 + id)));
    expect(await server.command("ZCARD", bucket)).toContain(":14\r\n");
  });

  it("are all gone from Redis when the last has expired", async () => {
    const server = await redis();
    const rig = await ready(server);
    await rig.remember(question(1, { ttlMs: 80 }), question(2, { ttlMs: 40 }));
    await until(async () => (await server.command("DBSIZE")).startsWith(":0"));
  });

  it("are not written without a life, too large, or beyond the bounds", async () => {
    const server = await redis();
    const rig = await ready(server, { answerBytesMax: 1000 });
    const large = { ...answer, body: Buffer.alloc(1001), bytes: 1001 };
    await rig.remember(
      question(1, { ttlMs: 0.9 }),
      question(2, { answer: large }),
      question(3, { text: "x".repeat(200_000) }),
    );
    expect(rig.store.stats()).toMatchObject({ remembered: 0, remembersDropped: 3 });
    for (let id = 0; id < 400; id++) rig.rememberNow(question(id));
    expect(rig.store.stats().remembersDropped).toBe(3 + 144);
    await until(() => written(rig) === 256);
    const wide = await ready(server);
    const megabyte = { ...answer, body: Buffer.alloc(1 << 20), bytes: 1 << 20 };
    for (let id = 0; id < 100; id++) wide.rememberNow(question(id, { answer: megabyte }));
    expect(wide.store.stats().remembersDropped).toBe(68); // 32 MiB are under way.
    await until(() => written(wide) === 32);
  });

  it.each<[string, string[], "leftOutCorrupt" | "leftOutForeign" | "leftOutLarge", boolean]>([
    ["a text that was changed", ["HSET", "KEY", "question", "other"], "leftOutCorrupt", true],
    ["a vector cut short", ["HSET", "KEY", "vector", "abcd"], "leftOutCorrupt", true],
    ["a field lost", ["HDEL", "KEY", "answer"], "leftOutCorrupt", true],
    ["another scope", ["HSET", "KEY", "scope", scopeIn(0x2a7, "9")], "leftOutCorrupt", true],
    ["another version", ["HSET", "KEY", "version", "2"], "leftOutForeign", false],
    ["no life", ["PERSIST", "KEY"], "leftOutForeign", false],
    [
      "a megabyte too much",
      ["HSET", "KEY", "question", "x".repeat(2 << 20)],
      "leftOutLarge",
      false,
    ],
  ])("are left out, and the others are not, with %s", async (_, spoil, count, removed) => {
    const server = await redis();
    const rig = await ready(server);
    await rig.remember(question(1), question(2), question(3));
    const key = await keyOf(server, "headrace:v1:question:*2");
    await server.command(...spoil.map((word) => (word === "KEY" ? key : word)));
    expect(idsOf((await rig.recallAll(0x2a7)).questions)).toEqual(
      idsOf([question(1), question(3)]),
    );
    expect(rig.store.stats()[count]).toBe(1);
    expect(await server.command("EXISTS", key)).toContain(removed ? ":0" : ":1");
  });

  it("are left out where an entry was put in another's place", async () => {
    const server = await redis();
    const rig = await ready(server);
    await rig.remember(question(1), question(2));
    const [one = "", two = ""] = (await keysOf(server, "headrace:v1:question:*")).sort();
    await server.command("COPY", one, two, "REPLACE");
    expect(idsOf((await rig.recallAll(0x2a7)).questions)).toEqual(idsOf([question(1)]));
    expect(rig.store.stats().leftOutCorrupt).toBe(1);
  });

  it("are not hindered by strangers in their place, or by a bucket that is none", async () => {
    const server = await redis();
    const rig = await ready(server);
    await rig.remember(question(1), question(2));
    const bucket = await keyOf(server, "headrace:v1:questions:*");
    await server.command("ZADD", bucket, "1", "stranger", "1.5e300", "x:{2a7}:y:z");
    const key = await keyOf(server, "headrace:v1:question:*1");
    await server.command("DEL", key);
    await server.command("LPUSH", key, "not a hash");
    expect(idsOf((await rig.recallAll(0x2a7)).questions)).toEqual(idsOf([question(2)]));
    expect(rig.store.stats()).toMatchObject({ leftOutForeign: 3, recallsFailed: 0 });
    await server.command("SET", "headrace:v1:questions:{00b}", "not a sorted set");
    expect(await rig.recall(0xb)).toEqual({ questions: [] });
    expect(rig.store.stats().recallsFailed).toBe(1);
  });

  it("of two tenants stand apart: each is purged alone, and keys name neither", async () => {
    const server = await redis();
    const rig = await ready(server);
    const mine = [question(1), question(2, { scope: scopeIn(5) })];
    const theirs = [3, 4].map((id) =>
      question(id, { tenant: "umbrella", scope: scopeIn(0x2a7, "7") }),
    );
    await rig.remember(...mine, ...theirs);
    await rig.put("a", "acme");
    await rig.put("a", "umbrella");
    expect((await keysOf(server, "*")).join()).not.toMatch(/acme|umbrella/);
    expect(await rig.purge("acme")).toEqual({ removed: 3 });
    expect(idsOf((await rig.recallAll(0x2a7)).questions)).toEqual(idsOf(theirs));
    expect(await rig.recall(5)).toEqual({ questions: [] });
    expect(rig.store.stats().leftOutGone).toBe(0); // Their places went with them.
    expect(await rig.purge()).toEqual({ removed: 3 });
    expect(await server.command("DBSIZE")).toContain(":0");
  });

  it("written just before a purge are purged", async () => {
    const server = await redis();
    const rig = await ready(server);
    for (let id = 0; id < 200; id++) rig.rememberNow(question(id));
    expect(await rig.purge("acme")).toEqual({ removed: 200 });
    expect(await server.command("DBSIZE")).toContain(":0");
  });

  it("that are forgotten are gone, and their places with them", async () => {
    const server = await redis();
    const rig = await ready(server);
    await rig.remember(question(1), question(2));
    rig.forget(question(1));
    await until(() => rig.store.stats().forgotten === 1);
    expect(await server.command("ZCARD", await keyOf(server, "headrace:v1:questions:*"))).toContain(
      ":1",
    );
    expect(idsOf((await rig.recallAll(0x2a7)).questions)).toEqual(idsOf([question(2)]));
    expect(rig.store.stats()).toMatchObject({ forgetsWaiting: 0, leftOutForgotten: 0 });
  });

  it("forgotten while Redis is away do not come back with it, be it from a copy made before", async () => {
    const args = ["--maxmemory-policy", "allkeys-lru", "--appendonly", "yes"];
    const server = await redis(args);
    const rig = await ready(server);
    await rig.remember(...Array.from({ length: 300 }, (_, id) => question(id)));
    rig.forget(question(0)); // Done before the crash; kept all the same.
    await until(() => rig.store.stats().forgotten === 1);
    await server.kill();
    await until(() => !rig.store.stats().connected);
    for (let id = 1; id < 200; id++) rig.forget(question(id));
    rig.rememberNow(question(999));
    expect(rig.store.stats()).toMatchObject({ forgetsWaiting: 199, remembersDropped: 1 });
    const later = await startRedis({ args, port: server.port, folder: server.folder });
    cleanups.push(() => later.stop());
    await until(() => rig.store.stats().forgotten >= 201); // More, where it had to connect twice.
    const { questions } = await rig.recallAll(0x2a7);
    expect(idsOf(questions)).toEqual(
      idsOf(Array.from({ length: 100 }, (_, at) => question(200 + at))),
    );
    expect((await keysOf(later, "headrace:v1:question:*")).length).toBe(100);
    expect(rig.store.stats()).toMatchObject({ forgetsWaiting: 0, forgetsLost: 0 });
    const another = await ready(later);
    expect((await another.recallAll(0x2a7)).questions.length).toBe(100);
  });

  it("forgotten beyond the bound are counted, and the newest are kept", async () => {
    const server = await redis();
    const rig = await ready(server);
    await rig.remember(question(20_000));
    await server.kill();
    await until(() => !rig.store.stats().connected);
    for (let id = 0; id <= 10_000; id++) rig.forget(question(id, { vector: new Float32Array(1) }));
    expect(rig.store.stats()).toMatchObject({ forgetsWaiting: 10_000, forgetsLost: 1 });
  });

  it("are there again after Redis was killed and came back full, and the pages go on where they were", async () => {
    const args = ["--maxmemory-policy", "allkeys-lru", "--appendonly", "yes"];
    const server = await redis(args);
    const rig = await ready(server);
    const stored = Array.from({ length: 150 }, (_, id) => question(id));
    await rig.remember(...stored);
    const first = await rig.recall(0x2a7);
    await server.kill();
    await until(() => !rig.store.stats().connected);
    const second = rig.recall(0x2a7, first.cursor); // Waits for Redis a while.
    const later = await startRedis({ args, port: server.port, folder: server.folder });
    cleanups.push(() => later.stop());
    const seen = [...first.questions, ...(await second).questions];
    seen.push(...(await rig.recall(0x2a7, (await second).cursor)).questions);
    expect(idsOf(seen)).toEqual(idsOf(stored));
  });

  it("are gone after Redis was killed and came back empty, and new ones are kept", async () => {
    const server = await redis();
    const rig = await ready(server);
    await rig.remember(...Array.from({ length: 150 }, (_, id) => question(id)));
    const { cursor } = await rig.recall(0x2a7);
    await server.kill();
    await until(() => !rig.store.stats().connected);
    const later = await startRedis({ port: server.port });
    cleanups.push(() => later.stop());
    expect(await rig.recall(0x2a7, cursor)).toEqual({ questions: [] });
    await rig.remember(question(1));
    expect(idsOf((await rig.recallAll(0x2a7)).questions)).toEqual(idsOf([question(1)]));
  });

  it("are not answered as none while Redis is away: their shard asks again", async () => {
    const server = await redis();
    const rig = await ready(server);
    await server.kill();
    await until(() => !rig.store.stats().connected);
    let isAnswered = false;
    void rig.recall(0x2a7).then(() => {
      isAnswered = true;
    });
    await until(() => rig.store.stats().recallsAway === 1);
    expect(isAnswered).toBe(false);
  });

  it("cost nothing while Redis hangs: writes are bounded, and go on when it is back", async () => {
    const server = await redis();
    const rig = await ready(server);
    server.pause();
    for (let id = 0; id < 1000; id++) rig.rememberNow(question(id));
    expect(rig.store.stats().remembersDropped).toBe(744);
    await until(() => rig.store.stats().remembersFailed === 256); // A second later, all at once.
    server.resume();
    await until(() => rig.store.stats().connected);
    await rig.remember(question(2000));
    expect(rig.store.stats().remembered).toBe(1);
  });

  it("are spread over a cluster, and purged, forgotten and recalled there", async () => {
    const nodes = await cluster(undefined);
    const rig = await ready(nodes);
    const stored = Array.from({ length: 40 }, (_, id) =>
      question(id, { scope: scopeIn(id * 100) }),
    );
    await rig.remember(...stored);
    const back: StoredQuestion[] = [];
    for (const { scope } of stored)
      back.push(...(await rig.recallAll(Number.parseInt(scope.slice(0, 3), 16))).questions);
    expect(idsOf(back)).toEqual(idsOf(stored));
    rig.forget(question(0, { scope: scopeIn(0) }));
    await until(() => rig.store.stats().forgotten === 1);
    expect(await rig.recall(0)).toEqual({ questions: [] });
    expect(await rig.purge("acme")).toEqual({ removed: 39 });
    expect(await rig.recall(100)).toEqual({ questions: [] });
  });

  it("are matched by the actors where Redis is no index: a search finds none", async () => {
    const rig = await ready(await redis());
    const stored = question(1);
    await rig.remember(stored);
    expect(await rig.nearest(stored.scope, stored.vector)).toEqual({ questions: [] });
    expect(rig.store.stats().nearestLacking).toBe(1);
  });
});

/** Two masters. */
async function cluster(program: string | undefined): Promise<NonNullable<StoreOptions["redis"]>> {
  const args = ["--cluster-enabled", "yes", "--maxmemory-policy", "allkeys-lru"];
  const options = program === undefined ? {} : { program };
  const nodes = [await redis(args, options), await redis(args, options)];
  const [one, two] = nodes.map(({ port }) => String(port));
  await nodes[0]?.command("CLUSTER", "ADDSLOTSRANGE", "0", "8191");
  await nodes[1]?.command("CLUSTER", "ADDSLOTSRANGE", "8192", "16383");
  await nodes[1]?.command("CLUSTER", "SET-CONFIG-EPOCH", "2");
  await nodes[0]?.command("CLUSTER", "MEET", "127.0.0.1", two ?? "");
  for (const node of nodes) {
    await until(async () => {
      const info = await node.command("CLUSTER", "INFO");
      return info.includes("cluster_state:ok") && info.includes("cluster_size:2");
    });
  }
  return { clusterNodes: [`127.0.0.1:${one}`], tls: false, keyPrefix: "headrace:" };
}

/** A store whose index is Redis's own. */
type OpenIndex = (options?: Partial<StoreOptions>) => Promise<StoreRig>;

function indexTests(open: OpenIndex): void {
  it("finds the nearest of a scope, best first, by their exact cosine", async () => {
    const rig = await open();
    const next = random(7);
    const asked = randomVector(next);
    const similarities = [0.905, 0.919, 0.921, 0.94, 0.99];
    const stored = similarities.map((similarity, id) =>
      question(id, { vector: near(asked, similarity, next) }),
    );
    await rig.remember(...stored, ...Array.from({ length: 200 }, (_, id) => question(100 + id)));
    await untilFound(rig, stored[4]);
    const found = async (min: number, count: number): Promise<(number | undefined)[]> => {
      const { questions } = await rig.nearest(scopeIn(0x2a7), asked, min, count);
      return questions.map(({ entryId }) => stored.findIndex((one) => one.entryId === entryId));
    };
    expect(await found(0.92, 3)).toEqual([4, 3, 2]);
    expect(await found(0.92, 2)).toEqual([4, 3]);
    expect(await found(0.9, 8)).toEqual([4, 3, 2, 1, 0]);
    expect(await found(0.95, 3)).toEqual([4]);
    expect(await found(0.995, 3)).toEqual([]);
    const [best] = (await rig.nearest(scopeIn(0x2a7), asked)).questions;
    expect(best).toEqual({
      ...stored[4],
      ttlMs: expect.any(Number),
      ageMs: expect.any(Number),
    });
    expect(rig.store.stats()).toMatchObject({ nearestFailed: 0, indexFailed: 0, indexOk: true });
  });

  it("never finds what belongs to another scope, be it the same question", async () => {
    const rig = await open();
    const here = question(1);
    const others = ["1", "2", "3"].map((more, id) =>
      question(10 + id, { ...here, entryId: `2a7${id}`, scope: scopeIn(0x2a7, more) }),
    );
    const tenants = question(20, {
      ...here,
      entryId: "2a79",
      tenant: "umbrella",
      scope: scopeIn(9),
    });
    await rig.remember(here, ...others, tenants);
    for (const stored of [here, ...others, tenants]) {
      await untilFound(rig, stored);
      const { questions } = await rig.nearest(stored.scope, here.vector, 0.5);
      expect(idsOf(questions)).toEqual([stored.entryId]);
    }
    expect(await rig.nearest(scopeIn(0x2a7, "4"), here.vector, 0.5)).toEqual({ questions: [] });
  });

  it("does not find what has expired, was forgotten, or was purged", async () => {
    const rig = await open();
    const short = question(1, { ttlMs: 400 });
    const wrong = question(2);
    const right = question(3);
    const theirs = question(4, { tenant: "umbrella", scope: scopeIn(1) });
    await rig.remember(short, wrong, right, theirs);
    for (const stored of [wrong, right, theirs]) await untilFound(rig, stored);
    rig.forget(wrong);
    await until(() => rig.store.stats().forgotten === 1);
    expect(await rig.nearest(wrong.scope, wrong.vector)).toEqual({ questions: [] });
    await until(async () => (await rig.nearest(short.scope, short.vector)).questions.length === 0);
    expect((await rig.nearest(right.scope, right.vector)).questions.length).toBe(1);
    await rig.purge("acme");
    expect(await rig.nearest(right.scope, right.vector)).toEqual({ questions: [] });
    expect((await rig.nearest(theirs.scope, theirs.vector)).questions.length).toBe(1);
    await rig.remember(question(5, { vector: right.vector }));
    await untilFound(rig, question(5, { vector: right.vector }));
  });

  it("serves embedders of two dimensions, each in its scopes", async () => {
    const rig = await open();
    const next = random(3);
    const small = question(1, { vector: randomVector(next, 16) });
    const large = question(2, { vector: randomVector(next, 384), scope: scopeIn(0x2a7, "3") });
    await rig.remember(small, large);
    await untilFound(rig, small);
    await untilFound(rig, large);
    expect((await rig.nearest(small.scope, small.vector)).questions.length).toBe(1);
    expect((await rig.nearest(large.scope, small.vector)).questions).toEqual([]);
  });

  it("hits where an exhaustive search does, 1,000 questions in clusters", async () => {
    const rig = await open();
    const next = random(11);
    const centres = Array.from({ length: 50 }, () => randomVector(next, 384));
    const stored = Array.from({ length: 1000 }, (_, id) =>
      question(id, { vector: near(centres[id % 50] ?? new Float32Array(), 0.8, next) }),
    );
    await rig.remember(...stored);
    await untilFound(rig, stored[999]);
    let hits = 0;
    for (let asked = 0; asked < 100; asked++) {
      const like = stored[(asked * 7) % 1000]?.vector ?? new Float32Array();
      const vector = near(like, 0.9 + 0.09 * next(), next);
      const exhaustive = stored.filter((one) => cosine(one.vector, vector) >= 0.9);
      const { questions } = await rig.nearest(scopeIn(0x2a7), vector, 0.9);
      if (idsOf(questions).join() === idsOf(exhaustive).join()) hits++;
    }
    expect(hits).toBeGreaterThanOrEqual(99);
  });
}

async function untilFound(rig: StoreRig, stored: StoredQuestion | undefined): Promise<void> {
  if (stored === undefined) throw new Error("nothing to find");
  await until(async () => {
    const { questions } = await rig.nearest(stored.scope, stored.vector, 0.99);
    return questions.some(({ entryId }) => entryId === stored.entryId);
  });
}

const program = redis8();
const vectorSets: Partial<StoreOptions> = { semantic: { index: "redis-vectorset" } };

describe.skipIf(program === undefined)("an index of Redis 8 vector sets", () => {
  const server = (args?: readonly string[]): Promise<RedisServer> =>
    redis(args, program === undefined ? {} : { program });

  indexTests(async (options) => ready(await server(), { ...vectorSets, ...options }));

  it("is taken without a word where it is there", async () => {
    const rig = await ready(await server(), vectorSets);
    expect(rig.logged).toEqual(["Redis is connected"]);
    expect(rig.store.stats().indexOk).toBe(true);
  });

  it("loses expired entries as others are written, and all of itself with the last", async () => {
    const redis8Server = await server();
    const rig = await ready(redis8Server, vectorSets);
    await rig.remember(...Array.from({ length: 50 }, (_, id) => question(id, { ttlMs: 400 })));
    const key = await keyOf(redis8Server, "headrace:v1:vectors:*");
    expect(await redis8Server.command("VCARD", key)).toContain(":50");
    await until(async () => (await keysOf(redis8Server, "headrace:v1:question:*")).length === 0);
    await delay(2);
    await rig.remember(...Array.from({ length: 7 }, (_, id) => question(100 + id, { ttlMs: 400 })));
    await until(async () => (await redis8Server.command("VCARD", key)).includes(":7\r\n"));
    await until(async () => (await redis8Server.command("DBSIZE")).startsWith(":0"));
  });

  it("loses an entry that is gone when a search meets it", async () => {
    const redis8Server = await server();
    const rig = await ready(redis8Server, vectorSets);
    const stored = question(1);
    await rig.remember(stored, question(2));
    await redis8Server.command("DEL", await keyOf(redis8Server, "headrace:v1:question:*1"));
    const key = await keyOf(redis8Server, "headrace:v1:vectors:*");
    expect(await rig.nearest(stored.scope, stored.vector)).toEqual({ questions: [] });
    expect(rig.store.stats().leftOutGone).toBe(1);
    await until(async () => (await redis8Server.command("VCARD", key)).includes(":1\r\n"));
  });

  it("does not serve what was changed behind its back", async () => {
    const redis8Server = await server();
    const rig = await ready(redis8Server, vectorSets);
    const stored = question(1);
    await rig.remember(stored);
    const key = await keyOf(redis8Server, "headrace:v1:question:*");
    await redis8Server.command("HSET", key, "question", "other");
    expect(await rig.nearest(stored.scope, stored.vector)).toEqual({ questions: [] });
    expect(rig.store.stats().leftOutCorrupt).toBe(1);
  });

  it("is there again after Redis was killed and came back full", async () => {
    const args = ["--maxmemory-policy", "allkeys-lru", "--appendonly", "yes"];
    const redis8Server = await server(args);
    const rig = await ready(redis8Server, vectorSets);
    const stored = Array.from({ length: 100 }, (_, id) => question(id));
    await rig.remember(...stored);
    await redis8Server.kill();
    await until(() => !rig.store.stats().connected);
    const [first = question(0)] = stored;
    expect(await rig.nearest(first.scope, first.vector)).toEqual({ questions: [] });
    rig.forget(question(1));
    const { port, folder } = redis8Server;
    const later = await startRedis({ args, port, folder, ...(program && { program }) });
    cleanups.push(() => later.stop());
    await until(() => rig.store.stats().forgotten === 1 && rig.store.stats().connected);
    for (const one of stored) {
      const { questions } = await rig.nearest(one.scope, one.vector, 0.99);
      expect(idsOf(questions)).toEqual(one === stored[1] ? [] : [one.entryId]);
    }
    expect(rig.store.stats()).toMatchObject({ nearestAway: 1, nearestFailed: 0 });
  });

  it("delays no more than the first searches while Redis hangs", async () => {
    const redis8Server = await server();
    const rig = await StoreRig.ready(redis8Server, 40, vectorSets);
    await rig.recall(0);
    const stored = question(1);
    await rig.remember(stored);
    redis8Server.pause();
    await Promise.all([1, 2, 3].map(() => rig.nearest(stored.scope, stored.vector)));
    expect(rig.store.stats()).toMatchObject({ nearestLate: 3, resting: true });
    for (let i = 0; i < 50; i++) await rig.nearest(stored.scope, stored.vector);
    expect(await rig.get("a")).toEqual({ ttlMs: 0 });
    expect(rig.store.stats()).toMatchObject({ nearestLate: 3, nearestResting: 50 });
    redis8Server.resume();
    await untilFound(rig, stored);
  });

  it("works in a cluster", async () => {
    const rig = await ready(await cluster(program), vectorSets);
    const stored = Array.from({ length: 40 }, (_, id) =>
      question(id, { scope: scopeIn(id * 100) }),
    );
    await rig.remember(...stored);
    for (const one of stored)
      expect(idsOf((await rig.nearest(one.scope, one.vector)).questions)).toEqual([one.entryId]);
    expect(rig.store.stats()).toMatchObject({ nearestFound: 40, indexFailed: 0 });
    expect(await rig.purge()).toEqual({ removed: 40 });
    for (const one of stored)
      expect(await rig.nearest(one.scope, one.vector)).toEqual({ questions: [] });
  });
});

if (redisSearchUrl === undefined)
  console.warn("skipped: RediSearch (HEADRACE_REDIS_SEARCH_URL names a server that has it)");

describe.skipIf(redisSearchUrl === undefined)("an index of RediSearch", () => {
  indexTests(async (options) => {
    const place = { url: redisSearchUrl ?? "", tls: false, keyPrefix: "headrace-test:" };
    const rig = await ready(place, { semantic: { index: "redis-search" }, ...options });
    await rig.purge();
    cleanups.push(() => rig.purge());
    return rig;
  });
});

describe.skipIf(!redisAvailable)("an index that Redis does not have", () => {
  const search: Partial<StoreOptions> = { semantic: { index: "redis-search" } };

  it("is refused at the start in one line, and no connection is left", async () => {
    const server = await redis();
    await expect(StoreRig.open(server, 1000, search)).rejects.toThrow(
      /^configuration: cache\.semantic\.index is redis-search, but this Redis does not have RediSearch .*; use another Redis, or set it to actors$/,
    );
    await until(async () =>
      (await server.command("INFO", "clients")).includes("connected_clients:1"),
    );
  });

  it.skipIf(redisVersion >= 8)(
    "is refused, too, where Redis is older than its vector sets",
    async () => {
      await expect(StoreRig.open(await redis(), 1000, vectorSets)).rejects.toThrow(
        "cache.semantic.index is redis-vectorset, but this Redis does not have vector sets, which came with Redis 8",
      );
    },
  );

  it("is refused in a cluster where it would see one node's entries only", async () => {
    const place = { clusterNodes: ["127.0.0.1:1"], tls: false, keyPrefix: "headrace:" };
    await expect(StoreRig.open(place, 1000, search)).rejects.toThrow(/names a cluster/);
  });

  it("is missed when Redis comes later: that is said, exact answers and entries are kept", async () => {
    const gone = await redis();
    await gone.stop();
    const rig = await StoreRig.open(gone, 1000, search);
    expect(rig.logged.length).toBe(1);
    expect(rig.logged[0]).toMatch(/^Redis is away: whether it can be the semantic index is seen/);
    const later = await startRedis({ port: gone.port });
    cleanups.push(() => later.stop());
    await until(() => rig.store.stats().indexOk === false);
    const told = rig.logged.filter((line) => line.startsWith("Redis does not have what cache."));
    expect(told.length).toBe(1);
    const stored = question(1);
    expect(await rig.nearest(stored.scope, stored.vector)).toEqual({ questions: [] });
    await rig.recall(0);
    await rig.remember(stored);
    await rig.put("a");
    expect((await rig.get("a")).answer).toEqual(answer);
    expect(idsOf((await rig.recallAll(0x2a7)).questions)).toEqual([stored.entryId]);
    expect(rig.store.stats()).toMatchObject({ nearestLacking: 1, indexFailed: 0 });
  });
});

describe("the stored form of a question", () => {
  const anyQuestion = fc
    .record({
      entryId: fc.stringMatching(/^[0-9a-f]{27}$/),
      scope: fc.stringMatching(/^[0-9a-f]{64}$/),
      tenant: fc.string({ unit: "grapheme" }),
      model: fc.string({ unit: "grapheme" }),
      text: fc.string({ unit: "grapheme" }),
      seed: fc.nat(),
      dimension: fc.integer({ min: 1, max: 40 }),
      ttlMs: fc.integer({ min: 1, max: 2_592_000_000 }),
      ageMs: fc.nat(),
    })
    .map(({ seed, dimension, ...fields }): StoredQuestion => {
      return { ...fields, answer, vector: randomVector(random(seed), dimension) };
    });
  const valuesOf = (stored: StoredQuestion): { member: string; values: Buffer[] } => {
    const { member, words } = encodeQuestion(stored, stored.ttlMs);
    const fields = new Map<string, Buffer>();
    for (let at = 0; at < words.length; at += 2)
      fields.set(String(words[at]), Buffer.from(words[at + 1] ?? ""));
    return { member, values: questionFields.map((field) => fields.get(field) ?? Buffer.alloc(0)) };
  };

  it("comes back as it was, older by what is gone of its life", () => {
    fc.assert(
      fc.property(anyQuestion, fc.double({ min: 0, max: 1, noNaN: true }), (stored, share) => {
        const { member, values } = valuesOf(stored);
        const ttlMs = Math.max(1, Math.floor(stored.ttlMs * share));
        expect(decodeQuestion(member, values, ttlMs)).toEqual({
          ...stored,
          ttlMs,
          ageMs: stored.ageMs + stored.ttlMs - ttlMs,
        });
      }),
    );
  });

  it("is refused when any byte of any field is changed or lost, or when it stands elsewhere", () => {
    fc.assert(
      fc.property(
        anyQuestion,
        fc.nat(questionFields.length - 1),
        fc.nat(),
        fc.integer({ min: 1, max: 255 }),
        (stored, field, at, by) => {
          const { member, values } = valuesOf(stored);
          const value = values[field] ?? Buffer.alloc(0);
          const refused = (changed: Buffer): void => {
            const all = values.map((kept, index) => (index === field ? changed : kept));
            expect(decodeQuestion(member, all, 1)).toBeTypeOf("string");
          };
          refused(Buffer.concat([value, Buffer.from([by])]));
          const elsewhere = `${member.slice(0, -1)}${member.endsWith("0") ? "1" : "0"}`;
          expect(decodeQuestion(elsewhere, values, 1)).toBe("corrupt");
          if (value.length === 0) return;
          const place = at % value.length;
          const changed = Buffer.from(value);
          changed[place] = (changed[place] ?? 0) ^ by;
          refused(changed);
          refused(value.subarray(0, place));
        },
      ),
    );
  });

  it("is refused with a vector that is no unit vector, whole as it may be", () => {
    for (const vector of [[0, 0], [2, 0], [Number.NaN, 1], [Number.POSITIVE_INFINITY, 0], []]) {
      const { member, values } = valuesOf(question(1, { vector: Float32Array.from(vector) }));
      expect(decodeQuestion(member, values, 1)).toBe("corrupt");
    }
  });
});
