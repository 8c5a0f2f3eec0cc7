import { describe, expect, it } from "vitest";
import type { ActorRef, AskOutcome, Context, ReplyTo, Terminated } from "../runtime/actor.ts";
import type { Envelope } from "../runtime/system.ts";
import {
  child,
  type Doing,
  Puppet,
  smallWorld,
  type World,
  type WorldOptions,
} from "./small-world.ts";

type Hand = Context<Doing<unknown>>;

/** Two puppets "a" and "b" that note what they get, and a way to make "a" act. */
function pair(options: WorldOptions & { mailbox?: Parameters<typeof child>[2] } = {}) {
  const a: unknown[] = [];
  const b: unknown[] = [];
  const world = smallWorld(
    [child("a", () => new Puppet(a)), child("b", () => new Puppet(b), options.mailbox ?? {})],
    options,
  );
  const refA = world.system.ref<Doing<unknown>>("root/a");
  const refB = world.system.ref<Doing<unknown>>("root/b");
  const act = (run: (context: Hand) => void, who = refA) => {
    world.system.tell(who, { kind: "do", run });
  };
  return { ...world, a, b, refA, refB, act };
}

const got = (what: unknown): Doing<unknown> => ({ kind: "got", what });

function deadLetters({ system }: Pick<World, "system">): string[] {
  return system.stats().deadLetters.map((one) => `${one.reason} ${one.messageKind} ${one.count}`);
}

describe("turn", () => {
  it("effects: are released when the turn ends, in order", () => {
    const { act, b, refB, scheduler, events } = pair();
    act((context) => {
      context.tell(refB, got(1));
      context.emit({ kind: "test.happened" });
      context.tell(refB, got(2));
      expect(b).toEqual([]);
      expect(events).toEqual([]);
    });
    scheduler.runReady();
    expect(b).toEqual([1, 2]);
    expect(events).toEqual([{ kind: "test.happened" }]);
  });

  it("effects: none happens when the turn throws", () => {
    const { act, a, b, refB, scheduler, clock, system, kinds } = pair();
    act((context) => {
      context.tell(refB, got("never"));
      context.startTimer("t", 1, got("never"));
      context.watch(refB, (end) => got(end));
      context.ask<Doing<unknown>, unknown>(refB, 5, () => got("never"), got);
      context.spawn(
        "root",
        child("c", () => new Puppet()),
      );
      context.stop(refB);
      context.emit({ kind: "test.never" });
      throw new Error("thrown on purpose");
    });
    act((context) => context.tell(refB, got("later turn")));
    scheduler.runUntilIdle();
    expect(b).toEqual(["later turn"]);
    expect(a).toEqual([]);
    expect(clock.nowUs()).toBe(0);
    expect(system.stats().cells.map(({ path }) => path)).toEqual(["root/a", "root/b"]);
    expect(kinds("root/a")).toEqual([
      "runtime.crashed",
      "runtime.dead_letter",
      "runtime.restarted",
    ]);
  });

  it("time: stands still during a turn and is exact to the µs", () => {
    const { act, a, scheduler } = pair();
    act((context) =>
      context.startTimer("t", 1.2345, {
        kind: "do",
        run: (later) => {
          a.push(later.nowMs, later.nowMs);
        },
      }),
    );
    scheduler.runUntilIdle();
    expect(a).toEqual([1.235, 1.235]);
  });

  it("context: refuses work outside its own turn", () => {
    const { act, refA, refB, scheduler } = pair();
    let kept: Hand | undefined;
    act((context) => {
      kept = context;
    });
    scheduler.runReady();
    expect(() => kept?.tell(refA, got(1))).toThrow("context of root/a used outside its turn");
    expect(() => kept?.nowMs).toThrow("outside its turn");
    let thrown: unknown;
    act(() => {
      try {
        kept?.random();
      } catch (error) {
        thrown = error;
      }
    }, refB);
    scheduler.runReady();
    expect(thrown).toBeInstanceOf(Error);
  });

  it("randomness: an actor's draws depend on seed and path, not on its neighbours", () => {
    const drawsOf = (ids: string[], seed: number) => {
      const draws = new Map<string, number[]>();
      const world = smallWorld(
        ids.map((id) => child(id, () => new Puppet())),
        { seed },
      );
      for (const id of ids) {
        const run = (context: Hand) => {
          draws.set(id, [context.random(), context.random()]);
        };
        world.system.tell(world.system.ref<Doing<unknown>>(`root/${id}`), { kind: "do", run });
      }
      world.scheduler.runUntilIdle();
      return draws;
    };
    expect(drawsOf(["x", "y"], 1).get("y")).toEqual(drawsOf(["y"], 1).get("y"));
    expect(drawsOf(["y"], 1).get("y")).not.toEqual(drawsOf(["y"], 2).get("y"));
    expect(drawsOf(["x", "y"], 1).get("x")).not.toEqual(drawsOf(["x", "y"], 1).get("y"));
  });

  it("invalid delays: are bugs of the actor that asked", () => {
    for (const bad of [-1, Number.NaN, Number.POSITIVE_INFINITY]) {
      const { act, refB, scheduler, kinds } = pair();
      act((context) => context.startTimer("t", bad, got(1)));
      act((context) => context.ask(refB, bad, () => got(1), got));
      act((context) => context.ask(refB, 0, () => got(1), got));
      scheduler.runReady();
      expect(kinds("root/a").filter((kind) => kind === "runtime.crashed")).toHaveLength(3);
    }
  });
});

describe("refs", () => {
  it("JSON: a ref is its path and uid, and works after the trip", () => {
    const { act, a, b, refB, scheduler, system } = pair();
    let self: unknown;
    act((context) => {
      self = JSON.parse(JSON.stringify(context.self));
    });
    scheduler.runReady();
    expect(self).toEqual({ path: "root/a", uid: expect.any(Number) });
    expect(JSON.stringify(refB)).toBe('{"path":"root/b","uid":0}');
    system.tell(self as ActorRef<Doing<unknown>>, got("by uid"));
    act((context) => context.tell({ path: "root/b", uid: 0 }, got("by name")));
    scheduler.runReady();
    expect(a).toEqual(["by uid"]);
    expect(b).toEqual(["by name"]);
  });

  it("uid: reaches only that incarnation, a name whoever lives there (respawn under the same id)", () => {
    const { act, scheduler, system } = pair();
    const first: unknown[] = [];
    const second: unknown[] = [];
    const name = system.spawn(
      "root",
      child("c", () => new Puppet(first)),
    );
    let old: ActorRef<Doing<unknown>> = { path: "", uid: 0 };
    act((context) => {
      old = context.self;
    }, name);
    scheduler.runReady();
    system.stop(name);
    system.spawn(
      "root",
      child("c", () => new Puppet(second)),
    );
    expect(system.tell(old, got("to the dead"))).toBe(false);
    expect(system.tell({ ...old }, got("to the dead, as data"))).toBe(false);
    expect(system.tell(name, got("to the living"))).toBe(true);
    scheduler.runReady();
    expect([first, second]).toEqual([[], ["to the living"]]);
    expect(deadLetters({ system })).toEqual(["stopped got 2"]);
  });

  it("uid: ends with a restart, also for mail that waits already; mail by name is kept", () => {
    const { act, b, refB, scheduler, system } = pair();
    let old: ActorRef<Doing<unknown>> = { path: "", uid: 0 };
    act((context) => {
      old = context.self;
    }, refB);
    scheduler.runReady();
    act(() => {
      throw new Error("thrown on purpose");
    }, refB);
    system.tell(old, got("by uid"));
    system.tell(refB, got("by name"));
    scheduler.runReady();
    expect(b).toEqual(["by name"]);
    expect(deadLetters({ system })).toEqual(["crashed do 1", "stopped got 1"]);
  });

  it("systems: a ref that led somewhere in one leads to the same path in another", () => {
    const one = pair();
    const two = pair();
    one.system.tell(one.refB, got("in one"));
    two.system.tell(one.refB, got("in two, by a ref of one"));
    one.scheduler.runReady();
    two.scheduler.runReady();
    expect(one.b).toEqual(["in one"]);
    expect(two.b).toEqual(["in two, by a ref of one"]);
  });
});

describe("mailbox", () => {
  const full = (overflow: NonNullable<ReturnType<typeof child>["mailbox"]>["overflow"]) =>
    pair({ mailbox: { mailbox: { max: 3, overflow } } });

  it("reject: the new message is refused, the sender is told and unharmed", () => {
    const { b, refB, scheduler, system } = full({ kind: "reject" });
    expect([1, 2, 3, 4, 5].map((n) => system.tell(refB, got(n)))).toEqual([
      ...[true, true, true],
      ...[false, false],
    ]);
    scheduler.runReady();
    expect(b).toEqual([1, 2, 3]);
    expect(deadLetters({ system })).toEqual(["full got 2"]);
  });

  it("drop_oldest: the newest stay, notices are never dropped for them", () => {
    const { act, b, refA, refB, scheduler, system } = full({ kind: "drop_oldest" });
    act((context) => context.watch(refA, (end) => got(end.reason)), refB);
    scheduler.runReady();
    system.stop(refA); // The notice of its end is now the oldest mail of b.
    for (const n of [1, 2, 3, 4, 5]) system.tell(refB, got(n));
    scheduler.runReady();
    expect(b).toEqual(["stopped", 3, 4, 5]);
    expect(deadLetters({ system })).toEqual(["full got 2"]);
  });

  it("conflate: the latest of each key stays in the place of the first; without a key it is refused", () => {
    const { b, refB, scheduler, system } = full({
      kind: "conflate",
      key: (message: unknown) => {
        const { what } = message as { what: string };
        return what.startsWith("?") ? undefined : what[0];
      },
    });
    for (const what of ["x1", "y1", "?", "x2", "?", "y2", "z1", "x3"]) system.tell(refB, got(what));
    scheduler.runReady();
    expect(b).toEqual(["x3", "y2", "?"]);
    expect(deadLetters({ system })).toEqual(["full got 5"]);
    // What was handled is no key any more.
    expect(["a", "b", "c", "x4"].map((what) => system.tell(refB, got(what)))).toEqual([
      ...[true, true, true, false],
    ]);
  });

  it("ask: one that is dropped for another ends as busy", async () => {
    const { refB, scheduler, system } = full({ kind: "drop_oldest" });
    const outcome = system.ask<Doing<unknown>, number>(refB, 100, () => got("question"));
    for (const n of [1, 2, 3]) system.tell(refB, got(n));
    expect(await outcome).toEqual({ ok: false, failure: "busy" });
    scheduler.runUntilIdle();
  });

  it.each([0, -1, 1.5])("max: %d is refused", (max) => {
    const mailbox = { max, overflow: { kind: "reject" } } as const;
    expect(() => smallWorld([child("a", () => new Puppet(), { mailbox })])).toThrow(
      "whole number from 1",
    );
  });
});

describe("dead letters", () => {
  it("reasons: noroute for a path never taken, stopped for one that was", () => {
    const { refB, system, scheduler, events } = pair();
    system.tell(system.ref<Doing<unknown>>("root/nobody"), got(1));
    system.tell(system.ref<Doing<unknown>>("root"), got(1)); // A supervisor takes no mail.
    system.tell(refB, got("waits when b is stopped"));
    system.stop(refB);
    system.tell(refB, got("too late"));
    scheduler.runReady();
    expect(deadLetters({ system })).toEqual(["noroute got 2", "stopped got 2"]);
    expect(system.recentDeadLetters().at(-1)).toEqual({
      ...{ to: "root/b", uid: 0, from: "", reason: "stopped", messageKind: "got", atUs: 0 },
    });
    expect(events).toHaveLength(4);
  });

  it("bounds: the last 1000 are kept, all are counted, kinds beyond 1000 together", () => {
    const { system } = pair();
    const nobody = system.ref<{ kind: string }>("root/nobody");
    for (let index = 0; index < 1500; index++) system.tell(nobody, { kind: `kind ${index}` });
    expect(system.recentDeadLetters()).toHaveLength(1000);
    expect(system.recentDeadLetters()[0]?.messageKind).toBe("kind 500");
    const { deadLetters: counts } = system.stats();
    expect(counts.reduce((sum, { count }) => sum + count, 0)).toBe(1500);
    expect(counts.find(({ messageKind }) => messageKind === "other")?.count).toBe(500);
  });

  it("content: the message itself is not kept", () => {
    const { system, events } = pair();
    const secret = { kind: "test.secret", text: "do not keep me" };
    system.tell(system.ref<typeof secret>("root/nobody"), secret);
    expect(JSON.stringify([system.recentDeadLetters(), events])).not.toContain("do not keep");
  });
});

describe("ask", () => {
  type Question = { kind: "do"; run: (context: Hand) => void };
  const question =
    (run: (context: Hand, replyTo: ReplyTo<unknown>) => void) =>
    (replyTo: ReplyTo<unknown>): Question => ({
      kind: "do",
      run: (context) => run(context, replyTo),
    });

  it("reply: comes back adapted, now or from a later turn", () => {
    const { act, a, refB, scheduler } = pair();
    act((context) => {
      const now = question((callee, replyTo) => callee.reply(replyTo, "now"));
      const later = question((callee, replyTo) =>
        callee.startTimer("t", 3, {
          kind: "do",
          run: (then: Hand) => then.reply(replyTo, "later"),
        }),
      );
      context.ask<Doing<unknown>, unknown>(refB, 10, now, got);
      context.ask<Doing<unknown>, unknown>(refB, 10, later, got);
    });
    scheduler.runUntilIdle();
    expect(a).toEqual([
      { ok: true, value: "now" },
      { ok: true, value: "later" },
    ]);
  });

  it("reply: keeps its place behind what the callee told before", () => {
    const { act, a, refA, refB, scheduler } = pair();
    act((context) =>
      context.ask<Doing<unknown>, unknown>(
        refB,
        10,
        question((callee, replyTo) => {
          callee.tell(refA, got("told before"));
          callee.reply(replyTo, "answer");
          callee.tell(refA, got("told after"));
        }),
        got,
      ),
    );
    scheduler.runUntilIdle();
    expect(a).toEqual(["told before", { ok: true, value: "answer" }, "told after"]);
  });

  it("failures: each has its own reason, at once", () => {
    const { act, a, refB, scheduler, clock, system } = pair();
    const nobody = system.ref<Doing<unknown>>("root/nobody");
    const ask = (
      to: ActorRef<Doing<unknown>>,
      run: (context: Hand, replyTo: ReplyTo<unknown>) => void,
    ) => act((context) => context.ask<Doing<unknown>, unknown>(to, 50, question(run), got));
    ask(nobody, () => {});
    scheduler.runReady();
    ask(refB, () => {
      throw new Error("thrown on purpose");
    });
    scheduler.runReady();
    ask(refB, (callee) => callee.stop({ path: "root/b", uid: 0 })); // Holds the question, then stops.
    scheduler.runReady();
    expect(a).toEqual(["noroute", "crashed", "stopped"].map((failure) => ({ ok: false, failure })));
    expect(clock.nowUs()).toBe(0);
  });

  it("crash: questions the actor had taken in end too, those still waiting are kept", async () => {
    const { act, a, refB, scheduler, system } = pair();
    const takenIn = question(() => {}); // To be answered later.
    act((context) => context.ask<Doing<unknown>, unknown>(refB, 50, takenIn, got));
    scheduler.runReady();
    act(() => {
      throw new Error("thrown on purpose");
    }, refB);
    const answered = question((callee, replyTo) => callee.reply(replyTo, "by the next one"));
    const waiting = system.ask<Doing<unknown>, unknown>(refB, 50, answered);
    scheduler.runReady();
    expect(a).toEqual([{ ok: false, failure: "crashed" }]);
    expect(await waiting).toEqual({ ok: true, value: "by the next one" });
  });

  it("asker stopped by its own turn: the question is a dead letter, nothing stays open", () => {
    const b: unknown[] = [];
    const asker = child("asker", () => new Puppet());
    const { system, scheduler } = smallWorld([
      { id: "branch", strategy: "one_for_one", intensity: 1, periodMs: 1000, children: [asker] },
      child("b", () => new Puppet(b)),
    ]);
    const refB = system.ref<Doing<unknown>>("root/b");
    system.tell<Doing<unknown>>(system.ref("root/branch/asker"), {
      kind: "do",
      run: (context) => {
        context.tell(refB, got("told before"));
        context.stop({ path: "root/branch", uid: 0 }); // Takes the asker along.
        context.ask<Doing<unknown>, unknown>(refB, 50, () => got("asked"), got);
        context.tell(refB, got("told after"));
      },
    });
    scheduler.runReady();
    expect(b).toEqual(["told before", "told after"]);
    expect(system.stats().asks).toBe(0);
    expect(deadLetters({ system })).toEqual(["stopped got 1"]);
  });

  it("reply and crash in one turn: the asker learns of the crash alone", () => {
    const { act, a, refB, scheduler, system } = pair();
    act((context) =>
      context.ask<Doing<unknown>, unknown>(
        refB,
        50,
        question((callee, replyTo) => {
          callee.reply(replyTo, "never sent");
          throw new Error("thrown on purpose");
        }),
        got,
      ),
    );
    scheduler.runUntilIdle();
    expect(a).toEqual([{ ok: false, failure: "crashed" }]);
    expect(system.stats().lateReplies).toBe(0);
  });

  it("timeout: at the exact instant; a later reply is counted and dropped", () => {
    const { act, a, refB, scheduler, clock, system } = pair();
    act((context) =>
      context.ask<Doing<unknown>, unknown>(
        refB,
        7.5,
        question((callee, replyTo) =>
          callee.startTimer("t", 9, { kind: "do", run: (late: Hand) => late.reply(replyTo, 1) }),
        ),
        (outcome) => got([outcome, clock.nowUs()]),
      ),
    );
    scheduler.runUntilIdle();
    expect(a).toEqual([[{ ok: false, failure: "timeout" }, 7500]]);
    expect(system.stats()).toMatchObject({ asks: 0, lateReplies: 1 });
  });

  it("second reply: is counted and dropped", () => {
    const { act, a, refB, scheduler, system } = pair();
    act((context) =>
      context.ask<Doing<unknown>, unknown>(
        refB,
        10,
        question((callee, replyTo) => {
          callee.reply({ asker: "root/somebody else", askId: replyTo.askId }, 3);
          callee.reply(replyTo, 1);
          callee.reply(replyTo, 2);
        }),
        got,
      ),
    );
    scheduler.runUntilIdle();
    expect(a).toEqual([{ ok: true, value: 1 }]);
    expect(system.stats().lateReplies).toBe(2);
  });

  it("deadline: travels with the question; an expired one is not handled (asker waits, callee is busy)", () => {
    let crashes = 0;
    const { act, a, b, refB, scheduler, clock, system } = pair();
    // b is parked for at least 160 ms: its mail waits longer than the question is good for.
    for (let n = 0; n < 6; n++) {
      act(() => {
        crashes++;
        throw new Error("thrown on purpose");
      }, refB);
    }
    scheduler.runReady();
    expect(system.stats().parked).toBe(1);
    act((context) => {
      const expired = question(() => b.push("expired question handled"));
      context.ask<Doing<unknown>, unknown>(refB, 10, expired, got);
    });
    scheduler.runUntilIdle();
    expect(crashes).toBe(6);
    expect(b).toEqual([]);
    expect(a).toEqual([{ ok: false, failure: "timeout" }]);
    expect(clock.nowUs()).toBeGreaterThanOrEqual(160_000);
    expect(deadLetters({ system })).toEqual(["crashed do 6", "expired do 1"]);
  });

  it("restart: the outcome does not reach the next incarnation of the asker", () => {
    const { act, a, refA, refB, scheduler, system } = pair();
    act((context) => {
      const answer = question((callee, replyTo) =>
        callee.startTimer("t", 5, { kind: "do", run: (later: Hand) => later.reply(replyTo, 1) }),
      );
      context.ask<Doing<unknown>, unknown>(refB, 10, answer, got);
      context.ask<Doing<unknown>, unknown>(
        refB,
        3,
        question(() => {}),
        got,
      );
    });
    scheduler.runReady();
    act(() => {
      throw new Error("thrown on purpose");
    }, refA);
    scheduler.runUntilIdle();
    expect(a).toEqual([]);
    expect(system.stats()).toMatchObject({ asks: 0, lateReplies: 1 });
  });

  it("host: gets the same outcomes as a promise", async () => {
    const { refB, scheduler, system, act } = pair();
    const ask = (to: ActorRef<Doing<unknown>>, run: Parameters<typeof question>[0]) =>
      system.ask<Doing<unknown>, unknown>(to, 20, question(run));
    const outcomes: Promise<AskOutcome<unknown>>[] = [
      ask(refB, (callee, replyTo) => callee.reply(replyTo, 42)),
      ask(refB, () => {}),
      ask(system.ref("root/nobody"), () => {}),
    ];
    scheduler.runUntilIdle();
    outcomes.push(ask(refB, () => {}));
    act((context) => context.stop(refB), refB);
    system.stopAll();
    outcomes.push(ask(refB, () => {}));
    expect(await Promise.all(outcomes)).toEqual([
      { ok: true, value: 42 },
      { ok: false, failure: "timeout" },
      { ok: false, failure: "noroute" },
      { ok: false, failure: "stopped" },
      { ok: false, failure: "stopped" },
    ]);
  });
});

describe("timers", () => {
  it("key: starting again replaces, cancelling ends it, also when it is due and waits", () => {
    const { act, a, refA, scheduler, clock } = pair();
    act((context) => {
      context.startTimer("twice", 5, got("replaced"));
      context.startTimer("twice", 6, got("twice"));
      context.startTimer("cancelled", 5, got("cancelled"));
      context.cancelTimer("cancelled");
      context.startTimer("x", 7, { kind: "do", run: (then) => then.cancelTimer("y") });
      context.startTimer("y", 7, got("due, but cancelled by x at the same instant"));
    });
    scheduler.runReady();
    clock.advanceToNext(); // "twice" is due and waits in the mailbox.
    act((context) => context.startTimer("twice", 20, got("twice again")), refA);
    scheduler.runUntilIdle();
    expect(a).toEqual(["twice", "twice again"]);
  });

  it("due and waiting: replaced before it was handled, only the new one comes", () => {
    const { act, a, scheduler, clock, system, refA } = pair();
    act((context) => {
      context.startTimer("first", 5, {
        kind: "do",
        run: (then) => then.startTimer("second", 5, got("new")),
      });
      context.startTimer("second", 5, got("old"));
    });
    scheduler.runReady();
    clock.advanceToNext();
    clock.advanceToNext(); // Both are due before either is handled.
    system.tell(refA, got("mail"));
    scheduler.runUntilIdle();
    expect(a).toEqual(["mail", "new"]);
  });

  it("crash and stop: no timer of the old incarnation fires, not even one that is due", () => {
    for (const end of ["crash", "stop"] as const) {
      const { act, a, scheduler, clock, refA, system } = pair();
      act((context) => {
        context.startTimer("crash", 5, {
          kind: "do",
          run: () => {
            throw new Error("thrown on purpose");
          },
        });
        context.startTimer("due", 5, got("never"));
        context.startTimer("later", 50, got("never"));
      });
      scheduler.runReady();
      clock.advanceToNext();
      clock.advanceToNext(); // Both are due and wait.
      if (end === "stop") system.stop(refA);
      scheduler.runUntilIdle();
      expect(a).toEqual([]);
      expect(clock.nowUs()).toBe(5000);
      expect(system.stats().restarts).toBe(end === "crash" ? 1 : 0);
    }
  });

  it("due: overtakes the mail that waits", () => {
    const { act, a, refA, scheduler, clock, system } = pair();
    act((context) => context.startTimer("t", 5, got("timer")));
    scheduler.runReady();
    system.tell(refA, got("mail"));
    clock.advanceToNext();
    scheduler.runReady();
    expect(a).toEqual(["timer", "mail"]);
  });
});

describe("watch", () => {
  const ends = (list: unknown[]) => list.map((one) => (one as Terminated).reason);

  it("end: told once, after everything the target sent", () => {
    const { act, a, refA, refB, scheduler } = pair();
    act((context) => context.watch(refB, got));
    scheduler.runReady();
    act((context) => {
      context.tell(refA, got("last words"));
      context.stop(refB);
      context.tell(refA, got("very last words"));
    }, refB);
    scheduler.runReady();
    // b is permanent: it came back, as somebody else.
    expect(a).toEqual([
      "last words",
      "very last words",
      { path: "root/b", uid: expect.any(Number), reason: "stopped" },
    ]);
  });

  it("reasons: failed for a crash, noproc when nobody is there, also by an old uid", () => {
    const { act, a, refB, scheduler } = pair();
    let old: ActorRef<Doing<unknown>> = { path: "", uid: 0 };
    act((context) => {
      old = context.self;
    }, refB);
    act((context) => {
      context.watch(refB, got);
      context.watch({ path: "root/nobody", uid: 0 }, got);
    });
    scheduler.runReady();
    act(() => {
      throw new Error("thrown on purpose");
    }, refB);
    scheduler.runReady();
    act((context) => context.watch(old, got));
    scheduler.runReady();
    expect(ends(a)).toEqual(["noproc", "failed", "noproc"]);
  });

  it("twice: watching an incarnation again replaces, the end comes once", () => {
    const { act, a, refB, scheduler, system } = pair();
    act((context) => {
      context.watch(refB, () => got("first"));
      context.watch(refB, () => got("second"));
    });
    scheduler.runReady();
    system.stop(refB);
    scheduler.runReady();
    expect(a).toEqual(["second"]);
  });

  it("unwatch: nothing comes any more, also when the end waits already", () => {
    const { act, a, refA, refB, scheduler, system } = pair();
    act((context) => context.watch(refB, got));
    scheduler.runReady();
    act((context) => context.unwatch(refB), refA);
    system.stop(refB); // Its notice waits behind the message that unwatches.
    scheduler.runReady();
    expect(a).toEqual([]);
  });

  it("watcher: after its restart it is told nothing", () => {
    const { act, a, refB, scheduler, system } = pair();
    act((context) => context.watch(refB, got));
    act(() => {
      throw new Error("thrown on purpose");
    });
    scheduler.runReady();
    system.stop(refB);
    scheduler.runReady();
    expect(a).toEqual([]);
  });
});

describe("spawn and stop", () => {
  it("spawn: the child lives when the turn ends, under the supervisor named", () => {
    const { act, a, refA, scheduler, system } = pair();
    const born: unknown[] = [];
    act((context) => {
      const name = context.spawn(
        "root",
        child("c", () => new Puppet(born)),
      );
      expect(name).toMatchObject({ path: "root/c", uid: 0 });
      context.tell(name, got("hello"));
      expect(() =>
        context.spawn(
          "root",
          child("c", () => new Puppet()),
        ),
      ).toThrow("root/c is taken");
      expect(() =>
        context.spawn(
          "root",
          child("b", () => new Puppet()),
        ),
      ).toThrow("is taken");
      expect(() =>
        context.spawn(
          "root/a",
          child("d", () => new Puppet()),
        ),
      ).toThrow("no supervisor at root/a");
      context.tell(refA, got("turn went on"));
    });
    scheduler.runReady();
    expect(born).toEqual(["hello"]);
    expect(a).toEqual(["turn went on"]);
    expect(system.stats().cells.map(({ path }) => path)).toContain("root/c");
  });

  it("spawn: a start that throws leaves no zombie, and the id is free again", () => {
    const { act, scheduler, system, kinds, fatal } = pair();
    const broken = child("c", () => {
      throw new Error("thrown in the constructor");
    });
    const brokenLater = child("c", () => ({
      start(context: Hand) {
        context.startTimer("t", 5, got("never"));
        context.tell(system.ref<Doing<unknown>>("root/a"), got("never"));
        throw new Error("thrown in start");
      },
      receive() {},
    }));
    act((context) => {
      const ref = context.spawn("root", broken);
      context.watch(ref, (end) => got(end.reason));
    });
    scheduler.runReady();
    expect(kinds("root/c")).toEqual(["runtime.start_failed"]);
    expect(() => system.spawn("root", broken)).toThrow("thrown in the constructor");
    expect(() => system.spawn("root", brokenLater)).toThrow("thrown in start");
    expect(system.stats().cells.map(({ path }) => path)).toEqual(["root/a", "root/b"]);
    const born: unknown[] = [];
    system.tell(
      system.spawn(
        "root",
        child("c", () => new Puppet(born)),
      ),
      got("alive"),
    );
    scheduler.runUntilIdle();
    expect(born).toEqual(["alive"]);
    expect(fatal).toEqual([]);
  });

  it("stop: runs the behaviour's stop once, its effects included, and loses what waits", () => {
    const { a, scheduler, system, refA } = pair();
    let stops = 0;
    const name = system.spawn(
      "root",
      child("c", () => ({
        receive() {},
        stop(context: Hand) {
          stops++;
          context.tell(refA, got("goodbye"));
          context.stop(context.self); // Stopping again while stopping changes nothing.
        },
      })),
    );
    system.tell(name, got("never handled"));
    system.stop(name);
    system.stop(name);
    scheduler.runUntilIdle();
    expect(stops).toBe(1);
    expect(a).toEqual(["goodbye"]);
    expect(deadLetters({ system })).toEqual(["stopped got 1"]);
  });

  it("stop: a stop that throws is reported, and the actor is stopped all the same", () => {
    const { system, kinds } = pair();
    const name = system.spawn(
      "root",
      child("c", () => ({
        receive() {},
        stop() {
          throw new Error("thrown in stop");
        },
      })),
    );
    system.stop(name);
    expect(kinds("root/c")).toEqual(["runtime.stop_failed"]);
    expect(system.stats().cells).toHaveLength(2);
  });

  it("mail to a later sibling, sent in start, waits for it", () => {
    const early: unknown[] = [];
    const world = smallWorld([
      child("first", () => ({
        start(context: Hand) {
          context.tell({ path: "root/deep/second", uid: 0 }, got("early"));
        },
        receive() {},
      })),
      {
        id: "deep",
        strategy: "one_for_one",
        intensity: 1,
        periodMs: 1000,
        children: [child("second", () => new Puppet(early))],
      },
    ]);
    world.scheduler.runReady();
    expect(early).toEqual(["early"]);
    expect(world.events).toEqual([]);
  });

  it("host: may spawn and stop in the middle of a turn, which goes on undisturbed", () => {
    const { act, a, refA, b, refB, scheduler, system } = pair();
    act((context) => {
      context.tell(refA, got("before"));
      const name = system.spawn(
        "root",
        child("c", () => ({
          start: (own: Hand) => own.tell(refB, got("from its start")),
          receive() {},
        })),
      );
      expect(b).toEqual([]);
      system.stop(name);
      context.tell(refA, got("after"));
    });
    scheduler.runReady();
    expect(a).toEqual(["before", "after"]);
    expect(b).toEqual(["from its start"]);
  });

  it("nothing is left behind: timers and watches that have come are forgotten", () => {
    const { act, refB, scheduler, system } = pair();
    act((context) => {
      context.watch(refB, got);
      context.watch({ path: "root/nobody", uid: 0 }, got);
      context.startTimer("t", 5, got("due"));
      context.startTimer("u", 50, got("later"));
    });
    scheduler.runReady();
    const ofA = () => system.stats().cells.find(({ path }) => path === "root/a");
    expect(ofA()).toMatchObject({ timers: 2, watches: 1 });
    system.stop(refB);
    scheduler.runFor(5);
    expect(ofA()).toMatchObject({ timers: 1, watches: 0 });
  });

  it("hooks: one that throws is fatal, and no actor is hurt", () => {
    const { act, refB, b, scheduler, events, fatal, system } = pair();
    events.push = () => {
      throw new Error("thrown by the host");
    };
    act((context) => {
      context.emit({ kind: "test.event" });
      context.tell(refB, got("still sent"));
    });
    scheduler.runReady();
    expect(b).toEqual(["still sent"]);
    expect(fatal).toHaveLength(1);
    expect(system.stats().restarts).toBe(0);
  });
});

describe("remote", () => {
  /** Two systems "left" and "right" on one virtual clock, 2 ms apart, everything passing through JSON. */
  function twoSystems() {
    const link = { isUp: true, refusal: undefined as "full" | undefined, sent: [] as string[] };
    const left = { got: [] as unknown[] };
    const right = { got: [] as unknown[] };
    const side = (id: string, list: unknown[], other: () => World, shared?: World) =>
      smallWorld([child("x", () => new Puppet(list))], {
        ...(shared === undefined ? {} : { clock: shared.clock, scheduler: shared.scheduler }),
        id,
        remote: {
          route: (path) => !path.startsWith(`${id}/`),
          send(envelope: Envelope) {
            link.sent.push(`${envelope.kind} ${envelope.to}`);
            if (link.refusal !== undefined) return link.refusal;
            if (!link.isUp) return "disconnected";
            const { message, ...rest } = envelope as { message?: unknown } & Envelope;
            const plain = JSON.parse(JSON.stringify(rest)) as Envelope;
            // Messages of these tests hold functions; the rest makes the trip as text.
            const arrived = "message" in envelope ? { ...plain, message } : plain;
            const { clock, system } = other();
            clock.schedule(2000, () => system.deliver(arrived as Envelope));
            return undefined;
          },
        },
      });
    const worlds: { left?: World; right?: World } = {};
    const of = (world: World | undefined): World => {
      if (world === undefined) throw new Error("not made yet");
      return world;
    };
    worlds.left = side("left", left.got, () => of(worlds.right));
    worlds.right = side("right", right.got, () => of(worlds.left), worlds.left);
    const { scheduler, clock } = worlds.left;
    const act = (run: (context: Hand) => void) => {
      of(worlds.left).system.tell({ path: "left/x", uid: 0 }, { kind: "do", run });
      scheduler.runUntilIdle();
    };
    const there = of(worlds.left).system.ref<Doing<unknown>>("right/x");
    const goDown = (side: World, prefix: string) => {
      link.isUp = false;
      side.system.disconnected((path) => path.startsWith(prefix));
      scheduler.runUntilIdle();
    };
    return {
      ...{ link, left: worlds.left, right: worlds.right, leftGot: left.got, rightGot: right.got },
      ...{ act, there, scheduler, clock, goDown },
    };
  }

  it("tell and ask: reach an actor of the other system, replies come back", () => {
    const { act, there, leftGot, rightGot, clock } = twoSystems();
    act((context) => {
      context.tell(there, got("hello"));
      context.ask<Doing<unknown>, number>(
        there,
        50,
        (replyTo) => ({ kind: "do", run: (callee) => callee.reply(replyTo, 7) }),
        got,
      );
    });
    expect(rightGot).toEqual(["hello"]);
    expect(leftGot).toEqual([{ ok: true, value: 7 }]);
    expect(clock.nowUs()).toBe(4000);
  });

  it("ask failures: crash, missing actor and deadline are told across the link", () => {
    const { act, there, leftGot, right, scheduler } = twoSystems();
    const ask = (to: ActorRef<Doing<unknown>>, timeoutMs: number, run: (context: Hand) => void) =>
      act((context) =>
        context.ask<Doing<unknown>, unknown>(to, timeoutMs, () => ({ kind: "do", run }), got),
      );
    ask(there, 50, () => {
      throw new Error("thrown on purpose");
    });
    ask({ path: "right/nobody", uid: 0 }, 50, () => {});
    ask({ path: "right/x", uid: 99 }, 50, () => {});
    ask(there, 1, () => {});
    scheduler.runUntilIdle();
    expect(leftGot).toEqual(
      ["crashed", "noroute", "stopped", "timeout"].map((failure) => ({ ok: false, failure })),
    );
    expect(deadLetters(right)).toContain("noroute do 1");
  });

  it("ask of the host: replies and failures come back across the link", async () => {
    const { left, there, scheduler } = twoSystems();
    const ask = (run: (callee: Hand, to: ReplyTo<number>) => void) =>
      left.system.ask<Doing<unknown>, number>(there, 50, (replyTo) => ({
        kind: "do",
        run: (callee) => run(callee, replyTo),
      }));
    const answered = ask((callee, replyTo) => callee.reply(replyTo, 7));
    const failed = ask(() => {
      throw new Error("thrown on purpose");
    });
    scheduler.runFor(20); // Before their deadline.
    expect(left.system.stats().asks).toBe(0);
    expect(await answered).toEqual({ ok: true, value: 7 });
    expect(await failed).toEqual({ ok: false, failure: "crashed" });
  });

  it("watch: the end of a remote actor comes once, noproc for one that is not there", () => {
    const { act, there, leftGot, right, scheduler } = twoSystems();
    act((context) => {
      context.watch(there, got);
      context.watch({ path: "right/nobody", uid: 0 }, got);
    });
    right.system.stop({ path: "right/x", uid: 0 });
    right.system.spawn(
      "right",
      child("x", () => new Puppet()),
    );
    right.system.stop({ path: "right/x", uid: 0 });
    scheduler.runUntilIdle();
    expect(leftGot).toEqual([
      { path: "right/nobody", uid: 0, reason: "noproc" },
      { path: "right/x", uid: expect.any(Number), reason: "stopped" },
    ]);
  });

  it("unwatch: ends the watch on the other side too", () => {
    const { act, there, leftGot, right, scheduler, link } = twoSystems();
    act((context) => context.watch(there, got));
    act((context) => context.unwatch(there));
    right.system.stop({ path: "right/x", uid: 0 });
    scheduler.runUntilIdle();
    expect(leftGot).toEqual([]);
    expect(link.sent).toEqual(["watch right/x", "unwatch right/x"]);
  });

  it("link down: open asks and watches end at once, and new ones too", () => {
    const { act, there, leftGot, left, right, goDown, clock, link } = twoSystems();
    const ask = (context: Hand) =>
      context.ask<Doing<unknown>, unknown>(there, 1000, () => got("taken in"), got);
    act((context) => {
      context.watch(there, got);
      context.startTimer("t", 5, { kind: "do", run: ask });
    });
    leftGot.length = 0;
    // The question is on its way when the link goes down.
    left.system.tell({ path: "left/x", uid: 0 }, { kind: "do", run: ask });
    left.scheduler.runReady();
    goDown(left, "right/");
    goDown(right, "left/");
    expect(leftGot).toContainEqual({ ok: false, failure: "disconnected" });
    expect(leftGot.filter((one) => (one as Terminated).reason === "noconnection")).toHaveLength(1);
    leftGot.length = 0;
    const before = clock.nowUs();
    act((context) => {
      ask(context);
      context.tell(there, got("lost"));
      context.watch(there, got);
    });
    expect(leftGot).toEqual([
      { ok: false, failure: "disconnected" },
      { path: "right/x", uid: 0, reason: "noconnection" },
    ]);
    expect(clock.nowUs()).toBe(before);
    expect(deadLetters(left)).toEqual(["disconnected got 2"]);
    // The other side forgot the watcher: nothing is sent when its actor ends.
    link.sent.length = 0;
    right.system.stop({ path: "right/x", uid: 0 });
    expect(link.sent).toEqual([]);
  });

  it("link full: an ask ends as busy, a tell is a dead letter", () => {
    const { act, there, leftGot, left, link } = twoSystems();
    link.refusal = "full";
    act((context) => {
      context.tell(there, got("lost"));
      context.ask<Doing<unknown>, unknown>(there, 1000, () => got("lost"), got);
    });
    expect(leftGot).toEqual([{ ok: false, failure: "busy" }]);
    expect(deadLetters(left)).toEqual(["full got 2"]);
  });
});
