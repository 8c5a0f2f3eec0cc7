/**
 * Looks at the inference nodes from outside: engine metrics (each second), health (each 5 s), models (until
 * known, then each 30 s). It reports to the node's actor and decides nothing.
 *
 * Over node:http with its own kept-alive connections, apart from those of requests, so that a node whose
 * request sockets are all busy can still be seen. Per node and purpose one request is outstanding at most; the
 * next is due an interval (± jitter) after the last one began, never before it ended.
 *
 * Where metrics are depends on the engine: SGLang has them at /v1/loads without any flag, trtllm-serve keeps
 * its Prometheus text at /prometheus/metrics, the others at /metrics. Which it is, is found out by trying, and
 * kept for as long as it answers.
 */
import http from "node:http";
import https from "node:https";
import type { ScraperCommand, ScraperEvent } from "../actors/edges.ts";
import type { NodeId, ScrapeSample } from "../actors/protocol.ts";
import { type Actor, type ActorRef, unreachable } from "../runtime/actor.ts";
import {
  type Engine,
  MetricsText,
  modelsFrom,
  sampleFromJson,
  sampleFromLoads,
} from "./engine-metrics.ts";

/** How often each thing is looked at, and how long it may take. */
export type ScraperOptions = {
  metricsIntervalMs: number;
  metricsTimeoutMs: number;
  healthIntervalMs: number;
  healthTimeoutMs: number;
  modelsIntervalMs: number;
  /** Random share, 0…0.5, added to or taken from every interval. */
  jitterRatio: number;
};

/** What vLLM and SGLang bear without notice. */
export const scraperDefaults: ScraperOptions = {
  metricsIntervalMs: 1000,
  metricsTimeoutMs: 800,
  healthIntervalMs: 5000,
  healthTimeoutMs: 2000,
  modelsIntervalMs: 30_000,
  jitterRatio: 0.2,
};

/** A node as the scraper sees it. */
export type ScraperNode = {
  node: NodeId;
  /** What "/metrics", "/health" and "/v1/models" are appended to. */
  url: string;
  apiKey?: string;
  engine: "auto" | Engine;
  /** Where metrics are, whole; absent = found under `url`. */
  metricsUrl?: string;
  /** Known without asking. */
  models?: readonly string[];
  adapters?: readonly string[];
};

/** What surrounds the edge. */
export type ScraperDeps = {
  post: <T>(to: ActorRef<T>, message: T) => void;
  /** Uniform in [0, 1). */
  random: () => number;
};

/** Metrics of a large vLLM with all histograms are some 300 KB. */
const BODY_BYTES_MAX = 4 << 20;

/** Nodes are made known by whoever builds it; their actors say when to look. */
export class ScraperEdge implements Actor<ScraperCommand> {
  readonly #options: ScraperOptions;
  readonly #deps: ScraperDeps;
  readonly #nodes = new Map<NodeId, ScraperNode>();
  readonly #watches = new Map<NodeId, NodeWatch>();
  readonly #client = new Client();

  constructor(options: ScraperOptions, deps: ScraperDeps) {
    this.#options = options;
    this.#deps = deps;
  }

  /** Makes a node known; it is looked at from `scraper.add` on. A changed one is begun anew. */
  addNode(node: ScraperNode): void {
    const present = this.#nodes.get(node.node);
    if (JSON.stringify(present) === JSON.stringify(node)) return;
    this.#nodes.set(node.node, node);
    const watch = this.#watches.get(node.node);
    if (watch !== undefined) this.#watch(node.node, watch.to);
  }

  removeNode(node: NodeId): void {
    this.#nodes.delete(node);
    this.#stop(node);
  }

  /** What the node serves, as far as it is known. */
  modelsOf(node: NodeId): { models: readonly string[]; adapters: readonly string[] } | undefined {
    return this.#watches.get(node)?.models;
  }

  receive(command: ScraperCommand): void {
    switch (command.kind) {
      case "scraper.add":
        return this.#watch(command.node, command.replyTo);
      case "scraper.remove":
        return this.#stop(command.node);
      default:
        return unreachable(command);
    }
  }

  /** Stops all, drops requests under way, closes connections. */
  close(): void {
    for (const node of [...this.#watches.keys()]) this.#stop(node);
    this.#client.close();
  }

  #watch(node: NodeId, to: ActorRef<ScraperEvent>): void {
    this.#stop(node);
    const config = this.#nodes.get(node);
    if (config === undefined) {
      return this.#deps.post(to, { kind: "scraper.failed", reason: "the node is not configured" });
    }
    this.#watches.set(node, new NodeWatch(config, to, this.#options, this.#deps, this.#client));
  }

  #stop(node: NodeId): void {
    this.#watches.get(node)?.stop();
    this.#watches.delete(node);
  }
}

type MetricsPlace = "text" | "loads" | "prometheus";

/** Looks at one node until it is stopped. */
class NodeWatch {
  readonly to: ActorRef<ScraperEvent>;
  models: { models: readonly string[]; adapters: readonly string[] } | undefined;

  readonly #config: ScraperNode;
  readonly #options: ScraperOptions;
  readonly #deps: ScraperDeps;
  readonly #client: Client;
  readonly #headers: Readonly<Record<string, string>>;
  readonly #timers = new Set<NodeJS.Timeout>();
  readonly #calls = new Set<Call>();
  #stopped = false;
  #place: MetricsPlace;
  /** trtllm-serve is asked once whether it has Prometheus text. */
  #prometheusTried = false;
  #engine: Engine | null;
  #healthPath = "/health";
  readonly #generated = new Monotonic();
  readonly #preemptions = new Monotonic();

  constructor(
    config: ScraperNode,
    to: ActorRef<ScraperEvent>,
    options: ScraperOptions,
    deps: ScraperDeps,
    client: Client,
  ) {
    this.#config = config;
    this.to = to;
    this.#options = options;
    this.#deps = deps;
    this.#client = client;
    this.#engine = config.engine === "auto" ? null : config.engine;
    this.#place = config.engine === "sglang" && config.metricsUrl === undefined ? "loads" : "text";
    this.#headers = config.apiKey === undefined ? {} : { authorization: `Bearer ${config.apiKey}` };
    this.#every(options.metricsIntervalMs, (done) => this.#readMetrics(done));
    this.#every(options.healthIntervalMs, (done) => this.#checkHealth(done));
    this.#startModels();
  }

  stop(): void {
    this.#stopped = true;
    for (const timer of this.#timers) clearTimeout(timer);
    for (const call of this.#calls) call.drop();
    this.#calls.clear();
  }

  // ---- metrics ----------------------------------------------------------------------------------------------

  #readMetrics(done: () => void): void {
    const { url, metricsUrl } = this.#config;
    const path = { text: "/metrics", loads: "/v1/loads", prometheus: "/prometheus/metrics" };
    const from = metricsUrl ?? url + path[this.#place];
    const text = this.#place === "loads" ? null : new MetricsText();
    this.#get(from, this.#options.metricsTimeoutMs, text, (outcome) => {
      this.#onMetrics(outcome, text);
      done();
    });
  }

  #onMetrics(outcome: Outcome, text: MetricsText | null): void {
    if (outcome.status === 404) this.#lookElsewhere();
    if (outcome.status !== 200) return this.#failed(outcome.detail);
    const json = outcome.text === undefined ? undefined : parsed(outcome.text);
    if (this.#place === "loads") {
      const sample = sampleFromLoads(json);
      if (sample !== null && "unusable" in sample) return this.#failed(sample.unusable);
      if (sample !== null) return this.#sampled(sample);
      this.#lookElsewhere();
      return this.#failed("/v1/loads is not SGLang's");
    }
    if (json === undefined) {
      const sample = text?.end(this.#engine) ?? null;
      if (sample === null) return this.#failed("no metrics of a known engine");
      // SGLang's JSON is fresher and needs no flag: from now on that, if it is there.
      if (sample.engine === "sglang" && this.#engine === null) this.#goTo("loads");
      const empty = sample.running === undefined && sample.waiting === undefined;
      if (this.#place === "prometheus" && empty) this.#goTo("text");
      return this.#sampled(sample);
    }
    const sample = sampleFromJson(json);
    if (sample?.engine !== "article" && !this.#prometheusTried) {
      this.#prometheusTried = true;
      this.#goTo("prometheus");
    }
    if (sample === null) return this.#failed("JSON of no known engine");
    this.#sampled(sample);
  }

  /** Nothing is here; the next reading may find it at the other place. */
  #lookElsewhere(): void {
    const { engine } = this.#config;
    const mayBeSglang = engine === "auto" || engine === "sglang";
    this.#goTo(this.#place === "text" && mayBeSglang ? "loads" : "text");
  }

  #goTo(place: MetricsPlace): void {
    if (this.#config.metricsUrl === undefined) this.#place = place;
  }

  #sampled(sample: ScrapeSample): void {
    this.#engine = sample.engine as Engine;
    const { generatedTokensTotal: generated, preemptionsTotal: preemptions } = sample;
    if (generated !== undefined) sample.generatedTokensTotal = this.#generated.of(generated);
    if (preemptions !== undefined) sample.preemptionsTotal = this.#preemptions.of(preemptions);
    this.#post({ kind: "scraper.sampled", sample });
  }

  #failed(reason: string): void {
    this.#post({ kind: "scraper.failed", reason });
  }

  // ---- health -----------------------------------------------------------------------------------------------

  #checkHealth(done: () => void): void {
    const path = this.#healthPath;
    this.#get(
      this.#config.url + path,
      this.#options.healthTimeoutMs,
      null,
      ({ status, detail }) => {
        if (status === 404 && path === "/health") {
          this.#healthPath = "/v1/models"; // Ollama and others have no /health.
          return this.#checkHealth(done);
        }
        this.#post({ kind: "scraper.health", ok: status >= 200 && status < 300, detail });
        done();
      },
    );
  }

  // ---- models -----------------------------------------------------------------------------------------------

  #startModels(): void {
    const { models, adapters } = this.#config;
    if (models !== undefined) this.#setModels({ models, adapters: adapters ?? [] });
    if (models !== undefined && adapters !== undefined) return;
    this.#every(
      () =>
        this.models === undefined
          ? this.#options.metricsIntervalMs
          : this.#options.modelsIntervalMs,
      (done) => this.#readModels(done),
    );
  }

  #readModels(done: () => void): void {
    const from = `${this.#config.url}/v1/models`;
    this.#get(from, this.#options.healthTimeoutMs, null, ({ status, text }) => {
      const found = status === 200 && text !== undefined ? modelsFrom(parsed(text)) : null;
      if (found !== null) {
        this.#setModels({
          models: this.#config.models ?? found.models,
          adapters: this.#config.adapters ?? found.adapters,
        });
      }
      done();
    });
  }

  #setModels(found: { models: readonly string[]; adapters: readonly string[] }): void {
    if (JSON.stringify(found) === JSON.stringify(this.models)) return;
    this.models = found;
    this.#post({ kind: "scraper.models", ...found });
  }

  // ---- small things -----------------------------------------------------------------------------------------

  /** Calls `act` now and an interval after each beginning, but not before it has called `done`. */
  #every(intervalMs: number | (() => number), act: (done: () => void) => void): void {
    const begin = (): void => {
      const beganAtMs = performance.now();
      act(() => {
        if (this.#stopped) return;
        const meanMs = typeof intervalMs === "number" ? intervalMs : intervalMs();
        const share = 1 + this.#options.jitterRatio * (2 * this.#deps.random() - 1);
        const waitMs = Math.max(0, meanMs * share - (performance.now() - beganAtMs));
        const timer = setTimeout(() => {
          this.#timers.delete(timer);
          begin();
        }, waitMs);
        this.#timers.add(timer);
      });
    };
    begin();
  }

  #get(
    url: string,
    timeoutMs: number,
    text: MetricsText | null,
    onEnd: (outcome: Outcome) => void,
  ): void {
    const call = new Call(this.#client, url, this.#headers, timeoutMs, text, (outcome) => {
      this.#calls.delete(call);
      onEnd(outcome);
    });
    this.#calls.add(call);
  }

  #post(event: ScraperEvent): void {
    this.#deps.post(this.to, event);
  }
}

/** A counter that starts again from 0 when its engine restarts, made one that never falls. */
class Monotonic {
  #base = 0;
  #last = 0;

  of(value: number): number {
    if (value < this.#last) this.#base += this.#last;
    this.#last = value;
    return this.#base + value;
  }
}

/** `text`: the body, unless a parser took it. `detail`: the status, or why there is none (0). */
type Outcome = { status: number; text?: string; detail: string };

class Client {
  readonly #agents = {
    "http:": new http.Agent({ keepAlive: true, maxFreeSockets: 2 }),
    "https:": new https.Agent({ keepAlive: true, maxFreeSockets: 2 }),
  };

  get(url: URL, headers: Readonly<Record<string, string>>): http.ClientRequest {
    return url.protocol === "https:"
      ? https.get(url, { agent: this.#agents["https:"], headers })
      : http.get(url, { agent: this.#agents["http:"], headers });
  }

  close(): void {
    this.#agents["http:"].destroy();
    this.#agents["https:"].destroy();
  }
}

/** One GET: exactly one outcome, in time, unless it is dropped. */
class Call {
  readonly #client: Client;
  readonly #url: URL;
  readonly #headers: Readonly<Record<string, string>>;
  readonly #timer: NodeJS.Timeout;
  readonly #parser: MetricsText | null;
  #request: http.ClientRequest;
  #onEnd: ((outcome: Outcome) => void) | null;

  constructor(
    client: Client,
    url: string,
    headers: Readonly<Record<string, string>>,
    timeoutMs: number,
    parser: MetricsText | null,
    onEnd: (outcome: Outcome) => void,
  ) {
    this.#client = client;
    this.#url = new URL(url);
    this.#headers = headers;
    this.#parser = parser;
    this.#onEnd = onEnd;
    this.#timer = setTimeout(() => this.#fail("timed out"), timeoutMs);
    this.#request = this.#send();
  }

  drop(): void {
    this.#onEnd = null;
    clearTimeout(this.#timer);
    this.#request.destroy();
  }

  #send(): http.ClientRequest {
    const request = this.#client.get(this.#url, this.#headers);
    let answered = false;
    request.on("error", (error: NodeJS.ErrnoException) => {
      if (this.#onEnd === null) return;
      // The node closed an idle connection just as it was used again: that says nothing about the node.
      if (request.reusedSocket && !answered) this.#request = this.#send();
      else this.#fail(error.code ?? error.name);
    });
    request.on("response", (response) => {
      answered = true;
      this.#onResponse(response);
    });
    return request;
  }

  #onResponse(response: http.IncomingMessage): void {
    const status = response.statusCode ?? 0;
    const chunks: Buffer[] = [];
    let parser = status === 200 ? this.#parser : null;
    let bytes = 0;
    response.on("error", () => this.#fail("broke off"));
    response.on("data", (chunk: Buffer) => {
      // Content types lie; Prometheus text never begins like JSON.
      if (bytes === 0 && /^\s*[[{]/.test(chunk.toString("latin1", 0, 64))) parser = null;
      bytes += chunk.length;
      if (bytes > BODY_BYTES_MAX) this.#fail("an answer too long");
      else if (parser !== null) parser.push(chunk);
      else chunks.push(chunk);
    });
    response.on("end", () => {
      const text = Buffer.concat(chunks).toString("utf8");
      this.#end({ status, detail: `status ${status}`, ...(parser === null ? { text } : {}) });
    });
  }

  #fail(detail: string): void {
    this.#end({ status: 0, detail });
    this.#request.destroy();
  }

  #end(outcome: Outcome): void {
    const onEnd = this.#onEnd;
    if (onEnd === null) return;
    this.#onEnd = null;
    clearTimeout(this.#timer);
    onEnd(outcome);
  }
}

/** Null for what is not JSON, so that it can be told from JSON's absence. */
function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
