/**
 * The questions that are asked most, from a recording that holds what was asked: repeats counted together, and
 * wordings of one question too, as the cache would serve them for each other. Pure.
 *
 * Repeats are equal requests (the recording's hash of all that decides the answer). Near repeats differ only in the
 * last user turn, are at least `similarityMin` alike, and no guard stands between them. The most frequent wording of a
 * group stands for it: a warm-up that asks it serves the others by meaning. Groups form around wordings in the order of
 * their counts, each wording joining the most similar one that stands for a group already.
 *
 * Memory is bounded: beyond `QUESTIONS_MAX` different requests, new ones are counted and left out.
 */
import { type GuardFeatures, guardAgainst, guardFeatures } from "../actors/match-guards.ts";
import { ExactIndex } from "../actors/vector-index.ts";
import { Random } from "../runtime/random.ts";
import { RequestReader } from "./openai-request.ts";
import { defaults } from "./options.ts";
import type { TraceRecord } from "./trace-format.ts";

/** A question and how often it was asked. */
export type HotQuestion = {
  /** Body of the most frequent wording. */
  prompt: Record<string, unknown>;
  /** All wordings together. */
  asked: number;
  wordings: number;
};

/** What became of the lines; they add up to `lines`. */
export type HotCounts = {
  lines: number;
  /** In a group. */
  counted: number;
  /** Other tenants', other models'. */
  others: number;
  /** Refused or failed. */
  failed: number;
  /** Without what was asked: recorded without `record.prompts`, too long, or no chat. */
  textless: number;
  /** Cannot be cached, or is none of ours. */
  uncacheable: number;
  /** Beyond the bound of different questions. */
  left: number;
};

/** Vectors for texts, undefined for each that gets none. */
export type EmbedTexts = (texts: readonly string[]) => Promise<(Float32Array | undefined)[]>;

type Counted = {
  readonly prompt: Record<string, unknown>;
  /** What all but the last turn must be equal in; absent: matched by equality alone. */
  readonly frame: string | undefined;
  readonly text: string;
  asked: number;
};

/** Different requests in memory, some 1 KB each. */
const QUESTIONS_MAX = 200_000;
/** Texts of one call of the embedder. */
const BATCH_TEXTS = 8;
/** Representatives that a wording is compared with. */
const NEAREST = 8;

export class HotQuestions {
  readonly #only: { tenant?: string; model?: string };
  /** By the recording's hash and tenant. */
  readonly #questions = new Map<string, Counted>();
  readonly #tenants = new Set<string>();
  readonly #reader = new RequestReader(defaults.requests, { prefixes: false, questions: true });
  readonly #counts: HotCounts = {
    lines: 0,
    counted: 0,
    others: 0,
    failed: 0,
    textless: 0,
    uncacheable: 0,
    left: 0,
  };

  /** Lines of other tenants (their hash, as recorded) or models are left out. */
  constructor(only: { tenant?: string; model?: string } = {}) {
    this.#only = only;
  }

  get counts(): Readonly<HotCounts> {
    return this.#counts;
  }

  /** Of the lines that were counted: their hashes, as recorded. */
  get tenants(): readonly string[] {
    return [...this.#tenants];
  }

  /** Different requests. */
  get size(): number {
    return this.#questions.size;
  }

  add(record: TraceRecord): void {
    this.#counts.lines++;
    this.#counts[this.#count(record)]++;
  }

  #count(record: TraceRecord): Exclude<keyof HotCounts, "lines"> {
    const { tenant, model, prompt, question, outcome } = record;
    if (this.#only.tenant !== undefined && tenant !== this.#only.tenant) return "others";
    if (this.#only.model !== undefined && model !== this.#only.model) return "others";
    if (outcome === "refused" || outcome === "failed") return "failed";
    if (question === undefined) return "uncacheable";
    const key = `${tenant} ${question}`;
    const known = this.#questions.get(key);
    if (known !== undefined) {
      known.asked++;
      return "counted";
    }
    if (prompt === undefined) return "textless";
    if (this.#questions.size >= QUESTIONS_MAX) return "left";
    const body = Buffer.from(JSON.stringify(prompt));
    const request = this.#reader.read("chat", body, tenant);
    if ("code" in request || request.cacheKey === undefined) return "uncacheable";
    const { text = "", frame, temperature = 0 } = request.question ?? {};
    const isMatched = temperature <= defaults.cache.semantic.temperatureMax;
    this.#tenants.add(tenant);
    this.#questions.set(key, { prompt, text, frame: isMatched ? frame : undefined, asked: 1 });
    return "counted";
  }

  /**
   * The `count` that were asked most. @param embed undefined: only equal requests count together
   * @param onProgress questions that have been grouped
   */
  async top(
    count: number,
    similarityMin: number,
    embed: EmbedTexts | undefined,
    onProgress: (done: number) => void = () => {},
  ): Promise<HotQuestion[]> {
    // Of two asked equally often, the one that came first: the sort is stable.
    const questions = [...this.#questions.values()].sort((a, b) => b.asked - a.asked);
    const groups: HotQuestion[] = [];
    const frames = new Map<string, Frame>();
    for (let from = 0; from < questions.length; from += BATCH_TEXTS) {
      const batch = questions.slice(from, from + BATCH_TEXTS);
      const vectors = await embed?.(batch.map(({ text }) => text));
      for (const [index, { prompt, frame, text, asked }] of batch.entries()) {
        const vector = vectors?.[index];
        const group: HotQuestion = { prompt, asked, wordings: 1 };
        const other =
          frame === undefined || vector === undefined
            ? undefined
            : frameOf(frames, frame, vector).place(text, vector, group, similarityMin);
        if (other === undefined) groups.push(group);
        else {
          other.asked += asked;
          other.wordings++;
        }
      }
      onProgress(Math.min(questions.length, from + BATCH_TEXTS));
    }
    return groups.sort((a, b) => b.asked - a.asked).slice(0, count);
  }
}

function frameOf(frames: Map<string, Frame>, name: string, { length }: Float32Array): Frame {
  let frame = frames.get(name);
  if (frame === undefined) {
    frame = new Frame(length);
    frames.set(name, frame);
  }
  return frame;
}

/** The groups of requests that differ in their last turn only. */
class Frame {
  readonly #index: ExactIndex;
  readonly #groups: { group: HotQuestion; features: GuardFeatures }[] = [];

  constructor(dimension: number) {
    const random = new Random("hot questions");
    this.#index = new ExactIndex({ dimension, random: () => random.next() });
  }

  /** The group that this wording belongs to; undefined: it begins its own. */
  place(
    text: string,
    vector: Float32Array,
    group: HotQuestion,
    similarityMin: number,
  ): HotQuestion | undefined {
    const features = guardFeatures(text);
    for (const { id } of this.#index.search(vector, similarityMin, NEAREST)) {
      const near = this.#groups[id];
      if (near !== undefined && guardAgainst(features, near.features) === undefined)
        return near.group;
    }
    if (this.#index.insert(this.#groups.length, vector) === undefined)
      this.#groups.push({ group, features });
    this.#index.maintain();
    return undefined;
  }
}
