// The npm package, used as its README says: packed, installed beside onnxruntime-web, run in Node.

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, it } from "vitest";

const web = fileURLToPath(new URL("../", import.meta.url));
const asked = process.env.FEWSTEP_BUNDLES?.split(",")[0];
const bundle = join(web, "../..", asked ?? "build/stickers");

const CANVAS = `
globalThis.ImageData = class { constructor(w, h) { this.data = new Uint8ClampedArray(4 * w * h); } };
const canvas = { getContext: () => ({ putImageData: (image) => console.log(JSON.stringify([...image.data.slice(0, 400)])) }) };
globalThis.document = { querySelector: () => canvas };
`;

// A bundle that was asked for must be there; unit tests alone go without.
it.skipIf(asked === undefined && !existsSync(bundle))("runs the README's example in Node (needs build/stickers)", { timeout: 120_000 }, async () => {
  const folder = mkdtempSync(join(tmpdir(), "fewstep-package-"));
  execFileSync("npm", ["run", "--silent", "lib"], { cwd: web });
  const packed = execFileSync("npm", ["pack", "--silent", "--pack-destination", folder], { cwd: web, encoding: "utf-8" }).trim();
  mkdirSync(join(folder, "node_modules/fewstep-web"), { recursive: true });
  execFileSync("tar", ["xzf", join(folder, packed), "--strip-components=1", "-C", join(folder, "node_modules/fewstep-web")]);
  symlinkSync(join(web, "node_modules/onnxruntime-web"), join(folder, "node_modules/onnxruntime-web"));
  expect(existsSync(join(folder, "node_modules/fewstep-web/lib/index.d.ts"))).toBe(true);

  const server = createServer((request, response) => {
    const path = join(bundle, new URL(request.url!, "http://host").pathname.replace("/bundle/", ""));
    response.end(existsSync(path) ? readFileSync(path) : undefined);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = `http://localhost:${(server.address() as AddressInfo).port}/`;

  const example = /```js\n([\s\S]*?)```/.exec(readFileSync(join(web, "README.md"), "utf-8"))![1]!;
  writeFileSync(join(folder, "example.mjs"), `${CANVAS}globalThis.location = { href: "${address}" };\n${example}`);
  const { execFile } = await import("node:child_process");
  const output = await new Promise<string>((resolve, reject) =>
    execFile(process.execPath, ["example.mjs"], { cwd: folder }, (error, stdout, stderr) => (error ? reject(new Error(stderr)) : resolve(stdout))),
  );
  server.close();
  rmSync(folder, { recursive: true });
  const pixels = JSON.parse(output) as number[];
  expect(pixels.length).toBe(400);
  expect(new Set(pixels).size).toBeGreaterThan(1);
});
