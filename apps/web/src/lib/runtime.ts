/** ONNX Runtime Web behind two verbs: open a model, run it. */

import type { InferenceSession, Tensor as OrtTensor } from "onnxruntime-web";
import { asFewstepError, FewstepError } from "./errors.js";
import type { BundleFiles } from "./files.js";
import { artifactOf, type Manifest, type TensorSpec } from "./manifest.js";
import { externalDataFiles } from "./onnx.js";
import { dtypeKind, type Tensor, type Values } from "./tensor.js";

/** What is used of the module `onnxruntime-web`: give it the build you ship. */
export interface Ort {
  InferenceSession: {
    create(model: Uint8Array, options: InferenceSession.SessionOptions): Promise<InferenceSession>;
  };
  Tensor: typeof OrtTensor;
}

export type Provider = "wasm" | "webgpu";
export type Tensors = { [name: string]: Tensor };

/** One component, ready to run. */
export interface Session {
  run(inputs: Tensors): Promise<Tensors>;
  close(): Promise<void>;
}

export type OpenSession = (component: string) => Promise<Session>;

/** Returns what opens the components of a bundle with ONNX Runtime, each checked against the manifest. */
export function ortSessions(ort: Ort, provider: Provider, manifest: Manifest, files: BundleFiles): OpenSession {
  return async (component) => {
    const { path } = artifactOf(manifest, component);
    const model = await files.read(path);
    const folder = path.slice(0, path.lastIndexOf("/") + 1);
    const names = externalDataFiles(model);
    const externalData = await Promise.all(
      names.map(async (name) => ({ path: name, data: await files.read(folder + name) })),
    );
    let session: InferenceSession;
    try {
      session = await ort.InferenceSession.create(model, {
        executionProviders: [provider],
        externalData,
        logSeverityLevel: 3,
      });
    } catch (error) {
      throw asFewstepError(error, `cannot load ${path}`);
    }
    const spec = manifest.components[component]!;
    const shown = (all: readonly string[]): string => `[${all.join(", ")}]`;
    for (const [found, wanted] of [
      [session.inputNames, spec.inputs.map((s) => s.name)],
      [session.outputNames, spec.outputs.map((s) => s.name)],
    ] as const) {
      if (shown(found) !== shown(wanted)) {
        await session.release();
        throw new FewstepError("contract", `${path} has ${shown(found)}, the manifest has ${shown(wanted)}`, "build the bundle again");
      }
    }
    return new OrtSession(ort, session, component, spec.outputs);
  };
}

class OrtSession implements Session {
  constructor(
    private readonly ort: Ort,
    private readonly session: InferenceSession,
    private readonly component: string,
    private readonly outputs: TensorSpec[],
  ) {}

  async run(inputs: Tensors): Promise<Tensors> {
    const feeds = Object.fromEntries(Object.entries(inputs).map(([name, tensor]) => [name, this.toOrt(tensor)]));
    try {
      const results = await this.session.run(feeds);
      const found: Tensors = {};
      for (const spec of this.outputs) found[spec.name] = await fromOrt(results[spec.name]!, spec, this.component);
      return found;
    } catch (error) {
      throw asFewstepError(error, `${this.component} failed`);
    } finally {
      Object.values(feeds).forEach((tensor) => tensor.dispose());
    }
  }

  async close(): Promise<void> {
    await this.session.release();
  }

  private toOrt({ dtype, shape, data }: Tensor): OrtTensor {
    return new this.ort.Tensor(dtypeKind(dtype, this.component).ort, data as never, shape);
  }
}

async function fromOrt(tensor: OrtTensor, spec: TensorSpec, component: string): Promise<Tensor> {
  const { ort } = dtypeKind(spec.dtype, `${component}.${spec.name}`);
  if (tensor.type !== ort || tensor.dims.join() !== spec.shape.join()) {
    throw new FewstepError(
      "contract",
      `${component}: ${spec.name} is ${tensor.type} [${tensor.dims}], expected ${spec.dtype} [${spec.shape}]`,
      "build the bundle again",
    );
  }
  // A view of ONNX Runtime's memory would change under us.
  const data = ((await tensor.getData()) as Values).slice();
  tensor.dispose();
  return { dtype: spec.dtype, shape: spec.shape, data };
}
