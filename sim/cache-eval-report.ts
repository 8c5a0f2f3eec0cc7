/** The result of the cache benchmark as text for a terminal and as one HTML page that needs nothing else. Pure. */
import type { Share } from "../actors/judged-precision.ts";
import type { EvalResult, GuardRow, Outcome, ReplayResult, WantedThreshold } from "./cache-eval.ts";
import { type Chart, escaped, type Line } from "./chart.ts";
import { type Cell, charts, page, section, table } from "./report-page.ts";

/** What was measured, with what, and how to measure it again. */
export type EvalReport = {
  readonly kind: "cache_eval";
  readonly files: readonly {
    readonly name: string;
    readonly pairs: number;
    readonly sha256: string;
  }[];
  readonly result: EvalResult;
  readonly command: string;
  readonly version: string;
  readonly nodeVersion: string;
};

/** For the terminal; ends with a line break. */
export function formatEval(report: EvalReport): string {
  const { result } = report;
  return `${[
    headline(result),
    "",
    ...setting(report),
    "",
    "By threshold, with the 95 % interval. false: hits on questions that no entry has the meaning of, among those.",
    ...aligned([THRESHOLD_HEADS, ...thresholdCells(result)]),
    "",
    `Guards at ${result.threshold}. blocks: of all pairs labelled same / different. alone: only this guard. others: all standard ones but this.`,
    ...aligned([GUARD_HEADS, ...result.guards.map(guardCells)]),
    ...(result.replays.length === 0
      ? []
      : [
          "",
          "Verified mode, all questions once in random order, a growing store.",
          ...aligned([REPLAY_HEADS, ...result.replays.map(replayCells)]),
        ]),
    ...(result.shadow === undefined ? [] : ["", ...shadowLines(result.shadow)]),
    "",
    `again: ${report.command}`,
  ].join("\n")}\n`;
}

/** The answer in one line: the threshold to set. */
function headline(result: EvalResult): string {
  const { guarded, plain } = result.wanted;
  return `With guards: ${wantedText(guarded, result)}. Without: ${wantedText(plain, result)}.`;
}

function wantedText(wanted: WantedThreshold, { precision, rows }: EvalResult): string {
  if (wanted === undefined)
    return `no threshold is shown to be right in ${percent(precision)} of hits`;
  const { threshold, outcome } = wanted;
  const least = threshold === rows[0]?.threshold ? ", the least measured," : "";
  return `threshold ${threshold.toFixed(3)}${least} is right in ${percent(precision)} of hits and more (measured ${percent(outcome.right.share)}), and answers ${percent(outcome.hits.share)} of questions`;
}

function setting({ files, result }: EvalReport): string[] {
  const { pairs, samePairs, joinedByWords, contradictions, withoutVector } = result;
  const { entries, questions, noMatch, exact } = result;
  return [
    ...files.map(
      ({ name, pairs: count, sha256 }) =>
        `pairs      ${name}: ${count}, sha256 ${sha256.slice(0, 16)}`,
    ),
    `labels     ${samePairs} of ${pairs} the same; ${joinedByWords} more texts joined to others by their words; ${contradictions} pairs labelled different are the same by all that`,
    `store      ${entries} entries (first texts), ${questions} questions (second texts), ${noMatch} with no entry of their meaning, ${exact} in the words of an entry`,
    `embedder   ${result.embedder}${withoutVector === 0 ? "" : `; ${withoutVector} texts without a vector`}`,
  ];
}

const THRESHOLD_HEADS = ["threshold", "hits", "right", "false", "| guarded hits", "right", "false"];

function thresholdCells({ rows }: EvalResult): string[][] {
  return rows.map(({ threshold, plain, guarded }) => [
    threshold.toFixed(2),
    ...outcomeCells(plain),
    ...outcomeCells(guarded).map((cell, index) => (index === 0 ? `| ${cell}` : cell)),
  ]);
}

function outcomeCells({ hits, right, falseHits }: Outcome): string[] {
  return [ranged(hits), ranged(right), ranged(falseHits)];
}

const GUARD_HEADS = [
  "guard",
  "blocks same",
  "different",
  "| alone: hits",
  "right",
  "| others: hits",
  "right",
];

function guardCells({ guard, isStandard, same, different, alone, others }: GuardRow): string[] {
  return [
    isStandard ? guard : `${guard} (strict)`,
    percent(same.share),
    percent(different.share),
    `| ${percent(alone.hits.share)}`,
    percent(alone.right.share),
    isStandard ? `| ${percent(others.hits.share)}` : "|",
    isStandard ? percent(others.right.share) : "",
  ];
}

const REPLAY_HEADS = [
  "allowed error",
  "served",
  "of them exact",
  "wrong of served",
  "95 % interval",
  "kept",
  "explored",
];

function replayCells({
  errorRateMax,
  served,
  servedExact,
  errors,
  kept,
  explored,
}: ReplayResult): string[] {
  return [
    errorRateMax === undefined ? "fixed mode" : percent(errorRateMax),
    `${served.count} (${percent(served.share)})`,
    String(servedExact),
    errors.total === 0 ? "none served" : `${errors.count} (${percent(errors.share)})`,
    errors.total === 0 ? "" : `${percent(errors.low)} to ${percent(errors.high)}`,
    percent(kept),
    String(explored),
  ];
}

function shadowLines({ share, estimate, truth }: NonNullable<EvalResult["shadow"]>): string[] {
  const { falseHits } = estimate;
  return [
    `Shadow mode on ${percent(share)} of the questions: ${falseHits.count} of ${falseHits.total} would-be hits false, ${ranged(falseHits)}; over all questions ${percent(truth.falseHits.share)}: ${within(falseHits, truth.falseHits) ? "within" : "OUTSIDE"} the interval.`,
    ...aligned([
      ["similarity", "judged", "false (shadow)", "false (all)", ""],
      ...estimate.bands.map(({ from, falseHits: estimated }) => {
        const all = truth.bands.find((band) => band.from === from)?.falseHits ?? estimated;
        return [
          from >= 1 ? "1.00" : `${from.toFixed(2)} to ${(from + 0.01).toFixed(2)}`,
          String(estimated.total),
          ranged(estimated),
          percent(all.share),
          within(estimated, all) ? "within" : "outside",
        ];
      }),
    ]),
  ];
}

function within({ low, high }: Share, { share }: Share): boolean {
  return low <= share && share <= high;
}

function percent(share: number): string {
  return `${(share * 100).toFixed(1)} %`;
}

function ranged(share: Share): string {
  if (share.total === 0) return "–";
  return `${(share.share * 100).toFixed(1)} % [${(share.low * 100).toFixed(1)}–${(share.high * 100).toFixed(1)}]`;
}

function aligned(rows: readonly (readonly string[])[]): string[] {
  const widths = (rows[0] ?? []).map((_, column) =>
    Math.max(...rows.map((row) => row[column]?.length ?? 0)),
  );
  return rows.map((row) =>
    `  ${row.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join("  ")}`.trimEnd(),
  );
}

// ---- page -----------------------------------------------------------------------------------------------------

/** The report as a page of its own. */
export function evalPage(report: EvalReport): string {
  const { result } = report;
  const found = result.wanted.guarded !== undefined;
  // The first row of the table at which the answer holds.
  const answerRow = result.rows.findIndex(
    ({ threshold }) => threshold >= (result.wanted.guarded?.threshold ?? 2),
  );
  const title = found
    ? `Serve from ${result.wanted.guarded?.threshold.toFixed(3)} on`
    : `No threshold is right in ${percent(result.precision)} of hits`;
  const rows = (cells: readonly Cell[][]) => cells.map((one) => ({ cells: one, isMarked: false }));
  return page(
    `Headrace cache: ${title}`,
    [
      `<header class="${found ? "nodes" : "refused"}"><p class="kicker">Headrace semantic cache, on labelled pairs</p>`,
      `<h1>${escaped(title)}</h1><ul><li>With guards: ${escaped(wantedText(result.wanted.guarded, result))}.</li>`,
      `<li>Without: ${escaped(wantedText(result.wanted.plain, result))}.</li></ul></header>`,
      charts("In pictures", [
        ...thresholdCharts(result),
        ...replayCharts(result),
        ...shadowCharts(result),
      ]),
      section(
        "By threshold",
        "<p>Hits among all questions; right ones among the hits; false hits among the questions that no entry has the meaning of. In brackets: 95 % interval.</p>" +
          table(
            THRESHOLD_HEADS.map((head) => head.replace("| ", "")),
            thresholdCells(result).map((cells, index) => ({
              cells: cells.map((cell) => cell.replace("| ", "")),
              isMarked: index === answerRow,
            })),
          ),
      ),
      section(
        `The guards at ${result.threshold}`,
        "<p>Blocks: of all pairs labelled the same, and of those labelled different. Alone: with this guard only. Others: with all standard guards but this.</p>" +
          table(
            GUARD_HEADS.map((head) => head.replace("| ", "")),
            rows(result.guards.map((guard) => guardRowCells(guard))),
          ),
      ),
      result.replays.length === 0
        ? ""
        : section(
            "Verified mode on a replay",
            "<p>All questions once, in random order, on a store that grows. Kept: right hits, as a share of the fixed mode's.</p>" +
              table(REPLAY_HEADS, rows(result.replays.map(replayCells))),
          ),
      section(
        "Where the numbers come from",
        `<pre>${escaped([...setting(report), `with       headrace ${report.version}, Node ${report.nodeVersion}`, `again      ${report.command}`].join("\n"))}</pre>`,
      ),
    ].join("\n"),
  );
}

function guardRowCells(guard: GuardRow): Cell[] {
  const [name = "", , , ...rest] = guardCells(guard);
  const bar = ({ share }: Share): Cell => ({
    html: `<span class="bar"><i style="width:${Math.round(share * 100)}%"></i></span>${escaped(percent(share))}`,
  });
  return [
    name,
    bar(guard.same),
    bar(guard.different),
    ...rest.map((cell) => cell.replace(/\| ?/, "")),
  ];
}

function thresholdCharts({ rows, precision, wanted }: EvalResult): Chart[] {
  const x = { label: "threshold (cosine)", format: (value: number) => value.toFixed(2) };
  const line = (
    name: string,
    colour: number,
    of: (row: EvalResult["rows"][number]) => Share,
  ): Line => ({
    name,
    colour,
    points: rows.map((row) => [row.threshold, of(row).total === 0 ? null : of(row).share]),
    spread: rows.map((row) => (of(row).total === 0 ? null : [of(row).low, of(row).high])),
    dots: true,
  });
  const both = (of: (outcome: Outcome) => Share): Line[] => [
    line("guarded", 0, ({ guarded }) => of(guarded)),
    line("plain", 4, ({ plain }) => of(plain)),
  ];
  const ends = {
    ...x,
    min: (rows[0]?.threshold ?? 0) - 0.005,
    max: (rows.at(-1)?.threshold ?? 1) + 0.005,
  };
  const format = (share: number) => `${Number((share * 100).toFixed(1))} %`;
  const rights = rows.flatMap(({ plain, guarded }) => [plain.right.low, guarded.right.low]);
  return [
    {
      title: "Right hits",
      caption:
        "Share of hits whose entry has the meaning of the question; whiskers are the 95 % interval.",
      x: ends,
      y: { label: "share of hits", format, min: Math.min(...rights, precision) * 0.95, max: 1 },
      lines: both(({ right }) => right),
      limits: [{ y: precision, text: "wanted" }],
      marks:
        wanted.guarded === undefined || wanted.guarded.threshold > (ends.max ?? 1)
          ? []
          : [{ x: wanted.guarded.threshold, text: "serve from here", kind: "answer" }],
    },
    {
      title: "Questions answered",
      caption: "Hits among all questions: what the threshold and the guards cost.",
      x: ends,
      y: { label: "share of questions", format, min: 0 },
      lines: both(({ hits }) => hits),
    },
    {
      title: "False hits",
      caption: "Hits on questions that no entry has the meaning of, among such questions.",
      x: ends,
      y: { label: "share of such questions", format, min: 0 },
      lines: both(({ falseHits }) => falseHits),
    },
  ];
}

function replayCharts({ replays }: EvalResult): Chart[] {
  const verified = replays.flatMap(({ errorRateMax, errors }) =>
    errorRateMax === undefined || errors.total === 0 ? [] : [{ errorRateMax, errors }],
  );
  if (verified.length < 2) return [];
  const format = (share: number) => `${Number((share * 100).toFixed(1))} %`;
  return [
    {
      title: "Verified mode",
      caption:
        "Wrong answers among those served, against the rate allowed; below the line is kept.",
      x: { label: "allowed share of wrong answers", format, min: 0 },
      y: { label: "share of served answers", format, min: 0 },
      lines: [
        {
          name: "wrong",
          colour: 0,
          dots: true,
          points: verified.map(({ errorRateMax, errors }) => [errorRateMax, errors.share]),
          spread: verified.map(({ errors }) => [errors.low, errors.high]),
        },
        {
          name: "allowed",
          colour: 4,
          isDashed: true,
          points: verified.map(({ errorRateMax }) => [errorRateMax, errorRateMax]),
        },
      ],
    },
  ];
}

function shadowCharts({ shadow }: EvalResult): Chart[] {
  if (shadow === undefined || shadow.estimate.bands.length === 0) return [];
  const { estimate, truth, share } = shadow;
  return [
    {
      title: "False would-be hits by similarity",
      caption: `Dots: the estimate from ${percent(share)} of the questions, with its 95 % interval. Line: all questions.`,
      x: {
        label: "similarity (from)",
        format: (value) => value.toFixed(2),
        min: Math.min(...truth.bands.map(({ from }) => from)) - 0.005,
        max: 1.005,
      },
      y: { label: "share of would-be hits", format: (value) => percent(value), min: 0, max: 1 },
      lines: [
        {
          name: "shadow",
          colour: 0,
          dots: true,
          isScattered: true,
          points: estimate.bands.map(({ from, falseHits }) => [from, falseHits.share]),
          spread: estimate.bands.map(({ falseHits }) => [falseHits.low, falseHits.high]),
        },
        {
          name: "all",
          colour: 4,
          points: truth.bands.map(({ from, falseHits }) => [from, falseHits.share]),
        },
      ],
    },
  ];
}
