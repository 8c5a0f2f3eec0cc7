/**
 * `headrace demo`: a gateway and three stand-in nodes, each a process of its own, and a short tour over real
 * HTTP that shows cache, joining, limits, failover and recovery as they happen. Then it stays up.
 */
import { type ChildProcess, fork } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { Agent, request } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { Command } from "commander";
import pc from "picocolors";

const MODEL = "llama-3.1-8b";
const ADMIN_TOKEN = "demo-admin-token-0001";
const KEYS = { acme: "demo-key-acme", tiny: "demo-key-tiny" };
const NODES = ["gpu-1", "gpu-2", "gpu-3"] as const;

export function demoCommand(): Command {
  const command = new Command("demo");
  return command
    .description(
      "a gateway with three stand-in nodes, a tour of what it does, then up for you to try",
    )
    .option("--port <port>", "port of the gateway (0 = any free one)", "8080")
    .option("--once", "end after the tour instead of staying up")
    .action(async (flags: { port: string; once?: boolean }) => {
      const port = Number(flags.port);
      if (!Number.isInteger(port) || port < 0 || port > 65_535) {
        command.error(`--port ${flags.port}: a whole number from 0 to 65535 is accepted`, {
          exitCode: 2,
        });
      }
      const demo = new Demo(port);
      let ended: Promise<never> | undefined;
      const end = (code: number): Promise<never> => {
        ended ??= demo.stop().then(() => process.exit(code));
        return ended;
      };
      process.once("SIGINT", () => void end(0));
      process.once("SIGTERM", () => void end(0));
      try {
        await demo.start();
        await demo.tour();
      } catch (error) {
        if (ended !== undefined) return ended; // The stop took its processes away: no failure.
        console.error(
          pc.red(`the tour stopped: ${error instanceof Error ? error.message : String(error)}`),
        );
        return end(1);
      }
      if (flags.once === true) return end(0);
      demo.showHowToGoOn();
      return undefined;
    });
}

type Reply = {
  status: number;
  headers: NodeJS.Dict<string | string[]>;
  body: string;
  /** From sending to the first byte of the body, ms. */
  firstByteMs: number;
  totalMs: number;
};

class Demo {
  readonly #wishedPort: number;
  readonly #folder = mkdtempSync(join(tmpdir(), "headrace-demo-"));
  readonly #agent = new Agent({ keepAlive: true, maxSockets: 1024 });
  readonly #nodes = new Map<string, { process: ChildProcess; port: number }>();
  /** All that were ever started: those that are still starting must end, too. */
  readonly #children: ChildProcess[] = [];
  #port = 0;
  #stopping = false;

  constructor(port: number) {
    this.#wishedPort = port;
  }

  // ---- processes ----------------------------------------------------------------------------------------

  async start(): Promise<void> {
    title(
      "Starting a gateway and three stand-in inference nodes (no GPU: real queues, modelled speed)",
    );
    await Promise.all(NODES.map((name) => this.#startNode(name, 0)));
    for (const name of NODES) say(`node ${name} on port ${this.#nodes.get(name)?.port}`);
    const config = join(this.#folder, "headrace.json");
    writeFileSync(config, JSON.stringify(this.#config(), null, 2));
    this.#port = await listeningPort(this.#fork(["serve", "--config", config]), "the gateway");
    await this.#untilAllNodesKnown();
    say(`gateway on http://127.0.0.1:${this.#port}`);
  }

  #config(): unknown {
    return {
      listen: { port: this.#wishedPort },
      log: { level: "error", format: "text" },
      admin: { token: ADMIN_TOKEN },
      nodes: NODES.map((name) => ({
        name,
        url: `http://127.0.0.1:${this.#nodes.get(name)?.port}`,
      })),
      keys: [
        { key: KEYS.acme, tenant: "acme" },
        { key: KEYS.tiny, tenant: "tiny", limits: { requestsPerMinute: 6, requestBurst: 3 } },
      ],
      // Recovery within the length of a tour; production defaults are slower.
      circuit: { openMs: 1500 },
      router: { slowStartMs: 6000 },
      health: { intervalMs: 500, timeoutMs: 500 },
    };
  }

  async #startNode(name: string, port: number): Promise<void> {
    const flags = ["node", "--port", String(port), "--model", MODEL, "--name", name];
    const child = this.#fork([...flags, "--law", "llama-3.1-8b/h100", "--speed", "2"]);
    this.#nodes.set(name, { process: child, port: await listeningPort(child, `node ${name}`) });
  }

  #fork(args: string[]): ChildProcess {
    if (this.#stopping) throw new Error("the demo is ending");
    const child = startHeadrace(args);
    this.#children.push(child);
    return child;
  }

  async #untilAllNodesKnown(): Promise<void> {
    for (let tries = 0; tries < 200; tries++) {
      const nodes = await this.#adminNodes();
      if (nodes.length === NODES.length && nodes.every((n) => n.snapshot.models?.includes(MODEL)))
        return;
      await sleep(50);
    }
    throw new Error("the gateway did not learn its nodes within 10 s");
  }

  async stop(): Promise<void> {
    this.#stopping = true;
    this.#agent.destroy();
    await Promise.all(this.#children.map(endChild));
    rmSync(this.#folder, { recursive: true, force: true });
  }

  // ---- the tour -----------------------------------------------------------------------------------------

  async tour(): Promise<void> {
    await this.#showMissAndHit();
    await this.#showJoin();
    await this.#showStream();
    await this.#showLimit();
    await this.#showFailover();
    await this.#showRecovery();
  }

  async #showMissAndHit(): Promise<void> {
    title("1. The same question twice: a node answers the first, the cache the second");
    const question = "What is a headrace?";
    const first = await this.#chat(question, KEYS.acme);
    say(`first:  ${verdict(first)}, ${first.totalMs.toFixed(0)} ms`);
    const second = await this.#chat(question, KEYS.acme);
    say(`second: ${verdict(second)}, ${second.totalMs.toFixed(1)} ms, no token spent`);
    check(cacheOf(second) === "hit-exact", "the second request should be a hit");
    const other = await this.#chat(question, KEYS.tiny);
    say(`the same from another tenant: ${verdict(other)} (tenants share nothing)`);
    check(cacheOf(other) === "miss", "another tenant must not get the entry");
  }

  async #showJoin(): Promise<void> {
    title("2. Twenty identical requests at once: one generation, nineteen join it");
    const replies = await Promise.all(
      Array.from({ length: 20 }, () => this.#chat("Tell me about water turbines.", KEYS.acme)),
    );
    const count = (kind: string) => replies.filter((reply) => cacheOf(reply) === kind).length;
    say(`miss: ${count("miss")}, joined: ${count("joined")}, hit: ${count("hit-exact")}`);
    check(count("miss") === 1 && new Set(replies.map(textOf)).size === 1, "one generation for all");
  }

  async #showStream(): Promise<void> {
    title("3. A streamed answer");
    const reply = await this.#chat("Write a line about rivers.", KEYS.acme, { stream: true });
    const events = reply.body.split("\n\n").filter((event) => event.startsWith("data: "));
    say(`${verdict(reply)}: first byte after ${reply.firstByteMs.toFixed(0)} ms, whole after`);
    say(
      `${reply.totalMs.toFixed(0)} ms, ${events.length} events: "${streamedText(events).slice(0, 60)}…"`,
    );
    check(events.at(-1) === "data: [DONE]", "a stream ends with [DONE]");
  }

  async #showLimit(): Promise<void> {
    title(
      "4. A tenant over its limit (6 requests a minute, 3 at once, one of them used in step 1)",
    );
    for (let i = 1; i <= 4; i++) {
      const reply = await this.#chat(`Tiny question number ${i}.`, KEYS.tiny);
      const left = reply.headers["x-ratelimit-remaining-requests"];
      const retry = reply.headers["retry-after"];
      say(
        `request ${i}: ${reply.status}, ${left} left${retry === undefined ? "" : `, retry-after ${retry} s`}`,
      );
      if (reply.status === 429) return;
    }
    throw new Error("the limit did not hold");
  }

  async #showFailover(): Promise<void> {
    title("5. A node is killed under load: nothing is lost, the others take over");
    const victim = this.#nodes.get("gpu-2");
    const kill = async () => {
      await sleep(1000);
      say(pc.yellow("kill -9 gpu-2"));
      victim?.process.kill("SIGKILL");
    };
    const [replies] = await Promise.all([this.#load(90, 30, "failover"), kill()]);
    const failed = replies.filter((reply) => reply.status !== 200);
    const retried = replies.filter((reply) => Number(reply.headers["x-headrace-attempts"]) > 1);
    say(
      `${replies.length} requests: ${replies.length - failed.length} ok, ${failed.length} failed;`,
    );
    say(`${retried.length} were moved to another node; ${shares(replies)}`);
    check(failed.length === 0, `no request may fail, but ${failed.length} did: ${failed[0]?.body}`);
    say(`circuits: ${await this.#circuits()}`);
  }

  async #showRecovery(): Promise<void> {
    title("6. The node comes back: half-open, slow start, then its full share");
    await this.#startNode("gpu-2", this.#nodes.get("gpu-2")?.port ?? 0);
    say("gpu-2 started again");
    let seen = "";
    let replies: Reply[] = [];
    for (let round = 0; round < 40; round++) {
      replies = await this.#load(10, 40, `recovery ${round}`);
      const state = await this.#circuits();
      if (state !== seen) say(state);
      seen = state;
      if (/gpu-2 closed, weight 1\.0/.test(state)) break;
    }
    replies = await this.#load(30, 40, "recovered");
    say(`last 30 requests: ${shares(replies)}`);
    check(
      replies.some((reply) => reply.headers["x-headrace-node"] === "gpu-2"),
      "gpu-2 should take requests again",
    );
  }

  showHowToGoOn(): void {
    const url = `http://127.0.0.1:${this.#port}`;
    title("The tour is over; everything stays up until Ctrl-C. Try it:");
    console.log(`
  curl ${url}/v1/chat/completions -i \\
    -H "authorization: Bearer ${KEYS.acme}" -H "content-type: application/json" \\
    -d '{"model":"${MODEL}","messages":[{"role":"user","content":"What is a headrace?"}]}'

  nodes:    curl ${url}/admin/nodes -H "authorization: Bearer ${ADMIN_TOKEN}"
  why:      curl ${url}/admin/explain/REQUEST_ID -H "authorization: Bearer ${ADMIN_TOKEN}"
  metrics:  curl ${url}/metrics
`);
  }

  // ---- requests -----------------------------------------------------------------------------------------

  /** `count` different questions, one every `everyMs`; resolves with all replies. */
  #load(count: number, everyMs: number, name: string): Promise<Reply[]> {
    const ask = async (i: number) => {
      await sleep(i * everyMs);
      return this.#chat(`Question ${i} of ${name}.`, KEYS.acme, { max_tokens: 64 });
    };
    return Promise.all(Array.from({ length: count }, (_, i) => ask(i)));
  }

  #chat(question: string, key: string, more: Record<string, unknown> = {}): Promise<Reply> {
    const body = { model: MODEL, messages: [{ role: "user", content: question }], ...more };
    return this.#call("POST", "/v1/chat/completions", key, JSON.stringify(body));
  }

  #call(method: string, path: string, key: string, body?: string): Promise<Reply> {
    const startedAtMs = performance.now();
    return new Promise((resolve, reject) => {
      const outgoing = request(
        {
          host: "127.0.0.1",
          port: this.#port,
          method,
          path,
          agent: this.#agent,
          headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
        },
        (response) => {
          let text = "";
          let firstByteMs = 0;
          response.setEncoding("utf8");
          response.on("data", (chunk: string) => {
            if (text === "") firstByteMs = performance.now() - startedAtMs;
            text += chunk;
          });
          response.on("end", () =>
            resolve({
              status: response.statusCode ?? 0,
              headers: response.headers,
              body: text,
              firstByteMs,
              totalMs: performance.now() - startedAtMs,
            }),
          );
          response.on("error", reject);
        },
      );
      outgoing.on("error", reject);
      outgoing.end(body);
    });
  }

  async #adminNodes(): Promise<
    {
      snapshot: {
        node: string;
        circuit: string;
        ramp: number;
        models?: string[];
        inflight: number;
      };
    }[]
  > {
    const reply = await this.#call("GET", "/admin/nodes", ADMIN_TOKEN);
    return JSON.parse(reply.body).nodes ?? [];
  }

  async #circuits(): Promise<string> {
    const nodes = await this.#adminNodes();
    return nodes
      .map(
        ({ snapshot }) =>
          `${snapshot.node} ${snapshot.circuit}, weight ${snapshot.ramp.toFixed(1)}`,
      )
      .join(" · ");
  }
}

// ---- small things -----------------------------------------------------------------------------------------

function startHeadrace(args: string[]): ChildProcess {
  const main = process.argv[1];
  if (main === undefined) throw new Error("cannot find the headrace command");
  return fork(main, args, { stdio: ["ignore", "ignore", "inherit", "ipc"] });
}

async function listeningPort(child: ChildProcess, what: string): Promise<number> {
  const port = new Promise<number>((resolve, reject) => {
    child.once("message", (message: { port?: number }) => resolve(message.port ?? 0));
    child.once("exit", (code) =>
      reject(new Error(`${what} ended at its start (exit code ${code})`)),
    );
  });
  return port;
}

async function endChild(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const exited = once(child, "exit");
  child.kill("SIGTERM");
  const timer = setTimeout(() => child.kill("SIGKILL"), 3000);
  await exited;
  clearTimeout(timer);
}

function title(text: string): void {
  console.log(`\n${pc.bold(pc.cyan(text))}`);
}

function say(text: string): void {
  console.log(`  ${text}`);
}

function check(condition: boolean, message: string): void {
  if (!condition) throw new Error(message);
}

function cacheOf(reply: Reply): string {
  return String(reply.headers["x-headrace-cache"]);
}

function verdict(reply: Reply): string {
  const node = reply.headers["x-headrace-node"];
  return `${reply.status} ${cacheOf(reply)}${node === undefined ? "" : ` on ${node}`}`;
}

function textOf(reply: Reply): string {
  return JSON.parse(reply.body).choices[0].message.content;
}

function streamedText(events: string[]): string {
  return events
    .filter((event) => event !== "data: [DONE]")
    .map((event) => JSON.parse(event.slice(6)).choices[0]?.delta?.content ?? "")
    .join("")
    .trim();
}

function shares(replies: Reply[]): string {
  const counts = new Map<string, number>();
  for (const reply of replies) {
    const node = String(reply.headers["x-headrace-node"] ?? "cache");
    counts.set(node, (counts.get(node) ?? 0) + 1);
  }
  return [...counts.entries()]
    .sort(([a], [b]) => a.localeCompare(b))
    .map(([node, count]) => `${node} ${count}`)
    .join(", ");
}
