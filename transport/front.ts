/**
 * The client's side of every request, whatever carries it (HTTP, or a call in this process): reads and checks
 * it, hands facts to the request actor and bytes to the data plane, and writes the answer.
 *
 * It is an edge actor: commands (`front.answer`, `front.attach`, `front.refuse`, …) arrive in its mailbox; the
 * carrier calls `submit`, `drained` and `left` from outside. An exchange is waiting → answering → done; a
 * client that leaves is reported once, in either of the first two.
 */

import { hash } from "node:crypto";
import type { AnswerFacts, FrontCommand } from "../actors/edges.ts";
import type { ErrorCode } from "../actors/errors.ts";
import type {
  LimitState,
  RequestFacts,
  RequestId,
  Route,
  SemanticPolicy,
  StoredAnswer,
} from "../actors/protocol.ts";
import type { RequestMessage } from "../actors/request.ts";
import type { Actor, ActorRef } from "../runtime/actor.ts";
import { InflightMap } from "../runtime/inflight-map.ts";
import {
  type Answer,
  type AnswerEnd,
  type AnswerReader,
  type DataPlane,
  type FlightSource,
  LINGER_MS,
  type OutgoingRequest,
  type RelayedFlight,
} from "./data-plane.ts";
import { errorBody, errorHeaders, httpErrors } from "./http-errors.ts";
import type { Tenant } from "./keys.ts";
import { assembleAnswer, wholeToSse } from "./openai-answer.ts";
import {
  type AskedQuestion,
  affinityKeyOf,
  type BadRequest,
  lowerPriority,
  type ReadRequest,
  type RequestLimits,
  RequestReader,
  routes,
} from "./openai-request.ts";

/** One request as its carrier has read it. Header names are lower-case. */
export type Incoming = {
  method: string;
  /** Path without query. */
  path: string;
  /** Query with its "?", or "". */
  query: string;
  header(name: string): string | undefined;
  body: Buffer;
  /** Work of this process itself, in a tenant's name: no key is asked for. */
  as?: Tenant;
  /** Of its question, where that was embedded ahead of it. */
  vector?: Float32Array;
  /** It is asked only to judge that entry of the cache. */
  judges?: { entryId: string; similarity: number };
};

/** Where an answer goes. `headers` is a flat list: name, value, name, value, … */
export interface Sink {
  /** A whole answer in one go. */
  whole(status: number, headers: string[], body: Uint8Array): void;
  head(status: number, headers: string[]): void;
  /** False: wait for `Exchange.drained`. */
  write(bytes: Uint8Array): boolean;
  end(): void;
  /** Cuts the answer off where it is, so that the client can tell it from an ended one. */
  destroy(): void;
}

/** The carrier's handle on a submitted request. */
export interface Exchange {
  readonly requestId: RequestId;
  drained(): void;
  left(): void;
}

export type FrontOptions = {
  requests: RequestLimits;
  /** For a request that states no deadline, ms. */
  requestTimeoutMs: number;
  /** The longest deadline that a request may state, ms. */
  requestTimeoutMsMax: number;
  cacheEnabled: boolean;
  /** Compute prefix-block hashes: only while a recording runs. */
  recordsPrefixes: boolean;
  /** Keep bodies of chat requests until they end, for a recording that holds them. */
  recordsPrompts: boolean;
  /** Match questions by meaning; absent = never. Tenants may have another policy. */
  semantic?: { policy: SemanticPolicy; temperatureMax: number };
};

export type FrontDeps = {
  data: DataPlane;
  nowMs: () => number;
  /** Distinguishes request ids of this process from all others'. */
  idPrefix: string;
  requests: ActorRef<RequestMessage>;
  post: <T>(to: ActorRef<T>, message: T) => void;
  /** Of the flights of other peers; absent: there are none. */
  relays?: FlightSource;
  /** Who a key belongs to, or why not. */
  authenticate: (key: string | undefined) => Tenant | ErrorCode;
  /** Vectors of different embedders never meet; undefined while there is none. */
  embedder: () => string | undefined;
  /** A caller says whether an entry's answer was right; false for an entry that is not there (any more). */
  feedback: (entryId: string, tenant: string, isRight: boolean) => Promise<boolean>;
  /** Models that may be asked for; `complete` is false while a node has not told its models yet. */
  models: () => { names: readonly string[]; complete: boolean };
  /** A request that never became one: for metrics. */
  onRefused: (code: ErrorCode, route: RequestFacts["route"]) => void;
};

type Open = {
  readonly requestId: RequestId;
  readonly sink: Sink;
  readonly request: ReadRequest;
  state: "waiting" | "answering" | "done";
  reader: AnswerReader | null;
  answer: Answer | null;
  /** Where it is the answer of another peer's flight. */
  relay: RelayedFlight | null;
  facts: AnswerFacts | null;
  /** Bytes go on as they come; otherwise the answer is gathered first. */
  passes: boolean;
  /** The carrier has no room until `drained`. */
  blocked: boolean;
};

/** Open requests of one process; each holds its body and a socket. */
const OPEN_MAX = 10_000;
/** Client headers that reach the node. */
const forwarded = ["content-type", "accept", "traceparent", "tracestate", "openai-beta"] as const;
const FEEDBACK_PATH = "/v1/headrace/feedback";
const entryPattern = /^[0-9a-f]{27}$/;
/** Requests made to judge hits, at once; more hits go unjudged. */
const JUDGING_MAX = 4;
/** Judging is our own wish: it costs a tenant none of its allowance, and waits behind all others. */
const judgeTenant = {
  limitKey: "headrace-judge",
  limits: {},
  weight: 0.01,
  priority: "batch",
} as const;
const requestIdPattern = /^[A-Za-z0-9._-]{1,128}$/;

export class Front implements Actor<FrontCommand> {
  readonly #deps: FrontDeps;
  readonly #open = new InflightMap<RequestId, Open>();
  /** Whole bodies made from streams, for those who joined a stream without streaming themselves. */
  readonly #gathered = new WeakMap<Answer, Uint8Array>();
  #options: FrontOptions;
  #reader: RequestReader;
  #requestsStarted = false;
  #draining = false;
  #judging = 0;
  #sequence = 0;
  #onIdle: (() => void) | null = null;
  #lingerTimer: NodeJS.Timeout | undefined;

  constructor(options: FrontOptions, deps: FrontDeps) {
    this.#options = options;
    this.#reader = readerOf(options);
    this.#deps = deps;
  }

  configure(options: FrontOptions): void {
    this.#options = options;
    this.#reader = readerOf(options);
  }

  get openCount(): number {
    return this.#open.size;
  }

  get draining(): boolean {
    return this.#draining;
  }

  /** The question of a chat request, where it may be matched by meaning. */
  questionOf(body: Buffer, { tenant }: Tenant): string | undefined {
    const request = this.#reader.read("chat", body, tenant);
    return "code" in request ? undefined : request.question?.text;
  }

  /** Refuses new requests from now on; resolves when the last open one is done. */
  drain(): Promise<void> {
    this.#draining = true;
    if (this.#open.size === 0) return Promise.resolve();
    return new Promise((resolve) => {
      this.#onIdle = resolve;
    });
  }

  /** Cuts every open request: what remains when the time to drain is over. */
  cutAll(): void {
    for (const open of this.#open.values()) {
      this.#dropRelay(open);
      if (open.state === "waiting") this.#fail(open, "shutting_down");
      else this.#breakOff(open, "shutting_down");
      this.#tellLeft(open.requestId);
    }
    clearTimeout(this.#lingerTimer);
  }

  // ---- from the carrier ---------------------------------------------------------------------------------

  /** Takes a request to its answer. Always answers through `sink`, also what is refused at once. */
  submit(incoming: Incoming, sink: Sink): Exchange {
    const requestId = this.#requestId(incoming.header("x-request-id"));
    const route = routes[incoming.path] ?? "other";
    const refuse = (bad: BadRequest): Exchange => {
      this.#deps.onRefused(bad.code, route);
      const headers = ["x-request-id", requestId];
      if (bad.code === "method_not_allowed") headers.push("allow", "POST");
      writeError(sink, bad.code, headers, bad.message, bad.param);
      return { requestId, drained() {}, left() {} };
    };
    if (this.#draining) return refuse(bad("shutting_down"));
    if (this.#open.size >= OPEN_MAX) {
      return refuse(bad("pool_overloaded", `${this.#open.size} requests are open here already`));
    }
    const tenant = incoming.as ?? this.#deps.authenticate(keyOf(incoming));
    if (typeof tenant === "string") return refuse(bad(tenant));
    if (incoming.path === "/v1/models" && incoming.method === "GET") {
      this.#answerModels(requestId, tenant, sink);
      return { requestId, drained() {}, left() {} };
    }
    const isFeedback = incoming.path === FEEDBACK_PATH;
    if ((route !== "other" || isFeedback) && incoming.method !== "POST") {
      return refuse(
        bad("method_not_allowed", `${incoming.path} accepts POST, not ${incoming.method}`),
      );
    }
    if (isFeedback) {
      const wrong = this.#takeFeedback(requestId, tenant, incoming.body, sink);
      return wrong === undefined ? { requestId, drained() {}, left() {} } : refuse(wrong);
    }
    const request = this.#reader.read(route, incoming.body, tenant.tenant);
    if ("code" in request) return refuse(request);
    const unusable = this.#unusableModel(request.model, tenant);
    if (unusable !== undefined) return refuse(unusable);
    const facts = this.#facts(requestId, request, tenant, incoming);
    if ("code" in facts) return refuse(facts);
    return this.#start(facts, request, incoming, sink);
  }

  #start(facts: RequestFacts, request: ReadRequest, incoming: Incoming, sink: Sink): Exchange {
    const { requestId } = facts;
    const open: Open = {
      requestId,
      sink,
      request,
      state: "waiting",
      reader: null,
      answer: null,
      relay: null,
      facts: null,
      passes: false,
      blocked: false,
    };
    this.#open.set(requestId, open);
    const storable = facts.cacheKey !== undefined && facts.cacheWrite;
    this.#deps.data.requests.set(requestId, new Outgoing(incoming, request, storable));
    const question = facts.semantic === undefined ? undefined : request.question?.text;
    if (this.#options.recordsPrompts && request.route === "chat" && facts.judges === undefined)
      this.#deps.data.prompts.set(requestId, incoming.body);
    this.#deps.post(this.#deps.requests, {
      kind: "request.submit",
      facts,
      ...(question === undefined ? {} : { question }),
      ...(incoming.vector === undefined ? {} : { vector: incoming.vector }),
    });
    return {
      requestId,
      drained: () => this.#onDrained(open),
      left: () => this.#onLeft(open),
    };
  }

  #facts(
    requestId: RequestId,
    request: ReadRequest,
    tenant: Tenant,
    incoming: Incoming,
  ): RequestFacts | BadRequest {
    const nowMs = this.#deps.nowMs();
    const timeoutMs = headerMs(incoming, "x-request-timeout-ms");
    if (typeof timeoutMs === "string") return bad("invalid_request", timeoutMs);
    const cacheControl = incoming.header("cache-control")?.toLowerCase() ?? "";
    const session = incoming.header("x-session-id");
    const bypass = this.#options.cacheEnabled ? request.cacheBypass : "cache is off";
    const lifeMs = Math.min(
      timeoutMs ?? this.#options.requestTimeoutMs,
      this.#options.requestTimeoutMsMax,
    );
    const facts: RequestFacts = {
      requestId,
      tenant: tenant.tenant,
      limitKey: tenant.limitKey,
      limits: tenant.limits,
      weight: tenant.weight,
      priority: lowerPriority(tenant.priority, incoming.header("x-headrace-priority")),
      route: request.route,
      stream: request.stream,
      cacheRead: !cacheControl.includes("no-cache"),
      cacheWrite: !cacheControl.includes("no-store"),
      promptTokens: request.promptTokens,
      arrivedAtMs: nowMs,
      deadlineAtMs: nowMs + lifeMs,
    };
    // One by one, not by spreading: this is done for every request.
    if (request.model !== undefined) facts.model = request.model;
    if (request.maxTokens !== undefined) facts.maxTokens = request.maxTokens;
    if (bypass !== undefined) facts.cacheBypass = bypass;
    else if (request.cacheKey !== undefined) facts.cacheKey = request.cacheKey;
    if (request.route !== "other") facts.affinityKey = affinityKeyOf(request, session);
    if (request.prefix.length > 0) facts.prefix = request.prefix;
    if (session !== undefined) facts.session = session;
    if (incoming.judges !== undefined) facts.judges = incoming.judges;
    else if (facts.cacheKey !== undefined && request.question !== undefined) {
      const semantic = this.#semantic(request.question, tenant, incoming);
      if (typeof semantic === "string") return bad("invalid_request", semantic);
      if (semantic !== undefined) facts.semantic = semantic;
    }
    return facts;
  }

  /** How a question is matched by meaning, or not at all; or (as text) what is wrong with the wish. */
  #semantic(
    { frame, temperature = 0 }: AskedQuestion,
    tenant: Tenant,
    incoming: Incoming,
  ): RequestFacts["semantic"] | string {
    const embedder = this.#deps.embedder();
    const { semantic } = this.#options;
    const policy = policyOf(semantic, tenant);
    if (semantic === undefined || policy === undefined || embedder === undefined) return undefined;
    if (temperature > semantic.temperatureMax) return undefined;
    const wished = incoming.header("x-headrace-similarity");
    if (wished !== undefined) {
      const least = Number(wished);
      if (!(least > 0 && least <= 1)) {
        return "the header x-headrace-similarity must be a cosine above 0, at most 1";
      }
      policy.similarityMin = Math.max(policy.similarityMin, least);
    }
    return { scope: hash("sha256", `${frame}\n${embedder}`, "hex"), policy };
  }

  /** What is wrong with it; otherwise it is answered once the cache has. */
  #takeFeedback(
    requestId: RequestId,
    { tenant }: Tenant,
    bytes: Buffer,
    sink: Sink,
  ): BadRequest | undefined {
    let body: { entry?: unknown; ok?: unknown } | null;
    try {
      body = JSON.parse(bytes.toString("utf8"));
    } catch {
      return bad("invalid_json", "the request body is not valid JSON");
    }
    const { entry, ok } = body ?? {};
    if (typeof entry !== "string" || !entryPattern.test(entry)) {
      const message = "`entry` must be the value of an answer's header x-headrace-entry";
      return bad("invalid_request", message, "entry");
    }
    if (typeof ok !== "boolean") {
      return bad("invalid_request", "`ok` must be true (it was right) or false", "ok");
    }
    void this.#deps.feedback(entry, tenant, ok).then((known) => {
      if (!known) {
        const message = "no stored answer of yours has that id: it expired, or was removed";
        return writeError(sink, "not_found", ["x-request-id", requestId], message, "entry");
      }
      const answer = Buffer.from(JSON.stringify({ entry, ok, removed: !ok }));
      sink.whole(200, [...jsonHeaders(answer), "x-request-id", requestId], answer);
    });
    return undefined;
  }

  #unusableModel(model: string | undefined, tenant: Tenant): BadRequest | undefined {
    if (model === undefined) return undefined;
    if (tenant.models !== undefined && !tenant.models.includes(model)) {
      return bad("model_not_allowed", `this key may not use the model ${quoted(model)}`, "model");
    }
    const { names, complete } = this.#deps.models();
    if (names.includes(model) || !complete) return undefined;
    const served = names.length === 0 ? "none" : names.slice(0, 20).map(quoted).join(", ");
    return bad(
      "model_not_found",
      `the model ${quoted(model)} is not served here; served models: ${served}`,
      "model",
    );
  }

  #answerModels(requestId: RequestId, tenant: Tenant, sink: Sink): void {
    const data = this.#deps
      .models()
      .names.filter((name) => tenant.models === undefined || tenant.models.includes(name))
      .map((id) => ({ id, object: "model", created: 0, owned_by: "headrace" }));
    const body = Buffer.from(JSON.stringify({ object: "list", data }));
    sink.whole(200, [...jsonHeaders(body), "x-request-id", requestId], body);
  }

  #requestId(wished: string | undefined): RequestId {
    // A client may have left a request that goes on for others: its id is taken until its body is forgotten.
    const isFree = wished !== undefined && !this.#open.has(wished);
    if (isFree && requestIdPattern.test(wished) && !this.#deps.data.requests.has(wished))
      return wished;
    return `${this.#deps.idPrefix}-${(this.#sequence++).toString(36)}`;
  }

  #onDrained(open: Open): void {
    if (!open.blocked) return;
    open.blocked = false;
    this.#pump(open);
  }

  #onLeft(open: Open): void {
    if (open.state === "done") return;
    this.#dropRelay(open); // That it left says all.
    this.#done(open);
    this.#tellLeft(open.requestId);
  }

  #tellLeft(requestId: RequestId): void {
    this.#deps.post(this.#deps.requests, { kind: "request.client_left", requestId });
  }

  // ---- from the request actor -----------------------------------------------------------------------------

  receive(message: FrontCommand): void {
    switch (message.kind) {
      case "front.answer":
        return this.#onAnswer(message.requestId, message.answer, message.facts);
      case "front.attach":
        return this.#onAttach(message.requestId, message.flightId, message.facts);
      case "front.refuse": {
        const open = this.#open.get(message.requestId);
        if (open === undefined || open.state !== "waiting") return;
        return this.#fail(open, message.code, message.message, message.retryAfterMs, message.facts);
      }
      case "front.forget":
        return this.#forget(message.requestId, message.isShared);
      case "front.ask_again":
        return this.#askAgain(message.requestId, message.entryId, message.similarity);
      case "front.requests_lost":
        // The first one tells only that the request actor has started; what came before waits in its mailbox.
        if (!this.#requestsStarted) {
          this.#requestsStarted = true;
          return;
        }
        for (const open of this.#open.values()) {
          if (open.state === "waiting") this.#fail(open, "internal");
          else this.#breakOff(open, "internal");
        }
        this.#deps.data.clear();
        return;
    }
  }

  /** The same for nobody, past the cache and behind everyone else's: its answer judges the entry that was served. */
  #askAgain(requestId: RequestId, entryId: string, similarity: number): void {
    const outgoing = this.#deps.data.requests.get(requestId);
    if (!(outgoing instanceof Outgoing) || this.#judging >= JUDGING_MAX || this.#draining) return;
    const { incoming } = outgoing;
    if (incoming.as !== undefined) return; // A warm-up asks nodes for what is missing, and no more than it was told.
    const tenant = this.#deps.authenticate(keyOf(incoming));
    if (typeof tenant === "string") return; // The key has gone meanwhile.
    this.#judging++;
    const own: Record<string, string> = { "cache-control": "no-cache" };
    const header = (name: string): string | undefined =>
      own[name] ?? (name.startsWith("x-") ? undefined : incoming.header(name));
    const { method, path, query, body } = incoming;
    const as: Tenant = { ...tenant, ...judgeTenant };
    const judges = { entryId, similarity };
    const done = (): void => {
      this.#judging--;
    };
    this.submit({ method, path, query, body, header, as, judges }, new Unread(done));
  }

  #onAnswer(requestId: RequestId, answer: StoredAnswer, facts: AnswerFacts): void {
    const open = this.#open.get(requestId);
    if (open === undefined || open.state !== "waiting") return;
    open.state = "answering";
    if (!open.request.stream)
      return this.#sendWhole(open, 200, "application/json", answer.body, facts);
    this.#sendAsStream(open, answer.body, facts);
  }

  #onAttach(requestId: RequestId, flightId: RequestId, facts: AnswerFacts): void {
    const open = this.#open.get(requestId);
    if (open === undefined || open.state !== "waiting") return;
    const answer = this.#deps.data.answers.get(flightId);
    const { relays } = this.#deps;
    if (answer !== undefined || relays === undefined || !flightId.includes("/"))
      return this.#read(open, answer, facts);
    open.relay = relays.open(flightId, (relayed) => {
      if (open.state !== "waiting") return;
      if (relayed === undefined) this.#askAnew(open);
      else this.#read(open, relayed, facts);
    });
  }

  #read(open: Open, answer: Answer | undefined, facts: AnswerFacts): void {
    const reader = answer?.read(() => {
      if (!open.blocked) this.#pump(open);
    });
    if (answer === undefined || reader === null || reader === undefined) {
      return this.#fail(open, "internal", "the shared answer is no longer whole");
    }
    open.state = "answering";
    open.reader = reader;
    open.answer = answer;
    open.facts = facts;
    const { form, head } = answer;
    open.passes = form === "raw" || (form === "sse" && open.request.stream);
    if (open.passes) {
      const headers = this.#headers(open, facts);
      headers.push("content-type", head.contentType);
      if (form === "sse") headers.push("cache-control", "no-cache", "x-accel-buffering", "no");
      open.sink.head(head.status, headers);
    }
    this.#pump(open);
  }

  /** The flight that it was to read is lost with its peer, before a byte has gone out. */
  #askAnew(open: Open): void {
    this.#dropRelay(open);
    open.reader?.close();
    open.reader = null;
    open.answer = null;
    open.state = "waiting";
    const { requestId } = open;
    this.#deps.post(this.#deps.requests, { kind: "request.relayed", requestId, how: "lost" });
  }

  #dropRelay(open: Open): void {
    open.relay?.release();
    open.relay = null;
  }

  #forget(requestId: RequestId, isShared: boolean): void {
    const { data, relays, nowMs } = this.#deps;
    if (!isShared || relays === undefined) return data.forget(requestId);
    data.linger(requestId, nowMs());
    this.#lingerTimer ??= setTimeout(() => this.#expire(), LINGER_MS).unref();
  }

  #expire(): void {
    const { data, nowMs } = this.#deps;
    const isLingering = data.expire(nowMs());
    this.#lingerTimer = isLingering
      ? setTimeout(() => this.#expire(), LINGER_MS / 4).unref()
      : undefined;
  }

  // ---- delivery -------------------------------------------------------------------------------------------

  /** Moves what has come: straight on, or (when the forms differ) once all of it is there. */
  #pump(open: Open): void {
    const { reader, answer } = open;
    if (reader === null || answer === null || open.state !== "answering") return;
    if (!open.passes) {
      // Taken part by part all the same: a reader that does not read would halt the writer.
      let next = reader.next();
      while (next !== "wait" && next !== "overrun" && "bytes" in next) next = reader.next();
      if (next === "overrun")
        this.#fail(open, "internal", "the answer was too long to be gathered");
      else if (next !== "wait") this.#deliverEnded(open, answer, next);
      return;
    }
    for (;;) {
      const next = reader.next();
      if (next === "wait") return;
      if (next === "overrun") return this.#cutSlowReader(open);
      if ("bytes" in next) {
        if (next.usage && !open.request.wantsUsage) continue;
        if (open.sink.write(next.bytes)) continue;
        open.blocked = true;
        return;
      }
      if (!next.ok) return this.#breakOff(open, next.code);
      open.sink.end();
      return this.#done(open);
    }
  }

  /** The client wants another form than the flight has: whole from a stream, or a stream from whole. */
  #deliverEnded(open: Open, answer: Answer, end: AnswerEnd): void {
    const facts = open.facts ?? { cache: "bypass", attempts: 0, queuedMs: 0 };
    if (!end.ok) {
      if (open.relay?.isLost === true) return this.#askAnew(open);
      return this.#fail(open, end.code, undefined, undefined, facts);
    }
    const parts = answer.parts;
    if (parts === null)
      return this.#fail(open, "internal", "the answer was too long to be gathered");
    if (answer.form === "whole") {
      const body = parts[0]?.bytes ?? new Uint8Array(0);
      if (open.request.stream && answer.head.status === 200)
        return this.#sendAsStream(open, body, facts);
      return this.#sendWhole(open, answer.head.status, answer.head.contentType, body, facts);
    }
    let body = this.#gathered.get(answer);
    if (body === undefined) {
      const whole = assembleAnswer(open.request.route, parts);
      if (whole.body === undefined)
        return this.#fail(open, "upstream_bad_answer", undefined, undefined, facts);
      body = whole.body;
      this.#gathered.set(answer, body);
    }
    this.#sendWhole(open, 200, "application/json", body, facts);
  }

  #sendWhole(open: Open, status: number, type: string, body: Uint8Array, facts: AnswerFacts): void {
    const headers = this.#headers(open, facts);
    headers.push("content-type", type, "content-length", String(body.byteLength));
    open.sink.whole(status, headers, body);
    this.#done(open);
  }

  #sendAsStream(open: Open, body: Uint8Array, facts: AnswerFacts): void {
    const headers = this.#headers(open, facts);
    headers.push("content-type", "text/event-stream; charset=utf-8", "cache-control", "no-cache");
    open.sink.head(200, headers);
    const events = wholeToSse(open.request.route, body, { includeUsage: open.request.wantsUsage });
    for (const event of events) open.sink.write(event); // At most one stored answer: bounded.
    open.sink.end();
    this.#done(open);
  }

  /** No byte has gone out: a proper error. */
  #fail(
    open: Open,
    code: ErrorCode,
    message?: string,
    retryAfterMs?: number,
    facts?: AnswerFacts,
  ): void {
    writeError(open.sink, code, this.#headers(open, facts), message, undefined, retryAfterMs);
    this.#done(open, "broken");
  }

  /** Bytes are out: an error event where the form allows it, and an end that no client takes for a good one. */
  #breakOff(open: Open, code: ErrorCode): void {
    if (open.passes && open.answer?.form === "sse") {
      open.sink.write(Buffer.from(`data: ${JSON.stringify(errorBody(code))}\n\n`));
      open.sink.end(); // Without [DONE].
    } else open.sink.destroy();
    this.#done(open, "broken");
  }

  #cutSlowReader(open: Open): void {
    this.#dropRelay(open);
    open.sink.destroy();
    this.#done(open);
    this.#tellLeft(open.requestId);
  }

  /** @param how it was delivered, if it is another peer's flight */
  #done(open: Open, how: "whole" | "broken" = "whole"): void {
    open.state = "done";
    open.reader?.close();
    open.reader = null;
    open.answer = null;
    this.#open.delete(open.requestId);
    if (open.relay !== null) {
      this.#dropRelay(open);
      const { requestId } = open;
      this.#deps.post(this.#deps.requests, { kind: "request.relayed", requestId, how });
    }
    if (this.#open.size === 0 && this.#onIdle !== null) this.#onIdle();
  }

  #headers(open: Open, facts?: AnswerFacts): string[] {
    const headers = ["x-request-id", open.requestId];
    if (facts === undefined) return headers;
    headers.push("x-headrace-cache", cacheHeader(facts));
    headers.push("x-headrace-attempts", String(facts.attempts));
    if (facts.node !== undefined) headers.push("x-headrace-node", facts.node);
    if (facts.entryId !== undefined) headers.push("x-headrace-entry", facts.entryId);
    if (facts.queuedMs > 0) headers.push("x-headrace-queue-ms", String(Math.round(facts.queuedMs)));
    if (facts.ageMs !== undefined) headers.push("age", String(Math.floor(facts.ageMs / 1000)));
    if (facts.limits !== undefined) pushLimits(headers, facts.limits);
    return headers;
  }
}

/** What goes to a node, made from what came; its headers are picked only when a node is asked. */
class Outgoing implements OutgoingRequest {
  readonly incoming: Incoming;
  readonly #request: ReadRequest;
  readonly storable: boolean;

  constructor(incoming: Incoming, request: ReadRequest, storable: boolean) {
    this.incoming = incoming;
    this.#request = request;
    this.storable = storable;
  }

  get method(): string {
    return this.incoming.method;
  }

  get path(): string {
    return this.incoming.path + this.incoming.query;
  }

  get headers(): Readonly<Record<string, string>> {
    const headers: Record<string, string> = {};
    for (const name of forwarded) {
      const value = this.incoming.header(name);
      if (value !== undefined) headers[name] = value;
    }
    return headers;
  }

  get body(): Uint8Array | null {
    return this.incoming.body.length === 0 ? null : this.incoming.body;
  }

  get route(): Route {
    return this.#request.route;
  }

  get model(): string | undefined {
    return this.#request.model;
  }

  get stream(): boolean {
    return this.#request.stream;
  }

  get wantsUsage(): boolean {
    return this.#request.wantsUsage;
  }
}

/** Of an answer that nobody reads. */
class Unread implements Sink {
  readonly #done: () => void;

  constructor(done: () => void) {
    this.#done = done;
  }

  whole(): void {
    this.#done();
  }

  head(): void {}

  write(): boolean {
    return true;
  }

  end(): void {
    this.#done();
  }

  destroy(): void {
    this.#done();
  }
}

/** How a tenant's questions are matched by meaning; undefined: they are not. */
export function policyOf(
  semantic: FrontOptions["semantic"],
  tenant: Tenant,
): SemanticPolicy | undefined {
  if (semantic === undefined) return undefined;
  const { mode = semantic.policy.mode, ...own } = tenant.semantic ?? {};
  return mode === "off" ? undefined : { ...semantic.policy, ...own, mode };
}

function readerOf({ requests, recordsPrefixes, semantic }: FrontOptions): RequestReader {
  return new RequestReader(requests, {
    prefixes: recordsPrefixes,
    questions: semantic !== undefined,
  });
}

function jsonHeaders(body: Buffer): string[] {
  return ["content-type", "application/json", "content-length", String(body.length)];
}

function bad(code: ErrorCode, message?: string, param?: string): BadRequest {
  return { code, message: message ?? "", ...(param === undefined ? {} : { param }) };
}

function writeError(
  sink: Sink,
  code: ErrorCode,
  headers: string[],
  message?: string,
  param?: string,
  retryAfterMs?: number,
): void {
  const text = message === undefined || message === "" ? undefined : message;
  const body = Buffer.from(JSON.stringify(errorBody(code, text, param)));
  headers.push(...jsonHeaders(body));
  for (const [name, value] of Object.entries(errorHeaders(code, retryAfterMs)))
    headers.push(name, value);
  sink.whole(httpErrors[code].status, headers, body);
}

function keyOf(incoming: Incoming): string | undefined {
  const authorization = incoming.header("authorization");
  if (authorization !== undefined && /^bearer /i.test(authorization))
    return authorization.slice(7).trim();
  return authorization ?? incoming.header("api-key") ?? incoming.header("x-api-key");
}

/** A positive number of ms, absent, or (as text) what is wrong with it. */
function headerMs(incoming: Incoming, name: string): number | undefined | string {
  const text = incoming.header(name);
  if (text === undefined) return undefined;
  const value = Number(text);
  if (Number.isFinite(value) && value > 0) return value;
  return `the header ${name} must be a number of milliseconds greater than 0`;
}

function cacheHeader(facts: AnswerFacts): string {
  if (facts.similarity !== undefined)
    return `hit-semantic; similarity=${facts.similarity.toFixed(4)}`;
  return facts.cache.replace("_", "-");
}

/** OpenAI's header names; resets as Go durations ("1s", "6m0s", "120ms"). */
function pushLimits(headers: string[], limits: LimitState): void {
  for (const kind of ["requests", "tokens"] as const) {
    const part = limits[kind];
    if (part === undefined) continue;
    headers.push(`x-ratelimit-limit-${kind}`, String(part.limit));
    headers.push(`x-ratelimit-remaining-${kind}`, String(Math.max(0, part.remaining)));
    headers.push(`x-ratelimit-reset-${kind}`, goDuration(part.resetMs));
  }
}

function goDuration(ms: number): string {
  if (ms < 1000) return `${Math.ceil(ms)}ms`;
  const seconds = Math.ceil(ms / 1000);
  if (seconds < 60) return `${seconds}s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes}m${seconds % 60}s`;
  return `${Math.floor(minutes / 60)}h${minutes % 60}m${seconds % 60}s`;
}

function quoted(name: string): string {
  return JSON.stringify(name);
}
