/**
 * How surprising one peer's silence is: the phi-accrual detector (Hayashibara 2004), with Pekko's approximation of
 * the normal distribution. Pure.
 *
 *   y = (silence − mean) / σ     phi = −log10 P(a heartbeat still comes) ≈ −log10(e / (1 + e)),
 *                                e = exp(−y·(1.5976 + 0.070566·y²))
 *
 * `mean` is the mean interval of the last heartbeats and the pause that is accepted on top. With a heartbeat every
 * 250 ms, a pause of 1.5 s and σ of at least 50 ms, phi passes 8 (one false alarm in 10⁸) after 2.0 s of silence.
 * Mean and σ are held within bounds, so that a bad hour does not make the detector slow: at worst 2.6 s.
 */
export type PhiOptions = {
  /** Interval at which the peer sends, ms. */
  heartbeatMs: number;
  /** Silence beyond the usual interval that is no cause for suspicion, ms. */
  pauseMs: number;
  /** Least standard deviation assumed, ms. */
  sigmaMsMin: number;
};

/** Intervals remembered: 8 s of heartbeats. */
const SAMPLES_MAX = 32;
/** The mean is taken as at most so many usual intervals, σ as at most so many times its least. */
const MEAN_MAX = 2;
const SIGMA_MAX = 2;

export class PhiDetector {
  readonly #options: PhiOptions;
  readonly #intervals = new Float64Array(SAMPLES_MAX);
  #count = 0;
  #heardAtMs: number;

  /** Counts as heard from now. */
  constructor(options: PhiOptions, nowMs: number) {
    this.#options = options;
    this.#heardAtMs = nowMs;
  }

  get heardAtMs(): number {
    return this.#heardAtMs;
  }

  heard(nowMs: number): void {
    this.#intervals[this.#count++ % SAMPLES_MAX] = nowMs - this.#heardAtMs;
    this.#heardAtMs = nowMs;
  }

  /** The present interval says nothing about the peer: we were not looking. It starts anew. */
  discard(nowMs: number): void {
    this.#heardAtMs = nowMs;
  }

  /** 0…Infinity. @param widenMs added to the pause: our own event loop, or the peer's, runs late. */
  phi(nowMs: number, widenMs: number): number {
    const { pauseMs } = this.#options;
    const { meanMs, sigmaMs } = this.#usual();
    const y = (nowMs - this.#heardAtMs - meanMs - pauseMs - widenMs) / sigmaMs;
    const e = Math.exp(-y * (1.5976 + 0.070566 * y * y));
    return y > 0 ? -Math.log10(e / (1 + e)) : -Math.log10(1 - 1 / (1 + e));
  }

  #usual(): { meanMs: number; sigmaMs: number } {
    const { heartbeatMs, sigmaMsMin } = this.#options;
    const count = Math.min(this.#count, SAMPLES_MAX);
    if (count === 0) return { meanMs: heartbeatMs, sigmaMs: sigmaMsMin };
    let sum = 0;
    let squares = 0;
    for (let index = 0; index < count; index++) {
      const intervalMs = this.#intervals[index] ?? 0;
      sum += intervalMs;
      squares += intervalMs * intervalMs;
    }
    const meanMs = sum / count;
    const sigmaMs = Math.sqrt(Math.max(0, squares / count - meanMs * meanMs));
    return {
      meanMs: Math.min(heartbeatMs * MEAN_MAX, Math.max(heartbeatMs, meanMs)),
      sigmaMs: Math.min(sigmaMsMin * SIGMA_MAX, Math.max(sigmaMsMin, sigmaMs)),
    };
  }
}
