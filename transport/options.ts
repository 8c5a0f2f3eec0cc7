/**
 * Every option of Headrace: one schema with description, unit, default and bounds, and the
 * relations between options. Pure data: reading files and the environment is config.ts.
 *
 * What a user can set has its default here and nowhere else. A name carries its unit (`connectMs`,
 * `bodyBytesMax`), so values are plain numbers, and "5s" is an error that says what to write.
 * "live" groups take effect on reload, "restart" groups are held by something that is built once.
 */
import { createHash } from "node:crypto";
import * as z from "zod";
import { EMBEDDER_MODEL } from "./embedder-backend.ts";
import { explain, overlap, type Problem, segmentsOf } from "./option-problems.ts";
import {
  boolean,
  bytes,
  calls,
  choice,
  count,
  group,
  isMapping,
  items,
  jsonSchemaOf,
  live,
  ms,
  number,
  type OptionRow,
  ratio,
  requests,
  restart,
  rowsOf,
  type TextCheck,
  text,
  texts,
  tokens,
  unwrap,
} from "./option-schema.ts";
import { wrongSeed } from "./peer-seeds.ts";

const MiB = 1024 * 1024;
const GiB = 1024 * MiB;

// ---- checks of texts ----------------------------------------------------------------------------

const nameAccepted =
  "1 to 64 letters, digits, '.', '_', '-' or ':', starting with a letter or digit";

function wrongName(value: string): string | undefined {
  return /^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$/.test(value) ? undefined : "is not a valid name";
}

function wrongUrl(value: string): string | undefined {
  if (!/^https?:\/\//i.test(value)) return "does not start with http:// or https://";
  if (!URL.canParse(value)) return "is not a URL";
  const url = new URL(value);
  if (url.username !== "" || url.password !== "") return "holds a user or password (use apiKey)";
  if (url.search !== "" || url.hash !== "") return "holds a query or fragment";
  return /\/(completions|embeddings|models)\/*$/.test(url.pathname)
    ? "is a route, not the base URL"
    : undefined;
}

function wrongHost(value: string): string | undefined {
  if (/^https?:/i.test(value)) return "is a URL, not a host";
  const isIpv6 = value.includes(":");
  if (isIpv6 && URL.canParse(`http://[${value}]`)) return undefined;
  if (isIpv6) return "holds a port or is not an IPv6 address (the port is listen.port)";
  return /^[A-Za-z0-9.-]+$/.test(value) ? undefined : "is not a host name or IP address";
}

function wrongSecret(lengthMin: number): TextCheck {
  return (value) => {
    if (/^\$[A-Z_][A-Z0-9_]*$|^os\.environ\//.test(value)) {
      // biome-ignore lint/suspicious/noTemplateCurlyInString: this is the syntax that a file has
      return "looks like the name of an environment variable (write it as ${NAME})";
    }
    if (!/^[\x21-\x7e]+$/.test(value)) return "holds a space or a character outside ASCII";
    if (value.length > 512) return "has more than 512 characters";
    return value.length < lengthMin ? `has fewer than ${lengthMin} characters` : undefined;
  };
}

function wrongRedisUrl(value: string): string | undefined {
  if (!/^rediss?:\/\//i.test(value)) return "does not start with redis:// or rediss://";
  return URL.canParse(value) ? undefined : "is not a URL";
}

function wrongHostPort(value: string): string | undefined {
  const match = /^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):(\d{1,5})$/.exec(value);
  const port = Number(match?.[2] ?? 0);
  return port >= 1 && port <= 65_535 ? undefined : "is not host:port";
}

/** Part of every path of its actors: no slash. */
function wrongPeerId(value: string): string | undefined {
  return /^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/.test(value) ? undefined : "is not a valid id";
}

function wrongAdvertised(value: string): string | undefined {
  return wrongHostPort(value) === undefined ? undefined : wrongHost(value);
}

function wrongEmbedderUrl(value: string): string | undefined {
  // Unlike a node's URL it may name the route: TEI and others have it elsewhere.
  return wrongUrl(value.replace(/\/embeddings\/*$/, ""))?.replace("use apiKey", "use key");
}

function name(doc: string) {
  return text({ doc, accepted: nameAccepted, wrong: wrongName });
}

function models(doc: string) {
  return texts({ doc, accepted: "a model's name as clients send it", max: 1000 });
}

// ---- the schema ---------------------------------------------------------------------------------

/** Absent = unlimited. The same fields for one key and as default for all. */
function limitsGroup(doc: string) {
  return group(doc, "live", {
    requestsPerMinute: requests([1, 10_000_000], "Requests a minute.").exactOptional(),
    requestBurst: requests(
      [1, 10_000_000],
      "Requests that may come at once; unset = a sixth of requestsPerMinute, at least 1.",
    ).exactOptional(),
    tokensPerMinute: tokens(
      [1, 1_000_000_000],
      "Prompt and output tokens a minute.",
    ).exactOptional(),
    tokenBurst: tokens(
      [1, 1_000_000_000],
      "Tokens that may come at once, so also the largest request; unset = tokensPerMinute.",
    ).exactOptional(),
    concurrent: requests([1, 100_000], "Requests in flight.").exactOptional(),
    concurrentTokens: tokens(
      [1, 1_000_000_000],
      "Tokens reserved by requests in flight.",
    ).exactOptional(),
    tokensPerDay: tokens(
      [1, 1_000_000_000_000],
      "Tokens a day: 24 hours from the first one.",
    ).exactOptional(),
    whenUnreachable: choice(
      ["share", "refuse"],
      "In a cluster, while the peer that keeps the key's allowance is out of reach: " +
        "share = each peer admits its share of the limits; refuse = 503 until it is back. Unset = share.",
    ).exactOptional(),
  });
}

const node = group("One inference node.", "live", {
  url: text({
    doc: "Base URL of the node's OpenAI routes; a trailing /v1 may stand or not.",
    accepted: "an http:// or https:// URL, such as http://10.0.0.5:8000",
    wrong: wrongUrl,
  }),
  name: name("Name in headers, metrics and logs; unset = host:port of the URL.").exactOptional(),
  models: models("Models it serves; unset = asked of the node (GET /v1/models).").exactOptional(),
  adapters: models(
    "LoRA adapters it holds, by the name clients send as model; unset = asked of the node.",
  ).exactOptional(),
  apiKey: text({
    doc: "Sent to the node as bearer token, also for metrics and health; clients' keys never are.",
    accepted: "printable ASCII without spaces, at most 512 characters",
    secret: "all",
    wrong: wrongSecret(1),
  }).exactOptional(),
  engine: choice(
    ["auto", "vllm", "sglang", "tgi", "trtllm", "llamacpp", "article"],
    "Whose metrics to expect; auto = told by their names, article = JSON with queue_depth and so on.",
  ).default("auto"),
  metricsUrl: text({
    doc: "Where its metrics are; unset = /metrics under its URL.",
    accepted: "an http:// or https:// URL",
    wrong: wrongUrl,
  }).exactOptional(),
  inflightMax: requests(
    [1, 100_000],
    "Most requests in flight on it; unset = what the engine tells, else concurrency.inflightMax.",
  ).exactOptional(),
}).transform(({ url, name, ...rest }) => ({
  ...rest,
  url: baseUrl(url),
  name: name ?? nodeAddress(url),
}));

const semanticModes = ["off", "shadow", "fixed", "verified"] as const;

const key = group("One API key.", "live", {
  key: text({
    doc: "The key itself; only its hash is kept. Give this or keySha256.",
    accepted: "8 to 512 printable ASCII characters without spaces",
    secret: "all",
    wrong: wrongSecret(8),
  }).exactOptional(),
  keySha256: text({
    doc: "SHA-256 of the key, so that the file holds no secret (printf %s KEY | sha256sum).",
    accepted: "64 hexadecimal digits",
    secret: "all",
    wrong: (value) =>
      /^[0-9a-fA-F]{64}$/.test(value) ? undefined : "is not a SHA-256 in hexadecimal",
  }).exactOptional(),
  name: name(
    "Name of the key in metrics and logs; unset = the tenant and the first 8 digits of the key's hash.",
  ).exactOptional(),
  tenant: name(
    "Whose key it is. Tenants share nothing: cached answers, the fair queue and metrics are per tenant.",
  ),
  priority: choice(
    ["interactive", "standard", "batch"],
    "Band in the queue: a higher band goes first.",
  ).default("standard"),
  models: models("Models it may use; unset = all.").exactOptional(),
  limits: limitsGroup(
    "What this key may use; a field left out falls back to defaultLimits.",
  ).prefault({}),
  semantic: group(
    "Matching by meaning for this key; what is left out is as in cache.semantic.",
    "live",
    {
      mode: choice(semanticModes, "As cache.semantic.mode.").exactOptional(),
      similarityMin: ratio([0.5, 1], "As cache.semantic.similarityMin.").exactOptional(),
      errorRateMax: ratio([0.001, 0.5], "As cache.semantic.errorRateMax.").exactOptional(),
      strict: boolean("As cache.semantic.strict.").exactOptional(),
    },
  ).prefault({}),
  weight: number([0.01, 100], "Share of this tenant against others while requests wait.").default(
    1,
  ),
})
  .superRefine((entry, context) => {
    if ((entry.key === undefined) === (entry.keySha256 === undefined)) {
      context.addIssue({ code: "custom", message: "needs either key or keySha256, not both" });
    }
  })
  .transform(({ key: plain, keySha256, name, ...rest }) => {
    const hash = plain === undefined ? (keySha256 ?? "").toLowerCase() : sha256(plain);
    return { ...rest, keySha256: hash, name: name ?? `${rest.tenant}-${hash.slice(0, 8)}` };
  });

const peerKey = group("One secret of the cluster.", "restart", {
  id: text({
    doc: "Its name, which is no secret.",
    accepted: "1 to 32 letters, digits, '.', '_' or '-'",
    wrong: (value) => (/^[A-Za-z0-9._-]{1,32}$/.test(value) ? undefined : "is not a valid id"),
  }),
  secret: text({
    doc: "What peers prove to each other that they know; it never travels.",
    accepted: "16 to 512 printable ASCII characters without spaces",
    secret: "all",
    wrong: wrongSecret(16),
  }),
});

const cluster = group(
  "Several processes as one gateway. Unset = one process. Nodes, keys and limits must be configured alike on all.",
  "restart",
  {
    name: name("Peers of a cluster of another name are refused.").default("headrace"),
    id: text({
      doc:
        "Name of this peer: one of its own, and the same after a restart. Unset = the host's name and " +
        "listen.port; with port 0 the host's name and a random part.",
      accepted: "1 to 63 letters, digits, '.', '_' or '-', starting with a letter or digit",
      wrong: wrongPeerId,
    }).exactOptional(),
    listen: group("Where peers connect.", "restart", {
      host: text({
        doc: "Address to listen on. Other than loopback only with keys configured.",
        accepted: "a host name or IP address, such as 127.0.0.1, 0.0.0.0 or ::",
        wrong: wrongHost,
      }).default("127.0.0.1"),
      port: count([0, 65_535], "Port to listen on; 0 = any free one.").default(7946),
    }).prefault({}),
    advertise: text({
      doc:
        "Where other peers reach this one; unset = listen.host, or this machine's first address where that " +
        "is 0.0.0.0 or ::. Without a port, the one that it listens on.",
      accepted: "a host name, an IP address, or host:port",
      wrong: wrongAdvertised,
    }).exactOptional(),
    seeds: texts({
      doc: "Where peers are to be found at the start, this one or not; any that answers tells of the others.",
      accepted: "ws://host:port, wss://host:port, dns://name:port or srv://name",
      max: 100,
      wrong: wrongSeed,
    }).default([]),
    keys: items(
      "Secrets that peers share: the first is used, all are accepted, so that one can follow another " +
        "without a pause. None = whoever reaches the port, which then must be loopback.",
      "restart",
      8,
      peerKey,
    ).default([]),
    tls: group("TLS between peers; addresses then begin with wss://.", "restart", {
      cert: text({ doc: "File of this peer's certificate, PEM.", accepted: "a path" }),
      key: text({ doc: "File of its private key, PEM.", accepted: "a path" }),
      ca: text({
        doc: "File of the authorities that certificates must come from, PEM; unset = those that Node trusts.",
        accepted: "a path",
      }).exactOptional(),
      mutual: boolean("Both sides show a certificate.").default(true),
    }).exactOptional(),
    lostMs: ms(
      [3000, 86_400_000],
      "Peers that vanished may be alive on the other side of a partition for so long: meanwhile this side " +
        "admits only its share of the limits.",
    ).default(60_000),
  },
);

const schema = group("All options.", "restart", {
  listen: group("Where clients connect.", "restart", {
    host: text({
      doc: "Address to listen on. Other than loopback only with keys configured.",
      accepted: "a host name or IP address, such as 127.0.0.1, 0.0.0.0 or ::",
      wrong: wrongHost,
    }).default("127.0.0.1"),
    port: count([0, 65_535], "Port to listen on; 0 = any free one.").default(8080),
  }).prefault({}),

  nodes: items("The inference nodes; at least one.", "live", 1000, node).default([]),

  keys: items(
    "The API keys. None = everyone is the tenant `local`, and listen.host must be loopback.",
    "live",
    10_000,
    key,
  ).default([]),

  defaultLimits: limitsGroup(
    "Limits of each key, and of `local`, where it sets none itself.",
  ).prefault({}),

  cluster: cluster.exactOptional(),

  router: group("How a node is chosen.", "restart", {
    strategy: choice(
      [
        "headroom",
        "round_robin",
        "least_inflight",
        "power_of_two",
        "peak_ewma",
        "prequal",
        "article",
      ],
      "headroom = affinity within bounded load, else least expected work; the others, to compare.",
    ).default("headroom"),
    articleNormalised: boolean(
      "article (0.5 queue + 0.3 latency + 0.2 GPU memory): bring the terms to one scale first.",
    ).default(false),
    affinityLoadFactor: number(
      [1, 10],
      "A session or prefix stays on its node up to this multiple of the node's fair share of the load.",
    ).default(1.5),
    exploreRatio: ratio(
      [0, 0.5],
      "Share of requests that skip affinity, so that a node once slow is measured again.",
    ).default(0.01),
    prefillWeight: number(
      [0, 100],
      "Weight of outstanding prompt tokens against requests in flight in a node's cost.",
    ).default(0.5),
    kvGate: ratio([0.1, 1], "A node whose KV cache is fuller than this is passed over.").default(
      0.92,
    ),
    waitingGate: requests(
      [0, 10_000],
      "A node with more requests than this waiting in its own queue is passed over.",
    ).default(16),
    staleMs: ms(
      [100, 600_000],
      "Engine metrics older than this no longer gate a node; it counts as staleWeight of itself.",
    ).default(3000),
    staleWeight: ratio([0.01, 1], "Weight of a node whose metrics are stale.").default(0.7),
    panicRatio: ratio(
      [0, 1],
      "When a smaller share of a model's nodes than this is eligible, soft gates are ignored; 0 = never.",
    ).default(0.5),
    slowStartMs: ms(
      [0, 3_600_000],
      "Time in which a node back from failure grows to its full weight.",
    ).default(60_000),
    slowStartWeightMin: ratio([0.01, 1], "Weight at which slow start begins.").default(0.1),
  }).prefault({}),

  queue: group("Requests that wait in the gateway for a free node.", "restart", {
    perKeyMax: requests(
      [0, 100_000],
      "Waiting requests of one key; more are refused with 429.",
    ).default(50),
    poolMax: requests(
      [0, 100_000],
      "Waiting requests of one model; more are refused with 503.",
    ).default(2000),
    poolSecondsMax: number(
      [0.1, 3600],
      "Waiting requests of one model, in seconds of its present dispatch rate; the smaller bound holds.",
    ).default(5),
    waitMsMax: ms(
      [1, 3_600_000],
      "Longest wait, where the request's own deadline is not nearer; 504 after it.",
    ).default(30_000),
  }).prefault({}),

  retry: group("Trying another node, until the first token is out.", "restart", {
    attemptsMax: count(
      [1, 10],
      "Tries of one request, the first included, each on a different node; 1 = no retry.",
    ).default(3),
    budgetRatio: ratio(
      [0, 1],
      "Retries of a model as a share of its requests in the last 10 s.",
    ).default(0.1),
    budgetFloorPerSecond: number(
      [0, 1000],
      "Retries that are allowed however few requests there are.",
    ).default(2),
    backoffBaseMs: ms(
      [0, 60_000],
      "Back-off before a retry is drawn from 0 to this, doubled at each try.",
    ).default(50),
    backoffMaxMs: ms([0, 60_000], "Longest back-off.").default(1000),
    restMsMax: ms(
      [0, 600_000],
      "A node that answers with Retry-After is left alone that long, but no longer than this.",
    ).default(10_000),
  }).prefault({}),

  circuit: group("When a failing node is taken out, and how it comes back.", "restart", {
    localFailures: calls(
      [1, 1000],
      "Connections refused or reset in a row that open the circuit.",
    ).default(3),
    gatewayFailures: calls(
      [1, 1000],
      "5xx answers and broken streams in a row that open the circuit.",
    ).default(5),
    windowMs: ms([1000, 600_000], "Window over which failed and slow calls are counted.").default(
      30_000,
    ),
    callsMin: calls([1, 100_000], "Calls in the window before a ratio counts.").default(20),
    failureRatio: ratio(
      [0.01, 1],
      "Share of failed calls in the window that opens the circuit.",
    ).default(0.5),
    slowRatio: ratio(
      [0.01, 1],
      "Share of calls without a first token in time, in the window, that opens the circuit.",
    ).default(0.8),
    ejectedRatioMax: ratio(
      [0, 1],
      "Most of a model's nodes that may be out at once, at least one; further ones stay in at low weight.",
    ).default(0.34),
    openMs: ms([100, 3_600_000], "First time out; doubles with each further one.").default(10_000),
    openMsMax: ms([100, 3_600_000], "Longest time out.").default(300_000),
    halfOpenPermits: requests(
      [1, 100],
      "Requests that may try a node at once while it is half open.",
    ).default(2),
    halfOpenSuccesses: calls(
      [1, 100],
      "Successes that close the circuit; one failure opens it again.",
    ).default(3),
    halfOpenMs: ms(
      [1000, 600_000],
      "Half open without a result for this long opens the circuit again.",
    ).default(30_000),
    wedgedMs: ms(
      [1000, 600_000],
      "An engine that has requests running and makes no token for this long is taken out.",
    ).default(15_000),
  }).prefault({}),

  concurrency: group(
    "How many requests a node gets at once: learned from its overload.",
    "restart",
    {
      inflightMax: requests(
        [1, 100_000],
        "Most requests in flight on a node where neither nodes[].inflightMax nor the engine tells.",
      ).default(256),
      inflightMin: requests(
        [1, 10_000],
        "The learned bound never falls below this, nor below a node's own inflightMax.",
      ).default(4),
      decreaseRatio: ratio(
        [0.1, 0.99],
        "An overloaded node's bound is multiplied by this.",
      ).default(0.9),
      increaseAfterMs: ms(
        [100, 600_000],
        "Time without overload, at the bound, after which it grows by one.",
      ).default(5000),
    },
  ).prefault({}),

  timeouts: group("The clocks. Each one ends something; none can be switched off.", "restart", {
    connectMs: ms([10, 60_000], "Connecting to a node.").default(1000),
    firstTokenMs: ms(
      [100, 3_600_000],
      "First content token, at least, and 0.25 ms for each prompt token; three times the pool's p95 where that is longer.",
    ).default(5000),
    stallMs: ms([100, 3_600_000], "Between two tokens.").default(15_000),
    totalMs: ms([1000, 86_400_000], "A whole request, whatever deadline it asks for.").default(
      300_000,
    ),
    requestMsDefault: live(
      ms(
        [100, 86_400_000],
        "Deadline of a request that states none (header x-request-timeout-ms); unset = totalMs.",
      ),
    ).exactOptional(),
    drainMs: ms(
      [0, 3_600_000],
      "Time for requests in flight to end on a stop signal; less than an orchestrator's grace period.",
    ).default(30_000),
    nodeDrainMs: ms([0, 3_600_000], "Time for a removed node's requests in flight to end.").default(
      120_000,
    ),
    clientHeadersMs: ms([100, 600_000], "Receiving a request's headers.").default(10_000),
    clientBodyMs: ms([100, 3_600_000], "Receiving a request's body.").default(30_000),
    clientIdleMs: ms(
      [1000, 3_600_000],
      "Idle client connections are kept this long; above the idle time of a load balancer in front.",
    ).default(65_000),
  })
    .transform((clocks) => ({
      ...clocks,
      requestMsDefault: clocks.requestMsDefault ?? clocks.totalMs,
    }))
    .prefault({}),

  scrape: group("Reading the nodes' engine metrics.", "restart", {
    intervalMs: ms([50, 600_000], "Between two readings of a node.").default(1000),
    jitterRatio: ratio([0, 0.5], "Random share added to or taken from the interval.").default(0.2),
    timeoutMs: ms([10, 60_000], "For one reading.").default(800),
    modelsIntervalMs: ms(
      [1000, 3_600_000],
      "Between two readings of the models that a node serves.",
    ).default(30_000),
  }).prefault({}),

  health: group("Asking the nodes whether they are well.", "restart", {
    intervalMs: ms([100, 600_000], "Between two checks of a node.").default(5000),
    timeoutMs: ms([10, 60_000], "For one check.").default(2000),
    failures: calls([1, 100], "Failed checks in a row that take a node out.").default(3),
    successes: calls([1, 100], "Passed checks in a row that let it try again.").default(2),
  }).prefault({}),

  cache: group("Answers kept, and identical requests joined while one runs.", "restart", {
    enabled: boolean("false = every request goes to a node; none are joined either.").default(true),
    ttlMs: ms([1000, 2_592_000_000], "How long an answer is kept.").default(3_600_000),
    bytesMax: bytes(
      [MiB, 1024 * GiB],
      "Memory for answers; the least recently used go first.",
    ).default(256 * MiB),
    answerBytesMax: bytes([1024, GiB], "A larger answer is not kept.").default(MiB),
    storeTimeoutMs: ms([1, 10_000], "Redis answers within this, or the lookup is a miss.").default(
      50,
    ),
    semantic: group("Answers to the same question in other words.", "restart", {
      mode: choice(
        semanticModes,
        "shadow = compare what would be served with the real answer, serve none; fixed = serve at similarityMin; " +
          "verified = serve where judged answers bound the error by errorRateMax. Needs an embedder.",
      ).default("fixed"),
      similarityMin: ratio(
        [0.5, 1],
        "Least cosine of two questions; a request may only raise it (x-headrace-similarity).",
      ).default(0.92),
      errorRateMax: ratio(
        [0.001, 0.5],
        "verified: share of wrong answers among served ones.",
      ).default(0.01),
      precisionMin: ratio(
        [0.01, 0.999],
        "Where judging cannot show so large a share of a tenant's hits right, they are only judged.",
      ).default(0.9),
      strict: boolean("Questions that each have a content word of their own never match.").default(
        false,
      ),
      temperatureMax: ratio(
        [0, 2],
        "A request that states a higher temperature is not matched by meaning.",
      ).default(0.3),
      judge: choice(
        ["exact", "words"],
        "Two answers are the same: exact = but for case and punctuation; words = most words and all numbers.",
      ).default("words"),
      judgeRatio: ratio(
        [0, 1],
        "Share of hits for which a node is asked as well, to judge them; costs its tokens.",
      ).default(0.02),
      matchMs: ms(
        [1, 10_000],
        "Vector and search in all; then the request goes on without.",
      ).default(50),
      ttlMs: ms([1000, 2_592_000_000], "How long an answer is kept for other wordings.").default(
        3_600_000,
      ),
      bytesMax: bytes(
        [MiB, 1024 * GiB],
        "Memory for questions, their vectors and answers; the least recently used go first.",
      ).default(256 * MiB),
      index: choice(
        ["actors", "redis-vectorset", "redis-search"],
        "Where questions are searched: in the cache actors; or in Redis 8 vector sets, or RediSearch (KNN).",
      ).default("actors"),
      embedder: group("What turns a question into a vector.", "restart", {
        type: choice(
          ["off", "lexical", "transformers", "http"],
          "off = only equal questions hit; lexical = built in, knows words but no meaning; " +
            "transformers = a model on this machine; http = a /v1/embeddings endpoint.",
        ).default("off"),
        model: text({
          doc: `The model; unset with transformers = ${EMBEDDER_MODEL}; http needs it.`,
          accepted: "a model's name, such as org/name",
          wrong: (value) =>
            /^\S{1,200}$/.test(value) ? undefined : "holds spaces, or is too long",
        }).exactOptional(),
        path: text({
          doc:
            "transformers: the folder that `headrace model pull` filled, or the model's own; " +
            "unset = where it puts models by default.",
          accepted: "a path",
        }).exactOptional(),
        url: text({
          doc: "http: base URL of the endpoint, or all of it.",
          accepted: "an http:// or https:// URL, such as http://10.0.0.9:8080/v1/embeddings",
          wrong: wrongEmbedderUrl,
        }).exactOptional(),
        key: text({
          doc: "http: sent as bearer token.",
          accepted: "printable ASCII without spaces, at most 512 characters",
          secret: "all",
          wrong: wrongSecret(1),
        }).exactOptional(),
        dimension: count(
          [8, 8192],
          "Dimension that its vectors must have; unset = that of the first.",
        ).exactOptional(),
        timeoutMs: ms(
          [1, 10_000],
          "A vector that takes longer is not waited for: the request goes on without it.",
        ).default(50),
        queueMax: requests(
          [1, 10_000],
          "Questions that wait for the embedder; more go on without it.",
        ).default(64),
        tokensMax: tokens(
          [8, 8192],
          "A longer question gets no vector: the model would read only its head.",
        ).default(128),
      }).prefault({}),
    }).prefault({}),
    redis: group("Shared, surviving copy of the cache. Unset = memory only.", "restart", {
      url: text({
        doc: "One Redis server.",
        accepted: "a redis:// or rediss:// URL, such as redis://:password@host:6379/0",
        secret: "url",
        wrong: wrongRedisUrl,
      }).exactOptional(),
      clusterNodes: texts({
        doc: "Redis Cluster: some of its nodes.",
        accepted: "host:port",
        max: 100,
        wrong: wrongHostPort,
      }).exactOptional(),
      sentinels: texts({
        doc: "Redis Sentinel: the sentinels.",
        accepted: "host:port",
        max: 100,
        wrong: wrongHostPort,
      }).exactOptional(),
      sentinelMaster: name("Redis Sentinel: name of the master.").exactOptional(),
      username: text({ doc: "User, where the URL names none.", accepted: "text" }).exactOptional(),
      password: text({
        doc: "Password, where the URL holds none.",
        accepted: "text",
        secret: "all",
      }).exactOptional(),
      tls: boolean("TLS to cluster nodes and sentinels; with a URL write rediss://.").default(
        false,
      ),
      keyPrefix: text({
        doc: "Starts every key, so that several installations can share one Redis.",
        accepted: "1 to 64 characters without spaces or braces",
        wrong: (value) => (/^[^\s{}]{1,64}$/.test(value) ? undefined : "is not a valid prefix"),
      }).default("headrace:"),
    }).exactOptional(),
  }).prefault({}),

  requests: group("Bounds of requests.", "live", {
    bodyBytesMax: bytes([1024, GiB], "Request body.").default(8 * MiB),
    headerBytesMax: restart(bytes([1024, MiB], "All headers of a request.")).default(16_384),
    messagesMax: count([1, 1_000_000], "Messages of a chat request.").default(2048),
    maxTokensMax: tokens([1, 100_000_000], "Largest max_tokens a request may ask for.").default(
      131_072,
    ),
    sseLineBytesMax: restart(
      bytes([1024, 256 * MiB], "One line of a node's stream; a longer one is a bad answer."),
    ).default(MiB),
    connectionsMax: restart(
      count(
        [1, 1_000_000],
        "Client connections open at once in this process, and so requests; more are refused.",
      ),
    ).default(20_000),
  }).prefault({}),

  admin: group("The administration routes.", "live", {
    token: text({
      doc: "Bearer token they ask for; unset = they are off.",
      accepted: "16 to 512 printable ASCII characters without spaces",
      secret: "all",
      wrong: wrongSecret(16),
    }).exactOptional(),
  }).prefault({}),

  record: group("Recording requests, for replay, planning and warm-up.", "restart", {
    file: text({
      doc: "File to append to, one JSON object a line.",
      accepted: "a path",
    }).exactOptional(),
    decisions: text({
      doc: "File for all that the router sees and chooses, written anew: for `headrace sim decisions`. Large.",
      accepted: "a path",
    }).exactOptional(),
    prompts: boolean(
      "true = the lines of chat requests hold what was asked, in clear: for `headrace hot`. " +
        "false = they hold no text of any request.",
    ).default(false),
  }).prefault({}),

  log: group("The log.", "live", {
    level: choice(
      ["trace", "debug", "info", "warn", "error", "silent"],
      "Least severe line written. Prompts, answers and keys are never logged.",
    ).default("info"),
    format: restart(
      choice(["json", "text"], "json = one object a line; text = for a person at a terminal."),
    ).default("json"),
  }).prefault({}),

  warmup: group("Filling the cache at start.", "restart", {
    file: text({
      doc: "File of prompts, one a line: plain text, or a chat request as JSON.",
      accepted: "a path",
    }).exactOptional(),
    tenant: name(
      "Whose cache is filled; unset = the only tenant's, or that of `local`.",
    ).exactOptional(),
    model: text({
      doc: "Model for lines that name none; unset = the only one that the nodes serve.",
      accepted: "a model's name as clients send it",
    }).exactOptional(),
    inflightMax: requests([1, 1000], "Prompts in flight at once.").default(5),
  }).prefault({}),

  metrics: group("Headrace's own metrics.", "restart", {
    enabled: boolean("Serve GET /metrics in Prometheus text.").default(true),
  }).prefault({}),
});

type DeepReadonly<T> = T extends readonly (infer Item)[]
  ? readonly DeepReadonly<Item>[]
  : T extends object
    ? { readonly [Name in keyof T]: DeepReadonly<T[Name]> }
    : T;

/** All options, resolved: defaults filled in, keys hashed, nodes named. Frozen. */
export type Options = DeepReadonly<z.output<typeof schema>>;
export type NodeOptions = Options["nodes"][number];
export type KeyOptions = Options["keys"][number];
export type ClusterOptions = NonNullable<Options["cluster"]>;
/** What a user writes: everything but a node's url and a key's tenant may be left out. */
export type OptionsInput = DeepReadonly<z.input<typeof schema>>;

/** The options when nothing is configured: no node, no key. */
export const defaults: Options = deepFreeze(schema.parse({}, { jitless: true }));

/**
 * A key's limits, or (without a key) those of the tenant `local`: what it sets itself, else
 * `defaultLimits`. A burst belongs to its rate: a key with its own rate does not inherit the burst
 * of another.
 */
export function limitsOf(options: Options, entry?: KeyOptions): Options["defaultLimits"] {
  const { requestBurst, tokenBurst, ...rest } = options.defaultLimits;
  const own = entry?.limits ?? {};
  return {
    ...rest,
    ...(own.requestsPerMinute === undefined && requestBurst !== undefined && { requestBurst }),
    ...(own.tokensPerMinute === undefined && tokenBurst !== undefined && { tokenBurst }),
    ...own,
  };
}

/** Host and port of a node's URL, the port always stated: what makes two nodes different. */
export function nodeAddress(url: string): string {
  const { hostname, port, protocol } = new URL(url);
  return `${hostname}:${port === "" ? (protocol === "https:" ? "443" : "80") : port}`;
}

/**
 * The URL that routes are appended to ("…" + "/v1/chat/completions"): no trailing slash, no /v1.
 */
function baseUrl(url: string): string {
  const { origin, pathname } = new URL(url);
  return origin + pathname.replace(/\/+$/, "").replace(/\/v1$/, "").replace(/\/+$/, "");
}

function sha256(text: string): string {
  return createHash("sha256").update(text, "utf8").digest("hex");
}

function deepFreeze<T>(value: T): T {
  if (typeof value !== "object" || value === null) return value;
  for (const child of Object.values(value)) deepFreeze(child);
  return Object.freeze(value);
}

/** Every option in the order of the schema; groups and lists stand before what they hold. */
export const optionRows: readonly OptionRow[] = rowsOf(schema);

/** The schema of what a user writes as JSON Schema, draft 7, for editors. */
export function optionsJsonSchema(): Record<string, unknown> {
  return jsonSchemaOf(schema);
}

// ---- parsing ------------------------------------------------------------------------------------

export type ParsedOptions =
  | { readonly ok: true; readonly options: Options }
  | { readonly ok: false; readonly problems: readonly Problem[] };

/**
 * Resolves what a user gave, or says all that is wrong with it at once. Fields that are
 * `undefined`, and groups and lists that are `null` (in YAML: all of it commented out), count as
 * left out.
 */
export function parseOptions(input: unknown): ParsedOptions {
  const given = tidy(input ?? {}, schema);
  const parsed = schema.safeParse(given, { jitless: true });
  const problems = parsed.success
    ? []
    : parsed.error.issues.flatMap((i) => explain(i, given, schema));
  const checked = parsed.success ? whole(parsed.data) : withoutFaults(given, problems);
  if (checked !== undefined) {
    const faulty = problems.map(({ path }) => path);
    for (const { paths, message } of brokenRelations(checked.options, checked.kept)) {
      if (paths.some((path) => faulty.some((other) => overlap(path, other)))) continue;
      const path = paths[0] ?? "";
      problems.push({ at: segmentsOf(path), path, message });
    }
  }
  return parsed.success && problems.length === 0
    ? { ok: true, options: deepFreeze(parsed.data) }
    : { ok: false, problems };
}

/**
 * A copy along the schema without absent fields; what the schema does not know stays for it to
 * refuse.
 */
function tidy(value: unknown, wrapped: z.core.$ZodType): unknown {
  const { inner } = unwrap(wrapped);
  if (inner instanceof z.ZodArray && Array.isArray(value)) {
    return value.map((item) => tidy(item, inner.element));
  }
  if (!(inner instanceof z.ZodObject) || !isMapping(value)) return value;
  const shape: Readonly<Record<string, z.core.$ZodType>> = inner.shape;
  const entries: [string, unknown][] = [];
  for (const [name, child] of Object.entries(value)) {
    const known = Object.hasOwn(shape, name) ? shape[name] : undefined;
    const isEmpty = child === null && known !== undefined && mayBeEmpty(known);
    if (child === undefined || isEmpty || (inner === schema && name === "$schema")) continue;
    entries.push([name, known === undefined ? child : tidy(child, known)]);
  }
  return Object.fromEntries(entries);
}

function mayBeEmpty(wrapped: z.core.$ZodType): boolean {
  const { inner, isOptional } = unwrap(wrapped);
  return isOptional && (inner instanceof z.ZodObject || inner instanceof z.ZodArray);
}

/** Positions in the user's lists of the items that were kept. */
type Kept = { nodes: readonly number[]; keys: readonly number[] };

function whole(options: Options): { options: Options; kept: Kept } {
  return { options, kept: { nodes: [...options.nodes.keys()], keys: [...options.keys.keys()] } };
}

/**
 * The options without what is wrong (a node or key at fault is left out whole), so that the
 * relations of the rest can be checked in the same run. Undefined where even that does not parse.
 */
function withoutFaults(
  given: unknown,
  problems: readonly Problem[],
): { options: Options; kept: Kept } | undefined {
  const rest = tidy(given, schema); // A copy, so that what the messages quote stays whole.
  if (!isMapping(rest)) return undefined;
  const dropped = { nodes: new Set<number>(), keys: new Set<number>() };
  for (const { at } of problems) {
    const [list, index] = at;
    if ((list === "nodes" || list === "keys") && typeof index === "number") {
      dropped[list].add(index);
    } else {
      removeAt(rest, at);
    }
  }
  const kept = { nodes: [] as number[], keys: [] as number[] };
  for (const list of ["nodes", "keys"] as const) {
    const items = rest[list];
    if (!Array.isArray(items)) continue;
    kept[list] = [...items.keys()].filter((index) => !dropped[list].has(index));
    rest[list] = kept[list].map((index) => items[index]);
  }
  const parsed = schema.safeParse(rest, { jitless: true });
  return parsed.success ? { options: parsed.data, kept } : undefined;
}

/**
 * Removes the option that `at` lies in; a faulty entry of a list of texts takes the list with it.
 */
function removeAt(root: Record<string, unknown>, at: Problem["at"]): void {
  const index = at.findIndex((segment) => typeof segment === "number");
  const names = index < 0 ? at : at.slice(0, index);
  const last = names.at(-1);
  let parent: unknown = root;
  for (const name of names.slice(0, -1)) parent = isMapping(parent) ? parent[name] : undefined;
  if (last !== undefined && isMapping(parent)) delete parent[last];
}

// ---- relations ----------------------------------------------------------------------------------

/** `paths[0]` is where the problem is reported; a fault in any of them hides it. */
type Relation = { paths: readonly string[]; message: string };

/** [smaller, larger, reason]: the first must not exceed the second. */
const orders: readonly (readonly [string, string, string])[] = [
  ["scrape.timeoutMs", "scrape.intervalMs", "a node is read by one request at a time"],
  ["health.timeoutMs", "health.intervalMs", "a node is checked by one request at a time"],
  ["timeouts.firstTokenMs", "timeouts.totalMs", "the first token comes before the last"],
  ["timeouts.requestMsDefault", "timeouts.totalMs", "totalMs bounds every deadline"],
  ["queue.perKeyMax", "queue.poolMax", "one key's share is part of the pool's queue"],
  ["retry.backoffBaseMs", "retry.backoffMaxMs", "the back-off starts at the base"],
  ["circuit.openMs", "circuit.openMsMax", "the time out grows from the first to the longest"],
  ["concurrency.inflightMin", "concurrency.inflightMax", "the learned bound lies between them"],
  ["cache.answerBytesMax", "cache.bytesMax", "an answer must fit into the cache"],
];

function* brokenRelations(options: Options, kept: Kept): Generator<Relation> {
  for (const [small, large, reason] of orders) {
    const [low, high] = [numberAt(options, small), numberAt(options, large)];
    if (low === undefined || high === undefined || low <= high) continue;
    yield { paths: [small, large], message: `${low} is more than ${large} (${high}): ${reason}` };
  }
  yield* brokenClocks(options);
  yield* brokenLimits(options, kept);
  yield* brokenNodes(options, kept);
  yield* brokenKeys(options, kept);
  yield* brokenCache(options);
  yield* brokenSemantic(options);
  yield* brokenWarmup(options);
  yield* brokenCluster(options);
}

/** Undefined where the option is not set. */
function numberAt(options: Options, path: string): number | undefined {
  let value: unknown = options;
  for (const name of path.split(".")) value = isMapping(value) ? value[name] : undefined;
  return typeof value === "number" ? value : undefined;
}

function* brokenClocks({ timeouts, scrape, router, circuit }: Options): Generator<Relation> {
  if (timeouts.connectMs >= timeouts.totalMs) {
    yield {
      paths: ["timeouts.connectMs", "timeouts.totalMs"],
      message:
        `${timeouts.connectMs} is not less than timeouts.totalMs (${timeouts.totalMs}): ` +
        "nothing would be left for the answer",
    };
  }
  const sampleAgeMs = Math.ceil(scrape.intervalMs * (1 + scrape.jitterRatio) + scrape.timeoutMs);
  if (router.staleMs <= sampleAgeMs) {
    yield {
      paths: ["router.staleMs", "scrape.intervalMs", "scrape.jitterRatio", "scrape.timeoutMs"],
      message:
        `${router.staleMs} is not more than ${sampleAgeMs}, the age that metrics reach between two ` +
        "readings (scrape.intervalMs with its jitter, and scrape.timeoutMs): " +
        "healthy nodes would count as stale",
    };
  }
  if (circuit.wedgedMs <= 2 * scrape.intervalMs) {
    yield {
      paths: ["circuit.wedgedMs", "scrape.intervalMs"],
      message:
        `${circuit.wedgedMs} is not more than twice scrape.intervalMs (${scrape.intervalMs}): ` +
        "standing still shows only over several readings",
    };
  }
}

function* brokenLimits(options: Options, kept: Kept): Generator<Relation> {
  const all = [
    { at: "defaultLimits", own: options.defaultLimits, limits: options.defaultLimits },
    ...options.keys.map((entry, index) => ({
      at: `keys[${kept.keys[index]}].limits`,
      own: entry.limits,
      limits: limitsOf(options, entry),
    })),
  ];
  for (const { at, own, limits } of all) {
    if (own.requestBurst !== undefined && limits.requestsPerMinute === undefined) {
      yield {
        paths: [`${at}.requestBurst`, `${at}.requestsPerMinute`, "defaultLimits"],
        message: "is set without requestsPerMinute: a burst is part of a rate",
      };
    }
    if (own.tokenBurst !== undefined && limits.tokensPerMinute === undefined) {
      yield {
        paths: [`${at}.tokenBurst`, `${at}.tokensPerMinute`, "defaultLimits"],
        message: "is set without tokensPerMinute: a burst is part of a rate",
      };
    }
  }
}

function* brokenNodes({ nodes }: Options, kept: Kept): Generator<Relation> {
  if (nodes.length === 0) {
    yield {
      paths: ["nodes"],
      message:
        "is empty: without a node nothing can be answered; " +
        "accepted: a list such as [{url: http://10.0.0.5:8000}]",
    };
  }
  const addresses = new Map<string, number>();
  const names = new Map<string, number>();
  for (const [index, entry] of nodes.entries()) {
    const at = kept.nodes[index] ?? index;
    const address = nodeAddress(entry.url);
    const [sameAddress, sameName] = [addresses.get(address), names.get(entry.name)];
    if (sameAddress !== undefined) {
      yield {
        paths: [`nodes[${at}].url`],
        message: `${address} is nodes[${sameAddress}] already: a retry must reach another node`,
      };
    } else if (sameName !== undefined) {
      yield {
        paths: [`nodes[${at}].name`],
        message: `${JSON.stringify(entry.name)} is the name of nodes[${sameName}] already`,
      };
    }
    addresses.set(address, sameAddress ?? at);
    names.set(entry.name, sameName ?? at);
  }
}

function* brokenKeys({ keys, listen, admin }: Options, kept: Kept): Generator<Relation> {
  if (keys.length === 0 && !isLoopback(listen.host)) {
    yield {
      paths: ["listen.host", "keys"],
      message:
        `${JSON.stringify(listen.host)} can be reached from outside, and no keys are configured: ` +
        "anyone could use the nodes; configure keys, or listen on 127.0.0.1",
    };
  }
  const adminHash = admin.token === undefined ? undefined : sha256(admin.token);
  const hashes = new Map<string, number>();
  const names = new Map<string, number>();
  for (const [index, entry] of keys.entries()) {
    const at = kept.keys[index] ?? index;
    const [sameKey, sameName] = [hashes.get(entry.keySha256), names.get(entry.name)];
    if (sameKey !== undefined) {
      yield { paths: [`keys[${at}]`], message: `is the same key as keys[${sameKey}]` };
    } else if (sameName !== undefined) {
      yield {
        paths: [`keys[${at}].name`],
        message: `${JSON.stringify(entry.name)} is the name of keys[${sameName}] already`,
      };
    }
    hashes.set(entry.keySha256, sameKey ?? at);
    names.set(entry.name, sameName ?? at);
    if (entry.keySha256 === adminHash) {
      yield {
        paths: ["admin.token"],
        message: `is the same as keys[${at}]: a client could administer the gateway`,
      };
    }
  }
}

function* brokenWarmup({ cache, warmup, keys }: Options): Generator<Relation> {
  if (warmup.file === undefined) return;
  if (!cache.enabled) {
    yield {
      paths: ["warmup.file", "cache.enabled"],
      message: "is set while cache.enabled is false: there is nothing to warm up",
    };
  }
  const tenants = new Set(keys.length === 0 ? ["local"] : keys.map(({ tenant }) => tenant));
  if (warmup.tenant === undefined ? tenants.size > 1 : !tenants.has(warmup.tenant)) {
    const what = warmup.tenant === undefined ? "is missing" : "is the tenant of no key";
    yield {
      paths: ["warmup.tenant", "keys"],
      message: `${what}: tenants share no cached answers; accepted: one of ${[...tenants].join(", ")}`,
    };
  }
}

function* brokenCache({ cache: { redis } }: Options): Generator<Relation> {
  if (redis === undefined) return;
  const ways = [redis.url, redis.clusterNodes, redis.sentinels].filter((way) => way !== undefined);
  if (ways.length !== 1) {
    yield {
      paths: ["cache.redis"],
      message: `needs exactly one of url, clusterNodes and sentinels, and has ${ways.length}`,
    };
  }
  if ((redis.sentinels === undefined) !== (redis.sentinelMaster === undefined)) {
    yield {
      paths: ["cache.redis", "cache.redis.sentinelMaster"],
      message: "needs sentinels and sentinelMaster together",
    };
  }
  if (redis.url === undefined) return;
  const url = new URL(redis.url);
  if (
    (url.username !== "" && redis.username !== undefined) ||
    (url.password !== "" && redis.password !== undefined)
  ) {
    yield {
      paths: ["cache.redis.url", "cache.redis.username", "cache.redis.password"],
      message: "holds a user or password, and username or password is set too: give each once",
    };
  }
  if (redis.tls && url.protocol === "redis:") {
    yield {
      paths: ["cache.redis.tls", "cache.redis.url"],
      message: "is true, but the URL starts with redis://: write rediss:// for TLS",
    };
  }
}

function* brokenSemantic({ cache }: Options): Generator<Relation> {
  const { embedder, index } = cache.semantic;
  if (index !== "actors" && cache.redis === undefined) {
    yield {
      paths: ["cache.semantic.index", "cache.redis"],
      message: `is ${index}, but no Redis is configured`,
    };
  }
  const at = "cache.semantic.embedder";
  if (embedder.type === "http") {
    for (const field of ["url", "model"] as const) {
      if (embedder[field] !== undefined) continue;
      yield { paths: [`${at}.${field}`, `${at}.type`], message: "is missing: type is http" };
    }
  }
  const { dimension = 384 } = embedder;
  if (embedder.type === "lexical" && (dimension < 16 || dimension > 4096)) {
    yield {
      paths: [`${at}.dimension`, `${at}.type`],
      message: `is ${dimension}, but type is lexical, which has 16 to 4096 dimensions`,
    };
  }
  const only = { path: "transformers", url: "http", key: "http" } as const;
  for (const [field, type] of Object.entries(only)) {
    if (embedder[field as keyof typeof only] === undefined) continue;
    if (embedder.type === type || embedder.type === "off") continue; // Off keeps its settings.
    yield {
      paths: [`${at}.${field}`, `${at}.type`],
      message: `is set, but type is ${embedder.type}: only ${type} has one`,
    };
  }
}

function* brokenCluster({ cluster, listen }: Options): Generator<Relation> {
  if (cluster === undefined) return;
  const { keys, listen: peers, seeds, tls } = cluster;
  if (keys.length === 0 && !isLoopback(peers.host)) {
    yield {
      paths: ["cluster.listen.host", "cluster.keys"],
      message:
        `${JSON.stringify(peers.host)} can be reached from outside, and no keys are configured: ` +
        "anyone could join the cluster; configure cluster.keys, or listen on 127.0.0.1",
    };
  }
  if (peers.port !== 0 && peers.port === listen.port) {
    yield {
      paths: ["cluster.listen.port", "listen.port"],
      message: `${peers.port} is listen.port already: peers and clients connect to different ports`,
    };
  }
  const ids = new Map<string, number>();
  for (const [index, { id }] of keys.entries()) {
    const same = ids.get(id);
    if (same !== undefined) {
      yield {
        paths: [`cluster.keys[${index}].id`],
        message: `${JSON.stringify(id)} is the id of cluster.keys[${same}] already`,
      };
    }
    ids.set(id, same ?? index);
  }
  for (const [index, seed] of seeds.entries()) {
    const isSecure = /^(wss|dnss|srvs):/.test(seed);
    if (isSecure === (tls !== undefined)) continue;
    yield {
      paths: [`cluster.seeds[${index}]`, "cluster.tls", "cluster.seeds"],
      message: isSecure
        ? "is for TLS, and cluster.tls is not configured"
        : "is without TLS, and cluster.tls is configured: begin it with wss://, dnss:// or srvs://",
    };
  }
}

function isLoopback(host: string): boolean {
  const url = `http://${host.includes(":") ? `[${host}]` : host}`;
  const name = URL.canParse(url) ? new URL(url).hostname : host;
  return name === "localhost" || name === "[::1]" || /^127\.\d+\.\d+\.\d+$/.test(name);
}
