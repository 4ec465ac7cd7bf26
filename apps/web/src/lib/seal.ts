/**
 * What covers a bundle's manifest: `bundle.sha256`, its hash, and `bundle.sig`, an Ed25519 signature of that.
 *
 * The same as `fewstep.bundle.seal` in Python, which says why.
 */

import { FewstepError } from "./errors.js";
import { sha256 } from "./sha256.js";

type Bytes = Uint8Array<ArrayBuffer>;

const AGAIN = "put the whole bundle on the server again; if it was built before there were such hashes, build it again";

/** Refuses a manifest's bytes unless `bundle.sha256` is their hash; returns the bytes that a signature is of. */
export async function checkSeal(manifest: Bytes, seal: Bytes): Promise<void> {
  const found = await sha256(manifest);
  if (new TextDecoder().decode(seal) === `${found}  manifest.json\n`) return;
  throw new FewstepError("hash", `manifest.json has sha256 ${found.slice(0, 12)}…, and bundle.sha256 says another one`, AGAIN);
}

/**
 * Refuses a bundle unless `bundle.sig` is a signature of its `bundle.sha256` by a public key.
 *
 * `publicKey` is what `fewstep sign` prints (64 hex digits), or the text of a PEM file.
 */
export async function checkSignature(seal: Bytes, signature: Bytes, publicKey: string): Promise<void> {
  const key = keyBytes(publicKey);
  const name = `${hex(key).slice(0, 16)}…`;
  let stated: { algorithm?: unknown; signature?: unknown } | null;
  try {
    stated = JSON.parse(new TextDecoder().decode(signature));
  } catch {
    stated = null;
  }
  if (stated?.algorithm !== "Ed25519" || typeof stated.signature !== "string" || !/^[0-9a-f]{128}$/.test(stated.signature)) {
    throw new FewstepError("bundle", "bundle.sig is no Ed25519 signature of a bundle", "sign the bundle again");
  }
  const imported = await importKey(key);
  if (!(await crypto.subtle.verify("Ed25519", imported, fromHex(stated.signature), seal))) {
    throw new FewstepError(
      "hash",
      `the bundle's signature is not by the key ${name} for this manifest`,
      "do not use this bundle unless you know why; is it the right key?",
    );
  }
}

async function importKey(key: Bytes): Promise<CryptoKey> {
  const unsupported = (why: string): FewstepError =>
    new FewstepError(
      "unsupported",
      `this browser cannot check the bundle's signature: ${why}`,
      "use a browser with Ed25519 (Chrome 137, Firefox 129, Safari 17) over https, or check it with `fewstep verify --key`",
    );
  if (globalThis.crypto?.subtle === undefined) throw unsupported("the page has no WebCrypto, as over http");
  try {
    return await crypto.subtle.importKey("raw", key, "Ed25519", false, ["verify"]);
  } catch (error) {
    throw unsupported(`WebCrypto takes no Ed25519 keys (${error instanceof Error ? error.message : error})`);
  }
}

/** Returns the 32 bytes of a key. In PEM it is SubjectPublicKeyInfo, which for Ed25519 has 12 bytes before them (RFC 8410). */
function keyBytes(text: string): Bytes {
  const plain = text.trim();
  if (/^[0-9a-f]{64}$/.test(plain)) return fromHex(plain);
  const body = /^-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----$/.exec(plain)?.[1];
  const bytes = body === undefined ? null : fromBase64(body.replace(/\s/g, ""));
  if (bytes === null || bytes.length !== 44 || hex(bytes.subarray(0, 12)) !== "302a300506032b6570032100") {
    throw new FewstepError("contract", "the key is no Ed25519 public key", "give 64 hex digits, or the text of a PEM file");
  }
  return bytes.slice(12);
}

function fromBase64(text: string): Bytes | null {
  try {
    return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  } catch {
    return null;
  }
}

const fromHex = (text: string): Bytes => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
const hex = (bytes: Uint8Array): string => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
