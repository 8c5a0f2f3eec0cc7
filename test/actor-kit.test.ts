import { describe, expect, it } from "vitest";
import type { Actor, AskOutcome, Context, ReplyTo, Terminated } from "../runtime/actor.ts";
import { refTo, testActor } from "./actor-kit.ts";

type Message =
  | { kind: "do"; run: (context: Context<Message>) => void }
  | { kind: "double"; n: number; replyTo: ReplyTo<number> }
  | { kind: "answered"; outcome: AskOutcome<number> }
  | { kind: "ended"; terminated: Terminated }
  | { kind: "due"; what: string };

class Subject implements Actor<Message> {
  readonly seen: unknown[] = [];

  start(context: Context<Message>): void {
    context.emit({ kind: "subject.started" });
  }

  receive(message: Message, context: Context<Message>): void {
    if (message.kind === "do") message.run(context);
    else if (message.kind === "double") context.reply(message.replyTo, message.n * 2);
    else this.seen.push([context.nowMs, message]);
  }
}

const other = refTo<{ kind: "hello" } | { kind: "question"; replyTo: ReplyTo<number> }>("other");

describe("actor kit", () => {
  const make = () => {
    const subject = new Subject();
    const kit = testActor(subject, { nowMs: 1000 });
    const act = (run: (context: Context<Message>) => void) => kit.send({ kind: "do", run });
    return { kit, act, seen: subject.seen };
  };
  const ask = (context: Context<Message>) =>
    context.ask<{ kind: "hello" } | { kind: "question"; replyTo: ReplyTo<number> }, number>(
      other,
      50,
      (replyTo) => ({ kind: "question", replyTo }),
      (outcome) => ({ kind: "answered", outcome }),
    );

  it("effects: come out as data, in order, once", () => {
    const { kit, act } = make();
    expect(kit.take()).toEqual([{ kind: "emit", event: { kind: "subject.started" } }]);
    act((context) => {
      context.tell(other, { kind: "hello" });
      context.startTimer("t", 5, { kind: "due", what: "t" });
      context.cancelTimer("u");
      context.stop(other);
      context.watch(other, (terminated) => ({ kind: "ended", terminated }));
      context.unwatch(other);
      ask(context);
    });
    expect(kit.told("other")).toEqual([{ kind: "hello" }]);
    expect(kit.take()).toEqual([
      { kind: "tell", to: "other", message: { kind: "hello" } },
      { kind: "start_timer", key: "t", afterMs: 5, message: { kind: "due", what: "t" } },
      { kind: "cancel_timer", key: "u" },
      { kind: "stop", path: "other" },
      { kind: "watch", path: "other" },
      { kind: "unwatch", path: "other" },
      {
        ...{ kind: "ask", to: "other", timeoutMs: 50, index: 0 },
        message: { kind: "question", replyTo: { asker: "test/actor", askId: 1 } },
      },
    ]);
    expect(kit.take()).toEqual([]);
  });

  it("throw: comes out of send, and the turn has no effects", () => {
    const { kit, act } = make();
    kit.take();
    const turn = () =>
      act((context) => {
        context.tell(other, { kind: "hello" });
        context.startTimer("t", 5, { kind: "due", what: "t" });
        throw new Error("thrown on purpose");
      });
    expect(turn).toThrow("thrown on purpose");
    expect(kit.take()).toEqual([]);
    expect(kit.timers()).toEqual([]);
  });

  it("advance: fires timers each at its own instant, the replaced and cancelled ones never", () => {
    const { kit, act, seen } = make();
    const due = (what: string): Message => ({ kind: "due", what });
    act((context) => {
      context.startTimer("a", 30, due("a"));
      context.startTimer("b", 10, {
        kind: "do",
        run: (then) => then.startTimer("c", 10, due("c")),
      });
      context.startTimer("d", 1, due("replaced"));
      context.startTimer("d", 60, due("d"));
      context.startTimer("e", 1, due("cancelled"));
      context.cancelTimer("e");
    });
    kit.advance(50);
    expect(seen).toEqual([
      [1020, due("c")],
      [1030, due("a")],
    ]);
    expect(kit.nowMs).toBe(1050);
    expect(kit.timers()).toEqual(["d"]);
  });

  it("asks: one outcome each, by answer or by time", () => {
    const { kit, act, seen } = make();
    act(ask);
    act(ask);
    kit.answer(0, { ok: true, value: 7 });
    expect(() => kit.answer(0, { ok: true, value: 8 })).toThrow("no open ask 0; open: 1");
    kit.advance(100);
    expect(() => kit.answer(1, { ok: true, value: 8 })).toThrow("no open ask 1");
    expect(seen).toEqual([
      [1000, { kind: "answered", outcome: { ok: true, value: 7 } }],
      [1050, { kind: "answered", outcome: { ok: false, failure: "timeout" } }],
    ]);
  });

  it("ask: returns the reply of that turn", () => {
    const { kit } = make();
    expect(kit.ask<number>((replyTo) => ({ kind: "double", n: 4, replyTo }))).toBe(8);
    expect(kit.ask<number>(() => ({ kind: "due", what: "no reply" }))).toBeUndefined();
  });

  it("terminate: ends a watch once", () => {
    const { kit, act, seen } = make();
    act((context) => context.watch(other, (terminated) => ({ kind: "ended", terminated })));
    kit.terminate("other", "failed");
    expect(() => kit.terminate("other", "failed")).toThrow("no watch on other");
    expect(seen).toEqual([
      [1000, { kind: "ended", terminated: { path: "other", uid: 1, reason: "failed" } }],
    ]);
  });
});
