/**
 * The processes of a benchmark: a gateway (the real `headrace serve`), nodes, baselines, each forked, on ports of
 * the system's choice, and all ended with `endAll`, whatever happened. CPU and memory are read from /proc, for all
 * alike, so Linux is needed.
 */
import { type ChildProcess, fork } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { Agent, request } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { StateSnapshot } from "../../transport/metrics.ts";

export const GATEWAY_KEY = "bench-key-0001";
const ADMIN_TOKEN = "bench-admin-token-0001";
/** Last part of what a process wrote to standard error, for when it ends unexpectedly. */
const STDERR_CHARACTERS_MAX = 4000;
const START_MS_MAX = 20_000;

/** A forked process that listens. */
export type Running = {
  readonly name: string;
  readonly process: ChildProcess;
  readonly pid: number;
  readonly port: number;
  /** More than one where a process stands for several nodes. */
  readonly ports: readonly number[];
  /** Of a gateway in a cluster: where other peers reach it. */
  readonly peerAddress?: string;
  /** Lines on standard error that tell of an unhandled rejection or exception. */
  readonly unhandled: () => number;
};

/** What a process tells when it listens. */
type Listening = { port: number; ports?: number[]; peerAddress?: string };

export class Stack {
  readonly #children = new Set<ChildProcess>();
  readonly #folder = mkdtempSync(join(tmpdir(), "headrace-bench-"));
  readonly #agent = new Agent({ keepAlive: true });
  #configs = 0;
  readonly #onExit = (): void => {
    for (const child of this.#children) child.kill("SIGKILL");
  };
  readonly #onSignal = (): void => process.exit(130);

  constructor() {
    process.on("exit", this.#onExit);
    process.on("SIGINT", this.#onSignal);
    process.on("SIGTERM", this.#onSignal);
  }

  /** A script beside this file, such as "fixed-node". */
  script(script: string, args: readonly string[] = []): Promise<Running> {
    const path = fileURLToPath(new URL(`${script}.js`, import.meta.url));
    return this.#start(script, path, args, []);
  }

  /** `headrace node` with the given flags. */
  node(name: string, flags: readonly string[], port = 0): Promise<Running> {
    return this.#headrace(name, ["node", "--port", String(port), "--name", name, ...flags], []);
  }

  /**
   * `headrace serve` with a configuration like a file's, over one key without narrow limits; resolves when it
   * knows the models of all its nodes.
   */
  async gateway(
    config: { nodes: readonly { name: string; url: string }[] } & Record<string, unknown>,
    execArgv: readonly string[] = [],
  ): Promise<Running> {
    const limits = { requestsPerMinute: 10_000_000, tokensPerMinute: 1_000_000_000 };
    const file = join(this.#folder, `headrace-${++this.#configs}.json`);
    const whole = {
      listen: { port: 0 },
      log: { level: "error" },
      admin: { token: ADMIN_TOKEN },
      keys: [{ key: GATEWAY_KEY, tenant: "bench", limits }],
      ...config,
    };
    writeFileSync(file, JSON.stringify(whole));
    const gateway = await this.#headrace("gateway", ["serve", "--config", file], execArgv);
    await this.until("the gateway to know its nodes", START_MS_MAX, async () => {
      const { nodes } = await this.state(gateway);
      const known = nodes.filter(({ snapshot }) => (snapshot.models?.length ?? 0) > 0);
      return known.length === config.nodes.length;
    });
    return gateway;
  }

  /** What the gateway's actors say of themselves. */
  async state(gateway: Running): Promise<StateSnapshot> {
    const text = await this.call(gateway.port, "GET", "/admin/state");
    return JSON.parse(text);
  }

  /** The body of a small exchange; rejects for statuses other than 2xx. */
  call(port: number, method: string, path: string, body?: unknown): Promise<string> {
    return new Promise((resolve, reject) => {
      const headers = {
        authorization: `Bearer ${ADMIN_TOKEN}`,
        "content-type": "application/json",
      };
      const to = { host: "127.0.0.1", port, method, path, agent: this.#agent, headers };
      const outgoing = request(to, (response) => {
        let text = "";
        response.setEncoding("utf8");
        response.on("data", (chunk: string) => {
          text += chunk;
        });
        response.on("error", reject);
        response.on("end", () => {
          const status = response.statusCode ?? 0;
          if (status >= 200 && status < 300) resolve(text);
          else reject(new Error(`${method} ${path} answered ${status}: ${text.slice(0, 200)}`));
        });
      });
      outgoing.on("error", reject);
      outgoing.end(body === undefined ? undefined : JSON.stringify(body));
    });
  }

  /** One series of a process's `/metrics`, labels left aside; 0 when it is not there. */
  async metric(port: number, name: string): Promise<number> {
    const text = await this.call(port, "GET", "/metrics");
    const line = text
      .split("\n")
      .find((each) => each.startsWith(`${name}{`) || each.startsWith(`${name} `));
    return Number(line?.slice(line.lastIndexOf(" ") + 1) ?? 0);
  }

  /** Asks every 20 ms until it is so; rejects after `timeoutMs`. */
  async until(what: string, timeoutMs: number, isSo: () => Promise<boolean>): Promise<void> {
    const giveUpAtMs = performance.now() + timeoutMs;
    while (!(await isSo())) {
      if (performance.now() > giveUpAtMs) throw new Error(`waited ${timeoutMs} ms for ${what}`);
      await sleep(20);
    }
  }

  /** Ends one process: asks first, insists after 5 s. */
  async end(running: Running): Promise<void> {
    await this.#endChild(running.process);
  }

  async kill(running: Running): Promise<void> {
    const exited = once(running.process, "exit");
    running.process.kill("SIGKILL");
    await exited;
  }

  async endAll(): Promise<void> {
    this.#agent.destroy();
    await Promise.all([...this.#children].map((child) => this.#endChild(child)));
    rmSync(this.#folder, { recursive: true, force: true });
    process.off("exit", this.#onExit);
    process.off("SIGINT", this.#onSignal);
    process.off("SIGTERM", this.#onSignal);
  }

  #headrace(name: string, args: readonly string[], execArgv: readonly string[]): Promise<Running> {
    const path = fileURLToPath(new URL("../../bin/headrace.js", import.meta.url));
    return this.#start(name, path, args, execArgv);
  }

  async #start(
    name: string,
    path: string,
    args: readonly string[],
    execArgv: readonly string[],
  ): Promise<Running> {
    const stdio: ("ignore" | "pipe" | "ipc")[] = ["ignore", "ignore", "pipe", "ipc"];
    const child = fork(path, args, { stdio, execArgv: [...execArgv] });
    this.#children.add(child);
    let errors = "";
    let unhandled = 0;
    child.stderr?.setEncoding("utf8");
    child.stderr?.on("data", (text: string) => {
      unhandled += text.split(/unhandled|uncaught/i).length - 1;
      errors = (errors + text).slice(-STDERR_CHARACTERS_MAX);
    });
    child.once("exit", (code, signal) => {
      this.#children.delete(child);
      const asked = signal === "SIGKILL" || signal === "SIGTERM" || code === 0;
      if (!asked) process.stderr.write(`${name} ended (exit code ${code ?? signal}):\n${errors}\n`);
    });
    const message = await new Promise<Listening>((resolve, reject) => {
      const timer = setTimeout(() => {
        reject(new Error(`${name} did not listen within ${START_MS_MAX} ms`));
      }, START_MS_MAX);
      child.once("message", (listening: Listening) => {
        clearTimeout(timer);
        resolve(listening);
      });
      child.once("exit", (code) => {
        clearTimeout(timer);
        reject(new Error(`${name} ended at its start (exit code ${code}):\n${errors}`));
      });
    });
    const { port, ports = [port], peerAddress } = message;
    return {
      name,
      process: child,
      pid: child.pid ?? 0,
      port,
      ports,
      ...(peerAddress === undefined ? {} : { peerAddress }),
      unhandled: () => unhandled,
    };
  }

  async #endChild(child: ChildProcess): Promise<void> {
    if (child.exitCode !== null || child.signalCode !== null) return;
    const exited = once(child, "exit");
    child.kill("SIGTERM");
    const timer = setTimeout(() => child.kill("SIGKILL"), 5000);
    await exited;
    clearTimeout(timer);
  }
}

/** CPU time that the process's threads have used, ms; to the ns, where /proc/PID/stat counts ticks of 10 ms. */
export function cpuMs({ pid }: Running): number {
  let ns = 0;
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    const [ran] = readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8").split(" ");
    ns += Number(ran);
  }
  return ns / 1e6;
}

/** Resident memory, MiB. */
export function rssMiB({ pid }: Running): number {
  const line = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"));
  return Number(line?.[1] ?? 0) / 1024;
}

/** What a gateway without requests must not hold; each by its name, all 0 when it is at rest. */
export function heldBy({
  nodes,
  router,
  cache,
  limiter,
  requests,
  system,
}: StateSnapshot): Record<string, number> {
  const sum = (counts: Iterable<number>): number => {
    let total = 0;
    for (const count of counts) total += count;
    return total;
  };
  const pools = router?.pools ?? [];
  const keys = limiter?.keys ?? [];
  return {
    requests: requests?.open ?? Number.NaN,
    inflight: sum(nodes.map(({ snapshot }) => snapshot.inflight)),
    leases: sum(nodes.map(({ leases }) => leases.length)),
    queued:
      router === undefined
        ? Number.NaN
        : sum(pools.flatMap(({ queued }) => queued.map((band) => band.waiting))),
    reservations: limiter?.reservations ?? Number.NaN,
    keysInflight: sum(keys.map(({ inflight }) => inflight)),
    reservedTokens: sum(keys.map(({ reservedTokens }) => reservedTokens)),
    flights: cache?.flights ?? Number.NaN,
    participants: cache?.participants ?? Number.NaN,
    asks: system.asks,
  };
}

/** "expired cache.lookup 3, …": reason, kind and count of each sort of dead letter, or "none". */
export function lettersOf({ system }: StateSnapshot): string {
  const letters = system.deadLetters.map(
    ({ reason, messageKind, count }) => `${reason} ${messageKind} ${count}`,
  );
  return letters.length === 0 ? "none" : letters.join(", ");
}

/** Waits until nothing is held, at most `timeoutMs`; what is held then ({} = nothing). */
export async function restOf(
  stack: Stack,
  gateway: Running,
  timeoutMs: number,
): Promise<Record<string, number>> {
  const giveUpAtMs = performance.now() + timeoutMs;
  for (;;) {
    const held = Object.entries(heldBy(await stack.state(gateway))).filter(([name, count]) => {
      // The description itself is asked for; probes and health checks come and go.
      return name !== "asks" && count !== 0;
    });
    if (held.length === 0 || performance.now() > giveUpAtMs) return Object.fromEntries(held);
    await sleep(50);
  }
}
