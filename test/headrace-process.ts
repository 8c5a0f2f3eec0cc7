/**
 * The built `headrace` command as a process of its own: what it writes is kept, and every wait is for something that
 * it writes, tells or does.
 */
import { type ChildProcess, fork } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";

/** For something that is bound to come: only a defect reaches it, also where the machine is busy. */
const PATIENCE_MS = 25_000;

const command = join(import.meta.dirname, "..", "dist/bin/headrace.js");

/** False, said in a line, where nothing is built: `npm test` builds first. */
export function isBuilt(): boolean {
  if (existsSync(command)) return true;
  console.log("skipped: dist/bin/headrace.js is missing; `npm run build` makes it");
  return false;
}

/** A line of the log: `msg`, and fields as the line has them. */
export type LogFields = { msg: string; [field: string]: unknown };

const running = new Set<HeadraceProcess>();

/** Ends what tests have left running. */
export async function killAll(): Promise<void> {
  const left = [...running];
  for (const one of left) one.child.kill("SIGKILL");
  await Promise.all(left.map((one) => one.exit));
}

export class HeadraceProcess {
  readonly child: ChildProcess;
  /** The exit code, or the signal that ended it. Everything it wrote has come. */
  readonly exit: Promise<number | string>;
  out = "";
  err = "";
  #exited = false;
  #port: number | undefined;
  /** Where other peers reach it, as it told over IPC; of a process in a cluster, once it listens. */
  peerAddress = "";

  /** @param args as on the command line, after `headrace`. */
  constructor(args: readonly string[]) {
    this.child = fork(command, args, {
      stdio: ["ignore", "pipe", "pipe", "ipc"],
      env: { ...process.env, NO_COLOR: "1" },
      execArgv: [],
    });
    running.add(this);
    const keep = (stream: "out" | "err") => (text: string) => {
      this[stream] += text;
    };
    this.child.stdout?.setEncoding("utf8").on("data", keep("out"));
    this.child.stderr?.setEncoding("utf8").on("data", keep("err"));
    this.child.on("message", (message: { port?: number; peerAddress?: string }) => {
      this.#port = message.port;
      this.peerAddress = message.peerAddress ?? "";
    });
    this.exit = new Promise((resolve) => {
      this.child.once("close", (code, signal) => {
        this.#exited = true;
        running.delete(this);
        resolve(code ?? signal ?? "unknown");
      });
    });
  }

  /** The port that it told over IPC. */
  async listening(): Promise<number> {
    await this.#until("it listens", () => this.#port !== undefined);
    return this.#port ?? 0;
  }

  /** Its log so far, where the format is JSON. */
  log(): LogFields[] {
    const lines = this.err.split("\n").slice(0, -1); // The last one has not ended.
    return lines
      .filter((line) => line.startsWith("{"))
      .map((line) => JSON.parse(line) as LogFields);
  }

  /** Waits for a line of the log; `count` for the second, third, … of its kind. */
  async logged(msg: string, count = 1): Promise<LogFields> {
    const found = () => this.log().filter((line) => line.msg === msg)[count - 1];
    await this.#until(`it logs "${msg}"`, () => found() !== undefined);
    return found() ?? { msg };
  }

  /** Waits until standard output holds the text. */
  async says(text: string): Promise<void> {
    await this.#until(`it says "${text}"`, () => this.out.includes(text));
  }

  async #until(what: string, isSo: () => boolean): Promise<void> {
    const untilMs = performance.now() + PATIENCE_MS;
    while (!isSo()) {
      const wrote = () => `it wrote:\n${this.out}${this.err}`;
      if (this.#exited) throw new Error(`it ended before ${what}; ${wrote()}`);
      if (performance.now() > untilMs) throw new Error(`waited in vain until ${what}; ${wrote()}`);
      await delay(5);
    }
  }
}
