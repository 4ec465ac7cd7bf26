"""Samples and checks to judge."""

from __future__ import annotations

import numpy as np

from fewstep.bundle.samples import Sample
from fewstep.runtimes.parity.harness import LOWERING, Check


def sample(picture_HWC: np.ndarray) -> Sample:
    return Sample("cat", 0, 1, 0.0, (), (np.ones((1, 4, 2, 2), np.float32),), picture_HWC.astype(np.float32))


def check(value: float, limit: float | None = 100.0) -> Check:
    return Check(LOWERING, "component", "denoiser", 0, "cat #0", "out_sample", "SQNR dB", value, limit)


PICTURE = np.random.default_rng(0).random((8, 8, 3))
