"""A program of the table form for one row of its table: what the row alone decides becomes constants of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch.fx import Node

from fewstep.bundle.contract import STEP
from fewstep.bundle.program import Program
from fewstep.export.specialize.constant_fold import fold, parameter_reader
from fewstep.export.specialize.dependencies import dependence, user_inputs
from fewstep.export.specialize.subgraph import PartBuilder, needed

_ops = torch.ops.quantized_decomposed
# Operations on a grid that the row decides, and the same on a grid that is known.
_GRIDS = {
    _ops.quantize_per_tensor.tensor: _ops.quantize_per_tensor.default,
    _ops.dequantize_per_tensor.tensor: _ops.dequantize_per_tensor.default,
}


def at_row(program: Program, row: int, *, halves: bool = False) -> Program:
    """Returns a program that computes what one of the table form does in one row, and does not take the row's number.

    Values that it read from tables are constants, and grids of quantization that it did, are fixed ones. Vectors of all
    rows that are computed for a picture stay an input.

    Args:
        program: its spec binds an input to ``step``.
        row: of the table.
        halves: the recipe rounds the values of ``program.weights`` to fp16.
    """
    exported, spec = program.exported, program.spec
    names = user_inputs(exported, tuple(tensor.name for tensor in spec.inputs))
    inputs = {n: spec.bindings[names[n.name]] for n in exported.graph.nodes if n.name in names}
    step = next(node for node, origin in inputs.items() if origin == STEP)
    outputs = list(next(node for node in exported.graph.nodes if node.op == "output").args[0])
    depends = dependence(exported.graph, {node.name: origin for node, origin in inputs.items()})
    known = [node for node, found in depends.items() if found == {STEP}]
    read = [node for node in known if any(user not in known for user in node.users)]
    folded = fold(read, [{step: torch.tensor([row])}], parameter_reader(program, halves=halves))
    values = {node: found[0] for node, found in zip(read, folded, strict=True)}
    nodes = [node for node in needed(outputs, read) if node not in inputs]
    builder = PartBuilder(exported)
    builder.parameters(nodes)
    for node in read:
        if any(user.target not in _GRIDS for user in node.users):
            builder.buffer(f"row_{node.name}", values[node].contiguous(), node)
    for node in inputs:
        if node is not step:
            builder.input(node.name, node.meta["val"], node)
    for node in nodes:
        if node.target in _GRIDS and node.args[1] in values:
            builder.operation(node, _GRIDS[node.target], _on_known_grid(node, values))
        else:
            builder.operations([node])
    left = tuple(tensor for tensor in spec.inputs if spec.bindings[tensor.name] != STEP)
    bindings = {tensor.name: spec.bindings[tensor.name] for tensor in left}
    return replace(program, exported=builder.finish(outputs), spec=replace(spec, inputs=left, bindings=bindings))


def _on_known_grid(node: Node, values: Mapping[Node, torch.Tensor]) -> tuple[object, ...]:
    """Returns the arguments of an operation on a grid with its scale and zero point as numbers."""
    data, scale, zero, *rest = node.args
    assert isinstance(scale, Node) and isinstance(zero, Node)
    return data, values[scale].item(), values[zero].item(), *rest
