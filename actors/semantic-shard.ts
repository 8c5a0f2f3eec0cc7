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
 */
import { assert } from "../runtime/actor.ts";
import { type JudgeName, sameAnswer } from "./answer-judge.ts";
import {
  PrecisionSwitch,
  ShadowStats,
  type ShadowSummary,
  type SwitchState,
} from "./judged-precision.ts";
import { LruList, type LruNode } from "./lru-list.ts";
import {
  type GuardFeatures,
  type GuardName,
  guardAgainst,
  guardFeatures,
  standardGuards,
  strictGuards,
} from "./match-guards.ts";
import type { SemanticPolicy, StoredAnswer, StoredQuestion } from "./protocol.ts";
import { ExactIndex } from "./vector-index.ts";
import { decide, EntryEvidence, EvidencePool } from "./verified-mode.ts";

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
};

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
  question: string;
  ageMs: number;
  expiresInMs: number;
  answerBytes: number;
  labels: number;
  similarityMin: number;
  /** Where a text was given to compare with. */
  similarity?: number;
  /** The guard that keeps it from answering that text. */
  blocked?: string;
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
  readonly evidence: EntryEvidence;
  /** Read when it is first a candidate. */
  features: GuardFeatures | undefined;
}

type Scope = {
  readonly name: string;
  readonly index: ExactIndex;
  readonly byId: Map<number, Entry>;
  /** One entry per wording: the newest answer. */
  readonly byText: Map<string, Entry>;
  /** As last counted in the shard's bytes. */
  indexBytes: number;
};

/** What is learnt over all entries of a tenant and model. */
type Pool = {
  readonly evidence: EvidencePool;
  readonly precision: PrecisionSwitch;
  readonly shadow: ShadowStats;
};

/** Candidates that are looked at, best first (the article's KNN 3). */
export const NEIGHBOURS = 3;
/**
 * Beside question, answer and vector: the entry, its places in three tables and a list, its evidence. Measured on
 * Node 20 with 100,000 entries.
 */
const ENTRY_BYTES = 900;
const SCOPE_BYTES = 1200;
/** Entries found wrong whose ids are remembered. */
const REMOVED_MAX = 10_000;
/** Pools of tenants and models; the one that was made first is forgotten, and learnt anew. */
const POOLS_MAX = 10_000;

export class SemanticShard {
  readonly #options: SemanticOptions;
  readonly #random: () => number;
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

  /** How often each guard kept a candidate from being served. */
  get guardBlocks(): Readonly<Partial<Record<GuardName, number>>> {
    return this.#guardBlocks;
  }

  // ---- matching -------------------------------------------------------------------------------------------

  match(question: Question, nowMs: number): Matched {
    const matched = this.#match(question, nowMs);
    if (matched.kind === "hit") this.#counts.semanticHits++;
    else if (matched.kind === "explore") this.#counts.explorations++;
    else {
      this.#counts.semanticMisses++;
      if (question.policy.mode === "shadow") this.#poolOf(question).shadow.miss();
    }
    return matched;
  }

  #match({ scope: name, tenant, model, text, vector, policy }: Question, nowMs: number): Matched {
    const scope = this.#scopes.get(name);
    if (scope === undefined) return { kind: "miss", says: "nothing is stored in its scope" };
    let says = `nothing is as similar as ${policy.similarityMin}`;
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
      if (block !== undefined) {
        this.#guardBlocks[block.guard] = (this.#guardBlocks[block.guard] ?? 0) + 1;
        says = `guard: ${block.guard}, at similarity ${similarity.toFixed(3)}`;
        continue;
      }
      const decided = this.#decide(entry, similarity, policy, this.#poolOf({ tenant, model }));
      if (decided.kind === "miss") {
        says = decided.says;
        continue;
      }
      this.#order.touch(entry);
      const { entryId, answer } = entry;
      if (decided.kind === "explore") {
        return { kind: "explore", entryId, similarity, says: decided.says };
      }
      const ageMs = nowMs - entry.storedAtMs;
      return { kind: "hit", entryId, similarity, answer, ageMs, says: decided.says };
    }
    return { kind: "miss", says };
  }

  #decide(
    entry: Entry,
    similarity: number,
    { mode, similarityMin, errorRateMax }: SemanticPolicy,
    pool: Pool,
  ): { kind: "serve" | "explore" | "miss"; says: string } {
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
    };
    this.#pools.set(name, pool);
    return pool;
  }

  // ---- learning -------------------------------------------------------------------------------------------

  /**
   * A question and the model's answer to it. Where an entry was passed over for it, that entry is labelled first; found
   * right, it stands for this wording too, and nothing is stored.
   *
   * The new entry for the shared store, or undefined where none was made.
   */
  learn(
    question: Omit<Question, "policy">,
    answer: StoredAnswer,
    explored: Explored | undefined,
    isShadow: boolean,
    nowMs: number,
  ): StoredQuestion | undefined {
    if (explored !== undefined) {
      const entry = this.#entries.get(explored.entryId);
      if (entry !== undefined) {
        const right = sameAnswer(entry.answer.body, answer.body, this.#options.judge);
        this.#label(entry, explored.similarity, right, isShadow);
        if (right === true) return undefined;
      }
    }
    const { scope, tenant, model, text, vector } = question;
    const made: StoredQuestion = {
      entryId: this.#newId(scope),
      scope,
      tenant,
      model,
      text,
      vector,
      answer,
      ttlMs: this.#ttlMs,
      ageMs: 0,
    };
    return this.adopt(made, nowMs) ? made : undefined;
  }

  /** An entry from the shared store, or from another shard. False when it is not taken. */
  adopt(stored: StoredQuestion, nowMs: number): boolean {
    const { entryId, scope: name, text, vector, answer, ttlMs, ageMs } = stored;
    if (ttlMs <= 0 || this.#removedIds.has(entryId) || this.#entries.has(entryId)) return false;
    const answerBytes = Math.max(answer.bytes, answer.body.byteLength);
    const bytes = ENTRY_BYTES + 2 * text.length + answerBytes;
    const bytesMost = this.#bytesMax / 8; // So that one never drives out all others.
    if (answerBytes > this.#options.answerBytesMax || bytes > bytesMost) {
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
      evidence: new EntryEvidence(),
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
    if (before !== undefined) this.#drop(before);
    this.#countIndex(scope);
    this.#counts.learnt++;
    this.#evict();
    return this.#entries.has(entryId);
  }

  /** A node was asked again where that entry had been served: was it right? Labels only. */
  judge({ entryId, similarity }: Explored, answer: StoredAnswer): void {
    const entry = this.#entries.get(entryId);
    if (entry === undefined) return;
    const right = sameAnswer(entry.answer.body, answer.body, this.#options.judge);
    this.#label(entry, similarity, right, false);
  }

  /** A label from outside: a caller's complaint, or praise. False for an id that is not here. */
  feedback(entryId: string, tenant: string, isRight: boolean): boolean {
    const entry = this.#entries.get(entryId);
    if (entry === undefined || entry.tenant !== tenant) return false;
    this.#label(entry, 1, isRight, false);
    if (!isRight) this.remove(entryId);
    return true;
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

  #label(entry: Entry, similarity: number, right: boolean | undefined, isShadow: boolean): void {
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
    entry.evidence.add(similarity, right);
    pool.evidence.add(similarity, right);
    pool.precision.add(right);
  }

  // ---- memory ---------------------------------------------------------------------------------------------

  #scopeOf(name: string, dimension: number): Scope {
    let scope = this.#scopes.get(name);
    if (scope === undefined) {
      scope = {
        name,
        index: new ExactIndex({ dimension, random: this.#random }),
        byId: new Map(),
        byText: new Map(),
        indexBytes: 0,
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

  /** What a shadow period has shown, by tenant and model, and where hits are only judged. */
  judged(): JudgedPool[] {
    return [...this.#pools].map(([name, { precision, shadow }]) => {
      const [tenant = "", model = ""] = name.split("\n");
      return { tenant, model, state: precision.state, shadow: shadow.summary() };
    });
  }

  /** Entries of a tenant, newest used first, at most `count`; with a question, how they compare with it. */
  inspect(
    tenant: string,
    count: number,
    nowMs: number,
    question?: { text: string; vector: Float32Array },
  ): InspectedEntry[] {
    const features = question === undefined ? undefined : guardFeatures(question.text);
    const found: InspectedEntry[] = [];
    for (let entry = this.#order.hottest; entry !== null && found.length < count; ) {
      if (entry.tenant === tenant) found.push(inspected(entry, nowMs, question?.vector, features));
      entry = entry.colder;
    }
    return found;
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

function inspected(
  entry: Entry,
  nowMs: number,
  vector: Float32Array | undefined,
  features: GuardFeatures | undefined,
): InspectedEntry {
  const { entryId, text, storedAtMs, expiresAtMs, answer, evidence } = entry;
  const seen: InspectedEntry = {
    entryId,
    question: text,
    ageMs: nowMs - storedAtMs,
    expiresInMs: expiresAtMs - nowMs,
    answerBytes: answer.bytes,
    labels: evidence.labels,
    similarityMin: evidence.minSimilarity,
  };
  if (vector === undefined || features === undefined) return seen;
  const own = entry.scope.index.vectorOf(entry.id);
  if (own?.length === vector.length) {
    seen.similarity = own.reduce((sum, value, at) => sum + value * (vector[at] ?? 0), 0);
  }
  entry.features ??= guardFeatures(text);
  const block = guardAgainst(features, entry.features);
  if (block !== undefined) seen.blocked = `${block.guard}: ${block.says}`;
  return seen;
}
