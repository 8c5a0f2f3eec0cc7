/**
 * All links of one process: which addresses are dialled, which connections are taken, and which of two to the same
 * peer stays. A state machine without I/O; peer-mesh.ts gives it sockets, time and chance.
 *
 *   dialler of an address      waiting ──due──▶ connecting ──established──▶ linked
 *                                 ▲   (back-off)     │ closed, refused         │ link down
 *                                 └──────────────────┴─────────────────────────┘
 *   connection                 handshaking ──proved──▶ of a link ──▶ gone
 *                                   └── refused, silent for 5 s ──▶ gone
 *
 * **One link per pair.** Both peers may dial. Where two connections meet, the peer with the smaller id decides, and it
 * alone, so that the two cannot choose differently: it keeps what it has, or what it has proved itself on, and
 * refuses the other as a duplicate. It takes a second connection in place of the first only when the other side
 * names the first as the last that it saw up: then that side has lost it. A later life of a peer replaces an earlier
 * one; an earlier one is refused while the later is remembered.
 *
 * **Sessions.** When both sides remember their session, the new connection resumes it (peer-link.ts); when either
 * does not, both begin anew, and who remembered reports it over first.
 *
 * **Back-off.** The n-th try in a row waits a random part of min(10 s, 100 ms · 2ⁿ); n begins again once a link was
 * up for 30 s. An address that turned out to be this process is never dialled again. An address whose peer is linked
 * is not dialled.
 *
 * **Strangers.** At most 64 connections may be in handshake, each for 5 s. A host that failed to prove itself three
 * times within a minute is not answered until the minute is over.
 */
import type { Envelope } from "../runtime/system.ts";
import {
  type Admission,
  type Established,
  Handshake,
  type HandshakeOptions,
  type PeerIdentity,
  type Refusal,
  type RefusalReason,
  type SessionClaim,
} from "./peer-handshake.ts";
import {
  type Connection,
  type LinkEnd,
  type LinkHost,
  type LinkMetrics,
  type LinkOptions,
  linkDefaults,
  PeerLink,
  type UndeliverableReason,
} from "./peer-link.ts";
import type { Encoding, Heartbeat, Rejected } from "./wire.ts";

export type LinksOptions = HandshakeOptions & {
  link?: Partial<LinkOptions>;
  /** Proofs that may fail per host within a minute; default 3. */
  failuresPerMinuteMax?: number;
};

/** What happens between peers, for membership, log and metrics. In order per peer. */
export type PeerEvent =
  /** A connection is up. `isResumed`: of a session that was interrupted, whose watches still stand. */
  | ({ kind: "peer.up"; isResumed: boolean; encoding: Encoding } & PeerIdentity)
  /** The connection is gone, the session is not yet: the peer is not reachable now. */
  | ({ kind: "peer.down"; reason: LinkEnd } & PeerIdentity)
  /** The session is over: this life of the peer is gone, or was away for too long, or a new session begins. */
  | ({ kind: "peer.lost"; reason: LinkEnd } & PeerIdentity)
  /** Every 250 ms while it is up. */
  | ({ kind: "peer.heartbeat"; heartbeat: Heartbeat; rttMs?: number } & PeerIdentity)
  /** No link: a handshake failed. `isTold`: the other side says so. */
  | {
      kind: "peer.refused";
      address: string;
      isDialled: boolean;
      isTold: boolean;
      reason: RefusalReason | "timeout";
      detail: string;
    }
  /** A message of the peer may not be delivered; the reason does not quote it. */
  | ({ kind: "peer.rejected"; rejected: Rejected } & PeerIdentity);

/** What the state machine needs from outside, and tells it. */
export interface LinksHost {
  /** Starts to connect; later `opened` or `closed` follows, with this id. */
  open(id: number, address: string): void;
  /** Gives up what `open` began, or what is open. Nothing of it follows. */
  abandon(id: number): void;
  onEvent(event: PeerEvent): void;
  /** Validated; for `ActorSystem.deliver`. */
  onEnvelope(envelope: Envelope): void;
  /** It was taken by `send` and will not arrive. */
  onUndeliverable(envelope: Envelope, reason: UndeliverableReason): void;
  /** Call `flush(node)` before the turn of the event loop ends. */
  onDirty(node: string): void;
  vitals(): { loopLagMs: number; queueDepth: number; epoch: number };
  questionOf(askId: number): string | undefined;
  /** Monotonic, ms. */
  nowMs(): number;
  /** Uniform in [0, 1). */
  random(): number;
}

/** Counts since the start, besides those of each link. */
export type LinksMetrics = {
  links: LinkMetrics[];
  established: number;
  dials: number;
  dialsFailed: number;
  refusals: Readonly<Record<string, number>>;
};

const HANDSHAKE_MS = 5000;
const HANDSHAKING_MAX = 64;
const BACKOFF_MS = 100;
const BACKOFF_MS_MAX = 10_000;
/** A link that was up for so long makes its address good again. */
const STEADY_MS = 30_000;
const FAILURES_PER_MINUTE_MAX = 3;
const MINUTE_MS = 60_000;
/** Hosts whose failures are remembered; the oldest is forgotten first. */
const HOSTS_MAX = 1024;
/** Peers and addresses; far more than a full mesh is good for. */
const PEERS_MAX = 256;
const ADDRESSES_MAX = 1024;

type Dialler = {
  readonly address: string;
  state: "waiting" | "connecting" | "linked";
  /** Whom it leads to; empty: not known yet. */
  node: string;
  isSelf: boolean;
  tries: number;
  dueAtMs: number;
  upAtMs: number;
};

type Live = {
  readonly id: number;
  readonly address: string;
  /** Of one that came in: where from. */
  readonly remoteHost: string;
  readonly dialler: Dialler | undefined;
  connection: Connection | undefined;
  handshake: Handshake | undefined;
  link: PeerLink | undefined;
  /** What the client remembered when it proved itself. */
  claimed: PeerLink | undefined;
  beganAtMs: number;
};

export class PeerLinks {
  readonly #options: LinksOptions;
  readonly #linkOptions: LinkOptions;
  readonly #host: LinksHost;
  readonly #linkHost: LinkHost;
  readonly #links = new Map<string, PeerLink>();
  readonly #lives = new Map<number, Live>();
  readonly #diallers = new Map<string, Dialler>();
  /** When proofs of a host failed, within the last minute. */
  readonly #failures = new Map<string, number[]>();
  #lastId = 0;
  #isClosing = false;
  #hasMetItself = false;
  #established = 0;
  #dials = 0;
  #dialsFailed = 0;
  readonly #refusals = new Map<string, number>();

  constructor(options: LinksOptions, host: LinksHost) {
    this.#options = options;
    this.#linkOptions = { ...linkDefaults, ...options.link };
    this.#host = host;
    this.#linkHost = {
      onUp: ({ peer, encoding }, isResumed) =>
        host.onEvent({ kind: "peer.up", ...peer, isResumed, encoding }),
      onDown: (link, reason) => {
        for (const live of this.#lives.values()) {
          if (live.link === link) this.#lives.delete(live.id);
        }
        this.#freeDiallers(link.peer.node);
        host.onEvent({ kind: "peer.down", ...link.peer, reason });
      },
      onOver: (link, reason) => {
        if (this.#links.get(link.peer.node) === link) this.#links.delete(link.peer.node);
        host.onEvent({ kind: "peer.lost", ...link.peer, reason });
      },
      onEnvelope: (_, envelope) => host.onEnvelope(envelope),
      onHeartbeat: ({ peer, rttMs }, heartbeat) => {
        const rtt = rttMs === undefined ? {} : { rttMs };
        host.onEvent({ kind: "peer.heartbeat", ...peer, heartbeat, ...rtt });
      },
      onUndeliverable: (_, envelope, reason) => host.onUndeliverable(envelope, reason),
      onRejected: ({ peer }, rejected) =>
        host.onEvent({ kind: "peer.rejected", ...peer, rejected }),
      onDirty: ({ peer }) => host.onDirty(peer.node),
      vitals: () => host.vitals(),
      questionOf: (askId) => host.questionOf(askId),
    };
  }

  /** The address stays dialled, until `undial`. False: there are too many. */
  dial(address: string): boolean {
    if (this.#diallers.has(address)) return true;
    if (this.#diallers.size >= ADDRESSES_MAX || this.#isClosing) return false;
    this.#diallers.set(address, {
      address,
      state: "waiting",
      node: "",
      isSelf: false,
      tries: 0,
      dueAtMs: this.#host.nowMs(),
      upAtMs: 0,
    });
    this.#dialDue(this.#host.nowMs());
    return true;
  }

  /** A link that came of it stays; a dial under way ends. */
  undial(address: string): void {
    const dialler = this.#diallers.get(address);
    if (dialler === undefined) return;
    this.#diallers.delete(address);
    for (const live of [...this.#lives.values()]) {
      if (live.dialler === dialler && live.link === undefined) this.#drop(live);
    }
  }

  /** Ends the session with a peer that is none any more. It may come back by a new handshake. */
  forget(node: string): void {
    this.#links.get(node)?.end("forgotten", this.#host.nowMs());
  }

  isUp(node: string): boolean {
    return this.#links.get(node)?.isUp === true;
  }

  /** Takes the envelope, or says why not. */
  send(node: string, envelope: Envelope): "full" | "disconnected" | "oversized" | undefined {
    const link = this.#links.get(node);
    return link === undefined ? "disconnected" : link.send(envelope, this.#host.nowMs());
  }

  /** True when the connection is full and something was left: call again when it has drained. */
  flush(node: string): boolean {
    return this.#links.get(node)?.flush(this.#host.nowMs()) === true;
  }

  metrics(): LinksMetrics {
    return {
      links: [...this.#links.values()].map((link) => link.metrics()),
      established: this.#established,
      dials: this.#dials,
      dialsFailed: this.#dialsFailed,
      refusals: Object.fromEntries(this.#refusals),
    };
  }

  /** Takes no more connections; with `leave` tells every peer that this life ends. */
  close(leave: boolean): void {
    this.#isClosing = true;
    this.#diallers.clear();
    const nowMs = this.#host.nowMs();
    for (const link of [...this.#links.values()]) {
      if (leave) link.leave(nowMs);
      else link.end("closing", nowMs);
    }
    for (const live of [...this.#lives.values()]) this.#drop(live);
  }

  // ---- connections ------------------------------------------------------------------------------------

  /** Whether a connection from there would be talked to. */
  accepts(remoteHost: string): boolean {
    if (this.#isClosing) return false;
    const handshaking = [...this.#lives.values()].filter(({ link }) => link === undefined).length;
    const isFine = handshaking < HANDSHAKING_MAX && !this.#hasFailed(remoteHost);
    if (!isFine) this.#count("too_many");
    return isFine;
  }

  /** One that came in. Its id, for `received` and `closed`. @param channel see `Handshake` */
  accepted(connection: Connection, remoteHost: string, channel: string): number {
    const id = ++this.#lastId;
    const live = this.#newLive(id, remoteHost, remoteHost, undefined);
    live.connection = connection;
    live.handshake = new Handshake("server", this.#options, channel, (peer, claim) =>
      this.#admitClient(peer, claim),
    );
    return id;
  }

  /** One that `open` asked for. */
  opened(id: number, connection: Connection, channel: string): void {
    const live = this.#lives.get(id);
    if (live === undefined) return connection.destroy("not wanted any more");
    live.connection = connection;
    live.beganAtMs = this.#host.nowMs();
    live.handshake = new Handshake("client", this.#options, channel, (peer) =>
      this.#admitServer(live, peer),
    );
    connection.write(live.handshake.hello());
  }

  /** One message, whole. */
  received(id: number, bytes: Uint8Array): void {
    const live = this.#lives.get(id);
    if (live === undefined) return;
    if (live.link !== undefined) return live.link.receive(bytes, this.#host.nowMs());
    if (live.handshake === undefined) return;
    const { send, established, refused } = live.handshake.receive(bytes);
    if (send !== undefined) live.connection?.write(send);
    if (established !== undefined) this.#establish(live, established);
    if (refused !== undefined) this.#onRefused(live, refused);
  }

  /** It ended, or never came about. */
  closed(id: number, reason: string): void {
    const live = this.#lives.get(id);
    if (live === undefined) return;
    this.#lives.delete(id);
    if (live.link !== undefined)
      return live.link.interrupt(`closed: ${reason}`, this.#host.nowMs());
    this.#dialFailed(live);
  }

  /** To be called every 50 ms or so. */
  tick(): void {
    const nowMs = this.#host.nowMs();
    for (const link of [...this.#links.values()]) link.tick(nowMs);
    for (const live of [...this.#lives.values()]) {
      if (live.link !== undefined || nowMs - live.beganAtMs < HANDSHAKE_MS) continue;
      const refusal = {
        reason: "timeout",
        detail: `no handshake within ${HANDSHAKE_MS} ms`,
      } as const;
      this.#report(live, refusal, false);
      this.#drop(live);
      this.#dialFailed(live);
    }
    this.#dialDue(nowMs);
  }

  #newLive(id: number, address: string, remoteHost: string, dialler: Dialler | undefined): Live {
    const live: Live = {
      id,
      address,
      remoteHost,
      dialler,
      connection: undefined,
      handshake: undefined,
      link: undefined,
      claimed: undefined,
      beganAtMs: this.#host.nowMs(),
    };
    this.#lives.set(id, live);
    return live;
  }

  #drop(live: Live): void {
    this.#lives.delete(live.id);
    if (live.connection === undefined) this.#host.abandon(live.id);
    else live.connection.destroy("dropped");
  }

  // ---- dialling ---------------------------------------------------------------------------------------

  #dialDue(nowMs: number): void {
    if (this.#isClosing) return;
    for (const dialler of this.#diallers.values()) {
      if (dialler.state !== "waiting" || dialler.isSelf || nowMs < dialler.dueAtMs) continue;
      if (this.isUp(dialler.node)) {
        dialler.state = "linked";
        dialler.upAtMs = nowMs;
        continue;
      }
      dialler.state = "connecting";
      this.#dials++;
      const id = ++this.#lastId;
      this.#newLive(id, dialler.address, "", dialler);
      this.#host.open(id, dialler.address);
    }
  }

  #dialFailed({ dialler }: Live): void {
    if (dialler?.state !== "connecting") return;
    this.#dialsFailed++;
    this.#backOff(dialler);
  }

  #backOff(dialler: Dialler): void {
    const nowMs = this.#host.nowMs();
    if (dialler.state === "linked" && nowMs - dialler.upAtMs >= STEADY_MS) dialler.tries = 0;
    const most = Math.min(BACKOFF_MS_MAX, BACKOFF_MS * 2 ** Math.min(dialler.tries, 10));
    dialler.state = "waiting";
    dialler.tries++;
    dialler.dueAtMs = nowMs + this.#host.random() * most;
  }

  #freeDiallers(node: string): void {
    for (const dialler of this.#diallers.values()) {
      if (dialler.node === node && dialler.state === "linked") this.#backOff(dialler);
    }
  }

  // ---- who is wanted ----------------------------------------------------------------------------------

  /** As server, when the client has proved who it is. */
  #admitClient(peer: PeerIdentity, claim: SessionClaim | undefined): Admission {
    if (this.#isClosing) return refuse("closing", "this peer is about to end");
    const link = this.#links.get(peer.node);
    const none: SessionClaim = { previous: "", received: -1 };
    if (link === undefined || claim === undefined) return this.#admitNew(none);
    if (link.peer.incarnation > peer.incarnation) return refuseStale(peer);
    if (link.peer.incarnation < peer.incarnation) return none;
    const isOurs = this.#options.self.node < peer.node; // We decide between two connections.
    if (isOurs && link.isUp && claim.previous !== link.connectionName) {
      return refuse("duplicate", "there is a link already");
    }
    if (isOurs && !link.isUp && this.#isProving(peer)) {
      return refuse("duplicate", "a link is being made already");
    }
    const remembers = claim.received >= 0 && link.couldHaveHeard(claim.received);
    return { previous: "", received: remembers ? link.received : -1 };
  }

  #admitNew(claim: SessionClaim): Admission {
    return this.#links.size < PEERS_MAX
      ? claim
      : refuse("too_many", `this peer has ${PEERS_MAX} links already`);
  }

  /** As client, when the server has proved who it is. */
  #admitServer(live: Live, peer: PeerIdentity): Admission {
    if (live.dialler !== undefined) live.dialler.node = peer.node;
    const link = this.#links.get(peer.node);
    if (link === undefined) return this.#admitNew({ previous: "", received: -1 });
    if (link.peer.incarnation > peer.incarnation) return refuseStale(peer);
    if (link.peer.incarnation < peer.incarnation) return { previous: "", received: -1 };
    if (link.isUp) return refuse("duplicate", "there is a link already");
    live.claimed = link;
    return { previous: link.connectionName, received: link.received };
  }

  /** Whether we have dialled this peer and it must only say welcome. */
  #isProving({ node, incarnation }: PeerIdentity): boolean {
    for (const { handshake, dialler, link } of this.#lives.values()) {
      const proved =
        link === undefined && dialler !== undefined ? handshake?.provedPeer : undefined;
      if (proved?.node === node && proved.incarnation === incarnation) return true;
    }
    return false;
  }

  #establish(live: Live, { peer, claim, encoding, connection: name }: Established): void {
    const { connection, dialler, claimed } = live;
    if (connection === undefined) return;
    const nowMs = this.#host.nowMs();
    const known = this.#links.get(peer.node);
    if (
      dialler !== undefined &&
      known !== claimed &&
      known?.peer.incarnation === peer.incarnation
    ) {
      // Between proof and welcome the session changed: what was claimed is not true any more.
      this.#drop(live);
      return this.#dialFailed(live);
    }
    const canResume =
      known?.peer.incarnation === peer.incarnation &&
      claim.received >= 0 &&
      known.couldHaveHeard(claim.received);
    if (known !== undefined) {
      const isSame = known.peer.incarnation === peer.incarnation;
      if (canResume) known.interrupt("replaced by a new connection", nowMs);
      else
        known.end(
          isSame ? "the other side began a new session" : "replaced by a later life",
          nowMs,
        );
    }
    const link =
      known !== undefined && canResume
        ? known
        : new PeerLink(peer, this.#options.self.node, this.#linkOptions, this.#linkHost);
    this.#links.set(peer.node, link);
    live.link = link;
    live.handshake = undefined;
    connection.trust();
    this.#established++;
    if (dialler !== undefined) {
      dialler.state = "linked";
      dialler.upAtMs = nowMs;
    }
    link.attach(connection, name, encoding, canResume ? claim.received : 0, nowMs);
    this.#dropOtherDials(live, peer.node);
  }

  /** Handshakes under way with a peer that is linked now. */
  #dropOtherDials(but: Live, node: string): void {
    for (const live of [...this.#lives.values()]) {
      if (live === but || live.link !== undefined || live.dialler?.node !== node) continue;
      this.#drop(live);
      if (live.dialler.state === "connecting") this.#backOff(live.dialler);
    }
  }

  #onRefused(live: Live, refused: Refusal & { isTold: boolean }): void {
    const { reason } = refused;
    const { dialler, remoteHost } = live;
    if (reason === "self") {
      // Anybody can say so; that our own server has just found it is proof.
      if (dialler === undefined) this.#hasMetItself = true;
      else dialler.isSelf = this.#hasMetItself;
    }
    // Whoever finds the other's proof wrong has another secret, or is told so: the same either way.
    const isFailure = reason === "secret" || reason === "malformed" || reason === "key";
    if (dialler === undefined && isFailure) this.#failed(remoteHost);
    this.#report(live, refused, refused.isTold);
    this.#lives.delete(live.id);
    if (refused.isTold) live.connection?.destroy(reason);
    else live.connection?.end();
    this.#dialFailed(live);
  }

  #report(
    { address, dialler }: Live,
    { reason, detail }: { reason: RefusalReason | "timeout"; detail: string },
    isTold: boolean,
  ): void {
    this.#count(reason);
    const isDialled = dialler !== undefined;
    this.#host.onEvent({ kind: "peer.refused", address, isDialled, isTold, reason, detail });
  }

  #count(reason: string): void {
    this.#refusals.set(reason, (this.#refusals.get(reason) ?? 0) + 1);
  }

  #failed(remoteHost: string): void {
    const times = this.#failures.get(remoteHost) ?? [];
    this.#failures.delete(remoteHost);
    if (this.#failures.size >= HOSTS_MAX) {
      for (const oldest of this.#failures.keys()) {
        this.#failures.delete(oldest);
        break;
      }
    }
    const max = this.#options.failuresPerMinuteMax ?? FAILURES_PER_MINUTE_MAX;
    this.#failures.set(remoteHost, [...times, this.#host.nowMs()].slice(-max));
  }

  #hasFailed(remoteHost: string): boolean {
    const times = this.#failures.get(remoteHost) ?? [];
    const max = this.#options.failuresPerMinuteMax ?? FAILURES_PER_MINUTE_MAX;
    const recent = times.filter((atMs) => this.#host.nowMs() - atMs < MINUTE_MS);
    if (recent.length === 0) this.#failures.delete(remoteHost);
    return recent.length >= max;
  }
}

function refuse(reason: RefusalReason, detail: string): { refuse: Refusal } {
  return { refuse: { reason, detail } };
}

function refuseStale({ node }: PeerIdentity): { refuse: Refusal } {
  return refuse("stale", `a later life of ${node} is known: two processes may have its id`);
}
