/**
 * A day of 200 requests/s through the whole actor stack, on one core: does the simulator hold 17 million requests
 * without its memory growing? Prints time and memory as it goes, and ends with 1 if memory grew after the first
 * twentieth. `--hours N` makes it shorter.
 */
import { parseArgs } from "node:util";
import { lawByName } from "../../sim/laws.ts";
import { generateLoad } from "../../sim/load-generators.ts";
import { Simulation } from "../../sim/simulator.ts";

const RATE = 200;
const NODES = 8;
const LAW = "llama-3.1-8b/h100";
/** Heap and buffers after the first twentieth; more than so many times as much is growth. */
const GROWTH_MAX = 1.5;
const LINES = 20;

const { values: flags } = parseArgs({ options: { hours: { type: "string", default: "24" } } });
const hours = Number(flags.hours);
if (!(hours > 0 && hours <= 24)) {
  console.error(`--hours ${flags.hours}: accepted: more than 0, at most 24`);
  process.exit(2);
}
const requests = Math.round(hours * 3600 * RATE);
const law = lawByName(LAW);
const lengths = (mean: number) => ({ mean, cv: 1, max: mean * 8 });
const load = generateLoad({
  seed: 1,
  arrivals: { kind: "poisson", rate: RATE },
  requests,
  content: { kind: "plain", input: lengths(256), output: lengths(64) },
});

const simulation = new Simulation({
  nodes: Array.from({ length: NODES }, () => ({ law })),
  seed: 1,
});
const startedAt = process.cpuUsage();
const usedSeconds = (): number => {
  const { user, system } = process.cpuUsage(startedAt);
  return (user + system) / 1e6;
};
const residentMiB = (): number => process.memoryUsage.rss() / 1024 / 1024;
let offered = 0;
let firstMiB = 0;
let mostMiB = 0;
for (const request of load) {
  simulation.offer(request);
  if (++offered % Math.ceil(requests / LINES) !== 0) continue;
  const mib = residentMiB();
  if (firstMiB === 0) firstMiB = mib;
  mostMiB = Math.max(mostMiB, mib);
  const perRequestUs = (usedSeconds() * 1e6) / offered;
  console.log(
    `${(offered / RATE / 3600).toFixed(1).padStart(5)} h  ${offered.toLocaleString("en").padStart(10)} requests  ` +
      `${usedSeconds().toFixed(0).padStart(5)} s CPU (${perRequestUs.toFixed(0)} µs each)  ${mib.toFixed(0).padStart(5)} MiB`,
  );
}
const { counts, messages, hash } = simulation.finish();
const seconds = usedSeconds();
console.log(
  `\n${hours} h of ${RATE} requests/s on ${NODES} × ${LAW}: ${seconds.toFixed(0)} s CPU, ` +
    `${Math.round((hours * 3600) / seconds)} × real time, ${Math.round(messages / seconds).toLocaleString("en")} messages/s; ` +
    `answered ${counts.completed.toLocaleString("en")} of ${counts.arrived.toLocaleString("en")}; hash ${hash}`,
);
const growth = mostMiB / firstMiB;
console.log(
  `memory ${mostMiB.toFixed(0)} MiB at most, ${growth.toFixed(2)} × that after the first twentieth (≤ ${GROWTH_MAX})`,
);
process.exitCode = growth <= GROWTH_MAX ? 0 : 1;
