"""Names the first operation of a Core ML package that departs from PyTorch, as module path and as MIL operation.

coremltools names values after the fx nodes that it translates, so both sides can be compared value by value on one
feed, in fp32 arithmetic: what departs is what conversion or damage changed, not rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.bundle.program import Program
from fewstep.errors import ContractError, ExportError
from fewstep.numerics.metrics import sqnr_db
from fewstep.runtimes.base import Array
from fewstep.runtimes.coreml.compile.decompositions import decomposed
from fewstep.runtimes.coreml.compile.mixed_precision import FP16_SUFFIX
from fewstep.runtimes.coreml.image_outputs import UNROUNDED, image_features
from fewstep.runtimes.coreml.mil import Evaluator, Operation, open_package
from fewstep.runtimes.coreml.runtime import interface_name, to_interface
from fewstep.runtimes.parity.divergence import Departure, module_paths, traced_values


def bisect(
    program: Program, path: Path, feeds: Mapping[str, Array], *, limit_db: float, function: str | None = None
) -> Departure | None:
    """Returns the first operation, in the order of computation, whose result's SQNR is below the limit.

    None if the outputs keep it: a value in between may be a little below it without consequence. An operation that
    cannot be evaluated, or contradicts what the package declares of it, departs with an SQNR of NaN.

    Args:
        program: the traced component, as it was compiled.
        path: the package's ``Manifest.json``.
        feeds: one call's inputs.
        limit_db: the component's limit.
        function: of the package; None takes its default one.

    Raises:
        ExportError: no intermediate value could be compared, so nothing can be said.
        BundleError: the package is damaged beyond reading.
    """
    exported = decomposed(program)
    package = open_package(path.parent, function)
    outputs = _outputs(exported, program)
    for image in image_features(package):  # the picture itself is no value of the program
        outputs[image.name + UNROUNDED] = outputs.pop(image.name)
    comparison = _Comparison(traced_values(exported, program.spec, feeds), outputs, limit_db)
    evaluator = Evaluator(package, precision="fp32")
    try:
        evaluator.run(to_interface(feeds), observe=comparison)
    except ContractError as error:
        comparison.outputs_depart = True  # they could not even be computed
        if comparison.found is None:
            last = comparison.last
            return Departure(
                "", "", f"after {last.where}: {error.message}" if last else error.message, "", float("nan"), 0
            )
    if comparison.found is not None and comparison.outputs_depart:
        operation, name, value = comparison.found
        return Departure(
            name, module_paths(exported).get(name, ""), operation.name, operation.type, value, comparison.compared
        )
    if comparison.compared == 0:
        raise ExportError(f"{path}: no value of the package has the name of a traced value, nothing to bisect")
    return None


class _Comparison:
    """Observes an evaluation and keeps the first operation whose result departs."""

    def __init__(self, reference: Mapping[str, Array], outputs: Mapping[str, str], limit_db: float) -> None:
        self.found: tuple[Operation, str, float] | None = None
        self.last: Operation | None = None
        self.compared = 0
        self.outputs_depart = False
        self._reference = reference
        self._outputs = outputs
        self._limit_db = limit_db

    def __call__(self, operation: Operation, arguments: Mapping[str, Any], results: tuple[Any, ...]) -> None:
        """Compares the results of one operation."""
        self.last = operation
        for (declared, _), value in zip(operation.outputs, results, strict=True):
            name = self._outputs.get(declared, declared).removesuffix(FP16_SUFFIX)
            reference = self._reference.get(name)
            if reference is None or reference.shape != np.shape(value) or reference.dtype.kind != "f":
                continue
            if not reference.any() or not np.isfinite(reference).all():
                continue
            self.compared += 1
            quality = sqnr_db(reference, value)
            if not quality >= self._limit_db:
                self.found = self.found or (operation, name, quality)
                self.outputs_depart |= declared in self._outputs


def _outputs(exported: torch.export.ExportedProgram, program: Program) -> dict[str, str]:
    """Returns the fx names of a program's outputs by the names that the package gives to them."""
    names = exported.graph_signature.user_outputs
    return {interface_name(spec.name): str(name) for spec, name in zip(program.spec.outputs, names, strict=True)}
