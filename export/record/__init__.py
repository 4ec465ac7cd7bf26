"""Runs a generator as its user calls it and records every network call."""
