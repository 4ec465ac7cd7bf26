"""Tests; what they share is in `support`."""
