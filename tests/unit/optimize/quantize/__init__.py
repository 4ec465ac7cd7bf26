"""Tests of `optimize/quantize`."""
