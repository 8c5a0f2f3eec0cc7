/** Vectors as directions: what may be compared by cosine, scaled to norm 1. Pure. */

/**
 * Why a vector cannot be compared by cosine: wrong number of dimensions, not finite, zero. When undefined, `out`,
 * which is as long or longer, begins with the vector at norm 1.
 */
export function normaliseInto(
  out: Float32Array,
  vector: Float32Array,
  dimension: number,
): string | undefined {
  if (vector.length !== dimension) {
    return `the vector has ${vector.length} dimensions, not ${dimension}`;
  }
  let squares = 0;
  for (let at = 0; at < dimension; at++) squares += (vector[at] ?? 0) * (vector[at] ?? 0);
  if (!Number.isFinite(squares)) return "the vector has a number that is not finite";
  if (squares === 0) return "the vector is zero: it has no direction";
  const factor = 1 / Math.sqrt(squares);
  for (let at = 0; at < dimension; at++) out[at] = (vector[at] ?? 0) * factor;
  return undefined;
}

/** In double precision, over the length of `a`. */
export function dotProduct(a: Float32Array | Float64Array, b: Float32Array | Float64Array): number {
  let sum = 0;
  for (let at = 0; at < a.length; at++) sum += (a[at] ?? 0) * (b[at] ?? 0);
  return sum;
}
