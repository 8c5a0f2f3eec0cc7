/**
 * One GPU node of a simulation as the network shows it: the engine model, woken when something visible happens in
 * it, and what may be wrong with it. Gateways reach it through their edges (edge-models.ts); it is outside all of
 * them, shared by all, and knows none.
 *
 * It owns the node's one wake-up on the virtual clock, who waits for which request, and the books of its use.
 */
import type { Clock, TimerHandle } from "../runtime/clock.ts";
import type { Random } from "../runtime/random.ts";
import {
  GpuNodeModel,
  type NodeEvent,
  type NodeModelOptions,
  type NodeRequest,
  type NodeState,
} from "./gpu-node-model.ts";

/**
 * Told what becomes of a request, in order, until it has ended or was cancelled. It may look at the node, and must
 * change nothing on it.
 */
export type NodeListener = {
  onNodeEvent(event: NodeEvent): void;
  /** The engine hangs: no token comes until it goes on. */
  onStandStill(): void;
};

/** A fault that hits a share of requests; `random` is its own. */
export type SharedFault = { share: number; random: Random };

/** What is wrong with the node now, but for a crash. */
export type NodeFaults = {
  slowFactor: number;
  isHung: boolean;
  isRefusing: boolean;
  /** Share of KV memory that is left, 0..1. */
  kvShare: number;
  errors: readonly (SharedFault & { status: number })[];
  cuts: readonly SharedFault[];
};

export const noFaults: NodeFaults = {
  slowFactor: 1,
  isHung: false,
  isRefusing: false,
  kvShare: 1,
  errors: [],
  cuts: [],
};

/** What gateways sent to the node, over its whole life. */
export type NodeTotals = {
  attempts: number;
  finished: number;
  promptTokens: number;
  cachedTokens: number;
  outputTokens: number;
};

/** Sees what happens on a node; for checkers. It may look at the node, and must change nothing on it. */
export type NodeObserver = {
  onSubmitted(node: NodeHost, request: NodeRequest): void;
  /** Nobody waits for it any more; its generation was stopped, unless `isOrphan`. */
  onCancelled(node: NodeHost, id: string, isOrphan: boolean): void;
  onNodeEvent(node: NodeHost, event: NodeEvent): void;
  /** The engine has run to now, and everyone was told. */
  onSettled(node: NodeHost): void;
};

/** Makes the engine of a node; for canaries, whose engines have faults. */
export type MakeNodeModel = (options: NodeModelOptions) => GpuNodeModel;

const nobody: NodeListener = { onNodeEvent() {}, onStandStill() {} };

/** Share of the newest answer in the mean latency that the article's nodes report. */
const LATENCY_ALPHA = 0.1;

export class NodeHost {
  readonly name: string;
  readonly models: readonly string[];
  readonly metrics: "vllm" | "article";
  readonly totals: NodeTotals = {
    attempts: 0,
    finished: 0,
    promptTokens: 0,
    cachedTokens: 0,
    outputTokens: 0,
  };
  readonly #model: GpuNodeModel;
  readonly #clock: Clock;
  readonly #kvBlocks: number;
  /** Of this very node, for as long as it lives. */
  readonly #slowFactor: number;
  readonly #observer: NodeObserver | undefined;
  readonly #listeners = new Map<string, { listener: NodeListener; sinceUs: number }>();
  readonly #onWake = (): void => {
    this.#wake = undefined;
    this.#settle();
  };
  #wake: TimerHandle | undefined;
  #faults: NodeFaults = noFaults;
  /** Connections are taken from then on; Infinity after a crash. */
  #upAtUs = 0;
  #latencySeconds = 0;
  #kvPeak = 0;
  #busyUs = 0;
  #accountedUs = 0;
  #wasBusy = false;

  constructor(
    name: string,
    models: readonly string[],
    metrics: "vllm" | "article",
    options: NodeModelOptions & { slowFactor: number },
    clock: Clock,
    instruments: { nodes?: NodeObserver; makeNodeModel?: MakeNodeModel } = {},
  ) {
    this.name = name;
    this.models = models;
    this.metrics = metrics;
    this.#clock = clock;
    this.#observer = instruments.nodes;
    this.#model = instruments.makeNodeModel?.(options) ?? new GpuNodeModel(options);
    this.#kvBlocks = options.kvBlocks ?? options.law.kvBlocks;
    this.#slowFactor = options.slowFactor;
    this.#model.setSlowFactor(options.slowFactor, 0);
  }

  get faults(): NodeFaults {
    return this.#faults;
  }

  /** Takes connections. A hung engine's server does, too. */
  get isReachable(): boolean {
    return !this.#faults.isRefusing && this.#clock.nowUs() >= this.#upAtUs;
  }

  get isUp(): boolean {
    return this.#clock.nowUs() >= this.#upAtUs;
  }

  /** Requests that gateways have on it. */
  get inflight(): number {
    return this.#listeners.size;
  }

  /** Recent mean time from submission to the last token, s; 0 before any. */
  get latencySeconds(): number {
    return this.#latencySeconds;
  }

  get prefixBlockTokens(): number {
    return this.#model.prefixBlockTokens;
  }

  submit(request: NodeRequest, listener: NodeListener): void {
    this.totals.attempts++;
    const sinceUs = this.#clock.nowUs();
    this.#listeners.set(request.id, { listener, sinceUs });
    this.#observer?.onSubmitted(this, request);
    this.#model.submit(request, sinceUs);
    this.#settle();
  }

  /** Nothing more is told of the request. */
  cancel(id: string): void {
    if (!this.#listeners.delete(id)) return;
    this.#observer?.onCancelled(this, id, false);
    this.#model.cancel(id, this.#clock.nowUs());
    this.#settle();
  }

  /** Given up by someone whom the node cannot hear: it runs to its end, and nobody is told. */
  orphan(id: string): void {
    const waiting = this.#listeners.get(id);
    if (waiting === undefined) return;
    this.#observer?.onCancelled(this, id, true);
    this.#listeners.set(id, { ...waiting, listener: nobody });
  }

  /** Tokens that a request has produced by now. */
  producedTokens(id: string): number {
    this.#look();
    return this.#model.producedTokens(id);
  }

  /** As it is now. */
  snapshot(): NodeState {
    this.#look();
    const state = this.#model.snapshot();
    if (state.kv > this.#kvPeak) this.#kvPeak = state.kv;
    return state;
  }

  /** Largest use of KV memory that anybody saw, 0..1. */
  get kvPeak(): number {
    return this.#kvPeak;
  }

  /** Time with work that moved on, up to now. */
  busyUs(): number {
    this.#account();
    return this.#busyUs;
  }

  setFaults(faults: NodeFaults): void {
    const nowUs = this.#clock.nowUs();
    const before = this.#faults;
    this.#faults = faults;
    if (faults.slowFactor !== before.slowFactor) {
      this.#model.setSlowFactor(this.#slowFactor * faults.slowFactor, nowUs);
    }
    if (faults.isHung && !before.isHung) {
      this.#settle();
      this.#model.hang(nowUs);
      for (const { listener } of this.#listeners.values()) listener.onStandStill();
    }
    if (!faults.isHung && before.isHung) this.#model.resume(nowUs);
    if (faults.kvShare !== before.kvShare) {
      this.#model.setKvBlocks(Math.max(1, Math.round(this.#kvBlocks * faults.kvShare)), nowUs);
    }
    this.#settle();
  }

  crash(): void {
    this.#model.crash(this.#clock.nowUs());
    this.#upAtUs = Number.POSITIVE_INFINITY;
    this.#settle();
  }

  /** Takes requests again after its start-up, `startUpUs`. */
  restart(startUpUs: number): void {
    if (this.#upAtUs !== Number.POSITIVE_INFINITY) return;
    const nowUs = this.#clock.nowUs();
    this.#upAtUs = nowUs + startUpUs;
    this.#model.restart(nowUs, startUpUs);
    if (this.#faults.isHung) this.#model.hang(nowUs);
  }

  /** Throws an Error that names the first broken invariant of the engine as it stands. */
  checkEngine(): void {
    this.#model.assertInvariants();
  }

  /** Runs the engine to now, and does the same. */
  assertInvariants(): void {
    this.#settle();
    this.#model.assertInvariants();
  }

  /** Runs the engine to now. Unless that brings something, the next wake-up stands. */
  #look(): void {
    const events = this.#model.advance(this.#clock.nowUs());
    if (events.length === 0) return;
    for (const event of events) this.#tell(event);
    this.#settle();
  }

  /** Runs the engine to now, tells who waits, and sets the next wake-up. */
  #settle(): void {
    const nowUs = this.#clock.nowUs();
    for (const event of this.#model.advance(nowUs)) this.#tell(event);
    this.#account();
    this.#arm(nowUs);
    this.#observer?.onSettled(this);
  }

  #arm(nowUs: number): void {
    const nextUs = this.#model.nextEventAtUs();
    if (nextUs === this.#wake?.atUs) return;
    if (this.#wake !== undefined) this.#clock.cancel(this.#wake);
    this.#wake =
      nextUs === undefined
        ? undefined
        : this.#clock.schedule(Math.max(0, nextUs - nowUs), this.#onWake);
  }

  #tell(event: NodeEvent): void {
    this.#observer?.onNodeEvent(this, event);
    const waiting = this.#listeners.get(event.id);
    if (waiting === undefined) return;
    const { listener, sinceUs } = waiting;
    if (event.kind === "finished") {
      const seconds = (event.atUs - sinceUs) / 1e6;
      const alpha = Math.max(LATENCY_ALPHA, 1 / ++this.totals.finished);
      this.#latencySeconds += alpha * (seconds - this.#latencySeconds);
    }
    if (event.kind !== "first_token" && event.kind !== "preempted") {
      this.#listeners.delete(event.id);
    }
    listener.onNodeEvent(event);
  }

  #account(): void {
    const nowUs = this.#clock.nowUs();
    if (this.#wasBusy) this.#busyUs += nowUs - this.#accountedUs;
    this.#accountedUs = nowUs;
    this.#wasBusy = this.#listeners.size > 0 && !this.#faults.isHung;
  }
}
