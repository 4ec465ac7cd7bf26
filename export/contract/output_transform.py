"""How the last component's output becomes the result that a recorded run ended with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import AFTER, LATENT, SAMPLE, OutputSpec
from fewstep.export.generator import Generator
from fewstep.export.record.run import result_tensor
from fewstep.export.record.run_record import Call, Run
from fewstep.export.schedule.extract import refuse
from fewstep.export.trace.component_module import Wiring, glue_component, renamed
from fewstep.numerics.outputs import to_output

# The reference and our own arithmetic for the same value differ by float32 rounding of a product or two.
_RTOL, _ATOL = 1e-5, 1e-6
# As a pipeline scales its last component's output; the first that fits is taken.
_OUTPUTS = (
    OutputSpec(),
    OutputSpec(scale=1.0, shift=0.0, clip=None),
    OutputSpec(scale=0.5, shift=0.5, clip=None),
    OutputSpec(scale=1.0, shift=0.0, clip=(0.0, 1.0)),
    OutputSpec(scale=1.0, shift=0.0, clip=(-1.0, 1.0)),
)


def read_output(generator: Generator, run: Run, after: Sequence[Call]) -> tuple[OutputSpec, Wiring | None]:
    """Returns how the last output becomes the result; operations that are no scaling are a component.

    Args:
        generator: what was run.
        run: the recorded run.
        after: the calls after its loop.

    Raises:
        ExportError: it is neither scaled nor made by recorded operations.
    """
    raw = next(iter(after[-1].outputs.values())) if after else run.latents[-1]
    result = result_tensor(run.result)
    for tensor in (raw, result) if isinstance(result, torch.Tensor) else (raw,):
        for candidate in _OUTPUTS:
            spec = replace(candidate, kind=generator.kind, rate=generator.rate)
            if not _agrees(to_output(tensor.detach().numpy(), spec), run.output):
                continue
            if tensor is raw:
                return spec, None
            glue = run.tape.cut([tensor], what="the result")
            return spec, renamed(glue_component("finish", glue, ["result"], AFTER), {LATENT: SAMPLE})
    raise refuse(f"the result is not the last component's output {list(raw.shape)} scaled")


def _agrees(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any] | None) -> bool:
    return b is not None and a.shape == b.shape and np.allclose(a, b, rtol=_RTOL, atol=_ATOL)
