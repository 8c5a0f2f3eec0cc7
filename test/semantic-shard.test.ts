/**
 * One shard of questions: against a plain list that does the same, and its bounds, for whatever is done to it.
 *
 * Vectors are chosen, not embedded, so that similarities are known.
 */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { PrecisionSwitch } from "../actors/judged-precision.ts";
import { guardAgainst, guardFeatures } from "../actors/match-guards.ts";
import type { SemanticPolicy, StoredAnswer, StoredQuestion } from "../actors/protocol.ts";
import {
  type Explored,
  type Matched,
  NEIGHBOURS,
  type Question,
  type SemanticOptions,
  SemanticShard,
} from "../actors/semantic-shard.ts";
import { Random } from "../runtime/random.ts";

fc.configureGlobal({ seed: 20_251_126 });

const MiB = 1024 * 1024;
const options: SemanticOptions = {
  ttlMs: 1000,
  bytesMax: 64 * MiB,
  answerBytesMax: 10_000,
  precisionMin: 0.5,
  judge: "exact",
};
const fixed: SemanticPolicy = {
  mode: "fixed",
  similarityMin: 0.9,
  errorRateMax: 0.05,
  isStrict: false,
};
const shadow: SemanticPolicy = { ...fixed, mode: "shadow" };
const verified: SemanticPolicy = { ...fixed, mode: "verified" };

function newShard(changed: Partial<SemanticOptions> = {}): SemanticShard {
  const random = new Random("shard");
  return new SemanticShard({ ...options, ...changed }, () => random.next());
}

function answerOf(content: string): StoredAnswer {
  const body = Buffer.from(JSON.stringify({ choices: [{ message: { content } }] }));
  const facts = { route: "chat", model: "m", promptTokens: 1, outputTokens: 1 } as const;
  return { body, bytes: body.length, ...facts };
}

/** Unit vectors in a plane: the cosine of two is that of the difference of their angles. */
function vectorAt(degrees: number): Float32Array {
  const angle = (degrees * Math.PI) / 180;
  return Float32Array.of(Math.cos(angle), Math.sin(angle), 0, 0);
}

/** Angle whose cosine to 0 degrees is that similarity. */
function degreesOf(similarity: number): number {
  return (Math.acos(similarity) * 180) / Math.PI;
}

function questionOf(text: string, degrees: number, policy: SemanticPolicy = fixed): Question {
  return { scope: "abc1", tenant: "t", model: "m", text, vector: vectorAt(degrees), policy };
}

const none = undefined;

/** What a home does with a question that a node has answered: the entry passed over is labelled; if wrong, a new one. */
function learnIn(
  shard: SemanticShard,
  question: Omit<Question, "policy">,
  answer: StoredAnswer,
  explored: Explored | undefined,
  isShadow: boolean,
  nowMs: number,
): StoredQuestion | undefined {
  if (explored !== undefined) {
    const { entryId, similarity } = explored;
    const label = { kind: "answer", similarity, answer, isShadow, wasServed: false } as const;
    if (shard.label(entryId, label).right === true) return undefined;
  }
  const made = shard.make(question, answer);
  return shard.adopt(made, nowMs) ? made : undefined;
}

function judgeIn(shard: SemanticShard, { entryId, similarity }: Explored, answer: StoredAnswer) {
  shard.label(entryId, { kind: "answer", similarity, answer, isShadow: false, wasServed: true });
}

function feedbackIn(shard: SemanticShard, entryId: string, tenant: string, isRight: boolean) {
  return shard.label(entryId, { kind: "feedback", tenant, isRight }).known;
}

function learn(
  shard: SemanticShard,
  { policy, ...question }: Question,
  answer: StoredAnswer,
  explored: Explored | undefined = none,
  nowMs = 0,
): string | undefined {
  return learnIn(shard, question, answer, explored, policy.mode === "shadow", nowMs)?.entryId;
}

/** Asks; where a node is to be asked, it says `real`. */
function ask(shard: SemanticShard, question: Question, real: string): Matched {
  const matched = shard.match(question, 0);
  if (matched.kind !== "hit")
    learn(shard, question, answerOf(real), matched.kind === "explore" ? matched : none);
  return matched;
}

// ---- against a list -------------------------------------------------------------------------------------------

type ListEntry = {
  entryId: string;
  scope: string;
  tenant: string;
  text: string;
  degrees: number;
  answer: string;
  storedAtMs: number;
  expiresAtMs: number;
  wrongBelow: number;
};

/** The same without index, scopes, order and bounds. */
class ListOfQuestions {
  entries: ListEntry[] = [];
  readonly removed = new Set<string>();
  readonly switches = new Map<string, PrecisionSwitch>();

  match(
    scope: string,
    tenant: string,
    text: string,
    degrees: number,
    nowMs: number,
    policy: SemanticPolicy,
  ) {
    const near = this.entries
      .filter((entry) => entry.scope === scope)
      .map((entry) => ({ entry, similarity: similarityOf(entry.degrees, degrees) }))
      .filter(({ similarity }) => similarity >= policy.similarityMin)
      .sort((a, b) => b.similarity - a.similarity) // Stable: the older one first.
      .slice(0, NEIGHBOURS);
    for (const { entry, similarity } of near) {
      if (entry.tenant !== tenant) continue;
      if (nowMs >= entry.expiresAtMs) {
        this.drop(entry);
        continue;
      }
      if (guardAgainst(guardFeatures(text), guardFeatures(entry.text)) !== undefined) continue;
      if (similarity < entry.wrongBelow) continue;
      const isOff = this.switchOf(tenant).state === "off";
      const kind = policy.mode === "shadow" || isOff ? "explore" : "hit";
      return { kind, entryId: entry.entryId, similarity };
    }
    return { kind: "miss" };
  }

  switchOf(tenant: string): PrecisionSwitch {
    const known = this.switches.get(tenant) ?? new PrecisionSwitch(options.precisionMin);
    this.switches.set(tenant, known);
    return known;
  }

  keep(entry: ListEntry): boolean {
    if (entry.expiresAtMs <= entry.storedAtMs || this.removed.has(entry.entryId)) return false;
    if (this.entries.some(({ entryId }) => entryId === entry.entryId)) return false;
    const before = this.entries.find(
      ({ scope, text }) => scope === entry.scope && text === entry.text,
    );
    if (before !== undefined && before.storedAtMs > entry.storedAtMs) return false;
    if (before !== undefined) this.drop(before);
    this.entries.push(entry);
    return true;
  }

  label(entryId: string, similarity: number, isRight: boolean): ListEntry | undefined {
    const entry = this.entries.find((each) => each.entryId === entryId);
    if (entry === undefined) return undefined;
    const rounded = Math.round(similarity * 1000) / 1000;
    if (!isRight) entry.wrongBelow = Math.max(entry.wrongBelow, rounded + 0.005);
    this.switchOf(entry.tenant).add(isRight);
    return entry;
  }

  drop(entry: ListEntry): void {
    this.entries = this.entries.filter((each) => each !== entry);
  }
}

function similarityOf(left: number, right: number): number {
  const [a, b] = [vectorAt(left), vectorAt(right)];
  let sum = 0;
  for (let at = 0; at < a.length; at++) sum += (a[at] ?? 0) * (b[at] ?? 0);
  return Math.round(sum * 1e6) / 1e6;
}

const TEXTS = [
  "how do i do it",
  "how do i do this",
  "how do i do that",
  "how do i do it in 3 days",
  "how do i do it in 5 days",
  "how do i not do it",
  "what is it for",
] as const;
const text = fc.constantFrom(...TEXTS);
const scope = fc.constantFrom("abc1", "abc2");
const tenant = fc.constantFrom("t", "u");
const degrees = fc.integer({ min: 0, max: 40 });
/** Of all entries that there ever were. */
const which = fc.nat(1000);
const action = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.record({ do: fc.constant("learn" as const), scope, tenant, text, degrees }),
  },
  {
    weight: 6,
    arbitrary: fc.record({
      do: fc.constant("match" as const),
      scope,
      tenant,
      text,
      degrees,
      mode: fc.constantFrom("fixed" as const, "fixed" as const, "shadow" as const),
      similarityMin: fc.constantFrom(0.85, 0.9, 0.97),
      says: fc.constantFrom("answer 1", "answer 2"),
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      do: fc.constant("adopt" as const),
      which,
      scope,
      tenant,
      text,
      degrees,
      ttlMs: fc.constantFrom(0, 50, 400, 5000),
      ageMs: fc.constantFrom(0, 100, 900),
      isNew: fc.boolean(),
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({ do: fc.constant("feedback" as const), which, tenant, ok: fc.boolean() }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant("judge" as const),
      which,
      degrees,
      says: fc.constantFrom("answer 1", "answer 2"),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("remove" as const), which }) },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant("purge" as const),
      tenant: fc.option(tenant, { nil: none }),
    }),
  },
  {
    weight: 3,
    arbitrary: fc.record({
      do: fc.constant("wait" as const),
      ms: fc.integer({ min: 1, max: 300 }),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("sweep" as const) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("maintain" as const) }) },
);

describe("semantic shard: against a plain list", () => {
  it("matches, keeps and drops the same, whatever is done to it", () => {
    let hits = 0;
    let guarded = 0;
    fc.assert(
      fc.property(fc.array(action, { minLength: 20, maxLength: 80, size: "max" }), (actions) => {
        const shard = newShard();
        const list = new ListOfQuestions();
        const ids: string[] = [];
        let nowMs = 0;
        const idOf = (at: number): string => ids[at % Math.max(1, ids.length)] ?? "f".repeat(27);
        const keep = (
          entryId: string,
          asked: { scope: string; tenant: string; text: string; degrees: number },
          answer: string,
          ttlMs: number,
          ageMs: number,
        ): boolean => {
          const { scope, tenant, text, degrees } = asked;
          const times = {
            storedAtMs: nowMs - ageMs,
            expiresAtMs: nowMs + Math.min(ttlMs, options.ttlMs),
          };
          if (ttlMs <= 0) return false;
          return list.keep({
            entryId,
            scope,
            tenant,
            text,
            degrees,
            answer,
            ...times,
            wrongBelow: 0,
          });
        };
        for (const step of actions) {
          switch (step.do) {
            case "learn": {
              const { scope, tenant, text } = step;
              const question = { scope, tenant, model: "m", text, vector: vectorAt(step.degrees) };
              const made = learnIn(shard, question, answerOf("answer 1"), none, false, nowMs);
              expect(made).toBeDefined();
              const entryId = made?.entryId ?? "";
              expect(keep(entryId, step, "answer 1", options.ttlMs, 0)).toBe(true);
              ids.push(entryId);
              break;
            }
            case "match": {
              const { scope, tenant, text, mode, similarityMin } = step;
              const policy = { ...fixed, mode, similarityMin };
              const vector = vectorAt(step.degrees);
              const question = { scope, tenant, model: "m", text, vector, policy };
              const matched = shard.match(question, nowMs);
              const expected = list.match(scope, tenant, text, step.degrees, nowMs, policy);
              expect(matched).toMatchObject(expected);
              if (matched.kind === "hit") {
                hits++;
                const entry = list.entries.find(({ entryId }) => entryId === matched.entryId);
                expect(matched.answer.body).toEqual(answerOf(entry?.answer ?? "").body);
                expect(matched.ageMs).toBe(nowMs - (entry?.storedAtMs ?? 0));
                break;
              }
              if (matched.says.startsWith("guard")) guarded++;
              if (matched.kind !== "explore") break;
              // A node has been asked: the entry is labelled, and where it was wrong there is another one.
              const made = learnIn(
                shard,
                { scope, tenant, model: "m", text, vector },
                answerOf(step.says),
                matched,
                mode === "shadow",
                nowMs,
              );
              const labelled = list.entries.find(({ entryId }) => entryId === matched.entryId);
              const isRight = labelled?.answer === step.says;
              list.label(matched.entryId, matched.similarity, isRight);
              expect(made === undefined).toBe(isRight);
              if (made === undefined) break;
              keep(made.entryId, step, step.says, options.ttlMs, 0);
              ids.push(made.entryId);
              break;
            }
            case "adopt": {
              const entryId = step.isNew
                ? `abc${String(ids.length).padStart(24, "0")}`
                : idOf(step.which);
              const { scope, tenant, text, ttlMs, ageMs } = step;
              const vector = vectorAt(step.degrees);
              const stored = {
                entryId,
                scope,
                tenant,
                model: "m",
                text,
                vector,
                answer: answerOf("answer 2"),
                ttlMs,
                ageMs,
              };
              expect(shard.adopt(stored, nowMs)).toBe(
                keep(entryId, step, "answer 2", ttlMs, ageMs),
              );
              ids.push(entryId);
              break;
            }
            case "feedback": {
              const entryId = idOf(step.which);
              const entry = list.entries.find(
                (each) => each.entryId === entryId && each.tenant === step.tenant,
              );
              expect(feedbackIn(shard, entryId, step.tenant, step.ok)).toBe(entry !== undefined);
              if (entry === undefined) break;
              list.label(entryId, 1, step.ok);
              if (step.ok) break;
              list.drop(entry);
              list.removed.add(entryId);
              break;
            }
            case "judge": {
              const entryId = idOf(step.which);
              const similarity = similarityOf(0, step.degrees);
              judgeIn(shard, { entryId, similarity }, answerOf(step.says));
              const entry = list.entries.find((each) => each.entryId === entryId);
              if (entry !== undefined) list.label(entryId, similarity, entry.answer === step.says);
              break;
            }
            case "remove": {
              const entryId = idOf(step.which);
              shard.remove(entryId);
              list.removed.add(entryId);
              const entry = list.entries.find((each) => each.entryId === entryId);
              if (entry !== undefined) list.drop(entry);
              break;
            }
            case "purge": {
              const gone = list.entries.filter(
                (entry) => step.tenant === none || entry.tenant === step.tenant,
              );
              expect(shard.purge(step.tenant)).toBe(gone.length);
              for (const entry of gone) list.drop(entry);
              if (step.tenant === none) list.switches.clear();
              else list.switches.delete(step.tenant);
              break;
            }
            case "wait":
              nowMs += step.ms;
              break;
            case "sweep":
              shard.sweep(nowMs, 1000);
              for (const entry of [...list.entries])
                if (nowMs >= entry.expiresAtMs) list.drop(entry);
              break;
            case "maintain":
              shard.maintain();
          }
          expect(shard.size).toBe(list.entries.length);
          if (shard.size === 0) expect(shard.bytes).toBe(0);
        }
      }),
      { numRuns: 300 },
    );
    expect(hits).toBeGreaterThan(300);
    expect(guarded).toBeGreaterThan(50);
  });
});

// ---- memory ---------------------------------------------------------------------------------------------------

/** Ids of all entries, the one used last first. */
function order(shard: SemanticShard): string[] {
  return shard.inspect({ tenant: "t", count: 1_000_000 }, 0).map(({ entryId }) => entryId);
}

describe("semantic shard: memory", () => {
  it("is never above its bound after a call, and what goes was used least recently", () => {
    let evicted = 0;
    fc.assert(
      fc.property(
        fc.integer({ min: 20_000, max: 200_000 }),
        fc.array(
          fc.record({ at: fc.nat(60), scope: fc.nat(3), bytes: fc.nat(8000), isNew: fc.boolean() }),
          {
            minLength: 60,
            maxLength: 120,
            size: "max",
          },
        ),
        (bytesMax, steps) => {
          const shard = newShard({ bytesMax });
          for (const { at, scope, bytes, isNew } of steps) {
            const before = order(shard);
            const question = { ...questionOf(`question ${at}`, at * 5), scope: `abc${scope}` };
            if (!isNew) {
              const matched = shard.match(question, 0);
              const used = matched.kind === "hit" ? [matched.entryId] : [];
              expect(order(shard)).toEqual([...used, ...before.filter((id) => !used.includes(id))]);
              continue;
            }
            const same = shard
              .inspect({ tenant: "t", count: 1000 }, 0)
              .find((entry) => entry.scope === question.scope && entry.question === question.text);
            const made = learn(shard, question, answerOf("x".repeat(bytes)));
            expect(shard.bytes).toBeLessThanOrEqual(bytesMax);
            const after = order(shard);
            if (made === undefined) {
              expect(after).toEqual(before.slice(0, after.length)); // Too large for it, or for all.
              continue;
            }
            const kept = [made, ...before.filter((id) => id !== same?.entryId)];
            expect(after).toEqual(kept.slice(0, after.length));
            evicted += kept.length - after.length;
          }
        },
      ),
      { numRuns: 60 },
    );
    expect(evicted).toBeGreaterThan(500);
  });

  it("1,000,000 entries of one scope offered into 64 MiB: the bound holds, the newest are there", () => {
    const shard = newShard({ bytesMax: 64 * MiB, ttlMs: 1e9, answerBytesMax: MiB });
    const answer = answerOf("x".repeat(50_000));
    const facts = { scope: "abc1", tenant: "t", model: "m", answer, ttlMs: 1e9, ageMs: 0 };
    let seed = 1;
    const offered = 1_000_000;
    let most = 0;
    let vector = new Float32Array(16);
    for (let at = 0; at < offered; at++) {
      vector = new Float32Array(16);
      for (let place = 0; place < 16; place++) {
        seed = (seed * 48_271) % 2_147_483_647; // Cheap: there are 16,000,000 of them.
        vector[place] = seed / 2_147_483_647 - 0.5;
      }
      shard.adopt({ ...facts, entryId: `abc${at}`, text: `question ${at}`, vector }, 0);
      if (shard.bytes > most) most = shard.bytes;
    }
    expect(most).toBeLessThanOrEqual(64 * MiB);
    expect(most).toBeGreaterThan(60 * MiB);
    const { questions, learnt, semanticEvictions } = shard.describe();
    expect(questions).toBeGreaterThan(1000);
    expect(questions + semanticEvictions).toBe(learnt);
    expect(learnt).toBe(offered);
    const last = { ...questionOf(`question ${offered - 1}`, 0), vector };
    expect(shard.match(last, 0)).toMatchObject({ kind: "hit", similarity: 1 });
  });

  it("a bound that is lowered drops what no longer fits at once", () => {
    const shard = newShard();
    for (let at = 0; at < 100; at++) learn(shard, questionOf(`question ${at}`, at), answerOf("a"));
    const before = order(shard);
    shard.configure(1000, 60_000);
    expect(shard.bytes).toBeLessThanOrEqual(60_000);
    expect(shard.size).toBeGreaterThan(5);
    expect(order(shard)).toEqual(before.slice(0, shard.size));
  });

  it.each([
    ["an answer above its bound", { answer: answerOf("x".repeat(10_000)) }],
    ["a zero vector", { vector: new Float32Array(4) }],
    ["no number in the vector", { vector: Float32Array.of(Number.NaN, 0, 0, 1) }],
    ["a vector without dimension", { vector: new Float32Array(0) }],
    ["another dimension than its scope's", { vector: Float32Array.of(1, 0) }],
  ])("does not keep %s, and is none the heavier", (_, wrong) => {
    const shard = newShard();
    learn(shard, questionOf("how do i do it", 0), answerOf("a"));
    const { bytes } = shard;
    const vector = vectorAt(1);
    const facts = { scope: "abc1", tenant: "t", model: "m", ttlMs: 500, ageMs: 0 };
    const stored = { entryId: "abc9", text: "other", vector, answer: answerOf("b"), ...facts };
    expect(shard.adopt({ ...stored, ...wrong }, 0)).toBe(false);
    expect(
      shard.adopt({ ...stored, ...wrong, scope: "abc7", vector: new Float32Array(4) }, 0),
    ).toBe(false);
    expect([shard.size, shard.bytes, shard.describe().unlearnt]).toEqual([1, bytes, 2]);
  });

  it("ids found wrong stay out although thousands more were found wrong since", () => {
    const shard = newShard();
    const stored = {
      entryId: "abc-first",
      scope: "abc1",
      tenant: "t",
      model: "m",
      text: "how do i do it",
      vector: vectorAt(0),
      answer: answerOf("a"),
      ttlMs: 500,
      ageMs: 0,
    };
    shard.remove(stored.entryId);
    for (let at = 0; at < 9_999; at++) shard.remove(`abc${at}`);
    expect(shard.adopt(stored, 0)).toBe(false);
    shard.remove("abc-last"); // One more than are remembered.
    expect(shard.adopt(stored, 0)).toBe(true);
  });
});

// ---- modes ----------------------------------------------------------------------------------------------------

describe("semantic shard: shadow mode", () => {
  it("serves nobody, and says which share of would-be hits was false", () => {
    const shard = newShard();
    for (let at = 0; at < 30; at++) {
      const stored = { ...questionOf("how do i do it", 0, shadow), scope: `abc${at}` };
      expect(ask(shard, stored, "right").kind).toBe("miss");
      const asked = { ...stored, text: "how do i do that", vector: vectorAt(degreesOf(0.965)) };
      expect(ask(shard, asked, at % 3 === 0 ? "wrong" : "right").kind).toBe("explore");
    }
    const [judged] = shard.judged("t");
    expect(judged?.shadow).toMatchObject({
      lookups: 60,
      hits: { count: 30, total: 60 },
      falseHits: { count: 10, total: 30 },
      bands: [{ from: 0.96 }],
    });
    expect(shard.judged("other")).toEqual([]);
    expect(shard.describe().semanticHits).toBe(0);
  });

  it("an answer that cannot be judged is counted as such, and stored", () => {
    const shard = newShard();
    learn(shard, questionOf("how do i do it", 0, shadow), answerOf("a"));
    const asked = questionOf("how do i do that", 1, shadow);
    const matched = shard.match(asked, 0);
    const odd = { ...answerOf("a"), body: Buffer.from("no JSON") };
    expect(matched.kind).toBe("explore");
    expect(learn(shard, asked, odd, matched.kind === "explore" ? matched : none)).toBeDefined();
    expect(shard.judged("t")[0]?.shadow).toMatchObject({ unjudged: 1 });
    expect(shard.describe()).toMatchObject({ unjudged: 1, judgedRight: 0, judgedWrong: 0 });
  });
});

describe("semantic shard: the precision switch", () => {
  it("too few right hits: they are only judged, until enough were right again", () => {
    const shard = newShard({ precisionMin: 0.8 });
    const id = learn(shard, questionOf("how do i do it", 0), answerOf("right")) ?? "";
    const asked = questionOf("how do i do that", degreesOf(0.98));
    const judge = (says: string) =>
      judgeIn(shard, { entryId: id, similarity: 0.93 }, answerOf(says));
    expect(shard.match(asked, 0).kind).toBe("hit");
    for (let at = 0; at < 15; at++) judge(at % 2 === 0 ? "wrong" : "right");
    expect(shard.describe().switchedOff).toBe(1);
    expect(shard.judged("t")).toMatchObject([{ tenant: "t", model: "m", state: "off" }]);
    let asks = 0;
    while (shard.describe().switchedOff > 0 && asks++ < 200) {
      const matched = shard.match(asked, 0);
      expect(matched).toMatchObject({ kind: "explore", similarity: 0.98 });
      learn(shard, asked, answerOf("right"), matched.kind === "explore" ? matched : none);
    }
    expect(asks).toBeGreaterThan(5);
    expect(shard.match(asked, 0).kind).toBe("hit");
  });

  it("is a tenant's own, and a model's", () => {
    const shard = newShard();
    const id = learn(shard, questionOf("how do i do it", 0), answerOf("right")) ?? "";
    const other = { ...questionOf("how do i do it", 0), scope: "abc2", tenant: "u" };
    const model = { ...questionOf("how do i do it", 0), scope: "abc3", model: "n" };
    for (const question of [other, model]) learn(shard, question, answerOf("right"));
    for (let at = 0; at < 10; at++)
      judgeIn(shard, { entryId: id, similarity: 0.91 }, answerOf("wrong"));
    expect(shard.match(questionOf("how do i do it", 0), 0).kind).toBe("explore");
    expect(shard.match(other, 0).kind).toBe("hit");
    expect(shard.match(model, 0).kind).toBe("hit");
  });
});

describe("semantic shard: verified mode", () => {
  /** Labels of many entries in one band: `wrongEvery` 0 = all right. */
  function labelled(count: number, similarity: number, wrongEvery: number): SemanticShard {
    const shard = newShard({ precisionMin: 0.9 });
    for (let at = 0; at < count; at++) {
      const scope = `abc${at}`;
      const stored = { ...questionOf("how do i do it", 0, verified), scope };
      learn(shard, stored, answerOf("right"));
      const asked = {
        ...stored,
        text: "how do i do that",
        vector: vectorAt(degreesOf(similarity)),
      };
      const isWrong = wrongEvery > 0 && at % wrongEvery === 0;
      ask(shard, asked, isWrong ? "wrong" : "right");
    }
    return shard;
  }
  const fresh = (shard: SemanticShard, similarity: number): Matched => {
    const stored = { ...questionOf("how do i do it", 0, verified), scope: "abcf" };
    learn(shard, stored, answerOf("right"));
    const vector = vectorAt(degreesOf(similarity));
    return shard.match({ ...stored, text: "how do i do that", vector }, 0);
  };

  it("explores until the labels of a band bound the error, then serves in that band", () => {
    // z²(1 − δ)/δ = 52 for δ = 0.05.
    expect(fresh(labelled(50, 0.965, 0), 0.965)).toMatchObject({ kind: "explore" });
    const shard = labelled(55, 0.965, 0);
    expect(fresh(shard, 0.965)).toMatchObject({ kind: "hit" });
    expect(fresh(shard, 0.985)).toMatchObject({ kind: "explore" }); // Another band.
  });

  it("many false near misses, which nobody was served, switch nothing off", () => {
    const shard = labelled(60, 0.935, 2);
    expect(shard.describe()).toMatchObject({ switchedOff: 0, judgedWrong: 30, semanticHits: 0 });
    for (let at = 0; at < 60; at++) {
      const stored = { ...questionOf("how do i do it", 0, verified), scope: `abd${at}` };
      learn(shard, stored, answerOf("right"));
      const vector = vectorAt(degreesOf(0.985));
      ask(shard, { ...stored, text: "how do i do that", vector }, "right");
    }
    expect(fresh(shard, 0.985)).toMatchObject({ kind: "hit" });
    expect(fresh(shard, 0.935)).toMatchObject({ kind: "explore" });
  });

  it("served answers that prove wrong do", () => {
    const shard = labelled(60, 0.965, 0);
    const matched = fresh(shard, 0.965);
    if (matched.kind !== "hit") throw new Error("it must be served");
    for (let at = 0; at < 40; at++)
      judgeIn(shard, matched, answerOf(at % 2 === 0 ? "wrong" : "right"));
    expect(shard.describe().switchedOff).toBe(1);
  });

  it("an entry's own labels serve once that rule has proved itself", () => {
    const shard = newShard();
    // Each entry is labelled at other similarities than it is asked at: no band of the asked one ever opens.
    const bands = [0.925, 0.935, 0.945, 0.955, 0.965, 0.975];
    let served = 0;
    for (let entry = 0; entry < 40; entry++) {
      const stored = { ...questionOf("how do i do it", 0, verified), scope: `abc${entry}` };
      learn(shard, stored, answerOf("right"));
      for (let at = 0; at < 12; at++) {
        const similarity = bands[(entry + at) % bands.length] ?? 0;
        const vector = vectorAt(degreesOf(similarity));
        const asked = { ...stored, text: "how do i do that", vector };
        const matched = ask(shard, asked, "right");
        if (matched.kind === "hit" && matched.says.startsWith("own labels")) served++;
      }
    }
    expect(served).toBeGreaterThan(0);
  });
});

describe("semantic shard: looking", () => {
  it("shows why an entry answers a text or not: similarity, every guard, what the policy makes of it", () => {
    const shard = newShard();
    learn(shard, questionOf("how do i fix it in 3 days", 0), answerOf("a"));
    learn(shard, questionOf("what is it for", 50), answerOf("b"));
    const question = { text: "how do i not fix it in 5 days", vector: vectorAt(5), policy: fixed };
    const [near, far] = shard.inspect({ tenant: "t", count: 10, question }, 400);
    expect(near).toMatchObject({
      question: "how do i fix it in 3 days",
      scope: "abc1",
      ageMs: 400,
      expiresInMs: 600,
      compared: { similarity: expect.closeTo(0.9962, 3), kind: "miss", says: "guard: numbers" },
    });
    expect(near?.compared?.guards.map(({ guard }) => guard)).toEqual(["numbers", "negation"]);
    expect(far?.compared).toMatchObject({ kind: "miss", says: "similarity 0.7071 < 0.9" });
    const same = { ...question, text: "how do i fix it in 3 days" };
    expect(shard.inspect({ tenant: "t", count: 1, question: same }, 0)[0]?.compared).toMatchObject({
      kind: "serve",
      guards: [],
    });
    const strict = {
      ...same,
      text: "how do i mend it in 3 days",
      policy: { ...fixed, isStrict: true },
    };
    expect(shard.inspect({ tenant: "t", count: 1, question: strict }, 0)[0]?.compared?.says).toBe(
      "guard: private_words",
    );
    const blind = { text: "anything", policy: fixed };
    expect(shard.inspect({ tenant: "t", count: 1, question: blind }, 0)[0]?.compared?.kind).toBe(
      "miss",
    );
  });

  it("finds the nearest of many, not only of those used last", () => {
    const shard = newShard();
    for (let at = 0; at < 200; at++) learn(shard, questionOf(`question ${at}`, at), answerOf("a"));
    const question = { text: "question", vector: vectorAt(7.2), policy: fixed };
    const found = shard.inspect({ tenant: "t", count: 3, question }, 0);
    expect(found.map((entry) => entry.question)).toEqual([
      "question 7",
      "question 8",
      "question 6",
    ]);
    expect(shard.inspect({ tenant: "t", count: 2 }, 0).map((entry) => entry.question)).toEqual([
      "question 199",
      "question 198",
    ]);
    expect(shard.inspect({ tenant: "u", count: 2 }, 0)).toEqual([]);
  });
});
