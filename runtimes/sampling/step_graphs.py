"""A component of the specialized form, which has a graph for each row of the table of steps, as one session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fewstep.bundle.contract import STEP, ComponentSpec, Contract
from fewstep.runtimes.base import Array, CheckedSession


def has_rows(contract: Contract, spec: ComponentSpec) -> bool:
    """Returns whether a component has a graph for each row."""
    return contract.form == "specialized" and STEP in spec.bindings.values()


def row_variant(row: int) -> str:
    """Returns the name of the graph for a row."""
    return f"row-{row}"


def row_spec(spec: ComponentSpec) -> ComponentSpec:
    """Returns what the graph for a row takes and gives: all but the row's number."""
    inputs = tuple(tensor for tensor in spec.inputs if spec.bindings[tensor.name] != STEP)
    return replace(spec, inputs=inputs, bindings={tensor.name: spec.bindings[tensor.name] for tensor in inputs})


def row_call(spec: ComponentSpec, feeds: Mapping[str, Array]) -> tuple[int, dict[str, Array]]:
    """Returns the row that a component is called for, and what its graph for the row takes."""
    step = next(tensor.name for tensor in spec.inputs if spec.bindings[tensor.name] == STEP)
    return int(feeds[step][0]), {name: array for name, array in feeds.items() if name != step}


class RowSession:
    """Runs the graph of the row that it is asked for.

    Args:
        spec: of the component.
        open_row: opens the graph of a row.
        keep_open: leaves graphs open for the next picture; otherwise one is open at a time.
    """

    def __init__(self, spec: ComponentSpec, open_row: Callable[[int], CheckedSession], *, keep_open: bool) -> None:
        self._spec = spec
        self._open_row = open_row
        self._keep_open = keep_open
        self._open: dict[int, CheckedSession] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        row, inputs = row_call(self._spec, feeds)
        if row not in self._open:
            if not self._keep_open:
                self.close()
            self._open[row] = self._open_row(row)
        return self._open[row].run(inputs)

    @property
    def open_rows(self) -> tuple[int, ...]:
        """The rows whose graphs are open."""
        return tuple(self._open)

    def close(self) -> None:
        """Closes the graphs that are open."""
        for session in self._open.values():
            session.close()
        self._open.clear()
