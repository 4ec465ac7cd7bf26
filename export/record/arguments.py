"""What a pipeline's call takes: the inputs that its user must give, those that he may, and options of a fixed value."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

from fewstep.bundle.contract import IMAGE, TEXT, InputSpec, is_denoiser
from fewstep.errors import ExportError, FewstepError

if TYPE_CHECKING:
    from fewstep.export.generator import Generator

# Arguments of pipelines that take an image, and their channels.
IMAGES = {"image": 3, "mask_image": 1, "control_image": 3}
# Options that are lists with a value for every step.
STEP_LISTS = ("timesteps", "sigmas")
# What fewstep itself gives a pipeline, and how to ask for it.
_GIVEN = {
    "prompt": "the prompt is an input of the bundle",
    "num_inference_steps": "give --steps",
    "guidance_scale": "give --guidance",
    "output_type": "bundles give arrays",
    "return_dict": "leave it out",
    "generator": "the seed is an input of the bundle",
    "latents": "the seed is an input of the bundle",
    "batch_size": "give --batch",
    "num_images_per_prompt": "give --batch",
    "num_videos_per_prompt": "give --batch",
    "callback": "a bundle calls nothing back",
    "callback_steps": "a bundle calls nothing back",
    "callback_on_step_end": "a bundle calls nothing back",
}


class _ReachedError(BaseException):
    """Raised at the first call of a denoiser: no pipeline that catches errors must catch it."""


def call_inputs(pipeline: Any, denoiser: Any, options: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    """Returns all that the user of a pipeline can give that a bundle can take, read off the signature of its call."""
    parameters = inspect.signature(pipeline.__call__).parameters
    found = [InputSpec("prompt", TEXT)] if "prompt" in parameters else []
    config: Any = denoiser.config
    classes = getattr(config, "num_class_embeds", None) or getattr(config, "num_embeds_ada_norm", None)
    if "class_labels" in parameters and classes:
        found.append(InputSpec("class_labels", "class", (1,), int(classes)))
    sample = getattr(config, "sample_size", None)
    side = sample[-1] if isinstance(sample, (list, tuple)) else sample
    scale = int(getattr(pipeline, "vae_scale_factor", 1))
    height, width = (int(options.get(name) or (side or 64) * scale) for name in ("height", "width"))
    for argument, channels in IMAGES.items():
        if argument in parameters and argument not in options:
            found.append(InputSpec(argument, IMAGE, (1, channels, height, width)))
    return tuple(found)


def resized(inputs: Sequence[InputSpec], pipeline: Any, denoiser: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns inputs with the sizes that options ask for."""
    now = {spec.name: spec for spec in call_inputs(pipeline, denoiser, options)}
    return tuple(now.get(spec.name, spec) for spec in inputs)


def wanted_inputs(generator: Generator, asked: Collection[str]) -> tuple[InputSpec, ...]:
    """Returns a generator's inputs without the images that its pipeline draws without, but for those asked for.

    Their default in the signature is None in either case, so the pipeline is tried up to its denoiser's first call.

    Raises:
        ExportError: an input that is asked for is none that the pipeline takes.
    """
    inputs = generator.inputs
    names = [spec.name for spec in inputs if spec.name in IMAGES]
    for name in asked:
        if name not in {spec.name for spec in inputs}:
            raise _no_input(generator, name)
    parameters = inspect.signature(generator.pipeline.__call__).parameters
    optional = [name for name in names if name not in asked and parameters[name].default is None]
    if optional and _draws(_without(generator, optional)):
        return _without(generator, optional).inputs
    for name in optional:
        fewer = _without(generator, [name])
        generator = fewer if _draws(fewer) else generator
    return generator.inputs


def check_options(pipeline: Any, options: Mapping[str, Any]) -> None:
    """Raises ExportError unless all options are arguments of a pipeline's call that fewstep does not give itself."""
    parameters = inspect.signature(pipeline.__call__).parameters
    for name in options:
        if name in _GIVEN:
            raise ExportError(f"option {name!r} is not for a fixed value: fewstep gives it", hint=_GIVEN[name])
        if name not in parameters:
            close = get_close_matches(name, parameters, n=1)
            raise ExportError(
                f"{type(pipeline).__name__} takes no option {name!r}",
                hint=f"did you mean {close[0]!r}?" if close else "options are arguments of the pipeline's call",
            )


def as_the_call_wants(pipeline: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options with tuples for lists where the signature asks for a tuple, which JSON and TOML cannot say."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return {
        name: tuple(value) if isinstance(value, list) and _is_tuple(parameters[name].annotation) else value
        for name, value in options.items()
    }


def listed_steps(options: Mapping[str, Any]) -> int | None:
    """Returns the step count that a list with a value for every step fixes, None if no option is one."""
    lists = [options[name] for name in STEP_LISTS if isinstance(options.get(name), (list, tuple))]
    return len(lists[0]) if lists else None


def check_counts(generator: Generator, counts: Sequence[int]) -> None:
    """Raises ExportError if a list with a value for every step is of another length than the step counts ask for."""
    for name in STEP_LISTS:
        value = generator.options.get(name)
        if isinstance(value, (list, tuple)) and set(counts) != {len(value)}:
            raise ExportError(
                f"option {name} has {len(value)} values, and the step counts are {', '.join(map(str, counts))}",
                hint=f"build with --steps {len(value)}, or give {name} a value for every step",
            )


def _is_tuple(annotation: Any) -> bool:
    text = str(annotation).lower()
    return "tuple" in text and "list" not in text


def _no_input(generator: Generator, name: str) -> ExportError:
    takes = [spec.name for spec in generator.inputs]
    close = get_close_matches(name, takes, n=1)
    return ExportError(
        f"{type(generator.pipeline).__name__} has no input {name!r} that a bundle can take, it has: {', '.join(takes)}",
        hint=f"did you mean {close[0]!r}?" if close else "arguments of a fixed value are options: --option NAME=VALUE",
    )


def _without(generator: Generator, names: Collection[str]) -> Generator:
    return replace(generator, inputs=tuple(spec for spec in generator.inputs if spec.name not in names))


def _draws(generator: Generator) -> bool:
    """Returns whether a pipeline gets as far as its denoiser with a generator's inputs."""
    from fewstep.export.record.run import run
    from fewstep.export.schedule.extract import example_prompts
    from fewstep.export.source.offloaded_networks import shape_stand_ins
    from fewstep.numerics.inputs import example_inputs

    def reached(_: int, __: Any) -> Any:
        raise _ReachedError

    stubs = {} if generator.stored is None else shape_stand_ins(generator)
    prompts, given = example_prompts(generator), example_inputs(generator.inputs, 0)
    count = generator.default_steps
    stubs = {**stubs, **{name: reached for name in generator.parts if is_denoiser(name)}}
    try:
        with torch.no_grad():
            run(generator, prompts, 0, steps=count, guidance=generator.guidance, inputs=given, stubs=stubs)
    except _ReachedError:
        return True
    except FewstepError:
        return False
    return False
