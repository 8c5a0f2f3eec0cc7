/**
 * `headrace node`: a stand-in inference node. OpenAI's API and vLLM's metrics over a modelled GPU,
 * so that a gateway, a client or a load test can run without one; it misbehaves on demand.
 */
import { Command, InvalidArgumentError } from "commander";
import { GpuNodeModel } from "../sim/gpu-node-model.ts";
import { LawError, loadLaw } from "../sim/law-file.ts";
import { KV_BLOCK_TOKENS, lawByName, lawNames, type StepLaw } from "../sim/laws.ts";
import { BODY_FAULTS, type NodeFault, NodeServer, parseFault } from "../transport/node-server.ts";

/** Coarser than the engine's own 16, and enough for prompts that share a system message. */
const PREFIX_BLOCK_TOKENS = 64;
const LAW = "llama-3.1-8b/h100";

type Flags = {
  port: number;
  host: string;
  model: string[];
  name?: string;
  law: StepLaw;
  speed: number;
  kvBlocks?: number;
  apiKey?: string;
  failRate?: number;
  failStatus?: number;
  failDelayMs?: number;
  failRetryAfterS?: number;
  refuse?: boolean;
  hang?: boolean;
  stallAfter?: number;
  dieAfter?: number;
  slow?: number;
  bodyFault?: string;
};

export function nodeCommand(): Command {
  return new Command("node")
    .description("a stand-in inference node: OpenAI's API over a modelled GPU, for tests and load")
    .option("--port <port>", "port to listen on (0 = any free one)", wholeNumber(0, 65_535), 9001)
    .option("--host <host>", "address to listen on", "127.0.0.1")
    .option("--model <name...>", "model names to serve", ["llama-3.1-8b"])
    .option("--name <name>", "shown as system_fingerprint (default: from the port)")
    .option(
      "--law <law>",
      `model and card, one of: ${lawNames().join(", ")}, or a file of \`calibrate\` (default: ${LAW})`,
      law,
    )
    .option("--speed <factor>", "how many times as fast as the real card, up to 10000", Number, 1)
    .option("--kv-blocks <count>", "KV memory in blocks of 16 tokens", wholeNumber(1, 1e9))
    .option("--api-key <key>", "ask for `authorization: Bearer <key>` on /v1")
    .option("--fail-rate <share>", "share of requests answered with an error, 0..1", Number)
    .option("--fail-status <status>", "status of these errors (default: 503)", Number)
    .option("--fail-delay-ms <ms>", "delay before these errors (default: 5)", Number)
    .option("--fail-retry-after-s <s>", "retry-after of these errors", Number)
    .option("--refuse", "destroy every connection that carries a request")
    .option("--hang", "take requests, never make a token")
    .option("--stall-after <tokens>", "fall silent after so many tokens", Number)
    .option("--die-after <tokens>", "destroy the connection after so many tokens", Number)
    .option("--slow <factor>", "every engine step takes so many times as long", Number)
    .option("--body-fault <kind>", `answer with one of: ${BODY_FAULTS.join(", ")}`)
    .addHelpText("after", "\nFaults can be changed while it runs: GET, POST, DELETE /fault.")
    .action(async (flags: Omit<Flags, "law"> & { law?: StepLaw }, command: Command) => {
      const fault = parseFault(faultOf(flags));
      if (typeof fault === "string") command.error(`error: ${fault}`);
      else await run({ ...flags, law: flags.law ?? lawByName(LAW) }, fault, command);
    });
}

async function run(flags: Flags, fault: NodeFault, command: Command): Promise<void> {
  const kvBlocks = flags.kvBlocks ?? flags.law.kvBlocks;
  const blocksMax = Math.ceil((kvBlocks * KV_BLOCK_TOKENS) / PREFIX_BLOCK_TOKENS);
  const prefix = { blockTokens: PREFIX_BLOCK_TOKENS, blocksMax };
  // Nodes on ports of the system's choice are told apart by their process.
  const name = flags.name ?? `node-${flags.port === 0 ? process.pid : flags.port}`;
  let server: NodeServer;
  let listening: { port: number; url: string };
  try {
    server = new NodeServer({
      engine: new GpuNodeModel({ law: flags.law, mode: "leap", kvBlocks, prefix }),
      models: flags.model,
      name,
      speed: flags.speed,
      ...(flags.apiKey === undefined ? {} : { apiKey: flags.apiKey }),
    });
    listening = await server.listen(flags.port, flags.host);
  } catch (error) {
    return command.error(`error: ${error instanceof Error ? error.message : String(error)}`);
  }
  server.setFault(fault);

  const end = () => {
    process.off("SIGTERM", end);
    process.off("SIGINT", end);
    process.off("disconnect", end);
    void server.close();
  };
  process.on("SIGTERM", end);
  process.on("SIGINT", end);
  process.on("disconnect", end); // The process that forked it is gone.
  const { law, model, speed } = flags;
  const trust = law.validated ? "validated" : law.note;
  console.log(
    `listening on ${listening.url} (model ${model.join(", ")}; law ${law.name}, ${trust}; speed ${speed})`,
  );
  process.send?.({ kind: "listening", port: listening.port });
}

/** As `/fault` takes it, so that one place checks both. */
function faultOf(flags: Omit<Flags, "law">): Record<string, unknown> {
  const fault: Record<string, unknown> = {
    failRate: flags.failRate,
    status: flags.failStatus,
    delayMs: flags.failDelayMs,
    retryAfterS: flags.failRetryAfterS,
    refuse: flags.refuse,
    hang: flags.hang,
    stallAfterTokens: flags.stallAfter,
    dieAfterTokens: flags.dieAfter,
    slowFactor: flags.slow,
    body: flags.bodyFault,
  };
  return Object.fromEntries(Object.entries(fault).filter(([, value]) => value !== undefined));
}

function law(name: string): StepLaw {
  try {
    return loadLaw(name);
  } catch (error) {
    if (error instanceof LawError) throw new InvalidArgumentError(error.message);
    throw error;
  }
}

function wholeNumber(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    const isFine = text.trim() !== "" && Number.isInteger(value) && value >= least && value <= most;
    if (isFine) return value;
    throw new InvalidArgumentError(`It must be a whole number from ${least} to ${most}.`);
  };
}
