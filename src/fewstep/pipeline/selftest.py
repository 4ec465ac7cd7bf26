"""A runtime tried on this machine in seconds: a small generator compiled, run and compared, in float and in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.disk import scratch
from fewstep.errors import FewstepError, RuntimeMissingError
from fewstep.faults import naming_packages
from fewstep.pipeline.build import Options, build
from fewstep.progress import Progress, Silent
from fewstep.recipe.recipe import load_recipe
from fewstep.runtimes import get_runtime

if TYPE_CHECKING:
    import torch

    from fewstep.export import Generator
    from fewstep.export.custom_loop import Draw, Networks

RECIPES = ("fp32", "w8")
WHOLE_NUMBERS = "w8a8"
# Of 2 steps each: enough to see each tensor's range, and a second of work.
_CALIBRATION_SAMPLES = 4


@dataclass(frozen=True)
class Trial:
    """What came of one recipe: the number of comparisons made, and an error where it failed."""

    recipe: str
    checks: int
    executor: str
    error: str | None = None


def recipes_of(name: str) -> tuple[str, ...]:
    """Returns the recipes that a runtime is tried with: one with whole numbers if it can compute with them."""
    return (*RECIPES, *([WHOLE_NUMBERS] if get_runtime(name).compare_integers is not None else []))


@naming_packages()
def self_test(name: str, recipes: Sequence[str] | None = None, progress: Progress | None = None) -> list[Trial]:
    """Returns what came of compiling and running a small generator for a runtime, with `recipes_of` unless given.

    Raises:
        RuntimeMissingError: nothing can be compiled for it, or its artifacts not computed, on this machine.
    """
    state = get_runtime(name).availability()
    if not state.builds:
        raise RuntimeMissingError(f"{name} cannot be tried here: {state.detail}", hint=state.remedy)
    generator, recipes = _generator(), recipes or recipes_of(name)
    advance = (progress or Silent()).task(f"try {name}", len(recipes))
    trials = []
    with scratch() as folder:
        options = Options(prompts=1, seeds=2, profile=False, cache_root=Path(folder, "cache"))
        for recipe in recipes:
            trials.append(_try(generator, name, recipe, Path(folder, recipe), options))
            advance()
    return trials


def _try(generator: Generator, runtime: str, name: str, out: Path, options: Options) -> Trial:
    recipe = load_recipe(name)
    if recipe.quantization is not None:
        recipe = replace(recipe, quantization=replace(recipe.quantization, samples=_CALIBRATION_SAMPLES))
    try:
        bundle = build(generator, recipe, (runtime,), out, options=options)
    except FewstepError as error:
        return Trial(name, 0, "", str(error))
    parity = bundle.manifest.parity or {}
    return Trial(name, parity["checks"], parity["executor"])


def _generator() -> Generator:
    """Returns a generator with what few-step networks are made of: convolutions, normalization, linear layers."""
    import torch

    from fewstep.bundle.contract import InputSpec
    from fewstep.export import Generator

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label = torch.nn.Embedding(4, 32)
            self.first = torch.nn.Conv2d(3, 32, 3, padding=1)
            self.norm = torch.nn.GroupNorm(8, 32)
            self.down = torch.nn.Conv2d(32, 32, 3, stride=2, padding=1)
            self.mix = torch.nn.Linear(32, 32)
            self.last = torch.nn.Conv2d(32, 3, 3, padding=1)

        def forward(self, x_NCHW: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            silu = torch.nn.functional.silu
            hidden = self.first(x_NCHW) + (self.label(label) + torch.sin(t[:, None]))[:, :, None, None]
            half = self.down(silu(self.norm(hidden)))
            tokens = self.mix(half.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, half.shape[2:])
            wide = torch.nn.functional.interpolate(silu(tokens), scale_factor=2.0, mode="nearest")
            result: torch.Tensor = self.last(hidden + wide)
            return result

    def flow(
        nets: Networks, inputs: Mapping[str, torch.Tensor], *, steps: int, guidance: float, noise: Draw
    ) -> torch.Tensor:
        x = noise((1, 3, 16, 16))
        for k in range(steps):
            x = x - nets["denoiser"](x, torch.tensor([1 - k / steps]), inputs["class_label"]) / steps
        return x

    torch.manual_seed(0)
    inputs = (InputSpec("class_label", "class", (1,), 4),)
    return Generator.assemble("self-test", {"denoiser": Denoiser()}, flow, inputs=inputs, steps=(2,))
