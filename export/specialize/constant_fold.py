"""Computes parts of a traced program now, in PyTorch, for every step of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.node import map_arg

from fewstep.bundle.program import Program
from fewstep.export.specialize.subgraph import needed, parameter_specs

ReadParameter = Callable[[Node], torch.Tensor]


def parameter_reader(program: Program, *, halves: bool = False) -> ReadParameter:
    """Returns what reads the value of a parameter, buffer or constant of a program.

    Args:
        program: its parameters may be fake: their values are read from ``program.weights``.
        halves: rounds these to fp16, as a recipe with fp16 weights does when it writes them.
    """
    exported, specs = program.exported, parameter_specs(program.exported)

    def read(node: Node) -> torch.Tensor:
        target = str(specs[node.name].target)
        value = exported.state_dict.get(target, exported.constants.get(target))
        assert isinstance(value, torch.Tensor)
        if not isinstance(value, FakeTensor):
            return value.detach()
        assert program.weights is not None
        stored = program.weights[target]
        if halves and value.dtype.is_floating_point:
            stored = stored.half()
        return stored.to(value.dtype)

    return read


@torch.no_grad()
def fold(
    targets: Sequence[Node], rows: Sequence[Mapping[Node, torch.Tensor]], read: ReadParameter
) -> list[list[torch.Tensor]]:
    """Returns the value of every target for every row, targets outermost.

    The arithmetic is the network's own: the same operations in the same precision, a row at a time, so the same bits.
    More precise numbers would be others: sines of angles that float32 has rounded differ from exact ones by 100 dB
    at t = 999, and the network was trained on the former.

    Args:
        targets: nodes that depend on the inputs given in ``rows``, and on nothing else that varies.
        rows: the inputs of each row.
        read: gives the values of parameters. Each is read when it is wanted, and dropped after its last use.
    """
    given = list(rows[0])
    if not targets:
        return []
    nodes = [node for node in needed(targets, given) if node.op != "placeholder"]
    last = {source: node for node in nodes for source in node.all_input_nodes}
    values: dict[Node, list[Any]] = {node: [row[node] for row in rows] for node in given}
    keep = {*targets, *given}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in values:
                values[source] = [read(source)] * len(rows)
        values[node] = [_run(node, values, i) for i in range(len(rows))]
        for source in node.all_input_nodes:
            if last[source] is node and source not in keep:
                del values[source]
    return [values[node] for node in targets]


def _run(node: Node, values: Mapping[Node, list[Any]], row: int) -> Any:
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: values[n][row])
    assert callable(node.target)
    return node.target(*args, **kwargs)
