"""Loads a generator, reads its contract off a run of its own pipeline, and traces its components."""

from __future__ import annotations

from fewstep.export.describe import Description, describe, diffusers_files, write_tokenizer
from fewstep.export.generator import Generator
from fewstep.export.load import load, missing
from fewstep.export.tracing import trace

__all__ = ["Description", "Generator", "describe", "diffusers_files", "load", "missing", "trace", "write_tokenizer"]
