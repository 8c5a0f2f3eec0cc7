/**
 * What goes wrong in a simulation, and when: as data, and as the text that a person writes.
 *
 *   crash node-3 at 60s for 30s; slow node-1 x2 at 10s for 20s; errors node-1 503 p=0.5 at 2m for 30s
 *   partition gw-1 gw-2 at 30s for 10s; partition gw-1 to node-2 at 30s for 10s; reset-link gw-1 gw-2 at 1m
 *   gateway gw-2 crash at 90s for 20s; actor gw-1/router crash at 20s; actor nodes/node-2 crash at 25s
 *   skew gw-1 5s at 10s; drift gw-2 x1.1 at 10s for 1m; leave 50% at 30s; store down at 1m for 1m
 *
 * Every clause is `what … at TIME [for DURATION]`; without `for` it lasts to the end. Pure: simulator.ts applies
 * them. `faultText` writes a fault back in the same language, so that a run can be repeated from its report; the
 * text also names the fault's own stream of randomness, so that removing one fault moves no draw of another.
 */

/** Names are those of the simulation's nodes (`node-1` …) and gateways (`gw-1` …). */
export type Fault =
  /** Everything on the node is lost; it starts again, cold, after the fault and its start-up. */
  | Timed<{ kind: "crash"; node: string }>
  /** Steps last `factor` times as long. */
  | Timed<{ kind: "slow"; node: string; factor: number }>
  /** Takes requests and makes no token; its health route says ok. */
  | Timed<{ kind: "hang"; node: string }>
  /** Every connection is refused, metrics and health too; what runs goes on. */
  | Timed<{ kind: "refuse"; node: string }>
  /** A share of new requests is answered with an HTTP error. */
  | Timed<{ kind: "errors"; node: string; status: number; share: number }>
  /** A share of new streams breaks off within two seconds of its first token. */
  | Timed<{ kind: "cut"; node: string; share: number }>
  /** KV memory shrinks to a share of what it was. */
  | Timed<{ kind: "kv"; node: string; share: number }>
  /**
   * Nothing gets from one side to the other; `isOneWay`: from the first to the second only. Two gateways, or a
   * gateway and a node: then connections cannot be made, and what runs already is heard of no more (from the node)
   * or cannot be stopped (to the node).
   */
  | Timed<{ kind: "partition"; from: string; to: string; isOneWay: boolean }>
  /** The connection between two gateways breaks, with all that is on it, and is made again. */
  | { kind: "reset-link"; from: string; to: string; atUs: number }
  /** The process ends without a word: its clients and its streams with it. */
  | Timed<{ kind: "gateway"; gateway: string }>
  /**
   * One actor throws at its next message, which is lost, and its supervisor restarts it; an edge loses none. It is
   * named by its path, but a node's actor, wherever it lives, as nodes/NAME.
   */
  | { kind: "actor"; actor: string; atUs: number }
  /** The clock of a process jumps ahead, and stays there: a machine that slept. Timers then due fire at once. */
  | { kind: "skew"; gateway: string; aheadUs: number; atUs: number }
  /** The clock of a process runs `factor` times as fast as time; what it gained or lost stays. */
  | Timed<{ kind: "drift"; gateway: string; factor: number }>
  /** A share of the clients that wait or read goes away. */
  | { kind: "leave"; share: number; atUs: number }
  /** The shared store refuses, or takes questions and does not answer. */
  | Timed<{ kind: "store"; how: "down" | "hang" }>;

/** `forUs` null: to the end. Whole µs of simulated time. */
type Timed<T> = T & { atUs: number; forUs: number | null };

/** A clause that cannot be read, or a name that does not exist; says which clause and what is accepted. */
export class FaultError extends Error {
  override readonly name = "FaultError";
}

const FAULTS_MAX = 1000;
const forms: readonly (readonly [string, string])[] = [
  ["crash", "crash NODE at TIME [for DURATION]"],
  ["slow", "slow NODE xFACTOR at TIME [for DURATION]"],
  ["hang", "hang NODE at TIME [for DURATION]"],
  ["refuse", "refuse NODE at TIME [for DURATION]"],
  ["errors", "errors NODE STATUS [p=SHARE] at TIME [for DURATION]"],
  ["cut", "cut NODE [p=SHARE] at TIME [for DURATION]"],
  ["kv", "kv NODE SHARE% at TIME [for DURATION]"],
  ["partition", "partition GATEWAY|NODE [to] GATEWAY|NODE at TIME [for DURATION]"],
  ["reset-link", "reset-link GATEWAY GATEWAY at TIME"],
  ["gateway", "gateway GATEWAY crash at TIME [for DURATION]"],
  ["actor", "actor GATEWAY/ACTOR|nodes/NODE crash at TIME"],
  ["skew", "skew GATEWAY DURATION at TIME"],
  ["drift", "drift GATEWAY xFACTOR at TIME [for DURATION]"],
  ["leave", "leave SHARE% at TIME"],
  ["store", "store down|hang at TIME [for DURATION]"],
];

/** Reads a schedule: clauses divided by `;` or line ends. Throws FaultError. */
export function parseFaults(text: string): Fault[] {
  const clauses = text.split(/[;\n]/).map((clause) => clause.trim());
  const faults = clauses.filter((clause) => clause !== "").map(parseClause);
  if (faults.length > FAULTS_MAX) {
    throw new FaultError(`${faults.length} faults are given; at most ${FAULTS_MAX} are accepted`);
  }
  return faults;
}

function parseClause(clause: string): Fault {
  const where = `fault ${JSON.stringify(clause)}`;
  const words = clause.split(/\s+/);
  const [name = ""] = words;
  const form = forms.find(([known]) => known === name)?.[1];
  if (form === undefined) {
    const known = forms.map(([kind]) => kind).join(", ");
    throw new FaultError(`${where}: unknown fault ${JSON.stringify(name)}; accepted: ${known}`);
  }
  const wrong = (what: string): FaultError =>
    new FaultError(`${where}: ${what}; accepted: ${form}, times like 500ms, 10s, 1.5m or 2h`);
  const at = words.lastIndexOf("at");
  if (at < 0) throw wrong("it has no time");
  const reader = new ClauseReader(words.slice(1, at), wrong);
  const [atText = "", forWord, forText = "", ...rest] = words.slice(at + 1);
  if (rest.length > 0 || (forWord !== undefined && forWord !== "for")) {
    throw wrong(`${JSON.stringify(words.slice(at + 2).join(" "))} is not understood`);
  }
  const atUs = timeUs(atText, wrong);
  const forUs = forWord === undefined ? null : timeUs(forText, wrong);
  if (forUs === 0) throw wrong("it lasts no time");
  const fault = faultOf(name, reader, { atUs, forUs });
  reader.end();
  if (forUs !== null && !("forUs" in fault)) {
    throw wrong("it happens once and takes no duration");
  }
  return fault;
}

function faultOf(
  name: string,
  reader: ClauseReader,
  time: { atUs: number; forUs: number | null },
): Fault {
  switch (name) {
    case "slow":
      return { kind: "slow", node: reader.name("a node"), factor: reader.factor(), ...time };
    case "errors":
      return {
        kind: "errors",
        node: reader.name("a node"),
        status: reader.status(),
        share: reader.optionalShare(),
        ...time,
      };
    case "cut":
      return { kind: "cut", node: reader.name("a node"), share: reader.optionalShare(), ...time };
    case "kv":
      return { kind: "kv", node: reader.name("a node"), share: reader.percent(), ...time };
    case "partition": {
      const from = reader.name("a gateway or node");
      const isOneWay = reader.word("to");
      return { kind: "partition", from, to: reader.name("a gateway or node"), isOneWay, ...time };
    }
    case "reset-link":
      return {
        kind: "reset-link",
        from: reader.name("a gateway"),
        to: reader.name("a gateway"),
        atUs: time.atUs,
      };
    case "gateway": {
      const gateway = reader.name("a gateway");
      reader.need("crash");
      return { kind: "gateway", gateway, ...time };
    }
    case "actor": {
      const actor = reader.path("an actor");
      reader.need("crash");
      return { kind: "actor", actor, atUs: time.atUs };
    }
    case "skew":
      return {
        kind: "skew",
        gateway: reader.name("a gateway"),
        aheadUs: reader.duration(),
        atUs: time.atUs,
      };
    case "drift":
      return { kind: "drift", gateway: reader.name("a gateway"), factor: reader.factor(), ...time };
    case "leave":
      return { kind: "leave", share: reader.percent(), atUs: time.atUs };
    case "store": {
      const isHang = reader.word("hang");
      if (!isHang) reader.need("down");
      return { kind: "store", how: isHang ? "hang" : "down", ...time };
    }
    case "hang":
      return { kind: "hang", node: reader.name("a node"), ...time };
    case "refuse":
      return { kind: "refuse", node: reader.name("a node"), ...time };
    default:
      return { kind: "crash", node: reader.name("a node"), ...time };
  }
}

/** The words between the fault's name and its time. */
class ClauseReader {
  readonly #words: string[];
  readonly #wrong: (what: string) => FaultError;

  constructor(words: string[], wrong: (what: string) => FaultError) {
    this.#words = words;
    this.#wrong = wrong;
  }

  name(what: string): string {
    return this.#matching(/^[A-Za-z0-9][\w.:-]*$/, what);
  }

  /** Names joined by "/". */
  path(what: string): string {
    return this.#matching(/^[A-Za-z0-9][\w.:-]*(\/[A-Za-z0-9][\w.:-]*)+$/, what);
  }

  #matching(pattern: RegExp, what: string): string {
    const word = this.#words.shift();
    if (word !== undefined && pattern.test(word)) return word;
    throw this.#wrong(word === undefined ? `${what} is missing` : `${quoted(word)} is not ${what}`);
  }

  duration(): number {
    const us = timeUs(this.#words.shift() ?? "", this.#wrong);
    if (us > 0) return us;
    throw this.#wrong("it moves the clock by nothing");
  }

  /** True, and read, if it comes next. */
  word(expected: string): boolean {
    if (this.#words[0] !== expected) return false;
    this.#words.shift();
    return true;
  }

  need(expected: string): void {
    if (!this.word(expected)) throw this.#wrong(`${quoted(expected)} is missing`);
  }

  factor(): number {
    const word = this.#words.shift() ?? "";
    const factor = Number(/^x(\d+(?:\.\d+)?)$/.exec(word)?.[1] ?? Number.NaN);
    if (factor > 0 && factor <= 1000) return factor;
    throw this.#wrong(`${quoted(word)} is no factor above 0, up to 1000, like x2`);
  }

  status(): number {
    const word = this.#words.shift() ?? "";
    if (/^[45]\d\d$/.test(word)) return Number(word);
    throw this.#wrong(`${quoted(word)} is no HTTP status from 400 to 599`);
  }

  percent(): number {
    const word = this.#words.shift() ?? "";
    const percent = Number(/^(\d+(?:\.\d+)?)%$/.exec(word)?.[1] ?? Number.NaN);
    if (percent > 0 && percent <= 100) return percent / 100;
    throw this.#wrong(`${quoted(word)} is no share above 0%, up to 100%`);
  }

  /** 1 when left out. */
  optionalShare(): number {
    const text = /^p=(.*)$/.exec(this.#words[0] ?? "")?.[1];
    if (text === undefined) return 1;
    const word = this.#words.shift() ?? "";
    const share = Number(text === "" ? Number.NaN : text);
    if (share > 0 && share <= 1) return share;
    throw this.#wrong(`${quoted(word)} is no share above 0, up to 1, like p=0.5`);
  }

  end(): void {
    if (this.#words.length === 0) return;
    throw this.#wrong(`${quoted(this.#words.join(" "))} is not understood`);
  }
}

const quoted = JSON.stringify;
const unitsUs: Readonly<Record<string, number>> = {
  ms: 1000,
  s: 1e6,
  "": 1e6,
  m: 60e6,
  min: 60e6,
  h: 3600e6,
};

function timeUs(text: string, wrong: (what: string) => FaultError): number {
  const [, digits, unit = ""] = /^(\d+(?:\.\d+)?)([a-z]*)$/.exec(text) ?? [];
  const unitUs = Object.hasOwn(unitsUs, unit) ? unitsUs[unit] : undefined;
  const us = Math.round(Number(digits ?? Number.NaN) * (unitUs ?? Number.NaN));
  if (Number.isSafeInteger(us)) return us;
  throw wrong(text === "" ? "a time is missing" : `${quoted(text)} is no time`);
}

/** The fault as `parseFaults` reads it. */
export function faultText(fault: Fault): string {
  const at = ` at ${timeText(fault.atUs)}`;
  const time = "forUs" in fault && fault.forUs !== null ? `${at} for ${timeText(fault.forUs)}` : at;
  return subjectText(fault) + time;
}

/** The fault without its time: for marks in charts. */
export function subjectText(fault: Fault): string {
  switch (fault.kind) {
    case "crash":
    case "hang":
    case "refuse":
      return `${fault.kind} ${fault.node}`;
    case "slow":
      return `slow ${fault.node} x${fault.factor}`;
    case "errors":
      return `errors ${fault.node} ${fault.status}${shareText(fault.share)}`;
    case "cut":
      return `cut ${fault.node}${shareText(fault.share)}`;
    case "kv":
      return `kv ${fault.node} ${percentOf(fault.share)}%`;
    case "partition":
      return `partition ${fault.from} ${fault.isOneWay ? "to " : ""}${fault.to}`;
    case "reset-link":
      return `reset-link ${fault.from} ${fault.to}`;
    case "gateway":
      return `gateway ${fault.gateway} crash`;
    case "actor":
      return `actor ${fault.actor} crash`;
    case "skew":
      return `skew ${fault.gateway} ${timeText(fault.aheadUs)}`;
    case "drift":
      return `drift ${fault.gateway} x${fault.factor}`;
    case "leave":
      return `leave ${percentOf(fault.share)}%`;
    case "store":
      return `store ${fault.how}`;
  }
}

function shareText(share: number): string {
  return share === 1 ? "" : ` p=${share}`;
}

function percentOf(share: number): number {
  return Number((share * 100).toFixed(6));
}

function timeText(us: number): string {
  return us % 1_000_000 === 0 ? `${us / 1_000_000}s` : `${us / 1000}ms`;
}

/** Actors of every process, beside those of the nodes; `cache/0` stands for every shard. */
const actors = [
  "edges/front",
  "edges/upstream",
  "edges/scraper",
  "edges/store",
  "cache/0",
  "limiter",
  "router",
  "requests",
];

/** Throws FaultError for a name that the simulation does not have. */
export function checkFaults(
  faults: readonly Fault[],
  nodes: readonly string[],
  gateways: readonly string[],
): void {
  for (const fault of faults) {
    const wrong = (what: string) => new FaultError(`fault ${quoted(faultText(fault))}: ${what}`);
    const need = (name: string, known: readonly string[], what: string) => {
      if (known.includes(name)) return;
      const shown = known.length > 12 ? `${known.slice(0, 12).join(", ")} …` : known.join(", ");
      throw wrong(`there is no ${what} ${quoted(name)}; known: ${shown}`);
    };
    if ("node" in fault) need(fault.node, nodes, "node");
    if ("gateway" in fault) need(fault.gateway, gateways, "gateway");
    if (fault.kind === "actor") {
      const [root = "", ...rest] = fault.actor.split("/");
      if (root === "nodes") need(rest.join("/"), nodes, "node");
      else {
        need(root, gateways, "gateway");
        need(rest.join("/").replace(/^cache\/[0-7]$/, "cache/0"), actors, "actor");
      }
    }
    if (fault.kind !== "partition" && fault.kind !== "reset-link") continue;
    const ends = [fault.from, fault.to];
    if (fault.from === fault.to) throw wrong("it names one gateway twice");
    const known = fault.kind === "partition" ? [...gateways, ...nodes] : gateways;
    for (const end of ends) {
      need(end, known, fault.kind === "partition" ? "gateway or node" : "gateway");
    }
    if (!ends.some((end) => gateways.includes(end))) {
      throw wrong("nodes do not talk to each other; one end must be a gateway");
    }
  }
}
