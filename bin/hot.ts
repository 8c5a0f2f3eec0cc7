/**
 * `headrace hot`: the questions that are asked most, from a recording with `record.prompts`, as a file for warm-up.
 *
 * The file goes to standard output or `--out`, progress and a summary to standard error. Ends with 0; 1 when no line of
 * the recording could be used; 2 for bad input.
 */
import { createHash } from "node:crypto";
import { createReadStream, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { Command } from "commander";
import { type HotCounts, type HotQuestion, HotQuestions } from "../transport/hot-questions.ts";
import { parseTraceRecord } from "../transport/trace-format.ts";
import { type EmbedderFlags, openFlagged, withEmbedderFlags } from "./embedder-flags.ts";
import { FlagError, numberOf } from "./flag-values.ts";

type Flags = EmbedderFlags & {
  log: string;
  top: string;
  similarity: string;
  tenant?: string;
  model?: string;
  out?: string;
};

const SHOW_EVERY = 1000;

export function hotCommand(): Command {
  const command = new Command("hot")
    .description("the questions asked most, from a recording, as a file for warm-up")
    .requiredOption("--log <file>", "what `serve` recorded with record.file and record.prompts")
    .option("--top <count>", "questions in the file", "200")
    .option("--similarity <cosine>", "wordings this much alike count as one question", "0.95")
    .option("--tenant <name>", "whose questions; needed when the recording holds several tenants'")
    .option("--model <name>", "only questions to that model")
    .option("--out <file>", "write it there");
  withEmbedderFlags(command, "lexical");
  // Commander ends with 1 for a flag that is missing or unknown: bad input, too.
  command.exitOverride(({ code, exitCode }) => {
    process.exit(code.startsWith("commander.") && exitCode === 1 ? 2 : exitCode);
  });
  return command.action((flags: Flags) => run(flags, command));
}

async function run(flags: Flags, command: Command): Promise<void> {
  const fail = (text: string, exitCode: number): never =>
    command.error(`headrace hot: ${text}`, { exitCode, code: "headrace.hot" });
  try {
    const count = wholeOf("--top", flags.top);
    const similarity = numberOf("--similarity", flags.similarity);
    if (!(similarity > 0 && similarity <= 1)) {
      throw new FlagError(`--similarity is ${similarity}; accepted: above 0, at most 1`);
    }
    const questions = await readLog(flags);
    if (questions.size === 0) return fail(whyNone(questions.counts), 1);
    if (questions.tenants.length > 1) {
      throw new FlagError(
        `${flags.log} holds questions of ${questions.tenants.length} tenants, and a warm-up fills the cache of one; ` +
          "name it with --tenant",
      );
    }
    const embedder = await openFlagged(flags);
    try {
      const top = await questions.top(count, similarity, embedder?.embed, showGroups);
      if (process.stderr.isTTY) process.stderr.write("\r\u001b[K");
      const file = fileOf(top, flags);
      if (flags.out === undefined) process.stdout.write(file);
      else writeText(flags.out, file);
      process.stderr.write(summaryOf(top, questions, embedder?.id ?? "off"));
    } finally {
      await embedder?.close();
    }
  } catch (error) {
    if (!(error instanceof FlagError)) throw error;
    return fail(error.message, 2);
  }
}

function wholeOf(flag: string, text: string): number {
  const value = numberOf(flag, text);
  if (Number.isInteger(value) && value >= 1) return value;
  throw new FlagError(`${flag} is ${text}; it must be a whole number from 1`);
}

async function readLog({ log, tenant, model }: Flags): Promise<HotQuestions> {
  const hash = tenant && createHash("sha256").update(tenant).digest("hex").slice(0, 16);
  const questions = new HotQuestions({
    ...(hash === undefined ? {} : { tenant: hash }),
    ...(model === undefined ? {} : { model }),
  });
  const input = createReadStream(log, "utf8");
  const lines = createInterface({ input, crlfDelay: Number.POSITIVE_INFINITY });
  let unreadable: Error | undefined;
  input.once("error", (error) => {
    unreadable = error;
    lines.close(); // Not every Node passes the error on to the loop, which would wait for ever.
  });
  let number = 0;
  try {
    for await (const line of lines) {
      number++;
      if (line.trim() === "") continue;
      const record = parseTraceRecord(line);
      if ("invalid" in record) throw new FlagError(`${log}, line ${number}: ${record.invalid}`);
      questions.add(record);
    }
  } catch (error) {
    if (error !== unreadable) throw error;
  }
  input.destroy();
  if (unreadable !== undefined) throw new FlagError(`${log}: ${unreadable.message}`);
  return questions;
}

/** As `--log` lines: a comment with its count before each request. */
function fileOf(top: readonly HotQuestion[], { log }: Flags): string {
  const lines = [
    `# Made by headrace hot from ${log.replaceAll("\n", " ")}: a file for warmup.file.`,
  ];
  for (const { prompt, asked, wordings } of top) {
    lines.push(`# asked ${asked} times, in ${wordings} ${wordings === 1 ? "wording" : "wordings"}`);
    lines.push(JSON.stringify(prompt));
  }
  return `${lines.join("\n")}\n`;
}

function summaryOf(top: readonly HotQuestion[], questions: HotQuestions, embedder: string): string {
  const { lines, counted, ...leftOut } = questions.counts;
  const covered = top.reduce((sum, { asked }) => sum + asked, 0);
  const share = counted === 0 ? 0 : (100 * covered) / counted;
  const others = Object.entries(leftOut).filter(([, count]) => count > 0);
  const out = others.map(([why, count]) => `${count} ${why}`).join(", ");
  return (
    `${counted} of ${lines} requests, ${questions.size} different (embedder: ${embedder}); ` +
    `${top.length} questions cover ${share.toFixed(1)} % of them` +
    `${out === "" ? "" : `; not counted: ${out}`}\n`
  );
}

function whyNone({ lines, textless, others }: Readonly<HotCounts>): string {
  if (lines === 0) return "the recording is empty";
  if (textless > 0) {
    return (
      `none of the ${lines} lines holds what was asked: record with record.prompts: true ` +
      "(it stores the text of questions in clear)"
    );
  }
  const whose = others > 0 ? `; ${others} are of other tenants or models` : "";
  return `none of the ${lines} lines is of a question that the cache may answer${whose}`;
}

function showGroups(done: number): void {
  if (process.stderr.isTTY && done % SHOW_EVERY < 8) process.stderr.write(`\r${done} questions`);
}

function writeText(file: string, text: string): void {
  try {
    writeFileSync(file, text, { mode: 0o600 }); // It holds what people asked.
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new FlagError(`--out ${file}: ${reason}`);
  }
}
