/**
 * From options, as a person writes them, to what each actor is built with. Pure: the simulator builds
 * its gateways from the same options through the same functions.
 */
import { cacheDefaults } from "../actors/cache.ts";
import type { GatewaySettings, NodeSettings } from "../actors/gateway.ts";
import type { SemanticPolicy } from "../actors/protocol.ts";
import { limiterDefaults } from "../actors/rate-limiter.ts";
import type { RequestOptions } from "../actors/request.ts";
import { type NodeOptions, nodeAddress, type Options } from "./options.ts";

/** Cache actors of one process: enough that none is busy, few enough that each has room. */
export const CACHE_SHARDS = 8;
/** A limiter answers from memory; one that takes longer is not there. */
const ADMIT_MS = 500;
/** In a cluster it may have asked the store, then another peer, then a third (see `ownerMs` in cluster.ts). */
const CLUSTER_ADMIT_MS = 2500;
/**
 * Beyond the store's own time-out. A shard answers from memory, so this is only ever the time that its mail takes in
 * a process held up: going on without the cache then would send to the nodes what is running already.
 */
const LOOKUP_MARGIN_MS = 2000;

export function gatewaySettings(options: Options): GatewaySettings {
  const { cache, queue, retry, router, timeouts } = options;
  return {
    cacheShards: CACHE_SHARDS,
    cache: {
      ...cacheDefaults,
      ttlMs: cache.ttlMs,
      bytesMax: cache.bytesMax,
      answerBytesMax: cache.answerBytesMax,
      storeTimeoutMs: cache.storeTimeoutMs,
      flightMsMax: timeouts.totalMs * 2,
      asksNearest: cache.semantic.index !== "actors",
      ...(cache.semantic.mode === "off" ? {} : { semantic: semanticOptions(cache) }),
    },
    limiter: limiterDefaults,
    router: {
      ranking: router,
      queue,
      retry,
      ejectedRatioMax: options.circuit.ejectedRatioMax,
    },
    logsRouter: options.record.decisions !== undefined,
    requests: requestOptions(options),
    nodes: options.nodes.map((node) => nodeSettings(node, options)),
  };
}

function semanticOptions({ semantic, answerBytesMax }: Options["cache"]) {
  const { ttlMs, bytesMax, precisionMin, judge } = semantic;
  return { ttlMs, bytesMax, answerBytesMax, precisionMin, judge };
}

/** How questions are matched by meaning where a key says nothing else; undefined where none are. */
export function semanticPolicy({ cache }: Options): SemanticPolicy | undefined {
  const { mode, embedder, similarityMin, errorRateMax, strict } = cache.semantic;
  if (!cache.enabled || mode === "off" || embedder.type === "off") return undefined;
  return { mode, similarityMin, errorRateMax, isStrict: strict };
}

export function requestOptions({ cache, cluster, retry, timeouts }: Options): RequestOptions {
  return {
    attemptsMax: retry.attemptsMax,
    backoffBaseMs: retry.backoffBaseMs,
    backoffMaxMs: retry.backoffMaxMs,
    firstTokenMs: timeouts.firstTokenMs,
    stallMs: timeouts.stallMs,
    totalMs: timeouts.totalMs,
    lookupMs: cache.storeTimeoutMs + LOOKUP_MARGIN_MS,
    matchMs: cache.semantic.matchMs,
    judgeRatio: cache.semantic.judgeRatio,
    admitMs: cluster === undefined ? ADMIT_MS : CLUSTER_ADMIT_MS,
  };
}

export function nodeSettings(node: NodeOptions, options: Options): NodeSettings {
  const { circuit, concurrency, health, retry, router, timeouts } = options;
  return {
    node: node.name,
    address: nodeAddress(node.url),
    ...(node.models === undefined ? {} : { models: node.models }),
    ...(node.adapters === undefined ? {} : { adapters: node.adapters }),
    ...(node.inflightMax === undefined ? {} : { inflightMax: node.inflightMax }),
    concurrency,
    circuit: {
      localFailures: circuit.localFailures,
      gatewayFailures: circuit.gatewayFailures,
      windowMs: circuit.windowMs,
      callsMin: circuit.callsMin,
      failureRatio: circuit.failureRatio,
      slowRatio: circuit.slowRatio,
      openMs: circuit.openMs,
      openMsMax: circuit.openMsMax,
      halfOpenPermits: circuit.halfOpenPermits,
      halfOpenSuccesses: circuit.halfOpenSuccesses,
      halfOpenMs: circuit.halfOpenMs,
      slowStartMs: router.slowStartMs,
      slowStartWeightMin: router.slowStartWeightMin,
    },
    kvGate: router.kvGate,
    restMsMax: retry.restMsMax,
    wedgedMs: circuit.wedgedMs,
    healthFailures: health.failures,
    healthSuccesses: health.successes,
    drainMs: timeouts.nodeDrainMs,
  };
}
