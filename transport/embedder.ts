/**
 * The edge to an embedder: one text in, one unit vector out, or a word why there is none. A vector is a chance to
 * save a generation and nothing more, so this edge never makes a caller wait for it beyond `timeoutMs`, never fails
 * a caller, and would rather give no vector than one that may mean something else.
 *
 *   starting ──self-test──▶ healthy ──3 failures in a row, or gone──▶ resting ──self-test──▶ healthy
 *       └─────────────────────┴── bad vectors, no such model, a failed self-test ──▶ off (until a restart)
 *
 * - Queue: at most `queueMax` texts; what waits longer than `timeoutMs` is answered `late` and dropped. A long text
 *   is refused while others wait: it would cost them several times its own worth.
 * - Batches: what has come together while a batch ran goes out together, at most 8 texts, a long one alone (a batch
 *   costs its longest text times its number).
 * - Texts: spaces joined, control characters and lone surrogates replaced; empty and too long ones get no vector.
 * - Vectors: dimension, length 1, finite numbers. Three bad ones in a row, or the same vector for three different
 *   texts in a row, make it take the self-test again, and that decides: a client can send texts that look alike to
 *   a model, or that it fails on, but no client can make it fail the test.
 * - Off and resting are each told in one line of the log. Texts never are.
 *
 * It knows nothing of scopes, thresholds or caches.
 */
import type {
  Embedded,
  EmbedderCommand,
  EmbedderDescription,
  EmbedderIdentity,
  EmbedderState,
  NoVector,
} from "../actors/edges.ts";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import { type Actor, type ReplyTo, unreachable } from "../runtime/actor.ts";
import {
  dot,
  type EmbedderBackend,
  EmbedderError,
  sameVector,
  selfTest,
  type TextVector,
  wrongVector,
} from "./embedder-backend.ts";
import type { Log } from "./log.ts";
import type { Options } from "./options.ts";

/** Which embedder, and its bounds. */
export type EmbedderOptions = Options["cache"]["semantic"]["embedder"];

/** What the operator should know of goes to the log: on, away, off. */
export type EmbedderLog = Pick<Log, "info" | "warn">;

type Reply = <R>(to: ReplyTo<R>, value: R) => void;

const BATCH_TEXTS_MAX = 8;
/**
 * UTF-8 bytes to a token, at most, of text that people write: beyond it a text is too long for certain and is not
 * even looked at. Models that count for themselves refuse the rest.
 */
const BYTES_PER_TOKEN_MAX = 5;
/** Some 64 tokens: more than twice the time of a usual question. */
const LONG_BYTES = 224;
/** In a row. */
const FAILURES_MAX = 3;
const BAD_VECTORS_MAX = 3;
const SAME_VECTORS_MAX = 3;
const REST_MS = 250;
const REST_MS_MAX = 30_000;
/** For each batch of a self-test: models that have just been loaded are slow at first. */
const SELF_TEST_MS = 20_000;
/** Of the first test sentence before and after a rest: less, and it is another model by the same name. */
const STEADY_COSINE_MIN = 0.98;

/** @throws EmbedderError for settings that cannot work at all; whether the model is there is found out by `open`. */
export async function openBackend(options: EmbedderOptions): Promise<EmbedderBackend | undefined> {
  switch (options.type) {
    case "off":
      return undefined;
    case "lexical":
      return new LexicalBackend(options.dimension);
    case "transformers": {
      const { TransformerBackend } = await import("./transformer-embedder.ts");
      return new TransformerBackend(options);
    }
    case "http": {
      const { HttpBackend } = await import("./http-embedder.ts");
      const { url, model, key } = options;
      if (url === undefined || model === undefined) {
        throw new EmbedderError("lasting", "an http embedder needs url and model");
      }
      return new HttpBackend({ url, model, ...(key === undefined ? {} : { key }) });
    }
    default:
      return unreachable(options.type);
  }
}

/** Starts the self-test and returns; until it has passed there are no vectors. Undefined when none is configured. */
export async function openEmbedder(
  options: EmbedderOptions,
  log: EmbedderLog,
): Promise<Embedder | undefined> {
  const backend = await openBackend(options);
  if (backend !== undefined) return new Embedder(backend, options, log);
  log.info({}, "semantic lookup is off; set cache.semantic.embedder.type to turn it on");
  return undefined;
}

/** Words without meaning, at no cost. */
class LexicalBackend implements EmbedderBackend {
  readonly batchesMax = 1;
  readonly #embedder: LexicalEmbedder;

  constructor(dimension: number | undefined) {
    this.#embedder = new LexicalEmbedder(dimension);
  }

  async open(): Promise<{ id: string; version: string }> {
    return { id: "lexical", version: "1" };
  }

  async embed(texts: readonly string[]): Promise<TextVector[]> {
    return texts.map((text) => {
      const vector = this.#embedder.embed(text);
      return dot(vector, vector) > 0 ? vector : "unknown_words"; // Signs alone, say.
    });
  }

  async close(): Promise<void> {}
}

type Answer = (embedded: Embedded) => void;

/** One text that somebody waits for; `answer` is null once it was called. */
type Waiting = { text: string; long: boolean; answer: Answer | null; timer: NodeJS.Timeout };

/** One batch on its way. */
type Batch = { texts: Waiting[]; abort: AbortController };

/** One model with its queue, its health and its edge. */
export class Embedder {
  readonly #backend: EmbedderBackend;
  readonly #options: Pick<EmbedderOptions, "dimension" | "timeoutMs" | "queueMax" | "tokensMax">;
  readonly #log: EmbedderLog;
  readonly #queue: Waiting[] = [];
  readonly #running = new Set<Batch>();
  #state: EmbedderState = "starting";
  #reason = "the self-test has not ended";
  #identity: EmbedderIdentity | undefined;
  #firstVector: Float32Array | undefined; // Of the self-test that made it healthy first.
  #failures = 0; // In a row.
  #badVectors = 0; // In a row.
  #last: { text: string; vector: Float32Array } | undefined;
  #sameVectors = 1; // Different texts in a row that got the last one's vector.
  #retesting = false;
  #restMs = REST_MS; // The next rest.
  #restTimer: NodeJS.Timeout | null = null;
  #closed = false;
  readonly #settled: Promise<void>;
  readonly #counts = { vectors: 0, batches: 0, batchMs: 0 };
  readonly #unavailable: Record<NoVector, number> = {
    starting: 0,
    resting: 0,
    off: 0,
    busy: 0,
    late: 0,
    empty: 0,
    too_long: 0,
    unknown_words: 0,
    failed: 0,
    bad_vector: 0,
  };

  constructor(
    backend: EmbedderBackend,
    options: Pick<EmbedderOptions, "dimension" | "timeoutMs" | "queueMax" | "tokensMax">,
    log: EmbedderLog,
  ) {
    this.#backend = backend;
    this.#options = options;
    this.#log = log;
    this.#settled = this.#open();
  }

  /** Resolves when the first self-test has ended, well or not. */
  settled(): Promise<void> {
    return this.#settled;
  }

  /** Part of every scope's key. Undefined until it has been healthy; then it never changes. */
  identity(): EmbedderIdentity | undefined {
    return this.#identity;
  }

  /** The actor; @param reply answers an ask from outside a turn. */
  edge(reply: Reply): Actor<EmbedderCommand> {
    return { receive: (command) => this.#receive(command, reply) };
  }

  describe(): EmbedderDescription {
    return {
      state: this.#state,
      reason: this.#reason,
      ...(this.#identity === undefined ? {} : { identity: this.#identity }),
      queued: this.#queue.length,
      ...this.#counts,
      unavailable: { ...this.#unavailable },
    };
  }

  /** Answers all that wait, ends the model; no handle is left. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    if (this.#restTimer !== null) clearTimeout(this.#restTimer);
    this.#become("off", "shutting down");
    await this.#backend.close();
  }

  #receive(command: EmbedderCommand, reply: Reply): void {
    switch (command.kind) {
      case "embedder.embed":
        return this.embed(command.text, (embedded) => reply(command.replyTo, embedded));
      case "embedder.describe":
        return reply(command.replyTo, this.describe());
      default:
        return unreachable(command);
    }
  }

  /** Calls `answer` once, within `timeoutMs`. */
  embed(text: string, answer: Answer): void {
    if (this.#state !== "healthy") return this.#refuse(answer, this.#state);
    const bytesMax = this.#options.tokensMax * BYTES_PER_TOKEN_MAX;
    if (text.length > bytesMax) return this.#refuse(answer, "too_long"); // A megabyte is not even read.
    const readable = readableText(text);
    const bytes = Buffer.byteLength(readable, "utf8");
    if (bytes === 0) return this.#refuse(answer, "empty");
    if (bytes > bytesMax) return this.#refuse(answer, "too_long");
    const long = bytes > LONG_BYTES;
    const waiting = this.#queue.length;
    if (waiting >= this.#options.queueMax || (long && waiting > 0)) {
      return this.#refuse(answer, "busy");
    }
    const timer = setTimeout(() => this.#onLate(item), this.#options.timeoutMs);
    const item: Waiting = { text: readable, long, answer, timer };
    this.#queue.push(item);
    this.#sendBatches();
  }

  // ---- queue and batches --------------------------------------------------------------------------------------

  #sendBatches(): void {
    while (this.#state === "healthy" && this.#running.size < this.#backend.batchesMax) {
      const texts = this.#takeBatch();
      if (texts.length === 0) return;
      const batch: Batch = { texts, abort: new AbortController() };
      this.#running.add(batch);
      void this.#run(batch);
    }
  }

  #takeBatch(): Waiting[] {
    const isLong = this.#queue[0]?.long ?? false;
    if (isLong) return this.#queue.splice(0, 1);
    const next = this.#queue.findIndex(({ long }) => long);
    const end = next < 0 ? this.#queue.length : next;
    return this.#queue.splice(0, Math.min(end, BATCH_TEXTS_MAX));
  }

  async #run(batch: Batch): Promise<void> {
    const startedAtMs = performance.now();
    try {
      const texts = batch.texts.map(({ text }) => text);
      const results = await this.#backend.embed(texts, batch.abort.signal);
      if (this.#running.has(batch)) this.#onResults(batch, results);
    } catch (error) {
      for (const waiting of batch.texts) this.#settle(waiting, "failed");
      if (this.#running.has(batch)) this.#onFailure(error);
    }
    this.#counts.batches++;
    this.#counts.batchMs += performance.now() - startedAtMs;
    this.#running.delete(batch);
    this.#sendBatches();
  }

  #onResults(batch: Batch, results: readonly TextVector[]): void {
    this.#failures = 0;
    for (const [index, waiting] of batch.texts.entries()) {
      const result = results[index] ?? "failed";
      if (typeof result === "string") {
        this.#settle(waiting, result);
        continue;
      }
      const wrong = wrongVector(result, this.#identity?.dimension ?? 0);
      if (wrong !== undefined) {
        this.#settle(waiting, "bad_vector");
        if (++this.#badVectors >= BAD_VECTORS_MAX) this.#suspect();
        continue;
      }
      this.#badVectors = 0;
      this.#compare(waiting.text, result);
      this.#settle(waiting, result);
    }
  }

  /** Notices a model that has come to give every text the same vector. */
  #compare(text: string, vector: Float32Array): void {
    const { text: lastText, vector: lastVector } = this.#last ?? {};
    if (text === lastText) return;
    const same = lastVector !== undefined && sameVector(vector, lastVector);
    this.#sameVectors = same ? this.#sameVectors + 1 : 1;
    this.#last = { text, vector };
    if (this.#sameVectors >= SAME_VECTORS_MAX) this.#suspect();
  }

  #suspect(): void {
    this.#badVectors = 0;
    this.#sameVectors = 1;
    if (!this.#retesting) void this.#retest();
  }

  async #retest(): Promise<void> {
    this.#retesting = true;
    try {
      const { problem } = await this.#selfTest(this.#identity?.dimension);
      if (problem !== undefined) this.#turnOff(problem);
    } catch (error) {
      if (this.#state === "healthy") this.#onFailure(error);
    }
    this.#retesting = false;
  }

  #onLate(waiting: Waiting): void {
    const at = this.#queue.indexOf(waiting);
    if (at >= 0) this.#queue.splice(at, 1);
    this.#settle(waiting, "late");
    for (const batch of this.#running) {
      if (batch.texts.every(({ answer }) => answer === null)) batch.abort.abort();
    }
  }

  #settle(waiting: Waiting, result: Float32Array | NoVector): void {
    const { answer } = waiting;
    if (answer === null) return; // Its time was over: it has been told.
    waiting.answer = null;
    clearTimeout(waiting.timer);
    if (typeof result === "string") return this.#refuse(answer, result);
    this.#counts.vectors++;
    answer({ kind: "vector", vector: result });
  }

  #refuse(answer: Answer, reason: NoVector): void {
    this.#unavailable[reason]++;
    answer({ kind: "unavailable", reason });
  }

  // ---- health -------------------------------------------------------------------------------------------------

  /** Ends in healthy, resting or off. */
  async #open(): Promise<void> {
    try {
      const opened = await this.#backend.open();
      if (this.#closed) return;
      const test = await this.#selfTest(this.#identity?.dimension ?? this.#options.dimension);
      if (this.#closed) return;
      if (test.problem !== undefined) return this.#turnOff(test.problem);
      const identity = { ...opened, dimension: test.dimension };
      const changed = this.#changed(identity, test.first);
      if (changed !== undefined) return this.#turnOff(changed);
      this.#identity ??= identity;
      this.#firstVector ??= test.first;
      this.#failures = 0;
      this.#badVectors = 0;
      this.#restMs = REST_MS;
      this.#become("healthy", "");
      this.#log.info({ ...identity }, "the embedder has passed its self-test");
    } catch (error) {
      if (!this.#closed) this.#onFailure(error);
    }
  }

  /** Entries made before the change would be compared with vectors of another model. */
  #changed({ id, version }: EmbedderIdentity, first: Float32Array): string | undefined {
    if (this.#identity === undefined || this.#firstVector === undefined) return undefined;
    const { id: ownId, version: ownVersion } = this.#identity;
    if (id !== ownId || version !== ownVersion) return `${ownId} has become ${id} ${version}`;
    const isSteady = dot(first, this.#firstVector) >= STEADY_COSINE_MIN;
    return isSteady ? undefined : "its vectors are not what they were: the model has changed";
  }

  #selfTest(dimension: number | undefined): ReturnType<typeof selfTest> {
    return selfTest(
      (texts) => this.#backend.embed(texts, AbortSignal.timeout(SELF_TEST_MS)),
      dimension,
    );
  }

  #onFailure(error: unknown): void {
    const { message } = error instanceof Error ? error : { message: String(error) };
    const kind = error instanceof EmbedderError ? error.kind : "passing";
    if (kind === "lasting") return this.#turnOff(message);
    this.#failures++;
    if (kind === "gone" || this.#state !== "healthy" || this.#failures >= FAILURES_MAX) {
      this.#rest(message);
    }
  }

  #rest(reason: string): void {
    if (this.#state === "resting" && this.#restTimer !== null) return; // Batches that failed together.
    const isNews = this.#state !== "resting";
    this.#become("resting", reason);
    const restMs = this.#restMs * (0.5 + Math.random() / 2); // So that many gateways do not come back at once.
    this.#restMs = Math.min(REST_MS_MAX, this.#restMs * 2);
    this.#restTimer = setTimeout(() => {
      this.#restTimer = null;
      void this.#open();
    }, restMs);
    this.#restTimer.unref();
    if (isNews) {
      this.#log.warn({ reason }, "the embedder is away: semantic lookup pauses until it is back");
    }
  }

  #turnOff(reason: string): void {
    if (this.#state === "off") return;
    this.#become("off", reason);
    this.#log.warn(
      { reason },
      "semantic lookup is off until a restart, exact caching goes on; " +
        "to turn it on, mend the reason (`headrace model check` tries the embedder)",
    );
    void this.#backend.close();
  }

  /** Leaving `healthy` answers everybody who waits. */
  #become(state: EmbedderState, reason: string): void {
    this.#state = state;
    this.#reason = reason;
    if (state === "healthy" || state === "starting") return;
    const waiting = [...this.#queue.splice(0), ...[...this.#running].flatMap(({ texts }) => texts)];
    for (const batch of this.#running) batch.abort.abort();
    this.#running.clear();
    for (const one of waiting) this.#settle(one, state);
  }
}

/** What can be embedded of a text: lone surrogates and control characters replaced, spaces joined, ends trimmed. */
export function readableText(text: string): string {
  return text
    .replace(/\p{Cs}/gu, "\uFFFD")
    .replace(/[\p{Cc}\s]+/gu, " ")
    .trim();
}
