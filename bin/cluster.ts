/** `headrace cluster`: the members, who looks after what, and the links, as one running peer sees them. */
import { Command } from "commander";
import type { ClusterDescription } from "../transport/cluster.ts";

const ANSWER_MS = 5000;

export function clusterCommand(): Command {
  const command = new Command("cluster")
    .description("show the peers of a running gateway, what each owns, and their links")
    .option("--url <url>", "of any peer", "http://127.0.0.1:8080")
    .option("--token <token>", "its admin.token (else HEADRACE_ADMIN_TOKEN)")
    .option("--json", "print what the peer says as it is");
  return command.action(() => show(command));
}

async function show(command: Command): Promise<void> {
  const { url, token, json } = command.opts<{ url: string; token?: string; json?: boolean }>();
  const fail = (text: string): never => command.error(`headrace cluster: ${text}`);
  if (!URL.canParse(url) || !/^https?:/.test(url))
    return fail(`--url ${JSON.stringify(url)} is no URL; accepted: http://host:port`);
  const secret = token ?? process.env.HEADRACE_ADMIN_TOKEN;
  if (secret === undefined)
    return fail("needs the peer's admin.token: --token, or HEADRACE_ADMIN_TOKEN");
  const response = await fetch(new URL("/admin/cluster", url), {
    headers: { authorization: `Bearer ${secret}` },
    signal: AbortSignal.timeout(ANSWER_MS),
  }).catch((error: Error) => {
    const { cause } = error as { cause?: { code?: string } };
    return fail(`${url} does not answer (${cause?.code ?? error.name})`);
  });
  const body = await response.text();
  if (!response.ok) return fail(`${url} answered ${response.status}: ${messageOf(body)}`);
  const out = command.configureOutput().writeOut;
  if (json === true) return out?.(`${body.trimEnd()}\n`);
  out?.(tablesOf(JSON.parse(body) as ClusterDescription));
}

function messageOf(body: string): string {
  try {
    return (JSON.parse(body) as { error: { message: string } }).error.message;
  } catch {
    return body.slice(0, 200);
  }
}

/** What the peer says, as tables for a person. */
export function tablesOf(cluster: ClusterDescription): string {
  const { self, epoch, members, buckets, nodes, links, limits } = cluster;
  const owned = new Map(buckets.map(({ peer, count }) => [peer, count]));
  const linkOf = new Map(links.links.map((link) => [link.peer, link]));
  const peers = members.map((member) => {
    const link = linkOf.get(member.id);
    const own = nodes.filter(({ peer }) => peer === member.id).map(({ node }) => node);
    return [
      member.isSelf ? `${member.id} *` : member.id,
      member.state,
      member.address,
      member.version,
      member.isSelf ? "-" : (link?.state ?? "none"),
      link?.rttMs === undefined ? "-" : `${link.rttMs.toFixed(1)} ms`,
      member.isSelf ? "-" : `${Math.round(member.silentMs)} ms`,
      `${Math.round(member.loopLagMs)} ms`,
      String(owned.get(member.id) ?? 0),
      own.length === 0 ? "-" : own.join(" "),
    ];
  });
  const heads = ["PEER", "STATE", "ADDRESS", "VERSION", "LINK", "RTT", "SILENT", "LAG"];
  const lines = [
    `${members.length} peers at epoch ${epoch}, as ${self} (*) sees them`,
    "",
    ...table([[...heads, "BUCKETS", "NODES"], ...peers]),
  ];
  const homeless = nodes.filter(({ peer }) => peer === undefined).map(({ node }) => node);
  if (homeless.length > 0) lines.push("", `looked after by nobody: ${homeless.join(" ")}`);
  if (limits !== undefined) {
    const { share, storeState, byStore, byOwner, byThisPeer, byShare, refusedUnreachable } = limits;
    lines.push(
      "",
      `limits: ${(100 * share).toFixed(0)} % on this side, store ${storeState}; decided by the store ${byStore}, ` +
        `another peer ${byOwner}, this one ${byThisPeer}, its share alone ${byShare}, ` +
        `refused for want of the owner ${refusedUnreachable}`,
    );
  }
  const refusals = Object.entries(links.refusals).map(([reason, count]) => `${reason} ${count}`);
  if (refusals.length > 0) lines.push(`handshakes refused: ${refusals.join(", ")}`);
  return `${lines.join("\n")}\n`;
}

function table(rows: readonly (readonly string[])[]): string[] {
  const widths = (rows[0] ?? []).map((_, column) =>
    Math.max(...rows.map((row) => row[column]?.length ?? 0)),
  );
  return rows.map((row) =>
    row
      .map((cell, column) => cell.padEnd(widths[column] ?? 0))
      .join("  ")
      .trimEnd(),
  );
}
