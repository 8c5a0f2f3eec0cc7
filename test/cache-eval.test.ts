/** `headrace cache eval`: its figures against a plain count, what its modes promise, and the command itself. */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import { guardAgainst, guardFeatures } from "../actors/match-guards.ts";
import {
  type EvalEmbedder,
  type EvalOptions,
  type EvalResult,
  evaluateCache,
  type Outcome,
} from "../sim/cache-eval.ts";
import { type EvalReport, evalPage, formatEval } from "../sim/cache-eval-report.ts";
import { type LabelledPair, PairReader } from "../sim/labelled-pairs.ts";
import { isBuilt } from "./headrace-process.ts";

const fixture = join(import.meta.dirname, "fixtures/question-pairs.tsv");

function fixturePairs(): readonly LabelledPair[] {
  const reader = new PairReader(fixture);
  reader.push(readFileSync(fixture, "utf8"));
  return reader.end();
}

const lexical = new LexicalEmbedder(384);
const vectors = new Map<string, Float32Array>();
const embedder: EvalEmbedder = {
  id: lexical.id,
  embed: async (texts) => texts.map(vectorOf),
};

/** Each text is embedded once for all tests. */
function vectorOf(text: string): Float32Array {
  const vector = vectors.get(text) ?? lexical.embed(text);
  vectors.set(text, vector);
  return vector;
}

const plainOptions: EvalOptions = {
  thresholdMin: 0.85,
  threshold: 0.92,
  precision: 0.95,
  errorRatesMax: [],
  shadowShare: undefined,
  isLabelsOnly: true,
  seed: 1,
};

function evaluate(
  pairs: readonly LabelledPair[],
  options: Partial<EvalOptions> = {},
  by: EvalEmbedder = embedder,
): Promise<EvalResult> {
  return evaluateCache(pairs, by, { ...plainOptions, ...options });
}

/** The benchmark counted once more, from its description, by comparing everything with everything. */
function counted(pairs: readonly LabelledPair[], threshold: number, isGuarded: boolean) {
  const group = new Map<string, Set<string>>();
  for (const { a, b } of pairs) for (const text of [a, b]) group.set(text, new Set([text]));
  for (const { a, b, isSame } of pairs) {
    if (!isSame) continue;
    const joined = new Set([...(group.get(a) ?? []), ...(group.get(b) ?? [])]);
    for (const text of joined) group.set(text, joined);
  }
  const stored = [...new Set(pairs.map(({ a }) => a))];
  let hits = 0;
  let right = 0;
  let falseHits = 0;
  for (const { b } of pairs) {
    const query = vectorOf(b);
    const best = stored
      .map((text) => {
        const vector = vectorOf(text);
        return {
          text,
          cosine: vector.reduce((sum, value, at) => sum + value * (query[at] ?? 0), 0),
        };
      })
      .filter(({ cosine }) => Math.round(cosine * 1e6) / 1e6 >= threshold)
      .sort((left, other) => other.cosine - left.cosine)
      .slice(0, 3)
      .find(
        ({ text }) =>
          !isGuarded || guardAgainst(guardFeatures(b), guardFeatures(text)) === undefined,
      );
    if (best === undefined) continue;
    hits++;
    if (group.get(b)?.has(best.text)) right++;
    if (!stored.some((text) => group.get(b)?.has(text))) falseHits++;
  }
  return { hits, right, falseHits };
}

function numbers({ hits, right, falseHits }: Outcome) {
  return { hits: hits.count, right: right.count, falseHits: falseHits.count };
}

describe("cache eval: the benchmark", () => {
  it("counts what a plain comparison of all with all counts, at every threshold, with and without guards", async () => {
    const pairs = fixturePairs();
    const { rows } = await evaluate(pairs);
    expect(rows.map(({ threshold }) => threshold)).toEqual(
      Array.from({ length: 13 }, (_, index) => (85 + index) / 100),
    );
    for (const { threshold, plain, guarded } of rows) {
      expect(numbers(plain)).toEqual(counted(pairs, threshold, false));
      expect(numbers(guarded)).toEqual(counted(pairs, threshold, true));
    }
  });

  it("the guards turn the wrong hits of the fixture into misses and keep right ones", async () => {
    const { rows } = await evaluate(fixturePairs());
    const [first] = rows;
    expect(first?.plain.right.share).toBeLessThan(0.7);
    expect(first?.guarded.right.share).toBe(1);
    expect(first?.guarded.right.count).toBeGreaterThan(0.6 * (first?.plain.right.count ?? 0));
  });

  it("counts entries, questions, exact ones, and pairs whose labels contradict others", async () => {
    const pair = (a: string, b: string, isSame: boolean) => ({ a, b, isSame });
    const result = await evaluate([
      pair("one", "two", true),
      pair("two", "three", true),
      pair("three", "one", false),
      pair("one", "four", false),
    ]);
    expect(result).toMatchObject({
      pairs: 4,
      samePairs: 2,
      entries: 3,
      questions: 4,
      exact: 3,
      noMatch: 1,
      contradictions: 1,
    });
  });

  it("texts that differ in case and punctuation are the same, unless only labels count; C is not C#", async () => {
    const pairs = [
      { a: "How do I sort in C?", b: "other", isSame: false },
      { a: "x", b: "how do i sort in C", isSame: false },
      { a: "y", b: "how do i sort in C#", isSame: false },
    ];
    expect((await evaluate(pairs)).joinedByWords).toBe(0);
    const joined = await evaluate(pairs, { isLabelsOnly: false });
    expect(joined.joinedByWords).toBe(1);
    expect(joined.rows.at(-1)?.guarded.right).toMatchObject({ count: 1, total: 1 });
  });

  it("a text without a vector is neither stored nor answered", async () => {
    const pairs = [
      { a: "?!", b: "hello there", isSame: true },
      { a: "hello there", b: "?!", isSame: true },
    ];
    const result = await evaluate(pairs);
    expect(result.withoutVector).toBe(1);
    expect(result.rows[0]?.plain.hits).toMatchObject({ count: 1, total: 2 });
    const refusing: EvalEmbedder = {
      id: "none",
      embed: async (texts) => texts.map(() => "too_long"),
    };
    expect((await evaluate(pairs, {}, refusing)).rows[0]?.plain.hits.count).toBe(0);
  });

  it("an embedder that gives too few vectors, or vectors of two sizes, is refused", async () => {
    const pairs = fixturePairs();
    const few: EvalEmbedder = { id: "few", embed: async () => [] };
    await expect(evaluate(pairs, {}, few)).rejects.toThrow("0 vectors for 8 texts");
    let size = 16;
    const odd: EvalEmbedder = {
      id: "odd",
      embed: async (texts) => texts.map(() => new Float32Array(size++ % 2 === 0 ? 16 : 17).fill(1)),
    };
    await expect(evaluate(pairs, {}, odd)).rejects.toThrow("dimensions");
  });

  it("the wanted threshold is the least one whose lower bound is as wanted", async () => {
    const right = Array.from({ length: 120 }, (_, at) => ({
      a: `question about ${"abcdefghij"[at % 10]}${at} and more`,
      b: `question about ${"abcdefghij"[at % 10]}${at} and more!`,
      isSame: true,
    }));
    const { wanted } = await evaluate(right);
    expect(wanted.guarded?.threshold).toBe(0.85);
    const wrong = right.map((pair) => ({ ...pair, isSame: false }));
    expect((await evaluate(wrong)).wanted).toEqual({ plain: undefined, guarded: undefined });
  });
});

/** Classes of questions; each asked in words that share most with the others of its class. */
function world(
  classes: number,
  times: number,
  isSame: (topic: number, time: number) => boolean,
): LabelledPair[] {
  const pairs: LabelledPair[] = [];
  const word = (number: number) => `w${number.toString(36)}`;
  // Letters only: a number would be what the guards are for.
  const asked = (time: number) => `v${"abcdef"[Math.floor(time / 6)]}${"abcdef"[time % 6]}`;
  for (let at = 0; at < classes; at++) {
    const topic = Array.from({ length: 14 }, (_, index) => word(at * 14 + index + 1000)).join(" ");
    for (let time = 0; time < times; time++) {
      pairs.push({ a: `${topic} base`, b: `${topic} ${asked(time)}`, isSame: isSame(at, time) });
    }
  }
  return pairs;
}

/** So many of 100, whatever the class. */
const mixed = (wrong: number) => (topic: number, time: number) =>
  ((topic * 12 + time) * 7919) % 100 >= wrong;

describe("cache eval: verified and shadow mode", () => {
  it("wrong answers among the served stay within the allowed rate, and right ones are served", async () => {
    const { replays } = await evaluate(world(120, 12, mixed(30)), {
      errorRatesMax: [0.01, 0.02, 0.05],
    });
    const [fixed, ...verified] = replays;
    expect(fixed?.errors.share).toBeGreaterThan(0.1);
    for (const { errors, errorRateMax } of verified) {
      expect(errors.share).toBeLessThanOrEqual(errorRateMax ?? 0);
    }
    const easy = await evaluate(world(120, 12, mixed(0)), { errorRatesMax: [0.01, 0.05] });
    expect(easy.replays.map(({ errors }) => errors.count)).toEqual([0, 0, 0]);
    expect(easy.replays[1]?.kept).toBeGreaterThan(0.4);
    expect(easy.replays[2]?.kept).toBeGreaterThan(0.8);
  });

  it("learns entry by entry: nine of ten are always right, the tenth never", async () => {
    const pairs = world(40, 30, (topic) => topic % 10 !== 0);
    const { replays } = await evaluate(pairs, { errorRatesMax: [0.05] });
    const [fixed, verified] = replays;
    expect(fixed?.errors.share).toBeGreaterThan(0.05);
    expect(verified?.errors.share).toBeLessThanOrEqual(0.05);
    expect(verified?.kept).toBeGreaterThan(0.5);
  });

  it("a shadow period's estimate holds the truth within its interval", async () => {
    let held = 0;
    for (let seed = 0; seed < 20; seed++) {
      const { shadow } = await evaluate(world(60, 10, mixed(20)), { shadowShare: 0.3, seed });
      if (shadow === undefined) continue;
      const { falseHits } = shadow.estimate;
      const truth = shadow.truth.falseHits.share;
      expect(falseHits.total).toBeLessThan(shadow.truth.falseHits.total);
      if (falseHits.low <= truth && truth <= falseHits.high) held++;
    }
    expect(held).toBeGreaterThanOrEqual(18);
  });

  it("is the same for the same seed, and a replay leaves the index to the next as it was", async () => {
    const options = { errorRatesMax: [0.05, 0.05], shadowShare: 0.2 };
    const pairs = world(60, 12, mixed(30));
    const first = await evaluate(pairs, options);
    expect(await evaluate(pairs, options)).toEqual(first);
    expect(first.replays[1]?.explored).toBeGreaterThan(100);
    expect(first.replays[1]).toEqual(first.replays[2]);
  });
});

describe("cache eval: the report", () => {
  async function report(): Promise<EvalReport> {
    const options = { errorRatesMax: [0.01, 0.05], shadowShare: 0.5, isLabelsOnly: false };
    return {
      kind: "cache_eval",
      files: [{ name: "a<b>.tsv", pairs: 26, sha256: "0".repeat(64) }],
      result: await evaluate(fixturePairs(), options),
      command: "headrace cache eval --pairs 'a<b>.tsv'",
      version: "0.0.0",
      nodeVersion: "v0",
    };
  }

  it("begins with the answer, and has a row for every threshold, guard and rate, each as wide as its heads", async () => {
    const text = formatEval(await report());
    expect(text.split("\n")[0]).toMatch(/^With guards: .*Without: /);
    for (const name of [
      "0.85",
      "0.97",
      "numbers",
      "private_words (strict)",
      "fixed mode",
      "1.0 %",
    ]) {
      expect(text).toContain(`\n  ${name}`);
    }
    expect(text).not.toMatch(/undefined|NaN/);
  });

  it("as a page: complete, escaped, nothing from outside, every row of a table as long as its head", async () => {
    const html = evalPage(await report());
    expect(html).toMatch(/^<!doctype html>[\s\S]*<\/html>\n$/);
    expect(html).not.toMatch(/a<b>|<script|https?:\/\/|NaN|undefined/);
    expect(html.match(/<svg/g)?.length).toBeGreaterThanOrEqual(4);
    for (const [table] of html.matchAll(/<table>.*?<\/table>/gs)) {
      const heads = table.match(/<th /g)?.length;
      for (const [row] of table.matchAll(/<tr[^>]*><td>.*?<\/tr>/gs)) {
        expect(row.match(/<td>/g)?.length).toBe(heads);
      }
    }
  });

  it("any labels give a report without a gap", async () => {
    const text = fc.constantFrom("a b c", "a b d", "a b c!", "x y", "z", "?");
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.record({ a: text, b: text, isSame: fc.boolean() }), {
          minLength: 1,
          maxLength: 6,
        }),
        async (pairs) => {
          const result = await evaluate(pairs, { errorRatesMax: [0.05], shadowShare: 0.5 });
          const whole = { ...(await report()), result };
          expect(formatEval(whole) + evalPage(whole)).not.toMatch(/NaN|undefined|Infinity/);
        },
      ),
      { numRuns: 30 },
    );
  });
});

describe.skipIf(!isBuilt())("cache eval: the command", () => {
  const command = join(import.meta.dirname, "..", "dist/bin/headrace.js");
  let folder = "";
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), "cache-eval-"));
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  function headrace(...args: readonly string[]) {
    return spawnSync(process.execPath, [command, "cache", "eval", ...args], { encoding: "utf8" });
  }

  it("prints the report, writes JSON and the page, and ends with 1 where no threshold is as wanted", () => {
    const json = join(folder, "report.json");
    const html = join(folder, "report.html");
    const { status, stdout } = headrace(
      ...["--pairs", fixture, "--verified", "0.05", "--shadow", "--json", json, "--html", html],
    );
    expect(status).toBe(1); // 26 pairs show no precision of 95 %.
    expect(stdout).toContain("no threshold is shown to be right in 95.0 % of hits");
    expect(JSON.parse(readFileSync(json, "utf8"))).toMatchObject({ kind: "cache_eval" });
    expect(readFileSync(html, "utf8")).toContain("<svg");
    expect(headrace("--pairs", fixture, "--precision", "0.5").status).toBe(0);
  });

  it.each([
    [["--pairs", "missing.tsv"], "--pairs missing.tsv: ENOENT"],
    [[], "required option '--pairs <files...>'"],
    [
      ["--pairs", fixture, "--embedder", "oracle"],
      "--embedder is oracle; accepted: lexical, http URL, transformers PATH",
    ],
    [["--pairs", fixture, "--dimension", "8"], "which has 16 to 4096 dimensions"],
    [["--pairs", fixture, "--precision", "95"], "--precision is 95; it must be a number between"],
    [["--pairs", fixture, "--threshold", "0.8"], "--threshold 0.8 is below --threshold-min 0.85"],
    [["--pairs", fixture, "--verified", "0.01,x"], '--verified is "x"; it must be a number'],
    [["--pairs", fixture, "--shadow", "2"], "--shadow is 2; it must be a number between 0 and 1"],
    [["--pairs", fixture, "--limit", "0"], "--limit is 0; it must be a whole number from 1"],
  ])("refuses %j with 2 and says what is accepted", (args, says) => {
    const { status, stderr } = headrace(...args);
    expect(status).toBe(2);
    expect(stderr).toContain(says);
  });

  it("refuses a file that is no UTF-8, and names the lines of one that holds no pairs", () => {
    const latin = join(folder, "latin.tsv");
    writeFileSync(latin, Buffer.from([0xe9, 0x09, 0x62, 0x09, 0x31]));
    expect(headrace("--pairs", latin).stderr).toContain("latin.tsv is not UTF-8 text");
    const broken = join(folder, "broken.tsv");
    writeFileSync(broken, "one\ttwo\t1\nthree\n");
    const { status, stderr } = headrace("--pairs", fixture, broken);
    expect(status).toBe(2);
    expect(stderr).toMatch(/broken\.tsv:2: 1 field instead of 3\naccepted are lines/);
  });
});
