/** Each engine's own words, read right; what is not there stays unknown. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  type Engine,
  MetricsText,
  modelsFrom,
  sampleFromJson,
  sampleFromLoads,
} from "../transport/engine-metrics.ts";

fc.configureGlobal({ seed: 20_251_124 });

function read(text: string, expected: Engine | null = null) {
  const parser = new MetricsText();
  parser.push(Buffer.from(text));
  return parser.end(expected);
}

const python = `# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 12345.0
process_resident_memory_bytes 1.5e+09
`;

const vllm = `${python}# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B"} 12.0
vllm:num_requests_running{engine="1",model_name="meta-llama/Llama-3.1-8B"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B"} 5.0
vllm:num_requests_waiting{engine="1",model_name="meta-llama/Llama-3.1-8B"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:num_requests_waiting_by_reason{engine="1",model_name="m",reason="capacity"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="deferred"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 1000.0
vllm:generation_tokens_total{engine="1",model_name="m"} 500.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.3",model_name="m"} 7.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 12.5
`;

describe("metrics text", () => {
  it("vLLM: counts add up over engines, the fullest KV counts, waiting for room is told apart", () => {
    expect(read(vllm)).toEqual({
      engine: "vllm",
      running: 15,
      waiting: 5,
      waitingForCapacity: 2,
      kv: 0.75,
      generatedTokensTotal: 1500,
      preemptionsTotal: 2,
      missing: [],
    });
  });

  it("vLLM up to 0.10: the old name of the KV gauge; the new one counts where both are", () => {
    const old = vllm.replaceAll("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc");
    expect(read(old)).toMatchObject({ kv: 0.75, missing: [] });
    const both = `vllm:gpu_cache_usage_perc 0.9\nvllm:kv_cache_usage_perc 0.1\nvllm:gpu_cache_usage_perc 0.8\n`;
    expect(read(both)).toMatchObject({ kv: 0.1 });
  });

  it("vLLM: a renamed gauge is missing, never 0", () => {
    const renamed = vllm
      .replaceAll("vllm:kv_cache_usage_perc", "vllm:kv_cache_usage_ratio")
      .replaceAll("vllm:num_requests_waiting{", "vllm:num_requests_pending{");
    const sample = read(renamed);
    expect(sample).not.toHaveProperty("kv");
    expect(sample).not.toHaveProperty("waiting");
    expect(sample?.missing).toEqual(["vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]);
  });

  it("vLLM without log stats: everything is missing where vLLM is expected, nothing is known elsewhere", () => {
    expect(read(python)).toBeNull();
    expect(read(python, "vllm")).toEqual({
      engine: "vllm",
      missing: [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
      ],
    });
  });

  it("SGLang", () => {
    const text = `sglang:num_running_reqs{model_name="q",tp_rank="0"} 7.0
sglang:num_queue_reqs{model_name="q",tp_rank="0"} 2.0
sglang:token_usage{model_name="q",tp_rank="0"} 0.31
sglang:cache_hit_rate{model_name="q"} 0.0
sglang:num_retracted_reqs{model_name="q"} 9.0
sglang:num_retracted_requests_total{model_name="q"} 4.0
sglang:generation_tokens_total{model_name="q"} 77.0
`;
    const sample = {
      engine: "sglang",
      running: 7,
      waiting: 2,
      generatedTokensTotal: 77,
      preemptionsTotal: 4,
    };
    expect(read(text)).toEqual({ ...sample, kv: 0.31, missing: [] });
    expect(read(`${text}sglang:full_token_usage 0.5\n`)).toEqual({
      ...sample,
      kv: 0.5,
      missing: [],
    });
  });

  it("TGI has no KV gauge, and none is missed", () => {
    const text = `# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 4
tgi_batch_current_max_tokens 2048
tgi_queue_size 7
tgi_request_generated_tokens_bucket{le="1"} 0
tgi_request_generated_tokens_sum 8123
tgi_request_generated_tokens_count 44
`;
    expect(read(text)).toEqual({
      engine: "tgi",
      running: 4,
      waiting: 7,
      generatedTokensTotal: 8123,
      missing: [],
    });
  });

  it("TensorRT-LLM, served by itself and by Triton", () => {
    const serve = `trtllm_num_requests_running{engine_type="trtllm"} 3.0
trtllm_num_requests_waiting{engine_type="trtllm"} 1.0
trtllm_kv_cache_utilization{engine_type="trtllm"} 0.62
trtllm_kv_cache_host_utilization{engine_type="trtllm"} 0.99
`;
    expect(read(serve)).toEqual({
      engine: "trtllm",
      running: 3,
      waiting: 1,
      kv: 0.62,
      missing: [],
    });
    const triton = `nv_inference_request_success{model="tensorrt_llm",version="1"} 500
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 1
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="context",version="1"} 9
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 8
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm"} 40
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm"} 0.4
`;
    expect(read(triton)).toEqual({
      engine: "triton",
      running: 8,
      waiting: 1,
      kv: 0.4,
      missing: [],
    });
  });

  it("llama.cpp", () => {
    const text = `# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
llamacpp:requests_deferred 1
llamacpp:tokens_predicted_total 900
llamacpp:predicted_tokens_seconds 31.5
`;
    expect(read(text)).toEqual({
      engine: "llamacpp",
      running: 2,
      waiting: 1,
      generatedTokensTotal: 900,
      missing: [],
    });
  });

  it.each(["NaN", "+Inf", "-1", "oops", "", "1.5"])("a ratio of %s is unknown", (value) => {
    const sample = read(
      `vllm:num_requests_running 1\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc ${value}\n`,
    );
    expect(sample).toEqual({
      engine: "vllm",
      running: 1,
      waiting: 0,
      missing: ["vllm:kv_cache_usage_perc"],
    });
  });

  it("a ratio rounded a little above 1 is 1", () => {
    expect(read("vllm:kv_cache_usage_perc 1.004\n")).toMatchObject({ kv: 1 });
  });

  it("reads time stamps, spaces, tabs, escapes and exponents", () => {
    const text = `vllm:num_requests_running { model_name="a\\"} 9" , engine="0" , } 1.2e1 1700000000000
vllm:num_requests_waiting\t3
vllm:num_requests_waiting_by_reason{reason="capacity",model_name="x"}4`;
    expect(read(text)).toMatchObject({ running: 12, waiting: 3, waitingForCapacity: 4 });
  });

  it("prefers the configured engine where two are in one text", () => {
    const text = "tgi_queue_size 1\nvllm:num_requests_waiting 2\n";
    expect(read(text, "vllm")).toMatchObject({ engine: "vllm", waiting: 2 });
    expect(read(text)).toMatchObject({ engine: "tgi", waiting: 1 });
  });

  it("says the same however the text is cut", () => {
    const bytes = Buffer.from(vllm);
    fc.assert(
      fc.property(fc.array(fc.nat(bytes.length), { maxLength: 60 }), (cuts) => {
        const parser = new MetricsText();
        let from = 0;
        for (const to of [...cuts.sort((a, b) => a - b), bytes.length]) {
          parser.push(new Uint8Array(bytes.subarray(from, to)));
          from = to;
        }
        expect(parser.end(null)).toEqual(read(vllm));
      }),
    );
  });

  it("skips a line without end, whatever follows it", () => {
    const parser = new MetricsText();
    parser.push(Buffer.from("vllm:num_requests_waiting 2\nx"));
    for (let i = 0; i < 40; i++) parser.push(Buffer.alloc(10_000, "y"));
    parser.push(Buffer.from(" 1\nvllm:num_requests_running 1\n"));
    expect(parser.end(null)).toMatchObject({ waiting: 2, running: 1 });
  });

  it("survives any bytes", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 300 }), (bytes) => {
        const parser = new MetricsText();
        parser.push(bytes);
        const sample = parser.end("vllm");
        expect(sample?.missing.length).toBe(3);
      }),
    );
  });
});

describe("metrics JSON", () => {
  it("the article's", () => {
    const json = { queue_depth: 3, avg_latency_seconds: 1.5, gpu_memory_utilization: 0.8 };
    expect(sampleFromJson(json)).toEqual({
      engine: "article",
      waiting: 3,
      latencySeconds: 1.5,
      gpuMemory: 0.8,
      missing: [],
    });
    expect(
      sampleFromJson({ queue_depth: 0, avg_latency_seconds: "1", gpu_memory_utilization: 80 }),
    ).toEqual({
      engine: "article",
      waiting: 0,
      missing: ["avg_latency_seconds", "gpu_memory_utilization"],
    });
  });

  it("trtllm-serve's iterations: the newest counts; an idle engine is unknown", () => {
    const iterations = [
      { numActiveRequests: 99 },
      {
        numActiveRequests: 5,
        numQueuedRequests: 3,
        kvCacheStats: { usedNumBlocks: 25, maxNumBlocks: 100, freeNumBlocks: 75 },
      },
    ];
    expect(sampleFromJson(iterations)).toEqual({
      engine: "trtllm",
      running: 2,
      waiting: 3,
      kv: 0.25,
      missing: [],
    });
    expect(sampleFromJson([])?.missing.length).toBe(3);
  });

  it("SGLang's loads: ranks add up, the fullest counts", () => {
    const rank = {
      num_running_reqs: 4,
      num_waiting_reqs: 1,
      num_used_tokens: 10,
      max_total_num_tokens: 1000,
      max_running_requests: 64,
      token_usage: 0.2,
      utilization: 0,
    };
    const json = {
      version: "0.5",
      loads: [rank, { ...rank, num_running_reqs: 6, token_usage: 0.6 }],
    };
    expect(sampleFromLoads(json)).toEqual({
      engine: "sglang",
      running: 10,
      waiting: 2,
      maxSequences: 128,
      kv: 0.6,
      missing: [],
    });
  });

  it("SGLang's loads of an engine that is not ready, or broken, are no sample", () => {
    expect(sampleFromLoads({ loads: [] })).toHaveProperty("unusable");
    expect(sampleFromLoads({ loads: [{ max_total_num_tokens: 0 }] })).toEqual({
      unusable: "not ready",
    });
    expect(sampleFromLoads({ loads: [{}] })).toMatchObject({
      missing: ["sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"],
    });
  });

  it.each([[null], [1], ["x"], [{}], [{ loads: 1 }], [[1]], [[{ x: 1 }]]])(
    "%j is of no engine",
    (json) => {
      expect(sampleFromJson(json)).toBeNull();
      expect(sampleFromLoads(json)).toBeNull();
    },
  );
});

describe("models", () => {
  it("with a parent are adapters", () => {
    const json = {
      object: "list",
      data: [
        { id: "llama", root: "llama", parent: null },
        { id: "sql-lora", root: "/x", parent: "llama" },
        { id: "" },
        { name: "y" },
      ],
    };
    expect(modelsFrom(json)).toEqual({ models: ["llama"], adapters: ["sql-lora"] });
    expect(modelsFrom({ data: [] })).toEqual({ models: [], adapters: [] });
    for (const bad of [null, {}, { data: 1 }, []]) expect(modelsFrom(bad)).toBeNull();
  });
});
