// The same numbers as Python: tests/vectors, written by `python -m tests.web.vectors` (and noise.json by hand).

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { floorChecks, floorOf, trajectoryLimits } from "../src/lib/floor";
import { combine, guidanceEmbedding, guidanceValue, twoPasses } from "../src/lib/guidance";
import type { Manifest, Schedule } from "../src/lib/manifest";
import { normal, philox4x32 } from "../src/lib/noise";
import { sampleLoop, scaled } from "../src/lib/schedule";
import { applyOperations } from "../src/lib/text";
import { Tokenizer } from "../src/lib/tokenizer";

const repository = fileURLToPath(new URL("../../../", import.meta.url));
const read = (path: string): string => readFileSync(repository + path, "utf-8");
const vectors = (name: string): any => JSON.parse(read(`tests/vectors/${name}.json`));

const floatsOf = (hex: string): Float32Array => new Float32Array(Uint8Array.from(Buffer.from(hex, "hex")).buffer);
const bitsOf = (values: Float32Array): Int32Array => new Int32Array(values.buffer, values.byteOffset, values.length);

/** Expects float32 values that are equal but for the last bit: V8's log and sin are not those of the C library. */
function expectEqualToTheLastBit(found: Float32Array, expected: Float32Array): void {
  expect(found.length).toBe(expected.length);
  const [a, b] = [bitsOf(found), bitsOf(expected)];
  const worst = a.reduce((most, bits, i) => Math.max(most, Math.abs(bits - b[i]!)), 0);
  expect(worst).toBeLessThanOrEqual(1);
}

describe("noise", () => {
  // The known answers that Random123 1.14 ships in tests/kat_vectors.
  it.each([
    ["zeros", "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"],
    ["ones", "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"],
    ["digits of pi", "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"],
  ])("philox4x32 of %s", (_, counter, key, expected) => {
    const words = (text: string): number[] => text.split(" ").map((word) => parseInt(word, 16));
    const block = philox4x32(words(counter) as never, words(key) as never);
    expect(block).toEqual(words(expected));
  });

  it.each(vectors("noise").vectors as any[])("seed $seed offset $offset from $first", (vector) => {
    const expected = Float32Array.from(vector.decimal as number[]);
    const found = normal(BigInt(vector.seed), vector.offset, vector.first + expected.length).slice(vector.first);
    expectEqualToTheLastBit(found, expected);
  });

  it("refuses what is no seed and no offset", () => {
    expect(() => normal(-1n, 0, 1)).toThrow("seed is -1, expected 0 to 18446744073709551615");
    expect(() => normal(1n << 64n, 0, 1)).toThrow("seed is 18446744073709551616");
    expect(() => normal(0n, 2 ** 32, 1)).toThrow("offset is 4294967296, expected 0 to 4294967295");
  });
});

describe("text", () => {
  const { texts, cases } = vectors("text");
  it.each(cases as any[])("$operations", ({ operations, texts: expected }) => {
    const found = texts.map((text: string) => applyOperations(operations, text));
    found.forEach((text: string, i: number) => expect({ from: texts[i], text }).toEqual({ from: texts[i], text: expected[i] ?? texts[i] }));
  });
});

describe("tokenizer", () => {
  const { texts, cases } = vectors("tokenizer");
  it.each(cases as any[])("$name", ({ spec, ids, real }) => {
    const tokenizer = new Tokenizer(read(`${spec.folder}/tokenizer.json`), spec);
    texts.forEach((text: string, i: number) => {
      const found = tokenizer.encode(text);
      expect({ text, ids: Array.from(found.ids, Number) }).toEqual({ text, ids: ids[i] });
      expect(found.mask.filter((m) => m === 1n).length).toBe(real[i]);
    });
  });

  it("takes half a surrogate pair for the replacement sign", () => {
    const spec = cases[0].spec;
    const tokenizer = new Tokenizer(read(`${spec.folder}/tokenizer.json`), spec);
    expect(tokenizer.encode("a\ud83d b").ids).toEqual(tokenizer.encode("a\ufffd b").ids);
  });

  it("says which part of a tokenizer it does not know", () => {
    const spec = cases[0].spec;
    const config = JSON.parse(read(`${spec.folder}/tokenizer.json`));
    const make = (change: object) => () => new Tokenizer(JSON.stringify({ ...config, ...change }), spec);
    expect(make({ model: { ...config.model, type: "Unigram" } })).toThrow("tokenizer.json has a model of type Unigram");
    expect(make({ normalizer: { type: "Precompiled" } })).toThrow("a normalizer Precompiled");
    expect(make({ pre_tokenizer: { type: "Metaspace" } })).toThrow("a pre-tokenizer Metaspace");
    expect(make({ post_processor: { type: "Other" } })).toThrow("a post-processor Other");
  });
});

describe("schedule", () => {
  it.each(vectors("schedule").cases as any[])("$name", async ({ seed, schedule, latents }) => {
    const table = schedule as Schedule;
    const [size, width] = [30, 5];
    const draw = (offset: number): Float32Array => normal(BigInt(seed), offset, size);
    const anchor = draw(2 ** 31);
    const [first, added] = [scaled(table.init_scale, draw(0)), scaled(table.init_anchor, anchor)];
    const found: Float32Array[] = [];
    const f32 = Math.fround;
    await sampleLoop(
      table,
      first.map((v, i) => v + added[i]!),
      {
        denoise: async (k, x) => {
          const t = f32(f32(table.timesteps[k]!) / 1000);
          const mirrored = (i: number): number => x[i - (i % width) + (width - 1 - (i % width))]!;
          return x.map((v, i) => f32(v * f32(0.3)) - f32(mirrored(i) * t));
        },
        noise: (k) => draw(k + 1),
        onStep: (_, x) => void found.push(x),
        anchor,
      },
    );
    expect(found.length).toBe(latents.length);
    // One bit of the noise, of terms that are much larger than their sum, is a few units of the sum's last place.
    found.forEach((x, k) => {
      const expected = floatsOf(latents[k]);
      x.forEach((v, i) => expect(Math.abs(v - expected[i]!)).toBeLessThanOrEqual(1e-5 * Math.max(1, Math.abs(v))));
    });
  });
});

describe("noise floor", () => {
  it.each(vectors("floor").cases.map((c: any, i: number) => [i, c]) as [number, any][])("case %i", (_, { floor, most_db, values, checks }) => {
    const found = floorChecks({ components: { denoiser: floor }, picture: floor }, most_db, new Map([["denoiser", values]]), values, "picture");
    expect(found.length).toBe(checks.length);
    found.forEach(({ value, limit, ...rest }, i) => {
      const expected = checks[i];
      expect(rest).toEqual({ level: expected.level, component: expected.component, metric: expected.metric });
      expect(limit).toBeCloseTo(expected.limit, 9);
      if (expected.value === null) expect(value).toBeNaN();
      else expect(value).toBeCloseTo(expected.value, 9);
      expect(value >= limit).toBe(expected.passed);
    });
  });

  it("is asked for where the manifest has none, or one of another form", () => {
    const of = (parity: unknown) => () => floorOf({ parity } as unknown as Manifest);
    expect(of(null)).toThrow("the bundle does not say what its noise floor is");
    expect(of({ floor: null })).toThrow("does not say");
    expect(of({ floor: { components: { denoiser: 38.6 }, picture: 47.8 } })).toThrow("states its noise floor in another form");
    const known = { median_db: 40, spread_db: 1, count: 8 };
    expect(of({ floor: { components: { denoiser: known }, picture: known } })()).toEqual({ components: { denoiser: known }, picture: known });
  });
});

describe("limits of a trajectory", () => {
  it.each(vectors("floor").trajectories as any[])("from $start", ({ start, latents, limits }) => {
    const found = trajectoryLimits(80, latents.map(floatsOf), start);
    found.forEach((limit, k) => expect(limit).toBeCloseTo(limits[k], 9));
    expect(trajectoryLimits(null, latents.map(floatsOf), start)).toEqual([null, null, null]);
  });
});

describe("guidance", () => {
  const { guidance, cases, scalars, passes, combined } = vectors("guidance");
  it("is a number for some networks", () => {
    for (const { guidance, scale, values } of scalars) expect(guidanceValue(guidance, scale)).toEqual(floatsOf(values));
  });
  it("makes two passes above a threshold", () => {
    for (const { guidance, scale, two } of passes) expect([scale, twoPasses(guidance, scale)]).toEqual([scale, two]);
  });
  it("combines them", () => {
    for (const { scale, u, c, values } of combined) expect(combine(floatsOf(u), floatsOf(c), scale)).toEqual(floatsOf(values));
  });
  it.each(cases as any[])("w = $scale", ({ scale, values }) => {
    const found = guidanceEmbedding(guidance, scale);
    // sin of an angle in the thousands: one bit of float64 in it is nothing to float32, unless right at a boundary.
    const expected = floatsOf(values);
    found.forEach((v, i) => expect(Math.abs(v - expected[i]!)).toBeLessThanOrEqual(2 ** -24));
  });
});
