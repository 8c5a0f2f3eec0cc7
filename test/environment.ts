/**
 * What the environment asks of the tests, read once; then no variable of Headrace is left, so that neither a shell's
 * settings nor those of CI reach the configuration that a test loads or a process that it starts.
 */
const { HEADRACE_REQUIRE_REDIS, HEADRACE_REDIS_8, HEADRACE_REDIS_SEARCH_URL } = process.env;

/** With HEADRACE_REQUIRE_REDIS=1 a missing redis-server is a failure, not a skip. */
export const requireRedis = HEADRACE_REQUIRE_REDIS === "1";

/** A redis-server of version 8 (`.ci/redis-8` prints its path); unset = the installed one, if it is as new. */
export const redis8Program = HEADRACE_REDIS_8;

/** A running Redis with RediSearch whose keys under `headrace-test:` may be written and removed. */
export const redisSearchUrl = HEADRACE_REDIS_SEARCH_URL;

for (const name of Object.keys(process.env)) {
  if (name.startsWith("HEADRACE_")) delete process.env[name];
}
