/**
 * Made-up loads: when requests arrive, and what they ask, chosen apart and combined freely.
 *
 * Arrivals: poisson, gamma (bursty or regular by its CV), daily (a cycle), ramp. Contents: plain lengths; agents,
 * whose prompts grow turn by turn on a shared system prompt; questions, some of which were asked before in the
 * same or in other words. The same spec gives the same load, bit for bit; each choice has its own stream of
 * randomness, so that changing one moves no other.
 */
import { unreachable } from "../runtime/actor.ts";
import { Random } from "../runtime/random.ts";
import { MinHeap } from "./min-heap.ts";
import { chainHash, type TraceRequest } from "./trace-rows.ts";

export type LoadSpec = {
  seed: number | string;
  arrivals: Arrivals;
  content: Content;
  /** Ends after so many requests, or with the last arrival before `durationUs`; at least one must be stated. */
  requests?: number;
  durationUs?: number;
  model?: string;
};

/** When requests (for agents: conversations) begin. Rates are per second. */
export type Arrivals =
  | { kind: "poisson"; rate: number }
  /** Independent gaps of a gamma law. cv 1 is Poisson; above 1 bursty, below 1 regular. */
  | { kind: "gamma"; rate: number; cv: number }
  /** rate · (1 − swing · cos(2π t ÷ period)): begins at the trough. `rate` is the mean, `swing` 0..1. */
  | { kind: "daily"; rate: number; swing: number; periodUs: number }
  /** Rises (or falls) in a straight line over `overUs`, then stays. */
  | { kind: "ramp"; fromRate: number; toRate: number; overUs: number };

/** Whole numbers from 1 to `max`, of a gamma law with this mean and CV (0 = constant) before rounding. */
export type Lengths = { mean: number; cv: number; max: number };

export type Content =
  | { kind: "plain"; input: Lengths; output: Lengths }
  /**
   * Conversations. Turn n's prompt is the system prompt, every earlier added text and answer, and what turn n
   * adds. Each of `apps` programs has its own system prompt of `systemTokens`, shared by all its conversations.
   */
  | {
      kind: "agents";
      apps: number;
      systemTokens: number;
      /** Added to the prompt by each turn: the user's words or a tool's result. */
      added: Lengths;
      output: Lengths;
      turns: Lengths;
      /** Mean of the exponential time from one turn's arrival to the next one's. */
      gapUs: number;
      /** A conversation ends before a later prompt and its answer would be longer; a first one is cut. */
      contextMax: number;
    }
  /**
   * Single questions. A share repeats an earlier one word for word, a share paraphrases one (`cluster` names it,
   * `closeShare` of them close, the rest loose), a share only looks like one but wants another answer; the rest is
   * new. Which one is by a Zipf law over the `poolMax` questions kept, the oldest most popular (exponent 0:
   * evenly).
   */
  | {
      kind: "questions";
      input: Lengths;
      output: Lengths;
      repeatShare: number;
      paraphraseShare: number;
      closeShare: number;
      lookalikeShare: number;
      poolMax: number;
      zipfExponent: number;
    };

/** Tokens of one block of a generated prompt. */
const BLOCK_TOKENS = 64;
/** Conversations going on at once; more means rate × turns × gap is beyond what one can mean. */
const CONVERSATIONS_MAX = 1_000_000;

/** The load, in order of arrival. Throws RangeError for a spec that makes no sense, before the first request. */
export function generateLoad(spec: LoadSpec): Generator<TraceRequest, void, undefined> {
  checkSpec(spec);
  return limited(spec);
}

function* limited(spec: LoadSpec): Generator<TraceRequest, void, undefined> {
  const { requests = Number.POSITIVE_INFINITY, durationUs = Number.POSITIVE_INFINITY } = spec;
  let count = 0;
  for (const request of contents(spec)) {
    if (count >= requests || request.atUs >= durationUs) return;
    if (spec.model !== undefined) request.model = spec.model;
    yield request;
    count++;
  }
}

function contents(spec: LoadSpec): Generator<TraceRequest, void, undefined> {
  const random = new Random(spec.seed).split("load");
  const arrivals = arrivalTimes(spec.arrivals, random.split("arrivals"));
  switch (spec.content.kind) {
    case "plain":
      return plain(spec.content, arrivals, random);
    case "agents":
      return agents(spec.content, arrivals, random);
    case "questions":
      return questions(spec.content, arrivals, random);
    default:
      return unreachable(spec.content);
  }
}

/** Whole µs, never falling, without end. */
function* arrivalTimes(arrivals: Arrivals, random: Random): Generator<number, void, undefined> {
  // Gaps are summed in seconds and rounded once, so that rounding does not add up.
  let at = 0;
  switch (arrivals.kind) {
    case "poisson":
      for (;;) {
        at += exponential(random) / arrivals.rate;
        yield Math.round(at * 1e6);
      }
    case "gamma": {
      const shape = 1 / (arrivals.cv * arrivals.cv);
      for (;;) {
        at += gamma(random, shape) / (shape * arrivals.rate);
        yield Math.round(at * 1e6);
      }
    }
    case "daily": {
      const { rate, swing, periodUs } = arrivals;
      const peak = rate * (1 + swing);
      const rateAt = (t: number) =>
        rate * (1 - swing * Math.cos((2 * Math.PI * t * 1e6) / periodUs));
      for (;;) {
        at = nextThinned(at, peak, rateAt, random);
        yield Math.round(at * 1e6);
      }
    }
    case "ramp": {
      const { fromRate, toRate, overUs } = arrivals;
      const peak = Math.max(fromRate, toRate);
      const rateAt = (t: number) =>
        fromRate + (toRate - fromRate) * Math.min(1, (t * 1e6) / overUs);
      for (;;) {
        at = nextThinned(at, peak, rateAt, random);
        yield Math.round(at * 1e6);
      }
    }
  }
}

/** Lewis and Shedler: arrivals at the peak rate, each kept with probability rate ÷ peak. */
function nextThinned(
  fromSeconds: number,
  peak: number,
  rateAt: (seconds: number) => number,
  random: Random,
): number {
  let at = fromSeconds;
  for (;;) {
    at += exponential(random) / peak;
    if (random.next() * peak < rateAt(at)) return at;
  }
}

function* plain(
  content: Extract<Content, { kind: "plain" }>,
  arrivals: Iterable<number>,
  random: Random,
): Generator<TraceRequest, void, undefined> {
  const input = random.split("input");
  const output = random.split("output");
  for (const atUs of arrivals) {
    yield {
      atUs,
      inputTokens: length(content.input, input),
      outputTokens: length(content.output, output),
    };
  }
}

type Conversation = {
  index: number;
  /** Its own stream: what one conversation draws moves no other. */
  random: Random;
  textHash: number;
  nextAtUs: number;
  turnsLeft: number;
  begun: boolean;
  /** Tokens of the next prompt without what its turn adds. */
  context: number;
  prefix: number[];
};

function* agents(
  content: Extract<Content, { kind: "agents" }>,
  arrivals: Iterable<number>,
  random: Random,
): Generator<TraceRequest, void, undefined> {
  const waiting = new MinHeap<Conversation>(comesFirst);
  const apps = random.split("apps");
  let begun = 0;
  for (const beginsAtUs of arrivals) {
    for (;;) {
      const next = waiting.peek();
      if (next === undefined || next.nextAtUs > beginsAtUs) break;
      waiting.take();
      const request = turn(next, content);
      if (request === undefined) continue;
      yield request;
      if (next.turnsLeft > 0) waiting.add(next);
    }
    if (waiting.size >= CONVERSATIONS_MAX) {
      throw new RangeError(
        `more than ${CONVERSATIONS_MAX} conversations at once: lower rate, turns or gapUs`,
      );
    }
    const app = Math.floor(apps.next() * content.apps);
    const own = random.split(`conversation ${begun}`);
    const prefix: number[] = [];
    for (let block = 0; (block + 1) * BLOCK_TOKENS <= content.systemTokens; block++) {
      prefix.push(chainHash(chainHash(1, app), block));
    }
    waiting.add({
      index: begun,
      random: own,
      textHash: chainHash(chainHash(2, app), begun),
      nextAtUs: beginsAtUs,
      turnsLeft: length(content.turns, own),
      begun: false,
      context: content.systemTokens,
      prefix,
    });
    begun++;
  }
}

/** One turn, which leaves the conversation as the next will find it; undefined when it no longer fits. */
function turn(
  conversation: Conversation,
  content: Extract<Content, { kind: "agents" }>,
): TraceRequest | undefined {
  const { random, prefix, textHash } = conversation;
  let inputTokens = conversation.context + length(content.added, random);
  let outputTokens = length(content.output, random);
  if (inputTokens + outputTokens > content.contextMax) {
    if (conversation.begun) return undefined;
    inputTokens = Math.min(inputTokens, content.contextMax - 1); // The first turn is shortened, not lost.
    outputTokens = Math.min(outputTokens, content.contextMax - inputTokens);
  }
  conversation.begun = true;
  for (let block = prefix.length; (block + 1) * BLOCK_TOKENS <= inputTokens; block++) {
    prefix.push(chainHash(textHash, block));
  }
  const request: TraceRequest = {
    atUs: conversation.nextAtUs,
    inputTokens,
    outputTokens,
    session: `c${conversation.index}`,
    prefix: prefix.slice(),
    blockTokens: BLOCK_TOKENS,
  };
  conversation.context = inputTokens + outputTokens;
  conversation.turnsLeft--;
  conversation.nextAtUs += Math.round(exponential(random) * content.gapUs);
  return request;
}

/** By time of the next turn; of equal times the conversation that began first. */
function comesFirst(left: Conversation, right: Conversation): boolean {
  const byTime = left.nextAtUs - right.nextAtUs;
  return byTime < 0 || (byTime === 0 && left.index < right.index);
}

type Question = { name: string; inputTokens: number; outputTokens: number; wordings: number };

function* questions(
  content: Extract<Content, { kind: "questions" }>,
  arrivals: Iterable<number>,
  random: Random,
): Generator<TraceRequest, void, undefined> {
  const { repeatShare, paraphraseShare, lookalikeShare, poolMax } = content;
  const kinds = random.split("kinds");
  const picks = random.split("picks");
  const input = random.split("input");
  const output = random.split("output");
  const popularity = new Zipf(poolMax, content.zipfExponent);
  const pool: Question[] = []; // A ring once it is full.
  let asked = 0;
  const fresh = (): Question => ({
    name: `q${asked++}`,
    inputTokens: length(content.input, input),
    outputTokens: length(content.output, output),
    wordings: 0,
  });
  for (const atUs of arrivals) {
    const kind = kinds.next();
    const original = pool[popularity.pick(pool.length, picks)];
    if (original === undefined || kind >= repeatShare + paraphraseShare + lookalikeShare) {
      const question = fresh();
      pool[(asked - 1) % poolMax] = question;
      yield { atUs, ...lengthsOf(question), question: question.name, cluster: question.name };
    } else if (kind < repeatShare) {
      const { name } = original;
      yield { atUs, ...lengthsOf(original), question: name, cluster: name, similarity: "exact" };
    } else {
      // Other words, other lengths: of the prompt always, of the answer only when it is another answer.
      original.wordings++;
      const question = `${original.name}.${original.wordings}`;
      const isParaphrase = kind < repeatShare + paraphraseShare;
      const close = kind < repeatShare + paraphraseShare * content.closeShare;
      yield {
        atUs,
        inputTokens: length(content.input, input),
        outputTokens: isParaphrase ? original.outputTokens : length(content.output, output),
        question,
        cluster: original.name,
        similarity: isParaphrase ? (close ? "close" : "loose") : "lookalike",
      };
    }
  }
}

function lengthsOf({ inputTokens, outputTokens }: Question) {
  return { inputTokens, outputTokens };
}

/** Ranks 0…n−1 with weights 1 ÷ (rank + 1)^exponent, for any n up to a maximum. */
class Zipf {
  /** Sum of the weights up to each rank. */
  readonly #sums: Float64Array;

  constructor(ranksMax: number, exponent: number) {
    this.#sums = new Float64Array(ranksMax);
    let sum = 0;
    for (let rank = 0; rank < ranksMax; rank++) {
      sum += Math.exp(-exponent * Math.log(rank + 1));
      this.#sums[rank] = sum;
    }
  }

  /** A rank below `ranks`; 0 when there is none. Always one draw. */
  pick(ranks: number, random: Random): number {
    const target = random.next() * (this.#sums[ranks - 1] ?? 0);
    let low = 0;
    let high = ranks - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((this.#sums[middle] ?? 0) > target) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

function length({ mean, cv, max }: Lengths, random: Random): number {
  if (cv === 0) return Math.min(max, Math.max(1, Math.round(mean)));
  const shape = 1 / (cv * cv);
  return Math.min(max, Math.max(1, Math.round((gamma(random, shape) * mean) / shape)));
}

/** Mean 1. */
function exponential(random: Random): number {
  return -Math.log(1 - random.next());
}

/** Standard normal, Box and Muller; the second value is thrown away, so that draws do not depend on history. */
function normal(random: Random): number {
  const radius = Math.sqrt(2 * exponential(random));
  return radius * Math.cos(2 * Math.PI * random.next());
}

/** Gamma with scale 1 (mean = shape), Marsaglia and Tsang; below shape 1 by their boost, without a power. */
function gamma(random: Random, shape: number): number {
  if (shape < 1) {
    const boost = Math.exp(-exponential(random) / shape);
    return gamma(random, shape + 1) * boost;
  }
  const d = shape - 1 / 3;
  const c = 1 / Math.sqrt(9 * d);
  for (;;) {
    const x = normal(random);
    const root = 1 + c * x;
    if (root <= 0) continue;
    const v = root * root * root;
    if (Math.log(1 - random.next()) < (x * x) / 2 + d - d * v + d * Math.log(v)) return d * v;
  }
}

function checkSpec({ arrivals, content, requests, durationUs }: LoadSpec): void {
  if (requests === undefined && durationUs === undefined) {
    throw new RangeError("a load needs requests or durationUs, or it never ends");
  }
  if (requests !== undefined && !(Number.isInteger(requests) && requests >= 1)) {
    throw new RangeError(`requests is ${requests}; it must be a whole number, 1 or more`);
  }
  if (durationUs !== undefined) checkRange("durationUs", durationUs, [1, Number.MAX_SAFE_INTEGER]);
  const rates: [number, number] = [1e-6, 1e6];
  if (arrivals.kind === "ramp") {
    checkRange("fromRate", arrivals.fromRate, [0, 1e6]);
    checkRange("toRate", arrivals.toRate, rates); // Above 0, or the load would never go on.
    checkRange("overUs", arrivals.overUs, [1, Number.MAX_SAFE_INTEGER]);
  } else checkRange("rate", arrivals.rate, rates);
  if (arrivals.kind === "gamma") checkRange("cv", arrivals.cv, [0.01, 100]);
  if (arrivals.kind === "daily") {
    checkRange("swing", arrivals.swing, [0, 1]);
    checkRange("periodUs", arrivals.periodUs, [1, Number.MAX_SAFE_INTEGER]);
  }
  checkLengths("output", content.output);
  if (content.kind !== "agents") checkLengths("input", content.input);
  if (content.kind === "agents") {
    checkLengths("added", content.added);
    checkLengths("turns", content.turns);
    checkRange("apps", content.apps, [1, 1e6]);
    checkRange("systemTokens", content.systemTokens, [0, 1e7]);
    checkRange("gapUs", content.gapUs, [0, Number.MAX_SAFE_INTEGER]);
    checkRange("contextMax", content.contextMax, [content.systemTokens + 2, 1e8]);
  }
  if (content.kind === "questions") {
    const { repeatShare, paraphraseShare, lookalikeShare } = content;
    for (const name of [
      "repeatShare",
      "paraphraseShare",
      "closeShare",
      "lookalikeShare",
    ] as const) {
      checkRange(name, content[name], [0, 1]);
    }
    checkRange(
      "the sum of the three shares",
      repeatShare + paraphraseShare + lookalikeShare,
      [0, 1],
    );
    checkRange("poolMax", content.poolMax, [1, 1e6]);
    checkRange("zipfExponent", content.zipfExponent, [0, 10]);
  }
}

function checkLengths(name: string, { mean, cv, max }: Lengths): void {
  checkRange(`${name}.mean`, mean, [1, 1e8]);
  checkRange(`${name}.cv`, cv, [0, 100]);
  checkRange(`${name}.max`, max, [1, 1e8]);
}

function checkRange(name: string, value: number, [min, max]: readonly [number, number]): void {
  if (!(value >= min && value <= max)) {
    throw new RangeError(`${name} is ${value}; it must be from ${min} to ${max}`);
  }
}
