"""Solve the short form of one sampler step from the rows of a symbolic run.

Any sampler that is linear has rows: x_{k+1} as a combination of the initial latent, the network outputs so far and the
step noises so far. The short form writes the same step in terms of x_k, x0_k, n_k and as few earlier x0 as possible.

Legend: rows are float64 [D], the D = 2 + 2 N coefficients in the basis (x_init, F_0..F_{N-1}, n_0..n_{N-1}, anchor); N
network calls; suffix _SD: one row per state or per call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.errors import ScheduleError

Row = npt.NDArray[np.float64]

# A row that is exact in float64 leaves 1e-15; the others are for schedulers that lose digits, or float64, on the way.
_TOLERANCES = (1e-12, 1e-9, 1e-6)
# What is this near to a whole number is rounding of it: 0 and 1 are written exactly, and a device skips the term.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class StepCoefficients:
    """One row of the table of `fewstep.bundle.schedule`: see there for the meaning of each letter."""

    s: float
    p: float
    q: float
    a: float
    b: float
    c: float
    h: tuple[float, ...]
    g: float = 0.0


def columns(steps: Sequence[StepCoefficients]) -> dict[str, Any]:
    """Returns the columns of a table, by name."""
    return {name: tuple(getattr(step, name) for step in steps) for name in ("s", "p", "q", "a", "b", "c", "g", "h")}


def solve_step(x_SD: Sequence[Row], input_D: Row, x0_SD: Sequence[Row], k: int, kind: str) -> StepCoefficients:
    """Returns the coefficients of step k with the least history.

    Args:
        x_SD: rows of the latents x_0..x_N.
        input_D: row of the network's input at step k.
        x0_SD: rows of x0_0..x0_{N-1}.
        k: index of the step.
        kind: what the x0 rows are, for messages.

    Raises:
        ScheduleError: the step has no short form; the message says what is left over.
    """
    calls = len(x0_SD)
    basis = np.eye(2 + 2 * calls)
    x, F, noise, x0, anchor = x_SD[k], basis[1 + k], basis[1 + calls + k], x0_SD[k], basis[-1]
    scaled = _fit(input_D, [{"s": x}], f"input of step {k}")
    denoised = _fit(x0, [{"q": F}, {"p": x, "q": F}], f"x0 ({kind}) of step {k}")
    forms: list[dict[str, Row]] = []
    for j in range(k + 1):
        history = {f"h{i}": x0_SD[k - i] for i in range(1, j + 1)}
        forms += [{"b": x0, "c": noise} | history, {"a": x, "b": x0, "c": noise} | history]
    forms += [form | {"g": anchor} for form in forms]
    following = _fit(x_SD[k + 1], forms, f"result of step {k}")
    found = scaled | denoised | following
    s, p, q, a, b, c, g = (found.get(name, 0.0) for name in "spqabcg")
    h = [found.get(f"h{j}", 0.0) for j in range(1, k + 1)]
    while h and h[-1] == 0.0:
        h.pop()
    return StepCoefficients(s, p, q, a, b, c, tuple(h), g)


def _fit(target: Row, forms: Iterable[Mapping[str, Row]], what: str) -> dict[str, float]:
    """Returns the coefficients of the first form whose columns combine to the target, by column name.

    Raises:
        ScheduleError: none does; the message names the largest coefficient that is left over.
    """
    attempts = [(form, *_least_squares(target, list(form.values()))) for form in forms]
    size = max(float(np.linalg.norm(target)), np.finfo(np.float64).tiny)
    for tolerance in _TOLERANCES:
        for form, coefficients, rest in attempts:
            if np.linalg.norm(rest) <= tolerance * size:
                return dict(zip(form, coefficients, strict=True))
    rest = min((rest for _, _, rest in attempts), key=lambda row: float(np.linalg.norm(row)))
    worst = int(np.argmax(np.abs(rest)))
    raise ScheduleError(
        f"{what} leaves {rest[worst]:.2g} of {_basis_name(worst, (len(rest) - 2) // 2)} that no earlier value explains"
    )


def _least_squares(target: Row, columns: list[Row]) -> tuple[list[float], Row]:
    """Returns the coefficients of the columns that come nearest to the target, and what is left over."""
    if not all(np.isfinite(row).all() for row in (target, *columns)):
        return [0.0] * len(columns), np.full_like(target, np.inf)
    sizes = [float(np.linalg.norm(column)) or 1.0 for column in columns]
    matrix = np.stack([column / size for column, size in zip(columns, sizes, strict=True)], axis=1)
    solution = np.linalg.lstsq(matrix, target, rcond=None)[0]
    solution[np.abs(solution) <= _ROUNDING * np.linalg.norm(target)] = 0.0
    coefficients = [float(value) / size for value, size in zip(solution, sizes, strict=True)]
    return [_whole(value) for value in coefficients], target - matrix @ solution


def _whole(value: float) -> float:
    nearest = float(round(value))
    return nearest if nearest and abs(value - nearest) <= _ROUNDING * abs(nearest) else value


def _basis_name(index: int, calls: int) -> str:
    if index == 0:
        return "the initial latent"
    if index == 1 + 2 * calls:
        return "the anchor"
    return f"network output {index - 1}" if index <= calls else f"noise {index - 1 - calls}"
