/**
 * The embedder in a process, on the real library and a tiny model: test/fixtures/tiny-random-bert has random weights
 * and 290 word pieces, so that it tells nothing of meaning, but loads, computes and fails like a large one.
 */
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { afterEach, describe, expect, it } from "vitest";
import type { Embedded } from "../actors/edges.ts";
import { Embedder } from "../transport/embedder.ts";
import { dot, EmbedderError } from "../transport/embedder-backend.ts";
import { TransformerBackend } from "../transport/transformer-embedder.ts";

const repository = join(import.meta.dirname, "..");
const fixture = join(repository, "test/fixtures/tiny-random-bert");
const built = join(repository, "dist/transport");
const isBuilt = existsSync(join(built, "embedder-worker.js"));
if (!isBuilt) console.log("skipped: dist/ is not there (npm run build): the embedder's process");
const isInstalled = existsSync(join(repository, "node_modules/@xenova/transformers"));
if (!isInstalled)
  console.log("skipped: @xenova/transformers, an optional dependency, is not installed");
const canRun = isBuilt && isInstalled;
const workerUrl = pathToFileURL(join(built, "embedder-worker.js"));

const cleanups: (() => Promise<void> | void)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

function tempFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "headrace-embedder-"));
  cleanups.push(() => rmSync(folder, { recursive: true }));
  return folder;
}

/** A copy of the model, to break. */
function modelCopy(): string {
  const folder = join(tempFolder(), "org", "tiny");
  cpSync(fixture, folder, { recursive: true });
  return folder;
}

function backendOf(path: string, tokensMax = 128, url = workerUrl): TransformerBackend {
  const backend = new TransformerBackend({ path, tokensMax }, url);
  cleanups.push(() => backend.close());
  return backend;
}

/** A process that runs `code` for each order; `order`, `send` and `vectors(n)` are at hand. */
function fakeWorker(code: string, start = ""): URL {
  const file = join(tempFolder(), "worker.mjs");
  writeFileSync(
    file,
    `const send = (event) => process.send(event);
    const vectors = (count) => new Float32Array(count * 2).fill(Math.SQRT1_2);
    process.on("disconnect", () => process.exit());
    process.once("message", () => {
      ${start}
      process.on("message", (order) => { ${code} });
      send({ kind: "ready", version: "1" });
    });`,
  );
  return pathToFileURL(file);
}

const vectorsIn = (results: readonly unknown[]): Float32Array[] =>
  results.map((result) => {
    if (!(result instanceof Float32Array)) throw new Error(`no vector: ${result}`);
    return result;
  });

describe.runIf(canRun)("transformers: a real model in its process", () => {
  it("unit vectors, the same for the same text, alone or in a batch of other lengths", async () => {
    const backend = backendOf(fixture);
    const opened = await backend.open();
    expect(opened.id).toBe("transformers:tiny-random-bert");
    expect(opened.version).toMatch(/^[0-9a-f]{16}-mean$/);
    const texts = ["How do I reset my password?", "今天天气怎么样", "light", "please ".repeat(60)];
    const together = vectorsIn(await backend.embed(texts));
    for (const [index, text] of texts.entries()) {
      const [alone] = vectorsIn(await backend.embed([text]));
      const vector = together[index];
      if (vector === undefined || alone === undefined) throw new Error("no vector");
      expect(vector).toHaveLength(64);
      expect(vector.buffer.byteLength).toBe(64 * 4); // Its own, not the batch's.
      expect(dot(vector, vector)).toBeCloseTo(1, 5);
      expect(dot(vector, alone)).toBeGreaterThan(0.999);
    }
    const [first, second] = together;
    if (first === undefined || second === undefined) throw new Error("no vector");
    expect(dot(first, second)).toBeLessThan(0.99);
  });

  it("the mean over the tokens of the network's own output, as the library's pipeline has it", async () => {
    const backend = backendOf(fixture);
    await backend.open();
    const [vector] = vectorsIn(await backend.embed(["How do I reset my password?"]));
    // From `pipeline("feature-extraction")` with pooling "mean" and normalize, same weights.
    const expected = [-0.157124, 0.017904, -0.148816, -0.120398, 0.030726, -0.210933, -0.092592];
    for (const [index, value] of expected.entries()) expect(vector?.[index]).toBeCloseTo(value, 4);
  });

  it("too long, or too little known of it: refused one by one, the rest is embedded", async () => {
    const backend = backendOf(fixture, 20);
    await backend.open();
    const results = await backend.embed([
      "what is the weather today",
      "please ".repeat(19), // 19 and two signs
      "please ".repeat(18),
      "😀😀😀",
      "jazz 42",
    ]);
    expect(results.map((one) => (typeof one === "string" ? one : one.length))).toEqual([
      64,
      "too_long",
      64,
      "unknown_words",
      "unknown_words",
    ]);
    expect(await backend.embed(["zzz", "please ".repeat(30)])).toEqual([
      "unknown_words",
      "too_long",
    ]);
    // The model's own limit holds, whatever is configured.
    const wide = backendOf(fixture, 512);
    await wide.open();
    expect(await wide.embed(["please ".repeat(126), "please ".repeat(127)])).toEqual([
      expect.any(Float32Array),
      "too_long",
    ]);
  });

  it("odd texts get an answer each through the edge, and it stays healthy", async () => {
    const embedder = new Embedder(
      backendOf(fixture),
      { timeoutMs: 20_000, queueMax: 64, tokensMax: 128 },
      { info: () => {}, warn: () => {} },
    );
    cleanups.push(() => embedder.close());
    await embedder.settled();
    expect(embedder.describe()).toMatchObject({ state: "healthy", identity: { dimension: 64 } });
    const texts = [
      "a".repeat(1 << 20),
      " ".repeat(500),
      "\u0000\u0001\u001f",
      "what is \ud800 the \udfff weather",
      "😀".repeat(10_000),
      "😀".repeat(100),
      "what is the weather",
    ];
    const answers = await Promise.all(
      texts.map((text) => new Promise<Embedded>((resolve) => embedder.embed(text, resolve))),
    );
    expect(answers.map((one) => (one.kind === "vector" ? "vector" : one.reason))).toEqual([
      "too_long",
      "empty",
      "empty",
      "vector",
      "too_long",
      "unknown_words",
      "vector",
    ]);
    expect(embedder.describe().state).toBe("healthy");
  });

  it("the version is that of the bytes", async () => {
    const folder = modelCopy();
    const { version } = await backendOf(fixture).open();
    expect((await backendOf(folder).open()).version).toBe(version);
    const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8"));
    writeFileSync(join(folder, "config.json"), JSON.stringify({ ...config, changed: true }));
    expect((await backendOf(folder).open()).version).not.toBe(version);
  });

  const breaks: [string, (folder: string) => void, RegExp][] = [
    [
      "no such folder",
      (folder) => rmSync(folder, { recursive: true }),
      /the model \S+ is not in .*; `headrace model pull /,
    ],
    [
      "no tokenizer",
      (folder) => rmSync(join(folder, "tokenizer.json")),
      /tokenizer.json is missing; `headrace model pull/,
    ],
    [
      "weights half downloaded",
      (folder) => {
        const weights = join(folder, "onnx/model_quantized.onnx");
        copyFileSync(weights, `${weights}.part`);
        rmSync(weights);
      },
      /model_quantized.onnx is missing \(half of it was downloaded\)/,
    ],
    [
      "weights cut off",
      (folder) => cut(join(folder, "onnx/model_quantized.onnx"), 90_000),
      /cannot be loaded: /,
    ],
    [
      "weights cut to nothing",
      (folder) => cut(join(folder, "onnx/model_quantized.onnx"), 0),
      /is not whole/,
    ],
    [
      "a Git LFS pointer",
      (folder) =>
        writeFileSync(
          join(folder, "onnx/model_quantized.onnx"),
          `version https://git-lfs.github.com/spec/v1\noid sha256:${"0".repeat(64)}\nsize 118000000\n`,
        ),
      /Git LFS pointer/,
    ],
    [
      "a tokenizer cut off",
      (folder) => cut(join(folder, "tokenizer.json"), 4000),
      /tokenizer.json is not whole/,
    ],
    [
      "another architecture: text to text",
      (folder) => changeConfig(folder, { model_type: "t5" }),
      /cannot be loaded: /,
    ],
    [
      "another architecture: pictures",
      (folder) => {
        changeConfig(folder, { model_type: "vit" });
        writeFileSync(join(folder, "onnx/model_quantized.onnx"), copyingNetwork("pixel_values"));
      },
      /pixel_values/,
    ],
    [
      "another architecture: tokens in, no hidden states out",
      (folder) =>
        writeFileSync(join(folder, "onnx/model_quantized.onnx"), copyingNetwork("input_ids")),
      /no sentence encoder/,
    ],
    ["a tokenizer of another model", (folder) => growVocabulary(folder), /./],
  ];

  it.each(breaks)(
    "%s: it is off, says why in one line, and nobody waits",
    async (_, breakModel, reason) => {
      const folder = modelCopy();
      const root = join(folder, "../..");
      breakModel(folder);
      const logged: string[] = [];
      const log = {
        info: () => {},
        warn: (fields: object, text: string) =>
          void logged.push(`${text} ${JSON.stringify(fields)}`),
      };
      const backend = new TransformerBackend(
        { path: root, model: "org/tiny", tokensMax: 128 },
        workerUrl,
      );
      const embedder = new Embedder(backend, { timeoutMs: 50, queueMax: 8, tokensMax: 128 }, log);
      cleanups.push(() => embedder.close());
      await embedder.settled();
      expect(embedder.describe()).toMatchObject({
        state: "off",
        reason: expect.stringMatching(reason),
      });
      expect(embedder.describe().reason).not.toContain("\n");
      expect(logged).toEqual([expect.stringContaining("semantic lookup is off")]);
      embedder.embed("hello", (answer) =>
        expect(answer).toEqual({ kind: "unavailable", reason: "off" }),
      );
      expect.hasAssertions();
    },
  );

  it("without the library: off, and names the command that installs it", async () => {
    const folder = tempFolder(); // Nothing is installed above it.
    for (const file of ["embedder-worker.js", "model-files.js", "embedder-backend.js"]) {
      copyFileSync(join(built, file), join(folder, file));
    }
    writeFileSync(join(folder, "package.json"), '{"type": "module"}');
    const url = pathToFileURL(join(folder, "embedder-worker.js"));
    await expect(backendOf(fixture, 128, url).open()).rejects.toThrow(
      /@xenova\/transformers is not installed .*npm install @xenova\/transformers@/,
    );
  });
});

function cut(file: string, bytes: number): void {
  writeFileSync(file, readFileSync(file).subarray(0, bytes));
}

function changeConfig(folder: string, changed: object): void {
  const file = join(folder, "config.json");
  writeFileSync(file, JSON.stringify({ ...JSON.parse(readFileSync(file, "utf8")), ...changed }));
}

/** Token numbers that the weights do not have. */
function growVocabulary(folder: string): void {
  const file = join(folder, "tokenizer.json");
  const tokenizer = JSON.parse(readFileSync(file, "utf8"));
  for (const word of Object.keys(tokenizer.model.vocab)) tokenizer.model.vocab[word] += 1000;
  writeFileSync(file, JSON.stringify(tokenizer));
}

/** ONNX by hand: a network that puts out its only input, under the name "logits". */
function copyingNetwork(input: string): Buffer {
  const field = (number: number, value: Buffer | string | number): Buffer => {
    if (typeof value === "number") return Buffer.from([number << 3, value]);
    const bytes = Buffer.from(value);
    if (bytes.length > 127) {
      return Buffer.concat([
        Buffer.from([(number << 3) | 2, (bytes.length & 127) | 128, bytes.length >> 7]),
        bytes,
      ]);
    }
    return Buffer.concat([Buffer.from([(number << 3) | 2, bytes.length]), bytes]);
  };
  const message = (...fields: Buffer[]): Buffer => Buffer.concat(fields);
  const dimension = (name: string): Buffer => field(1, field(2, name));
  const value = (name: string): Buffer => {
    const shape = field(2, message(dimension("batch"), dimension("width")));
    const type = field(1, message(field(1, 7), shape)); // 7: int64
    return message(field(1, name), field(2, type));
  };
  const node = message(field(1, input), field(2, "logits"), field(4, "Identity"));
  const graph = message(
    field(1, node),
    field(2, "copy"),
    field(11, value(input)),
    field(12, value("logits")),
    field(10, "x".repeat(1100)), // A description: a real network is not this small.
  );
  return message(field(1, 8), field(8, message(field(1, ""), field(2, 13))), field(7, graph));
}

describe("transformers: the process", () => {
  it("one that crashes fails what it was asked, and another takes its place", async () => {
    const url = fakeWorker(
      `if (order.texts[0] === "crash") throw new Error("boom");
       if (order.texts[0] === "exit") process.exit(3);
       if (order.texts[0] === "killed") process.kill(process.pid, "SIGSEGV");
       if (order.texts[0] === "silent") return;
       send({ kind: "embedded", id: order.id, vectors: vectors(order.texts.length), refused: {} });`,
    );
    const backend = backendOf(fixture, 128, url);
    for (const text of ["crash", "exit", "killed"]) {
      await backend.open();
      expect(await backend.embed(["fine", "fine too"])).toHaveLength(2);
      const silent = backend.embed(["silent"]);
      const crash = backend.embed([text]);
      for (const asked of [silent, crash]) {
        const error = await asked.catch((reason: unknown) => reason);
        expect(error).toBeInstanceOf(EmbedderError);
        expect(error).toMatchObject({
          kind: "gone",
          message: expect.stringMatching(/process ended/),
        });
      }
      await expect(backend.embed(["after"])).rejects.toMatchObject({ kind: "gone" });
    }
  });

  it("through the edge: unavailable at once, healthy again after a rest, with the same identity", async () => {
    const url = fakeWorker(
      `if (order.texts.includes("crash")) throw new Error("boom");
       const { texts, id } = order;
       const all = new Float32Array(texts.length * 64);
       texts.forEach((text, at) => {
         const own = all.subarray(at * 64, at * 64 + 64);
         for (const word of text.toLowerCase().split(/\\W+/)) {
           let sum = 7;
           for (const letter of word) sum = (sum * 31 + letter.charCodeAt(0)) % 64;
           own[sum]++;
         }
         const norm = Math.hypot(...own);
         own.forEach((value, index) => { own[index] = value / norm; });
       });
       send({ kind: "embedded", id, vectors: all, refused: {} });`,
    );
    const logged: string[] = [];
    const log = { info: () => {}, warn: (_: object, text: string) => void logged.push(text) };
    const options = { timeoutMs: 20_000, queueMax: 8, tokensMax: 128 };
    const embedder = new Embedder(backendOf(fixture, 128, url), options, log);
    cleanups.push(() => embedder.close());
    await embedder.settled();
    const identity = embedder.identity();
    expect(identity).toMatchObject({ dimension: 64 });
    const embed = (text: string): Promise<Embedded> =>
      new Promise((resolve) => embedder.embed(text, resolve));
    expect((await embed("what is this")).kind).toBe("vector");
    const [crashed, waiting] = await Promise.all([embed("crash"), embed("what waits behind it")]);
    expect(crashed).toEqual({ kind: "unavailable", reason: "failed" });
    expect(waiting).toEqual({ kind: "unavailable", reason: "resting" });
    while (embedder.describe().state !== "healthy") await new Promise((r) => setTimeout(r, 10));
    expect((await embed("what is this")).kind).toBe("vector");
    expect(embedder.identity()).toEqual(identity);
    expect(logged).toHaveLength(1);
  });

  it("one that cannot start: says why; closing ends it and what it was asked", async () => {
    const lasting = backendOf(
      fixture,
      128,
      fakeWorker("", `send({ kind: "unloadable", reason: "no" });`),
    );
    await expect(lasting.open()).rejects.toMatchObject({ kind: "lasting", message: "no" });
    const broken = backendOf(fixture, 128, fakeWorker("", `throw new Error("bad start");`));
    await expect(broken.open()).rejects.toMatchObject({
      kind: "gone",
      message: expect.stringMatching(/process ended/),
    });
    const silent = backendOf(fixture, 128, fakeWorker(""));
    await silent.open();
    const asked = silent.embed(["a"]);
    const outcome = asked.catch((reason: unknown) => reason);
    await silent.close();
    expect(await outcome).toMatchObject({ kind: "gone" });
  });
});
