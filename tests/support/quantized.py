"""Small networks traced as programs, and calibration calls for them: what tests of quantization start from."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep
from fewstep.bundle.contract import LATENT, LOOP, ComponentSpec, InputSpec, TensorSpec
from fewstep.bundle.program import Program
from fewstep.export import Generator
from fewstep.export.custom_loop import Draw, Networks
from fewstep.optimize.quantize import ComponentPlan, find_sites
from fewstep.optimize.quantize.apply import float_graph
from fewstep.optimize.quantize.planner import plan_component
from fewstep.recipe.quantization import Quantization
from fewstep.recipe.recipe import Recipe, load_recipe
from fewstep.recipe.target_profiles import get_profile

Calls = Callable[[], Iterable[tuple[int, tuple[torch.Tensor, ...]]]]
# What most tests ask for: 8 bits, no calibration beyond the ranges, nothing spared for being at an end.
W8A8 = Quantization(activations=8, rounding="nearest", ranges="minmax")


class _Wired(torch.nn.Module):
    """A module as the export stage wires it: its result in a tuple."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.module(*inputs),)


def program_of(module: torch.nn.Module, *inputs: torch.Tensor, origins: Sequence[str] = ()) -> Program:
    """Returns a module traced with inputs ``x0``, ``x1``, ... (of the latent unless ``origins`` says) and output ``y``.

    Its parameters are named as the export stage names them, ``module.`` before their own names.
    """
    wired = _Wired(module).eval().requires_grad_(False)
    with torch.no_grad():
        (output,) = wired(*inputs)
        exported = torch.export.export(wired, inputs)
    names = [f"x{i}" for i in range(len(inputs))]
    spec = ComponentSpec(
        tuple(
            TensorSpec(n, str(x.dtype).removeprefix("torch."), tuple(x.shape))
            for n, x in zip(names, inputs, strict=True)
        ),
        (TensorSpec("y", "float32", tuple(output.shape)),),
        dict(zip(names, origins or [LATENT] * len(inputs), strict=True)),
        LOOP,
    )
    return Program("denoiser", "unet", exported, spec)


def calls_of(*inputs: torch.Tensor, count: int = 3) -> Calls:
    """Returns calls of one step with values like those of ``inputs``, the same each time."""

    def calls() -> Iterable[tuple[int, tuple[torch.Tensor, ...]]]:
        yield 0, inputs
        for i in range(1, count):
            shift = torch.Generator().manual_seed(i)
            yield (
                0,
                tuple(x + 0.1 * torch.randn(x.shape, generator=shift) if x.is_floating_point() else x for x in inputs),
            )

    return calls


def plan_of(program: Program, quantization: Quantization, calls: Calls, profile: str = "x86") -> ComponentPlan:
    """Returns a component's plan."""
    return plan_component(program, quantization, get_profile(profile), calls)[0]


def sites_of(program: Program) -> dict[str, Any]:
    """Returns a program's sites by name."""
    module, sites = float_graph(program)
    assert sites == find_sites(program, module)
    return {site.name: site for site in sites}


def run(program: Program, *inputs: torch.Tensor) -> torch.Tensor:
    """Returns what a program computes."""
    with torch.no_grad():
        (result,) = program.exported.module()(*inputs)
    assert isinstance(result, torch.Tensor)
    return result


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns normal values, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def feeds(program: Program, *inputs: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Returns inputs by name, as a session takes them."""
    return {spec.name: x.numpy() for spec, x in zip(program.spec.inputs, inputs, strict=True)}


class _Denoiser(torch.nn.Module):
    """Convolutions, a linear layer over places and a time path, of a size that 8 and 4 bits are worth it."""

    def __init__(self) -> None:
        super().__init__()
        self.label = torch.nn.Embedding(5, 64)
        self.time, self.mix = torch.nn.Linear(16, 64), torch.nn.Linear(64, 64)
        self.first = torch.nn.Conv2d(3, 64, 3, padding=1)
        self.middle = torch.nn.Conv2d(64, 64, 3, padding=1)
        self.last = torch.nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, x_NCHW: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * torch.arange(1, 17, dtype=torch.float32)
        seen = self.first(x_NCHW) + (self.label(label) + self.time(torch.sin(angles)))[:, :, None, None]
        hidden = torch.tanh(self.middle(torch.nn.functional.silu(seen)))
        tokens = self.mix(hidden.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8))
        result: torch.Tensor = self.last(hidden + tokens)
        return result


def _flow(
    nets: Networks, inputs: Mapping[str, torch.Tensor], *, steps: int, guidance: float, noise: Draw
) -> torch.Tensor:
    x = noise((1, 3, 8, 8))
    for k in range(steps):
        x = x - nets["denoiser"](x, torch.tensor([1 - k / steps]), inputs["class_label"]) / steps
    return x


def painter(seed: int = 0) -> Generator:
    """Returns a generator in plain PyTorch that takes a class: small enough to be built in seconds."""
    torch.manual_seed(seed)
    inputs = (InputSpec("class_label", "class", (1,), 5),)
    return Generator.assemble("painter", {"denoiser": _Denoiser()}, _flow, inputs=inputs, steps=(2,))


def small(recipe: str) -> Recipe:
    """Returns a preset that calibrates with four samples."""
    preset = load_recipe(recipe)
    assert preset.quantization is not None
    return replace(preset, quantization=replace(preset.quantization, samples=4))


@dataclass(frozen=True)
class BuiltPainter:
    """A bundle of `painter`, and what it was built with."""

    bundle: fewstep.Bundle
    options: fewstep.Options


@functools.cache
def painted(recipe: str) -> BuiltPainter:
    """Returns the bundle of `painter` by a preset; tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix=f"fewstep-painter-{recipe}-"))
    options = fewstep.Options(prompts=1, seeds=3, cache_root=folder / "cache", profile=False)
    chosen = load_recipe(recipe) if recipe.startswith("fp") else small(recipe)
    return BuiltPainter(fewstep.build(painter(), chosen, out=folder / "bundle", options=options), options)
