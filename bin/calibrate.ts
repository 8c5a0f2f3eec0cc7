/**
 * `headrace calibrate`: a step law from the log of a real engine, and how far it is off.
 *
 * Prints the law and its errors, for the part of the log that was fitted and for the part that was not; `--out` writes
 * the law file that a simulation takes in place of the name of a shipped law. Ends with 0, or with 2 for bad input.
 */
import { readFileSync } from "node:fs";
import { Command } from "commander";
import { type Calibration, type CalibrationOptions, calibrate } from "../sim/calibrate.ts";
import { formatCalibration, formatErrors } from "../sim/calibration-report.ts";
import { formatLaw, LawError, loadLaw } from "../sim/law-file.ts";
import type { StepLaw } from "../sim/laws.ts";
import { errorTable, replayLog } from "../sim/log-replay.ts";
import { CalibrationError, parseRequestLog, type RequestLog } from "../sim/request-log.ts";
import { endWithTwo, FlagError, fileProblem, numberOf, writeFlagFile } from "./flag-values.ts";

type Flags = {
  log: string;
  node?: string;
  base?: string;
  check?: boolean;
  out?: string;
  name?: string;
  maxNumSeqs?: string;
  maxNumBatchedTokens?: string;
  kvBlocks?: string;
  split: string;
  seed: string;
  json?: boolean;
};

export function calibrateCommand(): Command {
  const command = endWithTwo(new Command("calibrate"))
    .description("fit a step law to the request log of a real engine, for sim and plan")
    .requiredOption(
      "--log <file>",
      "JSON lines with request_id, input_toks, output_toks, queued_ts, first_token_ts, last_token_ts, or the file of " +
        "`serve --record`",
    )
    .option("--node <name>", "of a recording of several nodes, the one to calibrate")
    .option("--base <law>", "shipped law or law file: fit its overhead per step only (else all)")
    .option("--check", "fit nothing: how far is --base off on this log?")
    .option("--out <file>", "write the law there")
    .option("--name <text>", "name of the law (default: <base>+log, or calibrated)")
    .option("--max-num-seqs <count>", "the engine's own (default: the base's, else from the log)")
    .option("--max-num-batched-tokens <count>", "the engine's own (default: as above)")
    .option("--kv-blocks <count>", "the engine's num_gpu_blocks, of 16 tokens (default: as above)")
    .option("--split <share>", "share of the requests to fit; the rest checks the law", "0.5")
    .option("--seed <text>", "of the search's random starts", "1")
    .option("--json", "print JSON instead of the table");
  return command.action((flags: Flags) => run(flags, command));
}

function run(flags: Flags, command: Command): void {
  try {
    const options = optionsOf(flags);
    const log = parseRequestLog(readText(flags.log), flags.log, flags.node);
    if (flags.check === true) return check(log, options.base, flags.json === true);
    const calibration = calibrate(log, options);
    if (process.stderr.isTTY) process.stderr.write("\r\u001b[K");
    if (flags.out !== undefined) writeFlagFile("--out", flags.out, formatLaw(calibration.law));
    process.stdout.write(
      flags.json === true ? jsonOf(calibration) : formatCalibration(calibration),
    );
  } catch (error) {
    const isInput =
      error instanceof CalibrationError || error instanceof LawError || error instanceof FlagError;
    if (!isInput) throw error;
    command.error(`headrace calibrate: ${error.message}`, { exitCode: 2 });
  }
}

function check({ requests }: RequestLog, law: StepLaw | undefined, isJson: boolean): void {
  if (law === undefined) throw new FlagError("--check needs --base: the law that is checked");
  const replay = replayLog(requests, law);
  const errors = errorTable(requests, replay, 0, requests.length);
  process.stdout.write(
    isJson
      ? `${JSON.stringify({ law: law.name, errors }, null, 2)}\n`
      : formatErrors(law.name, errors),
  );
}

function optionsOf(flags: Flags): CalibrationOptions {
  const { base, name, maxNumSeqs, maxNumBatchedTokens, kvBlocks } = flags;
  return {
    split: numberOf("--split", flags.split),
    seed: flags.seed,
    ...(base !== undefined && { base: loadLaw(base) }),
    ...(name !== undefined && { name }),
    ...(maxNumSeqs !== undefined && { sequencesMax: numberOf("--max-num-seqs", maxNumSeqs) }),
    ...(maxNumBatchedTokens !== undefined && {
      batchedTokensMax: numberOf("--max-num-batched-tokens", maxNumBatchedTokens),
    }),
    ...(kvBlocks !== undefined && { kvBlocks: numberOf("--kv-blocks", kvBlocks) }),
    ...(process.stderr.isTTY && { onProgress: showProgress }),
  };
}

const SHOW_EVERY = 50;

function showProgress(replays: number): void {
  if (replays % SHOW_EVERY === 0) process.stderr.write(`\r${replays} replays`);
}

function readText(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch (error) {
    throw new FlagError(`${file}: ${fileProblem(error)}`);
  }
}

function jsonOf(calibration: Calibration): string {
  const { law, holdOut, ...rest } = calibration;
  const plain = { law: JSON.parse(formatLaw(law)), ...rest, holdOut: holdOut ?? null };
  return `${JSON.stringify(plain, null, 2)}\n`;
}
