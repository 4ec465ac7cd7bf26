"""Short names for the values of a graph, from which their own can be had back.

Of a graph whose weights lie with another's, most is names, and each is written wherever it is used. Exporters make them
of few stems and a number: ``conv2d_12`` becomes ``aC``, and the model says once that ``a`` is ``conv2d_#``.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

# The first number of a name, that nothing but it is written as.
_NUMBER = re.compile(r"_(0|[1-9]\d*)(?=_|$)")
# The stem's code, the number in base 36, and what keeps it apart from a name that is taken.
_SHORT = re.compile(r"([a-z]+)([0-9A-Z]*)_*")
_DIGITS = string.digits + string.ascii_uppercase
_PLACE = "#"


class ShortNames:
    """Short names of lower case at the start, for names without blanks and ``#``."""

    def __init__(self) -> None:
        self._codes: dict[str, str] = {}
        self._fresh = _words(string.ascii_lowercase, string.ascii_lowercase)

    def shorten(self, names: Iterable[str], taken: Collection[str]) -> dict[str, str]:
        """Returns the short names of names, none of them taken; the shortest for the commonest stems.

        What has got a short name before gets the same, unless it is taken.
        """
        parts = {name: _split(name) for name in names}
        for stem, _ in Counter(stem for stem, _ in parts.values()).most_common():
            if stem not in self._codes:
                self._codes[stem] = next(self._fresh)
        short = {name: self._codes[stem] + number for name, (stem, number) in parts.items()}
        for name in short:
            while short[name] in taken:
                short[name] += "_"
        return short

    @property
    def table(self) -> str:
        """What a reader needs: the stems in the order of their codes, with blanks between them."""
        return " ".join(self._codes)


def lengthener(table: str) -> Callable[[str], str]:
    """Returns the function that takes a short name of a table to the name it stands for, and any other to itself."""
    stems = dict(zip(_words(string.ascii_lowercase, string.ascii_lowercase), table.split(), strict=False))

    def lengthen(name: str) -> str:
        match = _SHORT.fullmatch(name)
        if match is None or match[1] not in stems:
            return name
        return stems[match[1]].replace(_PLACE, str(int(match[2], 36)) if match[2] else _PLACE)

    return lengthen


def other_names(taken: Collection[str]) -> Iterator[str]:
    """Yields short names that no `ShortNames` gives, by length, for what need not keep its own: none of them taken."""
    words = _words(string.ascii_uppercase, string.digits + string.ascii_letters)
    return (word for word in words if word not in taken)


def _split(name: str) -> tuple[str, str]:
    """Returns a name with a place for its first number, and the number in base 36, '' if it has none."""
    match = _NUMBER.search(name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}_{_PLACE}{name[match.end() :]}", _base36(int(match[1]))


def _base36(number: int) -> str:
    digits = _DIGITS[number % 36]
    return _base36(number // 36) + digits if number >= 36 else digits


def _words(first: str, others: str) -> Iterator[str]:
    """Yields words by length, without end."""
    for length in itertools.count():
        yield from ("".join(letters) for letters in itertools.product(first, *[others] * length))
