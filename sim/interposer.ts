/**
 * Stands around an actor of a simulation: sees what it is told and what it does, and may change either. Checkers watch
 * through it without trusting the actor's own counters; canaries plant their bugs with it, so that no actor carries a
 * flag for them. What a turn that throws would have done is not seen, since it does not happen.
 */
import type {
  Actor,
  ActorRef,
  AskOutcome,
  ChildSpec,
  Context,
  ReplyTo,
  RuntimeEvent,
  Terminated,
} from "../runtime/actor.ts";

/** Any message: its kind, and what the receiver knows of it. */
export type Mail = { readonly kind: string };

/** What an actor did in a turn, in order. Timers, watches and children are passed through unseen. */
export type Deed =
  | { op: "tell"; to: string; message: Mail }
  | { op: "ask"; to: string; message: Mail }
  | { op: "reply"; to: ReplyTo<never>; value: unknown }
  | { op: "emit"; event: RuntimeEvent };

export type Interposition = {
  /** What the actor gets in place of `message`; undefined = it is lost. */
  receive?(message: Mail, nowMs: number): Mail | undefined;
  /** What is done in place of a deed, in order; none = nothing. An ask may be changed or passed, not dropped. */
  act?(deed: Deed): readonly Deed[];
  /** A turn is over; `message` is undefined for the start. */
  seen?(message: Mail | undefined, deeds: readonly Deed[], nowMs: number): void;
};

export class Interposer implements Actor<Mail> {
  readonly #inner: Actor<Mail>;
  readonly #between: Interposition;

  constructor(inner: Actor<Mail>, between: Interposition) {
    this.#inner = inner;
    this.#between = between;
  }

  start(context: Context<Mail>): void {
    const own = new WatchedContext(context, this.#between);
    this.#inner.start?.(own);
    this.#between.seen?.(undefined, own.deeds, context.nowMs);
  }

  receive(message: Mail, context: Context<Mail>): void {
    const { receive, seen } = this.#between;
    const given = receive === undefined ? message : receive(message, context.nowMs);
    if (given === undefined) return;
    const own = new WatchedContext(context, this.#between);
    this.#inner.receive(given, own);
    seen?.(given, own.deeds, context.nowMs);
  }

  stop(context: Context<Mail>): void {
    this.#inner.stop?.(new WatchedContext(context, this.#between));
  }
}

class WatchedContext implements Context<Mail> {
  readonly deeds: Deed[] = [];
  readonly #context: Context<Mail>;
  readonly #between: Interposition;

  constructor(context: Context<Mail>, between: Interposition) {
    this.#context = context;
    this.#between = between;
  }

  get self(): ActorRef<Mail> {
    return this.#context.self;
  }

  get nowMs(): number {
    return this.#context.nowMs;
  }

  random(): number {
    return this.#context.random();
  }

  tell<T>(to: ActorRef<T>, message: T): void {
    for (const deed of this.#acted({ op: "tell", to: to.path, message: message as Mail })) {
      if (deed.op !== "tell") continue;
      // Changed or not, it goes where the actor sent it.
      this.#context.tell(to, deed.message as T);
    }
  }

  ask<T, R>(
    to: ActorRef<T>,
    timeoutMs: number,
    message: (replyTo: ReplyTo<R>) => T,
    adapt: (outcome: AskOutcome<R>) => Mail,
  ): void {
    this.#context.ask<T, R>(
      to,
      timeoutMs,
      (replyTo) => {
        const asked = message(replyTo);
        const [deed] = this.#acted({ op: "ask", to: to.path, message: asked as Mail });
        return deed?.op === "ask" ? (deed.message as T) : asked;
      },
      adapt,
    );
  }

  reply<R>(to: ReplyTo<R>, value: R): void {
    for (const deed of this.#acted({ op: "reply", to, value }))
      if (deed.op === "reply") this.#context.reply(to, deed.value as R);
  }

  startTimer(key: string, afterMs: number, message: Mail): void {
    this.#context.startTimer(key, afterMs, message);
  }

  cancelTimer(key: string): void {
    this.#context.cancelTimer(key);
  }

  watch<T>(target: ActorRef<T>, adapt: (terminated: Terminated) => Mail): void {
    this.#context.watch(target, adapt);
  }

  unwatch<T>(target: ActorRef<T>): void {
    this.#context.unwatch(target);
  }

  spawn<C>(parentPath: string, spec: ChildSpec<C>): ActorRef<C> {
    return this.#context.spawn(parentPath, spec);
  }

  stop<T>(target: ActorRef<T>): void {
    this.#context.stop(target);
  }

  emit(event: RuntimeEvent): void {
    for (const deed of this.#acted({ op: "emit", event }))
      if (deed.op === "emit") this.#context.emit(deed.event);
  }

  #acted(deed: Deed): readonly Deed[] {
    const done = this.#between.act?.(deed) ?? [deed];
    this.deeds.push(...done);
    return done;
  }
}
