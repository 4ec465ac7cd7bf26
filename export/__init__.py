"""Loads a generator, reads its contract off a run of its own pipeline, and traces its components."""

from __future__ import annotations

from fewstep.export import quiet  # isort: skip  # noqa: F401  # first: torchao speaks up when it is imported
from fewstep.export.contract.diffusers_layout import diffusers_files, write_tokenizers
from fewstep.export.custom_loop import SampleFunction
from fewstep.export.describe import Description, describe
from fewstep.export.fingerprint import fingerprint
from fewstep.export.generator import Generator, recorded_source
from fewstep.export.programs import Programs, programs_of
from fewstep.export.record.arguments import check_counts
from fewstep.export.record.to_samples import record
from fewstep.export.source.load import load, missing
from fewstep.export.source.overrides import lay_over
from fewstep.export.trace.component_module import digest, trace

__all__ = [
    "Description",
    "Generator",
    "Programs",
    "SampleFunction",
    "check_counts",
    "describe",
    "diffusers_files",
    "digest",
    "fingerprint",
    "lay_over",
    "load",
    "missing",
    "programs_of",
    "record",
    "recorded_source",
    "trace",
    "write_tokenizers",
]
