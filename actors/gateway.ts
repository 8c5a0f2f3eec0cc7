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
 *   ├── requests   RequestActor
 *   └── in a cluster: limits, placement, members; and edges mesh, table, limit-store
 *
 * Children start in this order and stop in reverse, so that whoever is told something at a start is there.
 */
import type { Actor, ActorRef, ChildSpec, SupervisorSpec } from "../runtime/actor.ts";
import { CacheActor, type CacheMessage, type CacheOptions } from "./cache.ts";
import { CachePlacement } from "./cache-placement.ts";
import {
  ClusterLimiterActor,
  type ClusterLimiterMessage,
  type ClusterLimiterOptions,
} from "./cluster-limiter.ts";
import type {
  EmbedderCommand,
  FrontCommand,
  LimitStoreCommand,
  ScraperCommand,
  StoreCommand,
  UpstreamCommand,
} from "./edges.ts";
import { GpuNodeActor, type GpuNodeMessage, type GpuNodeOptions } from "./gpu-node.ts";
import {
  MembersActor,
  type MembersMessage,
  type MeshCommand,
  type TableCommand,
} from "./members.ts";
import type { Member, MembershipOptions, PeerId } from "./membership.ts";
import { NodePlacementActor, type PlacementMessage } from "./node-placement.ts";
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
  /** Nodes at the start; more come and go by `spawn` and `stop`. In a cluster none: `cluster.nodes` are placed. */
  nodes: readonly NodeSettings[];
  /** Absent: this process is alone. */
  cluster?: ClusterSettings;
};

/** What makes a process a peer of others. */
export type ClusterSettings = {
  self: Member;
  membership: MembershipOptions;
  limits: ClusterLimiterOptions;
  /** The nodes that this process is configured with now, wherever their actors are. */
  nodes: () => readonly NodeSettings[];
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
  /** In a cluster: links to other peers. */
  mesh?: () => Actor<MeshCommand>;
  /** In a cluster with Redis: leases of members, and allowances of keys. */
  table?: () => Actor<TableCommand>;
  limitStore?: () => Actor<LimitStoreCommand>;
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
  readonly mesh: ActorRef<MeshCommand>;
  readonly table: ActorRef<TableCommand>;
  readonly limitStore: ActorRef<LimitStoreCommand>;
  readonly limits: ActorRef<ClusterLimiterMessage>;
  readonly members: ActorRef<MembersMessage>;
  readonly placement: ActorRef<PlacementMessage>;
  readonly #makeRef: MakeRef;
  readonly #isPlaced: boolean;
  readonly #nodes = new Map<NodeId, ActorRef<GpuNodeMessage>>();

  /** @param isPeer it shares the cache with other peers, and nodes are where `placeNode` says; else all is here */
  constructor(makeRef: MakeRef, cacheShards: number, root: string = ROOT, isPeer = false) {
    this.#makeRef = makeRef;
    this.#isPlaced = isPeer;
    this.root = root;
    this.mesh = makeRef(`${root}/edges/mesh`);
    this.table = makeRef(`${root}/edges/table`);
    this.limitStore = makeRef(`${root}/edges/limit-store`);
    this.limits = makeRef(`${root}/limits`);
    this.members = makeRef(`${root}/members`);
    this.placement = makeRef(`${root}/placement`);
    this.front = makeRef(`${root}/edges/front`);
    this.upstream = makeRef(`${root}/edges/upstream`);
    this.scraper = makeRef(`${root}/edges/scraper`);
    this.store = makeRef(`${root}/edges/store`);
    this.embedder = makeRef(`${root}/edges/embedder`);
    this.cache = new CachePlacement(root, cacheShards, isPeer, makeRef);
    this.limiter = makeRef(`${root}/limiter`);
    this.router = makeRef(`${root}/router`);
    this.requests = makeRef(`${root}/requests`);
  }

  node(node: NodeId): ActorRef<GpuNodeMessage> {
    let ref = this.#nodes.get(node);
    if (ref === undefined) {
      ref = this.#makeRef<GpuNodeMessage>(`${this.nodesPath}/${node}`);
      if (!this.#isPlaced) this.#nodes.set(node, ref);
    }
    return ref;
  }

  /** The process where the node's actor is; undefined: nowhere yet. */
  placeOf(node: NodeId): PeerId | undefined {
    const path = this.#nodes.get(node)?.path;
    return path?.slice(0, path.indexOf("/"));
  }

  /** Supervisor of the node actors of this process: where a node that is added later is spawned. */
  get nodesPath(): string {
    return `${this.root}/nodes`;
  }

  /** Of other peers, or of this one. */
  limitsOf(peer: PeerId): ActorRef<ClusterLimiterMessage> {
    return this.#makeRef(`${peer}/limits`);
  }

  membersOf(peer: PeerId): ActorRef<MembersMessage> {
    return this.#makeRef(`${peer}/members`);
  }

  requestsOf(peer: PeerId): ActorRef<RequestMessage> {
    return this.#makeRef(`${peer}/requests`);
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

/** One actor's mail under load: every open request may have a few messages under way. */
const REQUESTS_MAILBOX_MAX = 65_536;

/** The whole tree of one process. Throws nothing: actors assert their options when they start. */
export function gatewayTree(
  settings: GatewaySettings,
  refs: GatewayRefs,
  edges: EdgeFactories,
): SupervisorSpec {
  const { store, embedder, mesh, table, limitStore } = edges;
  const { cluster } = settings;
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
      ...(mesh === undefined ? [] : [actor<MeshCommand>("mesh", mesh)]),
      ...(table === undefined ? [] : [actor<TableCommand>("table", table)]),
      ...(limitStore === undefined ? [] : [actor<LimitStoreCommand>("limit-store", limitStore)]),
    ]),
    supervisor(
      "cache",
      10,
      60_000,
      refs.cache.own.map((_, shard) =>
        actor<CacheMessage>(
          String(shard),
          () => new CacheActor({ ...cache, shard }, cacheStore, refs.cache.own),
        ),
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
      () =>
        new RequestActor(
          settings.requests,
          requestRefs(refs, embedder !== undefined, cluster !== undefined),
        ),
    ),
    ...(cluster === undefined ? [] : clusterActors(cluster, refs, edges)),
  ]);
}

/** Last the one that tells the others of the members. */
function clusterActors(
  { self, membership, limits, nodes }: ClusterSettings,
  refs: GatewayRefs,
  { table, limitStore }: EdgeFactories,
): SupervisorSpec["children"] {
  return [
    actor<ClusterLimiterMessage>(
      "limits",
      () =>
        new ClusterLimiterActor(limits, {
          limiter: refs.limiter,
          peer: (id) => refs.limitsOf(id),
          ...(limitStore === undefined ? {} : { store: refs.limitStore }),
        }),
    ),
    actor<PlacementMessage>(
      "placement",
      () =>
        new NodePlacementActor({
          self: self.id,
          refs,
          nodes,
          nodeSpec: (node) => nodeSpec(node, refs),
        }),
    ),
    actor<MembersMessage>(
      "members",
      () =>
        new MembersActor(self, membership, {
          peer: (id) => refs.membersOf(id),
          mesh: refs.mesh,
          ...(table === undefined ? {} : { table: refs.table }),
          viewers: [refs.limits, refs.placement, refs.requests],
        }),
    ),
  ];
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
  refs.node(node.node); // From now on the node is known by name, unless it is placed.
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

function requestRefs(refs: GatewayRefs, isEmbedding: boolean, isPeer: boolean) {
  return {
    ...(isEmbedding ? { embedder: refs.embedder } : {}),
    cache: refs.cache,
    limiter: isPeer ? refs.limits : refs.limiter,
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
