/**
 * A whole gateway on the simulator's scheduler: the shipping actors in the shipping tree, with modelled edges.
 * Tests drive it in virtual time and then ask whether the books balance.
 */
import type { CacheDescription, CacheMessage } from "../actors/cache.ts";
import type {
  FrontCommand,
  ScraperCommand,
  ScraperEvent,
  UpstreamCommand,
  UpstreamEvent,
  UpstreamFailure,
} from "../actors/edges.ts";
import { GatewayRefs, gatewayTree } from "../actors/gateway.ts";
import type { GpuNodeMessage, NodeDescription } from "../actors/gpu-node.ts";
import type { NodeId, RequestFacts, RequestRecord, StoredAnswer } from "../actors/protocol.ts";
import type { LimiterDescription, RateLimiterMessage } from "../actors/rate-limiter.ts";
import type { RequestDescription, RequestFinished, RequestMessage } from "../actors/request.ts";
import type { RouterDescription, RouterMessage } from "../actors/router.ts";
import type { Actor, ActorRef, Context, ReplyTo, RuntimeEvent } from "../runtime/actor.ts";
import { SimClock } from "../runtime/clock.ts";
import { Random } from "../runtime/random.ts";
import { SimScheduler } from "../runtime/sim-scheduler.ts";
import {
  type ActorSystem,
  createSystem,
  type Remote,
  type SystemEvent,
} from "../runtime/system.ts";
import { readOptions } from "../transport/config.ts";
import type { OptionsInput } from "../transport/options.ts";
import { gatewaySettings } from "../transport/settings.ts";

export const MODEL = "m";

/** How a modelled node answers one attempt. */
export type Behaviour =
  | { kind: "answers"; ttftMs: number; tokens: number; itlMs: number }
  | { kind: "fails"; afterMs: number; failure: UpstreamFailure; retryAfterMs?: number }
  | { kind: "breaks"; ttftMs: number; afterTokens: number; itlMs: number }
  | { kind: "hangs" };

export type Delivered =
  | { kind: "answer"; body: string; cache: string }
  | { kind: "attach"; flightId: string; node: string; attempts: number; cache: string }
  | { kind: "refuse"; code: string; retryAfterMs?: number };

type ModelTimer = { kind: "model.due"; leaseId: string; event: UpstreamEvent; last: boolean };

/** The upstream edge as a model: one timer per event that an attempt will bring. */
class ModelUpstream implements Actor<UpstreamCommand | ModelTimer> {
  readonly #world: World;
  readonly #running = new Map<string, { start: Start; timers: string[] }>();

  constructor(world: World) {
    this.#world = world;
  }

  get inflight(): number {
    return this.#running.size;
  }

  receive(
    message: UpstreamCommand | ModelTimer,
    context: Context<UpstreamCommand | ModelTimer>,
  ): void {
    switch (message.kind) {
      case "upstream.start":
        return this.#start(message, context);
      case "upstream.abort":
        if (this.#running.has(message.leaseId)) this.#world.aborts.push(message.leaseId);
        return this.#end(message.leaseId, context);
      case "upstream.abort_all":
        for (const leaseId of [...this.#running.keys()]) this.#end(leaseId, context);
        return;
      case "upstream.probe":
        return context.reply(message.replyTo, {
          answered: this.#world.behaviour(message.node).kind === "answers",
          detail: "modelled",
        });
      case "model.due": {
        const running = this.#running.get(message.leaseId);
        if (running === undefined) return;
        context.tell(running.start.replyTo, message.event);
        if (message.last) this.#end(message.leaseId, context);
        return;
      }
    }
  }

  #start(start: Start, context: Context<UpstreamCommand | ModelTimer>): void {
    this.#world.starts.push({ leaseId: start.leaseId, node: start.node, atMs: context.nowMs });
    this.#running.set(start.leaseId, { start, timers: [] });
    const behaviour = this.#world.behaviour(start.node);
    const { leaseId } = start;
    const failed = (afterMs: number, failure: UpstreamFailure, committed: boolean, tokens = 0) =>
      this.#later(leaseId, afterMs, context, true, {
        kind: "upstream.failed",
        leaseId,
        failure,
        committed,
        outputTokens: tokens,
        detail: "modelled",
      });
    switch (behaviour.kind) {
      case "fails":
        return failed(behaviour.afterMs, behaviour.failure, false);
      case "hangs":
        return failed(start.firstTokenMs, "first_token_timeout", false);
      case "breaks": {
        this.#firstToken(leaseId, behaviour.ttftMs, context);
        const afterMs = behaviour.ttftMs + behaviour.afterTokens * behaviour.itlMs;
        return failed(afterMs, "broken_stream", true, behaviour.afterTokens);
      }
      case "answers":
        return this.#answer(start, behaviour, context);
    }
  }

  #answer(
    start: Start,
    { ttftMs, tokens, itlMs }: Extract<Behaviour, { kind: "answers" }>,
    context: Context<UpstreamCommand | ModelTimer>,
  ): void {
    const { leaseId } = start;
    if (ttftMs > start.firstTokenMs) {
      return this.#later(leaseId, start.firstTokenMs, context, true, {
        kind: "upstream.failed",
        leaseId,
        failure: "first_token_timeout",
        committed: false,
        outputTokens: 0,
        detail: "modelled",
      });
    }
    // A whole answer has no first token: it comes at once, at its end.
    if (start.firstTokenMs < start.totalMs) this.#firstToken(leaseId, ttftMs, context);
    const body = Buffer.from(`answer of ${this.#world.keyOf(start.requestId)}`);
    const answer: StoredAnswer = {
      body,
      bytes: body.length,
      route: "chat",
      model: MODEL,
      promptTokens: 10,
      outputTokens: tokens,
    };
    this.#later(leaseId, ttftMs + (tokens - 1) * itlMs, context, true, {
      kind: "upstream.finished",
      leaseId,
      usage: { promptTokens: 10, cachedTokens: 0, outputTokens: tokens },
      decodeMs: (tokens - 1) * itlMs,
      answer,
    });
  }

  #firstToken(
    leaseId: string,
    afterMs: number,
    context: Context<UpstreamCommand | ModelTimer>,
  ): void {
    this.#later(leaseId, afterMs, context, false, { kind: "upstream.first_token", leaseId });
  }

  #later(
    leaseId: string,
    afterMs: number,
    context: Context<UpstreamCommand | ModelTimer>,
    last: boolean,
    event: UpstreamEvent,
  ): void {
    const running = this.#running.get(leaseId);
    const key = `${leaseId} ${running?.timers.length}`;
    running?.timers.push(key);
    context.startTimer(key, afterMs, { kind: "model.due", leaseId, event, last });
  }

  #end(leaseId: string, context: Context<UpstreamCommand | ModelTimer>): void {
    for (const key of this.#running.get(leaseId)?.timers ?? []) context.cancelTimer(key);
    this.#running.delete(leaseId);
  }
}

type Start = Extract<UpstreamCommand, { kind: "upstream.start" }>;

class ModelFront implements Actor<FrontCommand> {
  readonly delivered = new Map<string, Delivered[]>();
  readonly forgotten = new Set<string>();
  /** Told to read a flight whose bytes had been forgotten: must stay empty. */
  readonly lateAttaches: string[] = [];
  /** Reads a flight of another peer. */
  onRelay: (requestId: string, flightId: string) => void = () => {};

  receive(message: FrontCommand): void {
    switch (message.kind) {
      case "front.answer":
        return this.#add(message.requestId, {
          kind: "answer",
          body: Buffer.from(message.answer.body).toString(),
          cache: message.facts.cache,
        });
      case "front.attach":
        if (this.forgotten.has(message.flightId)) this.lateAttaches.push(message.requestId);
        if (message.flightId.includes("/")) this.onRelay(message.requestId, message.flightId);
        return this.#add(message.requestId, {
          kind: "attach",
          flightId: message.flightId,
          node: message.facts.node ?? "",
          attempts: message.facts.attempts,
          cache: message.facts.cache,
        });
      case "front.refuse":
        return this.#add(message.requestId, {
          kind: "refuse",
          code: message.code,
          ...(message.retryAfterMs === undefined ? {} : { retryAfterMs: message.retryAfterMs }),
        });
      case "front.forget":
        this.forgotten.add(message.requestId);
        return;
      case "front.requests_lost":
        return;
    }
  }

  #add(requestId: string, what: Delivered): void {
    const list = this.delivered.get(requestId) ?? [];
    list.push(what);
    this.delivered.set(requestId, list);
  }
}

class ModelScraper implements Actor<ScraperCommand | { kind: "model.check" }> {
  readonly #world: World;
  readonly #watched = new Map<NodeId, ActorRef<ScraperEvent>>();

  constructor(world: World) {
    this.#world = world;
  }

  receive(
    message: ScraperCommand | { kind: "model.check" },
    context: Context<ScraperCommand | { kind: "model.check" }>,
  ): void {
    switch (message.kind) {
      case "scraper.add":
        this.#watched.set(message.node, message.replyTo);
        context.tell(message.replyTo, { kind: "scraper.models", models: [MODEL], adapters: [] });
        context.startTimer("check", 1000, { kind: "model.check" });
        return;
      case "scraper.remove":
        this.#watched.delete(message.node);
        return;
      case "model.check":
        for (const [node, ref] of this.#watched) {
          const ok = this.#world.behaviour(node).kind === "answers";
          context.tell(ref, { kind: "scraper.health", ok, detail: "modelled" });
        }
        context.startTimer("check", 1000, { kind: "model.check" });
    }
  }
}

/** The books after a run: all of these are 0 when nothing was lost. */
export type Books = {
  open: number;
  leases: number;
  reservations: number;
  flights: number;
  participants: number;
  queued: number;
  upstream: number;
};

/** One process of several: with the same clock, and a way to the others. */
export type AsPeer = {
  id: string;
  clock: SimClock;
  scheduler: SimScheduler;
  nextId: () => number;
  remote: Remote;
};

export class World {
  readonly clock: SimClock;
  readonly scheduler: SimScheduler;
  readonly system: ActorSystem;
  readonly refs: GatewayRefs;
  readonly front = new ModelFront();
  readonly upstream = new ModelUpstream(this);
  readonly records: RequestRecord[] = [];
  readonly events: (SystemEvent | RuntimeEvent)[] = [];
  /** Otherwise a crash of an actor fails the test. */
  expectsCrashes = false;
  readonly aborts: string[] = [];
  readonly starts: { leaseId: string; node: NodeId; atMs: number }[] = [];
  readonly #nodes: readonly NodeId[];
  readonly #behaviours = new Map<NodeId, Behaviour>();
  readonly #keys = new Map<string, string>();
  #sequence = 0;

  constructor(
    nodes: readonly NodeId[],
    options: OptionsInput = {},
    seed: number = 1,
    peer?: AsPeer,
  ) {
    this.#nodes = nodes;
    this.clock = peer?.clock ?? new SimClock();
    this.scheduler = peer?.scheduler ?? new SimScheduler(this.clock, seed);
    this.system = createSystem({
      scheduler: this.scheduler,
      clock: this.clock,
      random: new Random(seed),
      ...(peer === undefined ? {} : { remote: peer.remote, nextId: peer.nextId }),
    });
    const settings = gatewaySettings(
      readOptions({
        ...options,
        nodes: nodes.map((name, i) => ({ name, url: `http://10.0.0.${i + 1}:8000` })),
      }),
    );
    this.refs = new GatewayRefs(
      (path) => this.system.ref(path),
      settings.cacheShards,
      peer?.id,
      peer !== undefined,
    );
    if (peer !== undefined) for (const node of nodes) this.refs.placeNode(node, peer.id);
    const tree = gatewayTree(settings, this.refs, {
      front: () => this.front,
      upstream: () => this.upstream,
      scraper: () => new ModelScraper(this),
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
    this.events.push(event);
    if (event.kind === "request.finished") this.records.push((event as RequestFinished).record);
    if (event.kind === "runtime.crashed" && !this.expectsCrashes) {
      throw (event as Extract<SystemEvent, { kind: "runtime.crashed" }>).error;
    }
  }

  behaviour(node: NodeId): Behaviour {
    return this.#behaviours.get(node) ?? { kind: "answers", ttftMs: 50, tokens: 11, itlMs: 10 };
  }

  setBehaviour(node: NodeId, behaviour: Behaviour | null): void {
    if (behaviour === null) this.#behaviours.delete(node);
    else this.#behaviours.set(node, behaviour);
  }

  keyOf(requestId: string): string {
    return this.#keys.get(requestId) ?? "nothing";
  }

  /** Sends a request; `question` decides its cache key. Returns its id. */
  submit(question: string, more: Partial<RequestFacts> = {}): string {
    const requestId = more.requestId ?? `r${this.#sequence++}`;
    const nowMs = this.clock.nowUs() / 1000;
    const key = Buffer.from(question).toString("hex").padEnd(64, "0").slice(0, 64);
    this.#keys.set(requestId, key);
    const facts: RequestFacts = {
      requestId,
      tenant: "t",
      limitKey: "k",
      limits: {},
      weight: 1,
      priority: "standard",
      route: "chat",
      model: MODEL,
      stream: true,
      cacheKey: key,
      cacheRead: true,
      cacheWrite: true,
      promptTokens: 10,
      arrivedAtMs: nowMs,
      deadlineAtMs: nowMs + 60_000,
      ...more,
    };
    this.system.tell(this.refs.requests, { kind: "request.submit", facts });
    return requestId;
  }

  leave(requestId: string): void {
    this.system.tell(this.refs.requests, { kind: "request.client_left", requestId });
  }

  run(ms: number): void {
    this.scheduler.runFor(ms);
  }

  /** Makes an actor throw: it is sent what it cannot know. */
  crash<M>(actor: ActorRef<M>): void {
    this.expectsCrashes = true;
    this.system.tell(actor as ActorRef<unknown>, { kind: "no such message" });
  }

  /** What the client of a request got, in order. */
  got(requestId: string): Delivered[] {
    return this.front.delivered.get(requestId) ?? [];
  }

  /** The one thing that it got; throws when it got nothing or more. */
  outcome(requestId: string): Delivered {
    const list = this.got(requestId);
    const [first] = list;
    if (first === undefined || list.length !== 1) {
      throw new Error(`${requestId} was answered ${list.length} times`);
    }
    return first;
  }

  async books(): Promise<Books> {
    const nodes = await Promise.all(this.#nodes.map((node) => this.node(node)));
    const shards = await Promise.all(
      this.refs.cache.own.map((shard) =>
        this.ask<CacheMessage, CacheDescription>(shard, (replyTo) => ({
          kind: "cache.describe",
          replyTo,
        })),
      ),
    );
    const router = await this.router();
    const limiter = await this.ask<RateLimiterMessage, LimiterDescription>(
      this.refs.limiter,
      (replyTo) => ({ kind: "limiter.describe", replyTo }),
    );
    const requests = await this.ask<RequestMessage, RequestDescription>(
      this.refs.requests,
      (replyTo) => ({ kind: "request.describe", replyTo }),
    );
    const sum = (numbers: number[]) => numbers.reduce((a, b) => a + b, 0);
    return {
      open: requests.open,
      leases: sum(nodes.map((node) => node.snapshot.inflight)),
      reservations: limiter.reservations,
      flights: sum(shards.map((shard) => shard.flights)),
      participants: sum(shards.map((shard) => shard.participants)),
      queued: sum(router.pools.flatMap((pool) => pool.queued.map((band) => band.waiting))),
      upstream: this.upstream.inflight,
    };
  }

  router(): Promise<RouterDescription> {
    return this.ask<RouterMessage, RouterDescription>(this.refs.router, (replyTo) => ({
      kind: "router.describe",
      replyTo,
    }));
  }

  node(node: NodeId): Promise<NodeDescription> {
    return this.ask<GpuNodeMessage, NodeDescription>(this.refs.node(node), (replyTo) => ({
      kind: "gpu_node.describe",
      replyTo,
    }));
  }

  /** For questions that are answered without time passing. */
  async ask<M, R>(to: ActorRef<M>, message: (replyTo: ReplyTo<R>) => M): Promise<R> {
    const asked = this.system.ask<M, R>(to, 1000, message);
    this.scheduler.runReady();
    const outcome = await asked;
    if (!outcome.ok) throw new Error(`${to.path} did not answer: ${outcome.failure}`);
    return outcome.value;
  }
}

/** What the books say when nothing was lost. */
export const balanced: Books = {
  open: 0,
  leases: 0,
  reservations: 0,
  flights: 0,
  participants: 0,
  queued: 0,
  upstream: 0,
};
