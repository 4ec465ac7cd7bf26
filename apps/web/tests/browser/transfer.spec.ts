// What visits transfer, for every bundle: once all that is needed, then nothing.

import { readFileSync, rmSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import type { Browser } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Manifest } from "../../src/lib/manifest";
import { bundles, draw, launch, offlineReady, phone, ready, StaticHost, visit, writeSite } from "./harness";

// A first load over a phone's network, and what of it is not networks: app, ONNX Runtime, tokenizer, golden pack.
const MOST_BYTES = 30e6;
const MOST_BESIDE_NETWORKS = 8e6;

const megabytes = (bytes: number): string => `${(bytes / 1e6).toFixed(1)} MB`;

describe.each(bundles.map((path) => [basename(path), path]))("%s", (_, bundle) => {
  let browser: Browser;
  let site: string;
  beforeAll(async () => {
    [browser, site] = await Promise.all([launch(), writeSite(bundle)]);
  });
  afterAll(async () => {
    await browser?.close();
    rmSync(dirname(site), { recursive: true, force: true });
  });

  it("transfers everything at the first visit, nothing at the second", async () => {
    const host = new StaticHost(site);
    const { context, page } = await visit(browser, await host.start(), phone);
    await ready(page);
    await draw(page, "red apple", "1");
    const figures = await page.innerText("#figures");
    await offlineReady(page);
    const { artifacts } = JSON.parse(readFileSync(join(site, "bundle/manifest.json"), "utf-8")) as Manifest;
    const networks = artifacts.reduce((sum, artifact) => sum + artifact.bytes, 0);
    const first = host.bytesSent;
    host.sent.clear();
    await page.reload();
    await ready(page);
    await draw(page, "red apple", "2");
    await page.click("#run-check");
    await page.waitForSelector("#check-result .verdict");
    console.log(`${basename(bundle)}: ${megabytes(first)} at the first visit, of which networks ${megabytes(networks)}; ${host.bytesSent} bytes at the second; ${figures}`);
    expect(host.bytesSent).toBe(0);
    expect(first - networks).toBeLessThan(MOST_BESIDE_NETWORKS);
    const whole = artifacts.some((artifact) => artifact.compute === "int8");
    if (whole) expect(first).toBeLessThanOrEqual(MOST_BYTES); // what phones are sent
    await context.close();
    await host.stop();
  });
});
