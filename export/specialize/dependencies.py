"""Which of a program's inputs each of its values depends on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, Node


def dependence(graph: Graph, inputs: Mapping[str, str]) -> dict[Node, frozenset[str]]:
    """Returns for every node the names of the inputs that its value depends on; constants depend on none.

    Args:
        graph: a graph without control flow, as ``torch.export`` gives it.
        inputs: name to report for each placeholder that is an input, by the placeholder's node name. Placeholders left
            out are parameters, buffers and constants.
    """
    found: dict[Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset([inputs[node.name]]) if node.name in inputs else frozenset()
        else:
            found[node] = frozenset().union(*(found[source] for source in node.all_input_nodes))
    return found


def user_inputs(exported: torch.export.ExportedProgram, names: tuple[str, ...]) -> dict[str, str]:
    """Returns the placeholder names of a program's inputs with the names that its specification gives them."""
    return dict(zip(exported.graph_signature.user_inputs, names, strict=True))
