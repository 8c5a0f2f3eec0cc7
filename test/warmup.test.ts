/**
 * The warm-up of a served gateway. Its node is a plain server that keeps every question until the test answers it:
 * so the order and the number in flight are what a node really sees.
 */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type ServerResponse } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, it } from "vitest";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import type { OptionsInput } from "../transport/options.ts";
import { type WarmupReport, warmUp } from "../transport/warmup.ts";
import { type LiveWorld, MODEL, startLiveWorld, until } from "./live-world.ts";

const folder = mkdtempSync(join(tmpdir(), "headrace-warmup-"));
const ends: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const end of ends.splice(0).reverse()) await end();
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

type ChatBody = {
  model: string;
  messages: { content: string }[];
  stream?: boolean;
  temperature?: number;
};

class PatientNode {
  /** All that came, in the order in which it came. */
  readonly bodies: ChatBody[] = [];
  readonly open: { question: string; response: ServerResponse }[] = [];
  openMost = 0;
  url = "";
  /** Answers by itself what it holds and what comes. */
  #answersAlone = false;
  readonly #server = createServer((request, response) => {
    if (request.url === "/health" || request.method !== "POST") {
      return void sendJson(response, 200, { data: [{ id: MODEL }] });
    }
    let text = "";
    request.setEncoding("utf8").on("data", (part: string) => {
      text += part;
    });
    request.on("end", () => {
      const body = JSON.parse(text) as ChatBody;
      this.bodies.push(body);
      this.open.push({ question: body.messages[0]?.content ?? "", response });
      this.openMost = Math.max(this.openMost, this.open.length);
      if (this.#answersAlone) this.answer();
    });
  });

  async start(): Promise<void> {
    await new Promise<void>((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
    const address = this.#server.address();
    if (address === null || typeof address === "string") throw new Error("it has no port");
    this.url = `http://127.0.0.1:${address.port}`;
  }

  get questions(): string[] {
    return this.bodies.map(({ messages }) => messages[0]?.content ?? "");
  }

  /** Answers the oldest that is open; a question with "wrong" in it is refused. */
  answer(): void {
    const { question, response } = this.open.shift() ?? {};
    if (response === undefined) throw new Error("nothing is open");
    if (question?.includes("wrong") === true) {
      const error = { message: "no", type: "invalid_request_error", code: "context_too_long" };
      return sendJson(response, 400, { error });
    }
    sendJson(response, 200, {
      id: "1",
      object: "chat.completion",
      created: 1,
      model: MODEL,
      choices: [
        { index: 0, message: { role: "assistant", content: "good" }, finish_reason: "stop" },
      ],
      usage: { prompt_tokens: 3, completion_tokens: 1, total_tokens: 4 },
    });
  }

  answerAll(): void {
    this.#answersAlone = true;
    while (this.open.length > 0) this.answer();
  }

  close(): Promise<unknown> {
    this.#server.closeAllConnections();
    return new Promise((resolve) => this.#server.close(resolve));
  }
}

function sendJson(response: ServerResponse, status: number, body: unknown): void {
  response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));
}

type WarmupOptions = NonNullable<OptionsInput["warmup"]>;

async function start(
  warmup: WarmupOptions,
  options: Partial<OptionsInput> = {},
): Promise<{ node: PatientNode; world: LiveWorld }> {
  const node = new PatientNode();
  await node.start();
  ends.push(() => node.close());
  const nodes = [{ url: node.url, name: "node-1" }];
  const world = await startLiveWorld({ nodes: 0, options: { ...options, nodes, warmup } });
  ends.push(() => world.close());
  return { node, world };
}

function promptsFile(lines: readonly string[]): string {
  const file = join(folder, "prompts.txt");
  writeFileSync(file, lines.join("\n"));
  return file;
}

function count(upTo: number): string[] {
  return Array.from({ length: upTo }, (_, index) => `prompt ${index}`);
}

const noProgress = () => {};

describe("warm-up", () => {
  it("asks for plain lines and JSON lines, whole, and leaves out comments and empty lines", async () => {
    const request = { messages: [{ role: "user", content: "as JSON" }], temperature: 0.5 };
    const file = promptsFile([
      "# A comment.",
      "",
      "plain words  \r",
      "   ",
      "  # Another.",
      JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
      `"in quotes"`,
      "the last line has no break",
    ]);
    const { node, world } = await start({ file, inflightMax: 1 });
    node.answerAll();
    const progress: number[] = [];
    const report = await world.server.warmUp(({ done }) => void progress.push(done));
    expect(report).toEqual({ done: 4, filled: 4, present: 0, failures: [] });
    expect(progress).toEqual([1, 2, 3, 4]);
    expect(node.questions).toEqual([
      "plain words",
      "as JSON",
      `"in quotes"`,
      "the last line has no break",
    ]);
    expect(node.bodies.map(({ model }) => model)).toEqual(Array(4).fill(MODEL));
    expect(node.bodies.every(({ stream }) => stream !== true)).toBe(true);
    expect(node.bodies[1]?.temperature).toBe(0.5);
    // What a client asks then is there, also as a stream.
    expect((await world.chat("plain words")).cache).toBe("hit-exact");
    expect((await world.chat("as JSON", { temperature: 0.5, stream: true })).cache).toBe(
      "hit-exact",
    );
    expect(node.bodies).toHaveLength(4);
    await world.idle();
  });

  it("has inflightMax prompts in flight, and never more", async () => {
    const { node, world } = await start({ file: promptsFile(count(12)), inflightMax: 3 });
    const report = world.server.warmUp(noProgress);
    for (let answered = 0; answered < 12; answered++) {
      const open = Math.min(3, 12 - answered);
      await until("the places are filled", () => node.open.length === open);
      node.answer();
    }
    expect(await report).toMatchObject({ done: 12, filled: 12 });
    expect(node.openMost).toBe(3);
    expect(new Set(node.questions).size).toBe(12);
  });

  it("does not ask for what is there already", async () => {
    const file = promptsFile([...count(3), "prompt 1"]);
    const { node, world } = await start({ file, inflightMax: 1 });
    node.answerAll();
    await world.chat("prompt 0");
    expect(await world.server.warmUp(noProgress)).toEqual({
      done: 4,
      filled: 2,
      present: 2,
      failures: [],
    });
    expect(await world.server.warmUp(noProgress)).toMatchObject({ filled: 0, present: 4 });
    expect(node.bodies).toHaveLength(3);
  });

  it("lists what failed by line and reason, without the prompt, and goes on", async () => {
    const secret = "sesame";
    const file = promptsFile([
      `{"messages": ${secret}`,
      "good one",
      "# A comment counts as a line.",
      `wrong ${secret}`,
      JSON.stringify({ messages: secret }),
      JSON.stringify({ model: "no-such", messages: [{ role: "user", content: secret }] }),
      "good two",
    ]);
    const { node, world } = await start({ file, inflightMax: 1 });
    node.answerAll();
    const report = await world.server.warmUp(noProgress);
    expect(report).toEqual({
      done: 6,
      filled: 2,
      present: 0,
      failures: [
        { line: 1, reason: "the line is not a JSON object" },
        { line: 4, reason: "status 400, context_too_long" },
        { line: 5, reason: "status 400, invalid_request" },
        { line: 6, reason: "status 404, model_not_found" },
      ],
    });
    expect(JSON.stringify([report, world.log])).not.toContain(secret);
  });

  it("lets live requests go first where the nodes have no place left, and comes again", async () => {
    const { node, world } = await start(
      { file: promptsFile(count(3)), inflightMax: 2 },
      { concurrency: { inflightMax: 1, inflightMin: 1 } },
    );
    const report = world.server.warmUp(noProgress);
    await until("one has the place, and the other was shed", async () => {
      const { limiter, requests } = await world.gateway.state();
      return limiter?.keys[0]?.granted === 2 && requests?.open === 1;
    });
    const waiting = async () => {
      const bands = (await world.gateway.state()).router?.pools.flatMap(({ queued }) => queued);
      return bands?.reduce((sum, band) => sum + band.waiting, 0) ?? 0;
    };
    const replies = ["live one", "live two"].map((question) => world.chat(question));
    await until("the live ones wait", async () => (await waiting()) === 2);
    node.answerAll();
    for (const reply of replies) expect((await reply).status).toBe(200);
    expect(await report).toEqual({ done: 3, filled: 3, present: 0, failures: [] });
    expect(node.questions[0]).toMatch(/prompt [01]/);
    expect(node.questions.slice(1, 3).sort()).toEqual(["live one", "live two"]);
    expect(node.questions.slice(3)).toHaveLength(2);
    expect(node.openMost).toBe(1);
    await world.idle();
  });

  it("ends also while it waits for busy nodes", async () => {
    const { node, world } = await start(
      { file: promptsFile(count(3)), inflightMax: 2 },
      { concurrency: { inflightMax: 1, inflightMin: 1 } },
    );
    const live = world.chat("live");
    await until("the node is busy", () => node.open.length === 1);
    const report = world.server.warmUp(noProgress);
    await until("two were shed", async () => {
      const { limiter, requests } = await world.gateway.state();
      return (limiter?.keys[0]?.granted ?? 0) >= 3 && requests?.open === 1;
    });
    await world.close();
    expect(await report).toMatchObject({ done: 2, filled: 0 });
    expect(node.questions).toEqual(["live"]);
    expect((await live).status).not.toBe(200);
  });

  it("a file that cannot be read is an error that names it and says why", async () => {
    const missing = join(folder, "no-such.txt");
    const { node, world } = await start({ file: missing });
    await expect(world.server.warmUp(noProgress)).rejects.toThrow(
      `warmup.file ${missing} cannot be read: ENOENT`,
    );
    const aFolder = await start({ file: folder });
    await expect(aFolder.world.server.warmUp(noProgress)).rejects.toThrow(
      `warmup.file ${folder} cannot be read: EISDIR`,
    );
    expect(node.bodies).toHaveLength(0);
  });

  it("ends when it is told to: what is in flight is awaited, nothing more is begun", async () => {
    const file = promptsFile(count(10));
    const { node, world } = await start({ file, inflightMax: 2 });
    const ending = new AbortController();
    const limits = {};
    const tenant = {
      tenant: "local",
      limitKey: "local",
      limits,
      weight: 1,
      priority: "standard",
    } as const;
    const reports: WarmupReport[] = [];
    const ended = warmUp(world.gateway.front, {
      file,
      inflightMax: 2,
      tenant,
      model: MODEL,
      signal: ending.signal,
    }).then((report) => void reports.push(report));
    await until("two are in flight", () => node.open.length === 2);
    ending.abort();
    node.answer();
    await until("the first has ended", async () => {
      return (await world.gateway.state()).requests?.open === 1;
    });
    expect(reports).toEqual([]);
    node.answer();
    await ended;
    expect(reports).toEqual([{ done: 2, filled: 2, present: 0, failures: [] }]);
    expect(node.questions).toEqual(["prompt 0", "prompt 1"]);
  });

  it("a server that stops ends its warm-up", async () => {
    const { node, world } = await start({ file: promptsFile(count(10)), inflightMax: 2 });
    const report = world.server.warmUp(noProgress);
    await until("two are in flight", () => node.open.length === 2);
    await world.close();
    const { done, filled, failures } = (await report) ?? { done: 0, filled: 0, failures: [] };
    expect({ done, filled, failed: failures.length }).toEqual({ done: 2, filled: 0, failed: 2 });
    expect(node.questions).toHaveLength(2);
  });
});

/** An endpoint that knows words, as the built-in embedder does, and begins to answer when the test says so. */
class PatientEmbedder {
  readonly batches: (readonly string[])[] = [];
  url = "";
  readonly #embedder = new LexicalEmbedder(64);
  readonly #held: (() => void)[] = [];
  #answers = false;
  readonly #server = createServer((request, response) => {
    let text = "";
    request.setEncoding("utf8").on("data", (part: string) => {
      text += part;
    });
    request.on("end", () => {
      const { input } = JSON.parse(text) as { input: string[] };
      const answer = (): void => {
        this.batches.push(input);
        const data = input.map((one) => ({ embedding: [...this.#embedder.embed(one)] }));
        sendJson(response, 200, { model: "words", data });
      };
      if (this.#answers) answer();
      else this.#held.push(answer);
    });
  });

  async start(): Promise<void> {
    await new Promise<void>((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
    const address = this.#server.address();
    if (address === null || typeof address === "string") throw new Error("it has no port");
    this.url = `http://127.0.0.1:${address.port}`;
    ends.push(() => this.close());
  }

  answer(): void {
    this.#answers = true;
    for (const answer of this.#held.splice(0)) answer();
  }

  close(): Promise<unknown> {
    this.#server.closeAllConnections();
    return new Promise((resolve) => this.#server.close(resolve));
  }
}

describe("warm-up: by meaning", () => {
  type Semantic = NonNullable<NonNullable<OptionsInput["cache"]>["semantic"]>;
  const matching = (semantic: Semantic = {}): Partial<OptionsInput> => ({
    cache: {
      semantic: {
        matchMs: 5000,
        judgeRatio: 1,
        embedder: { type: "lexical", timeoutMs: 5000 },
        ...semantic,
      },
    },
  });

  it("200 prompts, at most 5 in flight at the node; other wordings of each hit afterwards", async () => {
    const prompts = Array.from(
      { length: 200 },
      (_, at) => `Tell of topic${at} and matter${at * 7}`,
    );
    const { node, world } = await start({ file: promptsFile(prompts) }, matching());
    const report = world.server.warmUp(noProgress);
    for (let answered = 0; answered < 200; answered++) {
      const open = Math.min(5, 200 - answered);
      await until("the places are filled", () => node.open.length === open);
      node.answer();
    }
    expect(await report).toEqual({ done: 200, filled: 200, present: 0, failures: [] });
    expect(node.openMost).toBe(5);
    expect(node.bodies).toHaveLength(200);
    const { embedder } = await world.gateway.state();
    expect(embedder?.vectors).toBe(200);
    expect(embedder?.batches).toBeLessThan(50); // In batches of up to 8.
    const again = await world.server.warmUp(noProgress);
    expect(again).toMatchObject({ filled: 0, present: 200 });
    expect(node.bodies).toHaveLength(200);
    for (const at of [0, 77, 199]) {
      const reply = await world.chat(`tell of topic${at} and matter${at * 7}!`);
      expect(reply.cache).toMatch(/^hit-semantic/);
    }
  });

  it("a prompt that another one's answer would be served for is skipped, and not judged either", async () => {
    const file = promptsFile([
      "How do I reset the password?",
      "how do i reset the password",
      "Who are you?",
    ]);
    const { node, world } = await start({ file, inflightMax: 1 }, matching());
    node.answerAll();
    expect(await world.server.warmUp(noProgress)).toMatchObject({ done: 3, filled: 2, present: 1 });
    await world.idle();
    expect(node.questions).toEqual(["How do I reset the password?", "Who are you?"]);
  });

  it("where nobody would be served it, in shadow mode, the node is asked", async () => {
    const file = promptsFile(["How do I reset the password?", "how do i reset the password"]);
    const { node, world } = await start({ file, inflightMax: 1 }, matching({ mode: "shadow" }));
    node.answerAll();
    expect(await world.server.warmUp(noProgress)).toMatchObject({ done: 2, filled: 2 });
    expect(node.bodies).toHaveLength(2);
  });

  it("waits for an embedder that is starting, and has it embed in batches", async () => {
    const embedder = new PatientEmbedder();
    await embedder.start();
    const prompts = Array.from({ length: 20 }, (_, at) => `Tell of topic${at}`);
    const { node, world } = await start(
      {
        file: promptsFile([
          ...prompts,
          JSON.stringify({ messages: [{ role: "user", content: "Tell of JSON" }] }),
        ]),
      },
      matching({ embedder: { type: "http", url: embedder.url, model: "words", timeoutMs: 5000 } }),
    );
    node.answerAll();
    const report = world.server.warmUp(noProgress);
    expect((await world.gateway.state()).embedder?.state).toBe("starting");
    expect(node.bodies).toHaveLength(0);
    embedder.answer();
    expect(await report).toMatchObject({ done: 21, filled: 21 });
    const own = embedder.batches.filter((texts) =>
      texts.some((text) => text.startsWith("Tell of")),
    );
    expect(own.map((texts) => texts.length)).toEqual([8, 8, 5]);
    expect((await world.chat("tell of JSON!")).cache).toMatch(/^hit-semantic/);
  });

  it("goes on without vectors where the embedder cannot be had", async () => {
    const { node, world } = await start(
      { file: promptsFile(count(10)) },
      matching({ embedder: { type: "http", url: "http://127.0.0.1:9", model: "words" } }),
    );
    node.answerAll();
    expect(await world.server.warmUp(noProgress)).toMatchObject({ done: 10, filled: 10 });
  });

  it("ends also while it waits for an embedder", async () => {
    const embedder = new PatientEmbedder();
    await embedder.start();
    const { node, world } = await start(
      { file: promptsFile(count(10)) },
      matching({ embedder: { type: "http", url: embedder.url, model: "words" } }),
    );
    const report = world.server.warmUp(noProgress);
    await world.close();
    expect(await report).toMatchObject({ done: 0 });
    expect(node.bodies).toHaveLength(0);
  });
});
