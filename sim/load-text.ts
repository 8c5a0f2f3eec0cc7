/**
 * A made-up load as a person writes it on a command line.
 *
 *   poisson:28/s in=512 out=512 for=10m
 *   gamma:10/s cv=3 in=1024/0.8 out=200/1 requests=20000
 *   daily:5/s swing=0.8 period=24h in=1155/1 out=211/0.8 for=24h
 *   ramp:1..20/s over=10m for=15m
 *   sessions:28/s for=500s
 *
 * First how requests arrive and at what mean rate, then `name=value` words in any order. A length is its mean, or its
 * mean and the spread of a gamma law: `1024/0.8`. Pure.
 */
import { type Arrivals, generateLoad, type Lengths } from "./load-generators.ts";
import { sessionLoad } from "./session-load.ts";
import type { TraceRequest } from "./trace-rows.ts";

/** A load that cannot be read; the message says which word, and what is accepted. */
export class LoadTextError extends Error {
  override readonly name = "LoadTextError";
}

const KINDS = ["poisson", "gamma", "daily", "ramp", "sessions"] as const;
const EXAMPLE = '"poisson:28/s in=512 out=512 for=10m"';
const TOKENS_MAX = 131_072;

/** Makes the load anew at each call, always the same. Throws LoadTextError. */
export function parseLoad(text: string, seed: number | string): () => Iterable<TraceRequest> {
  const [head = "", ...words] = text.trim().split(/[\s,]+/);
  const [, kind = "", rates = ""] = /^([a-z]+):(.+)$/.exec(head) ?? [];
  const known = KINDS.find((name) => name === kind);
  if (known === undefined) {
    throw new LoadTextError(
      `load ${JSON.stringify(head)} is not understood; write one of ${KINDS.join(", ")} and a rate, like ${EXAMPLE}`,
    );
  }
  const fields = new Fields(words);
  const durationUs = fields.has("for") ? fields.timeUs("for") : undefined;
  if (known === "sessions") {
    const rate = rateOf(rates);
    fields.end();
    if (durationUs === undefined) throw new LoadTextError(`load ${head}: "for=" is missing`);
    return () => sessionLoad({ seed, rate, durationUs });
  }
  const arrivals = arrivalsOf(known, rates, fields);
  const input = fields.lengths("in", { mean: 512, cv: 0, max: TOKENS_MAX });
  const output = fields.lengths("out", { mean: 256, cv: 0, max: TOKENS_MAX });
  const requests = fields.has("requests") ? fields.number("requests") : undefined;
  fields.end();
  if (durationUs === undefined && requests === undefined) {
    throw new LoadTextError(`load ${head}: it has no end; add for=10m or requests=10000`);
  }
  const spec = {
    seed,
    arrivals,
    content: { kind: "plain" as const, input, output },
    ...(requests === undefined ? {} : { requests }),
    ...(durationUs === undefined ? {} : { durationUs }),
  };
  try {
    generateLoad(spec); // Checks the spec before any request is made.
  } catch (error) {
    if (error instanceof RangeError) throw new LoadTextError(`load ${head}: ${error.message}`);
    throw error;
  }
  return () => generateLoad(spec);
}

function arrivalsOf(
  kind: Exclude<(typeof KINDS)[number], "sessions">,
  rates: string,
  fields: Fields,
): Arrivals {
  switch (kind) {
    case "poisson":
      return { kind, rate: rateOf(rates) };
    case "gamma":
      return { kind, rate: rateOf(rates), cv: fields.number("cv") };
    case "daily":
      return {
        kind,
        rate: rateOf(rates),
        swing: fields.number("swing"),
        periodUs: fields.timeUs("period"),
      };
    case "ramp": {
      const [from = "", to = ""] = rates.split("..");
      return {
        kind,
        fromRate: rateOf(from),
        toRate: rateOf(to),
        overUs: fields.timeUs("over"),
      };
    }
  }
}

function rateOf(text: string): number {
  const [, digits] = /^(\d+(?:\.\d+)?)(?:\/s)?$/.exec(text) ?? [];
  if (digits !== undefined) return Number(digits);
  throw new LoadTextError(
    `${JSON.stringify(text)} is no rate; write requests per second like 28/s`,
  );
}

class Fields {
  readonly #values = new Map<string, string>();

  constructor(words: readonly string[]) {
    for (const word of words) {
      const [, name = "", value = ""] = /^([a-z]+)=(.+)$/.exec(word) ?? [];
      if (name === "") {
        throw new LoadTextError(`${JSON.stringify(word)} is not name=value, like in=512`);
      }
      if (this.#values.has(name)) throw new LoadTextError(`${name}= is given twice`);
      this.#values.set(name, value);
    }
  }

  has(name: string): boolean {
    return this.#values.has(name);
  }

  number(name: string): number {
    const value = Number(this.#take(name));
    if (Number.isFinite(value)) return value;
    throw new LoadTextError(`${name}= must be a number`);
  }

  timeUs(name: string): number {
    const text = this.#take(name);
    const [, digits, unit = ""] = /^(\d+(?:\.\d+)?)(ms|s|m|h|d|)$/.exec(text) ?? [];
    const unitsUs: Readonly<Record<string, number>> = {
      ms: 1e3,
      s: 1e6,
      "": 1e6,
      m: 60e6,
      h: 3600e6,
      d: 86_400e6,
    };
    const us = Math.round(Number(digits ?? Number.NaN) * (unitsUs[unit] ?? Number.NaN));
    if (us > 0) return us;
    throw new LoadTextError(`${name}=${text} is no time; write 90s, 15m, 2h or 1d`);
  }

  lengths(name: string, usual: Lengths): Lengths {
    if (!this.has(name)) return usual;
    const text = this.#take(name);
    const [, mean, cv = "0"] = /^(\d+(?:\.\d+)?)(?:\/(\d+(?:\.\d+)?))?$/.exec(text) ?? [];
    if (mean !== undefined) return { mean: Number(mean), cv: Number(cv), max: usual.max };
    throw new LoadTextError(
      `${name}=${text} is no length; write its mean, or mean/spread like 512/0.8`,
    );
  }

  /** All that was given has been read. */
  end(): void {
    for (const name of this.#values.keys()) {
      throw new LoadTextError(`${name}= does not belong to this kind of load`);
    }
  }

  #take(name: string): string {
    const value = this.#values.get(name);
    if (value === undefined) throw new LoadTextError(`${name}= is missing`);
    this.#values.delete(name);
    return value;
  }
}
