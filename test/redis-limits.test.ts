/** Limits kept in a real Redis: the same as the pure ones, and that Redis can do no harm. */
import { setTimeout as delay } from "node:timers/promises";
import fc from "fast-check";
import { afterEach, describe, expect, it } from "vitest";
import type { LimitCharge, LimitStoreCommand, LimitStoreReply } from "../actors/edges.ts";
import { Gcra } from "../actors/gcra.ts";
import type { Limits } from "../actors/protocol.ts";
import type { Actor, Context } from "../runtime/actor.ts";
import { openRedisLimits, type RedisLimits } from "../transport/redis-limits.ts";
import { type RedisServer, redisAvailable, startRedis } from "./redis-server.ts";

fc.configureGlobal({ seed: 20_260_114 });

const MINUTE_MS = 60_000;
const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

/** One peer's edge. */
class Rig {
  readonly limits: RedisLimits;
  readonly server: RedisServer;
  readonly #edge: Actor<LimitStoreCommand>;
  readonly #waiting = new Map<number, (reply: LimitStoreReply) => void>();
  #asks = 0;

  constructor(limits: RedisLimits, server: RedisServer) {
    this.limits = limits;
    this.server = server;
    this.#edge = limits.edge((to, value) => {
      const resolve = this.#waiting.get(to.askId);
      if (resolve === undefined) throw new Error("a second reply to one ask");
      this.#waiting.delete(to.askId);
      resolve(value as LimitStoreReply);
    });
  }

  static async open(server: RedisServer, timeoutMs = 5000): Promise<Rig> {
    const redis = { url: server.url, tls: false, keyPrefix: "headrace:" };
    const limits = await openRedisLimits({ redis, timeoutMs });
    cleanups.push(() => limits.close());
    const rig = new Rig(limits, server);
    await until(() => limits.stats().connected);
    return rig;
  }

  charge(
    limits: Limits,
    tokens: number,
    more: { key?: string; requestId?: string; expiresInMs?: number } = {},
  ): Promise<LimitStoreReply> {
    const { key = "k", requestId = `r${this.#asks}`, expiresInMs = 60_000 } = more;
    const askId = ++this.#asks;
    return new Promise((resolve) => {
      this.#waiting.set(askId, resolve);
      const replyTo = { asker: "limits", askId };
      this.#send({
        ...{ kind: "limits.charge", key, limits, requestId, tokens, expiresInMs, replyTo },
      } as LimitStoreCommand);
    });
  }

  correct(
    limits: Limits,
    charge: LimitCharge,
    usedTokens: number,
    more: { key?: string; requestId?: string; refund?: boolean } = {},
  ): void {
    const { key = "k", requestId = "r0", refund = false } = more;
    this.#send({ kind: "limits.correct", key, limits, requestId, charge, usedTokens, refund });
  }

  #send(command: LimitStoreCommand): void {
    this.#edge.receive(command, undefined as never as Context<LimitStoreCommand>);
  }

  /** As if so much time had passed for every key. */
  async pass(ms: number): Promise<void> {
    const script = `
      for _, name in ipairs(redis.call('KEYS', '*limit:*}')) do
        for _, field in ipairs({'rb', 'tb', 'de'}) do
          if redis.call('HEXISTS', name, field) == 1 and redis.call('HGET', name, field) ~= '0' then
            redis.call('HINCRBY', name, field, -${ms})
          end
        end
        if redis.call('EXISTS', name .. ':open') == 1 then
          local all = redis.call('ZRANGE', name .. ':open', 0, -1, 'WITHSCORES')
          for i = 1, #all, 2 do redis.call('ZADD', name .. ':open', all[i+1] - ${ms}, all[i]) end
        end
      end`;
    expect(await this.server.command("EVAL", script, "0")).not.toContain("ERR");
  }
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await delay(5);
}

async function redis(): Promise<RedisServer> {
  const server = await startRedis();
  cleanups.push(() => server.stop());
  return server;
}

const codeOf = (reply: LimitStoreReply): string =>
  reply.kind === "refused" ? reply.code : reply.kind;
const chargeOf = (reply: LimitStoreReply): LimitCharge => {
  if (reply.kind !== "granted") throw new Error(`${codeOf(reply)}, where it should be granted`);
  return reply.charge;
};

describe.skipIf(!redisAvailable)("redis limits", () => {
  it("redis limits: charges, refuses, waits and remains just as actors/gcra.ts (any limits, gaps and costs)", async () => {
    const rig = await Rig.open(await redis());
    const shareTo = (max: number) => fc.integer({ min: 0, max: max * 100 }).map((n) => n / 100);
    const rate = fc.oneof(
      fc.constantFrom(1, 7, 60, 100, 6000),
      fc.integer({ min: 1, max: 1_000_000_000 }),
    );
    const burst = fc.oneof(fc.integer({ min: 1, max: 500 }), fc.integer({ min: 1, max: 1e9 }));
    const step = fc.record({
      op: fc.constantFrom("charge", "charge", "correct", "refund"),
      passMs: fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 90_000 }), fc.constant(1e9)),
      share: shareTo(1.2),
    });
    let runs = 0;
    let compared = 0;
    let exact = 0;
    await fc.assert(
      fc.asyncProperty(
        rate,
        burst,
        rate,
        burst,
        fc.array(step, { minLength: 1, maxLength: 25, size: "max" }),
        async (requestsPerMinute, requestBurst, tokensPerMinute, tokenBurst, steps) => {
          const key = `key ${runs++}`;
          const limits = { requestsPerMinute, requestBurst, tokensPerMinute, tokenBurst };
          const twin = (): { requests: Gcra; tokens: Gcra } => ({
            requests: new Gcra(requestsPerMinute, MINUTE_MS, requestBurst),
            tokens: new Gcra(tokensPerMinute, MINUTE_MS, tokenBurst),
          });
          // A correction says not when it was made, only between which instants. So there are two twins, corrected at
          // the one and at the other: Redis lies between them, which for charges alone means that it is the same.
          const [early, late] = [twin(), twin()];
          const held: LimitCharge[] = [];
          let originMs: number | undefined;
          let passedMs = 0;
          const now = async (): Promise<number> =>
            instant(await rig.charge(limits, 1e15, { key }), originMs ?? 0, passedMs);
          // The first charge makes the key; its base is the whole ms of that moment.
          for (const step of [{ op: "charge", passMs: 0, share: 0 }, ...steps]) {
            const { op, share } = step;
            // Beyond 40 days the twins' ms, as doubles, do not hold a ns any more.
            const passMs = passedMs + step.passMs > 3.5e9 ? 0 : step.passMs;
            if (passMs > 0) await rig.pass(passMs);
            passedMs += passMs;
            if (op !== "charge") {
              const charge = held.shift();
              if (charge === undefined) continue;
              const refund = op === "refund";
              const used = refund ? 0 : Math.round(share * charge.tokens);
              const beforeMs = await now();
              rig.correct(limits, charge, used, { key, refund });
              const afterMs = await now();
              for (const [{ requests, tokens }, atMs] of [
                [early, beforeMs],
                [late, afterMs],
              ] as const) {
                if (refund) requests.settle(charge.requestNs, 0, atMs);
                tokens.settle(charge.tokensNs, used, atMs);
              }
              continue;
            }
            const cost = Math.round(share * early.tokens.burst);
            const reply = await rig.charge(limits, cost, { key });
            if (reply.kind === "away") throw new Error("it is there");
            originMs ??= Math.floor(reply.state.atMs);
            const nowMs = instant(reply, originMs, passedMs);
            const [first, last] = [early, late].map(({ requests, tokens }) => {
              const requestMs = requests.waitMs(1, nowMs);
              const tokenMs = tokens.waitMs(cost, nowMs);
              if (cost > tokens.burst) return { code: "request_too_large_for_limit", waitMs: 0 };
              if (requestMs > 0) return { code: "rate_limit_requests", waitMs: requestMs };
              if (tokenMs > 0) return { code: "rate_limit_tokens", waitMs: tokenMs };
              return { code: "granted", waitMs: 0 };
            });
            if (first === undefined || last === undefined) return;
            compared++;
            if (first.code !== last.code) {
              expect([first.code, last.code]).toContain(codeOf(reply));
              return; // It lies between them: from here on either may be right.
            }
            expect(codeOf(reply)).toBe(first.code);
            if (reply.kind === "refused") between(reply.retryAfterMs, first.waitMs, last.waitMs);
            if (reply.kind === "granted") {
              for (const { requests, tokens } of [early, late]) {
                requests.reserve(1, nowMs);
                tokens.reserve(cost, nowMs);
              }
              expect(reply.charge.requestNs).toBe(early.requests.spanNs(1));
              expect(reply.charge.tokensNs).toBe(early.tokens.spanNs(cost));
              held.push(reply.charge);
            }
            for (const name of ["requests", "tokens"] as const) {
              const part = reply.state[name];
              const [one, other] = [early[name], late[name]];
              between(part?.remaining, other.remaining(nowMs), one.remaining(nowMs));
              between(part?.resetMs, one.resetMs(nowMs), other.resetMs(nowMs));
              if (one.resetMs(nowMs) === other.resetMs(nowMs)) exact++;
            }
          }
        },
      ),
      { numRuns: 60 },
    );
    expect(compared).toBeGreaterThan(300);
    expect(exact).toBeGreaterThan(compared); // Of two allowances at each.
  }, 60_000);

  it("redis limits: a key unused for a year is whole, and exact to the ns", async () => {
    const rig = await Rig.open(await redis());
    // 60 s / 11 is no multiple of 4 ns, which is as fine as a double gets after a year.
    const limits = {
      requestsPerMinute: 11,
      requestBurst: 2,
      tokensPerMinute: 11,
      tokenBurst: 1000,
    };
    await rig.charge(limits, 1000);
    await rig.server.command(
      "PERSIST",
      /headrace:\S+/.exec(await rig.server.command("KEYS", "*"))?.[0] ?? "",
    );
    await rig.pass(31_536_000_001);
    const { state } = (await rig.charge(limits, 1)) as Extract<
      LimitStoreReply,
      { kind: "granted" }
    >;
    for (const [part, burst] of [
      [state.requests, 2],
      [state.tokens, 1000],
    ] as const) {
      const fresh = new Gcra(11, MINUTE_MS, burst);
      fresh.reserve(1, 0);
      expect(part).toEqual({ limit: 11, remaining: fresh.remaining(0), resetMs: 5454.545455 });
    }
  });

  it("redis limits: four peers at once are granted what one would be, to the request", async () => {
    const server = await redis();
    const rigs = await Promise.all([1, 2, 3, 4].map(() => Rig.open(server)));
    const limits = { requestsPerMinute: 6000, requestBurst: 100 };
    let granted = 0;
    let firstMs = Number.POSITIVE_INFINITY;
    let lastMs = 0;
    for (let round = 0; round < 20; round++) {
      const asked = rigs.flatMap((rig) => Array.from({ length: 10 }, () => rig.charge(limits, 0)));
      for (const reply of await Promise.all(asked)) {
        if (reply.kind === "away") throw new Error("it is there");
        if (reply.kind === "granted") granted++;
        firstMs = Math.min(firstMs, reply.state.atMs);
        lastMs = Math.max(lastMs, reply.state.atMs);
      }
    }
    // R·t + b, by Redis' own clock: one less where the last unit was not whole yet.
    const most = Math.floor(100 + ((lastMs - firstMs) * 100) / 1000);
    expect(granted).toBeLessThanOrEqual(most);
    expect(granted).toBeGreaterThanOrEqual(most - 1);
  });

  it("redis limits: the first limit that fails is named, in the limiter's order, and nothing is charged", async () => {
    const rig = await Rig.open(await redis());
    const all = {
      requestsPerMinute: 60,
      requestBurst: 3,
      tokensPerMinute: 60,
      tokenBurst: 100,
      concurrent: 2,
      concurrentTokens: 60,
      tokensPerDay: 90,
    };
    expect(codeOf(await rig.charge(all, 61))).toBe("request_too_large_for_limit");
    expect(codeOf(await rig.charge({ ...all, tokensPerDay: 50 }, 51))).toBe(
      "request_too_large_for_limit",
    );
    expect(codeOf(await rig.charge(all, 40))).toBe("granted");
    expect(codeOf(await rig.charge(all, 30))).toBe("rate_limit_concurrent_tokens");
    expect(codeOf(await rig.charge(all, 10))).toBe("granted");
    expect(codeOf(await rig.charge(all, 1))).toBe("rate_limit_concurrency");
    expect(codeOf(await rig.charge({ ...all, concurrent: 9 }, 10))).toBe("granted");
    expect(codeOf(await rig.charge({ ...all, concurrent: 9 }, 1))).toBe("rate_limit_requests");
    await rig.pass(1000);
    const { concurrent, concurrentTokens, ...rates } = all;
    expect(codeOf(await rig.charge(rates, 31))).toBe("quota_tokens_per_day");
    expect(codeOf(await rig.charge({ ...rates, tokensPerDay: 200, tokenBurst: 61 }, 61))).toBe(
      "rate_limit_tokens",
    );
    // 24 hours after the day's first use.
    await rig.pass(86_400_000);
    expect(codeOf(await rig.charge(rates, 90))).toBe("granted");
    expect(codeOf(await rig.charge(rates, 1))).toBe("quota_tokens_per_day");
  });

  it("redis limits: a place in flight is free after settling, or once it has lapsed", async () => {
    const rig = await Rig.open(await redis());
    const limits = { concurrent: 2, concurrentTokens: 100, tokensPerDay: 1000 };
    const first = await rig.charge(limits, 50, { requestId: "a b" });
    await rig.charge(limits, 50, { requestId: "c", expiresInMs: 5000 });
    const full = await rig.charge(limits, 0, { requestId: "d" });
    expect(full).toMatchObject({ code: "rate_limit_concurrency", retryAfterMs: 1000 });
    rig.correct(limits, chargeOf(first), 20, { requestId: "a b" });
    rig.correct(limits, chargeOf(first), 20, { requestId: "a b" }); // Told twice: the place is free once.
    expect(codeOf(await rig.charge(limits, 51, { requestId: "d" }))).toBe(
      "rate_limit_concurrent_tokens",
    );
    expect(codeOf(await rig.charge(limits, 50, { requestId: "d" }))).toBe("granted");
    expect(codeOf(await rig.charge(limits, 0, { requestId: "e" }))).toBe("rate_limit_concurrency");
    await rig.pass(5000);
    expect(codeOf(await rig.charge(limits, 50, { requestId: "e" }))).toBe("granted");
    await rig.pass(60_000);
    expect(codeOf(await rig.charge(limits, 100, { requestId: "f" }))).toBe("granted");
  });

  it("redis limits: keeps to its prefix, hides keys' names, and leaves nothing for ever", async () => {
    const rig = await Rig.open(await redis());
    await rig.charge({ requestsPerMinute: 60, concurrent: 5 }, 0, { key: "secret of acme" });
    const keys = await rig.server.command("KEYS", "*");
    expect(keys).toMatch(/headrace:v1:limit:\{[0-9a-f]{32}\}:open/);
    expect(keys).not.toContain("acme");
    const names = keys.match(/headrace:\S+/g) ?? [];
    expect(names).toHaveLength(2);
    for (const name of names) {
      const ttlMs = Number((await rig.server.command("PTTL", name)).slice(1));
      expect(ttlMs).toBeGreaterThan(60_000);
      expect(ttlMs).toBeLessThanOrEqual(121_000);
    }
  });

  it("redis limits: away while there is no Redis, and there again after it", async () => {
    const server = await redis();
    const rig = await Rig.open(server);
    await server.kill();
    await until(() => !rig.limits.stats().connected);
    expect(codeOf(await rig.charge({ requestsPerMinute: 60 }, 0))).toBe("away");
    const again = await startRedis({ port: server.port });
    cleanups.push(() => again.stop());
    await until(() => rig.limits.stats().connected);
    expect(codeOf(await rig.charge({ requestsPerMinute: 60 }, 0))).toBe("granted");
  });

  it("redis limits: away in time when Redis hangs, and what it grants then is given back", async () => {
    const server = await redis();
    const rig = await Rig.open(server, 50);
    const limits = { requestsPerMinute: 60, requestBurst: 5, concurrent: 5 };
    await rig.charge(limits, 0, { requestId: "a" });
    server.pause();
    expect(codeOf(await rig.charge(limits, 0, { requestId: "b" }))).toBe("away");
    expect(rig.limits.stats()).toMatchObject({ late: 1 });
    server.resume();
    let left = 0;
    while (left < 4) {
      const reply = await rig.charge({ ...limits, concurrent: 1 }, 0, { requestId: "c" });
      if (reply.kind === "refused") left = reply.state.requests?.remaining ?? 0;
      await delay(5);
    }
    // One place is taken: that of "a".
    expect(codeOf(await rig.charge({ ...limits, concurrent: 2 }, 0, { requestId: "d" }))).toBe(
      "granted",
    );
  });

  it("redis limits: another program's value under its name does no harm", async () => {
    const rig = await Rig.open(await redis());
    await rig.charge({ requestsPerMinute: 60 }, 0);
    const name = /headrace:\S+/.exec(await rig.server.command("KEYS", "*"))?.[0] ?? "";
    await rig.server.command("DEL", name);
    await rig.server.command("SET", name, "hello");
    expect(codeOf(await rig.charge({ requestsPerMinute: 60 }, 0))).toBe("away");
    expect(rig.limits.stats()).toMatchObject({ failed: 1 });
  });
});

/** On the scale of the twin: from the key's base on, with what was made to pass. */
function instant(reply: LimitStoreReply, originMs: number, passedMs: number): number {
  if (reply.kind === "away") throw new Error("it is there");
  const us = Math.round(reply.state.atMs * 1000) - originMs * 1000;
  return (us + passedMs * 1000) / 1000;
}

function between(value: number | undefined, least: number, most: number): void {
  expect(value).toBeGreaterThanOrEqual(least);
  expect(value).toBeLessThanOrEqual(most);
}
