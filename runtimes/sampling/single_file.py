"""One file that samples: written, opened and fed, for the runtimes that can have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.contract import GUIDANCE, INPUT, MASK, NOISE, TOKENS
from fewstep.bundle.manifest import Manifest
from fewstep.errors import RuntimeMissingError
from fewstep.numerics import noise
from fewstep.numerics.guidance import guidance_value
from fewstep.runtimes import RUNTIMES, get_runtime
from fewstep.runtimes.base import Array, OpenLoop, SingleFile
from fewstep.runtimes.sampling.unrolled_graph import input_name
from fewstep.text.tokens import Tokenizer

Feeds = Mapping[str, Array]


def write_loop(bundle: Bundle, path: Path, *, runtime: str, steps: int) -> Path:
    """Returns the path of one file that samples with a bundle's networks: an ONNX model, or a Core ML package.

    Raises:
        BundleError: the file has to be called otherwise.
        ContractError: see `fewstep.runtimes.sampling.unrolled_graph.check_unrolls`.
        RuntimeMissingError: the runtime's artifacts cannot be put into one file.
    """
    return _single_file(runtime).write(bundle, path, steps)


def open_loop(path: Path, runtime: str) -> OpenLoop:
    """Returns one file that samples, opened, with fp32 arithmetic.

    Raises:
        RuntimeMissingError: as above.
    """
    return _single_file(runtime).open(path)


def _single_file(runtime: str) -> SingleFile:
    able = get_runtime(runtime).single_file
    if able is None:
        those = ", ".join(name for name, known in RUNTIMES.items() if known.single_file is not None)
        raise RuntimeMissingError(
            f"{runtime} has no file that samples on its own, expected one of {those}",
            hint="name one of the bundle's runtimes with --runtime, or build it for one",
        )
    return able


def loop_feeds(
    manifest: Manifest,
    inputs: Mapping[str, Sequence[int]],
    tokenizers: Mapping[str, Tokenizer],
    prompt: str,
    seed: int,
    given: Feeds,
) -> Feeds:
    """Returns what a model of `write_loop` takes for a prompt and a seed, by its inputs' names.

    Args:
        manifest: of its bundle.
        inputs: their shapes by name.
        tokenizers: the bundle's.
        prompt: the text.
        seed: of the noise.
        given: the user's other inputs, by name.
    """
    contract = manifest.contract
    feeds: dict[str, Array] = {input_name(f"{INPUT}{name}"): array for name, array in given.items()}
    for name, tokenizer in tokenizers.items():
        feeds[input_name(f"{TOKENS}{name}")], feeds[input_name(f"{MASK}{name}")] = tokenizer(prompt)
    if GUIDANCE in inputs:
        told = guidance_value(contract.guidance, contract.guidance.scale)
        feeds[GUIDANCE] = np.array(np.broadcast_to(told, tuple(inputs[GUIDANCE])))
    prefix = input_name(NOISE)
    for name, shape in inputs.items():
        if name.startswith(prefix):
            feeds[name] = noise.normal(seed, int(name.removeprefix(prefix)), tuple(shape))
    return {name: feeds[name] for name in inputs}
