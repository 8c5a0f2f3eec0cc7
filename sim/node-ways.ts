/**
 * The ways between one gateway process and the inference nodes, and what is in them: partitions. Its edges ask here
 * before they talk to a node, and are told when a way opens or closes.
 *
 * Nothing gets a connection while either direction is blocked, for a connection needs both. What runs already: while
 * the way *from* the node is blocked its tokens wait on the other side, and come once the way is free (TCP sends them
 * again); while the way *to* it is blocked a generation that is given up runs on, for the node does not hear of it.
 */
import type { NodeId } from "../actors/protocol.ts";

export class NodeWays {
  readonly #toBlocks = new Map<NodeId, number>();
  readonly #fromBlocks = new Map<NodeId, number>();
  /** Told of a node when one of its ways opened or closed. */
  onChange: (node: NodeId) => void = () => {};

  /** One more, or (`by` −1) one less, in that way. */
  block(node: NodeId, way: "to" | "from", by: 1 | -1): void {
    const blocks = way === "to" ? this.#toBlocks : this.#fromBlocks;
    blocks.set(node, (blocks.get(node) ?? 0) + by);
    this.onChange(node);
  }

  /** A connection can be made. */
  isOpen(node: NodeId): boolean {
    return this.isToOpen(node) && this.isFromOpen(node);
  }

  isToOpen(node: NodeId): boolean {
    return (this.#toBlocks.get(node) ?? 0) === 0;
  }

  isFromOpen(node: NodeId): boolean {
    return (this.#fromBlocks.get(node) ?? 0) === 0;
  }
}
