/** Where the value of a component's input comes from: the one place that knows the names of origins. */

import { FewstepError } from "./errors.js";
import { guidanceValue } from "./guidance.js";
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

/** Sets the guidance scale, which networks may want before the loop, too. */
export function setGuidance(values: Origins, w: number): void {
  values.set(GUIDANCE, w);
}

/** Sets what a step knows: the latent, its numbers, and which row of the contract's table holds them. */
export function setStep(values: Origins, contract: Contract, schedule: Schedule, k: number, x: Tensor): void {
  values.set(LATENT, x);
  for (const [origin, number] of Object.entries(stepNumbers(schedule, k))) values.set(origin, number);
  if (contract.form === "table") values.set(STEP, rowOf(contract, schedule, k));
}

/** Returns the row of the contract's table that holds the numbers of a schedule's step. */
export function rowOf(contract: Contract, schedule: Schedule, k: number): number {
  const numbers = Object.entries(stepNumbers(schedule, k));
  const rows = contract.rows ?? [];
  const row = rows.findIndex((given) => Object.keys(given).length === numbers.length && numbers.every(([name, n]) => given[name] === n));
  if (row >= 0) return row;
  const told = numbers.map(([name, number]) => `${name} ${number}`).join(", ");
  throw new FewstepError(
    "contract",
    `step ${k} of ${schedule.timesteps.length} has ${told}, which is none of the ${rows.length} steps that the bundle's networks are compiled for`,
    "build the bundle with these step counts (--steps), or with --form step for any",
  );
}

/** Returns the numbers that networks take at a step, by origin. */
function stepNumbers(schedule: Schedule, k: number): { [origin: string]: number } {
  const times = Object.entries(schedule.times).map(([name, column]) => [TIME + name, column[k]!]);
  return { [TIMESTEP]: schedule.timesteps[k]!, ...Object.fromEntries(times) };
}

/** Returns an input of a network, in its dtype and shape. */
export function bind(values: Origins, origin: string, spec: TensorSpec, contract: Contract): Tensor {
  const value = values.get(origin);
  if (value === undefined) throw unknownOrigin(origin, spec.name);
  const given = origin === GUIDANCE ? guidanceValue(contract.guidance, value as number) : value;
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
    ...[SAMPLE, LATENT, TIMESTEP, GUIDANCE],
    ...(contract.form === "table" ? [STEP] : []),
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
  for (const origin of Object.keys(contract.guidance.unconditional)) check(origin, "the unconditional pass");
}

function unknownOrigin(origin: string | undefined, name: string): FewstepError {
  return new FewstepError(
    "unsupported",
    `${name} is bound to ${JSON.stringify(origin ?? null)}, an origin that this app does not know`,
    "update the app: the bundle may be newer than it",
  );
}

function valuesOf(tensor: Tensor): ArrayLike<number | bigint> {
  return tensor.data instanceof BigInt64Array ? tensor.data : numbers(tensor);
}
