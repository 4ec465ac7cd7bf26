"""Tests of the evaluator of Core ML's programs."""
