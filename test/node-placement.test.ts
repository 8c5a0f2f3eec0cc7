import { describe, expect, it } from "vitest";
import { GatewayRefs, type NodeSettings } from "../actors/gateway.ts";
import { GpuNodeActor } from "../actors/gpu-node.ts";
import type { ClusterView } from "../actors/membership.ts";
import { NodePlacementActor } from "../actors/node-placement.ts";
import { bucketOf, OwnerTable } from "../actors/ownership.ts";
import { type KitEffect, refTo, testActor } from "./actor-kit.ts";

const PEERS = ["a", "b", "c"];
const NODES = Array.from({ length: 12 }, (_, number) => `node-${number}`);

function start() {
  let nodes = NODES;
  const settings = (node: string): NodeSettings => ({ node, address: `${node}:1` });
  const refs = new GatewayRefs((path) => refTo(path), 1, "a", true);
  const kit = testActor(
    new NodePlacementActor({
      self: "a",
      refs,
      nodes: () => nodes.map(settings),
      nodeSpec: (node) => ({
        id: node.node,
        restart: "permanent",
        start: () => new GpuNodeActor({ ...node, upstream: refs.upstream, scraper: refs.scraper }),
      }),
    }),
  );
  const see = (epoch: number, owners: string[], lost: string[] = []): void => {
    const view: ClusterView = { epoch, owners, suspects: [], lost };
    kit.send({ kind: "members.view_changed", view });
  };
  const configure = (names: string[]) => {
    nodes = names;
    kit.send({ kind: "placement.nodes_changed" });
  };
  return { kit, refs, see, configure };
}

function nodesOf(effects: readonly KitEffect[], kind: "spawn" | "stop"): string[] {
  return effects.flatMap((effect) =>
    effect.kind === kind ? [effect.path.slice("a/nodes/".length)] : [],
  );
}

const owned = (peer: string, peers: string[]): string[] => {
  const table = new OwnerTable(1, peers);
  return NODES.filter((node) => table.owner(bucketOf(node)) === peer);
};

describe("node placement", () => {
  it("before there is an owner nothing is placed, and asking where a node is places it nowhere", () => {
    const { kit, refs, see } = start();
    see(1, []);
    expect(kit.take()).toEqual([]);
    refs.node("node-0");
    expect(refs.placeOf("node-0")).toBeUndefined();
  });

  it("spawns just the nodes that this peer owns, and the router hears of all", () => {
    const { kit, refs, see } = start();
    see(1, PEERS);
    const effects = kit.take();
    expect(owned("a", PEERS).length).toBeGreaterThan(0);
    expect(nodesOf(effects, "spawn")).toEqual(owned("a", PEERS));
    for (const peer of PEERS)
      for (const node of owned(peer, PEERS)) {
        expect(refs.placeOf(node)).toBe(peer);
        expect(refs.node(node).path).toBe(`${peer}/nodes/${node}`);
        const message = { kind: "router.node_moved", node };
        expect(effects).toContainEqual({ kind: "tell", to: "a/router", message });
      }
  });

  it("a peer that comes takes what it owns, and gives it back when it goes; the same view moves nothing", () => {
    const { kit, see } = start();
    see(1, ["a", "b"]);
    kit.take();
    see(2, PEERS);
    const gone = owned("a", ["a", "b"]).filter((node) => !owned("a", PEERS).includes(node));
    expect(gone.length).toBeGreaterThan(0);
    const effects = kit.take();
    expect(nodesOf(effects, "stop")).toEqual(gone);
    expect(nodesOf(effects, "spawn")).toEqual([]);
    see(2, PEERS);
    expect(kit.take()).toEqual([]);
    see(3, ["a", "b"]);
    expect(nodesOf(kit.take(), "spawn")).toEqual(gone);
  });

  it("a lost peer's leases are freed at the nodes here, once; those of one that left in order are not", () => {
    const { kit, see } = start();
    see(1, PEERS);
    kit.take();
    see(2, ["a", "b"]);
    const freed = (effects: readonly KitEffect[]) =>
      effects.filter(
        (effect) =>
          effect.kind === "tell" &&
          (effect.message as { kind: string }).kind === "gpu_node.owner_restarted",
      );
    expect(freed(kit.take())).toEqual([]);
    see(3, ["a"], ["b"]);
    const message = { kind: "gpu_node.owner_restarted", owner: "b/requests" };
    expect(freed(kit.take())).toEqual(
      owned("a", ["a", "b"]).map((node) => ({ kind: "tell", to: `a/nodes/${node}`, message })),
    );
    see(4, ["a"], ["b"]);
    expect(freed(kit.take())).toEqual([]);
  });

  it("nodes that are configured later are placed, those that are not any more are stopped and forgotten", () => {
    const { kit, refs, see, configure } = start();
    see(1, ["a"]);
    kit.take();
    configure([...NODES.slice(1), "late"]);
    const effects = kit.take();
    expect(nodesOf(effects, "stop")).toEqual(["node-0"]);
    expect(nodesOf(effects, "spawn")).toEqual(["late"]);
    expect(refs.placeOf("node-0")).toBeUndefined();
    const message = { kind: "router.node_removed", node: "node-0" };
    expect(effects).toContainEqual({ kind: "tell", to: "a/router", message });
  });

  it("without any owner left it keeps what it has", () => {
    const { kit, see } = start();
    see(1, ["a"]);
    kit.take();
    see(2, []);
    expect(kit.take()).toEqual([]);
  });
});
