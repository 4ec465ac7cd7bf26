"""Tests of the built-in generator's data, training and weights."""
