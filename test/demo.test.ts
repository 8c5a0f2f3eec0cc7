/** `headrace demo` as a process: the whole tour, and that nothing is left when it is stopped in the middle. */
import { readdirSync, readFileSync } from "node:fs";
import { afterEach, describe, expect, it } from "vitest";
import { HeadraceProcess, isBuilt, killAll } from "./headrace-process.ts";
import { until } from "./live-world.ts";

afterEach(killAll);

/** Processes whose parent is `pid`, as /proc tells them: those of the demo start none themselves. */
function childrenOf(pid: number): number[] {
  const children: number[] = [];
  for (const name of readdirSync("/proc")) {
    if (/^\d+$/.test(name) && parentOf(Number(name)) === pid) children.push(Number(name));
  }
  return children;
}

/** Undefined for a process that is gone, or dead and not yet collected. */
function parentOf(pid: number): number | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // pid (name) state parent …; the name may hold anything.
    const [state, parent] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    return state === "Z" ? undefined : Number(parent);
  } catch {
    return undefined;
  }
}

const describeBuilt = describe.skipIf(!isBuilt());

describeBuilt("demo", () => {
  it("--once shows every step of the tour and ends with 0", { timeout: 90_000 }, async () => {
    const demo = new HeadraceProcess(["demo", "--once", "--port", "0"]);
    const code = await demo.exit;
    expect({ code, err: demo.err }).toEqual({ code: 0, err: "" });
    const steps = [...demo.out.matchAll(/^(\d)\. /gm)].map(([, number]) => number);
    expect(steps).toEqual(["1", "2", "3", "4", "5", "6"]);
    expect(demo.out).toMatch(/first: {2}200 miss on gpu-\d/);
    expect(demo.out).toMatch(/second: 200 hit-exact/);
    // One that comes when the generation has ended is a hit.
    const [, joined, hit] = /miss: 1, joined: (\d+), hit: (\d+)/.exec(demo.out) ?? [];
    expect(Number(joined) + Number(hit)).toBe(19);
    expect(demo.out).toMatch(/request \d: 429, 0 left, retry-after \d+ s/);
    expect(demo.out).toContain("90 requests: 90 ok, 0 failed;");
    expect(demo.out).toMatch(/last 30 requests: .*gpu-2 \d+/);
  });

  // Linux tells a process's children in /proc; elsewhere there is no way without a tool.
  const onLinux = it.skipIf(process.platform !== "linux");

  onLinux.each([
    ["while it starts", [], 3],
    ["under load", ["gateway on", "2. Twenty", "4. A tenant", "5. A node", "kill -9"], 3],
  ] as const)("SIGINT %s leaves no process behind", async (_, milestones, childrenMin) => {
    const demo = new HeadraceProcess(["demo", "--port", "0"]);
    for (const milestone of milestones) await demo.says(milestone);
    const pid = demo.child.pid ?? 0;
    let children: number[] = [];
    await until("it has its processes", () => {
      children = childrenOf(pid);
      return children.length >= childrenMin;
    });
    demo.child.kill("SIGINT");
    expect(await demo.exit).toBe(0);
    expect(demo.err).toBe("");
    await until("all are gone", () => children.every((child) => parentOf(child) === undefined));
  });
});
