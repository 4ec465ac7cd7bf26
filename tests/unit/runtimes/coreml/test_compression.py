"""What only Core ML stores: sparse weights, palettes of their other values, and palettes of mixed bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep
from fewstep.errors import QuantizationError, RecipeError
from fewstep.optimize import optimize
from fewstep.optimize.mixed_palettes import choose_palettes
from fewstep.optimize.palettize import of_nonzero
from fewstep.optimize.sparsify import sparse
from fewstep.progress import Silent
from fewstep.recipe.recipe import Recipe, load_recipe, parse_recipe
from fewstep.runtimes.coreml.compile.lower import quiet_coremltools
from fewstep.runtimes.coreml.mil import open_package
from tests.support.quantized import painter

with quiet_coremltools():
    from fewstep.runtimes.coreml.compile.mil_pass_compress import pack


@given(st.integers(1, 400), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_the_smallest_values_become_zero(size: int, share: float, seed: int) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    found = sparse(weight, share)
    gone = found == 0
    assert int(gone.sum()) == int(share * size)
    assert torch.equal(found[~gone], weight[~gone])
    if gone.any():
        assert weight[gone].abs().max() <= weight[~gone].abs().min()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
@settings(max_examples=30)
def test_a_palette_of_the_others_keeps_zeros(seed: int, bits: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((8, 16))
    weight[np.abs(weight) < 0.7] = 0
    found = of_nonzero(weight, bits)
    assert np.array_equal(found == 0, weight == 0)
    assert len(np.unique(found[found != 0])) <= 1 << bits


def test_sparse_palettes_are_stored_as_both() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64))
    weight[np.abs(weight) < 1] = 0
    plain, joint = pack(weight.astype(np.float16)), pack(of_nonzero(weight, 4).astype(np.float16))
    assert plain is not None and plain.mask is not None and plain.lut is None
    assert joint is not None and joint.mask is not None and joint.lut is not None
    # A bit for each place, and 16 or 4 bits for each value of the third that is left.
    assert joint.bytes < plain.bytes < weight.size * 2


def test_palettes_of_mixed_bits_keep_their_budget() -> None:
    generator = painter()
    chosen = choose_palettes(generator, load_recipe("palette-mixed"), Silent())
    weights = dict(generator.module("denoiser").named_parameters())
    bits = {name.removeprefix("denoiser/"): value for name, value in chosen.palette_choices.items()}
    assert bits.keys() == {name for name, weight in weights.items() if weight.ndim > 1 and weight.numel() >= 1024}
    total = sum(weights[name].numel() for name in bits)
    # Tables are paid from the same budget, so that indices alone take less.
    assert 3 <= sum(value * weights[name].numel() for name, value in bits.items()) / total <= 4.5
    optimized, notes = optimize(generator, chosen)
    assert notes[-1].name == "palettes of mixed bits"
    for name, weight in optimized.module("denoiser").named_parameters():
        if name in bits and bits[name] == 8:  # one palette for all of the weight
            assert len(weight.unique()) <= 256
    assert choose_palettes(generator, chosen, Silent()) is chosen


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    recipe = Recipe("small", palette=4, palette_mean_bits=1.0)
    with pytest.raises(QuantizationError, match="not enough for weights that take at least"):
        choose_palettes(painter(), recipe, Silent())


def test_recipes_say_so() -> None:
    values = {"base": "palette4", "palette_choices": {"denoiser/conv.weight": 8}, "sparsity": 0.5}
    recipe = parse_recipe(values, where="here", name="joint")
    assert (recipe.palette, recipe.sparsity, recipe.palette_choices) == (4, 0.5, {"denoiser/conv.weight": 8})
    with pytest.raises(RecipeError, match=r"sparsity is 2, expected a number from 0\.01 to 0\.99"):
        parse_recipe({"sparsity": 2}, where="here", name="x")
    with pytest.raises(RecipeError, match=r"conv is 5, expected one of 1, 2, 3, 4, 6, 8"):
        parse_recipe({"palette_choices": {"conv": 5}}, where="here", name="x")
    with pytest.raises(RecipeError, match="palette_mean_bits and sparsity are both given"):
        parse_recipe({"base": "palette-mixed", "sparsity": 0.5}, where="here", name="x")


@pytest.mark.slow
def test_a_sparse_bundle_is_built_and_verified(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {"base": "palette6", "sparsity": 0.5, "limits": {"compression_psnr_db": 0.0}}, where="here", name="joint"
    )
    options = fewstep.Options(prompts=1, seeds=2, cache_root=tmp_path / "cache", profile=False)
    bundle = fewstep.build(painter(), recipe, ["coreml"], tmp_path / "bundle", options=options)
    package = open_package(bundle.file(bundle.manifest.artifact("coreml", "denoiser").path).parent)
    kinds = {operation.type for operation in package.functions["main"].block.operations}
    assert {"constexpr_lut_to_sparse", "constexpr_sparse_to_dense"} <= kinds
