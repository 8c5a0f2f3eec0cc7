/**
 * Who an API key belongs to. Keys are held as SHA-256 only; a look-up hashes what the client sent, so that its
 * time says nothing about any key.
 */
import { hash } from "node:crypto";
import type { ErrorCode } from "../actors/errors.ts";
import type { Limits, Priority, SemanticPolicy } from "../actors/protocol.ts";
import { limitsOf, type Options } from "./options.ts";

export type Tenant = {
  tenant: string;
  /** Name of the key, for limits, metrics and logs; never the key. */
  limitKey: string;
  limits: Limits;
  /** Share in the fair queue, > 0. */
  weight: number;
  priority: Priority;
  /** Models the key may use; absent = all. */
  models?: readonly string[];
  /** How its questions are matched by meaning, where that differs from everyone's. */
  semantic?: TenantSemantic;
};

type TenantSemantic = Partial<Omit<SemanticPolicy, "mode">> & {
  mode?: SemanticPolicy["mode"] | "off";
};

export class KeyTable {
  readonly #byHash = new Map<string, Tenant>();
  /** Without any key everyone is this one; the listener is then bound to loopback. */
  readonly #local: Tenant | null;

  constructor(options: Options) {
    for (const key of options.keys) {
      this.#byHash.set(key.keySha256, {
        tenant: key.tenant,
        limitKey: key.name,
        limits: limitsOf(options, key),
        weight: key.weight,
        priority: key.priority,
        ...(key.models === undefined ? {} : { models: key.models }),
        semantic: semanticOf(key),
      });
    }
    this.#local =
      options.keys.length > 0
        ? null
        : {
            tenant: "local",
            limitKey: "local",
            limits: limitsOf(options),
            weight: 1,
            priority: "standard",
          };
  }

  authenticate(key: string | undefined): Tenant | ErrorCode {
    if (this.#local !== null) return this.#local;
    if (key === undefined || key === "") return "missing_key";
    return this.#byHash.get(hash("sha256", key, "hex")) ?? "invalid_key";
  }

  /** The first key of a tenant, for work done in its name (warm-up). */
  ofTenant(tenant: string): Tenant | undefined {
    if (this.#local?.tenant === tenant) return this.#local;
    for (const entry of this.#byHash.values()) if (entry.tenant === tenant) return entry;
    return undefined;
  }
}

function semanticOf({ semantic: { strict, ...rest } }: Options["keys"][number]): TenantSemantic {
  return { ...rest, ...(strict === undefined ? {} : { isStrict: strict }) };
}
