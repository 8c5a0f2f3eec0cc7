/**
 * The requests in flight of this process: one small state machine each, the only writer of their state.
 *
 *   looking ──hit──▶ (answered)
 *      │──join──▶ joined ──committed──▶ following ──▶ (ended)
 *      │                └──promoted──┐
 *   matching ──hit by meaning──▶ (answered, and who joined with it)
 *      ▼                             │
 *   admitting ◀──────────────────────┘
 *      ▼
 *   choosing ◀──retry── backing_off
 *      ▼                    ▲
 *   running ──failed────────┘
 *      ▼ first token
 *   streaming ──▶ (ended)
 *
 * Until the first content token is out, a failed attempt moves to a node not tried yet; after it, never. A
 * leader whose client left goes on while others share its flight; when the last one has left, the cache says
 * so and the attempt is aborted. One deadline timer per request covers every state.
 *
 * A key's shard, and a flight's leader, may be in another peer (cache-placement.ts). A flight stays at the shard where
 * it was joined or led. Who waits for one whose shard or leader is lost is looking again; who follows a leader of
 * another peer ends when the front says that its bytes are delivered, not by the news of its end.
 *
 * It sees no byte of a prompt or an answer but whole answers on their way to the cache, and the questions that are
 * matched by meaning on theirs. Its state is lost on
 * a restart: `start` then tells every owner (`owner_restarted`), so that leases, reservations and flights are
 * freed and every open client gets an error instead of silence.
 */

import {
  type Actor,
  type ActorRef,
  type AskOutcome,
  type Context,
  type ReplyTo,
  unreachable,
} from "../runtime/actor.ts";
import { InflightMap } from "../runtime/inflight-map.ts";
import type {
  CacheMessage,
  FlightClosed,
  FlightNews,
  FlightResult,
  LookupReply,
  SharedHit,
} from "./cache.ts";
import { type CachePlacement, peerOf } from "./cache-placement.ts";
import type {
  AnswerFacts,
  Embedded,
  EmbedderCommand,
  FrontCommand,
  UpstreamCommand,
  UpstreamEvent,
  UpstreamFailure,
} from "./edges.ts";
import { type ErrorCode, errorFacts } from "./errors.ts";
import type { GpuNodeMessage } from "./gpu-node.ts";
import { limitStateAt } from "./limit-state.ts";
import type { ViewChanged } from "./members.ts";
import type { PeerId } from "./membership.ts";
import type {
  AttemptFact,
  CacheVerdict,
  Decision,
  LeaseId,
  LeaseOutcome,
  LimitState,
  NodeId,
  RequestFacts,
  RequestId,
  RequestRecord,
  StoredAnswer,
  Usage,
} from "./protocol.ts";
import type { AdmitReply, RateLimiterMessage } from "./rate-limiter.ts";
import { backoffMs, failureRules } from "./retry-policy.ts";
import type { ChooseReply, RouterMessage } from "./router.ts";
import type { Explored, Matched } from "./semantic-shard.ts";
import { TtftBands } from "./ttft-bands.ts";

/** What the request actor is told: by the front, by the upstream edge, by caches, and by its own asks and timers. */
export type RequestMessage =
  /** `question`: the last user turn, where `facts.semantic` says that it may be matched by meaning; `vector`: its own,
   *  where it is known already. */
  | { kind: "request.submit"; facts: RequestFacts; question?: string; vector?: Float32Array }
  | { kind: "request.client_left"; requestId: RequestId }
  | { kind: "request.configure"; options: RequestOptions }
  | { kind: "request.describe"; replyTo: ReplyTo<RequestDescription> }
  | UpstreamEvent
  | FlightNews
  | ViewChanged
  /** The connection with that peer is gone: what was under way either way may be lost. Comes before a new one is up. */
  | { kind: "request.peer_down"; peer: PeerId }
  /** How the front has delivered a flight of another peer. */
  | { kind: "request.relayed"; requestId: RequestId; how: Relayed }
  | LookedUp
  | GotVector
  | GotMatch
  | Admitted
  | Chosen
  | { kind: "request.deadline"; requestId: RequestId }
  | { kind: "request.retry_due"; requestId: RequestId }
  | FlightOver
  | { kind: "request.cache_ended"; path: string }
  | { kind: "request.watch_due"; path: string };

type LookedUp = {
  kind: "request.looked_up";
  requestId: RequestId;
  outcome: AskOutcome<LookupReply>;
};
type GotVector = { kind: "request.embedded"; requestId: RequestId; outcome: AskOutcome<Embedded> };
type GotMatch = { kind: "request.matched"; requestId: RequestId; outcome: AskOutcome<Matched> };
type Admitted = {
  kind: "request.admitted";
  requestId: RequestId;
  key: string;
  outcome: AskOutcome<AdmitReply>;
};
/** `broken`: the client was shown an error; `lost`: its bytes cannot be had, and the client has none yet. */
type Relayed = "whole" | "broken" | "lost";

/** The cache's word on the end of a flight, or none. */
type FlightOver = {
  kind: "request.flight_closed";
  requestId: RequestId;
  key: string;
  shard: ActorRef<CacheMessage>;
  outcome: AskOutcome<FlightClosed>;
};
type Chosen = { kind: "request.chosen"; requestId: RequestId; outcome: AskOutcome<ChooseReply> };

/** Open requests, in all and by phase. */
export type RequestDescription = { byPhase: Readonly<Record<Phase, number>>; open: number };

export type RequestOptions = {
  /** Attempts of one request, each on another node, 1…; default 3. */
  attemptsMax: number;
  backoffBaseMs: number;
  backoffMaxMs: number;
  /** Least time that a first token may take; a long prompt, or three times the model's own p95, raises it. */
  firstTokenMs: number;
  stallMs: number;
  totalMs: number;
  /** How long the cache's answer is waited for before the request goes on without it. */
  lookupMs: number;
  /** What matching by meaning may take, vector included; then the request goes on without it. */
  matchMs: number;
  /** Share of semantic hits that are judged by asking a node as well, 0..1. */
  judgeRatio: number;
  /** How long the limiter's answer is waited for; then the request goes on without a limit, and says so. */
  admitMs: number;
};

/** Where the other actors are. */
export type RequestRefs = {
  /** Views of the members are written into it here, and nowhere else. */
  cache: CachePlacement;
  limiter: ActorRef<RateLimiterMessage>;
  router: ActorRef<RouterMessage>;
  node: (node: NodeId) => ActorRef<GpuNodeMessage>;
  nodes: () => readonly NodeId[];
  upstream: ActorRef<UpstreamCommand>;
  front: ActorRef<FrontCommand>;
  /** Absent: nothing is matched by meaning. */
  embedder?: ActorRef<EmbedderCommand>;
};

const phases = [
  "looking",
  "matching",
  "admitting",
  "choosing",
  "running",
  "backing_off",
  "streaming",
  "joined",
  "following",
] as const;
type Phase = (typeof phases)[number];

type Request = {
  readonly facts: RequestFacts;
  phase: Phase;
  clientPresent: boolean;
  /** Leads the flight named by its own id, so that others may share it. */
  leads: boolean;
  /** The cache has been told the end of its flight and has not answered yet. */
  awaitsClosing: boolean;
  /** The flight that it joined, if any, by the name that the cache has for it. */
  flightId: RequestId;
  /** Where it asked for its key: its flight is and stays there, whoever owns the key meanwhile. */
  shard: ActorRef<CacheMessage> | null;
  /** It led a flight: others may read its bytes. */
  isShared: boolean;
  /** How often it asked anew because a leader in another peer was lost. */
  rejoins: number;
  cache: CacheVerdict;
  /** Of a question that may be matched by meaning. */
  match: Match | null;
  limits: LimitState | undefined;
  reserved: boolean;
  attempt: number;
  attempts: AttemptFact[];
  tried: NodeId[];
  decisions: Decision[];
  failureCounts: Partial<Record<UpstreamFailure, number>>;
  lastFailure: { code: ErrorCode; retryAfterMs?: number; detail: string } | null;
  routerCrashes: number;
  node: NodeId;
  leaseId: LeaseId;
  leasedAtMs: number;
  queuedMs: number;
  ttftMs: number | undefined;
  attached: boolean;
  started: boolean;
};

/** How a question is matched by meaning. */
type Match = {
  readonly text: string;
  readonly scope: string;
  readonly untilMs: number;
  vector: Float32Array | undefined;
  /** The entry that was passed over, and is judged by the node's answer. */
  explored: Explored | undefined;
  says: string;
};

const NOTHING_MORE = {};
/** Last limit state per key, for the headers of answers that asked no limiter (cache hits). */
const LIMIT_STATES_MAX = 4096;
/** The cache must hear of an end, however long its mail takes: an ask that expires is dropped unread. */
const CLOSE_MS = 60_000;
/** What others are given beyond a request's deadline, so that its own timer ends it. */
const DEADLINE_MARGIN_MS = 1000;
/** Before a cache shard that ended is watched again. */
const WATCH_AGAIN_MS = 1000;
/**
 * Time for each prompt token on top of `firstTokenMs`: 4,000 tokens/s, which every card of sim/laws.ts prefills faster.
 * Without it a prompt of 100,000 tokens, of a size that has not been seen yet, is given up on one node after another.
 */
const FIRST_TOKEN_MS_PER_TOKEN = 0.25;
/** Multiple of the p95 of the same size of prompt that a first token may take. */
const FIRST_TOKEN_FACTOR = 3;
/** News of lost peers that one request bears: one loss may be heard of by its leader, its shard and its relay. */
const REJOINS_MAX = 4;
/** A second ask of a router that crashed under the first. */
const ROUTER_CRASHES_MAX = 1;

export class RequestActor implements Actor<RequestMessage> {
  readonly #refs: RequestRefs;
  readonly #requests = new InflightMap<RequestId, Request>();
  readonly #limitStates = new Map<string, LimitState>();
  readonly #ttft = new TtftBands();
  #options: RequestOptions;

  constructor(options: RequestOptions, refs: RequestRefs) {
    this.#options = options;
    this.#refs = refs;
  }

  start(context: Context<RequestMessage>): void {
    const owner = context.self.path;
    for (const shard of this.#refs.cache.all) {
      context.tell(shard, { kind: "cache.owner_restarted", owner });
      this.#watchCache(shard, context);
    }
    context.tell(this.#refs.limiter, { kind: "limiter.owner_restarted", owner });
    for (const node of this.#refs.nodes())
      context.tell(this.#refs.node(node), { kind: "gpu_node.owner_restarted", owner });
    context.tell(this.#refs.upstream, { kind: "upstream.abort_all" });
    context.tell(this.#refs.front, { kind: "front.requests_lost" });
  }

  receive(message: RequestMessage, context: Context<RequestMessage>): void {
    switch (message.kind) {
      case "request.submit":
        return this.#onSubmit(message, context);
      case "request.client_left":
        return this.#onClientLeft(message.requestId, context);
      case "request.looked_up":
        return this.#onLookedUp(message, context);
      case "request.embedded":
        return this.#onEmbedded(message, context);
      case "request.matched":
        return this.#onMatched(message, context);
      case "request.admitted":
        return this.#onAdmitted(message, context);
      case "request.chosen":
        return this.#onChosen(message, context);
      case "request.deadline":
        return this.#onDeadline(message.requestId, context);
      case "request.retry_due":
        return this.#onRetryDue(message.requestId, context);
      case "request.flight_closed":
        return this.#onFlightClosed(message, context);
      case "members.view_changed":
        return this.#onViewChanged(message, context);
      case "request.peer_down":
        return this.#onPeerDown(message.peer, context);
      case "request.relayed":
        return this.#onRelayed(message.requestId, message.how, context);
      case "request.cache_ended":
        return this.#onCacheEnded(message.path, context);
      case "request.watch_due":
        for (const shard of this.#refs.cache.all)
          if (shard.path === message.path) this.#watchCache(shard, context);
        return;
      case "upstream.first_token":
        return this.#onFirstToken(message.leaseId, context);
      case "upstream.progress":
        return this.#onProgress(message.leaseId, message.outputTokens, context);
      case "upstream.finished":
        return this.#onFinished(message, context);
      case "upstream.failed":
        return this.#onFailed(message, context);
      case "flight.committed":
        return this.#onFlightCommitted(message, context);
      case "flight.ended":
        return this.#onFlightEnded(message, context);
      case "flight.answered":
        return this.#onFlightAnswered(message, context);
      case "flight.failed":
        return this.#onFlightFailed(message, context);
      case "flight.promoted":
        return this.#onFlightPromoted(message, context);
      case "flight.abandoned":
        return this.#onFlightAbandoned(message, context);
      case "request.configure":
        this.#options = message.options;
        return;
      case "request.describe":
        return context.reply(message.replyTo, this.#describe());
      default:
        return unreachable(message);
    }
  }

  // ---- arrival and cache ------------------------------------------------------------------------------

  #onSubmit(
    { facts, question, vector }: Extract<RequestMessage, { kind: "request.submit" }>,
    context: Context<RequestMessage>,
  ): void {
    if (this.#requests.has(facts.requestId)) return; // A duplicate: the first one answers.
    const request: Request = {
      facts,
      phase: "looking",
      clientPresent: true,
      leads: false,
      awaitsClosing: false,
      flightId: this.#nameOf(facts.requestId),
      shard: null,
      isShared: false,
      rejoins: 0,
      cache: facts.cacheKey === undefined ? "bypass" : "miss",
      match:
        question === undefined || facts.semantic === undefined
          ? null
          : {
              text: question,
              scope: facts.semantic.scope,
              untilMs: 0,
              vector,
              explored: undefined,
              says: "",
            },
      limits: undefined,
      reserved: false,
      attempt: 0,
      attempts: [],
      tried: [],
      decisions: [],
      failureCounts: {},
      lastFailure: null,
      routerCrashes: 0,
      node: "",
      leaseId: "",
      leasedAtMs: 0,
      queuedMs: 0,
      ttftMs: undefined,
      attached: false,
      started: false,
    };
    this.#requests.set(facts.requestId, request);
    const remainingMs = facts.deadlineAtMs - context.nowMs;
    if (remainingMs <= 0) return this.#refuse(request, "deadline_exceeded", context);
    this.#lookUp(request, context);
  }

  #lookUp(request: Request, context: Context<RequestMessage>): void {
    const { facts } = request;
    const key = facts.cacheKey;
    if (key === undefined) return this.#admit(request, context);
    request.phase = "looking"; // At most lookupMs long: its deadline timer starts after it.
    if (!this.#refs.cache.isWithinReach(key)) {
      request.cache = "bypass";
      return this.#admit(request, context);
    }
    const shard = this.#refs.cache.at(key);
    request.shard = shard;
    context.ask<CacheMessage, LookupReply>(
      shard,
      this.#options.lookupMs,
      (replyTo) => ({
        kind: "cache.lookup",
        key,
        tenant: facts.tenant,
        requestId: this.#nameOf(facts.requestId),
        read: facts.cacheRead,
        lead: facts.cacheWrite,
        participant: context.self,
        replyTo,
      }),
      (outcome) => ({ kind: "request.looked_up", requestId: facts.requestId, outcome }),
    );
  }

  #onLookedUp({ requestId, outcome }: LookedUp, context: Context<RequestMessage>): void {
    const request = this.#requests.get(requestId);
    if (request === undefined || request.phase !== "looking") return; // Left, or past its deadline.
    if (!outcome.ok) {
      // Too late or crashed: go on without the cache, and take back a membership that may come about.
      this.#leaveFlight(request, context);
      request.cache = "bypass";
      return this.#admit(request, context);
    }
    const reply = outcome.value;
    switch (reply.kind) {
      case "hit":
        request.cache = "hit_exact";
        if (request.clientPresent) {
          context.tell(this.#refs.front, {
            kind: "front.answer",
            requestId,
            answer: reply.answer,
            facts: this.#answerFacts(request, context.nowMs, reply.ageMs),
          });
        }
        return this.#end(request, "ok", undefined, context);
      case "lead":
        this.#lead(request);
        return this.#match(request, context);
      case "alone":
        return this.#match(request, context);
      case "join":
        request.cache = "joined";
        request.flightId = reply.flightId;
        request.phase = "joined";
        this.#startDeadline(request, context);
        if (reply.committed !== undefined) this.#follow(request, reply.committed, context);
        return;
      default:
        return unreachable(reply);
    }
  }

  #lead(request: Request): void {
    request.leads = true;
    request.isShared = true;
  }

  // ---- matching by meaning ------------------------------------------------------------------------------

  /** Text to vector, vector to entry: in `matchMs` in all, or the request goes on without. */
  #match(request: Request, context: Context<RequestMessage>): void {
    const { facts, match } = request;
    const { embedder } = this.#refs;
    if (match === null || embedder === undefined || !facts.cacheRead)
      return this.#admit(request, context);
    const { requestId } = facts;
    const { text, vector } = match;
    const { matchMs } = this.#options;
    request.phase = "matching"; // At most matchMs long: its deadline timer starts after it.
    request.match = { ...match, untilMs: context.nowMs + matchMs };
    if (vector !== undefined) return this.#askShard(request, vector, context);
    context.ask<EmbedderCommand, Embedded>(
      embedder,
      matchMs,
      (replyTo) => ({ kind: "embedder.embed", requestId, text, replyTo }),
      (outcome) => ({ kind: "request.embedded", requestId, outcome }),
    );
  }

  #onEmbedded({ requestId, outcome }: GotVector, context: Context<RequestMessage>): void {
    const request = this.#requests.get(requestId);
    if (request?.phase !== "matching" || request.match === null) return;
    const { match } = request;
    if (!outcome.ok || outcome.value.kind === "unavailable") {
      const why =
        outcome.ok && outcome.value.kind === "unavailable" ? outcome.value.reason : "late";
      match.says = `no vector: ${why}`;
      return this.#admit(request, context);
    }
    match.vector = outcome.value.vector;
    this.#askShard(request, match.vector, context);
  }

  #askShard(request: Request, vector: Float32Array, context: Context<RequestMessage>): void {
    const { facts, match } = request;
    const { requestId } = facts;
    const leftMs = (match?.untilMs ?? 0) - context.nowMs;
    if (match === null || facts.semantic === undefined || leftMs <= 0) {
      if (match !== null) match.says = "the vector came too late";
      return this.#admit(request, context);
    }
    const { scope, policy } = facts.semantic;
    const { tenant, model = "" } = facts;
    context.ask<CacheMessage, Matched>(
      this.#refs.cache.at(scope),
      leftMs,
      (replyTo) => ({
        kind: "cache.match",
        question: { scope, tenant, model, text: match.text, vector, policy },
        replyTo,
      }),
      (to) => ({ kind: "request.matched", requestId, outcome: to }),
    );
  }

  #onMatched({ requestId, outcome }: GotMatch, context: Context<RequestMessage>): void {
    const request = this.#requests.get(requestId);
    if (request?.phase !== "matching" || request.match === null) return;
    const { match } = request;
    if (!outcome.ok) {
      match.says = "the shard did not answer in time";
      return this.#admit(request, context);
    }
    const matched = outcome.value;
    match.says = matched.says;
    if (matched.kind === "miss") return this.#admit(request, context);
    const { entryId, similarity } = matched;
    match.explored = { entryId, similarity };
    if (matched.kind === "explore") return this.#admit(request, context);
    request.cache = "hit_semantic";
    if (context.random() < this.#options.judgeRatio)
      context.tell(this.#refs.front, { kind: "front.ask_again", requestId, entryId, similarity });
    if (request.clientPresent) {
      const facts = this.#answerFacts(request, context.nowMs, matched.ageMs);
      facts.similarity = similarity;
      facts.entryId = entryId;
      const { answer } = matched;
      context.tell(this.#refs.front, { kind: "front.answer", requestId, answer, facts });
    }
    const { semantic } = request.facts;
    if (semantic !== undefined) {
      const { answer, ageMs } = matched;
      const { policy } = semantic;
      this.#shareHit(request, { answer, entryId, similarity, ageMs, policy }, context);
    }
    this.#end(request, "ok", undefined, context);
  }

  /** Whoever joined this request's flight has asked the same. */
  #shareHit(request: Request, hit: SharedHit, context: Context<RequestMessage>): void {
    const { shard } = request;
    const { cacheKey: key, requestId } = request.facts;
    if (!request.leads || key === undefined || shard === null) return;
    request.leads = false;
    request.awaitsClosing = true;
    const flightId = this.#nameOf(requestId);
    context.ask<CacheMessage, FlightClosed>(
      shard,
      CLOSE_MS,
      (replyTo) => ({ kind: "cache.flight_answered", key, flightId, hit, replyTo }),
      (outcome) => ({ kind: "request.flight_closed", requestId, key, shard, outcome }),
    );
  }

  /** A node has answered: its question is kept, or the entry that it was asked about is judged. */
  #learn(request: Request, answer: StoredAnswer, context: Context<RequestMessage>): void {
    const { facts, match } = request;
    const { judges, semantic, tenant, model = "" } = facts;
    if (judges !== undefined) {
      const to = this.#refs.cache.at(judges.entryId);
      return context.tell(to, { kind: "cache.judge", explored: judges, answer });
    }
    if (match?.vector === undefined || semantic === undefined || !facts.cacheWrite) return;
    const { scope, policy } = semantic;
    const { text, vector, explored } = match;
    context.tell(this.#refs.cache.at(scope), {
      kind: "cache.learn",
      question: { scope, tenant, model, text, vector },
      answer,
      ...(explored === undefined ? {} : { explored }),
      isShadow: policy.mode === "shadow",
      askedMsAgo: context.nowMs - facts.arrivedAtMs,
    });
  }

  // ---- admission ----------------------------------------------------------------------------------------

  #startDeadline({ facts }: Request, context: Context<RequestMessage>): void {
    const { requestId, deadlineAtMs } = facts;
    const afterMs = Math.max(0, deadlineAtMs - context.nowMs);
    context.startTimer(requestId, afterMs, { kind: "request.deadline", requestId });
  }

  #admit(request: Request, context: Context<RequestMessage>): void {
    request.phase = "admitting";
    this.#startDeadline(request, context);
    const { facts } = request;
    context.ask<RateLimiterMessage, AdmitReply>(
      this.#refs.limiter,
      this.#options.admitMs,
      (replyTo) => ({
        kind: "limiter.admit",
        requestId: facts.requestId,
        owner: context.self.path,
        key: facts.limitKey,
        limits: facts.limits,
        model: facts.model ?? "",
        promptTokens: facts.promptTokens,
        ...(facts.maxTokens === undefined ? {} : { maxTokens: facts.maxTokens }),
        expiresAtMs: facts.deadlineAtMs + this.#options.totalMs,
        replyTo,
      }),
      (outcome) => ({
        kind: "request.admitted",
        requestId: facts.requestId,
        key: facts.limitKey,
        outcome,
      }),
    );
  }

  #onAdmitted({ requestId, key, outcome }: Admitted, context: Context<RequestMessage>): void {
    const request = this.#requests.get(requestId);
    if (request === undefined || request.phase !== "admitting") {
      // Ended while it was asked: nobody has settled this grant yet.
      if (outcome.ok && outcome.value.kind === "granted") this.#refund(requestId, key, context);
      return;
    }
    if (!outcome.ok) {
      context.emit({ kind: "request.limiter_silent" });
      request.reserved = true; // It may have reserved and only answered late: settle all the same.
      return this.#choose(request, context);
    }
    const reply = outcome.value;
    request.limits = reply.state;
    this.#rememberLimits(request.facts.limitKey, reply.state);
    if (reply.kind === "refused")
      return this.#refuse(request, reply.code, context, reply.retryAfterMs, undefined, false);
    request.reserved = true;
    this.#choose(request, context);
  }

  #refund(requestId: RequestId, key: string, context: Context<RequestMessage>): void {
    context.tell(this.#refs.limiter, {
      kind: "limiter.settle",
      requestId,
      key,
      promptTokens: 0,
      cachedTokens: 0,
      outputTokens: 0,
    });
  }

  // ---- choosing a node --------------------------------------------------------------------------------

  #choose(request: Request, context: Context<RequestMessage>): void {
    request.phase = "choosing";
    const { facts } = request;
    context.ask<RouterMessage, ChooseReply>(
      this.#refs.router,
      Math.max(0, facts.deadlineAtMs - context.nowMs) + DEADLINE_MARGIN_MS,
      (replyTo) => ({
        kind: "router.choose",
        facts,
        attempt: request.attempt + 1,
        tried: request.tried.slice(),
        owner: context.self.path,
        replyTo,
      }),
      (outcome) => ({ kind: "request.chosen", requestId: facts.requestId, outcome }),
    );
  }

  #onChosen({ requestId, outcome }: Chosen, context: Context<RequestMessage>): void {
    const request = this.#requests.get(requestId);
    if (request === undefined || request.phase !== "choosing") {
      if (outcome.ok && outcome.value.kind === "placed")
        this.#giveBackLease(outcome.value.node, outcome.value.leaseId, context);
      return;
    }
    if (!outcome.ok) {
      if (request.routerCrashes++ < ROUTER_CRASHES_MAX) return this.#choose(request, context);
      return this.#refuse(request, "internal", context);
    }
    const reply = outcome.value;
    request.decisions.push(reply.decision);
    request.queuedMs += reply.queuedMs;
    if (reply.kind === "refused") {
      const last = request.lastFailure;
      // On a retry the client is told what failed, not that nothing else was free.
      if (last === null) return this.#refuse(request, reply.code, context, reply.retryAfterMs);
      return this.#refuse(
        request,
        last.code,
        context,
        last.retryAfterMs ?? reply.retryAfterMs,
        last.detail,
      );
    }
    const { facts } = request;
    request.phase = "running";
    request.attempt++;
    request.started = true;
    request.node = reply.node;
    request.leaseId = reply.leaseId;
    request.leasedAtMs = context.nowMs;
    request.tried.push(reply.node);
    request.attempts.push({
      attempt: request.attempt,
      node: reply.node,
      atMs: context.nowMs,
      outcome: "running",
    });
    // Our own deadline timer comes first: a client's short deadline is not its node's slowness.
    const remainingMs = Math.max(0, facts.deadlineAtMs - context.nowMs) + DEADLINE_MARGIN_MS;
    const totalMs = Math.min(this.#options.totalMs, remainingMs);
    context.tell(this.#refs.upstream, {
      kind: "upstream.start",
      leaseId: reply.leaseId,
      requestId,
      flightId: requestId,
      node: reply.node,
      attempt: request.attempt,
      firstTokenMs: facts.stream ? Math.min(totalMs, this.#firstTokenMs(facts)) : totalMs,
      stallMs: this.#options.stallMs,
      totalMs,
      replyTo: context.self,
    });
  }

  #firstTokenMs(facts: RequestFacts): number {
    const p95Ms = this.#ttft.p95Ms(facts.model ?? "", facts.promptTokens);
    const leastMs = this.#options.firstTokenMs + FIRST_TOKEN_MS_PER_TOKEN * facts.promptTokens;
    return Math.max(leastMs, FIRST_TOKEN_FACTOR * p95Ms);
  }

  #giveBackLease(node: NodeId, leaseId: LeaseId, context: Context<RequestMessage>): void {
    context.tell(this.#refs.node(node), {
      kind: "gpu_node.release",
      leaseId,
      outcome: "cancelled",
      e2eMs: 0,
      decodeMs: 0,
      promptTokens: 0,
      outputTokens: 0,
    });
  }

  // ---- one attempt ------------------------------------------------------------------------------------

  #byLease(leaseId: LeaseId): Request | undefined {
    const request = this.#requests.get(leaseId.slice(0, leaseId.lastIndexOf("#")));
    return request?.leaseId === leaseId ? request : undefined;
  }

  #onFirstToken(leaseId: LeaseId, context: Context<RequestMessage>): void {
    const request = this.#byLease(leaseId);
    if (request === undefined || request.phase !== "running") return;
    request.phase = "streaming";
    const sinceLeaseMs = context.nowMs - request.leasedAtMs;
    request.ttftMs = context.nowMs - request.facts.arrivedAtMs;
    this.#ttft.record(request.facts.model ?? "", request.facts.promptTokens, sinceLeaseMs);
    context.tell(this.#refs.node(request.node), {
      kind: "gpu_node.first_token",
      leaseId,
      ttftMs: sinceLeaseMs,
    });
    this.#commit(request, context);
  }

  /** From here on the flight's bytes flow to its own client and to everyone who joined. */
  #commit(request: Request, context: Context<RequestMessage>): void {
    this.#attach(request, request.node, request.attempt, context);
    const { shard } = request;
    const key = request.facts.cacheKey;
    if (!request.leads || key === undefined || shard === null) return;
    context.tell(shard, {
      kind: "cache.flight_committed",
      key,
      flightId: this.#nameOf(request.facts.requestId),
      node: request.node,
      attempts: request.attempt,
    });
  }

  #attach(
    request: Request,
    node: NodeId,
    attempts: number,
    context: Context<RequestMessage>,
  ): void {
    if (request.attached) return;
    request.attached = true;
    if (!request.clientPresent) return;
    const facts = this.#answerFacts(request, context.nowMs);
    facts.node = node;
    facts.attempts = attempts;
    context.tell(this.#refs.front, {
      kind: "front.attach",
      requestId: request.facts.requestId,
      flightId: this.#idOf(request.flightId) ?? request.flightId,
      facts,
    });
  }

  #onProgress(leaseId: LeaseId, outputTokens: number, context: Context<RequestMessage>): void {
    const request = this.#byLease(leaseId);
    if (request === undefined) return;
    context.tell(this.#refs.node(request.node), {
      kind: "gpu_node.progress",
      leaseId,
      outputTokens,
    });
  }

  #onFinished(
    event: Extract<UpstreamEvent, { kind: "upstream.finished" }>,
    context: Context<RequestMessage>,
  ): void {
    const request = this.#byLease(event.leaseId);
    if (request === undefined) return;
    this.#release(request, "ok", event.usage, event.decodeMs, context);
    if (request.phase === "running") this.#commit(request, context); // It came whole.
    this.#settle(request, event.usage, context);
    if (event.answer !== undefined) this.#learn(request, event.answer, context);
    const stores = event.answer !== undefined && request.leads;
    const reason = event.notStorable ?? request.facts.cacheBypass ?? "not shared";
    const result: FlightResult =
      event.answer === undefined
        ? { kind: "not_stored", reason }
        : { kind: "stored", answer: event.answer };
    this.#endFlight(request, result, context);
    this.#end(request, "ok", undefined, context, {
      usage: event.usage,
      stored: stores,
      ...(stores ? {} : { notStored: reason }),
    });
  }

  #onFailed(
    event: Extract<UpstreamEvent, { kind: "upstream.failed" }>,
    context: Context<RequestMessage>,
  ): void {
    const request = this.#byLease(event.leaseId);
    if (request === undefined) return;
    const rule = failureRules[event.failure];
    const usage = { promptTokens: 0, cachedTokens: 0, outputTokens: event.outputTokens };
    this.#release(request, rule.outcome, usage, 0, context, event);
    if (event.failure === "client_error") return this.#relayClientError(request, context);
    if (event.committed) return this.#failCommitted(request, rule.code, usage, context);
    const failures = (request.failureCounts[event.failure] ?? 0) + 1;
    request.failureCounts[event.failure] = failures;
    request.lastFailure = {
      code: rule.code,
      detail: event.detail,
      ...(event.retryAfterMs === undefined ? {} : { retryAfterMs: event.retryAfterMs }),
    };
    const remainingMs = request.facts.deadlineAtMs - context.nowMs;
    const waitMs =
      rule.wait === "now" ? 0 : backoffMs(request.attempt - 1, this.#options, context.random());
    const worthIt =
      event.failure !== "first_token_timeout" ||
      remainingMs > this.#ttft.p50Ms(request.facts.model ?? "", request.facts.promptTokens);
    if (
      failures > rule.retriesMax ||
      request.attempt >= this.#options.attemptsMax ||
      waitMs >= remainingMs ||
      !worthIt
    ) {
      return this.#refuse(request, rule.code, context, event.retryAfterMs, event.detail);
    }
    request.leaseId = "";
    if (waitMs === 0) return this.#choose(request, context);
    request.phase = "backing_off";
    const { requestId } = request.facts;
    context.startTimer(`retry ${requestId}`, waitMs, { kind: "request.retry_due", requestId });
  }

  #onRetryDue(requestId: RequestId, context: Context<RequestMessage>): void {
    const request = this.#requests.get(requestId);
    if (request === undefined || request.phase !== "backing_off") return;
    this.#choose(request, context);
  }

  /** The node's own 4xx goes to the client, and to everyone who asked the same. */
  #relayClientError(request: Request, context: Context<RequestMessage>): void {
    this.#commit(request, context);
    this.#settle(request, null, context);
    this.#endFlight(request, { kind: "not_stored", reason: "client error" }, context);
    this.#end(request, "refused", "invalid_request", context);
  }

  /** Bytes were out: the data plane has told every reader; only the books remain. */
  #failCommitted(
    request: Request,
    code: ErrorCode,
    usage: Usage,
    context: Context<RequestMessage>,
  ): void {
    this.#settle(request, { ...usage, promptTokens: request.facts.promptTokens }, context);
    this.#endFlight(request, { kind: "not_stored", reason: code }, context);
    this.#end(request, "failed", code, context, { usage });
  }

  #release(
    request: Request,
    outcome: LeaseOutcome,
    usage: Usage,
    decodeMs: number,
    context: Context<RequestMessage>,
    failure?: { status?: number; retryAfterMs?: number; detail: string },
  ): void {
    const fact = request.attempts[request.attempts.length - 1];
    if (fact !== undefined) {
      fact.outcome = outcome;
      if (failure !== undefined) fact.detail = failure.detail;
      if (failure?.status !== undefined) fact.status = failure.status;
    }
    context.tell(this.#refs.node(request.node), {
      kind: "gpu_node.release",
      leaseId: request.leaseId,
      outcome,
      e2eMs: context.nowMs - request.leasedAtMs,
      decodeMs,
      promptTokens: usage.promptTokens,
      outputTokens: usage.outputTokens,
      ...(request.ttftMs === undefined
        ? {}
        : { ttftMs: request.ttftMs - (request.leasedAtMs - request.facts.arrivedAtMs) }),
      ...(failure?.retryAfterMs === undefined ? {} : { retryAfterMs: failure.retryAfterMs }),
      ...(failure === undefined ? {} : { detail: failure.detail }),
    });
  }

  // ---- sharing a flight -------------------------------------------------------------------------------

  #follow(
    request: Request,
    committed: { node: NodeId; attempts: number },
    context: Context<RequestMessage>,
  ): void {
    request.phase = "following";
    request.ttftMs ??= context.nowMs - request.facts.arrivedAtMs;
    this.#attach(request, committed.node, committed.attempts, context);
  }

  #onFlightCommitted(
    news: Extract<FlightNews, { kind: "flight.committed" }>,
    context: Context<RequestMessage>,
  ): void {
    const request = this.#joinedTo(news);
    if (request !== undefined) this.#follow(request, news, context);
  }

  #onFlightEnded(
    news: Extract<FlightNews, { kind: "flight.ended" }>,
    context: Context<RequestMessage>,
  ): void {
    const request = this.#joinedTo(news);
    if (request === undefined || this.#isElsewhere(request.flightId)) return; // `request.relayed` follows.
    this.#end(request, "ok", undefined, context);
  }

  #onFlightAnswered(
    news: Extract<FlightNews, { kind: "flight.answered" }>,
    context: Context<RequestMessage>,
  ): void {
    const request = this.#joinedTo(news);
    if (request === undefined) return;
    const { requestId, hit } = news;
    const { answer, entryId, similarity, ageMs } = hit;
    if (!mayTake(request.facts, hit)) {
      // Another key of the tenant, or another wish: it goes its own way.
      request.cache = "miss";
      request.flightId = requestId;
      return this.#lookUp(request, context);
    }
    request.cache = "hit_semantic";
    if (request.match !== null) {
      request.match.says = "shared the hit of an equal request";
      request.match.explored = { entryId, similarity };
    }
    const facts = this.#answerFacts(request, context.nowMs, ageMs);
    facts.similarity = similarity;
    facts.entryId = entryId;
    context.tell(this.#refs.front, { kind: "front.answer", requestId, answer, facts });
    this.#end(request, "ok", undefined, context);
  }

  #onFlightFailed(
    news: Extract<FlightNews, { kind: "flight.failed" }>,
    context: Context<RequestMessage>,
  ): void {
    const request = this.#joinedTo(news);
    if (request === undefined) return;
    const isElsewhere = this.#isElsewhere(request.flightId);
    if (request.attached) {
      if (isElsewhere) return; // Its bytes may come to their end all the same: `request.relayed` follows.
      return this.#end(request, "failed", news.code, context);
    }
    // A leader that went down with its peer: no node has failed, and someone else may lead.
    if (isElsewhere && news.code === "internal" && request.rejoins++ < REJOINS_MAX)
      return this.#askAnew(request, context);
    this.#refuse(request, news.code, context, news.retryAfterMs, news.message);
  }

  #onFlightPromoted(
    news: Extract<FlightNews, { kind: "flight.promoted" }>,
    context: Context<RequestMessage>,
  ): void {
    const request = this.#byName(news.requestId);
    if (request === undefined || request.phase !== "joined") {
      // Gone: the lead passes on.
      for (const shard of this.#refs.cache.holders(news.key, context.nowMs)) {
        context.tell(shard, {
          kind: "cache.flight_ended",
          key: news.key,
          flightId: news.flightId,
          result: { kind: "failed", code: "client_closed", shared: false },
        });
      }
      return;
    }
    this.#lead(request);
    request.cache = "miss";
    request.flightId = news.flightId;
    this.#admit(request, context);
  }

  #onFlightAbandoned(
    news: Extract<FlightNews, { kind: "flight.abandoned" }>,
    context: Context<RequestMessage>,
  ): void {
    const request = this.#byName(news.requestId);
    if (request === undefined) return;
    request.leads = false; // The cache has closed the flight already.
    this.#abandon(request, "client_closed", context);
  }

  /** The request that this news is for. While it waits, the flight may have passed to another leader. */
  #joinedTo(news: { requestId: RequestId; flightId: RequestId }): Request | undefined {
    const request = this.#byName(news.requestId);
    if (request?.phase === "joined") request.flightId = news.flightId;
    else if (request?.phase !== "following" || request.flightId !== news.flightId) return undefined;
    return request;
  }

  /** Joins or leads where its key is now. */
  #askAnew(request: Request, context: Context<RequestMessage>): void {
    const { requestId } = request.facts;
    context.cancelTimer(requestId);
    request.cache = "miss";
    request.flightId = this.#nameOf(requestId);
    request.attached = false;
    request.ttftMs = undefined;
    this.#lookUp(request, context);
  }

  /** A shard lost its flights: who waits there asks anew; who reads already needs no news to read on. */
  #onCacheEnded(path: string, context: Context<RequestMessage>): void {
    for (const request of this.#requests.values())
      if (request.phase === "joined" && request.shard?.path === path)
        this.#askAnew(request, context);
    // It needs a moment to start again; a watch on nobody ends at once.
    if (this.#refs.cache.all.some((shard) => shard.path === path))
      context.startTimer(`watch ${path}`, WATCH_AGAIN_MS, { kind: "request.watch_due", path });
  }

  #watchCache(shard: ActorRef<CacheMessage>, context: Context<RequestMessage>): void {
    context.watch(shard, ({ path }) => ({ kind: "request.cache_ended", path }));
  }

  #leaveFlight({ facts, shard }: Request, context: Context<RequestMessage>): void {
    const { cacheKey: key, requestId } = facts;
    if (key === undefined || shard === null) return;
    context.tell(shard, { kind: "cache.leave", key, requestId: this.#nameOf(requestId) });
  }

  /**
   * Tells the cache how the flight that this request leads ended. Its bytes are forgotten only once the cache has
   * answered: by then, in this order, every participant has been told to read them.
   */
  #endFlight(request: Request, result: FlightResult, context: Context<RequestMessage>): void {
    const { shard } = request;
    const { cacheKey: key, requestId } = request.facts;
    if (!request.leads || key === undefined || shard === null) return;
    request.leads = false;
    request.awaitsClosing = true;
    this.#askToClose(requestId, key, shard, result, context);
  }

  #askToClose(
    requestId: RequestId,
    key: string,
    shard: ActorRef<CacheMessage>,
    result: FlightResult,
    context: Context<RequestMessage>,
  ): void {
    const flightId = this.#nameOf(requestId);
    context.ask<CacheMessage, FlightClosed>(
      shard,
      CLOSE_MS,
      (replyTo) => ({ kind: "cache.flight_ended", key, flightId, result, replyTo }),
      (outcome) => ({ kind: "request.flight_closed", requestId, key, shard, outcome }),
    );
  }

  #onFlightClosed(
    { requestId, key, shard, outcome }: FlightOver,
    context: Context<RequestMessage>,
  ): void {
    if (outcome.ok || outcome.failure !== "noroute") return this.#forget(requestId, true, context);
    // Too large for a frame: the flight ends without its answer.
    const reason = "too large for its shard, which is on another peer";
    context.tell(shard, {
      kind: "cache.flight_ended",
      key,
      flightId: this.#nameOf(requestId),
      result: { kind: "not_stored", reason },
    });
    this.#forget(requestId, true, context);
  }

  // ---- peers --------------------------------------------------------------------------------------------

  /**
   * How the caches of the cluster know a request. Its id alone would not do: clients may choose it, and two of them
   * the same at two peers. It names the flight that the request leads, too, and says where its bytes are.
   */
  #nameOf(requestId: RequestId): string {
    const { isShared, self } = this.#refs.cache;
    return isShared ? `${self}/${requestId}` : requestId;
  }

  /** The request of this process with that name, if it is of this process. */
  #idOf(name: string): RequestId | undefined {
    const { isShared, self } = this.#refs.cache;
    if (!isShared) return name;
    return name.startsWith(`${self}/`) ? name.slice(self.length + 1) : undefined;
  }

  #byName(name: string): Request | undefined {
    const requestId = this.#idOf(name);
    return requestId === undefined ? undefined : this.#requests.get(requestId);
  }

  /** The bytes of that flight are in another process. */
  #isElsewhere(flightId: string): boolean {
    return this.#idOf(flightId) === undefined;
  }

  /** Flights stay where they are; lookups go by the new view. */
  #onViewChanged({ view }: ViewChanged, context: Context<RequestMessage>): void {
    const { came, gone } = this.#refs.cache.adopt(view, context.nowMs);
    for (const shard of came) this.#watchCache(shard, context);
    for (const shard of gone) {
      context.unwatch(shard);
      context.cancelTimer(`watch ${shard.path}`);
    }
  }

  /**
   * Between this process and that peer messages may have been lost, so neither side counts on the other's flights any
   * more: there, all that this process takes part in is void (the composition root tells its shards, as it did ours).
   */
  #onPeerDown(peer: PeerId, context: Context<RequestMessage>): void {
    for (const request of this.#requests.values()) {
      if (request.shard === null || peerOf(request.shard.path) !== peer) continue;
      if (request.phase === "joined") {
        this.#askAnew(request, context);
      } else if (request.phase === "following") {
        // It reads on; of a flight of this process no news will tell the end.
        if (!this.#isElsewhere(request.flightId)) this.#end(request, "ok", undefined, context);
      } else if (request.leads) {
        request.leads = false;
        // Nobody can join it any more; who reads already is served to the end.
        if (!request.clientPresent && !request.attached)
          this.#abandon(request, "client_closed", context);
      }
    }
  }

  #onRelayed(requestId: RequestId, how: Relayed, context: Context<RequestMessage>): void {
    const request = this.#requests.get(requestId);
    if (request?.phase !== "following") {
      if (how !== "lost") return;
      // Past its deadline: nobody else will answer it.
      const facts: AnswerFacts = { cache: "joined", attempts: 0, queuedMs: 0 };
      context.tell(this.#refs.front, { kind: "front.refuse", requestId, code: "internal", facts });
      return;
    }
    this.#leaveFlight(request, context);
    if (how === "whole") return this.#end(request, "ok", undefined, context);
    if (how === "broken") return this.#end(request, "failed", "stream_broken", context);
    if (request.rejoins++ < REJOINS_MAX) return this.#askAnew(request, context);
    this.#refuse(request, "internal", context);
  }

  // ---- endings ----------------------------------------------------------------------------------------

  #onClientLeft(requestId: RequestId, context: Context<RequestMessage>): void {
    const request = this.#requests.get(requestId);
    if (request === undefined || !request.clientPresent) return;
    request.clientPresent = false;
    if (
      request.phase === "looking" ||
      request.phase === "joined" ||
      request.phase === "following"
    ) {
      this.#leaveFlight(request, context);
      return this.#end(request, "left", "client_closed", context);
    }
    if (request.leads) return this.#leaveFlight(request, context); // `flight.abandoned` may follow.
    this.#abandon(request, "client_closed", context);
  }

  #onDeadline(requestId: RequestId, context: Context<RequestMessage>): void {
    const request = this.#requests.get(requestId);
    if (request === undefined) return;
    if (request.phase === "joined") {
      this.#leaveFlight(request, context);
      return this.#refuse(request, "deadline_exceeded", context);
    }
    if (request.phase === "following") return this.#end(request, "ok", undefined, context);
    const code =
      request.phase === "streaming" ? "upstream_timeout_total" : ("deadline_exceeded" as const);
    this.#abandon(request, code, context);
  }

  /** Stops whatever runs for this request, without an answer of a node. */
  #abandon(request: Request, code: ErrorCode, context: Context<RequestMessage>): void {
    const { requestId } = request.facts;
    const running = request.phase === "running" || request.phase === "streaming";
    if (request.phase === "choosing")
      context.tell(this.#refs.router, { kind: "router.cancel", requestId });
    if (running) {
      context.tell(this.#refs.upstream, { kind: "upstream.abort", leaseId: request.leaseId, code });
      const waitedMs = context.nowMs - request.leasedAtMs;
      // A node that had its full time and said nothing was slow; otherwise it is not to blame.
      const outcome =
        code === "deadline_exceeded" && waitedMs >= this.#options.firstTokenMs
          ? "slow"
          : "cancelled";
      const usage = { promptTokens: 0, cachedTokens: 0, outputTokens: 0 };
      this.#release(request, outcome, usage, 0, context);
    }
    if (request.attached) {
      this.#settle(request, null, context);
      this.#endFlight(request, { kind: "not_stored", reason: code }, context);
      return this.#end(request, code === "client_closed" ? "left" : "failed", code, context);
    }
    this.#refuse(request, code, context);
  }

  /** Ends a request that no byte of an answer has reached. `shared`: its followers fail with it. */
  #refuse(
    request: Request,
    code: ErrorCode,
    context: Context<RequestMessage>,
    retryAfterMs?: number,
    detail?: string,
    shared: boolean = code !== "deadline_exceeded" && code !== "client_closed",
  ): void {
    const retry = retryAfterMs === undefined ? {} : { retryAfterMs };
    const message =
      detail === undefined ? {} : { message: `${errorFacts[code].message} (${detail})` };
    if (request.clientPresent) {
      context.tell(this.#refs.front, {
        kind: "front.refuse",
        requestId: request.facts.requestId,
        code,
        ...retry,
        ...message,
        facts: this.#answerFacts(request, context.nowMs),
      });
    }
    this.#settle(request, null, context);
    this.#endFlight(request, { kind: "failed", code, shared, ...retry, ...message }, context);
    const outcome = !request.clientPresent ? "left" : request.attempt > 0 ? "failed" : "refused";
    this.#end(request, outcome, code, context);
  }

  #end(
    request: Request,
    outcome: RequestRecord["outcome"],
    code: ErrorCode | undefined,
    context: Context<RequestMessage>,
    more: Pick<RequestRecord, "usage" | "stored" | "notStored"> = NOTHING_MORE,
  ): void {
    const { facts } = request;
    this.#requests.delete(facts.requestId);
    if (request.phase !== "looking" && request.phase !== "matching")
      context.cancelTimer(facts.requestId);
    if (request.phase === "backing_off") context.cancelTimer(`retry ${facts.requestId}`);
    if (!request.awaitsClosing) this.#forget(facts.requestId, request.isShared, context);
    const record: RequestRecord = {
      facts,
      outcome: request.clientPresent || outcome !== "ok" ? outcome : "left",
      cache: request.cache,
      attempts: request.attempts,
      decisions: request.decisions,
      queuedMs: request.queuedMs,
      endedMs: context.nowMs - facts.arrivedAtMs,
    };
    // One by one, not by spreading: this is done for every request.
    if (code !== undefined) record.code = code;
    if (facts.cacheBypass !== undefined) record.cacheDetail = facts.cacheBypass;
    if (request.ttftMs !== undefined) record.ttftMs = request.ttftMs;
    if (request.match !== null && request.match.says !== "")
      record.semantic = { says: request.match.says, ...request.match.explored };
    if (more.usage !== undefined) record.usage = more.usage;
    if (more.stored !== undefined) record.stored = more.stored;
    if (more.notStored !== undefined) record.notStored = more.notStored;
    context.emit({ kind: "request.finished", record } as RequestFinished);
  }

  /** Comes to the front after every `front.attach` to this flight. */
  #forget(requestId: RequestId, isShared: boolean, context: Context<RequestMessage>): void {
    context.tell(this.#refs.front, { kind: "front.forget", requestId, isShared });
  }

  #settle(request: Request, usage: Usage | null, context: Context<RequestMessage>): void {
    if (!request.reserved) return;
    request.reserved = false;
    const { facts } = request;
    context.tell(this.#refs.limiter, {
      kind: "limiter.settle",
      requestId: facts.requestId,
      key: facts.limitKey,
      promptTokens: usage?.promptTokens ?? 0,
      cachedTokens: usage?.cachedTokens ?? 0,
      outputTokens: usage?.outputTokens ?? 0,
    });
    if (usage === null) return;
    context.tell(this.#refs.router, {
      kind: "router.used",
      ...(facts.model === undefined ? {} : { model: facts.model }),
      tenant: facts.tenant,
      promptTokens: usage.promptTokens,
      outputTokens: usage.outputTokens,
    });
  }

  // ---- small things -----------------------------------------------------------------------------------

  #answerFacts(request: Request, nowMs: number, ageMs?: number): AnswerFacts {
    const { limitKey, limits: own } = request.facts;
    const limits = limitStateAt(request.limits ?? this.#limitStates.get(limitKey), own, nowMs);
    const answerFacts: AnswerFacts = {
      cache: request.cache,
      attempts: request.attempt,
      queuedMs: request.queuedMs,
    };
    if (ageMs !== undefined) answerFacts.ageMs = ageMs;
    if (limits !== undefined) answerFacts.limits = limits;
    return answerFacts;
  }

  #rememberLimits(key: string, state: LimitState): void {
    if (state.requests === undefined && state.tokens === undefined) return;
    if (this.#limitStates.size >= LIMIT_STATES_MAX && !this.#limitStates.has(key)) {
      const oldest = this.#limitStates.keys().next();
      if (!oldest.done) this.#limitStates.delete(oldest.value);
    }
    this.#limitStates.set(key, state);
  }

  #describe(): RequestDescription {
    const byPhase = Object.fromEntries(phases.map((phase) => [phase, 0])) as Record<Phase, number>;
    for (const request of this.#requests.values()) byPhase[request.phase]++;
    return { byPhase, open: this.#requests.size };
  }
}

/** Whether the policy of a request would have let a hit pass that another one's did. */
function mayTake({ semantic }: RequestFacts, { similarity, policy }: SharedHit): boolean {
  if (semantic === undefined) return false;
  const { mode, similarityMin, errorRateMax, isStrict } = semantic.policy;
  return (
    mode === policy.mode &&
    similarity >= similarityMin &&
    errorRateMax >= policy.errorRateMax &&
    (policy.isStrict || !isStrict)
  );
}

/** The event that carries a request's whole story to the host. */
export type RequestFinished = { kind: "request.finished"; record: RequestRecord };
