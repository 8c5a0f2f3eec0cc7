import type { ReplyTo } from "../runtime/actor.ts";
import type { ErrorCode } from "./errors.ts";
import type { NodeChanged } from "./gpu-node.ts";
import type { Decision, LeaseId, NodeId, Priority, RequestFacts, RequestId } from "./protocol.ts";

export type RouterMessage =
  /**
   * Places one attempt: answered once a lease is granted, or refused. May wait in the fair queue until
   * `deadlineAtMs`. Attempts > 1 withdraw from the pool's retry budget; `tried` nodes are never chosen.
   */
  | {
      kind: "router.choose";
      facts: RequestFacts;
      attempt: number;
      tried: readonly NodeId[];
      /** Path of the request actor that will hold the lease. */
      owner: string;
      replyTo: ReplyTo<ChooseReply>;
    }
  /** The client left while the request may still be queued; a lease granted meanwhile is released. */
  | { kind: "router.cancel"; requestId: RequestId }
  /** Tokens an ended request really used: settles the tenant's turn in the fair queue. */
  | { kind: "router.used"; model?: string; tenant: string; promptTokens: number; outputTokens: number }
  /** A node wants to open its circuit: granted unless too much of its pool is ejected already. */
  | { kind: "router.may_eject"; node: NodeId; replyTo: ReplyTo<{ granted: boolean }> }
  | { kind: "router.node_removed"; node: NodeId }
  | { kind: "router.describe"; replyTo: ReplyTo<RouterDescription> }
  | NodeChanged;

export type ChooseReply =
  | {
      kind: "placed";
      node: NodeId;
      leaseId: LeaseId;
      queuedMs: number;
      decision: Decision;
    }
  | { kind: "refused"; code: ErrorCode; retryAfterMs?: number; queuedMs: number; decision: Decision };

export type RouterDescription = {
  strategy: string;
  pools: readonly {
    model: string;
    nodes: readonly NodeId[];
    eligible: number;
    panic: boolean;
    queued: readonly { priority: Priority; tenant: string; waiting: number }[];
    retryBudget: { balance: number; deposited: number; withdrawn: number; refused: number };
  }[];
};
