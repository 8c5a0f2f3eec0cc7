/**
 * The composition root: the one file that builds a whole Headrace, for a server and for a host program alike.
 * It makes edges and actors, connects what they report to metrics, log, recording and explanations, and carries
 * out what the operator wants (nodes, purge, reload, drain).
 */
import { randomBytes } from "node:crypto";
import type { CacheDescription, CacheMessage } from "../actors/cache.ts";
import type { Embedded, EmbedderCommand } from "../actors/edges.ts";
import { GatewayRefs, type GatewaySettings, gatewayTree, nodeSpec } from "../actors/gateway.ts";
import type { GpuNodeEvent, GpuNodeMessage, NodeDescription } from "../actors/gpu-node.ts";
import type { MembershipEvent } from "../actors/membership.ts";
import type { NodeId, SemanticPolicy } from "../actors/protocol.ts";
import type { LimiterDescription, RateLimiterMessage } from "../actors/rate-limiter.ts";
import type { RequestDescription, RequestFinished, RequestMessage } from "../actors/request.ts";
import type { RouterDescription, RouterEvent, RouterMessage } from "../actors/router.ts";
import type { RouterLogEvent } from "../actors/router-log.ts";
import type { InspectedEntry, JudgedPool, MakeIndex } from "../actors/semantic-shard.ts";
import type { ActorRef, ReplyTo } from "../runtime/actor.ts";
import { SystemClock } from "../runtime/clock.ts";
import { NactScheduler } from "../runtime/nact-scheduler.ts";
import { Random } from "../runtime/random.ts";
import { type ActorSystem, createSystem, type SystemEvent } from "../runtime/system.ts";
import { ApproximateIndex, loadUsearch } from "./approximate-index.ts";
import type { Cluster, ClusterDescription } from "./cluster.ts";
import { diffForReload, type ReloadPlan, readOptions } from "./config.ts";
import { DataPlane } from "./data-plane.ts";
import { type Embedder, openEmbedder } from "./embedder.ts";
import type { FlightRelays } from "./flight-relay.ts";
import { Front, type FrontOptions, policyOf } from "./front.ts";
import { KeyTable } from "./keys.ts";
import type { Log } from "./log.ts";
import { Metrics, type StateSnapshot } from "./metrics.ts";
import type { NodeOptions, Options } from "./options.ts";
import { DecisionLog, type Explanation, explain, RecentRequests, Recorder } from "./records.ts";
import type { RedisStore } from "./redis-store.ts";
import { ScraperEdge, type ScraperOptions } from "./scraper.ts";
import { gatewaySettings, nodeSettings, semanticPolicy } from "./settings.ts";
import { UpstreamEdge, type UpstreamOptions, upstreamDefaults } from "./upstream.ts";

/** How long a start waits for nodes to tell their models; a node that is down then joins when it is up. */
const MODELS_WAIT_MS = 2000;
/** How long an actor may take to describe itself for an operator. */
const DESCRIBE_MS = 1000;

/** Stored questions of a tenant, and what judging has shown of its hits. */
export type Inspection = {
  /** How its questions are matched; absent: they are not. */
  policy?: SemanticPolicy;
  /** Name, version and dimension; absent: there is none, or it has not been healthy yet. */
  embedder?: string;
  /** Why the text got no vector. */
  unavailable?: string;
  entries: InspectedEntry[];
  judged: JudgedPool[];
};

/** A node and what is known of its models. */
type KnownNode = { options: NodeOptions; models: readonly string[] | undefined };

export class Gateway {
  readonly front: Front;
  readonly #data = new DataPlane();
  readonly #log: Log;
  readonly #system: ActorSystem;
  readonly #refs: GatewayRefs;
  readonly #upstream: UpstreamEdge;
  readonly #scraper: ScraperEdge;
  readonly #store: RedisStore | undefined;
  readonly #embedder: Embedder | undefined;
  readonly #cluster: Cluster | undefined;
  readonly #relays: FlightRelays | undefined;
  readonly #nowMs: () => number;
  readonly #metrics = new Metrics();
  readonly #recent = new RecentRequests();
  readonly #recorder: Recorder | null;
  readonly #decisions: DecisionLog | null;
  readonly #nodes = new Map<NodeId, KnownNode>();
  #served: { names: readonly string[]; complete: boolean } = { names: [], complete: false };
  #options: Options;
  #keys: KeyTable;
  #closed: Promise<void> | null = null;
  #onModelsKnown: () => void = () => {};

  /**
   * Builds and starts everything; no port is opened. Resolves once the nodes have told their models, or after 2 s.
   * @param onFatal called when the actor system gives up: the process should end with a failure.
   */
  static async start(
    options: Options,
    log: Log,
    onFatal: (error: unknown) => void,
  ): Promise<Gateway> {
    const { redis } = options.cache;
    // Loaded only when used: a gateway without Redis does not pay for the client.
    const store =
      redis === undefined
        ? undefined
        : await (await import("./redis-store.ts")).openRedisStore(options.cache, log);
    const { mode, embedder: embedderOptions } = options.cache.semantic;
    const isWanted = options.cache.enabled && mode !== "off"; // Without an embedder one line says how to get one.
    const embedder = isWanted ? await openEmbedder(embedderOptions, log) : undefined;
    // What its links tell has no one to go to before there is a gateway, and then goes there.
    let gateway: Gateway | undefined;
    const cluster =
      options.cluster === undefined
        ? undefined
        : await (await import("./cluster.ts")).Cluster.open(options, log, {
            onEvent: (event) => gateway?.onEvent(event, "mesh"),
            onFatal: (error) => gateway?.fail(error, onFatal),
          }).catch(async (error) => {
            await Promise.all([store?.close(), embedder?.close()]);
            throw error;
          });
    gateway = new Gateway(options, log, { store, embedder, cluster }, onFatal);
    await gateway.#untilModelsKnown();
    return gateway;
  }

  private constructor(
    options: Options,
    log: Log,
    {
      store,
      embedder,
      cluster,
    }: {
      store: RedisStore | undefined;
      embedder: Embedder | undefined;
      cluster: Cluster | undefined;
    },
    onFatal: (error: unknown) => void,
  ) {
    this.#options = options;
    this.#log = log;
    this.#store = store;
    this.#embedder = embedder;
    this.#cluster = cluster;
    this.#keys = new KeyTable(options);
    const clock = new SystemClock();
    this.#nowMs = () => clock.nowUs() / 1000;
    const idPrefix = randomBytes(6).toString("hex");
    this.#system = createSystem({
      scheduler: new NactScheduler({ mode: "dispatcher", clock }),
      clock,
      random: new Random(idPrefix),
      ...(cluster === undefined ? {} : { remote: cluster.remote, nextId: cluster.nextId }),
    });
    const post = <T>(to: ActorRef<T>, message: T): void => void this.#system.tell(to, message);
    const reply = <R>(to: ReplyTo<R>, value: R): void => this.#system.reply(to, value);
    const exact = gatewaySettings(options);
    const settings = embedder === undefined ? exact : withUsearch(exact);
    this.#refs = new GatewayRefs(
      (path) => this.#system.ref(path),
      settings.cacheShards,
      cluster?.self.id,
      cluster !== undefined,
    );
    const data = this.#data;
    this.#upstream = new UpstreamEdge(upstreamOptions(options), {
      data,
      post,
      reply,
      nowMs: this.#nowMs,
      modelOf: (node) => this.#nodes.get(node)?.models?.[0],
    });
    const scraperRandom = new Random(idPrefix).split("scraper");
    this.#scraper = new ScraperEdge(scraperOptions(options), {
      post,
      random: () => scraperRandom.next(),
    });
    const relays = cluster?.relays(data, upstreamOptions(options).answerBytesMax);
    this.#relays = relays;
    this.front = new Front(frontOptions(options), {
      data,
      ...(relays === undefined ? {} : { relays }),
      nowMs: this.#nowMs,
      idPrefix,
      requests: this.#refs.requests,
      post,
      authenticate: (key) => this.#keys.authenticate(key),
      embedder: () => identityText(this.#embedder),
      feedback: (entryId, tenant, isRight) => this.feedback(entryId, tenant, isRight),
      models: () => this.#served,
      onRefused: (code, route) => this.#metrics.onRefused(code, route),
    });
    for (const node of options.nodes) this.#register(node);
    const { file, decisions } = options.record;
    const onRecordError = (path: string) => (error: Error) =>
      this.#log.error({ file: path, reason: error.message }, "the recording cannot be written");
    this.#recorder =
      file === undefined ? null : new Recorder(file, this.#nowMs(), onRecordError(file));
    const { root } = this.#refs;
    this.#decisions =
      decisions === undefined
        ? null
        : new DecisionLog(
            decisions,
            { kind: "router.log", v: 1, seed: idPrefix, root, settings: settings.router },
            onRecordError(decisions),
          );
    const peers = cluster?.settings(() =>
      this.#options.nodes.map((node) => nodeSettings(node, this.#options)),
    );
    const whole = peers === undefined ? settings : { ...settings, nodes: [], cluster: peers };
    const tree = gatewayTree(whole, this.#refs, {
      front: () => this.front,
      upstream: () => this.#upstream,
      scraper: () => this.#scraper,
      ...(store === undefined ? {} : { store: () => store.edge(reply) }),
      ...(embedder === undefined ? {} : { embedder: () => embedder.edge(reply) }),
      ...cluster?.edges(reply),
    });
    this.#system.start(tree, {
      onEvent: (event, from) => this.onEvent(event, from),
      onFatal: (error) => this.fail(error, onFatal),
    });
    cluster?.start(this.#system, this.#refs);
  }

  /** Nobody is left to answer: what is open fails, what comes is refused. */
  fail(error: unknown, onFatal: (error: unknown) => void): void {
    void this.close();
    onFatal(error);
  }

  get options(): Options {
    return this.#options;
  }

  // ---- nodes ------------------------------------------------------------------------------------------------

  /** @throws ConfigError for options that are not acceptable. */
  addNode(input: unknown): string {
    const nodes = [...this.#options.nodes, input] as Options["nodes"];
    const options = readOptions({ ...this.#options, nodes });
    const node = options.nodes[options.nodes.length - 1];
    if (node === undefined) throw new Error("a list with a node added cannot be empty");
    this.#options = options;
    this.#startNode(node);
    return node.name;
  }

  hasNode(name: string): boolean {
    return this.#nodes.has(name);
  }

  nodeNames(): string[] {
    return [...this.#nodes.keys()];
  }

  drainNode(name: string, drains: boolean): void {
    const node = this.#refs.node(name);
    this.#system.tell(node, { kind: drains ? "gpu_node.drain" : "gpu_node.undrain" });
  }

  /** Drains it, waits for its requests (at most timeouts.nodeDrainMs), then forgets it. */
  async removeNode(name: string): Promise<void> {
    const known = this.#nodes.get(name);
    if (known === undefined) return;
    this.#options = { ...this.#options, nodes: this.#options.nodes.filter((n) => n.name !== name) };
    this.drainNode(name, true);
    const untilMs = this.#nowMs() + this.#options.timeouts.nodeDrainMs;
    while (this.#nowMs() < untilMs && this.#closed === null) {
      const described = await this.#describeNode(name);
      if (described === undefined || described.snapshot.inflight === 0) break;
      await new Promise((resolve) => setTimeout(resolve, 100).unref());
    }
    if (this.#nodes.get(name) !== known) return; // Added anew meanwhile.
    this.#nodes.delete(name);
    this.#learnModels();
    if (this.#cluster !== undefined) {
      this.#system.tell(this.#refs.placement, { kind: "placement.node_removed", node: name });
    } else {
      this.#system.stop(this.#refs.node(name));
      this.#system.tell(this.#refs.router, { kind: "router.node_removed", node: name });
      this.#refs.forgetNode(name);
    }
    this.#upstream.removeNode(name);
    this.#scraper.removeNode(name);
  }

  #startNode(node: NodeOptions): void {
    this.#register(node);
    if (this.#cluster !== undefined) {
      this.#system.tell(this.#refs.placement, { kind: "placement.nodes_changed" });
      return;
    }
    const ref = this.#system.spawn(
      this.#refs.nodesPath,
      nodeSpec(nodeSettings(node, this.#options), this.#refs),
    );
    this.#system.tell(ref, { kind: "gpu_node.subscribe", router: this.#refs.router });
  }

  #register(node: NodeOptions): void {
    const apiKey = node.apiKey === undefined ? {} : { apiKey: node.apiKey };
    this.#upstream.addNode({ node: node.name, url: node.url, ...apiKey });
    this.#scraper.addNode({ ...node, node: node.name });
    this.#nodes.set(node.name, { options: node, models: node.models });
    this.#learnModels();
  }

  /** So that the first request does not meet nodes whose models nobody knows yet. */
  #untilModelsKnown(): Promise<void> {
    if (this.#served.complete) return Promise.resolve();
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, MODELS_WAIT_MS);
      this.#onModelsKnown = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  #learnModels(): void {
    const names = new Set<string>();
    let complete = true;
    for (const { models, options } of this.#nodes.values()) {
      if (models === undefined) complete = false;
      for (const model of models ?? []) names.add(model);
      for (const adapter of options.adapters ?? []) names.add(adapter);
    }
    this.#served = { names: [...names].sort(), complete };
    if (complete) this.#onModelsKnown();
  }

  /** A model that is served, as soon as one is known; undefined when `signal` aborts first. */
  async firstModel(signal: AbortSignal): Promise<string | undefined> {
    while (this.#served.names.length === 0 && !signal.aborted && this.#closed === null) {
      await new Promise((resolve) => setTimeout(resolve, 100).unref());
    }
    return this.#served.names[0];
  }

  // ---- what is asked of it ------------------------------------------------------------------------------------

  explain(requestId: string): Explanation | undefined {
    const record = this.#recent.get(requestId);
    return record === undefined ? undefined : explain(record);
  }

  /** Removes a tenant's cached answers, or all, from all peers; resolves with how many. */
  async purge(tenant: string | undefined): Promise<number> {
    const counts = await Promise.all(
      this.#refs.cache.all.map((shard) =>
        this.#system.ask<CacheMessage, { removed: number }>(shard, 60_000, (replyTo) => ({
          kind: "cache.purge",
          ...(tenant === undefined ? {} : { tenant }),
          replyTo,
        })),
      ),
    );
    return counts.reduce((sum, outcome) => sum + (outcome.ok ? outcome.value.removed : 0), 0);
  }

  /** A caller's word on a stored answer; a wrong one is gone for good. False for an entry that is not there. */
  async feedback(entryId: string, tenant: string, isRight: boolean): Promise<boolean> {
    const shard = this.#refs.cache.at(entryId);
    const outcome = await this.#ask<CacheMessage, { known: boolean }>(shard, (replyTo) => ({
      kind: "cache.feedback",
      entryId,
      tenant,
      isRight,
      replyTo,
    }));
    return outcome?.known === true;
  }

  /** Stored questions of a tenant, at most `count`: those used last, or the most similar to a text, with the reasons. */
  async inspect(
    tenant: string,
    count: number,
    { text, scope }: { text?: string; scope?: string } = {},
  ): Promise<Inspection> {
    const owner = this.#keys.ofTenant(tenant);
    const policy = owner && policyOf(frontOptions(this.#options).semantic, owner);
    const vector = text === undefined ? undefined : await this.#vectorOf(text);
    const question =
      text === undefined || policy === undefined
        ? {}
        : { question: { text, policy, ...(vector instanceof Float32Array && { vector }) } };
    const inspection = { tenant, count, ...(scope === undefined ? {} : { scope }), ...question };
    type Found = Pick<Inspection, "entries" | "judged">;
    const shards = await Promise.all(
      this.#refs.cache.all.map((shard) =>
        this.#ask<CacheMessage, Found>(shard, (replyTo) => ({
          kind: "cache.inspect",
          inspection,
          replyTo,
        })),
      ),
    );
    const entries = shards.flatMap((shard) => shard?.entries ?? []);
    const nearness = ({ compared }: InspectedEntry): number => compared?.similarity ?? -1;
    entries.sort((left, right) => nearness(right) - nearness(left) || left.ageMs - right.ageMs);
    const embedder = identityText(this.#embedder);
    return {
      ...(policy === undefined ? {} : { policy }),
      ...(embedder === undefined ? {} : { embedder }),
      ...(typeof vector === "string" ? { unavailable: vector } : {}),
      entries: entries.slice(0, count),
      judged: shards.flatMap((shard) => shard?.judged ?? []),
    };
  }

  /** Or why there is none. */
  async #vectorOf(text: string): Promise<Float32Array | string> {
    if (this.#embedder === undefined) return "no embedder is configured";
    const embedded = await this.#ask<EmbedderCommand, Embedded>(this.#refs.embedder, (replyTo) => ({
      kind: "embedder.embed",
      requestId: "inspect",
      text,
      replyTo,
    }));
    if (embedded?.kind === "vector") return embedded.vector;
    return embedded?.reason ?? "late";
  }

  /** Vectors of questions that will be asked, without haste; undefined for each that gets none. */
  async embedAhead(texts: readonly string[]): Promise<(Float32Array | undefined)[]> {
    const embedder = this.#embedder;
    if (embedder === undefined) return texts.map(() => undefined);
    await embedder.settled();
    const embedded = await embedder.embedAhead(texts);
    return embedded.map((one) => (one.kind === "vector" ? one.vector : undefined));
  }

  async state(): Promise<StateSnapshot> {
    const [nodes, router, shards, limiter, requests, cluster] = await Promise.all([
      Promise.all(this.nodeNames().map((name) => this.#describeNode(name))),
      this.#ask<RouterMessage, RouterDescription>(this.#refs.router, (replyTo) => ({
        kind: "router.describe",
        replyTo,
      })),
      Promise.all(
        this.#refs.cache.own.map((shard) =>
          this.#ask<CacheMessage, CacheDescription>(shard, (replyTo) => ({
            kind: "cache.describe",
            replyTo,
          })),
        ),
      ),
      this.#ask<RateLimiterMessage, LimiterDescription>(this.#refs.limiter, (replyTo) => ({
        kind: "limiter.describe",
        replyTo,
      })),
      this.#ask<RequestMessage, RequestDescription>(this.#refs.requests, (replyTo) => ({
        kind: "request.describe",
        replyTo,
      })),
      this.cluster(),
    ]);
    const cache = shards.filter((shard) => shard !== undefined);
    return {
      nodes: nodes.filter((node) => node !== undefined),
      ...(router === undefined ? {} : { router }),
      ...(cache.length === 0 ? {} : { cache: sumOf(cache) }),
      ...(limiter === undefined ? {} : { limiter }),
      ...(requests === undefined ? {} : { requests }),
      ...(this.#store === undefined ? {} : { store: this.#store.stats() }),
      ...(this.#embedder === undefined ? {} : { embedder: this.#embedder.describe() }),
      ...(cluster === undefined ? {} : { cluster }),
      system: this.#system.stats(),
    };
  }

  /** The cluster as this peer sees it; undefined where there is none. */
  cluster(): Promise<ClusterDescription | undefined> {
    return this.#cluster?.describe(this.nodeNames()) ?? Promise.resolve(undefined);
  }

  /** Where other peers reach this one; undefined without a cluster. */
  get peerAddress(): string | undefined {
    return this.#cluster?.self.address;
  }

  /** Addresses of further peers, beside the configured seeds; in place of those told before. */
  peersFound(addresses: readonly string[]): void {
    this.#cluster?.discovered(addresses);
  }

  async metrics(): Promise<{ contentType: string; text: string }> {
    return this.#metrics.expose(await this.state());
  }

  /** Ready: not draining, and a node may take a request. */
  async ready(): Promise<{ ready: boolean; reason: string }> {
    if (this.front.draining) return { ready: false, reason: "draining" };
    const nodes = (await this.state()).nodes.map(({ snapshot }) => snapshot);
    if (this.#nodes.size === 0) return { ready: false, reason: "no node is configured" };
    if (nodes.length === 0) return { ready: false, reason: "no node is looked after yet" };
    const usable = nodes.filter(
      (node) => node.circuit !== "open" && node.healthy && !node.draining,
    );
    if (usable.length === 0) return { ready: false, reason: "no node is healthy" };
    return { ready: true, reason: `${usable.length} of ${nodes.length} nodes are usable` };
  }

  #ask<M, R>(to: ActorRef<M>, message: (replyTo: ReplyTo<R>) => M): Promise<R | undefined> {
    return this.#system
      .ask(to, DESCRIBE_MS, message)
      .then((outcome) => (outcome.ok ? outcome.value : undefined));
  }

  #describeNode(name: NodeId): Promise<NodeDescription | undefined> {
    return this.#ask<GpuNodeMessage, NodeDescription>(this.#refs.node(name), (replyTo) => ({
      kind: "gpu_node.describe",
      replyTo,
    }));
  }

  // ---- change and end -----------------------------------------------------------------------------------------

  /** Applies new options, or (when some need a restart) none of them. */
  reload(next: Options): ReloadPlan {
    const plan = diffForReload(this.#options, next);
    if (plan.refuse.length > 0) return plan;
    this.#options = next;
    this.#keys = new KeyTable(next);
    this.front.configure(frontOptions(next));
    this.#log.setLevel(next.log.level);
    for (const node of plan.nodes.removed) void this.removeNode(node.name);
    for (const { from, to } of plan.nodes.changed)
      void this.removeNode(from.name).then(() => this.#startNode(to));
    for (const node of plan.nodes.added) this.#startNode(node);
    return plan;
  }

  /** Refuses new requests and waits for the open ones; what is still open after `timeoutMs` is cut. */
  async drain(timeoutMs: number = this.#options.timeouts.drainMs): Promise<void> {
    let timer: NodeJS.Timeout | undefined;
    const timeout = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, timeoutMs);
    });
    const drained = this.front.drain();
    await this.#cluster?.leave();
    // Clients of other peers, too, read what began here.
    const read = drained.then(() => this.#relays?.idle());
    await Promise.race([read, timeout]);
    clearTimeout(timer);
    this.front.cutAll();
  }

  /** Ends everything; open requests fail. Idempotent. */
  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  async #close(): Promise<void> {
    await this.drain(0);
    await new Promise((resolve) => setImmediate(resolve)); // The last messages: settle, release, forget.
    this.#system.stopAll();
    this.#scraper.close();
    await Promise.all([
      this.#upstream.close(),
      this.#store?.close(),
      this.#embedder?.close(),
      this.#recorder?.close(),
      this.#decisions?.close(),
      this.#cluster?.close(),
    ]);
  }

  // ---- what the actors report ---------------------------------------------------------------------------------

  onEvent(event: SystemEvent | { kind: string }, from: string): void {
    // Others fall through by their kind.
    const known = event as RequestFinished | GpuNodeEvent | RouterEvent | RouterLogEvent;
    switch (known.kind) {
      case "router.log_started":
      case "router.turn":
        return this.#decisions?.write(known);
      case "request.finished": {
        const { record } = known;
        const { requestId } = record.facts;
        const body = this.#data.prompts.get(requestId);
        this.#data.prompts.delete(requestId);
        this.#recent.add(record);
        this.#metrics.onFinished(record);
        this.#recorder?.write(record, body);
        return;
      }
      case "gpu_node.circuit_changed":
        this.#metrics.onCircuitChanged(known.node, known.to);
        return this.#log.warn(fieldsOf(known), "the circuit of a node changed");
      case "gpu_node.models_changed":
        return; // The router tells it too, also of nodes that another peer looks after.
      case "router.models_changed": {
        const node = this.#nodes.get(known.node);
        if (node !== undefined) node.models = known.models;
        return this.#learnModels();
      }
    }
    this.#metrics.onEvent(event.kind);
    if (event.kind.startsWith("membership.")) this.#cluster?.onMembership(event as MembershipEvent);
    if (event.kind === "peer.refused") return this.#log.warn(fieldsOf(event), event.kind);
    if (event.kind === "runtime.dead_letter") return this.#log.debug(fieldsOf(event), event.kind);
    if (event.kind.startsWith("runtime."))
      return this.#log.error({ from, ...fieldsOf(event) }, event.kind);
    this.#log.info({ from, ...fieldsOf(event) }, event.kind);
  }
}

// ---- what the edges are built with: the actors' settings stand in settings.ts -----------------------

function frontOptions(options: Options): FrontOptions {
  const { cache, record, requests, timeouts } = options;
  const policy = semanticPolicy(options);
  const { temperatureMax } = cache.semantic;
  return {
    requests,
    requestTimeoutMs: timeouts.requestMsDefault,
    requestTimeoutMsMax: timeouts.totalMs,
    cacheEnabled: cache.enabled,
    recordsPrefixes: record.file !== undefined,
    recordsPrompts: record.file !== undefined && record.prompts,
    ...(policy === undefined ? {} : { semantic: { policy, temperatureMax } }),
  };
}

/** Scopes that outgrow the exact index get another one beside it, where the optional package is there. */
function withUsearch(settings: GatewaySettings): GatewaySettings {
  const { semantic } = settings.cache;
  const usearch = semantic === undefined ? undefined : loadUsearch();
  if (semantic === undefined || usearch === undefined) return settings;
  const makeIndex: MakeIndex = (wanted) => new ApproximateIndex({ usearch, ...wanted });
  return { ...settings, cache: { ...settings.cache, semantic: { ...semantic, makeIndex } } };
}

function identityText(embedder: Embedder | undefined): string | undefined {
  const identity = embedder?.identity();
  return identity && `${identity.id} ${identity.version} ${identity.dimension}`;
}

function upstreamOptions({ cache, requests, timeouts }: Options): UpstreamOptions {
  return {
    ...upstreamDefaults,
    connectMs: timeouts.connectMs,
    sseEventBytesMax: requests.sseLineBytesMax,
    answerBytesMax: Math.max(upstreamDefaults.answerBytesMax, cache.answerBytesMax),
  };
}

function scraperOptions({ health, scrape }: Options): ScraperOptions {
  return {
    metricsIntervalMs: scrape.intervalMs,
    metricsTimeoutMs: scrape.timeoutMs,
    healthIntervalMs: health.intervalMs,
    healthTimeoutMs: health.timeoutMs,
    modelsIntervalMs: scrape.modelsIntervalMs,
    jitterRatio: scrape.jitterRatio,
  };
}

/** An event without its kind; an error as its message and stack. */
function fieldsOf({ kind: _, ...fields }: { kind: string }): object {
  const { error, ...rest } = fields as { error?: unknown };
  if (error === undefined) return rest;
  return { ...rest, error: error instanceof Error ? error.stack : String(error) };
}

function sumOf(shards: readonly CacheDescription[]): CacheDescription {
  const sum: Record<string, number> = {};
  for (const shard of shards) {
    for (const [name, value] of Object.entries(shard))
      if (typeof value === "number") sum[name] = (sum[name] ?? 0) + value;
  }
  const splits = shards.flatMap((shard) => shard.splits ?? []);
  return { ...sum, ...(splits.length === 0 ? {} : { splits }) } as CacheDescription;
}
