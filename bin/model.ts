/**
 * `headrace model pull`: downloads an embedding model once. `headrace model check`: tries an embedder as the gateway
 * would, and tells what it is good for on this machine.
 *
 * Progress on standard error, the report on standard output. Ends with 0 when the model is there or the check passed,
 * 1 when not, 2 for bad input, 130 when stopped by ^C (what was downloaded stays).
 */
import { type IntervalHistogram, monitorEventLoopDelay } from "node:perf_hooks";
import cliProgress from "cli-progress";
import { Command } from "commander";
import { openBackend } from "../transport/embedder.ts";
import {
  dot,
  EMBEDDER_MODEL,
  type EmbedderBackend,
  EmbedderError,
  type SelfTest,
  selfTest,
} from "../transport/embedder-backend.ts";
import { findModel, modelsFolder, PullError, pullModel } from "../transport/model-files.ts";
import { defaults, parseOptions } from "../transport/options.ts";

const HUB = "https://huggingface.co";

export function modelCommand(): Command {
  return new Command("model")
    .description("the embedding model of the semantic cache: download it, try it")
    .addCommand(pullCommand())
    .addCommand(checkCommand());
}

// ---- pull ---------------------------------------------------------------------------------------------------

type PullFlags = { dir: string; from: string };

function pullCommand(): Command {
  const command = new Command("pull")
    .description("download a model, once; a pull that broke off is gone on with")
    .argument("[name]", "as on the hub: org/name", EMBEDDER_MODEL)
    .option("--dir <folder>", "where models lie", modelsFolder())
    .option("--from <url>", "a hub with the layout of Hugging Face's", HUB);
  return command.action((name: string, flags: PullFlags) => pull(name, flags, command));
}

async function pull(model: string, { dir, from }: PullFlags, command: Command): Promise<void> {
  const fail = (text: string, exitCode: number): never =>
    command.error(`headrace model pull: ${text}`, { exitCode, code: "headrace.model" });
  if (!/^https?:/.test(from) || !URL.canParse(from))
    return fail(`--from ${from} is no http URL`, 2);
  const stop = new AbortController();
  const onInterrupt = (): void => stop.abort();
  process.once("SIGINT", onInterrupt);
  const progress = new Progress();
  try {
    const onProgress = progress.show.bind(progress);
    const pulled = await pullModel({ model, dir, from, signal: stop.signal, onProgress });
    progress.end();
    findModel(pulled.folder, model);
    const what = pulled.fetched === 0 ? "is there already" : "is there";
    console.log(`${model} ${what}: ${pulled.folder}`);
    const path = dir === modelsFolder() ? "" : `, path: ${dir}`;
    console.log(`use it: cache.semantic.embedder: {type: transformers, model: ${model}${path}}`);
  } catch (error) {
    progress.end();
    if (stop.signal.aborted) return fail("stopped; the next pull goes on from there", 130);
    if (error instanceof PullError || error instanceof EmbedderError) return fail(error.message, 1);
    if (error instanceof Error && "code" in error) return fail(error.message, 1); // Disk full, no rights.
    throw error;
  } finally {
    process.off("SIGINT", onInterrupt);
  }
}

const LINE_EVERY_MS = 5000;

/** A bar on a terminal, else a line now and then. */
class Progress {
  #bar: cliProgress.SingleBar | undefined;
  #file = "";
  #lineAtMs = Number.NEGATIVE_INFINITY;

  show(file: string, bytes: number, bytesTotal: number | undefined): void {
    const mb = (count: number): string => (count / 1e6).toFixed(1);
    if (process.stderr.isTTY) {
      this.#bar ??= new cliProgress.SingleBar({ format: "{bar} {mb} of {mbTotal} MB  {file}" });
      if (file !== this.#file) this.#bar.start(bytesTotal ?? bytes, 0);
      const mbTotal = bytesTotal === undefined ? "?" : mb(bytesTotal);
      this.#bar.update(bytes, { file, mb: mb(bytes), mbTotal });
    } else if (performance.now() - this.#lineAtMs >= LINE_EVERY_MS || bytes === bytesTotal) {
      this.#lineAtMs = performance.now();
      console.error(
        `${file}: ${mb(bytes)} of ${bytesTotal === undefined ? "?" : mb(bytesTotal)} MB`,
      );
    }
    this.#file = file;
  }

  end(): void {
    this.#bar?.stop();
  }
}

// ---- check --------------------------------------------------------------------------------------------------

type CheckFlags = {
  type?: string;
  model?: string;
  path?: string;
  url?: string;
  key?: string;
  dimension?: string;
  runs: string;
};

function checkCommand(): Command {
  const command = new Command("check")
    .description("try an embedder: does it load, does it tell texts apart, how long does it take")
    .option("--type <name>", "transformers, http or lexical (else told by the other flags)")
    .option("--model <name>", `the model; for transformers ${EMBEDDER_MODEL} unless given`)
    .option("--path <folder>", "folder of models, or the model's own")
    .option("--url <url>", "an endpoint for embeddings instead of a model on disk")
    .option("--key <key>", "sent to the endpoint as bearer token")
    .option("--dimension <count>", "that its vectors must have")
    .option("--runs <count>", "timed runs of each length", "100");
  return command.action((flags: CheckFlags) => check(flags, command));
}

async function check(flags: CheckFlags, command: Command): Promise<void> {
  const fail = (text: string, exitCode: number): never =>
    command.error(`headrace model check: ${text}`, { exitCode, code: "headrace.model" });
  const runs = Number(flags.runs);
  if (!Number.isInteger(runs) || runs < 1 || runs > 100_000) {
    return fail(`--runs is ${flags.runs}; accepted: a whole number from 1 to 100000`, 2);
  }
  const { type, model, path, url, key, dimension } = flags;
  const embedder = {
    type: type ?? (url === undefined ? "transformers" : "http"),
    ...(model !== undefined && { model }),
    ...(path !== undefined && { path }),
    ...(url !== undefined && { url }),
    ...(key !== undefined && { key }),
    ...(dimension !== undefined && { dimension: Number(dimension) }),
  };
  const nodes = [{ url: "http://127.0.0.1:1" }]; // Not asked; without one no options are complete.
  const parsed = parseOptions({ nodes, cache: { semantic: { embedder } } });
  if (!parsed.ok) {
    const lines = parsed.problems.map(
      ({ path: at, message }) => `${at.split(".").at(-1)} ${message}`,
    );
    return fail(lines.join("\n"), 2);
  }
  const options = parsed.options.cache.semantic.embedder;
  const backend = await openBackend(options);
  if (backend === undefined) return fail("type is off: there is nothing to check", 2);
  try {
    const passed = await report(backend, options.dimension, options.tokensMax, runs);
    process.exitCode = passed ? 0 : 1;
  } catch (error) {
    if (!(error instanceof EmbedderError)) throw error;
    return fail(error.message, 1);
  } finally {
    await backend.close();
  }
}

const print = (name: string, value: string): void => console.log(`${name.padEnd(34)}${value}`);

/** @returns whether the gateway would take it. */
async function report(
  backend: EmbedderBackend,
  dimension: number | undefined,
  tokensMax: number,
  runs: number,
): Promise<boolean> {
  const askedAtMs = performance.now();
  const { id, version } = await backend.open();
  const loadedMs = performance.now() - askedAtMs;
  const embed = (texts: readonly string[]) => backend.embed(texts, AbortSignal.timeout(20_000));
  const test = await selfTest(embed, dimension);
  print("embedder", `${id}, version ${version}`);
  print("loads", `yes, in ${(loadedMs / 1000).toFixed(2)} s`);
  printTest(test);
  if (test.problem !== undefined) return false;
  await printSpeed(backend, tokensMax, runs);
  return true;
}

function printTest(test: SelfTest): void {
  print("dimension", String(test.dimension));
  for (const { question, paraphrase, unrelated } of test.pairs) {
    const cosines = `${paraphrase.toFixed(3)} to a paraphrase, ${unrelated.toFixed(3)} to another question`;
    print(`"${question.slice(0, 30)}"`, cosines);
  }
  for (const { texts, cosine } of test.differing) {
    print(`"${texts[0].slice(0, 30)}"`, `${cosine.toFixed(3)} to "${texts[1]}"`);
  }
  print("self-test", test.problem === undefined ? "passed" : `FAILED: ${test.problem}`);
}

const words =
  "please how do i change the password of my account and what will the weather be like today".split(
    " ",
  );

/** A text of about so many tokens, for a model that has a token for each of these words. */
function textOf(tokens: number, run: number): string {
  return Array.from({ length: tokens - 2 }, (_, at) => words[(at + run) % words.length]).join(" ");
}

function delayText(delay: IntervalHistogram): string {
  const late = (ns: number): string => Math.max(0, ns / 1e6 - 1).toFixed(1); // A timer of 1 ms.
  const [p50, p99] = [late(delay.percentile(50)), late(delay.percentile(99))];
  return `p50 ${p50} ms, p99 ${p99} ms, max ${late(delay.max)} ms`;
}

/** To tell what embedding does to the loop from what a busy machine does. */
const IDLE_MS = 1000;

/** Times, and how late a timer of this thread's loop is meanwhile. */
async function printSpeed(
  backend: EmbedderBackend,
  tokensMax: number,
  runs: number,
): Promise<void> {
  const { signal } = new AbortController();
  const single = await backend.embed([textOf(9, 0)], signal);
  const batched = await backend.embed(
    Array.from({ length: 8 }, (_, index) => textOf(index === 0 ? 9 : 9 + index, 0)),
    signal,
  );
  const [alone, together] = [single[0], batched[0]];
  if (alone instanceof Float32Array && together instanceof Float32Array) {
    print("alone and in a batch of 8", `cosine ${dot(alone, together).toFixed(4)}`);
  }
  const idle = monitorEventLoopDelay({ resolution: 1 });
  idle.enable();
  await new Promise((resolve) => setTimeout(resolve, IDLE_MS));
  idle.disable();
  const delay = monitorEventLoopDelay({ resolution: 1 });
  const cpuBefore = process.cpuUsage();
  const beganAtMs = performance.now();
  delay.enable();
  for (const [tokens, texts] of [
    [9, 1],
    [25, 1],
    [Math.min(128, tokensMax), 1],
    [9, 8],
  ] as const) {
    const timesMs: number[] = [];
    let refused = "";
    for (let run = 0; run < runs; run++) {
      const batch = Array.from({ length: texts }, (_, index) =>
        textOf(tokens, run * texts + index),
      );
      const askedAtMs = performance.now();
      const [first] = await backend.embed(batch, signal);
      timesMs.push(performance.now() - askedAtMs);
      await new Promise((resolve) => setImmediate(resolve)); // Else the built-in one never lets the loop turn.
      if (typeof first === "string") refused = `  (refused: ${first})`;
    }
    timesMs.sort((a, b) => a - b);
    const at = (share: number): string =>
      (timesMs[Math.min(runs - 1, Math.floor(runs * share))] ?? 0).toFixed(2);
    const what = texts === 1 ? `${tokens} tokens` : `${texts} texts of ${tokens} tokens at once`;
    print(what, `p50 ${at(0.5)} ms, p99 ${at(0.99)} ms${refused}`);
  }
  delay.disable();
  const wallMs = performance.now() - beganAtMs;
  const { user, system } = process.cpuUsage(cpuBefore);
  print("delay of the main loop meanwhile", delayText(delay));
  print("the same, without embedding", delayText(idle));
  print("CPU of this process meanwhile", `${((user + system) / 10 / wallMs).toFixed(0)} %`);
  const budget = defaults.cache.semantic.embedder.timeoutMs;
  print("budget of a lookup", `${budget} ms (cache.semantic.embedder.timeoutMs)`);
}
