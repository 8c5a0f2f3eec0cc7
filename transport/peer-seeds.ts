/**
 * How a place where peers may be is written (peer-discovery.ts says what each form means). Pure: the options check what a
 * user gives by it.
 */

/** One such place, read. */
export type Seed =
  | { kind: "address"; address: string }
  | { kind: "hosts"; scheme: "ws" | "wss"; name: string; port: number }
  | { kind: "services"; scheme: "ws" | "wss"; name: string };

/** What is wrong with a seed, or undefined: for the option's check. */
export function wrongSeed(text: string): string | undefined {
  const seed = readSeed(text);
  return typeof seed === "string" ? seed : undefined;
}

/** The seed, or what is wrong with the text. */
export function readSeed(text: string): Seed | string {
  const parts = /^(wss?|dnss?|srvs?):\/\/(\[[0-9a-fA-F:.]+\]|[^\s/:?#@[\]]+)(?::(\d{1,5}))?$/.exec(
    text,
  );
  if (parts === null)
    return "is not ws://host:port, wss://host:port, dns://name:port or srv://name";
  const [, kind = "", name = "", digits] = parts;
  const scheme = kind === "wss" || kind === "dnss" || kind === "srvs" ? "wss" : "ws";
  if (kind.startsWith("srv"))
    return digits === undefined
      ? { kind: "services", scheme, name }
      : "has a port, but an SRV record says which";
  const port = Number(digits ?? 0);
  if (port < 1 || port > 65_535) return "has no port from 1 to 65535";
  if (kind.startsWith("dns")) return { kind: "hosts", scheme, name, port };
  return { kind: "address", address: `${scheme}://${name}:${port}` };
}
