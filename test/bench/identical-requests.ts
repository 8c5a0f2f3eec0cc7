/** What the benchmarks of single flight have in common: the request that all send, and clients that all leave. */
import { setMaxListeners } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";
import { MODEL } from "./fixed-answers.ts";
import type { ChatOutcome } from "./load.ts";
import { medianOf, type Row } from "./report.ts";

const LEAVING_ROUNDS = 5;
const ABORT_MS_MAX = 50;
const NEVER_MS = 5000;
/** At about 7 ms a token: 1.4 s, so that all clients are there before the end. */
const TOKENS = 200;
/** Enough for some tokens to be out. */
export const STREAMING_MS = 400;

/** A row that holds a number. */
export function countRow(
  name: string,
  question: string,
  value: number,
  bar: NonNullable<Row["bar"]>,
  detail = "",
): Row {
  return { name, question, figure: String(Math.round(value * 10) / 10), value, bar, detail };
}

/** A chat request that the node answers in about 1.4 s. */
export function body(content: string, stream: boolean) {
  return {
    model: MODEL,
    messages: [{ role: "user", content }],
    stream,
    headrace_output_tokens: TOKENS,
  };
}

/** Different problems, three at most. */
export function problemsOf(outcomes: readonly ChatOutcome[]): string {
  const problems = new Set(outcomes.map(({ problem }) => problem).filter((text) => text !== ""));
  return [...problems].slice(0, 3).join("; ");
}

export type Leaving = {
  /** Who leaves, for the question of the row. */
  who: string;
  clients: number;
  /** Sends all of a round, which end with the signal. */
  send: (round: number, signal: AbortSignal) => Promise<unknown>[];
  /** Until all of them share one flight. */
  together: () => Promise<void>;
  /** Generations that the node was told to end, since its start. */
  aborts: () => Promise<number>;
};

/** All clients of a flight leave at once: how soon does the node know, and was it told before? */
export async function leavingRows(leaving: Leaving): Promise<Row[]> {
  const noticedMs: number[] = [];
  let early = 0;
  for (let round = 0; round < LEAVING_ROUNDS; round++) {
    const before = await leaving.aborts();
    const gone = new AbortController();
    setMaxListeners(leaving.clients + 1, gone.signal);
    const sent = leaving.send(round, gone.signal);
    await leaving.together();
    await sleep(STREAMING_MS);
    const tooEarly = (await leaving.aborts()) - before;
    early += tooEarly;
    const leftAtMs = performance.now();
    gone.abort();
    while ((await leaving.aborts()) <= before + tooEarly) {
      if (performance.now() > leftAtMs + NEVER_MS) break;
    }
    noticedMs.push(performance.now() - leftAtMs);
    await Promise.all(sent);
  }
  const each = noticedMs.map((ms) => ms.toFixed(0)).join(", ");
  return [
    countRow(
      "abort",
      `ms from the leaving of ${leaving.who} until the node has ended the generation`,
      medianOf(noticedMs),
      { atMost: ABORT_MS_MAX },
      `${each} ms; ${NEVER_MS} = never`,
    ),
    countRow("early", "generations ended while a client was left", early, { atMost: 0 }),
  ];
}
