/** Whether two answers say the same: known pairs, and what must hold for any two. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { judgeNames, sameAnswer } from "../actors/answer-judge.ts";

fc.configureGlobal({ seed: 20_251_126 });

const bodyOf = (content: unknown): Uint8Array =>
  Buffer.from(JSON.stringify({ id: "1", choices: [{ message: { content } }] }));
const same = (left: string, right: string, judge: "exact" | "words" = "words") =>
  sameAnswer(bodyOf(left), bodyOf(right), judge);

describe("answer judge", () => {
  it.each([
    ["case, spaces and punctuation", "It is Paris.", "it  is PARIS", true, true],
    ["full-width forms", "Ａ１", "a1", true, true],
    ["another fact", "The capital is Paris.", "The capital is Lyon.", false, true],
    ["one word in four", "It is red now.", "It is blue now.", false, true],
    ["half the words", "It is red and large.", "They were blue and small.", false, false],
    [
      "a figure",
      "It takes about 3 days to get there.",
      "It takes about 5 days to get there.",
      false,
      false,
    ],
    ["figures in another order", "Between 3 and 5 days.", "Between 5 and 3 days.", false, true],
    ["Chinese", "今天天气很好。", "今天天气很好", true, true],
    ["other Chinese", "今天天气很好", "我要修改密码", false, false],
    ["nothing but punctuation", "!!!", "…", true, true],
    ["something and nothing", "Yes.", "", false, false],
  ])("%s", (_, left, right, exact, words) => {
    expect([same(left, right, "exact"), same(left, right, "words")]).toEqual([exact, words]);
  });

  it.each([
    ["no JSON", Buffer.from("yes")],
    ["null", Buffer.from("null")],
    ["no choices", Buffer.from("{}")],
    [
      "two choices",
      Buffer.from(JSON.stringify({ choices: Array(2).fill({ message: { content: "yes" } }) })),
    ],
    ["a call instead of text", bodyOf(null)],
    ["parts", bodyOf([{ type: "text", text: "yes" }])],
    ["32 KiB and more", bodyOf("x".repeat(32_768))],
    ["bytes that are no UTF-8", Buffer.from([0x7b, 0xff])],
    ["nothing", Buffer.alloc(0)],
  ])("what cannot be read is not judged: %s", (_, body) => {
    for (const judge of judgeNames) {
      expect(sameAnswer(body, bodyOf("yes"), judge)).toBeUndefined();
      expect(sameAnswer(bodyOf("yes"), body, judge)).toBeUndefined();
    }
  });

  const content = fc.oneof(
    fc.string({ unit: "binary" }),
    fc.lorem(),
    fc.stringMatching(/^[a-c 0-2]{0,12}$/),
  );

  it("is symmetric, an answer is the same as itself, and `exact` implies `words`", () => {
    fc.assert(
      fc.property(content, content, (left, right) => {
        for (const judge of judgeNames) {
          expect(same(left, left, judge)).toBe(true);
          expect(same(left, right, judge)).toBe(same(right, left, judge));
        }
        if (same(left, right, "exact") === true) expect(same(left, right, "words")).toBe(true);
      }),
    );
  });

  it("two answers that differ in a number are never the same", () => {
    fc.assert(
      fc.property(fc.lorem({ maxCount: 40 }), fc.nat(), fc.nat(), (words, one, other) => {
        fc.pre(one !== other);
        for (const judge of judgeNames)
          expect(same(`${words} ${one}`, `${words} ${other}`, judge)).toBe(false);
      }),
    );
  });

  it("stays quick on the longest answers that it reads", () => {
    const [left, right] = ["a ", "b "].map((word) => word.repeat(16_000));
    expect(same(left ?? "", right ?? "")).toBe(false);
  });
});
