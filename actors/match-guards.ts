/**
 * Guards between a question and a stored one that the embedder takes for the same: numbers, negation, opposites, code,
 * quoted text, names, word order, and (for strict tenants) words that only one of them has.
 *
 * Pure. `guardFeatures` reads a text once, for a stored question when it is stored; `guardAgainst` compares two of them.
 * Symmetric, and a text never blocks itself, however it is composed (NFKC) or capitalised. A guard can only turn a hit
 * into a miss: it errs towards the miss. No guard replaces labels: what they cannot see, verified mode learns.
 *
 * Work is bounded whatever the text: beyond TEXT_CHARS_MAX nothing is read but a hash, and such a text matches itself
 * alone. (Unicode normalisation takes quadratic time on long runs of combining marks: 1 s for 64,000 of them.)
 */
import { negationCount, type Sides, sideDifference, sidesOf } from "./polarity.ts";
import { type Quantity, quantitiesOf, quantityDifference } from "./quantities.ts";

/** Every guard, in the order in which they are asked: the cheap and telling ones first. */
export const guardNames = [
  "length",
  "numbers",
  "negation",
  "opposites",
  "code",
  "quotes",
  "names",
  "order",
  "private_words",
] as const;

/** What a block is counted under. */
export type GuardName = (typeof guardNames)[number];

/** Asked of every tenant. */
export const standardGuards: readonly GuardName[] = guardNames.filter(
  (name) => name !== "private_words",
);

/** Asked for tenants that would rather miss: blocks most paraphrases of other words, too. */
export const strictGuards: readonly GuardName[] = guardNames;

/** Why a candidate may not answer a question. `says` holds words of both texts: for the caller, not for a log. */
export type GuardBlock = { readonly guard: GuardName; readonly says: string };

/** What the guards know of one text. Plain data, at most a small multiple of the text in size. */
export type GuardFeatures = {
  /** Of a text that is too long or too dense to be read: its hash, and nothing else below is filled in. */
  readonly hash: string | undefined;
  /** Folded, spaces collapsed. */
  readonly text: string;
  /** No letter of a script that is written without spaces. */
  readonly isSpaced: boolean;
  readonly quantities: readonly Quantity[];
  readonly negations: number;
  readonly sides: readonly Sides[];
  readonly code: readonly string[];
  readonly quotes: readonly string[];
  readonly names: readonly string[];
};

/** UTF-16 units; semantic lookup takes questions of 128 tokens, about 500. */
export const TEXT_CHARS_MAX = 4096;
/** NFKC makes up to 18 letters of one. */
const FOLDED_CHARS_MAX = 2 * TEXT_CHARS_MAX;
/** Names, quotes and pieces of code of one text; each is searched for in the other. */
const ITEMS_MAX = 64;
const QUOTE_CHARS_MAX = 200;
/** Of a word shown in `says`. */
const SHOWN_CHARS_MAX = 40;

/** Reads a text for the guards; at most some milliseconds, whatever it holds. */
export function guardFeatures(text: string): GuardFeatures {
  if (text.length > TEXT_CHARS_MAX) return unread(text);
  const composed = text
    .normalize("NFKC")
    .replace(/[‘’ʼ](?=\p{L})/gu, "'")
    .replace(/(?<![\p{L}.])(?:\p{L}\.){2,}/gu, (letters) => letters.replaceAll(".", "")); // U.S.
  const folded = fold(composed);
  if (folded.length > FOLDED_CHARS_MAX) return unread(folded);
  const code = codeOf(folded);
  const quotes = quotesOf(folded);
  const names = namesOf(composed);
  if (code.length + quotes.length + names.length > ITEMS_MAX) return unread(folded);
  return {
    hash: undefined,
    text: folded,
    isSpaced: !UNSPACED.test(folded),
    quantities: quantitiesOf(folded),
    negations: negationCount(folded),
    sides: sidesOf(folded),
    code,
    quotes,
    names,
  };
}

/**
 * The first of `guards` that keeps the candidate from answering the question, or undefined: it may. Symmetric but for
 * the order of words in `says`.
 */
export function guardAgainst(
  question: GuardFeatures,
  candidate: GuardFeatures,
  guards: readonly GuardName[] = standardGuards,
): GuardBlock | undefined {
  if (question.text === candidate.text && question.hash === candidate.hash) return undefined;
  const isUnread = question.hash !== undefined || candidate.hash !== undefined;
  for (const guard of guards) {
    // Of a text that was not read, only this is known.
    if (isUnread !== (guard === "length")) continue;
    const says = checks[guard](question, candidate);
    if (says !== undefined) return { guard, says };
  }
  return undefined;
}

const checks: Readonly<
  Record<GuardName, (a: GuardFeatures, b: GuardFeatures) => string | undefined>
> = {
  length: () => `a text of more than ${TEXT_CHARS_MAX} characters answers only itself`,
  numbers: (a, b) => quantityDifference(a.quantities, b.quantities),
  negation: (a, b) =>
    a.negations % 2 === b.negations % 2 ? undefined : `negations ${a.negations} ≠ ${b.negations}`,
  opposites: (a, b) => sideDifference(a.sides, b.sides),
  code: (a, b) => itemDifference("code", a, a.code, b, b.code),
  quotes: (a, b) => itemDifference("quoted", a, a.quotes, b, b.quotes),
  names: (a, b) => itemDifference("name", a, a.names, b, b.names),
  order: orderDifference,
  private_words: privateWords,
};

function shown(text: string): string {
  return text.length > SHOWN_CHARS_MAX ? `${text.slice(0, SHOWN_CHARS_MAX)}…` : text;
}

function unread(text: string): GuardFeatures {
  return {
    hash: `${text.length}:${fnv1a(text, 0x811c9dc5)}:${fnv1a(text, 0x9e3779b9)}`,
    text: "",
    isSpaced: false,
    quantities: [],
    negations: 0,
    sides: [],
    code: [],
    quotes: [],
    names: [],
  };
}

/** Not against an attacker, who could only mislead a scope that is their own. */
function fnv1a(text: string, offset: number): number {
  let hash = offset | 0;
  for (let index = 0; index < text.length; index++) {
    hash = Math.imul(hash ^ text.charCodeAt(index), 0x01000193);
  }
  return hash >>> 0;
}

// ---- texts ----------------------------------------------------------------------------------------------------

/** Compares without case: by way of upper case, so that ß is ss; the final sigma is a sigma. */
function fold(composed: string): string {
  return composed
    .toLowerCase()
    .toUpperCase()
    .toLowerCase()
    .normalize("NFKC")
    .replaceAll("ς", "σ")
    .replace(/\s+/g, " ")
    .trim();
}

const UNSPACED =
  /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}]/u;
/** Part of a word of a script with spaces: an item that begins or ends so must not lie within a longer word. */
const WORD_CHAR = /[\p{L}\p{N}\p{M}]/u;

/** Whether `item` stands in `text`, not as a part of a longer word. */
function occurs(text: string, item: string): boolean {
  const startsWord = isWordChar(item, 0);
  const endsWord = isWordChar(item, item.length - 1);
  for (let at = text.indexOf(item); at >= 0; at = text.indexOf(item, at + 1)) {
    const end = at + item.length;
    if ((!startsWord || !isWordChar(text, at - 1)) && (!endsWord || !isWordChar(text, end))) {
      return true;
    }
  }
  return false;
}

function isWordChar(text: string, index: number): boolean {
  const char = text[index];
  return char !== undefined && WORD_CHAR.test(char) && !UNSPACED.test(char);
}

/** Each item of either text must stand in the other one, in whatever clothes. */
function itemDifference(
  what: string,
  a: GuardFeatures,
  mine: readonly string[],
  b: GuardFeatures,
  theirs: readonly string[],
): string | undefined {
  const left = mine.find((item) => !stands(b.text, item));
  const right = theirs.find((item) => !stands(a.text, item));
  if (left === undefined && right === undefined) return undefined;
  if (left !== undefined && right !== undefined) {
    return `${what} "${shown(left)}" ≠ "${shown(right)}"`;
  }
  return `${what} "${shown(left ?? right ?? "")}" in one text only`;
}

function stands(text: string, item: string): boolean {
  if (occurs(text, item)) return true;
  if (!/^[a-z]{3,}s?$/.test(item)) return false;
  return occurs(text, item.endsWith("s") ? item.slice(0, -1) : `${item}s`); // Muslim, Muslims.
}

// ---- code and quotes ------------------------------------------------------------------------------------------

/** A word that nobody writes but in code: its symbols carry the meaning, which embedders do not see. */
const CODE_WORD = new RegExp(
  [
    String.raw`^--?[a-z][\w-]*(?:=.*)?$`, // --hard
    String.raw`\w_\w|::|->|=>|\(\)|[=!<>]=|&&|\|\||:\/\/|\\\w|@`,
    String.raw`^(?:\.{0,2}|~)\/[\w.~-]`, // A path from the root, from here or from home.
    String.raw`^[a-z]{1,3}(?:\+\+|#)`, // c++, c#
    String.raw`^[\w-]+\.(?:py|java|cpp|json|ya?ml|txt|md|csv|xlsx?|docx?|pptx?|pdf|html?|css|sh|sql|exe|zip|apk|mp[34]|png|jpe?g|gif)$`,
  ].join("|"),
);
const CODE_WORD_CHARS_MAX = 200;
/** Between operands; a minus only with spaces around it: 2016-2017 is a range. */
const OPERATOR = /(?<=[\w)]) ?([+*^×÷<>=]=?) ?(?=[\w(])|(?<=\d) - (?=\d)/g;

function codeOf(folded: string): string[] {
  const found = new Set<string>();
  let rest = folded;
  if (folded.includes("`")) {
    rest = folded.replace(/(`+)([^`]{1,200})\1/g, (_, _marks: string, inside: string) => {
      if (inside.trim() !== "") found.add(inside.trim());
      return " ";
    });
  }
  for (const piece of rest.split(CODE_BREAK)) {
    if (piece.length < 2 || piece.length > CODE_WORD_CHARS_MAX) continue;
    const word = piece.replace(/^["'([{<,]+/, "").replace(/["'\]}>,.;:!?…]+$/, "");
    if (CODE_WORD.test(word)) found.add(word);
  }
  // 7 * 8 is not 7 + 8, and 😀 not 😡: no word of theirs differs.
  for (const { 1: operator = "-" } of folded.matchAll(OPERATOR)) found.add(operator);
  for (const [pictogram] of folded.matchAll(/\p{Extended_Pictographic}/gu)) found.add(pictogram);
  return [...found];
}

const CODE_BREAK = /[\s\p{Script=Han}，。？！、；：“”‘’（）「」《》]+/u;

const QUOTES = new RegExp(
  [
    `"([^"]{1,${QUOTE_CHARS_MAX}})"`,
    `“([^“”]{1,${QUOTE_CHARS_MAX}})”`,
    `«([^«»]{1,${QUOTE_CHARS_MAX}})»`,
    `「([^「」]{1,${QUOTE_CHARS_MAX}})」`,
    `『([^『』]{1,${QUOTE_CHARS_MAX}})』`,
    `《([^《》]{1,${QUOTE_CHARS_MAX}})》`,
    `(?<![\\p{L}\\p{N}])'([^']{1,${QUOTE_CHARS_MAX}})'(?![\\p{L}\\p{N}])`,
  ].join("|"),
  "gu",
);

function quotesOf(folded: string): string[] {
  const found = new Set<string>();
  for (const match of folded.matchAll(QUOTES)) {
    const inside = match.slice(1).find((group) => group !== undefined) ?? "";
    const bare = inside.replace(/^[\s\p{P}]+|[\s\p{P}]+$/gu, "");
    if (bare !== "") found.add(bare);
  }
  return [...found];
}

// ---- names ----------------------------------------------------------------------------------------------------

const WORD = /[\p{L}\p{N}\p{M}][\p{L}\p{N}\p{M}']*/gu;
/** In a text without spaces: a run of what is not written so. */
const SPACED_WORD = new RegExp(`(?:(?!${UNSPACED.source})${WORD_CHAR.source})+`, "gu");

/**
 * Words with a capital that do not begin a sentence, words with a capital or a digit inside; in a text of a script
 * without spaces, every Latin word. Where a text shouts or is a title, every word but the small ones counts: rather a
 * miss than another name's answer.
 */
function namesOf(composed: string): string[] {
  const found = new Set<string>();
  if (UNSPACED.test(composed)) {
    for (const [word] of fold(composed).matchAll(SPACED_WORD)) {
      if (!/^[\p{N}\p{M}]/u.test(word)) found.add(word); // 5km and 2024: quantities know them.
    }
    return [...found];
  }
  let endAt = 0;
  for (const { 0: word, index } of composed.matchAll(WORD)) {
    const isFirst =
      index === 0 ||
      /[.?!:;"“(\n]\s*$|^\P{L}*$/u.test(composed.slice(Math.max(0, endAt - 1), index));
    endAt = index + word.length;
    const isMixed = /\p{L}\p{Lu}|\p{Lu}.*\p{N}|\p{N}.*\p{Lu}/u.test(word);
    const isCapital = /^\p{Lu}/u.test(word) && !isFirst;
    if (!isMixed && !isCapital) continue;
    const name = fold(word).replace(/'s?$/, "");
    if (name !== "" && !SMALL_WORDS.has(name)) found.add(name);
  }
  return [...found];
}

// ---- order and words ------------------------------------------------------------------------------------------

const ARTICLES = new Set(["a", "an", "the"]);

/** The same words in another order; not in scripts without spaces, where order is free enough to harm (7 % of LCQMC). */
function orderDifference(a: GuardFeatures, b: GuardFeatures): string | undefined {
  if (!a.isSpaced || !b.isSpaced) return undefined;
  const left = wordsOf(a.text);
  const right = wordsOf(b.text);
  if (left.length !== right.length) return undefined;
  const at = left.findIndex((word, index) => word !== right[index]);
  if (at < 0) return undefined;
  const sorted = [...right].sort();
  if ([...left].sort().some((word, index) => word !== sorted[index])) return undefined;
  return `same words in another order: "${shown(left[at] ?? "")}" ≠ "${shown(right[at] ?? "")}"`;
}

function wordsOf(folded: string): string[] {
  return (folded.match(WORD) ?? []).filter((word) => !ARTICLES.has(word));
}

/** Each text has a content word that the other lacks, endings aside. */
function privateWords(a: GuardFeatures, b: GuardFeatures): string | undefined {
  if (!a.isSpaced || !b.isSpaced) return undefined;
  const left = stems(a.text);
  const right = stems(b.text);
  const mine = [...left.keys()].find((stem) => !right.has(stem));
  const theirs = [...right.keys()].find((stem) => !left.has(stem));
  if (mine === undefined || theirs === undefined) return undefined;
  return `word "${shown(left.get(mine) ?? "")}" ≠ "${shown(right.get(theirs) ?? "")}"`;
}

/** Content words by stem. */
function stems(folded: string): Map<string, string> {
  const found = new Map<string, string>();
  for (const word of wordsOf(folded)) {
    if (SMALL_WORDS.has(word)) continue;
    const stem = word.replace(/'s?$/, "");
    found.set(stem.length > 4 ? stem.replace(/(?:ies|es|s|ed|ing|y|e)$/, "") : stem, word);
  }
  return found;
}

/** Words that carry grammar, not content. */
const SMALL_WORDS = new Set(
  (
    "a an the i i'm i've i'd i'll me my mine myself you your yours he him his she her hers it its we us our they them " +
    "their this that these those there here who whom whose which what what's when where why how how's is isn't are " +
    "aren't was were be been being am do does did doing don't doesn't didn't have has had having can could can't will " +
    "would won't shall should may might must of in on at to for from by with about into as and or but if than then so " +
    "such very too also just only some any all each every both most more much many few other another one ones not no " +
    "nor up out off over under again ever get got please tell explain give make know want need way ways best good " +
    "after before between during while because until against through own same let's it's that's there's you're we're " +
    "they're"
  ).split(" "),
);
