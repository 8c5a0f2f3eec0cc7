/**
 * Line charts as SVG text: axes with units, lines named at their ends, limits, marks, and a tooltip per position.
 *
 * Pure: numbers in, markup out. Colours and fonts are classes that the page's style sheet fills, so that one chart
 * serves light and dark. Every text that comes from outside is escaped.
 */

export type Axis = {
  /** With its unit, such as "requests per second". */
  label: string;
  format: (value: number) => string;
  /** Ends of the axis; else from 0 (or the least value, on a log axis) to the largest value shown. */
  min?: number;
  max?: number;
  /** Logarithmic; values of 0 and below are not drawn. */
  isLog?: boolean;
  /** Ticks stand at whole steps of 1, 2, 5 × this unit; default 1. For time: what a reader counts in. */
  unit?: number;
  /** Exactly these ticks. */
  ticks?: readonly number[];
};

export type Line = {
  name: string;
  /** In order of x; null breaks the line. */
  points: readonly (readonly [x: number, y: number | null])[];
  /** Colour 0…5. */
  colour: number;
  isDashed?: boolean;
  /** A dot at each point; a hollow one where `isGood` says no. */
  dots?: boolean;
  isGood?: readonly boolean[];
  /** Whiskers: lowest and highest value at each point. */
  spread?: readonly (readonly [low: number, high: number] | null)[];
  /** No line between the dots. */
  isScattered?: boolean;
};

export type Chart = {
  title: string;
  /** What a reader should see, in a sentence. */
  caption: string;
  x: Axis;
  y: Axis;
  lines: readonly Line[];
  /** Horizontal lines with a name: what must not be crossed. */
  limits?: readonly { y: number; text: string }[];
  /** Vertical lines with a name: faults, the knee, the answer. */
  marks?: readonly { x: number; text: string; kind: "fault" | "answer" }[];
};

const WIDTH = 460;
const HEIGHT = 250;
const LEFT = 56;
const RIGHT = 92;
const TOP = 18;
const BOTTOM = 40;
const LABEL_HEIGHT = 13;
/** Names of marks stand above the plot, in so many rows at most; those without room only have a tooltip. */
const MARK_ROWS_MAX = 3;
/** Of a letter of a mark's name, about. */
const LETTER_WIDTH = 6;

/** Least value on a log axis, and least length of a linear one. */
const LOG_FLOOR = 1e-6;
const LENGTH_MIN = 1e-6;

type Scale = (value: number) => number;

/** The chart as one `<svg>` element. */
export function chartSvg(chart: Chart): string {
  const xs = domain(chart.x, allX(chart));
  const ys = domain(chart.y, allY(chart));
  const x = scale(chart.x, xs, LEFT, WIDTH - RIGHT);
  const marks = placedMarks(chart.marks ?? [], xs, x);
  const rows = Math.max(0, ...marks.map(({ row }) => row + 1));
  const top = TOP + Math.min(rows, MARK_ROWS_MAX) * LABEL_HEIGHT;
  const y = scale(chart.y, ys, HEIGHT - BOTTOM, top);
  const parts = [
    ...gridY(chart.y, ys, y),
    ...gridX(chart.x, xs, x),
    ...(chart.limits ?? []).map((limit) => limitSvg(limit, ys, y)),
    ...marks.map((mark) => markLine(mark, top)),
    ...marks.map(markName),
    ...chart.lines.map((line) => lineSvg(line, chart, x, y, ys)),
    ...endLabels(chart.lines, chart.limits ?? [], ys, y),
    ...tooltips(chart, x, top),
  ];
  return (
    `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${escaped(`${chart.title}. ${chart.caption}`)}">` +
    `${parts.join("")}</svg>`
  );
}

/** Text for markup, between tags and in attributes. */
export function escaped(text: string): string {
  return text
    .replaceAll("&", "&amp;")
    .replaceAll("<", "&lt;")
    .replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;");
}

function allX({ lines, marks = [] }: Chart): number[] {
  return [
    ...lines.flatMap(({ points }) => points.map(([x]) => x)),
    ...marks.filter(({ kind }) => kind === "answer").map(({ x }) => x),
  ];
}

function allY({ lines, limits = [] }: Chart): number[] {
  const values: number[] = limits.map(({ y }) => y);
  for (const { points, spread } of lines) {
    for (const [, y] of points) if (y !== null) values.push(y);
    for (const ends of spread ?? []) if (ends !== null) values.push(...ends);
  }
  return values;
}

function domain(axis: Axis, values: readonly number[]): [min: number, max: number] {
  const shown = axis.isLog ? values.filter((value) => value > 0) : values;
  let least = Number.POSITIVE_INFINITY;
  let most = Number.NEGATIVE_INFINITY;
  for (const value of shown) {
    least = Math.min(least, value);
    most = Math.max(most, value);
  }
  if (shown.length === 0) [least, most] = axis.isLog ? [1, 10] : [0, 1];
  if (axis.isLog) {
    // More decades than this are a line along the floor and a spike: what is below stands on the floor.
    const high = axis.max ?? Math.max(most, LOG_FLOOR) * 1.2;
    const low = axis.min ?? Math.max(least, LOG_FLOOR, high / 1e9) / 1.2;
    return [low, Math.max(high, low * 1.5)];
  }
  const min = axis.min ?? Math.min(0, least);
  const max = axis.max ?? (most > 0 ? most * 1.06 : 0);
  // An axis without length has no ticks; nor has one shorter than numbers can be told apart.
  const lengthMin = Math.max(LENGTH_MIN, Math.abs(min) * 1e-6);
  return [min, max - min >= lengthMin ? max : min + Math.max(1, lengthMin)];
}

function scale(axis: Axis, [min, max]: readonly [number, number], from: number, to: number): Scale {
  const at = axis.isLog ? Math.log : (value: number) => value;
  const low = at(min);
  const span = at(max) - low;
  return (value) => from + ((at(value) - low) / span) * (to - from);
}

/** Round values inside the ends, about `count` of them. */
function ticksOf(axis: Axis, [min, max]: readonly [number, number], count: number): number[] {
  if (axis.ticks !== undefined) return axis.ticks.filter((tick) => tick >= min && tick <= max);
  if (axis.isLog) return logTicks(min, max, count);
  const unit = axis.unit ?? 1;
  const step = niceStep((max - min) / unit / count) * unit;
  const ticks: number[] = [];
  for (let index = Math.ceil(min / step); index * step <= max + step * 1e-9; index++) {
    ticks.push(index * step);
  }
  return ticks;
}

function logTicks(min: number, max: number, count: number): number[] {
  const all: number[] = [];
  let decade = 1;
  while (decade > min) decade /= 10;
  while (decade * 10 < min) decade *= 10;
  for (; decade <= max; decade *= 10) {
    for (const digit of [1, 2, 5]) {
      const tick = decade * digit;
      if (tick >= min && tick <= max) all.push(tick);
    }
  }
  if (all.length <= count + 2) return all;
  return all.filter((tick) => {
    const text = tick.toExponential(0);
    return text.startsWith("1");
  });
}

function niceStep(wanted: number): number {
  let decade = 1;
  while (decade > wanted) decade /= 10;
  while (decade * 10 <= wanted) decade *= 10;
  const digit = wanted / decade;
  return decade * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
}

function gridY(axis: Axis, ends: readonly [number, number], y: Scale): string[] {
  const right = WIDTH - RIGHT;
  const parts = ticksOf(axis, ends, 5).map((tick) => {
    const at = fixed(y(tick));
    return (
      `<line class="grid" x1="${LEFT}" y1="${at}" x2="${right}" y2="${at}"/>` +
      `<text class="tick" x="${LEFT - 6}" y="${fixed(y(tick) + 4)}" text-anchor="end">${escaped(axis.format(tick))}</text>`
    );
  });
  parts.push(`<text class="axis" x="4" y="10">${escaped(axis.label)}</text>`);
  return parts;
}

function gridX(axis: Axis, ends: readonly [number, number], x: Scale): string[] {
  const bottom = HEIGHT - BOTTOM;
  const parts = [
    `<line class="base" x1="${LEFT}" y1="${bottom}" x2="${WIDTH - RIGHT}" y2="${bottom}"/>`,
  ];
  for (const tick of ticksOf(axis, ends, 6)) {
    const at = fixed(x(tick));
    parts.push(
      `<line class="base" x1="${at}" y1="${bottom}" x2="${at}" y2="${bottom + 4}"/>` +
        `<text class="tick" x="${at}" y="${bottom + 16}" text-anchor="middle">${escaped(axis.format(tick))}</text>`,
    );
  }
  const middle = (LEFT + WIDTH - RIGHT) / 2;
  parts.push(
    `<text class="axis" x="${middle}" y="${HEIGHT - 6}" text-anchor="middle">${escaped(axis.label)}</text>`,
  );
  return parts;
}

function limitSvg(
  { y: value, text }: { y: number; text: string },
  ends: readonly [number, number],
  y: Scale,
): string {
  if (value < ends[0] || value > ends[1]) return "";
  const at = fixed(y(value));
  return (
    `<line class="limit" x1="${LEFT}" y1="${at}" x2="${WIDTH - RIGHT}" y2="${at}">` +
    `<title>${escaped(text)}</title></line>`
  );
}

type PlacedMark = { px: number; row: number; text: string; kind: "fault" | "answer" };

/** Each mark in the first row where its name has room. */
function placedMarks(
  marks: NonNullable<Chart["marks"]>,
  ends: readonly [number, number],
  x: Scale,
): PlacedMark[] {
  const filledTo: number[] = [];
  return marks
    .filter((mark) => mark.x >= ends[0] && mark.x <= ends[1])
    .sort((left, right) => left.x - right.x)
    .map(({ x: at, text, kind }) => {
      const px = x(at);
      let row = 0;
      while ((filledTo[row] ?? Number.NEGATIVE_INFINITY) > px) row++;
      filledTo[row] = px + (text.length + 1) * LETTER_WIDTH;
      return { px, row, text, kind };
    });
}

function markLine({ px, row, text, kind }: PlacedMark, top: number): string {
  const from = row < MARK_ROWS_MAX ? TOP + row * LABEL_HEIGHT : top;
  const at = fixed(px);
  return (
    `<line class="mark ${kind}" x1="${at}" y1="${from}" x2="${at}" y2="${HEIGHT - BOTTOM}">` +
    `<title>${escaped(text)}</title></line>`
  );
}

/** Drawn after all lines, so that none of them strikes it out. */
function markName({ px, row, text, kind }: PlacedMark): string {
  if (row >= MARK_ROWS_MAX) return "";
  const y = TOP + row * LABEL_HEIGHT + 9;
  return `<text class="mark ${kind}" x="${fixed(px + 3)}" y="${y}">${escaped(text)}</text>`;
}

function lineSvg(
  line: Line,
  chart: Chart,
  x: Scale,
  y: Scale,
  ends: readonly [number, number],
): string {
  const isShown = (value: number | null): value is number =>
    value !== null && !(chart.y.isLog && value <= 0);
  const place = (value: number) => y(Math.min(Math.max(value, ends[0]), ends[1]));
  let path = "";
  let isPen = false;
  for (const [at, value] of line.points) {
    if (isShown(value)) path += `${isPen ? "L" : "M"}${fixed(x(at))} ${fixed(place(value))}`;
    isPen = isShown(value);
  }
  const parts: string[] = [];
  if (!line.isScattered) {
    parts.push(`<path class="line c${line.colour}${line.isDashed ? " dashed" : ""}" d="${path}"/>`);
  }
  line.points.forEach(([at, value], index) => {
    const px = fixed(x(at));
    const spread = line.spread?.[index];
    if (spread !== undefined && spread !== null) {
      parts.push(
        `<line class="line c${line.colour}" x1="${px}" y1="${fixed(place(spread[0]))}" x2="${px}" y2="${fixed(place(spread[1]))}"/>`,
      );
    }
    if (line.dots && isShown(value)) {
      const isGood = line.isGood?.[index] ?? true;
      parts.push(
        `<circle class="dot c${line.colour}${isGood ? "" : " hollow"}" cx="${px}" cy="${fixed(place(value))}" r="3.5"/>`,
      );
    }
  });
  return parts.join("");
}

/** Names beside the last points, pushed apart where they would overlap. */
function endLabels(
  lines: readonly Line[],
  limits: NonNullable<Chart["limits"]>,
  ends: readonly [number, number],
  y: Scale,
): string[] {
  const labels: { at: number; text: string; style: string }[] = [];
  for (const { name, points, colour } of lines) {
    const last = points.findLast(([, value]) => value !== null)?.[1];
    if (last === undefined || last === null) continue;
    const at = y(Math.min(Math.max(last, ends[0]), ends[1]));
    labels.push({ at, text: name, style: `c${colour}` });
  }
  for (const { y: value, text } of limits) {
    if (value >= ends[0] && value <= ends[1]) {
      labels.push({ at: y(value), text, style: "limit" });
    }
  }
  labels.sort((left, right) => left.at - right.at);
  const lowest = HEIGHT - BOTTOM;
  labels.forEach((label, index) => {
    const above = labels[index - 1];
    if (above !== undefined) label.at = Math.max(label.at, above.at + LABEL_HEIGHT);
  });
  // What was pushed below the plot comes back up, and takes its neighbours along.
  for (let index = labels.length - 1; index >= 0; index--) {
    const label = labels[index];
    const below = labels[index + 1];
    if (label === undefined) continue;
    label.at = Math.min(label.at, below === undefined ? lowest : below.at - LABEL_HEIGHT);
  }
  return labels.map(
    ({ at, text, style }) =>
      `<text class="name ${style}" x="${WIDTH - RIGHT + 6}" y="${fixed(at + 4)}">${escaped(text)}</text>`,
  );
}

/** One invisible column per position that says every line's value there. */
function tooltips(chart: Chart, x: Scale, top: number): string[] {
  const columns = new Map<number, string[]>();
  for (const { name, points } of chart.lines) {
    for (const [at, value] of points) {
      const texts = columns.get(at) ?? [];
      columns.set(at, texts);
      if (value !== null) texts.push(`${name}: ${chart.y.format(value)}`);
    }
  }
  const positions = [...columns.keys()].sort((left, right) => left - right);
  return positions.map((at, index) => {
    const px = x(at);
    const left = index === 0 ? LEFT : (x(positions[index - 1] ?? at) + px) / 2;
    const last = index === positions.length - 1;
    const right = last ? WIDTH - RIGHT : (x(positions[index + 1] ?? at) + px) / 2;
    const texts = [`${chart.x.label}: ${chart.x.format(at)}`, ...(columns.get(at) ?? [])];
    return (
      `<rect class="hover" x="${fixed(left)}" y="${top}" width="${fixed(Math.max(0.5, right - left))}" ` +
      `height="${HEIGHT - BOTTOM - top}"><title>${escaped(texts.join("\n"))}</title></rect>`
    );
  });
}

function fixed(value: number): string {
  return String(Math.round(value * 10) / 10);
}
