/**
 * The table of leases in Redis: who is a member, by one script and Redis' own clock.
 *
 * Every peer renews its lease every 2 s for 6 s, and whenever the table says that it has changed; each renewal returns
 * the whole table. A join, a leave, a lease that ran out or was ended adds one to the epoch and is published. Whoever
 * sees no sign of life of a member asks for its lease to be ended; that is done if it was not renewed for 2.5 s either.
 *
 * Keys, all in one slot: `<prefix>v1:{members}:who` (hash: id → member as JSON), `…:leases` (sorted set: id by expiry,
 * ms), `…:meta` (hash: epoch; since: when this table began; touched: its last use). Channel: `<prefix>v1:members`.
 *
 * - A table that nobody touched for half a lease was out of reach, for all: nobody is to be blamed, all leases begin
 *   anew, and it counts as new. So does one whose clock went back. Readers take nobody for gone in a table that is younger
 *   than a lease.
 * - The epoch never falls behind what a peer has seen, should Redis have lost it.
 * - Redis away or hanging: renewals fail, and go on being tried; membership goes by how long ago the last one succeeded.
 * - A failover may lose a renewal or a join; the next renewal makes it good. Nothing relies on a lease for safety.
 */
import type { TableCommand } from "../actors/members.ts";
import {
  type Member,
  membershipDefaults,
  parseMember,
  type TableSnapshot,
} from "../actors/membership.ts";
import { type Actor, unreachable } from "../runtime/actor.ts";
import type { Log } from "./log.ts";
import { connectRedis, type RedisClient, type RedisPlace, RedisScript } from "./redis-link.ts";

export type MemberTableOptions = {
  redis: RedisPlace;
  /** How long a lease lasts without renewal; membership must know the same. */
  leaseMs: number;
  renewMs: number;
  /** A lease renewed within that time is not ended on request. */
  evictMs: number;
};

export const memberTableDefaults: Readonly<Omit<MemberTableOptions, "redis">> = {
  leaseMs: membershipDefaults.leaseMs,
  renewMs: 2000,
  evictMs: membershipDefaults.removeMs,
};

/** Told of every reading; `askedAgoMs`: since it was asked for. */
export type OnTableRead = (snapshot: TableSnapshot, askedAgoMs: number) => void;

/** Counts since the start. */
export type MemberTableStats = {
  connected: boolean;
  renewals: number;
  failures: number;
  /** Readings with something in them that no peer wrote. */
  malformed: number;
  announcements: number;
};

const SCRIPT = new RedisScript(`
local op, id, incarnation, leaseMs = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function whole(n) return string.format('%.0f', n) end
local meta = redis.call('HMGET', KEYS[3], 'epoch', 'since', 'touched')
local epoch, since = tonumber(meta[1] or 0), tonumber(meta[2] or now)
local touched = tonumber(meta[3] or 0)
local hasChanged = false

if now - touched > leaseMs / 2 or touched > now then
  since = now
  for _, other in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    redis.call('ZADD', KEYS[2], whole(now + leaseMs), other)
  end
end

local function drop(other)
  redis.call('ZREM', KEYS[2], other)
  if redis.call('HDEL', KEYS[1], other) == 1 then hasChanged = true end
end
for _, other in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', whole(now))) do drop(other) end

local kept = redis.call('HGET', KEYS[1], id)
local there = 0
if kept then there = cjson.decode(kept).incarnation end
if op == 'renew' then
  epoch = math.max(epoch, tonumber(ARGV[6]))
  if incarnation >= there then
    if kept ~= ARGV[5] then
      redis.call('HSET', KEYS[1], id, ARGV[5])
      hasChanged = true
    end
    redis.call('ZADD', KEYS[2], whole(now + leaseMs), id)
  end
elseif kept and incarnation == there then
  local renewed = tonumber(redis.call('ZSCORE', KEYS[2], id) or 0) - leaseMs
  if op == 'leave' or now - renewed >= tonumber(ARGV[5]) then drop(id) end
end

if hasChanged then epoch = epoch + 1 end
redis.call('HSET', KEYS[3], 'epoch', whole(epoch), 'since', whole(since), 'touched', whole(now))
if hasChanged then redis.call('PUBLISH', ARGV[7], whole(epoch)) end
local reply = { whole(epoch), whole(now - since) }
for _, member in ipairs(redis.call('HVALS', KEYS[1])) do reply[#reply + 1] = member end
return reply
`);

/** Starts connecting and returns; it renews once it is told what to keep, and until it is closed. */
export async function openMemberTable(
  options: MemberTableOptions,
  onRead: OnTableRead,
  log: Pick<Log, "info" | "warn">,
): Promise<MemberTable> {
  const [client, subscriber] = [
    await connectRedis(options.redis),
    await connectRedis(options.redis),
  ];
  return new MemberTable(client, subscriber, options, onRead, log);
}

/** Two connections: one for the script, one that hears of changes. */
export class MemberTable {
  readonly #client: RedisClient;
  readonly #subscriber: RedisClient;
  readonly #options: MemberTableOptions;
  readonly #onRead: OnTableRead;
  readonly #log: Pick<Log, "info" | "warn">;
  readonly #counts = { renewals: 0, failures: 0, malformed: 0, announcements: 0 };
  #connected = false;
  #isFailing = false;
  /** What is renewed; null: nothing yet, or no more. */
  #kept: { member: Member; epoch: number } | null = null;
  #timer: NodeJS.Timeout | null = null;
  #isRenewing = false;
  /** Renew once more when the present renewal is done. */
  #isAnnounced = false;
  #pending: Promise<unknown> = Promise.resolve();
  #isClosed = false;

  constructor(
    client: RedisClient,
    subscriber: RedisClient,
    options: MemberTableOptions,
    onRead: OnTableRead,
    log: Pick<Log, "info" | "warn">,
  ) {
    this.#client = client;
    this.#options = options;
    this.#onRead = onRead;
    this.#log = log;
    this.#subscriber = subscriber;
    client.on("ready", () => {
      this.#connected = true;
      this.#renewSoon();
    });
    client.on("close", () => {
      this.#connected = false;
    });
    client.on("error", () => undefined); // A renewal fails, and says so.
    subscriber.on("error", () => undefined);
    subscriber.on("ready", () => {
      subscriber.subscribe(this.#channel()).catch(() => undefined); // Renewals see changes too, later.
    });
    subscriber.on("message", () => {
      this.#counts.announcements++;
      this.#renewSoon();
    });
  }

  /** The actor. */
  edge(): Actor<TableCommand> {
    return {
      receive: (command) => {
        switch (command.kind) {
          case "table.keep":
            return this.#keep(command.member, command.epoch);
          case "table.evict":
            return this.#end("evict", command.id, command.incarnation);
          case "table.leave":
            this.#kept = null;
            return this.#end("leave", command.id, command.incarnation);
          default:
            return unreachable(command);
        }
      },
    };
  }

  stats(): MemberTableStats {
    return { connected: this.#connected, ...this.#counts };
  }

  /** Lets what is under way finish for a moment; leaves no handle. The lease stays, unless it was left. */
  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#isClosed = true;
    if (this.#timer !== null) clearTimeout(this.#timer);
    let late: NodeJS.Timeout | undefined;
    const patience = new Promise((resolve) => {
      late = setTimeout(resolve, 200);
    });
    await Promise.race([this.#pending, patience]);
    clearTimeout(late);
    this.#client.disconnect();
    this.#subscriber.disconnect();
  }

  // ---- renewing ---------------------------------------------------------------------------------------------

  #keep(member: Member, epoch: number): void {
    const before = this.#kept;
    this.#kept = { member, epoch };
    if (before?.member.incarnation !== member.incarnation) this.#renewSoon();
  }

  #renewSoon(): void {
    if (this.#isClosed || this.#kept === null) return;
    if (this.#isRenewing) {
      this.#isAnnounced = true;
      return;
    }
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    this.#pending = this.#renew(this.#kept);
  }

  async #renew({ member, epoch }: { member: Member; epoch: number }): Promise<void> {
    this.#isRenewing = true;
    this.#isAnnounced = false;
    const askedAtMs = performance.now();
    const json = JSON.stringify(member);
    try {
      const reply = await this.#run("renew", member.id, member.incarnation, json, epoch);
      this.#counts.renewals++;
      this.#tell(reply, performance.now() - askedAtMs);
      if (this.#isFailing) this.#log.info({}, "the table of members is renewed again");
      this.#isFailing = false;
    } catch (error) {
      this.#counts.failures++;
      const reason = error instanceof Error ? error.message : "unknown";
      if (!this.#isFailing)
        this.#log.warn({ reason }, "the table of members cannot be renewed: Redis is away");
      this.#isFailing = true;
    }
    this.#isRenewing = false;
    if (this.#isClosed) return;
    if (this.#isAnnounced) return this.#renewSoon();
    this.#timer = setTimeout(() => {
      this.#timer = null;
      this.#renewSoon();
    }, this.#options.renewMs);
  }

  #tell(reply: unknown, askedAgoMs: number): void {
    const { snapshot, wrong } = readTable(reply);
    if (wrong !== undefined) {
      if (this.#counts.malformed === 0)
        this.#log.warn({ reason: wrong }, "the table of members holds what is no member: left out");
      this.#counts.malformed++;
    }
    if (snapshot !== undefined) this.#onRead(snapshot, askedAgoMs);
  }

  #end(op: "evict" | "leave", id: string, incarnation: number): void {
    const { evictMs } = this.#options;
    const run = this.#run(op, id, incarnation, op === "evict" ? evictMs : 0, 0);
    this.#pending = run.then(
      () => undefined,
      () => {
        this.#counts.failures++; // A lease not left, or not ended, runs out.
      },
    );
  }

  #run(
    op: "renew" | "evict" | "leave",
    id: string,
    incarnation: number,
    what: string | number,
    epoch: number,
  ): Promise<unknown> {
    const name = `${this.#options.redis.keyPrefix}v1:{members}`;
    const keys = [`${name}:who`, `${name}:leases`, `${name}:meta`];
    const args = [op, id, incarnation, this.#options.leaseMs, what, epoch, this.#channel()];
    return SCRIPT.run(this.#client, keys, args);
  }

  #channel(): string {
    return `${this.#options.redis.keyPrefix}v1:members`;
  }
}

/** The script's reply and what is wrong with it: a member that is none is left out, a reply that is none is undefined. */
function readTable(reply: unknown): { snapshot?: TableSnapshot; wrong?: string } {
  if (!Array.isArray(reply) || reply.length < 2) return { wrong: "the reply is no list" };
  const [epoch, ageMs] = [Number(reply[0]), Number(reply[1])];
  if (!Number.isSafeInteger(epoch) || epoch < 0 || !Number.isFinite(ageMs))
    return { wrong: "epoch or age is no number" };
  const members: Member[] = [];
  let wrong: string | undefined;
  for (const text of reply.slice(2)) {
    const member = parseMember(parseJson(text));
    if (typeof member === "string") wrong = member;
    else members.push(member);
  }
  const snapshot = { epoch, ageMs, members };
  return wrong === undefined ? { snapshot } : { snapshot, wrong };
}

function parseJson(text: unknown): unknown {
  try {
    return typeof text === "string" ? JSON.parse(text) : undefined;
  } catch {
    return undefined;
  }
}
