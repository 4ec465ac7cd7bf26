/** A bundle at a URL: its manifest checked, its files read when they are needed, its generator ready to sample. */

import { FewstepError } from "./errors.js";
import { BundleFiles, fetchOrExplain, type OnBytes } from "./files.js";
import { artifactOf, parseManifest, RUNTIME, scheduleOf, type Manifest } from "./manifest.js";
import { ortSessions, type Ort, type Provider } from "./runtime.js";
import { Sampler, type Request, type Sample } from "./sampler.js";
import { checkSeal, checkSignature } from "./seal.js";
import { sha256 } from "./sha256.js";
import { Tokenizer } from "./tokenizer.js";

export interface OpenOptions {
  ort: Ort;
  provider?: Provider;
  /** Where files are kept for the next visit: `await caches.open(...)`, for instance. */
  store?: Cache | null;
  onBytes?: OnBytes;
  /** The Ed25519 key, 64 hex digits or PEM, that the bundle must be signed with; unless given, no signature is looked at. */
  publicKey?: string;
  /**
   * Whether the networks stay in memory between samples: faster, and more memory. Unless given, they do if their files
   * are smaller together than `KEPT_BYTES`.
   */
  keepOpen?: boolean;
}

/** Networks of more than this are opened in turn: a tab of a phone may hold about 1 GB. */
export const KEPT_BYTES = 300e6;

export type Prompt = Omit<Request, "schedule" | "seed"> & { seed?: bigint | number; steps?: number };

export class Bundle {
  private constructor(
    readonly manifest: Manifest,
    readonly files: BundleFiles,
    readonly sampler: Sampler,
  ) {}

  /** Returns the bundle whose folder is at a URL. */
  static async open(url: string | URL, options: OpenOptions): Promise<Bundle> {
    const { manifest, files } = await readBundle(url, options);
    const sampler = await openSampler(manifest, files, options);
    return new Bundle(manifest, files, sampler);
  }

  /** Returns the sample of a prompt. */
  async generate({ seed = 0, steps = this.manifest.default_steps, ...request }: Prompt): Promise<Sample> {
    return this.sampler.sample({ ...request, seed: BigInt(seed), schedule: scheduleOf(this.manifest, steps) });
  }

  /** Frees the networks. */
  async close(): Promise<void> {
    await this.sampler.close();
  }
}

/** Returns a manifest's text; what is no UTF-8 is refused and not replaced. */
function decode(bytes: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new FewstepError("bundle", "manifest.json is not JSON: it is no UTF-8", "copy the whole bundle again");
  }
}

/** Returns the manifest at a URL and what reads its files. */
export async function readBundle(
  url: string | URL,
  { store = null, onBytes, publicKey }: Pick<OpenOptions, "store" | "onBytes" | "publicKey">,
): Promise<{ manifest: Manifest; files: BundleFiles }> {
  const href = String(url);
  const base = href.endsWith("/") ? href : `${href}/`;
  const read = async (name: string): Promise<Uint8Array<ArrayBuffer>> => {
    const response = await fetchOrExplain(`${base}${name}`, name, "no-cache"); // it may be a newer one
    return new Uint8Array(await response.arrayBuffer());
  };
  const bytes = await read("manifest.json");
  const seal = await read("bundle.sha256");
  await checkSeal(bytes, seal);
  if (publicKey !== undefined) await checkSignature(seal, await read("bundle.sig"), publicKey);
  const manifest = parseManifest(decode(bytes));
  return { manifest, files: new BundleFiles(base, manifest.files, store, onBytes) };
}

/** Returns a sampler on a bundle's networks. */
export async function openSampler(manifest: Manifest, files: BundleFiles, options: OpenOptions): Promise<Sampler> {
  const tokenizers = new Map<string, Tokenizer>();
  for (const [name, spec] of Object.entries(manifest.tokenizers)) {
    tokenizers.set(name, new Tokenizer(await files.text(`${spec.folder}/tokenizer.json`), spec));
  }
  const bytes = Object.keys(manifest.components).reduce((sum, name) => sum + artifactOf(manifest, name).bytes, 0);
  const open = ortSessions(options.ort, options.provider ?? "wasm", manifest, files);
  return new Sampler(manifest, tokenizers, open, options.keepOpen ?? bytes < KEPT_BYTES);
}

/** Returns one hash for what a bundle computes: its networks, tokenizer and golden pack, and not its reports. */
export async function contentId(manifest: Manifest): Promise<string> {
  const paths = Object.keys(manifest.files).filter((path) => /^(golden|tokenizer|onnxruntime)\//.test(path));
  if (!paths.some((path) => path.startsWith(`${RUNTIME}/`))) {
    throw new FewstepError("bundle", `the bundle has nothing for ${RUNTIME}`, `build it with --target ${RUNTIME}`);
  }
  const lines = paths.sort().map((path) => `${manifest.files[path]!.sha256}  ${path}\n`);
  return sha256(new TextEncoder().encode(lines.join("")));
}
