"""The figures of the model card are what they are called."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.stickers import evaluate
from fewstep.stickers.autoencoder import as_tensor, make_autoencoder
from fewstep.stickers.compositions import Composition
from fewstep.stickers.data import Sticker
from fewstep.stickers.evaluate import Gallery, draw, frechet_distance, save_grid
from fewstep.stickers.sets import FONT_STYLES, StyledSticker
from fewstep.stickers.variant import VARIANTS


def test_frechet_distance_of_a_sample_to_itself_is_zero() -> None:
    sample = np.random.default_rng(0).normal(size=(50, 8))
    assert frechet_distance(sample, sample) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_a_shifted_and_stretched_sample() -> None:
    sample = np.random.default_rng(0).normal(size=(500, 3))
    other = 2 * sample + [1.0, 0.0, 0.0]
    gap = other.mean(axis=0) - sample.mean(axis=0)
    wanted = gap @ gap + np.trace(np.cov(sample, rowvar=False))  # (2 - 1)^2 times each variance
    assert frechet_distance(other, sample) == pytest.approx(wanted, rel=1e-10)


def test_frechet_distance_of_too_few_samples_is_finite() -> None:
    rng = np.random.default_rng(0)
    assert np.isfinite(frechet_distance(rng.normal(size=(4, 64)), rng.normal(size=(200, 64))))


def test_each_caption_has_its_own_seed_whatever_the_batch() -> None:
    def sampler(captions: list[str], seeds: list[int]) -> torch.Tensor:
        return torch.tensor(seeds, dtype=torch.float32).view(-1, 1, 1, 1)

    assert draw(sampler, ["x"] * 60).flatten().tolist() == list(range(1000, 1060))


def test_grid_has_a_row_for_each_caption_and_a_column_for_each_sampler(tmp_path: Path) -> None:
    black, white = torch.full((2, 3, 64, 64), -1.0), torch.full((2, 3, 64, 64), 1.0)
    save_grid(tmp_path / "grid.png", ["one", "two"], {"black": black, "white": white})
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (18 + 2 * 68, 190 + 2 * 68, 3)
    assert not pixels[18:82, 190:254].any()
    assert (pixels[86:150, 258:322] == 255).all()


def _sticker(name: str, seed: int) -> Sticker:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return Sticker("", name, (), "group", f"subgroup {seed % 2}", pixels)


def _gallery() -> Gallery:
    """Returns eight images of the font and, after each, one of another style."""
    torch.manual_seed(0)
    images = []
    for i in range(8):
        images.append(StyledSticker(_sticker(f"name {i}", i), FONT_STYLES, "OFL-1.1", held_out=False))
        images.append(StyledSticker(_sticker(f"name {i}", i + 100), ("flat",), "MIT", held_out=False))
    return Gallery(images, make_autoencoder(VARIANTS["plain"]).eval())


def test_captions_are_names_of_the_fonts_images_whatever_other_sets_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "CAPTION_COUNT", 5)
    gallery = _gallery()
    chosen = evaluate.fixed_captions(gallery.plain, 5)
    assert len(set(chosen)) == 5
    assert all(i % 2 == 0 for i in chosen)
    # The same names as without the other sets.
    assert [i // 2 for i in chosen] == evaluate.fixed_captions(range(8), 5)


def test_report_of_a_sampler_that_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = _gallery()
    images = {gallery.stickers[i].name: gallery.pixels[i] for i in gallery.plain}
    right = _sticker("name 1", 500)
    asked = [Composition("blue name 1", "name 1", "blue", right), Composition("red name 2", "name 2", "red", right)]
    images |= {"blue name 1": as_tensor([right])[0], "red name 2": images["name 2"]}

    def copies(captions: list[str], seeds: list[int]) -> torch.Tensor:
        return torch.stack([images.get(text, images["name 0"]) for text in captions])

    monkeypatch.setattr(evaluate, "CAPTION_COUNT", 4)
    monkeypatch.setattr(evaluate, "compositions", lambda: {"colour": asked[:1], "style": asked[1:]})
    scores = evaluate.evaluate({("student", 4): copies}, gallery, tmp_path, limit=4, guidance=3.0)
    assert [(s.sampler, s.own, s.subgroup) for s in scores[1:]] == [("student", 1.0, 1.0)]
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(c["kind"], c["object"], c["both"]) for c in report["compositions"]] == [("colour", 1, 1), ("style", 1, 0)]
    psnr_db = 10 * math.log10(
        4 / (gallery.reconstruct(p := gallery.pixels[evaluate.fixed_captions(gallery.plain, 4)]) - p).square().mean()
    )
    assert report["reconstruction_psnr_db"] == pytest.approx(psnr_db, abs=1e-3)
