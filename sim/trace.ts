/**
 * Load traces: files of recorded requests, read as streams and shaped into the load that one wants.
 *
 *   lines → rows (trace-rows.ts) → order → [from, to) → copies → speed → limit
 *
 * A file is never held: memory is one chunk of it and one bounded window for putting rows in order. Every
 * pass opens the file anew, so that `requests()` may be called again. It owns files and positions; what a row
 * means stands in trace-rows.ts, made-up loads in load-generators.ts, statistics in trace-statistics.ts.
 *
 * Order: most formats are sorted, and a time that steps back is an error. RAGPulse (two interleaved weeks, one
 * after the other) and our own recordings (in order of ends) go through a window of `REORDER_MAX` requests.
 * Mooncake's times were rounded to marks 3 s apart: left so they look like bursts that never were (CV 3.0
 * instead of 1.0), so each mark's requests are spread uniformly over its 3 s, in file order.
 */
import { createReadStream } from "node:fs";
import { dirname, join } from "node:path";
import { unreachable } from "../runtime/actor.ts";
import { Random } from "../runtime/random.ts";
import { MinHeap } from "./min-heap.ts";
import {
  AzureRows,
  BurstGptRows,
  chainHash,
  detectTraceFormat,
  HeadraceRows,
  isTraceFormat,
  MooncakeRows,
  type QuestionOf,
  RagPulseRows,
  type RowParser,
  RowProblem,
  ragParts,
  type TraceFormat,
  type TraceRequest,
  traceFormats,
} from "./trace-rows.ts";

/** Requests held to be put in order; a request further out of place than this is an error. */
const REORDER_MAX = 65_536;
/** Requests on one Mooncake mark that are held to be spread. */
const MARK_REQUESTS_MAX = 65_536;
const MARK_US = 3_000_000;
/** Stamps lie up to 3 ms beside their mark: the marks were made by a timer. */
const MARK_SLACK_US = 10_000;
/** Characters of one line: 4 Mi, far beyond the longest prompt's block ids. */
const LINE_CHARS_MAX = 4_194_304;
/** Segments of a RAGPulse data set, whose lengths are held in memory. */
const SEGMENTS_MAX = 4_194_304;
/** Each copy holds a file open. */
const COPIES_MAX = 100;
/** Equal gaps in a row that make a BurstGPT file suspect: a made-up one (a row a second) is in circulation. */
const CONSTANT_GAPS = 100;

export type TraceOptions = {
  /** One of `traceFormats`; absent: told from the first line. */
  format?: string;
  /** Mooncake only: spread the requests of each 3 s mark (default), or leave the times as they are. */
  spread?: boolean;
  /** Seed of the spreading; default 1. */
  seed?: number | string;
  /**
   * RAGPulse only: what makes two requests the same `question`. `request` (default): the whole prompt, as a cache
   * in front of the model sees it. `user_turn`: the user's words, as one in front of the whole service would.
   */
  questionOf?: QuestionOf;
  /** Keeps what arrives in [fromUs, toUs), µs after the trace's first request; time then starts at `fromUs`. */
  fromUs?: number;
  toUs?: number;
  /**
   * Superposes this many copies (1…100), copy i moved forward by i × shiftUs and wrapped at the window's end. Each
   * copy has its own sessions, questions and prompt blocks: more users, not the same users faster.
   */
  copies?: number;
  /** Default: the window divided by `copies`. With a daily cycle, 24 h keeps the cycle. */
  shiftUs?: number;
  /** Compresses time: 2 sends the same requests in half the time. */
  speed?: number;
  /** Requests at most, after everything else. */
  limit?: number;
};

/** A trace or an option that cannot be used; the message says where, what was found and what is accepted. */
export class TraceError extends Error {
  override readonly name = "TraceError";
}

export type Trace = {
  readonly file: string;
  readonly format: TraceFormat;
  /**
   * A pass over the load, in order of `atUs`, from 0. May be called again, for the same requests again.
   * Throws TraceError at the row that is wrong.
   */
  requests(): AsyncGenerator<TraceRequest, void, undefined>;
  /** What the passes so far left out or found odd, each thing once. */
  warnings(): readonly string[];
  /** Rows that the last whole pass over the file left out: cut off at the end, or of a kind without a load. */
  skippedRows(): number;
};

/**
 * Opens a trace and reads its first line, so that a wrong file or option fails here, before any load is made.
 * Throws TraceError.
 */
export async function openTrace(file: string, options: TraceOptions = {}): Promise<Trace> {
  checkOptions(options);
  const known = traceFormats.join(", ");
  if (options.format !== undefined && !isTraceFormat(options.format)) {
    throw new TraceError(`unknown trace format "${options.format}"; known: ${known}`);
  }
  const first = await firstLine(file);
  if (first === undefined) throw new TraceError(`${file}: empty file`);
  const format = options.format ?? detectTraceFormat(first);
  if (format === undefined) {
    throw new TraceError(
      `${file}, line 1: fits none of the formats ${known}: ${JSON.stringify(first.slice(0, 80))}`,
    );
  }
  const lengths = format === "ragpulse" ? await segmentLengths(dirname(file)) : [];
  return new FileTrace(file, format, options, lengths);
}

function checkOptions(options: TraceOptions): void {
  const {
    fromUs = 0,
    toUs = Number.POSITIVE_INFINITY,
    copies = 1,
    shiftUs,
    speed = 1,
    limit,
  } = options;
  const wrong = (text: string) => new TraceError(text);
  if (!(fromUs >= 0)) throw wrong(`from is ${fromUs}; it must be 0 or more`);
  if (!(toUs > fromUs)) throw wrong(`to is ${toUs}; it must be later than from (${fromUs})`);
  if (!Number.isInteger(copies) || copies < 1 || copies > COPIES_MAX) {
    throw wrong(`copies is ${copies}; it must be a whole number from 1 to ${COPIES_MAX}`);
  }
  if (shiftUs !== undefined && !(shiftUs >= 0 && Number.isFinite(shiftUs))) {
    throw wrong(`the shift is ${shiftUs}; it must be a time, 0 or more`);
  }
  if (!(speed > 0 && Number.isFinite(speed))) throw wrong(`speed is ${speed}; it must be above 0`);
  if (limit !== undefined && !(Number.isInteger(limit) && limit >= 1)) {
    throw wrong(`limit is ${limit}; it must be a whole number, 1 or more`);
  }
}

class FileTrace implements Trace {
  readonly file: string;
  readonly format: TraceFormat;
  readonly #options: TraceOptions;
  /** Of RAGPulse; empty for other formats. */
  readonly #segmentLengths: ReadonlyMap<number, number>[];
  readonly #warnings = new Set<string>();
  #skippedRows = 0;
  /** Length of the window when copies wrap at its end; found by a first pass. */
  #periodUs: number | null = null;

  constructor(
    file: string,
    format: TraceFormat,
    options: TraceOptions,
    segmentLengths: ReadonlyMap<number, number>[],
  ) {
    this.file = file;
    this.format = format;
    this.#options = options;
    this.#segmentLengths = segmentLengths;
  }

  warnings(): readonly string[] {
    return [...this.#warnings];
  }

  skippedRows(): number {
    return this.#skippedRows;
  }

  async *requests(): AsyncGenerator<TraceRequest, void, undefined> {
    const { fromUs = 0, toUs = Number.POSITIVE_INFINITY, copies = 1, speed = 1 } = this.#options;
    const { limit = Number.POSITIVE_INFINITY } = this.#options;
    const load = copies === 1 ? this.#window(fromUs, toUs) : this.#superposed(fromUs, copies);
    let count = 0;
    for await (const request of load) {
      if (speed !== 1) request.atUs = Math.round(request.atUs / speed);
      yield request;
      count++;
      if (count >= limit) return;
    }
    if (count === 0) {
      const until = Number.isFinite(toUs) ? ` and before ${toUs / 1e6} s` : "";
      throw new TraceError(
        `${this.file}: no request from ${fromUs / 1e6} s after its first on${until}`,
      );
    }
  }

  /** What arrives in [fromUs, toUs), with time starting at `fromUs`. */
  async *#window(fromUs: number, toUs: number): AsyncGenerator<TraceRequest, void, undefined> {
    let originUs: number | null = null;
    for await (const batch of this.#inOrder()) {
      for (const request of batch) {
        originUs ??= request.atUs;
        request.atUs -= originUs + fromUs;
        if (request.atUs < 0) continue;
        if (request.atUs >= toUs - fromUs) return;
        yield request;
      }
    }
  }

  /** Copies of the window, each moved by its shift and wrapped, merged by arrival. */
  async *#superposed(
    fromUs: number,
    copies: number,
  ): AsyncGenerator<TraceRequest, void, undefined> {
    this.#periodUs ??= await this.#measurePeriod();
    const periodUs = this.#periodUs;
    const shiftUs = Math.round(this.#options.shiftUs ?? periodUs / copies);
    const streams: AsyncGenerator<TraceRequest, void, undefined>[] = [];
    try {
      const heads: IteratorResult<TraceRequest, void>[] = [];
      for (let copy = 0; copy < copies; copy++) {
        const stream = this.#shifted(fromUs, periodUs, (copy * shiftUs) % periodUs, copy);
        streams.push(stream);
        heads.push(await stream.next());
      }
      for (;;) {
        let first = -1;
        let firstAtUs = Number.POSITIVE_INFINITY;
        heads.forEach((head, copy) => {
          if (head.done || head.value.atUs >= firstAtUs) return;
          first = copy;
          firstAtUs = head.value.atUs;
        });
        const head = heads[first];
        const stream = streams[first];
        if (head === undefined || head.done || stream === undefined) return;
        yield head.value;
        heads[first] = await stream.next();
      }
    } finally {
      for (const stream of streams) await stream.return(); // Closes their files.
    }
  }

  async *#shifted(
    fromUs: number,
    periodUs: number,
    offsetUs: number,
    copy: number,
  ): AsyncGenerator<TraceRequest, void, undefined> {
    for await (const request of this.#window(fromUs + offsetUs, fromUs + periodUs)) {
      yield asCopy(request, copy);
    }
    if (offsetUs === 0) return;
    for await (const request of this.#window(fromUs, fromUs + offsetUs)) {
      request.atUs += periodUs - offsetUs;
      yield asCopy(request, copy);
    }
  }

  /** The window's length: as stated, or up to the last request and one mean gap more. */
  async #measurePeriod(): Promise<number> {
    const { fromUs = 0, toUs = Number.POSITIVE_INFINITY } = this.#options;
    let count = 0;
    let lastUs = 0;
    for await (const request of this.#window(fromUs, toUs)) {
      count++;
      lastUs = request.atUs;
    }
    const untilLastUs = lastUs + Math.round(lastUs / Math.max(1, count - 1));
    const periodUs = Math.min(toUs - fromUs, untilLastUs);
    if (count < 2 || periodUs < 1) {
      throw new TraceError(
        `${this.file}: copies need a window with two requests at different times`,
      );
    }
    return periodUs;
  }

  /** All requests in order of arrival, on the file's own clock, a batch for each chunk read. */
  async *#inOrder(): AsyncGenerator<TraceRequest[], void, undefined> {
    const parser = this.#rowParser();
    const order = this.#order();
    const gaps = this.format === "burstgpt" ? new GapWatch() : null;
    const skipped = new Map<string, number>();
    let headerDue = parser.header !== undefined;
    let count = 0;
    for await (const lines of lineBatches(this.file)) {
      const batch: TraceRequest[] = [];
      for (const { text, number, last } of lines) {
        try {
          if (headerDue) {
            parser.header?.(text);
            headerDue = false;
            continue;
          }
          const row = parser.row(text);
          if ("skipped" in row) {
            skipped.set(row.skipped, (skipped.get(row.skipped) ?? 0) + 1);
            continue;
          }
          count++;
          if (gaps?.add(row.atUs)) {
            this.#warnings.add(
              `${this.file}: all gaps are equal: this looks like a made-up BurstGPT file`,
            );
          }
          order.push(row, number, batch);
        } catch (error) {
          if (!(error instanceof RowProblem)) throw error;
          if (!(last && error.incomplete)) {
            throw new TraceError(`${this.file}, line ${number}: ${error.message}`);
          }
          skipped.set("rows cut off at the end", 1);
          this.#warnings.add(
            `${this.file}, line ${number}: the last line is cut off (${error.message}); it was left out`,
          );
        }
      }
      yield batch;
    }
    const rest: TraceRequest[] = [];
    order.end(rest);
    this.#skippedRows = 0;
    for (const [what, rows] of skipped) {
      this.#skippedRows += rows;
      if (what === "embeddings requests") {
        this.#warnings.add(`${this.file}: ${rows} ${what} were left out`);
      }
    }
    if (count === 0) throw new TraceError(`${this.file}: holds no requests`);
    yield rest;
  }

  #rowParser(): RowParser {
    switch (this.format) {
      case "azure2023":
        return new AzureRows();
      case "burstgpt":
        return new BurstGptRows();
      case "mooncake":
        return new MooncakeRows();
      case "ragpulse":
        return new RagPulseRows(this.#segmentLengths, this.#options.questionOf ?? "request");
      case "headrace":
        return new HeadraceRows(() => {
          this.#warnings.add(
            `${this.file}: holds several recordings; each goes on where the one before it ended`,
          );
        });
      default:
        return unreachable(this.format);
    }
  }

  #order(): Order {
    switch (this.format) {
      case "azure2023":
      case "burstgpt":
        return new Sorted();
      case "mooncake":
        if (this.#options.spread === false) return new Sorted();
        return new SpreadMarks(new Random(this.#options.seed ?? 1).split("mooncake marks"));
      case "ragpulse":
      case "headrace":
        return new ReorderWindow();
      default:
        return unreachable(this.format);
    }
  }
}

/** Makes requests come out in order of arrival. `push` throws RowProblem. */
type Order = {
  push(request: TraceRequest, line: number, out: TraceRequest[]): void;
  end(out: TraceRequest[]): void;
};

class Sorted implements Order {
  #lastUs = 0;
  #lastLine = 0;

  push(request: TraceRequest, line: number, out: TraceRequest[]): void {
    this.check(request.atUs, line);
    out.push(request);
  }

  check(atUs: number, line: number): void {
    if (atUs < this.#lastUs) {
      const seconds = (this.#lastUs - atUs) / 1e6;
      throw new RowProblem(
        `its time is ${seconds} s before that of line ${this.#lastLine}; rows must be sorted`,
      );
    }
    this.#lastUs = atUs;
    this.#lastLine = line;
  }

  end(): void {}
}

/** Holds the requests of one 3 s mark, then gives them times spread over it; their order stays. */
class SpreadMarks implements Order {
  readonly #random: Random;
  #held: TraceRequest[] = [];
  #markUs = 0;
  readonly #sorted = new Sorted();

  constructor(random: Random) {
    this.#random = random;
  }

  push(request: TraceRequest, line: number, out: TraceRequest[]): void {
    const markUs = Math.round(request.atUs / MARK_US) * MARK_US;
    if (Math.abs(markUs - request.atUs) > MARK_SLACK_US) {
      throw new RowProblem(
        `timestamp ${request.atUs / 1000} ms is on no 3 s mark: these times were not rounded, so read them raw ` +
          "(`spread: false`, `--raw-times`)",
      );
    }
    request.atUs = markUs;
    this.#sorted.check(markUs, line);
    if (markUs !== this.#markUs) this.end(out);
    this.#markUs = markUs;
    this.#held.push(request);
    if (this.#held.length > MARK_REQUESTS_MAX) {
      throw new RowProblem(`more than ${MARK_REQUESTS_MAX} requests on one 3 s mark`);
    }
  }

  end(out: TraceRequest[]): void {
    const offsets = Float64Array.from(this.#held, () =>
      Math.floor(this.#random.next() * MARK_US),
    ).sort();
    this.#held.forEach((request, index) => {
      request.atUs += offsets[index] ?? 0;
      out.push(request);
    });
    this.#held = [];
  }
}

/** Holds the last `REORDER_MAX` requests and lets the earliest go: stable, and bounded. */
class ReorderWindow implements Order {
  readonly #held = new MinHeap<HeldRequest>(isBefore);
  #lastUs = 0;

  push(request: TraceRequest, line: number, out: TraceRequest[]): void {
    if (request.atUs < this.#lastUs) {
      const seconds = (this.#lastUs - request.atUs) / 1e6;
      throw new RowProblem(
        `its time is out of order by more than ${REORDER_MAX} requests (${seconds} s too late); ` +
          "sort the file by time first",
      );
    }
    this.#held.add({ request, line });
    if (this.#held.size > REORDER_MAX) this.#takeFirst(out);
  }

  end(out: TraceRequest[]): void {
    while (this.#held.size > 0) this.#takeFirst(out);
  }

  #takeFirst(out: TraceRequest[]): void {
    const first = this.#held.take();
    if (first === undefined) return;
    this.#lastUs = first.request.atUs;
    out.push(first.request);
  }
}

type HeldRequest = { request: TraceRequest; line: number };

function isBefore(left: HeldRequest, right: HeldRequest): boolean {
  const byTime = left.request.atUs - right.request.atUs;
  return byTime < 0 || (byTime === 0 && left.line < right.line);
}

class GapWatch {
  #lastUs = -1;
  #gapUs = -1;
  #equal = 0;

  /** True once, when the first `CONSTANT_GAPS` gaps were all equal. */
  add(atUs: number): boolean {
    const gapUs = atUs - this.#lastUs;
    if (this.#lastUs >= 0 && this.#equal >= 0) {
      if (this.#gapUs >= 0 && gapUs !== this.#gapUs) this.#equal = -1;
      else this.#equal++;
      this.#gapUs = gapUs;
    }
    this.#lastUs = atUs;
    return this.#equal === CONSTANT_GAPS;
  }
}

/** A request of another copy: other users, sessions and texts, so that copies share no cache. */
function asCopy(request: TraceRequest, copy: number): TraceRequest {
  if (copy === 0) return request;
  if (request.session !== undefined) request.session = `${request.session}~${copy}`;
  if (request.question !== undefined) request.question = `${request.question}~${copy}`;
  if (request.prefix !== undefined)
    request.prefix = request.prefix.map((id) => chainHash(copy, id));
  return request;
}

type Line = { text: string; number: number; last: boolean };

/** Non-empty lines, a batch for each chunk of the file; `last`: ends the file without a line break. */
async function* lineBatches(file: string): AsyncGenerator<Line[], void, undefined> {
  let number = 0;
  let rest = "";
  try {
    for await (const chunk of createReadStream(file, {
      encoding: "utf8",
      highWaterMark: 262_144,
    })) {
      const lines: Line[] = [];
      const parts = (rest + chunk).split("\n");
      rest = parts.pop() ?? "";
      for (const part of parts) {
        number++;
        const text = number === 1 ? part.replace(/^\uFEFF/, "").trimEnd() : part.trimEnd();
        if (text !== "") lines.push({ text, number, last: false });
      }
      if (rest.length > LINE_CHARS_MAX) {
        throw new TraceError(
          `${file}, line ${number + 1}: longer than ${LINE_CHARS_MAX} characters`,
        );
      }
      yield lines;
    }
  } catch (error) {
    throw error instanceof TraceError ? error : new TraceError(readProblem(file, error));
  }
  const text = rest.replace(/^\uFEFF/, "").trimEnd();
  if (text !== "") yield [{ text, number: number + 1, last: true }];
}

function readProblem(file: string, error: unknown): string {
  const code = error instanceof Error && "code" in error ? String(error.code) : "";
  if (code === "ENOENT") return `${file}: no such file`;
  if (code === "EISDIR") return `${file}: is a folder, not a file`;
  if (code === "EACCES") return `${file}: may not be read`;
  return `${file}: cannot be read (${error instanceof Error ? error.message : String(error)})`;
}

async function firstLine(file: string): Promise<string | undefined> {
  for await (const [line] of lineBatches(file)) if (line !== undefined) return line.text;
  return undefined;
}

/** Token lengths of RAGPulse's segments, from the files beside the trace, in the order of `ragParts`. */
async function segmentLengths(folder: string): Promise<ReadonlyMap<number, number>[]> {
  const all: ReadonlyMap<number, number>[] = [];
  let count = 0;
  for (const { file: name, id } of ragParts) {
    const file = join(folder, name);
    const lengths = new Map<number, number>();
    for await (const lines of lineBatches(file)) {
      for (const { text, number } of lines) {
        const entry = segmentLength(text, id);
        if (entry === undefined) {
          throw new TraceError(
            `${file}, line ${number}: must be like {"${id}": 8302, "token_length": 512}`,
          );
        }
        lengths.set(entry[0], entry[1]);
        count++;
        if (count > SEGMENTS_MAX)
          throw new TraceError(`${file}: more than ${SEGMENTS_MAX} segments`);
      }
    }
    all.push(lengths);
  }
  return all;
}

function segmentLength(line: string, idName: string): [id: number, tokens: number] | undefined {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch {
    return undefined;
  }
  if (typeof value !== "object" || value === null) return undefined;
  const fields = value as Record<string, unknown>;
  const id = fields[idName];
  const tokens = fields.token_length;
  if (typeof id !== "number" || typeof tokens !== "number") return undefined;
  return Number.isSafeInteger(id) && Number.isSafeInteger(tokens) && tokens >= 0
    ? [id, tokens]
    : undefined;
}
