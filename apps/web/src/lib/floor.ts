/**
 * The noise floor: what two right executions of a network agree to that computes with whole numbers.
 *
 * The rule is that of `fewstep.runtimes.parity.quantized`, and both are tested with the same numbers.
 */

import { FewstepError } from "./errors.js";
import type { Manifest } from "./manifest.js";

/** What several comparisons came to, in dB. */
export interface Agreement {
  median_db: number;
  /** The standard deviation of normal values, from the median distance to the median. */
  spread_db: number;
  count: number;
}

export interface Floor {
  components: { [name: string]: Agreement };
  picture: Agreement;
}

/** A comparison of medians with the floor. */
export interface FloorCheck {
  level: "component" | "picture";
  component: string;
  metric: "median SQNR dB" | "median agreement dB";
  value: number;
  limit: number;
}

// How far below the noise floor a device may be, beyond what the samples leave unsure.
const BELOW_FLOOR_DB = 1;
// The standard error of the median of normal values, in those of their mean: sqrt(pi / 2).
const MEDIAN_TO_MEAN = 1.2533;
// A spread beyond that of right executions is not theirs: calls without a rounding that fell the other way, among others.
const MOST_SPREAD_DB = 3;
// Two executions of one network that agree to less would be two networks.
const LEAST_FLOOR_DB = 15;

/** Returns the floor that was measured when the bundle was built. */
export function floorOf(manifest: Manifest): Floor {
  const known = manifest.parity?.floor as Floor | null | undefined;
  if (known && [known.picture, ...Object.values(known.components ?? {})].every(isAgreement)) return known;
  const what = known ? "states its noise floor in another form than this app reads" : "does not say what its noise floor is";
  throw new FewstepError("bundle", `the bundle ${what}`, "build the bundle again");
}

function isAgreement(value: unknown): boolean {
  const { median_db, spread_db, count } = (value ?? {}) as Partial<Agreement>;
  return [median_db, spread_db, count].every((part) => typeof part === "number") && median_db! >= LEAST_FLOOR_DB && median_db! <= 150;
}

/**
 * Returns the least dB that the median of `count` values must have, to be no further away than the floor.
 *
 * Two standard errors of the difference of both medians are what so few values leave unsure; the spread is that of the
 * floor alone, so that values that scatter more are no excuse for themselves.
 */
export function floorLimit(floor: Agreement, count: number, mostDb: number): number {
  const unsure = 2 * MEDIAN_TO_MEAN * Math.min(floor.spread_db, MOST_SPREAD_DB) * Math.sqrt(1 / floor.count + 1 / count);
  return Math.min(floor.median_db - BELOW_FLOOR_DB - unsure, mostDb);
}

/**
 * Returns the checks of each component's calls and of the samples against the floor.
 *
 * @param mostDb what is asked at most: the limit of float pictures.
 * @param components the SQNR of each call, by component.
 * @param agreements the agreement of each sample.
 * @param kind what the samples are of.
 */
export function floorChecks(
  floor: Floor,
  mostDb: number,
  components: ReadonlyMap<string, readonly number[]>,
  agreements: readonly number[],
  kind: string,
): FloorCheck[] {
  const judge = (known: Agreement, values: readonly number[]) => ({
    value: median(values),
    limit: floorLimit(known, Math.max(values.length, 1), mostDb),
  });
  const calls = [...components].map(([component, values]): FloorCheck => {
    const known = floor.components[component];
    if (known === undefined) throw new FewstepError("bundle", `the noise floor says nothing of ${component}`, "build the bundle again");
    return { level: "component", component, metric: "median SQNR dB", ...judge(known, values) };
  });
  return [...calls, { level: "picture", component: kind, metric: "median agreement dB", ...judge(floor.picture, agreements) }];
}

/** Returns the value in the middle, or the mean of the two there; NaN of none. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  if (sorted.length === 0) return NaN;
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/**
 * Returns the limit of the latent after each step: the given one, or what float32 lets the reference itself keep.
 *
 * As `fewstep.runtimes.parity.harness.trajectory_limits`: of a latent that is thousands of times larger than the next, float32
 * keeps 2^-24. `start` is how large the first latent's noise is.
 */
export function trajectoryLimits(limit: number | null, latents: readonly Float32Array[], start: number): (number | null)[] {
  let before = Math.abs(start);
  let squared = 0;
  return latents.map((latent) => {
    const size = Math.sqrt(latent.reduce((sum, v) => sum + v * v, 0) / latent.length);
    if (size > 0) squared += ((2 ** -24 * before) / size) ** 2;
    before = size;
    return limit === null ? null : Math.min(limit, -10 * Math.log10(squared));
  });
}
