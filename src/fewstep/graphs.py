"""The programs of a bundle: one for each component, or several where shapes or tiles ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import ExportError, RuntimeMissingError
from fewstep.manifest import Artifact, ComponentSpec
from fewstep.program import Program
from fewstep.runtimes.base import Runtime
from fewstep.runtimes.tiled import tile_spec, tile_variant

if TYPE_CHECKING:
    from fewstep.optimize.prepared import Prepared


@dataclass(frozen=True)
class Graph:
    """One program of a component, not traced yet."""

    variant: str
    component: str
    prepared: Prepared
    spec: ComponentSpec

    def program(self) -> Program:
        """Returns the traced program."""
        return replace(self.prepared.program(self.component, self.spec), variant=self.variant)

    def key(self) -> dict[str, Any]:
        """Returns what determines the program beside the source and the versions of packages, JSON-ready."""
        return {"variant": self.variant, "spec": asdict(self.spec), "program": self.prepared.key(self.component)}


def graphs_of(component: str, prepared: Prepared, others: Mapping[str, Prepared]) -> list[Graph]:
    """Returns the graphs of a component, the first of which brings the weights.

    A shape has a graph of its own only where that is another one.

    Raises:
        ExportError: the generator has other components at another shape.
    """
    for shape, at in others.items():
        if list(at.described.components) != list(prepared.described.components):
            raise ExportError(
                f"at {shape} the generator consists of {', '.join(at.described.components)}, expected "
                f"{', '.join(prepared.described.components)} as at its first shape",
                hint="build a bundle for each of these shapes",
            )
    first = Graph("", component, prepared, prepared.described.components[component])
    further = [Graph(shape, component, at, at.described.components[component]) for shape, at in others.items()]
    if first.spec.tiles is not None:
        return [
            Graph(tile_variant(shape), component, prepared, tile_spec(first.spec, shape))
            for shape in _tile_shapes(graph.spec for graph in (first, *further))
        ]
    return [first, *(graph for graph in further if graph.key() | {"variant": ""} != first.key())]


def _tile_shapes(specs: Iterable[ComponentSpec]) -> list[tuple[int, int]]:
    """Returns the sizes of tiles that any of these specifications needs, the largest first."""
    found: set[tuple[int, int]] = set()
    for spec in specs:
        assert spec.tiles is not None
        height, width = spec.inputs[0].shape[2:]
        found.update(spec.tiles.shapes(height, width))
    return sorted(found, reverse=True)


def compile_graphs(runtime: Runtime, graphs: Sequence[Graph], folder: Path, weights: str) -> list[Artifact]:
    """Returns the artifacts of a component's graphs, which are traced one after the other.

    Raises:
        RuntimeMissingError: there are several, and the runtime cannot let them share weights.
    """
    if len(graphs) == 1:
        return [runtime.compile(graphs[0].program(), folder, weights)]
    if runtime.compile_variants is None:
        raise RuntimeMissingError(
            f"runtime {runtime.name} cannot compile several graphs of one component",
            hint="give one shape and no tiles for this target",
        )
    return runtime.compile_variants((graph.program() for graph in graphs), folder, weights)
