/** Bytes of flights between peers, over real sockets: whole, live, slow, broken, and for whom they are not. */
import { connect } from "node:net";
import { afterEach, describe, expect, it } from "vitest";
import { Answer, type AnswerEnd, type AnswerForm, DataPlane } from "../transport/data-plane.ts";
import { FlightRelays, type RelayOptions } from "../transport/flight-relay.ts";
import { PeerServer, type PeerTls } from "../transport/peer-socket.ts";
import { makeCertificates, opensslAvailable } from "./bench/certificates.ts";
import { until } from "./peer-process.ts";

const KEY = { id: "k1", secret: new TextEncoder().encode("a secret that both peers share") };

type Peer = { data: DataPlane; relays: FlightRelays; address: string; server: PeerServer };
const peers: Peer[] = [];
const addresses = new Map<string, string>();

async function startPeer(self: string, more: Partial<RelayOptions> = {}): Promise<Peer> {
  const data = new DataPlane();
  const options = { cluster: "test", self, keys: [KEY], answerBytesMax: 4 << 20, ...more };
  const addressOf = async (peer: string) => addresses.get(peer);
  const relays = new FlightRelays({ addressOf, ...options }, data);
  const tls = more.tls === undefined ? {} : { tls: more.tls };
  const server = new PeerServer(
    { frameBytesMax: 1 << 20, ...tls },
    {
      accepts: () => false,
      onConnection: () => {
        throw new Error("nobody connects");
      },
      onRequest: (request, response) => relays.serve(request, response),
    },
  );
  const port = await server.listen("127.0.0.1", 0);
  const address = `ws${more.tls === undefined ? "" : "s"}://localhost:${port}`;
  addresses.set(self, address);
  const peer = { data, relays, address, server };
  peers.push(peer);
  return peer;
}

afterEach(async () => {
  for (const { relays } of peers) relays.close();
  await Promise.all(peers.splice(0).map(({ server }) => server.close()));
  addresses.clear();
});

function begin(peer: Peer, id: string, form: AnswerForm = "sse", bytesMax = 1 << 20): Answer {
  const answer = new Answer(form, { status: 200, contentType: "text/event-stream" }, bytesMax);
  peer.data.answers.set(id, answer);
  return answer;
}

function add(answer: Answer, text: string, usage = false): boolean {
  return answer.append({ bytes: Buffer.from(text), usage }, () => {});
}

/** A client of another peer, which reads all that comes. */
class Client {
  text = "";
  usage = "";
  end: AnswerEnd | "none" | "overrun" | undefined;
  answer: Answer | undefined;
  readonly relay;

  constructor(peer: Peer, flightId: string, isReading = true) {
    this.relay = peer.relays.open(flightId, (answer) => {
      this.answer = answer;
      if (answer === undefined) this.end = "none";
      else if (isReading) this.#read(answer);
    });
  }

  #read(answer: Answer): void {
    const reader = answer.read(() => pump());
    const pump = (): void => {
      for (let next = reader?.next(); ; next = reader?.next()) {
        if (next === undefined || next === "wait") return;
        if (next === "overrun" || !("bytes" in next)) {
          this.end = next;
          return;
        }
        const text = Buffer.from(next.bytes).toString();
        if (next.usage) this.usage += text;
        else this.text += text;
      }
    };
    pump();
  }

  async ended(): Promise<AnswerEnd | "none" | "overrun" | undefined> {
    await until("the answer ends", () => this.end !== undefined);
    return this.end;
  }
}

describe("a flight that another peer reads", () => {
  it("comes whole: what was there, then what comes, with its head, its usage and its end", async () => {
    const a = await startPeer("a");
    const b = await startPeer("b");
    const answer = begin(a, "r 1/ü");
    add(answer, "one ");
    const client = new Client(b, "a/r 1/ü");
    await until("the first part is there", () => client.text === "one ");
    add(answer, "{usage}", true);
    add(answer, "two");
    answer.finish({ ok: true });
    expect(await client.ended()).toEqual({ ok: true });
    expect(client.text).toBe("one two");
    expect(client.usage).toBe("{usage}");
    expect(client.answer?.form).toBe("sse");
    expect(client.answer?.head).toEqual({ status: 200, contentType: "text/event-stream" });
    expect(client.relay.isLost).toBe(false);
    client.relay.release();
    await until("nothing is open", () => b.relays.counts().reading === 0);
    await until("nobody is served", () => a.relays.counts().serving === 0);
  });

  it("is read once for all clients of a peer, also for those that come late", async () => {
    const a = await startPeer("a");
    const b = await startPeer("b");
    const answer = begin(a, "r");
    add(answer, "x".repeat(1000));
    const clients = Array.from({ length: 20 }, () => new Client(b, "a/r"));
    await until("all read", () => clients.every(({ text }) => text.length === 1000));
    expect(a.relays.counts().serving).toBe(1);
    clients.push(new Client(b, "a/r"));
    add(answer, "y");
    answer.finish({ ok: true });
    for (const client of clients) {
      expect(await client.ended()).toEqual({ ok: true });
      expect(client.text).toBe(`${"x".repeat(1000)}y`);
    }
  });

  it("ends badly as it ended there, which is no loss", async () => {
    const a = await startPeer("a");
    const b = await startPeer("b");
    const answer = begin(a, "r");
    add(answer, "x");
    const client = new Client(b, "a/r");
    await until("the first part is there", () => client.text === "x");
    answer.finish({ ok: false, code: "upstream_stalled" });
    expect(await client.ended()).toEqual({ ok: false, code: "upstream_stalled" });
    expect(client.relay.isLost).toBe(false);
  });

  it("is lost when its peer ends in the middle: visibly, for every reader", async () => {
    const a = await startPeer("a");
    const b = await startPeer("b");
    add(begin(a, "r"), "x");
    const clients = [new Client(b, "a/r"), new Client(b, "a/r")];
    await until("the first part is there", () => clients.every(({ text }) => text === "x"));
    a.relays.close();
    for (const client of clients) {
      expect(await client.ended()).toEqual({ ok: false, code: "stream_broken" });
      expect(client.relay.isLost).toBe(true);
    }
  });

  it("cannot be had when it is unknown, begun too long ago, of an unknown peer, or of nobody", async () => {
    const a = await startPeer("a");
    const b = await startPeer("b");
    const long = begin(a, "long", "sse", 10);
    add(long, "0123456789");
    add(long, "0123456789");
    addresses.set("gone", "ws://127.0.0.1:1");
    for (const flight of ["a/none", "a/long", "unknown/r", "gone/r"]) {
      const client = new Client(b, flight);
      expect(await client.ended()).toBe("none");
      expect(client.relay.isLost).toBe(true);
    }
    expect(b.relays.counts().reading).toBe(0);
  });

  it("is given up as soon as nobody reads it any more", async () => {
    const a = await startPeer("a");
    const b = await startPeer("b");
    add(begin(a, "r"), "x");
    const clients = [new Client(b, "a/r"), new Client(b, "a/r")];
    await until("both read", () => clients.every(({ text }) => text === "x"));
    clients[0]?.relay.release();
    clients[0]?.relay.release(); // Twice is once.
    expect(b.relays.counts().reading).toBe(1);
    clients[1]?.relay.release();
    expect(b.relays.counts().reading).toBe(0);
    await until("nobody is served", () => a.relays.counts().serving === 0);
    await a.relays.idle();
  });

  it("holds up its writer where nobody reads on, and neither side keeps more than its bound", async () => {
    const a = await startPeer("a");
    const b = await startPeer("b");
    const answer = begin(a, "r", "sse", 64 << 20);
    add(answer, "x");
    const client = new Client(b, "a/r", false);
    await until("the answer has begun", () => client.answer !== undefined);
    const reader = client.answer?.read(() => {});
    const part = "x".repeat(1 << 16);
    let written = 0;
    let isFull = false;
    for (let round = 0; round < 1000 && !isFull; round++) {
      isFull = !add(answer, part);
      written++;
      await new Promise((resolve) => setImmediate(resolve));
    }
    expect(isFull).toBe(true); // Sockets hold some MiB; 64 MiB they do not.
    expect(client.answer?.bytesHeld).toBeLessThanOrEqual(2 << 20);
    // It reads on, and all of it comes.
    let bytes = 0;
    answer.finish({ ok: true });
    await until("all has come", () => {
      for (let next = reader?.next(); ; next = reader?.next()) {
        if (next === undefined || next === "wait") return false;
        if (next === "overrun") throw new Error("it was not too slow");
        if (!("bytes" in next)) return true;
        bytes += next.bytes.byteLength;
      }
    });
    expect(bytes).toBe(1 + written * part.length);
  });
});

/** What the port answers to raw bytes. */
async function ask(address: string, path: string, headers: string[]): Promise<string> {
  const { port } = new URL(address);
  return new Promise((resolve, reject) => {
    let text = "";
    const socket = connect(Number(port), "127.0.0.1", () =>
      socket.write(`GET ${path} HTTP/1.1\r\nhost: peer\r\n${headers.join("\r\n")}\r\n\r\n`),
    );
    socket.on("data", (chunk) => {
      text += chunk.toString();
      socket.destroy();
      resolve(text.split("\r\n")[0] ?? "");
    });
    socket.on("error", reject);
  });
}

describe("who may read a flight", () => {
  it("nobody without the secret, of another cluster, or with a request that was seen before", async () => {
    const a = await startPeer("a");
    add(begin(a, "r"), "x");
    const secret = new TextEncoder().encode("another secret, as long as that");
    for (const more of [{ keys: [{ id: "k1", secret }] }, { cluster: "other" }]) {
      const stranger = await startPeer("b", more);
      expect(await new Client(stranger, "a/r").ended()).toBe("none");
    }
    expect(await ask(a.address, "/flight/r", [])).toContain("401");
    expect(await ask(a.address, "/flight/%ff", [])).toContain("401");
    // What b sends to a, caught on its way to somebody who pretends to be a.
    const b = await startPeer("b");
    const caught: string[] = [];
    const spy = new PeerServer(
      { frameBytesMax: 1 << 20 },
      {
        accepts: () => false,
        onConnection: () => {
          throw new Error("nobody connects");
        },
        onRequest: ({ headers }) => {
          caught.push(
            `x-headrace-peer: ${headers["x-headrace-peer"]}`,
            `authorization: ${headers.authorization}`,
          );
          return false;
        },
      },
    );
    addresses.set("a", `ws://127.0.0.1:${await spy.listen("127.0.0.1", 0)}`);
    await new Client(b, "a/r").ended();
    await spy.close();
    const refused = await ask(a.address, "/flight/other", caught);
    expect(refused).toContain("401"); // Signed for another flight.
    expect(await ask(a.address, "/flight/r", caught)).toContain("200");
    expect(await ask(a.address, "/flight/r", caught)).toContain("401");
  });

  it("an earlier secret is good as long as it is known", async () => {
    const later = { id: "k2", secret: new TextEncoder().encode("a later secret of the cluster") };
    const a = await startPeer("a", { keys: [later, KEY] });
    const b = await startPeer("b", { keys: [KEY] });
    const answer = begin(a, "r");
    add(answer, "x");
    answer.finish({ ok: true });
    const client = new Client(b, "a/r");
    expect(await client.ended()).toEqual({ ok: true });
  });

  it.runIf(opensslAvailable)("mutual TLS: with a certificate of the authority only", async () => {
    const made = makeCertificates("a", "b");
    const tls = (name: string, isMutual = true): { tls: PeerTls } => {
      const own = made.get(name);
      if (own === undefined) throw new Error(`no certificate was made for ${name}`);
      return { tls: { ...own, isMutual } };
    };
    const a = await startPeer("a", tls("a"));
    const b = await startPeer("b", tls("b"));
    const answer = begin(a, "r");
    add(answer, "x");
    answer.finish({ ok: true });
    const client = new Client(b, "a/r");
    expect(await client.ended()).toEqual({ ok: true });
    expect(client.text).toBe("x");
    const c = await startPeer("c", tls("b", false));
    expect(await new Client(c, "a/r").ended()).toBe("none");
  });
});
