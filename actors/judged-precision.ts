/**
 * What judged answers say about semantic hits: intervals for a share, the false-hit rate of a shadow period by band of
 * similarity, and the switch that turns hits off when too few are right, and on again.
 *
 * Pure: no clock, no randomness; everything turns into plain data and back, for a store that several processes share.
 */

/** One-sided 95 % quantile of the normal law, as [semantic-cache reference, section 9.2] uses it. */
export const Z_ONE_SIDED = 1.645;
/** Two-sided 95 %. */
export const Z_TWO_SIDED = 1.96;

/** Lower end of Wilson's interval for a share of `good` in `total`, 0 ≤ good ≤ total; 0 for none. */
export function wilsonLower(good: number, total: number, z: number = Z_ONE_SIDED): number {
  if (total === 0) return 0;
  const share = good / total;
  const square = z * z;
  const spread = z * Math.sqrt((share * (1 - share)) / total + square / (4 * total * total));
  return Math.max(0, (share + square / (2 * total) - spread) / (1 + square / total));
}

/** A share with its interval. */
export type Share = {
  readonly count: number;
  readonly total: number;
  /** count ÷ total; 0 for none. */
  readonly share: number;
  /** Wilson, two-sided 95 %; 0 to 1 for none. */
  readonly low: number;
  readonly high: number;
};

/** `count` of `total` with its two-sided 95 % interval. */
export function shareOf(count: number, total: number): Share {
  return {
    count,
    total,
    share: total === 0 ? 0 : count / total,
    low: wilsonLower(count, total, Z_TWO_SIDED),
    high: total === 0 ? 1 : 1 - wilsonLower(total - count, total, Z_TWO_SIDED),
  };
}

/** Bands of similarity are 0.01 wide: band 92 is 0.92 to below 0.93, 100 is 1 alone. */
export const BAND_MAX = 100;

/**
 * The band of a similarity, 0 to 100. Rounded to 3 decimals first: 0.93 must not fall below its own band because 0.93
 * is no binary fraction.
 */
export function bandOf(similarity: number): number {
  const band = Math.floor(Math.round(similarity * 1000) / 10);
  return Math.min(BAND_MAX, Math.max(0, band));
}

// ---- shadow ---------------------------------------------------------------------------------------------------

/** How a would-be hit compared with the real answer; "unjudged": no judge, or it failed. */
export type ShadowVerdict = "right" | "wrong" | "unjudged";

/** What a shadow period has shown. */
export type ShadowSummary = {
  readonly lookups: number;
  /** Would-be hits among the lookups, judged or not. */
  readonly hits: Share;
  /** False ones among the judged would-be hits. */
  readonly falseHits: Share;
  readonly unjudged: number;
  /** Bands with a would-be hit, upwards. */
  readonly bands: readonly { readonly from: number; readonly falseHits: Share }[];
};

/** Counts of ShadowStats: [band, right, wrong, unjudged] for each band that has any. */
export type ShadowData = {
  readonly misses: number;
  readonly bands: readonly (readonly [number, number, number, number])[];
};

/** Would-be hits of a shadow period: nobody was served one, each was compared with the real answer. */
export class ShadowStats {
  #misses = 0;
  /** right, wrong, unjudged by band; at most 101 bands. */
  readonly #bands = new Map<number, [right: number, wrong: number, unjudged: number]>();

  /** A lookup that found nothing it would have served. */
  miss(): void {
    this.#misses++;
  }

  /** A lookup that would have served an entry of this similarity. */
  wouldHit(similarity: number, verdict: ShadowVerdict): void {
    const band = bandOf(similarity);
    const counts = this.#bands.get(band) ?? [0, 0, 0];
    counts[verdict === "right" ? 0 : verdict === "wrong" ? 1 : 2]++;
    this.#bands.set(band, counts);
  }

  /** The whole period; intervals are 95 % and hold for each figure alone. */
  summary(): ShadowSummary {
    const bands = [...this.#bands].sort(([left], [right]) => left - right);
    const sum = [0, 0, 0] as [number, number, number];
    for (const [, counts] of bands) for (const at of [0, 1, 2] as const) sum[at] += counts[at];
    const [right, wrong, unjudged] = sum;
    const hits = right + wrong + unjudged;
    return {
      lookups: hits + this.#misses,
      hits: shareOf(hits, hits + this.#misses),
      falseHits: shareOf(wrong, right + wrong),
      unjudged,
      bands: bands.map(([band, [good, bad]]) => ({
        from: band / 100,
        falseHits: shareOf(bad, good + bad),
      })),
    };
  }

  /** Plain data for a store. */
  toData(): ShadowData {
    return {
      misses: this.#misses,
      bands: [...this.#bands].map(([band, counts]) => [band, ...counts] as const),
    };
  }

  /** From a store, or undefined where the data is none of ours. */
  static fromData(data: unknown): ShadowStats | undefined {
    const { misses, bands } = (data ?? {}) as Partial<ShadowData>;
    if (!isCount(misses) || !Array.isArray(bands)) return undefined;
    const stats = new ShadowStats();
    stats.#misses = misses;
    for (const row of bands as unknown[]) {
      if (!Array.isArray(row) || row.length !== 4 || !row.every(isCount)) return undefined;
      const [band = 0, right = 0, wrong = 0, unjudged = 0] = row as number[];
      if (band > BAND_MAX) return undefined;
      stats.#bands.set(band, [right, wrong, unjudged]);
    }
    return stats;
  }
}

/** A whole number of things: what counts in a store must be. */
export function isCount(value: unknown): value is number {
  return typeof value === "number" && Number.isSafeInteger(value) && value >= 0;
}

// ---- switch ---------------------------------------------------------------------------------------------------

/** on: semantic hits are served. off: they are only judged, as in shadow mode. */
export type SwitchState = "on" | "off";

/** A switch as a store keeps it; outcomes are "1" right and "0" wrong, oldest first. */
export type SwitchData = { readonly state: SwitchState; readonly outcomes: string };

/** Newest outcomes that count: what was right a month ago says little about today's entries. */
export const OUTCOMES_MAX = 1000;
/** Of the way from the target to 1 that the bound must go beyond it before hits come back. */
const RETURN_SHARE = 0.2;

/**
 * Turns semantic hits off when they cannot be shown to be right often enough, and on again when they can.
 *
 * off: Wilson's lower bound of the judged precision, one-sided 95 %, is under the target, from so many outcomes on that
 * a record without an error would be above. on again: the bound over outcomes since then is a fifth of the way from the
 * target to 1 above it, so that one more wrong answer does not turn it off at once. While it is off, would-be hits must
 * go on being judged: that is the way back. Outcomes should be a random sample of hits; complaints alone make it stricter.
 */
export class PrecisionSwitch {
  readonly #target: number;
  #state: SwitchState = "on";
  /** Ring of outcomes since the last change of state. */
  readonly #outcomes: boolean[] = [];
  #oldest = 0;
  #right = 0;

  /** `target`: share of right hits, 0 < target < 1. Throws RangeError for others (a bug of the caller). */
  constructor(target: number) {
    if (!(target > 0 && target < 1))
      throw new RangeError(`target is ${target}, not within 0 and 1`);
    this.#target = target;
  }

  get state(): SwitchState {
    return this.#state;
  }

  /** Judged hits since the last change of state, with the bound that decides. */
  get judged(): { readonly right: number; readonly total: number; readonly lowerBound: number } {
    const total = this.#outcomes.length;
    return { right: this.#right, total, lowerBound: wilsonLower(this.#right, total) };
  }

  /** Records a judged hit (served or would-be); returns the new state where it changed. */
  add(isRight: boolean): SwitchState | undefined {
    this.#push(isRight);
    const { total, lowerBound } = this.judged;
    const next = this.#state === "on" ? "off" : "on";
    const bar = next === "off" ? this.#target : this.#target + RETURN_SHARE * (1 - this.#target);
    const isDue = next === "off" ? lowerBound < bar : lowerBound >= bar;
    if (!isDue || total < outcomesNeeded(bar)) return undefined;
    this.#become(next);
    return next;
  }

  #push(isRight: boolean): void {
    if (this.#outcomes.length < OUTCOMES_MAX) this.#outcomes.push(isRight);
    else {
      if (this.#outcomes[this.#oldest] === true) this.#right--;
      this.#outcomes[this.#oldest] = isRight;
      this.#oldest = (this.#oldest + 1) % OUTCOMES_MAX;
    }
    if (isRight) this.#right++;
  }

  #become(state: SwitchState): void {
    this.#state = state;
    this.#outcomes.length = 0;
    this.#oldest = 0;
    this.#right = 0;
  }

  /** Plain data for a store. */
  toData(): SwitchData {
    const ordered = [
      ...this.#outcomes.slice(this.#oldest),
      ...this.#outcomes.slice(0, this.#oldest),
    ];
    return { state: this.#state, outcomes: ordered.map((right) => (right ? "1" : "0")).join("") };
  }

  /** From a store, or undefined where the data is none of ours. */
  static fromData(target: number, data: unknown): PrecisionSwitch | undefined {
    const { state, outcomes } = (data ?? {}) as Partial<SwitchData>;
    if ((state !== "on" && state !== "off") || typeof outcomes !== "string") return undefined;
    if (outcomes.length > OUTCOMES_MAX || /[^01]/.test(outcomes)) return undefined;
    const made = new PrecisionSwitch(target);
    made.#state = state;
    for (const outcome of outcomes) made.#push(outcome === "1");
    return made;
  }
}

/** Outcomes without an error after which Wilson's bound reaches `bar`: n/(n + z²) ≥ bar. */
function outcomesNeeded(bar: number): number {
  return Math.ceil((Z_ONE_SIDED * Z_ONE_SIDED * bar) / (1 - bar));
}
