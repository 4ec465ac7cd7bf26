"""What ``model_index.json`` says of a diffusers folder, read so that nothing which it names is imported.

diffusers takes the names of libraries and classes from this file. Only classes of diffusers and transformers are let
through: a file beside the weights is no code of ours, and neither is another module of this machine.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from fewstep.errors import SourceError
from fewstep.strict import read_json

_NAME = re.compile(r"[A-Za-z_]\w{0,99}")
_AGAIN = "download it again"
_CODE = "fewstep runs no code of a checkpoint: load it yourself, and give a function of yours (module:function)"


def read_config(path: Path) -> dict[str, Any]:
    """Returns a JSON file of a folder as a table.

    Raises:
        SourceError: it is missing, no plain file, no such JSON as `fewstep.strict` reads, or no table.
    """
    try:
        values = read_json(path, error=SourceError, hint=_AGAIN)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}", hint=_AGAIN) from error
    if not isinstance(values, dict):
        raise SourceError(f"{path} is not a table of names and values", hint=_AGAIN)
    return values


def read_model_index(folder: Path) -> dict[str, Any]:
    """Returns ``model_index.json``.

    Raises:
        SourceError: it is not there, malformed, or names code.
    """
    path = folder / "model_index.json"
    try:
        path.stat()
    except (OSError, ValueError) as error:
        why = "" if isinstance(error, FileNotFoundError) else f" that can be read ({error})"
        raise SourceError(
            f"{folder} has no model_index.json{why}, expected a diffusers folder",
            hint="save the pipeline with save_pretrained, or give module:function",
        ) from error
    index = read_config(path)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or not _NAME.fullmatch(class_name):
        raise SourceError(
            f"{path}: _class_name is {str(class_name)[:80]!r}, expected the name of a pipeline of diffusers", hint=_CODE
        )
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and entry != [None, None]:
            _check_entry(path, name, entry)
    return index


def _check_entry(path: Path, name: str, entry: list[Any]) -> None:
    """Raises SourceError unless a component is of a library that ours is a compiler for."""
    where = f"{path}: component {name[:80]!r}"
    if not _NAME.fullmatch(name):
        raise SourceError(f"{where} has no name that a folder of it can have", hint=_AGAIN)
    if len(entry) != 2 or not all(isinstance(part, str) and _NAME.fullmatch(part) for part in entry):
        raise SourceError(f"{where} is {str(entry)[:80]}, expected a library and a class", hint=_CODE)
    library = entry[0]
    if library not in ("diffusers", "transformers") and not _is_pipeline(library):
        raise SourceError(f"{where} is of the library {library!r}, expected diffusers or transformers", hint=_CODE)
    if (path.parent / name / f"{library}.py").exists():
        raise SourceError(f"{where} comes with code, {name}/{library}.py", hint=_CODE)


def _is_pipeline(library: str) -> bool:
    """Returns whether a name is that of one of diffusers' own folders of pipelines, which have classes, too."""
    from diffusers import pipelines

    module = getattr(pipelines, library, None)
    return inspect.ismodule(module) and module.__name__ == f"{pipelines.__name__}.{library}"
