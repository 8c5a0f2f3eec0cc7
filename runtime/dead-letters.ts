/** Messages that reached no behaviour: the last thousand, and a count of all by reason and kind. */

/** Most recent dead letters kept. */
const LETTERS_MAX = 1000;
/** Distinct (reason, kind) pairs counted apart; the rest count under the kind "other". */
const COUNTERS_MAX = 1000;

export type DeadLetterReason =
  | "stopped" // the incarnation it was meant for is gone
  | "full" // the mailbox was full, by its overflow policy
  | "expired" // an ask taken out of the mailbox after its deadline
  | "crashed" // the actor threw while handling it
  | "noroute" // nothing lives, or lived, at that path
  | "oversized" // too large for the link
  | "undecodable" // the link could not read it
  | "disconnected"; // the link to the receiver's process is down

/** About a lost message; never the message itself, which may hold what must not be kept. */
export type DeadLetter = {
  to: string;
  uid: number;
  /** Path of the sender; empty for the host. */
  from: string;
  reason: DeadLetterReason;
  messageKind: string;
  atUs: number;
};

export class DeadLetters {
  readonly #ring: DeadLetter[] = [];
  #oldest = 0;
  readonly #counts = new Map<string, number>();

  add(letter: DeadLetter): void {
    if (this.#ring.length < LETTERS_MAX) {
      this.#ring.push(letter);
    } else {
      this.#ring[this.#oldest] = letter;
      this.#oldest = (this.#oldest + 1) % LETTERS_MAX;
    }
    let key = `${letter.reason} ${letter.messageKind}`;
    if (this.#counts.size >= COUNTERS_MAX && !this.#counts.has(key)) key = `${letter.reason} other`;
    this.#counts.set(key, (this.#counts.get(key) ?? 0) + 1);
  }

  /** The last 1000 at most, oldest first. */
  recent(): DeadLetter[] {
    return [...this.#ring.slice(this.#oldest), ...this.#ring.slice(0, this.#oldest)];
  }

  counts(): { reason: DeadLetterReason; messageKind: string; count: number }[] {
    return [...this.#counts].map(([key, count]) => {
      const space = key.indexOf(" ");
      return {
        reason: key.slice(0, space) as DeadLetterReason,
        messageKind: key.slice(space + 1),
        count,
      };
    });
  }
}

/** The `kind` of a message, or its type when it has none. */
export function kindOf(message: unknown): string {
  if (typeof message === "object" && message !== null && "kind" in message) {
    return typeof message.kind === "string" ? message.kind : "object";
  }
  return typeof message;
}
