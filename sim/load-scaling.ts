/**
 * A load made from another one: as another day like it would have been, with more or fewer users, with a burst.
 *
 * All draw whole requests with their neighbours in time, never lengths and gaps apart, so that what belongs
 * together (long prompts with short answers, bursts with their kind of request) stays together.
 *
 * Another day is the local block bootstrap: time is cut into blocks, and each block is replaced by one drawn from
 * the two before it, itself and the two after it. Drift and daily cycle stay, bursts stay whole, and the spread
 * over draws is the spread of the load, which runs of one recorded trace with other seeds do not have.
 *
 * Pure; requests come in and go out in order of arrival, from 0.
 */
import type { Random } from "../runtime/random.ts";
import { chainHash, type TraceRequest } from "./trace-rows.ts";

/** Blocks hold about so many requests, last at least so long, and are at least so many. */
const BLOCK_REQUESTS = 50;
const BLOCK_US_MIN = 10_000_000;
const BLOCKS_MIN = 50;
/** Blocks on either side that one may be drawn from. */
const NEIGHBOURS = 2;

/** The same load on another day. Of one draw, a block drawn twice is of other users the second time. */
export function resampledLoad(load: readonly TraceRequest[], random: Random): TraceRequest[] {
  return draw(load, random, "");
}

/** Length of the blocks of a bootstrap of this load, µs. */
export function blockUsOf(load: readonly TraceRequest[]): number {
  const durationUs = load.at(-1)?.atUs ?? 0;
  const wanted = (durationUs / Math.max(1, load.length)) * BLOCK_REQUESTS;
  return Math.max(1, Math.round(Math.min(Math.max(wanted, BLOCK_US_MIN), durationUs / BLOCKS_MIN)));
}

function draw(load: readonly TraceRequest[], random: Random, name: string): TraceRequest[] {
  const blockUs = blockUsOf(load);
  const blocks: TraceRequest[][] = [];
  for (const request of load) {
    const index = Math.floor(request.atUs / blockUs);
    while (blocks.length <= index) blocks.push([]);
    blocks[index]?.push(request);
  }
  const times = new Map<number, number>();
  const drawn: TraceRequest[] = [];
  for (let to = 0; to < blocks.length; to++) {
    const from = inside(to + random.int(2 * NEIGHBOURS + 1) - NEIGHBOURS, blocks.length);
    const seen = times.get(from) ?? 0;
    times.set(from, seen + 1);
    const users = seen === 0 ? name : `${name}.${seen}`;
    for (const request of blocks[from] ?? []) {
      drawn.push(ofUsers(request, request.atUs + (to - from) * blockUs, users));
    }
  }
  // The last block may be partial; what a whole one in its place would bring later is cut off.
  const endUs = load.at(-1)?.atUs ?? 0;
  return drawn.filter((request) => request.atUs <= endUs);
}

function inside(index: number, length: number): number {
  if (index < 0) return -index;
  return index >= length ? 2 * (length - 1) - index : index;
}

/**
 * `factor` times the users, 0 < factor: more are further draws of the load (other users, other texts), fewer are a
 * random part of its sessions. Loads of two factors with the same `random` are nested: the smaller is part of the
 * larger, so that a search over the factor does not chase noise.
 */
export function grownLoad(
  load: readonly TraceRequest[],
  factor: number,
  random: Random,
): TraceRequest[] {
  const parts: TraceRequest[][] = [thinned(load, Math.min(1, factor), random.split("share 0"))];
  for (let copy = 1; copy < factor; copy++) {
    const users = draw(load, random.split(`users ${copy}`), `+${copy}`);
    parts.push(thinned(users, Math.min(1, factor - copy), random.split(`share ${copy}`)));
  }
  return inOrder(parts.flat());
}

/** Each session (each request without one) stays with probability `share`. */
function thinned(load: readonly TraceRequest[], share: number, random: Random): TraceRequest[] {
  if (share >= 1) return load.slice();
  const sessions = new Map<string, number>();
  return load.filter((request) => {
    if (request.session === undefined) return random.next() < share;
    const mark = sessions.get(request.session) ?? random.next();
    sessions.set(request.session, mark);
    return mark < share;
  });
}

/** The load with `factor` times (whole, ≥ 2) the requests in [fromUs, toUs). */
export function burstLoad(
  load: readonly TraceRequest[],
  factor: number,
  fromUs: number,
  toUs: number,
  random: Random,
): TraceRequest[] {
  const all = load.slice();
  for (let copy = 1; copy < factor; copy++) {
    const users = draw(load, random.split(`burst ${copy}`), `!${copy}`);
    for (const request of users) {
      if (request.atUs >= fromUs && request.atUs < toUs) all.push(request);
    }
  }
  return inOrder(all);
}

/** The same requests in 1 ÷ factor of the time. */
export function compressedLoad(load: readonly TraceRequest[], factor: number): TraceRequest[] {
  return load.map((request) => ({ ...request, atUs: Math.round(request.atUs / factor) }));
}

function inOrder(load: TraceRequest[]): TraceRequest[] {
  return load.sort((left, right) => left.atUs - right.atUs);
}

/** The request at another time and, unless `users` is empty, of other users with other texts. */
function ofUsers(request: TraceRequest, atUs: number, users: string): TraceRequest {
  const moved: TraceRequest = { ...request, atUs };
  if (users === "") return moved;
  if (request.session !== undefined) moved.session = `${request.session}${users}`;
  if (request.question !== undefined) moved.question = `${request.question}${users}`;
  if (request.cluster !== undefined) moved.cluster = `${request.cluster}${users}`;
  if (request.prefix !== undefined) {
    const salt = hashOf(users);
    moved.prefix = request.prefix.map((id) => chainHash(salt, id));
  }
  return moved;
}

function hashOf(text: string): number {
  let hash = 1;
  for (let index = 0; index < text.length; index++) hash = chainHash(hash, text.charCodeAt(index));
  return hash;
}
