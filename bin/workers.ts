/**
 * `headrace serve --workers N`: starts N processes that share the public port, each a peer of the others over loopback, and
 * keeps them going. It serves nothing itself: it hands connections out (node:cluster), tells each worker where the
 * others are, and passes signals on.
 *
 * A worker that ends is started again, at once the first time, then after a pause that doubles; one that ends before it
 * ever served ends all, since it would do so again. Where the configuration has no `cluster`, the secret is made up
 * for this one run; where it has, the workers join that cluster, the n-th on the n-th port after its own.
 */
import nodeCluster, { type Worker } from "node:cluster";
import { randomBytes } from "node:crypto";
import { ownId } from "../transport/cluster.ts";
import type { Log } from "../transport/log.ts";
import type { Options } from "../transport/options.ts";

const BACKOFF_MS = 100;
const BACKOFF_MS_MAX = 10_000;
/** A worker that served for so long has started well. */
const STEADY_MS = 30_000;

type Place = {
  readonly number: number;
  worker: Worker | undefined;
  peerAddress: string | undefined;
  hasServed: boolean;
  startedAtMs: number;
  failures: number;
};

/** Runs until it is stopped; then the process ends, with the first failure's exit code if there was one. */
export function runWorkers(count: number, options: Options, log: Log): void {
  new Workers(count, options, log).start();
}

class Workers {
  readonly #places: readonly Place[];
  readonly #options: Options;
  readonly #log: Log;
  readonly #baseId: string;
  readonly #secret = randomBytes(32).toString("hex");
  #isStopping = false;
  #isTold = false;
  #exitCode = 0;

  constructor(count: number, options: Options, log: Log) {
    this.#options = options;
    this.#log = log;
    this.#baseId = options.cluster?.id ?? ownId(options.listen.port);
    this.#places = Array.from({ length: count }, (_, index) => ({
      number: index + 1,
      worker: undefined,
      peerAddress: undefined,
      hasServed: false,
      startedAtMs: 0,
      failures: 0,
    }));
  }

  start(): void {
    for (const place of this.#places) this.#startOne(place);
    process.on("SIGTERM", () => this.#stop("SIGTERM"));
    process.on("SIGINT", () => this.#stop("SIGINT"));
    process.on("SIGHUP", () => this.#signal("SIGHUP"));
    process.on("disconnect", () => this.#stop("SIGTERM"));
  }

  #startOne(place: Place): void {
    const { cluster } = this.#options;
    const { number } = place;
    const flags = [
      `cluster.id=${this.#baseId}-${number}`,
      `cluster.listen.host=${cluster?.listen.host ?? "127.0.0.1"}`,
      `cluster.listen.port=${portOf(cluster?.listen.port, number)}`,
    ];
    nodeCluster.setupPrimary({
      args: [...process.argv.slice(2), ...flags.flatMap((flag) => ["--set", flag])],
    });
    // By the environment: arguments of a process are there for all to see.
    const keys = JSON.stringify([{ id: "workers", secret: this.#secret }]);
    const worker = nodeCluster.fork(cluster === undefined ? { HEADRACE_CLUSTER_KEYS: keys } : {});
    place.worker = worker;
    place.startedAtMs = performance.now();
    worker.on("message", (message: { kind?: string; port?: number; peerAddress?: string }) => {
      if (message.kind !== "listening") return;
      place.hasServed = true;
      const { pid } = worker.process;
      this.#log.info({ worker: place.number, pid, peers: message.peerAddress }, "a worker listens");
      place.peerAddress = message.peerAddress;
      this.#tellAddresses();
      if (this.#isTold || !this.#places.every(({ hasServed }) => hasServed)) return;
      this.#isTold = true;
      const { port } = message;
      this.#log.info({ port, workers: this.#places.length }, "all workers listen");
      process.send?.({ kind: "listening", port });
    });
    worker.on("exit", (code, signal) => this.#onExit(place, code, signal));
  }

  #tellAddresses(): void {
    const addresses = this.#places.flatMap(({ peerAddress }) => peerAddress ?? []);
    for (const { worker, hasServed } of this.#places)
      if (hasServed && worker?.isConnected() === true) worker.send({ kind: "peers", addresses });
  }

  #onExit(place: Place, code: number | null, signal: string | null): void {
    place.worker = undefined;
    place.peerAddress = undefined;
    const { number: worker } = place;
    if (this.#isStopping) {
      if (code !== 0) this.#exitCode ||= code ?? 1;
      if (this.#places.every((one) => one.worker === undefined)) process.exit(this.#exitCode);
      return;
    }
    if (!place.hasServed) {
      this.#exitCode = code ?? 1;
      this.#log.error({ worker, code, signal }, "a worker ended before it served: stopping all");
      this.#stop("SIGTERM");
      if (this.#places.every((one) => one.worker === undefined)) process.exit(this.#exitCode);
      return;
    }
    if (performance.now() - place.startedAtMs > STEADY_MS) place.failures = 0;
    const afterMs =
      place.failures === 0 ? 0 : Math.min(BACKOFF_MS_MAX, BACKOFF_MS * 2 ** place.failures);
    place.failures++;
    this.#log.error({ worker, code, signal, afterMs }, "a worker ended: it is started again");
    setTimeout(() => {
      if (!this.#isStopping) this.#startOne(place);
    }, afterMs);
  }

  #stop(signal: "SIGTERM" | "SIGINT"): void {
    if (this.#isStopping) {
      // The second one: at once.
      this.#exitCode = 1;
      return this.#signal("SIGKILL");
    }
    this.#isStopping = true;
    this.#log.info({ signal, workers: this.#places.length }, "stopping the workers");
    this.#signal("SIGTERM");
    if (this.#places.every(({ worker }) => worker === undefined)) process.exit(this.#exitCode);
  }

  #signal(signal: NodeJS.Signals): void {
    for (const { worker } of this.#places) worker?.process.kill(signal);
  }
}

/** Of the n-th worker, from 1; without a cluster, or where it says so, any free one. */
function portOf(port: number | undefined, number: number): number {
  return port === undefined || port === 0 ? 0 : port + number - 1;
}
