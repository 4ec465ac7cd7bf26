"""One file that samples: written, opened and fed, for the runtimes that can have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.contract import GUIDANCE, INPUT, MASK, NOISE, TOKENS
from fewstep.bundle.manifest import Manifest
from fewstep.errors import BundleError, RuntimeMissingError
from fewstep.numerics import noise
from fewstep.numerics.guidance import guidance_value
from fewstep.runtimes.base import Array
from fewstep.runtimes.coreml import runtime as coreml
from fewstep.runtimes.onnxruntime import runtime as ort
from fewstep.runtimes.sampling.unrolled_graph import input_name
from fewstep.text.tokens import Tokenizer

Feeds = Mapping[str, Array]
_PACKAGE = ".mlpackage"
_RUNTIMES = (ort.NAME, coreml.NAME)


@dataclass(frozen=True)
class OpenLoop:
    """One file that samples, ready to run: the shapes of its inputs by name, and what computes the picture of them."""

    inputs: Mapping[str, Sequence[int]]
    run: Callable[[Feeds], Array]


def write_loop(bundle: Bundle, path: Path, *, runtime: str, steps: int) -> Path:
    """Returns the path of one file that samples with a bundle's networks: an ONNX model, or a Core ML package.

    Raises:
        BundleError: a Core ML package has to be called one.
        ContractError: see `fewstep.runtimes.sampling.unrolled_graph.check_unrolls`.
        RuntimeMissingError: the runtime's artifacts cannot be put into one file.
    """
    if runtime not in _RUNTIMES:
        raise RuntimeMissingError(
            f"{runtime} has no file that samples on its own, expected one of {', '.join(_RUNTIMES)}",
            hint="name one of the bundle's runtimes with --runtime, or build it for one",
        )
    if runtime == ort.NAME:
        from fewstep.runtimes.onnxruntime.compile import (
            single_file as ort_loop,  # needs onnx_ir, which running a bundle does not
        )

        return ort_loop.write_loop(bundle, path, runtime=runtime, steps=steps)
    if path.suffix != _PACKAGE:
        raise BundleError(f"{path.name} is to be a Core ML package, expected a name in {_PACKAGE}", hint="rename it")
    from fewstep.runtimes.coreml.compile import single_file as coreml_loop  # needs coremltools

    return coreml_loop.write_loop(bundle, path, steps=steps)


def open_loop(path: Path, runtime: str) -> OpenLoop:
    """Returns one file that samples, opened; a Core ML package on the evaluator, in fp32."""
    if runtime == ort.NAME:
        import onnxruntime

        options = ort.session_options(None, path=path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        shapes = {value.name: value.shape for value in session.get_inputs()}
        return OpenLoop(shapes, lambda feeds: session.run(None, dict(feeds))[0])
    from fewstep.runtimes.coreml.mil import Evaluator, open_package

    program = open_package(path)
    evaluator = Evaluator(program, precision="fp32")
    shapes = {feature.name: feature.shape for feature in program.inputs[program.default]}
    return OpenLoop(shapes, lambda feeds: next(iter(evaluator.run(coreml.to_interface(feeds)).values())))


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
