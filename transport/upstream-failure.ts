/**
 * What a node's failure is: from HTTP status, error body and socket error to the kinds the actors know. Pure.
 *
 * Choices that are not obvious:
 * - 401 and 403 mean that *we* are misconfigured on that node (its API key is wrong): another node may serve the
 *   request, so they count as `unavailable` and are never shown to the client, whose own key is in order.
 * - 404 is the client's error, also when it speaks of the model: were it the node's, anyone could open the
 *   circuits of healthy nodes by misspelling a model's name.
 * - 408 is the node's complaint about our sending, not the client's about the node: `unavailable`.
 * - 424 is how TGI says that a generation failed: `server_error`.
 */
import type { UpstreamFailure } from "../actors/edges.ts";

/** `detail`: one line for logs and headers, never a node's own words. */
export type NodeFailure = { failure: UpstreamFailure; detail: string };

/** A longer wait asked for by a node is not believed, ms. */
export const retryAfterMsMax = 60_000;

const overloadWords =
  /overload|queue\b.{0,40}\bfull|too many requests|no slot|server (is )?(too )?busy|at capacity/i;

/** @param text the error body as far as it came; read, never repeated in `detail` (it may quote the prompt). */
export function failureOfStatus(status: number, text: string): NodeFailure {
  if (status >= 300 && status < 400) return { failure: "bad_answer", detail: `redirect ${status}` };
  const says = overloadWords.test(text);
  if (status === 429 || (status === 503 && says)) {
    return { failure: "overloaded", detail: `status ${status}, overloaded` };
  }
  if (status === 401 || status === 403) {
    return { failure: "unavailable", detail: `status ${status}: the node refuses its API key` };
  }
  const detail = `status ${status}`;
  if (status === 408 || status === 502 || status === 503 || status === 504) {
    return { failure: "unavailable", detail };
  }
  if (status === 424 || status >= 500) return { failure: "server_error", detail };
  return { failure: "client_error", detail };
}

/** An error that a node states inside a 200, as an event or as a body. */
export function failureOfError(status: number | undefined, text: string): NodeFailure {
  if (status !== undefined) {
    const { failure } = failureOfStatus(status, text);
    return { failure, detail: `error with code ${status} inside an answer` };
  }
  const failure = overloadWords.test(text) ? "overloaded" : "server_error";
  return { failure, detail: "error inside an answer" };
}

/** A connection that failed. @param answering the head of an answer had come. */
export function failureOfSocket(error: Error, answering: boolean): NodeFailure {
  const code = "code" in error && typeof error.code === "string" ? error.code : error.name;
  const detail = answering ? `connection broke off (${code})` : `no connection (${code})`;
  if (answering) return { failure: "broken_stream", detail };
  const garbage =
    error.name === "HTTPParserError" ||
    code.startsWith("HPE_") ||
    code === "UND_ERR_HEADERS_OVERFLOW";
  if (garbage) return { failure: "bad_answer", detail: `not HTTP (${code})` };
  return { failure: "connect", detail };
}

/** How long the node asks to be left alone, ms, 1…60,000; undefined when it does not say. */
export function retryAfterMs(
  header: (name: string) => string | undefined,
  wallMs: number,
): number | undefined {
  const exact = Number(header("retry-after-ms") ?? Number.NaN);
  const text = header("retry-after") ?? "";
  const seconds = text.trim() === "" ? Number.NaN : Number(text);
  const untilMs = Number.isNaN(seconds) ? Date.parse(text) - wallMs : seconds * 1000;
  const ms = Number.isNaN(exact) ? untilMs : exact;
  return ms > 0 ? Math.min(Math.ceil(ms), retryAfterMsMax) : undefined;
}
