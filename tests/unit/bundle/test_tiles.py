"""Decoding in overlapping tiles: diffusers' own tiling is the reference."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

import fewstep
from fewstep.bundle.contract import DECODER
from fewstep.bundle.tiles import Tiles, decode_tiles
from fewstep.errors import RecipeError, SourceError
from fewstep.export.source.tiled_decoder import tiles_of, with_tiling
from fewstep.recipe.recipe import parse_recipe
from tests.support import zoo
from tests.support.bundles import built
from tests.support.families import generator_of


def decoder(levels: int = 2) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


@pytest.mark.parametrize("size", [(8, 8), (24, 17), (9, 31), (16, 4), (5, 7)], ids=str)
@pytest.mark.parametrize("levels", [2, 3])
def test_as_diffusers_decodes(size: tuple[int, int], levels: int) -> None:
    plain = decoder(levels)
    tiled = with_tiling(plain, 8 * 2 ** (levels - 1))
    tiles = tiles_of(tiled)
    assert tiles is not None
    latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
    called = []

    def decode(tile: np.ndarray) -> np.ndarray:
        called.append(tile.shape[2:])
        return plain.decode(torch.from_numpy(tile)).sample.numpy()

    with torch.no_grad():
        expected = tiled.decode(latent).sample.numpy()
        found = decode_tiles(tiles, latent.numpy(), decode)
    assert found.dtype == np.float32
    # The same additions in the same order; only how kernels sum may differ.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert sorted(set(called), reverse=True) == tiles.shapes(*size)
    assert called == sorted(called, reverse=True), "tiles of one size follow each other"
    assert not plain.use_tiling


def test_a_picture_without_seams_is_put_together_exactly() -> None:
    latent = np.random.default_rng(0).standard_normal((1, 3, 19, 26)).astype(np.float32)
    tiles = Tiles(size=8, stride=6, scale=2, blend=4, keep=12)
    found = decode_tiles(tiles, latent, lambda tile: tile.repeat(2, axis=2).repeat(2, axis=3))
    # A share of a value and the rest of it make the value but for one rounding of each product and their sum.
    np.testing.assert_allclose(found, latent.repeat(2, axis=2).repeat(2, axis=3), rtol=3e-7, atol=0)


def test_a_bundle_decodes_in_tiles(tmp_path: Path) -> None:
    turbo = built("turbo")
    options = fewstep.Options(prompts=1, seeds=1, cache_root=turbo.options.cache_root, profile=False)
    out = tmp_path / "bundle"
    bundle = fewstep.build(str(turbo.source), out=out, steps=[1], shape="16x24,16x16", decoder_tile=16, options=options)
    spec = bundle.manifest.components[DECODER]
    assert spec.tiles == Tiles(size=8, stride=6, scale=2, blend=4, keep=12)
    # 8 x 12 elements make tiles of 8 and 6 across; 2 more of the rows that come after the first stride.
    names = {p.name for p in (out / "onnxruntime" / "vae_decoder").glob("*.onnx")}
    assert names == {"model.onnx", "model-tile-8x6.onnx", "model-tile-2x8.onnx", "model-tile-2x6.onnx"}
    parity = bundle.manifest.parity
    assert parity is not None and parity["passed"]
    assert parity["worst"]["lowering.component"]["value"] >= 100
    opened = fewstep.Bundle.open(out)
    tiled, whole = opened.shaped("16x16").generate("cat", seed=1), turbo.bundle.generate("cat", seed=1, steps=1)
    # A latent that fits in a tile is decoded as ever.
    np.testing.assert_allclose(tiled.output, whole.output, rtol=0, atol=1e-6)
    assert opened.generate("cat", seed=1).output.shape == (16, 24, 3)
    assert fewstep.verify(opened, prompts=1, seeds=1).report
    # A limit that no arithmetic keeps: the first value that is not the same is found in the first tile's graph.
    limits = {**opened.manifest.recipe["limits"], "component_sqnr_db": 500.0}
    strict = replace(opened, manifest=replace(opened.manifest, recipe={**opened.manifest.recipe, "limits": limits}))
    departure = fewstep.verify(strict, prompts=1, seeds=1, bisect=True).departures[DECODER]
    assert departure is not None and departure.module_path


@pytest.mark.slow
def test_packed_latents_are_unpacked_before_they_are_cut(tmp_path: Path) -> None:
    family = next(family for family in zoo.FAMILIES if family.name == "flux-schnell")
    generator = replace(generator_of(family, tmp_path / "source"), steps=(1,), default_steps=1)
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    manifest = fewstep.build(generator, out=tmp_path / "bundle", decoder_tile=8, options=options).manifest
    assert list(manifest.components)[-2:] == ["decoder_input", DECODER]
    assert manifest.components[DECODER].bindings == {"latent_sample": "decoder_input.latent_sample"}
    assert manifest.parity is not None and manifest.parity["worst"]["lowering.component"]["value"] >= 100


@pytest.mark.slow
def test_weights_in_files_are_shared_and_tiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fewstep.export.source.load"), "STORED_BYTES", 0)
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    out = tmp_path / "bundle"
    bundle = fewstep.build(
        str(built("turbo").source), "fp16", out=out, steps=[1], shape="16x24,16x16", decoder_tile=16, options=options
    )
    assert bundle.manifest.parity is not None and bundle.manifest.parity["passed"]
    sizes = {p.name: p.stat().st_size for p in (out / "onnxruntime" / "unet").glob("model*")}
    assert sizes.keys() == {"model.onnx", "model-16x16.onnx", "model.onnx.data"}
    weights = sum(p.numel() for p in AutoencoderKL.from_pretrained(built("turbo").source / "vae").decoder.parameters())
    held = (out / "onnxruntime" / "vae_decoder" / "model.onnx.data").stat().st_size
    assert held < 2.2 * weights, "once, as halves"


@pytest.mark.parametrize("tile", [12, 4], ids=["no multiple", "too small"])
def test_tiles_that_cannot_be_made(tile: int) -> None:
    with pytest.raises(SourceError, match=f"decoder_tile is {tile}, expected a multiple of 8 from 32 on"):
        with_tiling(decoder(levels=4), tile)


def test_decoders_that_tile_in_another_way() -> None:
    with pytest.raises(SourceError, match="AutoencoderTiny cannot be decoded in tiles, expected AutoencoderKL"):
        with_tiling(AutoencoderTiny(), 256)


def test_recipes_name_a_tile() -> None:
    assert parse_recipe({"decoder_tile": 256}, where="r.toml", name="r").decoder_tile == 256
    with pytest.raises(RecipeError, match=r"r.toml: decoder_tile is 'big', expected a number of pixels"):
        parse_recipe({"decoder_tile": "big"}, where="r.toml", name="r")


def test_tiles_are_not_quantized() -> None:
    with pytest.raises(RecipeError, match="r: decoder_tile and quantization are both given"):
        parse_recipe({"base": "w8", "decoder_tile": 256}, where="r.toml", name="r")
