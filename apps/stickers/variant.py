"""What is trained: image size, autoencoder factor, and which images. ``STICKERS_VARIANT`` chooses; all scripts follow.

Latents have 16x16 positions in every variant, so that the denoiser's cost does not depend on it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fewstep.errors import SourceError

GRID = 16


@dataclass(frozen=True)
class Variant:
    """One way to train the generator."""

    size: int
    """Height and width of an image, in pixels."""
    latent_channels: int
    width: int
    """Channels of all stages of the autoencoder; the stage at full size decides what decoding costs."""
    styles: bool
    """Train on the sets of `sets` beside the font, with their styles in the captions."""

    @property
    def factor(self) -> int:
        """How many pixels one latent stands for, in each direction."""
        return self.size // GRID


VARIANTS = {
    "plain": Variant(size=64, latent_channels=4, width=48, styles=False),
    "styles": Variant(size=64, latent_channels=4, width=48, styles=True),
    # Twice the channels: a latent stands for four times as many pixels. The channels of the smallest that keeps the
    # decibels are for the autoencoder's trial to find.
    "large": Variant(size=128, latent_channels=8, width=32, styles=True),
}
"""`plain` is what the weights in the tree are."""


def variant() -> Variant:
    """Returns the chosen variant.

    Raises:
        SourceError: there is none of that name.
    """
    name = os.environ.get("STICKERS_VARIANT", "plain")
    if name not in VARIANTS:
        raise SourceError(f"STICKERS_VARIANT is {name!r}", hint=f"expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name]
