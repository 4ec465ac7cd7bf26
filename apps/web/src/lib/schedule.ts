/**
 * The sampler as a table of numbers, and the loop that runs it; see `fewstep.bundle.schedule`.
 *
 *     F   = network(s_k * x, t_k, further times of the step)
 *     x0  = clip(p_k * x + q_k * F)
 *     x   = a_k * x + b_k * x0 + c_k * n_k + sum_j h_kj * x0_{k-j} + g_k * anchor
 *
 * Every product and every sum is rounded to float32, in the order of the Python implementation.
 */

import { FewstepError } from "./errors.js";
import type { Schedule } from "./manifest.js";

const f32 = Math.fround;

/** Returns `coefficient * x`, the coefficient rounded to float32 first. */
export function scaled(coefficient: number, x: Float32Array): Float32Array {
  const c = f32(coefficient);
  return x.map((v) => c * v); // storing rounds
}

/** Returns `x + coefficient * y`. */
function plus(x: Float32Array, coefficient: number, y: Float32Array): Float32Array {
  const c = f32(coefficient);
  return x.map((v, i) => v + f32(c * y[i]!));
}

/** Returns the next latent and x0 of step k. */
export function advance(
  schedule: Schedule,
  k: number,
  x: Float32Array,
  F: Float32Array,
  noise: Float32Array | null,
  history: readonly Float32Array[],
  anchor: Float32Array | null,
): { x: Float32Array; x0: Float32Array } {
  let x0 = scaled(schedule.q[k]!, F);
  if (schedule.p[k]!) x0 = plus(x0, schedule.p[k]!, x);
  if (schedule.clip !== null) {
    const limit = f32(schedule.clip);
    x0 = x0.map((v) => (v > limit ? limit : v < -limit ? -limit : v)); // a NaN stays one
  }
  let next = scaled(schedule.b[k]!, x0);
  if (schedule.a[k]!) next = plus(next, schedule.a[k]!, x);
  if (schedule.c[k]!) next = plus(next, schedule.c[k]!, present(noise, `noise of step ${k}`));
  schedule.h[k]!.forEach((coefficient, j) => {
    next = plus(next, coefficient, present(history[history.length - 1 - j], `history of step ${k}`));
  });
  if (schedule.g[k]!) next = plus(next, schedule.g[k]!, present(anchor, `anchor of step ${k}`));
  return { x: next, x0 };
}

function present(array: Float32Array | null | undefined, what: string): Float32Array {
  if (array === null || array === undefined) {
    throw new FewstepError("contract", `${what} is missing`, "build the bundle again");
  }
  return array;
}

export interface Loop {
  /** (k, s_k * x) -> F, the network at step k with its conditions. */
  denoise: (k: number, x: Float32Array) => Promise<Float32Array>;
  /** k -> normal noise of step k; called only for steps that use noise. */
  noise: (k: number) => Float32Array;
  /** Called with (k, x after the step, x0 of the step). */
  onStep?: (k: number, x: Float32Array, x0: Float32Array) => Promise<void> | void;
  anchor?: Float32Array | null;
}

/** Returns the final latent. */
export async function sampleLoop(schedule: Schedule, initial: Float32Array, loop: Loop): Promise<Float32Array> {
  let x = initial;
  const history: Float32Array[] = [];
  for (let k = 0; k < schedule.timesteps.length; k++) {
    const F = await loop.denoise(k, schedule.s[k] === 1 ? x : scaled(schedule.s[k]!, x));
    const noise = schedule.c[k] ? loop.noise(k) : null;
    const step = advance(schedule, k, x, F, noise, history, loop.anchor ?? null);
    x = step.x;
    history.push(step.x0);
    await loop.onStep?.(k, x, step.x0);
  }
  return x;
}
