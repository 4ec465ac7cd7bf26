"""Shares a budget of bytes out: one option for every weight, with the least total damage, as an integer program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from fewstep.errors import QuantizationError


@dataclass(frozen=True)
class Item:
    """What there is to choose from for one weight: bytes and damage of each option, damages of one additive unit."""

    bytes: tuple[int, ...]
    damage: tuple[float, ...]


def allocate(items: Sequence[Item], budget: int) -> list[int]:
    """Returns the number of the option to take of each item, of those that fit the one with the least total damage.

    MixDQ's integer program (Zhao et al. 2024, arXiv:2405.17873, section 4.3), with scipy's HiGHS: one binary number for
    each option, one of them set for each item. The same arguments give the same answer.

    Args:
        items: with at least one option each.
        budget: bytes of all chosen options together, at most.

    Raises:
        QuantizationError: even the smallest options are larger, or a damage is not a finite number.
    """
    least = sum(min(item.bytes) for item in items)
    if least > budget:
        raise QuantizationError(f"{budget} bytes are not enough for weights that take at least {least}")
    if not items:
        return []
    damage = np.array([value for item in items for value in item.damage])
    if not np.isfinite(damage).all():
        raise QuantizationError("a weight's damage is not a finite number, so that no budget can be shared out")
    sizes = np.array([value for item in items for value in item.bytes], dtype=np.int64)
    owner = np.repeat(np.arange(len(items)), [len(item.bytes) for item in items])
    one_each = (owner[None, :] == np.arange(len(items))[:, None]).astype(float)
    while True:
        chosen = _solve(damage, sizes, one_each, budget, owner)
        excess = int(sizes[chosen].sum()) - budget
        if excess <= 0:
            return [int(i - np.searchsorted(owner, owner[i])) for i in chosen]
        # The solver takes numbers within 1e-6 of whole ones for whole, which is bytes where weights have millions.
        budget -= excess


def _solve(
    damage: np.ndarray[tuple[int], np.dtype[np.float64]],
    sizes: np.ndarray[tuple[int], np.dtype[np.int64]],
    one_each: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    budget: int,
    owner: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Returns the numbers of the chosen options, in the order of their items."""
    result = milp(
        # Relative to the largest: the solver's tolerances are absolute.
        c=damage / (np.abs(damage).max() or 1.0),
        integrality=np.ones(len(damage)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes[None, :] / sizes.max(), -np.inf, budget / sizes.max()),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise QuantizationError(f"the integer program of a budget of {budget} bytes has no solution: {result.message}")
    chosen = np.flatnonzero(result.x > 0.5)
    assert np.array_equal(owner[chosen], np.arange(len(one_each)))
    return chosen
