/**
 * What sim, plan and replay say to input that cannot be used, as a person meets it: exit code, and a message that
 * names what is wrong and what is accepted. The parsers have tests of their own; these are the commands.
 */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import type { RequestRecord } from "../actors/protocol.ts";
import { lawByName } from "../sim/laws.ts";
import { simulate } from "../sim/simulator.ts";
import { HeadraceProcess, isBuilt, killAll } from "./headrace-process.ts";

const folder = mkdtempSync(join(tmpdir(), "headrace-bad-"));
afterAll(async () => {
  await killAll();
  rmSync(folder, { recursive: true });
});

const HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

function file(name: string, text: string): string {
  const path = join(folder, name);
  writeFileSync(path, text);
  return path;
}

/** One request every `gapMs`, as the Azure trace has it. */
function steady(count: number, gapMs: number): string {
  let text = HEADER;
  for (let index = 0; index < count; index++) {
    const at = new Date(index * gapMs).toISOString().slice(11, 23);
    text += `2023-11-16 ${at}0000,1000,200\n`;
  }
  return text;
}

type Ran = { code: number | string; out: string; err: string };

async function headrace(...args: string[]): Promise<Ran> {
  const process = new HeadraceProcess(args);
  const code = await process.exit;
  return { code, out: process.out, err: process.err };
}

const fine = file("fine.csv", steady(20, 500));
const cut = file("cut.csv", `${steady(20, 500)}2023-11-16 00:00:30.0,7`);
const mooncake = (timestamp: number) =>
  `{"timestamp": ${timestamp}, "input_length": 5, "output_length": 5, "hash_ids": []}\n`;

const wrongTraces = [
  [
    "a missing column",
    "TIMESTAMP,ContextTokens\n2023-11-16 00:00:00.0,5\n",
    ["azure2023"],
    /missing column GeneratedTokens/,
  ],
  ["a negative time", mooncake(-3), [], /line 1: timestamp is "-3"; it must be a time, 0 or more/],
  [
    "times that are not sorted",
    `${HEADER}2023-11-16 00:00:02.5,5,5\n2023-11-16 00:00:01.0,5,5\n`,
    [],
    /line 3: its time is 1.5 s before that of line 2; rows must be sorted/,
  ],
  ["an empty file", "", [], /empty file/],
  ["a file without requests", HEADER, [], /holds no requests/],
] as const;

const wrongFlags = [
  [
    "a node count of 0",
    ["sim", "--trace", fine, "--nodes", "0"],
    /--nodes is 0; it must be a whole number from 1 to 1024/,
  ],
  [
    "a largest size of 0",
    ["plan", "--trace", fine, "--nodes-max", "0"],
    /number of nodes is 0; it must be a whole number/,
  ],
  [
    "an SLO that does not parse",
    ["plan", "--trace", fine, "--slo", "ttft p99 <= 2s, e2e p99 quickly"],
    /"e2e p99 quickly"/,
  ],
  [
    "an SLO for sim",
    ["sim", "--trace", fine, "--slo", "ttfb p99 <= 2s"],
    /"ttfb p99 <= 2s".*ttft/s,
  ],
  [
    "a law that is none",
    ["sim", "--trace", fine, "--law", "h300"],
    /"h300" is no shipped law.*accepted: a law file/s,
  ],
  [
    "a limit of half a request",
    ["replay", "--trace", fine, "--target", "http://a", "--limit", "0.5"],
    /--limit is 0.5/,
  ],
  [
    "an unknown flag",
    ["sim", "--trace", fine, "--router-strategy", "x"],
    /unknown option '--router-strategy'/,
  ],
  [
    "an unknown flag of a subcommand",
    ["sim", "article", "--nodes", "3"],
    /unknown option '--nodes'/,
  ],
] as const;

describe.runIf(isBuilt())("commands: bad input ends with 2 and says why", () => {
  for (const [what, text, format, says] of wrongTraces) {
    it(`trace with ${what}`, async () => {
      const trace = file("wrong.csv", text);
      const flags = ["--trace", trace, ...format.flatMap((name) => ["--format", name])];
      const commands = [
        ["sim", ...flags],
        ["plan", ...flags],
        ["replay", ...flags, "--target", "http://127.0.0.1:1"],
      ];
      const all = await Promise.all(commands.map((args) => headrace(...args)));
      for (const { code, out, err } of all) {
        expect(err).toMatch(says);
        expect(err).toContain("wrong.csv");
        expect([code, out]).toEqual([2, ""]);
      }
    });
  }

  for (const [what, args, says] of wrongFlags) {
    it(what, async () => {
      const { code, out, err } = await headrace(...args);
      expect(err).toMatch(says);
      expect([code, out]).toEqual([2, ""]);
    });
  }

  it("a truncated last line is left out, told, and no error", async () => {
    const { code, out, err } = await headrace("sim", "--trace", cut, "--nodes", "1");
    expect(err).toMatch(/warning: .*line 22: the last line is cut off/);
    expect(out).toMatch(/^20 requests in /);
    expect(code).toBe(0);
  });

  it("a law without validation is used, and labelled", async () => {
    const { code, out } = await headrace("sim", "--trace", fine, "--law", "llama-3-8b/a100");
    expect(out).toMatch(/law +8 × llama-3-8b\/a100: NOT VALIDATED, profile only/);
    expect(code).toBe(0);
  });

  it("a plan whose load exceeds any size tried says so, and ends with 1", async () => {
    const heavy = file("heavy.csv", steady(6400, 50)); // 20/s over 320 s; one such node does a few.
    const size = ["--nodes-max", "2", "--seeds", "1", "--threads", "1"];
    const law = ["--law", "llama-3.1-8b/rtx4090"];
    const { code, out } = await headrace("plan", "--trace", heavy, ...size, ...law);
    expect(out.split("\n")[0]).toMatch(/^No size up to 2 nodes meets the SLO/);
    expect(code).toBe(1);
  });
});

describe("simulator: a request that can never fit in KV memory", () => {
  it("fails at once with the reason, is tried nowhere else and preempts nobody", () => {
    const law = lawByName("llama-3.1-8b/rtx4090");
    const node = { law, kvBlocks: 64 }; // 1024 tokens.
    const records: RequestRecord[] = [];
    const result = simulate({
      nodes: [node, node],
      load: [
        { atUs: 0, inputTokens: 2000, outputTokens: 20 },
        { atUs: 1_000_000, inputTokens: 100, outputTokens: 20 },
        { atUs: 2_000_000, inputTokens: 900, outputTokens: 200 }, // Its prompt alone would fit.
      ],
      onRecord: (record) => records.push(record),
    });
    expect(result.codes).toEqual({ invalid_request: 2, ok: 1 });
    expect(result.counts).toMatchObject({ arrived: 3, completed: 1, failed: 2, unfinished: 0 });
    for (const record of records.filter(({ outcome }) => outcome !== "ok")) {
      expect(record.attempts).toHaveLength(1);
      expect(record.attempts[0]?.detail).toBe("prompt and max_tokens exceed the KV memory");
      expect(record.endedMs).toBeLessThan(10);
    }
    expect(result.nodes.map(({ preemptions }) => preemptions)).toEqual([0, 0]);
  });
});
