/** Why two texts match or not: of a running gateway, and without one. */
import { afterEach, describe, expect, it } from "vitest";
import { inspectCommand } from "../bin/cache-inspect.ts";
import { HeadraceProcess, isBuilt, killAll } from "./headrace-process.ts";
import { type LiveWorld, startLiveWorld, until } from "./live-world.ts";

const TOKEN = "admin-token-of-the-test";
const worlds: LiveWorld[] = [];
afterEach(async () => {
  for (const world of worlds.splice(0)) await world.close();
  await killAll();
});

async function inspect(...args: string[]): Promise<string> {
  let out = "";
  const command = inspectCommand().configureOutput({
    writeOut: (text) => {
      out += text;
    },
  });
  await command.parseAsync(args, { from: "user" });
  return out;
}

describe("cache inspect: two texts", () => {
  it("a match: similarity above the threshold, and every guard passes", async () => {
    const out = await inspect("--texts", "How do I do it?", "how do i do it");
    expect(out).toMatch(/^similarity +1\.0000$/m);
    expect(out.match(/^guard \w+ +passes/gm)).toHaveLength(9);
    expect(out).toMatch(/^match +similarity 1\.0000 ≥ 0\.92, and no guard blocks$/m);
  });

  it("no match: each guard that blocks, with its reason", async () => {
    const texts = ["Do I get the parcel in 3 days?", "Do I not get the parcel in 5 days?"];
    const out = await inspect("--texts", ...texts, "--threshold", "0.8");
    expect(out).toMatch(/^guard numbers +blocks: .*3.*5/m);
    expect(out).toMatch(/^guard negation +blocks: negations 0 ≠ 1$/m);
    expect(out).toMatch(/^guard quotes +passes$/m);
    expect(out).toMatch(/^no match +guard: numbers$/m);
    const far = await inspect("--texts", "Where is it?", "Who are you?", "--json");
    expect(JSON.parse(far)).toMatchObject({
      matches: false,
      threshold: 0.92,
      embedder: "lexical 1, 384 dimensions",
      why: expect.stringMatching(/^similarity 0\.\d{4} < 0\.92$/),
    });
  });

  it("strict tenants' guard counts only where it is asked", async () => {
    const texts = [
      "--texts",
      "How do I open the door?",
      "How do I paint the door?",
      "--threshold",
      "0.1",
    ];
    expect(await inspect(...texts)).toMatch(
      /^guard private_words +blocks: .* \(asked of strict.*\n+match /m,
    );
    expect(await inspect(...texts, "--strict")).toMatch(/^no match +guard: private_words$/m);
  });

  it("a text without a vector matches nothing", async () => {
    const out = await inspect("--texts", "   ", "How do I do it?");
    expect(out).toMatch(/^no match +a text has no vector$/m);
  });
});

describe("cache inspect: a gateway", () => {
  it("lists a tenant's questions, and says what would come of them for a text", async () => {
    const world = await startLiveWorld({
      options: {
        admin: { token: TOKEN },
        cache: {
          semantic: { matchMs: 5000, embedder: { type: "lexical", timeoutMs: 5000 } },
        },
      },
    });
    worlds.push(world);
    await until("the embedder is healthy", async () => {
      return (await world.gateway.state()).embedder?.state === "healthy";
    });
    const of = ["--url", world.url, "--token", TOKEN];
    expect(await inspect(...of)).toContain("nothing is stored");
    await world.chat("How do I reset the password of my account in 3 days?");
    await world.chat("Which colours\nhas the flag of France?");
    const all = await inspect(...of);
    expect(all).toMatch(/^matching +fixed, similarity ≥ 0\.92$/m);
    expect(all).toMatch(/^stored +"Which colours\\nhas the flag of France\?"$/m);
    expect(all).toMatch(/entry +[0-9a-f]{27}, scope [0-9a-f]{12}, model llama-3\.1-8b$/m);
    const text = "How do I reset the password of my account in 5 days?";
    const out = await inspect(...of, "--text", text, "--count", "1");
    expect(out.match(/^stored/gm)).toHaveLength(1);
    expect(out).toMatch(/guard numbers +number 5 day ≠ 3 day\n +no match +guard: numbers$/m);
    const json = JSON.parse(await inspect(...of, "--json", "--tenant", "other"));
    expect(json).toMatchObject({ entries: [], judged: [] });
  });
});

const describeBuilt = isBuilt() ? describe : describe.skipIf(true);

describeBuilt("cache inspect: what it refuses", () => {
  it.each([
    ["one text", ["--texts", "a"], "--texts takes two texts, not 1"],
    ["three", ["--texts", "a", "b", "c"], "not 3"],
    ["no cosine", ["--texts", "a", "b", "--threshold", "x"], "--threshold"],
    ["no embedder", ["--texts", "a", "b", "--embedder", "off"], "there is nothing to compare"],
    [
      "a model that is not there",
      ["--texts", "a", "b", "--embedder", "transformers", "--path", "nowhere"],
      "embedder is off",
    ],
    ["no token", [], "admin.token"],
    ["no URL", ["--token", TOKEN, "--url", "localhost"], "--url localhost is no http URL"],
    ["nobody there", ["--token", TOKEN, "--url", "http://127.0.0.1:9"], "does not answer"],
    ["no count", ["--token", TOKEN, "--count", "0"], "--count is 0"],
  ])("%s", async (_, args, says) => {
    const one = new HeadraceProcess(["cache", "inspect", ...args]);
    expect(await one.exit).toBe(2);
    expect(one.err).toContain(says);
  });

  it("a wrong token", async () => {
    const world = await startLiveWorld({ options: { admin: { token: TOKEN } } });
    worlds.push(world);
    const one = new HeadraceProcess(["cache", "inspect", "--url", world.url, "--token", "wrong"]);
    expect(await one.exit).toBe(2);
    expect(one.err).toMatch(/the gateway refuses \(status 403\)/);
  });
});
