/**
 * What an embedder would say of a load's questions, where the load tells how they relate and not what they say.
 *
 * A load names the original question of each request (`cluster`) and the class of its similarity to it; a cosine is
 * drawn within the bounds of the class by the question's own name and the seed, so that one question always has one
 * vector: the original's, turned away from it by that cosine in a direction of its own. So two wordings of one cluster
 * are about as similar as the product of theirs, and two clusters hardly at all. The cache's own shards do the rest.
 *
 * Only sums, products and square roots: vectors are equal, bit for bit, on every machine.
 */

import type { EmbedderCommand } from "../actors/edges.ts";
import type { Actor } from "../runtime/actor.ts";
import { Random } from "../runtime/random.ts";
import type { EdgeHost } from "./edge-models.ts";
import type { Similarity, TraceRequest } from "./trace-rows.ts";

/** Bounds of the cosine to the original, by class; drawn evenly between them. */
export const similarityBounds: Readonly<Record<Similarity, readonly [number, number]>> = {
  exact: [1, 1],
  close: [0.95, 1],
  loose: [0.9, 0.95],
  lookalike: [0.8, 0.96],
};

/** Enough that clusters do not meet by chance: the cosine of two is 0 ± 0.09. */
const DIMENSION = 128;
/**
 * Embedding a short question, µs: what the transformer model of the article takes on one core with up to 25 tokens, with
 * the hop to the shard.
 */
const EMBED_US = 12_000;

/** Of norm 1; undefined where the load does not say what is asked. */
export function vectorOf(
  { cluster, question, similarity }: TraceRequest,
  seed: number | string,
): Float32Array | undefined {
  if (cluster === undefined || question === undefined) return undefined;
  const original = directionOf(`${seed} cluster ${cluster}`);
  const [least, most] = similarityBounds[similarity ?? "exact"];
  if (least === 1) return original;
  const cosine = least + (most - least) * new Random(`${seed} ${question}`).next();
  const own = directionOf(`${seed} wording ${question}`);
  const along = dot(own, original);
  const across = normalised(own.map((value, at) => value - along * (original[at] ?? 0)));
  const sine = Math.sqrt(1 - cosine * cosine);
  return original.map((value, at) => cosine * value + sine * (across[at] ?? 0));
}

/** Which answer is right: a lookalike's is its own, all others have their original's. Undefined where nobody says. */
export function rightAnswerOf({ cluster, question, similarity }: TraceRequest): string | undefined {
  if (cluster === undefined || question === undefined) return undefined;
  return similarity === "lookalike" ? question : cluster;
}

/** A question's name as a word, for guards that read words: without digits, signs or capitals. */
export function wordOf(question: string): string {
  return [...question].map((letter) => LETTERS[letter.charCodeAt(0) % LETTERS.length]).join("");
}

const LETTERS = "abcdefghijklmnopqrstuvwxyz";

/** Stands for an embedder: each request's own vector, after the time that one takes. */
export class EmbedderModel implements Actor<EmbedderCommand> {
  readonly #host: EdgeHost;
  readonly #vectorOf: (requestId: string) => Float32Array | undefined;

  constructor(host: EdgeHost, vectorOf: (requestId: string) => Float32Array | undefined) {
    this.#host = host;
    this.#vectorOf = vectorOf;
  }

  receive(command: EmbedderCommand): void {
    if (command.kind === "embedder.describe") return; // Nobody asks in a simulation.
    const { requestId, replyTo } = command;
    this.#host.clock.schedule(EMBED_US, () => {
      const vector = this.#vectorOf(requestId);
      this.#host.reply(
        replyTo,
        vector === undefined
          ? { kind: "unavailable", reason: "unknown_words" }
          : { kind: "vector", vector },
      );
    });
  }
}

function directionOf(name: string): Float32Array {
  const random = new Random(name);
  return normalised(Float32Array.from({ length: DIMENSION }, () => 2 * random.next() - 1));
}

function normalised(vector: Float32Array): Float32Array {
  const norm = Math.sqrt(dot(vector, vector));
  return vector.map((value) => value / norm);
}

function dot(left: Float32Array, right: Float32Array): number {
  return left.reduce((sum, value, at) => sum + value * (right[at] ?? 0), 0);
}
