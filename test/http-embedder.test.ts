/** The http embedder against real servers: what endpoints send, and what they do wrong. */
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { afterEach, describe, expect, it } from "vitest";
import type { Embedded } from "../actors/edges.ts";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import { Embedder } from "../transport/embedder.ts";
import { EmbedderError } from "../transport/embedder-backend.ts";
import { embeddingsUrl, HttpBackend } from "../transport/http-embedder.ts";

const cleanups: (() => Promise<void> | void)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

type Body = { model: string; input: string[]; encoding_format: string };
type Handler = (body: Body, response: ServerResponse, request: IncomingMessage) => void;
type Endpoint = { url: string; handle: Handler; bodies: Body[]; sockets: number };

const lexical = new LexicalEmbedder(64);
const vectorsOf = (texts: readonly string[]): number[][] =>
  texts.map((text) => [...lexical.embed(text)]);

function send(response: ServerResponse, embeddings: unknown[], model = "m"): void {
  const data = embeddings.map((embedding, index) => ({ object: "embedding", index, embedding }));
  response.setHeader("content-type", "application/json");
  response.end(JSON.stringify({ object: "list", data, model }));
}

const good: Handler = ({ input }, response) => send(response, vectorsOf(input));

async function startEndpoint(handle: Handler = good): Promise<Endpoint> {
  const endpoint: Endpoint = { url: "", handle, bodies: [], sockets: 0 };
  const server = createServer((request, response) => {
    let text = "";
    request.setEncoding("utf8").on("data", (chunk: string) => {
      text += chunk;
    });
    request.on("end", () => {
      const body: Body = JSON.parse(text);
      endpoint.bodies.push(body);
      endpoint.handle(body, response, request);
    });
  });
  server.on("connection", () => endpoint.sockets++);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  endpoint.url = `http://127.0.0.1:${typeof address === "object" ? address?.port : 0}`;
  cleanups.push(async () => {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  });
  return endpoint;
}

function backendOf({ url }: Endpoint, key?: string): HttpBackend {
  const backend = new HttpBackend({ url, model: "m", ...(key === undefined ? {} : { key }) });
  cleanups.push(() => backend.close());
  return backend;
}

const never = new AbortController().signal;

describe("http embedder: answers", () => {
  it("numbers or base64, in any order: the same vectors, for the texts that they are of", async () => {
    const texts = ["one question", "another question", "今天天气怎么样"];
    const asBase64 = (vector: number[]): string =>
      Buffer.from(Float32Array.from(vector).buffer).toString("base64");
    const handlers: Handler[] = [
      good,
      ({ input }, response) => send(response, vectorsOf(input).map(asBase64)),
      ({ input }, response) => {
        const data = vectorsOf(input).map((embedding, index) => ({ index, embedding }));
        response.end(JSON.stringify({ data: data.reverse(), model: "m" }));
      },
      // Not of length 1: scaled.
      ({ input }, response) =>
        send(
          response,
          vectorsOf(input).map((v) => v.map((x) => x * 17)),
        ),
    ];
    for (const handle of handlers) {
      const backend = backendOf(await startEndpoint(handle));
      expect(await backend.open()).toEqual({ id: "http:m", version: "m" });
      const vectors = await backend.embed(texts, never);
      for (const [index, text] of texts.entries()) {
        const expected = lexical.embed(text);
        const vector = vectors[index] as Float32Array;
        expect(vector).toHaveLength(64);
        for (const [at, value] of expected.entries()) expect(vector[at]).toBeCloseTo(value, 5);
      }
    }
  });

  it("asks for all texts at once, with model and key, over one kept connection", async () => {
    const keys: (string | undefined)[] = [];
    const endpoint = await startEndpoint((body, response, request) => {
      keys.push(request.headers.authorization);
      good(body, response, request);
    });
    const backend = backendOf(endpoint, "sk-1");
    await backend.open();
    await backend.embed(["a b", "c d"], never);
    await backend.embed(["e f"], never);
    expect(endpoint.bodies.slice(1)).toEqual([
      { model: "m", input: ["a b", "c d"], encoding_format: "base64" },
      { model: "m", input: ["e f"], encoding_format: "base64" },
    ]);
    expect(keys).toEqual(["Bearer sk-1", "Bearer sk-1", "Bearer sk-1"]);
    expect(endpoint.sockets).toBe(1);
  });

  it("an endpoint that does not know base64 is asked for numbers", async () => {
    const endpoint = await startEndpoint((body, response, request) => {
      if (body.encoding_format === "float") return good(body, response, request);
      response.statusCode = 422;
      response.end();
    });
    const backend = backendOf(endpoint);
    await backend.open();
    expect(await backend.embed(["a b"], never)).toHaveLength(1);
    expect(endpoint.bodies.map((body) => body.encoding_format)).toEqual([
      "base64",
      "float",
      "float",
    ]);
  });

  it.each([400, 413, 422])(
    "status %d: these texts are refused, the endpoint is not to blame",
    async (status) => {
      const endpoint = await startEndpoint();
      const backend = backendOf(endpoint);
      await backend.open();
      endpoint.handle = (_, response) => {
        response.statusCode = status;
        response.end("{}");
      };
      expect(await backend.embed(["a", "b"], never)).toEqual(["failed", "failed"]);
    },
  );

  const wrong: [string, Handler, RegExp][] = [
    ["500", (_, r) => void r.writeHead(500).end("secret"), /status 500$/],
    ["404", (_, r) => void r.writeHead(404).end(), /status 404$/],
    ["a redirect", (_, r) => void r.writeHead(307, { location: "/x" }).end(), /status 307$/],
    ["a broken connection", (_, r) => void r.destroy(), /cannot be reached \(ECONNRESET\)/],
    [
      "half an answer",
      (_, r) => void r.writeHead(200, { "content-length": 99 }).write("{", () => r.destroy()),
      /broke off/,
    ],
    ["HTML", (_, r) => void r.end("<html>secret"), /not answer with JSON$/],
    ["null", (_, r) => void r.end("null"), /has no data/],
    ["no data", (_, r) => void r.end('{"error": "secret"}'), /has no data/],
    ["too few vectors", (_, r) => send(r, [[1]]), /sent 1 vectors for 2 texts/],
    ["too many vectors", (_, r) => send(r, [[1], [1], [1]]), /sent 3 vectors for 2 texts/],
    [
      "one index twice",
      (_, r) =>
        void r.end(
          '{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}], "model": "m"}',
        ),
      /no vector/,
    ],
    [
      "an index beyond",
      (_, r) =>
        void r.end(
          '{"data": [{"index": 7, "embedding": [1]}, {"index": 0, "embedding": [1]}], "model": "m"}',
        ),
      /no vector/,
    ],
    ["an empty vector", (_, r) => send(r, [[], []]), /no vector/],
    ["base64 of 3 bytes", (_, r) => send(r, ["AAAA", "AAAA"]), /no vector/],
    ["something else", (_, r) => send(r, [{}, null]), /no vector/],
    ["another model", ({ input }, r) => send(r, vectorsOf(input), "other"), /another model/],
    ["5 MB", (_, r) => void r.end(`{"data": "${"x".repeat(5 << 20)}"}`), /too long/],
  ];

  it.each(wrong)("%s: an error that says so, without quoting it", async (_, handle, message) => {
    const endpoint = await startEndpoint();
    const backend = backendOf(endpoint);
    await backend.open();
    endpoint.handle = handle;
    const error = await backend.embed(["a b", "c d"], never).catch((reason: unknown) => reason);
    expect(error).toBeInstanceOf(EmbedderError);
    expect(error).toMatchObject({ message: expect.stringMatching(message) });
    expect(String(error)).not.toContain("secret");
    endpoint.handle = good; // And the next one is none the worse.
    expect(await backend.embed(["a b"], never)).toHaveLength(1);
  });

  it("an endpoint that hangs is left when nobody waits; one that is not there says so", async () => {
    const endpoint = await startEndpoint();
    const backend = backendOf(endpoint);
    await backend.open();
    endpoint.handle = () => {};
    const stop = new AbortController();
    const asked = backend.embed(["a b"], stop.signal);
    stop.abort();
    await expect(asked).rejects.toThrow(/did not answer in time/);
    await expect(backend.embed(["a b"], stop.signal)).rejects.toThrow(/not asked in time/);
    const nowhere = new HttpBackend({ url: "http://127.0.0.1:1", model: "m" });
    await expect(nowhere.open()).rejects.toThrow(/127.0.0.1:1 cannot be reached \(ECONNREFUSED\)/);
  });

  it.each([
    ["http://h:1", "http://h:1/v1/embeddings"],
    ["http://h:1/", "http://h:1/v1/embeddings"],
    ["http://h:1/v1", "http://h:1/v1/embeddings"],
    ["https://h/base/v1/", "https://h/base/v1/embeddings"],
    ["http://h/v1/embeddings", "http://h/v1/embeddings"],
    ["http://h/openai/deployments/d/embeddings/", "http://h/openai/deployments/d/embeddings"],
  ])("%s: is asked at %s", (url, whole) => {
    expect(embeddingsUrl(url).href).toBe(whole);
  });
});

// ---- with the edge: what a caller gets -----------------------------------------------------------------------

/** Long enough for a busy machine, where an answer is to come. */
const PATIENT_MS = 20_000;

async function edgeOf(endpoint: Endpoint, timeoutMs = PATIENT_MS) {
  const logged: string[] = [];
  const log = {
    info: () => {},
    warn: (fields: object, text: string) => void logged.push(`${text} ${JSON.stringify(fields)}`),
  };
  const embedder = new Embedder(
    backendOf(endpoint),
    { timeoutMs, queueMax: 64, tokensMax: 128 },
    log,
  );
  cleanups.push(() => embedder.close());
  await embedder.settled();
  const embed = (text: string): Promise<Embedded> =>
    new Promise((resolve) => embedder.embed(text, resolve));
  return { embedder, embed, logged };
}

describe("http embedder: behind the edge", () => {
  const ones = (count: number): number[] => Array<number>(count).fill(1);
  const faults: [string, (input: string[]) => unknown[], RegExp][] = [
    ["another dimension", (input) => input.map(() => ones(32)), /32 dimensions instead of 64/],
    ["NaN", (input) => input.map(() => [Number.NaN, ...ones(63)]), /not finite/],
    ["a zero vector", (input) => input.map(() => Array(64).fill(0)), /all zeros/],
    ["the same vector for everything", (input) => input.map(() => ones(64)), /the same vector/],
  ];

  it.each(faults)(
    "%s: refused, and after a while off, said once",
    async (_, embeddings, reason) => {
      const endpoint = await startEndpoint();
      const { embedder, embed, logged } = await edgeOf(endpoint);
      expect(embedder.identity()).toEqual({ id: "http:m", version: "m", dimension: 64 });
      endpoint.handle = ({ input }, response) => send(response, embeddings(input));
      for (let index = 0; embedder.describe().state === "healthy"; index++) {
        expect(index, "it goes on for ever").toBeLessThan(100);
        const answer = await embed(`question ${index}`);
        if (answer.kind === "vector") expect(reason.source).toContain("same vector");
      }
      expect(await embed("one more")).toEqual({ kind: "unavailable", reason: "off" });
      expect(embedder.describe().reason).toMatch(reason);
      expect(logged).toHaveLength(1);
    },
  );

  it.each(faults)("%s from the start: off", async (_, embeddings, reason) => {
    const endpoint = await startEndpoint(({ input }, response) =>
      send(response, embeddings(input)),
    );
    const logged: string[] = [];
    const log = {
      info: () => {},
      warn: (fields: object) => void logged.push(JSON.stringify(fields)),
    };
    const options = { dimension: 64, timeoutMs: PATIENT_MS, queueMax: 64, tokensMax: 128 };
    const embedder = new Embedder(backendOf(endpoint), options, log);
    await embedder.settled();
    expect(embedder.describe().state).toBe("off");
    expect(logged.join()).toMatch(reason);
  });

  it("a hanging endpoint costs a caller its budget and no more, soon nothing, and it comes back", async () => {
    const endpoint = await startEndpoint();
    const { embedder, embed } = await edgeOf(endpoint, 30);
    endpoint.handle = () => {};
    const reasons: string[] = [];
    while (reasons.at(-1) !== "resting") {
      const answer = await embed(`question ${reasons.length}`);
      reasons.push(answer.kind === "unavailable" ? answer.reason : answer.kind);
      expect(reasons.length).toBeLessThan(10);
    }
    expect(new Set(reasons)).toEqual(new Set(["late", "resting"]));
    endpoint.handle = good;
    while (embedder.describe().state !== "healthy") await new Promise((r) => setTimeout(r, 10));
    // Under load even a good endpoint may miss 30 ms: what counts is that it is asked again.
    const asked = endpoint.bodies.length;
    await embed("and again");
    expect(endpoint.bodies.length).toBeGreaterThan(asked);
  });

  it("500s open the breaker: no more is sent until it is tried again", async () => {
    const endpoint = await startEndpoint();
    const { embedder, embed, logged } = await edgeOf(endpoint);
    endpoint.handle = (_, response) => void response.writeHead(500).end();
    for (let index = 0; index < 3; index++) {
      expect(await embed(`question ${index}`)).toEqual({ kind: "unavailable", reason: "failed" });
    }
    expect(await embed("question 4")).toEqual({ kind: "unavailable", reason: "resting" });
    expect(embedder.describe().reason).toMatch(/status 500/);
    expect(logged).toHaveLength(1);
    endpoint.handle = good;
    while (embedder.describe().state !== "healthy") await new Promise((r) => setTimeout(r, 10));
    expect((await embed("question 5")).kind).toBe("vector");
  });
});
