/** What `manifest.json` says, checked: its JSON schema first, then that this library knows everything it asks for. */

import schema from "../../../../src/fewstep/manifest.schema.json";
import { checkConsistent } from "./consistency.js";
import { FewstepError } from "./errors.js";
import { firstSchemaError } from "./schema.js";
import { parseJson } from "./strict.js";

export interface TensorSpec {
  name: string;
  dtype: string;
  shape: number[];
}

export type Phase = "before" | "loop" | "after";

export interface Component {
  inputs: TensorSpec[];
  outputs: TensorSpec[];
  bindings: { [input: string]: string };
  phase: Phase;
}

export interface Guidance {
  kind: "none" | "embedded" | "two_pass";
  scale: number;
  frequencies: number[];
  factor: number;
  negative: string;
}

export interface InputSpec {
  name: string;
  kind: "text" | "class" | "image";
  shape: number[];
  count: number | null;
}

export interface OutputSpec {
  kind: "picture" | "audio" | "video" | "depth";
  scale: number;
  shift: number;
  clip: [number, number] | null;
  rate?: number | null;
}

export interface Contract {
  latent_shape: number[];
  latent_scale: number;
  latent_shift: number;
  prediction_type: string;
  guidance: Guidance;
  initial: string;
  anchor: string | null;
  inputs: InputSpec[];
  output: OutputSpec;
  noise: string;
  /** What the loop's networks are told of a step: its numbers, or which row of `rows` holds them. */
  form?: "step" | "table";
  rows?: { [origin: string]: number }[];
  /** How many samples one call of every network draws: this library draws one. */
  batch?: number;
}

export interface Schedule {
  timesteps: number[];
  timestep_dtype: string;
  init_scale: number;
  s: number[];
  p: number[];
  q: number[];
  a: number[];
  b: number[];
  c: number[];
  h: number[][];
  clip: number | null;
  source: string;
  times: { [name: string]: number[] };
  g: number[];
  init_anchor: number;
  /** Which component's output is F at each step; that of `DENOISER` at all of them unless given. */
  networks?: string[];
}

export interface TokenizerSpec {
  folder: string;
  length: number;
  pad_id: number;
  padding_side: "left" | "right";
  prefix: string;
  suffix: string;
  clean: boolean;
  input: string;
}

export interface Artifact {
  runtime: string;
  component: string;
  path: string;
  weights: string;
  compute: string;
  bytes: number;
}

export interface FileEntry {
  sha256: string;
  bytes: number;
}

export interface Manifest {
  schema_version: number;
  name: string;
  contract: Contract;
  components: { [name: string]: Component };
  tokenizers: { [name: string]: TokenizerSpec };
  schedules: { [steps: string]: Schedule };
  default_steps: number;
  artifacts: Artifact[];
  recipe: { [key: string]: unknown };
  prompts: string[];
  licences: { [part: string]: string };
  versions: { [part: string]: string };
  parity: { [key: string]: unknown } | null;
  caveats: string[];
  files: { [path: string]: FileEntry };
}

export const DENOISER = "denoiser";

/** Returns whether a network of the loop makes F: `DENOISER`, or, in the steps that call others, `denoiser_...`. */
export function isDenoiser(component: string): boolean {
  return component === DENOISER || component.startsWith(`${DENOISER}_`);
}

/** Returns the component whose output is F at step k. */
export function networkOf(schedule: Schedule, k: number): string {
  return schedule.networks?.[k] ?? DENOISER;
}

const REBUILD = "build the bundle again; manifests are not edited";
const UPDATE = "update the app, which is older than the bundle, or build the bundle without this";

/**
 * Returns the manifest.
 *
 * Throws FewstepError: `bundle` where the text is no manifest, `unsupported` where it asks for something that this
 * library does not do. A wrong picture would be worse than none, so an entry that is not known is refused.
 */
export function parseManifest(text: string): Manifest {
  const value = parseJson(text, "manifest.json");
  const version = (value as { schema_version?: unknown } | null)?.schema_version;
  const known = schema.properties.schema_version.const;
  if (version !== known) {
    throw new FewstepError("bundle", `manifest.json has schema version ${version}, expected ${known}`, UPDATE);
  }
  const error = firstSchemaError(schema, value);
  if (error !== null) {
    const unknown = error.message.startsWith("has an unknown entry");
    throw new FewstepError(unknown ? "unsupported" : "bundle", `manifest.json: ${error.path} ${error.message}`, unknown ? UPDATE : REBUILD);
  }
  const manifest = value as Manifest;
  refuseUnknown(manifest);
  Object.keys(manifest.files).forEach(refuseOutside);
  checkConsistent(manifest);
  return manifest;
}

/** The entries that this library reads (or knows to mean nothing to it), of every part that decides the picture. */
const KNOWN = {
  contract: "latent_shape latent_scale latent_shift prediction_type guidance initial anchor inputs output noise form rows batch",
  guidance: "kind scale frequencies factor negative",
  input: "name kind shape count",
  output: "kind scale shift clip rate",
  component: "inputs outputs bindings phase",
  schedule: "timesteps timestep_dtype init_scale s p q a b c h clip source times g init_anchor networks",
  tokenizer: "folder length pad_id padding_side prefix suffix clean input",
  artifact: "runtime component path weights compute bytes",
} as const;

const FORMS: readonly (string | undefined)[] = [undefined, "step", "table"];

/** The schema may have grown by what this library does not do yet: what is set there must be known here. */
function refuseUnknown(manifest: Manifest): void {
  const check = (part: keyof typeof KNOWN, where: string, value: object): void => {
    const known = KNOWN[part].split(" ");
    for (const [key, content] of Object.entries(value)) {
      if (!known.includes(key) && !isEmpty(content)) {
        throw new FewstepError("unsupported", `the bundle's ${where} uses ${key}, which this app does not know`, UPDATE);
      }
    }
  };
  const { contract } = manifest;
  check("contract", "contract", contract);
  if (!FORMS.includes(contract.form)) {
    throw new FewstepError("unsupported", `the bundle's networks have the form ${contract.form}, which this app does not know`, UPDATE);
  }
  if ((contract.batch ?? 1) !== 1) {
    throw new FewstepError("unsupported", `the bundle draws ${contract.batch} pictures at once, and this app one`, UPDATE);
  }
  check("guidance", "guidance", contract.guidance);
  check("output", "output", contract.output);
  contract.inputs.forEach((input) => check("input", `input ${input.name}`, input));
  Object.entries(manifest.components).forEach(([name, spec]) => check("component", name, spec));
  Object.entries(manifest.schedules).forEach(([steps, spec]) => {
    check("schedule", `schedule of ${steps} steps`, spec);
    const networks = spec.networks ?? [];
    const wrong = networks.find((name) => !isDenoiser(name) || manifest.components[name]?.phase !== "loop");
    if (wrong !== undefined || ![0, spec.timesteps.length].includes(networks.length)) {
      const what = wrong === undefined ? `${networks.length} networks` : `${wrong}, which is no network of the loop`;
      throw new FewstepError("bundle", `manifest.json: the schedule of ${steps} steps names ${what}`, REBUILD);
    }
  });
  Object.entries(manifest.tokenizers).forEach(([name, spec]) => check("tokenizer", `tokenizer ${name}`, spec));
  manifest.artifacts.forEach((spec) => check("artifact", `artifact ${spec.path}`, spec));
}

function isEmpty(content: unknown): boolean {
  if (content === null || content === false || content === "") return true;
  return typeof content === "object" && Object.keys(content!).length === 0;
}

/** Refuses a path that leaves the bundle, as `fewstep.bundle` does. */
function refuseOutside(path: string): void {
  const parts = path.split("/");
  if (/[\\:?#%\x00-\x1f\x7f]/.test(path) || parts.some((part) => ["", ".", ".."].includes(part))) {
    throw new FewstepError("bundle", `path ${JSON.stringify(path)} leaves the bundle`, "do not use this bundle");
  }
}

/** Returns the table for a number of steps. */
export function scheduleOf(manifest: Manifest, steps: number): Schedule {
  const schedule = manifest.schedules[String(steps)];
  if (schedule === undefined) {
    const have = stepCounts(manifest).join(", ");
    throw new FewstepError("contract", `the bundle has no schedule for ${steps} steps, it has ${have}`, `choose one of ${have}`);
  }
  return schedule;
}

export const stepCounts = (manifest: Manifest): number[] =>
  Object.keys(manifest.schedules).map(Number).sort((a, b) => a - b);

/** The runtime whose artifacts onnxruntime-web runs. */
export const RUNTIME = "onnxruntime";

/** Returns the ONNX model of a component. */
export function artifactOf(manifest: Manifest, component: string): Artifact {
  const artifact = manifest.artifacts.find((a) => a.runtime === RUNTIME && a.component === component);
  if (artifact === undefined) {
    const have = [...new Set(manifest.artifacts.map((a) => a.runtime))].join(", ") || "none";
    throw new FewstepError(
      "bundle",
      `the bundle has no ${component} for ${RUNTIME}, it has runtimes: ${have}`,
      `build it with \`fewstep build SOURCE --target ${RUNTIME}\``,
    );
  }
  return artifact;
}
