// WebGPU on a GPU made of software: correct, and slow, so on a tiny random network; and what happens where it is wrong.

import { dirname } from "node:path";
import { rmSync } from "node:fs";
import type { Browser } from "playwright-core";
import { afterAll, beforeAll, expect, it } from "vitest";
import { desktop, launch, ready, runPython, StaticHost, visit, writeSite } from "./harness";

let browser: Browser;
let site: string;
let host: StaticHost;
let url: string;

beforeAll(async () => {
  const made = "from tests.support.bundles import built; print(built('lcm').bundle.path)";
  const bundle = process.env.FEWSTEP_MICRO_BUNDLE ?? (await runPython(made)).trim().split("\n").at(-1)!;
  site = await writeSite(bundle);
  host = new StaticHost(site);
  url = await host.start();
  browser = await launch(["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]);
}, 600_000); // building the network takes a minute or two
afterAll(async () => {
  await browser?.close();
  await host?.stop();
  rmSync(dirname(site), { recursive: true, force: true });
});

it("is used where it is asked for, and its accuracy said", async () => {
  const { context, page } = await visit(browser, `${url}?engine=webgpu`, desktop);
  await ready(page);
  // SwiftShader's exponentials cost the denoiser some decibels; hardware may do better.
  expect(await page.innerText("#facts")).toMatch(/WebGPU passed the self-check|WebGPU was asked for, though its \w+ is at (8|9)\d\.\d dB, below 100 dB/);
  expect(await page.innerText("#engine")).toMatch(/^WebGPU/);
  await page.fill("#prompt", "anything");
  await page.click("#draw");
  await page.waitForSelector("#actions:not([hidden])");
  await context.close();
});

it("is passed by where it is software and nobody asked for it", async () => {
  const { context, page } = await visit(browser, url, desktop);
  await ready(page);
  expect(await page.innerText("#facts")).toMatch(/not WebGPU: (the GPU adapter is software|no GPU adapter)/);
  await context.close();
});

it("is passed by where it computes something else", async () => {
  // A build that computes wrongly: the golden pack says so, here because its numbers are another network's.
  host.change = (path, content) => {
    if (!path.startsWith("assets/worker")) return content;
    return Buffer.from(content.toString().replaceAll('"SQNR dB",value:', '"SQNR dB",value:-1*'));
  };
  const { context, page } = await visit(browser, `${url}?engine=webgpu`, desktop);
  await ready(page);
  expect(await page.innerText("#facts")).toMatch(/not WebGPU: its \w+ is at -\d+\.\d dB, below 100 dB/);
  expect(await page.innerText("#engine")).toMatch(/^WebAssembly/);
  await context.close();
});
