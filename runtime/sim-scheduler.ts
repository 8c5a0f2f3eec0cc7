/**
 * The simulator's scheduler: one thread, one message at a time, in an order that the seed decides.
 *
 * Among the cells with work it picks one at random, lets it handle one message, and puts it back if
 * more wait. Only when no cell has work does virtual time move, to the next timer. Any number of
 * systems may share one scheduler (with its clock). The hash over (time, path, message kind) of
 * every message makes two runs comparable.
 */

import type { SimClock } from "./clock.ts";
import { Random } from "./random.ts";
import type { Runnable, Scheduler } from "./scheduler.ts";

/** Distinct paths or message kinds whose hash is remembered; more only cost time. */
const NAMES_MAX = 100_000;

export class SimScheduler implements Scheduler {
  readonly #clock: SimClock;
  readonly #random: Random;
  /** Cells with work, each once, in no meaningful order. */
  readonly #runnable: Runnable[] = [];
  readonly #nameHashes = new Map<string, number>();
  #hashHigh = 0x6a09e667;
  #hashLow = 0xbb67ae85 | 0;
  #handled = 0;

  constructor(clock: SimClock, seed: number | string) {
    this.#clock = clock;
    this.#random = new Random(seed).split("schedule");
  }

  /** Messages handled so far. */
  get handled(): number {
    return this.#handled;
  }

  /** Hash of everything handled so far: 16 hex digits, equal for equal runs. */
  get hash(): string {
    const hex = (value: number) => (value >>> 0).toString(16).padStart(8, "0");
    return hex(this.#hashHigh) + hex(this.#hashLow);
  }

  wake(cell: Runnable): void {
    this.#runnable.push(cell);
  }

  handling(cell: Runnable, messageKind: string): void {
    const nowUs = this.#clock.nowUs();
    this.#handled++;
    this.#mix(nowUs | 0);
    this.#mix((nowUs / 4294967296) | 0);
    this.#mix(this.#nameHash(cell.path));
    this.#mix(this.#nameHash(messageKind));
  }

  /**
   * Handles one message, or else moves time to the next timer and fires it. False when there is
   * neither.
   */
  step(): boolean {
    return this.#runOne() || this.#clock.advanceToNext();
  }

  /** Handles messages until none waits; time stands still. Returns how many steps that took. */
  runReady(stepsMax = 10_000_000): number {
    let steps = 0;
    while (this.#runOne()) {
      if (++steps > stepsMax)
        throw new RangeError(`still busy after ${stepsMax} steps at one instant`);
    }
    return steps;
  }

  /** Steps until no message waits and no timer is pending. Throws RangeError after `stepsMax`. */
  runUntilIdle(stepsMax = 10_000_000): number {
    let steps = 0;
    while (this.step()) {
      if (++steps > stepsMax)
        throw new RangeError(`not idle after ${stepsMax} steps (a recurring timer?)`);
    }
    return steps;
  }

  /**
   * Runs everything due within the next `ms` of virtual time, and leaves the clock exactly there.
   */
  runFor(ms: number): void {
    this.runUntil(this.#clock.nowUs() + Math.round(ms * 1000));
  }

  /** Runs everything due up to and at `atUs`, and leaves the clock exactly there. */
  runUntil(atUs: number): void {
    for (;;) {
      this.runReady();
      const nextUs = this.#clock.nextAtUs();
      if (nextUs === undefined || nextUs > atUs) break;
      this.#clock.advanceToNext();
    }
    this.#clock.advanceTo(atUs);
  }

  #runOne(): boolean {
    const waiting = this.#runnable.length;
    if (waiting === 0) return false;
    const index = waiting === 1 ? 0 : this.#random.int(waiting);
    const cell = this.#runnable[index];
    const last = this.#runnable.pop();
    if (cell === undefined || last === undefined) return false;
    if (cell !== last) this.#runnable[index] = last;
    cell.run(1, Number.POSITIVE_INFINITY);
    if (cell.isAwake) this.#runnable.push(cell);
    return true;
  }

  #mix(value: number): void {
    this.#hashHigh = Math.imul(this.#hashHigh ^ value, 0x01000193);
    this.#hashLow = Math.imul((this.#hashLow << 5) ^ (this.#hashLow >>> 27) ^ value, 0x9e3779b1);
  }

  #nameHash(name: string): number {
    const known = this.#nameHashes.get(name);
    if (known !== undefined) return known;
    let hash = 0x811c9dc5 | 0;
    for (let index = 0; index < name.length; index++) {
      hash = Math.imul(hash ^ name.charCodeAt(index), 0x01000193);
    }
    hash ^= hash >>> 15;
    if (this.#nameHashes.size < NAMES_MAX) this.#nameHashes.set(name, hash);
    return hash;
  }
}
