"""What pipelines do to a text before its tokenizer, as a short list of named operations.

Each is exactly one function that pipelines call, so that what they do can be said with it; the web library does the
same (``apps/web/src/lib/text.ts``), character by character.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

_BLANKS = re.compile(r"\s+")
# Unicode's White_Space, which Python's own idea of white space adds U+001C to U+001F to.
_WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# Python makes no int of so many digits; any such number is beyond Unicode.
_HUGE = re.compile(r"&#[0-9]{4000,};?")


def collapse_whitespace(text: str) -> str:
    """Returns a text with one space for each run of white space, as ``re.sub(r"\\s+", " ", text)``."""
    return _BLANKS.sub(" ", text)


def collapse_unicode_whitespace(text: str) -> str:
    """Returns a text with one space for each run of Unicode's White_Space, as the package regex takes ``\\s+``."""
    return _WHITE_SPACE.sub(" ", text)


def unescape_html(text: str) -> str:
    """Returns a text with the characters that HTML's references stand for, as ``html.unescape``."""
    return html.unescape(_HUGE.sub("\ufffd", text))


# By name, as a manifest lists them; docs/bundle.md says what each does.
OPERATIONS: Mapping[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "collapse_whitespace": collapse_whitespace,
    "collapse_unicode_whitespace": collapse_unicode_whitespace,
    "unescape_html": unescape_html,
}
# What is known to be done is at most: unescape twice, collapse, lower, strip.
_LONGEST = 5


def apply_operations(operations: Sequence[str], text: str) -> str:
    """Returns what the operations, in order, make of a text.

    Raises:
        KeyError: one of them is not among `OPERATIONS`.
    """
    for name in operations:
        text = OPERATIONS[name](text)
    return text


def sequences() -> Iterator[tuple[str, ...]]:
    """Yields every sequence of operations that is looked at, shorter ones first.

    Only ``unescape_html`` does more the second time; the others come once, and of those that collapse one.
    """
    for length in range(_LONGEST + 1):
        for names in product(OPERATIONS, repeat=length):
            counts = Counter(names)
            collapses = sum(count for name, count in counts.items() if name.startswith("collapse"))
            if counts.pop("unescape_html", 0) <= 2 and collapses <= 1 and all(n == 1 for n in counts.values()):
                yield names
