"""Looks for values of a decoder that fp16 cannot hold, in samples of the reference.

Autoencoders are the networks where this happens in practice: some, such as SDXL's own, pass 65504 inside and draw black
pictures in fp16, though every weight fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.bundle.contract import DECODER
from fewstep.bundle.samples import Sample
from fewstep.export import Description, Generator
from fewstep.export.trace.component_module import running_module

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Peak:
    """The largest absolute value that a module put out; NaN and infinity count as infinity."""

    module_path: str
    value: float


def decoder_peaks(generator: Generator, described: Description, samples: Sequence[Sample]) -> list[Peak]:
    """Returns the peak of every module of the decoder, in the order of first use, over the samples' recorded inputs."""
    if DECODER not in described.wirings:
        return []
    decode = running_module(generator, described.wirings[DECODER])
    assert decode.module is not None
    peaks: dict[str, float] = {}
    with ExitStack() as stack, torch.no_grad():
        for path, module in decode.module.named_modules():
            if path:
                stack.callback(module.register_forward_hook(_listener(path, peaks)).remove)
        for feed in (feed for sample in samples for feed in sample.feeds if feed.component == DECODER):
            decode(*(torch.from_numpy(array) for array in feed.inputs.values()))
    return [Peak(path, value) for path, value in peaks.items()]


def overflow_caveat(generator: Generator, described: Description, samples: Sequence[Sample]) -> str | None:
    """Returns what to know before the decoder is run in fp16, or None if all its values fit there."""
    peaks = decoder_peaks(generator, described, samples)
    beyond = [peak for peak in peaks if peak.value > FP16_MAX]
    if not beyond:
        return None
    worst = max(beyond, key=lambda peak: peak.value)
    return (
        f"the decoder overflows where it is computed in fp16: {worst.module_path} reaches {worst.value:.6g}, "
        f"the largest fp16 number is {FP16_MAX:.0f}; {len(beyond)} of its {len(peaks)} modules pass it, first "
        f"{beyond[0].module_path}. Take a decoder made for fp16 (--decoder FOLDER), or compute this one in fp32"
    )


def _listener(path: str, peaks: dict[str, float]) -> Any:
    def listen(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            peak = float(output.abs().max())
            peaks[path] = max(peaks.get(path, 0.0), peak if peak < float("inf") else float("inf"))

    return listen
