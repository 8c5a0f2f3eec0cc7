/**
 * Supervision in the manner of OTP: who is restarted when a child fails, in which order, and when
 * to give up.
 *
 * Two limits keep failures apart. Each child has its own: after 5 restarts in 30 s it is *parked*
 * and restarted after a back-off of 0.2 s · 2ⁿ (at most 30 s, ±20 %), n falling back to 0 after 60
 * s of health. Each supervisor has that of its spec: more than `intensity` immediate restarts in
 * `periodMs`, over all its children, fail it upward. Parked restarts do not count there: one child
 * that keeps failing must not take its siblings down.
 *
 * A start that throws on restart counts like a crash; on first start it fails whatever asked for
 * it. Everything here runs synchronously, between turns.
 */

import type { SupervisorSpec, TreeSpec } from "./actor.ts";
import type { Clock, TimerHandle } from "./clock.ts";
import type { Random } from "./random.ts";

const CHILD_RESTARTS_MAX = 5;
const CHILD_WINDOW_US = 30_000_000;
const BACKOFF_US_MIN = 200_000;
const BACKOFF_US_MAX = 30_000_000;
const BACKOFF_JITTER = 0.2;
const HEALTHY_US = 60_000_000;

/** Something a supervisor starts and ends: an actor's cell, or another supervisor. */
export interface Supervised {
  readonly id: string;
  readonly path: string;
  readonly restart: "permanent" | "transient" | "temporary";
  readonly isRunning: boolean;
  /** Starts an incarnation. Throws when that fails, and then nothing of it remains. */
  begin(): void;
  /**
   * Ends the incarnation in order, if there is one; another may begin, with the mail that waits.
   */
  suspend(): void;
  /** Ends for good: suspends, gives up the path, and loses the mail that waits. */
  dispose(): void;
}

export type SupervisorEvent =
  /** A restart that worked; `restarts` of this child so far. */
  | { kind: "runtime.restarted"; path: string; restarts: number }
  | { kind: "runtime.start_failed"; path: string; error: unknown }
  | { kind: "runtime.parked"; path: string; waitMs: number }
  /** This supervisor gave up, because of `error` in a child. */
  | { kind: "runtime.escalated"; path: string; error: unknown };

/** What a supervisor needs around it. */
export type SupervisorHost = {
  readonly clock: Clock;
  readonly random: Random;
  /** Makes the child and registers its path; throws when the path is taken. Does not start it. */
  create(spec: TreeSpec, supervisor: Supervisor): Supervised;
  forget(supervisor: Supervisor): void;
  report(event: SupervisorEvent): void;
  /** The root gave up; everything under it is stopped. */
  fail(error: unknown): void;
};

type Child = {
  readonly actor: Supervised;
  /** Named by the spec, so it comes back when the supervisor itself restarts. */
  readonly isStatic: boolean;
  restarts: number;
  /** Immediate restarts within the child's window, at most CHILD_RESTARTS_MAX. */
  restartsAtUs: number[];
  /** Exponent of the next back-off; above 0 the child failed since it last was healthy. */
  backoffs: number;
  begunAtUs: number;
  parked: TimerHandle | undefined;
};

export class Supervisor implements Supervised {
  readonly id: string;
  readonly path: string;
  readonly restart = "permanent";
  readonly #spec: SupervisorSpec;
  readonly #parent: Supervisor | undefined;
  readonly #host: SupervisorHost;
  /** In start order. Bounded by what the host spawns. */
  #children: Child[] = [];
  readonly #byActor = new Map<Supervised, Child>();
  /** Immediate restarts within the spec's period, at most intensity. */
  #restartsAtUs: number[] = [];
  #isRunning = false;

  /** Throws RangeError for a spec that could not work. */
  constructor(spec: SupervisorSpec, parent: Supervisor | undefined, host: SupervisorHost) {
    checkSpec(spec);
    this.id = spec.id;
    this.path = parent === undefined ? spec.id : `${parent.path}/${spec.id}`;
    this.#spec = spec;
    this.#parent = parent;
    this.#host = host;
  }

  get isRunning(): boolean {
    return this.#isRunning;
  }

  /** Children that wait out a back-off, here and below. */
  get parkedCount(): number {
    let count = 0;
    for (const child of this.#children) {
      if (child.parked !== undefined) count++;
      if (child.actor instanceof Supervisor) count += child.actor.parkedCount;
    }
    return count;
  }

  /** Restarts of the child so far, since it was added. */
  restartsOf(actor: Supervised): number {
    return this.#byActor.get(actor)?.restarts ?? 0;
  }

  /**
   * Makes what the spec names and is not there: all of it, at all levels, before anything begins,
   * so that mail to what begins later waits instead of being lost. Called once after construction.
   */
  prepare(): void {
    const known = new Map(this.#children.map((child) => [child.actor.id, child]));
    this.#children = this.#spec.children.map(
      (spec) => known.get(spec.id) ?? this.#make(spec, true),
    );
  }

  begin(): void {
    this.prepare();
    this.#isRunning = true;
    for (const child of [...this.#children]) {
      try {
        this.#beginChild(child);
      } catch (error) {
        this.suspend();
        throw error;
      }
    }
  }

  suspend(): void {
    this.#isRunning = false;
    for (const child of this.#children.toReversed()) {
      this.#unpark(child);
      if (child.isStatic && child.actor.restart !== "temporary") child.actor.suspend();
      else this.#remove(child);
      child.restartsAtUs = [];
      child.backoffs = 0;
    }
    this.#restartsAtUs = [];
  }

  dispose(): void {
    this.#isRunning = false;
    for (const child of this.#children.toReversed()) this.#remove(child);
    this.#host.forget(this);
  }

  /**
   * Adds a child and starts it. Throws when its path is taken or its start fails; then it is not
   * there.
   */
  spawn(spec: TreeSpec): Supervised {
    if (!this.#isRunning) throw new RangeError(`supervisor ${this.path} is not running`);
    const child = this.#make(spec, false);
    this.#children.push(child);
    try {
      this.#beginChild(child);
    } catch (error) {
      this.#remove(child);
      throw error;
    }
    return child.actor;
  }

  /**
   * Stops a child in order; it does not come back, unless the spec names it and this supervisor
   * restarts.
   */
  stopChild(actor: Supervised): void {
    const child = this.#byActor.get(actor);
    if (child !== undefined) this.#remove(child);
  }

  /**
   * A child's incarnation ended by itself: in order (`error` undefined) or by a crash. Decides what
   * follows.
   */
  childEnded(actor: Supervised, outcome: { error: unknown } | undefined): void {
    const child = this.#byActor.get(actor);
    if (child === undefined || !this.#isRunning) return;
    if (actor.restart === "temporary" || (actor.restart === "transient" && outcome === undefined)) {
      this.#remove(child);
      return;
    }
    this.#recover(child, outcome?.error ?? new Error(`permanent child ${actor.path} stopped`));
  }

  #make(spec: TreeSpec, isStatic: boolean): Child {
    checkId(spec.id);
    const child: Child = {
      actor: this.#host.create(spec, this),
      isStatic,
      restarts: 0,
      restartsAtUs: [],
      backoffs: 0,
      begunAtUs: 0,
      parked: undefined,
    };
    this.#byActor.set(child.actor, child);
    return child;
  }

  #remove(child: Child): void {
    this.#unpark(child);
    const index = this.#children.indexOf(child);
    if (index >= 0) this.#children.splice(index, 1);
    this.#byActor.delete(child.actor);
    child.actor.dispose();
  }

  #unpark(child: Child): void {
    if (child.parked !== undefined) this.#host.clock.cancel(child.parked);
    child.parked = undefined;
  }

  #beginChild(child: Child): void {
    this.#unpark(child);
    child.begunAtUs = this.#host.clock.nowUs();
    child.actor.begin();
  }

  /**
   * Brings `failed` and those its strategy ties to it back, now or after a back-off, or gives up.
   */
  #recover(failed: Child, error: unknown): void {
    let cause: { child: Child; error: unknown } | undefined = { child: failed, error };
    while (cause !== undefined) {
      for (const child of this.#tiedTo(cause.child).toReversed()) {
        if (child === cause.child) continue;
        if (child.actor.restart === "temporary") this.#remove(child);
        else child.actor.suspend();
      }
      if (this.#isStorm(cause.child)) {
        this.#park(cause.child);
        return;
      }
      if (!this.#withinIntensity()) {
        this.#escalate(cause.error);
        return;
      }
      cause = this.#restartTied(cause.child);
    }
  }

  /** The children that end and begin together with this one, in start order, itself among them. */
  #tiedTo(child: Child): Child[] {
    switch (this.#spec.strategy) {
      case "one_for_one":
        return [child];
      case "rest_for_one":
        return this.#children.slice(this.#children.indexOf(child));
      case "one_for_all":
        return [...this.#children];
    }
  }

  /** Begins what is not running, in order; returns the first whose start failed. */
  #restartTied(to: Child): { child: Child; error: unknown } | undefined {
    for (const child of this.#tiedTo(to)) {
      // A start may have stopped a later one, or failed this supervisor as a whole.
      if (child.actor.isRunning || !this.#isRunning || !this.#children.includes(child)) continue;
      try {
        this.#beginChild(child);
      } catch (error) {
        this.#host.report({ kind: "runtime.start_failed", path: child.actor.path, error });
        return { child, error };
      }
      child.restarts++;
      this.#host.report({
        kind: "runtime.restarted",
        path: child.actor.path,
        restarts: child.restarts,
      });
    }
    return undefined;
  }

  /**
   * Whether the child failed too often of late to be restarted at once; if not, counts this
   * restart.
   */
  #isStorm(child: Child): boolean {
    const nowUs = this.#host.clock.nowUs();
    if (nowUs - child.begunAtUs >= HEALTHY_US) child.backoffs = 0;
    child.restartsAtUs = child.restartsAtUs.filter((atUs) => nowUs - atUs < CHILD_WINDOW_US);
    if (child.backoffs > 0 || child.restartsAtUs.length >= CHILD_RESTARTS_MAX) return true;
    child.restartsAtUs.push(nowUs);
    return false;
  }

  #withinIntensity(): boolean {
    const nowUs = this.#host.clock.nowUs();
    const periodUs = this.#spec.periodMs * 1000;
    this.#restartsAtUs = this.#restartsAtUs.filter((atUs) => nowUs - atUs < periodUs);
    if (this.#restartsAtUs.length >= this.#spec.intensity) return false;
    this.#restartsAtUs.push(nowUs);
    return true;
  }

  #park(child: Child): void {
    let waitUs = BACKOFF_US_MIN;
    for (let n = 0; n < child.backoffs && waitUs < BACKOFF_US_MAX; n++) waitUs *= 2;
    const jitter = 1 + BACKOFF_JITTER * (2 * this.#host.random.next() - 1);
    waitUs = Math.round(Math.min(waitUs, BACKOFF_US_MAX) * jitter);
    child.backoffs++;
    child.parked = this.#host.clock.schedule(waitUs, () => {
      child.parked = undefined;
      const cause = this.#restartTied(child);
      if (cause !== undefined) this.#recover(cause.child, cause.error);
    });
    this.#host.report({ kind: "runtime.parked", path: child.actor.path, waitMs: waitUs / 1000 });
  }

  #escalate(error: unknown): void {
    this.#host.report({ kind: "runtime.escalated", path: this.path, error });
    this.suspend();
    if (this.#parent === undefined) this.#host.fail(error);
    else this.#parent.childEnded(this, { error });
  }
}

function checkId(id: string): void {
  if (id === "" || id.includes("/")) {
    throw new RangeError(`an id must be a non-empty text without "/", got ${JSON.stringify(id)}`);
  }
}

function checkSpec(spec: SupervisorSpec): void {
  checkId(spec.id);
  if (!Number.isInteger(spec.intensity) || spec.intensity < 0) {
    throw new RangeError(
      `intensity of ${spec.id} must be a whole number from 0, got ${spec.intensity}`,
    );
  }
  if (!(spec.periodMs > 0)) {
    throw new RangeError(`periodMs of ${spec.id} must be above 0, got ${spec.periodMs}`);
  }
  const ids = new Set<string>();
  for (const child of spec.children) {
    if (ids.has(child.id))
      throw new RangeError(`two children of ${spec.id} have the id ${child.id}`);
    ids.add(child.id);
  }
}
