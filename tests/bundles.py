"""Builds the tiny bundles that several test modules look at, once for each test process."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import fewstep
from tests import tiny

STEPS = (1, 2, 4)


@dataclass(frozen=True)
class Built:
    """A tiny checkpoint, its bundle, and the stage cache that made it."""

    source: Path
    bundle: fewstep.Bundle
    options: fewstep.Options


@functools.cache
def built(kind: str, recipe: str = "fp32") -> Built:
    """Returns the bundle of ``lcm`` or ``turbo``; tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix=f"fewstep-{kind}-"))
    source = getattr(tiny, f"{kind}_folder")(folder / "source")
    options = fewstep.Options(prompts=2, seeds=1, cache_root=folder / "cache")
    bundle = fewstep.build(str(source), recipe, out=folder / "bundle", steps=STEPS, options=options)
    return Built(source, bundle, options)
