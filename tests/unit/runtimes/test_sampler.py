"""The parts of sampling that other languages re-implement, against diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from hypothesis import given
from hypothesis import strategies as st

from fewstep.bundle.contract import OutputSpec
from fewstep.bundle.manifest import Manifest, TokenizerSpec
from fewstep.bundle.samples import Sample, StepFeed, load_sample, save_sample
from fewstep.export.contract.guidance_embedding import embedded_guidance
from fewstep.export.source.load import load
from fewstep.numerics.guidance import combine, guidance_embedding
from fewstep.numerics.outputs import to_output
from fewstep.text.tokens import Tokenizer
from tests.support import tiny
from tests.support.bundles import built

ODD_TEXTS = [
    "",
    "red apple",
    "café au lait",
    "🍎🍏",
    "a" * 300,
    "  two  spaces ",
    "مرحبا",
    "it's 3 o'clock!",
    "\x00nul",
    "<|endoftext|>",
]


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5, 8.5])
def test_guidance_embedding_is_the_pipelines(scale: float) -> None:
    generator = load(str(built("lcm").source))
    guidance = embedded_guidance(generator)
    assert guidance is not None
    w = torch.tensor(scale - 1)
    reference = LatentConsistencyModelPipeline.get_guidance_scale_embedding(generator.pipeline, w.repeat(1), 32)
    # Two float32 sines of the same float32 angle.
    np.testing.assert_allclose(guidance_embedding(guidance, scale), reference.numpy(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("text", ODD_TEXTS, ids=repr)
def test_tokens_are_those_of_transformers(tmp_path: Path, text: str) -> None:
    reference = tiny.tokenizer(tmp_path)
    reference.save_pretrained(tmp_path)
    ours = Tokenizer(tmp_path, TokenizerSpec("tokenizer", 16, 513))
    expected = reference(text, padding="max_length", max_length=16, truncation=True)
    ids, mask = ours(text)
    assert ids.tolist() == [expected.input_ids]
    assert mask.tolist() == [expected.attention_mask]
    assert ids.dtype == mask.dtype == np.int64


@given(st.floats(0, 20))
def test_two_pass_guidance(scale: float) -> None:
    rng = np.random.default_rng(0)
    u, c = rng.standard_normal((2, 5)).astype(np.float32)
    # float32: one product and one sum, of numbers up to 20 x 4.
    np.testing.assert_allclose(combine(u, c, scale), u + scale * (c.astype(np.float64) - u), rtol=1e-5, atol=1e-5)


def test_picture_is_clipped_and_channels_last() -> None:
    decoded = np.zeros((1, 3, 2, 4), np.float32)
    decoded[0, 0], decoded[0, 1] = 3.0, -3.0
    picture = to_output(decoded, OutputSpec())
    assert picture.shape == (2, 4, 3)
    assert picture[0, 0].tolist() == [1.0, 0.0, 0.5]


def test_sample_round_trip(tmp_path: Path) -> None:
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    feed = StepFeed("denoiser", 0, 999.0, "cond", {"sample": x}, {"out_sample": x + 1})
    sample = Sample("a | b", 7, 1, 3.0, (feed,), (x,), np.zeros((2, 2, 3), np.float32))
    save_sample(sample, tmp_path / "s.safetensors")
    back = load_sample(tmp_path / "s.safetensors")
    assert (back.prompt, back.seed, back.steps, back.guidance) == ("a | b", 7, 1, 3.0)
    assert back.feeds[0].timestep == 999.0
    np.testing.assert_array_equal(back.feeds[0].outputs["out_sample"], x + 1)
    np.testing.assert_array_equal(back.latents[0], x)


def test_manifest_round_trip() -> None:
    manifest = built("lcm").bundle.manifest
    values = json.loads(json.dumps(manifest.to_json()))
    assert Manifest.from_json(values, where="test") == manifest
