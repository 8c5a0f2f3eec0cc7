/**
 * The stored questions in Redis: written when learnt, read back in pages when a shard begins anew, searched where Redis
 * has an index, forgotten for good when found wrong.
 *
 * All but the search runs on a connection of its own, so that a page of questions never stands before a lookup. Redis
 * runs one command at a time, so each is small: a page is at most 64 entries or about 1 MiB, whichever is less, and a
 * write drops at most 8 members that have expired.
 *
 * Redis away, slow or full costs what it does not hold, never an error:
 * - what is learnt meanwhile is not written; writes without a reply are bounded in number and bytes.
 * - what is forgotten is kept in a bounded list and sent again whenever Redis is there anew, also when it had been done:
 *   a Redis that comes back from an older copy does not bring a wrong answer with it.
 * - a page that cannot be had is not answered: the shard asks for it again later, and loses no bucket.
 * - entries that are corrupt, foreign or too large are left out and counted; corrupt ones are removed.
 */
import type { Recalled, StoreCommand } from "../actors/edges.ts";
import type { StoredQuestion } from "../actors/protocol.ts";
import { isAlreadyThere, type QuestionIndex, SIMILARITY_SLACK } from "./redis-index.ts";
import type { Commands, RedisLink, Words } from "./redis-link.ts";
import type { Rest } from "./redis-rest.ts";
import {
  bucketOf,
  decodeQuestion,
  encodeQuestion,
  type KeyNames,
  type Member,
  memberFor,
  partsOf,
  questionFields,
  type Unreadable,
} from "./redis-values.ts";

/** Counts since the start, but for `forgetsWaiting`. */
export type QuestionStats = {
  remembered: number;
  /** Not written: Redis away or resting, too many writes open, too large, or no life left. */
  remembersDropped: number;
  remembersFailed: number;
  /** Entries written, but refused by the index. */
  indexFailed: number;
  forgotten: number;
  /** Not done yet: Redis is away, or has not replied. */
  forgetsWaiting: number;
  /** Not known any more: too many came after them. */
  forgetsLost: number;
  pages: number;
  recalled: number;
  /** Pages not answered, because Redis was away, or failed: they are asked for again. */
  recallsAway: number;
  recallsFailed: number;
  /** Entries left out of pages and searches, by reason. */
  leftOutGone: number;
  leftOutCorrupt: number;
  leftOutForeign: number;
  leftOutLarge: number;
  leftOutForgotten: number;
  /** Searches that found some, or none; and those that could not be made. */
  nearestFound: number;
  nearestNone: number;
  nearestAway: number;
  /** Redis does not have what its index needs. */
  nearestLacking: number;
  nearestResting: number;
  nearestLate: number;
  nearestFailed: number;
};

export type QuestionsOptions = {
  /** A larger answer is neither written nor read. */
  answerBytesMax: number;
  /** For a search. */
  timeoutMs: number;
};

type Nearest = Extract<StoreCommand, { kind: "store.nearest" }>;
type Recall = Extract<StoreCommand, { kind: "store.recall" }>;
type Forget = Extract<StoreCommand, { kind: "store.forget" }>;

/** Writes without a reply so far, and their bytes; more are dropped: the store is a copy, not a ledger. */
const WRITES_OPEN_MAX = 256;
const WRITE_BYTES_OPEN_MAX = 32 << 20;
/** Beside the answer: question, vector, names. */
const ENTRY_BYTES_MORE = 128 << 10;
const PAGE_ENTRIES_MAX = 64;
const PAGE_BYTES_MAX = 1 << 20;
/** By one write, which adds one: enough to keep up, and few, since an index takes its time for each. */
const EXPIRED_DROPPED_MAX = 8;
/** Entries found wrong that are known here; about 200 bytes each. */
const FORGETS_MAX = 10_000;
/** Sent at a time. */
const FORGETS_OPEN_MAX = 64;
/** A page that is asked for while Redis connects waits this long: less than its shard does. */
const RECALL_WAIT_MS = 3000;
/** Pages waiting so at once; beyond that they are not answered. */
const RECALLS_WAITING_MAX = 256;
/** Best first; the exact cosine then decides (reference: rank 8, keep the best). */
const CANDIDATES = 8;

/**
 * KEYS: entry, bucket. ARGV: life in ms, member, how many expired members to drop at most, then the entry's fields.
 * Returns the members dropped. Time is Redis's own.
 */
const REMEMBER = `
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[2], now + ARGV[1], ARGV[2])
if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[1]) then redis.call('PEXPIRE', KEYS[2], ARGV[1]) end
local expired = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[3])
if #expired > 0 then redis.call('ZREM', KEYS[2], unpack(expired)) end
return expired`;

/**
 * KEYS: entries. ARGV: bytes of a page, bytes of an entry, then the fields. Returns, for as many entries as fit into a
 * page, but one at least: what is left of its life and its fields, or why it is not read.
 */
const READ = `
local page, bytes = {}, 0
for at, key in ipairs(KEYS) do
  local size = 0
  for field = 3, #ARGV do
    local length = redis.pcall('HSTRLEN', key, ARGV[field])
    if type(length) ~= 'number' then size = -1 break end
    size = size + length
  end
  if size < 0 then page[at] = 'foreign'
  elseif size == 0 then page[at] = redis.call('EXISTS', key) == 1 and 'foreign' or 'gone'
  elseif size > tonumber(ARGV[2]) then page[at] = 'large'
  else
    if at > 1 and bytes + size > tonumber(ARGV[1]) then break end
    bytes = bytes + size
    page[at] = {redis.call('PTTL', key), redis.call('HMGET', key, unpack(ARGV, 3))}
  end
end
return page`;

/** One entry as read. `foreign`, `corrupt`, `large`, `gone`: why it is left out. */
type Read = StoredQuestion | Unreadable | "large" | "gone";

export class RedisQuestions {
  readonly #options: QuestionsOptions;
  readonly #names: KeyNames;
  /** For searches: the lookups' own. */
  readonly #lookups: RedisLink;
  readonly #rest: Rest;
  readonly #index: QuestionIndex | undefined;
  /** As last seen; undefined = not known, and tried. */
  #hasIndex: boolean | undefined;
  readonly #connect: () => RedisLink;
  /** For everything else; made when first needed. */
  #link: RedisLink | undefined;
  #writesOpen = 0;
  #writeBytesOpen = 0;
  readonly #writes = new Set<Promise<unknown>>();
  /** By entry, in the order in which they came; done or not. */
  readonly #forgets = new Map<string, { member: Member; isDone: boolean }>();
  #isForgetting = false;
  #recallsWaiting = 0;
  /** Grows when a purge has ended: what was read before is void. */
  #epoch = 0;
  readonly #counts = {
    remembered: 0,
    remembersDropped: 0,
    remembersFailed: 0,
    indexFailed: 0,
    forgotten: 0,
    forgetsLost: 0,
    pages: 0,
    recalled: 0,
    recallsAway: 0,
    recallsFailed: 0,
    leftOutGone: 0,
    leftOutCorrupt: 0,
    leftOutForeign: 0,
    leftOutLarge: 0,
    leftOutForgotten: 0,
    nearestFound: 0,
    nearestNone: 0,
    nearestAway: 0,
    nearestLacking: 0,
    nearestResting: 0,
    nearestLate: 0,
    nearestFailed: 0,
  };

  /**
   * @param lookups shared with exact lookups, as is the rest that a late reply brings.
   * @param connect makes the connection for all that may take longer.
   */
  constructor(
    options: QuestionsOptions,
    names: KeyNames,
    lookups: RedisLink,
    rest: Rest,
    index: QuestionIndex | undefined,
    connect: () => RedisLink,
  ) {
    this.#options = options;
    this.#names = names;
    this.#lookups = lookups;
    this.#rest = rest;
    this.#index = index;
    this.#connect = connect;
  }

  stats(): QuestionStats {
    let forgetsWaiting = 0;
    for (const { isDone } of this.#forgets.values()) if (!isDone) forgetsWaiting++;
    return { ...this.#counts, forgetsWaiting };
  }

  async close(): Promise<void> {
    await this.#link?.close();
  }

  #background(): RedisLink {
    if (this.#link !== undefined) return this.#link;
    const link = this.#connect();
    this.#link = link;
    link.watch(
      () => this.#onReady(link),
      () => {},
    );
    return link;
  }

  #onReady(link: RedisLink): void {
    this.#index?.reset();
    for (const forget of this.#forgets.values()) forget.isDone = false; // It may be an older copy.
    void this.#sendForgets(link);
  }

  // ---- writing --------------------------------------------------------------------------------------------

  remember(question: StoredQuestion): void {
    const link = this.#background();
    const lifeMs = Math.floor(question.ttlMs);
    const isBusy =
      this.#writesOpen >= WRITES_OPEN_MAX || this.#writeBytesOpen >= WRITE_BYTES_OPEN_MAX;
    const isLarge = question.answer.body.byteLength > this.#options.answerBytesMax;
    if (!link.isConnected || this.#rest.isOn || isBusy || isLarge || lifeMs < 1) {
      this.#counts.remembersDropped++;
      return;
    }
    const { member, words, bytes } = encodeQuestion(question, lifeMs);
    if (bytes > this.#entryBytesMax() || partsOf(member) === undefined) {
      this.#counts.remembersDropped++;
      return;
    }
    const keys = [this.#names.question(member), this.#names.bucket(bucketOf(question.scope))];
    const commands: Words[] = [
      ["EVAL", REMEMBER, keys.length, ...keys, lifeMs, member, EXPIRED_DROPPED_MAX, ...words],
    ];
    if (this.#hasIndex !== false)
      commands.push(...(this.#index?.add(member, question.vector, lifeMs) ?? []));
    this.#writesOpen++;
    this.#writeBytesOpen += bytes;
    const write = link.batch(commands).then(
      (replies) => this.#onWritten(link, replies),
      () => void this.#counts.remembersFailed++,
    );
    this.#writes.add(write);
    void write.finally(() => {
      this.#writes.delete(write);
      this.#writesOpen--;
      this.#writeBytesOpen -= bytes;
    });
  }

  #onWritten(link: RedisLink, [expired, ...indexed]: readonly unknown[]): void {
    if (!Array.isArray(expired)) {
      this.#counts.remembersFailed++;
      return;
    }
    this.#counts.remembered++;
    if (indexed.some((reply) => reply instanceof Error && !isAlreadyThere(reply)))
      this.#counts.indexFailed++;
    this.#sendRemoves(link, expired.map(String));
  }

  /** Takes members off the index whose entries are gone; if it fails, they are met again. */
  #sendRemoves(redis: Commands, members: readonly Member[]): void {
    const commands = members.flatMap((member) => this.#unindexing(member));
    if (commands.length > 0) redis.batch(commands).catch(() => undefined);
  }

  #unindexing(member: Member): Words[] {
    return this.#hasIndex === false ? [] : (this.#index?.remove(member) ?? []);
  }

  #entryBytesMax(): number {
    return this.#options.answerBytesMax + ENTRY_BYTES_MORE;
  }

  // ---- forgetting -----------------------------------------------------------------------------------------

  forget({ entryId, scope, tenant }: Omit<Forget, "kind">): void {
    const link = this.#background();
    if (this.#forgets.size >= FORGETS_MAX) this.#forgetOldest();
    this.#forgets.set(entryId, { member: memberFor({ entryId, scope, tenant }), isDone: false });
    if (link.isConnected) void this.#sendForgets(link);
  }

  #forgetOldest(): void {
    const oldest = this.#forgets.entries().next();
    if (oldest.done) return;
    const [entryId, { isDone }] = oldest.value;
    if (!isDone) this.#counts.forgetsLost++;
    this.#forgets.delete(entryId);
  }

  /** Sends what is not done, some at a time, until all is or Redis fails; then the next occasion goes on. */
  async #sendForgets(link: RedisLink): Promise<void> {
    if (this.#isForgetting) return; // The one that runs comes to the new ones, too.
    this.#isForgetting = true;
    try {
      for (;;) {
        const waiting = [...this.#forgets]
          .filter(([, { isDone }]) => !isDone)
          .slice(0, FORGETS_OPEN_MAX);
        if (waiting.length === 0) return;
        const done = await Promise.all(
          waiting.map(([, forget]) => this.#sendForget(link, forget.member)),
        );
        for (const [at, [, forget]] of waiting.entries()) forget.isDone = done[at] === true;
        this.#counts.forgotten += done.filter(Boolean).length;
        if (done.includes(false)) return;
      }
    } finally {
      this.#isForgetting = false;
    }
  }

  async #sendForget(link: RedisLink, member: Member): Promise<boolean> {
    const bucket = partsOf(member)?.bucket;
    if (bucket === undefined) return true; // No such entry can be there.
    const commands: Words[] = [
      ["UNLINK", this.#names.question(member)],
      ["ZREM", this.#names.bucket(bucket), member],
      ...this.#unindexing(member),
    ];
    try {
      // An index that refuses has no say: an entry that is gone is not found through it.
      const [unlinked, removed] = await link.batch(commands);
      return !(unlinked instanceof Error) && !(removed instanceof Error);
    } catch {
      return false;
    }
  }

  /** Tries again what was not done; for quiet moments. */
  retry(): void {
    if (this.#link?.isConnected === true) void this.#sendForgets(this.#link);
  }

  // ---- purging --------------------------------------------------------------------------------------------

  /** Resolves when the writes open now have their replies: a purge then finds what they wrote. */
  async writesEnded(): Promise<void> {
    await Promise.all(this.#writes);
  }

  /** What goes with an entry that a purge removes; all keys are in its bucket. */
  removalOf(member: Member): Words[] {
    const parts = partsOf(member);
    if (parts === undefined) return [];
    return [
      ["ZREM", this.#names.bucket(parts.bucket), member],
      ["UNLINK", this.#names.vectors(parts.scope)], // The scope is its tenant's: all of it goes.
    ];
  }

  purged(): void {
    this.#epoch++;
  }

  // ---- recalling ------------------------------------------------------------------------------------------

  /** Calls `answer` once, or never where Redis cannot be had: then the page is asked for again. */
  async recall({ bucket, cursor }: Recall, answer: (page: Recalled) => void): Promise<void> {
    const link = this.#background();
    if (!link.isConnected && !(await this.#untilConnected(link))) {
      this.#counts.recallsAway++;
      return;
    }
    const name = bucket.toString(16).padStart(3, "0");
    try {
      let epoch: number;
      let page: Recalled;
      do {
        epoch = this.#epoch;
        page = await this.#page(link, name, cursor);
      } while (epoch !== this.#epoch); // A purge ended meanwhile: some of it may be gone.
      this.#counts.pages++;
      this.#counts.recalled += page.questions.length;
      answer(page);
    } catch (error) {
      this.#counts.recallsFailed++;
      // Somebody else's key has the bucket's name, and will have it tomorrow: the next bucket may be well.
      if (error instanceof Error && error.message.startsWith("WRONGTYPE"))
        answer({ questions: [] });
    }
  }

  async #untilConnected(link: RedisLink): Promise<boolean> {
    if (this.#recallsWaiting >= RECALLS_WAITING_MAX) return false;
    this.#recallsWaiting++;
    const isConnected = await link.untilConnected(RECALL_WAIT_MS);
    this.#recallsWaiting--;
    return isConnected;
  }

  /**
   * In the order of expiry, so that the newest come last, and stay where memory is short. A cursor is the score to go
   * on at, and how many of that very score have been read: what comes and goes meanwhile does not disturb it, but that
   * one of the same millisecond may be passed over when another one leaves in between.
   */
  async #page(link: RedisLink, bucket: string, cursor: string): Promise<Recalled> {
    const [, from = "-inf", skipText = "0"] = /^([^:]+):(\d+)$/.exec(cursor) ?? [];
    const skip = Number(skipText);
    const key = this.#names.bucket(bucket);
    const listed = await link.call([
      "ZRANGEBYSCORE",
      ...[key, from, "+inf", "WITHSCORES", "LIMIT", skip, PAGE_ENTRIES_MAX],
    ]);
    const rows = rowsOf(listed);
    if (rows.length === 0) return { questions: [] };
    const members = rows.map(({ member }) => member);
    const strange = members.filter((member) => partsOf(member)?.bucket !== bucket);
    if (strange.length > 0) {
      // Nothing of ours, in a key of ours. Without them, so that they do not count in cursors.
      this.#counts.leftOutForeign += strange.length;
      await link.call(["ZREM", key, ...strange]);
      return this.#page(link, bucket, cursor);
    }
    const reads = await this.#read(link, members);
    const questions: StoredQuestion[] = [];
    const dropped: Member[] = [];
    // A page ends where its bytes do.
    for (const [at, read] of reads.entries()) {
      const member = members[at] ?? "";
      const question = this.#accepted(member, read);
      if (question !== undefined) questions.push(question);
      if (read === "gone" || read === "corrupt") dropped.push(member);
    }
    await this.#drop(link, bucket, dropped);
    if (reads.length === rows.length && rows.length < PAGE_ENTRIES_MAX) return { questions };
    const score = rows[reads.length - 1]?.score ?? from;
    const gone = new Set(dropped);
    const stay = rows
      .slice(0, reads.length)
      .filter((row) => row.score === score && !gone.has(row.member)).length;
    return { questions, cursor: `${score}:${(score === from ? skip : 0) + stay}` };
  }

  /** Members whose entry is gone, and entries that are not whole. */
  async #drop(link: RedisLink, bucket: string, members: readonly Member[]): Promise<void> {
    if (members.length === 0) return;
    await link.batch([
      ["ZREM", this.#names.bucket(bucket), ...members],
      ...members.flatMap((member): Words[] => [
        ["UNLINK", this.#names.question(member)],
        ...this.#unindexing(member),
      ]),
    ]);
  }

  /** Of as many as fit into a page. */
  async #read(redis: Commands, members: readonly Member[]): Promise<Read[]> {
    const keys = members.map((member) => this.#names.question(member));
    const bounds = [PAGE_BYTES_MAX, this.#entryBytesMax()];
    const reply = await redis.call([
      "EVAL",
      READ,
      keys.length,
      ...keys,
      ...bounds,
      ...questionFields,
    ]);
    if (!Array.isArray(reply) || reply.length === 0) throw new Error("the script failed");
    return reply.map((read: unknown, at): Read => {
      const member = members[at] ?? "";
      if (!Array.isArray(read)) return whyNot(String(read));
      const [ttlMs, values] = read;
      if (typeof ttlMs !== "number" || !Array.isArray(values)) return "corrupt";
      return decodeQuestion(member, values, ttlMs);
    });
  }

  /** Counts what is left out, and why. */
  #accepted(member: Member, read: Read): StoredQuestion | undefined {
    if (read === "gone") this.#counts.leftOutGone++;
    else if (read === "corrupt") this.#counts.leftOutCorrupt++;
    else if (read === "foreign") this.#counts.leftOutForeign++;
    else if (read === "large") this.#counts.leftOutLarge++;
    else if (this.#forgets.has(partsOf(member)?.entryId ?? "")) this.#counts.leftOutForgotten++;
    else return read;
    return undefined;
  }

  // ---- searching ------------------------------------------------------------------------------------------

  /** Whether all masters have what the index needs; undefined where that cannot be seen, or none is wanted. */
  async seeIndex(): Promise<boolean | undefined> {
    const index = this.#index;
    if (index === undefined) return undefined;
    try {
      const replies = await Promise.all(
        this.#lookups.masters().map((master) => master.call(["COMMAND", "INFO", index.command])),
      );
      this.#hasIndex = replies.every((reply) => Array.isArray(reply) && Array.isArray(reply[0]));
    } catch {
      this.#hasIndex = undefined;
    }
    return this.#hasIndex;
  }

  /** Calls `answer` once, within the time-out; with none where Redis cannot be asked. */
  nearest(nearest: Nearest, answer: (found: Recalled) => void): void {
    this.#background(); // What is learnt after this is to find it connected.
    const index = this.#index;
    if (index === undefined || this.#hasIndex === false) {
      this.#counts.nearestLacking++;
      return answer({ questions: [] });
    }
    if (!this.#lookups.isConnected) {
      this.#counts.nearestAway++;
      return answer({ questions: [] });
    }
    const epoch = this.#epoch;
    this.#rest.ask(
      this.#options.timeoutMs,
      () => this.#search(index, nearest),
      (got) => {
        const found = typeof got === "string" || epoch !== this.#epoch ? [] : got.value;
        if (got === "resting") this.#counts.nearestResting++;
        else if (got === "late") this.#counts.nearestLate++;
        else if (got === "failed") this.#counts.nearestFailed++;
        else if (found.length > 0) this.#counts.nearestFound++;
        else this.#counts.nearestNone++;
        answer({ questions: found });
      },
    );
  }

  /** The index says who may be near; the stored vectors say who is. */
  async #search(index: QuestionIndex, nearest: Nearest): Promise<StoredQuestion[]> {
    const { scope, vector, similarityMin, count } = nearest;
    const redis = this.#lookups;
    const wanted = Math.max(CANDIDATES, count);
    const near = await index.search(redis, scope, vector, wanted);
    const members = near
      .filter(({ similarity }) => similarity >= similarityMin - SIMILARITY_SLACK)
      .map(({ member }) => member)
      .filter((member) => partsOf(member)?.scope === scope);
    if (members.length === 0) return [];
    const found: { question: StoredQuestion; similarity: number }[] = [];
    const gone: Member[] = [];
    for (const [at, read] of (await this.#read(redis, members)).entries()) {
      const member = members[at] ?? "";
      if (read === "gone") gone.push(member);
      const question = this.#accepted(member, read);
      const similarity = question === undefined ? -1 : cosine(question.vector, vector);
      if (question !== undefined && similarity >= similarityMin)
        found.push({ question, similarity });
    }
    this.#sendRemoves(redis, gone);
    found.sort((one, other) => other.similarity - one.similarity);
    return found.slice(0, count).map(({ question }) => question);
  }
}

function whyNot(word: string): Read {
  return word === "gone" || word === "large" ? word : "foreign";
}

/** Of two unit vectors; -1 where their dimensions differ. */
function cosine(one: Float32Array, other: Float32Array): number {
  if (one.length !== other.length) return -1;
  return one.reduce((sum, value, at) => sum + value * (other[at] ?? 0), 0);
}

function rowsOf(reply: unknown): { member: Member; score: string }[] {
  if (!Array.isArray(reply)) return [];
  const rows: { member: Member; score: string }[] = [];
  for (let at = 0; at + 1 < reply.length; at += 2)
    rows.push({ member: String(reply[at]), score: String(reply[at + 1]) });
  return rows;
}
