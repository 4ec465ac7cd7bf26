"""Short names for the values of an ONNX graph, from which those of PyTorch's graph can be had back.

Of a graph whose weights lie in another's file most is names. Those of traced values are what it is compared with
PyTorch by, operation by operation: ``conv2d_12`` becomes ``a12``, and the model says once that ``a`` is ``conv2d``.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Collection, Iterator

import onnx_ir as ir

# In the model's metadata: the stems, separated by blanks, in the order of their codes.
_STEMS = "fewstep.stems"
# What a value is called after, and its number: ``conv2d_12``, ``conv2d``.
_TRACED = re.compile(r"(\S+?)(?:_(\d+))?")
# Codes of stems are of lower case, all other short names begin with a capital.
_CODED = re.compile(r"([a-z]+)(\d*)")


def shorten(model: ir.Model, traced: Collection[str]) -> None:
    """Gives values short names and takes those of nodes, in place; inputs and outputs keep theirs.

    Args:
        model: the model.
        traced: the names of computed values that `restore` brings back; other names are lost.
    """
    graph = model.graph
    fixed = _fixed(graph)
    initializers = list(graph.initializers.values())
    computed = [value for node in graph for value in node.outputs if value.name and not value.is_graph_output()]
    parts = {value: match for value in computed if value.name in traced and (match := _TRACED.fullmatch(value.name))}
    stems = [stem for stem, _ in Counter(match[1] for match in parts.values()).most_common()]
    codes = dict(zip(stems, _codes(fixed), strict=False))
    words = _words(string.ascii_uppercase, string.digits + string.ascii_letters)
    fresh = (word for word in words if word not in fixed and word not in traced)
    graph.initializers.clear()  # they are kept by name, and names may meet while they change
    for value in sorted((*computed, *initializers), key=lambda value: -len(value.uses())):
        match = parts.get(value)
        value.name = next(fresh) if match is None else f"{codes[match[1]]}{match[2] or ''}"
    graph.initializers.update({str(value.name): value for value in initializers})
    for node in graph:
        node.name = None
    if stems:
        model.metadata_props[_STEMS] = " ".join(stems)


def restore(model: ir.Model) -> None:
    """Gives the names back that `shorten` was told of, in place; a model with its own names is left as it is."""
    if _STEMS not in model.metadata_props:
        return
    stems = dict(zip(_codes(_fixed(model.graph)), model.metadata_props.pop(_STEMS).split(" "), strict=False))
    for value in [value for node in model.graph for value in node.outputs if not value.is_graph_output()]:
        match = _CODED.fullmatch(str(value.name))
        if match is not None:
            value.name = f"{stems[match[1]]}_{match[2]}" if match[2] else stems[match[1]]


def _fixed(graph: ir.Graph) -> set[str]:
    """Returns the names that are not changed: of inputs and outputs, and of all inside of control flow."""
    inner = [node for node in ir.traversal.RecursiveGraphIterator(graph) if node.graph is not graph]
    blocks = {node.graph for node in inner if node.graph is not None}
    values = [value for node in inner for value in node.outputs]
    values += [value for block in blocks for value in (*block.inputs, *block.initializers.values())]
    return {str(value.name) for value in (*graph.inputs, *graph.outputs, *values)}


def _codes(fixed: Collection[str]) -> Iterator[str]:
    """Yields codes of stems: none is what a fixed name begins with."""
    begun = {match[1] for name in fixed if (match := _CODED.match(name))}
    return (code for code in _words(string.ascii_lowercase, string.ascii_lowercase) if code not in begun)


def _words(first: str, others: str) -> Iterator[str]:
    """Yields words by length, without end."""
    for length in itertools.count():
        yield from ("".join(letters) for letters in itertools.product(first, *[others] * length))
