/**
 * Least squares without derivatives of one's own: Levenberg–Marquardt with finite differences, for functions that
 * jump a little, as replays do when two requests change places in a step. Pure.
 */

export type Point = {
  readonly theta: readonly number[];
  readonly residuals: readonly number[];
  /** Sum of the squares. */
  readonly loss: number;
};

/** Wide enough to smooth over small jumps; parameters are logarithms, so this is 5 %. */
const DIFFERENCE = 0.05;
/** No parameter moves further in one step. */
const MOVE_MAX = 0.8;
const DAMPING_START = 0.1;
const DAMPING_MIN = 1e-4;
const TRIES = 4;
/** A step that gains less than this share of the loss was the last. */
const GAIN_MIN = 5e-4;

/** Goes downhill from `from`, at most `iterations` steps; as many residuals at every point. */
export function leastSquares(
  residualsOf: (theta: readonly number[]) => number[],
  from: readonly number[],
  iterations: number,
): Point {
  let point = pointAt(residualsOf, from);
  let damping = DAMPING_START;
  for (let i = 0; i < iterations; i++) {
    const here = point;
    const slopes = here.theta.map((_, k) => {
      const moved = here.theta.map((value, j) => (j === k ? value + DIFFERENCE : value));
      const ahead = residualsOf(moved);
      return ahead.map((value, j) => (value - (here.residuals[j] ?? 0)) / DIFFERENCE);
    });
    let next: Point | undefined;
    for (let tries = 0; tries < TRIES && next === undefined; tries++) {
      const step = dampedStep(slopes, here.residuals, damping);
      const longest = Math.max(...step.map(Math.abs));
      const shrink = longest > MOVE_MAX ? MOVE_MAX / longest : 1;
      const there = pointAt(
        residualsOf,
        here.theta.map((value, k) => value + shrink * (step[k] ?? 0)),
      );
      if (there.loss < here.loss) {
        next = there;
        damping = Math.max(DAMPING_MIN, damping / 4);
      } else damping *= 5;
    }
    if (next === undefined) return here;
    point = next;
    if (here.loss - next.loss < GAIN_MIN * here.loss) return next;
  }
  return point;
}

export function pointAt(
  residualsOf: (theta: readonly number[]) => number[],
  theta: readonly number[],
): Point {
  const residuals = residualsOf(theta);
  return { theta, residuals, loss: dot(residuals, residuals) };
}

/** Solves (JᵀJ + damping·diag(JᵀJ)) step = −Jᵀr by elimination with pivots; `slopes` are the columns of J. */
function dampedStep(
  slopes: readonly (readonly number[])[],
  residuals: readonly number[],
  damping: number,
): number[] {
  const size = slopes.length;
  const rows = slopes.map((left, i) => {
    const row = slopes.map((right) => dot(left, right));
    row[i] = (row[i] ?? 0) * (1 + damping) + 1e-9;
    row.push(-dot(left, residuals));
    return row;
  });
  for (let pivot = 0; pivot < size; pivot++) {
    let largest = pivot;
    for (let i = pivot + 1; i < size; i++) {
      if (Math.abs(rows[i]?.[pivot] ?? 0) > Math.abs(rows[largest]?.[pivot] ?? 0)) largest = i;
    }
    const top = rows[largest] ?? [];
    rows[largest] = rows[pivot] ?? [];
    rows[pivot] = top;
    for (let i = pivot + 1; i < size; i++) {
      const row = rows[i] ?? [];
      const factor = (row[pivot] ?? 0) / (top[pivot] ?? 1);
      for (let j = pivot; j <= size; j++) row[j] = (row[j] ?? 0) - factor * (top[j] ?? 0);
    }
  }
  const step = new Array<number>(size).fill(0);
  for (let i = size - 1; i >= 0; i--) {
    const row = rows[i] ?? [];
    let value = row[size] ?? 0;
    for (let j = i + 1; j < size; j++) value -= (row[j] ?? 0) * (step[j] ?? 0);
    step[i] = value / (row[i] ?? 1);
  }
  return step;
}

function dot(left: readonly number[], right: readonly number[]): number {
  let sum = 0;
  for (let i = 0; i < left.length; i++) sum += (left[i] ?? 0) * (right[i] ?? 0);
  return sum;
}
