/**
 * `headrace serve`: the gateway as a server. SIGHUP reloads, SIGTERM and SIGINT drain, a second one ends at once.
 * With `--workers` the process only starts others (workers.ts), each of which serves as a peer of the rest.
 */
import nodeCluster from "node:cluster";
import cliProgress from "cli-progress";
import { Command, InvalidArgumentError } from "commander";
import type { ConfigSources } from "../transport/config.ts";
import { createLog, type Log } from "../transport/log.ts";
import type { Options } from "../transport/options.ts";
import { Server } from "../transport/server.ts";
import { configSources, loadConfigOrExit, withConfigFlags } from "./config.ts";

const WORKERS_MAX = 64;

export function serveCommand(): Command {
  const command = new Command("serve").description("run the gateway in front of inference nodes");
  command.option(
    "--workers <count>",
    "processes that share the port, as peers of one another",
    (text) => {
      const count = /^\d+$/.test(text) ? Number(text) : 0;
      if (count >= 1 && count <= WORKERS_MAX) return count;
      throw new InvalidArgumentError(`It must be a whole number from 1 to ${WORKERS_MAX}.`);
    },
  );
  return withConfigFlags(command).action(() => serve(command));
}

async function serve(command: Command): Promise<void> {
  const { options } = await loadConfigOrExit(command);
  const log = createLog(options.log.level, options.log.format);
  const { workers = 1 } = command.opts<{ workers?: number }>();
  if (workers > 1 && nodeCluster.isPrimary) {
    if (options.record.decisions !== undefined)
      command.error("headrace serve: record.decisions is one process's: leave out --workers");
    // Loaded only here: whoever serves alone needs nothing of it.
    const { runWorkers } = await import("./workers.ts");
    return runWorkers(workers, options, log);
  }
  const starting = Server.start(options, log, (error) => {
    const text = error instanceof Error ? error.message : String(error);
    log.error({ error: text }, "the actor system gave up");
    process.exit(1);
  });
  handleSignals(starting, configSources(command, process.env), log);
  const server = await starting.catch((error: NodeJS.ErrnoException) =>
    command.error(whyNoStart(error, options)),
  );
  log.info(
    {
      host: options.listen.host,
      port: server.port,
      nodes: options.nodes.length,
      ...(server.gateway.peerAddress === undefined ? {} : { peers: server.gateway.peerAddress }),
    },
    "listening",
  );
  const { peerAddress } = server.gateway;
  process.on("message", (message: { kind?: string; addresses?: string[] }) => {
    if (message.kind === "peers") server.gateway.peersFound(message.addresses ?? []);
  });
  process.send?.({ kind: "listening", port: server.port, peerAddress });
  await warm(server, log);
}

function whyNoStart(error: NodeJS.ErrnoException, { listen }: Options): string {
  const where = `${listen.host}:${listen.port}`;
  if (error.code === "EADDRINUSE") {
    return `headrace serve: ${where} is taken by another process; choose another with --port`;
  }
  if (error.code === "EACCES") return `headrace serve: not allowed to listen on ${where}`;
  return `headrace serve: cannot start: ${error.message}`;
}

/** From the first moment on: a signal that comes while the gateway starts is obeyed once it has started. */
function handleSignals(started: Promise<Server>, sources: ConfigSources, log: Log): void {
  let stopping = false;
  const stop = (cause: string): void => {
    if (stopping) process.exit(1); // The second one: at once.
    stopping = true;
    log.info({ signal: cause }, "draining");
    started
      .then((server) => server.stop())
      .then(
        () => {
          log.info({}, "stopped");
          process.exit(0);
        },
        (error) => {
          log.error({ error: String(error) }, "the stop failed");
          process.exit(1);
        },
      );
  };
  process.on("SIGTERM", () => stop("SIGTERM"));
  // A terminal sends it to workers too, who are told by the process that started them.
  process.on("SIGINT", () => {
    if (nodeCluster.isPrimary) stop("SIGINT");
  });
  process.on("SIGHUP", () => void started.then((server) => server.reload(sources)));
  process.on("disconnect", () => stop("the end of the process that started it"));
}

/** Shows the warm-up on a terminal as a bar, elsewhere as two log lines. */
async function warm(server: Server, log: Log): Promise<void> {
  const bar = process.stderr.isTTY
    ? new cliProgress.SingleBar({
        format: "warm-up {value} prompts, {filled} new, {present} cached",
      })
    : null;
  let started = false;
  try {
    const report = await server.warmUp(({ done, filled, present }) => {
      if (!started) bar?.start(done, 0, { filled, present });
      started = true;
      bar?.setTotal(done);
      bar?.update(done, { filled, present });
    });
    if (started) bar?.stop();
    if (report === undefined) return;
    const { done, filled, present, failures } = report;
    log.info({ done, filled, present, failed: failures.length }, "warm-up ended");
    for (const failure of failures) log.warn(failure, "a prompt of the warm-up failed");
  } catch (error) {
    if (started) bar?.stop();
    log.error({ reason: error instanceof Error ? error.message : String(error) }, "warm-up failed");
  }
}
