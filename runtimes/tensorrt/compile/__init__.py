"""Traced programs to strongly typed ONNX networks for TensorRT, and what its parser takes."""
