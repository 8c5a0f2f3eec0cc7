/**
 * A gateway (the configuration file is the first argument) that warms up whenever it is told "warm" over IPC, with what
 * `warmup.file` holds then, and tells what came of it.
 */
import { loadConfig } from "../../transport/config.ts";
import { createLog } from "../../transport/log.ts";
import { Server } from "../../transport/server.ts";

const { options } = await loadConfig({ file: process.argv[2] ?? "", env: {}, flags: [] });
const log = createLog(options.log.level, options.log.format);
const server = await Server.start(options, log, () => process.exit(1));
process.send?.({ kind: "listening", port: server.port });
process.on("message", (message) => {
  if (message !== "warm") return;
  void server.warmUp(() => {}).then((report) => process.send?.({ kind: "warmed", report }));
});
process.on("SIGTERM", () => void server.stop().then(() => process.exit(0)));
process.on("disconnect", () => process.exit(0)); // The process that forked it is gone.
