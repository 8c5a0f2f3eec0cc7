/**
 * Where the cache actors are: in this process, or spread over the peers of a cluster. One object per process, in
 * which the request actor writes each view of the members, and all others read.
 *
 * A key, scope or entry id (hex) falls into one of 4096 buckets by its first 12 bits. The bucket's owner is the peer
 * that has it, and there `bucket % shards` is its shard; alone, this process owns all. Every peer has the same number
 * of shards (`settings` of the handshake compares it).
 *
 * While two peers have different views, a key may be looked up at two owners, so two runs of one question can happen;
 * nothing else does, since a flight stays where it began until it has ended (request.ts keeps its shard).
 */
import type { ActorRef } from "../runtime/actor.ts";
import type { CacheMessage } from "./cache.ts";
import type { ClusterView, PeerId } from "./membership.ts";
import { bucketOfCacheKey, Ownership } from "./ownership.ts";

type Shard = ActorRef<CacheMessage>;

export class CachePlacement {
  /** This process. */
  readonly self: PeerId;
  /** Whether peers share the cache. */
  readonly isShared: boolean;
  readonly #makeRef: (path: string) => Shard;
  readonly #count: number;
  readonly #own: readonly Shard[];
  /** Of every owner, and of this process. */
  readonly #shards = new Map<PeerId, readonly Shard[]>();
  readonly #ownership = new Ownership();
  #suspects: ReadonlySet<PeerId> = new Set();

  /** @param count shards of each peer, 1…4096 */
  constructor(
    self: PeerId,
    count: number,
    isShared: boolean,
    makeRef: (path: string) => ActorRef<CacheMessage>,
  ) {
    this.self = self;
    this.isShared = isShared;
    this.#makeRef = makeRef;
    this.#count = count;
    this.#own = this.#shardsOf(self);
    this.#shards.set(self, this.#own);
  }

  #shardsOf(peer: PeerId): Shard[] {
    return Array.from({ length: this.#count }, (_, shard) =>
      this.#makeRef(`${peer}/cache/${shard}`),
    );
  }

  /** Those of this process. */
  get own(): readonly Shard[] {
    return this.#own;
  }

  /** Those of all peers that own any, and of this process. */
  get all(): readonly Shard[] {
    return [...this.#shards.values()].flat();
  }

  /** The shard that has a key, a scope or an entry. */
  at(key: string): Shard {
    const bucket = bucketOfCacheKey(key);
    return this.#in(this.#ownership.owner(bucket), bucket);
  }

  /** Like `at`, then the one that had it until lately: a flight may still be there. */
  holders(key: string, nowMs: number): Shard[] {
    const bucket = bucketOfCacheKey(key);
    const present = this.#in(this.#ownership.owner(bucket), bucket);
    const previous = this.#ownership.previousOwner(bucket, nowMs);
    return previous === undefined ? [present] : [present, this.#in(previous, bucket)];
  }

  /** False while its owner is believed out of reach: waiting for it is of no use. */
  isWithinReach(key: string): boolean {
    if (this.#suspects.size === 0) return true;
    const owner = this.#ownership.owner(bucketOfCacheKey(key));
    return owner === undefined || !this.#suspects.has(owner);
  }

  #in(owner: PeerId | undefined, bucket: number): Shard {
    const shards = owner === undefined ? this.#own : this.#shards.get(owner);
    const index = bucket % this.#count;
    return shards?.[index] ?? this.#makeRef(`${owner ?? this.self}/cache/${index}`);
  }

  /** Takes over a view: the shards that came with it, and those that it has no more. */
  adopt(view: ClusterView, nowMs: number): { came: readonly Shard[]; gone: readonly Shard[] } {
    const came: Shard[] = [];
    const gone: Shard[] = [];
    if (!this.isShared || view.epoch < this.#ownership.epoch) return { came, gone };
    this.#ownership.adopt(view.epoch, view.owners, nowMs);
    this.#suspects = new Set(view.suspects);
    for (const [peer, shards] of this.#shards) {
      if (peer === this.self || view.owners.includes(peer)) continue;
      this.#shards.delete(peer);
      gone.push(...shards);
    }
    for (const peer of view.owners) {
      if (this.#shards.has(peer)) continue;
      const shards = this.#shardsOf(peer);
      this.#shards.set(peer, shards);
      came.push(...shards);
    }
    return { came, gone };
  }
}

/** The peer that an actor lives in: the first part of its path. */
export function peerOf(path: string): PeerId {
  return path.slice(0, path.indexOf("/"));
}
