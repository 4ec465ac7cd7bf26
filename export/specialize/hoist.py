"""Specializes a network of the loop for steps that are known: what does not need the latent leaves its program.

By what a value depends on (`fewstep.export.specialize.dependencies`):

- on the numbers of the step alone: computed now, a row of a table for each step (on nothing at all, as the time of a
  generator with a single step: computed now);
- on what is fixed for one picture (the prompt, the guidance scale, a class) alone: computed once for each picture, by a
  program of its own that runs before the loop;
- on both: computed by that program for all steps at once, one pass over the weights instead of one in every step. Only
  vectors: for as long as an operation reads many more weights than numbers, a batch of steps costs what one does.

No network is known by name. What remains takes the index of the step in place of its time.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fewstep.bundle.contract import BEFORE, DRAW, LATENT, STEP, TIME, TIMESTEP, ComponentSpec, TensorSpec
from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.export.specialize.constant_fold import ReadParameter, fold, parameter_reader
from fewstep.export.specialize.dependencies import dependence, user_inputs
from fewstep.export.specialize.subgraph import (
    PartBuilder,
    Reading,
    dtype_of,
    mutation,
    needed,
    numel_of,
    part_module,
    shape_of,
)
from fewstep.export.trace.fake_tensors import fake_trace

# A value that depends on step and picture and has more numbers than this is no vector: it has an axis of tokens.
_LARGEST_VECTOR = 1 << 16
# Operations that only give the same numbers another shape, place or type.
_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "reshape.default", "unsqueeze.default", "squeeze.dim", "squeeze.default", "squeeze.dims",
        "expand.default", "transpose.int", "permute.default", "select.int", "slice.Tensor", "clone.default",
        "contiguous.default", "to.dtype", "_to_copy.default", "alias.default", "detach.default", "dropout.default",
        "flatten.using_ints", "repeat.default",
    )
)  # fmt: skip

# What the parts of a conditions program, its vectors and the tables of a step program are called.
_PARTS, _VECTORS, _TABLE = ("fixed", "mixed"), "step_vectors", "step_table"

Row = Mapping[str, float]


@dataclass(frozen=True)
class Static:
    """A specialized component: what runs in every step and, if there is any, what runs once before."""

    step: Program
    conditions: Program | None


def specialize(program: Program, rows: Sequence[Row], *, varying: Sequence[str] = (), halves: bool = False) -> Static:
    """Returns a component of the loop specialized for the rows of a table of steps.

    Args:
        program: the component; its inputs are bound to origins.
        rows: the numbers of each step, by origin (``timestep``, ``time:...``).
        varying: components whose outputs change from step to step.
        halves: the recipe rounds the values of ``program.weights`` to fp16.

    Raises:
        ExportError: what is fixed for a picture cannot be traced alone.
    """
    if mutation(program.exported.graph) is not None:
        program = replace(program, exported=program.exported.run_decompositions({}))
    anatomy = _Anatomy.of(program, rows, varying)
    if not anatomy.hoisted:
        return Static(program, None)
    reader = parameter_reader(program, halves=halves)
    conditions = _conditions(program, anatomy, reader) if anatomy.fixed or anatomy.mixed else None
    return Static(_step(program, anatomy, reader, conditions), conditions)


@dataclass(frozen=True)
class _Anatomy:
    """What a program's values are: ``hoisted`` can be computed outside of the loop; the others are its outskirts.

    ``constant``, ``folded``, ``fixed`` and ``mixed`` are what the loop reads of the hoisted values that depend on
    nothing, on the step alone, on the picture alone and on both.
    """

    program: Program
    rows: Sequence[Row]
    origins: Mapping[Node, str]
    depends: Mapping[Node, frozenset[str]]
    hoisted: frozenset[Node]
    constant: tuple[Node, ...]
    folded: tuple[Node, ...]
    fixed: tuple[Node, ...]
    mixed: tuple[Node, ...]

    @classmethod
    def of(cls, program: Program, rows: Sequence[Row], varying: Sequence[str]) -> _Anatomy:
        """Returns the anatomy of a program."""
        graph, spec = program.exported.graph, program.spec
        names = user_inputs(program.exported, tuple(tensor.name for tensor in spec.inputs))
        origins = {n: spec.bindings[names[n.name]] for n in graph.nodes if n.op == "placeholder" and n.name in names}
        kinds = {n.name: _kind(origin, varying) for n, origin in origins.items()}
        depends = dependence(graph, kinds)
        hoisted = _hoisted(graph, depends)
        frontier = _frontier(graph, hoisted, depends)
        step, picture = frozenset(["step"]), frozenset(["picture"])
        return cls(
            program,
            rows,
            origins,
            depends,
            hoisted,
            tuple(n for n in frontier if not depends[n]),
            tuple(n for n in frontier if depends[n] == step),
            tuple(n for n in frontier if depends[n] == picture),
            tuple(n for n in frontier if depends[n] == step | picture),
        )

    def constants(self, read: ReadParameter) -> list[torch.Tensor]:
        """Returns the values of what depends on nothing."""
        return [values[0] for values in fold(self.constant, [{}], read)]

    def tables(self, nodes: Sequence[Node], read: ReadParameter) -> list[torch.Tensor]:
        """Returns the values of nodes that depend on the step alone, [M, ...] each."""
        if not nodes:
            return []
        times = [node for node in self.origins if self.depends[node] == {"step"}]
        rows = []
        for row in self.rows:
            numbers = {node: row[self.origins[node]] for node in times}
            rows.append({n: torch.full(shape_of(n), number, dtype=dtype_of(n)) for n, number in numbers.items()})
        return [torch.stack(values) for values in fold(nodes, rows, read)]


def _kind(origin: str, varying: Sequence[str]) -> str:
    """Returns what a value of this origin changes with: the step's numbers, the latent, or the picture."""
    if origin == TIMESTEP or origin.startswith(TIME):
        return "step"
    moves = origin == LATENT or origin.startswith(DRAW) or origin.partition(".")[0] in varying
    return "latent" if moves else "picture"


def _hoisted(graph: torch.fx.Graph, depends: Mapping[Node, frozenset[str]]) -> frozenset[Node]:
    """Returns the values that can be computed outside of the loop; of what depends on nothing, small ones."""
    found: set[Node] = set()
    constants: set[Node] = set()  # sources that any program can have
    for node in graph.nodes:
        if node.op == "placeholder":
            (found if depends[node] in ({"step"}, {"picture"}) else constants).add(node)
        elif node.op == "call_function" and all(s in found or s in constants for s in node.all_input_nodes):
            if len(depends[node]) == 1 or _largest(node) <= _LARGEST_VECTOR:
                found.add(node)
            elif not depends[node]:
                constants.add(node)
    return frozenset(node for node in found if "latent" not in depends[node])


def _largest(node: Node) -> int:
    """Returns how many numbers a value has; of several tensors, the largest."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return max(t.numel() if isinstance(t, torch.Tensor) else 0 for t in tensors)


def _frontier(graph: torch.fx.Graph, hoisted: frozenset[Node], depends: Mapping[Node, frozenset[str]]) -> list[Node]:
    """Returns the hoisted values that the loop reads, in order; the loop does again what only spreads or reshapes."""
    output = next(node for node in graph.nodes if node.op == "output")
    wanted, frontier = {output}, set()
    for node in reversed(graph.nodes):
        if node not in wanted:
            continue
        if node not in hoisted:
            wanted.update(node.all_input_nodes)
        elif node.op == "placeholder":
            if depends[node] == {"step"}:
                frontier.add(node)
        elif _stays(node, depends):
            wanted.update(node.all_input_nodes)
        else:
            frontier.add(node)
    return [node for node in graph.nodes if node in frontier]


def _stays(node: Node, depends: Mapping[Node, frozenset[str]]) -> bool:
    """Returns whether a hoisted value is better made in the loop: it is larger than what it is made of, or a view."""
    if not isinstance(node.meta["val"], torch.Tensor) or not node.all_input_nodes:
        return True  # several tensors, of which the users take one each; or made of nothing
    varying = [source for source in node.all_input_nodes if depends[source]]
    constants = [source for source in node.all_input_nodes if not depends[source]]
    if varying and not constants and numel_of(node) > sum(numel_of(source) for source in varying):
        return True
    while str(node.target) in _VIEWS:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and depends[node] != {"step"}


def _packed(nodes: Sequence[Node], name: str) -> dict[str, tuple[Reading, ...]]:
    """Returns where each value lies in the rows of a table, a table for each type of numbers, by its name."""
    found: dict[str, tuple[Reading, ...]] = {}
    for dtype in dict.fromkeys(dtype_of(node) for node in nodes):
        table = name if dtype == torch.float32 else f"{name}_{str(dtype).removeprefix('torch.')}"
        start = 0
        for node in nodes:
            if dtype_of(node) == dtype:
                found[table] = (*found.get(table, ()), Reading(start, node))
                start += numel_of(node)
    return found


def _conditions(program: Program, anatomy: _Anatomy, read: ReadParameter) -> Program:
    """Returns the program that computes what is fixed for a picture, and the vectors of every step."""
    exported, depends = program.exported, anatomy.depends
    alone = [node for node in anatomy.hoisted if len(depends[node]) == 1]
    leaves: dict[Node, None] = {}
    for node in needed(anatomy.mixed, alone):
        leaves |= dict.fromkeys(source for source in node.all_input_nodes if depends[source])
    of_step = [node for node in leaves if depends[node] == {"step"}]
    of_picture = [node for node in leaves if depends[node] == {"picture"}]
    targets = [*anatomy.fixed, *of_picture]
    taken = {*needed(targets, ()), *targets}
    pictures = [node for node in anatomy.origins if node in taken and depends[node] == {"picture"}]
    packs = _packed(anatomy.mixed, _VECTORS)
    vectors = [reading.node for pack in packs.values() for reading in pack]
    module = _ConditionsModule(
        part_module(exported, pictures, targets),
        part_module(exported, [*of_step, *of_picture], vectors) if vectors else None,
        anatomy.tables(of_step, read),
        [len(pack) for pack in packs.values()],
        len(anatomy.fixed),
    )
    by_name = {tensor.name: tensor for tensor in program.spec.inputs}
    names = user_inputs(exported, tuple(by_name))
    inputs = tuple(by_name[names[node.name]] for node in pictures)
    traced = _trace(program, module, inputs)
    values = [node.meta["val"] for node in next(n for n in traced.graph.nodes if n.op == "output").args[0]]
    outputs = tuple(
        TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for name, value in zip([*_fixed_names(anatomy), *packs], values, strict=True)
    )
    bindings = {tensor.name: program.spec.bindings[tensor.name] for tensor in inputs}
    weights = None if program.weights is None else _Under(program.weights, _PARTS)
    return Program(
        f"{program.component}_conditions",
        f"{program.folder}_conditions",
        traced,
        ComponentSpec(inputs, outputs, bindings, BEFORE),
        weights,
    )


def _fixed_names(anatomy: _Anatomy) -> list[str]:
    return [f"condition_{i}" for i in range(len(anatomy.fixed))]


def _trace(program: Program, module: torch.nn.Module, inputs: Sequence[TensorSpec]) -> torch.export.ExportedProgram:
    """Returns the trace of part of a program, without vmap."""
    example = tuple(_empty(spec).zero_() for spec in inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            stored = program.weights is not None
            traced = fake_trace(module, example) if stored else torch.export.export(module, example)
            without_vmap: torch.export.ExportedProgram = traced.run_decompositions({})
            return without_vmap
    except Exception as error:  # torch.export raises many classes, most of them private; all mean the same here
        first_line = str(error).strip().split("\n", 1)[0]
        raise ExportError(
            f"{program.component}: what is fixed for a picture cannot be traced: {type(error).__name__}: {first_line}",
            hint="build with --form step",
        ) from error


class _ConditionsModule(torch.nn.Module):
    """What is fixed for a picture in; out, the fixed values and packed vectors [M, width] of every step.

    Args:
        fixed: inputs -> the fixed values, then what the vectors are made of.
        mixed: values of the step, then those of the picture -> the vectors of one step, those of a pack together.
        tables: the values of the step, [M, ...] each.
        packs: how many vectors each pack has.
        fixed_count: how many of the values of ``fixed`` are outputs.
    """

    def __init__(
        self,
        fixed: torch.nn.Module,
        mixed: torch.nn.Module | None,
        tables: Sequence[torch.Tensor],
        packs: Sequence[int],
        fixed_count: int,
    ) -> None:
        super().__init__()
        self.fixed, self.mixed = fixed, mixed
        self._packs, self._fixed_count, self._table_count = list(packs), fixed_count, len(tables)
        for i, table in enumerate(tables):
            self.register_buffer(f"table_{i}", table)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the fixed values and the vectors."""
        values = self.fixed(*inputs)
        outputs, leaves = tuple(values[: self._fixed_count]), values[self._fixed_count :]
        if self.mixed is None:
            return outputs
        tables = [getattr(self, f"table_{i}") for i in range(self._table_count)]
        over = (0,) * len(tables) + (None,) * len(leaves)
        return (*outputs, *torch.vmap(self._row, in_dims=over)(*tables, *leaves))

    def _row(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the packed vectors of one step."""
        assert self.mixed is not None
        values = [value.reshape(-1) for value in self.mixed(*leaves)]
        ends = list(itertools.accumulate(self._packs))
        return tuple(torch.cat(values[end - count : end]) for count, end in zip(self._packs, ends, strict=True))


def _step(program: Program, anatomy: _Anatomy, read: ReadParameter, conditions: Program | None) -> Program:
    """Returns the program that remains in the loop."""
    exported, spec = program.exported, program.spec
    output = next(node for node in exported.graph.nodes if node.op == "output")
    outputs = list(output.args[0])
    nodes = needed(outputs, [*anatomy.constant, *anatomy.folded, *anatomy.fixed, *anatomy.mixed])
    builder = PartBuilder(exported)
    builder.parameters(nodes)
    for i, (node, value) in enumerate(zip(anatomy.constant, anatomy.constants(read), strict=True)):
        builder.buffer(f"constant_{i}", value, node)
    values = dict(zip(anatomy.folded, anatomy.tables(anatomy.folded, read), strict=True))
    folded = {
        builder.buffer(name, torch.cat([values[r.node].reshape(len(anatomy.rows), -1) for r in pack], dim=1)): pack
        for name, pack in _packed(anatomy.folded, _TABLE).items()
    }
    names = user_inputs(exported, tuple(tensor.name for tensor in spec.inputs))
    by_name = {tensor.name: tensor for tensor in spec.inputs}
    inputs = []
    for node in (node for node in anatomy.origins if node in set(nodes)):
        builder.input(node.name, node.meta["val"], node)
        inputs.append(by_name[names[node.name]])
    bindings = {tensor.name: spec.bindings[tensor.name] for tensor in inputs}
    of_picture = {} if conditions is None else {tensor.name: tensor for tensor in conditions.spec.outputs}
    bindings |= {name: f"{conditions.component}.{name}" for name in of_picture if conditions is not None}
    inputs += of_picture.values()
    for name, node in zip(_fixed_names(anatomy), anatomy.fixed, strict=True):
        builder.input(name, node.meta["val"], node)
    packs = _packed(anatomy.mixed, _VECTORS)
    vectors = {builder.input(name, _empty(of_picture[name])): pack for name, pack in packs.items()}
    if folded or vectors:
        step = builder.input(STEP, torch.zeros(1, dtype=torch.int64))
        inputs.append(TensorSpec(STEP, "int64", (1,)))
        bindings[STEP] = STEP
        for table, pack in (folded | vectors).items():
            builder.read(table, step, pack)
    builder.operations(nodes)
    left = ComponentSpec(tuple(inputs), spec.outputs, bindings, spec.phase)
    return replace(program, exported=builder.finish(outputs), spec=left)


def _empty(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))


class _Under(Mapping[str, torch.Tensor]):
    """Values by name for a module that holds the ones that they are of under each of some names."""

    def __init__(self, values: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        self._values, self._names = values, names

    def __getitem__(self, name: str) -> torch.Tensor:
        under, _, rest = name.partition(".")
        if under not in self._names:
            raise KeyError(name)
        return self._values[rest]

    def __iter__(self) -> Iterator[str]:
        return (f"{under}.{name}" for under in self._names for name in self._values)

    def __len__(self) -> int:
        return len(self._names) * len(self._values)
