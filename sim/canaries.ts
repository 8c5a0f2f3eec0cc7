/**
 * Bugs planted on purpose, at least one for each invariant: a check that no bug can trip proves nothing.
 *
 * Each is put around an actor, an edge or an engine of the simulation from outside; shipped actors know nothing of
 * them. They are bugs that somebody could write: a message forgotten, a key too narrow, a branch taken wrongly.
 */
import type { CacheMessage } from "../actors/cache.ts";
import type { UpstreamEvent } from "../actors/edges.ts";
import type { AcquireReply } from "../actors/gpu-node.ts";
import type { RequestFacts } from "../actors/protocol.ts";
import type { RateLimiterMessage } from "../actors/rate-limiter.ts";
import type { RouterMessage } from "../actors/router.ts";
import type { Actor } from "../runtime/actor.ts";
import type { Invariant } from "./checkers.ts";
import { GpuNodeModel } from "./gpu-node-model.ts";
import { type Deed, Interposer, type Interposition, type Mail } from "./interposer.ts";
import type { Instruments } from "./simulator.ts";

export type Canary = {
  /** The invariant that it breaks. */
  breaks: Invariant;
  /** The bug, in a sentence. */
  bug: string;
  plant: () => Instruments;
};

const made = {
  "answered-twice": {
    breaks: "one-answer",
    bug: "the request actor tells the front every answer twice",
    plant: () =>
      around("requests", {
        act: (deed) => (isTold(deed, "front.attach") ? [deed, deed] : [deed]),
      }),
  },
  "answer-lost": {
    breaks: "one-answer",
    bug: "the request actor forgets to tell the front of a refusal",
    plant: () =>
      around("requests", { act: (deed) => (isTold(deed, "front.refuse") ? [] : [deed]) }),
  },
  "same-node": {
    breaks: "distinct-nodes",
    bug: "the router does not heed which nodes were tried",
    plant: () =>
      around("router", {
        receive: (message) => {
          const known = message as RouterMessage;
          return known.kind === "router.choose" ? { ...known, tried: [] } : message;
        },
      }),
  },
  "retry-after-token": {
    breaks: "no-retry-after-token",
    bug: "a stream that broke is tried again, as if nothing of it were out",
    plant: () =>
      around("requests", {
        receive: (message) => {
          const known = message as UpstreamEvent;
          return known.kind === "upstream.failed" ? { ...known, committed: false } : message;
        },
      }),
  },
  "open-grants": {
    breaks: "circuit-moves",
    bug: "a node gives leases while its circuit is open",
    plant: () =>
      around("nodes", {
        act: (deed) => {
          if (deed.op !== "reply") return [deed];
          const reply = deed.value as AcquireReply & { leaseId?: string };
          if (reply.kind !== "denied" || reply.reason !== "open") return [deed];
          const { snapshot } = reply;
          const granted = { kind: "granted", leaseId: "r#1", node: snapshot.node, probe: false };
          return [{ ...deed, value: { ...granted, snapshot } }];
        },
      }),
  },
  "circuit-jumps": {
    breaks: "circuit-moves",
    bug: "an open circuit closes without having been half open",
    plant: () =>
      around("nodes", {
        act: (deed) =>
          deed.op === "emit" && (deed.event as { to?: string }).to === "half_open" ? [] : [deed],
      }),
  },
  "lease-leak": {
    breaks: "returns-to-zero",
    bug: "the request actor does not release its leases",
    plant: () =>
      around("requests", { act: (deed) => (isTold(deed, "gpu_node.release") ? [] : [deed]) }),
  },
  "reservation-leak": {
    breaks: "returns-to-zero",
    bug: "the request actor does not settle what the limiter reserved",
    plant: () =>
      around("requests", { act: (deed) => (isTold(deed, "limiter.settle") ? [] : [deed]) }),
  },
  "flight-leak": {
    breaks: "returns-to-zero",
    bug: "the cache does not hear of a flight's end",
    plant: () =>
      around("cache", {
        receive: (message) => (message.kind === "cache.flight_ended" ? undefined : message),
      }),
  },
  "body-leak": {
    breaks: "returns-to-zero",
    bug: "the front does not forget the bodies of requests that are over",
    plant: () =>
      around("edges", {
        receive: (message) => (message.kind === "front.forget" ? undefined : message),
      }),
  },
  "abort-lost": {
    breaks: "returns-to-zero",
    bug: "a generation that nobody waits for is not stopped",
    plant: () =>
      around("edges", {
        receive: (message) => (message.kind === "upstream.abort" ? undefined : message),
      }),
  },
  "limits-ignored": {
    breaks: "rate-limit",
    bug: "the limiter knows no limits",
    plant: () =>
      around("limiter", {
        receive: (message) => {
          const known = message as RateLimiterMessage;
          return known.kind === "limiter.admit" ? { ...known, limits: {} } : message;
        },
      }),
  },
  "limits-halved": {
    breaks: "rate-limit",
    bug: "the limiter allows half of what it should",
    plant: () =>
      around("limiter", {
        receive: (message) => {
          const known = message as RateLimiterMessage;
          if (known.kind !== "limiter.admit") return message;
          const { requestsPerMinute: perMinute, concurrent } = known.limits;
          const limits = {
            ...known.limits,
            ...(perMinute !== undefined && { requestsPerMinute: Math.ceil(perMinute / 2) }),
            ...(concurrent !== undefined && { concurrent: Math.ceil(concurrent / 2) }),
          };
          return { ...known, limits };
        },
      }),
  },
  "cache-crosses-tenants": {
    breaks: "cache-identity",
    bug: "the cache key leaves out the tenant",
    plant: () => withKeys(({ model }, [system, params, text]) => [model, system, params, text]),
  },
  "cache-crosses-models": {
    breaks: "cache-identity",
    bug: "the cache key leaves out the model",
    plant: () => withKeys(({ tenant }, [system, params, text]) => [tenant, system, params, text]),
  },
  "cache-crosses-systems": {
    breaks: "cache-identity",
    bug: "the cache key leaves out the system prompt",
    plant: () => withKeys(({ tenant, model }, [, params, text]) => [tenant, model, params, text]),
  },
  "cache-crosses-parameters": {
    breaks: "cache-identity",
    bug: "the cache key leaves out the parameters",
    plant: () => withKeys(({ tenant, model }, [system, , text]) => [tenant, model, system, text]),
  },
  "cache-truncates": {
    breaks: "cache-truth",
    bug: "the cache keeps answers without their last byte",
    plant: () =>
      around("cache", {
        receive: (message) => {
          const known = message as CacheMessage;
          if (known.kind !== "cache.flight_ended" || known.result.kind !== "stored") return message;
          const { answer } = known.result;
          const body = answer.body.subarray(0, -1);
          return { ...known, result: { ...known.result, answer: { ...answer, body } } };
        },
      }),
  },
  "kv-leak": {
    breaks: "kv-blocks",
    bug: "an engine keeps the memory of a request that was given up",
    plant: () => ({ makeNodeModel: (options) => new ForgetfulModel(options) }),
  },
  "router-sleeps": {
    breaks: "idle-node",
    bug: "the router loses one of three requests for a node",
    plant: () =>
      around("router", {
        receive: (message) => {
          const known = message as RouterMessage;
          const isLost = known.kind === "router.choose" && /[258]#?$/.test(known.facts.requestId);
          return isLost ? undefined : message;
        },
      }),
  },
  "circuit-stays-open": {
    breaks: "recovers",
    bug: "a circuit that opened is never tried again",
    plant: () =>
      around("nodes", {
        receive: ({ kind, ...rest }) => {
          if (kind === "gpu_node.circuit_due") return undefined;
          const isWell = kind === "scraper.health" && (rest as { ok?: boolean }).ok === true;
          return isWell ? undefined : { kind, ...rest };
        },
      }),
  },
  "actor-throws": {
    breaks: "no-crash",
    bug: "the request actor throws at a client that leaves",
    plant: () =>
      around("requests", {
        receive: (message) => {
          if (message.kind === "request.client_left") throw new TypeError("request is undefined");
          return message;
        },
      }),
  },
} as const satisfies Record<string, Canary>;

/** Name of a planted bug. */
export type CanaryName = keyof typeof made;

export const canaries: Readonly<Record<CanaryName, Canary>> = made;
export const canaryNames = Object.keys(made) as CanaryName[];

/** Around every actor of that branch of the tree. */
function around(branch: string, between: Interposition): Instruments {
  return {
    wrap: (path: string, actor: Actor<Mail>) =>
      path.split("/")[1] === branch ? new Interposer(actor, between) : actor,
  };
}

function isTold(deed: Deed, kind: string): boolean {
  return deed.op === "tell" && deed.message.kind === kind;
}

/** Gateways that make their cache keys, and what they call a tenant, of less than they should. */
function withKeys(
  parts: (facts: RequestFacts, question: readonly string[]) => readonly (string | undefined)[],
): Instruments {
  return {
    onSent: (facts, { question }) => {
      if (facts.cacheKey === undefined || question === undefined) return;
      const key = JSON.stringify(parts(facts, JSON.parse(question) as string[]));
      facts.cacheKey = hexOf(key);
      if (!key.includes(JSON.stringify(facts.tenant))) facts.tenant = "everyone";
    },
  };
}

/** FNV-1a, 32 bits, as hexadecimal digits. */
function hexOf(text: string): string {
  let hash = 0x811c9dc5;
  for (let index = 0; index < text.length; index++) {
    hash = Math.imul(hash ^ text.charCodeAt(index), 0x01000193);
  }
  return (hash >>> 0).toString(16).padStart(8, "0");
}

class ForgetfulModel extends GpuNodeModel {
  override cancel(): boolean {
    return false;
  }
}
