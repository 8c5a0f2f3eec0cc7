/**
 * Bytes of a flight for clients of other peers. Actors tell who joins which flight; this carries what the node says.
 *
 *   peer of the leader                       peer of the joiners
 *   Answer ──reader──▶ GET /flight/<id> ═══▶ Answer ──readers──▶ its clients
 *
 * The joiners' peer opens one HTTP request to the leader's, on the port of the peers, for all its clients that read
 * the flight, and fills an Answer of its own with what comes: all from the first byte, then live. The response is a
 * row of frames, `type (1 byte) | length (4 bytes, big-endian) | bytes`: a head, parts, one end. While nothing
 * happens an empty frame says every 2 s that the peer lives; after 10 s without any the relay is lost.
 *
 * Nobody waits for bytes that do not come: a relay that has no answer after 5 s, breaks, or falls silent is lost
 * (`isLost`), which the front tells apart from an answer that ended badly. Memory is bounded as at the upstream: what
 * an Answer keeps, and a reader with unread bytes pauses the socket, at the leader a full socket the reader.
 *
 * A request is signed with the secret of the cluster: HMAC-SHA256 over cluster, both peers, flight and a nonce, which
 * counts once. As with the links, without TLS what is sent can be read on its way: then the network must be trusted.
 */
import { createHmac, randomBytes, timingSafeEqual } from "node:crypto";
import {
  type ClientRequest,
  Agent as HttpAgent,
  request as httpRequest,
  type IncomingMessage,
  type ServerResponse,
} from "node:http";
import { Agent as HttpsAgent, request as httpsRequest } from "node:https";
import type { ErrorCode } from "../actors/errors.ts";
import {
  Answer,
  type AnswerEnd,
  type AnswerForm,
  type AnswerReader,
  type DataPlane,
  type FlightSource,
  type RelayedFlight,
} from "./data-plane.ts";
import { httpErrors } from "./http-errors.ts";
import type { PeerKey } from "./peer-handshake.ts";
import { clientTls, type PeerTls } from "./peer-socket.ts";

export type RelayOptions = {
  cluster: string;
  /** Id of this peer. */
  self: string;
  /** As of the links; the first signs. */
  keys: readonly PeerKey[];
  tls?: PeerTls;
  /** What an answer keeps for late readers, bytes: as at the upstream. */
  answerBytesMax: number;
  /** Where that peer listens, `ws://host:port`; undefined: it is not known. */
  addressOf: (peer: string) => Promise<string | undefined>;
};

const PATH = "/flight/";
const OPEN_MS = 5000;
const ALIVE_MS = 2000;
const SILENCE_MS = 10_000;
/** A frame is a part of an answer: one read of a socket, or a whole body. */
const FRAME_BYTES_MAX = 64 << 20;
/** Connections to one peer; relays beyond wait, at most `OPEN_MS`. */
const SOCKETS_MAX = 512;
/** Nonces that are remembered: far more than a peer opens while one flight can be read. */
const NONCES_MAX = 65_536;
const NONCE = /^[A-Za-z0-9_-]{22}$/;

const ALIVE = 0;
const HEAD = 1;
const PART = 2;
const USAGE = 3;
const END = 4;

const forms: readonly AnswerForm[] = ["sse", "whole", "raw"];

export class FlightRelays implements FlightSource {
  readonly #options: RelayOptions;
  readonly #data: DataPlane;
  readonly #agent: HttpAgent | HttpsAgent;
  readonly #relays = new Map<string, Relay>();
  readonly #served = new Set<Served>();
  readonly #nonces = new Set<string>();
  readonly #heartbeat: NodeJS.Timeout;
  #onIdle: (() => void) | undefined;

  constructor(options: RelayOptions, data: DataPlane) {
    this.#options = options;
    this.#data = data;
    const { tls } = options;
    const connections = { keepAlive: true, maxSockets: SOCKETS_MAX, noDelay: true };
    this.#agent =
      tls === undefined
        ? new HttpAgent(connections)
        : new HttpsAgent({ ...connections, ...clientTls(tls) });
    this.#heartbeat = setInterval(() => {
      for (const served of this.#served) served.beat();
    }, ALIVE_MS).unref();
  }

  /** Flights of other peers that are read here, and readers of other peers. */
  counts(): { reading: number; serving: number } {
    return { reading: this.#relays.size, serving: this.#served.size };
  }

  /** Resolves once no other peer reads here. */
  idle(): Promise<void> {
    if (this.#served.size === 0) return Promise.resolve();
    return new Promise((resolve) => {
      this.#onIdle = resolve;
    });
  }

  /** Breaks all that is open. */
  close(): void {
    clearInterval(this.#heartbeat);
    for (const relay of this.#relays.values()) relay.lose();
    for (const served of this.#served) served.cut();
    this.#agent.destroy();
  }

  // ---- the joiners' side --------------------------------------------------------------------------------

  open(flightId: string, onAnswer: (answer: Answer | undefined) => void): RelayedFlight {
    let relay = this.#relays.get(flightId);
    if (relay === undefined || relay.isLost) {
      const opened = new Relay(this.#options.answerBytesMax, () => {
        if (this.#relays.get(flightId) === opened) this.#relays.delete(flightId);
      });
      relay = opened;
      this.#relays.set(flightId, opened);
      void this.#connect(flightId, opened);
    }
    return relay.hold(onAnswer);
  }

  async #connect(flightId: string, relay: Relay): Promise<void> {
    const cut = flightId.indexOf("/");
    const peer = flightId.slice(0, cut);
    const address = await this.#options.addressOf(peer).catch(() => undefined);
    if (address === undefined || !URL.canParse(address)) return relay.lose();
    if (relay.isOver) return;
    const { hostname, port } = new URL(address);
    const isSecure = this.#options.tls !== undefined;
    const request = (isSecure ? httpsRequest : httpRequest)({
      agent: this.#agent,
      hostname: hostname.replace(/^\[|\]$/g, ""),
      port: port === "" ? (isSecure ? 443 : 80) : Number(port),
      path: PATH + encodeURIComponent(flightId.slice(cut + 1)),
      headers: this.#sign(peer, flightId),
    });
    relay.begin(request);
  }

  #sign(peer: string, flightId: string): Record<string, string> {
    const [key] = this.#options.keys;
    const nonce = randomBytes(16).toString("base64url");
    const mac = key === undefined ? "" : this.#mac(key, this.#options.self, peer, flightId, nonce);
    return {
      "x-headrace-peer": this.#options.self,
      authorization: `Headrace ${key?.id ?? ""} ${nonce} ${mac}`,
    };
  }

  #mac({ id, secret }: PeerKey, from: string, to: string, flightId: string, nonce: string): string {
    return createHmac("sha256", secret)
      .update(JSON.stringify(["headrace flight", this.#options.cluster, id, from, to, flightId]))
      .update(nonce)
      .digest("base64url");
  }

  // ---- the leader's side --------------------------------------------------------------------------------

  /** Of the server on the port of the peers; false for a request that is no flight's. */
  serve(request: IncomingMessage, response: ServerResponse): boolean {
    const url = request.url ?? "";
    if (!url.startsWith(PATH) || request.method !== "GET") return false;
    response.on("error", () => {}); // "close" follows.
    const id = decoded(url.slice(PATH.length));
    if (id === undefined || !this.#isSigned(request, `${this.#options.self}/${id}`)) {
      refuse(response, 401);
      return true;
    }
    const answer = this.#data.answers.get(id);
    const served = answer === undefined ? undefined : Served.begin(answer, response);
    if (served === undefined) {
      refuse(response, 404);
      return true;
    }
    this.#served.add(served);
    response.on("close", () => {
      served.end();
      this.#served.delete(served);
      if (this.#served.size === 0) this.#onIdle?.();
    });
    return true;
  }

  #isSigned({ headers }: IncomingMessage, flightId: string): boolean {
    const from = headers["x-headrace-peer"];
    const [scheme, keyId, nonce = "", mac = ""] = (headers.authorization ?? "").split(" ");
    const key = this.#options.keys.find(({ id }) => id === keyId);
    if (scheme !== "Headrace" || key === undefined || typeof from !== "string") return false;
    if (!NONCE.test(nonce) || this.#nonces.has(nonce)) return false;
    const expected = Buffer.from(this.#mac(key, from, this.#options.self, flightId, nonce));
    const given = Buffer.from(mac);
    if (expected.length !== given.length || !timingSafeEqual(expected, given)) return false;
    this.#nonces.add(nonce);
    const [oldest] = this.#nonces;
    if (this.#nonces.size > NONCES_MAX && oldest !== undefined) this.#nonces.delete(oldest);
    return true;
  }
}

function decoded(text: string): string | undefined {
  try {
    return decodeURIComponent(text);
  } catch {
    return undefined;
  }
}

function refuse(response: ServerResponse, status: number): void {
  response.writeHead(status, { "content-length": "0" });
  response.end();
}

// ---- one flight, at the joiners' peer -----------------------------------------------------------------------

/** Opening, then filling an Answer, then over: ended, lost, or released by all. */
class Relay {
  readonly #bytesMax: number;
  readonly #onOver: () => void;
  readonly #waiting = new Set<(answer: Answer | undefined) => void>();
  #holds = 0;
  #request: ClientRequest | undefined;
  #response: IncomingMessage | undefined;
  #answer: Answer | undefined;
  #timer: NodeJS.Timeout;
  /** The answer has ended, well or badly. */
  isOver = false;
  isLost = false;
  #isPaused = false;
  readonly #frames = new FrameReader((type, bytes) => this.#onFrame(type, bytes));

  constructor(bytesMax: number, onOver: () => void) {
    this.#bytesMax = bytesMax;
    this.#onOver = onOver;
    this.#timer = setTimeout(() => this.lose(), OPEN_MS);
  }

  hold(onAnswer: (answer: Answer | undefined) => void): RelayedFlight {
    this.#holds++;
    const tell = (answer: Answer | undefined): void => {
      if (this.#waiting.delete(tell)) onAnswer(answer);
    };
    this.#waiting.add(tell);
    if (this.#answer !== undefined || this.isOver) setImmediate(() => tell(this.#answer));
    const isLost = (): boolean => this.isLost;
    let isHeld = true;
    return {
      get isLost() {
        return isLost();
      },
      release: () => {
        if (!isHeld) return;
        isHeld = false;
        this.#waiting.delete(tell);
        if (--this.#holds === 0) this.#finish();
      },
    };
  }

  begin(request: ClientRequest): void {
    this.#request = request;
    request.on("error", () => this.lose());
    request.on("response", (response) => {
      if (response.statusCode !== 200) {
        response.resume();
        return this.lose();
      }
      this.#response = response;
      response.on("data", (chunk: Buffer) => {
        if (!this.#isPaused) this.#timer.refresh();
        if (!this.isOver && !this.#frames.push(chunk)) this.lose();
      });
      response.on("error", () => this.lose());
      response.on("close", () => this.lose()); // After an end it changes nothing.
    });
    request.end();
  }

  #onFrame(type: number, bytes: Buffer): void {
    if (this.isOver || type === ALIVE) return;
    if (type === HEAD && this.#answer === undefined) return this.#onHead(bytes);
    const answer = this.#answer;
    if (answer !== undefined && (type === PART || type === USAGE)) {
      // Within a reader's turn: resume later.
      const resume = (): void => void setImmediate(() => this.#resume());
      if (!answer.append({ bytes, usage: type === USAGE }, resume)) this.#pause();
      return;
    }
    const end = answer === undefined || type !== END ? undefined : endOf(bytes);
    if (end === undefined) return this.lose();
    this.#over(end);
  }

  #onHead(bytes: Buffer): void {
    const head = headOf(bytes);
    if (head === undefined) return this.lose();
    this.#answer = new Answer(head.form, head.head, this.#bytesMax);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.lose(), SILENCE_MS);
    for (const tell of [...this.#waiting]) tell(this.#answer);
  }

  #pause(): void {
    this.#isPaused = true;
    this.#response?.pause();
    clearTimeout(this.#timer); // Silent by our own wish.
  }

  #resume(): void {
    if (!this.#isPaused || this.isOver) return;
    this.#isPaused = false;
    this.#timer = setTimeout(() => this.lose(), SILENCE_MS);
    this.#response?.resume();
  }

  /** Nothing more is to be had from there. */
  lose(): void {
    if (this.isOver) return;
    this.isLost = true;
    this.#over({ ok: false, code: "stream_broken" });
    this.#request?.destroy();
  }

  #over(end: AnswerEnd): void {
    this.isOver = true;
    clearTimeout(this.#timer);
    this.#answer?.finish(end);
    if (this.#isPaused) this.#response?.resume();
    for (const tell of [...this.#waiting]) tell(this.#answer);
    if (this.isLost) this.#onOver();
  }

  /** Nobody reads it any more. */
  #finish(): void {
    this.#onOver();
    if (this.isOver) return;
    this.isOver = true;
    clearTimeout(this.#timer);
    this.#request?.destroy();
  }
}

// ---- one reader, at the leader's peer -----------------------------------------------------------------------

class Served {
  readonly #response: ServerResponse;
  #reader: AnswerReader | undefined;
  #isBlocked = false;

  private constructor(response: ServerResponse) {
    this.#response = response;
  }

  /** Undefined when the beginning of the answer is gone. */
  static begin(answer: Answer, response: ServerResponse): Served | undefined {
    const served = new Served(response);
    const reader = answer.read(() => served.#pump());
    if (reader === null) return undefined;
    served.#reader = reader;
    response.writeHead(200, { "content-type": "application/octet-stream" });
    response.on("drain", () => {
      served.#isBlocked = false;
      served.#pump();
    });
    const { form, head } = answer;
    served.#write(HEAD, Buffer.from(JSON.stringify({ form, ...head })));
    served.#pump();
    return served;
  }

  #pump(): void {
    while (this.#reader !== undefined && !this.#isBlocked) {
      const next = this.#reader.next();
      if (next === "wait") return;
      if (next === "overrun") return this.cut();
      if ("bytes" in next) {
        this.#write(next.usage ? USAGE : PART, next.bytes);
        continue;
      }
      this.#write(END, Buffer.from(JSON.stringify(next)));
      this.end();
      this.#response.end();
    }
  }

  #write(type: number, bytes: Uint8Array): void {
    const frame = Buffer.allocUnsafe(5 + bytes.byteLength);
    frame[0] = type;
    frame.writeUInt32BE(bytes.byteLength, 1);
    frame.set(bytes, 5);
    if (!this.#response.write(frame)) this.#isBlocked = true;
  }

  beat(): void {
    if (this.#reader !== undefined && !this.#isBlocked) this.#write(ALIVE, new Uint8Array(0));
  }

  /** Where it is, so that it cannot be taken for an end. */
  cut(): void {
    this.end();
    this.#response.destroy();
  }

  end(): void {
    this.#reader?.close();
    this.#reader = undefined;
  }
}

// ---- frames -----------------------------------------------------------------------------------------------

/** Cuts what comes into frames. */
class FrameReader {
  readonly #onFrame: (type: number, bytes: Buffer) => void;
  readonly #header = Buffer.alloc(5);
  #headerLength = 0;
  #body: Buffer | undefined;
  #bodyLength = 0;

  constructor(onFrame: (type: number, bytes: Buffer) => void) {
    this.#onFrame = onFrame;
  }

  /** False when these are no frames. */
  push(chunk: Buffer): boolean {
    let at = 0;
    while (at < chunk.length) {
      if (this.#body === undefined) {
        const taken = chunk.copy(this.#header, this.#headerLength, at, at + 5 - this.#headerLength);
        at += taken;
        this.#headerLength += taken;
        if (this.#headerLength < 5) return true;
        const length = this.#header.readUInt32BE(1);
        if (length > FRAME_BYTES_MAX) return false;
        this.#body = Buffer.alloc(length);
        this.#bodyLength = 0;
      }
      const body = this.#body;
      const taken = chunk.copy(body, this.#bodyLength, at);
      at += taken;
      this.#bodyLength += taken;
      if (this.#bodyLength < body.length) return true;
      this.#body = undefined;
      this.#headerLength = 0;
      this.#onFrame(this.#header[0] ?? END, body);
    }
    return true;
  }
}

function fieldsOf(bytes: Buffer): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(bytes.toString());
    return typeof value === "object" && value !== null
      ? (value as Record<string, unknown>)
      : undefined;
  } catch {
    return undefined;
  }
}

function headOf(bytes: Buffer): Pick<Answer, "form" | "head"> | undefined {
  const fields = fieldsOf(bytes);
  const form = forms.find((each) => each === fields?.form);
  const { status, contentType } = fields ?? {};
  if (form === undefined || typeof contentType !== "string") return undefined;
  if (!Number.isInteger(status) || Number(status) < 200 || Number(status) > 599) return undefined;
  return { form, head: { status: Number(status), contentType } };
}

function endOf(bytes: Buffer): AnswerEnd | undefined {
  const fields = fieldsOf(bytes);
  if (fields?.ok === true) return { ok: true };
  if (fields?.ok !== false || typeof fields.code !== "string") return undefined;
  return Object.hasOwn(httpErrors, fields.code)
    ? { ok: false, code: fields.code as ErrorCode }
    : undefined;
}
