/** Flags about a recorded load, alike for every command that reads one: which part of it, and how it is scaled. */
import type { Command } from "commander";
import type { TraceOptions } from "../sim/trace.ts";
import { traceFormats } from "../sim/trace-rows.ts";
import type { LoadStatistics } from "../sim/trace-statistics.ts";
import { durationUs, FlagError, numberOf, quoted } from "./flag-values.ts";

export type TraceFlags = {
  format?: string;
  limit?: string;
  from?: string;
  to?: string;
  copies?: string;
  rawTimes?: boolean;
};

export const TRACE_DOC = "recorded load: a public trace, or the file of `serve --record`";

/** Adds them, but for `--trace` and `--speed`, which mean more to one command than to another. */
export function withTraceFlags(command: Command): Command {
  return command
    .option("--format <name>", `one of ${traceFormats.join(", ")} (else told from the file)`)
    .option("--limit <count>", "requests at most")
    .option("--from <time>", "skip what came earlier in the trace: 90, 90s, 15m, 2h, 1d")
    .option("--to <time>", "stop there in the trace's own time")
    .option("--copies <count>", "superpose so many copies, shifted against each other (more users)")
    .option("--raw-times", "leave Mooncake's rounded times as they are instead of spreading them");
}

/** Throws FlagError. */
export function traceOptions(flags: TraceFlags): TraceOptions {
  const limit = limitOf(flags);
  return {
    ...(flags.format !== undefined && { format: flags.format }),
    ...(flags.rawTimes === true && { spread: false }),
    ...(flags.from !== undefined && { fromUs: durationUs("--from", flags.from) }),
    ...(flags.to !== undefined && { toUs: durationUs("--to", flags.to) }),
    ...(flags.copies !== undefined && { copies: numberOf("--copies", flags.copies) }),
    ...(limit !== undefined && { limit }),
  };
}

/** Throws FlagError. */
export function limitOf({ limit }: TraceFlags): number | undefined {
  if (limit === undefined) return undefined;
  const count = numberOf("--limit", limit);
  if (Number.isInteger(count) && count >= 1) return count;
  throw new FlagError(`--limit is ${limit}; it must be a whole number, 1 or more`);
}

/** As words of a command line that repeats a run. */
export function traceWords(flags: TraceFlags): string[] {
  const valued = [
    ["--format", flags.format],
    ["--limit", flags.limit],
    ["--from", flags.from],
    ["--to", flags.to],
    ["--copies", flags.copies],
  ] as const;
  return [
    ...valued.flatMap(([flag, value]) => (value === undefined ? [] : [flag, quoted(value)])),
    ...(flags.rawTimes === true ? ["--raw-times"] : []),
  ];
}

/** What is about to be played, in one line. */
export function loadLine(name: string, format: string, load: LoadStatistics): string {
  const { cv, durationUs: spanUs, inputTokens, outputTokens, ratePerSecond = 0, requests } = load;
  const burstiness = cv === undefined ? "" : `, CV ${cv.toFixed(2)}`;
  return (
    `${name} (${format}): ${requests} requests over ${(spanUs / 1e6).toFixed(1)} s, ` +
    `${ratePerSecond.toFixed(2)}/s${burstiness}; tokens in ${Math.round(inputTokens.mean)}, out ` +
    `${Math.round(outputTokens.mean)} (means)`
  );
}
