/** The little that must be known of an ONNX file before ONNX Runtime gets it: where its weights are. */

// Field numbers of onnx.proto.
const MODEL_GRAPH = 7;
const GRAPH_INITIALIZER = 5;
const TENSOR_EXTERNAL_DATA = 13;
const ENTRY_KEY = 1;
const ENTRY_VALUE = 2;

/** Returns the files that hold weights outside the model, by the names that the model has for them. */
export function externalDataFiles(model: Uint8Array): string[] {
  const found = new Set<string>();
  for (const graph of fields(model, MODEL_GRAPH)) {
    for (const tensor of fields(graph, GRAPH_INITIALIZER)) {
      for (const entry of fields(tensor, TENSOR_EXTERNAL_DATA)) {
        if (text(entry, ENTRY_KEY) === "location") found.add(text(entry, ENTRY_VALUE));
      }
    }
  }
  return [...found];
}

function text(message: Uint8Array, field: number): string {
  for (const value of fields(message, field)) return new TextDecoder().decode(value);
  return "";
}

/** Yields the length-delimited values of one field of a protobuf message, as views. */
function* fields(message: Uint8Array, wanted: number): Generator<Uint8Array> {
  let at = 0;
  const varint = (): number => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = message[at++]!;
      value += (byte & 127) * scale; // exact below 2^53; negative numbers (10 bytes) are only skipped over
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const tag = varint();
    const wire = tag & 7;
    if (wire === 0) varint();
    else if (wire === 1) at += 8;
    else if (wire === 5) at += 4;
    else {
      const length = varint();
      if (tag >>> 3 === wanted) yield message.subarray(at, at + length);
      at += length;
    }
  }
}
