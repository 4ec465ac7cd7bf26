"""Traced programs to LiteRT flatbuffers."""
