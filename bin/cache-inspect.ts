/**
 * `headrace cache inspect`: what a running gateway has stored of a tenant, and why a text would be answered by it or
 * not; or, without a gateway, why two texts match or not. Ends with 0, or with 2 for bad input and a gateway that
 * refuses or is not there.
 */
import { Command } from "commander";
import {
  guardBlocks,
  guardFeatures,
  guardNames,
  standardGuards,
  strictGuards,
} from "../actors/match-guards.ts";
import type { InspectedEntry } from "../actors/semantic-shard.ts";
import { dot } from "../transport/embedder-backend.ts";
import type { Inspection } from "../transport/main.ts";
import { defaults } from "../transport/options.ts";
import { type EmbedderFlags, openFlagged, withEmbedderFlags } from "./embedder-flags.ts";
import { FlagError, numberOf } from "./flag-values.ts";

type Flags = EmbedderFlags & {
  texts?: string[];
  threshold: string;
  strict?: boolean;
  url: string;
  token?: string;
  tenant: string;
  text?: string;
  scope?: string;
  count: string;
  json?: boolean;
};

const ASK_MS = 10_000;

export function inspectCommand(): Command {
  const { similarityMin } = defaults.cache.semantic;
  const command = new Command("inspect")
    .description("list stored questions, and show why two texts match or do not")
    .option("--texts <two...>", "compare these two, without a gateway")
    .option("--threshold <cosine>", "for --texts: least similarity of a match", `${similarityMin}`)
    .option("--strict", "for --texts: with the guard of strict tenants")
    .option("--url <url>", "the gateway", "http://127.0.0.1:8080")
    .option("--token <token>", "its admin.token (else HEADRACE_ADMIN_TOKEN)")
    .option("--tenant <name>", "whose questions", "local")
    .option("--text <text>", "show the stored questions nearest to it, and what would come of them")
    .option("--scope <digits>", "only scopes that begin so")
    .option("--count <count>", "questions listed at most, 1 to 1000", "20")
    .option("--json", "print JSON");
  withEmbedderFlags(command, "lexical");
  // Commander ends with 1 for a flag that is missing or unknown: bad input, too.
  command.exitOverride(({ code, exitCode }) => {
    process.exit(code.startsWith("commander.") && exitCode === 1 ? 2 : exitCode);
  });
  return command.action((flags: Flags) => run(flags, command));
}

async function run(flags: Flags, command: Command): Promise<void> {
  try {
    const text = flags.texts === undefined ? await ofGateway(flags) : await ofTexts(flags);
    command.configureOutput().writeOut?.(text);
  } catch (error) {
    if (!(error instanceof FlagError)) throw error;
    command.error(`headrace cache inspect: ${error.message}`, {
      exitCode: 2,
      code: "headrace.cache",
    });
  }
}

// ---- two texts ----------------------------------------------------------------------------------------------

/** What is between two texts. */
type Compared = {
  texts: readonly string[];
  embedder: string;
  threshold: number;
  /** Absent: one of them gets no vector. */
  similarity?: number;
  /** Each guard, and what it says against a match. */
  guards: { guard: string; asked: boolean; blocks: boolean; says: string }[];
  matches: boolean;
  why: string;
};

async function ofTexts(flags: Flags): Promise<string> {
  const { texts = [], strict = false, json } = flags;
  const [left, right] = texts;
  if (left === undefined || right === undefined || texts.length !== 2) {
    throw new FlagError(`--texts takes two texts, not ${texts.length}`);
  }
  const threshold = numberOf("--threshold", flags.threshold);
  if (!(threshold > 0 && threshold <= 1)) {
    throw new FlagError(`--threshold is ${flags.threshold}; accepted: above 0, at most 1`);
  }
  const embedder = await openFlagged(flags);
  if (embedder === undefined) throw new FlagError("--embedder is off: there is nothing to compare");
  try {
    const [a, b] = await embedder.embed([left, right]);
    const similarity = a === undefined || b === undefined ? undefined : dot(a, b);
    const compared = compare(left, right, similarity, threshold, strict, embedder.id);
    return json === true ? `${JSON.stringify(compared, null, 2)}\n` : comparedText(compared);
  } finally {
    await embedder.close();
  }
}

function compare(
  left: string,
  right: string,
  similarity: number | undefined,
  threshold: number,
  strict: boolean,
  embedder: string,
): Compared {
  const blocks = [...guardBlocks(guardFeatures(left), guardFeatures(right), guardNames)];
  const asked = strict ? strictGuards : standardGuards;
  const guards = guardNames.map((guard) => {
    const block = blocks.find((each) => each.guard === guard);
    const says = block?.says ?? "";
    return { guard, asked: asked.includes(guard), blocks: block !== undefined, says };
  });
  const blocking = guards.find((guard) => guard.asked && guard.blocks);
  const isAlike = similarity !== undefined && similarity >= threshold;
  const why =
    similarity === undefined
      ? "a text has no vector"
      : !isAlike
        ? `similarity ${similarity.toFixed(4)} < ${threshold}`
        : blocking === undefined
          ? `similarity ${similarity.toFixed(4)} ≥ ${threshold}, and no guard blocks`
          : `guard: ${blocking.guard}`;
  return {
    texts: [left, right],
    embedder,
    threshold,
    ...(similarity === undefined ? {} : { similarity }),
    guards,
    matches: isAlike && blocking === undefined,
    why,
  };
}

function comparedText({ texts, embedder, similarity, guards, matches, why }: Compared): string {
  const lines = texts.map((text, index) => row(index === 0 ? "stored" : "asked", shown(text)));
  lines.push(row("embedder", embedder));
  lines.push(row("similarity", similarity?.toFixed(4) ?? "none: a text has no vector"));
  for (const { guard, asked, blocks, says } of guards) {
    const verdict = blocks ? `blocks: ${says}` : "passes";
    lines.push(
      row(`guard ${guard}`, `${verdict}${asked ? "" : " (asked of strict tenants only)"}`),
    );
  }
  lines.push(row(matches ? "match" : "no match", why));
  return `${lines.join("\n")}\n`;
}

// ---- a gateway ----------------------------------------------------------------------------------------------

async function ofGateway(flags: Flags): Promise<string> {
  const count = numberOf("--count", flags.count);
  if (!Number.isInteger(count) || count < 1 || count > 1000) {
    throw new FlagError(`--count is ${flags.count}; accepted: a whole number from 1 to 1000`);
  }
  const inspection = await ask(flags, count);
  if (flags.json === true) return `${JSON.stringify(inspection, null, 2)}\n`;
  return inspectionText(inspection, flags);
}

async function ask(flags: Flags, count: number): Promise<Inspection> {
  const { tenant, text, scope } = flags;
  const token = flags.token ?? process.env.HEADRACE_ADMIN_TOKEN;
  if (token === undefined) {
    throw new FlagError("the gateway's admin.token is needed: --token, or HEADRACE_ADMIN_TOKEN");
  }
  if (!/^https?:\/\//.test(flags.url) || !URL.canParse(flags.url)) {
    throw new FlagError(`--url ${flags.url} is no http URL`);
  }
  const query = new URLSearchParams({
    tenant,
    count: String(count),
    ...(text === undefined ? {} : { text }),
    ...(scope === undefined ? {} : { scope }),
  });
  let response: Response;
  try {
    response = await fetch(`${flags.url.replace(/\/+$/, "")}/admin/cache?${query}`, {
      headers: { authorization: `Bearer ${token}` },
      signal: AbortSignal.timeout(ASK_MS),
    });
  } catch (error) {
    const { cause, message } = error instanceof Error ? error : new Error(String(error));
    const reason = cause instanceof Error && cause.message !== "" ? cause.message : message;
    throw new FlagError(`${flags.url} does not answer: ${reason}`);
  }
  const body = await response.text();
  if (response.ok) return JSON.parse(body) as Inspection;
  throw new FlagError(`the gateway refuses (status ${response.status}): ${body.slice(0, 300)}`);
}

function inspectionText(inspection: Inspection, { tenant, text }: Flags): string {
  const { policy, embedder = "none, or not healthy yet", unavailable, entries } = inspection;
  const lines = [
    row("tenant", tenant),
    row(
      "matching",
      policy === undefined
        ? "off"
        : `${policy.mode}, similarity ≥ ${policy.similarityMin}${policy.isStrict ? ", strict" : ""}`,
    ),
    row("embedder", embedder),
  ];
  if (text !== undefined) lines.push(row("asked", shown(text)));
  if (unavailable !== undefined) lines.push(row("no vector", unavailable));
  for (const { model, state, shadow } of inspection.judged) {
    const { falseHits } = shadow;
    const shares = `${(100 * falseHits.low).toFixed(1)} to ${(100 * falseHits.high).toFixed(1)} %`;
    const seen =
      falseHits.total === 0
        ? ""
        : `; would-be hits judged: ${falseHits.count} of ${falseHits.total} false (${shares})`;
    lines.push(row("hits", `${model}: ${state === "on" ? "served" : "only judged"}${seen}`));
  }
  if (entries.length === 0) lines.push("", "nothing is stored");
  for (const entry of entries) lines.push("", ...entryLines(entry));
  return `${lines.join("\n")}\n`;
}

function entryLines(entry: InspectedEntry): string[] {
  const { entryId, scope, model, question, ageMs, expiresInMs, answerBytes, labels } = entry;
  const seconds = (ms: number): string => `${Math.max(0, Math.round(ms / 1000))} s`;
  const lines = [
    row("stored", shown(question)),
    row("  entry", `${entryId}, scope ${scope.slice(0, 12)}, model ${model}`),
    row(
      "  life",
      `${seconds(ageMs)} old, expires in ${seconds(expiresInMs)}, answer of ${answerBytes} bytes`,
    ),
  ];
  if (labels > 0) {
    const wrong = entry.similarityMin > 0 ? `, wrong below ${entry.similarityMin.toFixed(3)}` : "";
    lines.push(row("  labels", `${labels}${wrong}`));
  }
  const { compared } = entry;
  if (compared === undefined) return lines;
  lines.push(row("  similarity", compared.similarity?.toFixed(4) ?? "none"));
  for (const { guard, says } of compared.guards) lines.push(row(`  guard ${guard}`, says));
  lines.push(row(`  ${verdicts[compared.kind]}`, compared.says));
  return lines;
}

const verdicts = { serve: "served", explore: "asks a node", miss: "no match" } as const;

function row(name: string, value: string): string {
  return `${name.padEnd(22)}${value}`;
}

/** On one line, quoted, without what a terminal would obey. */
function shown(text: string): string {
  return JSON.stringify(text.length > 200 ? `${text.slice(0, 200)}…` : text);
}
