"""The composition test asks for what was not trained on, and tells a copy from a composition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fewstep.stickers.compositions import colour_compositions, dominant_hue, recoloured, score_compositions
from fewstep.stickers.data import Sticker


def _sticker(name: str, colour: tuple[int, int, int], *keywords: str) -> Sticker:
    pixels = np.full((8, 8, 3), 255, np.uint8)
    pixels[2:6, 2:6] = colour
    return Sticker("", name, keywords, "", "", pixels)


def _features(stickers: Sequence[Sticker]) -> np.ndarray:
    return np.stack([s.pixels_HWC.reshape(-1) for s in stickers]).astype(np.float64)


BANANA = _sticker("banana", (250, 220, 30), "fruit")
ROCKET = _sticker("rocket", (200, 30, 30))


def test_own_colour_and_colours_of_the_captions_are_not_asked_for() -> None:
    assert [c.caption for c in colour_compositions([BANANA, ROCKET])] == [
        "red banana",
        "green banana",
        "blue banana",
        "purple banana",
    ]
    seen = _sticker("banana", (250, 220, 30), "green fruit")
    assert "green banana" not in [c.caption for c in colour_compositions([seen])]


@pytest.mark.parametrize("hue", [0, 120, 220])
def test_recoloured_image_has_the_hue_and_keeps_its_white(hue: int) -> None:
    image = recoloured(BANANA.pixels_HWC, hue)
    # 8-bit hues are 1.4 degrees apart.
    assert abs((dominant_hue(image) - hue + 180) % 360 - 180) < 3
    assert (image[0, 0] == 255).all()


def test_copy_of_the_object_counts_as_object_and_the_right_colour_as_both() -> None:
    asked = colour_compositions([BANANA])
    trained = [BANANA, ROCKET]
    results = [BANANA, asked[1].sticker, asked[1].sticker, ROCKET]
    score = score_compositions(
        asked,
        kind="colour",
        trained=trained,
        features_PD=_features(trained),
        features=_features,
        results_BD=_features(results),
    )
    assert (score.count, score.object, score.both) == (4, 0.75, 0.25)
