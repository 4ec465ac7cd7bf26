"""Value: what was seen of every tensor at every sampling step. Made by `fewstep.calibration.observe`.

Legend: P points, S sampling steps, B bins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fewstep.calibration.estimate import METHODS, Range, estimate
from fewstep.calibration.histogram import BINS, Histogram, merge
from fewstep.errors import CalibrationError

__all__ = ["BINS", "METHODS", "Histogram", "Range", "StepRanges", "estimate"]

_ARRAYS = ("counts", "calls", "low", "high", "ema_low", "ema_high")


@dataclass(frozen=True)
class StepRanges:
    """A histogram for each point and step; a component that runs once has step 0."""

    points: tuple[str, ...]
    steps: tuple[int, ...]
    histograms: Mapping[tuple[str, int], Histogram]

    def __post_init__(self) -> None:
        """Raises CalibrationError unless every point has a histogram with values at every step."""
        for point in self.points:
            for step in self.steps:
                histogram = self.histograms.get((point, step))
                if histogram is None or histogram.count == 0:
                    raise CalibrationError(
                        f"{point} has no values at step {step}, expected some at each of {_listed(self.steps)}",
                        hint="calibrate with samples of every step",
                    )

    def at(self, point: str, step: int) -> Histogram:
        """Returns what was seen of a point at a step.

        Raises:
            CalibrationError: the point or the step was not observed.
        """
        if (point, step) not in self.histograms:
            raise self._unknown(point, step)
        return self.histograms[point, step]

    def merged(self, point: str, steps: Iterable[int] | None = None) -> Histogram:
        """Returns one histogram of a point over some steps, over all if None.

        Extremes and the number of values are exact; values are moved by less than a bin (see `merge`).

        Raises:
            CalibrationError: the point or a step was not observed, or there are no steps.
        """
        return merge([self.at(point, step) for step in (self.steps if steps is None else steps)])

    def save(self, path: Path) -> None:
        """Writes a safetensors file, the same bytes for the same ranges; it appears whole or not at all."""
        rows = [[self.histograms[point, step] for step in self.steps] for point in self.points]
        arrays = {name: np.array([[getattr(h, name) for h in row] for row in rows]) for name in _ARRAYS}
        head = json.dumps({"version": 1, "points": self.points, "steps": self.steps})
        partial = path.with_name(f".{path.name}.partial")
        save_file(arrays, partial, metadata={"ranges": head})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> StepRanges:
        """Returns what `save` wrote.

        Raises:
            CalibrationError: the file is not that.
        """
        try:
            with safe_open(path, framework="numpy") as stream:
                head = json.loads((stream.metadata() or {})["ranges"])
                arrays = {name: stream.get_tensor(name) for name in _ARRAYS}
        except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
            raise CalibrationError(f"{path} does not hold ranges: {error}", hint="calibrate again") from error
        points, steps = tuple(head["points"]), tuple(head["steps"])
        shape = (len(points), len(steps))
        if arrays["counts"].shape != (*shape, BINS) or any(arrays[name].shape != shape for name in _ARRAYS[1:]):
            raise CalibrationError(f"{path} does not hold ranges: expected {shape[0]} points x {shape[1]} steps")
        return cls(
            points,
            steps,
            {
                (point, step): Histogram(
                    float(arrays["low"][i, k]),
                    float(arrays["high"][i, k]),
                    arrays["counts"][i, k],
                    int(arrays["calls"][i, k]),
                    float(arrays["ema_low"][i, k]),
                    float(arrays["ema_high"][i, k]),
                )
                for i, point in enumerate(points)
                for k, step in enumerate(steps)
            },
        )

    def _unknown(self, point: str, step: int) -> CalibrationError:
        if point not in self.points:
            close = get_close_matches(point, self.points, n=1)
            return CalibrationError(
                f"there are no ranges of {point!r} among {len(self.points)} points",
                hint=f"did you mean {close[0]!r}?" if close else "observe it",
            )
        return CalibrationError(
            f"{point} was not observed at step {step}, only at {_listed(self.steps)}",
            hint="calibrate with samples of every step",
        )


def _listed(steps: Iterable[int]) -> str:
    return "steps " + ", ".join(map(str, steps))
