"""The guidance scale as the network wants it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewstep.contract import Guidance

Array = npt.NDArray[np.float32]


def guidance_embedding(guidance: Guidance, scale: float) -> Array:
    """Returns the sinusoidal embedding of a guidance scale, float32 [1, 2 * len(frequencies)].

    As Meng et al. (2022), "On distillation of guided diffusion models", arXiv:2210.03142, with diffusers' shift of w by
    one. Angles are rounded to float32 first, because the network was trained on angles of that precision.
    """
    w = np.float32(guidance.factor) * np.float32(scale - 1.0)
    angles = (w * np.asarray(guidance.frequencies, np.float32)).astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)[None]


def combine(unconditional: Array, conditional: Array, scale: float) -> Array:
    """Returns F_u + w (F_c - F_u): classifier-free guidance of Ho and Salimans (2022), arXiv:2207.12598."""
    return unconditional + np.float32(scale) * (conditional - unconditional)
