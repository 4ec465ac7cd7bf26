// The browser's pictures against those of the same bundle in Python, and the device check, for every bundle.

import { readdirSync, readFileSync, rmSync } from "node:fs";
import { basename, join } from "node:path";
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { floorLimit, floorOf, median } from "../../src/lib/floor";
import type { Manifest } from "../../src/lib/manifest";
import { psnrDb } from "../../src/lib/metrics";
import { readSafetensors } from "../../src/lib/safetensors";
import { bundles, desktop, launch, phone, pixels, ready, draw, runPython, serve, temporary, visit, type AppServer } from "./harness";

interface Reference {
  prompt: string;
  seed: string;
}

/** Writes the Python bundle's pictures of 8 prompts x 2 seeds: see tests/web/references.py. */
async function references(bundle: string): Promise<{ cases: Reference[]; pictures: Float32Array[]; precision: string }> {
  const path = join(temporary(), "references.safetensors");
  await runPython("import sys; from tests.web.references import write; write(sys.argv[1], sys.argv[2])", bundle, path);
  const { metadata, tensors } = readSafetensors(new Uint8Array(readFileSync(path)), path);
  rmSync(path);
  const head = JSON.parse(metadata.fewstep!);
  return { ...head, pictures: head.cases.map((_: unknown, i: number) => tensors.get(String(i))!.data) };
}

const manifestOf = (bundle: string): Manifest => JSON.parse(readFileSync(join(bundle, "manifest.json"), "utf-8"));

/** Draws with the app's own worker, without the page around it, and returns the pictures as float32. */
async function drawRaw(page: Page, cases: Reference[]): Promise<Float32Array[]> {
  const script = page.workers().map((worker) => worker.url()).find((url) => url.includes("/worker-"))!;
  const found = await page.evaluate(
    async ({ script, cases }) => {
      const worker = new Worker(script, { type: "module", name: "test" });
      const answer = (type: string, command: object): Promise<any> =>
        new Promise((resolve, reject) => {
          worker.onmessage = ({ data }) => {
            if (data.type === type) resolve(data);
            if (data.type === "error") reject(new Error(data.message));
          };
          worker.postMessage(command);
        });
      const { bundle } = await answer("ready", { type: "open", bundle: new URL("./bundle/", location.href).href, engine: "wasm" });
      const pictures: number[][] = [];
      for (const [id, { prompt, seed }] of cases.entries()) {
        const request = { prompt, seed, steps: bundle.defaultSteps, guidance: null, negative: null, inputs: {}, previews: id % 2 === 0, raw: true };
        pictures.push([...(await answer("picture", { type: "generate", id, request })).output]);
      }
      worker.terminate();
      return pictures;
    },
    { script, cases },
  );
  return found.map((values) => Float32Array.from(values));
}

/** The limit of float pictures, and the most that is asked of others: beyond 8 bits of colour. */
const MOST_DB = 60;

describe.each(bundles.map((path) => [basename(path), path]))("%s", (_, bundle) => {
  let browser: Browser;
  let server: AppServer;
  let python: Awaited<ReturnType<typeof references>>;
  let drawn: Float32Array[];

  beforeAll(async () => {
    python = await references(bundle);
    [browser, server] = await Promise.all([launch(), serve(bundle)]);
  });
  afterAll(async () => {
    await browser?.close();
    server?.stop();
  });

  it("draws what Python draws: 8 prompts x 2 seeds", async () => {
    const { cases, pictures, precision } = python;
    expect(cases.length).toBe(16);
    const { context, page } = await visit(browser, server.url, desktop);
    await ready(page);
    drawn = await drawRaw(page, cases);
    await context.close();
    const agreement = drawn.map((picture, i) => psnrDb(pictures[i]!, picture));
    const said = `${precision}: picture PSNR to Python ${Math.min(...agreement).toFixed(1)} dB at least, median ${median(agreement).toFixed(1)}`;
    if (precision.includes("int8 compute")) {
      // Two right executions of whole numbers differ by the roundings that fall the other way: what PyTorch's two of this
      // bundle agree to decides (docs/quantization.md).
      const floor = floorOf(manifestOf(bundle)).picture;
      const limit = floorLimit(floor, agreement.length, MOST_DB);
      console.log(`${said}; the bundle's noise floor is ${floor.median_db.toFixed(1)}, the limit ${limit.toFixed(1)}`);
      expect(median(agreement)).toBeGreaterThanOrEqual(limit);
    } else {
      console.log(said);
      expect(Math.min(...agreement)).toBeGreaterThanOrEqual(precision.startsWith("fp") ? 80 : MOST_DB);
    }
  });

  it("shows that picture on the page", async () => {
    const { cases } = python;
    const { context, page } = await visit(browser, server.url, phone);
    await ready(page);
    await draw(page, cases[1]!.prompt, cases[1]!.seed);
    const shown = await pixels(page);
    const expected = drawn[1]!;
    const area = shown.length / 4;
    const off = Math.max(...Array.from({ length: 3 * area }, (_, i) => Math.abs(shown[4 * Math.floor(i / 3) + (i % 3)]! - 255 * expected[i]!)));
    await context.close();
    expect(off).toBeLessThan(0.501); // 8 bits, rounded
  });

  it("passes the device check and sends the result, once", async () => {
    const { context, page } = await visit(browser, server.collectUrl(), phone);
    await ready(page);
    expect(page.url()).toBe(server.url); // the token is not left in the address
    await page.click("#run-check");
    await page.waitForSelector("#check-result .verdict");
    expect(await page.innerText("#check-result .verdict")).toMatch(/^Passed: all \d+ comparisons$/);
    await page.click("#send-result");
    await page.waitForFunction(() => document.querySelector("#check-status")?.textContent === "Sent. Thank you.");
    const [file, ...others] = readdirSync(server.results);
    expect(others).toEqual([]);
    const code = `
import sys, json, fewstep
from pathlib import Path
from fewstep.pipeline.device_checks import read_device_report
found = read_device_report(Path(sys.argv[1]), fewstep.Bundle.open(sys.argv[2]))
print(json.dumps([bool(found.report), len(found.report.checks), found.report.executor]))`;
    const [passed, checks, executor] = JSON.parse(await runPython(code, join(server.results, file!), bundle));
    expect(passed).toBe(true);
    expect(checks).toBe(Number(/\d+/.exec(await page.innerText("#check-result .verdict"))![0])); // it judged as Python does
    expect(executor).toMatch(/^onnxruntime-web [\d.]+, wasm, \d+ threads, in Chrome \d+ on Android [\d.]+, \d+ cores$/);
    await context.close();
  });
});
