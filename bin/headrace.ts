#!/usr/bin/env node
/** The `headrace` command: names its subcommands, nothing else. */
import { readFileSync } from "node:fs";
import { Command } from "commander";
import { checkConfigCommand, configReferenceCommand } from "./config.ts";
import { demoCommand } from "./demo.ts";
import { nodeCommand } from "./node.ts";
import { replayCommand } from "./replay.ts";
import { serveCommand } from "./serve.ts";

const manifest = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8"));

await new Command("headrace")
  .description(
    "Brings LLM requests to self-hosted GPUs: cache, limits, routing by live state, retry.",
  )
  .version(manifest.version)
  .addCommand(serveCommand())
  .addCommand(demoCommand())
  .addCommand(nodeCommand())
  .addCommand(replayCommand())
  .addCommand(checkConfigCommand())
  .addCommand(configReferenceCommand())
  .showHelpAfterError()
  .parseAsync();
