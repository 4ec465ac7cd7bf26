"""Traced programs to ONNX graphs as ONNX Runtime computes them fastest."""
