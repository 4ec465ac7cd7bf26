"""Checks of weight files before a library reads them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from fewstep.errors import SourceError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def check_weights_file(path: Path, what: str) -> None:
    """Raises SourceError unless ``path`` is a whole safetensors file; ``what`` says what it was given as."""
    if not path.is_file():
        raise SourceError(f"{what} {path} is not a file, expected a safetensors file", hint="check the path")
    if path.suffix in PICKLES:
        raise SourceError(
            f"{what} {path} is a pickle, expected safetensors: unpickling can run code",
            hint="convert it on a machine you can spare",
        )
    check_safetensors(path)


def check_weights_folder(folder: Path) -> None:
    """Raises SourceError if a component's folder has no weights, or only pickles or damaged ones."""
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles and not weights:
        raise SourceError(
            f"{folder} has weights only as a pickle ({pickles[0].name}), expected safetensors: unpickling can run code",
            hint="convert it on a machine you can spare: load it in diffusers, then save_pretrained",
        )
    if not weights and (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no weights, expected a safetensors file", hint="download the component again")
    for path in weights:
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Raises SourceError unless the file's length is what its header promises."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if 8 + length <= size else None
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError):
        header = None
    tensors = header if isinstance(header, dict) else {}
    expected = (
        8 + length + max((t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"), default=0)
        if tensors
        else None
    )
    if expected is None:
        raise SourceError(f"{path} is not a safetensors file: its header cannot be read", hint="download it again")
    if size != expected:
        raise SourceError(
            f"{path} has {size} bytes, expected {expected}", hint="the file is truncated: download it again"
        )
