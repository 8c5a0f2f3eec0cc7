/**
 * Which actor messages may come from another process, which actor each is for, and how it must look. Pure.
 *
 * A message that is not in the table is refused: those of our own edges, timers, asks and watches, among others. So
 * is one for an actor of another sort, which would crash on it. A reply is checked against what was asked, which
 * only the asker knows.
 *
 * To let another message cross: add it to `CrossingMessage`, and the compiler asks for its row; then list its fields
 * in `structures` of wire.ts if it is frequent.
 */

import type {
  CacheDescription,
  CacheMessage,
  FlightNews,
  FlightResult,
  LookupReply,
  SharedHit,
} from "../actors/cache.ts";
import type { CircuitCause } from "../actors/circuit-breaker.ts";
import type { ClusterLimiterMessage, PeerAdmitReply } from "../actors/cluster-limiter.ts";
import type { ScraperEvent } from "../actors/edges.ts";
import { type ErrorCode, errorFacts } from "../actors/errors.ts";
import type { AcquireReply, GpuNodeMessage, NodeDescription } from "../actors/gpu-node.ts";
import type { ShadowSummary, Share } from "../actors/judged-precision.ts";
import { type GuardBlock, guardNames } from "../actors/match-guards.ts";
import type { MembersMessage } from "../actors/members.ts";
import type { Heartbeat, MemberState, View, ViewEntry } from "../actors/membership.ts";
import type { RecallEstimate } from "../actors/probing-audit.ts";
import type {
  CircuitState,
  LeaseOutcome,
  LimitState,
  Limits,
  NodeSnapshot,
  SemanticPolicy,
  StoredAnswer,
} from "../actors/protocol.ts";
import type { AdmitReply, LimiterDescription, RateLimiterMessage } from "../actors/rate-limiter.ts";
import type { RouterMessage } from "../actors/router.ts";
import type { SplitCommand, SplitFacts } from "../actors/scope-split.ts";
import type {
  Comparison,
  Explored,
  InspectedEntry,
  Inspection,
  JudgedPool,
  Matched,
  Question,
} from "../actors/semantic-shard.ts";
import type { AskFailure, ReplyTo } from "../runtime/actor.ts";
import {
  actorRef,
  amount,
  bytes,
  count,
  exactly,
  finite,
  flag,
  id,
  instant,
  list,
  numbersBy,
  oneOf,
  optional,
  path,
  record,
  replyTo,
  type Shape,
  text,
  union,
  vector,
} from "./wire-shape.ts";

/** Everything that actors of different processes say to each other, replies apart. */
export type CrossingMessage =
  | Exclude<GpuNodeMessage, ScraperEvent>
  | Extract<RouterMessage, { kind: "router.node_changed" | "router.may_eject" }>
  // A spread scope's shards are all in one process: what they say to each other never crosses.
  | Exclude<CacheMessage, { kind: "cache.configure" } | SplitCommand>
  | FlightNews
  | Exclude<RateLimiterMessage, { kind: "limiter.owner_lost" }>
  | Extract<MembersMessage, { kind: "members.heartbeat" | "members.view" }>
  | Extract<ClusterLimiterMessage, { kind: "limits.admit" | "limits.settle" }>;

/** The actors that may be spoken to, by the second part of their path. */
type Receiver = "nodes" | "router" | "cache" | "limiter" | "requests" | "members" | "limits";

type ReplyShape<M> = M extends { replyTo: ReplyTo<infer R> }
  ? { reply: Shape<R> }
  : M extends { replyTo?: ReplyTo<infer R> }
    ? { reply: Shape<R> }
    : { reply?: never };

type Row<M> = {
  readonly to: Receiver;
  readonly shape: Shape<M>;
  /** Two waiting messages with the same text may be made one: the later replaces the earlier. */
  readonly conflate?: (message: M) => string;
} & Readonly<ReplyShape<M>>;

/** Answers travel whole, and there is a limit on a frame. */
const ANSWER_BYTES_MAX = 64 * 1024 * 1024;
const DETAIL_LENGTH_MAX = 4096;
const MODELS_MAX = 4096;
const DESCRIBED_MAX = 65_536;
/** A question, as clients may send it. */
const QUESTION_LENGTH_MAX = 1 << 20;
/** As many as a cluster may have. */
const MEMBERS_MAX = 256;

const detail = text(DETAIL_LENGTH_MAX);
const code = oneOf(...(Object.keys(errorFacts) as ErrorCode[]));
const circuitState = oneOf("closed", "open", "half_open") satisfies Shape<CircuitState>;

/** By name, so that a cause or outcome that is added does not compile until it is listed. */
const causes: Readonly<Record<CircuitCause, true>> = {
  consecutive_local: true,
  consecutive_gateway: true,
  failure_rate: true,
  slow_rate: true,
  health: true,
  wedged: true,
  probe_failed: true,
  probe_silent: true,
};
const outcomes: Readonly<Record<LeaseOutcome, true>> = {
  ok: true,
  failed_local: true,
  failed_gateway: true,
  overloaded: true,
  slow: true,
  stalled: true,
  client_error: true,
  cancelled: true,
};
const outcomeNames = Object.keys(outcomes) as LeaseOutcome[];
const failures: Readonly<Record<AskFailure, true>> = {
  timeout: true,
  crashed: true,
  stopped: true,
  busy: true,
  noroute: true,
  disconnected: true,
};

/** Why an ask in another process has no reply. */
export const askFailure: Shape<AskFailure> = oneOf(...(Object.keys(failures) as AskFailure[]));

const storedAnswer = record<StoredAnswer>({
  body: bytes(ANSWER_BYTES_MAX),
  bytes: count,
  route: oneOf("chat", "completions", "embeddings", "other"),
  model: id,
  promptTokens: amount,
  outputTokens: amount,
});

const limits = record<Limits>({
  requestsPerMinute: optional(amount),
  requestBurst: optional(amount),
  tokensPerMinute: optional(amount),
  tokenBurst: optional(amount),
  concurrent: optional(amount),
  concurrentTokens: optional(amount),
  tokensPerDay: optional(amount),
  whenUnreachable: optional(oneOf("share", "refuse")),
});

const allowance = record<NonNullable<LimitState["requests"]>>({
  limit: amount,
  remaining: finite,
  resetMs: finite,
});

const limitState = record<LimitState>({
  atMs: instant,
  requests: optional(allowance),
  tokens: optional(allowance),
});

const snapshot = record<NodeSnapshot>({
  node: id,
  address: id,
  incarnation: count,
  version: count,
  atMs: instant,
  inflight: amount,
  prefillTokens: amount,
  inflightMax: amount,
  circuit: circuitState,
  probePermits: amount,
  draining: flag,
  ramp: amount,
  healthy: flag,
  restUntilMs: instant,
  articleWeight: amount,
  models: optional(list(id, MODELS_MAX)),
  adapters: optional(list(id, MODELS_MAX)),
  itlSeconds: optional(amount),
  scrape: optional(
    record<NonNullable<NodeSnapshot["scrape"]>>({
      engine: id,
      running: optional(amount),
      waiting: optional(amount),
      waitingForCapacity: optional(amount),
      kv: optional(finite),
      generatedTokensTotal: optional(finite),
      preemptionsTotal: optional(finite),
      maxSequences: optional(amount),
      latencySeconds: optional(finite),
      gpuMemory: optional(finite),
      missing: list(id, MODELS_MAX),
      atMs: instant,
    }),
  ),
  latencyMsAtInflight: optional(amount),
  latencyMsPeakEwma: optional(amount),
});

const nodeDescription = record<NodeDescription>({
  snapshot,
  leases: list(
    record<NodeDescription["leases"][number]>({
      leaseId: id,
      ageMs: finite,
      firstToken: flag,
      outputTokens: amount,
    }),
    DESCRIBED_MAX,
  ),
  circuit: record<NodeDescription["circuit"]>({
    state: circuitState,
    sinceMs: finite,
    ejections: count,
    openForMs: optional(amount),
    cause: optional(oneOf(...(Object.keys(causes) as CircuitCause[]))),
  }),
  window: record<NodeDescription["window"]>({ calls: count, failures: count, slow: count }),
  othersInflight: amount,
  health: record<NodeDescription["health"]>({ ok: flag, failuresInRow: count, detail }),
  totals: numbersBy(...outcomeNames),
});

const acquireReply = union<AcquireReply>({
  granted: record<Extract<AcquireReply, { kind: "granted" }>>({
    kind: exactly("granted"),
    leaseId: id,
    node: id,
    probe: flag,
    snapshot,
  }),
  denied: record<Extract<AcquireReply, { kind: "denied" }>>({
    kind: exactly("denied"),
    reason: oneOf("full", "open", "draining", "probe_busy"),
    snapshot,
  }),
});

const lookupReply = union<LookupReply>({
  hit: record<Extract<LookupReply, { kind: "hit" }>>({
    kind: exactly("hit"),
    answer: storedAnswer,
    ageMs: finite,
  }),
  lead: record<Extract<LookupReply, { kind: "lead" }>>({ kind: exactly("lead"), flightId: id }),
  join: record<Extract<LookupReply, { kind: "join" }>>({
    kind: exactly("join"),
    flightId: id,
    committed: optional(record<{ node: string; attempts: number }>({ node: id, attempts: count })),
  }),
  alone: record<Extract<LookupReply, { kind: "alone" }>>({ kind: exactly("alone") }),
});

const flightResult = union<FlightResult>({
  stored: record<Extract<FlightResult, { kind: "stored" }>>({
    kind: exactly("stored"),
    answer: storedAnswer,
  }),
  not_stored: record<Extract<FlightResult, { kind: "not_stored" }>>({
    kind: exactly("not_stored"),
    reason: detail,
  }),
  failed: record<Extract<FlightResult, { kind: "failed" }>>({
    kind: exactly("failed"),
    code,
    message: optional(detail),
    retryAfterMs: optional(amount),
    shared: flag,
  }),
});

const admitReplies = {
  granted: record<Extract<AdmitReply, { kind: "granted" }>>({
    kind: exactly("granted"),
    reservedTokens: amount,
    state: limitState,
  }),
  refused: record<Extract<AdmitReply, { kind: "refused" }>>({
    kind: exactly("refused"),
    code,
    retryAfterMs: amount,
    state: limitState,
  }),
};
const admitReply = union<AdmitReply>(admitReplies);

const peerAdmitReply = union<PeerAdmitReply>({
  granted: admitReplies.granted,
  refused: admitReplies.refused,
  moved: record<Extract<PeerAdmitReply, { kind: "moved" }>>({
    kind: exactly("moved"),
    owner: id,
    epoch: count,
  }),
});

const limiterDescription = record<LimiterDescription>({
  keys: list(
    record<LimiterDescription["keys"][number]>({
      key: id,
      inflight: amount,
      reservedTokens: amount,
      state: limitState,
      granted: count,
      refused: count,
      tokensToday: amount,
    }),
    DESCRIBED_MAX,
  ),
  reservations: count,
  keysKnown: count,
  lapses: count,
  stale: count,
  keysForgotten: count,
  overflows: count,
});

const cacheDescription = record<CacheDescription>({
  entries: count,
  bytes: count,
  bytesMax: count,
  flights: count,
  participants: count,
  hits: count,
  storeHits: count,
  misses: count,
  joins: count,
  stores: count,
  evictions: count,
  expired: count,
  tooLarge: count,
  purgedAnswers: count,
  overflows: count,
  storeFailures: count,
  lapses: count,
  stale: count,
  scopes: optional(count),
  questions: optional(count),
  semanticBytes: optional(count),
  semanticHits: optional(count),
  explorations: optional(count),
  semanticMisses: optional(count),
  learnt: optional(count),
  semanticEvictions: optional(count),
  semanticExpired: optional(count),
  unlearnt: optional(count),
  judgedRight: optional(count),
  judgedWrong: optional(count),
  unjudged: optional(count),
  removed: optional(count),
  switchedOff: optional(count),
  splitScopes: optional(count),
  movingParts: optional(count),
  movedEntries: optional(count),
  splitMatches: optional(count),
  shardsAsked: optional(count),
  probesLate: optional(count),
  probingAudits: optional(count),
  probingLost: optional(count),
  splitOverflows: optional(count),
  splits: optional(
    list(
      record<SplitFacts>({
        scope: id,
        buckets: count,
        epoch: count,
        moving: count,
        z: finite,
        recall: record<RecallEstimate>({
          audits: count,
          lost: count,
          recall: finite,
          low: finite,
          high: finite,
        }),
      }),
      DESCRIBED_MAX,
    ),
  ),
});

// ---- questions by meaning -----------------------------------------------------------------------------------

const questionText = text(QUESTION_LENGTH_MAX);

const policy = record<SemanticPolicy>({
  mode: oneOf("shadow", "fixed", "verified"),
  similarityMin: finite,
  errorRateMax: finite,
  isStrict: flag,
});

const unjudgedQuestion = {
  scope: id,
  tenant: id,
  model: id,
  text: questionText,
  vector,
};
const question = record<Question>({ ...unjudgedQuestion, policy });

const explored = record<Explored>({ entryId: id, similarity: finite });

const matched = union<Matched>({
  hit: record<Extract<Matched, { kind: "hit" }>>({
    kind: exactly("hit"),
    entryId: id,
    similarity: finite,
    answer: storedAnswer,
    ageMs: finite,
    says: detail,
  }),
  explore: record<Extract<Matched, { kind: "explore" }>>({
    kind: exactly("explore"),
    entryId: id,
    similarity: finite,
    says: detail,
  }),
  miss: record<Extract<Matched, { kind: "miss" }>>({ kind: exactly("miss"), says: detail }),
});

const sharedHit = record<SharedHit>({
  answer: storedAnswer,
  entryId: id,
  similarity: finite,
  ageMs: finite,
  policy,
});

const inspectedEntry = record<InspectedEntry>({
  entryId: id,
  scope: id,
  model: id,
  question: questionText,
  ageMs: finite,
  expiresInMs: finite,
  answerBytes: count,
  labels: count,
  similarityMin: finite,
  compared: optional(
    record<Comparison>({
      similarity: optional(finite),
      guards: list(
        record<GuardBlock>({ guard: oneOf(...guardNames), says: detail }),
        DESCRIBED_MAX,
      ),
      kind: oneOf("serve", "explore", "miss"),
      says: detail,
    }),
  ),
});

const share = record<Share>({
  count,
  total: count,
  share: finite,
  low: finite,
  high: finite,
});

const judgedPool = record<JudgedPool>({
  tenant: id,
  model: id,
  state: oneOf("on", "off"),
  shadow: record<ShadowSummary>({
    lookups: count,
    hits: share,
    falseHits: share,
    unjudged: count,
    bands: list(
      record<ShadowSummary["bands"][number]>({ from: finite, falseHits: share }),
      DESCRIBED_MAX,
    ),
  }),
});

// ---- members ------------------------------------------------------------------------------------------------

const memberStates: Readonly<Record<MemberState, true>> = {
  joining: true,
  alive: true,
  removed: true,
  left: true,
};

const heartbeat = record<Heartbeat>({
  seq: count,
  loopLagMs: amount,
  queueDepth: count,
  epoch: count,
  viewHash: count,
  renewsLease: flag,
  heard: list(
    record<Heartbeat["heard"][number]>({ id: path, incarnation: count, seq: count }),
    MEMBERS_MAX,
  ),
});

const view = record<View>({
  epoch: count,
  entries: list(
    record<ViewEntry>({
      id: path,
      incarnation: count,
      address: path,
      version: id,
      state: oneOf(...(Object.keys(memberStates) as MemberState[])),
      stamp: count,
    }),
    MEMBERS_MAX,
  ),
});

type Named<K extends CrossingMessage["kind"]> = Extract<CrossingMessage, { kind: K }>;

const rows: { readonly [K in CrossingMessage["kind"]]: Row<Named<K>> } = {
  "gpu_node.acquire": {
    to: "nodes",
    shape: record<Named<"gpu_node.acquire">>({
      kind: exactly("gpu_node.acquire"),
      leaseId: id,
      owner: path,
      uncachedTokens: amount,
      replyTo,
    }),
    reply: acquireReply,
  },
  "gpu_node.first_token": {
    to: "nodes",
    shape: record<Named<"gpu_node.first_token">>({
      kind: exactly("gpu_node.first_token"),
      leaseId: id,
      ttftMs: amount,
    }),
  },
  "gpu_node.progress": {
    to: "nodes",
    shape: record<Named<"gpu_node.progress">>({
      kind: exactly("gpu_node.progress"),
      leaseId: id,
      outputTokens: amount,
    }),
    conflate: ({ leaseId }) => leaseId,
  },
  "gpu_node.release": {
    to: "nodes",
    shape: record<Named<"gpu_node.release">>({
      kind: exactly("gpu_node.release"),
      leaseId: id,
      outcome: oneOf(...outcomeNames),
      ttftMs: optional(amount),
      e2eMs: amount,
      decodeMs: amount,
      promptTokens: amount,
      outputTokens: amount,
      retryAfterMs: optional(amount),
      detail: optional(detail),
    }),
  },
  "gpu_node.owner_restarted": {
    to: "nodes",
    shape: record<Named<"gpu_node.owner_restarted">>({
      kind: exactly("gpu_node.owner_restarted"),
      owner: path,
    }),
  },
  "gpu_node.subscribe": {
    to: "nodes",
    shape: record<Named<"gpu_node.subscribe">>({
      kind: exactly("gpu_node.subscribe"),
      router: actorRef,
    }),
  },
  "gpu_node.drain": {
    to: "nodes",
    shape: record<Named<"gpu_node.drain">>({ kind: exactly("gpu_node.drain") }),
  },
  "gpu_node.undrain": {
    to: "nodes",
    shape: record<Named<"gpu_node.undrain">>({ kind: exactly("gpu_node.undrain") }),
  },
  "gpu_node.describe": {
    to: "nodes",
    shape: record<Named<"gpu_node.describe">>({ kind: exactly("gpu_node.describe"), replyTo }),
    reply: nodeDescription,
  },
  "router.node_changed": {
    to: "router",
    shape: record<Named<"router.node_changed">>({ kind: exactly("router.node_changed"), snapshot }),
    conflate: (message) => message.snapshot.node,
  },
  "router.may_eject": {
    to: "router",
    shape: record<Named<"router.may_eject">>({
      kind: exactly("router.may_eject"),
      node: id,
      replyTo,
    }),
    reply: record<{ granted: boolean }>({ granted: flag }),
  },
  "cache.lookup": {
    to: "cache",
    shape: record<Named<"cache.lookup">>({
      kind: exactly("cache.lookup"),
      key: id,
      tenant: id,
      requestId: id,
      read: flag,
      lead: flag,
      participant: actorRef,
      replyTo,
    }),
    reply: lookupReply,
  },
  "cache.leave": {
    to: "cache",
    shape: record<Named<"cache.leave">>({ kind: exactly("cache.leave"), key: id, requestId: id }),
  },
  "cache.flight_committed": {
    to: "cache",
    shape: record<Named<"cache.flight_committed">>({
      kind: exactly("cache.flight_committed"),
      key: id,
      flightId: id,
      node: id,
      attempts: count,
    }),
  },
  "cache.flight_ended": {
    to: "cache",
    shape: record<Named<"cache.flight_ended">>({
      kind: exactly("cache.flight_ended"),
      key: id,
      flightId: id,
      result: flightResult,
      replyTo: optional(replyTo),
    }),
    reply: record<{ kind: "closed" }>({ kind: exactly("closed") }),
  },
  "cache.owner_restarted": {
    to: "cache",
    shape: record<Named<"cache.owner_restarted">>({
      kind: exactly("cache.owner_restarted"),
      owner: path,
    }),
  },
  "cache.purge": {
    to: "cache",
    shape: record<Named<"cache.purge">>({
      kind: exactly("cache.purge"),
      tenant: optional(id),
      replyTo,
    }),
    reply: record<{ removed: number }>({ removed: count }),
  },
  "cache.flight_answered": {
    to: "cache",
    shape: record<Named<"cache.flight_answered">>({
      kind: exactly("cache.flight_answered"),
      key: id,
      flightId: id,
      hit: sharedHit,
      replyTo,
    }),
    reply: record<{ kind: "closed" }>({ kind: exactly("closed") }),
  },
  "cache.match": {
    to: "cache",
    shape: record<Named<"cache.match">>({ kind: exactly("cache.match"), question, replyTo }),
    reply: matched,
  },
  "cache.learn": {
    to: "cache",
    shape: record<Named<"cache.learn">>({
      kind: exactly("cache.learn"),
      question: record<Omit<Question, "policy">>(unjudgedQuestion),
      answer: storedAnswer,
      explored: optional(explored),
      isShadow: flag,
      askedMsAgo: amount,
    }),
  },
  "cache.judge": {
    to: "cache",
    shape: record<Named<"cache.judge">>({
      kind: exactly("cache.judge"),
      explored,
      answer: storedAnswer,
    }),
  },
  "cache.feedback": {
    to: "cache",
    shape: record<Named<"cache.feedback">>({
      kind: exactly("cache.feedback"),
      entryId: id,
      tenant: id,
      isRight: flag,
      replyTo,
    }),
    reply: record<{ known: boolean }>({ known: flag }),
  },
  "cache.inspect": {
    to: "cache",
    shape: record<Named<"cache.inspect">>({
      kind: exactly("cache.inspect"),
      inspection: record<Inspection>({
        tenant: id,
        count,
        scope: optional(id),
        question: optional(
          record<NonNullable<Inspection["question"]>>({
            text: questionText,
            vector: optional(vector),
            policy,
          }),
        ),
      }),
      replyTo,
    }),
    reply: record<{ entries: InspectedEntry[]; judged: JudgedPool[] }>({
      entries: list(inspectedEntry, DESCRIBED_MAX),
      judged: list(judgedPool, DESCRIBED_MAX),
    }),
  },
  "cache.describe": {
    to: "cache",
    shape: record<Named<"cache.describe">>({ kind: exactly("cache.describe"), replyTo }),
    reply: cacheDescription,
  },
  "flight.committed": {
    to: "requests",
    shape: record<Named<"flight.committed">>({
      kind: exactly("flight.committed"),
      requestId: id,
      flightId: id,
      node: id,
      attempts: count,
    }),
  },
  "flight.ended": {
    to: "requests",
    shape: record<Named<"flight.ended">>({
      kind: exactly("flight.ended"),
      requestId: id,
      flightId: id,
    }),
  },
  "flight.answered": {
    to: "requests",
    shape: record<Named<"flight.answered">>({
      kind: exactly("flight.answered"),
      requestId: id,
      flightId: id,
      hit: sharedHit,
    }),
  },
  "flight.failed": {
    to: "requests",
    shape: record<Named<"flight.failed">>({
      kind: exactly("flight.failed"),
      requestId: id,
      flightId: id,
      code,
      message: optional(detail),
      retryAfterMs: optional(amount),
    }),
  },
  "flight.promoted": {
    to: "requests",
    shape: record<Named<"flight.promoted">>({
      kind: exactly("flight.promoted"),
      key: id,
      requestId: id,
      flightId: id,
    }),
  },
  "flight.abandoned": {
    to: "requests",
    shape: record<Named<"flight.abandoned">>({
      kind: exactly("flight.abandoned"),
      requestId: id,
      flightId: id,
    }),
  },
  "limiter.admit": {
    to: "limiter",
    shape: record<Named<"limiter.admit">>({
      kind: exactly("limiter.admit"),
      requestId: id,
      owner: path,
      key: id,
      limits,
      model: id,
      promptTokens: amount,
      maxTokens: optional(amount),
      expiresAtMs: instant,
      takeover: optional(count),
      replyTo,
    }),
    reply: admitReply,
  },
  "limiter.settle": {
    to: "limiter",
    shape: record<Named<"limiter.settle">>({
      kind: exactly("limiter.settle"),
      requestId: id,
      key: id,
      promptTokens: amount,
      cachedTokens: amount,
      outputTokens: amount,
    }),
  },
  "limiter.owner_restarted": {
    to: "limiter",
    shape: record<Named<"limiter.owner_restarted">>({
      kind: exactly("limiter.owner_restarted"),
      owner: path,
    }),
  },
  "limiter.describe": {
    to: "limiter",
    shape: record<Named<"limiter.describe">>({ kind: exactly("limiter.describe"), replyTo }),
    reply: limiterDescription,
  },
  "limits.admit": {
    to: "limits",
    shape: record<Named<"limits.admit">>({
      kind: exactly("limits.admit"),
      from: path,
      requestId: id,
      key: id,
      limits,
      model: id,
      promptTokens: amount,
      maxTokens: optional(amount),
      expiresInMs: amount,
      replyTo,
    }),
    reply: peerAdmitReply,
  },
  "limits.settle": {
    to: "limits",
    shape: record<Named<"limits.settle">>({
      kind: exactly("limits.settle"),
      from: path,
      requestId: id,
      key: id,
      promptTokens: amount,
      cachedTokens: amount,
      outputTokens: amount,
    }),
  },
  "members.heartbeat": {
    to: "members",
    shape: record<Named<"members.heartbeat">>({
      kind: exactly("members.heartbeat"),
      from: path,
      incarnation: count,
      heartbeat,
    }),
    conflate: ({ from, incarnation }) => `${from} ${incarnation}`,
  },
  "members.view": {
    to: "members",
    shape: record<Named<"members.view">>({ kind: exactly("members.view"), view }),
  },
};

/** How one kind of message is read. */
export type MessageRow = {
  readonly to: string;
  readonly shape: Shape<unknown>;
  readonly reply?: Shape<unknown>;
  readonly conflate?: (message: never) => string;
};

/** All that may cross, by kind. */
export const crossingRows: ReadonlyMap<unknown, MessageRow> = new Map(Object.entries(rows));

/** Of a message that waits to be sent: equal texts may be made one. Undefined: it stands for itself. */
export function conflationKey(to: string, message: unknown): string | undefined {
  if (typeof message !== "object" || message === null || !("kind" in message)) return undefined;
  const conflate = crossingRows.get(message.kind)?.conflate;
  return conflate === undefined ? undefined : `${to} ${conflate(message as never)}`;
}

/**
 * About how many bytes it takes encoded: exact for what may be large (whole answers), a round figure for the rest.
 * Bounds a queue; the limit on a frame is checked on real bytes.
 */
export function weightOf(message: unknown): number {
  const WEIGHT = 256;
  if (typeof message !== "object" || message === null) return WEIGHT;
  const { answer } = message as { answer?: StoredAnswer };
  if (answer !== undefined) return WEIGHT + answer.body.byteLength;
  const { result } = message as { result?: FlightResult };
  return result?.kind === "stored" ? WEIGHT + result.answer.body.byteLength : WEIGHT;
}
