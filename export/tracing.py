"""Traces every component of a generator from one recorded run, and reads its contract off that run.

No family is named here. What a network takes is what its own pipeline gave it; where each input comes from is found by
comparing values: with the latent, the scheduler's time values, the outputs of the other components, the tokens and the
guidance embedding.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fewstep.errors import ExportError
from fewstep.export.generator import Generator
from fewstep.export.reference import Call, Run, name_outputs, split_branches
from fewstep.guidance import guidance_embedding
from fewstep.manifest import (
    DECODER,
    DENOISER,
    GUIDANCE,
    LATENT,
    SAMPLE,
    TIMESTEP,
    TOKENS,
    ComponentSpec,
    Contract,
    Guidance,
    TensorSpec,
)
from fewstep.program import Program

# The reference and our own arithmetic for the same value differ by float32 rounding of a product or two.
_RTOL, _ATOL = 1e-5, 1e-6


class Traced(torch.nn.Module):
    """A component's method as a function of its tensors alone: every other argument is the one the pipeline gave."""

    def __init__(self, module: torch.nn.Module, method: str, folder: str, call: Call) -> None:
        super().__init__()
        self.module = module
        self._method = method
        self._folder = folder
        self._arguments = dict(call.arguments)
        self.names = tuple(call.inputs)
        self._outputs = tuple(call.outputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the method's tensors, in the order of the recorded call."""
        queue = list(tensors)
        arguments = {name: _rebuild(value, queue) for name, value in self._arguments.items()}
        result = name_outputs(self._folder, getattr(self.module, self._method)(**arguments))
        return tuple(result[name] for name in self._outputs)


def _rebuild(value: Any, queue: list[torch.Tensor]) -> Any:
    """Returns ``value`` with its tensors replaced, in order, by those of the queue."""
    if isinstance(value, torch.Tensor):
        return queue.pop(0)
    if isinstance(value, Mapping):
        return {key: _rebuild(item, queue) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rebuild(item, queue) for item in value)
    return value


def first_calls(run: Run) -> dict[str, Call]:
    """Returns the first call of every component."""
    return {call.component: call for call in reversed(run.calls)}


def trace(generator: Generator, component: str, call: Call, spec: ComponentSpec) -> Program:
    """Returns a component traced on the tensors of a recorded call, with static shapes and batch 1.

    Raises:
        ExportError: ``torch.export`` cannot trace it.
    """
    part = generator.parts[component]
    inputs, _ = split_branches(call)["cond"]
    example = tuple(t.reshape(1) if t.ndim == 0 else t.contiguous() for t in inputs.values())
    traced = Traced(generator.module(component), part.method, part.folder, call).eval()
    try:
        with torch.no_grad(), warnings.catch_warnings(), _quiet_logs():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            exported = torch.export.export(traced, example)
    except Exception as error:  # torch.export raises many classes, most of them private; all mean the same here
        first_line = str(error).strip().split("\n", 1)[0]
        raise ExportError(
            f"{component} ({type(generator.module(component)).__name__}) cannot be traced: "
            f"{type(error).__name__}: {first_line}",
            hint="does torch.export.export trace this module on its own? data-dependent branches are the usual cause",
        ) from error
    return Program(component, part.folder, exported, spec)


def read_contract(generator: Generator, run: Run, schedule_inputs: Sequence[torch.Tensor]) -> Contract:
    """Returns the contract that a recorded run followed; ``schedule_inputs`` are its latents, the initial one first."""
    guidance = generator.guidance
    call = run.of(DENOISER)[0]
    embedded = embedded_guidance(generator)
    if embedded is not None and any(_is_embedding(t, embedded) for t in call.inputs.values()):
        found = embedded
    elif len(split_branches(call)) == 2:
        found = Guidance("two_pass", guidance)
    else:
        found = Guidance("none", guidance)
    vae = generator.module(DECODER).config
    scale, shift = float(getattr(vae, "scaling_factor", 1.0)), float(getattr(vae, "shift_factor", None) or 0.0)
    decoded = next(iter(run.of(DECODER)[0].inputs.values()))
    final = schedule_inputs[-1]
    if not torch.allclose(decoded, final / scale + shift, rtol=_RTOL, atol=_ATOL):
        raise ExportError(
            "decoder's input is not final latent / scaling_factor + shift_factor, as its config says",
            hint="this pipeline changes the latent before decoding in a way fewstep does not know; please report it",
        )
    return Contract(
        latent_shape=tuple(final.shape[1:]),
        latent_scale=scale,
        latent_shift=shift,
        prediction_type=str(getattr(generator.pipeline.scheduler.config, "prediction_type", "unknown")),
        guidance=found,
    )


def read_specs(
    generator: Generator,
    run: Run,
    network_inputs: Sequence[torch.Tensor],
    timesteps: Sequence[float],
    tokens: torch.Tensor,
) -> dict[str, ComponentSpec]:
    """Returns what every component takes and gives and where each input comes from.

    Args:
        generator: the generator that ran.
        run: a recorded run.
        network_inputs: s_k x_k of the schedule table for this run, one for each step.
        timesteps: t_k of the table.
        tokens: token ids of the prompt, int64 [1, L].

    Raises:
        ExportError: an input whose value has no known origin.
    """
    sources: dict[str, torch.Tensor] = {f"{TOKENS}tokenizer": tokens}
    specs: dict[str, ComponentSpec] = {}
    for component in ("text_encoder", DENOISER, DECODER):
        # With two-pass guidance the text encoder is called twice, pipelines encode the prompt first.
        calls = run.of(component)
        if component == DECODER:
            sources = {SAMPLE: calls[0].inputs["latent_sample"]}
        inputs, outputs = split_branches(calls[0])["cond"]
        bindings = {
            name: _origin(component, name, calls, sources, network_inputs, timesteps, generator) for name in inputs
        }
        specs[component] = ComponentSpec(_specs(inputs), _specs(outputs), bindings)
        sources.update({f"{component}.{name}": tensor for name, tensor in outputs.items()})
    return specs


def _origin(
    component: str,
    name: str,
    calls: Sequence[Call],
    sources: Mapping[str, torch.Tensor],
    network_inputs: Sequence[torch.Tensor],
    timesteps: Sequence[float],
    generator: Generator,
) -> str:
    values = [split_branches(call)["cond"][0][name] for call in calls]
    if component == DENOISER:
        if len(values) == len(network_inputs) and all(_same(v, x) for v, x in zip(values, network_inputs, strict=True)):
            return LATENT
        if all(v.numel() == 1 for v in values) and [float(v.reshape(-1)[0]) for v in values] == list(timesteps):
            return TIMESTEP
        embedded = embedded_guidance(generator)
        if embedded is not None and _is_embedding(values[0], embedded):
            return GUIDANCE
    for origin, tensor in sources.items():
        if _same(values[0], tensor):
            return origin
    raise ExportError(
        f"{component}: input {name} {list(values[0].shape)} has no known origin: "
        "it is neither the latent, the time, the tokens, the guidance embedding nor another component's output",
        hint="this pipeline prepares a condition that fewstep cannot compute on a device yet",
    )


def _same(value: torch.Tensor, other: torch.Tensor) -> bool:
    return value.shape == other.shape and torch.allclose(value.double(), other.double(), rtol=_RTOL, atol=_ATOL)


def embedded_guidance(generator: Generator) -> Guidance | None:
    """Returns the embedding of w that diffusers' pipelines compute for this denoiser, None if it takes none."""
    dim = getattr(generator.module(DENOISER).config, "time_cond_proj_dim", None)
    if dim is None:
        return None
    half = dim // 2
    # Every rounding as the pipelines have it, the logarithm in float32 too: see `Guidance`.
    exponent = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -exponent)
    return Guidance("embedded", generator.guidance, tuple(frequencies.tolist()))


def _is_embedding(value: torch.Tensor, guidance: Guidance) -> bool:
    expected = torch.from_numpy(guidance_embedding(guidance, guidance.scale))
    return value.ndim == 2 and _same(value[:1], expected)


def _specs(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape) if t.ndim else (1,))
        for name, t in tensors.items()
    )


class _quiet_logs:
    """Holds back the INFO and WARNING lines that torch.export writes about its own fallbacks."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
