/**
 * One actor alone, driven synchronously: messages in, effects out as data, time and answers by hand.
 *
 *     const kit = testActor(new RouterActor(options));
 *     kit.send({ kind: "router.choose", … });
 *     expect(kit.take()).toEqual([{ kind: "tell", to: "headrace/nodes/a", message: { … } }]);
 *     kit.advance(500); // fires timers due, times out asks due
 *
 * It keeps the promises of the runtime that one actor can see: effects appear when the turn ends and not at all
 * when it throws (the error comes out of `send`), one timer per key, one outcome per ask, time still in a turn.
 */

import type {
  Actor,
  ActorRef,
  AskFailure,
  AskOutcome,
  ChildSpec,
  Context,
  ReplyTo,
  RuntimeEvent,
  Terminated,
} from "../runtime/actor.ts";
import { SimClock, type TimerHandle } from "../runtime/clock.ts";
import { Random } from "../runtime/random.ts";

/** What a turn asked for. `to`, `path`: the path of the ref. */
export type KitEffect =
  | { kind: "tell"; to: string; message: unknown }
  /** `index` counts the asks of this kit from 0, for `answer`. */
  | { kind: "ask"; to: string; message: unknown; timeoutMs: number; index: number }
  | { kind: "reply"; askId: number; value: unknown }
  | { kind: "start_timer"; key: string; afterMs: number; message: unknown }
  | { kind: "cancel_timer"; key: string }
  | { kind: "watch"; path: string }
  | { kind: "unwatch"; path: string }
  | { kind: "spawn"; path: string; spec: ChildSpec<never> }
  | { kind: "stop"; path: string }
  | { kind: "emit"; event: RuntimeEvent };

/** A name to hand to the actor under test as one of its refs. */
export function refTo<M>(path: string): ActorRef<M> {
  return { path, uid: 0 };
}

export type KitOptions = {
  /** Default 1. */
  seed?: number | string;
  /** Path of the actor; default "test/actor". */
  path?: string;
  /** Time of its start; default 0. */
  nowMs?: number;
};

/** Makes the kit and runs the actor's `start`; its effects wait in `take()`. */
export function testActor<M>(actor: Actor<M>, options: KitOptions = {}): ActorKit<M> {
  return new ActorKit(actor, options);
}

type OpenAsk<M> = { adapt: (outcome: AskOutcome<never>) => M; timeout: TimerHandle };

export class ActorKit<M> {
  readonly self: ActorRef<M>;
  readonly #actor: Actor<M>;
  readonly #clock = new SimClock();
  readonly #random: Random;
  readonly #released: KitEffect[] = [];
  /**
   * Messages the runtime owes, of timers and time-outs; handled one by one after the present turn.
   */
  readonly #due: M[] = [];
  readonly #timers = new Map<string, TimerHandle>();
  readonly #asks = new Map<number, OpenAsk<M>>();
  readonly #watches = new Map<string, (terminated: Terminated) => M>();
  /** What to do when the present turn ends, beside the effect as data. */
  #buffer: { effect: KitEffect; release: (() => void) | undefined }[] = [];
  #asksMade = 0;
  #askIds = 0;

  constructor(actor: Actor<M>, options: KitOptions) {
    this.#actor = actor;
    this.#random = new Random(options.seed ?? 1);
    this.self = { path: options.path ?? "test/actor", uid: 1 };
    this.#clock.advanceTo(Math.round((options.nowMs ?? 0) * 1000));
    this.#turn((context) => actor.start?.(context));
  }

  get nowMs(): number {
    return this.#clock.nowUs() / 1000;
  }

  /** One turn. Throws what `receive` throws; then the turn has no effects. */
  send(message: M): void {
    this.#turn((context) => this.#actor.receive(message, context));
  }

  /**
   * One turn with a question; returns the reply if that turn gave it. The reply is among the
   * effects too.
   */
  ask<R>(message: (replyTo: ReplyTo<R>) => M): R | undefined {
    const replyTo = this.replyTo<R>();
    const before = this.#released.length;
    this.send(message(replyTo));
    for (const effect of this.#released.slice(before)) {
      if (effect.kind === "reply" && effect.askId === replyTo.askId) return effect.value as R;
    }
    return undefined;
  }

  /** A fresh place for an answer: its `askId` is that of the "reply" effect. */
  replyTo<R>(): ReplyTo<R> {
    return { asker: "test", askId: ++this.#askIds };
  }

  /** Runs the actor's `stop`. */
  stop(): void {
    this.#turn((context) => this.#actor.stop?.(context));
  }

  /** Effects released since the last `take`, oldest first; leaves them there. */
  effects(): readonly KitEffect[] {
    return [...this.#released];
  }

  /** Effects released since the last `take`, oldest first, and forgets them. */
  take(): KitEffect[] {
    return this.#released.splice(0);
  }

  /** Messages told to `path` since the last `take`. */
  told(path: string): unknown[] {
    return this.#released.flatMap((effect) =>
      effect.kind === "tell" && effect.to === path ? [effect.message] : [],
    );
  }

  /** Events emitted since the last `take`. */
  emitted(): RuntimeEvent[] {
    return this.#released.flatMap((effect) => (effect.kind === "emit" ? [effect.event] : []));
  }

  /** Keys of the timers that run. */
  timers(): string[] {
    return [...this.#timers.keys()];
  }

  /** Moves time, firing timers and ask time-outs one by one, each at its own instant. */
  advance(ms: number): void {
    const untilUs = this.#clock.nowUs() + Math.round(ms * 1000);
    for (let atUs = this.#clock.nextAtUs(); atUs !== undefined && atUs <= untilUs; ) {
      this.#clock.advanceToNext();
      for (let due = this.#due.shift(); due !== undefined; due = this.#due.shift()) this.send(due);
      atUs = this.#clock.nextAtUs();
    }
    this.#clock.advanceTo(untilUs);
  }

  /**
   * Answers the ask of that index (of its "ask" effect), in a turn of its own. Throws if it is not
   * open.
   */
  answer(
    index: number,
    outcome: { ok: true; value: unknown } | { ok: false; failure: AskFailure },
  ): void {
    const ask = this.#asks.get(index);
    if (ask === undefined)
      throw new RangeError(`no open ask ${index}; open: ${[...this.#asks.keys()]}`);
    this.#asks.delete(index);
    this.#clock.cancel(ask.timeout);
    this.send(ask.adapt(outcome as AskOutcome<never>));
  }

  /**
   * Ends what the actor watches at `path`, in a turn of its own. Throws if it watches nothing
   * there.
   */
  terminate(path: string, reason: Terminated["reason"]): void {
    const adapt = this.#watches.get(path);
    if (adapt === undefined) throw new RangeError(`no watch on ${path}`);
    this.#watches.delete(path);
    this.send(adapt({ path, uid: 1, reason }));
  }

  #turn(run: (context: Context<M>) => void): void {
    this.#buffer = [];
    run(this.#context());
    const buffer = this.#buffer;
    this.#buffer = [];
    for (const { effect, release } of buffer) {
      release?.();
      this.#released.push(effect);
    }
  }

  #context(): Context<M> {
    const add = (effect: KitEffect, release?: () => void) => {
      this.#buffer.push({ effect, release });
    };
    return {
      self: this.self,
      nowMs: this.nowMs,
      random: () => this.#random.next(),
      tell: (to, message) => add({ kind: "tell", to: to.path, message }),
      ask: (to, timeoutMs, message, adapt) => {
        if (!(timeoutMs > 0)) throw new RangeError(`ask timeout must be above 0, got ${timeoutMs}`);
        const index = this.#asksMade++;
        const replyTo = { asker: this.self.path, askId: ++this.#askIds };
        const effect: KitEffect = {
          kind: "ask",
          to: to.path,
          message: message(replyTo),
          timeoutMs,
          index,
        };
        add(effect, () => {
          const timeout = this.#clock.schedule(Math.max(1, Math.round(timeoutMs * 1000)), () => {
            this.#asks.delete(index);
            this.#due.push(adapt({ ok: false, failure: "timeout" }));
          });
          this.#asks.set(index, { adapt, timeout });
        });
      },
      reply: (to, value) => add({ kind: "reply", askId: to.askId, value }),
      startTimer: (key, afterMs, message) => {
        if (!(afterMs >= 0)) throw new RangeError(`timer delay must be 0 or more, got ${afterMs}`);
        add({ kind: "start_timer", key, afterMs, message }, () => {
          this.#cancelTimer(key);
          const handle = this.#clock.schedule(Math.round(afterMs * 1000), () => {
            this.#timers.delete(key);
            this.#due.push(message);
          });
          this.#timers.set(key, handle);
        });
      },
      cancelTimer: (key) => add({ kind: "cancel_timer", key }, () => this.#cancelTimer(key)),
      watch: (target, adapt) =>
        add({ kind: "watch", path: target.path }, () => this.#watches.set(target.path, adapt)),
      unwatch: (target) =>
        add({ kind: "unwatch", path: target.path }, () => this.#watches.delete(target.path)),
      spawn: (parentPath, spec) => {
        const path = `${parentPath}/${spec.id}`;
        add({ kind: "spawn", path, spec });
        return refTo(path);
      },
      stop: (target) => add({ kind: "stop", path: target.path }),
      emit: (event) => add({ kind: "emit", event }),
    };
  }

  #cancelTimer(key: string): void {
    const handle = this.#timers.get(key);
    if (handle !== undefined) this.#clock.cancel(handle);
    this.#timers.delete(key);
  }
}
