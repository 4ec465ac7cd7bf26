"""Grids of activations for the steps of a schedule: one for all of them, one for groups, or one for each.

Values of a diffusion network move from step to step, and with a few known steps nothing forces them onto one grid: a
row of the table of steps has room for a scale and a zero point of every tensor. (A scale for each step, as in TFMQ-DM's
finite set calibration, Huang et al. 2024, arXiv:2311.16503.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fewstep.bundle.contract import LOOP, STEP, called_in_step
from fewstep.calibration.estimate import Range, estimate, squared_error
from fewstep.calibration.ranges import StepRanges
from fewstep.errors import QuantizationError
from fewstep.export import Programs
from fewstep.optimize.quantize.plan import Grid
from fewstep.optimize.quantize.qparams import activation_grid
from fewstep.recipe.quantization import Quantization
from fewstep.recipe.target_profiles import TargetProfile, get_profile

if TYPE_CHECKING:
    from fewstep.calibration import CalibrationSet

# Steps share a grid while its squared error is no more than this many times that of a grid for each. It is 0.2 dB, less
# than half of what parity lets an artifact lose to its reference on average (`fewstep.runtimes.parity.quantized`).
SHARED_LOSS = 1.05

Rows = Sequence[Sequence[int]]
"""For every row of the table of steps, the calibrated steps that read it; none for a row of other schedules."""


@dataclass(frozen=True)
class StepGrids:
    """How the steps share the grids of a component's activations.

    Attributes:
        rows: None for one grid for all steps.
        grouped: successive steps share a grid as long as that costs no more than `SHARED_LOSS`.
        constant: each row has a graph of its own, in which its grids are constants.
    """

    rows: Rows | None = None
    grouped: bool = False
    constant: bool = False

    @classmethod
    def of(cls, programs: Programs, quantization: Quantization, calls: CalibrationSet, component: str) -> StepGrids:
        """Returns what a recipe makes of a component; one that runs once, or is the same in all steps, has one grid.

        Raises:
            QuantizationError: the recipe wants grids by step, and the networks are compiled for any step, or the target
                wants grids that are constants.
        """
        contract, spec = programs.contract, programs.components[component]
        if quantization.step_grids == "shared":
            return cls()
        if contract.form == "step":
            raise QuantizationError(
                f"step_grids is {quantization.step_grids!r}, and networks in step form do not know which step it is",
                hint="build with --form table, or with step_grids = 'shared'",
            )
        constant = contract.form == "specialized"
        if not (constant or get_profile(quantization.profile).computed_scales):
            raise QuantizationError(
                f"step_grids is {quantization.step_grids!r}, and {quantization.profile} wants constants for scales",
                hint="build with --form specialized, or with step_grids = 'shared'",
            )
        if spec.phase != LOOP or STEP not in spec.bindings.values():
            return cls()
        schedule = programs.described.schedules[calls.steps]
        read = [contract.row(schedule, k) for k in range(calls.steps)]
        called = [called_in_step(component, schedule, k) for k in range(calls.steps)]
        rows = [[k for k, row in enumerate(read) if row == i and called[k]] for i in range(len(contract.rows))]
        return cls(rows, quantization.step_grids == "grouped", constant)

    def beside(self, wants_constants: bool) -> StepGrids:
        """Returns how the steps share the grid of an activation, whose kernel may want constants for its scales."""
        return SHARED if wants_constants and not self.constant else self

    def grid(self, ranges: StepRanges, name: str, method: str, profile: TargetProfile, bits: int = 8) -> Grid:
        """Returns the grid of an activation: one for all steps, or one for each row.

        A row that no calibrated step reads has the grid of all steps together.

        Args:
            ranges: what was seen of the activation.
            name: of the activation.
            method: how a range is chosen from what was seen.
            profile: of the target.
            bits: of the integers.
        """
        finder = _Finder(ranges, name, method, profile, bits)
        groups = _groups(finder, ranges.steps) if self.grouped else [(step,) for step in ranges.steps]
        of_step = {step: group for group in groups for step in group}
        read = [_steps_of(row, of_step, ranges.steps) for row in self.rows or ((),)]
        grids = {steps: activation_grid(finder.range(steps), profile, bits) for steps in dict.fromkeys(read)}
        first, *others = [grids[steps] for steps in (read if len(grids) > 1 else read[:1])]
        return replace(
            first,
            scale=np.concatenate([first.scale, *(grid.scale for grid in others)]),
            zero_point=np.concatenate([first.zero_point, *(grid.zero_point for grid in others)]),
        )


SHARED = StepGrids()


def _steps_of(row: Sequence[int], of_step: dict[int, tuple[int, ...]], steps: Sequence[int]) -> tuple[int, ...]:
    """Returns the steps whose values a row's grid is for."""
    return tuple(sorted({s for step in row for s in of_step[step]})) or tuple(steps)


class _Finder:
    """Ranges of one activation over any steps, each found once."""

    def __init__(self, ranges: StepRanges, name: str, method: str, profile: TargetProfile, bits: int) -> None:
        self._ranges, self._name, self._method = ranges, name, method
        self._bits, self._symmetric = bits, profile.symmetric
        self._found: dict[tuple[int, ...], Range] = {}

    def range(self, steps: Sequence[int]) -> Range:
        """Returns the range that the method chooses for the values of some steps."""
        key = tuple(steps)
        if key not in self._found:
            merged = self._ranges.merged(self._name, key)
            self._found[key] = estimate(merged, self._method, bits=self._bits, symmetric=self._symmetric)
        return self._found[key]

    def error(self, step: int, steps: Sequence[int]) -> float:
        """Returns the mean squared error of a step's values on the grid of some steps."""
        histogram = self._ranges.at(self._name, step)
        return squared_error(histogram, self.range(steps), bits=self._bits, symmetric=self._symmetric)


def _groups(finder: _Finder, steps: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns successive steps that can share a grid, each group as long as it can be from the first step on."""
    groups: list[tuple[int, ...]] = []
    for step in steps:
        wider = (*groups[-1], step) if groups else ()
        alone = sum(finder.error(s, (s,)) for s in wider)
        if wider and sum(finder.error(s, wider) for s in wider) <= SHARED_LOSS * alone:
            groups[-1] = wider
        else:
            groups.append((step,))
    return groups
