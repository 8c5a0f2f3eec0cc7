import type { ActorRef, ReplyTo } from "../runtime/actor.ts";
import type { ErrorCode } from "./errors.ts";
import type { NodeId, RequestId, StoredAnswer } from "./protocol.ts";

export type CacheMessage =
  /**
   * Exact lookup. `read`: may be answered from the store or a running flight; `lead`: may become a flight
   * that others join. The reply may take as long as the store's time-out, never longer.
   */
  | {
      kind: "cache.lookup";
      key: string;
      tenant: string;
      requestId: RequestId;
      read: boolean;
      lead: boolean;
      /** Told about the flight that this request joins. */
      participant: ActorRef<FlightNews>;
      replyTo: ReplyTo<LookupReply>;
    }
  /** A participant's client left. The last one to leave abandons the flight: its leader is told. */
  | { kind: "cache.leave"; key: string; requestId: RequestId }
  /** The leader's first content token is out. */
  | { kind: "cache.flight_committed"; key: string; flightId: RequestId; node: NodeId; attempts: number }
  | { kind: "cache.flight_ended"; key: string; flightId: RequestId; result: FlightResult }
  /** All flights and memberships of that request actor are void; joiners of its flights are told `internal`. */
  | { kind: "cache.owner_restarted"; owner: string }
  | { kind: "cache.purge"; tenant?: string; replyTo: ReplyTo<{ removed: number }> }
  | { kind: "cache.describe"; replyTo: ReplyTo<CacheDescription> };

export type LookupReply =
  | { kind: "hit"; answer: StoredAnswer; ageMs: number }
  /** Run it; others may join you. `flightId` is your own request id. */
  | { kind: "lead"; flightId: RequestId }
  /** Wait: news comes to `participant`. Committed: bytes flow already. */
  | { kind: "join"; flightId: RequestId; committed?: { node: NodeId; attempts: number } }
  /** Run it alone. */
  | { kind: "alone" };

export type FlightResult =
  | { kind: "stored"; answer: StoredAnswer }
  | { kind: "not_stored"; reason: string }
  /** `shared`: the failure is everyone's (the nodes'); otherwise it is the leader's own (its limit, its deadline),
   *  and the next participant leads. */
  | { kind: "failed"; code: ErrorCode; message?: string; retryAfterMs?: number; shared: boolean };

/** What a participant hears of its flight, each at most once, in this order. */
export type FlightNews =
  | { kind: "flight.committed"; requestId: RequestId; flightId: RequestId; node: NodeId; attempts: number }
  | { kind: "flight.ended"; requestId: RequestId; flightId: RequestId }
  | {
      kind: "flight.failed";
      requestId: RequestId;
      flightId: RequestId;
      code: ErrorCode;
      message?: string;
      retryAfterMs?: number;
    }
  /** The former leader dropped out for a reason of its own: this participant now leads `flightId`, its own. */
  | { kind: "flight.promoted"; requestId: RequestId; flightId: RequestId }
  /** To the leader: every client has left. */
  | { kind: "flight.abandoned"; requestId: RequestId; flightId: RequestId };

export type CacheDescription = {
  entries: number;
  bytes: number;
  bytesMax: number;
  flights: number;
  participants: number;
  hits: number;
  storeHits: number;
  misses: number;
  joins: number;
  stores: number;
  evictions: number;
  expired: number;
};
