/**
 * Requests that wait for a node: who goes next, who may wait at all, and for how long. Pure: time is passed in.
 *
 * Three bands, strictly in order: interactive, standard, batch. Within a band tenants take turns by virtual token
 * counters (VTC): dispatching an entry adds its prompt tokens to its tenant's counter, ending it adds twice its
 * output tokens, both divided by the tenant's weight; the waiting tenant with the least counter goes next. A tenant
 * that comes back is lifted to the least counter among those waiting (or of the last one served, if none waits):
 * idleness earns no credit. So two tenants that keep waiting are never further apart than twice the largest entry.
 * Counters are kept per band; output tokens are charged where the tenant was dispatched last.
 *
 * Within a tenant, entries go in order of arrival at the gateway, so that a retry keeps its place. Under standing
 * delay (CoDel: its oldest entry stayed above 500 ms for a whole interval of 2 s) a tenant's interactive entries go
 * newest first: some answers in time are worth more than all of them late. The oldest one's age is watched, not
 * the served one's, which newest-first would make look well. Batch stays first in, first out: it wants throughput,
 * and nothing is dropped for having waited, but at its own deadline.
 *
 * Bounds: per key, per pool, and per pool in seconds of the rate at which entries have left a waiting queue; the
 * last never goes below one key's share, so that a slow pool can still queue. Each drop is counted by reason.
 */
import { assert } from "../runtime/actor.ts";
import type { Priority } from "./protocol.ts";

export type FairQueueOptions = {
  /** Waiting entries of one key, 0…; default 50. */
  perKeyMax: number;
  /** Waiting entries in all, 0…; default 2000. */
  poolMax: number;
  /** Waiting entries in all, in seconds of the dispatch rate, > 0; default 5. */
  poolSecondsMax: number;
  /** Longest wait of an entry whose own deadline is later, ms; default 30,000. */
  waitMsMax: number;
};

/** What the queue must know of an entry. None of it changes while it waits. */
export type QueueEntry = {
  /** Unique among those waiting. */
  readonly id: string;
  readonly tenant: string;
  /** Whose share of the queue it takes. */
  readonly key: string;
  /** Of the tenant, > 0. */
  readonly weight: number;
  readonly priority: Priority;
  /** Tokens charged at dispatch, ≥ 0; 0 for a retry, whose first attempt was charged. */
  readonly cost: number;
  /** Its rank within the tenant. */
  readonly arrivedAtMs: number;
  readonly deadlineAtMs: number;
};

/** What became of an entry that was offered; the bounds that refuse are those of the options. */
export type Offer = "queued" | "key_full" | "pool_full";

/** The price of an output token; a prompt token costs 1. */
const OUTPUT_PRICE = 2;
const DELAY_INTERVAL_MS = 2000;
const DELAY_TARGET_MS = 500;
/** Tenants remembered per band; beyond it those idle for longest are forgotten, so many at once, with their debts. */
const TENANTS_MAX = 4096;
const TENANTS_FORGOTTEN = 512;

const priorities = ["interactive", "standard", "batch"] as const satisfies Priority[];

type Waiter<E> = {
  readonly entry: E;
  readonly tenant: Tenant<E>;
  readonly queuedAtMs: number;
  readonly expiresAtMs: number;
  previous: Waiter<E> | undefined;
  next: Waiter<E> | undefined;
  isWaiting: boolean;
};

/** One tenant in one band, and its waiting entries by arrival. */
type Tenant<E> = {
  readonly name: string;
  readonly band: Band<E>;
  counter: number;
  weight: number;
  head: Waiter<E> | undefined;
  tail: Waiter<E> | undefined;
  waiting: number;
  /** When it was dispatched last, as a count of all dispatches. */
  dispatch: number;
  /** Standing delay: the least age of the oldest entry in the present interval, and the last one's verdict. */
  intervalEndAtMs: number;
  ageMsMin: number;
  isDelayed: boolean;
};

type Band<E> = {
  readonly priority: Priority;
  /** Least recently touched first. */
  readonly tenants: Map<string, Tenant<E>>;
  /** Those with waiting entries. */
  readonly active: Set<Tenant<E>>;
  /** Served last when its queue ran empty. */
  lastLeft: Tenant<E> | undefined;
  waiting: number;
};

export class FairQueue<E extends QueueEntry> {
  #options: FairQueueOptions;
  readonly #bands: readonly Band<E>[];
  readonly #byId = new Map<string, Waiter<E>>();
  readonly #waitingByKey = new Map<string, number>();
  /** A heap by `expiresAtMs`; those that left otherwise stay in it until they surface or are swept out. */
  #expiries: Waiter<E>[] = [];
  #expired: E[] = [];
  #dispatches = 0;
  readonly #rate = new ServiceRate();
  readonly #dropped = { expired: 0, key_full: 0, pool_full: 0 };

  constructor(options: FairQueueOptions) {
    this.#options = options;
    this.#bands = priorities.map((priority) => ({
      priority,
      tenants: new Map(),
      active: new Set(),
      lastLeft: undefined,
      waiting: 0,
    }));
  }

  configure(options: FairQueueOptions): void {
    this.#options = options;
  }

  get size(): number {
    return this.#byId.size;
  }

  /** Entries that may wait now. */
  get sizeMax(): number {
    const { perKeyMax, poolMax, poolSecondsMax } = this.#options;
    const perMs = this.#rate.perMs;
    if (perMs === undefined) return poolMax;
    return Math.min(poolMax, Math.max(perKeyMax, Math.floor(poolSecondsMax * 1000 * perMs)));
  }

  /** Takes an entry in, or says which bound refuses it. */
  offer(entry: E, nowMs: number): Offer {
    const ofKey = this.#waitingByKey.get(entry.key) ?? 0;
    if (ofKey >= this.#options.perKeyMax) return this.#refuse("key_full");
    if (this.size >= this.sizeMax) return this.#refuse("pool_full");
    const tenant = this.#tenant(entry);
    if (tenant.waiting === 0) this.#lift(tenant);
    this.#insert(entry, tenant, nowMs, nowMs, false);
    return "queued";
  }

  #refuse(reason: "key_full" | "pool_full"): Offer {
    this.#dropped[reason]++;
    return reason;
  }

  /** An entry that need not wait, for the queue is empty: it is charged like one that did. */
  pass(entry: E): void {
    const tenant = this.#tenant(entry);
    if (tenant.waiting === 0) this.#lift(tenant);
    this.#charge(tenant, entry.cost);
    tenant.dispatch = ++this.#dispatches;
    tenant.band.lastLeft = tenant;
  }

  /** Removes and charges the next entry; never one past its time. */
  take(nowMs: number): E | undefined {
    this.#expire(nowMs);
    for (const band of this.#bands) {
      const tenant = leastServed(band.active);
      if (tenant === undefined) continue;
      const { head, tail } = tenant;
      assert(head !== undefined && tail !== undefined, "an active tenant has waiting entries");
      watchDelay(tenant, nowMs - head.queuedAtMs, nowMs);
      const waiter = tenant.isDelayed && band.priority === "interactive" ? tail : head;
      this.#rate.note(nowMs, true);
      this.#rate.count(1);
      this.#unlink(waiter);
      this.#charge(tenant, waiter.entry.cost);
      tenant.dispatch = ++this.#dispatches;
      return waiter.entry;
    }
    return undefined;
  }

  /** Undoes `take`: the entry waits again, in its place, since `queuedAtMs`. No bound refuses it. */
  putBack(entry: E, queuedAtMs: number, nowMs: number): void {
    const tenant = this.#tenant(entry);
    this.#charge(tenant, -entry.cost);
    this.#rate.count(-1);
    this.#insert(entry, tenant, queuedAtMs, nowMs, true);
  }

  /** Undoes the charge of `pass` or `take`: the entry got no node, and waits no more. */
  refund(entry: E): void {
    const tenant = this.#bandOf(entry.priority).tenants.get(entry.tenant);
    if (tenant !== undefined) this.#charge(tenant, -entry.cost);
  }

  /** Charges a tenant for output tokens, which are known only at the end. */
  settle(tenantName: string, outputTokens: number): void {
    let latest: Tenant<E> | undefined;
    for (const band of this.#bands) {
      const tenant = band.tenants.get(tenantName);
      if (tenant === undefined) continue;
      if (latest === undefined || tenant.dispatch > latest.dispatch) latest = tenant;
    }
    if (latest !== undefined) this.#charge(latest, OUTPUT_PRICE * outputTokens);
  }

  /** Removes an entry wherever it stands; undefined if it does not wait. */
  remove(id: string, nowMs: number): E | undefined {
    const waiter = this.#byId.get(id);
    if (waiter === undefined) return undefined;
    this.#rate.note(nowMs, true);
    this.#unlink(waiter);
    return waiter.entry;
  }

  /** Entries whose time is up, in that order; they wait no more. Each is returned once. */
  takeExpired(nowMs: number): E[] {
    this.#expire(nowMs);
    const expired = this.#expired;
    this.#expired = [];
    return expired;
  }

  /**
   * How long an entry that is offered now would wait, ms; undefined while the rate is not known.
   *
   * Ahead of it are all of higher bands, those of its own tenant, and of each other tenant in its band as many as
   * fair turns give it meanwhile: a flood of another tenant does not make this one's wait look long. Counted in
   * entries, not tokens: a node takes the next one when one ends, whatever its size.
   */
  predictedWaitMs(entry: E): number | undefined {
    const perMs = this.#rate.perMs;
    if (perMs === undefined) return undefined;
    let ahead = 0;
    for (const band of this.#bands) {
      if (band.priority !== entry.priority) {
        ahead += band.waiting;
        continue;
      }
      const own = (band.tenants.get(entry.tenant)?.waiting ?? 0) + 1;
      for (const other of band.active) {
        if (other.name === entry.tenant) continue;
        ahead += Math.min(other.waiting, (own * other.weight) / entry.weight);
      }
      ahead += own;
      break;
    }
    return ahead / perMs;
  }

  /** Who waits, by band and tenant, and what was dropped since the start. */
  snapshot(): {
    waiting: { priority: Priority; tenant: string; waiting: number }[];
    dropped: Readonly<Record<"expired" | "key_full" | "pool_full", number>>;
  } {
    const waiting = this.#bands.flatMap((band) =>
      [...band.active].map(({ name, waiting: count }) => ({
        priority: band.priority,
        tenant: name,
        waiting: count,
      })),
    );
    return { waiting, dropped: { ...this.#dropped } };
  }

  // ---- tenants ------------------------------------------------------------------------------------------

  #bandOf(priority: Priority): Band<E> {
    const band = this.#bands[priorities.indexOf(priority)];
    assert(band !== undefined, "every priority has a band");
    return band;
  }

  #tenant(entry: E): Tenant<E> {
    const band = this.#bandOf(entry.priority);
    let tenant = band.tenants.get(entry.tenant);
    if (tenant !== undefined) {
      band.tenants.delete(entry.tenant);
    } else {
      if (band.tenants.size >= TENANTS_MAX) forgetIdle(band);
      tenant = {
        name: entry.tenant,
        band,
        counter: 0,
        weight: entry.weight,
        head: undefined,
        tail: undefined,
        waiting: 0,
        dispatch: 0,
        intervalEndAtMs: 0,
        ageMsMin: 0,
        isDelayed: false,
      };
    }
    band.tenants.set(entry.tenant, tenant);
    tenant.weight = entry.weight;
    return tenant;
  }

  #lift(tenant: Tenant<E>): void {
    const least = leastServed(tenant.band.active) ?? tenant.band.lastLeft;
    if (least !== undefined) tenant.counter = Math.max(tenant.counter, least.counter);
  }

  #charge(tenant: Tenant<E>, cost: number): void {
    tenant.counter += cost / tenant.weight;
  }

  // ---- the lists ----------------------------------------------------------------------------------------

  /** Behind those that arrived earlier; `isBack`: it was here before, so ahead of those that arrived with it. */
  #insert(entry: E, tenant: Tenant<E>, queuedAtMs: number, nowMs: number, isBack: boolean): void {
    assert(!this.#byId.has(entry.id), "an entry waits once");
    // Arrivals come nearly in order; only a retry walks, past those who came after its first attempt.
    let previous = tenant.tail;
    let next: Waiter<E> | undefined;
    while (previous !== undefined) {
      const aheadByMs = previous.entry.arrivedAtMs - entry.arrivedAtMs;
      if (aheadByMs < 0 || (aheadByMs === 0 && !isBack)) break;
      next = previous;
      previous = previous.previous;
    }
    const waiter: Waiter<E> = {
      entry,
      tenant,
      queuedAtMs,
      expiresAtMs: Math.min(entry.deadlineAtMs, queuedAtMs + this.#options.waitMsMax),
      previous,
      next,
      isWaiting: true,
    };
    if (previous === undefined) tenant.head = waiter;
    else previous.next = waiter;
    if (next === undefined) tenant.tail = waiter;
    else next.previous = waiter;
    if (tenant.waiting === 0) {
      tenant.band.active.add(tenant);
      tenant.intervalEndAtMs = nowMs + DELAY_INTERVAL_MS;
      tenant.ageMsMin = Number.POSITIVE_INFINITY;
      tenant.isDelayed = false;
    }
    tenant.waiting++;
    tenant.band.waiting++;
    this.#rate.note(nowMs, this.size > 0);
    this.#byId.set(entry.id, waiter);
    this.#waitingByKey.set(entry.key, (this.#waitingByKey.get(entry.key) ?? 0) + 1);
    pushExpiry(this.#expiries, waiter);
    if (this.#expiries.length > 2 * this.size + 64) this.#sweepExpiries();
  }

  #unlink(waiter: Waiter<E>): void {
    const { entry, tenant, previous, next } = waiter;
    if (previous === undefined) tenant.head = next;
    else previous.next = next;
    if (next === undefined) tenant.tail = previous;
    else next.previous = previous;
    waiter.isWaiting = false;
    tenant.waiting--;
    tenant.band.waiting--;
    if (tenant.waiting === 0) {
      tenant.band.active.delete(tenant);
      tenant.band.lastLeft = tenant;
    }
    this.#byId.delete(entry.id);
    const ofKey = (this.#waitingByKey.get(entry.key) ?? 1) - 1;
    if (ofKey === 0) this.#waitingByKey.delete(entry.key);
    else this.#waitingByKey.set(entry.key, ofKey);
  }

  #expire(nowMs: number): void {
    for (let top = this.#expiries[0]; top !== undefined; top = this.#expiries[0]) {
      if (top.expiresAtMs > nowMs) return;
      popExpiry(this.#expiries);
      if (!top.isWaiting) continue;
      this.#rate.note(nowMs, true);
      this.#unlink(top);
      this.#dropped.expired++;
      this.#expired.push(top.entry);
    }
  }

  /** Keeps the heap in proportion to what waits. */
  #sweepExpiries(): void {
    const waiting = this.#expiries.filter((waiter) => waiter.isWaiting);
    waiting.sort((a, b) => a.expiresAtMs - b.expiresAtMs); // A sorted list is a heap.
    this.#expiries = waiting;
  }
}

/** The tenant with the least counter; of equals, the one whose first entry arrived first. */
function leastServed<E extends QueueEntry>(active: ReadonlySet<Tenant<E>>): Tenant<E> | undefined {
  let least: Tenant<E> | undefined;
  for (const tenant of active) {
    if (
      least === undefined ||
      tenant.counter < least.counter ||
      (tenant.counter === least.counter && firstArrivalAtMs(tenant) < firstArrivalAtMs(least))
    ) {
      least = tenant;
    }
  }
  return least;
}

function firstArrivalAtMs<E extends QueueEntry>({ head }: Tenant<E>): number {
  return head?.entry.arrivedAtMs ?? 0;
}

function forgetIdle<E>(band: Band<E>): void {
  let left = TENANTS_FORGOTTEN;
  for (const tenant of band.tenants.values()) {
    if (left === 0) return;
    if (tenant.waiting > 0) continue;
    band.tenants.delete(tenant.name);
    left--;
  }
}

/** CoDel's verdict on a tenant: delayed if its oldest entry was old throughout the last interval. */
function watchDelay<E>(tenant: Tenant<E>, ageMs: number, nowMs: number): void {
  if (nowMs < tenant.intervalEndAtMs) {
    tenant.ageMsMin = Math.min(tenant.ageMsMin, ageMs);
    return;
  }
  tenant.isDelayed = tenant.ageMsMin > DELAY_TARGET_MS;
  tenant.intervalEndAtMs = nowMs + DELAY_INTERVAL_MS;
  tenant.ageMsMin = ageMs;
}

// ---- the heap of expiries ----------------------------------------------------------------------------------

function pushExpiry<E>(heap: Waiter<E>[], waiter: Waiter<E>): void {
  let at = heap.length;
  heap.push(waiter);
  while (at > 0) {
    const parentAt = (at - 1) >> 1;
    const parent = heap[parentAt] as Waiter<E>;
    if (parent.expiresAtMs <= waiter.expiresAtMs) break;
    heap[at] = parent;
    at = parentAt;
  }
  heap[at] = waiter;
}

function popExpiry<E>(heap: Waiter<E>[]): void {
  const last = heap.pop();
  if (last === undefined || heap.length === 0) return;
  let at = 0;
  for (;;) {
    let childAt = 2 * at + 1;
    let child = heap[childAt];
    if (child === undefined) break;
    const right = heap[childAt + 1];
    if (right !== undefined && right.expiresAtMs < child.expiresAtMs) {
      child = right;
      childAt++;
    }
    if (child.expiresAtMs >= last.expiresAtMs) break;
    heap[at] = child;
    at = childAt;
  }
  heap[at] = last;
}

// ---- the rate at which a waiting queue empties -----------------------------------------------------------------

/** Busy time that makes one half of the memory, and least busy time and entries that make a rate. */
const RATE_HALF_MS = 5000;
const RATE_BUSY_MS_MIN = 250;
const RATE_COUNT_MIN = 4;
/** After this long without waiting entries the pool may be another: start anew. */
const RATE_IDLE_MS_MAX = 60_000;

/** Entries per ms of time in which entries waited, over the last 5 to 10 s of such time. */
class ServiceRate {
  #atMs = 0;
  #busyMs = 0;
  #count = 0;
  #busyMsBefore = 0;
  #countBefore = 0;

  /** Accounts for the time since the last call, in which entries waited (`isBusy`) or not; before any change. */
  note(nowMs: number, isBusy: boolean): void {
    const elapsedMs = nowMs - this.#atMs;
    this.#atMs = nowMs;
    if (!isBusy) {
      if (elapsedMs > RATE_IDLE_MS_MAX) this.#reset();
      return;
    }
    this.#busyMs += elapsedMs;
    if (this.#busyMs < RATE_HALF_MS) return;
    this.#busyMsBefore = this.#busyMs;
    this.#countBefore = this.#count;
    this.#busyMs = 0;
    this.#count = 0;
  }

  count(entries: number): void {
    this.#count += entries;
  }

  /** Undefined until enough was seen. */
  get perMs(): number | undefined {
    const busyMs = this.#busyMs + this.#busyMsBefore;
    const count = this.#count + this.#countBefore;
    return busyMs >= RATE_BUSY_MS_MIN && count >= RATE_COUNT_MIN ? count / busyMs : undefined;
  }

  #reset(): void {
    this.#busyMs = 0;
    this.#count = 0;
    this.#busyMsBefore = 0;
    this.#countBefore = 0;
  }
}
