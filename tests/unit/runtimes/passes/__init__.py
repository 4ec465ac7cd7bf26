"""Tests of `runtimes/passes`."""
