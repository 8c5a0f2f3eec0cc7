import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import { hasRealQuestions, realQuestions } from "./question-texts.ts";
import { cosine } from "./vector-oracle.ts";

const embedder = new LexicalEmbedder();
const between = (a: string, b: string) => cosine(embedder.embed(a), embedder.embed(b));
const normOf = (vector: Float32Array) =>
  Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
const isZero = (vector: Float32Array) => vector.every((value) => value === 0);

describe("the lexical embedder", () => {
  it("gives any text a vector of norm 1, or none at all", () => {
    const text = fc.oneof(
      fc.string({ maxLength: 300 }),
      fc.string({ unit: "binary", maxLength: 300 }),
      fc.string({ unit: "grapheme", maxLength: 300 }),
      fc.constantFrom("\ud800", "a\udfff b", "😀".repeat(10_000), "x".repeat(1_000_000)),
    );
    fc.assert(
      fc.property(text, (text) => {
        const vector = embedder.embed(text);
        expect(vector.length).toBe(384);
        if (!isZero(vector)) expect(Math.abs(normOf(vector) - 1)).toBeLessThan(1e-5);
        if (/[a-z0-9]/.test(text) && text.length <= 300) expect(isZero(vector)).toBe(false);
      }),
    );
  });

  it("gives the same text the same vector, in any instance, after any other text", () => {
    fc.assert(
      fc.property(fc.string({ maxLength: 60 }), fc.string({ maxLength: 60 }), (one, other) => {
        const fresh = new LexicalEmbedder().embed(one);
        embedder.embed(other);
        expect(embedder.embed(one)).toEqual(fresh);
      }),
    );
  });

  it("is the same on every machine and in every version that has this name", () => {
    expect(embedder.id).toBe("lexical-1-384");
    const vector = embedder.embed("How do I reset my password? 怎么重置密码");
    const signs = [...vector.subarray(0, 48)].map((value) =>
      value > 0 ? "+" : value < 0 ? "-" : "0",
    );
    expect(signs.join("")).toMatchInlineSnapshot(
      `"+--+-+00++-+++++++0++-+--+--+++---++00----+++--+"`,
    );
    expect(vector.reduce((sum, value, at) => sum + value * at, 0)).toBeCloseTo(-6.818788, 4);
  });

  it("does not see case, width, compatibility forms, punctuation and spaces", () => {
    for (const [a, b] of [
      ["How do I reset my password?", "how do i reset my password"],
      ["reset  my\tpassword!!!", " Reset my password. "],
      ["ＲＥＳＥＴ my ｐａｓｓｗｏｒｄ", "reset my password"],
      ["今天天气怎么样？", "今天天气怎么样"],
      ["ﬁle", "file"],
      ["cafe\u0301 au lait", "café au lait"],
    ] as const)
      expect(between(a, b), `${a} / ${b}`).toBeCloseTo(1, 6);
  });

  it("sees inflections as near, other words as far, in English and Chinese", () => {
    expect(between("repairing bicycles", "repair bicycle")).toBeGreaterThan(0.6);
    expect(between("如何重置密码", "怎么重置密码")).toBeGreaterThan(0.5);
    expect(between("今天天气怎么样", "现在天气如何")).toBeLessThan(0.4);
    expect(between("turn on dark mode", "turn off dark mode")).toBeGreaterThan(0.7);
    expect(Math.abs(between("banana bread recipe", "kubernetes ingress error"))).toBeLessThan(0.25);
    expect(between("order 66", "order 67")).toBeLessThan(0.95);
  });

  it("keeps the cosine of the feature counts, to what a random projection can", () => {
    // Words of at most 4 letters are one feature each: cosine of the counts = shared ÷ total.
    const words = Array.from({ length: 40 }, (_, at) => `w${at}`);
    let off = 0;
    for (let shared = 0; shared <= 10; shared++) {
      const a = words.slice(0, 10);
      const b = [...words.slice(0, shared), ...words.slice(20, 30 - shared)];
      off = Math.max(off, Math.abs(between(a.join(" "), b.join(" ")) - shared / 10));
    }
    expect(off).toBeLessThan(4 / Math.sqrt(384));
    const wide = new LexicalEmbedder(4096);
    expect(cosine(wide.embed("w1 w2 w3 w4"), wide.embed("w1 w2 w5 w6"))).toBeCloseTo(0.5, 1);
  });

  it("has no vector for what has no words, nor for a text too long to be read whole", () => {
    for (const text of ["", "   ", "?!…。，", "\u0000\u0007\u001b", "\ud800\ud801"])
      expect(isZero(embedder.embed(text)), JSON.stringify(text)).toBe(true);
    expect(isZero(embedder.embed("ab ".repeat(682)))).toBe(false);
    expect(isZero(embedder.embed("ab ".repeat(683)))).toBe(true);
    expect(isZero(embedder.embed(`${"ab ".repeat(683)}tail`))).toBe(true);
    // One character that NFKC makes 18: the bound is on what would be read.
    expect(isZero(embedder.embed("\ufdfa".repeat(200)))).toBe(true);
    expect(isZero(embedder.embed("😀😀 🎉"))).toBe(false);
  });

  it("has the dimension it was made with", () => {
    for (const dimension of [16, 40, 64, 384, 1000])
      expect(new LexicalEmbedder(dimension).embed("one two three").length).toBe(dimension);
    expect(() => new LexicalEmbedder(8)).toThrow(/16 to 4096/);
    expect(() => new LexicalEmbedder(100.5)).toThrow(/16 to 4096/);
  });

  it("tells questions of the same meaning from others better than chance, on real pairs", () => {
    if (!hasRealQuestions) {
      console.log("skipped: no paraphrase data beside the repository");
      return;
    }
    const { pairs } = realQuestions();
    // English, then two sets of Chinese: 0.72 to 0.73 each.
    const sets = [pairs.slice(0, 20_000), pairs.slice(20_000, 28_802), pairs.slice(28_802)];
    const areas = sets.map((set) =>
      areaUnderRoc(
        set
          .filter((_, at) => at % 10 === 0)
          .map(({ a, b, sameMeaning }) => ({ score: between(a, b), sameMeaning })),
      ),
    );
    for (const area of areas) expect(area).toBeGreaterThan(0.7);
  });
});

/** The chance that a pair of the same meaning scores higher than one of another; from ranks. */
function areaUnderRoc(pairs: readonly { score: number; sameMeaning: boolean }[]): number {
  const ranked = [...pairs].sort((a, b) => a.score - b.score);
  let [rankSum, positives] = [0, 0];
  for (const [rank, { sameMeaning }] of ranked.entries()) {
    if (!sameMeaning) continue;
    positives++;
    rankSum += rank + 1;
  }
  const negatives = ranked.length - positives;
  return (rankSum - (positives * (positives + 1)) / 2) / (positives * negatives);
}
