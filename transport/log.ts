/**
 * The log. Lines are facts with names; prompts, answers and keys never reach it. The only importer of pino.
 */
import { pino } from "pino";

export type LogLevel = "trace" | "debug" | "info" | "warn" | "error" | "silent";

export interface Log {
  debug(fields: object, text: string): void;
  info(fields: object, text: string): void;
  warn(fields: object, text: string): void;
  error(fields: object, text: string): void;
  setLevel(level: LogLevel): void;
}

/** Writes to standard error: JSON lines, or text for a person. */
export function createLog(level: LogLevel, format: "json" | "text"): Log {
  const logger =
    format === "json"
      ? pino({ level, base: null, timestamp: pino.stdTimeFunctions.isoTime }, pino.destination(2))
      : pino({ level, base: null }, { write: (line) => process.stderr.write(textLine(line)) });
  return {
    debug: (fields, text) => logger.debug(fields, text),
    info: (fields, text) => logger.info(fields, text),
    warn: (fields, text) => logger.warn(fields, text),
    error: (fields, text) => logger.error(fields, text),
    setLevel: (next) => {
      logger.level = next;
    },
  };
}

const levelNames: Readonly<Record<number, string>> = {
  10: "trace",
  20: "debug",
  30: "info ",
  40: "warn ",
  50: "error",
};

function textLine(json: string): string {
  const { level, time, msg, ...fields } = JSON.parse(json);
  const clock = new Date(time).toISOString().slice(11, 23);
  const rest = Object.entries(fields)
    .map(([name, value]) => ` ${name}=${typeof value === "string" ? value : JSON.stringify(value)}`)
    .join("");
  return `${clock} ${levelNames[level] ?? level} ${msg}${rest}\n`;
}
