"""What is counted of a network: parameters and multiplications before and after its steps are known."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from benchmarks.scale.networks import Component, tensors
from benchmarks.static.networks import STATIC, Case
from fewstep.export.fake_trace import fake_call, unglued
from fewstep.export.fakes import fake_trace
from fewstep.export.static import specialize
from fewstep.export.weights import meta_module
from fewstep.export.wiring import WiredModule
from fewstep.manifest import LOOP, ComponentSpec, TensorSpec
from fewstep.program import Program

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.convolution.default)


def count(case: str, steps: int) -> dict[str, Any]:
    """Returns parameters and multiplications of a denoiser in step form, and of the parts of its table form."""
    started = time.perf_counter()
    program = program_of(STATIC[case])
    traced = time.perf_counter()
    static = specialize(program, [{"timestep": 999.0 - 100.0 * k} for k in range(steps)])
    figures = {"step form": _figures(program), "in every step": _figures(static.step)}
    if static.conditions is not None:
        figures["once for a picture"] = _figures(static.conditions)
    seconds = {"trace": traced - started, "specialize": time.perf_counter() - traced}
    return {"parts": figures, "seconds": {name: round(value, 1) for name, value in seconds.items()}}


def program_of(case: Case) -> Program:
    """Returns a denoiser traced without values; those that are asked for are zero."""
    network = case.network
    module = _module(network)
    arguments = tensors(network.arguments)
    call = fake_call(module, "denoiser", network.part, arguments)
    wired = WiredModule(unglued(call, network.part), module, network.part.method).eval()
    exported = fake_trace(wired, tuple(call.inputs.values()))
    inputs, outputs = (
        tuple(TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in found.items())
        for found in (call.inputs, call.outputs)
    )
    bindings = {tensor.name: case.origins.get(tensor.name, f"input:{tensor.name}") for tensor in inputs}
    spec = ComponentSpec(inputs, outputs, bindings, LOOP)
    return Program("denoiser", network.part.folder, exported, spec, _Zeros(exported.state_dict))


def _module(network: Component) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        config = {"_class_name": network.cls, **network.config}
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return meta_module(Path(folder))


class _Zeros(Mapping[str, torch.Tensor]):
    """Zeros of the shapes of a program's parameters, in no memory."""

    def __init__(self, shapes: Mapping[str, torch.Tensor]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        like = self._shapes[name]
        return torch.zeros(1, dtype=like.dtype).expand(like.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _figures(program: Program) -> dict[str, int]:
    exported = program.exported
    values = {**exported.state_dict}
    shared = {
        name.partition(".")[2] if name.startswith(("fixed.", "mixed.")) else name: v for name, v in values.items()
    }
    tables = sum(v.numel() for name, v in shared.items() if name.startswith(("step_table", "table_", "constant_")))
    return {
        "parameters": sum(v.numel() for v in shared.values()) - tables,
        "tables": tables,
        "macs": sum(_macs(node) for node in exported.graph.nodes if node.op == "call_function"),
    }


def _macs(node: Node) -> int:
    """Returns the multiplications of a linear layer, a convolution, a product or attention; 0 of anything else."""
    if node.target is _aten.linear.default:
        return int(node.meta["val"].numel() * node.args[1].meta["val"].shape[1])  # type: ignore[union-attr]
    if node.target is _aten.matmul.default:  # what is left of a linear layer whose rows are batched
        return int(node.meta["val"].numel() * node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
    if node.target in _CONVOLUTIONS:
        return int(node.meta["val"].numel() * math.prod(node.args[1].meta["val"].shape[1:]))  # type: ignore[union-attr]
    if node.target is _aten.scaled_dot_product_attention.default:
        query, key = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
        return int(2 * query.numel() * key.shape[-2])
    return 0
