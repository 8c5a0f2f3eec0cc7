/**
 * Headrace's own metrics in Prometheus text. Requests are counted as they end; everything that is a state
 * (nodes, cache, queue, mailboxes) is read from the actors when somebody asks. The only importer of prom-client.
 */
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from "prom-client";
import type { CacheDescription } from "../actors/cache.ts";
import type { EmbedderDescription } from "../actors/edges.ts";
import type { NodeDescription } from "../actors/gpu-node.ts";
import type { RequestRecord } from "../actors/protocol.ts";
import type { LimiterDescription } from "../actors/rate-limiter.ts";
import type { RequestDescription } from "../actors/request.ts";
import type { RouterDescription } from "../actors/router.ts";
import type { SystemStats } from "../runtime/system.ts";
import type { ClusterDescription } from "./cluster.ts";
import type { StoreStats } from "./redis-store.ts";

/** The state of all actors at one moment; a part is absent when its actor did not answer. */
export type StateSnapshot = {
  nodes: readonly NodeDescription[];
  router?: RouterDescription;
  cache?: CacheDescription;
  embedder?: EmbedderDescription;
  limiter?: LimiterDescription;
  requests?: RequestDescription;
  store?: StoreStats;
  cluster?: ClusterDescription;
  system: SystemStats;
};

const latencySeconds = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300];
const perTokenSeconds = [
  0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1,
];
const circuitStates = ["closed", "open", "half_open"] as const;

export class Metrics {
  readonly #registry = new Registry();
  readonly #requests = this.#counter("requests_total", "Requests by how they ended.", [
    "route",
    "model",
    "outcome",
    "cache",
  ]);
  readonly #refusals = this.#counter("refusals_total", "Requests refused or failed, by code.", [
    "route",
    "code",
  ]);
  readonly #attempts = this.#counter("attempts_total", "Attempts on nodes by outcome.", [
    "node",
    "outcome",
  ]);
  readonly #retries = this.#counter("retries_total", "Attempts after the first.", ["model"]);
  readonly #tokens = this.#counter("tokens_total", "Tokens by tenant and kind.", [
    "tenant",
    "kind",
  ]);
  readonly #e2e = this.#histogram("request_duration_seconds", "Arrival to end.", latencySeconds, [
    "route",
    "cache",
  ]);
  readonly #ttft = this.#histogram(
    "time_to_first_token_seconds",
    "Arrival to the first content token, for answers of nodes.",
    latencySeconds,
    ["model"],
  );
  readonly #tpot = this.#histogram(
    "time_per_output_token_seconds",
    "Mean time per output token after the first.",
    perTokenSeconds,
    ["model"],
  );
  readonly #queue = this.#histogram(
    "queue_duration_seconds",
    "Time in the fair queue, for requests that waited.",
    latencySeconds,
    ["priority"],
  );
  readonly #circuit = this.#counter("circuit_changes_total", "Circuit transitions.", [
    "node",
    "to",
  ]);
  readonly #events = this.#counter("events_total", "Rare events inside the actors, by kind.", [
    "kind",
  ]);

  constructor() {
    collectDefaultMetrics({ register: this.#registry });
  }

  onFinished(record: RequestRecord): void {
    const { facts } = record;
    const model = facts.model ?? "";
    this.#requests.inc({ route: facts.route, model, outcome: record.outcome, cache: record.cache });
    this.#e2e.observe({ route: facts.route, cache: record.cache }, record.endedMs / 1000);
    if (record.code !== undefined) this.#refusals.inc({ route: facts.route, code: record.code });
    if (record.attempts.length === 0) return;
    for (const { node, outcome } of record.attempts) this.#attempts.inc({ node, outcome });
    if (record.attempts.length > 1) this.#retries.inc({ model }, record.attempts.length - 1);
    if (record.queuedMs > 0)
      this.#queue.observe({ priority: facts.priority }, record.queuedMs / 1000);
    if (record.ttftMs !== undefined) this.#ttft.observe({ model }, record.ttftMs / 1000);
    const { usage } = record;
    if (usage === undefined) return;
    this.#tokens.inc({ tenant: facts.tenant, kind: "prompt" }, usage.promptTokens);
    this.#tokens.inc({ tenant: facts.tenant, kind: "output" }, usage.outputTokens);
    if (record.ttftMs !== undefined && usage.outputTokens > 1) {
      const seconds = (record.endedMs - record.ttftMs) / (usage.outputTokens - 1) / 1000;
      this.#tpot.observe({ model }, seconds);
    }
  }

  onRefused(code: string, route: string): void {
    this.#requests.inc({ route, model: "", outcome: "refused", cache: "bypass" });
    this.#refusals.inc({ route, code });
  }

  onCircuitChanged(node: string, to: string): void {
    this.#circuit.inc({ node, to });
  }

  onEvent(kind: string): void {
    this.#events.inc({ kind });
  }

  async expose(state: StateSnapshot): Promise<{ contentType: string; text: string }> {
    const now = new Registry();
    const gauge = (name: string, help: string, labelNames: string[] = []) =>
      new Gauge({ name: `headrace_${name}`, help, labelNames, registers: [now] });
    exposeNodes(state.nodes, gauge);
    exposeActors(state, gauge);
    if (state.cluster !== undefined) exposeCluster(state.cluster, gauge);
    const text = `${await this.#registry.metrics()}${await now.metrics()}`;
    return { contentType: this.#registry.contentType, text };
  }

  #counter(name: string, help: string, labelNames: string[]): Counter {
    return new Counter({ name: `headrace_${name}`, help, labelNames, registers: [this.#registry] });
  }

  #histogram(name: string, help: string, buckets: number[], labelNames: string[]): Histogram {
    const registers = [this.#registry];
    return new Histogram({ name: `headrace_${name}`, help, buckets, labelNames, registers });
  }
}

type MakeGauge = (name: string, help: string, labelNames?: string[]) => Gauge;

/** A signal that is not known has no series: absent is not 0. */
function exposeNodes(nodes: readonly NodeDescription[], gauge: MakeGauge): void {
  const byNode = ["node"];
  const inflight = gauge("node_inflight", "Leases held on the node.", byNode);
  const inflightMax = gauge("node_inflight_max", "Concurrency cap, learned from overload.", byNode);
  const circuit = gauge("node_circuit", "1 for the state the circuit is in.", ["node", "state"]);
  const ramp = gauge("node_ramp", "Slow start, 0.1 to 1.", byNode);
  const healthy = gauge("node_healthy", "1 while health checks pass.", byNode);
  const draining = gauge("node_draining", "1 while no new request is sent.", byNode);
  const itl = gauge("node_inter_token_seconds", "Learned seconds per output token.", byNode);
  const prefill = gauge("node_prefill_tokens", "Prompt tokens without a first token yet.", byNode);
  const waiting = gauge("node_engine_waiting", "Requests waiting in the engine.", byNode);
  const running = gauge("node_engine_running", "Requests running in the engine.", byNode);
  const kv = gauge("node_kv_cache_utilization", "KV cache in use, 0 to 1.", byNode);
  const others = gauge("node_others_inflight", "Requests in the engine that are not ours.", byNode);
  const missing = gauge("node_signals_missing", "Engine gauges expected and not found.", byNode);
  for (const { snapshot, othersInflight } of nodes) {
    const labels = { node: snapshot.node };
    inflight.set(labels, snapshot.inflight);
    inflightMax.set(labels, snapshot.inflightMax);
    for (const state of circuitStates)
      circuit.set({ ...labels, state }, snapshot.circuit === state ? 1 : 0);
    ramp.set(labels, snapshot.ramp);
    healthy.set(labels, snapshot.healthy ? 1 : 0);
    draining.set(labels, snapshot.draining ? 1 : 0);
    prefill.set(labels, snapshot.prefillTokens);
    others.set(labels, othersInflight);
    if (snapshot.itlSeconds !== undefined) itl.set(labels, snapshot.itlSeconds);
    const { scrape } = snapshot;
    if (scrape === undefined) continue;
    if (scrape.waiting !== undefined) waiting.set(labels, scrape.waiting);
    if (scrape.running !== undefined) running.set(labels, scrape.running);
    if (scrape.kv !== undefined) kv.set(labels, scrape.kv);
    missing.set(labels, scrape.missing.length);
  }
}

function exposeActors(state: StateSnapshot, gauge: MakeGauge): void {
  const { cache, embedder, limiter, requests, router, store, system } = state;
  if (requests !== undefined) {
    const open = gauge("requests_open", "Requests in flight by phase.", ["phase"]);
    for (const [phase, count] of Object.entries(requests.byPhase)) open.set({ phase }, count);
  }
  if (router !== undefined) {
    const queued = gauge("queue_size", "Requests that wait for a node.", ["model", "priority"]);
    const eligible = gauge("pool_eligible_nodes", "Nodes that may be chosen.", ["model"]);
    const budget = gauge("retry_budget", "Retries that may be made now.", ["model"]);
    for (const pool of router.pools) {
      eligible.set({ model: pool.model }, pool.eligible);
      budget.set({ model: pool.model }, pool.retryBudget.balance);
      for (const band of pool.queued) {
        queued.inc({ model: pool.model, priority: band.priority }, band.waiting);
      }
    }
  }
  if (embedder !== undefined) {
    gauge("embedder_healthy", "1 while questions get vectors.").set(
      embedder.state === "healthy" ? 1 : 0,
    );
    const figures = gauge("embedder", "Embedder figures by name; counts since the start.", [
      "figure",
    ]);
    const { queued, vectors, batches, batchMs, unavailable } = embedder;
    for (const [figure, value] of Object.entries({
      queued,
      vectors,
      batches,
      batchMs,
      ...unavailable,
    }))
      figures.set({ figure }, value);
  }
  if (cache !== undefined) {
    const figures = gauge("cache", "Cache figures by name; counts since the start.", ["figure"]);
    for (const [figure, value] of Object.entries(cache))
      if (typeof value === "number") figures.set({ figure }, value);
  }
  if (limiter !== undefined) {
    gauge("limiter_reservations", "Reservations not settled yet.").set(limiter.reservations);
  }
  if (store !== undefined) {
    setFigures(gauge("store", "Redis figures by name.", ["figure"]), store);
  }
  const letters = gauge("dead_letters", "Messages that reached nobody, since the start.", [
    "reason",
  ]);
  for (const { reason, count } of system.deadLetters) letters.inc({ reason }, count);
  gauge("actors", "Actors alive.").set(system.cells.length);
  gauge("actor_restarts", "Actor restarts since the start.").set(system.restarts);
}

function exposeCluster(
  { epoch, members, nodes, self, links, limits, table, limitStore }: ClusterDescription,
  gauge: MakeGauge,
): void {
  gauge("cluster_epoch", "Of this peer's view of the members.").set(epoch);
  const byState = gauge("cluster_members", "Members by state, as this peer sees them.", ["state"]);
  for (const { state } of members) byState.inc({ state });
  gauge("cluster_owned_nodes", "Inference nodes that this peer looks after.").set(
    nodes.filter(({ peer }) => peer === self).length,
  );
  const byPeer = ["peer"];
  const up = gauge("peer_link_up", "1 while there is a link to the peer.", byPeer);
  const rtt = gauge("peer_rtt_seconds", "Round trip of the last heartbeat.", byPeer);
  const outbox = gauge("peer_outbox", "Messages that wait to be sent to the peer.", byPeer);
  const undeliverable = gauge("peer_undeliverable", "Messages lost before they left.", [
    "peer",
    "reason",
  ]);
  for (const link of links.links) {
    const { peer } = link;
    up.set({ peer }, link.state === "up" ? 1 : 0);
    if (link.rttMs !== undefined) rtt.set({ peer }, link.rttMs / 1000);
    outbox.set({ peer }, link.outboxDepth);
    for (const [reason, count] of Object.entries(link.undeliverable))
      undeliverable.set({ peer, reason }, count);
  }
  const refusals = gauge("peer_refusals", "Handshakes that failed, by reason.", ["reason"]);
  for (const [reason, count] of Object.entries(links.refusals)) refusals.set({ reason }, count);
  setFigures(gauge("cluster_limits", "Figures of cluster-wide limits.", ["figure"]), limits);
  setFigures(gauge("cluster_table", "Figures of the table of members.", ["figure"]), table);
  setFigures(gauge("limit_store", "Figures of limits in Redis.", ["figure"]), limitStore);
}

function setFigures(figures: Gauge, values: object | undefined): void {
  for (const [figure, value] of Object.entries(values ?? {})) {
    if (typeof value === "number") figures.set({ figure }, value);
    if (typeof value === "boolean") figures.set({ figure }, value ? 1 : 0);
  }
}
