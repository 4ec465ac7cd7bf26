"""Every variant's networks fit together: latents of 16x16 positions, whatever the image size."""

from __future__ import annotations

import pytest
import torch

from fewstep.errors import SourceError
from fewstep.stickers.autoencoder import make_autoencoder
from fewstep.stickers.variant import GRID, VARIANTS, variant


@pytest.mark.parametrize("name", VARIANTS)
def test_autoencoder_of_a_variant_goes_there_and_back(name: str) -> None:
    chosen = VARIANTS[name]
    model = make_autoencoder(chosen)
    with torch.no_grad():
        z = model.encode(torch.zeros(1, 3, chosen.size, chosen.size)).latents
        assert z.shape == (1, chosen.latent_channels, GRID, GRID)
        assert model.decode(z).sample.shape == (1, 3, chosen.size, chosen.size)


def test_unknown_variant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STICKERS_VARIANT", "huge")
    with pytest.raises(SourceError, match="STICKERS_VARIANT is 'huge'"):
        variant()
    monkeypatch.setenv("STICKERS_VARIANT", "large")
    assert variant().factor == 8
