/**
 * Membership as an actor: it gives the state machine of membership.ts its clock, and carries out what that asks for.
 *
 * Heartbeats and views are ordinary messages to the same actor of the other peers, so they take the way that all
 * messages take, and measure it. It sends only over links that are up: the mesh tells which. Whoever places work by
 * the peers is told of every new view. A restart loses what it knew: it joins anew, with a higher incarnation than
 * before once it hears of its old self.
 */
import {
  type Actor,
  type ActorRef,
  assert,
  type Context,
  type ReplyTo,
  unreachable,
} from "../runtime/actor.ts";
import {
  type ClusterView,
  type Heartbeat,
  type Member,
  type MemberFact,
  Membership,
  type MembershipEffect,
  type MembershipOptions,
  type OwnLoad,
  type PeerId,
  type TableSnapshot,
  type View,
} from "./membership.ts";

/** Between peers: `heartbeat` and `view`; all others come from this process. */
export type MembersMessage =
  | { kind: "members.heartbeat"; from: PeerId; incarnation: number; heartbeat: Heartbeat }
  | { kind: "members.view"; view: View }
  /** The mesh: there is a link to that peer, or none any more; of two of its lives, the earlier is told down first. */
  | { kind: "members.link_up"; id: PeerId }
  | { kind: "members.link_down"; id: PeerId }
  /** What the seeds' list or name stands for now. */
  | { kind: "members.discovered"; addresses: readonly string[] }
  /** The table, as a renewal read it that was sent so long ago. */
  | { kind: "members.table_read"; snapshot: TableSnapshot; askedAgoMs: number }
  /** What this process tells the others of its load. */
  | { kind: "members.load"; load: OwnLoad }
  /** It is about to end. */
  | { kind: "members.leave" }
  | { kind: "members.describe"; replyTo: ReplyTo<MembersDescription> };

/** To whoever places work by the peers. */
export type ViewChanged = { kind: "members.view_changed"; view: ClusterView };

/** The cluster as this peer sees it. */
export type MembersDescription = { epoch: number; members: readonly MemberFact[] };

/** To the mesh of links: addresses to be linked with; others need not be dialled any more. */
export type MeshCommand = { kind: "mesh.contacts"; addresses: readonly string[] };

/** To the table of leases. */
export type TableCommand =
  /** What is renewed from now on; `epoch`: at least so far the table must have counted. */
  | { kind: "table.keep"; member: Member; epoch: number }
  | { kind: "table.evict"; id: PeerId; incarnation: number }
  | { kind: "table.leave"; id: PeerId; incarnation: number };

/** Addresses. */
export type MembersRefs = {
  peer: (id: PeerId) => ActorRef<MembersMessage>;
  mesh: ActorRef<MeshCommand>;
  /** Absent: without a table of leases. */
  table?: ActorRef<TableCommand>;
  viewers: readonly ActorRef<ViewChanged>[];
};

type Tick = { kind: "members.tick" };
type OwnMessage = MembersMessage | Tick;

/** Links up at once; a further peer is not sent to. */
const LINKS_MAX = 256;

export class MembersActor implements Actor<OwnMessage> {
  readonly #self: Member;
  readonly #options: MembershipOptions;
  readonly #refs: MembersRefs;
  #membership: Membership | null = null;
  readonly #linked = new Set<PeerId>();
  #load: OwnLoad = { loopLagMs: 0, queueDepth: 0 };
  /** What the table was last told to keep. */
  #kept = "";

  constructor(self: Member, options: MembershipOptions, refs: MembersRefs) {
    this.#self = self;
    this.#options = options;
    this.#refs = refs;
  }

  start(context: Context<OwnMessage>): void {
    this.#membership = new Membership(this.#self, this.#options, context.nowMs);
    // Spread, so that peers started together do not all send in the same moment.
    context.startTimer("tick", context.random() * this.#options.heartbeatMs, {
      kind: "members.tick",
    });
    this.#carryOut(context);
  }

  receive(message: OwnMessage, context: Context<OwnMessage>): void {
    const { nowMs } = context;
    const membership = this.#membership;
    assert(membership !== null, "it has started");
    switch (message.kind) {
      case "members.tick":
        context.startTimer("tick", this.#options.heartbeatMs, message);
        membership.tick(this.#load, nowMs);
        break;
      case "members.heartbeat":
        membership.heartbeat(message.from, message.incarnation, message.heartbeat, nowMs);
        break;
      case "members.view":
        membership.merge(message.view, nowMs);
        break;
      case "members.link_up":
        if (this.#linked.size < LINKS_MAX) this.#linked.add(message.id);
        membership.linkUp(message.id, nowMs);
        break;
      case "members.link_down":
        this.#linked.delete(message.id);
        membership.linkDown(message.id, nowMs);
        break;
      case "members.discovered":
        membership.discovered(message.addresses);
        break;
      case "members.table_read":
        membership.table(message.snapshot, nowMs - message.askedAgoMs, nowMs);
        break;
      case "members.load":
        this.#load = message.load;
        return;
      case "members.leave":
        this.#leave(membership, context);
        break;
      case "members.describe":
        return context.reply(message.replyTo, {
          epoch: membership.epoch,
          members: membership.facts(nowMs),
        });
      default:
        return unreachable(message);
    }
    this.#carryOut(context);
  }

  #leave(membership: Membership, context: Context<OwnMessage>): void {
    membership.leave();
    const { id, incarnation } = membership.self;
    const { table } = this.#refs;
    if (table !== undefined) context.tell(table, { kind: "table.leave", id, incarnation });
  }

  #carryOut(context: Context<OwnMessage>): void {
    const membership = this.#membership;
    assert(membership !== null, "it has started");
    for (const effect of membership.take()) this.#carryOutOne(effect, membership, context);
    const { table } = this.#refs;
    if (table === undefined || membership.state === "left") return;
    if (membership.state === "superseded") return;
    const { epoch, self } = membership;
    const kept = `${epoch} ${self.incarnation}`;
    if (kept === this.#kept) return;
    this.#kept = kept;
    context.tell(table, { kind: "table.keep", member: self, epoch });
  }

  #carryOutOne(
    effect: MembershipEffect,
    membership: Membership,
    context: Context<OwnMessage>,
  ): void {
    const { mesh, peer, table, viewers } = this.#refs;
    switch (effect.kind) {
      case "heartbeat": {
        const { id: from, incarnation } = membership.self;
        const { heartbeat } = effect;
        for (const id of this.#linked)
          context.tell(peer(id), { kind: "members.heartbeat", from, incarnation, heartbeat });
        return;
      }
      case "send_view":
        if (this.#linked.has(effect.to))
          context.tell(peer(effect.to), { kind: "members.view", view: effect.view });
        return;
      case "contacts":
        return context.tell(mesh, { kind: "mesh.contacts", addresses: effect.addresses });
      case "view_changed":
        for (const viewer of viewers)
          context.tell(viewer, { kind: "members.view_changed", view: effect.view });
        return;
      case "evict": {
        const { id, incarnation } = effect;
        if (table !== undefined) context.tell(table, { kind: "table.evict", id, incarnation });
        return;
      }
      case "event":
        return context.emit(effect.event);
      default:
        return unreachable(effect);
    }
  }
}
