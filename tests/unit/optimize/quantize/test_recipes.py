"""What a recipe may say of quantization: presets, three levels of overrides, and each refusal's text."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from fewstep.errors import RecipeError
from fewstep.recipe.quantization import FLOAT_BITS, Quantization, SiteChoice, parse_quantization
from fewstep.recipe.recipe import PRESETS, load_recipe, parse_recipe
from fewstep.recipe.target_profiles import PROFILES, get_profile

DYNAMIC = "[quantization]\nactivations = 8\ndynamic = true\n"


def parse(text: str) -> Quantization:
    found = parse_recipe(tomllib.loads(text), where="mine.toml", name="mine").quantization
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "weights", "activations", "granularity", "mixed"),
    [
        ("w8", 8, FLOAT_BITS, "channel", False),
        ("w8a8", 8, 8, "channel", False),
        ("w8a8-dynamic", 8, 8, "channel", False),
        ("w4", 4, FLOAT_BITS, "group", False),
        ("w4a8", 4, 8, "channel", False),
        ("mixed", 8, FLOAT_BITS, "group", True),
    ],
)
def test_presets(name: str, weights: int, activations: int, granularity: str, mixed: bool) -> None:
    recipe = load_recipe(name)
    q = recipe.quantization
    assert q is not None
    assert (q.weights, q.activations, q.granularity, q.mixed) == (weights, activations, granularity, mixed)
    assert recipe.weights == "fp16", "what stays in float is stored as halves"
    assert recipe.limits.compression_psnr_db in (20.0, 30.0)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_float_presets_quantize_nothing(name: str) -> None:
    assert load_recipe(name).quantization is None


def test_a_table_is_read_over_its_base() -> None:
    q = parse('base = "w4a8"\n[quantization]\nsamples = 3\nbits = 4\nprofile = "arm"')
    assert (q.weights, q.activations, q.samples, q.bits, q.profile) == (4, 8, 3, 4.0, "arm")
    assert q.mixed
    assert parse("[quantization]") == PRESETS["w8"].quantization, "a table without a base is read over w8"
    assert parse("[quantization]\nmax_bytes = 1000").mixed


def test_overrides_in_three_levels() -> None:
    q = parse(
        """
        [quantization]
        weights = 8
        [quantization.ops.linear]
        weights = 4
        granularity = "group"
        [quantization.names."denoiser/*"]
        group_size = 16
        [quantization.names."denoiser/mid.*"]
        weights = 32
        """
    )
    assert q.at("conv2d", "decoder/out").weights == 8
    linear = q.at("linear", "decoder/out")
    assert (linear.weights, linear.granularity, linear.group_size) == (4, "group", 32)
    named = q.at("linear", "denoiser/up.0")
    assert (named.weights, named.granularity, named.group_size) == (4, "group", 16)
    last = q.at("linear", "denoiser/mid.attn")
    assert (last.weights, last.group_size) == (32, 16), "the last pattern that matches wins, others add to it"
    assert q.at("linear", "Denoiser/mid.attn").weights == 4, "patterns mind capitals on every system"


def test_choices_survive_json() -> None:
    q = Quantization(
        activations=8, bits=5.0, ops={"linear": SiteChoice(weights=4)}, names={"a/*": SiteChoice(activations=32)}
    )
    values = json.loads(json.dumps(q.to_json()))
    for level in ("ops", "names"):
        values[level] = {k: {n: v for n, v in c.items() if v is not None} for k, c in values[level].items()}
    assert parse_quantization(values, "manifest") == q


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("quantization = 8", "[quantization] is 8, expected a table", "[brackets]"),
        ("[quantization]\nwieghts = 8", "[quantization]: unknown key 'wieghts'", "did you mean 'weights'?"),
        ("[quantization]\nx = 8", "[quantization]: unknown key 'x'", "known keys: weights, activations"),
        ("[quantization]\nweights = 3", "weights is 3, expected one of 2, 4, 8, 32", "edit the recipe"),
        ("[quantization]\nweights = true", "weights is True, expected one of 2, 4, 8, 32", "edit the recipe"),
        ("[quantization]\nactivations = 4", "activations is 4, expected one of 8, 32", "edit the recipe"),
        ('[quantization]\ngranularity = "row"', "granularity is 'row', expected one of tensor, channel, group", "edit"),
        ('[quantization]\nrounding = "up"', "rounding is 'up', expected one of nearest, gptq, adaround", "edit"),
        ('[quantization]\nranges = "max"', "ranges is 'max', expected one of minmax, percentile, mse, lp, kl", "edit"),
        ('[quantization]\nsampler = "all"', "sampler is 'all', expected one of own, uniform, ndtc, tdac", "edit"),
        ('[quantization]\nprofile = "z80"', "profile is 'z80', expected one of x86, arm, tensorrt", "edit"),
        ("[quantization]\nsamples = 0", "samples is 0, expected a whole number above 0", "edit the recipe"),
        ("[quantization]\nsamples = 1.5", "samples is 1.5, expected a whole number above 0", "edit the recipe"),
        ("[quantization]\nseed = -1", "seed is -1, expected a whole number from 0", "edit the recipe"),
        ("[quantization]\nbits = 1", "bits is 1, expected a number from 2 to 8", "average bits of a weight"),
        ("[quantization]\nmax_bytes = -1", "max_bytes is -1, expected a whole number above 0", "edit the recipe"),
        ('[quantization]\ncorrection = "yes"', "correction is 'yes', expected true or false", "edit the recipe"),
        ("[quantization]\ndynamic = 1", "dynamic is 1, expected true or false", "edit the recipe"),
        ("[quantization]\ndynamic = true", "dynamic is true and activations are in float", "activations = 8"),
        (DYNAMIC + 'step_grids = "each"', "dynamic is true and step_grids is given", "leave step_grids or dynamic out"),
        (DYNAMIC + "float_products = 0.1", "dynamic is true and float_products is given", "leave float_products or"),
        ("[quantization]\nbits = 5\nmax_bytes = 9", "has both bits and max_bytes, expected one budget", "remove one"),
        ("[quantization]\nfloat_products = 2", "float_products is 2, expected a share from 0 to 1", "a twentieth"),
        ("[quantization]\nweights = 2", "weights is 2, but targets of profile x86 store weights in 4 or 8", "palette2"),
        ("[quantization.ops.linear]\nweights = 2", "ops.linear.weights is 2, but targets of profile", "palette2"),
        ("[quantization]\nops = 4", "ops is 4, expected a table", "[brackets]"),
        ("[quantization.ops]\nlinear = 4", "ops.linear is 4, expected a table", "[brackets]"),
        ("[quantization.ops.linear]\nsampler = 'own'", "ops.linear: unknown key 'sampler'", "known keys: weights"),
        ("[quantization.names.'a/*']\nweights = 5", "names.a/*.weights is 5, expected one of 2, 4, 8, 32", "edit"),
    ],
)  # fmt: skip
def test_refusals(text: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)
    assert caught.value.message.startswith("mine.toml: [quantization]")


def test_unknown_preset_and_base(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=re.escape(
            "expected one of fp32, fp16, w8, w8a8, w8a8-dynamic, w4, w4a8, mixed, palette8, palette6, palette4, "
            "palette2, palette-mixed or a .toml"
        ),
    ):
        load_recipe("w8a9")
    (tmp_path / "mine.toml").write_text('base = "w6"\n')
    with pytest.raises(RecipeError, match="base is 'w6', expected one of fp32"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_profiles_say_why_and_when() -> None:
    for name, profile in PROFILES.items():
        assert get_profile(name) is profile
        assert profile.outputs <= profile.computes
        assert profile.activation in ("uint8", "int8")
    x86 = get_profile("x86")
    assert x86.needs_output_grid("conv2d", unfolded=x86.unfolded + 1, groups=1)
    assert x86.needs_output_grid("conv2d", unfolded=9, groups=2)
    assert not x86.needs_output_grid("conv2d", unfolded=x86.unfolded, groups=1)
    assert not x86.needs_output_grid("linear", unfolded=1 << 30, groups=1)
    assert not get_profile("tensorrt").needs_output_grid("conv2d", unfolded=1 << 30, groups=1)
