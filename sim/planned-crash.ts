/**
 * Actors that a fault schedule makes throw: at their next message, which is lost as in any crash. An edge loses none,
 * since its inside is one object that outlives the crash; it throws at the message that only means to make it throw.
 */
import type { Actor, Context } from "../runtime/actor.ts";
import type { Mail } from "./interposer.ts";

/** Thrown by an actor that was doomed; any other error is a bug. */
export class PlannedCrash extends Error {
  override readonly name = "PlannedCrash";
}

/** Means nothing but "handle me": for an actor that would wait long for its next message. */
export const crashMail: Mail = { kind: "simulation.crash" };

export class Mortal implements Actor<Mail> {
  readonly #inner: Actor<Mail>;
  readonly #path: string;
  /** Paths of those that throw at their next message. */
  readonly #doomed: Set<string>;
  readonly #isEdge: boolean;

  constructor(inner: Actor<Mail>, path: string, doomed: Set<string>) {
    this.#inner = inner;
    this.#path = path;
    this.#doomed = doomed;
    this.#isEdge = path.includes("/edges/");
  }

  start(context: Context<Mail>): void {
    this.#inner.start?.(context);
  }

  receive(message: Mail, context: Context<Mail>): void {
    const isCrashMail = message.kind === crashMail.kind;
    if ((isCrashMail || !this.#isEdge) && this.#doomed.delete(this.#path)) {
      throw new PlannedCrash(`${this.#path} was to crash`);
    }
    if (!isCrashMail) this.#inner.receive(message, context);
  }

  stop(context: Context<Mail>): void {
    this.#inner.stop?.(context);
  }
}
