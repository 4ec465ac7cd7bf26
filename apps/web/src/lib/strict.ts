/** JSON as strangers write it, read as strictly as `fewstep.strict` does in Python. */

import { FewstepError } from "./errors.js";

const BYTES = 16 << 20;
const DEPTH = 64;
const DIGITS = 20;
const TOKENS = /"(?:[^"\\]|\\.)*"|[{}[\]]|-?\d[\d.eE+-]*/gs;

/**
 * Returns the value of a JSON text.
 *
 * Throws FewstepError (`bundle`): it is not JSON, has a name twice (of which `JSON.parse` would take the last), a number
 * that is not finite or has more than 20 digits, half a surrogate pair, or is nested deeper than 64.
 */
export function parseJson(text: string, where: string): unknown {
  const refuse = (why: string): FewstepError => new FewstepError("bundle", `${where} is not JSON: ${why}`, "copy the whole bundle again");
  if (text.length > BYTES) throw refuse(`it has more than ${BYTES} characters`);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw refuse((error as Error).message);
  }
  const inside: (Set<string> | null)[] = [];
  for (const { 0: token, index } of text.matchAll(TOKENS)) {
    if (token === "{" || token === "[") inside.push(token === "{" ? new Set() : null);
    else if (token === "}" || token === "]") inside.pop();
    else if (token.startsWith('"')) {
      const content = JSON.parse(token) as string;
      if (/\p{Surrogate}/u.test(content)) throw refuse("it has half a surrogate pair");
      const names = inside[inside.length - 1];
      if (names && /^\s*:/.test(text.slice(index + token.length, index + token.length + 80))) {
        if (names.has(content)) throw refuse(`the entry ${JSON.stringify(content)} is there twice`);
        names.add(content);
      }
    } else if (!Number.isFinite(Number(token)) || (/^-?\d+$/.test(token) && token.length > DIGITS + 1)) {
      throw refuse(`${token.slice(0, 40)} is no number that is read`);
    }
    if (inside.length > DEPTH) throw refuse(`it is nested deeper than ${DEPTH}`);
  }
  return value;
}
