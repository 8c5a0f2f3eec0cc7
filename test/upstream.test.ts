/** The upstream edge against real sockets: every way in which a node can answer, fail or hang. */

import { createServer, type Server, type Socket } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import fc from "fast-check";
import { afterEach, describe, expect, it } from "vitest";
import type { UpstreamEvent } from "../actors/edges.ts";
import type { ActorRef, ReplyTo } from "../runtime/actor.ts";
import { DataPlane, type OutgoingRequest } from "../transport/data-plane.ts";
import {
  UpstreamEdge,
  type UpstreamOptions,
  upstreamDefaults,
  withUsageAsked,
} from "../transport/upstream.ts";
import {
  failureOfError,
  failureOfSocket,
  failureOfStatus,
  retryAfterMs,
} from "../transport/upstream-failure.ts";

fc.configureGlobal({ seed: 20_251_124 });

// ---- a node made of a socket --------------------------------------------------------------------------------

type NodeRequest = { line: string; headers: Record<string, string>; body: string };
type TestNode = {
  url: string;
  requests: NodeRequest[];
  /** Connections that have ended, as the node sees it. */
  closed: number;
  server: Server;
  sockets: Set<Socket>;
};

const cleanups: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

async function startNode(reply: (socket: Socket, request: NodeRequest) => void): Promise<TestNode> {
  const node: TestNode = {
    url: "",
    requests: [],
    closed: 0,
    server: createServer(),
    sockets: new Set(),
  };
  node.server.on("connection", (socket) => {
    node.sockets.add(socket);
    let pending = Buffer.alloc(0);
    socket.on("data", (data) => {
      pending = Buffer.concat([pending, data]);
      for (;;) {
        const headEnd = pending.indexOf("\r\n\r\n");
        if (headEnd === -1) return;
        const [line = "", ...fields] = pending.subarray(0, headEnd).toString().split("\r\n");
        const headers = Object.fromEntries(
          fields.map((field) => [
            field.slice(0, field.indexOf(":")).toLowerCase(),
            field.slice(field.indexOf(":") + 1).trim(),
          ]),
        );
        const end = headEnd + 4 + Number(headers["content-length"] ?? 0);
        if (pending.length < end) return;
        const request = { line, headers, body: pending.subarray(headEnd + 4, end).toString() };
        pending = pending.subarray(end);
        node.requests.push(request);
        reply(socket, request);
      }
    });
    socket.on("error", () => {});
    socket.on("close", () => {
      node.closed++;
      node.sockets.delete(socket);
    });
  });
  await new Promise<void>((resolve) => node.server.listen(0, "127.0.0.1", resolve));
  const address = node.server.address();
  node.url = `http://127.0.0.1:${typeof address === "object" ? address?.port : 0}`;
  cleanups.push(async () => {
    for (const socket of node.sockets) socket.destroy();
    await new Promise((resolve) => node.server.close(resolve));
  });
  return node;
}

function answer(
  status: number,
  type: string,
  body: string,
  headers: Record<string, string> = {},
): string {
  const fields = Object.entries({ "content-type": type, ...headers });
  return `HTTP/1.1 ${status} X\r\n${fields.map(([k, v]) => `${k}: ${v}\r\n`).join("")}content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`;
}

const sseHead =
  "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
const lastChunk = "0\r\n\r\n";

function piece(text: string): string {
  return `${Buffer.byteLength(text).toString(16)}\r\n${text}\r\n`;
}

function delta(fields: object, finish: string | null = null): string {
  const choices = [{ index: 0, delta: fields, finish_reason: finish }];
  return `data: ${JSON.stringify({ id: "1", object: "chat.completion.chunk", created: 1, model: "m", choices })}\n\n`;
}

const role = delta({ role: "assistant", content: "" });
const stop = delta({}, "stop");
const usage = `data: ${JSON.stringify({ id: "1", choices: [], usage: { prompt_tokens: 5, completion_tokens: 2 } })}\n\n`;
const done = "data: [DONE]\n\n";

function text(content: string): string {
  return delta({ content });
}

const wholeBody = JSON.stringify({
  id: "1",
  object: "chat.completion",
  model: "m",
  choices: [{ index: 0, message: { role: "assistant", content: "hi" }, finish_reason: "stop" }],
  usage: { prompt_tokens: 5, completion_tokens: 2 },
});

// ---- the edge, with a mailbox that only collects ---------------------------------------------------------------

const requester: ActorRef<UpstreamEvent> = { path: "/requests", uid: 1 };
const asker: ReplyTo<{ answered: boolean; detail: string }> = { asker: "/node", askId: 1 };

type Clocks = { firstTokenMs: number; stallMs: number; totalMs: number };
const longClocks: Clocks = { firstTokenMs: 60_000, stallMs: 60_000, totalMs: 60_000 };

class Rig {
  readonly data = new DataPlane();
  readonly events: UpstreamEvent[] = [];
  readonly replies: { answered: boolean; detail: string }[] = [];
  readonly edge: UpstreamEdge;
  model: string | undefined = "m";
  #wake: (() => void)[] = [];
  #leases = 0;

  constructor(node: TestNode | null, options: Partial<UpstreamOptions> = {}) {
    this.edge = new UpstreamEdge(
      { ...upstreamDefaults, ...options },
      {
        data: this.data,
        post: (_to, message) => {
          this.events.push(message as UpstreamEvent);
          for (const wake of this.#wake.splice(0)) wake();
        },
        reply: (_to, value) => {
          this.replies.push(value as { answered: boolean; detail: string });
          for (const wake of this.#wake.splice(0)) wake();
        },
        nowMs: () => performance.now(),
        modelOf: () => this.model,
      },
    );
    if (node !== null) this.edge.addNode({ node: "a", url: node.url, apiKey: "node-key" });
    cleanups.push(() => this.edge.close());
  }

  start(request: Partial<OutgoingRequest> = {}, clocks: Partial<Clocks> = {}, node = "a"): string {
    const leaseId = `r${++this.#leases}#1`;
    const requestId = `r${this.#leases}`;
    this.data.requests.set(requestId, {
      method: "POST",
      path: "/v1/chat/completions",
      headers: { "content-type": "application/json", authorization: "Bearer client-key", te: "x" },
      body: Buffer.from('{"model":"m","stream":true,"messages":[]}'),
      route: "chat",
      model: "m",
      stream: true,
      wantsUsage: false,
      storable: true,
      ...request,
    });
    this.edge.receive({
      kind: "upstream.start",
      leaseId,
      requestId,
      flightId: requestId,
      node,
      attempt: 1,
      ...longClocks,
      ...clocks,
      replyTo: requester,
    });
    return leaseId;
  }

  whole(request: Partial<OutgoingRequest> = {}, clocks: Partial<Clocks> = {}): string {
    return this.start({ stream: false, body: Buffer.from('{"model":"m"}'), ...request }, clocks);
  }

  async until(condition: () => boolean): Promise<void> {
    while (!condition()) await new Promise<void>((resolve) => this.#wake.push(resolve));
  }

  async event<K extends UpstreamEvent["kind"]>(
    kind: K,
  ): Promise<Extract<UpstreamEvent, { kind: K }>> {
    const is = (e: UpstreamEvent): e is Extract<UpstreamEvent, { kind: K }> => e.kind === kind;
    await this.until(() => this.events.some(is));
    const found = this.events.find(is);
    if (found === undefined) throw new Error("unreachable");
    return found;
  }

  /** The attempt's one end, and no second event of that sort. */
  async ended(): Promise<UpstreamEvent> {
    const ends = (): UpstreamEvent[] =>
      this.events.filter((e) => e.kind === "upstream.finished" || e.kind === "upstream.failed");
    await this.until(() => ends().length > 0);
    await turns();
    expect(ends().length).toBe(1);
    expect(this.edge.inflight).toBe(0);
    const [end] = ends();
    if (end === undefined) throw new Error("unreachable");
    return end;
  }

  async failure() {
    const end = await this.ended();
    if (end.kind !== "upstream.failed") throw new Error(`${end.kind} instead of a failure`);
    return end;
  }

  read(requestId = "r1") {
    const answer = this.data.answers.get(requestId);
    if (answer === undefined) return null;
    const bytes = Buffer.concat((answer.parts ?? []).map((part) => part.bytes)).toString();
    return { form: answer.form, head: answer.head, end: answer.end, bytes };
  }
}

/** Lets everything that is ready in this process happen. */
async function turns(): Promise<void> {
  for (let i = 0; i < 20; i++) await new Promise((resolve) => setImmediate(resolve));
}

async function waitFor(condition: () => boolean): Promise<void> {
  while (!condition()) await delay(1);
}

async function streamed(...writes: string[]): Promise<Rig> {
  return new Rig(
    await startNode((socket) => void socket.write(sseHead + writes.map(piece).join(""))),
  );
}

// ---- answers ------------------------------------------------------------------------------------------------

describe("upstream: answers", () => {
  it("writes a stream to the data plane unchanged, and hands the whole answer to the cache", async () => {
    const node = await startNode((socket) => {
      socket.write(sseHead + piece(role));
      socket.write(piece(text("Hal")) + piece(text("lo") + stop + usage + done) + lastChunk);
    });
    const rig = new Rig(node);
    rig.start();
    const finished = await rig.event("upstream.finished");
    expect(rig.events.map((e) => e.kind)).toEqual(["upstream.first_token", "upstream.finished"]);
    expect(rig.read()).toEqual({
      form: "sse",
      head: { status: 200, contentType: "text/event-stream; charset=utf-8" },
      end: { ok: true },
      bytes: role + text("Hal") + text("lo") + stop + usage + done,
    });
    expect(rig.data.answers.get("r1")?.parts?.filter((part) => part.usage).length).toBe(1);
    expect(finished.usage).toEqual({ promptTokens: 5, cachedTokens: 0, outputTokens: 2 });
    expect(finished.decodeMs).toBeGreaterThanOrEqual(0);
    expect(finished.answer).toMatchObject({
      route: "chat",
      model: "m",
      promptTokens: 5,
      outputTokens: 2,
    });
    expect(JSON.parse(Buffer.from(finished.answer?.body ?? []).toString())).toMatchObject({
      object: "chat.completion",
      choices: [{ message: { role: "assistant", content: "Hallo" }, finish_reason: "stop" }],
    });
  });

  it("sends the node's key, ids and a request for usage; never the client's key or connection headers", async () => {
    const node = await startNode((socket) => void socket.end(answer(500, "text/plain", "")));
    const rig = new Rig(node);
    rig.start();
    await rig.ended();
    const [request] = node.requests;
    expect(request?.line).toBe("POST /v1/chat/completions HTTP/1.1");
    expect(request?.headers).toMatchObject({
      authorization: "Bearer node-key",
      "content-type": "application/json",
      "x-request-id": "r1",
      "x-headrace-attempt": "1",
    });
    expect(request?.headers).not.toHaveProperty("te");
    expect(JSON.parse(request?.body ?? "")).toEqual({
      model: "m",
      stream: true,
      messages: [],
      stream_options: { include_usage: true },
    });
  });

  it("keeps the prefix of a node's URL, and the query", async () => {
    const node = await startNode((socket) => void socket.end(answer(500, "text/plain", "")));
    const rig = new Rig(null);
    rig.edge.addNode({ node: "a", url: `${node.url}/llm/` });
    rig.start({ path: "/v1/chat/completions?x=1" });
    await rig.ended();
    expect(node.requests[0]?.line).toBe("POST /llm/v1/chat/completions?x=1 HTTP/1.1");
    expect(node.requests[0]?.headers).not.toHaveProperty("authorization");
  });

  it("gives a whole answer in one event, checked and complete", async () => {
    const rig = new Rig(
      await startNode((s) => void s.write(answer(200, "application/json", wholeBody))),
    );
    rig.whole();
    const finished = await rig.event("upstream.finished");
    expect(rig.events.length).toBe(1);
    expect(finished).toMatchObject({ decodeMs: 0, usage: { promptTokens: 5, outputTokens: 2 } });
    expect(Buffer.from(finished.answer?.body ?? []).toString()).toBe(wholeBody);
    expect(rig.read()).toEqual({
      form: "whole",
      head: { status: 200, contentType: "application/json" },
      end: { ok: true },
      bytes: wholeBody,
    });
  });

  it("gives embeddings", async () => {
    const body = '{"object":"list","data":[{"embedding":[0.5]}],"usage":{"prompt_tokens":3}}';
    const rig = new Rig(
      await startNode((s) => void s.write(answer(200, "application/json", body))),
    );
    rig.whole({ route: "embeddings", path: "/v1/embeddings" });
    expect(await rig.ended()).toMatchObject({
      kind: "upstream.finished",
      usage: { promptTokens: 3, cachedTokens: 0, outputTokens: 0 },
      answer: { route: "embeddings" },
    });
  });

  it("passes a raw answer through, committed by its first byte", async () => {
    let socket: Socket | null = null;
    const node = await startNode((s) => {
      socket = s;
      s.write(
        `HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ntransfer-encoding: chunked\r\n\r\n${piece("abc")}`,
      );
    });
    const rig = new Rig(node);
    rig.whole({ route: "other", path: "/v1/audio/speech" });
    await rig.event("upstream.first_token");
    expect(rig.read()).toMatchObject({
      form: "raw",
      head: { contentType: "audio/mpeg" },
      bytes: "abc",
      end: null,
    });
    (socket as Socket | null)?.write(piece("def") + lastChunk);
    expect(await rig.ended()).toMatchObject({ notStorable: "not an OpenAI route" });
    expect(rig.read()).toMatchObject({ bytes: "abcdef", end: { ok: true } });
  });

  it("passes an empty raw answer through", async () => {
    const rig = new Rig(await startNode((s) => void s.write("HTTP/1.1 204 X\r\n\r\n")));
    rig.whole({ route: "other", method: "DELETE", path: "/v1/files/1", body: null });
    expect((await rig.ended()).kind).toBe("upstream.finished");
    expect(rig.read()).toMatchObject({
      form: "raw",
      head: { status: 204 },
      bytes: "",
      end: { ok: true },
    });
  });

  it("counts tokens where the node states none", async () => {
    const rig = await streamed(role, text("a"), text("b"), text("c"), stop, done, "");
    rig.start();
    const finished = await rig.event("upstream.finished");
    expect(finished.usage).toEqual({ promptTokens: 12, cachedTokens: 0, outputTokens: 3 });
  });

  it.each([
    ["finish_reason length", [text("a"), delta({}, "length"), done]],
    ["no [DONE]", [text("a"), stop]],
    [
      "tool calls",
      [delta({ tool_calls: [{ index: 0, id: "c", function: { arguments: "" } }] }), stop, done],
    ],
  ])("does not store: %s", async (reason, writes) => {
    const rig = await streamed(...writes, "");
    rig.start();
    expect(await rig.ended()).toMatchObject({ kind: "upstream.finished", notStorable: reason });
    expect(rig.read()?.bytes.endsWith(done)).toBe(true);
  });

  it("does not store what the request forbids, nor what was too long to keep", async () => {
    const rig = await streamed(text("a"), stop, done, "");
    rig.start({ storable: false });
    expect(await rig.ended()).toMatchObject({ notStorable: "not to be stored" });
    const node = await startNode((socket) => {
      socket.write(sseHead + piece(text("a")));
      setImmediate(() => socket.write(piece(text("b") + stop + done) + lastChunk));
    });
    const small = new Rig(node, { answerBytesMax: 200 });
    small.start();
    expect(await small.ended()).toMatchObject({ notStorable: "too long" });
  });

  it("takes an answer for finished at [DONE], though the node keeps the response open", async () => {
    const node = await startNode(
      (socket) => void socket.write(sseHead + piece(text("a") + stop + done)),
    );
    const rig = new Rig(node);
    rig.start();
    expect(await rig.ended()).toMatchObject({ kind: "upstream.finished" });
    await waitFor(() => node.closed === 1);
  });

  it("uses a connection again after a proper end", async () => {
    const node = await startNode(
      (s) => void s.write(sseHead + piece(text("a") + stop + done) + lastChunk),
    );
    const rig = new Rig(node);
    for (let i = 0; i < 3; i++) {
      rig.start();
      await rig.ended();
      rig.events.length = 0;
    }
    expect(node.sockets.size).toBe(1);
  });

  it("is not confused by informational responses", async () => {
    const hints = "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n";
    const rig = new Rig(
      await startNode((s) => void s.write(hints + answer(200, "application/json", wholeBody))),
    );
    rig.whole();
    expect((await rig.ended()).kind).toBe("upstream.finished");
  });

  it("reports that an attempt lives, though its node is silent", async () => {
    const node = await startNode(() => {});
    const rig = new Rig(node, { progressMs: 20 });
    const leaseId = rig.start();
    expect((await rig.event("upstream.progress")).outputTokens).toBe(0);
    rig.edge.receive({ kind: "upstream.abort", leaseId, code: "client_closed" });
  });
});

// ---- failures -----------------------------------------------------------------------------------------------

describe("upstream: failures before anything was committed", () => {
  it.each([
    [401, "unavailable"],
    [403, "unavailable"],
    [408, "unavailable"],
    [424, "server_error"],
    [429, "overloaded"],
    [500, "server_error"],
    [501, "server_error"],
    [502, "unavailable"],
    [503, "unavailable"],
    [504, "unavailable"],
  ] as const)("status %i is %s", async (status, failure) => {
    const rig = new Rig(
      await startNode((s) => void s.write(answer(status, "text/plain", "prompt text"))),
    );
    rig.start();
    const failed = await rig.failure();
    expect(failed).toMatchObject({ failure, status, committed: false, outputTokens: 0 });
    expect(failed.detail).not.toContain("prompt text");
    expect(rig.data.answers.size).toBe(0);
  });

  it.each([
    ["SGLang", "The request queue is full."],
    ["TGI", '{"error":"Model is overloaded","error_type":"overloaded"}'],
    ["llama.cpp", '{"error":{"message":"no slot available"}}'],
  ])("status 503 is overloaded where the body says so (%s)", async (_, body) => {
    const rig = new Rig(
      await startNode((s) => void s.write(answer(503, "application/json", body))),
    );
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "overloaded", status: 503 });
  });

  it.each([400, 404, 409, 413, 422])(
    "status %i is the client's, and the node's words reach it",
    async (status) => {
      const body = '{"error":{"message":"no such model","type":"NotFoundError","code":404}}';
      const rig = new Rig(
        await startNode((s) => void s.write(answer(status, "application/json", body))),
      );
      rig.start();
      expect(await rig.failure()).toMatchObject({
        failure: "client_error",
        status,
        committed: false,
      });
      expect(rig.read()).toEqual({
        form: "whole",
        head: { status, contentType: "application/json" },
        end: { ok: true },
        bytes: body,
      });
    },
  );

  it("writes an error of its own where a refusal has no body", async () => {
    const rig = new Rig(await startNode((s) => void s.write(answer(400, "text/html", ""))));
    rig.start();
    await rig.failure();
    expect(rig.read()?.head.contentType).toBe("application/json");
    expect(JSON.parse(rig.read()?.bytes ?? "")).toMatchObject({
      error: { type: "invalid_request_error" },
    });
  });

  it("judges a refusal whose body never ends by what has come", async () => {
    const node = await startNode((socket) => {
      socket.write("HTTP/1.1 503 X\r\ncontent-length: 100\r\n\r\nthe queue is full");
    });
    const rig = new Rig(node);
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "overloaded" });
    await waitFor(() => node.closed === 1);
  });

  it("judges a refusal whose connection breaks by what has come", async () => {
    const rig = new Rig(
      await startNode((s) => void s.end("HTTP/1.1 503 X\r\ncontent-length: 100\r\n\r\noverloaded")),
    );
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "overloaded", status: 503 });
  });

  it("does not read an endless refusal", async () => {
    const node = await startNode((socket) => {
      socket.write("HTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\n");
      const write = (): void => {
        while (!socket.destroyed && socket.write(piece("x".repeat(10_000))));
      };
      socket.on("drain", write);
      write();
    });
    const rig = new Rig(node);
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "server_error" });
    await waitFor(() => node.closed === 1);
  });

  it("passes on how long the node asks to be left alone", async () => {
    const headers = { "retry-after": "7" };
    const rig = new Rig(
      await startNode((s) => void s.write(answer(429, "text/plain", "", headers))),
    );
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "overloaded", retryAfterMs: 7000 });
  });

  it("does not follow a redirect", async () => {
    const other = await startNode((s) => void s.end());
    const node = await startNode(
      (s) => void s.write(answer(307, "text/plain", "", { location: other.url })),
    );
    const rig = new Rig(node);
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "bad_answer", status: 307 });
    expect(other.requests.length).toBe(0);
  });

  it.each([
    ["half JSON", answer(200, "application/json", wholeBody.slice(0, 80))],
    ["an error body with 200", answer(200, "application/json", '{"error":{"message":"m"}}')],
    ["no choices", answer(200, "application/json", "{}")],
    ["a web page", answer(200, "text/html", "<html>")],
    ["no content type", `HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}`],
    ["compression", answer(200, "application/json", wholeBody, { "content-encoding": "gzip" })],
    ["garbage", "SSH-2.0-OpenSSH_9.6\r\n\r\n"],
    ["an over-long head", `HTTP/1.1 200 OK\r\nx: ${"y".repeat(70_000)}\r\n\r\n`],
  ])("a whole answer is bad: %s", async (_, reply) => {
    const rig = new Rig(await startNode((s) => void s.write(reply)));
    rig.whole();
    expect(await rig.failure()).toMatchObject({ failure: "bad_answer", committed: false });
    expect(rig.data.answers.size).toBe(0);
  });

  it.each([
    ["JSON instead", answer(200, "application/json", wholeBody)],
    ["a web page", answer(200, "text/html", "<html>")],
    ["not JSON", sseHead + piece("data: <html>\n\n")],
    ["an event over 1 MiB", sseHead + piece(text("x".repeat(1_100_000)))],
    ["a line over 1 MiB without end", sseHead + piece(`data: ${"x".repeat(1_100_000)}`)],
    ["1 MiB without content", sseHead + piece(role.repeat(8000))],
  ])("a stream is bad: %s", async (_, reply) => {
    const rig = new Rig(await startNode((s) => void s.write(reply)));
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "bad_answer", committed: false });
    expect(rig.data.answers.size).toBe(0);
  });

  it("a whole answer over its bound is bad", async () => {
    const node = await startNode(
      (s) => void s.write(answer(200, "application/json", "x".repeat(5000))),
    );
    const rig = new Rig(node, { wholeBytesMax: 1000 });
    rig.whole();
    expect(await rig.failure()).toMatchObject({ failure: "bad_answer", detail: "too long" });
  });

  it.each([
    ['{"error":"Model is overloaded","error_type":"overloaded"}', "overloaded"],
    ['{"error":{"message":"engine died","code":500}}', "server_error"],
    ['{"error":{"message":"engine died"}}', "server_error"],
    ['{"error":{"message":"busy","code":429}}', "overloaded"],
  ])("an error as first event (%s) is %s", async (json, failure) => {
    const rig = await streamed(role, `data: ${json}\n\n`);
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure, committed: false });
    expect(rig.data.answers.size).toBe(0);
  });

  it.each([
    ["as first event", sseHead + piece('data: {"error":{"message":"too long","code":400}}\n\n')],
    [
      "as JSON with 200",
      answer(200, "application/json", '{"error":{"message":"too long","code":400}}'),
    ],
  ])("a client's error inside a 200, %s, reaches the client with its status", async (_, reply) => {
    const rig = new Rig(await startNode((s) => void s.write(reply)));
    rig.start();
    expect(await rig.failure()).toMatchObject({
      failure: "client_error",
      status: 400,
      committed: false,
    });
    expect(rig.read()).toMatchObject({
      form: "whole",
      head: { status: 400 },
      bytes: '{"error":{"message":"too long","code":400}}',
    });
  });

  it("is connect when nobody listens", async () => {
    const node = await startNode(() => {});
    await new Promise((resolve) => node.server.close(resolve));
    const rig = new Rig(node);
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "connect", committed: false });
  });

  it("is connect when the node resets before a head", async () => {
    const rig = new Rig(await startNode((s) => void s.resetAndDestroy()));
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "connect", committed: false });
  });

  it("is connect when the node ends before a head", async () => {
    const rig = new Rig(await startNode((s) => void s.end()));
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure: "connect", committed: false });
  });

  it("is connect when the node is not configured", async () => {
    const rig = new Rig(null);
    rig.start({}, {}, "nobody");
    expect(await rig.failure()).toMatchObject({ failure: "connect" });
  });

  it("is a broken stream when the node resets after a head", async () => {
    const rig = new Rig(
      await startNode((s) => {
        s.write(sseHead + piece(role));
        setImmediate(() => s.resetAndDestroy());
      }),
    );
    rig.start();
    expect(await rig.failure()).toMatchObject({
      failure: "broken_stream",
      committed: false,
      status: 200,
    });
  });

  it.each(["", role, ": comment\n\n", done])(
    "is a broken stream when nothing but %j came",
    async (only) => {
      const rig = new Rig(
        await startNode((s) => void s.write(sseHead + (only && piece(only)) + lastChunk)),
      );
      rig.start();
      expect(await rig.failure()).toMatchObject({ failure: "broken_stream", committed: false });
    },
  );

  it("is a broken stream when a whole answer breaks off", async () => {
    const rig = new Rig(
      await startNode((s) => void s.end(answer(200, "application/json", wholeBody).slice(0, -20))),
    );
    rig.whole();
    expect(await rig.failure()).toMatchObject({ failure: "broken_stream", committed: false });
    expect(rig.data.answers.size).toBe(0);
  });

  it("is the request's own fault when HTTP forbids its path", async () => {
    const node = await startNode((s) => void s.end());
    const rig = new Rig(node);
    rig.start({ path: "/v1/a b" });
    expect(await rig.failure()).toMatchObject({ failure: "client_error", status: 400 });
    expect(rig.read()).toMatchObject({ form: "whole", head: { status: 400 } });
    expect(node.requests.length).toBe(0);
  });

  it("answers when the request's body is gone, blaming no node", async () => {
    const rig = new Rig(await startNode(() => {}));
    rig.edge.receive({
      kind: "upstream.start",
      leaseId: "gone#1",
      requestId: "gone",
      flightId: "gone",
      node: "a",
      attempt: 1,
      ...longClocks,
      replyTo: requester,
    });
    expect(await rig.failure()).toMatchObject({ failure: "client_error" });
    expect(rig.read("gone")).toMatchObject({ head: { status: 500 }, end: { ok: true } });
  });
});

describe("upstream: clocks", () => {
  it.each([
    ["no head", ""],
    ["a head and nothing more", sseHead],
    ["a role only", sseHead + piece(role)],
  ])("the first token is late: %s", async (_, reply) => {
    const node = await startNode((s) => void (reply && s.write(reply)));
    const rig = new Rig(node);
    rig.start({}, { firstTokenMs: 40 });
    expect(await rig.failure()).toMatchObject({ failure: "first_token_timeout", committed: false });
    expect(rig.data.answers.size).toBe(0);
    await waitFor(() => node.closed === 1); // The node is freed.
  });

  it.each([
    ["comments", ": keep-alive\n\n"],
    ["role-only deltas", role],
    ["empty deltas", delta({ content: "" })],
  ])("%s for ever do not count as a first token, nor as a next one", async (_, noise) => {
    let first = "";
    const node = await startNode((socket) => {
      socket.write(sseHead + (first && piece(first)));
      const timer = setInterval(() => socket.write(piece(noise)), 2);
      socket.on("close", () => clearInterval(timer));
    });
    const rig = new Rig(node);
    rig.start({}, { firstTokenMs: 60 });
    expect(await rig.failure()).toMatchObject({ failure: "first_token_timeout" });
    rig.events.length = 0;
    first = text("a");
    rig.start({}, { stallMs: 60 });
    expect(await rig.failure()).toMatchObject({
      failure: "stalled",
      committed: true,
      outputTokens: 1,
    });
    expect(rig.read("r2")).toMatchObject({ end: { ok: false, code: "upstream_stalled" } });
  });

  it("a stream that goes on for ever ends at the total clock", async () => {
    const node = await startNode((socket) => {
      socket.write(sseHead);
      const timer = setInterval(() => socket.write(piece(text("a"))), 2);
      socket.on("close", () => clearInterval(timer));
    });
    const rig = new Rig(node);
    rig.start({}, { totalMs: 80 });
    expect(await rig.failure()).toMatchObject({ failure: "total_timeout", committed: true });
    expect(rig.read()).toMatchObject({ end: { ok: false, code: "upstream_timeout_total" } });
    await waitFor(() => node.closed === 1);
  });

  it("a whole answer stalls in its body", async () => {
    const rig = new Rig(
      await startNode(
        (s) => void s.write(answer(200, "application/json", wholeBody).slice(0, -20)),
      ),
    );
    rig.whole({}, { stallMs: 40 });
    expect(await rig.failure()).toMatchObject({ failure: "stalled", committed: false });
  });

  it("a whole answer may take as long as its total clock", async () => {
    const node = await startNode((s) => {
      setTimeout(() => s.write(answer(200, "application/json", wholeBody)), 80);
    });
    const rig = new Rig(node);
    rig.whole({}, { stallMs: 10 });
    expect((await rig.ended()).kind).toBe("upstream.finished");
    rig.events.length = 0;
    rig.whole({}, { firstTokenMs: 30, totalMs: 30 });
    expect(await rig.failure()).toMatchObject({ failure: "total_timeout" });
  });
});

describe("upstream: failures after the commit", () => {
  const first = role + text("a");

  it.each([
    ["the node resets", "reset", "broken_stream", "stream_broken"],
    ["the stream ends without a finish", lastChunk, "broken_stream", "stream_broken"],
    [
      "the node reports an error",
      piece('data: {"error":{"message":"m"}}\n\n'),
      "server_error",
      "upstream_failed",
    ],
    [
      "… even one of the client",
      piece('data: {"error":{"code":400}}\n\n'),
      "server_error",
      "upstream_failed",
    ],
    [
      "an event is over 1 MiB",
      piece(text("x".repeat(1_100_000))),
      "bad_answer",
      "upstream_bad_answer",
    ],
  ])("are final: %s", async (_, then, failure, code) => {
    const node = await startNode((socket) => {
      socket.write(sseHead + piece(first));
      setImmediate(() => (then === "reset" ? socket.resetAndDestroy() : socket.write(then)));
    });
    const rig = new Rig(node);
    rig.start();
    expect(await rig.failure()).toMatchObject({ failure, committed: true, outputTokens: 1 });
    expect(rig.events.map((e) => e.kind)).toEqual(["upstream.first_token", "upstream.failed"]);
    expect(rig.read()).toMatchObject({ form: "sse", bytes: first, end: { ok: false, code } });
  });
});

describe("upstream: backpressure", () => {
  const big = text("x".repeat(60_000));

  /** A node that writes as much as it can of a long stream. */
  function flood(head: string, pieces: number, end: string) {
    return startNode((socket) => {
      socket.write(head);
      let left = pieces;
      const write = (): void => {
        while (left > 0 && !socket.destroyed) {
          left--;
          if (!socket.write(piece(big))) break;
        }
        if (left === 0 && !socket.destroyed) {
          left = -1;
          if (end === "reset") socket.resetAndDestroy();
          else socket.write(end);
        }
      };
      socket.on("drain", write);
      write();
    });
  }

  it("reads no further while no reader has room, does not call that a stall, and goes on later", async () => {
    const node = await flood(sseHead, 300, piece(stop + done) + lastChunk);
    const rig = new Rig(node, { answerBytesMax: 64 << 20 });
    rig.start({}, { stallMs: 1000 });
    await rig.event("upstream.first_token");
    let seen = 0;
    const reader = rig.data.answers.get("r1")?.read(() => {});
    const appended = (): number =>
      (rig.data.answers.get("r1")?.parts ?? []).reduce((sum, part) => sum + part.bytes.length, 0);
    await waitFor(() => appended() > 1 << 20);
    await delay(1300);
    expect(appended()).toBeLessThan(2 << 20);
    expect(rig.events.length).toBe(1);
    while (rig.data.answers.get("r1")?.end !== undefined) {
      const next = reader?.next();
      if (next === undefined || next === "overrun") throw new Error("the reader was cut off");
      if (next === "wait") await turns();
      else if ("bytes" in next) seen += next.bytes.length;
      else break;
    }
    expect((await rig.ended()).kind).toBe("upstream.finished");
    expect(seen).toBe(300 * big.length + stop.length + done.length);
  });

  it("survives a reset while nobody reads, on a connection that will not be kept", async () => {
    const head = sseHead.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n");
    const node = await startNode((socket) => void socket.write(head + piece(big).repeat(18)));
    const rig = new Rig(node, { answerBytesMax: 64 << 20 });
    rig.start();
    await rig.event("upstream.first_token");
    rig.data.answers.get("r1")?.read(() => {});
    await waitFor(() => (rig.read()?.bytes.length ?? 0) > 1 << 20);
    await turns(); // It would be paused now, with little left to read, and so notice the reset at once.
    for (const socket of node.sockets) socket.resetAndDestroy();
    expect(await rig.failure()).toMatchObject({ failure: "broken_stream", committed: true });
  });

  it("goes on with one stream from within another's turn", async () => {
    const rig = new Rig(await flood(sseHead, 60, piece(stop + done) + lastChunk), {
      answerBytesMax: 64 << 20,
    });
    const other = await startNode((socket) => {
      socket.write(sseHead + piece(text("a")));
      socket.on("error", () => {});
      setTimeout(() => socket.write(piece(text("b") + stop + done) + lastChunk), 100);
    });
    rig.edge.addNode({ node: "b", url: other.url });
    rig.start();
    await rig.event("upstream.first_token");
    const paused = rig.data.answers.get("r1")?.read(() => {});
    await waitFor(() => (rig.read()?.bytes.length ?? 0) > 1 << 20);
    rig.start({}, {}, "b");
    await rig.until(() => rig.events.length === 2);
    const readPaused = (): void => {
      for (let next = paused?.next(); typeof next === "object" && "bytes" in next; )
        next = paused?.next();
    };
    const reading = rig.data.answers.get("r2")?.read(readPaused);
    await rig.until(() =>
      rig.events.some((e) => e.kind === "upstream.finished" && e.leaseId === "r2#1"),
    );
    reading?.close();
    while (rig.data.answers.get("r1")?.end === null) {
      readPaused();
      await turns();
    }
    await rig.until(() => rig.events.length === 4);
    expect(rig.events.map((e) => e.kind).sort()).toEqual([
      "upstream.finished",
      "upstream.finished",
      "upstream.first_token",
      "upstream.first_token",
    ]);
  });

  it("aborts a paused stream", async () => {
    const node = await flood(sseHead, 300, "");
    const rig = new Rig(node, { answerBytesMax: 64 << 20 });
    const leaseId = rig.start();
    await rig.event("upstream.first_token");
    const reader = rig.data.answers.get("r1")?.read(() => {});
    await waitFor(() => (rig.data.answers.get("r1")?.parts?.length ?? 0) > 16);
    rig.edge.receive({ kind: "upstream.abort", leaseId, code: "client_closed" });
    reader?.next();
    reader?.close();
    await waitFor(() => node.closed === 1);
    expect(rig.events.length).toBe(1);
  });
});

describe("upstream: aborts", () => {
  it("frees the node within 50 ms", async () => {
    const node = await startNode((socket) => void socket.write(sseHead + piece(text("a"))));
    const rig = new Rig(node);
    const tookMs: number[] = [];
    for (let i = 0; i < 5; i++) {
      const leaseId = rig.start();
      await rig.event("upstream.first_token");
      const closed = new Promise<void>((resolve) => {
        for (const socket of node.sockets) socket.once("close", () => resolve());
      });
      const atMs = performance.now();
      rig.edge.receive({ kind: "upstream.abort", leaseId, code: "client_closed" });
      await closed;
      tookMs.push(performance.now() - atMs);
      rig.events.length = 0;
    }
    expect(Math.min(...tookMs)).toBeLessThan(50); // The best of five: the machine may be busy, once.
  });

  it("tell nobody; a committed answer ends with the code, and later chunks are ignored", async () => {
    const node = await startNode((socket) => {
      socket.write(sseHead + piece(text("a")));
      setInterval(() => socket.write(piece(text("b"))), 1).unref();
    });
    const rig = new Rig(node);
    const leaseId = rig.start();
    await rig.event("upstream.first_token");
    rig.edge.receive({ kind: "upstream.abort", leaseId, code: "upstream_timeout_total" });
    const before = rig.read()?.bytes;
    rig.edge.receive({ kind: "upstream.abort", leaseId, code: "internal" });
    await waitFor(() => node.closed === 1);
    await turns();
    expect(rig.events.length).toBe(1);
    expect(rig.read()).toMatchObject({
      bytes: before,
      end: { ok: false, code: "upstream_timeout_total" },
    });
    expect(rig.edge.inflight).toBe(0);
  });

  it("before a head leave nothing behind", async () => {
    const node = await startNode(() => {});
    const rig = new Rig(node);
    const leaseId = rig.start();
    await waitFor(() => node.requests.length === 1);
    rig.edge.receive({ kind: "upstream.abort", leaseId, code: "client_closed" });
    await waitFor(() => node.closed === 1);
    expect(rig.events).toEqual([]);
    expect(rig.data.answers.size).toBe(0);
  });

  it("of an attempt that waits for a socket keep it from the node", async () => {
    let socket: Socket | null = null;
    const node = await startNode((s) => {
      socket = s;
    });
    const rig = new Rig(node, { connectionsMax: 1 });
    rig.whole();
    await waitFor(() => node.requests.length === 1);
    const waiting = rig.whole();
    rig.edge.receive({ kind: "upstream.abort", leaseId: waiting, code: "client_closed" });
    (socket as Socket | null)?.write(answer(200, "application/json", wholeBody));
    await rig.event("upstream.finished");
    rig.whole();
    await waitFor(() => node.requests.length === 2);
    expect(node.requests.map((request) => request.headers["x-request-id"])).toEqual(["r1", "r3"]);
  });

  it("of everything end every answer", async () => {
    const node = await startNode((socket) => void socket.write(sseHead + piece(text("a"))));
    const rig = new Rig(node);
    rig.start();
    rig.start();
    await rig.until(() => rig.events.length === 2);
    rig.edge.receive({ kind: "upstream.abort_all" });
    expect(rig.edge.inflight).toBe(0);
    for (const id of ["r1", "r2"])
      expect(rig.read(id)).toMatchObject({ end: { ok: false, code: "internal" } });
    await waitFor(() => node.closed === 2);
    expect(rig.events.length).toBe(2);
  });

  it("after the end do nothing", async () => {
    const node = await startNode((s) => void s.write(answer(200, "application/json", wholeBody)));
    const rig = new Rig(node);
    const leaseId = rig.whole();
    await rig.ended();
    rig.edge.receive({ kind: "upstream.abort", leaseId, code: "client_closed" });
    await turns();
    expect(rig.events.length).toBe(1);
    expect(rig.read()?.end).toEqual({ ok: true });
    expect(node.closed).toBe(0);
  });
});

describe("upstream: nodes", () => {
  it("ignores a second start of the same lease", async () => {
    const node = await startNode((s) => void s.write(answer(200, "application/json", wholeBody)));
    const rig = new Rig(node);
    const leaseId = rig.whole();
    rig.edge.receive({
      kind: "upstream.start",
      leaseId,
      requestId: "r1",
      flightId: "r1",
      node: "a",
      attempt: 1,
      ...longClocks,
      replyTo: requester,
    });
    await rig.ended();
    expect(node.requests.length).toBe(1);
  });

  it("lets a removed node finish what runs, starts nothing more on it, and closes its connections", async () => {
    let socket: Socket | null = null;
    const node = await startNode((s) => {
      socket = s;
    });
    const rig = new Rig(node);
    rig.whole();
    await waitFor(() => node.requests.length === 1);
    rig.edge.removeNode("a");
    rig.whole();
    expect(await rig.event("upstream.failed")).toMatchObject({
      leaseId: "r2#1",
      failure: "connect",
    });
    (socket as Socket | null)?.write(answer(200, "application/json", wholeBody));
    expect(await rig.event("upstream.finished")).toMatchObject({ leaseId: "r1#1" });
    await waitFor(() => node.closed === 1);
  });

  it("moves to another address when a node is changed, and not when it is the same", async () => {
    const reply = (s: Socket): void => void s.write(answer(200, "application/json", wholeBody));
    const [old, next] = [await startNode(reply), await startNode(reply)];
    const rig = new Rig(old);
    rig.whole();
    await rig.ended();
    rig.edge.addNode({ node: "a", url: old.url, apiKey: "node-key" });
    await turns();
    expect(old.closed).toBe(0);
    rig.edge.addNode({ node: "a", url: next.url });
    rig.events.length = 0;
    rig.whole();
    await rig.ended();
    expect([old.requests.length, next.requests.length]).toEqual([1, 1]);
    await waitFor(() => old.closed === 1);
  });

  it("closes everything: no connection is left, and a start after it fails", async () => {
    const node = await startNode((socket) => void socket.write(sseHead + piece(text("a"))));
    const rig = new Rig(node);
    rig.start();
    await rig.event("upstream.first_token");
    await rig.edge.close();
    await waitFor(() => node.sockets.size === 0);
    expect(rig.read()).toMatchObject({ end: { ok: false, code: "shutting_down" } });
    expect(rig.events.length).toBe(1);
    rig.start();
    expect(await rig.event("upstream.failed")).toMatchObject({ failure: "connect" });
  });
});

describe("upstream: probes", () => {
  async function probe(rig: Rig, timeoutMs = 60_000, node = "a") {
    rig.edge.receive({ kind: "upstream.probe", node, timeoutMs, replyTo: asker });
    await rig.until(() => rig.replies.length > 0);
    return rig.replies[0];
  }

  it("generate one token of a known model", async () => {
    const node = await startNode((s) => void s.write(answer(200, "application/json", wholeBody)));
    expect(await probe(new Rig(node))).toEqual({ answered: true, detail: "status 200" });
    expect(node.requests[0]?.headers.authorization).toBe("Bearer node-key");
    expect(JSON.parse(node.requests[0]?.body ?? "")).toMatchObject({ model: "m", max_tokens: 1 });
  });

  it("ask the node for its model where none is known", async () => {
    const node = await startNode((s, { line }) => {
      const models = '{"data":[{"id":"served"}]}';
      s.write(
        answer(200, "application/json", line.startsWith("GET /v1/models") ? models : wholeBody),
      );
    });
    const rig = new Rig(node);
    rig.model = undefined;
    expect(await probe(rig)).toMatchObject({ answered: true });
    expect(JSON.parse(node.requests[1]?.body ?? "")).toMatchObject({ model: "served" });
  });

  it.each([
    ["status 500", answer(500, "text/plain", "")],
    ["status 503", answer(503, "text/plain", "Loading model")],
    ["status 200", answer(200, "text/html", "<html>")],
    ["status 401", answer(401, "text/plain", "")],
  ])("fail: %s", async (detail, reply) => {
    expect(await probe(new Rig(await startNode((s) => void s.write(reply))))).toEqual({
      answered: false,
      detail,
    });
  });

  it.each([400, 404, 429])("pass with status %i: whoever refuses is there", async (status) => {
    const node = await startNode((s) => void s.write(answer(status, "application/json", "{}")));
    expect(await probe(new Rig(node))).toMatchObject({ answered: true });
  });

  it("fail on a hang, a reset, an unknown node", async () => {
    const hang = await startNode(() => {});
    expect(await probe(new Rig(hang), 30)).toEqual({ answered: false, detail: "timed out" });
    await waitFor(() => hang.closed === 1);
    expect(await probe(new Rig(await startNode((s) => void s.resetAndDestroy())))).toMatchObject({
      answered: false,
    });
    expect(await probe(new Rig(null), 30, "nobody")).toMatchObject({ answered: false });
  });
});

// ---- pure parts -----------------------------------------------------------------------------------------------

describe("asking for usage", () => {
  const jsonObject = fc.dictionary(fc.string(), fc.jsonValue());

  it("adds one member to any JSON object, however it is written, and changes nothing else", () => {
    fc.assert(
      fc.property(
        jsonObject,
        fc.constantFrom(0, 2, "\t"),
        fc.constantFrom("", " ", "\r\n"),
        (json, indent, space) => {
          const body = Buffer.from(`${space}${JSON.stringify(json, null, indent)}${space}`);
          const plain = JSON.parse(body.toString()) as object;
          expect(JSON.parse(Buffer.from(withUsageAsked(body)).toString())).toEqual({
            ...plain,
            stream_options: { include_usage: true },
          });
        },
      ),
    );
  });

  it.each([
    ['{"stream_options":{"include_usage":false,"x":1}}', { include_usage: true, x: 1 }],
    ['{"stream_options":null}', { include_usage: true }],
    ['{"stop":"stream_options"}', { include_usage: true }],
    ['{"a":{"stream_options":1}}', { include_usage: true }],
  ])("keeps what is stated: %s", (body, expected) => {
    expect(JSON.parse(Buffer.from(withUsageAsked(Buffer.from(body))).toString())).toMatchObject({
      ...(JSON.parse(body) as object),
      stream_options: expected,
    });
  });

  it.each(["", "[]", '"x"', "{", '{"stream_options":'])(
    "leaves what is not an object: %j",
    (body) => {
      expect(Buffer.from(withUsageAsked(Buffer.from(body))).toString()).toBe(body);
    },
  );
});

describe("failures by their signs", () => {
  it("know waits in seconds, milliseconds and dates, up to a minute", () => {
    const wait = (headers: Record<string, string>) =>
      retryAfterMs((name) => headers[name], 1_000_000_000_000);
    expect(wait({})).toBeUndefined();
    expect(wait({ "retry-after": "2" })).toBe(2000);
    expect(wait({ "retry-after": "0.5" })).toBe(500);
    expect(wait({ "retry-after": "2", "retry-after-ms": "150.2" })).toBe(151);
    expect(wait({ "retry-after": "999999" })).toBe(60_000);
    expect(wait({ "retry-after": new Date(1_000_000_005_000).toUTCString() })).toBe(5000);
    expect(wait({ "retry-after": new Date(999_999_000_000).toUTCString() })).toBeUndefined();
    for (const bad of ["", "soon", "-1", "0"]) expect(wait({ "retry-after": bad })).toBeUndefined();
  });

  it("never repeat a node's words", () => {
    const secret = "the prompt was overloaded with secrets";
    for (let status = 300; status < 600; status++) {
      expect(failureOfStatus(status, secret).detail).not.toContain("secret");
      expect(failureOfError(status, secret).detail).not.toContain("secret");
    }
    expect(failureOfError(undefined, secret)).toEqual({
      failure: "overloaded",
      detail: "error inside an answer",
    });
  });

  it("tell garbage from a connection that failed", () => {
    const parse = Object.assign(new Error("x"), {
      name: "HTTPParserError",
      code: "HPE_INVALID_CONSTANT",
    });
    expect(failureOfSocket(parse, false).failure).toBe("bad_answer");
    expect(failureOfSocket(parse, true).failure).toBe("broken_stream");
    const refused = Object.assign(new Error("x"), { code: "ECONNREFUSED" });
    expect(failureOfSocket(refused, false)).toEqual({
      failure: "connect",
      detail: "no connection (ECONNREFUSED)",
    });
  });
});
