/** The article's tables: the modelled lookup by meaning, and the run of half the workload. */
import { describe, expect, it } from "vitest";
import {
  type ArticleReport,
  articleFigures,
  articleReport,
  formatArticle,
} from "../sim/article.ts";
import { lawByName } from "../sim/laws.ts";
import { SimilarityClasses, similarityBounds } from "../sim/semantic-model.ts";
import { SimulationError, simulate } from "../sim/simulator.ts";
import type { Similarity, TraceRequest } from "../sim/trace-rows.ts";

function asked(question: string, cluster: string, similarity?: Similarity): TraceRequest {
  const request = { atUs: 0, inputTokens: 100, outputTokens: 20, question, cluster };
  return similarity === undefined ? request : { ...request, similarity };
}

function modelWith(threshold: number, ...stored: TraceRequest[]): SimilarityClasses {
  const model = new SimilarityClasses(threshold, 1);
  for (const request of stored) model.stored(request);
  return model;
}

describe("modelled lookup by meaning", () => {
  const original = asked("q0", "q0");

  it("nothing is found before it was stored, and the original always after", () => {
    expect(modelWith(0.9).find(original)).toBeUndefined();
    for (const threshold of [0.9, 0.95, 1]) {
      const found = modelWith(threshold, original).find(asked("q0", "q0", "exact"));
      expect(found).toEqual({ question: "q0", isWrong: false });
    }
  });

  it("classes end where the thresholds are: close ones hit at 0.95, loose ones at 0.90 only", () => {
    for (let index = 0; index < 200; index++) {
      const close = asked(`q0.c${index}`, "q0", "close");
      const loose = asked(`q0.l${index}`, "q0", "loose");
      expect(modelWith(0.95, original).find(close)?.question).toBe("q0");
      expect(modelWith(0.95, original).find(loose)).toBeUndefined();
      expect(modelWith(0.9, original).find(loose)?.question).toBe("q0");
    }
  });

  it("a lookalike that hits is wrong, in both directions; another cluster is never found", () => {
    const lookalikes = Array.from({ length: 400 }, (_, i) => asked(`q0.k${i}`, "q0", "lookalike"));
    const hits = lookalikes.filter((each) => modelWith(0.9, original).find(each) !== undefined);
    const [least, most] = similarityBounds.lookalike;
    const expected = (most - 0.9) / (most - least);
    expect(hits.length / 400).toBeGreaterThan(expected - 0.1);
    expect(hits.length / 400).toBeLessThan(expected + 0.1);
    for (const each of hits) {
      expect(modelWith(0.9, original).find(each)?.isWrong).toBe(true);
      expect(modelWith(0.9, each).find(original)?.isWrong).toBe(true);
    }
    expect(modelWith(0.01, original).find(asked("q1", "q1"))).toBeUndefined();
  });

  it("two wordings are as similar as the product of theirs, and the same words are 1", () => {
    const one = asked("q0.1", "q0", "loose");
    const other = asked("q0.2", "q0", "loose");
    expect(modelWith(0.9025, one).find(other)).toBeUndefined(); // 0.95 · 0.95 at most.
    expect(modelWith(0.81, one).find(other)).toEqual({ question: "q0.1", isWrong: false });
    expect(modelWith(1, one).find(one)).toEqual({ question: "q0.1", isWrong: false });
  });

  it("a threshold outside 0 to 1 is refused, and more than one gateway", () => {
    for (const threshold of [0, 1.01, Number.NaN]) {
      expect(() => new SimilarityClasses(threshold, 1)).toThrow(/above 0 and at most 1/);
    }
    const law = lawByName("llama-3.1-8b/h100");
    const semantic = new SimilarityClasses(0.9, 1);
    expect(() => simulate({ nodes: [{ law }], gateways: 2, semantic, load: [] })).toThrow(
      SimulationError,
    );
  });

  it("in a simulation a paraphrase is answered from the cache, after the time of a lookup", () => {
    const law = lawByName("llama-3.1-8b/h100");
    const load = [
      original,
      { ...asked("q0.1", "q0", "close"), atUs: 20_000_000 },
      { ...asked("q0", "q0", "exact"), atUs: 21_000_000 },
      { ...asked("q0.2", "q0", "loose"), atUs: 22_000_000 },
    ];
    const seen: string[] = [];
    const result = simulate({
      nodes: [{ law }],
      semantic: new SimilarityClasses(0.95, 1),
      load,
      onRecord: ({ cache, endedMs }) => seen.push(`${cache}${endedMs >= 12 ? "" : " at once"}`),
    });
    expect(seen).toEqual(["miss", "hit_semantic", "hit_exact", "miss"]);
    expect(result.cache).toEqual({ miss: 2, hit_semantic: 1, hit_exact: 1 });
    expect(result.wrongHits).toBe(0);
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
