"""Tests of `export/text`."""
