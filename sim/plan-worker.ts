/**
 * Runs the cases of a plan: one by one (`runPlanCase`), or spread over worker threads (`PlanWorkers`).
 *
 * This file is both ends: loaded by the command it starts threads of itself, loaded by such a thread it takes cases
 * and sends summaries back. Every thread holds the load once. A case is a pure function of the set-up, so which
 * thread runs it, and when, changes nothing.
 */
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import { Random } from "../runtime/random.ts";
import type { OptionsInput } from "../transport/options.ts";
import type { Histogram } from "./histogram.ts";
import type { StepLaw } from "./laws.ts";
import { burstLoad, compressedLoad, grownLoad, resampledLoad } from "./load-scaling.ts";
import type { RunSummary } from "./plan-report.ts";
import type { LoadChange, PlanCase } from "./planner.ts";
import { cacheHits } from "./report.ts";
import { latencySummary } from "./run-books.ts";
import { type SimulatedNode, type SimulationResult, simulate } from "./simulator.ts";
import type { Objective, Slo } from "./slo.ts";
import type { TraceRequest } from "./trace-rows.ts";

/** What all cases of a plan share. Plain data. */
export type PlanSetup = {
  load: readonly TraceRequest[];
  laws: readonly StepLaw[];
  slo: Slo;
  seed: number;
  options: OptionsInput;
};

/** The first part of a run is of an empty system: not measured. */
const WARM_UP_US_MAX = 60_000_000;
const WARM_UP_SHARE = 0.1;

/** Runs one case. Throws when the simulation does: options that contradict, or a bug. */
export function runPlanCase(setup: PlanSetup, one: PlanCase): RunSummary {
  const startedMs = performance.now();
  const load = loadOf(setup, one);
  const lastUs = load.at(-1)?.atUs ?? 0;
  const result = simulate({
    nodes: nodesOf(setup, one),
    options: withChange(setup.options, one.options),
    seed: setup.seed + one.draw,
    slo: setup.slo,
    measured: { fromUs: Math.round(Math.min(WARM_UP_US_MAX, lastUs * WARM_UP_SHARE)) },
    load,
  });
  if (result.crashes.length > 0) throw new Error(`an actor crashed: ${result.crashes[0]}`);
  return {
    evidence: result.evidence,
    ttftMs: latencySummary(result.ttftUs),
    tpotMs: latencySummary(result.tpotUs),
    e2eMs: latencySummary(result.e2eUs),
    queueMs: latencySummary(result.queueUs),
    objectives: setup.slo.objectives.map((objective) => measured(objective, result)),
    attainment: attainmentOf(result),
    outcomes: { ...result.codes },
    outputTokensPerSecond: result.outputTokens / Math.max(1, result.measuredSeconds),
    imbalance: imbalanceOf(result),
    preemptions: result.nodes.reduce((sum, { preemptions }) => sum + preemptions, 0),
    retries: result.retries,
    cacheHitShare: cacheHits(result.cache) / Math.max(1, result.counts.arrived),
    series: one.withSeries ? result.series : null,
    wallMs: performance.now() - startedMs,
  };
}

function nodesOf({ laws }: PlanSetup, { mix, slowFactor, kvFactor }: PlanCase): SimulatedNode[] {
  return mix.flatMap(({ law: name, count }) => {
    const law = laws.find((candidate) => candidate.name === name);
    if (law === undefined) throw new Error(`the plan has no law ${name}`);
    const kvBlocks = Math.max(1, Math.floor(law.kvBlocks * kvFactor));
    return Array.from({ length: count }, () => ({ law, slowFactor, kvBlocks }));
  });
}

/** A change says what differs within a group; limits are lists of what is limited, and are replaced whole. */
function withChange(options: OptionsInput, change: PlanCase["options"]): OptionsInput {
  if (change === null) return options;
  const { router, cache, queue, ...whole } = change;
  return {
    ...options,
    ...whole,
    ...(router !== undefined && { router: { ...options.router, ...router } }),
    ...(cache !== undefined && { cache: { ...options.cache, ...cache } }),
    ...(queue !== undefined && { queue: { ...options.queue, ...queue } }),
  };
}

function loadOf({ load, seed }: PlanSetup, { draw, load: change }: PlanCase): TraceRequest[] {
  const random = new Random(seed + draw);
  const day = draw === 0 ? load.slice() : resampledLoad(load, random.split("another day"));
  return changed(day, change, random.split("change of the load"));
}

function changed(load: TraceRequest[], change: LoadChange, random: Random): TraceRequest[] {
  switch (change.kind) {
    case "none":
      return load;
    case "users":
      return grownLoad(load, change.factor, random);
    case "compressed":
      return compressedLoad(load, change.factor);
    case "burst":
      return burstLoad(load, change.factor, change.fromUs, change.toUs, random);
  }
}

function measured(objective: Objective, result: SimulationResult): number | null {
  const { counts } = result;
  if (objective.kind === "latency") {
    const us = latencyOf(result, objective.metric);
    if (us.count === 0) return null;
    const value = objective.statistic === "mean" ? us.mean : us.quantile(objective.statistic);
    return value === undefined ? null : value / 1000;
  }
  if (counts.arrived === 0) return null;
  switch (objective.metric) {
    case "failed":
      return (counts.failed + counts.unfinished) / counts.arrived;
    case "refused":
      return counts.refused / counts.arrived;
    case "attainment":
      return attainmentOf(result);
  }
}

function latencyOf(result: SimulationResult, metric: "ttft" | "tpot" | "e2e" | "queue"): Histogram {
  return result[`${metric}Us`];
}

/** Without a latency limit every answered request attains what was asked. */
function attainmentOf({ attainment, counts }: SimulationResult): number {
  return attainment ?? counts.completed / Math.max(1, counts.arrived);
}

/** Most work on one node ÷ the mean, over nodes of the same law; the largest over the laws. */
function imbalanceOf({ nodes }: SimulationResult): number {
  const byLaw = new Map<string, number[]>();
  for (const { law, outputTokens } of nodes) {
    byLaw.set(law, [...(byLaw.get(law) ?? []), outputTokens]);
  }
  let worst = 1;
  for (const tokens of byLaw.values()) {
    const sum = tokens.reduce((total, each) => total + each, 0);
    if (sum > 0) worst = Math.max(worst, (Math.max(...tokens) * tokens.length) / sum);
  }
  return worst;
}

// ---- threads ------------------------------------------------------------------------------------

type Order = { id: number; case: PlanCase };
type Delivery = { id: number; run: RunSummary } | { id: number; error: string };
type Job = { case: PlanCase; done: (run: RunSummary) => void; failed: (error: Error) => void };

/** Marks a thread as one of ours: the file is loaded by others, too. */
const ROLE = "headrace plan worker";

/** Threads that run cases, each one at a time, the next free one taking the next case. */
export class PlanWorkers {
  readonly #idle: Worker[] = [];
  readonly #all: Worker[] = [];
  readonly #waiting: Job[] = [];
  readonly #running = new Map<number, Job>();
  #nextId = 0;

  /** @param count of threads, 1 or more */
  constructor(setup: PlanSetup, count: number) {
    for (let index = 0; index < count; index++) {
      const worker = new Worker(new URL(import.meta.url), { workerData: { role: ROLE, setup } });
      worker.on("message", (delivery: Delivery) => this.#onDelivery(worker, delivery));
      worker.on("error", (error) => this.#fail(error));
      this.#all.push(worker);
      this.#idle.push(worker);
    }
  }

  /** Runs the cases; answers in their order. Rejects with the first case that cannot be run. */
  async run(cases: readonly PlanCase[], onDone: () => void = () => {}): Promise<RunSummary[]> {
    const runs = cases.map(
      (one) =>
        new Promise<RunSummary>((resolve, reject) => {
          const done = (run: RunSummary) => {
            onDone();
            resolve(run);
          };
          this.#waiting.push({ case: one, done, failed: reject });
        }),
    );
    this.#startNext();
    return await Promise.all(runs);
  }

  /** Ends the threads; cases still open are never answered. */
  async close(): Promise<void> {
    await Promise.all(this.#all.map((worker) => worker.terminate()));
  }

  #startNext(): void {
    for (;;) {
      const worker = this.#idle.pop();
      const job = this.#waiting.shift();
      if (worker === undefined || job === undefined) {
        if (worker !== undefined) this.#idle.push(worker);
        if (job !== undefined) this.#waiting.unshift(job);
        return;
      }
      const id = this.#nextId++;
      this.#running.set(id, job);
      const order: Order = { id, case: job.case };
      worker.postMessage(order);
    }
  }

  #onDelivery(worker: Worker, delivery: Delivery): void {
    const job = this.#running.get(delivery.id);
    this.#running.delete(delivery.id);
    this.#idle.push(worker);
    if ("error" in delivery) job?.failed(new Error(delivery.error));
    else job?.done(delivery.run);
    this.#startNext();
  }

  /** A thread is gone (memory, most likely): nothing that waits for it will come. */
  #fail(error: Error): void {
    for (const job of [...this.#running.values(), ...this.#waiting]) job.failed(error);
    this.#running.clear();
    this.#waiting.length = 0;
  }
}

function serve(setup: PlanSetup): void {
  parentPort?.on("message", ({ id, case: one }: Order) => {
    let delivery: Delivery;
    try {
      delivery = { id, run: runPlanCase(setup, one) };
    } catch (error) {
      delivery = { id, error: error instanceof Error ? error.message : String(error) };
    }
    parentPort?.postMessage(delivery);
  });
}

if (!isMainThread && workerData?.role === ROLE) serve(workerData.setup as PlanSetup);
