/**
 * What does one routing decision cost, by strategy and size of pool?
 *
 * CPU time of filter and pick over nodes with mixed load, every other request keyed, and beside it the same with
 * the table of candidates that each decision carries. Nodes gain and lose a request as decisions are made, as they
 * do under a router. The least of several runs: on a shared machine the others measure the neighbours.
 */
import {
  Field,
  makeStrategy,
  NodeView,
  type RankingOptions,
  type StrategyName,
  strategyNames,
  type Wanted,
} from "../../actors/node-score.ts";
import type { NodeSnapshot } from "../../actors/protocol.ts";
import { Random } from "../../runtime/random.ts";

export type StrategyRow = {
  strategy: StrategyName;
  nodes: number;
  /** CPU ns of one decision, filter and pick. */
  decisionNs: number;
  /** The same, with the explanation that goes back in the reply. */
  explainedNs: number;
};

const POOL_SIZES = [8, 64, 512];
const RUNS = 5;
const RUN_MS = 20;
const NOW_MS = 1_000_000;

export function benchStrategies(): StrategyRow[] {
  return strategyNames.flatMap((strategy) =>
    POOL_SIZES.map((nodes) => ({
      strategy,
      nodes,
      decisionNs: Math.round(measure(strategy, nodes, false)),
      explainedNs: Math.round(measure(strategy, nodes, true)),
    })),
  );
}

function measure(strategyName: StrategyName, nodes: number, explains: boolean): number {
  const options: RankingOptions = {
    strategy: strategyName,
    articleNormalised: false,
    affinityLoadFactor: 1.5,
    exploreRatio: 0.01,
    prefillWeight: 0.5,
    kvGate: 0.92,
    waitingGate: 16,
    staleMs: 3000,
    staleWeight: 0.7,
    panicRatio: 0.5,
  };
  const random = new Random(nodes);
  const draw = { random: () => random.next() };
  const field = new Field(options);
  const strategy = makeStrategy(options);
  for (let i = 0; i < nodes; i++)
    field.add(new NodeView(snapshotOf(`gpu-${i}`, random), i, NOW_MS - 50 * random.next()));
  const requests = Array.from({ length: 256 }, (_, i) => wantedOf(i, random));
  const asked: (NodeView | undefined)[] = new Array(64).fill(undefined);

  const decide = (times: number): void => {
    for (let i = 0; i < times; i++) {
      const request = requests[i % requests.length] as Wanted;
      field.filter(request, NOW_MS, strategy.loadGates);
      const view = strategy.pick(field, request, draw);
      if (explains) field.explain(strategy, request, view);
      view?.expect(100);
      asked[i % asked.length]?.answered(100);
      asked[i % asked.length] = view;
    }
  };
  let times = 64;
  while (cpuMsOf(() => decide(times)) < RUN_MS) times *= 2; // Warms up, too.
  let bestNs = Number.POSITIVE_INFINITY;
  for (let run = 0; run < RUNS; run++)
    bestNs = Math.min(bestNs, (cpuMsOf(() => decide(times)) * 1e6) / times);
  return bestNs;
}

function cpuMsOf(run: () => void): number {
  const before = process.cpuUsage();
  run();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1000;
}

function wantedOf(i: number, random: Random): Wanted {
  return {
    promptTokens: 200 + random.int(2000),
    affinityKey: i % 2 === 0 ? random.int(2 ** 32) : undefined,
    isRetry: false,
    tried: [],
    triedAddresses: [],
    denied: [],
    sent: [],
  };
}

function snapshotOf(node: string, random: Random): NodeSnapshot {
  return {
    node,
    address: `${node}:8000`,
    incarnation: 1,
    version: 1,
    atMs: NOW_MS,
    inflight: random.int(20),
    prefillTokens: random.int(4000),
    inflightMax: 256,
    itlSeconds: 0.01 + 0.02 * random.next(),
    circuit: "closed",
    probePermits: 0,
    draining: false,
    ramp: 1,
    healthy: true,
    restUntilMs: 0,
    articleWeight: 1,
    latencyMsAtInflight: 500 + random.int(2000),
    latencyMsPeakEwma: 1000 + random.int(5000),
    scrape: {
      engine: "vllm",
      atMs: NOW_MS - 500,
      running: random.int(20),
      waiting: random.int(3),
      kv: 0.8 * random.next(),
      missing: [],
    },
  };
}
