/**
 * What the environment asks of the tests, read once; then no variable of Headrace is left, so that neither a shell's
 * settings nor those of CI reach the configuration that a test loads or a process that it starts.
 */
const { HEADRACE_REQUIRE_REDIS } = process.env;

/** With HEADRACE_REQUIRE_REDIS=1 a missing redis-server is a failure, not a skip. */
export const requireRedis = HEADRACE_REQUIRE_REDIS === "1";

for (const name of Object.keys(process.env)) {
  if (name.startsWith("HEADRACE_")) delete process.env[name];
}
