/**
 * The router with every turn of it told: the message, and what it chose. A log of these turns is all that the router
 * knows, so that another one that is fed with it must choose the same (sim/decision-replay.ts).
 *
 * It owns nothing and changes nothing: messages go in and effects go out as without it.
 */
import type { Actor, Context, ReplyTo } from "../runtime/actor.ts";
import type { LeaseId, NodeId } from "./protocol.ts";
import type { ChooseReply, RouterMessage, RouterSettings } from "./router.ts";

/** What a turn of the router decided, in order. */
export type RouterChoice =
  | { kind: "asked"; leaseId: LeaseId; node: NodeId }
  /** To one who asked for a node, or to a node that asked to be ejected. */
  | ChooseReply
  | { kind: "ejection"; granted: boolean };

/** What is written of a router: first how it was made, then what happened to it. */
export type RouterLogLine = RouterLogHeader | RouterLogEvent;

export type RouterLogHeader = {
  kind: "router.log";
  v: 1;
  /** Of its process's randomness, and the first part of its path: its draws follow from both. */
  seed: string;
  root: string;
  settings: RouterSettings;
};

export type RouterLogEvent =
  /** Another incarnation: it knows nothing of what was before. */
  | { kind: "router.log_started" }
  | { kind: "router.turn"; atMs: number; message: RouterMessage; choices: readonly RouterChoice[] };

/** A router, or what stands for one, whose turns are told as `RouterLogEvent`s. Never throws by itself. */
export class LoggedRouter implements Actor<RouterMessage> {
  readonly #router: Actor<RouterMessage>;

  constructor(router: Actor<RouterMessage>) {
    this.#router = router;
  }

  start(context: Context<RouterMessage>): void {
    const event: RouterLogEvent = { kind: "router.log_started" };
    context.emit(event);
    this.#router.start?.(context);
  }

  receive(message: RouterMessage, context: Context<RouterMessage>): void {
    const choices: RouterChoice[] = [];
    this.#router.receive(message, noting(context, choices));
    const event: RouterLogEvent = { kind: "router.turn", atMs: context.nowMs, message, choices };
    context.emit(event);
  }
}

/** The context as it is, with what passes through it noted. */
function noting(context: Context<RouterMessage>, choices: RouterChoice[]): Context<RouterMessage> {
  return {
    self: context.self,
    nowMs: context.nowMs,
    random: () => context.random(),
    tell: (to, message) => context.tell(to, message),
    ask: (to, timeoutMs, message, adapt) => {
      const noted = (replyTo: Parameters<typeof message>[0]) => {
        const question = message(replyTo);
        if (isAcquire(question)) {
          choices.push({ kind: "asked", leaseId: question.leaseId, node: nodeOf(to.path) });
        }
        return question;
      };
      context.ask(to, timeoutMs, noted, adapt);
    },
    reply: <R>(to: ReplyTo<R>, value: R) => {
      if (isChoice(value)) choices.push(value);
      else if (isGrant(value)) choices.push({ kind: "ejection", granted: value.granted });
      context.reply(to, value);
    },
    startTimer: (key, afterMs, message) => context.startTimer(key, afterMs, message),
    cancelTimer: (key) => context.cancelTimer(key),
    watch: (target, adapt) => context.watch(target, adapt),
    unwatch: (target) => context.unwatch(target),
    spawn: (parentPath, spec) => context.spawn(parentPath, spec),
    stop: (target) => context.stop(target),
    emit: (event) => context.emit(event),
  };
}

function isAcquire(question: unknown): question is { leaseId: LeaseId } {
  return isKind(question, "gpu_node.acquire");
}

function isChoice(value: unknown): value is ChooseReply {
  return isKind(value, "placed") || isKind(value, "refused");
}

function isGrant(value: unknown): value is { granted: boolean } {
  return typeof value === "object" && value !== null && "granted" in value;
}

function isKind(value: unknown, kind: string): boolean {
  return typeof value === "object" && value !== null && "kind" in value && value.kind === kind;
}

/** Node actors are named by their nodes. */
function nodeOf(path: string): NodeId {
  return path.slice(path.lastIndexOf("/") + 1);
}
