"""Tests of `export/record`."""
