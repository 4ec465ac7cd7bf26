"""The scale benchmark writes checkpoints that load, and the committed figures keep the limits."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.scale.checkpoint import write_checkpoint
from benchmarks.scale.networks import CASES, Component, tensors
from benchmarks.scale.table import exponents, markdown
from fewstep.export.generator import Part
from fewstep.export.weights import load_module
from tests.networks import network


def test_checkpoint_loads(tmp_path: Path) -> None:
    made = network("clip-projection")
    config = {
        key: value for key, value in made.module.config.to_dict().items() if key not in ("architectures", "dtype")
    }
    component = Component("transformers", "CLIPTextModelWithProjection", config, made.part, {})
    folder = write_checkpoint(component, tmp_path / "text_encoder_2")
    module = load_module(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["text_encoder_2"]
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in made.module.parameters())
    assert all(torch.isfinite(p).all() and p.std() > 0 for p in module.parameters())


def test_arguments_hold_tensors_without_values() -> None:
    arguments = tensors(CASES["sdxl"]["denoiser"].arguments)
    assert arguments["added_cond_kwargs"]["time_ids"].is_meta
    assert arguments["added_cond_kwargs"]["time_ids"].shape == (1, 6)
    assert arguments["return_dict"] is False
    assert CASES["sdxl"]["denoiser"].part == Part("unet", "forward", "unet")


def test_committed_figures_keep_the_limits(repository: Path) -> None:
    results = repository / "benchmarks" / "scale" / "results"
    figures = json.loads((results / "figures.json").read_text())
    assert markdown(figures) == (results / "README.md").read_text(encoding="utf-8")
    assert max(exponents(figures["compile"]).values()) <= 1.05
    sd15 = figures["compile"]["sd15"]
    largest = 2 * max(component["parameters"] for component in sd15.values())
    assert max(component["total_peak_bytes"] for component in sd15.values()) <= 1.3 * largest + (1 << 30)
