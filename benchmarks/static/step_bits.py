"""What more bits in one step alone are worth: pictures of the built-in generator, its denoiser quantized.

The specialized form could have such graphs. Activations in float take nothing but time where kernels read the same
whole numbers of weights; other bits of weights are another copy of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.static.drawing import Drawing, psnrs
from fewstep.bundle.contract import DENOISER
from fewstep.optimize.quantize import quantize
from fewstep.recipe.quantization import Quantization
from fewstep.runtimes.base import Array, CheckedSession
from fewstep.runtimes.pytorch.reference import open_program
from fewstep.runtimes.sampling.step_graphs import row_call

# What most steps compute with, and what one step computes with in its place.
PAIRS = (("w8a8", "w8"), ("w4a8", "w4"), ("w4a8", "w8a8"))


def measure(work: Path, *, steps: int = 4, prompts: int = 12, seeds: int = 1, samples: int = 32) -> dict[str, Any]:
    """Returns the PSNR of every picture against the float denoiser's, by what computes and in which steps.

    The arguments are those of `Drawing.prepare`.
    """
    drawing = Drawing.prepare(work, steps=steps, prompts=prompts, seeds=seeds, samples=samples)
    references = drawing.references()
    sessions: dict[str, CheckedSession] = {}
    for bits in (8, 4):
        plan, _ = drawing.plan(Quantization(weights=bits, activations=8))
        light = replace(plan, activations={}, computes=(), outputs=())
        for name, of_name in ((f"w{bits}a8", plan), (f"w{bits}", light)):
            sessions[name] = open_program(quantize(drawing.floats[DENOISER], of_name))
    found: dict[str, Any] = {}
    for base, other in PAIRS:
        for where in ([], *([k] for k in range(steps)), [*range(steps)]):
            rows = {drawing.rows[k] for k in where}
            mixed = CheckedSession(DENOISER, sessions[base].spec, _ByRow(sessions[base], sessions[other], rows))
            found[f"{base} {other} {','.join(map(str, where))}"] = psnrs(references, drawing.draw(mixed))
    return {"steps": steps, "samples": samples, "psnr_db": found}


class _ByRow:
    """Runs one session in some rows of the table, and another in the others."""

    def __init__(self, base: CheckedSession, other: CheckedSession, rows: set[int]) -> None:
        self._base, self._other, self._rows = base, other, rows

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        row, _ = row_call(self._base.spec, feeds)
        return (self._other if row in self._rows else self._base).run(feeds)

    def close(self) -> None:
        """Closes nothing: both sessions are used again."""


def markdown(figures: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a table."""
    psnr, steps = figures["psnr_db"], figures["steps"]
    pictures = len(next(iter(psnr.values())))
    lines = [
        f"Mean PSNR in dB of {pictures} held-out pictures at N = {steps} against the float denoiser's, computed in "
        f"PyTorch; only the denoiser is quantized, calibrated with {figures['samples']} samples. Steps in which it "
        "computes otherwise, with the gain picture by picture and its standard error: activations in float (*w8*, "
        "*w4*), or weights of 8 bits.",
        "",
        f"| in most steps | no other | in one step | {' | '.join(f'step {k}' for k in range(steps))} | in all |",
        "|---" * (steps + 4) + "|",
    ]
    for base, other in PAIRS:
        none = psnr[f"{base} {other} "]
        places = [*(str(k) for k in range(steps)), ",".join(map(str, range(steps)))]
        gains = [_gain(none, psnr[f"{base} {other} {where}"]) for where in places]
        lines.append(f"| {base} | {statistics.fmean(none):.2f} | {other} | {' | '.join(gains)} |")
    return lines


def _gain(before: Sequence[float], after: Sequence[float]) -> str:
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return f"{statistics.fmean(differences):+.2f} ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}"
