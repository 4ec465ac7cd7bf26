"""What a generator is given beside its prompt: checked, and examples to try it with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.bundle.contract import CLASS, IMAGE, TEXT, InputSpec
from fewstep.errors import ContractError
from fewstep.numerics import noise

Array = npt.NDArray[Any]

# Beyond any scale that leaves a picture in float32.
MOST_GUIDANCE = 1e6
# Beyond the draws of any sampler.
_EXAMPLE_OFFSET = 1 << 30


def check_request(prompts: Sequence[object], seeds: Sequence[object], guidance: object) -> None:
    """Raises ContractError for prompts that are no texts, seeds that no noise has, and a guidance that is no number."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ContractError(
                f"the prompt is {type(prompt).__name__}, expected a text (str)", hint="for example 'cat'"
            )
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ContractError(
                f"the prompt {prompt[:80]!r} has half a surrogate pair, which is no character",
                hint="decode it from UTF-8, or leave that character out",
            )
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
            raise ContractError(
                f"the seed is {str(seed)[:40]}, expected an integer from 0 to 2^64 - 1", hint="for example 7"
            )
    number = isinstance(guidance, (int, float, np.integer, np.floating)) and not isinstance(guidance, bool)
    if guidance is not None and not (number and abs(guidance) < MOST_GUIDANCE):  # type: ignore[arg-type]
        raise ContractError(
            f"guidance is {str(guidance)[:40]}, expected a finite number below {MOST_GUIDANCE:g}",
            hint="for example 7.5; leave it out for the generator's own",
        )


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
        array = _numbers(name, given[name])
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


def _numbers(name: str, value: object) -> Array:
    """Returns a value as an array of finite numbers; refuses what is none."""
    try:
        array = np.asarray(value)
        finite = array.size > 0 and array.dtype.kind in "biuf" and bool(np.isfinite(array).all())
    except (ValueError, TypeError):  # rows of several lengths
        finite = False
    if not finite:
        raise ContractError(f"{name} is no array of finite numbers", hint="give an array of numpy, without NaN")
    return array


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
