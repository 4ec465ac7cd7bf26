"""How the values of one tensor are distributed, in bounded memory.

Legend: B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fewstep.errors import CalibrationError

BINS = 2048

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of a tensor's values over `BINS` equal bins from its smallest to its largest value.

    Attributes:
        low: smallest value seen, exact.
        high: largest value seen, exact.
        counts: int64 [B]; a value on an edge counts in the bin above it, the largest value in the last bin. All values
            of a constant tensor are in the first.
        calls: network calls that the values come from.
        ema_low: running mean of the smallest value of each call (0.9 of the old, 0.1 of the new, in order).
        ema_high: the same of the largest value.
    """

    low: float
    high: float
    counts: Counts
    calls: int
    ema_low: float
    ema_high: float

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Width of a bin: no value is further than this from what `values` puts in its place."""
        return (self.high - self.low) / BINS

    def values(self) -> tuple[Floats, Floats]:
        """Returns a value for each bin that is not empty and its weight (they sum to 1), float64 and of one length.

        The value is the middle of the bin. The bin that holds zero stands for zero: many tensors have exact zeros. The
        first and the last bin stand for the extremes, which are exact.
        """
        middles_B: Floats = self.low + self.width * (np.arange(BINS, dtype=np.float64) + 0.5)
        if self.low <= 0 <= self.high:
            middles_B[int(bin_of(np.zeros(1), self.low, self.high)[0])] = 0.0
        middles_B[0], middles_B[-1] = self.low, self.high
        filled = self.counts > 0
        return middles_B[filled], self.counts[filled] / self.count


def bin_of(values: Floats, low: float, high: float) -> Counts:
    """Returns the bin of every value that lies between low and high."""
    if high == low:
        return np.zeros(values.shape, dtype=np.int64)
    return np.minimum(((values - low) * (BINS / (high - low))).astype(np.int64), BINS - 1)


def merge(histograms: Sequence[Histogram]) -> Histogram:
    """Returns one histogram of the values of several, over their common range.

    Extremes and counts are exact. Values inside a bin are taken to be spread evenly over it: each lands within one bin
    of the result from where it was. The running means are averaged, weighted by calls.

    Raises:
        CalibrationError: there are none.
    """
    if not histograms:
        raise CalibrationError("there are no histograms to merge, expected at least one", hint="name at least one step")
    if len(histograms) == 1:
        return histograms[0]
    low, high = min(h.low for h in histograms), max(h.high for h in histograms)
    calls = sum(h.calls for h in histograms)
    return Histogram(
        low,
        high,
        np.sum([_rebin(h, low, high) for h in histograms], axis=0),
        calls,
        sum(h.ema_low * h.calls for h in histograms) / calls,
        sum(h.ema_high * h.calls for h in histograms) / calls,
    )


def _rebin(histogram: Histogram, low: float, high: float) -> Counts:
    """Returns counts over a wider range: the cumulative count read off at the new edges, rounded once."""
    if histogram.low == histogram.high:
        counts_B = np.zeros(BINS, dtype=np.int64)
        counts_B[bin_of(np.array([histogram.low]), low, high)] = histogram.count
        return counts_B
    old_edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    new_edges = np.linspace(low, high, BINS + 1)
    below = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    reached: Counts = np.rint(np.interp(new_edges, old_edges, below)).astype(np.int64)
    return np.asarray(np.diff(reached))
