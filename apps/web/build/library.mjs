// Builds the npm package in lib/: one module, and types for every module of the library.

import { execFileSync } from "node:child_process";
import { cpSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const web = dirname(dirname(fileURLToPath(import.meta.url)));
const out = join(web, "lib");

rmSync(out, { recursive: true, force: true });
await build({
  entryPoints: [join(web, "src/lib/index.ts")],
  outfile: join(out, "index.js"),
  bundle: true,
  format: "esm",
  target: "es2022",
  external: ["onnxruntime-web"],
  sourcemap: true,
});
// The manifest's schema lies outside this folder, so that tsc lays its output out from the top of the repository.
const types = mkdtempSync(join(tmpdir(), "fewstep-types-"));
const tsc = join(web, "node_modules/typescript/bin/tsc");
execFileSync(process.execPath, [tsc, "-p", join(web, "tsconfig.lib.json"), "--outDir", types], { stdio: "inherit" });
cpSync(join(types, "apps/web/src/lib"), out, { recursive: true });
cpSync(join(web, "../../LICENSE"), join(out, "LICENSE"));
rmSync(types, { recursive: true });
