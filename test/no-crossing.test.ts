/**
 * No answer crosses from one identity to another: 10,000 random requests of two tenants, two system prompts, two models,
 * tool sets and histories, all of which ask the same few questions in nearly the same words, through the real reader,
 * front and actors, with clients that leave, ids used again, complaints and purges. Every node's answer says whose
 * request it was made for, and every client reads whether that is its own.
 */
import { describe, expect, it } from "vitest";
import { Random } from "../runtime/random.ts";
import { FrontWorld, type Reply } from "./front-world.ts";

const REQUESTS = 10_000;
const MODELS = ["m", "n"] as const;
const TENANTS = ["acme", "beta"] as const;
const SYSTEMS = ["Be brief.", "Be very brief."] as const;
const HISTORIES = [[], [["Is it open?", "Yes."]], [["Is it open?", "No."]]] as const;
/** Requests with tools are matched by equality alone. */
const TOOLS = [undefined, undefined, undefined, undefined, undefined, "lookup", "look_up"] as const;

/** Questions that are near to each other in words, some of them to be told apart by a guard. */
const QUESTIONS = [
  "How do I reset the password of my account",
  "How do I reset the password of my account in 3 days",
  "How do I reset the password of my account in 5 days",
  "How do I change the email address of my account",
  "How can I see all the orders of the last month in the shop",
  "How can I see all the orders of the last year in the shop",
  "Where do I turn on the notifications of the mobile application",
  "Where do I turn off the notifications of the mobile application",
  "What does the delivery of a large parcel to a house cost",
  "What does the return of a large parcel from a house cost",
] as const;
const WORDINGS = [
  (text: string) => text,
  (text: string) => `${text}?`,
  (text: string) => `${text} ?!`,
  (text: string) => text.toLowerCase(),
  (text: string) => `${text}, please?`,
  (text: string) => text.replace(/\bthe\b/, "my"),
] as const;

type Message = { role: string; content: string };
/** All that an answer depends on. */
type Identity = {
  tenant: string;
  model: string;
  system: string;
  tools: string;
  history: string;
  question: string;
};

/** `user` goes to the node and is no part of any key: so an answer can say for whom it was made. */
function identityOf(body: object): Identity {
  const { model, messages, tools, user } = body as {
    model: string;
    user: string;
    messages: Message[];
    tools?: { function: { name: string } }[];
  };
  return {
    tenant: user,
    model,
    system: messages[0]?.content ?? "",
    tools: tools?.map((tool) => tool.function.name).join() ?? "",
    history: messages
      .slice(1, -1)
      .map(({ content }) => content)
      .join(),
    question: messages.at(-1)?.content ?? "",
  };
}

type Sent = { tenant: string; body: object; reply: Reply; left: boolean };

function run(seed: number): { world: FrontWorld; sent: Sent[] } {
  const random = new Random(seed);
  const oneOf = <T>(list: readonly T[]): T => {
    const one = list[random.int(list.length)];
    if (one === undefined && !list.some((each) => each === undefined)) throw new Error("empty");
    return one as T;
  };
  const chance = (share: number): boolean => random.next() < share;
  const world = new FrontWorld({
    seed,
    models: MODELS,
    answer: (asked) => JSON.stringify(identityOf(asked)),
    answerMs: () => 5 + random.int(60),
    options: {
      keys: TENANTS.map((tenant) => ({ key: `key-of-${tenant}`, tenant })),
      cache: { ttlMs: 1500, semantic: { ttlMs: 20_000, judgeRatio: 0.02, precisionMin: 0.01 } },
    },
  });
  const send = (tenant: string, body: object): Sent => {
    const reply = world.chat(body, {
      authorization: `Bearer key-of-${tenant}`,
      ...(chance(0.03) ? { "cache-control": "no-cache" } : {}),
      ...(chance(0.03) ? { "cache-control": "no-store" } : {}),
      ...(chance(0.3) ? { "x-request-id": `id-${random.int(20)}` } : {}),
    });
    return { tenant, body, reply, left: false };
  };
  const sent: Sent[] = [];
  while (sent.length < REQUESTS) {
    for (let burst = 1 + random.int(30); burst > 0; burst--) {
      const before = sent.at(-1);
      if (chance(0.2) && before !== undefined) {
        sent.push(send(before.tenant, { ...before.body, stream: chance(0.3) })); // Some join it.
        continue;
      }
      const tenant = oneOf(TENANTS);
      const tool = oneOf(TOOLS);
      const messages: Message[] = [{ role: "system", content: oneOf(SYSTEMS) }];
      for (const [user, assistant] of oneOf(HISTORIES))
        messages.push({ role: "user", content: user }, { role: "assistant", content: assistant });
      messages.push({ role: "user", content: oneOf(WORDINGS)(oneOf(QUESTIONS)) });
      const body = {
        model: oneOf(MODELS),
        user: tenant,
        messages,
        stream: chance(0.3),
        ...(tool === undefined ? {} : { tools: [{ type: "function", function: { name: tool } }] }),
      };
      sent.push(send(tenant, body));
    }
    world.run(random.int(40));
    const leaver = sent[sent.length - 1 - random.int(10)];
    if (chance(0.5) && leaver !== undefined && !leaver.reply.ended) {
      leaver.left = true;
      leaver.reply.exchange?.left();
    }
    const some = oneOf(sent);
    const entry = some.reply.headers["x-headrace-entry"];
    if (chance(0.1) && entry !== undefined) complain(world, some.tenant, entry);
    if (chance(0.01)) world.purge(chance(0.5) ? oneOf(TENANTS) : undefined);
  }
  world.run(60_000);
  return { world, sent };
}

function complain(world: FrontWorld, tenant: string, entry: string): void {
  world.front.submit(
    {
      method: "POST",
      path: "/v1/headrace/feedback",
      query: "",
      header: (name) => (name === "authorization" ? `Bearer key-of-${tenant}` : undefined),
      body: Buffer.from(JSON.stringify({ entry, ok: false })),
    },
    { whole() {}, head() {}, write: () => true, end() {}, destroy() {} },
  );
}

describe("no crossing", () => {
  it(`${REQUESTS} requests of near-duplicates over all identities: everyone gets an answer to their own`, async () => {
    const { world, sent } = run(20_251_125);
    const crossings: string[] = [];
    const verdicts = new Map<string, number>();
    const unanswered: string[] = [];
    for (const { body, reply, left } of sent) {
      if (left) continue;
      const identity = identityOf(body);
      if (!reply.ended || reply.heads !== 1 || reply.status !== 200) {
        unanswered.push(`${reply.requestId}: ${reply.status} ${reply.body.slice(0, 200)}`);
        continue;
      }
      const verdict = reply.cache.split(";")[0] ?? "";
      verdicts.set(verdict, (verdicts.get(verdict) ?? 0) + 1);
      const { question, ...own } = identity;
      const { question: answered, ...told } = JSON.parse(reply.content) as Identity;
      const isSame = JSON.stringify(own) === JSON.stringify(told);
      // Only a semantic hit may be the answer to other words.
      if (!isSame || (verdict !== "hit-semantic" && question !== answered))
        crossings.push(`${verdict}: ${JSON.stringify(identity)} got ${reply.content}`);
    }
    expect(crossings).toEqual([]);
    expect(unanswered).toEqual([]);
    // What could have crossed: a test without hits shows nothing.
    for (const verdict of ["hit-semantic", "hit-exact", "joined", "miss"])
      expect(verdicts.get(verdict) ?? 0, verdict).toBeGreaterThan(300);
    expect(sent.filter(({ left }) => left).length).toBeGreaterThan(50);
    const { semanticHits, removed, flights, participants } = await world.cache();
    expect(semanticHits).toBeGreaterThan(1000);
    expect(removed).toBeGreaterThan(5);
    expect({ flights, participants, open: world.front.openCount }).toEqual({
      flights: 0,
      participants: 0,
      open: 0,
    });
    expect([world.data.requests.size, world.data.answers.size]).toEqual([0, 0]);
  });
});
