/**
 * Reads a client's request once: checks its shape, and turns it into what the actors need to know. Pure.
 *
 * The cache key is sha256 over everything that may change the answer: tenant, route, and the whole body in
 * canonical form (object keys sorted) without the fields that only say how the answer is delivered or to
 * whom it is billed. A field that this file does not know is part of the key.
 */
import { hash } from "node:crypto";
import type { ErrorCode } from "../actors/errors.ts";
import type { Priority, Route } from "../actors/protocol.ts";

export type RequestLimits = { messagesMax: number; maxTokensMax: number };

/** What is known of a request that passed every check. Nothing of its text: it may be kept. */
export type ReadRequest = {
  readonly route: Route;
  readonly model: string | undefined;
  readonly stream: boolean;
  /** The client itself asked for the usage event of a stream. */
  readonly wantsUsage: boolean;
  readonly maxTokens: number | undefined;
  /** Estimated from UTF-8 bytes of text, 3.5 to a token; at least 1. */
  readonly promptTokens: number;
  /** A hash of all that may change the answer; undefined when the exact cache does not apply. */
  readonly cacheKey: string | undefined;
  /** Why it does not apply. */
  readonly cacheBypass: string | undefined;
  /** The last user turn, where it may be matched by meaning; only while something matches. */
  readonly question: AskedQuestion | undefined;
  /** 32-bit hash of model and prompt head: requests that share it share a KV prefix. */
  readonly headHash: number;
  /** Chained hashes of the prompt's blocks of 1024 characters, at most 256; empty unless a recording runs. */
  readonly prefix: number[];
};

/** A question that others may have asked in other words. */
export type AskedQuestion = {
  readonly text: string;
  /** sha256 (hex) over tenant and all of the request that may change the answer but this text. */
  readonly frame: string;
  /** As the request states it. */
  readonly temperature: number | undefined;
};

/** What was wrong and what is accepted, with OpenAI's `param`. */
export type BadRequest = { code: ErrorCode; message: string; param?: string };

const BYTES_PER_TOKEN = 3.5;

/** Fields that never change the answer's text. */
const deliveryFields = new Set([
  "stream",
  "stream_options",
  "user",
  "metadata",
  "store",
  "service_tier",
  "safety_identifier",
  "prompt_cache_key",
  "priority",
]);

export const routes: Readonly<Record<string, Route>> = {
  "/v1/chat/completions": "chat",
  "/v1/completions": "completions",
  "/v1/embeddings": "embeddings",
};

/** Bodies up to this size are remembered when read; questions that repeat are short. */
const REMEMBERED_BYTES_MAX = 4096;
const GENERATION_MAX = 1024;

/**
 * Reads bodies, and remembers the last few thousand short ones: a question that comes again, byte for byte, is
 * looked up instead of parsed, checked and hashed anew.
 */
export class RequestReader {
  readonly #limits: RequestLimits;
  readonly #recordsPrefixes: boolean;
  readonly #readsQuestions: boolean;
  /** By route, tenant and text. When the young are many they become the old, and the old are forgotten. */
  #young = new Map<string, ReadRequest>();
  #old = new Map<string, ReadRequest>();

  /** @param also what else is wanted of a request beside the facts that every one needs */
  constructor(limits: RequestLimits, also: { prefixes: boolean; questions: boolean }) {
    this.#limits = limits;
    this.#recordsPrefixes = also.prefixes;
    this.#readsQuestions = also.questions;
  }

  /** Routes Headrace does not know are passed on unread, but for their `model`. */
  read(route: Route, bytes: Buffer, tenant: string): ReadRequest | BadRequest {
    if (route === "other") return readOther(bytes);
    if (bytes.length > REMEMBERED_BYTES_MAX) return this.#parse(route, bytes, tenant);
    const text = `${route} ${tenant} ${bytes.toString("latin1")}`; // Neither name holds a space.
    const known = this.#young.get(text);
    if (known !== undefined) return known;
    const request = this.#old.get(text) ?? this.#parse(route, bytes, tenant);
    if ("code" in request) return request;
    if (this.#young.size >= GENERATION_MAX) {
      this.#old = this.#young;
      this.#young = new Map();
    }
    this.#young.set(text, request);
    return request;
  }

  #parse(route: Route, bytes: Buffer, tenant: string): ReadRequest | BadRequest {
    let body: unknown;
    try {
      body = JSON.parse(bytes.toString("utf8"));
    } catch (error) {
      return { code: "invalid_json", message: jsonMessage(bytes, error) };
    }
    if (!isObject(body)) {
      const message = `the body must be a JSON object, not ${kindOf(body)}`;
      return { code: "invalid_request", message };
    }
    const checker = new Checker(body, this.#limits);
    if (route === "chat") checker.chat();
    else if (route === "completions") checker.completions();
    else checker.embeddings();
    if (checker.bad !== undefined) return checker.bad;
    try {
      return this.#facts(route, body, checker, tenant);
    } catch (error) {
      // The hashes walk the whole body: nesting without end is what overflows the stack.
      if (!(error instanceof RangeError)) throw error;
      return { code: "invalid_request", message: "the body is nested too deeply" };
    }
  }

  #facts(
    route: Route,
    body: Record<string, unknown>,
    checker: Checker,
    tenant: string,
  ): ReadRequest {
    const model = body.model as string;
    const maxTokens = body.max_completion_tokens ?? body.max_tokens;
    const { bypass } = checker;
    return {
      route,
      model,
      stream: body.stream === true,
      wantsUsage: isObject(body.stream_options) && body.stream_options.include_usage === true,
      maxTokens: typeof maxTokens === "number" ? maxTokens : undefined,
      promptTokens: Math.max(1, Math.ceil(checker.textBytes / BYTES_PER_TOKEN)),
      cacheKey: bypass === undefined ? cacheKeyOf(route, body, tenant) : undefined,
      cacheBypass: bypass,
      question:
        this.#readsQuestions && route === "chat" && bypass === undefined
          ? questionOf(body, tenant)
          : undefined,
      headHash: headHashOf(route, model, body),
      prefix: this.#recordsPrefixes ? prefixBlocksOf(route, model, body) : [],
    };
  }
}

function readOther(bytes: Buffer): ReadRequest {
  let model: unknown;
  if (bytes.length > 0 && bytes[0] === 0x7b) {
    try {
      model = (JSON.parse(bytes.toString("utf8")) as { model?: unknown }).model;
    } catch {
      // Not ours to judge: the node will.
    }
  }
  return {
    route: "other",
    model: typeof model === "string" && model !== "" ? model : undefined,
    stream: false,
    wantsUsage: false,
    maxTokens: undefined,
    promptTokens: Math.max(1, Math.ceil(bytes.length / BYTES_PER_TOKEN)),
    cacheKey: undefined,
    cacheBypass: "route is not cached",
    question: undefined,
    headHash: 0,
    prefix: [],
  };
}

/** Checks a body field by field; the first wrong one is kept in `bad`. */
class Checker {
  readonly #body: Record<string, unknown>;
  readonly #limits: RequestLimits;
  bad: BadRequest | undefined;
  bypass: string | undefined;
  textBytes = 0;

  constructor(body: Record<string, unknown>, limits: RequestLimits) {
    this.#body = body;
    this.#limits = limits;
  }

  chat(): void {
    this.#model();
    this.#messages();
    this.#sampling();
    this.#integer("max_completion_tokens", 1, this.#limits.maxTokensMax);
    this.#integer("top_logprobs", 0, 1000);
    this.#array("tools");
    this.#object("response_format");
    if (this.#body.modalities !== undefined && this.bypass === undefined)
      this.bypass = "not text only";
  }

  completions(): void {
    this.#model();
    this.#input("prompt");
    this.#sampling();
    this.#integer("best_of", 1, 128);
  }

  embeddings(): void {
    this.#model();
    this.#input("input");
    this.#integer("dimensions", 1, 1_000_000);
    this.#oneOf("encoding_format", ["float", "base64"]);
  }

  #fail(param: string, message: string): void {
    this.bad ??= { code: "invalid_request", message: `\`${param}\` ${message}`, param };
  }

  #model(): void {
    const { model } = this.#body;
    if (typeof model !== "string" || model === "" || model.length > 512) {
      this.#fail(
        "model",
        `must be the name of a model (1 to 512 characters), not ${kindOf(model)}`,
      );
    }
  }

  #messages(): void {
    const { messages } = this.#body;
    if (!Array.isArray(messages)) {
      return this.#fail("messages", `must be an array of messages, not ${kindOf(messages)}`);
    }
    if (messages.length === 0) return this.#fail("messages", "must hold at least one message");
    if (messages.length > this.#limits.messagesMax) {
      return this.#fail(
        "messages",
        `holds ${messages.length} messages; at most ${this.#limits.messagesMax} are accepted`,
      );
    }
    for (let i = 0; i < messages.length && this.bad === undefined; i++)
      this.#message(messages[i], i);
  }

  #message(message: unknown, index: number): void {
    const at = `messages[${index}]`;
    if (!isObject(message)) return this.#fail(at, `must be an object, not ${kindOf(message)}`);
    if (typeof message.role !== "string" || message.role === "") {
      return this.#fail(
        `${at}.role`,
        `must be a string such as "user", not ${kindOf(message.role)}`,
      );
    }
    const { content } = message;
    if (typeof content === "string") {
      this.textBytes += Buffer.byteLength(content) + message.role.length;
      return;
    }
    if (Array.isArray(content)) {
      for (let i = 0; i < content.length; i++) this.#part(content[i], `${at}.content[${i}]`);
      return;
    }
    const mayBeEmpty = message.role === "assistant" || message.role === "tool";
    if ((content === null || content === undefined) && mayBeEmpty) return;
    this.#fail(`${at}.content`, `must be a string or an array of parts, not ${kindOf(content)}`);
  }

  #part(part: unknown, at: string): void {
    if (!isObject(part)) return this.#fail(at, `must be an object, not ${kindOf(part)}`);
    if (typeof part.type !== "string") {
      return this.#fail(`${at}.type`, `must be a string such as "text", not ${kindOf(part.type)}`);
    }
    if (part.type !== "text") {
      this.bypass = "not text only";
      this.textBytes += 1024; // An image is some hundred tokens; the engine's count settles it.
      return;
    }
    if (typeof part.text !== "string") {
      return this.#fail(`${at}.text`, `must be a string, not ${kindOf(part.text)}`);
    }
    this.textBytes += Buffer.byteLength(part.text);
  }

  /** A string, an array of strings, an array of token ids, or an array of those. */
  #input(field: string): void {
    const value = this.#body[field];
    if (typeof value === "string") {
      this.textBytes += Buffer.byteLength(value);
      return;
    }
    const accepted = "must be a string, an array of strings or an array of token ids";
    if (!Array.isArray(value)) return this.#fail(field, `${accepted}, not ${kindOf(value)}`);
    if (value.length === 0) return this.#fail(field, "must not be empty");
    for (let i = 0; i < value.length; i++) {
      const item: unknown = value[i];
      if (typeof item === "string") this.textBytes += Buffer.byteLength(item);
      else if (typeof item === "number") this.textBytes += BYTES_PER_TOKEN;
      else if (Array.isArray(item)) this.textBytes += item.length * BYTES_PER_TOKEN;
      else return this.#fail(`${field}[${i}]`, `${accepted}, not ${kindOf(item)}`);
    }
  }

  #sampling(): void {
    this.#integer("max_tokens", 1, this.#limits.maxTokensMax);
    this.#number("temperature", 0, 2);
    this.#number("top_p", 0, 1);
    this.#number("presence_penalty", -2, 2);
    this.#number("frequency_penalty", -2, 2);
    this.#integer("n", 1, 128);
    this.#integer("seed", Number.MIN_SAFE_INTEGER, Number.MAX_SAFE_INTEGER);
    this.#boolean("stream");
    this.#object("stream_options");
    this.#stop();
    if (isObject(this.#body.stream_options) && this.#body.stream !== true) {
      this.#fail("stream_options", "is accepted only together with `stream: true`");
    }
  }

  #stop(): void {
    const { stop } = this.#body;
    if (stop === undefined || stop === null || typeof stop === "string") return;
    if (Array.isArray(stop) && stop.every((s) => typeof s === "string")) return;
    this.#fail("stop", `must be a string or an array of strings, not ${kindOf(stop)}`);
  }

  #number(field: string, min: number, max: number): void {
    const value = this.#body[field];
    if (value === undefined || value === null) return;
    if (typeof value === "number" && value >= min && value <= max) return;
    this.#fail(field, `must be a number from ${min} to ${max}, not ${shown(value)}`);
  }

  #integer(field: string, min: number, max: number): void {
    const value = this.#body[field];
    if (value === undefined || value === null) return;
    if (Number.isSafeInteger(value) && (value as number) >= min && (value as number) <= max) return;
    this.#fail(field, `must be a whole number from ${min} to ${max}, not ${shown(value)}`);
  }

  #boolean(field: string): void {
    const value = this.#body[field];
    if (value === undefined || value === null || typeof value === "boolean") return;
    this.#fail(field, `must be true or false, not ${kindOf(value)}`);
  }

  #object(field: string): void {
    const value = this.#body[field];
    if (value === undefined || value === null || isObject(value)) return;
    this.#fail(field, `must be an object, not ${kindOf(value)}`);
  }

  #array(field: string): void {
    const value = this.#body[field];
    if (value === undefined || value === null || Array.isArray(value)) return;
    this.#fail(field, `must be an array, not ${kindOf(value)}`);
  }

  #oneOf(field: string, accepted: readonly string[]): void {
    const value = this.#body[field];
    if (value === undefined || value === null) return;
    if (typeof value === "string" && accepted.includes(value)) return;
    this.#fail(
      field,
      `must be one of ${accepted.map((a) => `"${a}"`).join(", ")}, not ${shown(value)}`,
    );
  }
}

/** sha256 (hex) over all that may change the answer. */
function cacheKeyOf(route: Route, body: Record<string, unknown>, tenant: string): string {
  const text = canonical(body, deliveryFields);
  return hash("sha256", `1\n${tenant.length}:${tenant}\n${route}\n${text}`, "hex");
}

/**
 * The last message, where it is a user's and pure text, nothing may be called, and one answer is wanted. A checked
 * body; undefined for all others.
 */
function questionOf(body: Record<string, unknown>, tenant: string): AskedQuestion | undefined {
  const messages = body.messages as { role: string; content: unknown }[];
  const last = messages[messages.length - 1];
  const text = last?.role === "user" ? textOf(last.content) : undefined;
  const isOne = body.n === undefined || body.n === null || body.n === 1;
  if (text === undefined || !isOne || hasTools(body)) return undefined;
  const { temperature } = body;
  // The turn is known by its role and name; its text alone is left out.
  const frame = { ...body, messages: [...messages.slice(0, -1), { ...last, content: null }] };
  const canonicalFrame = canonical(frame, deliveryFields);
  return {
    text,
    frame: hash("sha256", `1\n${tenant.length}:${tenant}\n${canonicalFrame}`, "hex"),
    temperature: typeof temperature === "number" ? temperature : undefined,
  };
}

function hasTools({ tools, functions }: Record<string, unknown>): boolean {
  return [tools, functions].some((list) => Array.isArray(list) && list.length > 0);
}

/** Text parts joined as the engines' chat templates join them. */
function textOf(content: unknown): string | undefined {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return undefined;
  const parts = content as { text?: unknown }[];
  return parts.every(({ text }) => typeof text === "string")
    ? parts.map(({ text }) => text).join("\n")
    : undefined;
}

/** JSON with object keys sorted, so that equal requests have equal text however they were written. */
function canonical(value: unknown, leaveOut?: ReadonlySet<string>): string {
  if (typeof value !== "object" || value === null) return JSON.stringify(value);
  if (Array.isArray(value)) {
    let text = "[";
    for (let i = 0; i < value.length; i++) text += (i > 0 ? "," : "") + canonical(value[i]);
    return `${text}]`;
  }
  const object = value as Record<string, unknown>;
  let text = "{";
  let first = true;
  for (const key of Object.keys(object).sort()) {
    const item = object[key];
    // At the top, null means "not stated"; deeper, it may be data (a JSON schema's default).
    if (leaveOut !== undefined && (leaveOut.has(key) || item === null)) continue;
    text += `${first ? "" : ","}${JSON.stringify(key)}:${canonical(item)}`;
    first = false;
  }
  return `${text}}`;
}

/** Characters of a name that are hashed. */
const NAME_CHARS = 512;
/** Characters of the rendered prompt that name an affinity: about 256 tokens. */
const PREFIX_CHARS = 1024;
const BLOCK_CHARS = 1024;
const BLOCKS_MAX = 256;

function headHashOf(route: Route, model: string, body: Record<string, unknown>): number {
  let h = fnv(0x811c9dc5, model, NAME_CHARS);
  let left = PREFIX_CHARS;
  for (const text of promptTexts(route, body)) {
    h = fnv(h, text, left);
    left -= text.length;
    if (left <= 0) break;
  }
  return h >>> 0;
}

/** What keeps a request on its node: its session where it names one, else its prompt's head. */
export function affinityKeyOf(request: ReadRequest, session: string | undefined): number {
  if (session === undefined) return request.headHash;
  const model = fnv(0x811c9dc5, request.model ?? "", NAME_CHARS);
  return fnv(model, `session ${session}`, NAME_CHARS) >>> 0;
}

function prefixBlocksOf(route: Route, model: string, body: Record<string, unknown>): number[] {
  const blocks: number[] = [];
  let h = fnv(0x811c9dc5, model, NAME_CHARS);
  let room = BLOCK_CHARS;
  for (const text of promptTexts(route, body)) {
    let at = 0;
    while (at < text.length) {
      const piece = text.slice(at, at + room);
      h = fnv(h, piece, piece.length);
      at += piece.length;
      room -= piece.length;
      if (room > 0) break;
      blocks.push(h >>> 0);
      if (blocks.length >= BLOCKS_MAX) return blocks;
      room = BLOCK_CHARS;
    }
  }
  if (room < BLOCK_CHARS && blocks.length < BLOCKS_MAX) blocks.push(h >>> 0);
  return blocks;
}

function* promptTexts(route: Route, body: Record<string, unknown>): Generator<string> {
  if (route === "chat") {
    for (const message of body.messages as { role: string; content: unknown }[]) {
      yield message.role;
      if (typeof message.content === "string") yield message.content;
      else if (message.content !== undefined) yield JSON.stringify(message.content);
    }
    return;
  }
  const input = body.prompt ?? body.input;
  if (typeof input === "string") yield input;
  else if (input !== undefined) yield JSON.stringify(input);
}

function fnv(seed: number, text: string, charsMax: number): number {
  let h = seed;
  const end = Math.min(text.length, charsMax);
  for (let i = 0; i < end; i++) h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
  return h;
}

/** A request may lower its key's priority, never raise it. */
export function lowerPriority(own: Priority, wished: string | undefined): Priority {
  if (wished === "batch") return "batch";
  if (wished === "standard" && own === "interactive") return "standard";
  return own;
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function kindOf(value: unknown): string {
  if (value === undefined) return "absent";
  if (value === null) return "null";
  if (Array.isArray(value)) return "an array";
  if (value === "") return "an empty string";
  return `${typeof value === "object" ? "an" : "a"} ${typeof value}`;
}

/** Numbers may be shown; text may be a prompt, and is not. */
function shown(value: unknown): string {
  return typeof value === "number" ? String(value) : kindOf(value);
}

/** Where JSON broke, without any of its text. */
function jsonMessage(bytes: Buffer, error: unknown): string {
  if (bytes.length === 0) return "the request body is empty";
  const position = /position (\d+)/.exec(error instanceof Error ? error.message : "")?.[1];
  const where = position === undefined ? "" : ` at character ${position}`;
  return `the request body is not valid JSON${where}`;
}
