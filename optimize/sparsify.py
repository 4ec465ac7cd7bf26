"""Sparse weights: the smallest values of each weight become zero, and Core ML stores the places of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.export.generator import Generator
from fewstep.optimize.palettize import worth_a_palette
from fewstep.optimize.passes import PassNote, check_in_memory, copies


@dataclass(frozen=True)
class Sparsify:
    """Sets a share of every large weight's values to zero, those of the least magnitude.

    Attributes:
        share: from 0 to 1, of the values of each weight.
    """

    share: float

    def __call__(self, generator: Generator) -> tuple[Generator, PassNote]:
        """Returns a generator with sparse copies of its modules, and how many weights changed.

        Raises:
            ExportError: the generator's weights are not in memory.
        """
        check_in_memory(generator, "the smallest of all values are looked for")
        modules = copies(generator)
        changed = 0
        for module in modules.values():
            for parameter in filter(worth_a_palette, module.parameters()):
                parameter.data.copy_(sparse(parameter.detach(), self.share))
                changed += 1
        note = PassNote(f"{self.share:.0%} of each weight set to zero", changed > 0, f"{changed} weights")
        return generator.with_modules(modules), note


def sparse(weight: torch.Tensor, share: float) -> torch.Tensor:
    """Returns a weight of which the least ``share`` of all values by magnitude is zero, ties by place."""
    flat = weight.flatten().clone()
    order = torch.argsort(flat.abs(), stable=True)
    flat[order[: int(share * flat.numel())]] = 0
    return flat.reshape(weight.shape)
