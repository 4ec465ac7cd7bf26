"""A few-step generator as loaded: its pipeline, its components and how it likes to be sampled."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fewstep.errors import SourceError
from fewstep.manifest import DECODER, DENOISER, SourceInfo

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


@dataclass(frozen=True)
class Part:
    """One component of a pipeline: attribute ``attribute``'s method ``method`` is the network call."""

    attribute: str
    method: str
    folder: str


# The names diffusers gives to the networks of its pipelines, and the folders of their ONNX exports.
_PARTS = {
    "text_encoder": Part("text_encoder", "forward", "text_encoder"),
    DENOISER: Part("unet", "forward", "unet"),
    DECODER: Part("vae", "decode", "vae_decoder"),
}
_DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Generator:
    """A diffusers pipeline with what the compiler must know beside it.

    ``guidance`` is the scale w that samples use; 0 means that the pipeline runs without guidance.
    """

    name: str
    source: SourceInfo
    pipeline: Any
    parts: Mapping[str, Part]
    guidance: float
    default_steps: int = 4
    steps: tuple[int, ...] = DEFAULT_STEPS
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    licences: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_pipeline(cls, pipeline: Any, source: SourceInfo, *, name: str) -> Generator:
        """Returns the generator of a loaded diffusers pipeline.

        Raises:
            SourceError: the pipeline lacks a denoiser, a decoder or a text encoder with its tokenizer.
        """
        parts = dict(_PARTS)
        denoiser = next((a for a in _DENOISERS if getattr(pipeline, a, None) is not None), None)
        if denoiser is None:
            raise SourceError(f"{type(pipeline).__name__} has no denoiser, expected {' or '.join(_DENOISERS)}")
        parts[DENOISER] = replace(parts[DENOISER], attribute=denoiser, folder=denoiser)
        for part in parts.values():
            if not isinstance(getattr(pipeline, part.attribute, None), torch.nn.Module):
                raise SourceError(
                    f"{type(pipeline).__name__} has no {part.attribute}, "
                    "expected a text-to-image pipeline with one text encoder",
                    hint="text_encoder, tokenizer, unet or transformer, vae and scheduler must be in model_index.json",
                )
        if getattr(pipeline, "tokenizer", None) is None:
            raise SourceError(f"{type(pipeline).__name__} has no tokenizer", hint="add the tokenizer folder")
        embedded = getattr(getattr(pipeline, denoiser).config, "time_cond_proj_dim", None)
        guidance = 8.5 if embedded else 0.0  # 8.5: diffusers' default for latent consistency models
        return cls(name=name, source=source, pipeline=pipeline, parts=parts, guidance=guidance)

    def module(self, component: str) -> torch.nn.Module:
        """Returns the module of a component."""
        module: torch.nn.Module = getattr(self.pipeline, self.parts[component].attribute)
        return module

    def with_modules(self, modules: Mapping[str, torch.nn.Module]) -> Generator:
        """Returns a generator whose pipeline holds other modules for some components; this one is left as it is."""
        pipeline = copy.copy(self.pipeline)
        pipeline._internal_dict = dict(self.pipeline._internal_dict)
        for component, module in modules.items():
            setattr(pipeline, self.parts[component].attribute, module)
        return replace(self, pipeline=pipeline)
