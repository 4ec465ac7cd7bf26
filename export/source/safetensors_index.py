"""Finds the safetensors files of a component and reads single tensors from them, each through its own mapping."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.errors import SourceError
from fewstep.strict import JSON_BYTES, parse_json, read_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What diffusers and transformers call the weights of a component.
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("fp16", "bf16", "fp32")
# model.safetensors, model.fp16.safetensors, model.safetensors.index.json, model.safetensors.index.fp16.json
_NAMES = re.compile(
    rf"(?:{'|'.join(_STEMS)})(?:\.(?P<variant>[\w-]+))?\.safetensors(?P<index>\.index(?:\.(?P<sharded>[\w-]+))?\.json)?"
)
_AGAIN = "download it again"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Returns the size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Returns its values, mapped: memory is taken while they are looked at and given back with the tensor."""
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        # Copy on write, because torch warns about tensors on memory that must not be written.
        values = np.memmap(self.path, np.uint8, mode="c", offset=self.offset, shape=(self.nbytes,))
        return torch.from_numpy(values).view(self.dtype).view(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by key, without their values.

    Raises:
        SourceError: the file is not safetensors, or its length is not what its header promises.
    """
    header, start = _parse_header(path)
    tensors = {key: _stored(path, key, entry, start) for key, entry in header.items()}
    expected = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    size = path.stat().st_size
    if size != expected:
        raise SourceError(f"{path} has {size} bytes, expected {expected}", hint=f"the file is truncated: {_AGAIN}")
    return tensors


def read_folder(folder: Path, variant: str | None = None) -> dict[str, StoredTensor]:
    """Returns the tensors of a component's folder by key, of one file or of the shards that its index names.

    Which of several files: see `variant_of`.

    Raises:
        SourceError: no weights, a shard is missing or not what the index says, or a file is damaged.
    """
    path = _files_of(folder).get(variant_of(folder, variant))
    if path is None:
        raise SourceError(
            f"{folder} has no weights, expected {_STEMS[0]}.safetensors, {_STEMS[1]}.safetensors or an index of shards",
            hint="download the component again",
        )
    return _read_shards(folder, path) if path.suffix == ".json" else read_header(path)


def variant_of(folder: Path, variant: str | None) -> str | None:
    """Returns the variant whose files are taken of a component's folder, None for those with no variant in their names.

    That is the one that is asked for, if the folder has it: parts of a checkpoint may have none. Without one, files
    that name no variant are preferred, as by ``from_pretrained``, then fp16, bf16 and fp32, then the first by name.
    """
    found = _files_of(folder)
    if variant in found:
        return variant
    return next((v for v in (None, *_VARIANTS, *sorted(v for v in found if v)) if v in found), None)


def variant_of_all(folders: Iterable[Path], asked: str | None) -> str | None:
    """Returns the variant that loads a checkpoint whose components have these folders, as a user of diffusers tells it.

    ``from_pretrained`` takes one variant for all: of each component its files, or those that name none. What is asked
    for is that one. Otherwise it is None where every component has files that name none, else fp16, bf16, fp32 or the
    first by name that every component without such files has.

    Raises:
        SourceError: no component has the variant that is asked for, or no one variant loads all of them.
    """
    found = {folder.name: files for folder in folders if (files := set(_files_of(folder)))}
    variants = sorted({v for files in found.values() for v in files if v is not None})
    if asked is not None and asked not in variants:
        have = [
            *variants,
            *(["files without a variant in their names"] if any(None in f for f in found.values()) else []),
        ]
        raise SourceError(
            f"no component has files of the variant {asked!r}, there are: {', '.join(have) or 'no weights'}",
            hint="leave --variant out to take what is there",
        )
    named = {name: files for name, files in found.items() if None not in files}
    candidates = (None, *_VARIANTS, *variants) if asked is None else (asked,)
    for variant in candidates:
        if all(variant in files for files in named.values()):
            return variant
    told = "; ".join(f"{name} has {', '.join(sorted(filter(None, files)))}" for name, files in sorted(named.items()))
    raise SourceError(
        f"no one variant loads every component: {told}",
        hint="give every component files of one variant, or files that name none",
    )


def _files_of(folder: Path) -> dict[str | None, Path]:
    """Returns a component's weights file, or the index of its shards, by variant."""
    found: dict[str | None, Path] = {}
    for stem in _STEMS:
        for path in sorted(folder.glob(f"{stem}.*")):
            match = _NAMES.fullmatch(path.name)
            if match is not None and path.is_file():
                found.setdefault(match["variant"] or match["sharded"], path)
    return found


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map: Mapping[str, Any] = read_json(index, error=SourceError, hint=_AGAIN)["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index} is not an index of shards: it has no weight_map", hint=_AGAIN) from error
    headers: dict[str, dict[str, StoredTensor]] = {}
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+", shard) or not (folder / shard).is_file():
            raise SourceError(f"{index} names the shard {shard!r}, which is not in {folder}", hint=_AGAIN)
        headers[shard] = read_header(folder / shard)
    for key, shard in weight_map.items():
        if key not in headers[shard]:
            raise SourceError(f"{folder / shard} lacks the tensor {key}, which {index.name} promises", hint=_AGAIN)
    return {key: headers[shard][key] for key, shard in weight_map.items()}


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the entries of a header by key and where the values start."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            text = stream.read(length) if 8 + length <= size and length <= JSON_BYTES else b""
    except struct.error:
        text = b""
    header = (
        parse_json(
            text, f"{path} is not a safetensors file: its header cannot be read: it", error=SourceError, hint=_AGAIN
        )
        if text
        else None
    )
    if not isinstance(header, dict) or not header:
        raise SourceError(f"{path} is not a safetensors file: its header cannot be read", hint=_AGAIN)
    return {key: entry for key, entry in header.items() if key != "__metadata__"}, 8 + length


def _stored(path: Path, key: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    try:
        begin, end = entry["data_offsets"]
        name, shape = entry["dtype"], tuple(entry["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path} is not a safetensors file: its header cannot be read", hint=_AGAIN) from error
    if not isinstance(name, str) or name not in _DTYPES:
        raise SourceError(
            f"{path}: {key} is stored as {name}, expected one of {', '.join(_DTYPES)}",
            hint="save the weights in fp32, fp16 or bf16; quantized checkpoints cannot be compiled",
        )
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (begin, end, *shape)):
        raise SourceError(f"{path}: {key} is {list(shape)} from {begin} to {end}, no sizes and places", hint=_AGAIN)
    tensor = StoredTensor(path, key, _DTYPES[name], shape, start + begin)
    if end - begin != tensor.nbytes:
        raise SourceError(
            f"{path}: {key} has {end - begin} bytes, expected {tensor.nbytes} for {name} {list(shape)}", hint=_AGAIN
        )
    return tensor
