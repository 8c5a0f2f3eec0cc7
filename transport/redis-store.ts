/**
 * The shared, surviving copy of the cache, in Redis: alone, behind Sentinel, or a Cluster. The only importer of
 * ioredis, which is loaded when the first store is made, so that a gateway without Redis does not pay for it.
 *
 * Keys: `<prefix>v1:answer:<tenant>:<key>`, tenant = the first 16 hex digits of its sha256 (names stay private,
 * and a tenant can be purged by pattern). Values: see `encodeAnswer`. Every entry has a time to live.
 *
 * Redis is never in the way. Away, slow, full or corrupt, it makes misses and figures, never an error:
 * - not connected: a miss at once; reconnection goes on with back-off and jitter.
 * - no reply within `timeoutMs`: a miss; then nothing is asked for a short while (250 ms, doubling to 5 s), after
 *   which one lookup alone tries, so that a Redis that hangs does not delay every request.
 * - a value that is not whole: a miss, and the entry is removed.
 */
import { createHash } from "node:crypto";
import { crc32 } from "node:zlib";
import type { Cluster, Redis } from "ioredis";
import type { StoreCommand, StoreGot } from "../actors/edges.ts";
import type { Route, StoredAnswer } from "../actors/protocol.ts";
import { type Actor, assert, type ReplyTo, unreachable } from "../runtime/actor.ts";
import type { Log } from "./log.ts";
import type { Options } from "./options.ts";

/** Where Redis is, and how long a lookup may take. */
export type StoreOptions = Pick<Options["cache"], "storeTimeoutMs" | "redis">;
/** Where Redis is. */
export type RedisPlace = NonNullable<StoreOptions["redis"]>;
/** A connection, or one to each node of a Cluster. */
export type RedisClient = Redis | Cluster;

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
};

type Miss = Extract<keyof StoreStats, `misses${string}`>;
type Results = readonly [Error | null, unknown][];

/** Housekeeping (scan, info, writes) may take longer than a lookup. */
const COMMAND_TIMEOUT_MS = 1000;
const CONNECT_TIMEOUT_MS = 1000;
const RECONNECT_MS = 100;
const RECONNECT_MS_MAX = 5000;
const REST_MS = 250;
const REST_MS_MAX = 5000;
const HEALTH_MS = 10_000;
/** Writes without a reply so far; more are dropped: the cache is a copy, not a ledger. */
const PUTS_OPEN_MAX = 256;
const SCAN_COUNT = 500;
const POLICY = "allkeys-lru";

/**
 * Starts connecting and returns; until Redis is there, lookups are misses.
 * @throws AssertionError when no Redis is configured.
 */
export async function openRedisStore(options: StoreOptions, log: StoreLog): Promise<RedisStore> {
  const { redis } = options;
  assert(redis !== undefined, "a store is opened where Redis is configured");
  const client = await connectRedis(redis);
  return new RedisStore(client, redis.keyPrefix, options.storeTimeoutMs, log);
}

/**
 * Starts connecting and returns. While it is not connected, commands fail at once; one that is not answered within a
 * second fails; it connects again by itself, with back-off and jitter. Whoever takes it listens to "error".
 */
export async function connectRedis(redis: RedisPlace): Promise<RedisClient> {
  const ioredis = await import("ioredis");
  const { username, password, clusterNodes, sentinels, sentinelMaster, url } = redis;
  const common = {
    ...(username === undefined ? {} : { username }),
    ...(password === undefined ? {} : { password }),
    protocol: 2, // Nothing here needs RESP3, and proxies and old servers do not have it.
    connectTimeout: CONNECT_TIMEOUT_MS,
    commandTimeout: COMMAND_TIMEOUT_MS,
    enableOfflineQueue: false,
    autoResendUnfulfilledCommands: false,
    maxRetriesPerRequest: 0,
    disableClientInfo: true,
  } as const;
  const tls = redis.tls ? { tls: {} } : {};
  if (clusterNodes !== undefined) {
    const { enableOfflineQueue, ...nodeOptions } = common;
    return new ioredis.Cluster(clusterNodes.map(hostPort), {
      redisOptions: { ...nodeOptions, ...tls },
      enableOfflineQueue,
      clusterRetryStrategy: reconnectMs,
      maxRedirections: 3,
      slotsRefreshTimeout: CONNECT_TIMEOUT_MS,
    });
  }
  if (sentinels !== undefined) {
    return new ioredis.Redis({
      ...common,
      ...tls,
      retryStrategy: reconnectMs,
      sentinels: sentinels.map(hostPort),
      name: sentinelMaster ?? "",
      sentinelRetryStrategy: reconnectMs,
      ...(redis.tls ? { enableTLSForSentinelMode: true } : {}),
    });
  }
  return new ioredis.Redis(url ?? "", { ...common, retryStrategy: reconnectMs });
}

/** Grows from 100 ms to 5 s, then cut by up to a half, so that many gateways do not come back at once. */
function reconnectMs(times: number): number {
  const ms = Math.min(RECONNECT_MS_MAX, RECONNECT_MS * 2 ** Math.min(times, 10));
  return Math.round(withJitter(ms));
}

function withJitter(ms: number): number {
  return ms * (0.5 + Math.random() / 2);
}

/** One connection (or one per cluster node), its figures, and its edge. */
export class RedisStore {
  readonly #client: RedisClient;
  readonly #keyPrefix: string;
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
  #connected = false;
  #lastError = "not connected yet";
  #restUntilMs = 0; // 0: awake.
  #restMs = REST_MS; // The next rest.
  #trying = false; // One lookup is out to see whether the rest can end.
  #putsOpen = 0;
  #policyTold: string | null = null;
  #healthTimer: NodeJS.Timeout | null = null;
  #closed = false;

  constructor(client: RedisClient, keyPrefix: string, timeoutMs: number, log: StoreLog) {
    this.#client = client;
    this.#keyPrefix = keyPrefix;
    this.#timeoutMs = timeoutMs;
    this.#log = log;
    client.on("ready", () => this.#onReady());
    client.on("close", () => this.#onClose());
    client.on("error", (error: Error) => {
      this.#lastError = codeOf(error);
    });
  }

  /** The actor; @param reply answers an ask from outside a turn. */
  edge(reply: Reply): Actor<StoreCommand> {
    return { receive: (command) => this.#receive(command, reply) };
  }

  stats(): StoreStats {
    return {
      connected: this.#connected,
      resting: this.#restUntilMs > 0,
      ...this.#counts,
      ...this.#seen,
    };
  }

  #receive(command: StoreCommand, reply: Reply): void {
    switch (command.kind) {
      case "store.get":
        return this.#lookUp(this.#name(command.tenant, command.key), (got) =>
          reply(command.replyTo, got),
        );
      case "store.put":
        return this.#onPut(command);
      case "store.purge":
        void this.#purge(command.tenant).then((removed) => reply(command.replyTo, { removed }));
        return;
      default:
        return unreachable(command);
    }
  }

  /** Lets writes under way finish for a moment, then closes; no handle is left. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    if (this.#healthTimer !== null) clearTimeout(this.#healthTimer);
    if (this.#connected) {
      let timer: NodeJS.Timeout | undefined;
      const late = new Promise((resolve) => {
        timer = setTimeout(resolve, 200);
      });
      await Promise.race([this.#client.quit().catch(() => undefined), late]);
      clearTimeout(timer);
    }
    this.#client.disconnect();
  }

  // ---- lookups and writes -----------------------------------------------------------------------------------

  /** Calls `answer` once: at once, when Redis has replied, or when its time is over. */
  #lookUp(name: string, answer: (got: StoreGot) => void): void {
    const miss = (why: Miss): void => {
      this.#counts[why]++;
      answer({ ttlMs: 0 });
    };
    if (!this.#connected) return miss("missesAway");
    if (!this.#mayAsk()) return miss("missesResting");
    let open = true;
    const timer = setTimeout(() => {
      open = false;
      this.#rest();
      miss("missesLate");
    }, this.#timeoutMs);
    const end = (results: Results | null): void => {
      if (!open) return; // Late: the miss has been told.
      open = false;
      clearTimeout(timer);
      const got = this.#found(results, name);
      if (typeof got === "string") return miss(got);
      this.#counts.hits++;
      answer(got);
    };
    const both = this.#client.pipeline().getBuffer(name).pttl(name);
    both.exec().then(end, () => end(null));
  }

  #found(results: Results | null, name: string): StoreGot | Miss {
    const [[valueError, value] = [null], [ttlError, ttlMs] = [null]] = results ?? [];
    if (results === null || valueError instanceof Error || ttlError instanceof Error) {
      this.#trying = false; // The connection broke, or Redis refuses: the next lookup sees.
      return "missesFailed";
    }
    this.#wake();
    if (!(value instanceof Uint8Array) || typeof ttlMs !== "number" || ttlMs <= 0) return "misses";
    const answer = decodeAnswer(value);
    if (answer !== null) return { answer, ttlMs };
    this.#client.unlink(name).catch(() => undefined);
    return "missesCorrupt";
  }

  #onPut({ key, tenant, answer, ttlMs }: Extract<StoreCommand, { kind: "store.put" }>): void {
    const lifeMs = Math.floor(ttlMs);
    const resting = this.#restUntilMs > 0;
    if (!this.#connected || resting || this.#putsOpen >= PUTS_OPEN_MAX || lifeMs < 1) {
      this.#counts.putsDropped++;
      return;
    }
    this.#putsOpen++;
    this.#client.set(this.#name(tenant, key), encodeAnswer(answer), "PX", lifeMs).then(
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

  #name(tenant: string, key: string): string {
    return `${this.#keyPrefix}v1:answer:${tenantHash(tenant)}:${key}`;
  }

  // ---- resting ----------------------------------------------------------------------------------------------

  #mayAsk(): boolean {
    if (this.#restUntilMs === 0) return true;
    if (this.#trying || performance.now() < this.#restUntilMs) return false;
    this.#trying = true;
    return true;
  }

  #rest(): void {
    // Lookups that were out together end together: they are one reason to rest, not many.
    if (this.#restUntilMs > 0 && !this.#trying) return;
    this.#trying = false;
    this.#restUntilMs = performance.now() + withJitter(this.#restMs);
    this.#restMs = Math.min(REST_MS_MAX, this.#restMs * 2);
  }

  #wake(): void {
    this.#trying = false;
    this.#restUntilMs = 0;
    this.#restMs = REST_MS;
  }

  // ---- purge ------------------------------------------------------------------------------------------------

  /** Removes a tenant's entries, or all, in small steps; what cannot be reached stays and expires. */
  async #purge(tenant: string | undefined): Promise<number> {
    const of = tenant === undefined ? "*" : `${tenantHash(tenant)}:*`;
    const pattern = `${this.#keyPrefix.replace(/[*?[\]\\]/g, "\\$&")}v1:answer:${of}`;
    let removed = 0;
    try {
      for (const master of this.#masters()) {
        let cursor = "0";
        do {
          const [next, names] = await master.scan(cursor, "MATCH", pattern, "COUNT", SCAN_COUNT);
          cursor = next;
          if (names.length === 0) continue;
          const batch = master.pipeline();
          for (const name of names) batch.unlink(name); // One by one: a cluster takes no keys of many slots.
          for (const [, count] of (await batch.exec()) ?? []) removed += Number(count ?? 0);
        } while (cursor !== "0" && !this.#closed);
      }
    } catch (error) {
      this.#lastError = codeOf(error);
    }
    this.#counts.purged += removed;
    return removed;
  }

  #masters(): Redis[] {
    return "nodes" in this.#client ? this.#client.nodes("master") : [this.#client];
  }

  // ---- connection and health --------------------------------------------------------------------------------

  #onReady(): void {
    if (this.#closed) return;
    this.#connected = true;
    this.#wake();
    this.#log.info({}, "Redis is connected");
    void this.#checkHealth();
  }

  #onClose(): void {
    if (!this.#connected) return;
    this.#connected = false;
    this.#counts.disconnects++;
    if (this.#closed) return;
    this.#log.warn(
      { reason: this.#lastError },
      "Redis is away: its lookups are misses until it is back",
    );
  }

  async #checkHealth(): Promise<void> {
    if (this.#healthTimer !== null) clearTimeout(this.#healthTimer);
    try {
      const askedAtMs = performance.now();
      const infos = await Promise.all(this.#masters().map((master) => master.info("memory")));
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
    } catch (error) {
      this.#lastError = codeOf(error); // What was last seen stands; lookups find out for themselves.
    }
    if (this.#closed || !this.#connected) return;
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

function tenantHash(tenant: string): string {
  return createHash("sha256").update(tenant, "utf8").digest("hex").slice(0, 16);
}

function hostPort(address: string): { host: string; port: number } {
  const colon = address.lastIndexOf(":");
  return {
    host: address.slice(0, colon).replace(/^\[|\]$/g, ""),
    port: Number(address.slice(colon + 1)),
  };
}

function fieldOf(info: string, field: string): string | undefined {
  return new RegExp(`^${field}:(.*?)\\r?$`, "m").exec(info)?.[1];
}

function codeOf(error: unknown): string {
  if (!(error instanceof Error)) return "unknown";
  return "code" in error && typeof error.code === "string" ? error.code : error.message;
}

/** One Lua script: sent by its hash, and whole where Redis does not know it yet. */
export class RedisScript {
  readonly #lua: string;
  readonly #sha1: string;

  constructor(lua: string) {
    this.#lua = lua;
    this.#sha1 = createHash("sha1").update(lua, "utf8").digest("hex");
  }

  /** All keys must lie in one slot of a Cluster. Rejects as the client does. */
  async run(
    client: RedisClient,
    keys: readonly string[],
    args: readonly (string | number)[],
  ): Promise<unknown> {
    try {
      return await client.evalsha(this.#sha1, keys.length, ...keys, ...args);
    } catch (error) {
      if (!(error instanceof Error) || !error.message.startsWith("NOSCRIPT")) throw error;
    }
    return client.eval(this.#lua, keys.length, ...keys, ...args);
  }
}

// ---- values -------------------------------------------------------------------------------------------------

/*
 *   offset  bytes
 *   0       2      "HR"
 *   2       1      version, 1
 *   3       4      CRC-32 of everything from 7 on
 *   7       1      route (index in `routes`)
 *   8       4      prompt tokens
 *   12      4      output tokens
 *   16      2      length of the model's name
 *   18      4      length of the body
 *   22      …      model's name, UTF-8; then the body
 */
const HEADER_BYTES = 22;
const VERSION = 1;
const routes: readonly Route[] = ["chat", "completions", "embeddings", "other"];
const UINT32_MAX = 0xffff_ffff;

/** The bytes that Redis keeps. */
export function encodeAnswer(answer: StoredAnswer): Buffer {
  const model = Buffer.from(answer.model, "utf8").subarray(0, 0xffff);
  const value = Buffer.allocUnsafe(HEADER_BYTES + model.length + answer.body.byteLength);
  value.write("HR", 0, "latin1");
  value[2] = VERSION;
  value[7] = Math.max(0, routes.indexOf(answer.route));
  value.writeUInt32BE(Math.min(UINT32_MAX, answer.promptTokens), 8);
  value.writeUInt32BE(Math.min(UINT32_MAX, answer.outputTokens), 12);
  value.writeUInt16BE(model.length, 16);
  value.writeUInt32BE(answer.body.byteLength, 18);
  value.set(model, HEADER_BYTES);
  value.set(answer.body, HEADER_BYTES + model.length);
  value.writeUInt32BE(crc32(value.subarray(7)), 3);
  return value;
}

/** Null for anything that is not, byte for byte, what `encodeAnswer` made. */
export function decodeAnswer(bytes: Uint8Array): StoredAnswer | null {
  const value = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (value.length < HEADER_BYTES || value.toString("latin1", 0, 2) !== "HR") return null;
  const route = routes[value[7] ?? -1];
  const modelLength = value.readUInt16BE(16);
  const bodyLength = value.readUInt32BE(18);
  if (value[2] !== VERSION || route === undefined) return null;
  if (value.length !== HEADER_BYTES + modelLength + bodyLength) return null;
  if (value.readUInt32BE(3) !== crc32(value.subarray(7))) return null;
  const bodyFrom = HEADER_BYTES + modelLength;
  return {
    body: value.subarray(bodyFrom),
    bytes: bodyLength,
    route,
    model: value.toString("utf8", HEADER_BYTES, bodyFrom),
    promptTokens: value.readUInt32BE(8),
    outputTokens: value.readUInt32BE(12),
  };
}
