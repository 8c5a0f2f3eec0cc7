/**
 * Answers as OpenAI's API has them, whole and streamed: reads a node's stream, judges whole answers, and
 * turns one form into the other. Pure: bytes in, bytes and facts out.
 *
 * A stream is passed on byte for byte. JSON is parsed only until the first content, and later only for events
 * whose bytes show that they say more than text (a finish, a usage, an error); the others are counted.
 * Parsing every event would cost more than all the rest of the gateway.
 */
import type { Route, Usage } from "../actors/protocol.ts";
import type { AnswerPart } from "./data-plane.ts";

type Json = Record<string, unknown>;

// ---- streams: reading what a node sends ---------------------------------------------------------------------

export type SseLimits = {
  /** One event, bytes. */
  eventBytesMax: number;
  /** All that comes before the first content, bytes. */
  headBytesMax: number;
};

/** Why a stream can be believed no further. Nothing of the event at fault is passed on. */
export type SseFault =
  | { kind: "error_event"; message: string; status?: number; body: string }
  | { kind: "event_too_long" }
  | { kind: "head_too_long" }
  | { kind: "not_json" };

const LF = 10;
const CR = 13;
const SPACE = 32;
const QUOTE = 34;
const COLON = 58;
const nothing: readonly AnswerPart[] = [];
const DONE_EVENT = Buffer.from("data: [DONE]\n\n");
const BLANK_LINE = Buffer.from("\n\n");

/**
 * Follows one SSE stream of a chat or completions answer. Lines may end in LF or CRLF (a lone CR is not taken
 * for a line's end). Everything before the first content token is held back, so that a failure until then can
 * still be retried elsewhere; the bytes of an unfinished event are held until its end has come.
 */
export class SseScanner {
  readonly #limits: SseLimits;
  /** True once content (or a finish) has come: from then on `push` returns what it is given. */
  released = false;
  /** Events that carried content; about one per token. */
  contentEvents = 0;
  /** One for each choice that ended, in order of ending. */
  readonly finishReasons: string[] = [];
  /** `[DONE]` has come; what follows it is ignored. */
  done = false;
  /** As the engine stated it last. */
  usage: Usage | null = null;
  fault: SseFault | null = null;

  readonly #held: AnswerPart[] = []; // Complete parts from before the first content.
  #heldBytes = 0;
  #tail: Uint8Array[] = []; // Of an event that is not complete.
  #tailBytes = 0;
  #lineBytes = 0; // Length of the unfinished line so far.
  #lineIsCr = false; // That line is a single CR: blank, if LF follows.
  #atStart = true; // No event read yet: a byte order mark may come.

  constructor(limits: SseLimits) {
    this.#limits = limits;
  }

  /** Both a finish and `[DONE]` are proper ends; some engines leave one out. */
  get complete(): boolean {
    return this.done || this.finishReasons.length > 0;
  }

  /** Takes the next bytes; returns what may go on to the client now, in order. */
  push(bytes: Uint8Array): readonly AnswerPart[] {
    if (this.fault !== null || this.done || bytes.byteLength === 0) return nothing;
    const chunk = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const out: AnswerPart[] = [];
    const before = this.#tail;
    let from = 0; // What precedes is out already; `before` belongs in front of it.
    let eventFrom = 0;
    let lineFrom = 0;
    for (;;) {
      const lf = chunk.indexOf(LF, lineFrom);
      if (lf === -1) break;
      const length = this.#lineBytes + lf - lineFrom;
      const blank =
        length === 0 ||
        (length === 1 && (lf > lineFrom ? chunk[lf - 1] === CR : this.#lineIsCr));
      this.#lineBytes = 0;
      lineFrom = lf + 1;
      if (!blank) continue;
      const spans = eventFrom === 0 && this.#tailBytes > 0;
      const event = spans
        ? Buffer.concat([...before, chunk.subarray(0, lineFrom)])
        : chunk.subarray(eventFrom, lineFrom);
      const isUsage = this.#readEvent(event);
      if (this.fault !== null) {
        this.#pass(out, spans ? [] : before, chunk.subarray(from, eventFrom), false);
        return this.#flush(out);
      }
      if (isUsage) {
        this.#pass(out, spans ? [] : before, chunk.subarray(from, eventFrom), false);
        this.#pass(out, [], event, true);
        from = lineFrom;
        this.#tail = [];
      }
      if (spans && !isUsage) this.#tail = before;
      this.#tailBytes = 0;
      eventFrom = lineFrom;
      if (this.done) break;
    }
    return this.#endChunk(out, chunk, { before: from === 0 ? before : [], from, eventFrom, lineFrom });
  }
