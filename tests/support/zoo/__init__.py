"""A zoo of tiny few-step generators with random weights: one for every family that fewstep serves."""

from __future__ import annotations

from tests.support.zoo import dits, images, loops, media, unets
from tests.support.zoo.family import Family, Input, Loop

__all__ = ["FAMILIES", "Family", "Input", "Loop"]

FAMILIES: tuple[Family, ...] = (*unets.FAMILIES, *dits.FAMILIES, *images.FAMILIES, *media.FAMILIES, *loops.FAMILIES)
