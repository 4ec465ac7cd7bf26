"""Which range of a tensor to quantize: methods by name, all on a histogram.

A method tries ranges that are shrunk from the largest one and scores each by what quantization would do to the values.
Constants are those of PTQ4DM (Shang et al. 2023, arXiv:2211.15736) and Q-Diffusion (Li et al. 2023, arXiv:2302.04304).

Legend: V values with their weights, C candidate ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from fewstep.calibration.histogram import Floats, Histogram
from fewstep.errors import CalibrationError

CANDIDATES = 100
# Weight that the entropy method gives to a value which a candidate cannot represent, as a share of all.
_SMOOTHING = 1e-4

Loss = Callable[[Floats, Floats, Floats], Floats]
"""(values [V], their weights [V], quantized values [C, V]) -> loss [C]."""


@dataclass(frozen=True)
class Range:
    """What a quantizer covers: low <= 0 <= high."""

    low: float
    high: float

    def grid(self, bits: int, *, symmetric: bool) -> tuple[float, int]:
        """Returns scale and zero point of the integers that cover the range.

        Asymmetric: unsigned integers 0 to 2^bits - 1, with the zero point rounded. Symmetric: signed integers, zero
        point 0, the larger end at 2^(bits-1) - 1. A range of nothing but zero has scale 1.
        """
        if symmetric:
            return max(-self.low, self.high) / (2 ** (bits - 1) - 1) or 1.0, 0
        scale = (self.high - self.low) / (2**bits - 1) or 1.0
        return scale, int(np.rint(-self.low / scale))


def estimate(
    histogram: Histogram,
    method: str = "lp",
    *,
    bits: int = 8,
    symmetric: bool = False,
    percentile: float = 99.99,
    p: float = 2.4,
) -> Range:
    """Returns the range that a method chooses; it lies within that of ``minmax`` and holds 0.

    Args:
        histogram: of the tensor.
        method: ``minmax``; ``percentile`` (of the values at each end; symmetric: of magnitudes); ``ema`` (running mean
            of each call's extremes); or the range with the least ``lp`` (mean |error|^p), ``mse``, ``l1``, ``cosine``
            (1 - similarity) or ``kl`` (entropy that is lost, as TensorRT's calibrator) among 100 shrunk ones,
            asymmetric ones shrunk at both ends together, then at either.
        bits: of the integers, at least 2.
        symmetric: whether the range has its middle at 0, and the integers a sign.
        percentile: of the method of that name.
        p: of the method ``lp``.

    Raises:
        CalibrationError: unknown method, bits below 2, or a percentile not in (50, 100].
    """
    if bits < 2:
        raise CalibrationError(f"bits is {bits}, expected at least 2")
    full = _range(histogram.low, histogram.high, symmetric=symmetric)
    if method == "minmax":
        return full
    if method == "ema":
        return _range(histogram.ema_low, histogram.ema_high, symmetric=symmetric)
    if method == "percentile":
        return _percentile(histogram, percentile, symmetric=symmetric)
    losses = {"lp": _power(p), "mse": _power(2.0), "l1": _power(1.0), "cosine": _cosine, "kl": _entropy}
    if method not in losses:
        close = get_close_matches(method, METHODS, n=1)
        raise CalibrationError(
            f"range method is {method!r}, expected one of {', '.join(METHODS)}",
            hint=f"did you mean {close[0]!r}?" if close else None,
        )
    if full.low == full.high:
        return full
    return _search(histogram, full, losses[method], bits=bits, symmetric=symmetric)


def squared_error(histogram: Histogram, found: Range, *, bits: int, symmetric: bool) -> float:
    """Returns the mean squared error of a tensor's values on the integers that cover a range."""
    values, weights = histogram.values()
    if found.low == found.high:
        return float(values**2 @ weights)
    ends = np.array([found.low]), np.array([found.high])
    quantized = _quantized(values, *ends, bits=bits, symmetric=symmetric)
    return float(((quantized[0] - values) ** 2) @ weights)


METHODS = ("minmax", "percentile", "ema", "lp", "mse", "l1", "cosine", "kl")


def _range(low: float, high: float, *, symmetric: bool) -> Range:
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    return Range(low, high)


def _percentile(histogram: Histogram, percentile: float, *, symmetric: bool) -> Range:
    if not 50 < percentile <= 100:
        raise CalibrationError(f"percentile is {percentile}, expected above 50 and at most 100")
    values, weights = histogram.values()
    if symmetric:
        high = _quantile(np.abs(values), weights, percentile / 100)
        return Range(-high, high)
    low, high = -_quantile(-values, weights, percentile / 100), _quantile(values, weights, percentile / 100)
    return _range(low, high, symmetric=False)


def _quantile(values: Floats, weights: Floats, share: float) -> float:
    """Returns the smallest value that at least a share of the weight does not pass."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    # The share as summed: 100 % must not miss the last value by a rounding.
    return float(values[order][np.searchsorted(reached, min(share, 1.0) * reached[-1])])


def _search(histogram: Histogram, full: Range, loss: Loss, *, bits: int, symmetric: bool) -> Range:
    """Returns the candidate with the least loss; of equal ones the widest."""
    shrunk = np.arange(CANDIDATES, 0, -1) / CANDIDATES
    values, weights = histogram.values()

    def best(lows_C: Floats, highs_C: Floats) -> Range:
        quantized = _quantized(values, lows_C, highs_C, bits=bits, symmetric=symmetric)
        i = int(np.argmin(loss(values, weights, quantized)))
        return Range(float(lows_C[i]), float(highs_C[i]))

    found = best(full.low * shrunk, full.high * shrunk)
    if symmetric or full.low == 0 or full.high == 0:
        return found
    # The present end is among the candidates: each search can only improve.
    low_ends, high_ends = full.low * shrunk, full.high * shrunk
    found = best(low_ends, np.full(CANDIDATES, found.high))
    return best(np.full(CANDIDATES, found.low), high_ends)


def _quantized(values: Floats, lows_C: Floats, highs_C: Floats, *, bits: int, symmetric: bool) -> Floats:
    """Returns the values after quantization over each range, [C, V]; the arithmetic of `Range.grid`."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale_C1, zero_C1, least = highs_C[:, None] / top, np.zeros((len(highs_C), 1)), -top
    else:
        top, least = 2**bits - 1, 0
        scale_C1 = (highs_C - lows_C)[:, None] / top
        zero_C1 = np.rint(-lows_C[:, None] / scale_C1)
    q: Floats = values / scale_C1
    np.rint(q, out=q)
    np.clip(q, least - zero_C1, top - zero_C1, out=q)
    q *= scale_C1
    return q


def _power(p: float) -> Loss:
    def loss(values: Floats, weights: Floats, quantized: Floats) -> Floats:
        error = np.abs(quantized - values)
        if p == 2.0:
            error *= error
        elif p != 1.0:
            error /= max(float(np.abs(values).max()), np.finfo(np.float64).tiny)  # keeps tiny tensors off 0^p
            np.power(error, p, out=error)
        return np.asarray(error @ weights)

    return loss


def _cosine(values: Floats, weights: Floats, quantized: Floats) -> Floats:
    length = np.sqrt((quantized * quantized) @ weights)
    product = quantized @ (weights * values)
    similarity = np.divide(product, length, out=np.zeros_like(product), where=length > 0)
    return 1 - similarity / np.sqrt(values**2 @ weights)


def _entropy(values: Floats, weights: Floats, quantized: Floats) -> Floats:
    """Returns the Kullback-Leibler divergence of each quantized distribution from that of the values.

    As TensorRT's calibrator has it: the weight of what a range clips is added to its outermost values in the reference,
    and is missing in the quantized distribution, which spreads the weight of every integer evenly over its values.
    """
    losses = []
    for q_V in quantized:
        inside = (values >= q_V.min()) & (values <= q_V.max())
        if not inside.any():
            losses.append(np.inf)
            continue
        kept = np.flatnonzero(inside)
        reference = weights[kept].copy()
        reference[0] += weights[: kept[0]].sum()
        reference[-1] += weights[kept[-1] + 1 :].sum()
        _, level, members = np.unique(q_V[kept], return_inverse=True, return_counts=True)
        spread = (np.bincount(level, weights=weights[kept]) / members)[level]
        spread = np.maximum(spread / spread.sum(), _SMOOTHING / len(spread))
        losses.append(float(np.sum(reference * np.log(reference / spread))))
    return np.array(losses)
