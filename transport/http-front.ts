/**
 * Carries requests over HTTP: plain `node:http`, one handler. It reads bodies within their bounds, hands
 * `/v1/*` to `Front`, and answers the operator's routes (`/health`, `/ready`, `/metrics`, `/admin/*`).
 *
 * The body clock is Node's own (`requestTimeout`, checked every second), so that a request costs no timer here.
 */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import type { ErrorCode } from "../actors/errors.ts";
import type { Admin } from "./admin.ts";
import type { Exchange, Front, Sink } from "./front.ts";
import { errorBody, errorHeaders, httpErrors } from "./http-errors.ts";

export type HttpFrontOptions = {
  host: string;
  port: number;
  bodyBytesMax: () => number;
  headerBytesMax: number;
  clientHeadersMs: number;
  clientBodyMs: number;
  clientIdleMs: number;
  connectionsMax: number;
};

export type HttpFrontDeps = {
  front: Front;
  admin: Admin;
  /** Null when metrics are off. */
  metrics: (() => Promise<{ contentType: string; text: string }>) | null;
  ready: () => Promise<{ ready: boolean; reason: string }>;
};

/** Connections that may wait to be accepted while the process is busy; the system's own bound is often 4096. */
const BACKLOG = 4096;
/** A body up to this size leaves with its head in one string and one write; each byte stays what it is. */
const ONE_WRITE_BYTES_MAX = 16_384;

export class HttpFront {
  readonly #options: HttpFrontOptions;
  readonly #deps: HttpFrontDeps;
  readonly #server: Server;

  constructor(options: HttpFrontOptions, deps: HttpFrontDeps) {
    this.#options = options;
    this.#deps = deps;
    this.#server = createServer(
      {
        maxHeaderSize: options.headerBytesMax,
        headersTimeout: options.clientHeadersMs,
        requestTimeout: options.clientHeadersMs + options.clientBodyMs,
        keepAliveTimeout: options.clientIdleMs,
        connectionsCheckingInterval: 1000,
        noDelay: true,
      },
      (request, response) => this.#onRequest(request, response),
    );
    this.#server.maxConnections = options.connectionsMax;
    this.#server.on("clientError", onClientError);
  }

  /** Resolves with the port in use. Rejects when it is taken. */
  listen(): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#server.once("error", reject);
      const { host, port } = this.#options;
      this.#server.listen({ host, port, backlog: BACKLOG }, () => {
        this.#server.off("error", reject);
        resolve((this.#server.address() as AddressInfo).port);
      });
    });
  }

  /** Accepts no more; open requests go on. Idle connections end now. */
  stopAccepting(): void {
    this.#server.close();
    this.#server.closeIdleConnections();
  }

  /** Ends everything that is still open. */
  close(): Promise<void> {
    return new Promise((resolve) => {
      this.#server.close(() => resolve());
      this.#server.closeAllConnections();
    });
  }

  #onRequest(request: IncomingMessage, response: ServerResponse): void {
    const url = request.url ?? "/";
    const queryAt = url.indexOf("?");
    const path = queryAt < 0 ? url : url.slice(0, queryAt);
    const query = queryAt < 0 ? "" : url.slice(queryAt);
    if (path.startsWith("/v1/")) {
      return this.#readBody(request, response, (body) =>
        this.#submit(request, response, path, query, body),
      );
    }
    if (path.startsWith("/admin/")) {
      return this.#readBody(request, response, (body) => {
        void this.#deps.admin
          .handle(request.method ?? "GET", path, query, request.headers.authorization, body)
          .then((answer) => sendJson(response, answer.status, answer.body));
      });
    }
    request.resume();
    if (path === "/health") return sendJson(response, 200, { status: "ok" });
    if (path === "/ready") {
      void this.#deps
        .ready()
        .then((answer) => sendJson(response, answer.ready ? 200 : 503, answer));
      return;
    }
    const { metrics } = this.#deps;
    if (path === "/metrics" && metrics !== null) {
      void metrics().then(({ contentType, text }) => {
        response.writeHead(200, { "content-type": contentType });
        response.end(text);
      });
      return;
    }
    sendError(response, "not_found", `there is no route ${path}`);
  }

  /** Calls `onBody` with the whole body, or answers what was wrong with it. */
  #readBody(
    request: IncomingMessage,
    response: ServerResponse,
    onBody: (body: Buffer) => void,
  ): void {
    const bytesMax = this.#options.bodyBytesMax();
    const tooLarge = () => {
      response.setHeader("connection", "close"); // The rest of the body is not read.
      sendError(response, "body_too_large", `the body is over ${bytesMax} bytes`);
    };
    if (Number(request.headers["content-length"] ?? 0) > bytesMax) return tooLarge();
    const chunks: Buffer[] = [];
    let bytes = 0;
    request.on("data", (chunk: Buffer) => {
      bytes += chunk.length;
      if (bytes <= bytesMax) chunks.push(chunk);
      else if (!response.headersSent) {
        chunks.length = 0;
        tooLarge();
      }
    });
    request.on("end", () => {
      if (bytes > bytesMax) return;
      onBody(chunks.length === 1 && chunks[0] !== undefined ? chunks[0] : Buffer.concat(chunks));
    });
    request.on("error", () => {}); // A client that leaves while it sends: nothing was begun.
  }

  #submit(
    request: IncomingMessage,
    response: ServerResponse,
    path: string,
    query: string,
    body: Buffer,
  ): void {
    const sink = new HttpSink(response, this.#deps.front.draining);
    const exchange = this.#deps.front.submit(
      {
        method: request.method ?? "GET",
        path,
        query,
        header: (name) => {
          const value = request.headers[name];
          return Array.isArray(value) ? value[0] : value;
        },
        body,
      },
      sink,
    );
    sink.exchange = exchange;
    response.on("close", () => {
      if (!response.writableFinished) exchange.left();
    });
  }
}

class HttpSink implements Sink {
  readonly #response: ServerResponse;
  readonly #closes: boolean;
  exchange: Exchange | null = null;
  #listensForDrain = false;
  #framesChunks = false;

  constructor(response: ServerResponse, closes: boolean) {
    this.#response = response;
    this.#closes = closes;
  }

  whole(status: number, headers: string[], body: Uint8Array): void {
    if (this.#response.destroyed) return;
    if (this.#closes) headers.push("connection", "close");
    this.#response.writeHead(status, headers);
    if (body.byteLength > ONE_WRITE_BYTES_MAX) this.#response.end(body);
    else this.#response.end(latin1(body), "latin1");
  }

  /**
   * Chunks are framed here, each as one string: Node's own framing hands the socket four pieces a chunk, which cost
   * half of a stream's CPU.
   */
  head(status: number, headers: string[]): void {
    if (this.#response.destroyed) return;
    if (this.#closes) headers.push("connection", "close");
    this.#response.writeHead(status, headers);
    this.#framesChunks = this.#response.chunkedEncoding; // Not for HTTP/1.0.
    this.#response.chunkedEncoding = false;
  }

  write(bytes: Uint8Array): boolean {
    if (this.#response.destroyed || bytes.byteLength === 0) return true;
    const text = latin1(bytes);
    const framed = this.#framesChunks ? `${bytes.byteLength.toString(16)}\r\n${text}\r\n` : text;
    if (this.#response.write(framed, "latin1")) return true;
    if (!this.#listensForDrain) {
      this.#listensForDrain = true;
      this.#response.on("drain", () => this.exchange?.drained());
    }
    return false;
  }

  end(): void {
    if (this.#response.destroyed) return;
    if (this.#framesChunks) this.#response.end("0\r\n\r\n", "latin1");
    else this.#response.end();
  }

  destroy(): void {
    this.#response.destroy();
  }
}

/** Each byte as one character: written as "latin1" it is the same bytes again. */
function latin1(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("latin1");
}

function sendJson(response: ServerResponse, status: number, body: unknown): void {
  const bytes = Buffer.from(`${JSON.stringify(body)}\n`);
  response.writeHead(status, {
    "content-type": "application/json",
    "content-length": String(bytes.length),
  });
  response.end(bytes);
}

function sendError(response: ServerResponse, code: ErrorCode, message: string): void {
  if (response.headersSent) return;
  for (const [name, value] of Object.entries(errorHeaders(code))) response.setHeader(name, value);
  sendJson(response, httpErrors[code].status, errorBody(code, message));
}

/** What Node refuses before there is a request: headers too large, bad syntax, too slow. */
function onClientError(error: NodeJS.ErrnoException, socket: Socket): void {
  if (!socket.writable || error.code === "ECONNRESET") return void socket.destroy();
  const code: ErrorCode =
    error.code === "HPE_HEADER_OVERFLOW"
      ? "headers_too_large"
      : error.code === "ERR_HTTP_REQUEST_TIMEOUT"
        ? "body_timeout"
        : "invalid_request";
  const body = JSON.stringify(
    errorBody(
      code,
      code === "invalid_request" ? "this is not a well-formed HTTP request" : undefined,
    ),
  );
  const { status } = httpErrors[code];
  socket.end(
    `HTTP/1.1 ${status} Refused\r\ncontent-type: application/json\r\nconnection: close\r\n` +
      `content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
  );
}
