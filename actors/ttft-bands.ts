/**
 * Time to first token by size of prompt, per model: what "too long without a first token" means. Pure.
 *
 * A band is a power of two of prompt tokens. Each keeps its last 128 samples; quantiles are exact over them
 * and recomputed every 16 samples, so that a request costs no sort.
 */
const SAMPLES_MAX = 128;
const RECOMPUTE_EVERY = 16;
const BANDS = 20; // 2^19 tokens and more share the last band.
const MODELS_MAX = 256;

type Band = { samples: number[]; next: number; since: number; p50: number; p95: number };

export class TtftBands {
  readonly #models = new Map<string, (Band | undefined)[]>();

  record(model: string, promptTokens: number, ttftMs: number): void {
    let bands = this.#models.get(model);
    if (bands === undefined) {
      if (this.#models.size >= MODELS_MAX) return;
      bands = new Array<Band | undefined>(BANDS).fill(undefined);
      this.#models.set(model, bands);
    }
    const index = bandOf(promptTokens);
    const band = bands[index] ?? { samples: [], next: 0, since: 0, p50: 0, p95: 0 };
    bands[index] = band;
    band.samples[band.next] = ttftMs;
    band.next = (band.next + 1) % SAMPLES_MAX;
    band.since++;
    if (band.since < RECOMPUTE_EVERY) return;
    band.since = 0;
    const sorted = [...band.samples].sort((a, b) => a - b);
    band.p50 = sorted[Math.floor(sorted.length * 0.5)] ?? 0;
    band.p95 = sorted[Math.floor(sorted.length * 0.95)] ?? 0;
  }

  /** 0 until 16 samples of the band are known. */
  p95Ms(model: string, promptTokens: number): number {
    return this.#models.get(model)?.[bandOf(promptTokens)]?.p95 ?? 0;
  }

  p50Ms(model: string, promptTokens: number): number {
    return this.#models.get(model)?.[bandOf(promptTokens)]?.p50 ?? 0;
  }
}

function bandOf(promptTokens: number): number {
  return Math.min(BANDS - 1, 31 - Math.clz32(Math.max(1, promptTokens)));
}
