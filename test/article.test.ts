/** The article's tables: the modelled lookup by meaning, and the run of half the workload. */
import { describe, expect, it } from "vitest";
import {
  type ArticleReport,
  articleFigures,
  articleReport,
  formatArticle,
} from "../sim/article.ts";
import { lawByName } from "../sim/laws.ts";
import { similarityBounds, vectorOf } from "../sim/question-vectors.ts";
import { simulate } from "../sim/simulator.ts";
import type { Similarity, TraceRequest } from "../sim/trace-rows.ts";

function asked(question: string, cluster: string, similarity?: Similarity): TraceRequest {
  const request = { atUs: 0, inputTokens: 100, outputTokens: 20, question, cluster };
  return similarity === undefined ? request : { ...request, similarity };
}

const SEED = 1;

function cosine(left: TraceRequest, right: TraceRequest): number {
  const [one, other] = [vectorOf(left, SEED), vectorOf(right, SEED)];
  return one?.reduce((sum, value, at) => sum + value * (other?.[at] ?? 0), 0) ?? Number.NaN;
}

describe("vectors of a load's questions", () => {
  const original = asked("q0", "q0");

  it("have norm 1; a question has one vector, and one that says nothing has none", () => {
    for (const similarity of ["exact", "close", "loose", "lookalike"] as const) {
      const one = asked("q0.1", "q0", similarity);
      expect(cosine(one, one)).toBeCloseTo(1, 5);
      expect(vectorOf(one, SEED)).toEqual(vectorOf({ ...one }, SEED));
    }
    expect(vectorOf({ atUs: 0, inputTokens: 1, outputTokens: 1 }, SEED)).toBeUndefined();
  });

  it("are as near to the original as their class says, and to each other as the product; clusters are far apart", () => {
    for (const [similarity, [least, most]] of Object.entries(similarityBounds)) {
      for (let index = 0; index < 100; index++) {
        const one = asked(`q0.${similarity}${index}`, "q0", similarity as Similarity);
        const own = cosine(one, original);
        expect(own).toBeGreaterThan(least - 1e-5);
        expect(own).toBeLessThan(most + 1e-5);
        const other = asked(`q0.x${index}`, "q0", "loose");
        expect(cosine(one, other)).toBeCloseTo(own * cosine(other, original), 0);
        expect(cosine(one, asked(`r${index}`, `r${index}`))).toBeLessThan(0.5);
      }
    }
  });

  it("in a simulation the cache answers a paraphrase, after the time of a lookup, and tells wrong ones", () => {
    const law = lawByName("llama-3.1-8b/h100");
    const lookalikes = Array.from({ length: 20 }, (_, index) => ({
      ...asked(`q0.k${index}`, "q0", "lookalike"),
      atUs: 30_000_000 + index * 1_000_000,
    }));
    const load = [
      original,
      { ...asked("q0.1", "q0", "close"), atUs: 20_000_000 },
      { ...asked("q0", "q0", "exact"), atUs: 21_000_000 },
      { ...asked("q0.2", "q0", "loose"), atUs: 22_000_000 },
      ...lookalikes,
    ];
    const seen: string[] = [];
    const semantic = { similarityMin: 0.95, embedder: { type: "lexical" } } as const;
    const result = simulate({
      nodes: [{ law }],
      options: { cache: { semantic } },
      seed: SEED,
      load,
      onRecord: ({ cache, endedMs }) => {
        seen.push(`${cache}${endedMs >= 12 ? "" : " at once"}`);
      },
    });
    expect(seen.slice(0, 4)).toEqual(["miss", "hit_semantic", "hit_exact at once", "miss"]);
    const wrong = lookalikes.filter((each) => cosine(each, original) >= 0.95).length;
    expect(wrong).toBeGreaterThan(0);
    expect(result.wrongHits).toBeGreaterThanOrEqual(wrong);
    expect(result.cache.hit_semantic).toBe(1 + result.wrongHits);
  });
});

describe("the article's tables", () => {
  const spec = { share: 0.5, seconds: 120 };
  let report: ArticleReport;

  it("what is calibrated lies near the article's figures: hits within 3 points, timeouts within 6", () => {
    report = articleReport(spec);
    for (const { article, ours } of report.strategies) {
      expect(Math.abs(ours.hitShare - article.hitShare), ours.name).toBeLessThan(0.03);
    }
    const { before } = articleFigures;
    expect(Math.abs(report.before.timeoutShare - before.timeoutShare)).toBeLessThan(0.06);
    expect(Math.abs(report.before.p99Ms / before.p99Ms - 1)).toBeLessThan(0.06);
    expect(report.before.fullSpread).toBeGreaterThan(before.spread);
    for (const { meanSeconds } of report.alone) {
      expect(meanSeconds).toBeGreaterThan(2);
      expect(meanSeconds).toBeLessThan(5);
    }
  });

  it("outcomes point where the article's do: each strategy beats the one before it, and after beats before", () => {
    const runs = report.strategies.map(({ ours }) => ours);
    runs.slice(1).forEach((run, index) => {
      const previous = runs[index];
      expect(run.meanMs).toBeLessThan(previous?.meanMs ?? 0);
      expect(run.fullShare).toBeLessThan(previous?.fullShare ?? 0);
      expect(run.wrongHitShare).toBeGreaterThanOrEqual(previous?.wrongHitShare ?? 0);
    });
    expect(report.after.p99Ms).toBeLessThan(report.before.p99Ms);
    expect(report.after.timeoutShare).toBeLessThan(0.012);
    expect(report.cost.change).toBeLessThan(0);
    const { timeoutShare, refusedShare } = report.cost.fewest;
    expect(timeoutShare + refusedShare).toBeLessThanOrEqual(0.012);
  });

  it("the same seed gives the same report, another seed another one", () => {
    const short = { share: 0.2, seconds: 40 };
    const first = articleReport(short);
    expect(articleReport(short)).toEqual(first);
    expect(articleReport({ ...short, seed: 2 }).before.hash).not.toBe(first.before.hash);
  });

  it("the text holds both figures of every row, and says what was calibrated and where ours differs", () => {
    const text = formatArticle(report);
    for (const part of ["no cache", "exact", "semantic 0.95", "semantic 0.90", "28.4 s", "6.1 s"]) {
      expect(text).toContain(part);
    }
    expect(text).toContain("Calibrated: hits, and the column before.");
    for (const { row } of report.notes) expect(text).toContain(`- ${row}: `);
  });

  it("a share or a time out of range is refused", () => {
    expect(() => articleReport({ share: 0 })).toThrow(/share is 0; it must be from 0.1 to 1/);
    expect(() => articleReport({ seconds: 10 })).toThrow(/seconds is 10; it must be from 40/);
  });
});
