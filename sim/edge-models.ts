/**
 * The edges of one simulated gateway: the same messages and clocks as the live ones, over modelled nodes.
 *
 * - `UpstreamModel` runs attempts as transport/upstream.ts does: connect, first token, stall and total clocks, a sign
 *   of life every 5 s, aborts that reach the node at once, probes of one token.
 * - `ScraperModel` reads metrics and health with interval and jitter; what it reads is a little old on arrival.
 * - `FrontModel` is the gateway's side of the clients; `StoreModel` the shared copy of the cache.
 *
 * A `DataPlane` carries what bodies carry in production: what the node will be asked, with the length of its answer.
 * No message holds that length: actors see it when it is over. Nothing here decides anything.
 */
import type {
  FrontCommand,
  ScraperCommand,
  ScraperEvent,
  StoreCommand,
  StoreGot,
  UpstreamCommand,
  UpstreamEvent,
  UpstreamFailure,
} from "../actors/edges.ts";
import type { ErrorCode } from "../actors/errors.ts";
import type {
  LeaseId,
  NodeId,
  RequestId,
  ScrapeSample,
  StoredAnswer,
  StoredQuestion,
} from "../actors/protocol.ts";
import { type Actor, type ActorRef, type ReplyTo, unreachable } from "../runtime/actor.ts";
import type { Clock, TimerHandle } from "../runtime/clock.ts";
import type { Random } from "../runtime/random.ts";
import type { NodeEvent } from "./gpu-node-model.ts";
import type { NodeHost } from "./node-host.ts";

/** The way from an edge to the actors of its process. */
export type EdgeHost = {
  readonly clock: Clock;
  post<M>(to: ActorRef<M>, message: M): void;
  reply<R>(to: ReplyTo<R>, value: R): void;
};

/** Delays of the modelled network and servers, µs of simulated time. */
export type EdgeOptions = {
  /** From a gateway's decision until the request is in the engine: connection, HTTP, parsing. */
  connectUs: number;
  /** Until a failing server has answered with an error. */
  errorUs: number;
  /** Added by HTTP and client to each answer, and to each of its tokens; 0 until measured on a real one. */
  httpUsPerRequest: number;
  httpUsPerToken: number;
  /** Between the reading of metrics or health and its arrival. */
  scrapeUs: number;
  /** Mean time of the shared store, exponential. */
  storeUs: number;
};

export const edgeDefaults: EdgeOptions = {
  connectUs: 500,
  errorUs: 5000,
  httpUsPerRequest: 0,
  httpUsPerToken: 0,
  scrapeUs: 0,
  storeUs: 500,
};

/** What a node is asked, and (known to the node alone) how it will answer. */
export type Body = {
  promptTokens: number;
  maxTokens: number;
  outputTokens: number;
  prefix: readonly number[];
  /** Tokens of one block of `prefix`. */
  blockTokens: number;
  model: string;
  /** Why the answer may not be kept; absent when it may. */
  notStorable?: string;
};

/** Bodies by request, from the client's sending until the flight that it led is over. */
export type DataPlane = Map<RequestId, Body>;

type Start = Extract<UpstreamCommand, { kind: "upstream.start" }>;

/** As in transport/upstream.ts: between two signs of life of an attempt. */
const PROGRESS_US = 5_000_000;
/** A stream that is cut breaks within this time of its first token. */
const CUT_US_MAX = 2_000_000;
/** Size of an answer's JSON: what surrounds the text, and per token. */
const ANSWER_BYTES = 400;
const BYTES_PER_TOKEN = 4.5;
const NO_BYTES = new Uint8Array(0);

// ---- upstream ---------------------------------------------------------------------------------------

export class UpstreamModel implements Actor<UpstreamCommand> {
  readonly options: EdgeOptions;
  readonly host: EdgeHost;
  readonly data: DataPlane;
  readonly #nodes: ReadonlyMap<NodeId, NodeHost>;
  readonly #attempts = new Map<LeaseId, Attempt>();
  readonly #onBeat = (): void => this.#beat();
  #heartbeat: TimerHandle | undefined; // Runs while there are attempts.
  #probes = 0;
  /** Names this process in ids on the nodes, which all processes share. */
  readonly #name: string;

  constructor(
    name: string,
    options: EdgeOptions,
    host: EdgeHost,
    data: DataPlane,
    nodes: ReadonlyMap<NodeId, NodeHost>,
  ) {
    this.#name = name;
    this.options = options;
    this.host = host;
    this.data = data;
    this.#nodes = nodes;
  }

  /** Attempts running now. */
  get inflight(): number {
    return this.#attempts.size;
  }

  receive(command: UpstreamCommand): void {
    switch (command.kind) {
      case "upstream.start":
        return this.#onStart(command);
      case "upstream.abort":
        return this.#attempts.get(command.leaseId)?.abort();
      case "upstream.abort_all":
        return this.abortAll();
      case "upstream.probe":
        return this.#onProbe(command);
      default:
        return unreachable(command);
    }
  }

  /** Every connection breaks, and no event follows: also when the process ends. */
  abortAll(): void {
    for (const attempt of [...this.#attempts.values()]) attempt.abort();
    if (this.#heartbeat !== undefined) this.host.clock.cancel(this.#heartbeat);
    this.#heartbeat = undefined;
  }

  ended(leaseId: LeaseId): void {
    this.#attempts.delete(leaseId);
  }

  #onStart(start: Start): void {
    if (this.#attempts.has(start.leaseId)) return; // A duplicate: the first one answers.
    const node = this.#nodes.get(start.node);
    const body = this.data.get(start.requestId);
    const fail = (failure: UpstreamFailure, detail: string) =>
      this.host.post(start.replyTo, failed(start.leaseId, failure, false, 0, detail));
    if (body === undefined) return fail("client_error", "the request's body is gone");
    if (node === undefined) return fail("connect", "the node is not configured");
    this.#attempts.set(start.leaseId, new Attempt(start, body, node, this));
    this.#heartbeat ??= this.host.clock.schedule(PROGRESS_US, this.#onBeat);
  }

  #beat(): void {
    this.#heartbeat = undefined;
    for (const attempt of this.#attempts.values()) attempt.report();
    if (this.#attempts.size === 0) return;
    this.#heartbeat = this.host.clock.schedule(PROGRESS_US, this.#onBeat);
  }

  #onProbe(probe: Extract<UpstreamCommand, { kind: "upstream.probe" }>): void {
    const { clock } = this.host;
    const node = this.#nodes.get(probe.node);
    const answer = (answered: boolean, detail: string): void =>
      this.host.reply(probe.replyTo, { answered, detail });
    if (node?.isReachable !== true) return answer(false, "no connection");
    const error = node.faults.errors.find(({ share, random }) => random.next() < share);
    if (error !== undefined) return answer(error.status < 500, `status ${error.status}`);
    const id = `${this.#name} probe ${this.#probes++}`;
    const timer = clock.schedule(Math.round(probe.timeoutMs * 1000), () => {
      node.cancel(id);
      answer(false, "timeout");
    });
    node.submit(
      { id, promptTokens: 8, maxTokens: 1, outputTokens: 1 },
      {
        onNodeEvent: ({ kind }) => {
          if (kind === "first_token" || kind === "preempted") return;
          clock.cancel(timer);
          answer(kind === "finished", kind);
        },
        onStandStill: () => {},
      },
    );
  }
}

/** One attempt: connecting → running → answering → over. */
class Attempt {
  readonly #start: Start;
  readonly #body: Body;
  readonly #node: NodeHost;
  readonly #edge: UpstreamModel;
  readonly #startedUs: number;
  readonly #onTimer = (): void => this.#onClock();
  #state: "connecting" | "running" | "over" = "connecting";
  /** Of the next thing to happen that the node does not tell: connected, an error's arrival, a cut, an end. */
  #step: TimerHandle | undefined;
  /** The clocks: one timer, moved lazily. */
  #timer: TimerHandle;
  #firstAtUs = -1;
  #cachedTokens = 0;
  /** Content stands still since then, and so many tokens were there; -1 while it flows. */
  #stillSinceUs = -1;
  #stillTokens = 0;

  constructor(start: Start, body: Body, node: NodeHost, edge: UpstreamModel) {
    this.#start = start;
    this.#body = body;
    this.#node = node;
    this.#edge = edge;
    const { clock } = edge.host;
    this.#startedUs = clock.nowUs();
    this.#timer = clock.schedule(usOf(Math.min(start.firstTokenMs, start.totalMs)), this.#onTimer);
    this.#step = clock.schedule(edge.options.connectUs, () => this.#onConnected());
  }

  abort(): void {
    if (this.#state === "over") return;
    this.#leaveNode();
    this.#end();
  }

  /** The attempt lives: that keeps its lease. */
  report(): void {
    const { leaseId, replyTo } = this.#start;
    const outputTokens = this.#state === "running" ? this.#node.producedTokens(leaseId) : 0;
    if (this.#state === "over") return;
    this.#post(replyTo, { kind: "upstream.progress", leaseId, outputTokens });
  }

  #onConnected(): void {
    const node = this.#node;
    this.#step = undefined;
    if (!node.isReachable) return this.#fail("connect", "connection refused");
    for (const { share, random, status } of node.faults.errors) {
      if (random.next() >= share) continue;
      this.#later(this.#edge.options.errorUs, () => this.#failWithStatus(status));
      return;
    }
    const { promptTokens, maxTokens, outputTokens, prefix, blockTokens } = this.#body;
    this.#state = "running";
    node.submit(
      {
        id: this.#start.leaseId,
        promptTokens,
        maxTokens,
        outputTokens,
        ...(blockTokens === node.prefixBlockTokens ? { prefixBlocks: prefix } : {}),
      },
      this,
    );
  }

  onNodeEvent(event: NodeEvent): void {
    const { httpUsPerRequest, httpUsPerToken } = this.#edge.options;
    switch (event.kind) {
      case "first_token":
        this.#firstAtUs = event.atUs;
        this.#cachedTokens = event.cachedTokens;
        if (httpUsPerRequest === 0) this.#postFirstToken();
        else this.#later(httpUsPerRequest, () => this.#postFirstToken());
        return this.#drawCut();
      case "finished": {
        const afterUs = httpUsPerRequest + Math.round(httpUsPerToken * event.outputTokens);
        if (afterUs === 0) return this.#finish(event.outputTokens);
        return this.#later(afterUs, () => this.#finish(event.outputTokens));
      }
      case "preempted":
        return this.onStandStill();
      case "lost":
        return this.#fail(
          this.#firstAtUs < 0 ? "connect" : "broken_stream",
          "the connection was reset",
        );
      case "refused_never_fits":
        return this.#fail("client_error", "prompt and max_tokens exceed the KV memory", 400);
      default:
        return unreachable(event);
    }
  }

  #postFirstToken(): void {
    const { leaseId, replyTo } = this.#start;
    this.#post(replyTo, { kind: "upstream.first_token", leaseId });
  }

  #drawCut(): void {
    for (const { share, random } of this.#node.faults.cuts) {
      if (random.next() >= share) continue;
      const afterUs = Math.round(random.next() * CUT_US_MAX);
      return this.#later(afterUs, () => this.#fail("broken_stream", "connection broke off"));
    }
  }

  #finish(outputTokens: number): void {
    const { leaseId, replyTo } = this.#start;
    const { promptTokens, model, notStorable } = this.#body;
    const decodeMs = (this.#edge.host.clock.nowUs() - this.#firstAtUs) / 1000;
    const cachedTokens = this.#cachedTokens;
    const { totals } = this.#node;
    totals.promptTokens += promptTokens;
    totals.cachedTokens += cachedTokens;
    totals.outputTokens += outputTokens;
    this.#end();
    this.#post(replyTo, {
      kind: "upstream.finished",
      leaseId,
      usage: { promptTokens, cachedTokens, outputTokens },
      decodeMs,
      ...(notStorable === undefined
        ? { answer: answerOf(model, promptTokens, outputTokens) }
        : { notStorable }),
    });
  }

  #failWithStatus(status: number): void {
    this.#fail(failureOfStatus(status), `status ${status}`, status);
  }

  #fail(failure: UpstreamFailure, detail: string, status?: number): void {
    if (this.#state === "over") return;
    const { leaseId, replyTo } = this.#start;
    const outputTokens = this.#state === "running" ? this.#node.producedTokens(leaseId) : 0;
    const committed = this.#firstAtUs >= 0;
    this.#leaveNode();
    this.#end();
    this.#post(replyTo, failed(leaseId, failure, committed, outputTokens, detail, status));
  }

  /** Tokens stop at a preemption and at a hang alone: the stall clock is wound then. */
  onStandStill(): void {
    if (this.#firstAtUs < 0 || this.#state === "over") return;
    this.#stillSinceUs = this.#edge.host.clock.nowUs();
    this.#stillTokens = this.#node.producedTokens(this.#start.leaseId);
    this.#wind();
  }

  #onClock(): void {
    const { leaseId, firstTokenMs, stallMs, totalMs } = this.#start;
    const sinceStartUs = this.#edge.host.clock.nowUs() - this.#startedUs;
    if (this.#firstAtUs < 0 && sinceStartUs >= usOf(firstTokenMs) && firstTokenMs < totalMs) {
      return this.#fail("first_token_timeout", `no token within ${firstTokenMs} ms`);
    }
    if (sinceStartUs >= usOf(totalMs)) return this.#fail("total_timeout", `after ${totalMs} ms`);
    if (this.#stillSinceUs >= 0) {
      const flows = this.#node.producedTokens(leaseId) > this.#stillTokens;
      if (flows) this.#stillSinceUs = -1;
      else if (this.#edge.host.clock.nowUs() - this.#stillSinceUs >= usOf(stallMs)) {
        return this.#fail("stalled", `no token for ${stallMs} ms`);
      }
    }
    this.#wind();
  }

  #wind(): void {
    const { clock } = this.#edge.host;
    const { firstTokenMs, stallMs, totalMs } = this.#start;
    const nowUs = clock.nowUs();
    let dueUs = this.#startedUs + usOf(totalMs);
    if (this.#firstAtUs < 0) dueUs = Math.min(dueUs, this.#startedUs + usOf(firstTokenMs));
    else if (this.#stillSinceUs >= 0) dueUs = Math.min(dueUs, this.#stillSinceUs + usOf(stallMs));
    clock.cancel(this.#timer);
    this.#timer = clock.schedule(Math.max(1, dueUs - nowUs), this.#onTimer);
  }

  #leaveNode(): void {
    if (this.#state === "running") this.#node.cancel(this.#start.leaseId);
  }

  #end(): void {
    const { clock } = this.#edge.host;
    this.#state = "over";
    clock.cancel(this.#timer);
    if (this.#step !== undefined) clock.cancel(this.#step);
    this.#edge.ended(this.#start.leaseId);
  }

  /** What comes when the attempt is over by then does not come. */
  #later(afterUs: number, step: () => void): void {
    this.#step = this.#edge.host.clock.schedule(afterUs, () => {
      if (this.#state !== "over") step();
    });
  }

  #post(to: ActorRef<UpstreamEvent>, event: UpstreamEvent): void {
    this.#edge.host.post(to, event);
  }
}

function failed(
  leaseId: LeaseId,
  failure: UpstreamFailure,
  committed: boolean,
  outputTokens: number,
  detail: string,
  status?: number,
): UpstreamEvent {
  return {
    kind: "upstream.failed",
    leaseId,
    failure,
    committed,
    outputTokens,
    ...(status === undefined ? {} : { status }),
    detail,
  };
}

/** As transport/upstream-failure.ts judges a status without text. */
function failureOfStatus(status: number): UpstreamFailure {
  if (status === 429) return "overloaded";
  if ([401, 403, 408, 502, 503, 504].includes(status)) return "unavailable";
  return status === 424 || status >= 500 ? "server_error" : "client_error";
}

function answerOf(model: string, promptTokens: number, outputTokens: number): StoredAnswer {
  const bytes = Math.round(ANSWER_BYTES + BYTES_PER_TOKEN * outputTokens);
  return { body: NO_BYTES, bytes, route: "chat", model, promptTokens, outputTokens };
}

function usOf(ms: number): number {
  return Math.round(ms * 1000);
}

// ---- scraper ----------------------------------------------------------------------------------------

export type ScrapeOptions = {
  metricsIntervalMs: number;
  healthIntervalMs: number;
  /** Share added to or taken from every interval. */
  jitterRatio: number;
};

export class ScraperModel implements Actor<ScraperCommand> {
  readonly #options: ScrapeOptions & { scrapeUs: number };
  readonly #host: EdgeHost;
  readonly #nodes: ReadonlyMap<NodeId, NodeHost>;
  readonly #random: Random;
  readonly #watches = new Map<NodeId, NodeWatch>();

  constructor(
    options: ScrapeOptions & { scrapeUs: number },
    host: EdgeHost,
    nodes: ReadonlyMap<NodeId, NodeHost>,
    random: Random,
  ) {
    this.#options = options;
    this.#host = host;
    this.#nodes = nodes;
    this.#random = random;
  }

  receive(command: ScraperCommand): void {
    switch (command.kind) {
      case "scraper.add": {
        this.#stop(command.node);
        const node = this.#nodes.get(command.node);
        if (node === undefined) return;
        const random = this.#random.split(command.node);
        const watch = new NodeWatch(node, command.replyTo, this.#options, this.#host, random);
        this.#watches.set(command.node, watch);
        return;
      }
      case "scraper.remove":
        return this.#stop(command.node);
      default:
        return unreachable(command);
    }
  }

  close(): void {
    for (const node of [...this.#watches.keys()]) this.#stop(node);
  }

  #stop(node: NodeId): void {
    this.#watches.get(node)?.stop();
    this.#watches.delete(node);
  }
}

/** Looks at one node until it is stopped. */
class NodeWatch {
  readonly #node: NodeHost;
  readonly #to: ActorRef<ScraperEvent>;
  readonly #options: ScrapeOptions & { scrapeUs: number };
  readonly #host: EdgeHost;
  readonly #random: Random;
  readonly #onMetrics = (): void => this.#readMetrics();
  readonly #onHealth = (): void => this.#checkHealth();
  readonly #onArrived = (): void => this.#deliver();
  #metricsTimer: TimerHandle;
  #healthTimer: TimerHandle;
  #arrivalTimer: TimerHandle | undefined;
  /** Read and on its way: in order, each due `scrapeUs` after it was read. */
  #underWay: { atUs: number; event: ScraperEvent }[] = [];

  constructor(
    node: NodeHost,
    to: ActorRef<ScraperEvent>,
    options: ScrapeOptions & { scrapeUs: number },
    host: EdgeHost,
    random: Random,
  ) {
    this.#node = node;
    this.#to = to;
    this.#options = options;
    this.#host = host;
    this.#random = random;
    this.#send({ kind: "scraper.models", models: node.models, adapters: [] });
    // The first readings fall anywhere in their interval, so that nodes are not read in step.
    const { clock } = host;
    this.#metricsTimer = clock.schedule(
      Math.round(options.metricsIntervalMs * 1000 * random.next()),
      this.#onMetrics,
    );
    this.#healthTimer = clock.schedule(
      Math.round(options.healthIntervalMs * 1000 * random.next()),
      this.#onHealth,
    );
  }

  stop(): void {
    const { clock } = this.#host;
    clock.cancel(this.#metricsTimer);
    clock.cancel(this.#healthTimer);
    if (this.#arrivalTimer !== undefined) clock.cancel(this.#arrivalTimer);
    this.#underWay = [];
  }

  #readMetrics(): void {
    const node = this.#node;
    this.#send(
      node.isReachable
        ? { kind: "scraper.sampled", sample: sampleOf(node) }
        : { kind: "scraper.failed", reason: "no connection" },
    );
    this.#metricsTimer = this.#after(this.#options.metricsIntervalMs, this.#onMetrics);
  }

  #checkHealth(): void {
    const ok = this.#node.isReachable;
    this.#send({ kind: "scraper.health", ok, detail: ok ? "status 200" : "no connection" });
    this.#healthTimer = this.#after(this.#options.healthIntervalMs, this.#onHealth);
  }

  #after(intervalMs: number, fn: () => void): TimerHandle {
    const factor = 1 + this.#options.jitterRatio * (2 * this.#random.next() - 1);
    return this.#host.clock.schedule(Math.round(intervalMs * 1000 * factor), fn);
  }

  #send(event: ScraperEvent): void {
    const { clock } = this.#host;
    if (this.#options.scrapeUs === 0) return this.#host.post(this.#to, event);
    this.#underWay.push({ atUs: clock.nowUs() + this.#options.scrapeUs, event });
    this.#arrivalTimer ??= clock.schedule(this.#options.scrapeUs, this.#onArrived);
  }

  #deliver(): void {
    const { clock } = this.#host;
    this.#arrivalTimer = undefined;
    for (let next = this.#underWay[0]; next !== undefined; next = this.#underWay[0]) {
      if (next.atUs > clock.nowUs()) {
        this.#arrivalTimer = clock.schedule(next.atUs - clock.nowUs(), this.#onArrived);
        return;
      }
      this.#underWay.shift();
      this.#host.post(this.#to, next.event);
    }
  }
}

/** As vLLM's metrics tell it (no bound on sequences), or as the article's JSON does. */
function sampleOf(node: NodeHost): ScrapeSample {
  const { running, waiting, kv, generatedTokensTotal, preemptionsTotal } = node.snapshot();
  if (node.metrics === "article") {
    const { latencySeconds } = node;
    return { engine: "article", waiting, latencySeconds, gpuMemory: kv, missing: [] };
  }
  return {
    engine: "vllm",
    running,
    waiting,
    kv,
    generatedTokensTotal,
    preemptionsTotal,
    missing: [],
  };
}

// ---- front ------------------------------------------------------------------------------------------

/** What clients are told by their gateway; how their requests end, the request's own record says. */
export type ClientSide = {
  /** Reads the answer of a flight that another request leads. */
  onFollowing(requestId: RequestId): void;
  onRefused(requestId: RequestId, code: ErrorCode, retryAfterMs: number | undefined): void;
  /** The request actor restarted: what it held is gone. */
  onRequestsLost(): void;
  /** Told to read a flight whose bytes are forgotten: a broken promise of the actors. */
  onLateAttach(requestId: RequestId): void;
};

export class FrontModel implements Actor<FrontCommand> {
  readonly #data: DataPlane;
  readonly #clients: ClientSide;
  #requestsStarted = false;

  constructor(data: DataPlane, clients: ClientSide) {
    this.#data = data;
    this.#clients = clients;
  }

  receive(command: FrontCommand): void {
    switch (command.kind) {
      case "front.answer":
        return;
      case "front.attach":
        if (!this.#data.has(command.flightId)) this.#clients.onLateAttach(command.requestId);
        if (command.flightId !== command.requestId) this.#clients.onFollowing(command.requestId);
        return;
      case "front.ask_again":
        return; // Judging costs a node what its share of hits says, which no trace tells.
      case "front.refuse":
        return this.#clients.onRefused(command.requestId, command.code, command.retryAfterMs);
      case "front.forget":
        this.#data.delete(command.requestId);
        return;
      case "front.requests_lost":
        // The first one tells only that the request actor has started.
        if (this.#requestsStarted) this.#clients.onRequestsLost();
        this.#requestsStarted = true;
        return;
      default:
        return unreachable(command);
    }
  }
}

// ---- store ------------------------------------------------------------------------------------------

/** Answers that a shared store keeps; the oldest goes first. Redis would bound bytes; this bounds memory here. */
const ENTRIES_MAX = 200_000;

/** The one store behind all gateways of a simulation. */
export class SharedStore {
  readonly #entries = new Map<string, { answer: StoredAnswer; untilUs: number }>();
  readonly #questions = new Map<string, { question: StoredQuestion; atUs: number }>();
  /** What is wrong with it, if anything. */
  fault: "none" | "down" | "hang" = "none";

  get(key: string, nowUs: number): StoreGot {
    const entry = this.#entries.get(key);
    if (entry === undefined || entry.untilUs <= nowUs) return { ttlMs: 0 };
    return { answer: entry.answer, ttlMs: (entry.untilUs - nowUs) / 1000 };
  }

  put(key: string, answer: StoredAnswer, untilUs: number): void {
    this.#entries.delete(key);
    this.#entries.set(key, { answer, untilUs });
    if (this.#entries.size <= ENTRIES_MAX) return;
    const oldest = this.#entries.keys().next();
    if (!oldest.done) this.#entries.delete(oldest.value);
  }

  clear(): number {
    const { size } = this.#entries;
    this.#entries.clear();
    this.#questions.clear();
    return size;
  }

  remember(question: StoredQuestion, nowUs: number): void {
    this.#questions.set(question.entryId, { question, atUs: nowUs });
    if (this.#questions.size <= ENTRIES_MAX) return;
    const oldest = this.#questions.keys().next();
    if (!oldest.done) this.#questions.delete(oldest.value);
  }

  forget(entryId: string): void {
    this.#questions.delete(entryId);
  }

  /** Those that `picks` wants and whose life is not over. */
  recall(picks: (question: StoredQuestion) => boolean, nowUs: number): StoredQuestion[] {
    const recalled: StoredQuestion[] = [];
    for (const { question, atUs } of this.#questions.values()) {
      const ageMs = (nowUs - atUs) / 1000;
      if (ageMs >= question.ttlMs || !picks(question)) continue;
      recalled.push({ ...question, ageMs, ttlMs: question.ttlMs - ageMs });
    }
    return recalled;
  }
}

/** One gateway's connection to the store. Down: every question is a miss at once. Hung: none is answered. */
export class StoreModel implements Actor<StoreCommand> {
  readonly #store: SharedStore;
  readonly #meanUs: number;
  readonly #host: EdgeHost;
  readonly #random: Random;

  constructor(store: SharedStore, meanUs: number, host: EdgeHost, random: Random) {
    this.#store = store;
    this.#meanUs = meanUs;
    this.#host = host;
    this.#random = random;
  }

  receive(command: StoreCommand): void {
    const store = this.#store;
    const { clock } = this.#host;
    const afterUs = Math.round(-Math.log(1 - this.#random.next()) * this.#meanUs);
    if (store.fault === "hang") return;
    switch (command.kind) {
      case "store.get":
        if (store.fault === "down") return this.#host.reply(command.replyTo, { ttlMs: 0 });
        clock.schedule(afterUs, () =>
          this.#host.reply(command.replyTo, store.get(command.key, clock.nowUs())),
        );
        return;
      case "store.put": {
        if (store.fault === "down") return;
        const { key, answer, ttlMs } = command;
        clock.schedule(afterUs, () => store.put(key, answer, clock.nowUs() + usOf(ttlMs)));
        return;
      }
      case "store.purge":
        return this.#host.reply(command.replyTo, {
          removed: store.fault === "down" ? 0 : store.clear(),
        });
      case "store.remember":
        if (store.fault !== "down") store.remember(command.question, clock.nowUs());
        return;
      case "store.forget":
        return store.forget(command.entryId);
      case "store.recall": {
        const { bucket, replyTo } = command;
        if (store.fault === "down") return; // No answer: it is asked again.
        const isOfBucket = ({ scope }: StoredQuestion): boolean =>
          Number.parseInt(scope.slice(0, 3), 16) === bucket;
        const questions = store.recall(isOfBucket, clock.nowUs());
        clock.schedule(afterUs, () => this.#host.reply(replyTo, { questions }));
        return;
      }
      case "store.nearest": {
        const { scope, vector, similarityMin, count, replyTo } = command;
        if (store.fault === "down") return this.#host.reply(replyTo, { questions: [] });
        const near = store
          .recall((question) => question.scope === scope, clock.nowUs())
          .map((question) => ({ question, similarity: dot(question.vector, vector) }))
          .filter(({ similarity }) => similarity >= similarityMin)
          .sort((left, right) => right.similarity - left.similarity)
          .slice(0, count);
        const questions = near.map(({ question }) => question);
        clock.schedule(afterUs, () => this.#host.reply(replyTo, { questions }));
        return;
      }
      default:
        return unreachable(command);
    }
  }
}

function dot(left: Float32Array, right: Float32Array): number {
  return left.reduce((sum, value, at) => sum + value * (right[at] ?? 0), 0);
}
