"""What the last network puts out becomes a result, and something to look at."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.bundle.contract import OutputSpec
from fewstep.numerics.outputs import frames_of, picture_of, to_output

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (OutputSpec(), [0.0, 0.25, 1.0]),
        (OutputSpec(clip=None), [-0.5, 0.25, 1.5]),
        (OutputSpec(scale=1.0, shift=0.0, clip=None), [-2.0, -0.5, 2.0]),
        (OutputSpec(scale=1.0, shift=0.0, clip=(-1.0, 1.0)), [-1.0, -0.5, 1.0]),
    ],
)
def test_scale_shift_and_clip(spec: OutputSpec, expected: list[float]) -> None:
    decoded_NCHW = np.array([-2.0, -0.5, 2.0], np.float32).reshape(1, 3, 1, 1)
    found = to_output(decoded_NCHW, spec)
    assert found.dtype == np.float32
    assert found[0, 0].tolist() == expected


def test_only_pictures_have_their_channels_last() -> None:
    decoded = RNG.standard_normal((1, 3, 4, 6)).astype(np.float32)
    assert to_output(decoded, OutputSpec()).shape == (4, 6, 3)
    for kind in ("audio", "video", "depth"):
        plain = to_output(decoded, OutputSpec(kind, scale=1.0, shift=0.0, clip=None))
        np.testing.assert_array_equal(plain, decoded[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_frames(channels: int) -> None:
    video_FCHW = RNG.random((5, channels, 4, 6), dtype=np.float32)
    frames_FHWC = frames_of(video_FCHW)
    assert frames_FHWC.shape == (5, 4, 6, 3)
    np.testing.assert_array_equal(frames_FHWC, frames_of(video_FCHW.transpose(1, 0, 2, 3)))
    np.testing.assert_array_equal(frames_FHWC[2, ..., 0], video_FCHW[2, 0])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("picture", (4, 6, 3)),
        ("video", (5, 3, 4, 6)),
        ("video", (3, 5, 4, 6)),
        ("audio", (1, 500)),
        ("audio", (2, 40)),
        ("depth", (1, 4, 6)),
        ("depth", (4, 6, 1)),
    ],
)
def test_everything_can_be_looked_at(kind: str, shape: tuple[int, ...]) -> None:
    output = RNG.random(shape, dtype=np.float32)
    picture_HWC = picture_of(output, kind)
    assert picture_HWC.dtype == np.float32
    assert picture_HWC.ndim == 3
    assert picture_HWC.shape[-1] in (1, 3)
    assert 0 <= picture_HWC.min() < picture_HWC.max() <= 1
    if kind in ("video", "depth"):
        assert picture_HWC.shape[:2] == (4, 6)


def test_silence_is_flat() -> None:
    silence = picture_of(np.zeros((1, 256), np.float32), "audio")
    assert (silence == silence[:, :1]).all()
