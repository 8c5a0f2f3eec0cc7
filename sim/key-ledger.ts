/**
 * One API key's allowance as plain bookkeeping, to hold the limiter to its word: what was admitted never exceeds
 * rate · time + burst, in any span, and nobody is refused who had room. Pure.
 *
 * It is the same promise as the limiter's (`actors/gcra.ts`), kept in another way: floating-point instants, no base
 * that moves, one object per key. A reservation counts from when it was made; what was really used replaces it then,
 * so that an overrun is paid from what has flowed in since.
 */
import type { Limits, RequestFacts, RequestId } from "../actors/protocol.ts";
import type { AdmitReply, RateLimiterMessage } from "../actors/rate-limiter.ts";

type Admit = Extract<RateLimiterMessage, { kind: "limiter.admit" }>;
type Settle = Extract<RateLimiterMessage, { kind: "limiter.settle" }>;

const MINUTE_MS = 60_000;
/** Rounding, in ms of allowance: the limiter counts whole ns. */
const SLACK_MS = 0.01;
/** Output of a request that states none, and of a model that is not known yet; what is refused is at most this large. */
const OUTPUT_TOKENS_ASSUMED = 1024;

/** When everything charged so far will have been paid off. */
class Debt {
  readonly #msPerUnit: number;
  readonly #burst: number;
  #untilMs = Number.NEGATIVE_INFINITY;

  constructor(perMinute: number, burst: number) {
    this.#msPerUnit = MINUTE_MS / perMinute;
    this.#burst = burst;
  }

  get burst(): number {
    return this.#burst;
  }

  /** How far `cost` units are beyond the allowance, ms; at most 0 when they fit. */
  excessMs(cost: number, nowMs: number): number {
    const untilMs = Math.max(nowMs, this.#untilMs) + cost * this.#msPerUnit;
    return untilMs - this.#burst * this.#msPerUnit - nowMs;
  }

  charge(cost: number, nowMs: number): void {
    this.#untilMs = Math.max(nowMs, this.#untilMs) + cost * this.#msPerUnit;
  }

  correct(reserved: number, used: number, nowMs: number): void {
    const untilMs = this.#untilMs + (used - reserved) * this.#msPerUnit;
    this.#untilMs = Math.max(nowMs, untilMs);
  }
}

type Reservation = { tokens: number; expiresAtMs: number };

export class KeyLedger {
  readonly #limits: Limits;
  readonly #cachedTokenWeight: number;
  readonly #requests: Debt | undefined;
  readonly #tokens: Debt | undefined;
  readonly #open = new Map<RequestId, Reservation>();
  #openTokens = 0;

  constructor(limits: Limits, cachedTokenWeight: number) {
    const { requestsPerMinute, requestBurst, tokensPerMinute, tokenBurst } = limits;
    this.#limits = limits;
    this.#cachedTokenWeight = cachedTokenWeight;
    if (requestsPerMinute !== undefined) {
      const burst = requestBurst ?? Math.max(1, Math.floor(requestsPerMinute / 6));
      this.#requests = new Debt(requestsPerMinute, burst);
    }
    if (tokensPerMinute !== undefined) {
      this.#tokens = new Debt(tokensPerMinute, tokenBurst ?? tokensPerMinute);
    }
  }

  /** What is wrong with the limiter's answer, if anything; books it. `nowMs`: the limiter's own time. */
  admitted(
    facts: RequestFacts,
    reply: AdmitReply,
    admit: Admit,
    nowMs: number,
  ): string | undefined {
    if (this.#open.has(facts.requestId)) {
      return reply.kind === "granted" ? undefined : "asked again, and refused what it holds";
    }
    if (reply.kind === "refused") return this.#wronglyRefused(facts, reply.code, nowMs);
    const problem = this.#wronglyGranted(facts, reply.reservedTokens, nowMs);
    const tokens = reply.reservedTokens;
    this.#requests?.charge(1, nowMs);
    this.#tokens?.charge(tokens, nowMs);
    this.#open.set(facts.requestId, { tokens, expiresAtMs: admit.expiresAtMs });
    this.#openTokens += tokens;
    return problem;
  }

  settled(settle: Settle, nowMs: number): void {
    const reservation = this.#close(settle.requestId);
    if (reservation === undefined) return;
    const { promptTokens, cachedTokens, outputTokens } = settle;
    if (promptTokens + outputTokens === 0) return this.#refund(reservation, nowMs);
    const discount = Math.min(promptTokens, cachedTokens) * (1 - this.#cachedTokenWeight);
    const used = Math.ceil(promptTokens - discount + outputTokens);
    this.#tokens?.correct(reservation.tokens, used, nowMs);
  }

  /** The request actor restarted. */
  refundAll(nowMs: number): void {
    for (const requestId of [...this.#open.keys()]) {
      const reservation = this.#close(requestId);
      if (reservation !== undefined) this.#refund(reservation, nowMs);
    }
  }

  /** Drops what nobody settled in time; what was charged stays charged. */
  lapse(nowMs: number): void {
    for (const [requestId, { expiresAtMs }] of this.#open) {
      if (expiresAtMs <= nowMs) this.#close(requestId);
    }
  }

  #close(requestId: RequestId): Reservation | undefined {
    const reservation = this.#open.get(requestId);
    if (reservation === undefined) return undefined;
    this.#open.delete(requestId);
    this.#openTokens -= reservation.tokens;
    return reservation;
  }

  #refund({ tokens }: Reservation, nowMs: number): void {
    this.#requests?.correct(1, 0, nowMs);
    this.#tokens?.correct(tokens, 0, nowMs);
  }

  #wronglyGranted(facts: RequestFacts, tokens: number, nowMs: number): string | undefined {
    const { concurrent, concurrentTokens, tokensPerDay, tokensPerMinute } = this.#limits;
    const isCounted = [concurrentTokens, tokensPerDay, tokensPerMinute].some(
      (n) => n !== undefined,
    );
    if (isCounted && tokens < facts.promptTokens) {
      return `${tokens} tokens are reserved for a prompt of ${facts.promptTokens}`;
    }
    const requestsMs = this.#requests?.excessMs(1, nowMs) ?? 0;
    if (requestsMs > SLACK_MS) return `admitted ${requestsMs} ms of requests beyond the allowance`;
    const tokensMs = this.#tokens?.excessMs(tokens, nowMs) ?? 0;
    if (tokensMs > SLACK_MS) return `admitted ${tokensMs} ms of tokens beyond the allowance`;
    if (this.#open.size >= (concurrent ?? Number.POSITIVE_INFINITY)) {
      return `admitted beside ${this.#open.size} in flight of at most ${concurrent}`;
    }
    if (this.#openTokens + tokens > (concurrentTokens ?? Number.POSITIVE_INFINITY)) {
      return `admitted ${tokens} tokens beside ${this.#openTokens} of at most ${concurrentTokens}`;
    }
    return undefined;
  }

  #wronglyRefused(facts: RequestFacts, code: string, nowMs: number): string | undefined {
    const { concurrent } = this.#limits;
    switch (code) {
      case "rate_limit_requests":
        if (this.#requests === undefined) return "refused by a limit that the key has not";
        return this.#requests.excessMs(1, nowMs) < -SLACK_MS
          ? "refused for its requests, and has room for one"
          : undefined;
      case "rate_limit_tokens": {
        if (this.#tokens === undefined) return "refused by a limit that the key has not";
        // What it would have reserved is not told; it is at most this.
        const most =
          facts.promptTokens +
          Math.min(facts.maxTokens ?? OUTPUT_TOKENS_ASSUMED, OUTPUT_TOKENS_ASSUMED);
        return this.#tokens.excessMs(most, nowMs) < -SLACK_MS
          ? `refused for its tokens, and has room for ${most}`
          : undefined;
      }
      case "rate_limit_concurrency":
        return this.#open.size < (concurrent ?? Number.POSITIVE_INFINITY)
          ? `refused beside ${this.#open.size} in flight of ${concurrent}`
          : undefined;
      default:
        return undefined;
    }
  }
}
