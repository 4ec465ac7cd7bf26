/** Where the value of a component's input comes from: the one place that knows the names of origins. */

import { FewstepError } from "./errors.js";
import { guidanceEmbedding } from "./guidance.js";
import type { Contract, Manifest, Schedule, TensorSpec } from "./manifest.js";
import { normal } from "./noise.js";
import { cast, numbers, sizeOf, type Tensor } from "./tensor.js";

/** Token ids of a text by a tokenizer, and which of them are not padding. */
export const tokensOf = (tokenizer: string): string => `tokens:${tokenizer}`;
export const maskOf = (tokenizer: string): string => `mask:${tokenizer}`;
/** What the user gave. */
export const inputOf = (name: string): string => `input:${name}`;
/** An output of another component. */
export const outputOf = (component: string, output: string): string => `${component}.${output}`;
/** The last latent, as the contract scales it for the decoder. */
export const SAMPLE = "sample";
/** s_k x_k */
export const LATENT = "latent";

const NOISE = "noise:";
const TIME = "time:";
const TIMESTEP = "timestep";
const STEP = "step";
const GUIDANCE = "guidance_embedding";

export type Value = Tensor | number;
export type Origins = Map<string, Value>;

/** Sets what a step knows: the latent, its time, its further numbers, and the guidance scale. */
export function setStep(values: Origins, manifest: Manifest, schedule: Schedule, k: number, x: Tensor, w: number): void {
  values.set(LATENT, x);
  values.set(TIMESTEP, schedule.timesteps[k]!);
  values.set(GUIDANCE, w);
  for (const [name, column] of Object.entries(schedule.times)) values.set(TIME + name, column[k]!);
  if (bindsStep(manifest)) values.set(STEP, stepRow(manifest, schedule, k));
}

/** Returns an input of a network, in its dtype and shape. */
export function bind(values: Origins, origin: string, spec: TensorSpec, contract: Contract): Tensor {
  const value = values.get(origin);
  if (value === undefined) throw unknownOrigin(origin, spec.name);
  const given = origin === GUIDANCE ? guidanceEmbedding(contract.guidance, value as number) : value;
  const data = typeof given === "number" ? [given] : given instanceof Float32Array ? given : valuesOf(given);
  const count = sizeOf(spec.shape);
  const same = data.length === count;
  if (!same && data.length !== 1) {
    throw new FewstepError(
      "contract",
      `${spec.name}: ${origin} has ${data.length} values, expected ${spec.dtype} [${spec.shape.join(", ")}]`,
      "build the bundle again",
    );
  }
  // A number of the step may be wanted once for every token.
  const filled = same ? data : new Array<number | bigint>(count).fill(data[0]!);
  return { dtype: spec.dtype, shape: spec.shape, data: cast(filled, spec.dtype, spec.name) };
}

/** Returns a value that may be noise of the seed, as float32 of a shape. */
export function valueOrNoise(values: Origins, origin: string, shape: readonly number[], seed: bigint): Value {
  const value = values.get(origin);
  if (value !== undefined) return value;
  if (!origin.startsWith(NOISE)) throw unknownOrigin(origin, "the first latent");
  return { dtype: "float32", shape, data: normal(seed, Number(origin.slice(NOISE.length)), sizeOf(shape)) };
}

export const isNoise = (origin: string): boolean => origin.startsWith(NOISE);

/** Refuses a bundle that binds an input to an origin which is not known here. */
export function checkOrigins(manifest: Manifest): void {
  const { contract, components, tokenizers } = manifest;
  const outputs = Object.entries(components).flatMap(([name, c]) => c.outputs.map((o) => outputOf(name, o.name)));
  const times = Object.values(manifest.schedules).flatMap((schedule) => Object.keys(schedule.times));
  const known = new Set([
    ...[SAMPLE, LATENT, TIMESTEP, STEP, GUIDANCE],
    ...Object.keys(tokenizers).flatMap((name) => [tokensOf(name), maskOf(name)]),
    ...contract.inputs.filter((input) => input.kind !== "text").map((input) => inputOf(input.name)),
    ...times.map((name) => TIME + name),
    ...outputs,
  ]);
  const check = (origin: string | undefined, name: string): void => {
    if (origin === undefined || !(known.has(origin) || /^noise:\d+$/.test(origin))) throw unknownOrigin(origin, name);
  };
  for (const [name, component] of Object.entries(components)) {
    for (const input of component.inputs) check(component.bindings[input.name], `${name}.${input.name}`);
  }
  check(contract.initial, "the first latent");
  if (contract.anchor !== null) check(contract.anchor, "the anchor");
  if (bindsStep(manifest)) Object.values(manifest.schedules).forEach((schedule) => stepRow(manifest, schedule, 0));
}

function unknownOrigin(origin: string | undefined, name: string): FewstepError {
  return new FewstepError(
    "unsupported",
    `${name} is bound to ${JSON.stringify(origin ?? null)}, an origin that this app does not know`,
    "update the app: the bundle may be newer than it",
  );
}

const bindsStep = (manifest: Manifest): boolean =>
  Object.values(manifest.components).some((component) => Object.values(component.bindings).includes(STEP));

/** Returns the row of step k in the tables that time folded into. */
function stepRow(manifest: Manifest, _schedule: Schedule, k: number): number {
  if (Object.keys(manifest.schedules).length !== 1) {
    throw new FewstepError(
      "unsupported",
      "networks bound to the step's row with schedules for several step counts, whose rows this app cannot tell apart",
      "build the bundle with one step count: fewstep build ... --steps 4",
    );
  }
  return k;
}

function valuesOf(tensor: Tensor): ArrayLike<number | bigint> {
  return tensor.data instanceof BigInt64Array ? tensor.data : numbers(tensor);
}
