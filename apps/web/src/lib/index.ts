/** Runs fewstep bundles in a browser: `Bundle.open(url, { ort })`, then `bundle.generate({ prompt, seed })`. */

export { Bundle, contentId, KEPT_BYTES, openSampler, readBundle, type OpenOptions, type Prompt } from "./bundle.js";
export { checkDevice, type Check, type CheckProgress, type DeviceCheck } from "./check.js";
export { asFewstepError, FewstepError, type ErrorKind } from "./errors.js";
export { floorLimit, floorOf, type Agreement, type Floor } from "./floor.js";
export { BundleFiles, type OnBytes } from "./files.js";
export { artifactOf, parseManifest, scheduleOf, stepCounts, type Manifest } from "./manifest.js";
export { psnrDb, spread, sqnrDb } from "./metrics.js";
export { normal, philox4x32 } from "./noise.js";
export { ortSessions, type Ort, type Provider, type Session } from "./runtime.js";
export { readSafetensors } from "./safetensors.js";
export { Sampler, type Call, type Request, type Sample, type StepDone } from "./sampler.js";
export { advance, sampleLoop } from "./schedule.js";
export { checkSeal, checkSignature } from "./seal.js";
export { sha256 } from "./sha256.js";
export type { Tensor } from "./tensor.js";
export { Tokenizer } from "./tokenizer.js";
