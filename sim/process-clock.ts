/**
 * The clock of one simulated process: true time, until something is wrong with it. It may jump ahead, and run faster
 * or slower than time; what it gained or lost stays, since a monotonic clock never goes back.
 *
 * Its timers are due by its own time. While nothing has been wrong it says and does exactly what the simulation's
 * clock does, in the same order. It owns the timers that are pending on it.
 */
import type { Clock, SimClock, TimerHandle } from "../runtime/clock.ts";

/** Products of whole µs and a rate end a hair below the whole number they stand for. */
const ROUNDING_US = 1e-6;

class OwnTimer implements TimerHandle {
  readonly atUs: number;
  readonly fn: () => void;
  handle: TimerHandle | undefined = undefined;

  constructor(atUs: number, fn: () => void) {
    this.atUs = atUs;
    this.fn = fn;
  }
}

export class ProcessClock implements Clock {
  readonly #time: SimClock;
  /** In the order in which they were set. */
  readonly #pending = new Set<OwnTimer>();
  #rate = 1;
  /** Own time at true time `#sinceUs`. */
  #ownUs = 0;
  #sinceUs = 0;

  constructor(time: SimClock) {
    this.#time = time;
  }

  nowUs(): number {
    const trueUs = this.#time.nowUs() - this.#sinceUs;
    return this.#ownUs + (this.#rate === 1 ? trueUs : whole(trueUs * this.#rate));
  }

  schedule(afterUs: number, fn: () => void): TimerHandle {
    const timer = new OwnTimer(this.nowUs() + afterUs, fn);
    this.#arm(timer, this.#trueUs(afterUs));
    this.#pending.add(timer);
    return timer;
  }

  cancel(handle: TimerHandle): void {
    if (!(handle instanceof OwnTimer) || !this.#pending.delete(handle)) return;
    if (handle.handle !== undefined) this.#time.cancel(handle.handle);
  }

  /** It jumps ahead by `us`, ≥ 0; timers due by then fire at once. */
  jump(us: number): void {
    this.#rebase(this.nowUs() + us, this.#rate);
  }

  /** From now on it runs `rate` times as fast as time, > 0; 1 = right. */
  setRate(rate: number): void {
    if (rate !== this.#rate) this.#rebase(this.nowUs(), rate);
  }

  #rebase(ownUs: number, rate: number): void {
    this.#ownUs = ownUs;
    this.#sinceUs = this.#time.nowUs();
    this.#rate = rate;
    for (const timer of this.#pending) {
      if (timer.handle !== undefined) this.#time.cancel(timer.handle);
      this.#arm(timer, this.#trueUs(Math.max(0, timer.atUs - ownUs)));
    }
  }

  #arm(timer: OwnTimer, afterUs: number): void {
    timer.handle = this.#time.schedule(afterUs, () => {
      this.#pending.delete(timer);
      timer.fn();
    });
  }

  #trueUs(ownUs: number): number {
    return this.#rate === 1 ? ownUs : Math.ceil(ownUs / this.#rate);
  }
}

function whole(us: number): number {
  return Math.floor(us + ROUNDING_US);
}
