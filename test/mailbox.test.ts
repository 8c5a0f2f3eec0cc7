import fc from "fast-check";
import { expect, it } from "vitest";
import type { Overflow } from "../runtime/actor.ts";
import { Mail, Mailbox } from "../runtime/mailbox.ts";

type Op = { op: "offer"; value: number } | { op: "push" | "urgent" | "take"; value: number };

const keyOf = (value: number) => (value % 4 === 0 ? undefined : `${value % 4}`);

/** What a mailbox promises, written down as plainly as possible. */
class Model {
  urgent: number[] = [];
  queue: { value: number; isNotice: boolean }[] = [];
  readonly #max: number;
  readonly #overflow: Overflow<number>["kind"];

  constructor(max: number, overflow: Overflow<number>["kind"]) {
    this.#max = max;
    this.#overflow = overflow;
  }

  get depth(): number {
    return this.queue.filter(({ isNotice }) => !isNotice).length;
  }

  offer(value: number): number | undefined {
    if (this.depth < this.#max) {
      this.queue.push({ value, isNotice: false });
      return undefined;
    }
    if (this.#overflow === "drop_oldest") {
      const [oldest] = this.queue.splice(
        this.queue.findIndex(({ isNotice }) => !isNotice),
        1,
      );
      this.queue.push({ value, isNotice: false });
      return oldest?.value;
    }
    const same = (one: { value: number; isNotice: boolean }) =>
      !one.isNotice && keyOf(one.value) !== undefined && keyOf(one.value) === keyOf(value);
    const queued = this.#overflow === "conflate" ? this.queue.findLast(same) : undefined;
    if (queued === undefined) return value;
    const replaced = queued.value;
    queued.value = value;
    return replaced;
  }

  take(): number | undefined {
    return this.urgent.shift() ?? this.queue.shift()?.value;
  }
}

it("mailbox: bound, order, overflow and notices are as written down, whatever the sequence", () => {
  const op: fc.Arbitrary<Op> = fc.record({
    op: fc.constantFrom("offer", "offer", "offer", "push", "urgent", "take", "take"),
    value: fc.nat(1000),
  });
  const overflow = fc.constantFrom<Overflow<number>>(
    { kind: "reject" },
    { kind: "drop_oldest" },
    { kind: "conflate", key: keyOf },
  );
  fc.assert(
    fc.property(
      fc.array(op, { maxLength: 200, size: "max" }),
      fc.integer({ min: 1, max: 20 }),
      overflow,
      (ops, max, policy) => {
        const mailbox = new Mailbox<{ isNotice: boolean }>({ max, overflow: policy });
        const model = new Model(max, policy.kind);
        const to = { path: "x", uid: 0 };
        const wrong: string[] = [];
        const check = (what: string, is: unknown, should: unknown) => {
          if (is !== should) wrong.push(`${what}: ${is} instead of ${should}`);
        };
        for (const { op, value } of ops) {
          const mail = new Mail(to, "", value, op === "offer" ? undefined : { isNotice: true });
          if (op === "offer") check("lost", mailbox.offer(mail)?.message, model.offer(value));
          else if (op === "take") check("taken", mailbox.take()?.message, model.take());
          else if (op === "push") {
            mailbox.push(mail);
            model.queue.push({ value, isNotice: true });
          } else {
            mailbox.pushUrgent(mail);
            model.urgent.push(value);
          }
          check("depth", mailbox.depth, model.depth);
          check("empty", mailbox.isEmpty, model.queue.length + model.urgent.length === 0);
          check("within bound", mailbox.depth <= max, true);
          const waiting = [...mailbox].map(({ message }) => message).join();
          check("waiting", waiting, model.queue.map((one) => one.value).join());
        }
        expect(wrong).toEqual([]);
      },
    ),
    { seed: 4, numRuns: 200 },
  );
});
