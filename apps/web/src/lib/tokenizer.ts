/**
 * Token ids of a prompt from a bundle's `tokenizer.json`: byte-level BPE in CLIP's form, with any vocabulary.
 *
 * Follows the tokenizers library step by step (added tokens, normalizer, split, byte level, merges, special tokens), and
 * refuses a file with a step that is not implemented here.
 */

import { BytePairs } from "./bpe.js";
import { FewstepError } from "./errors.js";
import type { TokenizerSpec } from "./manifest.js";
import { applyOperations } from "./text.js";
import { compilePattern } from "./unicode.js";

export interface Tokens {
  ids: BigInt64Array;
  /** 1 for each id that is not padding. */
  mask: BigInt64Array;
}

type Config = { type: string; [key: string]: any };
type AddedToken = { id: number; content: string; [flag: string]: unknown };
type Step = (text: string) => string;
type Splitter = (text: string) => string[];

// GPT-2's pattern, which the ByteLevel step splits by.
const BYTE_LEVEL_PATTERN = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

export class Tokenizer {
  private readonly added: AddedToken[];
  /** Those that are looked for in the normalized text. */
  private readonly normalized: AddedToken[];
  private readonly contents: ReadonlyMap<string, number>;
  private readonly normalize: Step;
  private readonly split: Splitter;
  private readonly pairs: BytePairs;
  private readonly first: number[];
  private readonly last: number[];

  /** `json` is the text of `tokenizer.json`. */
  constructor(
    json: string,
    private readonly spec: TokenizerSpec,
  ) {
    const config = JSON.parse(json);
    const added: AddedToken[] = config.added_tokens;
    added.forEach(requirePlain);
    this.contents = new Map(added.map(({ content, id }) => [content, id]));
    this.normalize = normalizer(config.normalizer);
    this.added = longestFirst(added.filter((token) => !token.normalized));
    const others = added.filter((token) => token.normalized);
    this.normalized = longestFirst(others.map((token) => ({ ...token, content: this.normalize(token.content) })));
    this.split = preTokenizer(config.pre_tokenizer);
    this.pairs = new BytePairs(config.model);
    ({ first: this.first, last: this.last } = specialTokens(config.post_processor));
  }

  /** Returns ids and mask, as many as the bundle's networks take. */
  encode(prompt: string): Tokens {
    const { spec } = this;
    // What cannot be written as UTF-8 could not come from Python either: half a pair becomes the replacement sign.
    const text = prompt.replace(/\p{Surrogate}/gu, "\ufffd");
    const changed = this.expand(applyOperations(spec.operations, text));
    const room = spec.length - this.first.length - this.last.length;
    const content = this.ids(`${spec.prefix}${changed}${spec.suffix}`).slice(0, Math.max(room, 0));
    const ids = [...this.first, ...content, ...this.last];
    const padding = new Array<number>(Math.max(spec.length - ids.length, 0));
    const padded = (fill: number, of: number[]): BigInt64Array => {
      const all = spec.padding_side === "left" ? [...padding.fill(fill), ...of] : [...of, ...padding.fill(fill)];
      return BigInt64Array.from(all, BigInt);
    };
    return { ids: padded(spec.pad_id, ids), mask: padded(0, ids.map(() => 1)) };
  }

  /** Returns a text with each token of an embedding of several vectors replaced by a token for each vector. */
  private expand(text: string): string {
    const expansions = Object.entries(this.spec.expansions);
    if (expansions.length === 0) return text;
    const found = new Set(this.ids(text));
    const idOf = (token: string): number | undefined => this.contents.get(token);
    return expansions.reduce((t, [token, all]) => (found.has(idOf(token) ?? -1) ? t.replaceAll(token, () => all) : t), text);
  }

  /** Returns the ids of a text without the tokens around it. */
  private ids(text: string): number[] {
    return splitAt(text, this.added, (plain) =>
      splitAt(this.normalize(plain), this.normalized, (rest) => this.split(rest).flatMap((piece) => this.pairs.encode(piece))),
    );
  }
}

const longestFirst = (tokens: AddedToken[]): AddedToken[] => tokens.sort((a, b) => b.content.length - a.content.length);

/** Returns the ids of a text: of the tokens in it, the longest of those that begin at a place, and of what is between. */
function splitAt(text: string, tokens: AddedToken[], between: (text: string) => number[]): number[] {
  const ids: number[] = [];
  let plain = 0; // where the text that is no added token begins
  for (let at = 0; at < text.length; ) {
    const token = tokens.find(({ content }) => text.startsWith(content, at));
    if (token === undefined) {
      at++;
      continue;
    }
    if (plain < at) ids.push(...between(text.slice(plain, at)));
    ids.push(token.id);
    plain = at += token.content.length;
  }
  if (plain < text.length) ids.push(...between(text.slice(plain)));
  return ids;
}

const unsupported = (what: string): FewstepError =>
  new FewstepError(
    "unsupported",
    `tokenizer.json has ${what}, which this app does not know`,
    "the app runs bundles with CLIP's kind of tokenizer; update it, or run the bundle from Python",
  );

function requirePlain(token: AddedToken): void {
  const flag = ["single_word", "lstrip", "rstrip"].find((name) => token[name] === true);
  if (flag !== undefined) throw unsupported(`the added token ${token.content} with ${flag}`);
}

function normalizer(config: Config | null): Step {
  if (config === null) return (text) => text;
  switch (config.type) {
    case "Sequence": {
      const steps: Step[] = config.normalizers.map(normalizer);
      return (text) => steps.reduce((t, step) => step(t), text);
    }
    case "NFC":
    case "NFD":
    case "NFKC":
    case "NFKD": {
      const form = config.type;
      return (text) => text.normalize(form);
    }
    case "Lowercase":
      // One character at a time, as Rust does: JavaScript alone would turn a sigma at a word's end into a final one.
      return (text) => Array.from(text, (c) => c.toLowerCase()).join("");
    case "Replace": {
      const { pattern, content } = config;
      if (pattern.Regex === undefined) return (text) => text.replaceAll(pattern.String, () => content);
      const regex = compilePattern(pattern.Regex);
      return (text) => text.replace(regex, () => content);
    }
    default:
      throw unsupported(`a normalizer ${config.type}`);
  }
}

function preTokenizer(config: Config | null): Splitter {
  if (config === null) throw unsupported("no pre-tokenizer");
  switch (config.type) {
    case "Sequence": {
      const splitters: Splitter[] = config.pretokenizers.map(preTokenizer);
      return (text) => splitters.reduce((pieces, split) => pieces.flatMap(split), [text]);
    }
    case "Split": {
      if (config.behavior !== "Removed" || config.invert !== true || config.pattern.Regex === undefined) {
        throw unsupported(`a Split with behavior ${config.behavior}, invert ${config.invert}`);
      }
      const regex = compilePattern(config.pattern.Regex);
      return (text) => text.match(regex) ?? [];
    }
    case "ByteLevel": {
      if (config.add_prefix_space) throw unsupported("a ByteLevel with add_prefix_space");
      const regex = config.use_regex ? compilePattern(BYTE_LEVEL_PATTERN) : null;
      return (text) => (regex === null ? (text === "" ? [] : [text]) : (text.match(regex) ?? []));
    }
    default:
      throw unsupported(`a pre-tokenizer ${config.type}`);
  }
}

/** Returns the ids before and after a text. */
function specialTokens(config: Config | null): { first: number[]; last: number[] } {
  if (config === null || config.type === "ByteLevel") return { first: [], last: [] };
  if (config.type === "RobertaProcessing" || config.type === "BertProcessing") {
    return { first: [config.cls[1]], last: [config.sep[1]] };
  }
  if (config.type === "TemplateProcessing") {
    const parts: { [kind: string]: { id: string } }[] = config.single;
    const middle = parts.findIndex((part) => part.Sequence !== undefined);
    const ids = (some: typeof parts): number[] => some.flatMap((part) => config.special_tokens[part.SpecialToken!.id].ids);
    return { first: ids(parts.slice(0, middle)), last: ids(parts.slice(middle + 1)) };
  }
  throw unsupported(`a post-processor ${config.type}`);
}
