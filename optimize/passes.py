"""What a pass is, and which passes a recipe asks for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol

import torch

from fewstep.errors import ExportError
from fewstep.export.generator import Generator
from fewstep.recipe.recipe import Recipe


@dataclass(frozen=True)
class PassNote:
    """What a pass changed; ``modified`` is False where it found nothing to do."""

    name: str
    modified: bool
    detail: str


class Pass(Protocol):
    """One optimization. It never edits the generator that it is given."""

    def __call__(self, generator: Generator) -> tuple[Generator, PassNote]:
        """Returns the optimized generator and a note."""
        ...


def copies(generator: Generator) -> dict[str, torch.nn.Module]:
    """Returns a copy of every module of a generator, once each: encoder and decoder are two methods of one."""
    attributes = {part.attribute: name for name, part in generator.parts.items()}
    return {name: copy.deepcopy(generator.module(name)) for name in attributes.values()}


def check_in_memory(generator: Generator, why: str) -> None:
    """Raises ExportError for a generator whose weights stay in their files; ``why`` says what needs them."""
    if generator.stored is not None:
        raise ExportError(
            f"{generator.name} is too large to hold in memory, and {why}",
            hint="load it with eager=True, or use the recipe fp16",
        )


def optimize(generator: Generator, recipe: Recipe) -> tuple[Generator, list[PassNote]]:
    """Returns the generator after every pass of the recipe, with their notes in order."""
    from fewstep.optimize.fp16_weights import RoundWeights
    from fewstep.optimize.palettize import Palettize
    from fewstep.optimize.sparsify import Sparsify

    passes: list[Pass] = []
    if recipe.weights == "fp16":
        passes.append(RoundWeights())
    if recipe.sparsity is not None:
        passes.append(Sparsify(recipe.sparsity))
    if recipe.palette is not None:
        passes.append(Palettize(recipe.palette, recipe.palette_choices or None, keep_zeros=recipe.sparsity is not None))
    notes = []
    for apply in passes:
        generator, note = apply(generator)
        notes.append(note)
    return generator, notes
