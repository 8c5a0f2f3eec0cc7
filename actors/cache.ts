/**
 * One shard of the answer cache: the answers of its keys, which identical requests share one run, and the questions of
 * its scopes, for others of the same meaning (semantic-shard.ts).
 *
 * A key that is asked for and not in memory has a flight, the only place where its requests meet:
 *
 *                    (no store, or no-cache)
 *        ┌──────────────────────────────────────────┐
 *   (absent) ──lookup──▶ looking_up ──store: miss──▶ running ──first token──▶ running, committed
 *                            │                       │   ▲                       │
 *                            │ store: hit            │   └─ leader failed alone:  │ ended, failed,
 *                            ▼                       ▼      the next one leads    ▼ abandoned, lapsed
 *                         (absent) ◀───────────────(absent)◀──────────────────(absent)
 *
 * The first request to find nothing leads: it runs, and tells how that goes. The others join: they hear of it
 * here and read its bytes elsewhere. Before the first token a leader that fails for a reason of its own (its
 * limit, its deadline) hands over to the one that has waited longest; after it, all end with it. When every
 * client has left, the leader among them, the flight is abandoned and its leader told.
 *
 * Who does not take part runs alone, its answer shared with nobody and not kept: `no-store` requests, a
 * `no-cache` request whose key is being looked up or run already (it must not see that answer, and two writers
 * of one key would race), whatever the bounds below have no room for, and whoever asks for a key whose flight
 * began before a purge. For the same reason an answer is kept only as the end of a flight that was known all
 * along: one that was abandoned, has lapsed, or began before a purge of its tenant stores nothing.
 *
 * A leader whose question is answered from another entry, by meaning, closes its flight with that answer, which its
 * joiners get as well. Questions come back from the store in the background after a start; lookups never wait for that.
 *
 * Behind memory there may be a store, which is asked once per key however many wait, and never waited for
 * longer than its time-out. Everything in memory is lost on a restart: leaders go on, joiners run into their
 * deadlines, the store has the answers. (Joining across shards or processes was refused: a key has one shard.)
 */

import {
  type Actor,
  type ActorRef,
  type AskFailure,
  type AskOutcome,
  assert,
  type Context,
  type ReplyTo,
  unreachable,
} from "../runtime/actor.ts";
import { InflightMap } from "../runtime/inflight-map.ts";
import type { Recalled, StoreCommand, StoreGot } from "./edges.ts";
import { EntryStore } from "./entry-store.ts";
import type { ErrorCode } from "./errors.ts";
import type { NodeId, RequestId, StoredAnswer, StoredQuestion } from "./protocol.ts";
import {
  type Explored,
  type InspectedEntry,
  type JudgedPool,
  type Matched,
  NEIGHBOURS,
  type Question,
  type SemanticDescription,
  type SemanticOptions,
  SemanticShard,
} from "./semantic-shard.ts";

export type CacheMessage =
  /**
   * Exact lookup. `read`: may be answered from the store or a running flight; `lead`: may become a flight
   * that others join. The reply may take as long as the store's time-out, never longer.
   */
  | {
      kind: "cache.lookup";
      key: string;
      tenant: string;
      requestId: RequestId;
      read: boolean;
      lead: boolean;
      /** Told about the flight that this request joins. */
      participant: ActorRef<FlightNews>;
      replyTo: ReplyTo<LookupReply>;
    }
  /** A participant's client left. The last one to leave abandons the flight: its leader is told. */
  | { kind: "cache.leave"; key: string; requestId: RequestId }
  /** The leader's first content token is out. */
  | {
      kind: "cache.flight_committed";
      key: string;
      flightId: RequestId;
      node: NodeId;
      attempts: number;
    }
  /** `replyTo` is answered once every participant's news is on its way: nobody will join any more. */
  | {
      kind: "cache.flight_ended";
      key: string;
      flightId: RequestId;
      result: FlightResult;
      replyTo?: ReplyTo<FlightClosed>;
    }
  /** All flights and memberships of that request actor are void; joiners of its flights are told `internal`. */
  | { kind: "cache.owner_restarted"; owner: string }
  /** A leader's question was answered from another one's entry: the joiners get that answer too; it is not kept as theirs. */
  | {
      kind: "cache.flight_answered";
      key: string;
      flightId: RequestId;
      answer: StoredAnswer;
      replyTo: ReplyTo<FlightClosed>;
    }
  /** Lookup by meaning, on the shard of the scope. */
  | { kind: "cache.match"; question: Question; replyTo: ReplyTo<Matched> }
  /** A question and what a node answered; `explored`: the entry that was passed over for it, and is judged now. */
  | {
      kind: "cache.learn";
      question: Omit<Question, "policy">;
      answer: StoredAnswer;
      explored?: Explored;
      isShadow: boolean;
    }
  /** What a node answers where that entry was served. */
  | { kind: "cache.judge"; explored: Explored; answer: StoredAnswer }
  /** A caller says that an entry's answer was right, or wrong; wrong ones are gone for good. */
  | {
      kind: "cache.feedback";
      entryId: string;
      tenant: string;
      isRight: boolean;
      replyTo: ReplyTo<{ known: boolean }>;
    }
  | {
      kind: "cache.inspect";
      tenant: string;
      count: number;
      question?: { text: string; vector: Float32Array };
      replyTo: ReplyTo<{ entries: InspectedEntry[]; judged: JudgedPool[] }>;
    }
  /** Forgets the answers of a tenant, or all, here and in the store. `removed` counts both copies. */
  | { kind: "cache.purge"; tenant?: string; replyTo: ReplyTo<{ removed: number }> }
  /** For answers kept from now on; a smaller `bytesMax` drops what no longer fits at once. Both > 0. */
  | { kind: "cache.configure"; ttlMs: number; bytesMax: number }
  | { kind: "cache.describe"; replyTo: ReplyTo<CacheDescription> };

export type LookupReply =
  | { kind: "hit"; answer: StoredAnswer; ageMs: number }
  /** Run it; others may join you. `flightId` is your own request id. */
  | { kind: "lead"; flightId: RequestId }
  /** Wait: news comes to `participant`. Committed: bytes flow already. */
  | { kind: "join"; flightId: RequestId; committed?: { node: NodeId; attempts: number } }
  /** Run it alone. */
  | { kind: "alone" };

export type FlightResult =
  | { kind: "stored"; answer: StoredAnswer }
  | { kind: "not_stored"; reason: string }
  /** `shared`: the failure is everyone's (the nodes'); otherwise it is the leader's own (its limit, its deadline),
   *  and the next participant leads. */
  | { kind: "failed"; code: ErrorCode; message?: string; retryAfterMs?: number; shared: boolean };

/** Every participant's news is on its way. */
export type FlightClosed = { kind: "closed" };

/** What a participant hears of its flight, each at most once, in this order. */
export type FlightNews =
  | {
      kind: "flight.committed";
      requestId: RequestId;
      flightId: RequestId;
      node: NodeId;
      attempts: number;
    }
  | { kind: "flight.ended"; requestId: RequestId; flightId: RequestId }
  /** The leader's question was answered from an entry of the same meaning, and so is this one. */
  | { kind: "flight.answered"; requestId: RequestId; flightId: RequestId; answer: StoredAnswer }
  | {
      kind: "flight.failed";
      requestId: RequestId;
      flightId: RequestId;
      code: ErrorCode;
      message?: string;
      retryAfterMs?: number;
    }
  /**
   * The former leader dropped out for a reason of its own: this participant now leads `flightId`, its own.
   * The others hear of that flight from now on, under its id.
   */
  | { kind: "flight.promoted"; key: string; requestId: RequestId; flightId: RequestId }
  /** To the leader: every client has left. */
  | { kind: "flight.abandoned"; requestId: RequestId; flightId: RequestId };

/** Figures now, then counts since the start. Every lookup is one of hits, storeHits, misses and joins. */
export type CacheDescription = Partial<SemanticDescription> & {
  entries: number;
  bytes: number;
  bytesMax: number;
  /** Keys looked up or run just now. */
  flights: number;
  /** Requests that take part in them, leaders with a client included. */
  participants: number;
  hits: number;
  storeHits: number;
  misses: number;
  joins: number;
  stores: number;
  evictions: number;
  expired: number;
  /** Answers not kept for their size. */
  tooLarge: number;
  /** Answers not kept because a purge came after their flight began. */
  purgedAnswers: number;
  /** Requests that ran alone because a bound was reached. */
  overflows: number;
  /** Asks of the store without a reply. */
  storeFailures: number;
  /** Flights that nobody ended in time. */
  lapses: number;
  /** Messages about a flight that is not, or no longer, there. */
  stale: number;
};

/** Rare things, as events. */
export type CacheEvent =
  | { kind: "cache.purged"; tenant?: string; removed: number }
  /** What the store held may come back. */
  | { kind: "cache.store_purge_failed"; tenant?: string; failure: AskFailure }
  | { kind: "cache.flight_lapsed"; flightId: RequestId; joiners: number };

type StoreAnswered = {
  kind: "cache.store_answered";
  key: string;
  serial: number;
  outcome: AskOutcome<StoreGot>;
};
type StorePurged = {
  kind: "cache.store_purged";
  serial: number;
  outcome: AskOutcome<{ removed: number }>;
};
type SweepDue = { kind: "cache.sweep_due" };
type MaintainDue = { kind: "cache.maintain_due" };
type RecallDue = { kind: "cache.recall_due" };
type NearestAnswered = {
  kind: "cache.nearest_answered";
  match: Extract<CacheMessage, { kind: "cache.match" }>;
  outcome: AskOutcome<Recalled>;
};
type RecallAnswered = { kind: "cache.recalled"; outcome: AskOutcome<Recalled> };
type OwnMessage =
  | CacheMessage
  | StoreAnswered
  | StorePurged
  | SweepDue
  | MaintainDue
  | NearestAnswered
  | RecallDue
  | RecallAnswered;

export type CacheOptions = {
  /** Life of an answer, > 0. */
  ttlMs: number;
  /** Memory of this shard for answers, > 0. */
  bytesMax: number;
  /** A larger answer is not kept, nor one above an eighth of `bytesMax`; > 0. */
  answerBytesMax: number;
  /** How long the store is waited for before a lookup is a miss, > 0. */
  storeTimeoutMs: number;
  /** Keys looked up or run at once, 1… */
  flightsMax: number;
  /** Requests taking part in them, at least `flightsMax`. */
  participantsMax: number;
  /** A flight that nobody has ended by then is given up: above the longest that a request may take. */
  flightMsMax: number;
  /** Lookup by meaning; absent = equal keys only. */
  semantic?: SemanticOptions;
  /** The store has an index over all questions and is asked at every match; else they come from it once, at the start. */
  asksNearest: boolean;
  /** Of the 4096 buckets that scopes fall into, those whose number modulo `shards` is `shard` are this one's. */
  shard: number;
  shards: number;
};

export const cacheDefaults: Readonly<CacheOptions> = {
  ttlMs: 3_600_000,
  bytesMax: 256 * 1024 * 1024,
  answerBytesMax: 1024 * 1024,
  storeTimeoutMs: 50,
  flightsMax: 16_384, // About 300 bytes each.
  participantsMax: 65_536,
  flightMsMax: 600_000, // Twice the default of the longest request.
  asksNearest: false,
  shard: 0,
  shards: 1,
};

/** Time for the store to find and delete what a purge names: it may hold millions. */
const STORE_PURGE_MS = 30_000;
/** Purges that the store has not finished; more are refused there, and said so. */
const PURGES_MAX = 64;
const SWEEP_MS = 1000;
/** Entries looked at by one timed sweep: some 20 µs. */
const SWEPT_PER_TIMER = 256;
/** Between two slices of work on indexes: each takes some ms, and requests go first. */
const MAINTAIN_MS = 20;
const BUCKETS = 4096;
/** Time for a page of questions; a store that is away is asked again after a rest. */
const RECALL_MS = 5000;
const RECALL_AGAIN_MS = 2000;

type Waiter = {
  readonly participant: ActorRef<FlightNews>;
  readonly lead: boolean;
  readonly replyTo: ReplyTo<LookupReply>;
};

/** The store has been asked. Never empty. */
type LookingUp = {
  readonly state: "looking_up";
  readonly tenant: string;
  readonly serial: number;
  readonly askedAtMs: number;
  readonly waiters: Map<RequestId, Waiter>;
  /** A purge came after it began: what the store says is void. */
  purged: boolean;
};

/** A leader runs it. The leader's client or a joiner is there. */
type Running = {
  readonly state: "running";
  readonly tenant: string;
  /** The flight's id too. */
  readonly leaderId: RequestId;
  readonly leader: ActorRef<FlightNews>;
  leaderPresent: boolean;
  /** In order of arrival; made when the first one joins. */
  joiners: Map<RequestId, ActorRef<FlightNews>> | null;
  committed: { node: NodeId; attempts: number } | null;
  /** A purge came after it began: its answer is not kept, and nobody joins it any more. */
  purged: boolean;
  readonly lapsesAtMs: number;
};

type Purge = { tenant: string | undefined; removed: number; replyTo: ReplyTo<{ removed: number }> };
type Lookup = Extract<CacheMessage, { kind: "cache.lookup" }>;
type Failure = { code: ErrorCode; message?: string; retryAfterMs?: number };

const CLOSED: FlightClosed = { kind: "closed" };
const ALONE: LookupReply = { kind: "alone" };
const OFF: Matched = { kind: "miss", says: "matching by meaning is off" };
const INTERNAL: Failure = { code: "internal" };

export class CacheActor implements Actor<OwnMessage> {
  readonly #options: CacheOptions;
  readonly #store: ActorRef<StoreCommand> | undefined;
  readonly #entries: EntryStore;
  /** Made at the start, which brings its randomness. */
  #semantic: SemanticShard | undefined;
  /** What is still to be had back from the store: the bucket, and the page in it. */
  #recall: { bucket: number; cursor: string } | undefined;
  #isMaintaining = false;
  /** By key; those that run in the order in which they began, so that the first lapses first. */
  readonly #flights = new InflightMap<string, LookingUp | Running>();
  /** Waiters, joiners, and leaders whose client is there. */
  #participants = 0;
  /** Purges that the store works on; until it has, it is not asked for answers of theirs. */
  readonly #purges = new Map<number, Purge>();
  #ttlMs: number;
  #serial = 0;
  #sweepArmed = false;
  #hits = 0;
  #storeHits = 0;
  #misses = 0;
  #joins = 0;
  #stores = 0;
  #purgedAnswers = 0;
  #overflows = 0;
  #storeFailures = 0;
  #lapses = 0;
  #stale = 0;

  /** Without a `store`, memory is all there is. */
  constructor(options: CacheOptions, store?: ActorRef<StoreCommand>) {
    assert(options.ttlMs > 0, "ttlMs must be positive");
    assert(options.storeTimeoutMs > 0, "storeTimeoutMs must be positive");
    assert(options.flightsMax >= 1, "flightsMax must be at least 1");
    assert(options.participantsMax >= options.flightsMax, "every flight has a participant");
    assert(options.flightMsMax > 0, "flightMsMax must be positive");
    this.#options = options;
    this.#store = store;
    this.#entries = new EntryStore(options.bytesMax, options.answerBytesMax);
    this.#ttlMs = options.ttlMs;
  }

  start(context: Context<OwnMessage>): void {
    const { semantic, shard } = this.#options;
    if (semantic === undefined) return;
    this.#semantic = new SemanticShard(semantic, () => context.random());
    if (this.#store === undefined || this.#options.asksNearest) return;
    this.#recall = { bucket: shard, cursor: "" };
    context.startTimer("recall", 0, { kind: "cache.recall_due" });
  }

  receive(message: OwnMessage, context: Context<OwnMessage>): void {
    switch (message.kind) {
      case "cache.lookup":
        return this.#onLookup(message, context);
      case "cache.leave":
        return this.#onLeave(message.key, message.requestId, context);
      case "cache.flight_committed":
        return this.#onFlightCommitted(message, context);
      case "cache.flight_ended":
        this.#onFlightEnded(message, context);
        if (message.replyTo !== undefined) context.reply(message.replyTo, CLOSED);
        return;
      case "cache.flight_answered":
        this.#onFlightAnswered(message, context);
        return context.reply(message.replyTo, CLOSED);
      case "cache.match":
        if (this.#options.asksNearest) return this.#askNearest(message, context);
        return this.#replyMatch(message, context);
      case "cache.nearest_answered":
        return this.#onNearestAnswered(message, context);
      case "cache.learn":
        return this.#onLearn(message, context);
      case "cache.judge":
        return this.#semantic?.judge(message.explored, message.answer);
      case "cache.feedback":
        return this.#onFeedback(message, context);
      case "cache.inspect":
        return this.#onInspect(message, context);
      case "cache.recall_due":
        return this.#onRecallDue(context);
      case "cache.recalled":
        return this.#onRecalled(message.outcome, context);
      case "cache.maintain_due":
        this.#isMaintaining = this.#semantic?.maintain() === true;
        if (this.#isMaintaining)
          context.startTimer("maintain", MAINTAIN_MS, { kind: "cache.maintain_due" });
        return;
      case "cache.owner_restarted":
        return this.#onOwnerRestarted(message.owner, context);
      case "cache.purge":
        return this.#onPurge(message.tenant, message.replyTo, context);
      case "cache.configure":
        assert(message.ttlMs > 0, "ttlMs must be positive");
        this.#ttlMs = message.ttlMs;
        return this.#entries.resize(message.bytesMax);
      case "cache.describe":
        return context.reply(message.replyTo, this.#describe());
      case "cache.store_answered":
        return this.#onStoreAnswered(message, context);
      case "cache.store_purged":
        return this.#onStorePurged(message, context);
      case "cache.sweep_due":
        return this.#onSweepDue(context);
      default:
        return unreachable(message);
    }
  }

  // ---- lookups ------------------------------------------------------------------------------------------

  #onLookup(lookup: Lookup, context: Context<OwnMessage>): void {
    const { key, tenant, replyTo } = lookup;
    if (lookup.read) {
      const entry = this.#entries.lookup(key, tenant, context.nowMs);
      if (entry !== undefined) {
        this.#hits++;
        const ageMs = context.nowMs - entry.storedAtMs;
        return context.reply(replyTo, { kind: "hit", answer: entry.answer, ageMs });
      }
    }
    const flight = this.#flights.get(key);
    if (flight !== undefined) return this.#meet(flight, lookup, context);
    const asks = lookup.read && this.#store !== undefined && !this.#isPurging(tenant);
    if (!asks && !lookup.lead) return this.#replyAlone(replyTo, context);
    if (this.#flights.size >= this.#options.flightsMax || this.#isFull())
      return this.#replyOverflow(replyTo, context);
    this.#participants++;
    if (asks && this.#store !== undefined) this.#becomeLookingUp(lookup, this.#store, context);
    else this.#becomeRunning(key, tenant, lookup.requestId, lookup.participant, replyTo, context);
  }

  /** A lookup of a key that has a flight. */
  #meet(flight: LookingUp | Running, lookup: Lookup, context: Context<OwnMessage>): void {
    const { requestId, participant, lead, replyTo } = lookup;
    if (flight.tenant !== lookup.tenant || !lookup.read) return this.#replyAlone(replyTo, context);
    if (flight.state === "looking_up") {
      if (flight.waiters.has(requestId)) return this.#replyAlone(replyTo, context); // A duplicate.
      if (this.#isFull()) return this.#replyOverflow(replyTo, context);
      this.#participants++;
      flight.waiters.set(requestId, { participant, lead, replyTo });
      return;
    }
    const takesPart = requestId === flight.leaderId || flight.joiners?.has(requestId) === true;
    if (!lead || flight.purged || takesPart) return this.#replyAlone(replyTo, context);
    if (this.#isFull()) return this.#replyOverflow(replyTo, context);
    this.#participants++;
    this.#join(flight, requestId, participant, replyTo, context);
  }

  #becomeLookingUp(
    { key, tenant, requestId, participant, lead, replyTo }: Lookup,
    store: ActorRef<StoreCommand>,
    context: Context<OwnMessage>,
  ): void {
    const serial = ++this.#serial;
    this.#flights.set(key, {
      state: "looking_up",
      tenant,
      serial,
      askedAtMs: context.nowMs,
      waiters: new Map([[requestId, { participant, lead, replyTo }]]),
      purged: false,
    });
    context.ask<StoreCommand, StoreGot>(
      store,
      this.#options.storeTimeoutMs,
      (to) => ({ kind: "store.get", key, tenant, replyTo: to }),
      (outcome) => ({ kind: "cache.store_answered", key, serial, outcome }),
    );
  }

  #onStoreAnswered({ key, serial, outcome }: StoreAnswered, context: Context<OwnMessage>): void {
    if (!outcome.ok) this.#storeFailures++;
    const flight = this.#flights.get(key);
    if (flight?.state !== "looking_up" || flight.serial !== serial) return; // All who waited have left.
    this.#flights.delete(key);
    const got = outcome.ok && !flight.purged ? outcome.value : undefined;
    if (got?.answer !== undefined) {
      // Time under way counts as life: never too long, at worst a little short.
      const leftMs = Math.min(got.ttlMs - (context.nowMs - flight.askedAtMs), this.#ttlMs);
      if (leftMs > 0) return this.#answerWaiters(key, flight, got.answer, leftMs, context);
    }
    this.#beginWithout(key, flight, context);
  }

  #answerWaiters(
    key: string,
    { tenant, waiters }: LookingUp,
    answer: StoredAnswer,
    leftMs: number,
    context: Context<OwnMessage>,
  ): void {
    const { nowMs } = context;
    const ageMs = this.#ttlMs - leftMs;
    this.#entries.put(key, tenant, answer, nowMs - ageMs, nowMs + leftMs, nowMs);
    this.#armSweep(context);
    this.#storeHits += waiters.size;
    this.#participants -= waiters.size;
    for (const { replyTo } of waiters.values())
      context.reply(replyTo, { kind: "hit", answer, ageMs });
  }

  /** The store has nothing: the first of the waiters that may lead does, the rest join it. */
  #beginWithout(key: string, { tenant, waiters }: LookingUp, context: Context<OwnMessage>): void {
    let running: Running | undefined;
    for (const [requestId, { participant, lead, replyTo }] of waiters) {
      if (!lead) {
        this.#participants--;
        this.#replyAlone(replyTo, context);
      } else if (running === undefined) {
        running = this.#becomeRunning(key, tenant, requestId, participant, replyTo, context);
      } else {
        this.#join(running, requestId, participant, replyTo, context);
      }
    }
  }

  #becomeRunning(
    key: string,
    tenant: string,
    leaderId: RequestId,
    leader: ActorRef<FlightNews>,
    replyTo: ReplyTo<LookupReply>,
    context: Context<OwnMessage>,
  ): Running {
    const running = this.#newRunning(tenant, leaderId, leader, null, context);
    this.#flights.set(key, running);
    this.#misses++;
    context.reply(replyTo, { kind: "lead", flightId: leaderId });
    return running;
  }

  #newRunning(
    tenant: string,
    leaderId: RequestId,
    leader: ActorRef<FlightNews>,
    joiners: Running["joiners"],
    context: Context<OwnMessage>,
  ): Running {
    this.#armSweep(context);
    return {
      state: "running",
      tenant,
      leaderId,
      leader,
      leaderPresent: true,
      joiners,
      committed: null,
      purged: false,
      lapsesAtMs: context.nowMs + this.#options.flightMsMax,
    };
  }

  #join(
    flight: Running,
    requestId: RequestId,
    participant: ActorRef<FlightNews>,
    replyTo: ReplyTo<LookupReply>,
    context: Context<OwnMessage>,
  ): void {
    flight.joiners ??= new Map();
    flight.joiners.set(requestId, participant);
    this.#joins++;
    const { leaderId: flightId, committed } = flight;
    context.reply(replyTo, {
      kind: "join",
      flightId,
      ...(committed === null ? {} : { committed }),
    });
  }

  #replyAlone(replyTo: ReplyTo<LookupReply>, context: Context<OwnMessage>): void {
    this.#misses++;
    context.reply(replyTo, ALONE);
  }

  #replyOverflow(replyTo: ReplyTo<LookupReply>, context: Context<OwnMessage>): void {
    this.#overflows++;
    this.#replyAlone(replyTo, context);
  }

  #isFull(): boolean {
    return this.#participants >= this.#options.participantsMax;
  }

  // ---- flights --------------------------------------------------------------------------------------------

  #onLeave(key: string, requestId: RequestId, context: Context<OwnMessage>): void {
    const flight = this.#flights.get(key);
    if (flight === undefined) return; // It was over, or had never begun for this one.
    if (flight.state === "looking_up") {
      const waiter = flight.waiters.get(requestId);
      if (waiter === undefined) return;
      flight.waiters.delete(requestId);
      this.#participants--;
      this.#replyAlone(waiter.replyTo, context); // Nobody reads it, but the ask is over.
      if (flight.waiters.size === 0) this.#flights.delete(key);
      return;
    }
    if (requestId === flight.leaderId && flight.leaderPresent) flight.leaderPresent = false;
    else if (flight.joiners?.delete(requestId) !== true) return;
    this.#participants--;
    this.#abandonIfEmpty(key, flight, context);
  }

  /** Ends a flight that nobody waits for any more. */
  #abandonIfEmpty(key: string, flight: Running, context: Context<OwnMessage>): void {
    if (flight.leaderPresent || (flight.joiners?.size ?? 0) > 0) return;
    this.#flights.delete(key);
    const { leaderId } = flight;
    const news = { requestId: leaderId, flightId: leaderId };
    context.tell(flight.leader, { kind: "flight.abandoned", ...news });
  }

  #onFlightCommitted(
    message: Extract<CacheMessage, { kind: "cache.flight_committed" }>,
    context: Context<OwnMessage>,
  ): void {
    const { key, flightId, node, attempts } = message;
    const flight = this.#runningOf(key, flightId);
    if (flight === undefined || flight.committed !== null) return;
    flight.committed = { node, attempts };
    if (flight.joiners === null) return;
    for (const [requestId, participant] of flight.joiners)
      context.tell(participant, { kind: "flight.committed", requestId, flightId, node, attempts });
  }

  #onFlightEnded(
    { key, flightId, result }: Extract<CacheMessage, { kind: "cache.flight_ended" }>,
    context: Context<OwnMessage>,
  ): void {
    const flight = this.#runningOf(key, flightId);
    if (flight === undefined) return;
    switch (result.kind) {
      case "stored":
        this.#keep(key, flight, result.answer, context);
        return this.#close(key, flight, null, context);
      case "not_stored":
        return this.#close(key, flight, null, context);
      case "failed":
        if (!result.shared && flight.committed === null && this.#promote(key, flight, context))
          return;
        return this.#close(key, flight, result, context);
      default:
        return unreachable(result);
    }
  }

  #keep(key: string, flight: Running, answer: StoredAnswer, context: Context<OwnMessage>): void {
    if (flight.purged) {
      this.#purgedAnswers++;
      return;
    }
    const { nowMs } = context;
    const { tenant } = flight;
    if (!this.#entries.put(key, tenant, answer, nowMs, nowMs + this.#ttlMs, nowMs)) return;
    this.#stores++;
    this.#armSweep(context);
    if (this.#store !== undefined)
      context.tell(this.#store, { kind: "store.put", key, tenant, answer, ttlMs: this.#ttlMs });
  }

  /** Takes the flight off the table and tells its joiners how it ended. */
  #close(
    key: string,
    flight: Running,
    failure: Failure | null,
    context: Context<OwnMessage>,
  ): void {
    this.#flights.delete(key);
    if (flight.leaderPresent) this.#participants--;
    if (flight.joiners === null) return;
    this.#participants -= flight.joiners.size;
    const { leaderId: flightId } = flight;
    // Ended well without a first token, so far as is known here: that message was lost, and no joiner has
    // been told to read. An error is better than silence.
    const told = failure ?? (flight.committed === null ? INTERNAL : null);
    for (const [requestId, participant] of flight.joiners) {
      if (told === null) {
        context.tell(participant, { kind: "flight.ended", requestId, flightId });
        continue;
      }
      context.tell(participant, {
        kind: "flight.failed",
        requestId,
        flightId,
        code: told.code,
        ...(told.message === undefined ? {} : { message: told.message }),
        ...(told.retryAfterMs === undefined ? {} : { retryAfterMs: told.retryAfterMs }),
      });
    }
  }

  /** Makes the joiner that has waited longest the leader; false when there is none. */
  #promote(key: string, flight: Running, context: Context<OwnMessage>): boolean {
    const next = flight.joiners?.entries().next();
    if (next === undefined || next.done) return false;
    const [requestId, participant] = next.value;
    flight.joiners?.delete(requestId);
    if (flight.leaderPresent) this.#participants--;
    this.#flights.delete(key); // So that it stands last: it begins now, after any purge as well.
    this.#flights.set(
      key,
      this.#newRunning(flight.tenant, requestId, participant, flight.joiners, context),
    );
    context.tell(participant, { kind: "flight.promoted", key, requestId, flightId: requestId });
    return true;
  }

  #onOwnerRestarted(owner: string, context: Context<OwnMessage>): void {
    for (const [key, flight] of this.#flights) {
      if (flight.state === "looking_up") {
        for (const [requestId, waiter] of flight.waiters) {
          if (waiter.participant.path !== owner) continue;
          flight.waiters.delete(requestId); // Not answered: its ask died with the asker.
          this.#participants--;
        }
        if (flight.waiters.size === 0) this.#flights.delete(key);
        continue;
      }
      for (const [requestId, participant] of flight.joiners ?? []) {
        if (participant.path !== owner) continue;
        flight.joiners?.delete(requestId);
        this.#participants--;
      }
      if (flight.leader.path === owner) this.#close(key, flight, INTERNAL, context);
      else this.#abandonIfEmpty(key, flight, context);
    }
  }

  #runningOf(key: string, flightId: RequestId): Running | undefined {
    const flight = this.#flights.get(key);
    if (flight?.state === "running" && flight.leaderId === flightId) return flight;
    this.#stale++;
    return undefined;
  }

  // ---- questions of the same meaning --------------------------------------------------------------------

  #onFlightAnswered(
    { key, flightId, answer }: Extract<CacheMessage, { kind: "cache.flight_answered" }>,
    context: Context<OwnMessage>,
  ): void {
    const flight = this.#runningOf(key, flightId);
    if (flight === undefined) return;
    for (const [requestId, participant] of flight.joiners ?? [])
      context.tell(participant, { kind: "flight.answered", requestId, flightId, answer });
    this.#participants -= flight.joiners?.size ?? 0;
    flight.joiners = null; // All are told: nobody is left for the close to tell.
    this.#close(key, flight, null, context);
  }

  #replyMatch(
    { question, replyTo }: Extract<CacheMessage, { kind: "cache.match" }>,
    context: Context<OwnMessage>,
  ): void {
    context.reply(replyTo, this.#semantic?.match(question, context.nowMs) ?? OFF);
  }

  /** What the store finds is taken in; then labels, guards and the tenant's mode decide here, as ever. */
  #askNearest(
    match: Extract<CacheMessage, { kind: "cache.match" }>,
    context: Context<OwnMessage>,
  ): void {
    const { scope, vector, policy } = match.question;
    if (this.#store === undefined) return this.#replyMatch(match, context);
    context.ask<StoreCommand, Recalled>(
      this.#store,
      this.#options.storeTimeoutMs,
      (replyTo) => ({
        kind: "store.nearest",
        scope,
        vector,
        similarityMin: policy.similarityMin,
        count: NEIGHBOURS,
        replyTo,
      }),
      (outcome) => ({ kind: "cache.nearest_answered", match, outcome }),
    );
  }

  #onNearestAnswered({ match, outcome }: NearestAnswered, context: Context<OwnMessage>): void {
    if (outcome.ok) this.#adopt(outcome.value.questions, context);
    else this.#storeFailures++;
    this.#replyMatch(match, context);
  }

  #adopt(questions: readonly StoredQuestion[], context: Context<OwnMessage>): void {
    if (questions.length === 0) return;
    for (const question of questions)
      if (!this.#isPurging(question.tenant)) this.#semantic?.adopt(question, context.nowMs);
    this.#armSweep(context);
    this.#armMaintenance(context);
  }

  #onLearn(
    { question, answer, explored, isShadow }: Extract<CacheMessage, { kind: "cache.learn" }>,
    context: Context<OwnMessage>,
  ): void {
    const { nowMs } = context;
    const made = this.#semantic?.learn(question, answer, explored, isShadow, nowMs);
    if (made === undefined) return;
    this.#armSweep(context);
    this.#armMaintenance(context);
    if (this.#store !== undefined)
      context.tell(this.#store, { kind: "store.remember", question: made });
  }

  #onFeedback(
    { entryId, tenant, isRight, replyTo }: Extract<CacheMessage, { kind: "cache.feedback" }>,
    context: Context<OwnMessage>,
  ): void {
    const scope = this.#semantic?.scopeOf(entryId);
    const known = this.#semantic?.feedback(entryId, tenant, isRight) === true;
    if (known && !isRight && scope !== undefined && this.#store !== undefined)
      context.tell(this.#store, { kind: "store.forget", entryId, scope, tenant });
    context.reply(replyTo, { known });
  }

  #onInspect(
    { tenant, count, question, replyTo }: Extract<CacheMessage, { kind: "cache.inspect" }>,
    context: Context<OwnMessage>,
  ): void {
    const entries = this.#semantic?.inspect(tenant, count, context.nowMs, question) ?? [];
    context.reply(replyTo, { entries, judged: this.#semantic?.judged() ?? [] });
  }

  /** Asks for the next page; lookups go on meanwhile with what is there. */
  #onRecallDue(context: Context<OwnMessage>): void {
    if (this.#recall === undefined || this.#store === undefined) return;
    const { bucket, cursor } = this.#recall;
    context.ask<StoreCommand, Recalled>(
      this.#store,
      RECALL_MS,
      (replyTo) => ({ kind: "store.recall", bucket, cursor, replyTo }),
      (outcome) => ({ kind: "cache.recalled", outcome }),
    );
  }

  #onRecalled(outcome: AskOutcome<Recalled>, context: Context<OwnMessage>): void {
    if (this.#recall === undefined) return;
    if (!outcome.ok) {
      this.#storeFailures++;
      context.startTimer("recall", RECALL_AGAIN_MS, { kind: "cache.recall_due" });
      return;
    }
    const { questions, cursor } = outcome.value;
    this.#adopt(questions, context);
    const next = this.#recall.bucket + (cursor === undefined ? this.#options.shards : 0);
    this.#recall = next < BUCKETS ? { bucket: next, cursor: cursor ?? "" } : undefined;
    this.#onRecallDue(context);
  }

  #armMaintenance(context: Context<OwnMessage>): void {
    if (this.#isMaintaining) return;
    this.#isMaintaining = true;
    context.startTimer("maintain", MAINTAIN_MS, { kind: "cache.maintain_due" });
  }

  // ---- purging and sweeping ---------------------------------------------------------------------------------

  #onPurge(
    tenant: string | undefined,
    replyTo: ReplyTo<{ removed: number }>,
    context: Context<OwnMessage>,
  ): void {
    const removed = this.#entries.purge(tenant) + (this.#semantic?.purge(tenant) ?? 0);
    for (const flight of this.#flights.values())
      if (tenant === undefined || flight.tenant === tenant) flight.purged = true;
    const purge = { tenant, removed, replyTo };
    if (this.#store === undefined) return this.#finishPurge(purge, context);
    if (this.#purges.size >= PURGES_MAX) return this.#failPurge(purge, "busy", context);
    const serial = ++this.#serial;
    this.#purges.set(serial, purge);
    context.ask<StoreCommand, { removed: number }>(
      this.#store,
      STORE_PURGE_MS,
      (to) => ({ kind: "store.purge", ...(tenant === undefined ? {} : { tenant }), replyTo: to }),
      (outcome) => ({ kind: "cache.store_purged", serial, outcome }),
    );
  }

  #onStorePurged({ serial, outcome }: StorePurged, context: Context<OwnMessage>): void {
    const purge = this.#purges.get(serial);
    assert(purge !== undefined, "a purge stays until its one outcome");
    this.#purges.delete(serial);
    if (!outcome.ok) return this.#failPurge(purge, outcome.failure, context);
    this.#finishPurge({ ...purge, removed: purge.removed + outcome.value.removed }, context);
  }

  #failPurge(purge: Purge, failure: AskFailure, context: Context<OwnMessage>): void {
    const tenant = purge.tenant === undefined ? {} : { tenant: purge.tenant };
    const event: CacheEvent = { kind: "cache.store_purge_failed", ...tenant, failure };
    context.emit(event);
    this.#finishPurge(purge, context);
  }

  #finishPurge({ tenant, removed, replyTo }: Purge, context: Context<OwnMessage>): void {
    const event: CacheEvent = {
      kind: "cache.purged",
      ...(tenant === undefined ? {} : { tenant }),
      removed,
    };
    context.emit(event);
    context.reply(replyTo, { removed });
  }

  #isPurging(tenant: string): boolean {
    if (this.#purges.size === 0) return false;
    for (const purge of this.#purges.values())
      if (purge.tenant === undefined || purge.tenant === tenant) return true;
    return false;
  }

  #armSweep(context: Context<OwnMessage>): void {
    if (this.#sweepArmed) return;
    this.#sweepArmed = true;
    context.startTimer("sweep", SWEEP_MS, { kind: "cache.sweep_due" });
  }

  #onSweepDue(context: Context<OwnMessage>): void {
    this.#sweepArmed = false;
    this.#entries.sweep(context.nowMs, SWEPT_PER_TIMER);
    for (const [key, flight] of this.#flights) {
      if (flight.state !== "running" || context.nowMs < flight.lapsesAtMs) break; // The rest is younger.
      this.#lapses++;
      const joiners = flight.joiners?.size ?? 0;
      const event: CacheEvent = { kind: "cache.flight_lapsed", flightId: flight.leaderId, joiners };
      context.emit(event);
      this.#close(key, flight, INTERNAL, context);
    }
    this.#semantic?.sweep(context.nowMs, SWEPT_PER_TIMER);
    const holds = this.#entries.size > 0 || this.#flights.size > 0;
    if (holds || (this.#semantic?.size ?? 0) > 0) this.#armSweep(context);
  }

  #describe(): CacheDescription {
    return {
      ...this.#semantic?.describe(),
      entries: this.#entries.size,
      bytes: this.#entries.bytes,
      bytesMax: this.#entries.bytesMax,
      flights: this.#flights.size,
      participants: this.#participants,
      hits: this.#hits,
      storeHits: this.#storeHits,
      misses: this.#misses,
      joins: this.#joins,
      stores: this.#stores,
      evictions: this.#entries.evictions,
      expired: this.#entries.expired,
      tooLarge: this.#entries.tooLarge,
      purgedAnswers: this.#purgedAnswers,
      overflows: this.#overflows,
      storeFailures: this.#storeFailures,
      lapses: this.#lapses,
      stale: this.#stale,
    };
  }
}
