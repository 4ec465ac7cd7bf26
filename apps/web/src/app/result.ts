/** The result of a device check as `fewstep verify --device-result` reads it: src/fewstep/device-result.schema.json. */

import type { DeviceCheck } from "../lib/index";
import type { Ready } from "./client";
import type { Memory } from "./messages";

export function deviceResult({ bundle, engine }: Ready, check: DeviceCheck, memory: Memory): object {
  return {
    schema_version: 1,
    checked_at: new Date().toISOString(),
    bundle: { name: bundle.name, content_id: bundle.contentId },
    executor: { runtime: "onnxruntime-web", version: engine.version, provider: engine.provider, threads: engine.threads },
    device: {
      browser: browserName(navigator.userAgent),
      os: osName(navigator.userAgent),
      cores: navigator.hardwareConcurrency || 1,
      memory_gb: (navigator as { deviceMemory?: number }).deviceMemory ?? null,
      user_agent: navigator.userAgent.slice(0, 512),
    },
    // What is judged over several samples follows from the others.
    checks: check.checks.filter(({ sample }) => sample !== null).map(({ passed: _, limit: __, ...measured }) => ({ ...measured, value: jsonNumber(measured.value) })),
    timings: check.timings,
    picture_ms: check.picture_ms,
    wasm_bytes: memory.wasmBytes,
  };
}

/** JSON has no infinity: as text, in Python's words. */
function jsonNumber(value: number): number | string {
  if (Number.isNaN(value)) return "nan";
  return Number.isFinite(value) ? value : value > 0 ? "inf" : "-inf";
}

// The more special first: most browsers also call themselves Chrome and Safari.
const BROWSERS: [string, RegExp][] = [
  ["Edge", /Edg(?:e|A|iOS)?\/(\d+)/],
  ["Samsung Internet", /SamsungBrowser\/(\d+)/],
  ["Opera", /OPR\/(\d+)/],
  ["Firefox", /(?:Firefox|FxiOS)\/(\d+)/],
  ["Chrome", /(?:HeadlessChrome|Chrome|CriOS)\/(\d+)/],
  ["Safari", /Version\/([\d.]+).*Safari/],
];

export function browserName(agent: string): string {
  for (const [name, pattern] of BROWSERS) {
    const version = pattern.exec(agent)?.[1];
    if (version !== undefined) return `${name} ${version}`;
  }
  return "unknown browser";
}

const SYSTEMS: [string, RegExp][] = [
  ["Android", /Android ([\d.]+)/],
  ["iOS", /(?:iPhone|iPad).*? OS ([\d_]+)/],
  ["ChromeOS", /CrOS/],
  ["macOS", /Mac OS X ([\d_.]+)/],
  ["Windows", /Windows NT ([\d.]+)/],
  ["Linux", /Linux/],
];

export function osName(agent: string): string {
  for (const [name, pattern] of SYSTEMS) {
    const match = pattern.exec(agent);
    if (match !== null) return match[1] === undefined ? name : `${name} ${match[1].replaceAll("_", ".")}`;
  }
  return "unknown system";
}
