/**
 * Baseline of the cache hit: bare `node:http` that reads the request's body and answers a constant of as many
 * bytes as the stand-in's answer. A process of its own; it tells its port over IPC.
 */
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { wholeAnswer } from "./fixed-answers.ts";

const body = Buffer.from(wholeAnswer);
const headers = ["content-type", "application/json", "content-length", String(body.length)];

const server = createServer({ keepAliveTimeout: 65_000, noDelay: true }, (request, response) => {
  const chunks: Buffer[] = [];
  request.on("data", (chunk: Buffer) => chunks.push(chunk));
  request.on("end", () => {
    Buffer.concat(chunks);
    response.writeHead(200, headers);
    response.end(body);
  });
});
server.listen(0, "127.0.0.1", () => {
  process.send?.({ kind: "listening", port: (server.address() as AddressInfo).port });
});
process.on("disconnect", () => process.exit(0)); // The process that forked it is gone.
