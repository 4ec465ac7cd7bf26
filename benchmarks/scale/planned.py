"""A network's sizes from its configuration, and compiling it without weights, in a process of its own."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale.networks import FLUX, Component, tensors

# Weights that share one fp16 scale at 4 bits.
_GROUP = 32


@dataclass(frozen=True)
class Sizes:
    """Parameters of a network and their bytes in a few precisions.

    Only matrices and kernels are quantized; vectors stay fp16. ``int8`` has an fp16 scale for each output channel,
    ``int4`` one for each group of 32 weights.
    """

    parameters: int
    fp16: int
    int8: int
    int4: int
    largest_fp16: int

    @classmethod
    def of(cls, module: torch.nn.Module) -> Sizes:
        """Returns the sizes of a module, whose parameters may be on the meta device; tied ones count once."""
        shapes = [tuple(p.shape) for p in module.parameters()]
        counts = [math.prod(shape) for shape in shapes]
        matrices = [(shape[0], n) for shape, n in zip(shapes, counts, strict=True) if len(shape) > 1]
        vectors = sum(n for shape, n in zip(shapes, counts, strict=True) if len(shape) <= 1)
        return cls(
            parameters=sum(counts),
            fp16=2 * sum(counts),
            int8=2 * vectors + sum(n + 2 * rows for rows, n in matrices),
            int4=2 * vectors + sum(math.ceil(n / 2) + 2 * math.ceil(n / _GROUP) for _, n in matrices),
            largest_fp16=2 * max(counts, default=0),
        )


def write_config(component: Component, folder: Path) -> Path:
    """Writes a component's ``config.json`` and returns the folder."""
    names = {"_class_name": component.cls} if component.library == "diffusers" else {"architectures": [component.cls]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**names, **component.config}))
    return folder


class _NoValues(Mapping[str, torch.Tensor]):
    """Zeros of the right shapes that take no memory until they are looked at."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._shapes = {name: p.shape for name, p in module.named_parameters(remove_duplicate=False)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float16).expand(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def plan_component(name: str) -> dict[str, Any]:
    """Returns a component's sizes, and seconds and peaks of memory of tracing and translating it."""
    from benchmarks.scale.jobs import Stages
    from fewstep.bundle.contract import ComponentSpec, TensorSpec
    from fewstep.bundle.program import Program
    from fewstep.export.source.lazy_weights import meta_module
    from fewstep.export.trace.component_module import WiredModule
    from fewstep.export.trace.fake_tensors import fake_trace
    from fewstep.export.trace.fake_trace import fake_call, unglued
    from fewstep.runtimes.onnxruntime.compile import lower as ort_lower

    component, stages = FLUX[name], Stages()
    with tempfile.TemporaryDirectory() as folder:
        module = meta_module(write_config(component, Path(folder)))
    stages.done("import")
    call = fake_call(module, name, component.part, tensors(component.arguments))
    wired = WiredModule(unglued(call, component.part), module, component.part.method).eval()
    exported = fake_trace(wired, tuple(call.inputs.values()))
    stages.done("trace")
    told = [
        tuple(TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in found.items())
        for found in (call.inputs, call.outputs)
    ]
    program = Program(name, component.part.folder, exported, ComponentSpec(*told, {}), _NoValues(wired))
    model = ort_lower.translate(program, halves=True).model
    stages.done("translate")
    sizes = Sizes.of(module)
    return {"class": component.cls, "nodes": len(model.graph), "sizes": sizes.__dict__, **stages.figures()}
