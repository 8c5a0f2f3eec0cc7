/** Every message that may cross between peers, with its replies, at random; the compiler holds the lists complete. */

import fc from "fast-check";
import { type ErrorCode, errorFacts } from "../actors/errors.ts";
import { guardNames } from "../actors/match-guards.ts";
import type {
  LeaseOutcome,
  LimitState,
  Limits,
  NodeSnapshot,
  StoredAnswer,
} from "../actors/protocol.ts";
import type { ActorRef, AskFailure, ReplyTo } from "../runtime/actor.ts";
import type { Envelope } from "../runtime/system.ts";
import type { CrossingMessage } from "../transport/wire-messages.ts";

type Kind = CrossingMessage["kind"];
type Named<K extends Kind> = Extract<CrossingMessage, { kind: K }>;

const text = fc.oneof(
  fc.string({ maxLength: 40, unit: "grapheme" }),
  fc.string({ minLength: 30, maxLength: 200 }),
);
const amount = fc
  .oneof(
    fc.nat(),
    fc.double({ min: 0, max: 1e12, noNaN: true }),
    fc.constantFrom(0, 31, 32, 63, 64, 127, 128, 255, 256, 65_535, 65_536, 2 ** 32, 2 ** 53 - 1),
  )
  .map((value) => (Object.is(value, -0) ? 0 : value));
const count = fc.oneof(fc.nat(), fc.maxSafeNat());
const instant = fc
  .oneof(fc.nat(), fc.double({ min: -1e9, max: 1e9, noNaN: true }))
  .map((value) => value + 0);
const flag = fc.boolean();
const path = fc.constantFrom("a/requests", "a/router", "a/nodes/node-1", "a/cache/3");
const replyTo: fc.Arbitrary<ReplyTo<unknown>> = fc.record({ asker: path, askId: count });
const actorRef: fc.Arbitrary<ActorRef<unknown>> = fc.record({ path, uid: count });
const code = fc.constantFrom(...(Object.keys(errorFacts) as ErrorCode[]));
const outcome = fc.constantFrom<LeaseOutcome>(
  ...(["ok", "failed_local", "failed_gateway", "overloaded", "slow"] as const),
  ...(["stalled", "client_error", "cancelled"] as const),
);

const answer: fc.Arbitrary<StoredAnswer> = fc.record({
  body: fc.uint8Array({ maxLength: 300 }).map((bytes) => new Uint8Array(bytes)),
  bytes: count,
  route: fc.constantFrom("chat", "completions", "embeddings", "other"),
  model: text,
  promptTokens: amount,
  outputTokens: amount,
});

const limits: fc.Arbitrary<Limits> = fc.record(
  {
    requestsPerMinute: amount,
    requestBurst: amount,
    tokensPerMinute: amount,
    tokenBurst: amount,
    concurrent: amount,
    concurrentTokens: amount,
    tokensPerDay: amount,
    whenUnreachable: fc.constantFrom("share", "refuse"),
  },
  { requiredKeys: [] },
);

const allowance = fc.record({ limit: amount, remaining: instant, resetMs: instant });
const limitState: fc.Arbitrary<LimitState> = fc.record(
  { atMs: instant, requests: allowance, tokens: allowance },
  { requiredKeys: ["atMs"] },
);

/** As a Float32Array holds them; −0 too, which is no other number to a cosine. */
const vector: fc.Arbitrary<Float32Array> = fc.float32Array({
  maxLength: 40,
  noNaN: true,
  noDefaultInfinity: true,
});
const question = { scope: text, tenant: text, model: text, text, vector };
const policy = fc.record({
  mode: fc.constantFrom("shadow", "fixed", "verified"),
  similarityMin: amount,
  errorRateMax: amount,
  isStrict: flag,
});
const sharedHit = fc.record({
  answer,
  entryId: text,
  similarity: instant,
  ageMs: instant,
  policy,
});
const explored = fc.record({ entryId: text, similarity: instant });
const share = fc.record({ count, total: count, share: amount, low: amount, high: amount });

export const snapshots: fc.Arbitrary<NodeSnapshot> = fc.record(
  {
    node: text,
    address: text,
    incarnation: count,
    version: count,
    atMs: instant,
    inflight: amount,
    prefillTokens: amount,
    inflightMax: amount,
    circuit: fc.constantFrom("closed", "open", "half_open"),
    probePermits: amount,
    draining: flag,
    ramp: amount,
    healthy: flag,
    restUntilMs: instant,
    articleWeight: amount,
    models: fc.array(text, { maxLength: 3 }),
    adapters: fc.array(text, { maxLength: 3 }),
    itlSeconds: amount,
    scrape: fc.record(
      {
        engine: text,
        missing: fc.array(text, { maxLength: 2 }),
        running: amount,
        waiting: amount,
        waitingForCapacity: amount,
        kv: amount,
        generatedTokensTotal: amount,
        preemptionsTotal: amount,
        maxSequences: amount,
        latencySeconds: amount,
        gpuMemory: amount,
        atMs: instant,
      },
      { requiredKeys: ["engine", "missing", "atMs"] },
    ),
    latencyMsAtInflight: amount,
    latencyMsPeakEwma: amount,
  },
  {
    requiredKeys: [
      ...(["node", "address", "incarnation", "version", "atMs", "inflight"] as const),
      ...(["prefillTokens", "inflightMax", "circuit", "probePermits", "draining"] as const),
      ...(["ramp", "healthy", "restUntilMs", "articleWeight"] as const),
    ],
  },
);

function kind<const K extends string>(name: K): fc.Arbitrary<K> {
  return fc.constant(name);
}

/** Second part of the path of whoever receives it. */
export const receivers: Readonly<Record<Kind, string>> = {
  "gpu_node.acquire": "nodes/n",
  "gpu_node.first_token": "nodes/n",
  "gpu_node.progress": "nodes/n",
  "gpu_node.release": "nodes/n",
  "gpu_node.owner_restarted": "nodes/n",
  "gpu_node.subscribe": "nodes/n",
  "gpu_node.drain": "nodes/n",
  "gpu_node.undrain": "nodes/n",
  "gpu_node.describe": "nodes/n",
  "router.node_changed": "router",
  "router.may_eject": "router",
  "cache.lookup": "cache/3",
  "cache.leave": "cache/3",
  "cache.flight_committed": "cache/3",
  "cache.flight_ended": "cache/3",
  "cache.owner_restarted": "cache/3",
  "cache.purge": "cache/3",
  "cache.flight_answered": "cache/3",
  "cache.match": "cache/3",
  "cache.learn": "cache/3",
  "cache.judge": "cache/3",
  "cache.feedback": "cache/3",
  "cache.inspect": "cache/3",
  "cache.describe": "cache/3",
  "flight.committed": "requests",
  "flight.ended": "requests",
  "flight.answered": "requests",
  "flight.failed": "requests",
  "flight.promoted": "requests",
  "flight.abandoned": "requests",
  "limiter.admit": "limiter",
  "limiter.settle": "limiter",
  "limiter.owner_restarted": "limiter",
  "limiter.describe": "limiter",
  "limits.admit": "limits",
  "limits.settle": "limits",
  "members.heartbeat": "members",
  "members.view": "members",
};

export const messages: { readonly [K in Kind]: fc.Arbitrary<Named<K>> } = {
  "gpu_node.acquire": fc.record({
    kind: kind("gpu_node.acquire"),
    leaseId: text,
    owner: path,
    uncachedTokens: amount,
    replyTo,
  }),
  "gpu_node.first_token": fc.record({
    kind: kind("gpu_node.first_token"),
    leaseId: text,
    ttftMs: amount,
  }),
  "gpu_node.progress": fc.record({
    kind: kind("gpu_node.progress"),
    leaseId: text,
    outputTokens: amount,
  }),
  "gpu_node.release": fc.record(
    {
      kind: kind("gpu_node.release"),
      leaseId: text,
      outcome,
      e2eMs: amount,
      decodeMs: amount,
      promptTokens: amount,
      outputTokens: amount,
      ttftMs: amount,
      retryAfterMs: amount,
      detail: text,
    },
    {
      requiredKeys: [
        ...(["kind", "leaseId", "outcome", "e2eMs", "decodeMs"] as const),
        ...(["promptTokens", "outputTokens"] as const),
      ],
    },
  ),
  "gpu_node.owner_restarted": fc.record({ kind: kind("gpu_node.owner_restarted"), owner: path }),
  "gpu_node.subscribe": fc.record({ kind: kind("gpu_node.subscribe"), router: actorRef }),
  "gpu_node.drain": fc.record({ kind: kind("gpu_node.drain") }),
  "gpu_node.undrain": fc.record({ kind: kind("gpu_node.undrain") }),
  "gpu_node.describe": fc.record({ kind: kind("gpu_node.describe"), replyTo }),
  "router.node_changed": fc.record({ kind: kind("router.node_changed"), snapshot: snapshots }),
  "router.may_eject": fc.record({ kind: kind("router.may_eject"), node: text, replyTo }),
  "cache.lookup": fc.record({
    kind: kind("cache.lookup"),
    key: text,
    tenant: text,
    requestId: text,
    read: flag,
    lead: flag,
    participant: actorRef,
    replyTo,
  }),
  "cache.leave": fc.record({ kind: kind("cache.leave"), key: text, requestId: text }),
  "cache.flight_committed": fc.record({
    kind: kind("cache.flight_committed"),
    key: text,
    flightId: text,
    node: text,
    attempts: count,
  }),
  "cache.flight_ended": fc.record(
    {
      kind: kind("cache.flight_ended"),
      key: text,
      flightId: text,
      result: fc.oneof(
        fc.record({ kind: kind("stored"), answer }),
        fc.record({ kind: kind("not_stored"), reason: text }),
        fc.record(
          { kind: kind("failed"), code, message: text, retryAfterMs: amount, shared: flag },
          { requiredKeys: ["kind", "code", "shared"] },
        ),
      ),
      replyTo,
    },
    { requiredKeys: ["kind", "key", "flightId", "result"] },
  ),
  "cache.owner_restarted": fc.record({ kind: kind("cache.owner_restarted"), owner: path }),
  "cache.purge": fc.record(
    { kind: kind("cache.purge"), tenant: text, replyTo },
    { requiredKeys: ["kind", "replyTo"] },
  ),
  "cache.flight_answered": fc.record({
    kind: kind("cache.flight_answered"),
    key: text,
    flightId: text,
    hit: sharedHit,
    replyTo,
  }),
  "cache.match": fc.record({
    kind: kind("cache.match"),
    question: fc.record({ ...question, policy }),
    replyTo,
  }),
  "cache.learn": fc.record(
    {
      kind: kind("cache.learn"),
      question: fc.record(question),
      answer,
      explored,
      isShadow: flag,
      askedMsAgo: amount,
    },
    { requiredKeys: ["kind", "question", "answer", "isShadow", "askedMsAgo"] },
  ),
  "cache.judge": fc.record({ kind: kind("cache.judge"), explored, answer }),
  "cache.feedback": fc.record({
    kind: kind("cache.feedback"),
    entryId: text,
    tenant: text,
    isRight: flag,
    replyTo,
  }),
  "cache.inspect": fc.record({
    kind: kind("cache.inspect"),
    inspection: fc.record(
      {
        tenant: text,
        count,
        scope: text,
        question: fc.record({ text, vector, policy }, { requiredKeys: ["text", "policy"] }),
      },
      { requiredKeys: ["tenant", "count"] },
    ),
    replyTo,
  }),
  "cache.describe": fc.record({ kind: kind("cache.describe"), replyTo }),
  "flight.committed": fc.record({
    kind: kind("flight.committed"),
    requestId: text,
    flightId: text,
    node: text,
    attempts: count,
  }),
  "flight.ended": fc.record({ kind: kind("flight.ended"), requestId: text, flightId: text }),
  "flight.answered": fc.record({
    kind: kind("flight.answered"),
    requestId: text,
    flightId: text,
    hit: sharedHit,
  }),
  "flight.failed": fc.record(
    {
      kind: kind("flight.failed"),
      requestId: text,
      flightId: text,
      code,
      message: text,
      retryAfterMs: amount,
    },
    { requiredKeys: ["kind", "requestId", "flightId", "code"] },
  ),
  "flight.promoted": fc.record({
    kind: kind("flight.promoted"),
    key: text,
    requestId: text,
    flightId: text,
  }),
  "flight.abandoned": fc.record({
    kind: kind("flight.abandoned"),
    requestId: text,
    flightId: text,
  }),
  "limiter.admit": fc.record(
    {
      kind: kind("limiter.admit"),
      requestId: text,
      owner: path,
      key: text,
      limits,
      model: text,
      promptTokens: amount,
      maxTokens: amount,
      expiresAtMs: instant,
      takeover: count,
      replyTo,
    },
    {
      requiredKeys: [
        ...(["kind", "requestId", "owner", "key", "limits", "model"] as const),
        ...(["promptTokens", "expiresAtMs", "replyTo"] as const),
      ],
    },
  ),
  "limiter.settle": fc.record({
    kind: kind("limiter.settle"),
    requestId: text,
    key: text,
    promptTokens: amount,
    cachedTokens: amount,
    outputTokens: amount,
  }),
  "limiter.owner_restarted": fc.record({ kind: kind("limiter.owner_restarted"), owner: path }),
  "limiter.describe": fc.record({ kind: kind("limiter.describe"), replyTo }),
  "limits.admit": fc.record(
    {
      kind: kind("limits.admit"),
      from: path,
      requestId: text,
      key: text,
      limits,
      model: text,
      promptTokens: amount,
      maxTokens: amount,
      expiresInMs: amount,
      replyTo,
    },
    {
      requiredKeys: [
        ...(["kind", "from", "requestId", "key", "limits", "model"] as const),
        ...(["promptTokens", "expiresInMs", "replyTo"] as const),
      ],
    },
  ),
  "limits.settle": fc.record({
    kind: kind("limits.settle"),
    from: path,
    requestId: text,
    key: text,
    promptTokens: amount,
    cachedTokens: amount,
    outputTokens: amount,
  }),
  "members.heartbeat": fc.record({
    kind: kind("members.heartbeat"),
    from: path,
    incarnation: count,
    heartbeat: fc.record({
      seq: count,
      loopLagMs: amount,
      queueDepth: count,
      epoch: count,
      viewHash: count,
      renewsLease: flag,
      heard: fc.array(fc.record({ id: path, incarnation: count, seq: count }), { maxLength: 3 }),
    }),
  }),
  "members.view": fc.record({
    kind: kind("members.view"),
    view: fc.record({
      epoch: count,
      entries: fc.array(
        fc.record({
          id: path,
          incarnation: count,
          address: path,
          version: text,
          state: fc.constantFrom("joining", "alive", "removed", "left"),
          stamp: count,
        }),
        { maxLength: 3 },
      ),
    }),
  }),
};

type Asked = {
  [K in Kind]: Named<K> extends { replyTo?: ReplyTo<infer R> }
    ? unknown extends R
      ? never
      : K
    : never;
}[Kind];
type ReplyOf<K extends Kind> = Named<K> extends { replyTo?: ReplyTo<infer R> } ? R : never;

const numbers = <const N extends string>(...names: N[]): fc.Arbitrary<Record<N, number>> =>
  fc.tuple(...names.map(() => count)).map((values) => {
    const entries = names.map((name, index) => [name, values[index] ?? 0]);
    return Object.fromEntries(entries) as Record<N, number>;
  });

/** What each ask may be answered. */
export const replies: { readonly [K in Asked]: fc.Arbitrary<ReplyOf<K>> } = {
  "gpu_node.acquire": fc.oneof(
    fc.record({
      kind: kind("granted"),
      leaseId: text,
      node: text,
      probe: flag,
      snapshot: snapshots,
    }),
    fc.record({
      kind: kind("denied"),
      reason: fc.constantFrom(
        "full" as const,
        "open" as const,
        "draining" as const,
        "probe_busy" as const,
      ),
      snapshot: snapshots,
    }),
  ),
  "gpu_node.describe": fc.record({
    snapshot: snapshots,
    leases: fc.array(
      fc.record({ leaseId: text, ageMs: instant, firstToken: flag, outputTokens: amount }),
      { maxLength: 3 },
    ),
    circuit: fc.record(
      {
        state: fc.constantFrom("closed", "open", "half_open"),
        sinceMs: instant,
        ejections: count,
        openForMs: amount,
        cause: fc.constantFrom("health", "wedged", "slow_rate"),
      },
      { requiredKeys: ["state", "sinceMs", "ejections"] },
    ),
    window: fc.record({ calls: count, failures: count, slow: count }),
    othersInflight: amount,
    health: fc.record({ ok: flag, failuresInRow: count, detail: text }),
    totals: numbers(
      ...(["ok", "failed_local", "failed_gateway", "overloaded", "slow"] as const),
      ...(["stalled", "client_error", "cancelled"] as const),
    ),
  }),
  "router.may_eject": fc.record({ granted: flag }),
  "cache.lookup": fc.oneof(
    fc.record({ kind: kind("hit"), answer, ageMs: instant }),
    fc.record({ kind: kind("lead"), flightId: text }),
    fc.record(
      { kind: kind("join"), flightId: text, committed: fc.record({ node: text, attempts: count }) },
      { requiredKeys: ["kind", "flightId"] },
    ),
    fc.record({ kind: kind("alone") }),
  ),
  "cache.flight_ended": fc.record({ kind: kind("closed") }),
  "cache.purge": fc.record({ removed: count }),
  "cache.flight_answered": fc.record({ kind: kind("closed") }),
  "cache.match": fc.oneof(
    fc.record({
      kind: kind("hit"),
      entryId: text,
      similarity: instant,
      answer,
      ageMs: instant,
      says: text,
    }),
    fc.record({ kind: kind("explore"), entryId: text, similarity: instant, says: text }),
    fc.record({ kind: kind("miss"), says: text }),
  ),
  "cache.feedback": fc.record({ known: flag }),
  "cache.inspect": fc.record({
    entries: fc.array(
      fc.record(
        {
          entryId: text,
          question: text,
          ageMs: instant,
          expiresInMs: instant,
          answerBytes: count,
          labels: count,
          similarityMin: amount,
          scope: text,
          model: text,
          compared: fc.record(
            {
              similarity: instant,
              guards: fc.array(fc.record({ guard: fc.constantFrom(...guardNames), says: text }), {
                maxLength: 3,
              }),
              kind: fc.constantFrom("serve" as const, "explore" as const, "miss" as const),
              says: text,
            },
            { requiredKeys: ["guards", "kind", "says"] },
          ),
        },
        {
          requiredKeys: [
            ...(["entryId", "question", "ageMs", "expiresInMs", "answerBytes"] as const),
            ...(["labels", "similarityMin", "scope", "model"] as const),
          ],
        },
      ),
      { maxLength: 3 },
    ),
    judged: fc.array(
      fc.record({
        tenant: text,
        model: text,
        state: fc.constantFrom("on", "off"),
        shadow: fc.record({
          lookups: count,
          hits: share,
          falseHits: share,
          unjudged: count,
          bands: fc.array(fc.record({ from: amount, falseHits: share }), { maxLength: 2 }),
        }),
      }),
      { maxLength: 2 },
    ),
  }),
  "limits.admit": fc.oneof(
    fc.record({ kind: kind("granted"), reservedTokens: amount, state: limitState }),
    fc.record({ kind: kind("refused"), code, retryAfterMs: amount, state: limitState }),
    fc.record({ kind: kind("moved"), owner: text, epoch: count }),
  ),
  "cache.describe": numbers(
    ...(["entries", "bytes", "bytesMax", "flights", "participants", "hits", "storeHits"] as const),
    ...([
      "misses",
      "joins",
      "stores",
      "evictions",
      "expired",
      "tooLarge",
      "purgedAnswers",
    ] as const),
    ...(["overflows", "storeFailures", "lapses", "stale"] as const),
  ),
  "limiter.admit": fc.oneof(
    fc.record({ kind: kind("granted"), reservedTokens: amount, state: limitState }),
    fc.record({ kind: kind("refused"), code, retryAfterMs: amount, state: limitState }),
  ),
  "limiter.describe": fc.record({
    keys: fc.array(
      fc.record({
        key: text,
        inflight: amount,
        reservedTokens: amount,
        state: limitState,
        granted: count,
        refused: count,
        tokensToday: amount,
      }),
      { maxLength: 3 },
    ),
    reservations: count,
    keysKnown: count,
    lapses: count,
    stale: count,
    keysForgotten: count,
    overflows: count,
  }),
};

/** Any message, in its envelope from process a to process b. */
export const messageEnvelopes: fc.Arbitrary<Envelope> = fc
  .constantFrom(...(Object.keys(messages) as Kind[]))
  .chain((name) =>
    fc.record({
      kind: kind("message"),
      to: fc.constant(`b/${receivers[name]}`),
      uid: count,
      from: path,
      askId: count,
      timeoutUs: amount,
      message: messages[name] as fc.Arbitrary<CrossingMessage>,
    }),
  );

/** Any reply to what b asked, with the kind of its question. */
export const answered: fc.Arbitrary<{ question: string; envelope: Envelope }> = fc
  .constantFrom(...(Object.keys(replies) as Asked[]))
  .chain((question) =>
    fc.record({
      question: fc.constant(question),
      envelope: fc.record({
        kind: kind("reply"),
        to: fc.constant("b/requests"),
        askId: count,
        outcome: fc.oneof(
          fc.record({
            ok: fc.constant<true>(true),
            value: replies[question] as fc.Arbitrary<unknown>,
          }),
          fc.record({
            ok: fc.constant<false>(false),
            failure: fc.constantFrom<AskFailure>(
              ...(["timeout", "crashed", "stopped", "busy", "noroute", "disconnected"] as const),
            ),
          }),
        ),
      }),
    }),
  );

/** What is numbered. */
export const systemEnvelopes: fc.Arbitrary<Envelope> = fc.oneof(
  fc.record({
    kind: kind("watch"),
    to: fc.constant("b/router"),
    uid: count,
    from: path,
    watchId: count,
  }),
  fc.record({ kind: kind("unwatch"), to: fc.constant("b/router"), from: path, watchId: count }),
  fc.record({
    kind: kind("terminated"),
    to: fc.constant("b/router"),
    watchId: count,
    terminated: fc.record({
      path,
      uid: count,
      reason: fc.constantFrom(...(["stopped", "failed", "noproc", "noconnection"] as const)),
    }),
  }),
);
