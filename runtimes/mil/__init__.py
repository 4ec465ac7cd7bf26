"""Evaluates Core ML packages as they ship, operation by operation, without Core ML, coremltools or PyTorch."""

from __future__ import annotations

from fewstep.runtimes.mil.evaluate import Evaluator, Precision, known_operations
from fewstep.runtimes.mil.package import open_package
from fewstep.runtimes.mil.program import MilProgram, Operation

__all__ = ["Evaluator", "MilProgram", "Operation", "Precision", "known_operations", "open_package"]
