"""Compares a quantized ExecuTorch program with PyTorch operation by operation, in whole numbers.

A delegate hides what is inside of it, and a ``.pte`` cannot be cut. So the graph is: every quantized tensor becomes an
output where it is computed and an input where it is read, and this graph is lowered as the artifact was. Kernels and
constants are the artifact's, and no difference reaches the next operation. That the artifact itself computes the same
is what the checks of its outputs say, against the noise floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.fx import GraphModule, Node

from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.runtimes.base import Array, PointResult
from fewstep.runtimes.executorch.compile.lower import convert, prepared
from fewstep.runtimes.executorch.session import load
from fewstep.runtimes.parity.quantized_reference import IntegerReference, judged, signed_reference
from fewstep.runtimes.passes.quantized_weights import QUANTIZE

# A program is compared at every step, and takes longer to lower than to run.
_CUT: WeakKeyDictionary[torch.export.ExportedProgram, bytes] = WeakKeyDictionary()


def compare_integers(program: Program, path: Path, feeds: Mapping[str, Array]) -> list[PointResult]:
    """Returns the comparison of every quantized tensor of a component in the order of computation, then of its outputs.

    Raises:
        ExportError: the program has no quantized tensor.
    """
    expected = signed_reference(program, feeds)
    if not expected.values:
        raise ExportError(f"{path}: the program has no quantized tensors", hint="was it compiled from a plan?")
    inputs = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in program.spec.inputs]
    if program.exported not in _CUT:
        _CUT[program.exported] = _lowered(program, expected, inputs)
    given = [torch.from_numpy(expected.values[name]) for name in expected.values]
    loaded = load(_CUT[program.exported])
    results = [result.numpy().copy() for result in loaded.method.execute([*inputs, *given])]
    integers = dict(zip(expected.values, results[len(program.spec.outputs) :], strict=True))
    named = zip(program.spec.outputs, results, strict=False)  # the outputs come before the integers
    return judged(expected, integers, {spec.name: values for spec, values in named})


def _lowered(program: Program, expected: IntegerReference, inputs: list[torch.Tensor]) -> bytes:
    names = list(expected.values)
    module = _cut(prepared(program), names)
    given = [torch.from_numpy(expected.values[name]) for name in names]
    return convert(program.component, module, (*inputs, *given))[0]


def _cut(module: GraphModule, names: list[str]) -> GraphModule:
    """Returns a graph whose quantized tensors are outputs, and whose readers of them take inputs instead."""
    graph = module.graph
    nodes: dict[str, Node] = {node.name: node for node in graph.nodes if node.target is QUANTIZE}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for name in names:
        with graph.inserting_after(last):
            last = graph.placeholder(f"{name}_given")
        last.meta = dict(nodes[name].meta)
        nodes[name].replace_all_uses_with(last)
    (output,) = (node for node in graph.nodes if node.op == "output")
    results: Any = output.args[0]
    output.args = ((*results, *(nodes[name] for name in names)),)
    graph.set_codegen(torch.fx.graph.CodeGen())  # inputs and outputs are not those that were traced
    return GraphModule(module, graph)  # without the hook that checks them
