/** Refuses rules of tokenizers that could run for ever: `fewstep.text.patterns` in Python says why, and refuses the same. */

const REPEATS = 3;
const LENGTH = 4_000;
const CHARACTERS = 1_000;
const GROUPS = 16;
const COUNT = /\{(\d{0,9})(,?)(\d{0,9})\}/y;
const FLAGS = /\((\?([a-zA-Z-]{0,9}:|=|!|>|<=|<!|<\w{1,40}>))?/y;

/** What was seen of a group so far. */
class Group {
  repeats = 0;
  alternatives = 1;
  choices = 0;
  private before = 0;

  next(): void {
    this.alternatives++;
    this.before = Math.max(this.before, this.repeats);
    this.repeats = 0;
  }

  contains(inner: Group): void {
    this.repeats += Math.max(inner.repeats, inner.before);
    this.choices += inner.choices + Number(inner.alternatives > 1);
  }

  repeat(copies: number, unbounded: boolean, exact: boolean, repeated: Group | null): string | null {
    const varies = repeated !== null && repeated.choices + repeated.repeats + repeated.before + repeated.alternatives > 1;
    if (unbounded && varies) return "repeats without an end what has a choice";
    if (copies > (repeated === null ? CHARACTERS : GROUPS) || (copies > 1 && varies)) {
      return `repeats ${copies} times what is large or has a choice`;
    }
    this.repeats += Number(unbounded);
    this.choices += Number(!exact);
    return null;
  }
}

/** Returns what makes a regular expression one that is not run, null where nothing does. */
export function patternProblem(pattern: string): string | null {
  if (pattern.length > LENGTH) return `has ${pattern.length} characters, expected at most ${LENGTH}`;
  const groups = [new Group()];
  let closed: Group | null = null;
  for (let i = 0; i < pattern.length; ) {
    const width = widthAt(pattern, i);
    const repeated: Group | null = closed;
    closed = null;
    const character = pattern[i]!;
    const group = groups[groups.length - 1]!;
    if (character === "\\" && /[1-9]/.test(pattern[i + 1] ?? "")) return "refers back to a group";
    if (character === "(") groups.push(new Group());
    else if (character === ")") {
      if (groups.length === 1) return "closes a group that is not open";
      closed = groups.pop()!;
      groups[groups.length - 1]!.contains(closed);
    } else if (character === "|") group.next();
    else if ("*+?".includes(character) || at(COUNT, pattern, i) !== null) {
      const problem = group.repeat(...counts(pattern, i), repeated);
      if (problem !== null) return problem;
    }
    if (groups[groups.length - 1]!.repeats > REPEATS) return `has more than ${REPEATS} repetitions without an end in a row`;
    i += width;
  }
  return groups.length === 1 ? null : "opens a group that it does not close";
}

function at(regex: RegExp, text: string, i: number): RegExpExecArray | null {
  regex.lastIndex = i;
  return regex.exec(text);
}

/** Returns how many copies a repetition makes, whether it has no end, and whether it is of one number of copies. */
function counts(pattern: string, i: number): [number, boolean, boolean] {
  const count = at(COUNT, pattern, i);
  if (count === null) return [1, pattern[i] !== "?", false];
  const numbers = [count[1]!, count[3]!].filter((n) => n !== "").map(Number);
  return [numbers.length === 0 ? 1 : Math.max(...numbers), count[2] === "," && count[3] === "", count[2] === ""];
}

function widthAt(pattern: string, i: number): number {
  const count = at(COUNT, pattern, i);
  if (count !== null) return count[0].length;
  if (pattern[i] === "\\") return escapeAt(pattern, i);
  if (pattern[i] === "[") return classAt(pattern, i);
  return at(FLAGS, pattern, i)?.[0].length ?? 1;
}

function escapeAt(pattern: string, i: number): number {
  if (!/^\\[pPxu]\{/.test(pattern.slice(i, i + 3))) return 2;
  const end = pattern.indexOf("}", i);
  return end < 0 ? pattern.length - i : end + 1 - i;
}

function classAt(pattern: string, i: number): number {
  let depth = 0;
  for (let j = i; j < pattern.length; ) {
    if (pattern[j] === "\\") {
      j += escapeAt(pattern, j);
      continue;
    }
    if (pattern[j] === "[") depth++;
    if (pattern[j] === "]") depth--;
    j++;
    if (depth === 0) return j - i;
  }
  return pattern.length - i;
}
