/**
 * The bounded queue in front of one actor, and what lies in it.
 *
 * Counted mail (tells and asks) obeys the bound and the overflow policy. Notices (outcomes of the
 * actor's own asks, its timers, the ends it watches) are uncounted: each answers something the
 * actor itself started, so they are bounded by that and must not be lost.
 */

import type { ActorRef, MailboxSpec } from "./actor.ts";

const CAPACITY_INITIAL = 8;

/**
 * What comes with a message that is more than a tell: the ask it belongs to, or why it is a notice.
 */
export interface MailTag {
  readonly isNotice: boolean;
}

/** One queued message. `T` is the kind of tag its system uses. */
export class Mail<T extends MailTag = MailTag> {
  to: ActorRef<never>;
  from: string;
  message: unknown;
  tag: T | undefined;

  constructor(to: ActorRef<never>, from: string, message: unknown, tag: T | undefined) {
    this.to = to;
    this.from = from;
    this.message = message;
    this.tag = tag;
  }
}

/** A growing ring of mail; its owner bounds it. Never shrinks: a busy mailbox gets busy again. */
class MailRing<T extends MailTag> {
  #slots: (Mail<T> | undefined)[] = [];
  #head = 0;
  #length = 0;

  get length(): number {
    return this.#length;
  }

  push(mail: Mail<T>): void {
    if (this.#length === this.#slots.length) this.#grow();
    this.#slots[(this.#head + this.#length) & (this.#slots.length - 1)] = mail;
    this.#length++;
  }

  shift(): Mail<T> | undefined {
    if (this.#length === 0) return undefined;
    const mail = this.#slots[this.#head];
    this.#slots[this.#head] = undefined;
    this.#head = (this.#head + 1) & (this.#slots.length - 1);
    this.#length--;
    return mail;
  }

  /** Takes out the oldest mail without notice tag, keeping the order of the rest. */
  shiftCounted(): Mail<T> | undefined {
    const mask = this.#slots.length - 1;
    let skipped = 0;
    while (this.#slots[(this.#head + skipped) & mask]?.tag?.isNotice === true) skipped++;
    const found = this.#slots[(this.#head + skipped) & mask];
    for (let index = skipped; index > 0; index--) {
      this.#slots[(this.#head + index) & mask] = this.#slots[(this.#head + index - 1) & mask];
    }
    this.shift();
    return found;
  }

  *[Symbol.iterator](): Generator<Mail<T>> {
    for (let index = 0; index < this.#length; index++) {
      const mail = this.#slots[(this.#head + index) & (this.#slots.length - 1)];
      if (mail !== undefined) yield mail;
    }
  }

  #grow(): void {
    const slots = this.#slots;
    const capacity = Math.max(CAPACITY_INITIAL, slots.length * 2);
    const grown = new Array<Mail<T> | undefined>(capacity).fill(undefined);
    for (let index = 0; index < this.#length; index++) {
      grown[index] = slots[(this.#head + index) & (slots.length - 1)];
    }
    this.#slots = grown;
    this.#head = 0;
  }
}

export class Mailbox<T extends MailTag> {
  readonly #spec: MailboxSpec<never>;
  /** In order of arrival; with `conflate`, a replacement keeps the place of what it replaced. */
  readonly #mails = new MailRing<T>();
  /** Timers due and asks timed out: handled before everything else. */
  readonly #urgent = new MailRing<T>();
  /** Notices in `#mails`. */
  #notices = 0;
  /** Latest queued mail of each key; only with `conflate`. */
  readonly #byKey: Map<string, Mail<T>> | undefined;

  /** Throws RangeError unless `spec.max` is a whole number from 1. */
  constructor(spec: MailboxSpec<never>) {
    if (!Number.isInteger(spec.max) || spec.max < 1) {
      throw new RangeError(`mailbox max must be a whole number from 1, got ${spec.max}`);
    }
    this.#spec = spec;
    this.#byKey = spec.overflow.kind === "conflate" ? new Map() : undefined;
  }

  get max(): number {
    return this.#spec.max;
  }

  /** Counted mail waiting: 0…max. */
  get depth(): number {
    return this.#mails.length - this.#notices;
  }

  get isEmpty(): boolean {
    return this.#mails.length === 0 && this.#urgent.length === 0;
  }

  /**
   * Queues counted mail. Returns what was lost for it: nothing, this mail itself, or an older one.
   */
  offer(mail: Mail<T>): Mail<T> | undefined {
    if (this.#mails.length - this.#notices >= this.#spec.max) return this.#overflow(mail);
    this.#mails.push(mail);
    if (this.#byKey !== undefined) this.#remember(mail, this.#byKey);
    return undefined;
  }

  /** Queues a notice behind everything that waits. */
  push(notice: Mail<T>): void {
    this.#notices++;
    this.#mails.push(notice);
  }

  /** Queues a notice before everything that waits, but other urgent notices. */
  pushUrgent(notice: Mail<T>): void {
    this.#urgent.push(notice);
  }

  take(): Mail<T> | undefined {
    if (this.#urgent.length > 0) return this.#urgent.shift();
    const mail = this.#mails.shift();
    if (mail === undefined) return undefined;
    if (mail.tag?.isNotice === true) this.#notices--;
    else if (this.#byKey !== undefined) this.#forget(mail, this.#byKey);
    return mail;
  }

  /** What waits, in order, urgent notices left out. */
  [Symbol.iterator](): Iterator<Mail<T>> {
    return this.#mails[Symbol.iterator]();
  }

  #overflow(mail: Mail<T>): Mail<T> | undefined {
    switch (this.#spec.overflow.kind) {
      case "reject":
        return mail;
      case "drop_oldest": {
        const oldest = this.#mails.shiftCounted();
        this.#mails.push(mail);
        return oldest;
      }
      case "conflate": {
        const key = this.#spec.overflow.key(mail.message as never);
        const queued = key === undefined ? undefined : this.#byKey?.get(key);
        if (queued === undefined) return mail;
        const replaced = new Mail(queued.to, queued.from, queued.message, queued.tag);
        queued.to = mail.to;
        queued.from = mail.from;
        queued.message = mail.message;
        queued.tag = mail.tag;
        return replaced;
      }
    }
  }

  #remember(mail: Mail<T>, byKey: Map<string, Mail<T>>): void {
    if (this.#spec.overflow.kind !== "conflate") return;
    const key = this.#spec.overflow.key(mail.message as never);
    if (key !== undefined) byKey.set(key, mail);
  }

  #forget(mail: Mail<T>, byKey: Map<string, Mail<T>>): void {
    if (this.#spec.overflow.kind !== "conflate") return;
    const key = this.#spec.overflow.key(mail.message as never);
    if (key !== undefined && byKey.get(key) === mail) byKey.delete(key);
  }
}
