/**
 * The wake port: who decides when a cell with mail gets to run. Three answers exist (nact, one nact
 * actor per cell or one for all; the simulator's), and the code of a cell is the same under each.
 */

/** A cell, as a scheduler sees it. */
export interface Runnable {
  readonly path: string;
  /**
   * From `wake` on, until a `run` left no work: while true after `run`, the scheduler must call it
   * again.
   */
  readonly isAwake: boolean;
  /**
   * Handles waiting messages until none is left, `messagesMax` were handled, or the clock passed
   * `untilUs` (looked at now and then, not at every message). Returns how many it took. Throws only
   * when the runtime itself is broken.
   */
  run(messagesMax: number, untilUs: number): number;
}

export interface Scheduler {
  /**
   * `cell` has work: call its `run` soon, never inside `wake`. Not called while `cell.isAwake`
   * already.
   */
  wake(cell: Runnable): void;
  /** A cell was registered; one `closed` follows in time. */
  opened?(cell: Runnable): void;
  closed?(cell: Runnable): void;
  /** A message is about to be handled, for schedulers that keep a record of the run. */
  handling?(cell: Runnable, messageKind: string): void;
  /** Everything stopped; `wake` will not be called again. */
  shutdown?(): void;
}
