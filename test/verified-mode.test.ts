/** Verified mode: the check values of its formulas, its error bound in simulation, and what holds for any labels. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { wilsonLower } from "../actors/judged-precision.ts";
import {
  decide,
  EntryEvidence,
  EvidencePool,
  LABELS_MAX,
  learn,
  type VerifiedCase,
} from "../actors/verified-mode.ts";
import { Random } from "../runtime/random.ts";

type Label = readonly [similarity: number, correct: boolean];

function evidenceOf(labels: readonly Label[]): EntryEvidence {
  const evidence = new EntryEvidence();
  for (const [similarity, correct] of labels) evidence.add(similarity, correct);
  return evidence;
}

function poolOf(similarity: number, right: number, wrong: number): EvidencePool {
  const pool = new EvidencePool();
  for (let count = 0; count < right; count++) pool.add(similarity, true);
  for (let count = 0; count < wrong; count++) pool.add(similarity, false);
  return pool;
}

/** Of a tenant whose entries' own labels were right often enough. */
function provenPool(): EvidencePool {
  const pool = new EvidencePool();
  for (let labels = 0; labels < 300; labels++) pool.add(0.5, true, true);
  return pool;
}

/** Four right labels, the fewest that decide. */
const fourRight: Label[] = [
  [0.95, true],
  [0.96, true],
  [0.94, true],
  [0.97, true],
];

const anyLabel = fc.tuple(fc.double({ min: 0.85, max: 1, noNaN: true }), fc.boolean());

describe("verified mode: an entry's lower bound", () => {
  it("has the check values of [semantic-cache reference, section 9.2]", () => {
    const bounds = (labels: readonly Label[]) =>
      [0.9, 0.95, 0.98].map((s) => Number(evidenceOf(labels).lowerBound(s).toFixed(4)));
    expect(bounds(fourRight)).toEqual([0.9469, 0.9634, 0.974]);
    expect(bounds([...fourRight, [0.93, false], [0.96, true]])).toEqual([0.3996, 0.5149, 0.5918]);
    const mixed: Label[] = [
      [0.95, true],
      [0.96, false],
      [0.94, true],
      [0.97, true],
      [0.93, false],
      [0.98, true],
    ];
    expect(bounds(mixed)).toEqual([0.0361, 0.3511, 0.6746]);
  });

  it("is 0 until the entry has four labels of its own", () => {
    expect(evidenceOf(fourRight.slice(0, 3)).lowerBound(1)).toBe(0);
    expect(evidenceOf(fourRight).lowerBound(1)).toBeGreaterThan(0.95);
  });

  it("never falls as similarity rises, and stays within 0 and 1", () => {
    fc.assert(
      fc.property(fc.array(anyLabel, { maxLength: 60 }), (labels) => {
        const evidence = evidenceOf(labels);
        let before = 0;
        for (let s = 0; s <= 1.0001; s += 0.01) {
          const bound = evidence.lowerBound(s);
          expect(bound).toBeGreaterThanOrEqual(before);
          expect(bound).toBeLessThanOrEqual(1);
          before = bound;
        }
      }),
    );
  });

  it("holds the newest labels only, but remembers up to where it was ever wrong", () => {
    const evidence = evidenceOf([[0.95, false], ...Array<Label>(100).fill([0.97, true])]);
    expect(evidence.labels).toBe(LABELS_MAX);
    expect(evidence.minSimilarity).toBe(0.955);
    expect(evidence.lowerBound(0.97)).toBe(
      evidenceOf(Array<Label>(LABELS_MAX).fill([0.97, true])).lowerBound(0.97),
    );
  });

  it("a wrong answer raises the least similarity, a later one of less similarity does not lower it", () => {
    const evidence = evidenceOf([
      [0.96, false],
      [0.93, false],
      [0.99, true],
    ]);
    expect(evidence.minSimilarity).toBeCloseTo(0.965, 12);
  });

  it("refuses a similarity that is no number", () => {
    expect(() => new EntryEvidence().add(Number.NaN, true)).toThrow(RangeError);
    expect(evidenceOf(fourRight).lowerBound(Number.NaN)).toBe(0);
  });

  it("survives a store, and what is none of its data does not", () => {
    fc.assert(
      fc.property(fc.array(anyLabel, { maxLength: 60 }), (labels) => {
        const evidence = evidenceOf(labels);
        const copy = EntryEvidence.fromData(JSON.parse(JSON.stringify(evidence.toData())));
        expect(copy?.minSimilarity).toBe(evidence.minSimilarity);
        expect(copy?.labels).toBe(evidence.labels);
        expect(copy?.lowerBound(0.96)).toBe(evidence.lowerBound(0.96));
      }),
    );
    const good = evidenceOf(fourRight).toData();
    expect(EntryEvidence.fromData(good)).toBeDefined();
    for (const bad of [
      undefined,
      null,
      {},
      [],
      { ...good, labels: "111" },
      { ...good, labels: "1112" },
      { ...good, thousandths: [950, 960, 940, 9700] },
      { ...good, thousandths: [950, 960, 940, 0.5] },
      { ...good, thousandths: Array(47).fill(950), labels: "1".repeat(47) },
      { ...good, minSimilarity: -1 },
      { ...good, minSimilarity: "1" },
    ]) {
      expect(EntryEvidence.fromData(bad)).toBeUndefined();
    }
  });
});

describe("verified mode: the pool", () => {
  it("opens a band without errors after 268 labels for δ = 0.01, 133 for 0.02, 52 for 0.05", () => {
    for (const [errorRateMax, labels] of [
      [0.01, 268],
      [0.02, 133],
      [0.05, 52],
    ] as const) {
      expect(poolOf(0.945, labels - 1, 0).lowerBound(0.945)).toBeLessThan(1 - errorRateMax);
      expect(poolOf(0.945, labels, 0).lowerBound(0.945)).toBeGreaterThanOrEqual(1 - errorRateMax);
    }
  });

  it("keeps bands of 0.01 apart, also at the similarities that are no binary fraction", () => {
    const pool = poolOf(0.95, 40, 0);
    expect(pool.lowerBound(0.95)).toBe(pool.lowerBound(0.9594));
    expect(pool.lowerBound(0.95)).toBeGreaterThan(0.9);
    expect(pool.lowerBound(0.9494)).toBe(0);
    expect(pool.lowerBound(0.96)).toBe(0);
  });

  it("says nothing with fewer than 20 labels", () => {
    expect(poolOf(0.95, 19, 0).lowerBound(0.95)).toBe(0);
    expect(poolOf(0.95, 20, 0).lowerBound(0.95)).toBeGreaterThan(0);
  });

  it("survives a store, and what is none of its data does not", () => {
    const pool = poolOf(0.95, 30, 2);
    const copy = EvidencePool.fromData(JSON.parse(JSON.stringify(pool.toData())));
    expect(copy?.lowerBound(0.95)).toBe(wilsonLower(30, 32));
    expect(copy?.toData()).toEqual(pool.toData());
    const own = [0, 0];
    const bands = [[95, 2, 3]];
    expect(EvidencePool.fromData({ own, bands })).toBeDefined();
    for (const bad of [
      null,
      {},
      { own, bands: [[95, 3, 2]] },
      { own, bands: [[101, 1, 1]] },
      { own, bands: [[95, 1]] },
      { own, bands: [[95, -1, 1]] },
      { own, bands: [["95", 1, 1]] },
      { own: [2, 1], bands },
      { own: [1], bands },
      { bands },
    ]) {
      expect(EvidencePool.fromData(bad)).toBeUndefined();
    }
  });
});

describe("verified mode: decisions", () => {
  const base = {
    similarity: 0.96,
    entry: new EntryEvidence(),
    pool: new EvidencePool(),
    errorRateMax: 0.05,
  };
  const decided = (changes: Partial<VerifiedCase>) => {
    const { kind, ...rest } = decide({ ...base, ...changes });
    const how = "by" in rest ? rest.by : "reason" in rest ? rest.reason : "";
    return `${kind} ${how}`.trim();
  };

  it("serves by the entry's own labels, by the pool's band, else explores", () => {
    expect(decided({})).toBe("explore");
    expect(decided({ entry: evidenceOf(fourRight), pool: provenPool() })).toBe("serve entry");
    expect(decided({ pool: poolOf(0.965, 60, 0) })).toBe("serve pool");
    expect(decided({ pool: poolOf(0.975, 60, 0) })).toBe("explore");
    expect(decided({ pool: poolOf(0.965, 60, 0), errorRateMax: 0.01 })).toBe("explore");
  });

  it("own labels say yes, but serve only after that rule was right often enough", () => {
    const pool = new EvidencePool();
    const entry = evidenceOf(fourRight);
    for (let labels = 0; labels < 52; labels++) {
      expect(decided({ entry, pool })).toBe("explore");
      pool.add(0.99, true, true);
    }
    expect(decided({ entry, pool })).toBe("serve entry");
    for (let labels = 0; labels < 10; labels++) pool.add(0.99, false, true);
    expect(decided({ entry, pool })).toBe("explore");
  });

  it("learning tells the rule's labels from others", () => {
    const pool = new EvidencePool();
    const entry = evidenceOf(fourRight);
    learn({ ...base, entry, pool }, true);
    learn({ ...base, entry: new EntryEvidence(), pool }, true);
    expect(pool.toData().own).toEqual([1, 1]);
    expect(pool.toData().bands).toEqual([[96, 2, 2]]);
    expect(entry.labels).toBe(5);
  });

  it("an entry that was wrong is not served by the pool, nor up to where it was wrong", () => {
    const entry = evidenceOf([[0.95, false]]);
    const pool = poolOf(0.965, 60, 0);
    expect(decided({ entry, pool })).toBe("explore");
    expect(decided({ entry, pool, similarity: 0.954 })).toBe("miss entry_similarity");
  });

  it("passes over what is below the threshold, blocked, removed or expired", () => {
    const pool = poolOf(0.915, 600, 0);
    expect(decided({ pool, similarity: 0.9149 })).toBe("miss similarity");
    expect(decided({ pool: poolOf(0.965, 60, 0), similarityMin: 0.97 })).toBe("miss similarity");
    expect(decided({ pool: poolOf(0.9, 60, 0), similarity: 0.9, similarityMin: 0.8 })).toBe(
      "miss similarity",
    );
    expect(decided({ similarity: Number.NaN })).toBe("miss similarity");
    for (const exclusion of ["guard", "removed", "expired"] as const) {
      expect(decided({ pool: poolOf(0.965, 60, 0), exclusion })).toBe(`miss ${exclusion}`);
    }
  });

  it("says why", () => {
    expect(decide({ ...base, similarity: 0.9 }).says).toBe("similarity 0.9 < 0.92");
    expect(decide(base).says).toBe("right ≥ 0, needed 0.95");
  });
});

/** A world in which an answer is right with a probability that depends on similarity alone. */
type Truth = {
  name: string;
  low: number;
  right: (s: number, random: Random) => boolean;
  /** Least share of requests served for δ = 0.01, 0.02, 0.05: a mode that never serves keeps every bound. */
  hits: readonly [number, number, number];
};

const logistic = (z: number) => 1 / (1 + Math.exp(-z));
/** The three of the table of section 9.2, and two in which an entry's own labels mislead it. */
const truths: Truth[] = [
  {
    name: "hard",
    low: 0.7,
    right: (s, random) => random.next() < logistic(60 * (s - 0.86)),
    hits: [0.08, 0.15, 0.22],
  },
  { name: "easy", low: 0.9, right: () => true, hits: [0.7, 0.74, 0.77] },
  { name: "step", low: 0.85, right: (s) => s >= 0.93, hits: [0.015, 0.02, 0.04] },
  { name: "flat", low: 0.9, right: (_, random) => random.next() < 0.9, hits: [0, 0, 0] },
  {
    name: "late",
    low: 0.85,
    right: (s, random) => random.next() < logistic(60 * (s - 0.94)),
    hits: [0, 0, 0],
  },
];
const deltas = [0.01, 0.02, 0.05] as const;

/** 300 entries × 100 requests in turn, as the table of section 9.2; 2 % of hits are compared. */
function simulate(truth: Truth, errorRateMax: number, seed: number) {
  const random = new Random(`${truth.name} ${seed}`);
  const entries = Array.from({ length: 300 }, () => new EntryEvidence());
  const pool = new EvidencePool();
  let hits = 0;
  let errors = 0;
  for (let round = 0; round < 100; round++) {
    for (const entry of entries) {
      const similarity = truth.low + (1 - truth.low) * random.next();
      const isRight = truth.right(similarity, random);
      const candidate = { similarity, entry, pool, errorRateMax };
      const { kind } = decide(candidate);
      if (kind === "serve") {
        hits++;
        if (!isRight) errors++;
      }
      if (kind === "explore" || (kind === "serve" && random.next() < 0.02)) {
        learn(candidate, isRight);
      }
    }
  }
  return { hits, errors, requests: 30_000 };
}

describe("verified mode: its bound over hits", () => {
  it.each(
    truths.flatMap((truth) => deltas.map((delta, at) => [truth.name, delta, truth, at] as const)),
  )("%s, δ = %s: errors ÷ hits stays within δ", (_, delta, truth, at) => {
    const { hits, errors, requests } = simulate(truth, delta, 1);
    expect(errors).toBeLessThanOrEqual(delta * hits);
    expect(hits / requests).toBeGreaterThanOrEqual(truth.hits[at] ?? 0);
  });

  it("a world in which nothing is right gets no hit", () => {
    const right = () => false;
    expect(simulate({ name: "hopeless", low: 0.92, right, hits: [0, 0, 0] }, 0.05, 1).hits).toBe(0);
  });

  it("an entry's bound alone serves what the table of section 9.2 says where all is right", () => {
    for (const [delta, share] of [
      [0.01, 0.71],
      [0.05, 0.96],
    ] as const) {
      const random = new Random(`easy ${delta}`);
      let hits = 0;
      for (let count = 0; count < 100; count++) {
        const entry = new EntryEvidence();
        for (let request = 0; request < 100; request++) {
          const similarity = 0.9 + 0.1 * random.next();
          if (entry.lowerBound(similarity) >= 1 - delta) hits++;
          else entry.add(similarity, true);
        }
      }
      expect(Math.abs(hits / 10_000 - share)).toBeLessThan(0.02);
    }
  });
});
