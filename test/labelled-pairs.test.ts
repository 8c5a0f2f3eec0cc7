/** Pairs of labelled texts: every accepted form, in chunks of any size, and what is said of those that are none. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { type LabelledPair, PairError, PairReader } from "../sim/labelled-pairs.ts";

function read(name: string, ...chunks: readonly string[]): readonly LabelledPair[] {
  const reader = new PairReader(name);
  for (const chunk of chunks) reader.push(chunk);
  return reader.end();
}

function problem(name: string, ...chunks: readonly string[]): string {
  try {
    read(name, ...chunks);
  } catch (error) {
    if (error instanceof PairError) return error.message;
    throw error;
  }
  return "none";
}

/** Cut anywhere. */
function cut(text: string, at: readonly number[]): string[] {
  const places = [0, ...at.map((place) => place % (text.length + 1)).sort((a, b) => a - b)];
  return [...places.map((from, index) => text.slice(from, places[index + 1] ?? text.length))];
}

const anyText = fc
  .string({ unit: "grapheme", minLength: 1, maxLength: 20 })
  .map((text) => text.replace(/[\t\n\r\ufeff]/g, "x"))
  .filter((text) => text.trim() !== "");
const anyPairs = fc.array(fc.record({ a: anyText, b: anyText, isSame: fc.boolean() }), {
  minLength: 1,
  maxLength: 8,
});
const anyCuts = fc.array(fc.nat(400), { maxLength: 6 });

describe("labelled pairs", () => {
  it("TSV gives its pairs, wherever the chunks are cut", () => {
    fc.assert(
      fc.property(anyPairs, anyCuts, fc.constantFrom("\n", "\r\n"), (pairs, cuts, end) => {
        const text = pairs.map(({ a, b, isSame }) => `${a}\t${b}\t${isSame ? 1 : 0}`).join(end);
        expect(read("p.tsv", ...cut(text, cuts))).toEqual(pairs);
        expect(
          read("p.tsv", ...cut(`\ufefftext_a\ttext_b\tlabel${end}${text}${end}`, cuts)),
        ).toEqual(pairs);
      }),
    );
  });

  it("JSON gives its pairs, in an array or one after another, wherever the chunks are cut", () => {
    fc.assert(
      fc.property(anyPairs, anyCuts, (pairs, cuts) => {
        const rows = pairs.map(({ a, b, isSame }) => ({
          text_a: a,
          text_b: b,
          label: isSame ? 1 : 0,
          more: { nested: ["}", '\\"', {}] },
        }));
        expect(read("p.json", ...cut(JSON.stringify(rows, null, 1), cuts))).toEqual(pairs);
        const lines = rows.map((row) => JSON.stringify(row)).join("\n");
        expect(read("p.jsonl", ...cut(lines, cuts))).toEqual(pairs);
      }),
    );
  });

  it("blank lines are no pairs", () => {
    expect(read("p.tsv", "\na\tb\t1\n\n")).toHaveLength(1);
  });

  it.each([
    ["p.tsv", "a\tb\n", "p.tsv:1: 2 fields instead of 3"],
    ["p.tsv", "a\tb\t1\nno tabs\n", "p.tsv:2: 1 field instead of 3"],
    ["p.tsv", "a\tb\t0.7\n", 'p.tsv:1: label "0.7", not 0 or 1'],
    ["p.tsv", "a\tb\t1\nx\ty\tlabel\n", 'p.tsv:2: label "label", not 0 or 1'],
    ["p.tsv", " \tb\t1\n", "p.tsv:1: the first text is empty"],
    ["p.tsv", "a\t\t1\n", "p.tsv:1: the second text is empty"],
    ["p.tsv", "", "p.tsv holds no pair"],
    ["p.tsv", "text_a\ttext_b\tlabel\n", "p.tsv holds no pair"],
    ["p.tsv", "a".repeat(2 << 20), "p.tsv:1: a line of more than 1 MB"],
    ["p.json", '[{"text_a": "a", "label": 1}]', "p.json:1: text_b is missing"],
    ["p.json", '[\n{"text_a": "a", "text_b": 7, "label": 1}]', "p.json:2: text_b is no text"],
    ["p.json", '{"text_a": "a", "text_b": "b", "label": 2}', "p.json:1: label 2, not 0 or 1"],
    [
      "p.json",
      '{"text_a": "a", "text_b": "b", "label": 1',
      "p.json:1: an object begins and does not end",
    ],
    ["p.json", "text_a\ttext_b", 'p.json:1: "t" between objects'],
    ["p.json", '{"text_a": bad}', "p.json:1: Unexpected token"],
    ["p.json", `{"text_a": "${"a".repeat(2 << 20)}`, "p.json:1: an object of more than 1 MB"],
    ["p.json", "[]", "p.json holds no pair"],
  ])("%s %j: says what is wrong, where, and what is accepted", (name, text, says) => {
    const message = problem(name, text);
    expect(message.startsWith(says)).toBe(true);
    expect(message).toMatch(/accepted are (lines|objects)/);
  });

  it("names five lines at most", () => {
    expect(problem("p.tsv", "x\n".repeat(1000)).match(/p\.tsv:/g)).toHaveLength(5);
  });
});
