/**
 * Headrace inside another program: the same actors, no port, no server. `createHeadrace` is the package's
 * entry point.
 *
 *     import OpenAI from "openai";
 *     import { createHeadrace } from "headrace";
 *
 *     const headrace = await createHeadrace({ nodes: [{ url: "http://10.0.0.5:8000" }] });
 *     const openai = new OpenAI({ baseURL: "http://headrace/v1", apiKey: "local", fetch: headrace.fetch });
 *
 * Nothing is opened but connections to the nodes (and to Redis, if configured); after `close()` no handle is
 * left and a script ends by itself.
 */
import { readOptions } from "./config.ts";
import type { Exchange, Sink } from "./front.ts";
import { createLog } from "./log.ts";
import { Gateway } from "./main.ts";
import type { StateSnapshot } from "./metrics.ts";
import type { OptionsInput } from "./options.ts";
import type { Explanation } from "./records.ts";

export { ConfigError } from "./config.ts";
export type { StateSnapshot } from "./metrics.ts";
export type { OptionsInput } from "./options.ts";
export type { Explanation } from "./records.ts";

/** A chat request as OpenAI's API takes it; fields that are not named here are passed on. */
export type ChatRequest = {
  model: string;
  messages: readonly { role: string; content: unknown; [field: string]: unknown }[];
  [field: string]: unknown;
};

/** A whole chat answer as the node gave it. */
export type ChatAnswer = {
  id: string;
  model: string;
  choices: {
    index: number;
    message: { role: string; content: string | null; [field: string]: unknown };
    finish_reason: string | null;
  }[];
  usage?: { prompt_tokens: number; completion_tokens: number; total_tokens: number };
  [field: string]: unknown;
};

/** Thrown by `chat` for every answer that is not a success. */
export class HeadraceError extends Error {
  override readonly name = "HeadraceError";
  /** HTTP status that a client of the gateway would have seen. */
  readonly status: number;
  /** Stable code, e.g. "rate_limit_requests". */
  readonly code: string;
  /** How long to wait before trying again, ms; absent when waiting does not help. */
  readonly retryAfterMs: number | undefined;

  constructor(status: number, code: string, message: string, retryAfterMs: number | undefined) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterMs = retryAfterMs;
  }
}

export interface Headrace {
  /**
   * A WHATWG fetch for OpenAI-compatible clients. Only the path of the URL matters (`/v1/…`); the host is
   * ignored, nothing leaves the process but calls to nodes. Aborting its signal aborts the generation.
   */
  readonly fetch: (input: string | URL | Request, init?: RequestInit) => Promise<Response>;
  /**
   * One chat completion, whole. @param options.apiKey needed when keys are configured.
   * @throws HeadraceError for refusals and failures; the signal's reason when aborted.
   */
  chat(
    request: ChatRequest,
    options?: { apiKey?: string; signal?: AbortSignal; headers?: Record<string, string> },
  ): Promise<ChatAnswer>;
  /** State of all actors: nodes, queue, cache, limits, mailboxes. */
  stats(): Promise<StateSnapshot>;
  /** The story of one of the last 1000 requests, by its `x-request-id`; undefined when it is not known. */
  explain(requestId: string): Explanation | undefined;
  /**
   * Says whether a semantic hit was right; `entryId` is its answer's header `x-headrace-entry`. A wrong one is gone for
   * good. False where no stored answer of the tenant has that id (any more).
   */
  feedback(entryId: string, isRight: boolean, tenant?: string): Promise<boolean>;
  /** Refuses new requests and waits for the open ones, at most `timeoutMs` (default: timeouts.drainMs). */
  drain(timeoutMs?: number): Promise<void>;
  /** Ends everything now: open requests fail, connections close. Idempotent. */
  close(): Promise<void>;
}

/**
 * Starts a Headrace in this process.
 * @throws ConfigError that names every option at fault and what is accepted.
 */
export async function createHeadrace(options: OptionsInput): Promise<Headrace> {
  const parsed = readOptions({ ...options, log: { level: "error", ...options.log } });
  const log = createLog(parsed.log.level, parsed.log.format);
  const gateway = await Gateway.start(parsed, log, (error) => {
    log.error({ error: String(error) }, "the actor system gave up");
  });
  const embeddedFetch: Headrace["fetch"] = (input, init) => fetchFrom(gateway, input, init);
  return {
    fetch: embeddedFetch,
    chat: (request, chatOptions) => chatWith(embeddedFetch, request, chatOptions ?? {}),
    stats: () => gateway.state(),
    explain: (requestId) => gateway.explain(requestId),
    feedback: (entryId, isRight, tenant = "local") => gateway.feedback(entryId, tenant, isRight),
    drain: (timeoutMs) => gateway.drain(timeoutMs),
    close: () => gateway.close(),
  };
}

async function chatWith(
  fetcher: Headrace["fetch"],
  request: ChatRequest,
  options: { apiKey?: string; signal?: AbortSignal; headers?: Record<string, string> },
): Promise<ChatAnswer> {
  const response = await fetcher("http://headrace/v1/chat/completions", {
    method: "POST",
    headers: {
      ...options.headers,
      "content-type": "application/json",
      ...(options.apiKey === undefined ? {} : { authorization: `Bearer ${options.apiKey}` }),
    },
    body: JSON.stringify({ ...request, stream: false }),
    ...(options.signal === undefined ? {} : { signal: options.signal }),
  });
  if (response.ok) return (await response.json()) as ChatAnswer;
  const { status } = response;
  const { code, message } = statedError(await response.text());
  const retryAfter = response.headers.get("retry-after-ms");
  throw new HeadraceError(
    status,
    // A node's own refusal may come without a code.
    code ?? (status < 500 ? "invalid_request" : "internal"),
    message ?? `the node answered with status ${status}`,
    retryAfter === null ? undefined : Number(retryAfter),
  );
}

/** What an error body in OpenAI's form says; nothing for any other, which a node may send. */
function statedError(text: string): { code?: string; message?: string } {
  try {
    const { code, message } = (JSON.parse(text) as { error: Record<string, unknown> }).error;
    return {
      ...(typeof code === "string" ? { code } : {}),
      ...(typeof message === "string" ? { message } : {}),
    };
  } catch {
    return {};
  }
}

async function fetchFrom(
  gateway: Gateway,
  input: string | URL | Request,
  init?: RequestInit,
): Promise<Response> {
  const request = new Request(input, init);
  request.signal.throwIfAborted();
  const url = new URL(request.url);
  const body = Buffer.from(await request.arrayBuffer());
  request.signal.throwIfAborted();
  return new Promise((resolve, reject) => {
    const sink = new ResponseSink(resolve);
    const exchange = gateway.front.submit(
      {
        method: request.method,
        path: url.pathname,
        query: url.search,
        header: (name) => request.headers.get(name) ?? undefined,
        body,
      },
      sink,
    );
    sink.exchange = exchange;
    request.signal.addEventListener(
      "abort",
      () => {
        exchange.left();
        sink.fail(request.signal.reason);
        reject(request.signal.reason);
      },
      { once: true },
    );
  });
}

/** Turns what the front writes into one `Response`. */
class ResponseSink implements Sink {
  readonly #resolve: (response: Response) => void;
  #controller: ReadableStreamDefaultController<Uint8Array> | null = null;
  exchange: Exchange | null = null;

  constructor(resolve: (response: Response) => void) {
    this.#resolve = resolve;
  }

  whole(status: number, headers: string[], body: Uint8Array): void {
    const content = hasNoBody(status) ? null : new Uint8Array(body);
    this.#resolve(new Response(content, { status, headers: pairs(headers) }));
  }

  head(status: number, headers: string[]): void {
    if (hasNoBody(status)) {
      return this.#resolve(new Response(null, { status, headers: pairs(headers) }));
    }
    const stream = new ReadableStream<Uint8Array>({
      start: (controller) => {
        this.#controller = controller;
      },
      pull: () => this.exchange?.drained(),
      cancel: () => {
        this.#controller = null;
        this.exchange?.left();
      },
    });
    this.#resolve(new Response(stream, { status, headers: pairs(headers) }));
  }

  write(bytes: Uint8Array): boolean {
    if (this.#controller === null) return true;
    this.#controller.enqueue(new Uint8Array(bytes));
    return (this.#controller.desiredSize ?? 0) > 0;
  }

  end(): void {
    this.#controller?.close();
    this.#controller = null;
  }

  destroy(): void {
    this.fail(new Error("the answer was cut off"));
  }

  fail(reason: unknown): void {
    this.#controller?.error(reason);
    this.#controller = null;
  }
}

/** `Response` throws where such a status comes with a body, be it an empty one. */
function hasNoBody(status: number): boolean {
  return status === 204 || status === 205;
}

function pairs(flat: string[]): [string, string][] {
  const result: [string, string][] = [];
  for (let i = 0; i + 1 < flat.length; i += 2) result.push([flat[i] ?? "", flat[i + 1] ?? ""]);
  return result;
}
