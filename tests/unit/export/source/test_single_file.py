"""Single-file checkpoints and files for one component: the same network as the folder, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fewstep
from fewstep.errors import SourceError
from fewstep.export import load
from fewstep.export.generator import Generator
from tests.support import tiny
from tests.support.bundles import built
from tests.support.original import vae_weights, write_single_file


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load(str(built("turbo").source))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A diffusers folder without weights."""
    return shutil.copytree(built("turbo").source, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))


def same(one: Generator, other: Generator) -> bool:
    for name in ("unet", "vae", "text_encoder"):
        weights, expected = (getattr(g.pipeline, name).state_dict() for g in (one, other))
        if set(weights) != set(expected) or not all(torch.equal(weights[k], expected[k]) for k in expected):
            return False
    return True


def test_same_networks_as_the_folder(generator: Generator, config: Path, tmp_path: Path) -> None:
    path = write_single_file(generator.pipeline, tmp_path / "model.safetensors")
    loaded = load(fewstep.SourceSpec(str(path), config=str(config)))
    assert same(loaded, generator)
    assert loaded.name == "model"
    assert loaded.source.kind == "single-file"
    assert loaded.source.spec() == fewstep.SourceSpec(str(path), config=str(config), kind="single-file")
    (config / "scheduler" / "scheduler_config.json").write_text(
        (config / "scheduler" / "scheduler_config.json").read_text().replace("trailing", "linspace")
    )
    assert load(loaded.source.spec()).source.sha256 != loaded.source.sha256


def refused(spec: fewstep.SourceSpec) -> str:
    with pytest.raises(SourceError) as caught:
        load(spec)
    assert caught.value.hint
    return str(caught.value)


def test_without_a_configuration(generator: Generator, tmp_path: Path) -> None:
    path = write_single_file(generator.pipeline, tmp_path / "model.safetensors")
    text = refused(fewstep.SourceSpec(str(path)))
    assert "is a single-file checkpoint: it holds weights alone, expected --config FOLDER beside it" in text
    assert "its model_index.json, tokenizer/, scheduler/ and the components' config.json are needed" in text


def test_configuration_of_something_else(config: Path) -> None:
    assert "source 'stickers' is not a .safetensors file" in refused(fewstep.SourceSpec("stickers", config=str(config)))


@pytest.mark.parametrize("without", ["cond_stage_model", "first_stage_model", "model.diffusion_model"])
def test_a_component_is_not_in_the_file(generator: Generator, config: Path, tmp_path: Path, without: str) -> None:
    path = write_single_file(generator.pipeline, tmp_path / "model.safetensors", without=without)
    text = refused(fewstep.SourceSpec(str(path), config=str(config)))
    assert "model.safetensors: diffusers cannot load it as" in text
    assert "Weights for this component appear to be missing in the checkpoint" in text


@pytest.mark.parametrize(
    "without",
    [
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
        "first_stage_model.decoder.conv_out.weight",
        "model.diffusion_model.out.2.weight",
        "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight",
    ],
)
def test_a_tensor_is_not_in_the_file(generator: Generator, config: Path, tmp_path: Path, without: str) -> None:
    path = write_single_file(generator.pipeline, tmp_path / "model.safetensors", without=without)
    assert "model.safetensors" in refused(fewstep.SourceSpec(str(path), config=str(config)))


def test_file_of_another_model(generator: Generator, config: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    text = refused(fewstep.SourceSpec(str(tmp_path / "model.safetensors"), config=str(config)))
    assert "diffusers cannot load it as" in text


def test_pickled_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "model.ckpt is a pickle, expected safetensors" in refused(fewstep.SourceSpec(str(tmp_path / "model.ckpt")))
    text = refused(fewstep.SourceSpec(str(tmp_path / "gone.safetensors")))
    assert "gone.safetensors is not a file, expected a safetensors file" in text


@pytest.mark.parametrize("original", [False, True])
def test_one_component_from_its_own_file(tmp_path: Path, original: bool) -> None:
    other = load(str(tiny.turbo_folder(tmp_path / "other", seed=1)))
    path = tmp_path / "vae.safetensors"
    weights = vae_weights(other.pipeline.vae) if original else other.pipeline.vae.state_dict()
    save_file({k: v.half().contiguous() for k, v in weights.items()}, path)
    spec = fewstep.SourceSpec(str(built("turbo").source), replacements=(fewstep.Replacement("vae", str(path)),))
    loaded = load(spec)
    assert loaded.pipeline.vae.decoder.conv_in.weight.dtype == torch.float32
    for key, weight in other.pipeline.vae.state_dict().items():
        assert torch.equal(loaded.pipeline.vae.state_dict()[key], weight.half().float()), key
    assert loaded.source.components["vae"].path == str(path)
    assert loaded.source.sha256 != load(str(built("turbo").source)).source.sha256


def test_component_that_does_not_fit(generator: Generator, tmp_path: Path) -> None:
    def attempt(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
        weights = {k: v.clone() for k, v in generator.pipeline.unet.state_dict().items()}
        change(weights)
        save_file(weights, tmp_path / "unet.safetensors")
        replaced = fewstep.Replacement(name, str(tmp_path / "unet.safetensors"))
        return refused(fewstep.SourceSpec(str(built("turbo").source), replacements=(replaced,)))

    text = attempt("unet", lambda w: w.update({"extra.weight": torch.zeros(1)}))
    assert "component unet: " in text
    assert "does not hold the weights of UNet2DConditionModel: it has 1 others, first extra.weight" in text
    text = attempt("unet", lambda w: w.__delitem__("conv_out.weight"))
    assert "lacks 1 tensors, first conv_out.weight" in text
    text = attempt("unet", lambda w: w.update({"conv_in.bias": torch.zeros(3)}))
    assert "it has conv_in.bias [3], expected [16]" in text
    text = attempt("prior", lambda w: None)
    assert "StableDiffusionPipeline has no component 'prior', expected one of vae, text_encoder, unet" in text


def test_component_is_not_name_and_file() -> None:
    with pytest.raises(SourceError, match="component 'unet' is not NAME=FILE"):
        fewstep.Replacement.parse("unet")
    one = fewstep.Replacement("unet", "a.safetensors")
    with pytest.raises(SourceError, match="component 'unet' is given twice, expected one file for it"):
        fewstep.SourceSpec("x", replacements=(one, one))
