/**
 * The network between the gateways of a simulation: one connection per pair of processes, as of a WebSocket.
 *
 *   up ──silent too long, reset, a process ended──▶ down ──nothing in the way──▶ up
 *
 * An envelope takes a least delay and an exponential rest, and never overtakes another of the same direction. While a
 * partition is in the way it waits on the connection, as TCP would hold it; when one side has heard nothing for
 * `silenceUs` the connection is given up with all that is on it, both sides are told, and sends fail until it is made
 * again. Each direction draws from its own stream.
 *
 * It owns links and what is on them. It does not know what envelopes mean, and does not choose who lives where.
 */
import type { Clock, TimerHandle } from "../runtime/clock.ts";
import type { Random } from "../runtime/random.ts";
import type { Envelope } from "../runtime/system.ts";

export type NetworkOptions = {
  /** Of one way: the least, and the mean of what comes on top (exponential), µs. */
  delayUsMin: number;
  jitterUsMean: number;
  /** A side that hears nothing for so long gives the connection up. */
  silenceUs: number;
  /** From the end of what was in the way until the connection is there again. */
  reconnectUs: number;
};

export const networkDefaults: NetworkOptions = {
  delayUsMin: 200,
  jitterUsMean: 100,
  silenceUs: 3_000_000,
  reconnectUs: 200_000,
};

/** A process, as its links see it. */
export type Peer = {
  readonly root: string;
  readonly isUp: boolean;
  deliver(envelope: Envelope): void;
  onLinkDown(root: string): void;
  onLinkUp(root: string): void;
};

/** On one connection and direction; more is refused as "full". */
const WAITING_MAX = 100_000;

export class Network {
  readonly #peers: readonly Peer[];
  readonly #links = new Map<string, Link>();

  constructor(peers: readonly Peer[], options: NetworkOptions, clock: Clock, random: Random) {
    this.#peers = peers;
    peers.forEach((left, index) => {
      for (const right of peers.slice(index + 1)) {
        const link = new Link(left, right, options, clock, random);
        this.#links.set(nameOf(left.root, right.root), link);
        this.#links.set(nameOf(right.root, left.root), link);
      }
    });
  }

  /** Sends to the process that `path` names; undefined when taken, else why not. */
  send(from: string, envelope: Envelope): "full" | "disconnected" | undefined {
    const to = envelope.to.slice(0, envelope.to.indexOf("/"));
    const link = this.#links.get(nameOf(from, to));
    return link === undefined ? "disconnected" : link.send(from, envelope);
  }

  isConnected(left: string, right: string): boolean {
    return this.#links.get(nameOf(left, right))?.isUp === true;
  }

  /** One more, or (`by` −1) one less, in the way of this direction. */
  block(from: string, to: string, by: 1 | -1): void {
    this.#links.get(nameOf(from, to))?.block(from, by);
  }

  reset(left: string, right: string): void {
    this.#links.get(nameOf(left, right))?.breakOff();
  }

  /** The process ended: every connection of it breaks. */
  processEnded(root: string): void {
    for (const peer of this.#peers) this.#links.get(nameOf(root, peer.root))?.breakOff();
  }

  processStarted(root: string): void {
    for (const peer of this.#peers) this.#links.get(nameOf(root, peer.root))?.reconnect();
  }
}

function nameOf(from: string, to: string): string {
  return `${from} ${to}`;
}

type Waiting = { atUs: number; envelope: Envelope };

/** One direction of a connection. */
class Way {
  readonly to: Peer;
  readonly random: Random;
  /** In order of arrival. */
  readonly waiting: Waiting[] = [];
  timer: TimerHandle | undefined;
  /** Partitions in the way. */
  blocks = 0;

  constructor(to: Peer, random: Random) {
    this.to = to;
    this.random = random;
  }
}

class Link {
  readonly #left: Peer;
  readonly #right: Peer;
  readonly #options: NetworkOptions;
  readonly #clock: Clock;
  readonly #toRight: Way;
  readonly #toLeft: Way;
  isUp = true;
  #silence: TimerHandle | undefined;
  #reconnect: TimerHandle | undefined;

  constructor(left: Peer, right: Peer, options: NetworkOptions, clock: Clock, random: Random) {
    this.#left = left;
    this.#right = right;
    this.#options = options;
    this.#clock = clock;
    this.#toRight = new Way(right, random.split(nameOf(left.root, right.root)));
    this.#toLeft = new Way(left, random.split(nameOf(right.root, left.root)));
  }

  send(from: string, envelope: Envelope): "full" | "disconnected" | undefined {
    if (!this.isUp) return "disconnected";
    const way = this.#wayFrom(from);
    if (way.waiting.length >= WAITING_MAX) return "full";
    const { delayUsMin, jitterUsMean } = this.#options;
    const jitterUs = -Math.log(1 - way.random.next()) * jitterUsMean;
    const soonestUs = this.#clock.nowUs() + Math.round(delayUsMin + jitterUs);
    const atUs = Math.max(soonestUs, way.waiting.at(-1)?.atUs ?? 0);
    way.waiting.push({ atUs, envelope });
    this.#arm(way);
    return undefined;
  }

  block(from: string, by: 1 | -1): void {
    const way = this.#wayFrom(from);
    way.blocks += by;
    this.#arm(way);
    if (!this.#isBlocked()) {
      if (this.#silence !== undefined) this.#clock.cancel(this.#silence);
      this.#silence = undefined;
      this.reconnect();
    } else if (this.isUp) {
      this.#silence ??= this.#clock.schedule(this.#options.silenceUs, () => this.breakOff());
    }
  }

  /** The connection is gone, with what is on it. */
  breakOff(): void {
    if (this.#silence !== undefined) this.#clock.cancel(this.#silence);
    this.#silence = undefined;
    for (const way of [this.#toLeft, this.#toRight]) {
      way.waiting.length = 0;
      this.#arm(way);
    }
    if (this.isUp) {
      this.isUp = false;
      if (this.#left.isUp) this.#left.onLinkDown(this.#right.root);
      if (this.#right.isUp) this.#right.onLinkDown(this.#left.root);
    }
    this.reconnect();
  }

  /** Dials again, if nothing is in the way; else whatever is, calls this when it goes. */
  reconnect(): void {
    if (this.isUp || this.#reconnect !== undefined || !this.#mayConnect()) return;
    this.#reconnect = this.#clock.schedule(this.#options.reconnectUs, () => {
      this.#reconnect = undefined;
      if (!this.#mayConnect()) return;
      this.isUp = true;
      this.#left.onLinkUp(this.#right.root);
      this.#right.onLinkUp(this.#left.root);
    });
  }

  #mayConnect(): boolean {
    return !this.#isBlocked() && this.#left.isUp && this.#right.isUp;
  }

  #isBlocked(): boolean {
    return this.#toLeft.blocks > 0 || this.#toRight.blocks > 0;
  }

  #wayFrom(root: string): Way {
    return root === this.#left.root ? this.#toRight : this.#toLeft;
  }

  /** One timer per direction, for the next arrival; none while it is blocked. */
  #arm(way: Way): void {
    const next = way.waiting[0];
    if (next === undefined || way.blocks > 0) {
      if (way.timer !== undefined) this.#clock.cancel(way.timer);
      way.timer = undefined;
      return;
    }
    if (way.timer !== undefined) return;
    const afterUs = Math.max(0, next.atUs - this.#clock.nowUs());
    way.timer = this.#clock.schedule(afterUs, () => this.#arrive(way));
  }

  #arrive(way: Way): void {
    way.timer = undefined;
    const nowUs = this.#clock.nowUs();
    let arrived = 0;
    while ((way.waiting[arrived]?.atUs ?? Number.POSITIVE_INFINITY) <= nowUs) arrived++;
    for (const { envelope } of way.waiting.splice(0, arrived)) way.to.deliver(envelope);
    this.#arm(way);
  }
}
