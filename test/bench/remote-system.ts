/**
 * A process of a small cluster: a mesh, and a system with actors that answer at once and one that asks. Used by the
 * benchmark of remote asks, and by the tests that want real sockets.
 */
import type { AcquireReply, GpuNodeMessage } from "../../actors/gpu-node.ts";
import type { NodeSnapshot } from "../../actors/protocol.ts";
import type { AdmitReply, RateLimiterMessage } from "../../actors/rate-limiter.ts";
import type {
  Actor,
  ActorRef,
  AskOutcome,
  Context,
  ReplyTo,
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

const ASK_MS = 30_000;

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
  models: ["meta-llama/Llama-3.1-8B-Instruct"],
  adapters: [],
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

/** What the benchmark asks, and its answer: ten fields and twelve. */
export const admitOf = (
  owner: string,
  replyTo: ReplyTo<AdmitReply>,
): Extract<RateLimiterMessage, { kind: "limiter.admit" }> => ({
  kind: "limiter.admit",
  requestId: "01JCB2VX5T9QZ4K8N7W6R3M2HD",
  owner,
  key: "team-a",
  limits: { requestsPerMinute: 600, tokensPerMinute: 100_000 },
  model: "llama-3.1-8b",
  promptTokens: 512,
  maxTokens: 256,
  expiresAtMs: 600_000.5,
  replyTo,
});

export const admitted: AdmitReply = {
  kind: "granted",
  reservedTokens: 768,
  state: {
    atMs: 1234.5,
    requests: { limit: 600, remaining: 599, resetMs: 100 },
    tokens: { limit: 100_000, remaining: 99_232, resetMs: 460.8 },
  },
};

/** Grants everything, at once. */
class GrantingActor implements Actor<RateLimiterMessage> {
  receive(message: RateLimiterMessage, context: Context<RateLimiterMessage>): void {
    if (message.kind === "limiter.admit") context.reply(message.replyTo, admitted);
  }
}

type AskerMessage =
  /** Asks the limiter, or with a `leaseId` the node. */
  | { kind: "asker.go"; peer: string; inflight: number; asks: number; leaseId?: string }
  | { kind: "asker.answered"; outcome: AskOutcome<AcquireReply | AdmitReply> }
  | { kind: "asker.watch"; target: ActorRef<GpuNodeMessage> }
  | { kind: "asker.ended"; terminated: Terminated };

/** Keeps so many asks in flight until so many are answered. */
class AskerActor implements Actor<AskerMessage> {
  readonly #peer: BenchPeer;
  #left = 0;
  #leaseId: string | undefined;
  #node: ActorRef<GpuNodeMessage>;
  #limiter: ActorRef<RateLimiterMessage>;

  constructor(peer: BenchPeer) {
    this.#peer = peer;
    this.#node = peer.echo("");
    this.#limiter = peer.limiter("");
  }

  receive(message: AskerMessage, context: Context<AskerMessage>): void {
    switch (message.kind) {
      case "asker.go":
        this.#left = message.asks;
        this.#leaseId = message.leaseId;
        this.#node = this.#peer.echo(message.peer);
        this.#limiter = this.#peer.limiter(message.peer);
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
    const leaseId = this.#leaseId;
    const owner = context.self.path;
    if (leaseId === undefined) {
      context.ask<RateLimiterMessage, AdmitReply>(
        this.#limiter,
        ASK_MS,
        (replyTo) => admitOf(owner, replyTo),
        (outcome) => ({ kind: "asker.answered", outcome }),
      );
      return;
    }
    context.ask<GpuNodeMessage, AcquireReply>(
      this.#node,
      ASK_MS,
      (replyTo) => ({ kind: "gpu_node.acquire", leaseId, owner, uncachedTokens: 512, replyTo }),
      (outcome) => ({ kind: "asker.answered", outcome }),
    );
  }
}

export class BenchPeer {
  readonly mesh: PeerMesh;
  readonly system: ActorSystem;
  readonly #id: string;
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
          { id: "limiter", start: () => new GrantingActor(), restart: "permanent", mailbox },
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

  limiter(peer: string): ActorRef<RateLimiterMessage> {
    return this.system.ref<RateLimiterMessage>(`${peer}/limiter`);
  }

  /** Asks that peer so often, so many at a time; resolves when the last is answered. */
  ask(peer: string, asks: number, inflight: number, leaseId?: string): Promise<void> {
    const until = this.outcomes + asks;
    return new Promise((resolve) => {
      this.onAllAnswered = () => {
        if (this.outcomes >= until) resolve();
      };
      const asker = this.system.ref<AskerMessage>(`${this.#id}/requests`);
      const lease = leaseId === undefined ? {} : { leaseId };
      this.system.tell(asker, { kind: "asker.go", peer, inflight, asks, ...lease });
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
