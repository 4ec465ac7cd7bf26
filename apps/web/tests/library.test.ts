// The parts of the library that need no browser.

import { createHash } from "node:crypto";
import { describe, expect, it } from "vitest";
import { browserName, osName } from "../src/app/result";
import { asFewstepError, FewstepError } from "../src/lib/errors";
import { BundleFiles } from "../src/lib/files";
import { goldenPaths } from "../src/lib/golden";
import { parseManifest, type Manifest } from "../src/lib/manifest";
import { psnrDb, spread, sqnrDb } from "../src/lib/metrics";
import { externalDataFiles } from "../src/lib/onnx";
import { normal } from "../src/lib/noise";
import { bind, checkOrigins, rowOf, setStep, type Origins } from "../src/lib/origins";
import { readSafetensors } from "../src/lib/safetensors";
import type { Session, Tensors } from "../src/lib/runtime";
import { Sampler } from "../src/lib/sampler";
import { firstSchemaError } from "../src/lib/schema";
import { sha256, sha256InScript } from "../src/lib/sha256";
import { cast, float32, fromFloat16, toFloat16, type Tensor } from "../src/lib/tensor";

const random = (count: number): Uint8Array<ArrayBuffer> => {
  let state = 1;
  return Uint8Array.from({ length: count }, () => (state = (state * 48271) % 2147483647) & 255);
};

describe("sha256", () => {
  it.each([0, 1, 55, 56, 63, 64, 65, 119, 120, 1000, 100_000])("of %i bytes", async (count) => {
    const bytes = random(count);
    const expected = createHash("sha256").update(bytes).digest("hex");
    expect(sha256InScript(bytes)).toBe(expected);
    expect(await sha256(bytes)).toBe(expected);
  });

  it("of a view into a buffer", () => {
    const view = random(300).subarray(7, 200);
    expect(sha256InScript(view)).toBe(createHash("sha256").update(view).digest("hex"));
  });
});

describe("float16", () => {
  it("goes there and back for every half", () => {
    for (let half = 0; half < 0x10000; half++) {
      const value = fromFloat16(half);
      expect(toFloat16(value)).toBe(Number.isNaN(value) ? 0x7e00 : half);
    }
  });

  it.each([
    [65519.99, 0x7bff],
    [65520, 0x7c00],
    [1 + 2 ** -11, 0x3c00], // a tie, to even
    [1 + 3 * 2 ** -11, 0x3c02],
    [2 ** -25, 0],
    [2 ** -25 * 1.001, 1],
    [2047.5, 0x6800], // the mantissa carries into the exponent
  ])("rounds %d", (value, half) => expect(toFloat16(value)).toBe(half));
});

describe("schema", () => {
  const refused = (schema: object, value: unknown): string | null => {
    const error = firstSchemaError(schema as never, value);
    return error && `${error.path} ${error.message}`;
  };
  it.each([
    [{ type: "integer" }, 1.5, "(top) is 1.5, expected integer"],
    [{ type: ["null", "number"] }, "x", '(top) is "x", expected null or number'],
    [{ type: "object" }, [], "(top) is [], expected object"],
    [{ properties: { a: { minimum: 3 } } }, { a: 2 }, "a is 2, expected at least 3"],
    [{ items: { enum: ["x"] } }, ["x", "y"], '1 is "y", expected one of ["x"]'],
    [{ required: ["a"] }, {}, "(top) has no a"],
    [{ properties: { a: {} }, additionalProperties: false }, { a: 1, b: 2 }, "(top) has an unknown entry b"],
    [{ additionalProperties: { type: "string" } }, { a: 1 }, "a is 1, expected string"],
    [{ patternProperties: { "^[1-9]$": { type: "string" } }, additionalProperties: false }, { "1": 1 }, "1 is 1, expected string"],
    [{ patternProperties: { "^[1-9]$": {} }, additionalProperties: false }, { "0": 1 }, "(top) has an unknown entry 0"],
    [{ anyOf: [{ type: "null" }, { required: ["x"] }] }, {}, "(top) has no x"],
    [{ pattern: "^[0-9a-f]{4}$" }, "00g0", '(top) is "00g0", expected a text like "^[0-9a-f]{4}$"'],
    [{ minItems: 2 }, [1], "(top) is [1], expected this many items or more: 2"],
    [{ exclusiveMinimum: 0 }, 0, "(top) is 0, expected more than 0"],
    [{ const: 1 }, 2, "(top) is 2, expected exactly 1"],
    [{ required: ["toString"] }, {}, "(top) has no toString"],
  ])("%j of %j", (schema, value, expected) => expect(refused(schema, value)).toBe(expected));

  it("accepts what fits, and does not skip what it does not know", () => {
    expect(refused({ anyOf: [{ type: "null" }, { minLength: 2 }] }, "🍎🍎")).toBeNull();
    expect(() => refused({ dependentRequired: {} }, {})).toThrow("the schema uses dependentRequired");
  });
});

const table = (steps: number): object => ({
  ...Object.fromEntries("s p q a b c".split(" ").map((name) => [name, new Array(steps).fill(0.5)])),
  g: new Array(steps).fill(0),
  timesteps: Array.from({ length: steps }, (_, k) => 999 - k),
  timestep_dtype: "int64",
  init_scale: 1,
  init_anchor: 0,
  h: new Array(steps).fill([]),
  clip: null,
  source: "test",
  times: {},
});

const spec = (name: string, dtype: string, shape: number[]): object => ({ name, dtype, shape });

const unguided = {
  ...{ kind: "none", scale: 1, frequencies: [], factor: 1000, shift: 0, threshold: null, negative: "" },
  ...{ unconditional: {}, takes_negative: false, empty_is_none: false, own: null, reason: "" },
};

function manifest(bindings: { [input: string]: string } = {}, more: object = {}): Manifest {
  const denoiser = {
    inputs: [spec("x", "float32", [1, 2]), spec("t", "int64", [3])],
    outputs: [spec("y", "float32", [1, 2])],
    bindings: { x: "latent", t: "timestep", ...bindings },
    phase: "loop",
  };
  const value = {
    schema_version: 1,
    name: "test",
    source: { uri: "x", kind: "python", sha256: "0" },
    pipeline: "none",
    contract: {
      latent_shape: [2],
      latent_scale: 1,
      latent_shift: 0,
      prediction_type: "epsilon",
      guidance: unguided,
      initial: "noise:0",
      anchor: null,
      inputs: [],
      output: { kind: "depth", scale: 1, shift: 0, clip: null, rate: null },
      noise: "philox",
    },
    components: { denoiser },
    tokenizers: {},
    schedules: { "2": table(2) },
    default_steps: 2,
    artifacts: [{ runtime: "onnxruntime", component: "denoiser", path: "onnxruntime/model.onnx", weights: "fp32", compute: "fp32", bytes: 1 }],
    recipe: {},
    prompts: [],
    licences: {},
    versions: {},
    parity: null,
    caveats: [],
    files: { "onnxruntime/model.onnx": { sha256: "0".repeat(64), bytes: 1 } },
    ...more,
  };
  return value as never;
}

const parsed = (value: object): Manifest => parseManifest(JSON.stringify(value));

describe("manifest", () => {
  it("is read", () => expect(parsed(manifest()).components.denoiser!.phase).toBe("loop"));

  it.each([
    ["no JSON", () => parseManifest("{"), "manifest.json is not JSON"],
    ["another version", () => parsed({ ...manifest(), schema_version: 2 }), "schema version 2, expected 1"],
    ["an unknown entry", () => parsed({ ...manifest(), tiles: {} }), "has an unknown entry tiles"],
    ["a path that leaves", () => parsed(manifest({}, { files: { "../x": { sha256: "0".repeat(64), bytes: 1 } } })), "leaves the bundle"],
    ["an address", () => parsed(manifest({}, { files: { "https://x/y": { sha256: "0".repeat(64), bytes: 1 } } })), "leaves the bundle"],
  ])("refuses %s", (_, read, text) => expect(read).toThrow(text));
});

describe("steps that call different networks", () => {
  const two = (networks: string[]): Manifest => {
    const { components, contract, artifacts } = manifest();
    const small = { ...components.denoiser!, bindings: { x: "latent", t: "timestep" } };
    return parsed(manifest({}, { components: { ...components, denoiser_small: small }, artifacts: [...artifacts, { ...artifacts[0]!, component: "denoiser_small" }], contract, schedules: { "2": { ...table(2), networks } } }));
  };

  it("call the one that the schedule names", async () => {
    const value = two(["denoiser", "denoiser_small"]);
    const opened: string[] = [];
    const open = async (component: string): Promise<Session> => ({
      run: async ({ x }) => {
        opened.push(component);
        return { y: float32([1, 2], (x!.data as Float32Array).map((v) => (component === "denoiser" ? 2 : -3) * v)) };
      },
      close: async () => {},
    });
    const sampler = new Sampler(value, new Map(), open, true);
    const { latents, output } = await sampler.sample({ prompt: "", seed: 1n, schedule: value.schedules["2"]! });
    expect(opened).toEqual(["denoiser", "denoiser_small"]);
    // x0 = p x + q s f x and x' = a x + b x0, all numbers 0.5: x' = (0.5 + 0.25 + 0.125 f) x, plus half of the noise.
    const draw = (k: number): Float32Array => normal(1n, k, 2);
    const first = draw(0).map((v, i) => (0.75 + 0.25) * v + 0.5 * draw(1)[i]!);
    expect([...latents[0]!]).toEqual([...first].map((v) => expect.closeTo(v, 5)));
    expect([...(output.data as Float32Array)]).toEqual([...first].map((v, i) => expect.closeTo((0.75 - 0.375) * v + 0.5 * draw(2)[i]!, 5)));
  });

  it.each([
    [["denoiser", "decoder"], "names decoder, which is no network of the loop"],
    [["denoiser", "denoiser_large"], "names denoiser_large, which is no network of the loop"],
    [["denoiser"], "names 1 networks"],
  ])("are refused where it names %j", (networks, text) => expect(() => two(networks)).toThrow(text));
});

describe("guidance with two passes", () => {
  const guidance = { ...unguided, kind: "two_pass", scale: 2, threshold: 1, unconditional: { "encoder.c": "zeros" }, takes_negative: true };
  const guided = (more: object = {}): Manifest => {
    const { components, contract, artifacts, files } = manifest({ c: "encoder.c", m: "mask:words" });
    components.denoiser!.inputs.push(spec("c", "float32", [1, 2]) as never, spec("m", "int64", [1, 1]) as never);
    const encoder = { inputs: [spec("ids", "int64", [1, 1])], outputs: [spec("c", "float32", [1, 2])], bindings: { ids: "tokens:words" }, phase: "before" };
    Object.assign(contract, { guidance: { ...guidance, ...more }, inputs: [{ name: "prompt", kind: "text", shape: [], count: null }] });
    const words = { folder: "words", length: 1, pad_id: 0, padding_side: "right", prefix: "", suffix: "", operations: [], expansions: {}, input: "prompt" };
    const file = files["onnxruntime/model.onnx"]!;
    const parts = {
      artifacts: [...artifacts, { ...artifacts[0]!, component: "encoder" }],
      components: { encoder, ...components },
      files: { ...files, "words/tokenizer.json": file, "guidance/unconditional.safetensors": file },
      tokenizers: { words },
    };
    return parsed(manifest({}, { contract, ...parts }));
  };

  /** Returns what networks were given: encodings are the text's length, the denoiser's output is its condition. */
  async function drawn(value: Manifest, request: object, held: Map<string, Tensor> = new Map()) {
    const seen: string[] = [];
    const open = async (component: string): Promise<Session> => ({
      run: async ({ ids, c }): Promise<Tensors> => {
        seen.push(component === "encoder" ? `encoder ${(ids!.data as BigInt64Array)[0]}` : `denoiser ${(c!.data as Float32Array)[0]}`);
        return component === "encoder"
          ? { c: float32([1, 2], new Float32Array(2).fill(Number((ids!.data as BigInt64Array)[0]))) }
          : { y: float32([1, 2], Float32Array.from(c!.data as Float32Array)) };
      },
      close: async () => {},
    });
    const words = { encode: (text: string) => ({ ids: BigInt64Array.of(BigInt(text.length)), mask: BigInt64Array.of(1n) }) };
    const sampler = new Sampler(value, new Map([["words", words as never]]), open, true, held);
    const { output } = await sampler.sample({ prompt: "four", seed: 1n, schedule: value.schedules["2"]!, ...request });
    return { seen, output: [...(output.data as Float32Array)] };
  }

  it("gives the unconditional one what the bundle says, and encodes nothing for it", async () => {
    const { seen } = await drawn(guided(), {});
    expect(seen).toEqual(["encoder 4", "denoiser 0", "denoiser 4", "denoiser 0", "denoiser 4"]);
    const held = new Map([["encoder.c", float32([1, 2], Float32Array.of(7, 7))]]);
    const inFile = guided({ unconditional: { "encoder.c": "guidance/unconditional.safetensors" } });
    expect((await drawn(inFile, {}, held)).seen).toEqual(["encoder 4", "denoiser 7", "denoiser 4", "denoiser 7", "denoiser 4"]);
  });

  it("encodes a negative prompt, also an empty one unless that is none", async () => {
    expect((await drawn(guided(), { negativePrompt: "no" })).seen.slice(0, 4)).toEqual(["encoder 2", "encoder 4", "denoiser 2", "denoiser 4"]);
    expect((await drawn(guided(), { negativePrompt: "" })).seen[0]).toEqual("encoder 0");
    expect((await drawn(guided({ empty_is_none: true }), { negativePrompt: "" })).seen[0]).toEqual("encoder 4");
    await expect(drawn(guided({ takes_negative: false }), { negativePrompt: "no" })).rejects.toThrow("this generator takes none");
  });

  it("makes one pass at the threshold and below", async () => {
    for (const scale of [1, 0.5, 0]) expect((await drawn(guided(), { guidance: scale })).seen).toEqual(["encoder 4", "denoiser 4", "denoiser 4"]);
    expect((await drawn(guided({ threshold: null }), { guidance: 0 })).seen.length).toBe(5);
  });

  it("weighs by the scale, plus one where the pipeline does", async () => {
    // F = w 4 against F = (w + 1) 4: that of the next scale.
    const next = await drawn(guided(), { guidance: 3 });
    expect((await drawn(guided({ shift: 1 }), { guidance: 2 })).output).toEqual(next.output);
  });

  it("refuses an origin that is not known, a path that leaves, and scales of a bundle for one alone", async () => {
    expect(() => guided({ unconditional: { "moon.c": "zeros" } })).toThrow("the unconditional pass is bound to");
    expect(() => guided({ unconditional: { "encoder.c": "other.safetensors" } })).toThrow("other.safetensors is not listed in files");
    expect(() => guided({ unconditional: { "encoder.c": "../x" } })).toThrow("leaves the bundle");
    const fixed = guided({ kind: "fixed", threshold: null, unconditional: {}, takes_negative: false, reason: "it rescales" });
    await expect(drawn(fixed, { guidance: 3 })).rejects.toThrow("guidance is 3, but this bundle is made for 2 alone");
  });
});

describe("origins", () => {
  it.each(["moon_phase", "time:r", "tokens:missing", "denoiser.z", "noise:x", "input:image"])("refuses %s", (origin) => {
    expect(() => checkOrigins(manifest({ t: origin }))).toThrow(`denoiser.t is bound to "${origin}", an origin that this app does not know`);
  });

  it("refuses an input that is bound to nothing", () => {
    const value = manifest();
    delete value.components.denoiser!.bindings.t;
    expect(() => checkOrigins(value)).toThrow("denoiser.t is bound to null");
  });

  const table2 = manifest().schedules["2"]!;
  const rows = [{ timestep: 998, "time:r": 1 }, { timestep: 5 }, { timestep: 999 }, { timestep: 998 }];
  it.each([
    ["timestep", {}, 998n],
    ["step", { form: "table", rows }, 3n],
  ])("gives the step's %s, once for every token", (origin, more, expected) => {
    const value = manifest({ t: origin });
    Object.assign(value.contract, more);
    checkOrigins(parsed(value));
    const origins: Origins = new Map();
    setStep(origins, value.contract, table2, 1, float32([1, 2], new Float32Array(2)));
    const input = value.components.denoiser!.inputs[1]!;
    expect([...(bind(origins, origin, input, value.contract).data as BigInt64Array)]).toEqual([expected, expected, expected]);
  });

  it("refuses rows where there is no table, and steps that no row holds", () => {
    expect(() => checkOrigins(manifest({ t: "step" }))).toThrow('denoiser.t is bound to "step"');
    const { contract } = manifest();
    Object.assign(contract, { form: "table", rows: rows.slice(0, 3) });
    expect(() => rowOf(contract, table2, 1)).toThrow("step 1 of 2 has timestep 998, which is none of the 3 steps");
    contract.form = "loop" as never;
    expect(() => parsed(manifest({}, { contract }))).toThrow('contract/form is "loop", expected one of ["step","table","specialized"]');
    contract.form = "specialized" as never;
    expect(() => parsed(manifest({}, { contract }))).toThrow("have the form specialized, which this app does not know");
  });

  it("draws one picture at once", () => {
    const { contract } = manifest();
    expect(parsed(manifest({}, { contract: { ...contract, batch: 1 } })).contract.batch).toBe(1);
    expect(() => parsed(manifest({}, { contract: { ...contract, batch: 4 } }))).toThrow("draws 4 pictures at once, and this app one");
  });

  it("refuses a value of another size", () => {
    const origins: Origins = new Map([["latent", float32([3], new Float32Array(3))]]);
    const input = manifest().components.denoiser!.inputs[0]!;
    expect(() => bind(origins, "latent", input, manifest().contract)).toThrow("x: latent has 3 values, expected float32 [1, 2]");
  });
});

describe("tensors", () => {
  it("are cast as numpy does", () => {
    expect([...(cast([999.9, -1.5], "int64", "t") as BigInt64Array)]).toEqual([999n, -1n]);
    expect([...(cast([7n], "float32", "t") as Float32Array)]).toEqual([7]);
    expect([...(cast([0.5, 0], "bool", "t") as Uint8Array)]).toEqual([1, 0]);
    expect(() => cast([1], "bfloat16", "t")).toThrow("t is bfloat16, expected one of float32");
  });
});

describe("metrics", () => {
  it("are those of fewstep.numerics.metrics", () => {
    expect(sqnrDb([1, 2], [1, 2])).toBe(Infinity);
    expect(sqnrDb([0, 0], [0, 1])).toBe(-Infinity);
    expect(sqnrDb([1, NaN], [1, 1])).toBeNaN();
    expect(psnrDb([0, 0], [0.1, 0.1])).toBeCloseTo(20, 10);
    expect(spread([0, 1])).toBe(0.5);
    expect(() => sqnrDb([], [])).toThrow("cannot compare 0 values with 0");
  });
});

describe("safetensors", () => {
  const file = (header: object, data: Uint8Array): Uint8Array<ArrayBuffer> => {
    const text = new TextEncoder().encode(JSON.stringify(header));
    const bytes = new Uint8Array(8 + text.length + data.length);
    new DataView(bytes.buffer).setBigUint64(0, BigInt(text.length), true);
    bytes.set(text, 8);
    bytes.set(data, 8 + text.length);
    return bytes;
  };
  it("are read at any offset", () => {
    const data = new Uint8Array(new Float32Array([1, 2]).buffer);
    const { metadata, tensors } = readSafetensors(file({ __metadata__: { a: "b" }, x: { dtype: "F32", shape: [2], data_offsets: [0, 8] } }, data), "f");
    expect([metadata.a, ...(tensors.get("x")!.data as Float32Array)]).toEqual(["b", 1, 2]);
  });
  it.each([
    ["short", new Uint8Array(3), "it has 3 bytes"],
    ["a long header", file({}, new Uint8Array()).fill(255, 0, 1), "its header is longer than the file"],
    ["another dtype", file({ x: { dtype: "F8_E5M2", shape: [1], data_offsets: [0, 1] } }, new Uint8Array(1)), "x is F8_E5M2"],
    ["too few bytes", file({ x: { dtype: "F32", shape: [2], data_offsets: [0, 8] } }, new Uint8Array(4)), "x does not fit its bytes"],
    ["another size", file({ x: { dtype: "F32", shape: [3], data_offsets: [0, 8] } }, new Uint8Array(8)), "x does not fit its bytes"],
  ])("are refused with %s", (_, bytes, text) => expect(() => readSafetensors(bytes, "f")).toThrow(`f is not a safetensors file: ${text}`));
});

describe("onnx", () => {
  it("names the files that hold weights", () => {
    const field = (number: number, content: number[] | string): number[] => {
      const bytes = typeof content === "string" ? [...new TextEncoder().encode(content)] : content;
      return [number * 8 + 2, (bytes.length & 127) | 128, bytes.length >> 7, ...bytes];
    };
    const entry = (key: string, value: string): number[] => field(13, [...field(1, key), ...field(2, value)]);
    const tensor = [...field(8, "w"), ...entry("location", "model.onnx.data"), ...entry("offset", "0")];
    const model = [8, 8, ...field(7, [...field(5, tensor), ...field(5, field(9, "raw")), ...field(5, tensor)])];
    expect(externalDataFiles(Uint8Array.from(model))).toEqual(["model.onnx.data"]);
    expect(externalDataFiles(new Uint8Array())).toEqual([]);
  });
});

describe("errors", () => {
  it.each([
    [new RangeError("Array buffer allocation failed"), "memory"],
    [new Error("std::bad_alloc"), "memory"],
    [new Error("failed to allocate a buffer of size 1234"), "memory"],
    ["123456", "engine"],
    [new FewstepError("hash", "m", "h"), "hash"],
  ])("%s is %s", (thrown, kind) => expect(asFewstepError(thrown, "here").kind).toBe(kind));

  it("a file that is not listed", async () => {
    await expect(new BundleFiles("http://x/", {}, null).read("y")).rejects.toThrow("y is not listed in the manifest");
  });
});

describe("devices", () => {
  it.each([
    ["Mozilla/5.0 (Linux; Android 14; Pixel 7) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Mobile Safari/537.36", "Chrome 140", "Android 14"],
    ["Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 Mobile/15E148 Safari/604.1", "Safari 17.5", "iOS 17.5"],
    ["Mozilla/5.0 (Android 14; Mobile; rv:130.0) Gecko/130.0 Firefox/130.0", "Firefox 130", "Android 14"],
    ["Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36 Edg/140.0.0.0", "Edge 140", "Windows 10.0"],
    ["nothing known", "unknown browser", "unknown system"],
  ])("%s", (agent, browser, os) => expect([browserName(agent), osName(agent)]).toEqual([browser, os]));
});

describe("golden pack", () => {
  const files = (...paths: string[]) =>
    new BundleFiles("http://x/", Object.fromEntries(paths.map((path) => [path, { bytes: 1, sha256: "" }])), null);

  it("has the samples of the first shape", () => {
    const paths = ["golden/1.safetensors", "golden/0.safetensors", "golden/2x/0.safetensors", "golden/16x24/0.safetensors"];
    expect(goldenPaths(files(...paths))).toEqual(["golden/0.safetensors", "golden/1.safetensors"]);
  });

  it("must have one", () => {
    expect(() => goldenPaths(files("golden/2x/0.safetensors"))).toThrow("no golden samples");
  });
});
