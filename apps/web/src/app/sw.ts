/**
 * The service worker: the app's own files from a cache, checked once, with the headers that isolate the page.
 *
 * `fewstep app` writes the first line of sw.js, which says what this release holds. The networks are not here: the page
 * keeps them itself, by hash. Where a static host cannot send COOP and COEP headers, they are added on the way, so
 * that WebAssembly gets its threads from the second visit on.
 */

import { sha256 } from "../lib/sha256";

interface Release {
  version: string;
  /** Path, relative to this file, to SHA-256. */
  files: { [path: string]: string };
}

type FetchEvent = Event & { request: Request; respondWith(response: Promise<Response>): void };
type WaitEvent = Event & { waitUntil(work: Promise<unknown>): void };
interface Scope {
  FEWSTEP_RELEASE: Release;
  registration: ServiceWorkerRegistration;
  clients: { claim(): Promise<void> };
  skipWaiting(): Promise<void>;
  addEventListener(type: "install" | "activate", listener: (event: WaitEvent) => void): void;
  addEventListener(type: "fetch", listener: (event: FetchEvent) => void): void;
}

const scope = self as unknown as Scope;
const release = scope.FEWSTEP_RELEASE;
const PREFIX = "fewstep-app-";
const CACHE = PREFIX + release.version;
const root = new URL("./", location.href);

scope.addEventListener("install", (event) => event.waitUntil(install()));
scope.addEventListener("activate", (event) => event.waitUntil(activate()));
scope.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || url.origin !== root.origin || !url.pathname.startsWith(root.pathname)) return;
  const path = url.pathname.slice(root.pathname.length) || "index.html";
  if (release.files[path] !== undefined) event.respondWith(own(path, event.request));
});

async function install(): Promise<void> {
  const cache = await caches.open(CACHE);
  for (const [path, expected] of Object.entries(release.files)) {
    const { response, bytes } = (await expectedFile(path, expected, "default")) ?? (await expectedFile(path, expected, "reload")) ?? missing(path);
    const headers = new Headers(response.headers);
    headers.set("Cross-Origin-Opener-Policy", "same-origin");
    headers.set("Cross-Origin-Embedder-Policy", "require-corp");
    headers.delete("Content-Encoding"); // the body is decoded
    await cache.put(new URL(path, root), new Response(bytes, { headers }));
  }
  await scope.skipWaiting();
}

/** Returns a file and its content if it is the one of this release: the browser's own cache may have an older one. */
async function expectedFile(path: string, expected: string, cache: RequestCache): Promise<{ response: Response; bytes: Uint8Array<ArrayBuffer> } | null> {
  const response = await fetch(new URL(path, root), { cache });
  const bytes = new Uint8Array(await response.arrayBuffer());
  return response.ok && (await sha256(bytes)) === expected ? { response, bytes } : null;
}

function missing(path: string): never {
  throw new Error(`${path} is not the file of this release`); // the release before stays in use
}

async function activate(): Promise<void> {
  for (const name of await caches.keys()) if (name.startsWith(PREFIX) && name !== CACHE) await caches.delete(name);
  await scope.clients.claim();
}

async function own(path: string, request: Request): Promise<Response> {
  const cached = await (await caches.open(CACHE)).match(new URL(path, root));
  return cached ?? fetch(request);
}
