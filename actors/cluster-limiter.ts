/**
 * What each API key may still use, over all peers together. It stands between the request actor and this peer's
 * RateLimiterActor and speaks the limiter's protocol to both; who keeps a key's allowance is decided here.
 *
 *   no limits ──────────────────────────▶ this peer's limiter          nothing to share
 *   a store that answers ───────────────▶ the store                    exact, whoever owns what
 *   else the owner is this peer ────────▶ this peer's limiter          exact while there is one owner
 *   else the owner is within reach ─────▶ ask the owner's limiter
 *   else, by the key's `whenUnreachable`:
 *       share ──────────────────────────▶ this peer's limiter, with 1/N of the limits
 *       refuse ─────────────────────────▶ limit_unavailable
 *
 * Without a store, one peer keeps a key (rendezvous hash of the key) and every other asks it for every request: a lease
 * of one request and its estimated tokens, settled or lapsed like any reservation. So all five limits hold over the
 * cluster as they do in one process, at one round trip (about 10 µs of CPU) per request. Leases of many requests at a
 * time were refused: they let pass late what was granted early, strand it with peers that have no use for it, and
 * cannot be had of limits on what is in flight.
 *
 * The bound. With R = limit per second, b = burst, over any time t in which the owner changed c times (by a crash, a
 * partition, its healing, a store lost or found):
 *
 *   admitted ≤ R·t + b + c·(R·D + 3·b/2),   D = 3 s, within which membership settles
 *
 * For c = 0 it is the limit itself. A change costs so much because: who has lost the owner admits a share of 1/N each
 * until another owns the key, R·D in all and half of b in bursts; the new owner starts from half a burst, since what
 * the old one granted lately is unknown; and the old one may be alive on the other side and still have its burst.
 * Then nothing more is added, however long a partition lasts, up to `lostMs`: members that were removed and have not
 * left in order may be alive on the other side, so a side of m of them keeps to m/N of the limits, N as it was before.
 * After `lostMs` they are taken for dead and the rest have the whole limit again (so k sides of a partition that lasts
 * longer have k·R); a key with `whenUnreachable: refuse` keeps to the share until they return or leave. Limits on
 * tokens at once (burst, in flight, a day) are not cut into shares, for a request that fits must not be told that it
 * never will: of those, each of k sides has the whole.
 *
 * With a store the bound is R·t + b while the store is there, partition or not: a peer that does not reach it asks the
 * owner, which may.
 *
 * States: of the store, asked or resting (a second after it did not answer in time); of a peer that did not answer,
 * likewise. On a restart the table of what is open elsewhere is lost: those reservations lapse where they are.
 */

import {
  type Actor,
  type ActorRef,
  type AskOutcome,
  assert,
  type Context,
  type ReplyTo,
  unreachable,
} from "../runtime/actor.ts";
import { InflightMap } from "../runtime/inflight-map.ts";
import type { LimitCharge, LimitStoreCommand, LimitStoreReply } from "./edges.ts";
import { requestBurstOf, tokenBurstOf } from "./limit-state.ts";
import type { ViewChanged } from "./members.ts";
import type { ClusterView, PeerId } from "./membership.ts";
import { OutputQuantile } from "./output-quantile.ts";
import { BUCKETS, bucketOf, Ownership } from "./ownership.ts";
import type { Limits, RequestId } from "./protocol.ts";
import {
  type AdmitReply,
  estimateTokens,
  isLimited,
  type RateLimiterMessage,
  tokensUsed,
} from "./rate-limiter.ts";

/** Instants do not travel between processes: `expiresInMs` is from the moment of arrival. */
export type ClusterLimiterMessage =
  | RateLimiterMessage
  | ViewChanged
  /** Another peer believes that this one keeps the key. */
  | {
      kind: "limits.admit";
      from: PeerId;
      requestId: RequestId;
      key: string;
      limits: Limits;
      model: string;
      promptTokens: number;
      maxTokens?: number;
      expiresInMs: number;
      replyTo: ReplyTo<PeerAdmitReply>;
    }
  | {
      kind: "limits.settle";
      from: PeerId;
      requestId: RequestId;
      key: string;
      promptTokens: number;
      cachedTokens: number;
      outputTokens: number;
    }
  | { kind: "limits.describe"; replyTo: ReplyTo<ClusterLimiterDescription> };

/** `moved`: this peer does not keep the key; who does, as it knows. */
export type PeerAdmitReply = AdmitReply | { kind: "moved"; owner: PeerId; epoch: number };

/** How the limits are kept, for people and metrics. */
export type ClusterLimiterDescription = {
  epoch: number;
  /** Of the limits, that the peers of this side hold, 0..1: 1 while nobody is lost. */
  share: number;
  storeState: "none" | "asked" | "resting";
  /** Requests admitted by the store or another peer, and not settled yet. */
  open: number;
  /** Counts since the start: where requests of limited keys were decided. */
  byStore: number;
  byOwner: number;
  byThisPeer: number;
  byShare: number;
  refusedUnreachable: number;
  /** Requests of others that this peer did not keep. */
  moved: number;
  storeFailures: number;
  ownerFailures: number;
  /** Requests refused because the table here was full. */
  overflows: number;
};

export type ClusterLimiterOptions = {
  /** This peer's id, which is the root of its tree. */
  self: PeerId;
  /** What a prompt token counts that the engine found in its prefix cache, 0..1. */
  cachedTokenWeight: number;
  /** How long the store's answer is waited for. */
  storeMs: number;
  /** How long the owner's answer is waited for. */
  ownerMs: number;
  /** How long lost members are taken to be alive on the other side of a partition. */
  lostMs: number;
  /** Requests open elsewhere at once, 1…; more are refused. */
  openMax: number;
};

export const clusterLimiterDefaults: Readonly<Omit<ClusterLimiterOptions, "self">> = {
  cachedTokenWeight: 0.25,
  storeMs: 100,
  ownerMs: 150, // With the store's before it and one `moved`, still within what a request waits for its limiter.
  lostMs: 60_000,
  openMax: 1_000_000,
};

/** Addresses. */
export type ClusterLimiterRefs = {
  /** This peer's limiter. */
  limiter: ActorRef<RateLimiterMessage>;
  store?: ActorRef<LimitStoreCommand>;
  /** The cluster limiter of another peer. */
  peer: (id: PeerId) => ActorRef<ClusterLimiterMessage>;
};

type StoreAnswered = {
  kind: "limits.store_answered";
  admit: Admit;
  origin: Origin;
  tokens: number;
  outcome: AskOutcome<LimitStoreReply>;
};
type OwnerAnswered = {
  kind: "limits.owner_answered";
  admit: Admit;
  owner: PeerId;
  /** It has been sent on once already. */
  isResent: boolean;
  outcome: AskOutcome<PeerAdmitReply>;
};
type OwnMessage = ClusterLimiterMessage | StoreAnswered | OwnerAnswered;
type Admit = Extract<RateLimiterMessage, { kind: "limiter.admit" }>;
type Settle = Extract<RateLimiterMessage, { kind: "limiter.settle" }>;
type PeerAdmit = Extract<ClusterLimiterMessage, { kind: "limits.admit" }>;
/** Whose request it is: this peer's own, or one that another peer asks about. */
type Origin = { isOwn: true } | { isOwn: false; replyTo: ReplyTo<PeerAdmitReply> };

/** A request admitted elsewhere and not settled. */
type Open = {
  owner: string;
  key: string;
  model: string;
  at: { kind: "store"; limits: Limits; charge: LimitCharge } | { kind: "peer"; peer: PeerId };
};

/** When this peer began to keep keys that it did not keep before; `takeover` counts up. */
type Takeover = { takeover: number; atMs: number };

/** After no answer, nothing is asked for so long. */
const REST_MS = 1000;
/** A takeover so long ago is none: by then half a burst of a minute's allowance has flowed in. */
const TAKEOVER_MS = 60_000;
const RETRY_UNREACHABLE_MS = 1000;
/** Keys whose usual answers are known; beyond, the one met first is forgotten. */
const OUTPUTS_MAX = 10_000;
/** Cut limits that are kept for the next request of their key. */
const CUT_MAX = 10_000;

export class ClusterLimiterActor implements Actor<OwnMessage> {
  readonly #options: ClusterLimiterOptions;
  readonly #refs: ClusterLimiterRefs;
  readonly #ownership = new Ownership();
  #suspects: ReadonlySet<PeerId> = new Set();
  /** Members removed and not back, and since when. */
  readonly #lost = new Map<PeerId, number>();
  readonly #open = new InflightMap<RequestId, Open>();
  readonly #outputs = new Map<string, OutputQuantile>();
  /** Peers that did not answer, and until when they are not asked. */
  readonly #silentUntilMs = new Map<PeerId, number>();
  /** 0: it is asked. */
  #storeRestsUntilMs = 0;
  #isStoreTried = false;
  /** Counts takeovers; and the last one by bucket, by share, and for want of the store. */
  #takeovers = 0;
  readonly #takenOver = new Map<number, Takeover>();
  #shareTakeover: Takeover = { takeover: 0, atMs: Number.NEGATIVE_INFINITY };
  #storeTakeover: Takeover = { takeover: 0, atMs: Number.NEGATIVE_INFINITY };
  /** By share and key. */
  readonly #cut = new Map<string, { whole: Limits; cut: Limits }>();
  readonly #counts = {
    byStore: 0,
    byOwner: 0,
    byThisPeer: 0,
    byShare: 0,
    refusedUnreachable: 0,
    moved: 0,
    storeFailures: 0,
    ownerFailures: 0,
    overflows: 0,
  };

  constructor(options: ClusterLimiterOptions, refs: ClusterLimiterRefs) {
    const { cachedTokenWeight, storeMs, ownerMs } = options;
    assert(cachedTokenWeight >= 0 && cachedTokenWeight <= 1, "cachedTokenWeight must be in 0..1");
    assert(storeMs > 0 && ownerMs > 0, "storeMs and ownerMs must be above 0");
    assert(options.openMax >= 1, "openMax must be at least 1");
    this.#options = options;
    this.#refs = refs;
    // Until it is told of others, it is alone.
    this.#ownership.adopt(0, [options.self], 0);
  }

  receive(message: OwnMessage, context: Context<OwnMessage>): void {
    switch (message.kind) {
      case "limiter.admit":
        return this.#onAdmit(message, context);
      case "limiter.settle":
        return this.#onSettle(message, context);
      case "limiter.owner_restarted":
        return this.#onOwnerRestarted(message.owner, context);
      case "limiter.owner_lost":
      case "limiter.describe":
        return context.tell(this.#refs.limiter, message);
      case "members.view_changed":
        return this.#onViewChanged(message.view, context);
      case "limits.admit":
        return this.#onPeerAdmit(message, context);
      case "limits.settle":
        return this.#onPeerSettle(message, context);
      case "limits.describe":
        return context.reply(message.replyTo, this.#describe(context.nowMs));
      case "limits.store_answered":
        return this.#onStoreAnswered(message, context);
      case "limits.owner_answered":
        return this.#onOwnerAnswered(message, context);
      default:
        return unreachable(message);
    }
  }

  // ---- requests of this peer ------------------------------------------------------------------------------

  #onAdmit(admit: Admit, context: Context<OwnMessage>): void {
    if (!isLimited(admit.limits)) return context.tell(this.#refs.limiter, admit);
    if (this.#open.size >= this.#options.openMax) {
      this.#counts.overflows++;
      return context.reply<AdmitReply>(admit.replyTo, {
        kind: "refused",
        code: "pool_overloaded",
        retryAfterMs: RETRY_UNREACHABLE_MS,
        state: { atMs: context.nowMs },
      });
    }
    this.#decide(admit, { isOwn: true }, context);
  }

  /** By the store if it answers, else by the peers. */
  #decide(admit: Admit, origin: Origin, context: Context<OwnMessage>): void {
    const { store } = this.#refs;
    if (store === undefined || !this.#mayAskStore(context.nowMs))
      return this.#decideByPeers(admit, origin, context);
    const { key, limits, expiresAtMs } = admit;
    const requestId = nameFor(this.#options.self, admit.requestId);
    const usual = this.#outputs.get(key)?.p90(admit.model);
    const tokens = estimateTokens(limits, admit, usual, largestOf(limits));
    context.ask<LimitStoreCommand, LimitStoreReply>(
      store,
      this.#options.storeMs,
      (replyTo) => ({
        kind: "limits.charge",
        key,
        limits,
        requestId,
        tokens,
        expiresInMs: Math.max(1, expiresAtMs - context.nowMs),
        replyTo,
      }),
      (outcome) => ({ kind: "limits.store_answered", admit, origin, tokens, outcome }),
    );
  }

  #onStoreAnswered(
    { admit, origin, tokens, outcome }: StoreAnswered,
    context: Context<OwnMessage>,
  ): void {
    const { nowMs } = context;
    this.#isStoreTried = false;
    if (!outcome.ok || outcome.value.kind === "away") {
      this.#counts.storeFailures++;
      this.#restStore(nowMs);
      return this.#decideByPeers(admit, origin, context);
    }
    this.#counts.byStore++;
    this.#storeRestsUntilMs = 0;
    const reply = outcome.value;
    const state = { ...reply.state, atMs: nowMs };
    if (reply.kind === "refused")
      return context.reply<AdmitReply>(admit.replyTo, { ...reply, state });
    const { key, limits, model, owner } = admit;
    const at = { kind: "store", limits, charge: reply.charge } as const;
    this.#open.set(admit.requestId, { owner, key, model, at });
    context.reply<AdmitReply>(admit.replyTo, { kind: "granted", reservedTokens: tokens, state });
  }

  #decideByPeers(admit: Admit, origin: Origin, context: Context<OwnMessage>): void {
    const owner = this.#ownership.owner(bucketOf(admit.key));
    if (owner === undefined || owner === this.#options.self)
      return this.#admitAsOwner(admit, context);
    // Whoever asked us is told who keeps the key, and asks there.
    if (!origin.isOwn) return this.#replyMoved(origin.replyTo, owner, context);
    this.#askOwner(admit, owner, false, context);
  }

  #admitAsOwner(admit: Admit, context: Context<OwnMessage>): void {
    const { nowMs } = context;
    const taken = this.#takenOver.get(bucketOf(admit.key));
    this.#admitHere(admit, this.#shareOf(admit.limits, nowMs), taken, context);
  }

  /** By this peer's limiter; it answers whoever asked. */
  #admitHere(
    admit: Admit,
    share: number,
    taken: Takeover | undefined,
    context: Context<OwnMessage>,
  ): void {
    const takeover = latest(context.nowMs, taken, this.#storeTakeover);
    if (share === 1) this.#counts.byThisPeer++;
    else this.#counts.byShare++;
    const limits = share === 1 ? admit.limits : this.#cutTo(share, admit.key, admit.limits);
    context.tell(this.#refs.limiter, { ...admit, limits, takeover });
  }

  #askOwner(admit: Admit, owner: PeerId, isResent: boolean, context: Context<OwnMessage>): void {
    const silentUntilMs = this.#silentUntilMs.get(owner) ?? 0;
    if (this.#suspects.has(owner) || context.nowMs < silentUntilMs)
      return this.#admitWithoutOwner(admit, context);
    const { requestId, key, limits, model, promptTokens, maxTokens, expiresAtMs } = admit;
    context.ask<ClusterLimiterMessage, PeerAdmitReply>(
      this.#refs.peer(owner),
      this.#options.ownerMs,
      (replyTo) => ({
        kind: "limits.admit",
        from: this.#options.self,
        requestId,
        key,
        limits,
        model,
        promptTokens,
        ...(maxTokens === undefined ? {} : { maxTokens }),
        expiresInMs: Math.max(1, expiresAtMs - context.nowMs),
        replyTo,
      }),
      (outcome) => ({ kind: "limits.owner_answered", admit, owner, isResent, outcome }),
    );
  }

  #onOwnerAnswered(
    { admit, owner, isResent, outcome }: OwnerAnswered,
    context: Context<OwnMessage>,
  ): void {
    const { nowMs } = context;
    if (!outcome.ok) {
      this.#counts.ownerFailures++;
      this.#silentUntilMs.set(owner, nowMs + REST_MS);
      // It may have admitted and only answered late.
      if (outcome.failure === "timeout") this.#settleAt(owner, refundOf(admit), context);
      return this.#admitWithoutOwner(admit, context);
    }
    const reply = outcome.value;
    if (reply.kind === "moved") {
      const next = this.#ownership.owner(bucketOf(admit.key));
      // One of the two views is older. If it is ours, theirs names the owner.
      const to = reply.epoch >= this.#ownership.epoch ? reply.owner : next;
      if (to === this.#options.self) return this.#admitAsOwner(admit, context);
      if (isResent || to === undefined || to === owner)
        return this.#admitWithoutOwner(admit, context);
      return this.#askOwner(admit, to, true, context);
    }
    this.#counts.byOwner++;
    this.#silentUntilMs.delete(owner);
    const state = { ...reply.state, atMs: nowMs };
    if (reply.kind === "granted") {
      const { key, model } = admit;
      const at = { kind: "peer", peer: owner } as const;
      this.#open.set(admit.requestId, { owner: admit.owner, key, model, at });
    }
    context.reply<AdmitReply>(admit.replyTo, { ...reply, state });
  }

  /** Until another peer owns the key: by this peer's share, or not at all. */
  #admitWithoutOwner(admit: Admit, context: Context<OwnMessage>): void {
    const { nowMs } = context;
    if (admit.limits.whenUnreachable === "refuse") {
      this.#counts.refusedUnreachable++;
      return context.reply<AdmitReply>(admit.replyTo, {
        kind: "refused",
        code: "limit_unavailable",
        retryAfterMs: RETRY_UNREACHABLE_MS,
        state: { atMs: nowMs },
      });
    }
    if (nowMs - this.#shareTakeover.atMs > TAKEOVER_MS)
      this.#shareTakeover = { takeover: ++this.#takeovers, atMs: nowMs };
    const { table } = this.#ownership;
    const members = table.owners.length + this.#lostCount(admit.limits, nowMs);
    this.#admitHere(admit, 1 / Math.max(2, members), this.#shareTakeover, context);
  }

  // ---- requests of other peers ----------------------------------------------------------------------------

  #onPeerAdmit(asked: PeerAdmit, context: Context<OwnMessage>): void {
    const { from, requestId, key, limits, model, promptTokens, maxTokens, expiresInMs } = asked;
    const owner = this.#ownership.owner(bucketOf(key));
    if (owner !== undefined && owner !== this.#options.self)
      return this.#replyMoved(asked.replyTo, owner, context);
    const admit: Admit = {
      kind: "limiter.admit",
      requestId: nameFor(from, requestId),
      owner: from,
      key,
      limits,
      model,
      promptTokens,
      ...(maxTokens === undefined ? {} : { maxTokens }),
      expiresAtMs: context.nowMs + expiresInMs,
      replyTo: asked.replyTo,
    };
    this.#decide(admit, { isOwn: false, replyTo: asked.replyTo }, context);
  }

  #onPeerSettle(
    asked: Extract<ClusterLimiterMessage, { kind: "limits.settle" }>,
    context: Context<OwnMessage>,
  ): void {
    const { from, requestId, key, promptTokens, cachedTokens, outputTokens } = asked;
    const kind = "limiter.settle";
    const name = nameFor(from, requestId);
    const usage = { promptTokens, cachedTokens, outputTokens };
    this.#onSettle({ kind, requestId: name, key, ...usage }, context);
  }

  #replyMoved(replyTo: ReplyTo<PeerAdmitReply>, owner: PeerId, context: Context<OwnMessage>): void {
    this.#counts.moved++;
    const { epoch } = this.#ownership;
    context.reply<PeerAdmitReply>(replyTo, { kind: "moved", owner, epoch });
  }

  // ---- ending ---------------------------------------------------------------------------------------------

  #onSettle(settle: Settle, context: Context<OwnMessage>): void {
    const open = this.#open.get(settle.requestId);
    if (open === undefined) return context.tell(this.#refs.limiter, settle);
    this.#open.delete(settle.requestId);
    const { at, key, model } = open;
    if (at.kind === "peer") return this.#settleAt(at.peer, settle, context);
    const { requestId, promptTokens, outputTokens } = settle;
    const usedTokens = tokensUsed(settle, this.#options.cachedTokenWeight);
    const refund = !(promptTokens > 0) && !(outputTokens > 0);
    if (!refund && at.charge.tokens > 0) this.#outputsOf(key).record(model, outputTokens);
    this.#correct({ requestId, key, ...at, usedTokens, refund }, context);
  }

  #correct(
    what: Omit<Extract<LimitStoreCommand, { kind: "limits.correct" }>, "kind">,
    context: Context<OwnMessage>,
  ): void {
    const { store } = this.#refs;
    const { key, limits, charge, usedTokens, refund } = what;
    if (store === undefined) return;
    const requestId = nameFor(this.#options.self, what.requestId);
    const kind = "limits.correct";
    context.tell(store, { kind, key, limits, requestId, charge, usedTokens, refund });
  }

  #settleAt(peer: PeerId, settle: Settle, context: Context<OwnMessage>): void {
    const { requestId, key, promptTokens, cachedTokens, outputTokens } = settle;
    const usage = { promptTokens, cachedTokens, outputTokens };
    const kind = "limits.settle";
    context.tell(this.#refs.peer(peer), {
      kind,
      from: this.#options.self,
      requestId,
      key,
      ...usage,
    });
  }

  /** Refunds what that request actor holds, wherever it is. */
  #onOwnerRestarted(owner: string, context: Context<OwnMessage>): void {
    for (const [requestId, open] of this.#open)
      if (open.owner === owner) this.#onSettle(refundOf({ requestId, key: open.key }), context);
    context.tell(this.#refs.limiter, { kind: "limiter.owner_restarted", owner });
  }

  // ---- peers ----------------------------------------------------------------------------------------------

  #onViewChanged(view: ClusterView, context: Context<OwnMessage>): void {
    const { nowMs } = context;
    const { self } = this.#options;
    const before = this.#ownership.table.owners;
    const wasAlone = before.every((id) => id === self);
    const moves = this.#ownership.adopt(view.epoch, view.owners, nowMs);
    const taken: Takeover = { takeover: ++this.#takeovers, atMs: nowMs };
    for (const { bucket, to } of moves) if (to === self) this.#takenOver.set(bucket, taken);
    // Whom it meets now may have kept until now what it takes for its own.
    if (wasAlone && view.owners.length > 1)
      for (let bucket = 0; bucket < BUCKETS; bucket++)
        if (this.#ownership.owner(bucket) === self) this.#takenOver.set(bucket, taken);
    this.#suspects = new Set(view.suspects);
    for (const id of this.#silentUntilMs.keys())
      if (!view.owners.includes(id)) this.#silentUntilMs.delete(id);
    for (const id of this.#lost.keys()) if (!view.lost.includes(id)) this.#lost.delete(id);
    for (const id of view.lost) if (!this.#lost.has(id)) this.#lost.set(id, nowMs);
    this.#cut.clear();
    for (const id of before) {
      if (id === self || view.owners.includes(id)) continue;
      context.tell(this.#refs.limiter, { kind: "limiter.owner_lost", owner: id });
      this.#lapseOf(id, context);
    }
  }

  /** What a peer that is gone holds in the store by way of this one: what was charged stays, its place is free. */
  #lapseOf(peer: PeerId, context: Context<OwnMessage>): void {
    for (const [requestId, { owner, key, at }] of this.#open) {
      if (owner !== peer || at.kind !== "store") continue;
      this.#open.delete(requestId);
      const usedTokens = at.charge.tokens;
      this.#correct({ requestId, key, ...at, usedTokens, refund: false }, context);
    }
  }

  /** Of the limits, that this side of a partition may use. */
  #shareOf(limits: Limits, nowMs: number): number {
    const live = Math.max(1, this.#ownership.table.owners.length);
    return live / (live + this.#lostCount(limits, nowMs));
  }

  #lostCount(limits: Limits, nowMs: number): number {
    if (limits.whenUnreachable === "refuse") return this.#lost.size;
    let count = 0;
    for (const sinceMs of this.#lost.values()) if (nowMs - sinceMs < this.#options.lostMs) count++;
    return count;
  }

  /** Kept for the next request of the key, so that the limiter sees the same object. */
  #cutTo(share: number, key: string, limits: Limits): Limits {
    const name = `${share} ${key}`;
    const known = this.#cut.get(name);
    if (known?.whole === limits) return known.cut;
    const cut = cutLimits(limits, share);
    if (this.#cut.size >= CUT_MAX) this.#cut.clear();
    this.#cut.set(name, { whole: limits, cut });
    return cut;
  }

  // ---- the store ------------------------------------------------------------------------------------------

  #mayAskStore(nowMs: number): boolean {
    if (this.#storeRestsUntilMs === 0) return true;
    if (this.#isStoreTried || nowMs < this.#storeRestsUntilMs) return false;
    this.#isStoreTried = true; // One request alone sees whether it answers again.
    return true;
  }

  #restStore(nowMs: number): void {
    // What it granted until now is not known here.
    if (this.#storeRestsUntilMs === 0)
      this.#storeTakeover = { takeover: ++this.#takeovers, atMs: nowMs };
    this.#storeRestsUntilMs = nowMs + REST_MS;
  }

  #outputsOf(key: string): OutputQuantile {
    let outputs = this.#outputs.get(key);
    if (outputs !== undefined) return outputs;
    if (this.#outputs.size >= OUTPUTS_MAX) {
      const oldest = this.#outputs.keys().next();
      if (!oldest.done) this.#outputs.delete(oldest.value);
    }
    outputs = new OutputQuantile();
    this.#outputs.set(key, outputs);
    return outputs;
  }

  #describe(nowMs: number): ClusterLimiterDescription {
    const { store } = this.#refs;
    return {
      epoch: this.#ownership.epoch,
      share: this.#shareOf({}, nowMs),
      storeState: store === undefined ? "none" : this.#storeRestsUntilMs > 0 ? "resting" : "asked",
      open: this.#open.size,
      ...this.#counts,
    };
  }
}

/** The last takeover that is recent, 0 for none. */
function latest(nowMs: number, ...takeovers: readonly (Takeover | undefined)[]): number {
  let last = 0;
  for (const one of takeovers)
    if (one !== undefined && nowMs - one.atMs < TAKEOVER_MS) last = Math.max(last, one.takeover);
  return last;
}

/** Ids of requests are those of one peer: two may use the same. */
function nameFor(peer: PeerId, requestId: RequestId): RequestId {
  return `${peer} ${requestId}`;
}

function refundOf({ requestId, key }: { requestId: RequestId; key: string }): Settle {
  const usage = { promptTokens: 0, cachedTokens: 0, outputTokens: 0 };
  return { kind: "limiter.settle", requestId, key, ...usage };
}

/** Tokens of the largest request that could ever pass. */
function largestOf(limits: Limits): number {
  return Math.min(
    tokenBurstOf(limits) ?? Number.POSITIVE_INFINITY,
    limits.concurrentTokens ?? Number.POSITIVE_INFINITY,
    limits.tokensPerDay ?? Number.POSITIVE_INFINITY,
  );
}

/** A share of the limits, 0..1, each at least 1; those on tokens at once stay whole. */
function cutLimits(limits: Limits, share: number): Limits {
  const part = (whole: number): number => Math.max(1, Math.floor(whole * share));
  const { requestsPerMinute, tokensPerMinute, concurrent } = limits;
  const requestBurst = requestBurstOf(limits);
  const tokenBurst = tokenBurstOf(limits);
  return {
    ...limits,
    ...(requestsPerMinute === undefined ? {} : { requestsPerMinute: part(requestsPerMinute) }),
    ...(requestBurst === undefined ? {} : { requestBurst: part(requestBurst) }),
    ...(tokensPerMinute === undefined ? {} : { tokensPerMinute: part(tokensPerMinute) }),
    ...(tokenBurst === undefined ? {} : { tokenBurst }),
    ...(concurrent === undefined ? {} : { concurrent: part(concurrent) }),
  };
}
