"""Opens an ``.mlpackage``: a manifest, the model's specification and its weight files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath

from fewstep.bundle.bundle import resolve_inside
from fewstep.errors import BundleError, ContractError
from fewstep.runtimes.coreml.mil.dtypes import Array, DType
from fewstep.runtimes.coreml.mil.names import restored
from fewstep.runtimes.coreml.mil.program import MilProgram
from fewstep.runtimes.coreml.mil.specification import parse_model
from fewstep.runtimes.coreml.mil.weight_file import BlobFile

MANIFEST = "Manifest.json"
_DATA = "Data"
# How programs name the folder of the model's specification.
_MODEL_PATH = "@model_path"


def open_package(path: Path, function: str | None = None) -> MilProgram:
    """Returns the program of a package; weights are read when they are wanted.

    Args:
        path: of the package.
        function: which is to be the program's default; None leaves the package's own.

    Raises:
        BundleError: a file is missing, cut off or damaged, or of a newer specification.
        ContractError: the model is no ML program, has no such function, or a type that the evaluator does not know.
    """
    manifest_path = path / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        relative = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except OSError as error:
        raise BundleError(f"{path} is no .mlpackage: cannot read {MANIFEST} ({error.strerror})", hint=_HINT) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BundleError(f"{manifest_path} does not say which file is the model", hint=_HINT) from error
    specification = resolve_inside(path / _DATA, relative)
    try:
        data = specification.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot read {relative}: {error.strerror}", hint=_HINT) from error
    blobs: dict[str, BlobFile] = {}

    def read_blob(file: str, offset: int, dtype: DType, count: int) -> Array:
        if file not in blobs:
            parts = PurePosixPath(file).parts
            if not parts or parts[0] != _MODEL_PATH:
                raise BundleError(f"{path}: weights in {file!r}, expected a path under {_MODEL_PATH}", hint=_HINT)
            blobs[file] = BlobFile(resolve_inside(specification.parent, "/".join(parts[1:])))
        return blobs[file].read(offset, dtype, count)

    program = restored(parse_model(data, str(path), read_blob))
    if function is None:
        return program
    if function not in program.functions:
        raise ContractError(
            f"{path} has no function {function!r}, it has {', '.join(program.functions)}", hint="build the bundle again"
        )
    return replace(program, default=function)


_HINT = "copy the whole package again or build the bundle again"
