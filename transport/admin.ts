/**
 * The operator's routes under `/admin/`: off unless a token is configured, and then only with it.
 *
 *   GET    /admin/nodes                  every node with all its state
 *   POST   /admin/nodes                  add one: {"url": …, "name"?: …, …} as in the configuration
 *   DELETE /admin/nodes/NAME             drain it, then remove it
 *   POST   /admin/nodes/NAME/drain       no new requests
 *   POST   /admin/nodes/NAME/undrain
 *   GET    /admin/cluster                members, who owns what, links: as this peer sees them
 *   GET    /admin/state                  all actors: router, queue, cache, limits, mailboxes
 *   GET    /admin/explain/REQUEST_ID     why a request went as it did
 *   DELETE /admin/cache[?tenant=NAME]    purge one tenant's entries, or all
 *   GET    /admin/cache?tenant=NAME[&text=…][&scope=…][&count=20]   stored questions, and how they compare with a text
 *   DELETE /admin/cache/ENTRY?tenant=NAME                 remove one for good
 *
 * In a cluster, adding and removing a node is for the peer that is asked: do it on each (or change the configuration
 * and reload all). Draining reaches the node's one actor, so it is for all.
 */
import { hash, timingSafeEqual } from "node:crypto";
import type { ErrorCode } from "../actors/errors.ts";
import { ConfigError } from "./config.ts";
import { errorBody, httpErrors } from "./http-errors.ts";
import type { Gateway } from "./main.ts";

export type AdminAnswer = { status: number; body: unknown };

export class Admin {
  readonly #gateway: Gateway;

  constructor(gateway: Gateway) {
    this.#gateway = gateway;
  }

  /** Never rejects: what goes wrong is an answer. */
  async handle(
    method: string,
    path: string,
    query: string,
    authorization: string | undefined,
    body: Buffer,
  ): Promise<AdminAnswer> {
    const token = this.#gateway.options.admin.token;
    if (token === undefined) return refusal("admin_disabled");
    const given = /^bearer (.+)$/i.exec(authorization ?? "")?.[1] ?? "";
    const matches = timingSafeEqual(
      Buffer.from(hash("sha256", given, "hex")),
      Buffer.from(hash("sha256", token, "hex")),
    );
    if (!matches) return refusal("admin_forbidden");
    try {
      return await this.#route(method, path.slice("/admin/".length).split("/"), query, body);
    } catch (error) {
      if (error instanceof URIError) {
        return refusal("invalid_request", "the name in the path is not percent-encoded UTF-8");
      }
      if (error instanceof ConfigError || error instanceof SyntaxError) {
        return refusal("invalid_request", error.message);
      }
      return refusal("internal", String(error)); // An operator's call must not end the process.
    }
  }

  async #route(method: string, parts: string[], query: string, body: Buffer): Promise<AdminAnswer> {
    const [what, encodedName, verb] = parts;
    const name = encodedName === undefined ? undefined : decodeURIComponent(encodedName);
    const call = `${method} ${what}${name === undefined ? "" : "/…"}${verb === undefined ? "" : `/${verb}`}`;
    switch (call) {
      case "GET nodes":
        return { status: 200, body: { nodes: (await this.#gateway.state()).nodes } };
      case "POST nodes":
        return {
          status: 201,
          body: { added: this.#gateway.addNode(JSON.parse(body.toString("utf8"))) },
        };
      case "GET cluster": {
        const cluster = await this.#gateway.cluster();
        if (cluster !== undefined) return { status: 200, body: cluster };
        return refusal("not_found", "this process is no peer of a cluster");
      }
      case "GET state":
        return { status: 200, body: await this.#gateway.state() };
      case "DELETE cache": {
        const tenant = new URLSearchParams(query).get("tenant") ?? undefined;
        return { status: 200, body: { removed: await this.#gateway.purge(tenant) } };
      }
      case "GET cache": {
        const wanted = new URLSearchParams(query);
        const tenant = wanted.get("tenant");
        const count = Number(wanted.get("count") ?? 20);
        if (tenant === null || !(Number.isInteger(count) && count >= 1 && count <= 1000)) {
          const message = "name a tenant, and a count from 1 to 1000: ?tenant=acme&count=20";
          return refusal("invalid_request", message);
        }
        const only: { text?: string; scope?: string } = {};
        for (const name of ["text", "scope"] as const) {
          const value = wanted.get(name);
          if (value !== null) only[name] = value;
        }
        return { status: 200, body: await this.#gateway.inspect(tenant, count, only) };
      }
      case "DELETE cache/…": {
        const tenant = new URLSearchParams(query).get("tenant") ?? "";
        const removed = await this.#gateway.feedback(name ?? "", tenant, false);
        if (removed) return { status: 200, body: { removed: 1 } };
        return refusal("not_found", "that tenant has no stored question of that id");
      }
      case "GET explain/…": {
        const explanation = this.#gateway.explain(name ?? "");
        if (explanation !== undefined) return { status: 200, body: explanation };
        return refusal("not_found", "no request of that id is among the last 1000 that ended");
      }
      case "DELETE nodes/…":
      case "POST nodes/…/drain":
      case "POST nodes/…/undrain":
        return this.#node(
          name ?? "",
          method === "DELETE" ? "remove" : (verb as "drain" | "undrain"),
        );
      default:
        return refusal("not_found", "there is no such admin route");
    }
  }

  #node(name: string, action: "remove" | "drain" | "undrain"): AdminAnswer {
    if (!this.#gateway.hasNode(name)) {
      const known = this.#gateway.nodeNames().join(", ");
      return refusal("not_found", `there is no node of that name; nodes: ${known}`);
    }
    if (action === "remove") void this.#gateway.removeNode(name);
    else this.#gateway.drainNode(name, action === "drain");
    return { status: 202, body: { node: name, action } };
  }
}

function refusal(code: ErrorCode, message?: string): AdminAnswer {
  return { status: httpErrors[code].status, body: errorBody(code, message) };
}
