/**
 * A sentence model in this process, in a thread of its own (embedder-worker.ts): on the main thread one text would
 * hold up every request for the 5 to 35 ms that the model computes.
 *
 * One thread, with one ONNX thread in it: the process has its cores for other things. A thread that ends, or does not
 * answer for `BATCH_MS_MAX`, is gone with all it had been asked; `open` starts another.
 */
import { Worker } from "node:worker_threads";
import { type EmbedderBackend, EmbedderError, type TextVector } from "./embedder-backend.ts";
import { findModel } from "./model-files.ts";

export type TransformerOptions = {
  /** Default: EMBEDDER_MODEL, or the one that `path` holds. */
  model?: string;
  /** A folder of models, or the model's own; default: where `headrace model pull` puts them. */
  path?: string;
  /** Of a text, special tokens included; more is refused. */
  tokensMax: number;
};

/** What the thread is started with. */
export type WorkerSetup = { folder: string; tokensMax: number };

export type WorkerOrder = { id: number; texts: readonly string[] };

export type Refusal = "too_long" | "unknown_words";

/** Vectors of a batch lie one after another; a text without one has a reason in `refused`, by its index. */
export type WorkerEvent =
  | { kind: "ready"; version: string }
  | { kind: "unloadable"; reason: string }
  | {
      kind: "embedded";
      id: number;
      vectors: Float32Array;
      refused: Readonly<Record<number, Refusal>>;
    }
  | { kind: "failed"; id: number; reason: string };

/** Loading 118 MB takes 1.5 s, on a slow and busy disk many times that. */
const LOAD_MS_MAX = 120_000;
/** 8 texts of 128 tokens take some 0.3 s; beyond this the thread hangs. */
const BATCH_MS_MAX = 30_000;

type Pending = {
  count: number;
  resolve: (vectors: readonly TextVector[]) => void;
  reject: (error: EmbedderError) => void;
  timer: NodeJS.Timeout;
};

export class TransformerBackend implements EmbedderBackend {
  readonly batchesMax = 1;
  readonly #model: string | undefined;
  readonly #path: string | undefined;
  readonly #tokensMax: number;
  readonly #workerUrl: URL;
  #worker: Worker | null = null;
  #nextId = 1;
  readonly #pending = new Map<number, Pending>();

  /** @param workerUrl of the built embedder-worker; another one takes its place in tests. */
  constructor(
    { model, path, tokensMax }: TransformerOptions,
    workerUrl: URL = new URL("./embedder-worker.js", import.meta.url),
  ) {
    this.#model = model;
    this.#path = path;
    this.#tokensMax = tokensMax;
    this.#workerUrl = workerUrl;
  }

  async open(): Promise<{ id: string; version: string }> {
    await this.close();
    const { folder, model } = findModel(this.#path, this.#model);
    const setup: WorkerSetup = { folder, tokensMax: this.#tokensMax };
    // Whatever libraries print is not for our log: it may quote texts.
    const worker = new Worker(this.#workerUrl, { workerData: setup, stdout: true, stderr: true });
    worker.stdout.resume();
    worker.stderr.resume();
    this.#worker = worker;
    const version = await this.#untilReady(worker, folder);
    worker.unref(); // It keeps no process alive but while it works.
    return { id: `transformers:${model}`, version };
  }

  #untilReady(worker: Worker, folder: string): Promise<string> {
    return new Promise((resolve, reject) => {
      const lost = (kind: "gone" | "lasting", reason: string): void => {
        clearTimeout(timer);
        this.#lose(worker, reason);
        reject(new EmbedderError(kind, reason));
      };
      const timer = setTimeout(
        () => lost("gone", `the model in ${folder} was not loaded in ${LOAD_MS_MAX / 1000} s`),
        LOAD_MS_MAX,
      );
      worker.on("message", (event: WorkerEvent) => {
        if (event.kind === "ready") {
          clearTimeout(timer);
          resolve(event.version);
        } else if (event.kind === "unloadable") lost("lasting", event.reason);
        else this.#onAnswer(event);
      });
      worker.on("error", (error) => lost("gone", `the embedder's thread failed: ${error.message}`));
      worker.on("exit", () => lost("gone", "the embedder's thread ended"));
    });
  }

  embed(texts: readonly string[]): Promise<readonly TextVector[]> {
    const worker = this.#worker;
    if (worker === null) {
      return Promise.reject(new EmbedderError("gone", "the embedder's thread is not there"));
    }
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => this.#lose(worker, `the embedder's thread hangs since ${BATCH_MS_MAX / 1000} s`),
        BATCH_MS_MAX,
      );
      this.#pending.set(id, { count: texts.length, resolve, reject, timer });
      worker.ref();
      worker.postMessage({ id, texts } satisfies WorkerOrder);
    });
  }

  #onAnswer(event: Extract<WorkerEvent, { kind: "embedded" | "failed" }>): void {
    const pending = this.#pending.get(event.id);
    if (pending === undefined) return;
    clearTimeout(pending.timer);
    this.#pending.delete(event.id);
    if (this.#pending.size === 0) this.#worker?.unref();
    if (event.kind === "failed") return pending.reject(new EmbedderError("passing", event.reason));
    const { vectors, refused } = event;
    const dimension = vectors.length / (pending.count - Object.keys(refused).length);
    let from = 0;
    const results: TextVector[] = [];
    for (let index = 0; index < pending.count; index++) {
      // A copy: whoever keeps one vector must not keep those of the whole batch.
      results.push(refused[index] ?? vectors.slice(from, from + dimension));
      if (refused[index] === undefined) from += dimension;
    }
    pending.resolve(results);
  }

  /** Once for each thread. */
  #lose(worker: Worker, reason: string): void {
    if (worker !== this.#worker) return;
    this.#worker = null;
    for (const { reject, timer } of this.#pending.values()) {
      clearTimeout(timer);
      reject(new EmbedderError("gone", reason));
    }
    this.#pending.clear();
    void worker.terminate();
  }

  async close(): Promise<void> {
    const worker = this.#worker;
    if (worker === null) return;
    this.#lose(worker, "the embedder was closed");
    await worker.terminate();
  }
}
