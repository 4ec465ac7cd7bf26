"""Tests of `runtimes/tensorrt`."""
