/**
 * A process that stands for a peer: its configuration comes as JSON in the first argument, its port goes out over
 * IPC, then what its links tell; it answers asks and does what IPC tells it.
 */
import { BenchPeer, type PeerConfig, snapshotOf } from "./remote-system.ts";

export type PeerCommand =
  | { do: "dial"; address: string }
  /** Sends that many to the other peer's echo, as fast as it can, and tells how many were not taken. */
  | { do: "flood"; peer: string; count: number }
  /** Sends a node's snapshot, made now, to the other peer's router. */
  | { do: "snapshot"; peer: string }
  | { do: "stats" }
  | { do: "stop echo" }
  | { do: "leave" };

const config = JSON.parse(process.argv[2] ?? "{}") as PeerConfig & { host?: string };
const { host = "127.0.0.1", ...rest } = config;
const peer = new BenchPeer(rest, (event) => {
  if (event.kind !== "peer.heartbeat") process.send?.({ event });
});
const port = await peer.mesh.listen(host, 0);

process.on("message", (command: PeerCommand) => {
  switch (command.do) {
    case "dial":
      return peer.mesh.dial(command.address);
    case "flood": {
      let refused = 0;
      for (let index = 0; index < command.count; index++) {
        const message = {
          kind: "gpu_node.progress",
          leaseId: `lease ${index}`,
          outputTokens: index,
        } as const;
        if (!peer.system.tell(peer.echo(command.peer), message)) refused++;
      }
      process.send?.({ refused });
      return;
    }
    case "snapshot": {
      const snapshot = snapshotOf("echo", performance.now());
      const router = peer.system.ref<{ kind: "router.node_changed"; snapshot: typeof snapshot }>(
        `${command.peer}/router`,
      );
      peer.system.tell(router, { kind: "router.node_changed", snapshot });
      return;
    }
    case "stats":
      process.send?.({
        stats: {
          metrics: peer.mesh.metrics(),
          told: peer.toldCount,
          letters: peer.system.stats().deadLetters,
          rssMiB: process.memoryUsage.rss() / 1024 / 1024,
        },
      });
      return;
    case "stop echo":
      peer.system.stop(peer.echo(config.id));
      return;
    case "leave":
      void peer.close(true).then(() => process.exit(0));
      return;
  }
});
process.on("disconnect", () => process.exit(0));
process.send?.({ port });
