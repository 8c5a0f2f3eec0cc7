/**
 * `headrace sim`: runs the gateway of this very release on a virtual clock, with a recorded or a made-up load, and
 * says what clients would have seen.
 *
 * The report goes to standard output, progress to standard error. Ends with 0; 1 when no request was answered or an
 * actor crashed; 2 for bad input; 130 when stopped by ^C.
 */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import cliProgress from "cli-progress";
import { Command } from "commander";
import { strategyNames } from "../actors/node-score.ts";
import { type Fault, FaultError, parseFaults } from "../sim/faults.ts";
import { LawError, loadLaw } from "../sim/law-file.ts";
import { lawNames, physicsViolations } from "../sim/laws.ts";
import { LoadTextError, parseLoad } from "../sim/load-text.ts";
import {
  formatComparison,
  formatSimulation,
  lawProvenance,
  type SimulationReport,
  simulationReport,
} from "../sim/report.ts";
import { reportPage } from "../sim/report-page.ts";
import {
  type SimulatedNode,
  Simulation,
  SimulationError,
  type SimulationSpec,
} from "../sim/simulator.ts";
import { parseSlo, type Slo, SloError } from "../sim/slo.ts";
import { openTrace, TraceError, type TraceOptions } from "../sim/trace.ts";
import type { TraceRequest } from "../sim/trace-rows.ts";
import { type LoadStatistics, summarizeLoad } from "../sim/trace-statistics.ts";
import { explain } from "../transport/records.ts";
import {
  collect,
  durationUs,
  endWithTwo,
  FlagError,
  numberOf,
  quoted,
  type SimulatedOptions,
  simulatedOptions,
  writeFlagFile,
} from "./flag-values.ts";
import { articleCommand } from "./sim-article.ts";
import { decisionsCommand } from "./sim-decisions.ts";
import {
  limitOf,
  loadLine,
  TRACE_DOC,
  type TraceFlags,
  traceOptions,
  traceWords,
  withTraceFlags,
} from "./trace-flags.ts";

type Flags = TraceFlags & {
  trace?: string;
  load?: string;
  speed?: string;
  rate?: string;
  nodes: string;
  law: string;
  kvBlocks?: string;
  slow: string[];
  router?: string;
  gateways: string;
  seed: string;
  faults?: string;
  patience?: string;
  clientRetries?: string;
  warmUp?: string;
  slo?: string;
  config?: string;
  set: string[];
  compare?: string;
  explain?: string;
  json?: string;
  html?: string;
};

const LAW = "llama-3.1-8b/h100";
const VARIANTS_MAX = 16;
/** What may differ between variants. */
const COMPARABLE = ["router", "gateways", "nodes", "seed", "law", "faults"] as const;
type Comparable = (typeof COMPARABLE)[number];

export function simCommand(): Command {
  const command = endWithTwo(new Command("sim"))
    .description(
      "run the gateway in virtual time on modelled GPUs, with a recorded or made-up load",
    )
    .option("--trace <file>", TRACE_DOC)
    .option(
      "--load <text>",
      'made-up load instead: "poisson:28/s in=512 out=256/0.8 for=10m", also gamma, daily, ramp, sessions',
    )
    .option("--speed <factor>", "2 plays a trace in half the time (default: 1)")
    .option("--rate <count>", "speed a trace up or down to so many requests a second");
  withTraceFlags(command)
    .option("--nodes <count>", "GPU nodes, named node-1, node-2 …", "8")
    .option("--law <name>", `the node: one of ${lawNames().join(", ")}, or a law file`, LAW)
    .option("--kv-blocks <count>", "KV memory of a node, blocks of 16 tokens (else the law's)")
    .option("--slow <node xN>", 'a node that is always slower: "node-1 x2"; repeat', collect, [])
    .option(
      "--router <strategy>",
      `one of ${strategyNames.join(", ")} (else the configuration's, or ${strategyNames[0]})`,
    )
    .option("--gateways <count>", "gateway processes, named gw-1, gw-2 …", "1")
    .option("--seed <text>", "the same seed gives the same run, bit for bit", "1")
    .option(
      "--faults <text>",
      'what goes wrong: "crash node-3 at 60s for 30s; slow node-1 x2 at 10s"',
    )
    .option("--patience <time>", "clients go away when they have no whole answer by then")
    .option("--client-retries <count>", "how often a client asks again after a refusal or failure")
    .option("--warm-up <time>", "leave requests that arrive before out of the figures")
    .option("--slo <text>", 'what requests must get: "ttft p99 <= 2s, e2e p99 <= 30s"')
    .option("-c, --config <file>", "options of the gateway, as for `serve`; its nodes are not used")
    .option("--set <path=value>", "any option, e.g. queue.poolMax=500; repeat", collect, [])
    .option("--compare <name=a,b>", `run variants side by side: ${COMPARABLE.join(", ")}`)
    .option("--explain <id>", "print the whole story of one request: r1, r2 …")
    .option("--json <file>", "write the report there as well")
    .option("--html <file>", "write the report there as one page with plots");
  command.enablePositionalOptions(); // As bin/headrace.ts does, for the level below.
  command.addCommand(articleCommand()).addCommand(decisionsCommand());
  return command.action((flags: Flags) => run(flags, command));
}

async function run(flags: Flags, command: Command): Promise<void> {
  const onInterrupt = () => process.exit(130);
  process.on("SIGINT", onInterrupt);
  try {
    const variants = variantsOf(flags);
    const load = await loadOf(flags);
    console.error(load.text);
    const slo = flags.slo === undefined ? undefined : parseSlo(flags.slo);
    const reports: SimulationReport[] = [];
    for (const variant of variants) {
      reports.push(await simulated(variant, load, slo, command));
      if (variants.length > 1) console.error(`${variant.name}: done`);
    }
    const [first] = reports;
    if (first === undefined) return;
    process.stdout.write(reports.length > 1 ? formatComparison(reports) : formatSimulation(first));
    if (flags.json !== undefined) {
      const shown = reports.length > 1 ? reports : first;
      writeFlagFile("--json", flags.json, `${JSON.stringify(shown, null, 2)}\n`);
    }
    if (flags.html !== undefined) writeFlagFile("--html", flags.html, reportPage(reports));
    const isSound = reports.every(
      ({ crashes, counts }) => crashes.length === 0 && counts.completed > 0,
    );
    process.exitCode = isSound ? 0 : 1;
  } catch (error) {
    if (!isBadInput(error)) throw error;
    command.error(`headrace sim: ${error.message}`, { exitCode: 2, code: "headrace.sim" });
  } finally {
    process.off("SIGINT", onInterrupt);
  }
}

function isBadInput(error: unknown): error is Error {
  return [
    FaultError,
    FlagError,
    LawError,
    LoadTextError,
    SimulationError,
    SloError,
    TraceError,
  ].some((kind) => error instanceof kind);
}

// ---- one run ------------------------------------------------------------------------------------------

async function simulated(
  variant: Variant,
  load: Load,
  slo: Slo | undefined,
  command: Command,
): Promise<SimulationReport> {
  const { flags, name } = variant;
  const config = await simulatedOptions(flags.config, [
    ...flags.set,
    ...(flags.router === undefined ? [] : [`router.strategy=${flags.router}`]),
  ]);
  const nodes = nodesOf(flags);
  const simulation = new Simulation(specOf(flags, nodes, config, load, slo));
  // First of all, so that a run that does not come to its end can be made again.
  console.error(`${commandText(flags)}   (seed ${flags.seed}, options: ${config.text})`);
  const startedMs = performance.now();
  const progress = new Progress(name, load.statistics.requests);
  try {
    for await (const request of load.requests()) {
      simulation.offer(request);
      progress.show(simulation);
    }
  } finally {
    progress.end();
  }
  const result = simulation.finish();
  const laws = nodes.map(({ law }) => law);
  const report = simulationReport(result, {
    name,
    wallMs: performance.now() - startedMs,
    physics: [...new Set(laws)].flatMap(physicsViolations),
    ...(flags.slo !== undefined && { sloText: flags.slo }),
    provenance: {
      load: flags.trace ?? flags.load ?? "",
      format: load.format,
      sha256: load.sha256,
      laws: lawProvenance(laws),
      gateways: numberOf("--gateways", flags.gateways),
      router: config.options.router?.strategy ?? strategyNames[0],
      options: config.text,
      nodeVersion: process.version,
      version: command.parent?.version() ?? "",
      command: commandText(flags),
    },
  });
  if (flags.explain === undefined) return report;
  const { explained } = result;
  if (explained === undefined) {
    throw new FlagError(
      `--explain ${flags.explain}: no such request ended; they are named r1 to r${result.counts.arrived}`,
    );
  }
  const { summary, steps, decisions } = explain(explained);
  process.stdout.write(
    `${flags.explain}: ${summary}\n${steps.map((step) => `  ${step}\n`).join("")}`,
  );
  for (const { candidates } of decisions) {
    for (const { node, cost, terms, eligible, excluded } of candidates) {
      const why = eligible
        ? `cost ${cost ?? "–"} ${JSON.stringify(terms ?? {})}`
        : `out: ${excluded}`;
      process.stdout.write(`    ${node}  ${why}\n`);
    }
  }
  process.stdout.write("\n");
  return report;
}

function specOf(
  flags: Flags,
  nodes: readonly SimulatedNode[],
  { options, hasStore }: SimulatedOptions,
  load: Load,
  slo: Slo | undefined,
): SimulationSpec {
  const patienceUs =
    flags.patience === undefined ? undefined : durationUs("--patience", flags.patience);
  return {
    nodes,
    options,
    hasStore,
    gateways: numberOf("--gateways", flags.gateways),
    seed: flags.seed,
    faults: faultsOf(flags),
    clients: {
      ...(patienceUs !== undefined && { patienceMs: patienceUs / 1000 }),
      ...(flags.clientRetries !== undefined && {
        retriesMax: numberOf("--client-retries", flags.clientRetries),
      }),
    },
    ...(slo !== undefined && { slo }),
    ...(flags.warmUp !== undefined && {
      measured: { fromUs: durationUs("--warm-up", flags.warmUp) },
    }),
    ...(load.prefixBlockTokens !== undefined && { prefixBlockTokens: load.prefixBlockTokens }),
    ...(flags.explain !== undefined && { explain: flags.explain }),
  };
}

function faultsOf({ faults }: Flags): Fault[] {
  return faults === undefined ? [] : parseFaults(faults);
}

function nodesOf(flags: Flags): SimulatedNode[] {
  const count = numberOf("--nodes", flags.nodes);
  if (!Number.isInteger(count) || count < 1 || count > 1024) {
    throw new FlagError(`--nodes is ${flags.nodes}; it must be a whole number from 1 to 1024`);
  }
  const law = loadLaw(flags.law);
  const kvBlocks =
    flags.kvBlocks === undefined ? undefined : numberOf("--kv-blocks", flags.kvBlocks);
  if (kvBlocks !== undefined && !(Number.isInteger(kvBlocks) && kvBlocks >= 1)) {
    throw new FlagError(`--kv-blocks is ${flags.kvBlocks}; it must be a whole number, 1 or more`);
  }
  const nodes: SimulatedNode[] = Array.from({ length: count }, (_, index) => ({
    name: `node-${index + 1}`,
    law,
    ...(kvBlocks !== undefined && { kvBlocks }),
  }));
  for (const text of flags.slow.flatMap((part) => part.split(","))) {
    const [, name, factor] = /^\s*(\S+)\s+x(\d+(?:\.\d+)?)\s*$/.exec(text) ?? [];
    const node = nodes.find((each) => each.name === name);
    if (node === undefined || !(Number(factor) > 0)) {
      throw new FlagError(
        `--slow ${JSON.stringify(text)}: write a node's name and a factor, like "node-1 x2"; nodes are node-1 to node-${count}`,
      );
    }
    node.slowFactor = Number(factor);
  }
  return nodes;
}

// ---- variants -----------------------------------------------------------------------------------------

type Variant = { name: string; flags: Flags };

function variantsOf(flags: Flags): Variant[] {
  const isKnown = (strategyNames as readonly string[]).includes(flags.router ?? strategyNames[0]);
  if (!isKnown) {
    throw new FlagError(`--router is ${flags.router}; accepted: ${strategyNames.join(", ")}`);
  }
  if (flags.compare === undefined) return [{ name: "run", flags }];
  const [, name = "", list = ""] = /^([a-z]+)=(.+)$/.exec(flags.compare) ?? [];
  const known = COMPARABLE.find((comparable) => comparable === name);
  if (known === undefined) {
    throw new FlagError(
      `--compare ${flags.compare}: write what differs and its values, like router=headroom,article; ` +
        `accepted: ${COMPARABLE.join(", ")}`,
    );
  }
  // A schedule of faults has commas of its own in no clause, and its clauses stand apart by semicolons.
  const values = list.split(known === "faults" ? "|" : ",").map((value) => value.trim());
  if (values.length < 2 || values.length > VARIANTS_MAX) {
    throw new FlagError(`--compare ${flags.compare}: 2 to ${VARIANTS_MAX} values are accepted`);
  }
  return values
    .flatMap((value) => variantsOf({ ...without(flags), ...changed(known, value) }))
    .map((variant, index) => ({ ...variant, name: values[index] ?? variant.name }));
}

function without({ compare: _, ...flags }: Flags): Flags {
  return flags;
}

function changed(name: Comparable, value: string): Partial<Flags> {
  return { [name]: value };
}

// ---- the load -----------------------------------------------------------------------------------------

type Load = {
  requests: () => Iterable<TraceRequest> | AsyncIterable<TraceRequest>;
  statistics: LoadStatistics;
  prefixBlockTokens: number | undefined;
  format: string;
  sha256: string;
  /** What is about to be played. */
  text: string;
};

async function loadOf(flags: Flags): Promise<Load> {
  if ((flags.trace === undefined) === (flags.load === undefined)) {
    throw new FlagError("give either --trace with a recorded load or --load with a made-up one");
  }
  if (flags.load !== undefined) {
    for (const name of ["format", "speed", "rate", "copies", "from", "to"] as const) {
      if (flags[name] === undefined) continue;
      throw new FlagError(`--${name} belongs to --trace; a made-up load says it in its text`);
    }
    const made = parseLoad(flags.load, flags.seed);
    const limit = limitOf(flags);
    const requests = () => (limit === undefined ? made() : firstOf(made(), limit));
    const sha256 = createHash("sha256").update(`${flags.load} ${flags.seed}`).digest("hex");
    return await described(requests, flags.load, "generator", sha256);
  }
  const file = flags.trace ?? "";
  const options = traceOptions(flags);
  const trace = await openTrace(file, { ...options, speed: await speedOf(flags, file, options) });
  const load = await described(() => trace.requests(), file, trace.format, await sha256Of(file));
  for (const warning of trace.warnings()) console.error(`warning: ${warning}`);
  return load;
}

async function speedOf(flags: Flags, file: string, options: TraceOptions): Promise<number> {
  if (flags.rate === undefined) return numberOf("--speed", flags.speed ?? "1");
  if (flags.speed !== undefined) throw new FlagError("give --speed or --rate, not both");
  const rate = numberOf("--rate", flags.rate);
  if (!(rate > 0)) throw new FlagError(`--rate is ${flags.rate}; it must be above 0`);
  const { ratePerSecond } = await summarizeLoad((await openTrace(file, options)).requests());
  if (ratePerSecond === undefined) throw new FlagError(`--rate: ${file} holds no span of time`);
  return rate / ratePerSecond;
}

async function described(
  requests: Load["requests"],
  name: string,
  format: string,
  sha256: string,
): Promise<Load> {
  const statistics = await summarizeLoad(requests());
  const text = loadLine(name, format, statistics);
  const prefixBlockTokens = await blockTokensOf(requests());
  return { requests, statistics, prefixBlockTokens, format, sha256, text };
}

/** Of the first request that has a prefix, if one of the first has. */
async function blockTokensOf(
  requests: Iterable<TraceRequest> | AsyncIterable<TraceRequest>,
): Promise<number | undefined> {
  let looked = 0;
  for await (const { blockTokens } of requests) {
    if (blockTokens !== undefined) return blockTokens;
    if (++looked >= 10_000) return undefined;
  }
  return undefined;
}

function* firstOf(requests: Iterable<TraceRequest>, limit: number): Generator<TraceRequest> {
  let count = 0;
  for (const request of requests) {
    if (count++ >= limit) return;
    yield request;
  }
}

async function sha256Of(file: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(file)) hash.update(chunk);
  return hash.digest("hex");
}

/** What repeats the run: every flag that bears on it. */
function commandText(flags: Flags): string {
  const words = ["headrace sim"];
  const add = (flag: string, value: string | undefined, usual?: string) => {
    if (value !== undefined && value !== usual) words.push(flag, quoted(value));
  };
  add("--trace", flags.trace);
  add("--load", flags.load);
  add("--speed", flags.speed, "1");
  add("--rate", flags.rate);
  words.push(...traceWords(flags));
  add("--nodes", flags.nodes);
  add("--law", flags.law);
  add("--kv-blocks", flags.kvBlocks);
  for (const slow of flags.slow) add("--slow", slow);
  add("--router", flags.router);
  add("--gateways", flags.gateways, "1");
  add("--seed", flags.seed);
  add("--faults", flags.faults);
  add("--patience", flags.patience);
  add("--client-retries", flags.clientRetries);
  add("--warm-up", flags.warmUp);
  add("--slo", flags.slo);
  add("--config", flags.config);
  for (const pair of flags.set) add("--set", pair);
  return words.join(" ");
}

// ---- progress -----------------------------------------------------------------------------------------

const SHOW_EVERY_REQUESTS = 256;
const LINE_EVERY_MS = 5000;

/** A bar on a terminal, else a line now and then; on standard error. */
class Progress {
  readonly #bar: cliProgress.SingleBar | undefined;
  readonly #total: number;
  readonly #startedMs = performance.now();
  #done = 0;
  #lineAtMs = LINE_EVERY_MS;

  constructor(name: string, total: number) {
    this.#total = total;
    if (!process.stderr.isTTY) return;
    this.#bar = new cliProgress.SingleBar({
      format: `${name} {bar} {percentage} %  {simulated} simulated, {speed} × real time, {open} open`,
      hideCursor: true,
    });
    this.#bar.start(total, 0, { simulated: "0 s", speed: 0, open: 0 });
  }

  show(simulation: Simulation): void {
    this.#done++;
    if (this.#done % SHOW_EVERY_REQUESTS !== 0) return;
    const elapsedMs = performance.now() - this.#startedMs;
    const speed = Math.round(simulation.nowUs / 1000 / elapsedMs);
    const simulated = `${Math.round(simulation.nowUs / 1e6)} s`;
    this.#bar?.update(this.#done, { simulated, speed, open: simulation.open });
    if (this.#bar !== undefined || elapsedMs < this.#lineAtMs) return;
    this.#lineAtMs = elapsedMs + LINE_EVERY_MS;
    console.error(
      `${this.#done} of ${this.#total} requests, ${simulated} simulated, ${speed} × real time`,
    );
  }

  end(): void {
    this.#bar?.stop();
  }
}
