/** Streams read byte by byte, whole answers judged, and each form turned into the other. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { AnswerPart } from "../transport/data-plane.ts";
import {
  assembleAnswer,
  checkWhole,
  SseScanner,
  statedError,
  wholeToSse,
} from "../transport/openai-answer.ts";

fc.configureGlobal({ seed: 20_251_124 });

const limits = { eventBytesMax: 1 << 20, headBytesMax: 1 << 20 };

type Chunk = Record<string, unknown>;

function chunk(delta: Chunk, finish: string | null = null, more: Chunk = {}): Chunk {
  return {
    id: "chatcmpl-1",
    object: "chat.completion.chunk",
    created: 1,
    model: "m",
    choices: [{ index: 0, delta, logprobs: null, finish_reason: finish }],
    ...more,
  };
}

const role = chunk({ role: "assistant", content: "" });
const usageEvent: Chunk = {
  id: "chatcmpl-1",
  object: "chat.completion.chunk",
  created: 1,
  model: "m",
  choices: [],
  usage: {
    prompt_tokens: 7,
    completion_tokens: 2,
    total_tokens: 9,
    prompt_tokens_details: { cached_tokens: 4 },
  },
};

function event(json: Chunk): string {
  return `data: ${JSON.stringify(json)}\n\n`;
}

const plainStream =
  event(role) +
  event(chunk({ content: "Hal" })) +
  ": keep-alive\n\n" +
  event(chunk({ content: "lo 🌍" })) +
  event(chunk({}, "stop")) +
  event(usageEvent) +
  "data: [DONE]\n\n";

/** Feeds the bytes cut at the given places, and ends. */
function scan(text: string | Uint8Array, cuts: readonly number[] = [], own = limits) {
  const bytes = typeof text === "string" ? Buffer.from(text) : Buffer.from(text);
  const scanner = new SseScanner(own);
  const places = [...new Set(cuts.map((cut) => cut % (bytes.length + 1)))].sort((a, b) => a - b);
  const parts: AnswerPart[] = [];
  let from = 0;
  for (const to of [...places, bytes.length]) {
    // A copy each, as from a socket: views into one buffer would hide mistakes about offsets.
    parts.push(...scanner.push(new Uint8Array(bytes.subarray(from, to))));
    from = to;
  }
  parts.push(...scanner.end());
  return { scanner, parts, text: textOf(parts) };
}

function textOf(parts: readonly AnswerPart[]): string {
  return Buffer.concat(parts.map((part) => part.bytes)).toString("utf8");
}

function facts({ scanner, parts }: ReturnType<typeof scan>) {
  const { released, contentEvents, finishReasons, done, usage, fault, complete } = scanner;
  const usageParts = parts.filter((part) => part.usage).map((part) => textOf([part]));
  return { released, contentEvents, finishReasons, done, usage, fault, complete, usageParts };
}

describe("sse scanner", () => {
  it("passes a whole stream on unchanged, the usage event in a part of its own", () => {
    const scanned = scan(plainStream);
    expect(scanned.text).toBe(plainStream);
    expect(facts(scanned)).toEqual({
      released: true,
      contentEvents: 2,
      finishReasons: ["stop"],
      done: true,
      usage: { promptTokens: 7, cachedTokens: 4, outputTokens: 2 },
      fault: null,
      complete: true,
      usageParts: [event(usageEvent)],
    });
    expect(scanned.parts.length).toBe(3);
  });

  it("holds everything back until the first content", () => {
    const scanner = new SseScanner(limits);
    expect(scanner.push(Buffer.from(event(role)))).toEqual([]);
    expect(scanner.push(Buffer.from(": still here\n\n"))).toEqual([]);
    expect(scanner.push(Buffer.from(event(chunk({ content: null }))))).toEqual([]);
    const parts = scanner.push(Buffer.from(event(chunk({ content: "x" }))));
    expect(textOf(parts)).toBe(
      `${event(role)}: still here\n\n${event(chunk({ content: null }))}${event(chunk({ content: "x" }))}`,
    );
    expect(parts.length).toBe(1);
  });

  it("gives one part per chunk once content has come, also when an event spans chunks", () => {
    const scanner = new SseScanner(limits);
    scanner.push(Buffer.from(event(chunk({ content: "a" }))));
    const b = event(chunk({ content: "b" }));
    expect(scanner.push(Buffer.from(b + b.slice(0, 40))).map((p) => p.bytes.length)).toEqual([
      b.length,
    ]);
    expect(scanner.push(Buffer.from(b.slice(40) + b)).map((p) => p.bytes.length)).toEqual([
      2 * b.length,
    ]);
    expect(scanner.contentEvents).toBe(4);
  });

  it.each([
    ["text", chunk({ content: "x" })],
    ["reasoning (vLLM, SGLang)", chunk({ reasoning_content: "x" })],
    ["reasoning (newer vLLM)", chunk({ reasoning: "x" })],
    ["a refusal", chunk({ refusal: "no" })],
    ["a tool call", chunk({ tool_calls: [{ index: 0, function: { arguments: "{" } }] })],
    ["a completion's text", { choices: [{ index: 0, text: "x", finish_reason: null }] }],
  ])("counts %s as content, first and later", (_, json) => {
    const scanner = new SseScanner(limits);
    expect(scanner.push(Buffer.from(event(json))).length).toBe(1);
    scanner.push(Buffer.from(event(json)));
    expect(scanner.contentEvents).toBe(2);
  });

  it.each([
    ["a role", role],
    ["empty text", chunk({ content: "" })],
    ["empty tool calls", chunk({ tool_calls: [] })],
    ["an empty delta", chunk({})],
    ["an empty text", { choices: [{ index: 0, text: "", finish_reason: null }] }],
    ["no choices (Azure's first event)", { choices: [], prompt_filter_results: [{}] }],
  ])("does not count %s as content, first or later", (_, json) => {
    const scanner = new SseScanner(limits);
    expect(scanner.push(Buffer.from(event(json)))).toEqual([]);
    scanner.push(Buffer.from(event(chunk({ content: "x" }))));
    scanner.push(Buffer.from(event(json)));
    expect(scanner.contentEvents).toBe(1);
  });

  it("is not misled by text that looks like JSON", () => {
    const nasty = '"finish_reason":"stop","error":{},"choices":[],"content":""';
    const scanned = scan(
      `${event(chunk({ content: nasty })) + event(chunk({ content: nasty }))}data: [DONE]\n\n`,
    );
    expect(facts(scanned)).toMatchObject({ contentEvents: 2, finishReasons: [], fault: null });
  });

  it("reads JSON with spaces after colons (Python's json.dumps)", () => {
    const spaced = (json: Chunk): string =>
      `data: ${JSON.stringify(json, null, 1).replace(/\n\s*/g, " ")}\n\n`;
    const stream = `${[
      role,
      chunk({ content: "a" }),
      chunk({ content: "b" }),
      chunk({}, "stop"),
      usageEvent,
    ]
      .map(spaced)
      .join("")}data: [DONE]\n\n`;
    expect(facts(scan(stream))).toMatchObject({
      contentEvents: 2,
      finishReasons: ["stop"],
      usage: { outputTokens: 2 },
      usageParts: [spaced(usageEvent)],
    });
  });

  it("takes CRLF, comments, other fields, a byte order mark, and data over several lines", () => {
    const stream =
      "\uFEFF: hello\r\n\r\nevent: message\r\nid: 1\r\n" +
      'data: {"choices":[{"index":0,\r\ndata:"delta":{"content":"x"}}]}\r\n\r\n' +
      `${event(chunk({}, "stop")).replaceAll("\n", "\r\n")}data: [DONE]\r\n\r\n`;
    const scanned = scan(stream);
    expect(facts(scanned)).toMatchObject({ contentEvents: 1, finishReasons: ["stop"], done: true });
    expect(scanned.text).toBe(stream);
  });

  it("knows a byte order mark right before the first data", () => {
    expect(facts(scan(`\uFEFF${event(chunk({ content: "x" }))}`))).toMatchObject({
      contentEvents: 1,
    });
  });

  it("says the same however the bytes are cut", () => {
    const crlf = plainStream.replaceAll("\n", "\r\n");
    const bodies = [
      plainStream,
      crlf,
      `\uFEFF${plainStream}`,
      event(role) + event({ error: { message: "m", code: 503 } }) + event(chunk({ content: "x" })),
      event(chunk({ content: "x" })) + event({ error: "Model is overloaded" }),
      `${event(chunk({ content: "x" }))}data: {oops}\n\n${event(chunk({ content: "y" }))}`,
      `${event(chunk({ content: "x" })) + event(chunk({}, "length"))}data: [DONE]`,
      `${event(chunk({ content: "x" }))}data: {"choices":[{"index":0,"delta":{"content":"y`,
    ].map((text) => ({ text, whole: scan(text) }));
    fc.assert(
      fc.property(
        fc.constantFrom(...bodies),
        fc.array(fc.nat(4000), { maxLength: 40 }),
        (body, cuts) => {
          const cut = scan(body.text, cuts);
          expect(cut.text).toBe(body.whole.text);
          expect(facts(cut)).toEqual(facts(body.whole));
        },
      ),
      { numRuns: 1000 },
    );
    for (const { text, whole } of bodies) {
      const single = scan(text, [...Array(Buffer.byteLength(text)).keys()]);
      expect(single.text).toBe(whole.text);
      expect(facts(single)).toEqual(facts(whole));
    }
  });

  it("says the same for any content, byte for byte", () => {
    const text = fc.array(fc.string({ unit: "binary", minLength: 1 }), {
      minLength: 1,
      maxLength: 8,
    });
    fc.assert(
      fc.property(text, fc.array(fc.nat(4000), { maxLength: 12 }), (texts, cuts) => {
        const stream = [...texts.map((t) => event(chunk({ content: t }))), "data: [DONE]\n\n"].join(
          "",
        );
        const scanned = scan(stream, cuts);
        expect(scanned.text).toBe(stream);
        expect(facts(scanned)).toMatchObject({
          contentEvents: texts.length,
          fault: null,
          done: true,
        });
      }),
      { numRuns: 300 },
    );
  });

  it("stops at an error event: what came before goes out, the event does not", () => {
    const scanned = scan(
      event(chunk({ content: "a" })) +
        event({ error: { message: "boom", code: 400 } }) +
        event(role),
    );
    expect(scanned.text).toBe(event(chunk({ content: "a" })));
    expect(scanned.scanner.fault).toMatchObject({ kind: "error_event", status: 400 });
    expect(scanned.scanner.complete).toBe(false);
  });

  it.each(["error", "abort"])("takes finish_reason %s for an error", (reason) => {
    expect(scan(event(chunk({}, reason))).scanner.fault?.kind).toBe("error_event");
  });

  it("refuses an event over its bound, whole or unfinished", () => {
    const small = { eventBytesMax: 400, headBytesMax: 1000 };
    const long = event(chunk({ content: "x".repeat(500) }));
    expect(scan(long, [], small).scanner.fault).toEqual({ kind: "event_too_long" });
    expect(scan(long.slice(0, -2), [100, 200], small).scanner.fault).toEqual({
      kind: "event_too_long",
    });
    expect(scan(event(chunk({ content: "x" })).repeat(20), [], small).scanner.fault).toBeNull();
  });

  it("refuses a head over its bound", () => {
    const small = { eventBytesMax: 400, headBytesMax: 1000 };
    const scanner = new SseScanner(small);
    for (let i = 0; i < 200 && scanner.fault === null; i++) scanner.push(Buffer.from(": wait\n\n"));
    expect(scanner.fault).toEqual({ kind: "head_too_long" });
  });

  it("refuses what is not JSON before the first content", () => {
    expect(scan("data: <html>\n\n").scanner.fault).toEqual({ kind: "not_json" });
    expect(scan("data: 42\n\n").scanner.fault).toEqual({ kind: "not_json" });
  });

  it("ends a finished stream with [DONE] where the node did not", () => {
    const stream = event(chunk({ content: "x" })) + event(chunk({}, "stop"));
    const scanned = scan(stream);
    expect(scanned.text).toBe(`${stream}data: [DONE]\n\n`);
    expect(facts(scanned)).toMatchObject({ complete: true, done: false });
  });

  it("knows a stream that ended without a finish", () => {
    expect(scan(event(chunk({ content: "x" }))).scanner.complete).toBe(false);
    expect(scan("").scanner.complete).toBe(false);
    expect(scan("data: [DONE]\n\n").scanner.complete).toBe(false);
    expect(scan(`${event(chunk({ content: "x" }))}data: [DONE]\n\n`).scanner.complete).toBe(true);
  });

  it("drops an event that was cut off in its middle", () => {
    const whole = event(chunk({ content: "x" }));
    const scanned = scan(whole + event(chunk({ content: "yyyy" })).slice(0, -12));
    expect(scanned.text).toBe(whole);
    expect(scanned.scanner.fault).toBeNull();
  });

  it("releases an answer that ends without any content", () => {
    const stream = `${event(role)}${event(chunk({}, "stop"))}data: [DONE]\n\n`;
    expect(scan(stream).text).toBe(stream);
  });

  it("ignores what follows [DONE]", () => {
    expect(scan(`${plainStream}data: {"x":1}\n\n`).text).toBe(plainStream);
  });
});

// ---- whole answers ------------------------------------------------------------------------------------------

function whole(message: Chunk, finish: string | null = "stop", more: Chunk = {}): Chunk {
  return {
    id: "chatcmpl-1",
    object: "chat.completion",
    created: 1,
    model: "m",
    choices: [
      {
        index: 0,
        message: { role: "assistant", ...message },
        logprobs: null,
        finish_reason: finish,
      },
    ],
    usage: { prompt_tokens: 7, completion_tokens: 2, total_tokens: 9 },
    ...more,
  };
}

function bytes(json: unknown): Uint8Array {
  return Buffer.from(JSON.stringify(json));
}

describe("whole answers", () => {
  it("may be kept when complete and plain text", () => {
    expect(checkWhole("chat", bytes(whole({ content: "hi" })))).toEqual({
      usage: { promptTokens: 7, cachedTokens: 0, outputTokens: 2 },
      finishReasons: ["stop"],
      notStorable: null,
    });
    const completion = {
      object: "text_completion",
      choices: [{ index: 0, text: "hi", finish_reason: "stop" }],
    };
    expect(checkWhole("completions", bytes(completion))).toMatchObject({ notStorable: null });
    const vectors = {
      object: "list",
      data: [{ embedding: [0.1, 0.2] }],
      usage: { prompt_tokens: 3 },
    };
    expect(checkWhole("embeddings", bytes(vectors))).toMatchObject({
      notStorable: null,
      usage: { promptTokens: 3, outputTokens: 0 },
    });
    const base64 = { data: [{ embedding: "AAAA" }] };
    expect(checkWhole("embeddings", bytes(base64))).toMatchObject({ notStorable: null });
  });

  it.each([
    ["finish_reason length", whole({ content: "hi" }, "length")],
    ["finish_reason missing", whole({ content: "hi" }, null)],
    ["tool calls", whole({ content: null, tool_calls: [{ id: "1" }] })],
    ["function call", whole({ content: null, function_call: { name: "f" } })],
    ["refusal", whole({ content: "", refusal: "no" })],
    ["audio", whole({ content: "x", audio: { id: "a" } })],
    ["images", whole({ content: "x", images: [{}] })],
    ["not text", whole({ content: [{ type: "text" }] })],
    ["not text", whole({ content: null })],
    ["empty", whole({ content: "" })],
  ])("must not be kept: %s", (reason, json) => {
    expect(checkWhole("chat", bytes(json))).toMatchObject({ notStorable: reason });
  });

  it("must not be kept when one choice of several is cut short", () => {
    const json = whole({ content: "a" });
    const choices = json.choices as Chunk[];
    choices.push({
      index: 1,
      message: { role: "assistant", content: "b" },
      finish_reason: "length",
    });
    expect(checkWhole("chat", bytes(json))).toMatchObject({ notStorable: "finish_reason length" });
  });

  it.each([
    ["half JSON", "chat", '{"choices":[{"ind'],
    ["an array", "chat", "[]"],
    ["OpenAI's error body", "chat", '{"error":{"message":"m"}}'],
    ["TGI's error body", "chat", '{"error":"Model is overloaded","error_type":"overloaded"}'],
    ["vLLM's old error body", "chat", '{"object":"error","message":"m","code":400}'],
    ["no choices", "chat", '{"choices":[]}'],
    ["no message", "chat", '{"choices":[{"text":"x"}]}'],
    ["no text", "completions", '{"choices":[{"message":{}}]}'],
    ["no data", "embeddings", '{"data":[]}'],
    ["no vectors", "embeddings", '{"data":[{"embedding":[]}]}'],
  ] as const)("are bad: %s", (_, route, text) => {
    expect(checkWhole(route, Buffer.from(text))).toHaveProperty("bad");
  });

  it("state the status of an error in their body", () => {
    expect(statedError('{"error":{"message":"m","code":422}}')).toEqual({ status: 422 });
    expect(statedError('{"object":"error","code":"404"}')).toEqual({ status: 404 });
    expect(statedError('{"error":"x"}')).toEqual({});
    expect(statedError('{"choices":[]}')).toBeNull();
    expect(statedError("oops")).toBeNull();
  });
});

// ---- from one form to the other ---------------------------------------------------------------------------------

function assembled(route: "chat" | "completions", events: readonly Uint8Array[]) {
  const result = assembleAnswer(
    route,
    events.map((bytes) => ({ bytes, usage: false })),
  );
  if (result.body === undefined) throw new Error(result.bad);
  return { json: JSON.parse(Buffer.from(result.body).toString()) as Chunk, ...result };
}

const anyText = fc.string({ unit: "binary", maxLength: 400 });
const anyLogprobs = fc.option(
  fc.record({
    content: fc.array(
      fc.record({ token: fc.string(), logprob: fc.double({ noNaN: true, max: 0, min: -99 }) }),
    ),
    refusal: fc.constant(null),
  }),
);
const anyUsage = fc.record({
  prompt_tokens: fc.nat(),
  completion_tokens: fc.nat(),
  total_tokens: fc.nat(),
});
const anyHead = {
  id: fc.string(),
  created: fc.nat(),
  model: fc.string({ minLength: 1 }),
  usage: anyUsage,
};
const anyFinish = fc.constantFrom("stop", "length", "content_filter");

const anyChat = fc
  .record({
    ...anyHead,
    system_fingerprint: fc.option(fc.string()),
    service_tier: fc.constantFrom(null, "default"),
    prompt_logprobs: fc.constant(null),
    messages: fc.array(
      fc.record({
        message: fc.record(
          {
            role: fc.constant("assistant"),
            content: fc.option(anyText),
            reasoning_content: fc.option(anyText),
            refusal: fc.option(anyText),
            annotations: fc.constantFrom([], null),
            tool_calls: fc.array(
              fc.record({
                id: fc.string(),
                type: fc.constant("function"),
                function: fc.record({ name: fc.string(), arguments: fc.json() }),
              }),
              { maxLength: 3 },
            ),
          },
          { requiredKeys: ["role", "content"] },
        ),
        logprobs: anyLogprobs,
        finish_reason: anyFinish,
        stop_reason: fc.option(fc.nat()),
      }),
      { minLength: 1, maxLength: 5 },
    ),
  })
  .map(({ messages, ...rest }) => ({
    ...rest,
    object: "chat.completion",
    choices: messages.map((choice, index) => ({ index, ...choice })),
  }));

const anyCompletion = fc
  .record({
    ...anyHead,
    texts: fc.array(
      fc.record({ text: anyText, logprobs: fc.constant(null), finish_reason: anyFinish }),
      {
        minLength: 1,
        maxLength: 5,
      },
    ),
  })
  .map(({ texts, ...rest }) => ({
    ...rest,
    object: "text_completion",
    choices: texts.map((choice, index) => ({ index, ...choice })),
  }));

describe("a replay", () => {
  it("assembles to the same chat answer, within 64 events", () => {
    fc.assert(
      fc.property(anyChat, (json) => {
        const events = wholeToSse("chat", bytes(json), { includeUsage: true });
        expect(events.length).toBeLessThanOrEqual(64);
        expect(assembled("chat", events).json).toEqual(JSON.parse(JSON.stringify(json)));
      }),
      { numRuns: 300 },
    );
  });

  it("assembles to the same completion, within 64 events", () => {
    fc.assert(
      fc.property(anyCompletion, (json) => {
        const events = wholeToSse("completions", bytes(json), { includeUsage: true });
        expect(events.length).toBeLessThanOrEqual(64);
        expect(assembled("completions", events).json).toEqual(json);
      }),
      { numRuns: 300 },
    );
  });

  it("is a stream that the scanner takes for complete", () => {
    fc.assert(
      fc.property(anyChat, (json) => {
        const text = Buffer.concat(
          wholeToSse("chat", bytes(json), { includeUsage: true }),
        ).toString();
        const { scanner, text: passed } = scan(text);
        expect(scanner).toMatchObject({ fault: null, done: true, complete: true });
        expect(scanner.finishReasons).toEqual(json.choices.map((choice) => choice.finish_reason));
        expect(passed).toBe(text);
      }),
      { numRuns: 100 },
    );
  });

  it("has OpenAI's order: role, text, finish, usage, [DONE]", () => {
    const events = wholeToSse("chat", bytes(whole({ content: "x".repeat(60) })), {
      includeUsage: true,
    });
    const texts = events.map((e) => Buffer.from(e).toString());
    expect(texts.at(-1)).toBe("data: [DONE]\n\n");
    const jsons = texts.slice(0, -1).map((text) => JSON.parse(text.slice(6)) as Chunk);
    const deltas = jsons.slice(0, -1).map((json) => (json.choices as Chunk[])[0]);
    expect(deltas[0]).toMatchObject({
      delta: { role: "assistant", content: "" },
      finish_reason: null,
    });
    expect(
      deltas
        .slice(1, -1)
        .map((d) => (d?.delta as Chunk | undefined)?.content)
        .join(""),
    ).toBe("x".repeat(60));
    expect(deltas.length).toBeGreaterThan(3);
    expect(deltas.at(-1)).toMatchObject({ delta: {}, finish_reason: "stop" });
    expect(jsons.at(-1)).toMatchObject({ choices: [], usage: { total_tokens: 9 } });
    expect(jsons[0]).toMatchObject({ object: "chat.completion.chunk", usage: null });
  });

  it("says nothing of usage unless asked", () => {
    const events = wholeToSse("chat", bytes(whole({ content: "x" })), { includeUsage: false });
    expect(Buffer.concat(events).toString()).not.toContain("usage");
  });

  it("never splits a code point", () => {
    const events = wholeToSse("chat", bytes(whole({ content: "🌍".repeat(3000) })), {
      includeUsage: false,
    });
    expect(events.length).toBeLessThanOrEqual(64);
    for (const one of events) expect(Buffer.from(one).toString()).not.toMatch(/\\ud[89a-f]/i);
  });

  it("carries 128 choices within 64 events", () => {
    const choices = Array.from({ length: 128 }, (_, index) => ({
      index,
      message: { role: "assistant", content: `answer ${index}` },
      finish_reason: "stop",
    }));
    const json = { object: "chat.completion", id: "1", choices };
    const events = wholeToSse("chat", bytes(json), { includeUsage: false });
    expect(events.length).toBeLessThanOrEqual(64);
    expect(assembled("chat", events).json).toEqual(json);
  });

  it("is empty for what is not an answer", () => {
    expect(wholeToSse("chat", Buffer.from("{"), { includeUsage: false })).toEqual([]);
    expect(wholeToSse("chat", bytes({ error: {} }), { includeUsage: false })).toEqual([]);
  });
});

describe("assembling", () => {
  const part = (text: string): AnswerPart => ({ bytes: Buffer.from(text), usage: false });

  it("makes the whole answer of a stream, cut anywhere", () => {
    const result = assembleAnswer("chat", [
      part(plainStream.slice(0, 100)),
      part(plainStream.slice(100)),
    ]);
    expect(result).toMatchObject({
      notStorable: null,
      usage: { promptTokens: 7, cachedTokens: 4, outputTokens: 2 },
    });
    const json = JSON.parse(Buffer.from(result.body ?? []).toString()) as Chunk;
    expect(json).toMatchObject({
      id: "chatcmpl-1",
      object: "chat.completion",
      choices: [
        { index: 0, message: { role: "assistant", content: "Hallo 🌍" }, finish_reason: "stop" },
      ],
      usage: { total_tokens: 9 },
    });
  });

  it("puts tool calls together, and says that they must not be kept", () => {
    const pieces = [
      {
        tool_calls: [
          { index: 0, id: "c1", type: "function", function: { name: "f", arguments: "" } },
        ],
      },
      { tool_calls: [{ index: 0, function: { arguments: '{"a":' } }] },
      {
        tool_calls: [
          { index: 1, id: "c2", type: "function", function: { name: "g", arguments: "{}" } },
        ],
      },
      { tool_calls: [{ index: 0, function: { arguments: "1}" } }] },
    ];
    const stream = [role, ...pieces.map((piece) => chunk(piece)), chunk({}, "stop")]
      .map(event)
      .join("");
    const result = assembleAnswer("chat", [part(stream)]);
    expect(result).toMatchObject({ notStorable: "tool calls" });
    const json = JSON.parse(Buffer.from(result.body ?? []).toString()) as {
      choices: { message: Chunk }[];
    };
    expect(json.choices[0]?.message.tool_calls).toEqual([
      { id: "c1", type: "function", function: { name: "f", arguments: '{"a":1}' } },
      { id: "c2", type: "function", function: { name: "g", arguments: "{}" } },
    ]);
  });

  it("joins log probabilities", () => {
    const withLogprobs = (content: string): Chunk => ({
      choices: [
        {
          index: 0,
          delta: { content },
          logprobs: { content: [{ token: content }] },
          finish_reason: null,
        },
      ],
    });
    const stream = [withLogprobs("a"), withLogprobs("b"), chunk({}, "stop")].map(event).join("");
    const result = assembleAnswer("chat", [part(stream)]);
    const json = JSON.parse(Buffer.from(result.body ?? []).toString()) as { choices: Chunk[] };
    expect(json.choices[0]?.logprobs).toEqual({ content: [{ token: "a" }, { token: "b" }] });
  });

  it("cannot be led to change a prototype", () => {
    const evil =
      'data: {"__proto__":{"x":1},"choices":[{"index":0,"delta":{"__proto__":{"y":1},"content":"a"}}]}\n\n';
    const result = assembleAnswer("chat", [part(evil + event(chunk({}, "stop")))]);
    expect(result.body).toBeDefined();
    expect(({} as Chunk).x).toBeUndefined();
    expect(Buffer.from(result.body ?? []).toString()).not.toContain('"y"');
  });

  it.each([
    ["no events", ": nothing\n\n"],
    ["half an event", 'data: {"choices"\n\n'],
    ["not objects", "data: 1\n\n"],
    ["an error event", event({ error: { message: "m" } })],
    ["no choices", event({ id: "1" })],
  ])("is bad: %s", (_, text) => {
    expect(assembleAnswer("chat", [part(text)])).toHaveProperty("bad");
  });
});
