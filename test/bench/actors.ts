/**
 * What does a local message cost: as a plain call, through raw nact, through our cells on nact in
 * both modes?
 *
 * CPU time of the process (user and system, garbage collection included) per message, best of
 * several rounds, all in one run; only the ratios travel between machines. Alone: `node
 * dist/test/bench/actors.js`.
 */

import { pathToFileURL } from "node:url";
import { dispatch, spawn, start, stop } from "nact";
import type { Actor, ActorRef, AskOutcome, Context, ReplyTo } from "../../runtime/actor.ts";
import { SystemClock } from "../../runtime/clock.ts";
import { type NactMode, NactScheduler } from "../../runtime/nact-scheduler.ts";
import { Random } from "../../runtime/random.ts";
import { type ActorSystem, createSystem } from "../../runtime/system.ts";

export type ActorBenchRow = {
  name: string;
  /** CPU per message (per question and answer together for asks), ns. */
  nsPerMessage: number;
  /**
   * Raw nact's cost in the comparable case / this one; above 1 = we are cheaper. Absent for nact
   * itself.
   */
  nactRatio?: number;
  /** This cost / a plain call's. */
  callRatio: number;
};

const ROUNDS = 5;
const MESSAGES = 200_000;
const CALLS = 40_000_000;

/** Best CPU time per message over the rounds, ns. */
async function measure(messages: number, round: () => void | Promise<void>): Promise<number> {
  let best = Number.POSITIVE_INFINITY;
  for (let index = 0; index < ROUNDS; index++) {
    const before = process.cpuUsage();
    await round();
    const { user, system } = process.cpuUsage(before);
    best = Math.min(best, ((user + system) * 1000) / messages);
  }
  return best;
}

/**
 * Messages are made beforehand and there are two handlers, or the compiler leaves nothing of the
 * loop.
 */
function plainCalls(): void {
  const handlers = [
    (state: number, message: { n: number }) => state + message.n,
    (state: number, message: { n: number }) => state - message.n,
  ];
  const messages = Array.from({ length: 1000 }, (_, index) => ({ kind: "count", n: index & 3 }));
  let state = 1;
  for (let pass = 0; pass < CALLS / 2000; pass++) {
    for (const handler of handlers) {
      for (const message of messages) state = handler(state, message);
    }
  }
  if (state !== 1) throw new Error(`counted ${state}`);
}

function nactManyToOne(): Promise<void> {
  const messages = MESSAGES / 4;
  return new Promise((resolve) => {
    const system = start();
    const sink = spawn(
      system,
      (state: number, _message: { kind: string }) => {
        if (state + 1 === messages) {
          stop(system);
          resolve();
        }
        return state + 1;
      },
      "sink",
      { initialState: 0 },
    );
    for (let index = 0; index < messages; index++) dispatch(sink, { kind: "count" });
  });
}

/** One ball between the two actors of each pair. */
function nactPingPong(pairs: number): Promise<void> {
  const messages = MESSAGES / 4;
  return new Promise((resolve) => {
    const system = start();
    let left = messages;
    const hit = (state: null, message: { from: number; to: number }) => {
      const from = players[message.from];
      left--;
      if (left > 0 && from !== undefined) {
        dispatch(from, { from: message.to, to: message.from });
      } else if (left === 0) {
        stop(system);
        resolve();
      }
      return state;
    };
    const players = Array.from({ length: pairs * 2 }, (_, index) =>
      spawn(system, hit, `player-${index}`, { initialState: null }),
    );
    for (const [index, player] of players.entries()) {
      if ((index & 1) === 0) dispatch(player, { from: index + 1, to: index });
    }
  });
}

class Source implements Actor<{ kind: "go"; left: number }> {
  readonly #sink: ActorRef<{ kind: "count"; n: number }>;
  constructor(sink: ActorRef<{ kind: "count"; n: number }>) {
    this.#sink = sink;
  }
  receive(
    message: { kind: "go"; left: number },
    context: Context<{ kind: "go"; left: number }>,
  ): void {
    const burst = Math.min(message.left, 100);
    for (let index = 0; index < burst; index++) context.tell(this.#sink, { kind: "count", n: 1 });
    if (message.left > burst)
      context.tell(context.self, { kind: "go", left: message.left - burst });
  }
}

class Sink implements Actor<{ kind: "count"; n: number }> {
  #left: number;
  readonly #done: () => void;
  constructor(messages: number, done: () => void) {
    this.#left = messages;
    this.#done = done;
  }
  receive(message: { kind: "count"; n: number }): void {
    this.#left -= message.n;
    if (this.#left === 0) this.#done();
  }
}

type Ball = { kind: "ball" };

class Player implements Actor<Ball> {
  readonly #other: ActorRef<Ball>;
  readonly #hit: () => boolean;
  constructor(other: ActorRef<Ball>, hit: () => boolean) {
    this.#other = other;
    this.#hit = hit;
  }
  receive(_ball: Ball, context: Context<Ball>): void {
    if (this.#hit()) context.tell(this.#other, { kind: "ball" });
  }
}

type Question = { kind: "question"; replyTo: ReplyTo<number> };
type Answer = { kind: "answer"; outcome: AskOutcome<number> };

class Asker implements Actor<Answer | { kind: "go" }> {
  readonly #callee: ActorRef<Question>;
  readonly #answered: () => boolean;
  constructor(callee: ActorRef<Question>, answered: () => boolean) {
    this.#callee = callee;
    this.#answered = answered;
  }
  receive(message: Answer | { kind: "go" }, context: Context<Answer | { kind: "go" }>): void {
    if (message.kind === "answer") {
      if (!message.outcome.ok) throw new Error(message.outcome.failure);
      if (!this.#answered()) return;
    }
    context.ask<Question, number>(
      this.#callee,
      1000,
      (replyTo) => ({ kind: "question", replyTo }),
      (outcome) => ({ kind: "answer", outcome }),
    );
  }
}

class Callee implements Actor<Question> {
  receive(message: Question, context: Context<Question>): void {
    context.reply(message.replyTo, 1);
  }
}

/** Runs actors in a fresh system until `done` is called. */
function inSystem(
  mode: NactMode,
  fill: (
    spawnActor: <M>(id: string, make: () => Actor<M>) => ActorRef<M>,
    done: () => void,
  ) => void,
): (round: (system: ActorSystem) => void) => Promise<void> {
  return (round) =>
    new Promise((resolve, reject) => {
      const clock = new SystemClock();
      const scheduler = new NactScheduler({ mode, clock });
      const system = createSystem({ scheduler, clock, random: new Random(1) });
      system.start(
        { id: "bench", strategy: "one_for_one", intensity: 0, periodMs: 1000, children: [] },
        {
          onEvent: (event) => {
            if (event.kind.startsWith("runtime.")) reject(new Error(JSON.stringify(event)));
          },
          onFatal: reject,
        },
      );
      const done = () => {
        // After the turn: stopping inside it would stop the actor that calls.
        setImmediate(() => {
          system.stopAll();
          resolve();
        });
      };
      const max = 2 * MESSAGES;
      fill((id, make) => {
        const mailbox = { max, overflow: { kind: "reject" } } as const;
        return system.spawn("bench", { id, start: make, restart: "temporary", mailbox });
      }, done);
      round(system);
    });
}

function cellManyToOne(mode: NactMode): Promise<void> {
  const sources = 8;
  const refs: ActorRef<{ kind: "go"; left: number }>[] = [];
  return inSystem(mode, (spawnActor, done) => {
    const sink = spawnActor("sink", () => new Sink(MESSAGES, done));
    for (let index = 0; index < sources; index++) {
      refs.push(spawnActor(`source-${index}`, () => new Source(sink)));
    }
  })((system) => {
    for (const ref of refs) system.tell(ref, { kind: "go", left: MESSAGES / sources });
  });
}

function cellHostToOne(mode: NactMode): Promise<void> {
  let sink: ActorRef<{ kind: "count"; n: number }> | undefined;
  return inSystem(mode, (spawnActor, done) => {
    sink = spawnActor("sink", () => new Sink(MESSAGES, done));
  })((system) => {
    if (sink === undefined) return;
    for (let index = 0; index < MESSAGES; index++) system.tell(sink, { kind: "count", n: 1 });
  });
}

function cellPingPong(mode: NactMode, pairs: number, balls: number): Promise<void> {
  let left = MESSAGES;
  const refs: ActorRef<Ball>[] = [];
  return inSystem(mode, (spawnActor, done) => {
    const hit = () => {
      left--;
      if (left === 0) done();
      return left > 0;
    };
    for (let pair = 0; pair < pairs; pair++) {
      const second: ActorRef<Ball> = { path: `bench/second-${pair}`, uid: 0 };
      const first = spawnActor(`first-${pair}`, () => new Player(second, hit));
      refs.push(first);
      spawnActor(`second-${pair}`, () => new Player(first, hit));
    }
  })((system) => {
    for (const ref of refs) {
      for (let ball = 0; ball < balls; ball++) system.tell(ref, { kind: "ball" });
    }
  });
}

function cellAsks(mode: NactMode, inFlight: number): Promise<void> {
  const asks = MESSAGES / 4;
  let left = asks;
  let asker: ActorRef<Answer | { kind: "go" }> | undefined;
  return inSystem(mode, (spawnActor, done) => {
    const callee = spawnActor("callee", () => new Callee());
    asker = spawnActor("asker", () => {
      return new Asker(callee, () => {
        left--;
        if (left === 0) done();
        return left >= inFlight;
      });
    });
  })((system) => {
    for (let index = 0; index < inFlight && asker !== undefined; index++) {
      system.tell(asker, { kind: "go" });
    }
  });
}

/** Runs everything: about 10 s. Rows in the order of the reference table. */
export async function benchActors(): Promise<ActorBenchRow[]> {
  const call = await measure(CALLS, plainCalls);
  const nact = {
    manyToOne: await measure(MESSAGES / 4, nactManyToOne),
    pingPong: await measure(MESSAGES / 4, () => nactPingPong(1)),
    pingPong10: await measure(MESSAGES / 4, () => nactPingPong(10)),
  };
  const row = (name: string, nsPerMessage: number, comparable?: number): ActorBenchRow => ({
    name,
    nsPerMessage,
    ...(comparable === undefined ? {} : { nactRatio: comparable / nsPerMessage }),
    callRatio: nsPerMessage / call,
  });
  const rows = [
    row("plain call", call),
    row("nact N→1, queued", nact.manyToOne),
    row("nact ping-pong, 1 pair", nact.pingPong),
    row("nact ping-pong, 10 pairs", nact.pingPong10),
  ];
  for (const mode of ["dispatcher", "per-cell"] as const) {
    const add = async (name: string, messages: number, run: () => Promise<void>, base: number) => {
      rows.push(row(`cell ${mode}: ${name}`, await measure(messages, run), base));
    };
    await add("tell 8→1 in turns", MESSAGES, () => cellManyToOne(mode), nact.manyToOne);
    await add("tell host→1, queued", MESSAGES, () => cellHostToOne(mode), nact.manyToOne);
    await add("ping-pong, 1 pair", MESSAGES, () => cellPingPong(mode, 1, 1), nact.pingPong);
    await add("ping-pong, 10 pairs", MESSAGES, () => cellPingPong(mode, 10, 1), nact.pingPong10);
    await add(
      "ping-pong, 1 pair, 50 balls",
      MESSAGES,
      () => cellPingPong(mode, 1, 50),
      nact.pingPong,
    );
    await add("ask, 1 in flight", MESSAGES / 4, () => cellAsks(mode, 1), 2 * nact.pingPong);
    await add("ask, 100 in flight", MESSAGES / 4, () => cellAsks(mode, 100), 2 * nact.pingPong);
  }
  return rows;
}

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  for (const { name, nsPerMessage, nactRatio, callRatio } of await benchActors()) {
    const ratio = nactRatio === undefined ? "" : `${nactRatio.toFixed(1)}× cheaper than nact`;
    console.log(
      `${name.padEnd(40)} ${nsPerMessage.toFixed(1).padStart(8)} ns ${callRatio.toFixed(0).padStart(6)} calls  ${ratio}`,
    );
  }
}
