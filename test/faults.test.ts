/** Fault schedules: their language, and names that must exist. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { checkFaults, type Fault, FaultError, faultText, parseFaults } from "../sim/faults.ts";

const name = fc.stringMatching(/^(node|gw)-[1-9]\d{0,2}$/);
const time = fc.integer({ min: 0, max: 10_000_000 }).map((ms) => ms * 1000);
const length = fc.option(
  fc.integer({ min: 1, max: 1_000_000 }).map((ms) => ms * 1000),
  { nil: null },
);
const share = fc.integer({ min: 1, max: 100 }).map((percent) => percent / 100);
const timed = { atUs: time, forUs: length };

const fault: fc.Arbitrary<Fault> = fc.oneof(
  fc.record({
    kind: fc.constantFrom("crash" as const, "hang" as const, "refuse" as const),
    node: name,
    ...timed,
  }),
  fc.record({
    kind: fc.constant("slow" as const),
    node: name,
    factor: fc.integer({ min: 1, max: 4000 }).map((quarters) => quarters / 4),
    ...timed,
  }),
  fc.record({
    kind: fc.constant("errors" as const),
    node: name,
    status: fc.integer({ min: 400, max: 599 }),
    share,
    ...timed,
  }),
  fc.record({
    kind: fc.constantFrom("cut" as const, "kv" as const),
    node: name,
    share,
    ...timed,
  }),
  fc.record({
    kind: fc.constant("partition" as const),
    from: name,
    to: name,
    isOneWay: fc.boolean(),
    ...timed,
  }),
  fc.record({ kind: fc.constant("reset-link" as const), from: name, to: name, atUs: time }),
  fc.record({ kind: fc.constant("gateway" as const), gateway: name, ...timed }),
  fc.record({
    kind: fc.constant("actor" as const),
    actor: fc.constantFrom("gw-1/router", "gw-2/cache/3", "gw-1/edges/store", "nodes/node-2"),
    atUs: time,
  }),
  fc.record({
    kind: fc.constant("skew" as const),
    gateway: name,
    aheadUs: fc.integer({ min: 1, max: 100_000 }).map((ms) => ms * 1000),
    atUs: time,
  }),
  fc.record({
    kind: fc.constant("drift" as const),
    gateway: name,
    factor: fc.integer({ min: 1, max: 400 }).map((percent) => percent / 100),
    ...timed,
  }),
  fc.record({ kind: fc.constant("leave" as const), share, atUs: time }),
  fc.record({
    kind: fc.constant("store" as const),
    how: fc.constantFrom("down" as const, "hang" as const),
    ...timed,
  }),
);

describe("faults: text", () => {
  it("what is written is read back as the same faults", () => {
    fc.assert(
      fc.property(fc.array(fault, { maxLength: 8 }), (faults) => {
        expect(parseFaults(faults.map(faultText).join("; "))).toEqual(faults);
      }),
    );
  });

  it("reads the schedule of the manual", () => {
    expect(
      parseFaults(
        "crash node-3 at 60s for 30s; slow node-1 x2 at 10s\nerrors node-2 503 p=0.5 at 2m;",
      ),
    ).toEqual([
      { kind: "crash", node: "node-3", atUs: 60e6, forUs: 30e6 },
      { kind: "slow", node: "node-1", factor: 2, atUs: 10e6, forUs: null },
      { kind: "errors", node: "node-2", status: 503, share: 0.5, atUs: 120e6, forUs: null },
    ]);
    expect(parseFaults("")).toEqual([]);
    expect(parseFaults("partition gw-1 to gw-2 at 500ms for 1.5m")).toEqual([
      { kind: "partition", from: "gw-1", to: "gw-2", isOneWay: true, atUs: 500_000, forUs: 90e6 },
    ]);
  });

  it("says what is wrong, in which clause, and what is accepted", () => {
    const error = (text: string) => {
      try {
        parseFaults(text);
      } catch (thrown) {
        return thrown instanceof FaultError ? thrown.message : "another error";
      }
      return "accepted";
    };
    expect(error("explode node-1 at 5s")).toMatch(/unknown fault "explode"; accepted: crash, slow/);
    expect(error("crash node-1")).toMatch(/"crash node-1".*no time.*crash NODE at TIME/);
    expect(error("crash at 5s")).toContain("a node is missing");
    expect(error("crash node-1 at soon")).toContain('"soon" is no time');
    expect(error("crash node-1 at 5s for 0s")).toContain("lasts no time");
    expect(error("crash node-1 at 5s until 9s")).toContain('"until 9s" is not understood');
    expect(error("crash node-1 hard at 5s")).toContain('"hard" is not understood');
    expect(error("slow node-1 2 at 5s")).toContain("like x2");
    expect(error("slow node-1 x0 at 5s")).toContain("above 0");
    expect(error("errors node-1 200 at 5s")).toContain("from 400 to 599");
    expect(error("errors node-1 503 p=1.5 at 5s")).toContain("up to 1, like p=0.5");
    expect(error("leave 50 at 5s")).toContain("no share");
    expect(error("leave 50% at 5s for 5s")).toContain("takes no duration");
    expect(error("gateway gw-1 at 5s")).toContain('"crash" is missing');
    expect(error("store slow at 5s")).toContain('"down" is missing');
    expect(error("actor gw-1 crash at 5s")).toContain('"gw-1" is not an actor');
    expect(error("actor gw-1/router at 5s")).toContain('"crash" is missing');
    expect(error("skew gw-1 0s at 5s")).toContain("by nothing");
    expect(error("skew gw-1 5s at 5s for 9s")).toContain("takes no duration");
    expect(error("drift gw-1 1.5 at 5s")).toContain("like x2");
    expect(error("crash node-1 at 5s; crash")).toContain('fault "crash"');
  });

  it("names must be those of the simulation", () => {
    const check = (text: string) => () =>
      checkFaults(parseFaults(text), ["a", "b"], ["gw-1", "gw-2"]);
    expect(check("crash a at 1s; partition gw-1 gw-2 at 2s")).not.toThrow();
    expect(check("crash c at 1s")).toThrow(/no node "c"; known: a, b/);
    expect(check("gateway gw-3 crash at 1s")).toThrow(/no gateway "gw-3"; known: gw-1, gw-2/);
    expect(check("reset-link gw-1 gw-1 at 1s")).toThrow(/one gateway twice/);
    expect(check("partition gw-1 a at 1s; partition b to gw-2 at 1s")).not.toThrow();
    expect(check("partition a b at 1s")).toThrow(/nodes do not talk to each other/);
    expect(check("partition gw-1 c at 1s")).toThrow(/no gateway or node "c"/);
    expect(check("reset-link gw-1 a at 1s")).toThrow(/no gateway "a"/);
    expect(check("actor gw-2/cache/7 crash at 1s; actor nodes/b crash at 1s")).not.toThrow();
    expect(check("actor gw-2/cache/8 crash at 1s")).toThrow(/no actor "cache\/8"; known: edges/);
    expect(check("actor gw-1/nodes/a crash at 1s")).toThrow(/no actor "nodes\/a"/);
    expect(check("actor nodes/c crash at 1s")).toThrow(/no node "c"/);
    expect(check("skew gw-3 1s at 1s")).toThrow(/no gateway "gw-3"/);
  });
});
