"""Rewrites of traced graphs that several compilers share."""
