import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { nearest, pathOf, segmentsOf } from "../transport/option-problems.ts";
import type { OptionRow } from "../transport/option-schema.ts";
import {
  defaults,
  limitsOf,
  nodeAddress,
  type Options,
  optionRows,
  parseOptions,
} from "../transport/options.ts";

const leaves = optionRows.filter(({ kind }) => kind !== "group" && kind !== "items");
const numbers = leaves.filter(({ kind }) => kind === "integer" || kind === "number");

describe("rows", () => {
  it("every option: has a description, and a unit in its name where it has one", () => {
    for (const { path, doc, unit } of optionRows) {
      expect(doc, path).toMatch(/^\S.*\.$/);
      const name = path.split(".").at(-1) ?? "";
      expect(/Ms(Max|Min|Default)?$/.test(name), path).toBe(unit === "ms");
      expect(/Bytes(Max|Min)?$|^bytes(Max|Min)?$/.test(name), path).toBe(unit === "bytes");
    }
  });

  it("paths and environment variables: no two alike", () => {
    const paths = optionRows.map(({ path }) => path);
    const variables = optionRows.flatMap(({ env }) => env ?? []);
    expect(new Set(paths).size).toBe(paths.length);
    expect(new Set(variables).size).toBe(variables.length);
    expect(variables).toContain("HEADRACE_TIMEOUTS_FIRST_TOKEN_MS");
  });

  it("optional or with a default: everything but what makes a node, a key, a secret, a certificate", () => {
    const required = leaves.filter((row) => row.required).map(({ path }) => path);
    expect(required).toEqual([
      "nodes[].url",
      "keys[].tenant",
      "cluster.keys[].id",
      "cluster.keys[].secret",
      "cluster.tls.cert",
      "cluster.tls.key",
    ]);
  });

  it("secrets: every option that holds one is marked", () => {
    const secret = leaves.filter((row) => row.secret !== undefined).map(({ path }) => path);
    expect(secret).toEqual([
      "nodes[].apiKey",
      "keys[].key",
      "keys[].keySha256",
      "cluster.keys[].secret",
      "cache.semantic.embedder.key",
      "cache.redis.url",
      "cache.redis.password",
      "admin.token",
    ]);
    // A new option of such a name must be marked, or be named here.
    const suspicious = /key|token|secret|password/i;
    const plain = leaves.filter(
      ({ path, secret, kind }) => kind === "text" && secret === undefined && suspicious.test(path),
    );
    expect(plain.map(({ path }) => path)).toEqual([
      "keys[].name",
      "keys[].tenant",
      "cluster.keys[].id",
      "cluster.tls.key",
      "cache.redis.keyPrefix",
    ]);
  });

  it.each(numbers.map((row) => [row.path, row] as const))(
    "%s: its bounds are accepted, one step past them is refused with what is accepted",
    (_, row) => {
      const [, low = "", high = ""] = /from (\S+) to (\S+)$/.exec(row.accepted) ?? [];
      const [min, max] = [Number(low), Number(high)];
      const step = row.kind === "integer" ? 1 : 0.001;
      for (const value of [min, max]) expect(problemsAt(row, value)).toEqual([]);
      for (const value of [min - step, max + step, "5s", null, true, Number.NaN]) {
        const messages = problemsAt(row, value);
        expect(messages).toHaveLength(1);
        expect(messages[0]).toContain(`accepted: ${row.accepted}`);
      }
      if (row.kind === "integer" && min < max) expect(problemsAt(row, min + 0.5)).toHaveLength(1);
      if (row.default !== undefined) {
        expect(row.default).toBeGreaterThanOrEqual(min);
        expect(row.default).toBeLessThanOrEqual(max);
      }
    },
  );
});

describe("defaults", () => {
  it("are what a minimal configuration gets, and frozen through and through", () => {
    const { nodes, ...rest } = parsed({ nodes: [{ url: "http://a:8000" }] });
    const { nodes: none, ...expected } = defaults;
    expect(rest).toEqual(expected);
    expect(none).toEqual([]);
    expect(nodes).toEqual([{ url: "http://a:8000", name: "a:8000", engine: "auto" }]);
    expect(Object.isFrozen(rest.router)).toBe(true);
    expect(Object.isFrozen(nodes[0])).toBe(true);
    expect(Object.isFrozen(defaults.timeouts)).toBe(true);
  });

  it("numbers of the design", () => {
    expect(defaults.listen).toEqual({ host: "127.0.0.1", port: 8080 });
    expect(defaults.router).toMatchObject({
      affinityLoadFactor: 1.5,
      exploreRatio: 0.01,
      kvGate: 0.92,
    });
    expect(defaults.retry).toMatchObject({
      attemptsMax: 3,
      budgetRatio: 0.1,
      budgetFloorPerSecond: 2,
    });
    expect(defaults.timeouts).toMatchObject({ connectMs: 1000, stallMs: 15_000, totalMs: 300_000 });
    expect(defaults.cache).toMatchObject({
      enabled: true,
      ttlMs: 3_600_000,
      bytesMax: 268_435_456,
    });
    expect(defaults.scrape).toMatchObject({ intervalMs: 1000, jitterRatio: 0.2, timeoutMs: 800 });
  });

  it("the default deadline: follows totalMs until it is set itself", () => {
    expect(parsed({ ...base, timeouts: { totalMs: 60_000 } }).timeouts.requestMsDefault).toBe(
      60_000,
    );
    const both = { totalMs: 60_000, requestMsDefault: 30_000 };
    expect(parsed({ ...base, timeouts: both }).timeouts.requestMsDefault).toBe(30_000);
  });
});

describe("nodes", () => {
  it.each([
    ["http://a:8000", "http://a:8000", "a:8000"],
    ["http://a:8000/", "http://a:8000", "a:8000"],
    ["http://a:8000/v1", "http://a:8000", "a:8000"],
    ["http://a:8000/v1/", "http://a:8000", "a:8000"],
    ["HTTP://A:8000", "http://a:8000", "a:8000"],
    ["http://a/llm/v1", "http://a/llm", "a:80"],
    ["https://a", "https://a", "a:443"],
    ["http://[::1]:8000", "http://[::1]:8000", "[::1]:8000"],
  ])("url %s: is %s, named %s", (given, url, name) => {
    expect(parsed({ nodes: [{ url: given }] }).nodes[0]).toMatchObject({ url, name });
    expect(nodeAddress(given)).toBe(name);
  });

  it.each([
    ["10.0.0.5:8000", "does not start with http://"],
    ["http://", "is not a URL"],
    ["ftp://a", "does not start with http://"],
    ["http://user:pass@a:8000", "holds a user or password"],
    ["http://a:8000?x=1", "holds a query"],
    ["http://a:8000/v1/chat/completions", "is a route"],
    ["", "is empty"],
  ])("url %s: is refused (%s)", (url, reason) => {
    const [message] = messages({ nodes: [{ url }] });
    expect(message).toContain(`nodes[0].url`);
    expect(message).toContain(reason);
    expect(message).not.toContain("pass@");
  });

  it("two of one host and port: refused, as a retry must reach another node", () => {
    const nodes = [{ url: "http://a:80/x" }, { url: "http://b" }, { url: "http://A/y" }];
    expect(messages({ nodes })).toEqual([
      "nodes[2].url a:80 is nodes[0] already: a retry must reach another node",
    ]);
  });

  it("two ports of one host: two nodes", () => {
    const nodes = [{ url: "http://a:8000" }, { url: "http://a:8001" }];
    expect(parsed({ nodes }).nodes.map(({ name }) => name)).toEqual(["a:8000", "a:8001"]);
  });

  it("two of one name: refused, a given name against another's address too", () => {
    const nodes = [{ url: "http://a:1" }, { url: "http://b:1", name: "a:1" }];
    expect(messages({ nodes })).toEqual(['nodes[1].name "a:1" is the name of nodes[0] already']);
  });

  it("none: refused, and says what to write", () => {
    expect(messages({})).toEqual([expect.stringContaining("nodes is empty: without a node")]);
  });
});

describe("keys", () => {
  const secret = "sk-0123456789";
  const hash = "79b5b0a6f9ac6c7cc4e1ca4ff5b6e12a3e49dd0d0d2d0b5f7cb9eb9a70d7e3f1";

  it("a plain key: only its hash is kept, and names it", () => {
    const options = parsed({ ...base, keys: [{ key: secret, tenant: "acme" }] });
    expect(JSON.stringify(options)).not.toContain(secret);
    const [entry] = options.keys;
    expect(entry?.keySha256).toMatch(/^[0-9a-f]{64}$/);
    expect(entry?.name).toBe(`acme-${entry?.keySha256.slice(0, 8)}`);
    expect(entry).toMatchObject({ priority: "standard", weight: 1, limits: {} });
    const again = parsed({
      ...base,
      keys: [{ keySha256: entry?.keySha256.toUpperCase(), tenant: "acme" }],
    });
    expect(again.keys).toEqual(options.keys);
  });

  it("the same key twice, plain and hashed: refused", () => {
    const [entry] = parsed({ ...base, keys: [{ key: secret, tenant: "a" }] }).keys;
    const keys = [
      { key: secret, tenant: "a" },
      { keySha256: entry?.keySha256, tenant: "b" },
    ];
    expect(messages({ ...base, keys })).toEqual(["keys[1] is the same key as keys[0]"]);
  });

  it.each([
    [{ tenant: "a" }, "keys[0] needs either key or keySha256"],
    [{ key: secret, keySha256: hash, tenant: "a" }, "keys[0] needs either key or keySha256"],
    [{ key: "short", tenant: "a" }, "keys[0].key the value given has fewer than 8"],
    [{ key: "with space 123", tenant: "a" }, "keys[0].key the value given holds a space"],
    [{ key: "$GATEWAY_KEY", tenant: "a" }, "(write it as $"],
    [{ key: "os.environ/GATEWAY_KEY", tenant: "a" }, "(write it as $"],
    [{ keySha256: "abc", tenant: "a" }, "is not a SHA-256"],
    [{ key: secret }, "keys[0].tenant is missing"],
    [{ key: secret, tenant: "two words" }, '"two words" is not a valid name'],
    [{ key: secret, tenant: "-a" }, '"-a" is not a valid name'],
    [{ key: secret, tenant: "a", name: "x".repeat(65) }, "is not a valid name"],
    [{ key: secret, tenant: "a", weight: 0 }, "keys[0].weight 0 is too small"],
    [{ key: secret, tenant: "a", models: ["m", "m"] }, "keys[0].models[1]"],
  ])("%j: is refused (%s)", (key, reason) => {
    const found = messages({ ...base, keys: [key] });
    expect(found).toHaveLength(1);
    expect(found[0]).toContain(reason);
    expect(found[0]).not.toContain(secret);
  });

  it("two of one name: refused", () => {
    const keys = ["sk-11111111", "sk-22222222"].map((key) => ({ key, tenant: "a", name: "n" }));
    expect(messages({ ...base, keys })).toEqual([
      'keys[1].name "n" is the name of keys[0] already',
    ]);
  });

  it("an admin token that is a client's key: refused", () => {
    const token = "a-long-enough-token";
    const found = messages({ ...base, keys: [{ key: token, tenant: "a" }], admin: { token } });
    expect(found).toEqual([expect.stringMatching(/^admin\.token is the same as keys\[0\]/)]);
    expect(found[0]).not.toContain(token);
  });

  it.each(["127.0.0.1", "127.8.8.8", "localhost", "::1"])("none, host %s: accepted", (host) => {
    expect(parsed({ ...base, listen: { host } }).listen.host).toBe(host);
  });

  it.each(["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org"])(
    "none, host %s: refused, as anyone could use the nodes",
    (host) => {
      expect(messages({ ...base, listen: { host } })).toEqual([
        expect.stringMatching(/^listen\.host .*no keys are configured/),
      ]);
      const keys = [{ key: secret, tenant: "a" }];
      expect(parsed({ ...base, listen: { host }, keys }).listen.host).toBe(host);
    },
  );
});

describe("limits", () => {
  const keyWith = (limits: object) => ({ key: "sk-0123456789", tenant: "a", limits });

  it("of a key: its own, else the defaults", () => {
    const options = parsed({
      ...base,
      defaultLimits: { requestsPerMinute: 60, concurrent: 4 },
      keys: [keyWith({ concurrent: 8, tokensPerDay: 1000 })],
    });
    expect(limitsOf(options, options.keys[0])).toEqual({
      requestsPerMinute: 60,
      concurrent: 8,
      tokensPerDay: 1000,
    });
    expect(limitsOf(options)).toEqual({ requestsPerMinute: 60, concurrent: 4 });
  });

  it("a burst: stays with its rate, so a key's own rate does not inherit the default's burst", () => {
    const options = parsed({
      ...base,
      defaultLimits: {
        requestsPerMinute: 60,
        requestBurst: 30,
        tokensPerMinute: 600,
        tokenBurst: 300,
      },
      keys: [
        keyWith({ requestsPerMinute: 6 }),
        { ...keyWith({ tokensPerMinute: 9 }), key: "sk-xxxxxxxx" },
      ],
    });
    expect(limitsOf(options, options.keys[0])).toEqual({
      requestsPerMinute: 6,
      tokensPerMinute: 600,
      tokenBurst: 300,
    });
    expect(limitsOf(options, options.keys[1])).toEqual({
      requestsPerMinute: 60,
      requestBurst: 30,
      tokensPerMinute: 9,
    });
  });

  it("a burst without a rate: refused, unless the default gives the rate", () => {
    const keys = [keyWith({ requestBurst: 5, tokenBurst: 5 })];
    expect(messages({ ...base, keys })).toEqual([
      "keys[0].limits.requestBurst is set without requestsPerMinute: a burst is part of a rate",
      "keys[0].limits.tokenBurst is set without tokensPerMinute: a burst is part of a rate",
    ]);
    const defaultLimits = { requestsPerMinute: 60, tokensPerMinute: 60 };
    expect(parsed({ ...base, keys, defaultLimits }).keys).toHaveLength(1);
  });
});

describe("relations", () => {
  const redis = "redis://10.0.0.9:6379";
  const secret = (id: string) => ({ id, secret: "0123456789abcdef" });
  const broken: [object, string][] = [
    [
      { scrape: { timeoutMs: 1001 } },
      "scrape.timeoutMs 1001 is more than scrape.intervalMs (1000)",
    ],
    [
      { health: { timeoutMs: 5001 } },
      "health.timeoutMs 5001 is more than health.intervalMs (5000)",
    ],
    [{ router: { staleMs: 2000 } }, "router.staleMs 2000 is not more than 2000"],
    [{ scrape: { intervalMs: 2000 } }, "router.staleMs 3000 is not more than 3200"],
    [{ circuit: { wedgedMs: 2000 } }, "circuit.wedgedMs 2000 is not more than twice"],
    [{ timeouts: { connectMs: 5000, totalMs: 5000 } }, "timeouts.connectMs 5000 is not less than"],
    [{ timeouts: { firstTokenMs: 300_001 } }, "timeouts.firstTokenMs 300001 is more than"],
    [{ timeouts: { requestMsDefault: 300_001 } }, "timeouts.requestMsDefault 300001 is more than"],
    [{ queue: { perKeyMax: 2001 } }, "queue.perKeyMax 2001 is more than queue.poolMax (2000)"],
    [
      { retry: { backoffBaseMs: 1001 } },
      "retry.backoffBaseMs 1001 is more than retry.backoffMaxMs",
    ],
    [{ circuit: { openMs: 300_001 } }, "circuit.openMs 300001 is more than circuit.openMsMax"],
    [{ concurrency: { inflightMax: 3 } }, "concurrency.inflightMin 4 is more than"],
    [{ cache: { answerBytesMax: 268_435_457 } }, "cache.answerBytesMax 268435457 is more than"],
    [
      { cache: { redis: {} } },
      "cache.redis needs exactly one of url, clusterNodes and sentinels, and has 0",
    ],
    [{ cache: { redis: { url: redis, clusterNodes: ["a:1"] } } }, "and has 2"],
    [{ cache: { redis: { sentinels: ["a:1"] } } }, "needs sentinels and sentinelMaster together"],
    [{ cache: { redis: { url: redis, tls: true } } }, "cache.redis.tls is true, but the URL"],
    [
      { cache: { redis: { url: "redis://:pw@a", password: "pw" } } },
      "cache.redis.url holds a user or password",
    ],
    [
      { cache: { semantic: { embedder: { type: "http", model: "m" } } } },
      "cache.semantic.embedder.url is missing: type is http",
    ],
    [
      { cache: { semantic: { embedder: { type: "http", url: "http://e" } } } },
      "cache.semantic.embedder.model is missing: type is http",
    ],
    [
      { cache: { semantic: { embedder: { type: "lexical", path: "models" } } } },
      "cache.semantic.embedder.path is set, but type is lexical: only transformers has one",
    ],
    [
      {
        cache: {
          semantic: { embedder: { type: "http", model: "m", url: "http://u:p@e/v1/embeddings" } },
        },
      },
      'cache.semantic.embedder.url "http://…@e/v1/embeddings" holds a user or password (use key)',
    ],
    [
      { warmup: { file: "f" }, cache: { enabled: false } },
      "warmup.file is set while cache.enabled",
    ],
    [{ warmup: { file: "f", tenant: "x" } }, "warmup.tenant is the tenant of no key"],
    [
      { cluster: { listen: { host: "0.0.0.0" } } },
      'cluster.listen.host "0.0.0.0" can be reached from outside, and no keys are configured',
    ],
    [{ cluster: { listen: { port: 8080 } } }, "cluster.listen.port 8080 is listen.port already"],
    [
      { cluster: { keys: [secret("a"), secret("b"), secret("a")] } },
      'cluster.keys[2].id "a" is the id of cluster.keys[0] already',
    ],
    [{ cluster: { seeds: ["wss://a:1"] } }, "cluster.seeds[0] is for TLS, and cluster.tls is not"],
    [
      { cluster: { seeds: ["wss://a:1", "dns://b:1"], tls: { cert: "c", key: "k" } } },
      "cluster.seeds[1] is without TLS, and cluster.tls is configured",
    ],
    [
      {
        warmup: { file: "f" },
        keys: ["a", "b"].map((t) => ({ key: `sk-0123456${t}`, tenant: t })),
      },
      "warmup.tenant is missing: tenants share no cached answers; accepted: one of a, b",
    ],
  ];

  it.each(broken)("%j: is refused with the reason", (options, reason) => {
    const found = messages({ ...base, ...options });
    expect(found).toHaveLength(1);
    expect(found[0]).toContain(reason);
  });

  const kept: object[] = [
    { scrape: { timeoutMs: 1000 } },
    { router: { staleMs: 2001 } },
    { circuit: { wedgedMs: 2001 } },
    { timeouts: { connectMs: 4999, totalMs: 5000 } },
    { queue: { perKeyMax: 2000 } },
    { cache: { redis: { url: redis, username: "u", password: "p" } } },
    { cache: { redis: { sentinels: ["a:1", "b:1"], sentinelMaster: "m", tls: true } } },
    { cache: { redis: { clusterNodes: ["a:1", "[::1]:2"] } } },
    { warmup: { file: "f", tenant: "local" } },
    { cluster: {} },
    { cluster: { listen: { host: "::", port: 0 }, keys: [secret("a")] }, listen: { port: 0 } },
    { cluster: { seeds: ["srv://_peer._tcp.a", "ws://[::1]:1"], advertise: "[::1]:7000" } },
    { cluster: { tls: { cert: "c", key: "k" }, seeds: ["dnss://a:1"] } },
    { cache: { semantic: { embedder: { path: "models", url: "http://e", key: "k" } } } },
    {
      cache: {
        semantic: { embedder: { type: "http", model: "m", url: "http://e/v1/embeddings" } },
      },
    },
  ];

  it.each(kept.map((options) => [options] as const))("%j: is accepted", (options) => {
    expect(messages({ ...base, ...options })).toEqual([]);
  });
});

describe("complaints", () => {
  it.each([
    [
      { timeouts: { connectMs: "5s" } },
      "has a unit: this is a number of milliseconds (write 5000)",
    ],
    [{ timeouts: { totalMs: "2.5 min" } }, "(write 150000)"],
    [{ timeouts: { connectMs: "1000" } }, '"1000" is text (write 1000, without quotes)'],
    [{ requests: { bodyBytesMax: "8MB" } }, "this is a number of bytes (write 8388608)"],
    [{ requests: { bodyBytesMax: "1 GiB" } }, "(write 1073741824)"],
    [{ router: { kvGate: "92%" } }, "is a percentage: this is a ratio (write 0.92)"],
    [{ router: { kvGate: 92 } }, "92 is not a ratio (a percentage? write 0.92)"],
    [{ cache: { enabled: "yes" } }, '"yes" is not a boolean (write true)'],
    [{ nodes: [{ url: "http://a", models: "m" }] }, 'is not a list (write ["m"])'],
    [{ nodes: [{ url: "http://a", name: 5 }] }, "5 is not text (put it in quotes)"],
    [{ router: { strategy: "cache_aware" } }, "did you mean headroom?"],
    [{ router: { strategy: "least-busy" } }, "did you mean least_inflight?"],
    [{ router: { strategy: "RoundRobin" } }, "did you mean round_robin?"],
    [{ router: { strategy: "x" } }, '"x" is not accepted; accepted: one of headroom,'],
    [
      { router: "headroom" },
      'router "headroom" is not accepted; accepted: a mapping with strategy',
    ],
    [{ nodes: ["http://a:1"] }, "nodes[0] "],
    [{ listen: { host: "http://a" } }, "is a URL, not a host"],
    [{ listen: { host: "a:80" } }, "the port is listen.port"],
  ])("%j: %s", (options, part) => {
    const found = messages({ ...base, ...options });
    expect(found).toHaveLength(1);
    expect(found[0]).toContain(part);
  });

  it.each([
    [
      { listen: { hsot: "a" } },
      "listen.hsot is not an option; did you mean host?; accepted here: host, port",
    ],
    [{ timeouts: { connect: 1 } }, "did you mean connectMs?"],
    [{ timeouts: { connect_ms: 1 } }, "did you mean connectMs?"],
    [{ retries: {} }, "retries is not an option; did you mean retry?"],
    [{ connectMs: 1 }, "did you mean timeouts.connectMs?"],
    [{ model_list: [] }, "did you mean nodes?"],
    [{ router_settings: {} }, "did you mean router?"],
    [{ router: { num_retries: 2 } }, "did you mean retry.attemptsMax"],
    [{ router: { policy: "x" } }, "did you mean router.strategy?"],
    [{ nodes: [{ url: "http://a", api_base: "x" }] }, "did you mean nodes[].url?"],
    [{ nodes: [{ url: "http://a", api_key: "x" }] }, "did you mean apiKey?"],
    [
      { keys: [{ key: "sk-0123456789", tenant: "a", limits: { rpm: 5 } }] },
      "did you mean limits.requestsPerMinute?",
    ],
    [
      JSON.parse('{"__proto__": {"x": 1}}'),
      "__proto__ is not an option; accepted here: listen, nodes",
    ],
    [{ constructor: 1, toString: 2 }, "constructor is not an option; accepted here: listen"],
  ])("unknown %j: %s", (options, part) => {
    expect(messages({ ...base, ...options })[0]).toContain(part);
  });

  it("everything at once: faults, unknown names and broken relations of the rest", () => {
    const found = messages({
      listen: { port: "80", hsot: 1 },
      nodes: [{ url: "http://a:1" }, { url: "nope" }, { url: "http://a:1/v1" }],
      scrape: { timeoutMs: 5000 },
      retry: { backoffBaseMs: "x", backoffMaxMs: 1 },
    });
    expect(found.map((message) => message.split(" ")[0])).toEqual([
      "listen.port",
      "listen.hsot",
      "nodes[1].url",
      "retry.backoffBaseMs",
      "scrape.timeoutMs",
      "router.staleMs",
      "nodes[2].url", // The place in the user's list, though nodes[1] was left out.
    ]);
    // A relation with a value that is wrong already is not complained about as well.
    expect(found.join("\n")).not.toContain("backoffMaxMs (1)");
  });

  it("secrets: never in a message, whatever is wrong with them", () => {
    const secret = "zq-hunter2-éé qz";
    const rows = leaves.filter((row) => row.secret !== undefined);
    expect(rows.length).toBeGreaterThan(0);
    for (const row of rows) {
      for (const value of [secret, [secret], { [secret.slice(0, 3)]: secret }, 12345678901]) {
        const text = messages(inputWith(row, value)).join("\n");
        expect(text, row.path).not.toContain("hunter2");
        expect(text, row.path).not.toContain("12345678901");
      }
    }
  });

  it("arbitrary input: never throws, and says something of what it refuses", () => {
    const names = [
      ...new Set(optionRows.flatMap(({ path }) => path.replaceAll("[]", "").split("."))),
    ];
    const { tree } = fc.letrec((tie) => ({
      tree: fc.oneof(
        { maxDepth: 4 },
        fc.jsonValue({ maxDepth: 1 }),
        fc.dictionary(fc.oneof(fc.constantFrom(...names), fc.string()), tie("tree"), {
          maxKeys: 4,
        }),
        fc.array(tie("tree"), { maxLength: 3 }),
      ),
    }));
    fc.assert(
      fc.property(tree, (input) => {
        const result = parseOptions(input);
        if (result.ok) return;
        expect(result.problems.length).toBeGreaterThan(0);
        for (const { message, path, at } of result.problems) {
          expect(message.length).toBeGreaterThan(5);
          expect(path).toBe(pathOf(at));
        }
      }),
      { numRuns: 500 },
    );
  });
});

describe("parseOptions", () => {
  it("what it returns: is accepted again and stays the same", () => {
    const options = parsed({
      nodes: [{ url: "http://a:8000/v1", models: ["m"] }],
      keys: [{ key: "sk-0123456789", tenant: "t", limits: { concurrent: 3 } }],
      cache: { redis: { url: "redis://a" } },
      timeouts: { totalMs: 60_000 },
    });
    expect(parsed(options)).toEqual(options);
  });

  it("undefined fields, empty groups and lists, and $schema: as if left out", () => {
    const input = {
      $schema: "./headrace.schema.json",
      nodes: [{ url: "http://a:8000", apiKey: undefined, models: null }],
      keys: null,
      admin: null,
      cache: { redis: undefined, ttlMs: undefined },
    };
    expect(parsed(input)).toEqual(parsed({ nodes: [{ url: "http://a:8000" }] }));
    expect(messages({ ...base, cache: { ttlMs: null } })[0]).toContain("cache.ttlMs null");
  });

  it("the input: is left as it was", () => {
    const input = { nodes: [{ url: "http://a:8000/v1" }], listen: { port: "x", foo: 1 } };
    const before = structuredClone(input);
    parseOptions(input);
    expect(input).toEqual(before);
  });
});

describe("paths", () => {
  it("text and segments: there and back", () => {
    for (const { path } of optionRows) {
      const concrete = path.replaceAll("[]", "[3]");
      expect(pathOf(segmentsOf(concrete))).toBe(concrete);
    }
  });
});

describe("nearest", () => {
  it.each([
    ["connect", ["connectMs", "totalMs"], "connectMs"],
    ["connectms", ["connectMs", "totalMs"], "connectMs"],
    ["totlaMs", ["connectMs", "totalMs"], "totalMs"],
    ["zebra", ["connectMs", "totalMs"], undefined],
    ["a", ["b", "c"], "b"],
  ])("%s among %j: %s", (word, candidates, expected) => {
    expect(nearest(word, candidates)).toBe(expected);
  });
});

// ---- the world ------------------------------------------------------------------------------------------

const base = { nodes: [{ url: "http://10.0.0.5:8000" }] };

function parsed(input: unknown): Options {
  const result = parseOptions(input);
  if (!result.ok) throw new Error(result.problems.map((p) => `${p.path} ${p.message}`).join("\n"));
  return result.options;
}

function messages(input: unknown): string[] {
  const result = parseOptions(input);
  return result.ok ? [] : result.problems.map(({ path, message }) => `${path} ${message}`.trim());
}

/** A configuration that is right but for the value of one option. */
function inputWith(row: OptionRow, value: unknown): unknown {
  const root: Record<string, unknown> = { ...base };
  let parent = root;
  const names = row.path.split(".");
  for (const name of names.slice(0, -1)) {
    const child: Record<string, unknown> = {};
    if (name === "nodes[]") child.url = "http://a:1";
    if (name === "keys[]") Object.assign(child, { key: "sk-0123456789", tenant: "t" });
    if (name.endsWith("[]")) parent[name.slice(0, -2)] = [child];
    else parent[name] = child;
    parent = child;
  }
  parent[names.at(-1) ?? ""] = value;
  return root;
}

/** What is wrong with one option's own value; relations with others are not. */
function problemsAt(row: OptionRow, value: unknown): string[] {
  const path = row.path.replaceAll("[]", "[0]");
  const result = parseOptions(inputWith(row, value));
  const own = result.ok ? [] : result.problems.filter((problem) => problem.path === path);
  return own.map(({ message }) => message).filter((message) => message.includes("accepted: "));
}
