/**
 * What does it cost to ask an actor of another process?
 *
 * Round trips per second over loopback between two processes, 64 at a time (batched) and one at a time (single): two
 * peers with all that belongs to an ask (runtime on both sides, mesh, checks), beside one raw TCP socket with the
 * same framing and messages of the same size, beside that socket with the same codec, and beside the distribution of
 * Erlang, where it is installed. Ratios are taken within a round, in turns; the figure is the median.
 */
import { execFileSync, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { makeCertificates, opensslAvailable } from "./certificates.ts";
import { messageBytes, type RawContent, rawAsks } from "./remote-raw.ts";
import { BenchPeer, type PeerConfig } from "./remote-system.ts";
import { medianOf, type Row } from "./report.ts";
import { cpuMs, type Running, Stack } from "./stack.ts";

export type RemotePace = { rounds: number; batchedAsks: number; singleAsks: number };

const BATCHED = 64;
const SECRET = "the secret of the benchmark";

type Subject = {
  name: string;
  ask: (asks: number, inflight: number) => Promise<void>;
  other: Running;
};
type Round = { perSecond: number; cpuUs: number };

async function measure({ ask, other }: Subject, asks: number, inflight: number): Promise<Round> {
  await ask(Math.ceil(asks / 10), inflight);
  const before = { cpu: process.cpuUsage(), other: cpuMs(other), atMs: performance.now() };
  await ask(asks, inflight);
  const ms = performance.now() - before.atMs;
  const { user, system } = process.cpuUsage(before.cpu);
  const cpuUs = user + system + (cpuMs(other) - before.other) * 1000;
  return { perSecond: (asks * 1000) / ms, cpuUs: cpuUs / asks };
}

/** A pair of peers: one here, one in a process of its own. */
async function peers(
  stack: Stack,
  more: Partial<PeerConfig>,
  other: Partial<PeerConfig>,
): Promise<Subject & { end: () => Promise<void> }> {
  const config = { incarnation: 1, secret: SECRET };
  const running = await stack.script("remote-peer", [
    JSON.stringify({ id: "b", ...config, ...other }),
  ]);
  const peer = await new Promise<BenchPeer>((resolve, reject) => {
    const made = new BenchPeer({ id: "a", ...config, ...more }, (event) => {
      if (event.kind === "peer.up") resolve(made);
      if (event.kind === "peer.refused") reject(new Error(`${event.reason}: ${event.detail}`));
    });
    made.mesh.dial(`${more.tls === undefined ? "ws" : "wss"}://127.0.0.1:${running.port}`);
  });
  return {
    name: "peers",
    other: running,
    ask: async (asks, inflight) => {
      await peer.ask("b", asks, inflight);
      const [failure] = peer.failures;
      if (failure !== undefined) throw new Error(`${peer.failures.length} asks failed: ${failure}`);
    },
    end: () => peer.close(true),
  };
}

async function raw(stack: Stack, content: RawContent): Promise<Subject> {
  const other = await stack.script("remote-raw", [JSON.stringify(content)]);
  return {
    name: `raw ${content.content}`,
    other,
    ask: (asks, inflight) => rawAsks(other.port, content, asks, inflight),
  };
}

/** The rows, in the order of the bars. */
export async function benchRemote(pace: RemotePace): Promise<Row[]> {
  const stack = new Stack();
  const rows: Row[] = [];
  try {
    const sizes = messageBytes();
    const plain = await peers(stack, {}, {});
    const bytes = await raw(stack, { content: "bytes", ...sizes });
    const codec = await raw(stack, { content: "codec", ...sizes });
    const subjects: Subject[] = [plain, bytes, codec];
    const ends = [plain.end];
    if (opensslAvailable) {
      const certificates = makeCertificates("a", "b");
      const [a, b] = [certificates.get("a"), certificates.get("b")];
      const secured = await peers(
        stack,
        a === undefined ? {} : { tls: a },
        b === undefined ? {} : { tls: b },
      );
      subjects.push({ ...secured, name: "tls" });
      ends.push(secured.end);
    } else console.log("skipped: asks with mutual TLS; openssl is not installed");
    const size = `messages of ${sizes.requestBytes} and ${sizes.replyBytes} bytes`;
    const batched = await rounds(subjects, pace.rounds, pace.batchedAsks, BATCHED);
    const single = await rounds(subjects, pace.rounds, pace.singleAsks, 1);
    rows.push(
      ratioRow(
        "remote ask, 64 in flight ÷ raw socket, same framing",
        batched,
        "peers",
        "raw bytes",
        0.6,
        size,
      ),
      ratioRow(
        "remote ask, 64 in flight ÷ raw socket with the same codec",
        batched,
        "peers",
        "raw codec",
      ),
      ratioRow(
        "remote ask, one at a time ÷ raw socket, same framing",
        single,
        "peers",
        "raw bytes",
      ),
    );
    if (opensslAvailable) {
      rows.push(
        ratioRow("remote ask with mutual TLS, 64 in flight ÷ without", batched, "tls", "peers"),
        ratioRow("remote ask with mutual TLS, one at a time ÷ without", single, "tls", "peers"),
      );
    }
    for (const end of ends) await end();
    const perSecond = medianOf((batched.get("peers") ?? []).map((round) => round.perSecond));
    const erlang = await erlangPerSecond(pace.batchedAsks, BATCHED, pace.rounds);
    if (erlang === undefined) {
      console.log(
        "skipped: Erlang's distribution; erl and erlc are not installed (apt-get install erlang-base)",
      );
    } else {
      rows.push({
        name: "remote",
        question: "Round trips/s, remote ask, 64 in flight ÷ Erlang distribution",
        figure: `${(perSecond / erlang).toFixed(2)} ×`,
        value: perSecond / erlang,
        bar: { atLeast: 3 },
        detail: `peers ${thousands(perSecond)}/s; Erlang ${thousands(erlang)}/s (two nodes, one scheduler each, send and receive, term of about 250 bytes)`,
      });
    }
  } finally {
    await stack.endAll();
  }
  return rows;
}

async function rounds(
  subjects: readonly Subject[],
  count: number,
  asks: number,
  inflight: number,
): Promise<Map<string, Round[]>> {
  const measured = new Map<string, Round[]>(subjects.map(({ name }) => [name, []]));
  for (let round = 0; round < count; round++) {
    const order = round % 2 === 0 ? subjects : [...subjects].reverse();
    for (const subject of order) {
      measured.get(subject.name)?.push(await measure(subject, asks, inflight));
      await sleep(50);
    }
  }
  return measured;
}

function ratioRow(
  question: string,
  measured: ReadonlyMap<string, readonly Round[]>,
  over: string,
  under: string,
  atLeast?: number,
  more = "",
): Row {
  const [top, base] = [measured.get(over) ?? [], measured.get(under) ?? []];
  const ratios = top.map(
    ({ perSecond }, index) => perSecond / (base[index]?.perSecond ?? Number.NaN),
  );
  const value = medianOf(ratios);
  const side = (name: string, all: readonly Round[]) =>
    `${name} ${thousands(medianOf(all.map(({ perSecond }) => perSecond)))}/s, ` +
    `${medianOf(all.map(({ cpuUs }) => cpuUs)).toFixed(1)} µs CPU`;
  const spread = `rounds ${Math.min(...ratios).toFixed(2)} to ${Math.max(...ratios).toFixed(2)}`;
  return {
    name: "remote",
    question: `Round trips/s, ${question}`,
    figure: `${value.toFixed(2)} ×`,
    value,
    ...(atLeast === undefined ? {} : { bar: { atLeast } }),
    detail: [side(over, top), side(under, base), spread, ...(more === "" ? [] : [more])].join("; "),
  };
}

function thousands(perSecond: number): string {
  return perSecond >= 10_000 ? `${(perSecond / 1000).toFixed(0)}k` : perSecond.toFixed(0);
}

// ---- Erlang -------------------------------------------------------------------------------------------------

const ERLANG = `
-module(echo).
-export([serve/0, ask/1]).
serve() -> register(echo, self()), io:format("ready~n"), loop().
loop() -> receive {From, Ref, Term} -> From ! {Ref, Term}, loop() end.
ask([Asks, Inflight]) ->
  Each = list_to_integer(Asks) div list_to_integer(Inflight),
  true = net_kernel:connect_node('echo_b@127.0.0.1'),
  Term = {acquire, list_to_binary(lists:duplicate(200, $x)), 1, 2, 3, {a, b}},
  run(Each div 10, list_to_integer(Inflight), Term),
  Start = erlang:monotonic_time(microsecond),
  run(Each, list_to_integer(Inflight), Term),
  Us = erlang:monotonic_time(microsecond) - Start,
  io:format("~w~n", [Each * list_to_integer(Inflight) * 1000000 / Us]),
  init:stop().
run(Each, Inflight, Term) ->
  Self = self(),
  Pids = [spawn_link(fun() -> asker(Each, Term), Self ! {done, self()} end) || _ <- lists:seq(1, Inflight)],
  [receive {done, Pid} -> ok end || Pid <- Pids].
asker(0, _) -> ok;
asker(N, Term) ->
  Ref = make_ref(),
  {echo, 'echo_b@127.0.0.1'} ! {self(), Ref, Term},
  receive {Ref, _} -> asker(N - 1, Term) end.
`;

/** Median of the rounds; undefined where Erlang is not installed. Leaves no process behind. */
async function erlangPerSecond(
  asks: number,
  inflight: number,
  count: number,
): Promise<number | undefined> {
  if (spawnSync("erlc", ["-help"]).error !== undefined) return undefined;
  const folder = mkdtempSync(join(tmpdir(), "headrace-erl-"));
  const port = await freePort();
  const env = {
    ...process.env,
    ERL_EPMD_PORT: String(port),
    HOME: folder,
    ERL_EPMD_ADDRESS: "127.0.0.1",
  };
  const flags = (name: string) => [
    ...["-noinput", "-name", `${name}@127.0.0.1`, "-setcookie", "bench", "-start_epmd", "false"],
    ...["+S", "1:1", "-kernel", "inet_dist_use_interface", "{127,0,0,1}"],
  ];
  const epmd = spawn("epmd", ["-port", String(port)], { env, stdio: "ignore" });
  const children = [epmd];
  try {
    writeFileSync(join(folder, "echo.erl"), ERLANG);
    execFileSync("erlc", ["echo.erl"], { cwd: folder });
    await sleep(500);
    const server = spawn("erl", [...flags("echo_b"), "-run", "echo", "serve"], {
      cwd: folder,
      env,
      stdio: ["ignore", "pipe", "ignore"],
    });
    children.push(server);
    await once(server.stdout, "data");
    const measured: number[] = [];
    for (let round = 0; round < count; round++) {
      const args = [...flags("echo_a"), "-run", "echo", "ask", String(asks), String(inflight)];
      measured.push(
        Number(execFileSync("erl", args, { cwd: folder, env, timeout: 120_000 }).toString()),
      );
    }
    return medianOf(measured);
  } finally {
    for (const child of children.reverse()) {
      if (child.exitCode !== null || child.signalCode !== null) continue;
      const exited = once(child, "exit");
      child.kill("SIGKILL");
      await exited;
    }
    rmSync(folder, { recursive: true, force: true });
  }
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const address = server.address();
  server.close();
  await once(server, "close");
  return typeof address === "object" && address !== null ? address.port : 0;
}
