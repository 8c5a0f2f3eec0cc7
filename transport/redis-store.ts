/**
 * The shared, surviving copy of the cache, in Redis: alone, behind Sentinel, or a Cluster. Answers for equal requests
 * here; questions for others of the same meaning in redis-questions.ts. Keys and values: redis-values.ts. Every entry
 * has a time to live.
 *
 * Redis is never in the way. Away, slow, full or corrupt, it makes misses and figures, never an error:
 * - not connected: a miss at once; reconnection goes on with back-off and jitter.
 * - no reply within `timeoutMs`: a miss; then Redis is left alone for a while (redis-rest.ts).
 * - a value that is not whole: a miss, and the entry is removed.
 */
import type { StoreCommand, StoreGot } from "../actors/edges.ts";
import type { StoredAnswer } from "../actors/protocol.ts";
import { type Actor, assert, type ReplyTo, unreachable } from "../runtime/actor.ts";
import { ConfigError } from "./config.ts";
import type { Log } from "./log.ts";
import type { Options } from "./options.ts";
import { questionIndex } from "./redis-index.ts";
import { type Commands, type RedisLink, redisLinks, type Words } from "./redis-link.ts";
import { type QuestionStats, RedisQuestions } from "./redis-questions.ts";
import { Rest } from "./redis-rest.ts";
import { decodeAnswer, encodeAnswer, KeyNames } from "./redis-values.ts";

/** Where Redis is, what it keeps, and how long a lookup may take. */
export type StoreOptions = Pick<Options["cache"], "storeTimeoutMs" | "answerBytesMax" | "redis"> & {
  semantic: Pick<Options["cache"]["semantic"], "index">;
};

/** What the operator should know of goes to the log: lost and found, a policy that does not suit a cache. */
export type StoreLog = Pick<Log, "info" | "warn">;

type Reply = <R>(to: ReplyTo<R>, value: R) => void;

/** Counts since the start, and Redis as last seen. */
export type StoreStats = {
  connected: boolean;
  /** Lookups are not asked just now, because Redis did not reply in time. */
  resting: boolean;
  hits: number;
  misses: number;
  /** Misses because Redis was away, did not reply in time, was not asked, or failed. */
  missesAway: number;
  missesLate: number;
  missesResting: number;
  missesFailed: number;
  /** Misses because the entry was not whole. */
  missesCorrupt: number;
  puts: number;
  putsDropped: number;
  putsFailed: number;
  purged: number;
  disconnects: number;
  /** The last health check's round trip. */
  latencyMs?: number;
  /** All masters together. */
  usedMemoryBytes?: number;
  /** 0: no bound. */
  maxMemoryBytes?: number;
  /** Every master evicts by `allkeys-lru`. */
  policyOk?: boolean;
  /** Every master has what `cache.semantic.index` needs; absent where the actors are the index, or it is not known. */
  indexOk?: boolean;
} & QuestionStats;

type Miss = Extract<keyof StoreStats, `misses${string}`>;

const HEALTH_MS = 10_000;
/** Writes without a reply so far; more are dropped: the cache is a copy, not a ledger. */
const PUTS_OPEN_MAX = 256;
const SCAN_COUNT = 500;
const POLICY = "allkeys-lru";
/** At the start, for Redis to show whether it has the index that is wanted. */
const INDEX_WAIT_MS = 2000;

/**
 * Starts connecting and returns; until Redis is there, lookups are misses. Only where Redis itself is to be the index
 * does it wait for Redis, and 2 s at most, to see whether it can.
 * @throws ConfigError when Redis is there and cannot.
 * @throws AssertionError when no Redis is configured.
 */
export async function openRedisStore(options: StoreOptions, log: StoreLog): Promise<RedisStore> {
  const { redis, semantic } = options;
  assert(redis !== undefined, "a store is opened where Redis is configured");
  const { index: name } = semantic;
  if (name === "redis-search" && redis.clusterNodes !== undefined)
    throw indexError(
      `is ${name}, and cache.redis names a cluster: RediSearch is used on one server`,
    );
  const connect = await redisLinks(redis);
  const names = new KeyNames(redis.keyPrefix);
  const index = name === "actors" ? undefined : questionIndex(name, names, redis.keyPrefix);
  const { storeTimeoutMs: timeoutMs, answerBytesMax } = options;
  const link = connect();
  const rest = new Rest();
  const questions = new RedisQuestions(
    { answerBytesMax, timeoutMs },
    names,
    link,
    rest,
    index,
    connect,
  );
  const store = new RedisStore(link, rest, names, questions, timeoutMs, log);
  if (index === undefined) return store;
  const has = await store.untilIndexSeen(INDEX_WAIT_MS);
  if (has === false) {
    await store.close();
    throw indexError(
      `is ${name}, but this Redis does not have ${index.needs}; use another Redis, or set it to actors`,
    );
  }
  store.watchIndex(index.needs);
  return store;
}

function indexError(message: string): ConfigError {
  return new ConfigError([{ source: "configuration", path: "cache.semantic.index", message }]);
}

/** The lookups' connection, its figures, and the edge. */
export class RedisStore {
  readonly #link: RedisLink;
  readonly #rest: Rest;
  readonly #names: KeyNames;
  readonly #questions: RedisQuestions;
  readonly #timeoutMs: number;
  readonly #log: StoreLog;
  readonly #counts = {
    hits: 0,
    misses: 0,
    missesAway: 0,
    missesLate: 0,
    missesResting: 0,
    missesFailed: 0,
    missesCorrupt: 0,
    puts: 0,
    putsDropped: 0,
    putsFailed: 0,
    purged: 0,
    disconnects: 0,
  };
  #seen: Pick<StoreStats, "latencyMs" | "usedMemoryBytes" | "maxMemoryBytes" | "policyOk"> = {};
  /** The last look at it; begins when Redis is connected. */
  #hasIndex: Promise<boolean | undefined> = Promise.resolve(undefined);
  #indexOk: boolean | undefined;
  /** Told of at every change; undefined = not told of yet, for its absence may end the start. */
  #indexNeeds: string | undefined;
  #putsOpen = 0;
  #policyTold: string | null = null;
  #healthTimer: NodeJS.Timeout | null = null;

  constructor(
    link: RedisLink,
    rest: Rest,
    names: KeyNames,
    questions: RedisQuestions,
    timeoutMs: number,
    log: StoreLog,
  ) {
    this.#link = link;
    this.#rest = rest;
    this.#names = names;
    this.#questions = questions;
    this.#timeoutMs = timeoutMs;
    this.#log = log;
    link.watch(
      () => this.#onReady(),
      () => this.#onLost(),
    );
  }

  /** The actor; @param reply answers an ask from outside a turn. */
  edge(reply: Reply): Actor<StoreCommand> {
    return { receive: (command) => this.#receive(command, reply) };
  }

  stats(): StoreStats {
    return {
      connected: this.#link.isConnected,
      resting: this.#rest.isOn,
      ...this.#counts,
      ...this.#questions.stats(),
      ...this.#seen,
      ...(this.#indexOk === undefined ? {} : { indexOk: this.#indexOk }),
    };
  }

  #receive(command: StoreCommand, reply: Reply): void {
    switch (command.kind) {
      case "store.get":
        return this.#lookUp(this.#names.answer(command.tenant, command.key), (got) =>
          reply(command.replyTo, got),
        );
      case "store.put":
        return this.#onPut(command);
      case "store.purge":
        void this.#purge(command.tenant).then((removed) => reply(command.replyTo, { removed }));
        return;
      case "store.remember":
        return this.#questions.remember(command.question);
      case "store.forget":
        return this.#questions.forget(command);
      case "store.nearest":
        return this.#questions.nearest(command, (found) => reply(command.replyTo, found));
      case "store.recall":
        void this.#questions.recall(command, (page) => reply(command.replyTo, page));
        return;
      default:
        return unreachable(command);
    }
  }

  /** Lets writes under way finish for a moment, then closes; no handle is left. */
  async close(): Promise<void> {
    if (this.#healthTimer !== null) clearTimeout(this.#healthTimer);
    await Promise.all([this.#link.close(), this.#questions.close()]);
  }

  // ---- lookups and writes -----------------------------------------------------------------------------------

  /** Calls `answer` once: at once, when Redis has replied, or when its time is over. */
  #lookUp(name: string, answer: (got: StoreGot) => void): void {
    const miss = (why: Miss): void => {
      this.#counts[why]++;
      answer({ ttlMs: 0 });
    };
    if (!this.#link.isConnected) return miss("missesAway");
    this.#rest.ask(
      this.#timeoutMs,
      () => this.#read(name),
      (got) => {
        if (got === "resting") return miss("missesResting");
        if (got === "late") return miss("missesLate");
        if (got === "failed") return miss("missesFailed");
        if (typeof got.value === "string") return miss(got.value);
        this.#counts.hits++;
        answer(got.value);
      },
    );
  }

  async #read(name: string): Promise<StoreGot | Miss> {
    const replies = await this.#link.batch([
      ["GET", name],
      ["PTTL", name],
    ]);
    for (const reply of replies) if (reply instanceof Error) throw reply;
    const [value, ttlMs] = replies;
    if (!(value instanceof Uint8Array) || typeof ttlMs !== "number" || ttlMs <= 0) return "misses";
    const answer: StoredAnswer | null = decodeAnswer(value);
    if (answer !== null) return { answer, ttlMs };
    this.#link.call(["UNLINK", name]).catch(() => undefined);
    return "missesCorrupt";
  }

  #onPut({ key, tenant, answer, ttlMs }: Extract<StoreCommand, { kind: "store.put" }>): void {
    const lifeMs = Math.floor(ttlMs);
    const isFull = this.#putsOpen >= PUTS_OPEN_MAX;
    if (!this.#link.isConnected || this.#rest.isOn || isFull || lifeMs < 1) {
      this.#counts.putsDropped++;
      return;
    }
    this.#putsOpen++;
    const name = this.#names.answer(tenant, key);
    this.#link.call(["SET", name, encodeAnswer(answer), "PX", lifeMs]).then(
      () => {
        this.#putsOpen--;
        this.#counts.puts++;
      },
      () => {
        this.#putsOpen--;
        this.#counts.putsFailed++;
      },
    );
  }

  // ---- purge ------------------------------------------------------------------------------------------------

  /** Removes a tenant's entries, or all, in small steps; what cannot be reached stays and expires. */
  async #purge(tenant: string | undefined): Promise<number> {
    const pattern = this.#names.pattern(tenant);
    let removed = 0;
    try {
      await this.#questions.writesEnded();
      for (const master of this.#link.masters()) {
        let cursor = "0";
        do {
          const scan: Words = ["SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT];
          const [next, found] = scanned(await master.call(scan));
          cursor = next;
          removed += await this.#remove(master, found);
        } while (cursor !== "0" && !this.#link.isClosed);
      }
    } catch {
      // Away, or late: what is left expires.
    }
    this.#questions.purged();
    this.#counts.purged += removed;
    return removed;
  }

  /** Answers and questions count; what belongs to them goes with them. */
  async #remove(master: Commands, names: readonly string[]): Promise<number> {
    if (names.length === 0) return 0;
    const commands: Words[] = [];
    const counted = new Set<number>();
    for (const name of names) {
      const member = this.#names.memberOf(name);
      if (member !== undefined || this.#names.isAnswer(name)) counted.add(commands.length);
      commands.push(["UNLINK", name]); // One by one: a cluster takes no keys of many slots.
      if (member !== undefined) commands.push(...this.#questions.removalOf(member));
    }
    const replies = await master.batch(commands);
    return replies.reduce<number>(
      (sum, reply, at) => sum + (counted.has(at) && reply === 1 ? 1 : 0),
      0,
    );
  }

  // ---- connection and health --------------------------------------------------------------------------------

  #onReady(): void {
    this.#rest.end();
    this.#log.info({}, "Redis is connected");
    void this.#checkHealth();
    this.#hasIndex = this.#questions.seeIndex();
    void this.#hasIndex.then((has) => {
      this.#indexOk = has;
      this.#tellIndex();
    });
  }

  #onLost(): void {
    this.#counts.disconnects++;
    if (this.#link.isClosed) return;
    this.#log.warn(
      { reason: this.#link.lastError },
      "Redis is away: its lookups are misses until it is back",
    );
  }

  /** Waits for Redis, and for whether it has the index that is wanted; undefined where that is not known by then. */
  async untilIndexSeen(waitMs: number): Promise<boolean | undefined> {
    return (await this.#link.untilConnected(waitMs)) ? this.#hasIndex : undefined;
  }

  /** From now on it is told where Redis does not have the index; @param needs what it does not have then. */
  watchIndex(needs: string): void {
    this.#indexNeeds = needs;
    if (!this.#link.isConnected) {
      this.#log.warn(
        { needs },
        "Redis is away: whether it can be the semantic index is seen when it comes; until then each gateway has its own entries only",
      );
    } else this.#tellIndex();
  }

  #tellIndex(): void {
    if (this.#indexNeeds === undefined || this.#indexOk === true) return;
    const fields = { needs: this.#indexNeeds };
    if (this.#indexOk === false) {
      const line =
        "Redis does not have what cache.semantic.index needs: each gateway has its own entries only, until a Redis comes that has it";
      this.#log.warn(fields, line);
    } else
      this.#log.warn(
        fields,
        "Redis does not tell whether it can be the semantic index: it is tried",
      );
  }

  async #checkHealth(): Promise<void> {
    if (this.#healthTimer !== null) clearTimeout(this.#healthTimer);
    this.#questions.retry();
    try {
      const askedAtMs = performance.now();
      const infos = await Promise.all(
        this.#link.masters().map(async (master) => String(await master.call(["INFO", "memory"]))),
      );
      const latencyMs = performance.now() - askedAtMs;
      const policies = infos.map((info) => fieldOf(info, "maxmemory_policy") ?? "unknown");
      const sum = (field: string): number =>
        infos.reduce((total, info) => total + (Number(fieldOf(info, field)) || 0), 0);
      this.#seen = {
        latencyMs,
        usedMemoryBytes: sum("used_memory"),
        maxMemoryBytes: sum("maxmemory"),
        policyOk: policies.every((policy) => policy === POLICY),
      };
      this.#tellPolicy(policies.find((policy) => policy !== POLICY) ?? POLICY);
    } catch {
      // What was last seen stands; lookups find out for themselves.
    }
    if (this.#link.isClosed || !this.#link.isConnected) return;
    this.#healthTimer = setTimeout(() => void this.#checkHealth(), HEALTH_MS);
  }

  /** Once for each policy found, so that a wrong one is told and a change is too. */
  #tellPolicy(policy: string): void {
    if (policy === this.#policyTold) return;
    this.#policyTold = policy;
    if (policy === POLICY) return;
    this.#log.warn(
      { policy, wanted: POLICY },
      "Redis has a maxmemory-policy that does not suit a cache: when full it refuses writes, or evicts others' keys first",
    );
  }
}

function fieldOf(info: string, field: string): string | undefined {
  return new RegExp(`^${field}:(.*?)\\r?$`, "m").exec(info)?.[1];
}

function scanned(reply: unknown): [string, string[]] {
  const [next, names] = Array.isArray(reply) ? reply : [];
  return [String(next ?? "0"), Array.isArray(names) ? names.map(String) : []];
}
