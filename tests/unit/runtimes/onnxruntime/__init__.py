"""Tests of `runtimes/onnxruntime`."""
