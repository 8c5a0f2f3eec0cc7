/**
 * What an actor file needs from the runtime: types, and two assertions.
 *
 * A behaviour is a synchronous class. It never awaits, reads no clock and draws no random number
 * but through `context`. Effects (tell, ask, reply, timers, watch, stop) are buffered during a turn
 * and released when `receive` returns; a turn that throws releases nothing.
 */
/**
 * A broken promise of our own code. In an actor it goes to the supervisor; never thrown for input.
 */
export class AssertionError extends Error {
    name = "AssertionError";
}
export function assert(condition, message) {
    if (!condition)
        throw new AssertionError(message);
}
/** Makes a `switch` over a union exhaustive: a forgotten case does not compile. */
export function unreachable(value) {
    throw new AssertionError(`unreachable: ${JSON.stringify(value)}`);
}
