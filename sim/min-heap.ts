/**
 * A binary heap: the first of its items by a given order. Not stable by itself: an order that must keep equal
 * items as they came compares a sequence number too.
 */
export class MinHeap<T> {
  readonly #items: T[] = [];
  readonly #isBefore: (left: T, right: T) => boolean;

  constructor(isBefore: (left: T, right: T) => boolean) {
    this.#isBefore = isBefore;
  }

  get size(): number {
    return this.#items.length;
  }

  peek(): T | undefined {
    return this.#items[0];
  }

  add(item: T): void {
    const items = this.#items;
    let index = items.length;
    items.push(item);
    while (index > 0) {
      const parent = (index - 1) >> 1;
      const above = items[parent] as T; // In range: parents come before their children.
      if (!this.#isBefore(item, above)) break;
      items[index] = above;
      index = parent;
    }
    items[index] = item;
  }

  /** Removes the first item; undefined when there is none. */
  take(): T | undefined {
    const items = this.#items;
    const first = items[0];
    const moved = items.pop();
    if (moved === undefined || items.length === 0) return first;
    let index = 0;
    for (;;) {
      let child = 2 * index + 1;
      let below = items[child];
      if (below === undefined) break;
      const right = items[child + 1];
      if (right !== undefined && this.#isBefore(right, below)) {
        child++;
        below = right;
      }
      if (!this.#isBefore(below, moved)) break;
      items[index] = below;
      index = child;
    }
    items[index] = moved;
    return first;
  }
}
