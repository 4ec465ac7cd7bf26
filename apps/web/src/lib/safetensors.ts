/** Reads safetensors: 8 bytes of length, a JSON header, and the values. */

import { FewstepError } from "./errors.js";
import { dtypeKind, dtypeOfSafetensors, sizeOf, type Tensor } from "./tensor.js";

export interface Safetensors {
  metadata: { [key: string]: string };
  tensors: Map<string, Tensor>;
}

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

export function readSafetensors(bytes: Uint8Array<ArrayBuffer>, where: string): Safetensors {
  const broken = (why: string): FewstepError =>
    new FewstepError("bundle", `${where} is not a safetensors file: ${why}`, "build the bundle again");
  if (bytes.length < 8) throw broken(`it has ${bytes.length} bytes`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = Number(view.getBigUint64(0, true));
  if (length > bytes.length - 8) throw broken("its header is longer than the file");
  const start = 8 + length;
  let header: { [name: string]: Entry };
  try {
    header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  } catch {
    throw broken("its header is not JSON");
  }
  const { __metadata__: metadata, ...entries } = header as { [name: string]: Entry } & { __metadata__?: Safetensors["metadata"] };
  const tensors = new Map<string, Tensor>();
  for (const [name, entry] of Object.entries(entries)) {
    const dtype = dtypeOfSafetensors(entry.dtype);
    if (dtype === undefined) throw broken(`${name} is ${entry.dtype}`);
    const kind = dtypeKind(dtype, name);
    const [from, to] = entry.data_offsets;
    if (to - from !== sizeOf(entry.shape) * kind.bytes || from < 0 || start + to > bytes.length) {
      throw broken(`${name} does not fit its bytes`);
    }
    // Copied: a view needs an offset that is a multiple of the item's size.
    const values = bytes.slice(start + from, start + to).buffer;
    tensors.set(name, { dtype, shape: entry.shape, data: kind.make(values) });
  }
  return { metadata: metadata ?? {}, tensors };
}
