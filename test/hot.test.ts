/**
 * From requests to a recording, from the recording to the questions asked most, from those to a warm cache.
 */
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, it } from "vitest";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import { hotCommand } from "../bin/hot.ts";
import { type EmbedTexts, HotQuestions } from "../transport/hot-questions.ts";
import type { OptionsInput } from "../transport/options.ts";
import { parseTraceRecord, type TraceRecord } from "../transport/trace-format.ts";
import { HeadraceProcess, isBuilt, killAll } from "./headrace-process.ts";
import { type LiveWorld, MODEL, startLiveWorld, until } from "./live-world.ts";

const folder = mkdtempSync(join(tmpdir(), "headrace-hot-"));
const worlds: LiveWorld[] = [];
afterEach(async () => {
  for (const world of worlds.splice(0)) await world.close();
});
afterAll(async () => {
  await killAll();
  rmSync(folder, { recursive: true, force: true });
});

const lexical = new LexicalEmbedder(128);
const embed: EmbedTexts = async (texts) => texts.map((text) => lexical.embed(text));

function recordOf(
  content: string,
  more: Partial<TraceRecord> = {},
  fields: object = {},
): TraceRecord {
  const prompt = { model: MODEL, messages: [{ role: "user", content }], ...fields };
  return {
    v: 1,
    atMs: 0,
    tenant: "0123456789abcdef",
    model: MODEL,
    route: "chat",
    stream: false,
    inputTokens: 10,
    outputTokens: 5,
    prefix: [],
    question: JSON.stringify(prompt), // Any text that is the same for equal requests.
    outcome: "ok",
    cache: "miss",
    attempts: 1,
    queuedMs: 0,
    e2eMs: 10,
    prompt,
    ...more,
  };
}

async function topOf(records: readonly TraceRecord[], similarity = 0.95, by?: EmbedTexts) {
  const questions = new HotQuestions();
  for (const record of records) questions.add(record);
  const top = await questions.top(10, similarity, by ?? embed);
  return top.map(({ prompt, asked, wordings }) => {
    const messages = prompt.messages as { content: string }[];
    return [messages.at(-1)?.content, asked, wordings];
  });
}

const times = (count: number, record: TraceRecord): TraceRecord[] => Array(count).fill(record);

describe("hot questions", () => {
  it("repeats count together, and wordings the cache would serve for each other; the commonest stands for them", async () => {
    const records = [
      ...times(2, recordOf("How do I reset the password?")),
      ...times(5, recordOf("how do i reset the password")),
      ...times(6, recordOf("Where is the invoice of the last order?")),
      recordOf("What is the weather like in the mountains today?"),
    ];
    expect(await topOf(records)).toEqual([
      ["how do i reset the password", 7, 2],
      ["Where is the invoice of the last order?", 6, 1],
      ["What is the weather like in the mountains today?", 1, 1],
    ]);
    expect(await topOf(records, 0.95, async (texts) => texts.map(() => undefined))).toHaveLength(4);
  });

  it.each([
    [
      "a guard",
      recordOf("Do I get it back within 3 days?"),
      recordOf("Do I get it back within 5 days?"),
    ],
    [
      "the system prompt",
      recordOf("a b c"),
      recordOf(
        "a b c!",
        {},
        {
          messages: [
            { role: "system", content: "x" },
            { role: "user", content: "a b c!" },
          ],
        },
      ),
    ],
    ["the model", recordOf("a b c"), recordOf("a b c!", { model: "n" }, { model: "n" })],
    [
      "tools",
      recordOf("a b c", {}, { tools: [{ type: "function" }] }),
      recordOf("a b c!", {}, { tools: [{ type: "function" }] }),
    ],
    [
      "a temperature that is not matched by meaning",
      recordOf("a b c", {}, { temperature: 0.9 }),
      recordOf("a b c!", {}, { temperature: 0.9 }),
    ],
    ["the tenant", recordOf("a b c"), recordOf("a b c!", { tenant: "fedcba9876543210" })],
  ])("kept apart by %s", async (_, one, other) => {
    const by: EmbedTexts = async (texts) => texts.map(() => Float32Array.of(1, 0));
    expect(await topOf([one, other], 0.9, by)).toHaveLength(2);
  });

  it("counts what it leaves out, and why; every line is one of them", () => {
    const questions = new HotQuestions({ tenant: "0123456789abcdef" });
    const { prompt: _, ...textless } = recordOf("recorded without its text");
    const { question: __, ...uncacheable } = recordOf("an image");
    for (const record of [
      recordOf("a"),
      recordOf("a", { cache: "hit_exact" }),
      recordOf("a", { outcome: "left" }),
      recordOf("b", { outcome: "failed" }),
      recordOf("c", { outcome: "refused" }),
      recordOf("d", { tenant: "fedcba9876543210" }),
      textless,
      uncacheable,
      recordOf("e", {}, { messages: "none" }),
    ])
      questions.add(record);
    const { lines, ...parts } = questions.counts;
    expect(parts).toEqual({
      counted: 3,
      failed: 2,
      others: 1,
      textless: 1,
      uncacheable: 2,
      left: 0,
    });
    expect(lines).toBe(Object.values(parts).reduce((sum, part) => sum + part, 0));
    expect([questions.size, questions.tenants]).toEqual([1, ["0123456789abcdef"]]);
  });

  it("many wordings of many questions: groups by meaning, counts add up", async () => {
    const records: TraceRecord[] = [];
    for (let question = 0; question < 300; question++) {
      const words = `topic${question} subject${question * 7} matter${question * 13}`;
      for (let wording = 0; wording < 4; wording++)
        records.push(
          ...times(1 + (question % 3), recordOf(`Tell of ${words}${"!".repeat(wording)}`)),
        );
    }
    const questions = new HotQuestions();
    for (const record of records) questions.add(record);
    const top = await questions.top(1000, 0.95, embed);
    expect(top).toHaveLength(300);
    expect(new Set(top.map(({ wordings }) => wordings))).toEqual(new Set([4]));
    expect(top.reduce((sum, { asked }) => sum + asked, 0)).toBe(records.length);
    expect(await questions.top(7, 0.95, embed)).toEqual(top.slice(0, 7));
  });
});

// ---- the whole way ------------------------------------------------------------------------------------------

async function start(options: Partial<OptionsInput>): Promise<LiveWorld> {
  const world = await startLiveWorld({
    options: {
      ...options,
      cache: {
        ...options.cache,
        semantic: { judgeRatio: 0, matchMs: 5000, embedder: { type: "lexical", timeoutMs: 5000 } },
      },
    },
  });
  worlds.push(world);
  await until("the embedder is healthy", async () => {
    return (await world.gateway.state()).embedder?.state === "healthy";
  });
  return world;
}

async function record(prompts: boolean, file: string): Promise<string> {
  const world = await start({ record: { file, prompts } });
  const fields = { user: "customer-4711", metadata: { ticket: "T-1" }, stream: true };
  for (const question of ["How do I reset the password?", "how do i reset the password"])
    for (let at = 0; at < 3; at++) await world.chat(question, fields);
  await world.chat("Where is the invoice of the last order?");
  await world.chat("x".repeat(20_000));
  await world.close();
  return readFileSync(file, "utf8");
}

describe("hot: from a recording to a warm cache", () => {
  it("a recording holds no text, unless its operator wants it; never who asked", async () => {
    const without = await record(false, join(folder, "without.jsonl"));
    expect(without.trim().split("\n")).toHaveLength(8);
    expect(without).not.toMatch(/password|invoice|xxx/);
    const text = await record(true, join(folder, "with.jsonl"));
    expect(text).not.toMatch(/customer-4711|T-1|xxx/);
    const records = text.trim().split("\n").map(parseTraceRecord) as TraceRecord[];
    expect(records.filter((line) => "invalid" in line)).toEqual([]);
    expect(records[0]?.prompt).toEqual({
      model: MODEL,
      messages: [{ role: "user", content: "How do I reset the password?" }],
    });
    expect(records.filter(({ prompt }) => prompt !== undefined)).toHaveLength(7); // Not the long one.
  });

  it("what was asked most is a file, and warms a cache for other wordings, too", async () => {
    const log = join(folder, "log.jsonl");
    const out = join(folder, "hot.txt");
    await record(true, log);
    await hotCommand().parseAsync(["--log", log, "--top", "2", "--out", out], { from: "user" });
    const lines = readFileSync(out, "utf8").split("\n");
    expect(lines.slice(1)).toEqual([
      "# asked 6 times, in 2 wordings",
      JSON.stringify({
        model: MODEL,
        messages: [{ role: "user", content: "How do I reset the password?" }],
      }),
      "# asked 1 times, in 1 wording",
      expect.stringContaining("Where is the invoice of the last order?"),
      "",
    ]);
    expect(statSync(out).mode & 0o077).toBe(0); // Only its owner reads what people asked.
    const world = await start({ warmup: { file: out } });
    expect(await world.server.warmUp(() => {})).toEqual({
      done: 2,
      filled: 2,
      present: 0,
      failures: [],
    });
    const again = await world.chat("How do I reset the password");
    expect(again.cache).toMatch(/^hit-semantic/);
    expect(world.counts()).toEqual([2]);
  });
});

const describeBuilt = isBuilt() ? describe : describe.skipIf(true);

describeBuilt("hot: what it refuses", () => {
  const line = (record: TraceRecord): string => `${JSON.stringify(record)}\n`;
  const file = (name: string, text: string): string => {
    const path = join(folder, name);
    writeFileSync(path, text);
    return path;
  };
  const { prompt: _, ...textless } = recordOf("a");

  it.each([
    ["no log", () => ["--top", "3"], 2, "--log"],
    ["a log that is not there", () => ["--log", join(folder, "none")], 2, "ENOENT"],
    ["a folder", () => ["--log", folder], 2, "EISDIR"],
    ["no recording", () => ["--log", file("a", "hello\n")], 2, "line 1: not JSON"],
    ["an empty one", () => ["--log", file("b", "")], 1, "the recording is empty"],
    ["one without text", () => ["--log", file("c", line(textless))], 1, "record.prompts"],
    [
      "two tenants'",
      () => ["--log", file("d", line(recordOf("a")) + line(recordOf("b", { tenant: "f" })))],
      2,
      "--tenant",
    ],
    [
      "none of that tenant",
      () => ["--log", file("e", line(recordOf("a"))), "--tenant", "x"],
      1,
      "other tenants",
    ],
    ["no count", () => ["--log", file("f", line(recordOf("a"))), "--top", "0"], 2, "--top is 0"],
    [
      "no cosine",
      () => ["--log", file("g", line(recordOf("a"))), "--similarity", "7"],
      2,
      "--similarity is 7",
    ],
    [
      "an embedder that is none",
      () => ["--log", file("h", line(recordOf("a"))), "--embedder", "psychic"],
      2,
      "lexical",
    ],
    [
      "a place that is none",
      () => ["--log", file("i", line(recordOf("a"))), "--out", folder],
      2,
      "--out",
    ],
  ])("%s", async (_, args, code, says) => {
    const one = new HeadraceProcess(["hot", ...args()]);
    expect(await one.exit).toBe(code);
    expect(one.err).toContain(says);
    expect(one.out).toBe("");
  });
});
