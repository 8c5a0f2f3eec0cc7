/**
 * What the actors say to each other about requests, nodes and answers: shared types only. A message that
 * one actor alone receives stands in that actor's file; the protocols of the edges stand in edges.ts.
 *
 * Everything here is plain data. Of prompts, actors see lengths and hashes; only a question that may be matched by
 * meaning travels as text, to the embedder and the cache. `AtMs` is monotonic
 * process time (`context.nowMs`); an absent optional field means "unknown", never 0.
 */

export type RequestId = string;
/** Unique name of an inference node: its configured name, else "host:port". */
export type NodeId = string;
/** `<requestId>#<attempt>`: one attempt of one request on one node. */
export type LeaseId = string;

/** What a request asks for; "other" is passed through unread. */
export type Route = "chat" | "completions" | "embeddings" | "other";
/** Band of the fair queue, highest first. */
export type Priority = "interactive" | "standard" | "batch";

/** What one API key may use; absent = unlimited. Token limits count prompt and output tokens. */
export type Limits = {
  requestsPerMinute?: number;
  /** Requests that may come at once; default requestsPerMinute / 6, at least 1. */
  requestBurst?: number;
  tokensPerMinute?: number;
  /** Tokens that may come at once; default tokensPerMinute. */
  tokenBurst?: number;
  /** Requests in flight. */
  concurrent?: number;
  /** Reserved tokens in flight. */
  concurrentTokens?: number;
  tokensPerDay?: number;
  /**
   * In a cluster, while the peer that keeps the key is out of reach: `share` (default) admits this peer's share of
   * the limits, `refuse` refuses.
   */
  whenUnreachable?: "share" | "refuse";
};

/** Everything the actors know of a request. */
export type RequestFacts = {
  requestId: RequestId;
  tenant: string;
  /** Names the limits: the tenant's key, never the secret itself. */
  limitKey: string;
  limits: Limits;
  /** Share of this tenant against others in the fair queue, > 0. */
  weight: number;
  priority: Priority;
  route: Route;
  /** Absent only for routes without a model. */
  model?: string;
  stream: boolean;
  /** sha256 (hex) over identity and question, or absent with the reason in `cacheBypass`. */
  cacheKey?: string;
  cacheBypass?: string;
  /** May be answered from the cache (no `no-cache`), may be stored (no `no-store`). */
  cacheRead: boolean;
  cacheWrite: boolean;
  /** 32-bit hash of the session or the prompt's head; absent = no affinity. */
  affinityKey?: number;
  /** Estimated from bytes; the engine's count settles it later. */
  promptTokens: number;
  /** `max_tokens`, when the request states it. */
  maxTokens?: number;
  arrivedAtMs: number;
  deadlineAtMs: number;
  /** Chained block hashes, only while a recording runs. */
  prefix?: number[];
  session?: string;
  /** Present when the question may be matched by meaning; its text travels beside the facts, which are kept. */
  semantic?: { scope: string; policy: SemanticPolicy };
  /** The answer is wanted only to judge that entry, which was served at this similarity. */
  judges?: { entryId: string; similarity: number };
};

/** A whole answer, as kept by the cache. Immutable once made. */
export type StoredAnswer = {
  /** The JSON answer as a node sends it, UTF-8. In simulations empty, with `bytes` still stated. */
  body: Uint8Array;
  bytes: number;
  route: Route;
  model: string;
  promptTokens: number;
  outputTokens: number;
};

/** How a tenant's questions are matched by meaning. */
export type SemanticPolicy = {
  /** shadow: judged, never served; fixed: served at the threshold; verified: served where labels bound the error. */
  mode: "shadow" | "fixed" | "verified";
  /** Least cosine of two questions, 0..1. */
  similarityMin: number;
  /** Share of wrong answers among served ones that verified mode allows, in (0, 1). */
  errorRateMax: number;
  /** Both questions may have no content word of their own, either. */
  isStrict: boolean;
};

/** A question with its answer, as the cache keeps it for others of the same meaning. Immutable once made. */
export type StoredQuestion = {
  entryId: string;
  /** sha256 (hex) over all that must be equal. */
  scope: string;
  tenant: string;
  model: string;
  text: string;
  /** Of norm 1. */
  vector: Float32Array;
  answer: StoredAnswer;
  /** Left of its life, and how old it is. */
  ttlMs: number;
  ageMs: number;
};

/** Token counts of one attempt: as the engine states them, else counted from the stream. */
export type Usage = { promptTokens: number; cachedTokens: number; outputTokens: number };

/** closed = requests pass, open = none does, half_open = a few try the node. */
export type CircuitState = "closed" | "open" | "half_open";

/** Signals of one scrape of an engine. */
export type ScrapeSample = {
  engine: string;
  running?: number;
  waiting?: number;
  /** Waiting for want of capacity (vLLM tells it apart); absent = use `waiting`. */
  waitingForCapacity?: number;
  /** KV cache in use, 0..1. */
  kv?: number;
  generatedTokensTotal?: number;
  preemptionsTotal?: number;
  /** Engine's own bound on sequences, when it tells. */
  maxSequences?: number;
  /** The article's JSON only. */
  latencySeconds?: number;
  gpuMemory?: number;
  /** Expected gauges that were missing: an alarm, not a zero. */
  missing: string[];
};

/** What routers know of a node. A new object at every change; never mutated after it was sent. */
export type NodeSnapshot = {
  node: NodeId;
  /** Host and port: two nodes are distinct when this differs. */
  address: string;
  /** Grows with every change of this node actor; `incarnation` first. */
  incarnation: number;
  version: number;
  /** When the node's actor made it; the receiver replaces it by its own clock. */
  atMs: number;
  /** Served models; absent = not known yet. */
  models?: readonly string[];
  adapters?: readonly string[];
  /** Leases held over all routers, and what others run on the node once that is much. */
  inflight: number;
  /** Outstanding uncached prompt tokens of leases without a first token. */
  prefillTokens: number;
  /** Concurrency cap now (AIMD), at least 1. */
  inflightMax: number;
  /** EWMA seconds per output token; absent until a stream taught it. */
  itlSeconds?: number;
  circuit: CircuitState;
  /** Permits left while half open. */
  probePermits: number;
  draining: boolean;
  /** Slow start: 0.1..1, multiplies the weight. */
  ramp: number;
  /** False after two failed health checks in a row. */
  healthy: boolean;
  /** Until then the node asked to be left alone (Retry-After). */
  restUntilMs: number;
  scrape?: ScrapeSample & { atMs: number };
  /** Median recent latency at about the present in-flight count (prequal), ms. */
  latencyMsAtInflight?: number;
  /** Peak-sensitive EWMA of whole-request latency (peak_ewma), ms. */
  latencyMsPeakEwma?: number;
  /** Traffic's weight for `article`: halved on a timeout, not below 0.1. */
  articleWeight: number;
};

/** How a lease ended, for the circuit. */
export type LeaseOutcome =
  | "ok"
  | "failed_local" // connect refused, reset before any byte, DNS, TLS
  | "failed_gateway" // 5xx, broken stream, bad answer
  | "overloaded" // 429, or 503 that says so: shrink the cap, not a failure
  | "slow" // no first token in time
  | "stalled"
  | "client_error" // 4xx: the node did its work
  | "cancelled"; // client left, or the deadline was already near

/** One try, for headers, records and explanations. */
export type AttemptFact = {
  attempt: number;
  node: NodeId;
  atMs: number;
  outcome: LeaseOutcome | "running";
  detail?: string;
  status?: number;
};

/** Rate-limit headers are made of this. `reset…Ms`: until the allowance is whole again. */
export type LimitState = {
  atMs: number;
  requests?: { limit: number; remaining: number; resetMs: number };
  tokens?: { limit: number; remaining: number; resetMs: number };
};

/** Why the router chose so: enough to print a table. Candidates beyond 16 are counted, not listed. */
export type Decision = {
  strategy: string;
  attempt: number;
  atMs: number;
  candidates: readonly CandidateFact[];
  candidatesTotal: number;
  chosen?: NodeId;
  /** "affinity" | "score" | "explore" | "panic" | "only" | "queued" …, one plain sentence. */
  why: string;
  queuedMs: number;
  denials: readonly { node: NodeId; reason: string }[];
};

export type CandidateFact = {
  node: NodeId;
  eligible: boolean;
  /** Why not eligible. */
  excluded?: string;
  /** Cost (lower is better) and its terms, by name. */
  cost?: number;
  terms?: Readonly<Record<string, number>>;
  snapshotAgeMs: number;
  scrapeAgeMs?: number;
};

/** How the cache took part in an answer. */
export type CacheVerdict = "miss" | "hit_exact" | "hit_semantic" | "joined" | "bypass";

/** The whole story of a request, emitted once as `request.finished`. */
export type RequestRecord = {
  facts: RequestFacts;
  outcome: "ok" | "refused" | "failed" | "left";
  /** Error code of errors.ts, unless ok. */
  code?: string;
  cache: CacheVerdict;
  cacheDetail?: string;
  attempts: readonly AttemptFact[];
  decisions: readonly Decision[];
  queuedMs: number;
  /** ms from arrival. */
  ttftMs?: number;
  endedMs: number;
  usage?: Usage;
  stored?: boolean;
  notStored?: string;
  /** What came of matching by meaning, in words without the question. */
  semantic?: { says: string; entryId?: string; similarity?: number };
};
