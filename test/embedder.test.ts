/** The edge to an embedder: what a caller gets, when, and what makes it give up on a model. */
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Embedded, EmbedderCommand } from "../actors/edges.ts";
import { LexicalEmbedder } from "../actors/lexical-embedder.ts";
import type { Context, ReplyTo } from "../runtime/actor.ts";
import { Embedder, openBackend, openEmbedder, readableText } from "../transport/embedder.ts";
import {
  type EmbedderBackend,
  EmbedderError,
  type TextVector,
} from "../transport/embedder-backend.ts";
import { defaults } from "../transport/options.ts";

fc.configureGlobal({ seed: 20_251_124 });

const options = { timeoutMs: 50, queueMax: 16, tokensMax: 128 };
const lexical = new LexicalEmbedder(64);

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

/** A model in the test's hands. Until `holds` is set, it answers at once. */
class TestBackend implements EmbedderBackend {
  readonly batchesMax: number;
  vectorOf: (text: string) => TextVector = (text) => lexical.embed(text);
  opens: (() => { id: string; version: string })[] = [];
  holds = false;
  readonly batches: (readonly string[])[] = [];
  readonly open_: { resolve: () => void; reject: (error: Error) => void }[] = [];
  closed = false;

  constructor(batchesMax = 1) {
    this.batchesMax = batchesMax;
  }

  async open(): Promise<{ id: string; version: string }> {
    return this.opens.shift()?.() ?? { id: "test", version: "1" };
  }

  embed(texts: readonly string[], signal: AbortSignal): Promise<readonly TextVector[]> {
    this.batches.push(texts);
    if (!this.holds) return Promise.resolve(texts.map(this.vectorOf));
    return new Promise((resolve, reject) => {
      this.open_.push({ resolve: () => resolve(texts.map(this.vectorOf)), reject });
      signal.addEventListener("abort", () => reject(new EmbedderError("passing", "aborted")));
    });
  }

  async close(): Promise<void> {
    this.closed = true;
  }
}

class Rig {
  readonly logged: string[] = [];
  readonly answers: (Embedded | undefined)[] = [];
  readonly embedder: Embedder;
  readonly backend: TestBackend;

  constructor(backend: TestBackend, changed: Partial<typeof options & { dimension: number }> = {}) {
    this.backend = backend;
    const log = {
      info: () => undefined,
      warn: (fields: object, text: string) =>
        void this.logged.push(`${text} ${JSON.stringify(fields)}`),
    };
    this.embedder = new Embedder(backend, { ...options, ...changed }, log);
  }

  /** Past its self-test; from then on the backend holds its answers, if wanted. */
  static async ready(backend = new TestBackend(), holds = false): Promise<Rig> {
    const rig = new Rig(backend);
    await rig.embedder.settled();
    expect(rig.embedder.describe()).toMatchObject({ state: "healthy", reason: "" });
    backend.holds = holds;
    backend.batches.length = 0;
    return rig;
  }

  /** The index of the answer to come. */
  send(text: string): number {
    const index = this.answers.push(undefined) - 1;
    this.embedder.embed(text, (embedded) => {
      expect(this.answers[index], "a second answer").toBeUndefined();
      this.answers[index] = embedded;
    });
    return index;
  }

  reasons(): (string | undefined)[] {
    return this.answers.map((one) => (one?.kind === "unavailable" ? one.reason : one?.kind));
  }
}

/** Lets promises settle. */
const settle = (): Promise<unknown> => vi.advanceTimersByTimeAsync(0);

describe("embedder: queue and batches", () => {
  it("what comes while a batch runs goes out together, at most 8, a long one alone", async () => {
    const rig = await Rig.ready(new TestBackend(), true);
    const { backend } = rig;
    rig.send("first");
    for (let index = 0; index < 10; index++) rig.send(`text ${index}`);
    expect(backend.batches.map((texts) => texts.length)).toEqual([1]);
    backend.open_[0]?.resolve();
    await settle();
    backend.open_[1]?.resolve();
    await settle();
    expect(backend.batches.map((texts) => texts.length)).toEqual([1, 8, 2]);
    backend.open_[2]?.resolve();
    await settle();
    expect(rig.reasons()).toEqual(Array(11).fill("vector"));
    const long = "a long question ".repeat(20);
    rig.send("short");
    rig.send(long); // Nothing waits: the short one runs.
    rig.send("another");
    backend.open_[3]?.resolve();
    await settle();
    expect(backend.batches.slice(3)).toEqual([["short"], [long.trim()]]);
  });

  it("a long text is refused while others wait", async () => {
    const rig = await Rig.ready(new TestBackend(), true);
    rig.send("runs");
    rig.send("waits");
    const at = rig.send("a long question ".repeat(20));
    expect(rig.answers[at]).toEqual({ kind: "unavailable", reason: "busy" });
  });

  it("the queue is bounded: more is refused at once", async () => {
    const rig = await Rig.ready(new TestBackend(), true);
    for (let index = 0; index < 1 + options.queueMax + 3; index++) rig.send(`text ${index}`);
    expect(rig.embedder.describe()).toMatchObject({
      queued: options.queueMax,
      unavailable: { busy: 3 },
    });
    expect(rig.reasons().slice(-3)).toEqual(["busy", "busy", "busy"]);
  });

  it("what waits too long is told so on time, dropped, and never embedded", async () => {
    const rig = await Rig.ready(new TestBackend(), true);
    rig.send("hangs");
    await vi.advanceTimersByTimeAsync(30);
    rig.send("waits");
    await vi.advanceTimersByTimeAsync(19);
    expect(rig.reasons()).toEqual([undefined, undefined]);
    await vi.advanceTimersByTimeAsync(1);
    expect(rig.reasons()).toEqual(["late", undefined]);
    await vi.advanceTimersByTimeAsync(30);
    expect(rig.reasons()).toEqual(["late", "late"]);
    // The batch was aborted when nobody waited for it any more; the second went out in its place.
    expect(rig.backend.batches).toEqual([["hangs"], ["waits"]]);
    const deaf = await Rig.ready(new TestBackend(), true);
    vi.spyOn(deaf.backend, "embed").mockReturnValue(new Promise(() => {}));
    deaf.send("hangs");
    deaf.send("waits");
    await vi.advanceTimersByTimeAsync(50);
    expect(deaf.reasons()).toEqual(["late", "late"]);
    expect(deaf.backend.embed).toHaveBeenCalledTimes(1);
    expect(deaf.embedder.describe().queued).toBe(0);
  });

  it("several batches run at once where the model can", async () => {
    const rig = await Rig.ready(new TestBackend(3), true);
    for (let index = 0; index < 5; index++) rig.send(`text ${index}`);
    expect(rig.backend.batches).toHaveLength(3);
  });

  it("every text gets exactly one answer in its time, whatever happens; bounds hold", async () => {
    type Step =
      | { do: "send"; long: boolean }
      | { do: "resolve" | "fail" | "lose" }
      | { do: "wait"; ms: number };
    const step = fc.oneof<fc.Arbitrary<Step>[]>(
      fc.record({ do: fc.constant("send" as const), long: fc.boolean() }),
      fc.record({ do: fc.constantFrom("resolve" as const, "fail" as const, "lose" as const) }),
      fc.record({ do: fc.constant("wait" as const), ms: fc.integer({ min: 1, max: 60 }) }),
    );
    await fc.assert(
      fc.asyncProperty(
        fc.array(step, { maxLength: 60 }),
        fc.integer({ min: 1, max: 3 }),
        async (steps, batchesMax) => {
          const rig = await Rig.ready(new TestBackend(batchesMax), true);
          const sentAtMs: number[] = [];
          let texts = 0;
          for (const one of steps) {
            if (one.do === "send") {
              sentAtMs.push(performance.now());
              rig.send(`text ${texts++} ${one.long ? "and more".repeat(40) : ""}`);
            } else if (one.do === "wait") {
              await vi.advanceTimersByTimeAsync(one.ms);
            } else {
              const batch = rig.backend.open_.shift();
              if (one.do === "resolve") batch?.resolve();
              else
                batch?.reject(new EmbedderError(one.do === "fail" ? "passing" : "gone", "broken"));
            }
            await settle();
            for (const [index, answer] of rig.answers.entries()) {
              const ageMs = performance.now() - (sentAtMs[index] ?? 0);
              if (ageMs >= options.timeoutMs) expect(answer).toBeDefined();
            }
            expect(rig.embedder.describe().queued).toBeLessThanOrEqual(options.queueMax);
          }
          await rig.embedder.close();
          expect(rig.answers.every((answer) => answer !== undefined)).toBe(true);
          const { vectors, unavailable } = rig.embedder.describe();
          const refused = Object.values(unavailable).reduce((sum, count) => sum + count, 0);
          expect(vectors + refused).toBe(texts);
        },
      ),
      { numRuns: 60 },
    );
  });
});

describe("embedder: texts", () => {
  const megabyte = "What is the weather? ".repeat(50_000);
  const cases: [string, string, string | undefined][] = [
    ["1 MB", megabyte, "too_long"],
    ["nothing", "", "empty"],
    ["only spaces", ` \u00a0\u3000\t\n${" ".repeat(300)}`, "empty"],
    ["control characters", "\u0000\u0007\u001b\u007f\u0085", "empty"],
    ["10,000 emoji", "😀".repeat(10_000), "too_long"],
    ["control characters between words", "what\u0000is\u001bthis", undefined],
    ["unpaired surrogates", "what is \ud83d this \udc00", undefined],
    ["a text without words", "!?", "unknown_words"],
  ];

  it.each(cases)("%s: a vector of length 1, or a reason at once", async (_, text, reason) => {
    const backend = await openBackend({ ...defaults.cache.semantic.embedder, type: "lexical" });
    if (backend === undefined) throw new Error("no backend");
    const embedder = new Embedder(backend, options, { info: () => {}, warn: () => {} });
    await embedder.settled();
    const answer = await new Promise<Embedded>((resolve) => embedder.embed(text, resolve));
    if (reason !== undefined) return expect(answer).toEqual({ kind: "unavailable", reason });
    if (answer.kind !== "vector") throw new Error(answer.reason);
    expect(Math.hypot(...answer.vector)).toBeCloseTo(1, 4);
  });

  it("what the model reads has no lone surrogate and no control character, and words as they were", () => {
    fc.assert(
      fc.property(fc.string({ unit: "binary", maxLength: 200 }), (text) => {
        const read = readableText(text);
        expect(Buffer.from(read, "utf8").toString("utf8")).toBe(read);
        expect(read).not.toMatch(/\p{Cc}|^\s|\s$|\s\s/u);
        expect(readableText(read)).toBe(read);
      }),
    );
    expect(readableText(" What\tis \ud83dthis?\u0000\n今天😀 ")).toBe("What is \ufffdthis? 今天😀");
  });
});

const unit = (...values: number[]): Float32Array => {
  const vector = new Float32Array(64);
  vector.set(values);
  return vector;
};

describe("embedder: health", () => {
  const bad: [string, (text: string) => TextVector, string][] = [
    [
      "the wrong dimension",
      () => new Float32Array(32).fill(1 / Math.sqrt(32)),
      "32 dimensions instead of 64",
    ],
    ["NaN", () => unit(Number.NaN), "not finite"],
    ["infinity", () => unit(Number.POSITIVE_INFINITY), "not finite"],
    ["a zero vector", () => unit(0), "all zeros"],
    ["a vector of another length", () => unit(1.1), "length 1.1000, not 1"],
    ["the same vector for everything", () => unit(1), "every text gets the same vector"],
    ["nothing", () => new Float32Array(), "a vector is empty"],
    ["a reason for a test sentence", () => "unknown_words", "no vector for"],
    [
      "the same vector for opposites",
      (text) => lexical.embed(text.replace(/\b(on|off)\b/, "")),
      "get the same vector",
    ],
    [
      "noise",
      (text) =>
        lexical.embed(
          [...text]
            .reverse()
            .map((c, i) => c + i * text.length)
            .join(" "),
        ),
      "no nearer to the same question",
    ],
  ];

  it.each(bad)(
    "%s at start: off, said once with how to turn it on, no vectors",
    async (_, vectorOf, reason) => {
      const backend = new TestBackend();
      backend.vectorOf = vectorOf;
      const rig = new Rig(backend, { dimension: 64 });
      rig.send("early");
      await rig.embedder.settled();
      rig.send("one");
      rig.send("two");
      expect(rig.reasons()).toEqual(["starting", "off", "off"]);
      expect(rig.embedder.describe()).toMatchObject({
        state: "off",
        reason: expect.stringContaining(reason),
      });
      expect(rig.embedder.identity()).toBeUndefined();
      expect(rig.logged).toEqual([expect.stringMatching(/semantic lookup is off .*to turn it on/)]);
      expect(backend.closed).toBe(true);
    },
  );

  it.each(bad.slice(0, 6))(
    "%s after a while: no bad vector gets out, and three turn it off",
    async (_, vectorOf) => {
      const rig = await Rig.ready();
      rig.backend.vectorOf = vectorOf;
      for (let index = 0; index < 6; index++) {
        rig.send(`question number ${index}`);
        await settle();
      }
      expect(rig.embedder.describe().state).toBe("off");
      expect(rig.reasons().at(-1)).toBe("off");
      expect(rig.logged).toHaveLength(1);
      for (const answer of rig.answers) {
        if (answer?.kind !== "vector") continue;
        expect(Math.hypot(...answer.vector)).toBeCloseTo(1, 3);
        expect(answer.vector).toHaveLength(64);
      }
    },
  );

  it("texts on which a model fails, sent on purpose, do not turn it off", async () => {
    const rig = await Rig.ready();
    rig.backend.vectorOf = (text) =>
      text.startsWith("evil")
        ? unit(Number.NaN)
        : text.startsWith("same")
          ? unit(1)
          : lexical.embed(text);
    for (let index = 0; index < 8; index++) {
      rig.send(`evil ${index}`);
      rig.send(`same ${index}`);
      await settle();
    }
    for (let index = 0; index < 4; index++) {
      rig.send(`same again ${index}`);
      await settle();
    }
    rig.send("a good question");
    await settle();
    expect(rig.embedder.describe()).toMatchObject({
      state: "healthy",
      unavailable: { bad_vector: 8 },
    });
    expect(rig.answers.at(-1)?.kind).toBe("vector");
  });

  it("three failures in a row: it rests, answers at once, and comes back by its self-test", async () => {
    const rig = await Rig.ready();
    const identity = rig.embedder.identity();
    expect(identity).toEqual({ id: "test", version: "1", dimension: 64 });
    const embed = vi.spyOn(rig.backend, "embed");
    embed.mockRejectedValue(new EmbedderError("passing", "status 500"));
    for (let index = 0; index < 4; index++) {
      rig.send(`text ${index}`);
      await settle();
    }
    expect(rig.reasons()).toEqual(["failed", "failed", "failed", "resting"]);
    expect(embed).toHaveBeenCalledTimes(3);
    await vi.advanceTimersByTimeAsync(5000); // Still failing: it tries again and again, ever more seldom.
    const tries = embed.mock.calls.length - 3;
    expect(tries).toBeGreaterThanOrEqual(4);
    expect(tries).toBeLessThanOrEqual(8);
    expect(rig.logged).toHaveLength(1);
    embed.mockRestore();
    await vi.advanceTimersByTimeAsync(30_000);
    expect(rig.embedder.describe()).toMatchObject({ state: "healthy", identity });
  });

  it("gone: everybody who waits is answered at once, and it is opened anew", async () => {
    const rig = await Rig.ready(new TestBackend(), true);
    for (let index = 0; index < 5; index++) rig.send(`text ${index}`);
    rig.backend.open_[0]?.reject(new EmbedderError("gone", "the thread ended"));
    await settle();
    expect(rig.reasons()).toEqual(["failed", "resting", "resting", "resting", "resting"]);
    rig.backend.holds = false;
    await vi.advanceTimersByTimeAsync(250);
    expect(rig.embedder.describe().state).toBe("healthy");
  });

  it.each([
    ["by its word", () => ({ id: "test", version: "2" }), (text: string) => lexical.embed(text)],
    [
      "by its vectors",
      () => ({ id: "test", version: "1" }),
      (text: string) => lexical.embed(text.replaceAll("o", "x")),
    ],
  ])(
    "another model comes back in its place (%s): off, since entries would not fit",
    async (_, opens, vectorOf) => {
      const rig = await Rig.ready();
      rig.backend.vectorOf = () => {
        throw new EmbedderError("gone", "away");
      };
      rig.send("text");
      await settle();
      rig.backend.vectorOf = vectorOf;
      rig.backend.opens = [opens];
      await vi.advanceTimersByTimeAsync(250);
      expect(rig.embedder.describe()).toMatchObject({
        state: "off",
        reason: expect.stringMatching(/has become|has changed/),
      });
    },
  );

  it("a model that cannot be had: off with the reason; one that may come: tried again", async () => {
    const backend = new TestBackend();
    backend.opens = [
      () => {
        throw new EmbedderError("passing", "refused");
      },
      () => {
        throw new EmbedderError("lasting", "no such model");
      },
    ];
    const rig = new Rig(backend);
    await rig.embedder.settled();
    expect(rig.embedder.describe()).toMatchObject({ state: "resting", reason: "refused" });
    await vi.advanceTimersByTimeAsync(250);
    expect(rig.embedder.describe()).toMatchObject({ state: "off", reason: "no such model" });
    expect(rig.logged).toHaveLength(2);
  });

  it("closing answers all, also during the self-test, and nothing comes after", async () => {
    const rig = await Rig.ready(new TestBackend(), true);
    rig.send("runs");
    rig.send("waits");
    await rig.embedder.close();
    expect(rig.reasons()).toEqual(["off", "off"]);
    await vi.advanceTimersByTimeAsync(100_000);
    const early = new Rig(new TestBackend());
    await early.embedder.close();
    await settle();
    expect(early.embedder.describe().state).toBe("off");
    expect(vi.getTimerCount()).toBe(0);
  });

  it("nothing that it logs or describes holds a text", async () => {
    const rig = await Rig.ready();
    rig.backend.vectorOf = () => unit(Number.NaN);
    for (let index = 0; index < 4; index++) rig.send(`my secret ${index}`);
    await settle();
    await settle();
    expect(rig.logged.join()).not.toContain("secret");
    expect(JSON.stringify(rig.embedder.describe())).not.toContain("secret");
  });
});

describe("embedder: the actor", () => {
  it("answers each ask once; off says so in the log and has no edge", async () => {
    const rig = await Rig.ready();
    const replies: unknown[] = [];
    const edge = rig.embedder.edge(
      (to: ReplyTo<never>, value: unknown) => void replies.push([to.askId, value]),
    );
    const send = (command: EmbedderCommand): void =>
      edge.receive(command, undefined as never as Context<EmbedderCommand>);
    const replyTo = (askId: number) => ({ asker: "/requests", askId });
    send({ kind: "embedder.embed", requestId: "r", text: "hello there", replyTo: replyTo(1) });
    send({ kind: "embedder.describe", replyTo: replyTo(2) });
    await settle();
    expect(replies).toEqual([
      [2, expect.objectContaining({ state: "healthy" })],
      [1, { kind: "vector", vector: lexical.embed("hello there") }],
    ]);
    const logged: string[] = [];
    const log = { info: (_: object, text: string) => void logged.push(text), warn: () => {} };
    expect(await openEmbedder(defaults.cache.semantic.embedder, log)).toBeUndefined();
    expect(logged).toEqual([
      "semantic lookup is off; set cache.semantic.embedder.type to turn it on",
    ]);
  });
});
