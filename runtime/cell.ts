/**
 * What one actor consists of: its cell (mailbox, behaviour, what is tied to the present
 * incarnation), the context its behaviour sees, and the things it may have open (asks, timers,
 * watches). The rules are in system.ts; here is only the state they work on. Nothing of this leaves
 * runtime/.
 */

import {
  type Actor,
  type ActorRef,
  type AskOutcome,
  assert,
  type ChildSpec,
  type Context,
  type MailboxSpec,
  type ReplyTo,
  type RuntimeEvent,
  type Terminated,
  type TreeSpec,
} from "./actor.ts";
import type { Clock, TimerHandle } from "./clock.ts";
import type { InflightMap } from "./inflight-map.ts";
import { Mail, Mailbox } from "./mailbox.ts";
import type { Random } from "./random.ts";
import type { Runnable } from "./scheduler.ts";
import type { Supervised, Supervisor } from "./supervisor.ts";

const MAILBOX_DEFAULT: MailboxSpec<never> = { max: 1024, overflow: { kind: "reject" } };
/**
 * `run` looks at the clock once in this many messages (a power of two): reading it costs as much as
 * a turn.
 */
const CLOCK_CHECK_EVERY = 16;

/** What cells and contexts need of the system around them. */
export interface CellHost {
  readonly clock: Clock;
  readonly random: Random;
  /** Handles one message, and releases what it asked for. */
  turn(cell: Cell, mail: Mail<Tag>): void;
  beginCell(cell: Cell): void;
  suspendCell(cell: Cell): void;
  disposeCell(cell: Cell): void;
  isTurnOf(context: CellContext): boolean;
  /** Time of the present turn, µs. */
  turnUs(): number;
  /** Keeps an effect until the present turn ends. */
  buffer(effect: Mail<Tag> | Effect): void;
  /** A fresh number for an incarnation, an ask or a watch. */
  nextId(): number;
  /** Throws AssertionError when none is there. */
  supervisorAt(path: string): Supervisor;
  /** Whether anything lives at this path, or will when the present turn ends. */
  isTaken(path: string): boolean;
}

/** An address that remembers the cell it last led to. Serialises to path and uid. */
export class Ref {
  readonly path: string;
  readonly uid: number;
  #cell: Cell | undefined;

  constructor(path: string, uid: number, cell: Cell | undefined) {
    this.path = path;
    this.uid = uid;
    this.#cell = cell;
  }

  static cellOf(ref: ActorRef<never>): Cell | undefined {
    return #cell in ref ? ref.#cell : undefined;
  }

  static remember(ref: ActorRef<never>, cell: Cell): void {
    if (#cell in ref) ref.#cell = cell;
  }
}

/** Where the outcome of an ask goes. */
export type Asker =
  | { kind: "actor"; cell: Cell; self: ActorRef<never>; adapt: (outcome: never) => unknown }
  | { kind: "host"; settle: (outcome: AskOutcome<never>) => void }
  /** Asked in another process; there it has its timer, here nothing is kept of it but the mail. */
  | { kind: "remote" };

/**
 * One question: made by its asker's system, and again from the envelope in the system that answers
 * it.
 */
export class Ask {
  readonly isNotice = false;
  readonly askId: number;
  /** Path the reply is addressed to. */
  readonly asker: string;
  readonly origin: Asker;
  readonly timeoutUs: number;
  readonly deadlineUs: number;
  /** The cell that holds the question, in its mailbox or behaviour. */
  target: Cell | undefined;
  /** The path in another process it was sent to. */
  sentTo: string | undefined;
  /** The kind of what was sent there: its reply must fit. */
  question: string | undefined;
  timer: TimerHandle | undefined;

  constructor(askId: number, asker: string, origin: Asker, timeoutUs: number, nowUs: number) {
    this.askId = askId;
    this.asker = asker;
    this.origin = origin;
    this.timeoutUs = timeoutUs;
    this.deadlineUs = nowUs + timeoutUs;
    this.target = undefined;
    this.sentTo = undefined;
    this.question = undefined;
    this.timer = undefined;
  }
}

/**
 * Marks mail that the runtime owes this actor: the outcome of an ask, a timer, the end of a watch.
 */
export class Notice {
  readonly isNotice = true;
  readonly adapt: ((value: never) => unknown) | undefined;
  readonly timerKey: string | undefined;
  /** Set when what it reports was cancelled after it was queued. */
  isCancelled = false;
  watch: Watch | undefined;

  constructor(adapt: ((value: never) => unknown) | undefined, timerKey: string | undefined) {
    this.adapt = adapt;
    this.timerKey = timerKey;
    this.watch = undefined;
  }
}

export type Tag = Ask | Notice;

/** One watch. Each side may be in another process: then `watcher` or `target` is absent there. */
export class Watch {
  readonly watchId: number;
  readonly path: string;
  /** Incarnation watched; 0 for a remote target watched by name. */
  readonly uid: number;
  readonly watcher: Cell | undefined;
  readonly watcherPath: string;
  adapt: ((terminated: Terminated) => unknown) | undefined;
  target: Cell | undefined;
  /** Queued in the watcher's mailbox once the target ended. */
  notice: Notice | undefined;

  constructor(
    watchId: number,
    path: string,
    uid: number,
    watcher: Cell | undefined,
    watcherPath: string,
  ) {
    this.watchId = watchId;
    this.path = path;
    this.uid = uid;
    this.watcher = watcher;
    this.watcherPath = watcherPath;
    this.adapt = undefined;
    this.target = undefined;
    this.notice = undefined;
  }
}

export type ActorTimer = { notice: Notice; handle: TimerHandle };

export type Effect =
  | { op: "reply"; to: ReplyTo<never>; value: unknown }
  | { op: "start_timer"; key: string; afterUs: number; message: unknown }
  | { op: "cancel_timer"; key: string }
  | { op: "watch"; target: ActorRef<never>; adapt: (terminated: Terminated) => unknown }
  | { op: "unwatch"; target: ActorRef<never> }
  | { op: "spawn"; path: string; supervisor: Supervisor; spec: TreeSpec }
  | { op: "stop"; target: ActorRef<never> }
  | { op: "emit"; event: RuntimeEvent };

/** One actor: mailbox, behaviour, and what is tied to the present incarnation. */
export class Cell implements Supervised, Runnable {
  readonly id: string;
  readonly path: string;
  readonly restart: "permanent" | "transient" | "temporary";
  readonly host: CellHost;
  readonly supervisor: Supervisor;
  readonly spec: ChildSpec<unknown>;
  readonly mailbox: Mailbox<Tag>;
  /** Of the present incarnation; -1 between two. */
  uid = -1;
  actor: Actor<unknown> | undefined;
  context: CellContext | undefined;
  isRunning = false;
  /** Its `stop` runs: whatever that stops must not run it again. */
  isStopping = false;
  isDisposed = false;
  /** The scheduler knows that this cell has work. */
  isAwake = false;
  random: Random | undefined;
  /** Timers set and not yet handled, by key. */
  timers: InflightMap<string, ActorTimer> | undefined;
  /** Watches this incarnation set, until it handled their end. */
  watches: Set<Watch> | undefined;
  /** Watches set on this incarnation. */
  watchers: Set<Watch> | undefined;
  /** Open asks from, and to, this cell. */
  asksFrom = 0;
  asksTo = 0;

  constructor(host: CellHost, supervisor: Supervisor, spec: ChildSpec<unknown>) {
    this.id = spec.id;
    this.path = `${supervisor.path}/${spec.id}`;
    this.restart = spec.restart;
    this.host = host;
    this.supervisor = supervisor;
    this.spec = spec;
    this.mailbox = new Mailbox(spec.mailbox ?? MAILBOX_DEFAULT);
  }

  run(messagesMax: number, untilUs: number): number {
    const { host, mailbox } = this;
    let handled = 0;
    while (this.isRunning) {
      const mail = mailbox.take();
      if (mail === undefined) break;
      host.turn(this, mail);
      handled++;
      if (handled >= messagesMax || this.#isOverTime(handled, untilUs)) break;
    }
    this.isAwake = this.isRunning && !mailbox.isEmpty;
    return handled;
  }

  begin(): void {
    this.host.beginCell(this);
  }

  suspend(): void {
    this.host.suspendCell(this);
  }

  dispose(): void {
    this.host.disposeCell(this);
  }

  #isOverTime(handled: number, untilUs: number): boolean {
    return (handled & (CLOCK_CHECK_EVERY - 1)) === 0 && this.host.clock.nowUs() > untilUs;
  }
}

/** What a behaviour sees of the system; one per incarnation, good only during its own turns. */
export class CellContext implements Context<unknown> {
  readonly self: Ref;
  readonly #cell: Cell;
  readonly #host: CellHost;

  constructor(host: CellHost, cell: Cell) {
    this.#host = host;
    this.#cell = cell;
    this.self = new Ref(cell.path, cell.uid, cell);
  }

  get nowMs(): number {
    this.#checkTurn();
    return this.#host.turnUs() / 1000;
  }

  random(): number {
    this.#checkTurn();
    const cell = this.#cell;
    cell.random ??= this.#host.random.split(cell.path);
    return cell.random.next();
  }

  tell<T>(to: ActorRef<T>, message: T): void {
    this.#checkTurn();
    this.#host.buffer(new Mail<Tag>(to, this.#cell.path, message, undefined));
  }

  ask<T, R>(
    to: ActorRef<T>,
    timeoutMs: number,
    message: (replyTo: ReplyTo<R>) => T,
    adapt: (outcome: AskOutcome<R>) => unknown,
  ): void {
    this.#checkTurn();
    const host = this.#host;
    const cell = this.#cell;
    const origin: Asker = { kind: "actor", cell, self: this.self, adapt };
    const timeoutUs = askTimeoutUs(timeoutMs);
    const ask = new Ask(host.nextId(), cell.path, origin, timeoutUs, host.turnUs());
    const replyTo: ReplyTo<R> = { asker: cell.path, askId: ask.askId };
    host.buffer(new Mail<Tag>(to, cell.path, message(replyTo), ask));
  }

  reply<R>(to: ReplyTo<R>, value: R): void {
    this.#checkTurn();
    this.#host.buffer({ op: "reply", to, value });
  }

  startTimer(key: string, afterMs: number, message: unknown): void {
    this.#checkTurn();
    const afterUs = usOf(afterMs, "timer delay");
    this.#host.buffer({ op: "start_timer", key, afterUs, message });
  }

  cancelTimer(key: string): void {
    this.#checkTurn();
    this.#host.buffer({ op: "cancel_timer", key });
  }

  watch<T>(target: ActorRef<T>, adapt: (terminated: Terminated) => unknown): void {
    this.#checkTurn();
    this.#host.buffer({ op: "watch", target, adapt });
  }

  unwatch<T>(target: ActorRef<T>): void {
    this.#checkTurn();
    this.#host.buffer({ op: "unwatch", target });
  }

  spawn<C>(parentPath: string, spec: ChildSpec<C>): ActorRef<C> {
    this.#checkTurn();
    const supervisor = this.#host.supervisorAt(parentPath);
    const path = `${parentPath}/${spec.id}`;
    assert(!this.#host.isTaken(path), `${path} is taken`);
    this.#host.buffer({ op: "spawn", path, supervisor, spec });
    return new Ref(path, 0, undefined);
  }

  stop<T>(target: ActorRef<T>): void {
    this.#checkTurn();
    this.#host.buffer({ op: "stop", target });
  }

  emit(event: RuntimeEvent): void {
    this.#checkTurn();
    this.#host.buffer({ op: "emit", event });
  }

  /**
   * A context kept for a callback would act outside any turn, and its effects would land in
   * another's.
   */
  #checkTurn(): void {
    if (!this.#host.isTurnOf(this)) {
      assert(
        false,
        `context of ${this.self.path} used outside its turn; let the host tell instead`,
      );
    }
  }
}

/** ms to whole µs; throws for what is no length of time, which is a bug of the caller. */
export function usOf(ms: number, what: string): number {
  assert(ms >= 0 && ms < Number.MAX_SAFE_INTEGER / 1000, `${what} must be 0 ms or more, got ${ms}`);
  return Math.round(ms * 1000);
}

export function askTimeoutUs(timeoutMs: number): number {
  assert(timeoutMs > 0, `ask timeout must be above 0 ms, got ${timeoutMs}`);
  return Math.max(1, usOf(timeoutMs, "ask timeout"));
}
