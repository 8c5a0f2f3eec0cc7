/**
 * A whole Headrace over real sockets in one process: a served gateway in front of stand-in nodes. Every port is the
 * system's choice, the log is kept instead of written, and `close` ends all of it.
 *
 *     const world = await startLiveWorld({ nodes: 2 });
 *     const reply = await world.chat("What is a headrace?");
 *     world.nodes[0]?.setFault({ refuse: true });
 *     await world.idle(); // Nothing leaked: no lease, reservation, flight or open request is left.
 *     await world.close();
 */
import { setTimeout as delay } from "node:timers/promises";
import { GpuNodeModel } from "../sim/gpu-node-model.ts";
import { lawByName } from "../sim/laws.ts";
import { readOptions } from "../transport/config.ts";
import type { Log, LogLevel } from "../transport/log.ts";
import type { Gateway } from "../transport/main.ts";
import type { StateSnapshot } from "../transport/metrics.ts";
import { NodeServer, type NodeServerOptions } from "../transport/node-server.ts";
import type { OptionsInput } from "../transport/options.ts";
import { Server } from "../transport/server.ts";

/** What the stand-in nodes serve, unless told otherwise. */
export const MODEL = "llama-3.1-8b";

/** A node a thousand times as fast as the card it stands for: no test waits for an answer. */
const SPEED = 1000;
/** For something that is bound to come: only a defect reaches it. */
const PATIENCE_MS = 30_000;

/** Fields of an OpenAI chat message, as far as a test looks at them. */
type Message = { content: string | null; tool_calls?: unknown[] };
/** Any JSON body that comes back; a test reads the part that its request brings. */
export type ReplyBody = {
  choices: { message: Message; finish_reason: string }[];
  data: { id: string; embedding: unknown }[];
  usage: { prompt_tokens: number; completion_tokens: number };
  error: { message: string; type: string; param: string | null; code: string };
  system_fingerprint: string;
  [field: string]: unknown;
};

export type Reply = {
  status: number;
  headers: Headers;
  text: string;
  /** Throws when the text is not JSON. */
  json: ReplyBody;
  /** "miss", "hit-exact", "joined", … */
  cache: string | null;
  /** Name of the node that answered: node-1, node-2, … */
  node: string | null;
  attempts: number;
};

export type LogLine = { level: LogLevel; fields: object; text: string };

/** Stand-in nodes alone, for what brings its own gateway (an embedded one, say). */
export type LiveNodes = { nodes: NodeServer[]; urls: string[]; close(): Promise<void> };

export async function startNodes(
  count: number,
  options: Partial<Omit<NodeServerOptions, "engine">> = {},
): Promise<LiveNodes> {
  const nodes: NodeServer[] = [];
  const urls: string[] = [];
  const prefix = { blockTokens: 64, blocksMax: 4096 };
  for (let number = 1; number <= count; number++) {
    const engine = new GpuNodeModel({ law: lawByName("llama-3.1-8b/h100"), mode: "leap", prefix });
    const name = `node-${number}`;
    const node = new NodeServer({ engine, models: [MODEL], name, speed: SPEED, ...options });
    nodes.push(node);
    urls.push((await node.listen(0)).url);
  }
  return {
    nodes,
    urls,
    async close() {
      await Promise.all(nodes.map((node) => node.close()));
    },
  };
}

export type LiveWorldOptions = {
  /** How many stand-in nodes; default 1. They are node-1, node-2, … */
  nodes?: number;
  /** Gateway options. Its `nodes` come after the stand-ins. */
  options?: Partial<OptionsInput>;
  /** Engine µs per real µs; default 1000. */
  speed?: number;
  /** Of the stand-ins; default [MODEL]. */
  models?: readonly string[];
  /** Further options of every stand-in. */
  node?: Partial<Omit<NodeServerOptions, "engine">>;
};

export class LiveWorld {
  readonly nodes: readonly NodeServer[];
  /** Of the stand-in nodes. */
  readonly urls: readonly string[];
  readonly server: Server;
  readonly gateway: Gateway;
  /** Of the gateway: "http://127.0.0.1:…". */
  readonly url: string;
  /** All that was logged. */
  readonly log: readonly LogLine[];
  readonly #fatal: readonly unknown[];
  readonly #closeNodes: () => Promise<void>;
  #closed: Promise<void> | undefined;

  constructor(server: Server, live: LiveNodes, log: readonly LogLine[], fatal: readonly unknown[]) {
    this.server = server;
    this.gateway = server.gateway;
    this.nodes = live.nodes;
    this.urls = live.urls;
    this.url = `http://127.0.0.1:${server.port}`;
    this.log = log;
    this.#fatal = fatal;
    this.#closeNodes = () => live.close();
  }

  /** Sends one request and reads the whole answer. A body that is no text is sent as JSON. */
  async send(
    method: string,
    path: string,
    body?: unknown,
    headers: Record<string, string> = {},
  ): Promise<Reply> {
    const content =
      body === undefined ? {} : { body: typeof body === "string" ? body : JSON.stringify(body) };
    const response = await fetch(this.url + path, {
      method,
      headers: { "content-type": "application/json", ...headers },
      ...content,
    });
    const text = await response.text();
    return {
      status: response.status,
      headers: response.headers,
      text,
      get json() {
        return JSON.parse(text) as ReplyBody;
      },
      cache: response.headers.get("x-headrace-cache"),
      node: response.headers.get("x-headrace-node"),
      attempts: Number(response.headers.get("x-headrace-attempts")),
    };
  }

  /** A chat request of one user message, as `send`. */
  chat(
    content: unknown,
    fields: Record<string, unknown> = {},
    headers: Record<string, string> = {},
  ): Promise<Reply> {
    const messages = [{ role: "user", content }];
    return this.send(
      "POST",
      "/v1/chat/completions",
      { model: MODEL, messages, ...fields },
      headers,
    );
  }

  /** Requests that reached each node so far. */
  counts(): number[] {
    return this.nodes.map((node) => node.stats().requests);
  }

  /** Waits until nothing is open anywhere; throws, with what is left, when that does not come. */
  async idle(): Promise<void> {
    let left: object = {};
    const isIdle = async () => {
      const { cache, limiter, nodes, requests, router } = await this.gateway.state();
      const bands = router?.pools.flatMap((pool) => pool.queued) ?? [];
      left = {
        requests: requests?.open,
        flights: cache?.flights,
        participants: cache?.participants,
        reservations: limiter?.reservations,
        leases: nodes.reduce((sum, { leases }) => sum + leases.length, 0),
        queued: bands.reduce((sum, { waiting }) => sum + waiting, 0),
        onNodes: this.nodes.reduce((sum, node) => sum + node.stats().open, 0),
      };
      return Object.values(left).every((count) => count === 0);
    };
    await until("nothing is open", isIdle).catch((error) => {
      throw new Error(`something is still open: ${JSON.stringify(left)}`, { cause: error });
    });
  }

  /** Ends gateway and nodes, open requests included. Rejects when the actor system had given up. Idempotent. */
  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  async #close(): Promise<void> {
    await this.server.stop();
    await this.#closeNodes();
    if (this.#fatal.length > 0)
      throw new Error("the actor system gave up", { cause: this.#fatal[0] });
  }
}

/** Starts nodes and a gateway with a port, and waits until it knows their models. */
export async function startLiveWorld(world: LiveWorldOptions = {}): Promise<LiveWorld> {
  const { options = {}, speed = SPEED, models = [MODEL] } = world;
  const live = await startNodes(world.nodes ?? 1, { models, speed, ...world.node });
  const lines: LogLine[] = [];
  const fatal: unknown[] = [];
  let server: Server | undefined;
  try {
    const standIns = live.urls.map((url, index) => ({ url, name: `node-${index + 1}` }));
    const resolved = readOptions({
      ...options,
      listen: { host: "127.0.0.1", port: 0, ...options.listen },
      nodes: [...standIns, ...(options.nodes ?? [])],
      // Whoever closes a world while requests are open does not wait for them.
      timeouts: { drainMs: 0, ...options.timeouts },
    });
    server = await Server.start(resolved, keptLog(lines), (error) => void fatal.push(error));
    const { gateway } = server;
    await untilModelsKnown(() => gateway.state(), standIns.length);
    return new LiveWorld(server, live, lines, fatal);
  } catch (error) {
    await server?.stop();
    await live.close();
    throw error;
  }
}

/** Until each of the first `count` nodes has told its models: only then a model can be unknown. */
export async function untilModelsKnown(
  state: () => Promise<StateSnapshot>,
  count: number,
): Promise<void> {
  await until("the nodes' models are known", async () => {
    const { nodes } = await state();
    return (
      nodes.length >= count &&
      nodes.slice(0, count).every(({ snapshot }) => snapshot.models !== undefined)
    );
  });
}

/** Waits for what is bound to come; throws when it does not. */
export async function until(what: string, isSo: () => boolean | Promise<boolean>): Promise<void> {
  const untilMs = performance.now() + PATIENCE_MS;
  while (!(await isSo())) {
    if (performance.now() > untilMs) throw new Error(`waited in vain until ${what}`);
    await delay(5);
  }
}

function keptLog(lines: LogLine[]): Log {
  const keep = (level: LogLevel) => (fields: object, text: string) =>
    void lines.push({ level, fields, text });
  return {
    debug: keep("debug"),
    info: keep("info"),
    warn: keep("warn"),
    error: keep("error"),
    setLevel: () => {},
  };
}
