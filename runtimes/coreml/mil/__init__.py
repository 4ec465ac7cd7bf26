"""Evaluates Core ML packages as they ship, operation by operation, without Core ML, coremltools or PyTorch."""

from __future__ import annotations

from fewstep.runtimes.coreml.mil.evaluator import Evaluator, Precision, known_operations
from fewstep.runtimes.coreml.mil.package import open_package
from fewstep.runtimes.coreml.mil.program import MilProgram, Operation

__all__ = ["Evaluator", "MilProgram", "Operation", "Precision", "known_operations", "open_package"]
