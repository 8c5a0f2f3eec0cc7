/**
 * `headrace replay`: sends a recorded load to a server in real time and prints what a client saw.
 *
 * The trace is read once before anything is sent, so that a bad row fails at once, with exit code 2, and not an hour
 * into the load. Ends with 0; 1 when the target is not there or no request succeeded; 2 for bad input; 130 when
 * stopped by ^C, after printing what was measured until then.
 */
import cliProgress from "cli-progress";
import { Command, Option } from "commander";
import { openTrace, TraceError } from "../sim/trace.ts";
import { summarizeLoad } from "../sim/trace-statistics.ts";
import { ReplayError, type ReplayProgress, replay } from "../transport/replay.ts";
import { formatReplayReport, type ReplayReport } from "../transport/replay-report.ts";
import { endWithTwo, FlagError, numberOf, writeFlagFile } from "./flag-values.ts";
import {
  loadLine,
  TRACE_DOC,
  type TraceFlags,
  traceOptions,
  withTraceFlags,
} from "./trace-flags.ts";

type Flags = TraceFlags & {
  trace: string;
  target: string;
  speed: string;
  model?: string;
  apiKey?: string;
  salt?: string;
  inflightMax?: string;
  stream: boolean;
  json?: string;
};

export function replayCommand(): Command {
  const command = endWithTwo(new Command("replay"))
    .description("send a recorded load to a server in real time and measure its answers")
    .requiredOption("--trace <file>", TRACE_DOC)
    .requiredOption("--target <url>", "server to send to, e.g. http://localhost:8080")
    .option("--speed <factor>", "2 sends in half the time", "1");
  withTraceFlags(command)
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
    const trace = await openTrace(flags.trace, traceOptions(flags));
    const load = await summarizeLoad(trace.requests());
    for (const warning of trace.warnings()) console.error(`warning: ${warning}`);
    const lasting = `at speed ${speed} over ${(load.durationUs / 1e6 / speed).toFixed(1)} s`;
    const line = loadLine(trace.file, trace.format, load);
    console.error(speed === 1 ? line : `${line}; ${lasting}`);
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
    if (flags.json !== undefined) {
      writeFlagFile("--json", flags.json, `${JSON.stringify(report, null, 2)}\n`);
    }
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
