"""The closed-form correction of a quantized denoiser: known errors are found, and the table undoes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.bundle.schedule import Schedule, advance
from fewstep.errors import CalibrationError
from fewstep.optimize.rounding.output_correction import Correction, CorrectionFit

SHAPE = (1, 4, 8, 8)
SCHEDULE = Schedule(
    timesteps=(999.0, 500.0),
    timestep_dtype="int64",
    init_scale=1.0,
    s=(0.5, 1.0),
    p=(0.1, 0.0),
    q=(-0.9, 1.0),
    a=(0.0, 0.3),
    b=(1.0, 0.7),
    c=(0.5, 0.0),
    h=((), ()),
    clip=None,
    source="test",
)


def drawn(seed: int, k: float = 0.1, share: float = -0.05, residual: float = 0.0) -> tuple[Any, Any, Any]:
    """Returns a network's input, a quantized output and the true one: quantized = (1 + k) F + share x + residual."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=SHAPE)
    F = rng.normal(size=SHAPE) + 0.4 * x
    return x, (1 + k) * F + share * x + residual * rng.normal(size=SHAPE), F


def fitted(steps: int, seeds: range, *, with_latent: bool = True, **error: float) -> Correction:
    fit = CorrectionFit(steps, with_latent=with_latent)
    for seed in seeds:
        for k in range(steps):
            fit.add(k, *drawn(steps * seed + k, **error))
    return fit.result()


@given(st.floats(-0.4, 0.4), st.floats(-0.3, 0.3))
def test_multiples_of_output_and_input_are_undone(k: float, share: float) -> None:
    found = fitted(2, range(2), k=k, share=share)
    assert found.gain == pytest.approx([1 / (1 + k)] * 2, rel=1e-9)
    assert found.latent == pytest.approx([-share / (1 + k)] * 2, rel=1e-9, abs=1e-9)
    assert max(found.error_after) < 1e-12


@given(st.floats(-0.3, 0.3), st.floats(0, 2), st.booleans(), st.integers(0, 20))
def test_errors_never_grow_and_more_factors_take_off_more(
    k: float, residual: float, with_latent: bool, seed: int
) -> None:
    found = fitted(1, range(seed, seed + 2), with_latent=with_latent, k=k, residual=residual)
    assert found.error_after[0] <= found.error_before[0] + 1e-12
    if not with_latent:
        assert found.latent == (0.0,)
        both = fitted(1, range(seed, seed + 2), k=k, residual=residual)
        assert both.error_after[0] <= found.error_after[0] + 1e-12


def test_the_error_is_what_least_squares_of_numpy_leaves() -> None:
    x, quantized, F = drawn(0, residual=0.3)
    found = fitted(1, range(1), residual=0.3)
    factors, rest, *_ = np.linalg.lstsq(np.stack([quantized.ravel(), x.ravel()], axis=1), F.ravel(), rcond=None)
    assert (found.gain[0], found.latent[0]) == pytest.approx(tuple(factors), rel=1e-9)
    assert found.error_after[0] == pytest.approx(rest[0] / np.sum(F**2), rel=1e-9)
    assert found.error_before[0] == pytest.approx(np.sum((quantized - F) ** 2) / np.sum(F**2), rel=1e-9)


def test_the_table_carries_the_correction() -> None:
    found = fitted(2, range(3), residual=0.2)
    corrected = found.applied_to(SCHEDULE)
    for k in range(2):
        x, quantized, _ = drawn(70 + k)
        noise = np.random.default_rng(9).normal(size=SHAPE)
        by_hand = found.gain[k] * quantized + found.latent[k] * SCHEDULE.network_input(k, x)
        expected = advance(SCHEDULE, k, x, by_hand, noise, [])
        for ours, theirs in zip(advance(corrected, k, x, quantized, noise, []), expected, strict=True):
            assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-12)  # float64
    assert Schedule.from_json(corrected.to_json()) == corrected
    exact = Correction((1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    assert exact.applied_to(SCHEDULE) == SCHEDULE


def test_an_output_that_is_a_multiple_of_the_input_has_a_correction_too() -> None:
    x = np.random.default_rng(0).normal(size=SHAPE)
    fit = CorrectionFit(1)
    fit.add(0, x, 2 * x, 3 * x)
    found = fit.result()
    assert found.error_after[0] < 1e-12
    assert 2 * found.gain[0] + found.latent[0] == pytest.approx(3)


def test_what_cannot_be_fitted_is_refused() -> None:
    fit = CorrectionFit(2)
    x, quantized, F = drawn(0)
    fit.add(0, x, quantized, F)
    with pytest.raises(CalibrationError, match="step 1 has no outputs to fit a correction to"):
        fit.result()
    with pytest.raises(CalibrationError, match="expected one shape and a step below 2"):
        fit.add(2, x, quantized, F)
    with pytest.raises(CalibrationError, match="expected one shape and a step below 2"):
        fit.add(0, x, quantized[:, :1], F)
    with pytest.raises(CalibrationError, match="an output of step 1 is not finite"):
        fit.add(1, x, np.full(SHAPE, np.nan), F)
    with pytest.raises(CalibrationError, match="a correction of 1 steps does not fit a schedule of 2"):
        fitted(1, range(1)).applied_to(SCHEDULE)
