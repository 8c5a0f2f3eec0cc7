/**
 * Answers by key, bounded in bytes: what one cache shard keeps in memory. Pure.
 *
 * Full, it drops the answer used least recently; every answer also has an instant after which it is never
 * served, however often it is used. Looking up, putting and deleting are O(1), purging a tenant is O(its
 * answers). What has expired leaves when it is looked up, or when a sweep of a few entries comes by: no call
 * but a purge or a smaller bound ever walks over everything.
 *
 * Tenants are compared on lookup although the key already holds the tenant: should two ever share a key, they
 * still never see each other's answers.
 */
import { assert } from "../runtime/actor.ts";
import { InflightMap } from "../runtime/inflight-map.ts";
import { LruList, type LruNode } from "./lru-list.ts";
import type { StoredAnswer } from "./protocol.ts";

/**
 * What an entry costs beside its body and key: the entry, the answer object, a Uint8Array with its buffer, and
 * the slots in two hash tables. Measured on Node 20, 200,000 entries: 470 bytes of heap, 630 of the process.
 */
export const ENTRY_OVERHEAD_BYTES = 640;
/** Of the whole memory, the most that one answer may take: 1/8, so that one never drives out all others. */
const ANSWER_SHARE = 8;
/** Expired entries are looked for among this many at every put: twice what comes in, so a sweep ends. */
const SWEPT_PER_PUT = 2;

/** One kept answer; `Ms` instants are monotonic. */
export interface Entry extends LruNode<Entry> {
  readonly key: string;
  readonly tenant: string;
  readonly answer: StoredAnswer;
  /** With key and overhead. */
  readonly bytes: number;
  readonly storedAtMs: number;
  /** From then on it is not served. */
  readonly expiresAtMs: number;
}

export class EntryStore {
  readonly #entries = new InflightMap<string, Entry>();
  readonly #byTenant = new Map<string, InflightMap<string, Entry>>();
  readonly #order = new LruList<Entry>();
  /** Goes round `#entries`, whose deletions and insertions it survives. */
  #sweeper = this.#entries[Symbol.iterator]();
  #bytes = 0;
  #bytesMax: number;
  readonly #answerBytesMax: number;
  #evictions = 0;
  #expired = 0;
  #tooLarge = 0;

  /** Both > 0, in bytes; an answer larger than `answerBytesMax` or than an eighth of `bytesMax` is not kept. */
  constructor(bytesMax: number, answerBytesMax: number) {
    assert(bytesMax > 0, "bytesMax must be positive");
    assert(answerBytesMax > 0, "answerBytesMax must be positive");
    this.#bytesMax = bytesMax;
    this.#answerBytesMax = answerBytesMax;
  }

  get size(): number {
    return this.#entries.size;
  }

  /** Bodies, keys and overhead; never above `bytesMax`. */
  get bytes(): number {
    return this.#bytes;
  }

  get bytesMax(): number {
    return this.#bytesMax;
  }

  /** Entries dropped for want of room, since the start. */
  get evictions(): number {
    return this.#evictions;
  }

  /** Entries dropped because their time was over, since the start. */
  get expired(): number {
    return this.#expired;
  }

  /** Answers refused for their size, since the start. */
  get tooLarge(): number {
    return this.#tooLarge;
  }

  /** The answer, now the most recently used; absent when unknown, expired, or another tenant's. */
  lookup(key: string, tenant: string, nowMs: number): Entry | undefined {
    const entry = this.#entries.get(key);
    if (entry === undefined || entry.tenant !== tenant) return undefined;
    if (nowMs >= entry.expiresAtMs) {
      this.#expired++;
      this.#remove(entry);
      return undefined;
    }
    this.#order.touch(entry);
    return entry;
  }

  /**
   * Keeps an answer in place of any older one of this key; false when it is too large to keep, and then the
   * older one is gone all the same. `storedAtMs` ≤ `nowMs` < `expiresAtMs`.
   */
  put(
    key: string,
    tenant: string,
    answer: StoredAnswer,
    storedAtMs: number,
    expiresAtMs: number,
    nowMs: number,
  ): boolean {
    this.delete(key);
    this.sweep(nowMs, SWEPT_PER_PUT);
    const answerBytes = Math.max(answer.bytes, answer.body.byteLength);
    const bytes = answerBytes + key.length + ENTRY_OVERHEAD_BYTES;
    if (answerBytes > this.#answerBytesMax || bytes > this.#bytesMax / ANSWER_SHARE) {
      this.#tooLarge++;
      return false;
    }
    this.#evictDownTo(this.#bytesMax - bytes);
    const entry: Entry = {
      key,
      tenant,
      answer,
      bytes,
      storedAtMs,
      expiresAtMs,
      hotter: null,
      colder: null,
    };
    this.#entries.set(key, entry);
    this.#order.addHottest(entry);
    this.#bytes += bytes;
    let ofTenant = this.#byTenant.get(tenant);
    if (ofTenant === undefined) {
      ofTenant = new InflightMap();
      this.#byTenant.set(tenant, ofTenant);
    }
    ofTenant.set(key, entry);
    return true;
  }

  /** False when there was none. */
  delete(key: string): boolean {
    const entry = this.#entries.get(key);
    if (entry === undefined) return false;
    this.#remove(entry);
    return true;
  }

  /** Drops all answers of a tenant, or all; returns how many. */
  purge(tenant?: string): number {
    if (tenant === undefined) {
      const removed = this.#entries.size;
      this.#entries.clear();
      this.#byTenant.clear();
      this.#order.clear();
      this.#bytes = 0;
      return removed;
    }
    const ofTenant = this.#byTenant.get(tenant);
    if (ofTenant === undefined) return 0;
    const removed = ofTenant.size;
    for (const [, entry] of ofTenant) this.#remove(entry);
    return removed;
  }

  /** Looks at the next `entriesMax` entries, going round and round, and drops those whose time is over. */
  sweep(nowMs: number, entriesMax: number): void {
    for (let looked = 0; looked < entriesMax; looked++) {
      const step = this.#sweeper.next();
      if (step.done) {
        this.#sweeper = this.#entries[Symbol.iterator]();
        return;
      }
      const [, entry] = step.value;
      if (nowMs < entry.expiresAtMs) continue;
      this.#expired++;
      this.#remove(entry);
    }
  }

  /** A new bound, > 0; a smaller one drops what no longer fits at once. */
  resize(bytesMax: number): void {
    assert(bytesMax > 0, "bytesMax must be positive");
    this.#bytesMax = bytesMax;
    this.#evictDownTo(bytesMax);
  }

  #evictDownTo(bytes: number): void {
    while (this.#bytes > bytes) {
      const coldest = this.#order.coldest;
      assert(coldest !== null, "bytes are counted only for entries in the list");
      this.#evictions++;
      this.#remove(coldest);
    }
  }

  #remove(entry: Entry): void {
    this.#entries.delete(entry.key);
    this.#order.remove(entry);
    this.#bytes -= entry.bytes;
    const ofTenant = this.#byTenant.get(entry.tenant);
    if (ofTenant === undefined) return;
    ofTenant.delete(entry.key);
    if (ofTenant.size === 0) this.#byTenant.delete(entry.tenant);
  }
}
