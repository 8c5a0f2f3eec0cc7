import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { affinityKeyOf, type ReadRequest, RequestReader } from "../transport/openai-request.ts";

const limits = { messagesMax: 100, maxTokensMax: 10_000 };

function read(body: unknown, tenant = "t", recordsPrefixes = false): ReadRequest {
  const bytes = Buffer.from(JSON.stringify(body));
  const request = new RequestReader(limits, { prefixes: recordsPrefixes, questions: false }).read(
    "chat",
    bytes,
    tenant,
  );
  if ("code" in request) throw new Error(request.message);
  return request;
}

const base = {
  model: "m",
  messages: [
    { role: "system", content: "be brief" },
    { role: "user", content: "hello" },
  ],
};

/** Every field of a request in an order of its own. */
function shuffled(value: unknown, order: readonly number[]): unknown {
  if (Array.isArray(value)) return value.map((item) => shuffled(item, order));
  if (typeof value !== "object" || value === null) return value;
  const entries = Object.entries(value).map(([key, item], i) => ({
    rank: order[i % order.length] ?? 0,
    entry: [key, shuffled(item, order)] as const,
  }));
  entries.sort((a, b) => a.rank - b.rank);
  return Object.fromEntries(entries.map(({ entry }) => entry));
}

describe("openai request: cache key", () => {
  it("does not depend on how the fields are ordered, at any depth", () => {
    const body = {
      ...base,
      temperature: 0.5,
      tools: [
        { type: "function", function: { name: "f", parameters: { b: 1, a: { d: 2, c: 3 } } } },
      ],
    };
    fc.assert(
      fc.property(fc.array(fc.nat(1000), { minLength: 6, maxLength: 6 }), (order) => {
        expect(read(shuffled(body, order)).cacheKey).toBe(read(body).cacheKey);
      }),
    );
  });

  it.each([
    ["model", { model: "other" }],
    ["system prompt", { messages: [{ role: "system", content: "be long" }, base.messages[1]] }],
    ["an earlier turn", { messages: [{ role: "user", content: "x" }, ...base.messages] }],
    ["the question", { messages: [base.messages[0], { role: "user", content: "hello!" }] }],
    ["temperature", { temperature: 0.2 }],
    ["top_p", { top_p: 0.9 }],
    ["seed", { seed: 1 }],
    ["max_tokens", { max_tokens: 5 }],
    ["stop", { stop: ["a"] }],
    ["tools", { tools: [] }],
    ["response format", { response_format: { type: "json_object" } }],
    ["logprobs", { logprobs: true }],
    ["n", { n: 2 }],
    ["a field that is not known", { guided_regex: "a+" }],
  ])("depends on %s", (_, change) => {
    expect(read({ ...base, ...change }).cacheKey).not.toBe(read(base).cacheKey);
  });

  it("depends on the tenant, whatever the tenants are called", () => {
    expect(read(base, "a").cacheKey).not.toBe(read(base, "b").cacheKey);
    fc.assert(
      fc.property(fc.string(), fc.string(), (one, other) => {
        fc.pre(one !== other);
        expect(read(base, one).cacheKey).not.toBe(read(base, other).cacheKey);
      }),
    );
  });

  it("does not depend on delivery and billing", () => {
    const delivery = {
      stream: true,
      stream_options: { include_usage: true },
      user: "u",
      metadata: {},
    };
    expect(read({ ...base, ...delivery }).cacheKey).toBe(read(base).cacheKey);
  });

  it("null at the top is as good as absent; deeper it is data", () => {
    expect(read({ ...base, stop: null }).cacheKey).toBe(read(base).cacheKey);
    const tool = (parameters: object) => ({ tools: [{ function: { name: "f", parameters } }] });
    expect(read({ ...base, ...tool({ default: null }) }).cacheKey).not.toBe(
      read({ ...base, ...tool({}) }).cacheKey,
    );
  });

  it("has none for what is not text, and says why", () => {
    const image = { type: "image_url", image_url: { url: "data:," } };
    const request = read({ ...base, messages: [{ role: "user", content: [image] }] });
    expect([request.cacheKey, request.cacheBypass]).toEqual([undefined, "not text only"]);
  });
});

describe("openai request: remembering", () => {
  it("answers a body that came before as it did, and never one of another tenant, route or text", () => {
    const reader = new RequestReader(limits, { prefixes: false, questions: false });
    const bodies = fc.constantFrom("a", "b", "c").map((content) => ({
      model: "m",
      messages: [{ role: "user", content }],
    }));
    fc.assert(
      fc.property(bodies, fc.constantFrom("t1", "t2"), (body, tenant) => {
        const bytes = Buffer.from(JSON.stringify(body));
        const fresh = new RequestReader(limits, { prefixes: false, questions: false }).read(
          "chat",
          bytes,
          tenant,
        );
        expect(reader.read("chat", bytes, tenant)).toEqual(fresh);
        expect(reader.read("chat", bytes, tenant)).toEqual(fresh);
      }),
    );
  });

  it("does not remember what was wrong as right", () => {
    const reader = new RequestReader(limits, { prefixes: false, questions: false });
    const bytes = Buffer.from('{"model":"m","messages":[]}');
    for (let i = 0; i < 2; i++) expect(reader.read("chat", bytes, "t")).toHaveProperty("code");
  });

  it("tells apart bytes that are not UTF-8 from those that are", () => {
    const reader = new RequestReader(limits, { prefixes: false, questions: false });
    const head = '{"model":"m","messages":[{"role":"user","content":"';
    const of = (middle: number[]) =>
      Buffer.concat([Buffer.from(head), Buffer.from(middle), Buffer.from('"}]}')]);
    const good = reader.read("chat", of([0xc3, 0xa9]), "t") as ReadRequest;
    const other = reader.read("chat", of([0xc3, 0xa8]), "t") as ReadRequest;
    expect(good.cacheKey).not.toBe(other.cacheKey);
  });
});

describe("openai request: affinity and prefixes", () => {
  it("prompts that agree in their first 1024 characters share a node, unless a session names one", () => {
    const long = "x".repeat(2000);
    const of = (text: string) => read({ model: "m", messages: [{ role: "user", content: text }] });
    expect(affinityKeyOf(of(`${long}a`), undefined)).toBe(affinityKeyOf(of(`${long}b`), undefined));
    expect(affinityKeyOf(of("a"), undefined)).not.toBe(affinityKeyOf(of("b"), undefined));
    expect(affinityKeyOf(of("a"), "s")).toBe(affinityKeyOf(of("b"), "s"));
    expect(affinityKeyOf(of("a"), "s")).not.toBe(affinityKeyOf(of("a"), "s2"));
  });

  it("equal leading blocks of 1024 characters have equal leading hashes, at most 256 of them", () => {
    const of = (text: string) =>
      read({ model: "m", messages: [{ role: "user", content: text }] }, "t", true).prefix;
    const one = of("y".repeat(5000));
    const two = of(`${"y".repeat(5000)}${"z".repeat(3000)}`);
    expect(one.slice(0, 4)).toEqual(two.slice(0, 4));
    expect(one[4]).not.toBe(two[4]);
    expect(of("w".repeat(1_000_000))).toHaveLength(256);
  });
});
