"""Tests of `export/source`."""
