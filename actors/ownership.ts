/**
 * Who owns what: every cache key, limit key and inference node falls into one of 4096 buckets, and each bucket
 * belongs to one peer. Pure, and the same on every peer that has the same view: nobody is asked.
 *
 *   score(bucket, peer) = h(h(bucket + 0x9e3779b9) xor h(FNV-1a(peer))), h = murmur3's 32-bit finalizer
 *
 * The peer with the highest score has the bucket (rendezvous hashing), so a peer that goes gives only its own
 * buckets away, to all others about equally, and one that comes takes only what it will keep. The table is built
 * once per epoch (0.7 ms for 8 peers); a read is one array access. The number of buckets is fixed for a cluster:
 * peers that count otherwise must not meet (the handshake compares it).
 *
 * For 30 s after a bucket has moved, who had it before is still known: a new owner asks there on a miss, and a
 * limit key starts with less than its whole allowance. A ring was refused (1.21 against 1.03 times the mean load
 * on the fullest peer), and so was mod N (88 % of the buckets move when a peer joins).
 */
import { assert } from "../runtime/actor.ts";
import { hashOf, rendezvousHash } from "./node-score.ts";

/** Fixed for a cluster: changing it is a new protocol version. */
export const BUCKETS = 4096;

/** How long after a move the bucket's earlier owner is remembered. */
export const PREVIOUS_OWNER_MS = 30_000;

const GOLDEN = 0x9e3779b9;
/** Beyond what a full mesh carries; indices fit 16 bits. */
const OWNERS_MAX = 1024;

/** The bucket of any name: a limit key, an inference node. Names of one bucket have one owner. */
export function bucketOf(name: string): number {
  return rendezvousHash(hashOf(name), 0) % BUCKETS;
}

/** The bucket of a cache key, which is a hash in hex already: its first 12 bits. */
export function bucketOfCacheKey(key: string): number {
  const bucket = Number.parseInt(key.slice(0, 3), 16);
  return bucket >= 0 ? bucket : bucketOf(key); // No hex: a key of a test, or of another program.
}

/** The owners of all buckets at one epoch. Immutable. */
export class OwnerTable {
  readonly epoch: number;
  /** Sorted, each once. Empty: nothing has an owner. */
  readonly owners: readonly string[];
  readonly #indices = new Uint16Array(BUCKETS);

  /** @param owners ids of the peers that own, in any order; at most 1024. */
  constructor(epoch: number, owners: readonly string[]) {
    assert(owners.length <= OWNERS_MAX, `a table has at most ${OWNERS_MAX} owners`);
    this.epoch = epoch;
    this.owners = [...new Set(owners)].sort();
    const hashes = this.owners.map((owner) => rendezvousHash(hashOf(owner), 0));
    for (let bucket = 0; bucket < BUCKETS; bucket++) {
      const key = rendezvousHash(bucket + GOLDEN, 0);
      let best = 0;
      let bestScore = -1;
      for (let index = 0; index < hashes.length; index++) {
        const score = rendezvousHash(key, hashes[index] ?? 0);
        if (score <= bestScore) continue; // Of equals the first, which is the same on every peer.
        bestScore = score;
        best = index;
      }
      this.#indices[bucket] = best;
    }
  }

  /** Undefined only when there is no owner at all. */
  owner(bucket: number): string | undefined {
    return this.owners[this.#indices[bucket] ?? 0];
  }

  /** How many buckets each owner has, by the order of `owners`. */
  counts(): number[] {
    const counts = this.owners.map(() => 0);
    if (counts.length === 0) return counts;
    for (const index of this.#indices) counts[index] = (counts[index] ?? 0) + 1;
    return counts;
  }
}

/** One bucket that changed hands. `from` is undefined where nobody had it. */
export type Move = { bucket: number; from: string | undefined; to: string | undefined };

/** What is different in `after`, by bucket. */
export function movesBetween(before: OwnerTable, after: OwnerTable): Move[] {
  const moves: Move[] = [];
  for (let bucket = 0; bucket < BUCKETS; bucket++) {
    const from = before.owner(bucket);
    const to = after.owner(bucket);
    if (from !== to) moves.push({ bucket, from, to });
  }
  return moves;
}

/** The table of one peer as its view changes, and who had what until lately. */
export class Ownership {
  #table = new OwnerTable(0, []);
  readonly #previous: (string | undefined)[] = new Array(BUCKETS).fill(undefined);
  /** Per bucket; -Infinity = never moved. */
  readonly #movedAtMs = new Float64Array(BUCKETS).fill(Number.NEGATIVE_INFINITY);

  get table(): OwnerTable {
    return this.#table;
  }

  get epoch(): number {
    return this.#table.epoch;
  }

  /**
   * Takes over a view and returns what moved. A lower epoch than the present one is stale and changes nothing;
   * the same epoch with other owners happens while two changes meet, and is taken.
   */
  adopt(epoch: number, owners: readonly string[], nowMs: number): Move[] {
    if (epoch < this.#table.epoch) return [];
    const before = this.#table;
    this.#table = new OwnerTable(epoch, owners);
    const moves = movesBetween(before, this.#table);
    for (const { bucket, from } of moves) {
      if (from === undefined) continue; // The first owner follows nobody.
      this.#previous[bucket] = from;
      this.#movedAtMs[bucket] = nowMs;
    }
    return moves;
  }

  owner(bucket: number): string | undefined {
    return this.#table.owner(bucket);
  }

  /** Who had the bucket before its last move, if that was less than 30 s ago. */
  previousOwner(bucket: number, nowMs: number): string | undefined {
    const movedAtMs = this.#movedAtMs[bucket] ?? Number.NEGATIVE_INFINITY;
    return nowMs - movedAtMs < PREVIOUS_OWNER_MS ? this.#previous[bucket] : undefined;
  }
}
