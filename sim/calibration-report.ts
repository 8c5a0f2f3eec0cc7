/** A calibration for a reader: the law's numbers, and its errors percentile by percentile. Pure. */
import type { Calibration } from "./calibrate.ts";
import {
  ERROR_METRICS,
  ERROR_STATISTICS,
  type ErrorMetric,
  type ErrorStatistic,
  type ErrorTable,
} from "./log-replay.ts";

const NAMES: Readonly<Record<ErrorMetric, string>> = { ttft: "TTFT", tpot: "TPOT", e2e: "E2E" };
const HEAD: Readonly<Record<ErrorStatistic, string>> = {
  mean: "mean",
  p50: "p50",
  p90: "p90",
  p95: "p95",
  p99: "p99",
};

/** Text for a terminal, with its last line break. */
export function formatCalibration(calibration: Calibration): string {
  const { law, method, fitted, holdOut, notes } = calibration;
  const { h, W, d, F, C, a0, aB, actx, p0, pq, U } = law;
  const numbers = Object.entries({ h, W, d, F, C, a0, aB, actx, p0, pq, U: U ?? 0 });
  const shown = numbers.filter(([, value]) => value !== 0);
  const lines = [
    `${law.name}: ${law.validated ? "VALIDATED" : "NOT VALIDATED"}, ${law.note}`,
    `method   ${method}, ${calibration.replays} replays`,
    `law (µs) ${shown.map(([name, value]) => `${name} ${digits4(value)}`).join(", ")}`,
    `limits   max_num_seqs ${law.sequencesMax}, max_num_batched_tokens ${law.batchedTokensMax}, KV blocks ` +
      `${law.kvBlocks} (${law.kvBlocksFrom})`,
    `replay   ${calibration.steps} steps, ${calibration.preemptions} preemptions`,
    "",
    ...tableLines("error, fitted part", fitted),
  ];
  if (holdOut !== undefined) lines.push("", ...tableLines("error, held-out part", holdOut));
  if (notes.length > 0) lines.push("", ...notes.map((note) => `note: ${note}`));
  return `${lines.join("\n")}\n`;
}

/** A law's errors on a log that it was not fitted to, with its last line break. */
export function formatErrors(law: string, errors: ErrorTable): string {
  return `${tableLines(`error of ${law}`, errors).join("\n")}\n`;
}

const LABEL_WIDTH = 52;

function tableLines(title: string, table: ErrorTable): string[] {
  const head = `${title} (${table.compared} requests)`.padEnd(LABEL_WIDTH);
  return [
    head + ERROR_STATISTICS.map((statistic) => HEAD[statistic].padStart(9)).join(""),
    ...ERROR_METRICS.map((metric) => {
      const row = table[metric];
      const { realMs, modelMs } = row.mean;
      const label = `  ${NAMES[metric]}  (mean ${digits4(realMs)} → ${digits4(modelMs)} ms)`;
      const cells = ERROR_STATISTICS.map((statistic) => percent(row[statistic].error).padStart(9));
      return label.padEnd(LABEL_WIDTH) + cells.join("");
    }),
  ];
}

function percent(share: number): string {
  return `${share >= 0 ? "+" : ""}${(share * 100).toFixed(1)} %`;
}

function digits4(value: number): string {
  return String(Number(value.toPrecision(4)));
}
