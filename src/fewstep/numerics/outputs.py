"""What the last component's output means, and how to look at it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.bundle.contract import OutputSpec

Array = npt.NDArray[Any]
# The largest value of an image of 8 bits.
LEVELS = 255


def to_output(decoded: Array, spec: OutputSpec) -> npt.NDArray[np.float32]:
    """Returns the first result of a batch, float32: a picture as [H, W, C], anything else as the network has it."""
    y = decoded[0] * np.float32(spec.scale) + np.float32(spec.shift)
    if spec.clip is not None:
        y = np.clip(y, *spec.clip)
    if spec.kind == "picture":
        y = y.transpose(1, 2, 0)
    return np.ascontiguousarray(y, dtype=np.float32)


def picture_of(output: Array, kind: str) -> npt.NDArray[np.float32]:
    """Returns something to look at, float32 [H, W, C] in [0, 1]: the picture, a frame, a map in grey, a waveform."""
    if kind == "picture":
        return np.asarray(output, dtype=np.float32)
    if kind == "video":
        return _stretched(frames_of(output)[0])
    if kind == "audio":
        return _waveform(output.reshape(-1))
    flat = output.reshape(-1, *output.shape[-2:])[:1] if output.shape[-1] != 1 else output.transpose(2, 0, 1)
    return _stretched(flat.transpose(1, 2, 0))


def to_levels(values: Array, picture: OutputSpec) -> Array:
    """Returns the levels of a decoder's output, uint8 of its shape."""
    shown = np.clip(values * np.float32(picture.scale) + np.float32(picture.shift), 0, 1)
    return np.asarray(np.rint(LEVELS * shown), dtype=np.uint8)


def from_levels(levels: Array, picture: OutputSpec) -> Array:
    """Returns what a decoder would have to give for levels, float32."""
    values = (levels.astype(np.float64) / LEVELS - picture.shift) / picture.scale
    return values.astype(np.float32)


def frames_of(video: Array) -> Array:
    """Returns a video [F, C, H, W] or [C, F, H, W] as [F, H, W, 3]."""
    frames_first = video.shape[1] in (1, 3)
    frames_FHWC = video.transpose(0, 2, 3, 1) if frames_first else video.transpose(1, 2, 3, 0)
    return np.broadcast_to(frames_FHWC, (*frames_FHWC.shape[:3], 3))


def _stretched(values_HWC: Array) -> npt.NDArray[np.float32]:
    low, high = float(values_HWC.min()), float(values_HWC.max())
    return np.asarray((values_HWC - low) / max(high - low, 1e-12), dtype=np.float32)


def _waveform(samples: Array, width: int = 128, height: int = 64) -> npt.NDArray[np.float32]:
    """Returns the envelope of a signal, dark on white."""
    columns = np.array_split(samples, min(width, len(samples)))
    peak = max(float(np.abs(samples).max()), 1e-12)
    picture = np.ones((height, len(columns), 1), dtype=np.float32)
    for i, column in enumerate(columns):
        low, high = ((1 - v / peak) / 2 * (height - 1) for v in (column.max(), column.min()))
        picture[int(low) : int(high) + 1, i] = 0
    return picture
