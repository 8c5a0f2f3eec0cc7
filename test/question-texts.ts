/**
 * Question text for tests and benchmarks of vectors: real questions where the data folder beside the repository has
 * them, generated ones otherwise, and `source` says which.
 */
import { existsSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { Random } from "../runtime/random.ts";

export type QuestionPair = { a: string; b: string; sameMeaning: boolean };
export type Questions = {
  /** Where they come from, in words. */
  source: string;
  pairs: QuestionPair[];
  /** Both sides of all pairs, each text once. */
  texts: string[];
};

/** Beside the repository, which is the working directory of tests and benchmarks. */
const folder = resolve("../shared/data/paraphrase");

export const hasRealQuestions = existsSync(join(folder, "qqp.train.json"));

export function realQuestions(): Questions {
  const english = (
    JSON.parse(readFileSync(join(folder, "qqp.train.json"), "utf8")) as {
      text_a: string;
      text_b: string;
      label: number;
    }[]
  ).map(({ text_a: a, text_b: b, label }) => ({ a, b, sameMeaning: label === 1 }));
  const chinese = ["zh/lcqmc.dev.tsv", "zh/bq.dev.tsv"].flatMap((file) =>
    readFileSync(join(folder, file), "utf8")
      .split("\n")
      .map((line) => line.split("\t"))
      .filter((cells) => cells.length === 3)
      .map(([a = "", b = "", label]) => ({ a, b, sameMeaning: label?.trim() === "1" })),
  );
  return questionsOf("QQP, LCQMC and BQ questions", [...english, ...chinese]);
}

const openings = ["How do I", "How can I", "What is the best way to", "Why should I", "When can I"];
const verbs = ["learn", "buy", "repair", "sell", "find", "clean", "cook", "plan", "change", "test"];
const things = "bicycle house garden laptop phone language guitar contract visa loan recipe".split(
  " ",
);
const details =
  "in winter, at home, without money, for a friend, in Berlin, after work, online".split(", ");

/** Pairs made from a small grammar: the second side opens in another way, or asks something else. */
export function generatedQuestions(count: number): Questions {
  const random = new Random("questions");
  const draw = (from: readonly string[]): string => from[random.int(from.length)] ?? "";
  const pairs = Array.from({ length: count }, () => {
    const number = random.int(100_000);
    const core = `${draw(verbs)} a ${draw(things)} ${draw(details)} number ${number}`;
    const sameMeaning = random.next() < 0.5;
    const other = sameMeaning ? core : `${draw(verbs)} a ${draw(things)} ${draw(details)}`;
    return { a: `${draw(openings)} ${core}?`, b: `${draw(openings)} ${other}?`, sameMeaning };
  });
  return questionsOf("generated questions", pairs);
}

function questionsOf(source: string, pairs: QuestionPair[]): Questions {
  return { source, pairs, texts: [...new Set(pairs.flatMap(({ a, b }) => [a, b]))] };
}
