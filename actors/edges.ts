/**
 * Protocols of the edges: actors whose inside is I/O (live) or a model (simulation). Types only.
 *
 * Bytes never travel in these messages, but for whole answers that the cache keeps: an edge named `upstream`
 * reads the request's body from, and writes the answer's bytes to, a data plane that it shares with `front`.
 */
import type { ActorRef, ReplyTo } from "../runtime/actor.ts";
import type { ErrorCode } from "./errors.ts";
import type {
  CacheVerdict,
  LeaseId,
  LimitState,
  Limits,
  NodeId,
  RequestId,
  ScrapeSample,
  StoredAnswer,
  StoredQuestion,
  Usage,
} from "./protocol.ts";

// ---- upstream: one attempt on one node ------------------------------------------------------------------

export type UpstreamCommand =
  /** Runs one attempt; exactly one of `finished` and `failed` comes back, unless aborted first. */
  | {
      kind: "upstream.start";
      leaseId: LeaseId;
      /** Whose body is sent. */
      requestId: RequestId;
      /** Where the answer's bytes go: the flight outlives the attempts of its leader. */
      flightId: RequestId;
      node: NodeId;
      attempt: number;
      /** The four clocks but connect, which is the node pool's own. All > 0. */
      firstTokenMs: number;
      stallMs: number;
      totalMs: number;
      replyTo: ActorRef<UpstreamEvent>;
    }
  /** Ends the attempt now, destroys its socket; no event follows. A committed answer ends with `code`. */
  | { kind: "upstream.abort"; leaseId: LeaseId; code: ErrorCode }
  /** The sender restarted and has lost its requests: end all of them. */
  | { kind: "upstream.abort_all" }
  /** A one-token generation, to see whether a node answers at all. */
  | {
      kind: "upstream.probe";
      node: NodeId;
      timeoutMs: number;
      replyTo: ReplyTo<{ answered: boolean; detail: string }>;
    };

export type UpstreamEvent =
  /** The first content token is out: from now on the attempt is committed and never retried. */
  | { kind: "upstream.first_token"; leaseId: LeaseId }
  /** Every 5 s while the attempt lives, whether tokens flow or not: renews the lease. */
  | { kind: "upstream.progress"; leaseId: LeaseId; outputTokens: number }
  | {
      kind: "upstream.finished";
      leaseId: LeaseId;
      usage: Usage;
      /** Time from first to last token, ms; 0 for answers that came whole. */
      decodeMs: number;
      /** The whole answer if it may be stored, else the reason why not. */
      answer?: StoredAnswer;
      notStorable?: string;
    }
  | {
      kind: "upstream.failed";
      leaseId: LeaseId;
      failure: UpstreamFailure;
      /** Content had reached the flight: the failure is final. */
      committed: boolean;
      outputTokens: number;
      /** Of the node's answer. */
      status?: number;
      retryAfterMs?: number;
      /** One line, without prompt or answer text. */
      detail: string;
    };

export type UpstreamFailure =
  | "connect" // refused, reset, DNS, TLS, connect clock: no byte of an answer
  | "overloaded" // 429, or 503 that says so
  | "unavailable" // 502, 503, 504, refused by a draining node
  | "server_error" // 500 and other 5xx, TGI's 424
  | "bad_answer" // garbage, half JSON, wrong content type, 200 with an error body, redirect
  | "first_token_timeout"
  | "stalled" // between tokens
  | "total_timeout"
  | "broken_stream" // ended without a finish
  | "client_error"; // 4xx: the node's own answer is relayed to the client from the data plane

// ---- front: the client's side of a request -----------------------------------------------------------------

/** Facts for the answer's headers. */
export type AnswerFacts = {
  cache: CacheVerdict;
  /** Of a semantic hit, with the entry that answered. */
  similarity?: number;
  entryId?: string;
  node?: NodeId;
  attempts: number;
  queuedMs: number;
  /** Age of a cached answer. */
  ageMs?: number;
  limits?: LimitState;
};

export type FrontCommand =
  /** Answer from the cache. */
  | { kind: "front.answer"; requestId: RequestId; answer: StoredAnswer; facts: AnswerFacts }
  /**
   * Deliver the flight's bytes: what is there, then what comes, until it ends or fails. A flight of another peer is
   * named `<peer>/<id of its leader>`; how its delivery went is told as `request.relayed`.
   */
  | { kind: "front.attach"; requestId: RequestId; flightId: RequestId; facts: AnswerFacts }
  /** Refused or failed before any byte. `message` replaces the code's own text. */
  | {
      kind: "front.refuse";
      requestId: RequestId;
      code: ErrorCode;
      message?: string;
      retryAfterMs?: number;
      facts: AnswerFacts;
    }
  /** The flight that this request led is over: its body and answer leave the data plane. Comes after every
   *  `front.attach` to that flight here; readers that are attached read on to the end. `isShared`: readers of other
   *  peers may still be on their way. */
  | { kind: "front.forget"; requestId: RequestId; isShared: boolean }
  /** A semantic hit was served and is to be judged: ask a node the same, for nobody. Comes before `forget`. */
  | { kind: "front.ask_again"; requestId: RequestId; entryId: string; similarity: number }
  /** The request actor lost its state: every open request it held is answered `internal`. */
  | { kind: "front.requests_lost" };

// ---- store: the shared, surviving copy of the cache ----------------------------------------------------------

/** What the cache asks of the shared store; an entry that cannot be had is a miss, never an error. */
export type StoreCommand =
  | { kind: "store.get"; key: string; tenant: string; replyTo: ReplyTo<StoreGot> }
  | { kind: "store.put"; key: string; tenant: string; answer: StoredAnswer; ttlMs: number }
  | { kind: "store.purge"; tenant?: string; replyTo: ReplyTo<{ removed: number }> }
  /** Keeps a question with its vector and answer, for a shard that begins anew. */
  | { kind: "store.remember"; question: StoredQuestion }
  /** Found wrong: no shard shall get it back. */
  | { kind: "store.forget"; entryId: string; scope: string; tenant: string }
  /** The nearest questions of a scope, where the store has an index of its own. */
  | {
      kind: "store.nearest";
      scope: string;
      vector: Float32Array;
      similarityMin: number;
      count: number;
      replyTo: ReplyTo<Recalled>;
    }
  /** The questions of one of 4096 buckets (first 12 bits of the scope), a page at a time; "" asks for the first. */
  | { kind: "store.recall"; bucket: number; cursor: string; replyTo: ReplyTo<Recalled> };

/** A page of questions; without `cursor` it was the last. What is corrupt or expired is left out. */
export type Recalled = { questions: StoredQuestion[]; cursor?: string };

/** A missing, corrupt or late entry is a miss; `ttlMs` is what is left of its life. */
export type StoreGot = { answer?: StoredAnswer; ttlMs: number };

// ---- limits: what keys have used, kept in one place for all peers ---------------------------------------------

/** What is asked of the shared store of limits. It has a clock of its own: no instant travels. */
export type LimitStoreCommand =
  /** Checks all limits of the key, in the limiter's order, and charges all or none. */
  | {
      kind: "limits.charge";
      key: string;
      limits: Limits;
      requestId: RequestId;
      tokens: number;
      /** Its place in flight is free again then, should nobody settle it. */
      expiresInMs: number;
      replyTo: ReplyTo<LimitStoreReply>;
    }
  /** Ends what was charged: `usedTokens` in place of the reserved ones; `refund`: as if it had never been. */
  | {
      kind: "limits.correct";
      key: string;
      limits: Limits;
      requestId: RequestId;
      charge: LimitCharge;
      usedTokens: number;
      refund: boolean;
    };

/** What one request was charged, for its correction. */
export type LimitCharge = {
  tokens: number;
  /** In the store's allowances, ns; below 0 where there is no such limit. */
  requestNs: number;
  tokensNs: number;
  /** Names the day that it was charged to; 0 without such a limit. */
  day: number;
};

/** `state.atMs` is by the store's clock: whoever receives it sets its own. `away`: ask elsewhere. */
export type LimitStoreReply =
  | { kind: "granted"; charge: LimitCharge; state: LimitState }
  | { kind: "refused"; code: ErrorCode; retryAfterMs: number; state: LimitState }
  | { kind: "away" };

// ---- scraper: engine metrics, health and models ---------------------------------------------------------------

/** Which nodes are looked at, and who is told. */
export type ScraperCommand =
  | { kind: "scraper.add"; node: NodeId; replyTo: ActorRef<ScraperEvent> }
  | { kind: "scraper.remove"; node: NodeId };

/** What a look at a node found; sent to its actor. */
export type ScraperEvent =
  | { kind: "scraper.sampled"; sample: ScrapeSample }
  | { kind: "scraper.failed"; reason: string }
  | { kind: "scraper.health"; ok: boolean; detail: string }
  | { kind: "scraper.models"; models: readonly string[]; adapters: readonly string[] };

// ---- embedder: text to vector -----------------------------------------------------------------------------------

export type EmbedderCommand =
  /** One reply, always, within the embedder's `timeoutMs` of its arrival. */
  | { kind: "embedder.embed"; requestId: RequestId; text: string; replyTo: ReplyTo<Embedded> }
  | { kind: "embedder.describe"; replyTo: ReplyTo<EmbedderDescription> };

/** `vector`: of norm 1 and of the identity's dimension. Without one a lookup goes on as a miss, never an error. */
export type Embedded =
  | { kind: "vector"; vector: Float32Array }
  | { kind: "unavailable"; reason: NoVector };

/** Why a text got no vector. */
export type NoVector =
  | "starting" // the self-test has not ended
  | "resting" // it failed a while ago and is tried again
  | "off" // until the process starts again; health says why
  | "busy" // the queue is full; or the text is long, and others wait
  | "late" // not embedded in time
  | "empty" // nothing but spaces and control characters
  | "too_long" // the model would read only its head, and two questions may differ behind that
  | "unknown_words" // the model knows less than half of it, so that its vector says little
  | "failed" // refused or failed, this time
  | "bad_vector"; // what came is no unit vector of the right dimension

/** Belongs to every scope: vectors of different embedders never meet. */
export type EmbedderIdentity = {
  /** "transformers:Xenova/paraphrase-multilingual-MiniLM-L12-v2". */
  readonly id: string;
  /** Changes with the weights, as far as that can be seen. */
  readonly version: string;
  readonly dimension: number;
};

/** Vectors come only from a healthy one; a resting one is tried again, an off one is not. */
export type EmbedderState = "starting" | "healthy" | "resting" | "off";

/** For health and metrics; counts are since the start. */
export type EmbedderDescription = {
  state: EmbedderState;
  /** Why it is not healthy; "" when it is. */
  reason: string;
  /** Known once it has been healthy; never changes after that. */
  identity?: EmbedderIdentity;
  /** Texts waiting now. */
  queued: number;
  vectors: number;
  unavailable: Readonly<Record<NoVector, number>>;
  batches: number;
  /** All batches together: `batchMs / batches` is the mean time of one. */
  batchMs: number;
};
