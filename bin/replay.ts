/**
 * `headrace replay`: sends a recorded load to a server in real time and prints what a client saw.
 *
 * The trace is read once before anything is sent, so that a bad row fails at once, with exit code 2, and not an hour
 * into the load. Ends with 0; 1 when the target is not there or no request succeeded; 2 for bad input; 130 when
 * stopped by ^C, after printing what was measured until then.
 */
import { writeFileSync } from "node:fs";
import cliProgress from "cli-progress";
import { Command, Option } from "commander";
import { openTrace, type Trace, TraceError, type TraceOptions } from "../sim/trace.ts";
import { traceFormats } from "../sim/trace-rows.ts";
import { type LoadStatistics, summarizeLoad } from "../sim/trace-statistics.ts";
import { ReplayError, type ReplayProgress, replay } from "../transport/replay.ts";
import { formatReplayReport, type ReplayReport } from "../transport/replay-report.ts";

type Flags = {
  trace: string;
  target: string;
  format?: string;
  speed: string;
  limit?: string;
  from?: string;
  to?: string;
  copies?: string;
  rawTimes?: boolean;
  model?: string;
  apiKey?: string;
  salt?: string;
  inflightMax?: string;
  stream: boolean;
  json?: string;
};

export function replayCommand(): Command {
  const command = new Command("replay")
    .description("send a recorded load to a server in real time and measure its answers")
    .requiredOption(
      "--trace <file>",
      "recorded load: a public trace, or the file of `serve --record`",
    )
    .requiredOption("--target <url>", "server to send to, e.g. http://localhost:8080")
    .option("--format <name>", `one of ${traceFormats.join(", ")} (else told from the file)`)
    .option("--speed <factor>", "2 sends in half the time", "1")
    .option("--limit <count>", "requests at most")
    .option("--from <time>", "skip what came earlier in the trace: 90, 90s, 15m, 2h, 1d")
    .option("--to <time>", "stop there in the trace's own time")
    .option("--copies <count>", "superpose so many copies, shifted against each other (more users)")
    .option("--raw-times", "leave Mooncake's rounded times as they are instead of spreading them")
    .option("--model <name>", "model to ask for (else the recorded one, or the target's first)")
    .addOption(new Option("--api-key <key>", "API key of the target").env("REPLAY_API_KEY"))
    .option(
      "--salt <text>",
      "goes into every prompt: another salt meets no cache of an earlier run",
    )
    .option(
      "--inflight-max <count>",
      "requests open at once; more are not sent, and counted (default: 4096)",
    )
    .option("--no-stream", "ask for whole answers instead of streams")
    .option("--json <file>", "write the report there as well");
  // Commander ends with 1 for a flag that is missing or unknown: bad input, too.
  command.exitOverride(({ code, exitCode }) => {
    process.exit(code.startsWith("commander.") && exitCode === 1 ? 2 : exitCode);
  });
  return command.action((flags: Flags) => run(flags, command));
}

async function run(flags: Flags, command: Command): Promise<void> {
  const stop = new AbortController();
  const onInterrupt = () => {
    if (stop.signal.aborted) process.exit(130); // The second one: at once.
    stop.abort();
  };
  process.on("SIGINT", onInterrupt);
  try {
    const speed = numberOf("--speed", flags.speed);
    const limit = flags.limit === undefined ? undefined : numberOf("--limit", flags.limit);
    const trace = await openTrace(flags.trace, traceOptions(flags, limit));
    const load = await summarizeLoad(trace.requests());
    for (const warning of trace.warnings()) console.error(`warning: ${warning}`);
    console.error(describeLoad(trace, load, speed));
    const progress = process.stderr.isTTY ? new Bar(load.requests) : new Lines(load.requests);
    let report: ReplayReport;
    try {
      report = await replay({
        requests: trace.requests(),
        target: flags.target,
        speed,
        stream: flags.stream,
        ...(flags.model !== undefined && { model: flags.model }),
        ...(flags.apiKey !== undefined && { apiKey: flags.apiKey }),
        ...(flags.salt !== undefined && { salt: flags.salt }),
        ...(flags.inflightMax !== undefined && {
          inflightMax: numberOf("--inflight-max", flags.inflightMax),
        }),
        onProgress: (now) => progress.show(now),
        signal: stop.signal,
      });
    } finally {
      progress.end();
    }
    process.stdout.write(formatReplayReport(report));
    if (flags.json !== undefined) writeReport(flags.json, report);
    process.exitCode = report.stopped ? 130 : report.ok === 0 ? 1 : 0;
  } catch (error) {
    if (error instanceof TraceError || error instanceof FlagError) {
      command.error(`headrace replay: ${error.message}`, { exitCode: 2 });
    }
    if (error instanceof ReplayError) {
      const exitCode = error.isInput ? 2 : 1;
      command.error(`headrace replay: ${error.message}`, { exitCode, code: "headrace.replay" });
    }
    throw error;
  } finally {
    process.off("SIGINT", onInterrupt);
  }
}

/** A flag whose value cannot be used. */
class FlagError extends Error {
  override readonly name = "FlagError";
}

function traceOptions(flags: Flags, limit: number | undefined): TraceOptions {
  return {
    ...(flags.format !== undefined && { format: flags.format }),
    ...(flags.rawTimes === true && { spread: false }),
    ...(flags.from !== undefined && { fromUs: durationUs("--from", flags.from) }),
    ...(flags.to !== undefined && { toUs: durationUs("--to", flags.to) }),
    ...(flags.copies !== undefined && { copies: numberOf("--copies", flags.copies) }),
    ...(limit !== undefined && { limit }),
  };
}

function numberOf(flag: string, text: string): number {
  const value = text.trim() === "" ? Number.NaN : Number(text);
  if (Number.isFinite(value)) return value;
  throw new FlagError(`${flag} is ${JSON.stringify(text)}; it must be a number`);
}

const unitsUs: Readonly<Record<string, number>> = {
  "": 1e6,
  s: 1e6,
  m: 60e6,
  h: 3600e6,
  d: 86_400e6,
};

function durationUs(flag: string, text: string): number {
  const [, digits, unit = ""] = /^(\d+(?:\.\d+)?)([smhd]?)$/.exec(text.trim()) ?? [];
  const unitUs = unitsUs[unit];
  if (digits !== undefined && unitUs !== undefined) return Math.round(Number(digits) * unitUs);
  throw new FlagError(
    `${flag} is ${JSON.stringify(text)}; it must be a time like 90, 90s, 15m, 2h or 1d`,
  );
}

function describeLoad(trace: Trace, load: LoadStatistics, speed: number): string {
  const lasting = load.durationUs / 1e6;
  const rate = load.ratePerSecond ?? 0;
  const burstiness = load.cv === undefined ? "" : `, CV ${load.cv.toFixed(2)}`;
  const { inputTokens, outputTokens } = load;
  return (
    `${trace.file} (${trace.format}): ${load.requests} requests over ${lasting.toFixed(1)} s, ` +
    `${rate.toFixed(2)}/s${burstiness}; tokens in ${Math.round(inputTokens.mean)}, out ` +
    `${Math.round(outputTokens.mean)} (means)` +
    (speed === 1 ? "" : `; at speed ${speed} over ${(lasting / speed).toFixed(1)} s`)
  );
}

function writeReport(file: string, report: ReplayReport): void {
  try {
    writeFileSync(file, `${JSON.stringify(report, null, 2)}\n`);
  } catch (error) {
    throw new FlagError(
      `--json ${file}: ${error instanceof Error ? error.message : String(error)}`,
    );
  }
}

/** On a terminal: a bar. */
class Bar {
  readonly #bar: cliProgress.SingleBar;

  constructor(total: number) {
    this.#bar = new cliProgress.SingleBar({
      format:
        "{bar} {value}/{total} sent  ok {ok}  refused {refused}  failed {failed}  open {inflight}",
      hideCursor: true,
    });
    this.#bar.start(total, 0, { ok: 0, refused: 0, failed: 0, inflight: 0 });
  }

  show({ sent, ok, refused, failed, inflight }: ReplayProgress): void {
    this.#bar.update(sent, { ok, refused, failed, inflight });
  }

  end(): void {
    this.#bar.stop();
  }
}

const LINE_EVERY_MS = 5000;

/** Elsewhere: a line now and then. */
class Lines {
  readonly #total: number;
  #nextAtMs = LINE_EVERY_MS;

  constructor(total: number) {
    this.#total = total;
  }

  show({ elapsedMs, sent, ok, refused, failed, inflight }: ReplayProgress): void {
    if (elapsedMs < this.#nextAtMs) return;
    this.#nextAtMs = elapsedMs + LINE_EVERY_MS;
    console.error(
      `${Math.round(elapsedMs / 1000)} s: sent ${sent} of ${this.#total}, ok ${ok}, refused ${refused}, ` +
        `failed ${failed}, open ${inflight}`,
    );
  }

  end(): void {}
}
