"""How the guidance scale reaches a generator's network."""

from __future__ import annotations

import torch

from fewstep.contract import DENOISER, Guidance
from fewstep.export.generator import Generator
from fewstep.export.recorded import Run
from fewstep.guidance import guidance_embedding

# The reference and our own arithmetic for the same value differ by float32 rounding of a product or two.
_RTOL, _ATOL = 1e-5, 1e-6


def read_guidance(generator: Generator, recorded: Run) -> Guidance:
    """Returns how the scale reached the network in a recorded run."""
    call = recorded.denoiser_calls[0]
    embedded = embedded_guidance(generator)
    if embedded is not None and any(is_embedding(t, embedded) for t in call.inputs.values()):
        return embedded
    if next(iter(call.outputs.values())).shape[0] == 2 * generator.batch:
        return Guidance("two_pass", generator.guidance, negative=str(generator.options.get("negative_prompt", "")))
    return Guidance("none", generator.guidance)


def embedded_guidance(generator: Generator) -> Guidance | None:
    """Returns the embedding of w that diffusers' pipelines compute for this denoiser, None if it takes none."""
    dim = getattr(getattr(generator.module(DENOISER), "config", None), "time_cond_proj_dim", None)
    if dim is None:
        return None
    half = dim // 2
    # Every rounding as the pipelines have it, the logarithm in float32 too: see `Guidance`.
    exponent = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -exponent)
    return Guidance("embedded", generator.guidance, tuple(frequencies.tolist()))


def is_embedding(value: torch.Tensor, guidance: Guidance) -> bool:
    """Returns whether a tensor is the embedding of the guidance scale."""
    expected = torch.from_numpy(guidance_embedding(guidance, guidance.scale))
    same = value.ndim == 2 and value.shape[1:] == expected.shape[1:]  # one row for each sample
    return same and torch.allclose(value.double(), expected.expand_as(value).double(), rtol=_RTOL, atol=_ATOL)
