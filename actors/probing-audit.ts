/**
 * How many hits does probing lose, and how wide should it be? Measured on live traffic, by asking every owner again
 * for a small share of the lookups that missed.
 *
 * Of `audits` misses that were looked at, `lost` had an answer on an owner that was not probed; so of all misses so
 * many in proportion had, and recall = hits ÷ (hits + misses · lost/audits). An interval for lost/audits (Wilson, 95 %
 * on each side) gives one for recall. When even the better end of it loses more than allowed, z is raised by a step;
 * when even the worse end loses less than half of that, z is lowered by half a step, but not to where it lost too
 * much before. After a change the count begins anew, and old counts fade, so that the figure is of now. Pure.
 */
import { assert, unreachable } from "../runtime/actor.ts";

/**
 * How a sharded lookup ended: `hit`; `miss`, not looked at again; `confirmed`: a miss, and every owner was asked, and
 * none had an answer; `lost`: a miss, and an owner that was not probed had one.
 */
export type ProbingOutcome = "hit" | "miss" | "confirmed" | "lost";

/** See `ProbingAudit.estimate`; shares, 0 to 1. */
export type RecallEstimate = {
  audits: number;
  lost: number;
  recall: number;
  /** Ends of the interval: recall is under `low` in 5 % of cases, and above `high` in 5 %. */
  low: number;
  high: number;
};

/** Quantile of the normal distribution at 95 %. */
const Z_95 = 1.645;
const WIDEN_STEP = 1;
const NARROW_STEP = 0.5;
/** Beyond this many audits all counts are halved. */
const AUDITS_MAX = 20_000;

/** Options and meaning at the head of this file. */
export class ProbingAudit {
  readonly #zMin: number;
  readonly #zMax: number;
  readonly #lossMax: number;
  readonly #auditShare: number;
  #z: number;
  /** The widest z that lost too much. */
  #lossyZ = Number.NEGATIVE_INFINITY;
  #hits = 0;
  #misses = 0;
  #audits = 0;
  #lost = 0;
  #lostEver = 0;

  /**
   * `z` to begin with, from `zMin` to `zMax`; `lossMax`: the share of hits that may be lost, 0 to 1, default 0.005;
   * `auditShare` of misses that are asked for again, 0 to 1, default 0.005.
   */
  constructor(options: {
    z: number;
    zMin: number;
    zMax: number;
    lossMax?: number;
    auditShare?: number;
  }) {
    const { z, zMin, zMax, lossMax = 0.005, auditShare = 0.005 } = options;
    assert(zMin >= 0 && zMin <= z && z <= zMax, "z begins within its bounds");
    assert(lossMax > 0 && lossMax < 1, "some hits may be lost, not all");
    assert(auditShare >= 0 && auditShare <= 1, "a share is from 0 to 1");
    this.#z = z;
    this.#zMin = zMin;
    this.#zMax = zMax;
    this.#lossMax = lossMax;
    this.#auditShare = auditShare;
  }

  /** For `Centroids.owners`, now. */
  get z(): number {
    return this.#z;
  }

  /** Misses due to sharding that were seen, since the start. */
  get lost(): number {
    return this.#lostEver;
  }

  /** Whether to ask every owner about this miss; `draw` is uniform in [0, 1). */
  wantsAudit(draw: number): boolean {
    return draw < this.#auditShare;
  }

  /** One lookup that did not ask every owner from the beginning; what asked all loses nothing and is not counted. */
  record(outcome: ProbingOutcome): void {
    switch (outcome) {
      case "hit":
        this.#hits++;
        return;
      case "miss":
        this.#misses++;
        return;
      case "confirmed":
        this.#misses++;
        this.#audits++;
        return this.#adjust();
      case "lost":
        this.#misses++;
        this.#audits++;
        this.#lost++;
        this.#lostEver++;
        return this.#adjust();
      default:
        return unreachable(outcome);
    }
  }

  /** Recall of hits at the present z; before any audit everything from 0 to 1 is possible. */
  estimate(): RecallEstimate {
    const [least, most] = wilson(this.#lost, this.#audits);
    const share = this.#audits === 0 ? 0 : this.#lost / this.#audits;
    return {
      audits: this.#audits,
      lost: this.#lost,
      recall: this.#recallAt(share),
      low: this.#audits === 0 ? 0 : this.#recallAt(most),
      high: this.#recallAt(least),
    };
  }

  #recallAt(lostShare: number): number {
    const lost = this.#misses * lostShare;
    return lost === 0 ? 1 : this.#hits / (this.#hits + lost);
  }

  #adjust(): void {
    const { low, high } = this.estimate();
    if (1 - high > this.#lossMax) {
      this.#lossyZ = Math.max(this.#lossyZ, this.#z);
      this.#become(Math.min(this.#zMax, this.#z + WIDEN_STEP));
    } else if (1 - low < this.#lossMax / 2 && this.#z - NARROW_STEP > this.#lossyZ) {
      this.#become(Math.max(this.#zMin, this.#z - NARROW_STEP));
    }
    if (this.#audits <= AUDITS_MAX) return;
    this.#hits /= 2;
    this.#misses /= 2;
    this.#audits /= 2;
    this.#lost /= 2;
  }

  #become(z: number): void {
    if (z === this.#z) return;
    this.#z = z;
    this.#hits = 0;
    this.#misses = 0;
    this.#audits = 0;
    this.#lost = 0;
  }
}

/** Wilson's interval for a share of which `count` of `total` were seen, 95 % on each side. */
function wilson(count: number, total: number): [number, number] {
  if (total === 0) return [0, 1];
  const share = count / total;
  const squared = (Z_95 * Z_95) / total;
  const middle = share + squared / 2;
  const half = Z_95 * Math.sqrt((share * (1 - share)) / total + squared / (4 * total));
  return [
    Math.max(0, (middle - half) / (1 + squared)),
    Math.min(1, (middle + half) / (1 + squared)),
  ];
}
