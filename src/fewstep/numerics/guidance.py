"""The guidance scale as the network wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fewstep.bundle.contract import ZEROS, Guidance
from fewstep.errors import BundleError

Array = npt.NDArray[np.float32]


def guidance_embedding(guidance: Guidance, scale: float) -> Array:
    """Returns the sinusoidal embedding of a guidance scale, float32 [1, 2 * len(frequencies)].

    As Meng et al. (2022), "On distillation of guided diffusion models", arXiv:2210.03142, with diffusers' shift of w by
    one. Angles are rounded to float32 first, because the network was trained on angles of that precision.
    """
    w = np.float32(guidance.factor) * np.float32(scale - 1.0)
    angles = (w * np.asarray(guidance.frequencies, np.float32)).astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)[None]


def guidance_value(guidance: Guidance, scale: float) -> Array:
    """Returns what the network is told of a guidance scale: its embedding [1, F], or one number [1], in float32."""
    if guidance.kind == "embedded":
        return guidance_embedding(guidance, scale)
    number = np.float32(guidance.factor) * np.float32(scale) + np.float32(guidance.shift)
    return np.asarray([number], np.float32)


def combine(unconditional: Array, conditional: Array, scale: float) -> Array:
    """Returns F_u + w (F_c - F_u): classifier-free guidance of Ho and Salimans (2022), arXiv:2207.12598."""
    return unconditional + np.float32(scale) * (conditional - unconditional)


def write_unconditional(guidance: Guidance, values: Mapping[str, npt.NDArray[Any]], folder: Path) -> None:
    """Writes the tensors of the unconditional branch that are more than zeros, where the contract says they are."""
    paths = {path for path in guidance.unconditional.values() if path != ZEROS}
    for path in paths:
        tensors = {o: np.ascontiguousarray(values[o]) for o, p in guidance.unconditional.items() if p == path}
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / path)


def read_unconditional(guidance: Guidance, file: Callable[[str], Path]) -> dict[str, npt.NDArray[Any]]:
    """Returns the tensors of the unconditional branch that are more than zeros, by origin.

    Args:
        guidance: of the contract.
        file: returns the path of one of the bundle's files.

    Raises:
        BundleError: a file is not there, or lacks a tensor.
    """
    found = {}
    for origin, relative in guidance.unconditional.items():
        if relative == ZEROS:
            continue
        try:
            with safe_open(file(relative), framework="numpy") as stream:
                found[origin] = stream.get_tensor(origin)
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{relative} does not hold {origin}: {error}", hint="build the bundle again") from error
    return found


def guidance_text(guidance: Guidance) -> str:
    """Returns what a bundle does with a guidance scale, for people."""
    w, own = f"{guidance.scale:g}", "" if guidance.own is None else f"the pipeline's own default is {guidance.own:g}, "
    if guidance.kind == "none":
        return "takes none: the networks get the same at every scale"
    if guidance.kind == "fixed":
        return f"{own}this bundle is made for {w} alone: {guidance.reason}"
    if guidance.kind != "two_pass":
        return f"{own}this bundle's is {w}; the scale is an input of the network, --guidance changes it"
    above = "at every scale" if guidance.threshold is None else f"above {guidance.threshold:g}"
    state = "two passes" if guidance.two_passes(guidance.scale) else "off"
    return f"{own}this bundle's is {w} ({state}); --guidance changes it: two passes in each step {above}"


def unguided_notes(guidance: Guidance, scale: float | None, negative: str | None) -> list[str]:
    """Returns what to say of a negative prompt that has no effect, as in the pipeline."""
    w = guidance.scale if scale is None else scale
    if negative is None or not guidance.takes_negative or guidance.two_passes(w):
        return []
    return [f"guidance {w:g} makes one pass, so the negative prompt has no effect; --guidance above it has one"]
