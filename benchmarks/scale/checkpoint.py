"""Writes checkpoints of random fp16 weights, tensor by tensor, so that their size is not limited by memory."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import IO

import numpy as np
import torch

from benchmarks.scale.networks import Component
from fewstep.export.source.lazy_weights import meta_module

_CHUNK = 1 << 22


def write_checkpoint(component: Component, folder: Path) -> Path:
    """Returns the folder of a component with its configuration and weights, written unless it is there."""
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = {"_class_name": component.cls} if component.library == "diffusers" else {"architectures": [component.cls]}
    (partial / "config.json").write_text(json.dumps({**names, **component.config}, indent=2))
    stem = "diffusion_pytorch_model" if component.library == "diffusers" else "model"
    _write_weights(meta_module(partial), partial / f"{stem}.safetensors")
    return partial.rename(folder)


def _write_weights(module: torch.nn.Module, path: Path) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            _write_values(stream, shape, random)


def _write_values(stream: IO[bytes], shape: tuple[int, ...], random: np.random.Generator) -> None:
    """Writes values at which activations neither vanish nor overflow: of scale 1 / sqrt(fan-in), vectors near 1."""
    mean, scale = (1.0, 0.1) if len(shape) == 1 else (0.0, 1 / math.sqrt(math.prod(shape[1:])))
    left = math.prod(shape)
    while left:
        count = min(left, _CHUNK)
        values = mean + scale * random.standard_normal(count, dtype=np.float32)
        stream.write(values.astype(np.float16).tobytes())
        left -= count
