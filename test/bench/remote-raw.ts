/**
 * The least that must be done to ask another process: one TCP socket, frames with their length in front, everything
 * of one turn of the event loop in one system call. No WebSocket, no handshake, no actors.
 *
 * Two contents: `bytes` makes each message a frame, of a fixed size and unread but for its number; `codec` makes all
 * messages of a turn a frame, encoded and decoded as the peers do.
 *
 * As a process of its own it is the side that answers: its content and sizes come as JSON in the first argument.
 */
import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { pathToFileURL } from "node:url";
import type { Envelope } from "../../runtime/system.ts";
import { decodeFrame, encodeFrame, FRAME_ENVELOPES_MAX } from "../../transport/wire.ts";
import { admitOf, admitted } from "./remote-system.ts";

export type RawContent = { content: "bytes" | "codec"; requestBytes: number; replyBytes: number };

/** Asks are numbered from somewhere: see peer-mesh.ts. */
const FIRST_ID = 2 ** 51;

/** Frames of one socket: what comes is cut at their lengths, what goes waits for the end of the turn. */
class Frames {
  readonly #socket: Socket;
  readonly #onFrame: (frame: Buffer) => void;
  #rest: Buffer = Buffer.alloc(0);

  constructor(socket: Socket, onFrame: (frame: Buffer) => void) {
    this.#socket = socket;
    this.#onFrame = onFrame;
    socket.setNoDelay(true);
    socket.on("data", (chunk: Buffer) => this.#onData(chunk));
    socket.on("error", () => socket.destroy());
  }

  #onData(chunk: Buffer): void {
    let data = this.#rest.length === 0 ? chunk : Buffer.concat([this.#rest, chunk]);
    while (data.length >= 4) {
      const end = 4 + data.readUInt32BE(0);
      if (data.length < end) break;
      this.#onFrame(data.subarray(4, end));
      data = data.subarray(end);
    }
    this.#rest = data;
  }

  /** All in one system call. */
  send(payloads: readonly Uint8Array[]): void {
    this.#socket.cork();
    for (const payload of payloads) {
      const head = Buffer.allocUnsafe(4);
      head.writeUInt32BE(payload.length, 0);
      this.#socket.write(head);
      this.#socket.write(payload);
    }
    this.#socket.uncork();
  }
}

/** One side: takes numbers, sends them as messages at the end of the turn; gives the numbers that come. */
export class RawSide {
  readonly #frames: Frames;
  readonly #content: RawContent["content"];
  readonly #outBytes: number;
  readonly #makeEnvelope: (number: number) => Envelope;
  readonly #onNumber: (number: number) => void;
  #batch: number[] = [];

  constructor(
    socket: Socket,
    isServer: boolean,
    { content, requestBytes, replyBytes }: RawContent,
    onNumber: (number: number) => void,
  ) {
    this.#content = content;
    this.#outBytes = isServer ? replyBytes : requestBytes;
    this.#makeEnvelope = isServer ? replyOf : requestOf;
    this.#onNumber = onNumber;
    this.#frames = new Frames(socket, (frame) => this.#onFrame(frame, isServer));
  }

  send(number: number): void {
    if (this.#batch.push(number) === 1) setImmediate(() => this.#flush());
  }

  #flush(): void {
    const batch = this.#batch;
    this.#batch = [];
    if (this.#content === "bytes") {
      this.#frames.send(batch.map((number) => this.#fixed(number)));
      return;
    }
    for (let start = 0; start < batch.length; start += FRAME_ENVELOPES_MAX) {
      this.#frames.send([this.#encoded(batch.slice(start, start + FRAME_ENVELOPES_MAX))]);
    }
  }

  #fixed(number: number): Uint8Array {
    const payload = Buffer.alloc(this.#outBytes);
    payload.writeUInt32BE(number, 0);
    return payload;
  }

  #encoded(numbers: readonly number[]): Uint8Array {
    const envelopes = numbers.map(this.#makeEnvelope);
    const frame = { ack: 0, seq: 1, isLeaving: false, envelopes };
    const encoded = encodeFrame(frame, "structures", performance.now());
    if ("invalid" in encoded) throw new Error(encoded.invalid);
    return encoded;
  }

  #onFrame(frame: Buffer, isServer: boolean): void {
    if (this.#content === "bytes") return this.#onNumber(frame.readUInt32BE(0));
    const decoded = decodeFrame(frame, {
      encoding: "structures",
      nowMs: performance.now(),
      peer: isServer ? "a" : "b",
      self: isServer ? "b" : "a",
      questionOf: () => "limiter.admit",
    });
    if ("invalid" in decoded) throw new Error(decoded.invalid);
    for (const envelope of decoded.envelopes)
      if ("askId" in envelope) this.#onNumber(envelope.askId);
  }
}

function requestOf(number: number): Envelope {
  const askId = FIRST_ID + number;
  const place = { to: "b/limiter", uid: 0, from: "a/requests", askId, timeoutUs: 30_000_000 };
  const message = admitOf("a/requests", { asker: "a/requests", askId });
  return { kind: "message", ...place, message };
}

function replyOf(askId: number): Envelope {
  return { kind: "reply", to: "a/requests", askId, outcome: { ok: true, value: admitted } };
}

/** Bytes of one question and one answer as the peers send them, without their frame. */
export function messageBytes(): { requestBytes: number; replyBytes: number } {
  const sizeOf = (make: (number: number) => Envelope): number => {
    const size = (count: number): number => {
      const envelopes = Array.from({ length: count }, (_, index) => make(index));
      const frame = { ack: 0, seq: 1, isLeaving: false, envelopes };
      const encoded = encodeFrame(frame, "structures", 0);
      return "invalid" in encoded ? Number.NaN : encoded.length;
    };
    return Math.round((size(101) - size(1)) / 100);
  };
  return {
    requestBytes: sizeOf(requestOf),
    replyBytes: sizeOf((number) => replyOf(FIRST_ID + number)),
  };
}

/** Asks so often, so many at a time. */
export async function rawAsks(
  port: number,
  content: RawContent,
  asks: number,
  inflight: number,
): Promise<void> {
  const socket = connect(port, "127.0.0.1");
  await once(socket, "connect");
  await new Promise<void>((resolve) => {
    let sent = 0;
    let answered = 0;
    const side = new RawSide(socket, false, content, () => {
      answered++;
      if (sent < asks) side.send(sent++);
      else if (answered === asks) resolve();
    });
    while (sent < Math.min(inflight, asks)) side.send(sent++);
  });
  socket.destroy();
}

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const content = JSON.parse(process.argv[2] ?? "{}") as RawContent;
  const server = createServer((socket) => {
    const side = new RawSide(socket, true, content, (number) => side.send(number));
  });
  server.listen(0, "127.0.0.1", () => {
    const address = server.address();
    process.send?.({ port: typeof address === "object" ? address?.port : 0 });
  });
  process.on("disconnect", () => process.exit(0));
}
