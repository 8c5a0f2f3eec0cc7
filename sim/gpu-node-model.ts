/**
 * One GPU node inside a simulation: a continuous-batching engine (vLLM V1 rules) with paged KV
 * memory, preemption and a prefix cache, whose steps last what a step law says. The inside of the
 * edges `upstream` and `scraper`.
 *
 * A step takes every running request one token further (a decode), or one chunk of prompt (a
 * prefill), within `batchedTokensMax` tokens and `sequencesMax` seats. When no KV block is free,
 * the newest request gives all of its blocks back and starts over from the front of the queue; on
 * such a step nothing is admitted.
 *
 *   waiting ──admitted──▶ prefill ──last chunk──▶ decode ──last token──▶ finished
 *      ▲                     │                      │
 *      └──── preempted ──────┴──────────────────────┘        (cancel, crash: gone from anywhere)
 *
 * Cost per step is O(1) whatever the batch: decodes that cross a block boundary in step u are those
 * whose `key` is (−u) mod 16, so 16 counters replace a walk over the batch, and a heap knows who
 * finishes next. Mode `leap` also skips uniform decode steps in closed form; its times are rounded
 * once per stretch instead of once per step.
 *
 * Time is whole µs and comes from the caller; it never runs backwards. A step starts only when the
 * clock passes its start, so everything submitted at an instant shares the step that begins then,
 * and looking (`snapshot`, `producedTokens`, `nextEventAtUs`) changes nothing. Requests are kept
 * until they end; the caller bounds them.
 *
 * Oracle boundary: `outputTokens` is the truth that no actor may see; only this file reads it.
 */
import { KV_BLOCK_TOKENS, leastOf, rawStepUs, type StepLaw, stepTimeUs } from "./laws.ts";

/** One generation. Token counts are whole and ≥ 1. */
export type NodeRequest = {
  id: string;
  promptTokens: number;
  /** Bound the caller states; with the prompt it decides whether the request can ever fit. */
  maxTokens: number;
  /** What the model will really produce; cut at `maxTokens`. */
  outputTokens: number;
  /** Chained hashes of the prompt's leading blocks of `prefix.blockTokens` tokens. */
  prefixBlocks?: readonly number[];
};

/** What happened, in order; `atUs` is when, which may be before the call that reports it. */
export type NodeEvent =
  /** `cachedTokens`: of the prompt, found in the prefix cache. */
  | { kind: "first_token"; id: string; atUs: number; cachedTokens: number }
  | { kind: "finished"; id: string; atUs: number; outputTokens: number }
  /** Back in the queue; tokens already produced stand. */
  | { kind: "preempted"; id: string; atUs: number }
  /** Prompt and `maxTokens` exceed the KV memory: at submission, or after KV memory was lost. */
  | { kind: "refused_never_fits"; id: string; atUs: number }
  /** The node crashed under it, or was not up when it came. */
  | { kind: "lost"; id: string; atUs: number };

/** State of the node as its metrics would show it. Totals grow for the life of the model. */
export type NodeState = {
  atUs: number;
  /** Up and past its start-up; says nothing about a hang. */
  ready: boolean;
  hung: boolean;
  running: number;
  waiting: number;
  /** Share of KV blocks in use, 0..1. */
  kv: number;
  kvBlocks: number;
  kvBlocksFree: number;
  /** Prompt tokens of requests that reached their first token. */
  promptTokensTotal: number;
  generatedTokensTotal: number;
  preemptionsTotal: number;
  /** In tokens, as vLLM counts them; first admissions only. */
  prefixQueriesTotal: number;
  prefixHitsTotal: number;
  stepsTotal: number;
  finishedTotal: number;
  cancelledTotal: number;
  refusedTotal: number;
  lostTotal: number;
};

export type NodeModelOptions = {
  law: StepLaw;
  /** `steps` (default): every step rounded, the mode for replay. `leap`: faster on stable batches. */
  mode?: "steps" | "leap";
  /** Replaces the law's KV capacity, blocks of 16 tokens. */
  kvBlocks?: number;
  /**
   * LRU over prefix blocks, accounted apart from the running requests' KV; absent = no prefix
   * cache.
   */
  prefix?: { blockTokens: number; blocksMax: number };
};

/**
 * A request inside the node. In a list (waiting or running) by `previous` and `next`, newest last.
 */
class Sequence {
  readonly id: string;
  readonly promptTokens: number;
  readonly maxTokens: number;
  readonly outputTokens: number;
  readonly prefixBlocks: readonly number[];
  state: "waiting" | "prefill" | "decode" | "gone" = "waiting";
  /** Tokens produced when it last joined the decodes or was preempted. */
  produced = 0;
  /** Tokens in KV: now, while prefilling; when it joined, while decoding. */
  progress = 0;
  /** KV blocks held while prefilling; a decode's follow from its length. */
  blocks = 0;
  /** Tokens of the prefill chunk of the step under way. */
  chunk = 0;
  joinedStep = 0;
  key = 0;
  finishStep = 0;
  heapIndex = -1;
  /** Order of admission: ties of the finish step. */
  admission = 0;
  /** Prefix hit found at cache version `hitVersion`. */
  hit = 0;
  hitVersion = -1;
  /** Prefix hit of the first admission; -1 before it. */
  cachedTokens = -1;
  previous: Sequence | undefined = undefined;
  next: Sequence | undefined = undefined;

  constructor(request: NodeRequest) {
    this.id = request.id;
    this.promptTokens = request.promptTokens;
    this.maxTokens = request.maxTokens;
    this.outputTokens = Math.min(request.outputTokens, request.maxTokens);
    this.prefixBlocks = request.prefixBlocks ?? [];
  }
}

const NO_EVENTS: readonly NodeEvent[] = [];
/** Prefill shapes remembered: an engine that plans for each has long stopped being fast by then. */
const SHAPES_MAX = 1_000_000;

export class GpuNodeModel {
  readonly #law: StepLaw;
  readonly #leaps: boolean;
  readonly #prefixBlockTokens: number;
  readonly #prefixBlocksMax: number;
  readonly #samplerUsMin: number;

  readonly #sequences = new Map<string, Sequence>();
  readonly #waiting = new SequenceList();
  readonly #running = new SequenceList();
  /** Decodes by the step that makes their last token. */
  readonly #finishes = new FinishHeap();
  /** The one request between two chunks of its prompt: always the newest running. */
  #partial: Sequence | undefined = undefined;
  /** Prefilling in the step under way, in admission order; may hold some that are gone. */
  readonly #chunks: Sequence[] = [];

  /** Steps begun. `#decodes`, `#context`, `#free` are as they stand after that step. */
  #step = 0;
  #decodes = 0;
  #context = 0;
  #capacity: number;
  /** Negative only between a loss of KV memory and the next step. */
  #free: number;
  /** Decodes by (length at join − join step − 1) mod 16: who needs a block in which step. */
  readonly #phases = new Int32Array(KV_BLOCK_TOKENS);

  /** Start of the next step, or of the one under way. */
  #nowUs = 0;
  #stepEndUs = 0;
  #inStep = false;
  /** The caller's clock. */
  #clockUs = 0;

  // Mode leap: step boundaries of a uniform stretch all count from its start, so that the caller's
  // looking in between moves none of them. -1 = no stretch.
  #anchorStep = -1;
  #anchorUs = 0;
  #anchorStepUs = 0;
  #anchorGrowthUs = 0;

  #slowFactor = 1;
  #hungAtUs = -1;
  /** Requests are taken from then on; Infinity after a crash. */
  #upAtUs = 0;

  readonly #firstUseUs: number;
  /** Prefill shapes seen since the engine came up; kept only for laws that charge for new ones. */
  readonly #shapes = new Set<number>();

  readonly #prefixCache = new Set<number>(); // In order of last use.
  #prefixVersion = 0;
  #events: NodeEvent[] = [];
  #admissions = 0;
  #promptTokens = 0;
  #generatedTokens = 0;
  #preemptions = 0;
  #prefixQueries = 0;
  #prefixHits = 0;
  #finished = 0;
  #cancelled = 0;
  #refused = 0;
  #lost = 0;

  /** Throws RangeError when the limits contradict each other. */
  constructor(options: NodeModelOptions) {
    const { law } = options;
    this.#law = law;
    this.#leaps = options.mode === "leap";
    this.#capacity = options.kvBlocks ?? law.kvBlocks;
    this.#free = this.#capacity;
    this.#prefixBlockTokens = options.prefix?.blockTokens ?? 0;
    this.#prefixBlocksMax = options.prefix?.blocksMax ?? 0;
    this.#samplerUsMin = leastOf(law.s);
    this.#firstUseUs = law.U ?? 0;
    requireWhole("kvBlocks", this.#capacity, 1);
    requireWhole("sequencesMax", law.sequencesMax, 1);
    if (options.prefix !== undefined) {
      requireWhole("prefix.blockTokens", this.#prefixBlockTokens, 1);
      requireWhole("prefix.blocksMax", this.#prefixBlocksMax, 1);
    }
    // Otherwise decodes alone could exceed a step, and not every one would get its token.
    if (!(law.batchedTokensMax >= law.sequencesMax)) {
      throw new RangeError("batchedTokensMax must be at least sequencesMax");
    }
  }

  /** Tokens of one prefix block; 0 without a prefix cache. */
  get prefixBlockTokens(): number {
    return this.#prefixBlockTokens;
  }

  /**
   * Takes a request at `atUs`; the answer comes as events. Throws RangeError for a repeated id and
   * for counts that are not whole and ≥ 1 (bugs of the caller).
   */
  submit(request: NodeRequest, atUs: number): void {
    requireWhole("promptTokens", request.promptTokens, 1);
    requireWhole("maxTokens", request.maxTokens, 1);
    requireWhole("outputTokens", request.outputTokens, 1);
    if (this.#sequences.has(request.id)) {
      throw new RangeError(`request ${request.id} is already on this node`);
    }
    this.#run(atUs);
    if (atUs < this.#upAtUs) {
      this.#lost++;
      this.#events.push({ kind: "lost", id: request.id, atUs });
      return;
    }
    const sequence = new Sequence(request);
    if (!this.#fits(sequence)) {
      this.#refused++;
      this.#events.push({ kind: "refused_never_fits", id: request.id, atUs });
      return;
    }
    this.#sequences.set(request.id, sequence);
    this.#waiting.append(sequence);
  }

  /** Takes a request out and frees its memory at once; false when it is not (or no longer) here. */
  cancel(id: string, atUs: number): boolean {
    this.#run(atUs);
    const sequence = this.#sequences.get(id);
    if (sequence === undefined) return false;
    this.#remove(sequence);
    this.#cancelled++;
    return true;
  }

  /** Runs to `untilUs` and hands over every event not yet handed over, also of calls in between. */
  advance(untilUs: number): readonly NodeEvent[] {
    this.#run(untilUs);
    if (this.#events.length === 0) return NO_EVENTS;
    const events = this.#events;
    this.#events = [];
    return events;
  }

  /**
   * When to advance to next: no event lies before it, but for one dated at the clock's own instant.
   * The bound is the event's time or a little earlier, always after the clock; the caller asks
   * again. Undefined: nothing to come.
   */
  nextEventAtUs(): number | undefined {
    if (this.#events.length > 0) return this.#clockUs;
    if (this.#hungAtUs >= 0 || this.#sequences.size === 0) return undefined;
    if (this.#inStep && (this.#chunks.length > 0 || this.#finishes.firstStep() === this.#step)) {
      return this.#stepEndUs;
    }
    const startUs = this.#inStep ? this.#stepEndUs : this.#nowUs;
    if (!this.#isUniform()) {
      // Who is admitted, and so how long the step takes, is decided when it starts.
      return this.#inStep ? startUs : startUs + this.#leastStepUs();
    }
    const steps = Math.min(this.#finishes.firstStep() - this.#step, this.#stepsThatFit());
    return Math.max(this.#uniformBoundUs(startUs, steps), startUs, this.#clockUs + 1);
  }

  /**
   * When the step under way ends: no token appears before. Undefined when the node is idle or hung.
   */
  nextStepAtUs(): number | undefined {
    if (this.#hungAtUs >= 0) return undefined;
    if (this.#inStep) return this.#stepEndUs;
    return this.#sequences.size > 0 ? this.#clockUs + 1 : undefined;
  }

  /**
   * Tokens that a request has produced by now; 0 for one that waits for its first, or is not here.
   */
  producedTokens(id: string): number {
    const sequence = this.#sequences.get(id);
    return sequence === undefined ? 0 : this.#produced(sequence);
  }

  snapshot(): NodeState {
    const used = this.#capacity - this.#free;
    return {
      atUs: this.#clockUs,
      ready: this.#clockUs >= this.#upAtUs,
      hung: this.#hungAtUs >= 0,
      running: this.#running.size,
      waiting: this.#waiting.size,
      kv: Math.min(1, used / this.#capacity),
      kvBlocks: this.#capacity,
      kvBlocksFree: this.#free,
      promptTokensTotal: this.#promptTokens,
      generatedTokensTotal: this.#generatedTokens,
      preemptionsTotal: this.#preemptions,
      prefixQueriesTotal: this.#prefixQueries,
      prefixHitsTotal: this.#prefixHits,
      stepsTotal: this.#step,
      finishedTotal: this.#finished,
      cancelledTotal: this.#cancelled,
      refusedTotal: this.#refused,
      lostTotal: this.#lost,
    };
  }

  // ---- faults -----------------------------------------------------------------------------------

  /** Steps that begin from now on last `factor` times as long; 1 = healthy. */
  setSlowFactor(factor: number, atUs: number): void {
    if (!(factor > 0 && Number.isFinite(factor))) {
      throw new RangeError(`slow factor must be a number above 0, not ${factor}`);
    }
    this.#run(atUs);
    this.#slowFactor = factor;
    this.#anchorStep = -1;
  }

  /** A wedged engine: takes requests, makes no token, until `resume`. */
  hang(atUs: number): void {
    this.#run(atUs);
    if (this.#hungAtUs < 0) this.#hungAtUs = atUs;
  }

  /** Ends a hang; the step that was under way goes on where it stopped. */
  resume(atUs: number): void {
    this.#run(atUs);
    if (this.#hungAtUs < 0) return;
    const hungUs = atUs - this.#hungAtUs;
    this.#hungAtUs = -1;
    this.#anchorUs += hungUs;
    if (this.#inStep) this.#stepEndUs += hungUs;
    else this.#nowUs = atUs;
  }

  /** Everything on the node is lost, cache included; it takes nothing until `restart`. */
  crash(atUs: number): void {
    this.#run(atUs);
    for (const list of [this.#running, this.#waiting]) {
      for (let last = list.first; last !== undefined; last = list.first) {
        this.#remove(last);
        this.#lost++;
        this.#events.push({ kind: "lost", id: last.id, atUs });
      }
    }
    this.#prefixCache.clear();
    this.#prefixVersion++;
    this.#shapes.clear();
    this.#inStep = false;
    this.#chunks.length = 0;
    this.#nowUs = atUs;
    this.#hungAtUs = -1;
    this.#upAtUs = Number.POSITIVE_INFINITY;
  }

  /**
   * Starts a crashed node, cold: ready after `startUpUs` (default: the law's). No effect on one
   * that is up.
   */
  restart(atUs: number, startUpUs = this.#law.startUpUs): void {
    this.#run(atUs);
    if (this.#upAtUs === Number.POSITIVE_INFINITY) this.#upAtUs = atUs + startUpUs;
  }

  /**
   * Changes the KV capacity: the newest requests are preempted until the rest fit; some may never
   * fit again.
   */
  setKvBlocks(blocks: number, atUs: number): void {
    requireWhole("blocks", blocks, 1);
    this.#run(atUs);
    this.#free += blocks - this.#capacity;
    this.#capacity = blocks;
    for (const sequence of this.#sequences.values()) {
      if (this.#fits(sequence)) continue;
      this.#remove(sequence);
      this.#refused++;
      this.#events.push({ kind: "refused_never_fits", id: sequence.id, atUs });
    }
  }

  /** Throws an Error that names the first broken invariant. O(requests): for checkers and tests. */
  assertInvariants(): void {
    let blocks = 0;
    let decodes = 0;
    let context = 0;
    for (let each = this.#running.first; each !== undefined; each = each.next) {
      blocks += this.#blocks(each);
      if (each.state !== "decode") continue;
      decodes++;
      context += this.#length(each);
    }
    const listed = this.#running.size + this.#waiting.size;
    requireThat(blocks + this.#free === this.#capacity, "KV blocks held + free = capacity");
    requireThat(decodes === this.#decodes, "decodes are counted");
    requireThat(decodes === this.#finishes.size, "every decode has its finish");
    requireThat(context === this.#context, "context is the sum of the decodes' lengths");
    requireThat(listed === this.#sequences.size, "every request is waiting or running");
    requireThat(this.#running.size <= this.#law.sequencesMax, "seats are not exceeded");
    const works = this.#inStep || this.#hungAtUs >= 0 || this.#nowUs >= this.#clockUs;
    requireThat(works || this.#sequences.size === 0, "no idle node with waiting work");
    requireThat(this.#prefixCache.size <= this.#prefixBlocksMax, "the prefix cache is bounded");
  }

  // ---- the engine -------------------------------------------------------------------------------

  #run(untilUs: number): void {
    if (!Number.isSafeInteger(untilUs) || untilUs < this.#clockUs) {
      throw new RangeError(`time must be whole µs from ${this.#clockUs} on, not ${untilUs}`);
    }
    this.#clockUs = untilUs;
    if (this.#hungAtUs >= 0) return;
    for (;;) {
      if (this.#inStep) {
        if (this.#stepEndUs > untilUs) return;
        this.#completeStep();
      }
      if (this.#sequences.size === 0) {
        this.#nowUs = untilUs;
        return;
      }
      if (this.#nowUs >= untilUs) return;
      if (this.#leaps && this.#leap(untilUs)) continue;
      this.#beginStep();
    }
  }

  /** Decides who is in the next step and how long it takes. There is work. */
  #beginStep(): void {
    const law = this.#law;
    const step = this.#step + 1;
    // Phase A: running requests, in order of admission. The newest give way until what the others
    // need is free.
    let need = this.#phaseCount(step);
    let preempted = false;
    let chunk = 0;
    let chunkBlocks = 0;
    const partial = this.#partial;
    if (partial !== undefined) {
      chunk = Math.min(
        partial.promptTokens + partial.produced - partial.progress,
        law.batchedTokensMax - this.#decodes,
      );
      chunkBlocks = blocksOf(partial.progress + chunk) - partial.blocks;
    }
    while (need + chunkBlocks > this.#free) {
      const newest = this.#running.last;
      if (newest === undefined) break;
      if (newest.state === "prefill") chunk = chunkBlocks = 0;
      else if ((newest.key + step) % KV_BLOCK_TOKENS === 0) need--;
      this.#preempt(newest);
      preempted = true;
    }
    this.#free -= need + chunkBlocks;
    let tokensLeft = law.batchedTokensMax - this.#decodes - chunk;
    const chunks = this.#chunks;
    if (this.#partial !== undefined) {
      this.#partial.chunk = chunk;
      this.#partial.blocks += chunkBlocks;
      chunks.push(this.#partial);
    }
    // Phase B: the head of the queue blocks those behind it; nobody is preempted for it.
    while (!preempted && tokensLeft > 0 && this.#running.size < law.sequencesMax) {
      const head = this.#waiting.first;
      if (head === undefined) break;
      const hit = this.#prefixHit(head);
      const size = Math.min(head.promptTokens + head.produced - hit, tokensLeft);
      const blocks = blocksOf(hit + size);
      if (blocks > this.#free) break;
      this.#free -= blocks;
      tokensLeft -= size;
      this.#admit(head, hit, size, blocks);
      chunks.push(head);
    }
    this.#step = step;
    this.#inStep = true;
    this.#stepEndUs = this.#endOfStepUs();
    this.#context += this.#decodes;
  }

  /** `#decodes` and `#context` are still those before the step. */
  #endOfStepUs(): number {
    const chunks = this.#chunks;
    let decodes = this.#decodes;
    let context = this.#context;
    let tokens = 0;
    let prefills = 0;
    let pairs = 0;
    let firstUses = 0;
    for (const { chunk, progress } of chunks) {
      if (chunk === 1) {
        // The engine cannot tell a chunk of one token from a decode.
        decodes++;
        context += progress;
      } else {
        tokens += chunk;
        prefills++;
        pairs += chunk * (progress + chunk / 2);
        if (this.#firstUseUs > 0 && this.#isNewShape(chunk, progress)) firstUses++;
      }
    }
    if (!this.#leaps || chunks.length > 0) {
      const slow = this.#slowFactor;
      const us = stepTimeUs(this.#law, decodes, context, tokens, prefills, pairs, slow);
      return this.#nowUs + us + Math.round(firstUses * this.#firstUseUs * slow);
    }
    this.#anchor(this.#step - 1);
    return this.#boundaryUs(this.#step);
  }

  /** Notes the shape. Beyond `SHAPES_MAX` shapes none counts as new any more. */
  #isNewShape(chunk: number, progress: number): boolean {
    if (this.#shapes.size >= SHAPES_MAX) return false;
    const shape = progress * (this.#law.batchedTokensMax + 1) + chunk;
    if (this.#shapes.has(shape)) return false;
    this.#shapes.add(shape);
    return true;
  }

  #completeStep(): void {
    this.#inStep = false;
    this.#nowUs = this.#stepEndUs;
    this.#generatedTokens += this.#decodes;
    this.#finishDue();
    for (const sequence of this.#chunks) {
      if (sequence.state !== "prefill") continue; // Cancelled during the step.
      sequence.progress += sequence.chunk;
      if (sequence.progress < sequence.promptTokens + sequence.produced) this.#partial = sequence;
      else this.#join(sequence);
    }
    this.#chunks.length = 0;
  }

  /** Last tokens of the step just ended. */
  #finishDue(): void {
    for (;;) {
      const due = this.#finishes.first;
      if (due === undefined || due.finishStep !== this.#step) return;
      this.#remove(due);
      this.#finish(due);
    }
  }

  /** The prompt (and what was produced before a preemption) is in KV, and one more token is out. */
  #join(sequence: Sequence): void {
    if (this.#partial === sequence) this.#partial = undefined;
    this.#generatedTokens++;
    sequence.produced++;
    if (sequence.produced === 1) {
      this.#promptTokens += sequence.promptTokens;
      const { id, cachedTokens } = sequence;
      this.#events.push({ kind: "first_token", id, atUs: this.#nowUs, cachedTokens });
    }
    const left = sequence.outputTokens - sequence.produced;
    if (left === 0) {
      this.#remove(sequence);
      this.#finish(sequence);
      return;
    }
    sequence.state = "decode";
    sequence.joinedStep = this.#step;
    sequence.key = (sequence.progress - this.#step - 1) & (KV_BLOCK_TOKENS - 1);
    sequence.finishStep = this.#step + left;
    this.#addPhase(sequence.key, 1);
    this.#decodes++;
    this.#context += sequence.progress;
    this.#finishes.add(sequence);
  }

  #finish(sequence: Sequence): void {
    this.#finished++;
    const { id, outputTokens } = sequence;
    this.#events.push({ kind: "finished", id, atUs: this.#nowUs, outputTokens });
  }

  #admit(sequence: Sequence, hit: number, chunk: number, blocks: number): void {
    this.#waiting.remove(sequence);
    this.#running.append(sequence);
    sequence.state = "prefill";
    sequence.progress = hit;
    sequence.chunk = chunk;
    sequence.blocks = blocks;
    sequence.admission = this.#admissions++;
    this.#anchorStep = -1;
    if (this.#prefixBlocksMax === 0) {
      sequence.cachedTokens = 0;
      return;
    }
    if (sequence.cachedTokens < 0) {
      sequence.cachedTokens = hit;
      this.#prefixQueries += sequence.promptTokens;
      this.#prefixHits += hit;
    }
    this.#touchPrefix(sequence.prefixBlocks);
  }

  /** Between steps: the newest request gives its memory back and goes to the front of the queue. */
  #preempt(sequence: Sequence): void {
    const produced = this.#produced(sequence);
    this.#release(sequence);
    this.#running.remove(sequence);
    sequence.state = "waiting";
    sequence.produced = produced;
    sequence.progress = 0;
    sequence.blocks = 0;
    this.#waiting.prepend(sequence);
    this.#preemptions++;
    this.#events.push({ kind: "preempted", id: sequence.id, atUs: this.#nowUs });
  }

  #remove(sequence: Sequence): void {
    if (sequence.state === "waiting") this.#waiting.remove(sequence);
    else {
      this.#release(sequence);
      this.#running.remove(sequence);
    }
    sequence.state = "gone";
    this.#sequences.delete(sequence.id);
  }

  /** Takes a running request out of every sum. */
  #release(sequence: Sequence): void {
    this.#free += this.#blocks(sequence);
    this.#anchorStep = -1;
    if (sequence.state === "decode") {
      this.#decodes--;
      this.#context -= this.#length(sequence);
      this.#addPhase(sequence.key, -1);
      this.#finishes.remove(sequence);
    } else if (this.#partial === sequence) this.#partial = undefined;
  }

  /** Tokens in KV of a decode, that of the step under way included. */
  #length(sequence: Sequence): number {
    return sequence.progress + this.#step - sequence.joinedStep;
  }

  #blocks(sequence: Sequence): number {
    return sequence.state === "decode" ? blocksOf(this.#length(sequence)) : sequence.blocks;
  }

  #produced(sequence: Sequence): number {
    if (sequence.state !== "decode") return sequence.produced;
    const steps = this.#step - sequence.joinedStep;
    // The token of the step under way is not out yet.
    return sequence.produced + (this.#inStep ? steps - 1 : steps);
  }

  #fits(sequence: Sequence): boolean {
    return blocksOf(sequence.promptTokens + sequence.maxTokens) <= this.#capacity;
  }

  /** Decodes that need a new block in a step. */
  #phaseCount(step: number): number {
    return this.#phases[-step & (KV_BLOCK_TOKENS - 1)] ?? 0;
  }

  #addPhase(key: number, change: number): void {
    this.#phases[key] = (this.#phases[key] ?? 0) + change;
  }

  // ---- prefix cache -----------------------------------------------------------------------------

  /** Leading tokens of the prompt whose blocks are present; at least one token is always computed. */
  #prefixHit(sequence: Sequence): number {
    if (this.#prefixBlocksMax === 0) return 0;
    if (sequence.hitVersion === this.#prefixVersion) return sequence.hit;
    let present = 0;
    for (const block of sequence.prefixBlocks) {
      if (!this.#prefixCache.has(block)) break;
      present++;
    }
    sequence.hit = Math.min(present * this.#prefixBlockTokens, sequence.promptTokens - 1);
    sequence.hitVersion = this.#prefixVersion;
    return sequence.hit;
  }

  #touchPrefix(blocks: readonly number[]): void {
    const cache = this.#prefixCache;
    for (const block of blocks) {
      cache.delete(block);
      cache.add(block);
    }
    for (const oldest of cache) {
      if (cache.size <= this.#prefixBlocksMax) break;
      cache.delete(oldest);
    }
    if (blocks.length > 0) this.#prefixVersion++;
  }

  // ---- uniform stretches ------------------------------------------------------------------------

  /**
   * Only decodes, and nobody can be admitted before one of them ends. Holds also for the step under
   * way.
   */
  #isUniform(): boolean {
    if (this.#partial !== undefined || this.#decodes === 0) return false;
    const head = this.#waiting.first;
    if (head === undefined || this.#running.size >= this.#law.sequencesMax) return true;
    const hit = this.#prefixHit(head);
    const tokensLeft = this.#law.batchedTokensMax - this.#decodes;
    return (
      blocksOf(hit + Math.min(head.promptTokens + head.produced - hit, tokensLeft)) > this.#free
    );
  }

  /**
   * Skips the whole steps of a uniform stretch that end by `untilUs`; false when there is none.
   * Between steps.
   */
  #leap(untilUs: number): boolean {
    if (!this.#isUniform()) return false;
    let steps = Math.min(this.#finishes.firstStep() - this.#step, this.#stepsThatFit());
    if (steps < 1) return false;
    this.#anchor(this.#step);
    if (this.#boundaryUs(this.#step + steps) > untilUs) {
      steps = this.#lastStepBy(untilUs) - this.#step;
      if (steps < 1) return false;
    }
    let blocks = Math.floor(steps / KV_BLOCK_TOKENS) * this.#decodes;
    for (let i = steps % KV_BLOCK_TOKENS; i > 0; i--) blocks += this.#phaseCount(this.#step + i);
    this.#free -= blocks;
    this.#step += steps;
    this.#context += steps * this.#decodes;
    this.#generatedTokens += steps * this.#decodes;
    this.#nowUs = this.#boundaryUs(this.#step);
    this.#finishDue();
    return true;
  }

  /** A uniform stretch begins now, after step `step`, unless one is running already. */
  #anchor(step: number): void {
    if (this.#anchorStep >= 0) return;
    this.#anchorStep = step;
    this.#anchorUs = this.#nowUs;
    this.#anchorStepUs = this.#uniformStepUs();
    this.#anchorGrowthUs = this.#growthUs();
  }

  /** Uniform steps whose new blocks are free: whole cycles of 16 steps take one block per decode. */
  #stepsThatFit(): number {
    if (this.#free < 0) return 0;
    const cycles = Math.floor(this.#free / this.#decodes);
    let left = this.#free - cycles * this.#decodes;
    let steps = 0;
    for (; steps < KV_BLOCK_TOKENS; steps++) {
      left -= this.#phaseCount(this.#step + steps + 1);
      if (left < 0) break;
    }
    return cycles * KV_BLOCK_TOKENS + steps;
  }

  #uniformStepUs(): number {
    const us = rawStepUs(this.#law, this.#decodes, this.#context, 0, 0, 0);
    return Math.max(1, us * this.#slowFactor);
  }

  /** Each uniform step reads one more token of context per decode than the one before. */
  #growthUs(): number {
    return this.#law.actx * this.#decodes * this.#slowFactor;
  }

  /** End of a step of the anchored stretch. */
  #boundaryUs(step: number): number {
    const steps = step - this.#anchorStep;
    return (
      this.#anchorUs +
      Math.round(this.#anchorStepUs * steps + (this.#anchorGrowthUs * steps * (steps - 1)) / 2)
    );
  }

  /**
   * Last step of the anchored stretch that ends by `untilUs`: the closed form, then corrected for
   * rounding.
   */
  #lastStepBy(untilUs: number): number {
    const us = untilUs - this.#anchorUs;
    const linear = this.#anchorStepUs - this.#anchorGrowthUs / 2;
    const root = Math.sqrt(linear * linear + 2 * this.#anchorGrowthUs * us);
    let step = this.#anchorStep + Math.floor((2 * us) / (linear + root));
    while (this.#boundaryUs(step) > untilUs) step--;
    while (this.#boundaryUs(step + 1) <= untilUs) step++;
    return step;
  }

  /** No later than the end of `steps` uniform steps that begin at `startUs`. */
  #uniformBoundUs(startUs: number, steps: number): number {
    if (this.#leaps && this.#anchorStep >= 0) return this.#boundaryUs(this.#step + steps);
    const us = this.#uniformStepUs();
    const totalUs = us * steps + (this.#growthUs() * steps * (steps - 1)) / 2;
    // In leap mode the stretch would be anchored here; in steps each may round down by half.
    return startUs + (this.#leaps ? Math.round(totalUs) : Math.floor(totalUs - steps / 2));
  }

  /** No later than the end of a step that begins now, whoever is in it. */
  #leastStepUs(): number {
    if (this.#phaseCount(this.#step + 1) > this.#free || this.#partial !== undefined) return 1;
    const { h, W, d, F, C, a0, aB } = this.#law;
    const decodes = this.#decodes;
    let us = h + Math.max(W + d * decodes, F + C * decodes) + this.#samplerUsMin;
    // Below 0 in laws that price a decode under a prompt token; what is left out otherwise is above.
    if (decodes > 0) us += Math.min(0, a0 + aB * decodes);
    return Math.max(1, Math.floor(us * this.#slowFactor));
  }
}

// ---- structures ---------------------------------------------------------------------------------

/** Doubly linked through the sequences themselves: every operation is O(1). */
class SequenceList {
  first: Sequence | undefined = undefined;
  last: Sequence | undefined = undefined;
  size = 0;

  append(sequence: Sequence): void {
    sequence.previous = this.last;
    sequence.next = undefined;
    if (this.last === undefined) this.first = sequence;
    else this.last.next = sequence;
    this.last = sequence;
    this.size++;
  }

  prepend(sequence: Sequence): void {
    sequence.previous = undefined;
    sequence.next = this.first;
    if (this.first === undefined) this.last = sequence;
    else this.first.previous = sequence;
    this.first = sequence;
    this.size++;
  }

  remove(sequence: Sequence): void {
    const { previous, next } = sequence;
    if (previous === undefined) this.first = next;
    else previous.next = next;
    if (next === undefined) this.last = previous;
    else next.previous = previous;
    sequence.previous = undefined;
    sequence.next = undefined;
    this.size--;
  }
}

/** Binary heap by (finish step, admission) that also removes from the middle. */
class FinishHeap {
  readonly #items: Sequence[] = [];

  get size(): number {
    return this.#items.length;
  }

  get first(): Sequence | undefined {
    return this.#items[0];
  }

  /** Infinity when empty. */
  firstStep(): number {
    return this.#items[0]?.finishStep ?? Number.POSITIVE_INFINITY;
  }

  add(sequence: Sequence): void {
    this.#items.push(sequence);
    this.#siftUp(sequence, this.#items.length - 1);
  }

  remove(sequence: Sequence): void {
    const index = sequence.heapIndex;
    const last = this.#items.pop();
    sequence.heapIndex = -1;
    if (last === undefined || last === sequence) return;
    this.#siftUp(last, index);
    this.#siftDown(last, last.heapIndex);
  }

  #siftUp(sequence: Sequence, from: number): void {
    let index = from;
    while (index > 0) {
      const parent = (index - 1) >> 1;
      const above = this.#items[parent];
      if (above === undefined || !isBefore(sequence, above)) break;
      this.#place(above, index);
      index = parent;
    }
    this.#place(sequence, index);
  }

  #siftDown(sequence: Sequence, from: number): void {
    let index = from;
    for (;;) {
      let child = 2 * index + 1;
      let below = this.#items[child];
      if (below === undefined) break;
      const right = this.#items[child + 1];
      if (right !== undefined && isBefore(right, below)) {
        below = right;
        child++;
      }
      if (!isBefore(below, sequence)) break;
      this.#place(below, index);
      index = child;
    }
    this.#place(sequence, index);
  }

  #place(sequence: Sequence, index: number): void {
    this.#items[index] = sequence;
    sequence.heapIndex = index;
  }
}

function isBefore(a: Sequence, b: Sequence): boolean {
  return a.finishStep === b.finishStep ? a.admission < b.admission : a.finishStep < b.finishStep;
}

function blocksOf(tokens: number): number {
  return Math.ceil(tokens / KV_BLOCK_TOKENS);
}

function requireWhole(name: string, value: number, least: number): void {
  if (!Number.isSafeInteger(value) || value < least) {
    throw new RangeError(`${name} must be a whole number of at least ${least}, not ${value}`);
  }
}

function requireThat(holds: boolean, invariant: string): void {
  if (!holds) throw new Error(`broken invariant: ${invariant}`);
}
