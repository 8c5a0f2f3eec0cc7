import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, it, vi } from "vitest";
import { replayCommand } from "../bin/replay.ts";
import { generateLoad } from "../sim/load-generators.ts";
import {
  ReplayError,
  type ReplayOptions,
  type ReplayRequest,
  replay,
} from "../transport/replay.ts";
import { formatReplayReport, type ReplayReport } from "../transport/replay-report.ts";
import { formatTraceRecord } from "../transport/trace-format.ts";

type Received = {
  body: {
    model: string;
    messages: { role: string; content: string }[];
    max_tokens: number;
    stream: boolean;
  };
  text: string;
  headers: IncomingMessage["headers"];
};

type Answer = (response: ServerResponse, received: Received, index: number) => void;

type Target = { url: string; received: Received[] };

const servers: Server[] = [];
const folder = mkdtempSync(join(tmpdir(), "headrace-replay-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
afterEach(async () => {
  for (const server of servers.splice(0)) {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }
});

/** A server that lists `models` and answers chat requests with `answer`. */
async function target(answer: Answer, models: string[] | number = ["m1"]): Promise<Target> {
  const received: Received[] = [];
  const server = createServer((request, response) => {
    if (request.url === "/v1/models") {
      if (typeof models === "number") return response.writeHead(models).end("{}");
      response.setHeader("content-type", "application/json");
      return response.end(JSON.stringify({ data: models.map((id) => ({ id })) }));
    }
    let text = "";
    request.setEncoding("utf8");
    request.on("data", (chunk) => {
      text += chunk;
    });
    request.on("end", () => {
      const one = { body: JSON.parse(text), text, headers: request.headers };
      received.push(one);
      answer(response, one, received.length - 1);
    });
    return undefined;
  });
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, received };
}

const event = (value: unknown) => `data: ${JSON.stringify(value)}\n\n`;
const content = (text: string) => event({ choices: [{ delta: { content: text } }] });
const usage = (tokens: number) => event({ choices: [], usage: { completion_tokens: tokens } });

/** A whole, good answer of as many tokens as were asked for. */
const good: Answer = (response, { body }) => {
  if (!body.stream) {
    response.setHeader("content-type", "application/json");
    const answer = {
      choices: [{ message: { content: "x" } }],
      usage: { completion_tokens: body.max_tokens },
    };
    return response.end(JSON.stringify(answer));
  }
  response.setHeader("content-type", "text/event-stream; charset=utf-8");
  response.write(event({ choices: [{ delta: { role: "assistant", content: "" } }] }));
  response.write(content("a"));
  response.end(`${content("b")}${usage(body.max_tokens)}data: [DONE]\n\n`);
  return undefined;
};

const at = (ms: number, rest: Partial<ReplayRequest> = {}): ReplayRequest => ({
  atUs: ms * 1000,
  inputTokens: 20,
  outputTokens: 5,
  ...rest,
});

/** Names requests by their place: they come on several connections, so in any order. */
const numbered = (requests: ReplayRequest[]) =>
  requests.map((request, index) => ({ ...request, session: String(index) }));

const inOrder = (received: Received[]) =>
  [...received].sort(
    (left, right) => Number(left.headers["x-session-id"]) - Number(right.headers["x-session-id"]),
  );

const run = (url: string, requests: ReplayRequest[], rest: Partial<ReplayOptions> = {}) =>
  replay({ requests, target: url, ...rest });

function addsUp(report: ReplayReport): void {
  const sum = (counts: object) => Object.values(counts).reduce((total, value) => total + value, 0);
  expect(report.requests).toBe(report.sent + report.refusedByClient);
  expect(report.sent).toBe(
    report.ok + sum(report.refused) + sum(report.failed) + report.unfinished,
  );
  expect(sum(report.cache)).toBe(report.ok);
  expect(JSON.parse(JSON.stringify(report))).toEqual(report);
}

describe("replay: what is sent", () => {
  it("asks for the recorded lengths, model, session and key", async () => {
    const { url, received } = await target(good, ["m1", "m2"]);
    const requests = [
      at(0, { model: "m2", session: "s7" }),
      at(1, { model: "unheard-of", outputTokens: 6 }),
      at(2, { outputTokens: 7 }),
    ];
    const report = await run(`${url}/v1/`, requests, { apiKey: "secret" });
    addsUp(report);
    expect(report.ok).toBe(3);
    received.sort((left, right) => left.body.max_tokens - right.body.max_tokens);
    expect(received.map(({ body }) => body.model)).toEqual(["m2", "m1", "m1"]);
    expect(report.modelsReplaced).toBe(1);
    expect(received[0]?.headers).toMatchObject({
      authorization: "Bearer secret",
      "x-session-id": "s7",
      "content-type": "application/json",
    });
    expect(received[1]?.headers["x-session-id"]).toBeUndefined();
    expect(received[0]?.body).toMatchObject({
      max_tokens: 5,
      headrace_output_tokens: 5,
      stream: true,
      stream_options: { include_usage: true },
    });
    for (const { body } of received) expect(body.messages[0]?.content).toHaveLength(80);
    expect(report.target).toBe(`${url}/`);
  });

  it("a stated model is asked for, whatever was recorded", async () => {
    const { url, received } = await target(good, 404);
    await run(url, [at(0, { model: "other" })], { model: "mine" });
    await run(url, [at(0, { model: "other" })]);
    expect(received.map(({ body }) => body.model)).toEqual(["mine", "other"]);
  });

  it("equal questions are equal byte for byte, even when their recorded lengths differ", async () => {
    const { url, received } = await target(good);
    await run(
      url,
      numbered([
        at(0, { question: "q1" }),
        at(1, { question: "q1", inputTokens: 31, outputTokens: 9, prefix: [1], blockTokens: 16 }),
        at(2, { question: "q2" }),
        at(3, { question: "q1", outputTokens: 0 }),
      ]),
    );
    const [first, second, third, fourth] = inOrder(received).map(({ text }) => text);
    expect(second).toBe(first);
    expect(fourth).toBe(first);
    expect(third).not.toBe(first);
  });

  it("different questions differ (same blocks, or shorter than words can tell)", async () => {
    const { url, received } = await target(good);
    const requests: ReplayRequest[] = [];
    for (let index = 0; index < 200; index++) {
      requests.push(at(0, { question: `short ${index}`, inputTokens: 1 }));
      requests.push(
        at(0, { question: `long ${index}`, inputTokens: 32, prefix: [1, 2], blockTokens: 16 }),
      );
    }
    await run(url, requests);
    expect(received).toHaveLength(400);
    expect(new Set(received.map(({ text }) => text)).size).toBe(400);
  });

  it("equal leading blocks are an equal leading text, and only they", async () => {
    const { url, received } = await target(good);
    const blocks = (prefix: number[], inputTokens = 64) =>
      at(0, { prefix, blockTokens: 16, inputTokens });
    await run(
      url,
      numbered([blocks([1, 2, 3]), blocks([1, 2, 4]), blocks([5, 2, 3]), blocks([1, 2, 3], 40)]),
    );
    const texts = inOrder(received).map(({ body }) => body.messages[0]?.content ?? "");
    const chars = (index: number, blocks: number) => texts[index]?.slice(0, blocks * 64);
    expect(chars(1, 2)).toBe(chars(0, 2));
    expect(chars(1, 3)).not.toBe(chars(0, 3));
    expect(chars(2, 1)).not.toBe(chars(0, 1));
    expect(texts[3]).toBe(texts[0]?.slice(0, 160)); // The last block is a partial one.
    expect(texts[1]?.slice(192)).not.toBe(texts[0]?.slice(192)); // Beyond the blocks each is its own.
  });

  it("a run repeats the prompts of another, with another salt none of them", async () => {
    const { url, received } = await target(good);
    const requests = [at(0), at(1, { question: "q" }), at(2, { prefix: [1, 2], blockTokens: 16 })];
    await run(url, requests);
    await run(url, requests);
    await run(url, requests, { salt: "again" });
    const texts = received.map(({ text }) => text);
    expect(new Set(texts.slice(0, 3)).size).toBe(3);
    expect(texts.slice(3, 6).sort()).toEqual(texts.slice(0, 3).sort());
    for (const text of texts.slice(6)) expect(texts.slice(0, 3)).not.toContain(text);
  });

  it("a length that was not recorded is the mean so far, within max_tokens, and counted", async () => {
    const { url, received } = await target(good);
    const report = await run(
      url,
      numbered([
        at(0, { outputTokens: 0 }),
        at(1, { outputTokens: 10 }),
        at(2, { outputTokens: 31 }),
        at(3, { outputTokens: 0 }),
        at(4, { outputTokens: 0, maxTokens: 7 }),
      ]),
    );
    expect(inOrder(received).map(({ body }) => body.max_tokens)).toEqual([1, 10, 31, 21, 7]);
    expect(report.lengthsGuessed).toBe(3);
  });
});

describe("replay: open loop", () => {
  it("sends on while nothing is answered (the server answers only when all have come)", async () => {
    const waiting: (() => void)[] = [];
    const { url } = await target((response, received, index) => {
      waiting.push(() => good(response, received, index));
      if (waiting.length === 50) for (const answer of waiting) answer();
    });
    const requests = Array.from({ length: 50 }, (_, index) => at(index));
    const report = await run(url, requests, { speed: 10 });
    addsUp(report);
    expect(report).toMatchObject({ requests: 50, sent: 50, ok: 50, speed: 10, stopped: false });
    expect(report.latenessMs?.count).toBe(50);
  });

  it("beyond inflightMax nothing is sent, and that is counted", async () => {
    let isAllRead = false;
    const waiting: (() => void)[] = [];
    const answerAll = () => {
      if (isAllRead && waiting.length === 3) for (const answer of waiting) answer();
    };
    const { url, received } = await target((response, one, index) => {
      waiting.push(() => good(response, one, index));
      answerAll();
    });
    function* source() {
      for (let index = 0; index < 8; index++) yield at(0);
      isAllRead = true; // Nothing was answered until here, so the first three are still open.
      answerAll();
    }
    const report = await replay({ requests: source(), target: url, inflightMax: 3 });
    addsUp(report);
    expect(report).toMatchObject({ requests: 8, sent: 3, refusedByClient: 5, ok: 3 });
    expect(received).toHaveLength(3);
  });

  it("limit ends the load, and the source is closed", async () => {
    const { url } = await target(good);
    let closed = false;
    async function* source() {
      try {
        for (let index = 0; ; index++) yield at(index);
      } finally {
        closed = true;
      }
    }
    const report = await replay({ requests: source(), target: url, limit: 4 });
    expect(report).toMatchObject({ requests: 4, ok: 4 });
    expect(closed).toBe(true);
  });

  it("takes the simulator's loads as they are", async () => {
    const { url } = await target(good);
    const requests = generateLoad({
      seed: 3,
      arrivals: { kind: "poisson", rate: 1000 },
      content: {
        kind: "plain",
        input: { mean: 30, cv: 1, max: 100 },
        output: { mean: 4, cv: 0, max: 9 },
      },
      requests: 20,
    });
    expect(await replay({ requests, target: url })).toMatchObject({ ok: 20, outputTokens: 80 });
  });

  it("the signal stops the load, breaks off what is open and reports the rest", async () => {
    const stop = new AbortController();
    const { url, received } = await target((response, one, index) => {
      if (index < 2) good(response, one, index);
      else if (index === 2) {
        response.setHeader("content-type", "text/event-stream");
        response.write(content("a")); // And no more: broken off within the answer, the others before it.
      }
    });
    const requests = [...Array.from({ length: 5 }, (_, index) => at(index)), at(1e9)];
    const report = await run(url, requests, {
      signal: stop.signal,
      onProgress: ({ ok }) => {
        if (ok === 2 && received.length === 5) stop.abort();
      },
    });
    addsUp(report);
    expect(report).toMatchObject({ requests: 5, ok: 2, unfinished: 3, stopped: true, failed: {} });
  });

  it("a load that fails in the middle ends the replay with that error", async () => {
    const { url } = await target(good);
    async function* source() {
      yield at(0);
      throw new Error("line 2 is bad");
    }
    await expect(replay({ requests: source(), target: url })).rejects.toThrow("line 2 is bad");
  });

  it("progress is told at the end", async () => {
    const { url } = await target(good);
    const onProgress = vi.fn();
    await run(url, [at(0), at(1)], { onProgress });
    expect(onProgress).toHaveBeenLastCalledWith(
      expect.objectContaining({ sent: 2, ok: 2, refused: 0, failed: 0, inflight: 0 }),
    );
  });
});

describe("replay: what is measured", () => {
  it("every ending is counted by its reason", async () => {
    const status =
      (code: number): Answer =>
      (response) =>
        response.writeHead(code).end("{}");
    const sse =
      (text: string, cut = false): Answer =>
      (response) => {
        response.setHeader("content-type", "text/event-stream");
        if (!cut) return response.end(text);
        response.write(text);
        setImmediate(() => response.destroy());
        return undefined;
      };
    const answers: [Answer, string][] = [
      [good, "ok"],
      [status(429), "429"],
      [status(503), "503"],
      [status(503), "503"],
      [status(504), "504"],
      [status(500), "http_500"],
      [
        (response) => response.writeHead(400).end('{"error":{"code":"prompt_too_long"}}'),
        "http_400 prompt_too_long",
      ],
      [sse(content("a")), "stream_cut"], // Ended in order, but without [DONE].
      [sse(content("a"), true), "stream_cut"],
      [sse(`${content("a")}${event({ error: { code: "x" } })}data: [DONE]\n\n`), "stream_error"],
      [sse("data: {oops\n\n"), "bad_answer"],
      [(response) => response.destroy(), "connection_reset"],
    ];
    const { url } = await target((response, one) => {
      const index = Number(one.headers["x-session-id"]);
      answers[index]?.[0](response, one, index);
    });
    const requests = answers.map((_, index) => at(index, { session: String(index) }));
    const report = await run(url, requests);
    addsUp(report);
    const expected: Record<string, number> = {};
    for (const [, ending] of answers) expected[ending] = (expected[ending] ?? 0) + 1;
    expect({ ok: report.ok, ...report.refused, ...report.failed }).toEqual(expected);
    expect(report.e2eMs?.count).toBe(1);
  });

  it("a request on a connection that the server just closed is sent again, once", async () => {
    const seen = new Map<string, number>();
    const { url } = await target((response, one, index) => {
      const tries = (seen.get(one.text) ?? 0) + 1;
      seen.set(one.text, tries);
      // The second request comes on the kept connection of the first.
      if (one.headers["x-session-id"] === "b" && tries === 1) response.socket?.resetAndDestroy();
      else good(response, one, index);
    });
    let release = () => {};
    const answered = new Promise<void>((resolve) => {
      release = resolve;
    });
    async function* source() {
      yield at(0, { session: "a" });
      await answered; // So that its connection is idle when the next is sent.
      yield at(1, { session: "b" });
    }
    const report = await replay({
      requests: source(),
      target: url,
      onProgress: ({ ok }) => {
        if (ok === 1) release();
      },
    });
    addsUp(report);
    expect(report).toMatchObject({ sent: 2, ok: 2, resent: 1, failed: {} });
  });

  it("TTFT is the first content's, TPOT divides the rest by the tokens after it", async () => {
    const { url } = await target((response, { body }) => {
      response.setHeader("content-type", "text/event-stream");
      if (body.max_tokens === 1) {
        response.end(
          `${event({ choices: [{ delta: { tool_calls: [{ index: 0 }] } }] })}data: [DONE]\n\n`,
        );
        return;
      }
      // Cut at an awkward place; \r\n is allowed.
      const text = `${content("a")}${content("b")}${content("c")}data: [DONE]\r\n\r\n`;
      response.write(text.slice(0, 30));
      setTimeout(() => response.end(text.slice(30)), 20);
    });
    const report = await run(url, [at(0, { outputTokens: 3 })]);
    const { ttftMs, tpotMs, e2eMs } = report;
    expect(report.outputTokens).toBe(3); // No usage: content events are counted.
    expect(ttftMs?.count).toBe(1);
    // One sample: mean is exact, and the law between the three must hold.
    expect(tpotMs?.mean).toBeCloseTo(((e2eMs?.mean ?? 0) - (ttftMs?.mean ?? 0)) / 2, 2);
    expect(ttftMs?.mean).toBeLessThanOrEqual(e2eMs?.mean ?? 0);
    const single = await run(url, [at(0, { outputTokens: 1 })]);
    expect(single.ttftMs?.count).toBe(1);
    expect(single.tpotMs).toBeNull(); // One token has no time between tokens.
  });

  it("whole answers have neither TTFT nor TPOT (not streamed)", async () => {
    const { url, received } = await target(good);
    const report = await run(url, [at(0), at(1)], { stream: false });
    expect(received[0]?.body.stream).toBe(false);
    expect(received[0]?.body).not.toHaveProperty("stream_options");
    expect(report).toMatchObject({ ok: 2, outputTokens: 10, ttftMs: null, tpotMs: null });
    expect(report.e2eMs?.count).toBe(2);
    const bad = await target((response) => response.end("not an answer"));
    expect((await run(bad.url, [at(0)], { stream: false })).failed).toEqual({ bad_answer: 1 });
  });

  it("headers tell hits, nodes and attempts; nodes count only passes of their own", async () => {
    const answers: Record<string, string>[] = [
      { "x-headrace-cache": "miss", "x-headrace-node": "gpu-1", "x-headrace-attempts": "1" },
      { "x-headrace-cache": "miss", "x-headrace-node": "gpu-1", "x-headrace-attempts": "2" },
      { "x-headrace-cache": "bypass", "x-headrace-node": "gpu-1", "x-headrace-attempts": "1" },
      { "x-headrace-cache": "miss", "x-headrace-node": "gpu-2", "x-headrace-attempts": "3" },
      { "x-headrace-cache": "joined", "x-headrace-node": "gpu-2", "x-headrace-attempts": "1" },
      { "x-headrace-cache": "hit-exact", "x-headrace-attempts": "0" },
      { "x-headrace-cache": "hit-exact", "x-headrace-attempts": "0" },
      { "x-headrace-cache": "hit-semantic; similarity=0.9421", "x-headrace-attempts": "0" },
      {},
    ];
    const { url } = await target((response, one, index) => {
      const headers = answers[Number(one.headers["x-session-id"])] ?? {};
      for (const [name, value] of Object.entries(headers)) response.setHeader(name, value);
      good(response, one, index);
    });
    const requests = answers.map((_, index) => at(index, { session: String(index) }));
    const report = await run(url, requests);
    addsUp(report);
    expect(report.cache).toEqual({
      hit_exact: 2,
      hit_semantic: 1,
      joined: 1,
      miss: 3,
      bypass: 1,
      unstated: 1,
    });
    expect(report.hitRate).toBe(4 / 8);
    expect(report.nodes).toEqual([
      { node: "gpu-1", answers: 3, share: 0.75 },
      { node: "gpu-2", answers: 1, share: 0.25 },
    ]);
    expect(report.nodeSpread).toBeCloseTo(2 / 3, 12);
    expect(report.retried).toBe(2);
  });
});

describe("replay: what is refused", () => {
  const rejected = async (options: Partial<ReplayOptions>): Promise<[string, boolean]> => {
    const error = await replay({
      requests: [at(0)],
      target: "http://127.0.0.1:9",
      ...options,
    }).then(
      () => undefined,
      (reason: unknown) => reason,
    );
    if (!(error instanceof ReplayError)) throw new Error(`no ReplayError: ${String(error)}`);
    return [error.message, error.isInput];
  };

  it("wrong options and targets, each with what it takes", async () => {
    expect(await rejected({ target: "gpu" })).toEqual([
      'the target "gpu" is no URL; it must be like http://localhost:8080',
      true,
    ]);
    expect((await rejected({ target: "ftp://x/" }))[0]).toContain("the target's scheme is ftp:");
    expect((await rejected({ speed: 0 }))[0]).toBe("speed is 0; it must be above 0");
    expect((await rejected({ limit: 1.5 }))[0]).toContain("limit is 1.5");
    expect((await rejected({ inflightMax: 0 }))[0]).toContain("inflightMax is 0");
  });

  it("a target that is not there, or wants another key, before any load is sent", async () => {
    const gone = await target(good);
    const [server] = servers.splice(0);
    await new Promise((resolve) => server?.close(resolve));
    expect(await rejected({ target: gone.url })).toEqual([
      `${gone.url}/ does not answer (connect_refused)`,
      false,
    ]);
    const closed = await target(good, 401);
    expect(await rejected({ target: closed.url })).toEqual([
      `${closed.url}/ wants an API key (status 401)`,
      false,
    ]);
    expect((await rejected({ target: closed.url, apiKey: "k" }))[0]).toContain(
      "does not take this API key",
    );
    expect(closed.received).toHaveLength(0);
    const unnamed = await target(good, []);
    expect(await rejected({ target: unnamed.url })).toEqual([
      `which model to ask for is not known: the load names none that ${unnamed.url}/ serves; state one`,
      true,
    ]);
  });
});

describe("replay report", () => {
  const quantiles = { count: 2, mean: 12.345, p50: 1.5, p90: 99.95, p99: 1234.5, max: 2000 };
  const report: ReplayReport = {
    target: "http://gw/",
    speed: 2,
    stream: true,
    stopped: false,
    elapsedMs: 61_234,
    requests: 1200,
    sent: 1199,
    ok: 1180,
    refused: { "429": 10, "503": 0, "504": 2 },
    refusedByClient: 1,
    failed: { stream_cut: 7 },
    unfinished: 0,
    resent: 0,
    cache: { hit_exact: 100, hit_semantic: 20, joined: 5, miss: 1055, bypass: 0, unstated: 0 },
    hitRate: 125 / 1180,
    outputTokens: 12_000,
    outputTokensPerSecond: 195.97,
    ttftMs: quantiles,
    tpotMs: quantiles,
    e2eMs: quantiles,
    latenessMs: { ...quantiles, p99: 2 },
    nodes: [
      { node: "gpu-1", answers: 600, share: 0.6 },
      { node: "gpu-2", answers: 400, share: 0.4 },
    ],
    nodeSpread: 1 / 3,
    retried: 3,
    lengthsGuessed: 0,
    modelsReplaced: 0,
  };

  it("prints as an aligned table", () => {
    expect(formatReplayReport(report)).toBe(`1,200 requests in 61.2 s to http://gw/ (speed 2)

sent          1,199
ok            1,180  98.4 %
refused       12  (429: 10, 504: 2)
failed        7  (stream_cut: 7)
not sent      1  (as many were open as this client allows)
retried       3  (ok after more than one attempt)
cache         hits exact 100, semantic 20, joined 5; miss 1,055, bypass 0
hit rate      10.6 %
output        12,000 tokens, 196/s

ms                  mean       p50       p90       p99       max
TTFT                12.3      1.50     100.0     1,235     2,000
TPOT                12.3      1.50     100.0     1,235     2,000
E2E                 12.3      1.50     100.0     1,235     2,000
sent late by        12.3      1.50     100.0      2.00     2,000

node             answers     share
gpu-1                600    60.0 %
gpu-2                400    40.0 %
spread                      33.3 %
`);
  });

  it("says when the client did not keep up, and what was stopped or is not known", () => {
    const text = formatReplayReport({
      ...report,
      stopped: true,
      unfinished: 4,
      hitRate: null,
      nodes: [],
      nodeSpread: null,
      tpotMs: null,
      lengthsGuessed: 9,
      modelsReplaced: 8,
      latenessMs: quantiles,
    });
    expect(text).toContain("stopped before the end");
    expect(text).toContain("unfinished    4");
    expect(text).toContain("hit rate      not stated by the target");
    expect(text).toContain(
      "This client did not keep up: 1 in 100 requests left 1,235 ms late or more.",
    );
    expect(text).not.toContain("TPOT");
    expect(text).not.toContain("spread");
    expect(text).toContain("guessed       the answer length of 9 requests, not recorded");
  });
});

describe("headrace replay", () => {
  const trace = join(folder, "trace.jsonl");
  const line = (atMs: number) =>
    formatTraceRecord({
      v: 1,
      atMs,
      tenant: "t",
      model: "m1",
      route: "chat",
      stream: true,
      inputTokens: 20,
      outputTokens: 3,
      prefix: [],
      outcome: "ok",
      cache: "miss",
      attempts: 1,
      queuedMs: 0,
      e2eMs: 5,
    });
  writeFileSync(trace, `${[0, 5, 10, 60_000].map(line).join("\n")}\n`);

  async function headrace(...args: string[]) {
    const out: string[] = [];
    const errors: string[] = [];
    const write = vi.spyOn(process.stdout, "write").mockImplementation((text) => {
      out.push(String(text));
      return true;
    });
    const log = vi.spyOn(console, "error").mockImplementation((text) => {
      errors.push(String(text));
    });
    const before = process.exitCode;
    try {
      const command = replayCommand()
        .exitOverride()
        .configureOutput({ writeErr: (text) => errors.push(text) });
      await command.parseAsync(args, { from: "user" });
      return { code: Number(process.exitCode ?? 0), out: out.join(""), errors: errors.join("\n") };
    } catch (error) {
      const code =
        error instanceof Error && "exitCode" in error ? Number(error.exitCode) : Number.NaN;
      return { code, out: out.join(""), errors: errors.join("\n") };
    } finally {
      process.exitCode = before;
      write.mockRestore();
      log.mockRestore();
    }
  }

  it("sends a trace, prints the table and writes the report", async () => {
    const { url, received } = await target(good);
    const json = join(folder, "report.json");
    const result = await headrace(
      ...[
        "--trace",
        trace,
        "--target",
        url,
        "--to",
        "30s",
        "--speed",
        "2",
        "--limit",
        "2",
        "--json",
        json,
      ],
    );
    expect(result.code).toBe(0);
    expect(received).toHaveLength(2);
    expect(result.errors).toContain("(headrace): 2 requests over 0.0 s");
    expect(result.out).toContain(`2 requests in `);
    expect(JSON.parse(readFileSync(json, "utf8"))).toMatchObject({
      ok: 2,
      speed: 2,
      target: `${url}/`,
    });
  });

  it("bad input ends with 2 and says what was wrong, before anything is sent", async () => {
    const { url, received } = await target(good);
    const bad = join(folder, "bad.jsonl");
    writeFileSync(bad, `${line(0)}\n{"v": 1}\n${line(5)}\n`);
    const to = ["--target", url];
    for (const [args, says] of [
      [["--trace", bad, ...to], /bad\.jsonl, line 2: atMs is missing/],
      [["--trace", join(folder, "absent"), ...to], /no such file/],
      [
        ["--trace", trace, "--format", "vidur", ...to],
        /unknown trace format "vidur"; known: azure2023/,
      ],
      [["--trace", trace, "--speed", "fast", ...to], /--speed is "fast"; it must be a number/],
      [["--trace", trace, "--speed", "0", ...to], /speed is 0; it must be above 0/],
      [["--trace", trace, "--from", "soon", ...to], /--from is "soon"; it must be a time like/],
      [["--trace", trace, "--limit", "0", ...to], /limit is 0; it must be a whole number/],
      [["--trace", trace, "--target", "nowhere"], /the target "nowhere" is no URL/],
    ] as const) {
      const result = await headrace(...args);
      expect(result.errors).toMatch(says);
      expect(result.code).toBe(2);
      expect(result.out).toBe("");
    }
    expect(received).toHaveLength(0);
  });

  it("ends with 1 when no request succeeds or the target is not there", async () => {
    const { url } = await target((response) => response.writeHead(500).end());
    const failing = await headrace("--trace", trace, "--target", url, "--limit", "2");
    expect(failing.code).toBe(1);
    expect(failing.out).toContain("http_500: 2");
    for (const server of servers.splice(0)) await new Promise((resolve) => server.close(resolve));
    const absent = await headrace("--trace", trace, "--target", url);
    expect(absent.code).toBe(1);
    expect(absent.errors).toContain("does not answer (connect_refused)");
  });
});
