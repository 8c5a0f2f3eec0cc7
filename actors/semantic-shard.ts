/**
 * Answers by the meaning of their question: what one cache shard knows beyond equal keys. Pure.
 *
 * A scope is everything that must be equal for an answer to fit (tenant, model, system prompt, tools, parameters,
 * earlier turns, embedder); within it only the last user turn is compared, by the cosine of its vector. Scopes never
 * meet: each has an index of its own. A candidate at or above the threshold must pass the guards, and then, by the
 * tenant's mode,
 *
 *   fixed     is served;
 *   verified  is served where its labels, or its band's, bound the error; else the model is asked and it is labelled;
 *   shadow    is never served: the model is asked, and what it says is compared, so that the rate of false hits is
 *             known before anyone is served one.
 *
 * Labels come from the model asked again (`learn` with the entry that was passed over), and from callers' complaints.
 * Where the judged precision of a tenant's hits falls under its target, its hits are only judged until it is back.
 *
 * Memory is bounded in bytes, answers, questions, vectors and indexes included: full, it drops what was used least
 * recently, in whatever scope. Every entry also has an instant after which it is never served, which no hit moves. An
 * entry that was found wrong is gone for good: its id is remembered, so that no copy brings it back.
 *
 * A scope may be spread over several shards (scope-split.ts). Each then judges the candidates that it holds, with its
 * own labels (`candidates`), and one of them concludes from what all have said (`conclude`): the same first of three
 * that one shard with all entries would have taken. What is learnt over all entries of a tenant stays with the shard
 * that learnt it: on several shards a band opens later, never earlier.
 */
import { assert, unreachable } from "../runtime/actor.ts";
import { type JudgeName, sameAnswer } from "./answer-judge.ts";
import {
  PrecisionSwitch,
  ShadowStats,
  type ShadowSummary,
  type SwitchState,
} from "./judged-precision.ts";
import { LruList, type LruNode } from "./lru-list.ts";
import {
  type GuardBlock,
  type GuardFeatures,
  type GuardName,
  guardAgainst,
  guardBlocks,
  guardFeatures,
  standardGuards,
  strictGuards,
} from "./match-guards.ts";
import type { SemanticPolicy, StoredAnswer, StoredQuestion } from "./protocol.ts";
import { ExactIndex, type VectorIndex } from "./vector-index.ts";
import { decide, EntryEvidence, type EvidenceData, EvidencePool, learn } from "./verified-mode.ts";

export type SemanticOptions = {
  /** Life of an entry, > 0. */
  ttlMs: number;
  /** Memory of this shard for entries with their vectors, > 0. */
  bytesMax: number;
  /** A larger answer is not kept, > 0. */
  answerBytesMax: number;
  /** Judged precision of a tenant's hits under which they are only judged, in (0, 1). */
  precisionMin: number;
  judge: JudgeName;
  /** The index of a scope; default: the exact one. */
  makeIndex?: MakeIndex;
};

/** Makes an empty index for vectors of that dimension; `random`, uniform in [0, 1), is for its basis. */
export type MakeIndex = (options: { dimension: number; random: () => number }) => VectorIndex;

/** A question that may have been answered in other words. */
export type Question = {
  scope: string;
  tenant: string;
  /** What the labels of its band are shared over, beside the tenant. */
  model: string;
  text: string;
  /** Of norm 1. */
  vector: Float32Array;
  policy: SemanticPolicy;
};

/** `says`: why, in words without the question. */
export type Matched =
  | {
      kind: "hit";
      entryId: string;
      similarity: number;
      answer: StoredAnswer;
      ageMs: number;
      says: string;
    }
  /** Ask the model, and tell the shard (`learn`) what it said instead. */
  | { kind: "explore"; entryId: string; similarity: number; says: string }
  | { kind: "miss"; says: string };

/**
 * What a shard says of an entry that is similar enough to a question: serve it, with the answer; ask the model and label
 * it; or neither. Only the first of a shard's candidates that is not blocked can be chosen, and none comes after it.
 */
export type Candidate = {
  entryId: string;
  similarity: number;
  ageMs: number;
  says: string;
  verdict: { kind: "serve"; answer: StoredAnswer } | { kind: "explore" } | { kind: "blocked" };
};

/** An entry as it moves to another shard, with what is known of its answers. */
export type MovedEntry = { question: StoredQuestion; evidence: EvidenceData };

/** What is found out about an entry: another answer to compare its own with, or what a caller says of it. */
export type Label =
  | {
      kind: "answer";
      similarity: number;
      answer: StoredAnswer;
      isShadow: boolean;
      /** It had been served; else it was passed over. */
      wasServed: boolean;
    }
  | { kind: "feedback"; tenant: string; isRight: boolean };

/** `known`: the entry is here; `right` absent: nobody can tell. */
export type Labelled = { known: boolean; right?: boolean };

/** The entry that was passed over for the question whose answer is learnt. */
export type Explored = { entryId: string; similarity: number };

/** Figures now, then counts since the start. Every match is one of hits, explorations and misses. */
export type SemanticDescription = {
  scopes: number;
  questions: number;
  semanticBytes: number;
  semanticHits: number;
  explorations: number;
  semanticMisses: number;
  learnt: number;
  semanticEvictions: number;
  semanticExpired: number;
  /** Questions not kept: vector or answer refused. */
  unlearnt: number;
  judgedRight: number;
  judgedWrong: number;
  unjudged: number;
  /** Entries removed because they were found wrong. */
  removed: number;
  /** Tenants whose hits are only judged just now. */
  switchedOff: number;
};

/** What a person sees of an entry: for `headrace cache inspect` and the admin route. */
export type InspectedEntry = {
  entryId: string;
  /** Entries of one scope may answer the same question; the first 12 digits tell scopes apart. */
  scope: string;
  model: string;
  question: string;
  ageMs: number;
  expiresInMs: number;
  answerBytes: number;
  labels: number;
  /** Below this it was wrong before; 0 = never. */
  similarityMin: number;
  /** Where a text was given to compare with. */
  compared?: Comparison;
};

/** What would come of an entry for a text, if all but the text were equal. */
export type Comparison = {
  /** Absent: the text has no vector, or none of the entry's embedder. */
  similarity?: number;
  /** All guards that keep it from answering the text. */
  guards: GuardBlock[];
  kind: "serve" | "explore" | "miss";
  says: string;
};

/** Which entries are looked at, and what with. */
export type Inspection = {
  tenant: string;
  /** Entries listed at most. */
  count: number;
  /** Only scopes that begin so. */
  scope?: string;
  question?: { text: string; vector?: Float32Array; policy: SemanticPolicy };
};

/** What is known of the hits of a tenant's model. */
export type JudgedPool = {
  tenant: string;
  model: string;
  state: SwitchState;
  shadow: ShadowSummary;
};

/** One entry. */
interface Entry extends LruNode<Entry> {
  readonly entryId: string;
  /** In its scope's index. */
  readonly id: number;
  readonly scope: Scope;
  readonly tenant: string;
  readonly model: string;
  readonly text: string;
  readonly answer: StoredAnswer;
  readonly storedAtMs: number;
  readonly expiresAtMs: number;
  readonly bytes: number;
  evidence: EntryEvidence;
  /** Read when it is first a candidate. */
  features: GuardFeatures | undefined;
}

type Scope = {
  readonly name: string;
  readonly index: VectorIndex;
  readonly byId: Map<number, Entry>;
  /** One entry per wording: the newest answer. */
  readonly byText: Map<string, Entry>;
  /** As last counted in the shard's bytes. */
  indexBytes: number;
  entryBytes: number;
};

/** What is learnt over all entries of a tenant and model. */
type Pool = {
  readonly evidence: EvidencePool;
  readonly precision: PrecisionSwitch;
  readonly shadow: ShadowStats;
  /** Of the newest match: labels are held against it. */
  policy: SemanticPolicy | undefined;
};

/** Candidates that are looked at, best first (the article's KNN 3). */
export const NEIGHBOURS = 3;
/**
 * Beside question, answer and vector: the entry, its places in three tables and a list, what the guards have read of
 * its question, a dozen labels. Measured on Node 20: 20,000 entries that had been candidates and were labelled ten times
 * took 2 % less than was counted; stored and never looked at, 27 % less.
 */
const ENTRY_BYTES = 1700;
/** Of a question, with what the guards keep of it. */
const CHARACTER_BYTES = 6;
const SCOPE_BYTES = 1200;
/** Entries that one look compares with a text: some ms. */
const COMPARED_MAX = 5000;
/** Entries found wrong whose ids are remembered. */
const REMOVED_MAX = 10_000;
/** Pools of tenants and models; the one that was made first is forgotten, and learnt anew. */
const POOLS_MAX = 10_000;

export class SemanticShard {
  readonly #options: SemanticOptions;
  readonly #random: () => number;
  readonly #makeIndex: MakeIndex;
  readonly #scopes = new Map<string, Scope>();
  readonly #entries = new Map<string, Entry>();
  readonly #order = new LruList<Entry>();
  readonly #pools = new Map<string, Pool>();
  readonly #removedIds = new Set<string>();
  /** Scopes whose index may have work to do in quiet moments. */
  readonly #busy = new Set<Scope>();
  #ttlMs: number;
  #bytesMax: number;
  #bytes = 0;
  #nextId = 1;
  readonly #counts = {
    semanticHits: 0,
    explorations: 0,
    semanticMisses: 0,
    learnt: 0,
    semanticEvictions: 0,
    semanticExpired: 0,
    unlearnt: 0,
    judgedRight: 0,
    judgedWrong: 0,
    unjudged: 0,
    removed: 0,
  };
  readonly #guardBlocks: Partial<Record<GuardName, number>> = {};

  /** @param random uniform in [0, 1), for ids and the first basis of an index */
  constructor(options: SemanticOptions, random: () => number) {
    assert(options.ttlMs > 0, "ttlMs must be positive");
    assert(options.bytesMax > 0, "bytesMax must be positive");
    this.#options = options;
    this.#random = random;
    this.#makeIndex = options.makeIndex ?? ((wanted) => new ExactIndex(wanted));
    this.#ttlMs = options.ttlMs;
    this.#bytesMax = options.bytesMax;
  }

  get size(): number {
    return this.#entries.size;
  }

  /** Entries with vectors and indexes; never above `bytesMax` for longer than a call. */
  get bytes(): number {
    return this.#bytes;
  }

  get bytesMax(): number {
    return this.#bytesMax;
  }

  /** How often each guard kept a candidate from being served. */
  get guardBlocks(): Readonly<Partial<Record<GuardName, number>>> {
    return this.#guardBlocks;
  }

  // ---- matching -------------------------------------------------------------------------------------------

  match(question: Question, nowMs: number): Matched {
    const matched = this.conclude(question, this.candidates(question, nowMs));
    if (matched.kind !== "miss") this.touch(matched.entryId);
    return matched;
  }

  /** What is here for a question: at most three, best first, up to the first that is not blocked. */
  candidates({ scope: name, tenant, model, text, vector, policy }: Question, nowMs: number) {
    const scope = this.#scopes.get(name);
    if (scope === undefined) return [];
    const candidates: Candidate[] = [];
    let features: GuardFeatures | undefined;
    for (const { id, similarity } of scope.index.search(vector, policy.similarityMin, NEIGHBOURS)) {
      const entry = scope.byId.get(id);
      assert(entry !== undefined, "every row of an index is an entry's");
      if (entry.tenant !== tenant) continue; // The scope holds the tenant: should two ever share one, they never meet.
      if (nowMs >= entry.expiresAtMs) {
        this.#counts.semanticExpired++;
        this.#drop(entry);
        continue;
      }
      features ??= guardFeatures(text);
      entry.features ??= guardFeatures(entry.text);
      const guards = policy.isStrict ? strictGuards : standardGuards;
      const block = guardAgainst(features, entry.features, guards);
      const { entryId, answer } = entry;
      const facts = { entryId, similarity, ageMs: nowMs - entry.storedAtMs };
      if (block !== undefined) {
        this.#guardBlocks[block.guard] = (this.#guardBlocks[block.guard] ?? 0) + 1;
        const says = `guard: ${block.guard}, at similarity ${similarity.toFixed(3)}`;
        candidates.push({ ...facts, says, verdict: { kind: "blocked" } });
        continue;
      }
      const { kind, says } = this.#decide(
        entry,
        similarity,
        policy,
        this.#poolOf({ tenant, model }),
      );
      if (kind === "serve") candidates.push({ ...facts, says, verdict: { kind, answer } });
      else if (kind === "explore") candidates.push({ ...facts, says, verdict: { kind } });
      else candidates.push({ ...facts, says, verdict: { kind: "blocked" } });
      if (kind !== "miss") break;
    }
    return candidates;
  }

  /** The answer to a question for which these candidates, of one shard or several, were found; counts it. */
  conclude(question: Question, candidates: readonly Candidate[]): Matched {
    const matched = firstOf(candidates, question.policy.similarityMin);
    if (matched.kind === "hit") this.#counts.semanticHits++;
    else if (matched.kind === "explore") this.#counts.explorations++;
    else {
      this.#counts.semanticMisses++;
      if (question.policy.mode === "shadow") this.#poolOf(question).shadow.miss();
    }
    return matched;
  }

  /** It has been used. */
  touch(entryId: string): void {
    const entry = this.#entries.get(entryId);
    if (entry !== undefined) this.#order.touch(entry);
  }

  #decide(
    entry: Entry,
    similarity: number,
    policy: SemanticPolicy,
    pool: Pool,
  ): { kind: "serve" | "explore" | "miss"; says: string } {
    const { mode, similarityMin, errorRateMax } = policy;
    pool.policy = policy;
    if (similarity < entry.evidence.minSimilarity) {
      return { kind: "miss", says: `it was wrong at similarity ${similarity.toFixed(3)} before` };
    }
    if (mode === "shadow") return { kind: "explore", says: "shadow mode" };
    if (pool.precision.state === "off") {
      return { kind: "explore", says: "too few of its tenant's judged hits were right" };
    }
    if (mode === "fixed") return { kind: "serve", says: `at or above ${similarityMin}` };
    const { evidence } = entry;
    return decide({
      similarity,
      similarityMin,
      entry: evidence,
      pool: pool.evidence,
      errorRateMax,
    });
  }

  #poolOf({ tenant, model }: { tenant: string; model: string }): Pool {
    const name = `${tenant}\n${model}`;
    let pool = this.#pools.get(name);
    if (pool !== undefined) return pool;
    if (this.#pools.size >= POOLS_MAX) {
      const oldest = this.#pools.keys().next();
      if (!oldest.done) this.#pools.delete(oldest.value);
    }
    pool = {
      evidence: new EvidencePool(),
      precision: new PrecisionSwitch(this.#options.precisionMin),
      shadow: new ShadowStats(),
      policy: undefined,
    };
    this.#pools.set(name, pool);
    return pool;
  }

  // ---- learning -------------------------------------------------------------------------------------------

  /** A new entry of a question and the model's answer to it, not kept yet. */
  make(question: Omit<Question, "policy">, answer: StoredAnswer): StoredQuestion {
    const { scope, tenant, model, text, vector } = question;
    const entryId = this.#newId(scope);
    return { entryId, scope, tenant, model, text, vector, answer, ttlMs: this.#ttlMs, ageMs: 0 };
  }

  /**
   * Keeps an entry: a new one, or one from the shared store, or from another shard and then with its evidence. False when
   * it is not taken: expired, found wrong, here already, too large, older than what is here for its wording.
   */
  adopt(stored: StoredQuestion, nowMs: number, evidence?: EvidenceData): boolean {
    const { entryId, scope: name, text, vector, answer, ttlMs, ageMs } = stored;
    if (ttlMs <= 0 || this.#removedIds.has(entryId)) return false;
    const moved = evidence === undefined ? undefined : EntryEvidence.fromData(evidence);
    const same = this.#entries.get(entryId);
    if (same !== undefined) {
      // Labelled where it came from, after it was sent.
      const { labels, minSimilarity } = same.evidence;
      if (moved !== undefined && (moved.labels > labels || moved.minSimilarity > minSimilarity))
        same.evidence = moved;
      return false;
    }
    const answerBytes = Math.max(answer.bytes, answer.body.byteLength);
    const bytes = ENTRY_BYTES + CHARACTER_BYTES * text.length + answerBytes;
    const bytesMost = this.#bytesMax / 8; // So that one never drives out all others.
    const isTooLarge = answerBytes > this.#options.answerBytesMax || bytes > bytesMost;
    if (isTooLarge || vector.length === 0) {
      this.#counts.unlearnt++;
      return false;
    }
    const scope = this.#scopeOf(name, vector.length);
    // The dimension belongs to the embedder, and that to the scope: another one is refused by the index.
    const before = scope.byText.get(text);
    if (before !== undefined && before.storedAtMs > nowMs - ageMs) return false; // A newer one is here.
    const id = this.#nextId++;
    const refusal = scope.index.insert(id, vector);
    if (refusal !== undefined) {
      this.#counts.unlearnt++;
      this.#forgetIfEmpty(scope);
      return false;
    }
    const entry: Entry = {
      entryId,
      id,
      scope,
      tenant: stored.tenant,
      model: stored.model,
      text,
      answer,
      storedAtMs: nowMs - ageMs,
      expiresAtMs: nowMs + Math.min(ttlMs, this.#ttlMs),
      bytes,
      evidence: moved ?? new EntryEvidence(),
      features: undefined,
      hotter: null,
      colder: null,
    };
    scope.byId.set(id, entry);
    scope.byText.set(text, entry);
    this.#busy.add(scope);
    this.#entries.set(entryId, entry);
    this.#order.addHottest(entry);
    this.#bytes += bytes;
    scope.entryBytes += bytes;
    if (before !== undefined) this.#drop(before);
    this.#countIndex(scope);
    if (evidence === undefined) this.#counts.learnt++;
    this.#evict();
    return this.#entries.has(entryId);
  }

  /** Judges an entry by another answer to its question, or takes a caller's word; found wrong by a caller, it is gone. */
  label(entryId: string, label: Label): Labelled {
    const entry = this.#entries.get(entryId);
    if (entry === undefined) return { known: false };
    switch (label.kind) {
      case "answer": {
        const right = sameAnswer(entry.answer.body, label.answer.body, this.#options.judge);
        this.#label(entry, label.similarity, right, label.isShadow, label.wasServed);
        return right === undefined ? { known: true } : { known: true, right };
      }
      case "feedback":
        if (entry.tenant !== label.tenant) return { known: false };
        this.#label(entry, 1, label.isRight, false, true);
        if (!label.isRight) this.remove(entryId);
        return { known: true, right: label.isRight };
      default:
        return unreachable(label);
    }
  }

  /** The scope of an entry that is here. */
  scopeOf(entryId: string): string | undefined {
    return this.#entries.get(entryId)?.scope.name;
  }

  /** Takes an entry off for good: no copy of it comes back. */
  remove(entryId: string): void {
    if (this.#removedIds.size >= REMOVED_MAX) {
      const oldest = this.#removedIds.values().next();
      if (!oldest.done) this.#removedIds.delete(oldest.value);
    }
    this.#removedIds.add(entryId);
    const entry = this.#entries.get(entryId);
    if (entry === undefined) return;
    this.#counts.removed++;
    this.#drop(entry);
  }

  /**
   * In verified mode most explorations are of entries that would not have been served: only those that would count
   * against the precision of hits, or a tenant of many near misses would be switched off for what nobody is served.
   */
  #label(
    entry: Entry,
    similarity: number,
    right: boolean | undefined,
    isShadow: boolean,
    wasServed: boolean = isShadow,
  ): void {
    const pool = this.#poolOf(entry);
    if (isShadow) {
      const verdict = right === undefined ? "unjudged" : right ? "right" : "wrong";
      pool.shadow.wouldHit(similarity, verdict);
    }
    if (right === undefined) {
      this.#counts.unjudged++;
      return;
    }
    if (right) this.#counts.judgedRight++;
    else this.#counts.judgedWrong++;
    const { policy } = pool;
    if (policy?.mode !== "verified") {
      entry.evidence.add(similarity, right);
      pool.evidence.add(similarity, right);
      pool.precision.add(right);
      return;
    }
    const { errorRateMax, similarityMin } = policy;
    const labelled = { similarity, entry: entry.evidence, pool: pool.evidence, errorRateMax };
    const wouldServe = decide({ ...labelled, similarityMin }).kind === "serve";
    learn(labelled, right);
    if (wasServed || wouldServe) pool.precision.add(right);
  }

  // ---- memory ---------------------------------------------------------------------------------------------

  #scopeOf(name: string, dimension: number): Scope {
    let scope = this.#scopes.get(name);
    if (scope === undefined) {
      scope = {
        name,
        index: this.#makeIndex({ dimension, random: this.#random }),
        byId: new Map(),
        byText: new Map(),
        indexBytes: 0,
        entryBytes: 0,
      };
      this.#scopes.set(name, scope);
      this.#bytes += SCOPE_BYTES;
      this.#countIndex(scope);
    }
    return scope;
  }

  #countIndex(scope: Scope): void {
    const { bytes } = scope.index;
    this.#bytes += bytes - scope.indexBytes;
    scope.indexBytes = bytes;
  }

  #evict(): void {
    while (this.#bytes > this.#bytesMax) {
      const coldest = this.#order.coldest;
      if (coldest === null) return;
      this.#counts.semanticEvictions++;
      this.#drop(coldest);
    }
  }

  #drop(entry: Entry): void {
    const { scope } = entry;
    scope.index.remove(entry.id);
    scope.byId.delete(entry.id);
    if (scope.byText.get(entry.text) === entry) scope.byText.delete(entry.text);
    this.#entries.delete(entry.entryId);
    this.#order.remove(entry);
    this.#bytes -= entry.bytes;
    scope.entryBytes -= entry.bytes;
    this.#countIndex(scope);
    this.#forgetIfEmpty(scope);
  }

  #forgetIfEmpty(scope: Scope): void {
    if (scope.byId.size > 0 || this.#scopes.get(scope.name) !== scope) return;
    this.#scopes.delete(scope.name);
    this.#busy.delete(scope);
    this.#bytes -= SCOPE_BYTES + scope.indexBytes;
    scope.indexBytes = 0;
  }

  /** Drops all entries of a tenant, or all, with what was learnt from them; returns how many. */
  purge(tenant?: string): number {
    let dropped = 0;
    for (const entry of this.#entries.values()) {
      if (tenant !== undefined && entry.tenant !== tenant) continue;
      dropped++;
      this.#drop(entry);
    }
    for (const name of this.#pools.keys()) {
      if (tenant === undefined || name.startsWith(`${tenant}\n`)) this.#pools.delete(name);
    }
    return dropped;
  }

  /** For entries made from now on; a smaller bound drops what no longer fits at once. */
  configure(ttlMs: number, bytesMax: number): void {
    assert(ttlMs > 0 && bytesMax > 0, "both are positive");
    this.#ttlMs = ttlMs;
    this.#bytesMax = bytesMax;
    this.#evict();
  }

  /** Drops what has expired among the `entriesMax` used least recently. */
  sweep(nowMs: number, entriesMax: number): void {
    let entry = this.#order.coldest;
    for (let looked = 0; looked < entriesMax && entry !== null; looked++) {
      const next: Entry | null = entry.hotter;
      if (nowMs >= entry.expiresAtMs) {
        this.#counts.semanticExpired++;
        this.#drop(entry);
      }
      entry = next;
    }
  }

  /** One slice of work on indexes, some ms; true while there is more. */
  maintain(): boolean {
    for (const scope of this.#busy) {
      const isBusy = scope.index.maintain();
      this.#countIndex(scope);
      if (isBusy) break;
      this.#busy.delete(scope);
    }
    this.#evict();
    return this.#busy.size > 0;
  }

  // ---- spreading a scope over shards ------------------------------------------------------------------------

  /** Entries of a scope that are here, and their memory with their index. */
  sizeOf(name: string): { entries: number; bytes: number } {
    const scope = this.#scopes.get(name);
    if (scope === undefined) return { entries: 0, bytes: 0 };
    return { entries: scope.byId.size, bytes: scope.entryBytes + scope.indexBytes };
  }

  /** Ids of a scope's entries, oldest first; entries may come and go while it is walked through. */
  *idsOf(name: string): IterableIterator<string> {
    for (const { entryId } of this.#scopes.get(name)?.byId.values() ?? []) yield entryId;
  }

  /** A copy. */
  vectorOf(entryId: string): Float32Array | undefined {
    const entry = this.#entries.get(entryId);
    return entry?.scope.index.vectorOf(entry.id);
  }

  /** An entry as it moves to another shard; it stays here until it is released. */
  moved(entryId: string, nowMs: number): MovedEntry | undefined {
    const entry = this.#entries.get(entryId);
    const vector = this.vectorOf(entryId);
    if (entry === undefined || vector === undefined) return undefined;
    const { scope, tenant, model, text, answer, expiresAtMs, storedAtMs } = entry;
    const times = { ttlMs: expiresAtMs - nowMs, ageMs: nowMs - storedAtMs };
    const question = { entryId, scope: scope.name, tenant, model, text, vector, answer, ...times };
    return { question, evidence: entry.evidence.toData() };
  }

  /** It is on another shard now. False when it has been labelled since it was sent: then it is to be sent again. */
  release({ question: { entryId }, evidence }: MovedEntry): boolean {
    const entry = this.#entries.get(entryId);
    if (entry === undefined) return true;
    const { thousandths, labels, minSimilarity } = entry.evidence.toData();
    const isSame =
      labels === evidence.labels &&
      minSimilarity === evidence.minSimilarity &&
      thousandths.length === evidence.thousandths.length;
    if (isSame) this.#drop(entry);
    return isSame;
  }

  /** Memory that is needed beside the entries, more or (negative) less than before. */
  reserve(bytes: number): void {
    this.#bytes += bytes;
    this.#evict();
  }

  // ---- looking --------------------------------------------------------------------------------------------

  describe(): SemanticDescription {
    let switchedOff = 0;
    for (const { precision } of this.#pools.values()) if (precision.state === "off") switchedOff++;
    return {
      scopes: this.#scopes.size,
      questions: this.#entries.size,
      semanticBytes: this.#bytes,
      switchedOff,
      ...this.#counts,
    };
  }

  /** What judging has shown of a tenant's hits, by model: a shadow period, and whether hits are only judged now. */
  judged(tenant: string): JudgedPool[] {
    const found: JudgedPool[] = [];
    for (const [name, { precision, shadow }] of this.#pools) {
      const [owner = "", model = ""] = name.split("\n");
      if (owner !== tenant) continue;
      found.push({ tenant, model, state: precision.state, shadow: shadow.summary() });
    }
    return found;
  }

  /** Entries of a tenant: those used last, or with a question the most similar of the 5000 used last. */
  inspect({ tenant, count, scope = "", question }: Inspection, nowMs: number): InspectedEntry[] {
    const features = question === undefined ? undefined : guardFeatures(question.text);
    const most = question === undefined ? count : COMPARED_MAX;
    const found: { entry: Entry; similarity: number | undefined }[] = [];
    for (let entry = this.#order.hottest; entry !== null; entry = entry.colder) {
      if (found.length >= most) break;
      if (entry.tenant !== tenant || !entry.scope.name.startsWith(scope)) continue;
      found.push({ entry, similarity: similarityOf(entry, question?.vector) });
    }
    if (question !== undefined)
      found.sort((left, right) => (right.similarity ?? -1) - (left.similarity ?? -1));
    return found.slice(0, count).map(({ entry, similarity }) => ({
      ...inspected(entry, nowMs),
      ...(question === undefined || features === undefined
        ? {}
        : { compared: this.#compare(entry, similarity, features, question.policy) }),
    }));
  }

  #compare(
    entry: Entry,
    similarity: number | undefined,
    features: GuardFeatures,
    policy: SemanticPolicy,
  ): Comparison {
    entry.features ??= guardFeatures(entry.text);
    const asked = policy.isStrict ? strictGuards : standardGuards;
    const guards = [...guardBlocks(features, entry.features, asked)];
    if (similarity === undefined)
      return { guards, kind: "miss", says: "the text has no vector to compare with this one's" };
    const compared = { similarity, guards };
    if (similarity < policy.similarityMin) {
      const says = `similarity ${similarity.toFixed(4)} < ${policy.similarityMin}`;
      return { ...compared, kind: "miss", says };
    }
    const [block] = guards;
    if (block !== undefined) return { ...compared, kind: "miss", says: `guard: ${block.guard}` };
    return { ...compared, ...this.#decide(entry, similarity, policy, this.#poolOf(entry)) };
  }

  /** 96 random bits behind the scope's bucket, so that whoever has the id finds the shard. */
  #newId(scope: string): string {
    const part = (): string =>
      Math.floor(this.#random() * 4_294_967_296)
        .toString(16)
        .padStart(8, "0");
    return `${scope.slice(0, 3)}${part()}${part()}${part()}`;
  }
}

/**
 * The first of the best three that may be served or explored. Of two of the same similarity the newer one is better; an
 * entry that moves may be told of twice, and then what speaks against it counts.
 */
function firstOf(candidates: readonly Candidate[], similarityMin: number): Matched {
  const byId = new Map<string, Candidate>();
  for (const candidate of candidates) {
    const other = byId.get(candidate.entryId);
    if (other === undefined || candidate.verdict.kind === "blocked")
      byId.set(candidate.entryId, candidate);
  }
  const best = [...byId.values()].sort((a, b) => b.similarity - a.similarity || a.ageMs - b.ageMs);
  for (const { verdict, ...facts } of best.slice(0, NEIGHBOURS)) {
    switch (verdict.kind) {
      case "serve":
        return { kind: "hit", ...facts, answer: verdict.answer };
      case "explore": {
        const { entryId, similarity, says } = facts;
        return { kind: "explore", entryId, similarity, says };
      }
      case "blocked":
        continue;
      default:
        return unreachable(verdict);
    }
  }
  const says = best.slice(0, NEIGHBOURS).at(-1)?.says;
  return { kind: "miss", says: says ?? `nothing is as similar as ${similarityMin}` };
}

function inspected(entry: Entry, nowMs: number): InspectedEntry {
  const { entryId, scope, model, text, storedAtMs, expiresAtMs, answer, evidence } = entry;
  return {
    entryId,
    scope: scope.name,
    model,
    question: text,
    ageMs: nowMs - storedAtMs,
    expiresInMs: expiresAtMs - nowMs,
    answerBytes: answer.bytes,
    labels: evidence.labels,
    similarityMin: evidence.minSimilarity,
  };
}

function similarityOf({ scope, id }: Entry, vector: Float32Array | undefined): number | undefined {
  const own = scope.index.vectorOf(id);
  if (vector === undefined || own?.length !== vector.length) return undefined;
  let sum = 0;
  for (let at = 0; at < own.length; at++) sum += (own[at] ?? 0) * (vector[at] ?? 0);
  return sum;
}
