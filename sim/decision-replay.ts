/**
 * The log of a live router, fed to another one in virtual time: it must choose the same, every time.
 *
 * The log holds each message that the router handled, with its instant (transport/records.ts writes it, actors/
 * router-log.ts tells it). Here the same actor gets them at the same instants, with draws from the same stream; its
 * own effects lead nowhere, since all that came of them stands in the log: replies of nodes, timers, new snapshots.
 * What it asks of nodes and answers to requests, explanation and cost of every candidate included, is compared as text.
 */
import { RouterActor } from "../actors/router.ts";
import {
  LoggedRouter,
  type RouterChoice,
  type RouterLogEvent,
  type RouterLogHeader,
  type RouterLogLine,
} from "../actors/router-log.ts";
import type { Actor, ActorRef, Context, RuntimeEvent } from "../runtime/actor.ts";
import { SimClock } from "../runtime/clock.ts";
import { Random } from "../runtime/random.ts";
import { SimScheduler } from "../runtime/sim-scheduler.ts";
import { type ActorSystem, createSystem } from "../runtime/system.ts";

type Turn = Extract<RouterLogEvent, { kind: "router.turn" }>;

/** A turn in which the two do not choose the same. */
export type DecisionDifference = {
  /** Of the log, from 1. */
  line: number;
  atMs: number;
  message: string;
  live: readonly RouterChoice[];
  simulated: readonly RouterChoice[];
};

export type DecisionReport = {
  strategy: string;
  turns: number;
  /** Leases asked for, requests placed and refused, ejections granted or not: what was compared. */
  asked: number;
  placed: number;
  refused: number;
  ejections: number;
  /** Turns that differ; the first ones of them are kept. */
  differing: number;
  differences: DecisionDifference[];
};

/** A log that cannot be replayed; the message says which line, and why. */
export class DecisionLogError extends Error {
  override readonly name = "DecisionLogError";
}

const DIFFERENCES_MAX = 20;

/** Takes the lines of a log one by one. */
export class DecisionReplay {
  readonly #clock = new SimClock();
  #scheduler: SimScheduler | undefined;
  #system: ActorSystem | undefined;
  #router: ActorRef<RouterLogEvent> | undefined;
  /** Told by the router in the turn that is being replayed. */
  #told: Turn | undefined;
  #line = 0;
  readonly #report: DecisionReport = {
    strategy: "",
    turns: 0,
    asked: 0,
    placed: 0,
    refused: 0,
    ejections: 0,
    differing: 0,
    differences: [],
  };

  /** Throws DecisionLogError for a line that is none or stands in a wrong place. */
  add(text: string): void {
    this.#line++;
    const line = this.#parsed(text);
    if (line.kind === "router.log") return this.#begin(line);
    if (this.#system === undefined || this.#router === undefined) {
      throw this.#problem("stands before the header, which tells how the router was made");
    }
    if (line.kind === "router.turn") return this.#replay(line);
    this.#system.tell(this.#router, line);
    this.#scheduler?.runReady();
  }

  report(): DecisionReport {
    if (this.#system === undefined) throw new DecisionLogError("the decision log is empty");
    return this.#report;
  }

  #begin({ seed, root, settings }: RouterLogHeader): void {
    if (this.#system !== undefined) throw this.#problem("is a second header: one log, one process");
    const scheduler = new SimScheduler(this.#clock, seed);
    const system = createSystem({ scheduler, clock: this.#clock, random: new Random(seed) });
    const nodes = new Set<string>();
    const make = () =>
      new LoggedRouter(
        new RouterActor({
          ...settings,
          node: (node) => system.ref(`${root}/nodes/${node}`),
          nodes: () => [...nodes],
        }),
      );
    const onTold = (event: RuntimeEvent) => {
      if (event.kind === "router.turn") this.#told = event as Turn;
    };
    system.start(
      {
        id: root,
        strategy: "one_for_one",
        intensity: 0,
        periodMs: 1000,
        children: [
          {
            id: "router",
            start: () => new ReplayedRouter(make, nodes, onTold),
            restart: "permanent",
          },
        ],
      },
      {
        onEvent: () => {},
        onFatal: (error) => {
          throw error;
        },
      },
    );
    scheduler.runReady();
    this.#scheduler = scheduler;
    this.#system = system;
    this.#router = system.ref(`${root}/router`);
    this.#report.strategy = settings.ranking.strategy;
  }

  #replay(live: Turn): void {
    const report = this.#report;
    const atUs = Math.round(live.atMs * 1000);
    if (atUs < this.#clock.nowUs()) throw this.#problem("is earlier than the line before it");
    this.#scheduler?.runUntil(atUs);
    if (this.#router !== undefined) this.#system?.tell(this.#router, live);
    this.#scheduler?.runReady();
    report.turns++;
    for (const { kind } of live.choices) report[kind === "ejection" ? "ejections" : kind]++;
    const simulated = this.#takeTold()?.choices ?? [];
    if (JSON.stringify(simulated) === JSON.stringify(live.choices)) return;
    report.differing++;
    if (report.differences.length >= DIFFERENCES_MAX) return;
    const { atMs, message, choices } = live;
    report.differences.push({
      line: this.#line,
      atMs,
      message: message.kind,
      live: choices,
      simulated,
    });
  }

  #takeTold(): Turn | undefined {
    const told = this.#told;
    this.#told = undefined;
    return told;
  }

  #parsed(text: string): RouterLogLine {
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch {
      throw this.#problem("is no JSON");
    }
    if (isLine(value)) return value;
    throw this.#problem("is no line of a decision log, as `serve` writes it with record.decisions");
  }

  #problem(what: string): DecisionLogError {
    return new DecisionLogError(`line ${this.#line} of the decision log ${what}`);
  }
}

/** Trusts what is inside: a log is written by this program. */
function isLine(value: unknown): value is RouterLogLine {
  if (typeof value !== "object" || value === null || !("kind" in value)) return false;
  switch (value.kind) {
    case "router.log":
      return "v" in value && value.v === 1 && "seed" in value && "settings" in value;
    case "router.turn":
      return "atMs" in value && "message" in value && "choices" in value;
    default:
      return value.kind === "router.log_started";
  }
}

/** Hands each logged turn to the router, whose effects lead nowhere. */
class ReplayedRouter implements Actor<RouterLogEvent> {
  readonly #make: () => LoggedRouter;
  /** That there are, by what was heard of them. */
  readonly #nodes: Set<string>;
  readonly #onTold: (event: RuntimeEvent) => void;
  #router: LoggedRouter;

  constructor(make: () => LoggedRouter, nodes: Set<string>, onTold: (event: RuntimeEvent) => void) {
    this.#make = make;
    this.#nodes = nodes;
    this.#onTold = onTold;
    this.#router = make();
  }

  receive(event: RouterLogEvent, context: Context<RouterLogEvent>): void {
    if (event.kind === "router.log_started") {
      this.#router = this.#make();
      return this.#router.start(this.#quiet(context));
    }
    const { message } = event;
    if (message.kind === "router.node_changed") this.#nodes.add(message.snapshot.node);
    if (message.kind === "router.node_removed") this.#nodes.delete(message.node);
    this.#router.receive(message, this.#quiet(context));
  }

  #quiet<M>(context: Context<RouterLogEvent>): Context<M> {
    const { path, uid } = context.self;
    return {
      self: { path, uid },
      nowMs: context.nowMs,
      random: () => context.random(),
      tell: () => {},
      // Built all the same: the question is a choice.
      ask: (_to, _timeoutMs, message) => void message({ asker: path, askId: 0 }),
      reply: () => {},
      startTimer: () => {},
      cancelTimer: () => {},
      watch: () => {},
      unwatch: () => {},
      spawn: (parentPath, spec) => ({ path: `${parentPath}/${spec.id}`, uid: 0 }),
      stop: () => {},
      emit: this.#onTold,
    };
  }
}
