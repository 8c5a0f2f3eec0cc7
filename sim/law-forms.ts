/**
 * The forms of step law that a log alone is fitted with, as coefficients with priors.
 *
 *   fused       one pass over decodes and chunks, bound by reading the weights or by multiplying (vLLM and its kin)
 *               T = max(W + d·n, F + C·n) + actx·ctx + [c>0](p0 + pq·pairs)
 *   two passes  the decodes' own and the chunks' own (small engines)
 *               T = [B>0](a0 + d·B + actx·ctx) + [c>0](p0 + C·c + pq·pairs)
 *
 * Both may have U, the cost of the first chunk of each shape. Most coefficients are searched as ratios to a step of one
 * decode or to the cost of a prompt token: ratios differ little from a desktop card to a server, so that one prior
 * holds for all, and a coefficient that a log cannot show stays near a plausible value. All are searched as
 * logarithms. Pure.
 */
import { KV_BLOCK_TOKENS, type StepLaw } from "./laws.ts";

/** One coefficient: logarithm of its prior, and how far off that may be, in e-folds. */
export type Coefficient = { readonly key: string; readonly prior: number; readonly spread: number };

/** Value of a coefficient; 0 for one that is not searched. */
export type Values = (key: string) => number;

export type Form = {
  readonly method: "fused" | "two passes";
  readonly coefficients: readonly Coefficient[];
  law(value: Values): StepLaw;
};

/** Cost of the first chunk of each shape. */
export const FIRST_USE = "U ÷ base";
/** The engine's standstill at the start of the log, µs; no part of the law. */
export const PAUSE = "pause";

/** Orders of magnitude, µs: of a step of decodes, and of a prompt token. */
export type Scale = { readonly stepUs: number; readonly tokenUs: number };

/** `frame`: everything that is not searched. `kvTokens`: search the KV memory, from there. */
export function fusedForm(frame: StepLaw, scale: Scale, kvTokens?: number): Form {
  return {
    method: "fused",
    coefficients: [
      ...commonCoefficients(frame, scale, kvTokens),
      coefficient("F ÷ base", 0.3, 0.6),
      coefficient("p0 ÷ base", 0.07, 1),
    ],
    law: (value) => ({
      ...commonLaw(frame, value),
      W: value("base"),
      d: value("base") * value("d ÷ base"),
      F: value("base") * value("F ÷ base"),
      p0: value("base") * value("p0 ÷ base"),
    }),
  };
}

/** Parameters as `fusedForm`. */
export function twoPassForm(frame: StepLaw, scale: Scale, kvTokens?: number): Form {
  return {
    method: "two passes",
    coefficients: [...commonCoefficients(frame, scale, kvTokens), coefficient("p0 ÷ base", 1, 1)],
    law: (value) => ({
      ...commonLaw(frame, value),
      a0: value("base"),
      // C·n counts the decodes, too; aB takes them back and puts in their own price.
      d: value("C"),
      aB: value("base") * value("d ÷ base") - value("C"),
      p0: value("base") * value("p0 ÷ base"),
    }),
  };
}

export function withoutCoefficient(form: Form, key: string): Form {
  return { ...form, coefficients: form.coefficients.filter((each) => each.key !== key) };
}

function coefficient(key: string, prior: number, spread: number): Coefficient {
  return { key, prior: Math.log(prior), spread };
}

function commonCoefficients(frame: StepLaw, scale: Scale, kvTokens?: number): Coefficient[] {
  const isKvSearched = kvTokens !== undefined && frame.kvBlocksFrom === "log";
  return [
    ...(isKvSearched ? [coefficient("kvBlocks", kvTokens / KV_BLOCK_TOKENS, 0.3)] : []),
    coefficient(PAUSE, scale.stepUs, 2),
    coefficient("base", scale.stepUs, 1),
    coefficient("d ÷ base", 1 / 600, 0.5),
    coefficient("actx ÷ base", 6e-6, 0.35),
    coefficient("C", scale.tokenUs, 1),
    coefficient("pq ÷ C", 8e-5, 0.8),
    coefficient(FIRST_USE, 0.5, 2),
  ];
}

function commonLaw(frame: StepLaw, value: Values): StepLaw {
  const U = value("base") * value(FIRST_USE);
  const kvBlocks = Math.round(value("kvBlocks"));
  return {
    ...frame,
    ...(kvBlocks > 0 && { kvBlocks }),
    actx: value("base") * value("actx ÷ base"),
    C: value("C"),
    pq: value("C") * value("pq ÷ C"),
    ...(U > 0 && { U }),
  };
}
