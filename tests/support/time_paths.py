"""Networks with a time path, and what is left of it in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.bundle.program import Program

ROWS = ({"timestep": 999.0, "time:r": 0.5}, {"timestep": 499.0, "time:r": 0.25}, {"timestep": 3.0, "time:r": 0.0})

BINDINGS = {
    "sample": "latent",
    "t": "timestep",
    "r": "time:r",
    "prompt": "text_encoder.state",
    "w": "guidance_embedding",
}

SHAPES = {"sample": (1, 6, 8), "t": (1,), "r": (1,), "prompt": (1, 5, 8), "w": (1, 8)}

# Reads of a row of a table, and what lays it out; everything else is arithmetic.
READING = {"Gather", "Slice", "Split", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Concat", "Constant", "Identity"}


def program_of(module: torch.nn.Module, names: tuple[str, ...] = tuple(SHAPES)) -> Program:
    """Returns the program of a module that takes the named inputs."""
    torch.manual_seed(0)
    example = tuple(torch.randn(SHAPES[name]) for name in names)
    exported = torch.export.export(module.eval(), example)
    inputs = tuple(TensorSpec(name, "float32", SHAPES[name]) for name in names)
    with torch.no_grad():
        shape = tuple(module(*example)[0].shape)
    spec = ComponentSpec(inputs, (TensorSpec("out", "float32", shape),), {n: BINDINGS[n] for n in names}, "loop")
    return Program("denoiser", "unet", exported, spec)


def feeds_of(names: tuple[str, ...], row: Mapping[str, float], seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random inputs, with the numbers of a row as the times."""
    random = np.random.default_rng(seed)
    feeds = {name: random.standard_normal(SHAPES[name], dtype=np.float32) for name in names}
    return feeds | {n: np.full(1, row[BINDINGS[n]], np.float32) for n in names if BINDINGS[n] in row}


def onnx_time_path(path: Path) -> list[str]:
    """Returns the operations of a model that depend on the step alone and do arithmetic."""
    graph = ir.load(path).graph
    sources: dict[ir.Value | None, frozenset[str]] = {v: frozenset([str(v.name)]) for v in graph.inputs}
    found = []
    for node in graph:
        depends = frozenset().union(*(sources.get(v, frozenset()) for v in node.inputs))
        sources |= dict.fromkeys(node.outputs, depends)
        if depends == {"step"} and node.op_type not in READING:
            found.append(node.op_type)
    return found


class Everything(torch.nn.Module):
    """A network of one of each: a time path, times and guidance mixed, a fixed path, and keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.guide, self.key = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.body, self.still = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.randn(1, 8))

    def forward(
        self, sample: torch.Tensor, t: torch.Tensor, r: torch.Tensor, prompt: torch.Tensor, w: torch.Tensor
    ) -> tuple[torch.Tensor]:
        frequencies = torch.exp(-torch.arange(4) / 4)
        angles = t[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1)) + r[:, None]
        shift, scale = torch.nn.functional.silu(time + self.guide(w)).chunk(2, dim=-1)
        hidden = self.body(sample) * (1 + time[:, None]) + torch.cat([shift, scale], dim=-1)[:, None]
        keys = self.key(prompt)
        weights = torch.softmax(hidden @ keys.transpose(1, 2), dim=-1)
        return (weights @ keys + torch.tanh(self.still) * t[:, None, None] / 1000,)
