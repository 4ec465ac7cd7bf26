"""What a quantized program computes in PyTorch, and how what a runtime computes differs.

The whole numbers of every quantized activation, and the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed

from fewstep.metrics import sqnr_db
from fewstep.program import Program
from fewstep.runtimes.base import Array, PointResult

_ops = torch.ops.quantized_decomposed
_QUANTIZE = (_ops.quantize_per_tensor.default, _ops.quantize_per_tensor.tensor)


@dataclass(frozen=True)
class IntegerReference:
    """The whole numbers of each quantized tensor by fx node, in the order of computation; their module paths; outputs.

    ``outputs`` are those in float, by name.
    """

    values: Mapping[str, Array]
    paths: Mapping[str, str]
    outputs: Mapping[str, Array]


@torch.no_grad()
def integer_reference(program: Program, feeds: Mapping[str, Array]) -> IntegerReference:
    """Returns what a program computes of one call's inputs."""
    module = program.exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    recorder = _Recorder(module)
    results = recorder.run(*(torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in program.spec.inputs))
    nodes = {node.name: node for node in module.graph.nodes}
    outputs = {
        spec.name: result.numpy()
        for spec, result in zip(program.spec.outputs, results, strict=True)
        if result.is_floating_point()
    }
    return IntegerReference(recorder.values, {name: _path(nodes[name]) for name in recorder.values}, outputs)


def signed_reference(program: Program, feeds: Mapping[str, Array]) -> IntegerReference:
    """Returns what a quantized program computes of one call's inputs, whole numbers as int8 whatever the plan has."""
    found = integer_reference(program, feeds)
    return replace(found, values={name: _signed(values) for name, values in found.values.items()})


def _signed(values: Array) -> Array:
    if values.dtype == np.int8:
        return values
    shifted: Array = (values.astype(np.int16) - 128).astype(np.int8)
    return shifted


class _Recorder(torch.fx.Interpreter):
    """Keeps the whole numbers of every quantized activation, and frees the rest."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Array] = {}

    def run_node(self, n: torch.fx.Node) -> object:
        """Runs a node."""
        result = super().run_node(n)
        if n.target in _QUANTIZE:
            self.values[n.name] = np.array(result.numpy(), order="C")  # runtimes take no other order
        return result


def _path(node: torch.fx.Node) -> str:
    """Returns the module path in whose result a quantized tensor has its origin."""
    source = node.all_input_nodes[0]
    stack = list(source.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else source.name
    return re.sub(r"^(L\['self'\]\.)?(module\.?)?", "", path) or source.name


def judged(
    expected: IntegerReference, integers: Mapping[str, Array], outputs: Mapping[str, Array]
) -> list[PointResult]:
    """Returns how a runtime's integers and outputs differ from the reference's."""
    found = []
    for name, values in integers.items():
        difference = np.abs(values.astype(np.int32) - expected.values[name].astype(np.int32))
        differing, largest = int(np.count_nonzero(difference)), int(difference.max(initial=0))
        found.append(PointResult(name, expected.paths[name], difference.size, differing, largest))
    for name, value in expected.outputs.items():
        found.append(PointResult(name, "output", value.size, 0, 0, sqnr_db(value, outputs[name])))
    return found
