"""The verified bundles that faults are seeded into: built once, in build/faults unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import fewstep
from fewstep.bundle import MANIFEST

ROOT = Path(__file__).parents[2]
WORK = Path(os.environ.get("FEWSTEP_FAULTS", ROOT / "build" / "faults"))
PROMPTS, SEEDS = 2, 1


def folder_of(recipe: str, source: str = "stickers") -> Path:
    """Returns the folder of a source's verified bundle by a recipe, built if need be."""
    folder = WORK / f"{source}-{recipe}"
    if not (folder / MANIFEST).is_file():
        options = fewstep.Options(prompts=PROMPTS, seeds=SEEDS, profile=False)
        fewstep.build(source, recipe, out=folder, options=options)
    return folder
