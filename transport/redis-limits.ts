/**
 * What keys have used, in Redis: one place for all peers, so that their limits are exact over the cluster.
 *
 * One script checks all limits of a key and charges all or none, by Redis' own clock. It is actors/gcra.ts and the
 * order of actors/rate-limiter.ts over again, in whole nanoseconds (a test holds the two together): a limit of requests
 * and one of tokens a minute (GCRA, the instant kept from a base that moves along), requests and tokens in flight (a
 * sorted set by expiry, so that what a crashed peer held lapses), tokens a day (24 hours from their first use).
 *
 * Keys, both in one slot: `<prefix>v1:limit:{<hash of the key>}` (hash: rb, rt, tb, tt = base in ms and TAT in ns of
 * requests and tokens; de, dt = end and tokens of the day; rs = reserved tokens) and the same with `:open`. Both expire
 * when they say no more than a missing one would. Where Redis evicts them under want of memory, the key starts whole.
 *
 * Redis away, slow or hanging: the reply is `away` within `timeoutMs`, and the cluster limiter goes by the peers. What
 * Redis grants after that is given back. A Redis that fails over may lose what it had not replicated: so much, at most
 * a second's charges as a rule, can be granted twice.
 */
import { createHash } from "node:crypto";
import type { LimitCharge, LimitStoreCommand, LimitStoreReply } from "../actors/edges.ts";
import type { ErrorCode } from "../actors/errors.ts";
import { requestBurstOf, tokenBurstOf } from "../actors/limit-state.ts";
import type { LimitState, Limits } from "../actors/protocol.ts";
import { type Actor, type ReplyTo, unreachable } from "../runtime/actor.ts";
import { connectRedis, type RedisClient, type RedisPlace, RedisScript } from "./redis-link.ts";

type Reply = <R>(to: ReplyTo<R>, value: R) => void;
type Charge = Extract<LimitStoreCommand, { kind: "limits.charge" }>;
type Correct = Extract<LimitStoreCommand, { kind: "limits.correct" }>;

/** Counts since the start. */
export type RedisLimitsStats = {
  connected: boolean;
  granted: number;
  refused: number;
  /** Not asked, since there is no connection or too much is open. */
  away: number;
  /** No reply in time. */
  late: number;
  failed: number;
  correctionsLost: number;
};

export type RedisLimitsOptions = {
  redis: RedisPlace;
  /** How long a reply is waited for, ms: less than the cluster limiter waits. */
  timeoutMs: number;
};

/** Commands without a reply; more are answered `away`. */
const OPEN_MAX = 4096;
/** How soon a place in flight may be free again: nobody knows here how long requests take. */
const RETRY_INFLIGHT_MS = 1000;

/** By the script's first number. */
const CODES: readonly (ErrorCode | undefined)[] = [
  undefined,
  "request_too_large_for_limit",
  "rate_limit_requests",
  "rate_limit_tokens",
  "rate_limit_concurrency",
  "rate_limit_concurrent_tokens",
  "quota_tokens_per_day",
];

const SCRIPT = new RedisScript(`
local op, id, tokens, lifeMs = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local nowUs = time[1] * 1000000 + time[2]
local nowMs = math.floor(nowUs / 1000)
local SPAN, EXACT = 2592000000000000, 9007199254740991
local DAY, BASE_AGE = 86400000, 864000000
local kept = redis.call('HMGET', KEYS[1], 'rb', 'rt', 'tb', 'tt', 'de', 'dt', 'rs')
local function whole(n) return string.format('%.0f', n) end

local function bucket(limit, burst, base, tat)
  if limit == 0 then return nil end
  local b = { base = tonumber(base or nowMs), tat = tonumber(tat or 0) }
  local rest = math.fmod(60000000000, limit)
  local unit = (60000000000 - rest) / limit
  function b.span(cost)
    local part = cost * rest
    local partNs = math.ceil(part / limit)
    if part > EXACT then partNs = partNs + 1 end
    return math.min(SPAN, cost * unit + partNs)
  end
  local perUnit = unit + rest / limit
  b.burst = math.min(burst, math.floor(SPAN / perUnit))
  b.burstNs = b.span(b.burst)
  if nowMs - b.base > BASE_AGE then
    b.tat = b.tat - (nowMs - b.base) * 1000000
    b.base = nowMs
  end
  b.now = (nowUs - b.base * 1000) * 1000
  function b.waitUs(cost)
    if cost > b.burst then return -1 end
    local waitNs = math.max(b.now, b.tat) + b.span(cost) - b.burstNs - b.now
    if waitNs <= 0 then return 0 end
    return math.ceil(waitNs / 1000)
  end
  function b.charge(cost) b.tat = math.max(b.now, b.tat) + b.span(cost) end
  function b.settle(reservedNs, actual)
    local tat = b.tat + b.span(actual) - reservedNs
    b.tat = math.min(math.max(b.now, tat), b.now + SPAN)
  end
  function b.resetNs() return math.max(0, b.tat - b.now) end
  function b.remaining()
    local free = b.burstNs - b.resetNs()
    if free <= 0 then return 0 end
    local units = math.min(b.burst, math.floor(free / perUnit))
    while units > 0 and b.span(units) > free do units = units - 1 end
    while units < b.burst and b.span(units + 1) <= free do units = units + 1 end
    return units
  end
  return b
end

local requests = bucket(tonumber(ARGV[5]), tonumber(ARGV[6]), kept[1], kept[2])
local minute = bucket(tonumber(ARGV[7]), tonumber(ARGV[8]), kept[3], kept[4])
local concurrent, concurrentTokens = tonumber(ARGV[9]), tonumber(ARGV[10])
local perDay = tonumber(ARGV[11])
local dayEnd, dayTokens = tonumber(kept[5] or 0), tonumber(kept[6] or 0)
local reserved = tonumber(kept[7] or 0)
local counts = concurrent > 0 or concurrentTokens > 0
local member = whole(tokens) .. ' ' .. id

local function release(name)
  if redis.call('ZREM', KEYS[2], name) == 1 then
    reserved = math.max(0, reserved - tonumber(string.match(name, '^%d+')))
  end
end

local function save()
  local fields = {}
  local lastMs = nowMs
  local function keep(b, base, tat)
    if b == nil then return end
    for _, v in ipairs({ base, whole(b.base), tat, whole(b.tat) }) do fields[#fields + 1] = v end
    lastMs = math.max(lastMs, nowMs + math.ceil(b.resetNs() / 1000000))
  end
  keep(requests, 'rb', 'rt')
  keep(minute, 'tb', 'tt')
  if perDay > 0 then
    for _, v in ipairs({ 'de', whole(dayEnd), 'dt', whole(dayTokens) }) do fields[#fields + 1] = v end
    lastMs = math.max(lastMs, dayEnd)
  end
  local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')
  if last[2] then
    lastMs = math.max(lastMs, tonumber(last[2]))
    redis.call('PEXPIREAT', KEYS[2], whole(tonumber(last[2]) + 60000))
  else
    reserved = 0
  end
  fields[#fields + 1] = 'rs'
  fields[#fields + 1] = whole(reserved)
  redis.call('HSET', KEYS[1], unpack(fields))
  redis.call('PEXPIREAT', KEYS[1], whole(lastMs + 60000))
end

if op == 'correct' then
  local requestNs, tokensNs, day = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
  local used, isRefund = tonumber(ARGV[15]), ARGV[16] == '1'
  if requests and isRefund and requestNs >= 0 then requests.settle(requestNs, 0) end
  if minute and tokensNs >= 0 then minute.settle(tokensNs, used) end
  if day > 0 and day == dayEnd then dayTokens = math.max(0, dayTokens + used - tokens) end
  release(member)
  save()
  return {}
end

if counts then
  local lapsed = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', whole(nowMs), 'LIMIT', 0, 1000)
  for _, name in ipairs(lapsed) do release(name) end
end
local today = 0
if nowMs < dayEnd then today = dayTokens end
local inflight = counts and redis.call('ZCARD', KEYS[2]) or 0
local requestUs = requests and requests.waitUs(1) or 0
local tokensUs = minute and minute.waitUs(tokens) or 0
local code, waitUs = 0, 0
if tokensUs == -1 or (concurrentTokens > 0 and tokens > concurrentTokens)
  or (perDay > 0 and tokens > perDay) then
  code = 1
elseif requestUs ~= 0 then
  code, waitUs = 2, requestUs
elseif tokensUs > 0 then
  code, waitUs = 3, tokensUs
elseif concurrent > 0 and inflight >= concurrent then
  code = 4
elseif concurrentTokens > 0 and reserved + tokens > concurrentTokens then
  code = 5
elseif perDay > 0 and today + tokens > perDay then
  code, waitUs = 6, (dayEnd - nowMs) * 1000
end
local requestNs, tokensNs, day = -1, -1, 0
if code == 0 then
  if requests then
    requests.charge(1)
    requestNs = requests.span(1)
  end
  if minute then
    minute.charge(tokens)
    tokensNs = minute.span(tokens)
  end
  if perDay > 0 then
    if nowMs >= dayEnd then
      dayEnd = nowMs + DAY
      dayTokens = 0
    end
    day = dayEnd
    dayTokens = dayTokens + tokens
  end
  if counts and redis.call('ZADD', KEYS[2], whole(nowMs + lifeMs), member) == 1 then
    reserved = reserved + tokens
  end
  save()
end
local reply = { code, waitUs, requestNs, tokensNs, day, 0, 0, 0, 0, nowUs }
if requests then reply[6], reply[7] = requests.remaining(), requests.resetNs() end
if minute then reply[8], reply[9] = minute.remaining(), minute.resetNs() end
for i, v in ipairs(reply) do reply[i] = whole(v) end
return reply
`);

/** Starts connecting and returns; until Redis is there, it is `away`. */
export async function openRedisLimits(options: RedisLimitsOptions): Promise<RedisLimits> {
  return new RedisLimits(await connectRedis(options.redis), options);
}

/** One connection (or one per cluster node), its figures, and its edge. */
export class RedisLimits {
  readonly #client: RedisClient;
  readonly #options: RedisLimitsOptions;
  readonly #counts = { granted: 0, refused: 0, away: 0, late: 0, failed: 0, correctionsLost: 0 };
  #connected = false;
  #open = 0;

  constructor(client: RedisClient, options: RedisLimitsOptions) {
    this.#client = client;
    this.#options = options;
    client.on("ready", () => {
      this.#connected = true;
    });
    client.on("close", () => {
      this.#connected = false;
    });
    client.on("error", () => undefined); // "close" follows; the cache's connection tells the operator.
  }

  /** The actor; @param reply answers an ask from outside a turn. */
  edge(reply: Reply): Actor<LimitStoreCommand> {
    return {
      receive: (command) => {
        switch (command.kind) {
          case "limits.charge":
            return this.#charge(command, (answer) => reply(command.replyTo, answer));
          case "limits.correct":
            return this.#correct(command);
          default:
            return unreachable(command);
        }
      },
    };
  }

  stats(): RedisLimitsStats {
    return { connected: this.#connected, ...this.#counts };
  }

  /** Leaves no handle. */
  close(): void {
    this.#connected = false;
    this.#client.disconnect();
  }

  #charge(command: Charge, answer: (reply: LimitStoreReply) => void): void {
    if (!this.#connected || this.#open >= OPEN_MAX) {
      this.#counts.away++;
      return answer({ kind: "away" });
    }
    let isOpen = true;
    const timer = setTimeout(() => {
      isOpen = false;
      this.#counts.late++;
      answer({ kind: "away" });
    }, this.#options.timeoutMs);
    const end = (value: unknown): void => {
      this.#open--;
      clearTimeout(timer);
      const reply = readReply(value, command);
      if (!isOpen) {
        // Somebody else has decided by now.
        if (reply?.kind === "granted") this.#giveBack(command, reply.charge);
        return;
      }
      isOpen = false;
      if (reply === undefined) this.#counts.failed++;
      else this.#counts[reply.kind]++;
      answer(reply ?? { kind: "away" });
    };
    this.#open++;
    this.#run(command, "charge", command.tokens, command.expiresInMs, []).then(end, () =>
      end(null),
    );
  }

  #correct(command: Correct): void {
    if (!this.#connected || this.#open >= OPEN_MAX) {
      this.#counts.correctionsLost++; // The estimate stands; a place in flight lapses.
      return;
    }
    const { charge, usedTokens, refund } = command;
    const { tokens, requestNs, tokensNs, day } = charge;
    this.#open++;
    const used = refund ? 0 : usedTokens;
    this.#run(command, "correct", tokens, 0, [requestNs, tokensNs, day, used, refund ? 1 : 0]).then(
      () => {
        this.#open--;
      },
      () => {
        this.#open--;
        this.#counts.correctionsLost++;
      },
    );
  }

  #giveBack({ key, limits, requestId }: Charge, charge: LimitCharge): void {
    const kind = "limits.correct";
    this.#correct({ kind, key, limits, requestId, charge, usedTokens: 0, refund: true });
  }

  #run(
    { key, limits, requestId }: { key: string; limits: Limits; requestId: string },
    op: "charge" | "correct",
    tokens: number,
    lifeMs: number,
    more: readonly number[],
  ): Promise<unknown> {
    const name = `${this.#options.redis.keyPrefix}v1:limit:{${nameOf(key)}}`;
    const numbers = [tokens, Math.ceil(lifeMs), ...limitNumbers(limits), ...more];
    return SCRIPT.run(this.#client, [name, `${name}:open`], [op, requestId, ...numbers]);
  }
}

/** Names of keys stay private. */
function nameOf(key: string): string {
  return createHash("sha256").update(key, "utf8").digest("hex").slice(0, 32);
}

/** 0 = no such limit. */
function limitNumbers(limits: Limits): number[] {
  return [
    limits.requestsPerMinute ?? 0,
    requestBurstOf(limits) ?? 0,
    limits.tokensPerMinute ?? 0,
    tokenBurstOf(limits) ?? 0,
    limits.concurrent ?? 0,
    limits.concurrentTokens ?? 0,
    limits.tokensPerDay ?? 0,
  ];
}

/** Undefined for what the script never returns: a proxy's or another program's. */
function readReply(value: unknown, { limits, tokens }: Charge): LimitStoreReply | undefined {
  if (!Array.isArray(value) || value.length !== 10) return undefined;
  const numbers = value.map(Number);
  if (!numbers.every(Number.isFinite)) return undefined;
  const [code = 0, waitUs = 0, requestNs = 0, tokensNs = 0, day = 0] = numbers;
  const [requestsLeft = 0, requestsNs = 0, tokensLeft = 0, minuteNs = 0, nowUs = 0] =
    numbers.slice(5);
  const { requestsPerMinute, tokensPerMinute } = limits;
  const part = (limit: number, remaining: number, resetNs: number) => ({
    limit,
    remaining,
    resetMs: resetNs / 1e6,
  });
  const state: LimitState = { atMs: nowUs / 1000 };
  if (requestsPerMinute !== undefined)
    state.requests = part(requestsPerMinute, requestsLeft, requestsNs);
  if (tokensPerMinute !== undefined) state.tokens = part(tokensPerMinute, tokensLeft, minuteNs);
  if (code === 0) return { kind: "granted", charge: { tokens, requestNs, tokensNs, day }, state };
  const reason = CODES[code];
  if (reason === undefined) return undefined;
  const isInflight =
    reason === "rate_limit_concurrency" || reason === "rate_limit_concurrent_tokens";
  const retryAfterMs = isInflight ? RETRY_INFLIGHT_MS : waitUs / 1000;
  return { kind: "refused", code: reason, retryAfterMs, state };
}
