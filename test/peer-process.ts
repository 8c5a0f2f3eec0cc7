/**
 * Peers as processes of their own (test/bench/remote-peer.ts, built), in a network namespace of their own if asked,
 * for tests that stop, kill and separate them.
 */
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { LinksMetrics, PeerEvent } from "../transport/peer-links.ts";
import type { PeerCommand } from "./bench/remote-peer.ts";
import type { PeerConfig } from "./bench/remote-system.ts";

const script = join(import.meta.dirname, "..", "dist/test/bench/remote-peer.js");
/** Only a defect reaches it, also where the machine is busy. */
const PATIENCE_MS = 25_000;

/** False, said in a line, where nothing is built: `npm test` builds first. */
export function isPeerBuilt(): boolean {
  if (existsSync(script)) return true;
  console.log("skipped: dist/test/bench/remote-peer.js is missing; `npm run build` makes it");
  return false;
}

/** Waits until it is so. */
export async function until(what: string, isSo: () => boolean): Promise<void> {
  const untilMs = performance.now() + PATIENCE_MS;
  while (!isSo()) {
    if (performance.now() > untilMs) throw new Error(`waited in vain until ${what}`);
    await delay(5);
  }
}

export type PeerStats = {
  metrics: LinksMetrics;
  told: number;
  letters: { reason: string; messageKind: string; count: number }[];
  rssMiB: number;
};

const running = new Set<PeerProcess>();

export async function killAllPeers(): Promise<void> {
  const left = [...running];
  for (const one of left) one.child.kill("SIGKILL");
  await Promise.all(left.map((one) => one.exit));
}

export class PeerProcess {
  readonly child: ChildProcess;
  readonly exit: Promise<void>;
  readonly events: PeerEvent[] = [];
  readonly #answers: Record<string, unknown>[] = [];
  #hasExited = false;
  port = 0;
  err = "";

  private constructor(config: PeerConfig & { host?: string }, namespace: string | undefined) {
    const inside = namespace === undefined ? [] : ["ip", "netns", "exec", namespace];
    const [program = "", ...args] = [...inside, process.execPath, script, JSON.stringify(config)];
    this.child = spawn(program, args, { stdio: ["ignore", "ignore", "pipe", "ipc"] });
    this.child.stderr?.setEncoding("utf8").on("data", (text: string) => {
      this.err += text;
    });
    running.add(this);
    this.child.on("message", (message: { event?: PeerEvent; port?: number }) => {
      if (message.event !== undefined) this.events.push(message.event);
      else if (message.port !== undefined) this.port = message.port;
      else this.#answers.push(message);
    });
    this.exit = new Promise((resolve) => {
      this.child.once("close", () => {
        this.#hasExited = true;
        running.delete(this);
        resolve();
      });
    });
  }

  static async start(
    config: PeerConfig & { host?: string },
    namespace?: string,
  ): Promise<PeerProcess> {
    const peer = new PeerProcess(config, namespace);
    await until("the peer listens", () => {
      if (peer.#hasExited) throw new Error(`the peer ended: ${peer.err}`);
      return peer.port > 0;
    });
    return peer;
  }

  tell(command: PeerCommand): void {
    this.child.send(command);
  }

  async stats(): Promise<PeerStats> {
    this.tell({ do: "stats" });
    await until("the peer tells its figures", () =>
      this.#answers.some((answer) => "stats" in answer),
    );
    const index = this.#answers.findIndex((answer) => "stats" in answer);
    const [answer] = this.#answers.splice(index, 1);
    return answer?.stats as PeerStats;
  }

  /** Waits for so many events of that kind, and gives the last. */
  async told(kind: PeerEvent["kind"], count = 1): Promise<PeerEvent | undefined> {
    const found = () => this.events.filter((event) => event.kind === kind);
    await until(`the peer tells "${kind}"`, () => found().length >= count);
    return found().at(-1);
  }
}

/** Two network namespaces, joined by a wire. */
export type Namespaces = {
  names: [string, string];
  /** Address of each. */
  hosts: [string, string];
  /** Cuts the wire, or mends it. */
  setWire(isWhole: boolean): void;
  remove(): void;
};

/** Undefined, said in a line, where they cannot be made. */
export function makeNamespaces(): Namespaces | undefined {
  const tag = `hr${process.pid % 100_000}`;
  const names: [string, string] = [`${tag}a`, `${tag}b`];
  const hosts: [string, string] = ["10.203.7.1", "10.203.7.2"];
  const ip = (...args: string[]): boolean => spawnSync("ip", args).status === 0;
  const remove = (): void => {
    for (const name of names) ip("netns", "delete", name);
  };
  const isMade =
    names.every((name) => ip("netns", "add", name)) &&
    ip("link", "add", `${tag}v0`, "type", "veth", "peer", "name", `${tag}v1`) &&
    names.every((name, index) => {
      const device = `${tag}v${index}`;
      return (
        ip("link", "set", device, "netns", name) &&
        ip("-n", name, "address", "add", `${hosts[index]}/24`, "dev", device) &&
        ip("-n", name, "link", "set", "lo", "up") &&
        ip("-n", name, "link", "set", device, "up")
      );
    });
  const setWire = (isWhole: boolean): void => {
    ip("-n", names[1], "link", "set", `${tag}v1`, isWhole ? "up" : "down");
  };
  if (isMade) return { names, hosts, setWire, remove };
  remove();
  ip("link", "delete", `${tag}v0`);
  console.log("skipped: network namespaces cannot be made here (ip netns)");
  return undefined;
}
