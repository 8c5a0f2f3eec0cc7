/**
 * What became of requests: the last ones are kept to be explained, and one line each goes to a recording.
 * Nothing here holds text of a prompt or an answer.
 */
import { hash } from "node:crypto";
import { createWriteStream, type WriteStream } from "node:fs";
import type { Decision, RequestFacts, RequestId, RequestRecord } from "../actors/protocol.ts";
import type { RouterMessage } from "../actors/router.ts";
import type { RouterLogEvent, RouterLogHeader, RouterLogLine } from "../actors/router-log.ts";
import { formatTraceRecord, type TraceRecord } from "./trace-format.ts";

/** Records kept to be explained; about 3 KB each. */
const RECORDS_MAX = 1000;

export class RecentRequests {
  readonly #ring: RequestRecord[] = [];
  #next = 0;

  add(record: RequestRecord): void {
    this.#ring[this.#next] = record;
    this.#next = (this.#next + 1) % RECORDS_MAX;
  }

  /** The latest of that id. Looked for one by one: adding is what happens for every request. */
  get(requestId: RequestId): RequestRecord | undefined {
    for (let back = 1; back <= this.#ring.length; back++) {
      const record = this.#ring[(this.#next - back + RECORDS_MAX) % RECORDS_MAX];
      if (record?.facts.requestId === requestId) return record;
    }
    return undefined;
  }
}

/** One request's story as data: for `explain` of the library and the admin route. */
export type Explanation = {
  requestId: RequestId;
  summary: string;
  tenant: string;
  model?: string;
  route: string;
  outcome: string;
  code?: string;
  cache: string;
  /** Times in ms from arrival. */
  queuedMs: number;
  ttftMs?: number;
  endedMs: number;
  steps: string[];
  decisions: readonly Decision[];
};

export function explain(record: RequestRecord): Explanation {
  const { facts } = record;
  const steps = [
    `arrived: ${facts.route}${facts.model === undefined ? "" : ` for ${facts.model}`}, about ` +
      `${facts.promptTokens} prompt tokens, key ${facts.limitKey}, ${facts.priority} priority`,
    `cache: ${cacheStep(record)}`,
  ];
  if (record.semantic !== undefined) steps.push(`meaning: ${meaningStep(record.semantic)}`);
  for (const decision of record.decisions) steps.push(decisionStep(decision));
  for (const attempt of record.attempts) {
    const status = attempt.status === undefined ? "" : ` (status ${attempt.status})`;
    const detail = attempt.detail === undefined ? "" : `: ${attempt.detail}`;
    const afterMs = Math.round(attempt.atMs - facts.arrivedAtMs);
    steps.push(
      `attempt ${attempt.attempt} on ${attempt.node} after ${afterMs} ms: ${attempt.outcome}${status}${detail}`,
    );
  }
  if (record.usage !== undefined) {
    const { promptTokens, cachedTokens, outputTokens } = record.usage;
    steps.push(
      `used: ${promptTokens} prompt tokens (${cachedTokens} cached), ${outputTokens} output tokens`,
    );
  }
  if (record.stored === true) steps.push("stored: yes");
  else if (record.notStored !== undefined) steps.push(`stored: no, ${record.notStored}`);
  const ended = record.code === undefined ? record.outcome : `${record.outcome}: ${record.code}`;
  steps.push(`ended after ${Math.round(record.endedMs)} ms: ${ended}`);
  return {
    requestId: facts.requestId,
    summary: summaryOf(record),
    tenant: facts.tenant,
    ...(facts.model === undefined ? {} : { model: facts.model }),
    route: facts.route,
    outcome: record.outcome,
    ...(record.code === undefined ? {} : { code: record.code }),
    cache: record.cache,
    queuedMs: record.queuedMs,
    ...(record.ttftMs === undefined ? {} : { ttftMs: record.ttftMs }),
    endedMs: record.endedMs,
    steps,
    decisions: record.decisions,
  };
}

function cacheStep(record: RequestRecord): string {
  switch (record.cache) {
    case "hit_exact":
      return "answered from an equal request";
    case "hit_semantic":
      return "answered from a request of the same meaning";
    case "joined":
      return "joined an equal request that was running";
    case "bypass":
      return `not used (${record.cacheDetail ?? "it did not answer in time"})`;
    default:
      return "miss";
  }
}

function meaningStep({
  says,
  entryId,
  similarity,
}: NonNullable<RequestRecord["semantic"]>): string {
  const entry = entryId === undefined ? "" : ` (entry ${entryId} at ${similarity?.toFixed(4)})`;
  return `${says}${entry}`;
}

function decisionStep(decision: Decision): string {
  const chosen = decision.chosen === undefined ? "no node" : `chose ${decision.chosen}`;
  const waited = decision.queuedMs > 0 ? `, waited ${Math.round(decision.queuedMs)} ms` : "";
  const denied = decision.denials.map((denial) => `${denial.node} denied: ${denial.reason}`);
  const denials = denied.length === 0 ? "" : ` (${denied.join("; ")})`;
  return (
    `routing ${decision.attempt} (${decision.strategy}, ${decision.candidatesTotal} candidates): ` +
    `${chosen}${waited}: ${decision.why}${denials}`
  );
}

function summaryOf(record: RequestRecord): string {
  if (record.cache === "hit_exact") return "answered from the cache";
  if (record.cache === "hit_semantic") return "answered from the cache, by meaning";
  const last = record.attempts[record.attempts.length - 1];
  const where = last === undefined ? "no node" : last.node;
  const tries = record.attempts.length > 1 ? ` at attempt ${record.attempts.length}` : "";
  if (record.cache === "joined") return `${record.outcome}, shared with another request`;
  if (record.outcome === "ok") return `answered by ${where}${tries}`;
  return `${record.outcome} (${record.code ?? "no code"}), last on ${where}${tries}`;
}

/** Lines of a file, until it cannot be written: that is told once, and the gateway goes on without it. */
class LineFile {
  readonly #stream: WriteStream;
  #failed = false;

  constructor(file: string, flags: "a" | "w", onError: (error: Error) => void) {
    this.#stream = createWriteStream(file, { flags });
    this.#stream.on("error", (error) => {
      if (!this.#failed) onError(error);
      this.#failed = true;
    });
  }

  write(line: string): void {
    if (!this.#failed) this.#stream.write(`${line}\n`);
  }

  close(): Promise<void> {
    return new Promise((resolve) => {
      if (this.#failed) return resolve();
      this.#stream.end(() => resolve());
    });
  }
}

/** Writes Headrace's trace format, one line a request, in the order in which requests end. */
export class Recorder {
  readonly #file: LineFile;
  readonly #startedAtMs: number;

  /** @param onError called once if the file cannot be written */
  constructor(file: string, nowMs: number, onError: (error: Error) => void) {
    this.#startedAtMs = nowMs;
    this.#file = new LineFile(file, "a", onError);
  }

  write(record: RequestRecord): void {
    const { facts } = record;
    if (facts.route === "other" || facts.model === undefined) return;
    const last = record.attempts[record.attempts.length - 1];
    const line: TraceRecord = {
      v: 1,
      atMs: Math.max(0, round(facts.arrivedAtMs - this.#startedAtMs)),
      tenant: nameHash(facts.tenant),
      model: facts.model,
      route: facts.route,
      stream: facts.stream,
      inputTokens: record.usage?.promptTokens || facts.promptTokens,
      outputTokens: record.usage?.outputTokens ?? 0,
      ...(facts.maxTokens === undefined ? {} : { maxTokens: facts.maxTokens }),
      prefix: facts.prefix ?? [],
      ...(facts.cacheKey === undefined ? {} : { question: facts.cacheKey.slice(0, 16) }),
      ...(facts.session === undefined ? {} : { session: nameHash(facts.session) }),
      outcome: record.outcome,
      cache: record.cache,
      ...(last === undefined ? {} : { node: last.node }),
      attempts: record.attempts.length,
      queuedMs: round(record.queuedMs),
      ...(record.ttftMs === undefined ? {} : { ttftMs: round(record.ttftMs) }),
      e2eMs: round(record.endedMs),
    };
    this.#file.write(formatTraceRecord(line));
  }

  close(): Promise<void> {
    return this.#file.close();
  }
}

/**
 * Writes all that the router sees and chooses, for `headrace sim decisions`. Tenants, keys and sessions go by their
 * hashes; what the router does not look at (the prompt's hashes) is left out.
 */
export class DecisionLog {
  readonly #file: LineFile;

  /** @param onError called once if the file cannot be written */
  constructor(file: string, header: RouterLogHeader, onError: (error: Error) => void) {
    this.#file = new LineFile(file, "w", onError);
    this.#write(header);
  }

  write(event: RouterLogEvent): void {
    if (event.kind === "router.turn") this.#write({ ...event, message: anonymous(event.message) });
    else this.#write(event);
  }

  close(): Promise<void> {
    return this.#file.close();
  }

  #write(line: RouterLogLine): void {
    this.#file.write(JSON.stringify(line));
  }
}

function anonymous(message: RouterMessage): RouterMessage {
  switch (message.kind) {
    case "router.choose":
      return { ...message, facts: anonymousFacts(message.facts) };
    case "router.used":
      return { ...message, tenant: nameHash(message.tenant) };
    default:
      return message;
  }
}

function anonymousFacts({ prefix: _, cacheKey: __, ...facts }: RequestFacts): RequestFacts {
  return {
    ...facts,
    tenant: nameHash(facts.tenant),
    limitKey: nameHash(facts.limitKey),
    ...(facts.session === undefined ? {} : { session: nameHash(facts.session) }),
  };
}

/** 16 hex digits; equal names, equal hashes. */
function nameHash(name: string): string {
  return hash("sha256", name, "hex").slice(0, 16);
}

function round(ms: number): number {
  return Math.round(ms * 1000) / 1000;
}
