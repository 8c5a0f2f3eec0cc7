/**
 * What is wrong with given options, in words: the place, what stands there, what to write instead
 * and all that is accepted. Knows the slips that people make (units in values, percentages, other
 * gateways' names). Pure; never quotes a secret.
 */
import { distance } from "fastest-levenshtein";
import * as z from "zod";
import {
  acceptedBy,
  type Fact,
  factOf,
  isMapping,
  type OptionRow,
  rowsOf,
  shapeOf,
  unwrap,
} from "./option-schema.ts";

/** One thing that is wrong. `at` leads to it: keys and list indices. */
export type Problem = {
  readonly at: readonly (string | number)[];
  /** `at` as text: "nodes[0].url"; "" = the whole. */
  readonly path: string;
  /** What is wrong and what is accepted, without the path; never a secret. */
  readonly message: string;
};

/** ["nodes", 0, "url"] → "nodes[0].url". */
export function pathOf(at: Problem["at"]): string {
  return at.reduce<string>((path, segment) => {
    if (typeof segment === "number") return `${path}[${segment}]`;
    return path === "" ? segment : `${path}.${segment}`;
  }, "");
}

/** "nodes[0].url" → ["nodes", 0, "url"], for paths of known options. */
export function segmentsOf(path: string): (string | number)[] {
  return [...path.matchAll(/\[(\d+)\]|([^.[\]]+)/g)].map(([, index, name]) =>
    index === undefined ? (name ?? "") : Number(index),
  );
}

/** Whether one path is the other or lies in it. */
export function overlap(left: string, right: string): boolean {
  const [short, long] = left.length <= right.length ? [left, right] : [right, left];
  return long.startsWith(short) && /^$|^[.[]/.test(long.slice(short.length));
}

// ---- saying what is wrong -----------------------------------------------------------------------

/** What an issue of the schema `root` with the value `given` means to whoever wrote it. */
export function explain(issue: z.core.$ZodIssue, given: unknown, root: z.core.$ZodType): Problem[] {
  const at = issue.path.map((segment) => (typeof segment === "number" ? segment : String(segment)));
  const { inner, value } = lookUp(at, given, root);
  if (issue.code === "unrecognized_keys") {
    const accepted = Object.keys(shapeOf(inner) ?? {});
    return issue.keys.map((name) => {
      const inside = [...at, name];
      return { at: inside, path: pathOf(inside), message: unknownOption(name, accepted, root) };
    });
  }
  const reason =
    issue.code === "custom"
      ? issue.message
      : value === undefined
        ? "is missing"
        : (hint(factOf(inner), value) ?? "is not accepted");
  const subject = value === undefined || isMapping(value) ? "" : `${shown(factOf(inner), value)} `;
  return [{ at, path: pathOf(at), message: `${subject}${reason}; accepted: ${acceptedBy(inner)}` }];
}

/** The schema and the value at a place, as far as both go. */
function lookUp(
  at: Problem["at"],
  given: unknown,
  root: z.core.$ZodType,
): { inner: z.core.$ZodType; value: unknown } {
  let inner = root;
  let value = given;
  for (const segment of at) {
    if (typeof segment === "number") {
      value = Array.isArray(value) ? value[segment] : undefined;
      // Entries of a list of texts have no facts of their own: the list's describe them.
      if (inner instanceof z.ZodArray && factOf(inner).kind === "items") {
        inner = unwrap(inner.element).inner;
      }
    } else {
      const child = shapeOf(inner)?.[segment];
      value = isMapping(value) ? value[segment] : undefined;
      if (child !== undefined) inner = unwrap(child).inner;
    }
  }
  return { inner, value };
}

/** A value as messages quote it. Secrets are not quoted. */
function shown(fact: Fact, value: unknown): string {
  if (fact.secret !== undefined) return "the value given";
  if (Array.isArray(value)) return `a list of ${value.length}`;
  if (typeof value === "string") {
    const open = value.replace(/\/\/[^/\s]*@/, "//…@"); // A password may have got into any URL.
    return JSON.stringify(open.length > 60 ? `${open.slice(0, 60)}…` : open);
  }
  return typeof value === "object" && value !== null ? "a mapping" : String(value);
}

const msPerUnit: ReadonlyMap<string, number> = new Map(
  Object.entries({
    ms: 1,
    s: 1000,
    sec: 1000,
    m: 60_000,
    min: 60_000,
    h: 3_600_000,
    d: 86_400_000,
  }),
);
/** By the first letter of the unit: "MB", "mib" and "M" all mean 1024 × 1024 here. */
const bytesPerUnit: ReadonlyMap<string, number> = new Map(
  Object.entries({
    b: 1,
    k: 1024,
    m: 1024 * 1024,
    g: 1024 * 1024 * 1024,
  }),
);

/** What is wrong with a value of the wrong kind or size, and what to write for it. */
function hint(fact: Fact, value: unknown): string | undefined {
  switch (fact.kind) {
    case "integer":
    case "number":
      return typeof value === "string" ? numberHint(fact, value.trim()) : rangeHint(fact, value);
    case "boolean":
      if (/^(true|yes|on|1)$/i.test(String(value))) return "is not a boolean (write true)";
      if (/^(false|no|off|0)$/i.test(String(value))) return "is not a boolean (write false)";
      return undefined;
    case "choice": {
      const near =
        typeof value === "string" ? nearest(value, fact.choices ?? [], foreignValues) : undefined;
      return near === undefined ? undefined : `is not one of them; did you mean ${near}?`;
    }
    case "texts":
      return typeof value === "string"
        ? `is not a list (write [${shown(fact, value)}])`
        : undefined;
    case "text":
      return typeof value === "number" || typeof value === "boolean"
        ? "is not text (put it in quotes)"
        : undefined;
    case "items":
    case "group":
      return undefined;
  }
}

function numberHint(fact: Fact, value: string): string | undefined {
  if (/^[-+]?\d+(\.\d+)?$/.test(value)) return `is text (write ${Number(value)}, without quotes)`;
  const [, digits = "", suffix = ""] = /^(\d+(?:\.\d+)?)\s*([a-z%]+)$/i.exec(value) ?? [];
  const unit = suffix.toLowerCase();
  const ms = msPerUnit.get(unit);
  if (fact.unit === "ms" && ms !== undefined) {
    return `has a unit: this is a number of milliseconds (write ${Math.round(Number(digits) * ms)})`;
  }
  const bytes = /^[kmg]?i?b?$/.test(unit) ? bytesPerUnit.get(unit.slice(0, 1)) : undefined;
  if (fact.unit === "bytes" && bytes !== undefined) {
    return `has a unit: this is a number of bytes (write ${Math.round(Number(digits) * bytes)})`;
  }
  if (fact.unit === "ratio" && unit === "%") {
    return `is a percentage: this is a ratio (write ${Number(digits) / 100})`;
  }
  return "is not a number";
}

function rangeHint(fact: Fact, value: unknown): string | undefined {
  if (typeof value !== "number") return undefined;
  if (fact.unit === "ratio" && value > 1 && value <= 100) {
    return `is not a ratio (a percentage? write ${value / 100})`;
  }
  if (fact.min !== undefined && value < fact.min) return "is too small";
  if (fact.max !== undefined && value > fact.max) return "is too large";
  return "is not a whole number";
}

/** Other gateways' names for our options, so that whoever comes from them is told where to look. */
const foreignNames: ReadonlyMap<string, string> = new Map(
  Object.entries({
    // LiteLLM
    modellist: "nodes",
    modelname: "nodes[].models",
    litellmparams: "nodes[]",
    apibase: "nodes[].url",
    routersettings: "router",
    routingstrategy: "router.strategy",
    numretries: "retry.attemptsMax (it counts the first try too)",
    allowedfails: "circuit.gatewayFailures",
    cooldowntime: "circuit.openMs",
    requesttimeout: "timeouts.totalMs",
    streamtimeout: "timeouts.stallMs",
    generalsettings: "admin",
    masterkey: "admin.token",
    rpm: "limits.requestsPerMinute",
    tpm: "limits.tokensPerMinute",
    maxparallelrequests: "limits.concurrent",
    cacheparams: "cache",
    redishost: "cache.redis.url",
    keyalias: "keys[].name",
    // The SGLang router, vLLM's router and production stack
    workerurls: "nodes",
    staticbackends: "nodes",
    staticmodels: "nodes[].models",
    policy: "router.strategy",
    routinglogic: "router.strategy",
    balanceabsthreshold: "router.affinityLoadFactor",
    balancerelthreshold: "router.affinityLoadFactor",
    retrymaxretries: "retry.attemptsMax (it counts the first try too)",
    cbfailurethreshold: "circuit.gatewayFailures",
    cbtimeoutdurationsecs: "circuit.openMs",
    queuesize: "queue.poolMax",
    queuetimeoutsecs: "queue.waitMsMax",
    maxconcurrentrequests: "requests.connectionsMax",
    maxpayloadsize: "requests.bodyBytesMax",
    requesttimeoutsecs: "timeouts.totalMs",
    healthcheckintervalsecs: "health.intervalMs",
    enginestatsinterval: "scrape.intervalMs",
  }),
);

/** Other gateways' names of strategies, engines and priorities. */
const foreignValues: ReadonlyMap<string, string> = new Map(
  Object.entries({
    cacheaware: "headroom",
    prefixaware: "headroom",
    prefixhash: "headroom",
    kvaware: "headroom",
    consistenthash: "headroom",
    session: "headroom",
    random: "power_of_two",
    simpleshuffle: "round_robin",
    leastbusy: "least_inflight",
    leastconnections: "least_inflight",
    latencybasedrouting: "peak_ewma",
    usagebasedrouting: "headroom",
    tensorrt: "trtllm",
    tensorrtllm: "trtllm",
    ollama: "llamacpp",
  }),
);

function unknownOption(name: string, accepted: readonly string[], root: z.core.$ZodType): string {
  const near = nearest(name, accepted) ?? elsewhere(name, rowsOf(root));
  const suggestion = near === undefined ? "" : `; did you mean ${near}?`;
  return `is not an option${suggestion}; accepted here: ${accepted.join(", ")}`;
}

/** Where an option of that name stands, whatever group it is in. */
export function elsewhere(name: string, rows: readonly OptionRow[]): string | undefined {
  const wanted = plain(name);
  const row = rows.find(({ path }) => plain(path.split(".").at(-1) ?? "") === wanted);
  return foreignNames.get(wanted) ?? row?.path;
}

/**
 * The candidate that someone who wrote `word` most likely meant: the same but for case and
 * separators, another gateway's name for it, the word with its unit missing, or one with few
 * letters changed.
 */
export function nearest(
  word: string,
  candidates: readonly string[],
  foreign?: ReadonlyMap<string, string>,
): string | undefined {
  const wanted = plain(word);
  const same = candidates.find((candidate) => plain(candidate) === wanted);
  const translated = foreign?.get(wanted);
  if (same !== undefined) return same;
  if (translated !== undefined && candidates.includes(translated)) return translated;
  let best: { candidate: string; cost: number } | undefined;
  for (const candidate of candidates) {
    const known = plain(candidate);
    const isPart = wanted.length >= 3 && (known.startsWith(wanted) || wanted.startsWith(known));
    const edits = isPart ? 1 : distance(wanted, known);
    // People get beginnings right: "retries" means retry, not metrics, at the same number of edits.
    const cost = edits - commonStart(wanted, known) / 4;
    if (edits <= Math.ceil(wanted.length / 3) && cost < (best?.cost ?? Infinity)) {
      best = { candidate, cost };
    }
  }
  return best?.candidate;
}

function plain(word: string): string {
  return word.toLowerCase().replace(/[^a-z0-9]/g, "");
}

function commonStart(left: string, right: string): number {
  let length = 0;
  while (length < left.length && left[length] === right[length]) length += 1;
  return length;
}
