import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { Agent, get, type IncomingMessage, request } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Command } from "commander";
import OpenAI from "openai";
import { afterAll, afterEach, describe, expect, it, vi } from "vitest";
import { nodeCommand } from "../bin/node.ts";
import { GpuNodeModel } from "../sim/gpu-node-model.ts";
import { formatLaw } from "../sim/law-file.ts";
import { lawByName, type StepLaw } from "../sim/laws.ts";
import {
  answerText,
  answerTokens,
  embeddingOf,
  hashOf,
  promptMaterial,
  promptText,
  tokensOf,
} from "../transport/node-answers.ts";
import {
  type NodeEngine,
  type NodeFault,
  NodeServer,
  type NodeServerOptions,
  parseFault,
} from "../transport/node-server.ts";

const MODEL = "llama-3.1-8b";
const h100 = lawByName("llama-3.1-8b/h100");
const prefix = { blockTokens: 16, blocksMax: 1000 };

type Node = { server: NodeServer; url: string; engine: GpuNodeModel };
const open: NodeServer[] = [];
afterEach(async () => {
  await Promise.all(open.splice(0).map((server) => server.close()));
});

/** A node fast enough that no test waits for it. */
async function startNode(
  options: Partial<NodeServerOptions> = {},
  law: StepLaw = h100,
): Promise<Node> {
  const engine = new GpuNodeModel({ law, mode: "leap", prefix });
  const server = new NodeServer({ engine, models: [MODEL], speed: 1000, ...options });
  open.push(server);
  const { url } = await server.listen(0);
  return { server, url, engine };
}

const ask = (content: string, more: Record<string, unknown> = {}) => ({
  model: MODEL,
  messages: [{ role: "user", content }],
  ...more,
});

type Usage = {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details: { cached_tokens: number };
};
/** Any JSON the node answers with; a test reads the part that its request brings. */
type Reply = {
  model: string;
  choices: { message: { content: string }; finish_reason: string }[];
  usage: Usage;
  error: { message: string };
};
const json = async (response: Response | Promise<Response>) =>
  (await (await response).json()) as Reply;
const choiceOf = ({ choices }: Reply) => choices[0];

const post = (
  { url }: Node,
  body: unknown,
  path = "/v1/chat/completions",
  headers: Record<string, string> = {},
) =>
  fetch(`${url}${path}`, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: typeof body === "string" ? body : JSON.stringify(body),
  });

/** Data of every SSE event of a whole stream. */
const eventsOf = (text: string) =>
  text
    .split("\n\n")
    .filter((event) => event.length > 0)
    .map((event) => event.replace(/^data: /, ""));

type Chunk = {
  choices: { delta?: { content?: string }; text?: string; finish_reason: string | null }[];
  usage?: unknown;
};
const chunksOf = (text: string) =>
  eventsOf(text)
    .filter((event) => event !== "[DONE]")
    .map((event): Chunk => JSON.parse(event));
const contentOf = (text: string) =>
  chunksOf(text)
    .map(({ choices }) => choices[0]?.delta?.content ?? choices[0]?.text ?? "")
    .join("");

/** What the node must say to a body. */
const expected = (body: Record<string, unknown>, tokens?: number) => {
  const material = promptMaterial(body, MODEL);
  return answerText(material, tokens ?? answerTokens(material));
};

async function metric({ url }: Node, name: string): Promise<number> {
  const text = await (await fetch(`${url}/metrics`)).text();
  const line = text.split("\n").find((each) => each.startsWith(`${name}{`));
  return line === undefined ? Number.NaN : Number(line.split(" ").at(-1));
}

const until = (check: () => unknown) => vi.waitFor(check, { timeout: 10_000, interval: 5 });

/** A raw streamed request: what came, and whether the connection was cut before the end. */
function stream(node: Node, body: unknown) {
  const seen = { text: "", status: 0, isCut: false, isOver: false };
  const outgoing = request(`${node.url}/v1/chat/completions`, { method: "POST" }, (response) => {
    seen.status = response.statusCode ?? 0;
    response.setEncoding("utf8");
    response.on("data", (text: string) => {
      seen.text += text;
    });
    response.on("error", () => undefined);
    response.on("close", () => {
      seen.isCut = !response.complete;
      seen.isOver = true;
    });
  });
  outgoing.on("error", () => {
    seen.isCut = true;
    seen.isOver = true;
  });
  outgoing.end(JSON.stringify(body));
  return { seen, leave: () => outgoing.destroy() };
}

describe("node server: answers", () => {
  it("a whole answer says what its prompt demands, and counts it", async () => {
    const node = await startNode({ name: "gpu-1" });
    const body = ask("What is a headrace?");
    const response = await post(node, body);
    expect(response.status).toBe(200);
    expect(response.headers.get("content-type")).toBe("application/json");
    const answer = await json(response);
    const material = promptMaterial(body, MODEL);
    const tokens = answerTokens(material);
    const promptTokens = tokensOf(promptText(body));
    expect(answer).toMatchObject({
      object: "chat.completion",
      model: MODEL,
      system_fingerprint: "gpu-1",
      choices: [
        {
          index: 0,
          message: { role: "assistant", content: answerText(material, tokens) },
          finish_reason: "stop",
        },
      ],
      usage: {
        prompt_tokens: promptTokens,
        completion_tokens: tokens,
        total_tokens: promptTokens + tokens,
        prompt_tokens_details: { cached_tokens: 0 },
      },
    });
  });

  it("a stream says the same, one event per token, usage only on request", async () => {
    const node = await startNode();
    const body = ask("Tell me about turbines", { stream: true });
    const response = await post(node, body);
    expect(response.headers.get("content-type")).toMatch(/^text\/event-stream/);
    const text = await response.text();
    expect(contentOf(text)).toBe(expected(body));
    const events = eventsOf(text);
    const tokens = answerTokens(promptMaterial(body, MODEL));
    expect(events).toHaveLength(tokens + 3); // Role, tokens, finish, [DONE].
    expect(events.at(-1)).toBe("[DONE]");
    expect(chunksOf(text).at(-1)).toMatchObject({
      choices: [{ delta: {}, finish_reason: "stop" }],
    });
    expect(text).not.toContain("usage");

    const counted = await post(node, { ...body, stream_options: { include_usage: true } });
    expect(chunksOf(await counted.text()).at(-1)).toMatchObject({
      choices: [],
      usage: { completion_tokens: tokens },
    });
  });

  it("the old completions route answers whole and streamed, 16 tokens unless asked for more", async () => {
    const node = await startNode();
    const body = { model: MODEL, prompt: "Once upon a time" };
    const whole = await json(post(node, body, "/v1/completions"));
    expect(whole).toMatchObject({
      object: "text_completion",
      choices: [{ text: expected(body, 16), finish_reason: "length" }],
    });
    const streamed = await post(node, { ...body, stream: true, max_tokens: 40 }, "/v1/completions");
    const tokens = Math.min(40, answerTokens(promptMaterial(body, MODEL)));
    expect(contentOf(await streamed.text())).toBe(expected(body, tokens));
  });

  it("max_tokens cuts, header and field override the natural length", async () => {
    const node = await startNode();
    const finishOf = async (body: unknown, headers = {}) => {
      const answer = await json(post(node, body, undefined, headers));
      return [answer.usage.completion_tokens, choiceOf(answer)?.finish_reason];
    };
    expect(await finishOf(ask("a", { max_tokens: 3 }))).toEqual([3, "length"]);
    expect(await finishOf(ask("a", { max_tokens: 9, max_completion_tokens: 4 }))).toEqual([
      4,
      "length",
    ]);
    expect(await finishOf(ask("a", { headrace_output_tokens: 333 }))).toEqual([333, "stop"]);
    const five = { headrace_output_tokens: 5 };
    expect(await finishOf(ask("a", { ...five, max_tokens: 2 }))).toEqual([2, "length"]);
    expect(await finishOf(ask("a", { ...five, max_tokens: 5 }))).toEqual([5, "stop"]);
  });

  it("the text follows system prompt, history, tools, seed and model, and nothing else", async () => {
    const node = await startNode({ models: [MODEL, "other"] });
    const say = async (body: Record<string, unknown>) => {
      const answer = await json(post(node, { max_tokens: 8, ...body }));
      return choiceOf(answer)?.message.content;
    };
    const plain = await say(ask("hello"));
    expect(await say(ask("hello", { temperature: 0.3, top_p: 0.5, user: "me" }))).toBe(plain);
    const tool = { type: "function", function: { name: "f", parameters: {} } };
    const variants = [
      ask("hello", { seed: 1 }),
      ask("hello", { model: "other" }),
      ask("hello", { tools: [tool] }),
      ask("hello", {
        messages: [
          { role: "system", content: "be brief" },
          { role: "user", content: "hello" },
        ],
      }),
      ask("hello", { messages: [{ role: "user", content: [{ type: "text", text: "hullo" }] }] }),
    ];
    const texts = await Promise.all(variants.map(say));
    expect(new Set([plain, ...texts]).size).toBe(variants.length + 1);
  });

  it("stop ends the answer before the stop text, streamed or whole", async () => {
    const node = await startNode();
    const body = ask("count", { headrace_output_tokens: 50 });
    const full = expected(body, 50);
    const words = full.split(" ");
    const stop = `${words[9]} ${words[10]?.slice(0, 1)}`;
    const cut = full.slice(0, full.indexOf(stop));
    const whole = await json(post(node, { ...body, stop: ["zzz", stop] }));
    expect(choiceOf(whole)).toMatchObject({ message: { content: cut }, finish_reason: "stop" });
    expect(whole.usage.completion_tokens).toBeLessThan(50);
    const streamed = await post(node, { ...body, stop, stream: true });
    expect(contentOf(await streamed.text())).toBe(cut);
    const without = await json(post(node, { ...body, stop: "zzz" }));
    expect(choiceOf(without)?.message.content).toBe(full);
  });

  it("a known prompt prefix is found again and reported as cached", async () => {
    const node = await startNode();
    const system = { role: "system", content: "You are the keeper of a mill race. ".repeat(20) };
    const say = async (content: string) => {
      const messages = [system, { role: "user", content }];
      const answer = await json(post(node, ask("", { messages })));
      return answer.usage.prompt_tokens_details.cached_tokens;
    };
    expect(await say("one")).toBe(0);
    expect(await say("two")).toBeGreaterThanOrEqual(160);
    expect(await metric(node, "vllm:prefix_cache_hits_total")).toBeGreaterThanOrEqual(160);
  });

  it("OpenAI's own client is content: streams, tools and embeddings", async () => {
    const node = await startNode();
    const client = new OpenAI({ baseURL: `${node.url}/v1`, apiKey: "none", maxRetries: 0 });
    const tools = [
      { type: "function" as const, function: { name: "look_up", parameters: { type: "object" } } },
    ];
    const content = "please call tool look_up now";
    const messages = [{ role: "user" as const, content }];
    const whole = await client.chat.completions.create({ model: MODEL, messages, tools });
    const call = whole.choices[0]?.message.tool_calls?.[0];
    expect(whole.choices[0]?.finish_reason).toBe("tool_calls");
    if (call?.type !== "function") throw new Error("no function call");
    expect(call.function.name).toBe("look_up");
    const { text } = JSON.parse(call.function.arguments);
    expect(text).toBe(answerText(promptMaterial({ messages, tools }, MODEL), 6));

    const parts = { name: "", text: "", finish: "" };
    const chunks = await client.chat.completions.create({
      model: MODEL,
      messages,
      tools,
      stream: true,
    });
    for await (const { choices } of chunks) {
      const delta = choices[0]?.delta.tool_calls?.[0]?.function;
      parts.name += delta?.name ?? "";
      parts.text += delta?.arguments ?? "";
      parts.finish = choices[0]?.finish_reason ?? "";
    }
    expect(parts).toEqual({
      name: "look_up",
      text: call.function.arguments,
      finish: "tool_calls",
    });

    const unknown = [{ ...tools[0], function: { name: "other" } }] as typeof tools;
    const none = await client.chat.completions.create({ model: MODEL, messages, tools: unknown });
    expect(none.choices[0]?.message.tool_calls).toBeUndefined();
    const short = await client.chat.completions.create({
      model: MODEL,
      messages,
      tools,
      max_tokens: 1,
    });
    const shortCall = short.choices[0]?.message.tool_calls?.[0];
    if (shortCall?.type !== "function") throw new Error("no function call");
    expect(JSON.parse(shortCall.function.arguments)).toEqual({ text });

    // The client asks for base64 and decodes it.
    const vectors = await client.embeddings.create({ model: MODEL, input: ["a mill", "a race"] });
    expect(vectors.data).toHaveLength(2);
    expect(vectors.data[1]?.embedding).toEqual(Array.from(embeddingOf("a race", 384)));
    expect((await client.models.list()).data[0]?.id).toBe(MODEL);
  });
});

describe("node answers: pure", () => {
  it("a longer answer begins with the shorter one, one word a token", () => {
    const long = answerText("m", 40);
    expect(long.startsWith(answerText("m", 12))).toBe(true);
    expect(long.trim().split(" ")).toHaveLength(40);
    expect(long).toMatch(/^( [a-z]{2,3})+$/);
    expect(answerText("n", 12)).not.toBe(answerText("m", 12));
  });

  it("natural lengths spread over 8 to 255", () => {
    const lengths = Array.from({ length: 4000 }, (_, i) => answerTokens(`prompt ${i}`));
    expect(Math.min(...lengths)).toBe(8);
    expect(Math.max(...lengths)).toBe(255);
    const mean = lengths.reduce((sum, x) => sum + x, 0) / lengths.length;
    expect(Math.abs(mean - 131.5)).toBeLessThan(5);
  });

  it("chained block hashes agree exactly as long as the text does", () => {
    const blocksOf = (text: string) => {
      const blocks: number[] = [];
      hashOf(`${text}\nm\n`, 4, text.length, blocks);
      return blocks;
    };
    const text = "0123456789abcdef".repeat(4);
    expect(blocksOf(text)).toHaveLength(4);
    expect(blocksOf(text.slice(0, 63))).toEqual(blocksOf(text).slice(0, 3));
    const other = blocksOf(`${text.slice(0, 20)}X${text.slice(21)}`);
    expect(other[0]).toBe(blocksOf(text)[0]);
    expect(other.slice(1).some((hash, i) => hash === blocksOf(text)[i + 1])).toBe(false);
  });

  it("embeddings are unit vectors, blind to case and order, nearer the more words are shared", () => {
    const dot = (a: string, b: string) => {
      const [x, y] = [embeddingOf(a, 384), embeddingOf(b, 384)];
      return x.reduce((sum, value, i) => sum + value * (y[i] ?? 0), 0);
    };
    const question = "What is the capital of France?";
    expect(dot(question, question)).toBeCloseTo(1, 5);
    expect(dot(question, "what is THE capital of france")).toBeCloseTo(1, 5);
    expect(dot(question, "What is the capital city of France?")).toBeGreaterThan(0.9);
    expect(Math.abs(dot(question, "Sort these lines by length"))).toBeLessThan(0.3);
    expect(dot("法国的首都是哪里", "法国的首都在哪里")).toBeGreaterThan(0.8);
    expect(dot("", "")).toBeCloseTo(1, 5);
  });
});

describe("node server: refusals", () => {
  const bad: [what: string, body: unknown, status: number, says: RegExp, path?: string][] = [
    ["no JSON", "{nope", 400, /not valid JSON/],
    ["no object", "[1]", 400, /JSON object/],
    ["unknown model", ask("a", { model: "gpt-9" }), 404, /"gpt-9" does not exist; served: llama/],
    ["no messages", { model: MODEL }, 400, /messages must be a list/],
    ["empty messages", ask("a", { messages: [] }), 400, /messages must be a list/],
    ["a message without role", ask("a", { messages: [{ content: "x" }] }), 400, /messages\[0\]/],
    ["two answers", ask("a", { n: 2 }), 400, /n must be 1/],
    ["a wrong stop", ask("a", { stop: [1] }), 400, /stop must be/],
    ["max_tokens of zero", ask("a", { max_tokens: 0 }), 400, /max_tokens must be a whole number/],
    ["too long", ask("a", { max_tokens: 40_000 }), 400, /at most 32768 tokens/],
    ["a wrong wish", ask("a", { headrace_output_tokens: 1.5 }), 400, /headrace_output_tokens/],
    ["no prompt", { model: MODEL }, 400, /prompt must be/, "/v1/completions"],
    ["two prompts", { prompt: ["a", "b"] }, 400, /prompt must be one/, "/v1/completions"],
    ["no input", { model: MODEL }, 400, /input must be/, "/v1/embeddings"],
    ["an empty input", { input: ["a", ""] }, 400, /input must be/, "/v1/embeddings"],
    ["dimensions", { input: "a", dimensions: 1e6 }, 400, /dimensions must be/, "/v1/embeddings"],
    ["encoding", { input: "a", encoding_format: "x" }, 400, /encoding_format/, "/v1/embeddings"],
    ["no such path", {}, 404, /no such path: \/v1\/x/, "/v1/x"],
  ];

  it("wrong requests get OpenAI's error shape, and nothing reaches the engine", async () => {
    const node = await startNode();
    for (const [what, body, status, says, path] of bad) {
      const response = await post(node, body, path);
      const { error } = await json(response);
      expect([response.status, what]).toEqual([status, what]);
      expect(error.message, what).toMatch(says);
      expect(error, what).toMatchObject({ type: "invalid_request_error" });
      expect(Object.keys(error).sort(), what).toEqual(["code", "message", "param", "type"]);
    }
    expect(node.engine.snapshot()).toMatchObject({ stepsTotal: 0, waiting: 0 });
    expect(node.server.stats()).toMatchObject({ requests: bad.length - 1, completed: 0 });
  });

  it("a body over the limit gets 413, a wrong method 405", async () => {
    const node = await startNode({ bodyBytesMax: 1000 });
    const large = await post(node, ask("x".repeat(2000)));
    expect(large.status).toBe(413);
    const wrong = await fetch(`${node.url}/v1/chat/completions`);
    expect([wrong.status, wrong.headers.get("allow")]).toEqual([405, "POST"]);
  });

  it("an API key, when set, is asked for on /v1 only", async () => {
    const node = await startNode({ apiKey: "s3cret" });
    expect((await post(node, ask("a"))).status).toBe(401);
    expect((await post(node, ask("a"), undefined, { authorization: "Bearer no" })).status).toBe(
      401,
    );
    const right = { authorization: "Bearer s3cret" };
    expect((await post(node, ask("a"), undefined, right)).status).toBe(200);
    expect((await fetch(`${node.url}/v1/models`)).status).toBe(401);
    expect((await fetch(`${node.url}/health`)).status).toBe(200);
    expect((await fetch(`${node.url}/metrics`)).status).toBe(200);
  });

  it("context is bounded by the KV memory, and requests by requestsMax", async () => {
    const node = await startNode({ requestsMax: 1 }, { ...h100, kvBlocks: 20 });
    const long = await json(post(node, ask("a", { max_tokens: 400 })));
    expect(long.error).toMatchObject({ code: "context_length_exceeded" });
    node.server.setFault({ hang: true });
    const first = post(node, ask("a"));
    await until(() => expect(node.server.stats().open).toBe(1));
    const second = await post(node, ask("b"));
    expect([second.status, second.headers.get("retry-after")]).toEqual([503, "1"]);
    node.server.setFault({});
    expect((await first).status).toBe(200);
  });

  it("a taken port is named, bad options are refused", async () => {
    const node = await startNode();
    const port = Number(new URL(node.url).port);
    const engine = node.engine;
    const second = new NodeServer({ engine, models: [MODEL] });
    await expect(second.listen(port)).rejects.toThrow(`port ${port} on 127.0.0.1 is taken`);
    expect(() => new NodeServer({ engine, models: [] })).toThrow(/at least one model/);
    expect(() => new NodeServer({ engine, models: [MODEL], speed: 0 })).toThrow(/speed must be/);
  });
});

describe("node server: engine", () => {
  it("fits the model into the engine it declares", () => {
    const engine: NodeEngine = new GpuNodeModel({ law: h100, prefix });
    expect(engine.prefixBlockTokens).toBe(16);
  });

  it("queues for real: what does not fit waits, and metrics say so in vLLM's words", async () => {
    const node = await startNode({}, { ...h100, sequencesMax: 2 });
    node.server.setFault({ hang: true });
    const replies = Array.from({ length: 5 }, (_, i) => post(node, ask(`q${i}`)));
    await until(async () => expect(await metric(node, "vllm:num_requests_waiting")).toBe(5));
    expect(await metric(node, "vllm:num_requests_running")).toBe(0);
    node.server.setFault({});
    const usages = await Promise.all(replies.map(async (reply) => (await json(reply)).usage));
    const sum = (key: "prompt_tokens" | "completion_tokens") =>
      usages.reduce((total, usage) => total + usage[key], 0);
    expect(await metric(node, "vllm:prompt_tokens_total")).toBe(sum("prompt_tokens"));
    expect(await metric(node, "vllm:generation_tokens_total")).toBe(sum("completion_tokens"));
    expect(await metric(node, "vllm:num_requests_waiting")).toBe(0);
    expect(await metric(node, "vllm:kv_cache_usage_perc")).toBe(0);
    expect(await metric(node, "vllm:num_preemptions_total")).toBe(0);
    expect(await metric(node, "vllm:request_success_total")).toBe(5);
    expect(await metric(node, "headrace_node_requests_total")).toBe(5);
    expect(await metric(node, "headrace_node_aborts_total")).toBe(0);
    const text = await (await fetch(`${node.url}/metrics`)).text();
    expect(text).toContain(`block_size="16",num_gpu_blocks="${h100.kvBlocks}"`);
    expect(text).toContain(`finished_reason="length"} 0`);
    expect(text).toContain(`vllm:prefix_cache_queries_total{engine="0",model_name="${MODEL}"}`);
  });

  it("keeps the pace of the law times speed (never faster)", async () => {
    const node = await startNode({ speed: 10 });
    const startedAtMs = performance.now();
    const answer = await post(node, ask("pace", { headrace_output_tokens: 60, stream: true }));
    const text = await answer.text();
    const tookMs = performance.now() - startedAtMs;
    expect(eventsOf(text)).toHaveLength(63);
    // 60 steps of at least W + s = 8.66 ms each, ten times as fast.
    expect(tookMs).toBeGreaterThan((60 * 8.66) / 10);
  });

  it("a client that leaves is aborted in the engine, streamed or whole, running or waiting", async () => {
    const node = await startNode({ speed: 1 }, { ...h100, sequencesMax: 1 });
    const endless = { headrace_output_tokens: 20_000 };
    const streamed = stream(node, ask("s", { ...endless, stream: true }));
    await until(() => expect(streamed.seen.text).toContain("content"));
    const whole = stream(node, ask("w", endless));
    await until(async () => expect(await metric(node, "vllm:num_requests_waiting")).toBe(1));
    expect(await metric(node, "vllm:num_requests_running")).toBe(1);
    whole.leave();
    await until(() => expect(node.server.stats()).toMatchObject({ aborts: 1, open: 1 }));
    streamed.leave();
    await until(() => expect(node.server.stats()).toMatchObject({ aborts: 2, open: 0 }));
    expect(node.engine.snapshot()).toMatchObject({ running: 0, waiting: 0, kv: 0 });
    expect(await metric(node, "headrace_node_aborts_total")).toBe(2);
    node.engine.assertInvariants();
  });

  it("many streams over few connections each get their own answer", async () => {
    const node = await startNode();
    const bodies = Array.from({ length: 100 }, (_, i) => ask(`q ${i}`, { stream: true }));
    const texts = await Promise.all(bodies.map(async (body) => (await post(node, body)).text()));
    for (const [i, body] of bodies.entries()) {
      expect(contentOf(texts[i] ?? "")).toBe(expected(body));
    }
    expect(node.server.stats()).toMatchObject({ requests: 100, completed: 100, open: 0 });
  });

  it("keeps connections alive between requests", async () => {
    const node = await startNode();
    const agent = new Agent({ keepAlive: true, maxSockets: 1 });
    const ports = new Set<number | undefined>();
    for (let i = 0; i < 3; i++) {
      const response = await new Promise<IncomingMessage>((resolve, reject) => {
        get(`${node.url}/v1/models`, { agent }, resolve).on("error", reject);
      });
      ports.add(response.socket.localPort);
      response.resume();
      await new Promise((resolve) => response.on("end", resolve));
    }
    agent.destroy();
    expect(ports.size).toBe(1);
  });
});

describe("node server: faults", () => {
  const setFault = (node: Node, fault: unknown) => post(node, fault, "/fault");

  it("are set, read and cleared over HTTP; wrong ones are refused with what is accepted", async () => {
    const node = await startNode();
    const readFault = async () => (await fetch(`${node.url}/fault`)).json();
    expect(await readFault()).toEqual({});
    expect((await setFault(node, { failRate: 0.5, status: 500 })).status).toBe(200);
    expect(await readFault()).toEqual({ failRate: 0.5, status: 500 });
    await setFault(node, { slowFactor: 2 }); // Replaces, does not add.
    expect(await readFault()).toEqual({ slowFactor: 2 });
    for (const [fault, says] of [
      [{ failrate: 1 }, /unknown fault "failrate"; accepted: failRate, status/],
      [{ failRate: 2 }, /failRate must be a number from 0 to 1, not 2/],
      [{ body: "odd" }, /body must be one of garbage, .*huge_line, not "odd"/],
      [[], /must be a JSON object/],
      ["{", /not valid JSON/],
    ] as const) {
      const response = await setFault(node, fault);
      expect(response.status).toBe(400);
      expect((await json(response)).error.message).toMatch(says);
    }
    expect(parseFault({ slowFactor: Number.NaN })).toMatch(/not NaN/);
    expect(await readFault()).toEqual({ slowFactor: 2 });
    await fetch(`${node.url}/fault`, { method: "DELETE" });
    expect(await readFault()).toEqual({});
  });

  it("failRate: the share of errors that was asked for, with status and retry-after", async () => {
    const node = await startNode({ name: "shaky" });
    await setFault(node, { failRate: 1, status: 429, delayMs: 1, retryAfterS: 7 });
    const all = await post(node, ask("a"));
    expect([all.status, all.headers.get("retry-after")]).toEqual([429, "7"]);
    expect((await json(all)).error.message).toMatch(/on purpose/);
    await setFault(node, { failRate: 0.3, delayMs: 0 });
    const statuses: number[] = [];
    for (let i = 0; i < 200; i++) {
      statuses.push((await post(node, ask("a", { max_tokens: 1 }))).status);
    }
    const failed = statuses.filter((status) => status === 503).length;
    expect(statuses.filter((status) => status === 200)).toHaveLength(200 - failed);
    expect(Math.abs(failed - 60)).toBeLessThan(20);
    expect(node.server.stats().faulted).toBe(failed + 1);
  });

  it("refuse: cuts what runs and what comes, but can be healed", async () => {
    const node = await startNode({ speed: 1 });
    const running = stream(node, ask("a", { stream: true, headrace_output_tokens: 20_000 }));
    await until(() => expect(running.seen.text).toContain("content"));
    await setFault(node, { refuse: true });
    await until(() => expect(running.seen).toMatchObject({ isOver: true, isCut: true }));
    await expect(post(node, ask("b"))).rejects.toThrow();
    await expect(fetch(`${node.url}/health`)).rejects.toThrow();
    expect(node.engine.snapshot()).toMatchObject({ running: 0, waiting: 0 });
    await fetch(`${node.url}/fault`, { method: "DELETE" });
    expect((await fetch(`${node.url}/health`)).status).toBe(200);
  });

  it("hang: healthy to the eye, no first token, and all of it later", async () => {
    const node = await startNode();
    await setFault(node, { hang: true });
    const waiting = stream(node, ask("a", { stream: true }));
    await until(async () => expect(await metric(node, "vllm:num_requests_waiting")).toBe(1));
    expect((await fetch(`${node.url}/health`)).status).toBe(200);
    expect(waiting.seen).toMatchObject({ status: 0, text: "" });
    await fetch(`${node.url}/fault`, { method: "DELETE" });
    await until(() => expect(waiting.seen).toMatchObject({ isOver: true, isCut: false }));
    expect(contentOf(waiting.seen.text)).toBe(expected(ask("a")));
  });

  it("stallAfterTokens: exactly so many tokens, then silence until it is healed", async () => {
    const node = await startNode();
    const body = ask("a", { stream: true, headrace_output_tokens: 20 });
    for (const stallAfterTokens of [0, 5]) {
      await setFault(node, { stallAfterTokens });
      const stalled = stream(node, body);
      await until(() => expect(node.engine.snapshot().running).toBe(0));
      await until(() => {
        expect(stalled.seen.status).toBe(200);
        expect(contentOf(stalled.seen.text)).toBe(expected(body, stallAfterTokens));
      });
      expect(stalled.seen.isOver).toBe(false);
      await setFault(node, {});
      await until(() => expect(stalled.seen).toMatchObject({ isOver: true, isCut: false }));
      expect(contentOf(stalled.seen.text)).toBe(expected(body, 20));
    }
  });

  it("dieAfterTokens: so many tokens get out, then the connection is cut", async () => {
    const node = await startNode();
    for (const dieAfterTokens of [0, 7]) {
      await setFault(node, { dieAfterTokens });
      const body = ask("a", { stream: true, headrace_output_tokens: 50 });
      const dying = stream(node, body);
      await until(() => expect(dying.seen.isOver).toBe(true));
      expect(dying.seen.isCut).toBe(true);
      expect(contentOf(dying.seen.text)).toBe(expected(body, dieAfterTokens));
      await expect(post(node, ask("a", { headrace_output_tokens: 50 }))).rejects.toThrow();
    }
    await setFault(node, { dieAfterTokens: 51 });
    expect((await post(node, ask("a", { headrace_output_tokens: 50 }))).status).toBe(200);
    expect(node.server.stats()).toMatchObject({ open: 0, faulted: 4, aborts: 0 });
    expect(node.engine.snapshot()).toMatchObject({ running: 0, waiting: 0 });
  });

  it("slowFactor: steps take so many times as long (never less)", async () => {
    const node = await startNode({ speed: 100 });
    await setFault(node, { slowFactor: 10 });
    const startedAtMs = performance.now();
    await (await post(node, ask("a", { headrace_output_tokens: 50 }))).text();
    expect(performance.now() - startedAtMs).toBeGreaterThan((50 * 8.66 * 10) / 100);
  });

  it("body faults: every kind of answer that must not be believed", async () => {
    const node = await startNode();
    const read = async (body: NodeFault["body"], streamed: boolean) => {
      await setFault(node, { body });
      const response = await fetch(`${node.url}/v1/chat/completions`, {
        method: "POST",
        body: JSON.stringify(ask("a", { stream: streamed })),
        redirect: "manual",
      });
      return response;
    };
    for (const streamed of [false, true]) {
      const type = streamed ? "text/event-stream" : "application/json";
      for (const kind of ["garbage", "half_json"] as const) {
        const response = await read(kind, streamed);
        expect(response.headers.get("content-type")).toBe(type);
        const text = await response.text();
        expect(() => JSON.parse(text.replace(/^data: /, ""))).toThrow();
      }
      const html = await read("wrong_content_type", streamed);
      expect([html.status, html.headers.get("content-type")]).toEqual([200, "text/html"]);
      const error = await read("error_body", streamed);
      expect(error.status).toBe(200);
      const event = eventsOf(await error.text())[0] ?? "";
      expect(JSON.parse(event).error.message).toMatch(/out of memory/);
      const redirect = await read("redirect", streamed);
      expect([redirect.status, redirect.headers.has("location")]).toEqual([302, true]);
      const huge = await (await read("huge_line", streamed)).text();
      expect(Math.max(...huge.split("\n").map((line) => line.length))).toBeGreaterThan(1 << 20);
      const endless = await read("endless_stream", streamed);
      const reader = endless.body?.getReader();
      for (let bytes = 0; bytes < 100_000; ) bytes += (await reader?.read())?.value?.length ?? 0;
      await reader?.cancel();
    }
    // A wrong request is still told so.
    expect((await post(node, { model: MODEL })).status).toBe(400);
  });
});

describe("headrace node", () => {
  const folder = mkdtempSync(join(tmpdir(), "headrace-node-"));
  afterAll(() => rmSync(folder, { recursive: true }));

  const parse = async (args: string[]): Promise<Command> => {
    const command = nodeCommand()
      .exitOverride()
      .configureOutput({ writeErr: () => undefined });
    await command.parseAsync(args, { from: "user" });
    return command;
  };

  it("names the real port, tells the process that forked it, serves, and ends on SIGTERM", async () => {
    const log = vi.spyOn(console, "log").mockReturnValue();
    const send = vi.fn();
    const original = process.send;
    process.send = send;
    const before = new Set(process.listeners("SIGTERM"));
    try {
      const law = ["--law", "llama-3.1-8b/rtx4090"];
      await parse(["--port", "0", "--model", "m1", "--speed", "1000", ...law, "--fail-rate", "1"]);
      const line = String(log.mock.calls[0]?.[0]);
      const url = /listening on (http:\/\/127\.0\.0\.1:\d+) \(model m1; law llama/.exec(line)?.[1];
      expect(url, line).toBeDefined();
      const port = Number(new URL(url ?? "").port);
      expect(send).toHaveBeenCalledWith({ kind: "listening", port });
      const body = JSON.stringify({ messages: [{ role: "user", content: "a" }] });
      const failed = await fetch(`${url}/v1/chat/completions`, { method: "POST", body });
      expect(failed.status).toBe(503);
      await fetch(`${url}/fault`, { method: "DELETE" });
      const fine = await fetch(`${url}/v1/chat/completions`, { method: "POST", body });
      expect((await json(fine)).model).toBe("m1");
      const ends = process.listeners("SIGTERM").filter((listener) => !before.has(listener));
      expect(ends).toHaveLength(1);
      ends[0]?.("SIGTERM");
      await until(() => expect(fetch(`${url}/health`)).rejects.toThrow());
      expect(new Set(process.listeners("SIGTERM"))).toEqual(before);
    } finally {
      if (original === undefined) Reflect.deleteProperty(process, "send");
      else process.send = original;
      log.mockRestore();
    }
  });

  it("takes a law file as `headrace calibrate --out` writes it", async () => {
    const file = join(folder, "law.json");
    const shipped = lawByName("llama-3.1-8b/rtx4090");
    writeFileSync(file, formatLaw({ ...shipped, name: "our-card", kvBlocks: 100 }));
    const log = vi.spyOn(console, "log").mockReturnValue();
    const before = new Set(process.listeners("SIGTERM"));
    try {
      await parse(["--port", "0", "--law", file]);
      const line = String(log.mock.calls[0]?.[0]);
      expect(line).toContain("law our-card, validated");
      const url = /listening on (\S+) /.exec(line)?.[1] ?? "";
      const messages = [{ role: "user", content: "word ".repeat(1700) }];
      const answer = await fetch(`${url}/v1/chat/completions`, {
        method: "POST",
        body: JSON.stringify({ messages }),
      });
      expect(answer.status).toBe(400); // 100 blocks of 16 tokens are the file's, not the card's.
    } finally {
      for (const end of process.listeners("SIGTERM")) if (!before.has(end)) end("SIGTERM");
      log.mockRestore();
    }
  });

  it("says what is wrong with a flag and what is accepted", async () => {
    const node = await startNode();
    const taken = new URL(node.url).port;
    const broken = join(folder, "broken.json");
    writeFileSync(broken, "{}");
    for (const [args, says] of [
      [
        ["--law", "h300"],
        /"h300" is no shipped law, .* accepted: a law file of .* or one of llama-3\.1-8b/,
      ],
      [["--law", broken], /broken\.json: /],
      [["--port", "x"], /whole number from 0 to 65535/],
      [["--port", taken], new RegExp(`port ${taken} on 127.0.0.1 is taken`)],
      [["--port", "0", "--speed", "0"], /speed must be a number above 0/],
      [["--port", "0", "--fail-rate", "2"], /failRate must be a number from 0 to 1, not 2/],
      [["--port", "0", "--fail-status", "abc"], /status must be .*, not NaN/],
      [["--port", "0", "--body-fault", "x"], /body must be one of garbage/],
    ] as const) {
      await expect(parse([...args])).rejects.toThrow(says);
    }
  });
});
