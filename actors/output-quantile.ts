/**
 * How long answers have been of late, by model: what a request without a stated length will probably take. Pure.
 *
 * Of each model the last 64 lengths are kept; their 90th percentile is exact, and recomputed at every eighth,
 * so that a request costs no sort.
 */
const SAMPLES_MAX = 64;
const RECOMPUTE_EVERY = 8;
/** A further model takes the place of the one that was met first. */
const MODELS_MAX = 16;

type Recent = { readonly samples: Float64Array; count: number; p90: number | undefined };

const sorted = new Float64Array(SAMPLES_MAX);

export class OutputQuantile {
  readonly #models = new Map<string, Recent>();

  /** `outputTokens` ≥ 0. */
  record(model: string, outputTokens: number): void {
    let recent = this.#models.get(model);
    if (recent === undefined) {
      if (this.#models.size >= MODELS_MAX) {
        const oldest = this.#models.keys().next();
        if (!oldest.done) this.#models.delete(oldest.value);
      }
      recent = { samples: new Float64Array(SAMPLES_MAX), count: 0, p90: undefined };
      this.#models.set(model, recent);
    }
    recent.samples[recent.count % SAMPLES_MAX] = outputTokens;
    recent.count++;
    if (recent.count % RECOMPUTE_EVERY !== 0) return;
    const size = Math.min(recent.count, SAMPLES_MAX);
    sorted.set(recent.samples);
    recent.p90 = sorted.subarray(0, size).sort()[Math.ceil(0.9 * size) - 1];
  }

  /** 90 of 100 recent answers had at most so many tokens; absent until eight are known. */
  p90(model: string): number | undefined {
    return this.#models.get(model)?.p90;
  }
}
