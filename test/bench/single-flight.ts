/**
 * Part of `npm run failover`: many clients ask the same at the same time. One generation serves all of them, however
 * they want it delivered; it goes on while anyone is left, and the node is rid of it when nobody is. Exit status 1
 * when a bar is missed.
 */
import { setTimeout as sleep } from "node:timers/promises";
import { MODEL } from "./fixed-answers.ts";
import { body, countRow, leavingRows, problemsOf, STREAMING_MS } from "./identical-requests.ts";
import { ChatClient } from "./load.ts";
import { printRows, type Row } from "./report.ts";
import { GATEWAY_KEY, lettersOf, restOf, Stack } from "./stack.ts";

const CLIENTS = 1000;
const FOLLOWERS = 50;
const REST_MS_MAX = 10_000;

const stack = new Stack();
const rows: Row[] = [];

function count(...row: Parameters<typeof countRow>): void {
  rows.push(countRow(...row));
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
  rows.push(
    ...(await leavingRows({
      who: "the last client",
      clients: FOLLOWERS,
      send: (round, signal) =>
        Array.from({ length: FOLLOWERS }, (_, index) =>
          client.chat(body(`All leave, ${round}.`, index % 2 === 0), signal),
        ),
      together: () => joined(FOLLOWERS),
      aborts,
    })),
  );

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

try {
  await run();
} finally {
  await stack.endAll();
}
const passed = printRows(rows);
console.log(passed ? "\nPASS" : "\nFAIL");
process.exitCode = passed ? 0 : 1;
