/**
 * A connection to Redis: alone, behind Sentinel, or a Cluster (one connection per node). The only importer of
 * ioredis, which is loaded when the first connection is made, so that a gateway without Redis does not pay for it.
 *
 * Commands are sent as words and answered in bytes. Not connected, they fail at once: nothing is queued, and
 * reconnection goes on for ever, with back-off and jitter.
 */
import { createHash } from "node:crypto";
import type { Cluster, Redis } from "ioredis";
import type { Options } from "./options.ts";
import { withJitter } from "./redis-rest.ts";

/** Where Redis is. */
export type RedisPlace = NonNullable<Options["cache"]["redis"]>;

/** A command's name and what follows it. */
export type Words = readonly [string, ...(string | Buffer | number)[]];

/** Strings in replies are Buffers. Rejects with what Redis says, or because the connection broke. */
export type Commands = {
  call(words: Words): Promise<unknown>;
  /** Several in one go, in order; each has its reply, or its error. In a cluster, all keys on one node. */
  batch(commands: readonly Words[]): Promise<unknown[]>;
};

/** Housekeeping (scan, info, writes) may take longer than a lookup. */
const COMMAND_TIMEOUT_MS = 1000;
const CONNECT_TIMEOUT_MS = 1000;
const RECONNECT_MS = 100;
const RECONNECT_MS_MAX = 5000;
/** For writes under way when a link is closed. */
const CLOSE_MS = 200;

/** A connection, or one to each node of a Cluster. */
export type RedisClient = Redis | Cluster;

/** Loads the client; each call of the result is a connection of its own, which starts connecting at once. */
export async function redisLinks(redis: RedisPlace): Promise<() => RedisLink> {
  const connect = await redisClients(redis);
  return () => new RedisLink(connect());
}

/**
 * Starts connecting and returns. While it is not connected, commands fail at once; one that is not answered within a
 * second fails; it connects again by itself. Whoever takes it listens to "error".
 */
export async function connectRedis(redis: RedisPlace): Promise<RedisClient> {
  return (await redisClients(redis))();
}

async function redisClients(redis: RedisPlace): Promise<() => RedisClient> {
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
    const options = {
      redisOptions: { ...nodeOptions, ...tls },
      enableOfflineQueue,
      clusterRetryStrategy: reconnectMs,
      maxRedirections: 3,
      slotsRefreshTimeout: CONNECT_TIMEOUT_MS,
    };
    return () => new ioredis.Cluster(clusterNodes.map(hostPort), options);
  }
  if (sentinels !== undefined) {
    const options = {
      ...common,
      ...tls,
      retryStrategy: reconnectMs,
      sentinels: sentinels.map(hostPort),
      name: sentinelMaster ?? "",
      sentinelRetryStrategy: reconnectMs,
      ...(redis.tls ? { enableTLSForSentinelMode: true } : {}),
    };
    return () => new ioredis.Redis(options);
  }
  const options = { ...common, retryStrategy: reconnectMs };
  return () => new ioredis.Redis(url ?? "", options);
}

/** Grows from 100 ms to 5 s. */
function reconnectMs(times: number): number {
  const ms = Math.min(RECONNECT_MS_MAX, RECONNECT_MS * 2 ** Math.min(times, 10));
  return Math.round(withJitter(ms));
}

function hostPort(address: string): { host: string; port: number } {
  const colon = address.lastIndexOf(":");
  return {
    host: address.slice(0, colon).replace(/^\[|\]$/g, ""),
    port: Number(address.slice(colon + 1)),
  };
}

export class RedisLink implements Commands {
  readonly #client: Redis | Cluster;
  readonly #waiting = new Set<(isConnected: boolean) => void>();
  #isConnected = false;
  #isClosed = false;
  #lastError = "not connected yet";

  constructor(client: Redis | Cluster) {
    this.#client = client;
    client.on("error", (error: Error) => {
      this.#lastError = codeOf(error);
    });
  }

  /** @param onReady connected, again or for the first time. @param onLost it was, and is not any more. */
  watch(onReady: () => void, onLost: () => void): void {
    this.#client.on("ready", () => {
      if (this.#isClosed) return;
      this.#isConnected = true;
      onReady();
      this.#endWaits(true);
    });
    this.#client.on("close", () => {
      if (!this.#isConnected) return;
      this.#isConnected = false;
      onLost();
    });
  }

  get isConnected(): boolean {
    return this.#isConnected;
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  /** Why it is not connected, as a code. */
  get lastError(): string {
    return this.#lastError;
  }

  call([name, ...words]: Words): Promise<unknown> {
    return this.#client.callBuffer(name, words);
  }

  batch(commands: readonly Words[]): Promise<unknown[]> {
    return batchOn(this.#client, commands);
  }

  /** Each master by itself, for what is not about a key. */
  masters(): Commands[] {
    const nodes = "nodes" in this.#client ? this.#client.nodes("master") : [this.#client];
    return nodes.map((node) => ({
      call: ([name, ...words]) => node.callBuffer(name, words),
      batch: (commands) => batchOn(node, commands),
    }));
  }

  /** True once it is connected; false after `waitMs`, or when it is closed. */
  untilConnected(waitMs: number): Promise<boolean> {
    if (this.#isConnected || this.#isClosed) return Promise.resolve(this.#isConnected);
    return new Promise((resolve) => {
      const end = (isConnected: boolean): void => {
        this.#waiting.delete(end);
        clearTimeout(timer);
        resolve(isConnected);
      };
      const timer = setTimeout(() => end(false), waitMs);
      this.#waiting.add(end);
    });
  }

  /** Lets what is under way finish for a moment, then closes; no handle is left. */
  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#endWaits(false);
    if (this.#isConnected) {
      let timer: NodeJS.Timeout | undefined;
      const late = new Promise((resolve) => {
        timer = setTimeout(resolve, CLOSE_MS);
      });
      await Promise.race([this.#client.quit().catch(() => undefined), late]);
      clearTimeout(timer);
    }
    this.#client.disconnect();
  }

  #endWaits(isConnected: boolean): void {
    for (const end of this.#waiting) end(isConnected);
  }
}

async function batchOn(client: Redis | Cluster, commands: readonly Words[]): Promise<unknown[]> {
  const pipeline = client.pipeline();
  for (const [name, ...words] of commands) pipeline.callBuffer(name, words);
  const replies = (await pipeline.exec()) ?? [];
  return replies.map(([error, reply]) => error ?? reply);
}

/** A short name for what went wrong, without addresses or data. */
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
