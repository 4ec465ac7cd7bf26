"""Tests of `export/trace`."""
