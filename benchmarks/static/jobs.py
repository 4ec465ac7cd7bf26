"""What is counted of a network: parameters and multiplications before and after its steps are known."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale.networks import Component, tensors
from benchmarks.static.networks import STATIC, Case
from fewstep.bundle.contract import LOOP, ComponentSpec, TensorSpec
from fewstep.bundle.program import Program
from fewstep.export.source.lazy_weights import meta_module
from fewstep.export.specialize.counts import removed
from fewstep.export.specialize.hoist import specialize
from fewstep.export.trace.component_module import WiredModule, normalise
from fewstep.export.trace.fake_tensors import fake_trace
from fewstep.export.trace.fake_trace import fake_call, unglued


def count(case: str, steps: int) -> dict[str, Any]:
    """Returns parameters and multiplications of a denoiser in step form, and of the parts of its table form."""
    started = time.perf_counter()
    program = program_of(STATIC[case])
    traced = time.perf_counter()
    static = specialize(program, [{"timestep": 999.0 - 100.0 * k} for k in range(steps)])
    found = removed(program, static)
    figures = {"step form": asdict(found.before), "in every step": asdict(found.step)}
    if static.conditions is not None:
        figures["once for a picture"] = asdict(found.once)
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
    normalise(exported)
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
