/** The shared store as an edge alone: a mailbox that only collects replies, before a Redis of the test's own. */
import { setTimeout as delay } from "node:timers/promises";
import { afterEach } from "vitest";
import type { Recalled, StoreCommand, StoreGot } from "../actors/edges.ts";
import type { StoredAnswer, StoredQuestion } from "../actors/protocol.ts";
import type { Actor, Context, ReplyTo } from "../runtime/actor.ts";
import { openRedisStore, type RedisStore, type StoreOptions } from "../transport/redis-store.ts";
import { type RedisServer, startRedis } from "./redis-server.ts";

/** Run after the test, last first. */
export const cleanups: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

const body = Buffer.from('{"choices":[{"message":{"content":"grüezi 🌍"}}]}');
export const answer: StoredAnswer = {
  body,
  bytes: body.length,
  route: "chat",
  model: "m",
  promptTokens: 5,
  outputTokens: 2,
};

export async function redis(
  args: readonly string[] = ["--maxmemory-policy", "allkeys-lru"],
  options: Omit<Parameters<typeof startRedis>[0], "args"> = {},
): Promise<RedisServer> {
  const server = await startRedis({ args, ...options });
  cleanups.push(() => server.stop());
  return server;
}

export async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await condition())) await delay(5);
}

export class StoreRig {
  readonly store: RedisStore;
  readonly logged: string[];
  readonly #edge: Actor<StoreCommand>;
  readonly #waiting = new Map<number, (value: unknown) => void>();
  #asks = 0;

  constructor(store: RedisStore, logged: string[]) {
    this.store = store;
    this.logged = logged;
    this.#edge = store.edge((to, value) => {
      const resolve = this.#waiting.get(to.askId);
      if (resolve === undefined) throw new Error("a second reply to one ask");
      this.#waiting.delete(to.askId);
      resolve(value);
    });
    cleanups.push(() => store.close());
  }

  /** @param options beyond 1 s for lookups, answers of 1 MiB and the actors as index. */
  static async open(
    place: StoreOptions["redis"] | RedisServer,
    timeoutMs = 1000,
    options: Partial<StoreOptions> = {},
  ): Promise<StoreRig> {
    const logged: string[] = [];
    const log = {
      info: (_: object, text: string) => void logged.push(text),
      warn: (fields: object, text: string) => void logged.push(`${text} ${JSON.stringify(fields)}`),
    };
    const where = place !== undefined && "port" in place ? { url: place.url } : place;
    const opened = await openRedisStore(
      {
        storeTimeoutMs: timeoutMs,
        answerBytesMax: 1 << 20,
        semantic: { index: "actors" },
        redis: { tls: false, keyPrefix: "headrace:", ...where },
        ...options,
      },
      log,
    );
    return new StoreRig(opened, logged);
  }

  /** With the connection up. */
  static async ready(
    place: StoreOptions["redis"] | RedisServer,
    timeoutMs = 1000,
    options: Partial<StoreOptions> = {},
  ): Promise<StoreRig> {
    const rig = await StoreRig.open(place, timeoutMs, options);
    await until(() => rig.store.stats().connected);
    return rig;
  }

  #send(command: StoreCommand): void {
    this.#edge.receive(command, undefined as never as Context<StoreCommand>);
  }

  #ask<R>(make: (replyTo: ReplyTo<R>) => StoreCommand): Promise<R> {
    const askId = ++this.#asks;
    return new Promise<R>((resolve) => {
      this.#waiting.set(askId, (value) => resolve(value as R));
      this.#send(make({ asker: "/cache", askId }));
    });
  }

  get(key: string, tenant = "acme"): Promise<StoreGot> {
    return this.#ask((replyTo) => ({ kind: "store.get", key, tenant, replyTo }));
  }

  purge(tenant?: string): Promise<{ removed: number }> {
    return this.#ask((replyTo) => ({
      kind: "store.purge",
      ...(tenant === undefined ? {} : { tenant }),
      replyTo,
    }));
  }

  /** Resolves when Redis has taken it. */
  async put(key: string, tenant = "acme", ttlMs = 60_000, what = answer): Promise<void> {
    const { puts, putsDropped, putsFailed } = this.store.stats();
    const before = puts + putsDropped + putsFailed;
    this.#send({ kind: "store.put", key, tenant, answer: what, ttlMs });
    await until(() => {
      const now = this.store.stats();
      return now.puts + now.putsDropped + now.putsFailed > before;
    });
  }

  /** Resolves when Redis has taken them, or they are dropped; some at a time, so that the bound drops none. */
  async remember(...questions: readonly StoredQuestion[]): Promise<void> {
    for (let from = 0; from < questions.length; from += 100) {
      const some = questions.slice(from, from + 100);
      const before = this.#remembers();
      for (const question of some) this.rememberNow(question);
      await until(() => this.#remembers() === before + some.length);
    }
  }

  rememberNow(question: StoredQuestion): void {
    this.#send({ kind: "store.remember", question });
  }

  #remembers(): number {
    const { remembered, remembersDropped, remembersFailed } = this.store.stats();
    return remembered + remembersDropped + remembersFailed;
  }

  forget({ entryId, scope, tenant }: StoredQuestion): void {
    this.#send({ kind: "store.forget", entryId, scope, tenant });
  }

  nearest(scope: string, vector: Float32Array, similarityMin = 0.9, count = 3): Promise<Recalled> {
    return this.#ask((replyTo) => ({
      kind: "store.nearest",
      scope,
      vector,
      similarityMin,
      count,
      replyTo,
    }));
  }

  recall(bucket: number, cursor = ""): Promise<Recalled> {
    return this.#ask((replyTo) => ({ kind: "store.recall", bucket, cursor, replyTo }));
  }

  /** All pages of a bucket. */
  async recallAll(bucket: number): Promise<{ questions: StoredQuestion[]; pages: number[] }> {
    const questions: StoredQuestion[] = [];
    const pages: number[] = [];
    let cursor: string | undefined = "";
    while (cursor !== undefined) {
      const page: Recalled = await this.recall(bucket, cursor);
      questions.push(...page.questions);
      pages.push(page.questions.length);
      cursor = page.cursor;
    }
    return { questions, pages };
  }
}
