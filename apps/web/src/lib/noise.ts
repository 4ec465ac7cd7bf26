/**
 * Normal noise from a seed, the same numbers as `fewstep.numerics.noise` in Python.
 *
 * Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and Box-Muller: element i of
 * draw `offset` has the counter [offset, 0, i low, i high] and the key [seed low, seed high]. The arithmetic is
 * float64, rounded to float32 once.
 */

import { FewstepError } from "./errors.js";

const MULTIPLIER_0 = 0xd2511f53;
const MULTIPLIER_1 = 0xcd9e8d57;
const KEY_STEP_0 = 0x9e3779b9;
const KEY_STEP_1 = 0xbb67ae85;
const ROUNDS = 10;

/** Returns the upper 32 bits of the product of two unsigned words of 32 bits. */
function multiplyHigh(a: number, b: number): number {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  // Each sum stays below 2^53, where float64 is exact.
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const carried = aLow * bHigh + (middle % 0x10000);
  return (aHigh * bHigh + Math.floor(middle / 0x10000) + Math.floor(carried / 0x10000)) >>> 0;
}

type Words = [number, number, number, number];

/** Returns the 10-round Philox4x32 block of a counter, four unsigned words of 32 bits. */
export function philox4x32(counter: Readonly<Words>, key: readonly [number, number]): Words {
  let [word0, word1, word2, word3] = counter;
  let [key0, key1] = key;
  for (let round = 0; round < ROUNDS; round++) {
    const high0 = multiplyHigh(word0, MULTIPLIER_0);
    const high1 = multiplyHigh(word2, MULTIPLIER_1);
    const low0 = Math.imul(word0, MULTIPLIER_0) >>> 0;
    const low1 = Math.imul(word2, MULTIPLIER_1) >>> 0;
    word0 = (high1 ^ word1 ^ key0) >>> 0;
    word1 = low1;
    word2 = (high0 ^ word3 ^ key1) >>> 0;
    word3 = low0;
    key0 = (key0 + KEY_STEP_0) >>> 0;
    key1 = (key1 + KEY_STEP_1) >>> 0;
  }
  return [word0, word1, word2, word3];
}

/**
 * Returns standard normal noise, `count` elements of draw `offset` of a seed.
 *
 * `seed` is 0 to 2^64 - 1; `offset` is 0 for the initial noise and 1 + k for the noise of step k.
 */
export function normal(seed: bigint, offset: number, count: number): Float32Array {
  if (seed < 0n || seed >= 1n << 64n) {
    throw new FewstepError("contract", `seed is ${seed}, expected 0 to 18446744073709551615`, "choose another seed");
  }
  if (!Number.isInteger(offset) || offset < 0 || offset >= 2 ** 32) {
    throw new FewstepError("contract", `offset is ${offset}, expected 0 to 4294967295`, "build the bundle again");
  }
  const key = [Number(seed & 0xffffffffn), Number(seed >> 32n)] as const;
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const [x, y] = philox4x32([offset, 0, i >>> 0, Math.floor(i / 2 ** 32)], key);
    // The half step keeps u in (0, 1], so the logarithm is finite.
    const u = x * 2 ** -32 + 2 ** -33;
    const v = y * (2 * Math.PI * 2 ** -32) + 2 * Math.PI * 2 ** -33;
    values[i] = Math.sqrt(-2 * Math.log(u)) * Math.sin(v);
  }
  return values;
}
