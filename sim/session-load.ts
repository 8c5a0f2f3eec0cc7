/**
 * A made-up load of chat sessions beside single questions: the one on which the router's defaults were chosen, and
 * the nodes that belong to it. It shows what affinity is worth and what a slow node costs.
 *
 * 60 % of requests belong to one of 400 sessions, whose prompt grows with every turn and starts anew beyond 6,000
 * tokens; the rest are single. Lengths are log-normal, arrivals Poisson. The same spec gives the same load; arrivals,
 * sessions, prompts and answers draw from their own streams.
 */
import { Random } from "../runtime/random.ts";
import type { StepLaw } from "./laws.ts";
import { chainHash, type TraceRequest } from "./trace-rows.ts";

export type SessionLoadSpec = {
  seed: number | string;
  /** Requests per second, > 0. */
  rate: number;
  durationUs: number;
};

const SESSIONS = 400;
const SESSION_SHARE = 0.6;
const CONTEXT_MAX = 6000;
/** Tokens of a block of the prompts' ids. */
export const SESSION_BLOCK_TOKENS = 64;

/**
 * The node of that load: a step of 12 ms, 0.06 ms for each prefill token and 0.25 ms for each decoding sequence,
 * chunks of 1024 tokens, 64 seats, KV memory for 200,000 tokens. Of no real card.
 */
export const sessionLaw: StepLaw = {
  name: "session-load",
  h: 0,
  W: 12_000,
  d: 60,
  F: 0,
  C: 0,
  s: [],
  a0: 0,
  aB: 190, // With d, 0.25 ms for a decode.
  actx: 0,
  p0: 0,
  pq: 0,
  comm: [],
  kvBlocks: 12_500,
  kvBlocksFrom: "formula",
  batchedTokensMax: 1024,
  sequencesMax: 64,
  startUpUs: 60_000_000,
  hardware: {
    parameters: 0,
    embeddingParameters: 0,
    bytesPerParameter: 2,
    kvBytesPerToken: 131_072,
    tensorParallel: 1,
    memoryGiB: 80,
    bandwidthBytesPerSecond: 3e12,
    flopsPerSecond: 1e15,
  },
  provenance: "made up, to compare routers",
  validated: false,
  note: "of no real card: it compares routers, and sizes nothing",
};

/** Tokens of the prefix cache of that load's nodes. */
export const SESSION_PREFIX_CACHE_TOKENS = 150_000;

type Session = { context: number; turns: number; prefix: number[] };

/** In order of arrival. Throws RangeError for a spec that makes no sense. */
export function* sessionLoad(spec: SessionLoadSpec): Generator<TraceRequest, void, undefined> {
  const { rate, durationUs } = spec;
  if (!(rate > 0 && Number.isFinite(rate))) {
    throw new RangeError(`rate is ${rate}; it must be above 0`);
  }
  const random = new Random(spec.seed).split("session load");
  const arrivals = random.split("arrivals");
  const kinds = random.split("kinds");
  const prompts = random.split("prompts");
  const answers = random.split("answers");
  const sessions: Session[] = Array.from({ length: SESSIONS }, () => ({
    context: 300 + 600 * prompts.next(),
    turns: 0,
    prefix: [],
  }));
  for (let at = 0; ; ) {
    at += -Math.log(1 - arrivals.next()) / rate;
    const atUs = Math.round(at * 1e6);
    if (atUs >= durationUs) return;
    const outputTokens = Math.round(Math.min(1500, Math.max(8, logNormal(answers, 5, 0.8))));
    const mark = kinds.next();
    const pick = kinds.int(SESSIONS);
    if (mark >= SESSION_SHARE) {
      const inputTokens = Math.round(Math.min(8000, Math.max(1, logNormal(prompts, 6.2, 1))));
      yield { atUs, inputTokens, outputTokens };
      continue;
    }
    const session = sessions[pick];
    if (session === undefined) continue;
    session.context += Math.min(2000, logNormal(prompts, 4.8, 0.8));
    if (session.context > CONTEXT_MAX) {
      session.context = 300 + 600 * prompts.next();
      session.prefix = [];
    }
    session.turns++;
    const inputTokens = Math.round(session.context);
    for (let at = session.prefix.length; (at + 1) * SESSION_BLOCK_TOKENS <= inputTokens; at++) {
      session.prefix.push(chainHash(chainHash(pick, session.turns), at));
    }
    yield {
      atUs,
      inputTokens,
      outputTokens,
      session: `s${pick}`,
      prefix: session.prefix.slice(),
      blockTokens: SESSION_BLOCK_TOKENS,
    };
  }
}

function logNormal(random: Random, mean: number, deviation: number): number {
  const radius = Math.sqrt(-2 * Math.log(1 - random.next()));
  return Math.exp(mean + deviation * radius * Math.cos(2 * Math.PI * random.next()));
}
