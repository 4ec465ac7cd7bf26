"""Files that strangers wrote, read strictly: what is refused is refused before anything is made of it.

JSON of any size or depth costs no more than its bytes; names that are there twice, numbers that are none (``NaN``,
``1e999``) or too long, and halves of surrogate pairs, which other languages' readers would take otherwise, are errors.
"""

from __future__ import annotations

import json
import math
import stat
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from fewstep.errors import FewstepError

# A manifest has some 100 kB, the longest plans some MB. Parsed, JSON takes up to 25 times its size.
JSON_BYTES = 16 << 20
# Nothing that fewstep writes is deeper than 12.
_DEPTH = 64
# A seed has up to 20 digits.
_DIGITS = 20
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
)


class _Refused(ValueError):
    """Says why a text is not read."""


def read_file(path: Path, most_bytes: int, *, error: type[FewstepError], hint: str) -> bytes:
    """Returns the content of a plain file of at most so many bytes.

    Raises:
        error: it is a folder, a pipe or a device, is longer, or its name cannot be one.
        OSError: it is not there or cannot be read.
    """
    try:
        found = path.stat()
    except ValueError as problem:  # a NUL, or half a surrogate pair
        raise error(f"{str(path)!r} cannot be the name of a file: {problem}", hint=hint) from problem
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "no plain file")
        raise error(f"{path} is {kind}, expected a file", hint=hint)
    with path.open("rb") as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise error(f"{path} has more than {most_bytes} bytes, which no such file needs", hint=hint)
    return content


def read_json(path: Path, *, error: type[FewstepError], hint: str, most_bytes: int = JSON_BYTES) -> Any:
    """Returns the value of a JSON file.

    Raises:
        error: the file is none that `read_file` reads, or not such JSON as `parse_json` does.
        OSError: it is not there or cannot be read.
    """
    return parse_json(read_file(path, most_bytes, error=error, hint=hint), str(path), error=error, hint=hint)


def parse_json(content: str | bytes, where: str, *, error: type[FewstepError], hint: str) -> Any:
    """Returns the value of a JSON text in UTF-8.

    Raises:
        error: it is not JSON, has a name twice, a number that is not finite or has more than 20 digits, half a
            surrogate pair, or is nested deeper than 64.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(
            text, object_pairs_hook=_entries, parse_int=_integer, parse_float=_finite, parse_constant=_constant
        )
        _refuse_deep(value)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        raise error(f"{where} is not JSON: it has half a surrogate pair", hint=hint) from problem
    except RecursionError as problem:
        raise error(f"{where} is not JSON that is read: it is nested deeper than {_DEPTH}", hint=hint) from problem
    except ValueError as problem:  # of the decoder, of Unicode, and our own
        raise error(f"{where} is not JSON: {problem}", hint=hint) from problem
    return value


def parse_toml(content: bytes, where: str, *, error: type[FewstepError], hint: str) -> dict[str, Any]:
    """Returns the table of a TOML text.

    Raises:
        error: it is not TOML, or has a number that is not finite or has more than 20 digits.
    """
    try:
        values = tomllib.loads(content.decode(), parse_float=_finite)
        _refuse_deep(values)
    except RecursionError as problem:
        raise error(f"{where} is not TOML that is read: it is nested deeper than {_DEPTH}", hint=hint) from problem
    except ValueError as problem:
        raise error(f"{where} is not TOML: {problem}", hint=hint) from problem
    return values


def validator(schema: Mapping[str, Any]) -> jsonschema.protocols.Validator:
    """Returns a validator for which ``1.0`` and ``true`` are no integers: indices and shapes are made of them."""
    types = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer)
    made = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=types)  # type: ignore[no-untyped-call]
    strict: jsonschema.protocols.Validator = made(schema)
    return strict


def _is_integer(_: object, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _entries(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"the entry {twice[:80]!r} is there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _DIGITS + 1:
        raise _Refused(f"a number of {len(text)} digits, expected at most {_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise _Refused(f"{text[:40]} is no finite number")
    return value


def _constant(text: str) -> float:
    raise _Refused(f"{text} is no finite number")


def _refuse_deep(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > _DEPTH:
            raise _Refused(f"it is nested deeper than {_DEPTH}")
        inner = [v for v in level for v in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        level, depth = [v for v in inner if isinstance(v, (dict, list))], depth + 1
