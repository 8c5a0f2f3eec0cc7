/**
 * What the engines say of themselves, each in its own words: Prometheus text, JSON, lists of models. Pure.
 *
 * Names are matched whole: `vllm:num_requests_waiting_by_reason` must not be read as `vllm:num_requests_waiting`.
 * Counts of several engine or data-parallel ranks add up; of usages the fullest counts, as it refuses first. A
 * gauge that is not there, or holds NaN, a negative number or (for a ratio) more than 1, is unknown: it is listed
 * in `missing` and never read as 0, which would make a node that cannot be seen look idle.
 */
import type { ScrapeSample } from "../actors/protocol.ts";

/** Engines that are recognised; "article" is the JSON of no engine in particular. */
export const engines = [
  "vllm",
  "sglang",
  "tgi",
  "trtllm",
  "triton",
  "llamacpp",
  "article",
] as const;
/** One of `engines`. */
export type Engine = (typeof engines)[number];

/** In the order in which samples hold them, whatever the engine's: peers know few shapes of a sample. */
const figures = [
  "running",
  "waiting",
  "waitingForCapacity",
  "kv",
  "generatedTokensTotal",
  "preemptionsTotal",
  "maxSequences",
] as const;
type Figure = (typeof figures)[number];

type Rule = {
  engine: Engine;
  figure: Figure;
  /** Only series with this label count. */
  where?: readonly [label: string, value: string];
  /** Of two names for one figure the one that ranks higher counts; without it 0. */
  rank?: number;
};

/** A token usage may be rounded a little above 1. */
const RATIO_SLACK = 1.05;
const LINE_BYTES_MAX = 64 << 10;

function rulesOf(
  engine: Engine,
  rules: Record<string, Omit<Rule, "engine"> | Omit<Rule, "engine">[]>,
) {
  return Object.entries(rules).map(
    ([name, own]) => [name, [own].flat().map((rule) => ({ engine, ...rule }))] as const,
  );
}

/** By whole metric name. */
const rulesByName: ReadonlyMap<string, readonly Rule[]> = new Map([
  ...rulesOf("vllm", {
    "vllm:num_requests_running": { figure: "running" },
    "vllm:num_requests_waiting": { figure: "waiting" },
    // The rest waits for LoRA slots or KV transfer, not for want of room.
    "vllm:num_requests_waiting_by_reason": {
      figure: "waitingForCapacity",
      where: ["reason", "capacity"],
    },
    "vllm:kv_cache_usage_perc": { figure: "kv", rank: 1 },
    "vllm:gpu_cache_usage_perc": { figure: "kv" }, // Up to 0.10.
    "vllm:generation_tokens_total": { figure: "generatedTokensTotal" },
    "vllm:num_preemptions_total": { figure: "preemptionsTotal" },
  }),
  ...rulesOf("sglang", {
    "sglang:num_running_reqs": { figure: "running" },
    "sglang:num_queue_reqs": { figure: "waiting" },
    "sglang:full_token_usage": { figure: "kv", rank: 1 },
    "sglang:token_usage": { figure: "kv" },
    "sglang:generation_tokens_total": { figure: "generatedTokensTotal" },
    "sglang:num_retracted_requests_total": { figure: "preemptionsTotal" },
  }),
  ...rulesOf("tgi", {
    tgi_batch_current_size: { figure: "running" },
    tgi_queue_size: { figure: "waiting" },
    tgi_request_generated_tokens_sum: { figure: "generatedTokensTotal" },
  }),
  ...rulesOf("trtllm", {
    trtllm_num_requests_running: { figure: "running" },
    trtllm_num_requests_waiting: { figure: "waiting" },
    trtllm_kv_cache_utilization: { figure: "kv" },
  }),
  ...rulesOf("triton", {
    nv_trt_llm_request_metrics: [
      { figure: "running", where: ["request_type", "scheduled"] },
      { figure: "waiting", where: ["request_type", "waiting"] },
    ],
    nv_trt_llm_kv_cache_block_metrics: {
      figure: "kv",
      where: ["kv_cache_block_type", "fraction"],
    },
  }),
  ...rulesOf("llamacpp", {
    "llamacpp:requests_processing": { figure: "running" },
    "llamacpp:requests_deferred": { figure: "waiting" },
    "llamacpp:kv_cache_usage_ratio": { figure: "kv" }, // Gone from newer versions.
    "llamacpp:tokens_predicted_total": { figure: "generatedTokensTotal" },
  }),
]);

/** Any series whose name starts so gives the engine away. */
const prefixes: readonly (readonly [string, Engine])[] = [
  ["vllm:", "vllm"],
  ["sglang:", "sglang"],
  ["tgi_", "tgi"],
  ["trtllm_", "trtllm"],
  ["nv_trt_llm_", "triton"],
  ["llamacpp:", "llamacpp"],
];

/** Gauges that an engine of today has: without one, something has been renamed or switched off. */
const expectedNames: Readonly<Record<Exclude<Engine, "article">, Partial<Record<Figure, string>>>> =
  {
    vllm: {
      running: "vllm:num_requests_running",
      waiting: "vllm:num_requests_waiting",
      kv: "vllm:kv_cache_usage_perc",
    },
    sglang: {
      running: "sglang:num_running_reqs",
      waiting: "sglang:num_queue_reqs",
      kv: "sglang:token_usage",
    },
    tgi: { running: "tgi_batch_current_size", waiting: "tgi_queue_size" },
    trtllm: {
      running: "trtllm_num_requests_running",
      waiting: "trtllm_num_requests_waiting",
      kv: "trtllm_kv_cache_utilization",
    },
    triton: {
      running: "nv_trt_llm_request_metrics{request_type=scheduled}",
      waiting: "nv_trt_llm_request_metrics{request_type=waiting}",
      kv: "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",
    },
    llamacpp: { running: "llamacpp:requests_processing", waiting: "llamacpp:requests_deferred" },
  };

type Found = { value: number; rank: number };

const LF = 10;
const HASH = 35;
const BRACE_OPEN = 123;
const SPACE = 32;
const TAB = 9;

/** Reads Prometheus text as it comes, in pieces cut anywhere; only the lines of known names are looked at. */
export class MetricsText {
  readonly #found = new Map<Engine, Map<Figure, Found>>();
  readonly #seen = new Set<Engine>();
  #rest: Buffer = Buffer.alloc(0);
  #skipping = false; // Within a line too long to be one of ours.

  push(bytes: Uint8Array): void {
    const piece = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const text = this.#rest.length === 0 ? piece : Buffer.concat([this.#rest, piece]);
    let from = 0;
    for (;;) {
      const lf = text.indexOf(LF, from);
      if (lf === -1) break;
      if (!this.#skipping) this.#readLine(text, from, lf);
      this.#skipping = false;
      from = lf + 1;
    }
    this.#rest = text.subarray(from);
    if (this.#rest.length > LINE_BYTES_MAX) {
      this.#skipping = true;
      this.#rest = Buffer.alloc(0);
    }
  }

  /**
   * The sample of the engine that was recognised, else of the `expected` one (with every gauge missing);
   * null when neither is known.
   */
  end(expected: Engine | null): ScrapeSample | null {
    if (this.#rest.length > 0 && !this.#skipping) this.#readLine(this.#rest, 0, this.#rest.length);
    const seen = expected !== null && this.#seen.has(expected) ? expected : [...this.#seen][0];
    const engine = seen ?? expected;
    if (engine === null || engine === "article") return null;
    return sampleOf(engine, this.#found.get(engine) ?? new Map());
  }

  #readLine(text: Buffer, from: number, to: number): void {
    if (text[from] === HASH) return;
    let nameTo = from;
    while (nameTo < to) {
      const byte = text[nameTo];
      if (byte === BRACE_OPEN || byte === SPACE || byte === TAB) break;
      nameTo++;
    }
    const name = text.toString("latin1", from, nameTo);
    const rules = rulesByName.get(name);
    if (rules === undefined) return this.#recognise(name);
    for (const { engine } of rules) this.#seen.add(engine);
    const { labels, value } = seriesIn(text.toString("utf8", nameTo, to));
    for (const rule of rules) {
      if (rule.where !== undefined && labels.get(rule.where[0]) !== rule.where[1]) continue;
      const usable = rule.figure === "kv" ? ratioOrNaN(value) : value;
      if (usable >= 0 && Number.isFinite(usable)) this.#add(rule, usable);
    }
  }

  #recognise(name: string): void {
    for (const [prefix, engine] of prefixes) if (name.startsWith(prefix)) this.#seen.add(engine);
  }

  #add({ engine, figure, rank = 0 }: Rule, value: number): void {
    let figures = this.#found.get(engine);
    if (figures === undefined) {
      figures = new Map();
      this.#found.set(engine, figures);
    }
    const present = figures.get(figure);
    if (present === undefined || present.rank < rank) figures.set(figure, { value, rank });
    else if (present.rank === rank) {
      present.value = figure === "kv" ? Math.max(present.value, value) : present.value + value;
    }
  }
}

function sampleOf(
  engine: Exclude<Engine, "article">,
  found: ReadonlyMap<Figure, Found>,
): ScrapeSample {
  const sample: ScrapeSample = { engine, missing: [] };
  for (const figure of figures) {
    const value = found.get(figure)?.value;
    if (value !== undefined) sample[figure] = value;
  }
  for (const [figure, name] of Object.entries(expectedNames[engine])) {
    if (sample[figure as Figure] === undefined) sample.missing.push(name);
  }
  return sample;
}

/** What follows a name: `{label="value",…} 12.5 1700000000`, the labels and the time stamp optional. */
function seriesIn(line: string): { labels: ReadonlyMap<string, string>; value: number } {
  const text = line.trimStart();
  const labels = new Map<string, string>();
  let at = 0;
  if (text[0] === "{") {
    const label = /\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?/y;
    label.lastIndex = 1;
    at = 1;
    for (let match = label.exec(text); match !== null; match = label.exec(text)) {
      labels.set(match[1] ?? "", match[2] ?? "");
      at = label.lastIndex;
    }
    while (text[at] === " ") at++;
    if (text[at] !== "}") return { labels, value: Number.NaN };
    at++;
  }
  const [number = ""] = text.slice(at).trim().split(/\s+/);
  return { labels, value: number === "" ? Number.NaN : Number(number) };
}

function ratioOrNaN(value: number): number {
  return value <= RATIO_SLACK ? Math.min(1, value) : Number.NaN;
}

// ---- JSON -------------------------------------------------------------------------------------------------------

type Json = Record<string, unknown>;
/** The engine answered, but with nothing to decide on. */
export type Unusable = { unusable: string };

/** The article's own JSON, or the iteration log that trtllm-serve has on /metrics; null for anything else. */
export function sampleFromJson(json: unknown): ScrapeSample | null {
  if (Array.isArray(json)) return sampleFromIterations(json);
  if (!isObject(json)) return null;
  const { queue_depth, avg_latency_seconds, gpu_memory_utilization } = json;
  if ((queue_depth ?? avg_latency_seconds ?? gpu_memory_utilization) === undefined) return null;
  const sample: ScrapeSample = { engine: "article", missing: [] };
  const waiting = numberOrNaN(queue_depth);
  const latency = numberOrNaN(avg_latency_seconds);
  const memory = ratioOrNaN(numberOrNaN(gpu_memory_utilization));
  if (waiting >= 0) sample.waiting = waiting;
  else sample.missing.push("queue_depth");
  if (latency >= 0) sample.latencySeconds = latency;
  else sample.missing.push("avg_latency_seconds");
  if (memory >= 0) sample.gpuMemory = memory;
  else sample.missing.push("gpu_memory_utilization");
  return sample;
}

/** The newest iteration counts; an idle engine has none, and then nothing is known. */
function sampleFromIterations(iterations: readonly unknown[]): ScrapeSample | null {
  const last = iterations.at(-1) ?? {};
  if (!isObject(last)) return null;
  if (iterations.length > 0 && last.numActiveRequests === undefined) return null;
  const found = new Map<Figure, Found>();
  const put = (figure: Figure, value: number): void => {
    if (value >= 0) found.set(figure, { value, rank: 0 });
  };
  const waiting = numberOrNaN(last.numQueuedRequests);
  // Active ones are those that the executor holds, queued ones among them.
  const active = numberOrNaN(last.numActiveRequests);
  put("running", Number.isNaN(waiting) ? active : Math.max(0, active - waiting));
  put("waiting", waiting);
  if (isObject(last.kvCacheStats)) {
    const { usedNumBlocks, maxNumBlocks } = last.kvCacheStats;
    put("kv", ratioOrNaN(numberOrNaN(usedNumBlocks) / numberOrNaN(maxNumBlocks)));
  }
  return sampleOf("trtllm", found);
}

/** SGLang's GET /v1/loads: one entry per data-parallel rank. Null when it is not that. */
export function sampleFromLoads(json: unknown): ScrapeSample | Unusable | null {
  if (!isObject(json) || !Array.isArray(json.loads)) return null;
  const ranks = json.loads.filter(isObject);
  if (ranks.length === 0) return { unusable: "no ranks in /v1/loads" };
  if (ranks.some((rank) => rank.max_total_num_tokens === 0)) return { unusable: "not ready" };
  const found = new Map<Figure, Found>();
  const sum = (figure: Figure, field: string): void => {
    let total = 0;
    for (const rank of ranks) total += numberOrNaN(rank[field]);
    if (total >= 0) found.set(figure, { value: total, rank: 0 });
  };
  sum("running", "num_running_reqs");
  sum("waiting", "num_waiting_reqs");
  sum("maxSequences", "max_running_requests");
  const usage = Math.max(...ranks.map((rank) => ratioOrNaN(numberOrNaN(rank.token_usage))));
  if (usage >= 0) found.set("kv", { value: usage, rank: 0 });
  const sample = sampleOf("sglang", found);
  if (sample.maxSequences === 0) delete sample.maxSequences;
  return sample;
}

/** GET /v1/models: what has a parent is an adapter of it. Null when it is not such a list. */
export function modelsFrom(json: unknown): { models: string[]; adapters: string[] } | null {
  if (!isObject(json) || !Array.isArray(json.data)) return null;
  const models: string[] = [];
  const adapters: string[] = [];
  for (const entry of json.data) {
    if (!isObject(entry) || typeof entry.id !== "string" || entry.id === "") continue;
    if (typeof entry.parent === "string" && entry.parent !== "") adapters.push(entry.id);
    else models.push(entry.id);
  }
  return { models, adapters };
}

function isObject(value: unknown): value is Json {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function numberOrNaN(value: unknown): number {
  return typeof value === "number" && Number.isFinite(value) ? value : Number.NaN;
}
