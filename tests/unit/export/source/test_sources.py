"""From adapters to a bundle and back: what is recorded, what is hashed, and that verification loads it all again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

import fewstep
from fewstep.errors import ContractError, RecipeError
from fewstep.export import load
from fewstep.hashing import file_sha256
from tests.support import loras
from tests.support.bundles import built
from tests.support.command import Run, refused


def lora(path: Path, *, seed: int = 0) -> Path:
    unet = load(str(built("turbo").source)).pipeline.unet
    return loras.write(path, "kohya", loras.branches(unet, loras.UNET_MODULES, rank=2, alpha=1.0, seed=seed))


def tiny_decoder(folder: Path, *, latent_channels: int = 4, scaling_factor: float = 0.5) -> Path:
    torch.manual_seed(3)
    AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
    ).save_pretrained(folder)
    return folder


def overflowing_decoder(folder: Path) -> Path:
    vae = AutoencoderKL.from_pretrained(built("turbo").source / "vae")
    with torch.no_grad():
        vae.decoder.mid_block.resnets[0].conv1.weight.mul_(1e6)
    vae.save_pretrained(folder)
    return folder


def test_build_and_verify_with_everything(run: Run, tmp_path: Path) -> None:
    one, other = lora(tmp_path / "one.safetensors"), lora(tmp_path / "other.safetensors", seed=1)
    decoder, out = overflowing_decoder(tmp_path / "vae"), tmp_path / "bundle"
    small = ("--steps", "1", "--prompts", "1", "--seeds", "1")
    adapters = ("--lora", f"{one}=0.5", "--lora", other, "--decoder", decoder)
    status, stdout, stderr = run("build", built("turbo").source, *adapters, "--check-fp16", *small, "-o", out)
    assert status == 0, stderr
    assert "decoder.mid_block.resnets.0.conv1 reaches" in stdout
    manifest = fewstep.Bundle.open(out).manifest
    assert any("the largest fp16 number is 65504" in caveat for caveat in manifest.caveats)
    assert "65504" in (out / "report" / "index.html").read_text(encoding="utf-8")
    assert [(x.path, x.scale, x.sha256) for x in manifest.source.loras] == [
        (str(one), 0.5, file_sha256(one)),
        (str(other), 1.0, file_sha256(other)),
    ]
    assert manifest.source.decoder is not None
    assert manifest.source.decoder.path == str(decoder)

    status, stdout, stderr = run("verify", out, "--prompts", "1", "--seeds", "1", "--json")
    assert status == 0, stderr
    report = json.loads(stdout)
    assert report["passed"]
    assert "run now" in report["reference"]

    one.rename(tmp_path / "moved.safetensors")
    status, stdout, _ = run("verify", out, "--prompts", "1", "--seeds", "1", "--json")
    assert status == 0
    assert f"the LoRA {one} is not on this machine" in json.loads(stdout)["caveats"][0]
    moved = ("--lora", f"{tmp_path / 'moved.safetensors'}=0.5", "--lora", other)
    status, stdout, stderr = run("verify", out, *moved, "--prompts", "1", "--seeds", "1", "--json")
    assert status == 0, stderr
    assert "run now" in json.loads(stdout)["reference"]
    status, _, stderr = run("verify", out, "--lora", f"{tmp_path / 'moved.safetensors'}=0.6", "--lora", other)
    assert status == 2
    assert "moved.safetensors differs in scale" in " ".join(stderr.split())
    lora(one, seed=7)
    with pytest.raises(ContractError, match=r"one\.safetensors differs in content"):
        fewstep.verify(fewstep.Bundle.open(out))


def test_decoder_brings_its_own_contract(tmp_path: Path) -> None:
    folder = tiny_decoder(tmp_path / "taesd")
    options = fewstep.Options(prompts=1, seeds=1, profile=False, cache_root=built("turbo").options.cache_root)
    recipe = fewstep.Recipe("mine", decoder=str(folder), form="step")
    bundle = fewstep.build(str(built("turbo").source), recipe, out=tmp_path / "bundle", steps=[1], options=options)
    assert bundle.manifest.contract.latent_scale == 0.5
    assert built("turbo").bundle.manifest.contract.latent_scale == 0.18215
    index = json.loads((bundle.path / "onnxruntime" / "vae_decoder" / "config.json").read_text())
    assert index["_class_name"] == "AutoencoderTiny"
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["passed"]


def test_decoder_that_does_not_fit(run: Run, tmp_path: Path) -> None:
    source = built("turbo").source
    folder = tiny_decoder(tmp_path / "taesd3", latent_channels=16)
    text = refused(run, source, tmp_path, "--decoder", str(folder))
    assert "takes 16 latent channels, the generator's latents have 4" in text
    text = refused(run, source, tmp_path, "--decoder", str(tmp_path / "nothing"))
    assert "has no config.json that names its class, expected the folder of a diffusers autoencoder" in text
    text = refused(run, source, tmp_path, "--decoder", str(source / "unet"))
    assert "'UNet2DConditionModel' is not a decoder of diffusers" in text
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "has no weights" in refused(run, source, tmp_path, "--decoder", str(folder))


def test_lora_that_is_none(run: Run, tmp_path: Path) -> None:
    source, path = built("turbo").source, lora(tmp_path / "a.safetensors")
    text = refused(run, source, tmp_path, "--lora", f"{path}=much")
    assert "the scale 'much' is not a number, expected FILE or FILE=SCALE" in text
    assert "not a number" in refused(run, source, tmp_path, "--lora", f"{path}=nan")
    assert "LoRA gone.safetensors is not a file" in refused(run, source, tmp_path, "--lora", "gone.safetensors")
    shutil.copyfile(path, tmp_path / "a.bin")
    assert "a.bin is a pickle, expected safetensors" in refused(
        run, source, tmp_path, "--lora", str(tmp_path / "a.bin")
    )
    text = refused(
        run, built("lcm").source, tmp_path, "--lora", str(source / "vae" / "diffusion_pytorch_model.safetensors")
    )
    assert "keys fit no weight of this generator" in text
    path.write_bytes(path.read_bytes()[:-100])
    assert "bytes, expected" in refused(run, source, tmp_path, "--lora", str(path))
    text = refused(run, source, tmp_path, "--component", "unet")
    assert "component 'unet' is not NAME=FILE" in text
    assert "--config describes a single-file checkpoint" in refused(run, source, tmp_path, "--config", str(source))


def test_recipe_names_adapters_relative_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('loras = ["a.safetensors=0.5", "sub/b.safetensors"]\ndecoder = "taesd"\n')
    recipe = fewstep.load_recipe(str(path))
    assert recipe.loras == (
        fewstep.Lora(str(tmp_path / "a.safetensors"), 0.5),
        fewstep.Lora(str(tmp_path / "sub" / "b.safetensors")),
    )
    assert recipe.decoder == str(tmp_path / "taesd")
    given = fewstep.SourceSpec("x", loras=(fewstep.Lora("c"),)).otherwise(recipe.adapters)
    assert given == fewstep.SourceSpec("x", loras=(fewstep.Lora("c"),), decoder=recipe.decoder)
    for text, message in [
        ('loras = "a"', r"loras is 'a', expected a list"),
        ("loras = [1]", r"loras has 1, expected a path in quotes"),
        ('loras = ["a=b"]', r"mine\.toml: LoRA .* the scale 'b' is not a number"),
        ("decoder = 4", r"decoder has 4, expected a path in quotes"),
    ]:
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            fewstep.load_recipe(str(path))


def test_inspect_and_stages_take_adapters(run: Run, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors")
    status, stdout, stderr = run("inspect", built("turbo").source, "--lora", f"{path}=0.5", "--json")
    assert status == 0, stderr
    assert json.loads(stdout)["source"]["loras"] == [{"path": str(path), "scale": 0.5, "sha256": file_sha256(path)}]
    status, _, stderr = run("optimize", built("turbo").source, "--lora", path, "-o", tmp_path / "merged")
    assert status == 0, stderr
    spec = fewstep.SourceSpec(str(built("turbo").source), loras=(fewstep.Lora(str(path)),))
    merged, again = load(spec).pipeline.unet, load(str(tmp_path / "merged")).pipeline.unet
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), again.parameters(), strict=True))
    status, stdout, stderr = run(
        "calibrate", built("turbo").source, "--lora", path, "--steps", "1", "--prompts", "1", "--seeds", "1",
        "-o", tmp_path / "feeds",
    )  # fmt: skip
    assert status == 0, stderr
