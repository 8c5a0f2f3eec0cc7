/**
 * A private redis-server for tests: on a free port of the loopback, without persistence unless asked for, gone at the
 * end. Without the program, or one of version 8 where vector sets are tested, the tests that need it are skipped with
 * one line; with HEADRACE_REQUIRE_REDIS=1 that is a failure.
 */
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { redis8Program, requireRedis } from "./environment.ts";

const installed = "redis-server";

/** Major version of the installed one; 0 = there is none. */
export const redisVersion = versionOf(installed);
/** Whether redis-server can be run here. */
export const redisAvailable = redisVersion > 0;
if (!redisAvailable) skipped("redis-server is not installed (apt-get install redis-server)");

/** One that has vector sets; absent where there is none. Said when it is looked for. */
export function redis8(): string | undefined {
  const program = redis8Program ?? installed;
  if (versionOf(program) >= 8) return program;
  skipped(`${program} is no redis-server 8 (HEADRACE_REDIS_8=$(.ci/redis-8) names one)`);
  return undefined;
}

/** Major version; 0 where it does not run. */
function versionOf(program: string): number {
  const { stdout } = spawnSync(program, ["--version"], { encoding: "utf8" });
  return Number(/ v=(\d+)\./.exec(stdout ?? "")?.[1] ?? 0);
}

function skipped(line: string): void {
  if (requireRedis) throw new Error(line);
  console.warn(`skipped: ${line}`);
}

export type RedisServer = {
  port: number;
  /** Where it persists, if it does. */
  folder: string;
  url: string;
  /** Sends one command over a connection of its own; the reply as Redis writes it. */
  command(...words: string[]): Promise<string>;
  /** Ends it at once, as a crash would. */
  kill(): Promise<void>;
  /** It keeps its connections and answers nothing. */
  pause(): void;
  resume(): void;
  /** Ends it and removes what it left. */
  stop(): Promise<void>;
};

/**
 * @param options.program else the installed one. @param options.port taken over from a killed one; else a free one.
 * @param options.folder of a killed one, whose data it takes up. @param options.sentinelOf watches that master.
 */
export async function startRedis(
  options: {
    program?: string;
    args?: readonly string[];
    port?: number;
    folder?: string;
    sentinelOf?: number;
  } = {},
): Promise<RedisServer> {
  const port = options.port ?? (await freePort());
  const folder = options.folder ?? mkdtempSync(join(tmpdir(), "headrace-redis-"));
  const args = ["--port", String(port), "--bind", "127.0.0.1", "--dir", folder];
  if (options.sentinelOf === undefined) args.push("--save", "", "--appendonly", "no");
  else {
    const config = join(folder, "sentinel.conf"); // A sentinel wants a file to write to.
    writeFileSync(config, `sentinel monitor main 127.0.0.1 ${options.sentinelOf} 1\n`);
    args.unshift(config, "--sentinel");
  }
  const child = spawn(options.program ?? installed, [...args, ...(options.args ?? [])], {
    stdio: "ignore",
  });
  const onExit = (): void => void child.kill("SIGKILL");
  process.once("exit", onExit);
  const exited = new Promise<void>((resolve) => child.once("exit", () => resolve()));
  const kill = async (): Promise<void> => {
    child.kill("SIGKILL"); // Ends a paused one, too.
    await exited;
    process.removeListener("exit", onExit);
  };
  await untilItAnswers(port, child).catch(async (error: unknown) => {
    await kill();
    throw error;
  });
  return {
    port,
    folder,
    url: `redis://127.0.0.1:${port}`,
    command: (...words) => command(port, words),
    kill,
    pause: () => void child.kill("SIGSTOP"),
    resume: () => void child.kill("SIGCONT"),
    stop: async () => {
      await kill();
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  return typeof address === "object" && address !== null ? address.port : 0;
}

/** Tries for 10 s at most. */
async function untilItAnswers(port: number, child: ChildProcess): Promise<void> {
  const untilMs = performance.now() + 10_000;
  for (;;) {
    if (performance.now() > untilMs) throw new Error("redis-server does not answer");
    if (child.exitCode !== null) throw new Error(`redis-server ended with ${child.exitCode}`);
    const answered = await command(port, ["PING"]).catch(() => "");
    if (/^(\+PONG|-NOAUTH)/.test(answered)) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

function command(port: number, words: readonly string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = connect(port, "127.0.0.1");
    const bulk = words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join("");
    let reply = "";
    socket.on("error", reject);
    socket.on("data", (data) => {
      reply += data.toString("latin1");
    });
    socket.on("close", () => resolve(reply));
    socket.end(`*${words.length}\r\n${bulk}`); // Redis replies, then sees our end and closes.
  });
}
