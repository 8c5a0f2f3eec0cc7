/**
 * What a key's allowance is, for headers: bursts by default, and what a state once stated has become since. Pure.
 */
import type { LimitState, Limits } from "./protocol.ts";

/** Requests that may come at once: a sixth of a minute's, at least 1. Undefined without such a limit. */
export function requestBurstOf(limits: Limits): number | undefined {
  const { requestBurst, requestsPerMinute } = limits;
  if (requestsPerMinute === undefined) return undefined;
  return requestBurst ?? Math.max(1, Math.floor(requestsPerMinute / 6));
}

/** Tokens that may come at once: a minute's. Undefined without such a limit. */
export function tokenBurstOf({ tokenBurst, tokensPerMinute }: Limits): number | undefined {
  return tokensPerMinute === undefined ? undefined : (tokenBurst ?? tokensPerMinute);
}

/**
 * The allowance at `nowMs`: a bucket refills evenly until it is whole, so what was `stated` earlier tells what it is
 * now, and a key of which nothing was stated is whole. Undefined for a key without limits per minute.
 */
export function limitStateAt(
  stated: LimitState | undefined,
  limits: Limits,
  nowMs: number,
): LimitState | undefined {
  const requests = partAt(
    stated?.requests,
    limits.requestsPerMinute,
    requestBurstOf(limits),
    nowMs - (stated?.atMs ?? nowMs),
  );
  const tokens = partAt(
    stated?.tokens,
    limits.tokensPerMinute,
    tokenBurstOf(limits),
    nowMs - (stated?.atMs ?? nowMs),
  );
  if (requests === undefined && tokens === undefined) return undefined;
  return {
    atMs: nowMs,
    ...(requests === undefined ? {} : { requests }),
    ...(tokens === undefined ? {} : { tokens }),
  };
}

type Part = NonNullable<LimitState["requests"]>;

function partAt(
  stated: Part | undefined,
  limit: number | undefined,
  burst: number | undefined,
  elapsedMs: number,
): Part | undefined {
  if (limit === undefined || burst === undefined) return undefined;
  if (stated === undefined || elapsedMs >= stated.resetMs) {
    return { limit, remaining: stated?.resetMs === 0 ? stated.remaining : burst, resetMs: 0 };
  }
  const refilled = ((burst - stated.remaining) * elapsedMs) / stated.resetMs;
  return {
    limit,
    remaining: Math.min(burst, Math.floor(stated.remaining + refilled)),
    resetMs: stated.resetMs - elapsedMs,
  };
}
