"""What a generator is given beside its prompt: checked, and examples to try it with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep import noise
from fewstep.contract import CLASS, IMAGE, TEXT, InputSpec
from fewstep.errors import ContractError

Array = npt.NDArray[Any]

# Beyond the draws of any sampler.
_EXAMPLE_OFFSET = 1 << 30


def check_names(specs: Sequence[InputSpec], given: Collection[str]) -> dict[str, InputSpec]:
    """Returns the inputs beside the prompt by name.

    Raises:
        ContractError: the names given are not theirs.
    """
    wanted = {spec.name: spec for spec in specs if spec.kind != TEXT}
    takes = ", ".join(f"{name} ({_what(spec)})" for name, spec in wanted.items()) or "nothing beside a prompt"
    for name in given:
        if name not in wanted:
            close = get_close_matches(name, wanted, n=1)
            raise ContractError(
                f"unknown input {name!r}, this generator takes {takes}",
                hint=f"did you mean {close[0]!r}?" if close else "leave it out",
            )
    for name, spec in wanted.items():
        if name not in given:
            value = "NUMBER" if spec.kind == CLASS else "FILE"
            raise ContractError(
                f"input {name} is missing, this generator takes {takes}",
                hint=f"--input {name}={value}, or from Python inputs={{{name!r}: array}}",
            )
    return wanted


def _what(spec: InputSpec) -> str:
    if spec.kind == CLASS:
        return "a class" + (f" from 0 to {spec.count - 1}" if spec.count else "")
    return f"a picture {list(spec.shape)} in [0, 1]"


def check_inputs(specs: Sequence[InputSpec], given: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the inputs beside the prompt in the type that networks take.

    Raises:
        ContractError: one is missing, unknown, of another shape, or a class that does not exist.
    """
    wanted = check_names(specs, given)
    checked = {}
    for name, spec in wanted.items():
        array = np.asarray(given[name])
        if spec.kind == CLASS:
            label = int(array.reshape(-1)[0])
            if spec.count is not None and not 0 <= label < spec.count:
                raise ContractError(
                    f"{name} is {label}, expected 0 to {spec.count - 1}",
                    hint="classes are counted from 0, as the generator was trained with them",
                )
            checked[name] = np.array([label], dtype=np.int64)
        elif spec.kind == IMAGE:
            if tuple(array.shape) != spec.shape:
                raise ContractError(
                    f"{name} is {list(array.shape)}, expected {list(spec.shape)} in [0, 1]",
                    hint="resize the picture to what the bundle was built for",
                )
            checked[name] = np.asarray(array, dtype=np.float32)
    return checked


def example_inputs(specs: Sequence[InputSpec], index: int) -> dict[str, Array]:
    """Returns the inputs beside the prompt of the example of a number: classes, and smooth pictures."""
    found: dict[str, Array] = {}
    for spec in specs:
        if spec.kind == IMAGE:
            found[spec.name] = _smooth_picture(spec.shape, index)
        elif spec.kind == CLASS:
            found[spec.name] = np.array([(7 * index + 1) % (spec.count or 1)], dtype=np.int64)
    return found


def stacked(inputs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Returns the inputs of several samples as those of a batch, one row for each."""
    return {name: np.concatenate([of_one[name] for of_one in inputs]) for name in inputs[0]}


def _smooth_picture(shape: tuple[int, ...], index: int, grid: int = 4) -> npt.NDArray[np.float32]:
    """Returns a few random colours, blended; float32 [1, C, H, W] in (0, 1)."""
    coarse_CGG = noise.normal(index, _EXAMPLE_OFFSET, (shape[1], grid, grid)).astype(np.float64)
    down, across = (_blend(grid, size) for size in shape[2:])
    smooth_CHW = down @ coarse_CGG @ across.T
    return np.asarray(1 / (1 + np.exp(-2 * smooth_CHW)), dtype=np.float32)[None]


def _blend(grid: int, size: int) -> npt.NDArray[np.float64]:
    """Returns the weights of linear interpolation from ``grid`` points to ``size``, [size, grid]."""
    place = np.linspace(0, grid - 1, size)
    return np.asarray(np.maximum(0.0, 1 - np.abs(place[:, None] - np.arange(grid))))
