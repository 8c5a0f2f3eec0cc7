/**
 * What an actor file needs from the runtime: types, and two assertions.
 *
 * A behaviour is a synchronous class. It never awaits, reads no clock and draws no random number
 * but through `context`. Effects (tell, ask, reply, timers, watch, stop) are buffered during a turn
 * and released when `receive` returns; a turn that throws releases nothing.
 */

/** Something that receives messages of type `M`, one at a time, each to completion. */
export interface Actor<M> {
  /** Called once per incarnation, before any message; effects are released like those of a turn. */
  start?(context: Context<M>): void;
  receive(message: M, context: Context<M>): void;
  /** Called once when the actor stops in an orderly way; not after a crash. */
  stop?(context: Context<M>): void;
}

/**
 * The address of an actor: plain data, may travel in messages. A ref with `uid` 0 is a name,
 * resolved at delivery to whatever incarnation lives there; any other `uid` reaches only that
 * incarnation, which ends with a restart too. Keep names (from `spawn` and the host) for talking to
 * an actor; hand out `context.self` where an answer to a later incarnation would make no sense.
 */
export interface ActorRef<in M> {
  readonly path: string;
  readonly uid: number;
  /** Never present at run time: keeps `ActorRef<A>` from being assigned to `ActorRef<B>`. */
  readonly accepts?: (message: M) => void;
}

/**
 * Where the answer of one ask goes. Plain data; usable once, a second or late reply is counted and
 * dropped.
 */
export interface ReplyTo<in R> {
  readonly asker: string;
  readonly askId: number;
  readonly accepts?: (reply: R) => void;
}

/** Why an ask has no reply: all are final for that ask. */
export type AskFailure =
  | "timeout" // no reply by the deadline
  | "crashed" // the actor threw while handling the message
  | "stopped" // the actor stopped, or had stopped
  | "busy" // its mailbox was full
  | "noroute" // no such actor
  | "disconnected"; // the link to its process went down

export type AskOutcome<R> = { ok: true; value: R } | { ok: false; failure: AskFailure };

/**
 * What a watcher is told, exactly once per watch. "failed" is a crash, also when a restart follows:
 * what was watched is the incarnation. `uid` is 0 for "noproc" by name.
 */
export type Terminated = {
  path: string;
  uid: number;
  reason: "stopped" | "failed" | "noproc" | "noconnection";
};

export interface Context<M> {
  /** This actor, this incarnation. */
  readonly self: ActorRef<M>;
  /** Monotonic time of this turn in ms (fractional, µs resolution); does not move during a turn. */
  readonly nowMs: number;
  /** Uniform in [0, 1), from this actor's own seeded stream. */
  random(): number;
  /**
   * Sends when the turn ends. A full or missing receiver makes a dead letter, never an exception.
   */
  tell<T>(to: ActorRef<T>, message: T): void;
  /**
   * Sends a question when the turn ends; exactly one `adapt(outcome)` comes back to this actor as a
   * message, within `timeoutMs` (> 0), unless this actor has stopped or restarted by then.
   */
  ask<T, R>(
    to: ActorRef<T>,
    timeoutMs: number,
    message: (replyTo: ReplyTo<R>) => T,
    adapt: (outcome: AskOutcome<R>) => M,
  ): void;
  /** Answers an ask, now or in a later turn. */
  reply<R>(to: ReplyTo<R>, value: R): void;
  /**
   * One timer per key: starting replaces. Cancelled by restart and stop. `afterMs` ≥ 0. Timers due,
   * like asks timed out, are handled before other waiting mail.
   */
  startTimer(key: string, afterMs: number, message: M): void;
  cancelTimer(key: string): void;
  /**
   * Exactly one `adapt(terminated)` comes back, after everything the target sent before; at once
   * ("noproc") when no incarnation lives there, be it only that it waits for its restart. Watching
   * an incarnation again replaces `adapt`.
   */
  watch<T>(target: ActorRef<T>, adapt: (terminated: Terminated) => M): void;
  /**
   * Ends the watches on this incarnation, or on all at this path for a name: nothing comes back any
   * more.
   */
  unwatch<T>(target: ActorRef<T>): void;
  /**
   * Starts a child under the supervisor at `parentPath`, when the turn ends. Returns its name.
   * Throws if the id is taken or there is no such supervisor. A start that fails leaves nothing
   * behind but an event.
   */
  spawn<C>(parentPath: string, spec: ChildSpec<C>): ActorRef<C>;
  /**
   * Stops an actor, or a supervisor with all below it, in order; what waits for it becomes dead
   * letters. It does not come back; only a permanent actor that stops itself is restarted by its
   * supervisor.
   */
  stop<T>(target: ActorRef<T>): void;
  /**
   * Reports something that happened, as data; the host decides what to do with it (metrics, log,
   * explain).
   */
  emit(event: RuntimeEvent): void;
}

/**
 * An observation: `kind` is "<actor>.<what_happened>" in the past tense; other fields are plain
 * data.
 */
export interface RuntimeEvent {
  readonly kind: string;
}

/**
 * What a full mailbox does: refuse the new message, put it in the place of the queued one of the
 * same key (refuse it when there is none), or drop the oldest. What is lost becomes a dead letter
 * "full".
 */
export type Overflow<M> =
  | { kind: "reject" }
  | { kind: "drop_oldest" }
  | { kind: "conflate"; key: (message: M) => string | undefined };

export type MailboxSpec<M> = {
  /**
   * Messages waiting at most, 1…; default 1024. Timers, outcomes of the actor's own asks and ends
   * of what it watches are not counted: they never get lost.
   */
  max: number;
  overflow: Overflow<M>;
};

/** One child of a supervisor. */
export type ChildSpec<M> = {
  id: string;
  /**
   * Makes the behaviour: on first start, and again on every restart. May throw: the start then
   * fails.
   */
  start: () => Actor<M>;
  /** permanent: always restarted; transient: only after a crash; temporary: never. */
  restart: "permanent" | "transient" | "temporary";
  mailbox?: MailboxSpec<M>;
};

/**
 * Branches and leaves of the supervision tree, as data. Children start in order and stop in
 * reverse.
 */
export type SupervisorSpec = {
  id: string;
  strategy: "one_for_one" | "rest_for_one" | "one_for_all";
  /** More than `intensity` restarts of children within `periodMs` fail this supervisor upward. */
  intensity: number;
  periodMs: number;
  children: readonly TreeSpec[];
};

// biome-ignore lint/suspicious/noExplicitAny: a tree holds children of every message type.
export type TreeSpec = SupervisorSpec | ChildSpec<any>;

/**
 * A broken promise of our own code. In an actor it goes to the supervisor; never thrown for input.
 */
export class AssertionError extends Error {
  override readonly name = "AssertionError";
}

export function assert(condition: boolean, message: string): asserts condition {
  if (!condition) throw new AssertionError(message);
}

/** Makes a `switch` over a union exhaustive: a forgotten case does not compile. */
export function unreachable(value: never): never {
  throw new AssertionError(`unreachable: ${JSON.stringify(value)}`);
}
