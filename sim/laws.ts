/**
 * How long one engine step takes on a GPU: the step-time law, its shipped coefficient sets, and the
 * bounds that physics puts on them.
 *
 *   T = h + max(W + d·n, F + C·n) + s(seqs) + [B>0](a0 + aB·B + actx·ctx)
 *         + [prefill](p0 + pq·Σ c(kv + c/2)) + U·(new shapes) + comm(n)
 *   n = B + c; B = decoding sequences; c = prefill tokens of the step; seqs = B + prefilling requests;
 *   ctx = tokens in KV over the decoding sequences; kv = tokens of a request in KV before its chunk c.
 *
 * The letters are those of the formula, so that a set can be compared with a fit at a glance. All
 * are µs. Intuition: below the knee a step streams the weights (W), above it it multiplies (C per
 * token); decoding adds reading the context (actx per token). About four of the numbers decide; the
 * rest are below 4 %.
 *
 * It does not schedule: gpu-node-model.ts decides what is in a step. It knows nothing of requests.
 */

/**
 * Points (x, µs) with x ascending, linear between, held flat before the first and continued after
 * the last.
 */
export type CostTable = readonly (readonly [x: number, us: number])[];

/**
 * What the model and the cards are: the source of KV capacity and of the bounds of
 * `physicsViolations`.
 */
export type Hardware = {
  /**
   * Of the whole model, and of one vocabulary × hidden matrix (embedding; the output head is
   * another).
   */
  readonly parameters: number;
  readonly embeddingParameters: number;
  readonly bytesPerParameter: number;
  /** 2 × layers × kv heads × head dimension × bytes, over all cards. */
  readonly kvBytesPerToken: number;
  readonly tensorParallel: number;
  /** Of one card. */
  readonly memoryGiB: number;
  readonly bandwidthBytesPerSecond: number;
  /** Dense, at the model's precision. */
  readonly flopsPerSecond: number;
};

/** The law of one model on one kind of node, with the engine limits that belong to it. */
export type StepLaw = {
  readonly name: string;
  /** Overhead per step: the one scalar that calibrates a node. */
  readonly h: number;
  /** Streaming the weights, and per token below the knee. */
  readonly W: number;
  readonly d: number;
  /** Multiplying: floor and per token above the knee. */
  readonly F: number;
  readonly C: number;
  /** Output head and sampler by sequences. */
  readonly s: CostTable;
  /** Decode attention: constant, per sequence, per token of context. */
  readonly a0: number;
  readonly aB: number;
  readonly actx: number;
  /** Prefill attention: constant, per token pair. */
  readonly p0: number;
  readonly pq: number;
  /**
   * First prefill chunk of its shape (tokens, and tokens in KV before them) since the engine came
   * up: some compile or plan kernels for each shape, once. Absent: no such engine.
   */
  readonly U?: number;
  /** All-reduce by tokens of the step; empty at tensor parallelism 1. */
  readonly comm: CostTable;
  /**
   * KV capacity in blocks of 16 tokens, and where the number comes from (`log`: fitted to a request
   * log, or unknown and so large that it never runs out). 10 % wrong is ±15 % in TTFT.
   */
  readonly kvBlocks: number;
  readonly kvBlocksFrom: "measured" | "formula" | "log";
  /**
   * Tokens of one step (`max_num_batched_tokens`) and seats (`max_num_seqs`); seats never exceed
   * tokens.
   */
  readonly batchedTokensMax: number;
  readonly sequencesMax: number;
  /**
   * From process start to ready. An assumption, not a measurement: loading weights and graph
   * capture.
   */
  readonly startUpUs: number;
  readonly hardware: Hardware;
  readonly provenance: string;
  /** Compared with a request log of a real engine, percentile by percentile. */
  readonly validated: boolean;
  /** What a reader of a result must know; printed beside it. */
  readonly note: string;
};

/** Tokens per KV block, as vLLM has it. */
export const KV_BLOCK_TOKENS = 16;

/**
 * Time of one step in µs, not rounded.
 * @param decodes sequences that make one token from their KV (B)
 * @param context tokens in KV over those sequences (ctx)
 * @param prefillTokens prefill tokens of the step, in chunks of more than one (c)
 * @param prefills requests that these tokens belong to
 * @param prefillPairs Σ c(kv + c/2) over these requests
 */
export function rawStepUs(
  law: StepLaw,
  decodes: number,
  context: number,
  prefillTokens: number,
  prefills: number,
  prefillPairs: number,
): number {
  const tokens = decodes + prefillTokens;
  let us = law.h + Math.max(law.W + law.d * tokens, law.F + law.C * tokens);
  us += interpolate(law.s, decodes + prefills);
  if (decodes > 0) us += law.a0 + law.aB * decodes + law.actx * context;
  if (prefillTokens > 0) us += law.p0 + law.pq * prefillPairs;
  if (law.comm.length > 0) us += interpolate(law.comm, tokens);
  return us;
}

/**
 * Time of one step in whole µs, at least 1; `slowFactor` multiplies it. Parameters as `rawStepUs`.
 */
export function stepTimeUs(
  law: StepLaw,
  decodes: number,
  context: number,
  prefillTokens: number,
  prefills: number,
  prefillPairs: number,
  slowFactor = 1,
): number {
  const us = rawStepUs(law, decodes, context, prefillTokens, prefills, prefillPairs);
  return Math.max(1, Math.round(us * slowFactor));
}

/** Least value of a table: tables from measurements need not rise. */
export function leastOf(table: CostTable): number {
  let least = Number.POSITIVE_INFINITY;
  for (const [, us] of table) least = Math.min(least, us);
  return table.length === 0 ? 0 : least;
}

function interpolate(table: CostTable, x: number): number {
  let left = table[0];
  if (left === undefined) return 0;
  if (x <= left[0]) return left[1];
  let us = left[1];
  for (let i = 1; i < table.length; i++) {
    const right = table[i];
    if (right === undefined) break;
    us = left[1] + ((right[1] - left[1]) * (x - left[0])) / (right[0] - left[0]);
    if (x <= right[0]) return us;
    left = right;
  }
  return us;
}

/**
 * KV capacity in blocks when the engine's own `num_gpu_blocks` is not known: memory × utilisation,
 * less weights, activations (5.5 GiB, dense models) and runtime overhead (0.15 GiB on one card,
 * else 0.6 GiB each). A fallback: on small cards it is far off. Never below 0.
 */
export function estimateKvBlocks(hardware: Hardware, memoryUtilization = 0.9): number {
  const { tensorParallel } = hardware;
  const gib = 1024 * 1024 * 1024;
  const weightsGiB = (hardware.parameters * hardware.bytesPerParameter) / gib;
  const overheadGiB = tensorParallel === 1 ? 0.15 : 0.6 * tensorParallel;
  const freeGiB =
    hardware.memoryGiB * memoryUtilization * tensorParallel - weightsGiB - 5.5 - overheadGiB;
  const blocks = (freeGiB * gib) / (hardware.kvBytesPerToken * KV_BLOCK_TOKENS);
  return Math.max(0, Math.floor(blocks));
}

/**
 * Where a law beats physics, one sentence each; empty when it does not. A set that decodes faster
 * than the weights and the context can be read, or prefills faster than the cards multiply, must
 * not answer a planning question.
 */
export function physicsViolations(law: StepLaw): string[] {
  const { hardware } = law;
  const bandwidth = hardware.bandwidthBytesPerSecond * hardware.tensorParallel;
  const flops = hardware.flopsPerSecond * hardware.tensorParallel;
  // The embedding is looked up, not read whole.
  const readBytes =
    (hardware.parameters - hardware.embeddingParameters) * hardware.bytesPerParameter;
  const weightsUs = (readBytes / bandwidth) * 1e6;
  const contextUs = (hardware.kvBytesPerToken / bandwidth) * 1e6;
  // The output head works on the last position only.
  const tokenUs = ((2 * (hardware.parameters - 2 * hardware.embeddingParameters)) / flops) * 1e6;
  const violations: string[] = [];
  const decodeUs = rawStepUs(law, 1, 0, 0, 0, 0);
  if (decodeUs < weightsUs) {
    violations.push(
      `${law.name}: one decode step takes ${decodeUs.toFixed(0)} µs, reading the weights alone ${weightsUs.toFixed(0)} µs`,
    );
  }
  if (law.actx < contextUs) {
    violations.push(
      `${law.name}: a token of context costs ${law.actx} µs, reading it ${contextUs.toFixed(4)} µs`,
    );
  }
  if (law.C < tokenUs) {
    violations.push(
      `${law.name}: a prefill token costs ${law.C} µs, multiplying it ${tokenUs.toFixed(1)} µs at peak`,
    );
  }
  return violations;
}

/** Names of the shipped laws, in the order of the table. */
export function lawNames(): string[] {
  return LAWS.map((law) => law.name);
}

/** The shipped law of that name. Throws an Error that lists the accepted names. */
export function lawByName(name: string): StepLaw {
  const law = LAWS.find((candidate) => candidate.name === name);
  if (law === undefined) {
    throw new Error(`unknown law ${JSON.stringify(name)}; accepted: ${lawNames().join(", ")}`);
  }
  return law;
}

// ---- the shipped sets ---------------------------------------------------------------------------

const PROFILE_ONLY = "profile only, expect −10…−25 % until one scalar is calibrated";
const LLM_SERVING_SIM = "LLMServingSim kernel profiles (MIT), vLLM 0.19";
const VIDUR = "Vidur kernel profiles (MIT)";

type Model = Pick<
  Hardware,
  "parameters" | "embeddingParameters" | "bytesPerParameter" | "kvBytesPerToken"
>;
type Card = Pick<Hardware, "memoryGiB" | "bandwidthBytesPerSecond" | "flopsPerSecond">;

const LLAMA_3_8B: Model = {
  parameters: 8.03e9,
  embeddingParameters: 128256 * 4096,
  bytesPerParameter: 2,
  kvBytesPerToken: 2 * 32 * 8 * 128 * 2,
};
const LLAMA_3_70B: Model = {
  parameters: 70.55e9,
  embeddingParameters: 128256 * 8192,
  bytesPerParameter: 2,
  kvBytesPerToken: 2 * 80 * 8 * 128 * 2,
};
const LLAMA_2_7B: Model = {
  parameters: 6.74e9,
  embeddingParameters: 32000 * 4096,
  bytesPerParameter: 2,
  kvBytesPerToken: 2 * 32 * 32 * 128 * 2, // Multi-head attention: four times a Llama 3 8B.
};
const LLAMA_2_70B: Model = {
  parameters: 68.98e9,
  embeddingParameters: 32000 * 8192,
  bytesPerParameter: 2,
  kvBytesPerToken: 2 * 80 * 8 * 128 * 2,
};
const RTX_4090: Card = {
  memoryGiB: 23.5,
  bandwidthBytesPerSecond: 1.008e12,
  flopsPerSecond: 165.2e12,
};
const RTX_PRO_6000: Card = {
  memoryGiB: 96,
  bandwidthBytesPerSecond: 1.792e12,
  flopsPerSecond: 503.8e12,
};
const H100: Card = { memoryGiB: 80, bandwidthBytesPerSecond: 3.35e12, flopsPerSecond: 989e12 };
const A100: Card = { memoryGiB: 80, bandwidthBytesPerSecond: 2.04e12, flopsPerSecond: 312e12 };

// Measured all-reduce time of a whole step (160 calls, hidden 8192, bf16) over four cards of one DGX.
const ALL_REDUCE_H100: CostTable = [
  [1, 6100],
  [64, 6600],
  [512, 9900],
  [2048, 26700],
];
const ALL_REDUCE_A100: CostTable = [
  [1, 2900],
  [64, 10200],
  [512, 19700],
  [2048, 51000],
];

function on(model: Model, card: Card, tensorParallel: number): Hardware {
  return { ...model, ...card, tensorParallel };
}

/**
 * Context term of a card without attention profiles: measured ones are 1.08–1.09 × the time to read
 * the bytes.
 */
function contextTerm(hardware: Hardware): number {
  const bandwidth = hardware.bandwidthBytesPerSecond * hardware.tensorParallel;
  return (hardware.kvBytesPerToken / bandwidth) * 1e6 * 1.085;
}

type Profile = Pick<StepLaw, "name" | "W" | "d" | "F" | "C" | "s" | "pq" | "comm" | "provenance">;

/** A set of kernel sums without attention profiles: the terms nobody measured are derived or 0. */
function profileOnly(hardware: Hardware, startUpUs: number, profile: Profile): StepLaw {
  return {
    ...profile,
    h: 0,
    a0: 0,
    aB: 0,
    actx: contextTerm(hardware),
    p0: 0,
    kvBlocks: estimateKvBlocks(hardware),
    kvBlocksFrom: "formula",
    batchedTokensMax: 2048,
    sequencesMax: 256,
    startUpUs,
    hardware,
    validated: false,
    note: PROFILE_ONLY,
  };
}

const START_UP_8B_US = 60_000_000;
const START_UP_70B_US = 180_000_000;

// Quadratic prefill term where no profile has it: 4·layers·hidden FLOP per token pair at about 260
// TFLOP/s on an H100 (middle of the derived 0.0014–0.0027 µs) and 60 % of peak on an A100. Its
// weight is below 1 %.
const LAWS: readonly StepLaw[] = [
  {
    name: "llama-3.1-8b/rtx4090",
    h: 0,
    W: 15357.960701029793,
    d: 32.04846850084476,
    F: 2050.470109691847,
    C: 87.52943259504845,
    s: [
      [1, 1122],
      [8, 1144],
      [16, 1157],
      [32, 1228],
      [64, 1259],
      [128, 1383],
      [256, 1982],
    ],
    a0: 680.1680300528473,
    aB: 3.860017916713658,
    actx: 0.14050168143092817,
    p0: 969.1183627041548,
    pq: 0.004155667830151689,
    comm: [],
    kvBlocks: 2588,
    kvBlocksFrom: "measured",
    batchedTokensMax: 2048,
    sequencesMax: 256,
    startUpUs: START_UP_8B_US,
    hardware: on(LLAMA_3_8B, RTX_4090, 1),
    provenance: LLM_SERVING_SIM,
    validated: true,
    note: "mean TTFT, TPOT and E2E within 1 % of a real vLLM 0.19 run near saturation; no log at low load",
  },
  {
    name: "llama-3.1-8b/rtx-pro-6000",
    h: 2912,
    W: 10028.21789782805,
    d: 13.28394433392361,
    F: 2858.7619106722764,
    C: 36.15895698485643,
    s: [
      [1, 739],
      [8, 717],
      [16, 726],
      [32, 737],
      [64, 756],
      [128, 798],
      [256, 996],
    ],
    a0: 489.810622822234,
    aB: 3.2690211463594014,
    actx: 0.08936500563243881,
    p0: 1023.9671802487593,
    pq: 0.002291106269849954,
    comm: [],
    kvBlocks: estimateKvBlocks(on(LLAMA_3_8B, RTX_PRO_6000, 1)),
    kvBlocksFrom: "formula",
    batchedTokensMax: 2048,
    sequencesMax: 128,
    startUpUs: START_UP_8B_US,
    hardware: on(LLAMA_3_8B, RTX_PRO_6000, 1),
    provenance: `${LLM_SERVING_SIM}; h fitted on the mean TPOT of one run`,
    validated: true,
    note: "within 3 % of a real vLLM 0.19 run without KV pressure; KV capacity is from the formula",
  },
  profileOnly(on(LLAMA_3_8B, H100, 1), START_UP_8B_US, {
    name: "llama-3.1-8b/h100",
    W: 8290,
    d: 10.7,
    F: 2156,
    C: 26.0,
    s: [
      [1, 370],
      [256, 420],
    ],
    pq: 0.002,
    comm: [],
    provenance:
      "LLMServingSim layer sums (MIT, profiler v0), fit error 2.7 %; context term derived",
  }),
  profileOnly(on(LLAMA_3_8B, A100, 1), START_UP_8B_US, {
    name: "llama-3-8b/a100",
    W: 9708,
    d: 29.1,
    F: 6426,
    C: 66.8,
    s: [[1, 515]],
    pq: 0.0028,
    comm: [],
    provenance: `${VIDUR}, fit error 3.8 %; context term and output head derived`,
  }),
  profileOnly(on(LLAMA_2_7B, H100, 1), START_UP_8B_US, {
    name: "llama-2-7b/h100",
    W: 5565,
    d: 10.7,
    F: 2879,
    C: 20.2,
    s: [[1, 92]], // 262 MB at 3.35 TB/s × the 1.18 of the Llama 3 output head.
    pq: 0.002,
    comm: [],
    provenance: `${VIDUR}, fit error 4.9 %; context term and output head derived`,
  }),
  profileOnly(on(LLAMA_3_70B, H100, 4), START_UP_70B_US, {
    name: "llama-3.1-70b/4xh100",
    W: 19619,
    d: 24.2,
    F: 7396,
    C: 69.1,
    s: [[1, 180]],
    pq: 0.0025,
    comm: ALL_REDUCE_H100,
    provenance:
      "LLMServingSim layer sums (MIT), fit error 1.6 %; Vidur all-reduce; context term derived",
  }),
  profileOnly(on(LLAMA_2_70B, H100, 4), START_UP_70B_US, {
    name: "llama-2-70b/4xh100",
    W: 14626,
    d: 12.3,
    F: 10189,
    C: 52.3,
    s: [[1, 45]],
    pq: 0.0025,
    comm: ALL_REDUCE_H100,
    provenance: `${VIDUR}, fit error 5.1 %; context term and output head derived`,
  }),
  profileOnly(on(LLAMA_3_70B, A100, 4), START_UP_70B_US, {
    name: "llama-3-70b/4xa100",
    W: 24498,
    d: 70.2,
    F: 17946,
    C: 158.3,
    s: [[1, 257]],
    pq: 0.0035,
    comm: ALL_REDUCE_A100,
    provenance: `${VIDUR}, fit error 3.6 %; context term and output head derived`,
  }),
];
