/** The files of a bundle: fetched once, kept where the browser allows it, and checked before every use. */

import { FewstepError } from "./errors.js";
import type { FileEntry, Manifest } from "./manifest.js";
import { sha256 } from "./sha256.js";

type Bytes = Uint8Array<ArrayBuffer>;

/** Called while a file arrives: bytes so far, and in all. */
export type OnBytes = (path: string, received: number, total: number) => void;

/** Reads the files that a manifest lists. */
export class BundleFiles {
  constructor(
    /** The URL of the bundle's folder, with a slash at its end. */
    readonly base: string,
    private readonly entries: Manifest["files"],
    /** Keeps files for the next visit; null where the browser has no such storage (a page over http). */
    private readonly store: Cache | null,
    private readonly onBytes: OnBytes = () => {},
  ) {}

  entry(path: string): FileEntry {
    const entry = this.entries[path];
    if (entry === undefined) {
      throw new FewstepError("bundle", `${path} is not listed in the manifest`, "build the bundle again");
    }
    return entry;
  }

  has(path: string): boolean {
    return this.entries[path] !== undefined;
  }

  /** Returns the paths under a folder, sorted. */
  under(folder: string): string[] {
    return Object.keys(this.entries).filter((path) => path.startsWith(`${folder}/`)).sort();
  }

  /** Returns a file's content, which is what the manifest lists: its size and its SHA-256 are checked here. */
  async read(path: string): Promise<Bytes> {
    const entry = this.entry(path);
    // The address holds the hash, so that a newer bundle at the same place is never taken for the one that was kept.
    const url = `${this.base}${path}?sha256=${entry.sha256}`;
    const kept = await this.store?.match(url);
    if (kept !== undefined) {
      const bytes = new Uint8Array(await kept.arrayBuffer());
      if ((await mismatch(bytes, entry)) === null) return bytes;
      await this.store!.delete(url); // damaged on the device: fetched again below
    }
    let bytes = await this.fetch(path, url, entry, "default");
    let difference = await mismatch(bytes, entry);
    if (difference !== null) {
      // Perhaps the browser's own cache has a damaged copy: once more, past it.
      bytes = await this.fetch(path, url, entry, "reload");
      difference = await mismatch(bytes, entry);
    }
    if (difference !== null) {
      throw new FewstepError(
        "hash",
        `damaged file: ${path} ${difference}`,
        "it was altered or cut short on its way: try again, and if it stays so, put the bundle on the server again",
      );
    }
    await this.keep(url, bytes);
    return bytes;
  }

  async text(path: string): Promise<string> {
    return new TextDecoder().decode(await this.read(path));
  }

  private async keep(url: string, bytes: Bytes): Promise<void> {
    try {
      await this.store?.put(url, new Response(bytes));
    } catch (error) {
      // No room on the device: the file is here and good, it will only have to be fetched again.
      if (!(error instanceof DOMException && error.name === "QuotaExceededError")) throw error;
    }
  }

  private async fetch(path: string, url: string, entry: FileEntry, cache: RequestCache): Promise<Bytes> {
    const response = await fetchOrExplain(url, path, cache);
    if (response.body === null) return new Uint8Array(await response.arrayBuffer());
    // One buffer of the right size: joining chunks would need the memory twice.
    const bytes = new Uint8Array(entry.bytes);
    const reader = response.body.getReader();
    let received = 0;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (received + value.length > bytes.length) {
        await reader.cancel();
        throw new FewstepError("hash", `damaged file: ${path} has more than ${entry.bytes} bytes`, "put the bundle on the server again");
      }
      bytes.set(value, received);
      received += value.length;
      this.onBytes(path, received, entry.bytes);
    }
    return bytes.subarray(0, received);
  }
}

async function mismatch(bytes: Bytes, entry: FileEntry): Promise<string | null> {
  if (bytes.length !== entry.bytes) return `has ${bytes.length} bytes, expected ${entry.bytes}`;
  const digest = await sha256(bytes);
  return digest === entry.sha256 ? null : `has sha256 ${digest.slice(0, 12)}…, expected ${entry.sha256.slice(0, 12)}…`;
}

/** Returns the response to a request that succeeded. */
export async function fetchOrExplain(url: string, what: string, cache: RequestCache): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(url, { cache });
  } catch (error) {
    throw new FewstepError(
      "network",
      `cannot fetch ${what} (${error instanceof Error ? error.message : error})`,
      "check the connection and reload; once everything has been loaded, the app works offline",
    );
  }
  if (!response.ok) {
    throw new FewstepError(
      "network",
      `cannot fetch ${what}: the server answered ${response.status}`,
      "is the whole bundle on the server?",
    );
  }
  return response;
}
