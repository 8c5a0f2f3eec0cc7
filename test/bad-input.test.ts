/**
 * Everything that can be wrong with a client, a node or the network, against a served gateway over real sockets:
 * what the client is told, what the node sees of it, and that nothing is left over.
 */
import { type ClientRequest, request as httpRequest, type IncomingMessage } from "node:http";
import { connect, type Socket } from "node:net";
import { afterEach, beforeAll, describe, expect, it } from "vitest";
import { BODY_FAULTS, type BodyFault } from "../transport/node-server.ts";
import { Server } from "../transport/server.ts";
import {
  type LiveWorld,
  type LiveWorldOptions,
  MODEL,
  type Reply,
  startLiveWorld,
  until,
} from "./live-world.ts";

const ADMIN_TOKEN = "test-admin-token-0001";
const admin = { authorization: `Bearer ${ADMIN_TOKEN}` };

const open: LiveWorld[] = [];
afterEach(async () => {
  await Promise.all(open.splice(0).map((world) => world.close()));
});

/** A world that ends with its test. */
async function start(options: LiveWorldOptions = {}): Promise<LiveWorld> {
  const world = await startLiveWorld(options);
  open.push(world);
  return world;
}

/** Nodes take turns, so that two requests meet both; no waits, no sitting out. */
const alternating: NonNullable<LiveWorldOptions["options"]> = {
  router: { strategy: "round_robin" },
  retry: { backoffBaseMs: 0, budgetFloorPerSecond: 1000 },
};

type Failure = { status: number; code: string; param?: string; says?: RegExp };

function expectError(reply: Reply, { status, code, param, says }: Failure): void {
  const { error } = reply.json;
  expect({ status: reply.status, code: error.code }).toEqual({ status, code });
  if (param !== undefined) expect(error.param).toBe(param);
  if (says !== undefined) expect(error.message).toMatch(says);
  expect(reply.headers.get("content-type")).toBe("application/json");
  expect(reply.headers.get("x-request-id")).toBeTruthy();
}

/** At least one of the requests met the bad node first, and needed the other. */
function expectMoved(replies: readonly Reply[]): void {
  expect(Math.max(...replies.map(({ attempts }) => attempts))).toBe(2);
}

// ---- what a client may get wrong ---------------------------------------------------------------------------

describe("bad input: the body", () => {
  let world: LiveWorld;
  beforeAll(async () => {
    world = await startLiveWorld({
      options: { requests: { bodyBytesMax: 65_536, messagesMax: 8 } },
    });
    return () => world.close();
  });

  const chatPath = "/v1/chat/completions";
  const user = { role: "user", content: "hello" };
  const chat = (fields: object) => ({ model: MODEL, messages: [user], ...fields });

  it.each([
    ["nothing", "", /is empty/],
    ["no JSON", "hello, node", /not valid JSON/],
    ["JSON that breaks off", `{"model": "${MODEL}", "messages": [`, /not valid JSON/],
    [
      "NaN, which JSON does not have",
      `{"model": "${MODEL}", "temperature": NaN}`,
      /not valid JSON/,
    ],
  ])("%s is refused as invalid JSON", async (_, body, says) => {
    const reply = await world.send("POST", chatPath, body);
    expectError(reply, { status: 400, code: "invalid_json", says });
    expect(reply.headers.get("x-should-retry")).toBe("false");
  });

  it("what was wrong is said without repeating any of the text", async () => {
    const secret = "my secret prompt";
    const broken = await world.send("POST", chatPath, `{"messages": "${secret}" "`);
    expect(broken.text).not.toContain("secret");
    const misplaced = await world.send(
      "POST",
      chatPath,
      chat({ messages: [secret], stop: [secret, 1] }),
    );
    expect(misplaced.status).toBe(400);
    expect(misplaced.text).not.toContain("secret");
  });

  it.each([
    ["a list", "[]", /an array/],
    ["a text", `"hello"`, /a string/],
    ["a number", "7", /a number/],
    ["null", "null", /null/],
  ])("%s instead of an object is refused with what came", async (_, body, says) => {
    expectError(await world.send("POST", chatPath, body), {
      status: 400,
      code: "invalid_request",
      says,
    });
  });

  const wrongChats: [param: string, fields: object, says: RegExp][] = [
    ["model", { model: undefined }, /absent/],
    ["model", { model: 7 }, /a number/],
    ["model", { model: "" }, /an empty string/],
    ["model", { model: "m".repeat(513) }, /1 to 512 characters/],
    ["messages", { messages: undefined }, /must be an array of messages, not absent/],
    ["messages", { messages: "hello" }, /not a string/],
    ["messages", { messages: [] }, /at least one message/],
    ["messages", { messages: Array(9).fill(user) }, /9 messages; at most 8/],
    ["messages[1]", { messages: [user, "hello"] }, /must be an object, not a string/],
    ["messages[0].role", { messages: [{ content: "hello" }] }, /such as "user", not absent/],
    [
      "messages[0].content",
      { messages: [{ role: "user", content: 7 }] },
      /a string or an array of parts/,
    ],
    ["messages[0].content", { messages: [{ role: "user" }] }, /not absent/],
    [
      "messages[0].content[0]",
      { messages: [{ role: "user", content: [7] }] },
      /an object, not a number/,
    ],
    [
      "messages[0].content[0].type",
      { messages: [{ role: "user", content: [{}] }] },
      /such as "text"/,
    ],
    [
      "messages[0].content[0].text",
      { messages: [{ role: "user", content: [{ type: "text" }] }] },
      /a string/,
    ],
    ["max_tokens", { max_tokens: 1e12 }, /from 1 to 131072, not 1000000000000/],
    ["max_tokens", { max_tokens: -1 }, /from 1 to 131072, not -1/],
    ["max_tokens", { max_tokens: 0 }, /not 0/],
    ["max_tokens", { max_tokens: 1.5 }, /a whole number/],
    ["max_tokens", { max_tokens: "10" }, /not a string/],
    ["max_completion_tokens", { max_completion_tokens: 1e9 }, /from 1 to 131072/],
    ["temperature", { temperature: -0.1 }, /from 0 to 2, not -0.1/],
    ["temperature", { temperature: 3 }, /from 0 to 2, not 3/],
    ["temperature", { temperature: "hot" }, /not a string/],
    ["top_p", { top_p: 1.5 }, /from 0 to 1/],
    ["presence_penalty", { presence_penalty: -3 }, /from -2 to 2/],
    ["frequency_penalty", { frequency_penalty: 2.1 }, /from -2 to 2/],
    ["n", { n: 0 }, /from 1 to 128/],
    ["n", { n: 1000 }, /from 1 to 128/],
    ["seed", { seed: 1.5 }, /a whole number/],
    ["stop", { stop: 5 }, /a string or an array of strings/],
    ["stop", { stop: ["a", 5] }, /a string or an array of strings/],
    ["stream", { stream: "yes" }, /true or false/],
    [
      "stream_options",
      { stream_options: { include_usage: true } },
      /only together with `stream: true`/,
    ],
    ["stream_options", { stream: true, stream_options: 1 }, /an object/],
    ["tools", { tools: {} }, /an array/],
    ["response_format", { response_format: "json" }, /an object/],
    ["top_logprobs", { top_logprobs: -1 }, /from 0 to 1000/],
  ];

  it.each(wrongChats.map((each) => [each[0], JSON.stringify(each[1]).slice(0, 60), each] as const))(
    "chat: `%s` is named, and what is accepted: %s",
    async (_, __, [param, fields, says]) => {
      const reply = await world.send("POST", chatPath, chat(fields));
      expectError(reply, { status: 400, code: "invalid_request", param, says });
    },
  );

  it("a number beyond what a double holds is out of range, not infinite", async () => {
    const body = JSON.stringify(chat({ temperature: 1 })).replace(
      `"temperature":1`,
      `"temperature":1e999`,
    );
    const reply = await world.send("POST", chatPath, body);
    expectError(reply, { status: 400, code: "invalid_request", param: "temperature" });
  });

  const wrongOthers: [path: string, param: string, body: object][] = [
    ["/v1/completions", "prompt", {}],
    ["/v1/completions", "prompt", { prompt: [] }],
    ["/v1/completions", "prompt[0]", { prompt: [{}] }],
    ["/v1/completions", "best_of", { prompt: "a", best_of: 0 }],
    ["/v1/embeddings", "input", {}],
    ["/v1/embeddings", "input", { input: {} }],
    ["/v1/embeddings", "input[1]", { input: ["a", null] }],
    ["/v1/embeddings", "dimensions", { input: "a", dimensions: 0 }],
    ["/v1/embeddings", "encoding_format", { input: "a", encoding_format: "hex" }],
  ];

  it.each(wrongOthers)("%s: `%s` is named: %j", async (path, param, body) => {
    const reply = await world.send("POST", path, { model: MODEL, ...body });
    expectError(reply, { status: 400, code: "invalid_request", param });
  });

  it("nesting without end is refused, and the process lives on", async () => {
    const text = JSON.stringify(chat({}));
    const unknown = text.replace(/\}$/, `,"x": ${nested(20_000)}}`);
    expectError(await world.send("POST", chatPath, unknown), {
      status: 400,
      code: "invalid_request",
      says: /nested/,
    });
    // Never looked at here; a node reads it with the same patience.
    const metadata = text.replace(/\}$/, `,"metadata": ${nested(20_000)}}`);
    expect((await world.send("POST", chatPath, metadata)).status).toBe(200);
    const part = `{"type": "image_url", "image_url": ${nested(20_000)}}`;
    const reply = await world.send(
      "POST",
      chatPath,
      `{"model": "${MODEL}", "messages": [{"role": "user", "content": [${part}]}]}`,
    );
    expectError(reply, { status: 400, code: "invalid_request", says: /nested/ });
    expect((await world.chat("still there?")).status).toBe(200);
  });

  it("no refused body reaches a node", async () => {
    await world.idle();
    const before = world.counts();
    await world.send("POST", chatPath, "no JSON");
    await world.send("POST", chatPath, chat({ temperature: 3 }));
    await world.send("POST", chatPath, chat({ model: "unknown" }));
    expect(world.counts()).toEqual(before);
  });

  it("a body over the limit is refused with the limit (its length is stated)", async () => {
    const reply = await world.chat("x".repeat(70_000));
    expect({ status: reply.status, code: reply.json.error.code }).toEqual({
      status: 413,
      code: "body_too_large",
    });
    expect(reply.json.error.message).toContain("65536 bytes");
  });

  it("a body far over the limit is refused, and the client can read it (all of it is sent)", async () => {
    const reply = await world.chat("x".repeat(20_000_000));
    expect(reply.status).toBe(413);
  });

  it("a body over the limit is refused before it has ended (chunked)", async () => {
    const upload = uploading(world, { "transfer-encoding": "chunked" });
    upload.request.write("x".repeat(70_000));
    const { status, body } = await upload.reply;
    expect(status).toBe(413);
    expect(JSON.parse(body).error.code).toBe("body_too_large");
    upload.request.destroy();
  });

  it("a body of exactly the limit is read", async () => {
    const empty = JSON.stringify(chat({ messages: [{ role: "user", content: "" }] })).length;
    const reply = await world.chat("x".repeat(65_536 - empty));
    expect(reply.status).toBe(200);
    expect((await world.chat("x".repeat(65_537 - empty))).status).toBe(413);
  });
});

describe("bad input: route, headers and clocks", () => {
  it("an unknown route is 404, a wrong method 405 with the right one", async () => {
    const world = await start();
    for (const path of ["/", "/v2/chat", "/v1"]) {
      const reply = await world.send("GET", path);
      expect({ status: reply.status, code: reply.json.error.code }).toEqual({
        status: 404,
        code: "not_found",
      });
    }
    const reply = await world.send("GET", "/v1/chat/completions");
    expectError(reply, { status: 405, code: "method_not_allowed", says: /POST/ });
    expect(reply.headers.get("allow")).toBe("POST");
    // A route that only nodes know is theirs to answer.
    expect((await world.send("POST", "/v1/rerank", { model: MODEL })).json.error.message).toContain(
      "/v1/rerank",
    );
  });

  it("headers over the limit are refused (431)", async () => {
    const world = await start({ options: { requests: { headerBytesMax: 2048 } } });
    const answer = await exchange(
      world,
      `GET /health HTTP/1.1\r\nhost: h\r\nx-much: ${"x".repeat(4000)}\r\n\r\n`,
    );
    expect(answer).toMatch(/^HTTP\/1\.1 431 /);
    expect(JSON.parse(bodyOf(answer)).error.code).toBe("headers_too_large");
    const large = await world.chat("hello", {}, { "x-much": "x".repeat(4000) });
    expect(large.status).toBe(431);
    expect((await world.chat("hello", {}, { "x-some": "x".repeat(1000) })).status).toBe(200);
  });

  it("what is no HTTP is refused as such", async () => {
    const world = await start();
    const answer = await exchange(world, "\u0016\u0003\u0001 this is TLS\r\n\r\n");
    expect(answer).toMatch(/^HTTP\/1\.1 400 /);
    expect(JSON.parse(bodyOf(answer)).error.code).toBe("invalid_request");
  });

  it("a client that does not send on is told so (408: headers, and body)", async () => {
    const world = await start({
      options: { timeouts: { clientHeadersMs: 100, clientBodyMs: 100 } },
    });
    const [headers, body] = await Promise.all([
      exchange(world, "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-le"),
      exchange(
        world,
        `POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 100\r\n\r\n{"mod`,
      ),
    ]);
    for (const answer of [headers, body]) {
      expect(answer).toMatch(/^HTTP\/1\.1 408 /);
      expect(JSON.parse(bodyOf(answer)).error.code).toBe("body_timeout");
    }
    expect(world.counts()).toEqual([0]);
  });

  it.each(["soon", "-5", "0", "NaN"])("a deadline of %s is refused", async (value) => {
    const world = await start();
    const reply = await world.chat("hello", {}, { "x-request-timeout-ms": value });
    expectError(reply, {
      status: 400,
      code: "invalid_request",
      says: /x-request-timeout-ms.*milliseconds/,
    });
  });

  it.each([true, false])(
    "a client's own short deadline is not the node's fault (stream: %s)",
    async (stream) => {
      const world = await start({ options: { circuit: { callsMin: 2, slowRatio: 0.5 } } });
      world.nodes[0]?.setFault({ hang: true });
      for (const content of ["a", "b", "c", "d"]) {
        const reply = await world.chat(content, { stream }, { "x-request-timeout-ms": "30" });
        expectError(reply, { status: 504, code: "deadline_exceeded" });
      }
      await world.idle();
      const [node] = (await world.gateway.state()).nodes;
      expect(node?.totals).toMatchObject({ cancelled: 4, slow: 0 });
      expect(node?.snapshot.circuit).toBe("closed");
    },
  );

  it("a deadline that passes is 504, and the node is told to stop", async () => {
    const world = await start();
    world.nodes[0]?.setFault({ hang: true });
    const reply = await world.chat("hello", {}, { "x-request-timeout-ms": "50" });
    expectError(reply, { status: 504, code: "deadline_exceeded" });
    await until("the node sees the abort", () => world.nodes[0]?.stats().aborts === 1);
    await world.idle();
  });
});

describe("bad input: who asks, and for what", () => {
  let world: LiveWorld;
  const bearer = (key: string) => ({ authorization: `Bearer ${key}` });
  beforeAll(async () => {
    world = await startLiveWorld({
      models: [MODEL, "small"],
      options: {
        keys: [
          { key: "key-of-acme", tenant: "acme" },
          { key: "key-of-tiny", tenant: "tiny", models: ["small"] },
        ],
      },
    });
    return () => world.close();
  });

  it("no key is 401", async () => {
    expectError(await world.chat("hello"), {
      status: 401,
      code: "missing_key",
      says: /Authorization: Bearer/,
    });
    expectError(await world.send("GET", "/v1/models"), { status: 401, code: "missing_key" });
  });

  it.each(["Bearer wrong-key", "Bearer ", "Basic a2V5", "key-of-acm"])(
    "%s is 401",
    async (authorization) => {
      const reply = await world.chat("hello", {}, { authorization });
      expect(reply.status).toBe(401);
      expect(reply.text).not.toContain(authorization);
    },
  );

  it("a key in any of the usual places is known", async () => {
    const places = [
      bearer("key-of-acme"),
      { "api-key": "key-of-acme" },
      { "x-api-key": "key-of-acme" },
    ];
    for (const headers of places) expect((await world.chat("hello", {}, headers)).status).toBe(200);
  });

  it("a model that the key may not use is 403, also when no node serves it", async () => {
    for (const model of [MODEL, "no-such"]) {
      const reply = await world.chat("hello", { model }, bearer("key-of-tiny"));
      expectError(reply, { status: 403, code: "model_not_allowed", param: "model" });
      expect(reply.json.error.message).toContain(model);
    }
    expect((await world.chat("hello", { model: "small" }, bearer("key-of-tiny"))).status).toBe(200);
  });

  it("an unknown model is 404 with the list of what is served", async () => {
    const reply = await world.chat("hello", { model: "gpt-9" }, bearer("key-of-acme"));
    expectError(reply, { status: 404, code: "model_not_found", param: "model" });
    for (const name of ["gpt-9", MODEL, "small"])
      expect(reply.json.error.message).toContain(`"${name}"`);
  });

  it("each key sees its own models", async () => {
    const names = async (key: string) =>
      (await world.send("GET", "/v1/models", undefined, bearer(key))).json.data.map(({ id }) => id);
    expect(await names("key-of-acme")).toEqual([MODEL, "small"]);
    expect(await names("key-of-tiny")).toEqual(["small"]);
  });
});

// ---- clients that leave --------------------------------------------------------------------------------------

describe("bad input: a client that leaves", () => {
  it("before its body has come: nothing was begun", async () => {
    const world = await start();
    const socket = await connected(world);
    const half = `POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\n{"model"`;
    await new Promise((resolve) => socket.write(half, resolve));
    socket.destroy();
    expect((await world.chat("next")).status).toBe(200);
    expect(world.counts()).toEqual([1]);
    await world.idle();
  });

  it.each([true, false])(
    "before its answer began: the node is told to stop (stream: %s)",
    async (stream) => {
      const world = await start();
      world.nodes[0]?.setFault({ hang: true });
      const upload = uploading(world);
      upload.request.end(
        JSON.stringify({ model: MODEL, stream, messages: [{ role: "user", content: "hello" }] }),
      );
      await until("the node has it", () => world.nodes[0]?.stats().open === 1);
      upload.request.destroy();
      await upload.reply.catch(() => undefined);
      await until("the node sees the abort", () => world.nodes[0]?.stats().aborts === 1);
      await world.idle();
    },
  );

  it("in the middle of its answer: the node is told to stop", async () => {
    const world = await start();
    world.nodes[0]?.setFault({ stallAfterTokens: 3 });
    const upload = uploading(world);
    upload.request.end(streamedChat("hello"));
    const response = await upload.response;
    await new Promise((resolve) => response.once("data", resolve));
    upload.request.destroy();
    await until("the node sees the abort", () => world.nodes[0]?.stats().aborts === 1);
    await world.idle();
  });

  it("in the middle of an answer that others share: they get all of it", async () => {
    const world = await start();
    world.nodes[0]?.setFault({ stallAfterTokens: 3 });
    const first = uploading(world);
    first.request.end(streamedChat("shared"));
    const response = await first.response;
    await new Promise((resolve) => response.once("data", resolve));
    const second = uploading(world);
    second.request.end(streamedChat("shared"));
    expect((await second.response).headers["x-headrace-cache"]).toBe("joined");
    first.request.destroy();
    world.nodes[0]?.setFault({});
    const { body } = await second.reply;
    expect(body.trimEnd().endsWith("data: [DONE]")).toBe(true);
    expect(world.nodes[0]?.stats()).toMatchObject({ requests: 1, completed: 1, aborts: 0 });
    await world.idle();
  });

  it("after its answer, without a word: the next client is served", async () => {
    const world = await start();
    const socket = await connected(world);
    socket.write("GET /health HTTP/1.1\r\nhost: h\r\n\r\n");
    await new Promise((resolve) => socket.once("data", resolve));
    socket.resetAndDestroy();
    expect((await world.chat("next")).status).toBe(200);
    await world.idle();
  });

  it("two requests on one connection, sent at once, are answered in order", async () => {
    const world = await start();
    const body = streamedChat("first");
    const answer = await exchange(
      world,
      `POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: ${body.length}\r\n\r\n${body}` +
        "GET /health HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n",
    );
    expect(answer.match(/HTTP\/1\.1 200/g)).toHaveLength(2);
    expect(answer.indexOf("[DONE]")).toBeLessThan(answer.indexOf(`{"status":"ok"}`));
  });
});

// ---- nodes that misbehave ------------------------------------------------------------------------------------

/** What a client is told when the only node answers like this; absent = it is a good answer after all. */
const bodyFaultCodes: Partial<Record<BodyFault, { whole?: string; stream?: string }>> = {
  garbage: { whole: "upstream_bad_answer", stream: "upstream_bad_answer" },
  half_json: { whole: "upstream_bad_answer", stream: "stream_broken" },
  wrong_content_type: { whole: "upstream_bad_answer", stream: "upstream_bad_answer" },
  error_body: { whole: "upstream_bad_answer", stream: "upstream_failed" },
  redirect: { whole: "upstream_bad_answer", stream: "upstream_bad_answer" },
  huge_line: { stream: "upstream_bad_answer" },
};

const faultCases = BODY_FAULTS.flatMap((fault) => {
  const { whole, stream } = bodyFaultCodes[fault] ?? {};
  const cases: { fault: BodyFault; stream: boolean; code: string }[] = [];
  if (whole !== undefined) cases.push({ fault, stream: false, code: whole });
  if (stream !== undefined) cases.push({ fault, stream: true, code: stream });
  return cases;
});

describe("bad input: a node that answers badly", () => {
  it.each(faultCases)(
    "$fault (stream: $stream): the other node answers",
    async ({ fault, stream }) => {
      const world = await start({ nodes: 2, options: alternating });
      world.nodes[0]?.setFault({ body: fault });
      const replies = [await world.chat("one", { stream }), await world.chat("two", { stream })];
      for (const reply of replies) {
        expect(reply.status).toBe(200);
        expect(reply.node).toBe("node-2");
        if (stream) expect(reply.text.trimEnd().endsWith("data: [DONE]")).toBe(true);
        else expect(reply.json.system_fingerprint).toBe("node-2");
      }
      expectMoved(replies);
      expect(world.nodes[0]?.stats().faulted).toBeGreaterThanOrEqual(1);
      await world.idle();
    },
  );

  it.each(faultCases)(
    "$fault (stream: $stream): 502 $code where there is no other",
    async ({ fault, stream, code }) => {
      const world = await start();
      world.nodes[0]?.setFault({ body: fault });
      const reply = await world.chat("hello", { stream });
      expectError(reply, { status: 502, code });
      expect(reply.text).not.toMatch(/CUDA|half|It works/);
      expect(world.counts()).toEqual([1]);
      await world.idle();
      world.nodes[0]?.setFault({});
      const again = await world.chat("hello", { stream });
      expect({ status: again.status, cache: again.cache }).toEqual({ status: 200, cache: "miss" });
    },
  );

  it.each([true, false])(
    "an answer without end is ended by the request's deadline (stream: %s)",
    async (stream) => {
      const world = await start();
      world.nodes[0]?.setFault({ body: "endless_stream" });
      const reply = await world.chat("hello", { stream }, { "x-request-timeout-ms": "200" });
      if (stream) {
        expect(reply.status).toBe(200);
        expect(reply.text).toContain(`"code":"upstream_timeout_total"`);
        expect(reply.text).not.toContain("[DONE]");
      } else expect(reply.status).toBe(504);
      await world.idle();
    },
  );

  it("a stream that dies in the middle ends with an error, not as a good one, and is not tried again", async () => {
    const world = await start({ nodes: 2 });
    for (const node of world.nodes) node.setFault({ dieAfterTokens: 3 });
    const reply = await world.chat("hello", { stream: true });
    expect(reply.status).toBe(200);
    expect(reply.text).toContain(`"code":"stream_broken"`);
    expect(reply.text).not.toContain("[DONE]");
    expect(world.counts().reduce((a, b) => a + b)).toBe(1);
    await world.idle();
  });

  it("a whole answer that dies on the way is taken from the other node", async () => {
    const world = await start({ nodes: 2, options: alternating });
    world.nodes[0]?.setFault({ dieAfterTokens: 3 });
    const replies = [await world.chat("one"), await world.chat("two")];
    expect(replies.map(({ status }) => status)).toEqual([200, 200]);
    expectMoved(replies);
    await world.idle();
  });

  it("a node's own 4xx is the client's to read, and no other node is asked", async () => {
    const world = await start({ nodes: 2 });
    const reply = await world.chat("hello", { n: 2 });
    expect(reply.status).toBe(400);
    expect(reply.json.error.message).toBe("n must be 1: this node gives one answer a request");
    expect(world.counts().reduce((a, b) => a + b)).toBe(1);
  });

  it("a node whose name does not resolve: the other one answers; alone it is 502", async () => {
    const lost = { url: "http://no-such-host.invalid:9", name: "lost", models: [MODEL] };
    const both = await start({ nodes: 1, options: { ...alternating, nodes: [lost] } });
    const replies = [await both.chat("one"), await both.chat("two")];
    expect(replies.map(({ status, node }) => ({ status, node }))).toEqual([
      { status: 200, node: "node-1" },
      { status: 200, node: "node-1" },
    ]);
    expectMoved(replies);
    const alone = await start({ nodes: 0, options: { nodes: [lost] } });
    expectError(await alone.chat("hello"), { status: 502, code: "upstream_connect" });
  });

  it("two nodes on one host with different ports are two: a retry goes to the other port", async () => {
    const world = await start({ nodes: 2, options: alternating });
    expect(new Set(world.urls.map((url) => new URL(url).hostname)).size).toBe(1);
    world.nodes[0]?.setFault({ refuse: true });
    const replies = [await world.chat("one"), await world.chat("two")];
    expect(replies.map(({ status, node }) => ({ status, node }))).toEqual([
      { status: 200, node: "node-2" },
      { status: 200, node: "node-2" },
    ]);
    expectMoved(replies);
  });

  it("no healthy node is 503 with retry-after", async () => {
    const world = await start({ options: { circuit: { localFailures: 1 } } });
    world.nodes[0]?.setFault({ refuse: true });
    expectError(await world.chat("one"), { status: 502, code: "upstream_connect" });
    const reply = await world.chat("two");
    expectError(reply, { status: 503, code: "no_node" });
    expect(Number(reply.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
    expect(Number(reply.headers.get("retry-after-ms"))).toBeGreaterThan(0);
    const ready = await world.send("GET", "/ready");
    expect({ status: ready.status, ready: ready.json.ready }).toEqual({
      status: 503,
      ready: false,
    });
  });

  it("a node that is overloaded is passed over, not blamed", async () => {
    const world = await start({ nodes: 2, options: alternating });
    world.nodes[0]?.setFault({ failRate: 1, status: 429, delayMs: 0, retryAfterS: 1 });
    const replies = [await world.chat("one"), await world.chat("two")];
    expect(replies.map(({ status, node }) => ({ status, node }))).toEqual([
      { status: 200, node: "node-2" },
      { status: 200, node: "node-2" },
    ]);
    const { nodes } = await world.gateway.state();
    expect(nodes.map(({ snapshot }) => snapshot.circuit)).toEqual(["closed", "closed"]);
  });

  it("no line of the log holds anything of a prompt, an answer or a key", async () => {
    const keys = [{ key: "a-secret-key", tenant: "acme" }];
    const world = await start({
      nodes: 2,
      options: { ...alternating, keys, circuit: { gatewayFailures: 1 } },
    });
    const headers = { authorization: "Bearer a-secret-key" };
    const answers: string[] = [];
    for (const fault of BODY_FAULTS.filter((each) => each !== "endless_stream")) {
      world.nodes[0]?.setFault({ body: fault });
      const reply = await world.chat(`a secret prompt about ${fault}`, {}, headers);
      answers.push(reply.json.choices[0]?.message.content ?? "");
    }
    await world.chat("a secret prompt", {}, { authorization: "Bearer another-secret-key" });
    await world.idle();
    const log = JSON.stringify(world.log);
    expect(log).toContain("the circuit of a node changed");
    expect(log).not.toContain("secret");
    for (const answer of answers) {
      expect(answer.length).toBeGreaterThan(10);
      expect(log).not.toContain(answer.slice(0, 20));
    }
  });

  it("a port that is taken is refused, and whoever has it goes on", async () => {
    const world = await start();
    const { options } = world.gateway;
    const listen = { ...options.listen, port: world.server.port };
    const log = { debug() {}, info() {}, warn() {}, error() {}, setLevel() {} };
    const failed: unknown[] = [];
    await expect(
      Server.start({ ...options, listen }, log, (error) => void failed.push(error)),
    ).rejects.toThrow(/EADDRINUSE/);
    expect(failed).toEqual([]);
    expect((await world.chat("hello")).status).toBe(200);
  });
});

// ---- the cache -----------------------------------------------------------------------------------------------

describe("bad input: what must not be kept", () => {
  it("an identical request is answered from memory, without a node", async () => {
    const world = await start();
    const [first, second] = [await world.chat("hello"), await world.chat("hello")];
    expect([first.cache, second.cache]).toEqual(["miss", "hit-exact"]);
    expect(second.text).toBe(first.text);
    expect(second.headers.get("age")).toMatch(/^\d+$/);
    expect(world.counts()).toEqual([1]);
  });

  it("streaming and not streaming share entries, both ways, and say the same", async () => {
    const world = await start();
    const whole = await world.chat("one");
    const replayed = await world.chat("one", { stream: true });
    expect([whole.cache, replayed.cache]).toEqual(["miss", "hit-exact"]);
    expect(streamedText(replayed.text)).toBe(whole.json.choices[0]?.message.content);
    expect(replayed.text.trimEnd().endsWith("data: [DONE]")).toBe(true);
    const streamed = await world.chat("two", { stream: true });
    const gathered = await world.chat("two");
    expect([streamed.cache, gathered.cache]).toEqual(["miss", "hit-exact"]);
    expect(gathered.json.choices[0]?.message.content).toBe(streamedText(streamed.text));
    expect(gathered.json.choices[0]?.finish_reason).toBe("stop");
    expect(world.counts()).toEqual([2]);
  });

  it("how a body is written, and who is billed, makes no difference", async () => {
    const world = await start();
    const messages = [{ role: "user", content: "hello" }];
    await world.send("POST", "/v1/chat/completions", {
      model: MODEL,
      messages,
      temperature: 0.5,
      seed: 1,
    });
    const rewritten = `{"seed": 1.0, "user": "somebody",\n "temperature": 5e-1, "messages":
      [{"content": "h\\u0065llo", "role": "user"}], "metadata": {"a": "b"}, "model": "${MODEL}"}`;
    expect((await world.send("POST", "/v1/chat/completions", rewritten)).cache).toBe("hit-exact");
  });

  const base = {
    messages: [
      { role: "system", content: "Be brief." },
      { role: "user", content: "hello" },
    ],
  };
  const variants: [what: string, fields: object][] = [
    ["another model", { model: "small" }],
    [
      "another system prompt",
      { messages: [{ role: "system", content: "Be long." }, base.messages[1]] },
    ],
    ["no system prompt", { messages: [base.messages[1]] }],
    ["one message more", { messages: [...base.messages, { role: "user", content: "hello" }] }],
    [
      "the same text in another role",
      { messages: [{ role: "user", content: "Be brief." }, base.messages[1]] },
    ],
    ["a space more", { messages: [base.messages[0], { role: "user", content: "hello " }] }],
    ["temperature", { temperature: 0.7 }],
    ["top_p", { top_p: 0.9 }],
    ["seed", { seed: 7 }],
    ["max_tokens", { max_tokens: 100_0 }],
    ["stop", { stop: ["zzz"] }],
    ["presence_penalty", { presence_penalty: 1 }],
    ["response_format", { response_format: { type: "text" } }],
    ["tools", { tools: [{ type: "function", function: { name: "get_weather", parameters: {} } }] }],
    ["a parameter that nobody knows yet", { some_new_parameter: true }],
  ];

  it("an entry is served to the very same question only: not under another model, prompt or parameter", async () => {
    const world = await start({ models: [MODEL, "small"] });
    const ask = (fields: object) =>
      world.send("POST", "/v1/chat/completions", { model: MODEL, ...base, ...fields });
    expect((await ask({})).cache).toBe("miss");
    for (const [what, fields] of variants) {
      const reply = await ask(fields);
      expect({ what, status: reply.status, cache: reply.cache }).toEqual({
        what,
        status: 200,
        cache: "miss",
      });
    }
    expect((await ask({})).cache).toBe("hit-exact");
    expect(world.counts()).toEqual([1 + variants.length]);
  });

  it("an entry of one tenant is never served to another; keys of one tenant share", async () => {
    const keys = [
      { key: "acme-key-1", tenant: "acme" },
      { key: "acme-key-2", tenant: "acme" },
      { key: "other-key-1", tenant: "other" },
    ];
    const world = await start({ options: { keys } });
    const caches: (string | null)[] = [];
    for (const { key } of keys) {
      caches.push((await world.chat("hello", {}, { authorization: `Bearer ${key}` })).cache);
    }
    expect(caches).toEqual(["miss", "hit-exact", "miss"]);
  });

  /** Asks twice; the second answer's cache header. */
  const twice = async (
    world: LiveWorld,
    content: unknown,
    fields: object = {},
    headers: Record<string, string> = {},
  ) => {
    const first = await world.chat(content, { ...fields }, headers);
    const second = await world.chat(content, { ...fields });
    return [first.cache, second.cache];
  };

  it.each([true, false])(
    "a request with cache-control: no-store leaves nothing behind (stream: %s)",
    async (stream) => {
      const world = await start();
      const fields = { stream };
      expect(await twice(world, "hello", fields, { "cache-control": "no-store" })).toEqual([
        "miss",
        "miss",
      ]);
      expect(await twice(world, "hello", fields)).toEqual(["hit-exact", "hit-exact"]);
    },
  );

  it("a request with cache-control: no-cache is asked anew, and its answer kept", async () => {
    const world = await start();
    await world.chat("hello");
    const anew = await world.chat("hello", {}, { "cache-control": "no-cache" });
    expect(anew.cache).toBe("miss");
    expect((await world.chat("hello")).text).toBe(anew.text);
  });

  it.each([true, false])(
    "a truncated answer is never kept (max_tokens; stream: %s)",
    async (stream) => {
      expect(await twice(await start(), "hello", { stream, max_tokens: 3 })).toEqual([
        "miss",
        "miss",
      ]);
    },
  );

  it.each([true, false])("a broken answer is never kept (stream: %s)", async (stream) => {
    const world = await start();
    world.nodes[0]?.setFault({ dieAfterTokens: 3 });
    const broken = await world.chat("hello", { stream });
    expect(stream ? broken.text.includes("stream_broken") : broken.status === 502).toBe(true);
    world.nodes[0]?.setFault({});
    const after = await world.chat("hello", { stream });
    expect({ status: after.status, cache: after.cache }).toEqual({ status: 200, cache: "miss" });
    await world.idle();
  });

  it("an error of a node is never kept", async () => {
    const world = await start();
    world.nodes[0]?.setFault({ failRate: 1, status: 500, delayMs: 0 });
    expectError(await world.chat("hello"), { status: 502, code: "upstream_failed" });
    world.nodes[0]?.setFault({ failRate: 1, status: 422, delayMs: 0 });
    expect((await world.chat("hello")).status).toBe(422);
    world.nodes[0]?.setFault({});
    expect((await world.chat("hello")).cache).toBe("miss");
  });

  it.each([true, false])("a tool call is never kept (stream: %s)", async (stream) => {
    const tools = [
      { type: "function", function: { name: "get_weather", parameters: { type: "object" } } },
    ];
    const world = await start();
    expect(await twice(world, "call tool get_weather", { stream, tools })).toEqual([
      "miss",
      "miss",
    ]);
    expect((await world.chat("call tool get_weather", { stream, tools })).text).toContain(
      "get_weather",
    );
  });

  it("a question with an image is never looked up nor kept", async () => {
    const parts = [
      { type: "text", text: "What is this?" },
      { type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } },
    ];
    expect(await twice(await start(), parts)).toEqual(["bypass", "bypass"]);
  });

  it("with the cache off, every request goes to a node", async () => {
    const world = await start({ options: { cache: { enabled: false } } });
    expect(await twice(world, "hello")).toEqual(["bypass", "bypass"]);
    expect(world.counts()).toEqual([2]);
  });
});

// ---- limits --------------------------------------------------------------------------------------------------

describe("bad input: too much", () => {
  it("a key over its limit is 429 with retry-after; every answer says what is left", async () => {
    const world = await start({
      options: {
        keys: [
          {
            key: "key-of-tiny",
            tenant: "tiny",
            limits: { requestsPerMinute: 2, requestBurst: 2 },
          },
        ],
      },
    });
    const headers = { authorization: "Bearer key-of-tiny" };
    const replies: Reply[] = [];
    for (const content of ["one", "two", "three", "one"])
      replies.push(await world.chat(content, {}, headers));
    expect(replies.map(({ status }) => status)).toEqual([200, 200, 429, 200]);
    const [, , refused, hit] = replies;
    expect(hit?.cache).toBe("hit-exact"); // What the cache answers costs nothing.
    if (refused !== undefined) expectError(refused, { status: 429, code: "rate_limit_requests" });
    expect(Number(refused?.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
    const retryAfterMs = Number(refused?.headers.get("retry-after-ms"));
    expect(retryAfterMs).toBeGreaterThan(0);
    expect(retryAfterMs).toBeLessThanOrEqual(30_000);
    for (const reply of replies) {
      expect(reply.headers.get("x-ratelimit-limit-requests")).toMatch(/^\d+$/);
      expect(reply.headers.get("x-ratelimit-remaining-requests")).toMatch(/^\d+$/);
      expect(reply.headers.get("x-ratelimit-reset-requests")).toMatch(/^\d+(ms|s|m\d+s)$/);
    }
    expect(replies[0]?.headers.get("x-ratelimit-remaining-requests")).toBe("1");
    expect(world.counts()).toEqual([2]);
  });

  it("a key over its tokens is 429; a request that no wait can fit is 413", async () => {
    const limits = { tokensPerMinute: 300 };
    const world = await start({
      options: { keys: [{ key: "key-of-tiny", tenant: "tiny", limits }] },
    });
    const headers = { authorization: "Bearer key-of-tiny" };
    const fields = { max_tokens: 250, headrace_output_tokens: 250 };
    const first = await world.chat("one", fields, headers);
    expect(first.status).toBe(200);
    await world.idle(); // Its estimate is settled.
    const second = await world.chat("two", fields, headers);
    expectError(second, { status: 429, code: "rate_limit_tokens" });
    expect(Number(second.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
    for (const reply of [first, second]) {
      expect(reply.headers.get("x-ratelimit-limit-tokens")).toBe("300");
      expect(Number(reply.headers.get("x-ratelimit-remaining-tokens"))).toBeLessThan(250);
    }
    const huge = await world.chat("x".repeat(2000), {}, headers);
    expectError(huge, { status: 413, code: "request_too_large_for_limit" });
    expect(huge.headers.get("x-should-retry")).toBe("false");
  });

  it("a key with as many requests in flight as it may have is 429, and may go on when one has ended", async () => {
    const world = await start({
      options: { keys: [{ key: "key-of-tiny", tenant: "tiny", limits: { concurrent: 1 } }] },
    });
    const headers = { authorization: "Bearer key-of-tiny" };
    world.nodes[0]?.setFault({ stallAfterTokens: 0 });
    const first = world.chat("one", {}, headers);
    await until("the node has it", () => world.nodes[0]?.stats().open === 1);
    const second = await world.chat("two", {}, headers);
    expectError(second, { status: 429, code: "rate_limit_concurrency" });
    expect(Number(second.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
    world.nodes[0]?.setFault({});
    expect((await first).status).toBe(200);
    await world.idle();
    expect((await world.chat("two", {}, headers)).status).toBe(200);
  });
});

// ---- the operator's routes -----------------------------------------------------------------------------------

describe("bad input: administration", () => {
  const withAdmin = (more: LiveWorldOptions = {}) =>
    start({ ...more, options: { admin: { token: ADMIN_TOKEN }, ...more.options } });
  const nodeNames = async (world: LiveWorld) => {
    const reply = await world.send("GET", "/admin/nodes", undefined, admin);
    return (reply.json.nodes as { snapshot: { node: string } }[]).map(
      ({ snapshot }) => snapshot.node,
    );
  };

  it("is off without a token, and closed to whoever has another", async () => {
    const off = await start();
    const refused = await off.send("GET", "/admin/nodes", undefined, admin);
    expect({ status: refused.status, code: refused.json.error.code }).toEqual({
      status: 403,
      code: "admin_disabled",
    });
    const world = await withAdmin();
    for (const headers of [{}, { authorization: "Bearer wrong" }, { authorization: ADMIN_TOKEN }]) {
      const reply = await world.send("GET", "/admin/nodes", undefined, headers);
      expect({ status: reply.status, code: reply.json.error.code }).toEqual({
        status: 403,
        code: "admin_forbidden",
      });
      expect((await world.send("DELETE", "/admin/cache", undefined, headers)).status).toBe(403);
    }
  });

  it("lists nodes with their state", async () => {
    const world = await withAdmin({ nodes: 2 });
    expect(await nodeNames(world)).toEqual(["node-1", "node-2"]);
    const state = await world.send("GET", "/admin/state", undefined, admin);
    expect(Object.keys(state.json)).toEqual(
      expect.arrayContaining(["nodes", "router", "cache", "requests", "system"]),
    );
  });

  it("drains a node and takes it back", async () => {
    const world = await withAdmin({ nodes: 2, options: alternating });
    const turn = (action: string) =>
      world.send("POST", `/admin/nodes/node-1/${action}`, undefined, admin);
    expect((await turn("drain")).status).toBe(202);
    for (const content of ["a", "b", "c", "d"])
      expect((await world.chat(content)).node).toBe("node-2");
    expect((await turn("undrain")).status).toBe(202);
    const after = [await world.chat("e"), await world.chat("f")].map(({ node }) => node);
    expect(after.sort()).toEqual(["node-1", "node-2"]);
  });

  it("with every node drained, a request is 503", async () => {
    const world = await withAdmin();
    await world.send("POST", "/admin/nodes/node-1/drain", undefined, admin);
    const reply = await world.chat("hello");
    expectError(reply, { status: 503, code: "no_node" });
    expect(Number(reply.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
  });

  it("adds a node, which then takes its share, and removes one", async () => {
    const spare = await start();
    const world = await withAdmin({ options: alternating });
    const added = await world.send(
      "POST",
      "/admin/nodes",
      { url: spare.urls[0], name: "spare" },
      admin,
    );
    expect({ status: added.status, added: added.json.added }).toEqual({
      status: 201,
      added: "spare",
    });
    expect(await nodeNames(world)).toEqual(["node-1", "spare"]);
    await until(
      "it takes part",
      async () => (await world.chat(`${performance.now()}`)).node === "spare",
    );
    const removed = await world.send("DELETE", "/admin/nodes/node-1", undefined, admin);
    expect(removed.status).toBe(202);
    await until("it is gone", async () => !(await nodeNames(world)).includes("node-1"));
    for (const content of ["a", "b"]) expect((await world.chat(content)).node).toBe("spare");
  });

  it("refuses a node that is not acceptable, and says why", async () => {
    const world = await withAdmin();
    const add = (body: unknown) => world.send("POST", "/admin/nodes", body, admin);
    const cases: [body: unknown, says: RegExp][] = [
      ["no JSON", /JSON/],
      [{}, /url/],
      [{ url: "ftp://somewhere" }, /http:\/\/ or https:\/\//],
      [{ url: world.urls[0] }, /already/],
      [{ url: "http://10.0.0.9:1", weight: 3 }, /weight/],
    ];
    for (const [body, says] of cases) {
      const reply = await add(body);
      expect({ body, status: reply.status }).toEqual({ body, status: 400 });
      expect(reply.json.error.message).toMatch(says);
    }
    expect(await nodeNames(world)).toEqual(["node-1"]);
  });

  it("explains a request by its id", async () => {
    const world = await withAdmin({ nodes: 2, options: alternating });
    world.nodes[0]?.setFault({ refuse: true });
    await world.chat("one", {}, { "x-request-id": "my-request-1" });
    await world.chat("two", {}, { "x-request-id": "my-request-2" });
    const stories = [];
    for (const id of ["my-request-1", "my-request-2"]) {
      const reply = await world.send("GET", `/admin/explain/${id}`, undefined, admin);
      expect(reply.status).toBe(200);
      stories.push((reply.json.steps as string[]).join("\n"));
    }
    const retried = stories.find((story) => story.includes("attempt 2"));
    expect(retried).toMatch(/attempt 1 on node-1 .*failed_local/);
    expect(retried).toMatch(/attempt 2 on node-2 .*ok/);
    const unknown = await world.send("GET", "/admin/explain/no-such", undefined, admin);
    expect(unknown.status).toBe(404);
  });

  it("purges the cache of one tenant only", async () => {
    const keys = [
      { key: "key-of-acme", tenant: "acme" },
      { key: "key-of-other", tenant: "other" },
    ];
    const world = await withAdmin({ options: { keys } });
    const ask = (key: string) => world.chat("hello", {}, { authorization: `Bearer ${key}` });
    for (const { key } of keys) await ask(key);
    const purged = await world.send("DELETE", "/admin/cache?tenant=acme", undefined, admin);
    expect({ status: purged.status, removed: purged.json.removed }).toEqual({
      status: 200,
      removed: 1,
    });
    expect((await ask("key-of-acme")).cache).toBe("miss");
    expect((await ask("key-of-other")).cache).toBe("hit-exact");
    expect((await world.send("DELETE", "/admin/cache", undefined, admin)).json.removed).toBe(2);
    expect((await ask("key-of-other")).cache).toBe("miss");
  });

  it("names what there is when it is asked for something else", async () => {
    const world = await withAdmin();
    const calls: [method: string, path: string, says: RegExp][] = [
      ["POST", "/admin/nodes/no-such/drain", /nodes: node-1/],
      ["DELETE", "/admin/nodes/no-such", /nodes: node-1/],
      ["POST", "/admin/nodes/node-1/explode", /no such admin route/],
      ["GET", "/admin/", /no such admin route/],
      ["PUT", "/admin/nodes", /no such admin route/],
      ["GET", "/admin/explain/%E0%A4%A", /percent-encoded/],
    ];
    for (const [method, path, says] of calls) {
      const reply = await world.send(method, path, undefined, admin);
      expect({ path, status: reply.status }).toEqual({
        path,
        status: path.includes("%") ? 400 : 404,
      });
      expect(reply.json.error.message).toMatch(says);
    }
  });
});

// ---- sockets ---------------------------------------------------------------------------------------------------

function nested(depth: number): string {
  return "[".repeat(depth) + "]".repeat(depth);
}

function streamedChat(content: string): string {
  return JSON.stringify({ model: MODEL, stream: true, messages: [{ role: "user", content }] });
}

/** All content of a stream's events. */
function streamedText(sse: string): string {
  let text = "";
  for (const line of sse.split("\n")) {
    if (!line.startsWith("data: {")) continue;
    text += JSON.parse(line.slice(6)).choices[0]?.delta.content ?? "";
  }
  return text;
}

type Upload = {
  request: ClientRequest;
  /** Its head has come. */
  response: Promise<IncomingMessage>;
  /** All of it has come. */
  reply: Promise<{ status: number; body: string }>;
};

/** A chat request whose body is still to be written. */
function uploading(world: LiveWorld, headers: Record<string, string> = {}): Upload {
  const request = httpRequest(`${world.url}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    agent: false,
  });
  const response = new Promise<IncomingMessage>((resolve, reject) => {
    request.on("response", resolve);
    request.on("error", reject);
  });
  const reply = response.then(
    (message) =>
      new Promise<{ status: number; body: string }>((resolve, reject) => {
        let body = "";
        message.setEncoding("utf8");
        message.on("data", (text: string) => {
          body += text;
        });
        message.on("end", () => resolve({ status: message.statusCode ?? 0, body }));
        message.on("error", reject);
      }),
  );
  reply.catch(() => {}); // Whoever leaves does not read.
  return { request, response, reply };
}

function connected(world: LiveWorld): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect(world.server.port, "127.0.0.1", () => resolve(socket));
    socket.on("error", reject);
  });
}

/** Writes bytes and reads until the gateway closes the connection. */
async function exchange(world: LiveWorld, bytes: string): Promise<string> {
  const socket = await connected(world);
  let answer = "";
  socket.setEncoding("utf8");
  socket.on("data", (text: string) => {
    answer += text;
  });
  socket.write(bytes);
  await new Promise((resolve) => socket.once("close", resolve));
  return answer;
}

function bodyOf(answer: string): string {
  return answer.slice(answer.indexOf("\r\n\r\n") + 4);
}
