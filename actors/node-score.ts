/**
 * Which node of a pool takes a request: filter → score → pick. Pure: time and randomness are passed in.
 *
 * `NodeView` is one node as a router sees it: the latest snapshot, flattened, plus what the router itself has
 * asked of the node since. `Field` is a pool of them; its `filter` finds who may be chosen, and a `Strategy`
 * picks one. Picking again after a denial, with the denying node in `wanted.denied`, yields the next of the order:
 * no order is ever built, since each denial brings a fresh snapshot that may change it.
 *
 * The filter has hard gates (the node would deny anyway, or must not be asked) and soft ones (signals that may
 * be wrong). When fewer than half of the candidates pass, the soft ones are ignored: a balancer that believes
 * every node is bad is more likely wrong than right. A full node counts as passing there: it works; counting
 * it as lost would switch the KV gate off under the very load that it is for.
 *
 * One pass over the pool per decision, and one or two over the eligible; nothing is sorted and nothing is
 * allocated in proportion to the pool. `Field` keeps its scratch arrays between decisions, so a field's figures
 * belong to its latest `filter`.
 */
import { unreachable } from "../runtime/actor.ts";
import type { CandidateFact, CircuitState, NodeId, NodeSnapshot } from "./protocol.ts";

/** How a node can be chosen; the first is the default. */
export const strategyNames = [
  "headroom",
  "round_robin",
  "least_inflight",
  "power_of_two",
  "peak_ewma",
  "prequal",
  "article",
] as const;
/** One of `strategyNames`. */
export type StrategyName = (typeof strategyNames)[number];

export type RankingOptions = {
  /** Default headroom; the others are for comparison. */
  strategy: StrategyName;
  /** `article`: its terms on one scale and its weight in use; default false = the article's sum exactly. */
  articleNormalised: boolean;
  /** A key stays on its node up to this multiple of the node's fair share of the load, ≥ 1; default 1.5. */
  affinityLoadFactor: number;
  /** Share of keyed requests that skip affinity, 0..1, so that a once slow node is measured again; default 0.01. */
  exploreRatio: number;
  /** Weight of outstanding prompt tokens (in mean prompts) against requests in flight, ≥ 0; default 0.5. */
  prefillWeight: number;
  /** A KV cache fuller than this excludes a node, 0..1; default 0.92. */
  kvGate: number;
  /** More requests than this waiting in the engine for capacity exclude a node; default 16. */
  waitingGate: number;
  /** A scrape older than this gates no more, ms; default 3000. */
  staleMs: number;
  /** Weight of a node whose scrape is stale, 0..1; default 0.7. */
  staleWeight: number;
  /** A smaller share of passing candidates is panic, 0..1; default 0.5; 0 = never. */
  panicRatio: number;
};

/** Why a node is not eligible. Those of `isSoft` are ignored in panic. */
export type Exclusion =
  | "tried"
  | "denied"
  | "draining"
  | "circuit_open"
  | "unreachable"
  | "probe_busy"
  | "full"
  | "unhealthy"
  | "resting"
  | "kv"
  | "waiting";

/** What is to be placed. */
export type Wanted = {
  readonly promptTokens: number;
  /** 32 bits; requests that share it share a prompt prefix. */
  readonly affinityKey: number | undefined;
  readonly isRetry: boolean;
  /** Nodes of earlier attempts, and their addresses: neither is chosen again. */
  readonly tried: readonly NodeId[];
  readonly triedAddresses: readonly string[];
  /** Nodes that have said no in this round. */
  readonly denied: readonly NodeId[];
  /** Prompt tokens of this key that nodes have seen before; few. */
  readonly sent: readonly SentPrompt[];
};
/** Prompt tokens of an affinity key that went to a node before, and are probably cached there. */
export type SentPrompt = { readonly node: NodeId; readonly tokens: number };

/** Uniform in [0, 1); a context is one. */
export type Draw = { random(): number };

/** More eligible nodes than this are sampled, not scanned. */
const SCAN_MAX = 16;
/** Without news from any node of the pool for this long, counts are too old for an argmin: sample. */
const NEWS_AGE_MS_MAX = 250;
/** News this fresh bears a third sample. */
const NEWS_FRESH_MS = 100;
/** A prompt this short may try out a half-open node, where it does little harm. */
const TRIAL_PROMPT_TOKENS_MAX = 2000;
/** … and any request may, once none like that has come for this long: where every prompt is long, or known elsewhere. */
const TRIAL_OVERDUE_MS = 5000;
/** Candidates that an explanation lists. */
const EXPLAINED_MAX = 16;
/** The median speed stands in for unknown ones only; it need not follow every token. */
const MEDIAN_MS = 1000;
const PROMPT_EWMA_ALPHA = 0.05;
/** A supervisor restarts an actor, or another peer takes a node over, within this time, or not soon. */
const RESTART_MS = 4000;

// ---- one node ---------------------------------------------------------------------------------------------

/** A node as one router sees it. Instants are the router's own; figures include what it has pending there. */
export class NodeView {
  readonly node: NodeId;
  readonly hash: number;
  /** Grows from node to node in the order in which the router met them. */
  readonly order: number;
  snapshot: NodeSnapshot;
  receivedAtMs = 0;
  /** Leases asked for and not answered yet. */
  pending = 0;
  inflight = 0;
  /** Of leases without a first token. */
  prefillTokens = 0;
  /** The node's actor is silent: not asked again before then, unless it speaks. */
  unreachableUntilMs = 0;
  /** Since when, while it is. */
  unreachableSinceMs = Number.POSITIVE_INFINITY;
  /** Since when its circuit has been half open, as far as seen here; meaningful while it is. */
  halfOpenSinceMs = 0;

  // Of the snapshot, flattened for the scans. 0 in a figure that is never 0 when known = unknown.
  circuit: CircuitState = "closed";
  probePermits = 0;
  draining = false;
  healthy = true;
  inflightMax = 0;
  ramp = 1;
  restUntilMs = 0;
  itlSeconds = 0;
  /** NaN without a scrape: compares false with everything, so that it neither gates nor is stale. */
  scrapedAtMs = Number.NaN;
  kv = 0;
  waiting = 0;
  latencyMsAtInflight = 0;
  latencyMsPeakEwma = 0;
  /** Scratch of the decision under way. */
  weight = 0;

  #pendingTokens = 0;
  /** The incarnation that `snapshot` is of has ended. */
  #isActorEnded = false;
  /** Of the actor that was the node's before it moved; absent: it has not. */
  #movedFrom: number | undefined;

  constructor(snapshot: NodeSnapshot, order: number, nowMs: number) {
    this.node = snapshot.node;
    this.hash = hashOf(snapshot.node);
    this.order = order;
    this.snapshot = snapshot;
    this.#apply(snapshot, nowMs);
  }

  /** False if the snapshot is older than the one held: it then changes nothing. */
  update(snapshot: NodeSnapshot, nowMs: number): boolean {
    const held = this.snapshot;
    if (!this.#isActorEnded) {
      // Incarnations of different processes cannot be compared: after a move, the other one is the later.
      if (snapshot.incarnation !== held.incarnation && held.incarnation !== this.#movedFrom) {
        if (snapshot.incarnation === this.#movedFrom) return false;
        if (snapshot.incarnation < held.incarnation) return false;
      }
      if (snapshot.incarnation === held.incarnation && snapshot.version < held.version)
        return false;
    }
    // An actor that has just begun does not know yet what the node serves; it is what it was, so far as we know.
    const { models, adapters } = held;
    const isBegun = snapshot.models === undefined && models !== undefined;
    const whole = isBegun ? { ...snapshot, models, ...(adapters && { adapters }) } : snapshot;
    this.#apply(whole, nowMs);
    return true;
  }

  /**
   * Whatever comes next is newer. The next actor may be an older incarnation: when a node has gone over to another
   * process and comes back, its first actor has lived on.
   */
  actorEnded(): void {
    this.#isActorEnded = true;
  }

  /** From now on another process has the node's actor. */
  moved(): void {
    this.#movedFrom = this.snapshot.incarnation;
  }

  /** Counts a lease that is being asked for, so that the next decision sees it already. */
  expect(uncachedTokens: number): void {
    this.pending++;
    this.#pendingTokens += uncachedTokens;
    this.inflight++;
    this.prefillTokens += uncachedTokens;
  }

  /** The node has answered, or will not: its snapshot tells the rest. */
  answered(uncachedTokens: number): void {
    this.pending--;
    this.#pendingTokens -= uncachedTokens;
    this.inflight--;
    this.prefillTokens -= uncachedTokens;
  }

  /** An ask of it failed, or its actor ended. */
  markUnreachable(untilMs: number, nowMs: number): void {
    this.unreachableUntilMs = untilMs;
    this.unreachableSinceMs = Math.min(this.unreachableSinceMs, nowMs);
  }

  #apply(snapshot: NodeSnapshot, nowMs: number): void {
    const { scrape } = snapshot;
    this.snapshot = snapshot;
    this.#isActorEnded = false;
    if (this.circuit !== "half_open") this.halfOpenSinceMs = nowMs;
    this.receivedAtMs = nowMs;
    this.unreachableUntilMs = 0;
    this.unreachableSinceMs = Number.POSITIVE_INFINITY;
    this.inflight = snapshot.inflight + this.pending;
    this.prefillTokens = snapshot.prefillTokens + this.#pendingTokens;
    this.circuit = snapshot.circuit;
    this.probePermits = snapshot.probePermits;
    this.draining = snapshot.draining;
    this.healthy = snapshot.healthy;
    this.inflightMax = snapshot.inflightMax;
    this.ramp = snapshot.ramp;
    // Instants of the node's clock count from the making of the snapshot, which is "now" here.
    this.restUntilMs = nowMs + (snapshot.restUntilMs - snapshot.atMs);
    this.itlSeconds = snapshot.itlSeconds ?? 0;
    this.scrapedAtMs = scrape === undefined ? Number.NaN : nowMs - (snapshot.atMs - scrape.atMs);
    this.kv = scrape?.kv ?? 0;
    this.waiting = scrape?.waitingForCapacity ?? scrape?.waiting ?? 0;
    this.latencyMsAtInflight = snapshot.latencyMsAtInflight ?? 0;
    this.latencyMsPeakEwma = snapshot.latencyMsPeakEwma ?? 0;
  }
}

/** Whether a node serves `model`, which may name an adapter; why not, otherwise. Without a model, any does. */
export function membershipOf(
  snapshot: NodeSnapshot,
  model: string | undefined,
): "member" | "models_unknown" | "model" | "adapter" {
  if (model === undefined) return "member";
  const { models, adapters } = snapshot;
  if (models === undefined && adapters === undefined) return "models_unknown";
  if (models?.includes(model) === true || adapters?.includes(model) === true) return "member";
  return adapters === undefined || adapters.length === 0 ? "model" : "adapter";
}

/**
 * The first gate that closes a node to a request, or undefined.
 * @param loadGates also the soft gates of load: resting, KV, waiting
 */
export function exclusionOf(
  view: NodeView,
  wanted: Wanted,
  nowMs: number,
  options: RankingOptions,
  loadGates: boolean,
): Exclusion | undefined {
  if (wanted.tried.length > 0 && isTried(view, wanted)) return "tried";
  if (view.draining) return "draining";
  if (view.circuit === "open") return "circuit_open";
  if (nowMs < view.unreachableUntilMs) return "unreachable";
  if (view.circuit === "half_open" && view.probePermits <= view.pending) return "probe_busy";
  if (view.inflight >= view.inflightMax) return "full";
  if (wanted.denied.length > 0 && wanted.denied.includes(view.node)) return "denied";
  if (!view.healthy) return "unhealthy";
  if (!loadGates) return undefined;
  if (nowMs < view.restUntilMs) return "resting";
  if (nowMs - view.scrapedAtMs <= options.staleMs) {
    if (view.kv > options.kvGate) return "kv";
    if (view.waiting > options.waitingGate) return "waiting";
  }
  return undefined;
}

function isTried(view: NodeView, wanted: Wanted): boolean {
  return wanted.tried.includes(view.node) || wanted.triedAddresses.includes(view.snapshot.address);
}

/** Gates that panic ignores: signals that may be wrong, or that say "rather not". */
export function isSoft(exclusion: Exclusion): boolean {
  switch (exclusion) {
    case "unhealthy":
    case "resting":
    case "kv":
    case "waiting":
      return true;
    default:
      return false;
  }
}

/** A silent node may be one whose actor is being restarted. */
function mayReturn(view: NodeView, exclusion: Exclusion, nowMs: number): boolean {
  return exclusion === "unreachable" && nowMs - view.unreachableSinceMs < RESTART_MS;
}

// ---- one pool ---------------------------------------------------------------------------------------------

/** The nodes of one pool as candidates: filtered for each request, then given to a strategy. */
export class Field {
  /** In the order in which they joined. */
  readonly views: NodeView[] = [];
  /** The first `count` are eligible, in the order of `views`; the rest is scratch. */
  readonly eligible: NodeView[] = [];
  count = 0;
  /** Not eligible now but for load, or for a signal that passes: worth waiting for. */
  waitable = 0;
  isPanic = false;
  /** Only nodes with an open circuit are left, and are asked whether they are down. */
  isLastResort = false;
  /** An eligible half-open node that wants trying, if any. */
  trial: NodeView | undefined;
  /** Since the latest news from any node of the pool. */
  newsAgeMs = 0;
  nowMs = 0;
  /** Why the latest pick fell where it did: one phrase. */
  why = "";
  /** EWMA over placed requests, ≥ 1: the unit of the prefill term. */
  promptTokensMean = 1;

  #options: RankingOptions;
  #loadGates = true;
  #learnt = false;
  #medianItlSeconds = 1;
  #medianAtMs = Number.NEGATIVE_INFINITY;

  constructor(options: RankingOptions) {
    this.#options = options;
  }

  configure(options: RankingOptions): void {
    this.#options = options;
  }

  add(view: NodeView): void {
    this.views.push(view);
  }

  remove(view: NodeView): void {
    const index = this.views.indexOf(view);
    if (index >= 0) this.views.splice(index, 1);
    this.eligible.length = 0;
    this.count = 0;
    this.trial = undefined;
  }

  /** A request of so many uncached prompt tokens was placed. */
  learnPrompt(uncachedTokens: number): void {
    const tokens = Math.max(1, uncachedTokens);
    if (!this.#learnt) this.promptTokensMean = tokens;
    else this.promptTokensMean += PROMPT_EWMA_ALPHA * (tokens - this.promptTokensMean);
    this.#learnt = true;
  }

  /** Finds who may be chosen: fills `eligible`, `count`, `waitable`, `isPanic`, `trial`, `newsAgeMs`. */
  filter(wanted: Wanted, nowMs: number, loadGates: boolean): void {
    const options = this.#options;
    this.nowMs = nowMs;
    this.#loadGates = loadGates;
    this.isPanic = false;
    this.isLastResort = false;
    this.why = "";
    let count = 0;
    let candidates = 0;
    let busy = 0;
    let transient = 0;
    let newestAtMs = Number.NEGATIVE_INFINITY;
    let speedUnknown = false;
    let trial: NodeView | undefined;
    for (const view of this.views) {
      if (view.receivedAtMs > newestAtMs) newestAtMs = view.receivedAtMs;
      const exclusion = exclusionOf(view, wanted, nowMs, options, loadGates);
      if (exclusion === undefined) {
        this.eligible[count++] = view;
        candidates++;
        if (view.itlSeconds === 0) speedUnknown = true;
        if (view.circuit === "half_open") trial ??= view;
      } else if (exclusion === "full" || exclusion === "denied") {
        busy++;
        candidates++;
      } else if (exclusion !== "tried" && exclusion !== "draining") {
        candidates++;
        if (isSoft(exclusion) || mayReturn(view, exclusion, nowMs)) transient++;
      }
    }
    this.count = count;
    this.trial = trial;
    this.waitable = busy + transient;
    this.newsAgeMs = nowMs - newestAtMs;
    if (count + busy < options.panicRatio * candidates) this.#panic(wanted);
    if (speedUnknown || this.isPanic) this.#refreshMedian();
  }

  /** Soft gates open. If that leaves nobody, nodes with an open circuit are asked, one request at a time each:
   *  they know why they are open, and deny if they are down. */
  #panic(wanted: Wanted): void {
    this.isPanic = true;
    let count = 0;
    for (const view of this.views) {
      const exclusion = this.exclusionOf(view, wanted);
      if (exclusion === undefined || isSoft(exclusion)) this.eligible[count++] = view;
    }
    if (count === 0 && this.waitable === 0) {
      this.isLastResort = true;
      for (const view of this.views) {
        if (view.pending > 0 || view.inflight >= view.inflightMax) continue;
        if (wanted.denied.includes(view.node)) continue;
        if (this.exclusionOf(view, wanted) === "circuit_open") this.eligible[count++] = view;
      }
    }
    this.count = count;
  }

  /**
   * How loaded the pool is, 0..1: the mean over its nodes of the fuller of cap and KV gate. A node that is out
   * counts as 1, one that drains not at all.
   */
  saturation(nowMs: number): number {
    const { staleMs, kvGate } = this.#options;
    let sum = 0;
    let nodes = 0;
    for (const view of this.views) {
      if (view.draining) continue;
      nodes++;
      const isOut = view.circuit === "open" || !view.healthy || nowMs < view.unreachableUntilMs;
      const kv = nowMs - view.scrapedAtMs <= staleMs ? view.kv / kvGate : 0;
      sum += isOut ? 1 : Math.min(1, Math.max(view.inflight / view.inflightMax, kv));
    }
    return nodes === 0 ? 1 : sum / nodes;
  }

  /** The gate that closes `view`, by the measure of the latest `filter`. */
  exclusionOf(view: NodeView, wanted: Wanted): Exclusion | undefined {
    return exclusionOf(view, wanted, this.nowMs, this.#options, this.#loadGates);
  }

  /** Learned speed × slow start, less for a node whose engine has gone silent. */
  weightOf(view: NodeView): number {
    const itlSeconds = view.itlSeconds > 0 ? view.itlSeconds : this.#medianItlSeconds;
    const weight = view.ramp / itlSeconds;
    const isStale = this.nowMs - view.scrapedAtMs > this.#options.staleMs;
    return isStale ? weight * this.#options.staleWeight : weight;
  }

  #refreshMedian(): void {
    if (this.nowMs - this.#medianAtMs < MEDIAN_MS) return;
    this.#medianAtMs = this.nowMs;
    const known: number[] = [];
    for (const view of this.views) if (view.itlSeconds > 0) known.push(view.itlSeconds);
    known.sort((a, b) => a - b);
    this.#medianItlSeconds = known[known.length >> 1] ?? 1; // All unknown: all alike.
  }

  /** The table behind the latest pick: `chosen` first, then the pool's order, 16 at most. */
  explain(strategy: Strategy, wanted: Wanted, chosen: NodeView | undefined): CandidateFact[] {
    const facts: CandidateFact[] = [];
    if (chosen !== undefined) facts.push(this.#explainOne(chosen, true, strategy, wanted));
    for (const view of this.views) {
      if (facts.length >= EXPLAINED_MAX) break;
      if (view === chosen) continue;
      const exclusion = this.exclusionOf(view, wanted);
      const eligible = exclusion === undefined || (this.isPanic && isSoft(exclusion));
      facts.push(this.#explainOne(view, eligible, strategy, wanted, exclusion));
    }
    return facts;
  }

  #explainOne(
    view: NodeView,
    eligible: boolean,
    strategy: Strategy,
    wanted: Wanted,
    exclusion?: Exclusion,
  ): CandidateFact {
    const { nowMs } = this;
    const fact: CandidateFact = {
      node: view.node,
      eligible,
      snapshotAgeMs: nowMs - view.receivedAtMs,
    };
    if (!Number.isNaN(view.scrapedAtMs)) fact.scrapeAgeMs = nowMs - view.scrapedAtMs;
    if (!eligible && exclusion !== undefined)
      fact.excluded = exclusionText(exclusion, view, wanted, nowMs, this.#options);
    else strategy.explain(view, this, wanted, fact);
    return fact;
  }
}

function exclusionText(
  exclusion: Exclusion,
  view: NodeView,
  wanted: Wanted,
  nowMs: number,
  options: RankingOptions,
): string {
  switch (exclusion) {
    case "tried":
      return wanted.tried.includes(view.node) ? "tried already" : "at an address tried already";
    case "denied":
      return "has denied this request";
    case "draining":
      return "draining";
    case "circuit_open":
      return "circuit open";
    case "unreachable":
      return "did not answer a router lately";
    case "probe_busy":
      return "half open, without a free permit";
    case "full":
      return `full: ${view.inflight} of ${view.inflightMax} in flight`;
    case "unhealthy":
      return "fails its health checks";
    case "resting":
      return `asked to be left alone for ${Math.ceil(view.restUntilMs - nowMs)} ms more`;
    case "kv":
      return `KV cache ${rounded(view.kv)} is above ${options.kvGate}`;
    case "waiting":
      return `${view.waiting} waiting in the engine, more than ${options.waitingGate}`;
    default:
      return unreachable(exclusion);
  }
}

// ---- strategies -------------------------------------------------------------------------------------------

/** The law by which a pool picks. One object per pool: some remember. */
export interface Strategy {
  readonly name: StrategyName;
  /** Whether the gates of load apply before it; health and hard gates always do. */
  readonly loadGates: boolean;
  /** One of the eligible of the latest `filter`, or undefined if there is none. Sets `field.why`. */
  pick(field: Field, wanted: Wanted, draw: Draw): NodeView | undefined;
  /** Puts cost and terms into `fact`; lower cost is better. */
  explain(view: NodeView, field: Field, wanted: Wanted, fact: CandidateFact): void;
}

/** The strategy that `options` name, with its state fresh. Each tries half-open nodes first. */
export function makeStrategy(options: RankingOptions): Strategy {
  return new TrialsFirst(strategyOf(options));
}

function strategyOf(options: RankingOptions): Strategy {
  switch (options.strategy) {
    case "headroom":
      return new Headroom(options);
    case "round_robin":
      return new RoundRobin();
    case "least_inflight":
      return new LeastInflight();
    case "power_of_two":
      return new PowerOfTwo();
    case "peak_ewma":
      return new PeakEwma();
    case "prequal":
      return new Prequal();
    case "article":
      return new Article(options);
    default:
      return unreachable(options.strategy);
  }
}

/**
 * A half-open node is tried whatever the strategy thinks of it, or it would never come back: it may look slow, or
 * be nobody's home.
 */
class TrialsFirst implements Strategy {
  readonly name: StrategyName;
  readonly loadGates: boolean;
  readonly #inner: Strategy;

  constructor(inner: Strategy) {
    this.#inner = inner;
    this.name = inner.name;
    this.loadGates = inner.loadGates;
  }

  pick(field: Field, wanted: Wanted, draw: Draw): NodeView | undefined {
    const trial = trialOf(field, wanted);
    return trial ?? this.#inner.pick(field, wanted, draw);
  }

  explain(view: NodeView, field: Field, wanted: Wanted, fact: CandidateFact): void {
    this.#inner.explain(view, field, wanted, fact);
  }
}

/** The half-open node that the request should try, if any: it is short, and has no prefix elsewhere. */
function trialOf(field: Field, wanted: Wanted): NodeView | undefined {
  const { trial, count, nowMs } = field;
  if (trial === undefined || count <= 1 || wanted.isRetry) return undefined;
  const isCheap = wanted.sent.length === 0 && wanted.promptTokens <= TRIAL_PROMPT_TOKENS_MAX;
  if (isCheap) field.why = "trial: a half-open node is tried with a short request";
  else if (nowMs - trial.halfOpenSinceMs >= TRIAL_OVERDUE_MS)
    field.why = "trial: a half-open node has waited long for a short request";
  else return undefined;
  return trial;
}

/**
 * Affinity within bounded load, else least expected work per speed.
 *
 * A keyed request goes to the first node in the rendezvous order of its key whose load, this request included,
 * stays within `affinityLoadFactor` × its share by weight (or within 2): the same prefix meets the same KV cache,
 * and no key overloads a node. The walk down that order is a scan for the greatest hash among the nodes within
 * their bound. Without a key, or with every node at its bound: the least (n + 1 + prefill work) / weight.
 */
class Headroom implements Strategy {
  readonly name = "headroom";
  readonly loadGates = true;
  readonly #options: RankingOptions;

  constructor(options: RankingOptions) {
    this.#options = options;
  }

  pick(field: Field, wanted: Wanted, draw: Draw): NodeView | undefined {
    const { count } = field;
    if (count <= 1) {
      field.why = "only: no other node is eligible";
      return count === 0 ? undefined : field.eligible[0];
    }
    const key = wanted.affinityKey;
    const explores = key !== undefined && draw.random() < this.#options.exploreRatio;
    if (key !== undefined && !explores) {
      const home = this.#pickByKey(field, key);
      if (home !== undefined) {
        field.why = "affinity: first in its key's order within the load bound";
        return home;
      }
    }
    const isSampled = count > SCAN_MAX || field.newsAgeMs > NEWS_AGE_MS_MAX;
    const best = isSampled ? this.#sample(field, wanted, draw) : this.#scan(field, wanted, draw);
    field.why = explores
      ? "explore: least expected work, affinity skipped"
      : key === undefined
        ? "score: least expected work"
        : "score: least expected work; every node is at its key's load bound";
    return best;
  }

  #pickByKey(field: Field, key: number): NodeView | undefined {
    const { eligible, count } = field;
    let inflightSum = 0;
    let weightSum = 0;
    for (let i = 0; i < count; i++) {
      const view = eligible[i] as NodeView;
      view.weight = field.weightOf(view);
      weightSum += view.weight;
      inflightSum += view.inflight;
    }
    const boundPerWeight = (this.#options.affinityLoadFactor * (1 + inflightSum)) / weightSum;
    let home: NodeView | undefined;
    let homeHash = -1;
    for (let i = 0; i < count; i++) {
      const view = eligible[i] as NodeView;
      const hash = rendezvousHash(key, view.hash);
      if (hash > homeHash && view.inflight + 1 <= Math.max(2, boundPerWeight * view.weight)) {
        home = view;
        homeHash = hash;
      }
    }
    return home;
  }

  #scan(field: Field, wanted: Wanted, draw: Draw): NodeView | undefined {
    const { eligible, count } = field;
    let best: NodeView | undefined;
    let bestCost = Number.POSITIVE_INFINITY;
    let ties = 0;
    for (let i = 0; i < count; i++) {
      const view = eligible[i] as NodeView;
      const cost = this.#cost(view, field, wanted);
      if (cost < bestCost) {
        best = view;
        bestCost = cost;
        ties = 1;
      } else if (cost === bestCost && draw.random() * ++ties < 1) {
        best = view; // Each of the ties with the same chance.
      }
    }
    return best;
  }

  /** The least of 2, or of 3 while news is fresh, drawn at random. */
  #sample(field: Field, wanted: Wanted, draw: Draw): NodeView {
    const [first, second] = drawTwo(field, draw);
    let best = this.#lesser(first, second, field, wanted);
    if (field.count > 2 && field.newsAgeMs < NEWS_FRESH_MS) {
      let third = first;
      while (third === first || third === second)
        third = field.eligible[Math.floor(draw.random() * field.count)] as NodeView;
      best = this.#lesser(best, third, field, wanted);
    }
    return best;
  }

  #lesser(a: NodeView, b: NodeView, field: Field, wanted: Wanted): NodeView {
    return this.#cost(b, field, wanted) < this.#cost(a, field, wanted) ? b : a;
  }

  #cost(view: NodeView, field: Field, wanted: Wanted): number {
    const prompts = (view.prefillTokens + uncachedTokensOf(view, wanted)) / field.promptTokensMean;
    const work = view.inflight + 1 + this.#options.prefillWeight * prompts;
    return work / field.weightOf(view);
  }

  explain(view: NodeView, field: Field, wanted: Wanted, fact: CandidateFact): void {
    fact.cost = rounded(this.#cost(view, field, wanted));
    fact.terms = {
      inflight: view.inflight,
      prefillTokens: view.prefillTokens,
      uncachedTokens: uncachedTokensOf(view, wanted),
      promptTokensMean: rounded(field.promptTokensMean),
      weight: rounded(field.weightOf(view)),
    };
  }
}

/** Each eligible node in turn, in the pool's order. */
class RoundRobin implements Strategy {
  readonly name = "round_robin";
  readonly loadGates = true;
  #lastOrder = -1;

  pick(field: Field): NodeView | undefined {
    const { eligible, count } = field;
    if (count === 0) return undefined;
    let next = eligible[0] as NodeView;
    for (let i = 0; i < count; i++) {
      const view = eligible[i] as NodeView;
      if (view.order <= this.#lastOrder) continue;
      next = view;
      break;
    }
    this.#lastOrder = next.order;
    field.why = "turn: next in the round";
    return next;
  }

  explain(view: NodeView, _field: Field, _wanted: Wanted, fact: CandidateFact): void {
    fact.terms = { order: view.order };
  }
}

/** Fewest in flight, ties at random. */
class LeastInflight implements Strategy {
  readonly name = "least_inflight";
  readonly loadGates = true;

  pick(field: Field, _wanted: Wanted, draw: Draw): NodeView | undefined {
    const { eligible, count } = field;
    let best: NodeView | undefined;
    let bestInflight = Number.POSITIVE_INFINITY;
    let ties = 0;
    for (let i = 0; i < count; i++) {
      const view = eligible[i] as NodeView;
      if (view.inflight < bestInflight) {
        best = view;
        bestInflight = view.inflight;
        ties = 1;
      } else if (view.inflight === bestInflight && draw.random() * ++ties < 1) {
        best = view;
      }
    }
    field.why = "score: fewest in flight";
    return best;
  }

  explain(view: NodeView, _field: Field, _wanted: Wanted, fact: CandidateFact): void {
    fact.cost = view.inflight;
  }
}

/** The one with fewer in flight of two drawn at random. */
class PowerOfTwo implements Strategy {
  readonly name = "power_of_two";
  readonly loadGates = true;

  pick(field: Field, _wanted: Wanted, draw: Draw): NodeView | undefined {
    field.why = "score: fewer in flight of two at random";
    if (field.count <= 1) return field.count === 0 ? undefined : field.eligible[0];
    const [first, second] = drawTwo(field, draw);
    return second.inflight < first.inflight ? second : first;
  }

  explain(view: NodeView, _field: Field, _wanted: Wanted, fact: CandidateFact): void {
    fact.cost = view.inflight;
  }
}

/** The lesser, of two drawn at random, of latency (a peak-sensitive EWMA) × (in flight + 1). */
class PeakEwma implements Strategy {
  readonly name = "peak_ewma";
  readonly loadGates = true;

  pick(field: Field, _wanted: Wanted, draw: Draw): NodeView | undefined {
    field.why = "score: lesser latency × load of two at random";
    if (field.count <= 1) return field.count === 0 ? undefined : field.eligible[0];
    const [first, second] = drawTwo(field, draw);
    return peakEwmaCost(second) < peakEwmaCost(first) ? second : first;
  }

  explain(view: NodeView, _field: Field, _wanted: Wanted, fact: CandidateFact): void {
    fact.cost = rounded(peakEwmaCost(view));
    fact.terms = { latencyMs: rounded(view.latencyMsPeakEwma), inflight: view.inflight };
  }
}

/** Above any latency × load: a node that has never answered gets one request, and no second until it has. */
const UNMEASURED_COST = 1e15;

function peakEwmaCost(view: NodeView): number {
  if (view.latencyMsPeakEwma > 0) return view.latencyMsPeakEwma * (view.inflight + 1);
  return view.inflight === 0 ? 0 : UNMEASURED_COST + view.inflight;
}

/**
 * Prequal's hot-cold lexicographic rule: a node is hot when its requests in flight exceed the 0.84 quantile of
 * those seen lately; the cold one of least latency wins, and if all are hot the one with fewest in flight.
 * Snapshots take the place of probes: 16 of them at random per decision.
 */
class Prequal implements Strategy {
  readonly name = "prequal";
  readonly loadGates = true;
  /** The last in-flight counts seen, and how often each occurs among them. */
  readonly #seen = new Uint16Array(PREQUAL_SEEN_MAX);
  readonly #counts = new Uint16Array(PREQUAL_INFLIGHT_MAX + 1);
  #seenTotal = 0;
  #hotAbove = 0;

  pick(field: Field, _wanted: Wanted, draw: Draw): NodeView | undefined {
    const { eligible, count } = field;
    const probes = Math.min(PREQUAL_PROBES, count);
    for (let i = 0; i < probes; i++) {
      // Each swap draws one of those not drawn yet; with 16 or fewer, all are probed as they stand.
      if (count > PREQUAL_PROBES) {
        const j = i + Math.floor(draw.random() * (count - i));
        const drawn = eligible[j] as NodeView;
        eligible[j] = eligible[i] as NodeView;
        eligible[i] = drawn;
      }
      this.#see((eligible[i] as NodeView).inflight);
    }
    this.#hotAbove = this.#quantile();
    let cold: NodeView | undefined;
    let idlest: NodeView | undefined;
    for (let i = 0; i < probes; i++) {
      const view = eligible[i] as NodeView;
      if (idlest === undefined || view.inflight < idlest.inflight) idlest = view;
      if (view.inflight > this.#hotAbove) continue;
      if (cold === undefined || view.latencyMsAtInflight < cold.latencyMsAtInflight) cold = view;
    }
    field.why =
      cold === undefined ? "score: all hot, fewest in flight" : "score: cold, least latency";
    return cold ?? idlest;
  }

  #see(inflight: number): void {
    const slot = this.#seenTotal++ % PREQUAL_SEEN_MAX;
    if (this.#seenTotal > PREQUAL_SEEN_MAX) this.#add(this.#seen[slot] ?? 0, -1);
    const value = Math.min(inflight, PREQUAL_INFLIGHT_MAX);
    this.#seen[slot] = value;
    this.#add(value, 1);
  }

  #add(value: number, change: number): void {
    this.#counts[value] = (this.#counts[value] ?? 0) + change;
  }

  #quantile(): number {
    const rank = PREQUAL_QUANTILE * Math.min(this.#seenTotal, PREQUAL_SEEN_MAX);
    let sum = 0;
    for (let value = 0; value < PREQUAL_INFLIGHT_MAX; value++) {
      sum += this.#counts[value] ?? 0;
      if (sum >= rank) return value;
    }
    return PREQUAL_INFLIGHT_MAX;
  }

  explain(view: NodeView, _field: Field, _wanted: Wanted, fact: CandidateFact): void {
    fact.terms = {
      inflight: view.inflight,
      hotAbove: this.#hotAbove,
      latencyMs: rounded(view.latencyMsAtInflight),
    };
  }
}

const PREQUAL_PROBES = 16;
/** 2^-0.25, the paper's. */
const PREQUAL_QUANTILE = 0.84;
const PREQUAL_SEEN_MAX = 128;
const PREQUAL_INFLIGHT_MAX = 4095;

/**
 * The article's score, 0.5 · queue + 0.3 · latency (s) + 0.2 · GPU memory (share), of the last scrape however old;
 * the first of the least wins. Only health gates it, as in the article. Raw, it is the article's sum: a count, a
 * time and a ratio, and a weight (halved on a timeout) that nothing reads. Normalised, each term is a share of
 * the greatest among the eligible, and the sum is divided by that weight.
 */
class Article implements Strategy {
  readonly name = "article";
  readonly loadGates = false;
  readonly #isNormalised: boolean;
  #queueUnit = 1;
  #latencyUnit = 1;
  #memoryUnit = 1;

  constructor(options: RankingOptions) {
    this.#isNormalised = options.articleNormalised;
  }

  pick(field: Field): NodeView | undefined {
    const { eligible, count } = field;
    if (this.#isNormalised) this.#measure(field);
    let best: NodeView | undefined;
    let bestScore = Number.POSITIVE_INFINITY;
    for (let i = 0; i < count; i++) {
      const view = eligible[i] as NodeView;
      const score = this.#score(view);
      if (score < bestScore) {
        best = view;
        bestScore = score;
      }
    }
    field.why = "score: the article's, on the last scrape";
    return best;
  }

  #measure({ eligible, count }: Field): void {
    let queue = 0;
    let latency = 0;
    let memory = 0;
    for (let i = 0; i < count; i++) {
      const { snapshot } = eligible[i] as NodeView;
      queue = Math.max(queue, articleQueue(snapshot));
      latency = Math.max(latency, articleLatency(snapshot));
      memory = Math.max(memory, articleMemory(snapshot));
    }
    this.#queueUnit = queue > 0 ? queue : 1;
    this.#latencyUnit = latency > 0 ? latency : 1;
    this.#memoryUnit = memory > 0 ? memory : 1;
  }

  #score({ snapshot }: NodeView): number {
    const score =
      (0.5 * articleQueue(snapshot)) / this.#queueUnit +
      (0.3 * articleLatency(snapshot)) / this.#latencyUnit +
      (0.2 * articleMemory(snapshot)) / this.#memoryUnit;
    return this.#isNormalised ? score / snapshot.articleWeight : score;
  }

  explain(view: NodeView, _field: Field, _wanted: Wanted, fact: CandidateFact): void {
    const { snapshot } = view;
    fact.cost = rounded(this.#score(view));
    fact.terms = {
      queue: articleQueue(snapshot),
      latencySeconds: rounded(articleLatency(snapshot)),
      gpuMemory: rounded(articleMemory(snapshot)),
      weight: snapshot.articleWeight,
    };
  }
}

// A node not scraped yet, and a gauge that an engine does not have, are 0 here: the article starts its nodes so.
function articleQueue({ scrape }: NodeSnapshot): number {
  return scrape?.waiting ?? 0;
}

function articleLatency({ scrape }: NodeSnapshot): number {
  return scrape?.latencySeconds ?? 0;
}

/** KV use where there is no gauge of memory: the nearest that engines publish. */
function articleMemory({ scrape }: NodeSnapshot): number {
  return scrape?.gpuMemory ?? scrape?.kv ?? 0;
}

// ---- small things -----------------------------------------------------------------------------------------

/** Prompt tokens that the node has probably not seen. */
export function uncachedTokensOf(view: NodeView, wanted: Wanted): number {
  for (const sent of wanted.sent)
    if (sent.node === view.node) return Math.max(0, wanted.promptTokens - sent.tokens);
  return wanted.promptTokens;
}

/** Two different ones of at least two eligible. */
function drawTwo({ eligible, count }: Field, draw: Draw): [NodeView, NodeView] {
  const i = Math.floor(draw.random() * count);
  const j = Math.floor(draw.random() * (count - 1));
  return [eligible[i] as NodeView, eligible[j >= i ? j + 1 : j] as NodeView];
}

/** FNV-1a, 32 bits. */
export function hashOf(text: string): number {
  let h = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
  return h >>> 0;
}

/** Rank of a node for a key, 32 bits: the greatest is the key's first node. `nodeHash`: `hashOf` its name. */
export function rendezvousHash(key: number, nodeHash: number): number {
  let h = key ^ nodeHash;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

/** For people: four digits after the point. */
function rounded(value: number): number {
  return Math.round(value * 10_000) / 10_000;
}
