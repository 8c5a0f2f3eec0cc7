/**
 * nact 7.6.2 has known faults. Each test here does to our cells, on the real nact, what triggers
 * one of them (or one of the traps other actor systems fell into), in both modes, and shows that no
 * cell is hurt.
 *
 * Time is a `SimClock`: nothing waits for the wall clock, and back-offs pass when told to.
 */

import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { ActorRef, Context, ReplyTo, RuntimeEvent, TreeSpec } from "../runtime/actor.ts";
import { SimClock } from "../runtime/clock.ts";
import { type NactMode, NactScheduler } from "../runtime/nact-scheduler.ts";
import { Random } from "../runtime/random.ts";
import type { Runnable } from "../runtime/scheduler.ts";
import { createSystem, type SystemEvent } from "../runtime/system.ts";
import { child, type Doing, Puppet } from "./small-world.ts";

type Hand = Context<Doing<unknown>>;
const got = (what: unknown): Doing<unknown> => ({ kind: "got", what });
const realSetImmediate = setImmediate;

/** Lets the event loop turn; nact needs one turn per message. */
function turns(count = 20): Promise<void> {
  return new Promise((resolve) => {
    const next = (left: number) => {
      if (left === 0) resolve();
      else realSetImmediate(next, left - 1);
    };
    next(count);
  });
}

/** Lets the event loop turn until it is so; throws when that does not come. */
async function until(isSo: () => boolean): Promise<void> {
  for (let turn = 0; turn < 20_000; turn++) {
    if (isSo()) return;
    await turns(1);
  }
  throw new Error("it did not come");
}

describe.each<NactMode>(["dispatcher", "per-cell"])("nact, mode %s", (mode) => {
  const unhandled: unknown[] = [];
  const note = (error: unknown) => void unhandled.push(error);
  const stops: (() => void)[] = [];
  /** Calls of setImmediate by nact and the runtime. */
  let immediates = 0;

  beforeEach(() => {
    unhandled.length = 0;
    process.on("unhandledRejection", note);
    // What nact or we throw out of an immediate would end the process; here it is noted instead.
    vi.stubGlobal("setImmediate", (fn: (...args: unknown[]) => unknown, ...args: unknown[]) => {
      immediates++;
      return realSetImmediate(() => {
        try {
          const result = fn(...args);
          if (result instanceof Promise) result.catch(note);
        } catch (error) {
          note(error);
        }
      });
    });
  });

  afterEach(async () => {
    for (const stop of stops.splice(0)) stop();
    await turns(3);
    process.off("unhandledRejection", note);
    vi.unstubAllGlobals();
  });

  function world(children: readonly TreeSpec[] = []) {
    const clock = new SimClock();
    const scheduler = new NactScheduler({ mode, clock });
    const system = createSystem({ scheduler, clock, random: new Random(1) });
    const events: (SystemEvent | RuntimeEvent)[] = [];
    const fatal: unknown[] = [];
    system.start(
      { id: "root", strategy: "one_for_one", intensity: 1000, periodMs: 1000, children },
      { onEvent: (event) => events.push(event), onFatal: (error) => fatal.push(error) },
    );
    stops.push(() => system.stopAll());
    const spawn = <M>(
      id: string,
      ...rest: Parameters<typeof child<M>> extends [string, ...infer R] ? R : never
    ) => system.spawn("root", child<M>(id, ...rest));
    const act = (to: ActorRef<Doing<unknown>>, run: (context: Hand) => void) =>
      system.tell(to, { kind: "do", run });
    const crash = (to: ActorRef<Doing<unknown>>) =>
      act(to, () => {
        throw new Error("thrown on purpose");
      });
    const count = (kind: string) => events.filter((event) => event.kind === kind).length;
    return { system, clock, scheduler, events, fatal, spawn, act, crash, count };
  }

  it("fault 1, answers mixed up: 20 000 open asks each get their own answer", async () => {
    const { system, spawn, act } = world();
    const max = { mailbox: { max: 100_000, overflow: { kind: "reject" } } } as const;
    type Echo = { kind: "echo"; n: number; replyTo: ReplyTo<number> };
    const held: Echo[] = [];
    const echo = spawn<Echo | { kind: "release" }>(
      "echo",
      () => ({
        receive(message, context) {
          if (message.kind === "echo") held.push(message);
          else for (const { replyTo, n } of held.toReversed()) context.reply(replyTo, n);
        },
      }),
      max,
    );
    const wrong: unknown[] = [];
    let answered = 0;
    const asker = spawn<Doing<unknown>>("asker", () => new Puppet(), max);
    const hostOutcomes = Array.from({ length: 100 }, (_, n) =>
      system.ask<Echo | { kind: "release" }, number>(echo, 1000, (replyTo) => ({
        kind: "echo",
        n: -n,
        replyTo,
      })),
    );
    act(asker, (context) => {
      for (let n = 0; n < 20_000; n++) {
        context.ask<Echo | { kind: "release" }, number>(
          echo,
          1000,
          (replyTo) => ({ kind: "echo", n, replyTo }),
          (outcome) => ({
            kind: "do",
            run: () => {
              answered++;
              if (!outcome.ok || outcome.value !== n) wrong.push([n, outcome]);
            },
          }),
        );
      }
    });
    await until(() => held.length === 20_100);
    system.tell(echo, { kind: "release" });
    await until(() => answered === 20_000);
    expect(wrong).toEqual([]);
    for (const [n, outcome] of (await Promise.all(hostOutcomes)).entries()) {
      expect(outcome).toEqual({ ok: true, value: -n });
    }
    expect(system.stats()).toMatchObject({ asks: 0, lateReplies: 0 });
  });

  it("fault 2, two turns at once after a reset: restarts, siblings included, never overlap", async () => {
    let isInTurn = false;
    let overlaps = 0;
    let handled = 0;
    const once = (run: () => void) => {
      if (isInTurn) overlaps++;
      isInTurn = true;
      try {
        run();
      } finally {
        isInTurn = false;
      }
    };
    const make = () => ({
      start: () => once(() => {}),
      receive: (n: number) =>
        once(() => {
          handled++;
          if (n % 40 === 0) throw new Error("thrown on purpose");
        }),
      stop: () => once(() => {}),
    });
    const { system } = world([
      {
        id: "all",
        strategy: "one_for_all",
        intensity: 1000,
        periodMs: 1000,
        children: [child("a", make), child("b", make)],
      },
    ]);
    for (let n = 1; n <= 200; n++) {
      for (const id of ["a", "b"]) system.tell(system.ref<number>(`root/all/${id}`), n);
    }
    await until(() => handled === 400);
    expect(overlaps).toBe(0);
    expect(system.stats().restarts).toBe(20); // Ten crashes, two children each.
  });

  it("fault 3, busy for ever after a failure passed upward: later messages are handled, all of them", async () => {
    const list: unknown[] = [];
    const { system, count } = world([
      {
        id: "branch",
        strategy: "one_for_one",
        intensity: 0,
        periodMs: 1000,
        children: [child("x", () => new Puppet(list))],
      },
    ]);
    const x = system.ref<Doing<unknown>>("root/branch/x");
    system.tell(x, {
      kind: "do",
      run: () => {
        throw new Error("thrown on purpose");
      },
    });
    for (const n of [1, 2, 3, 4]) system.tell(x, got(n));
    await until(() => list.length === 4);
    expect(list).toEqual([1, 2, 3, 4]);
    expect(count("runtime.escalated")).toBe(1);
  });

  it("fault 4, exit on throwing hooks: throws in receive, start, stop and the host's hook end nothing", async () => {
    const { system, spawn, events, fatal } = world();
    const list: unknown[] = [];
    let startsThatThrow = 0;
    const bad = spawn<string>("bad", () => ({
      start() {
        if (startsThatThrow-- > 0) throw new Error("thrown in start");
      },
      receive() {
        startsThatThrow = 2;
        throw new Error("thrown in receive");
      },
      stop() {
        throw new Error("thrown in stop");
      },
    }));
    const good = spawn<Doing<unknown>>("good", () => new Puppet(list));
    system.tell(bad, "crash");
    await until(() => events.some(({ kind }) => kind === "runtime.restarted"));
    system.stop(bad);
    events.push = () => {
      throw new Error("thrown by the host");
    };
    system.tell(bad, "to nobody");
    system.tell(good, got("alive"));
    await until(() => list.length === 1);
    expect(fatal).toEqual([new Error("thrown by the host")]);
    expect(unhandled).toEqual([]);
    expect(events.map(({ kind }) => kind)).toEqual([
      ...["runtime.crashed", "runtime.dead_letter", "runtime.start_failed", "runtime.start_failed"],
      ...["runtime.restarted", "runtime.stop_failed"],
    ]);
  });

  it("fault 5, stopped twice when it stops itself and throws: the throw counts, nothing is stopped", async () => {
    const { system, spawn, count } = world();
    let starts = 0;
    let ends = 0;
    const x = spawn<string>(
      "x",
      () => ({
        start: () => void starts++,
        receive(message, context: Context<string>) {
          context.stop(context.self);
          if (message === "throw") throw new Error("thrown on purpose");
        },
        stop: () => void ends++,
      }),
      { restart: "transient" },
    );
    system.tell(x, "throw");
    await until(() => count("runtime.restarted") === 1);
    expect([starts, ends]).toEqual([2, 0]);
    system.tell(x, "stop");
    await until(() => ends === 1);
    await turns();
    expect([starts, ends]).toEqual([2, 1]);
  });

  it("fault 6, mail that vanishes: what waits at a stop, and comes after it, is all counted", async () => {
    const { system, spawn, act } = world();
    const list: unknown[] = [];
    const x = spawn<Doing<unknown>>("x", () => new Puppet(list), { restart: "transient" });
    system.tell(x, got("handled"));
    act(x, (context) => context.stop(context.self));
    for (let n = 0; n < 10; n++) system.tell(x, got(n));
    await until(() => system.stats().cells.length === 0);
    for (let n = 0; n < 5; n++) system.tell(x, got(n));
    await turns();
    expect(list).toEqual(["handled"]);
    expect(system.stats().deadLetters).toEqual([
      { reason: "stopped", messageKind: "got", count: 15 },
    ]);
  });

  it("fault 7, asking what crashes: the asker knows at once, no clock moved", async () => {
    const { system, spawn, clock } = world();
    const x = spawn<string>("x", () => ({
      receive() {
        throw new Error("thrown on purpose");
      },
    }));
    const outcome = await system.ask<string, unknown>(x, 600_000, () => "question");
    expect(outcome).toEqual({ ok: false, failure: "crashed" });
    expect(clock.nowUs()).toBe(0);
    expect(clock.pending).toBe(0);
  });

  it("fault 8, old refs that reach a new actor of the name: a ref by uid does not", async () => {
    const { system, spawn, act } = world();
    const second: unknown[] = [];
    let old: ActorRef<Doing<unknown>> | undefined;
    const name = spawn<Doing<unknown>>("x", () => new Puppet());
    act(name, (context) => {
      old = context.self;
    });
    await until(() => old !== undefined);
    system.stop(name);
    spawn<Doing<unknown>>("x", () => new Puppet(second));
    expect(system.tell(old ?? name, got("for the first"))).toBe(false);
    system.tell(name, got("for whoever"));
    await until(() => second.length > 0);
    await turns();
    expect(second).toEqual(["for whoever"]);
  });

  it("fault 9, a ref to an actor that never began: a start that throws makes spawn throw", async () => {
    const { system, spawn, act } = world();
    const list: unknown[] = [];
    const broken = () => {
      throw new Error("thrown in the constructor");
    };
    expect(() => spawn("x", broken)).toThrow("thrown in the constructor");
    expect(system.stats().cells).toEqual([]);
    const parent = spawn<Doing<unknown>>("parent", () => new Puppet(list));
    act(parent, (context) => {
      const ref = context.spawn("root", child("x", broken));
      context.watch(ref, (end) => got(end.reason));
      context.ask(ref, 1000, () => "question", got);
    });
    await until(() => list.length === 2);
    expect(list).toEqual(["noproc", { ok: false, failure: "noroute" }]);
    spawn("x", () => new Puppet());
  });

  it("fault 10, state lost when a behaviour returns nothing: state is the actor's own", async () => {
    const { system, spawn } = world();
    type Sum = { kind: "add" } | { kind: "read"; replyTo: ReplyTo<number> };
    const x = spawn<Sum>("x", () => {
      let sum = 0;
      return {
        receive(message, context) {
          if (message.kind === "add") sum++;
          else context.reply(message.replyTo, sum);
        },
      };
    });
    for (let n = 0; n < 3; n++) system.tell(x, { kind: "add" });
    const outcome = await system.ask<Sum, number>(x, 10, (replyTo) => ({ kind: "read", replyTo }));
    expect(outcome).toEqual({ ok: true, value: 3 });
  });

  it("fault 11, restarts without limit: a poisoned mailbox is worked off with back-off, siblings unhurt", async () => {
    const { system, spawn, clock, count } = world();
    const list: unknown[] = [];
    let starts = 0;
    const bad = spawn<number>(
      "bad",
      () => ({
        start: () => void starts++,
        receive() {
          throw new Error("thrown on purpose");
        },
      }),
      { mailbox: { max: 20_000, overflow: { kind: "reject" } } },
    );
    const good = spawn<Doing<unknown>>("good", () => new Puppet(list));
    for (let n = 0; n < 20_000; n++) system.tell(bad, n);
    system.tell(good, got("alive"));
    await until(() => system.stats().parked === 1 && list.length === 1);
    await turns();
    expect(starts).toBe(6); // The first and five restarts, then parked.
    expect(count("runtime.crashed")).toBe(6);
    const { mailboxDepth } = system.stats().cells.find(({ path }) => path === "root/bad") ?? {};
    expect(mailboxDepth).toBe(19_994);
    clock.advanceToNext();
    await until(() => count("runtime.parked") === 2);
    expect(starts).toBe(7);
  });

  it("fault 12, a message after the stop: a cell that was woken handles nothing once it is stopped", async () => {
    const { system, spawn } = world();
    const list: unknown[] = [];
    const x = spawn<Doing<unknown>>("x", () => new Puppet(list));
    for (let n = 0; n < 3; n++) system.tell(x, got(n)); // Woken, and nact has the wake-up in hand.
    system.stop(x);
    spawn<Doing<unknown>>("x", () => new Puppet(list)); // Not by the next actor of the name either.
    await turns();
    expect(list).toEqual([]);
    expect(system.stats().deadLetters).toEqual([
      { reason: "stopped", messageKind: "got", count: 3 },
    ]);
  });

  it("under load: every one of 100 000 messages between 100 actors arrives, none stops receiving", async () => {
    const { system, spawn } = world();
    const actors = 100;
    const handled = new Array<number>(actors).fill(0);
    let total = 0;
    for (let index = 0; index < actors; index++) {
      spawn<number>(`a${index}`, () => ({
        receive(left, context) {
          handled[index] = (handled[index] ?? 0) + 1;
          total++;
          const to: ActorRef<number> = { path: `root/a${(index * 7 + left) % actors}`, uid: 0 };
          if (left > 0) context.tell(to, left - 1);
        },
      }));
    }
    for (let index = 0; index < actors; index++)
      system.tell(system.ref<number>(`root/a${index}`), 999);
    await until(() => total === 100_000);
    await turns();
    expect(total).toBe(100_000);
    expect(Math.min(...handled)).toBeGreaterThan(0);
    expect(system.stats().deadLetters).toEqual([]);
  });

  it("trap: a constructor that throws leaves no zombie (its supervisor still stops, the id is free)", async () => {
    const { system, spawn } = world();
    const broken = () => {
      throw new Error("thrown in the constructor");
    };
    expect(() => spawn("x", broken)).toThrow("thrown in the constructor");
    const list: unknown[] = [];
    system.tell(
      spawn<Doing<unknown>>("x", () => new Puppet(list)),
      got("alive"),
    );
    await until(() => list.length === 1);
    system.stopAll();
    expect(system.stats().cells).toEqual([]);
  });

  it("trap: stopping with mail in the box does not spin", async () => {
    const { system, spawn, act } = world();
    let runs = 0;
    const x = spawn<Doing<unknown>>("x", () => new Puppet(), { restart: "temporary" });
    act(x, (context) => context.stop(context.self));
    for (let n = 0; n < 1000; n++) act(x, () => runs++);
    await until(() => system.stats().cells.length === 0);
    await turns();
    const before = immediates;
    await turns();
    expect(runs).toBe(0);
    expect(immediates).toBe(before); // Nobody asks for another turn.
  });

  it("trap: no restart without a report of the error, and none for a restart that was not one", async () => {
    const { system, spawn, crash, events, count } = world();
    const x = spawn<Doing<unknown>>("x", () => new Puppet());
    crash(x);
    await until(() => count("runtime.restarted") === 1);
    const [crashed] = events;
    expect(crashed).toMatchObject({ kind: "runtime.crashed", path: "root/x", messageKind: "do" });
    expect(crashed).toHaveProperty("error", new Error("thrown on purpose"));
    system.stop(x);
    expect(count("runtime.restarted")).toBe(1);
  });

  it("trap: one child's restarts do not use up its sibling's", async () => {
    const { system, spawn, crash, count } = world();
    const bad = spawn<Doing<unknown>>("bad", () => new Puppet());
    const good = spawn<Doing<unknown>>("good", () => new Puppet());
    for (let n = 0; n < 6; n++) crash(bad);
    await until(() => system.stats().parked === 1);
    crash(good);
    await until(() => count("runtime.restarted") === 6);
    expect(system.stats().cells.find(({ path }) => path === "root/good")).toMatchObject({
      ...{ isRunning: true, restarts: 1 },
    });
  });

  it("trap: a full mailbox never throws into the sender", async () => {
    const { system, spawn, act, count } = world();
    const list: unknown[] = [];
    const small = { mailbox: { max: 2, overflow: { kind: "reject" } } } as const;
    const slow = spawn<Doing<unknown>>("slow", () => new Puppet(list), small);
    const sender = spawn<Doing<unknown>>("sender", () => new Puppet(list));
    act(sender, (context) => {
      for (let n = 0; n < 5; n++) context.tell(slow, got(n));
      context.ask(slow, 10, () => got("question"), got);
    });
    await until(() => list.length === 3);
    expect(list).toContainEqual({ ok: false, failure: "busy" });
    expect(count("runtime.crashed")).toBe(0);
    expect(system.stats().deadLetters).toEqual([{ reason: "full", messageKind: "got", count: 4 }]);
  });

  it("trap: stopping is not cut short, however long a stop takes and however many there are", () => {
    const { system, spawn, fatal } = world();
    let stopped = 0;
    for (let index = 0; index < 500; index++) {
      spawn(`a${index}`, () => ({
        receive() {},
        stop() {
          for (let n = 0; n < 10_000; n++) Math.sqrt(n);
          stopped++;
        },
      }));
    }
    system.stopAll();
    expect(stopped).toBe(500);
    expect(fatal).toEqual([]);
  });

  it("ids: any text without a slash is a good id (nact allows few characters)", async () => {
    const ids = ["10.0.0.1:8000", "a b", "ü€😀", "$", "$36$", "A", "a", "%2F"];
    const { system, spawn } = world();
    const list: string[] = [];
    for (const id of ids) spawn<string>(id, () => ({ receive: (text) => void list.push(text) }));
    for (const id of ids) system.tell(system.ref<string>(`root/${id}`), id);
    await until(() => list.length === ids.length);
    expect(list.toSorted()).toEqual(ids.toSorted());
  });

  it("turn: the event loop gets its share while thousands of messages wait", async () => {
    const { system, spawn } = world();
    let handled = 0;
    const max = { mailbox: { max: 50_000, overflow: { kind: "reject" } } } as const;
    const x = spawn<number>("x", () => ({ receive: () => void handled++ }), max);
    for (let n = 0; n < 50_000; n++) system.tell(x, n);
    let most = 0;
    while (handled < 50_000) {
      const before = handled;
      await turns(1);
      most = Math.max(most, handled - before);
    }
    expect(most).toBeGreaterThan(0);
    expect(most).toBeLessThanOrEqual(mode === "dispatcher" ? 2 * 2048 : 2 * 256);
  });

  it("turn: one busy cell does not starve another", async () => {
    const { system, spawn } = world();
    let handled = 0;
    let handledBefore = -1;
    const max = { mailbox: { max: 50_000, overflow: { kind: "reject" } } } as const;
    const busy = spawn<number>("busy", () => ({ receive: () => void handled++ }), max);
    const other = spawn<number>("other", () => ({
      receive() {
        handledBefore = handled;
      },
    }));
    for (let n = 0; n < 50_000; n++) system.tell(busy, n);
    system.tell(other, 0);
    await until(() => handledBefore >= 0);
    expect(handledBefore).toBeLessThanOrEqual(mode === "dispatcher" ? 32 : 2 * 256);
  });

  it("fault of the runtime itself: goes out of the event loop, to end the process", async () => {
    const scheduler = new NactScheduler({ mode, clock: new SimClock() });
    const broken: Runnable = {
      path: "root/broken",
      isAwake: false,
      run() {
        throw new Error("the runtime is broken");
      },
    };
    scheduler.opened(broken);
    scheduler.wake(broken);
    await turns();
    expect(unhandled).toEqual([new Error("the runtime is broken")]);
    scheduler.shutdown();
  });
});
