/**
 * How far two results are from each other, as `fewstep.numerics.metrics` computes it, in float64.
 *
 * Equal arrays give Infinity; anything that is not finite gives NaN, which is above no limit.
 */

import { FewstepError } from "./errors.js";

type Numbers = ArrayLike<number>;

/** Returns 10 log10(sum(reference²) / sum((value - reference)²)). */
export function sqnrDb(reference: Numbers, value: Numbers): number {
  const { signal, noise } = powers(reference, value);
  return ratioDb(signal, noise);
}

/** Returns the peak signal-to-noise ratio of values in [0, 1]. */
export function psnrDb(reference: Numbers, value: Numbers): number {
  return ratioDb(1, powers(reference, value).noise / reference.length);
}

/** Returns the standard deviation: a picture of one flat colour has none. */
export function spread(values: Numbers): number {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i]!;
  const mean = sum / values.length;
  let squares = 0;
  for (let i = 0; i < values.length; i++) squares += (values[i]! - mean) ** 2;
  return Math.sqrt(squares / values.length);
}

function powers(reference: Numbers, value: Numbers): { signal: number; noise: number } {
  if (reference.length !== value.length || reference.length === 0) {
    throw new FewstepError(
      "contract",
      `cannot compare ${value.length} values with ${reference.length}`,
      "the golden pack does not fit the networks: build the bundle again",
    );
  }
  let signal = 0;
  let noise = 0;
  for (let i = 0; i < reference.length; i++) {
    signal += reference[i]! ** 2;
    noise += (value[i]! - reference[i]!) ** 2;
  }
  return { signal, noise };
}

function ratioDb(signal: number, noise: number): number {
  if (!Number.isFinite(signal) || !Number.isFinite(noise)) return NaN;
  if (noise === 0) return Infinity;
  return signal === 0 ? -Infinity : 10 * Math.log10(signal / noise);
}
