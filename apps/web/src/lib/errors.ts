/** What can go wrong, as a person can act on it: `message` says where and what, `hint` what to do. */

export type ErrorKind =
  | "bundle" // the bundle is incomplete or not one
  | "hash" // a file is not the one that the manifest lists
  | "network" // a file could not be fetched
  | "unsupported" // the bundle needs something that this library does not do
  | "contract" // an argument or an array does not fit what the manifest promises
  | "memory" // the browser has no memory left
  | "engine"; // ONNX Runtime cannot run here, or stopped

export class FewstepError extends Error {
  override readonly name = "FewstepError";

  constructor(
    readonly kind: ErrorKind,
    message: string,
    readonly hint: string,
  ) {
    super(message);
  }
}

/** Returns whatever was thrown as one of our errors: those of WebAssembly and ONNX Runtime come as bare texts. */
export function asFewstepError(thrown: unknown, where: string): FewstepError {
  if (thrown instanceof FewstepError) return thrown;
  const text = thrown instanceof Error ? thrown.message : String(thrown);
  const outOfMemory = /bad_alloc|out of memory|could not allocate|allocation failed|failed to allocate|OOM/i;
  if (thrown instanceof RangeError || outOfMemory.test(text)) {
    return new FewstepError(
      "memory",
      `${where}: the browser has no memory left (${text})`,
      "close other tabs and reload, or use a bundle with int8 weights",
    );
  }
  return new FewstepError("engine", `${where}: ${text}`, "reload the page; if it happens again, try another browser");
}
