/**
 * The live router and the simulated one choose the same: real gateways before stand-in nodes over loopback write
 * their decision logs, which are replayed in virtual time.
 */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { strategyNames } from "../actors/node-score.ts";
import { Random } from "../runtime/random.ts";
import { DecisionLogError, DecisionReplay, type DecisionReport } from "../sim/decision-replay.ts";
import type { OptionsInput } from "../transport/options.ts";
import { HeadraceProcess, isBuilt, killAll } from "./headrace-process.ts";
import { type LiveWorld, startLiveWorld } from "./live-world.ts";

const folder = mkdtempSync(join(tmpdir(), "headrace-decisions-"));
afterAll(async () => {
  await killAll();
  rmSync(folder, { recursive: true });
});

const REQUESTS = 240;

/**
 * A gateway before four unlike nodes, with too few places and failures on the way: requests wait, are denied, are tried
 * again, and some are refused. The lines of its log.
 */
async function logOf(strategy: OptionsRouter["strategy"]): Promise<string[]> {
  const file = join(folder, `${strategy}.jsonl`);
  const world = await startLiveWorld({
    nodes: 4,
    speed: 200,
    options: {
      router: { strategy },
      cache: { enabled: false },
      concurrency: { inflightMax: 4, inflightMin: 2 },
      scrape: { intervalMs: 100, timeoutMs: 50 },
      queue: { perKeyMax: 24, poolMax: 24, poolSecondsMax: 60 },
      circuit: { openMs: 200, openMsMax: 400 },
      record: { decisions: file },
    },
  });
  try {
    await loaded(world);
  } finally {
    await world.close();
  }
  return readFileSync(file, "utf8").split("\n").slice(0, -1);
}

type OptionsRouter = NonNullable<OptionsInput["router"]>;

async function loaded(world: LiveWorld): Promise<void> {
  const random = new Random(7);
  const [first, second] = world.nodes;
  first?.setFault({ slowFactor: 3 });
  let sent = 0;
  const client = async (): Promise<void> => {
    while (sent < REQUESTS) {
      sent++;
      if (sent === 80) second?.setFault({ failRate: 0.7, status: 503 });
      if (sent === 160) second?.setFault({});
      const session = `session ${random.int(20)}`;
      const text = "word ".repeat(20 + random.int(400));
      const fields = { max_tokens: 1 + random.int(60), user: session };
      await world.chat(text, fields, { "x-session-id": session });
    }
  };
  // More clients than there are places, and for a while more than may wait.
  await Promise.all(Array.from({ length: 48 }, client));
  await world.idle();
}

function replayed(lines: readonly string[]): DecisionReport {
  const replay = new DecisionReplay();
  for (const line of lines) replay.add(line);
  return replay.report();
}

describe("decision log", () => {
  const logs = new Map<string, string[]>();

  for (const strategy of strategyNames) {
    it(`${strategy}: the simulated router makes every choice of the live one`, async () => {
      const lines = await logOf(strategy);
      logs.set(strategy, lines);
      const report = replayed(lines);
      expect(report.differences).toEqual([]);
      expect(report.differing).toBe(0);
      expect(report.strategy).toBe(strategy);
      expect(report.placed + report.refused).toBeGreaterThanOrEqual(REQUESTS);
      expect(report.asked).toBeGreaterThanOrEqual(report.placed);
      expect(lines.join("\n")).not.toContain("word ");
    });
  }

  it("requests waited, were refused and were tried again: the replay had something to get wrong", () => {
    const text = [...logs.values()].flat().join("\n");
    for (const part of ['"router.tick"', '"queue_full"', '"attempt":2', '"circuit":"open"']) {
      expect(text).toContain(part);
    }
  });

  it("another seed, another snapshot, another strategy: the replay tells that they differ", () => {
    const lines = logs.get("power_of_two") ?? [];
    const edited = (from: RegExp, to: string) => lines.map((line) => line.replace(from, to));
    expect(replayed(edited(/"seed":"[0-9a-f]+"/, '"seed":"other"')).differing).toBeGreaterThan(10);
    expect(replayed(edited(/"inflight":\d+/, '"inflight":1')).differing).toBeGreaterThan(10);
    const other = replayed(edited(/"strategy":"power_of_two"/, '"strategy":"round_robin"'));
    expect(other.differing).toBeGreaterThan(10);
    expect(other.differences[0]?.live).not.toEqual(other.differences[0]?.simulated);
  });

  it("what is no log is refused with its line", () => {
    const [header = "", ...rest] = logs.get("headroom") ?? [];
    const turns = rest.filter((line) => line.includes('"router.turn"'));
    const [turn = "", next = ""] = turns.slice(-2);
    expect(() => replayed([])).toThrow(DecisionLogError);
    expect(() => replayed([turn])).toThrow(/line 1 of the decision log stands before the header/);
    expect(() => replayed([header, "{"])).toThrow(/line 2 of the decision log is no JSON/);
    expect(() => replayed([header, '{"v":1,"atMs":0}'])).toThrow(/line 2 .* is no line of a/);
    expect(() => replayed([header, header])).toThrow(/line 2 .* is a second header/);
    expect(() => replayed([header, next, turn])).toThrow(/line 3 .* earlier than the line before/);
  });

  it("a real process writes it, and the command replays it", async () => {
    if (!isBuilt()) return;
    const file = join(folder, "process.jsonl");
    const node = new HeadraceProcess(["node", "--port", "0", "--speed", "1000"]);
    const target = `http://127.0.0.1:${await node.listening()}`;
    const flags = ["--port", "0", "--node", target, "--set", `record.decisions=${file}`];
    const gateway = new HeadraceProcess(["serve", ...flags]);
    const url = `http://127.0.0.1:${await gateway.listening()}/v1/chat/completions`;
    for (let i = 0; i < 20; i++) {
      const messages = [{ role: "user", content: `question ${i}` }];
      const body = JSON.stringify({ model: "llama-3.1-8b", messages, max_tokens: 5 });
      const response = await fetch(url, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body,
      });
      expect(response.status).toBe(200);
      await response.text();
    }
    gateway.child.kill("SIGTERM");
    await gateway.exit;
    const replay = new HeadraceProcess(["sim", "decisions", file]);
    expect(await replay.exit).toBe(0);
    expect(replay.out).toMatch(/20 requests placed, 0 refused/);
    expect(replay.out).toContain("choices are the same in the simulator");
    const bad = new HeadraceProcess(["sim", "decisions", join(folder, "none.jsonl")]);
    expect(await bad.exit).toBe(2);
    expect(bad.err).toContain("none.jsonl");
  });
});
