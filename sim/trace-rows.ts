/**
 * One line of a trace file as a request: the formats, how they are told apart, and what each row means.
 *
 * Pure: lines in, requests out. trace.ts owns files, order and positions; a problem found here is thrown as a
 * `RowProblem` without a position, and trace.ts adds file and line. Times that come out are µs on the clock of
 * the file; trace.ts moves them to start at 0.
 */
import { PREFIX_BLOCK_TOKENS, parseTraceRecord } from "../transport/trace-format.ts";

/** One request of a load, recorded or made up. */
export type TraceRequest = {
  /** Arrival, whole µs since the load began. */
  atUs: number;
  inputTokens: number;
  /** Tokens generated; 0 when nothing was, or when a refused request left it unknown. */
  outputTokens: number;
  /** `max_tokens` of the request, when it was stated. */
  maxTokens?: number;
  model?: string;
  tenant?: string;
  session?: string;
  /**
   * Ids of the prompt's blocks of `blockTokens` tokens, from its first token; the last may be a partial block,
   * and the end of the prompt may be uncovered. Equal leading ids mean an equal leading text.
   */
  prefix?: readonly number[];
  blockTokens?: number;
  /** Equal values are the same request, word for word: what an exact cache would answer. */
  question?: string;
  /** How the recorded request ended; absent when the format does not say. */
  outcome?: "ok" | "refused" | "failed" | "left";
  /** Requests around one original question, on generated loads only. `similarity` says how this one relates. */
  cluster?: string;
  /**
   * Against the cluster's original. exact: the same words; close: a paraphrase that an embedder places near it;
   * loose: a paraphrase that it places farther off; lookalike: near it, but with another right answer, so that a
   * hit would be wrong. Absent: this is the original.
   */
  similarity?: Similarity;
};

export type Similarity = "exact" | "close" | "loose" | "lookalike";

/** Formats that are read, in the order in which they are offered. */
export const traceFormats = ["azure2023", "burstgpt", "mooncake", "ragpulse", "headrace"] as const;
export type TraceFormat = (typeof traceFormats)[number];

export function isTraceFormat(name: string): name is TraceFormat {
  return (traceFormats as readonly string[]).includes(name);
}

/** A row that cannot be read. `incomplete`: it may be one that was cut off while it was written. */
export class RowProblem extends Error {
  override readonly name = "RowProblem";
  readonly incomplete: boolean;
  constructor(message: string, incomplete = false) {
    super(message);
    this.incomplete = incomplete;
  }
}

/** Reads rows in file order. Throws RowProblem. */
export type RowParser = {
  /** Reads the first line of a CSV file; absent for formats without a header line. */
  header?(line: string): void;
  /** The request of a line, or why a valid line holds none that counts here. */
  row(line: string): TraceRequest | { skipped: string };
};

/** The format that the first non-empty line speaks for. */
export function detectTraceFormat(line: string): TraceFormat | undefined {
  const columns = columnsOf(line);
  if (azureColumns.every((name) => columns.includes(name))) return "azure2023";
  if (columns.includes("Timestamp") && columns.includes("Request tokens")) return "burstgpt";
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch {
    return undefined;
  }
  if (!isObject(value)) return undefined;
  if ("v" in value && "atMs" in value) return "headrace";
  if (Array.isArray(value.hash_ids)) return "mooncake";
  if (isObject(value.hash_ids)) return "ragpulse";
  return undefined;
}

const azureColumns = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"] as const;
const burstColumns = ["Timestamp", "Model", "Request tokens", "Response tokens"] as const;

/** Azure LLM inference traces of 2023 and 2024 (2025 with images has one column more). */
export class AzureRows implements RowParser {
  #cells: CsvCells | null = null;

  header(line: string): void {
    this.#cells = new CsvCells(line, azureColumns);
  }

  row(line: string): TraceRequest {
    const cells = cellsOf(this.#cells, line);
    return {
      atUs: azureTimeUs(cells.text("TIMESTAMP")),
      inputTokens: cells.count("ContextTokens"),
      outputTokens: cells.count("GeneratedTokens"),
    };
  }
}

/** BurstGPT 1 to 3. A response of 0 tokens was a failure. */
export class BurstGptRows implements RowParser {
  #cells: CsvCells | null = null;
  #hasSession = false;

  header(line: string): void {
    this.#cells = new CsvCells(line, burstColumns);
    this.#hasSession = columnsOf(line).includes("Session ID");
  }

  row(line: string): TraceRequest {
    const cells = cellsOf(this.#cells, line);
    const outputTokens = cells.count("Response tokens");
    const request: TraceRequest = {
      atUs: timeUs("Timestamp", cells.text("Timestamp"), 1_000_000),
      inputTokens: cells.count("Request tokens"),
      outputTokens,
      outcome: outputTokens === 0 ? "failed" : "ok",
    };
    const model = cells.text("Model");
    if (model !== "") request.model = copied(model);
    const session = this.#hasSession ? cells.text("Session ID") : "";
    if (session !== "") request.session = copied(session);
    return request;
  }
}

/** Mooncake: lengths and chained ids of prompt blocks of 512 tokens. */
export class MooncakeRows implements RowParser {
  row(line: string): TraceRequest {
    const fields = jsonFields(line);
    const prefix = idsOf(fields, "hash_ids");
    const request: TraceRequest = {
      atUs: timeUs("timestamp", fields.timestamp, 1000),
      inputTokens: countOf(fields, "input_length"),
      outputTokens: countOf(fields, "output_length"),
      prefix,
      blockTokens: MOONCAKE_BLOCK_TOKENS,
    };
    if (prefix.length > Math.ceil(request.inputTokens / MOONCAKE_BLOCK_TOKENS)) {
      throw new RowProblem(
        `hash_ids holds ${prefix.length} blocks of ${MOONCAKE_BLOCK_TOKENS} tokens, more than ` +
          `input_length ${request.inputTokens} has`,
      );
    }
    return request;
  }
}

const MOONCAKE_BLOCK_TOKENS = 512;
/** As vLLM has it: prompts share whole blocks of this size, so shared segments count as an engine counts. */
const RAGPULSE_BLOCK_TOKENS = 16;

/** Parts of a RAGPulse prompt in their order, with the file and field that hold the lengths of their segments. */
export const ragParts = [
  { part: "sys_prompt", file: "1_sys_prompt.jsonl", id: "sys_prompt_id" },
  { part: "passages_ids", file: "2_passages.jsonl", id: "passage_id" },
  { part: "history", file: "3_history.jsonl", id: "history_id" },
  { part: "web_search", file: "5_web_search.jsonl", id: "web_search_id" },
  { part: "user_input", file: "4_user_input.jsonl", id: "user_input_id" },
] as const;

/** Tokens by segment id, one map for each of `ragParts`, in that order. */
export type RagLengths = readonly ReadonlyMap<number, number>[];

/** What counts as the same question: the whole prompt, or the user's words alone. */
export type QuestionOf = "request" | "user_turn";

/** RAGPulse: ids of the segments that the prompt was put together from. */
export class RagPulseRows implements RowParser {
  readonly #lengths: RagLengths;
  readonly #questionOf: QuestionOf;

  constructor(lengths: RagLengths, questionOf: QuestionOf) {
    this.#lengths = lengths;
    this.#questionOf = questionOf;
  }

  row(line: string): TraceRequest {
    const fields = jsonFields(line);
    const segments = fields.hash_ids;
    if (!isObject(segments)) throw new RowProblem("hash_ids must be an object of lists of ids");
    const inputTokens = countOf(fields, "input_length");
    const blocks = new BlockChain(
      RAGPULSE_BLOCK_TOKENS,
      Math.floor(inputTokens / RAGPULSE_BLOCK_TOKENS),
    );
    let whole = 0;
    let userTurn = 0;
    ragParts.forEach(({ part, file }, index) => {
      for (const id of idsOf(segments, part)) {
        const tokens = this.#lengths[index]?.get(id);
        if (tokens === undefined) throw new RowProblem(`${part} ${id} has no length in ${file}`);
        blocks.append(index, id, tokens);
        whole = chainHash(chainHash(whole, index), id);
        if (part === "user_input") userTurn = chainHash(userTurn, id);
      }
    });
    const request: TraceRequest = {
      atUs: timeUs("timestamp", fields.timestamp, 1_000_000),
      inputTokens,
      outputTokens: countOf(fields, "output_length"),
      prefix: blocks.ids,
      blockTokens: RAGPULSE_BLOCK_TOKENS,
      question: (this.#questionOf === "request" ? whole : userTurn).toString(16),
    };
    const session = fields.session_id;
    if (typeof session === "string" && session !== "") request.session = session;
    return request;
  }
}

/** Output lengths that are remembered for questions that a cache answered later. */
const ANSWERS_MAX = 65_536;

/** Headrace's own recordings. */
export class HeadraceRows implements RowParser {
  /** Output tokens by question, oldest first: a cache hit is recorded without any. */
  readonly #answers = new Map<string, number>();
  /** Added to times: a second recording in the same file goes on where the first ended. */
  #offsetUs = 0;
  #lastAtMs = 0;
  #lastEndMs = 0;
  readonly #onRestart: () => void;

  /** @param onRestart called when times start anew: another recording was appended. */
  constructor(onRestart: () => void) {
    this.#onRestart = onRestart;
  }

  row(line: string): TraceRequest | { skipped: string } {
    const record = parseTraceRecord(line);
    if ("invalid" in record) throw new RowProblem(record.invalid, record.invalid === "not JSON");
    const endMs = record.atMs + record.e2eMs;
    // In one recording ends never fall (nor arrivals, in a file sorted by them); both do only where a new one
    // begins. A second of slack keeps apart what only differs by rounding.
    if (record.atMs < this.#lastAtMs && endMs + 1000 < this.#lastEndMs) {
      this.#offsetUs += Math.round(this.#lastEndMs * 1000);
      this.#lastAtMs = 0;
      this.#lastEndMs = 0;
      this.#onRestart();
    }
    this.#lastAtMs = Math.max(this.#lastAtMs, record.atMs);
    this.#lastEndMs = Math.max(this.#lastEndMs, endMs);
    if (record.route === "embeddings") return { skipped: "embeddings requests" };
    const request: TraceRequest = {
      atUs: this.#offsetUs + Math.round(record.atMs * 1000),
      inputTokens: record.inputTokens,
      outputTokens: record.outputTokens,
      model: record.model,
      tenant: record.tenant,
      outcome: record.outcome,
    };
    if (record.maxTokens !== undefined) request.maxTokens = record.maxTokens;
    if (record.session !== undefined) request.session = record.session;
    if (record.prefix.length > 0) {
      request.prefix = record.prefix;
      request.blockTokens = PREFIX_BLOCK_TOKENS;
    }
    if (record.question !== undefined) {
      request.question = record.question;
      if (record.outputTokens > 0) this.#remember(record.question, record.outputTokens);
      else if (record.outcome === "ok") {
        request.outputTokens = this.#answers.get(record.question) ?? 0;
      }
    }
    return request;
  }

  #remember(question: string, outputTokens: number): void {
    this.#answers.delete(question);
    this.#answers.set(question, outputTokens);
    if (this.#answers.size <= ANSWERS_MAX) return;
    const oldest = this.#answers.keys().next();
    if (!oldest.done) this.#answers.delete(oldest.value);
  }
}

/** Chained ids of whole blocks of a text made of segments. */
class BlockChain {
  readonly ids: number[] = [];
  readonly #blockTokens: number;
  readonly #blocksMax: number;
  #hash = 0;
  #filled = 0;

  constructor(blockTokens: number, blocksMax: number) {
    this.#blockTokens = blockTokens;
    this.#blocksMax = blocksMax;
  }

  append(part: number, id: number, tokens: number): void {
    this.#hash = chainHash(chainHash(this.#hash, part), id);
    let left = tokens;
    while (left > 0 && this.ids.length < this.#blocksMax) {
      const taken = Math.min(left, this.#blockTokens - this.#filled);
      left -= taken;
      this.#filled += taken;
      if (this.#filled < this.#blockTokens) return;
      this.#filled = 0;
      // The hash tells the segments so far; how far into the last one the block reaches tells the rest.
      this.ids.push(chainHash(this.#hash, tokens - left));
    }
  }
}

/** A 53-bit hash of two whole numbers of at most 53 bits: equal pairs, equal hash. Not for secrets. */
export function chainHash(previous: number, value: number): number {
  const valueHigh = Math.floor(value / 4294967296);
  let low = Math.imul((previous >>> 0) ^ Math.imul(value >>> 0, 0x9e3779b1), 0x85ebca6b);
  let high = Math.floor(previous / 4294967296) ^ Math.imul(valueHigh + 0x27d4eb2f, 0xc2b2ae35);
  high = Math.imul(high ^ low ^ (low >>> 15), 0x2c1b3c6d);
  low = Math.imul(low ^ (low >>> 13) ^ (high >>> 12), 0x297a2d39);
  high ^= low >>> 16;
  low ^= low >>> 15;
  return (high & 0x1fffff) * 4294967296 + (low >>> 0);
}

/** The named columns of CSV rows: plain cells, no quoting, extra columns ignored. */
class CsvCells {
  readonly #index = new Map<string, number>();
  readonly #columns: number;
  #cells: string[] = [];

  constructor(header: string, required: readonly string[]) {
    const columns = columnsOf(header);
    columns.forEach((name, index) => {
      this.#index.set(name, index);
    });
    this.#columns = columns.length;
    const missing = required.filter((name) => !this.#index.has(name));
    if (missing.length > 0) {
      throw new RowProblem(
        `missing column${missing.length > 1 ? "s" : ""} ${missing.join(", ")}; ` +
          `found ${columns.map((name) => JSON.stringify(name.slice(0, 40))).join(", ")}`,
      );
    }
  }

  split(line: string): void {
    this.#cells = line.split(",");
    if (this.#cells.length !== this.#columns) {
      throw new RowProblem(
        `${this.#cells.length} columns; the header has ${this.#columns}`,
        this.#cells.length < this.#columns,
      );
    }
  }

  text(name: string): string {
    return (this.#cells[this.#index.get(name) ?? -1] ?? "").trim();
  }

  count(name: string): number {
    const text = this.text(name);
    if (text === "") throw new RowProblem(`${name} is empty`, true);
    return checkedCount(name, Number(text), text);
  }
}

function cellsOf(cells: CsvCells | null, line: string): CsvCells {
  if (cells === null) throw new RowProblem("no header line came before the first row");
  cells.split(line);
  return cells;
}

/** A slice of a line keeps the whole chunk of the file alive; who keeps a name must not keep that. */
function copied(text: string): string {
  return Buffer.from(text).toString();
}

function columnsOf(line: string): string[] {
  return line.split(",").map((name) => name.trim());
}

function jsonFields(line: string): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch {
    throw new RowProblem("not JSON", true);
  }
  if (!isObject(value)) throw new RowProblem("not a JSON object");
  return value;
}

function countOf(fields: Record<string, unknown>, name: string): number {
  const value = fields[name];
  if (value === undefined) throw missingField(fields, name);
  return checkedCount(name, typeof value === "number" ? value : Number.NaN, String(value));
}

function idsOf(fields: Record<string, unknown>, name: string): number[] {
  const value = fields[name];
  if (value === undefined) throw missingField(fields, name);
  if (Array.isArray(value) && value.every((id) => Number.isSafeInteger(id) && id >= 0))
    return value;
  throw new RowProblem(`${name} must be a list of whole numbers, 0 or more`);
}

function missingField(fields: Record<string, unknown>, name: string): RowProblem {
  const found = Object.keys(fields).slice(0, 16).join(", ");
  return new RowProblem(`missing ${name}; found ${found === "" ? "no field" : found}`);
}

function checkedCount(name: string, value: number, shown: string): number {
  if (Number.isSafeInteger(value) && value >= 0) return value;
  throw new RowProblem(
    `${name} is ${JSON.stringify(shown.slice(0, 40))}; it must be a whole number, 0 or more`,
  );
}

/** A time stated as a number, or as a number in a string. */
function timeUs(name: string, value: unknown, unitUs: number): number {
  if (value === undefined) throw new RowProblem(`missing ${name}`);
  const number = typeof value === "string" && value.trim() !== "" ? Number(value) : value;
  const atUs = typeof number === "number" ? Math.round(number * unitUs) : Number.NaN;
  if (Number.isSafeInteger(atUs) && atUs >= 0) return atUs;
  throw new RowProblem(
    `${name} is ${JSON.stringify(String(value).slice(0, 40))}; it must be a time, 0 or more`,
  );
}

const azureTime = /^(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?$/;

/** `YYYY-MM-DD HH:MM:SS.fffffff`, read as UTC. A Date holds only ms, so the fraction is read apart. */
function azureTimeUs(text: string): number {
  const match = azureTime.exec(text);
  const [, year, month, day, hour, minute, second, fraction] = match ?? [];
  const secondsMs = Date.UTC(
    +(year ?? ""),
    +(month ?? "") - 1,
    +(day ?? ""),
    +(hour ?? ""),
    +(minute ?? ""),
    +(second ?? ""),
  );
  if (match === null || Number.isNaN(secondsMs)) {
    throw new RowProblem(
      `TIMESTAMP is ${JSON.stringify(text.slice(0, 40))}; it must be like 2023-11-16 18:15:46.6805900`,
    );
  }
  return secondsMs * 1000 + Math.round(Number(`0.${fraction ?? "0"}`) * 1_000_000);
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
