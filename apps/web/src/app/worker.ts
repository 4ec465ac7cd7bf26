/** Everything that computes, away from the page: loads the bundle, samples, replays the golden pack. */

import {
  artifactOf,
  asFewstepError,
  checkDevice,
  contentId,
  openSampler,
  readBundle,
  scheduleOf,
  stepCounts,
  type BundleFiles,
  type Manifest,
  type Sampler,
  type Tensor,
} from "../lib/index";
import { checkProvider } from "../lib/check";
import { ENGINE_VERSION, memoryInUse, startEngine, watchMemory, webgpuObstacle } from "./engine";
import type { BundleInfo, Command, EngineChoice, EngineInfo, GenerateRequest, PictureInfo, Pixels, Report } from "./messages";

interface Open {
  manifest: Manifest;
  files: BundleFiles;
  sampler: Sampler;
}

const post = (report: Report, transfer: Transferable[] = []): void => self.postMessage(report, { transfer });
/** Lets messages in, a cancellation for instance: awaiting ONNX Runtime alone does not. */
const breathe = (): Promise<void> => new Promise((resolve) => setTimeout(resolve));

watchMemory();
// While this worker lives it holds a lock of its own name; the page sees it die by getting the lock.
void navigator.locks?.request(self.name, () => new Promise<never>(() => {}));

let open: Open | null = null;
const cancelled = new Set<number>();

self.onmessage = ({ data }: MessageEvent<Command>) => {
  if (data.type === "cancel") cancelled.add(data.id);
  else void perform(data);
};

async function perform(command: Exclude<Command, { type: "cancel" }>): Promise<void> {
  const id = command.type === "open" ? null : command.id;
  try {
    if (command.type === "open") await load(command.bundle, command.engine);
    else if (open === null) throw new Error("no bundle is open");
    else if (command.type === "generate") await generate(open, command.id, command.request);
    else await check(open, command.id);
  } catch (thrown) {
    if (id !== null && thrown instanceof DOMException && thrown.name === "AbortError") return post({ type: "cancelled", id });
    const { kind, message, hint } = asFewstepError(thrown, "the engine stopped");
    post({ type: "error", id, kind, message, hint });
  } finally {
    if (id !== null) cancelled.delete(id);
  }
}

async function load(bundle: string, choice: EngineChoice): Promise<void> {
  const root = new URL("../", bundle).href;
  const store = "caches" in self ? await caches.open("fewstep-files") : null;
  let expected = 0;
  const arrived = new Map<string, number>();
  const { manifest, files } = await readBundle(bundle, {
    store,
    onBytes(path, received) {
      arrived.set(path, received);
      const sum = [...arrived.values()].reduce((a, b) => a + b, 0);
      post({ type: "loading", what: path, received: sum, total: Math.max(expected, sum) });
    },
  });
  const artifacts = Object.keys(manifest.components).map((name) => artifactOf(manifest, name));
  expected = artifacts.reduce((sum, artifact) => sum + artifact.bytes, 0);
  const { sampler, engine } = await openOnBest(root, choice, store, manifest, files);
  open = { manifest, files, sampler };
  const { guidance, inputs } = manifest.contract;
  const info: BundleInfo = {
    name: manifest.name,
    contentId: await contentId(manifest),
    inputs,
    stepCounts: stepCounts(manifest),
    defaultSteps: manifest.default_steps,
    guidance: guidance.kind === "none" || guidance.kind === "fixed" ? null : guidance.scale,
    takesNegative: guidance.takes_negative,
    prompts: manifest.prompts,
    licences: manifest.licences,
    caveats: manifest.caveats,
    precision: `${kinds(artifacts.map((a) => a.weights))} weights, ${kinds(artifacts.map((a) => a.compute))} arithmetic`,
    bytes: expected,
  };
  post({ type: "ready", bundle: info, engine });
  // Kept for the device check, so that it works offline, too.
  if (store !== null) {
    for (const path of files.under("golden")) await files.read(path);
    post({ type: "kept" });
  }
}

const kinds = (names: string[]): string => [...new Set(names)].sort().join(" and ");

/** Returns a sampler on WebGPU if it is there and computes what the golden pack says, else on WebAssembly. */
async function openOnBest(
  root: string,
  choice: EngineChoice,
  store: Cache | null,
  manifest: Manifest,
  files: BundleFiles,
): Promise<{ sampler: Sampler; engine: EngineInfo }> {
  if (manifest.contract.output.kind !== "picture") {
    throw asFewstepError(new Error(`the bundle makes ${manifest.contract.output.kind}, this app shows pictures`), manifest.name);
  }
  const precisions = Object.keys(manifest.components).map((name) => artifactOf(manifest, name).compute);
  let obstacle = await webgpuObstacle(choice, precisions);
  if (obstacle === null) {
    const { ort, threads, reasons } = await startEngine(root, "webgpu", store);
    const sampler = await openSampler(manifest, files, { ort, provider: "webgpu" });
    const verdict = await selfCheck(manifest, files, sampler, choice === "webgpu");
    if (verdict.trusted) {
      await sampler.openAll();
      return { sampler, engine: { provider: "webgpu", threads, version: ENGINE_VERSION, reasons: [...reasons, verdict.text] } };
    }
    obstacle = verdict.text;
    await sampler.close();
  }
  const { ort, threads, reasons } = await startEngine(root, "wasm", store);
  const sampler = await openSampler(manifest, files, { ort, provider: "wasm" });
  await sampler.openAll();
  return { sampler, engine: { provider: "wasm", threads, version: ENGINE_VERSION, reasons: [...reasons, `not WebGPU: ${obstacle}`] } };
}

// GPUs approximate exponentials and sines. Who asks for theirs gets it from here on, which is below what 8 bits show.
const LEAST_ASKED_FOR_DB = 80;

/** Returns whether a provider computes what the golden pack says, and how it did. */
async function selfCheck(
  manifest: Manifest,
  files: BundleFiles,
  sampler: Sampler,
  askedFor: boolean,
): Promise<{ trusted: boolean; text: string }> {
  try {
    const checks = await checkProvider(manifest, files, sampler);
    if (checks.length === 0) return { trusted: false, text: "there was nothing to check it with" };
    const failed = checks.filter((check) => !check.passed);
    if (failed.length === 0) return { trusted: true, text: "WebGPU passed the self-check" };
    const worst = failed.reduce((a, b) => (b.value < a.value || Number.isNaN(b.value) ? b : a));
    const text = `its ${worst.component} is at ${worst.value.toFixed(1)} dB, below ${worst.limit} dB`;
    return worst.value >= LEAST_ASKED_FOR_DB && askedFor
      ? { trusted: true, text: `WebGPU was asked for, though ${text}` }
      : { trusted: false, text };
  } catch (error) {
    return { trusted: false, text: `it failed (${asFewstepError(error, "WebGPU").message})` };
  }
}

async function generate({ manifest, sampler }: Open, id: number, request: GenerateRequest): Promise<void> {
  const start = performance.now();
  let paused = 0; // for previews, which are not the sample's own time
  const sample = await sampler.sample({
    prompt: request.prompt,
    seed: BigInt(request.seed),
    schedule: scheduleOf(manifest, request.steps),
    ...(request.guidance === null ? {} : { guidance: request.guidance }),
    ...(request.negative === null ? {} : { negativePrompt: request.negative }),
    inputs: Object.fromEntries(Object.entries(request.inputs).map(([name, value]) => [name, toTensor(value)])),
    cancelled: () => cancelled.has(id),
    async onStep({ done, steps, x0 }) {
      const from = performance.now();
      const preview = request.previews && done < steps ? toPixels(await sampler.decode(x0)) : null;
      post({ type: "step", id, done, steps, preview }, preview === null ? [] : [preview.rgba.buffer]);
      await breathe();
      paused += performance.now() - from;
    },
  });
  const ms = performance.now() - start - paused;
  const names = [...new Set(sample.calls.map((call) => call.component))];
  const components = names.map((component) => {
    const times = sample.calls.filter((call) => call.component === component).map((call) => call.ms);
    return { component, calls: times.length, ms: times.reduce((a, b) => a + b, 0) };
  });
  const info: PictureInfo = { ms, components, memory: memoryInUse() };
  const picture = toPixels(sample.output);
  const output = request.raw ? (sample.output.data as Float32Array) : null;
  post({ type: "picture", id, picture, info, output }, [picture.rgba.buffer]);
}

async function check({ manifest, files, sampler }: Open, id: number): Promise<void> {
  const result = await checkDevice(
    manifest,
    files,
    sampler,
    (progress) => post({ type: "checking", id, progress }),
    () => cancelled.has(id),
  );
  post({ type: "checked", id, check: result, memory: memoryInUse() });
}

function toTensor(value: GenerateRequest["inputs"][string]): Tensor {
  if (typeof value === "number") return { dtype: "int64", shape: [1], data: BigInt64Array.of(BigInt(value)) };
  return { dtype: "float32", ...value };
}

function toPixels({ shape, data }: Tensor): Pixels {
  const [height, width, channels] = shape as [number, number, number];
  const rgba = new Uint8ClampedArray(4 * width * height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) rgba[4 * i + c] = 255 * Number(data[channels * i + (channels === 3 ? c : 0)]); // rounds
    rgba[4 * i + 3] = 255;
  }
  return { width, height, rgba };
}
