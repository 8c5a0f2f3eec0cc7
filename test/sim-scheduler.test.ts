import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { Actor, ActorRef, Context, MailboxSpec, ReplyTo } from "../runtime/actor.ts";
import { SimClock } from "../runtime/clock.ts";
import { Random } from "../runtime/random.ts";
import { SimScheduler } from "../runtime/sim-scheduler.ts";
import { child, smallWorld } from "./small-world.ts";

describe("steps", () => {
  it("step: one message or one timer at a time; time moves only when nothing waits", () => {
    const seen: string[] = [];
    const world = smallWorld([
      child("a", () => ({
        receive(message: string, context: Context<string>) {
          seen.push(`${message} ${context.nowMs}`);
          if (message === "one") context.startTimer("t", 5, "timer");
        },
      })),
    ]);
    const a = world.system.ref<string>("root/a");
    world.system.tell(a, "one");
    world.system.tell(a, "two");
    expect(world.scheduler.step()).toBe(true);
    expect(seen).toEqual(["one 0"]);
    expect(world.scheduler.step()).toBe(true);
    expect(seen).toEqual(["one 0", "two 0"]);
    expect(world.scheduler.step()).toBe(true); // The timer is due, not yet handled.
    expect(world.clock.nowUs()).toBe(5000);
    expect(world.scheduler.step()).toBe(true);
    expect(seen).toEqual(["one 0", "two 0", "timer 5"]);
    expect(world.scheduler.step()).toBe(false);
    expect(world.scheduler.handled).toBe(3);
  });

  it("runFor: handles what is due up to and at its end, and stands exactly there", () => {
    const seen: string[] = [];
    const world = smallWorld([
      child("a", () => ({
        start(context: Context<string>) {
          for (const atMs of [3, 10, 11]) context.startTimer(`t${atMs}`, atMs, `at ${atMs}`);
        },
        receive: (message: string) => void seen.push(message),
      })),
    ]);
    world.scheduler.runFor(10);
    expect(seen).toEqual(["at 3", "at 10"]);
    expect(world.clock.nowUs()).toBe(10_000);
    world.scheduler.runFor(0.5);
    expect(world.clock.nowUs()).toBe(10_500);
    expect(world.scheduler.runUntilIdle()).toBe(2);
    expect(world.clock.nowUs()).toBe(11_000);
  });

  it("endless work: is reported instead of hanging (a recurring timer, a message to itself)", () => {
    const recurring = smallWorld([
      child("a", () => ({
        start: (context: Context<string>) => context.startTimer("t", 1, "again"),
        receive: (_: string, context: Context<string>) => context.startTimer("t", 1, "again"),
      })),
    ]);
    expect(() => recurring.scheduler.runUntilIdle(1000)).toThrow("not idle after 1000 steps");
    const echo = smallWorld([
      child("a", () => ({
        receive: (_: string, context: Context<string>) => context.tell(context.self, "again"),
      })),
    ]);
    echo.system.tell(echo.system.ref<string>("root/a"), "once");
    expect(() => echo.scheduler.runReady(1000)).toThrow("still busy after 1000 steps");
  });
});

describe("order", () => {
  /** Fifty actors that pass 20 000 messages on at random, some with delay; returns hash and order of handling. */
  function run(seed: number): { hash: string; order: string; atUs: number } {
    const cells = 50;
    const order: number[] = [];
    let left = 20_000;
    type Pass = { kind: "pass" } | { kind: "pass_later" };
    const make = (index: number) => (): Actor<Pass> => ({
      receive(_message, context) {
        order.push(index);
        if (--left < 0) return;
        const to: ActorRef<Pass> = { path: `root/${Math.floor(context.random() * cells)}`, uid: 0 };
        if (context.random() < 0.25)
          context.startTimer("t", context.random(), { kind: "pass_later" });
        context.tell(to, { kind: "pass" });
      },
    });
    const ids = Array.from({ length: cells }, (_, index) => index);
    const world = smallWorld(
      ids.map((index) => child(`${index}`, make(index))),
      { seed },
    );
    for (const index of ids)
      world.system.tell(world.system.ref<Pass>(`root/${index}`), { kind: "pass" });
    world.scheduler.runUntilIdle();
    return { hash: world.scheduler.hash, order: order.join(" "), atUs: world.clock.nowUs() };
  }

  it("same seed: the same run, by its hash and in fact", () => {
    expect(run(5)).toEqual(run(5));
  });

  it("another seed: another order, and another hash", () => {
    const runs = [1, 2, 3, 4].map(run);
    expect(new Set(runs.map(({ order }) => order)).size).toBe(4);
    expect(new Set(runs.map(({ hash }) => hash)).size).toBe(4);
  });

  it("hash: tells time, path and kind of message apart", () => {
    const hashOf = (path: string, kind: string, atUs: number) => {
      const clock = new SimClock();
      const scheduler = new SimScheduler(clock, 1);
      clock.advanceTo(atUs);
      scheduler.handling({ path, isAwake: true, run: () => 0 }, kind);
      return scheduler.hash;
    };
    const base = hashOf("root/a", "x", 0);
    expect(hashOf("root/a", "x", 0)).toBe(base);
    expect(base).toMatch(/^[0-9a-f]{16}$/);
    const others = [
      hashOf("root/b", "x", 0),
      hashOf("root/a", "y", 0),
      hashOf("root/a", "x", 1),
      hashOf("root/a", "x", 2 ** 32),
    ];
    expect(new Set([base, ...others]).size).toBe(5);
  });

  it("seeds: reach different orders of two messages that race", () => {
    const orders = Array.from({ length: 20 }, (_, seed) => {
      const seen: string[] = [];
      const note = (id: string) => child(id, () => ({ receive: () => void seen.push(id) }));
      const world = smallWorld([note("a"), note("b")], { seed });
      world.system.tell(world.system.ref<string>("root/a"), "");
      world.system.tell(world.system.ref<string>("root/b"), "");
      world.scheduler.runUntilIdle();
      return seen.join("");
    });
    expect(new Set(orders)).toEqual(new Set(["ab", "ba"]));
  });
});

type Op =
  | { op: "tell"; to: number }
  | { op: "ask"; to: number; timeoutMs: number; how: "now" | "later" | "never" | "crash" }
  | { op: "watch"; to: number }
  | { op: "unwatch"; to: number }
  | { op: "stop"; to: number }
  | { op: "spawn"; id: number }
  | { op: "timer"; afterMs: number }
  | { op: "crash" };

type Msg =
  | { kind: "act"; ops: readonly Op[] }
  | { kind: "note"; from: string; sequence: number }
  | { kind: "question"; how: "now" | "later" | "never" | "crash"; replyTo: ReplyTo<number> }
  | { kind: "answer_due"; replyTo: ReplyTo<number> }
  | { kind: "outcome"; id: number; isTimeout: boolean }
  | { kind: "ended"; id: number }
  | { kind: "timer_due" };

/** What happened in a run, as the actors themselves saw it. */
class Ledger {
  /** Incarnation that lives at each path. */
  readonly alive = new Map<string, number>();
  readonly asks: {
    path: string;
    uid: number;
    outcomes: number;
    atMs: number;
    timeoutMs: number;
  }[] = [];
  readonly watches: { path: string; uid: number; target: string; ends: number; isOff: boolean }[] =
    [];
  readonly lastSequence = new Map<string, number>();
  sent = 0;
  handled = 0;
  #sequence = 0;
  readonly wrong: string[] = [];

  nextSequence(): number {
    return ++this.#sequence;
  }
}

class Worker implements Actor<Msg> {
  readonly #ledger: Ledger;
  constructor(ledger: Ledger) {
    this.#ledger = ledger;
  }

  start(context: Context<Msg>): void {
    this.#ledger.alive.set(context.self.path, context.self.uid);
  }

  receive(message: Msg, context: Context<Msg>): void {
    const ledger = this.#ledger;
    switch (message.kind) {
      case "act": {
        // A turn that throws has no effects, so nothing of it may enter the ledger.
        const entries = message.ops.map((op) => this.#do(op, context));
        if (message.ops.some(({ op }) => op === "crash")) throw new Error("thrown on purpose");
        for (const enter of entries) enter();
        return;
      }
      case "note": {
        ledger.handled++;
        const pair = `${message.from} ${context.self.path}`;
        const last = ledger.lastSequence.get(pair) ?? 0;
        if (message.sequence <= last)
          ledger.wrong.push(`${pair}: ${message.sequence} after ${last}`);
        ledger.lastSequence.set(pair, message.sequence);
        return;
      }
      case "question":
        if (message.how === "crash") throw new Error("thrown on purpose");
        if (message.how === "now") context.reply(message.replyTo, 1);
        if (message.how === "later") {
          const { replyTo } = message;
          context.startTimer(`answer ${replyTo.askId}`, 7, { kind: "answer_due", replyTo });
        }
        return;
      case "answer_due":
        context.reply(message.replyTo, 2);
        return;
      case "outcome": {
        const ask = ledger.asks[message.id];
        if (ask === undefined) return;
        ask.outcomes++;
        if (ask.uid !== context.self.uid) ledger.wrong.push("outcome for another incarnation");
        const waitedMs = context.nowMs - ask.atMs;
        if (waitedMs > ask.timeoutMs + 1e-6) ledger.wrong.push(`outcome after ${waitedMs} ms`);
        if (message.isTimeout && waitedMs < ask.timeoutMs - 1e-6)
          ledger.wrong.push("early timeout");
        return;
      }
      case "ended": {
        const watch = ledger.watches[message.id];
        if (watch === undefined) return;
        watch.ends++;
        if (watch.isOff) ledger.wrong.push("an end after unwatch");
        if (watch.uid !== context.self.uid) ledger.wrong.push("an end for another incarnation");
        return;
      }
      case "timer_due":
        return;
    }
  }

  /** Asks the context for it; returns what to enter into the ledger should the turn succeed. */
  #do(op: Op, context: Context<Msg>): () => void {
    const ledger = this.#ledger;
    const { path, uid } = context.self;
    const to = (index: number): ActorRef<Msg> => ({ path: `root/${index}`, uid: 0 });
    switch (op.op) {
      case "tell":
        context.tell(to(op.to), { kind: "note", from: path, sequence: ledger.nextSequence() });
        return () => ledger.sent++;
      case "ask": {
        const { timeoutMs, how } = op;
        const id = ledger.asks.length;
        // The place is taken even if the turn throws; then it counts as an incarnation that never was.
        ledger.asks.push({ path, uid: 0, outcomes: 0, atMs: context.nowMs, timeoutMs });
        context.ask<Msg, number>(
          to(op.to),
          timeoutMs,
          (replyTo) => ({ kind: "question", how, replyTo }),
          (outcome) => ({
            kind: "outcome",
            id,
            isTimeout: !outcome.ok && outcome.failure === "timeout",
          }),
        );
        return () => Object.assign(ledger.asks[id] ?? {}, { uid });
      }
      case "watch": {
        const target = `root/${op.to}`;
        const id = ledger.watches.length;
        ledger.watches.push({ path, uid: 0, target, ends: 0, isOff: true });
        context.watch(to(op.to), () => ({ kind: "ended", id }));
        return () => {
          // Watching again replaces, unless the first has ended: the old one may still end, or never.
          const mine = (one: Ledger["watches"][number]) => one.uid === uid && one.target === target;
          for (const one of ledger.watches.filter(mine)) one.path = "replaced";
          Object.assign(ledger.watches[id] ?? {}, { uid, isOff: false });
        };
      }
      case "unwatch": {
        const target = `root/${op.to}`;
        context.unwatch(to(op.to));
        return () => {
          for (const one of ledger.watches) {
            if (one.uid === uid && one.target === target) Object.assign(one, { isOff: true });
          }
        };
      }
      case "stop":
        context.stop(to(op.to));
        return () => {};
      case "spawn":
        try {
          context.spawn(
            "root",
            child(`${op.id}`, () => new Worker(ledger)),
          );
        } catch {
          // Taken.
        }
        return () => {};
      case "timer":
        context.startTimer("t", op.afterMs, { kind: "timer_due" });
        return () => {};
      case "crash":
        return () => {};
    }
  }
}

describe("always", () => {
  const cells = 5;
  const to = fc.nat(cells - 1);
  const how = fc.constantFrom("now", "later", "never", "crash");
  const op: fc.Arbitrary<Op> = fc.oneof(
    { weight: 8, arbitrary: fc.record({ op: fc.constant("tell" as const), to }) },
    {
      weight: 4,
      arbitrary: fc.record({
        op: fc.constant("ask" as const),
        ...{ to, how, timeoutMs: fc.integer({ min: 1, max: 12 }) },
      }),
    },
    { weight: 3, arbitrary: fc.record({ op: fc.constant("watch" as const), to }) },
    { weight: 1, arbitrary: fc.record({ op: fc.constant("unwatch" as const), to }) },
    { weight: 1, arbitrary: fc.record({ op: fc.constant("stop" as const), to }) },
    { weight: 1, arbitrary: fc.record({ op: fc.constant("spawn" as const), id: to }) },
    { weight: 1, arbitrary: fc.record({ op: fc.constant("timer" as const), afterMs: fc.nat(9) }) },
    { weight: 1, arbitrary: fc.constant({ op: "crash" as const }) },
  );
  const script = fc.array(
    fc.record({ who: to, atMs: fc.nat(20), ops: fc.array(op, { maxLength: 6 }) }),
    { maxLength: 30 },
  );
  const mailbox: fc.Arbitrary<MailboxSpec<Msg>> = fc.record({
    max: fc.integer({ min: 1, max: 4 }),
    overflow: fc.constantFrom<MailboxSpec<Msg>["overflow"]>(
      { kind: "reject" },
      { kind: "drop_oldest" },
    ),
  });

  function play(
    steps: readonly { who: number; atMs: number; ops: readonly Op[] }[],
    seed: number,
    spec: MailboxSpec<Msg>,
  ) {
    const ledger = new Ledger();
    const ids = Array.from({ length: cells }, (_, index) => `${index}`);
    const world = smallWorld(
      ids.map((id) => child(id, () => new Worker(ledger), { mailbox: spec })),
      { seed },
    );
    const { system, clock, scheduler } = world;
    for (const { who, atMs, ops } of steps) {
      const send = () => void system.tell(system.ref<Msg>(`root/${who}`), { kind: "act", ops });
      clock.schedule(atMs * 1000, send);
    }
    while (scheduler.step()) {
      for (const { path, mailboxDepth, mailboxMax } of system.stats().cells) {
        if (mailboxDepth > mailboxMax) ledger.wrong.push(`${path} holds ${mailboxDepth}`);
      }
    }
    return { ledger, stats: system.stats(), world };
  }

  it("asks: exactly one outcome each, in time; watches: exactly one end; order kept; nothing lost unseen", () => {
    fc.assert(
      fc.property(script, fc.nat(), mailbox, (steps, seed, spec) => {
        const { ledger, stats, world } = play(steps, seed, spec);
        const lives = (one: { path: string; uid: number }) =>
          one.uid !== 0 && ledger.alive.get(one.path) === one.uid && !gone.has(one.path);
        const paths = new Set(stats.cells.map(({ path }) => path));
        const gone = new Set([...ledger.alive.keys()].filter((path) => !paths.has(path)));

        for (const ask of ledger.asks) {
          expect(ask.outcomes).toBeLessThanOrEqual(1);
          if (lives(ask)) expect(ask.outcomes).toBe(1);
        }
        for (const watch of ledger.watches) expect(watch.ends).toBeLessThanOrEqual(1);
        expect(stats.asks).toBe(0);
        expect(ledger.wrong).toEqual([]);
        const deadNotes = stats.deadLetters
          .filter(({ messageKind }) => messageKind === "note")
          .reduce((sum, { count }) => sum + count, 0);
        expect(ledger.handled + deadNotes).toBe(ledger.sent);

        // Whoever is still watched ends now: then every watch of a living watcher has had its end.
        const watchers = ledger.watches.filter((one) => lives(one) && !one.isOff);
        for (const { target } of watchers) {
          if (!watchers.some(({ path }) => path === target))
            world.system.stop({ path: target, uid: 0 });
        }
        world.scheduler.runUntilIdle();
        for (const watch of watchers) {
          if (!watchers.some(({ path }) => path === watch.target)) expect(watch.ends).toBe(1);
          else expect(watch.ends).toBeLessThanOrEqual(1);
        }
        expect(ledger.wrong).toEqual([]);
      }),
      { seed: 11, numRuns: 400 },
    );
  });

  it("replay: the same script and seed give the same hash", () => {
    fc.assert(
      fc.property(script, fc.nat(), mailbox, (steps, seed, spec) => {
        const once = play(steps, seed, spec).world.scheduler.hash;
        expect(play(steps, seed, spec).world.scheduler.hash).toBe(once);
      }),
      { seed: 12, numRuns: 60 },
    );
  });

  it("two systems on one scheduler: share its time and its order", () => {
    const seen: string[] = [];
    const note = () => ({
      receive(message: string, context: Context<string>) {
        seen.push(`${context.self.path} ${message} ${context.nowMs}`);
      },
    });
    const one = smallWorld([child("a", note)], { id: "one" });
    const two = smallWorld([child("a", note)], { ...one, id: "two" });
    two.clock.schedule(2000, () => two.system.tell(two.system.ref<string>("two/a"), "late"));
    one.system.tell(one.system.ref<string>("one/a"), "early");
    one.scheduler.runUntilIdle();
    expect(seen).toEqual(["one/a early 0", "two/a late 2"]);
  });

  it("randomness of the schedule: is not that of the actors", () => {
    const clock = new SimClock();
    const scheduler = new SimScheduler(clock, 1);
    const before = new Random(1).split("root/a").next();
    const draws: number[] = [];
    const draw = () => ({
      receive: (_: string, context: Context<string>) => void draws.push(context.random()),
    });
    const world = smallWorld([child("a", draw), child("b", draw)], { clock, scheduler, seed: 1 });
    for (const id of ["b", "b", "a"]) world.system.tell(world.system.ref<string>(`root/${id}`), "");
    world.scheduler.runUntilIdle();
    expect(draws).toContain(before);
  });
});
