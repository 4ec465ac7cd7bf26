"""Runs a generator's own pipeline and records every network call: the reference that everything is compared with.

The pipeline is diffusers' ``__call__``, unchanged. Only its random numbers are replaced by fewstep's (``noise``), so
that a seed means the same picture here and on a device, and its networks are listened to.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers.utils.torch_utils
import numpy as np
import torch

from fewstep import noise
from fewstep.export.generator import Generator
from fewstep.feeds import Sample, StepFeed
from fewstep.manifest import DENOISER

# Names that ONNX Runtime users of diffusers models expect for the inputs and outputs of these methods.
_INPUT_NAMES = {("vae_decoder", "z"): "latent_sample", ("vae_decoder", "x"): "latent_sample"}
_OUTPUT_NAMES = {"unet": ("out_sample",), "transformer": ("out_sample",), "vae_decoder": ("sample",)}


@dataclass(frozen=True)
class Call:
    """One call of a component: its bound arguments, its tensors by flat name, and what it returned."""

    component: str
    arguments: Mapping[str, Any]
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]


@dataclass
class Run:
    """One run of the pipeline while it is listened to."""

    guidance: float
    calls: list[Call] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    picture_HWC: np.ndarray[Any, Any] | None = None

    def of(self, component: str) -> list[Call]:
        """Returns the calls of one component, in order."""
        return [call for call in self.calls if call.component == component]


@torch.no_grad()
def run(generator: Generator, prompt: str, seed: int, *, steps: int, guidance: float) -> Run:
    """Returns a run of the pipeline with fewstep's noise: offset 0 first, offset 1 + k in the scheduler's step k."""
    pipeline = generator.pipeline
    recorded = Run(guidance)
    step = _StepListener(pipeline.scheduler.step, recorded)
    with ExitStack() as stack:
        for component, part in generator.parts.items():
            module = generator.module(component)
            original = getattr(module, part.method)
            listener = _listener(component, part.folder, original, recorded)
            stack.enter_context(mock.patch.object(module, part.method, listener))
        stack.enter_context(mock.patch.object(pipeline.scheduler, "step", step))
        stack.enter_context(_our_noise(seed, step))
        result = pipeline(prompt, num_inference_steps=steps, guidance_scale=guidance, output_type="pt")
    recorded.picture_HWC = result.images[0].permute(1, 2, 0).float().numpy().copy()
    return recorded


def record(generator: Generator, prompt: str, seed: int, *, steps: int, guidance: float) -> Sample:
    """Returns one sample of the reference as arrays."""
    recorded = run(generator, prompt, seed, steps=steps, guidance=guidance)
    feeds = tuple(_feeds(recorded))
    latents = tuple(x.float().numpy().copy() for x in recorded.latents)
    assert recorded.picture_HWC is not None
    return Sample(prompt, seed, steps, guidance, feeds, latents, recorded.picture_HWC)


def split_branches(call: Call) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Returns the inputs and outputs of a denoiser call by guidance branch, each with batch 1.

    Pipelines with two-pass guidance stack the branches as [unconditional, conditional] in one batch of two.
    """
    outputs = call.outputs
    if call.component != DENOISER or next(iter(outputs.values())).shape[0] == 1:
        return {"cond": (dict(call.inputs), dict(outputs))}
    halves = {}
    for i, branch in enumerate(("uncond", "cond")):
        inputs = {n: t[i : i + 1] if t.ndim and t.shape[0] == 2 else t for n, t in call.inputs.items()}
        halves[branch] = (inputs, {n: t[i : i + 1] for n, t in outputs.items()})
    return halves


def flatten_tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of nested dicts, lists and tuples with its dotted name."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten_tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flatten_tensors(item, f"{name}.{i}")


def name_inputs(folder: str, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors among a call's arguments by flat name."""
    named: dict[str, torch.Tensor] = {}
    for argument, value in arguments.items():
        named.update(flatten_tensors(value, _INPUT_NAMES.get((folder, argument), argument)))
    return named


def name_outputs(folder: str, result: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors of a call's result by name: of the result's fields, or as ONNX Runtime users know them."""
    if isinstance(result, torch.Tensor):
        result = (result,)
    if isinstance(result, Mapping):
        tensors = {k: v for k, v in result.items() if isinstance(v, torch.Tensor)}
    else:
        tensors = {f"output.{i}": v for i, v in enumerate(result) if isinstance(v, torch.Tensor)}
    known = _OUTPUT_NAMES.get(folder, ())
    return {known[i] if i < len(known) else name: tensor for i, (name, tensor) in enumerate(tensors.items())}


def _listener(component: str, folder: str, original: Callable[..., Any], run: Run) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def listen(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs).arguments
        arguments = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        inputs = {name: tensor.detach().clone() for name, tensor in name_inputs(folder, arguments).items()}
        outputs = {name: tensor.detach().clone() for name, tensor in name_outputs(folder, result).items()}
        run.calls.append(Call(component, arguments, inputs, outputs))
        return result

    return listen


class _StepListener:
    """Stands in for ``scheduler.step``: counts steps and keeps the latent after each."""

    def __init__(self, original: Callable[..., Any], run: Run) -> None:
        functools.update_wrapper(self, original)
        self._original = original
        self._run = run
        self.index = -1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.index += 1
        result = self._original(*args, **kwargs)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        self._run.latents.append(following.detach().clone())
        return result


@contextmanager
def _our_noise(seed: int, step: _StepListener) -> Iterator[None]:
    """Replaces diffusers' ``randn_tensor``, wherever it was imported to, for the length of a block."""
    original = diffusers.utils.torch_utils.randn_tensor

    def ours(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> torch.Tensor:
        values = torch.from_numpy(noise.normal(seed, step.index + 1, tuple(shape)))
        return values.to(device=device, dtype=dtype)

    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            # Through vars: diffusers' lazy modules would import every pipeline at a getattr.
            if vars(module).get("randn_tensor") is original:
                stack.enter_context(mock.patch.object(module, "randn_tensor", ours))
        yield


def _feeds(run: Run) -> Iterator[StepFeed]:
    steps = 0
    for call in run.calls:
        step = timestep = None
        if call.component == DENOISER:
            step, steps = steps, steps + 1
            time = call.inputs.get("timestep")
            timestep = None if time is None else float(time.reshape(-1)[0])
        for branch, (inputs, outputs) in split_branches(call).items():
            yield StepFeed(call.component, step, timestep, branch, _arrays(inputs), _arrays(outputs))


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Numpy copies; a scalar becomes shape [1], as the traced programs take it."""
    return {
        n: t.reshape(1).numpy().copy() if t.ndim == 0 else t.contiguous().numpy().copy() for n, t in tensors.items()
    }
