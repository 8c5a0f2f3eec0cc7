import { setTimeout as delay } from "node:timers/promises";
import { afterEach, describe, expect, it } from "vitest";
import { PeerDiscovery, type Resolver, systemResolver } from "../transport/peer-discovery.ts";
import { wrongSeed } from "../transport/peer-seeds.ts";

const running: PeerDiscovery[] = [];
afterEach(() => {
  for (const discovery of running.splice(0)) discovery.stop();
});

/** DNS as it is told to be. */
class FakeResolver implements Resolver {
  readonly records = new Map<string, readonly string[]>();
  readonly asked: string[] = [];
  error: string | undefined;

  readonly hosts = async (name: string): Promise<readonly string[]> => {
    this.asked.push(name);
    if (this.error !== undefined) throw Object.assign(new Error("dns"), { code: this.error });
    const found = this.records.get(name);
    if (found === undefined) throw Object.assign(new Error("dns"), { code: "ENOTFOUND" });
    return found;
  };

  readonly services = async (name: string): Promise<readonly { name: string; port: number }[]> =>
    (await this.hosts(name)).map((record) => {
      const [host = "", port] = record.split(" ");
      return { name: host, port: Number(port) };
    });
}

class Rig {
  readonly resolver = new FakeResolver();
  readonly found: (readonly string[])[] = [];
  readonly warned: string[] = [];
  readonly discovery: PeerDiscovery;

  constructor(seeds: readonly string[]) {
    this.discovery = new PeerDiscovery(
      { seeds, refreshMs: 5, retryMs: 5 },
      (addresses) => this.found.push(addresses),
      {
        info: () => undefined,
        warn: (fields: object) => void this.warned.push(JSON.stringify(fields)),
      },
      this.resolver,
    );
    running.push(this.discovery);
  }
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await delay(2);
}

describe("peer discovery", () => {
  it("peer discovery: a list is what it is, each once, and nothing is looked up", async () => {
    const rig = new Rig(["ws://b:1", "wss://a.example:7946", "ws://b:1", "ws://[::1]:3"]);
    await rig.discovery.start();
    expect(rig.found).toEqual([["ws://[::1]:3", "ws://b:1", "wss://a.example:7946"]]);
    expect(rig.resolver.asked).toEqual([]);
  });

  it("peer discovery: a name stands for all its addresses, and is looked up again as pods come and go", async () => {
    const rig = new Rig(["dns://headrace-peers:7946"]);
    rig.resolver.records.set("headrace-peers", ["10.0.0.2", "10.0.0.1", "fd00::1"]);
    await rig.discovery.start();
    expect(rig.found).toEqual([
      ["ws://10.0.0.1:7946", "ws://10.0.0.2:7946", "ws://[fd00::1]:7946"],
    ]);
    rig.resolver.records.set("headrace-peers", ["10.0.0.1", "10.0.0.3"]);
    await until(() => rig.found.length > 1);
    expect(rig.found.at(-1)).toEqual(["ws://10.0.0.1:7946", "ws://10.0.0.3:7946"]);
    // Told when it changes, not at every look-up.
    const before = rig.resolver.asked.length;
    await until(() => rig.resolver.asked.length > before + 3);
    expect(rig.found).toHaveLength(2);
  });

  it("peer discovery: an SRV record says target and port", async () => {
    const rig = new Rig(["srvs://_peer._tcp.headrace"]);
    rig.resolver.records.set("_peer._tcp.headrace", ["pod-0.headrace 7946", "pod-1.headrace 7947"]);
    await rig.discovery.start();
    expect(rig.found).toEqual([["wss://pod-0.headrace:7946", "wss://pod-1.headrace:7947"]]);
  });

  it("peer discovery: a failing look-up keeps what is known and says so once; a name that is gone is empty", async () => {
    const rig = new Rig(["dns://peers:1", "ws://fixed:1"]);
    rig.resolver.records.set("peers", ["10.0.0.1"]);
    await rig.discovery.start();
    rig.resolver.error = "ETIMEOUT";
    const before = rig.resolver.asked.length;
    await until(() => rig.resolver.asked.length > before + 3);
    expect(rig.found).toEqual([["ws://10.0.0.1:1", "ws://fixed:1"]]);
    expect(rig.warned).toEqual(['{"name":"peers","reason":"ETIMEOUT"}']);
    rig.resolver.error = undefined;
    rig.resolver.records.delete("peers");
    await until(() => rig.found.length > 1);
    expect(rig.found.at(-1)).toEqual(["ws://fixed:1"]);
    rig.resolver.records.set("peers", ["10.0.0.9"]);
    await until(() => rig.found.length > 2);
    expect(rig.found.at(-1)).toEqual(["ws://10.0.0.9:1", "ws://fixed:1"]);
  });

  it("peer discovery: the machine's own resolver finds localhost", async () => {
    expect(await systemResolver.hosts("localhost")).toSatisfy((hosts: readonly string[]) =>
      hosts.some((host) => host === "127.0.0.1" || host === "::1"),
    );
  });

  it.each([
    ["ws://a:0", "has no port from 1 to 65535"],
    ["ws://a", "has no port from 1 to 65535"],
    ["dns://a:65536", "has no port from 1 to 65535"],
    ["srv://a:1", "has a port, but an SRV record says which"],
    ["http://a:1", "is not ws://host:port, wss://host:port, dns://name:port or srv://name"],
    ["ws://a:1/path", "is not ws://host:port, wss://host:port, dns://name:port or srv://name"],
    ["ws://user@a:1", "is not ws://host:port, wss://host:port, dns://name:port or srv://name"],
    ["", "is not ws://host:port, wss://host:port, dns://name:port or srv://name"],
  ])("peer discovery: says what is wrong with a seed: %s", (seed, reason) => {
    expect(wrongSeed(seed)).toBe(reason);
    expect(() => new Rig([seed])).toThrow(`seed "${seed}" ${reason}`);
  });
});
