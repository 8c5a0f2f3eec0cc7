/** Values of flags that several commands read: numbers, times, the gateway's options, and how to write a flag back. */
import { writeFileSync } from "node:fs";
import type { Command } from "commander";
import { ConfigError, type FlagSetting, loadConfig } from "../transport/config.ts";
import type { Options, OptionsInput } from "../transport/options.ts";

/** A flag whose value cannot be used; the message names it and says what is accepted. */
export class FlagError extends Error {
  override readonly name = "FlagError";
}

export function numberOf(flag: string, text: string): number {
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

export function durationUs(flag: string, text: string): number {
  const [, digits, unit = ""] = /^(\d+(?:\.\d+)?)([smhd]?)$/.exec(text.trim()) ?? [];
  const unitUs = unitsUs[unit];
  if (digits !== undefined && unitUs !== undefined) return Math.round(Number(digits) * unitUs);
  throw new FlagError(
    `${flag} is ${JSON.stringify(text)}; it must be a time like 90, 90s, 15m, 2h or 1d`,
  );
}

/** For a flag that may be repeated. */
export function collect(value: string, before: readonly string[]): string[] {
  return [...before, value];
}

/** A flag that is missing or unknown is bad input, too: the process ends with 2, where commander says 1. */
export function endWithTwo(command: Command): Command {
  return command.exitOverride(({ code, exitCode }) => {
    process.exit(code.startsWith("commander.") && exitCode === 1 ? 2 : exitCode);
  });
}

/** Writes what a flag asks for to its file. Throws FlagError. */
export function writeFlagFile(flag: string, file: string, text: string): void {
  try {
    writeFileSync(file, text);
  } catch (error) {
    throw new FlagError(`${flag} ${file}: ${fileProblem(error)}`);
  }
}

/** Why a file could not be read or written, in words. */
export function fileProblem(error: unknown): string {
  const code = error instanceof Error && "code" in error ? String(error.code) : "";
  if (code === "ENOENT") return "no such file or folder";
  if (code === "EISDIR") return "is a folder, not a file";
  if (code === "EACCES") return "access denied";
  return error instanceof Error ? error.message : String(error);
}

/** For a POSIX shell. */
export function quoted(text: string): string {
  return /^[\w./:,@%+=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** Groups that decide how a gateway behaves; its addresses, secrets and logs have no part in a simulation. */
const groups = [
  "keys",
  "defaultLimits",
  "router",
  "queue",
  "retry",
  "circuit",
  "concurrency",
  "timeouts",
  "scrape",
  "health",
] as const satisfies readonly (keyof Options)[];

/** The options that a simulation's gateways get, and which of them differ from the defaults. */
export type SimulatedOptions = { options: OptionsInput; text: string; hasStore: boolean };

/**
 * Reads a gateway's configuration for a simulation; its nodes are not used, and may be missing. `pairs` are
 * `path=value` texts, laid over the file. Throws FlagError.
 */
export async function simulatedOptions(
  file: string | undefined,
  pairs: readonly string[],
): Promise<SimulatedOptions> {
  const flags: FlagSetting[] = pairs.map((pair) => {
    const end = pair.indexOf("=");
    if (end < 1) throw new FlagError(`--set ${pair} is not path=value, like queue.poolMax=500`);
    const path = pair.slice(0, end);
    return { flag: `--set ${path}`, path, value: pair.slice(end + 1) };
  });
  // Stands for the simulation's own, so that a configuration without nodes is one.
  flags.push({ flag: "--nodes", path: "nodes", value: [{ url: "http://simulated:8000" }] });
  try {
    const { options, sources } = await loadConfig({
      flags,
      env: {},
      ...(file !== undefined && { file }),
    });
    const { enabled, ttlMs, bytesMax, answerBytesMax, storeTimeoutMs, redis } = options.cache;
    const kept: Record<string, unknown> = {
      cache: { enabled, ttlMs, bytesMax, answerBytesMax, storeTimeoutMs },
    };
    for (const group of groups) kept[group] = options[group];
    // Keys were hashed and named when they were read: that is how they are given on.
    const paths = Object.keys(sources).filter((path) =>
      [...groups, "cache"].some((group) => path.split(/[.[]/)[0] === group),
    );
    const fromFile = paths.filter((path) => !pairs.some((pair) => pair.startsWith(`${path}=`)));
    const stated = [...(fromFile.length > 0 ? [`${file}: ${fromFile.join(", ")}`] : []), ...pairs];
    const text = stated.length === 0 ? "defaults" : stated.join("; ");
    return { options: kept as OptionsInput, text, hasStore: redis !== undefined };
  } catch (error) {
    if (error instanceof ConfigError) throw new FlagError(error.message);
    throw error;
  }
}
