#!/usr/bin/env node
/** The `headrace` command: names its subcommands, nothing else. */
import { readFileSync } from "node:fs";
import { Command } from "commander";
import { cacheCommand } from "./cache.ts";
import { calibrateCommand } from "./calibrate.ts";
import { clusterCommand } from "./cluster.ts";
import { checkConfigCommand, configReferenceCommand } from "./config.ts";
import { demoCommand } from "./demo.ts";
import { fuzzCommand } from "./fuzz.ts";
import { hotCommand } from "./hot.ts";
import { modelCommand } from "./model.ts";
import { nodeCommand } from "./node.ts";
import { planCommand } from "./plan.ts";
import { replayCommand } from "./replay.ts";
import { serveCommand } from "./serve.ts";
import { simCommand } from "./sim.ts";

const manifest = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8"));

await new Command("headrace")
  .description(
    "Brings LLM requests to self-hosted GPUs: cache, limits, routing by live state, retry.",
  )
  .version(manifest.version)
  // A flag belongs to the command that it follows: `sim article --seed 2` is not `sim --seed 2`.
  .enablePositionalOptions()
  .addCommand(serveCommand())
  .addCommand(clusterCommand())
  .addCommand(demoCommand())
  .addCommand(nodeCommand())
  .addCommand(replayCommand())
  .addCommand(simCommand())
  .addCommand(planCommand())
  .addCommand(fuzzCommand())
  .addCommand(calibrateCommand())
  .addCommand(cacheCommand())
  .addCommand(checkConfigCommand())
  .addCommand(modelCommand())
  .addCommand(hotCommand())
  .addCommand(configReferenceCommand())
  .showHelpAfterError()
  .parseAsync();
