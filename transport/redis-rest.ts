/**
 * Whether Redis is worth asking just now. One that answers too late is left alone for a while (250 ms, doubling to
 * 5 s), after which one lookup alone tries, so that a Redis that hangs does not delay every request. Not being
 * connected is another matter: whoever asks looks at that first.
 */

const REST_MS = 250;
const REST_MS_MAX = 5000;

/** resting: not asked. late: no reply in time. failed: refused, or the connection broke. */
export type Unanswered = "resting" | "late" | "failed";

export class Rest {
  #untilMs = 0; // 0: awake.
  #nextMs = REST_MS; // The next rest.
  #trying = false; // One lookup is out to see whether the rest can end.

  get isOn(): boolean {
    return this.#untilMs > 0;
  }

  /** Runs what asks Redis and calls `end` once: at once, when Redis has replied, or when the time is over. */
  ask<T>(
    timeoutMs: number,
    run: () => Promise<T>,
    end: (got: { value: T } | Unanswered) => void,
  ): void {
    if (!this.#mayAsk()) return end("resting");
    let open = true;
    const timer = setTimeout(() => {
      open = false;
      this.#begin();
      end("late");
    }, timeoutMs);
    const close = (): boolean => {
      if (!open) return false; // Late: that has been told.
      open = false;
      clearTimeout(timer);
      return true;
    };
    run().then(
      (value) => {
        if (!close()) return;
        this.end();
        end({ value });
      },
      () => {
        if (!close()) return;
        this.#trying = false; // The next lookup sees.
        end("failed");
      },
    );
  }

  /** Redis has answered, or is connected anew. */
  end(): void {
    this.#trying = false;
    this.#untilMs = 0;
    this.#nextMs = REST_MS;
  }

  #mayAsk(): boolean {
    if (this.#untilMs === 0) return true;
    if (this.#trying || performance.now() < this.#untilMs) return false;
    this.#trying = true;
    return true;
  }

  #begin(): void {
    // Lookups that were out together end together: they are one reason to rest, not many.
    if (this.#untilMs > 0 && !this.#trying) return;
    this.#trying = false;
    this.#untilMs = performance.now() + withJitter(this.#nextMs);
    this.#nextMs = Math.min(REST_MS_MAX, this.#nextMs * 2);
  }
}

/** Cut by up to a half, so that many gateways do not come back at once. */
export function withJitter(ms: number): number {
  return ms * (0.5 + Math.random() / 2);
}
