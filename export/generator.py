"""A few-step generator as loaded: its networks, how it is called and how it likes to be sampled."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import diffusers.utils
import torch

from fewstep.bundle.contract import DECODER, DENOISER, ENCODER, TEXT, InputSpec
from fewstep.bundle.source import SourceInfo
from fewstep.errors import ExportError, SourceError
from fewstep.export.custom_loop import Loop, SampleFunction
from fewstep.export.fingerprint import code_and_weights
from fewstep.export.record.arguments import (
    as_the_call_wants,
    call_inputs,
    check_options,
    listed_steps,
    resized,
    wanted_inputs,
)
from fewstep.export.source.offloaded_networks import StoredNetworks
from fewstep.export.source.tiled_decoder import with_tiling
from fewstep.recipe import call_options

DEFAULT_PROMPTS = (
    "a red apple on a table",
    "a cat wearing sunglasses",
    "a sailing boat at sunset",
    "a wooden house in the snow",
    "a bunch of sunflowers",
    "an astronaut riding a horse",
    "a bowl of ramen",
    "a portrait of an old man",
)
DEFAULT_STEPS = (1, 2, 4, 8)

_DENOISERS = ("unet", "transformer")
# Filters of pictures, and networks that only other ways of calling a pipeline use.
_LEFT_OUT = ("safety_checker", "image_encoder", "feature_extractor", "watermark")
# Those of them that the user is told of.
_TOLD = ("safety_checker", "image_encoder")
# Fields of diffusers' results.
_KINDS = {"images": "picture", "frames": "video", "audios": "audio", "prediction": "depth"}


class UndecidedScale(float):
    """No guidance, unless the scale turns out to be an input of the network.

    See `fewstep.export.contract.guidance_embedding.decided`.
    """


@dataclass(frozen=True)
class Part:
    """One component of a pipeline: attribute ``attribute``'s method ``method`` is the network call."""

    attribute: str
    method: str
    folder: str


@dataclass(frozen=True)
class Generator:
    """A diffusers pipeline or a `Loop` with what the compiler must know beside it.

    ``guidance`` is the scale w that samples use; 0 means that the pipeline runs without guidance. ``inputs`` are what
    its user gives; ``options`` further arguments of every call (``strength``, ``height``, ...), each a value or a
    function of the step count. ``kind`` is what comes out (picture, audio, video or depth), ``rate`` the number of
    samples a second of a sound.
    """

    name: str
    source: SourceInfo
    pipeline: Any
    parts: Mapping[str, Part]
    guidance: float
    inputs: tuple[InputSpec, ...] = (InputSpec("prompt", TEXT),)
    default_steps: int = 4
    steps: tuple[int, ...] = DEFAULT_STEPS
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    calibration_prompts: tuple[str, ...] = ()
    """What ranges are fitted to; none of ``prompts``, with which the result is checked."""
    licences: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "picture"
    rate: int | None = None
    stored: StoredNetworks | None = None
    """Where the weights are, if the pipeline's modules have none."""
    batch: int = 1
    """How many samples one call of the pipeline draws."""

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        source: SourceInfo,
        *,
        name: str,
        options: Mapping[str, Any] | None = None,
        inputs: Sequence[str] = (),
        stored: StoredNetworks | None = None,
    ) -> Generator:
        """Returns the generator of a loaded diffusers pipeline.

        Args:
            pipeline: the pipeline, on the CPU in float32.
            source: where it came from.
            name: what to call it.
            options: further arguments of every call, for instance ``{"strength": 0.5}``.
            inputs: images that the pipeline can do without and that its user gives, for instance ``["image"]``.
            stored: where the weights are, if the pipeline's modules have none.

        Raises:
            SourceError: the pipeline lacks a denoiser, or a network or tokenizer that it cannot do without.
            ExportError: it takes no such option or input.
        """
        pipeline, left_out = _without_checker(pipeline)
        source = replace(source, left_out=tuple(dict.fromkeys((*source.left_out, *left_out))))
        options = dict(options or {})
        check_options(pipeline, options)
        options = as_the_call_wants(pipeline, options)
        modules = {
            attribute: module
            for attribute, module in pipeline.components.items()
            if isinstance(module, torch.nn.Module) and attribute not in _LEFT_OUT
        }
        denoiser = next((a for a in _DENOISERS if a in modules), None)
        if denoiser is None:
            raise SourceError(f"{type(pipeline).__name__} has no denoiser, expected {' or '.join(_DENOISERS)}")
        _refuse_incomplete(pipeline, modules)
        parts: dict[str, Part] = {}
        for attribute in modules:
            if attribute == "vae":
                parts[ENCODER] = Part("vae", "encode", "vae_encoder")
                parts[DECODER] = Part("vae", "decode", "vae_decoder")
            else:
                parts[_component(attribute, denoiser)] = Part(attribute, "forward", attribute)
        tokenizers = {a: t for a, t in pipeline.components.items() if hasattr(t, "model_max_length")}
        made = cls(
            name=name,
            source=replace(source, inputs=tuple(inputs)),
            pipeline=pipeline,
            parts=parts,
            guidance=UndecidedScale(0.0),
            inputs=call_inputs(pipeline, modules[denoiser], options),
            options=options,
            tokenizers=tokenizers,
            kind=_kind(pipeline),
            rate=_rate(modules.values()),
            stored=stored,
        )._at_listed_steps()
        return replace(made, inputs=wanted_inputs(made, inputs))

    @classmethod
    def assemble(
        cls,
        name: str,
        networks: Mapping[str, torch.nn.Module],
        sample: SampleFunction,
        *,
        inputs: Sequence[InputSpec] = (),
        kind: str = "picture",
        rate: int | None = None,
        steps: Sequence[int] = DEFAULT_STEPS,
        default_steps: int | None = None,
        guidance: float = 0.0,
        tokenizers: Mapping[str, Any] | None = None,
        prompts: Sequence[str] = DEFAULT_PROMPTS,
        licences: Mapping[str, str] | None = None,
        source: SourceInfo | None = None,
    ) -> Generator:
        """Returns a generator made of plain PyTorch networks.

        Args:
            name: what to call it.
            networks: by name; the one of the loop is ``denoiser``. Networks that take its place in some of the steps
                are ``denoiser_...``.
            sample: the sampling function, see `SampleFunction`.
            inputs: what the user gives; a text input names its tokenizer.
            kind: what comes out: picture or video (in [-1, 1]), audio (in [-1, 1]) or depth (in [0, 1]).
            rate: samples a second of a sound.
            steps: step counts to make schedules for.
            default_steps: the one to use by default; None takes the last of ``steps``.
            guidance: handed to ``sample``.
            tokenizers: transformers tokenizers by input name.
            prompts: what parity is checked with.
            licences: licence texts of the weights, by name.
            source: where it came from; None hashes the networks and the code.
        """
        parts = {n: Part(n, "forward", n) for n in networks}
        return cls(
            name=name,
            source=source or SourceInfo(name, "python", code_and_weights({"sample": sample, **networks})),
            pipeline=Loop(networks, sample),
            parts=parts,
            guidance=guidance,
            inputs=tuple(inputs),
            default_steps=default_steps or steps[-1],
            steps=tuple(steps),
            prompts=tuple(prompts),
            licences=licences or {},
            tokenizers=tokenizers or {},
            kind=kind,
            rate=rate,
        )

    @property
    def is_loop(self) -> bool:
        """Whether this is a `Loop` and not a diffusers pipeline."""
        return isinstance(self.pipeline, Loop)

    def module(self, component: str) -> torch.nn.Module:
        """Returns the module of a component."""
        module: torch.nn.Module = getattr(self.pipeline, self.parts[component].attribute)
        return module

    def shaped(self, height: int, width: int) -> Generator:
        """Returns a generator whose pipeline draws pictures of another size, in pixels.

        Raises:
            SourceError: its pipeline does not take a size.
        """
        parameters = () if self.is_loop else inspect.signature(self.pipeline.__call__).parameters
        if not {"height", "width"} <= set(parameters):
            raise SourceError(
                f"{type(self.pipeline).__name__} does not take height and width, expected its own size",
                hint="leave the shape out",
            )
        options = {**self.options, "height": height, "width": width}
        return replace(
            self, options=options, inputs=resized(self.inputs, self.pipeline, self.module(DENOISER), options)
        )

    def called_with(self, options: Mapping[str, Any], inputs: Sequence[str] = ()) -> Generator:
        """Returns a generator whose pipeline is called with further options, and given inputs that it can do without.

        Raises:
            ExportError: its pipeline takes no such option or input, or it has no pipeline.
        """
        if not options and not inputs:
            return self
        if self.is_loop:
            what = next(iter([*options, *inputs]))
            raise ExportError(
                f"{self.name} is a sampling function and takes no option or further input {what!r}",
                hint="say it in the Python function that makes the generator",
            )
        check_options(self.pipeline, options)
        options = {**self.options, **as_the_call_wants(self.pipeline, options)}
        inputs = tuple(dict.fromkeys((*self.source.inputs, *inputs)))
        every = call_inputs(self.pipeline, self.module(DENOISER), options)
        made = replace(
            self, options=options, inputs=every, source=replace(self.source, inputs=inputs)
        )._at_listed_steps()
        return replace(made, inputs=wanted_inputs(made, inputs))

    def _at_listed_steps(self) -> Generator:
        """Returns the generator at the step count that an option with a value for every step fixes."""
        count = listed_steps(self.options)
        return self if count is None else replace(self, steps=(count,), default_steps=count)

    def batched(self, batch: int) -> Generator:
        """Returns a generator whose pipeline draws so many samples in one call, each with a prompt of its own."""
        return replace(self, batch=batch)

    def tiled(self, tile: int) -> Generator:
        """Returns a generator whose pipeline decodes in overlapping tiles of so many pixels to a side.

        Raises:
            SourceError: it has no decoder that does so, or not with tiles of this size.
        """
        if self.is_loop or DECODER not in self.parts:
            raise SourceError(f"{self.name} has no decoder to tile, expected a diffusers pipeline with AutoencoderKL")
        return self.with_modules({DECODER: with_tiling(self.module(DECODER), tile)})

    def with_modules(self, modules: Mapping[str, torch.nn.Module]) -> Generator:
        """Returns a generator whose pipeline holds other modules for some components; this one is left as it is."""
        pipeline = copy.copy(self.pipeline)
        config = None if self.is_loop else self.pipeline._internal_dict
        if config is not None:
            pipeline._internal_dict = dict(config)  # diffusers writes the modules' names into it
        for component, module in modules.items():
            setattr(pipeline, self.parts[component].attribute, module)
        if config is not None:
            pipeline._internal_dict = type(config)(pipeline._internal_dict)
        return replace(self, pipeline=pipeline)


def _without_checker(pipeline: Any) -> tuple[Any, list[str]]:
    """Returns a pipeline whose safety checker does not run, and the names of what it has and a bundle has not."""
    left_out = [name for name in _TOLD if pipeline.components.get(name) is not None]
    if "safety_checker" not in left_out:
        return pipeline, left_out
    without, config = copy.copy(pipeline), pipeline._internal_dict
    without._internal_dict = dict(config)  # diffusers writes the modules' names into it
    without.safety_checker = None
    without._internal_dict = type(config)(without._internal_dict)
    return without, left_out


def recorded_source(generator: Generator, steps: Sequence[int]) -> SourceInfo:
    """Returns a generator's source with its options, as the manifest keeps them for its step counts.

    A generator is described with two steps or more, so options are kept for two, too.
    """
    return replace(generator.source, options=call_options.to_json(generator.options, {*steps, 2}))


def _component(attribute: str, denoiser: str) -> str:
    """Returns what a bundle calls a network of a pipeline; some have a second denoiser, for some of the steps."""
    return {denoiser: DENOISER, f"{denoiser}_2": f"{DENOISER}_2"}.get(attribute, attribute)


def _refuse_incomplete(pipeline: Any, modules: Mapping[str, torch.nn.Module]) -> None:
    """Raises SourceError for what a pipeline cannot do without although ``model_index.json`` leaves it out.

    Pipelines with several text encoders do without some of them, but then without their tokenizers too.
    """
    components = pipeline.components
    missing = [name for name in ("vae", "scheduler") if name in components and components[name] is None]
    encoders = [name for name in components if name.startswith("text_encoder")]
    for name in encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        pair = {name: name in modules, tokenizer: components.get(tokenizer) is not None}
        missing += [n for n, there in pair.items() if not there and any(pair.values())]
    if encoders and not any(name in modules for name in encoders) and not missing:
        missing.append(encoders[0])
    if missing:
        raise SourceError(
            f"{type(pipeline).__name__} has no {missing[0]}, expected all of: {', '.join(components)}",
            hint=f"{missing[0]} must be in model_index.json, with its folder",
        )


def _kind(pipeline: Any) -> str:
    """Returns what a pipeline makes: its module defines or imports the class of its results."""
    module = sys.modules[type(pipeline).__module__]
    results = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, diffusers.utils.BaseOutput)]
    names = {field.name for result in results if is_dataclass(result) for field in fields(result)}
    return next((kind for name, kind in _KINDS.items() if name in names), "picture")


def _rate(modules: Iterable[torch.nn.Module]) -> int | None:
    """Returns the samples a second that one of the networks is configured for."""
    rates = [getattr(getattr(module, "config", None), "sampling_rate", None) for module in modules]
    return next((int(rate) for rate in rates if rate), None)
