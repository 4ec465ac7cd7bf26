"""What a quantized denoiser's output is short of, step by step, in closed form and carried by the schedule's table.

The error of a quantized network is partly a multiple of its output (PTQD, He et al. 2023, arXiv:2305.10657) and partly
one of its input. Both are undone by coefficients that the sampler multiplies with anyway, so that a device computes
nothing more: with F ~ gain * F_quantized + latent * (s x), x0 = p x + q F has p + q latent s for p and q gain for q.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fewstep.bundle.schedule import Schedule
from fewstep.errors import CalibrationError

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Correction:
    """Two factors of each step, and the error of the denoiser's output before and after, relative to the output.

    Errors are of the samples that the factors were fitted to: the second is never the larger one.
    """

    gain: tuple[float, ...]
    latent: tuple[float, ...]
    error_before: tuple[float, ...]
    error_after: tuple[float, ...]

    def applied_to(self, schedule: Schedule) -> Schedule:
        """Returns the table that corrects the denoiser's output.

        Raises:
            CalibrationError: the table has another number of steps.
        """
        if schedule.steps != len(self.gain):
            raise CalibrationError(
                f"a correction of {len(self.gain)} steps does not fit a schedule of {schedule.steps}"
            )
        rows = list(zip(schedule.p, schedule.q, schedule.s, self.gain, self.latent, strict=True))
        return replace(
            schedule,
            p=tuple(p + q * latent * s for p, q, s, _, latent in rows),
            q=tuple(q * gain for _, q, _, gain, _ in rows),
        )


class CorrectionFit:
    """Gathers pairs of outputs, quantized and not, and fits a correction to them by least squares.

    ``with_latent`` fits the share of the network's input too; without it, the gain alone as in PTQD.
    """

    def __init__(self, steps: int, *, with_latent: bool = True) -> None:
        self._with_latent = with_latent
        # Of each step: products of (quantized output, network input, output) with one another, summed.
        self._products = np.zeros((steps, 3, 3))

    def add(self, step: int, network_input: Floats, quantized: Floats, reference: Floats) -> None:
        """Takes in one call: its latent input s x, and what the two networks made of it, all of one shape.

        Raises:
            CalibrationError: there is no such step, or shapes differ, or a number is not finite.
        """
        arrays = (quantized, network_input, reference)
        if not 0 <= step < len(self._products) or len({a.shape for a in arrays}) != 1:
            raise CalibrationError(
                f"step {step} has arrays {[list(a.shape) for a in arrays]}, expected one shape and a step below "
                f"{len(self._products)}"
            )
        flat = np.stack([a.ravel() for a in arrays]).astype(np.float64)
        products = flat @ flat.T
        if not np.isfinite(products).all():
            raise CalibrationError(f"an output of step {step} is not finite, expected numbers")
        self._products[step] += products

    def result(self) -> Correction:
        """Returns the correction with the least mean square error at each step.

        Raises:
            CalibrationError: a step has no calls, or its outputs are all zero.
        """
        fitted = [self._fit(step, products) for step, products in enumerate(self._products)]
        return Correction(*(tuple(float(row[i]) for row in fitted) for i in range(4)))

    def _fit(self, step: int, products: Floats) -> tuple[float, float, float, float]:
        if products[2, 2] == 0 or products[0, 0] == 0:
            raise CalibrationError(
                f"step {step} has no outputs to fit a correction to, expected at least one call at each step",
                hint="calibrate with samples of every step",
            )
        known = [0, 1] if self._with_latent else [0]
        # By pseudo-inverse: an output that is a multiple of the input has no single answer, and this is the smallest.
        solution = np.zeros(2)
        solution[known] = np.linalg.pinv(products[np.ix_(known, known)], hermitian=True) @ products[known, 2]
        gain, latent = solution
        before, after = (_error(products, factors) for factors in ((1.0, 0.0), (gain, latent)))
        return gain, latent, before, after


def _error(products: Floats, factors: tuple[float, float]) -> float:
    """Returns |F - gain F_quantized - latent s x|^2 / |F|^2."""
    row = np.array([*factors, -1.0])
    return float(max(row @ products @ row, 0.0) / products[2, 2])
