/**
 * A process of a small cluster: a mesh, and a system with one actor that answers at once and one that asks. Used by
 * the benchmark of remote asks, and by the tests that want real sockets.
 */
import type { AcquireReply, GpuNodeMessage } from "../../actors/gpu-node.ts";
import type { NodeSnapshot } from "../../actors/protocol.ts";
import type {
  Actor,
  ActorRef,
  AskOutcome,
  Context,
  RuntimeEvent,
  Terminated,
} from "../../runtime/actor.ts";
import { SystemClock } from "../../runtime/clock.ts";
import { NactScheduler } from "../../runtime/nact-scheduler.ts";
import { Random } from "../../runtime/random.ts";
import { type ActorSystem, createSystem, type SystemEvent } from "../../runtime/system.ts";
import type { PeerEvent } from "../../transport/peer-links.ts";
import { type MeshOptions, PeerMesh } from "../../transport/peer-mesh.ts";

/** What travels as plain JSON to a process that is started. */
export type PeerConfig = {
  id: string;
  incarnation: number;
  secret: string;
} & Pick<MeshOptions, "link" | "tls" | "versions" | "structures" | "failuresPerMinuteMax">;

/** What the answering actor is told, beside asks. */
export type Told = GpuNodeMessage;

/** As long as a real one. */
export const snapshotOf = (node: string, nowMs: number): NodeSnapshot => ({
  node,
  address: "10.1.2.3:8000",
  incarnation: 1234,
  version: 77,
  atMs: nowMs,
  inflight: 12,
  prefillTokens: 4096,
  inflightMax: 64,
  circuit: "closed",
  probePermits: 0,
  draining: false,
  ramp: 1,
  healthy: true,
  restUntilMs: 0,
  articleWeight: 1,
});

/** Answers each acquire at once; keeps what it was told last. */
class EchoActor implements Actor<GpuNodeMessage> {
  readonly #onTold: (message: Told) => void;
  #reply: AcquireReply | undefined;

  constructor(onTold: (message: Told) => void) {
    this.#onTold = onTold;
  }

  receive(message: GpuNodeMessage, context: Context<GpuNodeMessage>): void {
    if (message.kind !== "gpu_node.acquire") return this.#onTold(message);
    if (message.leaseId === "keep waiting") return;
    this.#reply ??= { kind: "denied", reason: "full", snapshot: snapshotOf("echo", context.nowMs) };
    context.reply(message.replyTo, this.#reply);
  }
}

type AskerMessage =
  | { kind: "asker.go"; inflight: number; asks: number; leaseId: string }
  | { kind: "asker.answered"; outcome: AskOutcome<AcquireReply> }
  | { kind: "asker.watch"; target: ActorRef<GpuNodeMessage> }
  | { kind: "asker.ended"; terminated: Terminated };

/** Keeps so many asks in flight until so many are answered. */
class AskerActor implements Actor<AskerMessage> {
  readonly #peer: BenchPeer;
  #left = 0;
  #leaseId = "";

  constructor(peer: BenchPeer) {
    this.#peer = peer;
  }

  receive(message: AskerMessage, context: Context<AskerMessage>): void {
    switch (message.kind) {
      case "asker.go":
        this.#left = message.asks;
        this.#leaseId = message.leaseId;
        for (let index = 0; index < message.inflight; index++) this.#ask(context);
        return;
      case "asker.answered":
        this.#peer.outcomes++;
        if (!message.outcome.ok) this.#peer.failures.push(message.outcome.failure);
        if (this.#left > 0) this.#ask(context);
        else this.#peer.onAllAnswered?.();
        return;
      case "asker.watch":
        context.watch(message.target, (terminated) => ({ kind: "asker.ended", terminated }));
        return;
      case "asker.ended":
        this.#peer.ended.push(message.terminated);
        return;
    }
  }

  #ask(context: Context<AskerMessage>): void {
    this.#left--;
    const { target } = this.#peer;
    if (target === undefined) return;
    context.ask<GpuNodeMessage, AcquireReply>(
      target,
      30_000,
      (replyTo) => ({
        kind: "gpu_node.acquire",
        leaseId: this.#leaseId,
        owner: context.self.path,
        uncachedTokens: 512,
        replyTo,
      }),
      (outcome) => ({ kind: "asker.answered", outcome }),
    );
  }
}

export class BenchPeer {
  readonly mesh: PeerMesh;
  readonly system: ActorSystem;
  readonly #id: string;
  target: ActorRef<GpuNodeMessage> | undefined;
  outcomes = 0;
  readonly failures: string[] = [];
  readonly ended: Terminated[] = [];
  readonly told: Told[] = [];
  toldCount = 0;
  onAllAnswered: (() => void) | undefined;

  constructor(
    { id, incarnation, secret, ...more }: PeerConfig,
    onEvent: (event: PeerEvent) => void,
    onSystemEvent: (event: SystemEvent | RuntimeEvent) => void = () => {},
  ) {
    this.#id = id;
    this.mesh = new PeerMesh(
      {
        cluster: "bench",
        self: { node: id, incarnation },
        settings: "none",
        keys: [{ id: "k1", secret: new TextEncoder().encode(secret) }],
        ...more,
      },
      onEvent,
    );
    let nextId = Math.floor(Math.random() * 2 ** 52); // Another life of this process has other numbers.
    const clock = new SystemClock();
    this.system = createSystem({
      scheduler: new NactScheduler({ clock }),
      clock,
      random: new Random(1),
      remote: this.mesh.remote,
      nextId: () => ++nextId,
    });
    const mailbox = { max: 65_536, overflow: { kind: "reject" } } as const;
    const echo = () =>
      new EchoActor((message) => {
        this.toldCount++;
        if (this.told.length < 1000) this.told.push(message);
      });
    this.system.start(
      {
        id,
        strategy: "one_for_one",
        intensity: 10,
        periodMs: 60_000,
        children: [
          {
            id: "nodes",
            strategy: "one_for_one",
            intensity: 10,
            periodMs: 60_000,
            children: [{ id: "echo", start: echo, restart: "permanent", mailbox }],
          },
          { id: "requests", start: () => new AskerActor(this), restart: "permanent", mailbox },
        ],
      },
      {
        onEvent: onSystemEvent,
        onFatal: (error) => {
          throw error;
        },
      },
    );
    this.mesh.bind(this.system);
  }

  echo(peer: string): ActorRef<GpuNodeMessage> {
    return this.system.ref<GpuNodeMessage>(`${peer}/nodes/echo`);
  }

  /** Asks that peer's echo so often, so many at a time; resolves when the last is answered. */
  ask(peer: string, asks: number, inflight: number, leaseId: string): Promise<void> {
    this.target = this.echo(peer);
    const until = this.outcomes + asks;
    return new Promise((resolve) => {
      this.onAllAnswered = () => {
        if (this.outcomes >= until) resolve();
      };
      const asker = this.system.ref<AskerMessage>(`${this.#id}/requests`);
      this.system.tell(asker, { kind: "asker.go", inflight, asks, leaseId });
    });
  }

  watch(peer: string): void {
    const asker = this.system.ref<AskerMessage>(`${this.#id}/requests`);
    this.system.tell(asker, { kind: "asker.watch", target: this.echo(peer) });
  }

  async close(leave: boolean): Promise<void> {
    await this.mesh.close(leave);
    this.system.stopAll();
  }
}
