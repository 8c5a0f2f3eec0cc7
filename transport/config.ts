/**
 * Where options come from: a YAML or JSON file, the environment, command-line flags; and the tables
 * made of them.
 *
 * Precedence, low to high: defaults, file, environment, flags. Every problem of all sources is
 * found in one run and names its place: "headrace.yaml:3:9", "HEADRACE_LISTEN_PORT", "--port".
 * Secrets never appear in a message or a table. Texts of the file may hold ${NAME}, the value of an
 * environment variable ($${ stands for ${ itself).
 */
import { readFile } from "node:fs/promises";
import type { Document, ParsedNode } from "yaml";
import {
  elsewhere,
  nearest,
  overlap,
  type Problem,
  pathOf,
  segmentsOf,
} from "./option-problems.ts";
import { isMapping, type OptionRow } from "./option-schema.ts";
import {
  type NodeOptions,
  type Options,
  type OptionsInput,
  optionRows,
  optionsJsonSchema,
  parseOptions,
} from "./options.ts";

/** A flag of the command line that sets one option. */
export type FlagSetting = {
  /** As the user knows it: "--port". */
  readonly flag: string;
  /** "listen.port". */
  readonly path: string;
  /** Text is read as an environment variable's is; anything else is taken as it is. */
  readonly value: unknown;
};

export type ConfigSources = {
  /** Path of a YAML or JSON file; absent = the one that HEADRACE_CONFIG names, else none. */
  readonly file?: string;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly flags?: readonly FlagSetting[];
};

export type LoadedConfig = {
  readonly options: Options;
  /** Path of an option → what set it; an option that is not in it has its default. */
  readonly sources: Readonly<Record<string, string>>;
};

export type ConfigProblem = {
  /**
   * "headrace.yaml:3:9", "HEADRACE_LISTEN_PORT", "--port", or "configuration" for what nobody gave.
   */
  readonly source: string;
  /** Path of the option; "" where it is about none. */
  readonly path: string;
  readonly message: string;
};

/**
 * A configuration that cannot be used: all that is wrong with it, one problem a line in `message`.
 */
export class ConfigError extends Error {
  override readonly name = "ConfigError";
  readonly problems: readonly ConfigProblem[];

  constructor(problems: readonly ConfigProblem[]) {
    super(
      problems
        .map(({ source, path, message }) => `${source}: ${path === "" ? "" : `${path} `}${message}`)
        .join("\n"),
    );
    this.problems = problems;
  }
}

/** Reads and merges all sources. Rejects with a `ConfigError` that holds every problem. */
export async function loadConfig({ file, env, flags = [] }: ConfigSources): Promise<LoadedConfig> {
  const path = file ?? env.HEADRACE_CONFIG;
  const read = path === undefined ? noFile() : await readTree(path, env);
  const { tree, place } = read;
  const settings = [...environmentSettings(env, read.variables), ...flags.map(flagSetting)];
  const problems = [...read.problems, ...settings.flatMap(({ problem }) => problem ?? [])];
  if (tree === undefined) throw new ConfigError(problems);

  const applied = settings.filter(({ problem }) => problem === undefined);
  for (const { at, value } of applied) setAt(tree, at, value);
  const sourceOf = (at: Problem["at"]): string => {
    const setting = applied.findLast((one) => one.at.every((part, index) => at[index] === part));
    return setting?.source ?? place(at);
  };
  const parsed = parseOptions(tree);
  for (const { at, path, message } of parsed.ok ? [] : parsed.problems) {
    // What could not be read is missing from the tree: once said is enough.
    if (problems.some((other) => other.path !== "" && overlap(other.path, path))) continue;
    problems.push({ source: sourceOf(at), path, message });
  }
  if (!parsed.ok || problems.length > 0) throw new ConfigError(problems);
  const sources = leavesOf(tree).map((at) => [pathOf(at), sourceOf(at)] as const);
  return { options: parsed.options, sources: Object.fromEntries(sources) };
}

/**
 * Resolves options given by a program. Throws a `ConfigError` that holds every problem.
 */
export function readOptions(input: OptionsInput): Options {
  const parsed = parseOptions(input);
  if (parsed.ok) return parsed.options;
  throw new ConfigError(
    parsed.problems.map(({ path, message }) => ({ source: "options", path, message })),
  );
}

// ---- the file -----------------------------------------------------------------------------------

/**
 * `tree` is absent when the file cannot be read as a whole. `place` names the line of an option, as
 * near as it can.
 */
type ReadTree = {
  tree?: Record<string, unknown>;
  place: (at: Problem["at"]) => string;
  problems: ConfigProblem[];
  /** Names that the file uses as ${NAME}. */
  variables: ReadonlySet<string>;
};

const noFile = (): ReadTree => ({
  tree: {},
  place: () => "configuration",
  problems: [],
  variables: new Set(),
});

/** A larger file is not a configuration. */
const fileBytesMax = 4 * 1024 * 1024;

async function readTree(file: string, env: ConfigSources["env"]): Promise<ReadTree> {
  const unreadable = (message: string): ReadTree => ({
    place: () => file,
    problems: [{ source: file, path: "", message }],
    variables: new Set(),
  });
  let text: string;
  try {
    text = await readFile(file, "utf8");
  } catch (error) {
    const code = error instanceof Error && "code" in error ? String(error.code) : "unknown";
    return unreadable(`cannot be read (${code}); accepted: a YAML or JSON file`);
  }
  if (Buffer.byteLength(text) > fileBytesMax) return unreadable("is larger than 4 MiB");

  // Loaded here, so that a gateway configured without a file does not pay for it.
  const yaml = await import("yaml");
  const lines = new yaml.LineCounter();
  const document = yaml.parseDocument(text, { lineCounter: lines, prettyErrors: false });
  const at = (offset: number): string => {
    const { line, col } = lines.linePos(offset);
    return `${file}:${line}:${col}`;
  };
  const faults = [...document.errors, ...document.warnings];
  if (faults.length > 0) {
    // By its code, not its message, which may quote a part of a secret.
    const problems = faults.map(({ code, pos }) => ({
      source: at(pos[0]),
      path: "",
      message: `is not valid YAML: ${code.toLowerCase().replaceAll("_", " ")}`,
    }));
    return { place: () => file, problems, variables: new Set() };
  }
  let plain: unknown;
  try {
    plain = document.toJS({ maxAliasCount: 100 }) ?? {};
  } catch {
    return unreadable("holds an alias without its anchor, or more aliases than are accepted");
  }
  if (!isMapping(plain))
    return unreadable("is not a mapping of options, such as `listen: {port: 8080}`");

  const place = (path: Problem["at"]): string => {
    const offset = offsetOf(yaml, document, path);
    return offset === undefined ? file : at(offset);
  };
  const problems: ConfigProblem[] = [];
  const variables = new Set<string>();
  const tree = expand(plain, [], {
    env,
    onVariable: (name) => variables.add(name),
    onProblem: (path, message) =>
      problems.push({ source: place(path), path: pathOf(path), message }),
  });
  return { tree: isMapping(tree) ? tree : {}, place, problems, variables };
}

/**
 * Where the deepest part of `path` that the file has begins: the key of an option, or a list's
 * entry.
 */
function offsetOf(
  yaml: typeof import("yaml"),
  document: Document.Parsed<ParsedNode>,
  path: Problem["at"],
): number | undefined {
  let node: unknown = document.contents;
  let offset: number | undefined;
  for (const part of path) {
    if (yaml.isAlias(node)) node = node.resolve(document);
    if (yaml.isMap(node)) {
      const pair = node.items.find(({ key }) => yaml.isScalar(key) && String(key.value) === part);
      if (pair === undefined || !yaml.isScalar(pair.key)) break;
      offset = pair.key.range?.[0] ?? offset;
      node = pair.value;
    } else if (yaml.isSeq(node) && typeof part === "number") {
      node = node.items[part];
      if (!yaml.isNode(node)) break;
      offset = node.range?.[0] ?? offset;
    } else {
      break;
    }
  }
  return offset;
}

type Expansion = {
  env: ConfigSources["env"];
  onVariable: (name: string) => void;
  onProblem: (at: Problem["at"], message: string) => void;
};

/**
 * Puts environment variables in for ${NAME} in every text; one that cannot be is reported and left
 * out.
 */
function expand(value: unknown, at: Problem["at"], expansion: Expansion): unknown {
  if (Array.isArray(value)) {
    return value.map((item, index) => expand(item, [...at, index], expansion));
  }
  if (isMapping(value)) {
    const entries = Object.entries(value);
    return Object.fromEntries(
      entries.map(([key, child]) => [key, expand(child, [...at, key], expansion)]),
    );
  }
  if (typeof value !== "string") return value;
  let isWhole = true;
  const expanded = value.replace(/(\$?)\$\{([^}]*)(\}?)/g, (all, dollar, name, end) => {
    if (dollar === "$") return all.slice(1);
    expansion.onVariable(name);
    const found = expansion.env[name];
    if (end === "" || !/^[A-Za-z_][A-Za-z0-9_]*$/.test(name)) {
      // biome-ignore lint/suspicious/noTemplateCurlyInString: this is the syntax that the file has
      expansion.onProblem(at, "holds ${ that is not ${NAME}; write $${ for the characters");
    } else if (found === undefined) {
      expansion.onProblem(at, `needs the environment variable ${name}, which is not set`);
    } else {
      return found;
    }
    isWhole = false;
    return "";
  });
  return isWhole ? expanded : undefined;
}

// ---- environment and flags ----------------------------------------------------------------------

const acceptedOptions = "accepted: those of `headrace config-reference`";

type Setting = { at: Problem["at"]; source: string; value?: unknown; problem?: ConfigProblem };

const settableRows: ReadonlyMap<string, OptionRow> = new Map(
  optionRows.flatMap((row) => (row.env === undefined ? [] : [[row.path, row] as const])),
);
const rowsByVariable: ReadonlyMap<string, OptionRow> = new Map(
  [...settableRows.values()].map((row) => [row.env ?? "", row]),
);

/** `used`: variables that the file asks for by name, so nobody's slip. */
function environmentSettings(env: ConfigSources["env"], used: ReadonlySet<string>): Setting[] {
  const settings: Setting[] = [];
  for (const [variable, text] of Object.entries(env)) {
    if (!variable.startsWith("HEADRACE_") || variable === "HEADRACE_CONFIG") continue;
    const row = rowsByVariable.get(variable);
    if (text === undefined || (row === undefined && used.has(variable))) continue;
    if (row !== undefined) {
      settings.push(textSetting(row, variable, text));
    } else if (!isOfKubernetes(variable, text)) {
      const near = similarVariable(variable);
      const suggestion = near === undefined ? "" : `; did you mean ${near}?`;
      const message = `is not a variable of Headrace${suggestion}; ${acceptedOptions}`;
      settings.push(unusable(variable, "", message));
    }
  }
  return settings;
}

/** The variable of ours that was meant; "HEADRACE_PORT" lacks its group. */
function similarVariable(variable: string): string | undefined {
  const bare = (name: string): string => name.slice("HEADRACE_".length);
  const known = [...rowsByVariable.keys()];
  const near = nearest(bare(variable), known.map(bare));
  if (near !== undefined) return `HEADRACE_${near}`;
  return known.find((name) => name.endsWith(`_${bare(variable)}`));
}

/**
 * Kubernetes gives every pod variables for the services of its namespace: a service called
 * "headrace" or "headrace-…" makes some that start like ours, and nobody wrote them.
 */
function isOfKubernetes(variable: string, text: string): boolean {
  if (/_SERVICE_(HOST|PORT(_\w+)?)$/.test(variable)) return true;
  if (/_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$/.test(variable)) return true;
  return variable.endsWith("_PORT") && /^(tcp|udp|sctp):\/\//.test(text);
}

function flagSetting({ flag, path, value }: FlagSetting): Setting {
  const row = settableRows.get(path);
  if (row === undefined) {
    const near =
      nearest(path, [...settableRows.keys()]) ?? elsewhere(path, [...settableRows.values()]);
    const suggestion = near === undefined ? "" : `; did you mean ${near}?`;
    const message = `is not an option${suggestion}; ${acceptedOptions}`;
    return unusable(flag, path, message);
  }
  if (typeof value === "string") return textSetting(row, flag, value);
  return { at: segmentsOf(path), source: flag, value };
}

/**
 * Text becomes a number, true, false or (lists) JSON where the option is one; else it is left for
 * the schema.
 */
function textSetting(row: OptionRow, source: string, text: string): Setting {
  const at = segmentsOf(row.path);
  if (text === "") return unusable(source, row.path, `is empty; accepted: ${row.accepted}`);
  switch (row.kind) {
    case "integer":
    case "number":
      return { at, source, value: /^-?\d+(\.\d+)?$/.test(text) ? Number(text) : text };
    case "boolean":
      return { at, source, value: text === "true" ? true : text === "false" ? false : text };
    case "texts":
    case "items":
      try {
        return { at, source, value: JSON.parse(text) };
      } catch {
        // Without the parser's message, which quotes the text: it may hold keys.
        return unusable(source, row.path, `is not valid JSON; accepted: JSON, ${row.accepted}`);
      }
    case "text":
    case "choice":
    case "group":
      return { at, source, value: text };
  }
}

function unusable(source: string, path: string, message: string): Setting {
  return { at: segmentsOf(path), source, problem: { source, path, message } };
}

/**
 * Groups on the way are made; something else that stands in the way is left for the schema to
 * refuse.
 */
function setAt(tree: Record<string, unknown>, at: Problem["at"], value: unknown): void {
  const last = at.at(-1);
  let parent = tree;
  for (const name of at.slice(0, -1)) {
    const child = parent[name] ?? {};
    if (!isMapping(child)) return;
    parent[name] = child;
    parent = child;
  }
  if (last !== undefined) parent[last] = value;
}

/** Every option that is given, groups and lists of groups resolved to what they hold. */
function leavesOf(value: unknown, at: Problem["at"] = []): Problem["at"][] {
  if (isMapping(value)) {
    return Object.entries(value).flatMap(([name, child]) => leavesOf(child, [...at, name]));
  }
  if (Array.isArray(value) && value.some(isMapping)) {
    return value.flatMap((child, index) => leavesOf(child, [...at, index]));
  }
  return value === undefined || value === null ? [] : [at];
}

// ---- tables -------------------------------------------------------------------------------------

/**
 * Every option with its value and what set it, one a line, secrets hidden. Of lists, what their
 * entries have set.
 */
export function resolvedTable(options: Options, sources: LoadedConfig["sources"]): string {
  const lines: [string, string, string][] = [["OPTION", "VALUE", "FROM"]];
  for (const { path, value, row } of valuesOf(options)) {
    // A key that was given in plain stands under its hash.
    const source = sources[path] ?? sources[path.replace(/\.keySha256$/, ".key")];
    lines.push([path, shownValue(row, value), value === undefined ? "" : (source ?? "default")]);
  }
  const widths = [0, 1].map((column) =>
    Math.max(...lines.map((line) => line[column]?.length ?? 0)),
  );
  const print = ([path, value, source]: [string, string, string]): string =>
    `${path.padEnd(widths[0] ?? 0)}  ${value.padEnd(widths[1] ?? 0)}  ${source}`.trimEnd();
  return `${lines.map(print).join("\n")}\n`;
}

type OptionValue = { path: string; value: unknown; row: OptionRow };

function valuesOf(options: Options): OptionValue[] {
  return optionRows.flatMap((row): OptionValue[] => {
    if (row.kind === "group" || row.path.includes("[]")) return [];
    const value = valueAt(options, row.path);
    if (row.kind !== "items" || !Array.isArray(value) || value.length === 0) {
      return [{ path: row.path, value, row }];
    }
    const below = optionRows.filter(
      ({ path, kind }) => path.startsWith(`${row.path}[].`) && kind !== "group",
    );
    return value.flatMap((_, index) =>
      below
        .map((inner) => ({ path: inner.path.replace("[]", `[${index}]`), row: inner }))
        .map((inner) => ({ ...inner, value: valueAt(options, inner.path) }))
        .filter((inner) => inner.value !== undefined),
    );
  });
}

function valueAt(options: Options, path: string): unknown {
  let value: unknown = options;
  for (const part of segmentsOf(path)) {
    if (typeof part === "number") value = Array.isArray(value) ? value[part] : undefined;
    else value = isMapping(value) ? value[part] : undefined;
  }
  return value;
}

function shownValue(row: OptionRow, value: unknown): string {
  if (value === undefined) return "(unset)";
  if (row.secret === "all") return "(hidden)";
  if (row.secret === "url") return String(value).replace(/:[^:@/]*@/, ":(hidden)@");
  if (Array.isArray(value)) {
    const list = value.map(String).join(", ");
    if (list === "") return "(none)";
    return list.length > 60 ? `${list.slice(0, 60)}… (${value.length})` : list;
  }
  return quantity(value, row.unit);
}

/**
 * A value with its unit, and in larger units where that is exact: "300000 ms (5 min)", "1048576
 * bytes (1 MiB)".
 */
function quantity(value: unknown, unit: OptionRow["unit"]): string {
  if (typeof value !== "number" || (unit !== "ms" && unit !== "bytes")) return String(value);
  const larger: readonly (readonly [string, number])[] =
    unit === "ms"
      ? [
          ["d", 86_400_000],
          ["h", 3_600_000],
          ["min", 60_000],
          ["s", 1000],
        ]
      : [
          ["GiB", 1024 * 1024 * 1024],
          ["MiB", 1024 * 1024],
          ["KiB", 1024],
        ];
  const fit = larger.find(([, size]) => value >= size && value % size === 0);
  return `${value} ${unit}${fit === undefined ? "" : ` (${value / fit[1]} ${fit[0]})`}`;
}

/** The reference of all options as Markdown, one table a group. */
export function configReference(): string {
  const parts = [
    "# Options",
    "",
    "Precedence, low to high: defaults, the file (YAML or JSON), environment variables, flags",
    "(`--set PATH=VALUE`). `HEADRACE_CONFIG` names the file where no flag does. Numbers carry no unit:",
    "the name says it (`…Ms` milliseconds, `…Bytes…` bytes, `…Ratio` 1 = all). Lists in environment",
    // biome-ignore lint/suspicious/noTemplateCurlyInString: this is the syntax that the file has
    "variables are JSON. Texts in the file may hold `${NAME}`, the value of an environment variable.",
    "*Reload*: yes = a reload applies a change; restart = the process must start again.",
  ];
  for (const section of optionRows.filter(({ path }) => !path.includes("."))) {
    parts.push("", `## ${section.path}`, "", section.doc);
    if (section.kind === "items") parts.push("", `Variable: \`${section.env}\` (JSON).`);
    parts.push(
      "",
      "| Option | Default | Accepted | Reload | Meaning |",
      "| --- | --- | --- | --- | --- |",
    );
    const prefix = `${section.path}${section.kind === "items" ? "[]" : ""}.`;
    parts.push(...optionRows.filter(({ path }) => path.startsWith(prefix)).map(referenceLine));
  }
  return `${parts.join("\n")}\n`;
}

function referenceLine(row: OptionRow): string {
  const name = `\`${row.path}\`${row.env === undefined ? "" : `<br>\`${row.env}\``}`;
  const fallback = row.required ? "required" : row.kind === "group" ? "" : "unset";
  const preset = row.default === undefined ? fallback : quantity(row.default, row.unit);
  const accepted = row.kind === "group" ? "a mapping" : row.accepted;
  const reload = row.reload === "live" ? "yes" : "restart";
  return `| ${[name, preset, accepted, reload, row.doc].map(tableCell).join(" | ")} |`;
}

function tableCell(text: string): string {
  return text.replaceAll("|", "\\|");
}

/** JSON Schema (draft 7) of the file, for editors; headrace.schema.json is this. */
export function configJsonSchema(): Record<string, unknown> {
  const { properties, ...rest } = optionsJsonSchema();
  return {
    ...rest,
    title: "Configuration of Headrace",
    properties: { $schema: { type: "string" }, ...(isMapping(properties) ? properties : {}) },
  };
}

// ---- reload -------------------------------------------------------------------------------------

export type ReloadPlan = {
  /** Options that changed and take effect now; lists as a whole ("nodes"). */
  readonly apply: readonly string[];
  /** Options that changed and need a restart. When there are any, nothing should be applied. */
  readonly refuse: readonly string[];
  /** How the nodes changed, by name. A changed node is to be drained and started anew. */
  readonly nodes: {
    readonly added: readonly NodeOptions[];
    readonly removed: readonly NodeOptions[];
    readonly changed: readonly { readonly from: NodeOptions; readonly to: NodeOptions }[];
  };
};

/** What a reload from `from` to `to` means. */
export function diffForReload(from: Options, to: Options): ReloadPlan {
  const changed = optionRows.filter(
    ({ path, kind }) =>
      kind !== "group" && !path.includes("[]") && !isSame(valueAt(from, path), valueAt(to, path)),
  );
  const before = new Map(from.nodes.map((node) => [node.name, node]));
  const after = new Map(to.nodes.map((node) => [node.name, node]));
  return {
    apply: changed.filter(({ reload }) => reload === "live").map(({ path }) => path),
    refuse: changed.filter(({ reload }) => reload === "restart").map(({ path }) => path),
    nodes: {
      added: to.nodes.filter(({ name }) => !before.has(name)),
      removed: from.nodes.filter(({ name }) => !after.has(name)),
      changed: from.nodes.flatMap((node) => {
        const now = after.get(node.name);
        return now === undefined || isSame(node, now) ? [] : [{ from: node, to: now }];
      }),
    },
  };
}

/** Parsed options keep the order of the schema, not of the file: equal values are equal texts. */
function isSame(left: unknown, right: unknown): boolean {
  return JSON.stringify(left) === JSON.stringify(right);
}
