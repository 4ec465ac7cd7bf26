"""Says what a generator's own code failed with: in its words, with a hint that follows from where it was raised."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from fewstep.errors import PipelineError
from fewstep.export.record.arguments import IMAGES
from fewstep.recipe.recipe import MAX_STEPS

if TYPE_CHECKING:
    from fewstep.export.generator import Generator

_LONGEST = 400


def pipeline_error(generator: Generator, steps: int, error: Exception) -> PipelineError:
    """Returns the error for an exception that a pipeline or a sampling function raised."""
    said = " ".join(str(error).split())
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
    name = generator.name if generator.is_loop else type(generator.pipeline).__name__
    if isinstance(error, (TypeError, ValueError)):  # what pipelines and schedulers refuse their settings with
        text = f"{name} refuses {steps} steps with these settings: {said or type(error).__name__}"
    else:
        text = f"{name} fails with {steps} steps and these settings: {type(error).__name__}: {said or 'no text'}"
    return PipelineError(text, hint=_hint(generator, steps, error))


def no_step_error(generator: Generator, steps: int) -> PipelineError:
    """Returns the error for a generator that calls no denoiser at a step count."""
    name = generator.name if generator.is_loop else type(generator.pipeline).__name__
    hint = None if generator.is_loop else _strength_hint(generator, steps)
    return PipelineError(
        f"{name} runs no step of its denoiser with {steps} steps and these settings, expected at least one",
        hint=hint or "give more steps (--steps), or change the options",
    )


def _strength_hint(generator: Generator, steps: int) -> str | None:
    """Returns what to do where an image is only changed in the last ``strength`` of the steps, and that is none."""
    parameters = inspect.signature(generator.pipeline.__call__).parameters
    strength = _option(generator, parameters, "strength", steps)
    if not isinstance(strength, (int, float)) or int(steps * strength) >= 1:
        return None
    least = next((n for n in range(steps, MAX_STEPS + 1) if int(n * strength) >= 1), None)
    more = "a larger strength" if least is None else f"--steps {least} or more, or a larger strength"
    return f"strength {strength:g} of {steps} steps leaves no step to run: give {more}"


def _hint(generator: Generator, steps: int, error: Exception) -> str:
    if generator.is_loop:
        return "the sampling function itself fails: does it run outside fewstep with these steps and inputs?"
    if (about_strength := _strength_hint(generator, steps)) is not None:
        return about_strength
    frames = list(_frames(error))
    owner = next((self for self in (f.f_locals.get("self") for f in reversed(frames)) if _tells(generator, self)), None)
    if any(f.f_code.co_name == "check_inputs" for f in frames):
        return f"the pipeline itself says so: change its options (--option NAME=VALUE){_images(generator)}"
    if owner is generator.pipeline.scheduler:
        return (
            "the pipeline itself says so: change its scheduler's configuration, the step counts or the options; "
            f"its scheduler ({type(owner).__name__}) raised it"
        )
    if isinstance(owner, torch.nn.Module):
        return (
            f"its network {_attribute(generator, owner)} raised it: are the options, the shape and the inputs those "
            "that it was made for?"
        )
    where = f" in {frames[-1].f_code.co_name}" if frames else ""
    return (
        f"the pipeline's own code raised it{where}: does it run in diffusers alone, called with these options"
        f"{_images(generator) or '?'}"
    )


def _images(generator: Generator) -> str:
    """Returns a hint at images that the pipeline takes and is not given."""
    given = {spec.name for spec in generator.inputs} | set(generator.options)
    parameters = inspect.signature(generator.pipeline.__call__).parameters
    more = [name for name in IMAGES if name in parameters and name not in given]
    return f", or give it images: {', '.join(f'--input {name}' for name in more)}" if more else ""


def _option(generator: Generator, parameters: Any, name: str, steps: int) -> Any:
    if name not in parameters:
        return None
    value = generator.options.get(name, parameters[name].default)
    return value(steps) if callable(value) and value is not inspect.Parameter.empty else value


def _frames(error: Exception) -> Iterator[FrameType]:
    """Yields the frames that an exception passed, outermost first, without those of this package."""
    traceback = error.__traceback__
    while traceback is not None:
        if not str(traceback.tb_frame.f_globals.get("__name__", "")).startswith("fewstep."):
            yield traceback.tb_frame
        traceback = traceback.tb_next


def _tells(generator: Generator, owner: Any) -> bool:
    """Returns whether the object whose method a frame is of tells where an error is from."""
    pipeline = generator.pipeline
    return owner is pipeline or owner is pipeline.scheduler or isinstance(owner, torch.nn.Module)


def _attribute(generator: Generator, owner: torch.nn.Module) -> str:
    for part in generator.parts.values():
        module = getattr(generator.pipeline, part.attribute)
        if any(owner is inner for inner in module.modules()):
            return part.attribute
    return type(owner).__name__
