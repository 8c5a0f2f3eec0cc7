/**
 * What Redis keeps, to the byte: the names of keys, and the forms of answers and questions. Whatever comes back is
 * checked as a whole before anything of it is believed.
 *
 *   <prefix>v1:answer:<tenant>:<key>                            string: an answer, for equal requests
 *   <prefix>v1:question:<tenant>:{<bucket>}:<scope>:<entry>     hash: a question with its vector and answer
 *   <prefix>v1:questions:{<bucket>}                             sorted set: the questions of a bucket, by expiry
 *   <prefix>v1:vectors:{<bucket>}:<scope>                       vector set: the questions of a scope
 *
 * Tenant = the first 16 hex digits of its sha256: names stay out of keys, and a tenant can be purged by pattern.
 * Bucket = the first 3 hex digits of the scope, in braces, so that a cluster keeps all of a bucket on one node.
 */
import { createHash } from "node:crypto";
import { crc32 } from "node:zlib";
import type { Route, StoredAnswer, StoredQuestion } from "../actors/protocol.ts";

// ---- names --------------------------------------------------------------------------------------------------

/** What follows `question:` in an entry's name, and stands for the entry in sets: all that its other keys need. */
export type Member = string;

const memberParts = /^[0-9a-f]{16}:\{([0-9a-f]{3})\}:([0-9a-f]{3,64}):([\w-]{1,64})$/;

export class KeyNames {
  readonly #prefix: string;

  constructor(keyPrefix: string) {
    this.#prefix = `${keyPrefix}v1:`;
  }

  answer(tenant: string, key: string): string {
    return `${this.#prefix}answer:${tenantHash(tenant)}:${key}`;
  }

  /** Starts the name of every question. */
  get questionPrefix(): string {
    return `${this.#prefix}question:`;
  }

  question(member: Member): string {
    return `${this.questionPrefix}${member}`;
  }

  /** Absent for the name of anything else. */
  memberOf(name: string): Member | undefined {
    if (!name.startsWith(this.questionPrefix)) return undefined;
    const member = name.slice(this.questionPrefix.length);
    return partsOf(member) === undefined ? undefined : member;
  }

  isAnswer(name: string): boolean {
    return name.startsWith(`${this.#prefix}answer:`);
  }

  bucket(bucket: string): string {
    return `${this.#prefix}questions:{${bucket}}`;
  }

  vectors(scope: string): string {
    return `${this.#prefix}vectors:{${bucketOf(scope)}}:${scope}`;
  }

  /** For SCAN: the answers and questions of a tenant, or all there is. */
  pattern(tenant: string | undefined): string {
    const of = tenant === undefined ? "*" : `*:${tenantHash(tenant)}:*`;
    return `${this.#prefix.replace(/[*?[\]\\]/g, "\\$&")}${of}`;
  }
}

export function memberFor(entry: { entryId: string; scope: string; tenant: string }): Member {
  const { entryId, scope, tenant } = entry;
  return `${tenantHash(tenant)}:{${bucketOf(scope)}}:${scope}:${entryId}`;
}

/** Absent where no question can have that member. */
export function partsOf(
  member: string,
): { bucket: string; scope: string; entryId: string } | undefined {
  const [, bucket, scope, entryId] = memberParts.exec(member) ?? [];
  if (bucket === undefined || scope === undefined || entryId === undefined) return undefined;
  return bucketOf(scope) === bucket ? { bucket, scope, entryId } : undefined;
}

export function bucketOf(scope: string): string {
  return scope.slice(0, 3);
}

function tenantHash(tenant: string): string {
  return createHash("sha256").update(tenant, "utf8").digest("hex").slice(0, 16);
}

// ---- questions ----------------------------------------------------------------------------------------------

/**
 * The fields of a question's hash, in the order in which they are read. `scope` and `vector` (float32, little-endian)
 * are in the form that RediSearch indexes. `life` and `age`, in ms, hold at the time of the write, so that an age is
 * Redis's own count of the time since, whatever the clocks of the gateways say. `check` covers all others, and the member.
 */
export const questionFields = [
  "version",
  "scope",
  "tenant",
  "model",
  "question",
  "vector",
  "answer",
  "life",
  "age",
  "check",
] as const;
type QuestionField = (typeof questionFields)[number];

const QUESTION_VERSION = "1";
const DIMENSION_MAX = 8192;
/** Of a unit vector's length, as embedders promise. */
const NORM_SLACK = 1e-3;

/** Field, value, field, value, as HSET takes them. `lifeMs` is a whole number. */
export function encodeQuestion(
  stored: StoredQuestion,
  lifeMs: number,
): { member: Member; words: (string | Buffer)[]; bytes: number } {
  const member = memberFor(stored);
  const values: Record<Exclude<QuestionField, "check">, Buffer> = {
    version: Buffer.from(QUESTION_VERSION),
    scope: Buffer.from(stored.scope),
    tenant: Buffer.from(stored.tenant),
    model: Buffer.from(stored.model),
    question: Buffer.from(stored.text),
    vector: vectorBytes(stored.vector),
    answer: encodeAnswer(stored.answer),
    life: Buffer.from(String(lifeMs)),
    age: Buffer.from(String(Math.max(0, Math.floor(stored.ageMs)))),
  };
  const words: (string | Buffer)[] = [];
  const parts: Buffer[] = [];
  let bytes = member.length;
  for (const [field, value] of Object.entries(values)) {
    words.push(field, value);
    parts.push(value);
    bytes += value.length;
  }
  words.push("check", checkOf(member, parts));
  return { member, words, bytes };
}

/** `corrupt`: not what was written. `foreign`: of another version of this form, or no question at all. */
export type Unreadable = "corrupt" | "foreign";

/**
 * @param values of `questionFields`, in that order, as HMGET gives them.
 * @param ttlMs what Redis says is left of its life, > 0; without one (PERSIST) it is not ours.
 */
export function decodeQuestion(
  member: Member,
  values: readonly unknown[],
  ttlMs: number,
): StoredQuestion | Unreadable {
  const [version, scope, tenant, model, question, vector, answer, life, age, check] = values;
  const parts = [version, scope, tenant, model, question, vector, answer, life, age];
  if (!(version instanceof Buffer) || version.toString("latin1") !== QUESTION_VERSION)
    return "foreign";
  if (ttlMs < 0) return "foreign";
  if (!areBuffers(parts) || !(check instanceof Buffer)) return "corrupt";
  if (check.toString("latin1") !== checkOf(member, parts)) return "corrupt";
  const whole = { scope: String(scope), tenant: String(tenant), model: String(model) };
  const entry = partsOf(member);
  const lifeMs = Number(life);
  const writtenAgeMs = Number(age);
  const floats = vectorOf(vector);
  const decoded = answer instanceof Buffer ? decodeAnswer(answer) : null;
  if (entry === undefined || floats === null || decoded === null) return "corrupt";
  if (memberFor({ ...whole, entryId: entry.entryId }) !== member) return "corrupt";
  if (!Number.isFinite(lifeMs) || !Number.isFinite(writtenAgeMs)) return "corrupt";
  return {
    ...whole,
    entryId: entry.entryId,
    text: String(question),
    vector: floats,
    answer: decoded,
    ttlMs,
    ageMs: writtenAgeMs + Math.max(0, lifeMs - ttlMs),
  };
}

function areBuffers(values: readonly unknown[]): values is readonly Buffer[] {
  return values.every((value) => value instanceof Buffer);
}

/** CRC-32 over the member and all values, each with its length before it. */
function checkOf(member: Member, values: readonly Buffer[]): string {
  let crc = crc32(member);
  for (const value of values) crc = crc32(value, crc32(`:${value.length}:`, crc));
  return crc.toString(16).padStart(8, "0");
}

/** Float32, little-endian (as every machine is that Node runs on in practice). Shares the vector's memory. */
export function vectorBytes(vector: Float32Array): Buffer {
  return Buffer.from(vector.buffer, vector.byteOffset, vector.byteLength);
}

/** Null for what is no unit vector. */
function vectorOf(bytes: unknown): Float32Array | null {
  if (!(bytes instanceof Buffer) || bytes.length % 4 !== 0) return null;
  const vector = new Float32Array(bytes.length / 4); // A copy: bytes from the socket may lie unaligned.
  vectorBytes(vector).set(bytes);
  if (vector.length < 1 || vector.length > DIMENSION_MAX) return null;
  let square = 0;
  for (const value of vector) square += value * value;
  return Math.abs(Math.sqrt(square) - 1) <= NORM_SLACK ? vector : null; // Never for NaN.
}

// ---- answers ------------------------------------------------------------------------------------------------

/*
 *   offset  bytes
 *   0       2      "HR"
 *   2       1      version, 1
 *   3       4      CRC-32 of everything from 7 on
 *   7       1      route (index in `routes`)
 *   8       4      prompt tokens
 *   12      4      output tokens
 *   16      2      length of the model's name
 *   18      4      length of the body
 *   22      …      model's name, UTF-8; then the body
 */
const HEADER_BYTES = 22;
const VERSION = 1;
const routes: readonly Route[] = ["chat", "completions", "embeddings", "other"];
const UINT32_MAX = 0xffff_ffff;

/** The bytes that Redis keeps. */
export function encodeAnswer(answer: StoredAnswer): Buffer {
  const model = Buffer.from(answer.model, "utf8").subarray(0, 0xffff);
  const value = Buffer.allocUnsafe(HEADER_BYTES + model.length + answer.body.byteLength);
  value.write("HR", 0, "latin1");
  value[2] = VERSION;
  value[7] = Math.max(0, routes.indexOf(answer.route));
  value.writeUInt32BE(Math.min(UINT32_MAX, answer.promptTokens), 8);
  value.writeUInt32BE(Math.min(UINT32_MAX, answer.outputTokens), 12);
  value.writeUInt16BE(model.length, 16);
  value.writeUInt32BE(answer.body.byteLength, 18);
  value.set(model, HEADER_BYTES);
  value.set(answer.body, HEADER_BYTES + model.length);
  value.writeUInt32BE(crc32(value.subarray(7)), 3);
  return value;
}

/** Null for anything that is not, byte for byte, what `encodeAnswer` made. */
export function decodeAnswer(bytes: Uint8Array): StoredAnswer | null {
  const value = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (value.length < HEADER_BYTES || value.toString("latin1", 0, 2) !== "HR") return null;
  const route = routes[value[7] ?? -1];
  const modelLength = value.readUInt16BE(16);
  const bodyLength = value.readUInt32BE(18);
  if (value[2] !== VERSION || route === undefined) return null;
  if (value.length !== HEADER_BYTES + modelLength + bodyLength) return null;
  if (value.readUInt32BE(3) !== crc32(value.subarray(7))) return null;
  const bodyFrom = HEADER_BYTES + modelLength;
  return {
    body: value.subarray(bodyFrom),
    bytes: bodyLength,
    route,
    model: value.toString("utf8", HEADER_BYTES, bodyFrom),
    promptTokens: value.readUInt32BE(8),
    outputTokens: value.readUInt32BE(12),
  };
}
