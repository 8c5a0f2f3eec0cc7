/**
 * Peers without sockets: state machines of transport/peer-links.ts on one hand-turned clock, joined by pipes that
 * keep order, hold back, stall and break. For tests of what the links promise.
 */

import { Random } from "../runtime/random.ts";
import type { Envelope } from "../runtime/system.ts";
import type { Connection } from "../transport/peer-link.ts";
import { type LinksOptions, type PeerEvent, PeerLinks } from "../transport/peer-links.ts";

const SECRET = new TextEncoder().encode("a secret of the whole cluster");
/** As of peer-mesh.ts. */
export const TICK_MS = 50;

/** One end of a connection. What it writes lies in `flying` until it is delivered. */
export class PipeEnd implements Connection {
  readonly owner: PipePeer;
  id = 0;
  other: PipeEnd | undefined;
  readonly flying: Uint8Array[] = [];
  isOpen = true;
  /** It will close when everything has been delivered. */
  isEnding = false;
  isTrusted = false;
  /** The other end does not read. */
  isStalled = false;
  written = 0;

  constructor(owner: PipePeer) {
    this.owner = owner;
  }

  write(bytes: Uint8Array): void {
    if (!this.isOpen) return;
    this.flying.push(Uint8Array.from(bytes)); // The encoder may use its buffer again.
    this.written += bytes.length;
  }

  bufferedBytes(): number {
    return this.isStalled ? this.flying.reduce((sum, { length }) => sum + length, 0) : 0;
  }

  destroy(): void {
    if (this.isEnding) return;
    this.isOpen = false;
    this.flying.length = 0;
  }

  end(): void {
    this.isEnding = true;
  }

  trust(): void {
    this.isTrusted = true;
  }
}

/** One process. Told everything that its links tell. */
export class PipePeer {
  readonly name: string;
  readonly incarnation: number;
  readonly links: PeerLinks;
  readonly events: PeerEvent[] = [];
  readonly envelopes: Envelope[] = [];
  readonly undeliverable: { envelope: Envelope; reason: string }[] = [];
  readonly questions = new Map<number, string>();
  /** Events and envelopes in the order in which they came. */
  readonly story: (PeerEvent | Envelope)[] = [];
  readonly ends = new Map<number, PipeEnd>();
  readonly dirty = new Set<string>();
  isAlive = true;

  constructor(name: string, incarnation: number, world: PipeWorld, more: Partial<LinksOptions>) {
    this.name = name;
    this.incarnation = incarnation;
    const random = new Random(`${name} ${incarnation}`);
    this.links = new PeerLinks(
      {
        cluster: "test",
        self: { node: name, incarnation },
        settings: "4096",
        keys: [{ id: "k1", secret: SECRET }],
        randomBytes: (count) => Uint8Array.from({ length: count }, () => random.next() * 256),
        ...more,
      },
      {
        open: (id, address) => world.dials.push({ peer: this, id, address }),
        abandon: (id) => {
          world.dials = world.dials.filter((dial) => dial.peer !== this || dial.id !== id);
        },
        onEvent: (event) => {
          this.events.push(event);
          this.story.push(event);
        },
        onEnvelope: (envelope) => {
          this.envelopes.push(envelope);
          this.story.push(envelope);
        },
        onUndeliverable: (envelope, reason) => this.undeliverable.push({ envelope, reason }),
        onDirty: (node) => this.dirty.add(node),
        vitals: () => ({ loopLagMs: 1, queueDepth: 2, epoch: 3 }),
        questionOf: (askId) => this.questions.get(askId),
        nowMs: () => world.nowMs + world.skewMs(name),
        random: () => random.next(),
      },
    );
  }

  /** The turn of the event loop ends. */
  flush(): void {
    for (const node of [...this.dirty]) if (!this.links.flush(node)) this.dirty.delete(node);
  }
}

export class PipeWorld {
  nowMs = 0;
  dials: { peer: PipePeer; id: number; address: string }[] = [];
  readonly peers = new Map<string, PipePeer>();
  readonly pipes: [PipeEnd, PipeEnd][] = [];
  readonly #skews = new Map<string, number>();

  /** Starts a process; one of that name that runs is killed. */
  start(name: string, incarnation: number, more: Partial<LinksOptions> = {}): PipePeer {
    this.kill(name);
    // A monotonic clock begins anywhere.
    if (!this.#skews.has(name)) this.#skews.set(name, this.#skews.size * 300_000);
    const peer = new PipePeer(name, incarnation, this, more);
    this.peers.set(name, peer);
    return peer;
  }

  skewMs(name: string): number {
    return this.#skews.get(name) ?? 0;
  }

  kill(name: string): void {
    const peer = this.peers.get(name);
    if (peer === undefined) return;
    peer.isAlive = false;
    this.peers.delete(name);
    this.dials = this.dials.filter((dial) => dial.peer !== peer);
    for (const pipe of [...this.pipes]) {
      for (const end of pipe) if (end.owner === peer) end.destroy();
    }
    this.sweep();
  }

  /** Open connections. */
  get openPipes(): number {
    return this.pipes.filter(([left, right]) => left.isOpen && right.isOpen).length;
  }

  /** Dials that are under way reach whom they mean, or fail. */
  connect(isReachable: (from: string, to: string) => boolean = () => true): void {
    for (const { peer, id, address } of this.dials.splice(0)) {
      const target = this.peers.get(address);
      const isFine = target !== undefined && isReachable(peer.name, address);
      if (!isFine || !target.links.accepts(peer.name)) {
        peer.links.closed(id, "refused");
        continue;
      }
      const near = new PipeEnd(peer);
      const far = new PipeEnd(target);
      near.other = far;
      far.other = near;
      near.id = id;
      this.pipes.push([near, far]);
      peer.ends.set(id, near);
      far.id = target.links.accepted(far, peer.name, "");
      peer.links.opened(id, near, "");
    }
  }

  /** Delivers up to so many messages of one end. */
  deliver(from: PipeEnd, most = 1): void {
    const to = from.other;
    for (let index = 0; index < most && from.isOpen && to?.isOpen === true; index++) {
      if (from.isStalled) break;
      const bytes = from.flying.shift();
      if (bytes === undefined) break;
      to.owner.links.received(to.id, bytes);
    }
    this.sweep();
  }

  /** The connection breaks: what flies is lost. */
  reset([left, right]: [PipeEnd, PipeEnd]): void {
    for (const end of [left, right]) {
      const wasOpen = end.isOpen && !end.isEnding;
      end.isOpen = false;
      end.flying.length = 0;
      if (wasOpen && end.owner.isAlive) end.owner.links.closed(end.id, "reset");
    }
    this.sweep();
  }

  /** Tells each end that the other is gone. */
  sweep(): void {
    for (let index = this.pipes.length - 1; index >= 0; index--) {
      const pipe = this.pipes[index];
      if (pipe === undefined) continue;
      for (const end of pipe) {
        if (end.isEnding && end.flying.length === 0) end.isOpen = false;
      }
      const [left, right] = pipe;
      if (left.isOpen && right.isOpen) continue;
      this.pipes.splice(index, 1);
      this.reset(pipe);
    }
  }

  tick(ms = TICK_MS): void {
    this.nowMs += ms;
    for (const peer of [...this.peers.values()]) {
      peer.links.tick();
      peer.flush();
    }
    this.sweep();
  }

  /** Everything moves freely for so long. */
  run(ms: number, isReachable?: (from: string, to: string) => boolean): void {
    for (let gone = 0; gone < ms; gone += TICK_MS) {
      this.tick();
      this.connect(isReachable);
      this.drain();
    }
  }

  /** Until nothing flies that is not held back. */
  drain(): void {
    for (let rounds = 0; rounds < 1000; rounds++) {
      for (const peer of this.peers.values()) peer.flush();
      const flying = this.pipes.flat().filter((end) => end.flying.length > 0 && !end.isStalled);
      if (flying.length === 0) return;
      for (const end of flying) this.deliver(end, 1000);
    }
  }
}

/** Counts up; at most one of a number is ever delivered. */
export function userEnvelope(from: string, to: string, number: number): Envelope {
  const message = { kind: "gpu_node.first_token", leaseId: `lease ${number}`, ttftMs: number };
  const place = { to: `${to}/nodes/n`, uid: 0, from: `${from}/requests` };
  return { kind: "message", ...place, askId: 0, timeoutUs: 0, message };
}

export function systemEnvelope(from: string, to: string, number: number): Envelope {
  return { kind: "watch", to: `${to}/nodes/n`, uid: 0, from: `${from}/router`, watchId: number };
}

/** The numbers in what has come of one sort. */
export function numbersOf(
  envelopes: readonly (PeerEvent | Envelope)[],
  sort: "user" | "system",
): number[] {
  const numbers: number[] = [];
  for (const envelope of envelopes) {
    if (sort === "system" && envelope.kind === "watch") numbers.push(envelope.watchId);
    if (sort === "user" && envelope.kind === "message") {
      numbers.push((envelope.message as { ttftMs: number }).ttftMs);
    }
  }
  return numbers;
}
