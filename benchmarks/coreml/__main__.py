"""Builds the built-in generator for Core ML by every way of compressing, and writes size against quality.

``python -m benchmarks.coreml [ROW ...]`` goes on where it was interrupted: a row of the same recipe and versions of
packages is not built again. ``--page`` builds nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fewstep
from benchmarks.coreml.table import Row, markdown, points
from benchmarks.quant.cells import Cells
from benchmarks.quant.plot import scatter
from fewstep.pipeline.compile import versions
from fewstep.recipe.recipe import Recipe, load_recipe, parse_recipe
from fewstep.runtimes.parity.harness import COMPRESSION, LOWERING, LOWERING_FP16

RESULTS = Path(__file__).parent / "results"
STEPS, SEEDS = 4, 1
# A row that is far from the original is a result, too.
_ANY = {"limits": {"compression_psnr_db": 0.0}}


def recipes() -> dict[str, Recipe]:
    """Returns the recipe of every row, by name."""
    presets = ("fp16", "w8", "w8a8", "palette8", "palette6", "palette4", "palette-mixed", "w4")
    sparse = {"weights": "fp16", "sparsity": 0.5, **_ANY}
    made: Mapping[str, Mapping[str, Any]] = {
        "sparse": sparse,
        "sparse-palette6": {**sparse, "palette": 6},
        "sparse-palette4": {**sparse, "palette": 4},
    }
    found = {name: _without_limit(load_recipe(name)) for name in presets}
    return found | {name: parse_recipe(values, where=name, name=name) for name, values in made.items()}


def _without_limit(recipe: Recipe) -> Recipe:
    limits = dataclasses.replace(recipe.limits, compression_psnr_db=0.0)
    return dataclasses.replace(recipe, limits=limits)


def measure(recipe: Recipe, prompts: int) -> dict[str, Any]:
    """Returns the size and the parity of a bundle that a recipe makes, on a picture of each of so many prompts."""
    options = fewstep.Options(prompts=prompts, seeds=SEEDS, profile=False)
    with TemporaryDirectory(prefix="fewstep-coreml-") as folder:
        out = Path(folder) / "bundle"
        bundle = fewstep.build("stickers", recipe, ["coreml"], out, steps=(STEPS,), options=options)
        return figures(bundle)


def figures(bundle: fewstep.Bundle) -> dict[str, Any]:
    """Returns the size and the parity of a bundle, as its report has them."""
    checks = json.loads((bundle.path / "report" / "parity.json").read_text(encoding="utf-8"))["all"]
    sizes = {artifact.component: artifact.bytes for artifact in bundle.manifest.artifacts}

    def values(error: str, level: str, metric: str) -> list[float]:
        # A report has infinities as text: what is equal to the last bit.
        return [float(c["value"]) for c in checks if (c["error"], c["level"], c["metric"]) == (error, level, metric)]

    def least(error: str, level: str, metric: str) -> float | None:
        return min(values(error, level, metric), default=None)

    psnr = values(COMPRESSION, "picture", "PSNR dB")
    return {
        "bytes": sizes,
        "psnr_db": {"mean": statistics.mean(psnr), "least": min(psnr), "pictures": len(psnr)} if psnr else None,
        "component_db": least(LOWERING, "component", "SQNR dB"),
        "component_fp16_db": least(LOWERING_FP16, "component", "SQNR dB"),
        "picture_fp16_db": least(LOWERING_FP16, "picture", "PSNR dB"),
        "equal_integers": least(LOWERING, "operation", "equal integers"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the rows that the command line names, or all, and writes the page and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coreml", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(recipes())}; all of them by default")
    parser.add_argument("--prompts", type=int, default=8, help="pictures to compare for each row (default: 8)")
    parser.add_argument("--page", action="store_true", help="write the page of the rows that there are")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - set(recipes()):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    cells = Cells(RESULTS / "cells")
    rows = []
    for name, recipe in recipes().items():
        if not options.page and (not options.rows or name in options.rows):
            sys.stderr.write(f"{name}\n")
            key = {"recipe": recipe.to_json(), "prompts": options.prompts, "seeds": SEEDS, "versions": versions()}
            cells.get_or_make(name, key, partial(measure, recipe, options.prompts))
        cell = cells.read(name)
        rows.append(Row(name, None if cell is None else cell["values"]))
    (RESULTS / "README.md").write_text(markdown(rows, versions()), encoding="utf-8")
    (RESULTS / "psnr-size.svg").write_text(scatter(points(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
