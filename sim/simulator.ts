/**
 * The simulator: the shipping gateways on a virtual clock, over modelled edges, nodes, clients and network.
 *
 *   load ──▶ clients ──▶ gateway process 1…n: the tree of actors/gateway.ts ──▶ NodeHost 1…m
 *                              │     ▲
 *                              └ Network ┘  (node actors live once, in the process that rendezvous gives them)
 *
 * One thread, one clock, one scheduler; every purpose has its own seeded stream, and so has every fault, named by its
 * own text: taking one away moves no draw of another. The same spec gives the same run, bit for bit, and the
 * scheduler's hash over every message says so.
 *
 * A `Simulation` takes requests one by one, in order of arrival, so that a load of any length passes through without
 * being held; `simulate` does that for a load that is at hand. Memory grows with what is open, not with what was.
 *
 * Only node models know how long an answer will be. The composition stands here; edges in edge-models.ts, the network
 * in network.ts, faults in faults.ts, books in run-books.ts.
 */
import {
  GatewayRefs,
  type GatewaySettings,
  gatewayTree,
  type NodeSettings,
  nodeSpec,
} from "../actors/gateway.ts";
import type { GpuNodeEvent, GpuNodeMessage } from "../actors/gpu-node.ts";
import type {
  CircuitState,
  NodeId,
  RequestFacts,
  RequestRecord,
  SemanticPolicy,
} from "../actors/protocol.ts";
import type { RequestFinished } from "../actors/request.ts";
import type {
  Actor,
  ActorRef,
  AskOutcome,
  ChildSpec,
  Context,
  ReplyTo,
  RuntimeEvent,
  SupervisorSpec,
} from "../runtime/actor.ts";
import { type Clock, SimClock, type TimerHandle } from "../runtime/clock.ts";
import { Random } from "../runtime/random.ts";
import { SimScheduler } from "../runtime/sim-scheduler.ts";
import {
  type ActorSystem,
  createSystem,
  type Envelope,
  type SystemEvent,
  type SystemStats,
} from "../runtime/system.ts";
import {
  type KeyOptions,
  limitsOf,
  type Options,
  type OptionsInput,
  parseOptions,
} from "../transport/options.ts";
import { gatewaySettings, semanticPolicy } from "../transport/settings.ts";
import {
  type Body,
  type ClientSide,
  type DataPlane,
  type EdgeHost,
  type EdgeOptions,
  edgeDefaults,
  FrontModel,
  ScraperModel,
  SharedStore,
  StoreModel,
  UpstreamModel,
} from "./edge-models.ts";
import { checkFaults, type Fault, faultText, subjectText } from "./faults.ts";
import type { Histogram } from "./histogram.ts";
import type { Mail } from "./interposer.ts";
import { KV_BLOCK_TOKENS, type StepLaw } from "./laws.ts";
import { Network, type NetworkOptions, networkDefaults, type Peer } from "./network.ts";
import {
  type MakeNodeModel,
  NodeHost,
  type NodeObserver,
  type NodeTotals,
  noFaults,
  type SharedFault,
} from "./node-host.ts";
import { NodeWays } from "./node-ways.ts";
import { crashMail, Mortal, PlannedCrash } from "./planned-crash.ts";
import { ProcessClock } from "./process-clock.ts";
import { EmbedderModel, rightAnswerOf, vectorOf, wordOf } from "./question-vectors.ts";
import { type Measured, type OutcomeCounts, RunBooks, type SimulationSeries } from "./run-books.ts";
import type { Slo } from "./slo.ts";
import type { RunEvidence } from "./statistics.ts";
import type { TraceRequest } from "./trace-rows.ts";

/** One GPU node. */
export type SimulatedNode = {
  /** Default: node-1, node-2 … by position. */
  name?: string;
  law: StepLaw;
  /** Steps last so many times as long, always; default 1. */
  slowFactor?: number;
  /** Replaces the law's KV capacity, blocks of 16 tokens. */
  kvBlocks?: number;
  /** Default: one model that every request asks for, whatever the load names. */
  models?: readonly string[];
  /** What its metrics look like: vLLM's (default), or the JSON of the article. */
  metrics?: "vllm" | "article";
  /** Default: as many tokens as the KV memory holds; 0 = no prefix cache. */
  prefixCacheTokens?: number;
};

/** How clients behave; the defaults wait for ever and never ask twice. */
export type ClientOptions = {
  /** The deadline that clients send along, ms; default: none, so the gateway's own. */
  deadlineMs?: number;
  /** A client that has not its whole answer by then goes away, ms. */
  patienceMs?: number;
  /** How often a refused, failed or cut-off client asks again; default 0. */
  retriesMax?: number;
  /** Mean wait before that, doubled each time, ms; a gateway's retry-after is kept to. Default 1000. */
  retryMs?: number;
};

export type SimulationSpec = {
  nodes: readonly SimulatedNode[];
  /** Options of the gateways, as `headrace serve` takes them; its `nodes` are those above. */
  options?: OptionsInput;
  /** Gateway processes, 1…64; default 1. Clients spread over them evenly. */
  gateways?: number;
  /** Default 1. */
  seed?: number | string;
  faults?: readonly Fault[];
  clients?: ClientOptions;
  /** `leap` (default) is faster on stable batches, `steps` rounds every step. */
  mode?: "leap" | "steps";
  edges?: Partial<EdgeOptions>;
  network?: Partial<NetworkOptions>;
  /** With the shared store behind the caches; default: when the options name a Redis. */
  hasStore?: boolean;
  /** For `attainment`; latency limits only. */
  slo?: Slo;
  /** By arrival; default: everything. */
  measured?: Partial<Measured>;
  /** Tokens of a block of the load's `prefix`; others are not looked up in prefix caches. */
  prefixBlockTokens?: number;
  /** The request whose whole record is kept. */
  explain?: string;
  /** Told of every request that ends in a gateway, with the gateway's name. */
  onRecord?: (record: RequestRecord, gateway: string) => void;
  /** How long to go on after the last arrival while requests are open, µs; default: the longest request's time. */
  drainUsMax?: number;
  instruments?: Instruments;
};

/**
 * What checkers and canaries see of a run, and change in it, from outside: no part of a gateway. Absent instruments
 * cost nothing; those that only look change no bit of a run.
 */
export type Instruments = {
  /** Stands around an actor from its start; `path` begins with the gateway's name. Called for each incarnation. */
  wrap?: (path: string, actor: Actor<Mail>) => Actor<Mail>;
  /** A client sends; the facts may still be changed. */
  onSent?: (facts: RequestFacts, request: TraceRequest, gateway: string) => void;
  /** What a node's answer says, should it be kept. */
  textOf?: (facts: RequestFacts, request: TraceRequest) => string;
  onClientLeft?: (requestId: string) => void;
  /** All clients of a gateway lost their requests: `gateway_down`, or `internal` at a restart of its requests. */
  onClientsLost?: (gateway: string, code: string) => void;
  onEvent?: (event: SystemEvent | RuntimeEvent, gateway: string) => void;
  nodes?: NodeObserver;
  makeNodeModel?: MakeNodeModel;
};

/** What is left in one gateway process, as its actors and its edges say; plain data. */
export type ProcessAudit = {
  gateway: string;
  /** Of each actor's `describe`, by the actor's path below the gateway; absent: it did not answer. */
  descriptions: ReadonlyMap<string, unknown>;
  /** Attempts and bodies that the edges hold. */
  attempts: number;
  bodies: number;
  stats: SystemStats;
};

export type SimulatedNodeResult = NodeTotals & {
  name: string;
  law: string;
  slowFactor: number;
  /** Share of the measured time with work, and largest use of KV memory seen, 0..1. */
  utilization: number;
  kvPeak: number;
  kvBlocks: number;
  preemptions: number;
  /** Times its circuit opened. */
  ejections: number;
};

export type SimulationResult = {
  seed: string;
  /** Of every message handled: equal for equal runs. */
  hash: string;
  messages: number;
  /** From the first moment to the last, with the drain, and from there to the last arrival, µs. */
  simulatedUs: number;
  lastArrivalUs: number;
  /** Seconds of the load that count. */
  measuredSeconds: number;
  counts: OutcomeCounts;
  codes: Readonly<Record<string, number>>;
  /** Answered requests, µs. TPOT = (e2e − ttft) ÷ (output tokens − 1), of streams with two tokens or more. */
  ttftUs: Histogram;
  tpotUs: Histogram;
  e2eUs: Histogram;
  queueUs: Histogram;
  attainment?: number;
  /** Requests by the cache's part in them. */
  cache: Readonly<Record<string, number>>;
  /** Of the hits by meaning, those that another answer would have been right for; only a model can know. */
  wrongHits: number;
  attempts: number;
  retries: number;
  clientRetries: number;
  promptTokens: number;
  cachedTokens: number;
  outputTokens: number;
  nodes: SimulatedNodeResult[];
  gateways: { name: string; requests: number }[];
  series: SimulationSeries;
  evidence: RunEvidence;
  /** What must not happen: crashes of actors, broken promises; and messages lost, by reason. */
  crashes: string[];
  lateAttaches: number;
  deadLetters: Readonly<Record<string, number>>;
  faults: readonly string[];
  explained?: RequestRecord;
};

/** A spec that makes no sense; the message says what is wrong and what is accepted. */
export class SimulationError extends Error {
  override readonly name = "SimulationError";
}

const GATEWAYS_MAX = 64;
const NODES_MAX = 1024;
/** The gateways are up this long before the first arrival: they know their nodes, as a live one does. */
const ORIGIN_US = 1_000_000;
/** Between two looks at the nodes: so often a window, and not oftener than this. */
const MOMENTS_PER_WINDOW = 8;
const MOMENT_US = 1_000_000;
const MODEL = "model";
/** Prompt tokens that stand for the 1024 characters a gateway makes its affinity key of. */
const HEAD_TOKENS = 256;
const CRASHES_MAX = 20;
const decoder = new TextDecoder();

/** Runs a load that is at hand. Throws SimulationError and FaultError before anything runs. */
export function simulate(
  spec: SimulationSpec & { load: Iterable<TraceRequest> },
): SimulationResult {
  const { load, ...rest } = spec;
  const blockTokens = spec.prefixBlockTokens ?? prefixBlockTokensOf(load);
  const simulation = new Simulation({
    ...rest,
    ...(blockTokens === undefined ? {} : { prefixBlockTokens: blockTokens }),
  });
  for (const request of load) simulation.offer(request);
  return simulation.finish();
}

/** Of a load in memory: what its first request with a prefix says. */
function prefixBlockTokensOf(load: Iterable<TraceRequest>): number | undefined {
  if (!Array.isArray(load)) return undefined;
  return load.find(({ blockTokens }: TraceRequest) => blockTokens !== undefined)?.blockTokens;
}

/** One client and its request; a client that asks again is another one. */
type Client = {
  readonly requestId: string;
  readonly request: TraceRequest;
  readonly process: GatewayProcess;
  /** µs since the load began. */
  readonly arrivedUs: number;
  readonly tries: number;
  patience: TimerHandle | undefined;
  isFollowing: boolean;
  retryAfterMs: number | undefined;
};

export class Simulation {
  readonly clock = new SimClock();
  readonly scheduler: SimScheduler;
  readonly nodes: readonly NodeHost[];
  readonly #spec: SimulationSpec;
  readonly #options: Options;
  readonly #random: Random;
  readonly #books: RunBooks;
  readonly #processes: GatewayProcess[] = [];
  readonly #network: Network;
  readonly #store: SharedStore | undefined;
  readonly #clients = new Map<string, Client>();
  readonly #balancer: Random;
  readonly #retryRandom: Random;
  readonly #keys: readonly KeyOptions[];
  readonly #limits = new Map<KeyOptions | undefined, Options["defaultLimits"]>();
  readonly #activeFaults = new Set<Fault>();
  readonly #faultRandoms = new Map<Fault, Random>();
  readonly #circuits = new Map<NodeId, CircuitState>();
  readonly #ejections = new Map<NodeId, number>();
  /** Of the processes whose clock may go wrong. */
  readonly #ownClocks = new Map<string, ProcessClock>();
  readonly #doomed: Set<string> | undefined;
  readonly #busyUs: number[];
  readonly #measuredBusyUs: number[];
  #measuredUs = 0;
  #momentAtUs = 0;
  #following = 0;
  #requests = 0;
  #lastAtUs = 0;
  #isDraining = false;
  #clientRetries = 0;
  #wrongHits = 0;
  /** Of requests that have a hit by meaning, until its answer has come to the front. */
  readonly #rightAnswers = new Map<string, string>();
  readonly #policy: SemanticPolicy | undefined;
  #retriesPending = 0;
  #lateAttaches = 0;
  #lastId = 0;
  readonly #crashes: string[] = [];
  readonly #deadLetters = new Map<string, number>();
  #explained: RequestRecord | undefined;
  readonly #nextId = (): number => ++this.#lastId;

  constructor(spec: SimulationSpec) {
    const gateways = spec.gateways ?? 1;
    if (!Number.isInteger(gateways) || gateways < 1 || gateways > GATEWAYS_MAX) {
      throw new SimulationError(
        `gateways is ${gateways}; it must be a whole number from 1 to ${GATEWAYS_MAX}`,
      );
    }
    if (spec.nodes.length < 1 || spec.nodes.length > NODES_MAX) {
      throw new SimulationError(
        `${spec.nodes.length} nodes are given; accepted: 1 to ${NODES_MAX}`,
      );
    }
    const seed = spec.seed ?? 1;
    const names = spec.nodes.map(({ name }, index) => name ?? `node-${index + 1}`);
    const roots = Array.from({ length: gateways }, (_, index) => `gw-${index + 1}`);
    checkFaults(spec.faults ?? [], names, roots);
    this.#spec = spec;
    this.#doomed =
      spec.faults?.some(({ kind }) => kind === "actor") === true ? new Set() : undefined;
    this.#options = optionsOf(spec, names);
    this.#policy = semanticPolicy(this.#options);
    this.#keys = this.#options.keys;
    this.#random = new Random(seed).split("simulation");
    this.#balancer = this.#random.split("balancer");
    this.#retryRandom = this.#random.split("client retries");
    this.scheduler = new SimScheduler(this.clock, seed);
    this.#books = new RunBooks(
      { fromUs: spec.measured?.fromUs ?? 0, toUs: spec.measured?.toUs ?? Number.POSITIVE_INFINITY },
      spec.slo,
    );
    this.nodes = spec.nodes.map((node, index) => this.#makeNode(node, names[index] ?? ""));
    this.#busyUs = this.nodes.map(() => 0);
    this.#measuredBusyUs = this.nodes.map(() => 0);
    const hasStore = spec.hasStore ?? this.#options.cache.redis !== undefined;
    this.#store = hasStore ? new SharedStore() : undefined;
    if (!hasStore && spec.faults?.some(({ kind }) => kind === "store") === true) {
      throw new SimulationError(
        "a fault of the store is given, and there is none: options with cache.redis.url have one",
      );
    }
    this.#startProcesses(roots);
    this.#network = new Network(
      this.#processes,
      { ...networkDefaults, ...spec.network },
      this.clock,
      this.#random.split("network"),
    );
    for (const process of this.#processes) process.start(roots);
    for (const fault of spec.faults ?? []) this.#planFault(fault);
    this.scheduler.runUntil(ORIGIN_US);
    this.#momentAtUs = ORIGIN_US;
    this.#sampleLater();
  }

  /** Requests of clients that have no end yet. */
  get open(): number {
    return this.#clients.size + this.#retriesPending;
  }

  /** µs since the load began. */
  get nowUs(): number {
    return this.clock.nowUs() - ORIGIN_US;
  }

  /** Runs up to the request's arrival and sends it. Requests must come in order. Throws SimulationError. */
  offer(request: TraceRequest): void {
    if (request.atUs < this.nowUs) {
      throw new SimulationError(
        `request ${this.#requests + 1} arrives at ${request.atUs} µs, before ${this.nowUs} µs: a load must be in order`,
      );
    }
    this.scheduler.runUntil(ORIGIN_US + request.atUs);
    this.#lastAtUs = request.atUs;
    this.#send(request, `r${++this.#requests}`, 1);
  }

  /** Lets what is open end, and closes the books. */
  finish(): SimulationResult {
    this.#isDraining = true;
    const { timeouts } = this.#options;
    const untilUs =
      this.clock.nowUs() + (this.#spec.drainUsMax ?? Math.round(timeouts.totalMs * 2000));
    while (this.open > 0 && this.clock.nowUs() < untilUs) {
      this.scheduler.runUntil(Math.min(untilUs, this.clock.nowUs() + MOMENT_US));
    }
    for (const { arrivedUs } of this.#clients.values()) this.#books.unfinished(arrivedUs);
    return this.#result();
  }

  /** The client goes away, if its request is still open. */
  leave(requestId: string): void {
    const client = this.#clients.get(requestId);
    if (client !== undefined) this.#clientLeaves(client);
  }

  /** A connection from the gateway to the node, or to the process that has its actor, could be made. */
  isReachable(gateway: string, node: string): boolean {
    const process = this.#processes.find(({ root }) => root === gateway);
    return process?.isUp === true && process.ways.isOpen(node) && process.reaches(node);
  }

  /** Runs up to `atUs` of the load's time, as far as it is not past. */
  runUntil(atUs: number): void {
    if (atUs > this.nowUs) this.scheduler.runUntil(ORIGIN_US + atUs);
  }

  /** Asks every actor of every process that is up what it holds. Time stands still, and the run's hash goes on. */
  audit(): ProcessAudit[] {
    const audits = this.#processes.flatMap((process) => process.startAudit() ?? []);
    this.scheduler.runReady();
    return audits.map((finish) => finish());
  }

  /** Throws an Error that names the first broken invariant of an engine. O(open requests). */
  assertInvariants(): void {
    for (const node of this.nodes) node.assertInvariants();
  }

  // ---- building ---------------------------------------------------------------------------------------

  #makeNode(node: SimulatedNode, name: string): NodeHost {
    const { law, slowFactor = 1 } = node;
    const kvBlocks = node.kvBlocks ?? law.kvBlocks;
    const blockTokens = this.#spec.prefixBlockTokens ?? 0;
    const cacheTokens = node.prefixCacheTokens ?? kvBlocks * KV_BLOCK_TOKENS;
    const blocksMax = blockTokens === 0 ? 0 : Math.floor(cacheTokens / blockTokens);
    return new NodeHost(
      name,
      node.models ?? [MODEL],
      node.metrics ?? "vllm",
      {
        law,
        slowFactor,
        kvBlocks,
        mode: this.#spec.mode ?? "leap",
        ...(blocksMax === 0 ? {} : { prefix: { blockTokens, blocksMax } }),
      },
      this.clock,
      this.#spec.instruments,
    );
  }

  #startProcesses(roots: readonly string[]): void {
    const settings = gatewaySettings(this.#options);
    const nodes = new Map(this.nodes.map((node) => [node.name, node]));
    for (const root of roots) {
      const isAlone = roots.length === 1;
      this.#processes.push(
        new GatewayProcess(root, settings, {
          options: this.#options,
          edges: {
            ...edgeDefaults,
            connectUsMax: this.#options.timeouts.connectMs * 1000,
            ...this.#spec.edges,
          },
          time: this.clock,
          clock: this.#clockOf(root),
          doomed: this.#doomed,
          instruments: this.#spec.instruments ?? {},
          scheduler: this.scheduler,
          random: this.#random.split(root),
          nodes,
          store: this.#store,
          nextId: this.#nextId,
          send: isAlone ? undefined : (envelope) => this.#network.send(root, envelope),
          isConnected: (other) => this.#network.isConnected(root, other),
          silenceUs: this.#spec.network?.silenceUs ?? networkDefaults.silenceUs,
          clients: this.#clientSide(root),
          vectorOf: this.#policy === undefined ? undefined : (id) => this.#vectorOf(id),
          // Its new actor begins with a closed circuit, and does not say so.
          onNodeTaken: (node) => void this.#circuits.delete(node),
          onEvent: (event) => this.#onEvent(event, root),
        }),
      );
    }
  }

  /** Its own, where a fault may touch it: that costs a little at every timer. */
  #clockOf(root: string): Clock {
    const isTouched = this.#spec.faults?.some(
      (fault) => (fault.kind === "skew" || fault.kind === "drift") && fault.gateway === root,
    );
    if (isTouched !== true) return this.clock;
    const clock = new ProcessClock(this.clock);
    this.#ownClocks.set(root, clock);
    return clock;
  }

  // ---- clients ----------------------------------------------------------------------------------------

  #send(request: TraceRequest, requestId: string, tries: number): void {
    const nowUs = this.nowUs;
    const process = this.#balanced();
    this.#books.arrived(nowUs, request.inputTokens, request.outputTokens);
    if (process === undefined) {
      this.#books.lost(nowUs, "no_gateway");
      return;
    }
    const client: Client = {
      requestId,
      request,
      process,
      arrivedUs: nowUs,
      tries,
      patience: undefined,
      isFollowing: false,
      retryAfterMs: undefined,
    };
    this.#clients.set(requestId, client);
    const { patienceMs } = this.#spec.clients ?? {};
    if (patienceMs !== undefined) {
      client.patience = this.clock.schedule(Math.round(patienceMs * 1000), () =>
        this.#clientLeaves(client),
      );
    }
    const { instruments } = this.#spec;
    const facts = this.#facts(request, requestId, process);
    instruments?.onSent?.(facts, request, process.root);
    const text = instruments?.textOf?.(facts, request) ?? rightAnswerOf(request);
    process.submit(facts, bodyOf(request, facts, text), wordOf(request.question ?? ""));
  }

  #vectorOf(requestId: string): Float32Array | undefined {
    const client = this.#clients.get(requestId);
    return client && vectorOf(client.request, this.#spec.seed ?? 1);
  }

  /** Any process that is up; undefined when none is. */
  #balanced(): GatewayProcess | undefined {
    const [only] = this.#processes;
    if (this.#processes.length === 1) return only?.isUp === true ? only : undefined;
    const up = this.#processes.filter((process) => process.isUp);
    return up[this.#balancer.int(Math.max(1, up.length))];
  }

  #clientLeaves({ requestId, process }: Client): void {
    this.#spec.instruments?.onClientLeft?.(requestId);
    process.clientLeft(requestId);
  }

  #facts(request: TraceRequest, requestId: string, { root }: GatewayProcess): RequestFacts {
    const { timeouts, cache } = this.#options;
    const nowMs = (this.#ownClocks.get(root) ?? this.clock).nowUs() / 1000;
    const { deadlineMs = timeouts.requestMsDefault } = this.#spec.clients ?? {};
    const key = this.#keyOf(request);
    const model = this.#modelOf(request);
    const tenant = key?.tenant ?? "local";
    const facts: RequestFacts = {
      requestId,
      tenant,
      limitKey: key?.name ?? "local",
      limits: this.#limitsOf(key),
      weight: key?.weight ?? 1,
      priority: key?.priority ?? "standard",
      route: "chat",
      model,
      stream: true,
      cacheRead: true,
      cacheWrite: true,
      affinityKey: affinityKeyOf(request, requestId),
      promptTokens: Math.max(1, request.inputTokens),
      arrivedAtMs: nowMs,
      deadlineAtMs: nowMs + Math.min(deadlineMs, timeouts.totalMs),
    };
    if (!cache.enabled) facts.cacheBypass = "cache is off";
    else facts.cacheKey = cacheKeyOf(request.question ?? requestId, `${tenant} ${model}`);
    if (this.#policy !== undefined && request.cluster !== undefined) {
      facts.semantic = { scope: cacheKeyOf("scope", `${tenant} ${model}`), policy: this.#policy };
    }
    if (request.maxTokens !== undefined) facts.maxTokens = Math.max(1, request.maxTokens);
    if (request.session !== undefined) facts.session = request.session;
    return facts;
  }

  /** The key of the request's tenant; a tenant that the options do not name gets one by its name's hash. */
  #keyOf({ tenant, session }: TraceRequest): KeyOptions | undefined {
    if (this.#keys.length === 0) return undefined;
    const own = this.#keys.find((key) => key.tenant === tenant);
    return own ?? this.#keys[hash32(tenant ?? session ?? "", 0) % this.#keys.length];
  }

  #limitsOf(key: KeyOptions | undefined): Options["defaultLimits"] {
    let limits = this.#limits.get(key);
    if (limits === undefined) {
      limits = limitsOf(this.#options, key);
      this.#limits.set(key, limits);
    }
    return limits;
  }

  #modelOf({ model }: TraceRequest): string {
    const first = this.nodes[0]?.models[0] ?? MODEL;
    return model !== undefined && this.nodes.some(({ models }) => models.includes(model))
      ? model
      : first;
  }

  #clientSide(root: string): ClientSide {
    return {
      onAnswered: (requestId, answer) => {
        const right = this.#rightAnswers.get(requestId);
        this.#rightAnswers.delete(requestId);
        if (right !== undefined && decoder.decode(answer.body) !== right) this.#wrongHits++;
      },
      onFollowing: (requestId) => {
        const client = this.#clients.get(requestId);
        if (client === undefined || client.isFollowing) return;
        client.isFollowing = true;
        this.#following++;
      },
      onRefused: (requestId, _code, retryAfterMs) => {
        const client = this.#clients.get(requestId);
        if (client !== undefined) client.retryAfterMs = retryAfterMs;
      },
      onRequestsLost: () => this.#loseClients(root, "internal"),
      onLateAttach: () => this.#lateAttaches++,
    };
  }

  /** Their connections broke, or their request was forgotten: no record will tell of them. */
  #loseClients(root: string, code: string): void {
    this.#spec.instruments?.onClientsLost?.(root, code);
    for (const client of [...this.#clients.values()]) {
      if (client.process.root !== root) continue;
      this.#books.lost(client.arrivedUs, code);
      this.#close(client);
      this.#askAgain(client);
    }
  }

  #close(client: Client): void {
    this.#clients.delete(client.requestId);
    if (client.isFollowing) this.#following--;
    if (client.patience !== undefined) this.clock.cancel(client.patience);
  }

  #onFinished(record: RequestRecord, root: string): void {
    const { requestId } = record.facts;
    const client = this.#clients.get(requestId);
    this.#spec.onRecord?.(record, root);
    if (requestId === this.#spec.explain) this.#explained = record;
    if (client === undefined) return; // It went down with its gateway, as far as its client knows.
    this.#books.ended(client.arrivedUs, record);
    const right = rightAnswerOf(client.request);
    const isHit = record.cache === "hit_semantic" && record.outcome === "ok";
    if (isHit && right !== undefined && this.#books.isMeasured(client.arrivedUs))
      this.#rightAnswers.set(requestId, right);
    this.#close(client);
    if (record.outcome === "refused" || record.outcome === "failed") this.#askAgain(client);
  }

  #askAgain({ request, requestId, tries, retryAfterMs }: Client): void {
    const { retriesMax = 0, retryMs = 1000 } = this.#spec.clients ?? {};
    if (tries > retriesMax) return;
    let meanMs = retryMs;
    for (let i = 1; i < tries; i++) meanMs *= 2;
    const drawnMs = meanMs * (0.5 + this.#retryRandom.next());
    const waitUs = Math.round(Math.max(drawnMs, retryAfterMs ?? 0) * 1000);
    const base = tries === 1 ? requestId : requestId.slice(0, requestId.lastIndexOf("."));
    this.#retriesPending++;
    this.clock.schedule(waitUs, () => {
      this.#retriesPending--;
      this.#clientRetries++;
      this.#send(request, `${base}.${tries + 1}`, tries + 1);
    });
  }

  // ---- what the gateways report -----------------------------------------------------------------------

  #onEvent(event: SystemEvent | RuntimeEvent, root: string): void {
    this.#spec.instruments?.onEvent?.(event, root);
    switch (event.kind) {
      case "request.finished":
        return this.#onFinished((event as RequestFinished).record, root);
      case "gpu_node.circuit_changed":
        return this.#onCircuit(
          event as Extract<GpuNodeEvent, { kind: "gpu_node.circuit_changed" }>,
        );
      case "runtime.dead_letter": {
        const { letter } = event as Extract<SystemEvent, { kind: "runtime.dead_letter" }>;
        const name = `${letter.reason} ${letter.messageKind}`;
        this.#deadLetters.set(name, (this.#deadLetters.get(name) ?? 0) + 1);
        return;
      }
      case "runtime.crashed": {
        const { path, error } = event as Extract<SystemEvent, { kind: "runtime.crashed" }>;
        if (error instanceof PlannedCrash) return;
        const text = error instanceof Error ? (error.stack ?? error.message) : String(error);
        if (this.#crashes.length < CRASHES_MAX) this.#crashes.push(`${path}: ${text}`);
        return;
      }
    }
  }

  #onCircuit(event: Extract<GpuNodeEvent, { kind: "gpu_node.circuit_changed" }>): void {
    this.#circuits.set(event.node, event.to);
    if (event.to === "open") {
      this.#ejections.set(event.node, (this.#ejections.get(event.node) ?? 0) + 1);
    }
    if (event.to !== "half_open") {
      this.#books.mark(this.nowUs, `${event.node} circuit ${event.to} (${event.cause})`);
    }
  }

  // ---- looking ----------------------------------------------------------------------------------------

  #sampleLater(): void {
    const afterUs = Math.max(MOMENT_US, Math.round(this.#books.windowUs / MOMENTS_PER_WINDOW));
    this.clock.schedule(afterUs, () => {
      this.#sample();
      this.#sampleLater();
    });
  }

  /** Reads the nodes; changes nothing. */
  #sample(): void {
    const nowUs = this.nowUs;
    const spanUs = this.clock.nowUs() - this.#momentAtUs;
    this.#momentAtUs = this.clock.nowUs();
    const counts = !this.#isDraining && this.#books.isMeasured(nowUs);
    if (counts) this.#measuredUs += spanUs;
    let kvSum = 0;
    let kvMax = 0;
    let busySum = 0;
    let up = 0;
    let inflight = 0;
    this.nodes.forEach((node, index) => {
      const { kv } = node.snapshot();
      const busyUs = node.busyUs();
      const sinceUs = busyUs - (this.#busyUs[index] ?? 0);
      this.#busyUs[index] = busyUs;
      if (counts) this.#measuredBusyUs[index] = (this.#measuredBusyUs[index] ?? 0) + sinceUs;
      kvSum += kv;
      kvMax = Math.max(kvMax, kv);
      busySum += sinceUs / spanUs;
      if (node.isUp) up++;
      inflight += node.inflight;
    });
    let open = 0;
    let halfOpen = 0;
    for (const state of this.#circuits.values()) {
      if (state === "open") open++;
      else if (state === "half_open") halfOpen++;
    }
    const size = this.nodes.length;
    const moment = {
      queued: Math.max(0, this.#clients.size - this.#following - inflight),
      running: inflight,
      utilization: busySum / size,
      kv: kvSum / size,
      nodesUp: up,
      circuitsOpen: open,
      circuitsHalfOpen: halfOpen,
    };
    if (this.#isDraining) return;
    this.#books.moment(nowUs, moment, kvMax);
  }

  // ---- faults -----------------------------------------------------------------------------------------

  #planFault(fault: Fault): void {
    this.#faultRandoms.set(fault, this.#random.split(`fault ${faultText(fault)}`));
    this.clock.schedule(ORIGIN_US + fault.atUs - this.clock.nowUs(), () => this.#begin(fault));
    if (!("forUs" in fault) || fault.forUs === null) return;
    const endUs = ORIGIN_US + fault.atUs + fault.forUs;
    this.clock.schedule(endUs - this.clock.nowUs(), () => this.#end(fault));
  }

  #begin(fault: Fault): void {
    this.#books.mark(this.nowUs, subjectText(fault));
    this.#activeFaults.add(fault);
    switch (fault.kind) {
      case "crash":
        return this.#nodeOf(fault.node)?.crash();
      case "actor":
        this.#activeFaults.delete(fault);
        return this.#crashActor(fault.actor);
      case "skew":
        this.#activeFaults.delete(fault);
        return this.#ownClocks.get(fault.gateway)?.jump(fault.aheadUs);
      case "drift":
        return this.#setRate(fault.gateway);
      case "partition":
        return this.#block(fault, 1);
      case "reset-link":
        this.#activeFaults.delete(fault);
        return this.#network.reset(fault.from, fault.to);
      case "gateway":
        return this.#crashGateway(fault.gateway);
      case "leave":
        return this.#leave(fault);
      case "store":
        return this.#setStoreFault();
      default:
        return this.#setNodeFaults(fault.node);
    }
  }

  #end(fault: Fault): void {
    this.#books.mark(this.nowUs, `end of ${subjectText(fault)}`);
    this.#activeFaults.delete(fault);
    switch (fault.kind) {
      case "crash": {
        const isStillDown = this.#active("crash").some(({ node }) => node === fault.node);
        const law = this.#lawOf(fault.node);
        if (!isStillDown && law !== undefined) this.#nodeOf(fault.node)?.restart(law.startUpUs);
        return;
      }
      case "partition":
        return this.#block(fault, -1);
      case "gateway":
        return this.#restartGateway(fault.gateway);
      case "store":
        return this.#setStoreFault();
      case "drift":
        return this.#setRate(fault.gateway);
      case "reset-link":
      case "leave":
      case "actor":
      case "skew":
        return;
      default:
        return this.#setNodeFaults(fault.node);
    }
  }

  #active<K extends Fault["kind"]>(kind: K): Extract<Fault, { kind: K }>[] {
    const isOfKind = (fault: Fault): fault is Extract<Fault, { kind: K }> => fault.kind === kind;
    return [...this.#activeFaults].filter(isOfKind);
  }

  /** What is wrong with a node is what its active faults add up to. */
  #setNodeFaults(name: string): void {
    const ofNode = <T extends { node: string }>(faults: T[]) =>
      faults.filter(({ node }) => node === name);
    const shared = (fault: Fault & { share: number }): SharedFault => ({
      share: fault.share,
      random: this.#faultRandoms.get(fault) ?? this.#random,
    });
    this.#nodeOf(name)?.setFaults({
      ...noFaults,
      slowFactor: ofNode(this.#active("slow")).reduce((product, { factor }) => product * factor, 1),
      isHung: ofNode(this.#active("hang")).length > 0,
      isRefusing: ofNode(this.#active("refuse")).length > 0,
      kvShare: ofNode(this.#active("kv")).reduce((least, { share }) => Math.min(least, share), 1),
      errors: ofNode(this.#active("errors")).map((fault) => ({
        ...shared(fault),
        status: fault.status,
      })),
      cuts: ofNode(this.#active("cut")).map(shared),
    });
  }

  #block({ from, to, isOneWay }: Extract<Fault, { kind: "partition" }>, by: 1 | -1): void {
    this.#blockOneWay(from, to, by);
    if (!isOneWay) this.#blockOneWay(to, from, by);
  }

  #blockOneWay(from: string, to: string, by: 1 | -1): void {
    const sender = this.#processes.find(({ root }) => root === from);
    const receiver = this.#processes.find(({ root }) => root === to);
    if (sender !== undefined && receiver !== undefined) this.#network.block(from, to, by);
    else if (sender !== undefined) sender.ways.block(to, "to", by);
    else receiver?.ways.block(from, "from", by);
  }

  #setRate(root: string): void {
    const drifts = this.#active("drift").filter(({ gateway }) => gateway === root);
    this.#ownClocks.get(root)?.setRate(drifts.reduce((rate, { factor }) => rate * factor, 1));
  }

  /** A node's actor is found wherever it lives; of one that lives nowhere nothing crashes. */
  #crashActor(path: string): void {
    for (const process of this.#processes) {
      if (path.startsWith("nodes/")) process.crashActor(`${process.root}/${path}`);
      else if (path.startsWith(`${process.root}/`)) process.crashActor(path);
    }
  }

  #setStoreFault(): void {
    if (this.#store !== undefined) this.#store.fault = this.#active("store").at(-1)?.how ?? "none";
  }

  #crashGateway(root: string): void {
    const process = this.#processes.find((each) => each.root === root);
    if (process?.isUp !== true) return;
    process.crash();
    this.#network.processEnded(root);
    this.#loseClients(root, "gateway_down");
  }

  #restartGateway(root: string): void {
    const isStillDown = this.#active("gateway").some(({ gateway }) => gateway === root);
    const process = this.#processes.find((each) => each.root === root);
    if (isStillDown || process === undefined || process.isUp) return;
    process.start(this.#processes.filter(({ isUp }) => isUp).map((each) => each.root));
    this.#network.processStarted(root);
  }

  #leave(fault: Extract<Fault, { kind: "leave" }>): void {
    this.#activeFaults.delete(fault);
    const random = this.#faultRandoms.get(fault) ?? this.#random;
    for (const client of this.#clients.values()) {
      if (random.next() < fault.share) this.#clientLeaves(client);
    }
  }

  #nodeOf(name: string): NodeHost | undefined {
    return this.nodes.find((node) => node.name === name);
  }

  #lawOf(name: string): StepLaw | undefined {
    return this.#spec.nodes[this.nodes.findIndex((node) => node.name === name)]?.law;
  }

  // ---- the end ----------------------------------------------------------------------------------------

  #result(): SimulationResult {
    const books = this.#books;
    const { attainment } = books;
    return {
      seed: String(this.#spec.seed ?? 1),
      hash: this.scheduler.hash,
      messages: this.scheduler.handled,
      simulatedUs: this.nowUs,
      lastArrivalUs: this.#lastAtUs,
      measuredSeconds: books.measuredSeconds,
      counts: { ...books.counts },
      codes: Object.fromEntries(books.codes),
      ttftUs: books.ttftUs,
      tpotUs: books.tpotUs,
      e2eUs: books.e2eUs,
      queueUs: books.queueUs,
      ...(attainment === undefined ? {} : { attainment }),
      cache: Object.fromEntries(books.cache),
      wrongHits: this.#wrongHits,
      attempts: books.attempts,
      retries: books.retries,
      clientRetries: this.#clientRetries,
      promptTokens: books.promptTokens,
      cachedTokens: books.cachedTokens,
      outputTokens: books.outputTokens,
      nodes: this.nodes.map((node, index) => this.#nodeResult(node, index)),
      gateways: this.#processes.map(({ root, requests }) => ({ name: root, requests })),
      series: books.series(),
      evidence: books.evidence(),
      crashes: this.#crashes,
      lateAttaches: this.#lateAttaches,
      deadLetters: Object.fromEntries(this.#deadLetters),
      faults: (this.#spec.faults ?? []).map(faultText),
      ...(this.#explained === undefined ? {} : { explained: this.#explained }),
    };
  }

  #nodeResult(node: NodeHost, index: number): SimulatedNodeResult {
    const { kvBlocks, preemptionsTotal } = node.snapshot();
    const spec = this.#spec.nodes[index];
    return {
      ...node.totals,
      name: node.name,
      law: spec?.law.name ?? "",
      slowFactor: spec?.slowFactor ?? 1,
      utilization:
        this.#measuredUs === 0 ? 0 : (this.#measuredBusyUs[index] ?? 0) / this.#measuredUs,
      kvPeak: node.kvPeak,
      kvBlocks,
      preemptions: preemptionsTotal,
      ejections: this.#ejections.get(node.name) ?? 0,
    };
  }
}

// ---- one gateway process ------------------------------------------------------------------------------

type ProcessWorld = {
  options: Options;
  edges: EdgeOptions;
  /** True time, and what the process takes for it. */
  time: SimClock;
  clock: Clock;
  /** Paths of actors that throw at their next message; absent: none ever will. */
  doomed: Set<string> | undefined;
  instruments: Instruments;
  scheduler: SimScheduler;
  random: Random;
  nodes: ReadonlyMap<NodeId, NodeHost>;
  store: SharedStore | undefined;
  nextId: () => number;
  /** Absent: it has no peers. */
  send: ((envelope: Envelope) => "full" | "disconnected" | undefined) | undefined;
  isConnected: (root: string) => boolean;
  silenceUs: number;
  clients: ClientSide;
  /** What an embedder says of a request's question; undefined = there is none. */
  vectorOf: ((requestId: string) => Float32Array | undefined) | undefined;
  onNodeTaken: (node: NodeId) => void;
  onEvent: (event: SystemEvent | RuntimeEvent) => void;
};

/**
 * One process: an actor system with the shipping tree, and which node actors live in it. Of the processes that it
 * believes alive (itself and those it is connected to), the one that rendezvous ranks first for a node has its
 * actor; so when a peer goes, its nodes are taken over, and given back when it returns.
 */
class GatewayProcess implements Peer {
  readonly root: string;
  readonly ways = new NodeWays();
  /** Sent to it by clients, over all its lives. */
  requests = 0;
  readonly #settings: GatewaySettings;
  readonly #world: ProcessWorld;
  /** Peers believed alive. */
  readonly #alive = new Set<string>();
  readonly #owned = new Set<NodeId>();
  #life: Life | undefined;
  #lives = 0;

  constructor(root: string, settings: GatewaySettings, world: ProcessWorld) {
    this.root = root;
    this.#settings = settings;
    this.#world = world;
  }

  get isUp(): boolean {
    return this.#life !== undefined;
  }

  /** @param roots the processes that are up, this one among them or not */
  start(roots: readonly string[]): void {
    const { time, silenceUs } = this.#world;
    this.#alive.clear();
    for (const root of roots) if (root !== this.root) this.#alive.add(root);
    this.#owned.clear();
    for (const { node } of this.#settings.nodes) {
      if (this.#ownerOf(node) !== this.root) continue;
      this.#owned.add(node);
      this.#world.onNodeTaken(node);
    }
    const nodes = this.#settings.nodes.filter(({ node }) => this.#owned.has(node));
    this.#lives++;
    const settings = { ...this.#settings, nodes };
    const life = new Life(this.root, settings, this.#world, this.ways, this.#lives);
    this.#life = life;
    for (const { node } of this.#settings.nodes) life.refs.placeNode(node, this.#ownerOf(node));
    life.start();
    if (this.#lives === 1) return;
    // Whom it cannot reach by then is dead to it, whoever else may see it.
    time.schedule(silenceUs, () => {
      if (this.#life !== life) return;
      for (const root of this.#alive) if (!this.#world.isConnected(root)) this.#alive.delete(root);
      this.#replaceNodes();
    });
  }

  /** The actor throws at its next message. */
  crashActor(path: string): void {
    this.#life?.crashActor(path);
  }

  /** Undefined when it is down; else call the result once everything said has been handled. */
  startAudit(): (() => ProcessAudit) | undefined {
    return this.#life?.startAudit();
  }

  crash(): void {
    const life = this.#life;
    this.#life = undefined; // First: what it says while it ends, nobody hears.
    life?.end();
  }

  submit(facts: RequestFacts, body: Body, question: string): void {
    const life = this.#life;
    if (life === undefined) return;
    this.requests++;
    life.data.set(facts.requestId, body);
    life.system.tell(life.refs.requests, { kind: "request.submit", facts, question });
  }

  clientLeft(requestId: string): void {
    const life = this.#life;
    life?.system.tell(life.refs.requests, { kind: "request.client_left", requestId });
  }

  deliver(envelope: Envelope): void {
    this.#life?.system.deliver(envelope);
  }

  onLinkDown(root: string): void {
    this.#alive.delete(root);
    const prefix = `${root}/`;
    this.#life?.system.disconnected((path) => path.startsWith(prefix));
    this.#replaceNodes();
  }

  onLinkUp(root: string): void {
    if (this.#life === undefined) return;
    this.#alive.add(root);
    this.#replaceNodes();
  }

  /** The actor of the node is here, or in a process that it is connected to. */
  reaches(node: NodeId): boolean {
    const owner = this.#ownerOf(node);
    return owner === this.root || this.#world.isConnected(owner);
  }

  /** Takes and gives node actors as the processes alive ask for. */
  #replaceNodes(): void {
    const life = this.#life;
    if (life === undefined) return;
    for (const settings of this.#settings.nodes) {
      const { node } = settings;
      const owner = this.#ownerOf(node);
      if (owner === this.root && !this.#owned.has(node)) {
        this.#owned.add(node);
        this.#world.onNodeTaken(node);
        life.refs.placeNode(node, owner);
        life.spawnNode(settings);
      } else if (owner !== this.root) {
        if (this.#owned.delete(node)) life.system.stop(life.refs.node(node));
        life.refs.placeNode(node, owner);
      }
    }
  }

  #ownerOf(node: NodeId): string {
    let owner = this.root;
    let rank = hash32(`${node} ${this.root}`, 0);
    for (const root of this.#alive) {
      const other = hash32(`${node} ${root}`, 0);
      if (other < rank || (other === rank && root > owner)) continue;
      owner = root;
      rank = other;
    }
    return owner;
  }
}

/** From a start of a process to its end. */
class Life {
  readonly system: ActorSystem;
  readonly refs: GatewayRefs;
  readonly data: DataPlane = new Map();
  readonly #root: string;
  readonly #world: ProcessWorld;
  readonly #upstream: UpstreamModel;
  readonly #scraper: ScraperModel;
  readonly #start: () => void;
  #isOver = false;

  constructor(
    root: string,
    settings: GatewaySettings,
    world: ProcessWorld,
    ways: NodeWays,
    number: number,
  ) {
    const { time, clock, scheduler, edges, nodes, store, options, clients } = world;
    const random = world.random.split(`life ${number}`);
    const prefix = `${root}/`;
    const { send } = world;
    this.#root = root;
    this.#world = world;
    this.system = createSystem({
      scheduler,
      clock,
      random,
      nextId: world.nextId,
      ...(send === undefined
        ? {}
        : {
            remote: {
              route: (path) => !path.startsWith(prefix),
              send: (envelope) => (this.#isOver ? "disconnected" : send(envelope)),
            },
          }),
    });
    // What edges wait for is outside of the process: they keep true time.
    const host: EdgeHost = {
      clock: time,
      post: (to, message) => void this.system.tell(to, message),
      reply: (to, value) => this.system.reply(to, value),
    };
    this.refs = new GatewayRefs((path) => this.system.ref(path), settings.cacheShards, root);
    const upstream = new UpstreamModel(root, edges, host, this.data, nodes, ways);
    const scraper = new ScraperModel(
      { ...scrapeOptionsOf(options), scrapeUs: edges.scrapeUs },
      host,
      nodes,
      random.split("scraper"),
      ways,
    );
    const front = new FrontModel(this.data, clients);
    const { vectorOf: ask } = world;
    this.#upstream = upstream;
    this.#scraper = scraper;
    this.#start = () => {
      const tree = gatewayTree(settings, this.refs, {
        front: () => front,
        upstream: () => upstream,
        scraper: () => scraper,
        ...(store === undefined
          ? {}
          : { store: () => new StoreModel(store, edges.storeUs, host, random.split("store")) }),
        ...(ask === undefined ? {} : { embedder: () => new EmbedderModel(host, ask) }),
      });
      this.system.start(wrappedTree(tree, "", world), {
        onEvent: (event) => {
          if (!this.#isOver) world.onEvent(event);
        },
        onFatal: (error) => {
          throw error;
        },
      });
    };
  }

  start(): void {
    this.#start();
  }

  spawnNode(settings: NodeSettings): void {
    const parent = `${this.#root}/nodes`;
    const spec = nodeSpec(settings, this.refs);
    this.system.spawn(parent, wrappedChild<GpuNodeMessage>(spec, `${parent}/`, this.#world));
  }

  crashActor(path: string): void {
    if (!this.system.stats().cells.some((cell) => cell.path === path)) return;
    this.#world.doomed?.add(path);
    this.system.tell(this.system.ref<Mail>(path), crashMail); // Should no other come.
  }

  startAudit(): () => ProcessAudit {
    const descriptions = new Map<string, unknown>();
    const asked = this.system.stats().cells.flatMap(({ path }) => {
      const name = path.slice(this.#root.length + 1);
      const kind = describeKinds.get(name.split("/")[0] ?? "");
      return kind === undefined ? [] : [{ name, kind, ref: this.system.ref<Describe>(path) }];
    });
    const auditor = this.system.spawn(this.#root, {
      id: "audit",
      start: () => new Auditor(asked, descriptions),
      restart: "temporary",
    });
    return () => {
      this.system.stop(auditor);
      return {
        gateway: this.#root,
        descriptions,
        attempts: this.#upstream.inflight,
        bodies: this.data.size,
        stats: this.system.stats(),
      };
    };
  }

  end(): void {
    this.#isOver = true;
    this.#upstream.abortAll();
    this.#scraper.close();
    this.system.stopAll();
  }
}

type Describe = { kind: string; replyTo: ReplyTo<unknown> };
type Told = { kind: "audit.told"; name: string; outcome: AskOutcome<unknown> };

/** What each branch of the tree is asked. */
const describeKinds: ReadonlyMap<string, string> = new Map([
  ["cache", "cache.describe"],
  ["limiter", "limiter.describe"],
  ["nodes", "gpu_node.describe"],
  ["router", "router.describe"],
  ["requests", "request.describe"],
]);

const AUDIT_MS = 1000;

/** Asks all at once, and notes what they answer. */
class Auditor implements Actor<Told> {
  readonly #asked: readonly { name: string; kind: string; ref: ActorRef<Describe> }[];
  readonly #descriptions: Map<string, unknown>;

  constructor(
    asked: readonly { name: string; kind: string; ref: ActorRef<Describe> }[],
    descriptions: Map<string, unknown>,
  ) {
    this.#asked = asked;
    this.#descriptions = descriptions;
  }

  start(context: Context<Told>): void {
    for (const { name, kind, ref } of this.#asked) {
      context.ask<Describe, unknown>(
        ref,
        AUDIT_MS,
        (replyTo) => ({ kind, replyTo }),
        (outcome) => ({ kind: "audit.told", name, outcome }),
      );
    }
  }

  receive({ name, outcome }: Told): void {
    if (outcome.ok) this.#descriptions.set(name, outcome.value);
  }
}

/** The same tree, each actor with what is to stand around it. */
function wrappedTree(spec: SupervisorSpec, prefix: string, world: ProcessWorld): SupervisorSpec {
  if (world.instruments.wrap === undefined && world.doomed === undefined) return spec;
  const path = `${prefix}${spec.id}/`;
  const children = spec.children.map((child) =>
    "children" in child ? wrappedTree(child, path, world) : wrappedChild(child, path, world),
  );
  return { ...spec, children };
}

function wrappedChild<M extends Mail>(
  spec: ChildSpec<M>,
  prefix: string,
  { instruments, doomed }: ProcessWorld,
): ChildSpec<M> {
  const path = `${prefix}${spec.id}`;
  const start = (): Actor<M> => {
    let actor: Actor<Mail> = spec.start();
    if (instruments.wrap !== undefined) actor = instruments.wrap(path, actor);
    return doomed === undefined ? actor : new Mortal(actor, path, doomed);
  };
  return { ...spec, start };
}

// ---- from spec and load to what the actors know -------------------------------------------------------

function optionsOf(spec: SimulationSpec, names: readonly string[]): Options {
  const nodes = names.map((name, index) => ({
    name,
    url: `http://10.${index >> 8}.${index & 255}.1:8000`,
    models: spec.nodes[index]?.models ?? [MODEL],
  }));
  const parsed = parseOptions({ ...spec.options, nodes });
  if (parsed.ok) return parsed.options;
  const problems = parsed.problems.map(({ path, message }) => `${path}: ${message}`);
  throw new SimulationError(problems.join("\n"));
}

function scrapeOptionsOf({ scrape, health }: Options) {
  return {
    metricsIntervalMs: scrape.intervalMs,
    healthIntervalMs: health.intervalMs,
    jitterRatio: scrape.jitterRatio,
  };
}

function bodyOf(request: TraceRequest, facts: RequestFacts, text: string | undefined): Body {
  const outputTokens = Math.max(1, request.outputTokens);
  const { promptTokens, maxTokens } = facts;
  const notStorable = notStorableOf(request, facts, outputTokens);
  return {
    promptTokens,
    // A request that states no bound is held to its own length: no node refuses it for one that it never meant.
    maxTokens: maxTokens ?? outputTokens,
    outputTokens,
    prefix: request.prefix ?? [],
    blockTokens: request.blockTokens ?? 0,
    model: facts.model ?? MODEL,
    ...(notStorable === undefined ? {} : { notStorable }),
    ...(text === undefined ? {} : { text }),
  };
}

/** Why an answer is not kept. One to a text that nobody can ask again would only take up memory here. */
function notStorableOf(
  { question }: TraceRequest,
  { maxTokens, cacheKey, cacheBypass }: RequestFacts,
  outputTokens: number,
): string | undefined {
  if (cacheKey === undefined) return cacheBypass ?? "not shared";
  if (question === undefined) return "the load does not say what was asked";
  return maxTokens !== undefined && outputTokens >= maxTokens ? "finish_reason length" : undefined;
}

/** As a gateway makes it: of the session, else of the head of the prompt. */
function affinityKeyOf(
  { session, prefix, blockTokens, question }: TraceRequest,
  id: string,
): number {
  if (session !== undefined) return hash32(session, 1);
  if (prefix === undefined || prefix.length === 0 || blockTokens === undefined) {
    return hash32(question ?? id, 2);
  }
  const blocks = Math.min(prefix.length, Math.ceil(HEAD_TOKENS / blockTokens));
  // Ids are chained: the last one of the head names all of it.
  return hash32(String(prefix[blocks - 1]), 3);
}

/** In hexadecimal, 16 digits: equal texts of one scope, equal keys. */
function cacheKeyOf(text: string, scope: string): string {
  const lane = hash32(scope, 4);
  const high = hash32(text, lane).toString(16).padStart(8, "0");
  return (
    high +
    hash32(text, lane ^ 1)
      .toString(16)
      .padStart(8, "0")
  );
}

/** FNV-1a with a lane, finished by murmur3's mixer. */
function hash32(text: string, lane: number): number {
  let hash = (0x811c9dc5 ^ Math.imul(lane, 0x9e3779b1)) | 0;
  for (let index = 0; index < text.length; index++) {
    hash = Math.imul(hash ^ text.charCodeAt(index), 0x01000193);
  }
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}
