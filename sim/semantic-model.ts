/**
 * The semantic lookup as a simulation models it: what a request would find beside its own words.
 *
 * A load says of each request which original question it belongs to (`cluster`) and how it relates to it
 * (`similarity`); a number is drawn within the bounds of that class, by the request's own text and the seed, so that
 * one text always has one place. Two wordings of one cluster are as similar as the product of theirs: what sets each
 * apart from the original is taken to point another way than what sets the other apart.
 *
 * It knows what was stored, and forgets only beyond its bounds: expiry and eviction are the cache's, which it only points into. It
 * embeds nothing and has none of the guards that look at words.
 */
import { Random } from "../runtime/random.ts";
import type { Similarity, TraceRequest } from "./trace-rows.ts";

/** Stands where the lookup by meaning stands: between a request and the cache. */
export interface SemanticLookup {
  /** Between a request's arrival and the answer of the lookup, µs of simulated time. */
  readonly lookupUs: number;
  /** What is found for a request; undefined when nothing is near enough. */
  find(request: TraceRequest): Found | undefined;
  /** The answer to this very request is in the cache from now on. */
  stored(request: TraceRequest): void;
}

/** A stored question, whose answer the request gets. `isWrong`: another answer would have been right. */
export type Found = { question: string; isWrong: boolean };

/** Bounds of the cosine similarity to the original, by class; drawn evenly between them. */
export const similarityBounds: Readonly<Record<Similarity, readonly [number, number]>> = {
  exact: [1, 1],
  close: [0.95, 1],
  loose: [0.9, 0.95],
  lookalike: [0.8, 0.96],
};

/**
 * Embedding a short question and searching, µs: what the transformer model of the article takes on one core with
 * up to 25 tokens, with the hop to the shard.
 */
const LOOKUP_US = 12_000;
/** Clusters, and stored wordings of one; the oldest is forgotten first. */
const CLUSTERS_MAX = 200_000;
const WORDINGS_MAX = 64;

type Wording = { question: string; similarity: number; answer: string };

export class SimilarityClasses implements SemanticLookup {
  readonly lookupUs = LOOKUP_US;
  readonly #threshold: number;
  readonly #seed: number | string;
  /** Stored wordings by cluster. */
  readonly #stored = new Map<string, Wording[]>();

  /** @param threshold least similarity of a hit, 0..1 */
  constructor(threshold: number, seed: number | string) {
    if (!(threshold > 0 && threshold <= 1)) {
      throw new RangeError(`threshold is ${threshold}; it must be above 0 and at most 1`);
    }
    this.#threshold = threshold;
    this.#seed = seed;
  }

  find(request: TraceRequest): Found | undefined {
    const own = this.#wordingOf(request);
    const wordings = this.#stored.get(request.cluster ?? "");
    if (own === undefined || wordings === undefined) return undefined;
    let best: Wording | undefined;
    let nearest = 0;
    for (const wording of wordings) {
      const isSame = wording.question === own.question;
      const similarity = isSame ? 1 : own.similarity * wording.similarity;
      if (similarity < this.#threshold || similarity <= nearest) continue;
      best = wording;
      nearest = similarity;
    }
    if (best === undefined) return undefined;
    return { question: best.question, isWrong: best.answer !== own.answer };
  }

  stored(request: TraceRequest): void {
    const { cluster } = request;
    const own = this.#wordingOf(request);
    if (own === undefined || cluster === undefined) return;
    const wordings = this.#stored.get(cluster) ?? [];
    if (wordings.some(({ question }) => question === own.question)) return;
    wordings.push(own);
    if (wordings.length > WORDINGS_MAX) wordings.shift();
    this.#stored.set(cluster, wordings);
    if (this.#stored.size <= CLUSTERS_MAX) return;
    const oldest = this.#stored.keys().next();
    if (!oldest.done) this.#stored.delete(oldest.value);
  }

  /** Undefined where the load does not say what is asked. */
  #wordingOf({ cluster, question, similarity }: TraceRequest): Wording | undefined {
    if (cluster === undefined || question === undefined) return undefined;
    const [least, most] = similarityBounds[similarity ?? "exact"];
    const drawn = new Random(`${this.#seed} ${question}`).next();
    return {
      question,
      similarity: least + (most - least) * drawn,
      answer: similarity === "lookalike" ? question : cluster,
    };
  }
}
