/**
 * Sends a recorded load to an OpenAI-compatible server in real time and measures the answers, as a client sees
 * them.
 *
 * Open loop: a request is sent when the load says so, whatever became of those before it. A client that waited
 * for answers would slow down with the server and hide its queue. Only `inflightMax` bounds what is open at once;
 * a request beyond it is not sent late but not at all, and counted as refused by the client. How late requests
 * left is measured, so that one sees whether this client kept up.
 *
 * Recordings hold no text, so prompts are made from lengths and hashes: a token is a word of three letters and a
 * space, an equal block id is an equal text, an equal `question` an equal request, byte for byte. The same load
 * gives the same prompts in every run; `salt` gives others.
 *
 * It keeps no answer; what is measured stands in replay-report.ts.
 */

import type { ClientRequest, IncomingMessage, OutgoingHttpHeaders } from "node:http";
import { type Agent, Agent as HttpAgent, request as httpRequest } from "node:http";
import { Agent as HttpsAgent, request as httpsRequest } from "node:https";
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";
import { Random } from "../runtime/random.ts";
import {
  type AnswerHeaders,
  type ReplayEnding,
  type ReplayReport,
  ReplayTally,
  replayCacheKinds,
} from "./replay-report.ts";

/** One request of a load: what sending it takes. The simulator's `TraceRequest` is one. */
export type ReplayRequest = {
  /** Arrival, µs since the load began; never falling from one to the next. */
  readonly atUs: number;
  readonly inputTokens: number;
  /** Answer length to ask for; 0 = not known: the mean so far is asked for, within `maxTokens`. */
  readonly outputTokens: number;
  readonly maxTokens?: number;
  readonly model?: string;
  readonly session?: string;
  /** Ids of the prompt's blocks of `blockTokens` tokens: an equal id is an equal text. */
  readonly prefix?: readonly number[];
  readonly blockTokens?: number;
  /** Equal values are sent as equal requests, byte for byte. */
  readonly question?: string;
};

export type ReplayOptions = {
  requests: AsyncIterable<ReplayRequest> | Iterable<ReplayRequest>;
  /** Base URL, http or https, with or without `/v1`. */
  target: string;
  apiKey?: string;
  /** Sent instead of the recorded models. Absent: the recorded one if the target serves it, else its first. */
  model?: string;
  /** 2 sends in half the time; default 1. */
  speed?: number;
  /** Requests at most. */
  limit?: number;
  /** Ask for streamed answers (default). Without, there is no TTFT and no TPOT. */
  stream?: boolean;
  /** Requests open at once, default 4096: a safety bound, see above. */
  inflightMax?: number;
  /** Goes into every prompt: a run with another salt meets none of the texts that this one left in caches. */
  salt?: string;
  /** Called a few times a second, and once at the end. */
  onProgress?: (progress: ReplayProgress) => void;
  /** Stops sending and breaks off what is open; the report then holds what was measured. */
  signal?: AbortSignal;
};

export type ReplayProgress = {
  elapsedMs: number;
  sent: number;
  ok: number;
  refused: number;
  failed: number;
  inflight: number;
};

/** A replay that cannot begin, or a load that cannot be sent. */
export class ReplayError extends Error {
  override readonly name = "ReplayError";
  /** True: an option is wrong. False: the target is. */
  readonly isInput: boolean;

  constructor(message: string, isInput: boolean) {
    super(message);
    this.isInput = isInput;
  }
}

const INFLIGHT_MAX = 4096;
/** A whole answer takes at most this long; then it has failed by `timeout`. */
const ANSWER_TIMEOUT_MS = 600_000;
/** The target must tell its models within this time. */
const MODELS_TIMEOUT_MS = 10_000;
/** Idle connections kept for the next request. */
const IDLE_SOCKETS_MAX = 256;
/** Bytes of a whole answer, and of one event of a stream. */
const BODY_CHARS_MAX = 16_777_216;
const EVENT_CHARS_MAX = 1_048_576;
/** Of an error's body, to find its code. */
const ERROR_CHARS_MAX = 65_536;
/** Questions whose first request is remembered, so that repeats are equal; the oldest is forgotten first. */
const QUESTIONS_MAX = 65_536;
const PROGRESS_MS = 200;
/** When sending lags, sockets get a turn at least this often. */
const BUSY_MS_MAX = 5;
/** Words at the end of a prompt that tell questions apart: 56 bits. Shorter prompts are lengthened to this. */
const TAIL_TOKENS = 8;

/**
 * Runs the load; settles when the last answer has ended, or soon after the signal. Rejects with ReplayError when
 * the target cannot be reached or an option is wrong, and with whatever `requests` throws.
 */
export async function replay(options: ReplayOptions): Promise<ReplayReport> {
  return new Replay(options).run();
}

class Replay {
  readonly #options: ReplayOptions;
  readonly #base: URL;
  readonly #url: URL;
  readonly #agent: Agent;
  readonly #tally = new ReplayTally();
  readonly #open = new Set<ClientRequest>();
  readonly #questions = new Map<string, Planned>();
  #served: readonly string[] | undefined;
  /** Resolves the wait for the last answer; set while it is awaited. */
  #onIdle: (() => void) | null = null;
  #startedAtMs = 0;
  #knownOutputs = 0;
  #knownOutputTokens = 0;

  constructor(options: ReplayOptions) {
    const { speed = 1, limit, inflightMax = INFLIGHT_MAX } = options;
    if (!(speed > 0 && Number.isFinite(speed))) {
      throw new ReplayError(`speed is ${speed}; it must be above 0`, true);
    }
    for (const [name, value] of [
      ["limit", limit],
      ["inflightMax", inflightMax],
    ] as const) {
      if (value !== undefined && !(Number.isInteger(value) && value >= 1)) {
        throw new ReplayError(`${name} is ${value}; it must be a whole number, 1 or more`, true);
      }
    }
    this.#options = options;
    this.#base = baseUrl(options.target);
    this.#url = new URL("v1/chat/completions", this.#base);
    const settings = { keepAlive: true, maxFreeSockets: IDLE_SOCKETS_MAX };
    this.#agent =
      this.#base.protocol === "https:" ? new HttpsAgent(settings) : new HttpAgent(settings);
  }

  async run(): Promise<ReplayReport> {
    const { signal, onProgress, speed = 1, stream = true } = this.#options;
    const breakOff = () => {
      for (const request of this.#open) request.destroy();
    };
    signal?.addEventListener("abort", breakOff);
    const progress = setInterval(() => onProgress?.(this.#progress()), PROGRESS_MS);
    try {
      this.#served = await this.#servedModels();
      this.#startedAtMs = performance.now();
      await this.#sendAll(speed, stream);
      if (signal?.aborted) breakOff();
      if (this.#open.size > 0) {
        await new Promise<void>((resolve) => {
          this.#onIdle = resolve;
        });
      }
      onProgress?.(this.#progress());
    } finally {
      clearInterval(progress);
      signal?.removeEventListener("abort", breakOff);
      breakOff();
      this.#agent.destroy();
    }
    return this.#tally.report({
      target: this.#base.href,
      speed,
      stream,
      stopped: signal?.aborted ?? false,
      elapsedMs: performance.now() - this.#startedAtMs,
    });
  }

  async #sendAll(speed: number, stream: boolean): Promise<void> {
    const { requests, signal, limit = Number.POSITIVE_INFINITY } = this.#options;
    const { inflightMax = INFLIGHT_MAX } = this.#options;
    let lastTurnAtMs = performance.now();
    for await (const request of requests) {
      if (signal?.aborted) return;
      const body = this.#body(request, stream); // Made before it is due: long prompts take a while.
      const dueAtMs = this.#startedAtMs + request.atUs / 1000 / speed;
      if (dueAtMs > performance.now()) {
        await sleepUntil(dueAtMs, signal);
        lastTurnAtMs = performance.now();
      } else if (performance.now() - lastTurnAtMs > BUSY_MS_MAX) {
        await nextTurn();
        lastTurnAtMs = performance.now();
      }
      if (signal?.aborted) return;
      this.#tally.requests++;
      if (this.#open.size >= inflightMax) this.#tally.refusedByClient++;
      else {
        this.#tally.sent++;
        this.#tally.lateness.add(Math.max(0, performance.now() - dueAtMs));
        this.#send(body, false);
      }
      if (this.#tally.requests >= limit) return;
    }
  }

  #send(body: Body, isResend: boolean): void {
    const sentAtMs = performance.now();
    const send = this.#url.protocol === "https:" ? httpsRequest : httpRequest;
    const request = send(this.#url, {
      method: "POST",
      agent: this.#agent,
      headers: { ...this.#headers(), ...body.headers, "content-length": body.bytes.length },
    });
    let answer: IncomingMessage | null = null;
    let isSettled = false;
    const settle = (ending: ReplayEnding) => {
      if (isSettled) return;
      isSettled = true;
      clearTimeout(timer);
      this.#open.delete(request);
      const isUnfinished = ending.kind === "failed" && this.#isBrokenOff();
      this.#tally.end(isUnfinished ? { kind: "unfinished" } : ending);
      if (ending.kind === "failed") request.destroy();
      if (this.#open.size === 0) this.#onIdle?.();
    };
    const timer = setTimeout(
      () => settle({ kind: "failed", reason: "timeout" }),
      ANSWER_TIMEOUT_MS,
    );
    request.on("error", (error) => {
      const code = "code" in error ? String(error.code) : "";
      if (isSettled) return;
      // The server closed an idle connection while we wrote to it: no answer was begun, so ask again, once.
      const isReset = code === "ECONNRESET" || code === "EPIPE";
      const isStale = request.reusedSocket && answer === null && isReset;
      if (isStale && !isResend && !this.#isBrokenOff()) {
        isSettled = true;
        clearTimeout(timer);
        this.#open.delete(request);
        this.#tally.resent++;
        return this.#send(body, true);
      }
      settle({ kind: "failed", reason: answer === null ? networkReason(code) : "stream_cut" });
    });
    request.on("response", (response) => {
      answer = response;
      readAnswer(response, sentAtMs, settle);
    });
    request.on("close", () => {
      settle({ kind: "failed", reason: answer === null ? "connection_reset" : "stream_cut" });
    });
    this.#open.add(request);
    request.end(body.bytes);
  }

  #isBrokenOff(): boolean {
    return this.#options.signal?.aborted ?? false;
  }

  #headers(): OutgoingHttpHeaders {
    const { apiKey } = this.#options;
    return apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` };
  }

  #body(request: ReplayRequest, stream: boolean): Body {
    const planned = this.#plan(request);
    const bytes = Buffer.from(
      JSON.stringify({
        model: this.#model(request),
        messages: [{ role: "user", content: planned.prompt }],
        max_tokens: planned.outputTokens,
        headrace_output_tokens: planned.outputTokens, // Stand-in nodes obey it, engines ignore it.
        stream,
        ...(stream && { stream_options: { include_usage: true } }),
      }),
    );
    return {
      bytes,
      headers: {
        "content-type": "application/json",
        ...(request.session !== undefined && { "x-session-id": request.session }),
      },
    };
  }

  /** Prompt and answer length; those of the first request with this question, if there was one. */
  #plan(request: ReplayRequest): Planned & { prompt: string } {
    const { question, prefix, blockTokens, inputTokens } = request;
    const { salt = "" } = this.#options;
    const known = question === undefined ? undefined : this.#questions.get(question);
    const planned = known ?? {
      inputTokens,
      outputTokens: this.#outputTokens(request),
      ...(prefix !== undefined && { prefix }),
      ...(blockTokens !== undefined && { blockTokens }),
    };
    if (question !== undefined && known === undefined) {
      this.#questions.set(question, planned);
      if (this.#questions.size > QUESTIONS_MAX) {
        const oldest = this.#questions.keys().next();
        if (!oldest.done) this.#questions.delete(oldest.value);
      }
    }
    const tail =
      question === undefined ? `request ${this.#tally.requests}` : `question ${question}`;
    return { ...planned, prompt: promptText(planned, question !== undefined, salt, tail) };
  }

  #outputTokens({ outputTokens, maxTokens }: ReplayRequest): number {
    if (outputTokens > 0) {
      this.#knownOutputs++;
      this.#knownOutputTokens += outputTokens;
      return outputTokens;
    }
    this.#tally.lengthsGuessed++;
    const mean = Math.round(this.#knownOutputTokens / Math.max(1, this.#knownOutputs));
    return Math.max(1, Math.min(mean, maxTokens ?? mean));
  }

  #model({ model: recorded }: ReplayRequest): string {
    if (this.#options.model !== undefined) return this.#options.model;
    const served = this.#served;
    if (recorded !== undefined && (served === undefined || served.includes(recorded)))
      return recorded;
    const first = served?.[0];
    if (first === undefined) {
      throw new ReplayError(
        `which model to ask for is not known: the load names none that ${this.#base.href} serves; state one`,
        true,
      );
    }
    if (recorded !== undefined) this.#tally.modelsReplaced++;
    return first;
  }

  /** Also finds out, before any load is sent, whether the target answers and takes the key. */
  #servedModels(): Promise<readonly string[] | undefined> {
    const { signal } = this.#options;
    const url = new URL("v1/models", this.#base);
    const send = url.protocol === "https:" ? httpsRequest : httpRequest;
    return new Promise((resolve, reject) => {
      const request = send(url, {
        agent: this.#agent,
        headers: this.#headers(),
        timeout: MODELS_TIMEOUT_MS,
        ...(signal !== undefined && { signal }),
      });
      const fail = (why: string) => {
        if (this.#isBrokenOff()) resolve(undefined);
        else reject(new ReplayError(`${this.#base.href} ${why}`, false));
      };
      request.on("error", (error) => {
        fail(`does not answer (${networkReason("code" in error ? String(error.code) : "")})`);
      });
      request.on("timeout", () => {
        fail(`does not answer within ${MODELS_TIMEOUT_MS / 1000} s`);
        request.destroy();
      });
      request.on("response", (response) => {
        const status = response.statusCode ?? 0;
        if (status === 401 || status === 403) {
          fail(
            this.#options.apiKey === undefined
              ? `wants an API key (status ${status})`
              : `does not take this API key (status ${status})`,
          );
        }
        response.setEncoding("utf8");
        let text = "";
        response.on("data", (chunk: string) => {
          text += chunk;
          if (text.length > BODY_CHARS_MAX) request.destroy();
        });
        response.on("error", () => resolve(undefined));
        response.on("end", () => resolve(status === 200 ? modelIds(text) : undefined));
      });
      request.end();
    });
  }

  #progress(): ReplayProgress {
    const { sent, ok } = this.#tally;
    return {
      elapsedMs: this.#startedAtMs === 0 ? 0 : performance.now() - this.#startedAtMs,
      sent,
      ok,
      refused: this.#tally.refusedTotal(),
      failed: this.#tally.failedTotal(),
      inflight: this.#open.size,
    };
  }
}

type Body = { bytes: Buffer; headers: OutgoingHttpHeaders };

/** What decides the bytes of a request, but for its tail. */
type Planned = Pick<ReplayRequest, "inputTokens" | "outputTokens" | "prefix" | "blockTokens">;

/** Reads an answer to its end and settles with what it was. */
function readAnswer(
  response: IncomingMessage,
  sentAtMs: number,
  settle: (ending: ReplayEnding) => void,
): void {
  const status = response.statusCode ?? 0;
  response.on("error", () => settle({ kind: "failed", reason: "stream_cut" }));
  if (status !== 200) {
    let text = "";
    response.setEncoding("utf8");
    response.on("data", (chunk: string) => {
      if (text.length < ERROR_CHARS_MAX) text += chunk;
    });
    response.on("end", () => {
      if (status === 429 || status === 503 || status === 504) {
        settle({ kind: "refused", status: String(status) as "429" | "503" | "504" });
      } else settle({ kind: "failed", reason: `http_${status}${errorCode(text)}` });
    });
    return;
  }
  const headers = answerHeaders(response);
  response.setEncoding("utf8");
  if (!(response.headers["content-type"] ?? "").startsWith("text/event-stream")) {
    let text = "";
    response.on("data", (chunk: string) => {
      text += chunk;
      if (text.length > BODY_CHARS_MAX) settle({ kind: "failed", reason: "answer_too_large" });
    });
    response.on("end", () => {
      const outputTokens = wholeAnswerTokens(text);
      if (outputTokens === undefined) settle({ kind: "failed", reason: "bad_answer" });
      else settle({ kind: "ok", e2eMs: performance.now() - sentAtMs, outputTokens, headers });
    });
    return;
  }
  const events = new EventReader();
  let firstAtMs: number | undefined;
  response.on("data", (chunk: string) => {
    const reason = events.read(chunk);
    if (reason !== undefined) return settle({ kind: "failed", reason });
    if (firstAtMs === undefined && events.contentEvents > 0) firstAtMs = performance.now();
  });
  response.on("end", () => {
    if (!events.isDone) return settle({ kind: "failed", reason: "stream_cut" });
    settle({
      kind: "ok",
      e2eMs: performance.now() - sentAtMs,
      ...(firstAtMs !== undefined && { ttftMs: firstAtMs - sentAtMs }),
      outputTokens: events.usageTokens ?? events.contentEvents,
      headers,
    });
  });
}

function answerHeaders(response: IncomingMessage): AnswerHeaders {
  const text = (name: string): string | undefined => {
    const value = response.headers[name];
    return typeof value === "string" ? value : undefined;
  };
  const verdict = text("x-headrace-cache")?.split(";")[0]?.trim().replaceAll("-", "_");
  const cache = replayCacheKinds.find((kind) => kind === verdict) ?? "unstated";
  const node = text("x-headrace-node");
  const attempts = Number(text("x-headrace-attempts") ?? 1);
  return { cache, attempts, ...(node !== undefined && { node }) };
}

/** Reads server-sent events as far as measuring needs: content, usage, the end, an error. */
class EventReader {
  contentEvents = 0;
  usageTokens: number | undefined;
  isDone = false;
  #rest = "";

  /** Why the stream has failed, if it has. */
  read(chunk: string): string | undefined {
    this.#rest += chunk;
    let from = 0;
    for (;;) {
      const end = this.#rest.indexOf("\n", from);
      if (end < 0) break;
      const line = this.#rest.slice(from, end);
      from = end + 1;
      const reason = line.startsWith("data:") ? this.#onData(line.slice(5).trim()) : undefined;
      if (reason !== undefined) return reason;
    }
    this.#rest = this.#rest.slice(from);
    return this.#rest.length > EVENT_CHARS_MAX ? "answer_too_large" : undefined;
  }

  #onData(data: string): string | undefined {
    if (data === "[DONE]") {
      this.isDone = true;
      return undefined;
    }
    const event = parsed(data);
    if (event === undefined) return "bad_answer";
    if (event.error !== undefined && event.error !== null) return "stream_error";
    const tokens = completionTokens(event);
    if (tokens !== undefined) this.usageTokens = tokens;
    const choice: unknown = Array.isArray(event.choices) ? event.choices[0] : undefined;
    const delta = isObject(choice) && isObject(choice.delta) ? choice.delta : {};
    for (const part of [
      delta.content,
      delta.reasoning_content,
      delta.reasoning,
      delta.tool_calls,
    ]) {
      const isContent =
        typeof part === "string" ? part !== "" : Array.isArray(part) && part.length > 0;
      if (!isContent) continue;
      this.contentEvents++;
      break;
    }
    return undefined;
  }
}

/** " code" of an OpenAI error body, else "": it tells a prompt too long from a wrong parameter. */
function errorCode(text: string): string {
  const error = parsed(text)?.error;
  const code = isObject(error) ? error.code : undefined;
  return typeof code === "string" && /^[\w.-]{1,64}$/.test(code) ? ` ${code}` : "";
}

function wholeAnswerTokens(text: string): number | undefined {
  const answer = parsed(text);
  if (answer === undefined || !Array.isArray(answer.choices)) return undefined;
  return completionTokens(answer) ?? 0;
}

function completionTokens(answer: Record<string, unknown>): number | undefined {
  const tokens = isObject(answer.usage) ? answer.usage.completion_tokens : undefined;
  return typeof tokens === "number" ? tokens : undefined;
}

function modelIds(text: string): string[] | undefined {
  const list = parsed(text)?.data;
  if (!Array.isArray(list)) return undefined;
  return list.flatMap((model) =>
    isObject(model) && typeof model.id === "string" ? [model.id] : [],
  );
}

function parsed(text: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return isObject(value) ? value : undefined;
  } catch {
    return undefined;
  }
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

const networkReasons: Readonly<Record<string, string>> = {
  ECONNREFUSED: "connect_refused",
  ECONNRESET: "connection_reset",
  EPIPE: "connection_reset",
  ETIMEDOUT: "connect_timeout",
  ENOTFOUND: "unknown_host",
  EAI_AGAIN: "unknown_host",
  EMFILE: "out_of_files",
};

function networkReason(code: string): string {
  return networkReasons[code] ?? "network_error";
}

function baseUrl(target: string): URL {
  const accepted = "it must be like http://localhost:8080";
  let url: URL;
  try {
    url = new URL(target);
  } catch {
    throw new ReplayError(`the target ${JSON.stringify(target)} is no URL; ${accepted}`, true);
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") {
    throw new ReplayError(`the target's scheme is ${url.protocol}; ${accepted}`, true);
  }
  const path = url.pathname.replace(/\/+$/, "").replace(/\/v1$/, "");
  return new URL(`${url.origin}${path}/`);
}

/** Longest delay that one timer takes: 2³¹ − 1 ms. */
const TIMER_MS_MAX = 2_147_483_647;

async function sleepUntil(atMs: number, signal: AbortSignal | undefined): Promise<void> {
  for (;;) {
    const leftMs = atMs - performance.now();
    if (leftMs <= 0 || signal?.aborted) return;
    try {
      await sleep(
        Math.min(leftMs, TIMER_MS_MAX),
        undefined,
        signal === undefined ? {} : { signal },
      );
    } catch {
      return; // The signal: the caller looks at it.
    }
  }
}

/** Words that usual tokenizers know whole, with the space before them: one token each. */
const words = (
  "the and for are but not you all any can had her was one our out day get has him his how man new now old see two " +
  "way who boy did its let put say she too use dad mom act add age ago aid aim air arm art ask bad bag bar bed bet " +
  "bid big bit box bus buy car cat cup cut die dog dry due ear eat egg end eye far fat few fit fly fun gap gas god " +
  "gun guy hat hit hot ice ill job joy key kid lab law lay leg lie log lot low map mix net nor odd off oil pay pen " +
  "per pet pot raw red row run sad sea set sit six sky son sun tax"
).split(" ");

/**
 * The text of a prompt: its blocks by their ids, then what the tail's name makes. A question always keeps the last
 * words for itself, since two questions may have the same blocks.
 */
function promptText(planned: Planned, hasQuestion: boolean, salt: string, tail: string): string {
  const { prefix = [], blockTokens = 0 } = planned;
  const tokens = Math.max(TAIL_TOKENS, planned.inputTokens);
  let left = hasQuestion ? tokens - TAIL_TOKENS : tokens;
  const parts: string[] = [];
  for (const id of prefix) {
    const count = Math.min(left, blockTokens);
    if (count <= 0) break;
    parts.push(wordsOf(`${salt}/block ${id}`, count));
    left -= count;
  }
  if (hasQuestion) left += TAIL_TOKENS;
  parts.push(wordsOf(`${salt}/${tail}`, left));
  return parts.join("");
}

/** `count` words of 4 characters each; fewer words of the same name are the beginning of more. */
function wordsOf(name: string, count: number): string {
  const random = new Random(name);
  let text = "";
  for (let index = 0; index < count; index++) text += `${words[random.int(words.length)]} `;
  return text;
}
