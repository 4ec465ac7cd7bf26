"""Values beyond fp16 in a decoder are found, named and counted; NaN counts."""

from __future__ import annotations

import copy

import pytest
import torch

from fewstep.bundle.samples import Sample
from fewstep.calibration import SampleRequest, overflow_caveat, record_samples
from fewstep.calibration.fp16_range import decoder_peaks
from fewstep.export import Description, describe, load
from fewstep.export.generator import Generator
from tests.support.bundles import built


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load(str(built("turbo").source))


@pytest.fixture(scope="module")
def described(generator: Generator) -> Description:
    return describe(generator, [1])


@pytest.fixture(scope="module")
def samples(generator: Generator, described: Description) -> list[Sample]:
    return list(record_samples(generator, described, [SampleRequest("cat", 0, 1, 0.0)]))


def scaled(generator: Generator, factor: float) -> Generator:
    """Scales a convolution in front of a normalization, which takes the factor out again."""
    vae = copy.deepcopy(generator.pipeline.vae)
    with torch.no_grad():
        vae.decoder.mid_block.resnets[0].conv1.weight.mul_(factor)
        vae.decoder.mid_block.resnets[0].conv1.bias.mul_(factor)
    return generator.with_modules({"decoder": vae})


def test_a_decoder_that_fits(generator: Generator, described: Description, samples: list[Sample]) -> None:
    peaks = decoder_peaks(generator, described, samples)
    assert {"decoder.conv_in", "decoder.mid_block.resnets.0.conv1", "decoder.conv_out"} <= {
        p.module_path for p in peaks
    }
    assert all(0 < p.value < 1000 for p in peaks)
    assert overflow_caveat(generator, described, samples) is None


def test_a_decoder_that_overflows(generator: Generator, described: Description, samples: list[Sample]) -> None:
    path = "decoder.mid_block.resnets.0.conv1"
    plain = next(p.value for p in decoder_peaks(generator, described, samples) if p.module_path == path)
    text = overflow_caveat(scaled(generator, 1e6), described, samples)
    assert text is not None
    value = next(p.value for p in decoder_peaks(scaled(generator, 1e6), described, samples) if p.module_path == path)
    assert value == pytest.approx(plain * 1e6, rel=1e-4)
    assert f"the decoder overflows where it is computed in fp16: {path} reaches {value:.6g}" in text
    assert "the largest fp16 number is 65504; 1 of its" in text
    assert f"first {path}. Take a decoder made for fp16 (--decoder FOLDER)" in text


def test_nan_is_an_overflow(generator: Generator, described: Description, samples: list[Sample]) -> None:
    text = overflow_caveat(scaled(generator, float("nan")), described, samples)
    assert text is not None
    assert "reaches inf" in text


def test_hooks_are_taken_away(generator: Generator, described: Description, samples: list[Sample]) -> None:
    decoder_peaks(generator, described, samples)
    assert not any(module._forward_hooks for module in generator.pipeline.vae.modules())
