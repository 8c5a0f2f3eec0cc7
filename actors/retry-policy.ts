/**
 * What follows from a failed attempt: whether another node is tried, after what wait, how the node's circuit
 * counts it, and what the client is told when nothing more can be done. Pure.
 *
 * The table is that of balancing practice: a failure before the first content token moves on, one after it
 * never does; overload is not the node's failure; a client's mistake is nobody's.
 */
import type { UpstreamFailure } from "./edges.ts";
import type { ErrorCode } from "./errors.ts";
import type { LeaseOutcome } from "./protocol.ts";

export type FailureRule = {
  /** How often this kind may be followed by another attempt within one request. */
  retriesMax: number;
  /** "now": the other node is tried at once. "backoff": full jitter first. */
  wait: "now" | "backoff";
  outcome: LeaseOutcome;
  code: ErrorCode;
};

const anyNumber = Number.POSITIVE_INFINITY; // Bounded by attemptsMax.

/** The rule for each kind of failure before the first content token; after it there is no retry. */
export const failureRules = {
  connect: {
    retriesMax: anyNumber,
    wait: "now",
    outcome: "failed_local",
    code: "upstream_connect",
  },
  overloaded: {
    retriesMax: anyNumber,
    wait: "now",
    outcome: "overloaded",
    code: "pool_overloaded",
  },
  unavailable: {
    retriesMax: anyNumber,
    wait: "backoff",
    outcome: "failed_gateway",
    code: "upstream_failed",
  },
  server_error: {
    retriesMax: 1,
    wait: "backoff",
    outcome: "failed_gateway",
    code: "upstream_failed",
  },
  bad_answer: {
    retriesMax: anyNumber,
    wait: "backoff",
    outcome: "failed_gateway",
    code: "upstream_bad_answer",
  },
  broken_stream: {
    retriesMax: anyNumber,
    wait: "backoff",
    outcome: "failed_gateway",
    code: "stream_broken",
  },
  first_token_timeout: {
    retriesMax: 1,
    wait: "now",
    outcome: "slow",
    code: "upstream_timeout_first_token",
  },
  stalled: { retriesMax: 1, wait: "now", outcome: "stalled", code: "upstream_stalled" },
  total_timeout: { retriesMax: 0, wait: "now", outcome: "slow", code: "upstream_timeout_total" },
  client_error: { retriesMax: 0, wait: "now", outcome: "client_error", code: "invalid_request" },
} as const satisfies Record<UpstreamFailure, FailureRule>;

/** Full jitter: uniform in [0, min(max, base·2^retry)), `retry` from 0. */
export function backoffMs(
  retry: number,
  limits: { backoffBaseMs: number; backoffMaxMs: number },
  random: number,
): number {
  let ceiling = limits.backoffBaseMs;
  for (let i = 0; i < retry && ceiling < limits.backoffMaxMs; i++) ceiling *= 2;
  return random * Math.min(ceiling, limits.backoffMaxMs);
}
