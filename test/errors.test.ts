import OpenAI from "openai";
import { describe, expect, it } from "vitest";
import { type ErrorCode, type ErrorFact, errorFacts } from "../actors/errors.ts";
import {
  errorBody,
  errorHeaders,
  type HttpErrorFact,
  httpErrors,
} from "../transport/http-errors.ts";

const codes = Object.keys(errorFacts) as ErrorCode[];
const factOf = (code: ErrorCode): ErrorFact => errorFacts[code];
const httpOf = (code: ErrorCode): HttpErrorFact => httpErrors[code];

describe("errors", () => {
  it("codes: the HTTP table has exactly the codes of the error table, in its order", () => {
    expect(Object.keys(httpErrors)).toEqual(codes);
  });

  it.each(codes)("code %s: says what happened and what to do, in one sentence each", (code) => {
    const { message, next } = factOf(code);
    expect(code).toMatch(/^[a-z]+(_[a-z]+)*$/);
    for (const text of [message, next]) expect(text).toMatch(/^[A-Z][^\n]+\.$/);
    expect(message).not.toBe(next);
  });

  it.each(codes)(
    "code %s: has a status of its class, and a wait exactly where one is due",
    (code) => {
      const { status, retryAfterMs } = httpOf(code);
      expect(status).toBeGreaterThanOrEqual(400);
      expect(status).toBeLessThan(600);
      expect(retryAfterMs !== undefined).toBe(status === 429 || status === 503);
      // Another try of what the caller did wrong cannot help; what the gateway or a node did may pass.
      const mayPass = status >= 500 || [408, 429, 499].includes(status);
      expect(factOf(code).retryable).toBe(mayPass);
    },
  );

  it("statuses: one's own limits are 429, the pool's state 503, clocks 504, nodes 502", () => {
    const of = (status: number) => codes.filter((code) => httpOf(code).status === status);
    expect(of(429)).toEqual([
      "rate_limit_requests",
      "rate_limit_tokens",
      "rate_limit_concurrency",
      "rate_limit_concurrent_tokens",
      "quota_tokens_per_day",
      "queue_full",
    ]);
    expect(of(503)).toEqual([
      "limit_unavailable",
      "pool_overloaded",
      "no_node",
      "retry_budget_exhausted",
      "shutting_down",
    ]);
    expect(of(504)).toEqual([
      "deadline_exceeded",
      "upstream_timeout_first_token",
      "upstream_stalled",
      "upstream_timeout_total",
    ]);
    expect(of(502)).toEqual([
      "upstream_connect",
      "upstream_failed",
      "upstream_bad_answer",
      "stream_broken",
    ]);
    expect(of(500)).toEqual(["internal"]);
  });
});

describe("errorBody", () => {
  it("default message: what happened and what to do", () => {
    expect(errorBody("invalid_key")).toEqual({
      error: {
        message:
          "The API key is not known to this gateway. Check the key, or ask the operator for one.",
        type: "authentication_error",
        param: null,
        code: "invalid_key",
      },
    });
  });

  it("own message and parameter: the advice stays, the sentence is closed", () => {
    const { error } = errorBody("invalid_request", "messages is empty", "messages");
    expect(error.message).toBe(`messages is empty. ${errorFacts.invalid_request.next}`);
    expect(error.param).toBe("messages");
  });
});

describe("errorHeaders", () => {
  it("waits: rounded up to whole seconds, exact in ms, at least the smallest unit", () => {
    expect(errorHeaders("rate_limit_requests", 1200.4)).toEqual({
      "x-should-retry": "true",
      "retry-after": "2",
      "retry-after-ms": "1201",
    });
    expect(errorHeaders("pool_overloaded", 0)).toMatchObject({
      "retry-after": "1",
      "retry-after-ms": "1",
    });
  });

  it("no wait known: the code's own; codes without one never get the header", () => {
    expect(errorHeaders("shutting_down")["retry-after"]).toBe("1");
    expect(errorHeaders("invalid_json", 500)).toEqual({ "x-should-retry": "false" });
    expect(errorHeaders("upstream_failed", 500)).toEqual({ "x-should-retry": "true" });
  });

  it("a wait past what clients keep to: not to be retried by them", () => {
    expect(errorHeaders("quota_tokens_per_day", 60_000)["x-should-retry"]).toBe("true");
    expect(errorHeaders("quota_tokens_per_day", 60_001)["x-should-retry"]).toBe("false");
  });
});

describe("OpenAI's client", () => {
  it.each(codes)(
    "code %s: is read with its code, and retried exactly when it may help",
    async (code) => {
      let calls = 0;
      const client = new OpenAI({
        apiKey: "test",
        baseURL: "http://gateway.invalid/v1",
        maxRetries: 1,
        fetch: async () => {
          calls += 1;
          return new Response(JSON.stringify(errorBody(code)), {
            status: httpOf(code).status,
            // The client waits as long as it is told: 1 ms, so that the test need not.
            headers: {
              ...errorHeaders(code),
              "retry-after-ms": "1",
              "content-type": "application/json",
            },
          });
        },
      });
      const failure = await client.models.list().then(
        () => undefined,
        (error: unknown) => error,
      );
      expect(failure).toBeInstanceOf(OpenAI.APIError);
      expect(failure).toMatchObject({
        status: httpOf(code).status,
        code,
        type: httpOf(code).type,
      });
      expect(calls).toBe(factOf(code).retryable ? 2 : 1);
    },
  );
});
