"""What a grid of activations for each step is worth: pictures of the built-in generator, its denoiser quantized.

The other components stay in float, so that nothing else is in the figures. Activations of fewer than 8 bits are no
recipe: they show what step grids are worth where activations, and not weights, make the error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.static.drawing import Drawing, psnrs
from fewstep.bundle.contract import DENOISER
from fewstep.calibration.ranges import StepRanges
from fewstep.export import Programs
from fewstep.optimize.quantize import ComponentPlan, quantize
from fewstep.optimize.quantize.per_step_qparams import StepGrids
from fewstep.recipe.quantization import STEP_GRIDS, Quantization
from fewstep.recipe.target_profiles import get_profile
from fewstep.runtimes.pytorch.reference import open_program

# Bits of weights, with those of activations that they are tried with.
BITS = {8: (8, 6, 4), 4: (8, 6, 4)}


def measure(work: Path, *, steps: int = 4, prompts: int = 16, seeds: int = 1, samples: int = 32) -> dict[str, Any]:
    """Returns the PSNR of every picture against the float denoiser's, by bits and by how steps share grids.

    The arguments are those of `Drawing.prepare`.
    """
    drawing = Drawing.prepare(work, steps=steps, prompts=prompts, seeds=seeds, samples=samples)
    programs, calls = drawing.programs, drawing.calls
    references = drawing.references()
    found: dict[str, Any] = {}
    for bits, tried in BITS.items():
        recipe = Quantization(weights=bits, activations=8)
        plan, ranges = drawing.plan(recipe)
        for of_activations in tried:
            for how in STEP_GRIDS:
                grids = StepGrids.of(programs, replace(recipe, step_grids=how), calls, DENOISER)
                denoiser = quantize(drawing.floats[DENOISER], _with_grids(plan, ranges, grids, recipe, of_activations))
                found[f"w{bits}a{of_activations} {how}"] = psnrs(references, drawing.draw(open_program(denoiser)))
    return {"steps": steps, "samples": samples, "psnr_db": found, "grids": _shares(programs, ranges, calls)}


def _with_grids(
    plan: ComponentPlan, ranges: StepRanges, grids: StepGrids, recipe: Quantization, bits: int
) -> ComponentPlan:
    """Returns a plan with other grids of activations, its weights as they are."""
    profile = get_profile(recipe.profile)
    made = {name: grids.grid(ranges, name, recipe.ranges, profile, bits) for name in plan.activations}
    return replace(plan, activations=made)


def _shares(programs: Programs, ranges: StepRanges, calls: Any) -> dict[str, int]:
    """Returns how many grids of 8 bits the activations have in all, by how steps share them."""
    recipe = Quantization(activations=8)
    profile = get_profile(recipe.profile)
    found = {}
    for how in STEP_GRIDS:
        grids = StepGrids.of(programs, replace(recipe, step_grids=how), calls, DENOISER)
        made = [grids.grid(ranges, name, recipe.ranges, profile) for name in ranges.points]
        found[how] = sum(len({(s, z) for s, z in zip(g.scale, g.zero_point, strict=True)}) for g in made)
    return found


def markdown(figures: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a table."""
    psnr = figures["psnr_db"]
    pictures = len(next(iter(psnr.values())))
    lines = [
        f"Mean PSNR in dB of {pictures} held-out pictures at N = {figures['steps']} against the float denoiser's, "
        f"computed in PyTorch; only the denoiser is quantized, calibrated with {figures['samples']} samples. "
        "*Margin* is of *each* over *shared*, picture by picture, with its standard error.",
        "",
        "| weights, activations | shared | grouped | each | margin |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(key.rpartition(" ")[0] for key in psnr):
        shared, grouped, each = (psnr[f"{kind} {how}"] for how in STEP_GRIDS)
        differences = [b - a for a, b in zip(shared, each, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        means = " | ".join(f"{statistics.fmean(values):.2f}" for values in (shared, grouped, each))
        lines.append(f"| {kind} | {means} | {statistics.fmean(differences):+.2f} ± {error:.2f} |")
    counts = figures["grids"]
    lines += ["", "Grids of activations in all: " + ", ".join(f"{counts[how]} {how}" for how in STEP_GRIDS) + "."]
    if {"w8a8 shared", "w4a8 shared"} <= psnr.keys():
        wide, narrow = (statistics.fmean(psnr[f"{kind} shared"]) for kind in ("w8a8", "w4a8"))
        share = 10 ** ((narrow - wide) / 10)
        most = -10 * math.log10(1 - share) if share < 1 else math.inf
        lines += [
            "",
            f"With 4-bit weights, all that 8-bit weights and activations cost is {share:.1%} of the squared error. "
            f"Grids of activations can win back no more than that, {most:.2f} dB: what is lost is lost to the weights.",
        ]
    return lines
