/** The table of leases in a real Redis. Its rules on time are tried by moving what it has kept, not by waiting. */
import { setTimeout as delay } from "node:timers/promises";
import { afterEach, describe, expect, it } from "vitest";
import type { TableCommand } from "../actors/members.ts";
import type { Member, TableSnapshot } from "../actors/membership.ts";
import type { Actor, Context } from "../runtime/actor.ts";
import {
  type MemberTable,
  memberTableDefaults,
  openMemberTable,
} from "../transport/member-table.ts";
import { type RedisServer, redisAvailable, startRedis } from "./redis-server.ts";

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

const memberOf = (id: string, incarnation = 1): Member => ({
  ...{ id, incarnation, address: `ws://${id}:7946`, version: "0.1.0" },
});

/** One peer's side of the table. */
class Rig {
  readonly id: string;
  readonly reads: { snapshot: TableSnapshot; askedAgoMs: number }[] = [];
  readonly logged: string[] = [];
  readonly table: MemberTable;
  readonly #edge: Actor<TableCommand>;

  private constructor(id: string, make: (rig: Rig) => MemberTable) {
    this.id = id;
    this.table = make(this);
    this.#edge = this.table.edge();
  }

  static async open(id: string, server: RedisServer, renewMs = 60_000): Promise<Rig> {
    const redis = { url: server.url, tls: false, keyPrefix: "headrace:" };
    let rig: Rig | undefined;
    const table = await openMemberTable(
      { ...memberTableDefaults, renewMs, redis },
      (snapshot, askedAgoMs) => rig?.reads.push({ snapshot, askedAgoMs }),
      {
        info: (_: object, text: string) => void rig?.logged.push(text),
        warn: (_: object, text: string) => void rig?.logged.push(text),
      },
    );
    rig = new Rig(id, () => table);
    cleanups.push(() => table.close());
    await until(() => table.stats().connected);
    return rig;
  }

  send(command: TableCommand): void {
    this.#edge.receive(command, undefined as never as Context<TableCommand>);
  }

  keep(epoch = 0, incarnation = 1): void {
    this.send({ kind: "table.keep", member: memberOf(this.id, incarnation), epoch });
  }

  get last(): TableSnapshot | undefined {
    return this.reads.at(-1)?.snapshot;
  }

  ids(): string[] {
    return (this.last?.members ?? []).map(({ id }) => id).sort();
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

/** As if so much time had passed, in which others went on renewing (`isTouched`) or nobody did. */
async function pass(
  server: RedisServer,
  ms: number,
  isTouched: boolean,
  but: string[] = [],
): Promise<void> {
  const kept = but.map((id) => `other ~= '${id}'`).join(" and ") || "true";
  const script = `
    local all = redis.call('ZRANGE', 'headrace:v1:{members}:leases', 0, -1, 'WITHSCORES')
    for i = 1, #all, 2 do
      local other = all[i]
      if ${kept} then
        redis.call('ZADD', 'headrace:v1:{members}:leases', string.format('%.0f', all[i+1] - ${ms}), other)
      end
    end
    local fields = ${isTouched ? "{'since'}" : "{'since', 'touched'}"}
    for _, field in ipairs(fields) do redis.call('HINCRBY', 'headrace:v1:{members}:meta', field, -${ms}) end`;
  expect(await server.command("EVAL", script, "0")).not.toContain("ERR");
}

describe.skipIf(!redisAvailable)("member table", () => {
  it("member table: a join is seen by all at once, and adds one to the epoch; a renewal does not", async () => {
    const server = await redis();
    const [a, b] = [await Rig.open("a", server), await Rig.open("b", server)];
    a.keep();
    await until(() => a.ids().join() === "a");
    expect(a.last?.epoch).toBe(1);
    expect(a.last?.members).toEqual([memberOf("a")]);
    b.keep();
    await until(() => a.ids().join() === "a,b" && b.ids().join() === "a,b");
    expect(a.last?.epoch).toBe(2);
    const again = await Rig.open("a", server, 20);
    again.keep();
    await until(() => again.reads.length > 5);
    expect(again.last?.epoch).toBe(2);
    for (const { askedAgoMs } of again.reads) expect(askedAgoMs).toBeGreaterThan(0);
  });

  it("member table: a higher incarnation replaces a lower one, and is not replaced by it", async () => {
    const server = await redis();
    const [first, second] = [await Rig.open("a", server), await Rig.open("a", server)];
    first.keep(0, 5);
    await until(() => first.ids().join() === "a");
    second.keep(0, 6);
    await until(() => first.last?.members[0]?.incarnation === 6);
    expect(first.last?.epoch).toBe(2);
    first.keep(0, 4);
    await until(() => first.reads.length >= 3);
    expect(first.last?.members).toEqual([memberOf("a", 6)]);
    first.send({ kind: "table.leave", id: "a", incarnation: 5 });
    second.keep(0, 7);
    await until(() => second.last?.members[0]?.incarnation === 7);
  });

  it("member table: who leaves is gone at once for all", async () => {
    const server = await redis();
    const [a, b] = [await Rig.open("a", server), await Rig.open("b", server)];
    a.keep();
    b.keep();
    await until(() => a.ids().join() === "a,b");
    b.send({ kind: "table.leave", id: "b", incarnation: 1 });
    await until(() => a.ids().join() === "a");
    expect(a.last?.epoch).toBe(3);
    // What was left is renewed no more.
    await b.table.close();
    expect(await server.command("HKEYS", "headrace:v1:{members}:who")).not.toContain("\r\nb\r\n");
  });

  it("member table: a lease runs out after 6 s without renewal", async () => {
    const server = await redis();
    const [a, b] = [await Rig.open("a", server), await Rig.open("b", server)];
    a.keep();
    b.keep();
    await until(() => a.ids().join() === "a,b");
    await b.table.close();
    await pass(server, 5000, true, ["a"]);
    a.keep(0, 2);
    await until(() => a.last?.members.some(({ incarnation }) => incarnation === 2) === true);
    expect(a.ids()).toEqual(["a", "b"]);
    await pass(server, 1001, true, ["a"]);
    a.keep(0, 3);
    await until(() => a.ids().join() === "a");
    expect(a.last?.ageMs).toBeGreaterThan(6000);
  });

  it("member table: a lease is ended on request if it was not renewed for 2.5 s, and not before", async () => {
    const server = await redis();
    const [a, b] = [await Rig.open("a", server), await Rig.open("b", server)];
    a.keep();
    b.keep();
    await until(() => a.ids().join() === "a,b");
    await b.table.close();
    a.send({ kind: "table.evict", id: "b", incarnation: 1 });
    a.keep(0, 2);
    await until(() => a.last?.members.some(({ incarnation }) => incarnation === 2) === true);
    expect(a.ids()).toEqual(["a", "b"]);
    await pass(server, 2500, true, ["a"]);
    a.send({ kind: "table.evict", id: "b", incarnation: 7 });
    a.keep(0, 3);
    await until(() => a.last?.members.some(({ incarnation }) => incarnation === 3) === true);
    expect(a.ids()).toEqual(["a", "b"]);
    a.send({ kind: "table.evict", id: "b", incarnation: 1 });
    await until(() => a.ids().join() === "a");
    expect(a.last?.epoch).toBe(5);
  });

  it("member table: one that nobody reached for half a lease blames nobody, and counts as new", async () => {
    const server = await redis();
    const [a, b] = [await Rig.open("a", server), await Rig.open("b", server)];
    a.keep();
    b.keep();
    await until(() => a.ids().join() === "a,b");
    await pass(server, 60_000, false);
    a.keep(0, 2);
    await until(() => a.last?.members.some(({ incarnation }) => incarnation === 2) === true);
    expect(a.ids()).toEqual(["a", "b"]);
    expect(a.last?.ageMs).toBeLessThan(6000);
  });

  it("member table: lost with Redis, it begins above the epochs that peers have seen, and they say so once", async () => {
    const server = await redis();
    const a = await Rig.open("a", server, 20);
    a.keep(41);
    await until(() => a.ids().join() === "a");
    expect(a.last?.epoch).toBe(42);
    a.keep(42);
    await server.kill();
    await until(() => a.table.stats().failures > 2);
    expect(a.logged).toEqual(["the table of members cannot be renewed: Redis is away"]);
    const again = await startRedis({ port: server.port });
    cleanups.push(() => again.stop());
    const before = a.reads.length;
    await until(() => a.reads.length > before);
    expect(a.last?.epoch).toBe(43);
    expect(a.last?.ageMs).toBeLessThan(6000);
    expect(a.logged.at(-1)).toBe("the table of members is renewed again");
  });

  it("member table: what another program wrote there is left out, and said", async () => {
    const server = await redis();
    const a = await Rig.open("a", server, 20);
    await server.command("HSET", "headrace:v1:{members}:who", "x", "hello");
    a.keep();
    await until(() => a.table.stats().malformed > 2);
    expect(a.ids()).toEqual(["a"]);
    expect(a.logged).toEqual(["the table of members holds what is no member: left out"]);
  });
});
