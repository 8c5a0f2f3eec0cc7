/** The scraper against real HTTP servers. */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import { afterEach, describe, expect, it, vi } from "vitest";
import type { ScraperEvent } from "../actors/edges.ts";
import type { ActorRef } from "../runtime/actor.ts";
import {
  ScraperEdge,
  type ScraperNode,
  type ScraperOptions,
  scraperDefaults,
} from "../transport/scraper.ts";

type Route = (request: IncomingMessage, response: ServerResponse) => void;
type TestNode = {
  url: string;
  server: Server;
  paths: string[];
  headers: IncomingMessage["headers"][];
};

const cleanups: (() => Promise<void> | void)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

/** Routes by path; others are 404. Routes may be exchanged while it runs. */
async function startNode(routes: Record<string, Route | string>): Promise<TestNode> {
  const node: TestNode = { url: "", server: createServer(), paths: [], headers: [] };
  node.server.on("request", (request: IncomingMessage, response: ServerResponse) => {
    const path = request.url ?? "";
    node.paths.push(path);
    node.headers.push(request.headers);
    const route = routes[path];
    if (typeof route === "function") return route(request, response);
    if (route === undefined) response.statusCode = 404;
    response.end(route);
  });
  await new Promise<void>((resolve) => node.server.listen(0, "127.0.0.1", resolve));
  const address = node.server.address();
  node.url = `http://127.0.0.1:${typeof address === "object" ? address?.port : 0}`;
  cleanups.push(async () => {
    node.server.closeAllConnections();
    await new Promise((resolve) => node.server.close(resolve));
  });
  return node;
}

const to: ActorRef<ScraperEvent> = { path: "/nodes/a", uid: 1 };
const quick: ScraperOptions = {
  metricsIntervalMs: 5,
  metricsTimeoutMs: 30_000,
  healthIntervalMs: 5,
  healthTimeoutMs: 30_000,
  modelsIntervalMs: 5,
  jitterRatio: 0.2,
};

class Rig {
  readonly events: ScraperEvent[] = [];
  readonly edge: ScraperEdge;
  #wake: (() => void)[] = [];

  constructor(
    node: TestNode | null,
    config: Partial<ScraperNode> = {},
    options: Partial<ScraperOptions> = {},
  ) {
    this.edge = new ScraperEdge(
      { ...quick, ...options },
      {
        post: (_to, message) => {
          this.events.push(message as ScraperEvent);
          for (const wake of this.#wake.splice(0)) wake();
        },
        random: () => 0.5,
      },
    );
    cleanups.push(() => this.edge.close());
    if (node === null) return;
    this.edge.addNode({ node: "a", url: node.url, engine: "auto", ...config });
    this.edge.receive({ kind: "scraper.add", node: "a", replyTo: to });
  }

  async until<T>(find: () => T | undefined): Promise<T> {
    for (;;) {
      const found = find();
      if (found !== undefined) return found;
      await new Promise<void>((resolve) => this.#wake.push(resolve));
    }
  }

  /** The `count`th event of a kind from now on. */
  async next<K extends ScraperEvent["kind"]>(kind: K, count = 1) {
    this.events.length = 0;
    const is = (e: ScraperEvent): e is Extract<ScraperEvent, { kind: K }> => e.kind === kind;
    return this.until(() => this.events.filter(is)[count - 1]);
  }
}

const vllmText =
  "vllm:num_requests_running 3\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc 0.5\n";
const loads = JSON.stringify({
  loads: [{ num_running_reqs: 2, num_waiting_reqs: 0, token_usage: 0.1, max_total_num_tokens: 9 }],
});

describe("scraper: metrics", () => {
  it("reads an engine's gauges again and again, with the node's key", async () => {
    const node = await startNode({
      "/metrics": vllmText,
      "/health": "",
      "/v1/models": '{"data":[{"id":"m"}]}',
    });
    const rig = new Rig(node, { apiKey: "k" });
    const { sample } = await rig.next("scraper.sampled", 3);
    expect(sample).toEqual({ engine: "vllm", running: 3, waiting: 1, kv: 0.5, missing: [] });
    for (const headers of node.headers) expect(headers.authorization).toBe("Bearer k");
  });

  it("finds SGLang's loads where metrics are off", async () => {
    const rig = new Rig(await startNode({ "/v1/loads": loads }));
    expect((await rig.next("scraper.sampled")).sample).toMatchObject({
      engine: "sglang",
      running: 2,
    });
  });

  it("prefers SGLang's loads where both are there, and stays with text where they are not", async () => {
    const text = "sglang:num_running_reqs 7\nsglang:num_queue_reqs 0\nsglang:token_usage 0\n";
    const routes: Record<string, string> = { "/metrics": text, "/v1/loads": loads };
    const both = new Rig(await startNode(routes));
    await both.next("scraper.sampled", 2);
    expect((await both.next("scraper.sampled")).sample.running).toBe(2);
    const node = await startNode({ "/metrics": text });
    const textOnly = new Rig(node);
    expect((await textOnly.next("scraper.sampled", 4)).sample.running).toBe(7);
    expect(node.paths.filter((path) => path === "/v1/loads").length).toBe(1);
  });

  it("says when SGLang is not ready", async () => {
    const rig = new Rig(
      await startNode({ "/v1/loads": '{"loads":[{"max_total_num_tokens":0}]}' }),
      {
        engine: "sglang",
      },
    );
    expect(await rig.next("scraper.failed")).toMatchObject({ reason: "not ready" });
  });

  it("finds trtllm-serve's Prometheus text behind its JSON, asking once", async () => {
    const iterations = '[{"numActiveRequests":1,"numQueuedRequests":0}]';
    const text =
      "trtllm_num_requests_running 5\ntrtllm_num_requests_waiting 0\ntrtllm_kv_cache_utilization 0.5\n";
    const rig = new Rig(await startNode({ "/metrics": iterations, "/prometheus/metrics": text }));
    await rig.next("scraper.sampled", 2);
    expect((await rig.next("scraper.sampled")).sample).toMatchObject({
      engine: "trtllm",
      running: 5,
    });
    const node = await startNode({ "/metrics": iterations });
    const jsonOnly = new Rig(node);
    expect((await jsonOnly.next("scraper.sampled", 4)).sample).toMatchObject({
      running: 1,
      waiting: 0,
    });
    expect(node.paths.filter((path) => path === "/prometheus/metrics").length).toBe(1);
  });

  it("goes back to JSON where the Prometheus text has no queue", async () => {
    const iterations = '[{"numActiveRequests":1,"numQueuedRequests":0}]';
    const rig = new Rig(
      await startNode({
        "/metrics": iterations,
        "/prometheus/metrics": "trtllm_request_success_total 1\n",
      }),
    );
    await rig.next("scraper.sampled", 3);
    expect((await rig.next("scraper.sampled")).sample).toMatchObject({ running: 1 });
  });

  it("reads the article's JSON, also where its type is stated wrongly, and stays at /metrics", async () => {
    const json = '{"queue_depth":4,"avg_latency_seconds":1,"gpu_memory_utilization":0.5}';
    const node = await startNode({ "/metrics": json });
    const rig = new Rig(node);
    expect((await rig.next("scraper.sampled", 3)).sample).toMatchObject({
      engine: "article",
      waiting: 4,
    });
    expect(node.paths).not.toContain("/prometheus/metrics");
  });

  it("reads metrics where they are configured to be, and nowhere else", async () => {
    const metrics = await startNode({ "/x/metrics": vllmText });
    const node = await startNode({});
    const rig = new Rig(node, { metricsUrl: `${metrics.url}/x/metrics` });
    expect((await rig.next("scraper.sampled", 2)).sample.engine).toBe("vllm");
    expect(node.paths).not.toContain("/metrics");
  });

  it("a gauge that disappears is missing, and one of a known engine without any is too", async () => {
    const routes = { "/metrics": vllmText };
    const rig = new Rig(await startNode(routes));
    await rig.next("scraper.sampled");
    routes["/metrics"] = "vllm:num_requests_running 3\n";
    await rig.until(() =>
      rig.events.find((e) => e.kind === "scraper.sampled" && e.sample.missing.length === 2),
    );
    routes["/metrics"] = "process_cpu_seconds_total 1\n";
    await rig.until(() =>
      rig.events.find((e) => e.kind === "scraper.sampled" && e.sample.missing.length === 3),
    );
  });

  it("counters never fall, though the engine restarts", async () => {
    const routes = { "/metrics": "vllm:generation_tokens_total 1000\n" };
    const rig = new Rig(await startNode(routes));
    await rig.next("scraper.sampled");
    routes["/metrics"] = "vllm:generation_tokens_total 30\n";
    const totals = (): number[] =>
      rig.events.flatMap((e) =>
        e.kind === "scraper.sampled" ? [e.sample.generatedTokensTotal ?? -1] : [],
      );
    await rig.until(() => totals().find((total) => total === 1030));
    routes["/metrics"] = "vllm:generation_tokens_total 50\n";
    await rig.until(() => totals().find((total) => total === 1050));
    expect(totals()).toEqual([...totals()].sort((a, b) => a - b));
  });

  it.each([
    [
      "a status",
      (_: IncomingMessage, r: ServerResponse) => void r.writeHead(500).end(),
      "status 500",
    ],
    [
      "no known engine",
      (_: IncomingMessage, r: ServerResponse) => void r.end("up 1\n"),
      "no metrics of a known engine",
    ],
    [
      "JSON of none",
      (_: IncomingMessage, r: ServerResponse) => void r.end('{"x":1}'),
      "JSON of no known engine",
    ],
    ["a reset", (q: IncomingMessage) => void q.socket.resetAndDestroy(), "ECONNRESET"],
    [
      "half an answer",
      (q: IncomingMessage, r: ServerResponse) => {
        r.writeHead(200, { "content-length": "100" });
        r.write("vllm:", () => q.socket.destroy());
      },
      "broke off",
    ],
    [
      "an endless answer",
      (_: IncomingMessage, r: ServerResponse) => {
        const write = (): void => {
          while (!r.destroyed && r.write(Buffer.alloc(60_000, "x\n")));
        };
        r.on("drain", write);
        write();
      },
      "an answer too long",
    ],
  ])("fails with a reason: %s", async (_, route, reason) => {
    const rig = new Rig(await startNode({ "/metrics": route }));
    expect(await rig.next("scraper.failed")).toEqual({ kind: "scraper.failed", reason });
  });

  it("fails in time when the node hangs, and has one request outstanding at most", async () => {
    let open = 0;
    let most = 0;
    const hang: Route = (request) => {
      most = Math.max(most, ++open);
      request.socket.on("close", () => open--);
    };
    const rig = new Rig(
      await startNode({ "/metrics": hang }),
      {},
      { metricsTimeoutMs: 20, metricsIntervalMs: 1 },
    );
    expect(await rig.next("scraper.failed", 3)).toMatchObject({ reason: "timed out" });
    expect(most).toBeLessThanOrEqual(2); // The one that timed out may not have closed on their side.
  });

  it("fails each time where no metrics are anywhere", async () => {
    const node = await startNode({});
    const rig = new Rig(node);
    expect(await rig.next("scraper.failed", 4)).toMatchObject({ reason: "status 404" });
    expect(node.paths).toContain("/metrics");
    expect(node.paths).toContain("/v1/loads");
  });

  it("is not misled when the node closes idle connections", async () => {
    const node = await startNode({
      "/metrics": vllmText,
      "/health": "",
      "/v1/models": '{"data":[]}',
    });
    node.server.on("request", (request: IncomingMessage, response: ServerResponse) => {
      response.on("finish", () => setImmediate(() => request.socket.destroy()));
    });
    const rig = new Rig(
      node,
      {},
      { metricsIntervalMs: 1, healthIntervalMs: 1, modelsIntervalMs: 1 },
    );
    await rig.next("scraper.sampled", 60);
    expect(rig.events.filter((e) => e.kind === "scraper.failed")).toEqual([]);
  });
});

describe("scraper: health and models", () => {
  it("says whether the node is well, and why not", async () => {
    let status = 200;
    const rig = new Rig(
      await startNode({ "/health": (_, response) => void response.writeHead(status).end() }),
    );
    expect(await rig.next("scraper.health")).toEqual({
      kind: "scraper.health",
      ok: true,
      detail: "status 200",
    });
    status = 503;
    await rig.until(() => rig.events.find((e) => e.kind === "scraper.health" && !e.ok));
    expect(rig.events.at(-1)).toMatchObject({ ok: false, detail: "status 503" });
  });

  it("asks for models where there is no /health", async () => {
    const node = await startNode({ "/v1/models": '{"data":[]}' });
    const rig = new Rig(node);
    expect(await rig.next("scraper.health", 3)).toMatchObject({ ok: true });
    expect(node.paths.filter((path) => path === "/health").length).toBe(1);
  });

  it("is not well when refused", async () => {
    const node = await startNode({});
    node.server.closeAllConnections();
    await new Promise((resolve) => node.server.close(resolve));
    const rig = new Rig(node);
    expect(await rig.next("scraper.health")).toMatchObject({ ok: false, detail: "ECONNREFUSED" });
    node.server.listen(0);
  });

  it("tells models when they are known and when they change, no oftener", async () => {
    const routes: Record<string, string> = {};
    const node = await startNode(routes);
    const rig = new Rig(node);
    await rig.next("scraper.health", 3);
    expect(rig.edge.modelsOf("a")).toBeUndefined();
    routes["/v1/models"] = '{"data":[{"id":"m"},{"id":"l","parent":"m"}]}';
    expect(await rig.next("scraper.models")).toEqual({
      kind: "scraper.models",
      models: ["m"],
      adapters: ["l"],
    });
    expect(rig.edge.modelsOf("a")).toEqual({ models: ["m"], adapters: ["l"] });
    await rig.next("scraper.health", 5);
    expect(rig.events.filter((e) => e.kind === "scraper.models")).toEqual([]);
    routes["/v1/models"] = '{"data":[{"id":"n"}]}';
    expect(await rig.next("scraper.models")).toMatchObject({ models: ["n"], adapters: [] });
    delete routes["/v1/models"];
    await rig.next("scraper.health", 5);
    expect(rig.edge.modelsOf("a")).toMatchObject({ models: ["n"] });
  });

  it("does not ask for what is configured", async () => {
    const node = await startNode({ "/health": "" });
    const rig = new Rig(node, { models: ["m"], adapters: [] });
    expect(rig.events).toContainEqual({ kind: "scraper.models", models: ["m"], adapters: [] });
    await rig.next("scraper.health", 3);
    expect(node.paths).not.toContain("/v1/models");
  });

  it("asks for adapters where only models are configured", async () => {
    const node = await startNode({ "/v1/models": '{"data":[{"id":"x"},{"id":"l","parent":"x"}]}' });
    const rig = new Rig(node, { models: ["m"] });
    await rig.until(() =>
      rig.events.find((e) => e.kind === "scraper.models" && e.adapters.length > 0),
    );
    expect(rig.edge.modelsOf("a")).toEqual({ models: ["m"], adapters: ["l"] });
  });
});

describe("scraper: nodes", () => {
  it("stops after remove, and begins anew after add", async () => {
    const node = await startNode({
      "/metrics": vllmText,
      "/health": "",
      "/v1/models": '{"data":[{"id":"m"}]}',
    });
    const rig = new Rig(node);
    await rig.next("scraper.sampled");
    rig.edge.receive({ kind: "scraper.remove", node: "a" });
    rig.events.length = 0;
    await new Promise((resolve) => setTimeout(resolve, 40));
    expect(rig.events).toEqual([]);
    rig.edge.receive({ kind: "scraper.add", node: "a", replyTo: to });
    await rig.until(() => rig.events.find((e) => e.kind === "scraper.models"));
    await rig.next("scraper.sampled");
  });

  it("follows a node to another address", async () => {
    const old = await startNode({ "/metrics": vllmText });
    const next = await startNode({ "/metrics": "tgi_queue_size 1\n" });
    const rig = new Rig(old);
    await rig.next("scraper.sampled");
    rig.edge.addNode({ node: "a", url: next.url, engine: "auto" });
    expect((await rig.next("scraper.sampled")).sample.engine).toBe("tgi");
  });

  it("says so when a node is not configured", () => {
    const rig = new Rig(null);
    rig.edge.receive({ kind: "scraper.add", node: "x", replyTo: to });
    expect(rig.events).toEqual([{ kind: "scraper.failed", reason: "the node is not configured" }]);
  });

  it("leaves no connection after close, also with a request under way", async () => {
    const node = await startNode({ "/metrics": () => {}, "/health": "" });
    const rig = new Rig(node);
    await rig.next("scraper.health", 2);
    rig.edge.close();
    rig.events.length = 0;
    await new Promise((resolve) => node.server.close(resolve));
    expect(rig.events).toEqual([]);
    node.server.listen(0);
  });

  it("spreads its readings by the jitter", async () => {
    for (const [random, least, most] of [
      [0, 750, 800],
      [0.999, 1150, 1200],
    ] as const) {
      const spy = vi.spyOn(globalThis, "setTimeout");
      const edge = new ScraperEdge(
        { ...scraperDefaults, metricsIntervalMs: 100_000 },
        { post: () => {}, random: () => random },
      );
      edge.addNode({
        node: "a",
        url: (await startNode({})).url,
        engine: "auto",
        models: [],
        adapters: [],
      });
      edge.receive({ kind: "scraper.add", node: "a", replyTo: to });
      const waits = (): number[] =>
        spy.mock.calls.map(([, ms]) => (ms ?? 0) / 100).filter((ms) => ms > 500);
      while (waits().length === 0) await new Promise((resolve) => setImmediate(resolve));
      expect(waits()[0]).toBeGreaterThan(least);
      expect(waits()[0]).toBeLessThanOrEqual(most);
      edge.close();
      spy.mockRestore();
    }
  });
});
