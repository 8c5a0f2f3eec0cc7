/**
 * The cache benchmark of [semantic-cache reference, section 11] on labelled pairs: every first text is stored, every
 * second one is asked; a hit is right where question and entry are in one component of the pairs labelled the same.
 * Texts that differ in case, spaces and punctuation only are taken for the same, too, unless `isLabelsOnly`: nobody
 * labelled them (47 of the 56 hits of LCQMC with equal vectors and other words would be wrong by the labels).
 *
 * The index, the guards, verified mode and shadow statistics are those that ship. Pure but for the embedder, which is
 * handed in. cache-eval-report.ts words the result.
 */

import {
  ShadowStats,
  type ShadowSummary,
  type Share,
  shareOf,
  wilsonLower,
} from "../actors/judged-precision.ts";
import {
  type GuardFeatures,
  type GuardName,
  guardAgainst,
  guardFeatures,
  guardNames,
  standardGuards,
} from "../actors/match-guards.ts";
import { ExactIndex } from "../actors/vector-index.ts";
import {
  decide,
  EntryEvidence,
  EvidencePool,
  learn,
  SIMILARITY_MIN,
} from "../actors/verified-mode.ts";
import { Random } from "../runtime/random.ts";
import type { LabelledPair } from "./labelled-pairs.ts";

/** Texts to vectors; a text that has none gives a reason instead (or a vector of zeros). */
export type EvalEmbedder = {
  /** Name, version and dimension. */
  readonly id: string;
  embed(texts: readonly string[]): Promise<readonly (Float32Array | string)[]>;
};

export type EvalOptions = {
  /** Least threshold of the table, and of the search for a wanted precision. */
  readonly thresholdMin: number;
  /** At which the guards are taken apart, and that shadow mode and the fixed mode serve at. */
  readonly threshold: number;
  /** Wanted share of right hits. */
  readonly precision: number;
  /** Error rates of verified mode to replay; none: no replay. */
  readonly errorRatesMax: readonly number[];
  /** Share of the questions that a shadow period sees; undefined: none. */
  readonly shadowShare: number | undefined;
  /** Only labels say which texts are the same. */
  readonly isLabelsOnly: boolean;
  readonly seed: number;
};

/** Of the questions: those answered from the cache. */
export type Outcome = {
  readonly hits: Share;
  /** Right ones among the hits. */
  readonly right: Share;
  /** Hits on questions of which no entry has the meaning, among such questions. */
  readonly falseHits: Share;
};

export type ThresholdRow = {
  readonly threshold: number;
  readonly plain: Outcome;
  readonly guarded: Outcome;
};

export type GuardRow = {
  readonly guard: GuardName;
  readonly isStandard: boolean;
  /** Of the labelled pairs, at any similarity: blocked ones. */
  readonly same: Share;
  readonly different: Share;
  /** With this guard alone, and with all standard ones but this. */
  readonly alone: Outcome;
  readonly others: Outcome;
};

/** The least threshold at which precision is shown to be as wanted, with what is served there. */
export type WantedThreshold = { readonly threshold: number; readonly outcome: Outcome } | undefined;

export type ReplayResult = {
  /** undefined: fixed mode, which serves whatever reaches the threshold and passes the guards. */
  readonly errorRateMax: number | undefined;
  readonly served: Share;
  /** Wrong ones among the served. */
  readonly errors: Share;
  readonly explored: number;
  /** Of the served, asked in the very words of an entry: exact lookup would have answered those. */
  readonly servedExact: number;
  /** Right hits ÷ those of the fixed mode; 0 where it has none. */
  readonly kept: number;
};

export type ShadowResult = {
  readonly share: number;
  readonly estimate: ShadowSummary;
  /** Over all questions. */
  readonly truth: ShadowSummary;
};

export type EvalResult = {
  readonly embedder: string;
  readonly pairs: number;
  readonly samePairs: number;
  readonly entries: number;
  readonly questions: number;
  /** Questions of which no entry has the meaning. */
  readonly noMatch: number;
  /** Questions in the very words of an entry; they count as any other. */
  readonly exact: number;
  /** Texts that the embedder has no vector for: never stored, never answered. */
  readonly withoutVector: number;
  /** Pairs of texts taken for the same because of their words. */
  readonly joinedByWords: number;
  /** Pairs labelled different whose texts are taken for the same all the same. */
  readonly contradictions: number;
  readonly threshold: number;
  readonly precision: number;
  readonly rows: readonly ThresholdRow[];
  readonly wanted: { readonly plain: WantedThreshold; readonly guarded: WantedThreshold };
  readonly guards: readonly GuardRow[];
  readonly replays: readonly ReplayResult[];
  readonly shadow: ShadowResult | undefined;
};

/** The origin's KNN 3: the first of three that reaches the threshold and passes the guards. */
const CANDIDATES = 3;
/** Step of the table, and of the search for a threshold. */
const ROW_STEP = 0.01;
const ROW_MAX = 0.97;
const SEARCH_STEP = 0.001;
const EMBED_BATCH = 8;
/** Served hits of a replay that are compared with the real answer [reference, section 9.2]. */
const JUDGED_SHARE = 0.02;
/** A replay trains the index again after so many new entries. */
const MAINTAIN_EVERY = 1000;

/** What is being done, and how far it is: for a progress bar. */
export type OnProgress = (phase: string, done: number, total: number) => void;

/** Runs the benchmark. Rejects with whatever the embedder rejects with. */
export async function evaluateCache(
  pairs: readonly LabelledPair[],
  embedder: EvalEmbedder,
  options: EvalOptions,
  onProgress: OnProgress = () => {},
): Promise<EvalResult> {
  const texts = new Texts(pairs);
  await texts.embed(embedder, onProgress);
  texts.readForGuards(onProgress);
  if (!options.isLabelsOnly) texts.joinByWords();
  const index = texts.index(new Random(`${options.seed} index`));
  const lookups = lookUp(texts, index, options, onProgress);
  const outcome = (threshold: number, guards: readonly GuardName[]) =>
    outcomeOf(lookups, threshold, maskOf(guards));
  const rows: ThresholdRow[] = [];
  for (
    let threshold = options.thresholdMin;
    threshold <= ROW_MAX + 1e-9;
    threshold = stepped(threshold, ROW_STEP)
  ) {
    rows.push({
      threshold,
      plain: outcome(threshold, []),
      guarded: outcome(threshold, standardGuards),
    });
  }
  const wanted = (guards: readonly GuardName[]) =>
    wantedThreshold(lookups, maskOf(guards), options);
  return {
    embedder: embedder.id,
    pairs: pairs.length,
    samePairs: pairs.filter(({ isSame }) => isSame).length,
    entries: texts.entries.length,
    questions: lookups.length,
    noMatch: lookups.filter(({ hasMatch }) => !hasMatch).length,
    exact: lookups.filter(({ isExact }) => isExact).length,
    withoutVector: texts.withoutVector,
    joinedByWords: texts.joinedByWords,
    contradictions: texts.contradictions,
    threshold: options.threshold,
    precision: options.precision,
    rows,
    wanted: { plain: wanted([]), guarded: wanted(standardGuards) },
    guards: guardRows(texts, lookups, options.threshold),
    replays: replays(texts, index, options, onProgress),
    shadow:
      options.shadowShare === undefined
        ? undefined
        : shadow(lookups, options.threshold, options.shadowShare, options.seed),
  };
}

function stepped(threshold: number, step: number): number {
  return Math.round((threshold + step) * 1000) / 1000;
}

// ---- texts ----------------------------------------------------------------------------------------------------

/** Every different text once: its vector, its features, its component. */
class Texts {
  readonly all: string[] = [];
  /** Texts to store, and texts to ask in the order of the pairs (a text is asked as often as it stands there). */
  readonly entries: readonly number[];
  readonly questions: readonly number[];
  readonly pairs: readonly { a: number; b: number; isSame: boolean }[];
  readonly #ids = new Map<string, number>();
  readonly #parents: number[] = [];
  readonly #vectors: (Float32Array | undefined)[] = [];
  readonly #features: GuardFeatures[] = [];
  withoutVector = 0;
  joinedByWords = 0;

  constructor(pairs: readonly LabelledPair[]) {
    this.pairs = pairs.map(({ a, b, isSame }) => ({ a: this.#idOf(a), b: this.#idOf(b), isSame }));
    for (const { a, b, isSame } of this.pairs)
      if (isSame) this.#parents[this.component(a)] = this.component(b);
    this.entries = [...new Set(this.pairs.map(({ a }) => a))];
    this.questions = this.pairs.map(({ b }) => b);
  }

  #idOf(text: string): number {
    const known = this.#ids.get(text);
    if (known !== undefined) return known;
    const id = this.all.length;
    this.#ids.set(text, id);
    this.all.push(text);
    this.#parents.push(id);
    return id;
  }

  /** Union–find with halving of paths: equal for texts that labels join. */
  component(id: number): number {
    let at = id;
    for (;;) {
      const parent = this.#parents[at] ?? at;
      if (parent === at) return at;
      const next = this.#parents[parent] ?? parent;
      this.#parents[at] = next;
      at = next;
    }
  }

  isRight(question: number, entry: number): boolean {
    return this.component(question) === this.component(entry);
  }

  get contradictions(): number {
    return this.pairs.filter(({ a, b, isSame }) => !isSame && this.isRight(a, b)).length;
  }

  async embed(embedder: EvalEmbedder, onProgress: OnProgress): Promise<void> {
    for (let from = 0; from < this.all.length; from += EMBED_BATCH) {
      const batch = this.all.slice(from, from + EMBED_BATCH);
      const vectors = await embedder.embed(batch);
      if (vectors.length !== batch.length) {
        throw new RangeError(
          `the embedder gave ${vectors.length} vectors for ${batch.length} texts`,
        );
      }
      for (const vector of vectors) {
        const isUsable = typeof vector !== "string" && vector.some((value) => value !== 0);
        this.#vectors.push(isUsable ? vector : undefined);
        if (!isUsable) this.withoutVector++;
      }
      onProgress("embedding", this.#vectors.length, this.all.length);
    }
  }

  readForGuards(onProgress: OnProgress): void {
    for (const [id, text] of this.all.entries()) {
      this.#features.push(guardFeatures(text));
      if (id % 1000 === 999) onProgress("reading", id + 1, this.all.length);
    }
  }

  /** Joins texts that differ in case, spaces and punctuation only, where no guard sees a difference: C# is not C. */
  joinByWords(): void {
    const firsts = new Map<string, number>();
    for (const [id, features] of this.#features.entries()) {
      const words = features.text.replace(/[\s\p{P}]+/gu, "");
      const first = firsts.get(words);
      if (words === "") continue;
      if (first === undefined) firsts.set(words, id);
      else if (
        !this.isRight(first, id) &&
        guardAgainst(this.featuresOf(first), features) === undefined
      ) {
        this.#parents[this.component(id)] = this.component(first);
        this.joinedByWords++;
      }
    }
  }

  get dimension(): number {
    return this.#vectors.find((vector) => vector !== undefined)?.length ?? 1;
  }

  vectorOf(id: number): Float32Array | undefined {
    return this.#vectors[id];
  }

  featuresOf(id: number): GuardFeatures {
    return this.#features[id] ?? guardFeatures(this.all[id] ?? "");
  }

  /** The store before the first question. Throws RangeError for a vector that cannot be compared. */
  index(random: Random): ExactIndex {
    const index = new ExactIndex({ dimension: this.dimension, random: () => random.next() });
    for (const id of this.entries) {
      const vector = this.vectorOf(id);
      const refusal = vector === undefined ? undefined : index.insert(id, vector);
      if (refusal !== undefined) throw new RangeError(`the embedder's vectors: ${refusal}`);
    }
    while (index.maintain());
    return index;
  }
}

// ---- the benchmark --------------------------------------------------------------------------------------------

/** A question with its candidates, best first. */
type Lookup = {
  hasMatch: boolean;
  isExact: boolean;
  candidates: { similarity: number; isRight: boolean; blockedBy: number }[];
};

/** Guards as bits, so that any set of them is one comparison. */
function maskOf(guards: readonly GuardName[]): number {
  return guards.reduce((mask, guard) => mask | (1 << guardNames.indexOf(guard)), 0);
}

function blockedBy(question: GuardFeatures, entry: GuardFeatures): number {
  return maskOf(guardNames.filter((guard) => guardAgainst(question, entry, [guard]) !== undefined));
}

function lookUp(
  texts: Texts,
  index: ExactIndex,
  { thresholdMin }: EvalOptions,
  onProgress: OnProgress,
): Lookup[] {
  const stored = new Set(texts.entries);
  const meanings = new Set(texts.entries.map((id) => texts.component(id)));
  return texts.questions.map((question, at) => {
    if (at % 500 === 0) onProgress("asking", at, texts.questions.length);
    const vector = texts.vectorOf(question);
    const found = vector === undefined ? [] : index.search(vector, thresholdMin, CANDIDATES);
    return {
      hasMatch: meanings.has(texts.component(question)),
      isExact: stored.has(question),
      candidates: found.map(({ id, similarity }) => ({
        similarity,
        isRight: texts.isRight(question, id),
        blockedBy: blockedBy(texts.featuresOf(question), texts.featuresOf(id)),
      })),
    };
  });
}

function served(
  { candidates }: Lookup,
  threshold: number,
  mask: number,
): Lookup["candidates"][number] | undefined {
  return candidates.find((one) => one.similarity >= threshold && (one.blockedBy & mask) === 0);
}

function outcomeOf(lookups: readonly Lookup[], threshold: number, mask: number): Outcome {
  let hits = 0;
  let right = 0;
  let falseHits = 0;
  let noMatch = 0;
  for (const lookup of lookups) {
    if (!lookup.hasMatch) noMatch++;
    const hit = served(lookup, threshold, mask);
    if (hit === undefined) continue;
    hits++;
    if (hit.isRight) right++;
    if (!lookup.hasMatch) falseHits++;
  }
  return {
    hits: shareOf(hits, lookups.length),
    right: shareOf(right, hits),
    falseHits: shareOf(falseHits, noMatch),
  };
}

/** The first threshold, upwards, at which the lower bound of precision (one-sided 95 %) is as wanted. */
function wantedThreshold(
  lookups: readonly Lookup[],
  mask: number,
  { thresholdMin, precision }: EvalOptions,
): WantedThreshold {
  for (let threshold = thresholdMin; threshold <= 1; threshold = stepped(threshold, SEARCH_STEP)) {
    const outcome = outcomeOf(lookups, threshold, mask);
    const { count, total } = outcome.right;
    if (wilsonLower(count, total) >= precision) return { threshold, outcome };
  }
  return undefined;
}

function guardRows(texts: Texts, lookups: readonly Lookup[], threshold: number): GuardRow[] {
  const blocked = texts.pairs.map(({ a, b, isSame }) => ({
    isSame,
    mask: blockedBy(texts.featuresOf(a), texts.featuresOf(b)),
  }));
  return guardNames.map((guard) => {
    const mask = maskOf([guard]);
    const share = (wanted: boolean): Share => {
      const all = blocked.filter(({ isSame }) => isSame === wanted);
      return shareOf(all.filter((one) => (one.mask & mask) !== 0).length, all.length);
    };
    return {
      guard,
      isStandard: standardGuards.includes(guard),
      same: share(true),
      different: share(false),
      alone: outcomeOf(lookups, threshold, mask),
      others: outcomeOf(lookups, threshold, maskOf(standardGuards) & ~mask),
    };
  });
}

function shadow(
  lookups: readonly Lookup[],
  threshold: number,
  share: number,
  seed: number,
): ShadowResult {
  const random = new Random(`${seed} shadow`);
  const estimate = new ShadowStats();
  const truth = new ShadowStats();
  for (const lookup of lookups) {
    const hit = served(lookup, threshold, maskOf(standardGuards));
    for (const stats of random.next() < share ? [estimate, truth] : [truth]) {
      if (hit === undefined) stats.miss();
      else stats.wouldHit(hit.similarity, hit.isRight ? "right" : "wrong");
    }
  }
  return { share, estimate: estimate.summary(), truth: truth.summary() };
}

// ---- replay ---------------------------------------------------------------------------------------------------

function replays(
  texts: Texts,
  index: ExactIndex,
  options: EvalOptions,
  onProgress: OnProgress,
): ReplayResult[] {
  if (options.errorRatesMax.length === 0) return [];
  const all = [undefined, ...options.errorRatesMax].map((errorRateMax) =>
    replay(texts, index, errorRateMax, options, onProgress),
  );
  const right = ({ served, errors }: Omit<ReplayResult, "kept">) => served.count - errors.count;
  const [fixed] = all;
  const most = fixed === undefined ? 0 : right(fixed);
  return all.map((one) => ({ ...one, kept: most === 0 ? 0 : right(one) / most }));
}

/**
 * All questions once, in a random order, on a store that grows as it would live: what no entry answers is stored, and
 * what was explored and found different, too. One pool: the pairs stand for one tenant. Leaves the index as it was.
 */
function replay(
  texts: Texts,
  index: ExactIndex,
  errorRateMax: number | undefined,
  { threshold, seed }: EvalOptions,
  onProgress: OnProgress,
): Omit<ReplayResult, "kept"> {
  const random = new Random(`${seed} replay`);
  const stored = new Set(texts.entries);
  const grown: number[] = [];
  const evidence = new Map<number, EntryEvidence>();
  const pool = new EvidencePool();
  const similarityMin = Math.max(SIMILARITY_MIN, threshold);
  let servedExact = 0;
  let hits = 0;
  let errors = 0;
  let explored = 0;
  const questions = shuffled(texts.questions, random);
  for (const [at, question] of questions.entries()) {
    if (at % 500 === 0) onProgress(`replaying ${errorRateMax ?? "fixed"}`, at, questions.length);
    const vector = texts.vectorOf(question);
    if (vector === undefined) continue;
    let isAnswered = false;
    for (const { id, similarity } of index.search(vector, similarityMin, CANDIDATES)) {
      if (guardAgainst(texts.featuresOf(question), texts.featuresOf(id)) !== undefined) continue;
      const entry = evidence.get(id) ?? new EntryEvidence();
      const candidate = { similarity, similarityMin, entry, pool, errorRateMax: errorRateMax ?? 1 };
      const kind = errorRateMax === undefined ? "serve" : decide(candidate).kind;
      if (kind === "miss") continue;
      const isRight = texts.isRight(question, id);
      if (kind === "explore") explored++;
      else {
        hits++;
        if (!isRight) errors++;
        if (stored.has(question)) servedExact++;
      }
      const isJudged =
        kind === "explore" || (errorRateMax !== undefined && random.next() < JUDGED_SHARE);
      if (isJudged) {
        evidence.set(id, entry);
        learn(candidate, isRight);
      }
      isAnswered = !isJudged || isRight;
      break;
    }
    if (isAnswered || stored.has(question)) continue;
    stored.add(question);
    grown.push(question);
    index.insert(question, vector);
    if (grown.length % MAINTAIN_EVERY === 0) while (index.maintain());
  }
  for (const id of grown) index.remove(id);
  return {
    errorRateMax,
    served: shareOf(hits, questions.length),
    errors: shareOf(errors, hits),
    explored,
    servedExact,
  };
}

function shuffled(ids: readonly number[], random: Random): number[] {
  const all = [...ids];
  for (let at = all.length - 1; at > 0; at--) {
    const other = random.int(at + 1);
    [all[at], all[other]] = [all[other] ?? 0, all[at] ?? 0];
  }
  return all;
}
