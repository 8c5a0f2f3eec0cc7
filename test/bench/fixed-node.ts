/**
 * The node behind the measured servers: fixed-answers.ts over bare `node:http`, on as many ports as it is told
 * (first argument), so that one cheap process stands for several nodes. Whole answers come at once; streams tick
 * every 5 ms, all of them on one timer. It tells its ports over IPC.
 */
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { MODEL, streamWrites, wholeAnswer } from "./fixed-answers.ts";

const TICK_MS = 5;

const whole = Buffer.from(wholeAnswer);
const writes = { plain: streamWrites(false), withUsage: streamWrites(true) };
const jsonType = "application/json";
const metrics = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
  .map((name) => `# TYPE vllm:${name} gauge\nvllm:${name}{model_name="${MODEL}"} 0\n`)
  .join("");

type Stream = { response: ServerResponse; writes: readonly Buffer[]; sent: number };
const streams = new Set<Stream>();
let ticker: NodeJS.Timeout | null = null;

function tick(): void {
  for (const stream of streams) {
    const bytes = stream.writes[stream.sent++];
    if (stream.sent < stream.writes.length) stream.response.write(bytes);
    else {
      streams.delete(stream);
      stream.response.end(bytes);
    }
  }
  if (streams.size > 0 || ticker === null) return;
  clearInterval(ticker);
  ticker = null;
}

function onGenerate(request: IncomingMessage, response: ServerResponse): void {
  const chunks: Buffer[] = [];
  request.on("data", (chunk: Buffer) => chunks.push(chunk));
  request.on("end", () => {
    const body = Buffer.concat(chunks);
    if (!body.includes('"stream":true')) return send(response, jsonType, whole);
    const kind = body.includes('"include_usage":true') ? "withUsage" : "plain";
    const stream = { response, writes: writes[kind], sent: 0 };
    response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8" });
    response.on("close", () => streams.delete(stream));
    streams.add(stream);
    ticker ??= setInterval(tick, TICK_MS);
  });
}

function send(response: ServerResponse, type: string, body: Buffer | string): void {
  response.writeHead(200, { "content-type": type, "content-length": Buffer.byteLength(body) });
  response.end(body);
}

function onRequest(request: IncomingMessage, response: ServerResponse): void {
  if (request.method === "POST") return onGenerate(request, response);
  request.resume();
  switch (request.url) {
    case "/v1/models":
      return send(response, jsonType, JSON.stringify({ object: "list", data: [{ id: MODEL }] }));
    case "/metrics":
      return send(response, "text/plain; version=0.0.4", metrics);
    default:
      return send(response, jsonType, "{}");
  }
}

const ports: number[] = [];
const portsWanted = Number(process.argv[2] ?? 1);
for (let i = 0; i < portsWanted; i++) {
  const server = createServer({ keepAliveTimeout: 65_000, noDelay: true }, onRequest);
  server.listen(0, "127.0.0.1", () => {
    ports.push((server.address() as AddressInfo).port);
    if (ports.length === portsWanted) process.send?.({ kind: "listening", port: ports[0], ports });
  });
}
process.on("disconnect", () => process.exit(0)); // The process that forked it is gone.
