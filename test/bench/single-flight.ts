/**
 * Part of `npm run failover`: many clients ask the same at the same time. One generation serves all of them, however
 * they want it delivered; it goes on while anyone is left, and the node is rid of it when nobody is. Exit status 1
 * when a bar is missed.
 */
import { setMaxListeners } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";
import { MODEL } from "./fixed-answers.ts";
import { ChatClient, type ChatOutcome } from "./load.ts";
import { medianOf, printRows, type Row } from "./report.ts";
import { GATEWAY_KEY, lettersOf, restOf, Stack } from "./stack.ts";

const CLIENTS = 1000;
const FOLLOWERS = 50;
const REST_MS_MAX = 10_000;
const ABORT_MS_MAX = 50;
const NEVER_MS = 5000;
const LEAVING_ROUNDS = 5;
/** At about 7 ms a token: 1.4 s, so that all clients are there before the end. */
const TOKENS = 200;
/** Enough for some tokens to be out. */
const STREAMING_MS = 400;

const stack = new Stack();
const rows: Row[] = [];

function count(
  name: string,
  question: string,
  value: number,
  bar: NonNullable<Row["bar"]>,
  detail = "",
): void {
  rows.push({ name, question, figure: String(Math.round(value * 10) / 10), value, bar, detail });
}

function body(content: string, stream: boolean) {
  return {
    model: MODEL,
    messages: [{ role: "user", content }],
    stream,
    headrace_output_tokens: TOKENS,
  };
}

async function run(): Promise<void> {
  const node = await stack.node("gpu-1", ["--model", MODEL]);
  const gateway = await stack.gateway({
    nodes: [{ name: "gpu-1", url: `http://127.0.0.1:${node.port}` }],
  });
  const client = new ChatClient(gateway.port, GATEWAY_KEY);
  const upstream = () => stack.metric(node.port, "headrace_node_requests_total");
  const aborts = () => stack.metric(node.port, "headrace_node_aborts_total");
  const joined = (clients: number) =>
    stack.until(`${clients} clients to share one flight`, 5000, async () => {
      return (await stack.state(gateway)).cache?.participants === clients;
    });

  /** @param hangs the node makes no token until the leader has left. */
  const leaderLeaves = async (moment: string, hangs: boolean): Promise<void> => {
    const before = await upstream();
    if (hangs) await stack.call(node.port, "POST", "/fault", { hang: true });
    const content = `The leader leaves ${moment}.`;
    const leaving = new AbortController();
    const leader = client.chat(body(content, true), leaving.signal);
    await stack.until(
      "the leader to reach the node",
      2000,
      async () => (await upstream()) > before,
    );
    const followers = Array.from({ length: FOLLOWERS }, (_, index) =>
      client.chat(body(content, index % 2 === 0)),
    );
    await joined(FOLLOWERS + 1);
    if (!hangs) await sleep(STREAMING_MS);
    leaving.abort();
    const { end, begun } = await leader;
    await joined(FOLLOWERS);
    if (hangs) await stack.call(node.port, "DELETE", "/fault");
    const ended = await Promise.all(followers);
    const good = ended.filter((outcome) => outcome.end === "complete").length;
    const question = `followers (of ${FOLLOWERS}) that got it all although the leader left ${moment}`;
    count("followers", question, good, { atLeast: FOLLOWERS }, problemsOf(ended));
    const detail = `the leader: ${end}, ${begun ? "its stream had begun" : "nothing had come"}`;
    count("calls", "generations for them", (await upstream()) - before, { atMost: 1 }, detail);
  };

  /** @returns ms until the node knew, and generations that it ended before anyone had left. */
  const allLeave = async (round: number): Promise<{ noticedMs: number; early: number }> => {
    const before = await aborts();
    const leaving = new AbortController();
    setMaxListeners(FOLLOWERS + 1, leaving.signal);
    const leavers = Array.from({ length: FOLLOWERS }, (_, index) =>
      client.chat(body(`All leave, ${round}.`, index % 2 === 0), leaving.signal),
    );
    await joined(FOLLOWERS);
    await sleep(STREAMING_MS);
    const early = (await aborts()) - before;
    const leftAtMs = performance.now();
    leaving.abort();
    while ((await aborts()) <= before + early) {
      if (performance.now() > leftAtMs + NEVER_MS) break;
    }
    const noticedMs = performance.now() - leftAtMs;
    await Promise.all(leavers);
    return { noticedMs, early };
  };

  const manyBefore = await upstream();
  const many = await Promise.all(
    Array.from({ length: CLIENTS }, (_, index) =>
      client.chat(body("The same for all.", index % 2 === 0)),
    ),
  );
  const complete = many.filter(({ end }) => end === "complete").length;
  const first = many.find(({ end }) => end === "complete")?.text ?? "";
  const texts = new Set(many.map(({ text }) => text));
  const words = first.split(" ").length - 1;
  count(
    "calls",
    `generations for ${CLIENTS} identical requests, half of them streams`,
    (await upstream()) - manyBefore,
    { atMost: 1 },
    `dead letters: ${lettersOf(await stack.state(gateway))} (a lookup that expired went on alone)`,
  );
  count("complete", "answers that came whole", complete, { atLeast: CLIENTS }, problemsOf(many));
  count("texts", "different texts among them", texts.size, { atMost: 1 }, `${words} words each`);

  await leaderLeaves("before its first token", true);
  await leaderLeaves("in the middle of its stream", false);
  const left: { noticedMs: number; early: number }[] = [];
  for (let round = 0; round < LEAVING_ROUNDS; round++) left.push(await allLeave(round));
  const noticedMs = left.map((round) => round.noticedMs);
  count(
    "abort",
    "ms from the last client's leaving until the node has ended the generation",
    medianOf(noticedMs),
    { atMost: ABORT_MS_MAX },
    `${noticedMs.map((ms) => ms.toFixed(0)).join(", ")} ms; ${NEVER_MS} = never`,
  );
  const early = left.reduce((sum, round) => sum + round.early, 0);
  count("early", "generations ended while a client was left", early, { atMost: 0 });

  const held = await restOf(stack, gateway, REST_MS_MAX);
  const heldTexts = Object.entries(held).map(([what, left]) => `${what} ${left}`);
  count(
    "rest",
    "held afterwards: requests, leases, queue, reservations, flights",
    heldTexts.length,
    { atMost: 0 },
    heldTexts.join(", "),
  );
  client.close();
}

function problemsOf(outcomes: readonly ChatOutcome[]): string {
  const problems = new Set(
    outcomes.map(({ problem }) => problem).filter((problem) => problem !== ""),
  );
  return [...problems].slice(0, 3).join("; ");
}

try {
  await run();
} finally {
  await stack.endAll();
}
const passed = printRows(rows);
console.log(passed ? "\nPASS" : "\nFAIL");
process.exitCode = passed ? 0 : 1;
