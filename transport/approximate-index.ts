/**
 * An approximate index for shards that have outgrown the exact one: HNSW, by the optional package usearch.
 *
 * The exact index stays underneath: it holds the vectors, answers while the graph is being built, and compares what
 * the graph proposes, so similarities are exact and only completeness is lost. The graph is built in the background
 * when the shard passes `from` entries, built anew when half of it has been removed since (a graph of gaps loses
 * hits), and given up when the shard has shrunk to three quarters of that, or when usearch fails.
 *
 *   exact ──more than `from`──▶ building ──every vector in──▶ approximate ──half removed──▶ building
 *     ▲                            │                               │
 *     └──────── 3/4 of `from`, or usearch failed (for good) ───────┘
 *
 * What is lost: with bf16, connectivity 16 and expansion 200, about 1 % of hits at 0.92 on real question text
 * (`npm run bench -- --only vectors` measures it), up to 10 % on vectors made to be hard; each insertion blocks 1 to 4
 * ms. The exact scan of 200,000 takes 1 to 2 ms, so nothing smaller is worth that.
 *
 * Pitfalls of usearch that are kept away here: it ignores the byteOffset of a typed array, so it gets copies; keys
 * are BigInt; it takes every core unless told 1 thread; loaded as an ES module it finds its binary by the caller's
 * stack, and not everywhere, so it is loaded through `require`. 2.25.3 is the last version for Node 20.
 */
import { createRequire } from "node:module";
import { ExactIndex, type Found, type VectorIndex } from "../actors/vector-index.ts";
import { assert } from "../runtime/actor.ts";

/** From more than this many entries on, what an approximate search loses is worth what it saves. */
export const APPROXIMATE_FROM = 200_000;
const CONNECTIVITY = 16;
const EXPANSION_ADD = 128;
const EXPANSION_SEARCH = 200;
/** Per slice of building: one takes 1 to 4 ms. */
const ADDED_PER_SLICE = 2;
const THREADS = 1;
/** Per vector in the graph, beside two bytes a dimension: links, keys, levels. From the process's RSS. */
const GRAPH_BYTES = 450;

/** What we use of usearch. */
type Graph = {
  add(key: bigint, vector: Float32Array, threads: number): void;
  search(query: Float32Array, count: number, threads: number): { keys: BigUint64Array };
  remove(key: bigint): unknown;
  contains(key: bigint): unknown;
};
export type Usearch = {
  Index: new (options: {
    dimensions: number;
    metric: "cos";
    quantization: "bf16";
    connectivity: number;
    expansion_add: number;
    expansion_search: number;
    multi: boolean;
  }) => Graph;
};

/** usearch, or undefined where it is not installed or has no binary for this machine: then exact stays. */
export function loadUsearch(): Usearch | undefined {
  const require = createRequire(import.meta.url);
  try {
    const loaded: unknown = require("usearch");
    return isUsearch(loaded) ? loaded : undefined;
  } catch {
    return undefined; // An optional package: its absence is an ordinary state.
  }
}

function isUsearch(loaded: unknown): loaded is Usearch {
  return (
    typeof loaded === "object" &&
    loaded !== null &&
    "Index" in loaded &&
    typeof loaded.Index === "function"
  );
}

type State =
  | { kind: "exact" }
  /** `left`: ids that were there when building began, taken from the end. */
  | { kind: "building"; graph: Graph; left: Float64Array; next: number }
  | { kind: "approximate"; graph: Graph; removed: number }
  | { kind: "failed"; reason: string };

/** See the head of this file. */
export class ApproximateIndex implements VectorIndex {
  readonly #exact: ExactIndex;
  readonly #dimension: number;
  readonly #usearch: Usearch;
  readonly #from: number;
  #state: State = { kind: "exact" };

  /** As `ExactIndex`; ids are 0 or greater. `from`: entries beyond which the graph is used. */
  constructor(options: {
    usearch: Usearch;
    dimension: number;
    random: () => number;
    entriesMax?: number;
    from?: number;
  }) {
    const { usearch, from = APPROXIMATE_FROM, ...ofExact } = options;
    assert(from > 0, "an empty shard needs no graph");
    this.#exact = new ExactIndex(ofExact);
    this.#dimension = options.dimension;
    this.#usearch = usearch;
    this.#from = from;
  }

  get size(): number {
    return this.#exact.size;
  }

  get bytes(): number {
    const hasGraph = this.#state.kind === "building" || this.#state.kind === "approximate";
    const perVector = this.#dimension * 2 + GRAPH_BYTES;
    return this.#exact.bytes + (hasGraph ? this.size * perVector : 0);
  }

  /** How searches are answered now; `failed` with the reason, and exact from then on. */
  get state(): { kind: State["kind"]; reason?: string } {
    const { kind } = this.#state;
    return this.#state.kind === "failed" ? { kind, reason: this.#state.reason } : { kind };
  }

  insert(id: number, vector: Float32Array): string | undefined {
    assert(id >= 0, "keys of the graph have no sign");
    const refusal = this.#exact.insert(id, vector);
    if (refusal !== undefined) return refusal;
    if (this.#state.kind === "building" || this.#state.kind === "approximate") {
      const { graph } = this.#state;
      this.#guard(() => this.#add(graph, id));
    }
    return undefined;
  }

  remove(id: number): boolean {
    if (!this.#exact.remove(id)) return false;
    const state = this.#state;
    if (state.kind === "building" || state.kind === "approximate") {
      this.#guard(() => void state.graph.remove(BigInt(id)));
      if (state.kind === "approximate") state.removed++;
    }
    return true;
  }

  search(query: Float32Array, threshold: number, count: number): Found[] {
    if (this.#state.kind !== "approximate") return this.#exact.search(query, threshold, count);
    const { graph } = this.#state;
    const isRefused = query.length !== this.#dimension || !query.every(Number.isFinite);
    if (isRefused || count < 1) return [];
    let keys = new BigUint64Array(0);
    this.#guard(() => {
      keys = BigUint64Array.from(graph.search(query.slice(), count, THREADS).keys);
    });
    if (this.state.kind === "failed") return this.#exact.search(query, threshold, count);
    const found: Found[] = [];
    for (const key of keys) {
      const id = Number(key);
      const similarity = this.#exact.similarityOf(id, query);
      if (similarity !== undefined && similarity >= threshold) found.push({ id, similarity });
    }
    return found.sort((a, b) => b.similarity - a.similarity || a.id - b.id);
  }

  vectorOf(id: number): Float32Array | undefined {
    return this.#exact.vectorOf(id);
  }

  maintain(): boolean {
    if (this.#exact.maintain()) return true;
    const state = this.#state;
    if (state.kind === "failed") return false;
    if (state.kind === "exact") {
      if (this.size <= this.#from) return false;
      this.#becomeBuilding();
      return true;
    }
    if (this.size <= this.#from * 0.75) {
      this.#state = { kind: "exact" };
      return false;
    }
    if (state.kind === "approximate") {
      if (state.removed < this.size / 2) return false;
      this.#becomeBuilding();
      return true;
    }
    this.#guard(() => {
      for (let added = 0; added < ADDED_PER_SLICE && state.next > 0; ) {
        const id = state.left[--state.next];
        if (id !== undefined && this.#add(state.graph, id)) added++;
      }
    });
    if (state.next === 0 && this.#state === state) {
      this.#state = { kind: "approximate", graph: state.graph, removed: 0 };
    }
    return true;
  }

  #becomeBuilding(): void {
    this.#guard(() => {
      const graph = new this.#usearch.Index({
        dimensions: this.#dimension,
        metric: "cos",
        quantization: "bf16",
        connectivity: CONNECTIVITY,
        expansion_add: EXPANSION_ADD,
        expansion_search: EXPANSION_SEARCH,
        multi: false,
      });
      const left = this.#exact.ids();
      this.#state = { kind: "building", graph, left, next: left.length };
    });
  }

  /** False when it is there already, or was removed meanwhile. */
  #add(graph: Graph, id: number): boolean {
    const vector = this.#exact.vectorOf(id);
    if (vector === undefined || graph.contains(BigInt(id)) === true) return false;
    graph.add(BigInt(id), vector, THREADS);
    return true;
  }

  /** Native code may run out of memory, or refuse: then the exact index answers, for good. */
  #guard(use: () => void): void {
    try {
      use();
    } catch (error) {
      this.#state = { kind: "failed", reason: error instanceof Error ? error.message : "unknown" };
    }
  }
}
