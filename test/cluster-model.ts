/**
 * Several peers' membership in virtual time, with a modelled mesh and a modelled table of leases: links that come and
 * go, ways that are blocked in one direction, processes that crash, freeze, leave and start again.
 */
import {
  type ClusterView,
  type Heartbeat,
  type Member,
  Membership,
  type MembershipEvent,
  type MembershipOptions,
  membershipDefaults,
  type PeerId,
  type View,
} from "../actors/membership.ts";
import { SimClock } from "../runtime/clock.ts";
import { Random } from "../runtime/random.ts";

/** A side that hears nothing for so long gives a link up. */
const SILENCE_MS = 3000;
const RENEW_MS = 2000;
const LEASE_MS = 6000;
/** The table ends a lease on request if it was not renewed for so long. */
const EVICT_MS = 2500;

type Mail =
  | { kind: "heartbeat"; from: Member; heartbeat: Heartbeat }
  | { kind: "view"; view: View }
  | { kind: "run"; run: () => void };

class Proc {
  readonly id: PeerId;
  membership: Membership;
  isUp = true;
  isFrozen = false;
  hasLeft = false;
  /** Arrived while it was frozen. */
  readonly held: Mail[] = [];
  contacts: readonly string[] = [];
  view: ClusterView = { epoch: 0, owners: [], suspects: [], lost: [] };
  life = 0;
  /** Last time that something happened to it or to its ways, or was mended. */
  faultAtMs: number;

  constructor(id: PeerId, membership: Membership, nowMs: number) {
    this.id = id;
    this.membership = membership;
    this.faultAtMs = nowMs;
  }
}

type Link = { isUp: boolean; brokenSinceMs: number | undefined; dialAtMs: number | undefined };

/** What Redis keeps, by the rules of its script. */
class TableModel {
  readonly leases = new Map<PeerId, { member: Member; renewedAtMs: number; untilMs: number }>();
  isUp = true;
  epoch = 0;
  sinceMs: number | undefined;
  touchedAtMs = 0;

  lose(): void {
    this.leases.clear();
    this.epoch = 0;
    this.sinceMs = undefined;
  }

  renew(member: Member, known: number, nowMs: number): void {
    this.#wake(nowMs);
    if (known > this.epoch) this.epoch = known;
    const before = this.leases.get(member.id);
    let changed = this.#sweep(nowMs);
    if (before === undefined || before.member.incarnation < member.incarnation) changed = true;
    if (before === undefined || before.member.incarnation <= member.incarnation)
      this.leases.set(member.id, { member, renewedAtMs: nowMs, untilMs: nowMs + LEASE_MS });
    if (changed) this.epoch++;
  }

  end(id: PeerId, incarnation: number, nowMs: number, silentMs: number): void {
    this.#wake(nowMs);
    const lease = this.leases.get(id);
    if (lease?.member.incarnation !== incarnation || nowMs - lease.renewedAtMs < silentMs) return;
    this.leases.delete(id);
    this.epoch++;
  }

  #sweep(nowMs: number): boolean {
    let changed = false;
    for (const [id, { untilMs }] of this.leases)
      if (untilMs <= nowMs) changed = this.leases.delete(id);
    return changed;
  }

  #wake(nowMs: number): void {
    if (this.sinceMs === undefined || nowMs - this.touchedAtMs > LEASE_MS / 2) {
      this.sinceMs = nowMs;
      for (const lease of this.leases.values()) lease.untilMs = nowMs + LEASE_MS;
    }
    this.touchedAtMs = nowMs;
  }
}

export class ClusterModel {
  readonly clock = new SimClock();
  readonly procs = new Map<PeerId, Proc>();
  readonly table: TableModel | undefined;
  readonly events: { atMs: number; id: PeerId; event: MembershipEvent }[] = [];
  /** Ways to the table that are blocked. */
  readonly #cutOff = new Set<PeerId>();
  /** Blocks in the way of "from>to". */
  readonly #blocks = new Map<string, number>();
  readonly #links = new Map<string, Link>();
  readonly #random: Random;
  readonly #options: MembershipOptions;
  readonly #seeds: readonly PeerId[];
  #incarnations = 1;
  /** Called every 100 ms. */
  onSample: (() => void) | undefined;
  onView: ((view: ClusterView) => void) | undefined;

  /** @param seeds ids of those whom every peer tries first */
  constructor(
    seed: number | string,
    seeds: readonly PeerId[],
    options: Partial<MembershipOptions> = {},
  ) {
    this.#random = new Random(seed);
    this.#seeds = seeds;
    this.#options = { ...membershipDefaults, ...options };
    this.table = this.#options.table ? new TableModel() : undefined;
    this.#every(100, () => this.#maintain());
  }

  get nowMs(): number {
    return this.clock.nowUs() / 1000;
  }

  run(ms: number): void {
    const untilUs = this.clock.nowUs() + Math.round(ms * 1000);
    for (let next = this.clock.nextAtUs(); next !== undefined && next <= untilUs; ) {
      this.clock.advanceToNext();
      next = this.clock.nextAtUs();
    }
    this.clock.advanceTo(untilUs);
  }

  // ---- what happens to peers --------------------------------------------------------------------------------

  /** Starts one, or starts it again with a higher incarnation. */
  start(id: PeerId, incarnation = ++this.#incarnations): void {
    const member: Member = { id, incarnation, address: `ws://${id}:7000`, version: "1" };
    const membership = new Membership(member, this.#options, this.nowMs);
    const before = this.procs.get(id);
    const proc = new Proc(id, membership, this.nowMs);
    proc.life = (before?.life ?? 0) + 1;
    if (before !== undefined) {
      before.isUp = false;
      this.#breakLinks(id);
    }
    this.procs.set(id, proc);
    membership.discovered(this.#seeds.map((seed) => `ws://${seed}:7000`));
    this.#carryOut(proc);
    const { life } = proc;
    const again = (): void => {
      if (!proc.isUp || proc.life !== life) return;
      if (!proc.isFrozen) {
        membership.tick({ loopLagMs: 5, queueDepth: 0 }, this.nowMs);
        this.#carryOut(proc);
      }
      this.#after(250, again);
    };
    this.#after(this.#random.next() * 250, again);
    if (this.table === undefined) return;
    const renew = (): void => {
      if (!proc.isUp || proc.life !== life) return;
      if (!proc.isFrozen) this.#renew(proc);
      this.#after(RENEW_MS, renew);
    };
    this.#after(this.#random.next() * 20, renew);
  }

  /** `isSilent`: the machine is gone; else its connections are reset. */
  crash(id: PeerId, isSilent: boolean): void {
    const proc = this.#proc(id);
    proc.isUp = false;
    proc.faultAtMs = this.nowMs;
    if (!isSilent) this.#breakLinks(id);
  }

  freeze(id: PeerId): void {
    this.#proc(id).isFrozen = true;
    this.#proc(id).faultAtMs = this.nowMs;
  }

  thaw(id: PeerId): void {
    const proc = this.#proc(id);
    proc.isFrozen = false;
    proc.faultAtMs = this.nowMs;
    // As a process does that stood still: timers first, then what came in.
    proc.membership.tick({ loopLagMs: 5, queueDepth: 0 }, this.nowMs);
    this.#carryOut(proc);
    for (const mail of proc.held.splice(0)) this.#receive(proc, mail);
  }

  leave(id: PeerId): void {
    const proc = this.#proc(id);
    proc.membership.leave();
    proc.hasLeft = true;
    proc.faultAtMs = this.nowMs;
    this.#carryOut(proc);
    if (this.#reachesTable(id)) this.#endLease(id, proc.membership.self.incarnation, 0);
    this.#after(1000, () => {
      proc.isUp = false;
      this.#breakLinks(id);
    });
  }

  /** One more, or one less, in the way from one to another. */
  block(from: PeerId, to: PeerId, by: 1 | -1): void {
    const way = `${from}>${to}`;
    this.#blocks.set(way, (this.#blocks.get(way) ?? 0) + by);
    for (const id of [from, to]) {
      const proc = this.procs.get(id);
      if (proc !== undefined) proc.faultAtMs = this.nowMs;
    }
  }

  /** Its way to the table is blocked, or free again. */
  cutOffTable(id: PeerId, isCut: boolean): void {
    if (isCut) this.#cutOff.add(id);
    else this.#cutOff.delete(id);
    const proc = this.procs.get(id);
    if (proc !== undefined) proc.faultAtMs = this.nowMs;
  }

  // ---- what is seen -------------------------------------------------------------------------------------------

  view(id: PeerId): ClusterView {
    return this.#proc(id).view;
  }

  running(): Proc[] {
    return [...this.procs.values()].filter(
      ({ isUp, isFrozen, hasLeft }) => isUp && !isFrozen && !hasLeft,
    );
  }

  get isTableWhole(): boolean {
    return this.#cutOff.size === 0;
  }

  isBlocked(from: PeerId, to: PeerId): boolean {
    return (this.#blocks.get(`${from}>${to}`) ?? 0) > 0;
  }

  /** Undefined when all that run have the same owners and epoch; else what differs. */
  disagreement(): string | undefined {
    const views = this.running().map(
      ({ id, view }) => `${id}: ${view.epoch} ${view.owners.join(",")}`,
    );
    const said = new Set(views.map((view) => view.slice(view.indexOf(":"))));
    return said.size <= 1 ? undefined : views.join(" | ");
  }

  // ---- the mesh -----------------------------------------------------------------------------------------------

  #maintain(): void {
    const ids = [...this.procs.keys()].sort();
    ids.forEach((left, index) => {
      for (const right of ids.slice(index + 1)) this.#maintainLink(left, right);
    });
    this.onSample?.();
  }

  #maintainLink(left: PeerId, right: PeerId): void {
    const link = this.#link(left, right);
    const [a, b] = [this.#proc(left), this.#proc(right)];
    const isWhole = !this.isBlocked(left, right) && !this.isBlocked(right, left);
    const isSound = isWhole && a.isUp && b.isUp && !a.isFrozen && !b.isFrozen;
    if (link.isUp) {
      if (isSound) link.brokenSinceMs = undefined;
      else link.brokenSinceMs ??= this.nowMs;
      if (this.nowMs - (link.brokenSinceMs ?? this.nowMs) >= SILENCE_MS) this.#down(left, right);
      return;
    }
    const isWanted =
      a.contacts.includes(b.membership.self.address) ||
      b.contacts.includes(a.membership.self.address);
    if (!isSound || !isWanted) {
      link.dialAtMs = undefined;
      return;
    }
    link.dialAtMs ??= this.nowMs + this.#random.next() * 500;
    if (this.nowMs < link.dialAtMs) return;
    link.dialAtMs = undefined;
    link.brokenSinceMs = undefined;
    link.isUp = true;
    a.membership.linkUp(right, this.nowMs);
    this.#carryOut(a);
    b.membership.linkUp(left, this.nowMs);
    this.#carryOut(b);
  }

  #down(left: PeerId, right: PeerId): void {
    const link = this.#link(left, right);
    if (!link.isUp) return;
    link.isUp = false;
    link.brokenSinceMs = undefined;
    const tell = (proc: Proc, other: Proc): void => {
      const run = (): void => proc.membership.linkDown(other.id, this.nowMs);
      if (proc.isUp) this.#receive(proc, { kind: "run", run });
    };
    tell(this.#proc(left), this.#proc(right));
    tell(this.#proc(right), this.#proc(left));
  }

  #breakLinks(id: PeerId): void {
    for (const other of this.procs.keys()) if (other !== id) this.#down(id, other);
  }

  #link(left: PeerId, right: PeerId): Link {
    const key = left < right ? `${left} ${right}` : `${right} ${left}`;
    let link = this.#links.get(key);
    if (link === undefined) {
      link = { isUp: false, brokenSinceMs: undefined, dialAtMs: undefined };
      this.#links.set(key, link);
    }
    return link;
  }

  #send(from: Proc, to: PeerId, mail: Mail): void {
    if (!this.#link(from.id, to).isUp) return;
    this.#after(1 + this.#random.next() * 3, () => {
      const proc = this.procs.get(to);
      if (proc === undefined || !proc.isUp || this.isBlocked(from.id, to)) return;
      if (this.#link(from.id, to).isUp) this.#receive(proc, mail);
    });
  }

  #receive(proc: Proc, mail: Mail): void {
    if (proc.isFrozen) {
      proc.held.push(mail);
      return;
    }
    const { membership } = proc;
    switch (mail.kind) {
      case "heartbeat":
        membership.heartbeat(mail.from.id, mail.from.incarnation, mail.heartbeat, this.nowMs);
        break;
      case "view":
        membership.merge(mail.view, this.nowMs);
        break;
      case "run":
        mail.run();
        break;
    }
    this.#carryOut(proc);
  }

  #carryOut(proc: Proc): void {
    for (const effect of proc.membership.take()) {
      switch (effect.kind) {
        case "heartbeat": {
          const from = proc.membership.self;
          const { heartbeat } = effect;
          for (const id of this.procs.keys())
            if (id !== proc.id) this.#send(proc, id, { kind: "heartbeat", from, heartbeat });
          break;
        }
        case "send_view":
          this.#send(proc, effect.to, { kind: "view", view: structuredClone(effect.view) });
          break;
        case "contacts":
          proc.contacts = effect.addresses;
          break;
        case "view_changed":
          proc.view = effect.view;
          this.onView?.(effect.view);
          break;
        case "evict":
          if (this.#reachesTable(proc.id)) this.#endLease(effect.id, effect.incarnation, EVICT_MS);
          break;
        case "event":
          this.events.push({ atMs: this.nowMs, id: proc.id, event: effect.event });
          break;
      }
    }
  }

  // ---- the table ----------------------------------------------------------------------------------------------

  #reachesTable(id: PeerId): boolean {
    return this.table?.isUp === true && !this.#cutOff.has(id);
  }

  #renew(proc: Proc): void {
    const { table } = this;
    if (table === undefined || !this.#reachesTable(proc.id)) return;
    if (proc.membership.state === "left" || proc.membership.state === "superseded") return;
    const { epoch } = table;
    table.renew(proc.membership.self, proc.membership.epoch, this.nowMs);
    this.#tell(proc, this.nowMs);
    if (table.epoch !== epoch) this.#announce(proc);
  }

  #endLease(id: PeerId, incarnation: number, silentMs: number): void {
    const { table } = this;
    const before = table?.epoch;
    table?.end(id, incarnation, this.nowMs, silentMs);
    if (table !== undefined && table.epoch !== before) this.#announce(undefined);
  }

  /** Whoever hears that the table has changed renews at once. */
  #announce(but: Proc | undefined): void {
    for (const proc of this.procs.values())
      if (proc !== but && proc.isUp && this.#reachesTable(proc.id))
        this.#after(2, () => {
          if (proc.isUp && !proc.isFrozen && !proc.hasLeft) this.#renew(proc);
        });
  }

  #tell(proc: Proc, askedAtMs: number): void {
    const { table } = this;
    if (table === undefined) return;
    const snapshot = {
      epoch: table.epoch,
      ageMs: this.nowMs - (table.sinceMs ?? this.nowMs),
      members: [...table.leases.values()].map(({ member }) => member),
    };
    const run = (): void => proc.membership.table(snapshot, askedAtMs, this.nowMs);
    this.#after(2, () => {
      if (proc.isUp) this.#receive(proc, { kind: "run", run });
    });
  }

  // ---- time ---------------------------------------------------------------------------------------------------

  #after(ms: number, run: () => void): void {
    this.clock.schedule(Math.round(ms * 1000), run);
  }

  #every(ms: number, run: () => void): void {
    this.#after(ms, () => {
      run();
      this.#every(ms, run);
    });
  }

  #proc(id: PeerId): Proc {
    const proc = this.procs.get(id);
    if (proc === undefined) throw new Error(`${id} was never started`);
    return proc;
  }
}
