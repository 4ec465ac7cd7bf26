"""Makes programs out of parts of a traced program, the original left as it is.

A part keeps the names and records of its nodes, so that what is found in it can be named in the module that was traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_structure


@dataclass(frozen=True)
class Reading:
    """A value that a part reads from the step's row of a packed table [M, width], at ``start`` of it."""

    start: int
    node: Node


def shape_of(node: Node) -> tuple[int, ...]:
    """Returns the shape of a node's value."""
    return tuple(node.meta["val"].shape)


def numel_of(node: Node) -> int:
    """Returns how many numbers a node's value has, over all of its tensors."""
    value = node.meta["val"]
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor))


def dtype_of(node: Node) -> torch.dtype:
    """Returns the type of a node's numbers."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def needed(targets: Iterable[Node], given: Iterable[Node]) -> list[Node]:
    """Returns what computes the targets from the given nodes, in order; given nodes are left out."""
    stop, wanted = set(given), set(targets)
    found: list[Node] = []
    if not wanted:
        return found
    for node in reversed(next(iter(wanted)).graph.nodes):
        if node in wanted and node not in stop:
            found.append(node)
            wanted.update(node.all_input_nodes)
    return found[::-1]


def mutation(graph: Graph) -> Node | None:
    """Returns the first node that writes to one of its arguments: to take apart a graph with such a node is wrong."""
    mutable = (node for node in graph.nodes if getattr(getattr(node.target, "_schema", None), "is_mutable", False))
    return next(mutable, None)


def parameter_specs(exported: ExportedProgram) -> dict[str, InputSpec]:
    """Returns what each placeholder that is no input of the user stands for, by its node's name."""
    return {s.arg.name: s for s in exported.graph_signature.input_specs if s.kind != InputKind.USER_INPUT}


class PartBuilder:
    """Copies part of a program's graph into a program of its own: constants first, then inputs, then operations."""

    def __init__(self, exported: ExportedProgram) -> None:
        self._old = exported
        self._specs = parameter_specs(exported)
        self._graph = Graph()
        self._copies: dict[Node, Node] = {}
        self._inputs: list[InputSpec] = []
        self._state: dict[str, torch.Tensor] = {}
        self._constants: dict[str, Any] = {}

    def parameters(self, nodes: Sequence[Node]) -> None:
        """Takes over the parameters, buffers and constants among the nodes."""
        for node in nodes:
            spec = self._specs.get(node.name) if node.op == "placeholder" else None
            if spec is None:
                continue
            self._copies[node] = self._graph.node_copy(node)
            self._inputs.append(spec)
            target = str(spec.target)
            if target in self._old.state_dict:
                self._state[target] = self._old.state_dict[target]
            else:
                self._constants[target] = self._old.constants[target]

    def buffer(self, name: str, value: torch.Tensor, old: Node | None = None) -> Node:
        """Returns the placeholder of a new buffer, in place of a node of the original if one is named."""
        node = self._placeholder(name, value)
        self._inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
        self._state[name] = value
        if old is not None:
            self._copies[old] = node
        return node

    def input(self, name: str, value: torch.Tensor, old: Node | None = None) -> Node:
        """Returns the placeholder of an input, in place of a node of the original if one is named."""
        node = self._placeholder(name, value)
        self._inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
        if old is not None:
            self._copies[old] = node
        return node

    def _placeholder(self, name: str, value: torch.Tensor) -> Node:
        node = self._graph.placeholder(name)
        node.meta["val"] = self._fake(value)
        return node

    def read(self, table: Node, index: Node, readings: Sequence[Reading]) -> None:
        """Puts the row of a packed table [M, width] in place of the nodes that it was packed from."""
        row = self._call(torch.ops.aten.index_select.default, (table, 0, index))
        for reading in readings:
            end = reading.start + numel_of(reading.node)
            flat = self._call(torch.ops.aten.slice.Tensor, (row, 1, reading.start, end))
            self._copies[reading.node] = self._call(
                torch.ops.aten.reshape.default, (flat, list(shape_of(reading.node)))
            )

    def _call(self, op: Any, args: tuple[Any, ...]) -> Node:
        node = self._graph.call_function(op, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        with self._mode():
            node.meta["val"] = op(*values)
        return node

    def operations(self, nodes: Sequence[Node]) -> None:
        """Copies operations; what they take has to be there already."""
        for node in nodes:
            if node.op not in ("placeholder", "output"):
                self._copies[node] = self._graph.node_copy(node, lambda n: self._copies[n])

    def operation(self, node: Node, target: Any, args: tuple[Any, ...]) -> None:
        """Puts another operation in the place of one."""
        taken = torch.fx.node.map_arg(args, lambda n: self._copies[n])
        copy = self._graph.create_node("call_function", target, taken, name=node.name)
        copy.meta = dict(node.meta)
        self._copies[node] = copy

    def finish(self, outputs: Sequence[Node]) -> ExportedProgram:
        """Returns the program with outputs that are nodes of the original."""
        results = tuple(self._copies[node] for node in outputs)
        self._graph.output(results).meta["val"] = tuple(node.meta["val"] for node in results)
        specs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
        names = [spec.arg.name for spec in self._inputs if spec.kind == InputKind.USER_INPUT]
        return ExportedProgram(
            root=self._old.graph_module,
            graph=self._graph,
            graph_signature=ExportGraphSignature(self._inputs, specs),
            state_dict=self._state,
            range_constraints={},
            module_call_graph=[_call_entry(names, len(results))],
            constants=self._constants,
            verifiers=list(self._old.verifiers),
        )

    def _mode(self) -> Any:
        return next(n.meta["val"].fake_mode for n in self._old.graph.nodes if n.op == "placeholder")

    def _fake(self, value: torch.Tensor) -> torch.Tensor:
        with self._mode():
            return torch.empty(value.shape, dtype=value.dtype)


def _call_entry(names: Sequence[str], outputs: int) -> torch.export.ModuleCallEntry:
    """Returns what says how the program is called: positional tensors in, a tuple of tensors out."""
    signature = torch.export.ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=tree_structure((tuple(0 for _ in names), {})),
        out_spec=tree_structure(tuple(0 for _ in range(outputs))),
        forward_arg_names=list(names),
    )
    return torch.export.ModuleCallEntry("", signature)


def part_module(exported: ExportedProgram, inputs: Sequence[Node], targets: Sequence[Node]) -> GraphModule:
    """Returns a module that computes the targets from the inputs, in order; parameters keep their names."""
    specs, graph = parameter_specs(exported), Graph()
    values: dict[str, Any] = {}
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in needed(targets, inputs):
        if node.op == "placeholder":
            target = str(specs[node.name].target)
            values[target] = _on_meta(exported.state_dict.get(target, exported.constants.get(target)))
            copies[node] = graph.get_attr(target)
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in targets))
    return GraphModule(values, graph)


def _on_meta(value: Any) -> Any:
    """Returns a parameter without values as a module has it before it is traced."""
    if not isinstance(value, FakeTensor):
        return value
    return torch.nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="meta"), requires_grad=False)
