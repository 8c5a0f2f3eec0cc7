/**
 * Logs of answered requests, read for calibration: when each came, how long it was, when its first and its last
 * token came out. Two formats, told apart by the first line, one JSON object a line:
 *
 *   engine    request_id, input_toks, output_toks, queued_ts (else arrival_time), scheduled_ts (may be absent),
 *             first_token_ts, last_token_ts; seconds on one clock, any origin
 *   headrace  the recording of `serve --record` (transport/trace-format.ts), one node of it
 *
 * Pure: it takes the text. Requests that put work on the node but have no whole timing (not streamed, cut off) stay
 * in as load and are not compared. Cache hits and refusals never reached the node and are left out.
 */
import { parseTraceRecord, type TraceRecord } from "../transport/trace-format.ts";

/** Times are µs since the first arrival; undefined: not in the log. */
export type LoggedRequest = {
  id: string;
  atUs: number;
  promptTokens: number;
  outputTokens: number;
  scheduledUs: number | undefined;
  firstTokenUs: number | undefined;
  lastTokenUs: number | undefined;
};

export type RequestLog = {
  file: string;
  format: "engine" | "headrace";
  /** In order of arrival. */
  requests: readonly LoggedRequest[];
  /** What was left out, in sentences. */
  warnings: readonly string[];
};

/** A log, a law file or an option that cannot be used: what was found, and what is accepted. */
export class CalibrationError extends Error {
  override readonly name = "CalibrationError";
}

/** Requests of one log. */
export const LOG_REQUESTS_MAX = 1_000_000;
/** A request longer than this is a broken row. */
const TOKENS_MAX = 100_000_000;
/** Clocks of two threads of an engine differ by so little; more is a wrong row. */
const CLOCK_SLACK_S = 0.005;

/**
 * Reads a whole log. `node`: of a recording of several nodes, the one to calibrate. Throws CalibrationError that names
 * file, line and field.
 */
export function parseRequestLog(text: string, file: string, node?: string): RequestLog {
  const lines = text.replace(/^\uFEFF/, "").split("\n");
  const first = lines.findIndex((line) => line.trim() !== "");
  if (first < 0) throw new CalibrationError(`${file}: empty file`);
  const head = objectOf(lines[first] ?? "");
  if (head === undefined) {
    throw new CalibrationError(`${file}, line ${first + 1}: not a JSON object`);
  }
  const isRecording = "v" in head && "atMs" in head;
  if (!isRecording && !("first_token_ts" in head)) {
    throw new CalibrationError(
      `${file}, line ${first + 1}: fits no known log; accepted: JSON lines with request_id, input_toks, ` +
        "output_toks, queued_ts, first_token_ts, last_token_ts, or a recording of `headrace serve --record`",
    );
  }
  if (node !== undefined && !isRecording) {
    throw new CalibrationError(`${file}: an engine's own log is of one node; leave the node out`);
  }
  const rows = isRecording ? new Recording(file, node) : new EngineLog(file);
  lines.forEach((line, index) => {
    if (line.trim() !== "") rows.add(line, index + 1);
    if (rows.requests.length > LOG_REQUESTS_MAX) {
      throw new CalibrationError(`${file}: more than ${LOG_REQUESTS_MAX} requests`);
    }
  });
  const warnings = rows.warnings();
  const requests = fromFirstArrival(rows.requests);
  if (requests.length === 0) {
    const why = warnings.length === 0 ? "" : ` (${warnings.join("; ")})`;
    throw new CalibrationError(`${file}: holds no request that a node answered${why}`);
  }
  return { file, format: isRecording ? "headrace" : "engine", requests, warnings };
}

/** Sorted by arrival (stable), time starting at the first. */
function fromFirstArrival(requests: LoggedRequest[]): LoggedRequest[] {
  requests.sort((a, b) => a.atUs - b.atUs);
  const originUs = requests[0]?.atUs ?? 0;
  const since = (us: number | undefined) => (us === undefined ? undefined : us - originUs);
  return requests.map((each) => ({
    ...each,
    atUs: each.atUs - originUs,
    scheduledUs: since(each.scheduledUs),
    firstTokenUs: since(each.firstTokenUs),
    lastTokenUs: since(each.lastTokenUs),
  }));
}

type Rows = {
  readonly requests: LoggedRequest[];
  add(line: string, number: number): void;
  warnings(): string[];
};

class EngineLog implements Rows {
  readonly requests: LoggedRequest[] = [];
  readonly #file: string;
  readonly #ids = new Set<string>();
  /** Times are kept from the first one on: seconds since 1970 leave a float no room for µs otherwise. */
  #originS = Number.NaN;

  constructor(file: string) {
    this.#file = file;
  }

  add(line: string, number: number): void {
    const where = `${this.#file}, line ${number}`;
    const row = objectOf(line);
    if (row === undefined) throw new CalibrationError(`${where}: not a JSON object`);
    const id = typeof row.request_id === "string" ? row.request_id : `line ${number}`;
    if (this.#ids.has(id)) {
      throw new CalibrationError(`${where}: request_id ${JSON.stringify(id)} is there twice`);
    }
    this.#ids.add(id);
    const arrival = row.queued_ts === undefined ? "arrival_time" : "queued_ts";
    const atS = timeOf(row, arrival, where);
    const firstS = timeOf(row, "first_token_ts", where);
    const lastS = timeOf(row, "last_token_ts", where);
    const scheduledS =
      row.scheduled_ts === undefined ? undefined : timeOf(row, "scheduled_ts", where);
    if (firstS < atS - CLOCK_SLACK_S || lastS < firstS) {
      throw new CalibrationError(
        `${where}: ${arrival} ${atS}, first_token_ts ${firstS}, last_token_ts ${lastS} are out of order; they must ` +
          "be seconds on one clock",
      );
    }
    if (Number.isNaN(this.#originS)) this.#originS = Math.floor(atS) - 1;
    const us = (seconds: number) => Math.round((seconds - this.#originS) * 1e6);
    this.requests.push({
      id,
      atUs: us(atS),
      promptTokens: tokensOf(row, "input_toks", where),
      outputTokens: tokensOf(row, "output_toks", where),
      scheduledUs: scheduledS === undefined ? undefined : us(scheduledS),
      firstTokenUs: us(firstS),
      lastTokenUs: us(lastS),
    });
  }

  warnings(): string[] {
    return [];
  }
}

class Recording implements Rows {
  readonly requests: LoggedRequest[] = [];
  readonly #file: string;
  readonly #node: string | undefined;
  readonly #nodes = new Set<string>();
  readonly #left = new Map<string, number>();

  constructor(file: string, node: string | undefined) {
    this.#file = file;
    this.#node = node;
  }

  add(line: string, number: number): void {
    const record = parseTraceRecord(line);
    if ("invalid" in record) {
      throw new CalibrationError(`${this.#file}, line ${number}: ${record.invalid}`);
    }
    const why = this.#leftOut(record);
    if (why !== undefined) {
      this.#left.set(why, (this.#left.get(why) ?? 0) + 1);
      return;
    }
    // What the node saw: it came when the gateway sent it.
    const atUs = Math.round((record.atMs + record.queuedMs) * 1000);
    const arrivedUs = Math.round(record.atMs * 1000);
    const isWhole = record.outcome === "ok" && record.ttftMs !== undefined && record.attempts === 1;
    const firstUs = arrivedUs + Math.round((record.ttftMs ?? 0) * 1000);
    const isTimed = isWhole && firstUs >= atUs;
    this.requests.push({
      id: `line ${number}`,
      atUs,
      promptTokens: record.inputTokens,
      outputTokens: record.outputTokens,
      scheduledUs: undefined,
      firstTokenUs: isTimed ? firstUs : undefined,
      lastTokenUs: isTimed ? arrivedUs + Math.round(record.e2eMs * 1000) : undefined,
    });
  }

  #leftOut(record: TraceRecord): string | undefined {
    if (record.route === "embeddings") return "embeddings requests";
    if (record.cache !== "miss" && record.cache !== "bypass") return "answered by the cache";
    if (record.node === undefined) return "reached no node";
    this.#nodes.add(record.node);
    if (this.#node !== undefined && record.node !== this.#node) return "of other nodes";
    if (record.inputTokens < 1 || record.outputTokens < 1) return "without tokens";
    return undefined;
  }

  warnings(): string[] {
    if (this.#node !== undefined && !this.#nodes.has(this.#node)) {
      throw new CalibrationError(
        `${this.#file}: holds no node ${JSON.stringify(this.#node)}; it holds ${listed(this.#nodes)}`,
      );
    }
    if (this.#node === undefined && this.#nodes.size > 1) {
      throw new CalibrationError(
        `${this.#file}: holds several nodes, and one is calibrated at a time; choose one of ${listed(this.#nodes)}`,
      );
    }
    return [...this.#left].map(([why, count]) => `${count} requests left out: ${why}`);
  }
}

function listed(names: Iterable<string>): string {
  const all = [...names].sort();
  return all.length <= 10 ? all.join(", ") : `${all.slice(0, 10).join(", ")} … (${all.length})`;
}

function objectOf(line: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(line);
    if (typeof value !== "object" || value === null || Array.isArray(value)) return undefined;
    return value as Record<string, unknown>;
  } catch {
    return undefined;
  }
}

function timeOf(row: Record<string, unknown>, name: string, where: string): number {
  const value = row[name];
  if (typeof value === "number" && Number.isFinite(value) && value >= 0) return value;
  throw new CalibrationError(`${where}: ${name} is ${shown(value)}; it must be a time in seconds`);
}

function tokensOf(row: Record<string, unknown>, name: string, where: string): number {
  const value = row[name];
  if (Number.isSafeInteger(value) && (value as number) >= 1 && (value as number) <= TOKENS_MAX) {
    return value as number;
  }
  throw new CalibrationError(
    `${where}: ${name} is ${shown(value)}; it must be a whole number of tokens, 1 or more`,
  );
}

function shown(value: unknown): string {
  return value === undefined ? "missing" : (JSON.stringify(value) ?? "missing").slice(0, 40);
}
