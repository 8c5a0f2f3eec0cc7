/**
 * An embedder behind HTTP: any endpoint that speaks OpenAI's /v1/embeddings (one of our own nodes, TEI, vLLM,
 * Ollama, llama.cpp). Over node:http with its own kept-alive connections, apart from those of requests.
 *
 * Vectors are asked for as base64 (a fifth of the bytes, and no numbers to parse) and read in either form; where an
 * endpoint refuses that, as numbers. They are scaled to length 1: some endpoints do not. Redirects are not followed.
 *
 * Time-outs, retries and what to think of the vectors are the edge's.
 */
import http from "node:http";
import https from "node:https";
import {
  type EmbedderBackend,
  EmbedderError,
  normalise,
  type TextVector,
} from "./embedder-backend.ts";

/** `url`: whole, or what /v1/embeddings is appended to. */
export type HttpEmbedderOptions = { url: string; model: string; key?: string };

/** 8 vectors of 4096 numbers, written out long, are some 800 KB. */
const BODY_BYTES_MAX = 4 << 20;
const BATCHES_MAX = 4;
const OPEN_MS = 10_000;
/** Less than the 5 s after which servers on uvicorn or node close idle connections. */
const IDLE_MS = 4000;

export class HttpBackend implements EmbedderBackend {
  readonly batchesMax = BATCHES_MAX;
  readonly #url: URL;
  readonly #model: string;
  readonly #agent: http.Agent;
  readonly #headers: Readonly<Record<string, string>>;
  #format: "base64" | "float" = "base64";
  #stated: string | undefined; // The model that the endpoint says it is.

  constructor({ url, model, key }: HttpEmbedderOptions) {
    this.#url = embeddingsUrl(url);
    this.#model = model;
    const settings = { keepAlive: true, maxSockets: BATCHES_MAX, timeout: IDLE_MS };
    this.#agent =
      this.#url.protocol === "https:" ? new https.Agent(settings) : new http.Agent(settings);
    this.#headers = {
      "content-type": "application/json",
      ...(key === undefined ? {} : { authorization: `Bearer ${key}` }),
    };
  }

  async open(): Promise<{ id: string; version: string }> {
    this.#format = "base64";
    this.#stated = undefined;
    let answer = await this.#ask(["hello"], AbortSignal.timeout(OPEN_MS));
    if (answer.status === 400 || answer.status === 422) {
      this.#format = "float";
      answer = await this.#ask(["hello"], AbortSignal.timeout(OPEN_MS));
    }
    const { model } = parseEmbeddings(answer, 1);
    this.#stated = model;
    return { id: `http:${this.#model}`, version: model ?? "unstated" };
  }

  async embed(texts: readonly string[], signal: AbortSignal): Promise<readonly TextVector[]> {
    const answer = await this.#ask(texts, signal);
    // Too long for it, most likely: these texts are to blame, not the endpoint.
    if (answer.status === 400 || answer.status === 413 || answer.status === 422) {
      return texts.map(() => "failed");
    }
    const { model, vectors } = parseEmbeddings(answer, texts.length);
    if (model !== this.#stated) {
      throw new EmbedderError("gone", `the endpoint has come to answer with another model`);
    }
    return vectors.map(normalise);
  }

  async close(): Promise<void> {
    this.#agent.destroy();
  }

  #ask(input: readonly string[], signal: AbortSignal): Promise<Answer> {
    const body = JSON.stringify({ model: this.#model, input, encoding_format: this.#format });
    return new Promise((resolve, reject) => {
      const fail = (reason: string): void =>
        reject(new EmbedderError("passing", `${this.#url.host} ${reason}`));
      if (signal.aborted) return fail("was not asked in time");
      const send = (): void => {
        const { request: open } = this.#url.protocol === "https:" ? https : http;
        const headers = { ...this.#headers, "content-length": Buffer.byteLength(body) };
        const request = open(this.#url, { method: "POST", agent: this.#agent, headers, signal });
        let answered = false;
        request.on("error", (error: NodeJS.ErrnoException) => {
          if (signal.aborted) return fail("did not answer in time");
          // It closed an idle connection just as it was used again: that says nothing about it.
          if (request.reusedSocket && !answered) return send();
          fail(`cannot be reached (${error.code ?? error.name})`);
        });
        request.on("response", (response) => {
          answered = true;
          readBody(response, fail, (text) => resolve({ status: response.statusCode ?? 0, text }));
        });
        request.end(body);
      };
      send();
    });
  }
}

type Answer = { status: number; text: string };

function readBody(
  response: http.IncomingMessage,
  fail: (reason: string) => void,
  done: (text: string) => void,
): void {
  const chunks: Buffer[] = [];
  let bytes = 0;
  response.on("error", () => fail("broke off its answer"));
  response.on("data", (chunk: Buffer) => {
    bytes += chunk.length;
    chunks.push(chunk);
    if (bytes <= BODY_BYTES_MAX) return;
    fail("sent an answer that is too long");
    response.destroy();
  });
  response.on("end", () => done(Buffer.concat(chunks).toString("utf8")));
}

/** "http://host/base" → "http://host/base/v1/embeddings"; a URL that ends in /embeddings stands. */
export function embeddingsUrl(url: string): URL {
  const whole = new URL(url);
  const path = whole.pathname.replace(/\/+$/, "");
  if (path.endsWith("/embeddings")) whole.pathname = path;
  else whole.pathname = `${path.replace(/\/v1$/, "")}/v1/embeddings`;
  return whole;
}

/**
 * The vectors of an answer, in the order of the texts.
 * @throws EmbedderError saying what is wrong with it, without quoting it.
 */
export function parseEmbeddings(
  { status, text }: Answer,
  count: number,
): { model: string | undefined; vectors: Float32Array[] } {
  const wrong = (what: string): EmbedderError => new EmbedderError("passing", what);
  if (status !== 200) throw wrong(`the embeddings endpoint answered with status ${status}`);
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    throw wrong("the embeddings endpoint did not answer with JSON");
  }
  const { data, model } = (typeof json === "object" && json !== null ? json : {}) as {
    data?: unknown;
    model?: unknown;
  };
  if (!Array.isArray(data)) throw wrong("the embeddings endpoint's answer has no data");
  if (data.length !== count) {
    throw wrong(`the embeddings endpoint sent ${data.length} vectors for ${count} texts`);
  }
  const vectors: Float32Array[] = [];
  for (const [position, item] of data.entries()) {
    const { index = position, embedding } = (item ?? {}) as { index?: number; embedding?: unknown };
    const vector = vectorOf(embedding);
    if (vector === undefined || vectors[index] !== undefined || !(index >= 0 && index < count)) {
      throw wrong("the embeddings endpoint's answer holds what is no vector");
    }
    vectors[index] = vector;
  }
  return { model: typeof model === "string" ? model : undefined, vectors };
}

/** Numbers, or little-endian float32 in base64. */
function vectorOf(embedding: unknown): Float32Array | undefined {
  if (typeof embedding === "string") {
    const bytes = Buffer.from(embedding, "base64");
    if (bytes.length === 0 || bytes.length % 4 !== 0) return undefined;
    const vector = new Float32Array(bytes.length / 4);
    for (let index = 0; index < vector.length; index++)
      vector[index] = bytes.readFloatLE(index * 4);
    return vector;
  }
  if (!Array.isArray(embedding) || embedding.length === 0) return undefined;
  // `null` is what JSON has for NaN: it becomes NaN again, and is found by the checks of every vector.
  return Float32Array.from(embedding, (value) => (typeof value === "number" ? value : Number.NaN));
}
