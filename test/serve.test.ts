/**
 * `headrace serve` as a process: its port, its signals, its end, what it says of a configuration that is wrong, and
 * the recording it leaves. The nodes run in the test, so that it decides when a stream goes on.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { request as httpRequest } from "node:http";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeEach, describe, expect, it } from "vitest";
import { openTrace } from "../sim/trace.ts";
import type { TraceRequest } from "../sim/trace-rows.ts";
import { parseTraceRecord, type TraceRecord } from "../transport/trace-format.ts";
import { HeadraceProcess, isBuilt, killAll } from "./headrace-process.ts";
import { type LiveNodes, MODEL, startNodes, until } from "./live-world.ts";

const ADMIN_TOKEN = "test-admin-token-0001";
const KEYS = { acme: "key-of-acme", other: "key-of-other", tiny: "key-of-tiny" };
const acme = { key: KEYS.acme, tenant: "acme" };

const folder = mkdtempSync(join(tmpdir(), "headrace-serve-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

let live: LiveNodes;
beforeEach(async () => {
  live = await startNodes(2);
});
afterEach(async () => {
  await killAll();
  await live.close();
});

/** Writes the configuration file and returns its path. One node, one key, unless told otherwise. */
function configFile(more: object = {}, text?: string): string {
  const file = join(folder, "headrace.yaml");
  const nodes = [{ url: live.urls[0], name: "node-1" }];
  const config = { listen: { port: 0 }, nodes, keys: [acme], ...more };
  writeFileSync(file, text ?? JSON.stringify(config));
  return file;
}

type Gateway = { process: HeadraceProcess; port: number };

async function serve(more: object = {}, flags: readonly string[] = []): Promise<Gateway> {
  const process = new HeadraceProcess(["serve", "--config", configFile(more), ...flags]);
  return { process, port: await process.listening() };
}

function post(
  { port }: Gateway,
  content: string,
  fields: object = {},
  key = KEYS.acme,
  signal?: AbortSignal,
): Promise<Response> {
  return fetch(`http://127.0.0.1:${port}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${key}` },
    body: JSON.stringify({ model: MODEL, messages: [{ role: "user", content }], ...fields }),
    ...(signal === undefined ? {} : { signal }),
  });
}

async function ask(...given: Parameters<typeof post>) {
  const response = await post(...given);
  const cache = response.headers.get("x-headrace-cache");
  const node = response.headers.get("x-headrace-node");
  return { status: response.status, cache, node, text: await response.text() };
}

/** A stream of which the first part has come, and which then waits at the node until `goOn`. */
async function stalledStream(gateway: Gateway) {
  live.nodes[0]?.setFault({ stallAfterTokens: 3 });
  const response = await post(gateway, "a long story", { stream: true });
  expect(response.status).toBe(200); // The head comes with the first content token.
  const goOn = () => live.nodes[0]?.setFault({});
  // A stream that is cut has no end to read: what has come by then is not of interest.
  const text = response.text().catch(() => "cut");
  return { goOn, text };
}

/** A request whose head the server has, and whose body it still waits for. */
async function halfSent({ port }: Gateway) {
  const request = httpRequest({
    host: "127.0.0.1",
    port,
    method: "POST",
    path: "/v1/chat/completions",
    headers: {
      "content-type": "application/json",
      authorization: `Bearer ${KEYS.acme}`,
      expect: "100-continue",
    },
    agent: false,
  });
  const reply = new Promise<{ status: number; text: string }>((resolve, reject) => {
    request.on("error", reject);
    request.on("response", (response) => {
      let text = "";
      response.setEncoding("utf8").on("data", (part: string) => {
        text += part;
      });
      response.on("end", () => resolve({ status: response.statusCode ?? 0, text }));
    });
  });
  const continued = new Promise((resolve) => request.once("continue", resolve));
  request.flushHeaders();
  await continued;
  const messages = [{ role: "user", content: "too late" }];
  return { reply, finish: () => void request.end(JSON.stringify({ model: MODEL, messages })) };
}

const describeBuilt = describe.skipIf(!isBuilt());

describeBuilt("serve: start and stop", () => {
  it("tells its port over IPC and in the log, and answers on it", async () => {
    const gateway = await serve();
    expect(await gateway.process.logged("listening")).toMatchObject({
      host: "127.0.0.1",
      port: gateway.port,
      nodes: 1,
    });
    const { status, node } = await ask(gateway, "hello");
    expect({ status, node }).toEqual({ status: 200, node: "node-1" });
    expect(gateway.process.err).not.toContain("hello");
  });

  it("SIGTERM: what is open ends whole, what comes is refused, the exit code is 0", async () => {
    const gateway = await serve();
    const stream = await stalledStream(gateway);
    const half = await halfSent(gateway);
    gateway.process.child.kill("SIGTERM");
    await gateway.process.logged("draining");
    await expect(post(gateway, "new")).rejects.toMatchObject({ cause: { code: "ECONNREFUSED" } });
    half.finish();
    const late = await half.reply;
    expect({ status: late.status, code: JSON.parse(late.text).error.code }).toEqual({
      status: 503,
      code: "shutting_down",
    });
    stream.goOn();
    expect(await stream.text).toMatch(/data: \[DONE\]\n\n$/);
    expect(await gateway.process.exit).toBe(0);
    expect(gateway.process.log().at(-1)?.msg).toBe("stopped");
  });

  it.each([
    ["SIGTERM", "SIGTERM"],
    ["SIGINT", "SIGTERM"],
  ] as const)("%s, then %s while a stream hangs: it ends at once with code 1", async (one, two) => {
    const gateway = await serve();
    const stream = await stalledStream(gateway);
    gateway.process.child.kill(one);
    await gateway.process.logged("draining");
    gateway.process.child.kill(two);
    expect(await gateway.process.exit).toBe(1);
    expect(await stream.text).not.toContain("[DONE]");
  });

  it("a stream that outlasts timeouts.drainMs is cut, and the exit code is 0", async () => {
    const gateway = await serve({ timeouts: { drainMs: 100 } });
    const stream = await stalledStream(gateway);
    gateway.process.child.kill("SIGTERM");
    expect(await gateway.process.exit).toBe(0);
    expect(await stream.text).not.toContain("[DONE]");
    await until("the node is left", () => live.nodes[0]?.stats().open === 0);
  });

  it("a port that is taken is an error that names the address", async () => {
    const holder = createServer();
    await new Promise<void>((resolve) => holder.listen(0, "127.0.0.1", resolve));
    const address = holder.address();
    const port = typeof address === "object" ? address?.port : undefined;
    const flags = ["serve", "--config", configFile(), "--port", String(port)];
    const process = new HeadraceProcess(flags);
    expect(await process.exit).toBe(1);
    expect(process.err).toContain(`127.0.0.1:${port} is taken by another process`);
    await new Promise((resolve) => holder.close(resolve));
  });
});

describeBuilt("serve: a configuration that is wrong", () => {
  const url = "http://127.0.0.1:9";
  const wrong: [what: string, text: string, says: RegExp][] = [
    ["a typo", `router: {stratgy: headroom}\nnodes: [{url: "${url}"}]`, /:1:10.*"?strategy"?/],
    ["a wrong unit", `timeouts: {connectMs: 5s}\nnodes: [{url: "${url}"}]`, /connectMs.*5000/],
    [
      "a node twice",
      `nodes: [{url: "${url}", name: a}, {url: "http://127.0.0.1:10", name: a}]`,
      /nodes\[1\].*"a"/,
    ],
  ];

  it.each(wrong)("%s: exit code 2, with place and remedy", async (_, text, says) => {
    const process = new HeadraceProcess(["serve", "--config", configFile({}, text)]);
    expect(await process.exit).toBe(2);
    expect(process.err).toContain("The configuration has one problem:");
    expect(process.err).toMatch(says);
  });
});

describeBuilt("serve: SIGHUP", () => {
  const nodes = () => live.urls.map((url, index) => ({ url, name: `node-${index + 1}` }));
  const router = { strategy: "round_robin" }; // So that a new node takes part at once.

  it("takes over a new key and a new node, and goes on with what is open", async () => {
    const gateway = await serve({ router });
    const stream = await stalledStream(gateway);
    expect((await ask(gateway, "hello", {}, KEYS.other)).status).toBe(401);
    configFile({ router, nodes: nodes(), keys: [acme, { key: KEYS.other, tenant: "other" }] });
    gateway.process.child.kill("SIGHUP");
    const { changed } = await gateway.process.logged("configuration reloaded");
    expect(changed).toEqual(["nodes", "keys"]);
    stream.goOn();
    expect(await stream.text).toContain("[DONE]");
    expect((await ask(gateway, "hello", {}, KEYS.other)).status).toBe(200);
    let asked = 0;
    await until("the new node takes part", async () => {
      const { status, node } = await ask(gateway, `question ${asked++}`);
      expect(status).toBe(200);
      return node === "node-2";
    });
  });

  it("an invalid file, or an option that needs a restart, is refused whole", async () => {
    const gateway = await serve({ router });
    const keys = [acme, { key: KEYS.other, tenant: "other" }];
    const expectAsBefore = async (content: string) => {
      expect((await ask(gateway, content, {}, KEYS.other)).status).toBe(401);
      expect(await ask(gateway, content)).toMatchObject({ status: 200, node: "node-1" });
    };
    const file = configFile({ router, keys, nodes: nodes(), lisen: {} });
    gateway.process.child.kill("SIGHUP");
    const { reason } = await gateway.process.logged(
      "reload refused: the configuration is not valid",
    );
    expect(reason).toContain(file);
    expect(reason).toMatch(/lisen.*listen/);
    await expectAsBefore("one");

    configFile({ keys, nodes: nodes(), router: { strategy: "least_inflight" } });
    gateway.process.child.kill("SIGHUP");
    const refused = await gateway.process.logged("reload refused: these options need a restart");
    expect(refused.needRestart).toEqual(["router.strategy"]);
    await expectAsBefore("two");

    configFile({ router, keys });
    gateway.process.child.kill("SIGHUP");
    await gateway.process.logged("configuration reloaded");
    expect((await ask(gateway, "three", {}, KEYS.other)).status).toBe(200);
  });
});

describeBuilt("serve: --record", () => {
  it("writes a line a request, without its text, that the trace reader takes", async () => {
    const file = join(folder, "requests.jsonl");
    const tiny = { key: KEYS.tiny, tenant: "tiny", limits: { requestsPerMinute: 1 } };
    const gateway = await serve({ keys: [acme, tiny], admin: { token: ADMIN_TOKEN } }, [
      "--record",
      file,
    ]);
    const participants = async () => {
      const headers = { authorization: `Bearer ${ADMIN_TOKEN}` };
      const response = await fetch(`http://127.0.0.1:${gateway.port}/admin/state`, { headers });
      return ((await response.json()) as { cache: { participants: number } }).cache.participants;
    };
    const secret = "sesame";

    expect((await ask(gateway, `one ${secret}`)).cache).toBe("miss");
    expect((await ask(gateway, `one ${secret}`)).cache).toBe("hit-exact");

    live.nodes[0]?.setFault({ stallAfterTokens: 1 });
    const shared = ask(gateway, `two ${secret}`, { stream: true });
    await until("the first leads", async () => (await participants()) === 1);
    const joined = ask(gateway, `two ${secret}`, { stream: true });
    await until("the second has joined", async () => (await participants()) === 2);
    live.nodes[0]?.setFault({});
    expect([(await shared).cache, (await joined).cache]).toEqual(["miss", "joined"]);

    expect((await ask(gateway, `three ${secret}`, {}, KEYS.tiny)).status).toBe(200);
    expect((await ask(gateway, `four ${secret}`, {}, KEYS.tiny)).status).toBe(429);

    live.nodes[0]?.setFault({ stallAfterTokens: 1 });
    const leaving = new AbortController();
    const left = await post(gateway, `five ${secret}`, { stream: true }, KEYS.acme, leaving.signal);
    expect(left.status).toBe(200);
    leaving.abort();
    await until("the node is left", () => live.nodes[0]?.stats().open === 0);

    gateway.process.child.kill("SIGTERM");
    expect(await gateway.process.exit).toBe(0);
    const text = readFileSync(file, "utf8");
    for (const word of [secret, KEYS.acme, KEYS.tiny, "acme", "tiny"])
      expect(text).not.toContain(word);
    const records = text
      .trimEnd()
      .split("\n")
      .map((line) => {
        const record = parseTraceRecord(line);
        if ("invalid" in record) throw new Error(`${record.invalid}: ${line}`);
        return record;
      });
    // Two that end together may do so in either order.
    const byArrival = records.sort((one, two) => one.atMs - two.atMs);
    expect(byArrival.map(storyOf)).toEqual([
      "ok miss 1 node-1",
      "ok hit_exact 0",
      "ok miss 1 node-1",
      "ok joined 0",
      "ok miss 1 node-1",
      "refused miss 0",
      "left miss 1 node-1",
    ]);
    const questions = byArrival.map(({ question }) => question);
    expect(questions[0]).toBe(questions[1]);
    expect(questions[2]).toBe(questions[3]);
    expect(new Set(questions).size).toBe(5);
    expect(new Set(byArrival.map(({ tenant }) => tenant)).size).toBe(2);

    const trace = await openTrace(file);
    expect(trace.format).toBe("headrace");
    const requests: TraceRequest[] = [];
    for await (const request of trace.requests()) requests.push(request);
    expect(requests.map(({ outcome }) => outcome)).toEqual(byArrival.map(({ outcome }) => outcome));
    expect(requests[0]?.atUs).toBe(0);
    // The cache's answers are as long as what they repeat.
    expect(requests[0]?.outputTokens).toBeGreaterThan(0);
    expect(requests[1]?.outputTokens).toBe(requests[0]?.outputTokens);
    expect(trace.skippedRows()).toBe(0);
  });
});

function storyOf({ outcome, cache, attempts, node }: TraceRecord): string {
  return [outcome, cache, attempts, ...(node === undefined ? [] : [node])].join(" ");
}
