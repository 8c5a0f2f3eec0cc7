/**
 * The edge to the inference nodes: runs attempts over HTTP/1.1 and writes what comes to the data plane. The
 * only importer of undici.
 *
 *   waiting ──head──▶ sse │ whole │ raw │ refusal ──▶ over
 *
 * An attempt is waiting until the head of an answer has come, then reads one kind of body: an event stream,
 * one JSON body, bytes of an unknown route, or the body of a refusal (4xx, 5xx). It is *committed* once an
 * Answer of its flight stands in the data plane: for a stream at its first content token, for a raw answer
 * at its first byte, for a whole one when all of it was read and found good. Until then any failure can be
 * retried elsewhere. It ends in exactly one event, or in none when it is aborted.
 *
 * Clocks: connect (undici's, per connection), first token, stall, total: one timer per attempt, moved lazily.
 * Only content winds the stall clock of a stream: comments, role-only and empty deltas do not. A whole answer
 * has a head when it is finished, so `firstTokenMs` bounds its head and `stallMs` the gaps in its body.
 *
 * Backpressure: when no reader has room the socket is paused, and the stall clock with it. undici 7 throws
 * from a socket's event handler, which would end the process, when a *paused* response on a connection that
 * will not be kept alive is reset; such a response is therefore never paused. Its answer is bounded all the
 * same: by what `Answer` keeps.
 *
 * It knows nothing of retries, circuits or tenants, never follows redirects, and never sends a client's key.
 */
import { Pool } from "undici";
import type { UpstreamCommand, UpstreamEvent, UpstreamFailure } from "../actors/edges.ts";
import type { ErrorCode } from "../actors/errors.ts";
import type { LeaseId, NodeId, StoredAnswer, Usage } from "../actors/protocol.ts";
import { failureRules } from "../actors/retry-policy.ts";
import { type Actor, type ActorRef, type ReplyTo, unreachable } from "../runtime/actor.ts";
import { InflightMap } from "../runtime/inflight-map.ts";
import { Answer, type AnswerPart, type DataPlane, type OutgoingRequest } from "./data-plane.ts";
import { assembleAnswer, checkWhole, SseScanner, statedError } from "./openai-answer.ts";
import {
  failureOfError,
  failureOfSocket,
  failureOfStatus,
  retryAfterMs,
} from "./upstream-failure.ts";

/** Bounds of connections and answers; the clocks come with each attempt. */
export type UpstreamOptions = {
  /** TCP and TLS; at most 1000, or undici's coarse timers make it longer. */
  connectMs: number;
  /** Sockets per node; attempts beyond wait for one, their clocks running. */
  connectionsMax: number;
  /** One event of a node's stream, bytes. */
  sseEventBytesMax: number;
  /** A whole answer, bytes. */
  wholeBytesMax: number;
  /** What an answer keeps for late readers and the cache, bytes. */
  answerBytesMax: number;
  /** Between two reports that an attempt lives, also while its node is silent; well below a lease's life. */
  progressMs: number;
};

/** For a pool of a few nodes on one network. */
export const upstreamDefaults: UpstreamOptions = {
  connectMs: 1000,
  connectionsMax: 512,
  sseEventBytesMax: 1 << 20,
  wholeBytesMax: 64 << 20,
  answerBytesMax: 4 << 20,
  progressMs: 5000,
};

/** What surrounds the edge. */
export type UpstreamDeps = {
  data: DataPlane;
  post: <T>(to: ActorRef<T>, message: T) => void;
  reply: <R>(to: ReplyTo<R>, value: R) => void;
  /** Monotonic, ms. */
  nowMs: () => number;
  /** A model that the node serves, for probes; when undefined, the node is asked. */
  modelOf: (node: NodeId) => string | undefined;
};

/** `url`: what routes are appended to ("…" + "/v1/chat/completions"). */
export type UpstreamNode = { node: NodeId; url: string; apiKey?: string };

type Start = Extract<UpstreamCommand, { kind: "upstream.start" }>;
type Connected = { pool: Pool; url: string; pathPrefix: string; apiKey: string | undefined };

/** A refusal's body is judged as far as it has come by then. */
const REFUSAL_MS = 1000;
const REFUSAL_BYTES_MAX = 256 << 10;
/** All of a stream before its first content; more is no head. */
const HEAD_BYTES_MAX = 1 << 20;
/** How long after `[DONE]` the node may take to end its response, so that the connection can be used again. */
const LINGER_MS = 250;
/** Where an engine states no usage: UTF-8 bytes of a request to one prompt token. */
const BYTES_PER_TOKEN = 3.5;
/** Less than the 5 s after which the engines' HTTP servers (uvicorn, node) close idle connections. */
const KEEP_ALIVE_MS = 4000;

/** Never looked at: aborting wants a reason, and one object for all saves its stack trace. */
const abortReason = new Error("aborted");

/** Nodes are added and removed by whoever builds it; everything else comes as commands. */
export class UpstreamEdge implements Actor<UpstreamCommand> {
  readonly #options: UpstreamOptions;
  readonly #deps: UpstreamDeps;
  readonly #nodes = new Map<NodeId, Connected>();
  /** All pools not yet closed, also of removed nodes with attempts still running. */
  readonly #pools = new Set<Pool>();
  readonly #attempts = new InflightMap<LeaseId, Attempt>(); // By lease.
  #heartbeat: NodeJS.Timeout | null = null; // Runs while there are attempts.

  constructor(options: UpstreamOptions, deps: UpstreamDeps) {
    this.#options = options;
    this.#deps = deps;
  }

  /** Attempts running now. */
  get inflight(): number {
    return this.#attempts.size;
  }

  /** Adds a node, or changes it: attempts that run on its old address or key end there. */
  addNode({ node, url, apiKey }: UpstreamNode): void {
    const present = this.#nodes.get(node);
    if (present?.url === url && present.apiKey === apiKey) return;
    this.removeNode(node);
    const { origin, pathname } = new URL(url);
    const pool = new Pool(origin, {
      connections: this.#options.connectionsMax,
      pipelining: 1,
      headersTimeout: 0, // The clocks here are our own.
      bodyTimeout: 0,
      keepAliveTimeout: KEEP_ALIVE_MS,
      connect: { timeout: this.#options.connectMs },
    });
    this.#pools.add(pool);
    this.#nodes.set(node, { pool, url, pathPrefix: pathname.replace(/\/+$/, ""), apiKey });
  }

  /** No new attempts on it; those that run go on, and its connections close after the last. */
  removeNode(node: NodeId): void {
    const present = this.#nodes.get(node);
    if (present === undefined) return;
    this.#nodes.delete(node);
    const forget = (): void => void this.#pools.delete(present.pool);
    present.pool.close().then(forget, forget);
  }

  /** Aborts everything and closes every connection; no handle is left. */
  async close(): Promise<void> {
    this.#abortAll("shutting_down");
    if (this.#heartbeat !== null) clearInterval(this.#heartbeat);
    this.#nodes.clear();
    await Promise.all([...this.#pools].map((pool) => pool.destroy().catch(() => undefined)));
    this.#pools.clear();
  }

  receive(command: UpstreamCommand): void {
    switch (command.kind) {
      case "upstream.start":
        return this.#onStart(command);
      case "upstream.abort":
        return this.#attempts.get(command.leaseId)?.abort(command.code);
      case "upstream.abort_all":
        return this.#abortAll("internal");
      case "upstream.probe":
        return this.#onProbe(command);
      default:
        return unreachable(command);
    }
  }

  #onStart(start: Start): void {
    const { leaseId } = start;
    if (this.#attempts.has(leaseId)) return; // A duplicate: the first one answers.
    const connected = this.#nodes.get(start.node);
    const request = this.#deps.data.requests.get(start.requestId);
    if (request === undefined) return this.#refuseWithoutBody(start);
    if (connected === undefined) {
      return this.#failAtOnce(start, "connect", "the node is not configured");
    }
    const forget = (): unknown => this.#attempts.delete(leaseId);
    const attempt = new Attempt(start, request, this.#options, this.#deps, forget);
    this.#attempts.set(leaseId, attempt);
    this.#heartbeat ??= setInterval(() => this.#beat(), this.#options.progressMs).unref();
    connected.pool.dispatch(
      {
        path: connected.pathPrefix + request.path,
        method: request.method,
        headers: headersFor(request, start, connected.apiKey),
        body: bodyFor(request),
      },
      attempt,
    );
  }

  #beat(): void {
    for (const attempt of this.#attempts.values()) attempt.report();
    if (this.#attempts.size > 0 || this.#heartbeat === null) return;
    clearInterval(this.#heartbeat);
    this.#heartbeat = null;
  }

  /** The body leaves only with its request; without it no node can help, and none is to blame. */
  #refuseWithoutBody(start: Start): void {
    const head = { status: 500, contentType: "application/json" };
    const answer = new Answer("whole", head, this.#options.answerBytesMax);
    answer.append(
      { bytes: errorJson("server_error", "the request's body is gone"), usage: false },
      noop,
    );
    answer.finish({ ok: true });
    this.#deps.data.answers.set(start.flightId, answer);
    this.#failAtOnce(start, "client_error", "the request's body is gone");
  }

  #failAtOnce(start: Start, failure: UpstreamFailure, detail: string): void {
    const { leaseId } = start;
    const failed = { kind: "upstream.failed", leaseId, failure, detail } as const;
    this.#deps.post<UpstreamEvent>(start.replyTo, { ...failed, committed: false, outputTokens: 0 });
  }

  #abortAll(code: ErrorCode): void {
    for (const attempt of this.#attempts.values()) attempt.abort(code);
  }

  #onProbe(probe: Extract<UpstreamCommand, { kind: "upstream.probe" }>): void {
    const connected = this.#nodes.get(probe.node);
    const answer = (answered: boolean, detail: string): void =>
      this.#deps.reply(probe.replyTo, { answered, detail });
    if (connected === undefined) return answer(false, "the node is not configured");
    const untilMs = this.#deps.nowMs() + probe.timeoutMs;
    const generate = (model: string): void => {
      const body = JSON.stringify({
        model,
        messages: [{ role: "user", content: "ping" }],
        max_tokens: 1,
        temperature: 0,
      });
      this.#call(connected, "POST", "/v1/chat/completions", body, untilMs, (status, text) => {
        if (status === 0) return answer(false, text);
        // A node that refuses the question (an embedding model, say) or is busy does answer.
        const alive = status < 500 && status !== 401 && status !== 403 && status !== 424;
        answer(alive && (status !== 200 || isAnswer(text)), `status ${status}`);
      });
    };
    const model = this.#deps.modelOf(probe.node);
    if (model !== undefined) return generate(model);
    this.#call(connected, "GET", "/v1/models", null, untilMs, (status, text) => {
      const first = status === 200 ? firstModel(text) : undefined;
      if (first === undefined) answer(false, status === 0 ? text : "no model is known");
      else generate(first);
    });
  }

  /** One small exchange; `onEnd` is called once, with status 0 and the reason where no answer came. */
  #call(
    { pool, pathPrefix, apiKey }: Connected,
    method: "GET" | "POST",
    path: string,
    body: string | null,
    untilMs: number,
    onEnd: (status: number, text: string) => void,
  ): void {
    const headers = ["content-type", "application/json"];
    if (apiKey !== undefined) headers.push("authorization", `Bearer ${apiKey}`);
    const timeoutMs = Math.max(1, untilMs - this.#deps.nowMs());
    pool.dispatch(
      { path: pathPrefix + path, method, headers, body },
      new SmallCall(timeoutMs, onEnd),
    );
  }
}

/** The part of undici's controller that is used. */
type Controller = { pause(): void; resume(): void; abort(reason: Error): void };
type HeaderValues = Readonly<Record<string, string | string[] | undefined>>;

/** One attempt: undici's handler, and the writer of its flight's Answer. */
class Attempt {
  readonly #start: Start;
  readonly #deps: UpstreamDeps;
  readonly #options: UpstreamOptions;
  readonly #onOver: () => void;
  /** Of the request, without its body. */
  readonly #route: OutgoingRequest["route"];
  readonly #model: string;
  readonly #storable: boolean;
  readonly #streams: boolean;
  readonly #promptTokensEstimate: number;

  #state: "waiting" | "sse" | "whole" | "raw" | "refusal" | "over" = "waiting";
  #controller: Controller | null = null;
  #status = 0;
  #contentType = "";
  #retryAfterMs: number | undefined;
  #pausable = false;
  #paused = false;
  #scanner: SseScanner | null = null;
  #answer: Answer | null = null;
  #body: Uint8Array[] = []; // Of a whole answer or a refusal.
  #bodyBytes = 0;

  readonly #startedAtMs: number;
  #headAtMs = 0;
  #firstContentAtMs = 0; // 0: none yet.
  #lastContentAtMs = 0; // For whole and raw bodies: the last byte.
  #doneAtMs = 0; // 0: no [DONE] yet.
  #timer: NodeJS.Timeout | null = null;
  #timerAtMs = 0;

  constructor(
    start: Start,
    request: OutgoingRequest,
    options: UpstreamOptions,
    deps: UpstreamDeps,
    onOver: () => void,
  ) {
    this.#start = start;
    this.#options = options;
    this.#deps = deps;
    this.#onOver = onOver;
    this.#route = request.route;
    this.#model = request.model ?? "";
    this.#storable = request.storable;
    this.#streams = streams(request);
    this.#promptTokensEstimate = Math.ceil((request.body?.byteLength ?? 0) / BYTES_PER_TOKEN);
    this.#startedAtMs = deps.nowMs();
    this.#wind(this.#startedAtMs);
  }

  abort(code: ErrorCode): void {
    if (this.#state === "over") return;
    this.#become("over");
    this.#answer?.finish({ ok: false, code });
    this.#controller?.abort(abortReason);
  }

  // ---- undici's handler ---------------------------------------------------------------------------------

  onRequestStart(controller: Controller): void {
    this.#controller = controller;
    if (this.#state === "over") controller.abort(abortReason); // Aborted while it waited for a socket.
  }

  onResponseStart(_controller: Controller, status: number, headers: HeaderValues): void {
    if (this.#state !== "waiting" || status < 200) return;
    const header = (name: string): string | undefined => {
      const value = headers[name];
      return Array.isArray(value) ? value[0] : value;
    };
    this.#status = status;
    this.#headAtMs = this.#deps.nowMs();
    this.#contentType = header("content-type") ?? "";
    const keptAlive = !(header("connection") ?? "").toLowerCase().includes("close");
    this.#pausable = keptAlive && header("transfer-encoding") !== undefined;
    if (status >= 400) {
      this.#retryAfterMs = retryAfterMs(header, Date.now());
      return this.#become("refusal");
    }
    if (status >= 300) {
      const { failure, detail } = failureOfStatus(status, "");
      return this.#fail(failure, detail);
    }
    const encoding = header("content-encoding") ?? "identity";
    if (encoding !== "identity") return this.#fail("bad_answer", "a compressed answer");
    this.#lastContentAtMs = this.#headAtMs;
    if (this.#route === "other") return this.#become("raw");
    const isJson = /\bjson\b/i.test(this.#contentType);
    if (!this.#streams) {
      if (isJson) return this.#become("whole");
      return this.#fail("bad_answer", "not application/json");
    }
    if (isJson) return this.#become("refusal"); // An error with a status of success, mostly.
    if (!/^text\/event-stream\b/i.test(this.#contentType)) {
      return this.#fail("bad_answer", "not text/event-stream");
    }
    this.#scanner = new SseScanner({
      eventBytesMax: this.#options.sseEventBytesMax,
      headBytesMax: HEAD_BYTES_MAX,
    });
    this.#become("sse");
  }

  onResponseData(_controller: Controller, chunk: Uint8Array): void {
    switch (this.#state) {
      case "sse":
        return this.#onEvents(chunk);
      case "raw":
        this.#lastContentAtMs = this.#deps.nowMs();
        if (this.#answer === null) this.#commit("raw");
        this.#append({ bytes: chunk, usage: false });
        return;
      case "whole":
        this.#lastContentAtMs = this.#deps.nowMs();
        if (!this.#keep(chunk, this.#options.wholeBytesMax)) this.#fail("bad_answer", "too long");
        return;
      case "refusal":
        if (!this.#keep(chunk, REFUSAL_BYTES_MAX)) this.#endRefusal();
        return;
      case "waiting":
      case "over":
        return; // A chunk after the abort.
      default:
        return unreachable(this.#state);
    }
  }

  onResponseEnd(): void {
    switch (this.#state) {
      case "sse":
        return this.#endStream();
      case "raw":
        if (this.#answer === null) this.#commit("raw"); // An empty body.
        return this.#finish(this.#countedUsage(), "not an OpenAI route");
      case "whole":
        return this.#endWhole();
      case "refusal":
        return this.#endRefusal();
      case "waiting":
        return this.#fail("bad_answer", "an answer without a head");
      case "over":
        return;
      default:
        return unreachable(this.#state);
    }
  }

  onResponseError(_controller: Controller | undefined, error: Error): void {
    if (this.#state === "over") return;
    if (this.#state === "refusal") return this.#endRefusal();
    if (this.#doneAtMs > 0) return this.#endStream();
    if ("code" in error && error.code === "UND_ERR_INVALID_ARG") {
      // A path or header that HTTP does not allow: nothing was sent.
      this.#status = 400;
      return this.#relay(
        errorJson(invalidRequest, "the path or a header is not valid HTTP"),
        "application/json",
      );
    }
    const { failure, detail } = failureOfSocket(error, this.#state !== "waiting");
    this.#fail(failure, detail);
  }

  // ---- bodies -------------------------------------------------------------------------------------------

  #onEvents(chunk: Uint8Array): void {
    const scanner = this.#scanner;
    if (scanner === null) return;
    const contentBefore = scanner.contentEvents;
    this.#pass(scanner.push(chunk));
    if (this.#state !== "sse") return; // A reader's turn has aborted this attempt.
    const { fault } = scanner;
    if (fault !== null) return this.#onFault(fault);
    if (scanner.contentEvents > contentBefore) {
      const nowMs = this.#deps.nowMs();
      this.#lastContentAtMs = nowMs;
    }
    if (!scanner.done) return;
    if (this.#doneAtMs === 0) this.#doneAtMs = this.#deps.nowMs();
    this.#wind(this.#doneAtMs);
  }

  #onFault(fault: NonNullable<SseScanner["fault"]>): void {
    if (fault.kind !== "error_event") return this.#fail("bad_answer", `stream: ${fault.kind}`);
    this.#onStatedError(fault.status, fault.text);
  }

  /** The node says inside a 200 that it failed. */
  #onStatedError(status: number | undefined, text: string): void {
    const { failure, detail } = failureOfError(status, text);
    if (failure !== "client_error") return this.#fail(failure, detail);
    if (this.#answer !== null) return this.#fail("server_error", detail);
    this.#status = status ?? 400;
    this.#relay(Buffer.from(text), "application/json");
  }

  #pass(parts: readonly AnswerPart[]): void {
    if (parts.length > 0 && this.#answer === null) this.#commit("sse");
    for (const part of parts) this.#append(part);
  }

  #endStream(): void {
    const scanner = this.#scanner;
    if (scanner === null) return;
    this.#pass(scanner.end());
    if (this.#state !== "sse") return;
    if (scanner.fault !== null) return this.#onFault(scanner.fault);
    if (!scanner.complete) return this.#fail("broken_stream", "the stream ended without a finish");
    const usage = scanner.usage ?? this.#countedUsage();
    const stored = this.#storedStream(scanner, usage);
    this.#finish(usage, stored);
  }

  /** The answer as the cache keeps it, or why it must not. */
  #storedStream(scanner: SseScanner, usage: Usage): StoredAnswer | string {
    if (!this.#storable) return "not to be stored";
    if (!scanner.done) return "no [DONE]";
    const other = scanner.finishReasons.find((reason) => reason !== "stop");
    if (other !== undefined) return `finish_reason ${other}`;
    const parts = this.#answer?.parts ?? null;
    if (parts === null) return "too long";
    const whole = assembleAnswer(this.#route, parts);
    if (whole.body === undefined) return whole.bad;
    return whole.notStorable ?? this.#stored(whole.body, usage);
  }

  #stored(body: Uint8Array, usage: Usage): StoredAnswer {
    return {
      body,
      bytes: body.byteLength,
      route: this.#route,
      model: this.#model,
      promptTokens: usage.promptTokens,
      outputTokens: usage.outputTokens,
    };
  }

  #endWhole(): void {
    const body = this.#taken();
    const verdict = checkWhole(this.#route, body);
    if ("bad" in verdict) return this.#fail("bad_answer", verdict.bad);
    this.#commit("whole");
    this.#append({ bytes: body, usage: false });
    const { usage, notStorable } = verdict;
    if (usage.promptTokens === 0) usage.promptTokens = this.#promptTokensEstimate;
    const why = this.#storable ? notStorable : "not to be stored";
    this.#finish(usage, why ?? this.#stored(body, usage));
  }

  /** The body of a refusal has come, as far as it will. */
  #endRefusal(): void {
    const complete = this.#bodyBytes <= REFUSAL_BYTES_MAX;
    const body = this.#taken();
    const text = Buffer.from(body.buffer, body.byteOffset, body.byteLength).toString("utf8");
    if (this.#status < 400) return this.#endUnaskedJson(text);
    const { failure, detail } = failureOfStatus(this.#status, text);
    if (failure !== "client_error") return this.#fail(failure, detail);
    if (complete && body.byteLength > 0) return this.#relay(body, this.#contentType);
    this.#relay(
      errorJson(invalidRequest, `the node answered with status ${this.#status}`),
      "application/json",
    );
  }

  /** JSON came where a stream was asked for: an error, or a node that cannot stream. */
  #endUnaskedJson(text: string): void {
    const error = statedError(text);
    if (error !== null) return this.#onStatedError(error.status, text);
    this.#fail("bad_answer", "JSON instead of an event stream");
  }

  /** False when it is more than `bytesMax` now. */
  #keep(chunk: Uint8Array, bytesMax: number): boolean {
    this.#body.push(chunk);
    this.#bodyBytes += chunk.byteLength;
    return this.#bodyBytes <= bytesMax;
  }

  #taken(): Uint8Array {
    const [only] = this.#body;
    const body = only !== undefined && this.#body.length === 1 ? only : Buffer.concat(this.#body);
    this.#body = [];
    return body;
  }

  // ---- the data plane -------------------------------------------------------------------------------------

  #commit(form: "sse" | "raw" | "whole"): void {
    const head = {
      status: this.#status,
      contentType: this.#contentType || "application/octet-stream",
    };
    this.#answer = new Answer(form, head, this.#options.answerBytesMax);
    this.#deps.data.answers.set(this.#start.flightId, this.#answer);
    if (form === "whole") return; // Its one event is `finished`.
    this.#firstContentAtMs = this.#deps.nowMs();
    this.#lastContentAtMs = this.#firstContentAtMs;
    this.#wind(this.#firstContentAtMs);
    this.#post({ kind: "upstream.first_token", leaseId: this.#start.leaseId });
  }

  #append(part: AnswerPart): void {
    const hasRoom = this.#answer?.append(part, this.#onRoom) ?? true;
    if (hasRoom || !this.#pausable || this.#paused || this.#state === "over") return;
    this.#paused = true;
    this.#controller?.pause();
  }

  /** Called from within a reader's turn, perhaps within undici's parser: reading goes on later. */
  readonly #onRoom = (): void => {
    setImmediate(resume, this);
  };

  resume(): void {
    if (!this.#paused || this.#state === "over") return;
    this.#paused = false;
    this.#lastContentAtMs = this.#deps.nowMs(); // What we kept it from sending, it is not blamed for.
    this.#wind(this.#lastContentAtMs);
    this.#controller?.resume();
  }

  /** A sign of life. */
  report(): void {
    this.#post({
      kind: "upstream.progress",
      leaseId: this.#start.leaseId,
      outputTokens: this.#outputTokens,
    });
  }

  // ---- endings --------------------------------------------------------------------------------------------

  get #outputTokens(): number {
    return this.#scanner?.contentEvents ?? 0;
  }

  /** What can be told where the engine states nothing. */
  #countedUsage(): Usage {
    return {
      promptTokens: this.#promptTokensEstimate,
      cachedTokens: 0,
      outputTokens: this.#outputTokens,
    };
  }

  /** @param stored what the cache may keep, or why it must not. */
  #finish(usage: Usage, stored: StoredAnswer | string): void {
    const mustClose = this.#doneAtMs > 0 && this.#state === "sse";
    this.#become("over");
    this.#answer?.finish({ ok: true });
    this.#post({
      kind: "upstream.finished",
      leaseId: this.#start.leaseId,
      usage,
      decodeMs: this.#firstContentAtMs === 0 ? 0 : this.#lastContentAtMs - this.#firstContentAtMs,
      ...(typeof stored === "string" ? { notStorable: stored } : { answer: stored }),
    });
    if (mustClose) this.#controller?.abort(abortReason); // Does nothing where the response has ended.
  }

  #fail(failure: UpstreamFailure, detail: string): void {
    if (this.#state === "over") return;
    this.#become("over");
    const committed = this.#answer !== null && failure !== "client_error";
    if (committed) this.#answer?.finish({ ok: false, code: failureRules[failure].code });
    this.#post({
      kind: "upstream.failed",
      leaseId: this.#start.leaseId,
      failure,
      committed,
      outputTokens: this.#outputTokens,
      ...(this.#status === 0 ? {} : { status: this.#status }),
      ...(this.#retryAfterMs === undefined ? {} : { retryAfterMs: this.#retryAfterMs }),
      detail,
    });
    this.#controller?.abort(abortReason);
  }

  /** The node's 4xx is the client's to read. */
  #relay(body: Uint8Array, contentType: string): void {
    this.#contentType = contentType || "application/json";
    this.#commit("whole");
    this.#append({ bytes: body, usage: false });
    this.#answer?.finish({ ok: true });
    this.#fail("client_error", `status ${this.#status}`);
  }

  #post(event: UpstreamEvent): void {
    this.#deps.post(this.#start.replyTo, event);
  }

  // ---- clocks ---------------------------------------------------------------------------------------------

  #become(state: "sse" | "whole" | "raw" | "refusal" | "over"): void {
    this.#state = state;
    if (state !== "over") return this.#wind(this.#headAtMs);
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    this.#onOver();
  }

  /** The nearest instant at which a clock may strike, as things are now. */
  #dueAtMs(): number {
    const { firstTokenMs, stallMs, totalMs } = this.#start;
    if (this.#doneAtMs > 0) return this.#doneAtMs + LINGER_MS;
    if (this.#state === "refusal") return this.#headAtMs + REFUSAL_MS;
    const totalAtMs = this.#startedAtMs + totalMs;
    if (this.#paused) return totalAtMs;
    const nearer =
      this.#answer !== null || this.#state === "whole"
        ? this.#lastContentAtMs + stallMs
        : this.#startedAtMs + firstTokenMs;
    return Math.min(totalAtMs, nearer);
  }

  /** Sees to it that the timer goes off by the due instant: earlier is fine, it then looks again. */
  #wind(nowMs: number): void {
    const dueAtMs = this.#dueAtMs();
    if (this.#timer !== null) {
      if (this.#timerAtMs <= dueAtMs) return;
      clearTimeout(this.#timer);
    }
    this.#timerAtMs = dueAtMs;
    this.#timer = setTimeout(strike, Math.max(1, Math.ceil(dueAtMs - nowMs)), this);
  }

  onTimer(): void {
    this.#timer = null;
    if (this.#state === "over") return;
    const nowMs = this.#deps.nowMs();
    if (nowMs < this.#dueAtMs()) return this.#wind(nowMs);
    if (this.#doneAtMs > 0) return this.#endStream();
    if (this.#state === "refusal") return this.#endRefusal();
    if (nowMs >= this.#startedAtMs + this.#start.totalMs) {
      return this.#fail("total_timeout", `no end within ${Math.round(this.#start.totalMs)} ms`);
    }
    if (this.#answer !== null || this.#state === "whole") {
      return this.#fail("stalled", `nothing for ${Math.round(this.#start.stallMs)} ms`);
    }
    this.#fail("first_token_timeout", `no token within ${Math.round(this.#start.firstTokenMs)} ms`);
  }
}

function strike(attempt: Attempt): void {
  attempt.onTimer();
}

function resume(attempt: Attempt): void {
  attempt.resume();
}

/** A small request whose answer is wanted whole, in time, or not at all. */
class SmallCall {
  readonly #timer: NodeJS.Timeout;
  #onEnd: ((status: number, text: string) => void) | null;
  #controller: Controller | null = null;
  #status = 0;
  #chunks: Uint8Array[] = [];
  #bytes = 0;

  constructor(timeoutMs: number, onEnd: (status: number, text: string) => void) {
    this.#onEnd = onEnd;
    this.#timer = setTimeout(() => this.#end(0, "timed out"), timeoutMs);
  }

  onRequestStart(controller: Controller): void {
    this.#controller = controller;
    if (this.#onEnd === null) controller.abort(abortReason);
  }

  onResponseStart(_controller: Controller, status: number): void {
    this.#status = status;
  }

  onResponseData(_controller: Controller, chunk: Uint8Array): void {
    this.#chunks.push(chunk);
    this.#bytes += chunk.byteLength;
    if (this.#bytes > REFUSAL_BYTES_MAX) this.#end(0, "an answer too long");
  }

  onResponseEnd(): void {
    this.#end(this.#status, Buffer.concat(this.#chunks).toString("utf8"));
  }

  onResponseError(_controller: Controller | undefined, error: Error): void {
    this.#end(0, failureOfSocket(error, this.#status > 0).detail);
  }

  #end(status: number, text: string): void {
    const onEnd = this.#onEnd;
    if (onEnd === null) return;
    this.#onEnd = null;
    this.#chunks = [];
    clearTimeout(this.#timer);
    onEnd(status, text);
    this.#controller?.abort(abortReason);
  }
}

// ---- what is sent -----------------------------------------------------------------------------------------------

/** Headers that are ours to set, or that belong to the client's own connection. */
const ownHeaders: ReadonlySet<string> = new Set([
  "accept-encoding",
  "authorization",
  "connection",
  "content-length",
  "expect",
  "host",
  "keep-alive",
  "te",
  "transfer-encoding",
  "upgrade",
  "x-headrace-attempt",
  "x-request-id",
]);

function headersFor(request: OutgoingRequest, start: Start, apiKey: string | undefined): string[] {
  const headers: string[] = [];
  let typed = request.body === null;
  for (const name in request.headers) {
    const value = request.headers[name];
    if (value === undefined || ownHeaders.has(name)) continue;
    if (name === "content-type") typed = true;
    headers.push(name, value);
  }
  if (!typed) headers.push("content-type", "application/json");
  if (apiKey !== undefined) headers.push("authorization", `Bearer ${apiKey}`);
  headers.push("x-request-id", start.requestId, "x-headrace-attempt", String(start.attempt));
  return headers;
}

/** Whether the node will answer with events. */
function streams(request: OutgoingRequest): boolean {
  return request.stream && (request.route === "chat" || request.route === "completions");
}

function bodyFor(request: OutgoingRequest): Uint8Array | null {
  const { body } = request;
  return body !== null && streams(request) && !request.wantsUsage ? withUsageAsked(body) : body;
}

const streamOptionsKey = Buffer.from('"stream_options"');
const askUsage = '"stream_options":{"include_usage":true}';

/**
 * The same JSON body, asking for a usage event at the stream's end. Bytes are put in before the last brace;
 * only a body that states `stream_options` already is written anew. A body that is not a JSON object stays.
 */
export function withUsageAsked(bytes: Uint8Array): Uint8Array {
  const body = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (body.includes(streamOptionsKey)) return rewritten(body);
  let last = body.length - 1;
  while (last > 0 && isJsonSpace(body[last])) last--;
  if (body[last] !== 0x7d) return body; // Not "}".
  let before = last - 1;
  while (before > 0 && isJsonSpace(body[before])) before--;
  const comma = body[before] === 0x7b ? "" : ","; // "{": an empty object.
  return Buffer.concat([body.subarray(0, last), Buffer.from(`${comma}${askUsage}}`)]);
}

/** The key occurs: as the option itself, or in some text. */
function rewritten(body: Buffer): Uint8Array {
  try {
    const json: unknown = JSON.parse(body.toString("utf8"));
    if (typeof json !== "object" || json === null || Array.isArray(json)) return body;
    const present = "stream_options" in json ? json.stream_options : null;
    const options = typeof present === "object" && present !== null ? present : {};
    return Buffer.from(
      JSON.stringify({ ...json, stream_options: { ...options, include_usage: true } }),
    );
  } catch {
    return body;
  }
}

function isJsonSpace(byte: number | undefined): boolean {
  return byte === 0x20 || byte === 0x0a || byte === 0x0d || byte === 0x09;
}

const invalidRequest = "invalid_request_error";

function errorJson(type: string, message: string): Uint8Array {
  return Buffer.from(JSON.stringify({ error: { message, type, param: null, code: null } }));
}

function noop(): void {}

function isAnswer(text: string): boolean {
  return !("bad" in checkWhole("chat", Buffer.from(text)));
}

function firstModel(text: string): string | undefined {
  try {
    const json = JSON.parse(text) as { data?: { id?: unknown }[] } | null;
    const id = json?.data?.[0]?.id;
    return typeof id === "string" ? id : undefined;
  } catch {
    return undefined;
  }
}
