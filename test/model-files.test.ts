/** Downloading a model from a hub that misbehaves, and what counts as being there. */
import { createHash } from "node:crypto";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import {
  findModel,
  modelFiles,
  modelsFolder,
  PullError,
  pullModel,
} from "../transport/model-files.ts";
import { HeadraceProcess, isBuilt, killAll } from "./headrace-process.ts";

const fixture = join(import.meta.dirname, "fixtures/tiny-random-bert");
const weights = "onnx/model_quantized.onnx";

const cleanups: (() => Promise<unknown> | unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
  await killAll();
});

function tempFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "headrace-models-"));
  cleanups.push(() => rmSync(folder, { recursive: true }));
  return folder;
}

const sha256 = (bytes: Buffer): string => createHash("sha256").update(bytes).digest("hex");
const COMMIT = "0123456789abcdef0123456789abcdef01234567";

type Hub = {
  url: string;
  /** Of every request: method, path, range. */
  asked: string[];
  /** Takes a GET of weights over, if it returns true. */
  spoil: (bytes: Buffer, request: IncomingMessage, response: ServerResponse) => boolean;
};

/** As the Hugging Face hub does it: large files by redirect, with size and hash on the redirect; ranges. */
async function startHub(): Promise<Hub> {
  const hub: Hub = { url: "", asked: [], spoil: () => false };
  const server = createServer((request, response) => {
    const path = request.url ?? "";
    hub.asked.push([request.method, path, request.headers.range].filter(Boolean).join(" "));
    const [, file = ""] = /^\/org\/tiny\/resolve\/\w+\/(.+)$/.exec(path) ?? [];
    const cdn = path === "/cdn/weights";
    const name = cdn ? weights : file;
    if (!(modelFiles as readonly string[]).includes(name))
      return void response.writeHead(404).end();
    const bytes = readFileSync(join(fixture, name));
    response.setHeader("x-repo-commit", COMMIT);
    if (name === weights && !cdn) {
      response.setHeader("x-linked-size", bytes.length);
      response.setHeader("x-linked-etag", `"${sha256(bytes)}"`);
      return void response.writeHead(302, { location: "/cdn/weights" }).end();
    }
    response.setHeader("etag", '"0123456789"');
    if (cdn && hub.spoil(bytes, request, response)) return;
    const from = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? "")?.[1] ?? 0);
    const part = bytes.subarray(from);
    response.writeHead(from > 0 ? 206 : 200, { "content-length": part.length });
    response.end(request.method === "HEAD" ? undefined : part);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  hub.url = `http://127.0.0.1:${typeof address === "object" ? address?.port : 0}`;
  cleanups.push(() => {
    server.closeAllConnections();
    return new Promise((resolve) => server.close(resolve));
  });
  return hub;
}

function pull(hub: Hub, dir: string, model = "org/tiny", signal = new AbortController().signal) {
  const seen: string[] = [];
  const onProgress = (file: string, bytes: number, total: number | undefined): void =>
    void seen.push(`${file} ${bytes}/${total}`);
  const done = pullModel({ model, dir, from: hub.url, signal, onProgress });
  return { done, seen };
}

function filesIn(folder: string): string[] {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(folder.length + 1))
    .sort();
}

/** What is there is what the hub has, byte for byte. */
function expectWhole(dir: string): void {
  const folder = join(dir, "org/tiny");
  expect(filesIn(folder)).toEqual([...modelFiles].sort());
  for (const file of modelFiles) {
    expect(readFileSync(join(folder, file)).equals(readFileSync(join(fixture, file)))).toBe(true);
  }
  expect(findModel(dir, "org/tiny")).toEqual({ folder, model: "org/tiny" });
}

/** Sends a part, and breaks off once some of that is on disk: a connection that breaks may lose what is on it. */
function halfWay(dir: string): Hub["spoil"] {
  const part = join(dir, "org/tiny", `${weights}.part`);
  return (bytes, request, response) => {
    if (request.headers.range !== undefined) return false;
    response.writeHead(200, { "content-length": bytes.length });
    response.write(bytes.subarray(0, 100_000));
    const looking = setInterval(() => {
      if (!existsSync(part) || readFileSync(part).length === 0) return;
      clearInterval(looking);
      response.destroy();
    }, 5);
    cleanups.push(() => clearInterval(looking));
    return true;
  };
}

describe("model pull", () => {
  it("fetches every file once, all of one commit, with progress; the next pull fetches nothing", async () => {
    const hub = await startHub();
    const dir = tempFolder();
    const first = pull(hub, dir);
    expect(await first.done).toEqual({ folder: join(dir, "org/tiny"), fetched: 4 });
    expectWhole(dir);
    const size = readFileSync(join(fixture, weights)).length;
    expect(first.seen.at(-1)).toBe(`${weights} ${size}/${size}`);
    expect(hub.asked[0]).toBe("HEAD /org/tiny/resolve/main/config.json");
    for (const line of hub.asked.slice(1)) expect(line).toMatch(new RegExp(`/${COMMIT}/|/cdn/`));
    hub.asked.length = 0;
    expect(await pull(hub, dir).done).toMatchObject({ fetched: 0 });
    expect(hub.asked.every((line) => line.startsWith("HEAD"))).toBe(true);
  });

  it("a half download is no model; the next pull goes on where it ended", async () => {
    const hub = await startHub();
    const dir = tempFolder();
    hub.spoil = halfWay(dir);
    await expect(pull(hub, dir).done).rejects.toThrow(PullError);
    expect(filesIn(join(dir, "org/tiny/onnx"))).toEqual(["model_quantized.onnx.part"]);
    expect(() => findModel(dir, "org/tiny")).toThrow(/missing \(half of it was downloaded\)/);
    hub.spoil = () => false;
    hub.asked.length = 0;
    expect(await pull(hub, dir).done).toMatchObject({ fetched: 1 });
    expect(hub.asked.at(-1)).toMatch(/^GET \/cdn\/weights bytes=[1-9]\d*-$/);
    expectWhole(dir);
  });

  it("stopped in the middle: the same", async () => {
    const hub = await startHub();
    const dir = tempFolder();
    const stop = new AbortController();
    hub.spoil = (bytes, _request, response) => {
      response.writeHead(200, { "content-length": bytes.length });
      response.write(bytes.subarray(0, 50_000), () => stop.abort());
      return true;
    };
    await expect(pull(hub, dir, "org/tiny", stop.signal).done).rejects.toThrow(
      /broke off|cannot be reached/,
    );
    expect(() => findModel(dir, "org/tiny")).toThrow(/missing/);
    hub.spoil = () => false;
    await pull(hub, dir).done;
    expectWhole(dir);
  });

  it.each<[string, Hub["spoil"]]>([
    [
      "other bytes",
      (bytes, _request, response) => {
        response.writeHead(200).end(Buffer.alloc(bytes.length, 7));
        return true;
      },
    ],
    [
      "too many bytes",
      (bytes, _request, response) => {
        response.writeHead(200).end(Buffer.concat([bytes, bytes]));
        return true;
      },
    ],
  ])("%s than the hub has said: thrown away, and fetched anew the next time", async (_, spoil) => {
    const hub = await startHub();
    const dir = tempFolder();
    hub.spoil = spoil;
    await expect(pull(hub, dir).done).rejects.toThrow(/not what the hub says it is/);
    expect(filesIn(join(dir, "org/tiny"))).not.toContain(`${weights}.part`);
    hub.spoil = () => false;
    await pull(hub, dir).done;
    expectWhole(dir);
  });

  it("the rest of another file: noticed by its hash", async () => {
    const hub = await startHub();
    const dir = tempFolder();
    mkdirSync(join(dir, "org/tiny/onnx"), { recursive: true });
    writeFileSync(join(dir, "org/tiny", `${weights}.part`), Buffer.alloc(1000, 7));
    await expect(pull(hub, dir).done).rejects.toThrow(/not what the hub says it is/);
    await pull(hub, dir).done;
    expectWhole(dir);
  });

  it("a damaged file that has the right size is fetched anew", async () => {
    const hub = await startHub();
    const dir = tempFolder();
    await pull(hub, dir).done;
    const file = join(dir, "org/tiny", weights);
    const bytes = readFileSync(file);
    bytes[1000] = (bytes[1000] ?? 0) ^ 1;
    writeFileSync(file, bytes);
    expect(await pull(hub, dir).done).toMatchObject({ fetched: 1 });
    expectWhole(dir);
  });

  it("a hub that does not resume sends all of it again", async () => {
    const hub = await startHub();
    const dir = tempFolder();
    hub.spoil = halfWay(dir);
    await expect(pull(hub, dir).done).rejects.toThrow();
    hub.spoil = (bytes, _request, response) => {
      response.writeHead(200, { "content-length": bytes.length }).end(bytes);
      return true;
    };
    await pull(hub, dir).done;
    expectWhole(dir);
  });

  it.each([
    ["org/none", /status 404 \(no such model/],
    ["../../etc", /is not a model's name; accepted: org\/name/],
    ["a/../b", /is not a model's name/],
    ["a b", /is not a model's name/],
    ["", /is not a model's name/],
  ])("%j: refused, nothing is written", async (model, message) => {
    const hub = await startHub();
    const dir = tempFolder();
    await expect(pull(hub, dir, model).done).rejects.toThrow(message);
    expect(readdirSync(dir)).toEqual([]);
  });

  it("a hub that is not there says so", async () => {
    const hub = await startHub();
    await cleanups.pop()?.();
    await expect(pull(hub, tempFolder()).done).rejects.toThrow(/cannot be reached: ECONNREFUSED/);
  });
});

describe("findModel", () => {
  it("a folder of models, or the model's own; by default in the user's cache", () => {
    expect(findModel(fixture, undefined)).toEqual({ folder: fixture, model: "tiny-random-bert" });
    const models = join(fixture, "..");
    expect(findModel(models, "tiny-random-bert").folder).toBe(fixture);
    expect(() => findModel(models, undefined)).toThrow(/paraphrase-multilingual.* is not in/);
    expect(modelsFolder({ XDG_CACHE_HOME: "/c" })).toBe(join("/c", "headrace", "models"));
  });
});

describe.runIf(isBuilt())("the model command", () => {
  it("pulls, says how to use it, and checks what it pulled", async () => {
    const hub = await startHub();
    const dir = tempFolder();
    const pulling = new HeadraceProcess([
      "model",
      "pull",
      "org/tiny",
      "--dir",
      dir,
      "--from",
      hub.url,
    ]);
    expect(await pulling.exit).toBe(0);
    expect(pulling.out).toContain(`org/tiny is there: ${join(dir, "org/tiny")}`);
    expect(pulling.err).toMatch(/model_quantized.onnx: 0.2 of 0.2 MB/);
    const again = new HeadraceProcess([
      "model",
      "pull",
      "org/tiny",
      "--dir",
      dir,
      "--from",
      hub.url,
    ]);
    expect(await again.exit).toBe(0);
    expect(again.out).toContain("is there already");
    if (!existsSync(join(import.meta.dirname, "../node_modules/@xenova/transformers"))) {
      return console.log("skipped: @xenova/transformers is not installed: model check");
    }
    const checking = new HeadraceProcess([
      "model",
      "check",
      "--path",
      dir,
      "--model",
      "org/tiny",
      "--runs",
      "3",
    ]);
    expect(await checking.exit).toBe(0);
    expect(checking.out).toMatch(/embedder +transformers:org\/tiny, version [0-9a-f]{16}-mean/);
    expect(checking.out).toMatch(/dimension +64/);
    expect(checking.out).toMatch(/self-test +passed/);
    for (const row of ["9 tokens", "25 tokens", "128 tokens", "delay of the main loop meanwhile"]) {
      expect(checking.out).toMatch(new RegExp(`${row} +p50 [\\d.]+ ms, p99 [\\d.]+ ms`));
    }
    expect(checking.out).not.toContain("refused");
  });

  it.each([
    [["pull", "org/none"], 1, /no such model/],
    [["pull", "--from", "ftp://x"], 2, /--from ftp:\/\/x is no http URL/],
    [["check", "--path", "nowhere"], 1, /is not in .*nowhere; `headrace model pull/],
    [
      ["check", "--path", fixture, "--dimension", "384"],
      1,
      /FAILED: a vector has 64 dimensions instead of 384/,
    ],
    [["check", "--type", "lexical", "--dimension", "12x"], 2, /dimension/],
    [["check", "--url", "http://127.0.0.1:1"], 2, /model is missing: type is http/],
    [
      ["check", "--url", "http://127.0.0.1:1", "--model", "m"],
      1,
      /cannot be reached \(ECONNREFUSED\)/,
    ],
    [["check", "--type", "lexical", "--runs", "0"], 2, /--runs is 0; accepted/],
    [["check", "--type", "word2vec"], 2, /one of off, lexical, transformers, http/],
  ] as const)("%j: ends with %d and says why", async (args, code, message) => {
    const hub = await startHub();
    const dir = tempFolder();
    const extra =
      args[0] === "pull" && !args.includes("--from" as never)
        ? ["--dir", dir, "--from", hub.url]
        : [];
    const run = new HeadraceProcess(["model", ...args, ...extra]);
    expect(await run.exit).toBe(code);
    expect(run.out + run.err).toMatch(message);
  });
});
