/**
 * Connections between peers as WebSockets, each an object that peer-links.ts writes to and hears from. The only
 * importer of ws.
 *
 * permessage-deflate is off on both sides (it costs a hundred times what the rest does), and texts are not looked at:
 * every message is binary. A client masks with zeros, which the protocol allows and which saves both sides the work;
 * masks protect proxies from scripts in browsers, and there is none here.
 *
 * Before a peer has proved who it is (`trust`), its connection may bring 8 KiB in all; more ends it. A peer that is
 * trusted may send messages up to `frameBytesMax`. What is written piles up in memory when the other side does not
 * read, without an error: `bufferedBytes` tells, and peer-link.ts stops.
 *
 * With TLS a server can ask for a certificate of the same authority (`isMutual`); the channel that the handshake
 * signs is then bound to this very TLS session.
 */
import {
  createServer as createHttpServer,
  type IncomingMessage,
  type Server,
  type ServerResponse,
} from "node:http";
import { createServer as createHttpsServer } from "node:https";
import type { AddressInfo, Socket } from "node:net";
import type { Duplex } from "node:stream";
import { TLSSocket } from "node:tls";
import { WebSocket, WebSocketServer } from "ws";
import type { Connection } from "./peer-link.ts";

/** PEM texts. */
export type PeerTls = {
  key: string;
  cert: string;
  /** Of whom certificates are trusted; default: the authorities that Node trusts. */
  ca?: string;
  /** The server asks for a certificate of `ca`, and the client shows its own. */
  isMutual: boolean;
  /** What a server's certificate must be for, in place of the host that is dialled. */
  serverName?: string;
};

export type SocketOptions = {
  tls?: PeerTls;
  /** Largest message of a trusted peer. */
  frameBytesMax: number;
};

/** What a connection tells its owner: `onOpen` once at most, then messages, `onClose` once at the end, `onGone` last. */
export type SocketEvents = {
  /** @param channel the same on both ends of one TLS session, and of no other; without TLS empty */
  onOpen(channel: string): void;
  onMessage(bytes: Uint8Array): void;
  onClose(reason: string): void;
  /** Everything that was written has gone to the operating system. */
  onDrain(): void;
  /** Nothing is left of it; also when its owner has destroyed or ended it. */
  onGone(): void;
};

/** Path of the WebSocket on a peer's port. */
const PATH = "/peer";
const UNTRUSTED_BYTES_MAX = 8192;
const HANDSHAKE_MS = 5000;
/** How long an orderly end may take. */
const CLOSE_MS = 2000;
const CHANNEL_LABEL = "EXPORTER-headrace-peer";
/** Connections of all sorts at one server, those that say nothing included. */
const CONNECTIONS_MAX = 1024;

/** One line on what is wrong with an address to dial, or undefined. */
export function faultInAddress(address: string): string | undefined {
  const accepted = "accepted is ws://host:port, or wss://host:port with TLS";
  if (!URL.canParse(address)) return `peer address "${address}" is not a URL; ${accepted}`;
  const { protocol, username, password, pathname, search, hash } = new URL(address);
  if (protocol !== "ws:" && protocol !== "wss:") return `peer address "${address}"; ${accepted}`;
  const isBare = username === "" && password === "" && search === "" && hash === "";
  if (!isBare || (pathname !== "/" && pathname !== "")) {
    return `peer address "${new URL(address).host}" has more than a host and a port; ${accepted}`;
  }
  return undefined;
}

/** Begins to connect. What goes wrong comes as `onClose`. */
export function dialPeer(
  address: string,
  { tls, frameBytesMax }: SocketOptions,
  events: SocketEvents,
): Connection {
  const url = new URL(address);
  url.pathname = PATH;
  const options = {
    ...settings(frameBytesMax),
    handshakeTimeout: HANDSHAKE_MS,
    followRedirects: false,
    generateMask: (mask: Buffer) => void mask.fill(0),
    ...(tls === undefined ? {} : clientTls(tls)),
  };
  return new PeerSocket(new WebSocket(url, options), undefined, events);
}

/** Of a client of a peer's port. */
export function clientTls({ key, cert, ca, isMutual, serverName }: PeerTls) {
  return {
    ...(isMutual ? { key, cert } : {}),
    ...(ca === undefined ? {} : { ca }),
    ...(serverName === undefined ? {} : { servername: serverName }),
  };
}

function settings(frameBytesMax: number) {
  return {
    perMessageDeflate: false,
    maxPayload: frameBytesMax,
    skipUTF8Validation: true,
    closeTimeout: CLOSE_MS,
  } as const;
}

class PeerSocket implements Connection {
  readonly #ws: WebSocket;
  readonly #events: SocketEvents;
  #raw: Duplex | undefined;
  #untrustedBytes = 0;
  #isOver = false;
  #isEnding = false;
  #lastError = "";

  /** @param raw of one that is open already */
  constructor(ws: WebSocket, raw: Duplex | undefined, events: SocketEvents) {
    this.#ws = ws;
    this.#events = events;
    if (raw !== undefined) this.#watch(raw);
    ws.on("upgrade", ({ socket }: IncomingMessage) => this.#watch(socket));
    ws.on("open", () => {
      if (!this.#isOver) events.onOpen(channelOf(this.#raw));
    });
    ws.on("message", (data) => {
      if (!this.#isOver && data instanceof Uint8Array) events.onMessage(data);
    });
    ws.on("error", (error) => {
      this.#lastError = error.message;
    });
    ws.on("close", (code) => {
      if (!this.#isOver) {
        this.#isOver = true;
        events.onClose(this.#lastError === "" ? `code ${code}` : this.#lastError);
      }
      events.onGone();
    });
  }

  #watch(raw: Duplex): void {
    this.#raw = raw;
    raw.on("data", this.#onUntrusted);
    raw.on("drain", this.#onDrain);
  }

  readonly #onUntrusted = (chunk: Uint8Array): void => {
    this.#untrustedBytes += chunk.length;
    if (this.#untrustedBytes <= UNTRUSTED_BYTES_MAX) return;
    this.#lastError = `more than ${UNTRUSTED_BYTES_MAX} bytes before it is known who sends them`;
    this.#ws.terminate();
  };

  readonly #onDrain = (): void => {
    if (!this.#isOver) this.#events.onDrain();
  };

  trust(): void {
    this.#raw?.off("data", this.#onUntrusted);
  }

  write(bytes: Uint8Array<ArrayBuffer>): void {
    if (!this.#isOver && this.#ws.readyState === WebSocket.OPEN) this.#ws.send(bytes);
  }

  bufferedBytes(): number {
    return this.#ws.bufferedAmount;
  }

  destroy(): void {
    this.#isOver = true;
    if (!this.#isEnding) this.#ws.terminate();
  }

  end(): void {
    this.#isOver = true;
    this.#isEnding = true;
    this.#ws.close(1000);
  }
}

function channelOf(raw: Duplex | undefined): string {
  if (!(raw instanceof TLSSocket)) return "";
  return raw.exportKeyingMaterial(32, CHANNEL_LABEL, Buffer.alloc(0)).toString("hex");
}

/** Whom a server tells of its connections. */
export type ServerEvents = {
  /** What a peer asks on its port beside the WebSocket; false: nothing that is known. */
  onRequest?(request: IncomingMessage, response: ServerResponse): boolean;
  /** False: the connection is not answered. */
  accepts(remoteHost: string): boolean;
  /** The events that this connection tells; it is open already. */
  onConnection(connection: Connection, remoteHost: string, channel: string): SocketEvents;
};

/** Where peers dial. */
export class PeerServer {
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();

  constructor({ tls, frameBytesMax }: SocketOptions, events: ServerEvents) {
    const options = tls === undefined ? undefined : serverTls(tls);
    this.#server = options === undefined ? createHttpServer() : createHttpsServer(options);
    this.#server.headersTimeout = HANDSHAKE_MS;
    this.#server.requestTimeout = HANDSHAKE_MS;
    this.#server.maxConnections = CONNECTIONS_MAX;
    this.#server.on("request", (request, response) => {
      if (events.onRequest?.(request, response) === true) return;
      response.writeHead(426, { "content-type": "text/plain", connection: "close" });
      response.end("This port is for peers of the cluster.\n");
    });
    this.#server.on("connection", (socket: Socket) => {
      this.#sockets.add(socket);
      socket.on("close", () => this.#sockets.delete(socket));
    });
    this.#server.on("tlsClientError", (_, socket: Socket) => socket.destroy());
    const upgrader = new WebSocketServer({ noServer: true, ...settings(frameBytesMax) });
    this.#server.on("upgrade", (request, socket: Duplex, head) => {
      socket.on("error", () => socket.destroy());
      const remoteHost = request.socket.remoteAddress ?? "";
      if (
        new URL(request.url ?? "/", "ws://peer").pathname !== PATH ||
        !events.accepts(remoteHost)
      ) {
        socket.destroy();
        return;
      }
      upgrader.handleUpgrade(request, socket, head, (ws) => {
        let owner: SocketEvents | undefined;
        const connection = new PeerSocket(ws, socket, {
          onOpen: () => {},
          onMessage: (bytes) => owner?.onMessage(bytes),
          onClose: (reason) => owner?.onClose(reason),
          onDrain: () => owner?.onDrain(),
          onGone: () => owner?.onGone(),
        });
        owner = events.onConnection(connection, remoteHost, channelOf(socket));
      });
    });
  }

  /** The port. Rejects when it cannot listen there. */
  listen(host: string, port: number): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#server.once("error", reject);
      // Not shared by workers of one machine, as their public port is: each is a peer of its own.
      this.#server.listen({ host, port, exclusive: true }, () => {
        this.#server.off("error", reject);
        const address = this.#server.address() as AddressInfo | null;
        resolve(address?.port ?? port);
      });
    });
  }

  /** Ends what is left after a moment for orderly ends. */
  close(): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(() => {
        for (const socket of this.#sockets) socket.destroy();
      }, CLOSE_MS);
      this.#server.close(() => {
        clearTimeout(timer);
        resolve();
      });
      this.#server.closeIdleConnections();
    });
  }
}

function serverTls({ key, cert, ca, isMutual }: PeerTls) {
  return {
    key,
    cert,
    ...(ca === undefined ? {} : { ca }),
    requestCert: isMutual,
    rejectUnauthorized: isMutual,
    handshakeTimeout: HANDSHAKE_MS,
    minVersion: "TLSv1.3",
  } as const;
}
