/**
 * The thread in which a sentence model runs: tokens, one pass of the network, the mean over the tokens, length 1.
 * The only importer of @xenova/transformers, which is an optional dependency.
 *
 * Where the library is given nothing to choose, it cannot go wrong quietly: no remote models, no WASM fallback, one
 * ONNX thread. It passes no options on to the ONNX runtime, so that its `create` is wrapped.
 */
import { createRequire } from "node:module";
import { parentPort, workerData } from "node:worker_threads";
import { localName, modelVersion } from "./model-files.ts";
import type { Refusal, WorkerEvent, WorkerOrder, WorkerSetup } from "./transformer-embedder.ts";

/** The part of the library's tensors that is used. */
type Tensor = { data: Float32Array | BigInt64Array; dims: number[] };
type Inputs = { input_ids: Tensor; attention_mask: Tensor };
type Tokenizer = ((
  texts: readonly string[],
  options: { padding: boolean; truncation: boolean },
) => Inputs) & { unk_token_id?: number; model_max_length?: number };
type Model = (inputs: object) => Promise<{ last_hidden_state?: Tensor }>;
type Sessions = { create: (this: unknown, ...args: unknown[]) => Promise<unknown> };

const runtimeOptions = {
  executionProviders: ["cpu"],
  intraOpNumThreads: 1,
  interOpNumThreads: 1,
};

/** What is done with the network's output; part of the version, since other vectors come of another method. */
const METHOD = "mean";

const { folder, tokensMax } = workerData as WorkerSetup;
const port = parentPort;
if (port === null) throw new Error("embedder-worker.ts runs in a thread of its own");

function post(event: WorkerEvent, transferred: readonly ArrayBuffer[] = []): void {
  port?.postMessage(event, transferred);
}

async function answer(network: Network, { id, texts }: WorkerOrder): Promise<void> {
  try {
    const { vectors, refused } = await network.embed(texts);
    post({ kind: "embedded", id, vectors, refused }, [vectors.buffer]);
  } catch (error) {
    post({ kind: "failed", id, reason: oneLine(error) });
  }
}

async function load(): Promise<Network> {
  const library = await import("@xenova/transformers").catch((error: unknown) => {
    throw new Error(
      `@xenova/transformers is not installed (${oneLine(error)}); \`npm install @xenova/transformers@2.17.2\` brings it`,
    );
  });
  // Its ONNX runtime, wherever npm has put that.
  const near = createRequire(import.meta.resolve("@xenova/transformers"));
  const { InferenceSession: sessions }: { InferenceSession: Sessions } = near("onnxruntime-node");
  const { create } = sessions;
  sessions.create = function (bytes: unknown) {
    return create.call(this, bytes, runtimeOptions);
  };
  const { root, name } = localName(folder);
  library.env.allowRemoteModels = false;
  library.env.allowLocalModels = true;
  library.env.localModelPath = root;
  const [tokenizer, model] = await Promise.all([
    library.AutoTokenizer.from_pretrained(name),
    library.AutoModel.from_pretrained(name, { quantized: true }),
  ]).catch((error: unknown) => {
    throw new Error(`the model in ${folder} cannot be loaded: ${oneLine(error)}`);
  });
  return new Network(tokenizer as Tokenizer, model as Model);
}

class Network {
  readonly #tokenizer: Tokenizer;
  readonly #model: Model;

  constructor(tokenizer: Tokenizer, model: Model) {
    this.#tokenizer = tokenizer;
    this.#model = model;
  }

  /** Vectors one after another, in the order of the texts that are not refused. */
  async embed(texts: readonly string[]): Promise<{
    vectors: Float32Array<ArrayBuffer>;
    refused: Record<number, Refusal>;
  }> {
    const refused: Record<number, Refusal> = {};
    let inputs = this.#tokens(texts);
    for (const index of texts.keys()) {
      const reason = this.#refusal(inputs, index);
      if (reason !== undefined) refused[index] = reason;
    }
    const kept = texts.filter((_, index) => refused[index] === undefined);
    if (kept.length === 0) return { vectors: new Float32Array(), refused };
    if (kept.length < texts.length) inputs = this.#tokens(kept); // As wide as the longest that is left.
    const { last_hidden_state: hidden } = await this.#model(inputs);
    if (hidden === undefined || hidden.dims.length !== 3) {
      throw new Error("its output is not that of a sentence encoder (no last_hidden_state)");
    }
    return { vectors: meansOf(hidden, inputs.attention_mask), refused };
  }

  #tokens(texts: readonly string[]): Inputs {
    return this.#tokenizer(texts, { padding: true, truncation: false });
  }

  #refusal({ input_ids, attention_mask }: Inputs, row: number): Refusal | undefined {
    const [, width = 0] = input_ids.dims;
    const { unk_token_id, model_max_length = tokensMax } = this.#tokenizer;
    let count = 0;
    let unknown = 0;
    for (let at = row * width; at < (row + 1) * width; at++) {
      if (Number(attention_mask.data[at]) === 0) continue;
      count++;
      if (Number(input_ids.data[at]) === unk_token_id) unknown++;
    }
    if (count > Math.min(tokensMax, model_max_length)) return "too_long";
    const words = count - 2; // But for the signs of beginning and end.
    return words <= 0 || unknown * 2 > words ? "unknown_words" : undefined;
  }
}

/** Of each row: the mean over its tokens, scaled to length 1. */
function meansOf({ data, dims }: Tensor, mask: Tensor): Float32Array<ArrayBuffer> {
  const [rows = 0, width = 0, dimension = 0] = dims;
  const vectors = new Float32Array(rows * dimension);
  for (let row = 0; row < rows; row++) {
    const vector = vectors.subarray(row * dimension, (row + 1) * dimension);
    for (let token = row * width; token < (row + 1) * width; token++) {
      if (Number(mask.data[token]) === 0) continue;
      const from = token * dimension;
      for (let d = 0; d < dimension; d++) vector[d] = (vector[d] ?? 0) + Number(data[from + d]);
    }
    let squares = 0;
    for (const value of vector) squares += value * value;
    const norm = Math.sqrt(squares);
    for (let d = 0; d < dimension; d++) vector[d] = (vector[d] ?? 0) / norm;
  }
  return vectors;
}

/** Errors of native code have many lines. */
function oneLine(error: unknown): string {
  const { message } = error instanceof Error ? error : { message: String(error) };
  return (message.split("\n")[0] ?? "").slice(0, 300);
}

// At the end, where all of the file is there.
try {
  const version = `${await modelVersion(folder)}-${METHOD}`;
  const network = await load();
  await network.embed(["ready"]); // The first pass is slow, and shows whether the weights fit.
  port.on("message", (order: WorkerOrder) => void answer(network, order));
  post({ kind: "ready", version });
} catch (error) {
  post({ kind: "unloadable", reason: oneLine(error) });
}
