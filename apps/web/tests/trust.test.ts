// What strangers' bundles are refused for, with the same verdicts as Python: tests/web/hostile.py writes the vectors.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { describe, expect, it, vi } from "vitest";
import { readBundle } from "../src/lib/bundle";
import { parseManifest } from "../src/lib/manifest";
import { patternProblem } from "../src/lib/patterns";
import { checkSeal, checkSignature } from "../src/lib/seal";

const vectors = (name: string): any =>
  JSON.parse(readFileSync(fileURLToPath(new URL(`../../../tests/vectors/${name}.json`, import.meta.url)), "utf-8"));

const bytes = (text: string): Uint8Array<ArrayBuffer> => new TextEncoder().encode(text);

describe("manifests", () => {
  const { manifest, changes } = vectors("hostile-manifests");
  const good = JSON.stringify(manifest);

  it("are read when nothing is wrong with them", () => expect(parseManifest(good).name).toBe("hostile"));

  const spoiled = (change: any): string => {
    if (change.text) return good.replace(change.text[0], () => change.text[1]);
    const whole = JSON.parse(good);
    const path = [...(change.set ?? change.remove)];
    const last = path.pop();
    const inside = path.reduce((value, part) => value[part], whole);
    if (change.set) inside[last] = change.value;
    else delete inside[last];
    return JSON.stringify(whole);
  };

  it.each(Object.entries(changes))("are refused for %s", (_, change) => {
    expect(spoiled(change)).not.toBe(good);
    let thrown: any;
    try {
      parseManifest(spoiled(change));
    } catch (error) {
      thrown = error;
    }
    expect(thrown?.name).toBe("FewstepError");
    expect(thrown.hint).not.toBe("");
  });
});

describe("patterns", () => {
  const { good, bad } = vectors("patterns");
  it.each(good as string[])("%s is run", (pattern) => expect(patternProblem(pattern)).toBeNull());
  it.each(bad as string[])("%s is not", (pattern) => expect(patternProblem(pattern)).not.toBeNull());
});

describe("the hash of a manifest", () => {
  const { manifest, seal, public_key, pem, other_key, signature } = vectors("signature");

  it("is checked", async () => {
    await checkSeal(bytes(manifest), bytes(seal));
    await expect(checkSeal(bytes(`${manifest} `), bytes(seal))).rejects.toThrow("bundle.sha256 says another one");
    await expect(checkSeal(bytes(manifest), bytes(seal.trim()))).rejects.toThrow("bundle.sha256 says another one");
  });

  it.each([public_key, pem])("is signed by %s", async (key) => checkSignature(bytes(seal), bytes(signature), key));

  it("is not signed by others, nor another one by this key", async () => {
    await expect(checkSignature(bytes(seal), bytes(signature), other_key)).rejects.toThrow("is not by the key");
    await expect(checkSignature(bytes(seal.replace(/^./, "x")), bytes(signature), public_key)).rejects.toThrow("is not by the key");
    await expect(checkSignature(bytes(seal), bytes("{}"), public_key)).rejects.toThrow("bundle.sig is no Ed25519 signature");
    await expect(checkSignature(bytes(seal), bytes("{"), public_key)).rejects.toThrow("bundle.sig is no Ed25519 signature");
    await expect(checkSignature(bytes(seal), bytes(signature), "key")).rejects.toThrow("the key is no Ed25519 public key");
  });

  it("is not said to be signed where the browser cannot tell", async () => {
    const without = { subtle: { importKey: async () => Promise.reject(new Error("Unrecognized name")) } };
    vi.stubGlobal("crypto", without);
    await expect(checkSignature(bytes(seal), bytes(signature), public_key)).rejects.toThrow(
      "this browser cannot check the bundle's signature: WebCrypto takes no Ed25519 keys (Unrecognized name)",
    );
    vi.stubGlobal("crypto", {});
    await expect(checkSignature(bytes(seal), bytes(signature), public_key)).rejects.toThrow("the page has no WebCrypto, as over http");
    vi.unstubAllGlobals();
  });
});

describe("a bundle at an address", () => {
  const { manifest } = vectors("hostile-manifests");
  const { public_key } = vectors("signature");

  const open = async (files: { [name: string]: string }, publicKey?: string): Promise<unknown> => {
    vi.stubGlobal("fetch", async (url: string) => {
      const name = url.slice("http://x/".length);
      return files[name] === undefined ? new Response(null, { status: 404 }) : new Response(files[name]);
    });
    try {
      return await readBundle("http://x", publicKey === undefined ? {} : { publicKey });
    } finally {
      vi.unstubAllGlobals();
    }
  };
  const text = JSON.stringify(manifest);
  const seal = async (content: string): Promise<string> => {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes(content)));
    return `${[...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("")}  manifest.json\n`;
  };

  it("is opened when its manifest has its hash", async () => {
    expect(await open({ "manifest.json": text, "bundle.sha256": await seal(text) })).toHaveProperty("manifest.name", "hostile");
  });

  it("is refused otherwise, and without a signature where one is asked for", async () => {
    await expect(open({ "manifest.json": `${text} `, "bundle.sha256": await seal(text) })).rejects.toThrow("says another one");
    await expect(open({ "manifest.json": text })).rejects.toThrow("cannot fetch bundle.sha256: the server answered 404");
    const unsigned = open({ "manifest.json": text, "bundle.sha256": await seal(text) }, public_key);
    await expect(unsigned).rejects.toThrow("cannot fetch bundle.sig: the server answered 404");
  });
});
