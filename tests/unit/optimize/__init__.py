"""Tests of `optimize`."""
