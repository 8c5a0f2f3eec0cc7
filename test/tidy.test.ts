/**
 * The house style, held up by a test: which folder may import which, which package lives where, what actors
 * may not touch, and what no file may hold. Each finding names file, line and what to write instead.
 *
 * A rule is a function from a tree of sources to findings. Every rule is also run on a small tree that breaks
 * it (`breaks`: text, and the lines at fault), because a check that cannot fail is a defect.
 */
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import * as ts from "typescript/unstable/ast";
import { API } from "typescript/unstable/sync";
import { beforeAll, describe, expect, it } from "vitest";

const repository = new URL("..", import.meta.url).pathname;
const code = ["runtime", "actors", "transport", "sim", "bin", "test"] as const;

/** Where imports may point: folders, "transport (pure)", or single files. */
const arrows: Readonly<Record<(typeof code)[number], readonly string[]>> = {
  runtime: ["runtime"],
  actors: ["actors", "runtime/actor.ts", "runtime/inflight-map.ts"],
  transport: ["transport", "actors", "runtime"],
  sim: ["sim", "actors", "runtime", "transport (pure)"],
  bin: ["bin", "sim", "transport", "actors", "runtime"],
  test: [...code],
};

/** Files of transport/ that touch nothing outside: the simulator may use them. */
const pureTransport = [
  "transport/embedder-backend.ts",
  "transport/option-problems.ts",
  "transport/option-schema.ts",
  "transport/options.ts",
  "transport/peer-link.ts",
  "transport/peer-seeds.ts",
  "transport/settings.ts",
  "transport/trace-format.ts",
  "transport/wire-messages.ts",
  "transport/wire-shape.ts",
  "transport/wire.ts",
];
const purePackages = ["fastest-levenshtein", "msgpackr", "zod"];

/** The only importers of a package in shipped code. */
const packageHomes: Readonly<Record<string, readonly string[]>> = {
  "@xenova/transformers": ["transport/embedder-worker.ts"],
  "cli-progress": ["bin/"],
  commander: ["bin/"],
  picocolors: ["bin/"],
  "fastest-levenshtein": ["transport/option-problems.ts"],
  ioredis: ["transport/redis-link.ts"],
  msgpackr: ["transport/wire.ts"],
  nact: ["runtime/nact-scheduler.ts"],
  pino: ["transport/log.ts"],
  "prom-client": ["transport/metrics.ts"],
  undici: ["transport/upstream.ts"],
  usearch: ["transport/approximate-index.ts"],
  ws: ["transport/peer-socket.ts"],
  yaml: ["transport/config.ts"],
  zod: ["transport/options.ts", "transport/option-schema.ts", "transport/option-problems.ts"],
};

/** What is allowed in one place, and why. One that is not needed any more is a finding, too. */
const exceptions: readonly { rule: string; file: string; word: string; why: string }[] = [
  {
    rule: "any",
    file: "runtime/actor.ts",
    word: "any",
    why: "a tree holds children of every message type",
  },
  {
    rule: "outside",
    file: "runtime/system.ts",
    word: "Promise",
    why: "`ask` for the host, which is no actor and may wait",
  },
  {
    rule: "builtins",
    file: "sim/trace.ts",
    word: "node:fs",
    why: "trace files are read as a stream, before the simulation starts",
  },
  {
    rule: "builtins",
    file: "sim/trace.ts",
    word: "node:path",
    why: "a trace names the files beside it",
  },
  {
    rule: "builtins",
    file: "sim/plan-worker.ts",
    word: "node:worker_threads",
    why: "a plan runs many simulations at once; each is whole within its thread",
  },
  {
    rule: "builtins",
    file: "sim/law-file.ts",
    word: "node:fs",
    why: "law files are read before the simulation starts",
  },
];

/** Where the wall clock, real timers and real randomness come in. */
const outsideFiles = ["runtime/clock.ts", "runtime/random.ts", "runtime/nact-scheduler.ts"];

/** Entry points: what nobody imports. Scripts of package.json that run a built file are entries, too. */
const entries = ["bin/headrace.ts", "transport/embed.ts"];

// ---- sources -------------------------------------------------------------------------------------------------

type Source = { path: string; ast: ts.SourceFile };

type Import = {
  source: Source;
  node: ts.Node;
  /** As written. */
  specifier: string;
  /** A file of the tree, or undefined: a package or a builtin. */
  target: string | undefined;
  /** Leaves nothing behind when compiled. */
  typeOnly: boolean;
};

class Tree {
  readonly sources: readonly Source[];
  /** Every text file, sources included. */
  readonly texts: ReadonlyMap<string, string>;
  readonly imports: readonly Import[];

  constructor(sources: readonly Source[], texts: ReadonlyMap<string, string>) {
    this.sources = sources;
    this.texts = texts;
    this.imports = sources.flatMap((source) => [...importsOf(source)]);
  }

  has(path: string): boolean {
    return this.sources.some((source) => source.path === path);
  }

  manifest(): { dependencies: string[]; development: string[]; scripts: string[] } {
    type Entries = Record<string, string> | undefined;
    const { dependencies, optionalDependencies, devDependencies, scripts } = JSON.parse(
      this.texts.get("package.json") ?? "{}",
    ) as Readonly<
      Record<"dependencies" | "optionalDependencies" | "devDependencies" | "scripts", Entries>
    >;
    return {
      dependencies: Object.keys({ ...dependencies, ...optionalDependencies }),
      development: Object.keys(devDependencies ?? {}),
      scripts: Object.values(scripts ?? {}),
    };
  }
}

/** Parses trees with the compiler itself; one process for all of them. */
function parseTrees(trees: readonly ReadonlyMap<string, string>[]): Tree[] {
  const files = new Map<string, string>();
  for (const [index, texts] of trees.entries()) {
    const sources = [...texts.keys()].filter((path) => path.endsWith(".ts"));
    const compilerOptions = { noLib: true, noResolve: true, types: [] };
    files.set(`/${index}/tsconfig.json`, JSON.stringify({ compilerOptions, files: sources }));
    for (const path of sources) files.set(`/${index}/${path}`, texts.get(path) ?? "");
  }
  const api = new API({
    fs: {
      readFile: (path) => files.get(path) ?? null,
      fileExists: (path) => files.has(path),
      directoryExists: () => true,
      getAccessibleEntries: () => ({ files: [], directories: [] }),
      realpath: (path) => path,
    },
  });
  try {
    const openProjects = trees.map((_, index) => `/${index}/tsconfig.json`);
    const snapshot = api.updateSnapshot({ openProjects });
    return trees.map((texts, index) => {
      const program = snapshot.getProject(`/${index}/tsconfig.json`)?.program;
      const sources: Source[] = [];
      for (const path of texts.keys()) {
        if (!path.endsWith(".ts")) continue;
        const ast = program?.getSourceFile(`/${index}/${path}`);
        if (ast === undefined) throw new Error(`${path} was not parsed`);
        sources.push({ path, ast });
      }
      return new Tree(sources, texts);
    });
  } finally {
    api.close();
  }
}

/** Every text of the repository that is under version control, or about to be. */
function readRepository(): Map<string, string> {
  const texts = new Map<string, string>();
  const skipped = new Set([".git", "node_modules", "dist", "tmp", "bench-results", "coverage"]);
  const read = (folder: string): void => {
    for (const entry of readdirSync(join(repository, folder), { withFileTypes: true })) {
      const path = folder === "" ? entry.name : `${folder}/${entry.name}`;
      if (skipped.has(entry.name) || entry.name.endsWith(".log")) continue;
      if (entry.isDirectory()) read(path);
      else if (entry.isFile()) texts.set(path, readFileSync(join(repository, path), "utf8"));
    }
  };
  read("");
  return texts;
}

function* nodesOf(node: ts.Node): Generator<ts.Node> {
  yield node;
  const children: ts.Node[] = [];
  node.forEachChild((child) => void children.push(child));
  for (const child of children) yield* nodesOf(child);
}

function lineOf({ ast }: Source, node: ts.Node): number {
  return ast.text.slice(0, node.getStart(ast)).split("\n").length;
}

function folderOf(path: string): string {
  return path.includes("/") ? (path.split("/")[0] ?? "") : "";
}

function* importsOf(source: Source): Generator<Import> {
  const made = (node: ts.Node, specifier: string, typeOnly: boolean): Import => ({
    source,
    node,
    specifier,
    target: specifier.startsWith(".") ? join(dirname(source.path), specifier) : undefined,
    typeOnly,
  });
  for (const node of nodesOf(source.ast)) {
    if (ts.isImportDeclaration(node) && ts.isStringLiteral(node.moduleSpecifier)) {
      // `import { type A }` still loads the file: only a type import as a whole is erased.
      const typeOnly = node.importClause?.phaseModifier === ts.SyntaxKind.TypeKeyword;
      yield made(node, node.moduleSpecifier.text, typeOnly);
    } else if (ts.isExportDeclaration(node)) {
      const from = node.moduleSpecifier;
      if (from !== undefined && ts.isStringLiteral(from))
        yield made(node, from.text, node.isTypeOnly);
    } else if (ts.isImportTypeNode(node)) {
      const { argument } = node;
      if (ts.isLiteralTypeNode(argument) && ts.isStringLiteral(argument.literal)) {
        yield made(node, argument.literal.text, true);
      }
    } else if (ts.isCallExpression(node) && node.expression.kind === ts.SyntaxKind.ImportKeyword) {
      const [what] = node.arguments;
      if (what !== undefined && ts.isStringLiteral(what)) yield made(node, what.text, false);
    } else if (ts.isCallExpression(node) && /^require$/.test(textOf(source, node.expression))) {
      // An optional package, through createRequire: the compiler need not find it.
      const [what] = node.arguments;
      if (what !== undefined && ts.isStringLiteral(what)) yield made(node, what.text, false);
    } else if (ts.isCallExpression(node) && /^\w+\.script$/.test(textOf(source, node.expression))) {
      // Stack.script of the benchmarks: a process of its own, from a file beside this one.
      const [what] = node.arguments;
      if (what !== undefined && ts.isStringLiteral(what))
        yield made(node, `./${what.text}.ts`, false);
    } else if (ts.isNewExpression(node) && textOf(source, node.expression) === "URL") {
      // A worker, or a process of its own: new URL("./embedder-worker.ts", import.meta.url).
      const [what] = node.arguments ?? [];
      if (what === undefined || !ts.isStringLiteral(what) || !/^\.\.?\/.*\.[jt]s$/.test(what.text))
        continue;
      yield made(node, what.text.replace(/\.js$/, ".ts"), false);
    }
  }
}

function textOf({ ast }: Source, node: ts.Node): string {
  return ast.text.slice(node.getStart(ast), node.end);
}

// ---- rules ---------------------------------------------------------------------------------------------------

type Finding = {
  path: string;
  line: number;
  says: string;
  /** What an exception would name. */
  word?: string;
};

type Rule = {
  name: string;
  /** The property, as a test's title. */
  holds: string;
  check: (tree: Tree) => Iterable<Finding>;
  /** A tree that breaks the rule, and exactly where. */
  breaks: { texts: Readonly<Record<string, string>>; at: readonly string[] };
};

function at(source: Source, node: ts.Node, says: string, word?: string): Finding {
  const finding = { path: source.path, line: lineOf(source, node), says };
  return word === undefined ? finding : { ...finding, word };
}

function packageOf(specifier: string): string {
  const parts = specifier.split("/");
  return specifier.startsWith("@") ? parts.slice(0, 2).join("/") : (parts[0] ?? "");
}

function isBuiltin(specifier: string): boolean {
  return specifier.startsWith("node:");
}

function isShipped(path: string): boolean {
  return /^(runtime|actors|transport|sim|bin)\//.test(path);
}

/** A rule about single nodes of the sources that `applies` names. */
function nodeRule(
  applies: (path: string) => boolean,
  check: (node: ts.Node, source: Source) => { says: string; word?: string } | undefined,
): Rule["check"] {
  return function* (tree) {
    for (const source of tree.sources) {
      if (!applies(source.path)) continue;
      for (const node of nodesOf(source.ast)) {
        const wrong = check(node, source);
        if (wrong !== undefined) yield at(source, node, wrong.says, wrong.word);
      }
    }
  };
}

/** Words that are spelled in halves here, so that this file passes its own rules. */
const marks = ["TO" + "DO", "FIX" + "ME", "X" + "XX"];
const machinePaths = ["work", "home", "Users"].map((name) => `/${name}/`);
const registries = ["npmjs", "yarnpkg", "npmmirror"].map(
  (name) => `registry\\.${name}\\.(org|com)`,
);

const rules: readonly Rule[] = [
  {
    name: "arrows",
    holds: "imports run one way: runtime ← actors ← transport ← bin, and sim beside transport",
    *check(tree) {
      for (const { source, node, target, specifier } of tree.imports) {
        if (target === undefined) continue;
        if (!tree.has(target)) {
          if (/\.ts$/.test(specifier) || !/\.[a-z]+$/.test(specifier)) {
            yield at(source, node, `"${specifier}" is no file: name it with its .ts ending`);
          }
          continue;
        }
        const from = folderOf(source.path) as keyof typeof arrows;
        const accepted = arrows[from] ?? code;
        const isPure = pureTransport.includes(target);
        const fits = (to: string): boolean =>
          to === target || (to === "transport (pure)" ? isPure : to === folderOf(target));
        if (accepted.some(fits)) continue;
        yield at(
          source,
          node,
          `${from}/ may not import ${target}; it may import ${accepted.join(", ")}`,
        );
      }
    },
    breaks: {
      texts: {
        "runtime/a.ts": `import { b } from "../actors/b.ts";\nb();`,
        "actors/b.ts": `import "../runtime/actor.ts";\nimport type { S } from "../runtime/system.ts";`,
        "runtime/actor.ts": "export {};",
        "runtime/system.ts": `export type S = 1;\nconst x = await import("../transport/front.ts");`,
        "transport/front.ts": `import { s } from "../sim/s.ts";`,
        "transport/wire.ts": "export {};",
        "sim/s.ts": `import "../transport/wire.ts";\nexport { f } from "../transport/front.ts";`,
        "bin/c.ts": `import "../sim/s.ts";\nimport "../test/t.ts";\nimport "../sim/s";`,
        "test/t.ts": `import "../bin/c.ts";`,
      },
      at: [
        "runtime/a.ts:1",
        "actors/b.ts:2",
        "runtime/system.ts:2",
        "transport/front.ts:1",
        "sim/s.ts:2",
        "bin/c.ts:2",
        "bin/c.ts:3",
      ],
    },
  },
  {
    name: "cycles",
    holds: "no file loads itself by way of others",
    *check(tree) {
      const next = new Map<string, Import[]>();
      for (const edge of tree.imports) {
        if (edge.typeOnly || edge.target === undefined) continue;
        next.set(edge.source.path, [...(next.get(edge.source.path) ?? []), edge]);
      }
      for (const { source, node, target, typeOnly } of tree.imports) {
        if (typeOnly || target === undefined) continue;
        const way = wayBetween(next, target, source.path);
        if (way === undefined || way.some((path) => path < source.path)) continue; // Told once.
        const circle = [source.path, ...way].join(" → ");
        yield at(
          source,
          node,
          `${circle}: move what both need into a file of its own, or import the type only`,
        );
      }
    },
    breaks: {
      texts: {
        "actors/a.ts": `import { b } from "./b.ts";`,
        "actors/b.ts": `import type { D } from "./d.ts";\nimport { c } from "./c.ts";`,
        "actors/c.ts": `export * from "./a.ts";`,
        "actors/d.ts": `import { b } from "./b.ts";`,
      },
      at: ["actors/a.ts:1"],
    },
  },
  {
    name: "pure transport",
    holds: "what the simulator may use of transport/ touches nothing outside",
    *check(tree) {
      for (const { source, node, target, specifier, typeOnly } of tree.imports) {
        if (typeOnly || !pureTransport.includes(source.path)) continue;
        const isFine =
          target === undefined
            ? specifier === "node:crypto" || purePackages.includes(packageOf(specifier))
            : pureTransport.includes(target) || /^(runtime|actors)\//.test(target);
        if (isFine) continue;
        yield at(
          source,
          node,
          `a pure file loads "${specifier}"; import its types only, or move what is pure out of it`,
        );
      }
    },
    breaks: {
      texts: {
        "transport/settings.ts":
          `import { readFile } from "node:fs";\nimport type { U } from "./upstream.ts";\n` +
          `import { upstreamDefaults } from "./upstream.ts";\nimport { hash } from "node:crypto";`,
        "transport/upstream.ts": `import { Pool } from "undici";`,
      },
      at: ["transport/settings.ts:1", "transport/settings.ts:3"],
    },
  },
  {
    name: "packages",
    holds: "each package is declared, used, and imported where it belongs",
    *check(tree) {
      const { dependencies, development } = tree.manifest();
      const used = new Set<string>();
      for (const { source, node, specifier, target } of tree.imports) {
        if (target !== undefined || isBuiltin(specifier)) continue;
        const name = packageOf(specifier);
        used.add(name);
        const shipped = isShipped(source.path);
        if (!dependencies.includes(name) && (shipped || !development.includes(name))) {
          yield at(
            source,
            node,
            `${name} is not in package.json's ${shipped ? "" : "dev"}dependencies`,
          );
        }
        if (!shipped) continue;
        const homes = packageHomes[name];
        if (homes === undefined) {
          yield at(source, node, `${name} has no home in packageHomes of test/tidy.test.ts`);
        } else if (
          !homes.some(
            (home) => source.path === home || (home.endsWith("/") && source.path.startsWith(home)),
          )
        ) {
          yield at(
            source,
            node,
            `${name} is imported by ${homes.join(" and ")} only: use what is exported there`,
          );
        }
      }
      for (const name of dependencies) {
        if (used.has(name)) continue;
        yield { path: "package.json", line: 1, says: `${name} is used by no file: remove it` };
      }
    },
    breaks: {
      texts: {
        "package.json": `{"dependencies": {"undici": "7", "zod": "4", "left-pad": "1"}, "devDependencies": {"ai": "5"}, "optionalDependencies": {"usearch": "2"}}`,
        "transport/upstream.ts": `import { Pool } from "undici";`,
        "transport/front.ts": `import type { Pool } from "undici";\nimport { z } from "zod/mini";\nimport "ai";`,
        "actors/a.ts": `import express from "express";`,
        "transport/approximate-index.ts": `const require = createRequire(import.meta.url);\nrequire("usearch");`,
        "actors/other.ts": `require("usearch");`,
        "test/t.test.ts": `import "ai";\nimport "vitest";`,
      },
      at: [
        "transport/front.ts:1",
        "transport/front.ts:2",
        "transport/front.ts:3",
        "transport/front.ts:3",
        "actors/a.ts:1",
        "actors/a.ts:1",
        "actors/other.ts:1",
        "test/t.test.ts:2",
        "package.json:1",
      ],
    },
  },
  {
    name: "builtins",
    holds: "runtime, actors and sim use nothing of Node but what clock and random wrap",
    *check(tree) {
      for (const { source, node, specifier } of tree.imports) {
        const folder = folderOf(source.path);
        if (!isBuiltin(specifier) || !["runtime", "actors", "sim"].includes(folder)) continue;
        if (outsideFiles.includes(source.path) && /^node:(crypto|perf_hooks)$/.test(specifier))
          continue;
        yield at(
          source,
          node,
          `"${specifier}": what touches the outside belongs to transport/`,
          specifier,
        );
      }
    },
    breaks: {
      texts: {
        "runtime/clock.ts": `import { performance } from "node:perf_hooks";\nimport { readFileSync } from "node:fs";`,
        "actors/a.ts": `import { hash } from "node:crypto";`,
        "sim/s.ts": `import { connect } from "node:net";`,
        "transport/t.ts": `import { connect } from "node:net";`,
      },
      at: ["runtime/clock.ts:2", "actors/a.ts:1", "sim/s.ts:1"],
    },
  },
  {
    name: "outside",
    holds: "actors and runtime take time, randomness and effects from their context",
    check: nodeRule(
      (path) => /^(runtime|actors)\//.test(path) && !outsideFiles.includes(path),
      (node, source) => {
        const instead = outsideWords.get(outsideWordOf(node, source) ?? "");
        const word = outsideWordOf(node, source);
        if (instead === undefined || word === undefined) return undefined;
        return { says: `${word}: ${instead}`, word };
      },
    ),
    breaks: {
      texts: {
        "actors/a.ts": [
          `const t = Date.now(); // Date in a comment, "Promise" in a text: no harm.`,
          "const u = performance.now();",
          "const r = Math.random();",
          "const id = crypto.randomUUID();",
          "setTimeout(() => {}, 1);",
          "setInterval(() => {}, 1);",
          "setImmediate(() => {});",
          "queueMicrotask(() => {});",
          "process.nextTick(() => {});",
          `console.log("Date");`,
          "async function f() {}",
          "const g = async () => {};",
          "class C { async m(): Promise<void> { await f(); } }",
          "for await (const x of y) {}",
          "globalThis.setTimeout(f, 1);",
          "const fine = { Date: 1, process: context.process, random: context.random() }.Date;",
          "type Fine = { Promise: 1; performance(): number };",
        ].join("\n"),
        "runtime/clock.ts": "setTimeout(() => performance.now(), 1);",
        "transport/t.ts": "setTimeout(() => Date.now(), 1);",
      },
      at: [
        ...Array.from({ length: 12 }, (_, index) => `actors/a.ts:${index + 1}`),
        "actors/a.ts:13",
        "actors/a.ts:13",
        "actors/a.ts:13",
        "actors/a.ts:14",
        "actors/a.ts:15",
      ],
    },
  },
  {
    name: "powers",
    holds: "sim and actors compute the same bits on every Node: no powers",
    check: nodeRule(
      (path) => /^(sim|actors)\//.test(path),
      (node, source) => {
        const isPower =
          node.kind === ts.SyntaxKind.AsteriskAsteriskToken ||
          node.kind === ts.SyntaxKind.AsteriskAsteriskEqualsToken ||
          (ts.isPropertyAccessExpression(node) && textOf(source, node) === "Math.pow");
        if (!isPower) return undefined;
        return { says: "powers differ between versions of Node: multiply, or use a table" };
      },
    ),
    breaks: {
      texts: {
        "sim/s.ts": `const a = 2 ** 3;\nlet b = 2;\nb **= 2;\nconst c = Math.pow(2, 3); // 2 ** 3\n/** A. **/`,
        "transport/t.ts": "const a = 2 ** 3;",
      },
      at: ["sim/s.ts:1", "sim/s.ts:3", "sim/s.ts:4"],
    },
  },
  {
    name: "any",
    holds: "no type is talked away",
    check: nodeRule(
      (path) => path.endsWith(".ts"),
      (node, source) => {
        if (node.kind === ts.SyntaxKind.AnyKeyword) {
          return { says: "any: write the type, or unknown and a check", word: "any" };
        }
        if (ts.isAsExpression(node)) {
          const { expression } = node;
          const isTwice =
            ts.isAsExpression(expression) && textOf(source, expression.type) === "unknown";
          return isTwice
            ? { says: "as unknown as: write a guard that checks", word: "as" }
            : undefined;
        }
        const isSure =
          ts.isNonNullExpression(node) ||
          ((ts.isPropertyDeclaration(node) || ts.isVariableDeclaration(node)) &&
            /^[^:=]*!\s*:/.test(textOf(source, node)));
        if (isSure) return { says: "`!`: say what happens when it is absent", word: "!" };
        if (!ts.isTypeAssertion(node)) return undefined;
        return { says: "<T>x: write `x as T`, or a guard that checks", word: "<T>" };
      },
    ),
    breaks: {
      texts: {
        "test/t.ts": [
          "const a: any = 1; // any",
          "const b = a as unknown as string;",
          "const c = d!.e;",
          "class F { g!: string; h = !i; }",
          "let j: Array<any>;",
          "const k = <string>l;",
          `const any = m as unknown; const n = o !== p; const q = "x as unknown as y";`,
        ].join("\n"),
      },
      at: [
        "test/t.ts:1",
        "test/t.ts:2",
        "test/t.ts:3",
        "test/t.ts:4",
        "test/t.ts:5",
        "test/t.ts:6",
      ],
    },
  },
  {
    name: "syntax",
    holds: "no enum, no namespace, no default export, no barrel",
    check: nodeRule(
      (path) => path !== "vitest.config.ts",
      (node) => {
        if (ts.isEnumDeclaration(node)) return { says: "enum: write a union of texts" };
        if (ts.isModuleDeclaration(node)) return { says: "namespace: a file is one already" };
        if (ts.isExportAssignment(node)) return { says: "export default: give it its name" };
        if (
          ts.isExportDeclaration(node) &&
          node.moduleSpecifier !== undefined &&
          node.exportClause === undefined
        ) {
          return { says: "export *: import from the file that owns it" };
        }
        if (!ts.isClassDeclaration(node) && !ts.isFunctionDeclaration(node)) return undefined;
        const isDefault = node.modifiers?.some(({ kind }) => kind === ts.SyntaxKind.DefaultKeyword);
        return isDefault ? { says: "export default: give it its name" } : undefined;
      },
    ),
    breaks: {
      texts: {
        "bin/b.ts": [
          "enum A { B }",
          "namespace C {}",
          "export default 1;",
          "export default function d() {}",
          "export default class E {}",
          `export * from "./f.ts";`,
          `export type { G } from "./g.ts"; switch (1) { default: }`,
        ].join("\n"),
        "vitest.config.ts": "export default {};",
      },
      at: ["bin/b.ts:1", "bin/b.ts:2", "bin/b.ts:3", "bin/b.ts:4", "bin/b.ts:5", "bin/b.ts:6"],
    },
  },
  {
    name: "file names",
    holds: "a file is named after what it owns, in kebab-case",
    *check(tree) {
      for (const { path } of tree.sources) {
        const name = (path.split("/").at(-1) ?? "").replace(/(\.test|\.config)?\.ts$/, "");
        const isVague = /^(index|utils?|common|types|helpers?|managers?|misc|shared)$/.test(name);
        if (isVague)
          yield { path, line: 1, says: `"${name}" says nothing: name what the file owns` };
        else if (!/^[a-z0-9]+(-[a-z0-9]+)*$/.test(name)) {
          yield { path, line: 1, says: `"${name}" is not kebab-case` };
        }
      }
    },
    breaks: {
      texts: {
        "actors/index.ts": "",
        "runtime/utils.ts": "",
        "test/helpers.test.ts": "",
        "sim/gpuNode.ts": "",
        "transport/http-front.ts": "",
      },
      at: ["actors/index.ts:1", "runtime/utils.ts:1", "test/helpers.test.ts:1", "sim/gpuNode.ts:1"],
    },
  },
  {
    name: "marks",
    holds: "nothing is left to be done later",
    *check(tree) {
      const mark = new RegExp(`\\b(${marks.join("|")})\\b`);
      yield* linesWith(
        tree,
        (path) => path !== "package-lock.json",
        mark,
        (found) => `${found}: do it, or say why not`,
      );
    },
    breaks: {
      texts: {
        "sim/s.ts": marks.map((mark) => `// ${mark}: later`).join("\n"),
        "README.md": `All of it ${marks[0]}.\nTODOS and xxx are words.`,
      },
      at: ["sim/s.ts:1", "sim/s.ts:2", "sim/s.ts:3", "README.md:1"],
    },
  },
  {
    name: "only",
    holds: "every test runs",
    check: nodeRule(
      (path) => path.startsWith("test/"),
      (node, source) => {
        if (!ts.isPropertyAccessExpression(node) || !/^(only|skip|todo)$/.test(node.name.text))
          return undefined;
        if (!/^(it|test|describe|suite|bench)\b/.test(textOf(source, node))) return undefined;
        return {
          says: `.${node.name.text}: run it, remove it, or write skipIf with a reason that is printed`,
        };
      },
    ),
    breaks: {
      texts: {
        "test/t.test.ts": [
          `it.only("a", () => {});`,
          `describe.only.each([1])("b", () => {});`,
          `test.skip("c", () => {});`,
          `it.skipIf(true)("d", () => ranking.only("e"));`,
        ].join("\n"),
      },
      at: ["test/t.test.ts:1", "test/t.test.ts:2", "test/t.test.ts:3"],
    },
  },
  {
    name: "orphans",
    holds:
      "every file is reached: shipped code from the command or the library, the rest from a test",
    *check(tree) {
      const tests = tree.sources
        .map(({ path }) => path)
        .filter((path) => path.endsWith(".test.ts"));
      const run = tree
        .manifest()
        .scripts.flatMap((script) => [...script.matchAll(/dist\/(\S+)\.js/g)])
        .map(([, path]) => `${path}.ts`);
      const shipped = reached(tree, entries);
      const tested = reached(tree, [...tests, ...run, ...entries]);
      for (const { path } of tree.sources) {
        if (isShipped(path) && !shipped.has(path)) {
          const word = tested.has(path) ? "only tests import it" : "nobody imports it";
          yield { path, line: 1, says: `${word}: use it, or remove it`, word };
        } else if (path.startsWith("test/") && !tested.has(path)) {
          yield {
            path,
            line: 1,
            says: "no test imports it and no script runs it: use it, or remove it",
          };
        }
      }
    },
    breaks: {
      texts: {
        "bin/headrace.ts": `const { a } = await import("../transport/a.ts");`,
        "transport/embed.ts": `import type { B } from "./b.ts";`,
        "transport/a.ts": `new Worker(new URL("./worker.js", import.meta.url));`,
        "transport/b.ts": "",
        "transport/worker.ts": "",
        "sim/lonely.ts": `import "./friend.ts";`,
        "sim/friend.ts": "",
        "sim/tested.ts": "",
        "package.json": `{"scripts": {"bench": "npm run build && node dist/test/bench/main.js --all"}}`,
        "test/bench/main.ts": `await stack.script("child");`,
        "test/bench/child.ts": "",
        "test/bench/old-child.ts": "",
        "test/a.test.ts": `import "../sim/tested.ts";\nimport "./kit.ts";`,
        "test/kit.ts": "",
        "test/old-kit.ts": "",
      },
      at: [
        "sim/lonely.ts:1",
        "sim/friend.ts:1",
        "sim/tested.ts:1",
        "test/old-kit.ts:1",
        "test/bench/old-child.ts:1",
      ],
    },
  },
  {
    name: "documents",
    holds: "what the library's user and every actor see of a file has a doc comment",
    *check(tree) {
      for (const source of tree.sources) {
        if (source.path !== "transport/embed.ts" && !source.path.startsWith("actors/")) continue;
        for (const statement of source.ast.statements) {
          const name = undocumented(statement, source);
          if (name === undefined) continue;
          yield at(
            source,
            statement,
            `${name} is exported without a doc comment: purpose, units, ranges, refusals`,
          );
        }
      }
    },
    breaks: {
      texts: {
        "actors/a.ts": [
          `import type { X } from "./x.ts";`,
          "export class A {}",
          "export function b(): void {}",
          "export const c = 1;",
          "export type D = X;",
          "// No doc comment.",
          "export interface E {}",
          "/** One. */",
          "export class F {}",
          "/** One, with a line between. */",
          "// biome-ignore lint: a reason.",
          "export type G = X;",
          "class Inner {}",
          "export type H = { a: 1 } // One.\n| { /** Two. */ b: 2 };",
        ].join("\n"),
        "actors/late-node.ts": `/** Owns it. */\nimport "./a.ts";\nexport class LateNodeActor {}\nexport class Other {}`,
        "transport/embed.ts": `export type { X } from "./x.ts";\nexport async function h() {}`,
        "transport/other.ts": "export class A {}",
      },
      at: [
        "actors/a.ts:2",
        "actors/a.ts:3",
        "actors/a.ts:4",
        "actors/a.ts:5",
        "actors/a.ts:7",
        "actors/late-node.ts:4",
        "transport/embed.ts:2",
      ],
    },
  },
  {
    name: "addresses",
    holds: "nothing names a place that only our machine knows",
    *check(tree) {
      const own = process.env.npm_config_registry;
      const hosts = [...registries, ...(own === undefined ? [] : [escaped(new URL(own).host)])];
      const place = new RegExp([...machinePaths, ...hosts].join("|"));
      yield* linesWith(
        tree,
        () => true,
        place,
        (found) => `"${found}": write a relative path, or leave it out`,
      );
    },
    breaks: {
      texts: {
        "test/t.ts": `const a = "${machinePaths[0]}shared/data";\nconst b = "../shared/work";`,
        "package-lock.json": `{\n"resolved": "https://registry.${"npmjs"}.org/nact"}`,
      },
      at: ["test/t.ts:1", "package-lock.json:2"],
    },
  },
];

/** Words of the outside world, and what an actor uses instead. */
const outsideWords: ReadonlyMap<string, string> = new Map([
  ...["Date", "performance"].map((word) => [word, "the time is context.nowMs"] as const),
  ...["setTimeout", "setInterval", "setImmediate", "queueMicrotask", "nextTick"].map(
    (word) => [word, "use context.startTimer"] as const,
  ),
  ...["Math.random", "randomUUID"].map((word) => [word, "use context.random()"] as const),
  ...["async", "await", "Promise"].map(
    (word) => [word, "a turn never waits: ask, and go on when the reply comes"] as const,
  ),
  ["process", "options come through the constructor"],
  ["console", "emit an event"],
  ["globalThis", "what is outside comes through context"],
]);

/** The outside's word that this very node uses, if any. */
function outsideWordOf(node: ts.Node, source: Source): string | undefined {
  if (node.kind === ts.SyntaxKind.AsyncKeyword) return "async";
  if (ts.isAwaitExpression(node) || (ts.isForOfStatement(node) && node.awaitModifier !== undefined))
    return "await";
  if (ts.isPropertyAccessExpression(node)) {
    if (textOf(source, node) === "Math.random") return "Math.random";
    // `process.nextTick` is reported as `process`, `crypto.randomUUID` as itself.
    return node.name.text === "randomUUID" ? "randomUUID" : undefined;
  }
  if (!ts.isIdentifier(node) || isMemberName(node)) return undefined;
  return node.text;
}

/** A name behind a dot or in a shape means a member of ours, not the global. */
function isMemberName(node: ts.Identifier): boolean {
  const { parent } = node;
  const isNamed =
    ts.isPropertyAccessExpression(parent) ||
    ts.isPropertyAssignment(parent) ||
    ts.isPropertySignatureDeclaration(parent) ||
    ts.isPropertyDeclaration(parent) ||
    ts.isMethodSignatureDeclaration(parent) ||
    ts.isMethodDeclaration(parent);
  return isNamed && parent.name === node;
}

/** The way from one file to another along imports that load, or undefined. */
function wayBetween(
  next: ReadonlyMap<string, readonly Import[]>,
  from: string,
  to: string,
): string[] | undefined {
  const before = new Map<string, string | undefined>([[from, undefined]]);
  for (const path of before.keys()) {
    if (path === to) {
      const way: string[] = [];
      for (let step: string | undefined = to; step !== undefined; step = before.get(step))
        way.unshift(step);
      return way;
    }
    for (const { target } of next.get(path) ?? []) {
      if (target !== undefined && !before.has(target)) before.set(target, path);
    }
  }
  return undefined;
}

function reached(tree: Tree, from: readonly string[]): Set<string> {
  const found = new Set(from.filter((path) => tree.has(path)));
  for (const path of found) {
    for (const { source, target } of tree.imports) {
      if (source.path === path && target !== undefined && tree.has(target)) found.add(target);
    }
  }
  return found;
}

/**
 * The name of an exported declaration that nothing explains: neither a comment above it, nor (a type or a table)
 * comments at its members, nor (the class that its file is named after) the file's header.
 */
function undocumented(statement: ts.Statement, source: Source): string | undefined {
  const isDeclared =
    ts.isClassDeclaration(statement) ||
    ts.isFunctionDeclaration(statement) ||
    ts.isInterfaceDeclaration(statement) ||
    ts.isTypeAliasDeclaration(statement) ||
    ts.isVariableStatement(statement);
  if (!isDeclared || (statement.jsDoc?.length ?? 0) > 0) return undefined;
  if (!statement.modifiers?.some(({ kind }) => kind === ts.SyntaxKind.ExportKeyword))
    return undefined;
  const inside = textOf(source, statement);
  const name =
    /^export (?:\w+ )*?(?:class|function\*?|interface|type|const) (\w+)/.exec(inside)?.[1] ?? "it";
  if (ts.isFunctionDeclaration(statement)) return name;
  if (!ts.isClassDeclaration(statement)) return /\/\*\*|\/\/ /.test(inside) ? undefined : name;
  const owner = (source.path.split("/").at(-1) ?? "").replace(/\.ts$/, "").replaceAll("-", "");
  const isHeaded = name.toLowerCase().replace(/actor$/, "") === owner.replace(/actor$/, "");
  return isHeaded && source.ast.text.startsWith("/**") ? undefined : name;
}

function* linesWith(
  tree: Tree,
  applies: (path: string) => boolean,
  pattern: RegExp,
  says: (found: string) => string,
): Generator<Finding> {
  for (const [path, text] of tree.texts) {
    if (!applies(path) || !pattern.test(text)) continue;
    for (const [index, line] of text.split("\n").entries()) {
      const found = pattern.exec(line)?.[0];
      if (found !== undefined) yield { path, line: index + 1, says: says(found) };
    }
  }
}

function escaped(text: string): string {
  return text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
}

// ---- the tests -----------------------------------------------------------------------------------------------

let repositoryTree: Tree;
const brokenTrees = new Map<string, Tree>();

beforeAll(() => {
  const broken = rules.map(({ breaks }) => new Map(Object.entries(breaks.texts)));
  const [whole, ...others] = parseTrees([readRepository(), ...broken]);
  if (whole === undefined) throw new Error("no tree was parsed");
  repositoryTree = whole;
  for (const [index, { name }] of rules.entries()) {
    const tree = others[index];
    if (tree !== undefined) brokenTrees.set(name, tree);
  }
});

describe("tidy", () => {
  it("reads the whole repository", () => {
    expect(repositoryTree.sources.length).toBeGreaterThan(80);
    for (const folder of code) {
      expect(repositoryTree.sources.some(({ path }) => path.startsWith(`${folder}/`))).toBe(true);
    }
  });

  it.each(rules.map((rule) => [rule.holds, rule] as const))("%s", (_, { name, check }) => {
    const findings = [...check(repositoryTree)]
      .filter(
        ({ path, word }) =>
          !exceptions.some((e) => e.rule === name && e.file === path && e.word === word),
      )
      .map(({ path, line, says }) => `${path}:${line} ${says}`);
    expect(findings).toEqual([]);
  });

  it.each(rules.map((rule) => [rule.name, rule] as const))(
    "notices a breach of its rule: %s",
    (name, { check, breaks }) => {
      const tree = brokenTrees.get(name);
      if (tree === undefined) throw new Error("its tree was not parsed");
      const found = [...check(tree)].map(({ path, line }) => `${path}:${line}`);
      expect(found.sort()).toEqual([...breaks.at].sort());
    },
  );

  it("every exception is still needed", () => {
    const stale = exceptions.filter(({ rule, file, word }) => {
      const findings = rules
        .filter(({ name }) => name === rule)
        .flatMap(({ check }) => [...check(repositoryTree)]);
      return !findings.some((finding) => finding.path === file && finding.word === word);
    });
    expect(stale).toEqual([]);
  });
});
