// A browser, and two ways to serve the app: fewstep's own server, and a plain static host that can be told to misbehave.

import { execFile, spawn, type ChildProcess } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync } from "node:fs";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { extname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { chromium, devices, type Browser, type BrowserContext, type BrowserContextOptions, type Page } from "playwright-core";

export const repository = fileURLToPath(new URL("../../../../", import.meta.url));

const python = process.env.FEWSTEP_PYTHON ?? join(repository, ".venv/bin/python");
/** Bundles that the whole app is tested with; the first is the one that odd cases are made from. */
export const bundles = (process.env.FEWSTEP_BUNDLES ?? "build/stickers").split(",").map((path) => join(repository, path));
export const screenshots = join(repository, "build/app-screenshots");

const FLAGS = [
  ..."--headless --no-sandbox --disable-quic --no-first-run --disable-background-networking".split(" "),
  ..."--disable-component-update --disable-sync".split(" "),
];

export function browserPath(): string {
  const known = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
  const found = known.find((path) => path !== undefined && existsSync(path));
  if (found === undefined) throw new Error("no Chromium found: apt-get install chromium, or CHROMIUM=/path/to/chrome");
  return found;
}

export function launch(flags: string[] = ["--disable-gpu"]): Promise<Browser> {
  return chromium.launch({ executablePath: browserPath(), args: [...FLAGS, ...flags] });
}

export const phone: BrowserContextOptions = devices["Pixel 7"]!;
export const smallPhone: BrowserContextOptions = { ...phone, viewport: { width: 360, height: 640 }, screen: { width: 360, height: 640 } };
export const desktop: BrowserContextOptions = { viewport: { width: 1280, height: 860 } };

/** Returns what Python prints for some code. */
export async function runPython(code: string, ...args: string[]): Promise<string> {
  const { stdout } = await promisify(execFile)(python, ["-W", "ignore", "-c", code, ...args], { cwd: repository });
  return stdout;
}

const CLI = "from fewstep.cli import main; main()";
export const fewstep = (...args: string[]): Promise<string> => runPython(CLI, ...args);

export function temporary(): string {
  return mkdtempSync(join(tmpdir(), "fewstep-app-"));
}

export interface AppServer {
  /** Without the token. */
  url: string;
  /** With it, as the QR code has it: of the next result. */
  collectUrl: () => string;
  results: string;
  stop: () => void;
}

/** Starts `fewstep app --serve --collect`. */
export async function serve(bundle: string): Promise<AppServer> {
  const results = temporary();
  const args = ["-u", "-W", "ignore", "-c", CLI, "app", bundle, "--serve", "--port", "0", "--collect", results];
  const child: ChildProcess = spawn(python, args, { cwd: repository, stdio: ["ignore", "pipe", "pipe"] });
  let text = "";
  let errors = "";
  const addresses = (): string[] => [...text.matchAll(/^open {4}(\S+)/gm)].map((match) => match[1]!);
  child.stderr!.on("data", (data) => (errors += data));
  await new Promise<void>((resolve, reject) => {
    child.stdout!.on("data", (data) => {
      text += data;
      if (addresses().length > 0) resolve();
    });
    child.on("exit", (code) => reject(new Error(`fewstep app ended with ${code}: ${errors}`)));
  });
  const stop = (): void => {
    child.removeAllListeners("exit");
    child.kill("SIGINT");
    rmSync(results, { recursive: true, force: true });
  };
  return { url: addresses()[0]!.replace(/#.*/, ""), collectUrl: () => addresses().at(-1)!, results, stop };
}

const TYPES: { [extension: string]: string } = {
  ".css": "text/css",
  ".html": "text/html",
  ".js": "text/javascript",
  ".json": "application/json",
  ".mjs": "text/javascript",
  ".png": "image/png",
  ".svg": "image/svg+xml",
  ".webmanifest": "application/manifest+json",
};

/** A static host that sends no headers of its own but the type, the tag of the content and, for a few minutes, leave to keep a file. */
export class StaticHost {
  /** Changes a file on its way. */
  change: (path: string, content: Buffer) => Buffer | null = (_, content) => content;
  /** Body bytes sent, by path. */
  sent = new Map<string, number>();
  private server: Server | null = null;

  constructor(
    readonly folder: string,
    private readonly subfolder = "demo/",
  ) {}

  async start(): Promise<string> {
    this.server = createServer((request, response) => {
      const path = decodeURIComponent(new URL(request.url!, "http://host").pathname).slice(1 + this.subfolder.length) || "index.html";
      const file = join(this.folder, path);
      const inside = existsSync(file) && statSync(file).isFile();
      const content = inside ? this.change(path, readFileSync(file)) : null;
      if (content === null) return void response.writeHead(404).end();
      const tag = `"${createHash("sha256").update(content).digest("hex")}"`;
      const known = request.headers["if-none-match"] === tag;
      this.sent.set(path, (this.sent.get(path) ?? 0) + (known ? 0 : content.length));
      if (known) return void response.writeHead(304, { ETag: tag }).end();
      response.writeHead(200, {
        "Content-Type": TYPES[extname(path)] ?? "application/octet-stream",
        "Content-Length": content.length,
        "Cache-Control": "max-age=600",
        ETag: tag,
      });
      response.end(content);
    });
    await new Promise<void>((resolve) => this.server!.listen(0, "127.0.0.1", resolve));
    return `http://localhost:${(this.server.address() as AddressInfo).port}/${this.subfolder}`;
  }

  get bytesSent(): number {
    return [...this.sent.values()].reduce((a, b) => a + b, 0);
  }

  async stop(): Promise<void> {
    const server = this.server;
    if (server === null) return;
    this.server = null;
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }
}

/** Writes the static folder of a bundle. */
export async function writeSite(bundle: string): Promise<string> {
  const folder = join(temporary(), "site");
  await fewstep("app", bundle, "-o", folder);
  return folder;
}

/** Waits until the app can draw; throws what it says instead. */
export async function ready(page: Page): Promise<void> {
  await page.waitForFunction(() => {
    const enabled = document.querySelector<HTMLButtonElement>("#draw")?.disabled === false;
    return enabled || document.querySelector<HTMLElement>("#alert")?.hidden === false;
  });
  if (await page.locator("#alert").isVisible()) throw new Error(await page.locator("#alert").innerText());
}

/** Waits until the service worker has everything. */
export async function offlineReady(page: Page): Promise<void> {
  await page.waitForFunction(() => document.documentElement.dataset.offline !== undefined);
}

/** Draws a prompt with a seed, and waits for the picture. */
export async function draw(page: Page, prompt: string, seed: string): Promise<void> {
  await page.fill("#seed", seed);
  await page.fill("#prompt", prompt);
  await page.click("#draw");
  await page.waitForSelector("#actions", { state: "hidden" }).catch(() => {});
  await page.waitForSelector("#actions:not([hidden])");
}

/** Returns the pixels of the canvas, RGBA. */
export function pixels(page: Page): Promise<number[]> {
  return page.evaluate(() => {
    const canvas = document.querySelector("canvas")!;
    return [...canvas.getContext("2d")!.getImageData(0, 0, canvas.width, canvas.height).data];
  });
}

export function shots(): string {
  mkdirSync(screenshots, { recursive: true });
  return screenshots;
}

// The machines that run this are busy: waiting longer than it takes costs nothing.
const PATIENCE_MS = 120_000;

/** Opens a window that has never been anywhere. */
export async function freshContext(browser: Browser, options: BrowserContextOptions): Promise<BrowserContext> {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(PATIENCE_MS);
  return context;
}

/** Opens the app in a fresh context. */
export async function visit(browser: Browser, url: string, options: BrowserContextOptions = phone): Promise<{ context: BrowserContext; page: Page }> {
  const context = await freshContext(browser, options);
  const page = await context.newPage();
  await page.goto(url);
  return { context, page };
}
