// biome-ignore-all lint/suspicious/noTemplateCurlyInString: ${NAME} is syntax of the file under test.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Command, CommanderError } from "commander";
import { afterAll, afterEach, describe, expect, it, vi } from "vitest";
import {
  checkConfigCommand,
  configReferenceCommand,
  configSources,
  withConfigFlags,
} from "../bin/config.ts";
import {
  ConfigError,
  type ConfigSources,
  configJsonSchema,
  configReference,
  diffForReload,
  type LoadedConfig,
  loadConfig,
  readOptions,
  resolvedTable,
} from "../transport/config.ts";
import { defaults, optionRows } from "../transport/options.ts";

const folder = mkdtempSync(join(tmpdir(), "headrace-config-"));
afterAll(() => rmSync(folder, { recursive: true }));
afterEach(() => vi.unstubAllEnvs());
const repository = new URL("..", import.meta.url).pathname;
const nodes = "nodes: [{url: http://a:8000}]\n";

describe("precedence", () => {
  it("defaults, file, environment, flags: the later wins, and the source says which", async () => {
    const yaml = `${nodes}queue:\n  perKeyMax: 10\n  poolMax: 100\n  waitMsMax: 1000\n`;
    const { options, sources } = await load(yaml, {
      env: { HEADRACE_QUEUE_POOL_MAX: "200", HEADRACE_QUEUE_WAIT_MS_MAX: "2000" },
      flags: [{ flag: "--set queue.waitMsMax", path: "queue.waitMsMax", value: "3000" }],
    });
    expect(options.queue).toEqual({
      perKeyMax: 10,
      poolMax: 200,
      poolSecondsMax: defaults.queue.poolSecondsMax,
      waitMsMax: 3000,
    });
    expect(sources).toMatchObject({
      "nodes[0].url": "c.yaml:1:10",
      "queue.perKeyMax": "c.yaml:3:3",
      "queue.poolMax": "HEADRACE_QUEUE_POOL_MAX",
      "queue.waitMsMax": "--set queue.waitMsMax",
    });
    expect(sources).not.toHaveProperty("queue.poolSecondsMax");
  });

  it("lists: replaced as a whole, not merged", async () => {
    const { options, sources } = await load(nodes, {
      env: { HEADRACE_NODES: '[{"url": "http://b:1"}, {"url": "http://c:1"}]' },
    });
    expect(options.nodes.map(({ name }) => name)).toEqual(["b:1", "c:1"]);
    expect(sources["nodes[1].url"]).toBe("HEADRACE_NODES");
  });

  it("a load: leaves nothing behind for the next", async () => {
    const flags = [{ flag: "--node", path: "nodes", value: [{ url: "http://a:1" }] }];
    await loadConfig({ env: { HEADRACE_LISTEN_PORT: "1" }, flags });
    expect((await loadConfig({ env: {}, flags })).options.listen.port).toBe(8080);
  });
});

describe("file", () => {
  it("JSON: is read as YAML is, tabs and $schema included", async () => {
    const json =
      '{\n\t"$schema": "./headrace.schema.json",\n\t"nodes": [\n\t\t{"url": "http://a:1"}\n\t]\n}';
    const { options, sources } = await load(json);
    expect(options.nodes).toHaveLength(1);
    expect(sources["nodes[0].url"]).toBe("c.yaml:4:4");
  });

  it("HEADRACE_CONFIG: names the file when no flag does", async () => {
    const file = write(`${nodes}listen: {port: 1234}\n`);
    expect((await loadConfig({ env: { HEADRACE_CONFIG: file } })).options.listen.port).toBe(1234);
  });

  it("empty groups, anchors and aliases: as one would expect", async () => {
    const yaml = `${nodes}admin:\n  # token: x\nkeys:\n  - {key: sk-11111111, tenant: a, limits: &l {concurrent: 3}}\n  - {key: sk-22222222, tenant: b, limits: *l}\n`;
    const { options } = await load(yaml);
    expect(options.admin).toEqual({});
    expect(options.keys.map(({ limits }) => limits)).toEqual([
      { concurrent: 3 },
      { concurrent: 3 },
    ]);
  });

  it.each([
    ["nodes: [", /^c\.yaml:1:\d+: is not valid YAML: /],
    ["listen: {port: 1}\nlisten: {port: 2}", /^c\.yaml:2:1: is not valid YAML: duplicate key/],
    ["a: *nowhere", /^c\.yaml: holds an alias without its anchor/],
    ["- 1", /^c\.yaml: is not a mapping of options/],
    ["text", /^c\.yaml: is not a mapping of options/],
  ])("%j: is refused with its place", async (yaml, expected) => {
    expect(await lines(yaml)).toEqual([expect.stringMatching(expected)]);
  });

  it("a syntax error: does not quote the file, which may hold secrets", async () => {
    const broken = [
      `admin: {token: "hunter2}`,
      "admin: @hunter2",
      "> hunter2",
      "%hunter2",
      "!hunter2 a",
    ];
    for (const yaml of broken) {
      const text = (await lines(yaml)).join("\n");
      expect(text, yaml).toMatch(/^c\.yaml:1:\d+: is not valid YAML: [a-z ]+/);
      expect(text, yaml).not.toContain("hunter2");
    }
  });

  it("no such file; one too large: refused", async () => {
    const file = join(folder, "missing.yaml");
    await expect(loadConfig({ file, env: {} })).rejects.toThrow(
      `${file}: cannot be read (ENOENT); accepted: a YAML or JSON file`,
    );
    expect(await lines(`# ${"x".repeat(4 * 1024 * 1024)}`)).toEqual([
      "c.yaml: is larger than 4 MiB",
    ]);
  });

  it("problems: name line and column of the option, or of the nearest thing that stands there", async () => {
    const yaml = [
      "listen:",
      "  port: 80x",
      "nodes:",
      "  - url: http://a:8000",
      "    engin: vllm",
      "  - name: b",
      "queue: {poolMax: -1}",
      "scrape:",
      "  timeoutMs: 900",
      "  intervalMs: 850",
    ].join("\n");
    expect((await lines(yaml)).map((line) => line.slice(0, 36))).toEqual([
      'c.yaml:2:3: listen.port "80x" is not',
      "c.yaml:5:5: nodes[0].engin is not an",
      "c.yaml:6:5: nodes[1].url is missing;",
      "c.yaml:7:9: queue.poolMax -1 is too ",
      "c.yaml:9:3: scrape.timeoutMs 900 is ",
    ]);
  });
});

describe("${NAME} in the file", () => {
  it("is the variable's value, in any text, alone or in part, and free to start with HEADRACE_", async () => {
    const yaml = [
      "nodes: [{url: 'http://${HOST}:8000', apiKey: '${HEADRACE_NODE_KEY}'}]",
      "keys: [{key: 'sk-${A}${B}', tenant: a, models: ['${A}', 'x']}]",
      "log: {level: '${LEVEL}'}",
    ].join("\n");
    const env = { HOST: "gpu", HEADRACE_NODE_KEY: "nk", A: "1111", B: "2222", LEVEL: "warn" };
    const { options } = await load(yaml, { env });
    expect(options.nodes[0]).toMatchObject({ url: "http://gpu:8000", apiKey: "nk" });
    expect(options.keys[0]?.models).toEqual(["1111", "x"]);
    expect(options.log.level).toBe("warn");
    const same = await load(`${nodes}keys: [{key: sk-11112222, tenant: a, models: ['1111', x]}]`);
    expect(options.keys).toEqual(same.options.keys);
  });

  it("$${: stands for itself", async () => {
    const { options } = await load(`${nodes}record: {file: 'a-$\${X}-$b'}`);
    expect(options.record.file).toBe("a-${X}-$b");
  });

  it.each([
    [
      "apiKey: '${MISSING}'",
      "nodes[0].apiKey needs the environment variable MISSING, which is not set",
    ],
    ["apiKey: '${a-b}'", "nodes[0].apiKey holds ${ that is not ${NAME}"],
    ["apiKey: '${X:-default}'", "nodes[0].apiKey holds ${ that is not ${NAME}"],
    ["apiKey: 'a${'", "nodes[0].apiKey holds ${ that is not ${NAME}"],
  ])("%s: is refused once, with its place", async (field, expected) => {
    const found = await lines(`nodes: [{url: http://a:1, ${field}}]`);
    expect(found).toHaveLength(1);
    expect(found[0]).toContain(`c.yaml:1:27: ${expected}`);
  });

  it("a required value that is not there: is not complained about twice", async () => {
    expect(await lines("nodes: [{url: '${MISSING}'}]")).toEqual([
      "c.yaml:1:10: nodes[0].url needs the environment variable MISSING, which is not set",
    ]);
  });
});

describe("environment", () => {
  it("every option that has a variable: can be set by it", async () => {
    const own: Record<string, string> = {
      HEADRACE_NODES: '[{"url": "http://b:1"}]',
      HEADRACE_KEYS: '[{"key": "sk-11111111", "tenant": "a"}]',
      HEADRACE_ADMIN_TOKEN: "0123456789abcdef",
      HEADRACE_DEFAULT_LIMITS_REQUEST_BURST: "",
      HEADRACE_DEFAULT_LIMITS_TOKEN_BURST: "",
      HEADRACE_DEFAULT_LIMITS_WHEN_UNREACHABLE: "refuse",
      HEADRACE_CLUSTER_KEYS: '[{"id": "a", "secret": "0123456789abcdef"}]',
      HEADRACE_CLUSTER_TLS_CERT: "",
      HEADRACE_CLUSTER_TLS_KEY: "",
      HEADRACE_CLUSTER_TLS_CA: "",
      HEADRACE_CLUSTER_TLS_MUTUAL: "",
      HEADRACE_CACHE_SEMANTIC_EMBEDDER_URL: "http://e:8080",
      HEADRACE_CACHE_SEMANTIC_EMBEDDER_DIMENSION: "384",
      HEADRACE_CACHE_REDIS_URL: "redis://a",
      HEADRACE_CACHE_REDIS_CLUSTER_NODES: '["a:1"]',
      HEADRACE_CACHE_REDIS_SENTINELS: "",
      HEADRACE_CACHE_REDIS_SENTINEL_MASTER: "",
      HEADRACE_CACHE_REDIS_USERNAME: "",
      HEADRACE_CACHE_REDIS_PASSWORD: "",
      HEADRACE_CACHE_REDIS_TLS: "",
      HEADRACE_CACHE_REDIS_KEY_PREFIX: "",
      HEADRACE_WARMUP_FILE: "f",
      HEADRACE_WARMUP_TENANT: "local",
      HEADRACE_WARMUP_MODEL: "m",
      HEADRACE_RECORD_FILE: "f",
      HEADRACE_TIMEOUTS_REQUEST_MS_DEFAULT: "1000",
    };
    let tried = 0;
    for (const { path, env: variable, default: preset } of optionRows) {
      if (variable === undefined) continue;
      const text = own[variable] ?? String(preset ?? 1);
      if (text === "") continue; // Only together with others: see the relations of options.
      const { sources } = await load(nodes, { env: { [variable]: text } });
      expect(Object.entries(sources), path).toContainEqual([
        expect.stringContaining(path),
        variable,
      ]);
      tried += 1;
    }
    expect(tried).toBeGreaterThan(80);
  });

  it.each([
    [
      "HEADRACE_LISTEN_PORT",
      "80x",
      'listen.port "80x" is not a number; accepted: a whole number from 0',
    ],
    ["HEADRACE_LISTEN_PORT", "8080.5", "listen.port 8080.5 is not a whole number"],
    ["HEADRACE_LISTEN_PORT", "", "listen.port is empty; accepted: a whole number"],
    ["HEADRACE_TIMEOUTS_CONNECT_MS", "5s", "(write 5000)"],
    ["HEADRACE_CACHE_ENABLED", "yes", "is not a boolean (write true)"],
    ["HEADRACE_ROUTER_STRATEGY", "hedroom", "did you mean headroom?"],
    ["HEADRACE_KEYS", "sk-hunter2", "keys is not valid JSON; accepted: JSON, a list of at most"],
    ["HEADRACE_NODES", '[{"url": "nope"}]', 'nodes[0].url "nope" does not start with http://'],
    [
      "HEADRACE_LISTN_PORT",
      "1",
      "is not a variable of Headrace; did you mean HEADRACE_LISTEN_PORT?",
    ],
    ["HEADRACE_NONSENSE", "1", "is not a variable of Headrace; accepted: those of"],
  ])("%s=%s: is refused in its name", async (variable, text, expected) => {
    const found = await lines(nodes, { env: { [variable]: text } });
    expect(found).toHaveLength(1);
    expect(found[0]).toMatch(new RegExp(`^${variable}: `));
    expect(found[0]).toContain(expected);
    expect(found[0]).not.toContain("hunter2");
  });

  it("variables that Kubernetes makes of a service called headrace: are nobody's slip", async () => {
    const env = {
      HEADRACE_SERVICE_HOST: "10.0.0.1",
      HEADRACE_SERVICE_PORT: "80",
      HEADRACE_SERVICE_PORT_HTTP: "80",
      HEADRACE_PORT: "tcp://10.0.0.1:80",
      HEADRACE_PORT_80_TCP: "tcp://10.0.0.1:80",
      HEADRACE_PORT_80_TCP_ADDR: "10.0.0.1",
      HEADRACE_REDIS_SERVICE_HOST: "10.0.0.2",
      HEADRACE_REDIS_PORT: "tcp://10.0.0.2:6379",
      HEADRACE_REDIS_PORT_6379_TCP_PROTO: "tcp",
      PATH: "/bin",
    };
    expect((await load(nodes, { env })).options.nodes).toHaveLength(1);
    expect(await lines(nodes, { env: { HEADRACE_PORT: "8080" } })).toEqual([
      expect.stringMatching(/^HEADRACE_PORT: .*did you mean HEADRACE_LISTEN_PORT\?/),
    ]);
  });
});

describe("all sources", () => {
  it("problems of file, environment and flags: all in one run, each in its own name", async () => {
    const found = await lines(
      "nodes: [{url: nope}]\nlisten: {port: -1}\nretry: {backoffBaseMs: 2000}\n",
      {
        env: { HEADRACE_QUEUE_POOL_MAX: "many", HEADRACE_X: "1", HEADRACE_KEYS: "[" },
        flags: [
          { flag: "--set prot", path: "prot", value: "1" },
          { flag: "--log-level", path: "log.level", value: "loud" },
        ],
      },
    );
    expect(found.map((line) => line.split(" ").slice(0, 2).join(" "))).toEqual([
      "HEADRACE_X: is",
      "HEADRACE_KEYS: keys",
      "--set prot:",
      "c.yaml:2:10: listen.port",
      "c.yaml:1:10: nodes[0].url",
      "HEADRACE_QUEUE_POOL_MAX: queue.poolMax",
      "--log-level: log.level",
      "c.yaml:3:9: retry.backoffBaseMs",
    ]);
  });

  it("a variable inside a group that the file has as something else: the file is at fault", async () => {
    const env = { HEADRACE_LISTEN_PORT: "1" };
    expect(await lines(`${nodes}listen: 5\n`, { env })).toEqual([
      "c.yaml:2:1: listen 5 is not accepted; accepted: a mapping with host, port",
    ]);
  });

  it("nothing at all: says what is missing", async () => {
    await expect(loadConfig({ env: {} })).rejects.toThrow("configuration: nodes is empty");
  });

  it("readOptions: the same for options given by a program", () => {
    expect(readOptions({ nodes: [{ url: "http://a:1" }] }).nodes[0]?.name).toBe("a:1");
    expect(() => readOptions({})).toThrow(ConfigError);
    expect(() => readOptions({})).toThrow("options: nodes is empty");
  });
});

describe("resolvedTable", () => {
  it("every option once, with value, unit and source; secrets hidden", async () => {
    const yaml = [
      "nodes: [{url: http://a:8000, apiKey: hunter2-node}]",
      "keys: [{key: hunter2-client, tenant: acme, limits: {concurrent: 3}}]",
      "cache: {redis: {url: 'redis://user:hunter2-redis@r:6379/0'}}",
      "admin: {token: hunter2-administrator}",
    ].join("\n");
    const { options, sources } = await load(yaml, { env: { HEADRACE_CACHE_TTL_MS: "60000" } });
    const table = resolvedTable(options, sources);
    expect(table).not.toContain("hunter2");
    const rows = table.split("\n").map((line) => line.replace(/ {2,}/g, " | "));
    expect(rows).toContain("OPTION | VALUE | FROM");
    expect(rows).toContain("listen.port | 8080 | default");
    expect(rows).toContain("nodes[0].apiKey | (hidden) | c.yaml:1:30");
    expect(rows).toContain("keys[0].keySha256 | (hidden) | c.yaml:2:9");
    expect(rows).toContain("keys[0].limits.concurrent | 3 | c.yaml:2:53");
    expect(rows).toContain("cache.ttlMs | 60000 ms (1 min) | HEADRACE_CACHE_TTL_MS");
    expect(rows).toContain("cache.bytesMax | 268435456 bytes (256 MiB) | default");
    expect(rows).toContain("cache.redis.url | redis://user:(hidden)@r:6379/0 | c.yaml:3:17");
    expect(rows).toContain("admin.token | (hidden) | c.yaml:4:9");
    expect(rows).toContain("record.file | (unset)");
    for (const { path, kind } of optionRows) {
      if (kind === "group" || kind === "items" || path.includes("[]")) continue;
      expect(
        rows.filter((row) => row.startsWith(`${path} | `)),
        path,
      ).toHaveLength(1);
    }
  });

  it("empty lists: are shown as such", async () => {
    const { options, sources } = await load(nodes);
    expect(resolvedTable(options, sources)).toMatch(/^keys +\(none\) +default$/m);
  });
});

describe("generated documents", () => {
  it("reference: names every option, variable and default", () => {
    const reference = configReference();
    for (const { path, env, doc } of optionRows) {
      expect(reference).toContain(path.includes(".") ? `| \`${path}\`` : `## ${path}`);
      if (env !== undefined) expect(reference).toContain(`\`${env}\``);
      expect(reference).toContain(doc.replaceAll("|", "\\|"));
    }
    expect(reference).toContain(
      "| `cache.bytesMax`<br>`HEADRACE_CACHE_BYTES_MAX` | 268435456 bytes (256 MiB) |",
    );
  });

  it("headrace.schema.json: is what the code makes (UPDATE=1 rewrites it)", () => {
    const file = join(repository, "headrace.schema.json");
    const made = configJsonSchema();
    if (process.env.UPDATE === "1") writeFileSync(file, `${JSON.stringify(made, null, 2)}\n`);
    expect(JSON.parse(readFileSync(file, "utf8"))).toEqual(made);
  });

  it("headrace.example.yaml: is accepted as it stands", async () => {
    const { options } = await loadConfig({
      file: join(repository, "headrace.example.yaml"),
      env: {},
    });
    expect(options.nodes.map(({ name }) => name)).toEqual(["gpu-1", "gpu-2", "gpu-3"]);
    expect(options.keys.map(({ priority }) => priority)).toEqual(["interactive", "batch"]);
  });
});

describe("diffForReload", () => {
  it("changes: applied where they are live, named where they need a restart", async () => {
    const { options: from } = await load(`${nodes}log: {level: info}\n`);
    const { options: to } = await load(
      "nodes: [{url: http://a:8000, inflightMax: 9}, {url: http://b:1}]\nlog: {level: warn}\nlisten: {port: 1}\nkeys: [{key: sk-11111111, tenant: a}]\n",
    );
    const plan = diffForReload(from, to);
    expect(plan.apply).toEqual(["nodes", "keys", "log.level"]);
    expect(plan.refuse).toEqual(["listen.port"]);
    expect(plan.nodes).toEqual({
      added: [to.nodes[1]],
      removed: [],
      changed: [{ from: from.nodes[0], to: to.nodes[0] }],
    });
    expect(diffForReload(to, from).nodes.removed).toEqual([to.nodes[1]]);
  });

  it("the same options, written in another order: no change", async () => {
    const { options: from } = await load(`${nodes}queue: {perKeyMax: 3, poolMax: 4}\n`);
    const { options: to } = await load(`queue: {poolMax: 4, perKeyMax: 3}\n${nodes}`);
    expect(diffForReload(from, to)).toEqual({
      apply: [],
      refuse: [],
      nodes: { added: [], removed: [], changed: [] },
    });
  });
});

describe("commands", () => {
  it("check-config: prints the table of a good configuration", async () => {
    const { out, failure } = await run(checkConfigCommand(), ["-c", write(nodes), "--port", "9"]);
    expect(failure).toBeUndefined();
    expect(out).toMatch(/^listen\.port +9 +--port$/m);
  });

  it("check-config: every problem and exit status 2 for a bad one", async () => {
    vi.stubEnv("HEADRACE_LISTEN_PORT", "x");
    const { out, err, failure } = await run(checkConfigCommand(), ["--set", "queue.poolMax=y"]);
    expect(failure).toBeInstanceOf(CommanderError);
    expect(failure).toMatchObject({ exitCode: 2 });
    expect(out).toBe("");
    expect(err).toMatch(/^The configuration has 3 problems:\n/);
    expect(err).toContain('HEADRACE_LISTEN_PORT: listen.port "x"');
    expect(err).toContain('--set queue.poolMax: queue.poolMax "y"');
    expect(err).toContain("configuration: nodes is empty");
  });

  it("config-reference: prints Markdown, or JSON Schema", async () => {
    expect((await run(configReferenceCommand(), [])).out).toBe(configReference());
    const { out } = await run(configReferenceCommand(), ["--json-schema"]);
    expect(JSON.parse(out)).toEqual(configJsonSchema());
  });

  it("flags: become settings, the repeated ones in order", () => {
    const command = withConfigFlags(new Command("serve")).exitOverride();
    const line =
      "--config f --node http://a:1 --node http://b:1 --set a.b=c=d --set x --log-level warn --port 1";
    command.parse(line.split(" "), { from: "user" });
    expect(configSources(command, {})).toEqual({
      file: "f",
      env: {},
      flags: [
        { flag: "--node", path: "nodes", value: [{ url: "http://a:1" }, { url: "http://b:1" }] },
        { flag: "--port", path: "listen.port", value: "1" },
        { flag: "--log-level", path: "log.level", value: "warn" },
        { flag: "--set a.b", path: "a.b", value: "c=d" },
        { flag: "--set x", path: "x", value: "" },
      ],
    });
  });
});

// ---- the world ------------------------------------------------------------------------------------------

function write(yaml: string): string {
  const file = join(folder, "c.yaml");
  writeFileSync(file, yaml);
  return file;
}

/** Loads a file with this text; its path in sources and messages is shortened to "c.yaml". */
async function load(yaml: string, more: Partial<ConfigSources> = {}): Promise<LoadedConfig> {
  const { options, sources } = await loadConfig({ env: {}, ...more, file: write(yaml) });
  const short = Object.entries(sources).map(([path, source]) => [path, shortened(source)]);
  return { options, sources: Object.fromEntries(short) };
}

/** The complaints about a file with this text, one a line. */
async function lines(yaml: string, more: Partial<ConfigSources> = {}): Promise<string[]> {
  try {
    await load(yaml, more);
  } catch (error) {
    if (error instanceof ConfigError) return shortened(error.message).split("\n");
    throw error;
  }
  return [];
}

function shortened(text: string): string {
  return text.replaceAll(`${folder}/`, "");
}

async function run(
  command: Command,
  args: string[],
): Promise<{ out: string; err: string; failure?: unknown }> {
  let [out, err] = ["", ""];
  command.exitOverride().configureOutput({
    writeOut: (text) => {
      out += text;
    },
    writeErr: (text) => {
      err += text;
    },
  });
  try {
    await command.parseAsync(args, { from: "user" });
  } catch (failure) {
    return { out, err, failure };
  }
  return { out, err };
}
