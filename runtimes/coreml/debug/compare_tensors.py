"""Compares a quantized Core ML package with PyTorch operation by operation, in whole numbers.

As `fewstep.runtimes.onnxruntime.debug.compare_tensors` does for ONNX: every quantized tensor is replaced by the
reference's own as soon as it has been computed, so that no difference reaches the next operation, and one evaluation
checks them all. In fp32 arithmetic: what differs is what conversion changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.runtimes.base import Array, PointResult
from fewstep.runtimes.coreml.image_outputs import Unrounded
from fewstep.runtimes.coreml.mil import Evaluator, Operation, open_package
from fewstep.runtimes.coreml.runtime import interface_name, to_interface
from fewstep.runtimes.parity.quantized_reference import integer_reference, judged

# coremltools numbers the quantize operations in the order of the graph that it translates, and may merge equal ones.
_NUMBERED = re.compile(r"quantize_(\d+)(_cast_fp16)?")


def compare_integers(
    program: Program, path: Path, feeds: Mapping[str, Array], function: str | None = None
) -> list[PointResult]:
    """Returns the comparison of every quantized tensor of a component in the order of computation, then of its outputs.

    ``function`` is the package's, its default one if None.

    Raises:
        ContractError: the package has no such function.
        ExportError: the package has a quantized tensor that the program has not, or none at all.
    """
    reference = integer_reference(program, feeds)
    order = list(reference.values)
    package = open_package(path.parent, function)
    given: dict[str, str] = {}
    for operation in package.functions[package.default].block.operations:
        if operation.type == "quantize":
            name = operation.outputs[0][0]
            match = _NUMBERED.fullmatch(name)
            if match is None or int(match[1]) >= len(order):
                raise ExportError(
                    f"{path.parent}: quantized tensor {name} is none of the program's {len(order)}",
                    hint="was the package compiled from this program?",
                )
            given[name] = order[int(match[1])]
    if not given:
        raise ExportError(
            f"{path.parent} has no quantized tensor, the program has {len(order)}",
            hint="was the package compiled from this program?",
        )
    computed: dict[str, Any] = {}
    unrounded = Unrounded(package)

    def keep(operation: Operation, arguments: Mapping[str, Any], results: tuple[Any, ...]) -> None:
        if operation.type == "quantize":
            computed[operation.outputs[0][0]] = results[0]
        unrounded(operation, arguments, results)

    outputs = Evaluator(package, precision="fp32").run(
        to_interface(feeds), observe=keep, given={name: reference.values[node] for name, node in given.items()}
    )
    outputs |= unrounded.values
    named = {name: outputs[interface_name(name)] for name in reference.outputs}
    return judged(reference, {given[name]: value for name, value in computed.items()}, named)
