/** Where JavaScript and the tokenizers library (Oniguruma, Rust) or Python mean different characters. */

import { FewstepError } from "./errors.js";
import { patternProblem } from "./patterns.js";

/**
 * Returns a pattern of Oniguruma as a regular expression of JavaScript, global and by code points.
 *
 * `\s` is Unicode's White_Space there, which has U+0085 and lacks U+FEFF; JavaScript's own has it the other way round.
 */
export function compilePattern(pattern: string): RegExp {
  const problem = patternProblem(pattern);
  if (problem !== null) {
    throw new FewstepError("bundle", `tokenizer.json has a pattern that ${problem}: ${JSON.stringify(pattern.slice(0, 60))}`, "do not use this bundle");
  }
  let inClass = false;
  const source = pattern.replace(/\\[\s\S]|\[|\]/g, (part) => {
    if (part === "[") inClass = true;
    else if (part === "]") inClass = false;
    else if (part === "\\s") return inClass ? "\\p{White_Space}" : "[\\p{White_Space}]";
    else if (part === "\\S") return inClass ? "\\P{White_Space}" : "[\\P{White_Space}]";
    return part;
  });
  return new RegExp(source, "gu");
}

// What Python's str.strip takes off: White_Space and the four separators of ASCII.
const BLANK = "[\\p{White_Space}\\x1c-\\x1f]+";
const OUTER_BLANKS = new RegExp(`^${BLANK}|${BLANK}$`, "gu");

/** Returns a text without its outer blanks, as Python's `str.strip` does. */
export const strip = (text: string): string => text.replace(OUTER_BLANKS, "");
