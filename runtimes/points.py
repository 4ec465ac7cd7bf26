"""The reference's side of comparing quantized tensors one by one: what PyTorch makes of each, and the verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import GraphModule, Node

from fewstep.metrics import sqnr_db
from fewstep.program import Program
from fewstep.runtimes.base import Array, PointResult
from fewstep.runtimes.integers import QUANTIZE


@dataclass(frozen=True, eq=False)
class Reference:
    """What PyTorch computes for one call.

    Attributes:
        integers: of every quantized tensor by fx name, in the order of computation; signed, whatever the plan has.
        paths: the module that each comes from.
        outputs: in float, by the manifest's names.
    """

    integers: Mapping[str, Array]
    paths: Mapping[str, str]
    outputs: Mapping[str, Array]


class _Recorder(torch.fx.Interpreter):
    """Keeps the whole numbers of every quantized activation, and frees the rest."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Array] = {}

    def run_node(self, n: Node) -> object:
        """Runs a node."""
        result = super().run_node(n)
        if n.target is QUANTIZE:
            values = result.numpy()
            signed = values if values.dtype == np.int8 else (values.astype(np.int16) - 128).astype(np.int8)
            self.values[n.name] = np.ascontiguousarray(signed)
        return result


@torch.no_grad()
def reference(program: Program, feeds: Mapping[str, Array]) -> Reference:
    """Returns what a quantized program computes in PyTorch for some inputs."""
    module = program.exported.module()
    assert isinstance(module, GraphModule)
    recorder = _Recorder(module)
    results = recorder.run(*(torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in program.spec.inputs))
    nodes = {node.name: node for node in module.graph.nodes}
    outputs = {
        spec.name: result.numpy()
        for spec, result in zip(program.spec.outputs, results, strict=True)
        if result.is_floating_point()
    }
    return Reference(recorder.values, {name: _path(nodes[name]) for name in recorder.values}, outputs)


def judged(expected: Reference, integers: Mapping[str, Array], outputs: Mapping[str, Array]) -> list[PointResult]:
    """Returns how a runtime's integers and outputs differ from the reference's."""
    found = []
    for name, values in integers.items():
        difference = np.abs(values.astype(np.int32) - expected.integers[name].astype(np.int32))
        differing, largest = int(np.count_nonzero(difference)), int(difference.max(initial=0))
        found.append(PointResult(name, expected.paths[name], difference.size, differing, largest))
    for name, value in expected.outputs.items():
        found.append(PointResult(name, "output", value.size, 0, 0, sqnr_db(value, outputs[name])))
    return found


def _path(node: Node) -> str:
    """Returns the module path in whose result a quantized tensor has its origin."""
    source = node.all_input_nodes[0]
    stack = list(source.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else source.name
    return re.sub(r"^(L\['self'\]\.)?(module\.?)?", "", path) or source.name
