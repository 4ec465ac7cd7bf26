"""Lowers a traced component to a ``.tflite`` file with litert-torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.runtimes.litert.compile.flatbuffer import LiteRTModel
from fewstep.runtimes.litert.compile.int_weights import pack
from fewstep.runtimes.litert.compile.rewrites import rewrite
from fewstep.runtimes.litert.runtime import NAME, SIGNATURE
from fewstep.runtimes.passes.decompose_group_norm import spread_group_norms
from fewstep.runtimes.passes.materialize import materialized
from fewstep.runtimes.passes.quantized_weights import (
    Point,
    StoredWeight,
    float_rows,
    guard_weights,
    mark_points,
    sign_grids,
    unfold_weights,
)

MODEL = "model.tflite"


def lower(program: Program, folder: Path, weights: str) -> Artifact:
    """Returns the artifact of a component, written as ``<folder>/<component folder>/model.tflite``.

    Args:
        program: the traced component, float or quantized (PT2E).
        folder: the bundle's ``litert`` folder.
        weights: ``fp32``, or ``fp16`` to store as halves every weight whose values are halves already.

    Raises:
        ExportError: the component has an op that cannot be lowered.
    """
    with materialized(program):
        module, stored, points = prepared(program)
        content = convert(program, module)
    content = pack(content, stored, points, halves=weights == "fp16", where=program.component)
    path = folder / program.folder / MODEL
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    relative = f"{program.folder}/{MODEL}"
    return Artifact(NAME, program.component, relative, weights, "fp32", len(content), variant=program.variant)


def prepared(program: Program) -> tuple[GraphModule, list[StoredWeight], list[Point]]:
    """Returns the program's graph as the converter takes it, in float, and what of it is on grids."""
    module = program.exported.module()
    assert isinstance(module, GraphModule)
    sign_grids(module)
    stored = unfold_weights(module)
    float_rows(module)
    points = mark_points(module)
    guard_weights(module, stored, len(points))
    spread_group_norms(module, channels_last=True)
    rewrite(module)
    return module, stored, points


def convert(program: Program, module: GraphModule) -> bytes:
    """Returns the converted model of a component's graph, with one signature of the manifest's names.

    The converter writes Python with the names of inputs in it, which the manifest's need not be fit for.

    Raises:
        ExportError: the component has an op that litert-torch cannot convert.
    """
    inputs = {f"input_{i}": spec for i, spec in enumerate(program.spec.inputs)}
    outputs = {f"output_{i}": spec for i, spec in enumerate(program.spec.outputs)}
    named = _Named(module, list(inputs), list(outputs))
    named.training = False  # what says so to the converter; a traced graph has no modes
    zeros = {name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in inputs.items()}
    with _quiet() as litert_torch:
        try:
            model = litert_torch.signature(SIGNATURE, named, sample_kwargs=zeros).convert()
            content: bytes = model.model_content()
        except Exception as error:  # the converter raises whatever its translation of an op happens to raise
            raise ExportError(
                f"{program.component} cannot be lowered to LiteRT: {type(error).__name__}: {_first_line(error)}",
                hint="rewrite what stops it in the module, or report it",
            ) from error
    converted = LiteRTModel(content)
    given, results = converted.signature()
    return converted.with_interface(
        {inputs[name].name: tensor for name, tensor in given.items()},
        {outputs[name].name: tensor for name, tensor in results.items()},
    )


class _Named(torch.nn.Module):
    """A graph whose inputs and outputs go by names, which the converter takes for the signature."""

    def __init__(self, module: GraphModule, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.module = module
        self._inputs, self._outputs = inputs, outputs

    def forward(self, **feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the outputs by name."""
        results = self.module(*(feeds[name] for name in self._inputs))
        return dict(zip(self._outputs, results, strict=True))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


@contextmanager
def _quiet() -> Iterator[Any]:
    """Yields litert-torch, without its progress on stdout and its warnings of its own internals."""
    root = logging.getLogger()
    level = root.level
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            root.setLevel(logging.ERROR)
            import litert_torch

            litert_torch.config.show_progress = False
            yield litert_torch
    finally:
        root.setLevel(level)
