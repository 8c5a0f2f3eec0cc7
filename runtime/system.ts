/**
 * The actor system: cells with bounded mailboxes, one-message turns, asks, watches, timers, dead
 * letters.
 *
 * A turn takes one message, calls `receive`, and then releases the effects the behaviour asked for;
 * if it throws, none of them happens, and its supervisor decides (supervisor.ts). Who runs which
 * cell when is the scheduler's affair (scheduler.ts). Everything is synchronous and
 * single-threaded; starting and stopping run the hooks of the behaviour at once, in order.
 *
 * Promises: a message is delivered at most once, in order per sender and receiver, or becomes a
 * dead letter; an ask has exactly one outcome; a watch exactly one end. An incarnation ends at a
 * crash, a restart or a stop, and with it its timers, asks, watches, and the mail sent to it by
 * `uid`; mail sent by name waits for the next one.
 *
 * Other processes are reached through one hook (`Remote`): envelopes out, `deliver` in.
 */

import {
  type Actor,
  type ActorRef,
  type AskFailure,
  type AskOutcome,
  assert,
  type ChildSpec,
  type ReplyTo,
  type RuntimeEvent,
  type SupervisorSpec,
  type Terminated,
  type TreeSpec,
  unreachable,
} from "./actor.ts";
import {
  Ask,
  type Asker,
  askTimeoutUs,
  Cell,
  CellContext,
  type CellHost,
  type Effect,
  Notice,
  Ref,
  type Tag,
  Watch,
} from "./cell.ts";
import type { Clock } from "./clock.ts";
import { type DeadLetter, type DeadLetterReason, DeadLetters, kindOf } from "./dead-letters.ts";
import { InflightMap } from "./inflight-map.ts";
import { Mail } from "./mailbox.ts";
import type { Random } from "./random.ts";
import type { Scheduler } from "./scheduler.ts";
import {
  type Supervised,
  Supervisor,
  type SupervisorEvent,
  type SupervisorHost,
} from "./supervisor.ts";

/** What happened inside the runtime; given to `onEvent` beside the events that actors emit. */
export type SystemEvent =
  | SupervisorEvent
  /** A behaviour threw while handling a message; `error` is what it threw. */
  | { kind: "runtime.crashed"; path: string; uid: number; messageKind: string; error: unknown }
  /** A behaviour threw in its `stop`; it is stopped all the same. */
  | { kind: "runtime.stop_failed"; path: string; error: unknown }
  | { kind: "runtime.dead_letter"; letter: DeadLetter };

export type SystemHooks = {
  /**
   * Told of everything that happens: of the runtime itself, and what actors emit. `from` is the
   * path it is about. Must log `runtime.crashed` and `runtime.start_failed`: nothing else shows
   * them.
   */
  onEvent(event: SystemEvent | RuntimeEvent, from: string): void;
  /**
   * The root supervisor gave up (everything is stopped by then), or a hook threw: end the process.
   */
  onFatal(error: unknown): void;
};

/** A message on its way between processes: plain data, except what `message` holds. */
export type Envelope =
  | {
      kind: "message";
      to: string;
      uid: number;
      /** Path of the sender; of an ask, where the reply goes. */
      from: string;
      /** 0 for a tell. */
      askId: number;
      /**
       * Time left to the ask's deadline in µs: a duration, since clocks of processes differ. 0 for
       * a tell.
       */
      timeoutUs: number;
      message: unknown;
    }
  | { kind: "reply"; to: string; askId: number; outcome: AskOutcome<unknown> }
  | { kind: "watch"; to: string; uid: number; from: string; watchId: number }
  | { kind: "unwatch"; to: string; from: string; watchId: number }
  | { kind: "terminated"; to: string; watchId: number; terminated: Terminated };

/** The way to other processes. */
export type Remote = {
  /**
   * Whether this path belongs to another process. Asked only about paths that nothing here lives
   * at.
   */
  route(path: string): boolean;
  /** Takes the envelope, or says why not; then it is a dead letter and its ask fails at once. */
  send(envelope: Envelope): "full" | "disconnected" | "oversized" | undefined;
};

export type SystemOptions = {
  scheduler: Scheduler;
  clock: Clock;
  /** Each actor draws from the split named by its path. */
  random: Random;
  remote?: Remote;
  /**
   * Source of the numbers of incarnations, asks and watches; default 1, 2, 3 … Systems that take
   * actors over from one another share one, so that a later incarnation has the higher number.
   */
  nextId?: () => number;
};

export type SystemStats = {
  cells: readonly {
    path: string;
    /** Counted messages waiting, and the most there may be. */
    mailboxDepth: number;
    mailboxMax: number;
    isRunning: boolean;
    restarts: number;
    /** Timers and watches it has set and not yet heard of. */
    timers: number;
    watches: number;
  }[];
  /** Asks without an outcome yet. */
  asks: number;
  /** Restarts so far, of all children. */
  restarts: number;
  /** Children waiting out a back-off. */
  parked: number;
  /** Replies that came after their ask's outcome, or for an asker that is gone. */
  lateReplies: number;
  deadLetters: readonly { reason: DeadLetterReason; messageKind: string; count: number }[];
};

function askFailureOf(reason: DeadLetterReason): AskFailure | undefined {
  switch (reason) {
    case "stopped":
    case "crashed":
    case "noroute":
    case "disconnected":
      return reason;
    case "full":
      return "busy";
    case "oversized":
    case "undecodable":
      return "noroute";
    case "expired":
      return undefined; // Its timer is due too, and says "timeout".
    default:
      return unreachable(reason);
  }
}

/** The machinery behind `ActorSystem`; its own module alone calls it. */
class Kernel implements CellHost {
  readonly clock: Clock;
  readonly random: Random;
  readonly #scheduler: Scheduler;
  readonly #remote: Remote | undefined;
  #hooks: SystemHooks | undefined;
  #root: Supervisor | undefined;
  /** Everything that has a path. */
  readonly #nodes = new Map<string, Cell | Supervisor>();
  /** Open asks made here, by id; each has a timer, so the table is bounded by rate × timeout. */
  readonly #asks = new InflightMap<number, Ask>();
  /** Watches set here on other processes, by id, until their end came. */
  readonly #watchesOut = new Map<number, Watch>();
  readonly #deadLetters = new DeadLetters();
  readonly #givenId: (() => number) | undefined;
  #lastId = 0;
  #lateReplies = 0;
  #restarts = 0;

  /** Effects of the turn that runs; entries up to `#outboxLength`, the array itself is reused. */
  #outbox: (Mail<Tag> | Effect | undefined)[] = [];
  #outboxLength = 0;
  #turnOf: CellContext | undefined;
  /** Time of the turn; -1 until somebody asks, since reading the clock costs as much as a turn. */
  #turnUs = -1;

  readonly #supervisorHost: SupervisorHost;

  constructor(options: SystemOptions) {
    this.clock = options.clock;
    this.random = options.random;
    this.#scheduler = options.scheduler;
    this.#remote = options.remote;
    this.#givenId = options.nextId;
    this.#supervisorHost = {
      clock: this.clock,
      random: this.random.split("supervision"),
      create: (spec, supervisor) => this.#create(spec, supervisor),
      forget: ({ path }) => this.#nodes.delete(path),
      report: (event) => {
        if (event.kind === "runtime.restarted") this.#restarts++;
        this.event(event, event.path);
      },
      fail: (error) => {
        this.stopAll();
        this.#hooks?.onFatal(error);
      },
    };
  }

  // Turns

  turn(cell: Cell, mail: Mail<Tag>): void {
    const { to, tag } = mail;
    const { actor, context } = cell;
    if (actor === undefined || context === undefined) return;
    if (to.uid !== 0 && to.uid !== cell.uid) {
      // Sent to an incarnation that ended while this waited. A notice ends with whom it was for.
      if (tag === undefined || !tag.isNotice) this.#lose(mail, "stopped");
      return;
    }
    this.#turnUs = -1;
    if (tag !== undefined && !this.#isDue(cell, mail, tag)) return;
    this.#turnOf = context;
    try {
      const adapt = tag?.isNotice === true ? tag.adapt : undefined;
      if (adapt !== undefined) mail.message = adapt(mail.message as never);
      const { message } = mail;
      if (this.#scheduler.handling !== undefined) this.#scheduler.handling(cell, kindOf(message));
      actor.receive(message, context);
    } catch (error) {
      this.#discardOutbox();
      this.#turnOf = undefined;
      this.#crash(cell, mail, error);
      return;
    }
    this.#turnOf = undefined;
    if (this.#outboxLength > 0) this.#release(cell);
  }

  /**
   * False for mail that is void by now: an ask past its deadline, a timer or watch cancelled
   * meanwhile.
   */
  #isDue(cell: Cell, mail: Mail<Tag>, tag: Tag): boolean {
    if (!tag.isNotice) {
      if (this.turnUs() < tag.deadlineUs) return true;
      this.#lose(mail, "expired");
      return false;
    }
    if (tag.isCancelled) return false;
    if (tag.timerKey !== undefined) cell.timers?.delete(tag.timerKey);
    if (tag.watch !== undefined) cell.watches?.delete(tag.watch);
    return true;
  }

  isTurnOf(context: CellContext): boolean {
    return this.#turnOf === context;
  }

  turnUs(): number {
    if (this.#turnUs < 0) this.#turnUs = this.clock.nowUs();
    return this.#turnUs;
  }

  buffer(effect: Mail<Tag> | Effect): void {
    this.#outbox[this.#outboxLength++] = effect;
  }

  #discardOutbox(): void {
    this.#outbox.fill(undefined, 0, this.#outboxLength);
    this.#outboxLength = 0;
  }

  #release(cell: Cell): void {
    const outbox = this.#outbox;
    const length = this.#outboxLength;
    this.#outboxLength = 0;
    let stopsItself = false;
    for (let index = 0; index < length; index++) {
      const effect = outbox[index];
      outbox[index] = undefined;
      if (effect instanceof Mail) {
        if (effect.tag === undefined || this.#openAsk(effect.tag)) this.#post(effect);
        else this.#lose(effect, "stopped");
      } else if (effect !== undefined) {
        if (effect.op === "stop" && this.#isSelf(effect.target, cell)) stopsItself = true;
        else this.#apply(effect, cell);
      }
    }
    // Last, so that what the same turn told others still counts as sent by a living actor.
    if (stopsItself && cell.isRunning && !cell.isStopping) {
      this.suspendCell(cell);
      cell.supervisor.childEnded(cell, undefined);
    }
  }

  #apply(effect: Effect, cell: Cell): void {
    switch (effect.op) {
      case "reply":
        this.reply(effect.to, effect.value);
        return;
      case "start_timer":
        this.#startTimer(cell, effect.key, effect.afterUs, effect.message);
        return;
      case "cancel_timer":
        this.#cancelTimer(cell, effect.key);
        return;
      case "watch":
        this.#watch(cell, effect.target, effect.adapt);
        return;
      case "unwatch":
        this.#unwatch(cell, effect.target);
        return;
      case "spawn":
        this.#spawnLate(effect.supervisor, effect.path, effect.spec);
        return;
      case "stop":
        this.stop(effect.target);
        return;
      case "emit":
        this.event(effect.event, cell.path);
        return;
      default:
        unreachable(effect);
    }
  }

  #isSelf(target: ActorRef<never>, cell: Cell): boolean {
    return target.path === cell.path && (target.uid === 0 || target.uid === cell.uid);
  }

  /**
   * Runs a hook of the behaviour as a turn of its own, also in the middle of releasing another's.
   */
  #hook(cell: Cell, hook: (actor: Actor<unknown>, context: CellContext) => void): void {
    const { actor, context } = cell;
    if (actor === undefined || context === undefined) return;
    const outer = { outbox: this.#outbox, turnOf: this.#turnOf, turnUs: this.#turnUs };
    const outerLength = this.#outboxLength;
    this.#outbox = [];
    this.#outboxLength = 0;
    this.#turnOf = context;
    this.#turnUs = -1;
    try {
      hook(actor, context);
      this.#turnOf = undefined;
      this.#release(cell);
    } finally {
      this.#outbox = outer.outbox;
      this.#outboxLength = outerLength;
      this.#turnOf = outer.turnOf;
      this.#turnUs = outer.turnUs;
    }
  }

  #crash(cell: Cell, mail: Mail<Tag>, error: unknown): void {
    const messageKind = kindOf(mail.message);
    const { path, uid } = cell;
    this.event({ kind: "runtime.crashed", path, uid, messageKind, error }, path);
    this.#lose(mail, "crashed");
    this.#endIncarnation(cell, "failed", "crashed");
    cell.supervisor.childEnded(cell, { error });
  }

  // Mail

  /** Finds the live cell a ref leads to, whatever incarnation; undefined for all else. */
  #find(ref: ActorRef<never>): Cell | undefined {
    const known = Ref.cellOf(ref);
    // The ref may stem from another system of this process, and the cell from before a respawn.
    if (known !== undefined && known.host === this && !known.isDisposed) return known;
    const node = this.#nodes.get(ref.path);
    if (!(node instanceof Cell)) return undefined;
    Ref.remember(ref, node);
    return node;
  }

  post(to: ActorRef<never>, message: unknown): boolean {
    return this.#post(new Mail<Tag>(to, "", message, undefined));
  }

  /** True when the message itself was queued or sent. */
  #post(mail: Mail<Tag>): boolean {
    const cell = this.#find(mail.to);
    if (cell === undefined) return this.#postElsewhere(mail);
    const uid = mail.to.uid;
    if (uid !== 0 && uid !== cell.uid) {
      this.#lose(mail, "stopped");
      return false;
    }
    const { tag } = mail;
    if (tag !== undefined && !tag.isNotice && tag.origin.kind !== "remote") {
      tag.target = cell;
      cell.asksTo++;
    }
    const lost = cell.mailbox.offer(mail);
    if (!cell.isAwake) this.#wake(cell);
    if (lost === undefined) return true;
    this.#lose(lost, "full");
    return lost !== mail;
  }

  #postElsewhere(mail: Mail<Tag>): boolean {
    const { to, from, message, tag } = mail;
    if (this.#remote === undefined || !this.#remote.route(to.path)) {
      this.#lose(mail, Ref.cellOf(to) !== undefined || to.uid !== 0 ? "stopped" : "noroute");
      return false;
    }
    const ask = tag?.isNotice === false ? tag : undefined;
    const refused = this.#remote.send({
      kind: "message",
      to: to.path,
      uid: to.uid,
      from: ask?.asker ?? from, // The host has no path but as one who asks.
      askId: ask?.askId ?? 0,
      timeoutUs: ask === undefined ? 0 : Math.max(1, ask.deadlineUs - this.clock.nowUs()),
      message,
    });
    if (refused !== undefined) this.#lose(mail, refused);
    else if (ask !== undefined) {
      ask.sentTo = to.path;
      ask.question = kindOf(message);
    }
    return refused === undefined;
  }

  #wake(cell: Cell): void {
    if (cell.isAwake || !cell.isRunning) return;
    cell.isAwake = true;
    this.#scheduler.wake(cell);
  }

  #lose(mail: Mail<Tag>, reason: DeadLetterReason): void {
    this.deadLetter(mail.to, mail.from, mail.message, reason);
    const { tag } = mail;
    if (tag === undefined || tag.isNotice) return;
    const failure = askFailureOf(reason);
    if (failure !== undefined) this.#answer(tag, { ok: false, failure });
  }

  deadLetter(to: ActorRef<never>, from: string, message: unknown, reason: DeadLetterReason): void {
    const letter: DeadLetter = {
      to: to.path,
      uid: to.uid,
      from,
      reason,
      messageKind: kindOf(message),
      atUs: this.clock.nowUs(),
    };
    this.#deadLetters.add(letter);
    this.event({ kind: "runtime.dead_letter", letter }, to.path);
  }

  /** Queues a message the runtime owes to this incarnation of the cell. */
  #notify(
    to: ActorRef<never>,
    cell: Cell,
    value: unknown,
    notice: Notice,
    isUrgent: boolean,
  ): void {
    const mail = new Mail<Tag>(to, cell.path, value, notice);
    if (isUrgent) cell.mailbox.pushUrgent(mail);
    else cell.mailbox.push(mail);
    this.#wake(cell);
  }

  // Asks

  nextId(): number {
    return this.#givenId === undefined ? ++this.#lastId : this.#givenId();
  }

  /**
   * Enters an ask into the table; false when its asker ended before its turn's effects were
   * released.
   */
  #openAsk(tag: Tag): boolean {
    if (tag.isNotice) return false;
    const { origin } = tag;
    if (origin.kind === "actor") {
      if (origin.cell.uid !== origin.self.uid) return false;
      origin.cell.asksFrom++;
    }
    this.#asks.set(tag.askId, tag);
    tag.timer = this.clock.schedule(tag.timeoutUs, () =>
      this.#answer(tag, { ok: false, failure: "timeout" }),
    );
    return true;
  }

  /** Takes the ask out of the table; false when it has its outcome already. */
  #close(ask: Ask): boolean {
    if (!this.#asks.delete(ask.askId)) return false;
    if (ask.timer !== undefined) this.clock.cancel(ask.timer);
    if (ask.origin.kind === "actor") ask.origin.cell.asksFrom--;
    if (ask.target !== undefined) ask.target.asksTo--;
    return true;
  }

  reply(to: ReplyTo<never>, value: unknown): void {
    const ask = this.#asks.get(to.askId);
    if (ask !== undefined && ask.asker === to.asker) {
      this.#answer(ask, { ok: true, value });
      return;
    }
    if (this.#isElsewhere(to.asker)) this.#sendReply(to.asker, to.askId, { ok: true, value });
    else this.#lateReplies++;
  }

  /** Gives the ask its outcome, wherever its asker lives; a second one changes nothing. */
  #answer(ask: Ask, outcome: AskOutcome<unknown>): void {
    const { origin } = ask;
    if (origin.kind === "remote") {
      this.#sendReply(ask.asker, ask.askId, outcome);
      return;
    }
    if (!this.#close(ask)) {
      if (outcome.ok) this.#lateReplies++;
      return;
    }
    if (origin.kind === "host") {
      origin.settle(outcome as AskOutcome<never>);
      return;
    }
    // A time-out is nobody's message and may overtake; all else keeps its place behind what the
    // other side sent.
    const isUrgent = !outcome.ok && outcome.failure === "timeout";
    const notice = new Notice(origin.adapt, undefined);
    this.#notify(origin.self, origin.cell, outcome, notice, isUrgent);
  }

  #sendReply(to: string, askId: number, outcome: AskOutcome<unknown>): void {
    const refused = this.#remote?.send({ kind: "reply", to, askId, outcome });
    if (refused !== undefined) this.deadLetter(new Ref(to, 0, undefined), "", outcome, refused);
  }

  /** Ends the asks this incarnation made, and those it took in and will never answer. */
  #endAsks(cell: Cell, failure: AskFailure): void {
    if (cell.asksFrom === 0 && cell.asksTo === 0) return;
    const waiting = new Set<Tag | undefined>();
    for (const mail of cell.mailbox) waiting.add(mail.tag);
    for (const ask of this.#asks.values()) {
      if (ask.origin.kind === "actor" && ask.origin.cell === cell) this.#close(ask);
      else if (ask.target === cell && !waiting.has(ask)) this.#answer(ask, { ok: false, failure });
    }
  }

  hostAsk<T, R>(
    to: ActorRef<T>,
    timeoutMs: number,
    message: (replyTo: ReplyTo<R>) => T,
    settle: (outcome: AskOutcome<R>) => void,
  ): void {
    assert(this.#root !== undefined, "the system is not started");
    const asker = `${this.#root.path}/$host`;
    const origin: Asker = { kind: "host", settle };
    const ask = new Ask(this.nextId(), asker, origin, askTimeoutUs(timeoutMs), this.clock.nowUs());
    const mail = new Mail<Tag>(to, asker, message({ asker, askId: ask.askId }), ask);
    this.#openAsk(ask);
    this.#post(mail);
  }

  // Timers

  #startTimer(cell: Cell, key: string, afterUs: number, message: unknown): void {
    this.#cancelTimer(cell, key);
    if (!cell.isRunning) return; // The turn's effects ended it.
    const to = cell.context?.self;
    if (to === undefined) return;
    const notice = new Notice(undefined, key);
    const handle = this.clock.schedule(afterUs, () =>
      this.#notify(to, cell, message, notice, true),
    );
    cell.timers ??= new InflightMap();
    cell.timers.set(key, { notice, handle });
  }

  #cancelTimer(cell: Cell, key: string): void {
    const timer = cell.timers?.get(key);
    if (timer === undefined) return;
    timer.notice.isCancelled = true; // It may be due already, and wait in the mailbox.
    this.clock.cancel(timer.handle);
    cell.timers?.delete(key);
  }

  // Watches

  #watch(cell: Cell, target: ActorRef<never>, adapt: (terminated: Terminated) => unknown): void {
    if (!cell.isRunning) return;
    const found = this.#find(target);
    const uid = target.uid === 0 && found?.isRunning === true ? found.uid : target.uid;
    cell.watches ??= new Set();
    for (const watch of cell.watches) {
      if (watch.path === target.path && watch.uid === uid && watch.notice === undefined) {
        watch.adapt = adapt;
        return;
      }
    }
    const watch = new Watch(this.nextId(), target.path, uid, cell, cell.path);
    watch.adapt = adapt;
    cell.watches.add(watch);
    if (found?.isRunning === true && found.uid === uid) {
      this.#addWatcher(found, watch);
      return;
    }
    const { path } = target;
    if (found !== undefined || !this.#isElsewhere(path)) {
      this.#endWatch(watch, { path, uid, reason: "noproc" });
      return;
    }
    this.#watchesOut.set(watch.watchId, watch);
    const { watchId } = watch;
    const refused = this.#remote?.send({ kind: "watch", to: path, uid, from: cell.path, watchId });
    if (refused !== undefined) this.#endWatch(watch, { path, uid, reason: "noconnection" });
  }

  #addWatcher(target: Cell, watch: Watch): void {
    watch.target = target;
    target.watchers ??= new Set();
    target.watchers.add(watch);
  }

  #unwatch(cell: Cell, target: ActorRef<never>): void {
    for (const watch of cell.watches ?? []) {
      const isMeant = target.uid === 0 || target.uid === watch.uid;
      if (watch.path === target.path && isMeant) this.#dropWatch(watch);
    }
  }

  /** Ends a watch without telling the watcher. */
  #dropWatch(watch: Watch): void {
    watch.watcher?.watches?.delete(watch);
    watch.target?.watchers?.delete(watch);
    if (watch.notice !== undefined) watch.notice.isCancelled = true;
    if (!this.#watchesOut.delete(watch.watchId)) return;
    const { path: to, watcherPath: from, watchId } = watch;
    this.#remote?.send({ kind: "unwatch", to, from, watchId });
  }

  #endWatch(watch: Watch, terminated: Terminated): void {
    watch.target?.watchers?.delete(watch);
    this.#watchesOut.delete(watch.watchId);
    const { watcher, adapt, watchId } = watch;
    if (watcher === undefined) {
      this.#remote?.send({ kind: "terminated", to: watch.watcherPath, watchId, terminated });
      return;
    }
    const self = watcher.context?.self;
    if (adapt === undefined || self === undefined) return;
    watch.notice = new Notice(adapt, undefined);
    watch.notice.watch = watch;
    this.#notify(self, watcher, terminated, watch.notice, false);
  }

  // Cells and supervisors

  beginCell(cell: Cell): void {
    assert(!cell.isRunning && !cell.isDisposed, `${cell.path} begins once at a time`);
    const actor = cell.spec.start();
    cell.uid = this.nextId();
    cell.actor = actor;
    cell.context = new CellContext(this, cell);
    cell.isRunning = true;
    try {
      if (actor.start !== undefined)
        this.#hook(cell, (started, context) => started.start?.(context));
    } catch (error) {
      this.#endIncarnation(cell, "failed", "crashed");
      throw error;
    }
    if (!cell.mailbox.isEmpty) this.#wake(cell);
  }

  suspendCell(cell: Cell): void {
    if (!cell.isRunning || cell.isStopping) return;
    if (cell.actor?.stop !== undefined) {
      cell.isStopping = true;
      try {
        this.#hook(cell, (actor, context) => actor.stop?.(context));
      } catch (error) {
        this.event({ kind: "runtime.stop_failed", path: cell.path, error }, cell.path);
      }
    }
    this.#endIncarnation(cell, "stopped", "stopped");
  }

  disposeCell(cell: Cell): void {
    if (cell.isDisposed) return;
    this.suspendCell(cell);
    cell.isDisposed = true;
    this.#nodes.delete(cell.path);
    for (let mail = cell.mailbox.take(); mail !== undefined; mail = cell.mailbox.take()) {
      if (mail.tag === undefined || !mail.tag.isNotice) this.#lose(mail, "stopped");
    }
    this.#scheduler.closed?.(cell);
  }

  #endIncarnation(cell: Cell, reason: "stopped" | "failed", failure: AskFailure): void {
    if (!cell.isRunning) return;
    const { path, uid } = cell;
    cell.isRunning = false;
    cell.isStopping = false;
    for (const key of cell.timers?.keys() ?? []) this.#cancelTimer(cell, key);
    for (const watch of cell.watches ?? []) this.#dropWatch(watch);
    cell.uid = -1;
    cell.actor = undefined;
    cell.context = undefined;
    this.#endAsks(cell, failure);
    for (const watch of cell.watchers ?? []) this.#endWatch(watch, { path, uid, reason });
  }

  /** Whether anything lives at this path, or will when the present turn ends. */
  isTaken(path: string): boolean {
    if (this.#nodes.has(path)) return true;
    for (let index = 0; index < this.#outboxLength; index++) {
      const effect = this.#outbox[index];
      if (effect instanceof Mail || effect === undefined) continue;
      if (effect.op === "spawn" && effect.path === path) return true;
    }
    return false;
  }

  supervisorAt(path: string): Supervisor {
    const node = this.#nodes.get(path);
    assert(node instanceof Supervisor, `no supervisor at ${path}`);
    return node;
  }

  /** Spawns after a turn: nobody is left to throw to, so a failed start is an event. */
  #spawnLate(supervisor: Supervisor, path: string, spec: TreeSpec): void {
    try {
      supervisor.spawn(spec);
    } catch (error) {
      this.event({ kind: "runtime.start_failed", path, error }, path);
    }
  }

  stop(target: ActorRef<never>): void {
    const node = this.#nodes.get(target.path);
    if (node instanceof Supervisor) {
      if (node === this.#root) this.stopAll();
      else this.supervisorAt(node.path.slice(0, node.path.lastIndexOf("/"))).stopChild(node);
    } else if (node !== undefined && (target.uid === 0 || target.uid === node.uid)) {
      node.supervisor.stopChild(node);
    }
  }

  start(tree: SupervisorSpec, hooks: SystemHooks): void {
    assert(this.#root === undefined, "a system starts once");
    this.#hooks = hooks;
    try {
      this.#root = this.#makeSupervisor(tree, undefined);
      this.#root.begin();
    } catch (error) {
      this.stopAll();
      throw error;
    }
  }

  stopAll(): void {
    this.#root?.dispose();
    for (const ask of this.#asks.values()) {
      this.#answer(ask, { ok: false, failure: "stopped" });
    }
    this.#scheduler.shutdown?.();
  }

  #makeSupervisor(spec: SupervisorSpec, parent: Supervisor | undefined): Supervisor {
    const supervisor = new Supervisor(spec, parent, this.#supervisorHost);
    this.#nodes.set(supervisor.path, supervisor);
    supervisor.prepare();
    return supervisor;
  }

  #create(spec: TreeSpec, supervisor: Supervisor): Supervised {
    const path = `${supervisor.path}/${spec.id}`;
    if (this.#nodes.has(path)) throw new RangeError(`${path} is taken`);
    if ("children" in spec) return this.#makeSupervisor(spec, supervisor);
    const cell = new Cell(this, supervisor, spec);
    this.#nodes.set(path, cell);
    this.#scheduler.opened?.(cell);
    return cell;
  }

  // Other processes

  #isElsewhere(path: string): boolean {
    return this.#remote?.route(path) === true;
  }

  deliver(envelope: Envelope): void {
    switch (envelope.kind) {
      case "message": {
        const { to, uid, from, askId, timeoutUs, message } = envelope;
        const ask =
          askId === 0
            ? undefined
            : new Ask(askId, from, { kind: "remote" }, timeoutUs, this.clock.nowUs());
        const mail = new Mail<Tag>(new Ref(to, uid, undefined), from, message, ask);
        // Never passed on: two processes with different views would send it round in circles.
        if (this.#nodes.get(to) instanceof Cell) this.#post(mail);
        else this.#lose(mail, uid === 0 ? "noroute" : "stopped");
        return;
      }
      case "reply": {
        const ask = this.#asks.get(envelope.askId);
        if (ask !== undefined && ask.asker === envelope.to) this.#answer(ask, envelope.outcome);
        else this.#lateReplies++;
        return;
      }
      case "watch": {
        const { to, from, watchId } = envelope;
        const node = this.#nodes.get(to);
        const cell = node instanceof Cell && node.isRunning ? node : undefined;
        const uid = envelope.uid === 0 ? (cell?.uid ?? 0) : envelope.uid;
        const watch = new Watch(watchId, to, uid, undefined, from);
        if (cell !== undefined && cell.uid === uid) this.#addWatcher(cell, watch);
        else this.#endWatch(watch, { path: to, uid, reason: "noproc" });
        return;
      }
      case "unwatch": {
        const node = this.#nodes.get(envelope.to);
        if (!(node instanceof Cell)) return;
        for (const watch of node.watchers ?? []) {
          const isSame = watch.watcher === undefined && watch.watchId === envelope.watchId;
          if (isSame && watch.watcherPath === envelope.from) node.watchers?.delete(watch);
        }
        return;
      }
      case "terminated": {
        const watch = this.#watchesOut.get(envelope.watchId);
        if (watch?.watcherPath === envelope.to) this.#endWatch(watch, envelope.terminated);
        return;
      }
      default:
        unreachable(envelope);
    }
  }

  interrupted(isGone: (path: string) => boolean): void {
    for (const ask of this.#asks.values()) {
      if (ask.sentTo === undefined || !isGone(ask.sentTo)) continue;
      this.#answer(ask, { ok: false, failure: "disconnected" });
    }
  }

  questionOf(askId: number): string | undefined {
    return this.#asks.get(askId)?.question;
  }

  disconnected(isGone: (path: string) => boolean): void {
    this.interrupted(isGone);
    for (const watch of [...this.#watchesOut.values()]) {
      const { path, uid } = watch;
      if (isGone(path)) this.#endWatch(watch, { path, uid, reason: "noconnection" });
    }
    for (const node of this.#nodes.values()) {
      if (!(node instanceof Cell)) continue;
      for (const watch of node.watchers ?? []) {
        if (watch.watcher === undefined && isGone(watch.watcherPath)) node.watchers?.delete(watch);
      }
    }
  }

  // Reports

  event(event: SystemEvent | RuntimeEvent, from: string): void {
    try {
      this.#hooks?.onEvent(event, from);
    } catch (error) {
      this.#hooks?.onFatal(error);
    }
  }

  stats(): SystemStats {
    const cells: SystemStats["cells"][number][] = [];
    for (const node of this.#nodes.values()) {
      if (!(node instanceof Cell)) continue;
      cells.push({
        path: node.path,
        mailboxDepth: node.mailbox.depth,
        mailboxMax: node.mailbox.max,
        isRunning: node.isRunning,
        restarts: node.supervisor.restartsOf(node),
        timers: node.timers?.size ?? 0,
        watches: node.watches?.size ?? 0,
      });
    }
    return {
      cells,
      asks: this.#asks.size,
      restarts: this.#restarts,
      parked: this.#root?.parkedCount ?? 0,
      lateReplies: this.#lateReplies,
      deadLetters: this.#deadLetters.counts(),
    };
  }

  recentDeadLetters(): DeadLetter[] {
    return this.#deadLetters.recent();
  }
}

/** A system of actors, as its host sees it. Not for use by behaviours: those have their context. */
export class ActorSystem {
  readonly #kernel: Kernel;

  constructor(options: SystemOptions) {
    this.#kernel = new Kernel(options);
  }

  /**
   * Starts the tree, children in order; once. If any start throws, everything is stopped again and
   * the error is thrown. Paths are ids joined by "/", from the id of the root on.
   */
  start(tree: SupervisorSpec, hooks: SystemHooks): void {
    this.#kernel.start(tree, hooks);
  }

  /** Stops everything in order, last started first. Open asks of the host end as "stopped". */
  stopAll(): void {
    this.#kernel.stopAll();
  }

  /** The name of whatever lives at `path`, now or later, here or in another process. */
  ref<M>(path: string): ActorRef<M> {
    return new Ref(path, 0, undefined);
  }

  /** Sends from outside. False when the message itself became a dead letter at once. */
  tell<M>(to: ActorRef<M>, message: M): boolean {
    return this.#kernel.post(to, message);
  }

  /** Answers an ask from outside a turn: for actors whose inside is I/O. */
  reply<R>(to: ReplyTo<R>, value: R): void {
    this.#kernel.reply(to, value);
  }

  /** Asks from outside; always resolves, within `timeoutMs` (> 0). */
  ask<M, R>(
    to: ActorRef<M>,
    timeoutMs: number,
    message: (replyTo: ReplyTo<R>) => M,
  ): Promise<AskOutcome<R>> {
    return new Promise((resolve) => this.#kernel.hostAsk(to, timeoutMs, message, resolve));
  }

  /**
   * Starts one more child under the supervisor at `parentPath`. Throws when there is none, when the
   * id is taken, and what the start throws.
   */
  spawn<M>(parentPath: string, spec: ChildSpec<M>): ActorRef<M> {
    this.#kernel.supervisorAt(parentPath).spawn(spec);
    return new Ref(`${parentPath}/${spec.id}`, 0, undefined);
  }

  /** Stops an actor, or a supervisor with all below it, in order. No effect when there is none. */
  stop<M>(target: ActorRef<M>): void {
    this.#kernel.stop(target);
  }

  /** Takes in what another process sent. The envelope must have been validated. */
  deliver(envelope: Envelope): void {
    this.#kernel.deliver(envelope);
  }

  /**
   * The link to these paths is down: asks sent there fail at once, watches end as "noconnection".
   */
  disconnected(isGone: (path: string) => boolean): void {
    this.#kernel.disconnected(isGone);
  }

  /**
   * The link to these paths is down for now: asks sent there fail at once. Watches stay: what the other side says of
   * them comes later, or `disconnected` is called.
   */
  interrupted(isGone: (path: string) => boolean): void {
    this.#kernel.interrupted(isGone);
  }

  /** The kind of the message that this ask sent to another process, while it has no outcome. */
  questionOf(askId: number): string | undefined {
    return this.#kernel.questionOf(askId);
  }

  /** Counts a message that was lost outside, in the link to another process. */
  deadLetter(
    to: string,
    message: unknown,
    reason: "oversized" | "undecodable" | "full" | "disconnected",
  ): void {
    this.#kernel.deadLetter(new Ref(to, 0, undefined), "", message, reason);
  }

  stats(): SystemStats {
    return this.#kernel.stats();
  }

  /** The last 1000 at most, oldest first. */
  recentDeadLetters(): DeadLetter[] {
    return this.#kernel.recentDeadLetters();
  }
}

export function createSystem(options: SystemOptions): ActorSystem {
  return new ActorSystem(options);
}
