/**
 * Shapes: what a value from another process must look like before anybody here may see it. Pure.
 *
 * A shape reads a decoded value: it returns the value itself, or a replacement (an instant moved to our clock, bytes
 * copied out of the frame, an object without fields that we do not know), or `bad`. Values must come fresh from a
 * decoder, since they are changed in place. Nothing here throws, and nothing calls a method of the value.
 *
 * `record` and `union` are checked by the compiler against the type they stand for: a field that is added to a
 * message in actors/ does not compile until its shape is written down.
 */
import type { ActorRef, ReplyTo } from "../runtime/actor.ts";

/** What `read` returns instead of a value. */
export const bad = Symbol("bad");

export type Shape<T> = {
  /** @param shiftMs what is added to an instant of the sender to make it one of ours */
  readonly read: (value: unknown, shiftMs: number) => unknown;
  /** What is accepted, for people. */
  readonly accepts: string;
  /** Never present: ties the shape to its type. */
  readonly gives?: T;
};

/** A field that may be absent. */
export type Optional<T> = { readonly optional: Shape<T> };

/** A shape per field, in the order in which senders write them. */
export type Fields<T> = {
  readonly [K in keyof Required<T>]: Record<string, never> extends Pick<T, K>
    ? Optional<Required<T>[K]>
    : Shape<T[K]>;
};

/** Where the last `bad` arose, innermost field first: read it at once, by `takeFault`. */
const trail: string[] = [];
let wanted = "";

/** One line on why the last read was refused, without the value: that may hold what must not be logged. */
export function takeFault(): string {
  const path = trail.reverse().join(".");
  trail.length = 0;
  const text = path === "" ? `it is not ${wanted}` : `${path} is not ${wanted}`;
  wanted = "";
  return text;
}

function refuse(accepts: string): typeof bad {
  trail.length = 0;
  wanted = accepts;
  return bad;
}

function shape<T>(accepts: string, isFine: (value: unknown) => boolean): Shape<T> {
  return { accepts, read: (value) => (isFine(value) ? value : refuse(accepts)) };
}

/** At most `lengthMax` UTF-16 units. */
export function text(lengthMax: number): Shape<string> {
  return shape(
    `a text of at most ${lengthMax} characters`,
    (value) => typeof value === "string" && value.length <= lengthMax,
  );
}

export const flag: Shape<boolean> = shape("true or false", (value) => typeof value === "boolean");

/** Any number but NaN and the infinities. */
export const finite: Shape<number> = shape("a finite number", (value) => Number.isFinite(value));

/** A finite number from 0. */
export const amount: Shape<number> = shape(
  "a finite number from 0",
  (value) => typeof value === "number" && value >= 0 && value < Number.POSITIVE_INFINITY,
);

/** A whole number from 0 that is exact. */
export const count: Shape<number> = shape(
  "a whole number from 0",
  (value) => Number.isSafeInteger(value) && (value as number) >= 0,
);

/** A point in the sender's monotonic time, ms; becomes one in ours. */
export const instant: Shape<number> = {
  accepts: "a finite number",
  read: (value, shiftMs) =>
    typeof value === "number" && Number.isFinite(value + shiftMs)
      ? value + shiftMs
      : refuse("a finite number"),
};

/** Copied: what the decoder gives is a window on the whole frame. */
export function bytes(lengthMax: number): Shape<Uint8Array> {
  const accepts = `at most ${lengthMax} bytes`;
  return {
    accepts,
    read: (value) =>
      value instanceof Uint8Array && value.length <= lengthMax
        ? new Uint8Array(value)
        : refuse(accepts),
  };
}

/** Beyond the longest of any embedder that is configured. */
const DIMENSION_MAX = 8192;

/** Of an embedding: every number finite. */
export const vector: Shape<Float32Array> = shape(
  `at most ${DIMENSION_MAX} finite numbers`,
  (value) =>
    value instanceof Float32Array && value.length <= DIMENSION_MAX && value.every(Number.isFinite),
);

export function oneOf<const T extends string>(...words: readonly T[]): Shape<T> {
  const set = new Set<unknown>(words);
  return shape(`one of ${words.join(", ")}`, (value) => set.has(value));
}

/** One value only. */
export function exactly<const T extends string | boolean>(word: T): Shape<T> {
  return shape(String(word), (value) => value === word);
}

export function list<T>(item: Shape<T>, lengthMax: number): Shape<T[]> {
  const accepts = `a list of at most ${lengthMax}`;
  return {
    accepts,
    read(value, shiftMs) {
      if (!Array.isArray(value) || value.length > lengthMax) return refuse(accepts);
      for (let index = 0; index < value.length; index++) {
        const read = item.read(value[index], shiftMs);
        if (read === bad) {
          trail.push(String(index));
          return bad;
        }
        value[index] = read;
      }
      return value;
    },
  };
}

export function optional<T>(of: Shape<T>): Optional<T> {
  return { optional: of };
}

function isPlain(value: unknown): value is Record<string, unknown> {
  return (
    typeof value === "object" && value !== null && Object.getPrototypeOf(value) === Object.prototype
  );
}

type Field = {
  readonly key: string;
  readonly read: Shape<unknown>["read"];
  readonly accepts: string;
  readonly isOptional: boolean;
};

/**
 * An object with these fields. Others are taken out; an optional field that is there but undefined counts as
 * absent, and stays as it is.
 */
export function record<T>(fields: Fields<T>): Shape<T> {
  const entries: [string, Shape<unknown> | Optional<unknown>][] = Object.entries(fields);
  const list: readonly Field[] = entries.map(([key, of]) => {
    const { read, accepts } = "optional" in of ? of.optional : of;
    return { key, read, accepts, isOptional: "optional" in of };
  });
  return {
    accepts: "an object",
    read(value, shiftMs) {
      if (!isPlain(value)) return refuse("an object");
      let present = 0;
      for (let index = 0; index < list.length; index++) {
        const field = list[index];
        if (field === undefined) continue;
        const { key } = field;
        const given = value[key];
        if (given === undefined) {
          if (field.isOptional) {
            if (key in value) present++;
            continue;
          }
          refuse(field.accepts);
          trail.push(key);
          return bad;
        }
        const read = field.read(given, shiftMs);
        if (read === bad) {
          trail.push(key);
          return bad;
        }
        if (read !== given) value[key] = read;
        present++;
      }
      let total = 0;
      for (const _ in value) total++;
      return total === present ? value : only(value, list);
    },
  };
}

function only(value: Record<string, unknown>, fields: readonly Field[]): Record<string, unknown> {
  const kept: Record<string, unknown> = {};
  for (const { key } of fields) if (Object.hasOwn(value, key)) kept[key] = value[key];
  return kept;
}

/** A number per name, for names that are fixed. */
export function numbersBy<const K extends string>(
  ...names: readonly K[]
): Shape<Record<K, number>> {
  const fields = Object.fromEntries(names.map((name) => [name, amount]));
  return record(fields as Fields<Record<K, number>>);
}

/** Told apart by `kind`. */
export function union<T extends { kind: string }>(
  members: {
    readonly [K in T["kind"]]: Shape<Extract<T, { kind: K }>>;
  },
): Shape<T> {
  const byKind = new Map<unknown, Shape<unknown>>(Object.entries(members));
  const accepts = `an object with a kind of ${[...byKind.keys()].join(", ")}`;
  return {
    accepts,
    read(value, shiftMs) {
      const member = isPlain(value) ? byKind.get(value.kind) : undefined;
      return member === undefined ? refuse(accepts) : member.read(value, shiftMs);
    },
  };
}

/** Longest path of an actor, and longest id of a request, lease or node, in UTF-16 units. */
export const ID_LENGTH_MAX = 512;

export const id: Shape<string> = text(ID_LENGTH_MAX);

/** Of an actor: not empty. */
export const path: Shape<string> = shape(
  `a text of 1 to ${ID_LENGTH_MAX} characters`,
  (value) => typeof value === "string" && value.length > 0 && value.length <= ID_LENGTH_MAX,
);

export const actorRef: Shape<ActorRef<unknown>> = record<ActorRef<unknown>>({
  path,
  uid: count,
  accepts: optional(shape("absent", () => false)),
});

export const replyTo: Shape<ReplyTo<unknown>> = record<ReplyTo<unknown>>({
  asker: path,
  askId: count,
  accepts: optional(shape("absent", () => false)),
});
