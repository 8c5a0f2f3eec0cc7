/**
 * The handshake of one connection between peers: who are you, do we speak the same, do you know the secret? Pure.
 *
 *   client (who dialled)                              server (who was dialled)
 *   ──────────────────────────────────────────────────────────────────────────────────────────
 *   Hello{cluster, node, incarnation, versions, …, keyIds, nonce} ─▶ checks what it says
 *                       ◀─ Challenge{node, incarnation, version, keyId, nonce, mac "srv"}
 *   checks the mac; wants this peer?
 *   Proof{previous, received, mac "cli"} ───────────────────────────▶ checks the mac; wants this peer?
 *                                             ◀─ Welcome{received, mac "ok"}
 *   checks the mac: established                         established
 *
 * Either side may answer Refuse{reason, detail} instead and close. Until established each side takes one message of
 * at most 1 KiB at a time, a plain map, and nothing of an actor.
 *
 * A mac is HMAC-SHA256 under a secret that never travels. Each covers everything said before, both identities, both
 * nonces and the channel (of TLS: its exported key material), and its own role. So a recorded message is worth
 * nothing in another handshake, nor one side's answer as the other's, nor a handshake that is passed on through
 * another TLS session. Without TLS what follows is neither secret nor safe from being changed on the way: then the
 * network must be trusted.
 *
 * Secrets have ids, and each side may know several: a new one is added to every peer as second, then moved to the
 * front, then the old one is removed, and no link breaks. The server takes the first of its own that the client has.
 *
 * `previous` and `received` are about sessions; peer-links.ts decides what they mean, and which peers are wanted.
 */
import { createHash, createHmac, timingSafeEqual } from "node:crypto";
import {
  decodeHandshake,
  type Encoding,
  encodeHandshake,
  protocolVersions,
  structuresHash,
} from "./wire.ts";
import { bytes, count, exactly, finite, list, oneOf, record, text, union } from "./wire-shape.ts";

/** One life of one peer. `incarnation` grows from life to life of the same node. */
export type PeerIdentity = { readonly node: string; readonly incarnation: number };

/** A secret that peers share. `id` is no secret. */
export type PeerKey = { readonly id: string; readonly secret: Uint8Array };

/** Why two processes do not link up. */
export type RefusalReason =
  | "cluster" // another cluster
  | "settings" // settings that must be equal in a cluster differ
  | "version" // no common version of the protocol
  | "key" // no common key id
  | "secret" // same key id, other secret; or a replay, or a forgery
  | "malformed" // not a message of the handshake
  | "self" // it dialled itself
  | "same_id" // another process has the same id
  | "stale" // a later life of that peer is known
  | "duplicate" // there is a link already
  | "too_many" // failures of that address, or connections that say nothing
  | "closing"; // the process is about to end

export type Refusal = { reason: RefusalReason; detail: string };

export type HandshakeOptions = {
  /** Peers of other clusters are refused; 1 to 64 characters. */
  cluster: string;
  self: PeerIdentity;
  /** Names what must be equal in all peers of the cluster, such as the number of buckets; at most 64 characters. */
  settings: string;
  /** At least one; the first is preferred. Ids of 1 to 32 characters, secrets of at least 16 bytes. */
  keys: readonly PeerKey[];
  /** Unpredictable bytes. */
  randomBytes: (count: number) => Uint8Array;
  /** What this side speaks; only tests say other than the defaults. */
  versions?: { min: number; max: number };
  structures?: string;
};

/** What a side remembers of its session with a peer. */
export type SessionClaim = {
  /** Name of the last connection with this peer that it saw up; empty: none. */
  previous: string;
  /** Highest system number received; −1: it remembers no session. */
  received: number;
};

/** Whether the peer is wanted, asked when it has proved who it is. */
export type Admission = SessionClaim | { refuse: Refusal };

/** Both sides know each other. */
export type Established = {
  peer: PeerIdentity;
  version: number;
  encoding: Encoding;
  /** Names this connection, the same on both sides. */
  connection: string;
  /** Of the other side. */
  claim: SessionClaim;
};

export type HandshakeStep = {
  send?: Uint8Array<ArrayBuffer>;
  established?: Established;
  /** It is over; what `send` holds, if anything, tells the other side. `isTold`: it was the other's word. */
  refused?: Refusal & { isTold: boolean };
};

type Hello = {
  kind: "hello";
  cluster: string;
  node: string;
  incarnation: number;
  min: number;
  max: number;
  structures: string;
  settings: string;
  keyIds: string[];
  nonce: Uint8Array;
};
type Challenge = {
  kind: "challenge";
  node: string;
  incarnation: number;
  version: number;
  structures: string;
  keyId: string;
  nonce: Uint8Array;
  mac: Uint8Array;
};
type Proof = { kind: "proof"; previous: string; received: number; mac: Uint8Array };
type Welcome = { kind: "welcome"; received: number; mac: Uint8Array };
type Refuse = { kind: "refuse"; reason: RefusalReason; detail: string };
type HandshakeMessage = Hello | Challenge | Proof | Welcome | Refuse;

const NONCE_BYTES = 32;
const KEY_IDS_MAX = 8;
const DETAIL_LENGTH_MAX = 200;
const name = text(64);

const messageShape = union<HandshakeMessage>({
  hello: record<Hello>({
    kind: exactly("hello"),
    cluster: name,
    node: name,
    incarnation: count,
    min: count,
    max: count,
    structures: name,
    settings: name,
    keyIds: list(text(32), KEY_IDS_MAX),
    nonce: bytes(NONCE_BYTES),
  }),
  challenge: record<Challenge>({
    kind: exactly("challenge"),
    node: name,
    incarnation: count,
    version: count,
    structures: name,
    keyId: text(32),
    nonce: bytes(NONCE_BYTES),
    mac: bytes(32),
  }),
  proof: record<Proof>({
    kind: exactly("proof"),
    previous: name,
    received: finite,
    mac: bytes(32),
  }),
  welcome: record<Welcome>({ kind: exactly("welcome"), received: finite, mac: bytes(32) }),
  refuse: record<Refuse>({
    kind: exactly("refuse"),
    reason: oneOf(
      ...(["cluster", "settings", "version", "key", "secret", "malformed", "self"] as const),
      ...(["same_id", "stale", "duplicate", "too_many", "closing"] as const),
    ),
    detail: text(DETAIL_LENGTH_MAX),
  }),
});

const nodeName = /^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/;

/** One line on what is wrong with these options, or undefined. Never quotes a secret. */
export function faultInHandshake({
  cluster,
  self,
  settings,
  keys,
}: HandshakeOptions): string | undefined {
  if (!nodeName.test(self.node)) {
    return `peer id "${self.node}": 1 to 63 letters, digits, ".", "_" or "-" are accepted, a letter or digit first`;
  }
  if (!Number.isSafeInteger(self.incarnation) || self.incarnation < 0) {
    return "the incarnation must be a whole number from 0";
  }
  if (cluster.length < 1 || cluster.length > 64)
    return "the cluster's name must have 1 to 64 characters";
  if (settings.length > 64) return "the name of the settings must have at most 64 characters";
  if (keys.length < 1 || keys.length > KEY_IDS_MAX)
    return `1 to ${KEY_IDS_MAX} peer keys are accepted`;
  if (new Set(keys.map((key) => key.id)).size < keys.length)
    return "peer keys must have different ids";
  const wrong = keys.find(
    (key) => key.id.length < 1 || key.id.length > 32 || key.secret.length < 16,
  );
  return wrong === undefined
    ? undefined
    : `peer key "${wrong.id.slice(0, 32)}": an id of 1 to 32 characters and a secret of at least 16 bytes are accepted`;
}

/** One side of one handshake. */
export class Handshake {
  readonly #options: HandshakeOptions;
  readonly #versions: { min: number; max: number };
  readonly #structures: string;
  readonly #role: "client" | "server";
  readonly #channel: string;
  readonly #admit: (peer: PeerIdentity, claim: SessionClaim | undefined) => Admission;
  readonly #nonce: Uint8Array;
  /** The message that it waits for. */
  #awaits: HandshakeMessage["kind"] | "nothing";
  #peer: PeerIdentity = { node: "", incarnation: 0 };
  #version = 0;
  #encoding: Encoding = "maps";
  #secret: Uint8Array | undefined;
  #transcript = "";

  /**
   * @param channel what names the channel on both sides alike: exported key material of TLS; without TLS empty
   * @param admit of the server asked with the client's claim, of the client without one
   */
  constructor(
    role: "client" | "server",
    options: HandshakeOptions,
    channel: string,
    admit: (peer: PeerIdentity, claim: SessionClaim | undefined) => Admission,
  ) {
    this.#role = role;
    this.#options = options;
    this.#versions = options.versions ?? protocolVersions;
    this.#structures = options.structures ?? structuresHash;
    this.#channel = channel;
    this.#admit = admit;
    this.#nonce = options.randomBytes(NONCE_BYTES);
    this.#awaits = role === "client" ? "challenge" : "hello";
  }

  /** The peer, once it has proved who it is: what a client waits for then is only the server's word. */
  get provedPeer(): PeerIdentity | undefined {
    return this.#awaits === "welcome" ? this.#peer : undefined;
  }

  /** What the client says first. */
  hello(): Uint8Array<ArrayBuffer> {
    const { cluster, self, settings, keys } = this.#options;
    const hello: Hello = {
      kind: "hello",
      cluster,
      ...self,
      ...this.#versions,
      structures: this.#structures,
      settings,
      keyIds: keys.map((key) => key.id),
      nonce: this.#nonce,
    };
    return encodeHandshake(hello);
  }

  /** Takes in one message of the other side. Never throws. */
  receive(bytesIn: Uint8Array): HandshakeStep {
    const message = decodeHandshake(bytesIn, messageShape);
    if ("invalid" in message) return this.#refuse("malformed", message.invalid);
    if (message.kind === "refuse") {
      this.#awaits = "nothing";
      return { refused: { reason: message.reason, detail: message.detail, isTold: true } };
    }
    if (message.kind !== this.#awaits) {
      return this.#refuse("malformed", `${message.kind} where ${this.#awaits} was awaited`);
    }
    this.#awaits = "nothing";
    switch (message.kind) {
      case "hello":
        return this.#onHello(message);
      case "challenge":
        return this.#onChallenge(message);
      case "proof":
        return this.#onProof(message);
      case "welcome":
        return this.#onWelcome(message);
    }
  }

  #refuse(reason: RefusalReason, detail: string): HandshakeStep {
    this.#awaits = "nothing";
    const refusal: Refusal = { reason, detail: detail.slice(0, DETAIL_LENGTH_MAX) };
    return {
      send: encodeHandshake({ kind: "refuse", ...refusal }),
      refused: { ...refusal, isTold: false },
    };
  }

  #onHello(hello: Hello): HandshakeStep {
    const { cluster, self, settings, keys } = this.#options;
    const { min, max } = this.#versions;
    if (hello.cluster !== cluster)
      return this.#refuse("cluster", "this peer belongs to another cluster");
    if (hello.node === self.node) {
      return hello.incarnation === self.incarnation
        ? this.#refuse("self", "it dialled itself")
        : this.#refuse("same_id", `two processes have the peer id ${self.node}: give each its own`);
    }
    if (!nodeName.test(hello.node)) return this.#refuse("malformed", "its peer id is not one");
    const version = Math.min(max, hello.max);
    if (version < Math.max(min, hello.min)) {
      const theirs = `${hello.min} to ${hello.max}`;
      return this.#refuse(
        "version",
        `it speaks versions ${theirs} of the protocol, this peer ${min} to ${max}`,
      );
    }
    if (hello.settings !== settings) {
      return this.#refuse(
        "settings",
        `its cluster settings are ${hello.settings}, of this peer ${settings}`,
      );
    }
    const key = keys.find((each) => hello.keyIds.includes(each.id));
    if (key === undefined) {
      const ours = keys.map((each) => each.id).join(", ");
      return this.#refuse("key", `it has none of the keys ${ours}`);
    }
    if (hello.nonce.length !== NONCE_BYTES)
      return this.#refuse("malformed", "its nonce is too short");
    this.#agree(hello, { ...self, structures: this.#structures, nonce: this.#nonce }, version, key);
    this.#awaits = "proof";
    const challenge: Challenge = {
      kind: "challenge",
      ...self,
      version,
      structures: this.#structures,
      keyId: key.id,
      nonce: this.#nonce,
      mac: this.#mac("srv", ""),
    };
    return { send: encodeHandshake(challenge) };
  }

  #onChallenge(challenge: Challenge): HandshakeStep {
    const { self, keys } = this.#options;
    const { min, max } = this.#versions;
    const key = keys.find((each) => each.id === challenge.keyId);
    if (key === undefined || challenge.nonce.length !== NONCE_BYTES) {
      return this.#refuse("malformed", "its challenge does not fit what was offered");
    }
    if (challenge.version < min || challenge.version > max || challenge.node === self.node) {
      return this.#refuse("malformed", "its challenge does not fit what was offered");
    }
    if (!nodeName.test(challenge.node)) return this.#refuse("malformed", "its peer id is not one");
    this.#agree(
      { ...self, ...this.#versions, structures: this.#structures, nonce: this.#nonce },
      challenge,
      challenge.version,
      key,
    );
    if (!this.#isMac(challenge.mac, "srv", "")) return this.#wrongSecret(key);
    const admission = this.#admit(this.#peer, undefined);
    if ("refuse" in admission)
      return this.#refuse(admission.refuse.reason, admission.refuse.detail);
    this.#awaits = "welcome";
    const { previous, received } = admission;
    const mac = this.#mac("cli", claimText(admission));
    return { send: encodeHandshake({ kind: "proof", previous, received, mac } satisfies Proof) };
  }

  #onProof({ previous, received, mac }: Proof): HandshakeStep {
    const claim = { previous, received };
    const key = this.#options.keys.find((each) => each.secret === this.#secret);
    if (key === undefined || !this.#isMac(mac, "cli", claimText(claim)))
      return this.#wrongSecret(key);
    const admission = this.#admit(this.#peer, claim);
    if ("refuse" in admission)
      return this.#refuse(admission.refuse.reason, admission.refuse.detail);
    const welcome: Welcome = {
      kind: "welcome",
      received: admission.received,
      mac: this.#mac("ok", String(admission.received)),
    };
    return { send: encodeHandshake(welcome), established: this.#established(claim) };
  }

  #onWelcome({ received, mac }: Welcome): HandshakeStep {
    if (!this.#isMac(mac, "ok", String(received))) return this.#wrongSecret(undefined);
    return { established: this.#established({ previous: "", received }) };
  }

  #established(claim: SessionClaim): Established {
    const connection = createHash("sha256").update(this.#transcript).digest("hex").slice(0, 16);
    const { received } = claim;
    return {
      peer: this.#peer,
      version: this.#version,
      encoding: this.#encoding,
      connection,
      claim: {
        ...claim,
        received: Number.isSafeInteger(received) && received >= 0 ? received : -1,
      },
    };
  }

  #wrongSecret(key: PeerKey | undefined): HandshakeStep {
    return this.#refuse(
      "secret",
      `it does not know the secret${key === undefined ? "" : ` of the key ${key.id}`}`,
    );
  }

  /** Fixes everything that the macs cover. */
  #agree(
    client: Pick<Hello, "node" | "incarnation" | "min" | "max" | "structures" | "nonce">,
    server: Pick<Challenge, "node" | "incarnation" | "structures" | "nonce">,
    version: number,
    key: PeerKey,
  ): void {
    const { node, incarnation } = this.#role === "client" ? server : client;
    const { cluster, settings } = this.#options;
    this.#peer = { node, incarnation };
    this.#version = version;
    this.#encoding = client.structures === server.structures ? "structures" : "maps";
    this.#secret = key.secret;
    const hex = (part: Uint8Array) => Buffer.from(part).toString("hex");
    this.#transcript = JSON.stringify([
      ...["headrace peer handshake", cluster, settings, key.id, version, this.#channel],
      ...[client.node, client.incarnation, client.min, client.max, client.structures],
      ...[hex(client.nonce), server.node, server.incarnation, server.structures, hex(server.nonce)],
    ]);
  }

  #mac(label: "srv" | "cli" | "ok", rest: string): Uint8Array {
    const mac = createHmac("sha256", this.#secret ?? new Uint8Array());
    return mac.update(`${label}\n${rest}\n${this.#transcript}`).digest();
  }

  #isMac(given: Uint8Array, label: "srv" | "cli" | "ok", rest: string): boolean {
    const right = this.#mac(label, rest);
    return given.length === right.length && timingSafeEqual(given, right);
  }
}

function claimText({ previous, received }: SessionClaim): string {
  return `${previous} ${received}`;
}
