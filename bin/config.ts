/**
 * The commands `headrace check-config` and `headrace config-reference`, and the flags by which
 * every command that runs a gateway takes its configuration.
 */
import { Command } from "commander";
import {
  ConfigError,
  type ConfigSources,
  configJsonSchema,
  configReference,
  type FlagSetting,
  loadConfig,
  resolvedTable,
} from "../transport/config.ts";

/** Flags that set one option each. Everything else is set with --set. */
const optionFlags = [
  { flag: "--host", name: "host", path: "listen.host", doc: "address to listen on" },
  { flag: "--port", name: "port", path: "listen.port", doc: "port to listen on" },
  { flag: "--strategy", name: "strategy", path: "router.strategy", doc: "how nodes are chosen" },
  { flag: "--redis", name: "redis", path: "cache.redis.url", doc: "Redis that holds the cache" },
  { flag: "--record", name: "record", path: "record.file", doc: "record requests to this file" },
  { flag: "--peer-id", name: "peerId", path: "cluster.id", doc: "name of this peer of a cluster" },
  { flag: "--log-level", name: "logLevel", path: "log.level", doc: "least severe line logged" },
] as const;

type ConfigFlags = Partial<Record<(typeof optionFlags)[number]["name"], string>> & {
  peer?: string[];
  peerListen?: string;
  config?: string;
  node?: string[];
  set?: string[];
};

/**
 * Adds --config, --node, --set and the flags of the commonest options. Read them with
 * `configSources`.
 */
export function withConfigFlags(command: Command): Command {
  const collect = (value: string, before: string[] | undefined): string[] => [
    ...(before ?? []),
    value,
  ];
  command.option("-c, --config <file>", "YAML or JSON file (else HEADRACE_CONFIG)");
  command.option("--node <url>", "a node; repeat for more (replaces the file's)", collect);
  for (const { flag, doc } of optionFlags) command.option(`${flag} <value>`, doc);
  command.option(
    "--peer <address>",
    "where a peer may be, ws://host:port; repeat for more",
    collect,
  );
  command.option("--peer-listen <host:port>", "where peers connect");
  return command.option("--set <path=value>", "any option, e.g. queue.poolMax=500", collect);
}

/** Where `loadConfig` is to look, from the flags of a command made by `withConfigFlags`. */
export function configSources(command: Command, env: ConfigSources["env"]): ConfigSources {
  const given = command.opts<ConfigFlags>();
  const flags: FlagSetting[] = [];
  if (given.node !== undefined) {
    flags.push({ flag: "--node", path: "nodes", value: given.node.map((url) => ({ url })) });
  }
  if (given.peer !== undefined) {
    flags.push({ flag: "--peer", path: "cluster.seeds", value: given.peer });
  }
  if (given.peerListen !== undefined) flags.push(...peerListenFlags(given.peerListen));
  for (const { flag, name, path } of optionFlags) {
    const value = given[name];
    if (value !== undefined) flags.push({ flag, path, value });
  }
  for (const pair of given.set ?? []) {
    const end = pair.includes("=") ? pair.indexOf("=") : pair.length;
    const path = pair.slice(0, end);
    flags.push({ flag: `--set ${path}`, path, value: pair.slice(end + 1) });
  }
  return { env, flags, ...(given.config !== undefined && { file: given.config }) };
}

function peerListenFlags(given: string): FlagSetting[] {
  const flag = "--peer-listen";
  const port = { flag, path: "cluster.listen.port" };
  const [, host = "", digits = ""] = /^(.+):(\d+)$/.exec(given) ?? [];
  if (host === "") return [{ ...port, value: given }]; // Refused, with what a port is.
  const bare = host.replace(/^\[(.*)\]$/, "$1");
  return [
    { flag, path: "cluster.listen.host", value: bare },
    { ...port, value: digits },
  ];
}

/**
 * Loads the configuration of a command, or ends it: every problem on standard error, exit status 2.
 */
export async function loadConfigOrExit(command: Command): ReturnType<typeof loadConfig> {
  try {
    return await loadConfig(configSources(command, process.env));
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    const count = error.problems.length;
    const heading = `The configuration has ${count === 1 ? "one problem" : `${count} problems`}:`;
    return command.error(`${heading}\n${error.message}`, { exitCode: 2, code: "headrace.config" });
  }
}

/**
 * `headrace check-config`: prints every option, its value and its source; exit status 2 if anything
 * is wrong.
 */
export function checkConfigCommand(): Command {
  const command = new Command("check-config").description(
    "check the configuration and print every option with its value and where it comes from",
  );
  return withConfigFlags(command).action(async () => {
    const { options, sources } = await loadConfigOrExit(command);
    command.configureOutput().writeOut?.(resolvedTable(options, sources));
  });
}

/** `headrace config-reference`: prints all options as Markdown, or as JSON Schema for editors. */
export function configReferenceCommand(): Command {
  const command = new Command("config-reference")
    .description("print the reference of all options (Markdown)")
    .option("--json-schema", "print JSON Schema for editors instead");
  return command.action(({ jsonSchema }: { jsonSchema?: boolean }) => {
    const text =
      jsonSchema === true ? `${JSON.stringify(configJsonSchema(), null, 2)}\n` : configReference();
    command.configureOutput().writeOut?.(text);
  });
}
