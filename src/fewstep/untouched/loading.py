"""Loads a pipeline as its user does: diffusers' own ``from_pretrained``, and its own ways to lay something over it."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fewstep.untouched.request import Source

# Filters of finished images, and networks that a call with a prompt alone does not use. A bundle has a filter only
# where its user kept it; without one, its images are compared with those of a pipeline without one.
FILTERS = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Subject:
    """What is called: a diffusers pipeline, or a sampling loop in plain PyTorch.

    ``options`` are further arguments of every call, each a value or a function of the step count; ``through`` as in
    `fewstep.untouched.request.Answer`.
    """

    pipeline: Any
    is_loop: bool = False
    guidance: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    through: str = ""


class NotPlain(Exception):
    """What is laid over a pipeline cannot be laid over it by diffusers' own means; the text says why."""


def load_subject(source: Source) -> Subject:
    """Returns what a source names, in fp32, on the CPU."""
    sys.path[:] = [*source.path, *(entry for entry in sys.path if entry not in source.path)]
    _quiet()
    try:
        if source.kind == "function":
            if source.seed is not None:
                _seed(source.seed)
            module, _, function = source.uri.partition(":")
            subject = of_generator(getattr(importlib.import_module(module), function)())
            _lay_over(subject.pipeline, source)
            return subject
        if source.kind != "folder":
            raise NotPlain(f"diffusers' users load a source of kind {source.kind} in several ways")
        pipeline = _of_folder(source)
        _lay_over(pipeline, source)
        return Subject(pipeline, tokenizers=tokenizers_of(pipeline))
    except NotPlain as error:
        return _by_the_loader(source, str(error))


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def of_generator(generator: Any) -> Subject:
    """Returns what a `fewstep.export.Generator` holds, read without its class."""
    if not generator.is_loop:
        generator.pipeline.set_progress_bar_config(disable=True)
    return Subject(generator.pipeline, generator.is_loop, generator.guidance, generator.options, generator.tokenizers)


def tokenizers_of(pipeline: Any) -> dict[str, Any]:
    """Returns a pipeline's tokenizers by name; of a processor, its tokenizer."""
    found = {}
    for name, component in pipeline.components.items():
        if hasattr(component, "model_max_length"):
            found[name] = component
        elif hasattr(getattr(component, "tokenizer", None), "model_max_length"):
            found[name] = component.tokenizer
    return found


def _of_folder(source: Source) -> Any:
    import diffusers

    index = json.loads(Path(source.folder, "model_index.json").read_text(encoding="utf-8"))
    arguments: dict[str, Any] = {n: None for n in FILTERS if n in index and n not in source.keep}
    if "safety_checker" in arguments:
        arguments["requires_safety_checker"] = False
    if source.variant is not None:
        arguments["variant"] = source.variant
    # By its own class: the general one looks for an image encoder's files although it is told to leave it out.
    pipeline_class = getattr(diffusers, str(index["_class_name"]), diffusers.DiffusionPipeline)
    pipeline = pipeline_class.from_pretrained(
        source.folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **arguments
    )
    pipeline.to(torch.float32)  # what transformers leaves in the precision of its file
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _lay_over(pipeline: Any, source: Source) -> None:
    """Lays decoder, weights and LoRAs over a pipeline, and sets its tiles, as a user of diffusers does."""
    import diffusers

    if not isinstance(pipeline, diffusers.DiffusionPipeline):
        if source.loras or source.decoder or source.components:
            raise NotPlain("diffusers lays nothing over a loop in plain PyTorch")
        return
    if source.decoder is not None:
        config = json.loads(Path(source.decoder, "config.json").read_text(encoding="utf-8"))
        decoder_class = getattr(diffusers, config["_class_name"])
        pipeline.vae = decoder_class.from_pretrained(source.decoder, use_safetensors=True, torch_dtype=torch.float32)
    for name, path in source.components.items():
        try:
            getattr(pipeline, name).load_state_dict(load_file(path))
        except RuntimeError as error:
            raise NotPlain(f"{path} has other names of tensors than {name}") from error
    if source.loras:
        _lay_loras_over(pipeline, source)
    if source.tile is not None:
        vae = pipeline.vae
        vae.enable_tiling()
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.tile_sample_min_size, vae.tile_latent_min_size = source.tile, source.tile // scale


def _lay_loras_over(pipeline: Any, source: Source) -> None:
    from diffusers.utils import is_peft_available

    if not is_peft_available():
        raise NotPlain("diffusers merges LoRAs with peft, which is not installed")
    names = [f"lora_{i}" for i, _ in enumerate(source.loras)]
    try:
        for name, (path, _) in zip(names, source.loras, strict=True):
            pipeline.load_lora_weights(path, adapter_name=name)
        pipeline.set_adapters(names, [scale for _, scale in source.loras])
        pipeline.fuse_lora(adapter_names=names)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise NotPlain(f"diffusers does not load the LoRAs: {error}") from error


def _by_the_loader(source: Source, why: str) -> Subject:
    """Returns what fewstep's own loader makes of a source: its reading of the files is not put to the test then."""
    from fewstep.bundle.source import Lora, Replacement, SourceSpec
    from fewstep.export import load  # the one import of the compiler, told in the report

    loras = tuple(Lora(path, scale) for path, scale in source.loras)
    replacements = tuple(Replacement(name, path) for name, path in source.components.items())
    spec = SourceSpec(source.uri, loras, source.decoder, replacements, source.config, source.variant)
    generator = load(spec, eager=True)
    subject = of_generator(generator if source.tile is None else generator.tiled(source.tile))
    return Subject(**{**subject.__dict__, "through": why})


def _quiet() -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
