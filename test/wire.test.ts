/** The wire: what is sent arrives as it was, and nothing else does, whatever the bytes. */
import fc from "fast-check";
import { afterEach, describe, expect, it, vi } from "vitest";
import { type AskOutcome, unreachable } from "../runtime/actor.ts";
import { ActorSystem, type Envelope } from "../runtime/system.ts";
import { lawByName } from "../sim/laws.ts";
import { generateLoad } from "../sim/load-generators.ts";
import { simulate } from "../sim/simulator.ts";
import {
  decodeFrame,
  decodeHandshake,
  type Encoding,
  encodeFrame,
  encodeHandshake,
  FRAME_ENVELOPES_MAX,
  type Frame,
  HANDSHAKE_BYTES_MAX,
  type Invalid,
  type Reading,
  type ReceivedFrame,
} from "../transport/wire.ts";
import { crossingRows, weightOf } from "../transport/wire-messages.ts";
import { bad, record, text } from "../transport/wire-shape.ts";
import {
  answered,
  messageEnvelopes,
  messages,
  receivers,
  replies,
  systemEnvelopes,
} from "./wire-arbitraries.ts";

const encodings = ["structures", "maps"] as const;

function reading(more: Partial<Reading> = {}): Reading {
  return {
    encoding: "structures",
    nowMs: 5000,
    peer: "a",
    self: "b",
    questionOf: () => undefined,
    ...more,
  };
}

function frameOf(envelopes: readonly Envelope[], more: Partial<Frame> = {}): Frame {
  return { ack: 0, seq: 1, isLeaving: false, envelopes, ...more };
}

function encoded(frame: Frame, encoding: Encoding = "structures", nowMs = 5000): Uint8Array {
  const bytes = encodeFrame(frame, encoding, nowMs);
  if ("invalid" in bytes) throw new Error(bytes.invalid);
  return Uint8Array.from(bytes);
}

/** The one envelope of a frame, sent and read. */
function through(envelope: Envelope, more: Partial<Reading> = {}): ReceivedFrame {
  const { encoding } = reading(more);
  const frame = decodeFrame(encoded(frameOf([envelope]), encoding), reading(more));
  if ("invalid" in frame) throw new Error(frame.invalid);
  return frame;
}

/** From a to a node actor of b; `message` may be anything at all. */
function envelopeOf(message: unknown, more: object = {}): Envelope {
  const place = { to: "b/nodes/n", uid: 0, from: "a/router" };
  return { kind: "message", ...place, askId: 0, timeoutUs: 0, message, ...more };
}

function reasonFor(envelope: Envelope | object, more: Partial<Reading> = {}): string {
  const { rejected, envelopes } = through(envelope as Envelope, more);
  expect(envelopes).toEqual([]);
  return rejected[0]?.reason ?? "";
}

describe("wire", () => {
  it("the lists of this test are whole", () => {
    expect(Object.keys(messages).sort()).toEqual([...crossingRows.keys()].sort());
    expect(Object.keys(receivers).sort()).toEqual([...crossingRows.keys()].sort());
    const asks = [...crossingRows].flatMap(([kind, { reply }]) =>
      reply === undefined ? [] : [kind],
    );
    expect(Object.keys(replies).sort()).toEqual(asks.sort());
  });

  it.each(encodings)(
    "every message arrives as it was sent, absent fields absent (%s)",
    (encoding) => {
      fc.assert(
        fc.property(fc.array(messageEnvelopes, { maxLength: 8 }), (envelopes) => {
          const frame = decodeFrame(encoded(frameOf(envelopes), encoding), reading({ encoding }));
          expect(frame).toStrictEqual({ ...frameOf(structuredClone(envelopes)), rejected: [] });
        }),
        { numRuns: 500 },
      );
    },
  );

  it.each(encodings)("every reply and failure arrives as it was sent (%s)", (encoding) => {
    fc.assert(
      fc.property(answered, ({ question, envelope }) => {
        const { envelopes, rejected } = through(envelope, { encoding, questionOf: () => question });
        expect(envelopes).toStrictEqual([structuredClone(envelope)]);
        expect(rejected).toEqual([]);
      }),
      { numRuns: 300 },
    );
  });

  it("system mail, heartbeats and the link's numbers arrive as they were sent", () => {
    const heartbeats = fc.record(
      {
        seq: fc.nat(),
        loopLagMs: fc.double({ min: 0, max: 1e6, noNaN: true }).map((value) => value + 0),
        queueDepth: fc.nat(),
        epoch: fc.maxSafeNat(),
        echo: fc.record({ seq: fc.nat(), heldMs: fc.nat() }),
      },
      { requiredKeys: ["seq", "loopLagMs", "queueDepth", "epoch"] },
    );
    const more = fc.record({
      ack: fc.maxSafeNat(),
      seq: fc.maxSafeNat(),
      heartbeat: heartbeats,
      isLeaving: fc.boolean(),
    });
    fc.assert(
      fc.property(fc.array(systemEnvelopes, { maxLength: 5 }), more, (envelopes, rest) => {
        const frame = { ...frameOf(envelopes), ...rest };
        expect(decodeFrame(encoded(frame), reading())).toStrictEqual({
          ...structuredClone(frame),
          rejected: [],
        });
      }),
    );
  });

  it("instants move from the sender's clock to ours; durations and numbers stay", () => {
    const snapshot = {
      ...fc.sample(messages["router.node_changed"], { numRuns: 1, seed: 7 })[0]?.snapshot,
    };
    Object.assign(snapshot, { atMs: 990, restUntilMs: 1500, inflight: 7 });
    const message = { kind: "router.node_changed", snapshot };
    const bytes = encoded(frameOf([envelopeOf(message, { to: "b/router" })]), "structures", 1000);
    const frame = decodeFrame(bytes, reading({ nowMs: 301_000 }));
    expect(frame).toMatchObject({
      envelopes: [{ message: { snapshot: { atMs: 300_990, restUntilMs: 301_500, inflight: 7 } } }],
    });
  });

  it("bytes that are kept do not keep the frame", () => {
    const body = Uint8Array.from([1, 2, 3]);
    const answer = { body, bytes: 3, route: "chat", model: "m", promptTokens: 1, outputTokens: 1 };
    const outcome: AskOutcome<unknown> = { ok: true, value: { kind: "hit", answer, ageMs: 1 } };
    const bytes = encoded(frameOf([{ kind: "reply", to: "b/requests", askId: 1, outcome }]));
    const frame = decodeFrame(bytes, reading({ questionOf: () => "cache.lookup" }));
    const got = ("envelopes" in frame ? frame.envelopes[0] : undefined) as
      | { outcome: { value: { answer: { body: Uint8Array } } } }
      | undefined;
    bytes.fill(0);
    expect(got?.outcome.value.answer.body).toStrictEqual(body);
    expect(got?.outcome.value.answer.body.buffer.byteLength).toBe(3);
  });

  it("fields that are not known are taken out, wherever they are", () => {
    const acquire = {
      kind: "gpu_node.acquire",
      leaseId: "l",
      owner: "a/requests",
      uncachedTokens: 1,
    };
    const replyTo = { asker: "a/router", askId: 1 };
    const odd = { ...acquire, later: 1, replyTo: { ...replyTo, more: { deep: [] } } };
    for (const encoding of encodings) {
      const { envelopes } = through(envelopeOf(odd), { encoding });
      expect(envelopes).toStrictEqual([envelopeOf({ ...acquire, replyTo })]);
    }
  });

  it.each([
    ["a kind of a later version", envelopeOf({ kind: "gpu_node.teleport" }), "no such message"],
    ["a private timer message", envelopeOf({ kind: "gpu_node.sweep_due" }), "no such message"],
    [
      "a message of our own edges",
      envelopeOf({ kind: "scraper.failed", reason: "" }),
      "no such message",
    ],
    ["no kind", envelopeOf({}), "no such message"],
    ["no object", envelopeOf(7), "message is not an object"],
    ["nothing", envelopeOf(null), "message is not an object"],
    [
      "a missing field",
      envelopeOf({ kind: "gpu_node.progress", leaseId: "l" }),
      "outputTokens is not",
    ],
    [
      "a field of another type",
      envelopeOf({ kind: "gpu_node.progress", leaseId: 5, outputTokens: 1 }),
      "leaseId is not",
    ],
    [
      "a number that is none",
      envelopeOf({ kind: "gpu_node.progress", leaseId: "l", outputTokens: Number.NaN }),
      "outputTokens is not",
    ],
    [
      "a negative amount",
      envelopeOf({ kind: "gpu_node.progress", leaseId: "l", outputTokens: -1 }),
      "outputTokens is not",
    ],
    [
      "an id that is too long",
      envelopeOf({ kind: "gpu_node.progress", leaseId: "l".repeat(513), outputTokens: 1 }),
      "leaseId is not",
    ],
    [
      "another actor's message",
      envelopeOf({ kind: "gpu_node.drain" }, { to: "b/router" }),
      "an actor of nodes",
    ],
    [
      "a receiver whose name only begins so",
      envelopeOf({ kind: "gpu_node.drain" }, { to: "b/nodesX/n" }),
      "an actor of nodes",
    ],
    [
      "a receiver elsewhere",
      envelopeOf({ kind: "gpu_node.drain" }, { to: "c/nodes/n" }),
      "not for an actor",
    ],
    [
      "a receiver that is none",
      envelopeOf({ kind: "gpu_node.drain" }, { to: "b" }),
      "not for an actor",
    ],
    [
      "a sender elsewhere",
      envelopeOf({ kind: "gpu_node.drain" }, { from: "c/router" }),
      "not from its sender",
    ],
    [
      "an ask of nobody",
      envelopeOf({ kind: "gpu_node.drain" }, { from: "", askId: 4 }),
      "not from its sender",
    ],
    ["a negative number", envelopeOf({ kind: "gpu_node.drain" }, { askId: -1 }), "numbers"],
    [
      "an endless time-out",
      envelopeOf({ kind: "gpu_node.drain" }, { timeoutUs: 1 / 0 }),
      "time-out",
    ],
    ["an unknown envelope", { kind: "shutdown", to: "b/router" }, "no known kind"],
    [
      "an unknown failure",
      { kind: "reply", to: "b/router", askId: 1, outcome: { ok: false, failure: "tired" } },
      "failure is not",
    ],
    ["no outcome", { kind: "reply", to: "b/router", askId: 1 }, "outcome is not"],
  ])("is refused, alone, saying why: %s", (_, envelope, reason) => {
    for (const encoding of encodings) expect(reasonFor(envelope, { encoding })).toContain(reason);
    const fine = envelopeOf({ kind: "gpu_node.drain" });
    const frame = decodeFrame(encoded(frameOf([fine, envelope as Envelope, fine])), reading());
    expect(frame).toMatchObject({ envelopes: [fine, fine], rejected: [{}] });
  });

  it("a reason never quotes the message", () => {
    const secret = "what the prompt said";
    const reason = reasonFor(
      envelopeOf({ kind: "gpu_node.progress", leaseId: { secret }, outputTokens: secret }),
    );
    expect(reason).not.toContain(secret);
  });

  it("a reply must fit what was asked; one to nothing open is not looked at", () => {
    const outcome = { ok: true, value: { removed: 1 } } as const;
    const reply = { kind: "reply", to: "b/requests", askId: 1, outcome } as const;
    expect(through(reply, { questionOf: () => "cache.purge" }).envelopes).toEqual([reply]);
    expect(reasonFor(reply, { questionOf: () => "gpu_node.acquire" })).toContain("is not");
    expect(reasonFor(reply, { questionOf: () => "gpu_node.drain" })).toContain("has no reply");
    const late = through(reply).envelopes;
    expect(late).toEqual([{ ...reply, outcome: { ok: true, value: undefined } }]);
  });

  it.each([
    [
      "too many envelopes",
      frameOf(Array(FRAME_ENVELOPES_MAX + 1).fill(envelopeOf({ kind: "gpu_node.drain" }))),
    ],
    ["a system envelope that is none", frameOf([{ kind: "watch", to: "b/x" } as Envelope])],
    [
      "a watch of another's",
      frameOf([{ kind: "watch", to: "b/x", uid: 0, from: "c/y", watchId: 1 }]),
    ],
    ["a negative number", frameOf([], { ack: -1 })],
    ["a broken number", frameOf([], { seq: 0.5 })],
    [
      "a heartbeat that is none",
      frameOf([], { heartbeat: { seq: 1, loopLagMs: -1, queueDepth: 0, epoch: 0 } }),
    ],
  ])("is no frame: %s", (_, frame) => {
    expect(decodeFrame(encoded(frame), reading())).toHaveProperty("invalid");
  });

  it("what cannot be encoded is said, and harms no later frame", () => {
    const loop: { self?: unknown } = {};
    loop.self = loop;
    const fine = envelopeOf({ kind: "gpu_node.drain" });
    for (const odd of [
      loop,
      Symbol("x"),
      {
        get bad() {
          throw new Error("getter");
        },
      },
    ]) {
      expect(encodeFrame(frameOf([fine, envelopeOf(odd)]), "structures", 0)).toHaveProperty(
        "invalid",
      );
      expect(through(fine).envelopes).toEqual([fine]);
    }
  });

  it("types that msgpack packages add are refused: dates, sets, expressions, errors, big integers", () => {
    for (const odd of [
      new Date(0),
      new Set([1]),
      /x/,
      new Error("x"),
      2n ** 70n,
      new Float32Array(2),
    ]) {
      const bytes = encodeFrame(
        frameOf([envelopeOf({ kind: "gpu_node.progress", leaseId: "l", outputTokens: odd })]),
        "structures",
        0,
      );
      if ("invalid" in bytes) continue;
      const frame = decodeFrame(bytes, reading());
      const isRefused = "invalid" in frame || frame.envelopes.length === 0;
      expect(isRefused).toBe(true);
    }
  });

  it("no bytes make it throw, nor give an envelope that is not whole", () => {
    const samples = fc.sample(fc.array(messageEnvelopes, { minLength: 1, maxLength: 3 }), {
      numRuns: 40,
      seed: 3,
    });
    const frames = samples.map((envelopes) => encoded(frameOf(envelopes)));
    let valid = 0;
    const read = (bytes: Uint8Array, encoding: Encoding): void => {
      const frame = decodeFrame(bytes, reading({ encoding }));
      if ("invalid" in frame) {
        expect(frame.invalid).not.toBe("");
        return;
      }
      valid++;
      for (const envelope of frame.envelopes) expectWhole(envelope);
    };
    const mutation = fc.tuple(
      fc.nat(frames.length - 1),
      fc.array(fc.tuple(fc.nat(), fc.integer({ min: 0, max: 255 })), { maxLength: 4 }),
      fc.nat(),
      fc.boolean(),
    );
    fc.assert(
      fc.property(
        mutation,
        fc.constantFrom(...encodings),
        ([index, changes, cut, isCut], encoding) => {
          const bytes = Uint8Array.from(frames[index] ?? []);
          for (const [at, value] of changes) bytes[at % bytes.length] = value;
          read(isCut ? bytes.subarray(0, cut % bytes.length) : bytes, encoding);
        },
      ),
      { numRuns: 20_000 },
    );
    fc.assert(fc.property(fc.uint8Array({ maxLength: 200 }), fc.constantFrom(...encodings), read), {
      numRuns: 5000,
    });
    expect(valid).toBeGreaterThan(1000); // Mutations do reach the checks of envelopes.
    // None of it has changed how a good frame is read.
    for (const [index, envelopes] of samples.entries()) {
      const frame = decodeFrame(frames[index] ?? new Uint8Array(), reading());
      expect(frame).toMatchObject({ envelopes: structuredClone(envelopes), rejected: [] });
    }
  });

  it("a frame that renames the known shapes spoils no later one", () => {
    const fine = encoded(frameOf([envelopeOf({ kind: "gpu_node.drain" })]));
    // Record 0, that of a message's envelope, with keys of the frame's own; then the frame goes on.
    const redefined = Uint8Array.from([
      0x96, 0, 0, 1, 0xc0, 0xc2, 0x91, 0xd4, 0x72, 0x40, 0x91, 0xa1, 0x78, 1,
    ]);
    for (let round = 0; round < 5; round++) {
      expect(decodeFrame(redefined, reading())).toMatchObject({ envelopes: [], rejected: [{}] });
      expect(decodeFrame(fine, reading())).toMatchObject({ rejected: [], envelopes: [{}] });
    }
  });

  it("length bombs and deep nesting are refused at once", () => {
    const bombs = [
      [0xdd, 0xff, 0xff, 0xff, 0xff],
      [0xdf, 0xff, 0xff, 0xff, 0xff],
      [0xdb, 0xff, 0xff, 0xff, 0xff, 0x61],
      [0xc6, 0xff, 0xff, 0xff, 0xff, 0x61],
    ];
    for (const bomb of bombs) {
      expect(decodeFrame(Uint8Array.from(bomb), reading())).toHaveProperty("invalid");
    }
    expect(decodeFrame(new Uint8Array(500_000).fill(0x91), reading())).toHaveProperty("invalid");
  });

  it("handshakes are read only from small maps of the right shape", () => {
    const shape = record<{ name: string }>({ name: text(8) });
    expect(decodeHandshake(encodeHandshake({ name: "x", more: 1 }), shape)).toEqual({ name: "x" });
    expect(decodeHandshake(encodeHandshake({ name: 1 }), shape)).toHaveProperty("invalid");
    expect(decodeHandshake(new Uint8Array(HANDSHAKE_BYTES_MAX + 1), shape)).toHaveProperty(
      "invalid",
    );
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 64 }), (bytes) => {
        const read: { name: string } | Invalid = decodeHandshake(bytes, shape);
        if (!("invalid" in read)) expect(shape.read(read, 0)).not.toBe(bad);
      }),
    );
  });

  it("an answer's weight is that of its bytes", () => {
    const body = new Uint8Array(1000);
    const answer = {
      body,
      bytes: 1000,
      route: "chat",
      model: "m",
      promptTokens: 1,
      outputTokens: 1,
    };
    for (const heavy of [
      { kind: "hit", answer },
      { kind: "cache.flight_ended", result: { kind: "stored", answer } },
    ]) {
      expect(weightOf(heavy)).toBeGreaterThanOrEqual(1000);
    }
    expect(weightOf({ kind: "gpu_node.drain" })).toBeLessThan(1000);
  });
});

/** What a receiving actor relies on, checked a second way: by hand, not by shapes. */
function expectWhole(envelope: Envelope): void {
  expect(envelope.to.startsWith("b/")).toBe(true);
  switch (envelope.kind) {
    case "message": {
      const { kind } = envelope.message as { kind: keyof typeof receivers };
      expect(envelope.to.split("/")[1]).toBe(receivers[kind].split("/")[0]);
      for (const [key, value] of Object.entries(envelope.message as object)) {
        if (/Ms$|Tokens$|^attempts$/.test(key)) expect(Number.isFinite(value)).toBe(true);
        if (/Id$|^key$|^node$|^owner$|^tenant$/.test(key)) expect(typeof value).toBe("string");
      }
      return;
    }
    case "reply":
      expect(typeof envelope.outcome.ok).toBe("boolean");
      return;
    case "watch":
    case "unwatch":
    case "terminated":
      expect(Number.isSafeInteger(envelope.watchId)).toBe(true);
      return;
    default:
      unreachable(envelope);
  }
}

describe("a simulated cluster", () => {
  afterEach(() => void vi.restoreAllMocks());

  const law = lawByName("llama-3.1-8b/h100");
  const run = () =>
    simulate({
      nodes: Array.from({ length: 4 }, () => ({ law: { ...law, startUpUs: 2_000_000 } })),
      gateways: 3,
      load: generateLoad({
        seed: 1,
        arrivals: { kind: "poisson", rate: 30 },
        durationUs: 10e6,
        content: {
          kind: "plain",
          input: { mean: 500, cv: 0.8, max: 4000 },
          output: { mean: 60, cv: 0.7, max: 300 },
        },
      }),
    });

  it("runs bit for bit the same when all its mail takes the codec, and no mail is of unknown shape", () => {
    const without = run();
    const deliver = ActorSystem.prototype.deliver;
    let count = 0;
    let bytes = { structures: 0, maps: 0 };
    const large: string[] = [];
    vi.spyOn(ActorSystem.prototype, "deliver").mockImplementation(function (
      this: ActorSystem,
      envelope,
    ) {
      const root = (path: string) => path.slice(0, path.indexOf("/"));
      const peer = "from" in envelope ? root(envelope.from) : "nobody";
      const frame = frameOf([envelope]);
      const [short, long] = [encoded(frame), encoded(frame, "maps")];
      bytes = { structures: bytes.structures + short.length, maps: bytes.maps + long.length };
      if (short.length > 0.75 * long.length) large.push(JSON.stringify(envelope));
      const read = decodeFrame(short, {
        ...reading({ peer, self: root(envelope.to) }),
        questionOf: (askId) => this.questionOf(askId),
      });
      if ("invalid" in read) throw new Error(read.invalid);
      expect(read.rejected).toEqual([]);
      for (const each of read.envelopes) deliver.call(this, each);
      count++;
    });
    const through = run();
    expect(through.hash).toBe(without.hash);
    expect(count).toBeGreaterThan(1000);
    expect(large).toEqual([]);
    expect(bytes.structures).toBeLessThan(0.6 * bytes.maps);
  });
});
