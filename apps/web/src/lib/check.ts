/**
 * The device check: the bundle's golden pack, replayed here.
 *
 * The same comparisons as `fewstep verify` makes against the golden pack, under the same names: every recorded network
 * call on its own inputs, then every sample from its prompt and seed, with the latent after each step.
 */

import { FewstepError } from "./errors.js";
import type { BundleFiles } from "./files.js";
import { floorChecks, floorOf, median, trajectoryLimits, type Floor } from "./floor.js";
import { goldenPaths, readGolden, type GoldenSample } from "./golden.js";
import { artifactOf, scheduleOf, type Manifest } from "./manifest.js";
import { psnrDb, spread, sqnrDb } from "./metrics.js";
import type { Call, Sampler } from "./sampler.js";
import { numbers } from "./tensor.js";

/** One comparison; passed where the value keeps its limit. NaN never passes. */
export interface Check {
  error: "lowering";
  level: "component" | "trajectory" | "picture";
  component: string;
  step: number | null;
  /** Null for what is judged over several samples. */
  sample: string | null;
  tensor: string | null;
  metric:
    | "SQNR dB"
    | "PSNR dB"
    | "spread (std)"
    | "largest difference in levels, negated"
    | "median SQNR dB"
    | "median agreement dB";
  value: number;
  limit: number | null;
  passed: boolean;
}

export interface Timing {
  component: string;
  calls: number;
  median_ms: number;
}

export interface DeviceCheck {
  passed: boolean;
  checks: Check[];
  timings: Timing[];
  /** Whole samples at the bundle's default number of steps: median, from prompt to picture. */
  picture_ms: number;
}

export interface CheckProgress {
  done: number;
  total: number;
  what: string;
}

// Half an 8-bit level: a picture whose values spread less than this is one flat colour on every screen.
const FLAT = 0.5 / 255;

// A mean over a picture hides one value that is wrong: the rule of `fewstep.runtimes.parity.harness`.
const LARGEST = 8;
const HALF_LEVEL = 0.5 / 255;

// How many samples are compared with the noise floor: those that it was measured with.
const FLOOR_SAMPLES = 16;
/** What an artifact's `compute` says where it multiplies whole numbers. */
const INTEGERS = "int8";

interface Limits {
  /** Of one network call; null for components that are judged by the noise floor. */
  component: (name: string) => number | null;
  /** Of one sample; null where the noise floor judges. */
  picture: number | null;
  /** Where some components compute with whole numbers. */
  floor: { floor: Floor; mostDb: number; integers: string[] } | null;
}

export async function checkDevice(
  manifest: Manifest,
  files: BundleFiles,
  sampler: Sampler,
  onProgress: (progress: CheckProgress) => void = () => {},
  cancelled: () => boolean = () => false,
): Promise<DeviceCheck> {
  const limits = limitsOf(manifest);
  const paths = goldenPaths(files);
  const checks: Check[] = [];
  const calls: Call[] = [];
  const pictures: number[] = [];
  const labels: string[] = [];
  for (const [i, path] of paths.entries()) {
    const golden = await readGolden(files, path);
    onProgress({ done: i, total: paths.length, what: labelOf(golden) });
    labels.push(labelOf(golden));
    if (cancelled()) throw new DOMException("cancelled", "AbortError");
    checks.push(...(await checkCalls(golden, sampler, limits.component)));
    const start = performance.now();
    const found = await checkSample(golden, manifest, sampler, limits.picture, cancelled);
    checks.push(...found.checks);
    if (golden.steps === manifest.default_steps) {
      calls.push(...found.calls);
      pictures.push(performance.now() - start);
    }
  }
  onProgress({ done: paths.length, total: paths.length, what: "" });
  if (limits.floor !== null) {
    const { floor, mostDb, integers } = limits.floor;
    const some = labels.slice(0, FLOOR_SAMPLES);
    checks.push(...checkFloor(floor, mostDb, integers, checks.filter((check) => some.includes(check.sample!))));
  }
  const gated = checks.some((check) => check.limit !== null);
  return {
    passed: gated && checks.every((check) => check.passed),
    checks,
    timings: timingsOf(calls),
    picture_ms: median(pictures),
  };
}

/** Returns the first recorded sample's network calls, compared: the quick check before a provider is trusted. */
export async function checkProvider(manifest: Manifest, files: BundleFiles, sampler: Sampler): Promise<Check[]> {
  const golden = await readGolden(files, goldenPaths(files)[0]!);
  const once = golden.calls.filter((call, i, all) => all.findIndex((c) => c.component === call.component) === i);
  return checkCalls({ ...golden, calls: once }, sampler, limitsOf(manifest).component);
}

/** Returns the limits of a bundle: its recipe's, or its noise floor's where roundings of whole numbers decide. */
function limitsOf(manifest: Manifest): Limits {
  const limits = (manifest.recipe.limits ?? {}) as { [name: string]: unknown };
  const read = (name: string): number => {
    const value = limits[name];
    if (typeof value === "number") return value;
    throw new FewstepError("unsupported", `the recipe's limit ${name} is ${JSON.stringify(value)}`, "update the app");
  };
  const [component, picture] = [read("component_sqnr_db"), read("picture_psnr_db")];
  const integers = Object.keys(manifest.components).filter((name) => artifactOf(manifest, name).compute === INTEGERS);
  if (integers.length === 0) return { component: () => component, picture, floor: null };
  return {
    component: (name) => (integers.includes(name) ? null : component),
    picture: null,
    floor: { floor: floorOf(manifest), mostDb: picture, integers },
  };
}

function checkFloor(floor: Floor, mostDb: number, integers: readonly string[], checks: readonly Check[]): Check[] {
  const valuesOf = (name: string): number[] =>
    checks.filter((check) => check.level === "component" && check.component === name).map((check) => check.value);
  const samples = checks.filter((check) => check.level === "picture" && check.metric.endsWith("dB"));
  const calls = new Map(integers.map((name) => [name, valuesOf(name)]));
  const found = floorChecks(floor, mostDb, calls, samples.map((check) => check.value), samples[0]!.component);
  return found.map((check) => judged({ ...check, step: null, sample: null, tensor: null }));
}

const labelOf = ({ prompt, seed, negative, steps }: GoldenSample): string =>
  `${prompt} #${seed}${negative === undefined ? "" : `, without ${negative}`}, ${steps} steps`;

function judged(check: Omit<Check, "error" | "passed">): Check {
  const passed = !Number.isNaN(check.value) && (check.limit === null || check.value >= check.limit);
  return { error: "lowering", ...check, passed };
}

async function checkCalls(golden: GoldenSample, sampler: Sampler, limitOf: Limits["component"]): Promise<Check[]> {
  const checks: Check[] = [];
  for (const { component, step, branch, inputs, outputs } of golden.calls) {
    const found = await sampler.runComponent(component, inputs);
    for (const [name, reference] of Object.entries(outputs)) {
      const tensor = branch === "cond" ? name : `${name} (${branch})`;
      const result = found[name];
      const value = result === undefined ? NaN : sqnrDb(numbers(reference), numbers(result));
      const limit = limitOf(component);
      checks.push(
        judged({ level: "component", component, step, sample: labelOf(golden), tensor, metric: "SQNR dB", value, limit }),
      );
    }
  }
  return checks;
}

async function checkSample(
  golden: GoldenSample,
  manifest: Manifest,
  sampler: Sampler,
  limit: number | null,
  cancelled: () => boolean,
): Promise<{ checks: Check[]; calls: Call[] }> {
  const { prompt, guidance, negative, inputs, kind } = golden;
  const schedule = scheduleOf(manifest, golden.steps);
  const { output, latents, calls } = await sampler.sample({
    prompt,
    seed: BigInt(golden.seed),
    guidance,
    ...(negative === undefined ? {} : { negativePrompt: negative }),
    inputs,
    schedule,
    cancelled,
  });
  const sample = labelOf(golden);
  const limits = trajectoryLimits(limit, golden.latents, schedule.init_scale);
  const checks = golden.latents.map((reference, step) =>
    judged({
      level: "trajectory",
      component: "denoiser",
      step,
      sample,
      tensor: "latent",
      metric: "SQNR dB",
      value: sqnrDb(reference, latents[step] ?? []),
      limit: limits[step]!,
    }),
  );
  const [reference, result] = [numbers(golden.output), numbers(output)];
  const common = { level: "picture", step: null, sample, tensor: null } as const;
  const picture = kind === "picture";
  checks.push(
    judged({
      ...common,
      component: kind,
      metric: picture ? "PSNR dB" : "SQNR dB",
      value: picture ? psnrDb(reference, result) : sqnrDb(reference, result),
      limit,
    }),
    judged({ ...common, component: "picture", metric: "spread (std)", value: spread(result), limit: FLAT }),
  );
  if (picture && limit !== null) {
    let value = 0;
    for (let i = 0; i < reference.length; i++) value = Math.min(value, -255 * Math.abs(reference[i]! - result[i]!));
    const most = -255 * Math.max(HALF_LEVEL, LARGEST * 10 ** (-limit / 20));
    checks.push(judged({ ...common, component: "picture", metric: "largest difference in levels, negated", value, limit: most }));
  }
  return { checks, calls };
}

function timingsOf(calls: readonly Call[]): Timing[] {
  const components = [...new Set(calls.map((call) => call.component))];
  return components.map((component) => {
    const times = calls.filter((call) => call.component === component).map((call) => call.ms);
    return { component, calls: times.length, median_ms: median(times) };
  });
}
