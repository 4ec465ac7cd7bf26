"""The verified bundles that faults are seeded into: built once, in build/faults unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import fewstep
from fewstep.bundle.bundle import MANIFEST
from fewstep.recipe.recipe import load_recipe
from tests.support.quantized import small

ROOT = Path(__file__).parents[2]
WORK = Path(os.environ.get("FEWSTEP_FAULTS", ROOT / "build" / "faults"))
PROMPTS, SEEDS = 2, 1


STICKERS, PAINTER = "stickers", "tests.support.quantized:painter"


def folder_of(recipe: str, source: str = STICKERS) -> Path:
    """Returns the folder of a source's verified bundle by a recipe, built if need be."""
    folder = WORK / f"{source.rpartition(':')[2]}-{recipe}"
    if not (folder / MANIFEST).is_file():
        options = fewstep.Options(prompts=PROMPTS, seeds=SEEDS, profile=False)
        chosen = small(recipe) if source == PAINTER and recipe == "w8a8" else load_recipe(recipe)
        fewstep.build(source, chosen, out=folder, options=options)
    return folder
