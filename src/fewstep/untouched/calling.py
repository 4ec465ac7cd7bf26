"""Calls the pipeline with what its user would write, and takes what it returns."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fewstep.recipe import call_options
from fewstep.untouched.loading import Subject
from fewstep.untouched.randomness import Draws, in_pipelines
from fewstep.untouched.request import Request, UserCall

Array = npt.NDArray[Any]


@torch.no_grad()
def outputs(subject: Subject, request: Request) -> list[Array | str]:
    """Returns what each call of a request gives, or what the pipeline says instead."""
    made: list[Array | str] = []
    for call in request.calls:
        try:
            made.append(_output(subject, request, call))
        except Exception as error:  # any: it is the user's own pipeline, and its words are the answer
            made.append(f"{type(error).__name__}: {error}")
    return made


def _output(subject: Subject, request: Request, call: UserCall) -> Array:
    draws = Draws(call.seed)
    if subject.is_loop:
        result = call_loop(subject, request, call, draws)
    else:
        with in_pipelines(draws, getattr(subject.pipeline, "scheduler", None)):
            result = call_pipeline(subject, request, call)
    return _array(result, request.kind, signed=subject.is_loop)


def call_pipeline(subject: Subject, request: Request, call: UserCall) -> Any:
    """Returns the result of one call of a diffusers pipeline.

    Images are handed over as users have them, in 8 bits; the result is asked for before it is rounded to 8 bits.
    """
    parameters = inspect.signature(subject.pipeline.__call__).parameters
    options = {**subject.options, **call_options.from_json(request.options)}
    arguments = {name: value(call.steps) if callable(value) else value for name, value in options.items()}
    for name, value in arguments.items():  # JSON has no tuples, and pipelines add tuples up
        wanted = str(parameters[name].annotation).lower() if name in parameters else ""
        if isinstance(value, list) and "tuple" in wanted and "list" not in wanted:
            arguments[name] = tuple(value)
    arguments |= {"num_inference_steps": call.steps, "output_type": "pt"}
    scale = request.guidance if call.guidance is None else call.guidance
    own = parameters["guidance_scale"].default if "guidance_scale" in parameters else None
    if scale is not None and (call.guidance is not None or own != scale):
        arguments["guidance_scale"] = scale
    if call.negative is not None:
        arguments["negative_prompt"] = call.negative
    arguments = {name: value for name, value in arguments.items() if name in parameters or name in options}
    for name, kind in request.inputs.items():
        arguments[name] = call.prompt if kind == "text" else _given(kind, request.given[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' advice to its users
        return subject.pipeline(**arguments)


def _given(kind: str, array: Array) -> Any:
    """Returns an input as users have it: a class, or an image with 8 bits a channel."""
    if kind == "class":
        return array.reshape(-1).tolist()
    from PIL import Image

    levels_HWC = np.round(array[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    return Image.fromarray(levels_HWC[..., 0] if levels_HWC.shape[-1] == 1 else levels_HWC)


def call_loop(subject: Subject, request: Request, call: UserCall, draws: Draws) -> Any:
    """Returns the result of a sampling function in plain PyTorch, called as its documentation says."""
    inputs = {name: torch.from_numpy(np.array(array)) for name, array in request.given.items()}
    for name, kind in request.inputs.items():
        if kind == "text":
            inputs[name] = torch.as_tensor(loop_tokens(subject.tokenizers[name], call.prompt)["input_ids"])
    w = next(w for w in (call.guidance, request.guidance, subject.guidance) if w is not None)
    with _steps_of(subject.pipeline, draws):
        return subject.pipeline(inputs, steps=call.steps, guidance=w, noise=draws)


def loop_tokens(tokenizer: Any, text: str) -> Mapping[str, Any]:
    """Returns what a loop is given of a text: ids and mask, padded or cut to the tokenizer's own length."""
    length = tokenizer.model_max_length
    result: Mapping[str, Any] = tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    return result


@contextmanager
def _steps_of(loop: Any, draws: Draws) -> Any:
    """Counts the calls of a loop's denoisers."""

    def begins(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        draws.step_begins(next(iter([*args, *kwargs.values()])))

    with ExitStack() as stack:
        for name in loop.names:
            if name == "denoiser" or name.startswith("denoiser_"):
                handle = getattr(loop, name).register_forward_pre_hook(begins, with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _array(result: Any, kind: str, *, signed: bool) -> Array:
    """Returns the first output, float32: an image [H, W, C] or a video in [0, 1], anything else as it comes."""
    for name in ("images", "frames", "audios", "prediction", "sample"):
        if hasattr(result, name):
            result = getattr(result, name)
            break
    else:
        result = result[0] if isinstance(result, tuple) else result
    first = result[0]
    array = (first.float().numpy() if isinstance(first, torch.Tensor) else np.asarray(first)).astype(np.float32)
    if kind == "picture" and array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if kind in ("picture", "video") and signed:
        array = np.clip(array * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(array)
