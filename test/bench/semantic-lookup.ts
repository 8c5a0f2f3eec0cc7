/**
 * A whole lookup by meaning, text to answer, in this process: embed, search a shard of 10,000 questions, guards. Hits are
 * stored questions in another case, misses are questions of other words. And what keeping a question costs.
 *
 * With the built-in embedder, and with the tiny model of the tests where the transformer library is installed: its
 * weights are random, so its times mean something and its similarities do not.
 */
import { fileURLToPath } from "node:url";
import type { SemanticPolicy, StoredAnswer } from "../../actors/protocol.ts";
import { SemanticShard } from "../../actors/semantic-shard.ts";
import { Random } from "../../runtime/random.ts";
import { openBackend } from "../../transport/embedder.ts";
import { type EmbedderBackend, EmbedderError } from "../../transport/embedder-backend.ts";
import { defaults } from "../../transport/options.ts";
import { MODEL, wholeAnswer } from "./fixed-answers.ts";
import type { Row } from "./report.ts";

const STORED = 10_000;
const LOOKUPS = 2000;
const BATCH_TEXTS = 8;
/** Lookups between two slices of work on the index, as the cache actor does it in quiet moments. */
const MAINTAIN_EVERY = 20;

const policy: SemanticPolicy = {
  mode: "fixed",
  similarityMin: 0.92,
  errorRateMax: 0.01,
  isStrict: false,
};
const scope = { scope: "abc1", tenant: "bench", model: MODEL };

/** Nouns and verbs that a small model has word pieces for, and made-up ones, as questions of 8 to 12 words. */
class Questions {
  readonly #random: Random;
  readonly #words: string[];

  constructor(seed: string) {
    this.#random = new Random(seed);
    const letters = "abcdefghijklmnoprstuvw";
    const letter = (): string => letters[this.#random.int(letters.length)] ?? "a";
    this.#words = Array.from({ length: 3000 }, () =>
      Array.from({ length: 3 + this.#random.int(6) }, letter).join(""),
    );
  }

  next(): string {
    const word = (): string => this.#words[this.#random.int(this.#words.length)] ?? "it";
    const count = 4 + this.#random.int(5);
    return `how do i ${Array.from({ length: count }, word).join(" ")}`;
  }
}

function answer(): StoredAnswer {
  const body = Buffer.from(wholeAnswer);
  const facts = { route: "chat", model: MODEL, promptTokens: 24, outputTokens: 80 } as const;
  return { body, bytes: body.length, ...facts };
}

/** Rows for every embedder that is here. */
export async function benchSemanticLookup(): Promise<Row[]> {
  const tiny = fileURLToPath(new URL("../../../test/fixtures/tiny-random-bert", import.meta.url));
  const { embedder } = defaults.cache.semantic;
  const rows: Row[] = [];
  for (const [name, options] of [
    ["built-in embedder", { ...embedder, type: "lexical" }],
    ["tiny model", { ...embedder, type: "transformers", path: tiny }],
  ] as const) {
    const backend = await openBackend(options);
    if (backend === undefined) continue;
    try {
      await backend.open();
      rows.push(...(await rowsOf(name, backend)));
    } catch (error) {
      if (!(error instanceof EmbedderError)) throw error;
      console.log(`whole lookup with the ${name}: left out: ${error.message}`);
    } finally {
      await backend.close();
    }
  }
  return rows;
}

async function rowsOf(name: string, backend: EmbedderBackend): Promise<Row[]> {
  const { signal } = new AbortController();
  const questions = new Questions("stored");
  const random = new Random("shard");
  const shard = new SemanticShard(
    { ttlMs: 1e9, bytesMax: 1 << 30, answerBytesMax: 1 << 20, precisionMin: 0.5, judge: "words" },
    () => random.next(),
  );
  const texts = Array.from({ length: STORED }, () => questions.next());
  let insertMs = 0;
  let longestMs = 0;
  for (let from = 0; from < texts.length; from += BATCH_TEXTS) {
    const batch = texts.slice(from, from + BATCH_TEXTS);
    const vectors = await backend.embed(batch, signal);
    for (const [index, text] of batch.entries()) {
      const vector = vectors[index];
      if (!(vector instanceof Float32Array)) continue;
      const beganAtMs = performance.now();
      const entryId = `abc1-${from + index}`;
      const times = { ttlMs: 1e9, ageMs: 0 };
      shard.adopt({ ...scope, entryId, text, vector, answer: answer(), ...times }, 0);
      const tookMs = performance.now() - beganAtMs;
      insertMs += tookMs;
      longestMs = Math.max(longestMs, tookMs);
    }
    shard.maintain();
  }
  while (shard.maintain());
  const perSecond = shard.size / (insertMs / 1000);
  const rows: Row[] = [
    {
      name: "insert",
      question: `Questions kept a second, vectors at hand (${name})`,
      figure: `${(perSecond / 1000).toFixed(0)} k/s`,
      value: perSecond,
      detail: `${shard.size} kept, ${(shard.bytes / shard.size).toFixed(0)} bytes each; longest ${longestMs.toFixed(2)} ms`,
    },
  ];
  const others = new Questions("others");
  for (const kind of ["hit", "miss"] as const) {
    const [wholeMs, searchMs]: [number[], number[]] = [[], []];
    let hits = 0;
    for (let at = 0; at < LOOKUPS; at++) {
      const stored = texts[random.int(texts.length)] ?? "";
      const text =
        kind === "hit" ? `${stored.toUpperCase().slice(0, 1)}${stored.slice(1)}?` : others.next();
      const askedAtMs = performance.now();
      const [vector] = await backend.embed([text], signal);
      const embeddedAtMs = performance.now();
      if (vector instanceof Float32Array)
        hits += shard.match({ ...scope, text, vector, policy }, 0).kind === "hit" ? 1 : 0;
      wholeMs.push(performance.now() - askedAtMs);
      searchMs.push(performance.now() - embeddedAtMs);
      if (at % MAINTAIN_EVERY === 0) shard.maintain();
    }
    const [p50, p99] = [0.5, 0.99].map((share) => percentile(wholeMs, share));
    rows.push({
      name: kind,
      question: `Whole lookup, ${kind}, p50 / p99 in ${STORED} questions (${name})`,
      figure: `${p50?.toFixed(2)} / ${p99?.toFixed(2)} ms`,
      value: p99 ?? Number.NaN,
      detail:
        `search and guards ${percentile(searchMs, 0.5).toFixed(3)} / ${percentile(searchMs, 0.99).toFixed(3)} ms; ` +
        `${hits} of ${LOOKUPS} hit`,
    });
  }
  return rows;
}

function percentile(timesMs: readonly number[], share: number): number {
  const sorted = [...timesMs].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? Number.NaN;
}
