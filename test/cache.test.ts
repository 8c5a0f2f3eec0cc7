import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  CacheActor,
  type CacheDescription,
  type CacheOptions,
  cacheDefaults,
  type FlightNews,
  type FlightResult,
  type LookupReply,
} from "../actors/cache.ts";
import type { StoreCommand } from "../actors/edges.ts";
import type { StoredAnswer } from "../actors/protocol.ts";
import type { ActorRef, AskFailure } from "../runtime/actor.ts";
import { refTo, testActor } from "./actor-kit.ts";

const OWNERS = ["here/requests", "there/requests"] as const;
const STORE = refTo<StoreCommand>("edges/store");

/** `model` names the key it answers, so that an answer in the wrong place shows. */
function answerFor(key: string, bytes = 100): StoredAnswer {
  return {
    body: new Uint8Array(0),
    bytes,
    route: "chat",
    model: key,
    promptTokens: 1,
    outputTokens: 1,
  };
}

type Lookup = {
  requestId: string;
  key?: string;
  tenant?: string;
  owner?: string;
  read?: boolean;
  lead?: boolean;
};
type News = { to: string } & FlightNews;

/** One shard with a few words for talking to it; `said` is what its last turns replied and told. */
class Shard {
  readonly kit;
  readonly #askers = new Map<number, string>();

  constructor(options: Partial<CacheOptions> = {}, store?: ActorRef<StoreCommand>) {
    this.kit = testActor(new CacheActor({ ...cacheDefaults, ...options }, store));
  }

  lookup(lookup: Lookup): LookupReply | undefined {
    const {
      requestId,
      key = "k",
      tenant = "t",
      owner = OWNERS[0],
      read = true,
      lead = true,
    } = lookup;
    const participant = refTo<FlightNews>(owner);
    return this.kit.ask<LookupReply>((replyTo) => {
      this.#askers.set(replyTo.askId, requestId);
      return { kind: "cache.lookup", key, tenant, requestId, read, lead, participant, replyTo };
    });
  }

  end(flightId: string, result: FlightResult, key = "k"): void {
    this.kit.send({ kind: "cache.flight_ended", key, flightId, result });
  }

  commit(flightId: string, key = "k"): void {
    this.kit.send({ kind: "cache.flight_committed", key, flightId, node: "n", attempts: 1 });
  }

  leave(requestId: string, key = "k"): void {
    this.kit.send({ kind: "cache.leave", key, requestId });
  }

  purge(tenant?: string): { removed: number } | undefined {
    return this.kit.ask<{ removed: number }>((replyTo) => ({
      kind: "cache.purge",
      ...(tenant === undefined ? {} : { tenant }),
      replyTo,
    }));
  }

  describe(): CacheDescription {
    const description = this.kit.ask<CacheDescription>((replyTo) => ({
      kind: "cache.describe",
      replyTo,
    }));
    if (description === undefined) throw new Error("describe is answered at once");
    return description;
  }

  /** Replies by request and news, since the last call. */
  heard(): { replies: [string, LookupReply][]; news: News[] } {
    const replies: [string, LookupReply][] = [];
    const news: News[] = [];
    for (const effect of this.kit.take()) {
      if (effect.kind === "reply") {
        const requestId = this.#askers.get(effect.askId);
        if (requestId !== undefined) replies.push([requestId, effect.value as LookupReply]);
      }
      if (effect.kind === "tell" && effect.to !== STORE.path)
        news.push({ to: effect.to, ...(effect.message as FlightNews) });
    }
    return { replies, news };
  }

  news(): News[] {
    return this.heard().news;
  }
}

const stored = (key = "k"): FlightResult => ({ kind: "stored", answer: answerFor(key) });
const own: FlightResult = {
  kind: "failed",
  code: "rate_limit_tokens",
  retryAfterMs: 7,
  shared: false,
};
const shared: FlightResult = {
  kind: "failed",
  code: "no_node",
  message: "all down",
  retryAfterMs: 500,
  shared: true,
};

describe("cache: one flight", () => {
  it("cache: the first of a key leads, the next join, a kept answer is a hit with its age", () => {
    const shard = new Shard({ ttlMs: 1000 });
    expect(shard.lookup({ requestId: "a" })).toEqual({ kind: "lead", flightId: "a" });
    expect(shard.lookup({ requestId: "b" })).toEqual({ kind: "join", flightId: "a" });
    expect(shard.lookup({ requestId: "x", key: "other" })).toEqual({ kind: "lead", flightId: "x" });
    shard.commit("a");
    expect(shard.news()).toEqual([
      {
        to: OWNERS[0],
        kind: "flight.committed",
        requestId: "b",
        flightId: "a",
        node: "n",
        attempts: 1,
      },
    ]);
    expect(shard.lookup({ requestId: "c" })).toEqual({
      kind: "join",
      flightId: "a",
      committed: { node: "n", attempts: 1 },
    });
    shard.end("a", stored());
    expect(shard.news()).toEqual([
      { to: OWNERS[0], kind: "flight.ended", requestId: "b", flightId: "a" },
      { to: OWNERS[0], kind: "flight.ended", requestId: "c", flightId: "a" },
    ]);
    shard.kit.advance(300);
    expect(shard.lookup({ requestId: "d" })).toEqual({
      kind: "hit",
      answer: answerFor("k"),
      ageMs: 300,
    });
    shard.kit.advance(700);
    expect(shard.lookup({ requestId: "e" })).toEqual({ kind: "lead", flightId: "e" });
  });

  it("cache: an answer that was not stored ends the flight and leaves nothing", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    shard.commit("a");
    shard.end("a", { kind: "not_stored", reason: "length" });
    expect(shard.news().map((news) => news.kind)).toEqual(["flight.committed", "flight.ended"]);
    expect(shard.describe()).toMatchObject({ entries: 0, flights: 0, participants: 0, stores: 0 });
  });

  it("cache: a failure of everyone's is told to every joiner, word for word", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    shard.end("a", shared);
    expect(shard.news()).toEqual([
      {
        to: OWNERS[0],
        kind: "flight.failed",
        requestId: "b",
        flightId: "a",
        code: "no_node",
        message: "all down",
        retryAfterMs: 500,
      },
    ]);
    expect(shard.lookup({ requestId: "c" })).toEqual({ kind: "lead", flightId: "c" });
  });

  it("cache: a leader that fails for a reason of its own hands over to the one that waited longest", () => {
    const shard = new Shard();
    for (const requestId of ["a", "b", "c"]) shard.lookup({ requestId });
    shard.end("a", own);
    expect(shard.news()).toEqual([
      { to: OWNERS[0], kind: "flight.promoted", key: "k", requestId: "b", flightId: "b" },
    ]);
    shard.commit("a"); // The former leader has no say any more.
    expect(shard.news()).toEqual([]);
    shard.commit("b");
    expect(shard.lookup({ requestId: "d" })).toMatchObject({ kind: "join", flightId: "b" });
    expect(shard.news()).toMatchObject([
      { kind: "flight.committed", requestId: "c", flightId: "b" },
    ]);
    shard.end("b", stored());
    expect(shard.news().map((news) => [news.kind, news.requestId, news.flightId])).toEqual([
      ["flight.ended", "c", "b"],
      ["flight.ended", "d", "b"],
    ]);
    expect(shard.describe()).toMatchObject({ flights: 0, participants: 0, stale: 1 });
  });

  it("cache: nobody is promoted after the first token, nor when nobody else is there", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    shard.commit("a");
    shard.news();
    shard.end("a", own);
    expect(shard.news()).toMatchObject([
      { kind: "flight.failed", requestId: "b", code: "rate_limit_tokens" },
    ]);
    shard.lookup({ requestId: "c" });
    shard.end("c", own);
    expect(shard.news()).toEqual([]);
    expect(shard.describe().flights).toBe(0);
  });

  it("cache: a flight is abandoned when the last client has left, its leader's included (any order)", () => {
    for (const order of [
      ["a", "b", "c"],
      ["c", "b", "a"],
      ["b", "a", "c"],
    ]) {
      const shard = new Shard();
      for (const requestId of ["a", "b", "c"]) shard.lookup({ requestId });
      shard.news();
      for (const requestId of order.slice(0, 2)) shard.leave(requestId);
      for (const requestId of order.slice(0, 2)) shard.leave(requestId); // Twice changes nothing.
      expect(shard.news()).toEqual([]);
      shard.leave(order[2] ?? "");
      expect(shard.news()).toEqual([
        { to: OWNERS[0], kind: "flight.abandoned", requestId: "a", flightId: "a" },
      ]);
      expect(shard.describe()).toMatchObject({ flights: 0, participants: 0 });
      shard.end("a", stored()); // Too late: nobody can say what happened since.
      expect(shard.describe()).toMatchObject({ entries: 0, stale: 1 });
    }
  });

  it("cache: who asks is told when every joiner's news is on its way (a flight, and one long over)", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    shard.commit("a");
    for (const _ of ["the flight", "nothing any more"]) {
      shard.kit.take();
      const closed = shard.kit.ask((replyTo) => ({
        kind: "cache.flight_ended",
        key: "k",
        flightId: "a",
        result: stored(),
        replyTo,
      }));
      expect(closed).toEqual({ kind: "closed" });
      expect(shard.kit.effects().at(-1)?.kind).toBe("reply"); // After the news, not before.
    }
    expect(shard.describe().flights).toBe(0);
  });

  it("cache: a leader whose client left goes on for the others, and its answer is kept", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    shard.leave("a");
    shard.commit("a");
    shard.end("a", stored());
    expect(shard.news().map((news) => news.kind)).toEqual(["flight.committed", "flight.ended"]);
    expect(shard.lookup({ requestId: "c" })?.kind).toBe("hit");
  });

  it("cache: joiners of a flight that ends well but was never said to begin get an error, not silence", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    shard.end("a", stored()); // Its flight_committed was lost on a full mailbox.
    expect(shard.news()).toMatchObject([
      { kind: "flight.failed", requestId: "b", code: "internal" },
    ]);
    expect(shard.lookup({ requestId: "c" })?.kind).toBe("hit");
  });

  it("cache: a restarted owner takes its flights and memberships with it; others are told", () => {
    const shard = new Shard();
    const [here, there] = OWNERS;
    shard.lookup({ requestId: "a", owner: here });
    shard.lookup({ requestId: "b", owner: there });
    shard.lookup({ requestId: "c", owner: here });
    shard.lookup({ requestId: "p", key: "q", owner: there });
    shard.lookup({ requestId: "r", key: "q", owner: here });
    shard.lookup({ requestId: "s", key: "z", owner: there });
    shard.lookup({ requestId: "u", key: "z", owner: here });
    shard.leave("s", "z"); // Only the restarting owner's request is left in this one.
    shard.kit.send({ kind: "cache.owner_restarted", owner: here });
    expect(shard.news()).toEqual([
      { to: there, kind: "flight.failed", requestId: "b", flightId: "a", code: "internal" },
      { to: there, kind: "flight.abandoned", requestId: "s", flightId: "s" },
    ]);
    expect(shard.describe()).toMatchObject({ flights: 1, participants: 1 });
    shard.commit("p", "q");
    shard.end("p", stored("q"), "q");
    expect(shard.news()).toEqual([]);
    expect(shard.describe()).toMatchObject({ flights: 0, participants: 0 });
  });

  it("cache: a flight that nobody ends is given up, and its joiners told (flightMsMax)", () => {
    const shard = new Shard({ flightMsMax: 10_000 });
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    shard.kit.advance(9000);
    shard.lookup({ requestId: "y", key: "young" });
    expect(shard.describe().flights).toBe(2);
    shard.kit.advance(2000);
    expect(shard.kit.emitted()).toEqual([
      { kind: "cache.flight_lapsed", flightId: "a", joiners: 1 },
    ]);
    expect(shard.news()).toMatchObject([
      { kind: "flight.failed", requestId: "b", code: "internal" },
    ]);
    expect(shard.describe()).toMatchObject({ flights: 1, participants: 1, lapses: 1 });
  });

  it("cache: a promoted leader has the whole time again, and lapses after flights that began before it", () => {
    const shard = new Shard({ flightMsMax: 10_000 });
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    shard.lookup({ requestId: "y", key: "other" });
    shard.kit.advance(5000);
    shard.end("a", own);
    shard.kit.advance(6000);
    expect(shard.kit.emitted()).toEqual([
      { kind: "cache.flight_lapsed", flightId: "y", joiners: 0 },
    ]);
    shard.kit.advance(5000);
    expect(shard.kit.emitted()[1]).toMatchObject({ flightId: "b" });
  });
});

describe("cache: who takes part", () => {
  it("cache: no-cache neither reads nor joins; it may lead and then replaces what is kept", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a" });
    shard.end("a", stored());
    expect(shard.lookup({ requestId: "b", read: false })).toEqual({ kind: "lead", flightId: "b" });
    expect(shard.lookup({ requestId: "c", read: false })).toEqual({ kind: "alone" });
    expect(shard.lookup({ requestId: "d" })?.kind).toBe("hit"); // The older answer, until it is replaced.
    const fresh = answerFor("k");
    shard.end("b", { kind: "stored", answer: fresh });
    const reply = shard.lookup({ requestId: "e" });
    expect(reply?.kind === "hit" && reply.answer === fresh).toBe(true);
  });

  it("cache: no-store reads, and otherwise runs alone (nothing there, or a flight runs)", () => {
    const shard = new Shard();
    expect(shard.lookup({ requestId: "a", lead: false })).toEqual({ kind: "alone" });
    shard.lookup({ requestId: "b" });
    expect(shard.lookup({ requestId: "c", lead: false })).toEqual({ kind: "alone" });
    shard.end("b", stored());
    expect(shard.lookup({ requestId: "d", lead: false })?.kind).toBe("hit");
    expect(shard.lookup({ requestId: "e", read: false, lead: false })).toEqual({ kind: "alone" });
    expect(shard.describe()).toMatchObject({ flights: 0, participants: 0, hits: 1, misses: 4 });
  });

  it("cache: beyond its bounds a request runs alone, and is counted (flights; participants)", () => {
    const shard = new Shard({ flightsMax: 2, participantsMax: 3 });
    expect(shard.lookup({ requestId: "a", key: "1" })?.kind).toBe("lead");
    expect(shard.lookup({ requestId: "b", key: "2" })?.kind).toBe("lead");
    expect(shard.lookup({ requestId: "c", key: "3" })?.kind).toBe("alone");
    expect(shard.lookup({ requestId: "d", key: "1" })?.kind).toBe("join");
    expect(shard.lookup({ requestId: "e", key: "1" })?.kind).toBe("alone");
    expect(shard.describe()).toMatchObject({ flights: 2, participants: 3, overflows: 2 });
    shard.leave("d", "1");
    expect(shard.lookup({ requestId: "f", key: "1" })?.kind).toBe("join");
    const waiting = new Shard({ flightsMax: 1, participantsMax: 2 }, STORE);
    expect(waiting.lookup({ requestId: "a" })).toBeUndefined();
    expect(waiting.lookup({ requestId: "b", key: "2" })?.kind).toBe("alone");
    expect(waiting.lookup({ requestId: "c" })).toBeUndefined();
    expect(waiting.lookup({ requestId: "d" })?.kind).toBe("alone");
    expect(waiting.describe()).toMatchObject({ flights: 1, participants: 2, overflows: 2 });
  });

  it("cache: the same request twice does not join itself", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    expect(shard.lookup({ requestId: "a" })).toEqual({ kind: "alone" });
    expect(shard.lookup({ requestId: "b" })).toEqual({ kind: "alone" });
    expect(shard.describe().participants).toBe(2);
    const stored = new Shard({}, STORE);
    expect(stored.lookup({ requestId: "a" })).toBeUndefined();
    expect(stored.lookup({ requestId: "a" })).toEqual({ kind: "alone" });
    expect(stored.describe().participants).toBe(1);
  });

  it("cache: two tenants under one key share neither answer nor flight", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a", tenant: "red" });
    expect(shard.lookup({ requestId: "b", tenant: "blue" })).toEqual({ kind: "alone" });
    shard.end("a", stored());
    expect(shard.lookup({ requestId: "c", tenant: "blue" })?.kind).toBe("lead");
  });

  it("cache: configure gives later answers the new life, and memory its new bound", () => {
    const shard = new Shard({ ttlMs: 1000 });
    shard.lookup({ requestId: "a" });
    shard.end("a", stored());
    shard.kit.send({ kind: "cache.configure", ttlMs: 5000, bytesMax: 1_000_000 });
    shard.lookup({ requestId: "b", key: "q" });
    shard.end("b", stored("q"), "q");
    shard.kit.advance(1000);
    expect(shard.lookup({ requestId: "c" })?.kind).toBe("lead");
    expect(shard.lookup({ requestId: "d", key: "q" })?.kind).toBe("hit");
    shard.kit.send({ kind: "cache.configure", ttlMs: 5000, bytesMax: 100 });
    expect(shard.describe()).toMatchObject({ entries: 0, bytes: 0, bytesMax: 100, evictions: 1 });
  });

  it("cache: an answer too large is not kept, here or in the store", () => {
    const shard = new Shard({ answerBytesMax: 99 }, STORE);
    shard.lookup({ requestId: "a" });
    shard.kit.answer(0, { ok: true, value: { ttlMs: 0 } });
    shard.kit.take();
    shard.end("a", stored());
    expect(shard.kit.told(STORE.path)).toEqual([]);
    expect(shard.describe()).toMatchObject({ entries: 0, stores: 0, tooLarge: 1 });
  });
});

describe("cache: store and purge", () => {
  it("cache: the store is asked once per key; a hit answers all who wait and fills memory for the rest of its life", () => {
    const shard = new Shard({ ttlMs: 10_000 }, STORE);
    expect(shard.lookup({ requestId: "a" })).toBeUndefined();
    expect(shard.lookup({ requestId: "b", lead: false })).toBeUndefined();
    expect(shard.lookup({ requestId: "c", read: false })).toEqual({ kind: "alone" });
    const asks = shard.kit.effects().filter((effect) => effect.kind === "ask");
    expect(asks).toMatchObject([
      { to: STORE.path, timeoutMs: 50, message: { kind: "store.get", key: "k", tenant: "t" } },
    ]);
    shard.heard();
    shard.kit.advance(20);
    shard.kit.answer(0, { ok: true, value: { answer: answerFor("k"), ttlMs: 4000 } });
    const hit = { kind: "hit", answer: answerFor("k"), ageMs: 6020 };
    expect(shard.heard().replies).toEqual([
      ["a", hit],
      ["b", hit],
    ]);
    shard.kit.advance(3979);
    expect(shard.lookup({ requestId: "d" })).toMatchObject({ kind: "hit", ageMs: 9999 });
    shard.kit.advance(1);
    expect(shard.lookup({ requestId: "e" })).toBeUndefined(); // Over: the store is asked again.
    expect(shard.describe()).toMatchObject({ hits: 1, storeHits: 2, misses: 1 });
  });

  it("cache: after a miss in the store the first that may lead does, the rest join or run alone", () => {
    const shard = new Shard({}, STORE);
    shard.lookup({ requestId: "a", lead: false });
    for (const requestId of ["b", "c"]) shard.lookup({ requestId });
    shard.kit.answer(0, { ok: true, value: { ttlMs: 0 } });
    expect(shard.heard().replies).toEqual([
      ["a", { kind: "alone" }],
      ["b", { kind: "lead", flightId: "b" }],
      ["c", { kind: "join", flightId: "b" }],
    ]);
    shard.end("b", stored());
    expect(shard.kit.told(STORE.path)).toEqual([
      {
        kind: "store.put",
        key: "k",
        tenant: "t",
        answer: answerFor("k"),
        ttlMs: cacheDefaults.ttlMs,
      },
    ]);
  });

  it("cache: a store that is down or late is a miss after its time-out, not an error", () => {
    const shard = new Shard({ storeTimeoutMs: 50 }, STORE);
    shard.lookup({ requestId: "a" });
    shard.kit.advance(49);
    expect(shard.heard().replies).toEqual([]);
    shard.kit.advance(1);
    expect(shard.heard().replies).toEqual([["a", { kind: "lead", flightId: "a" }]]);
    shard.lookup({ requestId: "b", key: "q" });
    shard.kit.answer(1, { ok: false, failure: "busy" });
    expect(shard.heard().replies).toEqual([["b", { kind: "lead", flightId: "b" }]]);
    shard.lookup({ requestId: "c", key: "z" }); // An answer without any life left.
    shard.kit.answer(2, { ok: true, value: { answer: answerFor("z"), ttlMs: 0 } });
    expect(shard.heard().replies).toEqual([["c", { kind: "lead", flightId: "c" }]]);
    expect(shard.describe()).toMatchObject({ storeFailures: 2, entries: 0 });
  });

  it("cache: who leaves while the store is asked is out of it (some; all)", () => {
    const shard = new Shard({}, STORE);
    shard.lookup({ requestId: "a" });
    shard.lookup({ requestId: "b" });
    shard.leave("a");
    expect(shard.heard().replies).toEqual([["a", { kind: "alone" }]]);
    shard.leave("b");
    expect(shard.describe()).toMatchObject({ flights: 0, participants: 0 });
    shard.lookup({ requestId: "c" });
    shard.heard();
    shard.kit.answer(0, { ok: true, value: { ttlMs: 0 } }); // Belongs to those who left.
    expect(shard.heard().replies).toEqual([]);
    shard.kit.answer(1, { ok: true, value: { ttlMs: 0 } });
    expect(shard.heard().replies).toEqual([["c", { kind: "lead", flightId: "c" }]]);
  });

  it("cache: a restarted owner's waiters are not answered; others still are", () => {
    const shard = new Shard({}, STORE);
    shard.lookup({ requestId: "a", owner: OWNERS[0] });
    shard.lookup({ requestId: "b", owner: OWNERS[1] });
    shard.kit.send({ kind: "cache.owner_restarted", owner: OWNERS[0] });
    shard.kit.answer(0, { ok: true, value: { ttlMs: 0 } });
    expect(shard.heard().replies).toEqual([["b", { kind: "lead", flightId: "b" }]]);
  });

  it("cache: an answer whose flight began before a purge of its tenant is not kept, and nobody joins it", () => {
    for (const tenant of ["t", undefined]) {
      const shard = new Shard();
      shard.lookup({ requestId: "a" });
      shard.lookup({ requestId: "b" });
      expect(shard.purge(tenant)).toEqual({ removed: 0 });
      expect(shard.lookup({ requestId: "c" })).toEqual({ kind: "alone" });
      shard.commit("a");
      shard.end("a", stored());
      expect(shard.news().map((news) => [news.kind, news.requestId])).toEqual([
        ["flight.committed", "b"],
        ["flight.ended", "b"],
      ]);
      expect(shard.describe()).toMatchObject({ entries: 0, stores: 0, purgedAnswers: 1 });
      expect(shard.lookup({ requestId: "d" })?.kind).toBe("lead");
      shard.end("d", stored());
      expect(shard.lookup({ requestId: "e" })?.kind).toBe("hit");
    }
  });

  it("cache: a purge of another tenant does not touch a flight; a run promoted after a purge is kept", () => {
    const shard = new Shard();
    shard.lookup({ requestId: "a" });
    shard.purge("someone else");
    expect(shard.lookup({ requestId: "b" })?.kind).toBe("join");
    shard.purge("t");
    shard.end("a", own); // Now b runs, and it begins after the purge.
    shard.commit("b");
    shard.end("b", stored());
    expect(shard.lookup({ requestId: "c" })?.kind).toBe("hit");
  });

  it("cache: what the store said before a purge is void (asked before it, or while it is under way)", () => {
    const shard = new Shard({}, STORE);
    shard.lookup({ requestId: "a" });
    expect(shard.purge("t")).toBeUndefined();
    expect(shard.kit.effects()).toContainEqual(
      expect.objectContaining({ kind: "ask", to: STORE.path, index: 1, timeoutMs: 30_000 }),
    );
    shard.kit.answer(0, { ok: true, value: { answer: answerFor("k"), ttlMs: 1000 } });
    expect(shard.heard().replies).toEqual([["a", { kind: "lead", flightId: "a" }]]);
    expect(shard.lookup({ requestId: "b", key: "q" })).toEqual({ kind: "lead", flightId: "b" });
    expect(shard.lookup({ requestId: "x", key: "z", tenant: "blue" })).toBeUndefined(); // Not its purge.
    shard.kit.answer(1, { ok: true, value: { removed: 5 } });
    expect(shard.kit.emitted()).toEqual([{ kind: "cache.purged", tenant: "t", removed: 5 }]);
    expect(shard.lookup({ requestId: "c", key: "w" })).toBeUndefined(); // The store is asked again.
  });

  it("cache: a purge that the store does not carry out is answered, and said", () => {
    const shard = new Shard({}, STORE);
    shard.lookup({ requestId: "a" });
    shard.kit.answer(0, { ok: true, value: { ttlMs: 0 } });
    shard.end("a", stored());
    shard.purge();
    shard.kit.take();
    shard.kit.advance(30_000);
    expect(shard.kit.emitted()).toEqual([
      { kind: "cache.store_purge_failed", failure: "timeout" },
      { kind: "cache.purged", removed: 1 },
    ]);
    expect(shard.kit.effects()).toContainEqual(
      expect.objectContaining({ kind: "reply", value: { removed: 1 } }),
    );
  });

  it("cache: an idle shard holds no timer once its answers have expired", () => {
    const shard = new Shard({ ttlMs: 5000 });
    for (let i = 0; i < 1000; i++) {
      shard.lookup({ requestId: `r${i}`, key: `k${i}` });
      shard.end(`r${i}`, stored(`k${i}`), `k${i}`);
    }
    expect(shard.kit.timers()).toEqual(["sweep"]);
    shard.kit.advance(60_000);
    expect(shard.describe()).toMatchObject({ entries: 0, bytes: 0, expired: 1000 });
    expect(shard.kit.timers()).toEqual([]);
  });
});

// ---- any conversation ---------------------------------------------------------------------------------------

type Told = {
  key: string;
  tenant: string;
  owner: string;
  read: boolean;
  lead: boolean;
  state: "asked" | "leads" | "joined" | "committed" | "over";
};

/**
 * A model of what may be said, fed with everything the shard says: who leads which key, who has joined, which
 * answers exist and until when. It fails at the first word out of place.
 */
class Checker {
  readonly #shard: Shard;
  readonly #requests = new Map<string, Told>();
  readonly #leaders = new Map<string, string>();
  /** Each answer ever given to the shard: for whom, its end, and the purge count of its tenant when it began. */
  readonly #answers = new Map<
    StoredAnswer,
    { key: string; tenant: string; endsAtMs: number; purges: number }
  >();
  readonly #purges = new Map<string, number>();
  readonly #began = new Map<string, number>();
  readonly #ttlMs: number;
  readonly #openAsks = new Map<
    number,
    { key: string; tenant: string; purges: number; atMs: number }
  >();
  #made = 0;

  constructor(shard: Shard, ttlMs: number) {
    this.#shard = shard;
    this.#ttlMs = ttlMs;
  }

  lookup(key: string, owner: string, read: boolean, lead: boolean): void {
    const requestId = `r${this.#made++}`;
    const tenant = key < "c" ? "red" : "blue";
    this.#requests.set(requestId, { key, tenant, owner, read, lead, state: "asked" });
    this.#shard.lookup({ requestId, key, tenant, owner, read, lead });
    this.listen();
  }

  live(): string[] {
    return [...this.#requests].flatMap(([id, request]) => (request.state === "over" ? [] : [id]));
  }

  leaders(): string[] {
    return [...this.#leaders.values()];
  }

  openAsks(): number[] {
    return [...this.#openAsks.keys()];
  }

  leave(requestId: string): void {
    const request = this.#of(requestId);
    this.#shard.leave(requestId, request.key);
    // A leader still leads after its client has left; everyone else is out and hears nothing more.
    if (request.state === "asked") this.listen();
    if (request.state !== "leads") request.state = "over";
    this.listen();
  }

  commit(leaderId: string): void {
    this.#shard.commit(leaderId, this.#of(leaderId).key);
    this.listen();
  }

  end(leaderId: string, how: "stored" | "not_stored" | "shared" | "own"): void {
    const { key, tenant } = this.#of(leaderId);
    const leads = this.#leaders.get(key) === leaderId;
    if (leads) {
      this.#leaders.delete(key);
      this.#of(leaderId).state = "over";
    }
    const answer = answerFor(key, 400);
    if (how === "stored") {
      const endsAtMs = this.#shard.kit.nowMs + this.#ttlMs;
      const purges = this.#began.get(leaderId) ?? Number.NaN;
      this.#answers.set(answer, { key, tenant, endsAtMs: leads ? endsAtMs : 0, purges });
    }
    const results = {
      stored: { kind: "stored", answer },
      not_stored: { kind: "not_stored", reason: "length" },
      shared,
      own,
    } as const;
    this.#shard.end(leaderId, results[how], key);
    this.listen();
    if (!leads || this.#leaders.has(key)) return;
    for (const [requestId, request] of this.#requests) {
      const joined = request.state === "joined" || request.state === "committed";
      if (request.key === key && joined)
        throw new Error(`${requestId} was not told how its flight ended`);
    }
  }

  answer(index: number, how: "hit" | "miss" | AskFailure): void {
    const ask = this.#openAsks.get(index);
    if (ask === undefined) return;
    this.#openAsks.delete(index);
    if (how === "hit") {
      const answer = answerFor(ask.key, 400);
      const ttlMs = this.#ttlMs / 2;
      this.#answers.set(answer, { ...ask, endsAtMs: ask.atMs + ttlMs });
      this.#shard.kit.answer(index, { ok: true, value: { answer, ttlMs } });
    } else if (how === "miss") this.#shard.kit.answer(index, { ok: true, value: { ttlMs: 0 } });
    else this.#shard.kit.answer(index, { ok: false, failure: how });
    this.listen();
  }

  purge(tenant: string | undefined): void {
    this.#shard.purge(tenant);
    for (const name of tenant === undefined ? ["red", "blue"] : [tenant])
      this.#purges.set(name, this.#purgesOf(name) + 1);
    this.listen();
  }

  restart(owner: string): void {
    for (const request of this.#requests.values()) {
      if (request.owner !== owner || request.state === "over") continue;
      if (request.state === "leads") this.#leaders.delete(request.key);
      request.state = "over";
    }
    this.#shard.kit.send({ kind: "cache.owner_restarted", owner });
    this.listen();
  }

  wait(ms: number): void {
    this.#shard.kit.advance(ms);
    for (const [index, ask] of this.#openAsks)
      if (this.#shard.kit.nowMs >= ask.atMs + 50) this.#openAsks.delete(index);
    this.listen();
  }

  /** Reads everything said since the last time, and checks each word. */
  listen(): void {
    for (const effect of this.#shard.kit.effects()) {
      if (effect.kind !== "ask") continue;
      const message = effect.message as StoreCommand;
      if (message.kind === "store.get") {
        const { key, tenant } = message;
        const purges = this.#purgesOf(tenant);
        this.#openAsks.set(effect.index, { key, tenant, purges, atMs: this.#shard.kit.nowMs });
      }
      if (message.kind === "store.purge") this.#purgeAsks.push(effect.index);
    }
    const { replies, news } = this.#shard.heard();
    for (const [requestId, reply] of replies) this.#onReply(requestId, reply);
    for (const item of news) this.#onNews(item);
    for (const index of this.#purgeAsks.splice(0))
      this.#shard.kit.answer(index, { ok: true, value: { removed: 0 } });
  }

  readonly #purgeAsks: number[] = [];

  #onReply(requestId: string, reply: LookupReply): void {
    const request = this.#of(requestId);
    expect(request.state).toBe("asked");
    request.state = "over";
    if (reply.kind === "hit") {
      const known = this.#answers.get(reply.answer);
      expect(request.read).toBe(true);
      expect(known).toMatchObject({ key: request.key, tenant: request.tenant });
      expect(this.#shard.kit.nowMs).toBeLessThan(known?.endsAtMs ?? 0);
      expect(known?.purges).toBe(this.#purgesOf(request.tenant));
    }
    if (reply.kind === "lead") this.#lead(requestId);
    if (reply.kind === "join") {
      expect(request.read && request.lead).toBe(true);
      expect(this.#leaders.get(request.key)).toBe(reply.flightId);
      expect(this.#began.get(reply.flightId)).toBe(this.#purgesOf(request.tenant));
      request.state = reply.committed === undefined ? "joined" : "committed";
    }
  }

  #onNews(news: News): void {
    const request = this.#of(news.requestId);
    expect(news.to).toBe(request.owner);
    switch (news.kind) {
      case "flight.committed":
        expect(request.state).toBe("joined");
        expect(this.#of(news.flightId).key).toBe(request.key);
        request.state = "committed";
        return;
      case "flight.ended":
        expect(request.state).toBe("committed");
        expect(this.#of(news.flightId).key).toBe(request.key);
        request.state = "over";
        return;
      case "flight.failed":
        expect(["joined", "committed"]).toContain(request.state);
        expect(this.#of(news.flightId).key).toBe(request.key);
        request.state = "over";
        return;
      case "flight.promoted":
        expect(request.state).toBe("joined");
        expect(news.key).toBe(request.key);
        this.#lead(news.requestId);
        return;
      case "flight.abandoned":
        expect(request.state).toBe("leads");
        this.#leaders.delete(request.key);
        request.state = "over";
        return;
    }
  }

  #lead(requestId: string): void {
    const request = this.#of(requestId);
    expect(request.lead).toBe(true);
    expect(this.#leaders.has(request.key)).toBe(false);
    this.#leaders.set(request.key, requestId);
    this.#began.set(requestId, this.#purgesOf(request.tenant));
    request.state = "leads";
  }

  /** All asks answered, all flights ended: nobody may be left, in the model or in the shard. */
  finish(): void {
    this.wait(60);
    for (let leaders = this.leaders(); leaders.length > 0; leaders = this.leaders())
      for (const leader of leaders) this.end(leader, "own");
    expect(this.live()).toEqual([]);
    expect(this.#shard.describe()).toMatchObject({ flights: 0, participants: 0 });
  }

  #of(requestId: string): Told {
    const request = this.#requests.get(requestId);
    if (request === undefined) throw new Error(`nobody asked for ${requestId}`);
    return request;
  }

  #purgesOf(tenant: string): number {
    return this.#purges.get(tenant) ?? 0;
  }
}

const pick = fc.nat({ max: 1000 });
const operation = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      op: fc.constant("lookup" as const),
      key: fc.constantFrom("a", "b", "c"),
      owner: fc.constantFrom(...OWNERS),
      read: fc.boolean(),
      lead: fc.boolean(),
    }),
  },
  {
    weight: 6,
    arbitrary: fc.record({
      op: fc.constant("lookup" as const),
      key: fc.constantFrom("a", "b", "c"),
      owner: fc.constantFrom(...OWNERS),
      read: fc.constant(true),
      lead: fc.constant(true),
    }),
  },
  { weight: 3, arbitrary: fc.record({ op: fc.constant("leave" as const), pick }) },
  { weight: 3, arbitrary: fc.record({ op: fc.constant("commit" as const), pick }) },
  {
    weight: 4,
    arbitrary: fc.record({
      op: fc.constant("end" as const),
      pick,
      how: fc.constantFrom(
        "stored" as const,
        "not_stored" as const,
        "shared" as const,
        "own" as const,
      ),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      op: fc.constant("stale" as const),
      pick,
      how: fc.constantFrom("stored" as const, "own" as const),
    }),
  },
  {
    weight: 3,
    arbitrary: fc.record({
      op: fc.constant("answer" as const),
      pick,
      how: fc.constantFrom("hit" as const, "miss" as const, "disconnected" as const),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      op: fc.constant("purge" as const),
      tenant: fc.constantFrom("red", "blue", undefined),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      op: fc.constant("restart" as const),
      owner: fc.constantFrom(...OWNERS),
    }),
  },
  {
    weight: 3,
    arbitrary: fc.record({
      op: fc.constant("wait" as const),
      ms: fc.integer({ min: 1, max: 400 }),
    }),
  },
);

describe("cache: any conversation", () => {
  for (const store of [undefined, STORE]) {
    it(`cache: one leader a key, one ending each, nothing late, purged, foreign or left over (${store === undefined ? "memory only" : "with a store"})`, () => {
      fc.assert(
        fc.property(
          fc.array(operation, { minLength: 1, maxLength: 80, size: "max" }),
          (operations) => {
            const bytesMax = 12_000; // Room for ten answers, of which one takes less than an eighth.
            const shard = new Shard(
              { ttlMs: 1000, bytesMax, flightsMax: 2, participantsMax: 6 },
              store,
            );
            const checker = new Checker(shard, 1000);
            const ended: string[] = [];
            const of = <T>(list: T[], index: number): T | undefined =>
              list[index % Math.max(1, list.length)];
            for (const step of operations) {
              switch (step.op) {
                case "lookup":
                  checker.lookup(step.key, step.owner, step.read, step.lead);
                  break;
                case "leave": {
                  const requestId = of(checker.live(), step.pick);
                  if (requestId !== undefined) checker.leave(requestId);
                  break;
                }
                case "commit": {
                  const leader = of(checker.leaders(), step.pick);
                  if (leader !== undefined) checker.commit(leader);
                  break;
                }
                case "end": {
                  const leader = of(checker.leaders(), step.pick);
                  if (leader === undefined) break;
                  checker.end(leader, step.how);
                  ended.push(leader);
                  break;
                }
                case "stale": {
                  const leader = of(ended, step.pick);
                  if (leader !== undefined) checker.end(leader, step.how);
                  break;
                }
                case "answer": {
                  const index = of(checker.openAsks(), step.pick);
                  if (index !== undefined) checker.answer(index, step.how);
                  break;
                }
                case "purge":
                  checker.purge(step.tenant);
                  break;
                case "restart":
                  checker.restart(step.owner);
                  break;
                case "wait":
                  checker.wait(step.ms);
                  break;
              }
              const { bytes, flights, participants } = shard.describe();
              expect(bytes).toBeLessThanOrEqual(bytesMax);
              expect(flights).toBeLessThanOrEqual(2);
              expect(participants).toBeLessThanOrEqual(6);
            }
            checker.finish();
          },
        ),
        { numRuns: 400 },
      );
    });
  }
});
