/**
 * What pipelines do to a text before its tokenizer, by name: `fewstep.text.operations`, character by character.
 *
 * Python's ideas of a blank and of an HTML entity are not JavaScript's.
 */

import entities from "./entities.json";
import { collapseBlanks, strip } from "./unicode.js";

export type Operation = "strip" | "lower" | "collapse_whitespace" | "collapse_unicode_whitespace" | "unescape_html";

const OPERATIONS: { readonly [name in Operation]: (text: string) => string } = {
  strip,
  lower: (text) => text.toLowerCase(), // by Unicode's rules in both, the final sigma among them
  collapse_whitespace: collapseBlanks,
  collapse_unicode_whitespace: (text) => text.replace(/\p{White_Space}+/gu, " "),
  unescape_html: unescapeHtml,
};

/** Returns what the operations, in order, make of a text. */
export function applyOperations(operations: readonly Operation[], text: string): string {
  return operations.reduce((t, name) => OPERATIONS[name](t), text);
}

const NAMES: ReadonlyMap<string, string> = new Map(Object.entries(entities.names));
/** Numbers that stand for another character, as browsers have it: windows-1252 among them. */
const NUMBERS: ReadonlyMap<number, string> = new Map(Object.entries(entities.numbers).map(([n, c]) => [Number(n), c]));
const NOTHING: ReadonlySet<number> = new Set(entities.nothing);
const REFERENCE = /&(#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)/gu;

/** Returns a text with the characters that HTML's references stand for, as Python's `html.unescape` does. */
function unescapeHtml(text: string): string {
  return text.replace(REFERENCE, (_, name: string) => (name.startsWith("#") ? numbered(name) : named(name)));
}

function numbered(name: string): string {
  const hexadecimal = /^#x/i.test(name);
  const number = parseInt(name.slice(hexadecimal ? 2 : 1), hexadecimal ? 16 : 10);
  const other = NUMBERS.get(number);
  if (other !== undefined) return other;
  if ((number >= 0xd800 && number <= 0xdfff) || number > 0x10ffff) return "\ufffd";
  return NOTHING.has(number) ? "" : String.fromCodePoint(number);
}

/** The longest name that the text begins with; some need no semicolon. */
function named(name: string): string {
  const whole = NAMES.get(name);
  if (whole !== undefined) return whole;
  for (let end = name.length - 1; end > 1; end--) {
    const found = NAMES.get(name.slice(0, end));
    if (found !== undefined) return found + name.slice(end);
  }
  return `&${name}`;
}
