/**
 * Plays a scenario and says what broke; and reduces one that breaks to the least that still does. Pure.
 *
 *   faults and load ──faultMs──▶ light load, no faults ──▶ all must be well ──▶ light load ──▶ nothing runs: all is zero
 *                                └──── recoveryMs ─────┘                     └─ SERVED_MS ─┘ └──── drain ────┘
 *
 * Safety is checked all along, liveness only after the faults. A reduction keeps the invariant that broke, not the
 * exact story: it takes away faults first, then requests, then what else can be simpler, each as long as the same
 * invariant still breaks, within a bound on runs.
 */
import { limiterDefaults } from "../actors/rate-limiter.ts";
import { parseOptions } from "../transport/options.ts";
import { type CanaryName, canaries } from "./canaries.ts";
import { Checkers, type Coverage, covered, type Invariant, type Violation } from "./checkers.ts";
import { type Fault, parseFaults } from "./faults.ts";
import { lawByName, type StepLaw } from "./laws.ts";
import {
  drawScenario,
  type Profile,
  type Scenario,
  ScenarioError,
  type ScenarioRequest,
} from "./scenario.ts";
import { type Instruments, Simulation, type SimulationSpec } from "./simulator.ts";
import type { TraceRequest } from "./trace-rows.ts";

export type ScenarioResult = {
  violations: readonly Violation[];
  /** Equal for equal runs. */
  hash: string;
  messages: number;
  simulatedMs: number;
  /** Sent by clients, with those of the quiet period and those that clients sent again. */
  requests: number;
  /** Faults that began, by kind. */
  faults: Readonly<Record<string, number>>;
  coverage: Coverage;
};

const LAW = "llama-3.1-8b/h100";
/** A model that loads fast: a run need not wait a minute for it. */
const START_UP_US = 2_000_000;
const PREFIX_BLOCK_TOKENS = 256;
/** How long every request must then be served. */
const SERVED_MS = 10_000;
const QUIET_OUTPUT_TOKENS = 20;
const TICK_US = 250_000;
/** After the last request has ended, for what is still under way in messages. */
const SETTLE_US = 3_000_000;
const LAW_NODES: StepLaw = { ...lawByName(LAW), startUpUs: START_UP_US };

/** Plays the scenario, with the planted bug of a canary if one is named. Throws ScenarioError. */
export function runScenario(scenario: Scenario, canary?: CanaryName): ScenarioResult {
  const faults = scenario.faults.flatMap(parseFaults);
  const sent = new Map<TraceRequest, ScenarioRequest>();
  const quietFromUs = scenario.faultMs * 1000;
  const recoveredByUs = quietFromUs + scenario.quiet.recoveryMs * 1000;
  let simulation: Simulation | undefined;
  const checkers = new Checkers({
    ...checkedOptions(scenario),
    nowUs: () => simulation?.nowUs ?? 0,
    sent,
    faults,
    quietFromUs,
    recoveredByUs,
  });
  const onSent: Instruments["onSent"] = ({ requestId }, request) => {
    const { leaveAfterMs } = sent.get(request) ?? {};
    if (leaveAfterMs === undefined) return;
    simulation?.clock.schedule(leaveAfterMs * 1000, () => simulation?.leave(requestId));
  };
  const bug = canary === undefined ? {} : canaries[canary].plant();
  try {
    simulation = new Simulation(
      specOf(scenario, faults, combined(bug, checkers.instruments, onSent)),
    );
    const watch = () => {
      if (simulation === undefined) return;
      const { nodes } = simulation;
      checkers.onTick(nodes, (gateway, node) => simulation?.isReachable(gateway, node) === true);
      simulation.clock.schedule(TICK_US, watch);
    };
    simulation.clock.schedule(TICK_US, watch);
    for (const request of [...scenario.requests, ...quietRequests(scenario)]) {
      const isDue = request.atMs * 1000 >= recoveredByUs;
      if (isDue && simulation.nowUs < recoveredByUs) {
        simulation.runUntil(recoveredByUs);
        checkers.onRecoveryDue(simulation.audit(), simulation.nodes);
      }
      const traced = tracedOf(request);
      sent.set(traced, request);
      simulation.offer(traced);
    }
    const result = simulation.finish();
    simulation.runUntil(simulation.nowUs + SETTLE_US);
    checkers.onEnd(simulation.audit(), simulation.nodes, simulation.open);
    return {
      violations: checkers.violations,
      hash: result.hash,
      messages: result.messages,
      simulatedMs: simulation.nowUs / 1000,
      requests: result.counts.arrived,
      faults: countKinds(faults),
      coverage: checkers.coverage,
    };
  } catch (error) {
    if (simulation === undefined) throw new ScenarioError(messageOf(error));
    // A process gave up, or a promise of the simulator broke: as bad as any other end.
    const violation: Violation = {
      invariant: "no-crash",
      atMs: simulation.nowUs / 1000,
      detail: `the run broke off: ${error instanceof Error ? (error.stack ?? "") : String(error)}`,
    };
    return {
      violations: [...checkers.violations, violation],
      hash: simulation.scheduler.hash,
      messages: simulation.scheduler.handled,
      simulatedMs: simulation.nowUs / 1000,
      requests: sent.size,
      faults: countKinds(faults),
      coverage: checkers.coverage,
    };
  }
}

function checkedOptions(scenario: Scenario) {
  const parsed = parseOptions({ ...scenario.options, nodes: [{ url: "http://simulated:8000" }] });
  if (!parsed.ok) {
    const [problem] = parsed.problems;
    throw new ScenarioError(`options.${problem?.path}: ${problem?.message}`);
  }
  const { retry, circuit, keys } = parsed.options;
  return {
    attemptsMax: retry.attemptsMax,
    halfOpenPermits: circuit.halfOpenPermits,
    cachedTokenWeight: limiterDefaults.cachedTokenWeight,
    tenant: keys.length === 0 ? "local" : undefined,
  };
}

function specOf(
  { nodes, options, gateways, seed, clients, hasStore }: Scenario,
  faults: readonly Fault[],
  instruments: Instruments,
): SimulationSpec {
  return {
    nodes: nodes.map(({ seats, ...node }) => ({
      ...node,
      law: { ...LAW_NODES, sequencesMax: seats },
    })),
    options,
    gateways,
    seed,
    faults,
    clients,
    hasStore,
    prefixBlockTokens: PREFIX_BLOCK_TOKENS,
    instruments,
  };
}

function tracedOf(request: ScenarioRequest): TraceRequest {
  const { atMs, tenant, model, system, params, text, inputTokens, outputTokens } = request;
  return {
    atUs: atMs * 1000,
    inputTokens,
    outputTokens,
    model,
    question: JSON.stringify([system, params, text]),
    ...(tenant !== undefined && { tenant }),
    ...(request.maxTokens !== undefined && { maxTokens: request.maxTokens }),
    ...(request.session !== undefined && { session: request.session }),
  };
}

/** Of every tenant and model in turn, evenly. */
function quietRequests({ options, nodes, faultMs, quiet }: Scenario): ScenarioRequest[] {
  const tenants = (options.keys ?? []).map(({ tenant }) => tenant);
  const models = [...new Set(nodes.flatMap((node) => node.models))];
  const count = ((quiet.recoveryMs + SERVED_MS) / 1000) * quiet.perSecond;
  return Array.from({ length: count }, (_, index) => {
    const tenant = tenants[index % Math.max(1, tenants.length)];
    return {
      atMs: faultMs + Math.round((index * 1000) / quiet.perSecond),
      ...(tenant !== undefined && { tenant }),
      model: models[(index >> 1) % models.length] ?? "",
      system: "",
      params: "",
      text: `asked in the quiet, ${index}`,
      inputTokens: quiet.inputTokens,
      outputTokens: QUIET_OUTPUT_TOKENS,
      ...(quiet.isOneSession && { session: "quiet" }),
      cacheRead: true,
      cacheWrite: true,
      stream: true,
    };
  });
}

/** The bug lies inside: checkers see what comes of it. */
function combined(
  bug: Instruments,
  checkers: Instruments,
  onSent: NonNullable<Instruments["onSent"]>,
): Instruments {
  const { wrap: plant } = bug;
  const { wrap: watch } = checkers;
  return {
    ...checkers,
    onSent: (facts, request, gateway) => {
      checkers.onSent?.(facts, request, gateway);
      bug.onSent?.(facts, request, gateway);
      onSent(facts, request, gateway);
    },
    wrap: (path, actor) => {
      const planted = plant?.(path, actor) ?? actor;
      return watch?.(path, planted) ?? planted;
    },
    ...(bug.makeNodeModel !== undefined && { makeNodeModel: bug.makeNodeModel }),
  };
}

function countKinds(faults: readonly Fault[]): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const { kind } of faults) counts[kind] = (counts[kind] ?? 0) + 1;
  return counts;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

// ---- reducing -----------------------------------------------------------------------------------------

export type Reduction = {
  scenario: Scenario;
  violation: Violation;
  runs: number;
};

/**
 * The least scenario found, within `runsMax` runs, in which the same invariant breaks.
 * @param onRun told after each run
 */
export function reduceScenario(
  scenario: Scenario,
  invariant: Invariant,
  runsMax: number,
  canary?: CanaryName,
  onRun: (runs: number, least: Scenario) => void = () => {},
): Reduction | undefined {
  const reducer = new Reducer(invariant, runsMax, canary, onRun);
  if (!reducer.tries(scenario)) return undefined;
  reducer.shrink("faults");
  reducer.shrink("requests");
  reducer.simplify();
  reducer.shrink("faults"); // What a request needed, another may not.
  return reducer.reduction();
}

class Reducer {
  readonly #invariant: Invariant;
  readonly #runsMax: number;
  readonly #canary: CanaryName | undefined;
  readonly #onRun: (runs: number, least: Scenario) => void;
  #runs = 0;
  #least: { scenario: Scenario; violation: Violation } | undefined;

  constructor(
    invariant: Invariant,
    runsMax: number,
    canary: CanaryName | undefined,
    onRun: (runs: number, least: Scenario) => void,
  ) {
    this.#invariant = invariant;
    this.#runsMax = runsMax;
    this.#canary = canary;
    this.#onRun = onRun;
  }

  reduction(): Reduction | undefined {
    return this.#least === undefined ? undefined : { ...this.#least, runs: this.#runs };
  }

  /** True, and the new least, if the invariant still breaks. */
  tries(scenario: Scenario): boolean {
    if (this.#runs >= this.#runsMax) return false;
    this.#runs++;
    const { violations } = runScenario(scenario, this.#canary);
    const violation = violations.find((each) => each.invariant === this.#invariant);
    if (violation !== undefined) this.#least = { scenario, violation };
    this.#onRun(this.#runs, this.#least?.scenario ?? scenario);
    return violation !== undefined;
  }

  /** Delta debugging (Zeller's ddmin): nothing, then halves, quarters … and their complements. */
  shrink(list: "faults" | "requests"): void {
    const least = this.#least?.scenario;
    if (least === undefined) return;
    let items: readonly unknown[] = least[list];
    if (items.length === 0) return;
    if (this.#triesWith(list, [])) return;
    let parts = 2;
    while (items.length > 1 && this.#runs < this.#runsMax) {
      const size = Math.ceil(items.length / parts);
      let smaller: readonly unknown[] | undefined;
      for (let from = 0; from < items.length && smaller === undefined; from += size) {
        const part = items.slice(from, from + size);
        const rest = [...items.slice(0, from), ...items.slice(from + size)];
        if (parts === 2 || part.length <= rest.length) {
          if (this.#triesWith(list, part)) smaller = part;
          else if (parts > 2 && this.#triesWith(list, rest)) smaller = rest;
        }
      }
      if (smaller !== undefined) {
        parts = smaller.length < items.length / 2 + 1 ? 2 : Math.max(2, parts - 1);
        items = smaller;
      } else if (parts >= items.length) {
        return;
      } else {
        parts = Math.min(items.length, parts * 2);
      }
    }
  }

  #triesWith(list: "faults" | "requests", items: readonly unknown[]): boolean {
    const least = this.#least?.scenario;
    return least !== undefined && this.tries({ ...least, [list]: items });
  }

  /** One process, no retries of clients, no store, no limits: whatever is not needed. */
  simplify(): void {
    const changes: ((scenario: Scenario) => Scenario)[] = [
      (scenario) => ({ ...scenario, gateways: 1 }),
      (scenario) => ({ ...scenario, clients: {} }),
      (scenario) => ({ ...scenario, hasStore: false }),
      (scenario) => ({
        ...scenario,
        options: { ...scenario.options, keys: [], defaultLimits: {} },
      }),
      (scenario) => ({
        ...scenario,
        nodes: scenario.nodes.map((node) => ({ ...node, slowFactor: 1, prefixCacheTokens: 0 })),
      }),
    ];
    for (const change of changes) {
      const least = this.#least?.scenario;
      if (least === undefined) return;
      const simpler = change(least);
      if (JSON.stringify(simpler) !== JSON.stringify(least) && isPlayable(simpler)) {
        this.tries(simpler);
      }
    }
  }
}

/** Fewer gateways may leave a fault without its subject. */
function isPlayable({ faults, gateways, hasStore }: Scenario): boolean {
  return faults.every((text) => {
    const named = [...text.matchAll(/\bgw-(\d+)/g)].map(([, digits]) => Number(digits));
    return named.every((index) => index <= gateways) && (hasStore || !text.startsWith("store"));
  });
}

// ---- canaries -----------------------------------------------------------------------------------------

export type Catch = Reduction & { seed: number; seedsTried: number };

/** Plays seeds from `seed` on until the planted bug is caught, at most `seedsMax`, and reduces what caught it. */
export function catchCanary(
  name: CanaryName,
  bounds: { seed: number; seedsMax: number; runsMax: number; profile: Profile },
): Catch | undefined {
  const { breaks } = canaries[name];
  for (let tried = 1; tried <= bounds.seedsMax; tried++) {
    const seed = bounds.seed + tried - 1;
    const scenario = drawScenario(seed, bounds.profile);
    const { violations } = runScenario(scenario, name);
    if (!violations.some(({ invariant }) => invariant === breaks)) continue;
    const reduction = reduceScenario(scenario, breaks, bounds.runsMax, name);
    return reduction === undefined ? undefined : { ...reduction, seed, seedsTried: tried };
  }
  return undefined;
}

// ---- campaigns ----------------------------------------------------------------------------------------

/** What many runs came to. */
export class Campaign {
  seeds = 0;
  requests = 0;
  messages = 0;
  simulatedMs = 0;
  violations = 0;
  readonly faults = new Map<string, number>();
  readonly coverage = new Map<string, number>(covered.map((name) => [name, 0]));

  add(result: ScenarioResult): void {
    this.seeds++;
    this.requests += result.requests;
    this.messages += result.messages;
    this.simulatedMs += result.simulatedMs;
    if (result.violations.length > 0) this.violations++;
    for (const [kind, count] of Object.entries(result.faults)) {
      this.faults.set(kind, (this.faults.get(kind) ?? 0) + count);
    }
    for (const name of covered) {
      this.coverage.set(name, (this.coverage.get(name) ?? 0) + result.coverage[name]);
    }
  }

  get faultsTotal(): number {
    return [...this.faults.values()].reduce((sum, count) => sum + count, 0);
  }
}
