import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { build as bundle } from "esbuild";
import { gzipSync } from "fflate";
import { defineConfig, type Plugin } from "vite";

const here = fileURLToPath(new URL(".", import.meta.url));
const schema = "../../src/fewstep/manifest.schema.json";

const sha256 = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex");
const ort = (name: string): Uint8Array => readFileSync(`${here}node_modules/onnxruntime-web/dist/${name}`);

/** The parts of ONNX Runtime Web that are shipped, as they come from npm; WebAssembly compressed, so that any host sends little. */
const scripts = [
  "ort.wasm.min.mjs",
  "ort-wasm-simd-threaded.mjs",
  "ort.webgpu.min.mjs",
  "ort-wasm-simd-threaded.asyncify.mjs",
];
const binaries = ["ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.asyncify.wasm"];

// fflate and not zlib, whose output differs between versions of Node.
const compressed = new Map(binaries.map((name) => [`ort/${name}.gz`, gzipSync(ort(name), { level: 9, mtime: 0 })]));

const engine = {
  version: JSON.parse(readFileSync(`${here}node_modules/onnxruntime-web/package.json`, "utf-8")).version,
  builds: {
    wasm: {
      script: "ort/ort.wasm.min.mjs",
      loader: "ort/ort-wasm-simd-threaded.mjs",
      wasm: "ort/ort-wasm-simd-threaded.wasm.gz",
    },
    webgpu: {
      script: "ort/ort.webgpu.min.mjs",
      loader: "ort/ort-wasm-simd-threaded.asyncify.mjs",
      wasm: "ort/ort-wasm-simd-threaded.asyncify.wasm.gz",
    },
  },
  files: Object.fromEntries([...compressed].map(([path, b]) => [path, { sha256: sha256(b), bytes: b.length }])),
};

/** Returns the files that a build is made from, by path from this folder. tests/web/test_build.py looks at the same. */
function sources(): string[] {
  const folders = ["src", "public"].flatMap((folder) =>
    readdirSync(here + folder, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => `${entry.parentPath ?? entry.path}/${entry.name}`.replace(here, "")),
  );
  const alone = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts", schema];
  return [...folders, ...alone].map((path) => path.replaceAll("\\", "/")).sort();
}

/** Adds ONNX Runtime, the service worker, and build.json: what the build was made from and what it holds. */
const release = (): Plugin => ({
  name: "fewstep-release",
  apply: "build",
  async generateBundle(_, output) {
    const emit = (fileName: string, source: string | Uint8Array): void => void this.emitFile({ type: "asset", fileName, source });
    for (const name of scripts) emit(`ort/${name}`, ort(name).toString());
    for (const [path, bytes] of compressed) emit(path, bytes);
    const worker = await bundle({
      entryPoints: [`${here}src/app/sw.ts`],
      bundle: true,
      write: false,
      minify: true,
      format: "iife",
      target: "es2022",
    });
    emit("sw.js", worker.outputFiles[0]!.text);
    const made = Object.fromEntries(sources().map((path) => [path, sha256(readFileSync(here + path))]));
    emit("build.json", `${JSON.stringify({ sources: made }, null, 1)}\n`);
    void output;
  },
});

export default defineConfig({
  base: "./",
  plugins: [release()],
  define: { __ENGINE__: JSON.stringify(engine) },
  worker: { format: "es" },
  build: {
    outDir: "../../src/fewstep/app/static",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    assetsInlineLimit: 0,
    chunkSizeWarningLimit: 1000,
    reportCompressedSize: false,
  },
});
