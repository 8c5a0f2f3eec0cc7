/**
 * Time as a port: reading it, and being called back later.
 *
 * Instants are whole microseconds on a monotonic scale that starts anywhere; only differences mean
 * something. `SystemClock` follows the machine, `SimClock` moves only when told to. Both keep their
 * timers in one `TimerQueue`, ordered by (µs, sequence), so timers due at the same instant run in
 * the order they were set.
 */

/**
 * Longest accepted delay: 2⁵² µs, about 142 years; beyond it the sum with `now` would lose
 * microseconds.
 */
const DELAY_US_MAX = 2 ** 52;
/** `setTimeout` takes 32-bit milliseconds; a longer wait is served in stages. */
const ARM_MS_MAX = 2 ** 31 - 1;

/** What `schedule` returns; only good for `cancel`. */
export interface TimerHandle {
  /** When it fires, in µs of its clock. */
  readonly atUs: number;
}

export interface Clock {
  /** Monotonic whole µs. Reading never moves a simulated clock. */
  nowUs(): number;
  /**
   * Calls `fn` once, `afterUs` (whole µs, 0…2⁵²) from now, never before this call returns.
   * Throws RangeError for any other delay.
   */
  schedule(afterUs: number, fn: () => void): TimerHandle;
  /** Takes the timer out of the queue at once; no effect on one that fired or was cancelled. */
  cancel(handle: TimerHandle): void;
}

class Timer implements TimerHandle {
  readonly atUs: number;
  readonly sequence: number;
  /** Position in the heap; -1 once fired or cancelled. */
  index: number;
  readonly fn: () => void;

  constructor(atUs: number, sequence: number, index: number, fn: () => void) {
    this.atUs = atUs;
    this.sequence = sequence;
    this.index = index;
    this.fn = fn;
  }
}

function isBefore(a: Timer, b: Timer): boolean {
  return a.atUs < b.atUs || (a.atUs === b.atUs && a.sequence < b.sequence);
}

/**
 * Binary heap of timers that knows where each one lies: insert and cancel are O(log n), and a
 * cancelled timer leaves nothing behind, however far away it was due. (A wheel would be O(1) but
 * rounds, and a simulation must not round; with the few thousand timers of one process the heap
 * costs about a tenth of a µs.)
 */
export class TimerQueue {
  readonly #heap: Timer[] = [];
  #sequence = 0;

  get size(): number {
    return this.#heap.length;
  }

  /** The sequence number the next timer will get: those below it were set earlier. */
  get nextSequence(): number {
    return this.#sequence;
  }

  add(atUs: number, fn: () => void): TimerHandle {
    const timer = new Timer(atUs, this.#sequence++, this.#heap.length, fn);
    this.#heap.push(timer);
    this.#siftUp(timer);
    return timer;
  }

  remove(handle: TimerHandle): void {
    if (!(handle instanceof Timer) || handle.index < 0) return;
    if (this.#heap[handle.index] !== handle) throw new RangeError("timer belongs to another queue");
    this.#removeAt(handle.index);
  }

  /** When the earliest timer is due; undefined when there is none. */
  earliestUs(): number | undefined {
    return this.#heap[0]?.atUs;
  }

  /**
   * Takes out the earliest timer if it is due at `nowUs` and was set before `sequenceMax`; returns
   * its `fn`.
   */
  takeDue(nowUs: number, sequenceMax = Number.POSITIVE_INFINITY): (() => void) | undefined {
    const timer = this.#heap[0];
    if (timer === undefined || timer.atUs > nowUs || timer.sequence >= sequenceMax)
      return undefined;
    this.#removeAt(0);
    return timer.fn;
  }

  #removeAt(index: number): void {
    const removed = this.#heap[index];
    const last = this.#heap.pop();
    if (removed === undefined || last === undefined) return;
    removed.index = -1;
    if (removed === last) return;
    last.index = index;
    this.#heap[index] = last;
    this.#siftUp(last);
    this.#siftDown(last);
  }

  #siftUp(timer: Timer): void {
    const heap = this.#heap;
    let index = timer.index;
    while (index > 0) {
      const parentIndex = (index - 1) >> 1;
      const parent = heap[parentIndex];
      if (parent === undefined || !isBefore(timer, parent)) break;
      heap[index] = parent;
      parent.index = index;
      index = parentIndex;
    }
    heap[index] = timer;
    timer.index = index;
  }

  #siftDown(timer: Timer): void {
    const heap = this.#heap;
    let index = timer.index;
    for (;;) {
      const leftIndex = 2 * index + 1;
      const left = heap[leftIndex];
      if (left === undefined) break;
      const right = heap[leftIndex + 1];
      const child = right !== undefined && isBefore(right, left) ? right : left;
      if (!isBefore(child, timer)) break;
      const childIndex = child.index;
      heap[index] = child;
      child.index = index;
      index = childIndex;
    }
    heap[index] = timer;
    timer.index = index;
  }
}

function checkDelay(afterUs: number): void {
  if (!Number.isInteger(afterUs) || afterUs < 0 || afterUs > DELAY_US_MAX) {
    throw new RangeError(`delay must be whole µs from 0 to 2^52, got ${afterUs}`);
  }
}

/**
 * The machine's monotonic clock. One `setTimeout` stands armed for the earliest timer, so its ms
 * granularity applies: a timer fires up to about 1 ms late, never early.
 */
export class SystemClock implements Clock {
  readonly #timers = new TimerQueue();
  readonly #keepsProcessAlive: boolean;
  #armed: NodeJS.Timeout | undefined;
  #armedForUs = Number.POSITIVE_INFINITY;

  /** `unref`: pending timers do not keep the process alive; default false. */
  constructor(options: { unref?: boolean } = {}) {
    this.#keepsProcessAlive = options.unref !== true;
  }

  nowUs(): number {
    return Math.floor(performance.now() * 1000);
  }

  schedule(afterUs: number, fn: () => void): TimerHandle {
    checkDelay(afterUs);
    const handle = this.#timers.add(this.nowUs() + afterUs, fn);
    if (handle.atUs < this.#armedForUs) this.#arm(handle.atUs);
    else if (this.#timers.size === 1 && this.#keepsProcessAlive) this.#armed?.ref();
    return handle;
  }

  cancel(handle: TimerHandle): void {
    this.#timers.remove(handle);
    // What is armed stays armed, and finds nothing due: arming costs more than all the rest. Only
    // it must not keep the process alive for nothing.
    if (this.#timers.size === 0) this.#armed?.unref();
  }

  #arm(atUs: number): void {
    clearTimeout(this.#armed);
    this.#armedForUs = atUs;
    const waitMs = Math.ceil((atUs - this.nowUs()) / 1000);
    this.#armed = setTimeout(() => this.#onTimeout(), Math.min(ARM_MS_MAX, Math.max(0, waitMs)));
    if (!this.#keepsProcessAlive) this.#armed.unref();
  }

  #onTimeout(): void {
    this.#armed = undefined;
    this.#armedForUs = Number.POSITIVE_INFINITY;
    const nowUs = this.nowUs();
    // Timers set by the ones that fire now wait for the next round: a 0 µs chain cannot hold the
    // event loop.
    const sequenceMax = this.#timers.nextSequence;
    try {
      for (let fn = this.#timers.takeDue(nowUs, sequenceMax); fn !== undefined; ) {
        fn();
        fn = this.#timers.takeDue(nowUs, sequenceMax);
      }
    } finally {
      const earliestUs = this.#timers.earliestUs();
      if (earliestUs !== undefined && earliestUs < this.#armedForUs) this.#arm(earliestUs);
    }
  }
}

/**
 * Virtual time, starting at 0. It moves only by `advanceToNext` and `advanceTo`, and never past a
 * pending timer.
 */
export class SimClock implements Clock {
  readonly #timers = new TimerQueue();
  #nowUs = 0;

  nowUs(): number {
    return this.#nowUs;
  }

  schedule(afterUs: number, fn: () => void): TimerHandle {
    checkDelay(afterUs);
    return this.#timers.add(this.#nowUs + afterUs, fn);
  }

  cancel(handle: TimerHandle): void {
    this.#timers.remove(handle);
  }

  /** Timers pending. */
  get pending(): number {
    return this.#timers.size;
  }

  /** When the earliest timer is due; undefined when none is pending. */
  nextAtUs(): number | undefined {
    return this.#timers.earliestUs();
  }

  /** Moves to the earliest timer and runs that one alone. False when none is pending. */
  advanceToNext(): boolean {
    const atUs = this.#timers.earliestUs();
    if (atUs === undefined) return false;
    this.#nowUs = atUs;
    this.#timers.takeDue(atUs)?.();
    return true;
  }

  /**
   * Moves to `atUs` without running anything. Throws RangeError backwards, or past a timer still
   * pending.
   */
  advanceTo(atUs: number): void {
    const earliestUs = this.#timers.earliestUs() ?? Number.POSITIVE_INFINITY;
    if (!Number.isInteger(atUs) || atUs < this.#nowUs || atUs > earliestUs) {
      throw new RangeError(
        `cannot move from ${this.#nowUs} to ${atUs} µs, next timer ${earliestUs}`,
      );
    }
    this.#nowUs = atUs;
  }
}
