/** Arrays as networks take them: a dtype by its numpy name, a shape, and the values row-major. */

import { FewstepError } from "./errors.js";

export type Values =
  | Float32Array
  | Float64Array
  | Uint16Array
  | Int32Array
  | BigInt64Array
  | Int8Array
  | Uint8Array;

export interface Tensor {
  readonly dtype: string;
  readonly shape: readonly number[];
  /** float16 as its bits. */
  readonly data: Values;
}

interface Kind {
  /** The name that ONNX Runtime has for the dtype. */
  ort: "float32" | "float64" | "float16" | "int32" | "int64" | "int8" | "uint8" | "bool";
  /** The name that safetensors has for it. */
  safetensors: string;
  make: (buffer: ArrayBuffer) => Values;
  bytes: number;
}

const KINDS: { readonly [dtype: string]: Kind } = {
  float32: { ort: "float32", safetensors: "F32", make: (b) => new Float32Array(b), bytes: 4 },
  float64: { ort: "float64", safetensors: "F64", make: (b) => new Float64Array(b), bytes: 8 },
  float16: { ort: "float16", safetensors: "F16", make: (b) => new Uint16Array(b), bytes: 2 },
  int32: { ort: "int32", safetensors: "I32", make: (b) => new Int32Array(b), bytes: 4 },
  int64: { ort: "int64", safetensors: "I64", make: (b) => new BigInt64Array(b), bytes: 8 },
  int8: { ort: "int8", safetensors: "I8", make: (b) => new Int8Array(b), bytes: 1 },
  uint8: { ort: "uint8", safetensors: "U8", make: (b) => new Uint8Array(b), bytes: 1 },
  bool: { ort: "bool", safetensors: "BOOL", make: (b) => new Uint8Array(b), bytes: 1 },
};

export function dtypeKind(dtype: string, where: string): Kind {
  const kind = KINDS[dtype];
  if (kind === undefined) {
    throw new FewstepError(
      "unsupported",
      `${where} is ${dtype}, expected one of ${Object.keys(KINDS).join(", ")}`,
      "update the app: the bundle may be newer than it",
    );
  }
  return kind;
}

/** Returns the numpy name of a dtype of safetensors, undefined for one that is not known. */
export function dtypeOfSafetensors(name: string): string | undefined {
  return Object.keys(KINDS).find((dtype) => KINDS[dtype]!.safetensors === name);
}

export const sizeOf = (shape: readonly number[]): number => shape.reduce((n, side) => n * side, 1);

export const float32 = (shape: readonly number[], data: Float32Array): Tensor => ({ dtype: "float32", shape, data });

/** Returns the values of a float32 tensor. */
export function floats(tensor: Tensor, where: string): Float32Array {
  if (!(tensor.data instanceof Float32Array)) {
    throw new FewstepError("contract", `${where} is ${tensor.dtype}, expected float32`, "build the bundle again");
  }
  return tensor.data;
}

/** Returns numbers in another dtype, as numpy's `asarray(values, dtype)` rounds them. */
export function cast(values: ArrayLike<number | bigint>, dtype: string, where: string): Values {
  const result = dtypeKind(dtype, where).make(new ArrayBuffer(values.length * dtypeKind(dtype, where).bytes));
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    if (result instanceof BigInt64Array) result[i] = typeof value === "bigint" ? value : BigInt(Math.trunc(value));
    else if (dtype === "float16") result[i] = toFloat16(Number(value));
    else result[i] = dtype === "bool" ? Number(Boolean(value)) : Number(value);
  }
  return result;
}

/** Returns the values as numbers: those of float16 decoded. */
export function numbers(tensor: Tensor): ArrayLike<number> {
  if (tensor.data instanceof BigInt64Array) return Float64Array.from(tensor.data, Number);
  if (tensor.dtype === "float16") return Float32Array.from(tensor.data as Uint16Array, fromFloat16);
  return tensor.data;
}

const bits = new DataView(new ArrayBuffer(8));

/** Returns the bits of the nearest half-precision number, ties to even, rounding the float64 once. */
export function toFloat16(value: number): number {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const magnitude = Math.abs(value);
  if (Number.isNaN(value)) return 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 2 ** -14) return sign | roundToEven(magnitude * 2 ** 24); // 2^-24 is the least subnormal
  bits.setFloat64(0, magnitude);
  const exponent = ((bits.getUint16(0) >> 4) & 0x7ff) - 1023;
  // A mantissa that rounds up to 2048 carries into the exponent, which is what the sum does.
  return sign | (((exponent + 15) << 10) + roundToEven((magnitude / 2 ** exponent - 1) * 1024));
}

export function fromFloat16(half: number): number {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

function roundToEven(value: number): number {
  const floor = Math.floor(value);
  const rest = value - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}
