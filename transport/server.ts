/**
 * A gateway with a port: listens, warms up, reloads, drains. Signals are the command's affair (bin/serve.ts).
 */
import { Admin } from "./admin.ts";
import { type ConfigSources, loadConfig } from "./config.ts";
import { HttpFront } from "./http-front.ts";
import { KeyTable } from "./keys.ts";
import type { Log } from "./log.ts";
import { Gateway } from "./main.ts";
import type { Options } from "./options.ts";
import { type WarmupReport, warmUp } from "./warmup.ts";

export class Server {
  readonly gateway: Gateway;
  readonly port: number;
  readonly #http: HttpFront;
  readonly #log: Log;
  readonly #warmup = new AbortController();

  private constructor(gateway: Gateway, http: HttpFront, port: number, log: Log) {
    this.gateway = gateway;
    this.#http = http;
    this.port = port;
    this.#log = log;
  }

  /**
   * @throws when the port cannot be had (nothing is left running then).
   * @param onFatal the actor system gave up: the process should end with a failure.
   */
  static async start(
    options: Options,
    log: Log,
    onFatal: (error: unknown) => void,
  ): Promise<Server> {
    const gateway = await Gateway.start(options, log, onFatal);
    const { listen, metrics, requests, timeouts } = options;
    const http = new HttpFront(
      {
        host: listen.host,
        port: listen.port,
        bodyBytesMax: () => gateway.options.requests.bodyBytesMax,
        headerBytesMax: requests.headerBytesMax,
        clientHeadersMs: timeouts.clientHeadersMs,
        clientBodyMs: timeouts.clientBodyMs,
        clientIdleMs: timeouts.clientIdleMs,
        connectionsMax: requests.connectionsMax,
      },
      {
        front: gateway.front,
        admin: new Admin(gateway),
        metrics: metrics.enabled ? () => gateway.metrics() : null,
        ready: () => gateway.ready(),
      },
    );
    try {
      return new Server(gateway, http, await http.listen(), log);
    } catch (error) {
      await gateway.close();
      throw error;
    }
  }

  /** Fills the cache from warmup.file; resolves when done, with undefined when none is configured. */
  async warmUp(onProgress: (report: WarmupReport) => void): Promise<WarmupReport | undefined> {
    const { options } = this.gateway;
    const { file, inflightMax, model, tenant } = options.warmup;
    if (file === undefined) return undefined;
    const who = new KeyTable(options).ofTenant(tenant ?? "local");
    if (who === undefined)
      throw new Error(`warmup.tenant: no key belongs to ${JSON.stringify(tenant)}`);
    const served = model ?? (await this.gateway.firstModel(this.#warmup.signal));
    if (served === undefined) return undefined;
    return warmUp(this.gateway.front, {
      file,
      inflightMax,
      tenant: who,
      model: served,
      embedAhead: (texts) => this.gateway.embedAhead(texts),
      onProgress,
      signal: this.#warmup.signal,
    });
  }

  /** Reads the configuration again and applies it, or logs why not; nothing is applied by half. */
  async reload(sources: ConfigSources): Promise<boolean> {
    try {
      const { options } = await loadConfig(sources);
      const plan = this.gateway.reload(options);
      if (plan.refuse.length > 0) {
        this.#log.error(
          { needRestart: plan.refuse },
          "reload refused: these options need a restart",
        );
        return false;
      }
      this.#log.info({ changed: plan.apply }, "configuration reloaded");
      return true;
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      this.#log.error({ reason }, "reload refused: the configuration is not valid");
      return false;
    }
  }

  /** Stops accepting, lets open requests end (at most timeouts.drainMs), settles and closes. */
  async stop(): Promise<void> {
    this.#warmup.abort();
    this.#http.stopAccepting();
    await this.gateway.drain();
    await this.gateway.close();
    await this.#http.close();
  }
}
