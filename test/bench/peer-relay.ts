/**
 * What lies between peers, for benchmarks that cut it: a relay in front of each peer's port, at the address that it advertises.
 * While a pair is cut, what its peers send each other is held, on old connections and new ones, as a network that drops
 * packets does it; nothing is closed, and nothing arrives.
 *
 * Who dials is read from the first bytes: a peer's hello names it, and is not enciphered (no TLS here).
 */

import type { AddressInfo } from "node:net";
import { connect, createServer, type Server, type Socket } from "node:net";

export class PeerRelay {
  readonly #names: readonly string[];
  readonly #servers: Server[] = [];
  readonly #pairs: { from: string; to: string; sockets: [Socket, Socket] }[] = [];
  #isCut: (from: string, to: string) => boolean = () => false;

  /** @param names of all peers; none is part of another */
  constructor(names: readonly string[]) {
    this.#names = names;
  }

  /** A port that leads to the peer's own. */
  async open(name: string, port: number): Promise<number> {
    const server = createServer((client) => this.#onClient(client, name, port));
    this.#servers.push(server);
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    return (server.address() as AddressInfo).port;
  }

  /** From now on; whoever is cut is healed when it says so. */
  cut(isCut: (from: string, to: string) => boolean): void {
    this.#isCut = isCut;
    for (const { from, to, sockets } of this.#pairs)
      for (const socket of sockets) {
        if (this.#isCut(from, to)) socket.pause();
        else socket.resume();
      }
  }

  close(): void {
    for (const { sockets } of this.#pairs) for (const socket of sockets) socket.destroy();
    for (const server of this.#servers) server.close();
  }

  #onClient(client: Socket, to: string, port: number): void {
    const target = connect(port, "127.0.0.1");
    const pair = { from: "", to, sockets: [client, target] as [Socket, Socket] };
    this.#pairs.push(pair);
    client.on("data", (bytes) => {
      if (pair.from === "") {
        const text = bytes.toString("latin1");
        pair.from = this.#names.find((name) => name !== to && text.includes(name)) ?? "";
        if (this.#isCut(pair.from, to)) for (const socket of pair.sockets) socket.pause();
      }
      target.write(bytes);
    });
    target.on("data", (bytes) => client.write(bytes));
    const end = (): void => {
      client.destroy();
      target.destroy();
      const index = this.#pairs.indexOf(pair);
      if (index >= 0) this.#pairs.splice(index, 1);
    };
    for (const socket of pair.sockets) {
      socket.on("error", () => undefined);
      socket.on("close", end);
    }
  }
}
