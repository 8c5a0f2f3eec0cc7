/**
 * The files of an embedding model on disk: where they are, whether they are whole, and how they get there.
 *
 * Layout (of the Hugging Face hub, which @xenova/transformers reads): a folder per model, `<models>/<org>/<name>/`,
 * with the files of `modelFiles`. A download goes to `<file>.part` and is renamed when its size and, where the hub
 * states one, its SHA-256 are right; what is there already is not fetched again, and a half file is resumed. A
 * model is present when every file has its name: half a download never counts.
 */
import { createHash } from "node:crypto";
import { createReadStream, createWriteStream, existsSync, readFileSync, statSync } from "node:fs";
import { mkdir, rename, rm, stat } from "node:fs/promises";
import { homedir } from "node:os";
import { basename, dirname, join, resolve } from "node:path";
import { Readable, Transform } from "node:stream";
import { pipeline } from "node:stream/promises";
import { EMBEDDER_MODEL, EmbedderError } from "./embedder-backend.ts";

/** All that is needed, the large one last, so that a wrong name is found out soon. */
export const modelFiles = [
  "config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "onnx/model_quantized.onnx",
] as const;

/** Where models lie unless told otherwise. */
export function modelsFolder(
  env: Readonly<Record<string, string | undefined>> = process.env,
): string {
  return join(env.XDG_CACHE_HOME ?? join(homedir(), ".cache"), "headrace", "models");
}

/**
 * A model that is whole, as far as can be told without loading it: its folder, and its name.
 * @param path a folder of models, or the model's own; undefined: `modelsFolder`.
 * @param named undefined: the default model, or the one that `path` holds.
 * @throws EmbedderError that says what is missing and how to get it.
 */
export function findModel(
  path: string | undefined,
  named: string | undefined,
): { folder: string; model: string } {
  const root = resolve(path ?? modelsFolder());
  const isOwn = path !== undefined && existsSync(join(root, "config.json"));
  const model = named ?? (isOwn ? basename(root) : EMBEDDER_MODEL);
  const folder = isOwn ? root : join(root, model);
  const pull = `\`headrace model pull ${model}${path === undefined ? "" : ` --dir ${path}`}\` fetches it`;
  if (!existsSync(folder)) {
    throw new EmbedderError("lasting", `the model ${model} is not in ${root}; ${pull}`);
  }
  for (const file of modelFiles) {
    const where = join(folder, file);
    const bytes = statSync(where, { throwIfNoEntry: false })?.size;
    if (bytes === undefined) {
      const half = existsSync(`${where}.part`) ? " (half of it was downloaded)" : "";
      throw new EmbedderError("lasting", `${where} is missing${half}; ${pull}`);
    }
    const problem = file.endsWith(".json") ? jsonProblem(where) : weightsProblem(where, bytes);
    if (problem !== undefined) throw new EmbedderError("lasting", `${where} ${problem}; ${pull}`);
  }
  return { folder, model };
}

function jsonProblem(file: string): string | undefined {
  try {
    JSON.parse(readFileSync(file, "utf8"));
    return undefined;
  } catch {
    return "is not whole (no JSON)";
  }
}

/** A clone without Git LFS has a note of some 130 bytes in the place of every large file. */
function weightsProblem(file: string, bytes: number): string | undefined {
  if (bytes > 1024) return undefined;
  const isPointer = readFileSync(file, "latin1").startsWith("version https://git-lfs");
  return isPointer ? "is a Git LFS pointer, not the weights" : "is not whole";
}

/** Changes with any byte of the model. */
export async function modelVersion(folder: string): Promise<string> {
  const hash = createHash("sha256");
  for (const file of modelFiles) {
    for await (const chunk of createReadStream(join(folder, file))) hash.update(chunk);
  }
  return hash.digest("hex").slice(0, 16);
}

// ---- download -----------------------------------------------------------------------------------------------

/** Cannot be downloaded: where, and why. */
export class PullError extends Error {
  override readonly name = "PullError";
}

export type PullProgress = (file: string, bytes: number, bytesTotal: number | undefined) => void;

export type PullOptions = {
  model: string;
  /** The folder of models. */
  dir: string;
  /** Of the hub: `<from>/<model>/resolve/main/<file>`. */
  from: string;
  signal: AbortSignal;
  onProgress: PullProgress;
};

/** A hub that sends nothing for so long is not waited for. */
const STALL_MS = 30_000;

/**
 * Fetches what is not there yet.
 * @returns the model's folder, and how many of its files had to be fetched.
 * @throws PullError; what was fetched so far stays and is gone on with the next time.
 */
export async function pullModel(
  options: PullOptions,
): Promise<{ folder: string; fetched: number }> {
  const { model, dir, from } = options;
  if (!/^[\w.-]+(\/[\w.-]+)?$/.test(model) || /(^|\/)\.+(\/|$)/.test(model)) {
    throw new PullError(`"${model}" is not a model's name; accepted: org/name, as on the hub`);
  }
  const folder = join(resolve(dir), model);
  let revision = "main";
  let fetched = 0;
  for (const file of modelFiles) {
    const urlAt = (commit: string): string =>
      `${from.replace(/\/+$/, "")}/${model}/resolve/${commit}/${file}`;
    const about = await describe(urlAt(revision), options.signal);
    if (about.commit !== undefined) revision = about.commit; // All files of one commit.
    const target = join(folder, file);
    if (!(await isWhole(target, about))) {
      await mkdir(dirname(target), { recursive: true });
      await fetchFile(urlAt(revision), target, about, options, file);
      fetched++;
    }
  }
  return { folder, fetched };
}

/** What the hub says of a file before it sends it. */
type About = { bytes: number | undefined; sha256: string | undefined; commit: string | undefined };

/** The hub answers with a redirect to where large files lie; size and hash stand on the redirect itself. */
async function describe(url: string, signal: AbortSignal): Promise<About> {
  const response = await request(url, { method: "HEAD", redirect: "manual" }, signal);
  const { headers, status } = response;
  if (status >= 400) throw new PullError(`${url} answered with status ${status}${hintOf(status)}`);
  const size =
    headers.get("x-linked-size") ?? (status < 300 ? headers.get("content-length") : null);
  const tag = (headers.get("x-linked-etag") ?? headers.get("etag") ?? "").replace(/^W\/|"/g, "");
  return {
    bytes: size === null ? undefined : Number(size),
    sha256: /^[0-9a-f]{64}$/.test(tag) ? tag : undefined,
    commit: /^[0-9a-f]{40}$/.exec(headers.get("x-repo-commit") ?? "")?.[0],
  };
}

function hintOf(status: number): string {
  if (status === 401 || status === 403) return " (no such model, or not public)";
  return status === 404 ? " (no such model, or it has no quantized ONNX weights)" : "";
}

async function isWhole(file: string, { bytes, sha256 }: About): Promise<boolean> {
  const size = (await stat(file).catch(() => undefined))?.size;
  if (size === undefined || (bytes !== undefined && size !== bytes)) return false;
  return sha256 === undefined || (await sha256Of(file)) === sha256;
}

async function fetchFile(
  url: string,
  target: string,
  about: About,
  { signal, onProgress }: PullOptions,
  file: string,
): Promise<void> {
  const part = `${target}.part`;
  // Without a hash nobody could tell whether the rest belongs to the half that is there.
  let from =
    about.sha256 === undefined ? 0 : ((await stat(part).catch(() => undefined))?.size ?? 0);
  if (about.bytes !== undefined && from > about.bytes) from = 0;
  if (about.bytes === undefined || from < about.bytes) {
    const stalled = new AbortController();
    const timer = setTimeout(() => stalled.abort(), STALL_MS);
    try {
      const headers = from > 0 ? { range: `bytes=${from}-` } : {};
      const both = AbortSignal.any([signal, stalled.signal]);
      const response = await request(url, { headers }, both);
      const { status, body } = response;
      if (body === null || (status !== 200 && status !== 206)) {
        throw new PullError(`${url} answered with status ${status}`);
      }
      if (status === 200) from = 0; // It does not resume.
      let bytes = from;
      const count = new Transform({
        transform(chunk: Buffer, _encoding, done) {
          timer.refresh();
          bytes += chunk.length;
          onProgress(file, bytes, about.bytes);
          done(null, chunk);
        },
      });
      const out = createWriteStream(part, { flags: from > 0 ? "a" : "w", flush: true });
      await pipeline(Readable.fromWeb(body as never), count, out);
    } catch (error) {
      if (error instanceof PullError) throw error;
      const why = stalled.signal.aborted
        ? `nothing came for ${STALL_MS / 1000} s`
        : reasonOf(error);
      throw new PullError(`${url} broke off: ${why}; the next pull goes on from there`);
    } finally {
      clearTimeout(timer);
    }
  }
  if (!(await isWhole(part, about))) {
    const size = (await stat(part).catch(() => undefined))?.size;
    // Too short: the connection ended early, and the next pull goes on. Else it is of no use.
    if (about.bytes === undefined || (size ?? 0) >= about.bytes) await rm(part, { force: true });
    throw new PullError(
      `${url} is not what the hub says it is (${size} bytes of ${about.bytes ?? "unknown"}, or another hash); pull again`,
    );
  }
  await rename(part, target);
}

type Asked = { method?: "HEAD"; redirect?: "manual"; headers?: Record<string, string> };

async function request(url: string, asked: Asked, signal: AbortSignal): Promise<Response> {
  // As it is: the size that a compressed answer states is not the file's.
  const headers = { ...asked.headers, "accept-encoding": "identity" };
  try {
    return await fetch(url, { ...asked, headers, signal });
  } catch (error) {
    throw new PullError(`${url} cannot be reached: ${reasonOf(error)}`);
  }
}

function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const { cause } = error;
  if (cause instanceof Error) return "code" in cause ? String(cause.code) : cause.message;
  return error.message;
}

async function sha256Of(file: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(file)) hash.update(chunk);
  return hash.digest("hex");
}

/** How @xenova/transformers names a model: the folder that holds it, and its name there. */
export function localName(folder: string): { root: string; name: string } {
  return { root: dirname(folder), name: basename(folder) };
}
