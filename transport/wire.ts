/**
 * The wire between peers: frames to bytes and back, on msgpackr. Pure, and the only importer of that package.
 *
 * A frame is one message of a connection: some envelopes of the runtime, in order, and what the link itself has to
 * say. As bytes it is a msgpack array:
 *
 *   [sentAtMs, ack, seq, heartbeat | nil, leaving, [envelope …]]
 *
 * Objects of known shape take their number in `structures` and their values; others take their keys along. Both ends
 * must hold the same list (its hash is in the handshake); where they do not, both send plain maps, and nothing else
 * changes. There is no state between frames: a frame that is lost or refused harms no other. Hence never
 * `sequential`, and one encoder for all links.
 *
 * Reading is in two steps. `decodeFrame` gives a frame whose every byte was looked at, or says why it is none: then
 * the sender is broken or hostile, and its link should end. Within a good frame each envelope is checked against the
 * table of wire-messages.ts; one that does not fit (an unknown kind of a newer peer, a private message, a wrong
 * field) is set aside with its reason, and the others go on. Only a bad system envelope spoils its frame: their
 * numbers must not have gaps.
 *
 * Instants (`…AtMs`) are of the sender's monotonic clock, which began at another time than ours. Every frame says
 * when it was made; its instants are moved by the difference. What the frame took on its way is so added to them.
 *
 * Texts come from msgpackr's plain decoder: its native one is faster, but gives texts that keep the whole frame
 * alive (6 KB for a kept id of 30 characters).
 */
import { createHash } from "node:crypto";
import { addExtension, Packr } from "msgpackr/pack";
import { Unpackr } from "msgpackr/unpack";
import type { AskOutcome, Terminated } from "../runtime/actor.ts";
import type { Envelope } from "../runtime/system.ts";
import { askFailure, crossingRows } from "./wire-messages.ts";
import {
  amount,
  bad,
  count,
  exactly,
  finite,
  ID_LENGTH_MAX,
  oneOf,
  path,
  record,
  type Shape,
  takeFault,
  union,
} from "./wire-shape.ts";

/** Versions of the protocol that this code speaks: frames, handshake, and what messages mean. */
export const protocolVersions = { min: 1, max: 1 } as const;

const snapshotKeys = [
  ...["node", "address", "incarnation", "version", "atMs", "inflight", "prefillTokens"],
  ...["inflightMax", "circuit", "probePermits", "draining", "ramp", "healthy", "restUntilMs"],
  ...["articleWeight", "models", "adapters"],
] as const;
const latencyKeys = ["latencyMsAtInflight", "latencyMsPeakEwma"] as const;
const releaseKeys = [
  ...["kind", "leaseId", "outcome", "e2eMs", "decodeMs", "promptTokens", "outputTokens"],
] as const;
const admitKeys = [
  ...["kind", "requestId", "owner", "key", "limits", "model", "promptTokens"],
] as const;

const peerAdmitKeys = [
  ...["kind", "from", "requestId", "key", "limits", "model", "promptTokens"],
] as const;

/**
 * Key lists of the objects that travel, in the order in which their senders build them; the frequent ones first, as
 * 32 have numbers of one byte. An object with other keys, or in another order, is as right, and longer.
 */
const structures: readonly (readonly string[])[] = [
  // Envelopes and what is in every one.
  ["kind", "to", "uid", "from", "askId", "timeoutUs", "message"],
  ["kind", "to", "askId", "outcome"],
  ["ok", "value"],
  ["ok", "failure"],
  ["asker", "askId"],
  ["path", "uid"],
  ["seq", "loopLagMs", "queueDepth", "epoch", "echo"],
  ["seq", "heldMs"],
  // Nodes.
  ["kind", "snapshot"],
  [...snapshotKeys, "itlSeconds", "scrape", ...latencyKeys],
  [
    "engine",
    "missing",
    "running",
    "waiting",
    "kv",
    "generatedTokensTotal",
    "preemptionsTotal",
    "atMs",
  ],
  ["kind", "leaseId", "owner", "uncachedTokens", "replyTo"],
  ["kind", "leaseId", "node", "probe", "snapshot"],
  ["kind", "reason", "snapshot"],
  ["kind", "leaseId", "ttftMs"],
  ["kind", "leaseId", "outputTokens"],
  [...releaseKeys, "ttftMs"],
  releaseKeys,
  // Cache.
  ["kind", "key", "tenant", "requestId", "read", "lead", "participant", "replyTo"],
  ["kind", "flightId"],
  ["kind", "flightId", "committed"],
  ["kind"],
  ["node", "attempts"],
  ["kind", "key", "flightId", "node", "attempts"],
  ["kind", "key", "flightId", "result", "replyTo"],
  ["kind", "answer"],
  ["body", "bytes", "route", "model", "promptTokens", "outputTokens"],
  ["kind", "answer", "ageMs"],
  // Limits.
  [...admitKeys, "maxTokens", "expiresAtMs", "replyTo"],
  ["kind", "reservedTokens", "state"],
  ["kind", "requestId", "key", "promptTokens", "cachedTokens", "outputTokens"],
  ["limit", "remaining", "resetMs"],
  // From here on two bytes.
  ["atMs", "requests", "tokens"],
  ["atMs", "requests"],
  ["atMs"],
  ["requestsPerMinute", "tokensPerMinute"],
  [...admitKeys, "expiresAtMs", "replyTo"],
  [...admitKeys, "maxTokens", "expiresAtMs", "takeover", "replyTo"],
  [...peerAdmitKeys, "expiresInMs", "replyTo"],
  [...peerAdmitKeys, "maxTokens", "expiresInMs", "replyTo"],
  ["kind", "from", "requestId", "key", "promptTokens", "cachedTokens", "outputTokens"],
  ["kind", "owner", "epoch"],
  // Members.
  ["kind", "from", "incarnation", "heartbeat"],
  ["seq", "loopLagMs", "queueDepth", "epoch", "viewHash", "renewsLease", "heard"],
  ["id", "incarnation", "seq"],
  ["kind", "view"],
  ["epoch", "entries"],
  ["id", "incarnation", "address", "version", "state", "stamp"],
  // Questions by meaning.
  ["kind", "question", "replyTo"],
  ["scope", "tenant", "model", "text", "vector", "policy"],
  ["scope", "tenant", "model", "text", "vector"],
  ["mode", "similarityMin", "errorRateMax", "isStrict"],
  ["kind", "says"],
  ["kind", "entryId", "similarity", "answer", "ageMs", "says"],
  ["kind", "entryId", "similarity", "says"],
  ["entryId", "similarity"],
  ["kind", "question", "answer", "isShadow"],
  ["kind", "explored", "answer"],
  ["kind", "key", "flightId", "answer", "replyTo"],
  ["kind", "requestId", "flightId", "answer"],
  ["kind", "code", "retryAfterMs", "state"],
  ["kind", "reason"],
  ["kind", "key", "requestId"],
  ["kind", "key", "flightId", "result"],
  ["kind", "requestId", "flightId", "node", "attempts"],
  ["kind", "requestId", "flightId"],
  ["kind", "key", "requestId", "flightId"],
  ["kind", "requestId", "flightId", "code"],
  ["kind", "code", "shared"],
  [...releaseKeys, "ttftMs", "detail"],
  [...releaseKeys, "detail"],
  [...releaseKeys, "retryAfterMs", "detail"],
  ["kind", "node", "replyTo"],
  ["granted"],
  ["kind", "router"],
  ["kind", "owner"],
  ["kind", "to", "uid", "from", "watchId"],
  ["kind", "to", "watchId", "terminated"],
  ["path", "uid", "reason"],
  ["kind", "to", "from", "watchId"],
  ["seq", "loopLagMs", "queueDepth", "epoch"],
  snapshotKeys,
  [...snapshotKeys, "scrape"],
  [...snapshotKeys, "itlSeconds"],
  [...snapshotKeys, "itlSeconds", "scrape"],
  [...snapshotKeys, "scrape", ...latencyKeys],
  [...snapshotKeys, "itlSeconds", ...latencyKeys],
  // What engines tell, beside vLLM above (transport/engine-metrics.ts has the order).
  [
    "engine",
    "missing",
    "running",
    "waiting",
    "waitingForCapacity",
    "kv",
    "generatedTokensTotal",
    "preemptionsTotal",
    "atMs",
  ],
  ["engine", "missing", "running", "waiting", "kv", "generatedTokensTotal", "atMs"],
  ["engine", "missing", "running", "waiting", "kv", "generatedTokensTotal", "maxSequences", "atMs"],
  ["engine", "missing", "running", "waiting", "kv", "maxSequences", "atMs"],
  ["engine", "missing", "running", "waiting", "kv", "atMs"],
  ["engine", "missing", "running", "waiting", "generatedTokensTotal", "atMs"],
  ["engine", "missing", "running", "waiting", "atMs"],
  ["engine", "missing", "waiting", "latencySeconds", "gpuMemory", "atMs"],
];

/** Names the list above: equal on both ends, or maps are sent. */
export const structuresHash = createHash("sha256")
  .update(JSON.stringify(structures))
  .digest("hex")
  .slice(0, 32);

/** `structures` where both ends hold the same list, else `maps`. */
export type Encoding = "structures" | "maps";

/** What a peer says of itself every 250 ms. */
export type Heartbeat = {
  /** Counts up by one within a connection. */
  seq: number;
  /** How late its event loop runs (p99 of late), ms. */
  loopLagMs: number;
  /** Mail waiting in its mailboxes. */
  queueDepth: number;
  /** Of its view of the members. */
  epoch: number;
  /** The last heartbeat it has heard of ours, and how long before this one; absent before the first. */
  echo?: { seq: number; heldMs: number };
};

/** One message of a connection. */
export type Frame = {
  /** Highest number of a system envelope that came in order; covers all before it. */
  ack: number;
  /** Number of the first system envelope among these; the others count up from it. */
  seq: number;
  heartbeat?: Heartbeat;
  /** The sender goes, and will not come back as this incarnation. */
  isLeaving: boolean;
  envelopes: readonly Envelope[];
};

/** An envelope that was set aside, and why: one line without its contents. */
export type Rejected = {
  reason: string;
  /** As far as they can be read. */
  to: string;
  from: string;
  /** 0: nobody waits for an answer. */
  askId: number;
  messageKind: string;
};

/** What was read of a frame. */
export type ReceivedFrame = Frame & { rejected: readonly Rejected[] };

/** Bytes that are no frame, and why. */
export type Invalid = { invalid: string };

/** What the reader must know to check a frame. */
export type Reading = {
  encoding: Encoding;
  /** Our monotonic time. */
  nowMs: number;
  /** First part of every path in the sender's process: what it may speak for. */
  peer: string;
  /** First part of ours: what it may speak to. */
  self: string;
  /** The kind of the message that this ask, still open, sent; a reply must fit it. */
  questionOf: (askId: number) => string | undefined;
};

/** Envelopes in a frame, whatever their size. */
export const FRAME_ENVELOPES_MAX = 256;

/** Whether it takes a number, and is sent again after a reconnection. */
export function isSystem({ kind }: { kind?: unknown }): boolean {
  return kind === "watch" || kind === "unwatch" || kind === "terminated";
}

// ---- encoding ---------------------------------------------------------------------------------------------

for (const type of [0x42, 0x62, 0x65, 0x69, 0x70, 0x73, 0x74, 0x78, 0xff]) {
  // BigInts, bundles, errors, references, sets, typed arrays, expressions, dates: no message holds one.
  addExtension({
    type,
    unpack: () => {
      throw new RangeError(`an object of type ${type}`);
    },
  });
}

/** Vectors, as bytes: little-endian, as every machine is that runs Node on a GPU host. Copied out of the frame. */
addExtension({
  Class: Float32Array,
  type: 0x56,
  pack: ({ buffer, byteOffset, byteLength }: Float32Array) =>
    Buffer.from(buffer, byteOffset, byteLength),
  unpack: (bytes: Uint8Array) => {
    if (bytes.length % 4 !== 0) throw new RangeError("a vector of a broken length");
    return new Float32Array(new Uint8Array(bytes).buffer);
  },
});

/** One encoder and one decoder for all links. */
class Codec {
  readonly #packr: Packr;
  readonly #unpackr: Unpackr;

  constructor(encoding: Encoding) {
    const options =
      encoding === "maps"
        ? { useRecords: false, variableMapSize: true }
        : {
            // Not `structures`: that option leaves those beyond 32 unreadable. It writes into what it is given.
            getStructures: () => structures.map((keys) => [...keys]),
            maxSharedStructures: structures.length,
          };
    this.#packr = new Packr({ ...options });
    this.#unpackr = new Unpackr({ ...options });
  }

  pack(value: unknown): Uint8Array<ArrayBuffer> {
    return this.#packr.pack(value);
  }

  /** @throws Error of any sort for bytes that are not msgpack */
  unpack(bytes: Uint8Array): unknown {
    return this.#unpackr.unpack(bytes);
  }
}

const codecs: Readonly<Record<Encoding, Codec>> = {
  structures: new Codec("structures"),
  maps: new Codec("maps"),
};

/**
 * The bytes of a frame; or why it has none: an envelope holds what cannot travel. The caller keeps to
 * `FRAME_ENVELOPES_MAX`, and to its own limit on bytes.
 */
export function encodeFrame(
  frame: Frame,
  encoding: Encoding,
  nowMs: number,
): Uint8Array<ArrayBuffer> | Invalid {
  const { ack, seq, heartbeat, isLeaving, envelopes } = frame;
  try {
    return codecs[encoding].pack([nowMs, ack, seq, heartbeat ?? null, isLeaving, envelopes]);
  } catch (error) {
    return { invalid: error instanceof Error ? error.message : "it cannot be encoded" };
  }
}

// ---- decoding ---------------------------------------------------------------------------------------------

const heartbeatShape = record<Heartbeat>({
  seq: count,
  loopLagMs: amount,
  queueDepth: amount,
  epoch: count,
  echo: { optional: record<{ seq: number; heldMs: number }>({ seq: count, heldMs: amount }) },
});

type System = Extract<Envelope, { kind: "watch" | "unwatch" | "terminated" }>;

const systemShape = union<System>({
  watch: record<Extract<System, { kind: "watch" }>>({
    kind: exactly("watch"),
    to: path,
    uid: count,
    from: path,
    watchId: count,
  }),
  unwatch: record<Extract<System, { kind: "unwatch" }>>({
    kind: exactly("unwatch"),
    to: path,
    from: path,
    watchId: count,
  }),
  terminated: record<Extract<System, { kind: "terminated" }>>({
    kind: exactly("terminated"),
    to: path,
    watchId: count,
    terminated: record<Terminated>({
      path,
      uid: count,
      reason: oneOf("stopped", "failed", "noproc", "noconnection"),
    }),
  }),
});

const failureShape: Shape<AskOutcome<never>> = record<{ ok: false; failure: string }>({
  ok: exactly(false),
  failure: askFailure,
}) as Shape<AskOutcome<never>>;

/** A frame, each envelope of it checked; or why these bytes are none. Never throws. */
export function decodeFrame(bytes: Uint8Array, reading: Reading): ReceivedFrame | Invalid {
  let value: unknown;
  try {
    value = codecs[reading.encoding].unpack(bytes);
  } catch (error) {
    return { invalid: `not msgpack: ${error instanceof Error ? error.message : "unreadable"}` };
  }
  if (!Array.isArray(value) || value.length < 6) return { invalid: "not a list of six" };
  const [sentAtMs, ack, seq, beat, isLeaving, envelopes]: readonly unknown[] = value;
  const shiftMs = reading.nowMs - (Number.isFinite(sentAtMs) ? Number(sentAtMs) : Number.NaN);
  if (finite.read(shiftMs, 0) === bad) return { invalid: "its time is not a finite number" };
  if (count.read(ack, 0) === bad || count.read(seq, 0) === bad) {
    return { invalid: "its numbers are not whole numbers from 0" };
  }
  if (typeof isLeaving !== "boolean") return { invalid: "whether it leaves is not true or false" };
  if (!Array.isArray(envelopes) || envelopes.length > FRAME_ENVELOPES_MAX) {
    return { invalid: `its envelopes are not a list of at most ${FRAME_ENVELOPES_MAX}` };
  }
  const heartbeat = beat === null ? undefined : heartbeatShape.read(beat, 0);
  if (heartbeat === bad) return { invalid: `its heartbeat: ${takeFault()}` };
  const rejected: Rejected[] = [];
  const good: Envelope[] = [];
  for (let index = 0; index < envelopes.length; index++) {
    const envelope: unknown = envelopes[index];
    const fault = faultOf(envelope, shiftMs, reading);
    if (fault === undefined) good.push(envelope as Envelope);
    else if (isObject(envelope) && isSystem(envelope))
      return { invalid: `a system envelope: ${fault}` };
    else rejected.push(setAside(envelope, fault));
  }
  return {
    ack: ack as number,
    seq: seq as number,
    isLeaving,
    envelopes: good,
    rejected,
    ...(heartbeat === undefined ? {} : { heartbeat: heartbeat as Heartbeat }),
  };
}

/** Why it may not be delivered; checks, and moves instants, in place. */
function faultOf(value: unknown, shiftMs: number, reading: Reading): string | undefined {
  if (!isObject(value)) return "it is not an object";
  const envelope = value;
  const { kind, to } = envelope;
  if (!isPathOf(reading.self, to)) return "it is not for an actor of this process";
  switch (kind) {
    case "message":
      return messageFaultOf(envelope, to, shiftMs, reading);
    case "reply":
      return replyFaultOf(envelope, shiftMs, reading);
    case "watch":
    case "unwatch":
    case "terminated":
      if (systemShape.read(value, shiftMs) === bad) return takeFault();
      if (kind === "terminated") return undefined;
      return isPathOf(reading.peer, envelope.from) ? undefined : "it is not from its sender";
    default:
      return "it is of no known kind";
  }
}

function messageFaultOf(
  envelope: Partial<Record<string, unknown>>,
  to: string,
  shiftMs: number,
  { peer }: Reading,
): string | undefined {
  const { uid, from, askId, timeoutUs, message } = envelope;
  if (!isCount(uid) || !isCount(askId)) return "its numbers are not whole numbers from 0";
  if (typeof timeoutUs !== "number" || !(timeoutUs >= 0 && timeoutUs < Number.POSITIVE_INFINITY)) {
    return "its time-out is not a finite number from 0";
  }
  // Told by the host, it has no sender.
  if (!isPathOf(peer, from) && !(from === "" && askId === 0)) return "it is not from its sender";
  if (!isObject(message)) return "its message is not an object";
  const row = crossingRows.get(message.kind);
  if (row === undefined) return "no such message may come from another process";
  if (!isFor(to, row.to)) return `it is for an actor of ${row.to}`;
  const read = row.shape.read(message, shiftMs);
  if (read === bad) return takeFault();
  if (read !== message) envelope.message = read;
  return undefined;
}

function replyFaultOf(
  envelope: Partial<Record<string, unknown>>,
  shiftMs: number,
  { questionOf }: Reading,
): string | undefined {
  const { askId, outcome } = envelope;
  if (!isCount(askId)) return "its number is not a whole number from 0";
  if (!isObject(outcome)) return "its outcome is not an object";
  if (outcome.ok !== true) {
    return failureShape.read(outcome, shiftMs) === bad ? takeFault() : undefined;
  }
  const question = questionOf(askId);
  if (question === undefined) {
    // Nobody waits any more: it will be counted as late, and not be looked at.
    outcome.value = undefined;
    return undefined;
  }
  const shape = crossingRows.get(question)?.reply;
  if (shape === undefined) return `${question} has no reply`;
  const read = shape.read(outcome.value, shiftMs);
  if (read === bad) return takeFault();
  if (read !== outcome.value) outcome.value = read;
  return undefined;
}

function isObject(value: unknown): value is Partial<Record<string, unknown>> {
  return typeof value === "object" && value !== null;
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

/** Whether the path lies in the process with that root. */
function isPathOf(root: string, value: unknown): value is string {
  return (
    typeof value === "string" &&
    value.length <= ID_LENGTH_MAX &&
    value.charCodeAt(root.length) === 47 &&
    value.startsWith(root)
  );
}

/** Whether the second part of the path is that. */
function isFor(to: string, receiver: string): boolean {
  const start = to.indexOf("/") + 1;
  const end = start + receiver.length;
  return to.startsWith(receiver, start) && (to.length === end || to.charCodeAt(end) === 47);
}

function setAside(value: unknown, reason: string): Rejected {
  const { kind, to, from, askId, message } = isObject(value) ? value : {};
  const asText = (part: unknown) => (typeof part === "string" ? part.slice(0, ID_LENGTH_MAX) : "");
  const messageKind = isObject(message) && "kind" in message ? message.kind : kind;
  return {
    reason,
    to: asText(to),
    from: asText(from),
    askId: kind === "message" && isCount(askId) ? askId : 0,
    messageKind: asText(messageKind).slice(0, 64),
  };
}

// ---- handshake --------------------------------------------------------------------------------------------

/** Before a peer is known, it may send nothing larger. */
export const HANDSHAKE_BYTES_MAX = 1024;

/** One message of a handshake, as a map: it must be read before anything is agreed on. */
export function encodeHandshake(message: object): Uint8Array<ArrayBuffer> {
  return codecs.maps.pack(message);
}

/** Checked against the shape; or why not. Never throws. */
export function decodeHandshake<T>(bytes: Uint8Array, shape: Shape<T>): T | Invalid {
  if (bytes.length > HANDSHAKE_BYTES_MAX) {
    return { invalid: `${bytes.length} bytes before it is known who sends them` };
  }
  let value: unknown;
  try {
    value = codecs.maps.unpack(bytes);
  } catch (error) {
    return { invalid: `not msgpack: ${error instanceof Error ? error.message : "unreadable"}` };
  }
  const read = shape.read(value, 0);
  return read === bad ? { invalid: takeFault() } : (read as T);
}
