"""The harness refuses what must not pass: nothing compared, NaN, one flat colour, the wrong picture."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fewstep.recipe.recipe import Limits
from fewstep.runtimes.parity.harness import ParityReport, compare_samples, trajectory_limits
from tests.support.checks import PICTURE, check, sample

LIMITS = Limits()


def test_nothing_compared_is_a_failure() -> None:
    assert not ParityReport((), "reference", "executor")
    assert not ParityReport((check(120.0, None),), "reference", "executor")


def test_every_check_must_pass() -> None:
    assert ParityReport((check(100.0), check(math.inf)), "r", "e")
    assert not ParityReport((check(120.0), check(99.999)), "r", "e")
    assert not ParityReport((check(120.0), check(math.nan)), "r", "e")
    assert not ParityReport((check(120.0), check(math.nan, None)), "r", "e")


def test_equal_pictures_pass() -> None:
    assert ParityReport(tuple(compare_samples([sample(PICTURE)], [sample(PICTURE)], LIMITS.picture_psnr_db)), "r", "e")


@pytest.mark.parametrize("flat", [0.0, 0.5, 1.0])
def test_two_flat_pictures_agree_and_fail(flat: float) -> None:
    black = sample(np.full((8, 8, 3), flat))
    report = ParityReport(tuple(compare_samples([black], [black], LIMITS.picture_psnr_db)), "r", "e")
    assert not report
    assert [c.metric for c in report.failures] == ["spread (std)"]


def test_nan_picture_fails() -> None:
    broken = PICTURE.copy()
    broken[0, 0, 0] = np.nan
    checks = compare_samples([sample(PICTURE)], [sample(broken)], LIMITS.picture_psnr_db)
    assert not ParityReport(tuple(checks), "r", "e")


def test_nan_on_both_sides_fails() -> None:
    broken = sample(PICTURE * np.nan)
    assert not ParityReport(tuple(compare_samples([broken], [broken], LIMITS.picture_psnr_db)), "r", "e")


def test_departing_latent_fails_even_if_the_picture_agrees() -> None:
    departed = replace(sample(PICTURE), latents=(np.full((1, 4, 2, 2), 1.01, np.float32),))
    report = ParityReport(tuple(compare_samples([sample(PICTURE)], [departed], LIMITS.picture_psnr_db)), "r", "e")
    assert [c.level for c in report.failures] == ["trajectory"]


def test_summary_names_the_worst_and_writes_infinity_as_text() -> None:
    summary = ParityReport((check(math.inf), check(101.0), check(130.0)), "r", "e").summary()
    assert summary["worst"]["lowering.component"]["value"] == 101.0
    assert ParityReport((check(math.inf),), "r", "e").to_json()["all"][0]["value"] == "inf"


def test_trajectories_are_held_to_what_float32_lets_the_reference_keep() -> None:
    latents = [np.full((1, 4), size, np.float32) for size in (0.35, 0.3)]
    assert trajectory_limits(80.0, latents, 14.6) == [80.0, 80.0], "no sampler that starts at its own sigma is let off"
    from_4096 = trajectory_limits(80.0, latents, 4096.0)
    # Measured for diffusers' Euler scheduler with zero terminal SNR in one step, two executions of one table: 70.3 dB.
    assert from_4096[0] == pytest.approx(20 * math.log10(0.35 * 2**24 / 4096)) and 60 < from_4096[0] < 70.3
    assert from_4096[1] == pytest.approx(from_4096[0], abs=0.1), "later steps carry the error on"
    assert trajectory_limits(None, latents, 4096.0) == [None, None]


def test_a_wrong_coefficient_fails_from_sigma_4096_too() -> None:
    rng = np.random.default_rng(0)
    right = replace(sample(PICTURE), steps=1, latents=(rng.standard_normal((1, 64)).astype(np.float32),))
    wrong = replace(right, latents=(right.latents[0] * np.float32(1.01),))
    schedules = {1: SimpleNamespace(init_scale=4096.0)}
    passed = [
        check.passed
        for result in (right, wrong)
        for check in compare_samples([right], [result], LIMITS.picture_psnr_db, schedules=schedules)
        if check.level == "trajectory"
    ]
    assert passed == [True, False]
