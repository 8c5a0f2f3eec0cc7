/**
 * `headrace plan`: how many nodes a recorded load needs under an SLO, found by simulation.
 *
 * The first line of standard output is the answer. Ends with 0 when there is one; 1 when no size tried suffices or
 * the run cannot support an answer; 2 for bad input; 130 when stopped by ^C.
 */
import { createHash } from "node:crypto";
import { accessSync, constants, readFileSync } from "node:fs";
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
import { openTrace, TraceError } from "../sim/trace.ts";
import type { TraceRequest } from "../sim/trace-rows.ts";
import {
  collect,
  endWithTwo,
  FlagError,
  numberOf,
  quoted,
  simulatedOptions,
  writeFlagFile,
} from "./flag-values.ts";
import {
  TRACE_DOC,
  type TraceFlags,
  traceOptions,
  traceWords,
  withTraceFlags,
} from "./trace-flags.ts";

type Flags = TraceFlags & {
  trace: string;
  slo: string;
  law: string;
  price?: string;
  nodesMax: string;
  seeds: string;
  seed: string;
  config?: string;
  set: string[];
  speed: string;
  threads?: string;
  json?: string;
  html?: string;
};

const DEFAULT_SLO = "ttft p99 <= 2s, e2e p99 <= 60s, failed <= 0.1%";
/** Requests held in memory by every thread. */
const REQUESTS_MAX = 2_000_000;
const THREADS_MAX = 64;

export function planCommand(): Command {
  const command = endWithTwo(new Command("plan"))
    .description("how many nodes a recorded load needs under an SLO, found by simulation")
    .requiredOption("--trace <file>", TRACE_DOC)
    .option("--slo <text>", "what requests must get", DEFAULT_SLO)
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
    .option("--speed <factor>", "2 plays the load in half the time", "1");
  withTraceFlags(command)
    .option("--threads <count>", "simulations at once (default: one for each core)")
    .option("--json <file>", "write the report there as well")
    .option("--html <file>", "write the report there as one page with plots");
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
      writeFlagFile("--json", flags.json, `${JSON.stringify(report, null, 2)}\n`);
    }
    if (flags.html !== undefined) writeFlagFile("--html", flags.html, reportPage(report));
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
  const trace = await openTrace(flags.trace, {
    ...traceOptions(flags),
    speed: numberOf("--speed", flags.speed),
  });
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
    ["--slo", flags.slo],
    ["--law", flags.law],
    ["--price", flags.price],
    ["--nodes-max", flags.nodesMax],
    ["--seeds", flags.seeds],
    ["--seed", flags.seed],
    ["--config", flags.config],
    ...flags.set.map((pair): [string, string] => ["--set", pair]),
    ["--speed", flags.speed === "1" ? undefined : flags.speed],
  ];
  const words = valued.flatMap(([flag, value]) =>
    value === undefined ? [] : [flag, quoted(value)],
  );
  return ["headrace plan", ...words, ...traceWords(flags)].join(" ");
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
