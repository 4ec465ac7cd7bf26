"""Names of what a bundle can draw beside its default: pictures of other shapes, several at once.

A shape is ``512x768`` (height first), a batch of it ``4x512x768``; ``4x`` is a batch of the only size that there is.
The default's own graphs have no name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"(?:(?P<batch>[1-9]\d*)x)?(?P<shape>[1-9]\d*x[1-9]\d*)?")


def variant(shape: str | None, batch: int) -> str:
    """Returns the name of a batch at a shape; None is the only size that there is."""
    return (shape or "") if batch == 1 else f"{batch}x{shape or ''}"


def parts(name: str) -> tuple[str, int] | None:
    """Returns the shape and the batch that a name says, None for other names (of tiles)."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match["shape"] or "", int(match["batch"] or 1))


def batch_of(name: str) -> int:
    """Returns the batch that the name of a variant says."""
    said = parts(name)
    return 1 if said is None else said[1]


def nearest(wanted: str, names: Iterable[str]) -> str | None:
    """Returns which of a component's graphs serves a variant; one that has none of its own shares another's.

    The same name, else the first of the same batch, else the same shape alone, else the first: in this order graphs are
    left out that are equal to the one that serves.
    """
    found = [*names]
    shape, batch = parts(wanted) or (wanted, 1)
    known = {name: said for name in found if (said := parts(name)) is not None}
    choices = [
        *(name for name in found if name == wanted),
        *(name for name, said in known.items() if said[1] == batch),
        *(name for name, said in known.items() if said == (shape, 1)),
        *found,
    ]
    return next(iter(choices), None)
