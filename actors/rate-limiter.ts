/**
 * What each API key may still use: requests and tokens a minute, requests and tokens in flight, tokens a day.
 *
 *   admit ──▶ reserved ──▶ settled     with what was used; all zero = refunded, as if it had never been
 *     │           ├──────▶ refunded    its owner restarted
 *     ▼           └──────▶ lapsed      nobody settled it in time: what was charged stays charged
 *  refused
 *
 * A request is charged before it runs, an estimate of its tokens with it, and corrected afterwards; an overrun
 * becomes a debt that delays the next. All limits of a key are checked before any is charged, so a refusal
 * leaves nothing behind, and it names the first limit that failed, in the order above; a request that could
 * never pass is told so first. A key without limits passes through, its requests only counted.
 *
 * The estimate is the prompt and the 90th percentile of what this key's answers from this model took of late,
 * or max_tokens where that is less: clients ask for far more than they use, and to reserve all of it would
 * refuse what fits. A guess is never the reason why a request is too large.
 *
 * "A day" is 24 hours from the first use after the last such day: monotonic time knows no midnight. All of it
 * is lost on a restart; keys then start whole. (Asking here once per request keeps one owner per key and no
 * copies to reconcile; leases of allowance to several askers were left out until one process is not enough.)
 */

import { type Actor, assert, type Context, type ReplyTo, unreachable } from "../runtime/actor.ts";
import { InflightMap } from "../runtime/inflight-map.ts";
import type { ErrorCode } from "./errors.ts";
import { Gcra } from "./gcra.ts";
import { requestBurstOf, tokenBurstOf } from "./limit-state.ts";
import { LruList, type LruNode } from "./lru-list.ts";
import { OutputQuantile } from "./output-quantile.ts";
import type { LimitState, Limits, RequestId } from "./protocol.ts";

export type RateLimiterMessage =
  /** Reserves one request and an estimate of its tokens, or refuses with the first limit that fails. */
  | {
      kind: "limiter.admit";
      requestId: RequestId;
      owner: string;
      key: string;
      limits: Limits;
      model: string;
      promptTokens: number;
      maxTokens?: number;
      /** The reservation lapses then, should nobody settle it. */
      expiresAtMs: number;
      /**
       * Counts up when this limiter comes to keep a key that another kept until lately: at the first request with
       * a higher one than before, no more than half of the key's bursts is left. Absent: it always kept it.
       */
      takeover?: number;
      replyTo: ReplyTo<AdmitReply>;
    }
  /** Ends a reservation with what was used; all zero refunds it (a request that reached no node). */
  | {
      kind: "limiter.settle";
      requestId: RequestId;
      key: string;
      promptTokens: number;
      cachedTokens: number;
      outputTokens: number;
    }
  /** Refunds whatever that owner holds. */
  | { kind: "limiter.owner_restarted"; owner: string }
  /** Ends whatever that owner holds; what was charged stays, for its requests may be running. */
  | { kind: "limiter.owner_lost"; owner: string }
  | { kind: "limiter.describe"; replyTo: ReplyTo<LimiterDescription> };

/** `state`: after this request. */
export type AdmitReply =
  /** `reservedTokens`: 0 for a key without a token limit. */
  | { kind: "granted"; reservedTokens: number; state: LimitState }
  /** `retryAfterMs`: when it may pass, so far as known; 0 where it never will. */
  | { kind: "refused"; code: ErrorCode; retryAfterMs: number; state: LimitState };

export type LimiterDescription = {
  /** Those used last, 1,000 at most. */
  keys: readonly {
    key: string;
    inflight: number;
    reservedTokens: number;
    state: LimitState;
    granted: number;
    refused: number;
    tokensToday: number;
  }[];
  reservations: number;
  /** All that are known, also beyond the 1,000. */
  keysKnown: number;
  /** Counts since the start. Reservations that nobody settled. */
  lapses: number;
  /** Settlements of no reservation: settled before, lapsed, or never made. */
  stale: number;
  /** Idle keys that were forgotten. */
  keysForgotten: number;
  /** Requests refused because a table here was full. */
  overflows: number;
};

/** Rare things, as events. */
export type LimiterEvent = { kind: "limiter.reservations_lapsed"; count: number };

type LapseDue = { kind: "limiter.lapse_due" };
type OwnMessage = RateLimiterMessage | LapseDue;
type Admit = Extract<RateLimiterMessage, { kind: "limiter.admit" }>;
type Settle = Extract<RateLimiterMessage, { kind: "limiter.settle" }>;

export type RateLimiterOptions = {
  /** What a prompt token counts that the engine found in its prefix cache, 0..1. */
  cachedTokenWeight: number;
  /** Keys known at once, 1…; a further one is refused unless an idle one can be forgotten. */
  keysMax: number;
  /** Requests in flight over all keys, 1…; more are refused. */
  reservationsMax: number;
};

export const limiterDefaults: Readonly<RateLimiterOptions> = {
  cachedTokenWeight: 0.25,
  keysMax: 100_000, // About 1 KiB each, with limits.
  reservationsMax: 1_000_000, // As many as a process may have connections.
};

const MINUTE_MS = 60_000;
const DAY_MS = 86_400_000;
/** Output of a request that does not state it, and of a model not met often enough to know better. */
const OUTPUT_TOKENS_ASSUMED = 1024;
/** A request's tokens are cut to this, so that no sum of them leaves the whole numbers. */
const TOKENS_MAX = 1e12;
/** A request's time, until one of its key's has ended. */
const DURATION_MS_ASSUMED = 1000;
const DURATION_WEIGHT = 0.2;
const RETRY_MS_MIN = 50;
const RETRY_MS_MAX = 60_000;
/** Least time between two searches for lapsed reservations: so much later than stated they may lapse. */
const LAPSE_MS_MIN = 1000;
/** A key unused for so long goes when a new one comes. */
const KEY_IDLE_MS = 3_600_000;
/** Keys looked at to make room for a new one. */
const KEYS_PROBED = 32;
const KEYS_DESCRIBED = 1000;
/** Of a burst, for a key that was kept elsewhere until lately. */
const TAKEOVER_SHARE = 0.5;
/** Settled reservations kept for reuse, so that requests allocate none. */
const SPARE_MAX = 1024;
const NOT_CHARGED = -1;

interface Key extends LruNode<Key> {
  readonly name: string;
  limits: Limits;
  isLimited: boolean;
  /** Made when first limited, then kept: a limit that comes back finds what is still to pay off. */
  requests: Gcra | null;
  tokens: Gcra | null;
  inflight: number;
  reservedTokens: number;
  /** Reserved and used since the day began; void from `dayEndsAtMs` on. */
  dayTokens: number;
  dayEndsAtMs: number;
  outputs: OutputQuantile | null;
  /** EWMA from admission to settlement; 0 = none yet. */
  durationMs: number;
  lastUsedAtMs: number;
  /** The last one that a request told of. */
  takeover: number;
  granted: number;
  refused: number;
}

type Reservation = {
  /** Null only while it is a spare. */
  key: Key | null;
  owner: string;
  model: string;
  tokens: number;
  /** What was charged to `key.requests` and `key.tokens`, or NOT_CHARGED. */
  requestNs: number;
  tokensNs: number;
  /** Names the day that it was charged to. */
  dayEndsAtMs: number;
  admittedAtMs: number;
  expiresAtMs: number;
};

/** The same answer for every request of a key without limits; its time says nothing. */
const UNLIMITED: AdmitReply = { kind: "granted", reservedTokens: 0, state: { atMs: 0 } };

export class RateLimiterActor implements Actor<OwnMessage> {
  readonly #options: RateLimiterOptions;
  readonly #keys = new Map<string, Key>();
  readonly #order = new LruList<Key>();
  readonly #reservations = new InflightMap<RequestId, Reservation>();
  readonly #spare: Reservation[] = [];
  /** When the timer is due; Infinity = it does not run. */
  #lapseDueAtMs = Number.POSITIVE_INFINITY;
  #lapses = 0;
  #stale = 0;
  #keysForgotten = 0;
  #overflows = 0;

  constructor(options: RateLimiterOptions) {
    const { cachedTokenWeight } = options;
    assert(cachedTokenWeight >= 0 && cachedTokenWeight <= 1, "cachedTokenWeight must be in 0..1");
    assert(options.keysMax >= 1, "keysMax must be at least 1");
    assert(options.reservationsMax >= 1, "reservationsMax must be at least 1");
    this.#options = options;
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
        return this.#onOwnerLost(message.owner, context);
      case "limiter.describe":
        return context.reply(message.replyTo, this.#describe(context.nowMs));
      case "limiter.lapse_due":
        return this.#onLapseDue(context);
      default:
        return unreachable(message);
    }
  }

  // ---- admitting ----------------------------------------------------------------------------------------

  #onAdmit(admit: Admit, context: Context<OwnMessage>): void {
    const { nowMs } = context;
    const earlier = this.#reservations.get(admit.requestId);
    if (earlier !== undefined && earlier.key !== null) {
      // Asked twice: charged once.
      const state = stateOf(earlier.key, nowMs);
      const reply: AdmitReply = { kind: "granted", reservedTokens: earlier.tokens, state };
      return context.reply(admit.replyTo, reply);
    }
    const key = this.#keys.get(admit.key) ?? this.#newKey(admit.key, nowMs);
    if (key === null || this.#reservations.size >= this.#options.reservationsMax) {
      this.#overflows++;
      return refuse(admit.replyTo, "pool_overloaded", RETRY_MS_MAX, { atMs: nowMs }, context);
    }
    this.#order.touch(key);
    key.lastUsedAtMs = nowMs;
    const changed = key.limits !== admit.limits;
    if (changed) adoptLimits(key, admit.limits);
    // Only in a cluster, where the same key has its whole limits at one time and a share of them at another.
    if (key.takeover > 0 && changed) capDebt(key, nowMs);
    if ((admit.takeover ?? 0) > key.takeover) takeOver(key, admit.takeover ?? 0, nowMs);
    if (!key.isLimited) {
      this.#reserve(key, admit, 0, context);
      return context.reply(admit.replyTo, UNLIMITED);
    }
    this.#admitLimited(key, admit, context);
  }

  #admitLimited(key: Key, admit: Admit, context: Context<OwnMessage>): void {
    const { nowMs } = context;
    const { limits } = key;
    const usual = key.outputs?.p90(admit.model);
    const tokens = estimateTokens(limits, admit, usual, largestRequest(key));
    const today = nowMs < key.dayEndsAtMs ? key.dayTokens : 0;
    const requestsWaitMs =
      limits.requestsPerMinute === undefined ? 0 : (key.requests?.waitMs(1, nowMs) ?? 0);
    const tokensWaitMs =
      limits.tokensPerMinute === undefined ? 0 : (key.tokens?.waitMs(tokens, nowMs) ?? 0);
    let code: ErrorCode | null = null;
    let retryAfterMs = 0;
    if (tokens > largestRequest(key)) {
      code = "request_too_large_for_limit";
    } else if (requestsWaitMs > 0) {
      code = "rate_limit_requests";
      retryAfterMs = requestsWaitMs;
    } else if (tokensWaitMs > 0) {
      code = "rate_limit_tokens";
      retryAfterMs = tokensWaitMs;
    } else if (key.inflight >= (limits.concurrent ?? Number.POSITIVE_INFINITY)) {
      code = "rate_limit_concurrency";
      retryAfterMs = drainMs(key, key.inflight + 1 - (limits.concurrent ?? 0), key.inflight);
    } else if (
      key.reservedTokens + tokens >
      (limits.concurrentTokens ?? Number.POSITIVE_INFINITY)
    ) {
      code = "rate_limit_concurrent_tokens";
      const over = key.reservedTokens + tokens - (limits.concurrentTokens ?? 0);
      retryAfterMs = drainMs(key, over, key.reservedTokens);
    } else if (today + tokens > (limits.tokensPerDay ?? Number.POSITIVE_INFINITY)) {
      code = "quota_tokens_per_day";
      retryAfterMs = key.dayEndsAtMs - nowMs;
    }
    if (code !== null) {
      key.refused++;
      return refuse(admit.replyTo, code, retryAfterMs, stateOf(key, nowMs), context);
    }
    this.#reserve(key, admit, tokens, context);
    const state = stateOf(key, nowMs);
    context.reply<AdmitReply>(admit.replyTo, { kind: "granted", reservedTokens: tokens, state });
  }

  /** Charges every limit of the key: none of them refuses. */
  #reserve(key: Key, admit: Admit, tokens: number, context: Context<OwnMessage>): void {
    const { nowMs } = context;
    const reservation = this.#spare.pop() ?? newReservation();
    reservation.key = key;
    reservation.owner = admit.owner;
    reservation.model = admit.model;
    reservation.tokens = tokens;
    reservation.requestNs = NOT_CHARGED;
    reservation.tokensNs = NOT_CHARGED;
    if (key.limits.requestsPerMinute !== undefined && key.requests !== null) {
      const waitMs = key.requests.reserve(1, nowMs);
      assert(waitMs === 0, "the requests of the minute were checked in this turn");
      reservation.requestNs = key.requests.spanNs(1);
    }
    if (key.limits.tokensPerMinute !== undefined && key.tokens !== null) {
      const waitMs = key.tokens.reserve(tokens, nowMs);
      assert(waitMs === 0, "the tokens of the minute were checked in this turn");
      reservation.tokensNs = key.tokens.spanNs(tokens);
    }
    if (nowMs >= key.dayEndsAtMs) {
      key.dayEndsAtMs = nowMs + DAY_MS;
      key.dayTokens = 0;
    }
    reservation.dayEndsAtMs = key.dayEndsAtMs;
    reservation.admittedAtMs = nowMs;
    reservation.expiresAtMs = admit.expiresAtMs;
    key.dayTokens += tokens;
    key.reservedTokens += tokens;
    key.inflight++;
    key.granted++;
    this.#reservations.set(admit.requestId, reservation);
    this.#armLapse(admit.expiresAtMs, context);
  }

  // ---- ending a reservation -----------------------------------------------------------------------------

  #onSettle(settle: Settle, context: Context<OwnMessage>): void {
    const reservation = this.#reservations.get(settle.requestId);
    if (reservation === undefined) {
      this.#stale++;
      return;
    }
    const outputTokens = wholeTokens(settle.outputTokens);
    if (wholeTokens(settle.promptTokens) + outputTokens === 0)
      return this.#refund(settle.requestId, reservation, context.nowMs);
    const key = this.#release(settle.requestId, reservation, context.nowMs);
    const usedTokens = tokensUsed(settle, this.#options.cachedTokenWeight);
    correctTokens(key, reservation, usedTokens, context.nowMs);
    if (reservation.tokens > 0) {
      key.outputs ??= new OutputQuantile();
      key.outputs.record(reservation.model, outputTokens);
    }
    this.#recycle(reservation);
  }

  /** Takes back all that was charged. */
  #refund(requestId: RequestId, reservation: Reservation, nowMs: number): void {
    const key = this.#release(requestId, reservation, nowMs);
    if (reservation.requestNs !== NOT_CHARGED)
      key.requests?.settle(reservation.requestNs, 0, nowMs);
    correctTokens(key, reservation, 0, nowMs);
    this.#recycle(reservation);
  }

  /** Ends the flight of a reservation; what it has charged to the minute and the day stays. */
  #release(requestId: RequestId, reservation: Reservation, nowMs: number): Key {
    const { key } = reservation;
    assert(key !== null, "a reservation in the table has a key");
    this.#reservations.delete(requestId);
    key.inflight--;
    key.reservedTokens -= reservation.tokens;
    assert(key.inflight >= 0 && key.reservedTokens >= 0, "nothing is given back twice");
    const durationMs = nowMs - reservation.admittedAtMs;
    key.durationMs =
      key.durationMs === 0
        ? durationMs
        : key.durationMs + DURATION_WEIGHT * (durationMs - key.durationMs);
    return key;
  }

  #recycle(reservation: Reservation): void {
    reservation.key = null;
    if (this.#spare.length < SPARE_MAX) this.#spare.push(reservation);
  }

  #onOwnerRestarted(owner: string, context: Context<OwnMessage>): void {
    for (const [requestId, reservation] of this.#reservations)
      if (reservation.owner === owner) this.#refund(requestId, reservation, context.nowMs);
  }

  #onOwnerLost(owner: string, context: Context<OwnMessage>): void {
    let count = 0;
    for (const [requestId, reservation] of this.#reservations) {
      if (reservation.owner !== owner) continue;
      count++;
      this.#release(requestId, reservation, context.nowMs);
      this.#recycle(reservation);
    }
    this.#noteLapses(count, context);
  }

  #noteLapses(count: number, context: Context<OwnMessage>): void {
    if (count === 0) return;
    this.#lapses += count;
    const event: LimiterEvent = { kind: "limiter.reservations_lapsed", count };
    context.emit(event);
  }

  #armLapse(expiresAtMs: number, context: Context<OwnMessage>): void {
    const dueAtMs = Math.max(expiresAtMs, context.nowMs + LAPSE_MS_MIN);
    if (dueAtMs >= this.#lapseDueAtMs) return; // Requests end in time: this timer is hardly ever moved.
    this.#lapseDueAtMs = dueAtMs;
    context.startTimer("lapse", dueAtMs - context.nowMs, { kind: "limiter.lapse_due" });
  }

  #onLapseDue(context: Context<OwnMessage>): void {
    this.#lapseDueAtMs = Number.POSITIVE_INFINITY;
    let count = 0;
    let nextAtMs = Number.POSITIVE_INFINITY;
    for (const [requestId, reservation] of this.#reservations) {
      if (reservation.expiresAtMs > context.nowMs) {
        nextAtMs = Math.min(nextAtMs, reservation.expiresAtMs);
        continue;
      }
      count++;
      this.#release(requestId, reservation, context.nowMs);
      this.#recycle(reservation);
    }
    if (this.#reservations.size > 0) this.#armLapse(nextAtMs, context);
    this.#noteLapses(count, context);
  }

  // ---- keys -----------------------------------------------------------------------------------------------

  /** Null when the table is full of keys that must not be forgotten. */
  #newKey(name: string, nowMs: number): Key | null {
    if (!this.#makeRoom(nowMs)) return null;
    const key: Key = {
      name,
      limits: NO_LIMITS,
      isLimited: false,
      requests: null,
      tokens: null,
      inflight: 0,
      reservedTokens: 0,
      dayTokens: 0,
      dayEndsAtMs: Number.NEGATIVE_INFINITY,
      outputs: null,
      durationMs: 0,
      lastUsedAtMs: nowMs,
      takeover: 0,
      granted: 0,
      refused: 0,
      hotter: null,
      colder: null,
    };
    this.#keys.set(name, key);
    this.#order.addHottest(key);
    return key;
  }

  /** Forgets keys long idle, and when the table is full others too, of those unused longest. */
  #makeRoom(nowMs: number): boolean {
    const { keysMax } = this.#options;
    for (let probed = 0; probed < KEYS_PROBED; probed++) {
      const key = this.#order.coldest;
      if (key === null) break;
      const isIdle = nowMs - key.lastUsedAtMs >= KEY_IDLE_MS;
      if (!isIdle && this.#keys.size < keysMax) break;
      if (isForgettable(key, nowMs)) {
        this.#keysForgotten++;
        this.#keys.delete(key.name);
        this.#order.remove(key);
      } else {
        this.#order.touch(key); // Out of the way of those behind it; its turn comes again.
      }
    }
    return this.#keys.size < keysMax;
  }

  #describe(nowMs: number): LimiterDescription {
    const keys: LimiterDescription["keys"][number][] = [];
    let key = this.#order.hottest;
    for (; key !== null && keys.length < KEYS_DESCRIBED; key = key.colder) {
      keys.push({
        key: key.name,
        inflight: key.inflight,
        reservedTokens: key.reservedTokens,
        state: stateOf(key, nowMs),
        granted: key.granted,
        refused: key.refused,
        tokensToday: nowMs < key.dayEndsAtMs ? key.dayTokens : 0,
      });
    }
    return {
      keys,
      reservations: this.#reservations.size,
      keysKnown: this.#keys.size,
      lapses: this.#lapses,
      stale: this.#stale,
      keysForgotten: this.#keysForgotten,
      overflows: this.#overflows,
    };
  }
}

const NO_LIMITS: Limits = {};

function refuse(
  replyTo: ReplyTo<AdmitReply>,
  code: ErrorCode,
  retryAfterMs: number,
  state: LimitState,
  context: Context<OwnMessage>,
): void {
  context.reply<AdmitReply>(replyTo, { kind: "refused", code, retryAfterMs, state });
}

function newReservation(): Reservation {
  return {
    key: null,
    owner: "",
    model: "",
    tokens: 0,
    requestNs: NOT_CHARGED,
    tokensNs: NOT_CHARGED,
    dayEndsAtMs: 0,
    admittedAtMs: 0,
    expiresAtMs: 0,
  };
}

/** Limits come with every request: after a reload they may be others. What is still to pay off stays. */
function adoptLimits(key: Key, limits: Limits): void {
  const { requestsPerMinute, tokensPerMinute } = limits;
  key.limits = limits;
  key.isLimited = isLimited(limits);
  const requestBurst = requestBurstOf(limits);
  if (requestsPerMinute !== undefined && requestBurst !== undefined) {
    if (key.requests === null) key.requests = new Gcra(requestsPerMinute, MINUTE_MS, requestBurst);
    else key.requests.configure(requestsPerMinute, MINUTE_MS, requestBurst);
  }
  const tokenBurst = tokenBurstOf(limits);
  if (tokensPerMinute !== undefined && tokenBurst !== undefined) {
    if (key.tokens === null) key.tokens = new Gcra(tokensPerMinute, MINUTE_MS, tokenBurst);
    else key.tokens.configure(tokensPerMinute, MINUTE_MS, tokenBurst);
  }
}

/** What the key's last keeper granted lately is not known: with half a burst, two keepers give no more than one and a half. */
function takeOver(key: Key, takeover: number, nowMs: number): void {
  key.takeover = takeover;
  key.requests?.cut(TAKEOVER_SHARE, nowMs);
  key.tokens?.cut(TAKEOVER_SHARE, nowMs);
}

function capDebt({ requests, tokens }: Key, nowMs: number): void {
  requests?.capDebt(nowMs);
  tokens?.capDebt(nowMs);
}

function countsTokens(limits: Limits): boolean {
  return (
    limits.tokensPerMinute !== undefined ||
    limits.concurrentTokens !== undefined ||
    limits.tokensPerDay !== undefined
  );
}

/** Tokens of the largest request that could ever pass. */
function largestRequest({ limits, tokens }: Key): number {
  return Math.min(
    limits.tokensPerMinute === undefined || tokens === null
      ? Number.POSITIVE_INFINITY
      : tokens.burst,
    limits.concurrentTokens ?? Number.POSITIVE_INFINITY,
    limits.tokensPerDay ?? Number.POSITIVE_INFINITY,
  );
}

/**
 * Tokens to reserve for a request, 0 where none are counted. @param usual what its answers took of late, if known.
 * @param largest tokens of the largest request that could ever pass
 */
export function estimateTokens(
  limits: Limits,
  { promptTokens, maxTokens }: { promptTokens: number; maxTokens?: number },
  usual: number | undefined,
  largest: number,
): number {
  if (!countsTokens(limits)) return 0;
  const prompt = wholeTokens(promptTokens);
  const output = usual ?? OUTPUT_TOKENS_ASSUMED;
  if (maxTokens !== undefined) return prompt + Math.min(wholeTokens(maxTokens), output);
  const tokens = prompt + Math.min(OUTPUT_TOKENS_ASSUMED, output);
  // The client has said nothing of its output: what we assume must not make its request too large.
  return Math.max(prompt, Math.min(tokens, largest));
}

/** Tokens that a request has used, as limits count them. */
export function tokensUsed(
  usage: { promptTokens: number; cachedTokens: number; outputTokens: number },
  cachedTokenWeight: number,
): number {
  const promptTokens = wholeTokens(usage.promptTokens);
  const cachedTokens = Math.min(promptTokens, wholeTokens(usage.cachedTokens));
  const discount = cachedTokens * (1 - cachedTokenWeight);
  return Math.ceil(promptTokens - discount + wholeTokens(usage.outputTokens));
}

/** Whether anything is limited at all. */
export function isLimited(limits: Limits): boolean {
  const { requestsPerMinute, concurrent } = limits;
  return requestsPerMinute !== undefined || concurrent !== undefined || countsTokens(limits);
}

/** Whole and never negative; a count that is none is 0. */
function wholeTokens(tokens: number): number {
  return tokens > 0 ? Math.min(TOKENS_MAX, Math.ceil(tokens)) : 0;
}

/** Puts what was used in place of what was reserved. A day that has ended meanwhile is not reopened. */
function correctTokens(
  key: Key,
  reservation: Reservation,
  usedTokens: number,
  nowMs: number,
): void {
  if (reservation.tokensNs !== NOT_CHARGED)
    key.tokens?.settle(reservation.tokensNs, usedTokens, nowMs);
  if (reservation.dayEndsAtMs === key.dayEndsAtMs) key.dayTokens += usedTokens - reservation.tokens;
}

/** How long until `amount` of the `held` is given back, were all of it to end within one usual request. */
function drainMs(key: Key, amount: number, held: number): number {
  const durationMs = key.durationMs === 0 ? DURATION_MS_ASSUMED : key.durationMs;
  const waitMs = (durationMs * amount) / Math.max(1, held);
  return Math.min(RETRY_MS_MAX, Math.max(RETRY_MS_MIN, Math.ceil(waitMs)));
}

/** Nothing but what it has learned of its answers' lengths would be different if it came back as a new key. */
function isForgettable(key: Key, nowMs: number): boolean {
  if (key.inflight > 0) return false;
  if (key.requests !== null && key.requests.resetMs(nowMs) > 0) return false;
  if (key.tokens !== null && key.tokens.resetMs(nowMs) > 0) return false;
  if (key.limits.tokensPerDay === undefined) return true;
  return nowMs >= key.dayEndsAtMs || key.dayTokens === 0;
}

function stateOf({ limits, requests, tokens }: Key, nowMs: number): LimitState {
  const state: LimitState = { atMs: nowMs };
  if (limits.requestsPerMinute !== undefined && requests !== null)
    state.requests = partOf(limits.requestsPerMinute, requests, nowMs);
  if (limits.tokensPerMinute !== undefined && tokens !== null)
    state.tokens = partOf(limits.tokensPerMinute, tokens, nowMs);
  return state;
}

function partOf(limit: number, gcra: Gcra, nowMs: number): NonNullable<LimitState["requests"]> {
  return { limit, remaining: gcra.remaining(nowMs), resetMs: gcra.resetMs(nowMs) };
}
