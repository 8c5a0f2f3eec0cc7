/**
 * The clients of the benchmarks.
 *
 * `ClosedLoop` keeps a fixed number of connections busy on raw sockets: as cheap as a client can be here, so that
 * the server under test is what is loaded. It reads only as much HTTP as it needs (status, length or end of the
 * chunks) and counts every answer that is not whole and good. `ChatClient` is an ordinary client on `node:http`:
 * it reads answers, whole and streamed, and can leave in the middle of one. `OpenLoop` lets such clients come at a
 * rate, whether or not the earlier ones have been answered.
 */
import { Agent, request } from "node:http";
import { connect, type Socket } from "node:net";
import type { Random } from "../../runtime/random.ts";

/** Latencies kept for percentiles. */
const LATENCIES_MAX = 1 << 16;
const TAIL_BYTES = 64;
const lastChunk = Buffer.from("\r\n0\r\n\r\n");
const headEnd = Buffer.from("\r\n\r\n");

export class ClosedLoop {
  readonly #port: number;
  readonly #requestOf: () => Buffer;
  readonly #connections: Connection[] = [];
  readonly #latenciesMs = new Float64Array(LATENCIES_MAX);
  #completed = 0;
  #failed = 0;
  #firstFailure = "";

  constructor(port: number, connections: number, requestOf: () => Buffer) {
    this.#port = port;
    this.#requestOf = requestOf;
    for (let i = 0; i < connections; i++)
      this.#connections.push(new Connection(this.#port, this.#next));
  }

  get completed(): number {
    return this.#completed;
  }

  /** Answers other than 200, incomplete ones, and connections that broke. */
  get failed(): number {
    return this.#failed;
  }

  get firstFailure(): string {
    return this.#firstFailure;
  }

  /** Of the last answers, 65,536 at most; `share` from 0 to 1. */
  latencyMs(share: number): number {
    const known = this.#latenciesMs.slice(0, Math.min(this.#completed, LATENCIES_MAX)).sort();
    return known[Math.min(known.length - 1, Math.floor(share * known.length))] ?? 0;
  }

  /** Sends no more; resolves when the last answer has come and all connections are closed. */
  async stop(): Promise<void> {
    await Promise.all(this.#connections.map((connection) => connection.finish()));
  }

  readonly #next = (latencyMs: number | null, failure: string | null): Buffer => {
    if (failure !== null) {
      this.#failed++;
      if (this.#firstFailure === "") this.#firstFailure = failure;
    }
    if (latencyMs !== null) this.#latenciesMs[this.#completed++ % LATENCIES_MAX] = latencyMs;
    return this.#requestOf();
  };
}

/** One kept-alive connection: sends, reads the answer to its end, sends again. */
class Connection {
  readonly #socket: Socket;
  readonly #next: (latencyMs: number | null, failure: string | null) => Buffer;
  #head: Buffer | null = null; // What has come of a head that is not whole yet.
  #inBody = false;
  #left = 0; // Bytes of the body to come; -1: until the last chunk.
  #tail: Buffer = Buffer.alloc(0);
  #status = 0;
  #sentAtMs = 0;
  #isFinishing = false;
  #onFinished: () => void = () => {};

  constructor(port: number, next: (latencyMs: number | null, failure: string | null) => Buffer) {
    this.#next = next;
    this.#socket = connect({ port, host: "127.0.0.1", noDelay: true });
    this.#socket.on("connect", () => this.#send(null, null));
    this.#socket.on("data", (chunk: Buffer) => this.#onData(chunk));
    this.#socket.on("error", (error) => this.#onClosed(error.message));
    this.#socket.on("close", () => this.#onClosed("the connection was closed"));
  }

  finish(): Promise<void> {
    if (this.#socket.destroyed) return Promise.resolve();
    this.#isFinishing = true;
    return new Promise((resolve) => {
      this.#onFinished = resolve;
    });
  }

  #send(latencyMs: number | null, failure: string | null): void {
    const bytes = this.#next(latencyMs, failure);
    if (this.#isFinishing) {
      this.#socket.destroy();
      this.#onFinished();
      return;
    }
    this.#sentAtMs = performance.now();
    this.#socket.write(bytes);
  }

  #onData(chunk: Buffer): void {
    let body = chunk;
    if (!this.#inBody) {
      const head = this.#head === null ? chunk : Buffer.concat([this.#head, chunk]);
      const end = head.indexOf(headEnd);
      if (end < 0) {
        this.#head = head;
        return;
      }
      this.#head = null;
      this.#readHead(head.toString("latin1", 0, end));
      body = head.subarray(end + headEnd.length);
    }
    if (this.#left >= 0) {
      this.#left -= body.length;
      if (this.#left <= 0) this.#onAnswer(this.#status === 200);
      return;
    }
    if (body.length >= TAIL_BYTES) this.#tail = body.subarray(body.length - TAIL_BYTES);
    else this.#tail = Buffer.concat([this.#tail, body]).subarray(-TAIL_BYTES);
    if (this.#tail.subarray(-lastChunk.length).equals(lastChunk)) {
      this.#onAnswer(this.#status === 200 && this.#tail.includes("[DONE]"));
    }
  }

  #readHead(head: string): void {
    this.#inBody = true;
    this.#status = Number(head.slice(9, 12));
    const length = /\r\ncontent-length: *(\d+)/i.exec(head);
    this.#left = length === null ? -1 : Number(length[1]);
    this.#tail = Buffer.alloc(0);
  }

  #onAnswer(isGood: boolean): void {
    this.#inBody = false;
    const failure = isGood
      ? null
      : `status ${this.#status}, ${this.#left < 0 ? "a stream" : "whole"}`;
    this.#send(performance.now() - this.#sentAtMs, failure);
  }

  #onClosed(why: string): void {
    if (this.#socket.destroyed && this.#isFinishing) return this.#onFinished();
    this.#socket.destroy();
    this.#next(null, why);
    this.#onFinished();
  }
}

/** How a chat request went. */
export type ChatOutcome = {
  /** 0 when no answer came. */
  status: number;
  headers: NodeJS.Dict<string | string[]>;
  /** "complete": all of it, and well-formed; "left": this client went away. */
  end: "complete" | "broken" | "left";
  /** Content of the answer had come. */
  begun: boolean;
  /** What the model said. */
  text: string;
  /** One line, where it did not end well. */
  problem: string;
  totalMs: number;
};

export type ChatBody = {
  model: string;
  messages: { role: string; content: string }[];
  stream?: boolean;
  /** How long the stand-in's answer is to be. */
  headrace_output_tokens?: number;
};

export class ChatClient {
  readonly #port: number;
  readonly #key: string;
  readonly #agent = new Agent({ keepAlive: true, maxSockets: 4096, maxFreeSockets: 4096 });

  constructor(port: number, key: string) {
    this.#port = port;
    this.#key = key;
  }

  close(): void {
    this.#agent.destroy();
  }

  /** Never rejects. When `signal` aborts, the client leaves. */
  chat(body: ChatBody, signal?: AbortSignal): Promise<ChatOutcome> {
    const startedAtMs = performance.now();
    const outcome: ChatOutcome = {
      status: 0,
      headers: {},
      end: "broken",
      begun: false,
      text: "",
      problem: "",
      totalMs: 0,
    };
    return new Promise((resolve) => {
      const finish = (end: ChatOutcome["end"], problem: string): void => {
        if (outcome.totalMs > 0) return;
        outcome.totalMs = performance.now() - startedAtMs;
        outcome.end = signal?.aborted === true && end === "broken" ? "left" : end;
        outcome.problem = problem;
        resolve(outcome);
      };
      const headers = {
        authorization: `Bearer ${this.#key}`,
        "content-type": "application/json",
      };
      const path = "/v1/chat/completions";
      const to = {
        host: "127.0.0.1",
        port: this.#port,
        method: "POST",
        path,
        agent: this.#agent,
        headers,
      };
      const outgoing = request(signal === undefined ? to : { ...to, signal }, (response) => {
        outcome.status = response.statusCode ?? 0;
        outcome.headers = response.headers;
        let text = "";
        response.setEncoding("utf8");
        response.on("data", (chunk: string) => {
          text += chunk;
          outcome.begun ||= body.stream === true && outcome.status === 200;
        });
        response.on("error", (error) => finish("broken", error.message));
        response.on("close", () => finish("broken", "cut off"));
        response.on("end", () => {
          if (outcome.status !== 200) return finish("broken", text.slice(0, 300));
          const read = body.stream === true ? readStream(text) : readWhole(text);
          outcome.text = read.text;
          finish(read.problem === "" ? "complete" : "broken", read.problem);
        });
      });
      outgoing.on("error", (error) => finish("broken", error.message));
      outgoing.end(JSON.stringify(body));
    });
  }
}

export type Arrival = {
  body: ChatBody;
  /** The client leaves after so long, if it is still there. */
  leaveAfterMs?: number;
};

/** How the arrivals of an `OpenLoop` have ended so far. */
export type Tally = {
  sent: number;
  complete: number;
  left: number;
  /** Streams that had begun and did not end well. */
  brokenOnceBegun: number;
  /** Everything else: no client has got anything of its answer. */
  failed: number;
  /** Of `failed`: not even an error came. */
  unanswered: number;
  /** Never sent, for too many were open. */
  skipped: number;
  /** Of `failed` and `brokenOnceBegun`: what was wrong, and how often. */
  problems: Map<string, number>;
};

const PROBLEMS_MAX = 50;

/** Poisson arrivals; those that come while `openMax` are unanswered are skipped, and counted. */
export class OpenLoop {
  readonly tally: Tally = {
    sent: 0,
    complete: 0,
    left: 0,
    brokenOnceBegun: 0,
    failed: 0,
    unanswered: 0,
    skipped: 0,
    problems: new Map(),
  };
  readonly #client: ChatClient;
  readonly #random: Random;
  readonly #meanGapMs: number;
  readonly #openMax: number;
  readonly #next: () => Arrival;
  #timer: NodeJS.Timeout | null = null;
  #dueAtMs = performance.now();
  #open = 0;
  #onEmpty: (() => void) | null = null;

  constructor(
    client: ChatClient,
    random: Random,
    rate: { perSecond: number; openMax: number },
    next: () => Arrival,
  ) {
    this.#client = client;
    this.#random = random;
    this.#meanGapMs = 1000 / rate.perSecond;
    this.#openMax = rate.openMax;
    this.#next = next;
    this.#arm();
  }

  get open(): number {
    return this.#open;
  }

  /** Sends no more; resolves when the last one has ended. */
  stop(): Promise<void> {
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#open === 0) return Promise.resolve();
    return new Promise((resolve) => {
      this.#onEmpty = resolve;
    });
  }

  #arm(): void {
    this.#timer = setTimeout(() => this.#onTimer(), Math.max(1, this.#dueAtMs - performance.now()));
  }

  /** All that are due by now; a late timer skips none. */
  #onTimer(): void {
    while (this.#dueAtMs <= performance.now()) {
      this.#dueAtMs -= this.#meanGapMs * Math.log(1 - this.#random.next());
      if (this.#open < this.#openMax) this.#send(this.#next());
      else this.tally.skipped++;
    }
    this.#arm();
  }

  #send({ body, leaveAfterMs }: Arrival): void {
    this.tally.sent++;
    this.#open++;
    const leaving = leaveAfterMs === undefined ? null : new AbortController();
    const timer = leaving === null ? null : setTimeout(() => leaving.abort(), leaveAfterMs);
    void this.#client.chat(body, leaving?.signal).then((outcome) => {
      if (timer !== null) clearTimeout(timer);
      this.#count(outcome);
      if (--this.#open === 0 && this.#onEmpty !== null) this.#onEmpty();
    });
  }

  #count({ end, begun, status, problem }: ChatOutcome): void {
    if (end === "complete" || end === "left") {
      this.tally[end]++;
      return;
    }
    if (begun) this.tally.brokenOnceBegun++;
    else this.tally.failed++;
    if (status === 0) this.tally.unanswered++;
    const { problems } = this.tally;
    const key = `${status} ${/"code":"([^"]+)"/.exec(problem)?.[1] ?? problem}`;
    if (problems.size < PROBLEMS_MAX || problems.has(key)) {
      problems.set(key, (problems.get(key) ?? 0) + 1);
    }
  }
}

function readWhole(json: string): { text: string; problem: string } {
  try {
    const content: unknown = JSON.parse(json).choices?.[0]?.message?.content;
    if (typeof content === "string") return { text: content, problem: "" };
    return { text: "", problem: "an answer without content" };
  } catch {
    return { text: "", problem: "an answer that is not JSON" };
  }
}

function readStream(sse: string): { text: string; problem: string } {
  let text = "";
  const events = sse.split("\n\n");
  try {
    for (const event of events) {
      if (!event.startsWith("data: {")) continue;
      const json = JSON.parse(event.slice(6));
      if (json.error !== undefined) return { text, problem: `error event: ${json.error.code}` };
      text += json.choices?.[0]?.delta?.content ?? "";
    }
  } catch {
    return { text, problem: "an event that is not JSON" };
  }
  return { text, problem: events.at(-2) === "data: [DONE]" ? "" : "a stream without [DONE]" };
}
