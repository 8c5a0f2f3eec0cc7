/**
 * Engine steps that a log shows by themselves: a request that was scheduled alone, with a prompt that one step takes
 * whole, was in exactly one step, from its scheduling to its first token. What else ran in that step, the decodes and
 * their context, follows from the other requests.
 *
 * This holds for engines that stamp a request as scheduled when its step starts. Those that schedule a step ahead
 * stamp it earlier, so the caller checks these steps against its law before it believes them. Pure.
 */
import { rawStepUs, type StepLaw } from "./laws.ts";
import type { LoggedRequest } from "./request-log.ts";

/** One step with one whole prompt in it. */
export type ObservedStep = {
  us: number;
  decodes: number;
  /** Tokens in KV over the decodes. */
  context: number;
  promptTokens: number;
  /** The first prompt of this length in the log. */
  isNew: boolean;
};

/** Stamps of one step boundary lie so close together. */
const SLACK_US = 50;

/** O(requests²): the caller bounds them. `promptMax`: what one step takes whole, decodes not counted. */
export function observedSteps(
  requests: readonly LoggedRequest[],
  promptMax: number,
): ObservedStep[] {
  const timed = requests.filter((each) => each.scheduledUs !== undefined).map(stampsOf);
  timed.sort((a, b) => a.fromUs - b.fromUs);
  const lengths = new Set<number>();
  const steps: ObservedStep[] = [];
  for (const one of timed) {
    const isNew = !lengths.has(one.promptTokens);
    lengths.add(one.promptTokens);
    const { fromUs, firstUs } = one;
    let decodes = 0;
    let context = 0;
    let isAlone = true;
    for (const other of timed) {
      if (other === one) continue;
      if (other.fromUs < firstUs - SLACK_US && other.firstUs > fromUs + SLACK_US) {
        isAlone = false;
        break;
      }
      if (other.firstUs > fromUs + SLACK_US || other.lastUs <= fromUs + SLACK_US) continue;
      decodes++;
      const share = (fromUs - other.firstUs) / Math.max(1, other.lastUs - other.firstUs);
      context += other.promptTokens + other.outputTokens * Math.max(0, share);
    }
    const fits = one.promptTokens + decodes <= promptMax && one.promptTokens > 1;
    const us = firstUs - fromUs;
    if (isAlone && fits && us > 0) {
      steps.push({ us, decodes, context, promptTokens: one.promptTokens, isNew });
    }
  }
  return steps;
}

/** ln(law ÷ log) of a step. */
export function stepDeviation(law: StepLaw, step: ObservedStep): number {
  const { us, decodes, context, promptTokens, isNew } = step;
  const pairs = (promptTokens * promptTokens) / 2;
  const firstUse = isNew ? (law.U ?? 0) : 0;
  const modelled = rawStepUs(law, decodes, context, promptTokens, 1, pairs) + firstUse;
  return Math.log(Math.max(1, modelled) / us);
}

type Stamps = {
  fromUs: number;
  firstUs: number;
  lastUs: number;
  promptTokens: number;
  outputTokens: number;
};

function stampsOf(request: LoggedRequest): Stamps {
  const { scheduledUs = 0, firstTokenUs = 0, lastTokenUs = 0 } = request;
  const { promptTokens, outputTokens } = request;
  return {
    fromUs: scheduledUs,
    firstUs: firstTokenUs,
    lastUs: lastTokenUs,
    promptTokens,
    outputTokens,
  };
}
