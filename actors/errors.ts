/**
 * Every refusal and failure that Headrace can answer: the one table of codes.
 *
 * A code says what happened in words that do not depend on how it is carried; transport/http-errors.ts gives
 * each its HTTP status. Nothing here ever holds text of a request, an answer or a key.
 */

/** What a code means to the one who receives it. */
export type ErrorFact = {
  /** What happened: one sentence. */
  readonly message: string;
  /** True when the same request, sent again later and unchanged, may succeed. */
  readonly retryable: boolean;
  /** What the caller should do next: one sentence. */
  readonly next: string;
};

/** Codes in the order in which a request meets them: reading it, the key, the limits, the nodes, the answer. */
export const errorFacts = {
  invalid_json: {
    message: "The request body is not valid JSON.",
    retryable: false,
    next: "Send one JSON object, UTF-8 encoded.",
  },
  invalid_request: {
    message: "The request is not one that this route accepts.",
    retryable: false,
    next: "Correct the parameter that the message names.",
  },
  body_too_large: {
    message: "The request body is larger than this gateway accepts.",
    retryable: false,
    next: "Send a shorter prompt, or have requests.bodyBytesMax raised.",
  },
  headers_too_large: {
    message: "The request headers are larger than this gateway accepts.",
    retryable: false,
    next: "Send fewer or shorter headers, or have requests.headerBytesMax raised.",
  },
  body_timeout: {
    message: "The request body did not arrive in time.",
    retryable: true,
    next: "Send the request again over a faster connection.",
  },
  missing_key: {
    message: "No API key was given.",
    retryable: false,
    next: "Send the header `Authorization: Bearer <key>`.",
  },
  invalid_key: {
    message: "The API key is not known to this gateway.",
    retryable: false,
    next: "Check the key, or ask the operator for one.",
  },
  model_not_allowed: {
    message: "This API key may not use that model.",
    retryable: false,
    next: "Choose a model from GET /v1/models, which lists what this key may use.",
  },
  model_not_found: {
    message: "No node serves that model.",
    retryable: false,
    next: "Choose a model from GET /v1/models.",
  },
  not_found: {
    message: "There is no such route.",
    retryable: false,
    next: "Check the path; OpenAI routes start with /v1.",
  },
  method_not_allowed: {
    message: "That route does not take this method.",
    retryable: false,
    next: "Use the method that the `allow` header names.",
  },
  admin_disabled: {
    message: "Administration is off: no admin token is configured.",
    retryable: false,
    next: "Set admin.token (HEADRACE_ADMIN_TOKEN) and restart or reload.",
  },
  admin_forbidden: {
    message: "The admin token is missing or wrong.",
    retryable: false,
    next: "Send the header `Authorization: Bearer <admin token>`.",
  },
  rate_limit_requests: {
    message: "This key has used up its requests per minute.",
    retryable: true,
    next: "Wait as long as `retry-after` says.",
  },
  rate_limit_tokens: {
    message: "This key has used up its tokens per minute.",
    retryable: true,
    next: "Wait as long as `retry-after` says, or lower max_tokens.",
  },
  rate_limit_concurrency: {
    message: "This key has as many requests in flight as it may have.",
    retryable: true,
    next: "Send the request again once one of your others has ended.",
  },
  rate_limit_concurrent_tokens: {
    message: "This key's requests in flight have reserved as many tokens as it may have.",
    retryable: true,
    next: "Send the request again once one of your others has ended, or lower max_tokens.",
  },
  quota_tokens_per_day: {
    message: "This key has used up its tokens for today.",
    retryable: true,
    next: "Wait as long as `retry-after` says, or ask the operator for a larger quota.",
  },
  request_too_large_for_limit: {
    message: "This request alone needs more tokens than this key's limits ever allow at once.",
    retryable: false,
    next: "Send a shorter prompt, lower max_tokens, or ask the operator for a larger limit.",
  },
  limit_unavailable: {
    message:
      "The peer that keeps this key's limits is out of reach, and the key may not pass without it.",
    retryable: true,
    next: "Wait as long as `retry-after` says.",
  },
  queue_full: {
    message:
      "This key has as many requests waiting as it may have, or would wait past its deadline.",
    retryable: true,
    next: "Wait as long as `retry-after` says; send fewer requests at once.",
  },
  pool_overloaded: {
    message: "The nodes that serve this model are all busy and their queue is full.",
    retryable: true,
    next: "Wait as long as `retry-after` says.",
  },
  no_node: {
    message: "No healthy node serves this model just now.",
    retryable: true,
    next: "Wait as long as `retry-after` says; the operator should look at the nodes' health.",
  },
  deadline_exceeded: {
    message: "The request's deadline passed before an answer began.",
    retryable: true,
    next: "Send the request again with more time, or when there is less load.",
  },
  upstream_connect: {
    message: "No connection could be made to a node.",
    retryable: true,
    next: "Send the request again; the operator should check the nodes' addresses and health.",
  },
  upstream_failed: {
    message: "The node failed to answer.",
    retryable: true,
    next: "Send the request again; the operator should read the node's log.",
  },
  upstream_bad_answer: {
    message: "The node answered with something that is not an OpenAI answer.",
    retryable: true,
    next: "Send the request again; the operator should check what listens at the node's URL.",
  },
  upstream_timeout_first_token: {
    message: "The node sent no token in time.",
    retryable: true,
    next: "Send the request again, or a shorter prompt.",
  },
  upstream_stalled: {
    message: "The node stopped in the middle of its answer.",
    retryable: true,
    next: "Send the request again; what arrived so far is incomplete.",
  },
  upstream_timeout_total: {
    message: "The answer took longer than a request may take.",
    retryable: true,
    next: "Lower max_tokens, or ask for more time; what arrived so far is incomplete.",
  },
  stream_broken: {
    message: "The node's stream ended before the answer was complete.",
    retryable: true,
    next: "Send the request again; what arrived so far is incomplete.",
  },
  retry_budget_exhausted: {
    message: "A node failed, and too many requests are being retried already to try another.",
    retryable: true,
    next: "Wait as long as `retry-after` says; the operator should look at the nodes' health.",
  },
  client_closed: {
    message: "The client left before the answer was complete.",
    retryable: true,
    next: "Nothing: nobody is there to read this; it appears in logs and metrics only.",
  },
  shutting_down: {
    message: "This gateway is shutting down.",
    retryable: true,
    next: "Send the request again: another process, or the restarted one, will take it.",
  },
  internal: {
    message: "Headrace failed by a fault of its own.",
    retryable: true,
    next: "Send the request again, and report the request id to the operator.",
  },
} as const satisfies Record<string, ErrorFact>;

/** Name of a refusal or failure, as it appears in answers, logs and metrics. */
export type ErrorCode = keyof typeof errorFacts;
