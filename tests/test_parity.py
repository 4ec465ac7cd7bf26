"""The harness refuses what must not pass: nothing compared, NaN, one flat colour, the wrong picture."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fewstep.feeds import Sample
from fewstep.recipe import Limits
from fewstep.runtimes.parity import LOWERING, Check, ParityReport, compare_samples

LIMITS = Limits()


def sample(picture_HWC: np.ndarray) -> Sample:
    return Sample("cat", 0, 1, 0.0, (), (np.ones((1, 4, 2, 2), np.float32),), picture_HWC.astype(np.float32))


def check(value: float, limit: float | None = 100.0) -> Check:
    return Check(LOWERING, "component", "denoiser", 0, "cat #0", "out_sample", "SQNR dB", value, limit)


PICTURE = np.random.default_rng(0).random((8, 8, 3))


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
