/** The golden pack: samples recorded when the bundle was built, some of them with every network call. */

import { FewstepError } from "./errors.js";
import type { BundleFiles } from "./files.js";
import type { Tensors } from "./runtime.js";
import { readSafetensors } from "./safetensors.js";
import { floats, type Tensor } from "./tensor.js";

export interface GoldenCall {
  component: string;
  step: number | null;
  branch: "cond" | "uncond";
  inputs: Tensors;
  outputs: Tensors;
}

export interface GoldenSample {
  prompt: string;
  seed: number;
  steps: number;
  guidance: number;
  negative?: string;
  kind: string;
  inputs: Tensors;
  calls: GoldenCall[];
  latents: Float32Array[];
  output: Tensor;
}

/** Returns the paths of the samples at the bundle's first shape, in order; those of others are in folders of their own. */
export function goldenPaths(files: BundleFiles): string[] {
  const paths = files.under("golden").filter((path) => /^golden\/[^/]+\.safetensors$/.test(path));
  if (paths.length === 0) {
    throw new FewstepError("bundle", "the bundle has no golden samples to check against", "build the bundle again");
  }
  return paths;
}

export async function readGolden(files: BundleFiles, path: string): Promise<GoldenSample> {
  const { metadata, tensors } = readSafetensors(await files.read(path), path);
  const head = JSON.parse(metadata.fewstep ?? "null");
  const output = tensors.get("output");
  if (head === null || output === undefined) {
    throw new FewstepError("bundle", `${path} is not a sample`, "build the bundle again");
  }
  const under = (prefix: string): Tensors => {
    const found = [...tensors].filter(([name]) => name.startsWith(prefix));
    return Object.fromEntries(found.map(([name, tensor]) => [name.slice(prefix.length), tensor]));
  };
  const latents: Float32Array[] = [];
  for (let k = 0; tensors.has(`latents/${k}`); k++) latents.push(floats(tensors.get(`latents/${k}`)!, `latents/${k}`));
  return {
    ...head,
    inputs: under("inputs/"),
    calls: head.calls.map((call: Omit<GoldenCall, "inputs" | "outputs">, i: number) => ({
      ...call,
      inputs: under(`feeds/${i}/in/`),
      outputs: under(`feeds/${i}/out/`),
    })),
    latents,
    output,
  };
}
