"""The programs of a bundle: one for each component, or several where shapes or tiles ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import ExportError, RuntimeMissingError
from fewstep.manifest import Artifact, ComponentSpec, Shaped
from fewstep.program import Program
from fewstep.runtimes.base import Runtime
from fewstep.runtimes.tiled import tile_spec, tile_variant

if TYPE_CHECKING:
    from fewstep.export import Description, Generator
    from fewstep.export.wiring import Wiring


@dataclass(frozen=True)
class AtShape:
    """A generator that draws pictures of one of a bundle's further shapes, before and after its recipe's passes."""

    original: Generator
    generator: Generator
    described: Description

    @classmethod
    def of(
        cls, original: Generator, generator: Generator, shapes: Sequence[tuple[int, int]], steps: Sequence[int]
    ) -> dict[str, AtShape]:
        """Returns a generator at each shape, (height, width) in pixels, by the shape's name."""
        from fewstep.export import describe

        found = {}
        for height, width in shapes:
            at = generator.shaped(height, width)
            found[f"{height}x{width}"] = cls(original.shaped(height, width), at, describe(at, steps))
        return found

    @property
    def manifest_part(self) -> Shaped:
        """What the manifest says of the shape."""
        return Shaped(self.described.contract, self.described.components, self.described.schedules)


@dataclass(frozen=True)
class Graph:
    """One program of a component, not traced yet."""

    variant: str
    generator: Generator
    wiring: Wiring
    spec: ComponentSpec

    def program(self) -> Program:
        """Returns the traced program."""
        from fewstep.export import trace

        return replace(trace(self.generator, self.wiring, self.spec), variant=self.variant)

    def key(self) -> list[Any]:
        """Returns what determines the program beside the networks' weights, JSON-ready."""
        from fewstep.export import digest

        return [self.variant, asdict(self.spec), digest(self.wiring)]


def graphs_of(
    component: str, generator: Generator, described: Description, others: Mapping[str, AtShape]
) -> list[Graph]:
    """Returns the graphs of a component, the first of which brings the weights.

    A shape has a graph of its own only where that is another one.

    Raises:
        ExportError: the generator has other components at another shape.
    """
    for shape, at in others.items():
        if list(at.described.components) != list(described.components):
            raise ExportError(
                f"at {shape} the generator consists of {', '.join(at.described.components)}, expected "
                f"{', '.join(described.components)} as at its first shape",
                hint="build a bundle for each of these shapes",
            )
    first = Graph("", generator, described.wirings[component], described.components[component])
    if first.spec.tiles is not None:
        specs = [described.components[component], *(at.described.components[component] for at in others.values())]
        return [
            Graph(tile_variant(shape), generator, first.wiring, tile_spec(first.spec, shape))
            for shape in _tile_shapes(specs)
        ]
    graphs = [first]
    for shape, at in others.items():
        graph = Graph(shape, at.generator, at.described.wirings[component], at.described.components[component])
        if graph.key()[1:] != first.key()[1:]:
            graphs.append(graph)
    return graphs


def _tile_shapes(specs: Sequence[ComponentSpec]) -> list[tuple[int, int]]:
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
