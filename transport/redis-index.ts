/**
 * Indexes over the stored questions that live in Redis itself, for those who want one shared index instead of the
 * cache actors' own. Both only say which entries are near: what is served is decided on the stored vectors.
 *
 * redis-vectorset  Redis 8. One vector set per scope, its elements the entries' members: the scope is the key, so a
 *                  search never meets another scope and needs no filter (which a graph search honours with a bounded
 *                  effort only: in one set for all, small scopes would lose their neighbours among the others).
 *                  Elements have no time to live: they leave with their entry when that is next touched, and the set
 *                  as a whole when its last entry has expired. int8 quantised, as is the default.
 * redis-search     RediSearch. One index over the hashes themselves per dimension, `<prefix>idx:llm_cache:<dimension>`,
 *                  with the scope as a tag. Expired entries leave by themselves. Not in a cluster.
 */
import type { Commands, Words } from "./redis-link.ts";
import { type KeyNames, type Member, partsOf, vectorBytes } from "./redis-values.ts";

export type IndexName = "redis-vectorset" | "redis-search";

/** `similarity`: about; within `SIMILARITY_SLACK` of the true cosine. */
export type Near = { member: Member; similarity: number };

export interface QuestionIndex {
  readonly name: IndexName;
  /** The command that shows whether a server has it. */
  readonly command: string;
  /** What a server needs for it, in words. */
  readonly needs: string;
  /** Sent behind the write of an entry; all keys are in its bucket. */
  add(member: Member, vector: Float32Array, lifeMs: number): Words[];
  /** Sent when an entry has been removed, or is found to be gone. */
  remove(member: Member): Words[];
  /** Best first, at most `count`. Rejects when it is not there. */
  search(redis: Commands, scope: string, vector: Float32Array, count: number): Promise<Near[]>;
  /** Redis is another one, perhaps: what it held is not known any more. */
  reset(): void;
}

/** int8 moves the cosine of two unit vectors by some thousandths, in the worst case (all weight on one dimension). */
export const SIMILARITY_SLACK = 0.02;

export function questionIndex(name: IndexName, names: KeyNames, keyPrefix: string): QuestionIndex {
  return name === "redis-vectorset" ? new VectorSets(names) : new SearchIndex(names, keyPrefix);
}

class VectorSets implements QuestionIndex {
  readonly name = "redis-vectorset";
  readonly command = "VADD";
  readonly needs = "vector sets, which came with Redis 8";
  readonly #names: KeyNames;

  constructor(names: KeyNames) {
    this.#names = names;
  }

  add(member: Member, vector: Float32Array, lifeMs: number): Words[] {
    const key = this.#keyOf(member);
    if (key === undefined) return [];
    return [
      // Without CAS, which would seek neighbours in a thread of Redis: Redis 8.0.2 ends with an assertion when it loads
      // such a command from its append-only file, and does not come back.
      ["VADD", key, "FP32", vectorBytes(vector), member],
      // As long as the longest life in it; GT alone leaves a new key without one.
      ["PEXPIRE", key, lifeMs, "NX"],
      ["PEXPIRE", key, lifeMs, "GT"],
    ];
  }

  remove(member: Member): Words[] {
    const key = this.#keyOf(member);
    return key === undefined ? [] : [["VREM", key, member]];
  }

  async search(
    redis: Commands,
    scope: string,
    vector: Float32Array,
    count: number,
  ): Promise<Near[]> {
    const key = this.#names.vectors(scope);
    const words = ["VSIM", key, "FP32", vectorBytes(vector), "WITHSCORES", "COUNT", count] as const;
    // The score is (1 + cosine) / 2.
    return pairsOf(await redis.call(words)).map(([member, score]) => ({
      member,
      similarity: 2 * Number(score) - 1,
    }));
  }

  reset(): void {}

  #keyOf(member: Member): string | undefined {
    const parts = partsOf(member);
    return parts === undefined ? undefined : this.#names.vectors(parts.scope);
  }
}

class SearchIndex implements QuestionIndex {
  readonly name = "redis-search";
  readonly command = "FT.SEARCH";
  readonly needs =
    "RediSearch (FT.SEARCH), which Redis Stack and Redis 8 builds with the query engine have";
  readonly #names: KeyNames;
  readonly #keyPrefix: string;
  /** Dimensions whose index has been made, or was there. */
  readonly #made = new Set<number>();

  constructor(names: KeyNames, keyPrefix: string) {
    this.#names = names;
    this.#keyPrefix = keyPrefix;
  }

  add(_: Member, vector: Float32Array): Words[] {
    if (this.#made.has(vector.length)) return []; // It takes in new hashes by itself.
    this.#made.add(vector.length);
    return [this.#create(vector.length)];
  }

  remove(): Words[] {
    return []; // Gone with its hash.
  }

  async search(
    redis: Commands,
    scope: string,
    vector: Float32Array,
    count: number,
  ): Promise<Near[]> {
    const dimension = vector.length;
    const index = this.#indexOf(dimension);
    if (!this.#made.has(dimension)) {
      await redis.call(this.#create(dimension)).catch((error: unknown) => {
        if (!isAlreadyThere(error)) throw error;
      });
      this.#made.add(dimension);
    }
    const query = `(@scope:{${scope}})=>[KNN ${count} @vector $question AS distance]`;
    const words: Words = [
      "FT.SEARCH",
      index,
      query,
      ...["PARAMS", 2, "question", vectorBytes(vector)],
      ...["SORTBY", "distance", "ASC", "RETURN", 1, "distance", "LIMIT", 0, count, "DIALECT", 2],
    ];
    const reply = await redis.call(words).catch((error: unknown) => {
      this.#made.delete(dimension); // Flushed, perhaps: made again by the next.
      throw error;
    });
    // The number of all, then name and fields of each.
    return pairsOf(Array.isArray(reply) ? reply.slice(1) : []).flatMap(([name, fields]) => {
      const member = this.#names.memberOf(name);
      const distance = Array.isArray(fields) ? Number(fields[1]) : Number.NaN;
      return member === undefined ? [] : [{ member, similarity: 1 - distance }];
    });
  }

  reset(): void {
    this.#made.clear();
  }

  #indexOf(dimension: number): string {
    return `${this.#keyPrefix}idx:llm_cache:${dimension}`;
  }

  #create(dimension: number): Words {
    return [
      "FT.CREATE",
      this.#indexOf(dimension),
      ...["ON", "HASH", "PREFIX", 1, this.#names.questionPrefix],
      ...["SCHEMA", "scope", "TAG", "vector", "VECTOR", "HNSW", 6],
      ...["TYPE", "FLOAT32", "DIM", dimension, "DISTANCE_METRIC", "COSINE"],
    ];
  }
}

/** Whether Redis refused to make an index for no other reason than that it is there. */
export function isAlreadyThere(error: unknown): boolean {
  return error instanceof Error && /already exists/i.test(error.message);
}

function pairsOf(reply: unknown): [string, unknown][] {
  if (!Array.isArray(reply)) return [];
  const pairs: [string, unknown][] = [];
  for (let at = 0; at + 1 < reply.length; at += 2) pairs.push([String(reply[at]), reply[at + 1]]);
  return pairs;
}
