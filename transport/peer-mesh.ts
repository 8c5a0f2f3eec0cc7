/**
 * The peers of this process: sockets (peer-socket.ts), time and chance for the state machine of peer-links.ts, and
 * the way of the actor system to other processes.
 *
 *   const mesh = new PeerMesh(options, onEvent);
 *   const system = createSystem({ …, remote: mesh.remote, nextId });  // root of the tree: the peer id
 *   system.start(tree, hooks);
 *   mesh.bind(system);
 *   await mesh.listen("0.0.0.0", 7700);
 *   mesh.dial("ws://peer-b:7700");
 *
 * The first part of an actor's path is the id of the peer it lives in. Envelopes of one turn of the event loop leave
 * together. When a connection breaks, asks to that peer fail at once as "disconnected"; when its session ends,
 * watches end as "noconnection" (`ActorSystem.interrupted`, `.disconnected`).
 *
 * Numbers of asks must not be used again by a later life of this process, or a late answer to the earlier would be
 * taken for one to the later: `nextId` must begin elsewhere each time.
 *
 * It does not choose whom to dial, nor who owns what.
 */
import { randomBytes } from "node:crypto";
import type { IncomingMessage, ServerResponse } from "node:http";
import { assert } from "../runtime/actor.ts";
import type { ActorSystem, Envelope, Remote } from "../runtime/system.ts";
import { faultInHandshake } from "./peer-handshake.ts";
import { type Connection, linkDefaults, type UndeliverableReason } from "./peer-link.ts";
import { type LinksMetrics, type LinksOptions, type PeerEvent, PeerLinks } from "./peer-links.ts";
import {
  dialPeer,
  faultInAddress,
  PeerServer,
  type PeerTls,
  type SocketEvents,
} from "./peer-socket.ts";

export type MeshOptions = Omit<LinksOptions, "randomBytes"> & {
  tls?: PeerTls;
  /** What else is served on the port: flights (flight-relay.ts). False: not this. */
  onRequest?: (request: IncomingMessage, response: ServerResponse) => boolean;
  /** For heartbeats: mail that waits in this process, and the epoch of its view of the members. */
  queueDepth?: () => number;
  epoch?: () => number;
};

/** Several per heartbeat; also how late the event loop runs is measured by it. */
const TICK_MS = 50;

export class PeerMesh {
  readonly #links: PeerLinks;
  readonly #options: MeshOptions;
  readonly #sockets = new Map<number, Connection>();
  readonly #socketOptions: { frameBytesMax: number; tls?: PeerTls };
  #onAllGone: (() => void) | undefined;
  #system: ActorSystem | undefined;
  #server: PeerServer | undefined;
  #timer: NodeJS.Timeout | undefined;
  #tickDueAtMs = 0;
  /** Worst since the last heartbeat. */
  #loopLagMs = 0;
  readonly #dirty = new Set<string>();
  #isFlushDue = false;

  /**
   * @param onEvent told of links, heartbeats and refusals; must not throw
   * @throws RangeError when the options are wrong, saying how
   */
  constructor(options: MeshOptions, onEvent: (event: PeerEvent) => void) {
    const whole: LinksOptions = { ...options, randomBytes };
    const fault = faultInHandshake(whole);
    if (fault !== undefined) throw new RangeError(fault);
    this.#options = options;
    const { tls, link } = options;
    this.#socketOptions = {
      frameBytesMax: link?.frameBytesMax ?? linkDefaults.frameBytesMax,
      ...(tls === undefined ? {} : { tls }),
    };
    this.#links = new PeerLinks(whole, {
      open: (id, address) => this.#open(id, address),
      abandon: (id) => this.#sockets.get(id)?.destroy("abandoned"),
      onEvent: (event) => {
        this.#tellSystem(event);
        onEvent(event);
      },
      onEnvelope: (envelope) => this.#system?.deliver(envelope),
      onUndeliverable: (envelope, reason) => this.#onUndeliverable(envelope, reason),
      onDirty: (node) => this.#onDirty(node),
      vitals: () => {
        const loopLagMs = this.#loopLagMs;
        this.#loopLagMs = 0;
        return {
          loopLagMs,
          queueDepth: options.queueDepth?.() ?? 0,
          epoch: options.epoch?.() ?? 0,
        };
      },
      questionOf: (askId) => this.#system?.questionOf(askId),
      nowMs: () => performance.now(),
      random: () => Math.random(),
    });
    this.#tickDueAtMs = performance.now() + TICK_MS;
    this.#timer = setInterval(() => this.#tick(), TICK_MS).unref();
  }

  /** For `createSystem`. */
  get remote(): Remote {
    const own = `${this.#options.self.node}/`;
    return {
      route: (path) => !path.startsWith(own),
      send: (envelope) => this.send(envelope.to.slice(0, envelope.to.indexOf("/")), envelope),
    };
  }

  /** Where envelopes go that come in; before this they are lost. Once. */
  bind(system: ActorSystem): void {
    assert(this.#system === undefined, "a mesh has one system");
    this.#system = system;
  }

  /** Takes connections there. The port that it got; rejects when it cannot. Once. */
  async listen(host: string, port: number): Promise<number> {
    assert(this.#server === undefined, "a mesh listens once");
    const { onRequest } = this.#options;
    this.#server = new PeerServer(this.#socketOptions, {
      ...(onRequest === undefined ? {} : { onRequest }),
      accepts: (remoteHost) => this.#links.accepts(remoteHost),
      onConnection: (connection, remoteHost, channel) => {
        const id = this.#links.accepted(connection, remoteHost, channel);
        this.#sockets.set(id, connection);
        return this.#eventsOf(id);
      },
    });
    return this.#server.listen(host, port);
  }

  /**
   * Keeps a link to whoever is at that address, until `undial`.
   * @throws RangeError for an address that is none, saying what is accepted
   */
  dial(address: string): void {
    const fault = faultInAddress(address);
    if (fault !== undefined) throw new RangeError(fault);
    if (!this.#links.dial(address)) throw new RangeError("too many peer addresses");
  }

  undial(address: string): void {
    this.#links.undial(address);
  }

  /** That peer is none any more: its session ends, its watches with it. */
  forget(peer: string): void {
    this.#links.forget(peer);
  }

  isUp(peer: string): boolean {
    return this.#links.isUp(peer);
  }

  /** Takes the envelope, or says why not. */
  send(peer: string, envelope: Envelope): "full" | "disconnected" | "oversized" | undefined {
    return this.#links.send(peer, envelope);
  }

  metrics(): LinksMetrics {
    return this.#links.metrics();
  }

  /** Ends all links; with `leave` the peers are told that this life does not come back. */
  async close(leave: boolean): Promise<void> {
    if (this.#timer !== undefined) clearInterval(this.#timer);
    this.#timer = undefined;
    this.#links.close(leave);
    const allGone = new Promise<void>((resolve) => {
      if (this.#sockets.size === 0) resolve();
      else this.#onAllGone = resolve;
    });
    await Promise.all([allGone, this.#server?.close()]);
  }

  #open(id: number, address: string): void {
    const events = this.#eventsOf(id);
    const socket = dialPeer(address, this.#socketOptions, {
      ...events,
      onOpen: (channel) => this.#links.opened(id, socket, channel),
    });
    this.#sockets.set(id, socket);
  }

  #eventsOf(id: number): SocketEvents {
    return {
      onOpen: () => {},
      onMessage: (bytes) => this.#links.received(id, bytes),
      onClose: (reason) => this.#links.closed(id, reason),
      onDrain: () => this.#flush(),
      onGone: () => {
        this.#sockets.delete(id);
        if (this.#sockets.size === 0) this.#onAllGone?.();
      },
    };
  }

  #tick(): void {
    const nowMs = performance.now();
    this.#loopLagMs = Math.max(this.#loopLagMs, nowMs - this.#tickDueAtMs);
    this.#tickDueAtMs = nowMs + TICK_MS;
    this.#links.tick();
  }

  #onDirty(node: string): void {
    this.#dirty.add(node);
    if (this.#isFlushDue) return;
    this.#isFlushDue = true;
    setImmediate(() => {
      this.#isFlushDue = false;
      this.#flush();
    });
  }

  /** What is left because a connection is full stays, and goes when that connection has drained. */
  #flush(): void {
    for (const node of this.#dirty) if (!this.#links.flush(node)) this.#dirty.delete(node);
  }

  #tellSystem(event: PeerEvent): void {
    if (event.kind === "peer.down") this.#system?.interrupted(pathsOf(event.node));
    if (event.kind === "peer.lost") this.#system?.disconnected(pathsOf(event.node));
    if (event.kind !== "peer.rejected") return;
    const { to, messageKind } = event.rejected;
    this.#system?.deadLetter(to, { kind: messageKind }, "undecodable");
  }

  #onUndeliverable(envelope: Envelope, reason: UndeliverableReason): void {
    const system = this.#system;
    if (system === undefined || envelope.kind !== "message") return;
    system.deadLetter(envelope.to, envelope.message, reason);
    if (envelope.askId === 0) return;
    const failure = reason === "disconnected" ? "disconnected" : "noroute";
    const { from, askId } = envelope;
    system.deliver({ kind: "reply", to: from, askId, outcome: { ok: false, failure } });
  }
}

function pathsOf(node: string): (path: string) => boolean {
  const prefix = `${node}/`;
  return (path) => path.startsWith(prefix);
}
