import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { Random } from "../runtime/random.ts";
import { type Calibration, type CalibrationOptions, calibrate } from "../sim/calibrate.ts";
import { formatCalibration, formatErrors } from "../sim/calibration-report.ts";
import { formatLaw, LawError, loadLaw, parseLaw } from "../sim/law-file.ts";
import { lawByName, lawNames, type StepLaw } from "../sim/laws.ts";
import { leastSquares } from "../sim/least-squares.ts";
import {
  ERROR_METRICS,
  ERROR_STATISTICS,
  type ErrorTable,
  errorTable,
  replayLog,
  worstMean,
} from "../sim/log-replay.ts";
import { observedSteps, stepDeviation } from "../sim/observed-steps.ts";
import {
  CalibrationError,
  type LoggedRequest,
  parseRequestLog,
  type RequestLog,
} from "../sim/request-log.ts";
import { schedulerLimits } from "../sim/scheduler-limits.ts";
import type { TraceRecord } from "../transport/trace-format.ts";

const rtx4090 = lawByName("llama-3.1-8b/rtx4090");
const proNode = lawByName("llama-3.1-8b/rtx-pro-6000");
const h100 = lawByName("llama-3.1-8b/h100");

/** An engine that nobody ships: two passes, 24 seats, and a cost for each new prompt length. */
const strange: StepLaw = {
  ...h100,
  name: "strange",
  ...{ h: 0, W: 0, d: 30, F: 0, C: 30, s: [], a0: 12_000, aB: -5, actx: 0.05, p0: 9000 },
  ...{ pq: 0.004, U: 25_000, sequencesMax: 24, kvBlocks: 100_000 },
};

/** A search is a few seconds of one core; machines that run tests have others to do. */
const SLOW_MS = 120_000;

type Asked = Pick<LoggedRequest, "id" | "atUs" | "promptTokens" | "outputTokens">;

function poisson(count: number, perSecond: number, seed: string): Asked[] {
  const random = new Random(seed);
  const exponential = (mean: number) => -Math.log(1 - random.next()) * mean;
  let atUs = 0;
  return Array.from({ length: count }, (_, i) => {
    atUs += Math.round(exponential(1e6 / perSecond));
    const promptTokens = 1 + Math.floor(exponential(900));
    return { id: `r${i}`, atUs, promptTokens, outputTokens: 2 + Math.floor(exponential(150)) };
  });
}

/** The log that an engine of this law would have written. */
function logOf(law: StepLaw, load: readonly Asked[]): RequestLog {
  const bare = load.map((each) => ({
    ...each,
    scheduledUs: undefined,
    firstTokenUs: undefined,
    lastTokenUs: undefined,
  }));
  const { first, last } = replayLog(bare, law);
  const requests = bare.map((each, i) => ({
    ...each,
    firstTokenUs: first[i],
    lastTokenUs: last[i],
  }));
  return { file: "made-up", format: "engine", requests, warnings: [] };
}

/** How a law does on a log that it was not fitted to. */
function onAnother(law: StepLaw, log: RequestLog): ErrorTable {
  return errorTable(log.requests, replayLog(log.requests, law), 0, log.requests.length);
}

describe("calibrate: known laws", () => {
  it("one scalar: finds the overhead that the log was made with", () => {
    const log = logOf({ ...h100, h: 1234 }, poisson(300, 6, "one"));
    const { law, method, holdOut } = calibrate(log, { base: h100 });
    expect(method).toBe("one scalar");
    expect(Math.abs(law.h - 1234)).toBeLessThan(10);
    expect({ ...law, h: 0 }).toMatchObject({ W: h100.W, C: h100.C, actx: h100.actx });
    expect(law.validated).toBe(true);
    expect(holdOut === undefined ? 1 : worstMean(holdOut)).toBeLessThan(0.02);
  });

  it("one scalar: a base slower than the log gives a negative overhead, and says so", () => {
    const log = logOf(h100, poisson(200, 6, "slow"));
    const { law, notes } = calibrate(log, { base: { ...h100, W: h100.W + 2000 } });
    expect(law.h).toBeLessThan(-1500);
    expect(notes.join(" ")).toMatch(/faster than the base law/);
  });

  it(
    "from scratch: finds what a fused engine does, at this load and at another",
    () => {
      const log = logOf(proNode, poisson(500, 8, "fused"));
      const { law, method, holdOut } = calibrate(log, { split: 0.6 });
      expect(method).toBe("fused");
      expect(holdOut === undefined ? 1 : worstMean(holdOut)).toBeLessThan(0.05);
      expect(worstMean(onAnother(law, logOf(proNode, poisson(300, 3, "quiet"))))).toBeLessThan(
        0.08,
      );
    },
    SLOW_MS,
  );

  it(
    "from scratch: finds seats, a cost of first uses and two passes, and holds at another load",
    () => {
      const log = logOf(strange, poisson(600, 8, "two"));
      const { law, holdOut } = calibrate(log, { split: 0.6 });
      expect(law.sequencesMax).toBe(24);
      expect(law.U).toBeGreaterThan(12_000);
      expect(holdOut === undefined ? 1 : worstMean(holdOut)).toBeLessThan(0.06);
      expect(worstMean(onAnother(law, logOf(strange, poisson(300, 3, "quiet"))))).toBeLessThan(
        0.12,
      );
    },
    SLOW_MS,
  );

  it(
    "tells a cost of first uses from none, when prompts come in few lengths",
    () => {
      const load = poisson(400, 4, "lengths").map((each) => ({
        ...each,
        promptTokens: 64 * Math.ceil(each.promptTokens / 64),
      }));
      const firstUse = (law: StepLaw) => calibrate(logOf(law, load), { split: 1 }).law.U ?? 0;
      expect(firstUse({ ...strange, U: 0 })).toBe(0);
      expect(firstUse(strange)).toBeGreaterThan(10_000);
    },
    SLOW_MS,
  );

  it(
    "the same log and seed give the same law",
    () => {
      const log = logOf(h100, poisson(120, 10, "again"));
      expect(calibrate(log, { seed: 5 })).toEqual(calibrate(log, { seed: 5 }));
    },
    SLOW_MS,
  );

  it("time in other units changes only the unit (one scalar, 10 times as slow)", () => {
    const load = poisson(150, 8, "unit");
    const slow = { ...proNode };
    for (const key of ["h", "W", "d", "F", "C", "a0", "aB", "actx", "p0", "pq"] as const) {
      slow[key] = 10 * proNode[key];
    }
    slow.s = proNode.s.map(([x, us]) => [x, 10 * us] as const);
    const slowLoad = load.map((each) => ({ ...each, atUs: 10 * each.atUs }));
    const h = calibrate(logOf(proNode, load), { base: { ...proNode, h: 0 } }).law.h;
    const slowH = calibrate(logOf(slow, slowLoad), { base: { ...slow, h: 0 } }).law.h;
    expect(Math.abs(slowH / h - 10)).toBeLessThan(0.05);
  });

  it("without a hold-out nothing is called validated", () => {
    const log = logOf(h100, poisson(60, 6, "all"));
    const calibration = calibrate(log, { base: h100, split: 1 });
    expect(calibration.holdOut).toBeUndefined();
    expect(calibration.law.validated).toBe(false);
    expect(formatCalibration(calibration)).toMatch(/NOT VALIDATED.*not checked on others/);
  });
});

describe("calibrate: checking a law", () => {
  it("the law that made a log has no error on it, another one has, and the text says both", () => {
    const log = logOf(h100, poisson(200, 6, "check"));
    expect(worstMean(onAnother(h100, log))).toBe(0);
    const slower = onAnother({ ...h100, h: 3000 }, log);
    expect(slower.tpot.mean.error).toBeGreaterThan(0.05);
    const text = formatErrors("slower", slower);
    expect(text).toMatch(/^error of slower \(200 requests\) +mean +p50 +p90 +p95 +p99$/m);
    expect(text).toContain(`+${(slower.tpot.mean.error * 100).toFixed(1)} %`);
  });
});

describe("calibrate: what a log shows of the scheduler", () => {
  it("seats: a ceiling while requests wait", () => {
    const { requests } = logOf({ ...h100, sequencesMax: 17 }, poisson(300, 20, "seats"));
    expect(schedulerLimits(requests)).toMatchObject({ runningMax: 17, sequencesMax: 17 });
  });

  it("KV memory: a level while requests wait, within a tenth", () => {
    const { requests } = logOf({ ...h100, kvBlocks: 2000 }, poisson(400, 20, "memory"));
    const { sequencesMax, kvTokens = 0 } = schedulerLimits(requests);
    expect(sequencesMax).toBeUndefined();
    expect(Math.abs(kvTokens / (2000 * 16) - 1)).toBeLessThan(0.1);
  });

  it("neither, when nobody waits", () => {
    const { requests } = logOf(h100, poisson(100, 0.5, "idle"));
    expect(schedulerLimits(requests)).toMatchObject({
      sequencesMax: undefined,
      kvTokens: undefined,
    });
  });

  it("never claims that a step took more prompt tokens than it did", () => {
    for (const batchedTokensMax of [512, 2048]) {
      const law = { ...h100, batchedTokensMax, sequencesMax: 256 };
      const { stepTokensMin } = schedulerLimits(logOf(law, poisson(300, 15, "budget")).requests);
      expect(stepTokensMin).toBeLessThanOrEqual(batchedTokensMax);
      expect(stepTokensMin).toBeGreaterThan(batchedTokensMax / 2);
    }
  });

  it("a request scheduled alone shows its step to the µs", () => {
    const load = poisson(80, 0.3, "steps").map((each, i) => ({
      ...each,
      promptTokens: 2 + ((each.promptTokens + i) % 1900),
    }));
    const requests = logOf(strange, load).requests.map((each) => ({
      ...each,
      scheduledUs: each.atUs,
    }));
    const steps = observedSteps(requests, 2048).filter(({ decodes }) => decodes === 0);
    expect(steps.length).toBeGreaterThan(10);
    for (const step of steps) expect(Math.abs(stepDeviation(strange, step))).toBeLessThan(1e-4);
  });
});

describe("least squares", () => {
  it("finds the bottom of a curved valley", () => {
    const residualsOf = ([x = 0, y = 0]: readonly number[]) => [
      10 * (Math.exp(y) - Math.exp(2 * x)),
      1 - Math.exp(x),
      0.1 * (x + y),
    ];
    const { theta, loss } = leastSquares(residualsOf, [1.5, -1], 100);
    expect(loss).toBeLessThan(1e-4);
    for (const value of theta) expect(Math.abs(value)).toBeLessThan(0.02);
  });
});

// ---- files ----------------------------------------------------------------------------------------

const row = (fields: Record<string, unknown> = {}) =>
  JSON.stringify({
    request_id: "a",
    input_toks: 100,
    output_toks: 10,
    queued_ts: 5.5,
    scheduled_ts: 5.5001,
    first_token_ts: 5.75,
    last_token_ts: 6.5,
    ...fields,
  });

type Recorded = { [name in keyof TraceRecord]?: TraceRecord[name] | undefined };

const recorded = (fields: Recorded = {}): string => {
  return JSON.stringify({
    v: 1,
    atMs: 1000,
    tenant: "t",
    model: "m",
    route: "chat",
    stream: true,
    inputTokens: 100,
    outputTokens: 10,
    prefix: [],
    outcome: "ok",
    cache: "miss",
    node: "gpu-0",
    attempts: 1,
    queuedMs: 20,
    ttftMs: 220,
    e2eMs: 900,
    ...fields,
  });
};

describe("calibrate: reading logs", () => {
  it("an engine's log: times from the first arrival, in order of arrival", () => {
    const log = parseRequestLog(
      `${row({ request_id: "b", queued_ts: 5.6 })}\n\n${row()}\n`,
      "x.jsonl",
    );
    expect(log.format).toBe("engine");
    expect(log.requests).toEqual([
      {
        id: "a",
        atUs: 0,
        promptTokens: 100,
        outputTokens: 10,
        scheduledUs: 100,
        firstTokenUs: 250_000,
        lastTokenUs: 1_000_000,
      },
      expect.objectContaining({ id: "b", atUs: 100_000, firstTokenUs: 250_000 }),
    ]);
  });

  it("keeps whole µs of stamps that count from 1970", () => {
    const at = 1_795_348_980;
    const log = parseRequestLog(
      row({
        queued_ts: at + 0.25,
        scheduled_ts: at + 0.5,
        first_token_ts: at + 0.625,
        last_token_ts: at + 3,
      }),
      "x",
    );
    expect(log.requests[0]).toMatchObject({ firstTokenUs: 375_000, lastTokenUs: 2_750_000 });
  });

  it("a recording: time at the node, load without whole timing kept, what reached no node left out", () => {
    const lines = [
      recorded(),
      recorded({ atMs: 1100, stream: false, ttftMs: undefined }),
      recorded({ atMs: 1200, cache: "hit_exact", node: undefined }),
      recorded({ atMs: 1300, outcome: "refused", node: undefined }),
    ];
    const log = parseRequestLog(lines.join("\n"), "rec.jsonl");
    expect(log.format).toBe("headrace");
    expect(
      log.requests.map(({ atUs, firstTokenUs, lastTokenUs }) => [atUs, firstTokenUs, lastTokenUs]),
    ).toEqual([
      [0, 200_000, 880_000],
      [100_000, undefined, undefined],
    ]);
    expect(log.warnings).toEqual([
      "1 requests left out: answered by the cache",
      "1 requests left out: reached no node",
    ]);
  });

  it("a recording of several nodes: one must be chosen", () => {
    const text = [recorded(), recorded({ node: "gpu-1" })].join("\n");
    expect(() => parseRequestLog(text, "rec")).toThrow(/several nodes.*gpu-0, gpu-1/);
    expect(() => parseRequestLog(text, "rec", "gpu-2")).toThrow(/no node "gpu-2".*gpu-0, gpu-1/);
    expect(parseRequestLog(text, "rec", "gpu-1").requests).toHaveLength(1);
  });

  it.each([
    ["", /x: empty file/],
    ["a,b,c", /x, line 1: not a JSON object/],
    ['{"TIMESTAMP": 1}', /x, line 1: fits no known log; accepted: .*queued_ts/],
    [`${row()}\n{`, /x, line 2: not a JSON object/],
    [`${row()}\n${row()}`, /x, line 2: request_id "a" is there twice/],
    [row({ input_toks: 0 }), /line 1: input_toks is 0; it must be a whole number of tokens, 1 or/],
    [row({ output_toks: 1.5 }), /output_toks is 1.5/],
    [row({ output_toks: undefined }), /output_toks is missing/],
    [row({ queued_ts: "5" }), /queued_ts is "5"; it must be a time in seconds/],
    [row({ queued_ts: undefined, arrival_time: null }), /arrival_time is null/],
    [row({ last_token_ts: 5.7 }), /out of order; they must be seconds on one clock/],
    [row({ queued_ts: 1_795_348_980 }), /out of order/],
    [recorded({ cache: "hit_exact" }), /no request that a node answered \(1 requests left out/],
    [`${recorded()}\n{"v":1}`, /x, line 2: atMs is missing/],
  ])("bad input %#: says where and what is accepted", (text, message) => {
    expect(() => parseRequestLog(text, "x")).toThrow(CalibrationError);
    expect(() => parseRequestLog(text, "x")).toThrow(message);
  });

  it("an engine's log has one node", () => {
    expect(() => parseRequestLog(row(), "x", "gpu-0")).toThrow(/leave the node out/);
  });
});

describe("calibrate: options that cannot be", () => {
  const log = logOf(h100, poisson(60, 5, "options"));
  it.each<[CalibrationOptions, RegExp]>([
    [{ split: 0 }, /split is 0; it must be above 0 and at most 1/],
    [{ split: Number.NaN }, /split is NaN/],
    [{ split: 0.1 }, /only 6 of the first 6 requests .* 20 are needed/],
    [{ kvBlocks: 0.5 }, /kvBlocks is 0.5; it must be a whole number/],
    [{ kvBlocks: 3 }, /needs \d+ KV blocks of 16 tokens, and the law has 3/],
    [{ batchedTokensMax: 100, sequencesMax: 200 }, /100 tokens cannot hold 200 sequences/],
    [{ base: h100, batchedTokensMax: 100 }, /100 tokens cannot hold 256 sequences/],
    [
      { base: { ...h100, W: 5e6 } },
      /no overhead per step brings llama-3.1-8b\/h100 to the log's mean TPOT of/,
    ],
  ])("options %#: says what is accepted", (options, message) => {
    expect(() => calibrate(log, options)).toThrow(CalibrationError);
    expect(() => calibrate(log, options)).toThrow(message);
  });

  it("answers of one token have no TPOT", () => {
    const short = poisson(60, 5, "short").map((each) => ({ ...each, outputTokens: 1 }));
    expect(() => calibrate(logOf(h100, short), { base: h100 })).toThrow(/there is no TPOT/);
    expect(() => calibrate(logOf(h100, short))).toThrow(/only 0 answers have two tokens or more/);
  });

  it("a log with more requests at once than the base allows is pointed out", () => {
    const base = { ...h100, sequencesMax: 2 };
    const busy = logOf(h100, poisson(60, 20, "busy"));
    expect(calibrate(busy, { base }).notes.join(" ")).toMatch(/the law allows 2: give the engine/);
  });
});

describe("law files", () => {
  it("every shipped law comes back as it was, and so does one without hardware", () => {
    for (const name of lawNames()) {
      const law = lawByName(name);
      expect(parseLaw(formatLaw(law))).toEqual(law);
    }
    const { law } = calibrate(logOf(strange, poisson(60, 6, "file")), { sequencesMax: 24 });
    expect(formatLaw(law)).not.toContain("hardware");
    expect(parseLaw(formatLaw(law))).toEqual(law);
  });

  const edited = (change: (file: Record<string, Record<string, unknown>>) => void): string => {
    const file = JSON.parse(formatLaw(rtx4090));
    change(file);
    return JSON.stringify(file);
  };
  const put = (group: string, name: string, value: unknown) =>
    edited((file) => {
      if (group === "") Object.assign(file, { [name]: value });
      else Object.assign(file[group] ?? {}, { [name]: value });
    });

  it.each([
    ["not json", /f: not JSON/],
    ["[]", /the file is \[\]; it must be a JSON object/],
    [put("", "format", "x"), /format is "x"; this version reads "headrace-law"/],
    [put("", "v", 2), /v is 2; this version reads 1/],
    [put("", "coefficients", 5), /coefficients is 5; it must be a JSON object/],
    [put("coefficients", "W", undefined), /coefficients.W is missing; it must be a number, 0 or/],
    [put("coefficients", "actx", -1), /coefficients.actx is -1; it must be a number, 0 or more/],
    [put("coefficients", "acxt", 1), /unknown field coefficients.acxt; known: h, W/],
    [put("coefficients", "U", "1"), /coefficients.U is "1"/],
    [
      put("coefficients", "s", [
        [2, 5],
        [1, 5],
      ]),
      /coefficients.s is \[1,5\]; .*x ascending/,
    ],
    [put("coefficients", "aB", -50), /coefficients.aB is -50; it must be at least -32/],
    [put("coefficients", "h", -1e6), /coefficients.h is -1000000; .*more than 0 µs/],
    [put("limits", "kvBlocks", 0.5), /limits.kvBlocks is 0.5; it must be a whole number, 1 or/],
    [put("limits", "kvBlocksFrom", "?"), /accepted: measured, formula, log/],
    [put("limits", "sequencesMax", 4096), /batchedTokensMax is 2048; it must be at least .*4096/],
    [put("hardware", "memoryGiB", 0), /hardware.memoryGiB is 0; it must be a number, above 0/],
    [put("", "validated", "yes"), /validated is "yes"; it must be true or false/],
    [put("", "name", ""), /name is ""; it must be a text/],
  ])("bad file %#: says which field and what is accepted", (text, message) => {
    expect(() => parseLaw(text, "f")).toThrow(LawError);
    expect(() => parseLaw(text, "f")).toThrow(message);
  });

  it("loadLaw takes a shipped name or a file, and says what it takes", () => {
    expect(loadLaw(rtx4090.name)).toBe(rtx4090);
    const folder = mkdtempSync(join(tmpdir(), "headrace-law-"));
    try {
      const file = join(folder, "law.json");
      writeFileSync(file, formatLaw(proNode));
      expect(loadLaw(file)).toEqual(proNode);
      writeFileSync(file, "{}");
      expect(() => loadLaw(file)).toThrow(/law.json: format is missing/);
      expect(() => loadLaw(folder)).toThrow(/is no shipped law, and as a file: cannot be read/);
    } finally {
      rmSync(folder, { recursive: true });
    }
    expect(() => loadLaw("llama/rtx")).toThrow(/no such file; accepted: .*llama-3.1-8b\/rtx4090/);
  });
});

// ---- logs of real engines -----------------------------------------------------------------------

const LOGS = "../shared/data/validation";
const logged = existsSync(`${LOGS}/H200_batching-node/requests.jsonl`);
if (!logged) console.log(`calibrate: ${LOGS} is absent, the logs of real engines are skipped`);

function realLog(folder: string): RequestLog {
  const file = `${LOGS}/${folder}/requests.jsonl`;
  return parseRequestLog(readFileSync(file, "utf8"), file);
}

function expectMeans(table: ErrorTable | undefined, most: number): void {
  for (const metric of ERROR_METRICS) {
    expect(Math.abs(table?.[metric].mean.error ?? 1), `${metric} mean`).toBeLessThan(most);
  }
}

describe.skipIf(!logged)("calibrate: logs of real engines", () => {
  it("RTX PRO 6000 from its kernel profile by one scalar: everything within 4 %", () => {
    const base = { ...proNode, h: 0 };
    const { law, fitted } = calibrate(realLog("RTXPRO6000_Llama-3.1-8B"), { base, split: 1 });
    expect(law.h).toBeGreaterThan(2000);
    for (const metric of ERROR_METRICS) {
      for (const statistic of ERROR_STATISTICS) {
        const { error } = fitted[metric][statistic];
        expect(Math.abs(error), `${metric} ${statistic}`).toBeLessThan(0.04);
      }
    }
  });

  it("RTX PRO 6000 by one scalar from half of the log: the other half within 4 %", () => {
    const base = { ...proNode, h: 0 };
    expectMeans(calibrate(realLog("RTXPRO6000_Llama-3.1-8B"), { base }).holdOut, 0.04);
  });

  it.each([
    ["H200_batching-node", 64, 2048],
    ["RTX4090_Llama-3.1-8B", 256, 2048],
    ["RTXPRO6000_Llama-3.1-8B", 128, 2048],
  ])(
    "%s from scratch on half of the log: means of the other half within 10 %%",
    (folder, seats, budget) => {
      const calibration: Calibration = calibrate(realLog(folder));
      expectMeans(calibration.holdOut, 0.1);
      expect(calibration.law).toMatchObject({
        validated: true,
        sequencesMax: seats,
        batchedTokensMax: budget,
      });
    },
    60_000,
  );
});
