/**
 * Headrace's own trace format: one JSON object a line, one line a request. Written by `serve --record FILE`, read by
 * `replay`, by the simulator and by `hot`. Version 1. Lines hold no text of a request, unless its operator wanted that
 * (`record.prompts`): then `prompt` is what was asked.
 *
 * Lines stand in the order in which requests *ended*, so arrivals are out of order by as much as requests last;
 * the reader (sim/trace.ts) sorts them. A file that two recordings were appended to starts its times anew in the
 * middle. A reader accepts fields that it does not know: a later minor version may add some.
 */

/** One recorded request. Times are ms; absent fields were unknown. */
export type TraceRecord = {
  v: 1;
  /** Arrival since the start of the recording, ms, never negative. */
  atMs: number;
  /** First 16 hex digits of sha256 of the tenant's name. */
  tenant: string;
  model: string;
  route: "chat" | "completions" | "embeddings";
  stream: boolean;
  inputTokens: number;
  /** Tokens generated; 0 when nothing was. */
  outputTokens: number;
  /** `max_tokens` of the request. */
  maxTokens?: number;
  /**
   * Chained hashes of the prompt's blocks of 1024 characters (about 256 tokens): equal leading hashes mean an
   * equal leading text. At most 256.
   */
  prefix: number[];
  /** Hash of everything that decides the answer (the exact cache key), 16 hex digits; equal = same request. */
  question?: string;
  session?: string;
  outcome: "ok" | "refused" | "failed" | "left";
  cache: "miss" | "hit_exact" | "hit_semantic" | "joined" | "bypass";
  node?: string;
  attempts: number;
  queuedMs: number;
  /** From arrival to the first content token out. */
  ttftMs?: number;
  /** From arrival to the last byte. */
  e2eMs: number;
  /** The body of a chat request without the fields that only say how, and to whom, it is delivered. */
  prompt?: Record<string, unknown>;
};

const routes = ["chat", "completions", "embeddings"] as const;
const outcomes = ["ok", "refused", "failed", "left"] as const;
const verdicts = ["miss", "hit_exact", "hit_semantic", "joined", "bypass"] as const;

/** Hashes that a record's `prefix` may hold. */
export const PREFIX_BLOCKS_MAX = 256;
/** What one hash of `prefix` stands for: 1024 characters. */
export const PREFIX_BLOCK_TOKENS = 256;

/** One line, without its line break. */
export function formatTraceRecord(record: TraceRecord): string {
  return JSON.stringify(record);
}

/** Reads one line; `invalid` says which field is wrong, what was found and what is accepted. */
export function parseTraceRecord(line: string): TraceRecord | { invalid: string } {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch {
    return { invalid: "not JSON" };
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    return { invalid: "not a JSON object" };
  }
  const fields = value as Record<string, unknown>;
  if (fields.v !== 1) return { invalid: `v is ${show(fields.v)}; this version reads 1` };
  for (const [name, check] of checks) {
    const problem = check(fields[name]);
    if (problem !== undefined) return { invalid: `${name} is ${show(fields[name])}; ${problem}` };
  }
  return value as TraceRecord; // Every field of the type was checked above.
}

type Check = (value: unknown) => string | undefined;

const time: Check = (value) =>
  typeof value === "number" && value >= 0 ? undefined : "it must be ms, 0 or more";
const count: Check = (value) =>
  Number.isSafeInteger(value) && (value as number) >= 0
    ? undefined
    : "it must be a whole number, 0 or more";
const text: Check = (value) => (typeof value === "string" ? undefined : "it must be a string");
const flag: Check = (value) =>
  typeof value === "boolean" ? undefined : "it must be true or false";
const object: Check = (value) =>
  typeof value === "object" && value !== null && !Array.isArray(value)
    ? undefined
    : "it must be a JSON object";
const hashes: Check = (value) =>
  Array.isArray(value) &&
  value.length <= PREFIX_BLOCKS_MAX &&
  value.every((hash) => count(hash) === undefined)
    ? undefined
    : `it must be a list of at most ${PREFIX_BLOCKS_MAX} whole numbers`;

function oneOf(words: readonly string[]): Check {
  return (value) =>
    typeof value === "string" && words.includes(value)
      ? undefined
      : `accepted: ${words.join(", ")}`;
}

function optional(check: Check): Check {
  return (value) => (value === undefined ? undefined : check(value));
}

/** A check for each field but `v`: a field of the type without one does not compile. */
const checks: [string, Check][] = Object.entries({
  atMs: time,
  tenant: text,
  model: text,
  route: oneOf(routes),
  stream: flag,
  inputTokens: count,
  outputTokens: count,
  maxTokens: optional(count),
  prefix: hashes,
  question: optional(text),
  session: optional(text),
  outcome: oneOf(outcomes),
  cache: oneOf(verdicts),
  node: optional(text),
  attempts: count,
  queuedMs: time,
  ttftMs: optional(time),
  e2eMs: time,
  prompt: optional(object),
} satisfies Record<Exclude<keyof TraceRecord, "v">, Check>);

function show(value: unknown): string {
  if (value === undefined) return "missing";
  const shown = JSON.stringify(value);
  return shown.length <= 40 ? shown : `${shown.slice(0, 40)}…`;
}
