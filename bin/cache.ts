/**
 * `headrace cache eval`: how often a semantic cache would answer, and how often wrongly, measured on labelled pairs.
 *
 * The first line of standard output is the threshold to set. Ends with 0 when one is as precise as wanted, 1 when none
 * is, 2 for bad input, 130 when stopped by ^C.
 */
import { createHash } from "node:crypto";
import { createReadStream, writeFileSync } from "node:fs";
import cliProgress from "cli-progress";
import { Command } from "commander";
import { type EvalEmbedder, type EvalResult, evaluateCache } from "../sim/cache-eval.ts";
import { type EvalReport, evalPage, formatEval } from "../sim/cache-eval-report.ts";
import { type LabelledPair, PairError, PairReader } from "../sim/labelled-pairs.ts";
import { openBackend } from "../transport/embedder.ts";
import { type EmbedderBackend, EmbedderError, selfTest } from "../transport/embedder-backend.ts";
import { parseOptions } from "../transport/options.ts";
import { inspectCommand } from "./cache-inspect.ts";
import { FlagError, numberOf, quoted } from "./flag-values.ts";

type Flags = {
  pairs: string[];
  embedder: string[];
  dimension?: string;
  model?: string;
  key?: string;
  threshold: string;
  thresholdMin: string;
  precision: string;
  verified?: string;
  shadow?: string | true;
  labelsOnly?: boolean;
  seed: string;
  limit?: string;
  json?: string;
  html?: string;
};

/** Held in memory with their vectors: some 3 KB each at 384 dimensions. */
const PAIRS_MAX = 100_000;
const DEFAULT_SHADOW = 0.2;

export function cacheCommand(): Command {
  return new Command("cache")
    .description("the semantic cache: what it holds, what it would answer, and how often wrongly")
    .addCommand(evalCommand())
    .addCommand(inspectCommand());
}

function evalCommand(): Command {
  const command = new Command("eval")
    .description("hit rate and precision by threshold, on pairs labelled same or different")
    .requiredOption(
      "--pairs <files...>",
      "text, text and label (0 or 1) by tabs, or .json / .jsonl of text_a, text_b, label",
    )
    .option(
      "--embedder <kind...>",
      "lexical (built in: words, not meaning), http URL, or transformers PATH",
      ["lexical"],
    )
    .option("--model <name>", "of an http endpoint, or in a folder of models")
    .option("--key <key>", "sent to an http endpoint as bearer token")
    .option("--dimension <count>", "that vectors must have; of the lexical embedder 384 by default")
    .option("--precision <share>", "wanted share of right hits", "0.95")
    .option("--threshold <cosine>", "where guards are taken apart and replays serve", "0.92")
    .option("--threshold-min <cosine>", "least threshold measured", "0.85")
    .option("--verified <rates>", "replay verified mode for these error rates, e.g. 0.01,0.02,0.05")
    .option(
      "--shadow [share]",
      `a shadow period that sees this share of questions (${DEFAULT_SHADOW})`,
    )
    .option(
      "--labels-only",
      "do not take texts for the same that differ in case and punctuation only",
    )
    .option("--seed <number>", "of the replay and of the shadow period", "1")
    .option("--limit <count>", `pairs at most (never more than ${PAIRS_MAX})`)
    .option("--json <file>", "write the report there as well")
    .option("--html <file>", "write the report there as one page with plots");
  // Commander ends with 1 for a flag that is missing or unknown: bad input, too.
  command.exitOverride(({ code, exitCode }) => {
    process.exit(code.startsWith("commander.") && exitCode === 1 ? 2 : exitCode);
  });
  return command.action((flags: Flags) => run(flags, command));
}

async function run(flags: Flags, command: Command): Promise<void> {
  const progress = new Progress();
  const onInterrupt = () => process.exit(130);
  process.on("SIGINT", onInterrupt);
  let backend: EmbedderBackend | undefined;
  try {
    const options = optionsOf(flags);
    const { pairs, files } = await readPairs(flags);
    backend = await backendOf(flags);
    const embedder = await opened(backend, flags);
    const result = await evaluateCache(pairs, embedder, options, (...step) =>
      progress.show(...step),
    );
    progress.end();
    const report = reportOf(result, files, flags, command);
    process.stdout.write(formatEval(report)); // First: a full disk must not lose it.
    if (flags.json !== undefined)
      write("--json", flags.json, `${JSON.stringify(report, null, 2)}\n`);
    if (flags.html !== undefined) write("--html", flags.html, evalPage(report));
    process.exitCode = result.wanted.guarded === undefined ? 1 : 0;
  } catch (error) {
    progress.end();
    if (
      !(error instanceof FlagError || error instanceof PairError || error instanceof EmbedderError)
    )
      throw error;
    return command.error(`headrace cache eval: ${error.message}`, {
      exitCode: 2,
      code: "headrace.cache",
    });
  } finally {
    await backend?.close();
    process.off("SIGINT", onInterrupt);
  }
}

// ---- flags ------------------------------------------------------------------------------------------------------

/** A batch of 8 texts of 128 tokens takes some 0.3 s; an endpoint far away may take its time. */
const BATCH_MS_MAX = 30_000;

async function backendOf(flags: Flags): Promise<EmbedderBackend> {
  const { embedder, dimension, model, key } = flags;
  const [type = "", place, ...rest] = embedder;
  const isPlaced = type === "http" || type === "transformers";
  if (!(isPlaced || type === "lexical") || isPlaced !== (place !== undefined) || rest.length > 0) {
    throw new FlagError(
      `--embedder is ${embedder.join(" ")}; accepted: lexical, http URL, transformers PATH`,
    );
  }
  const nodes = [{ url: "http://127.0.0.1:1" }]; // Not asked; without one no options are complete.
  const parsed = parseOptions({
    nodes,
    cache: {
      semantic: {
        embedder: {
          type,
          ...(type === "http" ? { url: place } : type === "transformers" ? { path: place } : {}),
          ...(model !== undefined && { model }),
          ...(key !== undefined && { key }),
          ...(dimension !== undefined && { dimension: numberOf("--dimension", dimension) }),
        },
      },
    },
  });
  if (!parsed.ok) {
    const problems = parsed.problems.map(
      ({ path, message }) => `--${path.split(".").at(-1)}: ${message}`,
    );
    throw new FlagError(problems.join("\n"));
  }
  const backend = await openBackend(parsed.options.cache.semantic.embedder);
  if (backend === undefined) throw new FlagError("--embedder is off: there is nothing to measure");
  return backend;
}

/** The embedder as the benchmark asks it; says so where the gateway would refuse it. */
async function opened(backend: EmbedderBackend, { dimension }: Flags): Promise<EvalEmbedder> {
  const { id, version } = await backend.open();
  const embed: EvalEmbedder["embed"] = (texts) =>
    backend.embed(texts, AbortSignal.timeout(BATCH_MS_MAX));
  const wanted = dimension === undefined ? undefined : numberOf("--dimension", dimension);
  const { problem } = await selfTest(
    (texts) => backend.embed(texts, AbortSignal.timeout(BATCH_MS_MAX)),
    wanted,
  );
  if (problem !== undefined) {
    console.error(`warning: the gateway would refuse this embedder: ${problem}`);
  }
  return { id: `${id}, version ${version}`, embed };
}

function optionsOf(flags: Flags) {
  const threshold = shareOf("--threshold", flags.threshold);
  const thresholdMin = shareOf("--threshold-min", flags.thresholdMin);
  if (threshold < thresholdMin) {
    throw new FlagError(`--threshold ${threshold} is below --threshold-min ${thresholdMin}`);
  }
  const { shadow } = flags;
  return {
    threshold,
    thresholdMin,
    precision: shareOf("--precision", flags.precision),
    errorRatesMax: (flags.verified?.split(",") ?? []).map((rate) => shareOf("--verified", rate)),
    shadowShare:
      shadow === undefined
        ? undefined
        : shadow === true
          ? DEFAULT_SHADOW
          : shareOf("--shadow", shadow),
    isLabelsOnly: flags.labelsOnly === true,
    seed: numberOf("--seed", flags.seed),
  };
}

function shareOf(flag: string, text: string): number {
  const value = numberOf(flag, text);
  if (value > 0 && value < 1) return value;
  throw new FlagError(`${flag} is ${text}; it must be a number between 0 and 1`);
}

type PairFile = EvalReport["files"][number];

async function readPairs({
  pairs: names,
  limit,
}: Flags): Promise<{ pairs: LabelledPair[]; files: PairFile[] }> {
  const most = limit === undefined ? PAIRS_MAX : numberOf("--limit", limit);
  if (!Number.isInteger(most) || most < 1 || most > PAIRS_MAX) {
    throw new FlagError(`--limit is ${limit}; it must be a whole number from 1 to ${PAIRS_MAX}`);
  }
  const pairs: LabelledPair[] = [];
  const files: PairFile[] = [];
  for (const name of names) {
    const reader = new PairReader(name);
    const hash = createHash("sha256");
    const decoder = new TextDecoder("utf-8", { fatal: true });
    try {
      for await (const chunk of createReadStream(name)) {
        hash.update(chunk);
        reader.push(decoder.decode(chunk, { stream: true }));
        if (pairs.length + reader.size > PAIRS_MAX && limit === undefined) {
          throw new FlagError(
            `${name}: more than ${PAIRS_MAX} pairs in all; choose the first with --limit`,
          );
        }
      }
      reader.push(decoder.decode());
    } catch (error) {
      if (error instanceof TypeError) throw new FlagError(`${name} is not UTF-8 text`);
      if (error instanceof Error && "code" in error && "syscall" in error) {
        throw new FlagError(`--pairs ${name}: ${error.message}`);
      }
      throw error;
    }
    const read = reader.end().slice(0, most - pairs.length);
    pairs.push(...read);
    files.push({ name, pairs: read.length, sha256: hash.digest("hex") });
  }
  return { pairs, files };
}

function reportOf(
  result: EvalResult,
  files: readonly PairFile[],
  flags: Flags,
  command: Command,
): EvalReport {
  const valued: [string, string | undefined][] = [
    ["--model", flags.model],
    ["--dimension", flags.dimension],
    ["--precision", flags.precision],
    ["--threshold", flags.threshold],
    ["--threshold-min", flags.thresholdMin],
    ["--verified", flags.verified],
    ["--shadow", flags.shadow === true ? String(DEFAULT_SHADOW) : flags.shadow],
    ["--seed", flags.seed],
    ["--limit", flags.limit],
  ];
  const words = [
    "headrace cache eval --pairs",
    ...flags.pairs.map(quoted),
    "--embedder",
    ...flags.embedder.map(quoted),
    ...valued.flatMap(([flag, value]) => (value === undefined ? [] : [flag, quoted(value)])),
    ...(flags.labelsOnly === true ? ["--labels-only"] : []),
  ];
  return {
    kind: "cache_eval",
    files,
    result,
    command: words.join(" "),
    version: command.parent?.parent?.version() ?? "",
    nodeVersion: process.version,
  };
}

function write(flag: string, file: string, text: string): void {
  try {
    writeFileSync(file, text);
  } catch (error) {
    throw new FlagError(
      `${flag} ${file}: ${error instanceof Error ? error.message : String(error)}`,
    );
  }
}

// ---- progress ---------------------------------------------------------------------------------------------------

const LINE_EVERY_MS = 5000;

/** A bar on a terminal, else a line every few seconds. */
class Progress {
  readonly #bar: cliProgress.SingleBar | undefined;
  #lineAtMs = performance.now();

  constructor() {
    if (!process.stderr.isTTY) return;
    this.#bar = new cliProgress.SingleBar({
      format: "{bar} {value} of {total}  {phase}",
      clearOnComplete: true,
    });
    this.#bar.start(1, 0, { phase: "reading" });
  }

  show(phase: string, done: number, total: number): void {
    if (this.#bar !== undefined) {
      this.#bar.setTotal(Math.max(1, total));
      this.#bar.update(done, { phase });
      return;
    }
    const nowMs = performance.now();
    if (nowMs - this.#lineAtMs < LINE_EVERY_MS) return;
    this.#lineAtMs = nowMs;
    console.error(`${phase}: ${done} of ${total}`);
  }

  end(): void {
    this.#bar?.stop();
  }
}
