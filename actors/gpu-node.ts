/**
 * One inference node: who is in flight on it, how fast it is, and whether it may be given more. The
 * only writer of that state; every router ranks on the snapshots it publishes and asks it for a lease
 * before it sends.
 *
 * - **Leases** are the truth about work in flight, over all routers. One lives `leaseTtlMs` from its
 *   last sign of life (first token, progress); an expired one belonged to a process that died.
 * - **The cap** on them is learned: overload shrinks it at once, quiet lets it grow by one (AIMD). Work that
 *   only waits in the engine shrinks it no further than what runs there, so that the queue is ours and the
 *   engine stays full; refusals, preemptions and full KV memory shrink it below that.
 * - **The circuit** (circuit-breaker.ts) judges the outcomes of leases, the health checks, and an
 *   engine that runs requests without making a token. Before it opens, a subscribed router is asked
 *   whether the pool can bear it; without a router, or without its answer, the node's own evidence
 *   decides.
 * - **Speed** is learned from finished streams, as seconds per output token; whole-request latencies
 *   are kept only for the strategies that want them.
 * - **Work of others** (clients that bypass us, leases that an earlier incarnation lost) is what the
 *   engine reports beyond our leases. It counts in `inflight` and takes room from the cap.
 *
 * A turn is O(1), but for `describe`, a restarted owner and a sweep of expired leases. It never waits
 * for the network: the scraper and the upstream probe are edges that report by message.
 *
 * After a crash everything here begins afresh, under a higher incarnation; `start` asks the scraper
 * again, and the routers subscribe again when they see that this incarnation ended. Lost are the
 * leases, the learned speed and cap, the circuit, a drain and a rest. That is safe: a lease bounds
 * nothing but load, the engine has its own queue, and the first scrape counts what still runs as work
 * of others; late messages of lost leases are ignored and counted; a node that was open fails its
 * first calls and opens again.
 *
 * It chooses nothing (router.ts), retries nothing (request.ts), and touches no engine itself.
 */

import {
  type Actor,
  type ActorRef,
  type AskOutcome,
  assert,
  type Context,
  type ReplyTo,
  type Terminated,
  unreachable,
} from "../runtime/actor.ts";
import { InflightMap } from "../runtime/inflight-map.ts";
import {
  type CallResult,
  CircuitBreaker,
  type CircuitCause,
  type CircuitNumbers,
  type CircuitOptions,
} from "./circuit-breaker.ts";
import type { ScraperCommand, ScraperEvent, UpstreamCommand } from "./edges.ts";
import type {
  CircuitState,
  LeaseId,
  LeaseOutcome,
  NodeId,
  NodeSnapshot,
  ScrapeSample,
} from "./protocol.ts";
import type { RouterMessage } from "./router.ts";

export type GpuNodeMessage =
  /** Asks for a lease. A second acquire of a held lease is granted again, and counted once. */
  | {
      kind: "gpu_node.acquire";
      leaseId: LeaseId;
      /** Path of the request actor that holds it: `owner_restarted` frees all of an owner's leases. */
      owner: string;
      /** Prompt tokens that this node has probably not cached. */
      uncachedTokens: number;
      replyTo: ReplyTo<AcquireReply>;
    }
  | { kind: "gpu_node.first_token"; leaseId: LeaseId; ttftMs: number }
  | { kind: "gpu_node.progress"; leaseId: LeaseId; outputTokens: number }
  | {
      kind: "gpu_node.release";
      leaseId: LeaseId;
      outcome: LeaseOutcome;
      ttftMs?: number;
      /** From acquire to the end. */
      e2eMs: number;
      /** First to last token. */
      decodeMs: number;
      promptTokens: number;
      outputTokens: number;
      /** Retry-After of an overloaded or failing node. */
      retryAfterMs?: number;
      detail?: string;
    }
  | { kind: "gpu_node.owner_restarted"; owner: string }
  /** Sends every new snapshot to `router` as `router.node_changed`, the present one at once. */
  | { kind: "gpu_node.subscribe"; router: ActorRef<NodeChanged> }
  | { kind: "gpu_node.drain" }
  | { kind: "gpu_node.undrain" }
  | { kind: "gpu_node.describe"; replyTo: ReplyTo<NodeDescription> }
  | ScraperEvent;

/** To each subscribed router, at every change of the node. */
export type NodeChanged = { kind: "router.node_changed"; snapshot: NodeSnapshot };

/** A lease, or why not; both carry the node as it is now. */
export type AcquireReply =
  | { kind: "granted"; leaseId: LeaseId; node: NodeId; probe: boolean; snapshot: NodeSnapshot }
  | { kind: "denied"; reason: "full" | "open" | "draining" | "probe_busy"; snapshot: NodeSnapshot };

/** All state of a node, for people. */
export type NodeDescription = {
  snapshot: NodeSnapshot;
  leases: readonly { leaseId: LeaseId; ageMs: number; firstToken: boolean; outputTokens: number }[];
  circuit: {
    state: string;
    sinceMs: number;
    ejections: number;
    openForMs?: number;
    cause?: string;
  };
  window: { calls: number; failures: number; slow: number };
  othersInflight: number;
  health: { ok: boolean; failuresInRow: number; detail: string };
  totals: Readonly<Record<LeaseOutcome, number>>;
};

/** What it reports: rare things, each once per episode. */
export type GpuNodeEvent =
  | ({
      kind: "gpu_node.circuit_changed";
      node: NodeId;
      from: CircuitState;
      to: CircuitState;
      /** Why: a cause of the circuit, "time_out_over", "health_back" or "trials_succeeded". */
      cause: string;
      inflight: number;
      /** Only when it opened. */
      openForMs?: number;
      /** What the node or the edge said, one line. */
      detail?: string;
    } & CircuitNumbers)
  /** The pool cannot spare the node: it goes on at the least weight. */
  | ({ kind: "gpu_node.ejection_refused"; node: NodeId; cause: CircuitCause } & CircuitNumbers)
  | { kind: "gpu_node.lease_expired"; node: NodeId; leaseId: LeaseId; owner: string; ageMs: number }
  | { kind: "gpu_node.owner_freed"; node: NodeId; owner: string; leases: number }
  /** Something late or unknown was dropped: `what` says which message, `reason` why. */
  | {
      kind: "gpu_node.ignored";
      node: NodeId;
      what: string;
      reason: "unknown_lease" | "circuit_moved_on" | "too_many_routers";
    }
  | { kind: "gpu_node.cap_changed"; node: NodeId; from: number; to: number; cause: string }
  | { kind: "gpu_node.signal_missing"; node: NodeId; engine: string; missing: readonly string[] }
  | { kind: "gpu_node.scrape_failed"; node: NodeId; reason: string }
  | { kind: "gpu_node.health_changed"; node: NodeId; healthy: boolean; detail: string }
  /** What the node serves is known now, or is something else than before. */
  | {
      kind: "gpu_node.models_changed";
      node: NodeId;
      models: readonly string[];
      adapters: readonly string[];
    }
  /** For 30 s we have held far more leases than the engine has requests: somebody does not release. */
  | { kind: "gpu_node.leases_exceed_engine"; node: NodeId; leases: number; engine: number }
  /** No lease is left on a draining node, or it was waited long enough for those that are. */
  | { kind: "gpu_node.drained"; node: NodeId; leases: number };

// Only our own timers, asks and watches send these.
type Private =
  | { kind: "gpu_node.sweep_due" }
  | { kind: "gpu_node.circuit_due" }
  | { kind: "gpu_node.ramp_due" }
  | { kind: "gpu_node.drain_due" }
  | { kind: "gpu_node.probe_ended"; era: number; outcome: AskOutcome<ProbeReply> }
  | { kind: "gpu_node.ejection_decided"; cause: CircuitCause; outcome: AskOutcome<Consent> }
  | { kind: "gpu_node.router_gone"; terminated: Terminated };

type ProbeReply = { answered: boolean; detail: string };
type Consent = { granted: boolean };

export type GpuNodeOptions = {
  node: NodeId;
  /** Host and port. */
  address: string;
  /** Fixed by configuration; absent = as the scraper finds them. */
  models?: readonly string[];
  adapters?: readonly string[];
  upstream: ActorRef<UpstreamCommand>;
  scraper: ActorRef<ScraperCommand>;
  /** Most leases at once, 1…; absent = 1.1 × what the engine tells, else `concurrency.inflightMax`. */
  inflightMax?: number;
  concurrency?: Partial<ConcurrencyOptions>;
  circuit?: Partial<CircuitOptions>;
  /** KV use (0..1) above which the node counts as overloaded; default 0.92. */
  kvGate?: number;
  /** Life of a lease without a sign of life; default 30,000. */
  leaseTtlMs?: number;
  /** Bound on a Retry-After of the node; default 10,000. */
  restMsMax?: number;
  /** Running requests without a new token for this long open the circuit; default 15,000. */
  wedgedMs?: number;
  /** Failed health checks in a row that open the circuit, 1…; default 3. */
  healthFailures?: number;
  /** Passed checks in a row that make an unhealthy node healthy, 1…; default 2. */
  healthSuccesses?: number;
  /** How long a draining node's leases are waited for; default 120,000. */
  drainMs?: number;
  /** What the one-token probe of a half-open node may take; default 10,000. */
  probeMs?: number;
};

export type ConcurrencyOptions = {
  /** Ceiling where neither the configuration nor the engine tells one, 1…; default 256. */
  inflightMax: number;
  /** The learned cap never falls below this, nor below the ceiling if that is lower, 1…; default 4. */
  inflightMin: number;
  /** Overload sets the cap to this share of what is in flight, in (0, 1); default 0.9. */
  decreaseRatio: number;
  /** Time without overload, near the cap, after which it grows by one; default 5000. */
  increaseAfterMs: number;
};

const concurrencyDefaults: ConcurrencyOptions = {
  inflightMax: 256,
  inflightMin: 4,
  decreaseRatio: 0.9,
  increaseAfterMs: 5000,
};

/** Routers of this process and of its peers; far more than a cluster has. */
const ROUTERS_MAX = 256;
/** Failed checks after which the snapshot says unhealthy: routers look elsewhere before the circuit opens. */
const UNHEALTHY_AFTER = 2;
/** A router answers from memory; one that takes longer is not there. */
const EJECTION_ASK_MS = 500;
/** The probe's own timer is the upstream's; this much later the ask for it gives up. */
const PROBE_ASK_MARGIN_MS = 1000;
/** Wait before another probe when the upstream edge, not the node, failed the last one. */
const PROBE_AGAIN_MS = 1000;
/** An engine is overloaded where so many wait in it, at least, and so large a share of those running. */
const WAITING_MIN = 3;
const WAITING_RATIO = 0.1;
/** How finely routers see slow start. */
const RAMP_STEP_MS = 1000;
/** Work beyond our leases must persist this long to count: a scrape is a moment, leases come and go. */
const OTHERS_AFTER_MS = 30_000;
/** … and be more than this share of what the engine has. */
const OTHERS_RATIO = 0.2;
/** Leases that the engine does not know of, before they are called leaked: some are always on their way. */
const LEAKED_MIN = 5;
const ITL_ALPHA = 0.05;
/** Shorter streams say more about scheduling than about speed. */
const ITL_TOKENS_MIN = 16;
const PEAK_DECAY_MS = 10_000;
const ARTICLE_WEIGHT_MIN = 0.1;

type Lease = {
  readonly owner: string;
  readonly acquiredAtMs: number;
  expiresAtMs: number;
  /** 0 from the first token on. */
  uncachedTokens: number;
  /** Others in flight when it began. */
  readonly inflightBefore: number;
  hasFirstToken: boolean;
  outputTokens: number;
  /** Of the circuit, when it was admitted. */
  readonly era: number;
  /** Admitted as one of the few of a half-open circuit, and without a result so far. */
  hasPermit: boolean;
};

export class GpuNodeActor implements Actor<GpuNodeMessage | Private> {
  readonly #options: GpuNodeOptions;
  readonly #leaseTtlMs: number;
  readonly #restMsMax: number;
  readonly #wedgedMs: number;
  readonly #kvGate: number;
  readonly #healthFailures: number;
  readonly #healthSuccesses: number;
  readonly #probeMs: number;

  #incarnation = 0;
  #startedAtMs = 0;
  #version = 0;
  /** Of the present version; absent until somebody asks to see it. */
  #latest: NodeSnapshot | undefined;
  /** Subscribers by path; at most ROUTERS_MAX. */
  readonly #routers = new Map<string, ActorRef<NodeChanged>>();

  /** Ordered by expiry, soonest first: renewing moves a lease to the end. At most the cap's ceiling. */
  readonly #leases = new InflightMap<LeaseId, Lease>();
  #prefillTokens = 0;
  #isSweepArmed = false;
  readonly #totals: Record<LeaseOutcome, number> = {
    ok: 0,
    failed_local: 0,
    failed_gateway: 0,
    overloaded: 0,
    slow: 0,
    stalled: 0,
    client_error: 0,
    cancelled: 0,
  };

  readonly #cap: ConcurrencyCap;
  readonly #breaker: CircuitBreaker;
  #isDraining = false;
  #restUntilMs = 0;

  #itlSeconds: number | undefined;
  #itlSamples = 0;
  readonly #latency = new LatencyByInflight();
  #latencyMsPeakEwma: number | undefined;
  #latencyPeakAtMs = 0;
  #articleWeight = 1;

  #scrape: (ScrapeSample & { atMs: number }) | undefined;
  #hasScrapeFailed = false;
  /** Names of the signals last missed, joined. */
  #missing = "";
  #wasWaiting = false;
  /** Since when the engine has made no token while it ran requests of ours; absent while it does. */
  #stuckSinceMs: number | undefined;
  /** Requests in the engine that are none of our leases, once they have persisted. */
  #othersInflight = 0;
  #othersSinceMs: number | undefined;
  #leakedSinceMs: number | undefined;
  #isLeakReported = false;

  #models: readonly string[] | undefined;
  #adapters: readonly string[] | undefined;
  #isHealthy = true;
  #healthFailuresInRow = 0;
  #healthSuccessesInRow = 0;
  #healthDetail = "not checked yet";

  /** Throws for numbers that contradict each other: they come checked from the one table of options. */
  constructor(options: GpuNodeOptions) {
    this.#options = options;
    this.#leaseTtlMs = options.leaseTtlMs ?? 30_000;
    this.#restMsMax = options.restMsMax ?? 10_000;
    this.#wedgedMs = options.wedgedMs ?? 15_000;
    this.#kvGate = options.kvGate ?? 0.92;
    this.#healthFailures = options.healthFailures ?? 3;
    this.#healthSuccesses = options.healthSuccesses ?? 2;
    this.#probeMs = options.probeMs ?? 10_000;
    assert(this.#leaseTtlMs > 0 && this.#probeMs > 0, "leaseTtlMs and probeMs must be above 0");
    this.#cap = new ConcurrencyCap(
      { ...concurrencyDefaults, ...options.concurrency },
      options.inflightMax,
    );
    this.#breaker = new CircuitBreaker(options.circuit);
    this.#models = options.models;
    this.#adapters = options.adapters;
  }

  start(context: Context<GpuNodeMessage | Private>): void {
    this.#incarnation = context.self.uid;
    this.#startedAtMs = context.nowMs;
    const { node, scraper } = this.#options;
    context.tell(scraper, { kind: "scraper.add", node, replyTo: context.self });
  }

  stop(context: Context<GpuNodeMessage | Private>): void {
    context.tell(this.#options.scraper, { kind: "scraper.remove", node: this.#options.node });
  }

  receive(message: GpuNodeMessage | Private, context: Context<GpuNodeMessage | Private>): void {
    switch (message.kind) {
      case "gpu_node.acquire":
        return this.#onAcquire(message, context);
      case "gpu_node.first_token":
        return this.#onFirstToken(message.leaseId, context);
      case "gpu_node.progress":
        return this.#onProgress(message.leaseId, message.outputTokens, context);
      case "gpu_node.release":
        return this.#onRelease(message, context);
      case "gpu_node.owner_restarted":
        return this.#onOwnerRestarted(message.owner, context);
      case "gpu_node.subscribe":
        return this.#onSubscribe(message.router, context);
      case "gpu_node.drain":
        return this.#onDrain(context);
      case "gpu_node.undrain":
        return this.#onUndrain(context);
      case "gpu_node.describe":
        return context.reply(message.replyTo, this.#describe(context));
      case "scraper.sampled":
        return this.#onSampled(message.sample, context);
      case "scraper.failed":
        return this.#onScrapeFailed(message.reason, context);
      case "scraper.health":
        return this.#onHealth(message.ok, message.detail, context);
      case "scraper.models":
        return this.#onModels(message.models, message.adapters, context);
      case "gpu_node.sweep_due":
        return this.#onSweepDue(context);
      case "gpu_node.circuit_due":
        return this.#onCircuitDue(context);
      case "gpu_node.ramp_due":
        return this.#onRampDue(context);
      case "gpu_node.drain_due":
        return this.#reportDrained(context);
      case "gpu_node.probe_ended":
        return this.#onProbeEnded(message.era, message.outcome, context);
      case "gpu_node.ejection_decided":
        return this.#onEjectionDecided(message.cause, message.outcome, context);
      case "gpu_node.router_gone":
        return this.#onRouterGone(message.terminated);
      default:
        return unreachable(message);
    }
  }

  // ---- leases -----------------------------------------------------------------------------------------

  #onAcquire(
    message: Extract<GpuNodeMessage, { kind: "gpu_node.acquire" }>,
    context: NodeContext,
  ): void {
    const { leaseId, replyTo } = message;
    const { nowMs } = context;
    const { node } = this.#options;
    const held = this.#leases.get(leaseId);
    if (held !== undefined) {
      this.#renew(leaseId, held, nowMs);
      const snapshot = this.#current(nowMs);
      const probe = held.hasPermit;
      return context.reply(replyTo, { kind: "granted", leaseId, node, probe, snapshot });
    }
    const hasGrown = this.#growCap(context);
    const reason = this.#denial();
    if (reason !== undefined) {
      if (hasGrown) this.#publish(context);
      return context.reply(replyTo, { kind: "denied", reason, snapshot: this.#current(nowMs) });
    }
    const hasPermit = this.#breaker.tryPermit(nowMs);
    if (hasPermit) this.#armSilence(context);
    const uncachedTokens = wholeTokens(message.uncachedTokens);
    this.#leases.set(leaseId, {
      owner: message.owner,
      acquiredAtMs: nowMs,
      expiresAtMs: nowMs + this.#leaseTtlMs,
      uncachedTokens,
      inflightBefore: this.#leases.size,
      hasFirstToken: false,
      outputTokens: 0,
      era: this.#breaker.era,
      hasPermit,
    });
    this.#prefillTokens += uncachedTokens;
    this.#armSweep(this.#leaseTtlMs, context);
    this.#publish(context);
    const snapshot = this.#current(nowMs);
    context.reply(replyTo, { kind: "granted", leaseId, node, probe: hasPermit, snapshot });
  }

  /** Why no further lease is given now, if none is. */
  #denial(): Extract<AcquireReply, { kind: "denied" }>["reason"] | undefined {
    if (this.#isDraining) return "draining";
    const { state } = this.#breaker;
    if (state === "open") return "open";
    if (state === "half_open" && this.#breaker.permitsLeft <= 0) return "probe_busy";
    return this.#leases.size >= this.#leasesMax() ? "full" : undefined;
  }

  /** Room for our own leases. Others cannot push it below the least: they heed no cap, so they would win. */
  #leasesMax(): number {
    return Math.max(this.#cap.least, this.#cap.value - this.#othersInflight);
  }

  #onFirstToken(leaseId: LeaseId, context: NodeContext): void {
    const lease = this.#leases.get(leaseId);
    if (lease === undefined) return this.#ignore("first_token", "unknown_lease", context);
    this.#renew(leaseId, lease, context.nowMs);
    if (lease.hasFirstToken) return;
    lease.hasFirstToken = true;
    this.#prefillTokens -= lease.uncachedTokens;
    lease.uncachedTokens = 0;
    // Half open, a first token in time is a success at once; a stream's end may be minutes away.
    if (lease.hasPermit) this.#settle("ok", lease, context);
    this.#publish(context);
  }

  #onProgress(leaseId: LeaseId, outputTokens: number, context: NodeContext): void {
    const lease = this.#leases.get(leaseId);
    if (lease === undefined) return this.#ignore("progress", "unknown_lease", context);
    lease.outputTokens = outputTokens;
    this.#renew(leaseId, lease, context.nowMs);
  }

  #renew(leaseId: LeaseId, lease: Lease, nowMs: number): void {
    lease.expiresAtMs = nowMs + this.#leaseTtlMs;
    this.#leases.delete(leaseId);
    this.#leases.set(leaseId, lease);
  }

  #onRelease(release: Release, context: NodeContext): void {
    const lease = this.#leases.get(release.leaseId);
    if (lease === undefined) return this.#ignore("release", "unknown_lease", context);
    const { outcome, retryAfterMs } = release;
    const { nowMs } = context;
    if (outcome === "overloaded") this.#shrinkCap("refused", 0, context); // The refused one still counts.
    this.#drop(release.leaseId, lease);
    this.#totals[outcome]++;
    this.#learn(release, lease, nowMs);
    if (retryAfterMs !== undefined && retryAfterMs > 0) {
      const untilMs = nowMs + Math.min(retryAfterMs, this.#restMsMax);
      this.#restUntilMs = Math.max(this.#restUntilMs, untilMs);
    }
    this.#settle(resultOf(outcome), lease, context);
    this.#publish(context);
    if (this.#isDraining && this.#leases.size === 0) this.#reportDrained(context);
  }

  #drop(leaseId: LeaseId, lease: Lease): void {
    this.#leases.delete(leaseId);
    this.#prefillTokens -= lease.uncachedTokens;
    assert(this.#prefillTokens >= 0, "prefill tokens are the sum over the leases held");
  }

  #learn(release: Release, lease: Lease, nowMs: number): void {
    const { outcome, outputTokens, decodeMs, e2eMs } = release;
    const isTimeout = outcome === "slow" || outcome === "stalled";
    if (isTimeout) {
      this.#articleWeight = Math.max(ARTICLE_WEIGHT_MIN, this.#articleWeight / 2);
    }
    // A quick failure is not a quick node: only answers count as latency, and waits that were given up.
    if (!isPositive(e2eMs) || !(outcome === "ok" || isTimeout)) return;
    this.#learnPeak(e2eMs, nowMs);
    if (isTimeout) return;
    this.#latency.record(lease.inflightBefore, e2eMs);
    if (!(outputTokens > ITL_TOKENS_MIN) || !isPositive(decodeMs)) return; // It came whole.
    const seconds = decodeMs / (outputTokens - 1) / 1000;
    // A plain mean at first, so that one odd first stream is not remembered for twenty more.
    const alpha = Math.max(ITL_ALPHA, 1 / ++this.#itlSamples);
    this.#itlSeconds = (this.#itlSeconds ?? 0) * (1 - alpha) + seconds * alpha;
  }

  #learnPeak(sampleMs: number, nowMs: number): void {
    const last = this.#latencyMsPeakEwma;
    const share = 1 - Math.exp((this.#latencyPeakAtMs - nowMs) / PEAK_DECAY_MS);
    this.#latencyMsPeakEwma =
      last === undefined || sampleMs > last ? sampleMs : last + (sampleMs - last) * share;
    this.#latencyPeakAtMs = nowMs;
  }

  #onOwnerRestarted(owner: string, context: NodeContext): void {
    let freed = 0;
    for (const [leaseId, lease] of this.#leases) {
      if (lease.owner !== owner) continue;
      this.#drop(leaseId, lease);
      this.#settle("none", lease, context);
      freed++;
    }
    if (freed === 0) return;
    const { node } = this.#options;
    this.#emit({ kind: "gpu_node.owner_freed", node, owner, leases: freed }, context);
    this.#publish(context);
    if (this.#isDraining && this.#leases.size === 0) this.#reportDrained(context);
  }

  #armSweep(afterMs: number, context: NodeContext): void {
    if (this.#isSweepArmed) return;
    this.#isSweepArmed = true;
    context.startTimer("sweep", afterMs, { kind: "gpu_node.sweep_due" });
  }

  #onSweepDue(context: NodeContext): void {
    this.#isSweepArmed = false;
    const { nowMs } = context;
    const { node } = this.#options;
    let expired = 0;
    for (const [leaseId, lease] of this.#leases) {
      if (lease.expiresAtMs > nowMs) {
        // At least 1 ms: rounded to the clock's grain it might fire before its time, again and again.
        this.#armSweep(Math.max(1, lease.expiresAtMs - nowMs), context);
        break;
      }
      const { owner, acquiredAtMs } = lease;
      this.#drop(leaseId, lease);
      // A half-open node that gave a call no first token all this time is to blame; otherwise its owner is.
      this.#settle(lease.hasPermit ? "slow" : "none", lease, context);
      expired++;
      const ageMs = nowMs - acquiredAtMs;
      this.#emit({ kind: "gpu_node.lease_expired", node, leaseId, owner, ageMs }, context);
    }
    if (expired === 0) return;
    this.#publish(context);
    if (this.#isDraining && this.#leases.size === 0) this.#reportDrained(context);
  }

  // ---- circuit ----------------------------------------------------------------------------------------

  /** Tells the circuit what became of a lease, and follows it. */
  #settle(result: CallResult, lease: Lease, context: NodeContext): void {
    const breaker = this.#breaker;
    const { nowMs } = context;
    if (lease.era !== breaker.era) {
      if (result !== "none") this.#ignore(`result ${result}`, "circuit_moved_on", context);
      return;
    }
    const from = breaker.state;
    const cause = breaker.settle(result, lease.era, lease.hasPermit, nowMs);
    lease.hasPermit = false;
    if (cause !== undefined) this.#trip(cause, context);
    if (from === "half_open" && breaker.state === "closed") {
      context.cancelTimer("circuit");
      context.startTimer("ramp", RAMP_STEP_MS, { kind: "gpu_node.ramp_due" });
      this.#emitCircuit(from, "trials_succeeded", breaker.numbers(nowMs), context);
    }
  }

  /** The circuit should open: a half-open one does, a closed one asks the pool first. */
  #trip(cause: CircuitCause, context: NodeContext): void {
    if (this.#breaker.state === "open") return;
    const first = this.#routers.values().next();
    if (this.#breaker.state === "half_open" || first.done) return this.#becomeOpen(cause, context);
    const { node } = this.#options;
    context.ask<RouterMessage, Consent>(
      first.value as ActorRef<RouterMessage>, // Only routers subscribe to `router.node_changed`.
      EJECTION_ASK_MS,
      (replyTo) => ({ kind: "router.may_eject", node, replyTo }),
      (outcome) => ({ kind: "gpu_node.ejection_decided", cause, outcome }),
    );
  }

  #onEjectionDecided(
    cause: CircuitCause,
    outcome: AskOutcome<Consent>,
    context: NodeContext,
  ): void {
    // The circuit has waited for this: nothing else moves it from closed.
    if (!outcome.ok || outcome.value.granted) this.#becomeOpen(cause, context);
    else {
      const { node } = this.#options;
      const numbers = this.#breaker.numbers(context.nowMs);
      this.#breaker.stayClosed(context.nowMs);
      context.startTimer("ramp", RAMP_STEP_MS, { kind: "gpu_node.ramp_due" });
      this.#emit({ kind: "gpu_node.ejection_refused", node, cause, ...numbers }, context);
    }
    this.#publish(context);
  }

  #becomeOpen(cause: CircuitCause, context: NodeContext, detail?: string): void {
    const breaker = this.#breaker;
    const from = breaker.state;
    const numbers = breaker.numbers(context.nowMs);
    const openForMs = breaker.open(cause, context.random(), context.nowMs);
    const ejections = numbers.ejections + 1;
    context.startTimer("circuit", openForMs, { kind: "gpu_node.circuit_due" });
    const more = { openForMs, ...(detail === undefined ? {} : { detail }) };
    this.#emitCircuit(from, cause, { ...numbers, ejections }, context, more);
  }

  #becomeHalfOpen(cause: string, context: NodeContext): void {
    this.#breaker.becomeHalfOpen(context.nowMs);
    context.cancelTimer("circuit");
    this.#emitCircuit("open", cause, this.#breaker.numbers(context.nowMs), context);
    this.#startProbe(context);
  }

  /** One token, made for nobody, before any client's request is risked. */
  #startProbe(context: NodeContext): void {
    const { node, upstream } = this.#options;
    const { era } = this.#breaker;
    const timeoutMs = this.#probeMs;
    context.ask<UpstreamCommand, ProbeReply>(
      upstream,
      timeoutMs + PROBE_ASK_MARGIN_MS,
      (replyTo) => ({ kind: "upstream.probe", node, timeoutMs, replyTo }),
      (outcome) => ({ kind: "gpu_node.probe_ended", era, outcome }),
    );
  }

  #onProbeEnded(era: number, outcome: AskOutcome<ProbeReply>, context: NodeContext): void {
    if (era !== this.#breaker.era || !this.#breaker.isProbing) {
      return this.#ignore("probe", "circuit_moved_on", context);
    }
    if (outcome.ok && outcome.value.answered) this.#breaker.admitTrials();
    else if (outcome.ok) this.#becomeOpen("probe_failed", context, outcome.value.detail);
    else if (outcome.failure === "timeout") this.#becomeOpen("probe_failed", context, "timeout");
    else {
      context.startTimer("circuit", PROBE_AGAIN_MS, { kind: "gpu_node.circuit_due" });
      return;
    }
    this.#publish(context);
  }

  #armSilence(context: NodeContext): void {
    const afterMs = Math.max(1, this.#breaker.resultDueAtMs - context.nowMs);
    context.startTimer("circuit", afterMs, { kind: "gpu_node.circuit_due" });
  }

  #onCircuitDue(context: NodeContext): void {
    const breaker = this.#breaker;
    switch (breaker.state) {
      case "closed":
        return;
      case "open":
        // An unhealthy node stays out; the checks that find it well again let it in.
        if (!this.#isHealthy) return;
        this.#becomeHalfOpen("time_out_over", context);
        break;
      case "half_open": {
        if (breaker.isProbing) return this.#startProbe(context);
        const cause = breaker.overdue(context.nowMs);
        if (cause !== undefined) this.#becomeOpen(cause, context);
        else if (Number.isFinite(breaker.resultDueAtMs)) return this.#armSilence(context);
        else return;
        break;
      }
      default:
        return unreachable(breaker.state);
    }
    this.#publish(context);
  }

  #onRampDue(context: NodeContext): void {
    if (this.#breaker.state !== "closed") return;
    if (this.#breaker.ramp(context.nowMs) < 1) {
      context.startTimer("ramp", RAMP_STEP_MS, { kind: "gpu_node.ramp_due" });
    }
    this.#publish(context);
  }

  #emitCircuit(
    from: CircuitState,
    cause: string,
    numbers: CircuitNumbers,
    context: NodeContext,
    more: { openForMs?: number; detail?: string } = {},
  ): void {
    this.#emit(
      {
        kind: "gpu_node.circuit_changed",
        node: this.#options.node,
        from,
        to: this.#breaker.state,
        cause,
        inflight: this.#leases.size,
        ...more,
        ...numbers,
      },
      context,
    );
  }

  // ---- what the scraper says ----------------------------------------------------------------------------

  #onSampled(sample: ScrapeSample, context: NodeContext): void {
    const before = this.#scrape;
    this.#scrape = { ...sample, atMs: context.nowMs };
    this.#hasScrapeFailed = false;
    this.#reportMissing(sample, context);
    if (sample.maxSequences !== undefined) {
      const from = this.#cap.value;
      this.#cap.learnCeiling(sample.maxSequences);
      this.#reportCap(from, "engine_told", context);
    }
    this.#reconcile(sample, before === undefined, context);
    this.#watchOverload(sample, before, context);
    this.#growCap(context);
    this.#watchStuck(sample, before, context);
    this.#publish(context);
  }

  #reportMissing({ engine, missing }: ScrapeSample, context: NodeContext): void {
    const names = missing.join(" ");
    if (names === this.#missing) return;
    this.#missing = names;
    if (missing.length === 0) return;
    const { node } = this.#options;
    this.#emit({ kind: "gpu_node.signal_missing", node, engine, missing }, context);
  }

  /** Compares our leases with what the engine has. Both are moments, so a difference must last to count. */
  #reconcile(sample: ScrapeSample, isFirst: boolean, context: NodeContext): void {
    if (sample.running === undefined) return;
    const { nowMs } = context;
    const engine = sample.running + (sample.waiting ?? 0);
    const leases = this.#leases.size;
    if (engine - leases > OTHERS_RATIO * engine) {
      this.#othersSinceMs ??= nowMs;
      // What the first scrape finds is at once taken for work that an earlier incarnation had let in.
      const counts = isFirst || this.#othersInflight > 0;
      if (counts || nowMs - this.#othersSinceMs >= OTHERS_AFTER_MS) {
        this.#othersInflight = Math.round(engine - leases);
      }
    } else {
      this.#othersSinceMs = undefined;
      this.#othersInflight = 0;
    }
    if (leases <= engine + LEAKED_MIN) {
      this.#leakedSinceMs = undefined;
      this.#isLeakReported = false;
      return;
    }
    this.#leakedSinceMs ??= nowMs;
    if (this.#isLeakReported || nowMs - this.#leakedSinceMs < OTHERS_AFTER_MS) return;
    this.#isLeakReported = true;
    const { node } = this.#options;
    this.#emit({ kind: "gpu_node.leases_exceed_engine", node, leases, engine }, context);
  }

  #watchOverload(
    sample: ScrapeSample,
    before: ScrapeSample | undefined,
    context: NodeContext,
  ): void {
    const isWaiting = isShortOfCapacity(sample, this.#kvGate);
    const preemptions = sample.preemptionsTotal ?? 0;
    const hasPreempted = preemptions > (before?.preemptionsTotal ?? preemptions);
    // What it runs it can run: less than that would leave seats empty, and so would no one in its queue.
    const running = sample.running ?? 0;
    if (hasPreempted) this.#shrinkCap("preemption", running, context);
    else if (isWaiting && this.#wasWaiting) {
      this.#shrinkCap("waiting", running + WAITING_MIN, context);
    }
    this.#wasWaiting = isWaiting;
  }

  /** Wedged: it runs requests of ours, and its token counter stands still. Its health route may say ok. */
  #watchStuck(sample: ScrapeSample, before: ScrapeSample | undefined, context: NodeContext): void {
    const tokens = sample.generatedTokensTotal;
    const isStuck =
      tokens !== undefined &&
      tokens === before?.generatedTokensTotal &&
      (sample.running ?? 0) > 0 &&
      this.#leases.size > 0 &&
      this.#breaker.state !== "open";
    if (!isStuck) {
      this.#stuckSinceMs = undefined;
      return;
    }
    this.#stuckSinceMs ??= context.nowMs;
    if (context.nowMs - this.#stuckSinceMs < this.#wedgedMs) return;
    const cause = this.#breaker.condemn("wedged", context.nowMs);
    if (cause !== undefined) this.#trip(cause, context);
  }

  #onScrapeFailed(reason: string, context: NodeContext): void {
    if (this.#hasScrapeFailed) return; // The age of the last sample tells the rest.
    this.#hasScrapeFailed = true;
    this.#emit({ kind: "gpu_node.scrape_failed", node: this.#options.node, reason }, context);
  }

  #onHealth(ok: boolean, detail: string, context: NodeContext): void {
    this.#healthDetail = detail;
    const wasHealthy = this.#isHealthy;
    let cause: CircuitCause | undefined;
    if (ok) {
      this.#healthFailuresInRow = 0;
      this.#healthSuccessesInRow++;
      if (this.#healthSuccessesInRow >= this.#healthSuccesses) this.#isHealthy = true;
    } else {
      this.#healthSuccessesInRow = 0;
      this.#healthFailuresInRow++;
      if (this.#healthFailuresInRow >= Math.min(UNHEALTHY_AFTER, this.#healthFailures)) {
        this.#isHealthy = false;
      }
      if (this.#healthFailuresInRow >= this.#healthFailures) {
        cause = this.#breaker.condemn("health", context.nowMs);
        if (cause !== undefined) this.#trip(cause, context);
      }
    }
    const healthy = this.#isHealthy;
    if (healthy === wasHealthy && cause === undefined) return;
    if (healthy !== wasHealthy) {
      const { node } = this.#options;
      this.#emit({ kind: "gpu_node.health_changed", node, healthy, detail }, context);
      // It was down and is back: no need to sit out a time that grew while it was down.
      if (healthy && this.#breaker.state === "open") this.#becomeHalfOpen("health_back", context);
    }
    this.#publish(context);
  }

  #onModels(models: readonly string[], adapters: readonly string[], context: NodeContext): void {
    const { node } = this.#options;
    const served = this.#options.models ?? models;
    const held = this.#options.adapters ?? adapters;
    if (isSameList(served, this.#models) && isSameList(held, this.#adapters)) return;
    this.#models = served;
    this.#adapters = held;
    this.#emit({ kind: "gpu_node.models_changed", node, models: served, adapters: held }, context);
    this.#publish(context);
  }

  #shrinkCap(cause: string, leave: number, context: NodeContext): void {
    const from = this.#cap.value;
    this.#cap.shrink(this.#leases.size + this.#othersInflight, leave, context.nowMs);
    this.#reportCap(from, cause, context);
  }

  #growCap(context: NodeContext): boolean {
    const from = this.#cap.value;
    this.#cap.grow(this.#leases.size + this.#othersInflight, context.nowMs);
    return this.#reportCap(from, "quiet", context);
  }

  #reportCap(from: number, cause: string, context: NodeContext): boolean {
    const to = this.#cap.value;
    if (from === to) return false;
    const { node } = this.#options;
    this.#emit({ kind: "gpu_node.cap_changed", node, from, to, cause }, context);
    return true;
  }

  // ---- draining, subscribers, snapshots -----------------------------------------------------------------

  #onDrain(context: NodeContext): void {
    if (this.#isDraining) return;
    this.#isDraining = true;
    this.#publish(context);
    if (this.#leases.size === 0) return this.#reportDrained(context);
    context.startTimer("drain", this.#options.drainMs ?? 120_000, { kind: "gpu_node.drain_due" });
  }

  #onUndrain(context: NodeContext): void {
    if (!this.#isDraining) return;
    this.#isDraining = false;
    context.cancelTimer("drain");
    this.#publish(context);
  }

  #reportDrained(context: NodeContext): void {
    context.cancelTimer("drain");
    const { node } = this.#options;
    this.#emit({ kind: "gpu_node.drained", node, leases: this.#leases.size }, context);
  }

  #onSubscribe(router: ActorRef<NodeChanged>, context: NodeContext): void {
    const known = this.#routers.get(router.path);
    if (known === undefined && this.#routers.size >= ROUTERS_MAX) {
      return this.#ignore("subscribe", "too_many_routers", context);
    }
    this.#routers.set(router.path, router);
    // A name (uid 0) outlives its incarnations, and so does its subscription.
    if (router.uid !== 0 && known?.uid !== router.uid) {
      context.watch(router, (terminated) => ({ kind: "gpu_node.router_gone", terminated }));
    }
    context.tell(router, {
      kind: "router.node_changed",
      snapshot: this.#current(context.nowMs),
    });
  }

  #onRouterGone({ path, uid }: Terminated): void {
    if (this.#routers.get(path)?.uid === uid) this.#routers.delete(path); // Else it is back already.
  }

  /** Something changed: one object for every router. */
  #publish(context: NodeContext): void {
    this.#version++;
    this.#latest = undefined;
    if (this.#routers.size === 0) return;
    const snapshot = this.#current(context.nowMs);
    const changed: NodeChanged = { kind: "router.node_changed", snapshot };
    for (const router of this.#routers.values()) context.tell(router, changed);
  }

  #current(nowMs: number): NodeSnapshot {
    this.#latest ??= this.#snapshot(nowMs);
    return this.#latest;
  }

  #snapshot(nowMs: number): NodeSnapshot {
    const { node, address } = this.#options;
    const breaker = this.#breaker;
    const leases = this.#leases.size;
    const latencyMsAtInflight = this.#latency.medianMs(leases);
    const snapshot: Mutable<NodeSnapshot> = {
      node,
      address,
      incarnation: this.#incarnation,
      version: this.#version,
      atMs: nowMs,
      inflight: leases + this.#othersInflight,
      prefillTokens: this.#prefillTokens,
      inflightMax: this.#leasesMax() + this.#othersInflight,
      circuit: breaker.state,
      probePermits: breaker.permitsLeft,
      draining: this.#isDraining,
      ramp: breaker.ramp(nowMs),
      healthy: this.#isHealthy,
      restUntilMs: this.#restUntilMs,
      articleWeight: this.#articleWeight,
    };
    if (this.#models !== undefined) snapshot.models = this.#models;
    if (this.#adapters !== undefined) snapshot.adapters = this.#adapters;
    if (this.#itlSeconds !== undefined) snapshot.itlSeconds = this.#itlSeconds;
    if (this.#scrape !== undefined) snapshot.scrape = this.#scrape;
    if (latencyMsAtInflight !== undefined) snapshot.latencyMsAtInflight = latencyMsAtInflight;
    if (this.#latencyMsPeakEwma !== undefined) {
      snapshot.latencyMsPeakEwma = this.#latencyMsPeakEwma;
    }
    return snapshot;
  }

  #describe(context: NodeContext): NodeDescription {
    const { nowMs } = context;
    const breaker = this.#breaker;
    const { calls, failures, slow, ejections } = breaker.numbers(nowMs);
    return {
      snapshot: this.#current(nowMs),
      leases: Array.from(this.#leases, ([leaseId, lease]) => ({
        leaseId,
        ageMs: nowMs - lease.acquiredAtMs,
        firstToken: lease.hasFirstToken,
        outputTokens: lease.outputTokens,
      })),
      circuit: {
        state: breaker.state,
        sinceMs: nowMs - Math.max(breaker.stateAtMs, this.#startedAtMs),
        ejections,
        ...(breaker.state === "open" ? { openForMs: breaker.openForMs } : {}),
        ...(breaker.cause === undefined ? {} : { cause: breaker.cause }),
      },
      window: { calls, failures, slow },
      othersInflight: this.#othersInflight,
      health: {
        ok: this.#isHealthy,
        failuresInRow: this.#healthFailuresInRow,
        detail: this.#healthDetail,
      },
      totals: { ...this.#totals },
    };
  }

  #ignore(
    what: string,
    reason: Extract<GpuNodeEvent, { kind: "gpu_node.ignored" }>["reason"],
    context: NodeContext,
  ): void {
    this.#emit({ kind: "gpu_node.ignored", node: this.#options.node, what, reason }, context);
  }

  #emit(event: GpuNodeEvent, context: NodeContext): void {
    context.emit(event);
  }
}

type NodeContext = Context<GpuNodeMessage | Private>;
type Release = Extract<GpuNodeMessage, { kind: "gpu_node.release" }>;
type Mutable<T> = { -readonly [K in keyof T]: T[K] };

function isSameList(a: readonly string[], b: readonly string[] | undefined): boolean {
  return b !== undefined && a.length === b.length && a.every((item, i) => item === b[i]);
}

/** Counts come from other processes: a sum of them must stay whole, finite and reversible. */
function wholeTokens(tokens: number): number {
  return tokens > 0 ? Math.min(Math.round(tokens), 1_000_000_000) : 0;
}

function isPositive(value: number): boolean {
  return value > 0 && value < Number.POSITIVE_INFINITY;
}

/** What an outcome says of the node. A stream that stalled half-way broke, as one that was cut. */
function resultOf(outcome: LeaseOutcome): CallResult {
  switch (outcome) {
    case "ok":
    case "failed_local":
    case "failed_gateway":
    case "slow":
      return outcome;
    case "stalled":
      return "failed_gateway";
    case "overloaded":
    case "client_error":
    case "cancelled":
      return "none";
    default:
      return unreachable(outcome);
  }
}

/**
 * How much may be in flight: additive increase, multiplicative decrease. It reads overload only where
 * the engine says so; latency would show the length of answers instead.
 */
class ConcurrencyCap {
  readonly #options: ConcurrencyOptions;
  readonly #configured: number | undefined;
  #ceiling: number;
  #value: number;
  #changedAtMs = Number.NEGATIVE_INFINITY;
  #wasOverloaded = false;

  constructor(options: ConcurrencyOptions, configured: number | undefined) {
    const { decreaseRatio, inflightMin } = options;
    assert(decreaseRatio > 0 && decreaseRatio < 1, "decreaseRatio must be in (0, 1)");
    assert(inflightMin >= 1, "a node that may hold nothing could never be tried");
    this.#options = options;
    this.#configured = configured;
    this.#ceiling = configured ?? options.inflightMax;
    this.#value = this.#ceiling;
    assert(this.#ceiling >= 1, "inflightMax must be at least 1");
  }

  get value(): number {
    return this.#value;
  }

  /** It never falls below this. */
  get least(): number {
    return Math.min(this.#options.inflightMin, this.#ceiling);
  }

  /** The engine's own bound on sequences; a tenth more keeps its queue from running dry. */
  learnCeiling(maxSequences: number): void {
    if (this.#configured !== undefined || !(maxSequences >= 1)) return;
    this.#ceiling = Math.floor(maxSequences * 1.1);
    this.#value = this.#wasOverloaded ? Math.min(this.#value, this.#ceiling) : this.#ceiling;
  }

  /** @param leave not below that, whatever is in flight */
  shrink(inflight: number, leave: number, nowMs: number): void {
    const share = Math.floor(inflight * this.#options.decreaseRatio);
    const next = Math.max(this.least, leave, share);
    this.#value = Math.min(this.#value, next);
    this.#wasOverloaded = true;
    this.#changedAtMs = nowMs;
  }

  grow(inflight: number, nowMs: number): void {
    if (this.#value >= this.#ceiling || inflight < 0.9 * this.#value) return;
    if (nowMs - this.#changedAtMs < this.#options.increaseAfterMs) return;
    this.#value++;
    this.#changedAtMs = nowMs;
  }
}

/**
 * Whether requests wait in the engine for want of capacity. One or two wait in any busy engine, from one step to the
 * next. An engine that does not tell what they wait for may have plenty of room, and only long prompts to be
 * prefilled in their turn: there, they count where its memory is full, its seats are taken, or no fewer wait than run.
 */
function isShortOfCapacity(sample: ScrapeSample, kvGate: number): boolean {
  const { running = 0, waiting = 0, waitingForCapacity, maxSequences, kv = 0 } = sample;
  if ((waitingForCapacity ?? waiting) < Math.max(WAITING_MIN, WAITING_RATIO * running))
    return false;
  if (waitingForCapacity !== undefined || kv > kvGate || waiting >= running) return true;
  return maxSequences !== undefined && running >= maxSequences;
}

const LATENCY_SAMPLES = 9;
const LATENCY_BANDS = 18; // 2^17 in flight and more share the last band.

/**
 * Latencies of finished requests by how many others were in flight when they began, in bands of powers
 * of two. Each band keeps its last nine, in order of arrival and in order of size, so that the median is
 * always at hand.
 */
class LatencyByInflight {
  readonly #bands: ({ recent: number[]; next: number; sorted: number[] } | undefined)[] = new Array(
    LATENCY_BANDS,
  ).fill(undefined);

  record(inflightBefore: number, latencyMs: number): void {
    const index = bandOf(inflightBefore);
    const band = this.#bands[index] ?? { recent: [], next: 0, sorted: [] };
    this.#bands[index] = band;
    const { recent, sorted } = band;
    const oldest = recent[band.next];
    if (oldest !== undefined) sorted.splice(sorted.indexOf(oldest), 1);
    recent[band.next] = latencyMs;
    band.next = (band.next + 1) % LATENCY_SAMPLES;
    let at = sorted.length;
    while (at > 0 && (sorted[at - 1] ?? 0) > latencyMs) at--;
    sorted.splice(at, 0, latencyMs);
  }

  /** Of the band that a request would begin in now, else of the nearest one; undefined before any sample. */
  medianMs(inflight: number): number | undefined {
    const index = bandOf(inflight);
    for (let distance = 0; distance < LATENCY_BANDS; distance++) {
      const band = this.#bands[index - distance] ?? this.#bands[index + distance];
      if (band !== undefined) return band.sorted[band.sorted.length >> 1];
    }
    return undefined;
  }
}

function bandOf(inflight: number): number {
  return Math.min(LATENCY_BANDS - 1, 31 - Math.clz32(inflight + 1));
}
