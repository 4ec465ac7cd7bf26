"""Tests of `export/schedule`."""
