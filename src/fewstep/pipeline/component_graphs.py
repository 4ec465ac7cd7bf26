"""The programs of a bundle: one for each component, or several where shapes, tiles or the form ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.bundle.contract import ComponentSpec, OutputSpec
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.bundle.samples import Sample
from fewstep.bundle.variants import nearest
from fewstep.errors import ExportError, RuntimeMissingError
from fewstep.runtimes.base import Runtime
from fewstep.runtimes.sampling.step_graphs import has_rows, row_call, row_variant
from fewstep.runtimes.sampling.tiled_decoder import tile_spec, tile_variant

if TYPE_CHECKING:
    from fewstep.export import Programs
    from fewstep.optimize.quantize import QuantizedPrograms


@dataclass(frozen=True)
class Graph:
    """One program of a component, not traced yet.

    ``tile`` is the height and width of the tiles that it takes, ``row`` the row of the table of steps that it is for.
    """

    variant: str
    component: str
    programs: Programs | QuantizedPrograms
    tile: tuple[int, int] | None = None
    row: int | None = None
    picture: OutputSpec | None = None
    """How the output becomes an image, where it is to be one."""

    def program(self, samples: Iterable[Sample] = ()) -> Program:
        """Returns the traced program, with the calls of these samples that have its shapes, or its first tile's."""
        spec = self.programs.components[self.component]
        calls = [feed.inputs for sample in samples for feed in sample.feeds if feed.component == self.component]
        if self.tile is not None:
            spec = tile_spec(spec, self.tile)
            height, width = self.tile
            calls = [{name: x[:1, ..., :height, :width] for name, x in call.items()} for call in calls]
        shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
        calls = [call for call in calls if {name: x.shape for name, x in call.items()} == shapes]
        program = self.programs.make(self.component, spec)
        if self.row is not None:
            from fewstep.export.specialize.at_step import at_row

            program = at_row(program, self.row)
            of_rows = (row_call(spec, call) for call in calls)
            calls = [call for row, call in of_rows if row == self.row]
        return replace(program, variant=self.variant, feeds=tuple(calls), picture=self.picture)

    def key(self) -> dict[str, Any]:
        """Returns what determines the program beside the source and the versions of packages, JSON-ready."""
        picture = None if self.picture is None else asdict(self.picture)
        return {"variant": self.variant, "picture": picture, **self.programs.key(self.component)}


def gives_result(component: str, programs: Programs | QuantizedPrograms) -> bool:
    """Returns whether a component is the last one, whose output becomes the result."""
    return component == list(programs.components)[-1]


def picture_output(programs: Programs | QuantizedPrograms) -> OutputSpec:
    """Returns how the last output becomes a picture.

    Raises:
        ExportError: it becomes something else.
    """
    output = programs.contract.output
    if output.kind != "picture" or output.clip != (0.0, 1.0):
        raise ExportError(
            f"the generator's output is {output.kind}, clipped to {output.clip}; an image is a picture in [0, 1]",
            hint="build without image_output",
        )
    return output


def graphs_of(component: str, programs: Programs | QuantizedPrograms, others: Mapping[str, Programs]) -> list[Graph]:
    """Returns the graphs of a component, the first of which brings the weights.

    A shape or a batch has a graph of its own only where that is another one.

    Raises:
        ExportError: the generator has other components at another shape or in a batch.
    """
    for shape, at in others.items():
        if list(at.components) != list(programs.components):
            raise ExportError(
                f"at {shape} the generator consists of {', '.join(at.components)}, expected "
                f"{', '.join(programs.components)} as at its first shape",
                hint="build a bundle for each of these shapes",
            )
    spec = programs.components[component]
    if spec.tiles is not None:
        specs = [spec, *(at.components[component] for at in others.values())]
        return [Graph(tile_variant(tile), component, programs, tile) for tile in _tile_shapes(specs)]
    if has_rows(programs.contract, spec):
        return [Graph(row_variant(row), component, programs, row=row) for row in programs.rows(component)]
    kept = {"": Graph("", component, programs)}
    for name, at in others.items():
        graph, shared = Graph(name, component, at), kept[nearest(name, kept) or ""]
        if graph.key() != shared.key() | {"variant": name}:
            kept[name] = graph
    return [*kept.values()]


def _tile_shapes(specs: Iterable[ComponentSpec]) -> list[tuple[int, int]]:
    """Returns the sizes of tiles that any of these specifications needs, the largest first."""
    found: set[tuple[int, int]] = set()
    for spec in specs:
        assert spec.tiles is not None
        height, width = spec.inputs[0].shape[2:]
        found.update(spec.tiles.shapes(height, width))
    return sorted(found, reverse=True)


def compile_graphs(
    runtime: Runtime, graphs: Sequence[Graph], folder: Path, weights: str, samples: Sequence[Sample] = ()
) -> list[Artifact]:
    """Returns the artifacts of a component's graphs, which are traced one after the other.

    ``samples`` are recorded runs, for a runtime that chooses a precision by the values in them.

    Raises:
        RuntimeMissingError: there are several, and the runtime cannot let them share weights.
    """
    if len(graphs) == 1:
        return [runtime.compile(graphs[0].program(samples), folder, weights)]
    if runtime.compile_variants is None:
        raise RuntimeMissingError(
            f"runtime {runtime.name} cannot compile several graphs of one component",
            hint="give one shape, no batch, no tiles and the table form for this target",
        )
    return runtime.compile_variants((graph.program(samples) for graph in graphs), folder, weights)
