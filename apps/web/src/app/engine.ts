/** ONNX Runtime Web in this browser: loaded from our own origin, checked, with as many threads as it may have. */

import { asFewstepError, BundleFiles, FewstepError, type Ort, type Provider } from "../lib/index";
import type { EngineChoice, Memory } from "./messages";

/** The parts of ONNX Runtime Web that this build ships, with their hashes: see vite.config.ts. */
declare const __ENGINE__: {
  version: string;
  builds: { [provider in Provider]: { script: string; loader: string; wasm: string } };
  files: { [path: string]: { sha256: string; bytes: number } };
};

export interface Engine {
  ort: Ort;
  threads: number;
  reasons: string[];
}

export const ENGINE_VERSION = __ENGINE__.version;

// More threads than this gain little on networks of this size, and phones have few fast cores.
const MOST_THREADS = 4;

// A module of one function that uses v128: (module (func (drop (v128.const i32x4 0 0 0 0)))).
const SIMD_MODULE = Uint8Array.from([
  ...[0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 23, 1, 21, 0, 253, 12],
  ...[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 26, 11],
]);

const memories: WebAssembly.Memory[] = [];

/** Remembers every memory that WebAssembly gets from here on: ONNX Runtime does not tell how much it has. */
export function watchMemory(): void {
  const Original = WebAssembly.Memory;
  WebAssembly.Memory = class extends Original {
    constructor(descriptor: WebAssembly.MemoryDescriptor) {
      super(descriptor);
      memories.push(this);
    }
  };
}

export const memoryInUse = (): Memory => ({
  wasmBytes: memories.reduce((sum, memory) => sum + memory.buffer.byteLength, 0),
});

/** Returns why WebGPU is not to be tried, null if it is. */
export async function webgpuObstacle(choice: EngineChoice, precisions: readonly string[]): Promise<string | null> {
  if (choice === "wasm") return "WebAssembly was asked for";
  const integer = precisions.find((precision) => !/^(fp|float)(16|32)$/.test(precision));
  if (integer !== undefined) return `${integer} arithmetic runs on the processor`;
  if (!("gpu" in navigator)) return "this browser has no WebGPU here";
  const adapter = await (navigator as any).gpu.requestAdapter();
  if (adapter === null) return "no GPU adapter";
  if (adapter.info?.isFallbackAdapter && choice !== "webgpu") return "the GPU adapter is software";
  return null;
}

/** Returns ONNX Runtime, started. `root` is the URL of the app's folder. */
export async function startEngine(root: string, provider: Provider, store: Cache | null): Promise<Engine> {
  if (!WebAssembly.validate(SIMD_MODULE)) {
    throw new FewstepError(
      "engine",
      "this browser's WebAssembly has no SIMD instructions, which the networks need",
      "update it: Chrome 91, Firefox 89, Safari 16.4 or later",
    );
  }
  const build = __ENGINE__.builds[provider];
  const files = new BundleFiles(root, __ENGINE__.files, store);
  try {
    const compressed = await files.read(build.wasm);
    const ort = await import(/* @vite-ignore */ `${root}${build.script}`);
    const reasons: string[] = [];
    const threads = threadCount(reasons);
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = threads;
    ort.env.wasm.wasmBinary = await inflate(compressed);
    ort.env.wasm.wasmPaths = { mjs: `${root}${build.loader}` };
    return { ort, threads, reasons };
  } catch (error) {
    throw asFewstepError(error, "cannot start ONNX Runtime");
  }
}

function threadCount(reasons: string[]): number {
  const cores = navigator.hardwareConcurrency || 1;
  if (!self.crossOriginIsolated) {
    reasons.push(
      self.isSecureContext
        ? "one thread: the page is not isolated yet; it will be after a reload"
        : "one thread: browsers allow more only over https (or on localhost)",
    );
    return 1;
  }
  return Math.min(cores, MOST_THREADS);
}

async function inflate(bytes: Uint8Array<ArrayBuffer>): Promise<ArrayBuffer> {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}
