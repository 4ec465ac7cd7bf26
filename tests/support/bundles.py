"""Builds the tiny bundles that several test modules look at, once for each test process."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import fewstep
from fewstep.bundle.contract import InputSpec
from fewstep.export import Generator
from fewstep.export.custom_loop import Draw, Networks
from tests.support import tiny

STEPS = (1, 2, 4)


@dataclass(frozen=True)
class Built:
    """A tiny checkpoint, its bundle, and the stage cache that made it."""

    source: Path
    bundle: fewstep.Bundle
    options: fewstep.Options


@functools.cache
def built(kind: str, recipe: str = "fp32") -> Built:
    """Returns the bundle of ``lcm`` or ``turbo``; tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix=f"fewstep-{kind}-"))
    source = getattr(tiny, f"{kind}_folder")(folder / "source")
    options = fewstep.Options(prompts=2, seeds=1, cache_root=folder / "cache")
    bundle = fewstep.build(str(source), recipe, out=folder / "bundle", steps=STEPS, options=options)
    return Built(source, bundle, options)


class _Denoiser(torch.nn.Module):
    """A convolution that sees the latent, a picture, a class and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.label = torch.nn.Embedding(5, 3)
        self.mix = torch.nn.Conv2d(6, 3, 3, padding=1)

    def forward(
        self, x_NCHW: torch.Tensor, t: torch.Tensor, image_NCHW: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        mixed: torch.Tensor = self.mix(torch.cat([x_NCHW, image_NCHW], dim=1))
        return torch.tanh(mixed + self.label(label)[:, :, None, None] + t[:, None, None, None])


def _flow(
    nets: Networks, inputs: Mapping[str, torch.Tensor], *, steps: int, guidance: float, noise: Draw
) -> torch.Tensor:
    """Returns the end of Euler's straight steps from time 1 to 0."""
    x = noise((1, 3, 8, 12))
    for k in range(steps):
        velocity = nets["denoiser"](x, torch.tensor([1 - k / steps]), inputs["image"], inputs["class_label"])
        x = x - velocity / steps
    return x


def plain_generator() -> Generator:
    """Returns a generator in plain PyTorch that is given a picture and a class, and takes no prompt."""
    torch.manual_seed(0)
    inputs = (InputSpec("image", "image", (1, 3, 8, 12)), InputSpec("class_label", "class", (1,), 5))
    return Generator.assemble("plain", {"denoiser": _Denoiser()}, _flow, inputs=inputs, steps=(1, 2))


@functools.cache
def plain() -> fewstep.Bundle:
    """Returns the bundle of `plain_generator`; tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-plain-"))
    options = fewstep.Options(prompts=1, seeds=1, cache_root=folder / "cache", profile=False)
    return fewstep.build(plain_generator(), out=folder / "bundle", options=options)
