"""Passes over a generator: each takes one, returns a new one and says what it changed."""

from __future__ import annotations

from fewstep.optimize.fp16_weights import RoundWeights
from fewstep.optimize.passes import Pass, PassNote, optimize

__all__ = ["Pass", "PassNote", "RoundWeights", "optimize"]
