"""Traced programs to Core ML packages."""
