/** Flags by which a command that is no gateway takes an embedder, and the embedder that they name. */
import type { Command } from "commander";
import { openEmbedder } from "../transport/embedder.ts";
import { EmbedderError } from "../transport/embedder-backend.ts";
import { parseOptions } from "../transport/options.ts";
import { FlagError } from "./flag-values.ts";

/** As commander gives them. */
export type EmbedderFlags = {
  embedder: string;
  embedderModel?: string;
  path?: string;
  embedderUrl?: string;
  embedderKey?: string;
  dimension?: string;
};

/** An embedder that has passed its self-test. */
export type OpenEmbedder = {
  /** Name, version, dimension. */
  id: string;
  /** In order; undefined for each text that gets none. */
  embed(texts: readonly string[]): Promise<(Float32Array | undefined)[]>;
  close(): Promise<void>;
};

/** @param fallback kind that is taken when none is named */
export function withEmbedderFlags(command: Command, fallback: string): Command {
  return command
    .option("--embedder <kind>", "lexical, transformers, http or off", fallback)
    .option("--embedder-model <name>", "as cache.semantic.embedder.model")
    .option("--path <folder>", "as cache.semantic.embedder.path")
    .option("--embedder-url <url>", "as cache.semantic.embedder.url")
    .option("--embedder-key <key>", "as cache.semantic.embedder.key")
    .option("--dimension <count>", "that vectors must have");
}

/**
 * The embedder as a gateway would have it; undefined when it is off.
 * @throws FlagError for flags that make no embedder, and for one that cannot be had.
 */
export async function openFlagged(flags: EmbedderFlags): Promise<OpenEmbedder | undefined> {
  const { embedder: type, embedderModel, path, embedderUrl, embedderKey, dimension } = flags;
  const embedder = {
    type,
    ...(embedderModel !== undefined && { model: embedderModel }),
    ...(path !== undefined && { path }),
    ...(embedderUrl !== undefined && { url: embedderUrl }),
    ...(embedderKey !== undefined && { key: embedderKey }),
    ...(dimension !== undefined && { dimension: Number(dimension) }),
  };
  const nodes = [{ url: "http://127.0.0.1:1" }]; // Not asked; without one no options are complete.
  const parsed = parseOptions({ nodes, cache: { semantic: { embedder } } });
  if (!parsed.ok) {
    const lines = parsed.problems.map(
      ({ path: at, message }) => `embedder: ${at.split(".").at(-1)} ${message}`,
    );
    throw new FlagError(lines.join("\n"));
  }
  if (type === "off") return undefined;
  try {
    const opened = await openEmbedder(parsed.options.cache.semantic.embedder, quiet);
    await opened?.settled();
    const { state = "off", reason = "", identity } = opened?.describe() ?? {};
    if (opened === undefined || state !== "healthy" || identity === undefined) {
      await opened?.close();
      throw new FlagError(`the embedder is ${state}: ${reason}`);
    }
    return {
      id: `${identity.id} ${identity.version}, ${identity.dimension} dimensions`,
      embed: async (texts) => {
        const embedded = await opened.embedAhead(texts);
        return embedded.map((one) => (one.kind === "vector" ? one.vector : undefined));
      },
      close: () => opened.close(),
    };
  } catch (error) {
    if (error instanceof EmbedderError) throw new FlagError(`the embedder: ${error.message}`);
    throw error;
  }
}

/** Whether it can be had is told by what this throws. */
const quiet = { info: () => undefined, warn: () => undefined };
