import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import fc from "fast-check";
import { afterAll, describe, expect, it } from "vitest";
import { type Content, generateLoad, type LoadSpec } from "../sim/load-generators.ts";
import { openTrace, TraceError, type TraceOptions } from "../sim/trace.ts";
import { chainHash, type TraceRequest } from "../sim/trace-rows.ts";
import { type LoadStatistics, summarizeLoad } from "../sim/trace-statistics.ts";
import {
  formatTraceRecord,
  parseTraceRecord,
  type TraceRecord,
} from "../transport/trace-format.ts";

const folder = mkdtempSync(join(tmpdir(), "headrace-trace-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

let files = 0;
function fixture(text: string, name = `trace-${files++}`): string {
  const file = join(folder, name);
  writeFileSync(file, text);
  return file;
}

async function all(file: string, options?: TraceOptions): Promise<TraceRequest[]> {
  const trace = await openTrace(file, options);
  const requests: TraceRequest[] = [];
  for await (const request of trace.requests()) requests.push(request);
  return requests;
}

async function problem(text: string, options?: TraceOptions): Promise<string> {
  const file = fixture(text);
  try {
    await all(file, options);
  } catch (error) {
    if (error instanceof TraceError) return error.message.replace(file, "FILE");
    throw error;
  }
  return "no problem";
}

const record: TraceRecord = {
  v: 1,
  atMs: 12.345,
  tenant: "0123456789abcdef",
  model: "llama",
  route: "chat",
  stream: true,
  inputTokens: 300,
  outputTokens: 20,
  maxTokens: 64,
  prefix: [7, 4294967295],
  question: "fedcba9876543210",
  session: "s1",
  outcome: "ok",
  cache: "miss",
  node: "gpu-1",
  attempts: 1,
  queuedMs: 0.5,
  ttftMs: 40,
  e2eMs: 900.25,
};

describe("trace record", () => {
  it("reads back what it writes (any record)", () => {
    const time = fc
      .double({ min: 0, max: 1e9, noNaN: true })
      .map((ms) => Math.round(ms * 1000) / 1000);
    const count = fc.nat({ max: 1_000_000 });
    const records = fc.record(
      {
        v: fc.constant(1 as const),
        atMs: time,
        tenant: fc.string(),
        model: fc.string(),
        route: fc.constantFrom("chat" as const, "completions" as const, "embeddings" as const),
        stream: fc.boolean(),
        inputTokens: count,
        outputTokens: count,
        maxTokens: count,
        prefix: fc.array(count, { maxLength: 256 }),
        question: fc.string(),
        session: fc.string(),
        outcome: fc.constantFrom(
          "ok" as const,
          "refused" as const,
          "failed" as const,
          "left" as const,
        ),
        cache: fc.constantFrom("miss" as const, "hit_exact" as const, "joined" as const),
        node: fc.string(),
        attempts: count,
        queuedMs: time,
        ttftMs: time,
        e2eMs: time,
      },
      {
        requiredKeys: [
          ...([
            "v",
            "atMs",
            "tenant",
            "model",
            "route",
            "stream",
            "inputTokens",
            "outputTokens",
          ] as const),
          ...(["prefix", "outcome", "cache", "attempts", "queuedMs", "e2eMs"] as const),
        ],
      },
    );
    fc.assert(
      fc.property(records, (value) => {
        const line = formatTraceRecord(value as TraceRecord);
        expect(line).not.toContain("\n");
        expect(parseTraceRecord(line)).toEqual(JSON.parse(JSON.stringify(value)));
      }),
    );
  });

  it("says which field is wrong and what it takes", () => {
    const wrong = (change: Record<string, unknown>) =>
      parseTraceRecord(JSON.stringify({ ...record, ...change }));
    expect(parseTraceRecord("{")).toEqual({ invalid: "not JSON" });
    expect(parseTraceRecord("[]")).toEqual({ invalid: "not a JSON object" });
    expect(wrong({ v: 2 })).toEqual({ invalid: "v is 2; this version reads 1" });
    expect(wrong({ atMs: -1 })).toEqual({ invalid: "atMs is -1; it must be ms, 0 or more" });
    expect(wrong({ model: undefined })).toEqual({
      invalid: "model is missing; it must be a string",
    });
    expect(wrong({ outcome: "lost" })).toEqual({
      invalid: 'outcome is "lost"; accepted: ok, refused, failed, left',
    });
    expect(wrong({ inputTokens: 1.5 })).toHaveProperty("invalid");
    expect(wrong({ prefix: new Array(257).fill(1) })).toHaveProperty("invalid");
    expect(wrong({ ttftMs: "40" })).toHaveProperty("invalid");
    expect(wrong({ unknown: "a later version's field" })).not.toHaveProperty("invalid");
  });
});

describe("trace formats", () => {
  it("azure2023: times without zone become µs from the first, to 100 ns rounded", async () => {
    const file = fixture(
      "TIMESTAMP,ContextTokens,GeneratedTokens\r\n" +
        "2023-11-16 23:59:59.9999990,374,44\r\n" +
        "2023-11-17 00:00:00.5000006,396,109", // No line break at the end, as in the real files.
    );
    expect(await all(file)).toEqual([
      { atUs: 0, inputTokens: 374, outputTokens: 44 },
      { atUs: 500_002, inputTokens: 396, outputTokens: 109 },
    ]);
  });

  it("burstgpt: both generations, a response of 0 tokens is a failure", async () => {
    const one = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n";
    const three =
      "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n";
    expect(
      await all(fixture(`${one}5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,7,0,7,API log\n`)),
    ).toEqual([
      { atUs: 0, inputTokens: 472, outputTokens: 18, outcome: "ok", model: "ChatGPT" },
      { atUs: 40_000_000, inputTokens: 7, outputTokens: 0, outcome: "failed", model: "GPT-4" },
    ]);
    expect(
      await all(fixture(`${three}19440110.5,s-1,43,GPT-4,906,446,1352,Conversation log\n`)),
    ).toEqual([
      {
        atUs: 0,
        inputTokens: 906,
        outputTokens: 446,
        outcome: "ok",
        model: "GPT-4",
        session: "s-1",
      },
    ]);
  });

  it("burstgpt: warns of a file whose gaps are all equal, and only of that", async () => {
    const header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n";
    const rows = (gap: (row: number) => number) => {
      let text = header;
      let at = 0;
      for (let row = 0; row < 150; row++) {
        at += gap(row);
        text += `${at},M,1,1,2,x\n`;
      }
      return text;
    };
    const made = await openTrace(fixture(rows(() => 1)));
    const real = await openTrace(fixture(rows((row) => (row === 90 ? 2 : 1))));
    await summarizeLoad(made.requests());
    await summarizeLoad(real.requests());
    expect(made.warnings()).toHaveLength(1);
    expect(made.warnings()[0]).toContain("all gaps are equal");
    expect(real.warnings()).toEqual([]);
  });

  const mooncake = (atMs: number, blocks: number[]) =>
    `{"timestamp": ${atMs}, "input_length": ${blocks.length * 512 - 5}, "output_length": 9, "hash_ids": ${JSON.stringify(blocks)}}\n`;

  it("mooncake: requests of a mark are spread over its 3 s, in file order, the same for a seed", async () => {
    const marks = [0, 0, 0, 5999, 6000, 6000, 9000];
    const file = fixture(marks.map((atMs, row) => mooncake(atMs, [0, row + 1])).join(""));
    const spread = await all(file, { seed: 5 });
    const again = await all(file, { seed: 5 });
    const other = await all(file, { seed: 6 });
    expect(spread).toEqual(again);
    expect(other).not.toEqual(spread);
    expect(spread.map((request) => request.prefix?.[1])).toEqual([1, 2, 3, 4, 5, 6, 7]);
    const origin = spread[0]?.atUs ?? -1;
    expect(origin).toBe(0);
    // The first request defines 0, so marks are known only up to its place in the first one.
    for (const [row, request] of spread.entries()) {
      const mark = Math.round((marks[row] ?? 0) / 3000) * 3_000_000;
      expect(request.atUs).toBeGreaterThanOrEqual(mark - 3_000_000);
      expect(request.atUs).toBeLessThan(mark + 3_000_000);
    }
    const times = spread.map((request) => request.atUs);
    expect(times).toEqual([...times].sort((left, right) => left - right));
    const raw = await all(file, { spread: false });
    expect(raw.map((request) => request.atUs / 1000)).toEqual(marks);
    expect(raw[0]).toEqual({
      atUs: 0,
      inputTokens: 1019,
      outputTokens: 9,
      prefix: [0, 1],
      blockTokens: 512,
    });
  });

  it("mooncake: a stamp off the marks asks for raw times", async () => {
    expect(await problem(mooncake(0, [1]) + mooncake(1234, [1]))).toBe(
      "FILE, line 2: timestamp 1234 ms is on no 3 s mark: these times were not rounded, so read them raw " +
        "(`spread: false`, `--raw-times`)",
    );
  });

  const ragRow = (at: number, ids: { system: number[]; user: number }, session: string) =>
    `${JSON.stringify({
      timestamp: String(at),
      input_length: 40,
      output_length: 7,
      hash_ids: {
        sys_prompt: ids.system,
        passages_ids: [1],
        history: [],
        web_search: [],
        user_input: [ids.user],
      },
      session_id: session,
    })}\n`;

  function ragFolder(rows: string, without?: string): string {
    const set = mkdtempSync(join(folder, "rag-"));
    const put = (name: string, text: string) => {
      if (name !== without) writeFileSync(join(set, name), text);
    };
    put("0_trace.jsonl", `${rows}\n`);
    put(
      "1_sys_prompt.jsonl",
      '{"sys_prompt_id": 10, "token_length": 20}\n{"sys_prompt_id": 11, "token_length": 20}\n\n',
    );
    put("2_passages.jsonl", '{"passage_id": 1, "token_length": 12}\n');
    put("3_history.jsonl", "");
    put(
      "4_user_input.jsonl",
      '{"user_input_id": 30, "token_length": 8}\n{"user_input_id": 31, "token_length": 8}\n',
    );
    put("5_web_search.jsonl", "");
    return join(set, "0_trace.jsonl");
  }

  it("ragpulse: rows are sorted stably; equal segments from the start make equal blocks", async () => {
    const file = ragFolder(
      ragRow(5, { system: [10], user: 30 }, "a") +
        ragRow(9, { system: [10], user: 31 }, "b") +
        ragRow(2, { system: [11], user: 30 }, "c") +
        ragRow(5, { system: [10], user: 30 }, "d"),
    );
    const requests = await all(file);
    expect(requests.map(({ session, atUs }) => [session, atUs])).toEqual([
      ["c", 0],
      ["a", 3_000_000],
      ["d", 3_000_000],
      ["b", 7_000_000],
    ]);
    const [c, a, d, b] = requests;
    // 20 + 12 + 8 tokens: two whole blocks of 16; the user's words begin in the third, which is not whole.
    expect(a?.prefix).toHaveLength(2);
    expect(a?.prefix).toEqual(b?.prefix);
    expect(c?.prefix?.[0]).not.toBe(a?.prefix?.[0]);
    expect(a?.question).toBe(d?.question);
    expect(new Set([a?.question, b?.question, c?.question]).size).toBe(3);
    const byWords = await all(file, { questionOf: "user_turn" });
    expect(byWords.map((request) => request.question === byWords[0]?.question)).toEqual([
      true,
      true,
      true,
      false,
    ]);
  });

  it("ragpulse: says which file or which length is missing", async () => {
    const rows = ragRow(5, { system: [10], user: 32 }, "a");
    const missing = openTrace(ragFolder(rows, "2_passages.jsonl"));
    await expect(missing).rejects.toThrow(/2_passages\.jsonl: no such file/);
    await expect(all(ragFolder(rows))).rejects.toThrow(
      /line 1: user_input 32 has no length in 4_user_input\.jsonl/,
    );
  });

  it("headrace: arrivals are put in order; a hit gets the length of the answer that it repeated", async () => {
    const line = (change: Partial<TraceRecord>) =>
      `${formatTraceRecord({ ...record, ...change })}\n`;
    const file = fixture(
      line({ atMs: 50, e2eMs: 10, question: "q2", outcome: "refused", outputTokens: 0 }) +
        line({ atMs: 1, e2eMs: 100 }) +
        line({ atMs: 150, e2eMs: 1, outputTokens: 0, cache: "hit_exact" }) +
        line({ atMs: 160, e2eMs: 1, route: "embeddings" }),
    );
    const trace = await openTrace(file);
    const requests: TraceRequest[] = [];
    for await (const request of trace.requests()) requests.push(request);
    expect(requests).toEqual([
      {
        atUs: 0,
        inputTokens: 300,
        outputTokens: 20,
        maxTokens: 64,
        model: "llama",
        tenant: "0123456789abcdef",
        session: "s1",
        prefix: [7, 4294967295],
        blockTokens: 256,
        question: "fedcba9876543210",
        outcome: "ok",
      },
      expect.objectContaining({ atUs: 49_000, outputTokens: 0, outcome: "refused" }),
      expect.objectContaining({ atUs: 149_000, outputTokens: 20, outcome: "ok" }),
    ]);
    expect(trace.skippedRows()).toBe(1);
    expect(trace.warnings()).toEqual([`${file}: 1 embeddings requests were left out`]);
  });

  it("headrace: a recording appended to another goes on where the first ended", async () => {
    const line = (atMs: number, e2eMs: number) =>
      `${formatTraceRecord({ ...record, atMs, e2eMs })}\n`;
    const trace = await openTrace(
      fixture(line(0, 10) + line(60_000, 5000) + line(10, 5) + line(500, 5)),
    );
    const times: number[] = [];
    for await (const { atUs } of trace.requests()) times.push(atUs / 1000);
    expect(times).toEqual([0, 60_000, 65_010, 65_500]);
    expect(trace.warnings()[0]).toContain("several recordings");
  });

  it("headrace: out of order beyond the window is an error, within it is sorted", async () => {
    const line = (atMs: number) => formatTraceRecord({ ...record, atMs, e2eMs: 1e9 - atMs });
    const late = (rows: number) =>
      fixture(
        `${[...Array.from({ length: rows }, (_, row) => line(row + 1)), line(0)].join("\n")}\n`,
      );
    const sorted = await all(late(65_536));
    expect(sorted[0]?.atUs).toBe(0);
    expect(sorted).toHaveLength(65_537);
    await expect(all(late(65_537))).rejects.toThrow(
      /line 65538: its time is out of order by more than 65536 requests/,
    );
  });
});

describe("trace input", () => {
  const azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
  const at = (second: string, rest: string) => `2023-11-16 18:15:${second},${rest}\n`;

  it("a wrong file says where, what was found and what is accepted", async () => {
    expect(await problem("")).toBe("FILE: empty file");
    expect(await problem("\n  \n")).toBe("FILE: empty file");
    expect(await problem(azure)).toBe("FILE: holds no requests");
    expect(await problem("hello,world\n")).toBe(
      'FILE, line 1: fits none of the formats azure2023, burstgpt, mooncake, ragpulse, headrace: "hello,world"',
    );
    expect(await problem(azure, { format: "vidur" })).toBe(
      'unknown trace format "vidur"; known: azure2023, burstgpt, mooncake, ragpulse, headrace',
    );
    expect(
      await problem("TIMESTAMP,Tokens,GeneratedTokens\n1,2,3\n", { format: "azure2023" }),
    ).toBe(
      'FILE, line 1: missing column ContextTokens; found "TIMESTAMP", "Tokens", "GeneratedTokens"',
    );
    expect(await problem('{"timestamp": 0, "input_length": 5, "hash_ids": []}\n')).toBe(
      "FILE, line 1: missing output_length; found timestamp, input_length, hash_ids",
    );
    expect(await problem(azure + at("01.0", "5,5") + at("02.0", "-5,5"))).toBe(
      'FILE, line 3: ContextTokens is "-5"; it must be a whole number, 0 or more',
    );
    expect(await problem(azure + at("01.0", "5,5,5"))).toBe(
      "FILE, line 2: 4 columns; the header has 3",
    );
    expect(await problem(`${azure}yesterday,5,5\n`)).toBe(
      'FILE, line 2: TIMESTAMP is "yesterday"; it must be like 2023-11-16 18:15:46.6805900',
    );
    expect(await problem(azure + at("02.5", "5,5") + at("01.0", "5,5"))).toBe(
      "FILE, line 3: its time is 1.5 s before that of line 2; rows must be sorted",
    );
    expect(
      await problem('{"timestamp": -3, "input_length": 5, "output_length": 5, "hash_ids": []}\n'),
    ).toBe('FILE, line 1: timestamp is "-3"; it must be a time, 0 or more');
    expect(
      await problem(
        '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1, 2]}\n',
      ),
    ).toBe("FILE, line 1: hash_ids holds 2 blocks of 512 tokens, more than input_length 5 has");
    expect(
      await problem(`${formatTraceRecord(record)}\n{"v": 1,\n${formatTraceRecord(record)}\n`),
    ).toBe("FILE, line 2: not JSON");
    await expect(openTrace(join(folder, "absent.csv"))).rejects.toThrow(
      /absent\.csv: no such file/,
    );
    await expect(openTrace(folder)).rejects.toThrow(/is a folder, not a file/);
  });

  it("a last line that is cut off is left out, counted and told; a cut line elsewhere is an error", async () => {
    const jsonl = `${formatTraceRecord(record)}\n`;
    for (const text of [
      `${azure}${at("01.0", "5,5")}2023-11-16 18:15:02.0,7`,
      `${azure}${at("01.0", "5,5")}2023-11-16 18:15:02.0,7,`,
      jsonl + jsonl.slice(0, 50),
    ]) {
      const trace = await openTrace(fixture(text));
      const statistics = await summarizeLoad(trace.requests());
      expect(statistics.requests).toBe(1);
      expect(trace.skippedRows()).toBe(1);
      expect(trace.warnings()).toHaveLength(1);
      expect(trace.warnings()[0]).toMatch(/line [23]: the last line is cut off/);
    }
    expect(await problem(`${azure}2023-11-16 18:15:02.0,7\n${at("03.0", "5,5")}`)).toBe(
      "FILE, line 2: 2 columns; the header has 3",
    );
    // Wrong, not cut off: an error even at the end.
    expect(await problem(`${azure}${at("01.0", "5,5")}2023-11-16 18:15:02.0,x,7`)).toBe(
      'FILE, line 3: ContextTokens is "x"; it must be a whole number, 0 or more',
    );
  });

  it("options out of range are refused before the file is read", async () => {
    for (const options of [
      { fromUs: -1 },
      { fromUs: 5, toUs: 5 },
      { speed: 0 },
      { speed: Number.NaN },
      { limit: 0 },
      { copies: 0 },
      { copies: 101 },
      { shiftUs: -1 },
    ]) {
      await expect(openTrace(join(folder, "absent"), options)).rejects.toThrow(/must be/);
    }
  });
});

describe("trace shaping", () => {
  const rows = Array.from({ length: 100 }, (_, row) =>
    formatTraceRecord({
      ...record,
      atMs: row * 100,
      e2eMs: 1,
      inputTokens: row,
      prefix: [3, row],
      question: `q${row}`,
    }),
  );
  const file = fixture(`${rows.join("\n")}\n`, "shaped.jsonl");

  it("a window keeps [from, to) and starts at from; a limit ends it", async () => {
    const window = await all(file, { fromUs: 1_050_000, toUs: 1_300_000 });
    expect(window.map(({ atUs, inputTokens }) => [atUs, inputTokens])).toEqual([
      [50_000, 11],
      [150_000, 12],
    ]);
    expect(await all(file, { limit: 3 })).toHaveLength(3);
    await expect(all(file, { fromUs: 1e9 })).rejects.toThrow(
      /no request from 1000 s after its first on/,
    );
  });

  it("speed keeps the requests and divides the times", async () => {
    const fast = await all(file, { speed: 3 });
    expect(fast).toHaveLength(100);
    expect(fast[10]?.atUs).toBe(Math.round(1_000_000 / 3));
  });

  it("copies: each copy holds every request once, moved and wrapped, on texts of its own", async () => {
    const copies = await all(file, { copies: 4, shiftUs: 1_250_000 });
    expect(copies).toHaveLength(400);
    const times = copies.map((request) => request.atUs);
    expect(times).toEqual([...times].sort((left, right) => left - right));
    expect(times[0]).toBe(0);
    for (let copy = 0; copy < 4; copy++) {
      const suffix = copy === 0 ? "" : `~${copy}`;
      const own = copies.filter((request) =>
        copy === 0 ? !request.session?.includes("~") : request.session?.endsWith(suffix),
      );
      expect(new Set(own.map((request) => request.question)).size).toBe(100);
      for (const { atUs, inputTokens, question, prefix } of own) {
        expect(question).toBe(`q${inputTokens}${suffix}`);
        // The period is 9.9 s and one mean gap: 10 s.
        expect(atUs).toBe((inputTokens * 100_000 + 10_000_000 - copy * 1_250_000) % 10_000_000);
        expect(prefix).toEqual(
          copy === 0 ? [3, inputTokens] : [chainHash(copy, 3), chainHash(copy, inputTokens)],
        );
      }
    }
  });

  it("compression and superposition reach the same rate with different burstiness", async () => {
    const bursty = generateLoad({
      seed: 4,
      arrivals: { kind: "gamma", rate: 5, cv: 5 },
      content: { kind: "plain", input: constant(10), output: constant(10) },
      requests: 5000,
    });
    const lines = Array.from(bursty, ({ atUs }) =>
      formatTraceRecord({ ...record, atMs: atUs / 1000, e2eMs: 1e7 }),
    );
    const burstyFile = fixture(`${lines.join("\n")}\n`);
    const summary = async (options: TraceOptions) =>
      summarizeLoad((await openTrace(burstyFile, options)).requests());
    const faster = await summary({ speed: 8 });
    const more = await summary({ copies: 8 });
    expect(more.ratePerSecond).toBeCloseTo(faster.ratePerSecond ?? 0, 0);
    expect(faster.cv).toBeGreaterThan(4);
    expect(more.cv).toBeLessThan(faster.cv ?? 0);
  });
});

function constant(mean: number) {
  return { mean, cv: 0, max: 1_000_000 };
}

describe("load statistics", () => {
  it("agree with a plain computation (windows with gaps, last window not whole)", async () => {
    const atS = [0, 0.5, 0.5, 3.2, 3.9, 61, 130.5];
    const requests = atS.map((at, index) => ({
      atUs: at * 1e6,
      inputTokens: (index + 1) * 100_000,
      outputTokens: index,
    }));
    const statistics = await summarizeLoad(requests);
    const gaps = atS.slice(1).map((at, index) => at - (atS[index] ?? 0));
    expect(statistics.requests).toBe(7);
    expect(statistics.ratePerSecond).toBeCloseTo(7 / 130.5, 12);
    expect(statistics.cv).toBeCloseTo(deviation(gaps) / mean(gaps), 12);
    const perSecond = new Array(130).fill(0);
    for (const at of atS) if (at < 130) perSecond[Math.floor(at)]++;
    const perMinute = [5, 1];
    expect(statistics.idc1s).toBeCloseTo(
      deviation(perSecond) * (deviation(perSecond) / mean(perSecond)),
      12,
    );
    expect(statistics.idc60s).toBeCloseTo(
      deviation(perMinute) * (deviation(perMinute) / mean(perMinute)),
      12,
    );
    expect(statistics.peakSecondPerSecond).toBe(3);
    expect(statistics.peakMinutePerSecond).toBe(5 / 60);
    expect(statistics.outputTokens).toEqual({
      mean: 3,
      p50: 3,
      p90: 5.4,
      p99: 5.9399999999999995,
      max: 6,
    });
    // Counts from 262,144 up are kept to 1 in 4,096.
    expect(statistics.inputTokens.max).toBe(700_000);
    expect(Math.abs(statistics.inputTokens.p50 / 400_000 - 1)).toBeLessThan(1 / 4096);
  });

  it("leave out what a load does not say (one request)", async () => {
    const statistics = await summarizeLoad([{ atUs: 5, inputTokens: 3, outputTokens: 1 }]);
    expect(statistics).toEqual({
      requests: 1,
      durationUs: 0,
      inputTokens: { mean: 3, p50: 3, p90: 3, p99: 3, max: 3 },
      outputTokens: { mean: 1, p50: 1, p90: 1, p99: 1, max: 1 },
    });
  });
});

function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function deviation(values: readonly number[]): number {
  const middle = mean(values);
  return Math.sqrt(mean(values.map((value) => (value - middle) * (value - middle))));
}

const traces = resolve(import.meta.dirname, "../../shared/data/traces");

/** Published figures, to the digits published. */
type Expected = {
  requests: number;
  input: [mean: number, p50: number, p90: number, p99: number, max: number];
  output: [mean: number, p50: number, p90: number, p99: number, max: number];
  rate: [value: number, digits: number];
  peakSecond?: number;
  peakMinute: [value: number, digits: number];
  cv: [value: number, digits: number];
  idc: [oneSecond: number, sixtySeconds: number];
};

const published: [file: string, options: TraceOptions, expected: Expected][] = [
  [
    "azure2023/AzureLLMInferenceTrace_conv.csv",
    {},
    {
      requests: 19_366,
      input: [1155, 1020, 2734, 4142, 14_050],
      output: [211, 129, 424, 601, 1000],
      rate: [5.53, 2],
      peakSecond: 16,
      peakMinute: [8.45, 2],
      cv: [1.09, 2],
      idc: [1.4, 16.1],
    },
  ],
  [
    "azure2023/AzureLLMInferenceTrace_code.csv",
    {},
    {
      requests: 8819,
      input: [2048, 1469, 5188, 7436, 7437],
      output: [28, 13, 55, 251, 1899],
      rate: [2.57, 2],
      peakSecond: 67,
      peakMinute: [10.5, 1],
      cv: [13.2, 1],
      idc: [13.2, 164],
    },
  ],
  [
    "mooncake/conversation_trace.jsonl",
    { spread: false },
    {
      requests: 12_031,
      input: [12_035, 6909, 27_367, 85_400, 126_195],
      output: [343, 350, 597, 1119, 2000],
      rate: [3.4, 2],
      peakMinute: [4.12, 2],
      cv: [3.03, 2],
      idc: [7.9, 2.9],
    },
  ],
  [
    "ragpulse/0_trace.jsonl",
    {},
    {
      requests: 7106,
      input: [2944, 3140, 3958, 5438, 7712],
      output: [283, 234, 563, 891, 2183],
      rate: [0.012, 3],
      peakSecond: 3,
      peakMinute: [0.17, 2],
      cv: [3.06, 2],
      idc: [1.0, 1.7],
    },
  ],
];

const haveTraces = existsSync(traces);
if (!haveTraces) console.log(`skipped: real traces, ${traces} is absent`);

describe.skipIf(!haveTraces)("real traces", () => {
  const rounded = (value: number | undefined, digits: number) =>
    Number((value ?? Number.NaN).toFixed(digits));

  for (const [file, options, expected] of published) {
    it(`${file}: the published figures`, async () => {
      const trace = await openTrace(join(traces, file), options);
      const found: LoadStatistics = await summarizeLoad(trace.requests());
      expect(trace.warnings()).toEqual([]);
      expect(found.requests).toBe(expected.requests);
      for (const [tokens, figures] of [
        [found.inputTokens, expected.input],
        [found.outputTokens, expected.output],
      ] as const) {
        const { mean, p50, p90, p99, max } = tokens;
        for (const [index, value] of [mean, p50, p90, p99, max].entries()) {
          // Published without decimals; one lies on 3958.5 and was rounded down.
          expect(Math.abs(value - (figures[index] ?? Number.NaN))).toBeLessThanOrEqual(0.5);
        }
      }
      expect(rounded(found.ratePerSecond, expected.rate[1])).toBe(expected.rate[0]);
      if (expected.peakSecond !== undefined)
        expect(found.peakSecondPerSecond).toBe(expected.peakSecond);
      expect(rounded(found.peakMinutePerSecond, expected.peakMinute[1])).toBe(
        expected.peakMinute[0],
      );
      expect(rounded(found.cv, expected.cv[1])).toBe(expected.cv[0]);
      expect(rounded(found.idc1s, 1)).toBe(expected.idc[0]);
      expect(rounded(found.idc60s, expected.idc[1] > 100 ? 0 : 1)).toBe(expected.idc[1]);
    });
  }

  it("mooncake: spread over the marks the arrivals are about Poisson (CV 1.01)", async () => {
    const trace = await openTrace(join(traces, "mooncake/conversation_trace.jsonl"));
    const { requests, cv } = await summarizeLoad(trace.requests());
    expect(requests).toBe(12_031);
    expect(Math.abs((cv ?? 0) - 1.01)).toBeLessThan(0.02);
  });

  it("mooncake: 36.6 % of the prompt blocks were seen before", async () => {
    const trace = await openTrace(join(traces, "mooncake/conversation_trace.jsonl"));
    const seen = new Set<number>();
    let blocks = 0;
    let hits = 0;
    for await (const { prefix = [] } of trace.requests()) {
      blocks += prefix.length;
      for (const id of prefix) {
        if (seen.has(id)) hits++;
        seen.add(id);
      }
    }
    expect(blocks).toBe(288_500);
    expect(((100 * hits) / blocks).toFixed(1)).toBe("36.6");
  });

  it("ragpulse: 11.5 % of the users' questions repeat, whole prompts almost never", async () => {
    const repeats = async (questionOf: "request" | "user_turn") => {
      const trace = await openTrace(join(traces, "ragpulse/0_trace.jsonl"), { questionOf });
      const seen = new Set<string | undefined>();
      let count = 0;
      for await (const { question } of trace.requests()) {
        if (seen.has(question)) count++;
        seen.add(question);
      }
      return count;
    };
    expect(((100 * (await repeats("user_turn"))) / 7106).toFixed(1)).toBe("11.5");
    expect(await repeats("request")).toBe(1);
  });

  it("burstgpt: the heads of both generations", async () => {
    const one = await all(join(traces, "burstgpt/BurstGPT_1.head.csv"));
    const three = await all(join(traces, "burstgpt/BurstGPT_3.head.csv"));
    expect(one.map((request) => request.atUs / 1e6)).toEqual([0, 40, 113]);
    expect(three.map((request) => request.atUs / 1e6)).toEqual([0, 51, 82, 144]);
    expect(three[0]?.session).toBe("1722ac82-0a46-4bf0-aa08-89794e7a2b3f");
  });
});

describe("generated loads", () => {
  const plain: Content = {
    kind: "plain",
    input: { mean: 900, cv: 0.8, max: 100_000 },
    output: constant(50),
  };
  const load = (spec: Partial<LoadSpec>) =>
    generateLoad({
      seed: 1,
      arrivals: { kind: "poisson", rate: 10 },
      content: plain,
      requests: 40_000,
      ...spec,
    });

  it("the same spec gives the same load; another seed another", () => {
    const first = [...load({ requests: 500 })];
    expect([...load({ requests: 500 })]).toEqual(first);
    expect([...load({ requests: 500, seed: 2 })]).not.toEqual(first);
    // Contents have their own streams: another output law moves no arrival and no prompt.
    const other = [
      ...load({ requests: 500, content: { ...plain, output: { mean: 9, cv: 2, max: 99 } } }),
    ];
    expect(other.map((request) => request.atUs)).toEqual(first.map((request) => request.atUs));
    expect(other.map((request) => request.inputTokens)).toEqual(
      first.map((request) => request.inputTokens),
    );
  });

  it("times are whole and never fall, whatever the arrivals", () => {
    const agentic: Content = {
      kind: "agents",
      apps: 2,
      systemTokens: 500,
      added: { mean: 100, cv: 1, max: 1000 },
      output: { mean: 80, cv: 1, max: 1000 },
      turns: { mean: 5, cv: 0.5, max: 20 },
      gapUs: 3_000_000,
      contextMax: 4000,
    };
    for (const arrivals of [
      { kind: "poisson", rate: 50 },
      { kind: "gamma", rate: 50, cv: 6 },
      { kind: "daily", rate: 50, swing: 1, periodUs: 60_000_000 },
      { kind: "ramp", fromRate: 0, toRate: 80, overUs: 30_000_000 },
    ] as const) {
      for (const content of [plain, agentic]) {
        let lastUs = 0;
        let count = 0;
        for (const { atUs, inputTokens, outputTokens } of load({
          arrivals,
          content,
          requests: 5000,
        })) {
          expect(Number.isSafeInteger(atUs) && atUs >= lastUs).toBe(true);
          expect(Number.isInteger(inputTokens) && inputTokens >= 1 && outputTokens >= 1).toBe(true);
          lastUs = atUs;
          count++;
        }
        expect(count).toBe(5000);
      }
    }
  });

  it("poisson: rate, CV 1, IDC 1; lengths have their mean and CV", async () => {
    const { ratePerSecond, cv, idc1s, inputTokens } = await summarizeLoad(load({}));
    expect(Math.abs((ratePerSecond ?? 0) / 10 - 1)).toBeLessThan(0.02);
    expect(Math.abs((cv ?? 0) - 1)).toBeLessThan(0.02);
    expect(Math.abs((idc1s ?? 0) - 1)).toBeLessThan(0.07);
    expect(Math.abs(inputTokens.mean / 900 - 1)).toBeLessThan(0.02);
    const lengths = [...load({})].map((request) => request.inputTokens);
    expect(Math.abs(deviation(lengths) / mean(lengths) - 0.8)).toBeLessThan(0.02);
  });

  it("gamma: the CV asked for, above 1 and below", async () => {
    for (const [wanted, slack] of [
      [0.3, 0.01],
      [4, 0.2],
    ] as const) {
      const { ratePerSecond, cv } = await summarizeLoad(
        load({ arrivals: { kind: "gamma", rate: 20, cv: wanted } }),
      );
      expect(Math.abs((cv ?? 0) - wanted)).toBeLessThan(slack);
      expect(Math.abs((ratePerSecond ?? 0) / 20 - 1)).toBeLessThan(0.06);
    }
  });

  it("daily: the mean rate, with the trough first and the peak half a period later", () => {
    const periodUs = 1_000_000_000;
    const counts = new Array(10).fill(0);
    const arrivals = { kind: "daily", rate: 20, swing: 0.9, periodUs } as const;
    for (const { atUs } of load({ arrivals, requests: 1e6, durationUs: 3 * periodUs })) {
      counts[Math.floor(((atUs % periodUs) / periodUs) * 10)]++;
    }
    expect(Math.abs(counts.reduce((sum, count) => sum + count) / 60_000 - 1)).toBeLessThan(0.02);
    // Integral of the law over a tenth around the trough (0.0 and 0.9) and around the peak (0.4, 0.5).
    const tenth = (from: number) =>
      6000 *
      (1 -
        (0.9 / (0.1 * 2 * Math.PI)) *
          (Math.sin(2 * Math.PI * (from + 0.1)) - Math.sin(2 * Math.PI * from)));
    for (const index of [0, 4, 5, 9]) {
      expect(Math.abs(counts[index] - tenth(index / 10))).toBeLessThan(
        4 * Math.sqrt(tenth(index / 10)),
      );
    }
  });

  it("ramp: arrivals grow as the square of time, then steadily", () => {
    const arrivals = { kind: "ramp", fromRate: 0, toRate: 100, overUs: 100_000_000 } as const;
    const counts = [0, 0, 0];
    for (const { atUs } of load({ arrivals, requests: 1e6, durationUs: 150_000_000 })) {
      const part = Math.floor(atUs / 50_000_000);
      counts[part] = (counts[part] ?? 0) + 1;
    }
    for (const [index, wanted] of [1250, 3750, 5000].entries()) {
      expect(Math.abs((counts[index] ?? 0) - wanted)).toBeLessThan(4 * Math.sqrt(wanted));
    }
  });

  it("agents: each turn's prompt begins with the one before it and its answer", () => {
    const content: Content = {
      kind: "agents",
      apps: 3,
      systemTokens: 1000,
      added: { mean: 200, cv: 1, max: 2000 },
      output: { mean: 150, cv: 1, max: 2000 },
      turns: { mean: 8, cv: 0.5, max: 50 },
      gapUs: 5_000_000,
      contextMax: 6000,
    };
    const last = new Map<string, TraceRequest>();
    const turns = new Map<string, number>();
    const heads = new Set<string>();
    for (const request of load({ content, requests: 20_000 })) {
      const { session = "", inputTokens, outputTokens, prefix = [], blockTokens = 0 } = request;
      const before = last.get(session);
      expect(inputTokens + outputTokens).toBeLessThanOrEqual(6000);
      expect(prefix).toHaveLength(Math.floor(inputTokens / blockTokens));
      if (before !== undefined) {
        expect(inputTokens).toBeGreaterThan(before.inputTokens + before.outputTokens);
        expect(prefix.slice(0, before.prefix?.length)).toEqual(before.prefix);
      }
      heads.add(prefix.slice(0, Math.floor(1000 / blockTokens)).join());
      last.set(session, request);
      turns.set(session, (turns.get(session) ?? 0) + 1);
    }
    expect(heads.size).toBe(3); // One system prompt an app, shared by all its conversations.
    expect(Math.max(...turns.values())).toBeGreaterThan(5);
    // Beyond the system prompt no two conversations share a block.
    const longer = [...last.values()].filter(({ prefix = [] }) => prefix.length > 15);
    const tails = longer.map((request) => request.prefix?.at(-1));
    expect(tails.length).toBeGreaterThan(1000);
    expect(new Set(tails).size).toBe(tails.length);
  });

  it("agents: a context too small for the first turn shortens it", () => {
    const content: Content = {
      kind: "agents",
      apps: 1,
      systemTokens: 100,
      added: constant(500),
      output: constant(500),
      turns: constant(3),
      gapUs: 0,
      contextMax: 200,
    };
    const requests = [...load({ content, requests: 10 })];
    expect(requests).toHaveLength(10);
    for (const { inputTokens, outputTokens } of requests)
      expect([inputTokens, outputTokens]).toEqual([199, 1]);
  });

  it("questions: shares as asked; repeats are the same request, relatives name their original", () => {
    const content: Content = {
      kind: "questions",
      input: { mean: 40, cv: 1, max: 1000 },
      output: { mean: 200, cv: 1, max: 1000 },
      repeatShare: 0.2,
      paraphraseShare: 0.3,
      closeShare: 0.6,
      lookalikeShare: 0.1,
      poolMax: 500,
      zipfExponent: 1,
    };
    const originals = new Map<string, TraceRequest>();
    const questions = new Set<string>();
    const counts = { original: 0, exact: 0, close: 0, loose: 0, lookalike: 0 };
    for (const request of load({ content })) {
      const { question = "", cluster = "", similarity } = request;
      counts[similarity ?? "original"]++;
      const original = originals.get(cluster);
      if (similarity === undefined) {
        expect([original, question]).toEqual([undefined, cluster]);
        originals.set(question, request);
      } else if (similarity === "exact") {
        expect({ ...request, atUs: 0, similarity: 0 }).toEqual({
          ...original,
          atUs: 0,
          similarity: 0,
        });
      } else {
        expect(questions.has(question)).toBe(false); // Words of its own.
        expect(original).toBeDefined();
        if (similarity !== "lookalike") expect(request.outputTokens).toBe(original?.outputTokens);
      }
      questions.add(question);
    }
    const shares = { original: 0.4, exact: 0.2, close: 0.18, loose: 0.12, lookalike: 0.1 };
    for (const [kind, share] of Object.entries(shares)) {
      const count = counts[kind as keyof typeof counts];
      expect(Math.abs(count - 40_000 * share)).toBeLessThan(
        4 * Math.sqrt(40_000 * share * (1 - share)) + 1,
      );
    }
  });

  it("a spec that makes no sense is refused at once", () => {
    const bad = (spec: Partial<LoadSpec>) => () => load(spec);
    expect(() =>
      generateLoad({ seed: 1, arrivals: { kind: "poisson", rate: 1 }, content: plain }),
    ).toThrow("a load needs requests or durationUs, or it never ends");
    expect(bad({ requests: 0 })).toThrow(RangeError);
    expect(bad({ arrivals: { kind: "poisson", rate: 0 } })).toThrow(/rate is 0; it must be from/);
    expect(bad({ arrivals: { kind: "ramp", fromRate: 1, toRate: 0, overUs: 5 } })).toThrow(
      /toRate/,
    );
    expect(bad({ arrivals: { kind: "daily", rate: 1, swing: 1.5, periodUs: 5 } })).toThrow(/swing/);
    expect(bad({ content: { ...plain, input: { mean: Number.NaN, cv: 1, max: 5 } } })).toThrow(
      /input\.mean/,
    );
  });
});

describe("trace streaming", () => {
  it("a million lines pass in bounded memory", async () => {
    const file = join(folder, "million.csv");
    const out = await open(file, "w");
    await out.write(
      "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n",
    );
    for (let part = 0; part < 100; part++) {
      let text = "";
      for (let row = 0; row < 10_000; row++) {
        const at = part * 10_000 + row;
        text += `${at / 50},session-with-a-long-name-${Math.floor(at / 1000)},3,ChatGPT,${at % 4096},${at % 333},0,Conversation log\n`;
      }
      await out.write(text);
    }
    await out.close();

    setFlagsFromString("--expose-gc");
    const collect = runInNewContext("gc") as () => void;
    const held = () => {
      collect();
      return process.memoryUsage().heapUsed;
    };
    const trace = await openTrace(file);
    const sessions = new Map<string, number>(); // A reader that keeps names must not keep the file with them.
    const before = held();
    let peak = 0;
    let count = 0;
    for await (const { session = "" } of trace.requests()) {
      sessions.set(session, count);
      count++;
      if (count % 250_000 === 0) peak = Math.max(peak, held() - before);
    }
    expect(count).toBe(1_000_000);
    expect(sessions.size).toBe(1000);
    expect(peak).toBeLessThan(16 * 1024 * 1024); // The file is 70 MB.
  });
});
