/** The shared store against a real Redis: what is kept, and that Redis can do no harm. */
import { setTimeout as delay } from "node:timers/promises";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { decodeAnswer, encodeAnswer } from "../transport/redis-values.ts";
import { type RedisServer, redisAvailable, startRedis } from "./redis-server.ts";
import { answer, cleanups, redis, StoreRig, until } from "./store-rig.ts";

fc.configureGlobal({ seed: 20_251_124 });

const nameOfA = /headrace:v1:answer:[0-9a-f]{16}:a/;

describe.skipIf(!redisAvailable)("redis store", () => {
  it("gives back what was put, with what is left of its life", async () => {
    const rig = await StoreRig.ready(await redis());
    await rig.put("a");
    const got = await rig.get("a");
    expect(got.answer).toEqual(answer);
    expect(got.ttlMs).toBeGreaterThan(0);
    expect(got.ttlMs).toBeLessThanOrEqual(60_000);
    expect(rig.store.stats()).toMatchObject({ hits: 1, misses: 0, puts: 1, connected: true });
  });

  it("misses what is not there, and what another tenant put", async () => {
    const rig = await StoreRig.ready(await redis());
    await rig.put("a", "acme");
    expect(await rig.get("b", "acme")).toEqual({ ttlMs: 0 });
    expect(await rig.get("a", "other")).toEqual({ ttlMs: 0 });
    expect(rig.store.stats()).toMatchObject({ hits: 0, misses: 2 });
  });

  it("survives its gateway: another store finds the entries", async () => {
    const server = await redis();
    const first = await StoreRig.ready(server);
    await first.put("a");
    await first.store.close();
    expect((await (await StoreRig.ready(server)).get("a")).answer).toEqual(answer);
  });

  it("lets entries expire", async () => {
    const server = await redis();
    const rig = await StoreRig.ready(server);
    await rig.put("a", "acme", 40);
    await until(async () => (await server.command("DBSIZE")).startsWith(":0"));
    expect(await rig.get("a")).toEqual({ ttlMs: 0 });
  });

  it("does not put what has no life left", async () => {
    const rig = await StoreRig.ready(await redis());
    await rig.put("a", "acme", 0.5);
    expect(rig.store.stats()).toMatchObject({ puts: 0, putsDropped: 1 });
  });

  it("hides tenants' names and keeps to its prefix", async () => {
    const server = await redis();
    const rig = await StoreRig.ready(server);
    await rig.put("a");
    const keys = await server.command("KEYS", "*");
    expect(keys).toMatch(nameOfA);
    expect(keys).not.toContain("acme");
  });

  it.each([
    ["cut short", (value: Buffer) => value.subarray(0, -3)],
    [
      "a bit turned",
      (value: Buffer) => Buffer.from(value.map((byte, i) => (i === 40 ? byte ^ 1 : byte))),
    ],
    ["another program's", () => Buffer.from("hello")],
    ["empty", () => Buffer.alloc(0)],
  ])("takes an entry that is not whole for a miss, and removes it: %s", async (_, spoil) => {
    const server = await redis();
    const rig = await StoreRig.ready(server);
    await rig.put("a");
    const name = nameOfA.exec(await server.command("KEYS", "*"))?.[0] ?? "";
    // Through latin1 and back, so that any bytes fit into a command of text.
    const spoilt = spoil(encodeAnswer(answer));
    const hex = [...spoilt].map((byte) => `\\${String(byte).padStart(3, "0")}`).join("");
    const script = `redis.call('set', KEYS[1], '${hex}', 'PX', 60000)`;
    expect(await server.command("EVAL", script, "1", name)).not.toContain("ERR");
    expect(await rig.get("a")).toEqual({ ttlMs: 0 });
    expect(rig.store.stats()).toMatchObject({ hits: 0, missesCorrupt: 1 });
    await until(async () => (await server.command("EXISTS", name)).startsWith(":0"));
  });

  it("takes an entry of another type for a miss", async () => {
    const server = await redis();
    const rig = await StoreRig.ready(server);
    await rig.put("a");
    const name = nameOfA.exec(await server.command("KEYS", "*"))?.[0] ?? "";
    await server.command("DEL", name);
    await server.command("LPUSH", name, "x");
    expect(await rig.get("a")).toEqual({ ttlMs: 0 });
    expect(rig.store.stats()).toMatchObject({ missesFailed: 1 });
    expect(await rig.get("b")).toEqual({ ttlMs: 0 });
    expect(rig.store.stats()).toMatchObject({ misses: 1 });
  });

  it("purges one tenant, or all, and nothing else", async () => {
    const server = await redis();
    const rig = await StoreRig.ready({ url: server.url, tls: false, keyPrefix: "h[1]*:" });
    for (let i = 0; i < 1200; i++) void rig.put(`k${i}`, i % 2 === 0 ? "acme" : "other");
    await until(() => {
      const { puts, putsDropped } = rig.store.stats();
      return puts + putsDropped === 1200;
    });
    await server.command("SET", "h1x:v1:answer:0:0", "not ours");
    const { puts } = rig.store.stats();
    const acme = await rig.purge("acme");
    expect(acme.removed).toBeGreaterThan(0);
    expect(await rig.get("k0", "acme")).toEqual({ ttlMs: 0 });
    expect((await rig.get("k1", "other")).answer).toBeDefined();
    const rest = await rig.purge();
    expect(acme.removed + rest.removed).toBe(puts);
    expect(await server.command("DBSIZE")).toContain(":1");
    expect(rig.store.stats().purged).toBe(puts);
  });

  it("drops writes beyond its bound instead of holding them", async () => {
    const server = await redis();
    const rig = await StoreRig.ready(server);
    for (let i = 0; i < 400; i++) void rig.put(`k${i}`);
    expect(rig.store.stats().putsDropped).toBe(144);
    await until(() => rig.store.stats().puts === 256);
  });

  it("misses at once while Redis is away from the start, and finds it when it comes", async () => {
    const server = await redis();
    const { port } = server;
    await server.stop();
    const rig = await StoreRig.open({
      url: `redis://127.0.0.1:${port}`,
      tls: false,
      keyPrefix: "headrace:",
    });
    expect(await rig.get("a")).toEqual({ ttlMs: 0 });
    await rig.put("a");
    expect(await rig.purge()).toEqual({ removed: 0 });
    expect(rig.store.stats()).toMatchObject({ connected: false, missesAway: 1, putsDropped: 1 });
    const later = await startRedis({ port });
    cleanups.push(() => later.stop());
    await until(() => rig.store.stats().connected);
    await rig.put("a");
    expect((await rig.get("a")).answer).toEqual(answer);
  });

  it("misses while Redis is killed, says so once, and goes on after a restart", async () => {
    const server = await redis();
    const rig = await StoreRig.ready(server);
    await rig.put("a");
    const lookups = Promise.all(Array.from({ length: 50 }, () => rig.get("a")));
    await server.kill();
    for (const got of await lookups) expect(got.ttlMs === 0 || got.answer !== undefined).toBe(true);
    await until(() => !rig.store.stats().connected);
    expect(await rig.get("a")).toEqual({ ttlMs: 0 });
    await delay(250); // Reconnection is tried, and fails, meanwhile.
    expect(rig.logged.filter((line) => line.startsWith("Redis is away")).length).toBe(1);
    const later = await startRedis({ port: server.port });
    cleanups.push(() => later.stop());
    await until(() => rig.store.stats().connected);
    expect(await rig.get("a")).toEqual({ ttlMs: 0 }); // It kept nothing; we are back all the same.
    await rig.put("a");
    expect((await rig.get("a")).answer).toEqual(answer);
    expect(rig.store.stats().disconnects).toBe(1);
  });

  it("delays no more than the first lookups while Redis hangs, and asks again when it is back", async () => {
    const server = await redis();
    const rig = await StoreRig.ready(server, 40);
    await rig.put("a");
    server.pause();
    await Promise.all([rig.get("a"), rig.get("a"), rig.get("a")]);
    expect(rig.store.stats()).toMatchObject({ missesLate: 3, resting: true, connected: true });
    for (let i = 0; i < 100; i++) expect(await rig.get("a")).toEqual({ ttlMs: 0 });
    expect(rig.store.stats()).toMatchObject({ missesLate: 3, missesResting: 100 });
    await rig.put("b");
    expect(rig.store.stats().putsDropped).toBe(1);
    // When the rest is over one lookup tries, alone; it too is late, and the rest is longer.
    await until(async () => {
      await Promise.all([rig.get("a"), rig.get("a")]);
      return rig.store.stats().missesLate > 3;
    });
    expect(rig.store.stats()).toMatchObject({ missesLate: 4, resting: true });
    server.resume();
    await until(async () => (await rig.get("a")).answer !== undefined);
    expect(rig.store.stats().resting).toBe(false);
    expect((await rig.get("a")).answer).toEqual(answer);
  });

  it("says so when the eviction policy does not suit a cache, and again only when it changes", async () => {
    const server = await redis(["--maxmemory-policy", "noeviction"]);
    const rig = await StoreRig.ready(server);
    await until(() => rig.store.stats().policyOk !== undefined);
    expect(rig.store.stats().policyOk).toBe(false);
    const told = (): string[] => rig.logged.filter((line) => line.includes("maxmemory-policy"));
    expect(told().length).toBe(1);
    expect(told()[0]).toContain('"policy":"noeviction"');
  });

  it("says nothing of a policy that suits, and watches memory and latency", async () => {
    const rig = await StoreRig.ready(
      await redis(["--maxmemory-policy", "allkeys-lru", "--maxmemory", "64mb"]),
    );
    await until(() => rig.store.stats().policyOk !== undefined);
    const stats = rig.store.stats();
    expect(stats).toMatchObject({ policyOk: true, maxMemoryBytes: 64 << 20 });
    expect(stats.usedMemoryBytes).toBeGreaterThan(100_000);
    expect(stats.latencyMs).toBeGreaterThan(0);
    expect(rig.logged).toEqual(["Redis is connected"]);
  });

  it("counts what a full Redis refuses, and goes on", async () => {
    const server = await redis(["--maxmemory-policy", "noeviction", "--maxmemory", "2mb"]);
    const rig = await StoreRig.ready(server);
    const big = { ...answer, body: Buffer.alloc(2 << 20), bytes: 2 << 20 };
    await rig.put("big", "acme", 60_000, big);
    await rig.put("next", "acme", 60_000, big);
    expect(rig.store.stats().putsFailed).toBeGreaterThan(0);
    expect(await rig.get("next")).toEqual({ ttlMs: 0 });
  });

  it("uses a password, and is away with a wrong one", async () => {
    const server = await redis(["--requirepass", "secret"]);
    const right = await StoreRig.ready({
      url: server.url,
      tls: false,
      keyPrefix: "h:",
      password: "secret",
    });
    await right.put("a");
    expect((await right.get("a")).answer).toEqual(answer);
    const wrong = await StoreRig.open({
      url: server.url,
      tls: false,
      keyPrefix: "h:",
      password: "wrong",
    });
    await delay(100);
    expect((await wrong.get("a")).answer).toBeUndefined();
    await wrong.put("a");
    expect(wrong.store.stats().puts).toBe(0);
  });

  it("works with a cluster of masters, purge included", async () => {
    const nodes = [await cluster(), await cluster()];
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
    const rig = await StoreRig.ready({
      clusterNodes: [`127.0.0.1:${one}`],
      tls: false,
      keyPrefix: "headrace:",
    });
    for (let i = 0; i < 40; i++) await rig.put(`k${i}`);
    for (let i = 0; i < 40; i++) expect((await rig.get(`k${i}`)).answer).toEqual(answer);
    const sizes = await Promise.all(nodes.map((node) => node.command("DBSIZE")));
    for (const size of sizes) expect(size).not.toContain(":0");
    expect(await rig.purge("acme")).toEqual({ removed: 40 });
    await until(() => rig.store.stats().usedMemoryBytes !== undefined);
  });

  async function cluster(): Promise<RedisServer> {
    return redis(["--cluster-enabled", "yes", "--maxmemory-policy", "allkeys-lru"]);
  }

  it("finds its master through a sentinel", async () => {
    const master = await redis();
    const sentinel = await startRedis({ sentinelOf: master.port });
    cleanups.push(() => sentinel.stop());
    const rig = await StoreRig.ready({
      sentinels: [`127.0.0.1:${sentinel.port}`],
      sentinelMaster: "main",
      tls: false,
      keyPrefix: "headrace:",
    });
    await rig.put("a");
    expect((await rig.get("a")).answer).toEqual(answer);
    expect(await master.command("DBSIZE")).toContain(":1");
  });

  it("leaves no connection after close, and closes twice", async () => {
    const server = await redis();
    const rig = await StoreRig.ready(server);
    await rig.put("a");
    await Promise.all([rig.store.close(), rig.store.close()]);
    await until(async () =>
      (await server.command("INFO", "clients")).includes("connected_clients:1"),
    );
    expect(rig.logged.filter((line) => line.startsWith("Redis is away"))).toEqual([]);
  });

  it("closes while Redis hangs, and while it is away", async () => {
    const server = await redis();
    const hanging = await StoreRig.ready(server);
    server.pause();
    await hanging.store.close();
    server.resume();
    await server.kill();
    const away = await StoreRig.open(server);
    await away.store.close();
    await until(() => !hanging.store.stats().connected);
  });
});

describe("stored values", () => {
  const anyAnswer = fc.record({
    body: fc.uint8Array({ maxLength: 200 }),
    route: fc.constantFrom("chat" as const, "completions" as const, "embeddings" as const),
    model: fc.string({ unit: "grapheme" }),
    promptTokens: fc.nat(0xffff_ffff),
    outputTokens: fc.nat(0xffff_ffff),
  });

  it("come back as they were", () => {
    fc.assert(
      fc.property(anyAnswer, (fields) => {
        const stored = { ...fields, bytes: fields.body.length };
        const back = decodeAnswer(encodeAnswer(stored));
        expect(back && { ...back, body: [...back.body] }).toEqual({
          ...stored,
          body: [...stored.body],
        });
      }),
    );
  });

  it("are refused when any byte is changed or lost", () => {
    fc.assert(
      fc.property(anyAnswer, fc.nat(), fc.integer({ min: 1, max: 255 }), (fields, at, by) => {
        const value = encodeAnswer({ ...fields, bytes: fields.body.length });
        const place = at % value.length;
        const changed = Buffer.from(value);
        changed[place] = (changed[place] ?? 0) ^ by;
        expect(decodeAnswer(changed)).toBeNull();
        expect(decodeAnswer(value.subarray(0, place))).toBeNull();
        expect(decodeAnswer(Buffer.concat([value, Buffer.from([by])]))).toBeNull();
      }),
    );
  });

  it("of any other bytes are refused", () => {
    fc.assert(fc.property(fc.uint8Array(), (bytes) => decodeAnswer(bytes) === null));
  });
});
