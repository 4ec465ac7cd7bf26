"""Runs a generator as its authors run it and listens: the reference that everything is compared with.

For a diffusers generator this is the pipeline's ``__call__``, unchanged. Only its random numbers are replaced by
fewstep's (``noise``), so that a seed means the same picture here and on a device. Networks, tokenizers, scheduler and
the tensor operations between them are listened to.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch

from fewstep.bundle.contract import INPUT, LATENT, TEXT
from fewstep.errors import ExportError, FewstepError
from fewstep.export.generator import Generator
from fewstep.export.pipeline_errors import no_step_error, pipeline_error
from fewstep.export.record.arguments import check_options
from fewstep.export.record.intercept import (
    CLEAN,
    Draws,
    Listener,
    Stub,
    listen_to_scheduler,
    listen_to_tokenizer,
    our_noise,
)
from fewstep.export.record.run_record import Run, flatten_tensors
from fewstep.export.source.offloaded_networks import on_the_cpu
from fewstep.numerics import noise


@torch.no_grad()
def run(
    generator: Generator,
    prompt: str | Sequence[str],
    seed: int,
    *,
    steps: int,
    guidance: float,
    negative: str | None = None,
    inputs: Mapping[str, np.ndarray[Any, Any]] | None = None,
    stubs: Mapping[str, Stub] | None = None,
    draw: Callable[[int, tuple[int, ...]], torch.Tensor] | None = None,
    on_start: Callable[[Run], object] | None = None,
    clips: bool | None = None,
) -> Run:
    """Returns a run of the generator with fewstep's noise.

    Args:
        generator: what to run.
        prompt: the text, if the generator takes one; of a batch, one for each sample.
        seed: of the noise: offset 0 for the first draw, 1 + k for the draw in the scheduler's step k. Of a batch, the
            first sample's; the others count on from it.
        steps: step count, as the pipeline takes it.
        guidance: guidance scale, as the pipeline takes it.
        negative: the negative prompt; None gives none, as the pipeline's users do.
        inputs: the generator's other inputs, by name; of a batch, one row for each sample.
        stubs: (number of the call, its arguments) -> result, by component; stands in for a network. None: the
            networks themselves.
        draw: (offset, shape) -> noise, in place of the seed's.
        on_start: told the run before it begins.
        clips: whether a loop in plain PyTorch clips x0, so that a clamp after the last call is part of the last step;
            None: it is if there is a clamp after every call of several.
    """
    recorded = Run(guidance, generator.is_loop, batch=generator.batch)
    if on_start is not None:
        on_start(recorded)
    seeds = range(seed, seed + generator.batch)
    draws = Draws(draw or (lambda *what: torch.from_numpy(noise.rows(seeds, *what))), recorded, generator.batch)
    with ExitStack() as stack:
        if generator.stored is not None:
            stubs = generator.stored.loaded(generator) if stubs is None else stubs
            stack.enter_context(on_the_cpu(generator.pipeline))
        for component, part in generator.parts.items():
            module = generator.module(component)
            listener = Listener(component, part.folder, getattr(module, part.method), recorded, (stubs or {}))
            stack.enter_context(mock.patch.object(module, part.method, listener))
        takes_text = any(spec.kind == TEXT for spec in generator.inputs)
        for name, tokenizer in generator.tokenizers.items() if takes_text else ():
            stack.enter_context(listen_to_tokenizer(name, tokenizer, recorded))
        for name, array in (inputs or {}).items():
            recorded.inputs[name] = torch.from_numpy(np.array(array))
            recorded.tape.leaf(f"{INPUT}{name}", recorded.inputs[name])
        if generator.is_loop:
            call = functools.partial(_call_loop, generator, prompt, recorded, steps, guidance, draws)
        else:
            stack.enter_context(listen_to_scheduler(generator.pipeline.scheduler, recorded))
            stack.enter_context(our_noise(draws))
            call = functools.partial(_call_pipeline, generator, prompt, recorded, steps, guidance, negative)
        stack.enter_context(recorded.tape)
        recorded.result = call()
    if not recorded.states:
        raise no_step_error(generator, steps)
    if recorded.clean is not None and _takes(recorded, CLEAN):
        recorded.ends_clean = True
        recorded.latents[-1] = recorded.clean
        recorded.tape.rename(LATENT, recorded.clean)
    if recorded.is_loop:
        recorded.clips = _clips(recorded) if clips is None else clips
        _find_last_latent(recorded)
    recorded.output = _output_array(recorded.result, generator.kind, signed=recorded.is_loop)
    return recorded


def _takes(recorded: Run, leaf: str) -> bool:
    """Returns whether what runs after the loop is given a leaf."""
    after = [c for c in recorded.calls if c.steps_done == len(recorded.states)]
    for call in after[:1]:
        tensors = [t for _, t in flatten_tensors(dict(call.arguments), "")]
        return leaf in recorded.tape.cut(tensors, what=call.component).leaves
    return False


def _clips(recorded: Run) -> bool:
    starts = [c.position for c in recorded.denoiser_calls]
    ends = [*starts[1:], recorded.tape.position]
    clamps = recorded.tape.clamps
    return len(starts) > 1 and all(any(a <= c < b for c in clamps) for a, b in zip(starts, ends, strict=True))


def _find_last_latent(recorded: Run) -> None:
    """Notes what a loop in plain PyTorch ends with: what it hands on, before it is reshaped or clipped to be shown."""
    after = [c for c in recorded.calls if c.steps_done == len(recorded.states)]
    tensors = [t for c in after[:1] for _, t in flatten_tensors(dict(c.arguments), "") if recorded.tape.varies(t)]
    shape = recorded.states[0].shape
    for k, state in enumerate(recorded.states):
        if state.shape != shape:
            raise ExportError(
                f"the latent of step {k} is {list(state.shape)}, expected {list(shape)} as in step 0",
                hint="a latent that changes its size cannot be expressed yet",
            )
    last = tensors[0] if tensors else recorded.result
    while last.shape != shape or (recorded.tape.is_clamp(last) and not recorded.clips):
        parents = recorded.tape.parents(last)
        if len(parents) != 1:
            break
        last = parents[0]
    if last.shape != shape:
        raise ExportError(
            f"the loop ends with {list(last.shape)}, expected a latent {list(shape)} as its denoiser takes",
            hint="the denoiser's first argument must be the latent that the loop updates",
        )
    recorded.tape.rename(LATENT, last)
    recorded.latents = [*recorded.states[1:], last]


def _call_pipeline(
    generator: Generator,
    prompt: str | Sequence[str],
    recorded: Run,
    steps: int,
    guidance: float,
    negative: str | None = None,
) -> Any:
    """Returns what a diffusers pipeline returns, called as its users call it."""
    pipeline = generator.pipeline
    parameters = inspect.signature(pipeline.__call__).parameters
    wanted: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    if generator.batch > 1:
        wanted["batch_size"] = generator.batch
    arguments = {name: value for name, value in wanted.items() if name in parameters}
    for spec in generator.inputs:
        arguments[spec.name] = prompt if spec.kind == TEXT else recorded.inputs[spec.name]
    check_options(pipeline, generator.options)
    options = {name: value(steps) if callable(value) else value for name, value in generator.options.items()}
    arguments |= options
    if negative is not None:
        arguments["negative_prompt"] = negative
    if generator.batch > 1:  # pipelines want a list of each kind of prompt, or of none
        arguments |= {n: [v] * generator.batch for n, v in arguments.items() if "prompt" in n and isinstance(v, str)}
    try:
        with warnings.catch_warnings():
            # Classes are given as tensors, which the tape follows; DiT's pipeline makes tensors of what it is given.
            warnings.filterwarnings("ignore", message="To copy construct from a tensor")
            return pipeline(**arguments)
    except FewstepError:
        raise
    except Exception as error:  # a pipeline is its author's code and raises what it likes
        raise pipeline_error(generator, steps, error) from error


def _call_loop(
    generator: Generator, prompt: str | Sequence[str], recorded: Run, steps: int, guidance: float, draw: Draws
) -> torch.Tensor:
    """Returns what a sampling function in plain PyTorch returns."""
    inputs = dict(recorded.inputs)
    for spec in generator.inputs:
        if spec.kind == TEXT:
            tokenizer = generator.tokenizers[spec.name]
            length = tokenizer.model_max_length
            encoded = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            inputs[spec.name] = encoded.input_ids
    try:
        result: torch.Tensor = generator.pipeline(inputs, steps=steps, guidance=guidance, noise=draw)
    except FewstepError:
        raise
    except Exception as error:  # a sampling function is its author's code, too
        raise pipeline_error(generator, steps, error) from error
    return result


def result_tensor(result: Any) -> Any:
    """Returns the tensor or array of a pipeline's output, batch first."""
    for name in ("images", "frames", "audios", "prediction", "sample"):
        if hasattr(result, name):
            return getattr(result, name)
    return result[0] if isinstance(result, tuple) else result


def _output_array(result: Any, kind: str, *, signed: bool) -> np.ndarray[Any, Any]:
    """Returns the first output as float32: a picture [H, W, C] or a video in [0, 1], anything else as it comes."""
    value = result_tensor(result)
    if isinstance(value, (list, tuple)):
        value = value[0][None] if isinstance(value[0], (torch.Tensor, np.ndarray)) else np.asarray(value[0])[None]
    first = (value[0].float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value[0])).astype(np.float32)
    if kind == "picture" and first.ndim == 3 and first.shape[0] in (1, 3, 4) and first.shape[-1] not in (1, 3, 4):
        first = first.transpose(1, 2, 0)
    if kind in ("picture", "video") and signed:
        first = np.clip(first * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(first)
