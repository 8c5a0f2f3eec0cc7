/**
 * How an error code is answered over HTTP: status, OpenAI's error type, body and headers.
 *
 * The rule behind the statuses: 4xx is the caller's own doing (429: its own limit, or its own queue
 * is full), 503 the pool's or this process's condition and always with `retry-after`, 502 a node
 * that failed, 504 a clock that ran out. OpenAI's clients retry 408, 409, 429 and 5xx unless
 * `x-should-retry` says otherwise, so that header carries the code's `retryable`.
 */
import { type ErrorCode, errorFacts } from "../actors/errors.ts";

/** HTTP side of one code. */
export type HttpErrorFact = {
  readonly status: number;
  /** OpenAI's `error.type`. */
  readonly type: string;
  /**
   * What `retry-after` says when whoever refused does not know better, ms. Absent: no such header.
   */
  readonly retryAfterMs?: number;
};

/** Total: a code without a status does not compile. */
export const httpErrors = {
  invalid_json: { status: 400, type: "invalid_request_error" },
  invalid_request: { status: 400, type: "invalid_request_error" },
  body_too_large: { status: 413, type: "invalid_request_error" },
  headers_too_large: { status: 431, type: "invalid_request_error" },
  body_timeout: { status: 408, type: "invalid_request_error" },
  missing_key: { status: 401, type: "authentication_error" },
  invalid_key: { status: 401, type: "authentication_error" },
  model_not_allowed: { status: 403, type: "permission_error" },
  model_not_found: { status: 404, type: "invalid_request_error" },
  not_found: { status: 404, type: "invalid_request_error" },
  method_not_allowed: { status: 405, type: "invalid_request_error" },
  admin_disabled: { status: 403, type: "permission_error" },
  admin_forbidden: { status: 403, type: "permission_error" },
  // A minute's allowance over sixty seconds: the limiter knows the exact wait and states it.
  rate_limit_requests: { status: 429, type: "requests", retryAfterMs: 1000 },
  rate_limit_tokens: { status: 429, type: "tokens", retryAfterMs: 1000 },
  rate_limit_concurrency: { status: 429, type: "requests", retryAfterMs: 1000 },
  rate_limit_concurrent_tokens: { status: 429, type: "tokens", retryAfterMs: 1000 },
  quota_tokens_per_day: { status: 429, type: "tokens", retryAfterMs: 60_000 },
  // Not 429: no wait makes it pass, and clients would retry a 429.
  request_too_large_for_limit: { status: 413, type: "tokens" },
  // A peer that is gone is replaced within three seconds.
  limit_unavailable: { status: 503, type: "service_unavailable_error", retryAfterMs: 3000 },
  queue_full: { status: 429, type: "requests", retryAfterMs: 1000 },
  pool_overloaded: { status: 503, type: "overloaded_error", retryAfterMs: 1000 },
  no_node: { status: 503, type: "service_unavailable_error", retryAfterMs: 5000 },
  deadline_exceeded: { status: 504, type: "timeout_error" },
  upstream_connect: { status: 502, type: "upstream_error" },
  upstream_failed: { status: 502, type: "upstream_error" },
  upstream_bad_answer: { status: 502, type: "upstream_error" },
  upstream_timeout_first_token: { status: 504, type: "timeout_error" },
  upstream_stalled: { status: 504, type: "timeout_error" },
  upstream_timeout_total: { status: 504, type: "timeout_error" },
  stream_broken: { status: 502, type: "upstream_error" },
  retry_budget_exhausted: { status: 503, type: "overloaded_error", retryAfterMs: 1000 },
  // Never sent: the socket is gone. 499 is what logs and metrics call it, after nginx.
  client_closed: { status: 499, type: "client_closed" },
  shutting_down: { status: 503, type: "service_unavailable_error", retryAfterMs: 1000 },
  internal: { status: 500, type: "server_error" },
} as const satisfies Record<ErrorCode, HttpErrorFact>;

/** OpenAI's error body. */
export type ErrorBody = {
  error: { message: string; type: string; param: string | null; code: ErrorCode };
};

/**
 * The body for `code`. `message` replaces the code's own first sentence (the advice stays); `param`
 * names the request's parameter at fault, as OpenAI does ("messages[2].content").
 */
export function errorBody(code: ErrorCode, message?: string, param?: string): ErrorBody {
  const fact = errorFacts[code];
  const what = sentence(message ?? fact.message);
  return {
    error: {
      message: `${what} ${fact.next}`,
      type: httpErrors[code].type,
      param: param ?? null,
      code,
    },
  };
}

/**
 * The longest wait that OpenAI's clients keep to, ms. Past it they retry after their own short
 * back-off, which can only fail again, so `x-should-retry` is then false.
 */
const waitMsMax = 60_000;

/**
 * Headers that go with `code`: `x-should-retry`, and for codes that come with a wait `retry-after`
 * (whole seconds, rounded up, at least 1) and `retry-after-ms`. `retryAfterMs` is the exact wait,
 * where one is known.
 */
export function errorHeaders(code: ErrorCode, retryAfterMs?: number): Record<string, string> {
  const fact: HttpErrorFact = httpErrors[code];
  const waitMs = fact.retryAfterMs === undefined ? undefined : (retryAfterMs ?? fact.retryAfterMs);
  const worthIt = errorFacts[code].retryable && (waitMs ?? 0) <= waitMsMax;
  const headers: Record<string, string> = { "x-should-retry": String(worthIt) };
  if (waitMs !== undefined) {
    headers["retry-after"] = String(Math.max(1, Math.ceil(waitMs / 1000)));
    headers["retry-after-ms"] = String(Math.max(1, Math.ceil(waitMs)));
  }
  return headers;
}

function sentence(text: string): string {
  return /[.!?]$/.test(text) ? text : `${text}.`;
}
