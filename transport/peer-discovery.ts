/**
 * Where peers are to be found: by a list of addresses, of which any may be a name that stands for many, as a headless
 * service of Kubernetes does. Names are looked up again and again, since pods come and go.
 *
 *   ws://10.0.0.7:7946            an address: itself
 *   ws://gateway.example:7946     a host: as it is; the dialler looks it up
 *   dns://headrace-peers:7946     every A and AAAA record of the name, with that port
 *   srv://_peer._tcp.headrace     every SRV record of the name, target and port as it says
 *   dnss://… and srvs://…         the same, for wss
 *
 * A look-up that fails keeps what the last one found and says so once; one that finds nothing (a service without pods,
 * at the very start) is no failure. It knows nothing of who answers there: that is the handshake's.
 */
import { lookup, resolveSrv } from "node:dns/promises";
import type { Log } from "./log.ts";
import { readSeed, type Seed } from "./peer-seeds.ts";

/** What is asked of DNS. */
export type Resolver = {
  /** Addresses of a host, IPv4 and IPv6. */
  hosts: (name: string) => Promise<readonly string[]>;
  services: (name: string) => Promise<readonly { name: string; port: number }[]>;
};

/** `hosts` goes by the machine's own resolver, hosts file and search domains included, as a dialler's would. */
export const systemResolver: Resolver = {
  hosts: async (name) => (await lookup(name, { all: true })).map(({ address }) => address),
  services: (name) => resolveSrv(name),
};

export type DiscoveryOptions = {
  seeds: readonly string[];
  /** Between two look-ups. */
  refreshMs: number;
  /** While no address is known at all, and after a failure. */
  retryMs: number;
};

export const discoveryDefaults: Readonly<Omit<DiscoveryOptions, "seeds">> = {
  refreshMs: 10_000, // Kubernetes' DNS answers live 5 to 30 s.
  retryMs: 1000,
};

const ADDRESSES_MAX = 512;

/** Looks up until it is stopped. */
export class PeerDiscovery {
  readonly #seeds: readonly Seed[];
  readonly #options: DiscoveryOptions;
  readonly #resolver: Resolver;
  readonly #onFound: (addresses: readonly string[]) => void;
  readonly #log: Pick<Log, "info" | "warn">;
  /** By seed, as last found. */
  readonly #found = new Map<Seed, readonly string[]>();
  readonly #failing = new Set<Seed>();
  #told: string | undefined;
  #timer: NodeJS.Timeout | null = null;
  #isStopped = false;

  /**
   * @param onFound told of all addresses, sorted, whenever they are others than before
   * @throws RangeError for a seed that is none: `wrongSeed` says why.
   */
  constructor(
    options: DiscoveryOptions,
    onFound: (addresses: readonly string[]) => void,
    log: Pick<Log, "info" | "warn">,
    resolver: Resolver = systemResolver,
  ) {
    this.#options = options;
    this.#resolver = resolver;
    this.#onFound = onFound;
    this.#log = log;
    this.#seeds = options.seeds.map((text) => {
      const seed = readSeed(text);
      if (typeof seed === "string") throw new RangeError(`seed "${text}" ${seed}`);
      return seed;
    });
  }

  /** The first look-up; resolves when it is done, found or not. Further ones follow by themselves. */
  async start(): Promise<void> {
    await Promise.all(this.#seeds.map((seed) => this.#resolve(seed)));
    if (this.#isStopped) return;
    const addresses = [...new Set([...this.#found.values()].flat())].sort().slice(0, ADDRESSES_MAX);
    const told = addresses.join(" ");
    if (told !== this.#told) {
      this.#told = told;
      this.#onFound(addresses);
    }
    if (this.#seeds.every(({ kind }) => kind === "address")) return; // Those do not change.
    const { refreshMs, retryMs } = this.#options;
    const isWell = addresses.length > 0 && this.#failing.size === 0;
    this.#timer = setTimeout(() => void this.start(), isWell ? refreshMs : retryMs);
  }

  stop(): void {
    this.#isStopped = true;
    if (this.#timer !== null) clearTimeout(this.#timer);
  }

  async #resolve(seed: Seed): Promise<void> {
    try {
      this.#found.set(seed, await this.#lookUp(seed));
      this.#failing.delete(seed);
    } catch (error) {
      const code = error instanceof Error && "code" in error ? String(error.code) : "unknown";
      // No such name, or no record of that kind: nobody is there, yet or any more.
      if (code === "ENOTFOUND" || code === "ENODATA") this.#found.set(seed, []);
      if (this.#failing.has(seed) || seed.kind === "address") return;
      this.#failing.add(seed);
      this.#log.warn(
        { name: seed.name, reason: code },
        "peers cannot be looked up: will try again",
      );
    }
  }

  async #lookUp(seed: Seed): Promise<readonly string[]> {
    switch (seed.kind) {
      case "address":
        return [seed.address];
      case "hosts": {
        const hosts = await this.#resolver.hosts(seed.name);
        return hosts.map((host) => addressOf(seed.scheme, host, seed.port));
      }
      case "services": {
        const services = await this.#resolver.services(seed.name);
        return services.map(({ name, port }) => addressOf(seed.scheme, name, port));
      }
    }
  }
}

function addressOf(scheme: "ws" | "wss", host: string, port: number): string {
  return `${scheme}://${host.includes(":") ? `[${host}]` : host}:${port}`;
}
