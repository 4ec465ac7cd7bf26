"""Reads what a device must know off recorded runs, and refuses what a bundle cannot express."""
