"""LoRA files: every naming merges into the weights that explicit low-rank branches compute, and nothing is dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.errors import SourceError
from fewstep.export import load
from fewstep.export.generator import Generator
from fewstep.numerics.metrics import sqnr_db
from tests.support import loras
from tests.support.bundles import built


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load(str(built("turbo").source))


def unet_branches(generator: Generator, *, seed: int = 0, rank: int = 3, alpha: float = 2.0) -> dict[str, loras.Branch]:
    return loras.branches(generator.pipeline.unet, loras.UNET_MODULES, rank=rank, alpha=alpha, seed=seed)


def text_branches(generator: Generator) -> dict[str, loras.Branch]:
    return loras.branches(generator.pipeline.text_encoder, loras.TEXT_MODULES, rank=2, alpha=1.0, seed=9)


@torch.no_grad()
def denoise(generator: Generator) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    x, conditions = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 16, 32, generator=random)
    return generator.pipeline.unet(x, torch.tensor([500.0]), conditions).sample


@torch.no_grad()
def encode(generator: Generator) -> torch.Tensor:
    return generator.pipeline.text_encoder(torch.arange(16)[None] + 40).last_hidden_state


def merged(*given: fewstep.Lora) -> Generator:
    return load(fewstep.SourceSpec(str(built("turbo").source), loras=given))


@pytest.mark.parametrize("style", ["header", "bare", "diffusers", "processor", "kohya", "ldm"])
def test_merged_weights_compute_what_branches_compute(generator: Generator, tmp_path: Path, style: str) -> None:
    unet, text = unet_branches(generator), text_branches(generator)
    path = loras.write(tmp_path / "lora.safetensors", style, unet, text)
    plain_picture, plain_text = denoise(generator), encode(generator)
    with loras.beside(generator.pipeline.unet, unet, 0.7), loras.beside(generator.pipeline.text_encoder, text, 0.7):
        expected_picture, expected_text = denoise(generator), encode(generator)
    other = merged(fewstep.Lora(str(path), 0.7))
    # Float32 sums in another order; what the LoRA changes is as large as the signal.
    assert sqnr_db(expected_picture.numpy(), denoise(other).numpy()) >= 110
    assert sqnr_db(expected_text.numpy(), encode(other).numpy()) >= 110
    assert sqnr_db(expected_picture.numpy(), plain_picture.numpy()) < 20
    assert sqnr_db(expected_text.numpy(), plain_text.numpy()) < 20
    assert torch.equal(denoise(generator), plain_picture), "merging edited the generator that it was given"


def test_peft_keeps_alpha_in_a_file_beside(generator: Generator, tmp_path: Path) -> None:
    unet = unet_branches(generator)
    path = loras.write(tmp_path / "adapter_model.safetensors", "peft", unet)
    with loras.beside(generator.pipeline.unet, unet, 1.0):
        expected = denoise(generator)
    one = merged(fewstep.Lora(str(path)))
    assert sqnr_db(expected.numpy(), denoise(one).numpy()) >= 110
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 7}))
    assert merged(fewstep.Lora(str(path))).source.sha256 != one.source.sha256
    config.unlink()
    with pytest.raises(SourceError, match=r"saved by PEFT, which keeps alpha in adapter_config\.json; expected it in"):
        merged(fewstep.Lora(str(path)))


def test_several_loras_add_up_in_any_order_with_one_rounding(generator: Generator, tmp_path: Path) -> None:
    first, second = unet_branches(generator, seed=1), unet_branches(generator, seed=2, rank=5, alpha=5.0)
    given = (
        fewstep.Lora(str(loras.write(tmp_path / "a.safetensors", "kohya", first)), 0.5),
        fewstep.Lora(str(loras.write(tmp_path / "b.safetensors", "bare", second)), -0.25),
    )
    one, other = merged(*given), merged(*reversed(given))
    for name in loras.UNET_MODULES:
        weight = generator.pipeline.unet.get_submodule(name).weight.detach().double()
        for branch, scale in ((first[name], 0.5), (second[name], -0.25)):
            delta = branch.up.double().flatten(1) @ branch.down.double().flatten(1)
            weight = weight + scale * branch.scale * delta.reshape(weight.shape)
        assert torch.equal(one.pipeline.unet.get_submodule(name).weight, weight.float())
    # Another order of two float64 sums may turn a tie of the one rounding.
    assert torch.allclose(denoise(one), denoise(other), rtol=1e-5, atol=1e-6)
    assert one.source.sha256 != other.source.sha256


def test_untouched_weights_are_shared_and_others_are_not(generator: Generator, tmp_path: Path) -> None:
    from fewstep.export.source.lora import merge_loras

    name = "mid_block.resnets.1.conv2"
    path = loras.write(tmp_path / "a.safetensors", "header", {name: unet_branches(generator)[name]})
    other = merge_loras(generator, [fewstep.Lora(str(path))])
    assert other.pipeline.text_encoder is generator.pipeline.text_encoder
    assert other.pipeline.unet.conv_in.weight is generator.pipeline.unet.conv_in.weight
    assert other.pipeline.unet.get_submodule(name).weight is not generator.pipeline.unet.get_submodule(name).weight


def test_a_linear_lora_fits_a_convolution_of_1x1(generator: Generator, tmp_path: Path) -> None:
    name = "down_blocks.1.attentions.0.proj_in"
    branch = unet_branches(generator)[name]
    assert branch.down.ndim == 4
    flat = loras.Branch(branch.down.flatten(1), branch.up.flatten(1), branch.alpha)
    one = merged(fewstep.Lora(str(loras.write(tmp_path / "a.safetensors", "kohya", {name: branch}))))
    other = merged(fewstep.Lora(str(loras.write(tmp_path / "b.safetensors", "kohya", {name: flat}))))
    assert torch.equal(denoise(one), denoise(other))
    assert not torch.equal(denoise(one), denoise(generator))


def test_hash_covers_content_and_scale(generator: Generator, tmp_path: Path) -> None:
    path = loras.write(tmp_path / "a.safetensors", "header", unet_branches(generator))
    hashes = {generator.source.sha256, *(merged(fewstep.Lora(str(path), s)).source.sha256 for s in (1.0, 0.5))}
    loras.write(path, "header", unet_branches(generator, seed=5))
    hashes.add(merged(fewstep.Lora(str(path))).source.sha256)
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [("a.safetensors", "a.safetensors", 1.0), ("a=b.safetensors=0.5", "a=b.safetensors", 0.5), ("a=-1e-1", "a", -0.1)],
)
def test_file_and_scale(text: str, path: str, scale: float) -> None:
    assert fewstep.Lora.of(text) == fewstep.Lora(path, scale)


def test_existing_file_with_an_equals_sign(tmp_path: Path) -> None:
    path = tmp_path / "rank=4"
    path.touch()
    assert fewstep.Lora.of(str(path)) == fewstep.Lora(str(path))


def spoiled(generator: Generator, tmp_path: Path, change: dict[str, torch.Tensor | None]) -> str:
    """Merges a LoRA with some of its tensors changed or taken away, expects a SourceError and returns its text."""
    path = loras.write(tmp_path / "a.safetensors", "kohya", unet_branches(generator))
    tensors = {**load_file(path), **change}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(SourceError) as caught:
        merged(fewstep.Lora(str(path)))
    assert caught.value.hint
    return str(caught.value)


def test_every_key_must_find_its_weight(generator: Generator, tmp_path: Path) -> None:
    text = spoiled(generator, tmp_path, {"lora_unet_conv_inn.lora_up.weight": torch.zeros(2, 2)})
    assert (
        "1 of 52 keys fit no weight of this generator, first lora_unet_conv_inn.lora_up.weight; expected keys" in text
    )
    assert "unet (UNet2DConditionModel)" in text
    text = spoiled(generator, tmp_path, {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)})
    assert "1 of 52 keys fit no weight" in text


def test_wrong_shapes(generator: Generator, tmp_path: Path) -> None:
    text = spoiled(generator, tmp_path, {"lora_unet_conv_out.lora_up.weight": torch.zeros(5, 3, 1, 1)})
    assert "the factors for unet.conv_out are [5, 3, 1, 1] and [3, 16, 3, 3], expected a product" in text
    assert "fits its weight [4, 16, 3, 3]" in text


def test_half_a_pair(generator: Generator, tmp_path: Path) -> None:
    text = spoiled(generator, tmp_path, {"lora_unet_conv_out.lora_up.weight": None})
    assert "has down without up, expected both" in text
    text = spoiled(generator, tmp_path, {f"lora_unet_conv_out.lora_{side}.weight": None for side in ("up", "down")})
    assert "lora_unet_conv_out.alpha has alpha without down and up" in text


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_conv_in.dora_scale", "DoRA"),
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lokr_w1", "LoKr"),
        ("lora_unet_conv_in.lora_mid.weight", "LoCon with a Tucker core"),
        ("lora_unet_conv_in.diff", "a difference of whole weights"),
    ],
)
def test_other_adapters_are_refused_by_name(generator: Generator, tmp_path: Path, key: str, kind: str) -> None:
    text = spoiled(generator, tmp_path, {key: torch.zeros(1, 1)})
    assert f"{key} belongs to {kind}, expected LoRA matrices" in text


def test_rank_stabilized_lora_of_the_header(generator: Generator, tmp_path: Path) -> None:
    branch = unet_branches(generator, rank=4)["conv_in"]
    path = tmp_path / "a.safetensors"
    config = {"unet.lora_alpha": 8, "unet.use_rslora": True, "unet.alpha_pattern": {"conv_in": 6}}
    save_file(
        {"unet.conv_in.lora_A.weight": branch.down, "unet.conv_in.lora_B.weight": branch.up},
        path,
        metadata={"lora_adapter_metadata": json.dumps(config)},
    )
    delta = (branch.up.double().flatten(1) @ branch.down.double().flatten(1)).reshape(16, 4, 3, 3)
    expected = (generator.pipeline.unet.conv_in.weight.double() + 6 / 4**0.5 * delta).float()
    assert torch.equal(merged(fewstep.Lora(str(path))).pipeline.unet.conv_in.weight, expected)
