import type { ReplyTo } from "../runtime/actor.ts";
import type { ErrorCode } from "./errors.ts";
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
  | { kind: "limiter.owner_restarted"; owner: string }
  | { kind: "limiter.describe"; replyTo: ReplyTo<LimiterDescription> };

export type AdmitReply =
  | { kind: "granted"; reservedTokens: number; state: LimitState }
  | { kind: "refused"; code: ErrorCode; retryAfterMs: number; state: LimitState };

export type LimiterDescription = {
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
};
