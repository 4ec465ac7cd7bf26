/** What the person chose, kept between visits, and what a visit was in the middle of when it ended. */

import type { EngineChoice } from "./messages";

export interface Settings {
  prompt: string;
  seed: string;
  fresh: boolean;
  steps: number | null;
  guidance: number | null;
  negative: string;
  previews: boolean;
  engine: EngineChoice;
  /** Whether a picture was being drawn. */
  drawing: boolean;
}

const KEY = "fewstep-settings";

const DEFAULTS: Settings = {
  prompt: "",
  seed: "0",
  fresh: true,
  steps: null,
  guidance: null,
  negative: "",
  previews: true,
  engine: "auto",
  drawing: false,
};

export function loadSettings(): Settings {
  const text = localStorage.getItem(KEY);
  if (text === null) return { ...DEFAULTS };
  try {
    return { ...DEFAULTS, ...JSON.parse(text) };
  } catch {
    return { ...DEFAULTS }; // written by hand, or cut short
  }
}

export function saveSettings(settings: Settings): void {
  localStorage.setItem(KEY, JSON.stringify(settings));
}

const SEEDS = 1n << 64n;

/** Returns a seed as its decimal text, null where the text is none. */
export function readSeed(text: string): string | null {
  const trimmed = text.trim();
  return /^\d{1,20}$/.test(trimmed) && BigInt(trimmed) < SEEDS ? String(BigInt(trimmed)) : null;
}

/** Returns a random seed, short enough to read aloud. */
export const randomSeed = (): string => String(crypto.getRandomValues(new Uint32Array(1))[0]! % 1_000_000);
