/**
 * Whether two answers to similar questions say the same: what labels a stored answer right or wrong when the model has
 * been asked again. Pure, and careful: what it cannot read it does not judge.
 *
 * `exact` wants the same text but for case, spaces and punctuation: right for short factual answers, and too strict
 * for a model that words its answers anew. `words` wants most words in common (the harmonic mean of the shares of
 * words that each has in the other), and every number: two answers that differ in a figure are different answers.
 */
export const judgeNames = ["exact", "words"] as const;
/** How two answers are compared. */
export type JudgeName = (typeof judgeNames)[number];

/** Words in common from which two texts say the same. Between 0.6 and 0.9 few pairs lie; tried on paraphrases. */
const WORDS_MIN = 0.75;
/** Longer answers are not judged: comparing them says little, and takes long. */
const CHARS_MAX = 32_768;

const decoder = new TextDecoder();

/** Bodies of chat answers as nodes send them; undefined when one is no such answer, or is too long to be judged. */
export function sameAnswer(
  left: Uint8Array,
  right: Uint8Array,
  judge: JudgeName,
): boolean | undefined {
  const texts = [textOf(left), textOf(right)];
  const [one, other] = texts.map((text) => (text === undefined ? undefined : wordsOf(text)));
  if (one === undefined || other === undefined) return undefined;
  if (one.join(" ") === other.join(" ")) return true;
  if (judge === "exact") return false;
  const numbers = (words: readonly string[]): string =>
    words
      .filter((word) => /\d/.test(word))
      .sort()
      .join(" ");
  return numbers(one) === numbers(other) && overlapOf(one, other) >= WORDS_MIN;
}

function textOf(body: Uint8Array): string | undefined {
  if (body.byteLength > CHARS_MAX) return undefined;
  try {
    const { choices } = JSON.parse(decoder.decode(body)) as {
      choices?: { message?: { content?: unknown } }[];
    };
    const content = choices?.length === 1 ? choices[0]?.message?.content : undefined;
    return typeof content === "string" ? content : undefined;
  } catch {
    return undefined; // No JSON: nothing that can be judged.
  }
}

/** Latin and other spaced words; of scripts without spaces each character. */
function wordsOf(text: string): string[] {
  const folded = text.normalize("NFKC").toLowerCase();
  return (
    folded.match(/[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]|[\p{L}\p{M}\p{N}]+/gu) ??
    []
  );
}

/** 2·common ÷ (words of both), counted with repetition; 1 for two texts without words. */
function overlapOf(left: readonly string[], right: readonly string[]): number {
  const counts = new Map<string, number>();
  for (const word of left) counts.set(word, (counts.get(word) ?? 0) + 1);
  let common = 0;
  for (const word of right) {
    const count = counts.get(word) ?? 0;
    if (count === 0) continue;
    counts.set(word, count - 1);
    common++;
  }
  const total = left.length + right.length;
  return total === 0 ? 1 : (2 * common) / total;
}
