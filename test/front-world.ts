/**
 * A gateway in virtual time with its real client side: the shipping front with its reader of requests, and all shipping
 * actors, on the simulator's scheduler. Nodes and embedder are models.
 *
 *     const world = new FrontWorld({ answer: (asked) => `said to ${asked.text}` });
 *     const reply = world.chat({ model: MODEL, messages: [{ role: "user", content: "Hello" }] });
 *     world.run(1000);
 *     expect(reply.content).toBe("said to Hello");
 */
import type { CacheDescription, CacheMessage } from "../actors/cache.ts";
import type {
  EmbedderCommand,
  ScraperCommand,
  StoreCommand,
  UpstreamCommand,
  UpstreamEvent,
} from "../actors/edges.ts";
import { GatewayRefs, gatewayTree } from "../actors/gateway.ts";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import type { RequestRecord, StoredAnswer } from "../actors/protocol.ts";
import type { RequestFinished } from "../actors/request.ts";
import type { Actor, Context, RuntimeEvent } from "../runtime/actor.ts";
import { SimClock } from "../runtime/clock.ts";
import { Random } from "../runtime/random.ts";
import { SimScheduler } from "../runtime/sim-scheduler.ts";
import { type ActorSystem, createSystem, type SystemEvent } from "../runtime/system.ts";
import { readOptions } from "../transport/config.ts";
import { Answer, DataPlane } from "../transport/data-plane.ts";
import {
  type Exchange,
  Front,
  type FrontOptions,
  type Incoming,
  type Sink,
} from "../transport/front.ts";
import { KeyTable } from "../transport/keys.ts";
import type { OptionsInput } from "../transport/options.ts";
import { gatewaySettings } from "../transport/settings.ts";

export const MODEL = "m";

/** A chat request as its body says it. */
export type Asked = {
  model: string;
  messages: readonly { role: string; content: string }[];
  [field: string]: unknown;
};

/** What a client got. */
export class Reply implements Sink {
  readonly requestId: string;
  status = 0;
  headers: Readonly<Record<string, string>> = {};
  body = "";
  /** Heads that came: more than one is a defect. */
  heads = 0;
  ended = false;
  exchange: Exchange | undefined;

  constructor(requestId: string) {
    this.requestId = requestId;
  }

  whole(status: number, headers: string[], body: Uint8Array): void {
    this.head(status, headers);
    this.write(body);
    this.end();
  }

  head(status: number, headers: string[]): void {
    this.heads++;
    this.status = status;
    this.headers = Object.fromEntries(
      headers.flatMap((name, at) => (at % 2 === 0 ? [[name, headers[at + 1] ?? ""]] : [])),
    );
  }

  write(bytes: Uint8Array): boolean {
    this.body += Buffer.from(bytes).toString();
    return true;
  }

  end(): void {
    this.ended = true;
  }

  destroy(): void {
    this.ended = true;
  }

  get cache(): string {
    return this.headers["x-headrace-cache"] ?? "";
  }

  /** The answer's text, whole or streamed. */
  get content(): string {
    if (!this.body.startsWith("data: ")) return JSON.parse(this.body).choices[0].message.content;
    const events = this.body.split("\n\n").filter((event) => event.startsWith("data: {"));
    return events
      .map((event) => JSON.parse(event.slice(6)).choices[0]?.delta.content ?? "")
      .join("");
  }
}

export type FrontWorldOptions = {
  /** What the nodes answer; `requestId` names the request whose body they were sent. */
  answer: (asked: Asked, requestId: string) => string;
  /** Of a generation, ms; default 30. */
  answerMs?: () => number;
  options?: Partial<OptionsInput>;
  models?: readonly string[];
  embedder?: () => Actor<EmbedderCommand>;
  store?: () => Actor<StoreCommand>;
  seed?: number;
};

/** Answers at once, as the built-in embedder does. */
export class LexicalModel implements Actor<EmbedderCommand> {
  readonly #embedder = new LexicalEmbedder(128);

  receive(message: EmbedderCommand, context: Context<EmbedderCommand>): void {
    if (message.kind === "embedder.embed")
      context.reply(message.replyTo, {
        kind: "vector",
        vector: this.#embedder.embed(message.text),
      });
  }
}

type Late = { kind: "model.late"; command: Extract<EmbedderCommand, { kind: "embedder.embed" }> };

/** Answers after `afterMs`, or (infinite) never. */
export class LateEmbedder implements Actor<EmbedderCommand | Late> {
  asked = 0;
  readonly #afterMs: number;
  readonly #inner = new LexicalModel();

  constructor(afterMs: number) {
    this.#afterMs = afterMs;
  }

  receive(message: EmbedderCommand | Late, context: Context<EmbedderCommand | Late>): void {
    if (message.kind === "model.late") return this.#inner.receive(message.command, context);
    if (message.kind !== "embedder.embed") return;
    this.asked++;
    if (this.#afterMs === Number.POSITIVE_INFINITY) return;
    const late: Late = { kind: "model.late", command: message };
    context.startTimer(`${this.asked}`, this.#afterMs, late);
  }
}

export class FrontWorld {
  readonly clock = new SimClock();
  readonly scheduler: SimScheduler;
  readonly system: ActorSystem;
  readonly refs: GatewayRefs;
  readonly front: Front;
  readonly data = new DataPlane();
  readonly records: RequestRecord[] = [];
  /** Requests that nodes were sent, with the time. */
  readonly generations: { asked: Asked; requestId: string; atMs: number }[] = [];
  readonly #world: FrontWorldOptions;
  #replies = 0;

  constructor(world: FrontWorldOptions) {
    this.#world = world;
    const seed = world.seed ?? 1;
    this.scheduler = new SimScheduler(this.clock, seed);
    this.system = createSystem({
      scheduler: this.scheduler,
      clock: this.clock,
      random: new Random(seed),
    });
    const options = readOptions({
      ...world.options,
      cache: {
        ...world.options?.cache,
        semantic: { embedder: { type: "lexical" }, ...world.options?.cache?.semantic },
      },
      nodes: [1, 2].map((at) => ({ name: `node-${at}`, url: `http://10.0.0.${at}:8000` })),
    });
    const settings = gatewaySettings(options);
    this.refs = new GatewayRefs((path) => this.system.ref(path), settings.cacheShards);
    const keys = new KeyTable(options);
    this.front = new Front(frontOptions(options), {
      data: this.data,
      nowMs: () => this.nowMs,
      idPrefix: "own",
      requests: this.refs.requests,
      post: (to, message) => void this.system.tell(to, message),
      authenticate: (key) => keys.authenticate(key),
      embedder: () => "lexical 128",
      feedback: async (entryId, tenant, isRight) => {
        const asked = this.system.ask<CacheMessage, { known: boolean }>(
          this.refs.cache.at(entryId),
          1000,
          (replyTo) => ({ kind: "cache.feedback", entryId, tenant, isRight, replyTo }),
        );
        return asked.then((outcome) => outcome.ok && outcome.value.known);
      },
      models: () => ({ names: world.models ?? [MODEL], complete: true }),
      onRefused: () => {},
    });
    const tree = gatewayTree(settings, this.refs, {
      front: () => this.front,
      upstream: () => new ModelUpstream(this),
      scraper: () => new ModelScraper(world.models ?? [MODEL]),
      embedder: world.embedder ?? (() => new LexicalModel()),
      ...(world.store === undefined ? {} : { store: world.store }),
    });
    this.system.start(tree, {
      onEvent: (event) => this.#onEvent(event),
      onFatal: (error) => {
        throw error;
      },
    });
    this.run(10); // Nodes tell their models.
  }

  #onEvent(event: SystemEvent | RuntimeEvent): void {
    if (event.kind === "request.finished") this.records.push((event as RequestFinished).record);
    if (event.kind === "runtime.crashed")
      throw (event as Extract<SystemEvent, { kind: "runtime.crashed" }>).error;
  }

  get nowMs(): number {
    return this.clock.nowUs() / 1000;
  }

  /** Sends a chat request; its answer comes while time runs. */
  chat(
    body: object,
    headers: Readonly<Record<string, string>> = {},
    own: Pick<Incoming, "as" | "vector"> = {},
  ): Reply {
    const reply = new Reply(`reply ${this.#replies++}`);
    reply.exchange = this.front.submit(
      {
        method: "POST",
        path: "/v1/chat/completions",
        query: "",
        header: (name) => headers[name],
        body: Buffer.from(JSON.stringify(body)),
        ...own,
      },
      reply,
    );
    return reply;
  }

  run(ms: number): void {
    this.scheduler.runFor(ms);
  }

  /** Forgets a tenant's answers, or all, as soon as time runs. */
  purge(tenant?: string): void {
    for (const shard of this.refs.cache.own) {
      void this.system.ask<CacheMessage, { removed: number }>(shard, 1000, (replyTo) => ({
        kind: "cache.purge",
        ...(tenant === undefined ? {} : { tenant }),
        replyTo,
      }));
    }
  }

  /** What a node makes of a request: for the model of the nodes. */
  generate(requestId: string): { answer: StoredAnswer; afterMs: number } {
    const body = Buffer.from(this.data.requests.get(requestId)?.body ?? []).toString();
    const asked = JSON.parse(body) as Asked;
    this.generations.push({ asked, requestId, atMs: this.nowMs });
    const content = this.#world.answer(asked, requestId);
    const whole = {
      id: "chatcmpl-1",
      object: "chat.completion",
      created: 1,
      model: asked.model,
      choices: [{ index: 0, message: { role: "assistant", content }, finish_reason: "stop" }],
      usage: { prompt_tokens: 10, completion_tokens: 5, total_tokens: 15 },
    };
    const bytes = Buffer.from(JSON.stringify(whole));
    const answer: StoredAnswer = {
      body: bytes,
      bytes: bytes.length,
      route: "chat",
      model: asked.model,
      promptTokens: 10,
      outputTokens: 5,
    };
    return { answer, afterMs: this.#world.answerMs?.() ?? 30 };
  }

  /** All shards' figures together. */
  async cache(): Promise<Record<string, number>> {
    const asked = this.refs.cache.own.map((shard) =>
      this.system.ask<CacheMessage, CacheDescription>(shard, 1000, (replyTo) => ({
        kind: "cache.describe",
        replyTo,
      })),
    );
    this.scheduler.runReady();
    const sum: Record<string, number> = {};
    for (const outcome of await Promise.all(asked)) {
      if (!outcome.ok) throw new Error("a shard did not answer");
      for (const [name, value] of Object.entries(outcome.value))
        if (typeof value === "number") sum[name] = (sum[name] ?? 0) + value;
    }
    return sum;
  }
}

/** As the composition root has them. */
function frontOptions({ cache, requests, timeouts }: ReturnType<typeof readOptions>): FrontOptions {
  const { mode, similarityMin, errorRateMax, strict, temperatureMax } = cache.semantic;
  return {
    requests,
    requestTimeoutMs: timeouts.requestMsDefault,
    requestTimeoutMsMax: timeouts.totalMs,
    cacheEnabled: cache.enabled,
    recordsPrefixes: false,
    recordsPrompts: false,
    ...(mode === "off"
      ? {}
      : {
          semantic: {
            policy: { mode, similarityMin, errorRateMax, isStrict: strict },
            temperatureMax,
          },
        }),
  };
}

type Due = { kind: "model.due"; leaseId: string };
type Running = { deliver: () => void; tell: () => void };

/** Nodes that answer whole, after a while. */
class ModelUpstream implements Actor<UpstreamCommand | Due> {
  readonly #world: FrontWorld;
  readonly #running = new Map<string, Running>();

  constructor(world: FrontWorld) {
    this.#world = world;
  }

  receive(message: UpstreamCommand | Due, context: Context<UpstreamCommand | Due>): void {
    switch (message.kind) {
      case "upstream.start": {
        const { leaseId, requestId, flightId, replyTo } = message;
        const { answer, afterMs } = this.#world.generate(requestId);
        const usage = { promptTokens: 10, cachedTokens: 0, outputTokens: 5 };
        const event: UpstreamEvent = {
          kind: "upstream.finished",
          leaseId,
          usage,
          decodeMs: 0,
          ...(this.#world.data.requests.get(requestId)?.storable === true
            ? { answer }
            : { notStorable: "not wanted" }),
        };
        const deliver = (): void => {
          const head = { status: 200, contentType: "application/json" };
          const flight = new Answer("whole", head, 1 << 20);
          this.#world.data.answers.set(flightId, flight);
          flight.append({ bytes: answer.body, usage: false }, () => {});
          flight.finish({ ok: true });
        };
        const tell = (): void => void this.#world.system.tell(replyTo, event);
        this.#running.set(leaseId, { deliver, tell });
        return context.startTimer(leaseId, afterMs, { kind: "model.due", leaseId });
      }
      case "upstream.abort":
        context.cancelTimer(message.leaseId);
        this.#running.delete(message.leaseId);
        return;
      case "upstream.abort_all":
        for (const leaseId of this.#running.keys()) context.cancelTimer(leaseId);
        this.#running.clear();
        return;
      case "upstream.probe":
        return context.reply(message.replyTo, { answered: true, detail: "modelled" });
      case "model.due": {
        const running = this.#running.get(message.leaseId);
        this.#running.delete(message.leaseId);
        running?.deliver();
        running?.tell();
      }
    }
  }
}

/** Nodes that are well, and say which models they have. */
class ModelScraper implements Actor<ScraperCommand> {
  readonly #models: readonly string[];

  constructor(models: readonly string[]) {
    this.#models = models;
  }

  receive(message: ScraperCommand, context: Context<ScraperCommand>): void {
    if (message.kind !== "scraper.add") return;
    context.tell(message.replyTo, { kind: "scraper.models", models: this.#models, adapters: [] });
    context.tell(message.replyTo, { kind: "scraper.health", ok: true, detail: "modelled" });
  }
}
