/** A small actor system under the simulator's scheduler, for tests of the runtime itself. */

import type {
  Actor,
  ActorRef,
  ChildSpec,
  Context,
  RuntimeEvent,
  SupervisorSpec,
  TreeSpec,
} from "../runtime/actor.ts";
import { SimClock } from "../runtime/clock.ts";
import { Random } from "../runtime/random.ts";
import { SimScheduler } from "../runtime/sim-scheduler.ts";
import {
  type ActorSystem,
  createSystem,
  type Remote,
  type SystemEvent,
} from "../runtime/system.ts";

export type World = {
  system: ActorSystem;
  scheduler: SimScheduler;
  clock: SimClock;
  /** Everything `onEvent` was told, and `onFatal`. */
  events: (SystemEvent | RuntimeEvent)[];
  fatal: unknown[];
  /** Kinds of the events about `path`, in order. */
  kinds(path: string): string[];
};

export type WorldOptions = Partial<SupervisorSpec> & {
  seed?: number;
  clock?: SimClock;
  scheduler?: SimScheduler;
  remote?: Remote;
};

/**
 * Starts a root supervisor "root" (one_for_one, a thousand restarts in 1 s, unless said otherwise).
 */
export function smallWorld(children: readonly TreeSpec[], options: WorldOptions = {}): World {
  const clock = options.clock ?? new SimClock();
  const scheduler = options.scheduler ?? new SimScheduler(clock, options.seed ?? 1);
  const random = new Random(options.seed ?? 1);
  const { remote } = options;
  const system = createSystem({
    clock,
    scheduler,
    random,
    ...(remote === undefined ? {} : { remote }),
  });
  const events: World["events"] = [];
  const about: { kind: string; from: string }[] = [];
  const fatal: unknown[] = [];
  const { id = "root", strategy = "one_for_one", intensity = 1000, periodMs = 1000 } = options;
  const hooks = {
    onEvent(event: SystemEvent | RuntimeEvent, from: string) {
      events.push(event);
      about.push({ kind: event.kind, from });
    },
    onFatal(error: unknown) {
      fatal.push(error);
    },
  };
  system.start({ id, strategy, intensity, periodMs, children }, hooks);
  const kinds = (path: string) => about.filter(({ from }) => from === path).map(({ kind }) => kind);
  return { system, scheduler, clock, events, fatal, kinds };
}

/** A permanent child, unless said otherwise. */
export function child<M>(
  id: string,
  start: () => Actor<M>,
  rest: Partial<ChildSpec<M>> = {},
): ChildSpec<M> {
  return { id, start, restart: "permanent", ...rest };
}

export type Do<M> = (context: Context<Doing<M>>, self: ActorRef<Doing<M>>) => void;
export type Doing<M> = { kind: "do"; run: Do<M> } | { kind: "got"; what: M };

/** An actor that does what it is told, and notes what it gets: the hands and ears of a test. */
export class Puppet<M> implements Actor<Doing<M>> {
  readonly got: M[];

  constructor(got: M[] = []) {
    this.got = got;
  }

  receive(message: Doing<M>, context: Context<Doing<M>>): void {
    if (message.kind === "do") message.run(context, context.self);
    else this.got.push(message.what);
  }
}
