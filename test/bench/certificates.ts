/** Certificates for peers, made for a test and thrown away: one authority, and one certificate for each name. */
import { execFileSync, spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { PeerTls } from "../../transport/peer-socket.ts";

/** Whether they can be made here. */
export const opensslAvailable = spawnSync("openssl", ["version"]).status === 0;

/** By name: what a peer of that name uses, all of the same authority, for "localhost" and 127.0.0.1. */
export function makeCertificates(...names: readonly string[]): Map<string, PeerTls> {
  const folder = mkdtempSync(join(tmpdir(), "headrace-tls-"));
  const openssl = (...args: string[]) =>
    execFileSync("openssl", args, { cwd: folder, stdio: "pipe" });
  const newKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
  const read = (name: string) => readFileSync(join(folder, name), "utf8");
  try {
    openssl(
      "req",
      "-x509",
      ...newKey,
      "-keyout",
      "ca.key",
      "-out",
      "ca.pem",
      "-days",
      "2",
      "-subj",
      "/CN=test",
    );
    const made = new Map<string, PeerTls>();
    for (const name of names) {
      openssl(
        "req",
        ...newKey,
        "-keyout",
        `${name}.key`,
        "-out",
        `${name}.csr`,
        "-subj",
        `/CN=${name}`,
      );
      writeFileSync(join(folder, "san.ext"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n");
      const signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"];
      openssl(
        "x509",
        "-req",
        "-in",
        `${name}.csr`,
        ...signing,
        "-extfile",
        "san.ext",
        "-out",
        `${name}.pem`,
      );
      made.set(name, {
        key: read(`${name}.key`),
        cert: read(`${name}.pem`),
        ca: read("ca.pem"),
        isMutual: true,
      });
    }
    return made;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
