/**
 * Verified mode: whether a stored answer may be served to a similar question, decided from labels (was it right when
 * compared?) under a stated error bound, without a random draw.
 *
 * Pure. The mathematics of [semantic-cache reference, section 9.2]: serve where a lower bound of P(right) reaches 1 − δ,
 * from the labels of the entry itself (a logistic curve over similarity, with the uncertainty of its threshold), or from
 * the labels of all entries in the same band of similarity. Otherwise explore: ask the model, compare, learn. Written
 * from the formulas; vCache's code, whose idea it is, is under another licence and none of it is here.
 *
 * One thing is added. The entry's own bound is as good as its curve: where answers are right nine times in ten whatever
 * the similarity, it serves 10 % wrong ones under any δ (measured; four right labels satisfy it at δ = 0.05). So the rule
 * "own labels say yes" has to prove itself like a band does: it serves once Wilson's bound over the labels taken when it
 * said yes reaches 1 − δ, and explores until then. It costs 268 explorations in all for δ = 0.01, 52 for 0.05.
 */
import { BAND_MAX, bandOf, isCount, wilsonLower } from "./judged-precision.ts";

/** Below this similarity verified mode never serves; a tenant may raise it. */
export const SIMILARITY_MIN = 0.92;
/** Newest labels of an entry that count; with the two below, the table of variances ends at 48. */
export const LABELS_MAX = 46;
/** An entry decides for itself from so many labels of its own. */
const OWN_LABELS_MIN = 4;
/** Added to the similarity of a wrong answer: nothing up to there is served again. */
const WRONG_MARGIN = 0.005;
/** A band of the pool, and the own-label rule, decide from so many labels. */
const BAND_LABELS_MIN = 20;
const ITERATIONS_MAX = 50;

/** Labels of an entry for a store: similarities in thousandths, and "1" right or "0" wrong for each. */
export type EvidenceData = {
  readonly thousandths: readonly number[];
  readonly labels: string;
  readonly minSimilarity: number;
};

/** What is known of one entry: at which similarity its answer was right, and where it was not. */
export class EntryEvidence {
  /** Rounded to 3 decimals; newest last, at most LABELS_MAX. */
  readonly #similarities: number[] = [];
  readonly #labels: (0 | 1)[] = [];
  #minSimilarity = 0;
  /** Of the labels held; undefined after a new one. */
  #fit: Fit | undefined;

  /**
   * Records that the entry's answer, for a question of this similarity, was right or not. Throws RangeError for a
   * similarity that is no number (a bug of the caller).
   */
  add(similarity: number, correct: boolean): void {
    const rounded = thousandths(similarity) / 1000;
    if (!Number.isFinite(rounded)) throw new RangeError(`similarity is ${similarity}`);
    if (this.#similarities.length === LABELS_MAX) {
      this.#similarities.shift();
      this.#labels.shift();
    }
    this.#similarities.push(rounded);
    this.#labels.push(correct ? 1 : 0);
    if (!correct) this.#minSimilarity = Math.max(this.#minSimilarity, rounded + WRONG_MARGIN);
    this.#fit = undefined;
  }

  /** Labels held. */
  get labels(): number {
    return this.#labels.length;
  }

  /** Below this the entry is not served any more; 0 while it was never wrong. */
  get minSimilarity(): number {
    return this.#minSimilarity;
  }

  /** A(s): lower bound of P(right) at this similarity, 0…1; 0 where the labels say nothing yet. Never falls as s rises. */
  lowerBound(similarity: number): number {
    if (this.#labels.length < OWN_LABELS_MIN) return 0;
    this.#fit ??= fitOf([0, 1, ...this.#similarities], [0, 1, ...this.#labels]);
    const { threshold, slope, variance } = this.#fit;
    if (variance === undefined) return 0;
    const at = thousandths(similarity) / 1000;
    if (Number.isNaN(at)) return 0;
    const deviation = Math.sqrt(variance);
    let best = 0;
    for (const { confidence, quantile } of CONFIDENCES) {
      const shifted = Math.min(1, Math.max(0, threshold + quantile * deviation));
      best = Math.max(best, confidence * sigmoid(slope * (at - shifted)));
    }
    return best;
  }

  /** Plain data for a store. */
  toData(): EvidenceData {
    return {
      thousandths: this.#similarities.map(thousandths),
      labels: this.#labels.join(""),
      minSimilarity: this.#minSimilarity,
    };
  }

  /** From a store, or undefined where the data is none of ours. */
  static fromData(data: unknown): EntryEvidence | undefined {
    const { thousandths: held, labels, minSimilarity } = (data ?? {}) as Partial<EvidenceData>;
    if (!Array.isArray(held) || typeof labels !== "string" || /[^01]/.test(labels))
      return undefined;
    if (held.length !== labels.length || held.length > LABELS_MAX) return undefined;
    if (!held.every((one) => Number.isInteger(one) && one >= -1000 && one <= 1000))
      return undefined;
    if (typeof minSimilarity !== "number" || !(minSimilarity >= 0 && minSimilarity <= 2)) {
      return undefined;
    }
    const evidence = new EntryEvidence();
    for (const [index, one] of held.entries()) evidence.add(one / 1000, labels[index] === "1");
    evidence.#minSimilarity = Math.max(evidence.#minSimilarity, minSimilarity);
    return evidence;
  }
}

/** Right answers among labels. */
type Tally = { right: number; labels: number };

/** Counts of a pool for a store: [right, labels] of the own-label rule, [band, right, labels] of each band with any. */
export type PoolData = {
  readonly own: readonly [right: number, labels: number];
  readonly bands: readonly (readonly [band: number, right: number, labels: number])[];
};

/** Labels of all entries of one tenant, model and embedder, by band of similarity. */
export class EvidencePool {
  /** At most 101 bands. */
  readonly #bands = new Map<number, Tally>();
  /** Labels taken when the entry's own labels said yes. */
  readonly #own: Tally = { right: 0, labels: 0 };

  /** Records a label of any entry of the pool; `ownSaidYes`: the entry's own bound had reached 1 − δ before it. */
  add(similarity: number, correct: boolean, ownSaidYes = false): void {
    const band = this.#bands.get(bandOf(similarity)) ?? { right: 0, labels: 0 };
    this.#bands.set(bandOf(similarity), band);
    for (const tally of ownSaidYes ? [band, this.#own] : [band]) {
      tally.labels++;
      if (correct) tally.right++;
    }
  }

  /** Wilson's lower bound of P(right) in the band of this similarity; 0 with fewer than 20 labels. */
  lowerBound(similarity: number): number {
    return boundOf(this.#bands.get(bandOf(similarity)));
  }

  /** The same of answers to which their entry's own labels say yes. */
  ownLowerBound(): number {
    return boundOf(this.#own);
  }

  /** Plain data for a store. */
  toData(): PoolData {
    return {
      own: [this.#own.right, this.#own.labels],
      bands: [...this.#bands].map(([band, { right, labels }]) => [band, right, labels] as const),
    };
  }

  /** From a store, or undefined where the data is none of ours. */
  static fromData(data: unknown): EvidencePool | undefined {
    const { own, bands } = (data ?? {}) as Partial<PoolData>;
    if (!isTally(own) || !Array.isArray(bands)) return undefined;
    const pool = new EvidencePool();
    [pool.#own.right, pool.#own.labels] = own;
    for (const row of bands as unknown[]) {
      if (!Array.isArray(row) || row.length !== 3) return undefined;
      const [band, ...tally] = row as unknown[];
      if (!isCount(band) || band > BAND_MAX || !isTally(tally)) return undefined;
      pool.#bands.set(band, { right: tally[0], labels: tally[1] });
    }
    return pool;
  }
}

function isTally(value: unknown): value is [right: number, labels: number] {
  if (!Array.isArray(value) || value.length !== 2) return false;
  const [right, labels] = value as unknown[];
  return isCount(right) && isCount(labels) && right <= labels;
}

function boundOf(tally: Tally | undefined): number {
  if (tally === undefined || tally.labels < BAND_LABELS_MIN) return 0;
  return wilsonLower(tally.right, tally.labels);
}

/** Why a candidate is out of the question whatever its labels say. */
export type Exclusion = "guard" | "removed" | "expired";

/** A candidate as verified mode sees it. */
export type VerifiedCase = {
  /** Cosine of question and stored question. */
  readonly similarity: number;
  /** The tenant's or the request's, when it is above SIMILARITY_MIN. */
  readonly similarityMin?: number;
  readonly entry: EntryEvidence;
  readonly pool: EvidencePool;
  /** δ: share of wrong answers among served ones that the tenant allows, 0 < δ < 1. */
  readonly errorRateMax: number;
  readonly exclusion?: Exclusion;
};

/**
 * serve: answer with the entry. explore: ask the model, then label the entry with the comparison. miss: ask the model,
 * nothing to learn. `says` is the reason, for the caller and the log.
 */
export type Decision =
  | {
      readonly kind: "serve";
      readonly by: "entry" | "pool";
      readonly lowerBound: number;
      readonly says: string;
    }
  | { readonly kind: "explore"; readonly lowerBound: number; readonly says: string }
  | {
      readonly kind: "miss";
      readonly reason: Exclusion | "similarity" | "entry_similarity";
      readonly says: string;
    };

/** Whether a candidate is served, explored or passed over. */
export function decide(candidate: VerifiedCase): Decision {
  const { similarity, similarityMin = 0, entry, pool, errorRateMax, exclusion } = candidate;
  if (exclusion !== undefined)
    return { kind: "miss", reason: exclusion, says: EXCLUDED[exclusion] };
  const least = Math.max(SIMILARITY_MIN, similarityMin);
  // Written so that NaN is a miss, too.
  if (!(similarity >= least)) {
    return {
      kind: "miss",
      reason: "similarity",
      says: `similarity ${rounded(similarity)} < ${least}`,
    };
  }
  if (similarity < entry.minSimilarity) {
    return {
      kind: "miss",
      reason: "entry_similarity",
      says: `similarity ${rounded(similarity)} < ${rounded(entry.minSimilarity)}, up to where this answer was wrong`,
    };
  }
  const needed = 1 - errorRateMax;
  const own = entry.lowerBound(similarity);
  const isTrusted = own >= needed && pool.ownLowerBound() >= needed;
  if (isTrusted) {
    return {
      kind: "serve",
      by: "entry",
      lowerBound: own,
      says: `own labels: right ≥ ${rounded(own)}`,
    };
  }
  // An entry that was wrong once has to prove itself.
  const pooled = entry.minSimilarity > 0 ? 0 : pool.lowerBound(similarity);
  if (pooled >= needed) {
    return {
      kind: "serve",
      by: "pool",
      lowerBound: pooled,
      says: `band of similarity: right ≥ ${rounded(pooled)}`,
    };
  }
  const best = own >= needed ? Math.max(pool.ownLowerBound(), pooled) : Math.max(own, pooled);
  return {
    kind: "explore",
    lowerBound: best,
    says: `right ≥ ${rounded(best)}, needed ${rounded(needed)}`,
  };
}

/**
 * Records whether the answer of a candidate was right: after an exploration, a sampled comparison of a served hit, or
 * a complaint. The caller stores the question as a new entry where it was not.
 */
export function learn(
  { similarity, entry, pool, errorRateMax }: Omit<VerifiedCase, "exclusion" | "similarityMin">,
  correct: boolean,
): void {
  const ownSaidYes = entry.lowerBound(similarity) >= 1 - errorRateMax;
  entry.add(similarity, correct);
  pool.add(similarity, correct, ownSaidYes);
}

const EXCLUDED: Readonly<Record<Exclusion, string>> = {
  guard: "a guard blocks it",
  removed: "it was removed as a bad hit",
  expired: "it has expired",
};

function rounded(value: number): string {
  return String(Math.round(value * 1000) / 1000);
}

function thousandths(similarity: number): number {
  return Math.round(similarity * 1000);
}

// ---- the curve ------------------------------------------------------------------------------------------------

/** P(right | s) = σ(slope · (s − threshold)); no variance: the labels do not determine the threshold. */
type Fit = { threshold: number; slope: number; variance: number | undefined };

/** Variance of the threshold where labels separate, for 6 … 48 labels [vCache, verified.py; reference, section 9.1]. */
const SEPARATED_VARIANCES = [
  0.035445, 0.028285, 0.026436, 0.021349, 0.019371, 0.012615, 0.011433, 0.010228, 0.009963,
  0.009253, 0.011674, 0.013015, 0.010897, 0.011841, 0.013081, 0.010585, 0.014255, 0.012058,
  0.013002, 0.011715, 0.00839, 0.008839, 0.010628, 0.009899, 0.008033, 0.00457, 0.007335, 0.008932,
  0.00729, 0.007445, 0.00761, 0.011423, 0.011233, 0.006783, 0.005233, 0.00872, 0.010005, 0.01199,
  0.00977, 0.01891, 0.01513, 0.02109, 0.01531,
] as const;
const SEPARATED_LABELS_MIN = 6;

/** Fits the curve; `xs` and `ys` with the two pseudo-labels (0, wrong) and (1, right) that hold it in place. */
function fitOf(xs: readonly number[], ys: readonly (0 | 1)[]): Fit {
  const [intercept, steepness] = maximumLikelihood(xs, ys);
  const slope = Math.max(steepness, 1e-6);
  const threshold = Math.min(1, Math.max(0, -intercept / slope));
  let leastRight = Number.POSITIVE_INFINITY;
  let mostWrong = Number.NEGATIVE_INFINITY;
  for (const [index, x] of xs.entries()) {
    if (ys[index] === 1) leastRight = Math.min(leastRight, x);
    else mostWrong = Math.max(mostWrong, x);
  }
  if (leastRight > mostWrong) {
    const last = SEPARATED_VARIANCES.length - 1;
    const variance = SEPARATED_VARIANCES[Math.min(last, xs.length - SEPARATED_LABELS_MIN)];
    return { threshold, slope, variance };
  }
  // Delta method: threshold = −intercept / slope, its gradient on both sides of the inverse of the information.
  const { h00, h01, h11 } = information(xs, intercept, steepness);
  const determinant = h00 * h11 - h01 * h01;
  if (!(determinant > 0)) return { threshold, slope, variance: undefined };
  const g0 = -1 / slope;
  const g1 = intercept / (slope * slope);
  const variance = (g0 * g0 * h11 - 2 * g0 * g1 * h01 + g1 * g1 * h00) / determinant;
  return {
    threshold,
    slope,
    variance: Number.isFinite(variance) ? Math.max(0, variance) : undefined,
  };
}

/** Newton's steps, halved while the likelihood would fall; a trace of ridge keeps separated labels finite. */
function maximumLikelihood(
  xs: readonly number[],
  ys: readonly (0 | 1)[],
): [intercept: number, slope: number] {
  let b0 = 0;
  let b1 = 0;
  let likelihood = logLikelihood(xs, ys, b0, b1);
  for (let iteration = 0; iteration < ITERATIONS_MAX; iteration++) {
    let g0 = 0;
    let g1 = 0;
    for (const [index, x] of xs.entries()) {
      const error = (ys[index] ?? 0) - sigmoid(b0 + b1 * x);
      g0 += error;
      g1 += error * x;
    }
    const { h00, h01, h11 } = information(xs, b0, b1, 1e-6);
    const determinant = h00 * h11 - h01 * h01;
    let d0 = (h11 * g0 - h01 * g1) / determinant;
    let d1 = (h00 * g1 - h01 * g0) / determinant;
    let share = 1;
    let next = logLikelihood(xs, ys, b0 + d0, b1 + d1);
    while (next < likelihood && share > 1e-4) {
      share /= 2;
      d0 /= 2;
      d1 /= 2;
      next = logLikelihood(xs, ys, b0 + d0, b1 + d1);
    }
    b0 += d0;
    b1 += d1;
    likelihood = next;
    if (Math.abs(d0) + Math.abs(d1) < 1e-6 || Math.abs(b1) > 1e4) break;
  }
  return [b0, b1];
}

/** XᵀWX of the logistic curve, with `ridge` on its diagonal. */
function information(
  xs: readonly number[],
  b0: number,
  b1: number,
  ridge = 0,
): { h00: number; h01: number; h11: number } {
  let h00 = ridge;
  let h01 = 0;
  let h11 = ridge;
  for (const x of xs) {
    const p = sigmoid(b0 + b1 * x);
    const weight = p * (1 - p);
    h00 += weight;
    h01 += weight * x;
    h11 += weight * x * x;
  }
  return { h00, h01, h11 };
}

function logLikelihood(
  xs: readonly number[],
  ys: readonly (0 | 1)[],
  b0: number,
  b1: number,
): number {
  let sum = 0;
  for (const [index, x] of xs.entries()) {
    const z = b0 + b1 * x;
    // log σ(z) = −log(1 + e^−z), without overflow for either sign.
    sum += (ys[index] === 1 ? z : 0) - (Math.max(0, z) + Math.log1p(Math.exp(-Math.abs(z))));
  }
  return sum;
}

function sigmoid(z: number): number {
  if (z >= 0) return 1 / (1 + Math.exp(-z));
  const e = Math.exp(z);
  return e / (1 + e);
}

// ---- quantiles ------------------------------------------------------------------------------------------------

/** The confidences 1 − ε over which the bound is maximised, with the normal quantile of each. */
const CONFIDENCES: readonly { confidence: number; quantile: number }[] = Array.from(
  { length: 50 },
  (_, index) => {
    const epsilon = 1e-6 + ((1 - 2e-6) * index) / 49;
    return { confidence: 1 - epsilon, quantile: normalQuantile(1 - epsilon) };
  },
);

/** Φ⁻¹, 0 < p < 1, by bisection: exact to 1e-12, and asked 50 times in the life of a process. */
function normalQuantile(p: number): number {
  let low = -10;
  let high = 10;
  for (let step = 0; step < 60; step++) {
    const middle = (low + high) / 2;
    if (normalCumulative(middle) < p) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

/** Φ by its power series around 0 for small |x| and by the continued fraction of the tail beyond. */
function normalCumulative(x: number): number {
  const density = Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI);
  if (Math.abs(x) < 3) {
    let term = x;
    let sum = x;
    for (let k = 3; k < 120; k += 2) {
      term *= (x * x) / k;
      sum += term;
    }
    return 0.5 + density * sum;
  }
  let fraction = 0;
  for (let k = 60; k >= 1; k--) fraction = k / (Math.abs(x) + fraction);
  const tail = density / (Math.abs(x) + fraction);
  return x > 0 ? 1 - tail : tail;
}
