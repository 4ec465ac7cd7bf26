"""Quantized generators against each other and against other tools: ``python -m benchmarks.quant``."""
