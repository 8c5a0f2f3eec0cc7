/**
 * `headrace plan`: how many nodes a recorded load needs under an SLO, found by simulation.
 *
 * The first line of standard output is the answer. Ends with 0 when there is one; 1 when no size tried suffices or
 * the run cannot support an answer; 2 for bad input; 130 when stopped by ^C.
 */
import { createHash } from "node:crypto";
import { accessSync, constants, readFileSync, writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { dirname } from "node:path";
import cliProgress from "cli-progress";
import { Command } from "commander";
import { LawError, loadLaw } from "../sim/law-file.ts";
import { lawNames } from "../sim/laws.ts";
import { formatPlan, type PlanReport } from "../sim/plan-report.ts";
import { PlanWorkers } from "../sim/plan-worker.ts";
import { checkPlan, PlanError, type PlanSpec, type PricedLaw, plan } from "../sim/planner.ts";
import { reportPage } from "../sim/report-page.ts";
import { parseSlo, SloError, withUnansweredLimited } from "../sim/slo.ts";
import { openTrace, TraceError, type TraceOptions } from "../sim/trace.ts";
import { type TraceRequest, traceFormats } from "../sim/trace-rows.ts";
import { durationUs, FlagError, numberOf, quoted, simulatedOptions } from "./flag-values.ts";

type Flags = {
  trace: string;
  slo: string;
  format?: string;
  law: string;
  price?: string;
  nodesMax: string;
  seeds: string;
  seed: string;
  config?: string;
  set: string[];
  speed: string;
  limit?: string;
  from?: string;
  to?: string;
  copies?: string;
  rawTimes?: boolean;
  threads?: string;
  json?: string;
  html?: string;
};

const DEFAULT_SLO = "ttft p99 <= 2s, e2e p99 <= 60s, failed <= 0.1%";
/** Requests held in memory by every thread. */
const REQUESTS_MAX = 2_000_000;
const THREADS_MAX = 64;

export function planCommand(): Command {
  const collect = (value: string, before: string[]): string[] => [...before, value];
  const command = new Command("plan")
    .description("how many nodes a recorded load needs under an SLO, found by simulation")
    .requiredOption(
      "--trace <file>",
      "recorded load: a public trace, or the file of `serve --record`",
    )
    .option("--slo <text>", "what requests must get", DEFAULT_SLO)
    .option("--format <name>", `one of ${traceFormats.join(", ")} (else told from the file)`)
    .option(
      "--law <names>",
      `the node: a shipped step law or a file of \`calibrate\`; several with commas, to compare by price. Shipped: ${lawNames().join(", ")}`,
      lawNames()[0],
    )
    .option("--price <amounts>", "of one node an hour, in any currency; one for each law")
    .option("--nodes-max <count>", "largest number of nodes tried", "32")
    .option("--seeds <count>", "runs for each size that is verified", "5")
    .option("--seed <number>", "first seed", "1")
    .option("-c, --config <file>", "options of the gateway, as for `serve`; its nodes are not used")
    .option("--set <path=value>", "any option, e.g. queue.poolMax=500; repeat", collect, [])
    .option("--speed <factor>", "2 plays the load in half the time", "1")
    .option("--limit <count>", "requests at most")
    .option("--from <time>", "skip what came earlier in the trace: 90, 90s, 15m, 2h, 1d")
    .option("--to <time>", "stop there in the trace's own time")
    .option("--copies <count>", "superpose so many copies, shifted against each other (more users)")
    .option("--raw-times", "leave Mooncake's rounded times as they are instead of spreading them")
    .option("--threads <count>", "simulations at once (default: one for each core)")
    .option("--json <file>", "write the report there as well")
    .option("--html <file>", "write the report there as one page with plots");
  // Commander ends with 1 for a flag that is missing or unknown: bad input, too.
  command.exitOverride(({ code, exitCode }) => {
    process.exit(code.startsWith("commander.") && exitCode === 1 ? 2 : exitCode);
  });
  return command.action((flags: Flags) => run(flags, command));
}

async function run(flags: Flags, command: Command): Promise<void> {
  let report: PlanReport;
  try {
    for (const flag of ["json", "html"] as const) checkFolder(`--${flag}`, flags[flag]);
    const spec = await specOf(flags, command);
    checkPlan(spec);
    report = await planned(spec, threadsOf(flags));
    process.stdout.write(formatPlan(report)); // First: minutes of work must not be lost to a full disk.
    if (flags.json !== undefined) {
      write("--json", flags.json, `${JSON.stringify(report, null, 2)}\n`);
    }
    if (flags.html !== undefined) write("--html", flags.html, reportPage(report));
  } catch (error) {
    const isInput = [TraceError, SloError, LawError, PlanError, FlagError].some(
      (kind) => error instanceof kind,
    );
    if (!isInput || !(error instanceof Error)) throw error;
    return command.error(`headrace plan: ${error.message}`, { exitCode: 2, code: "headrace.plan" });
  }
  process.exitCode = report.answer.kind === "nodes" ? 0 : 1;
}

async function planned(spec: PlanSpec, threads: number): Promise<PlanReport> {
  const { load, slo, seed, options, laws } = spec;
  const setup = { load, laws: laws.map(({ law }) => law), slo, seed, options };
  const workers = new PlanWorkers(setup, threads);
  const progress = new Progress();
  const onInterrupt = () => process.exit(130);
  process.on("SIGINT", onInterrupt);
  try {
    return await plan(
      spec,
      (cases) => workers.run(cases, () => progress.step()),
      ({ phase, runs, planned: count }) => progress.show(phase, runs, count),
    );
  } finally {
    progress.end();
    process.off("SIGINT", onInterrupt);
    await workers.close();
  }
}

// ---- from flags to a plan -----------------------------------------------------------------------

async function specOf(flags: Flags, command: Command): Promise<PlanSpec> {
  const slo = withUnansweredLimited(parseSlo(flags.slo));
  const laws = lawsOf(flags);
  const nodesMax = numberOf("--nodes-max", flags.nodesMax);
  const seeds = numberOf("--seeds", flags.seeds);
  const seed = numberOf("--seed", flags.seed);
  const config = await simulatedOptions(flags.config, flags.set);
  const trace = await openTrace(flags.trace, traceOptions(flags));
  const load: TraceRequest[] = [];
  for await (const request of trace.requests()) {
    if (load.length >= REQUESTS_MAX) {
      throw new FlagError(
        `${flags.trace} holds more than ${REQUESTS_MAX} requests; choose a part with --from, --to or --limit`,
      );
    }
    load.push(request);
  }
  for (const warning of trace.warnings()) console.error(`warning: ${warning}`);
  return {
    load,
    laws,
    slo,
    nodesMax,
    seeds,
    seed,
    options: config.options,
    provenance: {
      trace: flags.trace,
      format: trace.format,
      sha256: createHash("sha256").update(readFileSync(flags.trace)).digest("hex"),
      window: windowText(flags),
      options: config.text,
      nodeVersion: process.version,
      version: versionOf(command),
      command: commandText(flags),
    },
  };
}

function lawsOf({ law, price }: Flags): PricedLaw[] {
  const names = law.split(",").map((name) => name.trim());
  const prices = price?.split(",").map((amount) => numberOf("--price", amount));
  if (prices !== undefined && prices.length !== names.length) {
    throw new FlagError(
      `--price has ${prices.length} amount${prices.length === 1 ? "" : "s"} for ${names.length} law${names.length === 1 ? "" : "s"}; give one for each`,
    );
  }
  return names.map((name, index) => ({
    law: loadLaw(name),
    pricePerHour: prices?.[index] ?? null,
  }));
}

function traceOptions(flags: Flags): TraceOptions {
  const speed = numberOf("--speed", flags.speed);
  return {
    speed,
    ...(flags.format !== undefined && { format: flags.format }),
    ...(flags.rawTimes === true && { spread: false }),
    ...(flags.from !== undefined && { fromUs: durationUs("--from", flags.from) }),
    ...(flags.to !== undefined && { toUs: durationUs("--to", flags.to) }),
    ...(flags.copies !== undefined && { copies: numberOf("--copies", flags.copies) }),
    ...(flags.limit !== undefined && { limit: numberOf("--limit", flags.limit) }),
  };
}

function threadsOf({ threads }: Flags): number {
  if (threads === undefined) return Math.min(THREADS_MAX, availableParallelism());
  const count = numberOf("--threads", threads);
  if (Number.isInteger(count) && count >= 1 && count <= THREADS_MAX) return count;
  throw new FlagError(
    `--threads is ${threads}; it must be a whole number from 1 to ${THREADS_MAX}`,
  );
}

function windowText({ from, to, speed, copies, limit, rawTimes }: Flags): string {
  const parts = [
    from === undefined ? "" : `from ${from}`,
    to === undefined ? "" : `to ${to}`,
    speed === "1" ? "" : `speed ${speed}`,
    copies === undefined ? "" : `${copies} copies`,
    limit === undefined ? "" : `at most ${limit} requests`,
    rawTimes === true ? "raw times" : "",
  ];
  return parts.filter((part) => part !== "").join(", ");
}

/** What repeats the plan: every flag that bears on it. */
function commandText(flags: Flags): string {
  const valued: [string, string | undefined][] = [
    ["--trace", flags.trace],
    ["--format", flags.format],
    ["--slo", flags.slo],
    ["--law", flags.law],
    ["--price", flags.price],
    ["--nodes-max", flags.nodesMax],
    ["--seeds", flags.seeds],
    ["--seed", flags.seed],
    ["--config", flags.config],
    ...flags.set.map((pair): [string, string] => ["--set", pair]),
    ["--speed", flags.speed === "1" ? undefined : flags.speed],
    ["--limit", flags.limit],
    ["--from", flags.from],
    ["--to", flags.to],
    ["--copies", flags.copies],
  ];
  const words = valued.flatMap(([flag, value]) =>
    value === undefined ? [] : [flag, quoted(value)],
  );
  return ["headrace plan", ...words, ...(flags.rawTimes === true ? ["--raw-times"] : [])].join(" ");
}

function versionOf(command: Command): string {
  return command.parent?.version() ?? "";
}

/** Before the work, not after it. */
function checkFolder(flag: string, file: string | undefined): void {
  if (file === undefined) return;
  try {
    accessSync(dirname(file), constants.W_OK);
  } catch {
    throw new FlagError(`${flag} ${file}: ${dirname(file)} is no folder that can be written to`);
  }
}

function write(flag: string, file: string, text: string): void {
  try {
    writeFileSync(file, text);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new FlagError(`${flag} ${file}: ${reason}`);
  }
}

// ---- progress -----------------------------------------------------------------------------------

const LINE_EVERY_MS = 5000;

/** A bar on a terminal, else a line now and then; on standard error. */
class Progress {
  readonly #bar: cliProgress.SingleBar | undefined;
  #phase = "";
  #runs = 0;
  #planned = 0;
  #lineAtMs = 0;

  constructor() {
    if (!process.stderr.isTTY) return;
    this.#bar = new cliProgress.SingleBar({
      format: "{bar} {value}/{total} runs  {phase}",
      hideCursor: true,
    });
    this.#bar.start(1, 0, { phase: "" });
  }

  show(phase: string, runs: number, planned: number): void {
    this.#phase = phase;
    this.#runs = runs;
    this.#planned = planned;
    this.#draw();
  }

  step(): void {
    this.#runs++;
    this.#draw();
  }

  end(): void {
    this.#bar?.stop();
  }

  #draw(): void {
    if (this.#bar !== undefined) {
      this.#bar.setTotal(Math.max(1, this.#planned));
      this.#bar.update(this.#runs, { phase: this.#phase });
      return;
    }
    const nowMs = performance.now();
    if (nowMs - this.#lineAtMs < LINE_EVERY_MS) return;
    this.#lineAtMs = nowMs;
    console.error(`${this.#runs} of ${this.#planned} runs, ${this.#phase}`);
  }
}
