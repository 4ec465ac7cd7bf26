"""Further arguments of a pipeline's call: as ``NAME=VALUE`` on the command line, as JSON in the manifest, and back.

In the manifest an option is ``{"value": V}``, or ``{"by_steps": {"2": V, ...}}`` where it depends on the step count, or
``{"python": TEXT}`` where JSON cannot hold it: such a bundle is verified with its golden pack alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.errors import SourceError

VALUE, BY_STEPS, PYTHON = "value", "by_steps", "python"
_WORDS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class ByStep:
    """An option that depends on the step count: its values by count."""

    values: Mapping[int, Any]

    def __call__(self, steps: int) -> Any:
        """Returns the value for a step count.

        Raises:
            SourceError: there is none.
        """
        if steps not in self.values:
            have = ", ".join(map(str, sorted(self.values)))
            raise SourceError(
                f"an option has no value for {steps} steps, it has values for {have}",
                hint="give the option one value for all step counts, or sample with one of these",
            )
        return self.values[steps]


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Returns the options of texts ``NAME=VALUE``.

    A value is JSON: a number, true, false, null, a list, an object or a string in quotes. What is none of these and
    opens no bracket or quote is taken as a string.

    Raises:
        SourceError: a text has no name or no value, a name comes twice, or a value is malformed.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise SourceError(f"option {text!r} is not NAME=VALUE", hint="for example strength=0.5 or sigmas=[1.0,0.4]")
        if name in found:
            raise SourceError(f"option {name!r} is given twice, expected one value for it", hint="give one of them")
        found[name] = _parse(name, value.strip())
    return found


def to_json(options: Mapping[str, Any], steps: Collection[int]) -> dict[str, dict[str, Any]]:
    """Returns options as the manifest keeps them; those that depend on the step count for each of ``steps``."""
    return {name: _entry(value, steps) for name, value in options.items()}


def from_json(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the options that `to_json` wrote, without those that only Python has: see `only_python`."""
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        if VALUE in entry:
            found[name] = entry[VALUE]
        elif BY_STEPS in entry:
            found[name] = ByStep({int(n): value for n, value in entry[BY_STEPS].items()})
    return found


def only_python(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the names of the options whose values are not in the manifest."""
    return [name for name, entry in entries.items() if PYTHON in entry]


def _parse(name: str, text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        value = _other(name, text, error)
    if not _is_finite(value):
        raise SourceError(f"option {name} is {text!r}, expected finite numbers", hint="leave it out for the default")
    return value


def _other(name: str, text: str, error: json.JSONDecodeError) -> Any:
    """Returns a number that JSON writes otherwise (``.5``), or the text as a string."""
    if not text or text[0] in "[{\"'":
        raise SourceError(
            f"option {name} is {text!r}, which is not JSON: {error.msg} at character {error.pos}",
            hint="write lists as [1.0,0.5] and strings without quotes or in double ones; mind the shell's quoting",
        ) from error
    try:
        return float(text)
    except ValueError:
        return text


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return all(map(_is_finite, value.values())) if isinstance(value, dict) else True


def _entry(value: Any, steps: Collection[int]) -> dict[str, Any]:
    if not callable(value):
        return {VALUE: _plain(value)} if _is_json(value) else {PYTHON: type(value).__name__}
    values: dict[int, Any] = {}
    for count in sorted(steps):
        try:
            values[count] = value(count)
        except Exception:  # a user's function: it may have no value for a count that nobody asks for
            continue
    if not values or not all(map(_is_json, values.values())):
        return {PYTHON: "a function of the step count"}
    return {BY_STEPS: {str(n): _plain(v) for n, v in values.items()}}


def _is_json(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_json, value.values()))
    return value is None or (isinstance(value, (bool, int, float, str)) and _is_finite(value))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
