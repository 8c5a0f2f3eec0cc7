/**
 * What an embedder is made of: the interface that every kind of model stands behind, and the self-test that
 * decides whether its vectors are any good. Pure.
 *
 * A model that loads is not yet one to trust: endpoints have returned one vector for every text, and weights that do
 * not fit their tokenizer give noise. The test asks for what any sentence embedder can do, also one that knows words
 * but no meaning: the same question in slightly other words is nearer than another question, for three pairs; and
 * sentences that a cache must tell apart are not one and the same vector.
 */
import type { NoVector } from "../actors/edges.ts";

/** The article's: 384 dimensions, 50 languages, 118 MB. */
export const EMBEDDER_MODEL = "Xenova/paraphrase-multilingual-MiniLM-L12-v2";

/** One model. The edge in embedder.ts adds queue, batches, time-outs and health. */
export interface EmbedderBackend {
  /** Calls of `embed` that may run at once, ≥ 1. */
  readonly batchesMax: number;
  /**
   * Loads or reaches the model; called again after a failure that may pass.
   * @throws EmbedderError when it cannot be had.
   */
  open(): Promise<{ id: string; version: string }>;
  /**
   * A vector for each text, in order, or why it has none. `signal` aborts when nobody waits any more.
   * @throws EmbedderError when all of it failed.
   */
  embed(texts: readonly string[], signal: AbortSignal): Promise<readonly TextVector[]>;
  close(): Promise<void>;
}

export type TextVector = Float32Array | Extract<NoVector, "too_long" | "unknown_words" | "failed">;

/** A model that cannot be had, or did not answer. */
export class EmbedderError extends Error {
  override readonly name = "EmbedderError";
  /**
   * passing: may work the next time. gone: will fail until it is opened again. lasting: fails until somebody mends it
   * and starts the process again.
   */
  readonly kind: "passing" | "gone" | "lasting";

  constructor(kind: EmbedderError["kind"], message: string) {
    super(message);
    this.kind = kind;
  }
}

/** Of the squared length: what float32 arithmetic and int8 weights leave of a normalised vector. */
const NORM_ERROR_MAX = 1e-3;

/** What is wrong with a vector, in words; undefined when nothing is. */
export function wrongVector(vector: Float32Array, dimension: number): string | undefined {
  if (vector.length !== dimension) {
    return `a vector has ${vector.length} dimensions instead of ${dimension}`;
  }
  const norm = Math.sqrt(dot(vector, vector));
  if (!Number.isFinite(norm)) return "a vector holds values that are not finite numbers";
  if (norm === 0) return "a vector is all zeros";
  if (Math.abs(norm - 1) > NORM_ERROR_MAX) return `a vector has length ${norm.toFixed(4)}, not 1`;
  return undefined;
}

/** The cosine of two unit vectors of one dimension. */
export function dot(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let index = 0; index < a.length; index++) sum += (a[index] ?? 0) * (b[index] ?? 0);
  return sum;
}

/** Scales to length 1, in place. A zero vector, or one with values that are not finite, stays what it is. */
export function normalise(vector: Float32Array): Float32Array {
  const norm = Math.sqrt(dot(vector, vector));
  if (norm === 0 || !Number.isFinite(norm)) return vector;
  for (let index = 0; index < vector.length; index++) vector[index] = (vector[index] ?? 0) / norm;
  return vector;
}

export function sameVector(a: Float32Array, b: Float32Array): boolean {
  return a.length === b.length && a.every((value, index) => value === b[index]);
}

// ---- the self-test --------------------------------------------------------------------------------------------

/** A question, the same in other words, and another question. */
const pairs = [
  {
    question: "How do I reset my password?",
    paraphrase: "How can I reset my password?",
    unrelated: "Explain machine learning like I am a child.",
  },
  {
    question: "What is the weather today?",
    paraphrase: "What is the weather like today?",
    unrelated: "Please change the email address of my account.",
  },
  {
    question: "Please write a summary of this request.",
    paraphrase: "Write a summary of this request, please.",
    unrelated: "When will the order arrive?",
  },
] as const;

/** Near, for a model; yet never one vector. */
const differing = [
  ["Turn on the light.", "Turn off the light."],
  ["Please increase the order.", "Please decrease the order."],
  ["How do I enable my account?", "How do I disable my account?"],
] as const;

/** Closer is the same vector, but for rounding. */
const SAME_COSINE = 1 - 1e-6;

export type SelfTest = {
  /** What is wrong, in words; undefined when all is well. */
  readonly problem: string | undefined;
  /** 0: no vector came. */
  readonly dimension: number;
  /** Cosines, as far as the test went. */
  readonly pairs: readonly { question: string; paraphrase: number; unrelated: number }[];
  readonly differing: readonly { texts: readonly [string, string]; cosine: number }[];
  /** Of the first question: to compare with, later. */
  readonly first: Float32Array;
};

/**
 * @param dimension as configured; undefined: whatever comes.
 * @throws EmbedderError when the embedder does not answer.
 */
export async function selfTest(
  embed: (texts: readonly string[]) => Promise<readonly TextVector[]>,
  dimension?: number,
): Promise<SelfTest> {
  const pairTexts = pairs.flatMap((pair) => [pair.question, pair.paraphrase, pair.unrelated]);
  const texts = [...pairTexts, ...differing.flat()];
  const vectors = new Map<string, Float32Array>();
  let wanted = dimension;
  const test = { dimension: 0, pairs: [], differing: [], first: new Float32Array() };
  for (let from = 0; from < texts.length; from += 5) {
    const batch = texts.slice(from, from + 5);
    const results = await embed(batch);
    for (const [index, text] of batch.entries()) {
      const vector = results[index];
      if (vector === undefined)
        return { ...test, problem: "fewer vectors came than were asked for" };
      if (typeof vector === "string") {
        return { ...test, problem: `no vector for ${JSON.stringify(text)} (${vector})` };
      }
      wanted ??= vector.length;
      const wrong = vector.length === 0 ? "a vector is empty" : wrongVector(vector, wanted);
      if (wrong !== undefined) return { ...test, dimension: vector.length, problem: wrong };
      vectors.set(text, vector);
    }
  }
  const cosine = (a: string, b: string): number =>
    dot(vectors.get(a) ?? test.first, vectors.get(b) ?? test.first);
  const measured = {
    dimension: wanted ?? 0,
    first: vectors.get(pairs[0].question) ?? test.first,
    pairs: pairs.map(({ question, paraphrase, unrelated }) => ({
      question,
      paraphrase: cosine(question, paraphrase),
      unrelated: cosine(question, unrelated),
    })),
    differing: differing.map((pair) => ({ texts: pair, cosine: cosine(pair[0], pair[1]) })),
  };
  return { ...measured, problem: problemOf(measured) };
}

function problemOf({
  pairs,
  differing,
}: Pick<SelfTest, "pairs" | "differing">): string | undefined {
  const cosines = [
    ...pairs.map(({ unrelated }) => unrelated),
    ...differing.map(({ cosine }) => cosine),
  ];
  if (cosines.every((cosine) => cosine >= SAME_COSINE)) return "every text gets the same vector";
  for (const { texts, cosine } of differing) {
    if (cosine < SAME_COSINE) continue;
    return `${JSON.stringify(texts[0])} and ${JSON.stringify(texts[1])} get the same vector`;
  }
  for (const { question, paraphrase, unrelated } of pairs) {
    if (paraphrase > unrelated) continue;
    return (
      `${JSON.stringify(question)} is no nearer to the same question in other words ` +
      `(${paraphrase.toFixed(3)}) than to another one (${unrelated.toFixed(3)})`
    );
  }
  return undefined;
}
