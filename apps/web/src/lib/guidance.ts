/** The guidance scale as the network wants it; see `fewstep.numerics.guidance`. */

import { FewstepError } from "./errors.js";
import type { Guidance } from "./manifest.js";

/** What `Guidance.unconditional` says of a value that is nothing but zeros. */
export const ZEROS = "zeros";

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

/** Returns what the network is told of a guidance scale: its embedding, or one number. */
export function guidanceValue(guidance: Guidance, scale: number): Float32Array {
  if (guidance.kind === "embedded") return guidanceEmbedding(guidance, scale);
  return Float32Array.of(f32(f32(f32(guidance.factor) * f32(scale)) + f32(guidance.shift)));
}

/** Returns whether a sample of this scale is made with two passes in each step. */
export function twoPasses(guidance: Guidance, scale: number): boolean {
  return guidance.kind === "two_pass" && (guidance.threshold === null || scale > guidance.threshold);
}

/** Returns the scale that a sample is made with; throws for a scale or a negative prompt that is not taken. */
export function checkGuidance(guidance: Guidance, scale: number | undefined, negative: string | undefined): number {
  if (scale !== undefined && scale !== guidance.scale && (guidance.kind === "none" || guidance.kind === "fixed")) {
    const why = guidance.kind === "none" ? "this generator takes none" : `this bundle is made for ${guidance.scale} alone`;
    const reason = guidance.reason === "" ? "" : `: ${guidance.reason}`;
    throw new FewstepError("contract", `guidance is ${scale}, but ${why}`, `leave the guidance out${reason}`);
  }
  if (negative !== undefined && !guidance.takes_negative) {
    throw new FewstepError("contract", "a negative prompt is given, but this generator takes none", "leave the negative prompt out");
  }
  return scale ?? guidance.scale;
}

/** Returns the origins whose values are given in the unconditional pass, for a user's negative prompt. */
export function replacedOrigins(guidance: Guidance, negative: string | undefined): string[] {
  return negative === undefined || (negative === "" && guidance.empty_is_none) ? Object.keys(guidance.unconditional) : [];
}

/** Returns F_u + w (F_c - F_u): classifier-free guidance of Ho and Salimans (2022), arXiv:2207.12598. */
export function combine(unconditional: Float32Array, conditional: Float32Array, scale: number): Float32Array {
  const w = f32(scale);
  return unconditional.map((u, i) => u + f32(w * f32(conditional[i]! - u)));
}
