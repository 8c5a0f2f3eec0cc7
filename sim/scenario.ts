/**
 * What the fuzzer plays: a cluster, its load, and what goes wrong, as plain data; drawn from a seed, or read from a
 * file. Pure.
 *
 * Swarm: each scenario turns on a random subset of the kinds of faults, each with an intensity of its own, and so for
 * every feature of the gateway (plain random mixtures of everything find little). Faults end by `faultMs`; what is
 * drawn is limited so that a cluster can recover from it. Every part draws from its own stream.
 */
import { strategyNames } from "../actors/node-score.ts";
import { Random } from "../runtime/random.ts";
import type { OptionsInput } from "../transport/options.ts";
import { type Fault, FaultError, faultText, parseFaults } from "./faults.ts";
import type { ClientOptions } from "./simulator.ts";

export type ScenarioNode = {
  models: readonly string[];
  slowFactor: number;
  kvBlocks: number;
  /** Sequences that its engine runs at once. */
  seats: number;
  /** 0 = no prefix cache. */
  prefixCacheTokens: number;
};

/** One request; equal in tenant, model, system, params and text means the same request. */
export type ScenarioRequest = {
  atMs: number;
  /** Absent where no keys are configured. */
  tenant?: string;
  model: string;
  system: string;
  params: string;
  text: string;
  inputTokens: number;
  outputTokens: number;
  maxTokens?: number;
  session?: string;
  /** `no-cache` and `no-store`, where false. */
  cacheRead: boolean;
  cacheWrite: boolean;
  stream: boolean;
  /** Its client goes away so long after it sent, whatever it has by then. */
  leaveAfterMs?: number;
};

export type Scenario = {
  format: typeof FORMAT;
  seed: string;
  nodes: readonly ScenarioNode[];
  gateways: number;
  hasStore: boolean;
  options: OptionsInput;
  clients: ClientOptions;
  requests: readonly ScenarioRequest[];
  /** Clauses of the fault language; each is over by `faultMs`. */
  faults: readonly string[];
  /** From here on nothing goes wrong any more, ms. */
  faultMs: number;
  /** What is asked in the quiet period: prompts of one kind, and all of one session or each of its own. */
  quiet: Quiet;
};

export type Quiet = {
  /** From the last fault until all must be well: above a lease's life, and the longest time out of a circuit. */
  recoveryMs: number;
  inputTokens: number;
  perSecond: number;
  isOneSession: boolean;
};

/** A scenario that cannot be played; says what is wrong and what is accepted. */
export class ScenarioError extends Error {
  override readonly name = "ScenarioError";
}

/** How large scenarios are drawn: `small` for tests, `full` for campaigns. */
export type Profile = "small" | "full";

const FORMAT = "headrace-scenario-1";
const REQUESTS_MAX = 20_000;
const NODES_MAX = 64;
const GATEWAYS_MAX = 16;
const FAULT_MS_MAX = 3_600_000;
/** A supervisor that meets more than ten crashes in a minute gives the process up, as it should. */
const ACTOR_CRASHES_MAX = 4;

type Sizes = {
  faultMs: readonly [number, number];
  /** Mean requests a second. */
  rate: readonly [number, number];
  nodes: readonly [number, number];
  gateways: readonly [number, number];
  /** First time out of a circuit; the longest is four times as long. */
  openMs: readonly [number, number];
  recoveryMs: number;
};

const sizes: Readonly<Record<Profile, Sizes>> = {
  small: {
    faultMs: [8_000, 14_000],
    rate: [3, 8],
    nodes: [2, 4],
    gateways: [1, 3],
    openMs: [300, 1500],
    recoveryMs: 40_000,
  },
  full: {
    faultMs: [15_000, 60_000],
    rate: [2, 16],
    nodes: [2, 6],
    gateways: [1, 4],
    openMs: [500, 4000],
    recoveryMs: 60_000,
  },
};

/** Kinds that a scenario may turn on: those of the fault language, and what clients do. */
export const drawnKinds = [
  "crash",
  "slow",
  "hang",
  "refuse",
  "errors",
  "cut",
  "kv",
  "partition",
  "node-partition",
  "reset-link",
  "gateway",
  "actor",
  "skew",
  "drift",
  "leave",
  "store",
] as const;
type DrawnKind = (typeof drawnKinds)[number];

/** The scenario of a seed: equal seeds, equal scenarios. */
export function drawScenario(seed: number | string, profile: Profile = "full"): Scenario {
  const random = new Random(seed).split("scenario");
  const size = sizes[profile];
  const cluster = new Draw(random.split("cluster"));
  const faultMs = cluster.whole(...size.faultMs);
  const models = cluster.chance(0.3) ? ["alpha", "beta"] : ["alpha"];
  const nodes = drawNodes(cluster, models, cluster.whole(...size.nodes));
  const gateways = cluster.whole(...size.gateways);
  const tenants = cluster.chance(0.6)
    ? ["acme", "birch", "cedar"].slice(0, cluster.whole(1, 3))
    : [];
  const { options, hasStore } = drawOptions(
    new Draw(random.split("options")),
    tenants,
    size.openMs,
  );
  const load = { models, tenants, faultMs, rate: cluster.between(...size.rate) };
  const requests = drawRequests(new Draw(random.split("requests")), load);
  const world = { nodes: nodes.length, gateways, hasStore, faultMs };
  return {
    format: FORMAT,
    seed: String(seed),
    nodes,
    gateways,
    hasStore,
    options,
    clients: drawClients(new Draw(random.split("clients"))),
    requests,
    faults: drawFaults(random.split("faults"), world).map(faultText),
    faultMs,
    quiet: {
      recoveryMs: size.recoveryMs,
      // Light for the slowest nodes; long prompts, since those try no half-open node by themselves.
      ...(cluster.chance(0.3)
        ? { inputTokens: 2100, perSecond: 1 }
        : { inputTokens: 40, perSecond: 3 }),
      isOneSession: cluster.chance(0.3),
    },
  };
}

/** Draws of one purpose. */
class Draw {
  readonly random: Random;

  constructor(random: Random) {
    this.random = random;
  }

  chance(share: number): boolean {
    return this.random.next() < share;
  }

  between(least: number, most: number): number {
    return least + (most - least) * this.random.next();
  }

  /** As often between 1 and 10 as between 10 and 100. */
  logBetween(least: number, most: number): number {
    return least * Math.exp(Math.log(most / least) * this.random.next());
  }

  whole(least: number, most: number): number {
    return least + this.random.int(most - least + 1);
  }

  of<T>(items: readonly [T, ...T[]] | readonly T[]): T {
    const item = items[this.random.int(items.length)];
    if (item === undefined) throw new RangeError("nothing to draw from");
    return item;
  }
}

function drawNodes(draw: Draw, models: readonly string[], count: number): ScenarioNode[] {
  return Array.from({ length: count }, (_, index) => ({
    // Every model has two nodes at least, where there are so many, so that a retry can go somewhere.
    models: models.length === 1 || draw.chance(0.6) ? models : [models[index % 2] ?? "alpha"],
    slowFactor: draw.chance(0.3) ? Number(draw.logBetween(1, 4).toFixed(2)) : 1,
    kvBlocks: draw.chance(0.4) ? draw.whole(300, 600) : draw.whole(1000, 8000),
    seats: draw.of([4, 16, 256]),
    prefixCacheTokens: draw.chance(0.5) ? 0 : 20_000,
  }));
}

function drawOptions(
  draw: Draw,
  tenants: readonly string[],
  openMsRange: readonly [number, number],
): { options: OptionsInput; hasStore: boolean } {
  const openMs = draw.whole(...openMsRange);
  const totalMs = draw.whole(20_000, 60_000);
  const isCached = draw.chance(0.8);
  const options: OptionsInput = {
    keys: tenants.map((tenant, index) => ({
      key: `key-of-${tenant}`,
      name: `${tenant}-key`,
      tenant,
      priority: draw.of(["interactive", "standard", "batch"] as const),
      weight: draw.of([0.5, 1, 3]),
      // A quota that is used up stays so: another tenant must be there to try what should come back.
      limits: {
        ...drawLimits(draw),
        ...(index === 0 && tenants.length > 1 && draw.chance(0.2) && { tokensPerDay: 50_000 }),
      },
    })),
    defaultLimits: draw.chance(0.2) ? drawLimits(draw) : {},
    router: {
      strategy: draw.chance(0.5) ? "headroom" : draw.of(strategyNames),
      slowStartMs: draw.of([0, 2000, 10_000]),
    },
    queue: { perKeyMax: draw.of([5, 20, 200]), poolMax: 400, waitMsMax: draw.whole(1000, 15_000) },
    retry: {
      attemptsMax: draw.whole(1, 4),
      budgetRatio: draw.of([0.1, 0.5, 1]),
      budgetFloorPerSecond: draw.of([1, 10]),
      backoffBaseMs: draw.of([0, 50]),
    },
    circuit: { openMs, openMsMax: openMs * 4, wedgedMs: draw.of([4000, 15_000]) },
    concurrency: { inflightMin: draw.of([1, 4]), inflightMax: draw.of([4, 16, 256]) },
    timeouts: {
      firstTokenMs: draw.whole(1000, 5000),
      stallMs: draw.whole(2000, 10_000),
      totalMs,
      requestMsDefault: draw.whole(8000, totalMs),
    },
    health: { intervalMs: 2000, timeoutMs: 1000 },
    cache: { enabled: isCached, ttlMs: draw.of([2000, 3_600_000]) },
  };
  return { options, hasStore: isCached && draw.chance(0.5) };
}

function drawLimits(draw: Draw): NonNullable<OptionsInput["defaultLimits"]> {
  return {
    ...(draw.chance(0.4) && { requestsPerMinute: draw.whole(30, 600) }),
    ...(draw.chance(0.4) && { tokensPerMinute: draw.whole(20_000, 200_000) }),
    ...(draw.chance(0.3) && { concurrent: draw.whole(2, 30) }),
    ...(draw.chance(0.2) && { concurrentTokens: draw.whole(8000, 60_000) }),
  };
}

function drawClients(draw: Draw): ClientOptions {
  return {
    ...(draw.chance(0.3) && { deadlineMs: Math.round(draw.logBetween(700, 20_000)) }),
    ...(draw.chance(0.3) && { patienceMs: draw.whole(4000, 20_000) }),
    ...(draw.chance(0.5) && { retriesMax: draw.whole(1, 3), retryMs: draw.of([100, 1000]) }),
  };
}

type Load = {
  models: readonly string[];
  tenants: readonly string[];
  faultMs: number;
  rate: number;
};

function drawRequests(draw: Draw, { models, tenants, faultMs, rate }: Load): ScenarioRequest[] {
  const repeats = draw.of([0, 0.2, 0.6]);
  const texts = draw.whole(3, 30);
  const outputTokensMax = draw.of([40, 300, 900]);
  const inputTokensMax = draw.of([200, 1500]);
  const leaving = draw.of([0, 0.05, 0.3]);
  const requests: ScenarioRequest[] = [];
  const add = (atMs: number, herd?: string) => {
    const isRepeat = draw.chance(repeats);
    // Few texts under few systems and parameters: the same words often stand under another identity.
    const text =
      herd ??
      (isRepeat ? `question ${draw.whole(1, texts)}` : `question of its own ${requests.length}`);
    const maxTokens = draw.chance(0.5) ? draw.of([16, 100, 1000]) : undefined;
    requests.push({
      atMs,
      ...(tenants.length > 0 && { tenant: draw.of(tenants) }),
      model: draw.of(models),
      system: draw.of(["", "be brief"]),
      params: maxTokens === undefined ? "" : `max_tokens=${maxTokens}`,
      text,
      inputTokens: Math.round(draw.logBetween(8, inputTokensMax)),
      outputTokens: Math.round(draw.logBetween(2, outputTokensMax)),
      ...(maxTokens !== undefined && { maxTokens }),
      ...(draw.chance(0.2) && { session: `session ${draw.whole(1, 10)}` }),
      cacheRead: !draw.chance(0.05),
      cacheWrite: !draw.chance(0.05),
      stream: !draw.chance(0.1),
      ...(draw.chance(leaving) && { leaveAfterMs: Math.round(draw.logBetween(1, 5000)) }),
    });
  };
  let atMs = 0;
  while (requests.length < REQUESTS_MAX) {
    atMs += (-Math.log(1 - draw.random.next()) * 1000) / rate;
    if (atMs >= faultMs) break;
    add(Math.round(atMs));
  }
  // Overload for a moment; now and then everyone asks the same.
  const bursts = draw.chance(0.7) ? draw.whole(1, 3) : 0;
  for (let i = 0; i < bursts; i++) {
    const burstMs = draw.whole(0, faultMs - 1000);
    const spreadMs = draw.of([10, 200, 900]);
    const herd = draw.chance(0.4) ? `question ${draw.whole(1, texts)}` : undefined;
    for (let n = draw.whole(10, 120); n > 0; n--) add(burstMs + draw.whole(0, spreadMs), herd);
  }
  return requests.sort((a, b) => a.atMs - b.atMs);
}

type World = { nodes: number; gateways: number; hasStore: boolean; faultMs: number };

function drawFaults(random: Random, world: World): Fault[] {
  const choice = new Draw(random.split("choice"));
  const share = choice.of([0.1, 0.25, 0.5]);
  const faults: Fault[] = [];
  for (const kind of drawnKinds) {
    const isOn = choice.chance(share);
    const draw = new Draw(random.split(kind));
    if (!isOn) continue;
    const most = kind === "actor" ? ACTOR_CRASHES_MAX : 4;
    for (let n = draw.whole(1, most); n > 0; n--) {
      const fault = drawFault(kind, draw, world);
      if (fault !== undefined) faults.push(fault);
    }
  }
  return faults;
}

/** Undefined where the world has nothing that it could happen to. */
function drawFault(kind: DrawnKind, draw: Draw, world: World): Fault | undefined {
  const { faultMs, gateways } = world;
  const atMs = draw.whole(0, Math.round(faultMs * 0.9));
  const forMs = Math.min(faultMs - atMs, Math.round(draw.logBetween(200, faultMs)));
  const atUs = atMs * 1000;
  const time = { atUs, forUs: forMs * 1000 };
  const node = `node-${draw.whole(1, world.nodes)}`;
  const first = draw.whole(1, gateways);
  const gateway = `gw-${first}`;
  const peer = `gw-${((first + draw.random.int(Math.max(1, gateways - 1))) % gateways) + 1}`;
  switch (kind) {
    case "crash":
    case "hang":
    case "refuse":
      return { kind, node, ...time };
    case "slow":
      return { kind, node, factor: Number(draw.logBetween(1.5, 30).toFixed(1)), ...time };
    case "errors": {
      const status = draw.of([400, 429, 500, 502, 503, 504]);
      return { kind, node, status, share: draw.of([0.1, 0.5, 1]), ...time };
    }
    case "cut":
      return { kind, node, share: draw.of([0.1, 0.5, 1]), ...time };
    case "kv":
      return { kind, node, share: draw.of([0.05, 0.25, 0.6]), ...time };
    case "partition":
      if (gateways === 1) return undefined;
      return { kind, from: gateway, to: peer, isOneWay: draw.chance(0.5), ...time };
    case "node-partition": {
      const [from, to] = draw.chance(0.5) ? [gateway, node] : [node, gateway];
      return { kind: "partition", from, to, isOneWay: draw.chance(0.6), ...time };
    }
    case "reset-link":
      return gateways === 1 ? undefined : { kind, from: gateway, to: peer, atUs };
    case "gateway":
      return { kind, gateway, ...time };
    case "actor":
      return { kind, actor: drawActor(draw, gateway, node, world.hasStore), atUs };
    case "skew":
      return { kind, gateway, aheadUs: Math.round(draw.logBetween(50, 20_000)) * 1000, atUs };
    case "drift":
      return { kind, gateway, factor: draw.of([0.5, 0.9, 1.1, 2]), ...time };
    case "leave":
      return { kind, share: draw.of([0.2, 0.6, 1]), atUs };
    case "store":
      if (!world.hasStore) return undefined;
      return { kind, how: draw.of(["down", "hang"] as const), ...time };
  }
}

function drawActor(draw: Draw, gateway: string, node: string, hasStore: boolean): string {
  const name = draw.of([
    "requests",
    "router",
    "limiter",
    `cache/${draw.whole(0, 7)}`,
    "nodes",
    "edges/front",
    "edges/upstream",
    "edges/scraper",
    ...(hasStore ? ["edges/store"] : []),
  ]);
  return name === "nodes" ? `nodes/${node}` : `${gateway}/${name}`;
}

// ---- files --------------------------------------------------------------------------------------------

/** As `parseScenario` reads it: JSON, one request a line. */
export function formatScenario(scenario: Scenario): string {
  const { requests, ...rest } = scenario;
  const head = JSON.stringify(rest, null, 2).replace(/\n\}$/, "");
  const lines = requests.map((request) => `    ${JSON.stringify(request)}`);
  return `${head},\n  "requests": [${lines.length === 0 ? "" : `\n${lines.join(",\n")}\n  `}]\n}\n`;
}

/** Throws ScenarioError. What the gateway's options allow, the simulation says. */
export function parseScenario(text: string): Scenario {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new ScenarioError(`not JSON: ${error instanceof Error ? error.message : String(error)}`);
  }
  const root = objectOf(value, "the scenario");
  if (root.format !== FORMAT) {
    throw wrong("format", root.format, `${JSON.stringify(FORMAT)}, as headrace fuzz writes it`);
  }
  const nodes = listOf(root.nodes, "nodes", [1, NODES_MAX]).map((node, index) => {
    const at = `nodes[${index}]`;
    const fields = objectOf(node, at);
    return {
      models: listOf(fields.models, `${at}.models`, [1, 100]).map((model) => textOf(model, at)),
      slowFactor: numberOf(fields.slowFactor, `${at}.slowFactor`, 0.001, 1000),
      kvBlocks: wholeOf(fields.kvBlocks, `${at}.kvBlocks`, 1, 1e9),
      seats: wholeOf(fields.seats, `${at}.seats`, 1, 2048),
      prefixCacheTokens: wholeOf(fields.prefixCacheTokens, `${at}.prefixCacheTokens`, 0, 1e12),
    };
  });
  const quiet = objectOf(root.quiet, "quiet");
  const faultMs = wholeOf(root.faultMs, "faultMs", 0, FAULT_MS_MAX);
  return {
    format: FORMAT,
    seed: textOf(root.seed, "seed"),
    nodes,
    gateways: wholeOf(root.gateways, "gateways", 1, GATEWAYS_MAX),
    hasStore: flagOf(root.hasStore, "hasStore"),
    options: objectOf(root.options, "options"),
    clients: clientsOf(objectOf(root.clients, "clients")),
    requests: requestsOf(root.requests),
    faults: faultsOf(root.faults, faultMs),
    faultMs,
    quiet: {
      recoveryMs: wholeOf(quiet.recoveryMs, "quiet.recoveryMs", 0, FAULT_MS_MAX),
      inputTokens: wholeOf(quiet.inputTokens, "quiet.inputTokens", 1, 1e7),
      perSecond: wholeOf(quiet.perSecond, "quiet.perSecond", 1, 1000),
      isOneSession: flagOf(quiet.isOneSession, "quiet.isOneSession"),
    },
  };
}

function clientsOf(fields: Record<string, unknown>): ClientOptions {
  const clients: ClientOptions = {};
  for (const name of ["deadlineMs", "patienceMs", "retryMs"] as const) {
    if (fields[name] !== undefined)
      clients[name] = wholeOf(fields[name], `clients.${name}`, 1, 1e9);
  }
  if (fields.retriesMax !== undefined) {
    clients.retriesMax = wholeOf(fields.retriesMax, "clients.retriesMax", 0, 100);
  }
  return clients;
}

function requestsOf(value: unknown): ScenarioRequest[] {
  let lastMs = 0;
  return listOf(value, "requests", [0, REQUESTS_MAX]).map((item, index) => {
    const at = `requests[${index}]`;
    const fields = objectOf(item, at);
    const atMs = wholeOf(fields.atMs, `${at}.atMs`, lastMs, FAULT_MS_MAX);
    lastMs = atMs;
    return {
      atMs,
      ...(fields.tenant !== undefined && { tenant: textOf(fields.tenant, `${at}.tenant`) }),
      model: textOf(fields.model, `${at}.model`),
      system: textOf(fields.system, `${at}.system`),
      params: textOf(fields.params, `${at}.params`),
      text: textOf(fields.text, `${at}.text`),
      inputTokens: wholeOf(fields.inputTokens, `${at}.inputTokens`, 1, 1e7),
      outputTokens: wholeOf(fields.outputTokens, `${at}.outputTokens`, 1, 1e7),
      ...(fields.maxTokens !== undefined && {
        maxTokens: wholeOf(fields.maxTokens, `${at}.maxTokens`, 1, 1e7),
      }),
      ...(fields.session !== undefined && { session: textOf(fields.session, `${at}.session`) }),
      cacheRead: flagOf(fields.cacheRead, `${at}.cacheRead`),
      cacheWrite: flagOf(fields.cacheWrite, `${at}.cacheWrite`),
      stream: flagOf(fields.stream, `${at}.stream`),
      ...(fields.leaveAfterMs !== undefined && {
        leaveAfterMs: wholeOf(fields.leaveAfterMs, `${at}.leaveAfterMs`, 0, 1e9),
      }),
    };
  });
}

function faultsOf(value: unknown, faultMs: number): string[] {
  return listOf(value, "faults", [0, 1000]).map((item, index) => {
    const text = textOf(item, `faults[${index}]`);
    for (const fault of readFaults(text)) {
      const endUs = "forUs" in fault ? (fault.forUs ?? Number.POSITIVE_INFINITY) : 0;
      if (fault.atUs + endUs <= faultMs * 1000) continue;
      throw new ScenarioError(
        `faults[${index}] ${JSON.stringify(text)} is not over by faultMs (${faultMs}): then the quiet period begins`,
      );
    }
    return text;
  });
}

function readFaults(text: string): Fault[] {
  try {
    return parseFaults(text);
  } catch (error) {
    if (error instanceof FaultError) throw new ScenarioError(error.message);
    throw error;
  }
}

function wrong(at: string, value: unknown, accepted: string): ScenarioError {
  const shown = value === undefined ? "missing" : JSON.stringify(value).slice(0, 60);
  return new ScenarioError(`${at} is ${shown}; accepted: ${accepted}`);
}

function objectOf(value: unknown, at: string): Record<string, unknown> {
  if (typeof value === "object" && value !== null && !Array.isArray(value)) {
    return value as Record<string, unknown>;
  }
  throw wrong(at, value, "an object");
}

function listOf(value: unknown, at: string, [least, most]: readonly [number, number]): unknown[] {
  if (Array.isArray(value) && value.length >= least && value.length <= most) return value;
  throw wrong(at, value, `a list of ${least} to ${most}`);
}

function textOf(value: unknown, at: string): string {
  if (typeof value === "string" && value.length <= 10_000) return value;
  throw wrong(at, value, "a text of at most 10000 characters");
}

function flagOf(value: unknown, at: string): boolean {
  if (typeof value === "boolean") return value;
  throw wrong(at, value, "true or false");
}

function numberOf(value: unknown, at: string, least: number, most: number): number {
  if (typeof value === "number" && value >= least && value <= most) return value;
  throw wrong(at, value, `a number from ${least} to ${most}`);
}

function wholeOf(value: unknown, at: string, least: number, most: number): number {
  const isWhole = typeof value === "number" && Number.isInteger(value);
  if (isWhole && value >= least && value <= most) return value;
  throw wrong(at, value, `a whole number from ${least} to ${most}`);
}
