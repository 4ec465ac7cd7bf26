"""The scale benchmark writes checkpoints that load, and the committed figures keep the limits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from benchmarks.scale import plan, tiles
from benchmarks.scale.checkpoint import write_checkpoint
from benchmarks.scale.networks import CASES, FLUX, Component, tensors
from benchmarks.scale.planned import Sizes, write_config
from benchmarks.scale.table import exponents, markdown
from fewstep.export.generator import Part
from fewstep.export.source.lazy_weights import load_module, meta_module
from fewstep.export.source.tiled_decoder import tiles_of, with_tiling
from tests.support.networks import network


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


def test_sizes_count_parameters() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.LayerNorm(10))
    module[0].bias.requires_grad_(False)
    sizes = Sizes.of(module)
    assert sizes.parameters == 64 * 10 + 10 + 20
    assert sizes.fp16 == 2 * 670
    assert sizes.int8 == 640 + 2 * 10 + 2 * 30  # a byte each, a scale for each output channel, vectors in fp16
    assert sizes.int4 == 320 + 2 * 20 + 2 * 30  # half a byte each, a scale for 32 of them
    assert sizes.largest_fp16 == 2 * 640


def test_the_plan_is_of_the_published_network(tmp_path: Path) -> None:
    module = meta_module(write_config(FLUX["denoiser"], tmp_path))
    assert all(parameter.is_meta for parameter in module.parameters())
    # "12 billion parameters", as its authors say.
    assert round(Sizes.of(module).parameters / 1e9) == 12


def test_committed_pages_are_of_the_committed_figures(repository: Path) -> None:
    results = repository / "benchmarks" / "scale" / "results"
    figures = json.loads((results / "figures.json").read_text())
    flux = json.loads((results / "flux.json").read_text())
    assert plan.page(flux, figures["compile"]) == (results / "flux.md").read_text(encoding="utf-8")
    files = figures["shapes"]["files"]
    assert sum(files.values()) <= 1.02 * (files["model.onnx"] + files["model.onnx.data"])
    tiled, whole = (figures["tiles"][f"512x512, {how}"]["decode"] for how in ("tiles of 256", "whole"))
    assert tiled["peak_bytes"] - tiled["before_bytes"] < whole["peak_bytes"] - whole["before_bytes"]


def test_tiles_of_the_benchmark_are_those_of_the_compiler() -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    decoder = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, **blocks)
    assert tiles.tiles_of(256) == tiles_of(with_tiling(decoder, 256))
