import { existsSync, readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import {
  estimateKvBlocks,
  lawByName,
  lawNames,
  leastOf,
  physicsViolations,
  rawStepUs,
  type StepLaw,
  stepTimeUs,
} from "../sim/laws.ts";

const FITTED = "../shared/data/perf/step_time_coefficients.json";
const every = lawNames().map((name) => lawByName(name));
const rtx4090 = lawByName("llama-3.1-8b/rtx4090");
const proNode = lawByName("llama-3.1-8b/rtx-pro-6000");

/** Coefficients small enough to add up by hand. */
const simple: StepLaw = {
  ...rtx4090,
  h: 5,
  W: 100,
  d: 2,
  F: 40,
  C: 8,
  s: [
    [1, 10],
    [9, 26],
  ],
  a0: 3,
  aB: 0.5,
  actx: 0.25,
  p0: 7,
  pq: 0.01,
  comm: [
    [1, 20],
    [101, 70],
  ],
};

describe("laws: step time", () => {
  it("adds the terms of a step of decodes only (below the knee)", () => {
    // 5 + max(100+2·4, 40+8·4) + s(4)=16 + 3 + 0.5·4 + 0.25·100 + comm(4)=21.5
    expect(rawStepUs(simple, 4, 100, 0, 0, 0)).toBe(5 + 108 + 16 + 3 + 2 + 25 + 21.5);
  });

  it("adds the terms of a mixed step (above the knee)", () => {
    // n = 2 + 30; pairs of one chunk of 30 on 10 tokens: 30·(10+15)
    expect(rawStepUs(simple, 2, 40, 30, 1, 750)).toBe(
      5 + (40 + 8 * 32) + 14 + (3 + 1 + 10) + (7 + 7.5) + 35.5,
    );
  });

  it("has no decode terms without decodes, and no prefill terms without prefill", () => {
    expect(rawStepUs(simple, 0, 0, 10, 1, 50)).toBe(5 + 120 + 10 + 7.5 + 24.5);
    expect(rawStepUs({ ...simple, p0: 1e9 }, 1, 0, 0, 0, 0)).toBeLessThan(1e3);
  });

  it("is whole µs, at least 1, and multiplied by the slow factor before rounding", () => {
    const none = { h: 0, W: 0, d: 0, F: 0, C: 0, a0: 0, aB: 0, comm: [] };
    const tiny: StepLaw = { ...simple, ...none, s: [[1, 0.4]] };
    expect(stepTimeUs(tiny, 1, 0, 0, 0, 0)).toBe(1);
    expect(stepTimeUs(tiny, 1, 0, 0, 0, 0, 10)).toBe(4);
    expect(stepTimeUs(simple, 4, 101, 0, 0, 0)).toBe(181); // 180.75
    expect(stepTimeUs(simple, 4, 101, 0, 0, 0, 2)).toBe(362); // 361.5
  });

  it("continues a table flat before its first point and straight after its last", () => {
    const at = (seqs: number) => rawStepUs({ ...simple, comm: [] }, 0, 0, 2, seqs, 0);
    expect(at(0)).toBe(at(1));
    expect(at(17) - at(9)).toBe(16);
    expect(leastOf(proNode.s)).toBe(717);
    expect(leastOf([])).toBe(0);
  });
});

describe("laws: shipped sets", () => {
  it("refuses an unknown name and lists those it knows", () => {
    expect(() => lawByName("llama-3.1-8b/h200")).toThrow(/unknown law "llama-3.1-8b\/h200"/);
    for (const name of lawNames()) expect(() => lawByName("?")).toThrow(name);
  });

  it("has unique names, limits that agree, and a note that says how far to trust it", () => {
    expect(new Set(lawNames()).size).toBe(every.length);
    for (const law of every) {
      expect(law.batchedTokensMax, law.name).toBeGreaterThanOrEqual(law.sequencesMax);
      expect(law.kvBlocks, law.name).toBeGreaterThan(1000);
      expect(law.note.startsWith("profile only, expect −10…−25 %"), law.name).toBe(!law.validated);
      expect(law.provenance.length, law.name).toBeGreaterThan(0);
    }
    expect(every.filter((law) => law.validated).map((law) => law.name)).toEqual([
      "llama-3.1-8b/rtx4090",
      "llama-3.1-8b/rtx-pro-6000",
    ]);
  });

  it("never decodes or prefills faster than the cards can", () => {
    for (const law of every) expect(physicsViolations(law)).toEqual([]);
  });

  it("tells each way of beating physics (weights, context, multiplying)", () => {
    expect(physicsViolations({ ...rtx4090, W: 9000 })).toHaveLength(1);
    expect(physicsViolations({ ...rtx4090, actx: 0.12 })).toHaveLength(1);
    expect(physicsViolations({ ...rtx4090, C: 80 })).toHaveLength(1);
    expect(physicsViolations({ ...rtx4090, W: 9000, actx: 0.12, C: 80 })).toHaveLength(3);
  });

  it("derives the context term of cards without attention profiles", () => {
    const expected = { "llama-3.1-8b/h100": 0.042, "llama-3-8b/a100": 0.07 };
    for (const [name, us] of Object.entries(expected)) {
      expect(lawByName(name).actx).toBeCloseTo(us, 3);
    }
    expect(lawByName("llama-3.1-70b/4xh100").actx).toBeCloseTo(0.0265, 4);
  });

  it("estimates KV capacity: 421k tokens of an 8B on one, 487k of a 70B on four 80 GB cards", () => {
    expect(lawByName("llama-3.1-8b/h100").kvBlocks * 16).toBeCloseTo(421_000, -3);
    expect(lawByName("llama-3.1-70b/4xh100").kvBlocks * 16).toBeCloseTo(487_000, -3);
    expect(estimateKvBlocks({ ...rtx4090.hardware, memoryGiB: 12 })).toBe(0);
    expect(rtx4090.kvBlocksFrom).toBe("measured");
  });

  it("agrees with its four-number short form over decode batches", () => {
    const short = [
      { law: rtx4090, a: 17160, d: 38.0, e: 0.1405 },
      { law: proNode, a: 14169, d: 17.0, e: 0.0894 },
    ];
    for (const { law, a, d, e } of short) {
      for (const decodes of [1, 16, 64, 128]) {
        const context = decodes * 800;
        const ratio = rawStepUs(law, decodes, context, 0, 0, 0) / (a + d * decodes + e * context);
        expect(Math.abs(ratio - 1), `${law.name} at ${decodes}`).toBeLessThan(0.015);
      }
    }
  });
});

const fitted = existsSync(FITTED);
if (!fitted)
  console.log(`laws: ${FITTED} is absent, the comparison with measured kernels is skipped`);
describe.skipIf(!fitted)("laws: against measured kernels", () => {
  it("follows the dense layers within 14.5 % at every point of both profiles", () => {
    type Fit = Record<string, { table: [number, number][] }>;
    const fits = JSON.parse(readFileSync(FITTED, "utf8")) as Fit;
    const pairs = [
      ["RTX4090_Llama-3.1-8B", rtx4090],
      ["RTXPRO6000_Llama-3.1-8B", proNode],
    ] as const;
    for (const [key, law] of pairs) {
      const points = fits[key]?.table ?? [];
      expect(points.length).toBeGreaterThan(10);
      for (const [tokens, us] of points) {
        const modelled = Math.max(law.W + law.d * tokens, law.F + law.C * tokens);
        expect(Math.abs(modelled / us - 1), `${key} at ${tokens}`).toBeLessThan(0.145);
      }
    }
  });
});
