"""Checks a description with texts of other lengths: the loop must be given what the bundle would compute for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.errors import ExportError
from fewstep.export.generator import Generator
from fewstep.export.record.intercept import noise_tensor
from fewstep.export.record.run_record import Run
from fewstep.export.record.to_samples import record
from fewstep.export.schedule.extract import stand_ins
from fewstep.export.text.describe import shortened
from fewstep.text.probe_texts import PROBES

if TYPE_CHECKING:
    from fewstep.export.describe import Description

# One token, none, and longer than any model.
_TEXTS = ("a", "", PROBES[-1])
_STUB_SEED = 1 << 41


def check_texts(
    generator: Generator, described: Description, recorded: Run, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    """Raises ExportError if a pipeline computes something of a text that its description does not.

    Networks return what they did in the recorded run, so this costs nothing but what lies between them. A number that
    a pipeline reads off the first text (how many of its tokens are no padding) would be a constant of the bundle.
    """
    if generator.batch > 1 or not generator.tokenizers or not described.contract.takes_text:
        return  # a batch is described beside the single sample, which is checked
    stubs = stand_ins(recorded, lambda number, shape: noise_tensor(_STUB_SEED, number, shape))
    steps = min(described.schedules)
    for text in _TEXTS:
        try:
            sample = record(
                generator, described, text, 0, steps=steps, guidance=recorded.guidance, inputs=inputs, stubs=stubs
            )
        except ExportError as error:
            raise _follows(text, error.message) from error
        except (RuntimeError, IndexError) as error:  # operations that take another number of tokens
            raise _follows(text, str(error).splitlines()[0]) from error
        for feed in sample.feeds:
            for spec in described.components[feed.component].inputs:
                shape = feed.inputs[spec.name].shape
                if shape != spec.shape:
                    raise _follows(
                        text, f"{feed.component}: input {spec.name} is {list(shape)}, expected {list(spec.shape)}"
                    )


def _follows(text: str, what: str) -> ExportError:
    return ExportError(
        f"with the text {shortened(text)}, not all is as it was read off {shortened(PROBES[0])}: {what}",
        hint="what a pipeline computes from the text or its length outside of tensors cannot be expressed yet",
    )
