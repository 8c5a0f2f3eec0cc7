/**
 * Finds the smallest number of nodes that keeps an SLO under a load, and what that answer rests on.
 *
 *   bracket by doubling → narrow by thirds (one run of the recorded load each)
 *     → verify N, N−1 and N+1 with every seed → mixes → headroom → what-ifs → report, or a refusal with reasons
 *
 * It decides which cases to run and what follows from them; running them is the caller's (`RunCases`), in worker
 * threads or in a test. Seed 0 of a plan runs the load as recorded; every further seed runs another day of it
 * (load-scaling.ts), so that the confidence intervals hold the spread of the load, not only that of the router's
 * dice. A size keeps the SLO only if the whole 95 % interval of every objective does.
 *
 * No wall clock, no file, no thread: the same spec and the same runs give the same report.
 */
import type { OptionsInput } from "../transport/options.ts";
import { KV_BLOCK_TOKENS, physicsViolations, rawStepUs, type StepLaw } from "./laws.ts";
import { blockUsOf } from "./load-scaling.ts";
import type {
  Answer,
  CurvePoint,
  Headroom,
  LowerBound,
  NodeMix,
  ObjectiveResult,
  PlanReport,
  Provenance,
  RunSummary,
  SizeResult,
  WhatIf,
} from "./plan-report.ts";
import { durationText, isMet, limitOf, percentText, type Slo, valueText } from "./slo.ts";
import {
  backlogGrowth,
  COMPLETED_SHARE_MIN,
  completedShare,
  intervalOf,
  RUN_MS_MIN,
  refusalReasons,
  type Verdict,
  verdictOf,
} from "./statistics.ts";
import type { TraceRequest } from "./trace-rows.ts";
import { summarizeLoad } from "./trace-statistics.ts";

/** What is done to the load of a run, after it was drawn. */
export type LoadChange =
  | { kind: "none" }
  /** So many times the users. */
  | { kind: "users"; factor: number }
  /** The same requests in 1 ÷ factor of the time. */
  | { kind: "compressed"; factor: number }
  /** So many times the requests for a while. */
  | { kind: "burst"; factor: number; fromUs: number; toUs: number };

/** One run. Plain data, so that it crosses to a worker. */
export type PlanCase = {
  mix: NodeMix;
  /** 0: the load as recorded; n: the n-th other day. The simulation's seed is the plan's plus this. */
  draw: number;
  load: LoadChange;
  /** Laid over the plan's options, group by group. */
  options: OptionsChange | null;
  /** Steps take so many times as long; KV memory is so many times as large. */
  slowFactor: number;
  kvFactor: number;
  /** With the time series. */
  withSeries: boolean;
};

/** Of the groups that a what-if may change, what differs; limits and keys are given whole. */
export type OptionsChange = Pick<
  OptionsInput,
  "router" | "cache" | "queue" | "defaultLimits" | "keys"
>;

/** Runs the cases, in any order or at once; answers in the order given. */
export type RunCases = (cases: readonly PlanCase[]) => Promise<RunSummary[]>;

export type PricedLaw = {
  law: StepLaw;
  /** Of one node, in any currency; null when not stated. */
  pricePerHour: number | null;
};

export type PlanSpec = {
  /** As recorded, in order of arrival, from 0. */
  load: readonly TraceRequest[];
  /** One to three; several need prices. */
  laws: readonly PricedLaw[];
  slo: Slo;
  /** Largest number of nodes tried. */
  nodesMax: number;
  /** Runs per size that is verified, 1 or more; below 3 there is no interval worth the name. */
  seeds: number;
  seed: number;
  /** The gateway's options, as far as they differ from the defaults. */
  options: OptionsInput;
  provenance: Omit<Provenance, "laws" | "seeds">;
};

/** Told after every batch of runs. `planned` grows as the search learns what it needs. */
export type PlanProgress = { phase: string; runs: number; planned: number };

/** A plan that makes no sense; the message says what is wrong and what is accepted. */
export class PlanError extends Error {
  override readonly name = "PlanError";
}

const LAWS_MAX = 3;
const NODES_MAX = 1024;
const SEEDS_MAX = 100;
/** Sizes of mixes tried beside the homogeneous ones. */
const MIXES_MAX = 10;
/** Loads tried above the trace's, and how close the search for the largest one comes. */
const FACTOR_MAX = 4;
const FACTOR_STEP = 1.04;

/** Throws PlanError. */
export function checkPlan(spec: PlanSpec): void {
  const whole = (name: string, value: number, max: number) => {
    if (Number.isInteger(value) && value >= 1 && value <= max) return;
    throw new PlanError(`${name} is ${value}; it must be a whole number from 1 to ${max}`);
  };
  whole("the largest number of nodes", spec.nodesMax, NODES_MAX);
  whole("the number of seeds", spec.seeds, SEEDS_MAX);
  if (!Number.isSafeInteger(spec.seed) || spec.seed < 0) {
    throw new PlanError(`the seed is ${spec.seed}; it must be a whole number, 0 or more`);
  }
  if (spec.laws.length < 1 || spec.laws.length > LAWS_MAX) {
    throw new PlanError(`${spec.laws.length} laws are given; accepted: 1 to ${LAWS_MAX}`);
  }
  const names = new Set(spec.laws.map(({ law }) => law.name));
  if (names.size < spec.laws.length) throw new PlanError("a law is given twice");
  if (spec.laws.length > 1 && spec.laws.some(({ pricePerHour }) => pricePerHour === null)) {
    throw new PlanError("several laws can be compared by cost only: give each a price per hour");
  }
  for (const { law, pricePerHour } of spec.laws) {
    if (pricePerHour !== null && !(pricePerHour > 0 && Number.isFinite(pricePerHour))) {
      throw new PlanError(`the price of ${law.name} is ${pricePerHour}; it must be above 0`);
    }
  }
  if (spec.load.length === 0) throw new PlanError("the load holds no requests");
}

/** Plans. Throws PlanError for a spec that makes no sense. */
export async function plan(
  spec: PlanSpec,
  run: RunCases,
  onProgress: (progress: PlanProgress) => void = () => {},
): Promise<PlanReport> {
  checkPlan(spec);
  return await new Planner(spec, run, onProgress).plan();
}

class Planner {
  readonly #spec: PlanSpec;
  readonly #run: RunCases;
  readonly #onProgress: (progress: PlanProgress) => void;
  readonly #durationUs: number;
  /** Every run made, by its case. */
  readonly #done = new Map<string, RunSummary>();
  readonly #notes: string[] = [];
  #phase = "searching";
  #planned = 0;

  constructor(spec: PlanSpec, run: RunCases, onProgress: (progress: PlanProgress) => void) {
    this.#spec = spec;
    this.#run = run;
    this.#onProgress = onProgress;
    this.#durationUs = spec.load.at(-1)?.atUs ?? 0;
  }

  async plan(): Promise<PlanReport> {
    const { laws, load, slo } = this.#spec;
    const bounds = laws.map(({ law }) => lowerBoundOf(law, load));
    const physics = laws.flatMap(({ law }) => physicsViolations(law));
    const shortMs = this.#durationUs / 1000;
    if (physics.length > 0 || shortMs < RUN_MS_MIN) {
      const reasons = physics.map((text) => `the step law is faster than physics: ${text}`);
      if (shortMs < RUN_MS_MIN) {
        reasons.push(
          `the load lasts ${durationText(shortMs)}; ${durationText(RUN_MS_MIN)} are the least that can show a p99`,
        );
      }
      return await this.#report({ kind: "refused", reasons }, bounds, null);
    }
    this.#noteBlocks();
    if (slo.added.length > 0) {
      this.#notes.push(
        `The SLO as given is also kept by refusing requests, so this was added: ${slo.added.join(", ")}.`,
      );
    }
    const found: NodeMix[] = [];
    for (const [index, { law }] of laws.entries()) {
      this.#phase = laws.length === 1 ? "searching" : `searching ${law.name}`;
      const size = await this.#smallest(law, bounds[index]?.nodesMean ?? 1);
      if (size !== undefined) found.push(mixOf(law, size));
    }
    if (found.length === 0) return await this.#report(this.#none(), bounds, null);
    const cheapest = laws.length === 1 ? found[0] : await this.#cheapest(found);
    if (cheapest === undefined) throw new Error("a plan with answers has a cheapest one");
    const reasons = refusalReasons(this.#recorded(cheapest).evidence);
    if (reasons.length > 0) {
      return await this.#report({ kind: "refused", reasons }, bounds, cheapest);
    }
    return await this.#report(this.#answer(cheapest), bounds, cheapest);
  }

  #noteBlocks(): void {
    const { seeds, load } = this.#spec;
    if (seeds > 1) {
      const block = durationText(blockUsOf(load) / 1000);
      this.#notes.push(
        `Seed 1 of ${seeds} is the load as recorded; the others are other days of it: each block of ${block} ` +
          "replaced by one of its neighbours, requests kept whole. Intervals are 95 %, over these.",
      );
    }
    if (seeds < 3) {
      this.#notes.push(
        `${seeds === 1 ? "One seed gives" : "Two seeds give"} no interval worth the name; use 3 or more.`,
      );
    }
  }

  // ---- the search -------------------------------------------------------------------------------

  /** Smallest verified size of one law; undefined when none up to `nodesMax` keeps the SLO. */
  async #smallest(law: StepLaw, bound: number): Promise<number | undefined> {
    const bracket = await this.#bracket(law, bound);
    if (bracket === undefined) return undefined;
    let { fails, passes } = bracket;
    while (passes - fails > 1) {
      const step = Math.ceil((passes - fails) / 3);
      const sizes = [fails + step, fails + 2 * step].filter((size) => size < passes);
      await this.#runSizes(law, sizes, 1);
      const first = sizes.find((size) => this.#isKept(law, size));
      fails = Math.max(fails, ...sizes.filter((size) => first === undefined || size < first));
      passes = first ?? passes;
    }
    return await this.#verify(law, passes);
  }

  /** Doubles, two sizes at a time, until one run keeps the SLO. */
  async #bracket(
    law: StepLaw,
    bound: number,
  ): Promise<{ fails: number; passes: number } | undefined> {
    const { nodesMax } = this.#spec;
    // No batch is cheaper than the bound's, so smaller sizes fail without being tried.
    let fails = Math.min(bound, nodesMax) - 1;
    while (fails < nodesMax) {
      const size = Math.min(Math.max(fails + 1, 2 * fails), nodesMax);
      const sizes = [...new Set([size, Math.min(2 * size, nodesMax)])];
      await this.#runSizes(law, sizes, 1);
      for (const tried of sizes) {
        if (this.#isKept(law, tried)) return { fails, passes: tried };
        fails = tried;
      }
    }
    return undefined;
  }

  #isKept(law: StepLaw, size: number): boolean {
    return this.#size(mixOf(law, size), 1).meets === "yes";
  }

  /**
   * From a size that one run speaks for to the smallest that all seeds speak for, with the next smaller one failing
   * and the next larger one keeping the SLO, too. Runs are noisy: one run may speak for a size too small, or a
   * larger size may fail where a smaller one passed; then the larger one is the answer.
   */
  async #verify(law: StepLaw, from: number): Promise<number | undefined> {
    const { nodesMax, seeds } = this.#spec;
    this.#phase = "verifying";
    const meets = (size: number) => this.#size(mixOf(law, size), seeds).meets === "yes";
    let rejected = 0; // Largest size seen to fail: nothing below it is an answer.
    for (let size = from; size <= nodesMax; ) {
      const sizes = [size - 1, size, size + 1].filter((tried) => tried >= 1 && tried <= nodesMax);
      await this.#runSizes(law, sizes, seeds);
      if (!meets(size)) {
        rejected = size;
        size++;
      } else if (size < nodesMax && !meets(size + 1)) {
        this.#notes.push(
          `${size} nodes keep the SLO but ${size + 1} do not: the runs disagree by chance, so the smaller size is not trusted.`,
        );
        rejected = size + 1;
        size += 2;
      } else if (size - 1 > rejected && meets(size - 1)) size--;
      else return size;
    }
    return undefined;
  }

  /**
   * The cheapest of the homogeneous answers and of mixes of two laws. A mix is tried when it costs less than the
   * cheapest of them and may have the capacity.
   */
  async #cheapest(found: readonly NodeMix[]): Promise<NodeMix | undefined> {
    this.#phase = "mixing";
    const { seeds } = this.#spec;
    const ranked = found.slice().sort((left, right) => this.#price(left) - this.#price(right));
    const best = ranked[0];
    if (best === undefined) return undefined;
    const tries: NodeMix[] = [];
    for (const [index, left] of found.entries()) {
      for (const right of found.slice(index + 1)) tries.push(...this.#mixes(left, right, best));
    }
    tries.sort((left, right) => this.#price(left) - this.#price(right));
    const kept = tries.slice(0, MIXES_MAX);
    if (tries.length > kept.length) {
      this.#notes.push(`${tries.length - kept.length} dearer mixes were not tried.`);
    }
    for (const mix of kept) {
      await this.#runAll(this.#cases(mix, 1));
      if (this.#size(mix, 1).meets !== "yes") continue;
      await this.#runAll(this.#cases(mix, seeds));
      if (this.#size(mix, seeds).meets !== "yes") continue;
      const smaller = smallerMix(mix);
      if (smaller !== undefined) await this.#runAll(this.#cases(smaller, seeds));
      return mix;
    }
    return best;
  }

  #mixes(left: NodeMix, right: NodeMix, best: NodeMix): NodeMix[] {
    const [a] = left;
    const [b] = right;
    if (a === undefined || b === undefined) return [];
    const mixes: NodeMix[] = [];
    for (let ofA = 1; ofA < a.count; ofA++) {
      for (let ofB = 1; ofB < b.count; ofB++) {
        // One node fewer of either alone is too little: a mix must promise more than that.
        const promise = ofA / (a.count - 1) + ofB / (b.count - 1);
        const mix = [
          { law: a.law, count: ofA },
          { law: b.law, count: ofB },
        ];
        if (promise > 1 && this.#price(mix) < this.#price(best)) mixes.push(mix);
      }
    }
    return mixes;
  }

  #price(mix: NodeMix): number {
    return priceOf(mix, this.#spec.laws) ?? Number.POSITIVE_INFINITY;
  }

  // ---- what the answer is -----------------------------------------------------------------------

  #answer(mix: NodeMix): Answer {
    const nodes = nodesOf(mix);
    const { seeds, laws } = this.#spec;
    const smaller = smallerMix(mix);
    const below = smaller === undefined ? undefined : this.#sizeIfRun(smaller, seeds);
    return {
      kind: "nodes",
      mix,
      nodes,
      pricePerHour: priceOf(mix, laws),
      smaller:
        below === undefined
          ? null
          : { mix: below.mix, meets: below.meets === "unclear" ? "unclear" : "no" },
    };
  }

  /** Nothing tried was enough: what the largest size still missed, and whether more nodes would help at all. */
  #none(): Answer {
    const { laws, nodesMax, seeds, slo } = this.#spec;
    const reasons: string[] = [];
    for (const { law } of laws) {
      const mix = mixOf(law, nodesMax);
      const largest = this.#sizeIfRun(mix, seeds) ?? this.#size(mix, 1);
      const run = this.#recorded(mix);
      for (const [index, objective] of largest.objectives.entries()) {
        if (objective.state === "met") continue;
        const value = run.objectives[index] ?? undefined;
        const target = slo.objectives[index];
        if (target === undefined) continue;
        reasons.push(
          `${nodesMax} nodes of ${law.name}: ${valueText(target, value)} where ${objective.text} is asked`,
        );
      }
      if (largest.verdict !== "STABLE") {
        reasons.push(`${nodesMax} nodes of ${law.name}: the run is ${largest.verdict}`);
      }
      const undone = Object.entries(run.outcomes)
        .filter(([code]) => code !== "ok")
        .sort(([, left], [, right]) => right - left)
        .map(([code, count]) => `${code} ${count}`);
      if (undone.length > 0) {
        reasons.push(`${nodesMax} nodes of ${law.name}: not answered: ${undone.join(", ")}`);
      }
      const floor = this.#floor(law);
      if (floor !== undefined) reasons.push(floor);
    }
    return { kind: "none", reasons };
  }

  /** When halving the nodes changes nothing, no number of them helps. */
  #floor(law: StepLaw): string | undefined {
    const { nodesMax, slo } = this.#spec;
    const half = this.#done.get(keyOf(this.#caseOf(mixOf(law, Math.ceil(nodesMax / 2)), 0)));
    const run = this.#recorded(mixOf(law, nodesMax));
    // Of two sizes that are both far too small, neither says anything about a larger one.
    if (half === undefined || nodesMax < 2 || verdictOf(run.evidence) !== "STABLE")
      return undefined;
    for (const [index, objective] of slo.objectives.entries()) {
      const value = run.objectives[index] ?? null;
      const before = half.objectives[index] ?? null;
      if (value === null || before === null || isMet(objective, value)) continue;
      if (objective.metric === "attainment" ? value > before + 0.001 : value < 0.97 * before) {
        continue;
      }
      return (
        `${law.name}: ${objective.text} is not a question of the number of nodes: half as many give ` +
        `${valueText(objective, before)}, all of them ${valueText(objective, value)}`
      );
    }
    return undefined;
  }

  async #report(
    answer: Answer,
    lowerBound: LowerBound[],
    mix: NodeMix | null,
  ): Promise<PlanReport> {
    const { load, slo, provenance, laws, seeds, seed } = this.#spec;
    let headroom: Headroom | null = null;
    let curve: CurvePoint[] = [];
    let whatIfs: WhatIf[] = [];
    let timeline: PlanReport["timeline"] = null;
    let bottleneck = "";
    if (mix !== null && answer.kind === "nodes") {
      const statistics = await summarizeLoad(load);
      const rate = statistics.ratePerSecond ?? 0;
      this.#phase = "finding the knee";
      ({ headroom, curve } = await this.#knee(mix, rate));
      this.#phase = "asking what if";
      whatIfs = await this.#whatIfs(mix);
      const detailed = { ...this.#caseOf(mix, 0), withSeries: true };
      const [run] = await this.#runAll([detailed]);
      timeline = run?.series ?? null;
      bottleneck = this.#bottleneck(mix, lowerBound);
    }
    let wallMs = 0;
    let simulatedMs = 0;
    for (const run of this.#done.values()) {
      wallMs += run.wallMs;
      simulatedMs += run.evidence.durationMs;
    }
    const sizes = this.#sizes();
    return {
      kind: "plan",
      answer,
      slo: slo.text,
      sizes: sizes.filter((size) => size.mix.length === 1),
      mixes: laws.length === 1 ? [] : sizes.filter((size) => size.mix.length > 1),
      lowerBound,
      curve,
      headroom,
      bottleneck,
      whatIfs,
      timeline,
      load: await summarizeLoad(load),
      notes: this.#notes,
      provenance: {
        ...provenance,
        seeds: Array.from({ length: seeds }, (_, index) => seed + index),
        laws: laws.map(({ law }) => ({
          name: law.name,
          source: law.provenance,
          validated: law.validated,
          note: law.note,
          kvBlocks: law.kvBlocks,
          kvFrom: law.kvBlocksFrom,
        })),
      },
      wallMs,
      simulatedMs,
      runs: this.#done.size,
    };
  }

  /** Everything that was run of the plain load, by law and size, with as many seeds as it was run with. */
  #sizes(): SizeResult[] {
    const mixes = new Map<string, NodeMix>();
    const { seeds } = this.#spec;
    for (const key of this.#done.keys()) {
      const one = JSON.parse(key) as PlanCase;
      if (isPlain(one)) mixes.set(JSON.stringify(one.mix), one.mix);
    }
    const results = [...mixes.values()].map(
      (mix) => this.#sizeIfRun(mix, seeds) ?? this.#size(mix, 1),
    );
    return results.sort(
      (left, right) =>
        (left.mix[0]?.law ?? "").localeCompare(right.mix[0]?.law ?? "") || left.nodes - right.nodes,
    );
  }

  // ---- headroom ---------------------------------------------------------------------------------

  /** How much more load the answer takes, by one run each of the recorded load with more users. */
  async #knee(mix: NodeMix, rate: number): Promise<{ headroom: Headroom; curve: CurvePoint[] }> {
    const tried = new Map<number, CurvePoint>();
    const measure = async (factors: readonly number[]) => {
      const cases = factors.map((factor) => this.#loadCase(mix, factor));
      const runs = await this.#runAll(cases);
      factors.forEach((factor, index) => {
        const run = runs[index];
        if (run !== undefined) tried.set(factor, this.#point(factor, rate, run));
      });
    };
    const passes = (factor: number) => tried.get(factor)?.meets === true;
    await measure([0.4, 0.7, 1, 1.15, 1.4]);
    let factorMax = 1;
    let factorFails: number | null = null;
    const see = (factors: readonly number[]) => {
      for (const factor of factors) {
        if (factorFails !== null && factor >= factorFails) break;
        if (passes(factor)) factorMax = Math.max(factorMax, factor);
        else factorFails = factor;
      }
    };
    see([1.15, 1.4]);
    for (const next of [
      [1.8, 2.4],
      [3, FACTOR_MAX],
    ]) {
      if (factorFails !== null) break;
      await measure(next);
      see(next);
    }
    while (factorFails !== null && factorFails / factorMax > FACTOR_STEP) {
      const step: number = (factorFails - factorMax) / 3;
      const next = [rounded(factorMax + step), rounded(factorMax + 2 * step)];
      await measure(next);
      see(next);
    }
    const headroom: Headroom = {
      factorMax,
      factorFails,
      requestsPerSecondMax: factorMax * rate,
      exhausted: [1, 7, 14, 30].map((days) => ({
        days,
        growthPerDay: Math.expm1(Math.log(factorMax) / days),
      })),
    };
    const curve = [...tried.values()].sort((left, right) => left.factor - right.factor);
    return { headroom, curve };
  }

  #loadCase(mix: NodeMix, factor: number): PlanCase {
    const plain = this.#caseOf(mix, 0);
    return factor === 1 ? plain : { ...plain, load: { kind: "users", factor } };
  }

  #point(factor: number, rate: number, run: RunSummary): CurvePoint {
    return {
      factor,
      requestsPerSecond: factor * rate,
      attainment: run.attainment,
      ttftP50Ms: run.ttftMs?.p50 ?? null,
      ttftP99Ms: run.ttftMs?.p99 ?? null,
      e2eP99Ms: run.e2eMs?.p99 ?? null,
      utilization: run.evidence.utilization,
      verdict: verdictOf(run.evidence),
      meets: this.#keeps(run),
    };
  }

  // ---- what if ----------------------------------------------------------------------------------

  async #whatIfs(mix: NodeMix): Promise<WhatIf[]> {
    const asked = this.#questions(mix);
    // Each at the plan's size, and where the change may help also one node smaller.
    const first = asked.flatMap(({ change, helps }) => {
      if (typeof change === "string") return [];
      const smaller = helps ? smallerMix(mix) : undefined;
      return [mix, ...(smaller === undefined ? [] : [smaller])].map((size) => change(size));
    });
    await this.#runAll(first);
    const failed = asked.flatMap(({ change }) =>
      typeof change !== "string" && !this.#keeps(this.#ran(change(mix)))
        ? [change(largerMix(mix, 1)), change(largerMix(mix, 2))]
        : [],
    );
    await this.#runAll(failed.filter((one) => nodesOf(one.mix) <= this.#spec.nodesMax));
    return asked.map((question) => this.#whatIf(mix, question));
  }

  #whatIf(mix: NodeMix, { name, what, change, helps }: Question): WhatIf {
    const none = { value: null, meets: false, attainment: 0, nodes: null, atMost: false } as const;
    if (typeof change === "string") {
      return { name, change: what, ...none, verdict: "STABLE", skipped: change };
    }
    const run = this.#ran(change(mix));
    const meets = this.#keeps(run);
    let nodes: number | null = meets ? nodesOf(mix) : null;
    let atMost = false;
    const smaller = smallerMix(mix);
    if (meets && helps && smaller !== undefined && this.#keeps(this.#ran(change(smaller)))) {
      nodes = nodesOf(smaller);
      atMost = true;
    }
    for (const more of meets ? [] : [1, 2]) {
      const larger = this.#done.get(keyOf(change(largerMix(mix, more))));
      if (nodes === null && larger !== undefined && this.#keeps(larger)) {
        nodes = nodesOf(mix) + more;
      }
    }
    return {
      name,
      change: what,
      value: run.objectives[0] ?? null,
      meets,
      verdict: verdictOf(run.evidence),
      attainment: run.attainment,
      nodes,
      atMost,
      skipped: null,
    };
  }

  #questions(mix: NodeMix): Question[] {
    const { options, load } = this.#spec;
    const alter = (change: Partial<PlanCase>) => (size: NodeMix) => ({
      ...this.#caseOf(size, 0),
      ...change,
    });
    const smaller = smallerMix(mix);
    const questions: Question[] = [
      {
        name: "one node down",
        what: "one node fewer for the whole run",
        helps: false,
        change:
          smaller === undefined
            ? "the plan has one node only: without it nothing is served"
            : (size) => this.#caseOf(smallerMix(size) ?? size, 0),
      },
      {
        name: "+30 % users",
        what: "1.3 times the users, other days of the same load on top",
        helps: false,
        change: alter({ load: { kind: "users", factor: 1.3 } }),
      },
      {
        name: "+30 % faster",
        what: "the same requests in 1/1.3 of the time: bursts grow, too",
        helps: false,
        change: alter({ load: { kind: "compressed", factor: 1.3 } }),
      },
      {
        name: "burst × 3",
        what: "three times the requests for one minute in the middle",
        helps: false,
        change: alter({ load: this.#burst() }),
      },
      ...this.#lawQuestions(mix, alter),
      ...this.#cacheQuestions(load, options, alter),
      ...this.#limitQuestions(options, alter),
    ];
    const strategy = options.router?.strategy ?? "headroom";
    const policies = [
      "headroom",
      "round_robin",
      "least_inflight",
      "power_of_two",
      "peak_ewma",
      "prequal",
    ] as const;
    for (const policy of policies) {
      if (policy === strategy) continue;
      questions.push({
        name: policy,
        what: `routing by ${policy} instead of ${strategy}`,
        helps: true,
        change:
          nodesOf(mix) === 1
            ? "with one node there is nothing to route"
            : alter({ options: { router: { strategy: policy } } }),
      });
    }
    return questions;
  }

  #burst(): LoadChange {
    const middleUs = Math.round(this.#durationUs / 2);
    return { kind: "burst", factor: 3, fromUs: middleUs, toUs: middleUs + 60_000_000 };
  }

  #lawQuestions(mix: NodeMix, alter: Alter): Question[] {
    const laws = this.#spec.laws.filter(({ law }) => mix.some((group) => group.law === law.name));
    const unsure = laws.some(({ law }) => !law.validated);
    const questions: Question[] = [
      {
        name: unsure ? "nodes 25 % slower" : "nodes 5 % slower",
        what: unsure
          ? "every step takes 1.25 times as long: the law is from profiles only, and real nodes are 10…25 % slower"
          : "every step takes 1.05 times as long: the law's largest error at a percentile when validated",
        helps: false,
        change: alter({ slowFactor: unsure ? 1.25 : 1.05 }),
      },
    ];
    if (laws.some(({ law }) => law.kvBlocksFrom === "formula")) {
      questions.push({
        name: "KV memory −20 %",
        what: "a fifth fewer KV blocks: their number is from a formula that was 31 % off on one card",
        helps: false,
        change: alter({ kvFactor: 0.8 }),
      });
    }
    return questions;
  }

  #cacheQuestions(load: readonly TraceRequest[], options: OptionsInput, alter: Alter): Question[] {
    const isOn = options.cache?.enabled ?? true;
    const seen = new Set<string>();
    let repeats = 0;
    for (const { question } of load) {
      if (question === undefined) continue;
      if (seen.has(question)) repeats++;
      seen.add(question);
    }
    return [
      {
        name: isOn ? "cache off" : "cache on (exact)",
        what: isOn ? "every request goes to a node" : "repeated requests are answered from memory",
        helps: true,
        change:
          repeats === 0
            ? seen.size === 0
              ? "the trace does not say which requests are the same, so none is ever a hit"
              : "no request of the trace repeats another"
            : alter({ options: { cache: { enabled: !isOn } } }),
      },
    ];
  }

  #limitQuestions(options: OptionsInput, alter: Alter): Question[] {
    const questions: Question[] = [
      {
        name: "longer queue",
        what: "the gateway lets 4 times as many requests wait before it refuses",
        helps: true,
        change: alter({
          options: {
            queue: {
              perKeyMax: 4 * (options.queue?.perKeyMax ?? 50),
              poolSecondsMax: 4 * (options.queue?.poolSecondsMax ?? 5),
            },
          },
        }),
      },
    ];
    const keys = options.keys ?? [];
    const limits = [options.defaultLimits, ...keys.map((key) => key.limits)];
    if (limits.some((one) => Object.keys(one ?? {}).length > 0)) {
      questions.push({
        name: "no limits",
        what: "no request or token limits per key",
        helps: true,
        change: alter({
          options: { defaultLimits: {}, keys: keys.map((key) => ({ ...key, limits: {} })) },
        }),
      });
    }
    return questions;
  }

  // ---- the bottleneck ---------------------------------------------------------------------------

  /** What gives way first, told from the next smaller size, or from the answer when there is none. */
  #bottleneck(mix: NodeMix, bounds: readonly LowerBound[]): string {
    const smaller = smallerMix(mix);
    const below =
      smaller === undefined ? undefined : this.#done.get(keyOf(this.#caseOf(smaller, 0)));
    const shown = below === undefined || smaller === undefined ? mix : smaller;
    // Shares of a mix add up to what each law's nodes could do alone.
    let alone = 0;
    for (const { law, count } of shown) {
      alone += count / (bounds.find((bound) => bound.law === law)?.busyMean ?? count);
    }
    const fewer = nodesOf(shown);
    const where =
      below === undefined ? "As planned" : `With ${fewer} node${fewer === 1 ? "" : "s"}`;
    return `${where}: ${bottleneckOf(below ?? this.#recorded(mix), Math.min(1, 1 / alone))}`;
  }

  // ---- runs -------------------------------------------------------------------------------------

  #caseOf(mix: NodeMix, draw: number): PlanCase {
    return {
      mix,
      draw,
      load: { kind: "none" },
      options: null,
      slowFactor: 1,
      kvFactor: 1,
      withSeries: false,
    };
  }

  #cases(mix: NodeMix, seeds: number): PlanCase[] {
    return Array.from({ length: seeds }, (_, draw) => this.#caseOf(mix, draw));
  }

  async #runSizes(law: StepLaw, sizes: readonly number[], seeds: number): Promise<void> {
    await this.#runAll(sizes.flatMap((size) => this.#cases(mixOf(law, size), seeds)));
  }

  /** Runs those not run yet, all at once. */
  async #runAll(cases: readonly PlanCase[]): Promise<RunSummary[]> {
    const missing = new Map<string, PlanCase>();
    for (const one of cases) if (!this.#done.has(keyOf(one))) missing.set(keyOf(one), one);
    if (missing.size > 0) {
      this.#planned = this.#done.size + missing.size;
      this.#tell();
      const runs = await this.#run([...missing.values()]);
      [...missing.keys()].forEach((key, index) => {
        const run = runs[index];
        if (run === undefined) throw new Error("every case has a run");
        this.#done.set(key, run);
      });
      this.#tell();
    }
    return cases.map((one) => this.#ran(one));
  }

  #tell(): void {
    this.#onProgress({ phase: this.#phase, runs: this.#done.size, planned: this.#planned });
  }

  #ran(one: PlanCase): RunSummary {
    const run = this.#done.get(keyOf(one));
    if (run === undefined) throw new Error(`a run was read before it was made: ${keyOf(one)}`);
    return run;
  }

  #recorded(mix: NodeMix): RunSummary {
    return this.#ran(this.#caseOf(mix, 0));
  }

  #sizeIfRun(mix: NodeMix, seeds: number): SizeResult | undefined {
    const isRun = this.#cases(mix, seeds).every((one) => this.#done.has(keyOf(one)));
    return isRun ? this.#size(mix, seeds) : undefined;
  }

  #size(mix: NodeMix, seeds: number): SizeResult {
    const runs = this.#cases(mix, seeds).map((one) => this.#ran(one));
    return sizeResult(mix, runs, this.#spec.slo, priceOf(mix, this.#spec.laws));
  }

  /** One run keeps every objective, answers nearly all requests, and leaves no backlog. */
  #keeps(run: RunSummary): boolean {
    return sizeResult([], [run], this.#spec.slo, null).meets === "yes";
  }
}

type Alter = (change: Partial<PlanCase>) => (size: NodeMix) => PlanCase;

type Question = {
  name: string;
  what: string;
  /** The change may save nodes, so the next smaller size is tried as well. */
  helps: boolean;
  /** The case at a size, or why it is not run. */
  change: ((size: NodeMix) => PlanCase) | string;
};

/** What the runs of one size say together. */
export function sizeResult(
  mix: NodeMix,
  runs: readonly RunSummary[],
  slo: Slo,
  pricePerHour: number | null,
): SizeResult {
  const objectives = slo.objectives.map((objective, index): ObjectiveResult => {
    const values = runs.map((run) => run.objectives[index] ?? null);
    const known = values.filter((value) => value !== null);
    const shared = {
      name: objective.name,
      text: objective.text,
      comparison: objective.comparison,
      limit: limitOf(objective),
      unit: objective.kind === "latency" ? ("ms" as const) : ("share" as const),
    };
    if (known.length < values.length || known.length === 0) {
      return { ...shared, interval: null, state: "missed" };
    }
    const interval = intervalOf(known);
    const isUpper = objective.comparison === "<=" || objective.comparison === "<";
    const worst = isUpper ? interval.high : interval.low;
    const isKept = isMet(objective, interval.mean);
    const state = isMet(objective, worst) ? "met" : isKept ? "unclear" : "missed";
    return { ...shared, interval, state };
  });
  const settled = runs.every(
    ({ evidence }) =>
      completedShare(evidence) >= COMPLETED_SHARE_MIN && backlogGrowth(evidence) === undefined,
  );
  const states = objectives.map(({ state }) => state);
  const mean = (of: (run: RunSummary) => number) => intervalOf(runs.map(of)).mean;
  const share = (of: (run: RunSummary) => number) =>
    mean((run) => (run.evidence.arrived === 0 ? 0 : of(run) / run.evidence.arrived));
  const rate = (run: RunSummary) =>
    run.evidence.durationMs === 0 ? 0 : (run.evidence.arrived * 1000) / run.evidence.durationMs;
  return {
    mix,
    nodes: nodesOf(mix),
    runs: runs.length,
    meets:
      !settled || states.includes("missed") ? "no" : states.includes("unclear") ? "unclear" : "yes",
    objectives,
    verdict: worstVerdict(runs.map(({ evidence }) => verdictOf(evidence))),
    ttftMs: meanSummary(runs.map((run) => run.ttftMs)),
    tpotMs: meanSummary(runs.map((run) => run.tpotMs)),
    e2eMs: meanSummary(runs.map((run) => run.e2eMs)),
    attainment: mean((run) => run.attainment),
    goodputRequestsPerSecond: mean((run) => run.attainment * rate(run)),
    utilization: mean((run) => run.evidence.utilization),
    kvPeak: Math.max(...runs.map((run) => run.evidence.kvPeak)),
    preemptions: mean((run) => run.preemptions),
    refusedShare: share((run) => run.evidence.refused),
    failedShare: share((run) => run.evidence.failed + run.evidence.unfinished),
    retries: mean((run) => run.retries),
    pricePerHour,
  };
}

const severity: Readonly<Record<Verdict, number>> = {
  STABLE: 0,
  "TOO-SHORT": 1,
  BACKLOGGED: 2,
  OVERLOADED: 3,
};

function worstVerdict(verdicts: readonly Verdict[]): Verdict {
  let worst: Verdict = "STABLE";
  for (const verdict of verdicts) if (severity[verdict] > severity[worst]) worst = verdict;
  return worst;
}

function meanSummary(all: readonly RunSummary["ttftMs"][]): RunSummary["ttftMs"] {
  const known = all.filter((one) => one !== null);
  if (known.length === 0) return null;
  const mean = (of: (one: (typeof known)[number]) => number) => intervalOf(known.map(of)).mean;
  return {
    mean: mean((one) => one.mean),
    p50: mean((one) => one.p50),
    p90: mean((one) => one.p90),
    p99: mean((one) => one.p99),
    max: mean((one) => one.max),
  };
}

/**
 * One sentence: what limits this run, with the figures that say so. `idealShare`: of the nodes' time that even perfect
 * batches would take; how long nodes had any work at all says little, since a batch of one occupies a node, too.
 */
export function bottleneckOf(run: RunSummary, idealShare: number): string {
  const { evidence } = run;
  const arrived = Math.max(1, evidence.arrived);
  const ideal = `even perfect batches would take ${percentText(idealShare)} of the nodes' time`;
  const limited = countOf(run.outcomes, /^(rate_limit|quota)/);
  if (limited > 0.005 * arrived) {
    return `the rate limit gives way first: it refuses ${percentText(limited / arrived)} of the requests (${ideal}).`;
  }
  const waits = run.queueMs?.p99 ?? 0;
  const first = run.ttftMs?.p99 ?? 0;
  const isQueued = waits > 0.5 * first;
  const queue = `${durationText(waits)} of the p99 TTFT of ${durationText(first)} is waiting in the gateway`;
  const peak = `it peaks at ${percentText(evidence.kvPeak)} with ${Math.round(run.preemptions)} preemptions`;
  const rest = `${ideal}${isQueued ? `; ${queue}` : ""}`;
  if (run.preemptions > 0.02 * evidence.completed || evidence.kvPeak >= FULL_KV) {
    return `KV memory gives way first: ${peak}; ${rest}.`;
  }
  if (idealShare >= FULL_COMPUTE) return `compute gives way first: ${rest}.`;
  if (run.imbalance > IMBALANCE_MAX) {
    return (
      `the spread over the nodes gives way first: the busiest makes ${run.imbalance.toFixed(2)} times the mean of ` +
      `the tokens; look at the routing policy and at how fresh its signals are (${ideal}).`
    );
  }
  if (isQueued) return `the queue gives way first: ${queue} for a node that takes more; ${ideal}.`;
  return `nothing is full (${ideal}): single bursts and long prompts make the tail.`;
}

const FULL_KV = 0.97;
/** Of perfect batches; real ones are smaller, so nodes are out of breath well before 1. */
const FULL_COMPUTE = 0.65;
const IMBALANCE_MAX = 1.3;

function countOf(outcomes: RunSummary["outcomes"], codes: RegExp): number {
  let count = 0;
  for (const [code, requests] of Object.entries(outcomes)) if (codes.test(code)) count += requests;
  return count;
}

/**
 * Nodes under perfect scaling: every node always runs the largest batch that its seats and KV memory allow, prompts
 * and answers in exactly the load's proportion, nobody waits, and no block of a prompt is computed twice.
 */
export function lowerBoundOf(law: StepLaw, load: readonly TraceRequest[]): LowerBound {
  const questions = new Set<string>();
  const blocks = new Set<number>();
  const total = new Work();
  const minutes: Work[] = [];
  for (const request of load) {
    if (request.question !== undefined) {
      if (questions.has(request.question)) continue; // An exact cache would answer.
      questions.add(request.question);
    }
    let known = 0;
    for (const block of request.prefix ?? []) {
      if (!blocks.has(block)) break;
      known++;
    }
    for (const block of request.prefix ?? []) blocks.add(block);
    const cached = Math.min(known * (request.blockTokens ?? 0), request.inputTokens - 1);
    const minute = Math.floor(request.atUs / 60_000_000);
    while (minutes.length <= minute) minutes.push(new Work());
    total.add(request, Math.max(0, cached));
    minutes[minute]?.add(request, Math.max(0, cached));
  }
  const durationSeconds = Math.max(1, (load.at(-1)?.atUs ?? 0) / 1e6);
  const busyMean = total.nodeSeconds(law) / durationSeconds;
  // The last minute may be partial: it holds less, never more.
  const peak = Math.max(
    ...minutes.map((work) => work.nodeSeconds(law) / Math.min(60, durationSeconds)),
  );
  return {
    law: law.name,
    nodesMean: Math.max(1, Math.ceil(busyMean)),
    nodesPeakMinute: Math.max(1, Math.ceil(peak)),
    busyMean,
  };
}

/** Sums over requests of what steps cost by. */
class Work {
  #requests = 0;
  #prefillTokens = 0;
  #prefillPairs = 0;
  #decodes = 0;
  #contextReads = 0;

  add({ inputTokens, outputTokens }: TraceRequest, cachedTokens: number): void {
    // The last chunk of the prompt makes the first token.
    const decodes = Math.max(0, outputTokens - 1);
    const prefill = Math.max(1, inputTokens - cachedTokens);
    this.#requests++;
    this.#prefillTokens += prefill;
    this.#prefillPairs += prefill * (cachedTokens + prefill / 2);
    this.#decodes += decodes;
    this.#contextReads += decodes * (inputTokens + decodes / 2);
  }

  nodeSeconds(law: StepLaw): number {
    if (this.#requests === 0) return 0;
    const { batchedTokensMax, sequencesMax, kvBlocks } = law;
    const perDecode = this.#prefillTokens / Math.max(1e-9, this.#decodes);
    const context = this.#contextReads / Math.max(1e-9, this.#decodes);
    // Decodes of one step: by seats, by memory, and by the tokens of a step with the prompts in proportion.
    const batch = Math.min(
      sequencesMax,
      (kvBlocks * KV_BLOCK_TOKENS) / Math.max(1, context),
      batchedTokensMax / (1 + perDecode),
    );
    const steps =
      this.#decodes > 0 ? this.#decodes / batch : this.#prefillTokens / batchedTokensMax;
    const each = (sum: number) => sum / steps;
    const stepUs = rawStepUs(
      law,
      each(this.#decodes),
      each(this.#contextReads),
      each(this.#prefillTokens),
      each(this.#requests),
      each(this.#prefillPairs),
    );
    return (steps * stepUs) / 1e6;
  }
}

function mixOf(law: StepLaw, count: number): NodeMix {
  return [{ law: law.name, count }];
}

/** Nodes of all laws together. */
export function nodesOf(mix: NodeMix): number {
  let nodes = 0;
  for (const { count } of mix) nodes += count;
  return nodes;
}

/** One node fewer, of the law with the most nodes; undefined for a single node. */
function smallerMix(mix: NodeMix): NodeMix | undefined {
  if (nodesOf(mix) <= 1) return undefined;
  const most = Math.max(...mix.map(({ count }) => count));
  const at = mix.findIndex(({ count }) => count === most);
  return mix
    .map((group, index) => (index === at ? { ...group, count: group.count - 1 } : group))
    .filter(({ count }) => count > 0);
}

function largerMix(mix: NodeMix, by: number): NodeMix {
  const most = Math.max(...mix.map(({ count }) => count));
  const at = mix.findIndex(({ count }) => count === most);
  return mix.map((group, index) => (index === at ? { ...group, count: group.count + by } : group));
}

/** Per hour; null when a law has no price. */
function priceOf(mix: NodeMix, laws: readonly PricedLaw[]): number | null {
  let price = 0;
  for (const { law, count } of mix) {
    const each = laws.find((candidate) => candidate.law.name === law)?.pricePerHour;
    if (each === undefined || each === null) return null;
    price += each * count;
  }
  return price;
}

function keyOf(one: PlanCase): string {
  return JSON.stringify(one);
}

function isPlain(one: PlanCase): boolean {
  return (
    one.load.kind === "none" && one.options === null && one.slowFactor === 1 && one.kvFactor === 1
  );
}

function rounded(factor: number): number {
  return Math.round(factor * 1000) / 1000;
}
