"""Runs the reference generator on its own few-step trajectory and keeps every network call."""

from __future__ import annotations

from fewstep.calibration.fp16_range import overflow_caveat
from fewstep.calibration.record import SampleRequest, record_samples

__all__ = ["SampleRequest", "overflow_caveat", "record_samples"]
