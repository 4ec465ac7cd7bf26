"""Gives the values of an ONNX graph short names, and those of traced values their own names back."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from fewstep.runtimes.passes.short_names import ShortNames, lengthener, other_names

# In the model's metadata.
_NAMES = "fewstep.names"


def shorten(model: ir.Model, traced: Collection[str]) -> None:
    """Gives values short names and takes those of nodes, in place; inputs and outputs keep theirs.

    Args:
        model: the model.
        traced: the names of computed values that `restore` brings back, by which they are compared with PyTorch's;
            other names are lost.
    """
    graph = model.graph
    fixed = _fixed(graph)
    initializers = list(graph.initializers.values())
    computed = [value for node in graph for value in node.outputs if value.name and not value.is_graph_output()]
    names = ShortNames()
    short = names.shorten([str(value.name) for value in computed if value.name in traced], fixed)
    fresh = other_names(fixed | set(traced))
    graph.initializers.clear()  # they are kept by name, and names may meet while they change
    for value in sorted((*computed, *initializers), key=lambda value: -len(value.uses())):
        value.name = short.get(str(value.name)) or next(fresh)
    graph.initializers.update({str(value.name): value for value in initializers})
    for node in graph:
        node.name = None
    if short:
        model.metadata_props[_NAMES] = names.table


def restore(model: ir.Model) -> None:
    """Gives the names back that `shorten` was told of, in place; a model with its own names is left as it is."""
    lengthen = lengthener(model.metadata_props.pop(_NAMES, ""))
    for node in model.graph:
        for value in node.outputs:
            if value.name and not value.is_graph_output():
                value.name = lengthen(value.name)


def _fixed(graph: ir.Graph) -> set[str]:
    """Returns the names that are not changed: of inputs and outputs, and of all inside of control flow."""
    inner = [node for node in ir.traversal.RecursiveGraphIterator(graph) if node.graph is not graph]
    blocks = {node.graph for node in inner if node.graph is not None}
    values = [value for node in inner for value in node.outputs]
    values += [value for block in blocks for value in (*block.inputs, *block.initializers.values())]
    return {str(value.name) for value in (*graph.inputs, *graph.outputs, *values)}
