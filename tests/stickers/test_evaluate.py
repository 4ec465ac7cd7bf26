"""The figures of the model card are what they are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.stickers.evaluate import draw, frechet_distance, save_grid


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
