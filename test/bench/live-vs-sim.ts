/**
 * `npm run live-vs-sim`: the same trace, sent by `headrace replay` in real time through a real gateway to eight
 * stand-in nodes, and run by `headrace sim`. TTFT and E2E at p50, p90 and p99 must agree within 10 %. Exit status 1
 * when one does not.
 *
 * The nodes run at the speed of the card they stand for, and prompts are long, so that modelled time decides: on two
 * cores with other work the machine adds some 10 ms to an answer (HTTP, timers, turns of processes). Lengths vary
 * little enough that the p99 does not hang on which of two requests far apart it falls. The simulator's figures are
 * medians over seeds: two runs of a router that draws at random are never the same.
 */
import { execFile } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { loadavg, tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { generateLoad } from "../../sim/load-generators.ts";
import type { SimulationReport } from "../../sim/report.ts";
import type { ReplayReport } from "../../transport/replay-report.ts";
import { medianOf, printRows, type Row } from "./report.ts";
import { GATEWAY_KEY, Stack } from "./stack.ts";

const LAW = "llama-3.1-8b/rtx4090";
const NODES = 8;
const PER_SECOND = 8;
const SECONDS = 100;
const SEEDS = [1, 2, 3, 4, 5];
const SHARE_MAX = 0.1;
/** Of an idle machine: below 5 ms. What holds up the client as long as this holds up gateway and nodes, too. */
const LATE_MS_MAX = 20;

const command = fileURLToPath(new URL("../../bin/headrace.js", import.meta.url));
const stack = new Stack();
const folder = mkdtempSync(join(tmpdir(), "headrace-live-vs-sim-"));
const trace = join(folder, "trace.csv");

/** In the format of the Azure trace, whose times have seven digits. */
function writeTrace(): number {
  const load = generateLoad({
    seed: "live-vs-sim",
    arrivals: { kind: "poisson", rate: PER_SECOND },
    durationUs: SECONDS * 1e6,
    content: {
      kind: "plain",
      input: { mean: 3000, cv: 0.3, max: 8000 },
      output: { mean: 100, cv: 0.35, max: 300 },
    },
  });
  const rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"];
  for (const { atUs, inputTokens, outputTokens } of load) {
    const at = new Date(Math.floor(atUs / 1000)).toISOString().slice(11, 23);
    const digits = String(atUs % 1000).padStart(3, "0");
    rows.push(`2023-11-16 ${at}${digits}0,${inputTokens},${outputTokens}`);
  }
  writeFileSync(trace, `${rows.join("\n")}\n`);
  return rows.length - 1;
}

async function headrace(args: readonly string[]): Promise<unknown> {
  const file = join(folder, "report.json");
  await promisify(execFile)(process.execPath, [command, ...args, "--trace", trace, "--json", file]);
  return JSON.parse(readFileSync(file, "utf8"));
}

async function live(): Promise<ReplayReport> {
  const names = Array.from({ length: NODES }, (_, index) => `node-${index + 1}`);
  const nodes = await Promise.all(names.map((name) => stack.node(name, ["--law", LAW])));
  const gateway = await stack.gateway({
    nodes: nodes.map(({ name, port }) => ({ name, url: `http://127.0.0.1:${port}` })),
  });
  const target = ["--target", `http://127.0.0.1:${gateway.port}`, "--api-key", GATEWAY_KEY];
  return (await headrace(["replay", ...target])) as ReplayReport;
}

async function simulated(seed: number): Promise<SimulationReport> {
  const nodes = ["--nodes", String(NODES), "--law", LAW];
  return (await headrace(["sim", ...nodes, "--seed", String(seed)])) as SimulationReport;
}

async function run(): Promise<boolean> {
  const requests = writeTrace();
  console.log(
    `${requests} requests over ${SECONDS} s, ${NODES} nodes with ${LAW}; load average ${loadavg()[0]?.toFixed(1)}`,
  );
  const sims: SimulationReport[] = [];
  for (const seed of SEEDS) sims.push(await simulated(seed));
  const replayed = await live();
  const rows: Row[] = [];
  for (const metric of ["ttftMs", "e2eMs"] as const) {
    for (const quantile of ["p50", "p90", "p99"] as const) {
      const liveMs = replayed[metric]?.[quantile] ?? Number.NaN;
      const values = sims.map((report) => report[metric]?.[quantile] ?? Number.NaN);
      const simMs = medianOf(values);
      const share = Math.abs(liveMs / simMs - 1);
      rows.push({
        name: `${metric} ${quantile}`,
        question: `${metric === "ttftMs" ? "TTFT" : "E2E"} ${quantile}, difference`,
        figure: `${(share * 100).toFixed(1)} %`,
        value: share,
        bar: { atMost: SHARE_MAX },
        detail:
          `live ${liveMs.toFixed(0)} ms, simulated ${simMs.toFixed(0)} ms, ratio ${(liveMs / simMs).toFixed(3)}; ` +
          `by seed ${values.map((value) => value.toFixed(0)).join(", ")}`,
      });
    }
  }
  const counts = sims[0]?.counts;
  rows.push({
    name: "answered",
    question: "requests that the live run answered less",
    figure: String((counts?.completed ?? 0) - replayed.ok),
    value: (counts?.completed ?? 0) - replayed.ok,
    bar: { atMost: 0 },
    detail: `live ${replayed.ok}, simulated ${counts?.completed ?? 0} of ${requests}`,
  });
  const isMet = printRows(rows);
  const lateMs = replayed.latenessMs?.p99 ?? 0;
  console.log(
    `requests left late by p99 ${lateMs.toFixed(1)} ms; load average ${loadavg()[0]?.toFixed(1)}`,
  );
  const isHeldUp = lateMs > LATE_MS_MAX;
  const excuse = "; but the machine held up this very client: run it again on a quieter one";
  console.log(isMet ? "PASS" : `FAIL${isHeldUp ? excuse : ""}`);
  return isMet;
}

try {
  process.exitCode = (await run()) ? 0 : 1;
} finally {
  await stack.endAll();
  rmSync(folder, { recursive: true, force: true });
}
