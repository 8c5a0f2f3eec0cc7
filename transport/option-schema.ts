/**
 * The vocabulary in which options.ts writes the schema of all options, and the schema read back as
 * a table.
 *
 * A zod type knows shape and bounds. What it cannot hold (description, unit, whether a reload
 * applies a change, whether it is a secret, what is accepted in words) stands beside it in a
 * registry, so that the reference, the JSON Schema, the environment's names and every error message
 * come from the same rows. Pure.
 */
import * as z from "zod";

/** Whether a reload applies a change ("live") or the process must start again ("restart"). */
export type Reload = "live" | "restart";

export type Unit = "ms" | "bytes" | "ratio" | "requests" | "tokens" | "calls";

/** What is known of an option beside its type. */
export type Fact = {
  kind: "integer" | "number" | "boolean" | "text" | "choice" | "texts" | "items" | "group";
  doc: string;
  unit?: Unit;
  min?: number;
  /** Of a list: most entries. */
  max?: number;
  /** Texts: what is accepted, in words. */
  accepted?: string;
  choices?: readonly string[];
  /** "all": never shown; "url": shown without its password. */
  secret?: "all" | "url";
  /** Where it differs from the group's. */
  reload?: Reload;
};

const facts = z.registry<Fact>();

// ---- one function per kind of option ------------------------------------------------------------

type Range = readonly [min: number, max: number];

function integer(unit: Unit | undefined, [min, max]: Range, doc: string) {
  const fact: Fact = { kind: "integer", doc, min, max, ...(unit !== undefined && { unit }) };
  return z.number().int().min(min).max(max).register(facts, fact);
}

/** A whole number of milliseconds. */
export const ms = (range: Range, doc: string) => integer("ms", range, doc);
/** A whole number of bytes. */
export const bytes = (range: Range, doc: string) => integer("bytes", range, doc);
/** Whole numbers of things. */
export const requests = (range: Range, doc: string) => integer("requests", range, doc);
export const tokens = (range: Range, doc: string) => integer("tokens", range, doc);
export const calls = (range: Range, doc: string) => integer("calls", range, doc);
export const count = (range: Range, doc: string) => integer(undefined, range, doc);

/** A share, 1 = all: never a percentage. */
export function ratio([min, max]: Range, doc: string) {
  return z
    .number()
    .min(min)
    .max(max)
    .register(facts, { kind: "number", doc, unit: "ratio", min, max });
}

export function number([min, max]: Range, doc: string) {
  return z.number().min(min).max(max).register(facts, { kind: "number", doc, min, max });
}

export function boolean(doc: string) {
  return z.boolean().register(facts, { kind: "boolean", doc });
}

export function choice<const Choices extends readonly [string, ...string[]]>(
  choices: Choices,
  doc: string,
) {
  return z.enum(choices).register(facts, { kind: "choice", doc, choices });
}

/** Says what is wrong with a text, without quoting it; undefined when nothing is. */
export type TextCheck = (value: string) => string | undefined;

type TextRow = { doc: string; accepted: string; secret?: "all" | "url"; wrong?: TextCheck };

function checkedText(wrong: TextCheck | undefined) {
  return z.string().superRefine((value, context) => {
    const reason = value === "" ? "is empty" : wrong?.(value);
    if (reason !== undefined) context.addIssue({ code: "custom", message: reason });
  });
}

export function text({ wrong, ...row }: TextRow) {
  return checkedText(wrong).register(facts, { kind: "text", ...row });
}

/** A list of texts: at most `max`, no two alike. */
export function texts({ wrong, max, ...row }: TextRow & { max: number }) {
  return z
    .array(checkedText(wrong))
    .max(max)
    .superRefine((list, context) => {
      for (const [index, entry] of list.entries()) {
        if (list.indexOf(entry) === index) continue;
        context.addIssue({ code: "custom", path: [index], message: "stands in the list already" });
      }
    })
    .register(facts, { kind: "texts", max, ...row });
}

/** A mapping of options; one that is not among them is refused. */
export function group<Shape extends z.ZodRawShape>(doc: string, reload: Reload, shape: Shape) {
  return z.strictObject(shape).register(facts, { kind: "group", doc, reload });
}

/** A list of groups: at most `max`. */
export function items<Item extends z.ZodType>(
  doc: string,
  reload: Reload,
  max: number,
  item: Item,
) {
  return z.array(item).max(max).register(facts, { kind: "items", doc, reload, max });
}

/** The same option, but needing a restart in a group that is live. */
export function restart<Leaf extends z.ZodType>(leaf: Leaf): Leaf {
  facts.add(leaf, { ...factOf(leaf), reload: "restart" });
  return leaf;
}

/** The same option, but live in a group that needs a restart. */
export function live<Leaf extends z.ZodType>(leaf: Leaf): Leaf {
  facts.add(leaf, { ...factOf(leaf), reload: "live" });
  return leaf;
}

// ---- reading the schema back --------------------------------------------------------------------

/** One option as a row: for the reference, the resolved table, the environment and reload. */
export type OptionRow = {
  /** "listen.port"; in lists "nodes[].url". */
  readonly path: string;
  readonly kind: Fact["kind"];
  readonly doc: string;
  readonly unit?: Unit;
  /** What is accepted, in words. */
  readonly accepted: string;
  /** Absent where there is none. */
  readonly default?: unknown;
  readonly required: boolean;
  readonly reload: Reload;
  readonly secret?: "all" | "url";
  /** Environment variable that sets it; absent inside lists and for groups. */
  readonly env?: string;
};

/** All rows in the order of the schema; groups and lists stand before what they hold. */
export function rowsOf(root: z.core.$ZodType): OptionRow[] {
  return rowsBelow(root, "", "restart");
}

function rowsBelow(wrapped: z.core.$ZodType, path: string, groupReload: Reload): OptionRow[] {
  const { inner, isOptional, ...rest } = unwrap(wrapped);
  const fact = factOf(inner);
  const reload = fact.reload ?? groupReload;
  const row: OptionRow = {
    path,
    kind: fact.kind,
    doc: fact.doc,
    accepted: acceptedBy(inner),
    required: !isOptional,
    reload,
    ...rest,
    ...(fact.unit !== undefined && { unit: fact.unit }),
    ...(fact.secret !== undefined && { secret: fact.secret }),
    ...(fact.kind !== "group" && !path.includes("[]") && { env: environmentName(path) }),
  };
  const prefix = path === "" ? "" : `${path}${fact.kind === "items" ? "[]" : ""}.`;
  const below = Object.entries(shapeOf(inner) ?? {});
  return [
    ...(path === "" ? [] : [row]),
    ...below.flatMap(([name, child]) => rowsBelow(child, prefix + name, reload)),
  ];
}

/** "timeouts.firstTokenMs" → "HEADRACE_TIMEOUTS_FIRST_TOKEN_MS". */
function environmentName(path: string): string {
  const words = path.replace(/([a-z0-9])([A-Z])/g, "$1_$2").replaceAll(".", "_");
  return `HEADRACE_${words.toUpperCase()}`;
}

/** What is known of a schema without its wrappers; throws for one that is no option. */
export function factOf(inner: z.core.$ZodType): Fact {
  const fact = facts.get(inner);
  if (fact === undefined) throw new Error("a part of the options' schema has no facts");
  return fact;
}

/** Looks through defaults, optionals and transforms to the schema that carries the facts. */
export function unwrap(wrapped: z.core.$ZodType): {
  inner: z.core.$ZodType;
  isOptional: boolean;
  default?: unknown;
} {
  let inner = wrapped;
  let isOptional = false;
  let fallback: unknown;
  for (;;) {
    if (inner instanceof z.ZodPipe) {
      inner = inner.def.in;
    } else if (inner instanceof z.ZodDefault) {
      fallback = inner.def.defaultValue;
      isOptional = true;
      inner = inner.def.innerType;
    } else if (inner instanceof z.ZodPrefault || inner instanceof z.ZodExactOptional) {
      isOptional = true;
      inner = inner.def.innerType;
    } else {
      return { inner, isOptional, ...(fallback !== undefined && { default: fallback }) };
    }
  }
}

/** What stands below a schema: the options of a group, or those of a list's items. */
export function shapeOf(
  inner: z.core.$ZodType,
): Readonly<Record<string, z.core.$ZodType>> | undefined {
  if (inner instanceof z.ZodObject) return inner.shape;
  return inner instanceof z.ZodArray ? shapeOf(unwrap(inner.element).inner) : undefined;
}

/** What an option accepts, in words: "a whole number of milliseconds from 10 to 60000". */
export function acceptedBy(inner: z.core.$ZodType): string {
  const fact = factOf(inner);
  const below = Object.keys(shapeOf(inner) ?? {}).join(", ");
  switch (fact.kind) {
    case "integer": {
      const of = fact.unit === "ms" ? " of milliseconds" : fact.unit === "bytes" ? " of bytes" : "";
      return `a whole number${of} from ${fact.min} to ${fact.max}`;
    }
    case "number":
      return `a number from ${fact.min} to ${fact.max}`;
    case "boolean":
      return "true or false";
    case "choice":
      return `one of ${fact.choices?.join(", ")}`;
    case "text":
      return fact.accepted ?? "text";
    case "texts":
      return `a list of at most ${fact.max}, each ${fact.accepted}`;
    case "items":
      return `a list of at most ${fact.max} mappings with ${below}`;
    case "group":
      return `a mapping with ${below}`;
  }
}

/** What a user may write, as JSON Schema: draft 7, which editors know best. */
export function jsonSchemaOf(root: z.core.$ZodType): Record<string, unknown> {
  return z.toJSONSchema(root, {
    io: "input",
    target: "draft-7",
    override: ({ zodSchema, jsonSchema }) => {
      const fact = facts.get(zodSchema);
      if (fact === undefined) return;
      const unit = fact.unit === undefined ? "" : ` Unit: ${fact.unit}.`;
      const accepted = fact.accepted === undefined ? "" : ` Accepted: ${fact.accepted}.`;
      jsonSchema.description = `${fact.doc}${unit}${accepted}`;
    },
  });
}

/** A plain mapping, as YAML and JSON have them. */
export function isMapping(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
