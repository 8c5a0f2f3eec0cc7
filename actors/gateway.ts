/**
 * The supervision tree, as data, and the addresses of the actors in it. The same function builds it for
 * production and for the simulator: they differ in the edges, the clock, the seed and the network.
 *
 *   headrace
 *   ├── edges      front, upstream, scraper, store, embedder: whose inside is I/O, or a model
 *   ├── cache      CacheActors, sharded by key and by scope
 *   ├── limiter    RateLimiterActor
 *   ├── nodes      one GpuNodeActor per inference node
 *   ├── router     RouterActor
 *   └── requests   RequestActor
 *
 * Children start in this order and stop in reverse, so that whoever is told something at a start is there.
 */
import type { Actor, ActorRef, ChildSpec, SupervisorSpec } from "../runtime/actor.ts";
import { CacheActor, type CacheMessage, type CacheOptions } from "./cache.ts";
import { CachePlacement } from "./cache-placement.ts";
import type {
  EmbedderCommand,
  FrontCommand,
  ScraperCommand,
  StoreCommand,
  UpstreamCommand,
} from "./edges.ts";
import { GpuNodeActor, type GpuNodeMessage, type GpuNodeOptions } from "./gpu-node.ts";
import type { NodeId } from "./protocol.ts";
import {
  RateLimiterActor,
  type RateLimiterMessage,
  type RateLimiterOptions,
} from "./rate-limiter.ts";
import { RequestActor, type RequestMessage, type RequestOptions } from "./request.ts";
import { RouterActor, type RouterMessage, type RouterSettings } from "./router.ts";
import { LoggedRouter } from "./router-log.ts";

/** What the caller decides for one node; addresses of other actors are filled in here. */
export type NodeSettings = Omit<GpuNodeOptions, "upstream" | "scraper">;

export type GatewaySettings = {
  /** Cache actors, 1…4096. */
  cacheShards: number;
  /** `bytesMax` is that of all shards together. */
  cache: Omit<CacheOptions, "shard" | "shards">;
  limiter: RateLimiterOptions;
  router: RouterSettings;
  /** Every turn of the router is told as an event. */
  logsRouter: boolean;
  requests: RequestOptions;
  /** Nodes at the start; more come and go by `spawn` and `stop`. */
  nodes: readonly NodeSettings[];
};

/** How the edges are made: live, with I/O inside; in simulation, with models. */
export type EdgeFactories = {
  front: () => Actor<FrontCommand>;
  upstream: () => Actor<UpstreamCommand>;
  scraper: () => Actor<ScraperCommand>;
  /** Absent: the cache lives in memory only. */
  store?: () => Actor<StoreCommand>;
  /** Absent: nothing is matched by meaning. */
  embedder?: () => Actor<EmbedderCommand>;
};

/** Id of a process's tree, unless several processes are told apart by theirs. */
const ROOT = "headrace";

/** Makes a named ref: `system.ref`. */
type MakeRef = <M>(path: string) => ActorRef<M>;

/**
 * Addresses of the actors of one process, and of the node actors wherever they live: each inference node has one,
 * in one process of a cluster.
 */
export class GatewayRefs {
  /** Id of the process's tree: the first part of every path in it. */
  readonly root: string;
  readonly front: ActorRef<FrontCommand>;
  readonly upstream: ActorRef<UpstreamCommand>;
  readonly scraper: ActorRef<ScraperCommand>;
  readonly store: ActorRef<StoreCommand>;
  readonly embedder: ActorRef<EmbedderCommand>;
  readonly cache: CachePlacement;
  readonly limiter: ActorRef<RateLimiterMessage>;
  readonly router: ActorRef<RouterMessage>;
  readonly requests: ActorRef<RequestMessage>;
  readonly #makeRef: MakeRef;
  readonly #nodes = new Map<NodeId, ActorRef<GpuNodeMessage>>();

  /** @param sharesCache the cache is spread over the peers of a cluster, of which `root` is one */
  constructor(
    makeRef: MakeRef,
    cacheShards: number,
    root: string = ROOT,
    sharesCache: boolean = false,
  ) {
    this.#makeRef = makeRef;
    this.root = root;
    this.front = makeRef(`${root}/edges/front`);
    this.upstream = makeRef(`${root}/edges/upstream`);
    this.scraper = makeRef(`${root}/edges/scraper`);
    this.store = makeRef(`${root}/edges/store`);
    this.embedder = makeRef(`${root}/edges/embedder`);
    this.cache = new CachePlacement(root, cacheShards, sharesCache, makeRef);
    this.limiter = makeRef(`${root}/limiter`);
    this.router = makeRef(`${root}/router`);
    this.requests = makeRef(`${root}/requests`);
  }

  node(node: NodeId): ActorRef<GpuNodeMessage> {
    let ref = this.#nodes.get(node);
    if (ref === undefined) {
      ref = this.#makeRef<GpuNodeMessage>(`${this.root}/nodes/${node}`);
      this.#nodes.set(node, ref);
    }
    return ref;
  }

  /** From now on the node's actor is the one in the process with that root. */
  placeNode(node: NodeId, root: string): void {
    this.#nodes.set(node, this.#makeRef<GpuNodeMessage>(`${root}/nodes/${node}`));
  }

  /** Nodes that were ever addressed and not forgotten. */
  nodes(): readonly NodeId[] {
    return [...this.#nodes.keys()];
  }

  forgetNode(node: NodeId): void {
    this.#nodes.delete(node);
  }
}

/** Supervisor of the node actors: where a node that is added later is spawned. */
export const NODES_PATH = `${ROOT}/nodes`;

/** One actor's mail under load: every open request may have a few messages under way. */
const REQUESTS_MAILBOX_MAX = 65_536;

/** The whole tree of one process. Throws nothing: actors assert their options when they start. */
export function gatewayTree(
  settings: GatewaySettings,
  refs: GatewayRefs,
  edges: EdgeFactories,
): SupervisorSpec {
  const { store, embedder } = edges;
  const cache = cacheOptions(settings, embedder !== undefined);
  const cacheStore = store === undefined ? undefined : refs.store;
  // Above the 5 crashes that park a child: one actor that cannot live is parked, many end the process.
  return supervisor(refs.root, 10, 60_000, [
    supervisor("edges", 10, 60_000, [
      actor<FrontCommand>("front", edges.front),
      actor<UpstreamCommand>("upstream", edges.upstream),
      actor<ScraperCommand>("scraper", edges.scraper),
      ...(store === undefined ? [] : [actor<StoreCommand>("store", store)]),
      ...(embedder === undefined ? [] : [actor<EmbedderCommand>("embedder", embedder)]),
    ]),
    supervisor(
      "cache",
      10,
      60_000,
      refs.cache.own.map((_, shard) =>
        actor<CacheMessage>(String(shard), () => new CacheActor({ ...cache, shard }, cacheStore)),
      ),
    ),
    actor<RateLimiterMessage>("limiter", () => new RateLimiterActor(settings.limiter)),
    supervisor(
      "nodes",
      Math.max(10, 2 * settings.nodes.length),
      60_000,
      settings.nodes.map((node) => nodeSpec(node, refs)),
    ),
    actor<RouterMessage>("router", () => {
      const router = new RouterActor({
        ...settings.router,
        node: (node) => refs.node(node),
        nodes: () => refs.nodes(),
      });
      return settings.logsRouter ? new LoggedRouter(router) : router;
    }),
    actor<RequestMessage>(
      "requests",
      () => new RequestActor(settings.requests, requestRefs(refs, embedder !== undefined)),
    ),
  ]);
}

/** Each shard's part of the memory. Without an embedder there is nothing to match. */
function cacheOptions({ cache, cacheShards: shards }: GatewaySettings, isEmbedding: boolean) {
  const { semantic, ...exact } = cache;
  const share = (bytes: number): number => Math.floor(bytes / shards);
  return {
    ...exact,
    bytesMax: share(exact.bytesMax),
    shards,
    ...(semantic === undefined || !isEmbedding
      ? {}
      : { semantic: { ...semantic, bytesMax: share(semantic.bytesMax) } }),
  };
}

/** The child that stands for one inference node. One that is added later is to be told of the router. */
export function nodeSpec(node: NodeSettings, refs: GatewayRefs): ChildSpec<GpuNodeMessage> {
  refs.node(node.node); // From now on the node is known by name.
  return actor<GpuNodeMessage>(
    node.node,
    () =>
      new GpuNodeActor({
        ...node,
        upstream: refs.upstream,
        scraper: refs.scraper,
      }),
  );
}

function requestRefs(refs: GatewayRefs, isEmbedding: boolean) {
  return {
    ...(isEmbedding ? { embedder: refs.embedder } : {}),
    cache: refs.cache,
    limiter: refs.limiter,
    router: refs.router,
    node: (node: NodeId) => refs.node(node),
    nodes: () => refs.nodes(),
    upstream: refs.upstream,
    front: refs.front,
  };
}

function supervisor(
  id: string,
  intensity: number,
  periodMs: number,
  children: SupervisorSpec["children"],
): SupervisorSpec {
  return { id, strategy: "one_for_one", intensity, periodMs, children };
}

function actor<M>(id: string, start: () => Actor<M>): ChildSpec<M> {
  return {
    id,
    start,
    restart: "permanent",
    mailbox: { max: REQUESTS_MAILBOX_MAX, overflow: { kind: "reject" } },
  };
}
