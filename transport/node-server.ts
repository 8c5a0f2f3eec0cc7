/**
 * The stand-in inference node: an OpenAI-compatible HTTP server in front of a modelled engine, for
 * tests, demos and load without a GPU. Queue, batching and KV memory are the engine's; the text is
 * node-answers.ts.
 *
 * The engine's µs are the real clock times `speed`. One timer serves the whole server: it fires
 * when the engine's next step ends, and what became due goes out in one write per stream, one SSE
 * event per token.
 *
 *   request ─parse─▶ engine queue ─first token─▶ active (pumped every tick) ─last token─▶ ended
 *                        └────────── client leaves: cancelled in the engine ──────────────┘
 *
 * It misbehaves on demand: see `NodeFault`, settable over HTTP (`/fault`) and in process. It keeps
 * no prompts, logs nothing, and is no security boundary: `/fault` is open to whoever reaches the
 * port.
 */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import {
  answerOf,
  answerWord,
  embeddingOf,
  hashOf,
  naturalTokens,
  type PromptBody,
  promptMaterial,
  promptText,
  tokensOf,
} from "./node-answers.ts";

// ---- the engine, as this server needs it --------------------------------------------------------

/** One generation for the engine; `outputTokens` is what it will produce, at most `maxTokens`. */
export type EngineRequest = {
  id: string;
  promptTokens: number;
  maxTokens: number;
  outputTokens: number;
  prefixBlocks: readonly number[];
};

export type EngineEvent =
  | { kind: "first_token"; id: string; atUs: number; cachedTokens: number }
  | { kind: "finished"; id: string; atUs: number; outputTokens: number }
  | { kind: "preempted" | "refused_never_fits" | "lost"; id: string; atUs: number };

export type EngineState = {
  ready: boolean;
  running: number;
  waiting: number;
  /** 0..1. */
  kv: number;
  /** Blocks of 16 tokens. */
  kvBlocks: number;
  promptTokensTotal: number;
  generatedTokensTotal: number;
  preemptionsTotal: number;
  prefixQueriesTotal: number;
  prefixHitsTotal: number;
};

/** A batching engine under a clock that the caller moves: whole µs, never backwards. */
export interface NodeEngine {
  /** Tokens per block of `prefixBlocks`; 0 = it keeps no prefixes. */
  readonly prefixBlockTokens: number;
  submit(request: EngineRequest, atUs: number): void;
  cancel(id: string, atUs: number): void;
  /** Runs to `untilUs`; events not yet handed over. */
  advance(untilUs: number): readonly EngineEvent[];
  /** When to advance next for events, and for tokens; undefined = nothing to come. */
  nextEventAtUs(): number | undefined;
  nextStepAtUs(): number | undefined;
  /** Tokens produced so far by a request that has not finished. */
  producedTokens(id: string): number;
  snapshot(): EngineState;
  setSlowFactor(factor: number, atUs: number): void;
  hang(atUs: number): void;
  resume(atUs: number): void;
}

// ---- misbehaviour -------------------------------------------------------------------------------

/** Answers that no client should believe; all with status 200 but `redirect`. */
export type BodyFault =
  | "garbage" // right content type, bytes that are no JSON
  | "half_json" // ends in the middle of the JSON
  | "wrong_content_type" // an HTML page
  | "endless_stream" // never ends
  | "error_body" // an OpenAI error object
  | "redirect" // 302 to a closed port
  | "huge_line"; // one SSE line (or one string) of more than 1 MiB

/** Every `BodyFault`. */
export const BODY_FAULTS: readonly BodyFault[] = [
  "garbage",
  "half_json",
  "wrong_content_type",
  "endless_stream",
  "error_body",
  "redirect",
  "huge_line",
];

/**
 * What is wrong with the node now. Absent = nothing. Takes effect at once, on running requests too.
 */
export type NodeFault = {
  /** Share of the requests answered with an error before they reach the engine, 0..1. */
  failRate?: number;
  /** Of these errors, 400..599; default 503. */
  status?: number;
  /** Before these errors, ms; default 5. */
  delayMs?: number;
  /** `retry-after` of these errors, s. */
  retryAfterS?: number;
  /**
   * Destroys every connection that carries a request, those in flight included; only `/fault` still
   * answers.
   */
  refuse?: boolean;
  /** The engine is wedged: takes requests, makes no token. Health and metrics still answer. */
  hang?: boolean;
  /** A stream falls silent after so many tokens; a whole answer that long never comes. */
  stallAfterTokens?: number;
  /** The connection is destroyed after so many tokens; for a whole answer, before its first byte. */
  dieAfterTokens?: number;
  /** Every engine step takes so many times as long. */
  slowFactor?: number;
  /** Answers every well-formed generation like this, without the engine. */
  body?: BodyFault;
};

const FAULT_FIELDS: Record<keyof NodeFault, { accepts: string; isValid: (x: unknown) => boolean }> =
  {
    failRate: { accepts: "a number from 0 to 1", isValid: (x) => isWithin(x, 0, 1) },
    status: {
      accepts: "a whole number from 400 to 599",
      isValid: (x) => isWithin(x, 400, 599) && Number.isInteger(x),
    },
    delayMs: { accepts: "a number from 0 to 600000", isValid: (x) => isWithin(x, 0, 600_000) },
    retryAfterS: { accepts: "a number from 0 to 86400", isValid: (x) => isWithin(x, 0, 86_400) },
    refuse: { accepts: "true or false", isValid: (x) => typeof x === "boolean" },
    hang: { accepts: "true or false", isValid: (x) => typeof x === "boolean" },
    stallAfterTokens: { accepts: "a whole number from 0", isValid: isCount },
    dieAfterTokens: { accepts: "a whole number from 0", isValid: isCount },
    slowFactor: {
      accepts: "a number above 0, at most 1000000",
      isValid: (x) => isWithin(x, Number.MIN_VALUE, 1e6),
    },
    body: {
      accepts: `one of ${BODY_FAULTS.join(", ")}`,
      isValid: (x) => BODY_FAULTS.some((fault) => fault === x),
    },
  };

/**
 * Checks a fault that came from outside: the fault, or a sentence that says what is wrong and what
 * is accepted.
 */
export function parseFault(value: unknown): NodeFault | string {
  if (!isRecord(value)) return "a fault must be a JSON object";
  for (const [key, given] of Object.entries(value)) {
    if (!Object.hasOwn(FAULT_FIELDS, key)) {
      return `unknown fault ${JSON.stringify(key)}; accepted: ${Object.keys(FAULT_FIELDS).join(", ")}`;
    }
    const field = FAULT_FIELDS[key as keyof NodeFault];
    if (!field.isValid(given)) {
      // JSON has no word for NaN.
      const shown = typeof given === "number" ? String(given) : JSON.stringify(given);
      return `${key} must be ${field.accepts}, not ${shown}`;
    }
  }
  return { ...value };
}

// ---- the server ---------------------------------------------------------------------------------

export type NodeServerOptions = {
  engine: NodeEngine;
  /** Names it serves, at least one; a request without a model gets the first. */
  models: readonly string[];
  /** `system_fingerprint` of its answers; default "node". */
  name?: string;
  /** Engine µs per real µs, above 0 and at most 10000; default 1. */
  speed?: number;
  /** When set, `/v1/…` asks for `authorization: Bearer <apiKey>`. */
  apiKey?: string;
  /** Longest prompt plus answer, tokens; default 32768, never more than the KV memory holds. */
  contextTokensMax?: number;
  /** Of embeddings that do not ask for another; default 384. */
  embeddingDimensions?: number;
  /** Open generations, further ones get 503; default 65536. */
  requestsMax?: number;
  /** Larger bodies get 413; default 16 MiB. */
  bodyBytesMax?: number;
};

/** Totals since the start, but for `open`. */
export type NodeServerStats = {
  /** Requests to `/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`. */
  requests: number;
  /** Answered to the end. */
  completed: number;
  /** Clients that left first. */
  aborts: number;
  /** Spoilt by a fault. */
  faulted: number;
  /** Refused as wrong or too much. */
  refused: number;
  open: number;
};

/** At this speed the engine's µs stay exact integers for ten days. */
const SPEED_MAX = 10_000;
/** How often an endless answer grows, ms. */
const ENDLESS_EVERY_MS = 5;
const HUGE_LINE_CHARACTERS = 1_200_000;
const EMBEDDING_DIMENSIONS_MAX = 4096;
/** OpenAI's default of the old completions route. */
const COMPLETION_TOKENS_DEFAULT = 16;
const TOOL_CALL_TOKENS = 8;

type Route = "chat" | "completions" | "embeddings";

/** A request that is not served, in OpenAI's terms. */
type Refusal = { status: number; message: string; param?: string; code?: string };

/** What a well-formed request asks for. */
type Plan = {
  route: Route;
  model: string;
  stream: boolean;
  includeUsage: boolean;
  promptTokens: number;
  maxTokens: number;
  /** Tokens that come out, and why they end. */
  tokens: number;
  finish: "stop" | "length" | "tool_calls";
  hash: number;
  prefixBlocks: number[];
  /** Text of every token where it is not `answerWord`: stop sequences, tool arguments. */
  pieces?: string[];
  tool?: string;
  embedding?: { inputs: string[]; dimensions: number; isBase64: boolean };
};

/** A request in the engine or on its way out. */
type Generation = {
  readonly id: string;
  readonly plan: Plan;
  readonly response: ServerResponse;
  readonly createdS: number;
  cachedTokens: number;
  /** Tokens written. */
  sent: number;
  /** What stands before and after the text of one token; made with the first. */
  frame: readonly [before: string, after: string] | undefined;
  isFinished: boolean;
  isEnded: boolean;
};

export class NodeServer {
  readonly #engine: NodeEngine;
  readonly #models: readonly string[];
  readonly #name: string;
  readonly #nameJson: string;
  readonly #speed: number;
  readonly #authorization: string | undefined;
  readonly #contextTokensMax: number;
  readonly #embeddingDimensions: number;
  readonly #requestsMax: number;
  readonly #bodyBytesMax: number;
  readonly #http: Server;

  readonly #startedAtMs = performance.now();
  #timer: NodeJS.Timeout | undefined = undefined;
  #timerAtMs = Number.POSITIVE_INFINITY;

  readonly #generations = new Map<string, Generation>();
  /**
   * Those with something to write at a tick: streams after their first token, and whatever has
   * finished.
   */
  readonly #active = new Set<Generation>();
  #delayed: { atMs: number; response: ServerResponse; refusal: Refusal; retryAfterS?: number }[] =
    [];
  readonly #endless = new Set<ServerResponse>();
  #fault: NodeFault = {};
  #isClosed = false;
  #ids = 0;
  #draws = 0;
  readonly #idTag: string;
  readonly #counts = { requests: 0, completed: 0, aborts: 0, faulted: 0, refused: 0 };
  readonly #finishes = { stop: 0, length: 0, tool_calls: 0 };

  /** Throws RangeError for options out of their range. */
  constructor(options: NodeServerOptions) {
    const { engine, models, name = "node", speed = 1, apiKey } = options;
    if (models.length === 0) throw new RangeError("models must name at least one model");
    if (!isWithin(speed, Number.MIN_VALUE, SPEED_MAX)) {
      throw new RangeError(`speed must be a number above 0, at most ${SPEED_MAX}, not ${speed}`);
    }
    this.#engine = engine;
    this.#models = models;
    this.#name = name;
    this.#nameJson = JSON.stringify(name);
    this.#speed = speed;
    this.#authorization = apiKey === undefined ? undefined : `Bearer ${apiKey}`;
    const kvTokens = engine.snapshot().kvBlocks * 16;
    this.#contextTokensMax = Math.min(options.contextTokensMax ?? 32_768, kvTokens);
    this.#embeddingDimensions = options.embeddingDimensions ?? 384;
    this.#requestsMax = options.requestsMax ?? 65_536;
    this.#bodyBytesMax = options.bodyBytesMax ?? 16 * 1024 * 1024;
    this.#idTag = hashOf(name).toString(36);
    this.#http = createServer((request, response) => this.#onRequest(request, response));
    // Longer than any client pool keeps an idle connection, so that the client closes first.
    this.#http.keepAliveTimeout = 90_000;
  }

  /**
   * Opens the port (0 = any free one). Rejects with a sentence when the port is taken or may not be
   * opened.
   */
  listen(port: number, host = "127.0.0.1"): Promise<{ port: number; url: string }> {
    return new Promise((resolve, reject) => {
      this.#http.once("error", (error: NodeJS.ErrnoException) => {
        reject(new Error(listenProblem(error, port, host), { cause: error }));
      });
      this.#http.listen(port, host, () => {
        this.#http.removeAllListeners("error");
        const { port: realPort } = this.#http.address() as AddressInfo;
        const hostInUrl = host.includes(":") ? `[${host}]` : host;
        resolve({ port: realPort, url: `http://${hostInUrl}:${realPort}` });
      });
    });
  }

  /** Closes the port and every connection at once; resolves when nothing is left. */
  close(): Promise<void> {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    return new Promise((resolve) => {
      this.#http.close(() => resolve());
      this.#http.closeAllConnections();
    });
  }

  /** Replaces the fault; {} heals. */
  setFault(fault: NodeFault): void {
    const atMs = performance.now();
    this.#catchUp(atMs);
    this.#fault = { ...fault };
    const atUs = this.#engineUs(atMs);
    this.#engine.setSlowFactor(fault.slowFactor ?? 1, atUs);
    if (fault.hang === true) this.#engine.hang(atUs);
    else this.#engine.resume(atUs);
    if (fault.refuse === true) {
      for (const generation of this.#generations.values()) this.#kill(generation, atUs);
      for (const { response } of this.#delayed) response.socket?.destroy();
      for (const response of this.#endless) response.socket?.destroy();
      this.#delayed = [];
    }
    this.#catchUp(atMs);
    this.#arm(atMs);
  }

  fault(): NodeFault {
    return { ...this.#fault };
  }

  stats(): NodeServerStats {
    return { ...this.#counts, open: this.#generations.size };
  }

  // ---- requests ---------------------------------------------------------------------------------

  #onRequest(request: IncomingMessage, response: ServerResponse): void {
    const url = request.url ?? "/";
    const query = url.indexOf("?");
    const path = query < 0 ? url : url.slice(0, query);
    if (path === "/fault") {
      this.#onFault(request, response);
      return;
    }
    if (this.#fault.refuse === true) {
      this.#counts.faulted++;
      request.socket.destroy();
      return;
    }
    switch (path) {
      case "/v1/chat/completions":
        this.#onGenerate(request, response, "chat");
        return;
      case "/v1/completions":
        this.#onGenerate(request, response, "completions");
        return;
      case "/v1/embeddings":
        this.#onGenerate(request, response, "embeddings");
        return;
      case "/v1/models":
        if (this.#isAllowed(request, response, "GET")) sendJson(response, 200, this.#modelList());
        return;
      case "/health":
        response.writeHead(this.#engine.snapshot().ready ? 200 : 503);
        response.end();
        return;
      case "/metrics":
        response.writeHead(200, { "content-type": "text/plain; version=0.0.4; charset=utf-8" });
        response.end(this.#metricsText());
        return;
      default:
        sendRefusal(response, { status: 404, message: `no such path: ${path}` });
    }
  }

  #isAllowed(request: IncomingMessage, response: ServerResponse, method: string): boolean {
    if (request.method !== method) {
      response.setHeader("allow", method);
      sendRefusal(response, { status: 405, message: `use ${method}` });
      return false;
    }
    if (
      this.#authorization !== undefined &&
      request.headers.authorization !== this.#authorization
    ) {
      const message = "missing or wrong API key: send it as `authorization: Bearer <key>`";
      sendRefusal(response, { status: 401, message, code: "invalid_api_key" });
      return false;
    }
    return true;
  }

  #onFault(request: IncomingMessage, response: ServerResponse): void {
    switch (request.method) {
      case "GET":
        sendJson(response, 200, this.#fault);
        return;
      case "DELETE":
        this.setFault({});
        sendJson(response, 200, this.#fault);
        return;
      case "POST":
        readBody(request, response, this.#bodyBytesMax, (text) => {
          const parsed = parseJson(text);
          const fault = parsed === undefined ? "the body is not valid JSON" : parseFault(parsed);
          if (typeof fault === "string") {
            sendRefusal(response, { status: 400, message: fault });
            return;
          }
          this.setFault(fault);
          sendJson(response, 200, this.#fault);
        });
        return;
      default:
        response.setHeader("allow", "GET, POST, DELETE");
        sendRefusal(response, { status: 405, message: "use GET, POST or DELETE" });
    }
  }

  #onGenerate(request: IncomingMessage, response: ServerResponse, route: Route): void {
    if (!this.#isAllowed(request, response, "POST")) return;
    this.#counts.requests++;
    readBody(request, response, this.#bodyBytesMax, (text) => {
      const { failRate = 0, status = 503, delayMs = 5, retryAfterS, body } = this.#fault;
      if (failRate > 0 && this.#chance() < failRate) {
        this.#counts.faulted++;
        const atMs = performance.now() + delayMs;
        const refusal = { status, message: "the node is failing on purpose", code: "fault" };
        const retry = retryAfterS === undefined ? {} : { retryAfterS };
        this.#delayed.push({ atMs, response, refusal, ...retry });
        this.#arm(performance.now());
        return;
      }
      const plan = this.#plan(text, route);
      if ("status" in plan) {
        this.#counts.refused++;
        sendRefusal(response, plan);
      } else if (body !== undefined) {
        this.#counts.faulted++;
        this.#sendBodyFault(response, plan, body);
      } else this.#start(plan, response);
    });
  }

  #start(plan: Plan, response: ServerResponse): void {
    if (this.#generations.size >= this.#requestsMax) {
      this.#counts.refused++;
      response.setHeader("retry-after", "1");
      sendRefusal(response, { status: 503, message: "too many open requests", code: "overloaded" });
      return;
    }
    const generation: Generation = {
      id: this.#nextId(plan),
      plan,
      response,
      createdS: Math.floor(Date.now() / 1000),
      cachedTokens: 0,
      sent: 0,
      frame: undefined,
      isFinished: false,
      isEnded: false,
    };
    const { id } = generation;
    const { promptTokens, maxTokens, prefixBlocks } = plan;
    this.#generations.set(id, generation);
    response.on("close", () => this.#onClose(generation));
    const nowMs = performance.now();
    const engineRequest = { id, promptTokens, maxTokens, outputTokens: plan.tokens, prefixBlocks };
    this.#engine.submit(engineRequest, this.#engineUs(nowMs));
    this.#arm(nowMs);
  }

  #nextId({ route }: Plan): string {
    const prefix = { chat: "chatcmpl", completions: "cmpl", embeddings: "embd" }[route];
    return `${prefix}-${this.#idTag}-${(++this.#ids).toString(36)}`;
  }

  /** The client left, or the answer is out. */
  #onClose(generation: Generation): void {
    if (generation.isEnded) return;
    this.#counts.aborts++;
    this.#end(generation);
    const nowMs = performance.now();
    this.#engine.cancel(generation.id, this.#engineUs(nowMs));
    this.#arm(nowMs);
  }

  #end(generation: Generation): void {
    generation.isEnded = true;
    this.#generations.delete(generation.id);
    this.#active.delete(generation);
  }

  /** Destroys the connection of a request, once what was written is out. */
  #kill(generation: Generation, atUs: number): void {
    this.#counts.faulted++;
    this.#end(generation);
    this.#engine.cancel(generation.id, atUs);
    generation.response.socket?.destroySoon();
  }

  // ---- time -------------------------------------------------------------------------------------

  #engineUs(nowMs: number): number {
    return Math.floor((nowMs - this.#startedAtMs) * 1000 * this.#speed);
  }

  /** Sets the one timer to the next moment at which anything is due, unless it is early enough. */
  #arm(nowMs: number): void {
    const soonestMs = nowMs + 1; // What a timer can do.
    if (this.#isClosed || this.#timerAtMs <= soonestMs) return;
    const engineAtUs =
      this.#active.size > 0 ? this.#engine.nextStepAtUs() : this.#engine.nextEventAtUs();
    let atMs = Number.POSITIVE_INFINITY;
    if (engineAtUs !== undefined) atMs = this.#startedAtMs + engineAtUs / (1000 * this.#speed);
    if (this.#endless.size > 0) atMs = Math.min(atMs, nowMs + ENDLESS_EVERY_MS);
    for (const failure of this.#delayed) atMs = Math.min(atMs, failure.atMs);
    atMs = Math.max(atMs, soonestMs);
    if (atMs >= this.#timerAtMs) return;
    clearTimeout(this.#timer);
    this.#timerAtMs = atMs;
    this.#timer = setTimeout(() => this.#onTimer(), Math.min(Math.ceil(atMs - nowMs), 2 ** 31 - 1));
  }

  #onTimer(): void {
    this.#timerAtMs = Number.POSITIVE_INFINITY;
    const nowMs = performance.now();
    this.#catchUp(nowMs);
    if (this.#delayed.length > 0) this.#failDue(nowMs);
    for (const response of this.#endless) {
      if (!response.writableNeedDrain) response.write(endlessPart(response));
    }
    this.#arm(nowMs);
  }

  /** Brings the engine to now and writes what became due. */
  #catchUp(nowMs: number): void {
    const atUs = this.#engineUs(nowMs);
    for (const event of this.#engine.advance(atUs)) this.#onEngineEvent(event);
    for (const generation of this.#active) this.#pump(generation, atUs);
  }

  #onEngineEvent(event: EngineEvent): void {
    const generation = this.#generations.get(event.id);
    if (generation === undefined) return; // It has left in the meantime.
    switch (event.kind) {
      case "first_token":
        generation.cachedTokens = event.cachedTokens;
        if (generation.plan.stream || this.#fault.dieAfterTokens !== undefined) {
          this.#active.add(generation);
        }
        return;
      case "finished":
        generation.isFinished = true;
        this.#active.add(generation);
        return;
      case "preempted":
        return;
      case "refused_never_fits":
        this.#counts.refused++;
        this.#end(generation);
        sendRefusal(generation.response, {
          status: 400,
          message: "prompt and answer exceed this node's KV memory",
          code: "context_length_exceeded",
        });
        return;
      case "lost":
        this.#end(generation);
        generation.response.socket?.destroy();
        return;
      default:
        event satisfies never;
    }
  }

  #failDue(nowMs: number): void {
    const due = this.#delayed.filter((failure) => failure.atMs <= nowMs);
    if (due.length === 0) return;
    this.#delayed = this.#delayed.filter((failure) => failure.atMs > nowMs);
    for (const { response, refusal, retryAfterS } of due) {
      if (retryAfterS !== undefined) response.setHeader("retry-after", String(retryAfterS));
      sendRefusal(response, refusal);
    }
  }

  // ---- answers ----------------------------------------------------------------------------------

  /** Writes what the engine has produced since the last time, within what the fault lets out. */
  #pump(generation: Generation, atUs: number): void {
    const { plan, response } = generation;
    const { dieAfterTokens, stallAfterTokens } = this.#fault;
    if (!generation.isFinished && response.writableNeedDrain) return; // A slow reader; all of it later.
    let upTo = generation.isFinished ? plan.tokens : this.#engine.producedTokens(generation.id);
    const isDying = dieAfterTokens !== undefined && upTo >= dieAfterTokens;
    if (isDying) upTo = dieAfterTokens;
    const isStalled = stallAfterTokens !== undefined && upTo >= stallAfterTokens;
    if (isStalled) upTo = stallAfterTokens;
    const isLast = generation.isFinished && !isDying && !isStalled;
    if (plan.stream) {
      const text = this.#streamText(generation, upTo, isLast);
      if (isLast) response.end(text);
      else if (text.length > 0) response.write(text);
    } else if (isLast) sendText(response, 200, this.#wholeText(generation));
    if (isLast) {
      this.#counts.completed++;
      this.#finishes[plan.finish]++;
      this.#end(generation);
    } else if (isDying) this.#kill(generation, atUs);
  }

  /** SSE events of the tokens up to `upTo`; headers and the opening event go before the first. */
  #streamText(generation: Generation, upTo: number, isLast: boolean): string {
    const { plan, response } = generation;
    let text = "";
    if (!response.headersSent) {
      response.writeHead(200, SSE_HEADERS);
      text = this.#openingEvent(generation);
    }
    if (upTo > generation.sent) {
      generation.frame ??= this.#tokenFrame(generation);
      const [before, after] = generation.frame;
      const { pieces, hash } = plan;
      for (let i = generation.sent; i < upTo; i++) {
        const piece = pieces === undefined ? answerWord(hash, i) : (pieces[i] ?? "");
        if (piece.length > 0) text += before + piece + after;
      }
      generation.sent = upTo;
    }
    if (isLast) text += this.#closingEvents(generation);
    return text;
  }

  /** Everything of a chunk up to its choices. */
  #chunkHead({ id, createdS, plan }: Generation): string {
    const object = plan.route === "chat" ? "chat.completion.chunk" : "text_completion";
    return (
      `data: {"id":"${id}","object":"${object}","created":${createdS},` +
      `"model":${JSON.stringify(plan.model)},"system_fingerprint":${this.#nameJson},`
    );
  }

  #openingEvent(generation: Generation): string {
    const { plan, id } = generation;
    if (plan.route !== "chat") return "";
    const head = `${this.#chunkHead(generation)}"choices":[{"index":0,"delta":{"role":"assistant",`;
    const end = `},"logprobs":null,"finish_reason":null}]}\n\n`;
    if (plan.tool === undefined) return `${head}"content":""${end}`;
    const call = { index: 0, id: `call_${id}`, type: "function" };
    const named = { ...call, function: { name: plan.tool, arguments: "" } };
    return `${head}"content":null,"tool_calls":${JSON.stringify([named])}${end}`;
  }

  #tokenFrame(generation: Generation): [before: string, after: string] {
    const { plan } = generation;
    const head = `${this.#chunkHead(generation)}"choices":[{"index":0,`;
    const after = `"logprobs":null,"finish_reason":null}]}\n\n`;
    if (plan.route !== "chat") return [`${head}"text":"`, `",${after}`];
    if (plan.tool === undefined) return [`${head}"delta":{"content":"`, `"},${after}`];
    const call = `"delta":{"tool_calls":[{"index":0,"function":{"arguments":"`;
    return [`${head}${call}`, `"}}]},${after}`];
  }

  #closingEvents(generation: Generation): string {
    const { plan } = generation;
    const head = this.#chunkHead(generation);
    const empty = plan.route === "chat" ? `"delta":{}` : `"text":""`;
    let text = `${head}"choices":[{"index":0,${empty},"logprobs":null,"finish_reason":"${plan.finish}"}]}\n\n`;
    if (plan.includeUsage) text += `${head}"choices":[],"usage":${usageJson(generation)}}\n\n`;
    return `${text}data: [DONE]\n\n`;
  }

  #wholeText(generation: Generation): string {
    const { plan, id, createdS } = generation;
    if (plan.embedding !== undefined) return embeddingsJson(plan, plan.embedding);
    const object = plan.route === "chat" ? "chat.completion" : "text_completion";
    // Of a tool call the pieces are written for the inside of a JSON string: `arguments` is one.
    const text =
      plan.pieces === undefined ? answerOf(plan.hash, plan.tokens) : plan.pieces.join("");
    let answer: string;
    if (plan.route !== "chat") answer = `"text":"${text}"`;
    else if (plan.tool === undefined) {
      answer = `"message":{"role":"assistant","content":"${text}","refusal":null}`;
    } else {
      const named = `{"name":${JSON.stringify(plan.tool)},"arguments":"${text}"}`;
      const call = `{"id":"call_${id}","type":"function","function":${named}}`;
      answer = `"message":{"role":"assistant","content":null,"refusal":null,"tool_calls":[${call}]}`;
    }
    return (
      `{"id":"${id}","object":"${object}","created":${createdS},"model":${JSON.stringify(plan.model)},` +
      `"system_fingerprint":${this.#nameJson},"choices":[{"index":0,${answer},` +
      `"logprobs":null,"finish_reason":"${plan.finish}"}],"usage":${usageJson(generation)}}`
    );
  }

  #sendBodyFault(response: ServerResponse, plan: Plan, fault: BodyFault): void {
    const type = plan.stream ? "text/event-stream" : "application/json";
    const line = (json: string) => (plan.stream ? `data: ${json}\n\n` : json);
    const send = (body: string, contentType = type) => {
      response.writeHead(200, { "content-type": contentType });
      response.end(body);
    };
    const choice = (text: string) =>
      plan.stream
        ? `{"choices":[{"index":0,"delta":{"content":"${text}"}}]}`
        : `{"choices":[{"index":0,"message":{"role":"assistant","content":"${text}"}}]}`;
    switch (fault) {
      case "garbage":
        send(line("\u0001\u0002 not json at all }{"));
        return;
      case "half_json":
        send(line(choice("half")).slice(0, 30));
        return;
      case "wrong_content_type":
        send("<!doctype html><title>Bad gateway</title><p>It works!", "text/html");
        return;
      case "endless_stream":
        response.writeHead(200, { "content-type": type });
        response.on("close", () => this.#endless.delete(response));
        this.#endless.add(response);
        this.#arm(performance.now());
        return;
      case "error_body": {
        const error = errorJson({ status: 500, message: "CUDA error: out of memory" });
        send(plan.stream ? `data: ${error}\n\ndata: [DONE]\n\n` : error);
        return;
      }
      case "redirect":
        response.writeHead(302, { location: "http://127.0.0.1:1/v1/chat/completions" });
        response.end();
        return;
      case "huge_line":
        send(line(choice("x".repeat(HUGE_LINE_CHARACTERS))));
        return;
      default:
        fault satisfies never;
    }
  }

  // ---- parsing ----------------------------------------------------------------------------------

  #plan(text: string, route: Route): Plan | Refusal {
    const body = parseJson(text);
    if (body === undefined) return { status: 400, message: "the body is not valid JSON" };
    if (!isRecord(body)) return { status: 400, message: "the body must be a JSON object" };
    const model = body.model ?? this.#models[0];
    if (typeof model !== "string" || !this.#models.includes(model)) {
      const message = `the model ${JSON.stringify(model)} does not exist; served: ${this.#models.join(", ")}`;
      return { status: 404, message, param: "model", code: "model_not_found" };
    }
    if (route === "embeddings") return this.#planEmbedding(body, model);
    const problem = route === "chat" ? messagesProblem(body) : promptProblem(body);
    if (problem !== undefined) return problem;
    const stops = stopsOf(body.stop);
    if (stops === undefined) return invalid("stop", "must be a text or a list of texts");
    const oneOnly = body.n === undefined || body.n === null || body.n === 1;
    if (!oneOnly) return invalid("n", "must be 1: this node gives one answer a request");

    const limitName = isGiven(body.max_completion_tokens) ? "max_completion_tokens" : "max_tokens";
    const limit = body[limitName];
    if (isGiven(limit) && !isPositive(limit)) {
      return invalid(limitName, "must be a whole number of at least 1");
    }
    const wish = body.headrace_output_tokens;
    if (isGiven(wish) && !isPositive(wish)) {
      return invalid("headrace_output_tokens", "must be a whole number of at least 1");
    }

    const prompt = promptText(body);
    const promptTokens = tokensOf(prompt);
    const room = this.#contextTokensMax - promptTokens;
    const standard = route === "chat" ? room : Math.min(room, COMPLETION_TOKENS_DEFAULT);
    const maxTokens = isPositive(limit) ? limit : Math.max(1, standard);
    if (maxTokens > room) return tooLong(this.#contextTokensMax, promptTokens, maxTokens);

    const prefixBlocks: number[] = [];
    const blockTokens = this.#engine.prefixBlockTokens;
    const hash = hashOf(promptMaterial(body, model), blockTokens, prompt.length, prefixBlocks);
    const natural = isPositive(wish) ? wish : naturalTokens(hash);
    const options = isRecord(body.stream_options) ? body.stream_options : {};
    const plan: Plan = {
      route,
      model,
      stream: body.stream === true,
      includeUsage: options.include_usage === true,
      promptTokens,
      maxTokens,
      tokens: Math.min(natural, maxTokens),
      finish: natural > maxTokens ? "length" : "stop",
      hash,
      prefixBlocks,
    };
    const tool = route === "chat" ? toolToCall(body) : undefined;
    if (tool !== undefined) callTool(plan, tool);
    else if (stops.length > 0) applyStops(plan, stops);
    return plan;
  }

  #planEmbedding(body: PromptBody, model: string): Plan | Refusal {
    const inputs = embeddingInputs(body.input);
    if (inputs === undefined) {
      return invalid("input", "must be a text, a list of texts, or token ids; none of them empty");
    }
    const dimensions = body.dimensions ?? this.#embeddingDimensions;
    if (!isPositive(dimensions) || dimensions > EMBEDDING_DIMENSIONS_MAX) {
      return invalid("dimensions", `must be a whole number from 1 to ${EMBEDDING_DIMENSIONS_MAX}`);
    }
    const format = body.encoding_format ?? "float";
    if (format !== "float" && format !== "base64") {
      return invalid("encoding_format", "must be float or base64");
    }
    const promptTokens = inputs.reduce((sum, input) => sum + tokensOf(input), 0);
    if (promptTokens >= this.#contextTokensMax) {
      return tooLong(this.#contextTokensMax, promptTokens, 1);
    }
    return {
      route: "embeddings",
      model,
      stream: false,
      includeUsage: false,
      promptTokens,
      maxTokens: 1,
      tokens: 1,
      finish: "stop",
      hash: 0,
      prefixBlocks: [],
      embedding: { inputs, dimensions, isBase64: format === "base64" },
    };
  }

  // ---- what it tells of itself ------------------------------------------------------------------

  #modelList(): unknown {
    const data = this.#models.map((id) => ({
      id,
      object: "model",
      created: 1_700_000_000,
      owned_by: "headrace",
      max_model_len: this.#contextTokensMax,
    }));
    return { object: "list", data };
  }

  /** vLLM's names, so that whoever reads a real engine reads this one. */
  #metricsText(): string {
    this.#catchUp(performance.now());
    const state = this.#engine.snapshot();
    const labels = `engine="0",model_name=${JSON.stringify(this.#models[0])}`;
    const lines: string[] = [];
    const metric = (type: "gauge" | "counter", name: string, value: number, extra = "") => {
      lines.push(`# TYPE ${name} ${type}`, `${name}{${labels}${extra}} ${value}`);
    };
    metric("gauge", "vllm:num_requests_running", state.running);
    metric("gauge", "vllm:num_requests_waiting", state.waiting);
    metric("gauge", "vllm:kv_cache_usage_perc", state.kv);
    metric("counter", "vllm:prompt_tokens_total", state.promptTokensTotal);
    metric("counter", "vllm:generation_tokens_total", state.generatedTokensTotal);
    metric("counter", "vllm:prefix_cache_queries_total", state.prefixQueriesTotal);
    metric("counter", "vllm:prefix_cache_hits_total", state.prefixHitsTotal);
    metric("counter", "vllm:num_preemptions_total", state.preemptionsTotal);
    const { stop, length, tool_calls } = this.#finishes;
    const success = "vllm:request_success_total";
    metric("counter", success, stop + tool_calls, `,finished_reason="stop"`);
    lines.push(`${success}{${labels},finished_reason="length"} ${length}`);
    lines.push(`${success}{${labels},finished_reason="abort"} ${this.#counts.aborts}`);
    const config = `,block_size="16",num_gpu_blocks="${state.kvBlocks}"`;
    metric("gauge", "vllm:cache_config_info", 1, config);
    metric("counter", "headrace_node_requests_total", this.#counts.requests);
    metric("counter", "headrace_node_aborts_total", this.#counts.aborts);
    return `${lines.join("\n")}\n`;
  }

  /** Uniform in [0, 1), the same sequence in every run of a node of this name. */
  #chance(): number {
    return hashOf(`${this.#name} ${++this.#draws}`) / 4294967296;
  }
}

// ---- bodies and answers -------------------------------------------------------------------------

const SSE_HEADERS = {
  "content-type": "text/event-stream; charset=utf-8",
  "cache-control": "no-cache",
};

function readBody(
  request: IncomingMessage,
  response: ServerResponse,
  bytesMax: number,
  done: (text: string) => void,
): void {
  let first: Buffer | undefined;
  let rest: Buffer[] | undefined;
  let bytes = 0;
  request.on("data", (chunk: Buffer) => {
    bytes += chunk.length;
    if (bytes > bytesMax) {
      if (response.headersSent) return;
      response.setHeader("connection", "close");
      sendRefusal(response, { status: 413, message: `the body exceeds ${bytesMax} bytes` });
      return;
    }
    if (first === undefined) first = chunk;
    else if (rest === undefined) rest = [first, chunk];
    else rest.push(chunk);
  });
  request.on("end", () => {
    if (bytes > bytesMax) return;
    done((rest === undefined ? (first ?? Buffer.alloc(0)) : Buffer.concat(rest)).toString());
  });
}

/** Undefined for what is not JSON. */
function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function sendText(response: ServerResponse, status: number, json: string): void {
  response.writeHead(status, {
    "content-type": "application/json",
    "content-length": Buffer.byteLength(json),
  });
  response.end(json);
}

function sendJson(response: ServerResponse, status: number, value: unknown): void {
  sendText(response, status, JSON.stringify(value));
}

function sendRefusal(response: ServerResponse, refusal: Refusal): void {
  sendText(response, refusal.status, errorJson(refusal));
}

function errorJson({ status, message, param, code }: Refusal): string {
  const type = status >= 500 ? "server_error" : "invalid_request_error";
  return JSON.stringify({ error: { message, type, param: param ?? null, code: code ?? null } });
}

function usageJson({ plan, cachedTokens }: Generation): string {
  const { promptTokens, tokens } = plan;
  return (
    `{"prompt_tokens":${promptTokens},"completion_tokens":${tokens},` +
    `"total_tokens":${promptTokens + tokens},"prompt_tokens_details":{"cached_tokens":${cachedTokens}}}`
  );
}

function embeddingsJson(plan: Plan, wanted: NonNullable<Plan["embedding"]>): string {
  const data = wanted.inputs.map((input, index) => {
    const vector = embeddingOf(input, wanted.dimensions);
    const bytes = Buffer.from(vector.buffer);
    const embedding = wanted.isBase64 ? bytes.toString("base64") : Array.from(vector);
    return { object: "embedding", index, embedding };
  });
  const usage = { prompt_tokens: plan.promptTokens, total_tokens: plan.promptTokens };
  return JSON.stringify({ object: "list", data, model: plan.model, usage });
}

/** More of an answer that never ends. */
function endlessPart(response: ServerResponse): string {
  if (response.getHeader("content-type") === "application/json") return "[".repeat(16_384);
  return `data: {"choices":[{"index":0,"delta":{"content":" on"}}]}\n\n`.repeat(256);
}

// ---- checks on requests -------------------------------------------------------------------------

function invalid(param: string, problem: string): Refusal {
  return { status: 400, message: `${param} ${problem}`, param, code: "invalid_value" };
}

function tooLong(contextTokensMax: number, promptTokens: number, maxTokens: number): Refusal {
  return {
    status: 400,
    message:
      `the context is at most ${contextTokensMax} tokens, but this request has ${promptTokens} ` +
      `in the prompt and asks for ${maxTokens} more`,
    param: "messages",
    code: "context_length_exceeded",
  };
}

function messagesProblem({ messages }: PromptBody): Refusal | undefined {
  if (!Array.isArray(messages) || messages.length === 0) {
    return invalid("messages", "must be a list of at least one message");
  }
  const isSound = (message: unknown) => isRecord(message) && typeof message.role === "string";
  const wrong = messages.findIndex((message) => !isSound(message));
  return wrong < 0 ? undefined : invalid(`messages[${wrong}]`, "must be an object with a role");
}

function promptProblem({ prompt }: PromptBody): Refusal | undefined {
  if (typeof prompt === "string") return undefined;
  if (!Array.isArray(prompt) || prompt.length === 0) {
    return invalid("prompt", "must be a text or token ids");
  }
  const isOne = prompt.length === 1 && typeof prompt[0] === "string";
  if (isOne || prompt.every((token) => Number.isInteger(token))) return undefined;
  return invalid("prompt", "must be one text or the token ids of one");
}

/** [] when absent, undefined when wrong. */
function stopsOf(stop: unknown): string[] | undefined {
  if (!isGiven(stop)) return [];
  const stops: unknown[] = Array.isArray(stop) ? stop : [stop];
  const texts = stops.filter((each) => typeof each === "string" && each.length > 0);
  return texts.length === stops.length ? (texts as string[]) : undefined;
}

function embeddingInputs(input: unknown): string[] | undefined {
  if (typeof input === "string") return input.length > 0 ? [input] : undefined;
  if (!Array.isArray(input) || input.length === 0) return undefined;
  if (input.every((each) => Number.isInteger(each))) return [input.join(" ")];
  const texts: string[] = [];
  for (const each of input as unknown[]) {
    if (typeof each === "string" && each.length > 0) texts.push(each);
    else if (Array.isArray(each) && each.length > 0 && each.every((id) => Number.isInteger(id))) {
      texts.push(each.join(" "));
    } else return undefined;
  }
  return texts;
}

/** The tool that the last user message says to call, if the request offers it. */
function toolToCall(body: PromptBody): string | undefined {
  if (!Array.isArray(body.tools) || !Array.isArray(body.messages)) return undefined;
  if (body.tool_choice === "none") return undefined;
  const last = (body.messages as unknown[]).findLast(
    (message) => isRecord(message) && message.role === "user",
  );
  const text = promptText({ messages: [last] });
  const name = /call tool ([\w-]+)/.exec(text)?.[1];
  const isOffered = (tool: unknown) =>
    isRecord(tool) && isRecord(tool.function) && tool.function.name === name;
  return name !== undefined && body.tools.some(isOffered) ? name : undefined;
}

/**
 * Answers with a call of the tool, arguments {"text": "<words>"}; never cut, so that they stay
 * JSON.
 */
function callTool(plan: Plan, tool: string): void {
  const words = TOOL_CALL_TOKENS - 2;
  plan.tool = tool;
  plan.finish = "tool_calls";
  plan.tokens = Math.min(TOOL_CALL_TOKENS, plan.maxTokens);
  const escaped = ['{\\"text\\":\\"'];
  for (let i = 0; i < words; i++) escaped.push(answerWord(plan.hash, i));
  escaped.push('\\"}');
  // With fewer tokens allowed, the last one carries the rest.
  plan.pieces = escaped.slice(0, plan.tokens - 1);
  plan.pieces.push(escaped.slice(plan.tokens - 1).join(""));
}

/**
 * Ends the answer before the first stop text; the token that completes it is the last one produced.
 */
function applyStops(plan: Plan, stops: readonly string[]): void {
  const pieces: string[] = [];
  let text = "";
  for (let i = 0; i < plan.tokens; i++) {
    const piece = answerWord(plan.hash, i);
    pieces.push(piece);
    text += piece;
  }
  const found = stops.map((stop) => ({ at: text.indexOf(stop), stop })).filter(({ at }) => at >= 0);
  const first = found.sort((a, b) => a.at - b.at)[0];
  if (first === undefined) return;
  const endsAt = first.at + first.stop.length;
  plan.pieces = [];
  plan.finish = "stop";
  let from = 0;
  for (const piece of pieces) {
    plan.pieces.push(piece.slice(0, Math.max(0, first.at - from)));
    from += piece.length;
    if (from >= endsAt) break;
  }
  plan.tokens = plan.pieces.length;
}

function listenProblem(error: NodeJS.ErrnoException, port: number, host: string): string {
  if (error.code === "EADDRINUSE") {
    return `port ${port} on ${host} is taken; choose another, or 0 for any free one`;
  }
  if (error.code === "EACCES") return `no permission to open port ${port} on ${host}`;
  if (error.code === "EADDRNOTAVAIL") return `${host} is not an address of this machine`;
  return `cannot listen on ${host}:${port}: ${error.message}`;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isGiven(value: unknown): boolean {
  return value !== undefined && value !== null;
}

function isPositive(value: unknown): value is number {
  return Number.isSafeInteger(value) && Number(value) >= 1;
}

function isCount(value: unknown): boolean {
  return Number.isSafeInteger(value) && Number(value) >= 0;
}

function isWithin(value: unknown, least: number, most: number): boolean {
  return typeof value === "number" && value >= least && value <= most;
}
