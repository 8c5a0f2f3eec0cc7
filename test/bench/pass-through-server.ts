/**
 * Baseline of the gateway: the least that a gateway on this platform must do. Bare `node:http` buffers the body
 * and parses it as JSON (to know the model and whether it streams), undici's `Pool.dispatch` forwards it over
 * kept-alive connections, and the answer goes through as it comes, with backpressure; a client that leaves aborts
 * the forwarded request. No cache, no limits, no choice, no retry, no clocks.
 *
 * First argument: the origin to forward to. It tells its port over IPC.
 */
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { type Dispatcher, Pool } from "undici";

const origin = process.argv[2];
if (origin === undefined) throw new Error("usage: pass-through-server.js ORIGIN");
const pool = new Pool(origin, { connections: 512, pipelining: 1 });

type Controller = Dispatcher.DispatchController;

class Forward {
  readonly #response: ServerResponse;
  #controller: Controller | null = null;
  #isOver = false;

  constructor(response: ServerResponse) {
    this.#response = response;
    response.on("close", () => {
      if (!response.writableFinished) this.#abort();
    });
  }

  #abort(): void {
    this.#isOver = true;
    this.#controller?.abort(new Error("the client left"));
  }

  onRequestStart(controller: Controller): void {
    this.#controller = controller;
    if (this.#isOver) this.#abort();
  }

  onResponseStart(
    _controller: Controller,
    status: number,
    headers: Record<string, string | string[] | undefined>,
  ): void {
    const passed = ["content-type", String(headers["content-type"])];
    const length = headers["content-length"];
    if (length !== undefined) passed.push("content-length", String(length));
    this.#response.writeHead(status, passed);
  }

  onResponseData(controller: Controller, chunk: Buffer): void {
    if (this.#response.write(chunk)) return;
    controller.pause();
    this.#response.once("drain", () => controller.resume());
  }

  onResponseEnd(): void {
    this.#response.end();
  }

  onResponseError(): void {
    if (this.#isOver) return;
    if (!this.#response.headersSent) this.#response.writeHead(502);
    this.#response.end();
  }
}

function forward(request: IncomingMessage, response: ServerResponse, body: Buffer): void {
  let model: unknown;
  try {
    model = JSON.parse(body.toString("utf8")).model;
  } catch {
    model = undefined;
  }
  if (typeof model !== "string") {
    response.writeHead(400);
    response.end();
    return;
  }
  const headers = ["content-type", request.headers["content-type"] ?? "application/json"];
  pool.dispatch({ path: request.url ?? "/", method: "POST", headers, body }, new Forward(response));
}

const server = createServer({ keepAliveTimeout: 65_000, noDelay: true }, (request, response) => {
  const chunks: Buffer[] = [];
  request.on("data", (chunk: Buffer) => chunks.push(chunk));
  request.on("end", () => {
    const [only] = chunks;
    forward(request, response, chunks.length === 1 && only ? only : Buffer.concat(chunks));
  });
});
server.listen(0, "127.0.0.1", () => {
  process.send?.({ kind: "listening", port: (server.address() as AddressInfo).port });
});
process.on("disconnect", () => process.exit(0)); // The process that forked it is gone.
