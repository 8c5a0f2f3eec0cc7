/**
 * The bytes of requests and answers, beside the actors: `front` puts a request's body here and reads the
 * answer; `upstream` sends the body and writes the answer. Actors only pass ids. Pure: no sockets.
 *
 * An `Answer` belongs to a flight (one upstream generation and everyone who waits for it). It keeps what has
 * come so far, so that a late reader gets all of it, and tells readers and writer about pressure. The writer
 * keeps the pace of the *fastest* reader: a slow one must not hold up the others, and is cut off ("overrun")
 * once what it still wanted has been forgotten.
 */
import type { ErrorCode } from "../actors/errors.ts";
import type { RequestId, Route } from "../actors/protocol.ts";
import { InflightMap } from "../runtime/inflight-map.ts";

/** What is sent to a node. */
export interface OutgoingRequest {
  readonly method: string;
  /** Path with query, e.g. "/v1/chat/completions". */
  readonly path: string;
  /** Lower-case names; only those that may be forwarded. */
  readonly headers: Readonly<Record<string, string>>;
  readonly body: Uint8Array | null;
  readonly route: Route;
  readonly model: string | undefined;
  readonly stream: boolean;
  /** The client asked for `stream_options.include_usage` itself. */
  readonly wantsUsage: boolean;
  /** May be kept in the cache if it ends well. */
  readonly storable: boolean;
}

/** What the node's answer began with. */
export type AnswerHead = { status: number; contentType: string };

/** "sse": events of a streamed generation. "whole": one JSON body. "raw": bytes of an unknown route. */
export type AnswerForm = "sse" | "whole" | "raw";

/** A piece of an answer. `usage`: the event that carries only token counts, not meant for every reader. */
export type AnswerPart = { bytes: Uint8Array; usage: boolean };

/** How an answer ended: whole, or broken off. */
export type AnswerEnd = { ok: true } | { ok: false; code: ErrorCode };

/** Bytes that the fastest reader may have unread before the writer pauses; it resumes at half. */
const UNREAD_BYTES_MAX = 1 << 20;
/** Forgotten parts are cut off the array once there are so many, so that forgetting stays O(1) each. */
const FORGOTTEN_PARTS_KEPT = 256;

/** One answer: written once, read by any number. */
export class Answer {
  readonly form: AnswerForm;
  readonly head: AnswerHead;
  readonly #bytesMax: number;
  readonly #readers = new Set<AnswerReader>();
  #parts: AnswerPart[] = [];
  #cut = 0; // Index of #parts[0]; parts up to #firstIndex are forgotten, and kept only until the next cut.
  #firstIndex = 0; // Oldest part that can still be read: grows when an over-long answer forgets.
  #bytesHeld = 0; // Of parts from #firstIndex on.
  #bytesAppended = 0; // Of all parts ever: a reader's unread bytes are this less what it has read.
  #end: AnswerEnd | null = null;
  #onResume: (() => void) | null = null;

  /** @param bytesMax what is kept for late readers; a longer answer can no longer be joined or stored. */
  constructor(form: AnswerForm, head: AnswerHead, bytesMax: number) {
    this.form = form;
    this.head = head;
    this.#bytesMax = bytesMax;
  }

  /** Of what can still be read; fixed once it has ended. */
  get bytesHeld(): number {
    return this.#bytesHeld;
  }

  get end(): AnswerEnd | null {
    return this.#end;
  }

  /** All parts from the first byte on, while none was forgotten. */
  get parts(): readonly AnswerPart[] | null {
    return this.#firstIndex === 0 ? this.#parts : null;
  }

  /**
   * False when the writer should pause: nobody has room. `onResume` is then called once, from within a
   * reader's turn: the writer must not append from inside it, but schedule its work.
   */
  append(part: AnswerPart, onResume: () => void): boolean {
    if (this.#end !== null) return true;
    this.#parts.push(part);
    this.#bytesHeld += part.bytes.byteLength;
    this.#bytesAppended += part.bytes.byteLength;
    for (const reader of this.#readers) reader.wake();
    if (this.#bytesHeld > this.#bytesMax) this.#forgetOldest();
    if (this.#readers.size === 0 || this.#leastUnread() <= UNREAD_BYTES_MAX) return true;
    this.#onResume = onResume;
    return false;
  }

  finish(end: AnswerEnd): void {
    if (this.#end !== null) return;
    this.#end = end;
    this.#onResume = null;
    for (const reader of [...this.#readers]) reader.wake();
  }

  /** A reader from the first byte, or null when the beginning is gone. `onReadable` is called on new parts and at the end. */
  read(onReadable: () => void): AnswerReader | null {
    if (this.#firstIndex > 0) return null;
    const reader = new AnswerReader(this, onReadable);
    this.#readers.add(reader);
    return reader;
  }

  /** For readers only. */
  partAt(index: number): AnswerPart | undefined {
    return this.#parts[index - this.#cut];
  }

  /** For readers only: has this reader been overtaken by forgetting? */
  isForgotten(index: number): boolean {
    return index < this.#firstIndex;
  }

  /** For readers only. */
  progressed(): void {
    if (this.#onResume === null || this.#leastUnread() > UNREAD_BYTES_MAX / 2) return;
    const resume = this.#onResume;
    this.#onResume = null;
    resume();
  }

  /** For readers only. */
  left(reader: AnswerReader): void {
    if (this.#readers.delete(reader)) this.progressed();
  }

  /** 0 when nobody reads: a writer without readers is not held up. */
  #leastUnread(): number {
    let mostRead = this.#readers.size === 0 ? this.#bytesAppended : 0;
    for (const reader of this.#readers) {
      if (reader.bytesRead > mostRead) mostRead = reader.bytesRead;
    }
    return this.#bytesAppended - mostRead;
  }

  /** Drops the oldest parts until the bound holds; a reader that still wanted them is cut off. */
  #forgetOldest(): void {
    const endIndex = this.#cut + this.#parts.length;
    while (this.#bytesHeld > this.#bytesMax && this.#firstIndex < endIndex - 1) {
      this.#bytesHeld -= this.partAt(this.#firstIndex)?.bytes.byteLength ?? 0;
      this.#firstIndex++;
    }
    if (this.#firstIndex - this.#cut >= FORGOTTEN_PARTS_KEPT) {
      this.#parts = this.#parts.slice(this.#firstIndex - this.#cut);
      this.#cut = this.#firstIndex;
    }
    for (const reader of [...this.#readers]) if (this.isForgotten(reader.index)) reader.wake();
  }
}

/** One client's place in an answer. */
export class AnswerReader {
  readonly #answer: Answer;
  readonly #onReadable: () => void;
  index = 0;
  bytesRead = 0;
  constructor(answer: Answer, onReadable: () => void) {
    this.#answer = answer;
    this.#onReadable = onReadable;
  }

  wake(): void {
    this.#onReadable();
  }

  /** The next part; "wait" until `onReadable`; "overrun" when this reader was too slow; or the end. */
  next(): AnswerPart | AnswerEnd | "wait" | "overrun" {
    if (this.#answer.isForgotten(this.index)) return "overrun";
    const part = this.#answer.partAt(this.index);
    if (part !== undefined) {
      this.index++;
      this.bytesRead += part.bytes.byteLength;
      this.#answer.progressed();
      return part;
    }
    return this.#answer.end ?? "wait";
  }

  close(): void {
    this.#answer.left(this);
  }
}

/** Where the bytes of a flight of another peer come from. */
export interface FlightSource {
  /**
   * Reads that flight from now on, together with all others here that read it. `onAnswer` is called once, not before
   * this returns: with the answer that fills, or undefined when it cannot be had.
   */
  open(flightId: string, onAnswer: (answer: Answer | undefined) => void): RelayedFlight;
}

/** One reader's hold on it. */
export interface RelayedFlight {
  /** The way to it broke, so its answer is not whole. */
  readonly isLost: boolean;
  release(): void;
}

/** How long readers of other peers may take to come, after all of them have been told of the flight. */
export const LINGER_MS = 5000;
/** Of all answers that linger; the oldest go first. */
const LINGER_BYTES_MAX = 32 << 20;

type Lingering = { requestId: RequestId; answer: Answer; untilMs: number };

/** Requests and answers in flight in this process, by request id. Entries leave with `front.forget`. */
export class DataPlane {
  readonly requests = new InflightMap<RequestId, OutgoingRequest>();
  readonly answers = new InflightMap<RequestId, Answer>();
  /** Bodies for the recording, only where it holds them; whoever writes the request's line takes its body out. */
  readonly prompts = new InflightMap<RequestId, Buffer>();
  /** In the order in which they go. */
  #lingering: Lingering[] = [];
  #lingeringBytes = 0;

  forget(requestId: RequestId): void {
    this.requests.delete(requestId);
    this.answers.delete(requestId);
  }

  /** Forgets its answer only a while later, by `expire`. */
  linger(requestId: RequestId, nowMs: number): void {
    this.requests.delete(requestId);
    const answer = this.answers.get(requestId);
    if (answer === undefined) return;
    this.#lingering.push({ requestId, answer, untilMs: nowMs + LINGER_MS });
    this.#lingeringBytes += answer.bytesHeld;
    this.expire(nowMs);
  }

  /** True while something lingers. */
  expire(nowMs: number): boolean {
    let count = 0;
    for (const { requestId, answer, untilMs } of this.#lingering) {
      if (untilMs > nowMs && this.#lingeringBytes <= LINGER_BYTES_MAX) break;
      count++;
      this.#lingeringBytes -= answer.bytesHeld;
      // A later request may have the same id.
      if (this.answers.get(requestId) === answer) this.answers.delete(requestId);
    }
    if (count > 0) this.#lingering = this.#lingering.slice(count);
    return this.#lingering.length > 0;
  }

  clear(): void {
    this.requests.clear();
    this.answers.clear();
    this.prompts.clear();
    this.#lingering = [];
    this.#lingeringBytes = 0;
  }
}
