"""A network with what image networks consist of, small enough to be compiled in seconds, and its programs."""

from __future__ import annotations

import functools

import torch

from fewstep.bundle.program import Program
from fewstep.optimize.quantize import quantize
from fewstep.recipe.quantization import Quantization
from tests.support.quantized import calls_of, plan_of, program_of, random


class Net(torch.nn.Module):
    """Convolutions of 1 and 3, a group norm, linear layers over places behind a norm, an embedding, a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.GroupNorm(8, 32)
        self.middle, self.point = torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.Conv2d(32, 32, 1)
        self.up, self.down = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)
        self.tokens = torch.nn.LayerNorm(32)
        torch.nn.init.normal_(self.tokens.weight)
        self.last, self.label = torch.nn.Conv2d(32, 4, 3, padding=1), torch.nn.Embedding(9, 32)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x) + self.label(label)[:, :, None, None]
        hidden = self.middle(torch.nn.functional.silu(self.norm(hidden)))
        tokens = hidden.flatten(2).transpose(1, 2)
        tokens = tokens + self.down(torch.nn.functional.gelu(self.up(self.tokens(tokens))))
        image = tokens.transpose(1, 2).unflatten(2, (8, 8))
        result: torch.Tensor = self.last(torch.tanh(self.point(image)) + hidden)
        return result


INPUTS = (random(1, 4, 8, 8), torch.tensor([3]))


@functools.cache
def net(profile: str = "", weights: int = 8, activations: int = 32, *, dynamic: bool = False) -> Program:
    """Returns the network's program, in float without a profile; nearest rounding."""
    program = program_of(Net(), *INPUTS, origins=["latent", "input:label"])
    if not profile:
        return program
    granularity = "channel" if weights == 8 else "group"
    chosen = Quantization(weights, activations, dynamic, granularity, rounding="nearest")
    return quantize(program, plan_of(program, chosen, calls_of(*INPUTS), profile))
