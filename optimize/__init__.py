"""Passes over a generator: each takes one, returns a new one and says what it changed."""

from __future__ import annotations

from fewstep.optimize.passes import Pass, PassNote, optimize
from fewstep.optimize.round_weights import RoundWeights

__all__ = ["Pass", "PassNote", "RoundWeights", "optimize"]
