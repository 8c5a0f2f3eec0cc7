/**
 * The router of this process: gives each attempt of a request a node, or a reason why there is none.
 *
 *   choose ──▶ filter, score, pick ──▶ acquire ──granted──▶ placed
 *                     ▲    │ nobody         │ denied: the next candidate, up to 3
 *                     │    ▼                ▼
 *                     └─ queued ◀───────────┘   (a node changed, or a tick: try again)
 *                          │ deadline, no room in the queue, no node left
 *                          ▼
 *                       refused
 *
 * It owns the pools (the nodes of one model), their fair queues and retry budgets, and what it has asked of nodes
 * and not heard of yet. Of the nodes it knows snapshots: they come by subscription and with each reply, and their
 * age counts from receipt here. The node's own actor decides; a snapshot that was too old costs one denial. Leases
 * being asked for count as in flight at once, so that a burst spreads and a freed place is not given out twice.
 *
 * A request that finds every node busy waits in the fair queue. One that finds nothing to wait for is refused with
 * `no_node`: every node has an open circuit, is draining, or was tried. Nobody waits behind the probes of a
 * half-open node. When every circuit is open the nodes are still asked, one request at a time each; a node knows
 * whether it is down, and denies if so. So a pool of one node may eject that node: it comes back by itself.
 *
 * Lost on a restart: the queues, the budgets, what was sent where. Their askers see the crash and ask again; a
 * lease granted to nobody expires at its node. It sees no prompt and no answer, retries nothing by itself
 * (request.ts), and counts no node's leases (gpu-node.ts).
 */

import {
  type Actor,
  type ActorRef,
  type AskOutcome,
  type Context,
  type ReplyTo,
  type Terminated,
  unreachable,
} from "../runtime/actor.ts";
import { InflightMap } from "../runtime/inflight-map.ts";
import type { ErrorCode } from "./errors.ts";
import { FairQueue, type FairQueueOptions, type QueueEntry } from "./fair-queue.ts";
import type { AcquireReply, GpuNodeMessage, NodeChanged } from "./gpu-node.ts";
import {
  Field,
  makeStrategy,
  membershipOf,
  NodeView,
  type RankingOptions,
  type SentPrompt,
  type Strategy,
  uncachedTokensOf,
  type Wanted,
} from "./node-score.ts";
import type {
  CandidateFact,
  Decision,
  LeaseId,
  NodeId,
  NodeSnapshot,
  Priority,
  RequestFacts,
  RequestId,
} from "./protocol.ts";
import { RetryBudget, type RetryBudgetOptions } from "./retry-budget.ts";

export type RouterMessage =
  /**
   * Places one attempt: answered once a lease is granted, or refused. May wait in the fair queue until
   * `deadlineAtMs`. Attempts > 1 withdraw from the pool's retry budget; `tried` nodes are never chosen.
   */
  | {
      kind: "router.choose";
      facts: RequestFacts;
      attempt: number;
      tried: readonly NodeId[];
      /** Path of the request actor that will hold the lease. */
      owner: string;
      replyTo: ReplyTo<ChooseReply>;
    }
  /** The client left while the request may still be queued; a lease granted meanwhile is released. */
  | { kind: "router.cancel"; requestId: RequestId }
  /** Tokens an ended request really used: settles the tenant's turn in the fair queue. */
  | {
      kind: "router.used";
      model?: string;
      tenant: string;
      promptTokens: number;
      outputTokens: number;
    }
  /** A node wants to open its circuit: granted unless too much of its pool is ejected already. */
  | { kind: "router.may_eject"; node: NodeId; replyTo: ReplyTo<{ granted: boolean }> }
  | { kind: "router.node_removed"; node: NodeId }
  /** Another process has the node's actor from now on, or one has it at last: `node` of the options says where. */
  | { kind: "router.node_moved"; node: NodeId }
  | { kind: "router.describe"; replyTo: ReplyTo<RouterDescription> }
  /** Takes effect at the next decision; what waits keeps waiting, under the new bounds. */
  | { kind: "router.configure"; options: RouterSettings }
  | NodeChanged
  | Acquired
  | NodeEnded
  | { kind: "router.subscribe_due"; node: NodeId }
  | { kind: "router.tick" };

// Only our own asks, watches and timers send these.
type Acquired = {
  kind: "router.acquired";
  requestId: RequestId;
  leaseId: LeaseId;
  node: NodeId;
  outcome: AskOutcome<AcquireReply>;
};
type NodeEnded = { kind: "router.node_ended"; node: NodeId; terminated: Terminated };

/** Where an attempt goes, with its lease; or why it goes nowhere. `queuedMs`: time in the fair queue. */
export type ChooseReply =
  | {
      kind: "placed";
      node: NodeId;
      leaseId: LeaseId;
      queuedMs: number;
      decision: Decision;
    }
  | {
      kind: "refused";
      code: ErrorCode;
      retryAfterMs?: number;
      queuedMs: number;
      decision: Decision;
    };

/** The router's pools, queues and retry budgets, for people. */
export type RouterDescription = {
  strategy: string;
  pools: readonly {
    model: string;
    nodes: readonly NodeId[];
    eligible: number;
    panic: boolean;
    queued: readonly { priority: Priority; tenant: string; waiting: number }[];
    retryBudget: { balance: number; deposited: number; withdrawn: number; refused: number };
  }[];
};

/** What may change while it runs. */
export type RouterSettings = {
  ranking: RankingOptions;
  queue: FairQueueOptions;
  retry: RetryBudgetOptions;
  /** Share of a pool's nodes that may be out at once, 0..1, one node at least; default 0.34. */
  ejectedRatioMax: number;
};

export type RouterOptions = RouterSettings & {
  /** Where a node's actor is. */
  node: (node: NodeId) => ActorRef<GpuNodeMessage>;
  /** The nodes that there are, to subscribe to at a start. */
  nodes: () => readonly NodeId[];
};

/** What it reports: only what no reply and no description tells. */
export type RouterEvent =
  | { kind: "router.node_refused"; node: NodeId; reason: "too_many_nodes" }
  | { kind: "router.pool_refused"; node: NodeId; reason: "too_many_models" }
  | { kind: "router.acquire_failed"; node: NodeId; failure: string }
  /** What a node serves is known now, or is something else than before. */
  | {
      kind: "router.models_changed";
      node: NodeId;
      models: readonly string[];
      adapters: readonly string[];
    };

const NODES_MAX = 4096;
const POOLS_MAX = 4096;
/** A node's actor answers from memory; one that takes longer is not there. */
const ACQUIRE_MS = 1000;
/** A node that did not answer is left alone for so long, unless it speaks. */
const UNREACHABLE_MS = 1000;
/** Before a node's actor that ended is subscribed to again: its supervisor needs a moment. */
const SUBSCRIBE_AGAIN_MS = 250;
/** Late snapshots of a removed node are ignored for so long. */
const REMOVED_MS = 5000;
/** An ejection that was granted counts for so long before the node's snapshot shows it. */
const EJECTION_GRANT_MS = 2000;
/** Denials after which a request waits instead of asking on. */
const DENIALS_MAX = 3;
/** Entries at the head of a queue that may be passed over, because only nodes they have tried are free. */
const PASSED_OVER_MAX = 8;
/** While entries wait: deadlines, scrapes that went stale and rests that ended need a look. */
const TICK_MS = 100;
/** Retry-After where a node is being probed, or only silent: it may be back in a moment. */
const SOON_MS = 1000;
/** Batch requests are shed with probability 3 · saturation⁵: all of them at 0.80. */
const SHED_FACTOR = 3;
/** Without a session, the affinity key is made of a prompt's first 1024 characters. */
const HEAD_TOKENS = 256;

/** The nodes of one model, or of any (`undefined`, for routes without a model). */
type Pool = {
  readonly model: string | undefined;
  readonly field: Field;
  readonly queue: FairQueue<Choice>;
  readonly budget: RetryBudget;
  strategy: Strategy;
};

/** One attempt that wants a node: asked for at `asked`, else waiting since `queuedAtMs`. */
class Choice implements QueueEntry, Wanted {
  readonly pool: Pool;
  readonly facts: RequestFacts;
  readonly attempt: number;
  readonly owner: string;
  readonly leaseId: LeaseId;
  /** Of whoever asked last. */
  replyTo: ReplyTo<ChooseReply>;

  readonly id: RequestId;
  readonly tenant: string;
  readonly key: string;
  readonly weight: number;
  readonly priority: Priority;
  readonly cost: number;
  readonly arrivedAtMs: number;
  readonly deadlineAtMs: number;

  readonly promptTokens: number;
  readonly affinityKey: number | undefined;
  readonly isRetry: boolean;
  readonly tried: readonly NodeId[];
  readonly triedAddresses: readonly string[];
  readonly sent: readonly SentPrompt[];
  /** In this round; emptied when it has waited. */
  denied: NodeId[] = [];

  asked: NodeView | undefined;
  /** Uncached tokens that the asked node was told of. */
  askedTokens = 0;
  /** When it began to wait, if it ever did. */
  queuedAtMs: number | undefined;
  /** The fair queue has charged its tenant. */
  isCharged = false;

  // For the decision's explanation.
  readonly denials: { node: NodeId; reason: string }[] = [];
  candidates: readonly CandidateFact[] = [];
  why = "";
  decidedAtMs = 0;

  constructor(
    message: Extract<RouterMessage, { kind: "router.choose" }>,
    pool: Pool,
    triedAddresses: readonly string[],
    sent: readonly SentPrompt[],
  ) {
    const { facts, attempt } = message;
    this.pool = pool;
    this.facts = facts;
    this.attempt = attempt;
    this.owner = message.owner;
    this.leaseId = `${facts.requestId}#${attempt}`;
    this.replyTo = message.replyTo;
    this.id = facts.requestId;
    this.tenant = facts.tenant;
    this.key = facts.limitKey;
    this.weight = facts.weight;
    this.priority = facts.priority;
    this.cost = attempt === 1 ? facts.promptTokens : 0;
    this.arrivedAtMs = facts.arrivedAtMs;
    this.deadlineAtMs = facts.deadlineAtMs;
    this.promptTokens = facts.promptTokens;
    this.affinityKey = facts.affinityKey;
    this.isRetry = attempt > 1;
    this.tried = message.tried;
    this.triedAddresses = triedAddresses;
    this.sent = sent;
  }
}

export class RouterActor implements Actor<RouterMessage> {
  readonly #node: (node: NodeId) => ActorRef<GpuNodeMessage>;
  readonly #nodes: () => readonly NodeId[];
  #settings: RouterSettings;

  readonly #views = new Map<NodeId, NodeView>();
  #viewsMade = 0;
  /** By model; `undefined` from the first request without one. */
  readonly #pools = new Map<string | undefined, Pool>();
  readonly #poolsOf = new Map<NodeId, Pool[]>();
  /** Being asked for, or waiting: bounded by the nodes' caps and the queues' bounds. */
  readonly #choices = new InflightMap<RequestId, Choice>();
  readonly #sent = new SentPrompts();
  /** The actors of nodes that we watch. */
  readonly #watched = new Map<NodeId, ActorRef<GpuNodeMessage>>();
  /** When nodes were removed; swept at each removal. */
  readonly #removedAtMs = new Map<NodeId, number>();
  /** When ejections were granted; swept at each grant. */
  readonly #grantedAtMs = new Map<NodeId, number>();
  #isTicking = false;
  /** Which of a node's pools is served first when a place on it is free. */
  #turn = 0;

  constructor(options: RouterOptions) {
    this.#settings = options;
    this.#node = options.node;
    this.#nodes = options.nodes;
  }

  start(context: Context<RouterMessage>): void {
    for (const node of this.#nodes()) this.#subscribe(node, context);
  }

  receive(message: RouterMessage, context: Context<RouterMessage>): void {
    switch (message.kind) {
      case "router.choose":
        return this.#onChoose(message, context);
      case "router.cancel":
        return this.#onCancel(message.requestId, context);
      case "router.used":
        return this.#onUsed(message);
      case "router.may_eject":
        return this.#onMayEject(message, context);
      case "router.node_removed":
        return this.#onNodeRemoved(message.node, context);
      case "router.node_moved":
        return this.#onNodeMoved(message.node, context);
      case "router.describe":
        return context.reply(message.replyTo, this.#describe(context.nowMs));
      case "router.configure":
        return this.#onConfigure(message.options, context);
      case "router.node_changed":
        return this.#onNodeChanged(message.snapshot, context);
      case "router.acquired":
        return this.#onAcquired(message, context);
      case "router.node_ended":
        return this.#onNodeEnded(message, context);
      case "router.subscribe_due":
        return this.#onSubscribeDue(message.node, context);
      case "router.tick":
        return this.#onTick(context);
      default:
        return unreachable(message);
    }
  }

  // ---- one attempt --------------------------------------------------------------------------------------

  #onChoose(
    message: Extract<RouterMessage, { kind: "router.choose" }>,
    context: Context<RouterMessage>,
  ): void {
    const { facts, attempt } = message;
    const { nowMs } = context;
    const held = this.#choices.get(facts.requestId);
    if (held !== undefined) {
      if (held.attempt === attempt) {
        held.replyTo = message.replyTo; // Asked again: whoever asked first is gone.
        return;
      }
      this.#drop(held, context);
    }
    const pool = this.#poolFor(facts.model, nowMs);
    if (pool === undefined || pool.field.views.length === 0)
      return this.#refuseUnserved(message, context);
    const choice = new Choice(
      message,
      pool,
      message.tried.length === 0 ? message.tried : this.#addressesOf(message.tried),
      this.#sent.ofKey(facts.affinityKey, nowMs),
    );
    if (facts.deadlineAtMs <= nowMs)
      return this.#refuse(choice, "deadline_exceeded", "its deadline has passed", context);
    if (attempt === 1) {
      pool.budget.deposit(nowMs);
      if (this.#sheds(choice, context))
        return this.#refuse(choice, "pool_overloaded", "batch is shed under load", context);
    } else if (!pool.budget.tryWithdraw(nowMs)) {
      const retryAfterMs = pool.budget.retryAfterMs(nowMs);
      const why = "the pool's retry budget is spent";
      return this.#refuse(choice, "retry_budget_exhausted", why, context, retryAfterMs);
    }
    this.#choices.set(choice.id, choice);
    if (pool.queue.size > 0) {
      // Others wait: it takes its turn, which may be at once.
      this.#enqueue(choice, context);
      return this.#pump(pool, context);
    }
    const view = this.#pick(choice, context);
    if (view === undefined) return this.#waitOrRefuse(choice, context);
    pool.queue.pass(choice);
    choice.isCharged = true;
    this.#acquire(choice, view, context);
  }

  #sheds({ priority, pool }: Choice, context: Context<RouterMessage>): boolean {
    if (priority !== "batch") return false;
    const s = pool.field.saturation(context.nowMs);
    return context.random() < SHED_FACTOR * s * s * s * s * s;
  }

  #pick(choice: Choice, context: Context<RouterMessage>): NodeView | undefined {
    const { field, strategy } = choice.pool;
    field.filter(choice, context.nowMs, strategy.loadGates);
    const view = strategy.pick(field, choice, context);
    if (view === undefined) return undefined;
    choice.candidates = field.explain(strategy, choice, view);
    choice.why = field.isPanic ? `panic, too few nodes pass; ${field.why}` : field.why;
    choice.decidedAtMs = context.nowMs;
    return view;
  }

  #acquire(choice: Choice, view: NodeView, context: Context<RouterMessage>): void {
    const { node } = view;
    const { id: requestId, leaseId, owner } = choice;
    const uncachedTokens = uncachedTokensOf(view, choice);
    view.expect(uncachedTokens);
    choice.asked = view;
    choice.askedTokens = uncachedTokens;
    context.ask<GpuNodeMessage, AcquireReply>(
      this.#node(node),
      ACQUIRE_MS,
      (replyTo) => ({ kind: "gpu_node.acquire", leaseId, owner, uncachedTokens, replyTo }),
      (outcome) => ({ kind: "router.acquired", requestId, leaseId, node, outcome }),
    );
  }

  #onAcquired(message: Acquired, context: Context<RouterMessage>): void {
    const { leaseId, node, outcome } = message;
    const { nowMs } = context;
    const view = this.#views.get(node);
    const isGranted = outcome.ok && outcome.value.kind === "granted";
    if (outcome.ok) {
      view?.update(outcome.value.snapshot, nowMs);
    } else {
      // The lease may be granted all the same, and the reply be lost: this follows the acquire, and ends it.
      this.#giveBack(node, leaseId, context);
      view?.markUnreachable(nowMs + UNREACHABLE_MS, nowMs);
      this.#emit({ kind: "router.acquire_failed", node, failure: outcome.failure }, context);
    }
    const choice = this.#choices.get(message.requestId);
    if (choice?.leaseId !== leaseId || choice.asked?.node !== node) {
      if (isGranted) this.#giveBack(node, leaseId, context); // Nobody waits for it any more.
      return;
    }
    const uncachedTokens = choice.askedTokens;
    answered(choice);
    if (isGranted) return this.#place(choice, node, uncachedTokens, context);
    choice.denied.push(node);
    choice.denials.push({ node, reason: denialReason(outcome) });
    const next = choice.denied.length < DENIALS_MAX ? this.#pick(choice, context) : undefined;
    if (next !== undefined) return this.#acquire(choice, next, context);
    this.#waitOrRefuse(choice, context);
  }

  #place(
    choice: Choice,
    node: NodeId,
    uncachedTokens: number,
    context: Context<RouterMessage>,
  ): void {
    const { facts, pool } = choice;
    this.#choices.delete(choice.id);
    pool.field.learnPrompt(uncachedTokens);
    // A session's whole prompt comes again; of a mere prompt head, only the head is known to.
    const isSession = facts.session !== undefined;
    const tokens = isSession ? facts.promptTokens : Math.min(facts.promptTokens, HEAD_TOKENS);
    this.#sent.note(facts.affinityKey, { node, tokens }, context.nowMs);
    context.reply(choice.replyTo, {
      kind: "placed",
      node,
      leaseId: choice.leaseId,
      queuedMs: queuedMs(choice, context.nowMs),
      decision: decisionOf(choice, context.nowMs, node),
    });
  }

  /** After a round without a node: waits if a node may come free, else is refused. */
  #waitOrRefuse(choice: Choice, context: Context<RouterMessage>): void {
    const { pool } = choice;
    const { field } = pool;
    field.filter(choice, context.nowMs, pool.strategy.loadGates);
    const mayWait = field.waitable > 0 || (field.count > 0 && !field.isLastResort);
    if (mayWait) return this.#enqueue(choice, context);
    this.#unqueue(choice);
    this.#refuseNoNode(choice, context);
  }

  // ---- waiting ------------------------------------------------------------------------------------------

  #enqueue(choice: Choice, context: Context<RouterMessage>): void {
    const { nowMs } = context;
    const { queue } = choice.pool;
    choice.denied = [];
    if (choice.queuedAtMs !== undefined) {
      queue.putBack(choice, choice.queuedAtMs, nowMs);
      choice.isCharged = false;
      return this.#armTick(context);
    }
    this.#unqueue(choice);
    const waitMs = queue.predictedWaitMs(choice);
    const untilMs = Math.min(choice.deadlineAtMs, nowMs + this.#settings.queue.waitMsMax);
    if (waitMs !== undefined && nowMs + waitMs > untilMs) {
      const why = `it would wait ${Math.round(waitMs)} ms, longer than it may`;
      return this.#refuse(choice, "queue_full", why, context, waitMs);
    }
    const offer = queue.offer(choice, nowMs);
    switch (offer) {
      case "queued":
        choice.queuedAtMs = nowMs;
        return this.#armTick(context);
      case "key_full":
        return this.#refuse(choice, "queue_full", "its key's queue is full", context, waitMs);
      case "pool_full":
        return this.#refuse(choice, "pool_overloaded", "the pool's queue is full", context, waitMs);
      default:
        return unreachable(offer);
    }
  }

  /** Its tenant is not charged for it any more. */
  #unqueue(choice: Choice): void {
    if (choice.isCharged) choice.pool.queue.refund(choice);
    choice.isCharged = false;
  }

  /** Dispatches what waits, in fair order, to the places that are free. */
  #pump(pool: Pool, context: Context<RouterMessage>): void {
    const { queue, field } = pool;
    const { nowMs } = context;
    const passedOver: Choice[] = [];
    while (passedOver.length < PASSED_OVER_MAX) {
      const choice = queue.take(nowMs);
      if (choice === undefined) break;
      choice.isCharged = true;
      const view = this.#pick(choice, context);
      if (view !== undefined) {
        this.#acquire(choice, view, context);
      } else if (field.waitable === 0) {
        this.#unqueue(choice);
        this.#refuseNoNode(choice, context);
      } else {
        passedOver.push(choice);
        if (choice.tried.length === 0) break; // No room for it is no room for anyone.
      }
    }
    for (const choice of passedOver) this.#enqueue(choice, context);
    for (const choice of queue.takeExpired(nowMs))
      this.#refuse(choice, "deadline_exceeded", "its time to wait was up", context);
  }

  #armTick(context: Context<RouterMessage>): void {
    if (this.#isTicking) return;
    this.#isTicking = true;
    context.startTimer("tick", TICK_MS, { kind: "router.tick" });
  }

  #onTick(context: Context<RouterMessage>): void {
    this.#isTicking = false;
    for (const pool of this.#pools.values()) {
      if (pool.queue.size === 0) continue;
      this.#pump(pool, context);
      if (pool.queue.size > 0) this.#armTick(context);
    }
  }

  #onCancel(requestId: RequestId, context: Context<RouterMessage>): void {
    const choice = this.#choices.get(requestId);
    if (choice !== undefined) this.#drop(choice, context);
  }

  /** Ends a choice that nobody waits for; a lease granted to it later is given back. */
  #drop(choice: Choice, context: Context<RouterMessage>): void {
    if (choice.asked === undefined) choice.pool.queue.remove(choice.id, context.nowMs);
    answered(choice);
    this.#unqueue(choice);
    this.#refuse(choice, "client_closed", "the client left", context);
  }

  #onUsed(message: Extract<RouterMessage, { kind: "router.used" }>): void {
    this.#pools.get(message.model)?.queue.settle(message.tenant, message.outputTokens);
  }

  #giveBack(node: NodeId, leaseId: LeaseId, context: Context<RouterMessage>): void {
    context.tell(this.#node(node), {
      kind: "gpu_node.release",
      leaseId,
      outcome: "cancelled",
      e2eMs: 0,
      decodeMs: 0,
      promptTokens: 0,
      outputTokens: 0,
    });
  }

  // ---- refusals -----------------------------------------------------------------------------------------

  #refuse(
    choice: Choice,
    code: ErrorCode,
    why: string,
    context: Context<RouterMessage>,
    retryAfterMs?: number,
  ): void {
    const { nowMs } = context;
    const { field, strategy } = choice.pool;
    this.#choices.delete(choice.id);
    if (code !== "client_closed") {
      field.filter(choice, nowMs, strategy.loadGates);
      choice.candidates = field.explain(strategy, choice, undefined);
    }
    choice.why = why;
    choice.decidedAtMs = nowMs;
    context.reply(choice.replyTo, {
      kind: "refused",
      code,
      ...(retryAfterMs === undefined ? {} : { retryAfterMs: Math.ceil(retryAfterMs) }),
      queuedMs: queuedMs(choice, nowMs),
      decision: decisionOf(choice, nowMs),
    });
  }

  #refuseNoNode(choice: Choice, context: Context<RouterMessage>): void {
    const isSoon = choice.pool.field.views.some(
      (view) => view.circuit === "half_open" || view.unreachableUntilMs > context.nowMs,
    );
    const retryAfterMs = isSoon ? SOON_MS : undefined;
    this.#refuse(choice, "no_node", "no node is left to ask or to wait for", context, retryAfterMs);
  }

  /** No node is known to serve the model: says of each why not. */
  #refuseUnserved(
    message: Extract<RouterMessage, { kind: "router.choose" }>,
    context: Context<RouterMessage>,
  ): void {
    const { nowMs } = context;
    const candidates: CandidateFact[] = [];
    for (const view of this.#views.values()) {
      if (candidates.length >= 16) break;
      candidates.push({
        node: view.node,
        eligible: false,
        excluded: membershipText[membershipOf(view.snapshot, message.facts.model)],
        snapshotAgeMs: nowMs - view.receivedAtMs,
      });
    }
    context.reply(message.replyTo, {
      kind: "refused",
      code: "no_node",
      queuedMs: 0,
      decision: {
        strategy: this.#settings.ranking.strategy,
        attempt: message.attempt,
        atMs: nowMs,
        candidates,
        candidatesTotal: this.#views.size,
        why: "no node is known to serve the model",
        queuedMs: 0,
        denials: [],
      },
    });
  }

  // ---- nodes and pools ----------------------------------------------------------------------------------

  #onNodeChanged(snapshot: NodeSnapshot, context: Context<RouterMessage>): void {
    const { nowMs } = context;
    let view = this.#views.get(snapshot.node);
    if (view === undefined) {
      const removedAtMs = this.#removedAtMs.get(snapshot.node);
      if (removedAtMs !== undefined && nowMs - removedAtMs < REMOVED_MS) return;
      if (this.#views.size >= NODES_MAX) {
        const { node } = snapshot;
        return this.#emit({ kind: "router.node_refused", node, reason: "too_many_nodes" }, context);
      }
      view = new NodeView(snapshot, this.#viewsMade++, nowMs);
      this.#views.set(snapshot.node, view);
      this.#poolsOf.set(snapshot.node, []);
      this.#pools.get(undefined)?.field.add(view);
      this.#joinPools(view, context);
      if (!this.#watched.has(snapshot.node)) this.#subscribe(snapshot.node, context);
      this.#reportModels(view, context);
    } else {
      const { models, adapters } = view.snapshot;
      if (!view.update(snapshot, nowMs)) return;
      const now = view.snapshot;
      if (!sameNames(now.models, models) || !sameNames(now.adapters, adapters)) {
        this.#joinPools(view, context);
        this.#reportModels(view, context);
      }
    }
    if (this.#choices.size > 0) this.#pumpPoolsOf(view, context);
  }

  #reportModels({ node, snapshot }: NodeView, context: Context<RouterMessage>): void {
    const { models, adapters = [] } = snapshot;
    if (models === undefined) return;
    this.#emit({ kind: "router.models_changed", node, models, adapters }, context);
  }

  /** Pools that share a node take turns at its free places. */
  #pumpPoolsOf(view: NodeView, context: Context<RouterMessage>): void {
    const pools = this.#poolsOf.get(view.node) ?? [];
    const turn = this.#turn++;
    for (let i = 0; i < pools.length; i++) {
      const pool = pools[(turn + i) % pools.length];
      if (pool !== undefined && pool.queue.size > 0) this.#pump(pool, context);
    }
    const any = this.#pools.get(undefined);
    if (any !== undefined && any.queue.size > 0) this.#pump(any, context);
  }

  /** Brings a node's pools in line with the models and adapters that it serves. */
  #joinPools(view: NodeView, context: Context<RouterMessage>): void {
    const { models = [], adapters = [] } = view.snapshot;
    const served = new Set([...models, ...adapters]);
    const joined: Pool[] = [];
    for (const pool of this.#poolsOf.get(view.node) ?? []) {
      if (pool.model !== undefined && served.delete(pool.model)) joined.push(pool);
      else this.#leavePool(view, pool, context);
    }
    for (const model of served) {
      const pool = this.#pools.get(model) ?? this.#makePool(model, context.nowMs);
      if (pool === undefined) {
        const { node } = view;
        this.#emit({ kind: "router.pool_refused", node, reason: "too_many_models" }, context);
        break;
      }
      pool.field.add(view);
      joined.push(pool);
    }
    this.#poolsOf.set(view.node, joined);
  }

  #makePool(model: string | undefined, nowMs: number): Pool | undefined {
    if (this.#pools.size >= POOLS_MAX) return undefined;
    const { ranking, queue, retry } = this.#settings;
    const pool: Pool = {
      model,
      field: new Field(ranking),
      queue: new FairQueue(queue),
      budget: new RetryBudget(retry, nowMs),
      strategy: makeStrategy(ranking),
    };
    this.#pools.set(model, pool);
    return pool;
  }

  #poolFor(model: string | undefined, nowMs: number): Pool | undefined {
    const pool = this.#pools.get(model);
    if (pool !== undefined || model !== undefined) return pool;
    const any = this.#makePool(undefined, nowMs);
    if (any !== undefined) for (const view of this.#views.values()) any.field.add(view);
    return any;
  }

  #leavePool(view: NodeView, pool: Pool, context: Context<RouterMessage>): void {
    pool.field.remove(view);
    if (pool.queue.size > 0) this.#pump(pool, context); // The last node gone, they are refused.
    if (pool.field.views.length === 0) this.#pools.delete(pool.model);
  }

  #onNodeRemoved(node: NodeId, context: Context<RouterMessage>): void {
    const { nowMs } = context;
    const view = this.#views.get(node);
    this.#unwatch(node, context);
    sweepOlder(this.#removedAtMs, nowMs - REMOVED_MS);
    this.#removedAtMs.set(node, nowMs);
    if (view === undefined) return;
    this.#views.delete(node);
    const pools = this.#poolsOf.get(node) ?? [];
    this.#poolsOf.delete(node);
    for (const pool of pools) this.#leavePool(view, pool, context);
    const any = this.#pools.get(undefined);
    if (any !== undefined) this.#leavePool(view, any, context);
  }

  #onNodeMoved(node: NodeId, context: Context<RouterMessage>): void {
    this.#unwatch(node, context);
    this.#views.get(node)?.moved();
    this.#subscribe(node, context);
  }

  #unwatch(node: NodeId, context: Context<RouterMessage>): void {
    const ref = this.#watched.get(node);
    if (ref === undefined) return;
    this.#watched.delete(node);
    context.unwatch(ref);
  }

  #subscribe(node: NodeId, context: Context<RouterMessage>): void {
    const ref = this.#node(node);
    this.#watched.set(node, ref);
    context.tell(ref, { kind: "gpu_node.subscribe", router: context.self });
    context.watch(ref, (terminated) => ({ kind: "router.node_ended", node, terminated }));
  }

  /** A node's actor ended: its next incarnation does not know us. */
  #onNodeEnded({ node }: NodeEnded, context: Context<RouterMessage>): void {
    if (!this.#watched.delete(node)) return;
    const { nowMs } = context;
    const view = this.#views.get(node);
    view?.markUnreachable(nowMs + UNREACHABLE_MS, nowMs);
    view?.actorEnded();
    context.startTimer(`subscribe ${node}`, SUBSCRIBE_AGAIN_MS, {
      kind: "router.subscribe_due",
      node,
    });
  }

  #onSubscribeDue(node: NodeId, context: Context<RouterMessage>): void {
    if (this.#nodes().includes(node)) this.#subscribe(node, context);
    else this.#onNodeRemoved(node, context);
  }

  /** Granted unless one of its pools has as many nodes out as it can bear. */
  #onMayEject(
    { node, replyTo }: Extract<RouterMessage, { kind: "router.may_eject" }>,
    context: Context<RouterMessage>,
  ): void {
    const { nowMs } = context;
    sweepOlder(this.#grantedAtMs, nowMs - EJECTION_GRANT_MS);
    const granted = (this.#poolsOf.get(node) ?? []).every(({ field }) => {
      let out = 0;
      for (const view of field.views) {
        if (view.node === node) continue;
        if (view.circuit !== "closed" || this.#grantedAtMs.has(view.node)) out++;
      }
      return out < Math.max(1, Math.floor(this.#settings.ejectedRatioMax * field.views.length));
    });
    if (granted) this.#grantedAtMs.set(node, nowMs);
    context.reply(replyTo, { granted });
  }

  #addressesOf(nodes: readonly NodeId[]): string[] {
    return nodes.flatMap((node) => this.#views.get(node)?.snapshot.address ?? []);
  }

  // ---- the rest -----------------------------------------------------------------------------------------

  #onConfigure(settings: RouterSettings, context: Context<RouterMessage>): void {
    this.#settings = settings;
    for (const pool of this.#pools.values()) {
      pool.field.configure(settings.ranking);
      pool.queue.configure(settings.queue);
      pool.budget.configure(settings.retry);
      pool.strategy = makeStrategy(settings.ranking);
      if (pool.queue.size > 0) this.#pump(pool, context);
    }
  }

  #describe(nowMs: number): RouterDescription {
    const pools = Array.from(this.#pools.values(), ({ model, field, strategy, queue, budget }) => {
      field.filter(anyone, nowMs, strategy.loadGates);
      return {
        model: model ?? "",
        nodes: field.views.map((view) => view.node),
        eligible: field.count,
        panic: field.isPanic,
        queued: queue.snapshot().waiting,
        retryBudget: budget.snapshot(nowMs),
      };
    });
    return { strategy: this.#settings.ranking.strategy, pools };
  }

  #emit(event: RouterEvent, context: Context<RouterMessage>): void {
    context.emit(event);
  }
}

/** A request with nothing special, to see a pool as it is. */
const anyone: Wanted = {
  promptTokens: 1,
  affinityKey: undefined,
  isRetry: false,
  tried: [],
  triedAddresses: [],
  denied: [],
  sent: [],
};

const membershipText = {
  member: "serves the model", // Not in a pool: too many models.
  models_unknown: "has not told its models yet",
  model: "does not serve the model",
  adapter: "does not hold that model or adapter",
} as const;

/** What was asked of a node for it is over; the node's next snapshot tells the rest. */
function answered(choice: Choice): void {
  choice.asked?.answered(choice.askedTokens);
  choice.asked = undefined;
}

function denialReason(outcome: AskOutcome<AcquireReply>): string {
  if (!outcome.ok) return outcome.failure;
  return outcome.value.kind === "denied" ? outcome.value.reason : outcome.value.kind;
}

function sameNames(a: readonly string[] | undefined, b: readonly string[] | undefined): boolean {
  if (a === b) return true;
  return a !== undefined && a.length === b?.length && a.every((name, i) => name === b[i]);
}

function queuedMs(choice: Choice, nowMs: number): number {
  return choice.queuedAtMs === undefined ? 0 : nowMs - choice.queuedAtMs;
}

function decisionOf(choice: Choice, nowMs: number, chosen?: NodeId): Decision {
  const { pool } = choice;
  return {
    strategy: pool.strategy.name,
    attempt: choice.attempt,
    atMs: choice.decidedAtMs,
    candidates: choice.candidates,
    candidatesTotal: pool.field.views.length,
    ...(chosen === undefined ? {} : { chosen }),
    why: choice.why,
    queuedMs: queuedMs(choice, nowMs),
    denials: choice.denials,
  };
}

function sweepOlder(atMs: Map<NodeId, number>, beforeMs: number): void {
  for (const [node, at] of atMs) if (at < beforeMs) atMs.delete(node);
}

// ---- what was sent where ------------------------------------------------------------------------------------

/** Of each of two generations. */
const SENT_KEYS_MAX = 8192;
const SENT_NODES_MAX = 4;
/** An engine has evicted a prefix that was not asked for in this time. */
const SENT_IDLE_MS_MAX = 600_000;

type Sent = { readonly atMs: number; readonly prompts: readonly SentPrompt[] };

/**
 * Prompt tokens of each affinity key that nodes have seen. Two generations: a full one becomes the old one, and
 * the old one's keys that were not used meanwhile are forgotten.
 */
class SentPrompts {
  #young = new Map<number, Sent>();
  #old = new Map<number, Sent>();

  ofKey(key: number | undefined, nowMs: number): readonly SentPrompt[] {
    if (key === undefined) return nothingSent;
    const sent = this.#young.get(key) ?? this.#old.get(key);
    const isKnown = sent !== undefined && nowMs - sent.atMs <= SENT_IDLE_MS_MAX;
    return isKnown ? sent.prompts : nothingSent;
  }

  note(key: number | undefined, prompt: SentPrompt, nowMs: number): void {
    if (key === undefined) return;
    const prompts = [prompt];
    for (const sent of this.ofKey(key, nowMs))
      if (sent.node !== prompt.node && prompts.length < SENT_NODES_MAX) prompts.push(sent);
    this.#young.set(key, { atMs: nowMs, prompts });
    if (this.#young.size < SENT_KEYS_MAX) return;
    this.#old = this.#young;
    this.#young = new Map();
  }
}

const nothingSent: readonly SentPrompt[] = [];
