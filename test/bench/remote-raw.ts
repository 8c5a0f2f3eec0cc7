/**
 * The least that must be done to ask another process: one TCP socket, frames with their length in front, everything
 * of one turn of the event loop in one frame. No WebSocket, no handshake, no actors.
 *
 * Two contents: `bytes` moves messages of a fixed size, unread but for their number; `codec` encodes and decodes
 * them as the peers do.
 *
 * As a process of its own it is the side that answers: its content and sizes come as JSON in the first argument.
 */
import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { pathToFileURL } from "node:url";
import type { Envelope } from "../../runtime/system.ts";
import { decodeFrame, encodeFrame, FRAME_ENVELOPES_MAX } from "../../transport/wire.ts";
import { snapshotOf } from "./remote-system.ts";

export type RawContent = { content: "bytes" | "codec"; requestBytes: number; replyBytes: number };

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

  send(payload: Uint8Array): void {
    const head = Buffer.allocUnsafe(4);
    head.writeUInt32BE(payload.length, 0);
    this.#socket.cork();
    this.#socket.write(head);
    this.#socket.write(payload);
    this.#socket.uncork();
  }
}

/** One side: takes numbers, sends them as messages at the end of the turn; gives the numbers that come. */
export class RawSide {
  readonly #frames: Frames;
  readonly #content: RawContent["content"];
  readonly #outBytes: number;
  readonly #inBytes: number;
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
    this.#inBytes = isServer ? requestBytes : replyBytes;
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
    for (let start = 0; start < batch.length; start += FRAME_ENVELOPES_MAX) {
      this.#frames.send(this.#encoded(batch.slice(start, start + FRAME_ENVELOPES_MAX)));
    }
  }

  #encoded(numbers: readonly number[]): Uint8Array {
    if (this.#content === "bytes") {
      const payload = Buffer.alloc(numbers.length * this.#outBytes);
      for (let index = 0; index < numbers.length; index++) {
        payload.writeUInt32BE(numbers[index] ?? 0, index * this.#outBytes);
      }
      return payload;
    }
    const envelopes = numbers.map(this.#makeEnvelope);
    const frame = { ack: 0, seq: 1, isLeaving: false, envelopes };
    const encoded = encodeFrame(frame, "structures", performance.now());
    if ("invalid" in encoded) throw new Error(encoded.invalid);
    return encoded;
  }

  #onFrame(frame: Buffer, isServer: boolean): void {
    if (this.#content === "bytes") {
      for (let at = 0; at < frame.length; at += this.#inBytes)
        this.#onNumber(frame.readUInt32BE(at));
      return;
    }
    const decoded = decodeFrame(frame, {
      encoding: "structures",
      nowMs: performance.now(),
      peer: isServer ? "a" : "b",
      self: isServer ? "b" : "a",
      questionOf: () => "gpu_node.acquire",
    });
    if ("invalid" in decoded) throw new Error(decoded.invalid);
    for (const envelope of decoded.envelopes)
      if ("askId" in envelope) this.#onNumber(envelope.askId);
  }
}

const replySnapshot = snapshotOf("echo", 0);

function requestOf(number: number): Envelope {
  const askId = 2 ** 51 + number;
  const message = {
    kind: "gpu_node.acquire",
    leaseId: "01JCB2VX5T9QZ4K8N7W6R3M2HD#1",
    owner: "a/requests",
    uncachedTokens: 512,
    replyTo: { asker: "a/requests", askId },
  };
  const place = { to: "b/nodes/echo", uid: 0, from: "a/requests", askId, timeoutUs: 30_000_000 };
  return { kind: "message", ...place, message };
}

function replyOf(number: number): Envelope {
  const value = { kind: "denied", reason: "full", snapshot: replySnapshot };
  return { kind: "reply", to: "a/requests", askId: number, outcome: { ok: true, value } };
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
    replyBytes: sizeOf((number) => replyOf(2 ** 51 + number)),
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
