/**
 * Answers as OpenAI's API has them, whole and streamed: reads a node's stream, judges whole answers, and
 * turns one form into the other. Pure: bytes in, bytes and facts out.
 *
 * A stream is passed on byte for byte. JSON is parsed only until the first content, and later only for events
 * whose bytes show that they say more than text (a finish, a usage, an error); the others are counted.
 * Parsing every event would cost more than all the rest of the gateway.
 */

import type { Route, Usage } from "../actors/protocol.ts";
import { assert } from "../runtime/actor.ts";
import type { AnswerPart } from "./data-plane.ts";

type Json = Record<string, unknown>;

// ---- streams: reading what a node sends ---------------------------------------------------------------------

/** Bounds of what a scanner holds. */
export type SseLimits = {
  /** One event, bytes. */
  eventBytesMax: number;
  /** All that comes before the first content, bytes. */
  headBytesMax: number;
};

/** Why a stream can be believed no further. Nothing of the event at fault is passed on. */
export type SseFault =
  /** The node says it failed. `text` is its JSON: it may quote the prompt, so it is never logged. */
  | { kind: "error_event"; text: string; status?: number }
  | { kind: "event_too_long" }
  | { kind: "head_too_long" }
  | { kind: "not_json" };

const LF = 10;
const CR = 13;
const SPACE = 32;
const QUOTE = 34;
const COLON = 58;
const BRACKET_OPEN = 91;
const BRACKET_CLOSE = 93;
const LETTER_N = 110; // Of `null`.

const nothing: readonly AnswerPart[] = [];
const doneEvent = Buffer.from("data: [DONE]\n\n");
const blankLine = Buffer.from("\n\n");

/**
 * Follows one SSE stream of a chat or completions answer. Lines end in LF or CRLF (a lone CR is not taken for
 * a line's end). Everything before the first content token is held back, so that a failure until then can
 * still be retried elsewhere; the bytes of an unfinished event are held until its end has come, so that what
 * goes out always ends with a whole event.
 */
export class SseScanner {
  readonly #limits: SseLimits;
  /** Content (or a finish) has come: what is held, and all that follows, goes out. */
  released = false;
  /** Events that carried content: about one per token. */
  contentEvents = 0;
  /** One for each choice that ended, in order of ending. */
  readonly finishReasons: string[] = [];
  /** `[DONE]` has come; bytes after it are ignored. */
  done = false;
  /** As the engine stated it last; null while it has not. */
  usage: Usage | null = null;
  fault: SseFault | null = null;

  #held: AnswerPart[] = []; // Whole events from before the first content.
  #heldBytes = 0;
  #tail: Buffer[] = []; // An event whose end has not come.
  #tailBytes = 0;
  #lineBytes = 0; // Of its unfinished line.
  #lineIsCr = false; // That line is one CR so far: blank, if LF follows.
  #atStart = true; // A byte order mark may come.

  constructor(limits: SseLimits) {
    this.#limits = limits;
  }

  /** The stream came to a proper end: a finish, or content and then `[DONE]`; some engines leave one out. */
  get complete(): boolean {
    return this.finishReasons.length > 0 || (this.done && this.released);
  }

  /** Takes the next bytes; returns what goes on to the client now, in order, in as few parts as can be. */
  push(bytes: Uint8Array): readonly AnswerPart[] {
    if (this.fault !== null || this.done || bytes.byteLength === 0) return nothing;
    const chunk = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const out: AnswerPart[] = [];
    // A run of whole events that go out together: `lead`, then chunk[runFrom .. eventFrom).
    let lead = this.#tail;
    let runFrom = 0;
    let eventFrom = 0;
    while (!this.done) {
      const eventTo = this.#eventEnd(chunk, eventFrom);
      if (eventTo === -1) break;
      const spans = eventFrom === 0 && lead.length > 0;
      const rest = chunk.subarray(eventFrom, eventTo);
      const event = spans ? Buffer.concat([...lead, rest]) : rest;
      const verdict = this.#readEvent(event, !this.released);
      if (verdict !== "plain") {
        if (!spans) pass(out, lead, chunk.subarray(runFrom, eventFrom), false);
        if (verdict === "fault") return this.#release(out);
        pass(out, [], event, true);
        lead = [];
        runFrom = eventTo;
      }
      eventFrom = eventTo;
    }
    if (eventFrom > 0) {
      pass(out, lead, chunk.subarray(runFrom, eventFrom), false);
      this.#tail = [];
      this.#tailBytes = 0;
    }
    if (!this.done) this.#keepTail(chunk, eventFrom);
    return this.#release(out);
  }

  /** The stream is over: what may still go out. Without a proper end (`complete`), an unfinished event is dropped. */
  end(): readonly AnswerPart[] {
    if (this.fault !== null) return nothing;
    const out: AnswerPart[] = [];
    if (this.#tailBytes > 0 && !this.done) {
      const event = Buffer.concat(this.#tail);
      // Parsed in any case: the event may have been cut off in its middle.
      const verdict = this.#readEvent(event, true);
      if (verdict === "fault" && this.#faultKind() === "not_json") this.fault = null;
      else if (verdict !== "fault") {
        pass(out, [], event, verdict === "usage");
        pass(out, [], blankLine, false);
      }
    }
    if (this.complete && !this.done && this.fault === null) pass(out, [], doneEvent, false);
    return this.#release(out);
  }

  /** Index after the blank line that ends the event at `from`, or -1 when that line is not in this chunk. */
  #eventEnd(chunk: Buffer, from: number): number {
    let lineFrom = from;
    for (;;) {
      const lf = chunk.indexOf(LF, lineFrom);
      if (lf === -1) return -1;
      const length = this.#lineBytes + lf - lineFrom;
      const isCr = length === 1 && (lf > lineFrom ? chunk[lf - 1] === CR : this.#lineIsCr);
      this.#lineBytes = 0;
      lineFrom = lf + 1;
      if (length === 0 || isCr) return lineFrom;
    }
  }

  #keepTail(chunk: Buffer, from: number): void {
    if (from === chunk.length) return;
    this.#tail.push(chunk.subarray(from));
    this.#tailBytes += chunk.length - from;
    const lineFrom = chunk.lastIndexOf(LF) + 1;
    // Without LF in this chunk the line goes on that an earlier one began.
    if (lineFrom === 0) this.#lineBytes += chunk.length;
    else this.#lineBytes = chunk.length - lineFrom;
    if (this.#lineBytes === 1) this.#lineIsCr = chunk[chunk.length - 1] === CR;
    if (this.#tailBytes > this.#limits.eventBytesMax) this.fault = { kind: "event_too_long" };
  }

  /** Until content has come, keeps `out` back; then gives it out behind what was kept. */
  #release(out: AnswerPart[]): readonly AnswerPart[] {
    if (!this.released) {
      for (const part of out) {
        this.#held.push(part);
        this.#heldBytes += part.bytes.byteLength;
      }
      if (this.#heldBytes > this.#limits.headBytesMax) this.fault ??= { kind: "head_too_long" };
      return nothing;
    }
    if (this.#held.length === 0) return out;
    const parts = [...this.#held, ...out];
    this.#held = [];
    return merged(parts);
  }

  #faultKind(): SseFault["kind"] | undefined {
    return this.fault?.kind;
  }

  /** @param parse judge by the JSON, not by its bytes. */
  #readEvent(event: Buffer, parse: boolean): "plain" | "usage" | "fault" {
    if (event.length > this.#limits.eventBytesMax) return this.#fail({ kind: "event_too_long" });
    let lineFrom = 0;
    if (this.#atStart) {
      this.#atStart = false;
      if (event[0] === 0xef && event[1] === 0xbb && event[2] === 0xbf) lineFrom = 3;
    }
    let dataFrom = -1;
    let dataTo = -1;
    let lines: string[] | null = null; // Only where there is more than one line of data.
    while (lineFrom < event.length) {
      const lf = event.indexOf(LF, lineFrom);
      const lineEnd = lf === -1 ? event.length : lf;
      const lineTo = lineEnd > lineFrom && event[lineEnd - 1] === CR ? lineEnd - 1 : lineEnd;
      if (isDataLine(event, lineFrom, lineTo)) {
        if (dataFrom !== -1) lines = [...(lines ?? []), event.toString("utf8", dataFrom, dataTo)];
        dataFrom = lineFrom + 5;
        if (event[dataFrom] === SPACE) dataFrom++;
        dataTo = Math.max(lineTo, dataFrom);
      }
      lineFrom = lineEnd + 1;
    }
    if (dataFrom === -1 || (dataFrom === dataTo && lines === null)) return "plain";
    if (!parse && lines === null && isPlainContent(event, dataFrom, dataTo)) {
      this.contentEvents++;
      return "plain";
    }
    const last = event.toString("utf8", dataFrom, dataTo);
    return this.#readData(lines === null ? last : [...lines, last].join("\n"));
  }

  #readData(text: string): "plain" | "usage" | "fault" {
    if (text.trim() === "[DONE]") {
      this.done = true;
      return "plain";
    }
    const json = parseObject(text);
    if (json === null) return this.#fail({ kind: "not_json" });
    const error = errorIn(json);
    if (error !== null) return this.#fail({ kind: "error_event", text, ...statusOf(error, json) });
    const choices = arrayOf(json.choices);
    let content = false;
    for (const choice of choices) {
      if (!isObject(choice)) continue;
      if (hasContent(choice)) content = true;
      const reason = choice.finish_reason;
      if (typeof reason !== "string") continue;
      // What vLLM and SGLang call a generation that they broke off themselves.
      if (reason === "error" || reason === "abort")
        return this.#fail({ kind: "error_event", text });
      this.finishReasons.push(reason);
      this.released = true;
    }
    if (content) {
      this.contentEvents++;
      this.released = true;
    }
    if (!isObject(json.usage)) return "plain";
    this.usage = usageOf(json.usage);
    return choices.length === 0 ? "usage" : "plain";
  }

  #fail(fault: SseFault): "fault" {
    this.fault = fault;
    return "fault";
  }
}

function pass(out: AnswerPart[], lead: readonly Buffer[], bytes: Buffer, usage: boolean): void {
  if (lead.length === 0 && bytes.length === 0) return;
  out.push({ bytes: lead.length === 0 ? bytes : Buffer.concat([...lead, bytes]), usage });
}

/** Joins neighbours that are not usage events. */
function merged(parts: readonly AnswerPart[]): AnswerPart[] {
  const out: AnswerPart[] = [];
  let run: Uint8Array[] = [];
  const endRun = (): void => {
    const [only] = run;
    if (only === undefined) return;
    out.push({ bytes: run.length === 1 ? only : Buffer.concat(run), usage: false });
    run = [];
  };
  for (const part of parts) {
    if (!part.usage) run.push(part.bytes);
    else {
      endRun();
      out.push(part);
    }
  }
  endRun();
  return out;
}

function isDataLine(bytes: Buffer, from: number, to: number): boolean {
  return (
    to - from >= 5 &&
    bytes[from] === 100 &&
    bytes[from + 1] === 97 &&
    bytes[from + 2] === 116 &&
    bytes[from + 3] === 97 &&
    bytes[from + 4] === COLON
  );
}

const keys = {
  content: Buffer.from("content"), // Also reasoning_content.
  text: Buffer.from('"text'),
  reasoning: Buffer.from('"reasoning'),
  toolCalls: Buffer.from('"tool_calls'),
  choices: Buffer.from('"choices'),
  finishReason: Buffer.from('"finish_reason'),
  error: Buffer.from('"error'),
} as const;

/**
 * Whether an event's JSON surely brings content and nothing else of interest, told by its bytes. A quote and a
 * colon that follow each other end a key: within JSON text that quote is escaped, so that what stands before
 * it is a backslash and matches no key below.
 */
function isPlainContent(bytes: Buffer, from: number, to: number): boolean {
  let content = false;
  for (let i = from + 2; i < to; i++) {
    if (bytes[i] !== COLON || bytes[i - 1] !== QUOTE) continue;
    const keyTo = i - 1;
    let at = i + 1;
    while (bytes[at] === SPACE) at++;
    const value = bytes[at];
    switch (bytes[keyTo - 1]) {
      case 116: // t
        if (value !== QUOTE || bytes[at + 1] === QUOTE) break;
        if (endsWith(bytes, keyTo, keys.content) || endsWith(bytes, keyTo, keys.text))
          content = true;
        break;
      case 103: // g
        if (value !== QUOTE || bytes[at + 1] === QUOTE) break;
        if (endsWith(bytes, keyTo, keys.reasoning)) content = true;
        break;
      case 115: // s
        if (value !== BRACKET_OPEN) break;
        if (endsWith(bytes, keyTo, keys.toolCalls)) content ||= bytes[at + 1] !== BRACKET_CLOSE;
        else if (bytes[at + 1] === BRACKET_CLOSE && endsWith(bytes, keyTo, keys.choices))
          return false;
        break;
      case 110: // n
        if (value !== LETTER_N && endsWith(bytes, keyTo, keys.finishReason)) return false;
        break;
      case 114: // r
        if (value !== LETTER_N && endsWith(bytes, keyTo, keys.error)) return false;
        break;
    }
  }
  return content;
}

function endsWith(bytes: Buffer, to: number, key: Buffer): boolean {
  const from = to - key.length;
  if (from < 0) return false;
  for (let i = 0; i < key.length; i++) if (bytes[from + i] !== key[i]) return false;
  return true;
}

/** Text, reasoning, a refusal, tool calls: anything in a choice but its role, empty values and its end. */
function hasContent(choice: Json): boolean {
  if (typeof choice.text === "string" && choice.text !== "") return true;
  if (!isObject(choice.delta)) return false;
  for (const [key, value] of Object.entries(choice.delta)) {
    if (key === "role") continue;
    if (typeof value === "string" ? value !== "" : Array.isArray(value) && value.length > 0)
      return true;
    if (isObject(value)) return true;
  }
  return false;
}

// ---- whole answers ------------------------------------------------------------------------------------------

/** What a whole answer is: good, with what it says and whether it may be kept; or bad, and why. */
export type WholeVerdict =
  | {
      usage: Usage;
      finishReasons: readonly string[];
      /** Why this answer must not be kept; null when it may. */
      notStorable: string | null;
    }
  | { bad: string };

/**
 * Judges the body of a 200. Only an answer that is complete, plain text and well formed may be kept: a wrong
 * answer is worse than a miss. Embeddings may always be kept.
 */
export function checkWhole(route: Route, body: Uint8Array): WholeVerdict {
  const json = parseObject(textOf(body));
  return json === null ? { bad: "the body is not a JSON object" } : judge(route, json);
}

function judge(route: Route, json: Json): WholeVerdict {
  if (errorIn(json) !== null) return { bad: "an error body with a status of success" };
  const usage = usageOf(isObject(json.usage) ? json.usage : {});
  if (route === "embeddings") {
    const data = arrayOf(json.data);
    const wrong =
      data.length === 0 || data.some((item) => !isObject(item) || !isVector(item.embedding));
    if (wrong) return { bad: "no embeddings in `data`" };
    return { usage, finishReasons: [], notStorable: null };
  }
  const choices = arrayOf(json.choices);
  if (choices.length === 0) return { bad: "no `choices`" };
  const finishReasons: string[] = [];
  let notStorable: string | null = null;
  for (const choice of choices) {
    if (!isObject(choice)) return { bad: "a choice that is not an object" };
    if (route === "chat" && !isObject(choice.message)) return { bad: "a choice without `message`" };
    if (route === "completions" && typeof choice.text !== "string") {
      return { bad: "a choice without `text`" };
    }
    if (typeof choice.finish_reason === "string") finishReasons.push(choice.finish_reason);
    notStorable ??= whyNotStorable(choice);
  }
  return { usage, finishReasons, notStorable };
}

function whyNotStorable(choice: Json): string | null {
  const reason = choice.finish_reason;
  if (reason !== "stop") return `finish_reason ${typeof reason === "string" ? reason : "missing"}`;
  const { message } = choice;
  if (!isObject(message)) return choice.text === "" ? "empty" : null;
  if (arrayOf(message.tool_calls).length > 0) return "tool calls";
  if (isObject(message.function_call)) return "function call";
  if (typeof message.refusal === "string" && message.refusal !== "") return "refusal";
  if (isObject(message.audio)) return "audio";
  if (arrayOf(message.images).length > 0) return "images";
  if (typeof message.content !== "string") return "not text";
  return message.content === "" ? "empty" : null;
}

/** Numbers, or base64 of them. */
function isVector(value: unknown): boolean {
  return typeof value === "string" ? value !== "" : Array.isArray(value) && value.length > 0;
}

// ---- from a stream to a whole answer --------------------------------------------------------------------------

/** The whole answer of a stream; without `body` where the stream was not one. */
export type Assembled =
  | { body: Uint8Array; usage: Usage; notStorable: string | null }
  | { body?: undefined; bad: string };

/**
 * Makes of a stream's parts the JSON that the same request would have got without `stream`: every choice,
 * unknown text fields, log probabilities, tool calls (which are not storable) and usage.
 */
export function assembleAnswer(route: Route, parts: readonly AnswerPart[]): Assembled {
  const chunks = chunksIn(parts);
  if (chunks === null) return { bad: "an event that is not a JSON object" };
  if (chunks.length === 0) return { bad: "no events" };
  const whole: Json = {};
  const choices = new Map<number, Json>();
  let usage: Json | null = null;
  for (const chunk of chunks) {
    if (errorIn(chunk) !== null) return { bad: "an error event" };
    for (const [key, value] of Object.entries(chunk)) {
      if (key === "choices")
        for (const choice of arrayOf(value)) mergeChoice(route, choices, choice);
      else if (key === "usage") usage = isObject(value) ? value : usage;
      else if (key === "object") whole.object = route === "chat" ? "chat.completion" : value;
      else setIfUnset(whole, key, value);
    }
  }
  whole.choices = [...choices.keys()].sort((a, b) => a - b).map((index) => choices.get(index));
  if (usage !== null) whole.usage = usage;
  const verdict = judge(route, whole);
  if ("bad" in verdict) return verdict;
  const { usage: counted, notStorable } = verdict;
  return { body: Buffer.from(JSON.stringify(whole)), usage: counted, notStorable };
}

/** The JSON of all events but `[DONE]`; null when one is not an object. */
function chunksIn(parts: readonly AnswerPart[]): Json[] | null {
  const text = Buffer.concat(parts.map((part) => part.bytes)).toString("utf8");
  const events: string[] = [];
  let data: string | null = null;
  for (const line of text.split("\n")) {
    const value = line.endsWith("\r") ? line.slice(0, -1) : line;
    if (value === "") {
      if (data !== null && data.trim() !== "[DONE]" && data !== "") events.push(data);
      data = null;
    } else if (/^\uFEFF?data:/.test(value)) {
      const from = value.indexOf(":") + 1;
      const field = value.slice(value[from] === " " ? from + 1 : from);
      data = data === null ? field : `${data}\n${field}`;
    }
  }
  try {
    const chunks: unknown = JSON.parse(`[${events.join(",")}]`); // One call: far cheaper than many.
    return Array.isArray(chunks) && chunks.every(isObject) ? chunks : null;
  } catch {
    return null;
  }
}

function mergeChoice(route: Route, choices: Map<number, Json>, choice: unknown): void {
  if (!isObject(choice)) return;
  const index = typeof choice.index === "number" ? choice.index : 0;
  let whole = choices.get(index);
  if (whole === undefined) {
    whole =
      route === "chat"
        ? { index, message: {}, finish_reason: null }
        : { index, finish_reason: null };
    choices.set(index, whole);
  }
  for (const [key, value] of Object.entries(choice)) {
    if (key === "delta") {
      if (isObject(value) && isObject(whole.message)) mergeDelta(whole.message, value);
    } else if (key === "text") appendText(whole, key, value);
    else if (key === "logprobs") whole.logprobs = mergeLogprobs(whole.logprobs, value);
    else if (key !== "index" && (value !== null || whole[key] === undefined))
      set(whole, key, value);
  }
}

function mergeDelta(message: Json, delta: Json): void {
  for (const [key, value] of Object.entries(delta)) {
    if (key === "role") set(message, key, value);
    else if (key === "tool_calls" && Array.isArray(value)) mergeToolCalls(message, value);
    else if (typeof value === "string") appendText(message, key, value);
    else if (isObject(value)) message[key] = mergeTexts(message[key], value);
    else if (value !== null || message[key] === undefined) set(message, key, value);
  }
}

/** Pieces of calls, told apart by `index`; whole answers have none. */
function mergeToolCalls(message: Json, pieces: readonly unknown[]): void {
  const calls = Array.isArray(message.tool_calls) ? (message.tool_calls as unknown[]) : [];
  message.tool_calls = calls;
  for (const piece of pieces) {
    if (!isObject(piece)) continue;
    const { index, ...fields } = piece;
    const at =
      typeof index === "number" && index >= 0 && index <= calls.length ? index : calls.length;
    const call = calls[at];
    if (!isObject(call)) calls[at] = fields;
    else if (isObject(fields.function)) call.function = mergeTexts(call.function, fields.function);
  }
}

/** Objects whose texts come in pieces: a function's arguments, a transcript. */
function mergeTexts(into: unknown, piece: Json): Json {
  const whole = isObject(into) ? into : {};
  for (const [key, value] of Object.entries(piece)) {
    if (typeof value === "string") appendText(whole, key, value);
    else if (value !== null || whole[key] === undefined) set(whole, key, value);
  }
  return whole;
}

function mergeLogprobs(into: unknown, piece: unknown): unknown {
  if (!isObject(piece)) return into ?? null;
  const whole = isObject(into) ? into : {};
  for (const [key, value] of Object.entries(piece)) {
    const present = whole[key];
    if (Array.isArray(present) && Array.isArray(value)) present.push(...(value as unknown[]));
    else if (value !== null || present === undefined) set(whole, key, value);
  }
  return whole;
}

function appendText(into: Json, key: string, value: unknown): void {
  const present = into[key];
  if (typeof value !== "string") setIfUnset(into, key, value);
  else set(into, key, typeof present === "string" ? present + value : value);
}

function setIfUnset(into: Json, key: string, value: unknown): void {
  if (into[key] === undefined || into[key] === null) set(into, key, value);
}

/** Assignment that a key from the wire cannot turn into a change of prototype. */
function set(into: Json, key: string, value: unknown): void {
  if (key !== "__proto__") into[key] = value;
}

// ---- from a whole answer to a stream ----------------------------------------------------------------------------

/** Events that one replay may have. */
const EVENTS_MAX = 64;
/** Text of one event is no shorter than this while there is more to come, UTF-16 units. */
const PIECE_UNITS_MIN = 24;

/**
 * The events with which OpenAI would have streamed this whole answer, at most 64: role, text in pieces, finish,
 * usage if asked for, `[DONE]`. Code points are never split. Empty when `body` is not an answer of that route.
 */
export function wholeToSse(
  route: Route,
  body: Uint8Array,
  { includeUsage }: { includeUsage: boolean },
): Uint8Array[] {
  const json = parseObject(textOf(body));
  if (json === null || "bad" in judge(route, json)) return [];
  if (route === "embeddings") return [eventOf(json), doneEvent]; // No such stream exists; nearest to one.
  const { choices, usage, ...rest } = json;
  const { id, object, created, model, system_fingerprint, service_tier, ...extras } = rest;
  const base: Json = { id, object, created, model, system_fingerprint, service_tier };
  if (route === "chat") base.object = "chat.completion.chunk";
  const wholes = arrayOf(choices).filter(isObject);
  const events: Uint8Array[] = [];
  const send = (deltas: readonly Json[]): void => {
    // What is said once of the whole answer goes with the first event.
    const head = events.length === 0 ? { ...base, ...extras } : base;
    events.push(eventOf({ ...head, choices: deltas, ...(includeUsage ? { usage: null } : {}) }));
  };
  const piecesMax = Math.floor((EVENTS_MAX - 2) / Math.max(1, wholes.length)) - 2;
  if (piecesMax >= 1) {
    for (const choice of wholes)
      for (const delta of choiceDeltas(route, choice, piecesMax)) send([delta]);
  } else {
    // So many choices that each gets its text in one piece: events carry several choices.
    const steps = wholes.map((choice) => choiceDeltas(route, choice, 1));
    const most = Math.max(...steps.map((deltas) => deltas.length));
    for (let i = 0; i < most; i++) send(steps.map((deltas) => deltas[i]).filter(isObject));
  }
  if (includeUsage && isObject(usage)) events.push(eventOf({ ...base, choices: [], usage }));
  events.push(doneEvent);
  assert(events.length <= EVENTS_MAX, "a replay stays within its events");
  return events;
}

/** One choice as its stream's choices: (role,) pieces, finish. At most `piecesMax` + 2. */
function choiceDeltas(route: Route, choice: Json, piecesMax: number): Json[] {
  const { index, message, text, logprobs, finish_reason, ...extras } = choice;
  const shape = (fields: Json, reason: unknown, tokens?: unknown): Json => ({
    index: index ?? 0,
    ...fields,
    ...(logprobs === undefined ? {} : { logprobs: tokens ?? null }),
    finish_reason: reason ?? null,
  });
  const deltas: Json[] = [];
  if (route !== "chat") {
    const pieces = piecesOf(typeof text === "string" ? text : "", piecesMax);
    for (const [i, piece] of pieces.entries()) {
      deltas.push(shape({ text: piece }, null, i === 0 ? logprobs : null));
    }
    const leftover = pieces.length === 0 ? logprobs : null;
    deltas.push({ ...shape({ text: "" }, finish_reason, leftover), ...extras });
    return deltas;
  }
  const { role, tool_calls: calls, ...fields } = isObject(message) ? message : {};
  const first: Json = { role: role ?? "assistant" };
  const texts: [string, string][] = [];
  for (const [key, value] of Object.entries(fields)) {
    first[key] = typeof value === "string" ? "" : value;
    if (typeof value === "string" && value !== "") texts.push([key, value]);
  }
  // As engines do: reasoning before the answer.
  texts.sort(([a], [b]) => Number(a === "content") - Number(b === "content"));
  const perText = Math.floor((piecesMax - 1) / Math.max(1, texts.length));
  if (perText < 1) for (const [key, value] of texts.splice(0)) first[key] = value;
  const hasCalls = Array.isArray(calls) && calls.length > 0;
  if (calls !== undefined && !hasCalls) first.tool_calls = calls;
  deltas.push(shape({ delta: first }, null));
  let tokens: unknown = logprobs;
  for (const [key, value] of texts) {
    for (const piece of piecesOf(value, perText)) {
      deltas.push(shape({ delta: { [key]: piece } }, null, key === "content" ? tokens : null));
      if (key === "content") tokens = null;
    }
  }
  if (hasCalls) deltas.push(shape({ delta: { tool_calls: calls.map(callPiece) } }, null));
  deltas.push({ ...shape({ delta: {} }, finish_reason, tokens), ...extras });
  return deltas;
}

function callPiece(call: unknown, index: number): Json {
  return { index, ...(isObject(call) ? call : {}) };
}

/** Cuts text into at most `piecesMax` pieces of about equal length, never within a surrogate pair. */
function piecesOf(text: string, piecesMax: number): string[] {
  const units = Math.max(PIECE_UNITS_MIN, Math.ceil(text.length / piecesMax));
  const pieces: string[] = [];
  for (let from = 0; from < text.length; ) {
    let to = Math.min(text.length, from + units);
    if (to < text.length && isLowSurrogate(text, to) && isHighSurrogate(text, to - 1)) to++;
    pieces.push(text.slice(from, to));
    from = to;
  }
  return pieces;
}

function isHighSurrogate(text: string, at: number): boolean {
  return (text.charCodeAt(at) & 0xfc00) === 0xd800;
}

function isLowSurrogate(text: string, at: number): boolean {
  return (text.charCodeAt(at) & 0xfc00) === 0xdc00;
}

function eventOf(json: Json): Uint8Array {
  return Buffer.from(`data: ${JSON.stringify(json)}\n\n`);
}

// ---- JSON ---------------------------------------------------------------------------------------------------

function isObject(value: unknown): value is Json {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function arrayOf(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : [];
}

function textOf(body: Uint8Array): string {
  return Buffer.from(body.buffer, body.byteOffset, body.byteLength).toString("utf8");
}

function parseObject(text: string): Json | null {
  try {
    const json: unknown = JSON.parse(text);
    return isObject(json) ? json : null;
  } catch {
    return null;
  }
}

/** The error that a body or event states, in the forms of OpenAI, TGI (a string) and older vLLM. */
function errorIn(json: Json): Json | string | null {
  if (isObject(json.error) || typeof json.error === "string") return json.error;
  return json.object === "error" ? json : null;
}

/** The error that a JSON body states, with the status that it stands for; null when it states none. */
export function statedError(text: string): { status?: number } | null {
  const json = parseObject(text);
  const error = json === null ? null : errorIn(json);
  return json === null || error === null ? null : statusOf(error, json);
}

/** HTTP status that an error inside a stream stands for. */
function statusOf(error: Json | string, json: Json): { status?: number } {
  const code = Number((isObject(error) ? (error.code ?? error.status) : json.code) ?? Number.NaN);
  return Number.isInteger(code) && code >= 400 && code <= 599 ? { status: code } : {};
}

function usageOf(usage: Json): Usage {
  const details = isObject(usage.prompt_tokens_details) ? usage.prompt_tokens_details : {};
  return {
    promptTokens: countOf(usage.prompt_tokens),
    cachedTokens: countOf(details.cached_tokens),
    outputTokens: countOf(usage.completion_tokens),
  };
}

function countOf(value: unknown): number {
  return typeof value === "number" && Number.isFinite(value) && value > 0 ? Math.floor(value) : 0;
}
