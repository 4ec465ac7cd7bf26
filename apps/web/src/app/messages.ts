/** What the page and its worker say to each other. */

import type { CheckProgress, DeviceCheck, ErrorKind } from "../lib/index";

/** A picture as a canvas takes it. */
export interface Pixels {
  width: number;
  height: number;
  rgba: Uint8ClampedArray<ArrayBuffer>;
}

export type EngineChoice = "auto" | "wasm" | "webgpu";

export interface GenerateRequest {
  prompt: string;
  /** Decimal: a number of JavaScript does not hold 64 bits. */
  seed: string;
  steps: number;
  guidance: number | null;
  /** Null where none is given, which is not the empty one. */
  negative: string | null;
  /** Classes by number, pictures as float32 [1, C, H, W] in [0, 1]. */
  inputs: { [name: string]: number | { shape: number[]; data: Float32Array } };
  previews: boolean;
  /** Whether the picture comes back as float32, too. */
  raw: boolean;
}

export type Command =
  | { type: "open"; bundle: string; engine: EngineChoice }
  | { type: "generate"; id: number; request: GenerateRequest }
  | { type: "check"; id: number }
  | { type: "cancel"; id: number };

export interface EngineInfo {
  provider: "wasm" | "webgpu";
  threads: number;
  version: string;
  /** Why it is this one: for people. */
  reasons: string[];
}

export interface InputInfo {
  name: string;
  kind: "text" | "class" | "image";
  shape: number[];
  count: number | null;
}

export interface BundleInfo {
  name: string;
  contentId: string;
  inputs: InputInfo[];
  stepCounts: number[];
  defaultSteps: number;
  guidance: number | null;
  takesNegative: boolean;
  prompts: string[];
  licences: { [part: string]: string };
  caveats: string[];
  precision: string;
  bytes: number;
}

export interface Memory {
  /** What WebAssembly holds: it never shrinks, so this is the peak. */
  wasmBytes: number;
}

export interface PictureInfo {
  ms: number;
  /** Milliseconds in each component, summed over its calls. */
  components: { component: string; calls: number; ms: number }[];
  memory: Memory;
}

export type Report =
  | { type: "loading"; what: string; received: number; total: number }
  | { type: "ready"; bundle: BundleInfo; engine: EngineInfo }
  /** Everything that the device check reads is on the device, too. */
  | { type: "kept" }
  | { type: "step"; id: number; done: number; steps: number; preview: Pixels | null }
  | { type: "picture"; id: number; picture: Pixels; info: PictureInfo; output: Float32Array | null }
  | { type: "checking"; id: number; progress: CheckProgress }
  | { type: "checked"; id: number; check: DeviceCheck; memory: Memory }
  | { type: "cancelled"; id: number }
  | { type: "error"; id: number | null; kind: ErrorKind; message: string; hint: string };
