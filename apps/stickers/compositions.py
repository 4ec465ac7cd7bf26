"""A held-out composition test: colours and styles never trained on with an object, but on others.

A caption such as "blue banana" names an object and an attribute that no training caption has together. What a sampler
gives for it is compared, in latent space, with all training images and with the right answers: the object's own image
in each colour, or the held-out image of the object in a set's style. `object` counts results nearest to the object with
any attribute, `both` those nearest to the one asked for. Copying what was learned of the object gives `object` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fewstep.stickers.data import Sticker
from fewstep.stickers.sets import StyledSticker

COLOURS = {"red": 0, "orange": 28, "yellow": 52, "green": 120, "blue": 220, "purple": 280}
"""Colour words of Unicode's names, and their hues in degrees."""
OBJECTS = (
    "banana",
    "strawberry",
    "carrot",
    "lemon",
    "frog",
    "crab",
    "octopus",
    "whale",
    "automobile",
    "rose",
    "tulip",
    "dress",
    "backpack",
    "baby chick",
)
"""Objects mostly of one hue, in whose captions the other colours do not occur."""
_SATURATED = 0.25
_NEAR_HUE = 45


@dataclass(frozen=True)
class Composition:
    """A caption that was never trained on, the name of its object, its attribute, and an image that is right."""

    caption: str
    name: str
    attribute: str
    sticker: Sticker


@dataclass(frozen=True)
class CompositionScore:
    """Shares of the results: of the right object, and of the right object with the right attribute."""

    kind: str
    count: int
    object: float
    both: float


def colour_compositions(stickers: Sequence[Sticker]) -> list[Composition]:
    """Returns each object in each colour that is neither its own nor in its captions."""
    found = []
    for sticker in stickers:
        if sticker.name not in OBJECTS:
            continue
        words = set(re.findall(r"\w+", " ".join([sticker.name, *sticker.keywords]).lower()))
        own = dominant_hue(sticker.pixels_HWC)
        for colour, hue in COLOURS.items():
            apart = abs((hue - own + 180) % 360 - 180)
            if colour not in words and apart >= _NEAR_HUE:
                right = replace(sticker, pixels_HWC=recoloured(sticker.pixels_HWC, hue))
                found.append(Composition(f"{colour} {sticker.name}", sticker.name, colour, right))
    return found


def style_compositions(held_out: Sequence[StyledSticker]) -> list[Composition]:
    """Returns the held-out images with the captions that name object and style."""
    return [
        Composition(f"{s.sticker.name}, {s.styles[0]}", s.sticker.name, s.styles[0], s.sticker)
        for s in held_out
        if s.held_out
    ]


def score_compositions(
    compositions: Sequence[Composition],
    *,
    kind: str,
    trained: Sequence[Sticker],
    features_PD: NDArray[np.float64],
    features: Callable[[Sequence[Sticker]], NDArray[np.float64]],
    results_BD: NDArray[np.float64],
) -> CompositionScore:
    """Scores the results of the compositions' captions.

    Args:
        compositions: What was asked for.
        kind: "colour" or "style", for the report.
        trained: The training images.
        features_PD: Their features, float64 [P, D].
        features: Computes the features of further images.
        results_BD: The features of the results, a row for each composition.
    """
    labels = [(s.name, "") for s in trained] + [(c.name, c.attribute) for c in compositions]
    candidates_QD = np.concatenate([features_PD, features([c.sticker for c in compositions])])
    squares_Q = (candidates_QD**2).sum(axis=1)
    nearest_B = (squares_Q - 2 * results_BD @ candidates_QD.T).argmin(axis=1)
    found = [labels[int(i)] for i in nearest_B]
    pairs = list(zip(compositions, found, strict=True))
    right = sum(label[0] == c.name for c, label in pairs)
    both = sum(label == (c.name, c.attribute) for c, label in pairs)
    return CompositionScore(kind, len(pairs), right / len(pairs), both / len(pairs))


def dominant_hue(pixels_HWC: np.ndarray) -> float:
    """Returns the mean direction of the hues of an image, in degrees, weighted by saturation."""
    hue, saturation, _ = _hsv(pixels_HWC)
    direction = (np.where(saturation > _SATURATED, saturation, 0) * np.exp(1j * np.deg2rad(hue))).sum()
    return float(np.rad2deg(np.angle(direction)) % 360)


def recoloured(pixels_HWC: np.ndarray, hue: float) -> np.ndarray:
    """Returns the image with another dominant hue: near hues turn by the same angle, the others and greys stay."""
    from PIL import Image

    old, saturation, value = _hsv(pixels_HWC)
    own = dominant_hue(pixels_HWC)
    near = np.abs((old - own + 180) % 360 - 180) < 45
    turned = np.where(near & (saturation > 0.1), (old + hue - own) % 360, old)
    hsv = np.stack([turned / 360 * 255, saturation * 255, value * 255], axis=-1).round().astype(np.uint8)
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def _hsv(pixels_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns hue in degrees, saturation and value in [0, 1], float64 [H, W] each."""
    from PIL import Image

    hsv = np.asarray(Image.fromarray(pixels_HWC).convert("HSV")).astype(np.float64) / 255
    return hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]
