/**
 * The link to one life of one peer: what waits to be sent, what must arrive, and whether the peer is there. A state
 * machine without I/O: time, bytes and connections come in from peer-links.ts; bytes and events go out.
 *
 *              attach                     closed, silent, stalled, bad bytes
 *   (new) ───────────────▶ up ─────────────────────────────────────────────▶ interrupted
 *                          ▲ │                                                  │   │
 *                          │ │ left, replaced, forgotten, overflow              │   │ for sessionMs, or
 *                          │ └────────────────────────▶ over ◀──────────────────┘   │ as from up
 *                          └──────────────── attach: resumed ───────────────────────┘
 *
 * A link is one *session*: the time in which both sides remember each other. Connections come and go within it.
 *
 * - **User envelopes** (messages, replies) are delivered at most once and in order. They wait in the outbox, in the
 *   order of `send`, until the end of the turn of the event loop (the first 32 of many go at once): then all of them
 *   go, up to 256 or about 64 KiB in a frame. When the connection breaks those still waiting are lost, each told; none is ever sent again.
 * - **System envelopes** (watch, unwatch, terminated) are delivered exactly once and in order, within the session.
 *   They are numbered from 1, kept until acknowledged, and sent again on the next connection; the receiver drops what
 *   it has had. Acknowledgements are cumulative and ride on every frame. When more than `systemMax` wait, or the
 *   session ends, they are lost, and `onOver` says so: every watch on that peer is then void.
 *
 * Failures. The other side is *silent* when no byte came for `silenceMs`; it sends a heartbeat every 250 ms. It
 * *stalls* when it takes none of the bytes that wait for it for `stallMs`. A frame that cannot be read, or a gap in
 * the numbers, ends the connection; a single message that may not be delivered is answered and counted. Time in
 * which this process itself stood still (longer than a heartbeat between ticks) is held against nobody.
 *
 * Bounds: `outboxMax` envelopes and about `outboxBytesMax` bytes wait, besides what the connection holds (writing
 * stops above `bufferedBytesMax`); above, `send` refuses with "full", but for messages that replace a waiting one of
 * the same subject (node snapshots, progress).
 *
 * It opens no connection and knows no secret: peer-links.ts chooses connections, peer-handshake.ts proves peers.
 */
import { assert } from "../runtime/actor.ts";
import type { Envelope } from "../runtime/system.ts";
import type { PeerIdentity } from "./peer-handshake.ts";
import {
  decodeFrame,
  type Encoding,
  encodeFrame,
  FRAME_ENVELOPES_MAX,
  type Frame,
  type Heartbeat,
  isSystem,
  type ReceivedFrame,
  type Rejected,
} from "./wire.ts";
import { conflationKey, weightOf } from "./wire-messages.ts";
import { ID_LENGTH_MAX } from "./wire-shape.ts";

export type LinkOptions = {
  /** Between two heartbeats. */
  heartbeatMs: number;
  /** Without a byte from the peer the connection is given up; at least 3 heartbeats. */
  silenceMs: number;
  /** Without progress in writing it is given up. */
  stallMs: number;
  /** How long a session outlives its connection. */
  sessionMs: number;
  /** Envelopes that may wait, and about how many bytes. */
  outboxMax: number;
  outboxBytesMax: number;
  /** What the connection may hold before writing stops. */
  bufferedBytesMax: number;
  /** System envelopes that may wait for their acknowledgement. */
  systemMax: number;
  /** Largest frame; a message that does not fit is refused. */
  frameBytesMax: number;
  /** A frame is closed when it holds about so much. */
  batchBytes: number;
};

export const linkDefaults: Readonly<LinkOptions> = {
  heartbeatMs: 250,
  silenceMs: 3000,
  stallMs: 5000,
  sessionMs: 10_000,
  outboxMax: 4096,
  outboxBytesMax: 8 * 1024 * 1024,
  bufferedBytesMax: 1024 * 1024,
  systemMax: 1024,
  frameBytesMax: 4 * 1024 * 1024,
  batchBytes: 64 * 1024,
};

/** Where a link's bytes go. Whole messages, in order, or it ends. */
export interface Connection {
  /** Never throws; what cannot be sent is lost with the connection. */
  write(bytes: Uint8Array<ArrayBuffer>): void;
  /** Bytes written and not yet taken by the operating system. */
  bufferedBytes(): number;
  /** Ends it at once, with what is on it, unless it was told to end. Its owner hears nothing more of it. */
  destroy(reason: string): void;
  /** Ends it when what was written is gone, or after a moment. Its owner hears nothing more of it. */
  end(): void;
  /** The peer has proved who it is: from now on it may send as much as a link allows. */
  trust(): void;
}

/** Why a connection or session ended; "closed: …" and "bad frame: …" carry the detail. */
export type LinkEnd = string;

/** What a link tells; all in the order in which it happened. */
export interface LinkHost {
  onUp(link: PeerLink, isResumed: boolean): void;
  /** The connection is gone: pending asks will have no answer. Before `onOver`, if the link was up. */
  onDown(link: PeerLink, why: LinkEnd): void;
  /** The session is over: nothing of it will come any more. Once, last. */
  onOver(link: PeerLink, why: LinkEnd): void;
  onEnvelope(link: PeerLink, envelope: Envelope): void;
  onHeartbeat(link: PeerLink, heartbeat: Heartbeat): void;
  /** An envelope that was taken by `send` and will not arrive. */
  onUndeliverable(link: PeerLink, envelope: Envelope, reason: UndeliverableReason): void;
  /** A message of the peer that may not be delivered. */
  onRejected(link: PeerLink, rejected: Rejected): void;
  /** There is something to flush, before this turn of the event loop ends. */
  onDirty(link: PeerLink): void;
  /** For the heartbeat. */
  vitals(): { loopLagMs: number; queueDepth: number; epoch: number };
  questionOf(askId: number): string | undefined;
}

export type UndeliverableReason = "oversized" | "undecodable" | "disconnected" | "full";

/** Counts since the session began, and what is now. */
export type LinkMetrics = {
  peer: string;
  incarnation: number;
  state: "up" | "interrupted" | "over";
  encoding: Encoding;
  /** Of the last heartbeat that came back, ms. */
  rttMs?: number;
  /** What the peer said last of itself. */
  heartbeat?: Heartbeat;
  outboxDepth: number;
  outboxBytes: number;
  unacked: number;
  bufferedBytes: number;
  connections: number;
  framesOut: number;
  envelopesOut: number;
  bytesOut: number;
  framesIn: number;
  envelopesIn: number;
  bytesIn: number;
  /** Lost on this side, by reason. */
  undeliverable: Readonly<Record<UndeliverableReason, number>>;
  conflated: number;
  rejected: number;
  duplicates: number;
  badFrames: number;
};

/** So many go at once, first of a turn: the other side works on them while this one still writes the rest. */
const HEAD_ENVELOPES = 32;
/** Heartbeats whose time of sending is remembered, for the round trip. */
const BEATS_MAX = 16;

export class PeerLink {
  readonly peer: PeerIdentity;
  readonly #self: string;
  readonly #options: LinkOptions;
  readonly #host: LinkHost;
  #state: "new" | "up" | "interrupted" | "over" = "new";
  #connection: Connection | undefined;
  #connectionName = "";
  #encoding: Encoding = "maps";
  #interruptedAtMs = 0;

  /** In order of sending; entries before `#outboxHead` are gone. */
  #outbox: Envelope[] = [];
  #outboxHead = 0;
  #outboxBytes = 0;
  /** Place in `#outbox` of what a later message may replace; kept only while the outbox is long. */
  readonly #conflatable = new Map<string, number>();
  #isDirty = false;
  /** In this turn of the event loop. */
  #hasSentHead = false;

  /** System envelopes from number `#acked + 1` on. */
  readonly #unacked: Envelope[] = [];
  #acked = 0;
  /** Number of the next one to be written on this connection. */
  #nextSystem = 1;
  /** Highest number received; all before it were. */
  #received = 0;
  #ackSent = 0;

  #heardAtMs = 0;
  #tickedAtMs = 0;
  #beatDueAtMs = 0;
  #beatSeq = 0;
  readonly #beatsSentAtMs: number[] = [];
  #beatHeard: { seq: number; atMs: number } | undefined;
  #drainedBytes = 0;
  #drainedAtMs = 0;
  /** Written on this connection. */
  #written = 0;

  #rttMs: number | undefined;
  #heartbeat: Heartbeat | undefined;
  readonly #undeliverable = { oversized: 0, undecodable: 0, disconnected: 0, full: 0 };
  readonly #counts = {
    connections: 0,
    framesOut: 0,
    envelopesOut: 0,
    bytesOut: 0,
    framesIn: 0,
    envelopesIn: 0,
    bytesIn: 0,
    conflated: 0,
    rejected: 0,
    duplicates: 0,
    badFrames: 0,
  };

  /** @param self first part of the paths of this process: its peer id */
  constructor(peer: PeerIdentity, self: string, options: LinkOptions, host: LinkHost) {
    assert(options.heartbeatMs * 3 <= options.silenceMs, "silence is longer than 3 heartbeats");
    assert(options.batchBytes <= options.frameBytesMax, "a batch fits into a frame");
    this.peer = peer;
    this.#self = self;
    this.#options = options;
    this.#host = host;
  }

  get isUp(): boolean {
    return this.#state === "up";
  }

  get isOver(): boolean {
    return this.#state === "over";
  }

  /** Highest system number that came; what the handshake tells the other side. */
  get received(): number {
    return this.#received;
  }

  get encoding(): Encoding {
    return this.#encoding;
  }

  /** Of the last heartbeat that came back, ms. */
  get rttMs(): number | undefined {
    return this.#rttMs;
  }

  /** Name of the last connection; empty before the first. */
  get connectionName(): string {
    return this.#connectionName;
  }

  metrics(): LinkMetrics {
    return {
      peer: this.peer.node,
      incarnation: this.peer.incarnation,
      state: this.#state === "new" ? "interrupted" : this.#state,
      encoding: this.#encoding,
      ...(this.#rttMs === undefined ? {} : { rttMs: this.#rttMs }),
      ...(this.#heartbeat === undefined ? {} : { heartbeat: this.#heartbeat }),
      outboxDepth: this.#outboxDepth,
      outboxBytes: this.#outboxBytes,
      unacked: this.#unacked.length,
      bufferedBytes: this.#connection?.bufferedBytes() ?? 0,
      ...this.#counts,
      undeliverable: { ...this.#undeliverable },
    };
  }

  // ---- connections ------------------------------------------------------------------------------------

  /** Whether the other side may have heard that much of this session. */
  couldHaveHeard(received: number): boolean {
    return received >= this.#acked && received <= this.#acked + this.#unacked.length;
  }

  /**
   * From now on it is up, on this connection.
   * @param received highest number that the other side has had; 0 for a new session
   */
  attach(
    connection: Connection,
    name: string,
    encoding: Encoding,
    received: number,
    nowMs: number,
  ): void {
    assert(this.#state === "new" || this.#state === "interrupted", "one connection at a time");
    assert(this.couldHaveHeard(received), "the other side has heard what was sent");
    const isResumed = this.#state === "interrupted";
    this.#state = "up";
    this.#connection = connection;
    this.#connectionName = name;
    this.#encoding = encoding;
    this.#counts.connections++;
    this.#acknowledged(received);
    this.#nextSystem = this.#acked + 1;
    this.#outbox = [...this.#unacked];
    this.#outboxHead = 0;
    this.#outboxBytes = this.#outbox.length * weightOf(undefined);
    this.#heardAtMs = nowMs;
    this.#tickedAtMs = nowMs;
    this.#beatDueAtMs = nowMs;
    this.#beatsSentAtMs.length = 0;
    this.#beatSeq = 0;
    this.#beatHeard = undefined;
    this.#written = 0;
    this.#drainedBytes = 0;
    this.#drainedAtMs = nowMs;
    this.#host.onUp(this, isResumed);
    this.#markDirty();
  }

  /** The connection has ended, or is to end. No effect when there is none. */
  interrupt(why: LinkEnd, nowMs: number): void {
    const connection = this.#connection;
    if (this.#state !== "up" || connection === undefined) return;
    this.#state = "interrupted";
    this.#connection = undefined;
    this.#interruptedAtMs = nowMs;
    connection.destroy(why);
    const lost = this.#outbox.slice(this.#outboxHead).filter((envelope) => !isSystem(envelope));
    this.#clearOutbox();
    this.#host.onDown(this, why);
    for (const envelope of lost) this.#lose(envelope, "disconnected");
  }

  /** Ends the session. */
  end(why: LinkEnd, nowMs: number): void {
    if (this.#state === "over") return;
    this.interrupt(why, nowMs);
    this.#state = "over";
    this.#unacked.length = 0;
    this.#host.onOver(this, why);
  }

  /** Sends what waits and a last word, and ends the session; the other side does not wait for this life again. */
  leave(nowMs: number): void {
    const connection = this.#connection;
    if (connection !== undefined) {
      this.flush(nowMs);
      this.#writeFrame([], nowMs, { isLeaving: true });
      connection.end(); // What the interruption destroys has ended already.
      this.interrupt("leaving", nowMs);
    }
    this.end("leaving", nowMs);
  }

  // ---- sending ----------------------------------------------------------------------------------------

  /** Takes the envelope, or says why not. */
  send(envelope: Envelope, nowMs: number): "full" | "disconnected" | "oversized" | undefined {
    const isNumbered = isSystem(envelope);
    if (this.#state !== "up" && !(isNumbered && this.#state === "interrupted"))
      return "disconnected";
    if (envelope.to.length > ID_LENGTH_MAX) return "oversized";
    if (isNumbered) {
      if (this.#unacked.length >= this.#options.systemMax) {
        this.end("overflow of system messages", nowMs);
        return "full";
      }
      this.#unacked.push(envelope);
      if (this.#state !== "up") return undefined; // Goes when there is a connection again.
    } else if (this.#conflate(envelope)) {
      return undefined;
    } else if (!this.#hasRoom(envelope)) {
      this.#undeliverable.full++;
      return "full";
    }
    this.#push(envelope);
    if (this.#outboxDepth === HEAD_ENVELOPES && !this.#hasSentHead) {
      this.flush(nowMs);
      this.#hasSentHead = true;
    }
    return undefined;
  }

  get #outboxDepth(): number {
    return this.#outbox.length - this.#outboxHead;
  }

  #hasRoom(envelope: Envelope): boolean {
    const { outboxMax, outboxBytesMax } = this.#options;
    if (this.#outboxDepth === 0) return true; // Too heavy for the bound alone: the limit on a frame decides.
    const bytes = this.#outboxBytes + bytesOf(envelope);
    return this.#outboxDepth < outboxMax && bytes <= outboxBytesMax;
  }

  /** Puts it in the place of a waiting one of the same subject; a short outbox has none: it goes within the turn. */
  #conflate(envelope: Envelope): boolean {
    if (this.#outboxDepth < FRAME_ENVELOPES_MAX) return false;
    const key = keyOf(envelope);
    if (key === undefined) return false;
    const place = this.#conflatable.get(key);
    if (place !== undefined) {
      this.#outbox[place] = envelope;
      this.#counts.conflated++;
      return true;
    }
    // What is refused next leaves a place that the next envelope takes, of another subject: hence only with room.
    if (this.#hasRoom(envelope)) this.#conflatable.set(key, this.#outbox.length);
    return false;
  }

  #push(envelope: Envelope): void {
    this.#outbox.push(envelope);
    this.#outboxBytes += bytesOf(envelope);
    this.#markDirty();
  }

  #markDirty(): void {
    if (this.#isDirty || this.#state !== "up") return;
    this.#isDirty = true;
    this.#host.onDirty(this);
  }

  /** Writes what waits, as far as the connection takes it. True when something was left. */
  flush(nowMs: number): boolean {
    this.#isDirty = false;
    this.#hasSentHead = false;
    const connection = this.#connection;
    if (this.#state !== "up" || connection === undefined) return false;
    while (this.#outboxDepth > 0) {
      if (connection.bufferedBytes() > this.#options.bufferedBytesMax) return true;
      this.#writeFrame(this.#takeBatch(), nowMs, {});
      if (this.#connection !== connection) return false;
    }
    this.#outbox.length = 0;
    this.#outboxHead = 0;
    if (this.#ackSent < this.#received) this.#writeFrame([], nowMs, {});
    return false;
  }

  #takeBatch(): Envelope[] {
    const outbox = this.#outbox;
    const start = this.#outboxHead;
    const limit = Math.min(outbox.length, start + FRAME_ENVELOPES_MAX);
    let end = start;
    let weight = 0;
    while (end < limit) {
      const envelope = outbox[end];
      if (envelope === undefined) break;
      const own = bytesOf(envelope);
      if (end > start && weight + own > this.#options.batchBytes) break;
      weight += own;
      end++;
    }
    this.#outboxBytes -= weight;
    this.#outboxHead = end;
    if (this.#conflatable.size > 0) this.#conflatable.clear(); // Some have gone, others may move.
    if (start === 0 && end === outbox.length) {
      this.#outbox = [];
      this.#outboxHead = 0;
      return outbox;
    }
    const batch = outbox.slice(start, end);
    if (end > 1024 && end * 2 > outbox.length) {
      this.#outbox = outbox.slice(end);
      this.#outboxHead = 0;
    }
    return batch;
  }

  /** As one frame; halved where it does not fit, so that one envelope alone is at fault. */
  #writeFrame(
    envelopes: readonly Envelope[],
    nowMs: number,
    { heartbeat, isLeaving = false }: { heartbeat?: Heartbeat; isLeaving?: boolean },
  ): void {
    const connection = this.#connection;
    if (connection === undefined) return;
    const frame: Frame = {
      ack: this.#received,
      seq: this.#nextSystem,
      isLeaving,
      envelopes,
      ...(heartbeat === undefined ? {} : { heartbeat }),
    };
    const encoded = encodeFrame(frame, this.#encoding, nowMs);
    const isFine = !("invalid" in encoded) && encoded.length <= this.#options.frameBytesMax;
    if (!isFine && envelopes.length > 1) {
      const half = envelopes.length >> 1;
      this.#writeFrame(envelopes.slice(0, half), nowMs, {});
      this.#writeFrame(envelopes.slice(half), nowMs, {});
      return;
    }
    if ("invalid" in encoded || !isFine) {
      const [envelope] = envelopes;
      if (envelope !== undefined) {
        this.#cannotSend(envelope, "invalid" in encoded ? "undecodable" : "oversized");
      }
      return;
    }
    for (const envelope of envelopes) if (isSystem(envelope)) this.#nextSystem++;
    this.#ackSent = this.#received;
    this.#counts.framesOut++;
    this.#counts.envelopesOut += envelopes.length;
    this.#counts.bytesOut += encoded.length;
    this.#written += encoded.length;
    connection.write(encoded);
  }

  #cannotSend(envelope: Envelope, reason: "undecodable" | "oversized"): void {
    this.#lose(envelope, reason);
    // The other side waits for this answer: tell it that none comes.
    if (envelope.kind !== "reply" || !envelope.outcome.ok) return;
    const { to, askId } = envelope;
    this.#push({ kind: "reply", to, askId, outcome: { ok: false, failure: "noroute" } });
  }

  #lose(envelope: Envelope, reason: UndeliverableReason): void {
    this.#undeliverable[reason]++;
    this.#host.onUndeliverable(this, envelope, reason);
  }

  #clearOutbox(): void {
    this.#outbox = [];
    this.#outboxHead = 0;
    this.#outboxBytes = 0;
    this.#conflatable.clear();
  }

  #acknowledged(number: number): void {
    if (number <= this.#acked) return;
    this.#unacked.splice(0, number - this.#acked);
    this.#acked = number;
  }

  // ---- receiving --------------------------------------------------------------------------------------

  /** Takes in one message of the connection. */
  receive(bytes: Uint8Array, nowMs: number): void {
    if (this.#state !== "up") return;
    this.#heardAtMs = nowMs;
    this.#counts.bytesIn += bytes.length;
    const frame = decodeFrame(bytes, {
      encoding: this.#encoding,
      nowMs,
      peer: this.peer.node,
      self: this.#self,
      questionOf: (askId) => this.#host.questionOf(askId),
    });
    if ("invalid" in frame) return this.#badFrame(frame.invalid, nowMs);
    if (!(frame.ack < this.#nextSystem))
      return this.#badFrame("it acknowledges what was not sent", nowMs);
    this.#acknowledged(frame.ack);
    this.#counts.framesIn++;
    if (frame.heartbeat !== undefined) this.#onHeartbeat(frame.heartbeat, nowMs);
    if (!this.#deliver(frame, nowMs)) return;
    for (const rejected of frame.rejected) this.#onRejected(rejected);
    if (frame.isLeaving) return this.end("left", nowMs);
    if (this.#received > this.#ackSent) this.#markDirty();
  }

  /** False when it ended the connection. */
  #deliver(frame: ReceivedFrame, nowMs: number): boolean {
    const connection = this.#connection;
    let number = frame.seq;
    for (const envelope of frame.envelopes) {
      if (isSystem(envelope)) {
        const mine = number++;
        if (mine <= this.#received) {
          this.#counts.duplicates++;
          continue;
        }
        if (mine > this.#received + 1) {
          this.#badFrame(`number ${mine} after ${this.#received}`, nowMs);
          return false;
        }
        this.#received = mine;
      }
      this.#counts.envelopesIn++;
      this.#host.onEnvelope(this, envelope);
      if (this.#connection !== connection) return false; // What it caused ended this connection.
    }
    return true;
  }

  #onHeartbeat(heartbeat: Heartbeat, nowMs: number): void {
    this.#heartbeat = heartbeat;
    this.#beatHeard = { seq: heartbeat.seq, atMs: nowMs };
    const { echo } = heartbeat;
    const sentAtMs = echo === undefined ? undefined : this.#beatsSentAtMs[echo.seq % BEATS_MAX];
    if (echo !== undefined && sentAtMs !== undefined && echo.seq > this.#beatSeq - BEATS_MAX) {
      this.#rttMs = Math.max(0, nowMs - sentAtMs - echo.heldMs);
    }
    this.#host.onHeartbeat(this, heartbeat);
  }

  #onRejected(rejected: Rejected): void {
    this.#counts.rejected++;
    this.#host.onRejected(this, rejected);
    const { askId, from } = rejected;
    if (askId === 0 || !from.startsWith(`${this.peer.node}/`) || this.#state !== "up") return;
    const outcome = { ok: false, failure: "noroute" } as const;
    this.send({ kind: "reply", to: from, askId, outcome }, this.#tickedAtMs);
  }

  #badFrame(why: string, nowMs: number): void {
    this.#counts.badFrames++;
    this.interrupt(`bad frame: ${why}`, nowMs);
  }

  // ---- time -------------------------------------------------------------------------------------------

  /** To be called several times per heartbeat. */
  tick(nowMs: number): void {
    const { heartbeatMs, silenceMs, sessionMs, stallMs, bufferedBytesMax } = this.#options;
    const gapMs = nowMs - this.#tickedAtMs;
    this.#tickedAtMs = nowMs;
    if (this.#state === "interrupted" && nowMs - this.#interruptedAtMs >= sessionMs) {
      return this.end("away for too long", nowMs);
    }
    const connection = this.#connection;
    if (this.#state !== "up" || connection === undefined) return;
    if (gapMs > heartbeatMs) {
      // It was this process that stood still; what came meanwhile is not read yet.
      this.#heardAtMs = Math.min(nowMs, this.#heardAtMs + gapMs);
      this.#drainedAtMs = Math.min(nowMs, this.#drainedAtMs + gapMs);
    }
    const buffered = connection.bufferedBytes();
    if (buffered === 0 || this.#written - buffered > this.#drainedBytes) {
      this.#drainedBytes = this.#written - buffered;
      this.#drainedAtMs = nowMs;
    }
    if (nowMs - this.#heardAtMs >= silenceMs) return this.interrupt("silent", nowMs);
    if (nowMs - this.#drainedAtMs >= stallMs) return this.interrupt("stalled", nowMs);
    if (nowMs >= this.#beatDueAtMs) {
      this.#beatDueAtMs = Math.max(this.#beatDueAtMs + heartbeatMs, nowMs);
      if (buffered <= bufferedBytesMax) this.#beat(nowMs);
    }
    this.flush(nowMs);
  }

  #beat(nowMs: number): void {
    const seq = ++this.#beatSeq;
    this.#beatsSentAtMs[seq % BEATS_MAX] = nowMs;
    const heard = this.#beatHeard;
    const echo =
      heard === undefined ? {} : { echo: { seq: heard.seq, heldMs: nowMs - heard.atMs } };
    this.#writeFrame([], nowMs, { heartbeat: { seq, ...this.#host.vitals(), ...echo } });
  }
}

function keyOf(envelope: Envelope): string | undefined {
  return envelope.kind === "message" && envelope.askId === 0
    ? conflationKey(envelope.to, envelope.message)
    : undefined;
}

/** About: see `weightOf`. */
function bytesOf(envelope: Envelope): number {
  switch (envelope.kind) {
    case "message":
      return weightOf(envelope.message);
    case "reply":
      return weightOf(envelope.outcome.ok ? envelope.outcome.value : undefined);
    default:
      return weightOf(undefined);
  }
}
