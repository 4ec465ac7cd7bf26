"""What does not belong to a generator or to its bundle is refused, and nothing is drawn with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

import fewstep
from fewstep.bundle.bundle import write_seal
from fewstep.bundle.source import SourceSpec
from fewstep.errors import BundleError, ContractError, SourceError
from fewstep.export import load
from fewstep.runtimes.sampling.sampler import open_sampler
from tests.support import loras, tiny
from tests.support.bundles import plain_generator
from tests.support.command import Run, refused


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> fewstep.Bundle:
    """Returns a bundle whose network takes the time itself."""
    folder = tmp_path_factory.mktemp("timed")
    options = fewstep.Options(prompts=1, seeds=1, cache_root=folder / "cache", profile=False)
    return fewstep.build(plain_generator(), out=folder / "bundle", form="step", options=options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Returns a tiny checkpoint to spoil."""
    return tiny.turbo_folder(tmp_path / "source")


def changed(bundle: fewstep.Bundle, folder: Path, change: Callable[[Any], None]) -> fewstep.Bundle:
    """Returns a copy of a bundle with another manifest."""
    copy = shutil.copytree(bundle.path, folder / "changed")
    values = json.loads((copy / "manifest.json").read_text())
    change(values)
    (copy / "manifest.json").write_text(json.dumps(values))
    write_seal(copy)
    return fewstep.Bundle.open(copy)


def test_timesteps_of_another_dtype(timed: fewstep.Bundle, tmp_path: Path) -> None:
    def to_integers(values: Any) -> None:
        (time,) = (spec for spec in values["components"]["denoiser"]["inputs"] if spec["name"] == "t")
        time["dtype"] = "int64"

    with pytest.raises(BundleError, match=r"feeds/0/in/t is float32 \[1\], the manifest says int64 \[1\]") as caught:
        changed(timed, tmp_path, to_integers)
    assert caught.value.hint
    sampler = open_sampler(timed)
    spec = timed.manifest.components["denoiser"]
    feeds = {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in spec.inputs}
    with pytest.raises(ContractError, match=r"denoiser: t is float64 \[1\], expected float32 \[1\]"):
        sampler.session("denoiser").run({**feeds, "t": np.array([0.5])})
    sampler.close()


def test_timesteps_of_another_scale(timed: fewstep.Bundle, tmp_path: Path) -> None:
    def to_thousands(values: Any) -> None:
        for schedule in values["schedules"].values():
            schedule["timesteps"] = [1000 * t for t in schedule["timesteps"]]

    assert fewstep.verify(timed).report
    report = fewstep.verify(changed(timed, tmp_path, to_thousands)).report
    # Each network call is right on its own inputs; it is the inputs that are wrong.
    assert not report
    assert {check.level for check in report.failures} == {"manifest", "host", "trajectory", "picture"}


def test_a_lora_for_a_wider_network(source: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    wider = UNet2DConditionModel.from_config({**tiny.unet().config, "block_out_channels": (32, 64)})
    path = loras.write(
        tmp_path / "wide.safetensors", "kohya", loras.branches(wider, loras.UNET_MODULES, rank=2, alpha=2.0, seed=0)
    )
    with pytest.raises(SourceError, match=r"the factors for unet\.\S+ are \[.*\], expected a product") as caught:
        load(SourceSpec(str(source), loras=(fewstep.Lora(str(path)),)))
    assert caught.value.hint


def test_a_lora_for_another_kind_of_network(run: Run, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    name = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}, path)
    text = refused(run, source, tmp_path, "--lora", str(path))
    assert "2 of 2 keys fit no weight of this generator, first transformer.single_transformer_blocks.0" in text


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer", "vae", "scheduler"])
def test_a_component_that_is_left_out(run: Run, source: Path, tmp_path: Path, missing: str) -> None:
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, missing: [None, None]}))
    text = refused(run, source, tmp_path)
    assert f"StableDiffusionPipeline has no {missing}, expected all of: vae, text_encoder" in text
    assert f"hint: {missing} must be in model_index.json, with its folder" in text


def test_a_text_encoder_whose_folder_is_gone(run: Run, source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "text_encoder")
    assert "component text_encoder (CLIPTextModel) is missing, expected folder text_encoder/" in refused(
        run, source, tmp_path
    )
