/** Tables and verdicts of the benchmarks. */

/** A figure, and the bar it is held to. */
export type Row = {
  /** Short, for --only. */
  name: string;
  question: string;
  /** As printed, with its unit. */
  figure: string;
  value: number;
  /** Absent: reported only. */
  bar?: { atMost: number } | { atLeast: number };
  /** What it was made of. */
  detail: string;
};

export function meets({ value, bar }: Row): boolean {
  if (bar === undefined) return true;
  return "atMost" in bar ? value <= bar.atMost : value >= bar.atLeast;
}

/** Prints question, figure, bar and verdict of each row, details below; returns whether all bars are met. */
export function printRows(rows: readonly Row[]): boolean {
  const cells = rows.map((row) => ({ ...row, bar: barText(row), verdict: verdictOf(row) }));
  const width = (of: (row: (typeof cells)[number]) => string) =>
    Math.max(...cells.map((row) => of(row).length));
  const [questions, figures, bars] = [
    width((row) => row.question),
    width((row) => row.figure),
    width((row) => row.bar),
  ];
  for (const row of cells) {
    const line = `${row.question.padEnd(questions)}  ${row.figure.padStart(figures)}  ${row.bar.padEnd(bars)}  ${row.verdict}`;
    console.log(line.trimEnd());
    if (row.detail !== "") console.log(`    ${row.detail}`);
  }
  return rows.every(meets);
}

function barText({ bar }: Row): string {
  if (bar === undefined) return "";
  return "atMost" in bar ? `≤ ${bar.atMost}` : `≥ ${bar.atLeast}`;
}

function verdictOf(row: Row): string {
  if (row.bar === undefined) return "";
  return meets(row) ? "ok" : "MISSED";
}

export function medianOf(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const upper = sorted[middle] ?? Number.NaN;
  return sorted.length % 2 === 1 ? upper : ((sorted[middle - 1] ?? upper) + upper) / 2;
}
