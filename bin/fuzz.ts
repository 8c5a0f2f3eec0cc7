/**
 * `headrace fuzz`: plays made-up clusters, loads and faults in virtual time until something breaks or time is up, and
 * says what it played. What breaks is reduced and written to a file that `--scenario` plays again.
 *
 * The summary goes to standard output, progress and findings to standard error. Ends with 0; 1 when an invariant broke
 * or a canary was not caught; 2 for bad input. ^C ends the campaign early, with its summary, and 130.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Command } from "commander";
import { type CanaryName, canaries, canaryNames } from "../sim/canaries.ts";
import { type Invariant, invariants, type Violation } from "../sim/checkers.ts";
import { FaultError } from "../sim/faults.ts";
import { Campaign, catchCanary, reduceScenario, runScenario } from "../sim/fuzz.ts";
import {
  drawScenario,
  formatScenario,
  type Profile,
  parseScenario,
  type Scenario,
  ScenarioError,
} from "../sim/scenario.ts";
import { FlagError, numberOf, quoted } from "./flag-values.ts";

/** As commander reads them. */
export type FuzzFlags = {
  minutes?: string;
  runs?: string;
  seed?: string;
  scenario?: string;
  canary?: string;
  profile: string;
  reduceRuns: string;
  out: string;
  json?: string;
};

const RUNS = 200;
/** More failing seeds than this are counted, not reduced. */
const REDUCED_MAX = 5;
/** Every so many seeds one is played twice: it must come to the same. */
const TWICE_EVERY = 25;
const LINE_EVERY_MS = 5000;
/** Seeds in which a planted bug must be caught. */
const CANARY_SEEDS_MAX = 30;
/** Faults that a reduced canary may need. */
const CANARY_FAULTS_MAX = 5;

export function fuzzCommand(): Command {
  const command = new Command("fuzz")
    .description("break made-up clusters with faults in virtual time, and check what must hold")
    .option("--minutes <count>", "go on for so long")
    .option("--runs <count>", `play so many seeds (default: ${RUNS}, or 1 with --seed)`)
    .option(
      "--seed <number>",
      "the first seed; the same seed is the same run, bit for bit (default: 1)",
    )
    .option("--scenario <file>", "play that one, as this command wrote it")
    .option("--canary <name>", `plant a bug and see it caught: all, or ${canaryNames.join(", ")}`)
    .option("--profile <size>", "full, or small for a quick look", "full")
    .option("--reduce-runs <count>", "runs to reduce a failing scenario, at most", "400")
    .option("--out <folder>", "where reduced scenarios are written", ".")
    .option("--json <file>", "write the summary there as well");
  // Commander ends with 1 for a flag that is missing or unknown: bad input, too.
  command.exitOverride(({ code, exitCode }) => {
    process.exit(code.startsWith("commander.") && exitCode === 1 ? 2 : exitCode);
  });
  return command.action((flags: FuzzFlags) => run(flags, command));
}

async function run(flags: FuzzFlags, command: Command): Promise<void> {
  try {
    const plan = fuzzPlan(flags);
    if (plan.canaries.length > 0 && flags.scenario === undefined) return catchAll(plan);
    await campaign(plan);
  } catch (error) {
    const isInput = [FaultError, FlagError, ScenarioError].some((kind) => error instanceof kind);
    if (!isInput || !(error instanceof Error)) throw error;
    command.error(`headrace fuzz: ${error.message}`, { exitCode: 2, code: "headrace.fuzz" });
  }
}

// ---- flags --------------------------------------------------------------------------------------------

type Plan = {
  seed: number;
  /** Infinity where time is the bound. */
  runs: number;
  msMax: number;
  scenario: Scenario | undefined;
  /** The planted bugs; one at most beside a scenario. */
  canaries: readonly CanaryName[];
  profile: Profile;
  reduceRuns: number;
  out: string;
  json: string | undefined;
  scenarioFile: string | undefined;
};

/** What the flags ask for. Throws FlagError and ScenarioError. */
export function fuzzPlan(flags: FuzzFlags): Plan {
  const { minutes, runs, seed, scenario: file, profile, json } = flags;
  if (minutes !== undefined && runs !== undefined) {
    throw new FlagError("give --minutes or --runs, not both: either is the bound");
  }
  if (file !== undefined && (minutes ?? runs ?? seed) !== undefined) {
    throw new FlagError("--scenario is one run: --minutes, --runs and --seed do not go with it");
  }
  if (profile !== "full" && profile !== "small") {
    throw new FlagError(`--profile is ${JSON.stringify(profile)}; accepted: full, small`);
  }
  const names = canariesOf(flags.canary);
  if (file !== undefined && names.length > 1) {
    throw new FlagError("--scenario takes the bug of one canary, not of all");
  }
  const msMax =
    minutes === undefined
      ? Number.POSITIVE_INFINITY
      : 60_000 * boundedOf("--minutes", minutes, 0.001, 100_000);
  const runsDefault = seed === undefined && file === undefined ? RUNS : 1;
  const runsMax = minutes === undefined ? runsDefault : Number.POSITIVE_INFINITY;
  return {
    seed: seed === undefined ? 1 : wholeOf("--seed", seed, 0, 2 ** 52),
    runs: runs === undefined ? runsMax : wholeOf("--runs", runs, 1, 1e9),
    msMax,
    scenario: file === undefined ? undefined : parseScenario(readText(file)),
    canaries: names,
    profile,
    reduceRuns: wholeOf("--reduce-runs", flags.reduceRuns, 0, 1e6),
    out: flags.out,
    json,
    scenarioFile: file,
  };
}

function canariesOf(text: string | undefined): readonly CanaryName[] {
  if (text === undefined) return [];
  if (text === "all") return canaryNames;
  const name = canaryNames.find((each) => each === text);
  if (name !== undefined) return [name];
  throw new FlagError(
    `--canary is ${JSON.stringify(text)}; accepted: all, ${canaryNames.join(", ")}`,
  );
}

function boundedOf(flag: string, text: string, least: number, most: number): number {
  const value = numberOf(flag, text);
  if (value >= least && value <= most) return value;
  throw new FlagError(`${flag} is ${text}; it must be a number from ${least} to ${most}`);
}

function wholeOf(flag: string, text: string, least: number, most: number): number {
  const value = numberOf(flag, text);
  if (Number.isInteger(value) && value >= least && value <= most) return value;
  throw new FlagError(`${flag} is ${text}; it must be a whole number from ${least} to ${most}`);
}

function readText(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch (error) {
    throw new FlagError(`--scenario ${file}: ${problemOf(error)}`);
  }
}

function write(flag: string, file: string, text: string): void {
  try {
    writeFileSync(file, text);
  } catch (error) {
    throw new FlagError(`${flag} ${file}: ${problemOf(error)}`);
  }
}

function problemOf(error: unknown): string {
  const code = error instanceof Error && "code" in error ? String(error.code) : "";
  if (code === "ENOENT") return "no such file or folder";
  if (code === "EISDIR") return "is a folder, not a file";
  if (code === "EACCES") return "access denied";
  return error instanceof Error ? error.message : String(error);
}

// ---- a campaign ---------------------------------------------------------------------------------------

type Finding = {
  seed: string;
  invariant: Invariant;
  atMs: number;
  detail: string;
  replay: string;
  /** Absent: it was not reduced. */
  reduced?: { faults: readonly string[]; requests: number; file: string; runs: number };
};

async function campaign(plan: Plan): Promise<void> {
  const { msMax, runs, scenario, profile } = plan;
  const [canary] = plan.canaries;
  const startedMs = performance.now();
  const total = new Campaign();
  const findings: Finding[] = [];
  const unsteady: string[] = [];
  const progress = new Progress(startedMs);
  let isStopped = false;
  const onInterrupt = () => {
    isStopped = true;
  };
  process.on("SIGINT", onInterrupt);
  try {
    for (let n = 0; n < runs && !isStopped && performance.now() - startedMs < msMax; n++) {
      const played = scenario ?? drawScenario(plan.seed + n, profile);
      const result = runScenario(played, canary);
      total.add(result);
      if ((n + 1) % TWICE_EVERY === 0 || scenario !== undefined) {
        const { hash } = runScenario(played, canary);
        if (hash !== result.hash) unsteady.push(played.seed);
      }
      for (const violation of result.violations) {
        findings.push(foundOf(played, violation, plan, findings.length < REDUCED_MAX));
      }
      progress.show(total);
      await new Promise((resolve) => setImmediate(resolve)); // ^C is heard.
    }
  } finally {
    process.off("SIGINT", onInterrupt);
    progress.end();
  }
  const seconds = (performance.now() - startedMs) / 1000;
  process.stdout.write(formatCampaign(total, findings, unsteady, seconds));
  if (plan.json !== undefined) {
    write("--json", plan.json, jsonOf(total, findings, unsteady, seconds));
  }
  process.exitCode = findings.length > 0 || unsteady.length > 0 ? 1 : isStopped ? 130 : 0;
}

/** Says what broke, reduces it, and writes that down. */
function foundOf(
  scenario: Scenario,
  violation: Violation,
  plan: Plan,
  isReduced: boolean,
): Finding {
  const { invariant, atMs, detail } = violation;
  const { seed } = scenario;
  const [canary] = plan.canaries;
  const profile = plan.profile === "full" ? [] : ["--profile", plan.profile];
  const what =
    plan.scenarioFile === undefined ? ["--seed", seed] : ["--scenario", plan.scenarioFile];
  const replay = commandOf([...what, ...profile], canary);
  const finding: Finding = { seed, invariant, atMs, detail, replay };
  clearLine();
  console.error(`seed ${seed}: ${invariants[invariant]}`);
  console.error(`  broken at ${(atMs / 1000).toFixed(3)} s: ${detail}`);
  console.error(`  replay: ${replay}`);
  if (!isReduced || plan.reduceRuns === 0) return finding;
  const reduction = reduceScenario(scenario, invariant, plan.reduceRuns, canary, (runs, least) =>
    showReducing(runs, least),
  );
  clearLine();
  if (reduction === undefined) return finding;
  const { scenario: least, violation: left, runs } = reduction;
  const file = kept(plan, `${seed}-${invariant}`, least);
  const { faults, requests } = least;
  console.error(
    `  reduced in ${runs} runs to ${faults.length} faults and ${requests.length} requests: ${left.detail}`,
  );
  console.error(`  faults: ${faults.length === 0 ? "none" : faults.join("; ")}`);
  console.error(`  replay: ${commandOf(["--scenario", file], canary)}`);
  return { ...finding, reduced: { faults, requests: requests.length, file, runs } };
}

function commandOf(what: readonly string[], canary: CanaryName | undefined): string {
  const planted = canary === undefined ? [] : ["--canary", canary];
  return ["headrace", "fuzz", ...what, ...planted].map(quoted).join(" ");
}

/** Writes a scenario to the folder of `--out`; returns its file. */
function kept({ out }: Plan, name: string, scenario: Scenario): string {
  const file = join(out, `fuzz-${name}.json`.replace(/[^\w.-]/g, "_"));
  write("--out", file, formatScenario(scenario));
  return file;
}

function showReducing(runs: number, { faults, requests }: Scenario): void {
  if (!process.stderr.isTTY) return;
  clearLine();
  process.stderr.write(
    `  reducing: run ${runs}, ${faults.length} faults, ${requests.length} requests`,
  );
}

function clearLine(): void {
  if (process.stderr.isTTY) process.stderr.write("\r\u001b[K");
}

class Progress {
  readonly #startedMs: number;
  #shownAtMs: number;

  constructor(startedMs: number) {
    this.#startedMs = startedMs;
    this.#shownAtMs = startedMs;
  }

  show(total: Campaign): void {
    const nowMs = performance.now();
    const { isTTY } = process.stderr;
    if (nowMs - this.#shownAtMs < (isTTY ? 200 : LINE_EVERY_MS)) return;
    this.#shownAtMs = nowMs;
    const line =
      `${total.seeds} seeds, ${total.faultsTotal} faults, ${hours(total)} h simulated, ` +
      `${((total.seeds * 1000) / (nowMs - this.#startedMs)).toFixed(1)} seeds/s, ` +
      `${total.violations} with violations`;
    if (!isTTY) return console.error(line);
    clearLine();
    process.stderr.write(line);
  }

  end(): void {
    clearLine();
  }
}

function hours({ simulatedMs }: Campaign): string {
  return (simulatedMs / 3_600_000).toFixed(1);
}

function formatCampaign(
  total: Campaign,
  findings: readonly Finding[],
  unsteady: readonly string[],
  seconds: number,
): string {
  const table = (rows: readonly (readonly [string, string])[]) => {
    const width = Math.max(...rows.map(([name]) => name.length));
    return rows.map(([name, figure]) => `  ${name.padEnd(width)}  ${figure}\n`).join("");
  };
  const whole = (figure: number) => figure.toLocaleString("en-US");
  const sorted = (counts: ReadonlyMap<string, number>) =>
    [...counts].sort(([a], [b]) => (a < b ? -1 : 1)).map(([k, n]) => [k, whole(n)] as const);
  const broken = new Map<string, number>();
  for (const { invariant } of findings) broken.set(invariant, (broken.get(invariant) ?? 0) + 1);
  const checked = (Object.keys(invariants) as Invariant[]).map(
    (name) => [invariants[name], broken.has(name) ? `BROKEN ${broken.get(name)}` : "held"] as const,
  );
  const parts = [
    table([
      ["seeds run", `${whole(total.seeds)} (${(total.seeds / seconds).toFixed(1)}/s)`],
      ["faults injected", whole(total.faultsTotal)],
      ["simulated hours", hours(total)],
      ["requests", whole(total.requests)],
      ["messages", whole(total.messages)],
      ["seeds with violations", whole(total.violations)],
      ["runs that differed when repeated", whole(unsteady.length)],
    ]),
    `\nfaults by kind\n${total.faults.size === 0 ? "  none\n" : table(sorted(total.faults))}`,
    `\nwhat happened\n${table([...total.coverage].map(([k, n]) => [k, whole(n)] as const))}`,
    `\ninvariants\n${table(checked)}`,
  ];
  if (findings.length > 0) {
    const lines = findings.map(({ invariant, replay, reduced }) => {
      const least = reduced === undefined ? "" : `, reduced: ${reduced.file}`;
      return `  ${invariant}: ${replay}${least}\n`;
    });
    parts.push(`\nto play again\n${lines.join("")}`);
  }
  return parts.join("");
}

function jsonOf(
  total: Campaign,
  findings: readonly Finding[],
  unsteady: readonly string[],
  seconds: number,
): string {
  const summary = {
    seeds: total.seeds,
    seconds,
    simulatedHours: total.simulatedMs / 3_600_000,
    requests: total.requests,
    messages: total.messages,
    faults: Object.fromEntries(total.faults),
    coverage: Object.fromEntries(total.coverage),
    seedsWithViolations: total.violations,
    unsteady,
    findings,
    nodeVersion: process.version,
  };
  return `${JSON.stringify(summary, null, 2)}\n`;
}

// ---- canaries -----------------------------------------------------------------------------------------

/** Every planted bug must be caught within so many seeds, and by few faults. */
function catchAll(plan: Plan): void {
  const caught = plan.canaries.map((name) => {
    const bounds = {
      seed: plan.seed,
      seedsMax: CANARY_SEEDS_MAX,
      runsMax: plan.reduceRuns,
      profile: plan.profile,
    };
    const found = catchCanary(name, bounds);
    const { breaks, bug } = canaries[name];
    const faults = found?.scenario.faults ?? [];
    const isFine = found !== undefined && faults.length <= CANARY_FAULTS_MAX;
    const says =
      found === undefined
        ? `NOT CAUGHT in ${CANARY_SEEDS_MAX} seeds`
        : `seed ${found.seed}, reduced to ${faults.length} faults, ${found.scenario.requests.length} requests` +
          (faults.length === 0 ? "" : `: ${faults.join("; ")}`);
    process.stdout.write(`${isFine ? "caught" : "FAILED"}  ${name} (${breaks})\n`);
    process.stdout.write(`        bug: ${bug}\n        ${says}\n`);
    if (found !== undefined) {
      const file = kept(plan, name, found.scenario);
      process.stdout.write(`        seen: ${found.violation.detail}\n`);
      process.stdout.write(`        replay: ${commandOf(["--scenario", file], name)}\n`);
    }
    return {
      name,
      breaks,
      isFine,
      seed: found?.seed ?? null,
      faults,
      detail: found?.violation.detail,
    };
  });
  const fine = caught.filter(({ isFine }) => isFine).length;
  process.stdout.write(`${fine} of ${caught.length} planted bugs caught\n`);
  if (plan.json !== undefined) write("--json", plan.json, `${JSON.stringify(caught, null, 2)}\n`);
  process.exitCode = fine === caught.length ? 0 : 1;
}
