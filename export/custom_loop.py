"""A generator written in plain PyTorch: named networks and the function that samples with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from fewstep.bundle.contract import DENOISER
from fewstep.errors import SourceError

Networks = Mapping[str, Callable[..., Any]]
Draw = Callable[[tuple[int, ...]], torch.Tensor]


class SampleFunction(Protocol):
    """Samples once: calls the networks by name, does plain tensor arithmetic between them, returns the output.

    ``inputs`` holds what the user gave: token ids int64 [1, L] under a text input's name, a class as int64 [1], a
    picture as float32 [1, C, H, W] in [0, 1]. ``noise(shape)`` is a fresh standard normal at every call: the first one
    is the initial noise. The network ``denoiser`` is the one of the loop; its first argument is the latent. In some of
    the steps, or by the number of steps, another one may take its place, which is called ``denoiser_...`` and takes the
    latent and its times by the same names.

    Compiled for a batch, it is run with one row of inputs and noise for each sample, whatever first dimension it asks
    ``noise`` for.
    """

    def __call__(
        self, nets: Networks, inputs: Mapping[str, torch.Tensor], *, steps: int, guidance: float, noise: Draw
    ) -> torch.Tensor:
        """Returns the output, batch 1."""
        ...


class Loop:
    """Networks and their sampling function, as one object whose networks are attributes."""

    def __init__(self, networks: Mapping[str, torch.nn.Module], sample: SampleFunction) -> None:
        if DENOISER not in networks:
            raise SourceError(
                f"the networks are {', '.join(networks)}, expected one of them to be {DENOISER!r}",
                hint=f"name the network that the sampling loop calls {DENOISER!r}",
            )
        self.names = tuple(networks)
        self.sample = sample
        for name, network in networks.items():
            if hasattr(self, name):
                raise SourceError(f"{name!r} cannot be the name of a network", hint="choose another name")
            setattr(self, name, network.eval())

    def __call__(self, inputs: Mapping[str, torch.Tensor], *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
        """Returns the output of the sampling function."""
        networks = {name: getattr(self, name) for name in self.names}
        return self.sample(networks, inputs, steps=steps, guidance=guidance, noise=noise)
