"""Checks of a source's folder and configurations before a library reads them: what is there, and how large it is."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.errors import SourceError
from fewstep.export.source.model_index import read_config

CONFIGS = ("config.json", "scheduler_config.json")
# Far beyond any network, and built within seconds: a module is made for each layer before weights are looked at.
_LAYERS, _TIMES, _SIZE = 1_000, 100_000, 10_000_000
_BOUNDS = (
    (re.compile(r"(^|_)(layers?|blocks?|depths?)(_|$)"), re.compile(r"channel|size|dim|types|out"), _LAYERS),
    (re.compile(r"timesteps|_steps"), None, _TIMES),
    (re.compile(r"^num_|^max_|size|dim|length|channels|embeddings|heads|groups"), None, _SIZE),
)
_ENTRIES = 10_000
_AGAIN = "download the whole checkpoint again"


def check_files(folder: Path) -> None:
    """Raises SourceError unless all under a folder are plain files and folders, or links that end at such.

    Links out of the folder are those of the hub's cache.
    """
    for count, path in enumerate(_walk(folder, frozenset())):
        if count > _ENTRIES:
            raise SourceError(f"{folder} has more than {_ENTRIES} files, as no checkpoint has", hint="give its folder")
        try:
            mode = path.stat().st_mode
        except OSError as error:
            what = "is a link that leads nowhere" if path.is_symlink() else f"cannot be read ({error.strerror})"
            raise SourceError(f"{path} {what}", hint=_AGAIN) from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise SourceError(f"{path} is neither a file nor a folder (a pipe, a socket or a device)", hint=_AGAIN)


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """Yields all that is under a folder, and follows links to folders."""
    real = os.path.realpath(folder)
    if real in above:
        raise SourceError(f"{folder} is a link to a folder that it is in itself", hint=_AGAIN)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror}", hint="check its permissions") from error
    for path in entries:
        yield path
        if path.is_dir():
            yield from _walk(path, above | {real})


def check_config(folder: Path) -> None:
    """Raises SourceError for a component whose configuration is malformed, or describes what no memory holds."""
    for name in CONFIGS:
        if (folder / name).exists():
            for key, value in _numbers(read_config(folder / name)):
                _check_number(folder / name, key, value)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yields all integers of a value with the names that they are under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def _check_number(path: Path, key: str, value: int) -> None:
    for pattern, unless, most in _BOUNDS:
        if pattern.search(key) and not (unless and unless.search(key)) and value > most:
            raise SourceError(
                f"{path}: {key[:80]} is {value}, expected at most {most}", hint="correct the configuration"
            )
