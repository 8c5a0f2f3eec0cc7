import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { SimClock, SystemClock, TimerQueue } from "../runtime/clock.ts";

describe("TimerQueue", () => {
  it("timers: fire in the order of (time, set first), whatever is cancelled between", () => {
    const step = fc.oneof(
      {
        weight: 3,
        arbitrary: fc.record({ op: fc.constant("add" as const), atUs: fc.nat(100) }),
      },
      {
        weight: 2,
        arbitrary: fc.record({ op: fc.constant("cancel" as const), which: fc.nat(200) }),
      },
      {
        weight: 1,
        arbitrary: fc.record({ op: fc.constant("take" as const), nowUs: fc.nat(100) }),
      },
    );
    fc.assert(
      fc.property(fc.array(step, { minLength: 100, maxLength: 250 }), (steps) => {
        const queue = new TimerQueue();
        const handles = new Map<number, ReturnType<TimerQueue["add"]>>();
        let model: { id: number; atUs: number }[] = [];
        let fired = -1;
        for (const [id, one] of steps.entries()) {
          if (one.op === "add") {
            handles.set(
              id,
              queue.add(one.atUs, () => (fired = id)),
            );
            model.push({ id, atUs: one.atUs });
          } else if (one.op === "cancel") {
            const handle = handles.get(one.which);
            if (handle !== undefined) queue.remove(handle);
            model = model.filter((timer) => timer.id !== one.which);
          } else {
            const first = model.toSorted((a, b) => a.atUs - b.atUs || a.id - b.id)[0];
            const fn = queue.takeDue(one.nowUs);
            fired = -1;
            fn?.();
            const isDue = first !== undefined && first.atUs <= one.nowUs;
            expect(fired).toBe(isDue ? first.id : -1);
            model = model.filter((timer) => timer.id !== fired);
          }
          expect(queue.size).toBe(model.length);
          const earliestUs = Math.min(...model.map((timer) => timer.atUs));
          expect(queue.earliestUs()).toBe(model.length === 0 ? undefined : earliestUs);
        }
      }),
      { seed: 3, numRuns: 60 },
    );
  });

  it("cancel: leaves nothing behind, and does nothing the second time", () => {
    const queue = new TimerQueue();
    const handles = Array.from({ length: 10_000 }, (_, index) => queue.add(1e12 + index, () => {}));
    for (const handle of handles) queue.remove(handle);
    for (const handle of handles) queue.remove(handle);
    expect(queue.size).toBe(0);
    expect(queue.earliestUs()).toBeUndefined();
  });

  it("cancel: refuses the timer of another queue", () => {
    const stranger = new TimerQueue().add(1, () => {});
    expect(() => new TimerQueue().remove(stranger)).toThrow("another queue");
  });
});

describe("SimClock", () => {
  it("time: moves to each event alone, and reading moves nothing", () => {
    const clock = new SimClock();
    const seen: [string, number][] = [];
    clock.schedule(2000, () => seen.push(["b", clock.nowUs()]));
    clock.schedule(1000, () => {
      seen.push(["a", clock.nowUs()]);
      clock.schedule(500, () => seen.push(["from a", clock.nowUs()]));
    });
    expect(clock.nowUs()).toBe(0);
    expect(clock.nowUs()).toBe(0);
    while (clock.advanceToNext()) expect(clock.nowUs()).toBe(seen.at(-1)?.[1]);
    expect(seen).toEqual([
      ["a", 1000],
      ["from a", 1500],
      ["b", 2000],
    ]);
    expect(clock.advanceToNext()).toBe(false);
  });

  it("time: goes neither backwards nor past a pending timer", () => {
    const clock = new SimClock();
    clock.schedule(10, () => {});
    expect(() => clock.advanceTo(11)).toThrow("next timer 10");
    clock.advanceTo(10);
    expect(() => clock.advanceTo(9)).toThrow("cannot move from 10 to 9");
  });

  it.each([-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 53])(
    "delay: %d is refused",
    (us) => {
      expect(() => new SimClock().schedule(us, () => {})).toThrow("whole µs from 0 to 2^52");
      expect(() => new SystemClock({ unref: true }).schedule(us, () => {})).toThrow("whole µs");
    },
  );

  it("delay: the longest accepted one is exact", () => {
    const clock = new SimClock();
    clock.schedule(1, () => {});
    clock.advanceToNext();
    clock.schedule(2 ** 52, () => {});
    expect(clock.nextAtUs()).toBe(2 ** 52 + 1);
  });
});

describe("SystemClock", () => {
  beforeEach(() => {
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout", "performance"] });
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  it("timers: fire in order, never early, with one timeout armed", () => {
    const clock = new SystemClock();
    const fired: string[] = [];
    clock.schedule(5000, () => fired.push("5 ms"));
    clock.schedule(1500, () => fired.push("1.5 ms"));
    clock.schedule(5000, () => fired.push("5 ms, second"));
    expect(vi.getTimerCount()).toBe(1);
    vi.advanceTimersByTime(1);
    expect(fired).toEqual([]);
    vi.advanceTimersByTime(1);
    expect(fired).toEqual(["1.5 ms"]);
    vi.advanceTimersByTime(10);
    expect(fired).toEqual(["1.5 ms", "5 ms", "5 ms, second"]);
    expect(vi.getTimerCount()).toBe(0);
  });

  it("timers: a delay beyond 32-bit milliseconds is waited for in full", () => {
    const clock = new SystemClock();
    let fired = 0;
    const days60Ms = 60 * 24 * 3600 * 1000;
    clock.schedule(days60Ms * 1000, () => fired++);
    vi.advanceTimersByTime(days60Ms - 1);
    expect(fired).toBe(0);
    vi.advanceTimersByTime(2);
    expect(fired).toBe(1);
  });

  it("timers: one set by another at 0 µs waits for the next round", () => {
    const clock = new SystemClock();
    let rounds = 0;
    const again = () => {
      rounds++;
      clock.schedule(0, again);
    };
    clock.schedule(0, again);
    vi.advanceTimersToNextTimer();
    expect(rounds).toBe(1);
  });

  it("timers: one that throws does not keep the others from firing", () => {
    const clock = new SystemClock();
    const fired: string[] = [];
    clock.schedule(1000, () => {
      throw new Error("in a timer");
    });
    clock.schedule(1000, () => fired.push("second"));
    expect(() => vi.advanceTimersByTime(1)).toThrow("in a timer");
    vi.advanceTimersByTime(1);
    expect(fired).toEqual(["second"]);
  });

  it("cancel: the timer does not fire, and an earlier one set later is not missed", () => {
    const clock = new SystemClock();
    const fired: string[] = [];
    const handle = clock.schedule(2000, () => fired.push("cancelled"));
    clock.cancel(handle);
    clock.schedule(9000, () => fired.push("later"));
    clock.schedule(1000, () => fired.push("earlier"));
    vi.advanceTimersByTime(20);
    expect(fired).toEqual(["earlier", "later"]);
  });

  it("process: is kept alive while a timer is pending, only then, and never with unref", () => {
    const refs: boolean[] = [];
    const real = globalThis.setTimeout;
    let armed: NodeJS.Timeout | undefined;
    vi.stubGlobal("setTimeout", (fn: () => void, ms: number) => (armed = real(fn, ms)));
    const clock = new SystemClock();
    const first = clock.schedule(5000, () => {});
    refs.push(armed?.hasRef() === true);
    clock.cancel(first);
    refs.push(armed?.hasRef() === true);
    clock.schedule(6000, () => {});
    refs.push(armed?.hasRef() === true);
    new SystemClock({ unref: true }).schedule(5000, () => {});
    refs.push(armed?.hasRef() === true);
    vi.unstubAllGlobals();
    expect(refs).toEqual([true, false, true, false]);
  });
});
