"""Runs the reference generator on its own few-step trajectory, keeps every network call, and says what values occur."""

from __future__ import annotations

from fewstep.calibration.fp16_range import overflow_caveat
from fewstep.calibration.ranges import Histogram, Range, StepRanges
from fewstep.calibration.record import SampleRequest, record_samples
from fewstep.calibration.sets import CalibrationSet, collect, trajectory_key

__all__ = [
    "CalibrationSet",
    "Histogram",
    "Range",
    "SampleRequest",
    "StepRanges",
    "collect",
    "overflow_caveat",
    "record_samples",
    "trajectory_key",
]
