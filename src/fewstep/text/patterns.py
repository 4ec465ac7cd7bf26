"""Refuses rules of tokenizers that could run for ever, before a library compiles them.

A backtracking engine takes exponential time where a repetition is repeated (``(a+)+``) or repeats a choice
(``(a|a)*``), and time to the power of n where n repetitions stand in a row. No known tokenizer has more than two
of these in one alternative, or repeats what has a choice. `apps/web/src/lib/patterns.ts` refuses the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Repetitions without an end in one alternative: GPT-4o's has two that overlap.
_REPEATS = 3
_LENGTH = 4_000
_COUNT = re.compile(r"\{(\d{0,9})(,?)(\d{0,9})\}")
_FLAGS = re.compile(r"\((\?([a-zA-Z-]{0,9}:|=|!|>|<=|<!|<\w{1,40}>))?")
# A counted repetition makes so many copies of a character, or of a group.
_CHARACTERS, _GROUPS = 1_000, 16
# How many times longer all of a normalizer's replacements may make a text together, and how many steps there may be.
_GROWTH, _STEPS = 64, 64


def pattern_problem(pattern: str) -> str | None:
    """Returns what makes a regular expression one that is not run, None where nothing does."""
    if len(pattern) > _LENGTH:
        return f"has {len(pattern)} characters, expected at most {_LENGTH}"
    groups: list[_Group] = [_Group()]
    closed: _Group | None = None
    i = 0
    while i < len(pattern):
        width, character, repeated, closed = _width(pattern, i), pattern[i], closed, None
        if character == "\\" and pattern[i + 1 : i + 2].isdigit() and pattern[i + 1] != "0":
            return "refers back to a group"
        if character == "(":
            groups.append(_Group())
        elif character == ")":
            if len(groups) == 1:
                return "closes a group that is not open"
            closed = groups.pop()
            groups[-1].contains(closed)
        elif character == "|":
            groups[-1].next()
        elif character in "*+?" or _COUNT.match(pattern, i):
            problem = groups[-1].repeat(*_counts(pattern, i), repeated)
            if problem is not None:
                return problem
        if groups[-1].repeats > _REPEATS:
            return f"has more than {_REPEATS} repetitions without an end in a row"
        i += width
    return None if len(groups) == 1 else "opens a group that it does not close"


class _Group:
    """What was seen of a group so far."""

    def __init__(self) -> None:
        self.repeats, self.alternatives, self.choices, self._before = 0, 1, 0, 0

    def next(self) -> None:
        """Begins another alternative."""
        self.alternatives += 1
        self._before, self.repeats = max(self._before, self.repeats), 0

    def contains(self, inner: _Group) -> None:
        """Notes a group that is closed."""
        self.repeats += max(inner.repeats, inner._before)
        self.choices += inner.choices + (inner.alternatives > 1)

    def repeat(self, copies: int, unbounded: bool, exact: bool, repeated: _Group | None) -> str | None:
        """Notes a repetition, of a group or else of one character, and returns what is wrong with it."""
        varies = repeated is not None and (
            repeated.choices or repeated.repeats or repeated._before or repeated.alternatives > 1
        )
        if unbounded and varies:
            return "repeats without an end what has a choice"
        if copies > (_CHARACTERS if repeated is None else _GROUPS) or (copies > 1 and varies):
            return f"repeats {copies} times what is large or has a choice"
        self.repeats += unbounded
        self.choices += not exact
        return None


def _counts(pattern: str, i: int) -> tuple[int, bool, bool]:
    """Returns how many copies a repetition makes, whether it has no end, and whether it is of one number of copies."""
    count = _COUNT.match(pattern, i)
    if count is None:
        return 1, pattern[i] != "?", False
    copies = max((int(n) for n in (count[1], count[3]) if n), default=1)
    return copies, count[2] == "," and not count[3], not count[2]


def _width(pattern: str, i: int) -> int:
    """Returns how many characters belong to what begins at one."""
    count = _COUNT.match(pattern, i)
    if count is not None:
        return count.end() - i
    if pattern[i] == "\\":
        return _escape(pattern, i)
    if pattern[i] == "[":
        return _class(pattern, i)
    flags = _FLAGS.match(pattern, i)
    return 1 if flags is None else flags.end() - i


def _escape(pattern: str, i: int) -> int:
    r"""Returns how long an escape is: ``\p{L}`` and ``\x{2581}`` have their names in braces."""
    if pattern[i + 1 : i + 2] in ("p", "P", "x", "u") and pattern[i + 2 : i + 3] == "{":
        end = pattern.find("}", i)
        return len(pattern) - i if end < 0 else end + 1 - i
    return 2


def _class(pattern: str, i: int) -> int:
    """Returns how long a class of characters is, with classes inside it."""
    depth, j = 0, i
    while j < len(pattern):
        if pattern[j] == "\\":
            j += _escape(pattern, j)
            continue
        depth += {"[": 1, "]": -1}.get(pattern[j], 0)
        j += 1
        if depth == 0:
            return j - i
    return len(pattern) - i


def tokenizer_problem(values: Any) -> str | None:
    """Returns what makes a ``tokenizer.json`` one that is not run, None where nothing does."""
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        return "has no model"
    growth, steps = 1.0, 0
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for step in _objects(values.get(part)):
            steps += 1
            pattern = step.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) else None
            problem = pattern_problem(regex) if isinstance(regex, str) else None
            if problem is not None:
                return f"has a pattern that {problem}: {str(regex)[:60]!r}"
            content = step.get("content", step.get("prepend"))
            if part == "normalizer" and isinstance(content, str):
                found = pattern.get("String") if isinstance(pattern, dict) else None
                growth *= max(1.0, len(content) / max(1, len(found) if isinstance(found, str) else 1))
    if steps > _STEPS:
        return f"has {steps} steps, expected at most {_STEPS}"
    return f"makes texts up to {growth:.0f} times longer" if growth > _GROWTH else None


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a part: the objects with a type, in sequences."""
    if isinstance(value, dict):
        if "type" in value:
            yield value
        for inner in value.values():
            yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)
