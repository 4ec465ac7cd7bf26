"""Generators whose weights stay in their files build as others do, and compile without ever holding a network."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.errors import SourceError
from fewstep.export import describe, load
from fewstep.numerics.metrics import psnr_db
from fewstep.pipeline import stages
from fewstep.progress import Silent
from tests.support.bundles import built


@pytest.fixture
def everything_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    # `fewstep.export.source.load` is the function: the module has to be asked for by name.
    monkeypatch.setattr(importlib.import_module("fewstep.export.source.load"), "STORED_BYTES", 0)


def test_a_stored_generator_is_described_as_a_loaded_one(everything_stored: None) -> None:
    stored, loaded = load(str(built("lcm").source)), load(str(built("lcm").source), eager=True)
    assert stored.stored is not None and loaded.stored is None
    assert all(p.is_meta for part in stored.parts for p in stored.module(part).parameters())
    one, other = describe(stored, [1, 2]), describe(loaded, [1, 2])
    assert one.components == other.components
    assert one.schedules == other.schedules
    assert one.contract == other.contract


def test_compiling_loads_no_network(everything_stored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr("fewstep.export.source.offloaded_networks.load_module", refuse)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    paths = stages.compile(
        str(built("lcm").source),
        tmp_path / "out",
        targets=["onnxruntime"],
        recipe="fp16",
        steps=[2],
        guidance=None,
        progress=Silent(),
    )
    assert len(paths) == 4 and all(path.is_file() for path in paths)


@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
def test_a_stored_generator_builds(everything_stored: None, tmp_path: Path, recipe: str) -> None:
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    bundle = fewstep.build(str(built("turbo").source), recipe, out=tmp_path / "bundle", steps=[2], options=options)
    assert bundle.manifest.parity is not None and bundle.manifest.parity["passed"]
    if recipe == "fp32":
        picture = built("turbo").bundle.generate("a cat", seed=3, steps=2).output
        assert psnr_db(picture, bundle.generate("a cat", seed=3, steps=2).output) >= 80


def test_two_networks_are_held_at_most(everything_stored: None) -> None:
    generator = load(str(built("lcm").source))
    assert generator.stored is not None
    for name in ("text_encoder", "unet", "vae"):
        module = generator.stored.module(name, getattr(generator.pipeline, name))
        assert not any(p.is_meta for p in module.parameters())
    assert list(generator.stored._loaded) == ["unet", "vae"]
    again = generator.stored.module("unet", generator.pipeline.unet)
    assert torch.equal(again.conv_in.weight, load(str(built("lcm").source), eager=True).pipeline.unet.conv_in.weight)


def test_a_weight_beyond_fp16_is_named(everything_stored: None, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(built("lcm").source, tmp_path / "source"))
    path = source / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"] = weights["conv_in.bias"] + 1e5
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(fewstep.FewstepError, match=r"denoiser: conv_in.bias has values up to 1e\+05") as caught:
        fewstep.build(str(source), "fp16", out=tmp_path / "bundle", steps=[1])
    assert not isinstance(caught.value, SourceError)
    assert not (tmp_path / "bundle").exists()
