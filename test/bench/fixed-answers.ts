/**
 * What the stand-in of the benchmarks answers, whatever it is asked: one chat completion of 658 bytes, or a
 * stream of 21 events.
 */

export const MODEL = "llama-3.1-8b";

const WHOLE_BYTES = 658;
/** Events of a stream; the last one carries the finish. */
const STREAM_EVENTS = 21;

function whole(content: string): string {
  return JSON.stringify({
    id: "chatcmpl-bench0000000000000000001",
    object: "chat.completion",
    created: 1_700_000_000,
    model: MODEL,
    system_fingerprint: "bench",
    choices: [
      {
        index: 0,
        message: { role: "assistant", content, refusal: null },
        logprobs: null,
        finish_reason: "stop",
      },
    ],
    usage: { prompt_tokens: 24, completion_tokens: 80, total_tokens: 104 },
  });
}

/** Exactly 658 bytes, the size of the reference measurements. */
export const wholeAnswer: string = whole("x".repeat(WHOLE_BYTES - whole("").length));

/** What is written at each tick of a stream; the finish, the usage and [DONE] go out together. */
export function streamWrites(includeUsage: boolean): Buffer[] {
  const head = `data: {"id":"chatcmpl-bench1","object":"chat.completion.chunk","created":1700000000,"model":"${MODEL}",`;
  const choice = (delta: string, finish: string) =>
    `${head}"choices":[{"index":0,"delta":${delta},"logprobs":null,"finish_reason":${finish}}]}\n\n`;
  const writes = [choice('{"role":"assistant","content":"w0"}', "null")];
  for (let i = 1; i < STREAM_EVENTS - 1; i++)
    writes.push(choice(`{"content":" word${i}"}`, "null"));
  const usage = `"usage":{"prompt_tokens":24,"completion_tokens":20,"total_tokens":44}`;
  const usageEvent = includeUsage ? `${head}"choices":[],${usage}}\n\n` : "";
  writes.push(`${choice("{}", '"stop"')}${usageEvent}data: [DONE]\n\n`);
  return writes.map((text) => Buffer.from(text));
}
