/**
 * Which of this process's inference nodes are looked after here: in a cluster each node has one actor, on the peer that
 * owns its bucket (ownership.ts), and everybody else asks that one.
 *
 *   a view of the members ──▶ owner of each node ──▶ here: its actor is spawned;  no longer here: it is stopped
 *                                                └──▶ everywhere: from now on the router asks the new owner
 *
 * Nothing is handed over. What the old actor knew of the node (its leases, speed, circuit, a drain) ends with it;
 * requests that run go on, and release their leases at an actor that does not know them, which ignores and counts
 * that. The new one begins as after a restart: its first scrape counts what runs in the engine. Leases that a lost
 * peer holds here are freed at once, since nobody is left to release them.
 *
 * While views differ, a node may have two actors, or none, for about the time of one message. Two grant more than one
 * would, and the engine's own queue takes that; none means that routers choose other nodes, or wait. Without any
 * owner (all have left) everything stays as it is.
 *
 * It restarts with what the addresses say of where each node is, and is told of the next view.
 */
import { type Actor, type ChildSpec, type Context, unreachable } from "../runtime/actor.ts";
import type { GatewayRefs, NodeSettings } from "./gateway.ts";
import type { GpuNodeMessage } from "./gpu-node.ts";
import type { ViewChanged } from "./members.ts";
import type { ClusterView, PeerId } from "./membership.ts";
import { bucketOf, Ownership } from "./ownership.ts";
import type { NodeId } from "./protocol.ts";

export type PlacementMessage =
  | ViewChanged
  /** Nodes were added to what this process is configured with. */
  | { kind: "placement.nodes_changed" }
  /** Its actor ends, also where a node of that name is configured anew already. */
  | { kind: "placement.node_removed"; node: NodeId };

/** A node has another owner, as this peer sees it; none: it is configured here no more. */
export type PlacementEvent = {
  kind: "placement.node_moved";
  node: NodeId;
  before?: PeerId;
  owner?: PeerId;
};

export type PlacementOptions = {
  self: PeerId;
  refs: GatewayRefs;
  /** What this process is configured with now. */
  nodes: () => readonly NodeSettings[];
  /** The child that stands for a node. */
  nodeSpec: (settings: NodeSettings) => ChildSpec<GpuNodeMessage>;
};

export class NodePlacementActor implements Actor<PlacementMessage> {
  readonly #options: PlacementOptions;
  readonly #ownership = new Ownership();

  constructor(options: PlacementOptions) {
    this.#options = options;
  }

  receive(message: PlacementMessage, context: Context<PlacementMessage>): void {
    switch (message.kind) {
      case "members.view_changed":
        this.#adopt(message.view, context);
        return this.#place(context);
      case "placement.nodes_changed":
        return this.#place(context);
      case "placement.node_removed":
        this.#remove(message.node, context);
        return this.#place(context);
      default:
        return unreachable(message);
    }
  }

  #adopt({ epoch, owners, lost }: ClusterView, context: Context<PlacementMessage>): void {
    const { self, refs } = this.#options;
    const before = this.#ownership.table.owners;
    this.#ownership.adopt(epoch, owners, context.nowMs);
    for (const id of lost) {
      if (!before.includes(id)) continue;
      const owner = refs.requestsOf(id).path;
      for (const node of refs.nodes())
        if (refs.placeOf(node) === self)
          context.tell(refs.node(node), { kind: "gpu_node.owner_restarted", owner });
    }
  }

  #place(context: Context<PlacementMessage>): void {
    const { refs, nodes } = this.#options;
    const configured = new Map(nodes().map((settings) => [settings.node, settings]));
    for (const node of refs.nodes()) if (!configured.has(node)) this.#remove(node, context);
    for (const [node, settings] of configured) {
      const owner = this.#ownership.owner(bucketOf(node));
      if (owner !== undefined) this.#move(settings, owner, context);
    }
  }

  #move(settings: NodeSettings, owner: PeerId, context: Context<PlacementMessage>): void {
    const { self, refs } = this.#options;
    const { node } = settings;
    const before = refs.placeOf(node);
    if (before === owner) return;
    if (before === self) context.stop(refs.node(node));
    refs.placeNode(node, owner);
    if (owner === self) context.spawn(refs.nodesPath, this.#options.nodeSpec(settings));
    context.tell(refs.router, { kind: "router.node_moved", node });
    const known = before === undefined ? {} : { before };
    this.#emit({ kind: "placement.node_moved", node, ...known, owner }, context);
  }

  #remove(node: NodeId, context: Context<PlacementMessage>): void {
    const { self, refs } = this.#options;
    const before = refs.placeOf(node);
    if (before === undefined) return;
    if (before === self) context.stop(refs.node(node));
    context.tell(refs.router, { kind: "router.node_removed", node });
    refs.forgetNode(node);
    this.#emit({ kind: "placement.node_moved", node, before }, context);
  }

  #emit(event: PlacementEvent, context: Context<PlacementMessage>): void {
    context.emit(event);
  }
}
