"""Tests of `export/specialize`."""
