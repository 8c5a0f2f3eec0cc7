/** Headrace inside a program: what the package's entry point gives, and that nothing of it is left after `close`. */
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { createServer, type RequestListener } from "node:http";
import type { AddressInfo } from "node:net";
import { afterEach, describe, expect, it } from "vitest";
import { ConfigError, createHeadrace, type Headrace, HeadraceError } from "../transport/embed.ts";
import type { NodeServer } from "../transport/node-server.ts";
import type { OptionsInput } from "../transport/options.ts";
import { type LiveNodes, MODEL, startNodes, until } from "./live-world.ts";

const repository = new URL("..", import.meta.url).pathname;
const closing: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

type Embedded = { headrace: Headrace; node: NodeServer; live: LiveNodes };

/** One stand-in node, and a Headrace in this process in front of it. */
async function start(options: Partial<OptionsInput> = {}): Promise<Embedded> {
  const live = await startNodes(1);
  closing.push(() => live.close());
  const [node] = live.nodes;
  if (node === undefined) throw new Error("there is one node");
  const headrace = await createHeadrace({ nodes: live.urls.map((url) => ({ url })), ...options });
  closing.push(() => headrace.close());
  return { headrace, node, live };
}

/** A Headrace in front of a node that answers everything like this. */
async function startBefore(answer: RequestListener): Promise<Headrace> {
  const server = createServer((request, response) => {
    request.resume().on("end", () => answer(request, response));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  closing.push(
    () =>
      new Promise((resolve) => {
        server.close(resolve);
        server.closeAllConnections();
      }),
  );
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const headrace = await createHeadrace({
    nodes: [{ url, models: [MODEL] }],
    retry: { attemptsMax: 1 },
  });
  closing.push(() => headrace.close());
  return headrace;
}

const ask = (content: string) => ({ model: MODEL, messages: [{ role: "user", content }] });

function post(body: unknown, more: RequestInit = {}): RequestInit {
  return {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    ...more,
  };
}

async function failureOf(promise: Promise<unknown>): Promise<unknown> {
  const nothing = Symbol("no failure");
  const failure = await promise.then(
    () => nothing,
    (error: unknown) => error,
  );
  if (failure === nothing) throw new Error("it should have failed");
  return failure;
}

const chatUrl = "http://headrace/v1/chat/completions";

describe("embed: asking", () => {
  it("chat gives the node's whole answer, also where the request says stream", async () => {
    const { headrace } = await start();
    const answer = await headrace.chat({ ...ask("What is a headrace?"), stream: true });
    expect(answer.choices[0]?.message.content).toMatch(/^( [a-z]+)+$/);
    expect(answer.choices[0]?.finish_reason).toBe("stop");
    expect(answer.usage?.completion_tokens).toBeGreaterThan(0);
  });

  it("fetch takes any host, a URL or a Request; only the path matters", async () => {
    const { headrace } = await start();
    const urls = [chatUrl, new URL("https://api.openai.com/v1/chat/completions")];
    const inputs = [...urls.map((url) => [url, post(ask("hello"))] as const)];
    for (const [input, init] of inputs)
      expect((await headrace.fetch(input, init)).status).toBe(200);
    const request = new Request(chatUrl, post(ask("hello")));
    const response = await headrace.fetch(request);
    expect(response.headers.get("x-headrace-cache")).toBe("hit-exact");
    const models = await headrace.fetch("http://x/v1/models");
    expect(await models.json()).toMatchObject({ data: [{ id: MODEL }] });
    expect((await headrace.fetch("http://x/nowhere")).status).toBe(404);
  });

  it("fetch streams: the first event is there while the node still writes", async () => {
    const { headrace, node } = await start();
    node.setFault({ stallAfterTokens: 2 });
    const response = await headrace.fetch(chatUrl, post({ ...ask("hello"), stream: true }));
    expect(response.headers.get("content-type")).toMatch(/^text\/event-stream/);
    const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
    let text = (await reader?.read())?.value ?? "";
    expect(text).toMatch(/^data: \{/);
    expect(node.stats().open).toBe(1);
    node.setFault({});
    for (;;) {
      const part = await reader?.read();
      if (part === undefined || part.done) break;
      text += part.value;
    }
    expect(text.trimEnd().endsWith("data: [DONE]")).toBe(true);
  });

  it("a reader that takes its time gets every event", async () => {
    const { headrace, node } = await start();
    const body = { ...ask("a long answer"), stream: true, headrace_output_tokens: 2000 };
    const response = await headrace.fetch(chatUrl, post(body));
    await until("the node is done", () => node.stats().completed === 1);
    const events = (await response.text())
      .split("\n\n")
      .filter((event) => event.includes(`"content":" `));
    expect(events).toHaveLength(2000);
  });

  it("identical requests at once make one generation", async () => {
    const { headrace, node } = await start();
    const answers = await Promise.all(
      Array.from({ length: 20 }, () => headrace.chat(ask("shared"))),
    );
    expect(new Set(answers.map(({ id }) => id)).size).toBe(1);
    expect(node.stats().requests).toBe(1);
  });

  it("two of them in one process share nothing", async () => {
    const { headrace, node, live } = await start();
    const other = await createHeadrace({ nodes: live.urls.map((url) => ({ url })) });
    closing.push(() => other.close());
    await headrace.chat(ask("hello"));
    await other.chat(ask("hello"));
    expect(node.stats().requests).toBe(2);
    await other.close();
    await headrace.chat(ask("still there"));
  });
});

describe("embed: errors", () => {
  it.each<[option: string, options: object, says: RegExp]>([
    ["nodes", {}, /at least|empty|http:\/\//],
    ["nodes[0].url", { nodes: [{ url: "10.0.0.5:8000" }] }, /http:\/\/ or https:\/\//],
    ["nodes[0].url", { nodes: [{}] }, /http/],
    ["nodes[0].weight", { nodes: [{ url: "http://a:1", weight: 1 }] }, /weight/],
    ["timeouts.stallMs", { timeouts: { stallMs: "5s" } }, /5000/],
    ["retry.attemptsMax", { retry: { attemptsMax: 0 } }, /1 to 10|from 1/],
    ["router.strategy", { router: { strategy: "random" } }, /headroom/],
    ["retries", { retries: 3 }, /retr/],
    ["keys[0].tenant", { keys: [{ key: "a-long-enough-key" }] }, /tenant/],
  ])("a bad option is a ConfigError that names it: %s", async (option, options, says) => {
    const input = {
      nodes: option === "nodes" ? [] : [{ url: "http://10.0.0.5:8000" }],
      ...options,
    };
    const error = await failureOf(createHeadrace(input as OptionsInput));
    expect(error).toBeInstanceOf(ConfigError);
    const { problems, message } = error as ConfigError;
    expect(problems.map(({ path }) => path)).toContain(option);
    expect(message).toMatch(says);
  });

  it("all that is wrong is said at once", async () => {
    const input = { nodes: [{ url: "x" }], retry: { attemptsMax: 99 }, cache: { ttlMs: -1 } };
    const error = await failureOf(createHeadrace(input as OptionsInput));
    expect((error as ConfigError).problems.map(({ path }) => path).sort()).toEqual([
      "cache.ttlMs",
      "nodes[0].url",
      "retry.attemptsMax",
    ]);
  });

  it("a refusal is a HeadraceError with status, code and message", async () => {
    const { headrace } = await start();
    const error = await failureOf(headrace.chat({ ...ask("hello"), temperature: 3 }));
    expect(error).toBeInstanceOf(HeadraceError);
    expect(error).toMatchObject({
      name: "HeadraceError",
      status: 400,
      code: "invalid_request",
      message: expect.stringContaining("`temperature`"),
      retryAfterMs: undefined,
    });
  });

  it("a limit says how long to wait", async () => {
    const { headrace } = await start({ defaultLimits: { requestsPerMinute: 2, requestBurst: 1 } });
    await headrace.chat(ask("one"));
    const error = (await failureOf(headrace.chat(ask("two")))) as HeadraceError;
    expect(error).toMatchObject({ status: 429, code: "rate_limit_requests" });
    expect(error.retryAfterMs).toBeGreaterThan(0);
    expect(error.retryAfterMs).toBeLessThanOrEqual(30_000);
  });

  it("with keys configured, a call needs one", async () => {
    const { headrace } = await start({ keys: [{ key: "key-of-acme", tenant: "acme" }] });
    expect(await failureOf(headrace.chat(ask("hello")))).toMatchObject({
      status: 401,
      code: "missing_key",
    });
    const answer = await headrace.chat(ask("hello"), { apiKey: "key-of-acme" });
    expect(answer.choices).toHaveLength(1);
  });

  it("a node's own refusal keeps its message, and what is no JSON is told by its status", async () => {
    const { headrace } = await start();
    expect(await failureOf(headrace.chat({ ...ask("hello"), n: 2 }))).toMatchObject({
      status: 400,
      code: "invalid_value",
      message: "n must be 1: this node gives one answer a request",
    });
    const plain = await startBefore((_, response) => {
      response.writeHead(418, { "content-type": "text/plain" });
      response.end("a teapot");
    });
    expect(await failureOf(plain.chat(ask("hello")))).toMatchObject({
      name: "HeadraceError",
      status: 418,
      code: "invalid_request",
    });
  });

  it.each([204, 304, 205])("a status that has no body is passed on (%i)", async (status) => {
    const headrace = await startBefore((_, response) => {
      response.writeHead(status);
      response.end();
    });
    const response = await headrace.fetch("http://headrace/v1/files/1", { method: "DELETE" });
    // A redirect or "not modified" is no answer to a call: see upstream-failure.ts.
    expect(response.status).toBe(status < 300 ? status : 502);
    expect(await response.text()).toMatch(status < 300 ? /^$/ : /"upstream_bad_answer"/);
    expect((await headrace.stats()).requests?.open).toBe(0);
  });

  it("a status that there is not is a failure of the node", async () => {
    const headrace = await startBefore((_, response) => {
      response.writeHead(999);
      response.end();
    });
    const response = await headrace.fetch(chatUrl, post(ask("hello")));
    expect(response.status).toBe(502);
  });
});

describe("embed: leaving", () => {
  it("a signal that is aborted already sends nothing", async () => {
    const { headrace, node } = await start();
    const reason = new Error("no time");
    expect(
      await failureOf(headrace.chat(ask("hello"), { signal: AbortSignal.abort(reason) })),
    ).toBe(reason);
    expect(
      await failureOf(
        headrace.fetch(chatUrl, post(ask("hello"), { signal: AbortSignal.abort(reason) })),
      ),
    ).toBe(reason);
    expect(node.stats().requests).toBe(0);
  });

  it("aborting while it waits ends the generation, and fails with the signal's reason", async () => {
    const { headrace, node } = await start();
    node.setFault({ hang: true });
    const controller = new AbortController();
    const failure = failureOf(headrace.chat(ask("hello"), { signal: controller.signal }));
    await until("the node has it", () => node.stats().open === 1);
    const reason = new Error("enough");
    controller.abort(reason);
    expect(await failure).toBe(reason);
    await until("the node sees the abort", () => node.stats().aborts === 1);
    expect((await headrace.stats()).requests?.open).toBe(0);
  });

  it.each(["abort", "cancel"] as const)(
    "%s in the middle of a stream ends the generation",
    async (how) => {
      const { headrace, node } = await start();
      node.setFault({ stallAfterTokens: 2 });
      const controller = new AbortController();
      const request = post({ ...ask("hello"), stream: true }, { signal: controller.signal });
      const response = await headrace.fetch(chatUrl, request);
      const reader = response.body?.getReader();
      await reader?.read();
      const reason = new Error("enough");
      if (how === "cancel") await reader?.cancel(reason);
      else {
        controller.abort(reason);
        const readToEnd = async () => {
          while ((await reader?.read())?.done === false);
        };
        expect(await failureOf(readToEnd())).toBe(reason);
      }
      await until("the node sees the abort", () => node.stats().aborts === 1);
    },
  );

  it("a signal that is aborted after the answer does no harm", async () => {
    const { headrace } = await start();
    const controller = new AbortController();
    const request = post(ask("hello"), { signal: controller.signal });
    const response = await headrace.fetch(chatUrl, request);
    expect(response.status).toBe(200);
    controller.abort();
    expect((await headrace.chat(ask("next"))).choices).toHaveLength(1);
  });
});

describe("embed: looking in", () => {
  it("stats shows every actor, and that nothing is open when nothing runs", async () => {
    const { headrace } = await start();
    await headrace.chat(ask("hello"));
    const { nodes, router, cache, limiter, requests, system, store } = await headrace.stats();
    expect(nodes.map(({ snapshot }) => snapshot.models)).toEqual([[MODEL]]);
    expect(router?.pools.map(({ model }) => model)).toContain(MODEL);
    expect(cache).toMatchObject({ entries: 1, flights: 0 });
    expect(limiter?.reservations).toBe(0);
    expect(requests?.open).toBe(0);
    expect(system.asks).toBe(0);
    expect(store).toBeUndefined();
  });

  it("explain tells a request's story by its id", async () => {
    const { headrace } = await start();
    const response = await headrace.fetch(chatUrl, post(ask("hello")));
    const id = response.headers.get("x-request-id") ?? "";
    await until("its story is complete", () => headrace.explain(id) !== undefined);
    const story = headrace.explain(id);
    expect(story).toMatchObject({
      requestId: id,
      outcome: "ok",
      cache: "miss",
      tenant: "local",
      model: MODEL,
    });
    expect(story?.steps.join("\n")).toMatch(/attempt 1 on .*ok/);
    expect(JSON.stringify(story)).not.toContain("hello");
    expect(headrace.explain("no-such-request")).toBeUndefined();
  });
});

describe("embed: ending", () => {
  it("drain lets open requests end and refuses new ones", async () => {
    const { headrace, node } = await start();
    node.setFault({ hang: true });
    const open = headrace.chat(ask("hello"));
    await until("the node has it", () => node.stats().open === 1);
    const drained = headrace.drain();
    const refused = (await failureOf(headrace.chat(ask("late")))) as HeadraceError;
    expect(refused).toMatchObject({ status: 503, code: "shutting_down" });
    expect(refused.retryAfterMs).toBeGreaterThan(0);
    node.setFault({});
    expect((await open).choices).toHaveLength(1);
    await drained;
  });

  it("drain cuts what is still open when its time is over", async () => {
    const { headrace, node } = await start();
    node.setFault({ hang: true });
    const failure = failureOf(headrace.chat(ask("hello")));
    await until("the node has it", () => node.stats().open === 1);
    await headrace.drain(1);
    expect(await failure).toMatchObject({ status: 503, code: "shutting_down" });
    await until("the node sees the abort", () => node.stats().aborts === 1);
  });

  it("close ends open requests and streams now, and may be called again", async () => {
    const { headrace, node } = await start();
    node.setFault({ stallAfterTokens: 2 });
    const response = await headrace.fetch(chatUrl, post({ ...ask("hello"), stream: true }));
    const failure = failureOf(headrace.chat(ask("another")));
    await until("the node has both", () => node.stats().open === 2);
    const text = response.text();
    await Promise.all([headrace.close(), headrace.close()]);
    expect(await failure).toMatchObject({ status: 503, code: "shutting_down" });
    expect(await text).toContain("shutting_down");
    expect(await text).not.toContain("[DONE]");
    await until("the node sees both leave", () => node.stats().open === 0);
    expect(await failureOf(headrace.chat(ask("late")))).toMatchObject({ code: "shutting_down" });
    await headrace.close();
  });

  const isBuilt = existsSync(`${repository}dist/transport/embed.js`);
  if (!isBuilt)
    console.log("skipped: dist/ is not there (npm run build): a script that ends by itself");

  it.skipIf(!isBuilt)(
    "a script opens no port, ends by itself after close, and has written nothing but its own line",
    async () => {
      const live = await startNodes(2);
      closing.push(() => live.close());
      const script = `
      import { createHeadrace, HeadraceError } from "headrace";
      const nodes = process.argv.slice(1).map((url) => ({ url }));
      const headrace = await createHeadrace({ nodes });
      const ask = (content) => ({ model: ${JSON.stringify(MODEL)}, messages: [{ role: "user", content }] });
      const answer = await headrace.chat(ask("hello"));
      const cut = await headrace.fetch("http://headrace/v1/chat/completions", {
        method: "POST",
        body: JSON.stringify({ ...ask("cut"), stream: true }),
      });
      await cut.body.getReader().read(); // Never read on, never cancelled.
      const refused = await headrace.chat({}).catch((error) => error);
      const ports = process.getActiveResourcesInfo().filter((name) => name === "TCPServerWrap").length;
      await headrace.close();
      console.log(JSON.stringify({
        answer: answer.choices.length,
        refused: refused instanceof HeadraceError && refused.code,
        ports,
      }));`;
      const child = spawn(
        process.execPath,
        ["--input-type=module", "--eval", script, ...live.urls],
        {
          cwd: repository,
          stdio: ["ignore", "pipe", "pipe"],
        },
      );
      closing.push(async () => void child.kill("SIGKILL"));
      let [out, err] = ["", ""];
      child.stdout.setEncoding("utf8").on("data", (text: string) => {
        out += text;
      });
      child.stderr.setEncoding("utf8").on("data", (text: string) => {
        err += text;
      });
      const code = await new Promise((resolve) => child.once("close", resolve));
      expect({ code, err }).toEqual({ code: 0, err: "" });
      expect(JSON.parse(out)).toEqual({ answer: 1, refused: "invalid_request", ports: 0 });
    },
  );
});
