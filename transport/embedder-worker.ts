/**
 * The process in which a sentence model runs: tokens, one pass of the network, the mean over the tokens, length 1.
 * The only importer of @xenova/transformers, which is an optional dependency.
 *
 * Where the library is given nothing to choose, it cannot go wrong quietly: no remote models, no WASM fallback, one
 * ONNX thread. It passes no options on to the ONNX runtime, so that its `create` is wrapped.
 */
import { createRequire } from "node:module";
import { normalise } from "./embedder-backend.ts";
import { localName, modelVersion } from "./model-files.ts";
import type { Refusal, WorkerEvent, WorkerOrder, WorkerSetup } from "./transformer-embedder.ts";

/** The part of the library that is used. */
type Tensor = { data: ArrayLike<number | bigint>; dims: number[] };
type Tokenizer = {
  encode: (text: string) => number[];
  unk_token_id?: number;
  pad_token_id?: number;
  model_max_length?: number;
};
type Model = (inputs: object) => Promise<{ last_hidden_state?: Tensor }>;
type MakeTensor = (data: BigInt64Array, dims: number[]) => Tensor;
type Sessions = { create: (this: unknown, ...args: unknown[]) => Promise<unknown> };

const runtimeOptions = {
  executionProviders: ["cpu"],
  intraOpNumThreads: 1,
  interOpNumThreads: 1,
};

/** What is done with the network's output; part of the version, since other vectors come of another method. */
const METHOD = "mean";

if (process.send === undefined) throw new Error("embedder-worker.ts runs as a process of its own");

function post(event: WorkerEvent): void {
  process.send?.(event);
}

async function answer(network: Network, { id, texts }: WorkerOrder): Promise<void> {
  try {
    const { vectors, refused } = await network.embed(texts);
    post({ kind: "embedded", id, vectors, refused });
  } catch (error) {
    post({ kind: "failed", id, reason: oneLine(error) });
  }
}

async function load({ folder, tokensMax }: WorkerSetup): Promise<Network> {
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
  const makeTensor: MakeTensor = (data, dims) => new library.Tensor("int64", data, dims);
  return new Network(tokenizer, model, makeTensor, tokensMax);
}

class Network {
  readonly #tokenizer: Tokenizer;
  readonly #model: Model;
  readonly #makeTensor: MakeTensor;
  readonly #tokensMax: number;

  constructor(tokenizer: Tokenizer, model: Model, makeTensor: MakeTensor, tokensMax: number) {
    this.#tokenizer = tokenizer;
    this.#model = model;
    this.#makeTensor = makeTensor;
    this.#tokensMax = Math.min(tokensMax, tokenizer.model_max_length ?? tokensMax);
  }

  /** Vectors one after another, in the order of the texts that are not refused. */
  async embed(texts: readonly string[]): Promise<{
    vectors: Float32Array;
    refused: Record<number, Refusal>;
  }> {
    const refused: Record<number, Refusal> = {};
    const rows: number[][] = [];
    for (const [index, text] of texts.entries()) {
      const tokens = this.#tokenizer.encode(text);
      const reason = this.#refusal(tokens);
      if (reason === undefined) rows.push(tokens);
      else refused[index] = reason;
    }
    if (rows.length === 0) return { vectors: new Float32Array(), refused };
    const { last_hidden_state: hidden } = await this.#model(this.#inputsOf(rows));
    if (hidden === undefined || hidden.dims.length !== 3) {
      throw new Error("the model is no sentence encoder: it puts out no last_hidden_state");
    }
    return { vectors: meansOf(hidden, rows), refused };
  }

  #refusal(tokens: readonly number[]): Refusal | undefined {
    if (tokens.length > this.#tokensMax) return "too_long";
    const words = tokens.length - 2; // But for the signs of beginning and end.
    const unknown = tokens.filter((token) => token === this.#tokenizer.unk_token_id).length;
    return words <= 0 || unknown * 2 > words ? "unknown_words" : undefined;
  }

  /** As wide as the longest row. */
  #inputsOf(rows: readonly (readonly number[])[]): { input_ids: Tensor; attention_mask: Tensor } {
    const width = Math.max(...rows.map((tokens) => tokens.length));
    const ids = new BigInt64Array(rows.length * width).fill(
      BigInt(this.#tokenizer.pad_token_id ?? 0),
    );
    const mask = new BigInt64Array(rows.length * width);
    for (const [row, tokens] of rows.entries()) {
      for (const [at, token] of tokens.entries()) {
        ids[row * width + at] = BigInt(token);
        mask[row * width + at] = 1n;
      }
    }
    const dims = [rows.length, width];
    return {
      input_ids: this.#makeTensor(ids, dims),
      attention_mask: this.#makeTensor(mask, dims),
    };
  }
}

/** Of each row: the mean over its tokens, without the padding, scaled to length 1. */
function meansOf({ data, dims }: Tensor, rows: readonly (readonly number[])[]): Float32Array {
  const [, width = 0, dimension = 0] = dims;
  const vectors = new Float32Array(rows.length * dimension);
  for (const [row, tokens] of rows.entries()) {
    const vector = vectors.subarray(row * dimension, (row + 1) * dimension);
    for (let token = 0; token < tokens.length; token++) {
      const from = (row * width + token) * dimension;
      for (let d = 0; d < dimension; d++) vector[d] = (vector[d] ?? 0) + Number(data[from + d]);
    }
    normalise(vector);
  }
  return vectors;
}

/** Errors of native code have many lines. */
function oneLine(error: unknown): string {
  const { message } = error instanceof Error ? error : { message: String(error) };
  return (message.split("\n")[0] ?? "").slice(0, 300);
}

async function start(setup: WorkerSetup): Promise<void> {
  try {
    const version = `${await modelVersion(setup.folder)}-${METHOD}`;
    const network = await load(setup);
    await network.embed(["ready"]); // The first pass is slow, and shows whether the weights fit.
    process.on("message", (order: WorkerOrder) => void answer(network, order));
    post({ kind: "ready", version });
  } catch (error) {
    post({ kind: "unloadable", reason: oneLine(error) });
  }
}

process.once("message", (setup: WorkerSetup) => void start(setup));
process.on("disconnect", () => process.exit());
// ^C at a terminal reaches this process, too; the gateway decides when it ends.
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => {});
