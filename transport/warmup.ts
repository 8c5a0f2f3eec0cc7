/**
 * Fills the cache from a file of prompts before (and beside) live traffic: a bounded number in flight, lowest
 * priority, through the same chain as every request, so that what is cached already costs nothing: an equal question,
 * or one in other words that the tenant would be served.
 *
 * Questions are embedded ahead, in batches between those of live traffic, so that other wordings of theirs hit, too.
 *
 * A line is a prompt as plain text, or a JSON chat request. Empty lines and lines that start with "#" are left
 * out.
 */
import { createReadStream } from "node:fs";
import { createInterface } from "node:readline";
import { setTimeout as delay } from "node:timers/promises";
import type { Front, Incoming, Sink } from "./front.ts";
import type { Tenant } from "./keys.ts";

/** Prompts read and embedded ahead of those that are asked. */
const CHUNK_PROMPTS = 16;
/** How long a prompt that was shed, because the nodes are busy with live traffic, waits before it asks again. */
const BUSY_PAUSE_MS = 1000;

export type WarmupOptions = {
  file: string;
  /** Prompts in flight at once, 1…. */
  inflightMax: number;
  tenant: Tenant;
  /** For lines that name no model. */
  model: string;
  /** Vectors of questions that will be asked, undefined for each without; absent: nothing is matched by meaning. */
  embedAhead?: (texts: readonly string[]) => Promise<(Float32Array | undefined)[]>;
  onProgress?: (report: WarmupReport) => void;
  /** Ends the warm-up early; what is in flight is awaited. */
  signal?: AbortSignal;
};

export type WarmupReport = {
  done: number;
  /** Newly generated and stored, or on the way to be. */
  filled: number;
  /** Were in the cache already. */
  present: number;
  /** Line number and reason, without the prompt. */
  failures: { line: number; reason: string }[];
};

/** @throws when the file cannot be read. A prompt that fails is listed, not thrown. */
export async function warmUp(front: Front, options: WarmupOptions): Promise<WarmupReport> {
  const report: WarmupReport = { done: 0, filled: 0, present: 0, failures: [] };
  const running = new Set<Promise<void>>();
  const input = createReadStream(options.file, "utf8");
  const lines = createInterface({ input, crlfDelay: Number.POSITIVE_INFINITY });
  let unreadable: Error | undefined;
  input.once("error", (error) => {
    unreadable = error;
    lines.close(); // Not every Node passes the error on to the loop, which would wait for ever.
  });
  const ended = new Promise<void>((resolve) => {
    options.signal?.addEventListener("abort", () => resolve(), { once: true });
  });
  try {
    for await (const prompts of chunksOf(lines, options.model)) {
      await Promise.race([addVectors(front, prompts, options), ended]);
      for (const prompt of prompts) {
        while (running.size >= options.inflightMax) await Promise.race(running);
        if (options.signal?.aborted === true) break;
        const one = warmOne(front, prompt, options, report).finally(() => running.delete(one));
        running.add(one);
      }
      if (options.signal?.aborted === true) break;
    }
  } catch (error) {
    if (error !== unreadable) throw error;
  }
  input.destroy();
  await Promise.all(running);
  if (unreadable !== undefined) {
    throw new Error(`warmup.file ${options.file} cannot be read: ${unreadable.message}`);
  }
  return report;
}

type Prompt = { line: number; body: Buffer | null; vector?: Float32Array };

async function* chunksOf(lines: AsyncIterable<string>, model: string): AsyncGenerator<Prompt[]> {
  let chunk: Prompt[] = [];
  let line = 0;
  for await (const text of lines) {
    line++;
    const prompt = text.trim();
    if (prompt === "" || prompt.startsWith("#")) continue;
    chunk.push({ line, body: bodyOf(prompt, model) });
    if (chunk.length < CHUNK_PROMPTS) continue;
    yield chunk;
    chunk = [];
  }
  if (chunk.length > 0) yield chunk;
}

async function addVectors(
  front: Front,
  prompts: readonly Prompt[],
  { embedAhead, tenant }: WarmupOptions,
): Promise<void> {
  if (embedAhead === undefined) return;
  const asked: { prompt: Prompt; text: string }[] = [];
  for (const prompt of prompts) {
    const text = prompt.body === null ? undefined : front.questionOf(prompt.body, tenant);
    if (text !== undefined) asked.push({ prompt, text });
  }
  const vectors = await embedAhead(asked.map(({ text }) => text));
  for (const [index, { prompt }] of asked.entries()) {
    const vector = vectors[index];
    if (vector !== undefined) prompt.vector = vector;
  }
}

async function warmOne(
  front: Front,
  prompt: Prompt,
  options: WarmupOptions,
  report: WarmupReport,
): Promise<void> {
  const { body, line } = prompt;
  const outcome =
    body === null
      ? { status: 400, cache: "", reason: "the line is not a JSON object" }
      : await submitWhenIdle(front, { body, vector: prompt.vector }, options);
  report.done++;
  if (outcome.status !== 200) report.failures.push({ line, reason: outcome.reason });
  else if (outcome.cache.startsWith("hit")) report.present++;
  else report.filled++;
  options.onProgress?.(report);
}

function bodyOf(prompt: string, model: string): Buffer | null {
  if (!prompt.startsWith("{")) {
    return Buffer.from(JSON.stringify({ model, messages: [{ role: "user", content: prompt }] }));
  }
  try {
    const request = JSON.parse(prompt) as Record<string, unknown>;
    return Buffer.from(
      JSON.stringify({ model, ...request, stream: false, stream_options: undefined }),
    );
  } catch {
    return null;
  }
}

/** The lowest priority is shed under load, not queued: so it comes again, until the warm-up is to end. */
async function submitWhenIdle(
  front: Front,
  asked: Asked,
  { tenant, signal }: WarmupOptions,
): Promise<Outcome> {
  for (;;) {
    const outcome = await submit(front, asked, tenant);
    if (!outcome.reason.endsWith("pool_overloaded")) return outcome;
    try {
      await delay(BUSY_PAUSE_MS, undefined, { ref: false, ...(signal && { signal }) });
    } catch {
      return outcome; // The warm-up is to end.
    }
  }
}

type Outcome = { status: number; cache: string; reason: string };

type Asked = { body: Buffer; vector: Float32Array | undefined };

function submit(front: Front, { body, vector }: Asked, tenant: Tenant): Promise<Outcome> {
  return new Promise((resolve) => {
    const incoming: Incoming = {
      method: "POST",
      path: "/v1/chat/completions",
      query: "",
      header: (name) => (name === "x-headrace-priority" ? "batch" : headers[name]),
      body,
      as: tenant,
      ...(vector === undefined ? {} : { vector }),
    };
    front.submit(incoming, new OutcomeSink(resolve));
  });
}

const headers: Readonly<Record<string, string>> = { "content-type": "application/json" };

/** Keeps what a warm-up needs of an answer: its status, its cache verdict, its error code. */
class OutcomeSink implements Sink {
  readonly #resolve: (outcome: Outcome) => void;

  constructor(resolve: (outcome: Outcome) => void) {
    this.#resolve = resolve;
  }

  whole(status: number, flat: string[], body: Uint8Array): void {
    const at = flat.indexOf("x-headrace-cache");
    const cache = at < 0 ? "" : (flat[at + 1] ?? "");
    this.#resolve({ status, cache, reason: status === 200 ? "" : reasonOf(status, body) });
  }

  // A request that does not stream is always answered whole, but for an answer that breaks off.
  head(): void {}

  write(): boolean {
    return true;
  }

  end(): void {
    this.destroy();
  }

  destroy(): void {
    this.#resolve({ status: 502, cache: "", reason: "the answer was cut off" });
  }
}

function reasonOf(status: number, body: Uint8Array): string {
  try {
    const error = JSON.parse(Buffer.from(body).toString("utf8")).error as { code?: string };
    return `status ${status}, ${error.code ?? "no code"}`;
  } catch {
    return `status ${status}`;
  }
}
