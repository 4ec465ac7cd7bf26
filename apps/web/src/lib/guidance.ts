/** The guidance scale as the network wants it; see `fewstep.guidance`. */

import type { Guidance } from "./manifest.js";

const f32 = Math.fround;

/**
 * Returns the sinusoidal embedding of a guidance scale: sines, then cosines.
 *
 * Meng et al. (2022), "On distillation of guided diffusion models", arXiv:2210.03142. Angles are rounded to float32
 * first, because the network was trained on angles of that precision.
 */
export function guidanceEmbedding(guidance: Guidance, scale: number): Float32Array {
  const w = f32(f32(guidance.factor) * f32(scale - 1));
  const angles = guidance.frequencies.map((frequency) => f32(w * f32(frequency)));
  return Float32Array.from([...angles.map(Math.sin), ...angles.map(Math.cos)]);
}

/** Returns F_u + w (F_c - F_u): classifier-free guidance of Ho and Salimans (2022), arXiv:2207.12598. */
export function combine(unconditional: Float32Array, conditional: Float32Array, scale: number): Float32Array {
  const w = f32(scale);
  return unconditional.map((u, i) => u + f32(w * f32(conditional[i]! - u)));
}
