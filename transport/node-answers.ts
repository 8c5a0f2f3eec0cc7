/**
 * What the stand-in inference node says: text and vectors that follow from the request alone, so
 * that a test can tell a right answer from a wrong one without asking the node. Pure functions.
 *
 * The answer depends on everything a model would see (messages or prompt, tools), on the model's
 * name and on `seed`; not on sampling parameters. A token is one short word with a leading space.
 */

/** A request body as parsed from JSON; only fields a model would see are read. */
export type PromptBody = Readonly<Record<string, unknown>>;

/** Characters per token when a prompt is counted. */
const TOKEN_CHARACTERS = 4;

/** The prompt as a chat template would write it: tools, then every message under its role. */
export function promptText(body: PromptBody): string {
  if (!Array.isArray(body.messages)) return plainText(body.prompt);
  let text = Array.isArray(body.tools) ? `${JSON.stringify(body.tools)}\n` : "";
  for (const message of body.messages as unknown[]) {
    if (!isRecord(message)) continue;
    text += `${String(message.role)}: ${plainText(message.content)}`;
    if (typeof message.name === "string") text += ` (${message.name})`;
    if (message.tool_calls !== undefined) text += JSON.stringify(message.tool_calls);
    if (typeof message.tool_call_id === "string") text += ` [${message.tool_call_id}]`;
    text += "\n";
  }
  return text;
}

/**
 * Everything the answer depends on, as one string; it begins with `promptText`. `model` as served.
 */
export function promptMaterial(body: PromptBody, model: string): string {
  const seed = typeof body.seed === "number" ? body.seed : "";
  return `${promptText(body)}\n${model}\n${seed}`;
}

/**
 * The text of an answer of that many tokens. A longer answer to the same material begins with the
 * shorter one.
 */
export function answerText(material: string, tokens: number): string {
  return answerOf(hashOf(material), tokens);
}

/** How many tokens the model says when nothing cuts it: 8 to 255, evenly spread over materials. */
export function answerTokens(material: string): number {
  return naturalTokens(hashOf(material));
}

/** Tokens of a text: a quarter of its characters, at least 1. */
export function tokensOf(text: string): number {
  return Math.max(1, Math.ceil(text.length / TOKEN_CHARACTERS));
}

/** As `answerText`, from the hash of the material. */
export function answerOf(hash: number, tokens: number): string {
  let text = "";
  for (let i = 0; i < tokens; i++) text += answerWord(hash, i);
  return text;
}

/** Token `index` of the answer, leading space included; letters only. */
export function answerWord(hash: number, index: number): string {
  return WORDS[mix(hash ^ Math.imul(index + 1, 0x9e3779b1)) & 255] ?? "";
}

/** As `answerTokens`, from the hash of the material. */
export function naturalTokens(hash: number): number {
  return 8 + (mix(hash ^ 0x5bd1e995) % 248);
}

/**
 * 32-bit hash of a material. With `blockTokens` > 0 it also fills `blocks` with chained hashes of
 * the leading whole blocks of the first `textLength` characters: equal leading hashes mean equal
 * leading text.
 */
export function hashOf(
  material: string,
  blockTokens = 0,
  textLength = 0,
  blocks: number[] = [],
): number {
  const blockCharacters = blockTokens * TOKEN_CHARACTERS;
  let hash = 0x811c9dc5;
  let at = 0;
  if (blockCharacters > 0) {
    for (let end = blockCharacters; end <= textLength; end += blockCharacters) {
      for (; at < end; at++) hash = Math.imul(hash ^ material.charCodeAt(at), 16777619);
      blocks.push(hash >>> 0);
    }
  }
  for (; at < material.length; at++) hash = Math.imul(hash ^ material.charCodeAt(at), 16777619);
  return mix(hash);
}

/**
 * Unit vector of a text: the sum of one fixed random direction per word (per character of Chinese),
 * case and punctuation aside. Texts that share most words lie close; unrelated ones are nearly
 * orthogonal.
 */
export function embeddingOf(text: string, dimensions: number): Float32Array {
  const sums = new Float64Array(dimensions);
  const words = text.toLowerCase().match(/\p{Script=Han}|[\p{L}\p{N}]+/gu) ?? [""];
  for (const word of words) {
    let state = hashOf(word);
    for (let i = 0; i < dimensions; i++) {
      state = (Math.imul(state, 1664525) + 1013904223) | 0;
      sums[i] = (sums[i] ?? 0) + mix(state) - 2147483648;
    }
  }
  let squares = 0;
  for (const value of sums) squares += value * value;
  const scale = squares > 0 ? 1 / Math.sqrt(squares) : 0;
  return Float32Array.from(sums, (value) => value * scale);
}

function plainText(content: unknown): string {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return "";
  let text = "";
  for (const part of content as unknown[]) {
    if (typeof part === "string") text += part;
    else if (isRecord(part) && typeof part.text === "string") text += part.text;
    else text += JSON.stringify(part);
  }
  return text;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null;
}

/** Spreads a hash over all 32 bits; never negative. */
function mix(hash: number): number {
  let h = hash ^ (hash >>> 16);
  h = Math.imul(h, 0x85ebca6b);
  h ^= h >>> 13;
  h = Math.imul(h, 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

const WORDS: readonly string[] = [..."bdfghjklmnprstvz"].flatMap((onset) =>
  ["a", "ai", "an", "ar", "e", "el", "en", "i", "in", "o", "on", "or", "u", "un", "ur", "us"].map(
    (rime) => ` ${onset}${rime}`,
  ),
);
