import { describe, expect, it } from "vitest";
import { MembersActor, type MembersDescription } from "../actors/members.ts";
import { type Member, membershipDefaults, type View } from "../actors/membership.ts";
import { type KitEffect, refTo, testActor } from "./actor-kit.ts";

const self: Member = { id: "a", incarnation: 3, address: "ws://a:1", version: "1" };
const viewOfB: View = {
  epoch: 4,
  entries: [
    { id: "b", incarnation: 1, address: "ws://b:1", version: "1", state: "alive", stamp: 4 },
  ],
};

function start(table = false) {
  return testActor(
    new MembersActor(
      self,
      { ...membershipDefaults, table },
      {
        peer: (id) => refTo(`${id}/members`),
        mesh: refTo("mesh"),
        ...(table ? { table: refTo("table") } : {}),
        viewers: [refTo("limits"), refTo("cache")],
      },
    ),
    { nowMs: 1000 },
  );
}

const told = (effects: readonly KitEffect[], kind: string): unknown[] =>
  effects.flatMap((effect) => {
    const message = effect.kind === "tell" ? (effect.message as { kind: string }) : undefined;
    return message?.kind === kind && effect.kind === "tell" ? [[effect.to, message]] : [];
  });

describe("members", () => {
  it("members: beats four times a second to those it is linked with, and to no one else", () => {
    const kit = start();
    kit.send({ kind: "members.view", view: viewOfB });
    kit.advance(1000);
    expect(told(kit.take(), "members.heartbeat")).toEqual([]);
    kit.send({ kind: "members.load", load: { loopLagMs: 7, queueDepth: 2 } });
    kit.send({ kind: "members.link_up", id: "b" });
    expect(told(kit.take(), "members.view")).toHaveLength(1);
    kit.advance(1000);
    const beats = told(kit.take(), "members.heartbeat");
    expect(beats).toHaveLength(4);
    expect(beats[0]).toMatchObject([
      "b/members",
      { from: "a", incarnation: 3, heartbeat: { loopLagMs: 7, queueDepth: 2 } },
    ]);
    kit.send({ kind: "members.link_down", id: "b" });
    kit.take();
    kit.advance(1000);
    expect(told(kit.take(), "members.heartbeat")).toEqual([]);
  });

  it("members: every viewer is told of a new view, the mesh of whom to link with", () => {
    const kit = start();
    kit.send({ kind: "members.discovered", addresses: ["ws://seed:1"] });
    kit.send({ kind: "members.view", view: viewOfB });
    const effects = kit.take();
    const view = { epoch: 6, owners: ["a", "b"], suspects: ["b"], lost: [] };
    const changed = told(effects, "members.view_changed").slice(-2);
    expect(changed).toEqual([
      ["limits", { kind: "members.view_changed", view }],
      ["cache", { kind: "members.view_changed", view }],
    ]);
    expect(told(effects, "mesh.contacts").at(-1)).toEqual([
      "mesh",
      { kind: "mesh.contacts", addresses: ["ws://b:1", "ws://seed:1"] },
    ]);
    const facts = kit.ask<MembersDescription>((replyTo) => ({ kind: "members.describe", replyTo }));
    expect(facts?.members.map(({ id, state, owns }) => [id, state, owns])).toEqual([
      ["a", "alive", true],
      ["b", "suspect", true],
    ]);
  });

  it("members: the table keeps what it is, until it leaves", () => {
    const kit = start(true);
    const kept = told(kit.take(), "table.keep");
    expect(kept).toEqual([["table", { kind: "table.keep", member: self, epoch: 0 }]]);
    const members = [self, { ...self, id: "b", address: "ws://b:1" }];
    const snapshot = { epoch: 9, ageMs: 60_000, members };
    kit.send({ kind: "members.table_read", snapshot, askedAgoMs: 3 });
    const [changed] = told(kit.take(), "members.view_changed");
    expect(changed).toMatchObject(["limits", { view: { owners: ["a", "b"], epoch: 9 } }]);
    // Nobody hears b: its lease is to be ended, and until then it owns.
    kit.advance(3500);
    const effects = kit.take();
    expect(told(effects, "table.evict")[0]).toEqual([
      "table",
      { kind: "table.evict", id: "b", incarnation: 3 },
    ]);
    kit.send({ kind: "members.leave" });
    const left = kit.take();
    expect(told(left, "table.leave")).toEqual([
      ["table", { kind: "table.leave", id: "a", incarnation: 3 }],
    ]);
    expect(told(left, "table.keep")).toEqual([]);
    expect(told(left, "members.view_changed")[0]).toMatchObject([
      "limits",
      { view: { owners: ["b"] } },
    ]);
  });
});
