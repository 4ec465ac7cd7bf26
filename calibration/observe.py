"""Runs a graph over calibration calls and keeps the distribution of chosen tensors, step by step, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fewstep.calibration.histogram import BINS, Counts, Histogram
from fewstep.calibration.ranges import StepRanges
from fewstep.errors import CalibrationError

# Share of the old value in the running mean of extremes (PTQ4DM, arXiv:2211.15736).
_KEPT = 0.9
# Values that are binned at once: their float64 and int64 copies take a few MB.
_CHUNK = 1 << 18

Calls = Callable[[], Iterable[tuple[int, tuple[torch.Tensor, ...]]]]


def observe(
    graph: torch.fx.GraphModule, points: Mapping[str, str], calls: Calls, *, steps: Sequence[int] | None = None
) -> StepRanges:
    """Returns extremes and histograms of every point at every step.

    The graph is run over all calls twice: for the exact extremes, then for the counts between them. One call's values
    are in memory at a time, and each is freed after its last use.

    Args:
        graph: takes the inputs of a call in order.
        points: name of a point -> name of the graph's node whose output is observed, a tensor of floats.
        calls: returns (step, inputs) of every call, the same each time; step 0 for a component that runs once.
        steps: those that should have calls; None takes all up to the last step seen.

    Raises:
        CalibrationError: there are no points or calls, a step has none, a point is no node or no tensor of floats, its
            values are not finite or there are none, or the calls differ from pass to pass.
    """
    extremes: dict[tuple[str, int], _Extremes] = {}
    watch(graph, points, calls, lambda point, step, x: _note_extremes(extremes, point, step, x))
    seen = {step for _, step in extremes}
    expected = tuple(range(max(seen, default=-1) + 1) if steps is None else steps)
    if not seen:
        raise CalibrationError(
            "there is no calibration call, expected at least one for each step",
            hint="calibrate with at least one prompt",
        )
    if seen != set(expected):
        raise CalibrationError(
            f"calibration has calls of steps {sorted(seen)}, expected every one of {list(expected)}",
            hint="calibrate with samples of every step",
        )
    counts: dict[tuple[str, int], Counts] = {key: np.zeros(BINS, dtype=np.int64) for key in extremes}
    watch(graph, points, calls, lambda point, step, x: _note_counts(counts, extremes, point, step, x))
    for (point, step), found in counts.items():
        if found.sum() != extremes[point, step].count:
            raise _changed(point, step)
    histograms = {
        key: Histogram(e.low, e.high, counts[key], e.calls, e.ema_low, e.ema_high) for key, e in extremes.items()
    }
    return StepRanges(tuple(points), expected, histograms)


class _Extremes:
    """What the first pass keeps of a point at a step."""

    def __init__(self, low: float, high: float) -> None:
        self.low = self.ema_low = low
        self.high = self.ema_high = high
        self.calls = self.count = 0

    def update(self, low: float, high: float, count: int) -> None:
        """Takes in the next call."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        # In this form a rounding cannot carry the mean beyond the extremes.
        self.ema_low += (1 - _KEPT) * (low - self.ema_low)
        self.ema_high += (1 - _KEPT) * (high - self.ema_high)
        self.calls += 1
        self.count += count


def _note_extremes(extremes: dict[tuple[str, int], _Extremes], point: str, step: int, x: torch.Tensor) -> None:
    low, high = (float(end) for end in torch.aminmax(x))
    if not np.isfinite([low, high]).all():
        raise CalibrationError(
            f"{point} has values that are not finite at step {step} (from {low} to {high})",
            hint="does the generator draw this sample right in this precision?",
        )
    extremes.setdefault((point, step), _Extremes(low, high)).update(low, high, x.numel())


def _note_counts(
    counts: dict[tuple[str, int], Counts],
    extremes: Mapping[tuple[str, int], _Extremes],
    point: str,
    step: int,
    x: torch.Tensor,
) -> None:
    known = extremes.get((point, step))
    low, high = (float(end) for end in torch.aminmax(x))
    if known is None or not (known.low <= low and high <= known.high):
        raise _changed(point, step)
    total = counts[point, step]
    if known.low == known.high:
        total[0] += x.numel()
        return
    per_value = BINS / (known.high - known.low)
    for part in x.reshape(-1).split(_CHUNK):
        # As `fewstep.calibration.histogram.bin_of`, in torch.
        bins = part.double().sub_(known.low).mul_(per_value).long().clamp_(max=BINS - 1)
        total += torch.bincount(bins, minlength=BINS).numpy()


class _Watch(torch.fx.Interpreter):
    """Interprets a graph, shows the values of some nodes and frees every value after its last use."""

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        watched: Mapping[str, list[str]],
        note: Callable[[str, int, torch.Tensor], None],
    ) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.extra_traceback = False  # our errors say where on their own
        self._watched = watched
        self._note = note
        self.step = 0

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        for point in self._watched.get(n.name, ()):
            if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()):
                what = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise CalibrationError(f"{point} is {what} at {n.name}, expected a tensor of floats")
            self._note(point, self.step, value)
        return value


def watch(
    graph: torch.fx.GraphModule,
    points: Mapping[str, str],
    calls: Calls,
    note: Callable[[str, int, torch.Tensor], None],
) -> None:
    """Runs every call and shows ``note`` the value of every point: (point, step, value).

    Raises:
        CalibrationError: there are no points, or one is no node or no tensor of floats.
    """
    names = {node.name for node in graph.graph.nodes if node.op != "output"}
    missing = {point: name for point, name in points.items() if name not in names}
    if missing or not points:
        what = "there are no points to observe"
        if missing:
            what = "; ".join(f"{point} is to be read at {name}, which is no node" for point, name in missing.items())
        raise CalibrationError(f"{what}, expected nodes of the graph")
    watched: dict[str, list[str]] = {}
    for point, name in points.items():
        watched.setdefault(name, []).append(point)
    interpreter = _Watch(graph, watched, note)
    with torch.no_grad():
        for interpreter.step, inputs in calls():
            interpreter.run(*inputs)


def _changed(point: str, step: int) -> CalibrationError:
    return CalibrationError(
        f"{point} has other values at step {step} in the second pass than in the first",
        hint="calls() must return the same calls each time, and the graph draw no random numbers",
    )
