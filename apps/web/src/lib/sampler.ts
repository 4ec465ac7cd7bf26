/** Prompt and seed in, picture out: the counterpart of `fewstep.runtimes.sampling.sampler` in Python. */

import { FewstepError } from "./errors.js";
import { checkGuidance, combine, replacedOrigins, twoPasses } from "./guidance.js";
import { isDenoiser, neededBefore, networkOf, type Contract, type InputSpec, type Manifest, type Phase, type Schedule } from "./manifest.js";
import { normal } from "./noise.js";
import {
  bind,
  checkOrigins,
  inputOf,
  isNoise,
  maskOf,
  outputOf,
  SAMPLE,
  rowOf,
  setGuidance,
  setStep,
  tokensOf,
  valueOrNoise,
  type Origins,
  type Value,
} from "./origins.js";
import type { OpenSession, Session, Tensors } from "./runtime.js";
import { sampleLoop, scaled } from "./schedule.js";
import { float32, floats, numbers, sizeOf, type Tensor } from "./tensor.js";
import type { Tokenizer } from "./tokenizer.js";

/** A request for one sample. */
export interface Request {
  prompt: string;
  seed: bigint;
  schedule: Schedule;
  /** The guidance scale; the generator's own unless given. */
  guidance?: number;
  /** What to keep away from; without it the pipeline's own way, which may be another than an empty text. */
  negativePrompt?: string;
  /** What the generator takes beside the prompt, by name. */
  inputs?: { [name: string]: Tensor };
  /** Called after each step with the latent and x0; sampling goes on when it has ended. */
  onStep?: (step: StepDone) => Promise<void> | void;
  /** Asked before each network call; true ends the sample with an AbortError. */
  cancelled?: () => boolean;
}

export interface StepDone {
  done: number;
  steps: number;
  latent: Float32Array;
  x0: Float32Array;
}

/** What a request made. */
export interface Sample {
  /** float32; a picture as [H, W, C] in [0, 1], anything else as its network has it. */
  output: Tensor;
  /** After each step. */
  latents: Float32Array[];
  calls: Call[];
}

/** One network call, and how long it took. */
export interface Call {
  component: string;
  step: number | null;
  branch: Branch;
  ms: number;
}

type Branch = "cond" | "uncond";

export class Sampler {
  private readonly sessions = new Map<string, Session>();
  private readonly contract: Contract;

  /**
   * `keepOpen` keeps every component's session for the next sample; without it each is closed when the next one's turn
   * comes, so that memory holds one at a time.
   */
  constructor(
    private readonly manifest: Manifest,
    private readonly tokenizers: ReadonlyMap<string, Tokenizer>,
    private readonly openSession: OpenSession,
    private readonly keepOpen: boolean,
    /** The tensors of the unconditional pass that are more than zeros, by origin. */
    private readonly unconditional: ReadonlyMap<string, Tensor> = new Map(),
  ) {
    checkOrigins(manifest);
    this.contract = manifest.contract;
  }

  async sample(request: Request): Promise<Sample> {
    const { contract } = this;
    const { schedule, seed } = request;
    const { guidance } = contract;
    const w = checkGuidance(guidance, request.guidance, request.negativePrompt);
    checkInputs(contract.inputs, request.inputs ?? {});
    if (contract.form === "table") schedule.timesteps.forEach((_, k) => rowOf(contract, schedule, k)); // before any work
    const calls: Call[] = [];
    const shape = [1, ...contract.latent_shape];
    const size = sizeOf(shape);
    const branches: Branch[] = twoPasses(guidance, w) ? ["uncond", "cond"] : ["cond"];
    const run = async (component: string, values: Origins, step: number | null, branch: Branch): Promise<Tensors> => {
      if (request.cancelled?.()) throw new DOMException("cancelled", "AbortError");
      const start = performance.now();
      const outputs = await this.call(component, values);
      calls.push({ component, step, branch, ms: performance.now() - start });
      return outputs;
    };

    const known = new Map<Branch, Origins>();
    for (const branch of branches) {
      const values = this.given(branch === "cond" ? request.prompt : (request.negativePrompt ?? guidance.negative), request);
      const fixed = this.fixed(branch === "cond" ? [] : replacedOrigins(guidance, request.negativePrompt));
      setGuidance(values, w);
      known.set(branch, values);
      const keep = (): void => fixed.forEach((value, origin) => values.set(origin, value));
      keep();
      const components = fixed.size === 0 ? this.phase("before") : neededBefore(this.manifest.components, new Set(fixed.keys()));
      for (const component of components) {
        this.drawNoise(component, values, seed);
        await run(component, values, null, branch);
        keep();
      }
    }
    const last = known.get("cond")!;
    const anchor = contract.anchor === null ? null : tensorFloats(last.get(contract.anchor), "the anchor");
    const first = valueOrNoise(last, contract.initial, shape, seed);
    let x = scaled(schedule.init_scale, tensorFloats(first, "the first latent"));
    if (anchor !== null && schedule.init_anchor) {
      const added = scaled(schedule.init_anchor, anchor);
      x = x.map((v, i) => v + added[i]!);
    }
    const denoise = async (k: number, latent: Float32Array): Promise<Float32Array> => {
      const outputs = new Map<Branch, Float32Array>();
      for (const branch of branches) {
        const values = known.get(branch)!;
        setStep(values, contract, schedule, k, float32(shape, latent));
        const network = networkOf(schedule, k);
        for (const component of this.phase("loop").filter((name) => name === network || !isDenoiser(name))) {
          const results = await run(component, values, k, branch);
          if (component === network) outputs.set(branch, tensorFloats(firstOf(results), network));
        }
      }
      const unconditional = outputs.get("uncond");
      const conditional = outputs.get("cond")!;
      return unconditional === undefined ? conditional : combine(unconditional, conditional, w + guidance.shift);
    };
    const latents: Float32Array[] = [];
    const steps = schedule.timesteps.length;
    x = await sampleLoop(schedule, x, {
      denoise,
      noise: (k) => normal(seed, k + 1, size),
      anchor,
      onStep: async (k, latent, x0) => {
        latents.push(latent);
        await request.onStep?.({ done: k + 1, steps, latent, x0 });
      },
    });
    const output = await this.finish(x, last, (component) => run(component, last, null, "cond"));
    return { output, latents, calls };
  }

  /** Returns what a latent looks like: the networks after the loop, on it alone. For previews of x0. */
  async decode(latent: Float32Array): Promise<Tensor> {
    const values: Origins = new Map();
    return this.finish(latent, values, (component) => this.call(component, values));
  }

  /** Returns the outputs of one component for given inputs: what the device check replays. */
  async runComponent(component: string, inputs: Tensors): Promise<Tensors> {
    return (await this.session(component)).run(inputs);
  }

  /** Opens every component, so that the first sample does not have to wait for them. */
  async openAll(onOpened: (component: string) => void = () => {}): Promise<void> {
    for (const component of Object.keys(this.manifest.components)) {
      await this.session(component);
      onOpened(component);
    }
  }

  async close(): Promise<void> {
    const open = [...this.sessions.values()];
    this.sessions.clear();
    for (const session of open) await session.close();
  }

  private async session(component: string): Promise<Session> {
    const open = this.sessions.get(component);
    if (open !== undefined) return open;
    if (!this.keepOpen) await this.close();
    const session = await this.openSession(component);
    this.sessions.set(component, session);
    return session;
  }

  private phase(phase: Phase): string[] {
    return Object.entries(this.manifest.components)
      .filter(([, component]) => component.phase === phase)
      .map(([name]) => name);
  }

  /** Returns all that is known before the first network call, by origin. */
  private given(text: string, request: Request): Origins {
    const values: Origins = new Map();
    for (const [name, tensor] of Object.entries(request.inputs ?? {})) values.set(inputOf(name), tensor);
    for (const [name, tokenizer] of this.tokenizers) {
      const { ids, mask } = tokenizer.encode(text);
      values.set(tokensOf(name), { dtype: "int64", shape: [1, ids.length], data: ids });
      values.set(maskOf(name), { dtype: "int64", shape: [1, mask.length], data: mask });
    }
    return values;
  }

  /** Returns the values of origins that are not computed in the unconditional pass: zeros, or what the bundle holds. */
  private fixed(origins: readonly string[]): Origins {
    return new Map(origins.map((origin) => [origin, this.unconditional.get(origin) ?? 0]));
  }

  private drawNoise(component: string, values: Origins, seed: bigint): void {
    const { inputs, bindings } = this.manifest.components[component]!;
    for (const spec of inputs) {
      const origin = bindings[spec.name]!;
      if (isNoise(origin)) values.set(origin, valueOrNoise(values, origin, spec.shape, seed));
    }
  }

  private async call(component: string, values: Origins): Promise<Tensors> {
    const spec = this.manifest.components[component]!;
    const inputs: Tensors = {};
    for (const input of spec.inputs) {
      inputs[input.name] = bind(values, spec.bindings[input.name]!, input, this.contract);
    }
    const outputs = await (await this.session(component)).run(inputs);
    for (const [name, tensor] of Object.entries(outputs)) values.set(outputOf(component, name), tensor);
    return outputs;
  }

  private async finish(x: Float32Array, values: Origins, run: (component: string) => Promise<Tensors>): Promise<Tensor> {
    const { contract } = this;
    const scale = Math.fround(contract.latent_scale);
    const shift = Math.fround(contract.latent_shift);
    const latent = x.map((v) => Math.fround(v / scale) + shift);
    let result = float32([1, ...contract.latent_shape], latent);
    values.set(SAMPLE, result);
    for (const component of this.phase("after")) result = firstOf(await run(component));
    return toOutput(result, contract);
  }
}

/** Returns the first result of a batch as the contract says; see `fewstep.numerics.outputs.to_output`. */
function toOutput(decoded: Tensor, { output }: Contract): Tensor {
  const f32 = Math.fround;
  const [, ...shape] = decoded.shape;
  const scale = f32(output.scale);
  const shift = f32(output.shift);
  const [low, high] = output.clip ?? [-Infinity, Infinity];
  const clipped = (y: number): number => (y < low ? low : y > high ? high : y); // a NaN stays one
  const y = Float32Array.from(numbers(decoded)).subarray(0, sizeOf(shape)).map((v) => clipped(f32(f32(v * scale) + shift)));
  if (output.kind !== "picture") return float32(shape, y);
  const [channels, height, width] = shape as [number, number, number];
  const area = height * width;
  const interleaved = new Float32Array(y.length);
  for (let i = 0; i < area; i++) for (let c = 0; c < channels; c++) interleaved[i * channels + c] = y[c * area + i]!;
  return float32([height, width, channels], interleaved);
}

function checkInputs(specs: readonly InputSpec[], given: { [name: string]: Tensor }): void {
  const wanted = specs.filter((spec) => spec.kind !== "text");
  for (const name of Object.keys(given)) {
    if (!wanted.some((spec) => spec.name === name)) {
      const takes = wanted.map((spec) => spec.name).join(", ") || "nothing beside a prompt";
      throw new FewstepError("contract", `unknown input ${name}, this generator takes ${takes}`, "leave it out");
    }
  }
  for (const spec of wanted) {
    const tensor = given[spec.name];
    const [dtype, shape] = spec.kind === "class" ? ["int64", [1]] : ["float32", spec.shape];
    if (tensor === undefined || tensor.dtype !== dtype || tensor.shape.join() !== shape.join()) {
      const found = tensor === undefined ? "missing" : `${tensor.dtype} [${tensor.shape}]`;
      throw new FewstepError("contract", `input ${spec.name} is ${found}, expected ${dtype} [${shape}]`, "give it");
    }
    const label = spec.kind === "class" ? Number((tensor.data as BigInt64Array)[0]) : 0;
    if (label < 0 || (spec.count !== null && label >= spec.count)) {
      throw new FewstepError("contract", `${spec.name} is ${label}, expected 0 to ${spec.count! - 1}`, "choose another");
    }
  }
}

function firstOf(outputs: Tensors): Tensor {
  return Object.values(outputs)[0]!;
}

function tensorFloats(value: Value | undefined, where: string): Float32Array {
  if (value === undefined || typeof value === "number") {
    throw new FewstepError("contract", `${where} is not an array`, "build the bundle again");
  }
  return floats(value, where);
}
