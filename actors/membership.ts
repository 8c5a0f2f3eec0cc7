/**
 * Which peers there are, as one peer knows it: a state machine without clock, socket or timer of its own.
 *
 *               own view met another's,          silence everywhere, or
 *               or nobody answered               its lease ran out
 *   (joining) ─────────────────▶ (alive) ──────────────────────────▶ (removed)
 *       │                        │  ▲ ▲                                  │
 *       │                  leave │  │ └── refutes, or a new lease ───────┤
 *       └────────▶ (left) ◀──────┘  └──── a new incarnation ─────────────┘
 *
 *   (suspect) is no such state but one peer's own opinion of an alive member: its link is down, or phi ≥ 8. A suspect
 *   gets no new work from here and keeps what it owns. Opinions do not travel; what has been heard does.
 *
 * Only alive members own anything. Who may change what:
 * - joining → alive, alive → left, and "I am alive after all" (refuting): the member itself, nobody else.
 * - → removed: any member that has seen no evidence of life for 2.5 s. Evidence is a growing heartbeat number,
 *   from the member itself or by way of anyone who hears it: while one peer can hear it, nobody removes it, however
 *   the links between the others lie.
 * - with a table of leases (Redis), → removed happens there alone: the lease runs out, or a member that sees no
 *   evidence asks for it to be ended. The table counts its changes, and that number stamps what follows from them.
 *
 * Views merge without a vote. An entry is ordered by (incarnation, left last, stamp, state), the greater one wins, so any
 * order of merging ends in the same entries. The epoch of a view is above that of every other view met:
 * epoch = max(mine + (merged ≠ mine), theirs + (merged ≠ theirs)). Heartbeats carry epoch and hash; where they
 * differ, both sides send their view. So views converge one exchange after the last change.
 *
 * What happens on failures
 * - a crash: suspect at once where the connection breaks, else after 2.0 s; removed 2.5 s after its last sign of life.
 *   All that hear each other agree a quarter of a second later: ownership has settled within 3 s.
 * - a frozen peer: removed like a crashed one. When it thaws, it sees that it has not looked for a second and accuses
 *   nobody; it learns that it was removed, refutes, and is back after one exchange.
 * - a busy peer: its own lag, and that of the other side, as each reports it, widens both limits, by 2 s at most.
 * - a partition: each side removes the other and goes on alone; the sides keep dialling each other. When it heals, both
 *   learn of their removal, refute, and the views merge. What two owners may do meanwhile is theirs to bound.
 * - one way only (A hears B, B does not hear A): while a third hears A, nobody removes A. Of two, B removes A.
 * - two processes with one id: the later one to join takes a higher incarnation, the earlier is superseded: it owns
 *   nothing, says so in an event, and should end. Start times of skewed clocks do no harm, for who joins goes above
 *   what it hears.
 * - the table is lost for all: the view is frozen, nobody is removed, all keep what they own. Lost for one, while others
 *   renew their leases: it stops owning one second before its lease ends, and forwards.
 * - the table comes back empty: a table younger than a lease says nothing about who is missing.
 *
 * It does not open links, read clocks, or keep the table: `take` says what is to be done. Left out: indirect probes
 * (the mesh is full, and what others hear travels anyway), and a quorum (nothing here is worth refusing service for).
 */
import { assert, unreachable } from "../runtime/actor.ts";
import { hashOf } from "./node-score.ts";
import { PhiDetector } from "./phi-detector.ts";

/** Unique in the cluster; the first part of the paths of a process's actors. */
export type PeerId = string;

/** Who a peer is. */
export type Member = {
  id: PeerId;
  /** Grows with every start of the process of that id; the higher one is the present one. Whole, ≥ 1. */
  incarnation: number;
  /** Where peers reach it, `ws://host:port`. */
  address: string;
  /** Of the program, for people. */
  version: string;
};

/** As it is agreed on. */
export type MemberState = "joining" | "alive" | "removed" | "left";

/** One member in a view that travels. */
export type ViewEntry = Member & {
  state: MemberState;
  /** The epoch of the change that made this entry. */
  stamp: number;
};

/** All that one peer knows of the cluster. */
export type View = { epoch: number; entries: readonly ViewEntry[] };

/** What a peer tells every other one every 250 ms. */
export type Heartbeat = {
  /** Counts up from 1 in an incarnation. */
  seq: number;
  /** Its event loop's delay, 99th percentile, ms. */
  loopLagMs: number;
  /** Messages that wait in its mailboxes. */
  queueDepth: number;
  epoch: number;
  /** Of the members that are not gone. */
  viewHash: number;
  /** It has renewed its lease of late, so the table is there. False without a table. */
  renewsLease: boolean;
  /** The last heartbeats it knows of. */
  heard: readonly { id: PeerId; incarnation: number; seq: number }[];
};

/** The table of leases as it was read. */
export type TableSnapshot = {
  /** Counts its changes. */
  epoch: number;
  /** Since it was made (it may have been lost), ms. */
  ageMs: number;
  members: readonly Member[];
};

export type MembershipOptions = {
  /** Whether a table of leases decides who is removed. */
  table: boolean;
  /** Of the table's leases, ms. */
  leaseMs: number;
  heartbeatMs: number;
  /** Silence beyond the usual that is accepted, ms. */
  pauseMs: number;
  /** Least standard deviation of intervals, ms. */
  sigmaMs: number;
  /** From here on a silent peer is suspect. */
  phiMax: number;
  /** Without evidence of life for so long, a member is removed, ms. */
  removeMs: number;
  /** Without an answer for so long, a peer that joins goes on alone, ms. */
  joinMs: number;
  /** A tick so late says that this process stood still, ms. */
  localPauseMs: number;
};

/** Heartbeat, pause and σ give suspicion after 2.0 s of silence, removal after 2.5 s. */
export const membershipDefaults: Readonly<MembershipOptions> = {
  table: false,
  leaseMs: 6000,
  heartbeatMs: 250,
  pauseMs: 1500,
  sigmaMs: 50,
  phiMax: 8,
  removeMs: 2500,
  joinMs: 2000,
  localPauseMs: 1000,
};

/** One member, for tables and metrics. */
export type MemberFact = Member & {
  /** "self" is the peer that tells; `suspect` is its own opinion. */
  state: MemberState | "suspect" | "superseded";
  isSelf: boolean;
  isLinked: boolean;
  owns: boolean;
  /** Since anything was heard of it, directly or not, ms; 0 for itself. */
  silentMs: number;
  phi: number;
  loopLagMs: number;
  queueDepth: number;
};

/** What the rest of the process goes by. A new object at every change. */
export type ClusterView = {
  epoch: number;
  /** Ids, sorted. This peer is among them while it owns. */
  owners: readonly PeerId[];
  /** Owners that this peer believes out of reach: no new work for them. */
  suspects: readonly PeerId[];
  /** Removed and neither come back nor left in order: they may be alive on the other side of a partition. */
  lost: readonly PeerId[];
};

/** Rare things, for log and metrics. */
export type MembershipEvent =
  | { kind: "membership.joined"; id: PeerId; incarnation: number; epoch: number }
  | { kind: "membership.suspected"; id: PeerId; phi: number; isLinked: boolean }
  | { kind: "membership.trusted"; id: PeerId }
  | { kind: "membership.removed"; id: PeerId; incarnation: number; silentMs: number; epoch: number }
  | { kind: "membership.left"; id: PeerId; epoch: number }
  /** This peer had been removed by others, and says that it lives. */
  | { kind: "membership.refuted"; epoch: number }
  /** It goes above an earlier process of its id. */
  | { kind: "membership.reincarnated"; incarnation: number }
  /** Another process has this peer's id: end this one, or give it another id. */
  | { kind: "membership.superseded"; address: string; incarnation: number }
  /** This process stood still for so long. */
  | { kind: "membership.paused"; lateMs: number }
  /** `all`: no peer within reach renews its lease either, so the view is frozen. */
  | { kind: "membership.lease_lost"; all: boolean }
  | { kind: "membership.lease_regained" }
  /** More peers than a mesh carries: this one is not taken in. */
  | { kind: "membership.overflow"; id: PeerId };

/** What is to be done, in order. */
export type MembershipEffect =
  /** To every linked peer, also those removed. */
  | { kind: "heartbeat"; heartbeat: Heartbeat }
  | { kind: "send_view"; to: PeerId; view: View }
  /** Addresses to be linked with; others need not be dialled any more. */
  | { kind: "contacts"; addresses: readonly string[] }
  | { kind: "view_changed"; view: ClusterView }
  /** The table is to end this lease, if it is as old as it seems. */
  | { kind: "evict"; id: PeerId; incarnation: number }
  | { kind: "event"; event: MembershipEvent };

/** Of this process, at a tick. */
export type OwnLoad = { loopLagMs: number; queueDepth: number };

const MEMBERS_MAX = 256;
const CONTACTS_MAX = 512;
/** A member that is gone is remembered so long, lest an old view brings it back, and dialled meanwhile. */
const GONE_MS = 3_600_000;
/** Who left in order is dialled so long: it may only be on its way to a new version. */
const LEFT_DIALLED_MS = 60_000;
const WIDEN_MS_MAX = 2000;
/** Before its lease ends, a peer that cannot renew it stops owning. */
const LEASE_MARGIN_MS = 1000;
/**
 * Leases are renewed every 2 s. When the table goes for all, whoever's lease ends first (5 s after its renewal) must
 * know by then that the others do not renew either: theirs succeeded at most 2 s after its own.
 */
const RENEWED_MS = 2500;
/** Others renew and this peer does not: for so long it may only be the last to hear that the table is back. */
const HELD_ELSEWHERE_MS = 3000;
/** Between two requests to end the same lease. */
const EVICT_MS = 500;

/** A member, and what this peer alone knows of it. */
type Entry = ViewEntry & {
  detector: PhiDetector;
  isSuspect: boolean;
  /** The highest heartbeat known, and when it became known here. */
  seq: number;
  evidenceAtMs: number;
  loopLagMs: number;
  queueDepth: number;
  renewsLease: boolean;
  evictedAtMs: number;
  /** When it was removed or left, as seen here. */
  goneAtMs: number;
};

type SelfState = MemberState | "superseded";

export class Membership {
  readonly #options: MembershipOptions;
  readonly #startedAtMs: number;
  #self: ViewEntry;
  #isSuperseded = false;
  readonly #entries = new Map<PeerId, Entry>();
  /** As discovered: by list or DNS. */
  #seeds: readonly string[] = [];
  /** Peers with a link, members or not. */
  readonly #links = new Set<PeerId>();
  #epoch = 0;
  #seq = 0;
  #load: OwnLoad = { loopLagMs: 0, queueDepth: 0 };
  #tickedAtMs: number;
  #hasMet = false;
  #hasSeenTable = false;
  /** Infinity without a table. */
  #leaseUntilMs: number;
  /** undefined: it holds a lease; else for whom the table is lost. */
  #leaseLost: "all" | "one" | undefined;
  /** Since when another peer within reach says that it renews its lease; Infinity: none does. */
  #heldElsewhereSinceMs = Number.POSITIVE_INFINITY;
  #effects: MembershipEffect[] = [];
  #viewKey = "";
  #contactsKey = "";
  /** Of the live part of the view; undefined when it is to be computed again. */
  #hash: number | undefined;

  constructor(self: Member, options: MembershipOptions, nowMs: number) {
    assert(self.incarnation >= 1, "an incarnation is a whole number of at least 1");
    assert(options.removeMs > options.pauseMs, "a member is suspected before it is removed");
    assert(
      options.leaseMs > 2 * LEASE_MARGIN_MS,
      `a lease lasts longer than ${2 * LEASE_MARGIN_MS} ms`,
    );
    this.#options = options;
    this.#startedAtMs = nowMs;
    this.#tickedAtMs = nowMs;
    this.#leaseUntilMs = options.table ? Number.NEGATIVE_INFINITY : Number.POSITIVE_INFINITY;
    this.#self = { ...self, state: "joining", stamp: 0 };
  }

  get self(): Member {
    const { id, incarnation, address, version } = this.#self;
    return { id, incarnation, address, version };
  }

  get state(): SelfState {
    return this.#isSuperseded ? "superseded" : this.#self.state;
  }

  get epoch(): number {
    return this.#epoch;
  }

  /** What is to be done since the last call. */
  take(): MembershipEffect[] {
    const effects = this.#effects;
    this.#effects = [];
    return effects;
  }

  view(): View {
    return { epoch: this.#epoch, entries: [{ ...this.#self }, ...this.#others()] };
  }

  facts(nowMs: number): MemberFact[] {
    const owners = new Set(this.#owners());
    const self: MemberFact = {
      ...this.self,
      state: this.state,
      isSelf: true,
      isLinked: true,
      owns: owners.has(this.#self.id),
      silentMs: 0,
      phi: 0,
      ...this.#load,
    };
    const others = [...this.#entries.values()].map((entry): MemberFact => {
      const { id, incarnation, address, version, loopLagMs, queueDepth } = entry;
      const isSuspect = entry.state === "alive" && entry.isSuspect;
      return {
        id,
        incarnation,
        address,
        version,
        state: isSuspect ? "suspect" : entry.state,
        isSelf: false,
        isLinked: this.#links.has(id),
        owns: owners.has(id),
        silentMs: nowMs - entry.evidenceAtMs,
        phi: entry.detector.phi(nowMs, 0),
        loopLagMs,
        queueDepth,
      };
    });
    return [self, ...others].sort((a, b) => (a.id < b.id ? -1 : 1));
  }

  // ---- inputs -------------------------------------------------------------------------------------------

  /** Seeds by list, or what their name stands for now. */
  discovered(addresses: readonly string[]): void {
    this.#seeds = addresses.slice(0, CONTACTS_MAX);
    this.#publish();
  }

  /** There is a link to that peer now: each tells the other what it knows. */
  linkUp(id: PeerId, nowMs: number): void {
    if (id === this.#self.id || this.#links.size >= MEMBERS_MAX) return;
    this.#links.add(id);
    const entry = this.#entries.get(id);
    if (entry !== undefined) {
      entry.detector.discard(nowMs);
      entry.evidenceAtMs = nowMs; // It has just answered.
    }
    this.#sendView(id);
    this.#judge(nowMs);
    this.#publish();
  }

  linkDown(id: PeerId, nowMs: number): void {
    this.#links.delete(id);
    this.#judge(nowMs);
    this.#publish();
  }

  /** One of a peer that is linked. That of an incarnation that is not the present one changes nothing. */
  heartbeat(from: PeerId, incarnation: number, heartbeat: Heartbeat, nowMs: number): void {
    if (from === this.#self.id || this.#isSuperseded) return;
    const { epoch, viewHash, heard, loopLagMs, queueDepth, renewsLease } = heartbeat;
    const entry = this.#entries.get(from);
    if (entry !== undefined && entry.incarnation === incarnation) {
      entry.detector.heard(nowMs);
      entry.loopLagMs = loopLagMs;
      entry.queueDepth = queueDepth;
      entry.renewsLease = renewsLease;
      this.#noteEvidence(entry, heartbeat.seq, nowMs);
    }
    for (const { id, incarnation, seq } of heard.slice(0, MEMBERS_MAX)) {
      const other = this.#entries.get(id);
      if (other?.incarnation === incarnation) this.#noteEvidence(other, seq, nowMs);
    }
    if (epoch !== this.#epoch || viewHash !== this.#viewHash()) this.#sendView(from);
    this.#judge(nowMs);
    this.#publish();
  }

  /** A peer's view. */
  merge(theirs: View, nowMs: number): void {
    if (this.#isSuperseded) return;
    const mineEpoch = this.#epoch;
    const mineHash = this.#viewHash();
    const theirHash = hashOfView(theirs.entries);
    for (const entry of theirs.entries.slice(0, MEMBERS_MAX)) {
      if (entry.id === this.#self.id) this.#meetOwn(entry);
      else this.#admit(entry, nowMs);
    }
    const merged = this.#viewHash();
    const stamps = theirs.entries.map(({ stamp }) => stamp);
    this.#epoch = Math.max(
      ...stamps,
      this.#epoch, // With what this peer says of itself now.
      mineEpoch + (merged === mineHash ? 0 : 1),
      theirs.epoch + (merged === theirHash ? 0 : 1),
    );
    this.#hasMet = true;
    this.#tryBecomeAlive(nowMs);
    this.#judge(nowMs);
    this.#publish();
  }

  /** The table as it was read by a renewal that was sent at `askedAtMs`. This peer's lease runs from then. */
  table(snapshot: TableSnapshot, askedAtMs: number, nowMs: number): void {
    if (this.#isSuperseded || this.#self.state === "left") return;
    const { epoch, ageMs, members } = snapshot;
    const mineEpoch = this.#epoch;
    const mineHash = this.#viewHash();
    this.#hasSeenTable = true;
    const present = new Set<PeerId>();
    for (const member of members) {
      present.add(member.id);
      if (member.id !== this.#self.id) {
        this.#admit({ ...member, state: "alive", stamp: epoch }, nowMs);
      } else if (epoch < this.#self.stamp) {
        // Read before what made this peer's own entry.
      } else if (member.incarnation === this.#self.incarnation) {
        this.#leaseUntilMs = Math.max(this.#leaseUntilMs, askedAtMs + this.#options.leaseMs);
        if (this.#self.state !== "alive" || this.#self.stamp < epoch) this.#setSelf("alive", epoch);
      } else {
        this.#meetOwn({ ...member, state: "alive", stamp: epoch });
      }
    }
    for (const entry of this.#entries.values()) {
      if (ageMs < this.#options.leaseMs || present.has(entry.id)) continue;
      if (entry.state === "alive" && entry.stamp < epoch)
        this.#admit({ ...plain(entry), state: "removed", stamp: epoch }, nowMs);
    }
    const changed = this.#viewHash() === mineHash ? 0 : 1;
    this.#epoch = Math.max(this.#epoch, mineEpoch + changed, epoch);
    this.#judge(nowMs);
    this.#publish();
  }

  /** This process is about to end: its work goes to others now. */
  leave(): void {
    if (this.#self.state === "left") return;
    this.#setSelf("left", this.#epoch + 1);
    for (const id of this.#links) this.#sendView(id);
    this.#publish();
  }

  /** Every `heartbeatMs`. */
  tick(load: OwnLoad, nowMs: number): void {
    const lateMs = nowMs - this.#tickedAtMs;
    this.#tickedAtMs = nowMs;
    this.#load = load;
    if (this.#isSuperseded) return;
    if (lateMs > this.#options.localPauseMs) this.#forgivePause(lateMs, nowMs);
    this.#tryBecomeAlive(nowMs);
    this.#judge(nowMs);
    if (this.#self.state !== "left") {
      this.#removeSilent(nowMs);
      this.#seq++;
    }
    this.#forgetGone(nowMs);
    this.#publish();
    this.#effects.push({ kind: "heartbeat", heartbeat: this.#heartbeat(nowMs) });
  }

  // ---- this peer ----------------------------------------------------------------------------------------

  #heartbeat(nowMs: number): Heartbeat {
    const heard: Heartbeat["heard"][number][] = [];
    for (const { id, incarnation, seq, state } of this.#entries.values())
      if (seq > 0 && isLive(state)) heard.push({ id, incarnation, seq });
    return {
      seq: this.#seq,
      ...this.#load,
      epoch: this.#epoch,
      viewHash: this.#viewHash(),
      renewsLease:
        this.#options.table && nowMs < this.#leaseUntilMs - this.#options.leaseMs + RENEWED_MS,
      heard,
    };
  }

  #setSelf(state: MemberState, stamp: number): void {
    const { id, incarnation } = this.#self;
    const wasAlive = this.#self.state === "alive";
    this.#self = { ...this.#self, state, stamp };
    this.#epoch = Math.max(this.#epoch, stamp);
    this.#hash = undefined;
    if (state === "alive" && !wasAlive)
      this.#event({ kind: "membership.joined", id, incarnation, epoch: this.#epoch });
    if (state === "left") this.#event({ kind: "membership.left", id, epoch: this.#epoch });
  }

  #tryBecomeAlive(nowMs: number): void {
    if (this.#self.state !== "joining") return;
    const { table, joinMs } = this.#options;
    const waitedMs = nowMs - this.#startedAtMs;
    const mayJoin = table
      ? !this.#hasSeenTable && waitedMs >= joinMs // Else the table says when.
      : this.#hasMet || waitedMs >= joinMs || !this.#mayMeet();
    if (mayJoin) this.#setSelf("alive", this.#epoch + 1);
  }

  /** Whether there is anybody to wait for. */
  #mayMeet(): boolean {
    if (this.#entries.size > 0) return true;
    return this.#seeds.some((address) => address !== this.#self.address);
  }

  /** What somebody says of this peer's id. */
  #meetOwn(entry: ViewEntry): void {
    const { incarnation, address, stamp } = this.#self;
    const isOther = entry.incarnation !== incarnation || entry.address !== address;
    if (isOther) {
      const isLater =
        entry.incarnation > incarnation ||
        (entry.incarnation === incarnation && entry.address > address);
      if (!isLater) return; // It yields.
      // Who joins goes above whatever was there before; who has long joined, only above one that is gone again.
      if (this.#self.state === "joining" || !isLive(entry.state))
        return this.#reincarnate(entry.incarnation + 1);
      return this.#becomeSuperseded(entry);
    }
    if (entry.state !== "removed" || entry.stamp < stamp || this.#self.state === "left") return;
    if (this.#self.state === "joining") {
      this.#self = { ...this.#self, stamp: entry.stamp + 1 };
      this.#hash = undefined;
      return;
    }
    if (this.#options.table && this.#leaseLost !== "all") {
      this.#setSelf("removed", entry.stamp); // The next renewal brings it back.
      return;
    }
    this.#setSelf("alive", entry.stamp + 1);
    this.#event({ kind: "membership.refuted", epoch: this.#epoch });
  }

  #reincarnate(incarnation: number): void {
    this.#self = { ...this.#self, incarnation };
    this.#seq = 0;
    this.#hash = undefined;
    this.#leaseUntilMs = this.#options.table ? Number.NEGATIVE_INFINITY : this.#leaseUntilMs;
    this.#event({ kind: "membership.reincarnated", incarnation });
  }

  #becomeSuperseded({ address, incarnation }: ViewEntry): void {
    if (this.#isSuperseded) return;
    this.#isSuperseded = true;
    this.#hash = undefined;
    this.#event({ kind: "membership.superseded", address, incarnation });
  }

  // ---- the others ---------------------------------------------------------------------------------------

  /** Takes what is newer than what is known. */
  #admit(theirs: ViewEntry, nowMs: number): void {
    const known = this.#entries.get(theirs.id);
    if (known === undefined && !isLive(theirs.state)) return; // News of someone never met, who is gone.
    if (known !== undefined && !isNewer(theirs, known)) return;
    if (known === undefined && this.#entries.size >= MEMBERS_MAX - 1 && !this.#dropOldestGone()) {
      this.#event({ kind: "membership.overflow", id: theirs.id });
      return;
    }
    this.#hash = undefined;
    const { id, incarnation, address, version, state, stamp } = theirs;
    const before = known?.incarnation === incarnation ? known.state : undefined;
    const entry = known?.incarnation === incarnation ? known : this.#newEntry(theirs, nowMs);
    entry.address = address;
    entry.version = version;
    entry.state = state;
    entry.stamp = stamp;
    this.#entries.set(id, entry);
    const wasGone = before !== undefined && !isLive(before);
    // Back again: it has as long to be heard as one that is new.
    if (wasGone && isLive(state)) entry.evidenceAtMs = nowMs;
    if (before === state) return;
    const epoch = Math.max(this.#epoch, stamp);
    switch (state) {
      case "joining":
        return;
      case "alive":
        return this.#event({ kind: "membership.joined", id, incarnation, epoch });
      case "removed":
        entry.goneAtMs = nowMs;
        entry.isSuspect = true;
        return this.#event({
          kind: "membership.removed",
          id,
          incarnation,
          silentMs: nowMs - entry.evidenceAtMs,
          epoch,
        });
      case "left":
        entry.goneAtMs = nowMs;
        return this.#event({ kind: "membership.left", id, epoch });
      default:
        return unreachable(state);
    }
  }

  #newEntry(entry: ViewEntry, nowMs: number): Entry {
    const { heartbeatMs, pauseMs, sigmaMs } = this.#options;
    return {
      ...plain(entry),
      detector: new PhiDetector({ heartbeatMs, pauseMs, sigmaMsMin: sigmaMs }, nowMs),
      isSuspect: true, // Until it is judged.
      seq: 0,
      evidenceAtMs: nowMs,
      loopLagMs: 0,
      queueDepth: 0,
      renewsLease: false,
      evictedAtMs: Number.NEGATIVE_INFINITY,
      goneAtMs: nowMs,
    };
  }

  #noteEvidence(entry: Entry, seq: number, nowMs: number): void {
    if (seq <= entry.seq) return;
    entry.seq = seq;
    entry.evidenceAtMs = nowMs;
  }

  /** This process stood still: the others' silence is its own. */
  #forgivePause(lateMs: number, nowMs: number): void {
    for (const entry of this.#entries.values()) {
      entry.detector.discard(nowMs);
      entry.evidenceAtMs = nowMs;
    }
    this.#event({ kind: "membership.paused", lateMs });
  }

  /** Who is suspect, and whether this peer's lease holds. */
  #judge(nowMs: number): void {
    for (const entry of this.#entries.values()) {
      if (entry.state !== "alive") continue;
      const phi = entry.detector.phi(nowMs, this.#widenMs(entry));
      const { id } = entry;
      const isLinked = this.#links.has(id);
      const isSuspect = !isLinked || phi >= this.#options.phiMax;
      if (isSuspect === entry.isSuspect) continue;
      entry.isSuspect = isSuspect;
      if (isSuspect) this.#event({ kind: "membership.suspected", id, phi, isLinked });
      else this.#event({ kind: "membership.trusted", id });
    }
    this.#judgeLease(nowMs);
  }

  #judgeLease(nowMs: number): void {
    if (!this.#options.table || this.#self.state === "joining") return;
    const before = this.#leaseLost;
    const others = [...this.#entries.values()];
    const isHeld = others.some((e) => e.state === "alive" && !e.isSuspect && e.renewsLease);
    this.#heldElsewhereSinceMs = isHeld
      ? Math.min(nowMs, this.#heldElsewhereSinceMs)
      : Number.POSITIVE_INFINITY;
    if (this.#holdsLease(nowMs)) this.#leaseLost = undefined;
    // When the table comes back for all, one peer is the first to see it.
    else if (nowMs - this.#heldElsewhereSinceMs < HELD_ELSEWHERE_MS) this.#leaseLost = "all";
    else this.#leaseLost = "one";
    if (this.#leaseLost === before) return;
    if (this.#leaseLost === undefined) this.#event({ kind: "membership.lease_regained" });
    else this.#event({ kind: "membership.lease_lost", all: this.#leaseLost === "all" });
  }

  #holdsLease(nowMs: number): boolean {
    return nowMs < this.#leaseUntilMs - LEASE_MARGIN_MS;
  }

  #widenMs(entry: Entry): number {
    return Math.min(WIDEN_MS_MAX, Math.max(0, this.#load.loopLagMs, entry.loopLagMs));
  }

  #removeSilent(nowMs: number): void {
    const { table, removeMs } = this.#options;
    if (!table && this.#self.state !== "alive") return;
    for (const entry of this.#entries.values()) {
      if (!isLive(entry.state)) continue;
      if (nowMs - entry.evidenceAtMs <= removeMs + this.#widenMs(entry)) continue;
      if (entry.state === "joining") {
        // It never owned anything: any later word of it outranks this one.
        this.#epoch++;
        this.#admit({ ...plain(entry), state: "removed" }, nowMs);
      } else if (!table) {
        this.#epoch++;
        this.#admit({ ...plain(entry), state: "removed", stamp: this.#epoch }, nowMs);
      } else if (nowMs - entry.evictedAtMs >= EVICT_MS) {
        entry.evictedAtMs = nowMs;
        const { id, incarnation } = entry;
        this.#effects.push({ kind: "evict", id, incarnation });
      }
    }
  }

  #forgetGone(nowMs: number): void {
    for (const [id, entry] of this.#entries)
      if (!isLive(entry.state) && nowMs - entry.goneAtMs > GONE_MS) this.#entries.delete(id);
  }

  #dropOldestGone(): boolean {
    let oldest: Entry | undefined;
    for (const entry of this.#entries.values())
      if (!isLive(entry.state) && entry.goneAtMs < (oldest?.goneAtMs ?? Number.POSITIVE_INFINITY))
        oldest = entry;
    return oldest !== undefined && this.#entries.delete(oldest.id);
  }

  // ---- what follows -------------------------------------------------------------------------------------

  #owners(): PeerId[] {
    const owners: PeerId[] = [];
    const owns = this.#self.state === "alive" && !this.#isSuperseded && this.#leaseLost !== "one";
    if (owns) owners.push(this.#self.id);
    for (const { id, state } of this.#entries.values()) if (state === "alive") owners.push(id);
    return owners.sort();
  }

  #publish(): void {
    const owners = this.#owners();
    const suspects: PeerId[] = [];
    const lost: PeerId[] = [];
    for (const { id, state, isSuspect } of this.#entries.values()) {
      if (state === "alive" && isSuspect) suspects.push(id);
      if (state === "removed") lost.push(id);
    }
    const view: ClusterView = {
      epoch: this.#epoch,
      owners,
      suspects: suspects.sort(),
      lost: lost.sort(),
    };
    const key = JSON.stringify(view);
    if (key !== this.#viewKey) {
      this.#viewKey = key;
      this.#effects.push({ kind: "view_changed", view });
    }
    const contacts = this.#contacts();
    const contactsKey = contacts.join(" ");
    if (contactsKey === this.#contactsKey) return;
    this.#contactsKey = contactsKey;
    this.#effects.push({ kind: "contacts", addresses: contacts });
  }

  /** Also those removed: that is how a partition ends. */
  #contacts(): string[] {
    if (this.#self.state === "left" || this.#isSuperseded) return [];
    const addresses = new Set<string>();
    for (const { address, state, goneAtMs } of this.#entries.values())
      if (state !== "left" || this.#tickedAtMs - goneAtMs < LEFT_DIALLED_MS) addresses.add(address);
    for (const address of this.#seeds) addresses.add(address);
    addresses.delete(this.#self.address);
    return [...addresses].sort().slice(0, CONTACTS_MAX);
  }

  #sendView(to: PeerId): void {
    this.#effects.push({ kind: "send_view", to, view: this.view() });
  }

  #viewHash(): number {
    this.#hash ??= hashOfView([this.#self, ...this.#entries.values()]);
    return this.#hash;
  }

  #others(): ViewEntry[] {
    return [...this.#entries.values()].map(plain);
  }

  #event(event: MembershipEvent): void {
    this.#effects.push({ kind: "event", event });
  }
}

function isLive(state: MemberState): boolean {
  return state === "joining" || state === "alive";
}

function plain({ id, incarnation, address, version, state, stamp }: ViewEntry): ViewEntry {
  return { id, incarnation, address, version, state, stamp };
}

/** Of equal stamps: who is gone is gone. */
const RANK: Readonly<Record<MemberState, number>> = { joining: 0, alive: 1, removed: 2, left: 3 };

/** The order of entries of one id; a total one, so that merging ends the same in any order. */
function isNewer(a: ViewEntry, b: ViewEntry): boolean {
  if (a.incarnation !== b.incarnation) return a.incarnation > b.incarnation;
  // Leaving is final for an incarnation.
  if ((a.state === "left") !== (b.state === "left")) return a.state === "left";
  if (a.stamp !== b.stamp) return a.stamp > b.stamp;
  if (a.state !== b.state) return RANK[a.state] > RANK[b.state];
  return a.address > b.address;
}

/** 32 bits over those that are not gone; stamps do not count, for they change nothing. */
function hashOfView(entries: readonly ViewEntry[]): number {
  const lines = entries
    .filter(({ state }) => isLive(state))
    .map(({ id, incarnation, address, state }) => `${id} ${incarnation} ${state} ${address}`);
  return hashOf(lines.sort().join("\n"));
}

// ---- from a table ---------------------------------------------------------------------------------------------

/** The value as a member, or the rule that it breaks. Copies what it keeps. */
export function parseMember(value: unknown): Member | string {
  if (!isRecord(value)) return "a member is an object";
  const { id, incarnation, address, version } = value;
  if (!isName(id)) return "id is a text of 1 to 256 characters";
  if (!isCount(incarnation) || incarnation < 1)
    return "incarnation is a whole number of at least 1";
  if (!isName(address)) return "address is a text of 1 to 256 characters";
  if (!isName(version)) return "version is a text of 1 to 256 characters";
  return { id, incarnation, address, version };
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isName(value: unknown): value is string {
  return typeof value === "string" && value.length >= 1 && value.length <= 256;
}

function isCount(value: unknown): value is number {
  return typeof value === "number" && Number.isSafeInteger(value) && value >= 0;
}
