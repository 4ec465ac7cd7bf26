"""The one thing that is replaced of an untouched pipeline: its random numbers, by those of a bundle."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from fewstep.numerics import noise


class Draws:
    """A seed's noise, an offset for each draw of a call: 0 before the first step, 1 + k for step k's.

    What else is drawn gets an offset of its own, as `fewstep.numerics.noise.draw_offset` counts them. A step begins
    with the call of ``step_begins``.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._steps = 0
        self._latent: tuple[int, ...] = ()
        self._taken: set[int] = set()

    def step_begins(self, latent: torch.Tensor) -> None:
        """Counts a step, and keeps the shape of its latent."""
        self._latent = self._latent or tuple(latent.shape)
        self._steps += 1

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the next draw, float32."""
        shape, offset = tuple(shape), self._steps
        if offset in self._taken or (offset > 0 and shape != self._latent):
            others = (noise.draw_offset(offset, number) for number in itertools.count(1))
            offset = next(other for other in others if other not in self._taken)
        self._taken.add(offset)
        return torch.from_numpy(noise.normal(self._seed, offset, shape))


@contextmanager
def in_pipelines(draws: Draws, scheduler: Any) -> Iterator[None]:
    """Has diffusers' ``randn_tensor`` return the draws, wherever it was imported to, and counts a scheduler's steps."""
    import diffusers.utils.torch_utils

    original = diffusers.utils.torch_utils.randn_tensor

    def ours(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> torch.Tensor:
        return draws(shape).to(device=device, dtype=dtype)

    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            # Through vars: diffusers' lazy modules would import every pipeline at a getattr.
            if vars(module).get("randn_tensor") is original:
                stack.enter_context(mock.patch.object(module, "randn_tensor", ours))
        if scheduler is not None:
            stack.enter_context(_counted(scheduler, draws))
        yield


@contextmanager
def _counted(scheduler: Any, draws: Draws) -> Iterator[None]:
    """Counts the steps of a scheduler and of its copies; what a step takes and gives stays as it is."""
    kind = type(scheduler)
    original = kind.step

    signature = inspect.signature(original)

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        draws.step_begins(signature.bind(*args, **kwargs).arguments["sample"])
        return original(*args, **kwargs)

    with mock.patch.object(kind, "step", step):
        yield
