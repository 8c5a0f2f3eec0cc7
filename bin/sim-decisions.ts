/**
 * `headrace sim decisions FILE`: feeds the decision log of a live gateway (option `record.decisions`) to the router of
 * this very release in virtual time, and says whether it chooses the same.
 *
 * The report goes to standard output. Ends with 0 when all choices are the same, 1 when one differs, 2 for bad input.
 */
import { createReadStream } from "node:fs";
import { createInterface } from "node:readline";
import { Command } from "commander";
import type { RouterChoice } from "../actors/router-log.ts";
import { DecisionLogError, DecisionReplay, type DecisionReport } from "../sim/decision-replay.ts";
import { endWithTwo, FlagError, fileProblem, writeFlagFile } from "./flag-values.ts";

type Flags = { json?: string };

export function decisionsCommand(): Command {
  return endWithTwo(new Command("decisions"))
    .description("replay the log of a live router (record.decisions): are its choices the same?")
    .argument("<file>", "decision log")
    .option("--json <file>", "write the report there as well")
    .action(run);
}

async function run(file: string, flags: Flags, command: Command): Promise<void> {
  try {
    const report = await replayed(file);
    process.stdout.write(formatted(report));
    if (flags.json !== undefined) {
      writeFlagFile("--json", flags.json, `${JSON.stringify(report, null, 2)}\n`);
    }
    process.exitCode = report.differing === 0 ? 0 : 1;
  } catch (error) {
    if (!(error instanceof DecisionLogError || error instanceof FlagError)) throw error;
    command.error(`headrace sim decisions: ${file}: ${error.message}`, { exitCode: 2 });
  }
}

/** A last line without its end was cut off while it was written: it is left out. */
async function replayed(file: string): Promise<DecisionReport> {
  const replay = new DecisionReplay();
  const lines = createInterface({
    input: createReadStream(file),
    crlfDelay: Number.POSITIVE_INFINITY,
  });
  let last: string | undefined;
  try {
    for await (const line of lines) {
      if (last !== undefined) replay.add(last);
      last = line;
    }
  } catch (error) {
    if (error instanceof DecisionLogError || !isFileError(error)) throw error;
    throw new FlagError(fileProblem(error));
  }
  if (last?.endsWith("}") === true) replay.add(last);
  return replay.report();
}

function isFileError(error: unknown): error is Error {
  return error instanceof Error && "syscall" in error;
}

function formatted(report: DecisionReport): string {
  const { strategy, turns, asked, placed, refused, ejections, differing, differences } = report;
  const choices = asked + placed + refused + ejections;
  const lines = [
    `${turns} turns of the router (${strategy}): ${asked} leases asked for, ${placed} requests placed, ` +
      `${refused} refused, ${ejections} ejections decided`,
    differing === 0
      ? `all ${choices} choices are the same in the simulator, with the cost of every candidate`
      : `${differing} turns differ; the first ones:`,
    ...differences.flatMap(({ line, atMs, message, live, simulated }) => [
      `  line ${line}, ${(atMs / 1000).toFixed(3)} s, ${message}`,
      `    live       ${live.map(choiceText).join(", ") || "nothing"}`,
      `    simulated  ${simulated.map(choiceText).join(", ") || "nothing"}`,
    ]),
  ];
  return `${lines.join("\n")}\n`;
}

function choiceText(choice: RouterChoice): string {
  switch (choice.kind) {
    case "asked":
      return `asked ${choice.node} for ${choice.leaseId}`;
    case "placed":
      return `placed on ${choice.node} (${choice.decision.why})`;
    case "refused":
      return `refused: ${choice.code} (${choice.decision.why})`;
    case "ejection":
      return choice.granted ? "granted an ejection" : "refused an ejection";
  }
}
