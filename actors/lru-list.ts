/**
 * Order of last use, as a doubly linked list whose links live in its nodes: O(1), nothing allocated. Pure.
 *
 * A node belongs to one list at a time, and the list does not check: its owner keeps the nodes in a map
 * beside it. (Deleting from and setting again in a `Map` gives the same order, but rehashes the map on and on.)
 */
export interface LruNode<N> {
  hotter: N | null;
  colder: N | null;
}

export class LruList<N extends LruNode<N>> {
  #hottest: N | null = null;
  #coldest: N | null = null;

  get hottest(): N | null {
    return this.#hottest;
  }

  get coldest(): N | null {
    return this.#coldest;
  }

  /** `node` is in no list. */
  addHottest(node: N): void {
    node.hotter = null;
    node.colder = this.#hottest;
    if (this.#hottest === null) this.#coldest = node;
    else this.#hottest.hotter = node;
    this.#hottest = node;
  }

  /** `node` is in this list. */
  remove(node: N): void {
    const { hotter, colder } = node;
    if (hotter === null) this.#hottest = colder;
    else hotter.colder = colder;
    if (colder === null) this.#coldest = hotter;
    else colder.hotter = hotter;
    node.hotter = null;
    node.colder = null;
  }

  /** `node` is in this list. */
  touch(node: N): void {
    if (this.#hottest === node) return;
    this.remove(node);
    this.addHottest(node);
  }

  clear(): void {
    this.#hottest = null;
    this.#coldest = null;
  }
}
