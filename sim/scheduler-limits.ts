/**
 * What an engine's log shows of its scheduler: seats, KV memory, and how many prompt tokens one step took.
 *
 * Seats show as a ceiling: while requests wait, just as many run. Memory shows as a level: while requests wait
 * with seats free, the tokens in memory stay about the same. What was never short cannot be seen, and is said to be
 * undefined. Pure; one sweep over the starts and ends of the log.
 */
import type { LoggedRequest } from "./request-log.ts";

export type SchedulerLimits = {
  /** Most requests that ran at once. */
  runningMax: number;
  /** Seats, when they were what requests waited for. */
  sequencesMax: number | undefined;
  /** Tokens in KV memory while it was what requests waited for. */
  kvTokens: number | undefined;
  /** A step took at least so many prompt tokens. */
  stepTokensMin: number;
};

/** Waiting for less than this share of the time says nothing about what was waited for. */
const WAITING_SHARE_MIN = 0.05;
/** Share of the time of waiting that must be spent at the ceiling. */
const CEILING_SHARE = 0.5;
/** Width of the level of memory: 80 % of the time of waiting within a factor of this. */
const LEVEL_FACTOR = 1.5;

type Change = { atUs: number; waiting: number; running: number; tokens: number; rate: number };

export function schedulerLimits(requests: readonly LoggedRequest[]): SchedulerLimits {
  const changes: Change[] = [];
  for (const each of requests) {
    const { atUs, promptTokens, outputTokens, firstTokenUs, lastTokenUs } = each;
    if (firstTokenUs === undefined || lastTokenUs === undefined) continue;
    const startUs = Math.max(atUs, each.scheduledUs ?? firstTokenUs);
    const rate = outputTokens / Math.max(1, lastTokenUs - firstTokenUs);
    const change = (at: number, waiting: number, running: number, tokens: number, slope: number) =>
      changes.push({ atUs: at, waiting, running, tokens, rate: slope });
    change(atUs, 1, 0, 0, 0);
    change(startUs, -1, 1, promptTokens, 0);
    change(firstTokenUs, 0, 0, 0, rate);
    change(lastTokenUs, 0, -1, -promptTokens - rate * (lastTokenUs - firstTokenUs), -rate);
  }
  changes.sort((a, b) => a.atUs - b.atUs || a.running - b.running);
  const sweep = sweepOf(changes);
  return { ...limitsOf(sweep), stepTokensMin: stepTokensMin(requests) };
}

type Sweep = {
  runningMax: number;
  durationUs: number;
  /** Stretches with requests waiting. */
  stretches: { us: number; running: number; tokens: number }[];
};

function sweepOf(changes: readonly Change[]): Sweep {
  let waiting = 0;
  let running = 0;
  let tokens = 0;
  let rate = 0;
  let atUs = changes[0]?.atUs ?? 0;
  const startUs = atUs;
  let runningMax = 0;
  const stretches: Sweep["stretches"] = [];
  for (const change of changes) {
    const us = change.atUs - atUs;
    if (us > 0 && waiting > 0) stretches.push({ us, running, tokens: tokens + (rate * us) / 2 });
    tokens += rate * us + change.tokens;
    atUs = change.atUs;
    waiting += change.waiting;
    running += change.running;
    rate += change.rate;
    runningMax = Math.max(runningMax, running);
  }
  return { runningMax, durationUs: atUs - startUs, stretches };
}

function limitsOf(sweep: Sweep): Omit<SchedulerLimits, "stepTokensMin"> {
  const { runningMax, durationUs, stretches } = sweep;
  let waitingUs = 0;
  let ceilingUs = 0;
  for (const { us, running } of stretches) {
    waitingUs += us;
    if (running >= Math.floor(0.97 * runningMax)) ceilingUs += us;
  }
  const nothing = { runningMax, sequencesMax: undefined, kvTokens: undefined };
  if (waitingUs < WAITING_SHARE_MIN * durationUs) return nothing;
  if (ceilingUs >= CEILING_SHARE * waitingUs) return { ...nothing, sequencesMax: runningMax };
  const byTokens = [...stretches].sort((a, b) => a.tokens - b.tokens);
  const tokensAt = (share: number) => {
    let us = 0;
    for (const stretch of byTokens) {
      us += stretch.us;
      if (us >= share * waitingUs) return stretch.tokens;
    }
    return byTokens.at(-1)?.tokens ?? 0;
  };
  const isLevel = tokensAt(0.9) <= LEVEL_FACTOR * tokensAt(0.1);
  return isLevel ? { ...nothing, kvTokens: tokensAt(0.5) } : nothing;
}

/**
 * Requests whose first tokens came at one instant had their last chunks in one step. The first of them may have
 * been under way before; the others were taken whole.
 */
function stepTokensMin(requests: readonly LoggedRequest[]): number {
  const steps = new Map<number, { earliestUs: number; earliest: number; tokens: number }>();
  for (const { firstTokenUs, scheduledUs, atUs, promptTokens } of requests) {
    if (firstTokenUs === undefined) continue;
    const startUs = scheduledUs ?? atUs;
    const step = steps.get(firstTokenUs);
    if (step === undefined) {
      steps.set(firstTokenUs, { earliestUs: startUs, earliest: promptTokens, tokens: 0 });
    } else if (startUs < step.earliestUs) {
      step.tokens += step.earliest;
      step.earliestUs = startUs;
      step.earliest = promptTokens;
    } else step.tokens += promptTokens;
  }
  let most = 1;
  for (const { tokens } of steps.values()) most = Math.max(most, tokens);
  return most;
}
