"""Chooses operations of a quantized program whose integers go into the golden pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.fx import GraphModule, Node

from fewstep.bundle.program import Program
from fewstep.runtimes.parity.golden_operations import MOST_BYTES, MOST_OPERATIONS, GoldenOperation
from fewstep.runtimes.parity.quantized_reference import integer_reference
from fewstep.runtimes.passes.quantized_weights import QUANTIZE

Array = npt.NDArray[Any]


def golden_operations(program: Program, feeds: Mapping[str, Array], step: int | None) -> list[GoldenOperation]:
    """Returns operations spread over a program, each with the integers it takes and those it may give.

    An operation is all that lies between quantized tensors. Those that take and give more bytes than are left of
    `MOST_BYTES` are passed over.

    Args:
        program: the quantized program.
        feeds: of one recorded call.
        step: of the call.
    """
    module = program.exported.module()
    assert isinstance(module, GraphModule)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = {node: spec.name for node, spec in zip(placeholders, program.spec.inputs, strict=True)}
    reference = integer_reference(program, feeds)
    made = []
    for node in (n for n in module.graph.nodes if n.target is QUANTIZE):
        given, inputs = _sources(node)
        made.append(
            GoldenOperation(
                program.component,
                step,
                node.name,
                reference.paths[node.name],
                {n.name: reference.values[n.name] for n in given},
                {names[n]: np.asarray(feeds[names[n]]) for n in inputs},
                reference.least[node.name],
                reference.most[node.name],
            )
        )
    return list(_spread(made))


def _sources(node: Node) -> tuple[list[Node], list[Node]]:
    """Returns the quantized tensors and the inputs of the program that a quantized tensor is computed from at once."""
    seen: set[Node] = set()
    given: dict[Node, None] = {}
    inputs: dict[Node, None] = {}
    at = list(node.all_input_nodes)
    while at:
        one = at.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.target is QUANTIZE:
            given[one] = None
        elif one.op == "placeholder":
            inputs[one] = None
        else:
            at += one.all_input_nodes
    return list(given), list(inputs)


def _spread(operations: list[GoldenOperation]) -> Iterator[GoldenOperation]:
    """Yields some of the operations, from all parts of the graph, the first of which fit first."""
    left = MOST_BYTES
    fitting = [operation for operation in operations if operation.bytes <= MOST_BYTES // 2]
    count = min(MOST_OPERATIONS, len(fitting))
    for k in range(count):
        operation = fitting[k * len(fitting) // count]
        if operation.bytes <= left:
            left -= operation.bytes
            yield operation
