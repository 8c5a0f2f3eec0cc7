/**
 * Step laws as files: what `headrace calibrate --out` writes, and what a simulation may be given in place of the name
 * of a shipped law.
 *
 * A law file is one JSON object, version 1:
 *
 *   format        "headrace-law"            v             1
 *   name          of the law                provenance    where the numbers come from
 *   validated     compared with requests that the fit never saw (true, false)
 *   note          what a reader of results must know
 *   coefficients  { h, W, d, F, C, a0, aB, actx, p0, pq, U?, s?, comm? }, µs, as in laws.ts; tables are [[x, µs], …]
 *   limits        { kvBlocks, kvBlocksFrom: "measured" | "formula" | "log", batchedTokensMax, sequencesMax }
 *   startUpUs     from process start to ready
 *   hardware      as in laws.ts; absent: unknown, and physics is not checked
 *
 * Unknown fields are errors: a misspelt coefficient must not read as 0.
 */
import { readFileSync } from "node:fs";
import { type CostTable, type Hardware, lawByName, lawNames, type StepLaw } from "./laws.ts";

/** A law file, or the name of a law, that cannot be used. */
export class LawError extends Error {
  override readonly name = "LawError";
}

/** Of a law fitted to a log alone: no model size, no card, so that no bound of physics applies. */
export const UNKNOWN_HARDWARE: Hardware = {
  parameters: 0,
  embeddingParameters: 0,
  bytesPerParameter: 0,
  kvBytesPerToken: 0,
  tensorParallel: 1,
  memoryGiB: 0,
  bandwidthBytesPerSecond: Number.POSITIVE_INFINITY,
  flopsPerSecond: Number.POSITIVE_INFINITY,
};

const FORMAT = "headrace-law";
const VERSION = 1;
const FILE_BYTES_MAX = 1_048_576;
const TABLE_POINTS_MAX = 1000;

/** The text of a law file. */
export function formatLaw(law: StepLaw): string {
  const { h, W, d, F, C, a0, aB, actx, p0, pq, U, s, comm } = law;
  const file = {
    format: FORMAT,
    v: VERSION,
    name: law.name,
    provenance: law.provenance,
    validated: law.validated,
    note: law.note,
    coefficients: {
      ...{ h, W, d, F, C, a0, aB, actx, p0, pq },
      ...(U !== undefined && { U }),
      ...(s.length > 0 && { s }),
      ...(comm.length > 0 && { comm }),
    },
    limits: {
      kvBlocks: law.kvBlocks,
      kvBlocksFrom: law.kvBlocksFrom,
      batchedTokensMax: law.batchedTokensMax,
      sequencesMax: law.sequencesMax,
    },
    startUpUs: law.startUpUs,
    ...(law.hardware !== UNKNOWN_HARDWARE && { hardware: law.hardware }),
  };
  return `${JSON.stringify(file, null, 2)}\n`;
}

/** Reads a law file's text. Throws LawError that names the field, what was found and what is accepted. */
export function parseLaw(text: string, file = "law"): StepLaw {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new LawError(`${file}: not JSON (${error instanceof Error ? error.message : error})`);
  }
  const top = new Fields(value, file, "");
  top.expect("format", FORMAT);
  top.expect("v", VERSION);
  const numbers = new Fields(top.take("coefficients"), file, "coefficients.");
  const limits = new Fields(top.take("limits"), file, "limits.");
  const law: StepLaw = {
    name: top.text("name"),
    // Negative: the node is faster than the kernel profiles that the law began with.
    h: numbers.number("h", Number.NEGATIVE_INFINITY),
    W: numbers.number("W", 0),
    d: numbers.number("d", 0),
    F: numbers.number("F", 0),
    C: numbers.number("C", 0),
    s: numbers.optional("s", (name) => numbers.table(name)) ?? [],
    a0: numbers.number("a0", 0),
    aB: numbers.number("aB", Number.NEGATIVE_INFINITY),
    actx: numbers.number("actx", 0),
    p0: numbers.number("p0", 0),
    pq: numbers.number("pq", 0),
    ...numbers.optional("U", (name) => ({ U: numbers.number(name, 0) })),
    comm: numbers.optional("comm", (name) => numbers.table(name)) ?? [],
    kvBlocks: limits.whole("kvBlocks", 1),
    kvBlocksFrom: limits.oneOf("kvBlocksFrom", ["measured", "formula", "log"]),
    batchedTokensMax: limits.whole("batchedTokensMax", 1),
    sequencesMax: limits.whole("sequencesMax", 1),
    startUpUs: top.whole("startUpUs", 0),
    hardware:
      top.optional("hardware", (name) => hardwareOf(top.take(name), file)) ?? UNKNOWN_HARDWARE,
    provenance: top.text("provenance"),
    validated: top.flag("validated"),
    note: top.text("note"),
  };
  for (const fields of [top, numbers, limits]) fields.end();
  checkRelations(law, file);
  return law;
}

/** A shipped law by its name, or else the law in that file. Throws LawError. */
export function loadLaw(nameOrFile: string): StepLaw {
  if (lawNames().includes(nameOrFile)) return lawByName(nameOrFile);
  let text: string;
  try {
    text = readFileSync(nameOrFile, "utf8");
  } catch (error) {
    const code = error instanceof Error && "code" in error ? String(error.code) : "";
    const why = code === "ENOENT" ? "no such file" : `cannot be read (${code})`;
    throw new LawError(
      `${JSON.stringify(nameOrFile)} is no shipped law, and as a file: ${why}; accepted: a law file of ` +
        `\`headrace calibrate --out\`, or one of ${lawNames().join(", ")}`,
    );
  }
  if (text.length > FILE_BYTES_MAX) {
    throw new LawError(`${nameOrFile}: longer than ${FILE_BYTES_MAX} bytes; this is no law file`);
  }
  return parseLaw(text, nameOrFile);
}

function hardwareOf(value: unknown, file: string): Hardware {
  const fields = new Fields(value, file, "hardware.");
  const above0 = (name: string) => fields.number(name, Number.MIN_VALUE);
  const hardware: Hardware = {
    parameters: above0("parameters"),
    embeddingParameters: fields.number("embeddingParameters", 0),
    bytesPerParameter: above0("bytesPerParameter"),
    kvBytesPerToken: above0("kvBytesPerToken"),
    tensorParallel: fields.whole("tensorParallel", 1),
    memoryGiB: above0("memoryGiB"),
    bandwidthBytesPerSecond: above0("bandwidthBytesPerSecond"),
    flopsPerSecond: above0("flopsPerSecond"),
  };
  fields.end();
  return hardware;
}

function checkRelations(law: StepLaw, file: string): void {
  const wrong = (text: string) => new LawError(`${file}: ${text}`);
  if (law.batchedTokensMax < law.sequencesMax) {
    throw wrong(
      `limits.batchedTokensMax is ${law.batchedTokensMax}; it must be at least limits.sequencesMax (${law.sequencesMax})`,
    );
  }
  // One more decode must never make a step shorter, whichever of the two lines holds.
  const least = Math.min(law.d, law.C);
  if (law.aB < -least) {
    throw wrong(
      `coefficients.aB is ${law.aB}; it must be at least ${-least}, less the smaller of d and C`,
    );
  }
  // A step of one decode takes time.
  if (law.h + Math.max(law.W, law.F) + law.a0 <= 0) {
    throw wrong(`coefficients.h is ${law.h}; with W, F and a0 a step must take more than 0 µs`);
  }
}

/** Fields of one JSON object, each taken once. */
class Fields {
  readonly #fields: Map<string, unknown>;
  readonly #file: string;
  readonly #prefix: string;
  readonly #known: string[] = [];

  constructor(value: unknown, file: string, prefix: string) {
    if (typeof value !== "object" || value === null || Array.isArray(value)) {
      const what = prefix === "" ? "the file" : prefix.slice(0, -1);
      throw new LawError(`${file}: ${what} is ${shown(value)}; it must be a JSON object`);
    }
    this.#fields = new Map(Object.entries(value));
    this.#file = file;
    this.#prefix = prefix;
  }

  take(name: string): unknown {
    this.#known.push(name);
    const value = this.#fields.get(name);
    this.#fields.delete(name);
    return value;
  }

  expect(name: string, wanted: string | number): void {
    const value = this.take(name);
    if (value !== wanted) throw this.#wrong(name, value, `this version reads ${shown(wanted)}`);
  }

  optional<T>(name: string, read: (name: string) => T): T | undefined {
    if (this.#fields.has(name)) return read(name);
    this.#known.push(name);
    return undefined;
  }

  text(name: string): string {
    const value = this.take(name);
    if (typeof value === "string" && value !== "") return value;
    throw this.#wrong(name, value, "it must be a text, not empty");
  }

  flag(name: string): boolean {
    const value = this.take(name);
    if (typeof value === "boolean") return value;
    throw this.#wrong(name, value, "it must be true or false");
  }

  number(name: string, least: number): number {
    const value = this.take(name);
    if (typeof value === "number" && Number.isFinite(value) && value >= least) return value;
    const bound = least === Number.MIN_VALUE ? "above 0" : `${least} or more`;
    const range = Number.isFinite(least) ? `, ${bound}` : "";
    throw this.#wrong(name, value, `it must be a number${range}`);
  }

  whole(name: string, least: number): number {
    const value = this.take(name);
    if (Number.isSafeInteger(value) && (value as number) >= least) return value as number;
    throw this.#wrong(name, value, `it must be a whole number, ${least} or more`);
  }

  oneOf<T extends string>(name: string, words: readonly T[]): T {
    const value = this.take(name);
    const found = words.find((word) => word === value);
    if (found !== undefined) return found;
    throw this.#wrong(name, value, `accepted: ${words.join(", ")}`);
  }

  table(name: string): CostTable {
    const value = this.take(name);
    const must = "it must be a list of [x, µs] with x ascending and µs 0 or more";
    if (!Array.isArray(value) || value.length > TABLE_POINTS_MAX) {
      throw this.#wrong(name, value, must);
    }
    let last = Number.NEGATIVE_INFINITY;
    return value.map((point: unknown) => {
      if (!Array.isArray(point) || point.length !== 2) throw this.#wrong(name, point, must);
      const [x, us] = point as unknown[];
      if (typeof x !== "number" || typeof us !== "number" || !(x > last) || !(us >= 0)) {
        throw this.#wrong(name, point, must);
      }
      last = x;
      return [x, us] as const;
    });
  }

  /** Throws for a field that nothing took. */
  end(): void {
    for (const name of this.#fields.keys()) {
      throw new LawError(
        `${this.#file}: unknown field ${this.#prefix}${name}; known: ${this.#known.join(", ")}`,
      );
    }
  }

  #wrong(name: string, value: unknown, must: string): LawError {
    return new LawError(`${this.#file}: ${this.#prefix}${name} is ${shown(value)}; ${must}`);
  }
}

function shown(value: unknown): string {
  return value === undefined ? "missing" : (JSON.stringify(value) ?? "missing").slice(0, 40);
}
