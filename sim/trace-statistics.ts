/**
 * What a load looks like: its rate and how bursty it is, and how long prompts and answers are.
 *
 * One pass, memory by distinct token counts only. CV alone hides drift and daily cycles, so the index of
 * dispersion is given at two time scales; a Poisson process has CV = IDC = 1 at every scale.
 */
import type { TraceRequest } from "./trace-rows.ts";

export type LoadStatistics = {
  requests: number;
  /** From the first arrival to the last. */
  durationUs: number;
  /** Requests ÷ duration; absent while the duration is 0. */
  ratePerSecond?: number;
  /** Requests in the fullest whole second and, per second, in the fullest whole minute. */
  peakSecondPerSecond?: number;
  peakMinutePerSecond?: number;
  /** Standard deviation ÷ mean of the gaps between arrivals. */
  cv?: number;
  /** Variance ÷ mean of arrivals in whole windows of 1 s and of 60 s, empty ones included. */
  idc1s?: number;
  idc60s?: number;
  inputTokens: TokenStatistics;
  outputTokens: TokenStatistics;
};

/** Quantiles are linear between neighbours, at (count − 1) · p. */
export type TokenStatistics = { mean: number; p50: number; p90: number; p99: number; max: number };

export async function summarizeLoad(
  requests: AsyncIterable<TraceRequest> | Iterable<TraceRequest>,
): Promise<LoadStatistics> {
  const meter = new LoadMeter();
  for await (const request of requests) meter.add(request);
  return meter.summary();
}

/** Takes requests in order of arrival. */
export class LoadMeter {
  #requests = 0;
  #firstUs = 0;
  #lastUs = 0;
  /** Welford's running mean and sum of squares of the gaps, µs. */
  #gapMean = 0;
  #gapSquares = 0;
  readonly #seconds = new WindowCounts(1_000_000);
  readonly #minutes = new WindowCounts(60_000_000);
  readonly #input = new TokenCounts();
  readonly #output = new TokenCounts();

  add(request: TraceRequest): void {
    if (this.#requests === 0) this.#firstUs = request.atUs;
    else {
      const gap = request.atUs - this.#lastUs;
      const before = gap - this.#gapMean;
      this.#gapMean += before / this.#requests;
      this.#gapSquares += before * (gap - this.#gapMean);
    }
    this.#requests++;
    this.#lastUs = request.atUs;
    this.#seconds.add(request.atUs - this.#firstUs);
    this.#minutes.add(request.atUs - this.#firstUs);
    this.#input.add(request.inputTokens);
    this.#output.add(request.outputTokens);
  }

  summary(): LoadStatistics {
    const durationUs = this.#lastUs - this.#firstUs;
    const gaps = this.#requests - 1;
    const seconds = this.#seconds.summary();
    const minutes = this.#minutes.summary();
    return {
      requests: this.#requests,
      durationUs,
      ...(durationUs > 0 && {
        ratePerSecond: (this.#requests * 1_000_000) / durationUs,
        cv: Math.sqrt(this.#gapSquares / gaps) / this.#gapMean,
      }),
      ...(seconds !== undefined && { peakSecondPerSecond: seconds.max, idc1s: seconds.idc }),
      ...(minutes !== undefined && { peakMinutePerSecond: minutes.max / 60, idc60s: minutes.idc }),
      inputTokens: this.#input.summary(),
      outputTokens: this.#output.summary(),
    };
  }
}

/** Arrivals by window of time; the last window, not yet whole, does not count. */
class WindowCounts {
  readonly #windowUs: number;
  #index = 0;
  #current = 0;
  #sum = 0;
  #squares = 0;
  #max = 0;

  constructor(windowUs: number) {
    this.#windowUs = windowUs;
  }

  add(sinceFirstUs: number): void {
    const index = Math.floor(sinceFirstUs / this.#windowUs);
    if (index > this.#index) {
      this.#sum += this.#current;
      this.#squares += this.#current * this.#current;
      this.#max = Math.max(this.#max, this.#current);
      this.#index = index; // Windows between were empty: they count, and add nothing to the sums.
      this.#current = 0;
    }
    this.#current++;
  }

  summary(): { max: number; idc: number } | undefined {
    if (this.#index === 0 || this.#sum === 0) return undefined;
    const mean = this.#sum / this.#index;
    return { max: this.#max, idc: (this.#squares / this.#index - mean * mean) / mean };
  }
}

/** Counts below this are kept exactly, larger ones to 1 part in 4,096: that bounds the memory. */
const EXACT_BELOW = 262_144;

class TokenCounts {
  readonly #counts = new Map<number, number>();
  #count = 0;
  #sum = 0;
  #max = 0;

  add(tokens: number): void {
    let kept = tokens;
    if (tokens >= EXACT_BELOW) {
      let step = 64;
      while (tokens / step >= 8192) step *= 2;
      kept = Math.floor(tokens / step) * step;
    }
    this.#counts.set(kept, (this.#counts.get(kept) ?? 0) + 1);
    this.#count++;
    this.#sum += tokens;
    this.#max = Math.max(this.#max, tokens);
  }

  summary(): TokenStatistics {
    const values = [...this.#counts.keys()].sort((left, right) => left - right);
    const at = (rank: number): number => {
      let seen = 0;
      for (const value of values) {
        seen += this.#counts.get(value) ?? 0;
        if (rank < seen) return value;
      }
      return this.#max;
    };
    const quantile = (p: number): number => {
      const rank = Math.max(0, this.#count - 1) * p;
      const lower = at(Math.floor(rank));
      return lower + (at(Math.ceil(rank)) - lower) * (rank - Math.floor(rank));
    };
    return {
      mean: this.#count === 0 ? 0 : this.#sum / this.#count,
      p50: quantile(0.5),
      p90: quantile(0.9),
      p99: quantile(0.99),
      max: this.#max,
    };
  }
}
