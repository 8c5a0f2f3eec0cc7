/**
 * This process as a peer of others: links, discovery, the table of members and the allowances in Redis, and the actors'
 * way to them. Built only where `cluster` is configured: a process alone has none of it.
 *
 *   const cluster = await Cluster.open(options, log, hooks);     // the peers' port is open, nobody is told of anything yet
 *   createSystem({ …, remote: cluster.remote, nextId: cluster.nextId });  // root of the tree: cluster.self.id
 *   gatewayTree({ …, cluster: cluster.settings(nodes) }, refs, { …, ...cluster.edges(reply) });
 *   cluster.start(system, refs);
 *   …
 *   await cluster.leave();    // what it owns goes to others; it goes on asking them
 *   await cluster.close();    // after the last actor
 *
 * Who is a member and who owns what is decided in actors/membership.ts and ownership.ts; here is what they need of the
 * world: addresses to dial, what the mesh reports as messages, load, and what the operator should know as events.
 *
 * Ends the process (`onFatal`) when another one has this peer's id: where a later one superseded it, or where it has
 * just come itself and meets the other. With an id of its own it may start again.
 */
import { createHash, randomBytes } from "node:crypto";
import { readFile } from "node:fs/promises";
import { hostname, networkInterfaces } from "node:os";
import { type IntervalHistogram, monitorEventLoopDelay } from "node:perf_hooks";
import {
  type ClusterLimiterDescription,
  type ClusterLimiterMessage,
  clusterLimiterDefaults,
} from "../actors/cluster-limiter.ts";
import type {
  ClusterSettings,
  EdgeFactories,
  GatewayRefs,
  NodeSettings,
} from "../actors/gateway.ts";
import type { MembersDescription, MembersMessage, MeshCommand } from "../actors/members.ts";
import {
  type Member,
  type MemberFact,
  type MembershipEvent,
  membershipDefaults,
  type PeerId,
} from "../actors/membership.ts";
import { BUCKETS, OwnerTable } from "../actors/ownership.ts";
import type { NodeId } from "../actors/protocol.ts";
import type { Actor, ActorRef, ReplyTo } from "../runtime/actor.ts";
import type { ActorSystem, Remote } from "../runtime/system.ts";
import type { DataPlane } from "./data-plane.ts";
import { FlightRelays } from "./flight-relay.ts";
import type { Log } from "./log.ts";
import type { MemberTable, MemberTableStats } from "./member-table.ts";
import type { ClusterOptions, Options } from "./options.ts";
import { discoveryDefaults, PeerDiscovery } from "./peer-discovery.ts";
import type { PeerKey } from "./peer-handshake.ts";
import type { LinksMetrics, PeerEvent } from "./peer-links.ts";
import { PeerMesh } from "./peer-mesh.ts";
import type { PeerTls } from "./peer-socket.ts";
import type { RedisLimits, RedisLimitsStats } from "./redis-limits.ts";
import { CACHE_SHARDS } from "./settings.ts";

/** What the rest of the process hears. */
export type ClusterHooks = {
  /** Of the links; the actors' own events take their usual way. */
  onEvent: (event: PeerEvent) => void;
  /** The process must end: another has its id. */
  onFatal: (error: Error) => void;
};

/** The cluster as this peer sees it, for people and metrics. */
export type ClusterDescription = {
  self: PeerId;
  epoch: number;
  members: readonly MemberFact[];
  /** Of 4096. */
  buckets: readonly { peer: PeerId; count: number }[];
  /** The inference nodes; `peer` is absent while none has them. */
  nodes: readonly { node: NodeId; peer?: PeerId }[];
  links: LinksMetrics;
  /** Flights of other peers that are read here, and readers of other peers here. */
  relays: { reading: number; serving: number };
  limits?: ClusterLimiterDescription;
  table?: MemberTableStats;
  limitStore?: RedisLimitsStats;
};

/** On loopback without keys: whoever reaches the port knows it. */
const NO_KEY: PeerKey = {
  id: "none",
  secret: createHash("sha256").update("headrace: a cluster without keys").digest(),
};
/** Peers that count otherwise must not meet. */
const SETTINGS = `buckets ${BUCKETS} shards ${CACHE_SHARDS}`;
const LOAD_MS = 1000;
const LOOP_RESOLUTION_MS = 20;
const DESCRIBE_MS = 1000;
/**
 * How long another peer's word on a limit is waited for. A peer that is gone answers at once, by its link; one that is
 * only slow must not be taken for gone, for it goes on admitting while others admit their shares.
 */
const OWNER_MS = 1000;
/** Likewise of Redis, which answers in less than 1 ms when it is well; the edge gives up before the limiter does. */
const STORE_MS = 500;
const LIMIT_STORE_MS = 400;
/** Of a millisecond since 1970: numbers of asks and incarnations begin there, and never come again in a later life. */
const IDS_PER_MS = 1024;
/** Refusals by address of which the last was logged. */
const REFUSED_MAX = 256;

export class Cluster {
  readonly self: Member;
  /** Numbers for `createSystem`. */
  readonly nextId: () => number;
  readonly #options: ClusterOptions;
  readonly #log: Log;
  readonly #hooks: ClusterHooks;
  readonly #mesh: PeerMesh;
  readonly #table: MemberTable | undefined;
  readonly #limitStore: RedisLimits | undefined;
  readonly #keys: readonly PeerKey[];
  readonly #tls: PeerTls | undefined;
  readonly #discovery: PeerDiscovery;
  /** Where peers are to be found: by the configured seeds, and as told from outside. */
  readonly #found = { seeds: [] as readonly string[], told: [] as readonly string[] };
  readonly #dialled = new Set<string>();
  readonly #lastRefusals = new Map<string, string>();
  readonly #loopDelay: IntervalHistogram;
  #relays: FlightRelays | undefined;
  #system: ActorSystem | undefined;
  #refs: GatewayRefs | undefined;
  #loadTimer: NodeJS.Timeout | undefined;
  #epoch = 0;
  #queueDepth = 0;
  #hasJoined = false;
  #left: Promise<void> | undefined;

  /**
   * Opens the port for peers; rejects, leaving nothing behind, when it cannot be had or a file of TLS cannot be read.
   */
  static async open(options: Options, log: Log, hooks: ClusterHooks): Promise<Cluster> {
    const { cluster, cache } = options;
    if (cluster === undefined) throw new Error("no cluster is configured");
    const node = cluster.id ?? ownId(options.listen.port);
    const incarnation = Date.now();
    const version = await programVersion();
    const tls = cluster.tls === undefined ? undefined : await readTls(cluster.tls);
    // The events come when somebody is connected: `made` is there by then.
    let made: Cluster | undefined;
    const keys = cluster.keys.length === 0 ? [NO_KEY] : cluster.keys.map(keyOf);
    const mesh = new PeerMesh(
      {
        cluster: cluster.name,
        self: { node, incarnation },
        settings: SETTINGS,
        keys,
        ...(tls === undefined ? {} : { tls }),
        onRequest: (request, response) =>
          made !== undefined && made.#relays?.serve(request, response) === true,
        queueDepth: () => (made === undefined ? 0 : made.#queueDepth),
        epoch: () => (made === undefined ? 0 : made.#epoch),
      },
      (event) => {
        if (made !== undefined) made.#onPeerEvent(event);
      },
    );
    const { host, port } = cluster.listen;
    let table: MemberTable | undefined;
    let limitStore: RedisLimits | undefined;
    try {
      if (cache.redis !== undefined) {
        const { openMemberTable, memberTableDefaults } = await import("./member-table.ts");
        const { openRedisLimits } = await import("./redis-limits.ts");
        table = await openMemberTable(
          { redis: cache.redis, ...memberTableDefaults },
          (snapshot, askedAgoMs) => {
            const message = { kind: "members.table_read", snapshot, askedAgoMs } as const;
            if (made !== undefined) made.#tellMembers(message);
          },
          log,
        );
        limitStore = await openRedisLimits({ redis: cache.redis, timeoutMs: LIMIT_STORE_MS });
      }
      // Last: whoever connects must find somebody at home.
      const address = addressOf(cluster, await mesh.listen(host, port));
      const self: Member = { id: node, incarnation, address, version };
      made = new Cluster(self, cluster, log, hooks, { mesh, table, limitStore, keys, tls });
      return made;
    } catch (error) {
      await Promise.all([mesh.close(false), table?.close()]);
      limitStore?.close();
      throw withPlace(error, host, port);
    }
  }

  private constructor(
    self: Member,
    options: ClusterOptions,
    log: Log,
    hooks: ClusterHooks,
    parts: {
      mesh: PeerMesh;
      table: MemberTable | undefined;
      limitStore: RedisLimits | undefined;
      keys: readonly PeerKey[];
      tls: PeerTls | undefined;
    },
  ) {
    this.self = self;
    this.#options = options;
    this.#log = log;
    this.#hooks = hooks;
    this.#mesh = parts.mesh;
    this.#table = parts.table;
    this.#limitStore = parts.limitStore;
    this.#keys = parts.keys;
    this.#tls = parts.tls;
    let lastId = self.incarnation * IDS_PER_MS;
    this.nextId = () => ++lastId;
    this.#discovery = new PeerDiscovery(
      { ...discoveryDefaults, seeds: options.seeds },
      (addresses) => this.#onFound("seeds", addresses),
      log,
    );
    this.#loopDelay = monitorEventLoopDelay({ resolution: LOOP_RESOLUTION_MS });
  }

  /** For `createSystem`. */
  get remote(): Remote {
    return this.#mesh.remote;
  }

  /** @param nodes what this process is configured with, now */
  settings(nodes: () => readonly NodeSettings[]): ClusterSettings {
    return {
      self: this.self,
      membership: { ...membershipDefaults, table: this.#table !== undefined },
      limits: {
        ...clusterLimiterDefaults,
        self: this.self.id,
        lostMs: this.#options.lostMs,
        ownerMs: OWNER_MS,
        storeMs: STORE_MS,
      },
      nodes,
    };
  }

  edges(
    reply: <R>(to: ReplyTo<R>, value: R) => void,
  ): Pick<EdgeFactories, "mesh" | "table" | "limitStore"> {
    const table = this.#table;
    const limitStore = this.#limitStore;
    return {
      mesh: () => this.#meshEdge(),
      ...(table === undefined ? {} : { table: () => table.edge() }),
      ...(limitStore === undefined ? {} : { limitStore: () => limitStore.edge(reply) }),
    };
  }

  /** The way of answers' bytes to and from other peers. Once. */
  relays(data: DataPlane, answerBytesMax: number): FlightRelays {
    const tls = this.#tls === undefined ? {} : { tls: this.#tls };
    this.#relays = new FlightRelays(
      {
        cluster: this.#options.name,
        self: this.self.id,
        keys: this.#keys,
        ...tls,
        answerBytesMax,
        addressOf: (peer) => this.#addressOf(peer),
      },
      data,
    );
    return this.#relays;
  }

  async #addressOf(peer: PeerId): Promise<string | undefined> {
    const described = await this.#ask<MembersMessage, MembersDescription>(
      this.#refs?.members,
      (replyTo) => ({ kind: "members.describe", replyTo }),
    );
    return described?.members.find(({ id }) => id === peer)?.address;
  }

  /** The actors are there: links, discovery and load are told from now on. Once, in the turn in which it was opened. */
  start(system: ActorSystem, refs: GatewayRefs): void {
    this.#system = system;
    this.#refs = refs;
    this.#mesh.bind(system);
    this.#loopDelay.enable();
    this.#loadTimer = setInterval(() => this.#tellLoad(), LOAD_MS).unref();
    void this.#discovery.start();
  }

  /** Further addresses of peers, as somebody outside knows them; replaces those told before. */
  discovered(addresses: readonly string[]): void {
    this.#onFound("told", addresses);
  }

  /** For events that the actors emit. */
  onMembership(event: MembershipEvent): void {
    if ("epoch" in event) this.#epoch = event.epoch;
    if (event.kind === "membership.joined") this.#hasJoined = true;
    // Asks and watches of one that is only out of reach go on; of one that is gone they end now.
    if (event.kind === "membership.removed" && !this.#mesh.isUp(event.id))
      this.#mesh.forget(event.id);
    if (event.kind !== "membership.superseded") return;
    const { id } = this.self;
    this.#hooks.onFatal(
      new Error(
        `another process, at ${event.address}, has started with this one's peer id ${id}: ` +
          "give each its own (cluster.id)",
      ),
    );
  }

  /** What this peer owns goes to others; resolves when they have been told. Idempotent. */
  leave(): Promise<void> {
    this.#left ??= this.#leave();
    return this.#left;
  }

  /** After the last actor; tells peers with which it has left in order that it does not come back. */
  async close(): Promise<void> {
    this.#relays?.close();
    this.#discovery.stop();
    if (this.#loadTimer !== undefined) clearInterval(this.#loadTimer);
    this.#loopDelay.disable();
    await this.#mesh.close(this.#left !== undefined);
    this.#limitStore?.close();
    await this.#table?.close();
  }

  async describe(nodes: readonly NodeId[]): Promise<ClusterDescription> {
    const refs = this.#refs;
    const [members, limits] = await Promise.all([
      this.#ask<MembersMessage, MembersDescription>(refs?.members, (replyTo) => ({
        kind: "members.describe",
        replyTo,
      })),
      this.#ask<ClusterLimiterMessage, ClusterLimiterDescription>(refs?.limits, (replyTo) => ({
        kind: "limits.describe",
        replyTo,
      })),
    ]);
    const facts = members?.members ?? [];
    const owners = facts.filter(({ owns }) => owns).map(({ id }) => id);
    const owned = new OwnerTable(0, owners);
    const counts = owned.counts();
    return {
      self: this.self.id,
      epoch: members?.epoch ?? this.#epoch,
      members: facts,
      buckets: owned.owners.map((peer, index) => ({ peer, count: counts[index] ?? 0 })),
      nodes: nodes.map((node) => {
        const peer = refs?.placeOf(node);
        return { node, ...(peer === undefined ? {} : { peer }) };
      }),
      links: this.#mesh.metrics(),
      relays: this.#relays?.counts() ?? { reading: 0, serving: 0 },
      ...(limits === undefined ? {} : { limits }),
      ...(this.#table === undefined ? {} : { table: this.#table.stats() }),
      ...(this.#limitStore === undefined ? {} : { limitStore: this.#limitStore.stats() }),
    };
  }

  async #leave(): Promise<void> {
    this.#tellMembers({ kind: "members.leave" });
    // Answered after it, so that by then the others' mail is on its way to the links; which write at the turn's end.
    await this.#ask<MembersMessage, MembersDescription>(this.#refs?.members, (replyTo) => ({
      kind: "members.describe",
      replyTo,
    }));
    await new Promise((resolve) => setImmediate(resolve));
    await new Promise((resolve) => setImmediate(resolve));
  }

  #ask<M, R>(
    to: ActorRef<M> | undefined,
    message: (replyTo: ReplyTo<R>) => M,
  ): Promise<R | undefined> {
    if (to === undefined || this.#system === undefined) return Promise.resolve(undefined);
    return this.#system
      .ask(to, DESCRIBE_MS, message)
      .then((outcome) => (outcome.ok ? outcome.value : undefined));
  }

  #tellMembers(message: MembersMessage): void {
    if (this.#refs !== undefined) this.#system?.tell(this.#refs.members, message);
  }

  #tellLoad(): void {
    const cells = this.#system?.stats().cells ?? [];
    this.#queueDepth = cells.reduce((sum, { mailboxDepth }) => sum + mailboxDepth, 0);
    // What it measures holds its own resolution.
    const lagMs = this.#loopDelay.percentile(99) / 1e6 - LOOP_RESOLUTION_MS;
    this.#loopDelay.reset();
    const loopLagMs = Number.isFinite(lagMs) ? Math.max(0, lagMs) : 0;
    const load = { loopLagMs, queueDepth: this.#queueDepth };
    this.#tellMembers({ kind: "members.load", load });
  }

  #onFound(by: "seeds" | "told", addresses: readonly string[]): void {
    this.#found[by] = addresses;
    const all = [...new Set([...this.#found.seeds, ...this.#found.told])];
    this.#tellMembers({ kind: "members.discovered", addresses: all });
  }

  // ---- links --------------------------------------------------------------------------------------------------

  #meshEdge(): Actor<MeshCommand> {
    return {
      receive: ({ addresses }) => {
        if (this.#left !== undefined) return; // Its links last until it closes.
        const wanted = new Set(addresses);
        for (const address of this.#dialled) {
          if (wanted.has(address)) continue;
          this.#dialled.delete(address);
          this.#mesh.undial(address);
        }
        for (const address of wanted) if (!this.#dialled.has(address)) this.#dial(address);
      },
    };
  }

  #dial(address: string): void {
    this.#dialled.add(address);
    try {
      this.#mesh.dial(address);
    } catch (error) {
      // As another peer advertises it.
      const reason = error instanceof Error ? error.message : String(error);
      this.#log.warn({ address, reason }, "a peer cannot be dialled at its address");
    }
  }

  #onPeerEvent(event: PeerEvent): void {
    switch (event.kind) {
      case "peer.up":
        this.#lastRefusals.clear();
        this.#tellMembers({ kind: "members.link_up", id: event.node });
        return this.#hooks.onEvent(event);
      case "peer.down":
        this.#tellMembers({ kind: "members.link_down", id: event.node });
        this.#voidFlights(event.node);
        return this.#hooks.onEvent(event);
      case "peer.refused":
        return this.#onRefused(event);
      case "peer.heartbeat":
        return;
      case "peer.lost":
      case "peer.rejected":
        return this.#hooks.onEvent(event);
    }
  }

  /**
   * What was under way is lost, so the peer's requests take part in no flight here any more, nor ours there. Told
   * before anything comes of a new connection.
   */
  #voidFlights(peer: PeerId): void {
    const refs = this.#refs;
    if (refs === undefined) return;
    const owner = refs.requestsOf(peer).path;
    for (const shard of refs.cache.own)
      this.#system?.tell(shard, { kind: "cache.owner_restarted", owner });
    this.#system?.tell(refs.requests, { kind: "request.peer_down", peer });
  }

  /** The same refusal of one address is told once; those that belong to the making of links are not. */
  #onRefused(event: Extract<PeerEvent, { kind: "peer.refused" }>): void {
    const { address, reason, detail, isDialled, isTold } = event;
    if (reason === "same_id" && isDialled && isTold && !this.#hasJoined)
      return this.#hooks.onFatal(
        new Error(
          `the peer at ${address} has this one's id ${this.self.id}: ${detail} (cluster.id)`,
        ),
      );
    if (["self", "duplicate", "closing"].includes(reason)) return;
    if (this.#lastRefusals.get(address) === reason) return;
    if (this.#lastRefusals.size >= REFUSED_MAX) this.#lastRefusals.clear();
    this.#lastRefusals.set(address, reason);
    this.#hooks.onEvent(event);
  }
}

/**
 * The host's name tells machines apart, and pods of a StatefulSet; the port, processes of one machine. Both are the same
 * after a restart, so that a peer gets back what it owned.
 */
export function ownId(port: number): string {
  const host = hostname()
    .replace(/[^A-Za-z0-9._-]/g, "-")
    .replace(/^[^A-Za-z0-9]+/, "");
  const tail = port === 0 ? randomBytes(4).toString("hex") : String(port);
  return `${host.slice(0, 50) || "peer"}-${tail}`;
}

/** Of this package: its manifest is a folder further up where it was built. */
async function programVersion(): Promise<string> {
  for (const path of ["../package.json", "../../package.json"]) {
    const text = await readFile(new URL(path, import.meta.url), "utf8").catch(() => undefined);
    if (text !== undefined) return String(JSON.parse(text).version);
  }
  return "unknown";
}

function keyOf({ id, secret }: ClusterOptions["keys"][number]): PeerKey {
  return { id, secret: Buffer.from(secret, "utf8") };
}

async function readTls(tls: NonNullable<ClusterOptions["tls"]>): Promise<PeerTls> {
  const read = async (option: string, file: string): Promise<string> => {
    try {
      return await readFile(file, "utf8");
    } catch (error) {
      const code = error instanceof Error && "code" in error ? String(error.code) : "unknown";
      throw new Error(`cluster.tls.${option}: ${file} cannot be read (${code})`);
    }
  };
  const ca = tls.ca === undefined ? {} : { ca: await read("ca", tls.ca) };
  return {
    cert: await read("cert", tls.cert),
    key: await read("key", tls.key),
    ...ca,
    isMutual: tls.mutual,
  };
}

/** Where others dial this peer. */
function addressOf({ advertise, listen, tls }: ClusterOptions, port: number): string {
  const scheme = tls === undefined ? "ws" : "wss";
  const host = advertise ?? (isWildcard(listen.host) ? firstAddress() : listen.host);
  const hasPort = /^(\[.*\]|[^:]*):\d+$/.test(host);
  if (hasPort) return `${scheme}://${host}`;
  return `${scheme}://${host.includes(":") ? `[${host}]` : host}:${port}`;
}

function isWildcard(host: string): boolean {
  return host === "0.0.0.0" || host === "::";
}

/** Of this machine on a network, IPv4 before IPv6. */
function firstAddress(): string {
  const all = Object.values(networkInterfaces())
    .flatMap((addresses) => addresses ?? [])
    .filter(({ internal, address }) => !internal && !address.startsWith("fe80:"));
  const first = all.find(({ family }) => family === "IPv4") ?? all[0];
  return first?.address ?? hostname();
}

/** Of an error of listening, with where. */
function withPlace(error: unknown, host: string, port: number): unknown {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  const where = `cluster.listen ${host}:${port}`;
  if (code === "EADDRINUSE") return new Error(`${where} is taken by another process`);
  if (code === "EACCES" || code === "EADDRNOTAVAIL")
    return new Error(`${where} cannot be listened on (${code})`);
  return error;
}
