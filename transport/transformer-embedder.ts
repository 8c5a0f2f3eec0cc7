/**
 * A sentence model on this machine, in a process of its own (embedder-worker.ts): on the gateway's own thread one text
 * would hold up every request for the 5 to 35 ms that the model computes.
 *
 * A process and not a worker thread, since the ONNX runtime that the library needs (1.16) keeps references to one
 * JavaScript environment in static variables: once a thread that has loaded it ends, no other thread of the process
 * can load it, and where two threads have, the end of either corrupts the heap and takes the gateway down. A process
 * may crash in native code, be killed for its memory, or hang; what it was asked fails, and `open` starts another.
 * The price is some 40 MB, and the copying of a vector.
 *
 * It runs one ONNX thread, so that it takes one core at most. It ends with its gateway, however that ends.
 */
import { type ChildProcess, fork } from "node:child_process";
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

/** The first message to the process. */
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
/** 8 texts of 128 tokens take some 0.3 s; beyond this the process hangs. */
const BATCH_MS_MAX = 30_000;

type Pending = {
  count: number;
  resolve: (vectors: readonly TextVector[]) => void;
  reject: (error: EmbedderError) => void;
  timer: NodeJS.Timeout;
};

export class TransformerBackend implements EmbedderBackend {
  readonly batchesMax = 1;
  readonly #options: TransformerOptions;
  readonly #workerUrl: URL;
  #worker: ChildProcess | null = null;
  #nextId = 1;
  readonly #pending = new Map<number, Pending>();

  /** @param workerUrl of the built embedder-worker; another one takes its place in tests. */
  constructor(
    options: TransformerOptions,
    workerUrl: URL = new URL("./embedder-worker.js", import.meta.url),
  ) {
    this.#options = options;
    this.#workerUrl = workerUrl;
  }

  async open(): Promise<{ id: string; version: string }> {
    await this.close();
    const { path, tokensMax } = this.#options;
    const { folder, model } = findModel(path, this.#options.model);
    const worker = fork(this.#workerUrl, [], {
      execArgv: [],
      env: withoutSecrets(process.env),
      serialization: "advanced", // Vectors as they are.
      stdio: ["ignore", "ignore", "ignore", "ipc"], // Whatever libraries print may quote texts.
    });
    this.#worker = worker;
    const version = await this.#untilReady(worker, { folder, tokensMax });
    this.#keepAlive(false);
    worker.unref();
    return { id: `transformers:${model}`, version };
  }

  #untilReady(worker: ChildProcess, setup: WorkerSetup): Promise<string> {
    return new Promise((resolve, reject) => {
      const lost = (kind: "gone" | "lasting", reason: string): void => {
        clearTimeout(timer);
        this.#lose(worker, reason);
        reject(new EmbedderError(kind, reason));
      };
      const timer = setTimeout(
        () => lost("gone", `the model was not loaded in ${LOAD_MS_MAX / 1000} s`),
        LOAD_MS_MAX,
      );
      worker.on("message", (event: WorkerEvent) => {
        if (event.kind === "ready") {
          clearTimeout(timer);
          resolve(event.version);
        } else if (event.kind === "unloadable") lost("lasting", event.reason);
        else this.#onAnswer(event);
      });
      worker.on("error", (error) => lost("gone", `the embedder's process: ${error.message}`));
      worker.on("exit", (code, signal) =>
        lost("gone", `the embedder's process ended (${signal ?? `exit code ${code}`})`),
      );
      worker.send(setup);
    });
  }

  embed(texts: readonly string[]): Promise<readonly TextVector[]> {
    const worker = this.#worker;
    if (worker === null || !worker.connected) {
      return Promise.reject(new EmbedderError("gone", "the embedder's process is not there"));
    }
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => this.#lose(worker, `the embedder's process hangs since ${BATCH_MS_MAX / 1000} s`),
        BATCH_MS_MAX,
      );
      this.#pending.set(id, { count: texts.length, resolve, reject, timer });
      this.#keepAlive(true);
      // Written while the process ends, it is lost; "exit" tells all that wait.
      worker.send({ id, texts } satisfies WorkerOrder, () => {});
    });
  }

  #onAnswer(event: Extract<WorkerEvent, { kind: "embedded" | "failed" }>): void {
    const pending = this.#pending.get(event.id);
    if (pending === undefined) return;
    clearTimeout(pending.timer);
    this.#pending.delete(event.id);
    if (this.#pending.size === 0) this.#keepAlive(false);
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

  /** A script that uses the library ends by itself, but not while a text is on its way. */
  #keepAlive(does: boolean): void {
    if (does) this.#worker?.channel?.ref();
    else this.#worker?.channel?.unref();
  }

  /** Once for each process. */
  #lose(worker: ChildProcess, reason: string): void {
    if (worker !== this.#worker) return;
    this.#worker = null;
    for (const { reject, timer } of this.#pending.values()) {
      clearTimeout(timer);
      reject(new EmbedderError("gone", reason));
    }
    this.#pending.clear();
    worker.kill("SIGKILL"); // It holds nothing that could be lost.
  }

  async close(): Promise<void> {
    const worker = this.#worker;
    if (worker === null) return;
    const ended = new Promise<void>((resolve) => worker.once("exit", () => resolve()));
    this.#lose(worker, "the embedder was closed");
    if (worker.exitCode === null && worker.signalCode === null) await ended;
  }
}

/** The process needs no key of ours. */
function withoutSecrets(env: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
  return Object.fromEntries(Object.entries(env).filter(([name]) => !name.startsWith("HEADRACE_")));
}
