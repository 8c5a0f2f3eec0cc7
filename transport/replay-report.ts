/**
 * What a replay measured: counted as answers end, reported as plain data and as a table.
 *
 * Pure. It keeps no sample: counts and histograms only, so a run may be of any length. Sending stands in replay.ts.
 */
import { unreachable } from "../runtime/actor.ts";

/** How an ok answer came about, by its `x-headrace-cache` header; `unstated` when there was none. */
export type ReplayCacheKind =
  | "hit_exact"
  | "hit_semantic"
  | "joined"
  | "miss"
  | "bypass"
  | "unstated";

/** ms. Quantiles are read from a histogram: right within 0.8 %. */
export type ReplayQuantiles = {
  count: number;
  mean: number;
  p50: number;
  p90: number;
  p99: number;
  max: number;
};

/** Plain data. requests = sent + refusedByClient; sent = ok + refused + failed + unfinished. */
export type ReplayReport = {
  target: string;
  speed: number;
  stream: boolean;
  /** True when the signal ended the run. */
  stopped: boolean;
  elapsedMs: number;
  requests: number;
  sent: number;
  ok: number;
  /** By status: the server said no, in its own time. */
  refused: { "429": number; "503": number; "504": number };
  /** Not sent, because `inflightMax` were open. */
  refusedByClient: number;
  /** By reason: `http_` with status and the error's code, `connect_refused`, `connection_reset`, `stream_cut`, `stream_error`, `timeout` … */
  failed: Record<string, number>;
  /** Broken off by the signal. */
  unfinished: number;
  /** Sent again because an idle connection closed just then; counted once in `sent`. */
  resent: number;
  cache: Record<ReplayCacheKind, number>;
  /** Ok answers that took no pass of their own over a node (hit or joined) ÷ ok answers that state it. */
  hitRate: number | null;
  /** As the server counts them in `usage`, else content events. */
  outputTokens: number;
  outputTokensPerSecond: number;
  /** From the moment of sending to the first content, over streamed answers. */
  ttftMs: ReplayQuantiles | null;
  /** (E2E − TTFT) ÷ (output tokens − 1), over streamed answers of two tokens or more. */
  tpotMs: ReplayQuantiles | null;
  /** From the moment of sending to the last byte of ok answers. */
  e2eMs: ReplayQuantiles | null;
  /** Sent later than the load says by so much. */
  latenessMs: ReplayQuantiles | null;
  /** Ok answers by node, without hits and joins; the most first. */
  nodes: { node: string; answers: number; share: number }[];
  /** (most − fewest) ÷ most over `nodes`. */
  nodeSpread: number | null;
  /** Ok answers that took more than one attempt. */
  retried: number;
  /** Requests whose answer length was not recorded. */
  lengthsGuessed: number;
  /** Requests whose recorded model the target does not serve. */
  modelsReplaced: number;
};

export const replayCacheKinds: readonly ReplayCacheKind[] = [
  "hit_exact",
  "hit_semantic",
  "joined",
  "miss",
  "bypass",
  "unstated",
];

/** How one request ended. */
export type ReplayEnding =
  | { kind: "ok"; e2eMs: number; ttftMs?: number; outputTokens: number; headers: AnswerHeaders }
  | { kind: "refused"; status: "429" | "503" | "504" }
  | { kind: "failed"; reason: string }
  | { kind: "unfinished" };

export type AnswerHeaders = { cache: ReplayCacheKind; node?: string; attempts: number };

/** Nodes that are counted by name; further ones are counted as "(others)". */
const NODES_MAX = 1000;
const REASONS_MAX = 64;

/** Counts and histograms of a run. */
export class ReplayTally {
  requests = 0;
  sent = 0;
  ok = 0;
  refusedByClient = 0;
  unfinished = 0;
  resent = 0;
  retried = 0;
  lengthsGuessed = 0;
  modelsReplaced = 0;
  readonly refused = { "429": 0, "503": 0, "504": 0 };
  /** At most `REASONS_MAX` reasons, since a server may make up error codes; further ones as "other". */
  readonly failed = new Map<string, number>();
  readonly lateness = new Histogram();
  readonly #cache = { hit_exact: 0, hit_semantic: 0, joined: 0, miss: 0, bypass: 0, unstated: 0 };
  readonly #nodes = new Map<string, number>();
  readonly #ttft = new Histogram();
  readonly #tpot = new Histogram();
  readonly #e2e = new Histogram();
  #outputTokens = 0;

  refusedTotal(): number {
    return sumOf(Object.values(this.refused));
  }

  failedTotal(): number {
    return sumOf([...this.failed.values()]);
  }

  end(ending: ReplayEnding): void {
    switch (ending.kind) {
      case "ok":
        this.#onOk(ending);
        return;
      case "refused":
        this.refused[ending.status]++;
        return;
      case "failed":
        this.#onFailed(ending.reason);
        return;
      case "unfinished":
        this.unfinished++;
        return;
      default:
        unreachable(ending);
    }
  }

  #onFailed(reason: string): void {
    const name = this.failed.has(reason) || this.failed.size < REASONS_MAX ? reason : "other";
    this.failed.set(name, (this.failed.get(name) ?? 0) + 1);
  }

  #onOk({ e2eMs, ttftMs, outputTokens, headers }: Extract<ReplayEnding, { kind: "ok" }>): void {
    this.ok++;
    this.#outputTokens += outputTokens;
    this.#e2e.add(e2eMs);
    if (ttftMs !== undefined) {
      this.#ttft.add(ttftMs);
      if (outputTokens > 1) this.#tpot.add((e2eMs - ttftMs) / (outputTokens - 1));
    }
    const { cache, node, attempts } = headers;
    this.#cache[cache]++;
    if (attempts > 1) this.retried++;
    const ownPass = cache === "miss" || cache === "bypass" || cache === "unstated";
    if (node === undefined || !ownPass) return;
    const name = this.#nodes.has(node) || this.#nodes.size < NODES_MAX ? node : "(others)";
    this.#nodes.set(name, (this.#nodes.get(name) ?? 0) + 1);
  }

  report(
    run: Pick<ReplayReport, "target" | "speed" | "stream" | "stopped" | "elapsedMs">,
  ): ReplayReport {
    const { hit_exact, hit_semantic, joined, unstated } = this.#cache;
    const stated = this.ok - unstated;
    const nodes = [...this.#nodes].sort((left, right) => right[1] - left[1]);
    const answers = sumOf(nodes.map(([, count]) => count));
    const most = nodes[0]?.[1];
    const fewest = nodes[nodes.length - 1]?.[1];
    return {
      ...run,
      requests: this.requests,
      sent: this.sent,
      ok: this.ok,
      refused: { ...this.refused },
      refusedByClient: this.refusedByClient,
      failed: Object.fromEntries(this.failed),
      unfinished: this.unfinished,
      resent: this.resent,
      cache: { ...this.#cache },
      hitRate: stated === 0 ? null : (hit_exact + hit_semantic + joined) / stated,
      outputTokens: this.#outputTokens,
      outputTokensPerSecond: run.elapsedMs > 0 ? (this.#outputTokens * 1000) / run.elapsedMs : 0,
      ttftMs: this.#ttft.quantiles(),
      tpotMs: this.#tpot.quantiles(),
      e2eMs: this.#e2e.quantiles(),
      latenessMs: this.lateness.quantiles(),
      nodes: nodes.map(([node, count]) => ({ node, answers: count, share: count / answers })),
      nodeSpread: most === undefined || fewest === undefined ? null : (most - fewest) / most,
      retried: this.retried,
      lengthsGuessed: this.lengthsGuessed,
      modelsReplaced: this.modelsReplaced,
    };
  }
}

/** 128 buckets for each doubling from 1 µs on: fixed memory, quantiles right within 0.8 %. */
const BUCKETS_PER_DOUBLING = 128;
const DOUBLINGS = 40; // Up to 2⁴⁰ µs, 12 days.

class Histogram {
  readonly #buckets = new Uint32Array(BUCKETS_PER_DOUBLING * DOUBLINGS);
  #count = 0;
  #sumMs = 0;
  #maxMs = 0;

  add(ms: number): void {
    const us = Math.max(1, ms * 1000);
    const index = Math.floor(Math.log2(us) * BUCKETS_PER_DOUBLING);
    const bucket = Math.min(index, this.#buckets.length - 1);
    this.#buckets[bucket] = (this.#buckets[bucket] ?? 0) + 1;
    this.#count++;
    this.#sumMs += ms;
    this.#maxMs = Math.max(this.#maxMs, ms);
  }

  quantiles(): ReplayQuantiles | null {
    if (this.#count === 0) return null;
    return {
      count: this.#count,
      mean: rounded(this.#sumMs / this.#count),
      p50: this.#quantile(0.5),
      p90: this.#quantile(0.9),
      p99: this.#quantile(0.99),
      max: rounded(this.#maxMs),
    };
  }

  #quantile(p: number): number {
    const rank = Math.floor((this.#count - 1) * p);
    let seen = 0;
    for (const [bucket, count] of this.#buckets.entries()) {
      seen += count;
      if (rank >= seen) continue;
      const ms = 2 ** ((bucket + 0.5) / BUCKETS_PER_DOUBLING) / 1000;
      return rounded(Math.min(ms, this.#maxMs));
    }
    return rounded(this.#maxMs);
  }
}

/** To whole µs. */
function rounded(ms: number): number {
  return Math.round(ms * 1000) / 1000;
}

function sumOf(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0);
}

/** Requests that left later than this (p99) make the measurement doubtful. */
const LATENESS_MS_DOUBTFUL = 50;

const LABEL_WIDTH = 14;

/** The report as a table for a terminal, without colours. */
export function formatReplayReport(report: ReplayReport): string {
  const { sent, ok, refused, failed, cache, latenessMs } = report;
  const lines = [
    `${count(report.requests)} requests in ${(report.elapsedMs / 1000).toFixed(1)} s to ${report.target}` +
      ` (speed ${report.speed}${report.stream ? "" : ", not streamed"})` +
      `${report.stopped ? ", stopped before the end" : ""}`,
    "",
  ];
  const row = (name: string, text: string) => lines.push(`${name.padEnd(LABEL_WIDTH)}${text}`);
  const listed = (counts: readonly (readonly [string, number])[]) => {
    const shown = counts.filter(([, number]) => number > 0);
    return shown.length === 0
      ? ""
      : `  (${shown.map(([name, number]) => `${name}: ${count(number)}`).join(", ")})`;
  };
  row("sent", count(sent));
  row("ok", `${count(ok)}${sent === 0 ? "" : `  ${percent(ok / sent)}`}`);
  const codes = Object.entries(refused);
  row("refused", `${count(sumOf(Object.values(refused)))}${listed(codes)}`);
  row("failed", `${count(sumOf(Object.values(failed)))}${listed(Object.entries(failed))}`);
  if (report.unfinished > 0) row("unfinished", count(report.unfinished));
  if (report.refusedByClient > 0) {
    row("not sent", `${count(report.refusedByClient)}  (as many were open as this client allows)`);
  }
  row("retried", `${count(report.retried)}  (ok after more than one attempt)`);
  row(
    "cache",
    `hits exact ${count(cache.hit_exact)}, semantic ${count(cache.hit_semantic)}, joined ` +
      `${count(cache.joined)}; miss ${count(cache.miss)}, bypass ${count(cache.bypass)}` +
      (cache.unstated > 0 ? `, not stated ${count(cache.unstated)}` : ""),
  );
  row("hit rate", report.hitRate === null ? "not stated by the target" : percent(report.hitRate));
  row(
    "output",
    `${count(report.outputTokens)} tokens, ${Math.round(report.outputTokensPerSecond)}/s`,
  );
  if (report.lengthsGuessed > 0) {
    row("guessed", `the answer length of ${count(report.lengthsGuessed)} requests, not recorded`);
  }
  if (report.modelsReplaced > 0) {
    row(
      "models",
      `${count(report.modelsReplaced)} requests named one that the target does not serve`,
    );
  }
  lines.push(
    "",
    `${"ms".padEnd(LABEL_WIDTH)}${["mean", "p50", "p90", "p99", "max"].map(cell).join("")}`,
  );
  for (const [name, quantiles] of [
    ["TTFT", report.ttftMs],
    ["TPOT", report.tpotMs],
    ["E2E", report.e2eMs],
    ["sent late by", latenessMs],
  ] as const) {
    if (quantiles === null) continue;
    const { mean, p50, p90, p99, max } = quantiles;
    row(name, [mean, p50, p90, p99, max].map((ms) => cell(milliseconds(ms))).join(""));
  }
  if (report.nodes.length > 0) {
    const width = Math.max(LABEL_WIDTH, ...report.nodes.map(({ node }) => node.length + 1));
    lines.push("", `${"node".padEnd(width)}${cell("answers")}${cell("share")}`);
    for (const { node, answers, share } of report.nodes) {
      lines.push(`${node.padEnd(width)}${cell(count(answers))}${cell(percent(share))}`);
    }
    if (report.nodeSpread !== null) {
      lines.push(`${"spread".padEnd(width)}${cell("")}${cell(percent(report.nodeSpread))}`);
    }
  }
  if (latenessMs !== null && latenessMs.p99 > LATENESS_MS_DOUBTFUL) {
    lines.push(
      "",
      `This client did not keep up: 1 in 100 requests left ${milliseconds(latenessMs.p99)} ms late or more. ` +
        "Lower the speed, or run it on a machine with more to spare.",
    );
  }
  return `${lines.join("\n")}\n`;
}

function cell(text: string): string {
  return text.padStart(10);
}

function count(value: number): string {
  return value.toLocaleString("en-US");
}

function percent(share: number): string {
  return `${(share * 100).toFixed(1)} %`;
}

/** Three digits are enough to compare runs by. */
function milliseconds(ms: number): string {
  if (ms >= 100) return count(Math.round(ms));
  return ms.toFixed(ms >= 10 ? 1 : 2);
}
