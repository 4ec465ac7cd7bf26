/** That the parts of a manifest fit together, which its schema cannot say: `fewstep.bundle.consistency` checks the same. */

import { FewstepError } from "./errors.js";
import { isDenoiser, networkOf, type Component, type Manifest, type TensorSpec } from "./manifest.js";
import { checkOrigins, rowOf } from "./origins.js";
import { sizeOf } from "./tensor.js";

const MOST_VALUES = 2 ** 28;
const PHASES = ["before", "loop", "after"] as const;
const REBUILD = "build the bundle again; manifests are not edited";

/** Refuses a manifest in which one thing contradicts another. */
export function checkConsistent(manifest: Manifest): void {
  const { contract, components } = manifest;
  if (contract.latent_scale === 0) throw refuse("contract/latent_scale is 0, and the latent is divided by it");
  const { clip } = contract.output;
  if (clip !== null && !(clip[0] < clip[1])) throw refuse(`contract/output/clip is [${clip}], expected the lower number first`);
  refuseTwice("contract/inputs", contract.inputs.map((input) => input.name));
  refuseTooLarge("contract/latent_shape", contract.latent_shape);
  contract.inputs.forEach((input) => refuseTooLarge(`contract/inputs: ${input.name}`, input.shape));
  Object.entries(components).forEach(([name, component]) => checkComponent(name, component));
  checkSchedules(manifest);
  checkBindings(manifest);
  checkResults(manifest);
  checkFiles(manifest);
  checkOrigins(manifest);
}

const refuse = (problem: string): FewstepError => new FewstepError("bundle", `manifest.json: ${problem}`, REBUILD);

function refuseTwice(where: string, names: string[]): void {
  const twice = names.find((name, i) => names.indexOf(name) < i);
  if (twice !== undefined) throw refuse(`${where} has ${twice} twice`);
}

function refuseTooLarge(where: string, shape: readonly number[]): void {
  if (sizeOf(shape) > MOST_VALUES) throw refuse(`${where} is [${shape}], more than ${MOST_VALUES} values`);
}

function checkComponent(name: string, { inputs, outputs, bindings }: Component): void {
  refuseTwice(`components/${name}/inputs`, inputs.map((spec) => spec.name));
  refuseTwice(`components/${name}/outputs`, outputs.map((spec) => spec.name));
  [...inputs, ...outputs].forEach((spec) => refuseTooLarge(`components/${name}: ${spec.name}`, spec.shape));
  const names = inputs.map((spec) => spec.name);
  const unbound = names.find((input) => !Object.hasOwn(bindings, input));
  if (unbound !== undefined) throw refuse(`components/${name}: the input ${unbound} is bound to nothing`);
  const unknown = Object.keys(bindings).find((input) => !names.includes(input));
  if (unknown !== undefined) throw refuse(`components/${name}/bindings has ${unknown}, which is no input`);
}

function checkSchedules(manifest: Manifest): void {
  const { contract, components, schedules } = manifest;
  const rowed = (contract.form ?? "step") !== "step";
  if (rowed !== (contract.rows ?? []).length > 0) throw refuse(`contract/rows does not suit the form ${contract.form}`);
  if (schedules[String(manifest.default_steps)] === undefined) {
    throw refuse(`default_steps is ${manifest.default_steps}, which has no schedule`);
  }
  for (const [steps, table] of Object.entries(schedules)) {
    const columns = { ...table.times, ...Object.fromEntries(COLUMNS.map((name) => [name, table[name]])) };
    for (const [name, column] of Object.entries(columns)) {
      if (column.length !== table.timesteps.length) throw refuse(`schedules/${steps}: ${name} has ${column.length} entries`);
    }
    if (table.h.some((row, k) => row.length > k)) throw refuse(`schedules/${steps}: h reaches before the first step`);
    if (table.clip !== null && !(table.clip > 0)) throw refuse(`schedules/${steps}: clip is ${table.clip}, expected more than 0`);
    if (table.timesteps.length === 0) throw refuse(`schedules/${steps} has no timesteps`);
    if (![0, table.timesteps.length].includes(table.networks?.length ?? 0)) {
      throw refuse(`schedules/${steps}: networks has ${table.networks!.length} entries`);
    }
    for (let k = 0; k < table.timesteps.length; k++) {
      if (rowed) rowOf(contract, table, k);
      const name = networkOf(table, k);
      const network = Object.hasOwn(components, name) ? components[name]! : undefined;
      if (network?.phase !== "loop" || !isDenoiser(name)) {
        throw refuse(`schedules/${steps}/networks: ${JSON.stringify(name)} is no network of the loop`);
      }
      if (sizeOf(network.outputs[0]!.shape) !== latentOf(manifest)) {
        throw refuse(`schedules/${steps}: what ${name} puts out is [${network.outputs[0]!.shape}], no latent`);
      }
    }
    if ((table.init_anchor !== 0 || table.g.some((value) => value !== 0)) && contract.anchor === null) {
      throw refuse(`schedules/${steps} has a term for the anchor, and contract/anchor is null`);
    }
  }
}

const COLUMNS = ["timesteps", "s", "p", "q", "a", "b", "c", "g", "h"] as const;

const latentOf = ({ contract }: Manifest): number => (contract.batch ?? 1) * sizeOf(contract.latent_shape);

/** Refuses inputs that are bound to what comes later, or to another number of values; `checkOrigins` knows the names. */
function checkBindings(manifest: Manifest): void {
  const known = given(manifest);
  for (const phase of PHASES) {
    for (const [origin, size] of Object.entries(knownIn(manifest, phase))) known.set(origin, size);
    for (const [name, component] of Object.entries(manifest.components)) {
      if (component.phase !== phase) continue;
      for (const spec of component.inputs) checkBinding(manifest, `components/${name}: ${spec.name}`, spec, component.bindings[spec.name]!, known, phase);
      for (const spec of component.outputs) known.set(`${name}.${spec.name}`, sizeOf(spec.shape));
    }
  }
}

function checkBinding(manifest: Manifest, where: string, spec: TensorSpec, origin: string, known: Map<string, number>, phase: string): void {
  const noise = phase === "before" && /^noise:(0|[1-9]\d{0,9})$/.test(origin) && Number(origin.slice(6)) <= 2 ** 31;
  const draw = phase === "loop" && /^draw:[1-9]\d{0,4}$/.test(origin) && Number(origin.slice(5)) <= 65536;
  if (noise) known.set(origin, sizeOf(spec.shape)); // what was drawn before the loop is the same in it
  if (noise || draw) return;
  const size = known.get(origin);
  if (size === undefined) {
    checkOrigins(manifest); // what this app knows under no circumstances is told so
    throw refuse(`${where} is bound to ${JSON.stringify(origin)}, which is not known ${phase === "loop" ? "in" : phase} the loop`);
  }
  if (size !== 1 && size !== sizeOf(spec.shape)) {
    throw refuse(`${where} is ${spec.dtype} [${spec.shape}], and ${origin} has ${size} values`);
  }
}

function given({ contract, tokenizers }: Manifest): Map<string, number> {
  const batch = contract.batch ?? 1;
  const known = new Map<string, number>();
  for (const input of contract.inputs) if (input.kind !== "text") known.set(`input:${input.name}`, batch * Math.max(1, sizeOf(input.shape)));
  for (const [name, { length }] of Object.entries(tokenizers)) known.set(`tokens:${name}`, batch * length).set(`mask:${name}`, batch * length);
  if (contract.guidance.kind === "embedded" || contract.guidance.kind === "scalar") known.set("guidance_embedding", 1);
  return known;
}

function knownIn(manifest: Manifest, phase: string): { [origin: string]: number } {
  if (phase === "before") return {};
  if (phase === "after") return { sample: latentOf(manifest) };
  const tables = Object.values(manifest.schedules);
  const times = Object.keys(tables[0]!.times).filter((name) => tables.every((table) => Object.hasOwn(table.times, name)));
  const known = { latent: latentOf(manifest), timestep: 1, ...Object.fromEntries(times.map((name) => [`time:${name}`, 1])) };
  return (manifest.contract.form ?? "step") === "step" ? known : { ...known, step: 1 };
}

function checkResults(manifest: Manifest): void {
  const { contract, components } = manifest;
  const known = given(manifest);
  for (const [name, component] of Object.entries(components)) {
    if (component.phase !== "before") continue;
    for (const spec of component.outputs) known.set(`${name}.${spec.name}`, sizeOf(spec.shape));
  }
  for (const [name, origin] of [["initial", contract.initial], ["anchor", contract.anchor]] as const) {
    if (origin === null || /^noise:(0|[1-9]\d{0,9})$/.test(origin)) continue;
    if (known.get(origin) !== latentOf(manifest)) throw refuse(`contract/${name} is ${JSON.stringify(origin)}, which is no latent`);
  }
  const last = Object.values(components).filter((component) => component.phase === "after").at(-1)?.outputs[0]!.shape;
  const shape = last ?? [contract.batch ?? 1, ...contract.latent_shape];
  if (shape[0]! % (contract.batch ?? 1) !== 0 || (contract.output.kind === "picture" && shape.length !== 4)) {
    throw refuse(`the last output is [${shape}], which is no ${contract.output.kind}`);
  }
}

function checkFiles({ artifacts, components, contract, files, tokenizers }: Manifest): void {
  if (artifacts.length === 0) throw refuse("artifacts is empty: nothing can run it");
  refuseTwice("artifacts", artifacts.map((a) => `${a.runtime}/${a.component}/${(a as { variant?: string }).variant ?? ""}`));
  for (const artifact of artifacts) {
    if (!Object.hasOwn(components, artifact.component)) throw refuse(`artifacts: ${artifact.component} is no component`);
    if (!Object.hasOwn(files, artifact.path)) throw refuse(`artifacts: ${artifact.path} is not listed in files`);
  }
  for (const runtime of new Set(artifacts.map((a) => a.runtime))) {
    const missing = Object.keys(components).find((name) => !artifacts.some((a) => a.runtime === runtime && a.component === name));
    if (missing !== undefined) throw refuse(`artifacts: there is no ${missing} for ${runtime}`);
  }
  for (const path of Object.values(contract.guidance.unconditional)) {
    if (path !== "zeros" && !Object.hasOwn(files, path)) throw refuse(`contract/guidance/unconditional: ${path} is not listed in files`);
  }
  const texts = contract.inputs.filter((input) => input.kind === "text").map((input) => input.name);
  for (const [name, tokenizer] of Object.entries(tokenizers)) {
    if (!texts.includes(tokenizer.input)) throw refuse(`tokenizers/${name} is for ${tokenizer.input}, which is no text of contract/inputs`);
    if (!Object.hasOwn(files, `${tokenizer.folder}/tokenizer.json`)) throw refuse(`tokenizers/${name}: ${tokenizer.folder}/tokenizer.json is not listed in files`);
  }
}
