"""Palettes of as many bits as each weight is worth: sensitivity and integer program are those of mixed precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.fx import GraphModule

from fewstep.bundle.contract import BEFORE
from fewstep.bundle.samples import Sample
from fewstep.calibration import SampleRequest, record_samples
from fewstep.disk import scratch
from fewstep.errors import QuantizationError
from fewstep.export import Generator, Programs, describe, programs_of, write_tokenizers
from fewstep.optimize.palettize import GROUPS, palettized, row_groups, worth_a_palette
from fewstep.optimize.quantize.apply import float_graph
from fewstep.optimize.quantize.attributes import attribute
from fewstep.optimize.quantize.mixed_precision.candidates import Option, Weight
from fewstep.optimize.quantize.mixed_precision.ilp import Item, allocate
from fewstep.optimize.quantize.mixed_precision.image_damage import Pictures
from fewstep.optimize.quantize.mixed_precision.search import Candidate, measure
from fewstep.optimize.quantize.plan import Array
from fewstep.optimize.quantize.quantizable_ops import Site
from fewstep.progress import Progress
from fewstep.recipe.quantization import Quantization
from fewstep.recipe.recipe import Recipe
from fewstep.runtimes.sampling.sampler import open_tokenizers

_BITS = (2, 4, 6, 8)
# Samples whose pictures a weight's damage is measured in, and of these, whose calls.
_PICTURES, _TRIALS = 4, 1
_HALF_BYTES = 2


@dataclass(frozen=True, eq=False)
class PaletteOption(Option):
    """A weight on palettes; ``palettized`` are its values then, as halves."""

    palettized: Array

    @property
    def exact(self) -> bool:
        """Whether the values are those of the weight."""
        return False

    def values(self, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """Returns the values, float32."""
        return torch.from_numpy(self.palettized).float()


def choose_palettes(generator: Generator, recipe: Recipe, progress: Progress) -> Recipe:
    """Returns the recipe with bits for every weight, if it asks for a mean and does not say them already.

    Raises:
        QuantizationError: the mean is below what the fewest bits take.
    """
    if recipe.palette_mean_bits is None or recipe.palette_choices:
        return recipe
    described = describe(generator, [generator.default_steps])
    programs = programs_of(generator, described, Recipe("palettes", form="step"))
    prompts = (generator.calibration_prompts or generator.prompts)[:_PICTURES] or ("",)
    requests = SampleRequest.grid(generator, prompts, range(1), generator.default_steps, generator.guidance)
    samples = list(record_samples(generator, described, requests))
    with scratch() as folder:
        write_tokenizers(generator, described.tokenizers, Path(folder))
        tokenizers = open_tokenizers(Path(folder), described.tokenizers)
    graphs = {name: float_graph(programs.make(name)) for name in programs.components}
    modules = {name: module for name, (module, _) in graphs.items()}
    pictures = Pictures(programs, modules, tokenizers, samples)
    names = _parameter_names(generator)
    keys, items, bits, values = [], [], [], 0
    advance = progress.task("weigh palettes", len(graphs))
    for component, (module, sites) in graphs.items():
        weights = _weights(module, sites, names)
        if weights:
            options = {weight.name: _options(attribute(module, weight.name)) for weight in weights}
            calls = partial(_calls, programs, samples, component)
            early = frozenset(name for name, spec in programs.components.items() if spec.phase == BEFORE)
            measured, _ = measure(component, Candidate(module, weights, calls, calls, early), options, pictures)
            for m in measured:
                keys.append(names[attribute(module, m.weight.name).data_ptr()])
                items.append(Item(tuple(o.bytes for o in m.options), m.damage))
                bits.append([o.bits for o in m.options])
                values += m.weight.parameters
        advance()
    chosen = allocate(items, int(recipe.palette_mean_bits * values / 8))
    choices = {key: of[i] for key, of, i in zip(keys, bits, chosen, strict=True)}
    return replace(recipe, palette_choices=dict(sorted(choices.items())))


def _parameter_names(generator: Generator) -> Mapping[int, str]:
    """Returns what `Palettize` calls every parameter, by the place of its values in memory."""
    attributes = {part.attribute: name for name, part in generator.parts.items()}
    return {
        parameter.data_ptr(): f"{component}/{name}"
        for component in attributes.values()
        for name, parameter in generator.module(component).named_parameters()
    }


def _weights(module: GraphModule, sites: tuple[Site, ...], names: Mapping[int, str]) -> list[Weight]:
    """Returns the weights of a component that palettes are worth it for."""
    readers: dict[str, list[Site]] = {}
    for site in sites:
        if worth_a_palette(attribute(module, site.weight)):
            readers.setdefault(site.weight, []).append(site)
    for name in readers:
        if attribute(module, name).data_ptr() not in names:
            raise QuantizationError(f"{name} is no parameter of the generator's", hint="use a palette of fixed bits")
    return [Weight(name, tuple(found), Quantization(), computes=False) for name, found in readers.items()]


def _options(weight: torch.Tensor) -> tuple[Option, ...]:
    """Returns a weight's palettes, fewest bits first."""
    values = weight.double().numpy()
    found = []
    for bits in _BITS:
        tables = len(row_groups(len(values), GROUPS[bits]))
        size = values.size * bits // 8 + tables * (1 << bits) * _HALF_BYTES
        found.append(PaletteOption(bits, None, None, size, palettized(values, bits).astype(np.float16)))
    return tuple(sorted(found, key=lambda option: option.bytes))


def _calls(programs: Programs, samples: list[Sample], component: str) -> list[tuple[int, tuple[torch.Tensor, ...]]]:
    names = [spec.name for spec in programs.components[component].inputs]
    return [
        (feed.step or 0, tuple(torch.from_numpy(feed.inputs[name]) for name in names))
        for sample in samples[:_TRIALS]
        for feed in sample.feeds
        if feed.component == component
    ]
