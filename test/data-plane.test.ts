/** An Answer's promises to its writer and readers. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { InflightMap } from "../runtime/inflight-map.ts";
import { Answer, type AnswerReader } from "../transport/data-plane.ts";

fc.configureGlobal({ seed: 20_251_124 });

const head = { status: 200, contentType: "text/event-stream" };
const MiB = 1 << 20;

function part(byte: number, length = 1) {
  return { bytes: new Uint8Array(length).fill(byte), usage: false };
}

function noResume(): void {
  throw new Error("the writer was not paused");
}

/** Everything a reader can have now; the last element says why it stopped. */
function drain(reader: AnswerReader): (number | string)[] {
  const seen: (number | string)[] = [];
  for (;;) {
    const next = reader.next();
    if (next === "wait" || next === "overrun") return [...seen, next];
    if (!("bytes" in next)) return [...seen, next.ok ? "ended" : next.code];
    seen.push(next.bytes[0] ?? -1);
  }
}

describe("answer", () => {
  it("gives every reader all parts in order, whenever it came", () => {
    const answer = new Answer("sse", head, MiB);
    let woken = 0;
    const early = answer.read(() => woken++);
    answer.append(part(1), noResume);
    answer.append(part(2), noResume);
    const late = answer.read(() => {});
    answer.append(part(3), noResume);
    answer.finish({ ok: true });
    expect(woken).toBe(4);
    expect(early === null ? [] : drain(early)).toEqual([1, 2, 3, "ended"]);
    expect(late === null ? [] : drain(late)).toEqual([1, 2, 3, "ended"]);
  });

  it("takes nothing after its end, and keeps the first end", () => {
    const answer = new Answer("sse", head, MiB);
    answer.append(part(1), noResume);
    answer.finish({ ok: false, code: "stream_broken" });
    answer.finish({ ok: true });
    expect(answer.append(part(2), noResume)).toBe(true);
    const reader = answer.read(() => {});
    expect(reader === null ? [] : drain(reader)).toEqual([1, "stream_broken"]);
  });

  it("pauses its writer when the fastest reader is a MiB behind, and resumes it once at half", () => {
    const answer = new Answer("raw", head, 16 * MiB);
    const reader = answer.read(() => {});
    let resumed = 0;
    const quarter = MiB / 4;
    for (let i = 0; i < 4; i++) expect(answer.append(part(i, quarter), noResume)).toBe(true);
    expect(answer.append(part(4, quarter), () => resumed++)).toBe(false);
    reader?.next();
    reader?.next();
    expect(resumed).toBe(0);
    reader?.next();
    expect(resumed).toBe(1);
    reader?.next();
    expect(resumed).toBe(1);
  });

  it("does not pause for a slow reader while another is fast", () => {
    const answer = new Answer("raw", head, 16 * MiB);
    answer.read(() => {});
    const fast: AnswerReader | null = answer.read(() => fast?.next());
    for (let i = 0; i < 8; i++) expect(answer.append(part(i, MiB), noResume)).toBe(true);
  });

  it("does not pause while nobody reads", () => {
    const answer = new Answer("raw", head, 16 * MiB);
    for (let i = 0; i < 8; i++) expect(answer.append(part(i, MiB), noResume)).toBe(true);
  });

  it("resumes its writer when the reader that held it up leaves", () => {
    const answer = new Answer("raw", head, 16 * MiB);
    const reader = answer.read(() => {});
    let resumed = 0;
    expect(answer.append(part(0, 2 * MiB), () => resumed++)).toBe(false);
    reader?.close();
    reader?.close();
    expect(resumed).toBe(1);
  });

  it("never resumes a writer after the end", () => {
    const answer = new Answer("raw", head, 16 * MiB);
    const reader = answer.read(() => {});
    expect(answer.append(part(0, 2 * MiB), noResume)).toBe(false);
    answer.finish({ ok: false, code: "internal" });
    reader?.next();
    reader?.close();
  });

  it("forgets its beginning beyond its bound: no late reader, no parts, an overrun for who was slow", () => {
    const answer = new Answer("raw", head, 3);
    let woken = 0;
    const slow = answer.read(() => woken++);
    for (let i = 0; i < 5; i++) answer.append(part(i), noResume);
    expect(answer.parts).toBeNull();
    expect(answer.read(() => {})).toBeNull();
    expect(woken).toBeGreaterThanOrEqual(5);
    expect(slow === null ? [] : drain(slow)).toEqual(["overrun"]);
  });

  it("keeps the newest part, however long", () => {
    const answer = new Answer("whole", head, 3);
    answer.append(part(7, 100), noResume);
    expect(answer.parts?.length).toBe(1);
  });

  it("every reader sees a prefix without gaps, then the end or an overrun (any interleaving)", () => {
    const step = fc.oneof(
      fc.record({ do: fc.constant("append" as const), length: fc.integer({ min: 1, max: 9 }) }),
      fc.record({ do: fc.constant("join" as const), length: fc.constant(0) }),
      fc.record({ do: fc.constant("next" as const), length: fc.nat(3) }),
    );
    fc.assert(
      fc.property(
        fc.array(step, { maxLength: 600 }),
        fc.integer({ min: 1, max: 60 }),
        (steps, max) => {
          const answer = new Answer("raw", head, max);
          const readers: { reader: AnswerReader; seen: number[]; overrun: boolean }[] = [];
          let appended = 0;
          for (const { do: what, length } of steps) {
            if (what === "append") answer.append(part(appended++ % 251, length), () => {});
            else if (what === "join") {
              const reader = answer.read(() => {});
              if (reader !== null) readers.push({ reader, seen: [], overrun: false });
            } else {
              const at = readers[length % Math.max(1, readers.length)];
              const next = at?.reader.next();
              if (at === undefined || next === undefined || next === "wait") continue;
              if (next === "overrun") at.overrun = true;
              else if ("bytes" in next) at.seen.push(next.bytes[0] ?? -1);
            }
          }
          answer.finish({ ok: true });
          for (const { reader, seen, overrun } of readers) {
            const rest = drain(reader);
            const all = [...seen, ...rest.slice(0, -1)];
            expect(all).toEqual(all.map((_, i) => i % 251));
            if (!overrun && rest.at(-1) === "ended") expect(all.length).toBe(appended);
            else expect(rest).toEqual(["overrun"]);
          }
        },
      ),
      { numRuns: 200 },
    );
  });
});

describe("inflight map", () => {
  it("is a map, whatever is done with it", () => {
    const step = fc.tuple(
      fc.constantFrom("set", "set", "delete", "clear"),
      fc.constantFrom("a", "b", "c", "d", "e"),
      fc.nat(),
    );
    fc.assert(
      fc.property(fc.array(step, { maxLength: 200 }), (steps) => {
        const map = new InflightMap<string, number>();
        const model = new Map<string, number>();
        for (const [what, key, value] of steps) {
          if (what === "set") {
            map.set(key, value);
            model.set(key, value);
          } else if (what === "delete") expect(map.delete(key)).toBe(model.delete(key));
          else {
            map.clear();
            model.clear();
          }
          expect(map.size).toBe(model.size);
          for (const each of ["a", "b", "c", "d", "e"]) {
            expect(map.get(each)).toBe(model.get(each));
            expect(map.has(each)).toBe(model.has(each));
          }
          expect(map.values().sort()).toEqual([...model.values()].sort());
        }
      }),
    );
  });
});
