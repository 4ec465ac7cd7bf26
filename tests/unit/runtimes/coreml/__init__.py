"""Tests of `runtimes/coreml`."""
