/**
 * What must hold in every run, whatever goes wrong, and watchers that see whether it does.
 *
 * They look from outside: at the messages that actors are told and the deeds of their turns (interposer.ts), at what
 * clients sent and got, at the engines themselves, and at the events; never at an actor's own counters alone, which
 * are asked only once, at the end, whether all is zero. Safety is checked after every message handled and every time
 * an engine moves; that no node idles while work waits, four times a simulated second; that all comes back, after the
 * faults. Each invariant reports its first violation; a run goes on after it.
 *
 * Nothing here changes a run: the same scenario with and without checkers has the same hash.
 */
import type { CacheDescription, CacheMessage } from "../actors/cache.ts";
import type { FrontCommand, UpstreamCommand } from "../actors/edges.ts";
import type { GpuNodeEvent, GpuNodeMessage, NodeDescription } from "../actors/gpu-node.ts";
import type { CircuitState, RequestFacts, RequestRecord } from "../actors/protocol.ts";
import type { AdmitReply, LimiterDescription, RateLimiterMessage } from "../actors/rate-limiter.ts";
import type { RequestDescription, RequestFinished, RequestMessage } from "../actors/request.ts";
import type { RouterDescription, RouterMessage } from "../actors/router.ts";
import type { Actor, RuntimeEvent } from "../runtime/actor.ts";
import type { SystemEvent } from "../runtime/system.ts";
import type { Fault } from "./faults.ts";
import type { NodeEvent, NodeRequest } from "./gpu-node-model.ts";
import { type Deed, Interposer, type Mail } from "./interposer.ts";
import { KeyLedger } from "./key-ledger.ts";
import { KV_BLOCK_TOKENS } from "./laws.ts";
import type { NodeHost, NodeObserver } from "./node-host.ts";
import { PlannedCrash } from "./planned-crash.ts";
import type { ScenarioRequest } from "./scenario.ts";
import type { Instruments, ProcessAudit } from "./simulator.ts";
import type { TraceRequest } from "./trace-rows.ts";

/** Every invariant, with what it says. */
export const invariants = {
  "one-answer": "every request gets exactly one final answer, by its deadline",
  "distinct-nodes": "attempts of a request go to distinct nodes, and to no more than allowed",
  "no-retry-after-token": "no attempt begins after the first token was out",
  "circuit-moves": "circuits make legal moves only, and give no lease while open",
  "returns-to-zero": "leases, queues, reservations, flights, bodies and work return to none",
  "rate-limit": "a key is admitted up to rate · time + burst, and not refused below it",
  "cache-identity": "no answer crosses tenant, model, system prompt, parameters or question",
  "cache-truth": "a cached answer is one that a node really gave, unchanged",
  "kv-blocks": "KV blocks used + free = total, and only requests that are there use any",
  "idle-node": "work does not wait while a node that could take it idles",
  recovers: "after the faults every circuit closes, every node has one actor, and all is served",
  "no-crash": "no actor crashes by itself, and no message is lost where nothing was broken",
} as const satisfies Record<string, string>;

/** Name of an invariant. */
export type Invariant = keyof typeof invariants;

export type Violation = {
  invariant: Invariant;
  /** Of the load's time. */
  atMs: number;
  detail: string;
};

/** What a run went through: a check that never had anything to check proves nothing. */
export type Coverage = Record<(typeof covered)[number], number>;

export const covered = [
  "hits",
  "joins",
  "retries",
  "refusals",
  "broken streams",
  "clients left",
  "circuits opened",
  "circuits closed",
  "queued",
  "preemptions",
  "leases expired",
  "node actors begun anew",
  "actor restarts",
] as const;

export type CheckerOptions = {
  attemptsMax: number;
  halfOpenPermits: number;
  cachedTokenWeight: number;
  /** Of the load's time, µs; asked whenever something is judged. */
  nowUs: () => number;
  /** What was sent, by the request that the simulator was given. */
  sent: ReadonlyMap<TraceRequest, ScenarioRequest>;
  /** Kinds of faults that a run has: some lose messages, and some move clocks. */
  faults: readonly Fault[];
  /** Name of the tenant where no keys are configured. */
  tenant: string | undefined;
  /** When nothing goes wrong any more, and when all must be well again, µs of the load's time. */
  quietFromUs: number;
  recoveredByUs: number;
};

/** Beyond a request's deadline until its end is known everywhere: the front of a held-up lookup has no deadline yet. */
const DEADLINE_MARGIN_MS = 5000;
/** What lives on after a process died: leases, for 30 s. */
const LEASE_TTL_US = 30_000_000;
/** How long work may wait beside an idle node: while leases of the dead may still be held, and else. */
const IDLE_US_MAX = 40_000_000;
const IDLE_US_MAX_QUIET = 2_000_000;
/** How long a node may go on with what is over. */
const NOBODY_US_MAX = 1_000_000;
/** A deadline shorter than this may pass on a well but slow node. */
const SERVED_MS_MIN = 5000;
const DETAIL_MAX = 300;

type KnownMail =
  | UpstreamCommand
  | FrontCommand
  | RequestMessage
  | RouterMessage
  | GpuNodeMessage
  | RateLimiterMessage
  | CacheMessage;

/** A request as its client, and those who watch it, know it. */
type Watched = {
  readonly id: string;
  readonly facts: RequestFacts;
  readonly gateway: string;
  readonly sent: ScenarioRequest | undefined;
  client: "waiting" | "answered" | "refused" | "reading" | "left" | "lost";
  flightId: string | undefined;
  finished: number;
  finishedUs: number;
  /** Nodes that the gateway began attempts on, and nodes that got one. */
  readonly tried: Set<string>;
  readonly submitted: Set<string>;
  attempts: number;
  isCommitted: boolean;
  /** Asked for a node and not placed or refused yet, since then; by the gateway's asks. */
  choosing: { sinceUs: number; tried: readonly string[] } | undefined;
};

/** A node's actor, from its start. */
type WatchedNode = {
  readonly node: string;
  circuit: CircuitState;
  isHealthy: boolean;
  readonly leases: Set<string>;
  /** Leases given while half open, without a result so far. */
  readonly trials: Set<string>;
};

export class Checkers {
  readonly violations: Violation[] = [];
  readonly coverage: Coverage;
  readonly instruments: Instruments;
  readonly #options: CheckerOptions;
  readonly #requests = new Map<string, Watched>();
  /** Actors of nodes that live, by path. */
  readonly #nodes = new Map<string, WatchedNode>();
  readonly #ledgers = new Map<string, Map<string, KeyLedger>>();
  readonly #engines: EngineWatch;
  /** Texts that nodes gave, by the request that they gave them to. */
  readonly #given = new Set<string>();
  /** Requests whose bodies and answers have left the front. */
  readonly #forgotten = new Set<string>();
  readonly #idleSinceUs = new Map<string, number>();
  /** Messages may be lost, or come after their deadline by the receiver's clock. */
  readonly #losesMessages: boolean;
  #late = 0;

  constructor(options: CheckerOptions) {
    this.#options = options;
    this.coverage = Object.fromEntries(covered.map((name) => [name, 0])) as Coverage;
    this.#losesMessages = options.faults.some(({ kind }) =>
      ["gateway", "actor", "partition", "reset-link", "skew", "drift"].includes(kind),
    );
    this.#engines = new EngineWatch((detail) => this.#report("kv-blocks", detail));
    this.instruments = {
      wrap: (path, actor) => this.#wrap(path, actor),
      onSent: (facts, request, gateway) => this.#onSent(facts, request, gateway),
      textOf: (facts, request) => this.#textOf(facts, request),
      onClientLeft: (requestId) => this.#onClientLeft(requestId),
      onClientsLost: (gateway, code) => this.#onClientsLost(gateway, code),
      onEvent: (event, gateway) => this.#onEvent(event, gateway),
      nodes: {
        onSubmitted: (node, request) => {
          this.#engines.onSubmitted(node, request);
          this.#onSubmitted(node.name, request.id);
        },
        onCancelled: (node, id, isOrphan) => this.#engines.onCancelled(node, id, isOrphan),
        onNodeEvent: (node, event) => {
          this.#engines.onNodeEvent(node, event);
          if (event.kind === "finished") this.#onGiven(event.id);
          if (event.kind === "preempted") this.coverage.preemptions++;
        },
        onSettled: (node) => this.#engines.onSettled(node),
      },
    };
  }

  #report(invariant: Invariant, detail: string): void {
    if (this.violations.some((violation) => violation.invariant === invariant)) return;
    const atMs = this.#options.nowUs() / 1000;
    this.violations.push({ invariant, atMs, detail: detail.slice(0, DETAIL_MAX) });
  }

  // ---- clients ------------------------------------------------------------------------------------------

  #onSent(facts: RequestFacts, request: TraceRequest, gateway: string): void {
    const sent = this.#options.sent.get(request);
    if (sent !== undefined) {
      facts.cacheRead = sent.cacheRead;
      facts.cacheWrite = sent.cacheWrite;
      facts.stream = sent.stream;
    }
    this.#requests.set(facts.requestId, {
      id: facts.requestId,
      facts: { ...facts },
      gateway,
      sent,
      client: "waiting",
      flightId: undefined,
      finished: 0,
      finishedUs: 0,
      tried: new Set(),
      submitted: new Set(),
      attempts: 0,
      isCommitted: false,
      choosing: undefined,
    });
  }

  /** Says whose answer it is. */
  #textOf(facts: RequestFacts, request: TraceRequest): string {
    return JSON.stringify([facts.requestId, this.#identityOf(this.#options.sent.get(request))]);
  }

  /** Everything that may change an answer, as the scenario has it and not as any gateway keyed it. */
  #identityOf(sent: ScenarioRequest | undefined): string {
    if (sent === undefined) return "";
    const { tenant, model, system, params, text } = sent;
    return JSON.stringify([this.#options.tenant ?? tenant, model, system, params, text]);
  }

  #onClientLeft(requestId: string): void {
    const request = this.#requests.get(requestId);
    if (request?.client !== "waiting" && request?.client !== "reading") return;
    if (request.finished > 0) return;
    request.client = "left";
    this.coverage["clients left"]++;
  }

  /** Every open request of the gateway is over for its client. */
  #onClientsLost(gateway: string, _code: string): void {
    for (const request of this.#requests.values()) {
      if (request.gateway !== gateway || request.finished > 0) continue;
      request.choosing = undefined;
      request.client = "lost";
    }
  }

  #onFront(command: FrontCommand): void {
    if (command.kind === "front.forget") this.#forgotten.add(command.requestId);
    if (command.kind === "front.forget" || command.kind === "front.requests_lost") return;
    const request = this.#requests.get(command.requestId);
    if (request === undefined) {
      return this.#report(
        "one-answer",
        `${command.kind} for ${command.requestId}, which nobody sent`,
      );
    }
    if (request.client === "left" || request.client === "lost") return; // Nobody is there to be told.
    if (request.client !== "waiting") {
      const { id, client } = request;
      return this.#report("one-answer", `${id} is ${client} already, and gets ${command.kind}`);
    }
    switch (command.kind) {
      case "front.refuse":
        request.client = "refused";
        this.coverage.refusals++;
        return;
      case "front.answer":
        request.client = "answered";
        this.coverage.hits++;
        return this.#onHit(request, new TextDecoder().decode(command.answer.body));
      case "front.attach":
        request.client = "reading";
        request.flightId = command.flightId;
        return this.#onAttached(request, command.flightId);
    }
  }

  #onHit(request: Watched, text: string): void {
    let said: unknown;
    try {
      said = JSON.parse(text);
    } catch {
      said = undefined;
    }
    const [from, identity] = Array.isArray(said) ? said : [undefined, undefined];
    if (!this.#given.has(text)) {
      return this.#report("cache-truth", `${request.id} is answered ${text}, which no node gave`);
    }
    const own = this.#identityOf(request.sent);
    if (identity === own) return;
    this.#report(
      "cache-identity",
      `${request.id} asked ${own} and got ${from}'s answer to ${identity}`,
    );
  }

  #onAttached(request: Watched, flightId: string): void {
    const flight = this.#requests.get(flightId);
    if (flight === undefined) {
      return this.#report(
        "one-answer",
        `${request.id} is to read ${flightId}, which is no request`,
      );
    }
    flight.isCommitted = true;
    if (this.#forgotten.has(flightId)) {
      this.#report("one-answer", `${request.id} is to read ${flightId}, whose bytes are forgotten`);
    }
    if (flight === request) return;
    this.coverage.joins++;
    const [own, other] = [this.#identityOf(request.sent), this.#identityOf(flight.sent)];
    if (own === other) return;
    this.#report("cache-identity", `${request.id} asked ${own} and joined ${flightId}: ${other}`);
  }

  // ---- attempts -----------------------------------------------------------------------------------------

  #onUpstream(command: UpstreamCommand): void {
    if (command.kind !== "upstream.start") return;
    const { requestId, node, attempt } = command;
    const request = this.#requests.get(requestId);
    if (request === undefined) return;
    if (attempt > 1) this.coverage.retries++;
    if (request.isCommitted) {
      this.#report(
        "no-retry-after-token",
        `attempt ${attempt} of ${requestId} on ${node} begins after its first token`,
      );
    }
    if (request.tried.has(node)) {
      this.#report("distinct-nodes", `${requestId} is tried on ${node} twice`);
    }
    request.tried.add(node);
    if (++request.attempts > this.#options.attemptsMax) {
      this.#report("distinct-nodes", `${requestId} has ${request.attempts} attempts`);
    }
  }

  /** As the node itself sees it. */
  #onSubmitted(node: string, leaseId: string): void {
    const request = this.#requests.get(leaseId.slice(0, leaseId.lastIndexOf("#")));
    if (request === undefined) return; // A probe.
    if (request.submitted.has(node)) {
      this.#report("distinct-nodes", `${node} gets ${request.id} twice`);
    }
    request.submitted.add(node);
  }

  #onGiven(leaseId: string): void {
    const request = this.#requests.get(leaseId.slice(0, leaseId.lastIndexOf("#")));
    if (request === undefined) return;
    this.#given.add(JSON.stringify([request.id, this.#identityOf(request.sent)]));
  }

  #onRequests(message: RequestMessage, deeds: readonly Deed[]): void {
    switch (message.kind) {
      case "upstream.first_token": {
        const request = this.#requests.get(
          message.leaseId.slice(0, message.leaseId.lastIndexOf("#")),
        );
        if (request !== undefined) request.isCommitted = true;
        break;
      }
      case "request.chosen": {
        const request = this.#requests.get(message.requestId);
        if (request !== undefined) request.choosing = undefined;
        if (message.outcome.ok && message.outcome.value.queuedMs > 0) this.coverage.queued++;
        break;
      }
    }
    for (const deed of deeds) {
      if (deed.op === "ask") this.#onAsked(deed.message as KnownMail);
      else if (deed.op === "tell") this.#onTold(deed.message as KnownMail);
    }
  }

  #onAsked(message: KnownMail): void {
    if (message.kind !== "router.choose") return;
    const request = this.#requests.get(message.facts.requestId);
    if (request === undefined) return;
    request.choosing = { sinceUs: this.#options.nowUs(), tried: message.tried };
  }

  #onTold(message: KnownMail): void {
    if (message.kind !== "router.cancel") return;
    const request = this.#requests.get(message.requestId);
    if (request !== undefined) request.choosing = undefined;
  }

  // ---- nodes --------------------------------------------------------------------------------------------

  #onNode(watched: WatchedNode, message: Mail | undefined, deeds: readonly Deed[]): void {
    const circuitBefore = watched.circuit;
    const known = message as KnownMail | undefined;
    for (const deed of deeds) {
      if (deed.op === "emit") this.#onNodeEmitted(watched, deed.event as GpuNodeEvent);
    }
    switch (known?.kind) {
      case "gpu_node.acquire": {
        const isGranted = deeds.some(
          (deed) => deed.op === "reply" && (deed.value as { kind?: string }).kind === "granted",
        );
        if (isGranted) this.#onGranted(watched, known.leaseId, circuitBefore);
        return;
      }
      case "gpu_node.first_token":
        watched.trials.delete(known.leaseId);
        return;
      case "gpu_node.release":
        watched.leases.delete(known.leaseId);
        watched.trials.delete(known.leaseId);
        return;
    }
  }

  #onGranted(watched: WatchedNode, leaseId: string, circuit: CircuitState): void {
    if (watched.leases.has(leaseId)) return; // Asked for again.
    watched.leases.add(leaseId);
    const { node } = watched;
    if (circuit === "open") {
      return this.#report(
        "circuit-moves",
        `${node} gives ${leaseId} a lease while its circuit is open`,
      );
    }
    if (circuit !== "half_open") return;
    watched.trials.add(leaseId);
    if (watched.trials.size <= this.#options.halfOpenPermits) return;
    const { size } = watched.trials;
    this.#report("circuit-moves", `${node}, half open, has ${size} calls without a result`);
  }

  #onNodeEmitted(watched: WatchedNode, event: GpuNodeEvent): void {
    switch (event.kind) {
      case "gpu_node.circuit_changed": {
        const { from, to, cause, node } = event;
        const isLegal = legalMoves.get(`${from} ${to}`)?.includes(cause) === true;
        if (!isLegal || from !== watched.circuit) {
          this.#report(
            "circuit-moves",
            `${node} goes from ${from} to ${to} for ${cause}, and was ${watched.circuit}`,
          );
        }
        watched.circuit = to;
        watched.trials.clear();
        if (to === "open") this.coverage["circuits opened"]++;
        if (to === "closed") this.coverage["circuits closed"]++;
        return;
      }
      case "gpu_node.health_changed":
        watched.isHealthy = event.healthy;
        return;
      case "gpu_node.lease_expired":
        watched.leases.delete(event.leaseId);
        watched.trials.delete(event.leaseId);
        this.coverage["leases expired"]++;
        return;
      case "gpu_node.owner_freed":
        watched.leases.clear(); // Those of another owner are held on; they are only counted less strictly.
        watched.trials.clear();
        return;
    }
  }

  // ---- limits -------------------------------------------------------------------------------------------

  #onLimiter(
    path: string,
    message: RateLimiterMessage,
    deeds: readonly Deed[],
    nowMs: number,
  ): void {
    const ledgers = this.#ledgers.get(path);
    if (ledgers === undefined) return;
    switch (message.kind) {
      case "limiter.admit": {
        const reply = deeds.find((deed) => deed.op === "reply");
        const request = this.#requests.get(message.requestId);
        if (reply?.op !== "reply" || request === undefined) return;
        const { limitKey, limits } = request.facts;
        let ledger = ledgers.get(limitKey);
        if (ledger === undefined) {
          ledger = new KeyLedger(limits, this.#options.cachedTokenWeight);
          ledgers.set(limitKey, ledger);
        }
        const problem = ledger.admitted(request.facts, reply.value as AdmitReply, message, nowMs);
        if (problem !== undefined) this.#report("rate-limit", `${request.id}: ${problem}`);
        return;
      }
      case "limiter.settle": {
        const limitKey = this.#requests.get(message.requestId)?.facts.limitKey ?? "";
        return ledgers.get(limitKey)?.settled(message, nowMs);
      }
      case "limiter.owner_restarted":
        for (const ledger of ledgers.values()) ledger.refundAll(nowMs);
        return;
      case "limiter.describe":
        return;
      default:
        for (const ledger of ledgers.values()) ledger.lapse(nowMs);
    }
  }

  // ---- events -------------------------------------------------------------------------------------------

  #onEvent(event: SystemEvent | RuntimeEvent, gateway: string): void {
    switch (event.kind) {
      case "request.finished":
        return this.#onFinished((event as RequestFinished).record, gateway);
      case "runtime.crashed": {
        const { path, error, messageKind } = event as Extract<
          SystemEvent,
          { kind: "runtime.crashed" }
        >;
        if (error instanceof PlannedCrash) return;
        const text = error instanceof Error ? (error.stack ?? error.message) : String(error);
        return this.#report("no-crash", `${path} at ${messageKind}: ${text.replace(/\s+/g, " ")}`);
      }
      case "runtime.start_failed":
      case "runtime.stop_failed":
      case "runtime.escalated":
      case "runtime.parked": {
        const { path } = event as Extract<SystemEvent, { kind: "runtime.parked" }>;
        return this.#report("no-crash", `${event.kind} of ${path}`);
      }
      case "runtime.restarted":
        this.coverage["actor restarts"]++;
        return;
      case "cache.flight_lapsed":
      case "limiter.reservations_lapsed":
        // The net under a leak: whoever should have ended it is in the same process, and no message is lost there.
        return this.#report("returns-to-zero", `${gateway}: ${JSON.stringify(event)}`);
      case "runtime.dead_letter": {
        const { letter } = event as Extract<SystemEvent, { kind: "runtime.dead_letter" }>;
        if (this.#losesMessages) return;
        const { messageKind, to, reason } = letter;
        return this.#report("no-crash", `${messageKind} to ${to} is lost: ${reason}`);
      }
    }
  }

  #onFinished(record: RequestRecord, gateway: string): void {
    const { requestId } = record.facts;
    const request = this.#requests.get(requestId);
    if (request === undefined) {
      return this.#report("one-answer", `${requestId} ended, and nobody sent it`);
    }
    request.choosing = undefined;
    request.finishedUs = this.#options.nowUs();
    if (++request.finished > 1) this.#report("one-answer", `${requestId} ended twice`);
    if (request.gateway !== gateway) this.#report("one-answer", `${requestId} ended in ${gateway}`);
    if (record.code === "stream_broken") this.coverage["broken streams"]++;
    const { deadlineAtMs, arrivedAtMs } = record.facts;
    const lateMs = record.endedMs - (deadlineAtMs - arrivedAtMs);
    if (lateMs > DEADLINE_MARGIN_MS && !this.#hasSkew()) {
      this.#report("one-answer", `${requestId} ended ${lateMs} ms after its deadline`);
    }
    if (request.client === "lost") return;
    this.#checkRecovered(request, record);
  }

  #hasSkew(): boolean {
    return this.#options.faults.some(({ kind }) => kind === "skew" || kind === "drift");
  }

  /** Long after the faults every request is served, or refused by its own key's limits. */
  #checkRecovered(request: Watched, record: RequestRecord): void {
    if ((request.sent?.atMs ?? 0) * 1000 < this.#options.recoveredByUs) return;
    this.#late++;
    const isOwnLimit = /^(rate_limit|quota|request_too_large)/.test(record.code ?? "");
    const { deadlineAtMs, arrivedAtMs } = record.facts;
    const isTooShort =
      deadlineAtMs - arrivedAtMs < SERVED_MS_MIN && record.endedMs >= deadlineAtMs - arrivedAtMs;
    if (record.outcome === "ok" || isOwnLimit || isTooShort) return;
    this.#report(
      "recovers",
      `${request.id}, sent when all should be well again, ended with ${record.outcome} ${record.code}`,
    );
  }

  // ---- what is looked at from time to time, and at the end ------------------------------------------------

  /** Call four times a simulated second. */
  onTick(
    nodes: readonly NodeHost[],
    isReachable: (gateway: string, node: string) => boolean,
  ): void {
    const nowUs = this.#options.nowUs();
    const isQuiet = nowUs > this.#options.quietFromUs + LEASE_TTL_US;
    const boundUs = isQuiet ? IDLE_US_MAX_QUIET : IDLE_US_MAX;
    for (const { node, id } of this.#engines.heard()) {
      const request = this.#requests.get(id.slice(0, id.lastIndexOf("#")));
      if (request === undefined || request.finished === 0) continue;
      const sinceUs = nowUs - request.finishedUs;
      if (sinceUs < NOBODY_US_MAX) continue;
      this.#report("returns-to-zero", `${node} still works on ${id}, over ${sinceUs / 1e6} s ago`);
    }
    const waiting = [...this.#requests.values()].filter(({ choosing }) => choosing !== undefined);
    for (const request of waiting) {
      const { choosing, id, facts, gateway } = request;
      const key = id;
      const idle = nodes.find(
        (node) =>
          node.inflight === 0 &&
          node.isReachable &&
          facts.model !== undefined &&
          node.models.includes(facts.model) &&
          choosing?.tried.includes(node.name) === false &&
          isReachable(gateway, node.name) &&
          this.#mayTake(node.name),
      );
      if (idle === undefined) {
        this.#idleSinceUs.delete(key);
        continue;
      }
      const sinceUs = this.#idleSinceUs.get(key) ?? nowUs;
      this.#idleSinceUs.set(key, sinceUs);
      const waitedUs = nowUs - Math.max(sinceUs, choosing?.sinceUs ?? nowUs);
      if (waitedUs < boundUs) continue;
      this.#report(
        "idle-node",
        `${id} has waited ${(waitedUs / 1e6).toFixed(1)} s in ${gateway} while ${idle.name} idles`,
      );
    }
    for (const id of this.#idleSinceUs.keys()) {
      if (this.#requests.get(id)?.choosing === undefined) this.#idleSinceUs.delete(id);
    }
  }

  #mayTake(node: string): boolean {
    for (const watched of this.#nodes.values()) {
      if (watched.node === node && watched.circuit === "closed" && watched.isHealthy) return true;
    }
    return false;
  }

  /** When all must be well again. */
  onRecoveryDue(audits: readonly ProcessAudit[], nodes: readonly NodeHost[]): void {
    for (const node of nodes) {
      if (!node.isReachable) this.#report("recovers", `${node.name} does not take connections`);
      const actors = audits.flatMap(({ gateway, descriptions }) => {
        const description = descriptions.get(`nodes/${node.name}`);
        return description === undefined ? [] : [{ gateway, description }];
      });
      if (actors.length !== 1) {
        const where = actors.map(({ gateway }) => gateway).join(", ");
        this.#report("recovers", `${node.name} has ${actors.length} actors: ${where}`);
      }
      for (const { description } of actors) {
        const { circuit, health, snapshot } = description as NodeDescription;
        if (circuit.state === "closed" && snapshot.healthy) continue;
        this.#report(
          "recovers",
          `${node.name} is ${circuit.state} for ${Math.round(circuit.sinceMs)} ms (${circuit.cause}), health ${health.detail}`,
        );
      }
    }
    for (const { gateway, descriptions } of audits) {
      const router = descriptions.get("router") as RouterDescription | undefined;
      for (const node of nodes) {
        const isKnown = router?.pools.some((pool) => pool.nodes.includes(node.name)) === true;
        if (!isKnown)
          this.#report("recovers", `the router of ${gateway} does not know ${node.name}`);
      }
    }
  }

  /** When nothing runs any more, and nothing has gone wrong for longer than a lease lives. */
  onEnd(audits: readonly ProcessAudit[], nodes: readonly NodeHost[], open: number): void {
    if (open > 0) this.#report("one-answer", `${open} clients still wait`);
    for (const request of this.#requests.values()) this.#checkEnded(request);
    for (const node of nodes) {
      if (node.inflight > 0) this.#report("returns-to-zero", `${node.name} runs ${node.inflight}`);
      this.#engines.onIdle(node);
    }
    for (const audit of audits) this.#checkZero(audit);
    if (audits.length === 0) this.#report("recovers", "no gateway is up at the end");
    if (this.#late === 0) this.#report("recovers", "no request was sent after the faults");
  }

  #checkEnded({ id, client, finished, gateway }: Watched): void {
    if (client === "waiting") this.#report("one-answer", `${id} in ${gateway} got no answer`);
    if (client === "lost") return;
    if (finished === 0) this.#report("one-answer", `${id} in ${gateway} never ended (${client})`);
  }

  #checkZero({ gateway, descriptions, attempts, bodies, stats }: ProcessAudit): void {
    const need = (what: string, figure: number | undefined) => {
      if (figure === 0) return;
      this.#report("returns-to-zero", `${gateway}: ${what} ${figure ?? "unknown"}`);
    };
    need("attempts", attempts);
    need("bodies", bodies);
    need("asks open", stats.asks);
    need("actors parked", stats.parked);
    for (const { path, mailboxDepth } of stats.cells) need(`mailbox of ${path}`, mailboxDepth);
    const requests = descriptions.get("requests") as RequestDescription | undefined;
    need("open requests", requests?.open);
    const limiter = descriptions.get("limiter") as LimiterDescription | undefined;
    need("reservations", limiter?.reservations);
    for (const { key, inflight, reservedTokens } of limiter?.keys ?? []) {
      need(`in flight of ${key}`, inflight);
      need(`reserved tokens of ${key}`, reservedTokens);
    }
    const router = descriptions.get("router") as RouterDescription | undefined;
    need(
      "queued",
      router?.pools.reduce(
        (n, pool) => n + pool.queued.reduce((m, each) => m + each.waiting, 0),
        0,
      ),
    );
    for (const [name, description] of descriptions) {
      if (name.startsWith("cache/")) {
        const { flights, participants } = description as CacheDescription;
        need(`flights of ${name}`, flights);
        need(`participants of ${name}`, participants);
      } else if (name.startsWith("nodes/")) {
        const { leases, snapshot, othersInflight } = description as NodeDescription;
        need(`leases of ${name}`, leases.length);
        need(`in flight on ${name}`, snapshot.inflight - othersInflight);
        need(`prefill tokens of ${name}`, snapshot.prefillTokens);
      }
    }
  }

  // ---- around actors ------------------------------------------------------------------------------------

  #wrap(path: string, actor: Actor<Mail>): Actor<Mail> {
    const [, branch = "", name = ""] = path.split("/");
    switch (branch) {
      case "edges":
        if (name === "front")
          return new Interposer(actor, {
            seen: (message) => {
              if (message !== undefined) this.#onFront(message as FrontCommand);
            },
          });
        if (name !== "upstream") return actor;
        return new Interposer(actor, {
          seen: (message) => {
            if (message !== undefined) this.#onUpstream(message as UpstreamCommand);
          },
        });
      case "requests":
        return new Interposer(actor, {
          seen: (message, deeds) => {
            if (message !== undefined) this.#onRequests(message as RequestMessage, deeds);
          },
        });
      case "limiter":
        this.#ledgers.set(path, new Map()); // A limiter that starts knows nothing, and its keys are whole.
        return new Interposer(actor, {
          seen: (message, deeds, nowMs) => {
            if (message !== undefined)
              this.#onLimiter(path, message as RateLimiterMessage, deeds, nowMs);
          },
        });
      case "nodes": {
        const watched: WatchedNode = {
          node: name,
          circuit: "closed",
          isHealthy: true,
          leases: new Set(),
          trials: new Set(),
        };
        if (this.#options.nowUs() > 0) this.coverage["node actors begun anew"]++;
        this.#nodes.set(path, watched);
        return new Interposer(actor, {
          seen: (message, deeds) => this.#onNode(watched, message, deeds),
        });
      }
      default:
        return actor;
    }
  }
}

const trips = [
  "consecutive_local",
  "consecutive_gateway",
  "failure_rate",
  "slow_rate",
  "health",
  "wedged",
];

/** Moves that the state machine has, with their causes. */
const legalMoves: ReadonlyMap<string, readonly string[]> = new Map([
  ["closed open", trips],
  ["open half_open", ["time_out_over", "health_back"]],
  ["half_open open", ["probe_failed", "probe_silent", "health", "wedged"]],
  ["half_open closed", ["trials_succeeded"]],
]);

// ---- engines --------------------------------------------------------------------------------------------

type OnEngine = { readonly promptTokens: number; readonly maxTokens: number };

/** What each engine holds in KV memory, against what the requests on it could need. */
class EngineWatch implements NodeObserver {
  readonly #report: (detail: string) => void;
  readonly #on = new Map<string, Map<string, OnEngine>>();
  /** Given up by someone whom their node cannot hear. */
  readonly #orphans = new Set<string>();

  constructor(report: (detail: string) => void) {
    this.#report = report;
  }

  onSubmitted(node: NodeHost, request: NodeRequest): void {
    this.#requestsOn(node).set(request.id, request);
  }

  onCancelled(node: NodeHost, id: string, isOrphan: boolean): void {
    if (isOrphan) this.#orphans.add(id);
    else this.#requestsOn(node).delete(id);
  }

  /** What runs, but for orphans. */
  *heard(): Generator<{ node: string; id: string }> {
    for (const [node, requests] of this.#on) {
      for (const id of requests.keys()) if (!this.#orphans.has(id)) yield { node, id };
    }
  }

  onNodeEvent(node: NodeHost, { kind, id }: NodeEvent): void {
    if (kind !== "first_token" && kind !== "preempted") this.#requestsOn(node).delete(id);
  }

  onSettled(node: NodeHost): void {
    const { kvBlocks, kvBlocksFree } = node.snapshot();
    let most = 0;
    for (const [id, { promptTokens }] of this.#requestsOn(node)) {
      most += Math.ceil((promptTokens + node.producedTokens(id) + 1) / KV_BLOCK_TOKENS);
    }
    const used = kvBlocks - kvBlocksFree;
    if (used > most || used < 0) {
      this.#report(`${node.name} uses ${used} KV blocks; the requests on it need at most ${most}`);
    }
    this.#checkEngine(node);
  }

  onIdle(node: NodeHost): void {
    const { kvBlocks, kvBlocksFree, running, waiting } = node.snapshot();
    if (kvBlocksFree === kvBlocks && running + waiting === 0) return;
    this.#report(
      `${node.name} has ${kvBlocksFree} of ${kvBlocks} KV blocks free, ${running} running and ${waiting} waiting, at the end`,
    );
  }

  #checkEngine(node: NodeHost): void {
    try {
      node.checkEngine();
    } catch (error) {
      this.#report(`${node.name}: ${error instanceof Error ? error.message : String(error)}`);
    }
  }

  #requestsOn({ name }: NodeHost): Map<string, OnEngine> {
    let on = this.#on.get(name);
    if (on === undefined) {
      on = new Map();
      this.#on.set(name, on);
    }
    return on;
  }
}
