/**
 * Scopes that have outgrown one cache shard: which shards hold what of them, and how their entries get there.
 *
 * Every scope has a home, the shard that its name leads to; all questions of the scope come there, and so does whatever
 * is said of an entry by its id, which begins like the scope's name. At home a scope goes through
 *
 *   whole ──more than `entriesMax`, or half the shard's memory──▶ training ──centroids──▶ spread
 *     ▲                                                              │                      │ no entry left anywhere
 *     └──────────────────────────────────────────────────────────────┴──────────────────────┘
 *
 * Whole and training, all entries are here. Spread, the scope has a map: frozen centroids, and a shard for each of their
 * buckets. New entries go to the owner of their bucket. Matches ask the owners that probing names (all, where there are
 * few), and besides every shard that may hold entries it does not own. A shard that holds some of a scope, its part, is
 *
 *   moving ──a pass over its entries found none that another owns──▶ settled ──a newer map──▶ moving
 *
 * Moving, it sends slices of entries to their owners, and drops what an owner says it has. The rules that let no match
 * miss an entry on its way, in whatever order mail arrives:
 *   - an entry stays with the old owner for the time of one match after the new one has said that it has it: a match that
 *     was too early for the new owner is in time for the old one;
 *   - the newer map wins wherever two meet, and nothing is taken by an older one than the taker's;
 *   - after a new map every shard counts as moving, until it says that it is settled by that map.
 *
 * Nothing here is kept anywhere else. A shard that crashes loses its part: misses, until the store gives it back. A home
 * that crashes forgets the map too; each holder tells the home of its parts once a second, from which the home has the
 * map back, asks every shard until all have settled by it, and asks the store for the scope's bucket again.
 *
 * Probing may lose hits. A small share of its misses is looked at again by asking all (probing-audit.ts). Training and
 * moving go in slices, one per timer, of at most `SLICE_ENTRIES` entries or one step of the training.
 *
 * It decides nothing about answers: what may be served is judged where the entry lies (semantic-shard.ts). Rejected: a
 * map per entry (memory for what a hash says), and moving at once (a block of seconds).
 */
import {
  type ActorRef,
  type AskOutcome,
  assert,
  type Context,
  type ReplyTo,
  unreachable,
} from "../runtime/actor.ts";
import { CENTROIDS, type Centroids, CentroidTraining, PROBING_Z } from "./centroids.ts";
import type { StoreCommand } from "./edges.ts";
import { ProbingAudit, type RecallEstimate } from "./probing-audit.ts";
import type { StoredAnswer, StoredQuestion } from "./protocol.ts";
import type {
  Candidate,
  Explored,
  Label,
  Labelled,
  Matched,
  MovedEntry,
  Question,
  SemanticShard,
} from "./semantic-shard.ts";

/** Who holds what of a scope; never changed, only replaced. */
export type SplitMap = {
  readonly scope: string;
  /** From 1; grows with every change of owners. */
  readonly epoch: number;
  readonly centroids: Centroids;
  /** Shard of each bucket. */
  readonly owners: readonly number[];
};

/** What shards say to each other about scopes that are spread, and `give_bucket`, which anyone may. */
export type SplitCommand =
  /** What the shard holds for a question. */
  | { kind: "cache.candidates"; question: Question; replyTo: ReplyTo<Candidate[]> }
  /** Its entry was served, or explored. */
  | { kind: "cache.touch"; entryId: string }
  /** Entries for their owner: new ones (`isNew`, which the store is told of), or from the store. */
  | { kind: "cache.keep"; map: SplitMap; questions: StoredQuestion[]; isNew: boolean }
  /** To a scope's home: these buckets have another owner from now on. Answered when all entries have moved. */
  | {
      kind: "cache.give_bucket";
      scope: string;
      buckets: readonly number[];
      to: number;
      replyTo: ReplyTo<BucketGiven>;
    }
  /** To an owner: entries of its buckets. */
  | {
      kind: "cache.take_bucket";
      map: SplitMap;
      entries: MovedEntry[];
      replyTo: ReplyTo<BucketTaken>;
    }
  /** From the home: the map now. Answered by `cache.part`. */
  | { kind: "cache.map"; map: SplitMap }
  /** To the home: what a shard holds of its scope, and by which map; said after every change, and once a second. */
  | { kind: "cache.part"; map: SplitMap; part: PartReport }
  | { kind: "cache.label"; entryId: string; label: Label; replyTo: ReplyTo<Labelled> }
  /** It was found wrong: gone for good, wherever a copy is. */
  | { kind: "cache.bury"; entryId: string };

/** All have moved; or why they will not. */
export type BucketGiven = { ok: true } | { ok: false; says: string };
/** `newer`: nothing was taken, the entries may belong elsewhere. */
export type BucketTaken = { kind: "taken" } | { kind: "newer"; map: SplitMap };
/** What a shard holds of a scope. */
export type PartReport = {
  shard: number;
  /** Start of the shard that says so: another one means that it has crashed since. */
  bornAtMs: number;
  entries: number;
  isSettled: boolean;
};

type SplitDue = { kind: "cache.split_due" };
type CandidatesCame = {
  kind: "cache.candidates_came";
  serial: number;
  shard: number;
  outcome: AskOutcome<Candidate[]>;
};
type Taken = {
  kind: "cache.bucket_taken";
  map: SplitMap;
  entries: MovedEntry[];
  outcome: AskOutcome<BucketTaken>;
};
type LabelCame = { kind: "cache.label_came"; serial: number; outcome: AskOutcome<Labelled> };
/** All that `ScopeSplits` is to be given, its own timers and outcomes included. */
export type SplitMessage = SplitCommand | SplitDue | CandidatesCame | Taken | LabelCame;

export type SplitOptions = {
  /** Entries of a scope that one shard holds, 1…; one more and the scope is spread. */
  entriesMax: number;
  /** Buckets of a scope, a multiple of 4; fewer where there are not 8 entries for each, or no memory. */
  buckets: number;
  /** A scope of at most so many owners is asked for everywhere, and no hit is lost; of more, probing says where. */
  askAllUpTo: number;
  /** A shard that has not said by then what it holds for a match is left out, ms > 0. */
  probeMs: number;
  /** Of the misses of probing, the share that is looked at again, 0 to 1. */
  auditShare: number;
};

/** Bounds and shares as in [semantic-cache reference, sections 1 and 5]. */
export const splitDefaults: Readonly<SplitOptions> = {
  entriesMax: 25_000,
  buckets: CENTROIDS,
  askAllUpTo: 4,
  probeMs: 15,
  auditShare: 0.005,
};

/** Figures now, then counts since the start; of the scopes whose home this shard is, but for `movedEntries`. */
export type SplitDescription = {
  /** Scopes that are spread. */
  splitScopes: number;
  /** Parts of scopes on this shard that are moving. */
  movingParts: number;
  /** Entries that went to another shard. */
  movedEntries: number;
  /** Matches in spread scopes, and the shards that were asked for them, this one included. */
  splitMatches: number;
  shardsAsked: number;
  /** Asks of a shard without a reply in time: a miss as far as that shard goes. */
  probesLate: number;
  /** Misses of probing that were looked at again, and those of them that were due to sharding. */
  probingAudits: number;
  probingLost: number;
  /** Messages refused because a bound was reached. */
  splitOverflows: number;
  splits: SplitFacts[];
};

/** One spread scope. */
export type SplitFacts = {
  scope: string;
  buckets: number;
  epoch: number;
  /** Shards that may hold entries they do not own. */
  moving: number;
  z: number;
  recall: RecallEstimate;
};

/** Rare things, as events. */
export type SplitEvent = {
  kind: "cache.scope_spread";
  scope: string;
  epoch: number;
  buckets: number;
};

/** At home, a scope that is not whole. */
type Home = Training | Spread;
type Training = {
  readonly state: "training";
  /** Absent until the first slice. */
  training: CentroidTraining | undefined;
  readonly count: number;
  readonly bytes: number;
};
type Spread = {
  readonly state: "spread";
  readonly map: SplitMap;
  readonly ownerSet: ReadonlySet<number>;
  /** Shards that may hold what they do not own. */
  readonly movers: Set<number>;
  readonly audit: ProbingAudit;
  /** When a holder was last heard of. */
  readonly heard: Map<number, { bornAtMs: number; atMs: number }>;
  /** Told when all have settled. */
  readonly waiting: ReplyTo<BucketGiven>[];
  /** Since then nobody holds anything. */
  emptySinceMs: number | undefined;
};

/** What this shard holds of a spread scope. */
type Part = {
  readonly map: SplitMap;
  /** The pass over its entries; absent when settled. */
  pass: Iterator<string> | undefined;
  /** Asks that have no outcome yet; nothing more is sent before. */
  underWay: number;
  /** What others have taken, but may not yet have had when a match came that is still to come here. */
  leaving: { entries: MovedEntry[]; untilMs: number }[];
  /** Something did not arrive: one more pass. */
  isIncomplete: boolean;
  restUntilMs: number;
  usedAtMs: number;
};

/** A match that waits for other shards, or the second look at one. */
type Gather = {
  readonly question: Question;
  readonly found: { shard: number; candidate: Candidate }[];
  waiting: number;
  isLate: boolean;
  readonly audit: ProbingAudit;
  readonly then:
    | { kind: "match"; replyTo: ReplyTo<Matched>; unasked: readonly number[] }
    | { kind: "audit" };
};

/** What to do once it is known what an entry's label says. */
type AfterLabel =
  | { kind: "learn"; question: Omit<Question, "policy">; answer: StoredAnswer }
  | { kind: "feedback"; entryId: string; replyTo: ReplyTo<{ known: boolean }> }
  | { kind: "nothing" };
type Labelling = { waiting: number; said: Labelled; readonly then: AfterLabel };

/** Between two slices: requests go first. */
const SLICE_MS = 20;
/** Entries that one slice of moving looks at, some 15 µs each, and another shard takes in, some 20 µs. */
export const SLICE_ENTRIES = 128;
/** Vectors that centroids are trained on, at most: more make them no better. */
const TRAINING_VECTORS_MAX = 20_000;
/** Fewer say nothing of a cell. */
const VECTORS_PER_BUCKET_MIN = 8;
const BUCKETS_MIN = 8;
/** Of the shard's memory, the most for training or centroids of one scope: 1/8. */
const MEMORY_SHARE = 8;
/** Scopes that this shard spreads at most; what is more stays whole. */
const HOMES_MAX = 32;
const Z_MIN = 3;
/** √384: beyond it every cell is probed. */
const Z_MAX = 20;
const TAKE_MS = 1000;
const LABEL_MS = 1000;
/** After an owner did not take what it was sent. */
const REST_MS = 1000;
/** A part without entries is remembered so long, as is a spread scope. */
const LINGER_MS = 10_000;
/** Three times what a holder lets pass between two reports. */
const SILENT_MS = 3000;
const GATHERS_MAX = 4096;
const LABELLINGS_MAX = 4096;
const WAITING_MAX = 256;
/** What is moving while a purge goes round is refused: older than the purge plus the time that mail may take. */
const PURGE_MARGIN_MS = 1000;
const PURGE_REMEMBERED_MS = 5000;
const PURGED_TENANTS_MAX = 1000;

/** One shard's share in the scopes that are spread; owns maps, parts and matches that wait. */
export class ScopeSplits {
  readonly #options: SplitOptions;
  readonly #semantic: SemanticShard;
  readonly #shard: number;
  readonly #shards: readonly ActorRef<SplitCommand>[];
  readonly #store: ActorRef<StoreCommand> | undefined;
  readonly #random: () => number;
  readonly #recallAgain: (scope: string) => void;
  readonly #bornAtMs: number;
  readonly #homes = new Map<string, Home>();
  readonly #parts = new Map<string, Part>();
  /** Scopes with a training or a moving part here; one slice each in turn. */
  readonly #work = new Set<string>();
  readonly #gathers = new Map<number, Gather>();
  readonly #labellings = new Map<number, Labelling>();
  /** Tenants purged a moment ago; "" is everyone. */
  readonly #purgedAtMs = new Map<string, number>();
  #serial = 0;
  #isArmed = false;
  readonly #counts = {
    movedEntries: 0,
    splitMatches: 0,
    shardsAsked: 0,
    probesLate: 0,
    probingAudits: 0,
    probingLost: 0,
    splitOverflows: 0,
  };

  /**
   * `shards`: all of them, this one is number `shard`; with one, nothing is ever spread. `recallAgain`: entries of that
   * scope are to be had from the store again.
   */
  constructor(options: {
    split: SplitOptions;
    semantic: SemanticShard;
    shard: number;
    shards: readonly ActorRef<SplitCommand>[];
    store: ActorRef<StoreCommand> | undefined;
    random: () => number;
    bornAtMs: number;
    recallAgain: (scope: string) => void;
  }) {
    const { split } = options;
    assert(split.entriesMax >= 1, "entriesMax must be at least 1");
    assert(split.buckets >= BUCKETS_MIN && split.buckets % 4 === 0, "buckets go in fours");
    assert(split.probeMs > 0, "probeMs must be positive");
    this.#options = split;
    this.#semantic = options.semantic;
    this.#shard = options.shard;
    this.#shards = options.shards;
    this.#store = options.store;
    this.#random = options.random;
    this.#bornAtMs = options.bornAtMs;
    this.#recallAgain = options.recallAgain;
  }

  /** Whether `sweep` is to come again although no entry is here. */
  get isBusy(): boolean {
    return this.#homes.size > 0 || this.#parts.size > 0;
  }

  receive(message: SplitMessage, context: Context<SplitMessage>): void {
    switch (message.kind) {
      case "cache.candidates": {
        const { question, replyTo } = message;
        return context.reply(replyTo, this.#semantic.candidates(question, context.nowMs));
      }
      case "cache.touch":
        return this.#semantic.touch(message.entryId);
      case "cache.keep":
        this.#see(message.map, context);
        for (const question of message.questions) this.#keep(question, message.isNew, context);
        return;
      case "cache.give_bucket":
        return this.#onGiveBucket(message, context);
      case "cache.take_bucket":
        return context.reply(message.replyTo, this.#take(message.map, message.entries, context));
      case "cache.map":
        return this.#report(this.#see(message.map, context), context);
      case "cache.part":
        return this.#onPart(message.map, message.part, context);
      case "cache.label":
        return context.reply(message.replyTo, this.#label(message.entryId, message.label, context));
      case "cache.bury":
        return this.#semantic.remove(message.entryId);
      case "cache.split_due":
        return this.#onSplitDue(context);
      case "cache.candidates_came":
        return this.#onCandidatesCame(message, context);
      case "cache.bucket_taken":
        return this.#onBucketTaken(message, context);
      case "cache.label_came":
        return this.#onLabelCame(message, context);
      default:
        return unreachable(message);
    }
  }

  // ---- matching, at home ------------------------------------------------------------------------------------

  match(question: Question, replyTo: ReplyTo<Matched>, context: Context<SplitMessage>): void {
    const home = this.#homes.get(question.scope);
    if (home?.state !== "spread")
      return context.reply(replyTo, this.#semantic.match(question, context.nowMs));
    const { asked, unasked } = this.#toAsk(home, question);
    this.#counts.splitMatches++;
    this.#counts.shardsAsked += asked.length;
    this.#gather(question, asked, home.audit, { kind: "match", replyTo, unasked }, context);
  }

  /** The shards to ask about a question, and those that may hold something of the scope besides. */
  #toAsk({ map, ownerSet, movers, audit }: Spread, { vector, policy }: Question) {
    const all = new Set([...ownerSet, ...movers]);
    if (ownerSet.size <= this.#options.askAllUpTo) return { asked: [...all], unasked: [] };
    const ownerOf = (bucket: number): number => map.owners[bucket] ?? this.#shard;
    const near = map.centroids.owners(vector, policy.similarityMin, audit.z, ownerOf);
    const asked = new Set([...near, ...movers]);
    return { asked: [...asked], unasked: [...all].filter((shard) => !asked.has(shard)) };
  }

  #gather(
    question: Question,
    asked: readonly number[],
    audit: ProbingAudit,
    then: Gather["then"],
    context: Context<SplitMessage>,
  ): void {
    const gather: Gather = { question, found: [], waiting: 0, isLate: false, audit, then };
    const isFull = this.#gathers.size >= GATHERS_MAX;
    if (isFull) this.#counts.splitOverflows++;
    const serial = ++this.#serial;
    for (const shard of asked) {
      const to = this.#shards[shard];
      if (shard === this.#shard) {
        for (const candidate of this.#semantic.candidates(question, context.nowMs))
          gather.found.push({ shard, candidate });
      } else if (isFull || to === undefined) {
        gather.isLate = true;
      } else {
        gather.waiting++;
        context.ask<SplitCommand, Candidate[]>(
          to,
          this.#options.probeMs,
          (replyTo) => ({ kind: "cache.candidates", question, replyTo }),
          (outcome) => ({ kind: "cache.candidates_came", serial, shard, outcome }),
        );
      }
    }
    if (gather.waiting === 0) return this.#conclude(gather, context);
    this.#gathers.set(serial, gather);
  }

  #onCandidatesCame(
    { serial, shard, outcome }: CandidatesCame,
    context: Context<SplitMessage>,
  ): void {
    const gather = this.#gathers.get(serial);
    assert(gather !== undefined, "a gathering stays until all its asks have an outcome");
    gather.waiting--;
    if (outcome.ok) {
      for (const candidate of outcome.value) gather.found.push({ shard, candidate });
    } else {
      this.#counts.probesLate++;
      gather.isLate = true;
    }
    if (gather.waiting > 0) return;
    this.#gathers.delete(serial);
    this.#conclude(gather, context);
  }

  #conclude(
    { question, found, isLate, audit, then }: Gather,
    context: Context<SplitMessage>,
  ): void {
    if (then.kind === "audit") {
      const isLost = found.some(({ candidate }) => candidate.verdict.kind !== "blocked");
      if (!isLost && isLate) return audit.record("miss"); // Not everyone has said so.
      this.#counts.probingAudits++;
      if (isLost) this.#counts.probingLost++;
      return audit.record(isLost ? "lost" : "confirmed");
    }
    const candidates = found.map(({ candidate }) => candidate);
    const matched = this.#semantic.conclude(question, candidates);
    context.reply(then.replyTo, matched);
    if (matched.kind !== "miss") {
      const { entryId } = matched;
      for (const shard of new Set(
        found.flatMap(({ shard: at, candidate }) => (candidate.entryId === entryId ? [at] : [])),
      ))
        this.#tell(shard, { kind: "cache.touch", entryId }, context);
    }
    if (then.unasked.length === 0) return; // Nothing could be lost.
    if (matched.kind !== "miss") return audit.record("hit");
    if (!audit.wantsAudit(this.#random())) return audit.record("miss");
    this.#gather(question, then.unasked, audit, { kind: "audit" }, context);
  }

  // ---- learning, at home ------------------------------------------------------------------------------------

  /** A question and what a node answered; `explored`, judged first, was passed over for it. */
  learn(
    question: Omit<Question, "policy">,
    answer: StoredAnswer,
    explored: Explored | undefined,
    isShadow: boolean,
    context: Context<SplitMessage>,
  ): void {
    const then: AfterLabel = { kind: "learn", question, answer };
    if (explored === undefined) return this.#afterLabel(then, { known: false }, context);
    const { entryId, similarity } = explored;
    const label: Label = { kind: "answer", similarity, answer, isShadow, wasServed: false };
    this.#labelAnywhere(entryId, label, then, context);
  }

  /** A node was asked again where that entry had been served. */
  judge({ entryId, similarity }: Explored, answer: StoredAnswer, context: Context<SplitMessage>) {
    const facts = { similarity, isShadow: false, wasServed: true };
    const label: Label = { kind: "answer", answer, ...facts };
    this.#labelAnywhere(entryId, label, { kind: "nothing" }, context);
  }

  feedback(
    entryId: string,
    tenant: string,
    isRight: boolean,
    replyTo: ReplyTo<{ known: boolean }>,
    context: Context<SplitMessage>,
  ): void {
    const label: Label = { kind: "feedback", tenant, isRight };
    this.#labelAnywhere(entryId, label, { kind: "feedback", entryId, replyTo }, context);
  }

  /** Entries from the store: each to its owner. */
  adopt(questions: readonly StoredQuestion[], context: Context<SplitMessage>): void {
    const away = new Map<string, { map: SplitMap; to: number; questions: StoredQuestion[] }>();
    for (const question of questions) {
      const home = this.#homes.get(question.scope);
      const to = home?.state === "spread" ? this.#ownerOf(home.map, question.vector) : this.#shard;
      if (home?.state !== "spread" || to === this.#shard) {
        this.#keep(question, false, context);
        continue;
      }
      const name = `${to} ${question.scope}`;
      const group = away.get(name) ?? { map: home.map, to, questions: [] };
      group.questions.push(question);
      away.set(name, group);
    }
    for (const { map, to, questions: ofOwner } of away.values())
      this.#tell(to, { kind: "cache.keep", map, questions: ofOwner, isNew: false }, context);
  }

  /** The entry is here, or on whatever shard holds some of a scope of ours: then all others are asked. */
  #labelAnywhere(
    entryId: string,
    label: Label,
    then: AfterLabel,
    context: Context<SplitMessage>,
  ): void {
    const said = this.#label(entryId, label, context);
    if (said.known || this.#homes.size === 0) return this.#afterLabel(then, said, context);
    if (this.#labellings.size >= LABELLINGS_MAX) {
      this.#counts.splitOverflows++;
      return this.#afterLabel(then, said, context);
    }
    const serial = ++this.#serial;
    const labelling: Labelling = { waiting: 0, said, then };
    for (const [shard, to] of this.#shards.entries()) {
      if (shard === this.#shard) continue;
      labelling.waiting++;
      context.ask<SplitCommand, Labelled>(
        to,
        LABEL_MS,
        (replyTo) => ({ kind: "cache.label", entryId, label, replyTo }),
        (outcome) => ({ kind: "cache.label_came", serial, outcome }),
      );
    }
    if (labelling.waiting === 0) return this.#afterLabel(then, said, context);
    this.#labellings.set(serial, labelling);
  }

  #onLabelCame({ serial, outcome }: LabelCame, context: Context<SplitMessage>): void {
    const labelling = this.#labellings.get(serial);
    assert(labelling !== undefined, "a labelling stays until all its asks have an outcome");
    labelling.waiting--;
    if (outcome.ok && outcome.value.known) labelling.said = outcome.value;
    if (labelling.waiting > 0) return;
    this.#labellings.delete(serial);
    this.#afterLabel(labelling.then, labelling.said, context);
  }

  #afterLabel(then: AfterLabel, said: Labelled, context: Context<SplitMessage>): void {
    switch (then.kind) {
      case "learn": {
        if (said.right === true) return; // The entry stands for this wording too.
        const made = this.#semantic.make(then.question, then.answer);
        const home = this.#homes.get(made.scope);
        const to = home?.state === "spread" ? this.#ownerOf(home.map, made.vector) : this.#shard;
        if (home?.state !== "spread" || to === this.#shard) this.#keep(made, true, context);
        else {
          const { map } = home;
          this.#tell(to, { kind: "cache.keep", map, questions: [made], isNew: true }, context);
        }
        return;
      }
      case "feedback": {
        const { entryId } = then;
        context.reply(then.replyTo, { known: said.known });
        if (!said.known || said.right !== false || this.#homes.size === 0) return;
        for (const shard of this.#shards.keys())
          this.#tell(shard, { kind: "cache.bury", entryId }, context);
        return;
      }
      case "nothing":
        return;
      default:
        return unreachable(then);
    }
  }

  #label(entryId: string, label: Label, context: Context<SplitMessage>): Labelled {
    const scope = this.#semantic.scopeOf(entryId);
    const said = this.#semantic.label(entryId, label);
    const isGone = label.kind === "feedback" && said.known && !label.isRight;
    if (isGone && scope !== undefined && this.#store !== undefined)
      context.tell(this.#store, { kind: "store.forget", entryId, scope, tenant: label.tenant });
    return said;
  }

  /** Keeps an entry here. */
  #keep(question: StoredQuestion, isNew: boolean, context: Context<SplitMessage>): void {
    if (!this.#semantic.adopt(question, context.nowMs)) return;
    if (isNew && this.#store !== undefined)
      context.tell(this.#store, { kind: "store.remember", question });
    if (this.#homeOf(question.scope) === this.#shard) this.#trainIfOutgrown(question, context);
  }

  // ---- spreading a scope, at home ---------------------------------------------------------------------------

  #trainIfOutgrown({ scope, vector }: StoredQuestion, context: Context<SplitMessage>): void {
    if (this.#homes.has(scope) || this.#shards.length < 2) return;
    const { entries, bytes } = this.#semantic.sizeOf(scope);
    const hasOutgrown = entries > this.#options.entriesMax || bytes > this.#semantic.bytesMax / 2;
    if (!hasOutgrown) return;
    const count = this.#bucketsFor(entries, vector.length);
    if (count < BUCKETS_MIN) return;
    if (this.#homes.size >= HOMES_MAX) {
      this.#counts.splitOverflows++;
      return;
    }
    const reserved = trainingBytes(count, vector.length);
    this.#homes.set(scope, { state: "training", training: undefined, count, bytes: reserved });
    this.#semantic.reserve(reserved);
    this.#work.add(scope);
    this.#arm(context);
  }

  #bucketsFor(entries: number, dimension: number): number {
    let count = Math.min(this.#options.buckets, Math.floor(entries / VECTORS_PER_BUCKET_MIN));
    const bytesMost = this.#semantic.bytesMax / MEMORY_SHARE;
    while (count > 0 && trainingBytes(count, dimension) > bytesMost) count = Math.floor(count / 2);
    return count - (count % 4);
  }

  /** One slice of training; its last one spreads the scope. */
  #train(scope: string, home: Training, context: Context<SplitMessage>): void {
    if (home.training === undefined) {
      const vectors = this.#sample(scope);
      if (vectors.length >= home.count) {
        const { count } = home;
        home.training = new CentroidTraining({ vectors, random: this.#random, count });
        return;
      }
      this.#homes.delete(scope); // Purged meanwhile.
      this.#work.delete(scope);
      return this.#semantic.reserve(-home.bytes);
    }
    home.training.step();
    const { centroids, sizes } = home.training;
    if (centroids === undefined) return;
    // Neighbours lie together: that asks a fifth fewer shards than buckets strewn by hash.
    const owners = [...centroids.placement(sizes, this.#shards.length)];
    this.#see({ scope, epoch: 1, centroids, owners }, context);
  }

  /** Vectors of a scope, evenly over the time they came in, read where they lie. */
  #sample(scope: string) {
    const ids = [...this.#semantic.idsOf(scope)];
    const length = Math.min(ids.length, TRAINING_VECTORS_MAX);
    const vectorAt = (index: number): Float32Array | undefined => {
      const id = ids[Math.floor((index * ids.length) / length)];
      return id === undefined ? undefined : this.#semantic.vectorOf(id);
    };
    return { length, at: vectorAt };
  }

  /** The newer of this map and the one known here holds from now on, for the home and for the part. */
  #see(map: SplitMap, context: Context<SplitMessage>): Part {
    const { scope } = map;
    const known = this.#parts.get(scope);
    if (known !== undefined && !isNewer(map, known.map)) {
      known.usedAtMs = context.nowMs;
      return known;
    }
    const part: Part = {
      map,
      pass: this.#semantic.idsOf(scope),
      underWay: 0,
      leaving: [],
      isIncomplete: false,
      restUntilMs: 0,
      usedAtMs: context.nowMs,
    };
    this.#parts.set(scope, part);
    this.#work.add(scope);
    this.#arm(context);
    if (this.#homeOf(scope) === this.#shard) this.#becomeSpread(map, context);
    return part;
  }

  #becomeSpread(map: SplitMap, context: Context<SplitMessage>): void {
    const { scope, epoch, centroids } = map;
    const before = this.#homes.get(scope);
    if (before?.state === "spread" && !isNewer(map, before.map)) return;
    const spread = before?.state === "spread" ? before : undefined;
    const isSame = spread?.map.centroids.version === centroids.version;
    this.#homes.set(scope, {
      state: "spread",
      map,
      ownerSet: new Set(map.owners),
      movers: new Set(this.#shards.keys()),
      audit: spread !== undefined && isSame ? spread.audit : this.#newAudit(),
      heard: spread?.heard ?? new Map(),
      waiting: spread?.waiting ?? [],
      emptySinceMs: undefined,
    });
    this.#semantic.reserve(centroids.bytes - heldBytes(before));
    const event: SplitEvent = {
      kind: "cache.scope_spread",
      scope,
      epoch,
      buckets: centroids.count,
    };
    context.emit(event);
    for (const shard of this.#shards.keys())
      if (shard !== this.#shard) this.#tell(shard, { kind: "cache.map", map }, context);
  }

  #newAudit(): ProbingAudit {
    const { auditShare } = this.#options;
    return new ProbingAudit({ z: PROBING_Z, zMin: Z_MIN, zMax: Z_MAX, auditShare });
  }

  #onPart(map: SplitMap, part: PartReport, context: Context<SplitMessage>): void {
    const { scope } = map;
    const { shard, bornAtMs, entries, isSettled } = part;
    const known = this.#homes.get(scope);
    if (known?.state !== "spread" || isNewer(map, known.map)) {
      if (entries === 0 && known?.state !== "spread") return; // Nothing is left of it.
      this.#see(map, context); // We have crashed, or never had that map.
      this.#becomeSpread(map, context); // The part may have known it, where the home did not.
      this.#recallAgain(scope);
    }
    const home = this.#homes.get(scope);
    if (home?.state !== "spread") return;
    const before = home.heard.get(shard);
    if (before !== undefined && before.bornAtMs !== bornAtMs) this.#recallAgain(scope);
    if (entries > 0) home.heard.set(shard, { bornAtMs, atMs: context.nowMs });
    else home.heard.delete(shard);
    if (isNewer(home.map, map)) {
      home.movers.add(shard);
      return this.#tell(shard, { kind: "cache.map", map: home.map }, context);
    }
    if (isSettled) home.movers.delete(shard);
    else home.movers.add(shard);
    if (home.movers.size > 0) return;
    for (const replyTo of home.waiting.splice(0)) context.reply(replyTo, { ok: true });
  }

  #onGiveBucket(
    { scope, buckets, to, replyTo }: Extract<SplitCommand, { kind: "cache.give_bucket" }>,
    context: Context<SplitMessage>,
  ): void {
    const home = this.#homes.get(scope);
    const refuse = (says: string): void => context.reply(replyTo, { ok: false, says });
    if (home?.state !== "spread") return refuse("the scope is not spread from here");
    if (this.#shards[to] === undefined) return refuse(`there is no shard ${to}`);
    const owners = [...home.map.owners];
    for (const bucket of buckets) {
      if (owners[bucket] === undefined) return refuse(`there is no bucket ${bucket}`);
      owners[bucket] = to;
    }
    if (home.waiting.length >= WAITING_MAX) return refuse("too many are waiting");
    home.waiting.push(replyTo);
    this.#see({ ...home.map, owners, epoch: home.map.epoch + 1 }, context);
  }

  // ---- parts ------------------------------------------------------------------------------------------------

  #onSplitDue(context: Context<SplitMessage>): void {
    this.#isArmed = false;
    const next = this.#work.values().next();
    if (next.done) return;
    this.#work.delete(next.value); // And to the end, where there is more to do.
    if (this.#slice(next.value, context)) this.#work.add(next.value);
    this.#arm(context);
  }

  /** One slice of work on a scope; true while there is more. */
  #slice(scope: string, context: Context<SplitMessage>): boolean {
    const home = this.#homes.get(scope);
    if (home?.state === "training") {
      this.#train(scope, home, context);
      return this.#homes.has(scope);
    }
    const part = this.#parts.get(scope);
    if (part?.pass === undefined) return false;
    const isTooEarly = part.leaving.some(({ untilMs }) => context.nowMs < untilMs);
    if (part.underWay > 0 || isTooEarly || context.nowMs < part.restUntilMs) return true;
    this.#release(part);
    this.#move(part, context);
    return part.pass !== undefined;
  }

  /** Looks at the next entries, and sends those of other owners there. */
  #move(part: Part, context: Context<SplitMessage>): void {
    const gifts = new Map<number, MovedEntry[]>();
    let isAtEnd = false;
    for (let looked = 0; looked < SLICE_ENTRIES && part.pass !== undefined; looked++) {
      const step = part.pass.next();
      if (step.done === true) {
        isAtEnd = true;
        break;
      }
      const vector = this.#semantic.vectorOf(step.value);
      if (vector === undefined) continue;
      const owner = this.#ownerOf(part.map, vector);
      const entry =
        owner === this.#shard ? undefined : this.#semantic.moved(step.value, context.nowMs);
      if (entry === undefined) continue;
      const ofOwner = gifts.get(owner);
      if (ofOwner === undefined) gifts.set(owner, [entry]);
      else ofOwner.push(entry);
    }
    for (const [owner, entries] of gifts) this.#give(part, owner, entries, context);
    if (!isAtEnd || gifts.size > 0) return; // After gifts, the end is seen once more.
    if (part.isIncomplete) {
      part.isIncomplete = false;
      part.pass = this.#semantic.idsOf(part.map.scope);
      return;
    }
    part.pass = undefined;
    this.#report(part, context);
  }

  #give(part: Part, owner: number, entries: MovedEntry[], context: Context<SplitMessage>): void {
    const { map } = part;
    const to = this.#shards[owner];
    assert(to !== undefined, "owners are shards");
    part.underWay++;
    context.ask<SplitCommand, BucketTaken>(
      to,
      TAKE_MS,
      (replyTo) => ({ kind: "cache.take_bucket", map, entries, replyTo }),
      (outcome) => ({ kind: "cache.bucket_taken", map, entries, outcome }),
    );
  }

  #release(part: Part): void {
    for (const { entries } of part.leaving.splice(0)) {
      for (const entry of entries) {
        if (this.#semantic.release(entry)) this.#counts.movedEntries++;
        else part.isIncomplete = true; // Labelled meanwhile: it goes again.
      }
    }
  }

  #take(map: SplitMap, entries: MovedEntry[], context: Context<SplitMessage>): BucketTaken {
    const part = this.#see(map, context);
    if (isNewer(part.map, map)) return { kind: "newer", map: part.map };
    for (const { question, evidence } of entries) {
      if (!this.#isPurged(question, context.nowMs))
        this.#semantic.adopt(question, context.nowMs, evidence);
    }
    return { kind: "taken" };
  }

  #onBucketTaken({ map, entries, outcome }: Taken, context: Context<SplitMessage>): void {
    // By a newer map, another pass has begun meanwhile, over all that is here: what was taken goes to its owner again.
    const known = this.#parts.get(map.scope);
    const part = known?.map === map ? known : undefined;
    if (part !== undefined) part.underWay--;
    if (outcome.ok && outcome.value.kind === "newer") {
      this.#see(outcome.value.map, context);
    } else if (outcome.ok) {
      const untilMs = context.nowMs + this.#options.probeMs;
      part?.leaving.push({ entries, untilMs });
    } else if (part !== undefined) {
      part.isIncomplete = true;
      part.restUntilMs = context.nowMs + REST_MS;
    }
  }

  #report(part: Part, context: Context<SplitMessage>): void {
    const { map } = part;
    const { entries } = this.#semantic.sizeOf(map.scope);
    const isSettled = part.pass === undefined;
    const report = { shard: this.#shard, bornAtMs: this.#bornAtMs, entries, isSettled };
    const home = this.#homeOf(map.scope);
    if (home === this.#shard) this.#onPart(map, report, context);
    else this.#tell(home, { kind: "cache.part", map, part: report }, context);
  }

  // ---- once a second ----------------------------------------------------------------------------------------

  sweep(context: Context<SplitMessage>): void {
    const { nowMs } = context;
    for (const [scope, part] of this.#parts) {
      const { entries } = this.#semantic.sizeOf(scope);
      const isIdle = part.pass === undefined && nowMs - part.usedAtMs >= LINGER_MS;
      if (entries === 0 && isIdle) this.#parts.delete(scope);
      else this.#report(part, context);
    }
    for (const [scope, home] of this.#homes)
      if (home.state === "spread") this.#sweepHome(scope, home, context);
    for (const [tenant, atMs] of this.#purgedAtMs)
      if (nowMs - atMs >= PURGE_REMEMBERED_MS) this.#purgedAtMs.delete(tenant);
  }

  #sweepHome(scope: string, home: Spread, context: Context<SplitMessage>): void {
    const { nowMs } = context;
    for (const [shard, { atMs }] of home.heard) {
      if (nowMs - atMs < SILENT_MS) continue;
      home.heard.delete(shard); // It has lost its part.
      this.#recallAgain(scope);
    }
    for (const shard of home.movers)
      if (shard !== this.#shard) this.#tell(shard, { kind: "cache.map", map: home.map }, context);
    if (home.heard.size > 0 || home.movers.size > 0) home.emptySinceMs = undefined;
    else home.emptySinceMs ??= nowMs;
    if (home.emptySinceMs === undefined || nowMs - home.emptySinceMs < LINGER_MS) return;
    this.#homes.delete(scope);
    this.#semantic.reserve(-heldBytes(home));
  }

  /** A purge goes round the shards: what was sent before it and comes after it is refused. */
  purge(tenant: string | undefined, nowMs: number): void {
    // What is forgotten too early can only bring back what was on its way just then.
    if (this.#purgedAtMs.size >= PURGED_TENANTS_MAX) this.#purgedAtMs.clear();
    this.#purgedAtMs.set(tenant ?? "", nowMs);
  }

  #isPurged({ tenant, ageMs }: StoredQuestion, nowMs: number): boolean {
    const never = Number.NEGATIVE_INFINITY;
    const ofAllMs = this.#purgedAtMs.get("") ?? never;
    const purgedAtMs = Math.max(ofAllMs, this.#purgedAtMs.get(tenant) ?? never);
    return nowMs - ageMs <= purgedAtMs + PURGE_MARGIN_MS;
  }

  describe(): SplitDescription {
    const splits: SplitFacts[] = [];
    for (const [scope, home] of this.#homes) {
      if (home.state !== "spread") continue;
      const { map, movers, audit } = home;
      splits.push({
        scope,
        buckets: map.centroids.count,
        epoch: map.epoch,
        moving: movers.size,
        z: audit.z,
        recall: audit.estimate(),
      });
    }
    let movingParts = 0;
    for (const { pass } of this.#parts.values()) if (pass !== undefined) movingParts++;
    return { splitScopes: splits.length, movingParts, ...this.#counts, splits };
  }

  #tell(shard: number, message: SplitCommand, context: Context<SplitMessage>): void {
    const to = this.#shards[shard];
    if (shard === this.#shard) this.receive(message, context);
    else if (to !== undefined) context.tell(to, message);
  }

  #ownerOf({ centroids, owners }: SplitMap, vector: Float32Array): number {
    return owners[centroids.bucketOf(vector) ?? -1] ?? this.#shard;
  }

  #homeOf(scope: string): number {
    return Number.parseInt(scope.slice(0, 3), 16) % this.#shards.length;
  }

  #arm(context: Context<SplitMessage>): void {
    if (this.#isArmed || this.#work.size === 0) return;
    this.#isArmed = true;
    context.startTimer("split", SLICE_MS, { kind: "cache.split_due" });
  }
}

/** A total order, so that all agree. Two of one epoch exist where a home forgot a map and made another. */
function isNewer(map: SplitMap, other: SplitMap): boolean {
  if (map.epoch !== other.epoch) return map.epoch > other.epoch;
  return map.centroids.version > other.centroids.version;
}

/** Rows, sums of rows (twice as wide), and the distances of the centroids that come of it. */
function trainingBytes(count: number, dimension: number): number {
  return 12 * count * dimension + 4 * count * count;
}

function heldBytes(home: Home | undefined): number {
  if (home === undefined) return 0;
  return home.state === "training" ? home.bytes : home.map.centroids.bytes;
}
