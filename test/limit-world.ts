/**
 * Peers that keep limits together, in virtual time: each a system of its own with the shipping limiter, cluster limiter
 * and members, on the simulator's network, with a modelled store of limits beside them.
 */
import {
  ClusterLimiterActor,
  type ClusterLimiterDescription,
  type ClusterLimiterMessage,
  clusterLimiterDefaults,
} from "../actors/cluster-limiter.ts";
import type { LimitStoreCommand, LimitStoreReply } from "../actors/edges.ts";
import { Gcra } from "../actors/gcra.ts";
import { requestBurstOf } from "../actors/limit-state.ts";
import { MembersActor, type MembersMessage, type MeshCommand } from "../actors/members.ts";
import { membershipDefaults } from "../actors/membership.ts";
import type { Limits } from "../actors/protocol.ts";
import {
  type AdmitReply,
  type LimiterDescription,
  limiterDefaults,
  RateLimiterActor,
  type RateLimiterMessage,
} from "../actors/rate-limiter.ts";
import type {
  Actor,
  AskOutcome,
  ChildSpec,
  Context,
  ReplyTo,
  SupervisorSpec,
} from "../runtime/actor.ts";
import { SimClock } from "../runtime/clock.ts";
import { Random } from "../runtime/random.ts";
import { SimScheduler } from "../runtime/sim-scheduler.ts";
import { type ActorSystem, createSystem } from "../runtime/system.ts";
import { Network, networkDefaults, type Peer } from "../sim/network.ts";

const MINUTE_MS = 60_000;
const STORE_MS = 0.4;

type Fire = { kind: "client.fire"; requestId: string; key: string; limits: Limits };
type ClientMessage =
  | Fire
  | { kind: "client.admitted"; fire: Fire; outcome: AskOutcome<AdmitReply> }
  | { kind: "client.done"; fire: Fire };

/** Asks, holds what it was granted for 50 ms, settles. */
class Client implements Actor<ClientMessage> {
  readonly #root: string;
  readonly #world: LimitWorld;

  constructor(root: string, world: LimitWorld) {
    this.#root = root;
    this.#world = world;
  }

  receive(message: ClientMessage, context: Context<ClientMessage>): void {
    const limits = { path: `${this.#root}/limits`, uid: 0 };
    switch (message.kind) {
      case "client.fire": {
        const { requestId, key } = message;
        context.ask<RateLimiterMessage, AdmitReply>(
          limits,
          500,
          (replyTo) => ({
            kind: "limiter.admit",
            requestId,
            owner: context.self.path,
            key,
            limits: message.limits,
            model: "m",
            promptTokens: 10,
            maxTokens: 10,
            expiresAtMs: context.nowMs + 60_000,
            replyTo,
          }),
          (outcome) => ({ kind: "client.admitted", fire: message, outcome }),
        );
        return;
      }
      case "client.admitted": {
        const { fire, outcome } = message;
        this.#world.note(fire.key, outcome, context.nowMs);
        if (!outcome.ok || outcome.value.kind === "refused") return;
        context.startTimer(fire.requestId, 50, { kind: "client.done", fire });
        return;
      }
      case "client.done": {
        const { requestId, key } = message.fire;
        const usage = { promptTokens: 10, cachedTokens: 0, outputTokens: 5 };
        context.tell(limits, { kind: "limiter.settle", requestId, key, ...usage });
      }
    }
  }
}

type Late = { kind: "store.late"; replyTo: ReplyTo<LimitStoreReply>; reply: LimitStoreReply };

/** What Redis does, as one peer reaches it. */
class StoreEdge implements Actor<LimitStoreCommand | Late> {
  readonly #root: string;
  readonly #world: LimitWorld;

  constructor(root: string, world: LimitWorld) {
    this.#root = root;
    this.#world = world;
  }

  receive(message: LimitStoreCommand | Late, context: Context<LimitStoreCommand | Late>): void {
    switch (message.kind) {
      case "limits.charge": {
        const { replyTo, requestId } = message;
        if (this.#world.storeHangs.has(this.#root)) return; // No answer ever comes.
        const reply: LimitStoreReply = this.#world.storeAway.has(this.#root)
          ? { kind: "away" }
          : this.#world.charge(message, context.nowMs);
        context.startTimer(requestId, STORE_MS, { kind: "store.late", replyTo, reply });
        return;
      }
      case "limits.correct":
        if (!this.#world.storeAway.has(this.#root)) this.#world.correct(message, context.nowMs);
        return;
      case "store.late":
        return context.reply(message.replyTo, message.reply);
    }
  }
}

class Sink implements Actor<MeshCommand> {
  receive(): void {}
}

class LimitPeer implements Peer {
  readonly root: string;
  readonly #world: LimitWorld;
  system: ActorSystem | undefined;
  incarnation = 0;

  constructor(root: string, world: LimitWorld) {
    this.root = root;
    this.#world = world;
  }

  get isUp(): boolean {
    return this.system !== undefined;
  }

  get member() {
    const { root: id, incarnation } = this;
    return { id, incarnation, address: `ws://${id}:7000`, version: "1" };
  }

  deliver(envelope: Parameters<ActorSystem["deliver"]>[0]): void {
    this.system?.deliver(envelope);
  }

  onLinkDown(root: string): void {
    const prefix = `${root}/`;
    this.system?.disconnected((path) => path.startsWith(prefix));
    this.#tellMembers({ kind: "members.link_down", id: root });
  }

  onLinkUp(root: string): void {
    this.#tellMembers({ kind: "members.link_up", id: root });
  }

  #tellMembers(message: MembersMessage): void {
    this.system?.tell(this.system.ref<MembersMessage>(`${this.root}/members`), message);
  }

  start(): void {
    const { root } = this;
    const world = this.#world;
    this.incarnation = world.nextIncarnation();
    const { clock, scheduler } = world;
    const system: ActorSystem = createSystem({
      clock,
      scheduler,
      nextId: world.nextId,
      random: new Random(`${world.seed} ${root} ${this.incarnation}`),
      remote: {
        route: (path) => !path.startsWith(`${root}/`),
        send: (envelope) =>
          this.system === system ? world.network.send(root, envelope) : "disconnected",
      },
    });
    this.system = system;
    const ref = <M>(path: string) => system.ref<M>(path);
    const store = world.hasStore ? { store: ref<LimitStoreCommand>(`${root}/store`) } : {};
    const tree: SupervisorSpec = {
      id: root,
      strategy: "one_for_one",
      intensity: 10,
      periodMs: 60_000,
      children: [
        child("mesh", () => new Sink()),
        child("store", () => new StoreEdge(root, world)),
        child("limiter", () => new RateLimiterActor(limiterDefaults)),
        child(
          "limits",
          () =>
            new ClusterLimiterActor(
              { ...clusterLimiterDefaults, self: root },
              {
                limiter: ref<RateLimiterMessage>(`${root}/limiter`),
                peer: (id) => ref<ClusterLimiterMessage>(`${id}/limits`),
                ...store,
              },
            ),
        ),
        child(
          "members",
          () =>
            new MembersActor(this.member, membershipDefaults, {
              peer: (id) => ref<MembersMessage>(`${id}/members`),
              mesh: ref<MeshCommand>(`${root}/mesh`),
              viewers: [ref<ClusterLimiterMessage>(`${root}/limits`)],
            }),
        ),
        child("client", () => new Client(root, world)),
      ],
    };
    system.start(tree, {
      onEvent: (event) => {
        if (event.kind === "runtime.crashed") throw (event as { error?: unknown }).error;
      },
      onFatal: (error) => {
        throw error;
      },
    });
    // Seeds that never answer by themselves: it waits for whom it can meet.
    const addresses = world.roots.map((id) => `ws://${id}:7000`);
    this.#tellMembers({ kind: "members.discovered", addresses });
  }

  stop(): void {
    const { system } = this;
    this.system = undefined;
    system?.stopAll();
  }
}

function child<M>(id: string, start: () => Actor<M>): ChildSpec<M> {
  const mailbox = { max: 65_536, overflow: { kind: "reject" } } as const;
  return { id, start, restart: "permanent", mailbox };
}

export class LimitWorld {
  readonly seed: number | string;
  readonly roots: readonly string[];
  readonly clock = new SimClock();
  readonly scheduler: SimScheduler;
  readonly network: Network;
  readonly hasStore: boolean;
  readonly storeAway = new Set<string>();
  readonly storeHangs = new Set<string>();
  /** Instants of admissions, by key. */
  readonly admitted = new Map<string, number[]>();
  readonly outcomes = new Map<string, number>();
  readonly #peers = new Map<string, LimitPeer>();
  readonly #allowances = new Map<string, Gcra>();
  #requests = 0;
  #incarnations = 0;
  #ids = 0;
  readonly nextId = (): number => ++this.#ids;

  constructor(seed: number | string, count: number, hasStore: boolean) {
    this.seed = seed;
    this.hasStore = hasStore;
    this.roots = Array.from({ length: count }, (_, index) => `peer-${index + 1}`);
    this.scheduler = new SimScheduler(this.clock, seed);
    for (const root of this.roots) this.#peers.set(root, new LimitPeer(root, this));
    const random = new Random(seed).split("network");
    const peers = [...this.#peers.values()];
    this.network = new Network(peers, networkDefaults, this.clock, random);
    for (const peer of peers) peer.start();
    for (const peer of peers)
      for (const other of peers) if (other !== peer) peer.onLinkUp(other.root);
    this.run(5000);
  }

  get nowMs(): number {
    return this.clock.nowUs() / 1000;
  }

  peer(root: string): LimitPeer {
    const peer = this.#peers.get(root);
    if (peer === undefined) throw new Error(`there is no ${root}`);
    return peer;
  }

  nextIncarnation(): number {
    return ++this.#incarnations;
  }

  run(ms: number): void {
    this.scheduler.runFor(ms);
  }

  /** Every peer that is up is asked `perSecond / peers` times a second, for so long. Meanwhile `at` may do things. */
  drive(
    key: string,
    limits: Limits,
    perSecond: number,
    seconds: number,
    at: Readonly<Record<number, () => void>> = {},
  ): void {
    const gapMs = (1000 * this.roots.length) / perSecond;
    const startMs = this.nowMs;
    this.roots.forEach((root, index) => {
      const fire = (n: number): void => {
        const afterMs = startMs + (index * gapMs) / this.roots.length + n * gapMs - this.nowMs;
        if (startMs + n * gapMs >= startMs + seconds * 1000) return;
        this.clock.schedule(Math.max(0, Math.round(afterMs * 1000)), () => {
          const { system } = this.peer(root);
          const requestId = `r${this.#requests++}`;
          const message: Fire = { kind: "client.fire", requestId, key, limits };
          system?.tell(system.ref<ClientMessage>(`${root}/client`), message);
          fire(n + 1);
        });
      };
      fire(0);
    });
    let doneMs = 0;
    for (const [second, act] of Object.entries(at).sort(([a], [b]) => Number(a) - Number(b))) {
      this.run(Number(second) * 1000 - doneMs);
      doneMs = Number(second) * 1000;
      act();
    }
    this.run(seconds * 1000 - doneMs);
  }

  note(key: string, outcome: AskOutcome<AdmitReply>, atMs: number): void {
    const what = !outcome.ok
      ? outcome.failure
      : outcome.value.kind === "granted"
        ? "granted"
        : outcome.value.code;
    this.outcomes.set(what, (this.outcomes.get(what) ?? 0) + 1);
    if (what !== "granted") return;
    const list = this.admitted.get(key) ?? [];
    list.push(atMs);
    this.admitted.set(key, list);
  }

  count(key: string): number {
    return this.admitted.get(key)?.length ?? 0;
  }

  /** Admitted in each second since `fromMs`. */
  perSecond(key: string, fromMs: number): number[] {
    const counts: number[] = [];
    for (const atMs of this.admitted.get(key) ?? []) {
      const second = Math.floor((atMs - fromMs) / 1000);
      counts[second] = (counts[second] ?? 0) + 1;
    }
    return counts;
  }

  // ---- faults ----------------------------------------------------------------------------------------------

  /** Between these and all others, both ways. */
  partition(side: readonly string[], by: 1 | -1): void {
    for (const one of side)
      for (const other of this.roots)
        if (!side.includes(other)) {
          this.network.block(one, other, by);
          this.network.block(other, one, by);
        }
  }

  crash(root: string): void {
    this.peer(root).stop();
    this.network.processEnded(root);
  }

  restart(root: string): void {
    this.peer(root).start();
    this.network.processStarted(root);
  }

  // ---- the store ----------------------------------------------------------------------------------------------

  charge(
    { key, limits, tokens }: Extract<LimitStoreCommand, { kind: "limits.charge" }>,
    nowMs: number,
  ): LimitStoreReply {
    const limit = limits.requestsPerMinute ?? 1;
    let gcra = this.#allowances.get(key);
    if (gcra === undefined) {
      gcra = new Gcra(limit, MINUTE_MS, requestBurstOf(limits) ?? 1);
      this.#allowances.set(key, gcra);
    }
    const retryAfterMs = gcra.reserve(1, nowMs);
    const remaining = gcra.remaining(nowMs);
    const state = { atMs: 0, requests: { limit, remaining, resetMs: gcra.resetMs(nowMs) } };
    if (retryAfterMs > 0)
      return { kind: "refused", code: "rate_limit_requests", retryAfterMs, state };
    const charge = { tokens, requestNs: gcra.spanNs(1), tokensNs: 0, day: 0 };
    return { kind: "granted", charge, state };
  }

  correct(
    { key, charge, refund }: Extract<LimitStoreCommand, { kind: "limits.correct" }>,
    nowMs: number,
  ): void {
    if (refund) this.#allowances.get(key)?.settle(charge.requestNs, 0, nowMs);
  }

  // ---- what actors say -----------------------------------------------------------------------------------------

  async limits(root: string): Promise<ClusterLimiterDescription> {
    return this.#ask<ClusterLimiterMessage, ClusterLimiterDescription>(
      root,
      "limits",
      (replyTo) => ({ kind: "limits.describe", replyTo }),
    );
  }

  async limiter(root: string): Promise<LimiterDescription> {
    return this.#ask<RateLimiterMessage, LimiterDescription>(root, "limiter", (replyTo) => ({
      kind: "limiter.describe",
      replyTo,
    }));
  }

  async #ask<M, R>(root: string, name: string, message: (replyTo: ReplyTo<R>) => M): Promise<R> {
    const { system } = this.peer(root);
    if (system === undefined) throw new Error(`${root} is down`);
    const asked = system.ask<M, R>(system.ref<M>(`${root}/${name}`), 1000, message);
    this.scheduler.runReady();
    const outcome = await asked;
    if (!outcome.ok) throw new Error(`${root}/${name} did not answer: ${outcome.failure}`);
    return outcome.value;
  }
}
