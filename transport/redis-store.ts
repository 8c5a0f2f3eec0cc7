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
import type { Cluster, Redis, RedisOptions } from "ioredis";
import type { StoreCommand, StoreGot } from "../actors/edges.ts";
import type { Route, StoredAnswer } from "../actors/protocol.ts";
import { type Actor, type ReplyTo, unreachable } from "../runtime/actor.ts";

/** One of `url`, `clusterNodes` and `sentinels` says where Redis is. */
export type RedisStoreOptions = {
  /** redis:// or rediss:// */
  url?: string;
  /** host:port of some nodes of a cluster. */
  clusterNodes?: readonly string[];
  /** host:port of sentinels, and the master's name there. */
  sentinels?: readonly string[];
  sentinelMaster?: string;
  username?: string;
  password?: string;
  /** For cluster nodes and sentinels; a URL says so itself. */
  tls: boolean;
  keyPrefix: string;
  /** A lookup's time; later is a miss. */
  timeoutMs: number;
};

/** What the operator should know of. */
export type StoreEvent =
  | { kind: "store.connected" }
  | { kind: "store.disconnected"; detail: string }
  /** Entries are evicted by another rule than least recently used, or not at all. */
  | { kind: "store.misconfigured"; detail: string };

export type RedisStoreDeps = {
  reply: <R>(to: ReplyTo<R>, value: R) => void;
  nowMs: () => number;
  /** Uniform in [0, 1). */
  random: () => number;
  emit: (event: StoreEvent) => void;
};

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

/** Starts connecting and returns; until Redis is there, lookups are misses. */
export async function createRedisStore(
  options: RedisStoreOptions,
  deps: RedisStoreDeps,
): Promise<RedisStore> {
  const ioredis = await import("ioredis");
  const reconnectMs = (times: number): number => {
    const ms = Math.min(RECONNECT_MS_MAX, RECONNECT_MS * 2 ** Math.min(times, 10));
    return Math.round(ms * (0.5 + deps.random() / 2));
  };
  const { username, password, url } = options;
  const common: RedisOptions = {
    ...(username === undefined ? {} : { username }),
    ...(password === undefined ? {} : { password }),
    protocol: 2, // Nothing here needs RESP3, and proxies and old servers do not have it.
    connectTimeout: CONNECT_TIMEOUT_MS,
    commandTimeout: COMMAND_TIMEOUT_MS,
    enableOfflineQueue: false,
    autoResendUnfulfilledCommands: false,
    maxRetriesPerRequest: 0,
    disableClientInfo: true,
  };
  const tls = options.tls ? { tls: {} } : {};
  if (options.clusterNodes !== undefined) {
    const cluster = new ioredis.Cluster(options.clusterNodes.map(hostPort), {
      redisOptions: { ...common, ...tls },
      enableOfflineQueue: false,
      clusterRetryStrategy: reconnectMs,
      maxRedirections: 3,
      slotsRefreshTimeout: CONNECT_TIMEOUT_MS,
    });
    return new RedisStore(cluster, options, deps);
  }
  const single: RedisOptions = { ...common, retryStrategy: reconnectMs };
  if (options.sentinels !== undefined) {
    const redis = new ioredis.Redis({
      ...single,
      ...tls,
      ...(options.tls ? { enableTLSForSentinelMode: true } : {}),
      sentinels: options.sentinels.map(hostPort),
      name: options.sentinelMaster ?? "",
      sentinelRetryStrategy: reconnectMs,
    });
    return new RedisStore(redis, options, deps);
  }
  return new RedisStore(new ioredis.Redis(url ?? "", single), options, deps);
}

export class RedisStore implements Actor<StoreCommand> {
  readonly #client: Redis | Cluster;
  readonly #options: RedisStoreOptions;
  readonly #deps: RedisStoreDeps;
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

  constructor(client: Redis | Cluster, options: RedisStoreOptions, deps: RedisStoreDeps) {
    this.#client = client;
    this.#options = options;
    this.#deps = deps;
    client.on("ready", () => this.#onReady());
    client.on("close", () => this.#onClose());
    client.on("error", (error: Error) => {
      this.#lastError = codeOf(error);
    });
  }

  stats(): StoreStats {
    return {
      connected: this.#connected,
      resting: this.#restUntilMs > 0,
      ...this.#counts,
      ...this.#seen,
    };
  }

  receive(command: StoreCommand): void {
    switch (command.kind) {
      case "store.get":
        return this.#onGet(command);
      case "store.put":
        return this.#onPut(command);
      case "store.purge":
        return void this.#purge(command.tenant).then((removed) =>
          this.#deps.reply(command.replyTo, { removed }),
        );
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

  #onGet({ key, tenant, replyTo }: Extract<StoreCommand, { kind: "store.get" }>): void {
    if (!this.#connected) return this.#miss("missesAway", replyTo);
    if (!this.#mayAsk()) return this.#miss("missesResting", replyTo);
    const name = this.#name(tenant, key);
    let open = true;
    const timer = setTimeout(() => {
      open = false;
      this.#rest();
      this.#miss("missesLate", replyTo);
    }, this.#options.timeoutMs);
    const end = (results: readonly [Error | null, unknown][] | null): void => {
      if (!open) return; // Late: the miss has been told.
      open = false;
      clearTimeout(timer);
      this.#onGot(results, name, replyTo);
    };
    this.#client
      .pipeline()
      .getBuffer(name)
      .pttl(name)
      .exec()
      .then(end, () => end(null));
  }

  #onGot(
    results: readonly [Error | null, unknown][] | null,
    name: string,
    replyTo: ReplyTo<StoreGot>,
  ): void {
    const [[valueError, value] = [null], [ttlError, ttlMs] = [null]] = results ?? [];
    if (results === null || valueError instanceof Error || ttlError instanceof Error) {
      this.#trying = false;
      return this.#miss("missesFailed", replyTo);
    }
    this.#wake();
    if (!(value instanceof Uint8Array) || typeof ttlMs !== "number" || ttlMs <= 0) {
      return this.#miss("misses", replyTo);
    }
    const answer = decodeAnswer(value);
    if (answer === null) {
      this.#client.unlink(name).catch(() => undefined);
      return this.#miss("missesCorrupt", replyTo);
    }
    this.#counts.hits++;
    this.#deps.reply(replyTo, { answer, ttlMs });
  }

  #miss(
    why:
      | "misses"
      | "missesAway"
      | "missesLate"
      | "missesResting"
      | "missesFailed"
      | "missesCorrupt",
    replyTo: ReplyTo<StoreGot>,
  ): void {
    this.#counts[why]++;
    this.#deps.reply(replyTo, { ttlMs: 0 });
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
    return `${this.#options.keyPrefix}v1:answer:${tenantHash(tenant)}:${key}`;
  }

  // ---- resting ----------------------------------------------------------------------------------------------

  #mayAsk(): boolean {
    if (this.#restUntilMs === 0) return true;
    if (this.#trying || this.#deps.nowMs() < this.#restUntilMs) return false;
    this.#trying = true;
    return true;
  }

  #rest(): void {
    // Lookups that were out together end together: they are one reason to rest, not many.
    if (this.#restUntilMs > 0 && !this.#trying) return;
    this.#trying = false;
    this.#restUntilMs = this.#deps.nowMs() + this.#restMs * (0.5 + this.#deps.random() / 2);
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
    const pattern = `${this.#options.keyPrefix.replace(/[*?[\]\\]/g, "\\$&")}v1:answer:${of}`;
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
    this.#deps.emit({ kind: "store.connected" });
    void this.#checkHealth();
  }

  #onClose(): void {
    if (!this.#connected) return;
    this.#connected = false;
    this.#counts.disconnects++;
    if (!this.#closed) this.#deps.emit({ kind: "store.disconnected", detail: this.#lastError });
  }

  async #checkHealth(): Promise<void> {
    if (this.#healthTimer !== null) clearTimeout(this.#healthTimer);
    try {
      const askedAtMs = this.#deps.nowMs();
      const infos = await Promise.all(this.#masters().map((master) => master.info("memory")));
      const latencyMs = this.#deps.nowMs() - askedAtMs;
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
    this.#deps.emit({
      kind: "store.misconfigured",
      detail: `maxmemory-policy is ${policy}, not ${POLICY}: a full Redis will refuse writes or evict others' keys first`,
    });
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

// ---- values -------------------------------------------------------------------------------------------------

/*
 *   offset  bytes
 *   0       2      "HR"
 *   2       1      version, 1
 *   3       1      route (index in `routes`)
 *   4       4      CRC-32 of everything from 8 on
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

export function encodeAnswer(answer: StoredAnswer): Buffer {
  const model = Buffer.from(answer.model, "utf8").subarray(0, 0xffff);
  const value = Buffer.allocUnsafe(HEADER_BYTES + model.length + answer.body.byteLength);
  value.write("HR", 0, "latin1");
  value[2] = VERSION;
  value[3] = Math.max(0, routes.indexOf(answer.route));
  value.writeUInt32BE(Math.min(UINT32_MAX, answer.promptTokens), 8);
  value.writeUInt32BE(Math.min(UINT32_MAX, answer.outputTokens), 12);
  value.writeUInt16BE(model.length, 16);
  value.writeUInt32BE(answer.body.byteLength, 18);
  value.set(model, HEADER_BYTES);
  value.set(answer.body, HEADER_BYTES + model.length);
  value.writeUInt32BE(crc32(value.subarray(8)), 4);
  return value;
}

/** Null for anything that is not, byte for byte, what `encodeAnswer` made. */
export function decodeAnswer(bytes: Uint8Array): StoredAnswer | null {
  const value = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (value.length < HEADER_BYTES || value.toString("latin1", 0, 2) !== "HR") return null;
  const route = routes[value[3] ?? -1];
  const modelLength = value.readUInt16BE(16);
  const bodyLength = value.readUInt32BE(18);
  if (value[2] !== VERSION || route === undefined) return null;
  if (value.length !== HEADER_BYTES + modelLength + bodyLength) return null;
  if (value.readUInt32BE(4) !== crc32(value.subarray(8))) return null;
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
