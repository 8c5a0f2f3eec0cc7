/**
 * The scheduler rules of sim/gpu-node-model.ts written as plainly as they read: a loop over the
 * whole batch in every step, nothing summed up, nothing skipped. Slow, and the judge of the fast
 * one.
 */
import type { NodeEvent, NodeRequest } from "../sim/gpu-node-model.ts";
import { type StepLaw, stepTimeUs } from "../sim/laws.ts";

export type Submission = NodeRequest & { atUs: number };
export type Cancellation = { id: string; atUs: number };

type Job = {
  request: Submission;
  /** Tokens in KV. */
  inKv: number;
  produced: number;
  blocks: number;
  cached: number | undefined;
};

const blocksOf = (tokens: number) => Math.ceil(tokens / 16);

/** Runs everything to its end. `submissions` and `cancellations` in order of time. */
export function plainLoop(
  law: StepLaw,
  submissions: readonly Submission[],
  cancellations: readonly Cancellation[] = [],
  prefix?: { blockTokens: number; blocksMax: number },
): { events: NodeEvent[]; steps: number; freeAtEnd: number } {
  const events: NodeEvent[] = [];
  const capacity = law.kvBlocks;
  let running: Job[] = [];
  let waiting: Job[] = [];
  let cache: number[] = []; // Least recently used first.
  const shapes = new Set<string>();
  let nowUs = 0;
  let steps = 0;
  let arrived = 0;
  const cancels = [...cancellations];
  const free = () => capacity - running.reduce((sum, job) => sum + job.blocks, 0);
  const cancelUntil = (isDue: (atUs: number) => boolean) => {
    for (let next = cancels[0]; next !== undefined && isDue(next.atUs); next = cancels[0]) {
      const { id } = next;
      cancels.shift();
      running = running.filter((job) => job.request.id !== id);
      waiting = waiting.filter((job) => job.request.id !== id);
    }
  };
  const arriveUntil = (untilUs: number) => {
    for (;;) {
      const request = submissions[arrived];
      if (request === undefined || request.atUs > untilUs) return;
      // A cancellation takes only what is already here.
      cancelUntil((atUs) => atUs < request.atUs);
      arrived++;
      if (blocksOf(request.promptTokens + request.maxTokens) > capacity) {
        events.push({ kind: "refused_never_fits", id: request.id, atUs: request.atUs });
      } else waiting.push({ request, inKv: 0, produced: 0, blocks: 0, cached: undefined });
    }
  };

  for (;;) {
    arriveUntil(nowUs);
    cancelUntil((atUs) => atUs <= nowUs);
    if (running.length === 0 && waiting.length === 0) {
      const next = submissions[arrived];
      if (next === undefined) return { events, steps, freeAtEnd: free() };
      nowUs = Math.max(nowUs, next.atUs);
      continue;
    }

    // Phase A.
    const chunks = new Map<Job, number>();
    let tokensLeft = law.batchedTokensMax;
    let preempted = false;
    for (let i = 0; i < running.length; i++) {
      const job = running[i];
      if (job === undefined) break;
      const wanted = job.request.promptTokens + job.produced - job.inKv;
      const chunk = Math.min(wanted, tokensLeft);
      const more = blocksOf(job.inKv + chunk) - job.blocks;
      let isOut = false;
      while (more > free()) {
        const tail = running.pop();
        if (tail === undefined) throw new Error("a lone request does not fit");
        tail.inKv = 0;
        tail.blocks = 0;
        waiting.unshift(tail);
        preempted = true;
        events.push({ kind: "preempted", id: tail.request.id, atUs: nowUs });
        isOut = tail === job;
        if (isOut) break;
      }
      if (isOut) break;
      job.blocks += more;
      tokensLeft -= chunk;
      if (chunk > 0) chunks.set(job, chunk);
    }

    // Phase B.
    while (!preempted && tokensLeft > 0 && running.length < law.sequencesMax) {
      const job = waiting[0];
      if (job === undefined) break;
      const { promptTokens, prefixBlocks = [] } = job.request;
      let present = 0;
      while (present < prefixBlocks.length && cache.includes(prefixBlocks[present] ?? -1))
        present++;
      const hit =
        prefix === undefined ? 0 : Math.min(present * prefix.blockTokens, promptTokens - 1);
      const chunk = Math.min(promptTokens + job.produced - hit, tokensLeft);
      if (blocksOf(hit + chunk) > free()) break;
      waiting.shift();
      running.push(job);
      job.inKv = hit;
      job.blocks = blocksOf(hit + chunk);
      job.cached ??= hit;
      tokensLeft -= chunk;
      chunks.set(job, chunk);
      if (prefix !== undefined) {
        cache = cache.filter((block) => !prefixBlocks.includes(block));
        cache.push(...prefixBlocks);
        cache = cache.slice(Math.max(0, cache.length - prefix.blocksMax));
      }
    }

    // The step itself.
    let decodes = 0;
    let context = 0;
    let prefillTokens = 0;
    let prefills = 0;
    let pairs = 0;
    let firstUses = 0;
    for (const [job, chunk] of chunks) {
      if (chunk === 1) {
        decodes++;
        context += job.inKv;
      } else {
        prefillTokens += chunk;
        prefills++;
        pairs += chunk * (job.inKv + chunk / 2);
        const shape = `${chunk} on ${job.inKv}`;
        if (!shapes.has(shape)) firstUses++;
        shapes.add(shape);
      }
    }
    const endUs =
      nowUs +
      stepTimeUs(law, decodes, context, prefillTokens, prefills, pairs) +
      Math.round(firstUses * (law.U ?? 0));
    steps++;
    // What comes during the step waits; what leaves during it leaves before its tokens come out.
    arriveUntil(endUs - 1);
    cancelUntil((atUs) => atUs < endUs);
    nowUs = endUs;
    for (const job of [...running]) {
      const { id, promptTokens, outputTokens, maxTokens } = job.request;
      const chunk = chunks.get(job);
      if (chunk === undefined) continue;
      job.inKv += chunk;
      if (job.inKv < promptTokens + job.produced) continue;
      job.produced++;
      if (job.produced === 1) {
        events.push({ kind: "first_token", id, atUs: nowUs, cachedTokens: job.cached ?? 0 });
      }
      if (job.produced < Math.min(outputTokens, maxTokens)) continue;
      running = running.filter((other) => other !== job);
      events.push({ kind: "finished", id, atUs: nowUs, outputTokens: job.produced });
    }
  }
}
