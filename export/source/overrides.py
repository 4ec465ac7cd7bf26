"""Lays over a loaded generator what its source names beside itself: another decoder, component weights, LoRAs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.bundle.contract import DECODER
from fewstep.bundle.source import MergedLora, Replacement, SourceInfo, SourcePart, SourceSpec
from fewstep.errors import SourceError
from fewstep.export.generator import Generator
from fewstep.export.source.lora import component_names, lora_sha256, merge_loras
from fewstep.export.source.model_index import read_config
from fewstep.export.source.networks import load_network
from fewstep.export.source.single_file import load_component
from fewstep.export.source.weight_checks import check_weights_folder
from fewstep.hashing import file_sha256, folder_sha256, value_sha256


def lay_over(generator: Generator, spec: SourceSpec) -> Generator:
    """Returns the generator with its decoder and components replaced, then its LoRAs merged; its hash covers them.

    Raises:
        SourceError: a file is missing or damaged, or does not fit the generator.
        ExportError: the generator takes no such option or input.
    """
    fresh = {name: value for name, value in spec.options.items() if generator.options.get(name) != value}
    if fresh or set(spec.inputs) - set(generator.source.inputs):
        generator = generator.called_with(spec.options, spec.inputs)
    if spec.decoder is not None:
        generator = _with_decoder(generator, Path(spec.decoder))
    for replacement in spec.replacements:
        generator = _with_weights(generator, replacement)
    if spec.loras:
        generator = merge_loras(generator, spec.loras)
    return replace(generator, source=_recorded(generator.source, spec))


def _with_decoder(generator: Generator, folder: Path) -> Generator:
    """Returns the generator with the autoencoder of a diffusers folder in place of its own.

    What the decoder takes, x / scale + shift, follows the new one's configuration.
    """
    import diffusers
    import torch

    decoder_class: Any = getattr(diffusers, _decoder_class(folder), None)
    if not (isinstance(decoder_class, type) and hasattr(decoder_class, "decode")):
        raise SourceError(
            f"{folder}/config.json: {_decoder_class(folder)!r} is not a decoder of diffusers {diffusers.__version__}",
            hint="for example AutoencoderTiny or AutoencoderKL",
        )
    check_weights_folder(folder)
    loaded, unused = load_network(folder, decoder_class, None)
    takes, has = (_latent_channels(decoder) for decoder in (loaded, generator.module(DECODER)))
    if takes != has:
        raise SourceError(
            f"decoder {folder} takes {takes} latent channels, the generator's latents have {has}",
            hint="take the decoder for this family of latents: they are not interchangeable",
        )
    others = {name: keys for name, keys in generator.source.unused.items() if name != "vae"}
    source = replace(generator.source, unused={**others, "decoder": unused} if unused else others)
    return replace(generator, source=source).with_modules({DECODER: loaded.to(torch.float32).eval()})


def _decoder_class(folder: Path) -> str:
    path = folder / "config.json"
    try:
        return str(read_config(path)["_class_name"])
    except (SourceError, KeyError) as error:
        raise SourceError(
            f"decoder {folder} has no config.json that names its class, expected the folder of a diffusers autoencoder",
            hint="save it with save_pretrained; of a whole checkpoint, give its vae folder",
        ) from error


def _latent_channels(decoder: Any) -> int:
    return int(decoder.config.latent_channels)


def _with_weights(generator: Generator, replacement: Replacement) -> Generator:
    names = component_names(generator)
    if replacement.component not in names:
        raise SourceError(
            f"{type(generator.pipeline).__name__} has no component {replacement.component!r}, "
            f"expected one of {', '.join(names)}",
            hint="components are named as in model_index.json",
        )
    component = names[replacement.component]
    module = load_component(Path(replacement.path), replacement.component, generator.module(component))
    return generator.with_modules({component: module})


def _recorded(source: SourceInfo, spec: SourceSpec) -> SourceInfo:
    """Returns the source with everything that was laid over it, in its records and in its hash."""
    decoder = None if spec.decoder is None else SourcePart(spec.decoder, _decoder_sha256(Path(spec.decoder)))
    components = {r.component: SourcePart(r.path, file_sha256(Path(r.path))) for r in spec.replacements}
    loras = tuple(MergedLora(lora.path, lora.scale, lora_sha256(Path(lora.path))) for lora in spec.loras)
    if decoder is None and not components and not loras:
        return source
    covered = {
        "source": source.sha256,
        "decoder": None if decoder is None else decoder.sha256,
        "components": {name: part.sha256 for name, part in components.items()},
        "loras": [[lora.sha256, lora.scale] for lora in loras],
    }
    return replace(source, sha256=value_sha256(covered), decoder=decoder, components=components, loras=loras)


def _decoder_sha256(folder: Path) -> str:
    return folder_sha256(folder, [folder / "config.json", *folder.glob("*.safetensors")])
