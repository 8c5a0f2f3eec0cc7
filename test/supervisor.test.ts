import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { Context, SupervisorSpec, TreeSpec } from "../runtime/actor.ts";
import { child, type Doing, Puppet, smallWorld, type World } from "./small-world.ts";

/** What happens to actors, in order: "+id" started, "-id" stopped in order. */
class Diary {
  readonly lines: string[] = [];
  /** Ids whose next starts throw: how many times. */
  readonly failing = new Map<string, number>();

  take(): string {
    return this.lines.splice(0).join(" ");
  }

  child(id: string, restart: "permanent" | "transient" | "temporary" = "permanent"): TreeSpec {
    const { lines, failing } = this;
    return child(
      id,
      () => {
        const left = failing.get(id) ?? 0;
        failing.set(id, left - 1);
        if (left > 0) {
          lines.push(`!${id}`);
          throw new Error(`${id} does not start`);
        }
        return Object.assign(new Puppet<unknown>(), {
          start() {
            lines.push(`+${id}`);
          },
          stop() {
            lines.push(`-${id}`);
          },
        });
      },
      { restart },
    );
  }
}

function act(world: World, path: string, run: (context: Context<Doing<unknown>>) => void) {
  world.system.tell(world.system.ref<Doing<unknown>>(path), { kind: "do", run });
}

function crash(world: World, path: string) {
  act(world, path, () => {
    throw new Error(`${path} crashed on purpose`);
  });
  world.scheduler.runReady();
}

function running({ system }: World): string[] {
  return system.stats().cells.flatMap(({ path, isRunning }) => (isRunning ? [path] : []));
}

const branch = (id: string, children: readonly TreeSpec[], rest: Partial<SupervisorSpec> = {}) =>
  ({ id, strategy: "one_for_one", intensity: 10, periodMs: 60_000, children, ...rest }) as const;

describe("order", () => {
  it("start and stop: children start in order and stop in reverse, branches in their place", () => {
    const diary = new Diary();
    const world = smallWorld([
      diary.child("a"),
      branch("deep", [diary.child("b"), diary.child("c")]),
      diary.child("d"),
    ]);
    expect(diary.take()).toBe("+a +b +c +d");
    world.system.stop({ path: "root/deep", uid: 0 });
    expect(diary.take()).toBe("-c -b");
    expect(running(world)).toEqual(["root/a", "root/d"]);
    world.system.stopAll();
    expect(diary.take()).toBe("-d -a");
    world.system.stopAll();
    expect(diary.take()).toBe("");
    expect(world.system.stats().cells).toEqual([]);
  });

  it("start: when one fails, those before it are stopped again and the error comes out", () => {
    const diary = new Diary();
    diary.failing.set("c", 1);
    const tree = [diary.child("a"), branch("deep", [diary.child("b"), diary.child("c")])];
    expect(() => smallWorld([...tree, diary.child("d")])).toThrow("c does not start");
    expect(diary.take()).toBe("+a +b !c -b -a");
  });

  it.each([
    [{ id: "" }, "non-empty text"],
    [{ id: "a/b" }, "non-empty text"],
    [{ intensity: -1 }, "intensity"],
    [{ intensity: 0.5 }, "intensity"],
    [{ periodMs: 0 }, "periodMs"],
    [{ periodMs: Number.NaN }, "periodMs"],
    [{ children: [child("x", () => new Puppet()), branch("x", [])] }, "two children"],
    [{ children: [child("", () => new Puppet())] }, "non-empty text"],
  ])("spec: %j is refused", (part, message) => {
    expect(() => smallWorld([branch("deep", [], part)])).toThrow(message);
  });
});

describe("strategy", () => {
  const tree = (strategy: SupervisorSpec["strategy"]) => {
    const diary = new Diary();
    const world = smallWorld(
      [
        diary.child("a"),
        diary.child("b"),
        branch("deep", [diary.child("c")]),
        diary.child("once", "temporary"),
        diary.child("d"),
      ],
      { strategy },
    );
    diary.take();
    return { diary, world };
  };

  it.each([
    ["one_for_one", "+b", ["root/a", "root/b", "root/deep/c", "root/once", "root/d"]],
    ["rest_for_one", "-d -once -c +b +c +d", ["root/a", "root/b", "root/deep/c", "root/d"]],
    ["one_for_all", "-d -once -c -a +a +b +c +d", ["root/a", "root/b", "root/deep/c", "root/d"]],
  ] as const)("%s: a crash of the second child does %s", (strategy, lines, alive) => {
    const { diary, world } = tree(strategy);
    crash(world, "root/b");
    expect(diary.take()).toBe(lines);
    expect(running(world)).toEqual(alive);
  });

  it("rest_for_one: a start that fails on the way is tried again with those after it", () => {
    const { diary, world } = tree("rest_for_one");
    diary.failing.set("c", 1);
    crash(world, "root/b");
    expect(diary.take()).toBe("-d -once -c +b !c +c +d");
    expect(world.kinds("root/deep")).toEqual(["runtime.start_failed", "runtime.restarted"]);
  });

  it("one_for_all: a start that fails on the way stops those begun and begins with all again", () => {
    const { diary, world } = tree("one_for_all");
    diary.failing.set("b", 1);
    crash(world, "root/a");
    expect(diary.take()).toBe("-d -once -c -b +a !b -a +a +b +c +d");
  });

  it("mail: of all that restart together is kept", () => {
    const got: unknown[] = [];
    const world = smallWorld([child("a", () => new Puppet()), child("b", () => new Puppet(got))], {
      strategy: "one_for_all",
    });
    world.system.tell<Doing<unknown>>(world.system.ref("root/b"), { kind: "got", what: "waits" });
    act(world, "root/a", () => {
      throw new Error("thrown on purpose");
    });
    world.scheduler.runReady();
    expect(got).toEqual(["waits"]);
  });
});

describe("restart type", () => {
  it.each([
    ["permanent", "+x", "-x +x"],
    ["transient", "+x", "-x"],
    ["temporary", "", "-x"],
  ] as const)("%s: after a crash '%s', after stopping itself '%s'", (restart, crashed, stopped) => {
    for (const end of ["crash", "stop"] as const) {
      const diary = new Diary();
      const world = smallWorld([diary.child("x", restart)]);
      diary.take();
      if (end === "crash") crash(world, "root/x");
      else act(world, "root/x", (context) => context.stop(context.self));
      world.scheduler.runReady();
      expect(diary.take()).toBe(end === "crash" ? crashed : stopped);
    }
  });

  it("stopped by others: does not come back, but with a restart of its supervisor", () => {
    const diary = new Diary();
    const deep = branch("deep", [diary.child("x"), diary.child("y")], { intensity: 0 });
    const world = smallWorld([deep]);
    world.system.stop({ path: "root/deep/x", uid: 0 });
    world.scheduler.runUntilIdle();
    expect(running(world)).toEqual(["root/deep/y"]);
    diary.take();
    crash(world, "root/deep/y");
    expect(diary.take()).toBe("+x +y"); // In the order of the spec.
  });
});

describe("child limit", () => {
  it("sixth crash in 30 s: the child is parked and backs off 0.2 s · 2ⁿ ± 20 %, its siblings untouched", () => {
    const diary = new Diary();
    const world = smallWorld([diary.child("bad"), diary.child("good")]);
    diary.take();
    for (let n = 0; n < 5; n++) crash(world, "root/bad");
    expect(diary.take()).toBe("+bad +bad +bad +bad +bad");
    for (let n = 0; n < 10; n++) {
      crash(world, "root/bad");
      expect(world.system.stats().parked).toBe(1);
      expect(running(world)).toEqual(["root/good"]);
      const parked = world.events.at(-1) ?? { kind: "none" };
      const waitMs = "waitMs" in parked ? Number(parked.waitMs) : Number.NaN;
      const plainMs = Math.min(30_000, 200 * (1 << n));
      expect(waitMs).toBeGreaterThanOrEqual(plainMs * 0.8);
      expect(waitMs).toBeLessThanOrEqual(plainMs * 1.2);
      expect(waitMs).not.toBe(plainMs);
      world.scheduler.runFor(waitMs - 0.001);
      expect(diary.take()).toBe("");
      world.scheduler.runFor(0.001);
      expect(diary.take()).toBe("+bad");
      expect(world.system.stats().parked).toBe(0);
    }
    expect(world.fatal).toEqual([]);
  });

  it("window: five crashes in each 30 s are restarted at once, for ever", () => {
    const diary = new Diary();
    const world = smallWorld([diary.child("x")], { periodMs: 1 });
    for (let n = 0; n < 40; n++) {
      crash(world, "root/x");
      world.scheduler.runFor(6001);
    }
    expect(world.kinds("root/x")).not.toContain("runtime.parked");
    crash(world, "root/x");
    crash(world, "root/x");
    expect(world.kinds("root/x")).toContain("runtime.parked");
  });

  it("health: after 60 s up the back-off begins anew, before it goes on", () => {
    for (const [upMs, isReset] of [
      [59_999, false],
      [60_001, true],
    ] as const) {
      const diary = new Diary();
      const world = smallWorld([diary.child("x")]);
      for (let n = 0; n < 6; n++) crash(world, "root/x");
      world.scheduler.runUntilIdle(); // Back after the first back-off.
      world.scheduler.runFor(upMs);
      crash(world, "root/x");
      expect(world.system.stats().parked).toBe(isReset ? 0 : 1);
    }
  });

  it("parked: mail waits, in bounds, and is handled after the back-off", () => {
    const got: unknown[] = [];
    const spec = child("x", () => new Puppet(got), {
      mailbox: { max: 2, overflow: { kind: "reject" } },
    });
    const world = smallWorld([spec]);
    for (let n = 0; n < 6; n++) crash(world, "root/x");
    const send = (what: number) =>
      world.system.tell<Doing<unknown>>(world.system.ref("root/x"), { kind: "got", what });
    expect([send(1), send(2), send(3)]).toEqual([true, true, false]);
    world.scheduler.runReady();
    expect(got).toEqual([]);
    world.scheduler.runUntilIdle();
    expect(got).toEqual([1, 2]);
  });

  it("parked: stopping the child ends the back-off", () => {
    const diary = new Diary();
    const world = smallWorld([diary.child("x")]);
    for (let n = 0; n < 6; n++) crash(world, "root/x");
    diary.take();
    world.system.stop({ path: "root/x", uid: 0 });
    expect(world.clock.pending).toBe(0);
    world.scheduler.runUntilIdle();
    expect(diary.take()).toBe("");
    expect(world.system.stats().parked).toBe(0);
  });

  it("rest_for_one: those tied to a parked child wait with it", () => {
    const diary = new Diary();
    const tree = [diary.child("a"), diary.child("b"), diary.child("c")];
    const world = smallWorld(tree, { strategy: "rest_for_one" });
    for (let n = 0; n < 6; n++) crash(world, "root/b");
    diary.take();
    expect(running(world)).toEqual(["root/a"]);
    world.scheduler.runUntilIdle();
    expect(diary.take()).toBe("+b +c");
    // One before it that crashes takes it along at once, and the old back-off does not fire later.
    crash(world, "root/b");
    diary.take();
    crash(world, "root/a");
    expect(diary.take()).toBe("+a +b +c");
    expect(world.system.stats().parked).toBe(0);
    expect(world.clock.pending).toBe(0);
  });

  it("start that keeps failing on restart: counts like a crash, then is parked", () => {
    const diary = new Diary();
    const world = smallWorld([diary.child("x"), diary.child("y")]);
    diary.failing.set("x", 7);
    diary.take();
    crash(world, "root/x");
    expect(diary.take()).toBe("!x !x !x !x !x");
    expect(world.system.stats().parked).toBe(1);
    world.scheduler.runUntilIdle();
    expect(diary.take()).toBe("!x !x +x");
    expect(running(world)).toEqual(["root/x", "root/y"]);
  });
});

describe("supervisor limit", () => {
  it("intensity: one restart too many in the period stops the branch and restarts it whole", () => {
    const diary = new Diary();
    const world = smallWorld([
      branch("deep", [diary.child("a"), diary.child("b"), diary.child("c")], { intensity: 3 }),
      diary.child("z"),
    ]);
    diary.take();
    crash(world, "root/deep/a");
    crash(world, "root/deep/b");
    crash(world, "root/deep/c");
    expect(diary.take()).toBe("+a +b +c");
    crash(world, "root/deep/b");
    expect(diary.take()).toBe("-c -a +a +b +c");
    expect(world.kinds("root/deep")).toEqual(["runtime.escalated", "runtime.restarted"]);
    expect(running(world)).toHaveLength(4);
    // With a fresh window.
    crash(world, "root/deep/a");
    expect(diary.take()).toBe("+a");
  });

  it("intensity: the restart of a branch forgives its children too", () => {
    const diary = new Diary();
    const deep = branch("deep", [diary.child("a"), diary.child("b")], { intensity: 6 });
    const world = smallWorld([deep]);
    for (let n = 0; n < 5; n++) crash(world, "root/deep/a");
    for (let n = 0; n < 2; n++) crash(world, "root/deep/b");
    expect(world.kinds("root/deep")).toEqual(["runtime.escalated", "runtime.restarted"]);
    diary.take();
    crash(world, "root/deep/a");
    expect(diary.take()).toBe("+a");
  });

  it("period: restarts that are past do not count", () => {
    const diary = new Diary();
    const world = smallWorld([branch("deep", [diary.child("a")], { intensity: 1, periodMs: 100 })]);
    for (let n = 0; n < 4; n++) {
      crash(world, "root/deep/a");
      world.scheduler.runFor(100);
    }
    expect(world.kinds("root/deep")).toEqual([]);
    crash(world, "root/deep/a");
    expect(world.kinds("root/deep")).toEqual([]);
  });

  it("one child that fails for ever: is parked before it can fail its supervisor (10 in 60 s)", () => {
    const diary = new Diary();
    const world = smallWorld([branch("deep", [diary.child("bad"), diary.child("good")])]);
    diary.take();
    for (let seconds = 0; seconds < 600; seconds++) {
      crash(world, "root/deep/bad");
      world.scheduler.runFor(1000);
    }
    expect(world.kinds("root/deep")).toEqual([]);
    expect(diary.take()).not.toContain("good");
  });

  it("dynamic children: are stopped when their supervisor restarts, and their ids are free", () => {
    const diary = new Diary();
    const world = smallWorld([branch("deep", [diary.child("a")], { intensity: 0 })]);
    const spec = child("dyn", () => new Puppet());
    world.system.spawn("root/deep", spec);
    crash(world, "root/deep/a");
    expect(running(world)).toEqual(["root/deep/a"]);
    world.system.spawn("root/deep", spec);
    expect(running(world)).toEqual(["root/deep/a", "root/deep/dyn"]);
  });

  it("root: when it gives up everything is stopped in reverse, and the host is told once", () => {
    const diary = new Diary();
    const tree = [diary.child("a"), diary.child("b"), diary.child("c")];
    const world = smallWorld(tree, { intensity: 2, periodMs: 60_000 });
    diary.take();
    for (let n = 0; n < 3; n++) crash(world, "root/b");
    expect(diary.take()).toBe("+b +b -c -a");
    expect(world.fatal).toEqual([new Error("root/b crashed on purpose")]);
    expect(world.system.stats().cells).toEqual([]);
    world.scheduler.runUntilIdle();
    expect(world.clock.pending).toBe(0);
  });
});

describe("always", () => {
  it("tree: whatever crashes or fails to start, one incarnation of each, and starts pair with ends", () => {
    const ids = ["a", "deep/b", "deep/c", "d"] as const;
    const step = fc.oneof(
      fc.record({ op: fc.constant("crash" as const), id: fc.constantFrom(...ids) }),
      fc.record({ op: fc.constant("fail" as const), id: fc.constantFrom(...ids) }),
      fc.record({ op: fc.constant("wait" as const), ms: fc.nat(70_000) }),
    );
    const strategy = fc.constantFrom("one_for_one", "rest_for_one", "one_for_all");
    fc.assert(
      fc.property(strategy, strategy, fc.array(step, { maxLength: 40 }), (upper, lower, steps) => {
        const failing = new Map<string, number>();
        const alive = new Map<string, number>();
        const tracked = (id: string) =>
          child(id, () => {
            const left = failing.get(id) ?? 0;
            failing.set(id, left - 1);
            if (left > 0) throw new Error("does not start");
            alive.set(id, (alive.get(id) ?? 0) + 1);
            const gone = () => alive.set(id, (alive.get(id) ?? 0) - 1);
            return {
              receive() {
                gone();
                throw new Error("crashes");
              },
              stop() {
                gone();
              },
            };
          });
        const deep = branch("deep", [tracked("b"), tracked("c")], {
          strategy: lower,
          intensity: 2,
        });
        const world = smallWorld([tracked("a"), deep, tracked("d")], { strategy: upper });
        for (const one of steps) {
          if (one.op === "wait") world.scheduler.runFor(one.ms);
          else if (one.op === "fail") failing.set(one.id.slice(-1), 3);
          else world.system.tell(world.system.ref<object>(`root/${one.id}`), {});
          world.scheduler.runReady();
          for (const count of alive.values()) expect([0, 1]).toContain(count);
          const cells = world.system.stats().cells;
          for (const { path, isRunning } of cells) {
            expect(alive.get(path.slice(-1))).toBe(isRunning ? 1 : 0);
          }
        }
        world.scheduler.runUntilIdle(); // Ends: parked children come back and then stay.
        expect(running(world)).toHaveLength(4);
        world.system.stopAll();
        expect([...alive.values()]).toEqual([0, 0, 0, 0]);
      }),
      { seed: 20, numRuns: 150 },
    );
  });
});
