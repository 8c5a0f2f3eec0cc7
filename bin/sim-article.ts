/**
 * `headrace sim article`: the figures of the article that Headrace began with, beside those of this very release
 * under one made-up workload.
 *
 * The tables go to standard output, progress to standard error. Ends with 0; 2 for bad input; 130 when stopped by ^C.
 */
import { Command } from "commander";
import { articleReport, formatArticle } from "../sim/article.ts";
import { endWithTwo, FlagError, writeFlagFile } from "./flag-values.ts";

type Flags = { seed: string; json?: string };

export function articleCommand(): Command {
  return endWithTwo(new Command("article"))
    .description("the article's two tables, its figures beside ours (about a minute)")
    .option("--seed <text>", "the same seed gives the same figures", "1")
    .option("--json <file>", "write the report there as well")
    .action(run);
}

function run(flags: Flags, command: Command): void {
  const onRun = (name: string) => console.error(`running: ${name}`);
  try {
    const report = articleReport({ seed: flags.seed, onRun });
    process.stdout.write(formatArticle(report));
    if (flags.json !== undefined) {
      writeFlagFile("--json", flags.json, `${JSON.stringify(report, null, 2)}\n`);
    }
  } catch (error) {
    if (!(error instanceof FlagError)) throw error;
    command.error(`headrace sim article: ${error.message}`, { exitCode: 2 });
  }
}
