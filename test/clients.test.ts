/**
 * The clients that people have: OpenAI's own package and the AI SDK, unchanged, against a served gateway and through
 * the embedded fetch. Whatever they can do with OpenAI's API, they can do here; errors arrive as their own classes.
 */
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embed, generateText, jsonSchema, streamText } from "ai";
import OpenAI, {
  AuthenticationError,
  BadRequestError,
  InternalServerError,
  NotFoundError,
  PermissionDeniedError,
  RateLimitError,
} from "openai";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { createHeadrace } from "../transport/embed.ts";
import {
  answerText,
  answerTokens,
  embeddingOf,
  promptMaterial,
} from "../transport/node-answers.ts";
import type { NodeServer } from "../transport/node-server.ts";
import type { OptionsInput } from "../transport/options.ts";
import { MODEL, startLiveWorld, startNodes, until, untilModelsKnown } from "./live-world.ts";

const KEY = "key-of-acme-1";
const options = {
  keys: [
    { key: KEY, tenant: "acme" },
    { key: "key-of-tiny-1", tenant: "tiny", limits: { requestsPerMinute: 1, requestBurst: 1 } },
    { key: "key-of-slow-1", tenant: "slow", limits: { requestsPerMinute: 60, requestBurst: 1 } },
    { key: "key-of-small-1", tenant: "small", models: ["small"] },
  ],
  retry: { attemptsMax: 1 },
} satisfies Partial<OptionsInput>;
const models = [MODEL, "small"];

type Fetch = (input: string | URL | Request, init?: RequestInit) => Promise<Response>;
/** What a client needs to know, and what a test looks at behind it. */
type Target = {
  baseURL: string;
  fetch?: Fetch;
  node: NodeServer;
  close: () => Promise<void>;
};

async function served(): Promise<Target> {
  const world = await startLiveWorld({ options, models });
  const [node] = world.nodes;
  if (node === undefined) throw new Error("a world has a node");
  return { baseURL: `${world.url}/v1`, node, close: () => world.close() };
}

async function embedded(): Promise<Target> {
  const live = await startNodes(1, { models });
  const [node] = live.nodes;
  if (node === undefined) throw new Error("there is one node");
  const headrace = await createHeadrace({ ...options, nodes: live.urls.map((url) => ({ url })) });
  await untilModelsKnown(() => headrace.stats(), 1);
  const close = async () => {
    await headrace.close();
    await live.close();
  };
  return { baseURL: "http://headrace/v1", fetch: headrace.fetch, node, close };
}

const carriers: [name: string, start: () => Promise<Target>][] = [
  ["a served gateway", served],
  ["the embedded fetch", embedded],
];

const weather = {
  type: "object" as const,
  properties: { city: { type: "string" as const } },
  required: ["city"],
};

/** What the node says to one user message. */
function answerTo(content: string): string {
  const material = promptMaterial({ messages: [{ role: "user", content }] }, MODEL);
  return answerText(material, answerTokens(material));
}

describe.each(carriers)("clients: openai through %s", (_, start) => {
  let target: Target;
  let openai: OpenAI;
  const client = (apiKey: string, maxRetries = 0) =>
    new OpenAI({
      apiKey,
      maxRetries,
      baseURL: target.baseURL,
      ...(target.fetch === undefined ? {} : { fetch: target.fetch }),
    });
  beforeAll(async () => {
    target = await start();
    openai = client(KEY);
  });
  afterAll(() => target.close());
  afterEach(() => target.node.setFault({}));

  const ask = (content: string) => ({
    model: MODEL,
    messages: [{ role: "user" as const, content }],
  });

  it("chat: the node's answer arrives whole", async () => {
    const answer = await openai.chat.completions.create(ask("What is a headrace?"));
    expect(answer.choices[0]?.message).toMatchObject({
      role: "assistant",
      content: answerTo("What is a headrace?"),
    });
    expect(answer.choices[0]?.finish_reason).toBe("stop");
    expect(answer.usage?.total_tokens).toBe(
      (answer.usage?.prompt_tokens ?? 0) + (answer.usage?.completion_tokens ?? 0),
    );
  });

  it("chat: what happened stands in the headers", async () => {
    const { response, request_id } = await openai.chat.completions
      .create(ask("Again?"))
      .withResponse();
    expect(response.headers.get("x-headrace-cache")).toBe("miss");
    expect(request_id).toBe(response.headers.get("x-request-id"));
    const second = await openai.chat.completions.create(ask("Again?")).withResponse();
    expect(second.response.headers.get("x-headrace-cache")).toBe("hit-exact");
  });

  it("stream: events arrive in order and make the same text; usage only where it was asked for", async () => {
    const stream = await openai.chat.completions.create({ ...ask("Stream it."), stream: true });
    let text = "";
    let finish: string | null = null;
    for await (const chunk of stream) {
      expect(chunk.usage ?? null).toBeNull();
      text += chunk.choices[0]?.delta.content ?? "";
      finish = chunk.choices[0]?.finish_reason ?? finish;
    }
    expect({ text, finish }).toEqual({ text: answerTo("Stream it."), finish: "stop" });

    const counted = await openai.chat.completions.create({
      ...ask("Count it."),
      stream: true,
      stream_options: { include_usage: true },
    });
    const usages = [];
    for await (const chunk of counted) if (chunk.usage != null) usages.push(chunk.usage);
    expect(usages).toHaveLength(1);
    expect(usages[0]?.completion_tokens).toBeGreaterThan(0);
  });

  it("stream: a stored answer is replayed as a stream", async () => {
    const whole = await openai.chat.completions.create(ask("Store it."));
    const stream = await openai.chat.completions.create({ ...ask("Store it."), stream: true });
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
    expect(text).toBe(whole.choices[0]?.message.content);
    expect(target.node.stats().open).toBe(0);
  });

  it.each([false, true])(
    "tools: the call passes through with its arguments (stream: %s)",
    async (stream) => {
      const request = {
        ...ask("call tool get_weather"),
        tools: [
          {
            type: "function" as const,
            function: { name: "get_weather", parameters: { ...weather } },
          },
        ],
      };
      const answer = stream
        ? await openai.chat.completions.stream(request).finalChatCompletion()
        : await openai.chat.completions.create(request);
      const [call] = answer.choices[0]?.message.tool_calls ?? [];
      expect(answer.choices[0]?.finish_reason).toBe("tool_calls");
      expect(call?.type === "function" ? call.function.name : undefined).toBe("get_weather");
      expect(JSON.parse(call?.type === "function" ? call.function.arguments : "")).toHaveProperty(
        "text",
      );
    },
  );

  it("completions: the old route answers too", async () => {
    const answer = await openai.completions.create({
      model: MODEL,
      prompt: "Once upon",
      max_tokens: 4,
    });
    expect(answer.choices[0]?.text.trim().split(" ")).toHaveLength(4);
    expect(answer.choices[0]?.finish_reason).toBe("length");
  });

  it("embeddings: vectors arrive, as numbers and as base64", async () => {
    const answer = await openai.embeddings.create({ model: MODEL, input: ["one", "two"] });
    const expected = embeddingOf("one", 384);
    expect(answer.data.map(({ index }) => index)).toEqual([0, 1]);
    expect(answer.data[0]?.embedding).toHaveLength(384);
    expect(answer.data[0]?.embedding[0]).toBeCloseTo(expected[0] ?? Number.NaN, 6);
    const numbers = await openai.embeddings.create({
      model: MODEL,
      input: "one",
      encoding_format: "float",
      dimensions: 8,
    });
    expect(numbers.data[0]?.embedding).toHaveLength(8);
  });

  it("models: what the key may use is listed", async () => {
    const names = async (apiKey: string) =>
      (await client(apiKey).models.list()).data.map(({ id }) => id);
    expect(await names(KEY)).toEqual(models);
    expect(await names("key-of-small-1")).toEqual(["small"]);
  });

  it("errors: AuthenticationError for a key that nobody knows", async () => {
    const error = await failureOf(client("wrong-key").chat.completions.create(ask("hello")));
    expect(error).toBeInstanceOf(AuthenticationError);
    expect(error).toMatchObject({ status: 401, code: "invalid_key" });
  });

  it("errors: PermissionDeniedError for a model that the key may not use", async () => {
    const error = await failureOf(client("key-of-small-1").chat.completions.create(ask("hello")));
    expect(error).toBeInstanceOf(PermissionDeniedError);
    expect(error).toMatchObject({ status: 403, code: "model_not_allowed", param: "model" });
  });

  it("errors: NotFoundError for an unknown model, with those that there are", async () => {
    const error = await failureOf(
      openai.chat.completions.create({ ...ask("hello"), model: "gpt-9" }),
    );
    expect(error).toBeInstanceOf(NotFoundError);
    expect(error).toMatchObject({ status: 404, code: "model_not_found" });
    for (const name of models) expect(String(error)).toContain(name);
  });

  it("errors: BadRequestError names the parameter", async () => {
    const error = await failureOf(
      openai.chat.completions.create({ ...ask("hello"), temperature: 3 }),
    );
    expect(error).toBeInstanceOf(BadRequestError);
    expect(error).toMatchObject({ status: 400, code: "invalid_request", param: "temperature" });
  });

  it("errors: RateLimitError with retry-after", async () => {
    const tiny = client("key-of-tiny-1");
    await tiny.chat.completions.create(ask("the only one"));
    const error = await failureOf(tiny.chat.completions.create(ask("one too many")));
    expect(error).toBeInstanceOf(RateLimitError);
    expect(error).toMatchObject({ status: 429, code: "rate_limit_requests" });
    expect(Number((error as RateLimitError).headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
  });

  it("errors: a client that retries waits as long as it is told, and gets its answer", async () => {
    const slow = client("key-of-slow-1", 2);
    for (const content of ["first", "second"]) {
      const answer = await slow.chat.completions.create(ask(content));
      expect(answer.choices[0]?.message.content).toBe(answerTo(content));
    }
  });

  it("errors: InternalServerError where the node fails", async () => {
    target.node.setFault({ failRate: 1, status: 500, delayMs: 0 });
    const error = await failureOf(openai.chat.completions.create(ask("a failing node")));
    expect(error).toBeInstanceOf(InternalServerError);
    expect(error).toMatchObject({ status: 502, code: "upstream_failed" });
  });

  it("errors: a stream that breaks throws in the loop, after what had come", async () => {
    target.node.setFault({ dieAfterTokens: 3 });
    const stream = await openai.chat.completions.create({ ...ask("Break it."), stream: true });
    let text = "";
    const error = await failureOf(
      (async () => {
        for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
      })(),
    );
    expect(error).toMatchObject({ code: "stream_broken" });
    expect(answerTo("Break it.").startsWith(text)).toBe(true);
    expect(text.trim().split(" ")).toHaveLength(3);
  });

  it("abort: breaking out of a stream ends the generation on the node", async () => {
    target.node.setFault({ stallAfterTokens: 2 });
    const before = target.node.stats().aborts;
    const stream = await openai.chat.completions.create({ ...ask("Abort it."), stream: true });
    for await (const chunk of stream) if ((chunk.choices[0]?.delta.content ?? "") !== "") break;
    await until("the node sees the abort", () => target.node.stats().aborts === before + 1);
    expect(target.node.stats().open).toBe(0);
  });

  it("abort: a signal ends a request that waits for its first token", async () => {
    target.node.setFault({ hang: true });
    const before = target.node.stats().aborts;
    const controller = new AbortController();
    const request = openai.chat.completions.create(ask("Never answered."), {
      signal: controller.signal,
    });
    const failure = failureOf(request);
    await until("the node has it", () => target.node.stats().open === 1);
    controller.abort();
    expect(await failure).toBeInstanceOf(OpenAI.APIUserAbortError);
    await until("the node sees the abort", () => target.node.stats().aborts === before + 1);
  });
});

describe.each(carriers)("clients: the AI SDK through %s", (_, start) => {
  let target: Target;
  const provider = (apiKey = KEY) =>
    createOpenAICompatible({
      name: "headrace",
      apiKey,
      baseURL: target.baseURL,
      includeUsage: true,
      ...(target.fetch === undefined ? {} : { fetch: target.fetch }),
    });
  beforeAll(async () => {
    target = await start();
  });
  afterAll(() => target.close());
  afterEach(() => target.node.setFault({}));

  it("generateText: the node's answer arrives with its usage", async () => {
    const { text, usage, finishReason } = await generateText({
      model: provider()(MODEL),
      prompt: "What is a tailrace?",
      maxRetries: 0,
    });
    // The SDK sends the prompt as a message of one text.
    expect({ text, finishReason }).toEqual({
      text: answerTo("What is a tailrace?"),
      finishReason: "stop",
    });
    expect(usage.outputTokens).toBe(text.trim().split(" ").length);
  });

  it("streamText: the same text in pieces, and the usage at the end", async () => {
    const { textStream, usage } = streamText({
      model: provider()(MODEL),
      prompt: "Stream a tailrace.",
      maxRetries: 0,
    });
    const pieces: string[] = [];
    for await (const piece of textStream) pieces.push(piece);
    expect(pieces.length).toBeGreaterThan(1);
    expect(pieces.join("")).toBe(answerTo("Stream a tailrace."));
    expect((await usage).outputTokens).toBe(pieces.join("").trim().split(" ").length);
  });

  it.each([false, true])("tools: a call arrives parsed (stream: %s)", async (stream) => {
    const request = {
      model: provider()(MODEL),
      prompt: "call tool get_weather",
      maxRetries: 0,
      tools: { get_weather: { inputSchema: jsonSchema({ ...weather }) } },
    };
    const { toolCalls, finishReason } = stream ? streamText(request) : await generateText(request);
    const [call] = await toolCalls;
    expect(await finishReason).toBe("tool-calls");
    expect(call).toMatchObject({ toolName: "get_weather", input: { text: expect.any(String) } });
  });

  it("embed: a vector arrives", async () => {
    const { embedding } = await embed({
      model: provider().textEmbeddingModel(MODEL),
      value: "one",
      maxRetries: 0,
    });
    expect(embedding).toHaveLength(384);
  });

  it.each([
    ["wrong-key", {}, 401, false],
    [KEY, { temperature: 3 }, 400, false],
    ["key-of-small-1", {}, 403, false],
  ] as const)(
    "errors: APICallError with its status (%s %o)",
    async (apiKey, settings, status, isRetryable) => {
      const error = await failureOf(
        generateText({
          model: provider(apiKey)(MODEL),
          prompt: "hello",
          maxRetries: 0,
          ...settings,
        }),
      );
      expect(APICallError.isInstance(error)).toBe(true);
      expect(error).toMatchObject({ statusCode: status, isRetryable });
    },
  );

  it("errors: an unknown model is named with those that there are; a limit is retryable", async () => {
    const unknown = await failureOf(
      generateText({ model: provider()("gpt-9"), prompt: "hello", maxRetries: 0 }),
    );
    expect(unknown).toMatchObject({ statusCode: 404, message: expect.stringContaining(MODEL) });
    const tiny = { model: provider("key-of-tiny-1")(MODEL), maxRetries: 0 };
    await generateText({ ...tiny, prompt: "the only one" });
    const limited = await failureOf(generateText({ ...tiny, prompt: "one too many" }));
    expect(limited).toMatchObject({ statusCode: 429, isRetryable: true });
    expect((limited as APICallError).responseHeaders?.["retry-after"]).toMatch(/^\d+$/);
  });

  it("abort: a signal ends the generation on the node", async () => {
    target.node.setFault({ stallAfterTokens: 2 });
    const before = target.node.stats().aborts;
    const controller = new AbortController();
    const { textStream } = streamText({
      model: provider()(MODEL),
      prompt: "Abort a tailrace.",
      abortSignal: controller.signal,
      maxRetries: 0,
      onError: () => {}, // Its default writes to the console.
    });
    for await (const _piece of textStream) controller.abort();
    await until("the node sees the abort", () => target.node.stats().aborts === before + 1);
  });
});

/** What a promise fails with; throws when it does not. */
async function failureOf(promise: Promise<unknown>): Promise<unknown> {
  const nothing = Symbol("no failure");
  const failure = await promise.then(
    () => nothing,
    (error: unknown) => error,
  );
  if (failure === nothing) throw new Error("it should have failed");
  return failure;
}
